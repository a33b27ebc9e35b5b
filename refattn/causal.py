"""Rule `linear`: the causal sum at the heart of the paper, in the forms that must agree, and its transpose.

    S_t = S_{t-1} + k_t v_tᵀ          o_t = S_tᵀ q_t                                    eq. (10); the numerator of eq. (12)

The bare product: no feature map, no normaliser, no scale; `attention` and `recurrence` put those around it.

Axes   q (..., G·H, N, D) · k (..., H, N, D) · v (..., H, N, M) · out (..., G·H, N, M); G query heads share one key/value head
State  S (..., H, D, M): all that the past leaves behind; float32 for float16 and bfloat16 inputs

| form    | function                 | cost per head, flops    | memory beyond inputs and outputs | arrays            |
|---------|--------------------------|-------------------------|----------------------------------|-------------------|
| masked  | causal_masked_*          | 2·N²·(D + M)            | N²                               | array API, object |
| chunked | causal_chunked_*         | 4·N·D·M + 2·N·C·(D + M) | C² + D·M                         | NumPy             |
| scan    | causal_scan_*            | as chunked              | N·D·M / C                        | array API, object |
| step    | causal_step              | 4·D·M per position      | D·M                              | array API, object |

**The sum is closed under its own transpose.** Write f(q, k, v; S) for the outputs and rev for the reversal of the positions. Then

    dq = f(do, v, k; Sᵀ)                                  dq_i = S_i do_i,           S_i = S_0 + Σ_{j≤i} k_j v_jᵀ         eq. (13)
    dk = rev f(rev v, rev do, rev q; dS_Nᵀ)               dk_i = R_i v_i,            R_i = dS_N + Σ_{j≥i} q_j do_jᵀ       eq. (14)
    dv = rev f(rev k, rev q, rev do; dS_N)                dv_i = R_iᵀ k_i                                                eq. (15)
    dS_0 = R_1: the state that the last of these sums ends with

so every form is a sum of products k vᵀ that is read from two sides, Sᵀ q and S do: forward (q) over the writes (k, v), then backward
(do) over the same writes, then from behind (k and v) over the writes (q, do).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from ._array import Array, accumulator, cast, check_positive, namespace, transposed
from ._blocks import BUFFER_BYTES, HEADS_PER_STACK, Reader, blocks, cores, merged, over_heads, reader, split_groups, stacks

Residuals = tuple[Any, ...]
Store = Callable[[slice, np.ndarray], None]
Side = tuple[Reader, Store]    # what the running state is read with, and where the products go

CHUNK = 32    # of 16, 32, 64, 128 the fastest from D = M = 32 to 128 in float32; see `python -m refattn bench --chunks`
STEP_BYTES = 1 << 19               # of the states that one thread of a step has at hand: read, written and read once more out of its own cache


# --- masked: the definition as one masked matrix product, quadratic in N ------------------------------------------------------------

def causal_masked_forward(q: Array, k: Array, v: Array, state: Array | None = None) -> tuple[Array, Array, Residuals]:
    """O = tril(Q Kᵀ) V + Q S_0,  S_N = S_0 + Kᵀ V.

    Any array-API namespace; object arrays of `fractions.Fraction` give exact results. 2·N²·(D + M) flops and N² memory.
    See `causal_chunked_forward` for shapes.

    >>> q = k = v = np.ones((3, 1))
    >>> causal_masked_forward(q, k, v)[0].ravel()
    array([1., 2., 3.])
    """
    xp, (Q, K, V), S, give_back = _functional(q, k, v, state)
    keep = xp.arange(Q.shape[-2])[:, None] >= xp.arange(K.shape[-2])
    A = _masked(Q @ transposed(K), keep, xp)
    out = A @ V + Q @ S
    return give_back(out), _squeeze(S + transposed(K) @ V), (q, k, v, state)


def causal_masked_backward(dout: Array, dstate: Array | None, residuals: Residuals) -> tuple[Array, Array, Array, Array]:
    """Transpose of `causal_masked_forward`, its lines in reverse; see `causal_chunked_backward` for shapes.

    >>> q = k = v = np.ones((3, 1)); *_, residuals = causal_masked_forward(q, k, v)
    >>> dq, dk, dv, dstate = causal_masked_backward(np.array([[1.], [0.], [2.]]), None, residuals)
    >>> dq.ravel(), dk.ravel(), dv.ravel(), dstate.ravel()
    (array([1., 0., 6.]), array([3., 2., 2.]), array([3., 2., 2.]), array([3.]))
    """
    q, k, v, state = residuals
    xp, (Q, K, V), S, _ = _functional(q, k, v, state)
    dO, R = grouped(dout, K, xp), _cotangent_state(dstate, S, xp)
    keep = xp.arange(Q.shape[-2])[:, None] >= xp.arange(K.shape[-2])
    A, dA = _masked(Q @ transposed(K), keep, xp), _masked(dO @ transposed(V), keep, xp)
    dq = dA @ K + dO @ transposed(S)                     # out = A @ V + Q @ S,  A = tril(Q @ Kᵀ)
    dk = _over_group(transposed(dA) @ Q, xp) + V @ transposed(R)            # A = tril(Q @ Kᵀ),  S_N = S + Kᵀ @ V
    dv = _over_group(transposed(A) @ dO, xp) + K @ R                # out = A @ V,       S_N = S + Kᵀ @ V
    dS = R + _over_group(transposed(Q) @ dO, xp)                    # out = Q @ S,       S_N = S + …
    return like(dq, q, xp), like(dk, k, xp), like(dv, v, xp), _like_state(dS, state, xp)


# --- chunked: the fast one ---------------------------------------------------------------------------------------------------------

def causal_chunked_forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, state: np.ndarray | None = None, *,
                           chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """Causal linear attention, a chunk at a time: o_i = S_0ᵀ q_i + Σ_{j≤i} (q_i·k_j) v_j.

    Parameters
    ----------
    q : (..., G·H, N, D)
    k : (..., H, N, D)
    v : (..., H, N, M)
    state : (..., H, D, M), optional
        S_0, what preceded position 0; zeros if None.
    chunk : int
        Positions per chunk, C. Changes the order of summation, never the meaning.

    Returns
    -------
    out : (..., G·H, N, M)
    state : (..., H, D, M)
        S_N; pass it on to continue the sequence.
    residuals : tuple
        For `causal_chunked_backward`: the inputs, nothing more.

    Notes
    -----
    4·N·D·M + 2·N·C·(D + M) flops a head; extra memory C² + C·(D + M) + D·M per head in work, whatever N. Sums are kept in the accumulator
    dtype (float32 for float16 and bfloat16); out is rounded once, at the end. Shapes are not checked here: `recurrence` does.

    Raises
    ------
    ValueError, TypeError
        "chunk: expected an integer ≥ 1, got 0".

    >>> q = k = v = np.ones((5, 1))
    >>> causal_chunked_forward(q, k, v, chunk=2)[0].ravel()
    array([1., 2., 3., 4., 5.])
    """
    chunk = check_positive("chunk", chunk)
    heads, headed, acc = k.shape[-3] if k.ndim > 2 else 1, k.ndim > 2, accumulator(v.dtype)
    Q, K, V = split_groups(q, heads, headed), split_groups(k, heads, headed), split_groups(v, heads, headed)
    out = np.empty((*q.shape[:-1], v.shape[-1]), v.dtype)
    end = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), acc)
    if state is not None:
        end[...] = state

    def work(Q: Any, K: Any, V: Any, O: Any, S: Any) -> None:
        running_product(reader(K), reader(V), S, sizes(Q, K), chunk, out=(reader(Q), writer(O)))

    each_stack(work, end, chunk, Q, K, V, split_groups(out, heads, headed), end)
    return out, end, (q, k, v, state, chunk)


def causal_chunked_backward(dout: np.ndarray, dstate: np.ndarray | None,
                            residuals: Residuals) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Transpose of `causal_chunked_forward`: the same sum once forward and once from behind (eq. (13) to (15); see the top of this file).

    The states run once more instead of being stored: constant extra memory in N.

    Parameters
    ----------
    dout : (..., G·H, N, M)
    dstate : (..., H, D, M) or None
        Cotangent of the final state; None counts as zero.

    Returns
    -------
    dq : (..., G·H, N, D);  dk : (..., H, N, D);  dv : (..., H, N, M);  dstate0 : (..., H, D, M)
        dk, dv and dstate0 are summed over the G query heads that share them.

    Notes
    -----
    10·N·D·M + 6·N·C·(D + M) flops a head: two running sums, three readings; twice the forward's extra memory.

    >>> q = k = v = np.ones((3, 1)); *_, residuals = causal_chunked_forward(q, k, v, chunk=2)
    >>> dq, dk, dv, dstate = causal_chunked_backward(np.array([[1.], [0.], [2.]]), None, residuals)
    >>> dq.ravel(), dk.ravel(), dv.ravel(), dstate.ravel()
    (array([1., 0., 6.]), array([3., 2., 2.]), array([3., 2., 2.]), array([3.]))
    """
    q, k, v, state, chunk = residuals
    heads, headed, acc = k.shape[-3] if k.ndim > 2 else 1, k.ndim > 2, accumulator(v.dtype)
    dq, dk, dv = np.empty(q.shape, q.dtype), np.empty(k.shape, k.dtype), np.empty(v.shape, v.dtype)
    start = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), acc)
    S, R = start.copy(), start
    if state is not None:
        S[...] = state
    if dstate is not None:
        R[...] = dstate

    def work(Q: Any, K: Any, V: Any, dO: Any, dQ: Any, dK: Any, dV: Any, S: Any, R: Any) -> None:
        forward, behind = sizes(Q, K), sizes(K, Q)
        running_product(reader(K), reader(V), S, forward, chunk, back=(reader(dO), writer(dQ)))                       # dq = S do
        running_product(reader(Q), reader(dO), R, behind, chunk, out=(reader(K), writer(dV)),                         # dv = Rᵀ k
                        back=(reader(V), writer(dK)), reverse=True)                                                   # dk = R v; dS_0

    def view(x: np.ndarray) -> np.ndarray:
        return split_groups(x, heads, headed)

    each_stack(work, S, chunk, view(q), view(k), view(v), view(dout), view(dq), view(dk), view(dv), S, R)
    return dq, dk, dv, R


