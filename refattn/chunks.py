"""How the rules with a gate or a delta go from chunk to chunk: states in between, blocks of chunks on the CPU, all chunks at once elsewhere.

A rule gives two functions of chunks, arrays (..., G, T, C, width) and states (..., 1, D, M):

    forward(xp, states, S, Q, K, V, …)       -> O, S_end                Q None: only S_end
    backward(xp, states, S, R, dO, Q, K, V, …) -> dS, dQ, dK, dV, …     R the cotangent of S_end

and this file runs them over a whole sequence. Between chunks, each rule is

    S_{c+1} = whole_c S_c + add_c + X_cᵀ U_c,   U_c = T_c (Z_c - Y_c S_c)

with a diagonal `whole` and, for the delta rules, X, Y, Z of C rows and a matrix T. `states` gives S before each chunk, U, and S behind the
last chunk; or with reverse=True the same from the last chunk to the first.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from ._array import Array, accumulator, check_positive, namespace, transposed
from ._blocks import BUFFER_BYTES, blocks, split_groups
from .causal import each_stack, grouped, in_chunks, like, widen

Residuals = tuple[Any, ...]
States = Callable[..., tuple[Array, Any, Array]]
Forward = Callable[..., tuple[Any, Array]]
Backward = Callable[..., tuple[Array, ...]]

CHUNK = 32         # a power of two: of 16, 32, 64 the fastest for D = M = 64 in float32
PARTS = 16         # in which the backward cuts a sequence, and each part again, until a part is a block: the states that it holds


# --- states between chunks ------------------------------------------------------------------------------------------------------------

Update = tuple[Array, Array, Array, Array]       # X, T, Z, Y


def states_one_by_one(whole: np.ndarray | None, add: np.ndarray | None, S: np.ndarray, update: Update | None = None, *,
                      reverse: bool = False) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """S before each of T chunks (..., T, D, M), U (..., T, C, M) or None, and S behind the last; see the top of this file. None counts as
    one for `whole`, as zero for `add`."""
    U: Any = None
    own: Any = update[2] if update else add
    count = own.shape[-3]
    states = np.empty((*S.shape[:-2], count + 1, *S.shape[-2:]), S.dtype)
    states[..., count if reverse else 0, :, :] = S
    if update:
        X, T, Z, Y = update
        X, U, z, written = transposed(X), np.empty_like(Z), np.empty_like(Z[..., 0, :, :]), np.empty_like(S)

    def each(x: Any) -> Any:                                                        # in the order of the walk
        return repeat(None, count) if x is None else np.moveaxis(x, -3, 0)[:: -1 if reverse else 1]

    passed = each(states)
    for S, after, w, a, c in zip(passed[:-1], passed[1:], each(whole), each(add), range(count)[:: -1 if reverse else 1], strict=True):
        if w is not None:
            np.multiply(w, S, out=after)
        if update:
            np.matmul(Y[..., c, :, :], S, out=z)
            np.subtract(Z[..., c, :, :], z, out=z)
            u = np.matmul(T[..., c, :, :], z, out=U[..., c, :, :])
            np.add(S if w is None else after, np.matmul(X[..., c, :, :], u, out=written), out=after)
        if a is not None:
            np.add(S if w is None and not update else after, a, out=after)
    return (states[..., 1:, :, :] if reverse else states[..., :-1, :, :]), U, passed[-1].copy()     # a view would hold all states


def states_by_doubling(whole: Array | None, add: Any, S: Array, update: Update | None = None, *,
                       reverse: bool = False) -> tuple[Array, Array | None, Array]:
    """The same without a loop over chunks: after log₂ T rounds each chunk has the composition of all the maps S -> move S + add up to it."""
    xp = namespace(S=S)
    move: Any = whole
    if update:
        X, T, Z, Y = update
        one, XT = xp.eye(S.shape[-2], dtype=S.dtype), transposed(X) @ T
        move, add = (one if whole is None else one * whole) - XT @ Y, XT @ Z if add is None else add + XT @ Z

    def apply(m: Array, x: Array) -> Array:
        return m @ x if update else m * x

    if reverse:
        move, add = xp.flip(move, axis=-3), xp.flip(add, axis=-3)
    shift = 1
    add = xp.concat([apply(move[..., :1, :, :], S[..., None, :, :]) + add[..., :1, :, :], add[..., 1:, :, :]], axis=-3)
    while shift < add.shape[-3]:
        add = xp.concat([add[..., :shift, :, :], apply(move[..., shift:, :, :], add[..., :-shift, :, :]) + add[..., shift:, :, :]], axis=-3)
        move = xp.concat([move[..., :shift, :, :], apply(move[..., shift:, :, :], move[..., :-shift, :, :])], axis=-3)
        shift *= 2
    seen = xp.concat([S[..., None, :, :], add[..., :-1, :, :]], axis=-3)
    if reverse:
        seen = xp.flip(seen, axis=-3)
    return seen, T @ (Z - Y @ seen) if update else None, add[..., -1, :, :]


# --- NumPy: blocks of chunks, stacks of heads --------------------------------------------------------------------------------------------

def chunked_forward(forward: Forward, q: np.ndarray, k: np.ndarray, v: np.ndarray, more: Sequence[np.ndarray | None],
                    state: np.ndarray | None, chunk: int) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """out, the final state and residuals. `more`: what the rule has beside q, k and v, (..., H, N) or (..., H, N, D); None stays None."""
    chunk = check_chunk(chunk)
    out = np.empty((*q.shape[:-1], v.shape[-1]), v.dtype)
    end = _start(k, v, state)

    def work(Q: Any, O: Any, S: Any, *inputs: Any) -> None:
        for rows in blocks(Q.shape[2], _rows_at_once(Q, O, chunk, S)):
            o, S[:, None] = forward(np, states_one_by_one, S[:, None], *(_load(x, rows, chunk, S) for x in (Q, *inputs)))
            _store(O, rows, o)

    each_stack(work, end, chunk, *_views(k, q, out), end, *_views(k, k, v, *more))
    return out, end, (q, k, v, more, state, chunk)


def chunked_backward(forward: Forward, backward: Backward, dout: np.ndarray, dstate: np.ndarray | None,
                     residuals: Residuals) -> tuple[Any, ...]:
    """dq, dk, dv, d of `more`, dstate0: block by block from the end. The state before a block is made from that before its part of the
    sequence, which is made from … at most PARTS states are held for each power of PARTS in the number of blocks."""
    q, k, v, more, state, chunk = residuals
    inputs = (q, k, v, *more)
    gradients = [None if x is None else np.empty(x.shape, x.dtype) for x in inputs]
    S, R = _start(k, v, state), _start(k, v, dstate)
    n = len(inputs)

    def work(Q: Any, dO: Any, S: Any, R: Any, *arrays: Any) -> None:
        X, dX = (Q, *arrays[: n - 1]), arrays[n - 1:]
        size = _rows_at_once(Q, dO, chunk, S)

        def advance(rows: slice, S: np.ndarray) -> np.ndarray:
            for part in blocks(rows.stop - rows.start, size):
                here = slice(rows.start + part.start, rows.start + part.stop)
                S = forward(np, states_one_by_one, S, None, *(_load(x, here, chunk, S) for x in X[1:]))[1]
            return S

        def back(rows: slice, S: np.ndarray, R: np.ndarray) -> np.ndarray:
            """R before `rows` from R behind them; S is the state before them."""
            if rows.stop - rows.start <= size:
                R, *d = backward(np, states_one_by_one, S, R, *(_load(x, rows, chunk, S) for x in (dO, *X)))
                for to, x in zip(dX, d, strict=True):
                    _store(to, rows, x)
                return R
            step = size
            while step * PARTS < rows.stop - rows.start:
                step *= PARTS
            parts = [slice(a, min(a + step, rows.stop)) for a in range(rows.start, rows.stop, step)]
            before = [S]
            for part in parts[:-1]:
                before.append(advance(part, before[-1]))
            for part in reversed(parts):
                R = back(part, before.pop(), R)
            return R

        if Q.shape[2]:
            R[:, None] = back(slice(0, Q.shape[2]), S[:, None], R[:, None])

    each_stack(work, S, chunk, *_views(k, q, dout), S, R, *_views(k, *inputs[1:], *gradients))
    return (*gradients, R)


def _start(k: np.ndarray, v: np.ndarray, state: np.ndarray | None) -> np.ndarray:
    S = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), accumulator(v.dtype))
    if state is not None:
        S[...] = state
    return S


def _views(k: np.ndarray, *arrays: np.ndarray | None) -> list[np.ndarray | None]:
    """(..., G·H, N, W) as (..., H, G, N, W); (..., H, N) with a last axis of one."""
    headed = k.ndim > 2
    return [None if x is None else split_groups(x if x.ndim == k.ndim else x[..., None], k.shape[-3] if headed else 1, headed)
            for x in arrays]


def _rows_at_once(Q: np.ndarray, O: np.ndarray, C: int, S: np.ndarray) -> int:
    heads, G = Q.shape[:2]
    D, M = S.shape[-2:]
    per_chunk = (G + 1) * C * (2 * (D + M) + C) + D * (D + M)
    return C * max(2 * BUFFER_BYTES // (heads * per_chunk * S.itemsize), 1)


def _load(x: np.ndarray | None, rows: slice, C: int, S: np.ndarray) -> np.ndarray | None:
    """Positions `rows` of (h, G, N, W) as chunks (h, G, T, C, W) in S's dtype; zeros behind the last."""
    if x is None:
        return None
    h, G, N, W = x.shape
    rows = slice(rows.start, min(rows.stop, N))
    n = rows.stop - rows.start
    T = -(-n // C)
    if n == T * C:
        return x[:, :, rows].reshape(h, G, T, C, W).astype(S.dtype, copy=False)
    padded = np.zeros((h, G, T * C, W), S.dtype)
    padded[:, :, :n] = x[:, :, rows]
    return padded.reshape(h, G, T, C, W)


def _store(to: np.ndarray | None, rows: slice, x: np.ndarray) -> None:
    if to is not None:
        n = min(rows.stop, to.shape[2]) - rows.start
        np.copyto(to[:, :, rows], x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])[:, :, :n], casting="same_kind")


