"""Heads one after another, and the backward of a head composed of the same sweeps. What `launch` calls, with the heads of one thread.

Arrays have one axis of heads, key/value head h being read by query heads h·G … h·G + G - 1. With f(q, k, v, g; S_0) for the outputs o_t = S_tᵀ q_t
of the sum S_t = Diag(exp(g_t)) S_{t-1} + k_t v_tᵀ, rev for the order from the end, and g⁺_t = g_{t+1} (0 for the last), rule `gated` is transposed
by three more sums (`linear`: without g), S_0ᵀ standing for the transposed state,

    dq = f(do, v, k, g; S_0ᵀ)        dv = rev f(rev k, rev q, rev do, rev g⁺; dS_N)        dk = rev f(rev v, rev do, rev q, rev g⁺; dS_Nᵀ)
    dS_0 = Diag(exp(g_1)) R_1, R_1 the state that dv ends with
    dg_t = dg_{t+1} + q_t ⊙ dq_t - k_t ⊙ dk_t,  dg_{N+1} = Σ_m S_N ⊙ dS_N

The last line: the product of S_t with its cotangent from behind, R_t, is what both dg_{t+1} and, but for what is read and written at t, dg_t are. It
needs no state, but its terms cancel: dg is known to the roundings of the sum of all |q ⊙ dq| + |k ⊙ dk| behind it (`differences_budget`).

Rules with a delta: with x_t = v_t - P_tᵀ k_t and u_t = β_t x_t from a forward, du_t and the state X_t (the cotangent of P_t) by `backward_delta`,

    w_t = β_t du_t = dv_t,   dβ_t = du_t·x_t,   dq_t = S_t do_t = f(do, u, k, g; S_0ᵀ)
    dk_t = G_t u_t - P_t w_t = X_t u_t - S_t w_t + 2 (u_t·w_t) k_t          G_t = X_t + k_t w_tᵀ,  P_t = S_t - k_t u_tᵀ
    dg_t = dg_{t+1} + q_t ⊙ dq_t - k_t ⊙ (X_t u_t + S_t w_t)

where S w = f(w, u, k, g; S_0ᵀ) and, X being a sum of what q do and -k w write, X u = rev f(rev u, rev do, rev q, rev g⁺; dS_Nᵀ) - rev f(rev u, rev w,
rev k, rev g⁺; 0).
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .attention import attention, attention_backward
from .sweep import backward_delta, forward
from .tiles import by_column, by_row, copied, like, of, options, reverse, summed_up
from .vector import fixed

from numba import njit                                                                                                # noqa: E402, I001


@njit(**options)
def empty(height: int, width: int, kind: Any) -> Any:
    """Of any strides, as far as Numba knows: one variant of each loop is enough."""
    return np.empty((height, width), kind)[::1]


@njit(**options)
def blank(x: Any) -> None:
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[i, j] = 0


# --- the recurrence ----------------------------------------------------------------------------------------------------------------------------

@njit(**options)
def forward_heads(q: Any, k: Any, v: Any, g: Any, beta: Any, start: Any, S: Any, out: Any, scale: Any) -> None:
    """out (G·H, N, M) and S (H, D, M), the states behind the last position, from those of `start`."""
    groups = q.shape[0] // k.shape[0]
    for h in range(k.shape[0]):
        for query in range(h * groups, (h + 1) * groups):
            copied(start[h], S[h])
            forward(q[query], k[h], v[h], of(g, h), None, of(beta, h), S[h], out[query], None, scale, np.intp(0))


@njit(**options)
def backward_heads(q: Any, k: Any, v: Any, g: Any, beta: Any, dout: Any, start: Any, R: Any, dq: Any, dk: Any, dv: Any, dg: Any, dbeta: Any) -> None:
    """R (H, D, M): the states' cotangents behind the last position, in place to those of the start; dg (H, N, W), W decays a position."""
    groups, kind = q.shape[0] // k.shape[0], q.dtype
    for h in range(k.shape[0]):
        backward(q[h * groups], k[h], v[h], of(g, h), of(beta, h), dout[h * groups], start[h], R[h],
                 dq[h * groups], dk[h], dv[h], of(dg, h), of(dbeta, h))
        if groups > 1:
            more_k, more_v, more_R = empty(k.shape[1], k.shape[2], kind), empty(v.shape[1], v.shape[2], kind), empty(k.shape[2], v.shape[2], kind)
            more_g, more_b = like(dg), like(dbeta)
            for query in range(h * groups + 1, (h + 1) * groups):
                blank(more_R)
                backward(q[query], k[h], v[h], of(g, h), of(beta, h), dout[query], start[h], more_R, dq[query],
                         more_k, more_v, of(more_g, 0), of(more_b, 0))
                summed_up(more_k, dk[h])
                summed_up(more_v, dv[h])
                summed_up(more_R, R[h])
                if g is not None:
                    summed_up(more_g[0], dg[h])
                if beta is not None:
                    summed_up(more_b, dbeta[h:h + 1])


