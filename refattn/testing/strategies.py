"""Hypothesis strategies for attention: shapes with their edges, and arrays for exact and for rounded laws.

    @given(cases(rule="linear", exact=True))
    def test_mine(case): ...

Needs the extra `test`. Arrays are made from a drawn seed rather than element by element: a failing example is one number, and fast.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._array import accumulator, missing_extra

try:
    from hypothesis import strategies as st
except ImportError:
    raise missing_extra("hypothesis", "test") from None


class Dims(NamedTuple):
    """lead (...), H key/value heads, G query heads for each, N queries, L keys, D and M features."""

    lead: tuple[int, ...]
    H: int
    G: int
    N: int
    L: int
    D: int
    M: int

    @property
    def q(self) -> tuple[int, ...]:
        return (*self.lead, self.H * self.G, self.N, self.D)

    @property
    def k(self) -> tuple[int, ...]:
        return (*self.lead, self.H, self.L, self.D)

    @property
    def v(self) -> tuple[int, ...]:
        return (*self.lead, self.H, self.L, self.M)

    @property
    def out(self) -> tuple[int, ...]:
        return (*self.lead, self.H * self.G, self.N, self.M)

    @property
    def state(self) -> tuple[int, ...]:
        return (*self.lead, self.H, self.D, self.M)


class Case(NamedTuple):
    """Inputs and cotangents of one call; state and dstate are arrays (..., H, D, M)."""

    dims: Dims
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    state: np.ndarray
    dout: np.ndarray
    dstate: np.ndarray

    def __repr__(self) -> str:
        return f"Case({self.dims}, {self.q.dtype}, q = {self.q.ravel()[:3]}…)"


def dims(*, cross: bool = False, edges: tuple[int, ...] = (0, 1, 31, 32, 33), longest: int = 70) -> st.SearchStrategy[Dims]:
    """Sizes: B and H at least 2 and pairwise different from one another where that can be, N on the `edges` or between.

    `cross`: L keys drawn apart from N queries."""
    within = [n for n in edges if n <= longest]
    positions = st.one_of(st.sampled_from(within), st.integers(0, longest))

    @st.composite
    def draw_dims(draw: Any) -> Dims:
        N = draw(positions)
        L = draw(positions) if cross else N
        lead = draw(st.sampled_from([(2,), (3,), (2, 2), ()]))
        H, D, M = draw(st.sampled_from([(3, 5, 4), (2, 4, 7), (3, 1, 6), (2, 6, 1), (1, 5, 3)]))
        return Dims(lead, H, draw(st.sampled_from([1, 1, 2, 3])), N, L, D, M)

    return draw_dims()


def cases(*, dtype: Any = np.float64, exact: bool = False, cross: bool = False, longest: int = 70) -> st.SearchStrategy[Case]:
    """Arrays of `dtype` for drawn sizes. `exact`: integers so small that every product and sum is exact in any order of summation, forward
    and backward (the state and its cotangent are in the accumulator dtype)."""
    @st.composite
    def draw_case(draw: Any) -> Case:
        d = draw(dims(cross=cross, longest=longest))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        acc = accumulator(np.dtype(dtype))

        def array(shape: tuple[int, ...], kind: Any = dtype) -> np.ndarray:
            return (rng.integers(-2, 3, shape) if exact else rng.standard_normal(shape)).astype(kind)

        return Case(d, array(d.q), array(d.k), array(d.v), array(d.state, acc), array(d.out), array(d.state, acc))

    return draw_case()


def strided(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The values of x behind awkward strides: Fortran order, a negative step, a gap, or a transposed base; read-only."""
    which = rng.integers(4)
    if which == 0:
        y = np.asfortranarray(x)
    elif which == 1:
        y = x[..., ::-1].copy()[..., ::-1]
    elif which == 2:
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.asarray(np.nan, x.dtype))
        wide[..., ::2] = x
        y = wide[..., ::2]
    else:
        y = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -2, 0)), 0, -2) if x.ndim > 1 else x.copy()
    y.flags.writeable = False
    return y
