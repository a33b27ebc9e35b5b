"""One head: the recurrence four positions at a time, the state in the first-level cache, and the transpose of its delta rules.

Without a gate the four come one after another, as in the equation, while an entry of S stands in a register:

    S ← S + k_i u_iᵀ,   o_i = Sᵀ q_i

Decays would multiply each entry four times; with b_i = Π_{s≤i} a_s and e_i = Π_{s>i} a_s over the four, S the state before them, it is once in

    A_ij = Σ_d q_id k_jd Π_{j<s≤i} a_sd  (j ≤ i)
    o_i = Sᵀ (b_i ⊙ q_i) + Σ_{j≤i} A_ij u_j,   S ← Diag(b_3) S + Σ_i (e_i ⊙ k_i) u_iᵀ

which is the chunk of `gated` for C = 4. What is written: u_i = v_i, and with a delta, B_ij being A_ij with k_i for q_i,

    u_i = β_i (v_i - Sᵀ (b_i ⊙ k_i) - Σ_{j<i} B_ij u_j)

These are the flops of the loop over positions, 4·D·M for each (6·D·M with a delta), and for two vectors of columns of S all that is in use stands in
registers. `head`, `channel`, `column`, `delta`: see `tiles`.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .tiles import (TILE, all_four, as_it_is, ask_for, exponentials, faded_before, faded_behind, from_slabs, given, of_gate, options, room, rows,
                    scores, share_of, to_slabs, up, weights, written_back)
from .vector import BYTES, alive, boundary, fma, lanes, load, mul, plus, store, whole_registers, zeros

from numba import njit                                                                                                # noqa: E402, I001


@njit(**options)
def forward(q: Any, k: Any, v: Any, g: Any, h: Any, beta: Any, S: Any, out: Any, written: Any, scale: Any, late: int) -> None:
    """q, k (N, D), v, out and `written`, which gets v - Pᵀ k unless it is None, (N, M); beta (N,) or None; S (D, M), changed in place.
    Decays: g (N,), one for a position, or (N, D), one for each row of S, or h (N, M), one for each column; `late`: 1 if position t fades by what
    stands at t - 1, and the first one not at all."""
    whole_registers()
    (N, D), M, W, kind = q.shape, v.shape[1], BYTES // S.itemsize, S.dtype
    pair, width, columns, one = 2 * W, up(D, W), up(M, 2 * W), kind.type(1)
    head, channel = of_gate(g, one)
    column, delta, noted = given(h, one), given(beta, one), given(written, one)
    unit = 1 if g is None and h is None and beta is None else W                      # only scores and faded rows need whole vectors
    state, tiles = np.empty(D * columns + W, kind), np.empty(6 * TILE * width + W, kind)
    values, few = np.empty(4 * TILE * columns + W, kind), np.ones(TILE // 4 * 20 + 4 * TILE + W, kind)
    T, tile_q, V0, A = boundary(state), boundary(tiles), boundary(values), boundary(few)
    tile_k, bQ, bK, eK, a = (plus(tile_q, TILE * width), plus(tile_q, 2 * TILE * width), plus(tile_q, 3 * TILE * width),
                             plus(tile_q, 4 * TILE * width), plus(tile_q, 5 * TILE * width))
    O0, X0, across = plus(V0, TILE * columns), plus(V0, 2 * TILE * columns), plus(V0, 3 * TILE * columns)
    B, b = plus(A, TILE // 4 * 10), plus(A, TILE // 4 * 20)
    e, step, scales = plus(b, TILE), plus(b, 2 * TILE), plus(b, 3 * TILE)
    for t in range(TILE):
        scales[t] = scale
    to_slabs(S, T)
    per_call = share_of(q, v, columns)
    for start in range(0, N, TILE):
        stop, ahead = min(start + TILE, N), start + TILE
        Q, sq = rows(q, start, stop, unit, tile_q, width)
        K, sk = rows(k, start, stop, unit, tile_k, width)
        V, sv = rows(v, start, stop, pair, V0, columns)
        O, so = room(out, start, stop, pair, O0, columns)
        X, sx = X0, columns
        if written is not None:
            X, sx = room(written, start, stop, pair, X0, columns)
        if g is not None:
            exponentials(g, start - late, stop - late, a, width)
        if h is not None:
            exponentials(h, start - late, stop - late, across, columns)
        if beta is not None:
            for t in range(TILE):
                step[t] = beta[start + t] if start + t < stop else 0
        if g is not None or h is not None or beta is not None:
            for at in range(0, stop - start, 4):
                here, fades = at * width, plus(a, at) if channel is None else plus(a, at * width)
                if g is not None or h is not None:
                    scores(plus(Q, at * sq), sq, plus(K, at * sk), sk, fades, width, plus(A, at // 4 * 10), head, channel)
                if delta is not None:
                    scores(plus(K, at * sk), sk, plus(K, at * sk), sk, fades, width, plus(B, at // 4 * 10), head, channel)
                if head is not None:
                    weights(fades, plus(b, at), plus(e, at))
                if channel is not None:
                    faded_before(plus(Q, at * sq), sq, fades, width, plus(bQ, here))
                    if delta is not None:
                        faded_before(plus(K, at * sk), sk, fades, width, plus(bK, here))
                    faded_behind(plus(K, at * sk), sk, fades, width, plus(eK, here))
                    all_four(fades, width)
        R, sr, fading = K, sk, 0
        if channel is not None:
            Q, sq, R, sr, K, sk, fading = bQ, width, bK, width, eK, width, width
        for c in range(0, columns, pair):
            for at in range(0, stop - start, 4):
                block(plus(Q, at * sq), sq, plus(R, at * sr), sr, plus(K, at * sk), sk, plus(V, at * sv + c), sv, plus(O, at * so + c), so,
                      plus(X, at * sx + c), sx, plus(T, c * D), D, plus(A, at // 4 * 10), plus(B, at // 4 * 10), plus(b, at), plus(e, at),
                      plus(a, at * fading), plus(across, at * columns + c), columns, plus(step, at), plus(scales, at), head, channel, column, delta,
                      noted)
                then = min(ahead + per_call, N)
                ask_for(q, ahead, then)
                ask_for(k, ahead, then)
                ask_for(v, ahead, then)
                ask_for(out, ahead - TILE, then - TILE)
                ahead = then
        if not as_it_is(out, start, stop, pair):
            written_back(O, columns, out, start, stop)
        if written is not None:
            if not as_it_is(written, start, stop, pair):
                written_back(X, columns, written, start, stop)
    from_slabs(T, S)
    alive(state)
    alive(tiles)
    alive(values)
    alive(few)


@njit(**options)
def block(Q: Any, sq: int, R: Any, sr: int, K: Any, sk: int, V: Any, sv: int, O: Any, so: int, X: Any, sx: int, S: Any, D: int, A: Any, B: Any,
          b: Any, e: Any, whole: Any, across: Any, sa: int, step: Any, scales: Any, head: Any, channel: Any, column: Any, delta: Any,
          noted: Any) -> None:
    """Four positions and one slab of S. Q, R, K: rows of b ⊙ q, b ⊙ k and e ⊙ k, or the bare ones where b and e are numbers, or stand across."""
    whole_registers()
    W = lanes(S)
    u0, u1, u2, u3 = load(V, 0), load(V, sv), load(V, 2 * sv), load(V, 3 * sv)
    w0, w1, w2, w3 = load(V, W), load(V, sv + W), load(V, 2 * sv + W), load(V, 3 * sv + W)
    if delta is not None:                                                            # less what the state knows, and what the four have written
        o0, o1, o2, o3, p0, p1, p2, p3 = read(R, sr, S, D)
        o0, o1, o2, o3, u0, u1, u2, u3 = substituted(o0, o1, o2, o3, u0, u1, u2, u3, b, B, step)
        p0, p1, p2, p3, w0, w1, w2, w3 = substituted(p0, p1, p2, p3, w0, w1, w2, w3, b, B, step)
        if noted is not None:
            put(X, sx, o0, o1, o2, o3)
            put(plus(X, W), sx, p0, p1, p2, p3)
    if head is None and channel is None and column is None:
        one_after_another(Q, sq, K, sk, u0, u1, u2, u3, w0, w1, w2, w3, O, so, S, D, scales)
    else:
        f0, f1, f2, f3, t0, t1, t2, t3 = u0, u1, u2, u3, w0, w1, w2, w3                # e ⊙ u
        if head is not None:
            e0, e1, e2 = e[0], e[1], e[2]
            f0, f1, f2, t0, t1, t2 = mul(e0, u0), mul(e1, u1), mul(e2, u2), mul(e0, w0), mul(e1, w1), mul(e2, w2)
        if column is not None:
            a1, a2, a3 = plus(across, sa), plus(across, 2 * sa), plus(across, 3 * sa)
            x, y = load(a3, 0), load(a3, W)
            f2, t2 = mul(x, u2), mul(y, w2)
            x, y = mul(load(a2, 0), x), mul(load(a2, W), y)
            f1, t1 = mul(x, u1), mul(y, w1)
            x, y = mul(load(a1, 0), x), mul(load(a1, W), y)
            f0, t0 = mul(x, u0), mul(y, w0)
            all0, all1 = mul(load(across, 0), x), mul(load(across, W), y)
        q1, q2, q3 = plus(Q, sq), plus(Q, 2 * sq), plus(Q, 3 * sq)
        k1, k2, k3 = plus(K, sk), plus(K, 2 * sk), plus(K, 3 * sk)
        o0 = o1 = o2 = o3 = p0 = p1 = p2 = p3 = zeros(S)
        for d in range(D):
            x, y = load(S, 2 * W * d), load(S, 2 * W * d + W)
            o0, o1, o2, o3 = fma(Q[d], x, o0), fma(q1[d], x, o1), fma(q2[d], x, o2), fma(q3[d], x, o3)
            p0, p1, p2, p3 = fma(Q[d], y, p0), fma(q1[d], y, p1), fma(q2[d], y, p2), fma(q3[d], y, p3)
            if head is not None:
                x, y = mul(b[3], x), mul(b[3], y)
            if channel is not None:
                x, y = mul(whole[d], x), mul(whole[d], y)
            if column is not None:
                x, y = mul(all0, x), mul(all1, y)
            x, y = fma(K[d], f0, x), fma(K[d], t0, y)
            x, y = fma(k1[d], f1, x), fma(k1[d], t1, y)
            x, y = fma(k2[d], f2, x), fma(k2[d], t2, y)
            x, y = fma(k3[d], f3, x), fma(k3[d], t3, y)
            store(S, 2 * W * d, x)
            store(S, 2 * W * d + W, y)
        if column is None:
            o0, o1, o2, o3 = inside(o0, o1, o2, o3, u0, u1, u2, u3, b, A)
            p0, p1, p2, p3 = inside(p0, p1, p2, p3, w0, w1, w2, w3, b, A)
        else:
            o0, o1, o2, o3 = inside_columns(o0, o1, o2, o3, u0, u1, u2, u3, across, sa, A)
            p0, p1, p2, p3 = inside_columns(p0, p1, p2, p3, w0, w1, w2, w3, plus(across, W), sa, A)
        put(O, so, mul(scales[0], o0), mul(scales[1], o1), mul(scales[2], o2), mul(scales[3], o3))
        put(plus(O, W), so, mul(scales[0], p0), mul(scales[1], p1), mul(scales[2], p2), mul(scales[3], p3))


@njit(**options)
def plain(Q: Any, sq: int, K: Any, sk: int, V: Any, sv: int, O: Any, so: int, S: Any, D: int, scales: Any) -> None:
    """`block` with neither gate nor delta."""
    whole_registers()
    W = lanes(S)
    one_after_another(Q, sq, K, sk, load(V, 0), load(V, sv), load(V, 2 * sv), load(V, 3 * sv), load(V, W), load(V, sv + W), load(V, 2 * sv + W),
                      load(V, 3 * sv + W), O, so, S, D, scales)


@njit(forceinline=True, **options)
def one_after_another(Q: Any, sq: int, K: Any, sk: int, u0: Any, u1: Any, u2: Any, u3: Any, w0: Any, w1: Any, w2: Any, w3: Any, O: Any, so: int,
                      S: Any, D: int, scales: Any) -> None:
    """S ← S + k_i u_iᵀ, o_i = scale_i Sᵀ q_i."""
    whole_registers()
    W = lanes(S)
    q1, q2, q3 = plus(Q, sq), plus(Q, 2 * sq), plus(Q, 3 * sq)
    k1, k2, k3 = plus(K, sk), plus(K, 2 * sk), plus(K, 3 * sk)
    o0 = o1 = o2 = o3 = p0 = p1 = p2 = p3 = zeros(S)
    for d in range(D):
        x, y = load(S, 2 * W * d), load(S, 2 * W * d + W)
        x, y = fma(K[d], u0, x), fma(K[d], w0, y)
        o0, p0 = fma(Q[d], x, o0), fma(Q[d], y, p0)
        x, y = fma(k1[d], u1, x), fma(k1[d], w1, y)
        o1, p1 = fma(q1[d], x, o1), fma(q1[d], y, p1)
        x, y = fma(k2[d], u2, x), fma(k2[d], w2, y)
        o2, p2 = fma(q2[d], x, o2), fma(q2[d], y, p2)
        x, y = fma(k3[d], u3, x), fma(k3[d], w3, y)
        o3, p3 = fma(q3[d], x, o3), fma(q3[d], y, p3)
        store(S, 2 * W * d, x)
        store(S, 2 * W * d + W, y)
    put(O, so, mul(scales[0], o0), mul(scales[1], o1), mul(scales[2], o2), mul(scales[3], o3))
    put(plus(O, W), so, mul(scales[0], p0), mul(scales[1], p1), mul(scales[2], p2), mul(scales[3], p3))


@njit(forceinline=True, **options)
def read(R: Any, sr: int, S: Any, D: int) -> Any:
    """What four rows read in a slab of S."""
    whole_registers()
    W = lanes(S)
    r1, r2, r3 = plus(R, sr), plus(R, 2 * sr), plus(R, 3 * sr)
    o0 = o1 = o2 = o3 = p0 = p1 = p2 = p3 = zeros(S)
    for d in range(D):
        x, y = load(S, 2 * W * d), load(S, 2 * W * d + W)
        o0, o1, o2, o3 = fma(R[d], x, o0), fma(r1[d], x, o1), fma(r2[d], x, o2), fma(r3[d], x, o3)
        p0, p1, p2, p3 = fma(R[d], y, p0), fma(r1[d], y, p1), fma(r2[d], y, p2), fma(r3[d], y, p3)
    return o0, o1, o2, o3, p0, p1, p2, p3


@njit(forceinline=True, **options)
def substituted(r0: Any, r1: Any, r2: Any, r3: Any, v0: Any, v1: Any, v2: Any, v3: Any, b: Any, B: Any, step: Any) -> Any:
    """x_i = v_i - b_i r_i - Σ_{j<i} B_ij u_j, then u_i = β_i x_i."""
    x0 = fma(-b[0], r0, v0)
    u0 = mul(step[0], x0)
    x1 = fma(-B[1], u0, fma(-b[1], r1, v1))
    u1 = mul(step[1], x1)
    x2 = fma(-B[3], u0, fma(-B[4], u1, fma(-b[2], r2, v2)))
    u2 = mul(step[2], x2)
    x3 = fma(-B[6], u0, fma(-B[7], u1, fma(-B[8], u2, fma(-b[3], r3, v3))))
    return x0, x1, x2, x3, u0, u1, u2, mul(step[3], x3)


@njit(forceinline=True, **options)
def inside(o0: Any, o1: Any, o2: Any, o3: Any, u0: Any, u1: Any, u2: Any, u3: Any, b: Any, A: Any) -> Any:
    """b_i o_i + Σ_{j≤i} A_ij u_j."""
    return (fma(A[0], u0, mul(b[0], o0)), fma(A[1], u0, fma(A[2], u1, mul(b[1], o1))),
            fma(A[3], u0, fma(A[4], u1, fma(A[5], u2, mul(b[2], o2)))),
            fma(A[6], u0, fma(A[7], u1, fma(A[8], u2, fma(A[9], u3, mul(b[3], o3))))))


@njit(forceinline=True, **options)
def inside_columns(o0: Any, o1: Any, o2: Any, o3: Any, u0: Any, u1: Any, u2: Any, u3: Any, a: Any, sa: int, A: Any) -> Any:
    """b_i ⊙ o_i + Σ_j A_ij u_j Π_{j<s≤i} a_s, where decays stand across."""
    b = load(a, 0)
    x0 = fma(A[0], u0, mul(b, o0))
    f = load(a, sa)
    b, u0 = mul(b, f), mul(f, u0)
    x1 = fma(A[1], u0, fma(A[2], u1, mul(b, o1)))
    f = load(a, 2 * sa)
    b, u0, u1 = mul(b, f), mul(f, u0), mul(f, u1)
    x2 = fma(A[3], u0, fma(A[4], u1, fma(A[5], u2, mul(b, o2))))
    f = load(a, 3 * sa)
    b, u0, u1, u2 = mul(b, f), mul(f, u0), mul(f, u1), mul(f, u2)
    return x0, x1, x2, fma(A[6], u0, fma(A[7], u1, fma(A[8], u2, fma(A[9], u3, mul(b, o3)))))


@njit(forceinline=True, **options)
def put(X: Any, step: int, x0: Any, x1: Any, x2: Any, x3: Any) -> None:
    """A vector to each of four rows."""
    store(X, 0, x0)
    store(X, step, x1)
    store(X, 2 * step, x2)
    store(X, 3 * step, x3)


# --- the transpose of the delta rules --------------------------------------------------------------------------------------------------------

@njit(**options)
def backward_delta(q: Any, k: Any, dout: Any, g: Any, beta: Any, R: Any, du: Any) -> None:
    """One head from its end, arrays as they are: R (D, M) from the cotangent of the state behind the last position to that of the decayed state
    before the first write, in place; du (N, M) of what is written before β.

        P = Diag(a_{t+1}) R,   du_t = Pᵀ k_t + (q_t·k_t) do_t,   R ← P + q_t do_tᵀ - β_t k_t du_tᵀ

    for four positions as in `forward`: with C_ij = k_i·q_j and B_ij = k_i·k_j, both faded on the way from j to i,

        du_i = Pᵀ (b_i ⊙ k_i) + Σ_{j≤i} C_ij do_j - Σ_{j<i} B_ij β_j du_j
    """
    whole_registers()
    (N, D), M, W, kind = q.shape, dout.shape[1], BYTES // R.itemsize, R.dtype
    pair, width, columns, one = 2 * W, up(D, W), up(M, 2 * W), kind.type(1)
    head, channel = of_gate(g, one)
    state, tiles = np.empty(D * columns + W, kind), np.empty(6 * TILE * width + W, kind)
    values, few = np.empty(2 * TILE * columns + W, kind), np.ones(TILE // 4 * 20 + 3 * TILE + W, kind)
    T, tile_q, V0, C = boundary(state), boundary(tiles), boundary(values), boundary(few)
    tile_k, bK, eQ, eK, a = (plus(tile_q, TILE * width), plus(tile_q, 2 * TILE * width), plus(tile_q, 3 * TILE * width),
                             plus(tile_q, 4 * TILE * width), plus(tile_q, 5 * TILE * width))
    O0, B, b = plus(V0, TILE * columns), plus(C, TILE // 4 * 10), plus(C, TILE // 4 * 20)
    e, step = plus(b, TILE), plus(b, 2 * TILE)
    to_slabs(R, T)
    per_call = share_of(q, dout, columns)
    for start in range(0, N, TILE):
        stop, ahead = min(start + TILE, N), start + TILE
        Q, sq = rows(q, start, stop, W, tile_q, width)
        K, sk = rows(k, start, stop, W, tile_k, width)
        V, sv = rows(dout, start, stop, pair, V0, columns)
        O, so = room(du, start, stop, pair, O0, columns)
        if g is not None:
            exponentials(g, start - 1, stop - 1, a, width)
        for t in range(TILE):
            step[t] = beta[start + t] if start + t < stop else 0
        for at in range(0, stop - start, 4):
            here, fades = at * width, plus(a, at) if channel is None else plus(a, at * width)
            scores(plus(K, at * sk), sk, plus(Q, at * sq), sq, fades, width, plus(C, at // 4 * 10), head, channel)
            scores(plus(K, at * sk), sk, plus(K, at * sk), sk, fades, width, plus(B, at // 4 * 10), head, channel)
            if head is not None:
                weights(fades, plus(b, at), plus(e, at))
            if channel is not None:
                faded_before(plus(K, at * sk), sk, fades, width, plus(bK, here))
                faded_behind(plus(Q, at * sq), sq, fades, width, plus(eQ, here))
                faded_behind(plus(K, at * sk), sk, fades, width, plus(eK, here))
                all_four(fades, width)
        G, sg, fading = K, sk, 0
        if channel is not None:
            Q, sq, G, sg, K, sk, fading = eQ, width, bK, width, eK, width, width
        for c in range(0, columns, pair):
            for at in range(0, stop - start, 4):
                block_delta(plus(G, at * sg), sg, plus(Q, at * sq), sq, plus(K, at * sk), sk, plus(V, at * sv + c), sv, plus(O, at * so + c), so,
                            plus(T, c * D), D, plus(C, at // 4 * 10), plus(B, at // 4 * 10), plus(b, at), plus(e, at), plus(a, at * fading),
                            plus(step, at), head, channel)
                then = min(ahead + per_call, N)
                ask_for(q, ahead, then)
                ask_for(k, ahead, then)
                ask_for(dout, ahead, then)
                ask_for(du, ahead - TILE, then - TILE)
                ahead = then
        if not as_it_is(du, start, stop, pair):
            written_back(O, columns, du, start, stop)
    from_slabs(T, R)
    alive(state)
    alive(tiles)
    alive(values)
    alive(few)


@njit(**options)
def block_delta(R: Any, sr: int, Q: Any, sq: int, K: Any, sk: int, V: Any, sv: int, O: Any, so: int, S: Any, D: int, C: Any, B: Any, b: Any, e: Any,
                whole: Any, step: Any, head: Any, channel: Any) -> None:
    """Four positions and one slab: what is read, du of it, then what do and du write."""
    whole_registers()
    W = lanes(S)
    o0, o1, o2, o3, p0, p1, p2, p3 = read(R, sr, S, D)
    u0, u1, u2, u3, w0, w1, w2, w3 = erased(o0, o1, o2, o3, V, sv, C, B, b, step, O, so)
    f0, f1, f2, f3, t0, t1, t2, t3 = erased(p0, p1, p2, p3, plus(V, W), sv, C, B, b, step, plus(O, W), so)
    if head is not None:
        e0, e1, e2 = e[0], e[1], e[2]
        u0, u1, u2, w0, w1, w2 = mul(e0, u0), mul(e1, u1), mul(e2, u2), mul(e0, w0), mul(e1, w1), mul(e2, w2)
        f0, f1, f2, t0, t1, t2 = mul(e0, f0), mul(e1, f1), mul(e2, f2), mul(e0, t0), mul(e1, t1), mul(e2, t2)
    q1, q2, q3 = plus(Q, sq), plus(Q, 2 * sq), plus(Q, 3 * sq)
    k1, k2, k3 = plus(K, sk), plus(K, 2 * sk), plus(K, 3 * sk)
    for d in range(D):
        x, y = load(S, 2 * W * d), load(S, 2 * W * d + W)
        if head is not None:
            x, y = mul(b[3], x), mul(b[3], y)
        if channel is not None:
            x, y = mul(whole[d], x), mul(whole[d], y)
        x, y = fma(Q[d], u0, x), fma(Q[d], f0, y)
        x, y = fma(K[d], w0, x), fma(K[d], t0, y)
        x, y = fma(q1[d], u1, x), fma(q1[d], f1, y)
        x, y = fma(k1[d], w1, x), fma(k1[d], t1, y)
        x, y = fma(q2[d], u2, x), fma(q2[d], f2, y)
        x, y = fma(k2[d], w2, x), fma(k2[d], t2, y)
        x, y = fma(q3[d], u3, x), fma(q3[d], f3, y)
        x, y = fma(k3[d], w3, x), fma(k3[d], t3, y)
        store(S, 2 * W * d, x)
        store(S, 2 * W * d + W, y)


@njit(forceinline=True, **options)
def erased(r0: Any, r1: Any, r2: Any, r3: Any, V: Any, sv: int, C: Any, B: Any, b: Any, step: Any, O: Any, so: int) -> Any:
    """The cotangents do_i and what is erased, w_i = -β_i du_i, of a vector of columns; du_i are put to O."""
    f0, f1, f2, f3 = load(V, 0), load(V, sv), load(V, 2 * sv), load(V, 3 * sv)
    x0 = fma(C[0], f0, mul(b[0], r0))
    w0 = mul(-step[0], x0)
    x1 = fma(B[1], w0, fma(C[1], f0, fma(C[2], f1, mul(b[1], r1))))
    w1 = mul(-step[1], x1)
    x2 = fma(B[3], w0, fma(B[4], w1, fma(C[3], f0, fma(C[4], f1, fma(C[5], f2, mul(b[2], r2))))))
    w2 = mul(-step[2], x2)
    x3 = fma(C[6], f0, fma(C[7], f1, fma(C[8], f2, fma(C[9], f3, mul(b[3], r3)))))
    x3 = fma(B[6], w0, fma(B[7], w1, fma(B[8], w2, x3)))
    put(O, so, x0, x1, x2, x3)
    return f0, f1, f2, f3, w0, w1, w2, mul(-step[3], x3)