@njit(**options)
def backward(q: Any, k: Any, v: Any, g: Any, beta: Any, dout: Any, S: Any, R: Any, dq: Any, dk: Any, dv: Any, dg: Any, dbeta: Any) -> None:
    """One query head; see the top of this file."""
    (N, D), M, kind = q.shape, v.shape[1], q.dtype
    T, RT, last, one, now, late = empty(M, D, kind), empty(M, D, kind), np.zeros(D, kind), kind.type(1), np.intp(0), np.intp(1)
    copied(S.T, T)
    copied(R.T, RT)
    rev_g = reverse(g)
    if beta is None:
        forward(dout, v, k, by_row(g), by_column(g), None, T, dq, None, one, now)
        product(R, T, last)
        forward(k[::-1], q[::-1], dout[::-1], rev_g, None, None, R, dv[::-1], None, one, late)
        forward(v[::-1], dout[::-1], q[::-1], by_row(rev_g), by_column(rev_g), None, RT, dk[::-1], None, one, late)
        if g is not None:
            decay_gradient(q, dq, k, fixed(dk), last, dg)
    else:
        x, u, Sw, Xw, P = empty(N, M, kind), empty(N, M, kind), empty(N, D, kind), empty(N, D, kind), empty(D, M, kind)
        copied(S, P)
        forward(k, k, v, g, None, beta, P, u, x, one, now)
        scaled(x, beta, u)
        forward(dout, fixed(u), k, by_row(g), by_column(g), None, T, dq, None, one, now)
        product(R, T, last)
        backward_delta(q[::-1], k[::-1], dout[::-1], rev_g, beta[::-1], R, dv[::-1])
        written(dv, x, beta, dbeta)
        copied(S.T, T)
        forward(fixed(dv), fixed(u), k, by_row(g), by_column(g), None, T, Sw, None, one, now)
        forward(fixed(u)[::-1], dout[::-1], q[::-1], by_row(rev_g), by_column(rev_g), None, RT, dk[::-1], None, one, late)
        blank(RT)
        forward(fixed(u)[::-1], fixed(dv)[::-1], k[::-1], by_row(rev_g), by_column(rev_g), None, RT, Xw[::-1], None, one, late)
        key_gradient(u, dv, k, Sw, Xw, dk)
        if g is not None:
            decay_gradient(q, dq, k, fixed(Sw), last, dg)
    if g is not None:
        fade(R, g)


@njit(**options)
def fade(R: Any, g: Any) -> None:
    """Diag(exp(g_1)) R in the place of R."""
    for d in range(R.shape[0]):
        a = np.exp(g[0]) if g.ndim == 1 else np.exp(g[0, d])
        for m in range(R.shape[1]):
            R[d, m] *= a


@njit(**options)
def product(R: Any, T: Any, last: Any) -> None:
    """Σ_m R ⊙ S, T = Sᵀ."""
    for d in range(R.shape[0]):
        for m in range(R.shape[1]):
            last[d] += R[d, m] * T[m, d]


@njit(**options)
def scaled(x: Any, beta: Any, u: Any) -> None:
    """u_t = β_t x_t."""
    for t in range(x.shape[0]):
        for m in range(x.shape[1]):
            u[t, m] = beta[t] * x[t, m]


@njit(**options)
def written(dv: Any, x: Any, beta: Any, dbeta: Any) -> None:
    """dβ_t = du_t·x_t, and w_t = β_t du_t in the place of du_t."""
    for t in range(x.shape[0]):
        s = x.dtype.type(0)
        for m in range(x.shape[1]):
            s += dv[t, m] * x[t, m]
            dv[t, m] *= beta[t]
        dbeta[t] = s


