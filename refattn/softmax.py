"""Softmax attention: what the paper's linear attention is compared with.

    V'_i = Σ_j exp(s q_i·k_j) v_j / Σ_j exp(s q_i·k_j)                                 eq. (2), (3)

Axes   q (..., G·H, N, D) · k (..., H, L, D) · v (..., H, L, M) · out (..., G·H, N, M); G query heads share one key/value head

| form      | function                            | cost per head, flops | memory beyond inputs and outputs     | arrays        |
|-----------|-------------------------------------|----------------------|--------------------------------------|---------------|
| masked    | softmax_masked_forward, _backward   | 2·N·L·(D + M)        | N·L                                  | array API     |
| blockwise | softmax_blockwise_forward, _backward| 2·N·L·(D + M)        | two numbers per row; constant blocks | NumPy         |
| step      | softmax_prefill, softmax_step       | 2·L·(D + M) per step | the key/value cache, L·(D + M)       | NumPy, CuPy   |

**What every form leans on.** The weights P_ij = exp(s q_i·k_j - m_i) / l_i do not depend on m_i, so m_i is the largest visible score
of the row: no exponent is positive and none overflows. l_i is the sum over j. Written with x = s q_i·k_j,

    out_i = Σ_j P_ij v_j           dv_j = Σ_i P_ij do_i                                dP_ij = do_i·v_j
    P_ij = softmax_j(x_ij)         dx_ij = P_ij (dP_ij - Σ_j' P_ij' dP_ij') = P_ij (dP_ij - do_i·out_i)
    x_ij = s q_i·k_j               dq_i = s Σ_j dx_ij k_j                              dk_j = s Σ_i dx_ij q_i

The sum over j' is do_i·out_i since Σ_j P_ij v_j = out_i: a backward needs no whole row of P, and can make P again block by block.
A row that sees no key has P = 0: it gives zeros and zero gradients.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._array import (Array, Axes, accumulator, cast, check_cotangent, check_dtypes, check_lengths, check_number, check_positive, check_qkv,
                     check_shape, dtype_name, namespace, transposed)
from ._blocks import blocks, over_heads, reader, real_rows, split_groups, stacks

Residuals = tuple[Any, ...]
Gradients = tuple[Array, Array, Array]

QUERY_BLOCK = 128    # of 32 … 512 the fastest two over D = M = 32 to 128, causal or not, forward and backward
KEY_BLOCK = 512
FIRST_ROOM = 16      # positions that a new cache has room for


# --- the two public functions ------------------------------------------------------------------------------------------------------

def softmax_attention(q: Array, k: Array, v: Array, *, causal: bool = False, scale: float | None = None, query_lengths: Any = None,
                      key_lengths: Any = None) -> Array:
    """Softmax attention.

        V'_i = Σ_j exp(s q_i·k_j) v_j / Σ_j exp(s q_i·k_j)          j ≤ i if causal                        eq. (2), (3) of the paper

    Parameters
    ----------
    q : (..., Hq, N, D)
    k : (..., Hkv, L, D)
    v : (..., Hkv, L, M)
        Any leading axes, or none. Hq is a multiple of Hkv; query head h reads key/value head h // (Hq / Hkv).
    causal : bool
        Query i sees the keys j ≤ i only; needs N = L.
    scale : float, optional
        s; 1/√D if None (1 where D = 0).
    query_lengths, key_lengths : integers, optional
        How many positions are real, the rest is padding that is never looked at. Shape: the leading axes of q (of k) or the first of
        them; (B,) serves (B, H, N, D).

    Returns
    -------
    out : (..., Hq, N, M), dtype of q
        Padded queries, and queries that see no key, give zeros.

    Raises
    ------
    ValueError
        ``k: expected (..., Hkv, L, D) = (2, 4, *, 16), got (2, 4, 100, 8): q and k must share D``;
        ``k: causal attention needs as many keys as queries, got L = 6 keys and N = 5 queries; to continue a sequence use softmax_prefill
        and softmax_step``;
        ``key_lengths: expected 0 ≤ length ≤ L = 7, got values from 3 to 9``.
    TypeError
        ``q is float32 and k is float64; cast one of them, nothing is cast silently``; arrays of different libraries; integers.

    Notes
    -----
    2·N·L·(D + M) flops, half of that if causal. NumPy arrays take `softmax_blockwise_forward`: memory beyond the result does not grow
    with N or L but for two numbers per query. Other arrays take `softmax_masked_forward`: N·L memory per head.
    float16 and bfloat16 are read as they are and accumulated in float32; scores round once per product, so the relative error of a
    weight grows with the size of the scores (|s| |q|·|k| times the roundoff). A weight of 0 does not hide a NaN or an infinity in a
    *real* value row that shares a block with the query; padding does hide them.

    Examples
    --------
    >>> q = k = np.zeros((3, 1)); v = np.array([[0.0], [2.0], [4.0]])
    >>> softmax_attention(q, k, v, causal=True).ravel()
    array([0., 1., 2.])
    """
    return _forward(q, k, v, causal, scale, query_lengths, key_lengths)[0]


def softmax_attention_vjp(q: Array, k: Array, v: Array, *, causal: bool = False, scale: float | None = None, query_lengths: Any = None,
                          key_lengths: Any = None) -> tuple[Array, Callable[[Array | None], Gradients]]:
    """`softmax_attention` together with its transposed derivative.

        dv_j = Σ_i P_ij do_i,   dx_ij = P_ij (do_i·v_j - do_i·out_i),   dq_i = s Σ_j dx_ij k_j,   dk_j = s Σ_i dx_ij q_i

    Parameters
    ----------
    q, k, v, causal, scale, query_lengths, key_lengths
        As for `softmax_attention`. The arrays are kept, not copied: change none of them before the last pullback.

    Returns
    -------
    out : (..., Hq, N, M)
    pullback : function
        `pullback(dout) -> (dq, dk, dv)`, each with the shape and dtype of its input; may be called any number of times. dout has
        out's shape and dtype; None counts as zero. Rows of dout behind `query_lengths` are never looked at.

    Raises
    ------
    ValueError, TypeError
        As for `softmax_attention`; the pullback: ``dout: expected the shape of the output (2, 4, 100, 16), got (2, 4, 100, 8)``,
        ``dout is float64 and its output is float32; cast the cotangent, nothing is cast silently``.

    Notes
    -----
    The pullback costs 2·N·L·(3·D + 2·M) flops. NumPy arrays: nothing of size N·L is kept; see `softmax_blockwise_backward`.

    Examples
    --------
    >>> q = k = np.zeros((2, 1)); v = np.array([[0.0], [2.0]])
    >>> out, pullback = softmax_attention_vjp(q, k, v)
    >>> [d.ravel().tolist() for d in pullback(np.array([[1.0], [0.0]]))]
    [[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]
    """
    out, residuals, backward = _forward(q, k, v, causal, scale, query_lengths, key_lengths)
    return out, lambda dout: backward(dout, residuals)


def _forward(q: Array, k: Array, v: Array, causal: bool, scale: float | None, query_lengths: Any,
             key_lengths: Any) -> tuple[Array, Residuals, Callable[[Array | None, Residuals], Gradients]]:
    numpy = namespace(q=q, k=k, v=v) is np
    forward = softmax_blockwise_forward if numpy else softmax_masked_forward
    out, residuals = forward(q, k, v, causal=causal, scale=scale, query_lengths=query_lengths, key_lengths=key_lengths)
    return out, residuals, softmax_blockwise_backward if numpy else softmax_masked_backward


# --- masked: the definition on whole matrices, quadratic memory --------------------------------------------------------------------

def softmax_masked_forward(q: Array, k: Array, v: Array, *, causal: bool = False, scale: float | None = None, query_lengths: Any = None,
                           key_lengths: Any = None) -> tuple[Array, Residuals]:
    """out = softmax(s Q Kᵀ + mask) V on whole matrices. Eq. (2).

    Any array-API namespace, nothing is written in place. Parameters and errors are those of `softmax_attention`.

    Returns
    -------
    out : (..., Hq, N, M)
    residuals : tuple
        For `softmax_masked_backward`: the inputs, out, and exp(X - m) (..., Hkv, G, N, L) with its row sums l.

    Notes
    -----
    2·N·L·(D + M) flops and N·L memory per head. float16 and bfloat16 are cast to float32 at the start, the result back at the end.

    Examples
    --------
    >>> softmax_masked_forward(np.zeros((1, 2)), np.zeros((2, 2)), np.array([[1.0], [3.0]]))[0]
    array([[2.]])
    """
    axes, s, real_q, real_k = _checked(q, k, v, causal, scale, query_lengths, key_lengths)
    xp = namespace(q=q, k=k, v=v)
    Q = _real(q, axes.groups, real_q, axes, xp)
    K, V = (_real(x, 1, real_k, axes, xp) for x in (k, v))
    X = xp.matmul(Q * s, transposed(K))
    E, l = _weights(X, _visible(axes, causal, real_k), xp)
    O = _hide(xp.matmul(E, V) / l, real_q, xp)
    out = cast(xp.reshape(O, (*axes.q_lead, axes.N, axes.M)), q.dtype)
    return out, (q, k, v, out, O, E, l, axes, s, real_q, real_k)


def softmax_masked_backward(dout: Array | None, residuals: Residuals) -> Gradients:
    """Transpose of `softmax_masked_forward`, line by line.

        out = P V                          dV = Pᵀ dO,  dP = dO Vᵀ
        P = softmax(X) = exp(X - m) / l    dX = P ∘ (dP - rowsum(dO ∘ out))
        X = (s Q) Kᵀ                       dQ = s dX K,  dK = dXᵀ (s Q)

    P is never divided by l: dO/l stands for dO in all three products. Query heads that share a key/value head add up in dK and dV.

    Parameters
    ----------
    dout : (..., Hq, N, M) or None
        None counts as zero.

    Returns
    -------
    dq, dk, dv : shapes and dtypes of q, k, v

    Raises
    ------
    ValueError, TypeError
        When dout has not out's shape or dtype, with both in words.

    Notes
    -----
    2·N·L·(2·D + 2·M) flops and two N·L matrices per head.

    Examples
    --------
    >>> out, residuals = softmax_masked_forward(np.zeros((1, 2)), np.zeros((2, 2)), np.array([[1.0], [3.0]]))
    >>> softmax_masked_backward(np.array([[1.0]]), residuals)[2].ravel()
    array([0.5, 0.5])
    """
    q, k, v, out, O, E, l, axes, s, real_q, real_k = residuals
    check_cotangent("dout", dout, out)
    xp = namespace(q=q, k=k, v=v)
    if dout is None:
        return xp.zeros_like(q), xp.zeros_like(k), xp.zeros_like(v)
    Q, dO = (_real(x, axes.groups, real_q, axes, xp) for x in (q, dout))
    K, V = (_real(x, 1, real_k, axes, xp) for x in (k, v))
    dO = dO / l
    dV = xp.matmul(transposed(E), dO)                                                          # O = P V
    dX = E * (xp.matmul(dO, transposed(V)) - xp.sum(dO * O, axis=-1, keepdims=True))           # P = softmax(X)
    dQ = s * xp.matmul(dX, K)                                                          # X = (s Q) Kᵀ
    dK = xp.matmul(transposed(dX), Q * s)
    over_group = (xp.sum(d, axis=-3) for d in (dK, dV))
    dq, dk, dv = (cast(xp.reshape(d, x.shape), x.dtype) for d, x in zip((dQ, *over_group), (q, k, v)))
    return dq, dk, dv


def _weights(X: Array, visible: np.ndarray | None, xp: Any) -> tuple[Array, Array]:
    """exp(X - m) over the visible keys, and its row sums l; a row that sees no key has zeros and l = 1."""
    if visible is not None:
        X = xp.where(xp.asarray(visible), X, xp.asarray(-math.inf, dtype=X.dtype))
    top = xp.max(X, axis=-1, keepdims=True) if X.shape[-1] else xp.sum(X, axis=-1, keepdims=True)
    E = xp.exp(X - xp.where(xp.isfinite(top), top, xp.zeros_like(top)))       # a row of -inf: exp(-inf - 0) = 0, not exp(-inf + inf)
    total = xp.sum(E, axis=-1, keepdims=True)
    return E, xp.where(total == 0, xp.ones_like(total), total)


def _visible(axes: Axes, causal: bool, real_k: np.ndarray | None) -> np.ndarray | None:
    """True where a query sees a key, against X (..., H, G, N, L); None where every query sees every key."""
    keys = np.arange(axes.L)
    real = None if real_k is None else keys < real_k[..., None, None]
    if not causal:
        return real
    past = keys <= np.arange(axes.N)[:, None]
    return past if real is None else real & past


# --- blockwise: the same sums a block at a time, with a running maximum ------------------------------------------------------------

def softmax_blockwise_forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, causal: bool = False, scale: float | None = None,
                              query_lengths: Any = None, key_lengths: Any = None, query_block: int = QUERY_BLOCK,
                              key_block: int = KEY_BLOCK) -> tuple[np.ndarray, Residuals]:
    """Softmax attention that never holds a row of scores: blocks of keys, with a running maximum. Eq. (2).

        m' = max(m, max_j x_ij)          l' = l exp(m - m') + Σ_j exp(x_ij - m')          o' = o exp(m - m') + Σ_j exp(x_ij - m') v_j

    over the keys j of one block after another; at the end out_i = o_i / l_i. Blocks above the causal diagonal and behind the lengths are
    not visited.

    Parameters
    ----------
    q, k, v, causal, scale, query_lengths, key_lengths
        As for `softmax_attention`; NumPy arrays.
    query_block, key_block : int
        Positions per block. They change the order of summation, never the meaning.

    Returns
    -------
    out : (..., Hq, N, M)
    residuals : tuple
        For `softmax_blockwise_backward`: the inputs, out, and each row's m and l. Their log-sum-exp m + log l would be one number less,
        but rounds; with both, weights that are powers of two come back exactly.

    Raises
    ------
    ValueError, TypeError
        As `softmax_attention`; ``query_block: expected an integer ≥ 1, got 0``;
        ``q: expected a NumPy array, got one of cupy; use softmax_masked_forward``.

    Notes
    -----
    2·N·L·(D + M) flops. Memory beyond out and residuals: per thread, for a stack of four key/value heads, a block of scores
    (query_block · key_block), and blocks of q, k, v and out; none grows with N or L. Groups of queries share one product with their
    key head. Stacks of heads go to as many threads as BLAS has. float16 and bfloat16 are cast block by block to float32.

    Examples
    --------
    >>> softmax_blockwise_forward(np.zeros((1, 2)), np.zeros((2, 2)), np.array([[1.0], [3.0]]), key_block=1)[0]
    array([[2.]])
    """
    axes, s, real_q, real_k = _checked(q, k, v, causal, scale, query_lengths, key_lengths, only_numpy=True)
    R, C = check_positive("query_block", query_block), check_positive("key_block", key_block)
    acc = accumulator(q.dtype)
    out = np.zeros((*axes.q_lead, axes.N, axes.M), q.dtype)
    lowest = np.finfo(acc).min                              # not -inf: a row of -inf minus it is -inf and not NaN
    m, l = np.zeros((*axes.q_lead, axes.N, 1), acc), np.ones((*axes.q_lead, axes.N, 1), acc)   # what a row that sees no key keeps

    def work(q: Any, k: Any, v: Any, out: Any, m: Any, l: Any, real_q: Any, real_k: Any) -> None:
        (h, g, N, D), (L, M) = q.shape, v.shape[-2:]
        N, L = _longest(real_q, N), _longest(real_k, L)
        read_q, read_k, read_v = reader(q, real_q), reader(k, real_k), reader(v, real_k)
        r, c = _rows(R, g, N), min(C, L)
        room_q, room_x, room_o, room_px = (_room(h * g * r * n, acc) for n in (D, c, M, M))
        room_k, room_v = (_room(h * c * n, acc) for n in (D, M))
        ones = np.ones((c, 1), acc)
        for rows in blocks(N if L else 0, r):
            n = rows.stop - rows.start
            Q, O, XV = room_q(h, g * n, D), room_o(h, g * n, M), room_px(h, g * n, M)
            read_q(rows, Q.reshape(h, g, n, D))
            Q *= s
            top, total = np.full((h, g * n, 1), lowest), np.zeros((h, g * n, 1), acc)
            for cols in blocks(min(L, rows.stop) if causal else L, C):
                c = cols.stop - cols.start
                K, V, X = room_k(h, c, D), room_v(h, c, M), room_x(h, g * n, c)
                read_k(cols, K[:, None])
                read_v(cols, V[:, None])
                np.matmul(Q, K.mT, out=X)
                _mask(X.reshape(h, g, n, c), rows, cols, causal, real_k)
                before, top = top, np.maximum(X.max(-1, keepdims=True), top)
                X -= top
                np.exp(X, out=X)
                part = X @ ones[:c]                                                    # a third of the time of X.sum
                if not cols.start:
                    total = part
                    np.matmul(X, V, out=O)
                else:
                    fade = np.exp(before - top)
                    total = total * fade + part
                    O *= fade
                    O += np.matmul(X, V, out=XV)
            blind = total == 0
            total[blind], top[blind] = 1, 0
            O /= total
            real = real_rows(real_q, rows, (h, g, n, 1))
            for to, x in ((out, O), (m, top), (l, total)):
                np.copyto(to[:, :, rows], x.reshape(h, g, n, x.shape[-1]), where=real, casting="unsafe")

    split = (split_groups(x, axes.heads, axes.headed) for x in (q, k, v, out, m, l))
    over_heads(work, list(stacks(axes.kv_lead, *split, real_q, real_k)), _flops(axes, causal, axes.D + axes.M))
    return out, (q, k, v, out, m, l, axes, causal, s, real_q, real_k, R, C)


def softmax_blockwise_backward(dout: np.ndarray | None, residuals: Residuals) -> Gradients:
    """Transpose of `softmax_blockwise_forward`; each block of P is made again from the row's m and l.

        P = exp(X - m) / l     dV = Pᵀ dO,   dP = dO Vᵀ,   dX = P ∘ (dP - rowsum(dO ∘ out))
        X = Q (s K)ᵀ           dQ = dX (s K),   dK = s dXᵀ Q

    P is never divided by l: dO/l stands for dO in all three products, and l cancels.

    Parameters
    ----------
    dout : (..., Hq, N, M) or None
        None counts as zero.

    Returns
    -------
    dq, dk, dv : shapes and dtypes of q, k, v

    Raises
    ------
    ValueError, TypeError
        When dout has not out's shape or dtype, with both in words.

    Notes
    -----
    2·N·L·(3·D + 2·M) flops. For each block of keys all blocks of queries that see it: dk and dv stay in their block, dq adds up in the
    result itself. Memory beyond the gradients: constant blocks, and one number per row (rowsum(dO ∘ out)); float16 and bfloat16 also keep a
    float32 dq for the heads that are being worked on, since their own dtype is no place to add up.

    Examples
    --------
    >>> out, residuals = softmax_blockwise_forward(np.zeros((1, 2)), np.zeros((2, 2)), np.array([[1.0], [3.0]]))
    >>> softmax_blockwise_backward(np.array([[1.0]]), residuals)[2].ravel()
    array([0.5, 0.5])
    """
    q, k, v, out, m, l, axes, causal, s, real_q, real_k, R, C = residuals
    check_cotangent("dout", dout, out)
    acc = m.dtype
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    if dout is None:
        return dq, dk, dv

    def work(q: Any, k: Any, v: Any, out: Any, m: Any, l: Any, dout: Any, dq: Any, dk: Any, dv: Any, real_q: Any, real_k: Any) -> None:
        (h, g, N, D), (L, M) = q.shape, v.shape[-2:]
        N, L = _longest(real_q, N), _longest(real_k, L)
        read_q, read_dO, read_O = reader(q, real_q), reader(dout, real_q), reader(out)
        read_k, read_v = reader(k, real_k), reader(v, real_k)
        r, c = _rows(R, g, N), min(C, L)
        room_q, room_dXK, room_o, room_dO, room_x, room_dp = (_room(h * g * r * n, acc) for n in (D, D, M, M, c, c))
        room_k, room_dk, room_dXQ, room_v, room_dv, room_PdO = (_room(h * c * n, acc) for n in (D, D, D, M, M, M))
        sum_q = dq if dq.dtype == acc else np.zeros(dq.shape, acc)
        delta = np.empty((h, g, N, 1), acc)
        for rows in blocks(N, r):
            n = rows.stop - rows.start
            O, dO = room_o(h, g, n, M), room_dO(h, g, n, M)
            read_O(rows, O)
            read_dO(rows, dO)
            dO *= O
            np.divide(dO.sum(-1, keepdims=True), l[:, :, rows], out=delta[:, :, rows])         # rowsum(dO ∘ out) / l
        for cols in blocks(L, C):
            c = cols.stop - cols.start
            K, dK, dXQ = (room(h, c, D) for room in (room_k, room_dk, room_dXQ))
            V, dV, PdO = (room(h, c, M) for room in (room_v, room_dv, room_PdO))
            read_k(cols, K[:, None])
            read_v(cols, V[:, None])
            K *= s
            dK[...], dV[...] = 0, 0
            for rows in blocks(N, r):
                seen = min(c, rows.stop - cols.start) if causal else c                         # no later key is seen by any of these rows
                if seen <= 0:
                    continue
                n, some = rows.stop - rows.start, np.s_[:, :seen]
                Q, dXK, dO = room_q(h, g * n, D), room_dXK(h, g * n, D), room_dO(h, g * n, M)
                X, dP = room_x(h, g * n, seen), room_dp(h, g * n, seen)
                Q4, dXK4, dO4, X4, dP4 = (x.reshape(h, g, n, x.shape[-1]) for x in (Q, dXK, dO, X, dP))
                read_q(rows, Q4)
                read_dO(rows, dO4)
                dO4 /= l[:, :, rows]
                np.matmul(Q, K[some].mT, out=X)                                                # X = Q (s K)ᵀ
                _mask(X4, rows, slice(cols.start, cols.start + seen), causal, real_k)
                X4 -= m[:, :, rows]
                P = np.exp(X, out=X)                                                           # l P, against dO / l
                np.add(dV[some], np.matmul(P.mT, dO, out=PdO[some]), out=dV[some])             # out = P V
                np.matmul(dO, V[some].mT, out=dP)
                dP4 -= delta[:, :, rows]
                dX = np.multiply(P, dP, out=dP)                                                # P = softmax(X)
                np.matmul(dX, K[some], out=dXK)                                                # X = Q (s K)ᵀ
                np.add(sum_q[:, :, rows], dXK4, out=sum_q[:, :, rows])
                np.add(dK[some], np.matmul(dX.mT, Q, out=dXQ[some]), out=dK[some])
            dK *= s
            real = real_rows(real_k, cols, (h, 1, c, 1))
            for to, x in ((dk, dK), (dv, dV)):
                np.copyto(to[:, :, cols], x[:, None], where=real, casting="unsafe")
        if sum_q is not dq:
            dq[...] = sum_q

    split = (split_groups(x, axes.heads, axes.headed) for x in (q, k, v, out, m, l, dout, dq, dk, dv))
    over_heads(work, list(stacks(axes.kv_lead, *split, real_q, real_k)), _flops(axes, causal, 3 * axes.D + 2 * axes.M))
    return dq, dk, dv


def _mask(X: np.ndarray, rows: slice, cols: slice, causal: bool, real_k: np.ndarray | None) -> None:
    """-inf over the scores X (h, g, rows, cols) of the keys that a query does not see."""
    keys = np.arange(cols.start, cols.stop)
    if causal and cols.stop - 1 > rows.start:
        np.copyto(X, -np.inf, where=keys > np.arange(rows.start, rows.stop)[:, None])
    if real_k is not None and cols.stop > real_k.min():
        np.copyto(X, -np.inf, where=keys >= real_k[..., None, None])


def _room(size: int, dtype: Any) -> Callable[..., np.ndarray]:
    """A reused buffer: room(a, b, …) is its beginning as a contiguous array of that shape, also for the last, shorter block."""
    flat = np.empty(size, dtype)
    return lambda *shape: flat[: math.prod(shape)].reshape(shape)


def _rows(query_block: int, groups: int, N: int) -> int:
    """Positions per block: all query heads of a group make one matrix of about query_block rows."""
    return max(1, min(query_block // max(groups, 1), N))


def _longest(lengths: np.ndarray | None, n: int) -> int:
    return n if lengths is None else int(lengths.max(initial=0))


def _flops(axes: Axes, causal: bool, width: int) -> float:
    return 2.0 * math.prod(axes.q_lead) * axes.N * axes.L * width / (2 if causal else 1)


# --- one position at a time: decoding with a key/value cache -----------------------------------------------------------------------

class SoftmaxCache(NamedTuple):
    """The keys and values so far, for `softmax_step`.

    keys (..., Hkv, n, D), values (..., Hkv, n, M): in the accumulator's dtype (float32 for float16 and bfloat16), so that a step casts one
    position and not the past; look, but do not write. `store` is the buffer behind them: caches that continue one another share it.
    """

    keys: Array
    values: Array
    store: Any


class _Store:
    """Room for more positions than a cache has. Positions are only ever appended, so what an older cache sees never changes; `filled` says
    which slot is free, and a second continuation of the same cache finds its slot taken and copies."""

    def __init__(self, keys: Array, values: Array, filled: int) -> None:
        self.keys, self.values, self.filled = keys, values, filled

    def claim(self, slot: int) -> bool:
        with _claiming:
            free = bool(slot == self.filled < self.keys.shape[-2])
            self.filled += free
        return free

    def cache(self, n: int) -> SoftmaxCache:
        keys, values = self.keys[..., :n, :], self.values[..., :n, :]
        if isinstance(keys, np.ndarray):
            keys.flags.writeable = values.flags.writeable = False
        return SoftmaxCache(keys, values, self)


_claiming = threading.Lock()


def softmax_prefill(q: Array, k: Array, v: Array, *, scale: float | None = None) -> tuple[Array, SoftmaxCache]:
    """Causal softmax attention over a prompt, and the cache to go on from.

        out_i = Σ_{j≤i} exp(s q_i·k_j) v_j / Σ_{j≤i} exp(s q_i·k_j)                                        eq. (2), (3) of the paper

    Parameters
    ----------
    q : (..., Hq, N, D)
    k : (..., Hkv, N, D)
    v : (..., Hkv, N, M)
    scale : float, optional
        s; 1/√D if None.

    Returns
    -------
    out : (..., Hq, N, M)
        `softmax_attention(q, k, v, causal=True, scale=scale)`.
    cache : SoftmaxCache
        Holds copies of k and v, with room for as many positions again. Give the same scale to the steps.

    Raises
    ------
    ValueError, TypeError
        As `softmax_attention` with causal=True; ``q: expected a NumPy or CuPy array …`` for arrays that cannot be written in place.

    Notes
    -----
    N²·(D + M) flops; the cache takes up to 2·N·(D + M) numbers per key/value head.

    Examples
    --------
    >>> out, cache = softmax_prefill(np.zeros((2, 1)), np.zeros((2, 1)), np.array([[0.0], [2.0]]))
    >>> softmax_step(np.zeros(1), np.zeros(1), np.array([4.0]), cache)[0]
    array([2.])
    """
    xp = _writable(q=q, k=k, v=v)
    out = softmax_attention(q, k, v, causal=True, scale=scale)
    return out, _grown(k, v, max(2 * k.shape[-2], FIRST_ROOM), xp).cache(k.shape[-2])


def softmax_step(q_t: Array, k_t: Array, v_t: Array, cache: SoftmaxCache | None = None, *,
                 scale: float | None = None) -> tuple[Array, SoftmaxCache]:
    """One more position of causal softmax attention ("stateful softmax" in the paper's supplement).

        out_t = Σ_{j≤t} exp(s q_t·k_j) v_j / Σ_{j≤t} exp(s q_t·k_j)                                        eq. (2), (3) of the paper

    Parameters
    ----------
    q_t : (..., Hq, D)
    k_t : (..., Hkv, D)
    v_t : (..., Hkv, M)
    cache : SoftmaxCache, optional
        From `softmax_prefill` or an earlier step; None before the first position.
    scale : float, optional
        s; 1/√D if None.

    Returns
    -------
    out_t : (..., Hq, M)
    cache : SoftmaxCache
        The next one. The one given stays valid and as it was, and may be continued in several ways.

    Raises
    ------
    ValueError
        ``cache.keys: expected (..., Hkv, n, D) = (2, 4, 7, 16), got …: the cache belongs to other heads or features``.
    TypeError
        ``cache.keys: expected float32 as for q_t, got float64 …``; mixed dtypes or libraries.

    Notes
    -----
    2·n·(D + M) flops and n numbers per query head at cache length n: a step grows with what was read so far, where the linear form's
    does not. Appending costs one position; when the room is used up, or when another continuation took the slot, keys and values are copied
    into twice the room: N steps copy O(N) positions in all.

    Examples
    --------
    >>> one = np.ones(1)
    >>> out, cache = softmax_step(one, one, one)
    >>> softmax_step(0 * one, one, 3 * one, cache)[0]
    array([2.])
    """
    xp = _writable(q_t=q_t, k_t=k_t, v_t=v_t)
    check_dtypes(q_t=q_t, k_t=k_t, v_t=v_t)
    axes = check_qkv(q_t, k_t, v_t, causal=False, step=True)
    s = _scale(scale, axes.D)
    acc = accumulator(q_t.dtype)
    if cache is None:
        n = 0
        keys, values = (xp.empty((*axes.kv_lead, FIRST_ROOM, width), dtype=acc) for width in (axes.D, axes.M))
        store = _Store(keys, values, 1)
    else:
        n = _check_cache(cache, axes, acc, q_t)
        store = cache.store
        if not store.claim(n):
            store = _grown(cache.keys, cache.values, max(2 * n, FIRST_ROOM), xp)
            store.claim(n)
    store.keys[..., n, :] = k_t
    store.values[..., n, :] = v_t
    cache = store.cache(n + 1)
    Q = xp.reshape(cast(q_t, acc), (*axes.kv_lead, axes.groups, axes.D)) * s
    X = xp.matmul(Q, transposed(cache.keys))
    X = xp.exp(X - xp.max(X, axis=-1, keepdims=True))
    out = xp.matmul(X, cache.values) / xp.sum(X, axis=-1, keepdims=True)
    return cast(xp.reshape(out, (*axes.q_lead, axes.M)), q_t.dtype), cache


def _grown(keys: Array, values: Array, room: int, xp: Any) -> _Store:
    n = keys.shape[-2]
    acc = accumulator(keys.dtype)
    new_keys, new_values = (xp.empty((*x.shape[:-2], room, x.shape[-1]), dtype=acc) for x in (keys, values))
    new_keys[..., :n, :] = keys
    new_values[..., :n, :] = values
    return _Store(new_keys, new_values, n)


def _writable(**arrays: Array) -> Any:
    xp = namespace(**arrays)
    if xp is not np and not hasattr(xp, "RawModule"):                        # CuPy, or its stand-in
        raise TypeError(f"{next(iter(arrays))}: expected a NumPy or CuPy array, got one of {xp.__name__}: the cache is written in place; "
                        "use softmax_attention on the whole sequence")
    return xp


def _check_cache(cache: SoftmaxCache, axes: Axes, acc: Any, q_t: Array) -> int:
    namespace(q_t=q_t, cache=cache.keys)
    n = int(cache.keys.shape[-2]) if cache.keys.ndim > 1 else 0
    why = "the cache belongs to other heads or features"
    check_shape("cache.keys", cache.keys, "(..., Hkv, n, D)", (*axes.kv_lead, n, axes.D), why)
    check_shape("cache.values", cache.values, "(..., Hkv, n, M)", (*axes.kv_lead, n, axes.M), why)
    if cache.keys.dtype != acc:
        raise TypeError(f"cache.keys: expected {np.dtype(acc).name} as for q_t in {dtype_name(q_t)}, got {dtype_name(cache.keys)}; "
                        "go on in the dtype that the cache was started in")
    return n


# --- small things ------------------------------------------------------------------------------------------------------------------

def _checked(q: Array, k: Array, v: Array, causal: bool, scale: float | None, query_lengths: Any, key_lengths: Any,
             only_numpy: bool = False) -> tuple[Axes, float, Any, Any]:
    """The sizes, the scale, and the lengths as (*kv_lead, groups) for queries and (*kv_lead, 1) for keys."""
    xp = namespace(q=q, k=k, v=v)
    if only_numpy and xp is not np:
        raise TypeError(f"q: expected a NumPy array, got one of {xp.__name__}; use softmax_masked_forward")
    check_dtypes(q=q, k=k, v=v)
    if causal and q.ndim > 1 and k.ndim > 1 and q.shape[-2] != k.shape[-2]:
        raise ValueError(f"k: causal attention needs as many keys as queries, got L = {k.shape[-2]} keys and N = {q.shape[-2]} queries; "
                         "to continue a sequence use softmax_prefill and softmax_step")
    axes = check_qkv(q, k, v, causal=causal)
    real_q = check_lengths("query_lengths", query_lengths, axes.q_lead, axes.N, "N")
    real_k = check_lengths("key_lengths", key_lengths, axes.kv_lead, axes.L, "L")
    return (axes, _scale(scale, axes.D), None if real_q is None else real_q.reshape(*axes.kv_lead, axes.groups),
            None if real_k is None else real_k.reshape(*axes.kv_lead, 1))


def _scale(scale: float | None, D: int) -> float:
    return 1 / math.sqrt(max(D, 1)) if scale is None else check_number("scale", scale)


def _real(x: Array, groups: int, lengths: np.ndarray | None, axes: Axes, xp: Any) -> Array:
    """x (..., groups·H, n, d) as (..., H, groups, n, d) in the accumulator's dtype, with zeros for padding."""
    x = cast(x, accumulator(x.dtype))
    return _hide(xp.reshape(x, (*axes.kv_lead, groups, *x.shape[-2:])), lengths, xp)


def _hide(x: Array, lengths: np.ndarray | None, xp: Any) -> Array:
    if lengths is None:
        return x
    return xp.where(xp.asarray(np.arange(x.shape[-2])[:, None] < lengths[..., None, None]), x, xp.zeros_like(x))

