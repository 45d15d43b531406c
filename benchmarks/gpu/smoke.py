"""Linear layers of Transformer Engine under every FP8 recipe against bf16, and how fast they and bare products are.

On a CPU torch's own linear layer stands in for Transformer Engine's, and there is no FP8.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.kernels import relative_error

FP8_TOLERANCE = 0.1
"""FP8 keeps 4 bits of a value in E4M3 and 3 in E5M2: products of random matrices are 3% to 6% off."""


def _recipes() -> dict[str, Any]:
    from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format

    return {
        "bf16": None,
        "delayed": DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, amax_compute_algo="max"),
        "tensorwise": Float8CurrentScaling(fp8_format=Format.HYBRID),
        "blockwise": Float8BlockScaling(),
    }


class Linears:
    """Linear layers without bias in bf16, and the context in which their products are in FP8."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.recipes = _recipes() if self.on_gpu else {"bf16": None}

    def make(self, rows: int, columns: int) -> torch.nn.Module:
        """A layer from [n, columns] to [n, rows]."""
        options: dict[str, Any] = {"bias": False, "device": self.device}
        if not self.on_gpu:
            return torch.nn.Linear(columns, rows, dtype=torch.bfloat16, **options)
        import transformer_engine.pytorch as te

        layer: torch.nn.Module = te.Linear(columns, rows, params_dtype=torch.bfloat16, **options)
        return layer

    def within(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Where the products are computed as the recipe says."""
        if self.recipes[name] is None:
            return contextlib.nullcontext()
        import transformer_engine.pytorch as te

        context: contextlib.AbstractContextManager[Any] = te.autocast(enabled=True, recipe=self.recipes[name])
        return context

    def draw(self, *shape: int) -> Tensor:
        """Random values in bf16."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)


def errors(linears: Linears, size: int) -> dict[str, dict[str, float]]:
    """Relative errors of the output and the gradients of a layer against the product in fp32, by recipe."""
    torch.manual_seed(0)
    x, gradient = linears.draw(2 * size, size // 2), linears.draw(2 * size, size)
    weight = linears.draw(size, size // 2) * 0.02
    exact = {"y": x.float() @ weight.float().T, "dx": gradient.float() @ weight.float()}
    exact["dw"] = gradient.float().T @ x.float()
    result = {}
    for name in linears.recipes:
        layer = linears.make(*weight.shape)
        parameter = next(layer.parameters())
        with torch.no_grad():
            parameter.copy_(weight)
        for _ in range(3):  # delayed scaling finds its scales in the first steps
            inputs = x.clone().requires_grad_()
            parameter.grad = None
            with linears.within(name):
                y = layer(inputs)
            y.backward(gradient)
        assert inputs.grad is not None and parameter.grad is not None
        found = {"y": y.detach(), "dx": inputs.grad, "dw": parameter.grad}
        result[name] = {part: relative_error(found[part], exact[part]) for part in exact}
        wrong = [part for part, error in result[name].items() if not error < FP8_TOLERANCE]
        if wrong:
            raise ArithmeticError(
                f"{name}: {wrong} of a linear layer are further from fp32 than FP8 explains: {result}"
            )
    return result


def _tflops(run: Callable[[], object], num_operations: float, on_gpu: bool, repetitions: int = 10) -> float:
    seconds = []
    for _ in range(3 + repetitions):
        begin = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return num_operations / statistics.median(seconds[3:]) / 1e12


def speeds(linears: Linears, size: int) -> dict[str, float]:
    """TFLOP/s of a bare product in bf16, and of forward and backward through a layer by recipe."""
    a, b, gradient = (linears.draw(size, size) for _ in range(3))
    result = {"product": _tflops(lambda: a @ b, 2 * size**3, linears.on_gpu)}
    for name in linears.recipes:
        layer, inputs = linears.make(size, size), a.clone().requires_grad_()

        def step(layer: torch.nn.Module = layer, inputs: Tensor = inputs, name: str = name) -> None:
            inputs.grad = None
            layer.zero_grad()
            with linears.within(name):
                y = layer(inputs)
            y.backward(gradient)

        result[f"layer, {name}"] = _tflops(step, 6 * size**3, linears.on_gpu)
    return result
