"""Hypothesis strategies for attention: shapes with their edges, and arrays for exact and for rounded laws.

    @given(cases(exact=True))
    def test_mine(case): ...

Needs the extra `check`. Arrays are made from a drawn seed rather than element by element: a failing example is one number, and fast.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._array import accumulator, missing_extra

try:
    from hypothesis import strategies as st
except ImportError:
    raise missing_extra("hypothesis", "check") from None


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


class RuleCase(NamedTuple):
    """Inputs and cotangents of one call of a rule with a gate or a delta; g and beta are None where the rule has none."""

    dims: Dims
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray | None
    beta: np.ndarray | None
    state: np.ndarray
    dout: np.ndarray
    dstate: np.ndarray

    def __repr__(self) -> str:
        return f"RuleCase({self.dims}, {self.q.dtype}, g = {_few(self.g)}, beta = {_few(self.beta)})"

    def each(self, f: Any) -> RuleCase:
        """f of every array that there is."""
        changed: list[Any] = [None if x is None else f(x) for x in self[1:]]
        return RuleCase(self.dims, *changed)


def _few(x: np.ndarray | None) -> str:
    return "None" if x is None else f"{x.shape} {x.ravel()[:3]}…"


def dims(*, cross: bool = False, edges: tuple[int, ...] = (0, 1, 31, 32, 33), longest: int = 70, shortest: int = 0, multiple_of: int = 1,
         widths: tuple[tuple[int, int], ...] | None = None) -> st.SearchStrategy[Dims]:
    """Sizes: B and H at least 2 and pairwise different from one another where that can be, N on the `edges` or between.

    `cross`: L keys drawn apart from N queries. For kernels that take some sizes only: N is a multiple of `multiple_of`, up to 5 of them where
    that is more than `longest`, and (D, M) is one of `widths`."""
    most = max(longest // multiple_of, 5 if multiple_of > 1 else 0)
    within = [n for n in edges if shortest <= n * multiple_of and n <= most]
    positions = st.one_of(st.sampled_from(within), st.integers(-(-shortest // multiple_of), most)).map(lambda n: n * multiple_of)

    @st.composite
    def draw_dims(draw: Any) -> Dims:
        N = draw(positions)
        L = draw(positions) if cross else N
        lead = draw(st.sampled_from([(2,), (3,), (2, 2), ()]))
        H, D, M = draw(st.sampled_from([(3, 5, 4), (2, 4, 7), (3, 1, 6), (2, 6, 1), (1, 5, 3)]))
        D, M = (D, M) if widths is None else draw(st.sampled_from(widths))
        return Dims(lead, H, draw(st.sampled_from([1, 1, 2, 3])), N, L, D, M)

    return draw_dims()


def cases(*, dtype: Any = np.float64, exact: bool = False, cross: bool = False, longest: int = 70,
          sizes: st.SearchStrategy[Dims] | None = None) -> st.SearchStrategy[Case]:
    """Arrays of `dtype` for drawn sizes, `sizes` in place of `dims`. `exact`: integers so small that every product and sum is exact in any order
    of summation, forward and backward (the state and its cotangent are in the accumulator dtype)."""
    @st.composite
    def draw_case(draw: Any) -> Case:
        d = draw(dims(cross=cross, longest=longest) if sizes is None else sizes)
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        acc = accumulator(np.dtype(dtype))

        def array(shape: tuple[int, ...], kind: Any = dtype) -> np.ndarray:
            return (rng.integers(-2, 3, shape) if exact else rng.standard_normal(shape)).astype(kind)

        return Case(d, array(d.q), array(d.k), array(d.v), array(d.state, acc), array(d.out), array(d.state, acc))

    return draw_case()


MIXTURES = {                                   # how often a decay is 0, mild, above 0, -50 and -inf
    "none": (1, 0, 0, 0, 0), "mild": (0.1, 0.9, 0, 0, 0), "growing": (0.1, 0.6, 0.3, 0, 0), "strong": (0.1, 0.4, 0, 0.5, 0),
    "resets": (0.2, 0.6, 0, 0, 0.2), "all": (0.1, 0.5, 0.1, 0.2, 0.1)}


def rule_cases(rule: str, *, dtype: Any = np.float64, exact: bool = False, longest: int = 20, wide: bool = True,
               channels: bool | None = None, mixtures: tuple[str, ...] = tuple(MIXTURES),
               sizes: st.SearchStrategy[Dims] | None = None) -> st.SearchStrategy[RuleCase]:
    """Arrays of `dtype` for rule "gated", "delta" or "gated_delta", g and beta in the accumulator dtype if `wide`, else in `dtype`.

    Decays: one per head or one per channel (`channels`: which; None: both), of a drawn mixture. Keys of a delta: of length 1 with β in (0, 1)
    or in (0, 2), or of any length with β |k|² up to about 4.

    `exact`: every form's every sum is exact. Decays are 1 or 0. A delta writes with β |k|² of ½, 1 or 2 at a few positions of each head, at
    two of them with halves, and with β = 0 else. Each β stands at most once in each product of which outputs, gradients and all that
    lies between are sums: forward, what is written at t knows the β up to t; backward, its cotangent those from t on. So all are
    multiples of 1/16. Signs apart they grow by 1 + β |k|² ≤ 3 at each write, and stay below 2^53 (float64), 2^24 and, in float16, 65504."""
    @st.composite
    def draw_case(draw: Any) -> RuleCase:
        d = draw(dims(edges=(0, 1, 3, 4, 5, 7, 8, 9), longest=longest) if sizes is None else sizes)
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        acc = accumulator(np.dtype(dtype))
        more, positions = acc if wide else dtype, d.k[:-1]

        def array(shape: tuple[int, ...], kind: Any = dtype) -> np.ndarray:
            return (rng.integers(-2, 3, shape) if exact else rng.standard_normal(shape)).astype(kind)

        k, g, beta = array(d.k), None, None
        if "gated" in rule:
            per_channel = draw(st.booleans()) if channels is None else channels
            mixture = MIXTURES[draw(st.sampled_from(mixtures))]
            g = log_decays(d.k if per_channel else positions, (0.7, 0, 0, 0, 0.3) if exact else mixture, rng).astype(more)
        if "delta" in rule and exact:
            k, beta = exact_writes(d, {"float64": 12, "float16": 2}.get(np.dtype(dtype).name, 4), rng)
        elif "delta" in rule:
            lengths, most = draw(st.sampled_from([(1, 1), (1, 2), (None, 4)]))
            norms = np.linalg.norm(k.astype(float), axis=-1, keepdims=True)
            k = k / np.where(norms > 0, norms, 1) if lengths else k.astype(float)
            beta = rng.uniform(0, most, positions) / (1 if lengths else np.maximum(norms[..., 0] ** 2, 1))
        return RuleCase(d, array(d.q), k.astype(dtype), array(d.v), g, None if beta is None else beta.astype(more), array(d.state, acc),
                        array(d.out), array(d.state, acc))

    return draw_case()


def log_decays(shape: tuple[int, ...], weights: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """g: 0, mild ones between -e and 0, 1/8, -50 and -inf, as often as `weights` say; see `MIXTURES`."""
    mild = -np.exp(rng.uniform(-6, 1, shape))
    return np.choose(rng.choice(5, shape, p=weights), [np.zeros(shape), mild, np.full(shape, 0.125), np.full(shape, -50.0), np.full(shape, -np.inf)])


def clear_cut(d: Dims, scale: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys (float64) for softmax attention, each a power of two in one of D places: scores are 0, or so large that beside them exp
    of the others is 0 in float64 too. So a row is the mean of what it sees, or of those keys that match it."""
    size = 2.0 ** min(8, max(0, np.ceil(np.log2(1000 / max(abs(scale), 1e-3)) / 2)))
    q, k = (size * np.eye(d.D)[rng.integers(0, d.D, shape[:-1])] for shape in (d.q, d.k))
    return q * np.sign(scale or 1), k


def exact_writes(d: Dims, writes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Keys of 0 and ±1, and β: see `rule_cases`. Where nothing is written keys have any number of ±1, else one or two."""
    k, beta = rng.integers(-1, 2, d.k).astype(float), np.zeros(d.k[:-1])
    for head in np.ndindex(d.k[:-2]):
        for i, t in enumerate(rng.permutation(d.L)[:writes]):
            channels = rng.permutation(d.D)[: rng.integers(1, 3)]
            k[head][t] = 0
            k[head][t, channels] = rng.choice([-1, 1], len(channels))
            sizes = (0.5, 1, 2) if i < 2 else (1, 2)
            beta[head][t] = rng.choice([x for x in sizes if i < 2 or x >= len(channels)]) / len(channels)
    return k, beta


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
