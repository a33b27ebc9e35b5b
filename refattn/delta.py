"""Rules `delta` and `gated_delta`: what is written is what the state does not know yet; and their transpose.

    P_t = Diag(a_t) S_{t-1},   u_t = β_t (v_t - P_tᵀ k_t),   S_t = P_t + k_t u_tᵀ,   a_t = exp(g_t)          o_t = S_tᵀ q_t

Rule `delta` (DeltaNet) has a = 1; `gated_delta` has one decay per head (Gated DeltaNet) or one per key channel (KDA). Given the u_t this is
rule `gated` with u for v. Within a chunk, with b, e and the scores A of `gated`, and the same scores B of K with K for j < t,

    u_t = β_t (v_t - S_0ᵀ (b_t ⊙ k_t) - Σ_{j<t} B_tj u_j)         (I + Diag(β) B) U = Diag(β) (V - (b ⊙ K) S_0)

a triangular system. With T = (I + Diag(β) B)⁻¹ (the WY representation: Diag(b_C) - (e ⊙ K)ᵀ T Diag(β) (b ⊙ K) is the product of all
(I - β k kᵀ) Diag(a))

    U = T Z,   Z = Diag(β) (V - (b ⊙ K) S_0)
    O = A U + (b ⊙ Q) S_0          S_C = Diag(b_C) S_0 + (e ⊙ K)ᵀ U

| form    | function        | cost per head, flops                                  | memory beyond inputs and outputs        | arrays            |
|---------|-----------------|-------------------------------------------------------|-----------------------------------------|-------------------|
| chunked | delta_chunked_* | 6·N·D·M + 4·N·C·(D + M) + N·C²                        | a block of chunks, 16 states · log₁₆ N  | NumPy             |
| scan    | delta_scan_*    | as chunked, and log₂(N/C) products of D × D matrices  | all of it, N·D·(D + M) / C              | array API, object |
| masked  | delta_masked_*  | 2·N²·(2·D + 2·M) + N³                                 | N²                                      | array API, object |
| step    | delta_step      | 7·D·M per position                                    | D·M                                     | array API, object |

**Backward** of a chunk, R being the cotangent of the state behind it:

    dU = Aᵀ dO + (e ⊙ K) R                                                        O = A U + …,   S_C = … + (e ⊙ K)ᵀ U
    dZ = Tᵀ dU                                                                    U = T Z: the transposed system, solved by the same T
    dV = Diag(β) dZ,   d(b ⊙ K) = -dV S_0ᵀ                                         Z
    dB = tril(-dV Uᵀ, -1)                                                         (I + Diag(β) B) U = Z: d(Diag(β) B) = -dZ Uᵀ
    dβ_t = dZ_t · (v_t - S_0ᵀ (b_t ⊙ k_t) - Σ_{j<t} B_tj u_j)                     Z and Diag(β) B
    dA = tril(dO Uᵀ),   d(e ⊙ K) = U Rᵀ,   d(b ⊙ Q) = dO S_0ᵀ                      as in `gated`
    dS_0 = Diag(b_C) R + (b ⊙ Q)ᵀ dO - (b ⊙ K)ᵀ dV                                 S_C, O, Z

T is made by halves from products of blocks, not by a general solver: entry by entry its error is within γ J³ |T|, J = |T| (I + |β B|), for each
chunk. For keys of one length and β |k|² ≤ 2 the entries of T are at most 2; beyond, a write overshoots more than it corrects, and state and error
grow without limit.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ._array import Array, namespace, transposed
from .causal import causal_step, causal_step_backward
from .chunks import CHUNK, Residuals, States, chunked_backward, chunked_forward, one_chunk, scan_backward, scan_forward
from .decay import over_group, scores, scores_backward, strictly_lower, unit_lower_inverse
from .gated import fade, fade_backward

# --- all chunks of a block at once: arrays (..., G, T, C, D), g (..., 1, T, C, W), beta (..., 1, T, C, 1), S (..., 1, D, M) ------------


def _forward(xp: Any, states: States, S: Array, Q: Array | None, K: Array, V: Array, g: Array | None,
             beta: Array) -> tuple[Array | None, Array]:
    """O and the state behind the last chunk; without Q only the state."""
    A, B, bQ, bK, eK, whole, _, _ = _all_scores(xp, Q, K, g)
    T = unit_lower_inverse(-beta * B, xp)
    T *= transposed(beta)                                                         # U = [T Diag(β)] [V - (b ⊙ K) S_0]: no pass over V and K
    before, U, end = states(whole, None, S, (eK, T, V, bK))
    if Q is None:
        return None, end
    O = A @ U
    O += bQ @ before
    return O, end


def _backward(xp: Any, states: States, S: Array, R: Array, dO: Array, Q: Array, K: Array, V: Array, g: Array | None,
              beta: Array) -> tuple[Array | None, ...]:
    """dS_0, dQ, dK, dV, dg, dbeta. The states before the chunks are made once more."""
    A, B, bQ, bK, eK, whole, X, AB = _all_scores(xp, Q, K, g)
    T, B, Y = unit_lower_inverse(-beta * B, xp), strictly_lower(B, xp), beta * bK
    before, U, _ = states(whole, None, S, (eK, T, beta * V, Y))
    minus_near = -over_group(transposed(A) @ dO, xp)
    behind, minus_dZ, dS = states(whole, over_group(transposed(bQ) @ dO, xp), R, (Y, transposed(T), minus_near, eK), reverse=True)

    dZ = -minus_dZ
    dV = beta * dZ
    dbeta = xp.sum(dZ * (V - bK @ before - B @ U), axis=-1, keepdims=True)
    dA, dB = dO @ transposed(U), strictly_lower(-(dV @ transposed(U)), xp)
    dbQ, dbK, deK = dO @ transposed(before), -(dV @ transposed(before)), U @ transposed(behind)
    dwhole = xp.sum(before * behind, axis=-1, keepdims=True)
    dX, dK, dg = scores_backward(xp.concat([dA, dB], axis=-4), xp.concat([dbQ, dbK], axis=-4), deK, dwhole, AB, X, K, g, xp)
    return dS, dX[..., :-1, :, :, :], dK + dX[..., -1:, :, :, :], dV, dg, dbeta


def _all_scores(xp: Any, Q: Array | None, K: Array, g: Array | None) -> tuple[Any, ...]:
    """A; B, of which the strict triangle counts; b ⊙ Q, b ⊙ K, e ⊙ K, Π a; and X = [Q; K] side by side along G with the scores of both."""
    X = K if Q is None else xp.concat([Q, K], axis=-4)
    AB, bX, eK, whole = scores(X, K, g, xp)
    return AB[..., :-1, :, :, :], AB[..., -1:, :, :, :], bX[..., :-1, :, :, :], bX[..., -1:, :, :, :], eK, whole, X, AB


# --- the forms ------------------------------------------------------------------------------------------------------------------------

def delta_chunked_forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray | None, beta: np.ndarray,
                          state: np.ndarray | None = None, *, chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """o_t = S_tᵀ q_t, S_t = P_t + β_t k_t (v_t - P_tᵀ k_t)ᵀ, P_t = Diag(exp(g_t)) S_{t-1}, a chunk at a time.

    Parameters
    ----------
    q, k, v, g, state, chunk
        As in `gated.gated_chunked_forward`; g is None for rule `delta`.
    beta : (..., H, N)
        How much of the error v - Pᵀ k is written.

    Returns
    -------
    out, state, residuals
        As there; so are what is raised and how numbers are rounded.

    >>> k, v, beta = np.array([[1.0, 0], [0, 1], [1, 0]]), np.array([[1.0], [2], [5]]), np.ones(3)
    >>> delta_chunked_forward(k, k, v, None, beta, chunk=2)[1].ravel()      # the last value under each key
    array([5., 2.])
    """
    return chunked_forward(_forward, q, k, v, (g, beta), state, chunk)


def delta_chunked_backward(dout: np.ndarray, dstate: np.ndarray | None, residuals: Residuals) -> tuple[Any, ...]:
    """Transpose of `delta_chunked_forward` (see the top of this file): dq, dk, dv, dg, dbeta, dstate0; dg is None where g was.

    The states before the chunks are made once more, block by block from the end; at most 16 are held for each power of 16 in the number of
    blocks.

    >>> one = np.ones((2, 1)); *_, residuals = delta_chunked_forward(one, one, one, None, np.array([0.5, 0.5]))
    >>> delta_chunked_backward(np.array([[0.0], [1.0]]), None, residuals)[4]
    array([0.5, 0.5])
    """
    return chunked_backward(_forward, _backward, dout, dstate, residuals)


def delta_scan_forward(q: Array, k: Array, v: Array, g: Array | None, beta: Array, state: Array | None = None, *,
                       chunk: int = CHUNK) -> tuple[Array, Array, Residuals]:
    """`delta_chunked_forward` for all chunks at once, without a loop over them: log₂(N/C) products of pairs of D × D maps.

    Only functions of the array API, no assignment: JAX and others can trace it, CuPy runs it. Object arrays of `fractions.Fraction` give
    exact results where g is None. Holds some arrays of N rows and N/C maps and states.

    >>> one = np.ones((3, 1))
    >>> delta_scan_forward(one, one, one, None, np.array([0.5, 0.5, 0.5]), chunk=2)[0].ravel()
    array([0.5  , 0.75 , 0.875])
    """
    return scan_forward(_forward, q, k, v, (g, beta), state, chunk)


def delta_scan_backward(dout: Array, dstate: Array | None, residuals: Residuals) -> tuple[Any, ...]:
    """Transpose of `delta_scan_forward`; see `delta_chunked_backward`.

    >>> one = np.ones((2, 1)); *_, residuals = delta_scan_forward(one, one, one, None, np.array([0.5, 0.5]))
    >>> delta_scan_backward(np.array([[0.0], [1.0]]), None, residuals)[4]
    array([0.5, 0.5])
    """
    return scan_backward(_backward, dout, dstate, residuals)


def delta_masked_forward(q: Array, k: Array, v: Array, g: Array | None, beta: Array,
                         state: Array | None = None) -> tuple[Array, Array, Residuals]:
    """(I + Diag(β) B) U = Diag(β) (V - (b ⊙ K) S_0), O = A U + (b ⊙ Q) S_0: the quadratic form, all positions as one chunk. N² memory.

    >>> one = np.ones((3, 1))
    >>> delta_masked_forward(one, one, one, None, np.array([0.5, 0.5, 0.5]))[0].ravel()
    array([0.5  , 0.75 , 0.875])
    """
    return scan_forward(_forward, q, k, v, (g, beta), state, one_chunk(q))


def delta_masked_backward(dout: Array, dstate: Array | None, residuals: Residuals) -> tuple[Any, ...]:
    """Transpose of `delta_masked_forward`; see `delta_chunked_backward`."""
    return scan_backward(_backward, dout, dstate, residuals)


# --- step: one position ---------------------------------------------------------------------------------------------------------------

def delta_step(state: Array, q_t: Array, k_t: Array, v_t: Array, g_t: Array | None, beta_t: Array) -> tuple[Array, Array]:
    """One position: P = Diag(exp(g)) S, u = β (v - Pᵀ k), S ← P + k uᵀ, o = Sᵀ q. `state` (..., H, D, M) is left as it was.

    >>> state, one = np.zeros((1, 1)), np.ones(1)
    >>> for _ in range(3): out, state = delta_step(state, one, one, one, None, np.array(0.5))
    >>> out
    array([0.875])
    """
    P = state if g_t is None else fade(state, g_t)
    return causal_step(P, q_t, k_t, beta_t[..., None] * _error(P, k_t, v_t))


def delta_step_backward(dout_t: Array, dstate: Array, state: Array, q_t: Array, k_t: Array, v_t: Array, g_t: Array | None,
                        beta_t: Array) -> tuple[Any, ...]:
    """Transpose of `delta_step`; returns dstate0, dq_t, dk_t, dv_t, dg_t (None where g_t was), dbeta_t.

    With the error e = v - Pᵀ k: dP, dq, dk, du are those of rule `linear` with the state P and the value u = β e; then
    dβ = du · e,   de = β du,   dv = de,   dP -= k deᵀ,   dk -= P de,   and P's gradient goes on to S and g as in `gated`.

    >>> one = np.ones(1)
    >>> [float(x.item()) for x in delta_step_backward(one, np.zeros((1, 1)), 3 * np.ones((1, 1)), one, one, one, one - 1, one / 2)]
    [0.5, 2.0, -2.5, 0.5, 1.5, -2.0]
    """
    P = state if g_t is None else fade(state, g_t)
    e = _error(P, k_t, v_t)
    dP, dq, dk, du = causal_step_backward(dout_t, dstate, P, q_t, k_t, beta_t[..., None] * e)
    dbeta, dv = namespace(du=du).sum(du * e, axis=-1), beta_t[..., None] * du
    dP, dk = dP - k_t[..., :, None] * dv[..., None, :], dk - (P @ dv[..., None])[..., 0]
    return (dP, dq, dk, dv, None, dbeta) if g_t is None else (fade(dP, g_t), dq, dk, dv, fade_backward(dP, P, g_t), dbeta)


def _error(P: Array, k_t: Array, v_t: Array) -> Array:
    """v - Pᵀ k."""
    return v_t - (k_t[..., None, :] @ P)[..., 0, :]
