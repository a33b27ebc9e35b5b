"""Rule `gated`: the causal sum with a state that fades, and its transpose.

    S_t = Diag(a_t) S_{t-1} + k_t v_tᵀ,   a_t = exp(g_t)          o_t = S_tᵀ q_t

One decay per head (g (..., H, N): RetNet, Lightning, Mamba-2) or one per key channel (g (..., H, N, D): GLA, RWKV-6). Written out,

    o_t = S_0ᵀ (b_t ⊙ q_t) + Σ_{j≤t} A_tj v_j          A_tj = Σ_d q_td k_jd Π_{j<s≤t} a_sd,   b_t = Π_{s≤t} a_s

and for a chunk of C positions, S_0 being the state before it and e_j = Π_{s>j} a_s what a write has become behind it,

    O = A V + (b ⊙ Q) S_0          S_C = Diag(b_C) S_0 + (e ⊙ K)ᵀ V

| form    | function        | cost per head, flops                          | memory beyond inputs and outputs         | arrays    |
|---------|-----------------|-----------------------------------------------|------------------------------------------|-----------|
| masked  | gated_masked_*  | 2·N²·(D + M)                                  | N²                                       | array API |
| chunked | gated_chunked_* | 4·N·D·M + 2·N·C·(D + M), ≤ N·C/2 decays       | a block of chunks, 16 states · log₁₆ N   | NumPy     |
| scan    | gated_scan_*    | as chunked, and log₂(N/C) sums of all states  | all of it, N·D·M / C                     | array API |
| step    | gated_step      | 5·D·M per position                            | D·M                                      | array API |

**Backward** of a chunk, R being the cotangent of the state behind it:

    dV  = Aᵀ dO + (e ⊙ K) R                                                           O = A V + …,        S_C = … + (e ⊙ K)ᵀ V
    dA  = tril(dO Vᵀ)                                                                 O = A V
    dQ  = b ⊙ dO S_0ᵀ + (A's)                                                         O = … + (b ⊙ Q) S_0
    dK  = e ⊙ V Rᵀ + (A's)                                                            S_C = … + (e ⊙ K)ᵀ V
    dS_0 = Diag(b_C) R + (b ⊙ Q)ᵀ dO                                                  O, S_C
    d log b = (b ⊙ Q) ⊙ dO S_0ᵀ,   d log e = (e ⊙ K) ⊙ V Rᵀ,   d log b_C = b_C ⊙ Σ_m S_0 ⊙ R          then dg: see `decay`
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ._array import Array, namespace, transposed
from .causal import causal_step, causal_step_backward
from .chunks import CHUNK, Residuals, States, chunked_backward, chunked_forward, one_chunk, scan_backward, scan_forward
from .decay import over_group, scores, scores_backward

# --- all chunks of a block at once: arrays (..., G, T, C, D), g (..., 1, T, C, W), S (..., 1, D, M) -----------------------------------

def _forward(xp: Any, states: States, S: Array, Q: Array | None, K: Array, V: Array, g: Array) -> tuple[Array | None, Array]:
    """O and the state behind the last chunk; without Q only the state."""
    A, bQ, eK, whole = scores(K if Q is None else Q, K, g, xp)
    before, _, end = states(whole, transposed(eK) @ V, S)
    return None if Q is None else A @ V + bQ @ before, end


def _backward(xp: Any, states: States, S: Array, R: Array, dO: Array, Q: Array, K: Array, V: Array, g: Array) -> tuple[Array | None, ...]:
    """dS_0, dQ, dK, dV, dg. The states before the chunks are made once more."""
    A, bQ, eK, whole = scores(Q, K, g, xp)
    before, *_ = states(whole, transposed(eK) @ V, S)
    behind, _, dS = states(whole, over_group(transposed(bQ) @ dO, xp), R, reverse=True)
    dV = over_group(transposed(A) @ dO, xp) + eK @ behind
    dA, dbQ, deK = dO @ transposed(V), dO @ transposed(before), V @ transposed(behind)
    dwhole = xp.sum(before * behind, axis=-1, keepdims=True)
    dQ, dK, dg = scores_backward(dA, dbQ, deK, dwhole, A, Q, K, g, xp)
    return dS, dQ, dK, dV, dg


# --- the forms ------------------------------------------------------------------------------------------------------------------------

def gated_chunked_forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, state: np.ndarray | None = None, *,
                          chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """o_t = S_tᵀ q_t, S_t = Diag(exp(g_t)) S_{t-1} + k_t v_tᵀ, a chunk at a time.

    Parameters
    ----------
    q, k, v, state
        As in `causal.causal_chunked_forward`.
    g : (..., H, N) or (..., H, N, D)
        Log decay, one for each head or for each key channel. 0 keeps the state, -inf forgets it.
    chunk : int
        Positions per chunk, C, a power of two. Changes the order of summation, never the meaning.

    Returns
    -------
    out : (..., G·H, N, M)
    state : (..., H, D, M)
    residuals : tuple
        For `gated_chunked_backward`: the inputs, nothing more.

    Raises
    ------
    ValueError, TypeError
        "chunk: expected a power of two, got 48".

    Notes
    -----
    Sums and products of decays are in the accumulator dtype (float32 for float16 and bfloat16). Shapes are not checked here: `recurrence`
    does.

    >>> q = k = v = np.ones((4, 1))
    >>> gated_chunked_forward(q, k, v, np.log([1, 0.5, 0.5, 0.5]), chunk=2)[0].ravel()
    array([1.   , 1.5  , 1.75 , 1.875])
    """
    return chunked_forward(_forward, q, k, v, (g,), state, chunk)


def gated_chunked_backward(dout: np.ndarray, dstate: np.ndarray | None, residuals: Residuals) -> tuple[np.ndarray, ...]:
    """Transpose of `gated_chunked_forward` (see the top of this file): dq, dk, dv, dg, dstate0, each of its array's shape and dtype.

    The states before the chunks are made once more, block by block from the end; at most 16 are held for each power of 16 in the number of
    blocks.

    >>> q = k = v = np.ones((2, 1)); *_, residuals = gated_chunked_forward(q, k, v, np.log([1, 0.5]))
    >>> [d.ravel() for d in gated_chunked_backward(np.array([[0.0], [1.0]]), None, residuals)]
    [array([0. , 1.5]), array([0.5, 1. ]), array([0.5, 1. ]), array([0. , 0.5]), array([0.5])]
    """
    return chunked_backward(_forward, _backward, dout, dstate, residuals)


def gated_scan_forward(q: Array, k: Array, v: Array, g: Array, state: Array | None = None, *,
                       chunk: int = CHUNK) -> tuple[Array, Array, Residuals]:
    """`gated_chunked_forward` for all chunks at once, without a loop over them: log₂(N/C) sums of pairs of states.

    Only functions of the array API, no assignment: JAX and others can trace it, CuPy runs it. Holds some arrays of N rows and N/C states.

    >>> q = k = v = np.ones((4, 1))
    >>> gated_scan_forward(q, k, v, np.log([1, 0.5, 0.5, 0.5]), chunk=2)[0].ravel()
    array([1.   , 1.5  , 1.75 , 1.875])
    """
    return scan_forward(_forward, q, k, v, (g,), state, chunk)


def gated_scan_backward(dout: Array, dstate: Array | None, residuals: Residuals) -> tuple[Array, ...]:
    """Transpose of `gated_scan_forward`; see `gated_chunked_backward`.

    >>> q = k = v = np.ones((2, 1)); *_, residuals = gated_scan_forward(q, k, v, np.log([1, 0.5]))
    >>> gated_scan_backward(np.array([[0.0], [1.0]]), None, residuals)[3]
    array([0. , 0.5])
    """
    return scan_backward(_backward, dout, dstate, residuals)


def gated_masked_forward(q: Array, k: Array, v: Array, g: Array, state: Array | None = None) -> tuple[Array, Array, Residuals]:
    """O = A V + (b ⊙ Q) S_0, S_N = Diag(b_N) S_0 + (e ⊙ K)ᵀ V: the quadratic form, all positions as one chunk. N² memory.

    >>> q = k = v = np.ones((4, 1))
    >>> gated_masked_forward(q, k, v, np.log([1, 0.5, 0.5, 0.5]))[0].ravel()
    array([1.   , 1.5  , 1.75 , 1.875])
    """
    return scan_forward(_forward, q, k, v, (g,), state, one_chunk(q))


def gated_masked_backward(dout: Array, dstate: Array | None, residuals: Residuals) -> tuple[Array, ...]:
    """Transpose of `gated_masked_forward`; see `gated_chunked_backward`."""
    return scan_backward(_backward, dout, dstate, residuals)


# --- step: one position ---------------------------------------------------------------------------------------------------------------

def gated_step(state: Array, q_t: Array, k_t: Array, v_t: Array, g_t: Array) -> tuple[Array, Array]:
    """One position: P = Diag(exp(g)) S, S ← P + k vᵀ, o = Sᵀ q. g_t (..., H) or (..., H, D); `state` (..., H, D, M) is left as it was.

    >>> state, one = np.zeros((1, 1)), np.ones(1)
    >>> for _ in range(3): out, state = gated_step(state, one, one, one, np.log(0.5 * one))
    >>> out
    array([1.75])
    """
    return causal_step(fade(state, g_t), q_t, k_t, v_t)


def gated_step_backward(dout_t: Array, dstate: Array, state: Array, q_t: Array, k_t: Array, v_t: Array, g_t: Array) -> tuple[Array, ...]:
    """Transpose of `gated_step`; returns dstate0, dq_t, dk_t, dv_t, dg_t. `state` is the one that the step was given.

    dP, dq, dk, dv are those of rule `linear` with the state P; then dS_0 = Diag(a) dP, dg = Σ_m P ⊙ dP.

    >>> one = np.ones(1)
    >>> [float(x.item()) for x in gated_step_backward(one, np.zeros((1, 1)), 4 * np.ones((1, 1)), one, one, one, np.log(0.5 * one))]
    [0.5, 3.0, 1.0, 1.0, 2.0]
    """
    P = fade(state, g_t)
    dP, dq, dk, dv = causal_step_backward(dout_t, dstate, P, q_t, k_t, v_t)
    return fade(dP, g_t), dq, dk, dv, fade_backward(dP, P, g_t)


def fade(state: Array, g_t: Array) -> Array:
    """Diag(exp(g)) S."""
    a = namespace(g_t=g_t).exp(g_t)
    return (a[..., None] if g_t.ndim == state.ndim - 1 else a[..., None, None]) * state


def fade_backward(dP: Array, P: Array, g_t: Array) -> Array:
    """dg = Σ P ⊙ dP, over m, and over the channels that share a decay."""
    return namespace(dP=dP).sum(P * dP, axis=-1 if g_t.ndim == P.ndim - 1 else (-2, -1))
