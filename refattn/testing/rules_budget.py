"""The error budget of rules `gated`, `delta` and `gated_delta`: outputs and all gradients, of every form and any chunk.

For one head, with all N positions as one chunk and letters as in `gated` and `delta`: P_tjd = Π_{j<s≤t} a_sd, b its products from the start, e
to the end, w over all; A_tj = Σ_d q_td k_jd P_tjd. A bar stands for the same sum of absolute values.

**Gated.** Outputs and gradients are sums of products of inputs and decays and nothing is subtracted (but for signs), so each is off by at most
γ_n times its bar. n: sums of N·G, D or M terms, twice over; a product of m decays is off by 2m roundings and m exponentials.

**Delta.** U = T Z solves a system, and what it holds has cancelled: its bar would grow as Π(1 + β|k|²) where U itself does not grow at all. So
rounding is followed to first order through the true T = (I + L)⁻¹, L = Diag(β) B. Let L_c be the blocks of L on the diagonal, one for each chunk,
T_c = (I + L_c)⁻¹, G_c = |T_c|(I + L̄_c). A rounding in T_c is γ times bars at one place, |T₂| L̄ |T₁| with T₁ and T₂ blocks of T_c. To its left and
right stand exact factors: columns of T_c without T₂, T_c[:, 2](I + L₂), rows of T_c without T₁. Blocks that are joined do not overlap, so that all
places together are |T_c| L̄_c |T_c|, and as G_c ≥ I

    |δT_c| ≤ γ_n G_c |T_c| L̄_c G_c |T_c| ≤ γ_n G_c³ |T_c|

What a chunk writes is then off by γ_n G_c³|T_c| times X, the bar of what it starts from; that passes to the chunks behind by exact factors again,

    |δU| ≤ γ_n Y,     Y  = |T(I + L_c)| G_c³|T_c| X,      X = β(|V| + K̄b|S₀| + B̄|U|)
    |δdZ| ≤ γ_n Y',   Y' = |(I + L_c)T|ᵀ (G_c³|T_c|)ᵀ X',  X' = Āᵀ|dO| + K̄e|R| + L̄ᵀ|dZ|

With chunks of one position, the steps, these are |T| X and |T|ᵀ X'. Where maps of chunks are composed (the scan), a composition's rounding is of the
same kind with whole chunks for blocks: the bound is that for one chunk of all positions.

Wherever U, dZ and what dβ multiplies, E = V - KbS₀ - BU, enter a bar, so do their errors once (|U| + Y for |U|, …): products of two errors are
dropped, the only thing that is. For unit keys and β ≤ 1 the rows of G_c³ sum to hundreds in a chunk of 8; where β|k|² > 2, T itself grows as
Π|1 - β|k|²|, and the bound soon says nothing.

Underflow adds half of the smallest number where it happens, and nothing that multiplies it exceeds the same sums with inputs raised by 1 and
decays raised to 1: the budget holds them times the smallest normal number, too.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .budgets import _dtypes, _f64, _groups, gamma, rounding

EXP_ROUNDINGS = 6    # NumPy's float32 exp is within 2.52 units in the last place


class RulesBudget(NamedTuple):
    """Bounds of the outputs and of the gradients, each of its array's shape, in float64; dg and dbeta are None where the rule has no g, beta."""

    out: np.ndarray
    S: np.ndarray
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dg: np.ndarray | None
    dbeta: np.ndarray | None
    dS: np.ndarray