def running_product(read_k: Reader, read_v: Reader, S: np.ndarray, size: tuple[int, int, int, int, int], chunk: int, *,
                    out: Side | None = None, back: Side | None = None, columns: slice = slice(None), reverse: bool = False) -> None:
    """S ← S + Σ_j k_j v_jᵀ in place for a stack of heads, read on the way from one side or from both. The CPU path's one loop.

        out  = (read_q, store):  S_iᵀ q_i = Sᵀ q_i + Σ_{j≤i} (q_i·k_j) v_j,  of which `columns` are wanted
        back = (read_r, store):  S_i r_i  = S r_i  + Σ_{j≤i} (r_i·v_j) k_j

    Inside a chunk the sum is a masked product A V with A = tril(Q Kᵀ); all that came before it is one matrix S. Both are one product,
    [A | Q] [V; S]: Q and A stand side by side in one buffer, V and S one above the other in another. Some chunks are worked on at a time,
    as many as BUFFER_BYTES hold: each NumPy call is then long enough that two threads seldom meet at the interpreter's lock.

    `size` = (heads, Gq, Gk, N, N): Gq readings and Gk writes stand at each position. `reverse` walks from the last position to the first
    and sums over j ≥ i. The readers fill buffers (heads, G, chunks, rows, width): φ, a column of ones or a cast need no array of N rows.
    In each block k and v are read first, then q, and r when what `out` gives is stored.
    """
    if out is None:
        return running_product(read_v, read_k, S.mT, size, chunk, out=back, reverse=reverse)                  # S r = (Sᵀ)ᵀ r
    read_q, store = out
    heads, gq, gk, n, _ = size
    D, M = S.shape[-2:]
    at_once = _chunks_at_once(heads, gq, gk, chunk, D, M, S.itemsize)

    def buffers(T: int, C: int) -> list[np.ndarray]:
        shapes = [(gq * C, gk * C + D), (gk * C + D, M), (gk * C, D), (gq * C, M), (D, M)]
        shapes += [(gq * C, M), (gq * C, gk * C), (gq * C, D), (gq * C, D)] if back else []
        return [np.empty((heads, T, *shape), S.dtype) for shape in shapes]

    whole, run, shape = buffers(min(at_once, n // chunk), chunk), S.copy(), (0, 0)
    for rows, T, C in _chunk_blocks(n, chunk, at_once, reverse):
        if shape != (T, C):
            AQ, VS, K, O, own, *both = (x[:, :T] for x in whole) if C == chunk else buffers(T, C)
            A, Q, V, before, O = AQ[..., : gk * C], AQ[..., gk * C:], VS[..., : gk * C, :], VS[..., gk * C:, :], O[..., columns]
            into_q, into_k, into_v, outputs = (_positions(x, C) for x in (Q, K, V, O))
            i, j = np.tile(np.arange(C), gq)[:, None], np.tile(np.arange(C), gk)
            hidden, shape = (j < i if reverse else j > i), (T, C)
        read_k(rows, into_k)
        read_v(rows, into_v)
        np.matmul(K.mT, V, out=own)
        _states_before(own, run, before, reverse)
        read_q(rows, into_q)
        np.matmul(Q, K.mT, out=A)
        np.copyto(A, 0, where=hidden)                          # not a product with 0: a hidden score may have overflowed
        np.matmul(AQ, VS[..., columns], out=O)
        store(rows, outputs)
        if back:
            X, B, P, inside = both
            read_r, store_back = back
            read_r(rows, _positions(X, C))
            np.matmul(X, V.mT, out=B)
            np.copyto(B, 0, where=hidden)
            np.matmul(B, K, out=inside)
            np.matmul(X, before.mT, out=P)
            np.add(P, inside, out=P)
            store_back(rows, _positions(P, C))
    S[...] = run


def _states_before(own: np.ndarray, run: np.ndarray, before: np.ndarray, reverse: bool) -> None:
    """What precedes each chunk, from the chunks' own Kᵀ V (heads, T, D, M): an exclusive running sum that starts from `run`, which becomes
    the sum of all."""
    order = range(own.shape[1])[::-1] if reverse else range(own.shape[1])
    before[:, order[0]] = run
    for t, after in zip(order[:-1], order[1:], strict=True):
        np.add(before[:, t], own[:, t], out=before[:, after])
    np.add(before[:, order[-1]], own[:, order[-1]], out=run)


def _chunk_blocks(n: int, C: int, T: int, reverse: bool) -> Iterator[tuple[slice, int, int]]:
    """Positions 0 … n-1 as blocks (rows, chunks, rows per chunk): full ones of T chunks, the rest's full chunks, a shorter last chunk."""
    whole, done = n // (T * C) * T * C, n // C * C
    rest = [(slice(whole, done), (done - whole) // C, C)] * (done > whole) + [(slice(done, n), 1, n - done)] * (n > done)
    full = ((rows, T, C) for rows in blocks(whole, T * C, reverse))
    return chain(reversed(rest), full) if reverse else chain(full, rest)


def _chunks_at_once(heads: int, gq: int, gk: int, C: int, D: int, M: int, itemsize: int) -> int:
    per_chunk = gq * C * (gk * C + D + M) + gk * C * (D + M) + 2 * D * M
    return max(1, BUFFER_BYTES // (heads * per_chunk * itemsize))


def _positions(x: np.ndarray, C: int) -> np.ndarray:
    """A buffer (heads, T, G·C, width) as a reader sees it: (heads, G, T, C, width)."""
    return x.reshape(*x.shape[:2], x.shape[2] // C, C, x.shape[3]).swapaxes(1, 2)


def writer(out: np.ndarray) -> Store:
    """Stores a block's results in out (h, G, N, width), rounded to its dtype."""
    def store(rows: slice, block: np.ndarray) -> None:
        to = out[..., rows, :]
        np.copyto(to.reshape(block.shape), block, casting="same_kind")
    return store


def sizes(Q: np.ndarray, K: np.ndarray) -> tuple[int, int, int, int, int]:
    """(heads, Gq, Gk, N, L) of a stack's views Q (heads, Gq, N, D) and K (heads, Gk, L, D)."""
    return Q.shape[0], Q.shape[1], K.shape[1], Q.shape[2], K.shape[2]


def each_stack(work: Callable[..., None], S: np.ndarray, chunk: int, *arrays: np.ndarray | None) -> None:
    """`work` on every stack of heads of `arrays`, the first of them q (..., H, G, N, D): of short sequences as many heads at a time as one
    thread's buffers hold; of long ones a thread's share, up to HEADS_PER_STACK, so that the running sum over chunks takes few NumPy calls."""
    D, M = S.shape[-2:]
    G, N = arrays[0].shape[-3:-1]                                                                          # type: ignore[union-attr]
    short = _chunks_at_once(1, G, 1, chunk, D, M, S.itemsize) // max(-(-N // chunk), 1)
    long = min(HEADS_PER_STACK, -(-math.prod(S.shape[:-2]) // cores()))

    def one_stack(*stack: np.ndarray | None) -> None:
        work(*(stack if stack[0].ndim == 4 else map(merged, stack)))                                   # type: ignore[union-attr]

    cut = stacks(S.shape[:-2], *arrays, most=max(short, long, 1), two_axes=short > long)
    over_heads(one_stack, list(cut), 4.0 * S.size * G * N)


# --- scan: the chunked form without a loop ------------------------------------------------------------------------------------------

def causal_scan_forward(q: Array, k: Array, v: Array, state: Array | None = None, *, chunk: int = CHUNK) -> tuple[Array, Array, Residuals]:
    """`causal_chunked_forward` for all chunks at once: each chunk's own Kᵀ V, their exclusive running sum, then every chunk's outputs.

    Only functions of the array API, no loop, no assignment: JAX and others can trace it, CuPy runs it. Object arrays of
    `fractions.Fraction` give exact results. Holds N/C states. See `causal_chunked_forward` for shapes.

    >>> q = k = v = np.ones((5, 1))
    >>> causal_scan_forward(q, k, v, chunk=2)[0].ravel()
    array([1., 2., 3., 4., 5.])
    """
    chunk = check_positive("chunk", chunk)
    xp, (Q, K, V), S, give_back = _functional(q, k, v, state)
    out, end = _scan(Q, K, V, S, chunk, xp)
    return give_back(out), _squeeze(end), (q, k, v, state, chunk)


def causal_scan_backward(dout: Array, dstate: Array | None, residuals: Residuals) -> tuple[Array, Array, Array, Array]:
    """Transpose of `causal_scan_forward`, by the closure; see `causal_chunked_backward`.

    >>> q = k = v = np.ones((3, 1)); *_, residuals = causal_scan_forward(q, k, v, chunk=2)
    >>> dq, dk, dv, dstate = causal_scan_backward(np.array([[1.], [0.], [2.]]), None, residuals)
    >>> dq.ravel(), dk.ravel(), dv.ravel(), dstate.ravel()
    (array([1., 0., 6.]), array([3., 2., 2.]), array([3., 2., 2.]), array([3.]))
    """
    q, k, v, state, chunk = residuals
    xp, (Q, K, V), S, _ = _functional(q, k, v, state)
    dO, R = grouped(dout, K, xp), _cotangent_state(dstate, S, xp)
    dq, _ = _scan(dO, V, K, transposed(S), chunk, xp)
    # The query heads of a group share their keys: side by side as features, [v | v] · [do_1; do_2] sums over them
    G = Q.shape[-3]
    Kr, Vr, Qr, dOr = (xp.flip(x, axis=-2) for x in (K, V, Q, dO))
    dk, dv, dS = 0, 0, R
    for g in range(G):
        zero = xp.zeros_like(R) if g else R
        one_k, _ = _scan(Vr, dOr[..., g: g + 1, :, :], Qr[..., g: g + 1, :, :], transposed(zero), chunk, xp)
        one_v, end = _scan(Kr, Qr[..., g: g + 1, :, :], dOr[..., g: g + 1, :, :], zero, chunk, xp)
        dk, dv, dS = dk + one_k, dv + one_v, end if g == 0 else dS + end
    return (like(dq, q, xp), like(xp.flip(dk, axis=-2), k, xp), like(xp.flip(dv, axis=-2), v, xp), _like_state(dS, state, xp))


def _scan(Q: Array, K: Array, V: Array, S: Array, C: int, xp: Any) -> tuple[Array, Array]:
    """f(q, k, v; S) and the final state, for arrays (..., G, N, D), S (..., 1, D, M)."""
    N, M = Q.shape[-2], V.shape[-1]
    T = max(-(-N // C), 1)
    Qc, Kc, Vc = (in_chunks(x, T, C, xp) for x in (Q, K, V))                            # (..., G, T, C, D)
    A = _masked(Qc @ transposed(Kc), xp.arange(C)[:, None] >= xp.arange(C), xp)
    own = transposed(Kc) @ Vc                                                                    # each chunk's own Kᵀ V
    after = xp.concat([S[..., None, :, :], S[..., None, :, :] + _running_sum(own, xp)], axis=-3)
    out = A @ Vc + Qc @ after[..., :-1, :, :]
    return xp.reshape(out, (*out.shape[:-3], T * C, M))[..., :N, :], after[..., -1, :, :]


# --- step: one position -------------------------------------------------------------------------------------------------------------

def causal_step(state: Array, q_t: Array, k_t: Array, v_t: Array) -> tuple[Array, Array]:
    """One position: S ← S + k vᵀ, o = Sᵀ q (eq. (18) without φ). `state` (..., H, D, M) is left as it was; returns (out_t, new state).

    >>> state = np.zeros((1, 1))
    >>> for x in (1., 2.): out, state = causal_step(state, np.ones(1), np.array([x]), np.ones(1))
    >>> out, state
    (array([3.]), array([[3.]]))
    """
    if isinstance(state, np.ndarray) and state.nbytes > STEP_BYTES and state.dtype.kind == "f":
        return _step_in_stacks(state, q_t, k_t, v_t)
    S = state + k_t[..., :, None] * v_t[..., None, :]
    if q_t.ndim == 1 or q_t.shape[-2] == k_t.shape[-2]:
        return (q_t[..., None, :] @ S)[..., 0, :], S
    xp = namespace(q_t=q_t)
    return xp.reshape(_group_step(q_t, k_t, xp) @ S, (*q_t.shape[:-1], v_t.shape[-1])), S


def causal_step_backward(dout_t: Array, dstate: Array, state: Array, q_t: Array, k_t: Array,
                         v_t: Array) -> tuple[Array, Array, Array, Array]:
    """Transpose of `causal_step`; returns (dstate0, dq_t, dk_t, dv_t). `state` is the one that the step was given.

        R = dS + q doᵀ,   dq = (S + k vᵀ) do,   dk = R v,   dv = Rᵀ k,   dS_0 = R                             eq. (13) to (15) for N = 1

    >>> one = np.ones(1)
    >>> [float(x.item()) for x in causal_step_backward(2 * one, np.zeros((1, 1)), 3 * np.ones((1, 1)), one, one, one)]
    [2.0, 8.0, 2.0, 2.0]
    """
    S = state + k_t[..., :, None] * v_t[..., None, :]
    xp = namespace(q_t=q_t)
    Q, dO = _group_step(q_t, k_t, xp), _group_step(dout_t, k_t, xp)
    R = dstate + transposed(Q) @ dO                                                                     # out = Sᵀ q
    dq = xp.reshape(dO @ transposed(S), q_t.shape)
    dk = (R @ v_t[..., :, None])[..., 0]                                                        # S = state + k vᵀ
    dv = (k_t[..., None, :] @ R)[..., 0, :]
    return R, dq, dk, dv


def _step_in_stacks(state: np.ndarray, q_t: np.ndarray, k_t: np.ndarray, v_t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`causal_step` for states larger than the cache: a few heads at a time, so that each state is read once and written once.

    The outer product k vᵀ is a matrix product [k 0] [v 0]ᵀ: BLAS takes four times less for two columns than NumPy for one."""
    S, out = np.empty(state.shape, state.dtype), np.empty((*q_t.shape[:-1], v_t.shape[-1]), state.dtype)
    k2, v2 = (np.zeros((*x.shape[:-1], 2, x.shape[-1]), state.dtype) for x in (k_t, v_t))
    k2[..., 0, :], v2[..., 0, :] = k_t, v_t

    def work(before: Any, q: Any, k: Any, v: Any, after: Any, o: Any) -> None:
        np.matmul(k.mT, v, out=after)
        np.add(before, after, out=after)
        np.matmul(q, after, out=o)

    lead = state.shape[:-2]
    most = max(STEP_BYTES // max(state[(0,) * len(lead)].nbytes, 1), 1)
    arrays = (state, _group_step(q_t, k_t, np), k2, v2, S, _group_step(out, k_t, np))
    over_heads(work, list(stacks(lead, *arrays, most=most)), 8.0 * state.size)        # twice its flops: it waits for memory
    return out, S


def _group_step(x_t: Array, k_t: Array, xp: Any) -> Array:
    """(..., G·H, D) as (..., H, G, D), beside keys k_t (..., H, D); (D) as (1, D)."""
    if x_t.ndim == 1:
        return x_t[None, :]
    return xp.reshape(x_t, (*k_t.shape[:-1], x_t.shape[-2] // max(k_t.shape[-2], 1), x_t.shape[-1]))


# --- what the functional forms share ------------------------------------------------------------------------------------------------

def _functional(q: Array, k: Array, v: Array,
                state: Array | None) -> tuple[Any, tuple[Array, Array, Array], Array, Callable[[Array], Array]]:
    """Namespace; q, k, v as (..., H, G, N, D) in the accumulator dtype; S as (..., H, 1, D, M); the way back to out's shape and dtype."""
    xp = namespace(q=q, k=k, v=v)
    K, V = widen(k)[..., None, :, :], widen(v)[..., None, :, :]
    Q = grouped(q, K, xp)
    S = (xp.zeros_like(transposed(K[..., :1, :]) * V[..., :1, :]) if K.shape[-2] else
         xp.zeros((*K.shape[:-2], K.shape[-1], V.shape[-1]), dtype=V.dtype)) if state is None else widen(state)[..., None, :, :]
    return xp, (Q, K, V), S, lambda out: like(out, q, xp, width=v.shape[-1])


def grouped(x: Array, K: Array, xp: Any) -> Array:
    """(..., G·H, N, D) as (..., H, G, N, D), beside keys K (..., H, 1, N, D)."""
    x = widen(x)
    if x.ndim == 2:
        return x[None]
    return xp.reshape(x, (*x.shape[:-3], K.shape[-4], x.shape[-3] // max(K.shape[-4], 1), *x.shape[-2:]))


def widen(x: Array) -> Array:
    return cast(x, accumulator(x.dtype))


def like(y: Array, x: Array, xp: Any, width: int | None = None) -> Array:
    """y (..., H, G, N, D) with x's shape and dtype (the last axis may differ)."""
    return cast(xp.reshape(y, (*x.shape[:-1], x.shape[-1] if width is None else width)), x.dtype)


def _like_state(dS: Array, state: Array | None, xp: Any) -> Array:
    return _squeeze(dS) if state is None else like(_squeeze(dS), state, xp)


def _squeeze(S: Array) -> Array:
    return S[..., 0, :, :]


def _cotangent_state(dstate: Array | None, S: Array, xp: Any) -> Array:
    return xp.zeros_like(S) if dstate is None else widen(dstate)[..., None, :, :]


def _over_group(x: Array, xp: Any) -> Array:
    return xp.sum(x, axis=-3, keepdims=True)


def _masked(scores: Array, keep: Array, xp: Any) -> Array:
    return xp.where(keep, scores, xp.zeros_like(scores))


def in_chunks(x: Array, T: int, C: int, xp: Any) -> Array:
    """(..., N, D) as (..., T, C, D), with zeros behind the last position."""
    missing = T * C - x.shape[-2]
    if missing:
        x = xp.concat([x, xp.zeros((*x.shape[:-2], missing, x.shape[-1]), dtype=x.dtype)], axis=-2)
    return xp.reshape(x, (*x.shape[:-2], T, C, x.shape[-1]))


def _running_sum(x: Array, xp: Any) -> Array:
    return xp.cumulative_sum(x, axis=-3) if hasattr(xp, "cumulative_sum") else xp.cumsum(x, axis=-3)
