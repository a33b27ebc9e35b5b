"""Causal linear attention of one head, φ and the normaliser in the loop, and its transpose at constant memory."""
from __future__ import annotations

from typing import Any

import numpy as np

from .sweep import plain
from .tiles import TILE, as_it_is, ask_for, counted, dot, from_slabs, mapped, options, padded, room, rows, share_of, to_slabs, up, written_back
from .vector import BYTES, alive, at_most, boundary, fma, lanes, load, mul, plus, store, whole_registers

from numba import njit                                                                                                # noqa: E402, I001


KEPT = 1 << 18      # numbers: a second-level cache in float32


@njit(**options)
def attention(q: Any, k: Any, v: Any, S: Any, z: Any, out: Any, inverse: Any, eps: Any, elu: Any) -> None:
    """Eq. (8) to (12): with φ(q), φ(k) for q, k where `elu` is not None, and k 0 behind its last position,

        z_t = z_{t-1} + k_t,   inverse_t = 1 / (q_t·z_t + ε)  (0 where that is 1 / 0),   out_t = inverse_t S_tᵀ q_t

    q (N, D), k (L, D), v (L, M), out (N, M), inverse (N,); S (D, M) and z (1, D) changed in place, to what is behind the longer of both."""
    whole_registers()
    (N, D), (L, M), W, kind = q.shape, v.shape, BYTES // S.itemsize, S.dtype
    pair, width, columns = 2 * W, up(D, W), up(M, 2 * W)
    state, tiles = np.empty(D * columns + W, kind), np.empty(2 * TILE * (width + columns) + width + TILE + W, kind)
    T, Q = boundary(state), boundary(tiles)
    K, V0, O0, Z, den = (plus(Q, TILE * width), plus(Q, 2 * TILE * width), plus(Q, TILE * (2 * width + columns)),
                         plus(Q, 2 * TILE * (width + columns)), plus(Q, 2 * TILE * (width + columns) + width))
    to_slabs(S, T)
    padded(z, 0, 1, Z, 1, width)
    per_call = share_of(q, v, columns)
    for start in range(0, max(N, L), TILE):
        stop, ahead = min(start + TILE, max(N, L)), start + TILE
        mapped(q, start, stop, Q, width, elu)
        mapped(k, start, stop, K, width, elu)
        V, sv = rows(v, start, stop, pair, V0, columns)
        O, so = room(out, start, stop, pair, O0, columns)
        for t in range(TILE):
            x = counted(Z, plus(K, t * width), plus(Q, t * width), width) + eps
            den[t] = 1 / x if x != 0 else 0
            if start + t < N:
                inverse[start + t] = den[t]
        for c in range(0, columns, pair):
            for at in range(0, stop - start, 4):
                plain(plus(Q, at * width), width, plus(K, at * width), width, plus(V, at * sv + c), sv, plus(O, at * so + c), so, plus(T, c * D), D,
                      plus(den, at))
                then = ahead + per_call
                ask_for(q, ahead, then)
                ask_for(k, ahead, then)
                ask_for(v, ahead, then)
                ask_for(out, ahead - TILE, then - TILE)
                ahead = then
        if not as_it_is(out, start, stop, pair):
            written_back(O, columns, out, start, stop)
    from_slabs(T, S)
    written_back(Z, width, z, 0, 1)
    alive(state)
    alive(tiles)