def rules_budget(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, dout: Any, dstate: Any, *, scale: float = 1.0,
                 dtype: Any = None, chunk: int | None = None) -> RulesBudget:
    """How far out, the final state and the gradients may be from exact in `dtype` (q's if None) with its accumulator, to first order.

    For delta rules `chunk` is that of the chunked form, 1 for steps; None, the widest bound, is for the scan, whatever its chunk.

    The reference may be a float64 computation: its error is within the budget for float64, and the factor 2 in n pays for both. g and beta
    are in the accumulator dtype, or add their own `rounding`.

    >>> one, two = np.ones((2, 1)), np.ones((1, 1))
    >>> b = rules_budget(one, one, one, 0 * one[:, 0], one[:, 0], two, one, two, dtype="float32")
    >>> b.out.shape, bool((b.out < 1e-4).all() and (b.out > 2.0**-24).all())
    ((2, 1), True)
    """
    dtype, acc = _dtypes(q, dtype)
    Q, K, V, S, dO, R = (_f64(x) for x in (q, k, v, state, dout, dstate))
    groups, (N, D), M = _groups(Q, K), K.shape[-2:], V.shape[-1]
    n = 2 * (N * groups + D * (2 + np.log2(N + 1)) + M + 4) + (EXP_ROUNDINGS + 2) * N
    results = [(*Q.shape[:-1], M), S.shape, Q.shape, K.shape, V.shape, None if g is None else g.shape, None if beta is None else beta.shape, S.shape]
    bounds: list[Any] = [None if shape is None else np.zeros(shape) for shape in results]
    for at in np.ndindex(K.shape[:-2]):
        queries = (*at[:-1], slice(at[-1] * groups, (at[-1] + 1) * groups)) if at else (None,)         # G axes first, for a matrix too
        errors, bars = _head(Q[queries], K[at], V[at], None if g is None else _f64(g[at]), None if beta is None else _f64(beta[at]), S[at],
                             scale * dO[queries], R[at], abs(scale), chunk or max(N, 1), float(np.finfo(acc).tiny))
        for name, to, error, bar in zip(RulesBudget._fields, bounds, errors, bars, strict=True):
            if to is not None:
                head = to[queries if name in ("out", "dq") else at]
                head[...] = gamma(n, acc) * error + rounding(bar, dtype if name in ("out", "dq", "dk", "dv") else acc)
    return RulesBudget(*bounds)


def _head(Q: Any, K: Any, V: Any, g: Any, beta: Any, S: Any, dO: Any, R: Any, scale: float, chunk: int,
          tiny: float) -> tuple[list[Any], list[Any]]:
    """What γ_n multiplies, and the bars, for one key/value head: Q (G, N, D), dO (G, N, M), K (N, D), V (N, M)."""
    P, b, e, w = _products(np.zeros((len(K), 1)) if g is None else g if g.ndim == 2 else g[:, None], K.shape[-1])
    size = [np.abs(x) for x in (Q, K, V, S, dO, R)]
    zero, one, number = np.zeros_like(V), np.eye(len(K)), np.arange(len(K)) // chunk
    U, dZ, E, own = V, zero, zero, number[:, None] == number                                            # own: both of one chunk
    if beta is not None:
        B = np.tril(np.einsum("td,jd,tjd->tj", K, K, P), -1)
        L = beta[:, None] * B
        T, T_c = np.linalg.inv(one + L), np.linalg.inv(one + own * L)
        U = T @ (beta[:, None] * (V - (b * K) @ S))
        dU = np.einsum("gtd,jd,tjd,gtm->jm", Q, K, P, dO) + (e * K) @ R
        dZ, E = T.T @ dU, V - (b * K) @ S - B @ U
    bars: list[Any] = _sums(size, (P, b, e, w), beta, np.abs(U), np.abs(dZ), np.abs(E), zero, zero, zero)

    def errors(size: list[Any], products: tuple[Any, ...], more: float) -> list[Any]:
        """With what U, dZ and E may be off by; `more` raises them, as `size` has been raised."""
        if beta is None:
            return _sums(size, products, None, size[2], zero, zero, zero, zero, zero)
        (q, k, v, s, do, r), (P, b, e, _) = size, products
        B = np.tril(np.einsum("td,jd,tjd->tj", k, k, P), -1)
        step, given = np.abs(beta)[:, None], v + (b * k) @ s + B @ (np.abs(U) + more)
        G = np.abs(T_c) @ (one + own * step * B)
        H = G @ G @ G @ np.abs(T_c)
        Y = np.abs(T @ (one + own * L)) @ H @ (step * given + more)
        given_dZ = np.einsum("gtd,jd,tjd,gtm->jm", q, k, P, do) + (e * k) @ r + (step * B).T @ (np.abs(dZ) + more)
        Y_dZ = np.abs((one + own * L) @ T).T @ H.T @ given_dZ
        return _sums(size, products, beta, np.abs(U) + more, np.abs(dZ) + more, np.abs(E) + more, Y, Y_dZ, given + B @ Y)

    def raised(least: float) -> tuple[Any, ...]:
        return (np.where(np.tri(len(K))[..., None], np.maximum(P, least), 0), *(np.maximum(x, least) for x in (b, e, w)))

    # decays of at least tiny: float64's own subnormal numbers would make products of matrices slow
    under = errors([x + 1 for x in size], raised(1.0), 1.0)
    total: list[Any] = [None if x is None else x + tiny * y for x, y in zip(errors(size, raised(tiny), 0.0), under, strict=True)]
    for results in (total, bars):
        results[0] = scale * results[0]
        if g is None:
            results[5] = None
        elif g.ndim == 1:
            results[5] = results[5].sum(-1)
    return total, bars


