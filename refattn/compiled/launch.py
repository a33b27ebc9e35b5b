"""Heads of whole arrays given to the compiled loops, on as many threads as there are cores; the backward composed of the same loops.

With f(q, k, v, g; S_0) for the outputs o_t = S_tᵀ q_t of the sum S_t = Diag(exp(g_t)) S_{t-1} + k_t v_tᵀ, rev for the order from the end, and
g⁺_t = g_{t+1} (0 for the last), rule `gated` is transposed by three more sums (`linear`: without g), S_0ᵀ standing for the transposed state,

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

from collections.abc import Callable
from typing import Any

import numpy as np

from .._array import accumulator, cast
from .._blocks import _pool, cores
from ..attention import _keep, _real
from ..features import FEATURE_MAPS, FeatureMap

Residuals = tuple[Any, ...]
WORTH_THREADS = 1 << 14     # numbers in q


_variants: dict[Any, Any] = {}


def run(name: str, *arguments: Any) -> None:
    """The loop of this name in `sweep`, compiled once for each dtype and each pattern of None, whatever the strides."""
    key = (name, arguments[0].dtype, *(None if x is None else type(x) if isinstance(x, int) else x.ndim for x in arguments))
    loop = _variants.get(key)
    if loop is None:
        loop = _variants[key] = _compiled(name, arguments)
    loop(*arguments)


WRITTEN = {"forward": (6, 7, 8), "attention": (3, 4, 5, 6), "backward_delta": (5, 6), "decay_gradient": (4, 5),
           "read_again": (5, 6, 7, 8), "normaliser_gradient": (3, 4, 5, 6)}


def _compiled(name: str, arguments: tuple[Any, ...]) -> Any:
    from numba import njit, types

    from . import sweep
    scalar = getattr(types, arguments[0].dtype.name)
    kinds = (types.none if x is None else types.intp if isinstance(x, int) else scalar if not x.ndim else
             types.Array(scalar, x.ndim, "A", readonly=i not in WRITTEN[name]) for i, x in enumerate(arguments))
    return njit(types.void(*kinds), **sweep.options)(getattr(sweep, name).py_func)


def _sum(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray | None, S: np.ndarray, out: np.ndarray, *, across: bool = False,
         reverse: bool = False) -> None:
    """f of one head, S changed in place. `across`: decays of channels fade the columns of S; `reverse`: rev f(rev …, rev g⁺)."""
    order = slice(None, None, -1 if reverse else 1)
    q, k, v, out, g = q[order], k[order], v[order], out[order], None if g is None else g[order]
    columns = g if across and g is not None and g.ndim == 2 else None
    run("forward", q, k, v, None if columns is not None else g, columns, None, S, out, None, q.dtype.type(1), int(reverse))


def _heads(q: np.ndarray, k: np.ndarray) -> list[list[Any]]:
    """Of each key/value head its index, and those of the query heads that read it."""
    groups = q.shape[-3] // max(k.shape[-3], 1) if q.ndim > 2 else 1
    return [[at, [(*at[:-1], at[-1] * groups + i) if at else () for i in range(groups)]] for at in np.ndindex(k.shape[:-2])]


def _over_heads(work: Callable[[Any, list[Any]], None], q: np.ndarray, k: np.ndarray) -> None:
    """`work` for each key/value head and its query heads: the threads have as many heads each, and hold Numba's code, not Python's lock."""
    heads = _heads(q, k)
    threads = min(cores(), len(heads)) if q.size >= WORTH_THREADS else 1

    def share(i: int) -> None:
        for at, queries in heads[i::threads]:
            work(at, queries)

    if threads < 2:
        share(0)
    else:
        list(_pool(threads).map(share, range(threads)))                             # list: exceptions are raised here


def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray | None, beta: np.ndarray | None,
            state: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """out, state and residuals (the inputs) of `recurrence` with scale 1. Heads of half precision are cast one at a time."""
    acc, shape = accumulator(v.dtype), (*k.shape[:-2], k.shape[-1], v.shape[-1])
    out, end = np.empty((*q.shape[:-1], v.shape[-1]), v.dtype), np.zeros(shape, acc) if state is None else np.array(state, acc)

    def head(at: Any, queries: list[Any]) -> None:
        K, V, G, b = (_wide(x, at, acc) for x in (k, v, g, beta))
        start = end[at].copy()
        for i, query in enumerate(queries):
            O = _room(out, query, acc)
            run("forward", _wide(q, query, acc), K, V, G, None, b, end[at] if i == 0 else start.copy(), O, None, acc.type(1), 0)
            _put(out, query, O)

    _over_heads(head, q, k)
    return out, end, (q, k, v, g, beta, state)


def backward(dout: np.ndarray, dstate: np.ndarray | None, residuals: Residuals) -> tuple[Any, ...]:
    """dq, dk, dv, dg, dbeta, dstate0, each of its array's shape and dtype; see the top of this file."""
    q, k, v, g, beta, state = residuals
    acc, shape = accumulator(v.dtype), (*k.shape[:-2], k.shape[-1], v.shape[-1])
    dq, dk, dv, dg, dbeta = (None if x is None else np.empty(x.shape, x.dtype) for x in (q, k, v, g, beta))
    start = np.zeros(shape, acc) if state is None else np.array(state, acc)
    behind = np.zeros(shape, acc) if dstate is None else np.array(dstate, acc)
    dstart = np.zeros(shape, acc)

    def head(at: Any, queries: list[Any]) -> None:
        K, V, G, b = (_wide(x, at, acc) for x in (k, v, g, beta))
        alone = len(queries) == 1
        dK, dV = ((_room(d, at, acc) if alone else np.zeros(d[at].shape, acc)) for d in (dk, dv))                   # type: ignore[index]
        dG, db = (None if x is None else np.zeros((len(K), x.shape[1] if x.ndim == 2 else 1), acc) for x in (G, b))
        S, X, U = start[at], None, V
        if b is not None:
            X = np.empty(V.shape, acc)
            run("forward", K, K, V, G, None, b, S.copy(), np.empty(V.shape, acc), X, acc.type(1), 0)
            U = b[:, None] * X
        for i, query in enumerate(queries):
            Q, dO, dQ = _wide(q, query, acc), _wide(dout, query, acc), _room(dq, query, acc)
            R = behind[at].copy() if i == 0 else np.zeros_like(S)
            last, T = R.copy(), np.array(S.T, order="C")
            dKi, dVi = (dK, dV) if alone else (np.empty_like(dK), np.empty_like(dV))
            _sum(dO, U, K, G, T, dQ, across=True)
            last *= T.T
            RT = np.array(R.T, order="C")
            if X is None:
                _sum(K, Q, dO, G, R, dVi, reverse=True)
                _sum(V, dO, Q, G, RT, dKi, across=True, reverse=True)
                Y = dKi
            else:
                _delta(Q, K, dO, G, b, R, dVi)                                       # du, then w = β du
                db[:, 0] += np.vecdot(dVi, X)                                        # type: ignore[index]
                dVi *= b[:, None]
                Sw, Xw = np.empty_like(dKi), np.empty_like(dKi)
                _sum(dVi, U, K, G, np.array(S.T, order="C"), Sw, across=True)
                _sum(U, dO, Q, G, RT, dKi, across=True, reverse=True)
                _sum(U, dVi, K, G, np.zeros_like(RT), Xw, across=True, reverse=True)
                dKi -= Xw                                                            # X u
                Y = dKi + Sw
                dKi += 2 * np.vecdot(U, dVi)[:, None] * K - Sw
            if G is not None:
                run("decay_gradient", Q, dQ, K, Y, last.sum(-1), dG)
                R *= np.exp(G[0])[..., None]
            dstart[at] += R
            _put(dq, query, dQ)
            if not alone:
                dK += dKi
                dV += dVi
        for to, x in ((dk, dK), (dv, dV), (dg, None if dG is None or G is None else dG.reshape(G.shape)), (dbeta, None if db is None else db[:, 0])):
            if x is not None:
                _put(to, at, x)

    _over_heads(head, q, k)
    return dq, dk, dv, dg, dbeta, dstart


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: np.ndarray, phi: FeatureMap, eps: float, nq: Any,
           nk: Any) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray | None, np.ndarray | None], Any]]:
    """(out, [S | z], backward) of causal linear attention. elu1 is worked out in the loops; other maps before."""
    elu, acc = phi is FEATURE_MAPS["elu1"], accumulator(v.dtype)
    wide = [_keep(cast(x, acc), _real(n, x, np), np) for x, n in ((q, nq), (k, nk))] if not elu else []
    fq, fk = (q, k) if elu else (_keep(phi.forward(x), _real(n, x, np), np) for x, n in zip(wide, (nq, nk), strict=True))
    out, end, inverse = attention_forward(fq, fk, v, start, elu, eps, nq, nk)

    def backward(dout: np.ndarray | None, dend: np.ndarray | None) -> tuple[np.ndarray, ...]:
        do = np.zeros_like(out) if dout is None else dout
        dq, dk, dv, dstart = attention_backward(do, dend, fq, fk, v, start, out, inverse, elu, nq, nk)
        if not elu:
            dq, dk = (cast(_keep(phi.backward(d, x), _real(n, x, np), np), q.dtype) for d, x, n in zip((dq, dk), wide, (nq, nk), strict=True))
        return dq, dk, dv, dstart

    return out, end, backward


