"""A decoding step of a whole model, some sequences at a time: what `refattn.decoding` does, without an array on the way that leaves the cache.

Weights come as one array in the order of their use: of each matrix, (K, F), slabs of two vectors of columns, (K, 32) in float32, one behind the
other, then its bias. A product is then what four rows read in a slab, as they read in a state (`sweep.read`), and each weight is read once for GROUP
sequences.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ..layers import _GELU_A, _GELU_C
from .sweep import read
from .tiles import options, padded, phi, up, written_back
from .vector import BYTES, add, alive, at_least, boundary, div, exp, fma, lanes, load, mul, plus, row, store, whole_registers, zeros

from numba import njit                                                                                                # noqa: E402, I001

GROUP = 32


def packed(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(W, b) after (W, b) as the loops read them; begins where a vector may."""
    pair = 2 * BYTES // parts[0][0].itemsize
    pieces = []
    for W, b in parts:
        (K, F), columns = W.shape, -(-W.shape[1] // pair) * pair
        wide, bias = np.zeros((K, columns), W.dtype), np.zeros(columns, W.dtype)
        wide[:, :F], bias[:F] = W, b
        pieces += [wide.reshape(K, -1, pair).swapaxes(0, 1).reshape(-1), bias]
    room = np.empty(sum(x.size for x in pieces) + pair, parts[0][0].dtype)
    start = -room.ctypes.data % BYTES // room.itemsize
    return np.concatenate(pieces, out=room[start:start + room.size - pair])


def padded_states(states: Any) -> tuple[np.ndarray, np.ndarray]:
    """S (layers, B, H, D, columns) and z (layers, B, H, D), copies: zeros beside the M columns there are, up to whole vectors."""
    z = np.stack([state.z for state in states])
    M, W = states[0].S.shape[-1], BYTES // z.itemsize
    S = np.zeros((*z.shape, -(-M // W) * W), z.dtype)
    S[..., :M] = np.stack([state.S for state in states])
    return S, z


@njit(**options)
def decoded(x: Any, S: Any, z: Any, weights: Any, out: Any, inner: int, eps_norm: Any, eps: Any, gelu: Any) -> None:
    """x (B, E), what was read; out (B, V). S (layers, B, H, D, columns), M padded to whole vectors, and z (layers, B, H, D) go on in place. `inner`:
    the width of the feed-forward; `gelu` None: relu."""
    whole_registers()
    (B, E), V, W, kind = x.shape, out.shape[1], BYTES // x.itemsize, x.dtype
    layers, heads, D, columns = S.shape[0], S.shape[2], S.shape[3], S.shape[4]
    wide, three, last, wide_inner = up(E, 2 * W), up(3 * E, 2 * W), up(V, 2 * W), up(inner, 2 * W)
    few = np.zeros(GROUP * (2 * wide + max(three, last) + wide_inner) + 2 * W, kind)
    X = boundary(few)
    Y, P, hidden = plus(X, GROUP * wide), plus(X, 2 * GROUP * wide), plus(X, GROUP * (2 * wide + max(three, last)))
    one, none, count = kind.type(1), None, kind.type(E)
    for first in range(0, B, GROUP):
        n = min(B - first, GROUP)
        padded(x, first, first + n, X, up(n, 4), wide)
        w = boundary(weights)
        for layer in range(layers):
            normalised(X, wide, n, E, count, eps_norm, Y)
            w = product(Y, wide, n, E, w, three, P, three, none)
            for r in range(n):
                phi(plus(P, r * three), 2 * E)
                for h in range(heads):
                    attend(plus(P, r * three + h * D), E, row(S[layer, first + r, h], 0), columns, row(z[layer, first + r], h), D,
                           plus(Y, r * wide + h * D), eps)
            w = product(Y, wide, n, E, w, wide, X, wide, one)
            normalised(X, wide, n, E, count, eps_norm, Y)
            w = product(Y, wide, n, E, w, wide_inner, hidden, wide_inner, none)
            activated(hidden, n * wide_inner, gelu)
            w = product(hidden, wide_inner, n, inner, w, wide, X, wide, one)
        normalised(X, wide, n, E, count, eps_norm, Y)
        product(Y, wide, n, E, w, last, P, last, none)
        written_back(P, last, out, first, first + n)
    alive(few)


@njit(**options)
def product(x: Any, step: int, n: int, K: int, w: Any, columns: int, out: Any, room: int, more: Any) -> Any:
    """out = x W + b of n rows, four at a time, or out += x W + b unless `more` is None; where the next weights are."""
    whole_registers()
    W = lanes(x)
    bias = plus(w, K * columns)
    for c in range(0, columns, 2 * W):
        for r in range(0, n, 4):
            o0, o1, o2, o3, p0, p1, p2, p3 = read(plus(x, r * step), step, w, K)
            put(out, r * room + c, room, bias, c, o0, o1, o2, o3, more)
            put(out, r * room + c + W, room, bias, c + W, p0, p1, p2, p3, more)
        w = plus(w, K * 2 * W)
    return plus(bias, columns)


@njit(forceinline=True, **options)
def put(out: Any, at: int, room: int, bias: Any, c: int, o0: Any, o1: Any, o2: Any, o3: Any, more: Any) -> None:
    whole_registers()
    b = load(bias, c)
    o0, o1, o2, o3 = add(o0, b), add(o1, b), add(o2, b), add(o3, b)
    if more is not None:
        o0, o1 = add(o0, load(out, at)), add(o1, load(out, at + room))
        o2, o3 = add(o2, load(out, at + 2 * room)), add(o3, load(out, at + 3 * room))
    store(out, at, o0)
    store(out, at + room, o1)
    store(out, at + 2 * room, o2)
    store(out, at + 3 * room, o3)


@njit(**options)
def normalised(x: Any, step: int, n: int, E: int, count: Any, eps: Any, to: Any) -> None:
    """c / √(Σ c² + E ε), c = x - mean(x), of each row; `count` is E as a number of x's kind."""
    for r in range(n):
        here, there = plus(x, r * step), plus(to, r * step)
        mean, square = eps - eps, eps * count
        for d in range(E):
            mean += here[d]
        mean /= count
        for d in range(E):
            c = here[d] - mean
            there[d] = c
            square += c * c
        root = np.sqrt(square)
        for d in range(E):
            there[d] /= root


@njit(**options)
def attend(q: Any, E: int, S: Any, columns: int, z: Any, D: int, out: Any, eps: Any) -> None:
    """Eq. (16) to (19) of a head: φ(q), then φ(k) and v behind it at distances of E; S (D, columns), z and out (D,). D = M."""
    whole_registers()
    k, v, den = plus(q, E), plus(q, 2 * E), eps
    for d in range(D):
        z[d] += k[d]
        den += q[d] * z[d]
    factor = eps - eps if den == 0 else 1 / den
    for c in range(0, columns, lanes(q)):
        u, o = load(v, c), zeros(q)
        for d in range(D):
            y = fma(k[d], u, load(S, d * columns + c))
            store(S, d * columns + c, y)
            o = fma(q[d], y, o)
        store(out, c, mul(factor, o))


@njit(**options)
def activated(x: Any, n: int, gelu: Any) -> None:
    """relu, or gelu(x) = ½ x (1 + tanh t) = x / (1 + e^{-2t}), t = c (x + a x³)."""
    whole_registers()
    for i in range(0, n, lanes(x)):
        y = load(x, i)
        if gelu is None:
            store(x, i, at_least(0, y))
        else:
            minus_2t = mul(fma(-2 * _GELU_C * _GELU_A, mul(y, y), add(-2 * _GELU_C, zeros(x))), y)
            store(x, i, div(y, add(1, exp(minus_2t))))