@njit(**options)
def attention_backward(q: Any, k: Any, v: Any, out: Any, inverse: Any, dout: Any, S: Any, z: Any, R: Any, dz: Any, dq: Any, dk: Any, dv: Any,
                       elu: Any) -> None:
    """Eq. (13) to (15) with the normaliser: with G_t = inverse_t do_t and dden_t = -inverse_t (do_t·out_t),

        dφ(q)_t = S_t G_t + z_t dden_t                                             forwards, S_tᵀ = S_{t-1}ᵀ + v_t φ(k_t)ᵀ
        dv_t = R_tᵀ φ(k_t),   dφ(k)_t = R_t v_t + r_t,   R_t = R_{t+1} + φ(q_t) G_tᵀ,   r_t = r_{t+1} + φ(q_t) dden_t          from the end

    S (D, M), z (1, D): the state to start from, whose end is left there; R, dz: its cotangent behind the end, changed in place to that of the
    start. φ' = min(φ, 1). What both ways read, φ(q), φ(k), G and dden, is made twice, tile by tile, or kept where it is at most KEPT numbers."""
    whole_registers()
    (D, M), W, kind, end = S.shape, BYTES // S.itemsize, S.dtype, max(q.shape[0], v.shape[0])
    pair, one = 2 * W, S.dtype.type(1)
    width, columns = up(D, pair), up(M, pair)
    kept = up(end, TILE) * (2 * width + columns) <= KEPT
    height = up(end, TILE) if kept else TILE
    state, few = np.empty(D * columns + M * width + W, kind), np.ones(TILE + width + height + W, kind)
    tiles = np.empty(TILE * (width + 2 * columns) + height * (2 * width + columns) + W, kind)
    T, dF, ones = boundary(state), boundary(tiles), boundary(few)
    RT, Z, dden = plus(T, D * columns), plus(ones, TILE), plus(ones, TILE + width)
    V0, dV, Q = plus(dF, TILE * width), plus(dF, TILE * (width + columns)), plus(dF, TILE * (width + 2 * columns))
    F, G = plus(Q, height * width), plus(Q, 2 * height * width)
    to_slabs(S.T, T)
    padded(z, 0, 1, Z, 1, width)
    for start in range(0, end, TILE):
        stop, step = min(start + TILE, end), TILE if kept else 0
        read_again(q, k, out, inverse, dout, start, stop, Q, F, G, V0, dden, width, columns, elu)
        V, sv = rows(v, start, stop, pair, V0, columns)
        for c in range(0, width, pair):
            for at in range(0, stop - start, 4):
                plain(plus(G, at * columns), columns, plus(V, at * sv), sv, plus(F, at * width + c), width, plus(dF, at * width + c), width,
                      plus(T, c * M), M, ones)
        for t in range(stop - start):
            through(plus(dF, t * width), plus(Q, t * width), Z, one, plus(F, t * width), dden[t], width, elu)
        written_back(dF, width, dq, start, stop)
        Q, F, G, dden = plus(Q, step * width), plus(F, step * width), plus(G, step * columns), plus(dden, step)
    from_slabs(T, S.T)
    written_back(Z, width, z, 0, 1)
    to_slabs(R, T)
    to_slabs(R.T, RT)
    padded(dz, 0, 1, Z, 1, width)
    for start in range((end - 1) // TILE * TILE, -1, -TILE):
        stop, step = min(start + TILE, end), TILE if kept else 0
        Q, F, G, dden = plus(Q, -step * width), plus(F, -step * width), plus(G, -step * columns), plus(dden, -step)
        if not kept:
            read_again(q, k, out, inverse, dout, start, stop, Q, F, G, V0, dden, width, columns, elu)
        V, sv = rows(v, start, stop, pair, V0, columns)
        for c in range(0, columns, pair):
            for at in range(up(stop - start, 4) - 1, 0, -4):
                plain(plus(F, at * width), -width, plus(Q, at * width), -width, plus(G, at * columns + c), -columns, plus(dV, at * columns + c),
                      -columns, plus(T, c * D), D, ones)
        for c in range(0, width, pair):
            for at in range(up(stop - start, 4) - 1, 0, -4):
                plain(plus(V, at * sv), -sv, plus(G, at * columns), -columns, plus(Q, at * width + c), -width, plus(dF, at * width + c), -width,
                      plus(RT, c * M), M, ones)
        for t in range(stop - start - 1, -1, -1):
            through(plus(dF, t * width), plus(F, t * width), Z, dden[t], plus(Q, t * width), one, width, elu)
        written_back(dV, columns, dv, start, stop)
        written_back(dF, width, dk, start, stop)
    from_slabs(T, R)
    written_back(Z, width, dz, 0, 1)
    alive(state)
    alive(tiles)
    alive(few)


@njit(**options)
def read_again(q: Any, k: Any, out: Any, inverse: Any, dout: Any, start: int, stop: int, Q: Any, F: Any, G: Any, O: Any, dden: Any, width: int,
               columns: int, elu: Any) -> None:
    """What the backward sums, of a tile: φ(q), φ(k), G_t = inverse_t do_t and dden_t = -inverse_t (do_t·out_t); zeros behind the ends of each."""
    whole_registers()
    mapped(q, start, stop, Q, width, elu)
    mapped(k, start, stop, F, width, elu)
    padded(out, start, stop, O, TILE, columns)
    padded(dout, start, stop, G, TILE, columns)
    for t in range(TILE):
        there, factor = plus(G, t * columns), inverse[start + t] if start + t < min(stop, q.shape[0]) else q.dtype.type(0)
        dden[t] = -factor * dot(there, plus(O, t * columns), columns)
        for d in range(0, columns, BYTES // q.itemsize):
            store(there, d, mul(factor, load(there, d)))


@njit(**options)
def through(dF: Any, F: Any, z: Any, a: Any, x: Any, b: Any, width: int, elu: Any) -> None:
    """z += a x, and in the place of dF what it leads to, (dF + b z) ⊙ φ', φ' = min(φ, 1) where `elu` is not None."""
    whole_registers()
    for d in range(0, width, lanes(F)):
        y = fma(a, load(x, d), load(z, d))
        store(z, d, y)
        y = fma(b, y, load(dF, d))
        if elu is not None:
            y = mul(at_most(elu, load(F, d)), y)
        store(dF, d, y)
