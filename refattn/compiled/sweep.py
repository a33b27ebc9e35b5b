"""The recurrence as loops that Numba compiles: four positions at a time, the state in the first-level cache.

With b_i = Π_{s≤i} a_s and e_i = Π_{s>i} a_s over the four, S the state before them, a = 1 for rules without a gate and u_i = v_i for those without
a delta,

    A_ij = Σ_d q_id k_jd Π_{j<s≤i} a_sd  (j ≤ i),      B_ij the same with k_i for q_i  (j < i)
    u_i = β_i (v_i - Sᵀ (b_i ⊙ k_i) - Σ_{j<i} B_ij u_j)
    o_i = Sᵀ (b_i ⊙ q_i) + Σ_{j≤i} A_ij u_j
    S  ← Diag(b_3) S + Σ_i (e_i ⊙ k_i) u_iᵀ

which is the chunk of `gated` and `delta` for C = 4: the flops of the loop over positions, 4·D·M for each (6·D·M with a delta), and for two vectors
of columns of S all that is in use stands in registers. A tile of positions is copied to where rows are whole vectors, zeros behind the last; columns
are worked off one pair of vectors after the other.

Inner functions take pointers, since Numba counts references to arrays. A number or None (`head`, `channel`, `column`, `delta`) chooses a variant
when it is compiled: one decay for each position, for each row of S, for each column, and whether there is a β.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .vector import BYTES, elu1, exp, fetch, fma, lanes, load, mul, plus, row, store, total, whole_registers, zeros

from numba import njit                                                                                                # noqa: E402, I001

TILE = 32
options: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}


# --- a tile of positions -------------------------------------------------------------------------------------------------------------------

@njit(**options)
def padded(x: Any, start: int, stop: int, to: Any, height: int, width: int) -> None:
    """Rows start … stop - 1 of x in room for `height` rows; zeros behind the last, before row 0 and beside them."""
    whole_registers()
    D, W, together = x.shape[1], BYTES // x.itemsize, x.strides[1] == x.itemsize
    for t in range(height):
        there, first = plus(to, t * width), 0
        if start + t < min(stop, x.shape[0]) and start + t >= 0:
            first = D
            d = 0
            if together:
                given = row(x, start + t)
                while d + W <= D:
                    store(there, d, load(given, d))
                    d += W
            for i in range(d, D):
                there[i] = x[start + t, i]
        for i in range(first, width):
            there[i] = 0


@njit(**options)
def written_back(given: Any, width: int, x: Any, start: int, stop: int) -> None:
    """The reverse of `padded`."""
    whole_registers()
    D, W, together = x.shape[1], BYTES // x.itemsize, x.strides[1] == x.itemsize
    for t in range(stop - start):
        here, d = plus(given, t * width), 0
        if together:
            to = row(x, start + t)
            while d + W <= D:
                store(to, d, load(here, d))
                d += W
        for i in range(d, D):
            x[start + t, i] = here[i]


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
def scores(Q: Any, K: Any, a: Any, width: int, scale: Any, A: Any, head: Any, channel: Any) -> None:
    """A_ij = scale · q_i·k_j of a block, row by row; k_j fades on its way from j to i."""
    whole_registers()
    q1, q2, q3 = plus(Q, width), plus(Q, 2 * width), plus(Q, 3 * width)
    k1, k2, k3 = plus(K, width), plus(K, 2 * width), plus(K, 3 * width)
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
    f1 = f2 = f3 = scale * 0 + 1
    if head is not None:
        f1, f2, f3 = a[1], a[2], a[3]
    A[0], A[1], A[2] = scale * total(s0), scale * f1 * total(s1), scale * total(s2)
    A[3], A[4], A[5] = scale * (f1 * f2) * total(s3), scale * f2 * total(s4), scale * total(s5)
    A[6], A[7], A[8], A[9] = scale * (f1 * f2 * f3) * total(s6), scale * (f2 * f3) * total(s7), scale * f3 * total(s8), scale * total(s9)


@njit(**options)
def weights(a: Any, b: Any, e: Any) -> None:
    """b_i and e_i of a block with one decay for all channels."""
    b[0], e[3] = a[0], 1
    for i in range(3):
        b[i + 1] = b[i] * a[i + 1]
        e[2 - i] = e[3 - i] * a[3 - i]


@njit(**options)
def weighed(x: Any, a: Any, width: int, before: Any, behind: Any, whole: Any) -> None:
    """b ⊙ x and e ⊙ x, and b_3, of the four rows of a block with a decay for each channel."""
    whole_registers()
    for d in range(0, width, lanes(x)):
        b = load(a, d)
        store(before, d, mul(b, load(x, d)))
        for i in range(1, 4):
            b = mul(load(plus(a, i * width), d), b)
            store(before, i * width + d, mul(b, load(x, i * width + d)))
        store(whole, d, b)
        e = load(plus(a, 3 * width), d)
        store(behind, 3 * width + d, load(x, 3 * width + d))
        store(behind, 2 * width + d, mul(e, load(x, 2 * width + d)))
        for i in range(1, -1, -1):
            e = mul(load(plus(a, (i + 1) * width), d), e)
            store(behind, i * width + d, mul(e, load(x, i * width + d)))


@njit(**options)
def ask_for(x: Any, step: int, width: int, start: int, stop: int) -> None:
    """Rows that are needed next, `step` numbers apart."""
    for t in range(start, stop):
        for d in range(0, width, lanes(x)):
            fetch(x, t * step + d)


@njit(**options)
def share_of(columns: int, W: int) -> int:
    """Rows to ask for beside each block, so that a tile's blocks ask for a tile."""
    blocks = TILE // 4 * (columns // (2 * W))
    return (TILE + blocks - 1) // blocks


