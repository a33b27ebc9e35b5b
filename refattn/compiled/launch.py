"""Whole arrays given to the compiled loops: a share of the heads for each thread, half precisions cast a head at a time."""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from .._array import accumulator, cast
from .._blocks import _pool, cores
from ..attention import State, _keep, _real
from ..features import FEATURE_MAPS, FeatureMap

Residuals = tuple[Any, ...]
WORTH_THREADS = 1 << 14     # numbers in q
WRITTEN = {"forward_heads": (6, 7), "backward_heads": (7, 8, 9, 10, 11, 12), "attention_heads": (5, 6, 7, 8),
           "attention_backward_heads": (8, 9, 10, 11, 12), "step_heads": (6, 7), "attention_step_heads": (5, 6, 7, 8),
           "decoded": (1, 2, 4)}
_variants: dict[Any, Any] = {}


def run(name: str, *arguments: Any) -> None:
    """The loop of this name in `heads`, `step` or `model`, compiled once for each dtype and each pattern of None, whatever the strides."""
    key = (name, arguments[0].dtype, *(None if x is None else x.ndim for x in arguments))
    loop = _variants.get(key)
    if loop is None:
        loop = _variants[key] = _compiled(name, arguments)
    loop(*arguments)


def _compiled(name: str, arguments: tuple[Any, ...]) -> Any:
    """As `njit(signature, cache=True)` does it, but what is kept on disk is of all our sources, not of one file alone."""
    from numba import from_dtype, njit, types
    from numba.core.caching import FunctionCache

    from . import heads, model, step
    from .tiles import options

    class Cache(FunctionCache):                                                       # type: ignore[misc]
        def _index_key(self, signature: Any, codegen: Any) -> Any:
            return (*super()._index_key(signature, codegen), _sources())

    kinds = (types.none if x is None else from_dtype(x.dtype) if not x.ndim else
             types.Array(from_dtype(x.dtype), x.ndim, "A", readonly=i not in WRITTEN[name]) for i, x in enumerate(arguments))
    loop = njit(**options)(next(getattr(home, name) for home in (heads, step, model) if hasattr(home, name)).py_func)
    loop._cache = Cache(loop.py_func)
    loop.compile(types.void(*kinds))
    loop.disable_compile()
    return loop


