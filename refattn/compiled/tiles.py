"""A tile of positions: where its rows stand, the scores of each four of them, and what decays make of them.

Rows are read where they are if they are whole vectors side by side, else copied to where they are, zeros behind the last. Columns of values, and
of the state, go in pairs of vectors: a state is kept as slabs (D, 2W), one after another, so that one of them fits the first-level cache.

Functions take pointers, since Numba counts references to arrays; `alive` holds an array that only pointers know. A number or None (`head`, `channel`,
`column`) chooses a variant when it is compiled: one decay for each position, for each row of S, for each column.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .vector import BYTES, add, elu1, exp, fetch, fma, lanes, load, mul, plus, row, store, total, whole_registers, zeros

from numba import njit, types                                                                                         # noqa: E402, I001
from numba.extending import overload                                                                                  # noqa: E402

TILE = 32
options: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}


# --- what may be None, chosen when it is compiled: `x is None` in a loop would leave both to choose from when it runs --------------------------

def of(x: Any, h: int) -> Any:
    """What is head h's; None of None."""


@overload(of, strict=False)
def _of(x: Any, h: Any) -> Any:
    return (lambda x, h: None) if isinstance(x, types.NoneType) else lambda x, h: x[h]


def reverse(x: Any) -> Any:
    """From the end; None of None."""


@overload(reverse, strict=False)
def _reverse(x: Any) -> Any:
    return (lambda x: None) if isinstance(x, types.NoneType) else lambda x: x[::-1]


def like(x: Any) -> Any:
    """Room for one more head; None of None."""


@overload(like, strict=False)
def _like(x: Any) -> Any:
    return (lambda x: None) if isinstance(x, types.NoneType) else lambda x: np.empty_like(x[:1])[::1]


def by_row(g: Any) -> Any:
    """g if it is one decay for a position, (N,); else None."""


@overload(by_row, strict=False)
def _by_row(g: Any) -> Any:
    return (lambda g: g) if isinstance(g, types.Array) and g.ndim == 1 else lambda g: None


def by_column(g: Any) -> Any:
    """g if it is one for each channel, (N, D), which stand across a transposed state; else None."""


@overload(by_column, strict=False)
def _by_column(g: Any) -> Any:
    return (lambda g: g) if isinstance(g, types.Array) and g.ndim == 2 else lambda g: None


def given(x: Any, one: Any) -> Any:
    """one, or None of None."""


@overload(given, strict=False)
def _given(x: Any, one: Any) -> Any:
    return (lambda x, one: None) if isinstance(x, types.NoneType) else lambda x, one: one


def of_gate(g: Any, one: Any) -> Any:
    """(head, channel) for decays g (N,), (N, D) or None."""


@overload(of_gate, strict=False)
def _of_gate(g: Any, one: Any) -> Any:
    if isinstance(g, types.NoneType):
        return lambda g, one: (None, None)
    return (lambda g, one: (one, None)) if g.ndim == 1 else lambda g, one: (None, one)


# --- rows ------------------------------------------------------------------------------------------------------------------------------------

@njit(**options)
def copied(x: Any, to: Any) -> None:
    """Numbers of two axes, whatever the strides."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            to[i, j] = x[i, j]


@njit(**options)
def summed_up(x: Any, to: Any) -> None:
    """to += x."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            to[i, j] += x[i, j]


@njit(**options)
def up(n: int, unit: int) -> int:
    """n, or the next multiple of `unit`."""
    return (n + unit - 1) // unit * unit


@njit(**options)
def padded(x: Any, start: int, stop: int, to: Any, height: int, width: int) -> None:
    """Rows start … stop - 1 of x in room for `height` rows; zeros behind the last, before row 0 and beside them."""
    whole_registers()
    D, W = x.shape[1], BYTES // x.itemsize
    first, last = max(-start, 0), min(min(stop, x.shape[0]) - start, height)
    vectors = D // W * W if x.strides[1] == x.itemsize else 0
    given, step = row(x, start), x.strides[0] // x.itemsize
    for t in range(first, last):
        for d in range(0, vectors, W):
            store(to, t * width + d, load(given, t * step + d))
        for d in range(vectors, D):
            to[t * width + d] = x[start + t, d]
        for d in range(D, width):
            to[t * width + d] = 0
    for d in range(first * width):
        to[d] = 0
    for d in range(max(last, first) * width, height * width):
        to[d] = 0