# --- the array API: all chunks at once ----------------------------------------------------------------------------------------------------

def scan_forward(forward: Forward, q: Array, k: Array, v: Array, more: Sequence[Array | None], state: Array | None,
                 chunk: int) -> tuple[Array, Array, Residuals]:
    """`chunked_forward` as one block, its states by doubling."""
    chunk = check_chunk(chunk)
    xp, inputs, S = _functional(q, k, v, more, state, chunk)
    out, end = forward(xp, states_by_doubling, S, *inputs)
    return _rows(out, q, q.shape[-2], xp, v.shape[-1]), end[..., 0, :, :], (q, k, v, more, state, chunk)


def scan_backward(backward: Backward, dout: Array, dstate: Array | None, residuals: Residuals) -> tuple[Any, ...]:
    """`chunked_backward` as one block."""
    q, k, v, more, state, chunk = residuals
    xp, inputs, S = _functional(q, k, v, more, state, chunk)
    R = xp.zeros_like(S) if dstate is None else widen(dstate)[..., None, :, :]
    dS, *d = backward(xp, states_by_doubling, S, R, in_chunks(grouped(dout, widen(k)[..., None, :, :], xp), *_cut(q, chunk), xp), *inputs)
    return (*(None if x is None else _rows(y, x, q.shape[-2], xp) for x, y in zip((q, k, v, *more), d, strict=True)), dS[..., 0, :, :])


