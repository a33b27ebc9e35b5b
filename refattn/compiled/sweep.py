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
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .vector import BYTES, exp, fma, load, mul, row, store, total, whole_registers, zeros

from numba import njit                                                                                                # noqa: E402, I001

TILE = 32
options: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}


# --- a tile of positions -------------------------------------------------------------------------------------------------------------------

@njit(**options)
def padded(x: Any, start: int, stop: int, to: Any) -> None:
    """Rows of x where a tile has room for them; zeros behind them and beside them."""
    D = x.shape[1]
    for t in range(stop - start):
        for d in range(D):
            to[t, d] = x[start + t, d] if start + t >= 0 else 0
        for d in range(D, to.shape[1]):
            to[t, d] = 0
    for t in range(stop - start, to.shape[0]):
        for d in range(to.shape[1]):
            to[t, d] = 0


@njit(**options)
def exponentials(g: Any, start: int, stop: int, a: Any) -> None:
    """a = exp(g) of a tile, g (N,) or (N, D); 1 behind its last position, and before the first one there is."""
    whole_registers()
    if g.ndim == 2:
        padded(g, start, stop, a)
        for t in range(TILE):
            to = row(a, t)
            for d in range(0, a.shape[1], BYTES // a.itemsize):
                store(to, d, exp(load(to, d)))
    else:
        for t in range(TILE):
            a[t, 0] = np.exp(g[start + t]) if 0 <= start + t < stop else 1


@njit(**options)
def scores(Q: Any, K: Any, at: int, scale: Any, A: Any) -> None:
    """A_ij = scale · q_i·k_j of a block, row by row."""
    whole_registers()
    q0, q1, q2, q3 = row(Q, at), row(Q, at + 1), row(Q, at + 2), row(Q, at + 3)
    k0, k1, k2, k3 = row(K, at), row(K, at + 1), row(K, at + 2), row(K, at + 3)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = zeros(q0)
    for d in range(0, Q.shape[1], BYTES // Q.itemsize):
        x0, x1, x2, x3, y = load(k0, d), load(k1, d), load(k2, d), load(k3, d), load(q0, d)
        s0 = fma(y, x0, s0)
        y = load(q1, d)
        s1, s2 = fma(y, x0, s1), fma(y, x1, s2)
        y = load(q2, d)
        s3, s4, s5 = fma(y, x0, s3), fma(y, x1, s4), fma(y, x2, s5)
        y = load(q3, d)
        s6, s7, s8, s9 = fma(y, x0, s6), fma(y, x1, s7), fma(y, x2, s8), fma(y, x3, s9)
    keep_scores(A, at // 4, scale, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9)


@njit(**options)
def faded_scores(Q: Any, K: Any, a: Any, at: int, scale: Any, A: Any) -> None:
    """A_ij with a decay for each channel: k_j fades on its way from j to i."""
    whole_registers()
    q0, q1, q2, q3 = row(Q, at), row(Q, at + 1), row(Q, at + 2), row(Q, at + 3)
    k0, k1, k2, k3 = row(K, at), row(K, at + 1), row(K, at + 2), row(K, at + 3)
    a1, a2, a3 = row(a, at + 1), row(a, at + 2), row(a, at + 3)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = zeros(q0)
    for d in range(0, Q.shape[1], BYTES // Q.itemsize):
        x0, y = load(k0, d), load(q0, d)
        s0 = fma(y, x0, s0)
        x0, x1, y = mul(load(a1, d), x0), load(k1, d), load(q1, d)
        s1, s2 = fma(y, x0, s1), fma(y, x1, s2)
        x0, x1, x2, y = mul(load(a2, d), x0), mul(load(a2, d), x1), load(k2, d), load(q2, d)
        s3, s4, s5 = fma(y, x0, s3), fma(y, x1, s4), fma(y, x2, s5)
        x0, x1, x2, x3, y = mul(load(a3, d), x0), mul(load(a3, d), x1), mul(load(a3, d), x2), load(k3, d), load(q3, d)
        s6, s7, s8, s9 = fma(y, x0, s6), fma(y, x1, s7), fma(y, x2, s8), fma(y, x3, s9)
    keep_scores(A, at // 4, scale, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9)


@njit(**options)
def keep_scores(A: Any, i: int, scale: Any, s0: Any, s1: Any, s2: Any, s3: Any, s4: Any, s5: Any, s6: Any, s7: Any, s8: Any, s9: Any) -> None:
    to = row(A, i)
    to[0], to[1], to[2], to[3], to[4] = scale * total(s0), scale * total(s1), scale * total(s2), scale * total(s3), scale * total(s4)
    to[5], to[6], to[7], to[8], to[9] = scale * total(s5), scale * total(s6), scale * total(s7), scale * total(s8), scale * total(s9)


@njit(**options)
def fade(A: Any, a: Any, at: int) -> None:
    """A_ij with one decay for all channels."""
    s, a1, a2, a3 = row(A, at // 4), a[at + 1, 0], a[at + 2, 0], a[at + 3, 0]
    s[1], s[4], s[8] = s[1] * a1, s[4] * a2, s[8] * a3
    s[3], s[7] = s[3] * (a1 * a2), s[7] * (a2 * a3)
    s[6] = s[6] * (a1 * a2 * a3)


@njit(**options)
def weights(a: Any, at: int, b: Any, e: Any) -> None:
    """b_i and e_i of a block with one decay for all channels."""
    b[at, 0], e[at + 3, 0] = a[at, 0], 1
    for i in range(3):
        b[at + i + 1, 0] = b[at + i, 0] * a[at + i + 1, 0]
        e[at + 2 - i, 0] = e[at + 3 - i, 0] * a[at + 3 - i, 0]


@njit(**options)
def weigh_rows(Q: Any, K: Any, a: Any, at: int, bQ: Any, bK: Any, eK: Any, whole: Any) -> None:
    """b ⊙ q, b ⊙ k, e ⊙ k and b_3 of a block with a decay for each channel."""
    whole_registers()
    for d in range(0, Q.shape[1], BYTES // Q.itemsize):
        b = load(row(a, at), d)
        store(row(bQ, at), d, mul(b, load(row(Q, at), d)))
        store(row(bK, at), d, mul(b, load(row(K, at), d)))
        e = load(row(K, at + 3), d)
        store(row(eK, at + 3), d, e)
        e = load(row(a, at + 3), d)
        store(row(eK, at + 2), d, mul(e, load(row(K, at + 2), d)))
        for i in range(1, 4):
            b = mul(b, load(row(a, at + i), d))
            store(row(bQ, at + i), d, mul(b, load(row(Q, at + i), d)))
            store(row(bK, at + i), d, mul(b, load(row(K, at + i), d)))
        for i in range(1, -1, -1):
            e = mul(e, load(row(a, at + i + 1), d))
            store(row(eK, at + i), d, mul(e, load(row(K, at + i), d)))
        store(row(whole, at // 4), d, b)


# --- the sweep ---------------------------------------------------------------------------------------------------------------------------

@njit(**options)
def forward(q: Any, k: Any, v: Any, g: Any, h: Any, beta: Any, S: Any, out: Any, written: Any, scale: Any, late: int) -> None:
    """One head: q, k (N, D), v, out and `written`, which gets v - Pᵀ k unless it is None, (N, M); beta (N,) or None; S (D, M), changed in place.
    Decays: g (N,), one for a position, or (N, D), one for each row of S, or h (N, M), one for each column; `late`: 1 if position t fades by what
    stands at t - 1, and the first one not at all."""
    whole_registers()
    (N, D), M, W, kind = q.shape, v.shape[1], BYTES // S.itemsize, S.dtype
    wide, columns, one = (D + W - 1) // W * W, (M + 2 * W - 1) // (2 * W) * (2 * W), kind.type(1)
    Q, K, V, O = np.empty((TILE, wide), kind), np.empty((TILE, wide), kind), np.empty((TILE, columns), kind), np.empty((TILE, columns), kind)
    T, A, B, b, e = np.empty((D, columns), kind), np.empty((TILE // 4, 10), kind), np.empty((TILE // 4, 10), kind), np.ones((TILE, 1), kind), np.ones(
        (TILE, 1), kind)
    padded(S, 0, D, T)
    room = 0 if g is None else 1 if g.ndim == 1 else wide
    a, rows = np.empty((TILE, room), kind), 0 if room < 2 else TILE
    bQ, bK, eK, whole = np.empty((rows, room), kind), np.empty((rows, room), kind), np.empty((rows, room), kind), np.empty((rows, room), kind)
    step, across = np.zeros((1, TILE), kind), np.empty((TILE if h is not None else 0, columns), kind)
    for start in range(0, N, TILE):
        stop = min(start + TILE, N)
        padded(q, start, stop, Q)
        padded(k, start, stop, K)
        padded(v, start, stop, V)
        if g is not None:
            exponentials(g, start - late, stop - late, a)
        if h is not None:
            exponentials(h, start - late, stop - late, across)
        if beta is not None:
            for t in range(TILE):
                step[0, t] = beta[start + t] if start + t < stop else 0
        for at in range(0, stop - start, 4):
            if g is not None and g.ndim == 2:
                faded_scores(Q, K, a, at, scale, A)
                if beta is not None:
                    faded_scores(K, K, a, at, one, B)
                weigh_rows(Q, K, a, at, bQ, bK, eK, whole)
            else:
                scores(Q, K, at, scale, A)
                if beta is not None:
                    scores(K, K, at, one, B)
            if g is not None and g.ndim == 1:
                fade(A, a, at)
                if beta is not None:
                    fade(B, a, at)
                weights(a, at, b, e)
        for c in range(0, columns, 2 * W):
            for at in range(0, stop - start, 4):
                if g is not None and g.ndim == 2:
                    block(bQ, bK, eK, V, O, T, A, B, g, h, beta, b, e, whole, across, step, at, c, scale)
                else:
                    block(Q, K, K, V, O, T, A, B, g, h, beta, b, e, whole, across, step, at, c, scale)
        for t in range(stop - start):
            for m in range(M):
                out[start + t, m] = O[t, m]
        if written is not None:
            for t in range(stop - start):
                for m in range(M):
                    written[start + t, m] = V[t, m]
    for d in range(D):
        for m in range(M):
            S[d, m] = T[d, m]


@njit(**options)
def block(Q: Any, R: Any, K: Any, V: Any, O: Any, S: Any, A: Any, B: Any, g: Any, h: Any, beta: Any, b: Any, e: Any, whole: Any, across: Any, step: Any,
          at: int, c: int, scale: Any) -> None:
    """Four positions and two vectors of columns. Q, R, K: b ⊙ q, b ⊙ k and e ⊙ k, or the bare ones where b and e are numbers, or stand across."""
    whole_registers()
    D, M, W = S.shape[0], S.shape[1], BYTES // S.itemsize
    s, v0, v1, v2, v3 = row(S, 0), row(V, at), row(V, at + 1), row(V, at + 2), row(V, at + 3)
    q0, q1, q2, q3 = row(Q, at), row(Q, at + 1), row(Q, at + 2), row(Q, at + 3)
    k0, k1, k2, k3 = row(K, at), row(K, at + 1), row(K, at + 2), row(K, at + 3)
    b0, b1, b2, b3 = b[at, 0], b[at + 1, 0], b[at + 2, 0], b[at + 3, 0]
    u0, u1, u2, u3 = load(v0, c), load(v1, c), load(v2, c), load(v3, c)
    w0, w1, w2, w3 = load(v0, c + W), load(v1, c + W), load(v2, c + W), load(v3, c + W)
    if beta is not None:                                                             # less what the state knows, and what the four have written
        r0, r1, r2, r3 = row(R, at), row(R, at + 1), row(R, at + 2), row(R, at + 3)
        o0 = o1 = o2 = o3 = p0 = p1 = p2 = p3 = zeros(s)
        for d in range(D):
            x, y = load(s, d * M + c), load(s, d * M + c + W)
            o0, p0 = fma(r0[d], x, o0), fma(r0[d], y, p0)
            o1, p1 = fma(r1[d], x, o1), fma(r1[d], y, p1)
            o2, p2 = fma(r2[d], x, o2), fma(r2[d], y, p2)
            o3, p3 = fma(r3[d], x, o3), fma(r3[d], y, p3)
        m, h0, h1, h2, h3 = row(B, at // 4), step[0, at], step[0, at + 1], step[0, at + 2], step[0, at + 3]
        o0, p0 = fma(-b0, o0, u0), fma(-b0, p0, w0)
        u0, w0 = mul(h0, o0), mul(h0, p0)
        o1, p1 = fma(-m[1], u0, fma(-b1, o1, u1)), fma(-m[1], w0, fma(-b1, p1, w1))
        u1, w1 = mul(h1, o1), mul(h1, p1)
        o2, p2 = fma(-m[3], u0, fma(-m[4], u1, fma(-b2, o2, u2))), fma(-m[3], w0, fma(-m[4], w1, fma(-b2, p2, w2)))
        u2, w2 = mul(h2, o2), mul(h2, p2)
        o3 = fma(-m[6], u0, fma(-m[7], u1, fma(-m[8], u2, fma(-b3, o3, u3))))
        p3 = fma(-m[6], w0, fma(-m[7], w1, fma(-m[8], w2, fma(-b3, p3, w3))))
        u3, w3 = mul(h3, o3), mul(h3, p3)
        put(V, at, c, o0, o1, o2, o3)
        put(V, at, c + W, p0, p1, p2, p3)
    f0, f1, f2, f3, t0, t1, t2, t3 = u0, u1, u2, u3, w0, w1, w2, w3                    # e ⊙ u
    if g is not None and g.ndim == 1:
        e0, e1, e2 = e[at, 0], e[at + 1, 0], e[at + 2, 0]
        f0, f1, f2, t0, t1, t2 = mul(e0, u0), mul(e1, u1), mul(e2, u2), mul(e0, w0), mul(e1, w1), mul(e2, w2)
    if h is not None:
        a0, a1, a2, a3 = row(across, at), row(across, at + 1), row(across, at + 2), row(across, at + 3)
        x, y = mul(load(a2, c), load(a3, c)), mul(load(a2, c + W), load(a3, c + W))
        f2, t2, f1, t1 = mul(load(a3, c), u2), mul(load(a3, c + W), w2), mul(x, u1), mul(y, w1)
        f0, t0 = mul(mul(load(a1, c), x), u0), mul(mul(load(a1, c + W), y), w0)
        x, y = mul(mul(load(a0, c), load(a1, c)), x), mul(mul(load(a0, c + W), load(a1, c + W)), y)
        all0, all1 = x, y
    o0 = o1 = o2 = o3 = p0 = p1 = p2 = p3 = zeros(s)
    for d in range(D):
        x, y = load(s, d * M + c), load(s, d * M + c + W)
        o0, p0 = fma(q0[d], x, o0), fma(q0[d], y, p0)
        o1, p1 = fma(q1[d], x, o1), fma(q1[d], y, p1)
        o2, p2 = fma(q2[d], x, o2), fma(q2[d], y, p2)
        o3, p3 = fma(q3[d], x, o3), fma(q3[d], y, p3)
        if g is not None:
            keep = b3 if g.ndim == 1 else row(whole, at // 4)[d]
            x, y = mul(keep, x), mul(keep, y)
        if h is not None:
            x, y = mul(all0, x), mul(all1, y)
        x, y = fma(k0[d], f0, x), fma(k0[d], t0, y)
        x, y = fma(k1[d], f1, x), fma(k1[d], t1, y)
        x, y = fma(k2[d], f2, x), fma(k2[d], t2, y)
        x, y = fma(k3[d], f3, x), fma(k3[d], t3, y)
        store(s, d * M + c, x)
        store(s, d * M + c + W, y)
    m = row(A, at // 4)
    if h is None:
        o0, p0 = fma(m[0], u0, mul(scale * b0, o0)), fma(m[0], w0, mul(scale * b0, p0))
        o1, p1 = fma(m[1], u0, fma(m[2], u1, mul(scale * b1, o1))), fma(m[1], w0, fma(m[2], w1, mul(scale * b1, p1)))
        o2 = fma(m[3], u0, fma(m[4], u1, fma(m[5], u2, mul(scale * b2, o2))))
        p2 = fma(m[3], w0, fma(m[4], w1, fma(m[5], w2, mul(scale * b2, p2))))
        o3 = fma(m[6], u0, fma(m[7], u1, fma(m[8], u2, fma(m[9], u3, mul(scale * b3, o3)))))
        p3 = fma(m[6], w0, fma(m[7], w1, fma(m[8], w2, fma(m[9], w3, mul(scale * b3, p3)))))
    else:
        o0, o1, o2, o3 = faded(o0, o1, o2, o3, u0, u1, u2, u3, load(a0, c), load(a1, c), load(a2, c), load(a3, c), m, scale)
        p0, p1, p2, p3 = faded(p0, p1, p2, p3, w0, w1, w2, w3, load(a0, c + W), load(a1, c + W), load(a2, c + W), load(a3, c + W), m, scale)
    put(O, at, c, o0, o1, o2, o3)
    put(O, at, c + W, p0, p1, p2, p3)


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
def put(X: Any, at: int, c: int, x0: Any, x1: Any, x2: Any, x3: Any) -> None:
    store(row(X, at), c, x0)
    store(row(X, at + 1), c, x1)
    store(row(X, at + 2), c, x2)
    store(row(X, at + 3), c, x3)


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
    wide, columns, one = (D + W - 1) // W * W, (M + 2 * W - 1) // (2 * W) * (2 * W), kind.type(1)
    Q, K, V, O = np.empty((TILE, wide), kind), np.empty((TILE, wide), kind), np.empty((TILE, columns), kind), np.empty((TILE, columns), kind)
    T, C, B, b, e = np.empty((D, columns), kind), np.empty((TILE // 4, 10), kind), np.empty((TILE // 4, 10), kind), np.ones((TILE, 1), kind), np.ones(
        (TILE, 1), kind)
    padded(R, 0, D, T)
    room = 0 if g is None else 1 if g.ndim == 1 else wide
    a, rows = np.empty((TILE, room), kind), 0 if room < 2 else TILE
    bK, eQ, eK, whole, spare = (np.empty((rows, room), kind), np.empty((rows, room), kind), np.empty((rows, room), kind), np.empty((rows, room), kind),
                                np.empty((rows, room), kind))
    step = np.zeros((1, TILE), kind)
    for start in range(0, N, TILE):
        stop = min(start + TILE, N)
        padded(q, start, stop, Q)
        padded(k, start, stop, K)
        padded(dout, start, stop, V)
        if g is not None:
            exponentials(g, start - 1, stop - 1, a)
        for t in range(TILE):
            step[0, t] = beta[start + t] if start + t < stop else 0
        for at in range(0, stop - start, 4):
            if g is not None and g.ndim == 2:
                faded_scores(K, Q, a, at, one, C)
                faded_scores(K, K, a, at, one, B)
                weigh_rows(K, Q, a, at, bK, spare, eQ, whole)
                weigh_rows(K, K, a, at, bK, spare, eK, whole)
            else:
                scores(K, Q, at, one, C)
                scores(K, K, at, one, B)
            if g is not None and g.ndim == 1:
                fade(C, a, at)
                fade(B, a, at)
                weights(a, at, b, e)
        for c in range(0, columns, 2 * W):
            for at in range(0, stop - start, 4):
                if g is not None and g.ndim == 2:
                    block_delta(bK, eQ, eK, V, O, T, C, B, g, b, e, whole, step, at, c)
                else:
                    block_delta(K, Q, K, V, O, T, C, B, g, b, e, whole, step, at, c)
        for t in range(stop - start):
            for m in range(M):
                du[start + t, m] = O[t, m]
    for d in range(D):
        for m in range(M):
            R[d, m] = T[d, m]


@njit(**options)
def block_delta(bK: Any, Q: Any, K: Any, V: Any, O: Any, S: Any, C: Any, B: Any, g: Any, b: Any, e: Any, whole: Any, step: Any, at: int, c: int) -> None:
    """Four positions and one vector of columns after the other: here two writes are in registers, of do and of du."""
    whole_registers()
    D, M, W = S.shape[0], S.shape[1], BYTES // S.itemsize
    s, n, m = row(S, 0), row(C, at // 4), row(B, at // 4)
    r0, r1, r2, r3 = row(bK, at), row(bK, at + 1), row(bK, at + 2), row(bK, at + 3)
    q0, q1, q2, q3 = row(Q, at), row(Q, at + 1), row(Q, at + 2), row(Q, at + 3)
    k0, k1, k2, k3 = row(K, at), row(K, at + 1), row(K, at + 2), row(K, at + 3)
    v0, v1, v2, v3 = row(V, at), row(V, at + 1), row(V, at + 2), row(V, at + 3)
    b0, b1, b2, b3 = b[at, 0], b[at + 1, 0], b[at + 2, 0], b[at + 3, 0]
    for c in range(c, c + 2 * W, W):
        o0 = o1 = o2 = o3 = zeros(s)
        for d in range(D):
            x = load(s, d * M + c)
            o0, o1, o2, o3 = fma(r0[d], x, o0), fma(r1[d], x, o1), fma(r2[d], x, o2), fma(r3[d], x, o3)
        f0, f1, f2, f3 = load(v0, c), load(v1, c), load(v2, c), load(v3, c)
        o0 = fma(n[0], f0, mul(b0, o0))
        w0 = mul(-step[0, at], o0)                                                   # what is erased: -β du
        o1 = fma(m[1], w0, fma(n[1], f0, fma(n[2], f1, mul(b1, o1))))
        w1 = mul(-step[0, at + 1], o1)
        o2 = fma(m[3], w0, fma(m[4], w1, fma(n[3], f0, fma(n[4], f1, fma(n[5], f2, mul(b2, o2))))))
        w2 = mul(-step[0, at + 2], o2)
        o3 = fma(n[6], f0, fma(n[7], f1, fma(n[8], f2, fma(n[9], f3, mul(b3, o3)))))
        o3 = fma(m[6], w0, fma(m[7], w1, fma(m[8], w2, o3)))
        w3 = mul(-step[0, at + 3], o3)
        put(O, at, c, o0, o1, o2, o3)
        if g is not None and g.ndim == 1:
            e0, e1, e2 = e[at, 0], e[at + 1, 0], e[at + 2, 0]
            f0, f1, f2, w0, w1, w2 = mul(e0, f0), mul(e1, f1), mul(e2, f2), mul(e0, w0), mul(e1, w1), mul(e2, w2)
        for d in range(D):
            x = load(s, d * M + c)
            if g is not None:
                x = mul(b3 if g.ndim == 1 else row(whole, at // 4)[d], x)
            x = fma(q0[d], f0, fma(q1[d], f1, fma(q2[d], f2, fma(q3[d], f3, x))))
            store(s, d * M + c, fma(k0[d], w0, fma(k1[d], w1, fma(k2[d], w2, fma(k3[d], w3, x)))))


@njit(**options)
def decay_gradient(q: Any, dq: Any, k: Any, dk: Any, last: Any, dg: Any) -> None:
    """dg_t = dg_{t+1} + q_t ⊙ dq_t - k_t ⊙ dk_t from the end, where `last` (D,) = Σ_m S_N ⊙ dS_N stands; dg (N, D), or (N, 1), which gets the sum
    over the channels. What is there is added to."""
    N, D = q.shape
    for t in range(N - 1, -1, -1):
        for d in range(D):
            last[d] += q[t, d] * dq[t, d] - k[t, d] * dk[t, d]
            dg[t, d if dg.shape[1] == D else 0] += last[d]