@njit(**options)
def key_gradient(u: Any, w: Any, k: Any, Sw: Any, Xw: Any, dk: Any) -> None:
    """dk = X u - S w + 2 (u·w) k, where dk is X u but for Xw; X u + S w in the place of S w."""
    for t in range(u.shape[0]):
        s = u.dtype.type(0)
        for m in range(u.shape[1]):
            s += u[t, m] * w[t, m]
        for d in range(k.shape[1]):
            Xu, y = dk[t, d] - Xw[t, d], Sw[t, d]
            dk[t, d], Sw[t, d] = Xu - y + 2 * s * k[t, d], Xu + y


@njit(**options)
def decay_gradient(q: Any, dq: Any, k: Any, y: Any, last: Any, dg: Any) -> None:
    """dg_t = dg_{t+1} + q_t ⊙ dq_t - k_t ⊙ y_t from the end, where `last` (D,) stands; dg (N, D), or (N, 1), which gets the sum over the channels."""
    (N, D), everywhere = q.shape, dg.shape[1] == 1
    behind = q.dtype.type(0)
    for d in range(D):
        behind += last[d]
    for t in range(N - 1, -1, -1):
        if everywhere:
            for d in range(D):
                behind += q[t, d] * dq[t, d] - k[t, d] * y[t, d]
            dg[t, 0] = behind
        else:
            for d in range(D):
                last[d] += q[t, d] * dq[t, d] - k[t, d] * y[t, d]
                dg[t, d] = last[d]


# --- attention -------------------------------------------------------------------------------------------------------------------------------

@njit(**options)
def attention_heads(q: Any, k: Any, v: Any, start: Any, start_z: Any, S: Any, z: Any, out: Any, inverse: Any, nq: Any, nk: Any, eps: Any,
                    elu: Any) -> None:
    """`attention` of each query head, the first nq[query] queries and nk[h] keys of it; S (H, D, M) and z (H, D) behind the last of them."""
    groups = q.shape[0] // k.shape[0]
    for h in range(k.shape[0]):
        for query in range(h * groups, (h + 1) * groups):
            n, m = nq[query], nk[h]
            copied(start[h], S[h])
            copied(start_z[h:h + 1], z[h:h + 1])
            attention(q[query, :n], k[h, :m], v[h, :m], S[h], z[h:h + 1], out[query, :n], inverse[query, :n], eps, elu)


@njit(**options)
def attention_backward_heads(q: Any, k: Any, v: Any, out: Any, inverse: Any, dout: Any, start: Any, start_z: Any, R: Any, dz: Any, dq: Any, dk: Any,
                             dv: Any, nq: Any, nk: Any, elu: Any) -> None:
    """R (H, D, M), dz (H, D): cotangents of the states, in place to those of the start. What is behind a length is left as it is."""
    groups, kind, D, M = q.shape[0] // k.shape[0], q.dtype, q.shape[2], v.shape[2]
    S, z, more_R, more_z = empty(D, M, kind), empty(1, D, kind), empty(D, M, kind), empty(1, D, kind)
    for h in range(k.shape[0]):
        m = nk[h]
        for query in range(h * groups, (h + 1) * groups):
            n = nq[query]
            copied(start[h], S)
            copied(start_z[h:h + 1], z)
            if query == h * groups:
                attention_backward(q[query, :n], k[h, :m], v[h, :m], out[query, :n], inverse[query, :n], dout[query, :n], S, z, R[h], dz[h:h + 1],
                                   dq[query, :n], dk[h, :m], dv[h, :m], elu)
            else:
                more_k, more_v = empty(m, D, kind), empty(m, M, kind)
                blank(more_R)
                blank(more_z)
                attention_backward(q[query, :n], k[h, :m], v[h, :m], out[query, :n], inverse[query, :n], dout[query, :n], S, z, more_R, more_z,
                                   dq[query, :n], more_k, more_v, elu)
                summed_up(more_k, dk[h, :m])
                summed_up(more_v, dv[h, :m])
                summed_up(more_R, R[h])
                summed_up(more_z, dz[h:h + 1])