def _sums(size: list[Any], products: tuple[Any, ...], beta: Any, U: Any, dZ: Any, E: Any, Y: Any, Y_dZ: Any, Y_E: Any) -> list[Any]:
    """out, S, dq, dk, dv, dg (N, D), dbeta, dS with every factor's absolute value; Y, Y_dZ, Y_E are added once to U, dZ, E. Gated: U = V."""
    (Q, K, _, S, dO, R), (P, b, e, w) = size, products
    A, dA = np.einsum("gtd,jd,tjd->gtj", Q, K, P), np.tril(dO @ (U + Y).T)
    out, end = A @ (U + Y) + (b * Q) @ S, w[:, None] * S + (e * K).T @ (U + Y)
    dbQ, deK = dO @ S.T, (U + Y) @ R.T
    dQ, dK, dP = _scores_backward(dA, Q, K, P)
    from_before, from_behind = (b * Q * dbQ).sum(0), e * K * deK
    dQ, dK = dQ + b * dbQ, dK + e * deK
    dS, dbeta = w[:, None] * R + np.einsum("gtd,gtm->dm", b * Q, dO), None
    if beta is None:
        dV = np.einsum("gtj,gtm->jm", A, dO) + (e * K) @ R
    else:
        step = np.abs(beta)[:, None]
        dV, dB = step * (dZ + Y_dZ), np.tril(step * (dZ @ (U + Y).T + Y_dZ @ U.T), -1)
        dbeta = (dZ * (E + Y_E) + Y_dZ * E).sum(-1)
        as_query, as_key, more = _scores_backward(dB[None], K[None], K, P)
        dbK = dV @ S.T
        dK, dP, from_before, dS = dK + as_query[0] + as_key + b * dbK, dP + more, from_before + b * K * dbK, dS + (b * K).T @ dV
    # a_s stands in P_tj for j < s ≤ t, in b_t for t ≥ s, in e_j for j < s, and in w
    pairs = np.cumsum(np.cumsum(dP, 1)[::-1], 0)[::-1]                            # over t' ≥ t and j' ≤ j
    dg = np.cumsum(from_before[::-1], 0)[::-1] + w * (S * R).sum(-1)
    for s in range(1, len(K)):
        dg[s] += pairs[s, s - 1] + from_behind[:s].sum(0)
    return [out, end, dQ, dK, dV, dg, dbeta, dS]


def _scores_backward(dA: Any, Q: Any, K: Any, P: Any) -> tuple[Any, Any, Any]:
    """dQ, dK, and what the logarithm of each P_tjd receives, from dA (G, N, N)."""
    return (np.einsum("gtj,jd,tjd->gtd", dA, K, P), np.einsum("gtj,gtd,tjd->jd", dA, Q, P), np.einsum("gtj,gtd,jd,tjd->tjd", dA, Q, K, P))


def _products(g: Any, D: int) -> tuple[Any, Any, Any, Any]:
    """P (N, N, D), 0 for j > t, and b, e (N, D), w (D,) of g (N, W): exponentials of sums, from which resets are kept apart."""
    resets = np.isneginf(g)
    finite, count = (np.concatenate([np.zeros((1, g.shape[-1])), np.cumsum(x, 0)]) for x in (np.where(resets, 0, g), resets))

    def between(late: Any, early: Any) -> Any:
        within = np.where(late[1] == early[1], np.exp(np.minimum(late[0] - early[0], 700)), 0)
        return np.broadcast_to(within, (*within.shape[:-1], D))

    after = finite[1:], count[1:]
    P = between([x[:, None] for x in after], [x[None] for x in after]) * np.tri(len(g))[..., None]
    last = finite[-1], count[-1]
    return P, between(after, (0.0, 0.0)), between(last, after), between(last, (0.0, 0.0))