@cache
def _sources() -> str:
    return sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def _over_heads(work: Callable[[slice, slice], None], q: np.ndarray, k: np.ndarray, cast_one: bool) -> None:
    """`work(key/value heads, the query heads that read them)` on as many threads as there are cores, which hold Numba's code, not Python's lock."""
    H, groups = k.shape[0], q.shape[0] // max(k.shape[0], 1)
    threads = min(cores(), H) if q.size >= WORTH_THREADS else 1
    share = 1 if cast_one else -(-H // threads)
    shares = [(slice(h, h + share), slice(h * groups, (h + share) * groups)) for h in range(0, H, share)]
    if threads < 2:
        for heads in shares:
            work(*heads)
    else:
        others = [_pool(threads).submit(work, *heads) for heads in shares[1:]]
        work(*shares[0])                                                            # by this thread, which would only wait
        for other in others:
            other.result()


def _flat(x: Any, axes: int) -> Any:
    """All leading axes as one: a view where strides allow it, as those of a fresh array do."""
    return x if x is None or x.ndim == axes + 1 else x.reshape(math.prod(x.shape[:x.ndim - axes]), *x.shape[x.ndim - axes:])


def _wide(x: Any, at: slice, acc: Any) -> Any:
    """Some heads in the accumulator dtype and native byte order, aligned."""
    return None if x is None else x[at].astype(acc, copy=not x.flags.aligned)


def _room(x: Any, at: slice, acc: Any) -> Any:
    """Where they are written: their own place, or where they wait to be rounded."""
    return None if x is None else x[at] if x.dtype == acc else np.zeros(x[at].shape, acc)


def _put(x: Any, at: slice, found: Any) -> None:
    if x is not None and x.dtype != found.dtype:
        x[at] = found


def forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray | None, beta: np.ndarray | None,
            state: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """out, state and residuals (the inputs) of `recurrence` with scale 1."""
    acc, out = accumulator(v.dtype), np.empty((*q.shape[:-1], v.shape[-1]), v.dtype)
    start, end = _start(k, v, state, acc), np.empty((*k.shape[:-2], k.shape[-1], v.shape[-1]), acc)
    Q, K, V, G, b, S, E, O = _flats(k.ndim - 2, q, k, v, g, beta, start, end, out)

    def work(keys: slice, queries: slice) -> None:
        here = _room(O, queries, acc)
        run("forward_heads", _wide(Q, queries, acc), *(_wide(x, keys, acc) for x in (K, V, G, b)), S[keys], E[keys], here, acc.type(1))
        _put(O, queries, here)

    _over_heads(work, Q, K, acc != v.dtype)
    return out, end, (q, k, v, g, beta, state)


def backward(dout: np.ndarray, dstate: np.ndarray | None, residuals: Residuals) -> tuple[Any, ...]:
    """dq, dk, dv, dg, dbeta, dstate0, each of its array's shape and dtype; see `heads`."""
    q, k, v, g, beta, state = residuals
    acc = accumulator(v.dtype)
    dq, dk, dv, dg, dbeta = (None if x is None else np.empty(x.shape, x.dtype) for x in (q, k, v, g, beta))
    start, dstart = _start(k, v, state, acc), np.array(_start(k, v, dstate, acc), order="C")     # for `_flats` to make views of
    Q, K, V, G, b, dO, S, R, dQ, dK, dV, dG, db = _flats(k.ndim - 2, q, k, v, g, beta, dout, start, dstart, dq, dk, dv, dg, dbeta)
    if dG is not None and dG.ndim == 2:
        dG = dG[..., None]

    def work(keys: slice, queries: slice) -> None:
        rooms = [_room(dQ, queries, acc), *(_room(x, keys, acc) for x in (dK, dV, dG, db))]
        run("backward_heads", _wide(Q, queries, acc), *(_wide(x, keys, acc) for x in (K, V, G, b)), _wide(dO, queries, acc), S[keys], R[keys], *rooms)
        for x, at, found in zip((dQ, dK, dV, dG, db), (queries, keys, keys, keys, keys), rooms, strict=True):
            _put(x, at, found)

    _over_heads(work, Q, K, acc != v.dtype)
    return dq, dk, dv, dg, dbeta, dstart


def forward_step(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray | None, beta: np.ndarray | None,
                 state: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """`forward` of one position, arrays without its axis; the residuals are for `backward`, with that axis."""
    acc, out = accumulator(v.dtype), np.empty((*q.shape[:-1], v.shape[-1]), v.dtype)
    start, end = _start(k[..., None, :], v[..., None, :], state, acc), np.empty((*k.shape, v.shape[-1]), acc)
    Q, K, V, G, b, S, E, O = _flats(k.ndim - 1, q, k, v, g, beta, start, end, out)
    G = G[:, None] if G is not None and G.ndim == 1 else G

    def work(keys: slice, queries: slice) -> None:
        here = _room(O, queries, acc)
        run("step_heads", _wide(Q, queries, acc), *(_wide(x, keys, acc) for x in (K, V, G, b)), S[keys], E[keys], here, acc.type(1))
        _put(O, queries, here)

    _over_heads(work, Q, K, cast_one=False)
    at = (None if x is None else x[..., None, :] if x.ndim == k.ndim else x[..., None] for x in (q, k, v, g, beta))
    return out, end, (*at, state)


def decoder(products: list[tuple[np.ndarray, np.ndarray]], states: tuple[State, ...], eps_norm: float, eps: float,
            activation: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function of x (B, E), what a model has read, that gives its logits and goes on in copies of `states`, S (B, H, D, M) and z (B, H, D). Of its
    products (W, b) in the order of their use the last is the head."""
    from .model import padded_states, packed
    S, z = padded_states(states)
    weights, kind, outputs, inner = packed(products), z.dtype.type, len(products[-1][1]), len(products[2][1])

    def decode(x: np.ndarray) -> np.ndarray:
        out = np.empty((len(x), outputs), x.dtype)
        threads = min(cores(), len(x)) if x.size >= WORTH_THREADS // 4 else 1
        share = -(-len(x) // threads)

        def work(some: slice) -> None:
            run("decoded", x[some], S[:, some], z[:, some], weights, out[some], np.intp(inner), kind(eps_norm), kind(eps),
                kind(1) if activation == "gelu" else None)

        others = [_pool(threads).submit(work, slice(b, b + share)) for b in range(share, len(x), share)]
        work(slice(0, share))
        for other in others:
            other.result()
        return out

    return decode


def attend_step(q: np.ndarray, k: np.ndarray, v: np.ndarray, state: State, phi: FeatureMap,
                eps: float) -> tuple[tuple[np.ndarray, State], Callable[[np.ndarray | None, State | None], Any]]:
    """((out, state), backward) of one position of causal linear attention."""
    elu, acc = phi is FEATURE_MAPS["elu1"], accumulator(v.dtype)
    q_wide, k_wide = (cast(x, acc) for x in (q, k))
    fq, fk = (q, k) if elu else (cast(phi.forward(x), acc) for x in (q_wide, k_wide))
    out, S, z, inverse = attention_step(fq, fk, v, *state, elu, eps)

    def backward(dout: np.ndarray | None, dend: State | None) -> tuple[np.ndarray, ...]:
        do = np.zeros_like(out) if dout is None else dout
        start = np.concatenate([state.S, state.z[..., None]], -1)
        d_end = None if dend is None else np.concatenate([dend.S, dend.z[..., None]], -1)
        do, Q, K, V, o = (x[..., None, :] for x in (do, fq, fk, v, out))
        *d, dstart = attention_backward(do, d_end, Q, K, V, start, o, inverse[..., None], elu, None, None)
        dq, dk, dv = (x[..., 0, :] for x in d)
        if not elu:
            dq, dk = (cast(phi.backward(d, x), q.dtype) for d, x in ((dq, q_wide), (dk, k_wide)))
        return dq, dk, dv, dstart

    return (out, State(S, z)), backward


def attention_step(q: np.ndarray, k: np.ndarray, v: np.ndarray, S: np.ndarray, z: np.ndarray, elu: bool,
                   eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """out, S, z and 1 / (den + ε) of one position of causal linear attention, from S and z in the accumulator dtype."""
    acc, out = accumulator(v.dtype), np.empty((*q.shape[:-1], v.shape[-1]), v.dtype)
    S, z = (x.astype(acc, copy=not x.flags.aligned) for x in (S, z))
    after, z_after, inverse = np.empty(S.shape, acc), np.empty(z.shape, acc), np.empty(q.shape[:-1], acc)
    Q, K, V, O, S0, z0, E, e, den = _flats(k.ndim - 1, q, k, v, out, S, z, after, z_after, inverse)

    def work(keys: slice, queries: slice) -> None:
        here = _room(O, queries, acc)
        run("attention_step_heads", _wide(Q, queries, acc), _wide(K, keys, acc), _wide(V, keys, acc), S0[keys], z0[keys], E[keys], e[keys], here,
            den[queries], acc.type(eps), acc.type(1) if elu else None)
        _put(O, queries, here)

    _over_heads(work, Q, K, cast_one=False)
    return out, after, z_after, inverse


def _start(k: np.ndarray, v: np.ndarray, state: np.ndarray | None, acc: Any) -> np.ndarray:
    return np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), acc) if state is None else state.astype(acc, copy=not state.flags.aligned)


def _flats(lead: int, *arrays: Any) -> list[Any]:
    """Each array with one axis for the `lead` axes before a head's; of arrays without heads, one head."""
    return [_flat(x, x.ndim - lead) if x is not None else None for x in arrays]


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
    acc = accumulator(v.dtype)
    out, end, inverse = _unset((*q.shape[:-1], v.shape[-1]), v.dtype, nq), np.empty(start.shape, acc), np.empty(q.shape[:-1], acc)
    Q, K, V, O, S, E, den = _flats(k.ndim - 2, q, k, v, out, start.astype(acc, copy=False), end, inverse)
    lengths_q, lengths_k = _lengths(nq, Q), _lengths(nk, K)

    def work(keys: slice, queries: slice) -> None:
        here = _room(O, queries, acc)
        run("attention_heads", _wide(Q, queries, acc), _wide(K, keys, acc), _wide(V, keys, acc), S[keys, :, :-1], S[keys, :, -1], E[keys, :, :-1],
            E[keys, :, -1], here, den[queries], lengths_q[queries], lengths_k[keys], acc.type(eps), acc.type(1) if elu else None)
        _put(O, queries, here)

    _over_heads(work, Q, K, acc != v.dtype)
    return out, end, inverse


def attention_backward(dout: np.ndarray, dend: np.ndarray | None, q: np.ndarray, k: np.ndarray, v: np.ndarray, start: np.ndarray,
                       out: np.ndarray, inverse: np.ndarray, elu: bool, nq: np.ndarray | None, nk: np.ndarray | None) -> tuple[Any, ...]:
    """dq, dk, dv, d[S_0 | z_0], see `refattn.compiled.attention`."""
    acc = accumulator(v.dtype)
    dq, dk, dv = (_unset(x.shape, x.dtype, n) for x, n in ((q, nq), (k, nk), (v, nk)))
    dstart = np.zeros(start.shape, acc) if dend is None else np.array(dend, acc, order="C")
    Q, K, V, O, S, R, den, dO, dQ, dK, dV = _flats(k.ndim - 2, q, k, v, out, start.astype(acc, copy=False), dstart, inverse, dout, dq, dk, dv)
    lengths_q, lengths_k = _lengths(nq, Q), _lengths(nk, K)

    def work(keys: slice, queries: slice) -> None:
        rooms = [_room(dQ, queries, acc), _room(dK, keys, acc), _room(dV, keys, acc)]
        run("attention_backward_heads", _wide(Q, queries, acc), _wide(K, keys, acc), _wide(V, keys, acc), _wide(O, queries, acc), den[queries],
            _wide(dO, queries, acc), S[keys, :, :-1], S[keys, :, -1], R[keys, :, :-1], R[keys, :, -1], *rooms, lengths_q[queries], lengths_k[keys],
            acc.type(1) if elu else None)
        for x, at, found in zip((dQ, dK, dV), (queries, keys, keys), rooms, strict=True):
            _put(x, at, found)

    _over_heads(work, Q, K, acc != v.dtype)
    return dq, dk, dv, dstart


def _unset(shape: tuple[int, ...], dtype: Any, lengths: Any) -> np.ndarray:
    """Room for results, zeros where there are lengths, behind which nothing is written."""
    return np.empty(shape, dtype) if lengths is None else np.zeros(shape, dtype)


def _lengths(n: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    return np.full(x.shape[0], x.shape[1], np.intp) if n is None else n.reshape(-1).astype(np.intp)
