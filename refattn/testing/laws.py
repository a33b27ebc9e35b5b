"""Laws that every form of an operator obeys, as functions that raise AssertionError.

Where a law is exact it asks for equal bits; where rounding enters, the bound comes from `budgets`.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# The complex step: h² vanishes beside every number there is, so that the derivative is exact to rounding; a power of two, so that it is
# exact without rounding where all products and sums are.
STEP = 2.0**-664


def derivative(f: Callable[..., Sequence[Any]], arrays: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> list[np.ndarray]:
    """J·x for float64 arrays by the complex step: imag f(a + ih·x) / h. f must be analytic and take complex arrays."""
    return [np.imag(y) / STEP for y in f(*(a + 1j * STEP * x for a, x in zip(arrays, directions, strict=True)))]


def gradient(f: Callable[..., Sequence[Any]], arrays: Sequence[np.ndarray], cotangents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Jᵀ·y for float64 arrays by the complex step, one element at a time: for small arrays."""
    gradients = [np.zeros(a.shape) for a in arrays]
    for which, (a, g) in enumerate(zip(arrays, gradients, strict=True)):
        for at in np.ndindex(a.shape):
            moved = [x.astype(complex) for x in arrays]
            moved[which][at] += 1j * STEP
            g[at] = sum((np.imag(y) / STEP * c).sum() for y, c in zip(f(*moved), cotangents, strict=True))
    return gradients


def law_backward_is_the_transpose(oracle: Callable[..., Sequence[Any]], arrays: Sequence[np.ndarray], gradients: Sequence[np.ndarray],
                                  bounds: Sequence[np.ndarray] | None, cotangents: Sequence[np.ndarray], rng: np.random.Generator) -> None:
    """⟨cotangents, J·x⟩ = ⟨gradients, x⟩ along a random x, J·x by the complex step of the oracle, in float64.

    `bounds` are those of the gradients, element by element: the right side may be off by Σ bound·|x|, and the left side, which rounds the
    same products in another order, by as much again. Without bounds nothing may be off, along a random x of integers: for exact inputs.
    """
    x = [rng.integers(-2, 3, a.shape).astype(float) if bounds is None else rng.standard_normal(a.shape) for a in arrays]
    left = float(sum((y * c).sum() for y, c in zip(derivative(oracle, arrays, x), cotangents, strict=True)))
    right = float(sum((g * d).sum() for g, d in zip(gradients, x, strict=True)))
    allowed = 0.0 if bounds is None else 2 * float(sum((b * np.abs(d)).sum() for b, d in zip(bounds, x, strict=True)))
    assert abs(left - right) <= allowed, (f"⟨dy, J·x⟩ = {left!r}, ⟨Jᵀ·dy, x⟩ = {right!r}: {abs(left - right):.3g} apart, "
                                          f"{allowed:.3g} allowed")


def law_equal_bits(named: dict[str, Sequence[np.ndarray]]) -> None:
    """All forms give the same values, dtypes and shapes: on exact inputs there is no tolerance."""
    first, *others = named
    for other in others:
        for i, (x, y) in enumerate(zip(named[first], named[other], strict=True)):
            assert x.shape == y.shape, f"{other}[{i}]: shape {y.shape}, in {first} {x.shape}"
            assert x.dtype == y.dtype, f"{other}[{i}]: dtype {y.dtype}, in {first} {x.dtype}"
            wrong = np.argwhere(np.asarray(x) != np.asarray(y))
            assert not len(wrong), (f"{other}[{i}] differs from {first} in {len(wrong)} of {x.size} elements, first at "
                                    f"{wrong[0].tolist()}: {y[tuple(wrong[0])]} and {x[tuple(wrong[0])]}")
