"""Error budgets of softmax attention, componentwise, derived in docs/derivations/softmax.md.

Everything is computed in float64 from the oracle: the weights P are its answer for V = I, and what a query sees is where its answer for
equal scores is not 0. Nothing is shared with the forms that these budgets judge.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .. import oracle
from ..softmax import KEY_BLOCK, QUERY_BLOCK
from .budgets import gamma, rounding, unit_roundoff

EXP = 8   # roundings that one exp may count for: 4 units in the last place; NumPy's float32 exp states 2.52


class _Exact(NamedTuple):
    """The exact intermediate results (…, H, G, N, L) and their errors in the forward, for one call."""

    q: Any
    k: Any
    v: Any
    P: Any
    s: float
    weight: Any       # δ: how far exp(x - m), as it enters a sum over keys, may be off, relatively
    again: Any        # the same for a weight that a backward makes again from the row's m, before it enters a sum
    total: Any        # Σ_j P δ: how far l may be off, relatively
    out: Any
    error: Any        # of out, its rounding to the result's dtype included
    tiny: float
    acc: str
    blocks: int


def softmax_forward_budget(q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None, query_lengths: Any = None,
                           key_lengths: Any = None, key_block: int = KEY_BLOCK) -> np.ndarray:
    """A bound on |out - exact|, for every form and for the dtype of q.

        |error| ≤ (Σ_j P δ |v_j| + |out| Σ_j P δ) / (1 - Σ_j P δ) + the rounding of out

    δ collects the score's γ·|s| |q|·|k|, the rounding of x - m, one exp and one product for each block of keys, and the sums.
    Infinite where scores are so large that no digit of the weights is certain.

    Parameters
    ----------
    q, k, v, causal, scale, query_lengths, key_lengths
        As for `refattn.softmax_attention`.
    key_block : int
        Keys per block of the form that is judged; the running maximum adds roundings for each block.

    Returns
    -------
    bound : (..., Hq, N, M), float64

    Notes
    -----
    The oracle's time (a Python loop over rows) and several (..., N, L) arrays: for tests.

    Examples
    --------
    >>> one = np.ones((1, 1), np.float32)
    >>> bool(0 < softmax_forward_budget(one, one, one).item() < 100 * 2.0**-24)
    True
    """
    bound: np.ndarray = _exact(q, k, v, causal, scale, query_lengths, key_lengths, key_block).error
    return bound.reshape(*q.shape[:-1], v.shape[-1])


def softmax_backward_budget(q: Any, k: Any, v: Any, dout: Any, *, causal: bool = False, scale: float | None = None,
                            query_lengths: Any = None, key_lengths: Any = None, key_block: int = KEY_BLOCK,
                            query_block: int = QUERY_BLOCK) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bounds on |dq - exact|, |dk - exact|, |dv - exact|, for every form and for the dtype of q.

    With r the relative error of a weight made again, and e the error of Y = dO·v - dO·out (γ of its absolute sums, plus |dO| times the
    error of out):

        dv: Σ_i P ((1 + r)(1 + γ) - 1) |dO_i|          dx: e_x = P ((1 + r)(1 + γ₂)(|Y| + e) - |Y|)
        dq: |s| Σ_j (e_x + γ (P |Y| + e_x)) |k_j|      dk: |s| Σ_i (e_x + γ (P |Y| + e_x)) |q_i|

    Parameters
    ----------
    q, k, v, dout, causal, scale, query_lengths, key_lengths
        As for `refattn.softmax_attention_vjp` and its pullback.
    key_block, query_block : int
        Of the form that is judged.

    Returns
    -------
    dq, dk, dv : float64, shapes of q, k, v

    Examples
    --------
    >>> one = np.ones((1, 1), np.float32)
    >>> [bool(0 < b.item() < 200 * 2.0**-24) for b in softmax_backward_budget(one, one, one, one)]
    [True, True, True]
    """
    x = _exact(q, k, v, causal, scale, query_lengths, key_lengths, key_block)
    (groups, N, L), M = x.P.shape[-3:], v.shape[-1]
    seen: Any = (x.P > 0).any(-1)[..., None]
    signed: Any = np.where(seen, np.asarray(dout).astype(np.float64).reshape(x.out.shape), 0)
    dO = np.abs(signed)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        r = np.where(x.total < 1, (1 + x.again) * (1 + gamma(EXP + 2, x.acc)) / (1 - x.total) - 1, np.inf)
        Y = np.abs(signed @ x.v.mT - (signed * x.out).sum(-1, keepdims=True))
        products = dO @ np.abs(x.v).mT + (dO * (np.abs(x.out) + x.error)).sum(-1, keepdims=True)
        e = gamma(M + 2, x.acc) * products + (dO * x.error).sum(-1, keepdims=True)
        ex = x.P * ((1 + r) * (1 + gamma(2, x.acc)) * (Y + e) - Y) + np.where(x.P > 0, x.tiny * (Y + e + 1), 0)
        over_keys = gamma(L + x.blocks + 3, x.acc)
        over_queries = gamma(groups * N + math.ceil(N / max(1, query_block // max(groups, 1))) + 3, x.acc)
        dq = abs(x.s) * _sum(ex + over_keys * (x.P * Y + ex), np.abs(x.k))
        dk = abs(x.s) * _sum((ex + over_queries * (x.P * Y + ex)).mT, np.abs(x.q)).sum(-3)
        dv = (_sum((x.P * ((1 + r) * (1 + over_queries) - 1)).mT, dO) + x.tiny * dO.sum(-2, keepdims=True)).sum(-3)
        dx = x.P * Y
        size_q, size_k, size_v = abs(x.s) * (dx @ np.abs(x.k)), (abs(x.s) * (dx.mT @ np.abs(x.q))).sum(-3), (x.P.mT @ dO).sum(-3)
        bounds = [(error + rounding(size + error, q.dtype)).reshape(shape) for error, size, shape in (
            (dq, size_q, q.shape), (dk, size_k, k.shape), (dv, size_v, v.shape))]
    return bounds[0], bounds[1], bounds[2]


def _exact(q: Any, k: Any, v: Any, causal: bool, scale: float | None, query_lengths: Any, key_lengths: Any, key_block: int) -> _Exact:
    dtype = q.dtype.name
    acc = "float32" if dtype in ("float16", "bfloat16") else dtype
    u, tiny = unit_roundoff(acc), float(np.finfo(acc).tiny)
    (N, D), L = q.shape[-2:], k.shape[-2]
    heads = k.shape[:-2]
    groups = q.shape[-3] // max(k.shape[-3], 1) if heads else 1
    s = 1 / math.sqrt(max(D, 1)) if scale is None else float(scale)
    options = {"causal": causal, "scale": s, "query_lengths": query_lengths, "key_lengths": key_lengths}
    eye = np.broadcast_to(np.eye(L), (*heads, L, L))
    shape = (*heads, groups, N, L)
    seen: Any = oracle.softmax_attention(np.zeros(q.shape), np.zeros(k.shape), eye, **options).reshape(shape) > 0
    P = oracle.softmax_attention(q, k, eye, **options).reshape(shape)
    Q = np.where(seen.any(-1)[..., None], np.asarray(q).astype(np.float64).reshape(*heads, groups, N, D), 0)
    read = seen.any((-3, -2))[..., None]                        # keys that some query sees; the rest may be garbage
    K, V = (np.where(read, np.asarray(x).astype(np.float64), 0)[..., None, :, :] for x in (k, v))
    blocks = max(1, math.ceil(L / key_block))

    score = gamma(D + 4, acc) * abs(s) * (np.abs(Q) @ np.abs(K).mT) + (D + 1) * tiny
    X = s * (Q @ K.mT)
    gap = np.where(seen, np.where(seen, X, -np.inf).max(-1, keepdims=True, initial=-np.inf) - X, 0) if L else X
    worst = np.where(seen, score, 0).max(-1, keepdims=True, initial=0)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        again = np.expm1(score + u * (gap + score + worst))
        sums = gamma(L + blocks + (EXP + 2) * blocks + 1, acc)
        weight = (1 + again) * (1 + sums) - 1
        total = np.where(P > 0, P * weight, 0).sum(-1, keepdims=True) + L * (blocks + 1) * tiny
        out = P @ V
        off = _sum(P * weight, np.abs(V)) + (blocks + 1) * tiny * np.abs(V).sum(-2, keepdims=True) + np.abs(out) * total
        error = np.where(total < 1, off / (1 - total), np.inf) * (1 + u) + u * np.abs(out)
        error = np.where(seen.any(-1)[..., None], error + rounding(np.abs(out) + error, q.dtype), 0)
    return _Exact(Q, K, V, P, s, weight, again, total, out, error, tiny, acc, blocks)


def _sum(errors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """errors @ sizes, where an unbounded error of a weight or of a size that is 0 counts as 0, and any other as 1e200."""
    finite: np.ndarray = np.where(np.isfinite(errors), errors, np.where(np.isnan(errors), 0, 1e200)) @ sizes
    return finite
