"""The constants of planning/machine.py that are fitted, from the published rows with `fit`.

    python -m megatron_tpt.planning.fit

Two constants and two rows, which the simulator then gives exactly as they were published.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from megatron_tpt.logs import print_result
from megatron_tpt.planning.machine import Shares, machine_named
from megatron_tpt.planning.published import rows

FITTED = ("gemm_bf16", "gemm_fp8")
"""The fitted fields of Shares."""


def fit(assumed: Shares | None = None) -> Shares:
    """The shares in `assumed` with the fitted constants, each from 0.01 to 1, which give the least squares of the
    relative errors of the rows with `fit`."""
    assumed = assumed or Shares()
    machine, known = machine_named("h100"), [row for row in rows() if row.fit]

    def residuals(values: Sequence[float]) -> np.ndarray:
        shares = dataclasses.replace(assumed, **dict(zip(FITTED, values, strict=True)))
        trial = dataclasses.replace(machine, shares=shares)
        return np.array([row.expected(trial) / row.published - 1 for row in known])

    found = least_squares(residuals, [0.5] * len(FITTED), bounds=(0.01, 1.0)).x
    return dataclasses.replace(assumed, **{name: float(value) for name, value in zip(FITTED, found, strict=True)})


if __name__ == "__main__":
    shares = fit()
    print_result("\n".join(f"{name} {getattr(shares, name):.3f}" for name in FITTED))
