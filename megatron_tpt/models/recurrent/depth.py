"""How often the recurrent layers are passed in training: distributions over depths, and their curriculum.

From McLeish et al., "Teaching Pretrained Language Models to Think Deeper" (arXiv 2511.07384). Draws depend on a seed
alone, and on no library's random streams: the same seed gives the same depth everywhere. No torch.
"""

import math
import random
from statistics import NormalDist
from typing import Literal, NamedTuple

Distribution = Literal["poisson-lognormal", "fixed", "uniform"]
Curriculum = Literal["constant", "linear", "1-sqrt"]

LOG_STD = 0.5
"""Standard deviation of the logarithm of the Poisson rate."""
_LARGEST_RATE = 500.0
"""exp(-rate) must not underflow: larger rates are sums of several draws."""


class Depth(NamedTuple):
    """Iterations over the recurrent layers in one forward pass."""

    without_gradient: int
    """The first ones."""
    with_gradient: int
    """The last ones, through which gradients are propagated."""

    @property
    def total(self) -> int:
        """All iterations."""
        return self.without_gradient + self.with_gradient


def scheduled(curriculum: Curriculum, largest: int, num_steps: int, step: int) -> int:
    """The value of a schedule that rises from 1 to `largest` within `num_steps` steps, in the step that follows `step`
    others: ceil(largest f(step / num_steps)), at least 1, with f(x) = x (linear) or 1 - sqrt(1 - x)."""
    if curriculum == "constant" or step >= num_steps:
        return largest
    share = step / num_steps
    if curriculum == "1-sqrt":
        share = 1 - math.sqrt(1 - share)
    return max(1, math.ceil(largest * share))


def _poisson(rate: float, rng: random.Random) -> int:
    """By inversion of the distribution function."""
    if rate > _LARGEST_RATE:
        return _poisson(_LARGEST_RATE, rng) + _poisson(rate - _LARGEST_RATE, rng)
    uniform, count = rng.random(), 0
    probability = total = math.exp(-rate)
    while uniform > total and probability > 0:
        count += 1
        probability *= rate / count
        total += probability
    return count


def draw_depth(distribution: Distribution, mean: int, backprop: int, seed: int) -> Depth:
    """A depth: iterations whose last min(backprop, mean) propagate gradients.

    poisson-lognormal: 1 + Poisson(rate) with rate = exp(N(ln mean - 1/8, 1/2)), so mean + 1 in the mean, as in the
    authors' code; uniform: from 1 to 2 mean - 1; fixed: mean.
    """
    rng = random.Random(seed)
    total = mean
    if distribution == "uniform":
        total = 1 + int(rng.random() * (2 * mean - 1))
    elif distribution == "poisson-lognormal":
        normal = NormalDist().inv_cdf((rng.getrandbits(52) + 0.5) / 2**52)
        total = 1 + _poisson(math.exp(math.log(mean) - LOG_STD**2 / 2 + LOG_STD * normal), rng)
    with_gradient = min(backprop, mean, total)
    return Depth(total - with_gradient, with_gradient)
