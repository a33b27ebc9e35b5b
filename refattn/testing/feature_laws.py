"""What every feature map obeys, yours too: laws as functions that raise AssertionError, with the worst element, where one is broken.

    fm = FeatureMap(my_forward, my_backward)
    x, dy = rng.standard_normal((2, 3, 7, 4)), rng.standard_normal((2, 3, 7, feature_size(fm, 4)))
    for law in LAWS:
        law(fm, x, dy)

x (..., D) and dy (..., F) are NumPy arrays, float32 or float64; dy is random, never all ones, which hides errors. The laws in `LAWS` hold for
every map; `law_is_nonnegative`, `law_has_kernel` and `law_large_inputs_stay_finite` for those that promise it.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ..features import FeatureMap, feature_size
from .budgets import assert_within, gamma, unit_roundoff


def law_keeps_shape_and_dtype(fm: FeatureMap, x: np.ndarray, dy: np.ndarray) -> None:
    """y is (..., F) and dx (..., D), both of x's dtype; F is what `feature_size` says; x and dy stay as they were, and nobody shares memory
    with them."""
    x_before, dy_before = x.tobytes(), dy.tobytes()
    y, dx = fm.forward(x), fm.backward(dy, x)
    F = feature_size(fm, x.shape[-1], x.dtype)
    assert y.shape == (*x.shape[:-1], F), f"forward: expected the shape {(*x.shape[:-1], F)}, got {y.shape}"
    assert dx.shape == x.shape, f"backward: expected the shape of x {x.shape}, got {dx.shape}"
    assert y.dtype == x.dtype, f"forward: expected {x.dtype}, got {y.dtype}"
    assert dx.dtype == x.dtype, f"backward: expected {x.dtype}, got {dx.dtype}"
    assert x.tobytes() == x_before, "x was written to"
    assert dy.tobytes() == dy_before, "dy was written to"
    for name, result in (("y", y), ("dx", dx)):
        for given, array in (("x", x), ("dy", dy)):
            assert not np.shares_memory(result, array), f"{name} shares memory with {given}: writing to one would change the other"


def law_rows_keep_to_themselves(fm: FeatureMap, x: np.ndarray, dy: np.ndarray) -> None:
    """NaN in one row of x and dy changes no bit of any other row of y and dx. Rows are positions: anything else would let the future, or
    padding, reach them."""
    x, dy = np.ascontiguousarray(x), np.ascontiguousarray(dy)           # one layout, one order of summation
    rows = np.arange(math.prod(x.shape[:-1])).reshape(x.shape[:-1])
    y, dx = fm.forward(x), fm.backward(dy, x)
    for sick in {0, rows.size // 2, rows.size - 1} if rows.size else set():
        well, bad_x, bad_dy = rows != sick, x.copy(), dy.copy()
        bad_x[~well] = bad_dy[~well] = np.nan
        with np.errstate(invalid="ignore"):                             # a map may remark on the NaN
            bad_y, bad_dx = fm.forward(bad_x), fm.backward(bad_dy, bad_x)
        for name, clean, touched in (("y", y, bad_y), ("dx", dx, bad_dx)):
            assert clean[well].tobytes() == touched[well].tobytes(), f"{name}: row {sick} reached another row"


def law_backward_is_linear_in_the_cotangent(fm: FeatureMap, x: np.ndarray, dy: np.ndarray) -> None:
    """dx(2·dy) = 2·dx(dy) and dx(-dy) = -dx(dy), bit for bit, and dx(0) = 0: factors ±2 round nothing."""
    x, dy = np.ascontiguousarray(x), np.ascontiguousarray(dy)           # one layout, one order of summation
    dx = fm.backward(dy, x)
    assert np.array_equal(fm.backward(2 * dy, x), 2 * dx), "backward(2·dy) is not 2·backward(dy)"
    assert np.array_equal(fm.backward(-dy, x), -dx), "backward(-dy) is not -backward(dy)"
    assert not fm.backward(np.zeros_like(dy), x).any(), "backward(0) is not 0"


def law_backward_is_the_transpose(fm: FeatureMap, x: np.ndarray, dy: np.ndarray, roundings: int = 100) -> None:
    """dx_i = ⟨dy, ∂φ/∂x_i⟩, by central differences of forward, all in longdouble.

        ⟨dy, ∂φ/∂x_i⟩ = (4 c(h) - c(2h))/3 + O(h⁴),     c(h) = ⟨dy, φ(x + h e_i) - φ(x - h e_i)⟩ / 2h,     h = u^(1/3)

    The bound is |c(h) - c(2h)|, more than the truncation error of c(2h) and so far more than what is left of it, plus what the roundings
    of forward, `roundings` of them in each feature relative to the largest of its row, make after division by h. x must keep 4h away from
    kinks; 10⁻⁴ is enough where longdouble is wider than float64. forward and backward must take longdouble, as NumPy functions do.
    """
    x, dy = x.astype(np.longdouble), dy.astype(np.longdouble)
    dx = fm.backward(dy, x)
    h = np.longdouble(2.0 ** np.round(np.log2(unit_roundoff(np.longdouble)) / 3))
    largest = np.abs(fm.forward(x)).max(-1, initial=0)
    noise = gamma(roundings, np.longdouble) * np.abs(dy).sum(-1) * largest / h
    for i in range(x.shape[-1]):
        e = np.zeros(x.shape[-1], np.longdouble)
        e[i] = h

        def central(step: np.ndarray, i: int = i) -> np.ndarray:
            width = (x + step)[..., i] - (x - step)[..., i]             # as rounded, not 2h
            return (dy * (fm.forward(x + step) - fm.forward(x - step))).sum(-1) / width

        near, far = central(e), central(2 * e)
        error = dx[..., i] - (4 * near - far) / 3                        # here: assert_within would round both to float64 first
        assert_within(error, np.zeros_like(error), np.abs(near - far) + noise, f"error of dx[..., {i}]")


def law_is_nonnegative(fm: FeatureMap, x: np.ndarray, dy: np.ndarray) -> None:
    """φ(x) ≥ 0, so that similarities are, and the normaliser is no difference."""
    y = fm.forward(x)
    assert (y >= 0).all(), f"forward: expected y ≥ 0, got {y.min()}"


def law_has_kernel(fm: FeatureMap, kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], q: np.ndarray, k: np.ndarray, roundings: float) -> None:
    """φ(q)ᵀφ(k) = kernel(q, k), row by row, for a map that states one; `kernel(q, k) -> (...)` is computed in longdouble.

    The bound is γ_n Σ|φ(q)||φ(k)|, n = F for the sum and `roundings` for the two features. With roundings = 0 it must be exact: integers.
    """
    a, b = fm.forward(q), fm.forward(k)
    exact = kernel(q.astype(np.longdouble), k.astype(np.longdouble))
    bound = gamma(a.shape[-1] + roundings, q.dtype) * (np.abs(a) * np.abs(b)).sum(-1) if roundings else 0.0
    error = (a * b).sum(-1) - exact
    assert_within(error, np.zeros_like(error), bound, "error of φ(q)·φ(k)")


def law_large_inputs_stay_finite(fm: FeatureMap, x: np.ndarray, dy: np.ndarray) -> None:
    """No overflow, no division by zero, no invalid operation at x, however large; y and dx are finite."""
    with np.errstate(over="raise", divide="raise", invalid="raise", under="ignore"):
        y, dx = fm.forward(x), fm.backward(dy, x)
    assert np.isfinite(y).all(), "forward: not finite"
    assert np.isfinite(dx).all(), "backward: not finite"


LAWS = (law_keeps_shape_and_dtype, law_rows_keep_to_themselves, law_backward_is_linear_in_the_cotangent, law_backward_is_the_transpose)