@njit(**options)
def of_gate(g: Any, one: Any) -> Any:
    """(head, channel) for decays g (N,), (N, D) or None."""
    if g is None:
        return None, None
    if g.ndim == 1:
        return one, None
    return None, one


# --- forward -----------------------------------------------------------------------------------------------------------------------------

@njit(**options)
def forward(q: Any, k: Any, v: Any, g: Any, h: Any, beta: Any, S: Any, out: Any, written: Any, scale: Any, late: int) -> None:
    """One head: q, k (N, D), v, out and `written`, which gets v - Pᵀ k unless it is None, (N, M); beta (N,) or None; S (D, M), changed in place.
    Decays: g (N,), one for a position, or (N, D), one for each row of S, or h (N, M), one for each column; `late`: 1 if position t fades by what
    stands at t - 1, and the first one not at all."""
    whole_registers()
    (N, D), M, W, kind = q.shape, v.shape[1], BYTES // S.itemsize, S.dtype
    width, columns = (D + W - 1) // W * W, (M + 2 * W - 1) // (2 * W) * (2 * W)
    one = kind.type(1)
    head, channel = of_gate(g, one)
    column, delta = None if h is None else one, None if beta is None else one
    state, tiles, few = np.empty((1, D * columns), kind), np.empty((6, TILE * width), kind), np.ones((5, TILE // 4 * 10 + TILE), kind)
    values = np.empty((3, TILE * columns), kind)
    T, Q, K, bQ, bK, eK, a = row(state, 0), row(tiles, 0), row(tiles, 1), row(tiles, 2), row(tiles, 3), row(tiles, 4), row(tiles, 5)
    A, B, b, e, step, V, O, across = row(few, 0), row(few, 1), row(few, 2), row(few, 3), row(few, 4), row(values, 0), row(values, 1), row(values, 2)
    padded(S, 0, D, T, D, columns)
    at_q, at_k, at_v, at_out, size = row(q, 0), row(k, 0), row(v, 0), row(out, 0), S.itemsize
    step_q, step_k, step_v, step_out = q.strides[0] // size, k.strides[0] // size, v.strides[0] // size, out.strides[0] // size
    per_call = share_of(columns, W)
    for start in range(0, N, TILE):
        stop, ahead = min(start + TILE, N), start + TILE
        padded(q, start, stop, Q, TILE, width)
        padded(k, start, stop, K, TILE, width)
        padded(v, start, stop, V, TILE, columns)
        if g is not None:
            exponentials(g, start - late, stop - late, a, width)
        if h is not None:
            exponentials(h, start - late, stop - late, across, columns)
        if beta is not None:
            for t in range(TILE):
                step[t] = beta[start + t] if start + t < stop else 0
        for at in range(0, stop - start, 4):
            here = at * width
            fades = plus(a, at) if channel is None else plus(a, here)
            scores(plus(Q, here), plus(K, here), fades, width, scale, plus(A, at // 4 * 10), head, channel)
            if delta is not None:
                scores(plus(K, here), plus(K, here), fades, width, one, plus(B, at // 4 * 10), head, channel)
            if head is not None:
                weights(fades, plus(b, at), plus(e, at))
            if channel is not None:
                weighed(plus(K, here), fades, width, plus(bK, here), plus(eK, here), plus(bQ, here))
                weighed(plus(Q, here), fades, width, plus(bQ, here), plus(Q, here), fades)                   # b_3 where a_0 stood
        for c in range(0, columns, 2 * W):
            for at in range(0, stop - start, 4):
                here = at * width
                if channel is not None:
                    block(plus(bQ, here), plus(bK, here), plus(eK, here), plus(V, at * columns), plus(O, at * columns), T, D, width, columns,
                          plus(A, at // 4 * 10), plus(B, at // 4 * 10), plus(b, at), plus(e, at), plus(a, here), across, plus(step, at), c, scale,
                          head, channel, column, delta)
                else:
                    block(plus(Q, here), plus(K, here), plus(K, here), plus(V, at * columns), plus(O, at * columns), T, D, width, columns,
                          plus(A, at // 4 * 10), plus(B, at // 4 * 10), plus(b, at), plus(e, at), a, plus(across, at * columns), plus(step, at), c,
                          scale, head, channel, column, delta)
                then = min(ahead + per_call, N)
                ask_for(at_q, step_q, D, ahead, then)
                ask_for(at_k, step_k, D, ahead, then)
                ask_for(at_v, step_v, M, ahead, then)
                ask_for(at_out, step_out, M, ahead - TILE, then - TILE)
                ahead = then
        written_back(O, columns, out, start, stop)
        if written is not None:
            written_back(V, columns, written, start, stop)
    written_back(T, columns, S, 0, D)


@njit(**options)
def mapped(x: Any, D: int, height: int, width: int) -> None:
    """φ = elu + 1 of the first `height` rows, D wide, in place; what is beside them stays zero."""
    whole_registers()
    for t in range(height):
        here = plus(x, t * width)
        for d in range(0, width, lanes(x)):
            y = load(here, d)
            store(here, d, elu1(y, exp(y)))
        for d in range(D, width):
            here[d] = 0


@njit(**options)
def attention(q: Any, k: Any, v: Any, S: Any, z: Any, out: Any, inverse: Any, eps: Any, keys: int, elu: Any) -> None:
    """Causal linear attention of one head, eq. (8) to (12): with φ(q), φ(k) for q, k where `elu` is not None, k from position `keys` on being 0,

        z_t = z_{t-1} + k_t,   inverse_t = 1 / (q_t·z_t + ε)  (0 where that is 1 / 0),   out_t = inverse_t S_tᵀ q_t

    q, k (N, D), v, out (N, M), inverse (N,); S (D, M) and z (1, D) changed in place."""
    whole_registers()
    (N, D), M, W, kind = q.shape, v.shape[1], BYTES // S.itemsize, S.dtype
    width, columns, one = (D + W - 1) // W * W, (M + 2 * W - 1) // (2 * W) * (2 * W), kind.type(1)
    state, tiles, few = np.empty((1, D * columns), kind), np.zeros((3, TILE * width), kind), np.ones((4, TILE // 4 * 10 + TILE), kind)
    values = np.empty((2, TILE * columns), kind)
    T, Q, K, Z = row(state, 0), row(tiles, 0), row(tiles, 1), row(tiles, 2)
    A, b, den, V, O = row(few, 0), row(few, 1), row(few, 2), row(values, 0), row(values, 1)
    padded(S, 0, D, T, D, columns)
    padded(z, 0, 1, Z, 1, width)
    at_q, at_k, at_v, at_out, size = row(q, 0), row(k, 0), row(v, 0), row(out, 0), S.itemsize
    step_q, step_k, step_v, step_out = q.strides[0] // size, k.strides[0] // size, v.strides[0] // size, out.strides[0] // size
    per_call = share_of(columns, W)
    for start in range(0, N, TILE):
        stop, ahead = min(start + TILE, N), start + TILE
        padded(q, start, stop, Q, TILE, width)
        padded(k, start, min(stop, keys), K, TILE, width)
        padded(v, start, min(stop, keys), V, TILE, columns)
        if elu is not None:
            mapped(Q, D, stop - start, width)
            mapped(K, D, max(min(stop, keys) - start, 0), width)
        for t in range(stop - start):
            s = zeros(Q)
            for d in range(0, width, W):
                x = fma(one, load(K, t * width + d), load(Z, d))
                store(Z, d, x)
                s = fma(load(Q, t * width + d), x, s)
            x_ = total(s) + eps
            den[t] = 1 / x_ if x_ != 0 else 0
            inverse[start + t] = den[t]
        for at in range(0, stop - start, 4):
            scores(plus(Q, at * width), plus(K, at * width), Q, width, one, plus(A, at // 4 * 10), None, None)
        for c in range(0, columns, 2 * W):
            for at in range(0, stop - start, 4):
                here = at * width
                block(plus(Q, here), plus(K, here), plus(K, here), plus(V, at * columns), plus(O, at * columns), T, D, width, columns,
                      plus(A, at // 4 * 10), A, b, b, Q, V, b, c, one, None, None, None, None)
                then = min(ahead + per_call, N)
                ask_for(at_q, step_q, D, ahead, then)
                ask_for(at_k, step_k, D, ahead, then)
                ask_for(at_v, step_v, M, ahead, then)
                ask_for(at_out, step_out, M, ahead - TILE, then - TILE)
                ahead = then
        for t in range(stop - start):
            for d in range(0, columns, W):
                store(O, t * columns + d, mul(den[t], load(O, t * columns + d)))
        written_back(O, columns, out, start, stop)
    written_back(T, columns, S, 0, D)
    written_back(Z, width, z, 0, 1)


@njit(**options)
def read_again(q: Any, k: Any, dout: Any, out: Any, inverse: Any, Q: Any, K: Any, G: Any, dden: Any, elu: Any) -> None:
    """What the backward of `attention` sums: φ(q), φ(k), G_t = inverse_t do_t and dden_t = -inverse_t (do_t·out_t)."""
    whole_registers()
    D, W, one = q.shape[1], BYTES // q.itemsize, q.dtype.type(1)
    for x, to in ((q, Q), (k, K)):
        for t in range(x.shape[0]):
            there, d = row(to, t), 0
            for e in range(D):
                there[e] = x[t, e]
            if elu is not None:
                while d + W <= D:
                    y = load(there, d)
                    store(there, d, elu1(y, exp(y)))
                    d += W
                for e in range(d, D):
                    there[e] = there[e] + one if there[e] > 0 else np.exp(there[e])
    for t in range(q.shape[0]):
        s = q.dtype.type(0)
        for m in range(dout.shape[1]):
            s += dout[t, m] * out[t, m]
            G[t, m] = inverse[t] * dout[t, m]
        dden[t] = -inverse[t] * s


@njit(**options)
def normaliser_gradient(q: Any, k: Any, dden: Any, z: Any, dz: Any, dq: Any, dk: Any, elu: Any) -> None:
    """dq_t += z_t dden_t with z_t = z_0 + Σ_{j≤t} k_j, and dk_t += dz_N + Σ_{s≥t} q_s dden_s, which are those of φ(q) and φ(k): with `elu` times
    φ' = min(φ, 1). z (D,) ends as z_N, dz as dz_0."""
    one = q.dtype.type(1)
    for t in range(q.shape[0]):
        for d in range(q.shape[1]):
            z[d] += k[t, d]
            dq[t, d] += z[d] * dden[t]
            if elu is not None:
                dq[t, d] *= min(q[t, d], one)
    for t in range(q.shape[0] - 1, -1, -1):
        for d in range(q.shape[1]):
            dz[d] += q[t, d] * dden[t]
            dk[t, d] += dz[d]
            if elu is not None:
                dk[t, d] *= min(k[t, d], one)


@njit(**options)
def block(Q: Any, R: Any, K: Any, V: Any, O: Any, S: Any, D: int, width: int, M: int, A: Any, B: Any, b: Any, e: Any, whole: Any, across: Any,
          step: Any, c: int, scale: Any, head: Any, channel: Any, column: Any, delta: Any) -> None:
    """Four positions and two vectors of columns. Q, R, K: b ⊙ q, b ⊙ k and e ⊙ k, or the bare ones where b and e are numbers, or stand across."""
    whole_registers()
    W, s = lanes(S), S
    q0, q1, q2, q3 = Q, plus(Q, width), plus(Q, 2 * width), plus(Q, 3 * width)
    k0, k1, k2, k3 = K, plus(K, width), plus(K, 2 * width), plus(K, 3 * width)
    u0, u1, u2, u3 = load(V, c), load(V, M + c), load(V, 2 * M + c), load(V, 3 * M + c)
    w0, w1, w2, w3 = load(V, c + W), load(V, M + c + W), load(V, 2 * M + c + W), load(V, 3 * M + c + W)
    if delta is not None:                                                            # less what the state knows, and what the four have written
        r0, r1, r2, r3 = R, plus(R, width), plus(R, 2 * width), plus(R, 3 * width)
        o0 = o1 = o2 = o3 = p0 = p1 = p2 = p3 = zeros(s)
        for d in range(D):
            x, y = load(s, d * M + c), load(s, d * M + c + W)
            o0, o1, o2, o3, p0, p1, p2, p3 = read(r0[d], r1[d], r2[d], r3[d], x, y, o0, o1, o2, o3, p0, p1, p2, p3)
        o0, o1, o2, o3, u0, u1, u2, u3 = substituted(o0, o1, o2, o3, u0, u1, u2, u3, b, B, step)
        p0, p1, p2, p3, w0, w1, w2, w3 = substituted(p0, p1, p2, p3, w0, w1, w2, w3, b, B, step)
        put(V, M, c, o0, o1, o2, o3)
        put(V, M, c + W, p0, p1, p2, p3)
    f0, f1, f2, f3, t0, t1, t2, t3 = u0, u1, u2, u3, w0, w1, w2, w3                    # e ⊙ u
    if head is not None:
        e0, e1, e2 = e[0], e[1], e[2]
        f0, f1, f2, t0, t1, t2 = mul(e0, u0), mul(e1, u1), mul(e2, u2), mul(e0, w0), mul(e1, w1), mul(e2, w2)
    if column is not None:
        a0, a1, a2, a3 = across, plus(across, M), plus(across, 2 * M), plus(across, 3 * M)
        x, y = mul(load(a2, c), load(a3, c)), mul(load(a2, c + W), load(a3, c + W))
        f2, t2, f1, t1 = mul(load(a3, c), u2), mul(load(a3, c + W), w2), mul(x, u1), mul(y, w1)
        f0, t0 = mul(mul(load(a1, c), x), u0), mul(mul(load(a1, c + W), y), w0)
        x, y = mul(mul(load(a0, c), load(a1, c)), x), mul(mul(load(a0, c + W), load(a1, c + W)), y)
        all0, all1 = x, y
    o0 = o1 = o2 = o3 = p0 = p1 = p2 = p3 = zeros(s)
    for d in range(D):
        x, y = load(s, d * M + c), load(s, d * M + c + W)
        o0, o1, o2, o3, p0, p1, p2, p3 = read(q0[d], q1[d], q2[d], q3[d], x, y, o0, o1, o2, o3, p0, p1, p2, p3)
        if head is not None:
            x, y = mul(b[3], x), mul(b[3], y)
        if channel is not None:
            x, y = mul(whole[d], x), mul(whole[d], y)
        if column is not None:
            x, y = mul(all0, x), mul(all1, y)
        x, y = fma(k0[d], f0, x), fma(k0[d], t0, y)
        x, y = fma(k1[d], f1, x), fma(k1[d], t1, y)
        x, y = fma(k2[d], f2, x), fma(k2[d], t2, y)
        x, y = fma(k3[d], f3, x), fma(k3[d], t3, y)
        store(s, d * M + c, x)
        store(s, d * M + c + W, y)
    if column is None:
        o0, o1, o2, o3 = inside(o0, o1, o2, o3, u0, u1, u2, u3, b, A, scale)
        p0, p1, p2, p3 = inside(p0, p1, p2, p3, w0, w1, w2, w3, b, A, scale)
    else:
        o0, o1, o2, o3 = faded(o0, o1, o2, o3, u0, u1, u2, u3, load(a0, c), load(a1, c), load(a2, c), load(a3, c), A, scale)
        p0, p1, p2, p3 = faded(p0, p1, p2, p3, w0, w1, w2, w3, load(a0, c + W), load(a1, c + W), load(a2, c + W), load(a3, c + W), A, scale)
    put(O, M, c, o0, o1, o2, o3)
    put(O, M, c + W, p0, p1, p2, p3)


@njit(**options)
def read(q0: Any, q1: Any, q2: Any, q3: Any, x: Any, y: Any, o0: Any, o1: Any, o2: Any, o3: Any, p0: Any, p1: Any, p2: Any, p3: Any) -> Any:
    """What four queries read in one row of S, two vectors of it, added to o and p."""
    return (fma(q0, x, o0), fma(q1, x, o1), fma(q2, x, o2), fma(q3, x, o3), fma(q0, y, p0), fma(q1, y, p1), fma(q2, y, p2), fma(q3, y, p3))


@njit(**options)
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


@njit(**options)
def inside(o0: Any, o1: Any, o2: Any, o3: Any, u0: Any, u1: Any, u2: Any, u3: Any, b: Any, A: Any, scale: Any) -> Any:
    """scale · b_i o_i + Σ_{j≤i} A_ij u_j."""
    return (fma(A[0], u0, mul(scale * b[0], o0)), fma(A[1], u0, fma(A[2], u1, mul(scale * b[1], o1))),
            fma(A[3], u0, fma(A[4], u1, fma(A[5], u2, mul(scale * b[2], o2)))),
            fma(A[6], u0, fma(A[7], u1, fma(A[8], u2, fma(A[9], u3, mul(scale * b[3], o3))))))


@njit(**options)
def faded(o0: Any, o1: Any, o2: Any, o3: Any, u0: Any, u1: Any, u2: Any, u3: Any, a0: Any, a1: Any, a2: Any, a3: Any, m: Any, scale: Any) -> Any:
    """b_i ⊙ o_i + Σ_j A_ij u_j Π_{j<s≤i} a_s, where decays stand across."""
    b = mul(scale, a0)
    x0 = fma(m[0], u0, mul(b, o0))
    b, u0 = mul(b, a1), mul(a1, u0)
    x1 = fma(m[1], u0, fma(m[2], u1, mul(b, o1)))
    b, u0, u1 = mul(b, a2), mul(a2, u0), mul(a2, u1)
    x2 = fma(m[3], u0, fma(m[4], u1, fma(m[5], u2, mul(b, o2))))
    b, u0, u1, u2 = mul(b, a3), mul(a3, u0), mul(a3, u1), mul(a3, u2)
    return x0, x1, x2, fma(m[6], u0, fma(m[7], u1, fma(m[8], u2, fma(m[9], u3, mul(b, o3)))))


@njit(**options)
def put(X: Any, M: int, c: int, x0: Any, x1: Any, x2: Any, x3: Any) -> None:
    """A vector to each of four rows."""
    store(X, c, x0)
    store(X, M + c, x1)
    store(X, 2 * M + c, x2)
    store(X, 3 * M + c, x3)


# --- backward of the delta rules -----------------------------------------------------------------------------------------------------------

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
    width, columns = (D + W - 1) // W * W, (M + W - 1) // W * W
    one = kind.type(1)
    head, channel = of_gate(g, one)
    state, tiles, few = np.empty((1, D * columns), kind), np.empty((6, TILE * width), kind), np.ones((5, TILE // 4 * 10 + TILE), kind)
    values = np.empty((2, TILE * columns), kind)
    T, Q, K, bK, eQ, eK, a = row(state, 0), row(tiles, 0), row(tiles, 1), row(tiles, 2), row(tiles, 3), row(tiles, 4), row(tiles, 5)
    C, B, b, e, step, V, O = row(few, 0), row(few, 1), row(few, 2), row(few, 3), row(few, 4), row(values, 0), row(values, 1)
    padded(R, 0, D, T, D, columns)
    for start in range(0, N, TILE):
        stop = min(start + TILE, N)
        padded(q, start, stop, Q, TILE, width)
        padded(k, start, stop, K, TILE, width)
        padded(dout, start, stop, V, TILE, columns)
        if g is not None:
            exponentials(g, start - 1, stop - 1, a, width)
        for t in range(TILE):
            step[t] = beta[start + t] if start + t < stop else 0
        for at in range(0, stop - start, 4):
            here = at * width
            fades = plus(a, at) if channel is None else plus(a, here)
            scores(plus(K, here), plus(Q, here), fades, width, one, plus(C, at // 4 * 10), head, channel)
            scores(plus(K, here), plus(K, here), fades, width, one, plus(B, at // 4 * 10), head, channel)
            if head is not None:
                weights(fades, plus(b, at), plus(e, at))
            if channel is not None:
                weighed(plus(Q, here), fades, width, plus(bK, here), plus(eQ, here), plus(eK, here))
                weighed(plus(K, here), fades, width, plus(bK, here), plus(eK, here), fades)                      # b_3 where a_0 stood
        for c in range(0, columns, W):
            for at in range(0, stop - start, 4):
                here = at * width
                if channel is not None:
                    block_delta(plus(bK, here), plus(eQ, here), plus(eK, here), plus(V, at * columns), plus(O, at * columns), T, D, width, columns,
                                plus(C, at // 4 * 10), plus(B, at // 4 * 10), plus(b, at), plus(e, at), plus(a, here), plus(step, at), c,
                                head, channel)
                else:
                    block_delta(plus(K, here), plus(Q, here), plus(K, here), plus(V, at * columns), plus(O, at * columns), T, D, width, columns,
                                plus(C, at // 4 * 10), plus(B, at // 4 * 10), plus(b, at), plus(e, at), a, plus(step, at), c, head, channel)
        written_back(O, columns, du, start, stop)
    written_back(T, columns, R, 0, D)


@njit(**options)
def block_delta(R: Any, Q: Any, K: Any, V: Any, O: Any, S: Any, D: int, width: int, M: int, C: Any, B: Any, b: Any, e: Any, whole: Any, step: Any,
                c: int, head: Any, channel: Any) -> None:
    """Four positions and one vector of columns: here two writes stand in registers, of do and of du."""
    whole_registers()
    r1, r2, r3 = plus(R, width), plus(R, 2 * width), plus(R, 3 * width)
    q1, q2, q3 = plus(Q, width), plus(Q, 2 * width), plus(Q, 3 * width)
    k1, k2, k3 = plus(K, width), plus(K, 2 * width), plus(K, 3 * width)
    o0 = o1 = o2 = o3 = zeros(S)
    for d in range(D):
        x = load(S, d * M + c)
        o0, o1, o2, o3 = fma(R[d], x, o0), fma(r1[d], x, o1), fma(r2[d], x, o2), fma(r3[d], x, o3)
    f0, f1, f2, f3 = load(V, c), load(V, M + c), load(V, 2 * M + c), load(V, 3 * M + c)
    o0 = fma(C[0], f0, mul(b[0], o0))
    w0 = mul(-step[0], o0)                                                           # what is erased: -β du
    o1 = fma(B[1], w0, fma(C[1], f0, fma(C[2], f1, mul(b[1], o1))))
    w1 = mul(-step[1], o1)
    o2 = fma(B[3], w0, fma(B[4], w1, fma(C[3], f0, fma(C[4], f1, fma(C[5], f2, mul(b[2], o2))))))
    w2 = mul(-step[2], o2)
    o3 = fma(C[6], f0, fma(C[7], f1, fma(C[8], f2, fma(C[9], f3, mul(b[3], o3)))))
    o3 = fma(B[6], w0, fma(B[7], w1, fma(B[8], w2, o3)))
    w3 = mul(-step[3], o3)
    put(O, M, c, o0, o1, o2, o3)
    if head is not None:
        f0, f1, f2, w0, w1, w2 = mul(e[0], f0), mul(e[1], f1), mul(e[2], f2), mul(e[0], w0), mul(e[1], w1), mul(e[2], w2)
    for d in range(D):
        x = load(S, d * M + c)
        if head is not None:
            x = mul(b[3], x)
        if channel is not None:
            x = mul(whole[d], x)
        x = fma(Q[d], f0, fma(q1[d], f1, fma(q2[d], f2, fma(q3[d], f3, x))))
        store(S, d * M + c, fma(K[d], w0, fma(k1[d], w1, fma(k2[d], w2, fma(k3[d], w3, x)))))


@njit(**options)
def decay_gradient(q: Any, dq: Any, k: Any, dk: Any, last: Any, dg: Any) -> None:
    """dg_t = dg_{t+1} + q_t ⊙ dq_t - k_t ⊙ dk_t from the end, where `last` (D,) = Σ_m S_N ⊙ dS_N stands; dg (N, D), or (N, 1), which gets the sum
    over the channels. What is there is added to."""
    N, D = q.shape
    for t in range(N - 1, -1, -1):
        for d in range(D):
            last[d] += q[t, d] * dq[t, d] - k[t, d] * dk[t, d]
            dg[t, d if dg.shape[1] == D else 0] += last[d]