def attention_forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: np.ndarray, elu: bool, eps: float, nq: np.ndarray | None,
                      nk: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """out, [S | z] behind the last position, and 1 / (den + ε), (..., G·H, N), of causal linear attention; φ = elu + 1 or what q and k have behind
    them already. `nq`, `nk`: lengths (..., G·H) and (..., H)."""
    acc, N = accumulator(v.dtype), q.shape[-2]
    out, end, inverse = np.zeros((*q.shape[:-1], v.shape[-1]), v.dtype), np.array(start, acc), np.zeros(q.shape[:-1], acc)

    def head(at: Any, queries: list[Any]) -> None:
        K, V = _wide(k, at, acc), _wide(v, at, acc)
        for i, query in enumerate(queries):
            S, z = np.array(start[at][:, :-1], acc, order="C"), np.array(start[at][:, -1], acc)[None]
            O, n = _room(out, query, acc), N if nq is None else int(nq[query])
            keys = N if nk is None else int(nk[at])
            run("attention", _wide(q, query, acc)[:n], K[:n], V[:n], S, z, O[:n], inverse[query][:n], acc.type(eps), min(keys, n), _flag(elu, acc))
            _put(out, query, O)
            if i == 0:
                if keys > n:                                                         # keys that no query sees are in the state all the same
                    F = FEATURE_MAPS["elu1"].forward(K[n:keys]) if elu else K[n:keys]
                    S += F.T @ V[n:keys]
                    z += F.sum(0)
                end[at][:, :-1], end[at][:, -1] = S, z[0]

    _over_heads(head, q, k)
    return out, end, inverse


