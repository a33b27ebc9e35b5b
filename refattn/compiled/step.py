"""One position of each head: the equations as they stand, a vector of columns of the state at a time. What `launch` calls, with the heads of one
thread.

    P = Diag(exp(g)) S,   u = v or β (v - Pᵀ k),   S' = P + k uᵀ,   o = scale S'ᵀ q                                              the recurrence
    S' = S + φ(k) vᵀ,   z' = z + φ(k),   inverse = 1 / (φ(q)·z' + ε)  (0 where that is 1 / 0),   o = inverse S'ᵀ φ(q)             attention
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .tiles import options, padded, phi, up, written_back
from .vector import BYTES, alive, boundary, fma, load, mul, plus, store, whole_registers, zeros

from numba import njit                                                                                                # noqa: E402, I001


@njit(**options)
def step_heads(q: Any, k: Any, v: Any, g: Any, beta: Any, S: Any, after: Any, out: Any, scale: Any) -> None:
    """q (G·H, D), k (H, D), v (H, M), g (H, 1) or (H, D), beta (H,); S and `after` (H, D, M), out (G·H, M). g, beta: None where there is none."""
    whole_registers()
    (H, D), M, W, groups = k.shape, v.shape[1], BYTES // q.itemsize, q.shape[0] // k.shape[0]
    width = up(M, W)
    tile = np.empty(D * width + 2 * width + W, q.dtype)
    P = boundary(tile)
    u, o = plus(P, D * width), plus(P, D * width + width)
    for h in range(H):
        padded(S[h], 0, D, P, D, width)
        padded(v[h:h + 1], 0, 1, u, 1, width)
        if g is not None:
            for d in range(D):
                a = np.exp(g[h, min(d, g.shape[1] - 1)])
                for c in range(d * width, (d + 1) * width, W):
                    store(P, c, mul(a, load(P, c)))
        if beta is not None:
            for c in range(0, width, W):
                x = load(u, c)
                for d in range(D):
                    x = fma(-k[h, d], load(P, d * width + c), x)
                store(u, c, mul(beta[h], x))
        for c in range(0, width, W):
            write(P, width, k[h], D, load(u, c), c)
        written_back(P, width, after[h], 0, D)
        for query in range(h * groups, (h + 1) * groups):
            for c in range(0, width, W):
                store(o, c, mul(scale, read(P, width, q[query], D, c)))
            written_back(o, width, out[query:query + 1], 0, 1)
    alive(tile)


@njit(**options)
def attention_step_heads(q: Any, k: Any, v: Any, S: Any, z: Any, after: Any, z_after: Any, out: Any, inverse: Any, eps: Any, elu: Any) -> None:
    """q (G·H, D), k (H, D), v (H, M), S (H, D, M), z (H, D), and what is behind; out (G·H, M), inverse (G·H,). `elu` None: q and k are mapped."""
    whole_registers()
    (H, D), M, W, groups = k.shape, v.shape[1], BYTES // q.itemsize, q.shape[0] // k.shape[0]
    width = up(M, W)
    tile = np.empty(D * width + 2 * width + up(D, W) + W, q.dtype)
    P = boundary(tile)
    u, o, row = plus(P, D * width), plus(P, D * width + width), plus(P, D * width + 2 * width)
    for h in range(H):
        padded(S[h], 0, D, P, D, width)
        padded(v[h:h + 1], 0, 1, u, 1, width)
        padded(k[h:h + 1], 0, 1, row, 1, D)
        if elu is not None:
            phi(row, D)
        for d in range(D):
            z_after[h, d] = z[h, d] + row[d]
        for c in range(0, width, W):
            write(P, width, row, D, load(u, c), c)
        written_back(P, width, after[h], 0, D)
        for query in range(h * groups, (h + 1) * groups):
            padded(q[query:query + 1], 0, 1, row, 1, D)
            if elu is not None:
                phi(row, D)
            den = eps
            for d in range(D):
                den += row[d] * z_after[h, d]
            inverse[query] = 1 / den if den != 0 else 0
            for c in range(0, width, W):
                store(o, c, mul(inverse[query], read(P, width, row, D, c)))
            written_back(o, width, out[query:query + 1], 0, 1)
    alive(tile)


@njit(forceinline=True, **options)
def write(P: Any, width: int, k: Any, D: int, u: Any, c: int) -> None:
    """P + k uᵀ in the place of P, of a vector of columns."""
    whole_registers()
    for d in range(D):
        store(P, d * width + c, fma(k[d], u, load(P, d * width + c)))


@njit(forceinline=True, **options)
def read(P: Any, width: int, q: Any, D: int, c: int) -> Any:
    """Pᵀ q, of a vector of columns."""
    whole_registers()
    o = zeros(P)
    for d in range(D):
        o = fma(q[d], load(P, d * width + c), o)
    return o