def _cut(q: Array, C: int) -> tuple[int, int]:
    return max(-(-q.shape[-2] // C), 1), C


def _functional(q: Array, k: Array, v: Array, more: Sequence[Array | None], state: Array | None,
                C: int) -> tuple[Any, list[Array | None], Array]:
    """Namespace; q, k, v and more as (..., H, G, T, C, W) in the accumulator dtype; S as (..., H, 1, D, M)."""
    xp = namespace(q=q, k=k, v=v)
    K = widen(k)[..., None, :, :]
    flat = [grouped(q, K, xp), K, *(None if x is None else widen(x if x.ndim == k.ndim else x[..., None])[..., None, :, :]
                                    for x in (v, *more))]
    S = (xp.zeros((*K.shape[:-2], K.shape[-1], v.shape[-1]), dtype=K.dtype) if state is None else widen(state)[..., None, :, :])
    return xp, [None if x is None else in_chunks(x, *_cut(q, C), xp) for x in flat], S


def _rows(y: Array, x: Array, N: int, xp: Any, width: int | None = None) -> Array:
    """Chunks (..., H, G, T, C, W) as N rows, with x's shape and dtype (the last axis may differ)."""
    return like(xp.reshape(y, (*y.shape[:-3], y.shape[-3] * y.shape[-2], y.shape[-1]))[..., :N, :], x, xp, width)


# --- the last state alone ------------------------------------------------------------------------------------------------------------

def last_state(over: Callable[..., Array], k: Array, arrays: Sequence[Array | None], S: Array, *, reverse: bool = False) -> Array:
    """S (..., H, D, W), in the accumulator dtype, after over(xp, states, S, *chunks) -> S on all positions, without outputs: a block of
    chunks at a time for NumPy arrays, all at once for others. With `reverse` from the last position to the first.

    `arrays`: (..., G·H, N, ·) or (..., H, N), of one N; the first has the most heads. None stays None.

    >>> one = np.ones((3, 1))
    >>> last_state(lambda xp, states, S, K, V: S + (transposed(K) @ V).sum(-3), one, (one, 2 * one), np.zeros((1, 1)))
    array([[6.]])
    """
    if not isinstance(k, np.ndarray):
        xp = namespace(k=k)
        K = widen(k)[..., None, :, :]
        chunks = [None if x is None else in_chunks(grouped(x if x.ndim == k.ndim else x[..., None], K, xp), *_cut(k, CHUNK), xp)
                  for x in arrays]
        return over(xp, states_by_doubling, S[..., None, :, :], *chunks)[..., 0, :, :]
    end = S.copy()

    def work(S: Any, *inputs: Any) -> None:
        first = inputs[0]
        for rows in blocks(first.shape[2], _rows_at_once(first, first, CHUNK, S), reverse):
            S[:, None] = over(np, states_one_by_one, S[:, None], *(_load(x, rows, CHUNK, S) for x in inputs))

    first, *rest = _views(k, *arrays)
    each_stack(lambda first, S, *rest: work(S, first, *rest), end, CHUNK, first, end, *rest)
    return end


# --- small things -------------------------------------------------------------------------------------------------------------------------

def check_chunk(chunk: int) -> int:
    chunk = check_positive("chunk", chunk)
    if chunk & (chunk - 1):
        raise ValueError(f"chunk: expected a power of two, got {chunk}")
    return chunk


def one_chunk(q: Array) -> int:
    """The least power of two that holds all N positions."""
    return 1 << max(q.shape[-2] - 1, 0).bit_length()