def attention_backward(dout: np.ndarray, dend: np.ndarray | None, q: np.ndarray, k: np.ndarray, v: np.ndarray, start: np.ndarray,
                       out: np.ndarray, inverse: np.ndarray, elu: bool, nq: np.ndarray | None, nk: np.ndarray | None) -> tuple[Any, ...]:
    """dq, dk, dv, d[S_0 | z_0]. With G = do / (den + ε) and dden = -(do·out) / (den + ε),

        dφ(q)_t = S_t G_t + z_t dden_t,   dv_t = R_tᵀ φ(k_t),   dφ(k)_t = R_t v_t + r_t,   R_t = dS_N + Σ_{s≥t} φ(q_s) G_sᵀ,   r_t likewise of dden
    """
    acc, (N, D), M = accumulator(v.dtype), q.shape[-2:], v.shape[-1]
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    dstart = np.zeros(start.shape, acc) if dend is None else np.array(dend, acc)

    def head(at: Any, queries: list[Any]) -> None:
        keys, V, K = N if nk is None else int(nk[at]), _wide(v, at, acc), _wide(k, at, acc)
        rows, alone = max([keys, *(N if nq is None else int(nq[query]) for query in queries)]), len(queries) == 1
        Q, F, G, dden, values = np.zeros((rows, D), acc), np.zeros((rows, D), acc), np.zeros((rows, M), acc), np.zeros(rows, acc), V[:rows]
        if keys < rows:
            values = np.zeros((rows, M), acc)
            values[:keys] = V[:keys]
        dK, dV = _room(dk, at, acc)[:rows], _room(dv, at, acc)[:rows]
        sums = (dK, dV) if alone else (np.zeros_like(dK), np.zeros_like(dV))
        for i, query in enumerate(queries):
            n = N if nq is None else int(nq[query])
            Q[n:], G[n:], dden[n:] = 0, 0, 0
            run("read_again", _wide(q, query, acc)[:n], K[:keys], _wide(dout, query, acc)[:n], _wide(out, query, acc)[:n], inverse[query][:n],
                Q, F, G, dden, _flag(elu, acc))
            T, z = np.array(start[at][:, :-1].T, acc, order="C"), np.array(start[at][:, -1], acc)
            R, dz = (np.array(x, acc, order="C") if i == 0 else np.zeros(x.shape, acc) for x in (dstart[at][:, :-1], dstart[at][:, -1]))
            RT, dQ = np.array(R.T, order="C"), _room(dq, query, acc)
            if n < rows:
                dQ = np.empty((rows, D), acc)
            _sum(G, values, F, None, T, dQ[:rows])
            _sum(F, Q, G, None, R, dV, reverse=True)
            _sum(values, G, Q, None, RT, dK, reverse=True)
            run("normaliser_gradient", Q, F, dden, z, dz, dQ[:rows], dK, _flag(elu, acc))
            if not np.may_share_memory(dq, dQ):
                dq[query][:n] = dQ[:n]
            if not alone:
                sums[0][...] += dK
                sums[1][...] += dV
            if i == 0:
                dstart[at][:, :-1], dstart[at][:, -1] = R, dz
            else:
                dstart[at][:, :-1] += R
                dstart[at][:, -1] += dz
        dk[at][:keys], dv[at][:keys] = sums[0][:keys], sums[1][:keys]                # to themselves, where they are in place
        dk[at][keys:], dv[at][keys:] = 0, 0

    _over_heads(head, q, k)
    return dq, dk, dv, dstart


def _flag(chosen: bool, acc: Any) -> Any:
    return acc.type(1) if chosen else None


def _delta(q: np.ndarray, k: np.ndarray, dout: np.ndarray, g: np.ndarray | None, beta: np.ndarray, R: np.ndarray, du: np.ndarray) -> None:
    run("backward_delta", *(None if x is None else x[::-1] for x in (q, k, dout, g, beta)), R, du[::-1])


def _wide(x: Any, at: Any, acc: Any) -> Any:
    """One head, in the accumulator dtype and native byte order, aligned."""
    return None if x is None else x[at].astype(acc, copy=not x.flags.aligned)


def _room(x: Any, at: Any, acc: Any) -> np.ndarray:
    """Where one head is written: its own place, or where it waits to be rounded."""
    return x[at] if x.dtype == acc else np.empty(x[at].shape, acc)


def _put(x: Any, at: Any, found: np.ndarray) -> None:
    if not np.may_share_memory(x, found):
        x[at] = found