@njit(**options)
def written_back(given: Any, width: int, x: Any, start: int, stop: int) -> None:
    """The reverse of `padded`."""
    whole_registers()
    D, W = x.shape[1], BYTES // x.itemsize
    vectors = D // W * W if x.strides[1] == x.itemsize else 0
    to, step = row(x, start), x.strides[0] // x.itemsize
    for t in range(min(stop, x.shape[0]) - start):
        for d in range(0, vectors, W):
            store(to, t * step + d, load(given, t * width + d))
        for d in range(vectors, D):
            x[start + t, d] = given[t * width + d]


@njit(**options)
def as_it_is(x: Any, start: int, stop: int, unit: int) -> bool:
    """Whether these rows of x can be worked on where they are: whole blocks of four, numbers side by side, in multiples of `unit`."""
    return x.strides[1] == x.itemsize and x.shape[1] % unit == 0 and (stop - start) % 4 == 0 and stop <= x.shape[0]


@njit(**options)
def rows(x: Any, start: int, stop: int, unit: int, tile: Any, width: int) -> Any:
    """Where rows start … stop - 1 of x are, and how far apart: their own place, or `tile`, which gets a copy."""
    if as_it_is(x, start, stop, unit):
        return row(x, start), x.strides[0] // x.itemsize
    padded(x, start, stop, tile, TILE, width)
    return tile, width


@njit(**options)
def room(x: Any, start: int, stop: int, unit: int, tile: Any, width: int) -> Any:
    """Where these rows of x are to be written: their own place, or `tile`, to be written back."""
    if as_it_is(x, start, stop, unit):
        return row(x, start), x.strides[0] // x.itemsize
    return tile, width


@njit(**options)
def to_slabs(S: Any, T: Any) -> None:
    """The state S (D, M) as slabs of two vectors of columns."""
    (D, M), pair = S.shape, 2 * BYTES // S.itemsize
    for c in range(0, M, pair):
        padded(S[:, c:c + pair], 0, D, plus(T, c * D), D, pair)


@njit(**options)
def from_slabs(T: Any, S: Any) -> None:
    (D, M), pair = S.shape, 2 * BYTES // S.itemsize
    for c in range(0, M, pair):
        written_back(plus(T, c * D), pair, S[:, c:c + pair], 0, D)


