"""Error budgets: how far a right implementation may be from the exact answer, derived and never guessed.

A sum of products of n terms, in any order, differs from the exact one by at most γ_n · (the same sum of absolute values), where
γ_n = n·u / (1 - n·u) and u is the unit roundoff (Higham, Accuracy and Stability of Numerical Algorithms, §3.1). So the budget of a form
is γ_n times the same computation on absolute values, from the oracle in float64; n counts the roundings on the longest path.
"""
from __future__ import annotations

from typing import Any

import numpy as np

_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53,
             np.dtype(np.longdouble).name: float(np.finfo(np.longdouble).eps) / 2}
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}


def unit_roundoff(dtype: Any) -> float:
    """u: half the gap between 1 and the next number. 2⁻¹¹ float16, 2⁻⁸ bfloat16, 2⁻²⁴ float32, 2⁻⁵³ float64.

    >>> unit_roundoff("float32") == 2.0**-24
    True
    """
    return _ROUNDOFF[np.dtype(dtype).name if not isinstance(dtype, str) else dtype]


def gamma(n: float, dtype: Any) -> float:
    """γ_n = n·u / (1 - n·u), the relative error of n roundings in a row.

    >>> gamma(1000, "float32") < 1000.1 * 2.0**-24
    True
    """
    nu = n * unit_roundoff(dtype)
    if nu >= 1:
        raise ValueError(f"n: expected n·u < 1, got n = {n} in {np.dtype(dtype).name}: no bound exists for that many roundings")
    return nu / (1 - nu)


def rounding(x: Any, dtype: Any) -> np.ndarray:
    """The rounding of x on its way to `dtype`: u·|x|, and half the smallest subnormal number for results that underflow."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    return unit_roundoff(name) * np.abs(x) + _SMALLEST[name] / 2


def worst_ratio(actual: Any, expected: Any, bound: Any) -> float:
    """max |actual - expected| / bound over all elements; 0 / 0 counts as 0, NaN as infinity. At most 1 when the bound holds.

    >>> worst_ratio(np.array([1.0, 2.0]), np.array([1.0, 2.5]), np.array([0.0, 1.0]))
    0.5
    """
    actual, expected = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"actual: expected the shape {expected.shape}, got {actual.shape}")
    bound = np.broadcast_to(bound, actual.shape)
    with np.errstate(all="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
        ratio = np.where(error == 0, 0.0, np.where(np.isfinite(error), error / bound, np.inf))
    return float(ratio.max(initial=0.0))


def assert_within(actual: Any, expected: Any, bound: Any, what: str = "out") -> None:
    """Raise AssertionError, with the worst element, its index and its error/bound ratio, unless |actual - expected| ≤ bound everywhere."""
    ratio = worst_ratio(actual, expected, bound)
    if ratio <= 1:
        return
    wide, bound = np.asarray(actual).astype(np.float64), np.broadcast_to(bound, np.shape(actual))
    with np.errstate(all="ignore"):
        error = np.abs(wide - expected)
        error = np.where(np.isnan(error), np.inf, np.where(wide == expected, 0.0, error))
        at = tuple(int(i) for i in np.unravel_index(np.argmax(np.where(error == 0, 0.0, error / np.maximum(bound, 1e-300))), error.shape))
    raise AssertionError(f"{what}{list(at)}: got {wide[at]!r}, expected {np.asarray(expected)[at]!r}; error {error[at]:.3e} is {ratio:.3g} times "
                         f"the bound {bound[at]:.3e}")