@njit(**options)
def ask_for(x: Any, start: int, stop: int) -> None:
    """Rows of x that are needed next."""
    for t in range(start, min(stop, x.shape[0])):
        there = row(x, t)
        for d in range(0, x.shape[1], BYTES // x.itemsize):
            fetch(there, d)


@njit(**options)
def share_of(x: Any, y: Any, columns: int) -> int:
    """Rows to ask for beside each block, so that a tile's blocks ask for a tile; none where a head's arrays, two like x and two like y, fit the
    second-level cache: the processor finds them by itself there, and asking takes a tenth of the time."""
    if 2 * (x.shape[0] * x.shape[1] + y.shape[0] * y.shape[1]) * x.itemsize <= 1 << 20:
        return 0
    blocks = TILE // 4 * (columns * x.itemsize // (2 * BYTES))
    return (TILE + blocks - 1) // blocks


# --- scores and decays ---------------------------------------------------------------------------------------------------------------------

@njit(**options)
def exponentials(g: Any, start: int, stop: int, a: Any, width: int) -> None:
    """a = exp(g) of a tile, g (N,) or (N, D); 1 behind its last position, and before the first one there is."""
    whole_registers()
    if g.ndim == 2:
        padded(g, start, stop, a, TILE, width)
        for d in range(0, TILE * width, BYTES // g.itemsize):
            store(a, d, exp(load(a, d)))
    else:
        for t in range(TILE):
            a[t] = np.exp(g[start + t]) if 0 <= start + t < stop else 1


@njit(**options)
def scores(Q: Any, sq: int, K: Any, sk: int, a: Any, width: int, A: Any, head: Any, channel: Any) -> None:
    """A_ij = q_i·k_j of a block, row by row; k_j fades on its way from j to i. Rows of Q and K are sq and sk numbers apart, those of a `width`."""
    whole_registers()
    q1, q2, q3 = plus(Q, sq), plus(Q, 2 * sq), plus(Q, 3 * sq)
    k1, k2, k3 = plus(K, sk), plus(K, 2 * sk), plus(K, 3 * sk)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = zeros(Q)
    for d in range(0, width, lanes(Q)):
        x0, y = load(K, d), load(Q, d)
        s0 = fma(y, x0, s0)
        if channel is not None:
            x0 = mul(load(plus(a, width), d), x0)
        x1, y = load(k1, d), load(q1, d)
        s1, s2 = fma(y, x0, s1), fma(y, x1, s2)
        if channel is not None:
            f = load(plus(a, 2 * width), d)
            x0, x1 = mul(f, x0), mul(f, x1)
        x2, y = load(k2, d), load(q2, d)
        s3, s4, s5 = fma(y, x0, s3), fma(y, x1, s4), fma(y, x2, s5)
        if channel is not None:
            f = load(plus(a, 3 * width), d)
            x0, x1, x2 = mul(f, x0), mul(f, x1), mul(f, x2)
        x3, y = load(k3, d), load(q3, d)
        s6, s7, s8, s9 = fma(y, x0, s6), fma(y, x1, s7), fma(y, x2, s8), fma(y, x3, s9)
    A[0], A[1], A[2], A[3], A[4] = total(s0), total(s1), total(s2), total(s3), total(s4)
    A[5], A[6], A[7], A[8], A[9] = total(s5), total(s6), total(s7), total(s8), total(s9)
    if head is not None:
        A[1], A[3], A[4] = a[1] * A[1], a[1] * a[2] * A[3], a[2] * A[4]
        A[6], A[7], A[8] = a[1] * a[2] * a[3] * A[6], a[2] * a[3] * A[7], a[3] * A[8]


@njit(**options)
def weights(a: Any, b: Any, e: Any) -> None:
    """b_i and e_i of a block with one decay for all channels."""
    b[0], e[3] = a[0], 1
    for i in range(3):
        b[i + 1] = b[i] * a[i + 1]
        e[2 - i] = e[3 - i] * a[3 - i]


@njit(**options)
def faded_before(x: Any, step: int, a: Any, width: int, to: Any) -> None:
    """b ⊙ x of the four rows of a block with a decay for each channel."""
    whole_registers()
    for d in range(0, width, lanes(x)):
        b = load(a, d)
        store(to, d, mul(b, load(x, d)))
        for i in range(1, 4):
            b = mul(load(plus(a, i * width), d), b)
            store(to, i * width + d, mul(b, load(x, i * step + d)))


@njit(**options)
def faded_behind(x: Any, step: int, a: Any, width: int, to: Any) -> None:
    """e ⊙ x of the four rows."""
    whole_registers()
    for d in range(0, width, lanes(x)):
        e = load(plus(a, 3 * width), d)
        store(to, 3 * width + d, load(x, 3 * step + d))
        store(to, 2 * width + d, mul(e, load(x, 2 * step + d)))
        for i in range(1, -1, -1):
            e = mul(load(plus(a, (i + 1) * width), d), e)
            store(to, i * width + d, mul(e, load(x, i * step + d)))


@njit(**options)
def all_four(a: Any, width: int) -> None:
    """b_3 in the place of a_0."""
    whole_registers()
    for d in range(0, width, lanes(a)):
        x = mul(load(plus(a, width), d), load(a, d))
        store(a, d, mul(load(plus(a, 3 * width), d), mul(load(plus(a, 2 * width), d), x)))


# --- attention -----------------------------------------------------------------------------------------------------------------------------

@njit(**options)
def mapped(x: Any, start: int, stop: int, to: Any, width: int, elu: Any) -> None:
    """φ(x) = elu(x) + 1 of a tile's rows, or x itself where `elu` is None; zeros behind and beside them."""
    whole_registers()
    padded(x, start, stop, to, TILE, width)
    if elu is not None:
        D = x.shape[1]
        for t in range(min(stop, x.shape[0]) - start):
            here = plus(to, t * width)
            for d in range(0, width, lanes(here)):
                y = load(here, d)
                store(here, d, elu1(y, exp(y)))
            for d in range(D, width):
                here[d] = 0


@njit(**options)
def phi(x: Any, n: int) -> None:
    """φ(x) = elu(x) + 1 in the place of n numbers."""
    whole_registers()
    W = lanes(x)
    for i in range(0, n // W * W, W):
        y = load(x, i)
        store(x, i, elu1(y, exp(y)))
    for i in range(n // W * W, n):
        x[i] = x[i] + 1 if x[i] > 0 else np.exp(x[i])


@njit(**options)
def dot(x: Any, y: Any, width: int) -> Any:
    whole_registers()
    s = zeros(x)
    for d in range(0, width, lanes(x)):
        s = fma(load(x, d), load(y, d), s)
    return total(s)


@njit(**options)
def counted(z: Any, k: Any, q: Any, width: int) -> Any:
    """z += k, then q·z."""
    whole_registers()
    s = zeros(z)
    for d in range(0, width, lanes(z)):
        x = add(load(k, d), load(z, d))
        store(z, d, x)
        s = fma(load(q, d), x, s)
    return total(s)
