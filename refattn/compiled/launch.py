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


def _over_heads(work: Callable[..., None], lead: int, cast_one: bool, *arrays: Any) -> None:
    """`work(key/value heads, the query heads that read them, *arrays)`, arrays (q, k, …) with one axis of heads for the `lead` axes that they have,
    on as many threads as there are cores, which hold Numba's code, not Python's lock. With `cast_one`, a head at a time."""
    parts = _parts(lead, arrays)
    threads = min(cores(), sum(k.shape[0] for _, k, *_ in parts)) if arrays[0].size >= WORTH_THREADS else 1
    shares = []
    for q, k, *others in parts:
        H, groups = k.shape[0], q.shape[0] // max(k.shape[0], 1)
        most = 1 if cast_one else -(-H // (threads if len(parts) < threads else 1))
        shares += [(slice(h, h + most), slice(h * groups, (h + most) * groups), q, k, *others) for h in range(0, H, most)]

    def some(first: int) -> None:
        for share in shares[first::threads]:
            work(*share)

    others = [_pool(threads).submit(some, i) for i in range(1, threads)]
    some(0)                                                                             # by this thread, which would only wait
    for other in others:
        other.result()


def _parts(lead: int, arrays: tuple[Any, ...]) -> list[list[Any]]:
    """Views of the arrays with one axis for the `lead` axes before a head's: one of each where strides allow it, as those of fresh arrays do; else,
    as where heads stand beside one another in a row, one for each index but that of heads."""
    if lead < 2:
        return [list(arrays) if lead else [None if x is None else x[None] for x in arrays]]
    shape = arrays[0].shape[:lead - 1]
    try:
        return [[None if x is None else x.reshape(math.prod(x.shape[:lead]), *x.shape[lead:], copy=False) for x in arrays]]
    except ValueError:
        return [[None if x is None else x[index] for x in arrays] for index in np.ndindex(shape)]


def _ordered_like(x: np.ndarray, shape: tuple[int, ...], dtype: Any, fill: bool = False) -> np.ndarray:
    """Room for results, axes in the order in which they stand in the memory of x: of heads side by side in a row, results are too."""
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    room = (np.zeros if fill else np.empty)([shape[axis] for axis in order], dtype)
    return room.transpose(np.argsort(order))


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
    acc, out = accumulator(v.dtype), _ordered_like(q, (*q.shape[:-1], v.shape[-1]), v.dtype)
    start, end = _start(k, v, state, acc), np.empty((*k.shape[:-2], k.shape[-1], v.shape[-1]), acc)

    def work(keys: slice, queries: slice, Q: Any, K: Any, V: Any, G: Any, b: Any, S: Any, E: Any, O: Any) -> None:
        here = _room(O, queries, acc)
        run("forward_heads", _wide(Q, queries, acc), *(_wide(x, keys, acc) for x in (K, V, G, b)), S[keys], E[keys], here, acc.type(1))
        _put(O, queries, here)

    _over_heads(work, k.ndim - 2, acc != v.dtype, q, k, v, g, beta, start, end, out)
    return out, end, (q, k, v, g, beta, state)


def backward(dout: np.ndarray, dstate: np.ndarray | None, residuals: Residuals) -> tuple[Any, ...]:
    """dq, dk, dv, dg, dbeta, dstate0, each of its array's shape and dtype; see `heads`."""
    q, k, v, g, beta, state = residuals
    acc = accumulator(v.dtype)
    dq, dk, dv, dg, dbeta = (None if x is None else _ordered_like(x, x.shape, x.dtype) for x in (q, k, v, g, beta))
    start, dstart = _start(k, v, state, acc), np.array(_start(k, v, dstate, acc))

    def work(keys: slice, queries: slice, Q: Any, K: Any, V: Any, G: Any, b: Any, dO: Any, S: Any, R: Any, dQ: Any, dK: Any, dV: Any, dG: Any,
             db: Any) -> None:
        rooms = [_room(dQ, queries, acc), *(_room(x, keys, acc) for x in (dK, dV, dG, db))]
        run("backward_heads", _wide(Q, queries, acc), *(_wide(x, keys, acc) for x in (K, V, G, b)), _wide(dO, queries, acc), S[keys], R[keys], *rooms)
        for x, at, found in zip((dQ, dK, dV, dG, db), (queries, keys, keys, keys, keys), rooms, strict=True):
            _put(x, at, found)

    _over_heads(work, k.ndim - 2, acc != v.dtype, q, k, v, g, beta, dout, start, dstart, dq, dk, dv,
                dg[..., None] if dg is not None and dg.ndim < k.ndim else dg, dbeta)
    return dq, dk, dv, dg, dbeta, dstart


def forward_step(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray | None, beta: np.ndarray | None,
                 state: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, Residuals]:
    """`forward` of one position, arrays without its axis; the residuals are for `backward`, with that axis."""
    acc, out = accumulator(v.dtype), np.empty((*q.shape[:-1], v.shape[-1]), v.dtype)
    start, end = _start(k[..., None, :], v[..., None, :], state, acc), np.empty((*k.shape, v.shape[-1]), acc)

    def work(keys: slice, queries: slice, Q: Any, K: Any, V: Any, G: Any, b: Any, S: Any, E: Any, O: Any) -> None:
        here = _room(O, queries, acc)
        run("step_heads", _wide(Q, queries, acc), *(_wide(x, keys, acc) for x in (K, V, G, b)), S[keys], E[keys], here, acc.type(1))
        _put(O, queries, here)

    _over_heads(work, k.ndim - 1, False, q, k, v, g[..., None] if g is not None and g.ndim < k.ndim else g, beta, start, end, out)
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

    def work(keys: slice, queries: slice, Q: Any, K: Any, V: Any, O: Any, S0: Any, z0: Any, E: Any, e: Any, den: Any) -> None:
        here = _room(O, queries, acc)
        run("attention_step_heads", _wide(Q, queries, acc), _wide(K, keys, acc), _wide(V, keys, acc), S0[keys], z0[keys], E[keys], e[keys], here,
            den[queries], acc.type(eps), acc.type(1) if elu else None)
        _put(O, queries, here)

    _over_heads(work, k.ndim - 1, False, q, k, v, out, S, z, after, z_after, inverse)
    return out, after, z_after, inverse


def _start(k: np.ndarray, v: np.ndarray, state: np.ndarray | None, acc: Any) -> np.ndarray:
    return np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), acc) if state is None else state.astype(acc, copy=not state.flags.aligned)


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
    out = _ordered_like(q, (*q.shape[:-1], v.shape[-1]), v.dtype, nq is not None)
    end, inverse = np.empty(start.shape, acc), np.empty(q.shape[:-1], acc)

    def work(keys: slice, queries: slice, Q: Any, K: Any, V: Any, O: Any, S: Any, E: Any, den: Any, lengths_q: Any, lengths_k: Any) -> None:
        here = _room(O, queries, acc)
        run("attention_heads", _wide(Q, queries, acc), _wide(K, keys, acc), _wide(V, keys, acc), S[keys, :, :-1], S[keys, :, -1], E[keys, :, :-1],
            E[keys, :, -1], here, den[queries], lengths_q[queries], lengths_k[keys], acc.type(eps), acc.type(1) if elu else None)
        _put(O, queries, here)

    _over_heads(work, k.ndim - 2, acc != v.dtype, q, k, v, out, start.astype(acc, copy=False), end, inverse, _lengths(nq, q), _lengths(nk, k))
    return out, end, inverse


def attention_backward(dout: np.ndarray, dend: np.ndarray | None, q: np.ndarray, k: np.ndarray, v: np.ndarray, start: np.ndarray,
                       out: np.ndarray, inverse: np.ndarray, elu: bool, nq: np.ndarray | None, nk: np.ndarray | None) -> tuple[Any, ...]:
    """dq, dk, dv, d[S_0 | z_0], see `refattn.compiled.attention`."""
    acc = accumulator(v.dtype)
    dq, dk, dv = (_ordered_like(x, x.shape, x.dtype, n is not None) for x, n in ((q, nq), (k, nk), (v, nk)))
    dstart = np.zeros(start.shape, acc) if dend is None else np.array(dend, acc)

    def work(keys: slice, queries: slice, Q: Any, K: Any, V: Any, O: Any, S: Any, R: Any, den: Any, dO: Any, dQ: Any, dK: Any, dV: Any,
             lengths_q: Any, lengths_k: Any) -> None:
        rooms = [_room(dQ, queries, acc), _room(dK, keys, acc), _room(dV, keys, acc)]
        run("attention_backward_heads", _wide(Q, queries, acc), _wide(K, keys, acc), _wide(V, keys, acc), _wide(O, queries, acc), den[queries],
            _wide(dO, queries, acc), S[keys, :, :-1], S[keys, :, -1], R[keys, :, :-1], R[keys, :, -1], *rooms, lengths_q[queries], lengths_k[keys],
            acc.type(1) if elu else None)
        for x, at, found in zip((dQ, dK, dV), (queries, keys, keys), rooms, strict=True):
            _put(x, at, found)

    _over_heads(work, k.ndim - 2, acc != v.dtype, q, k, v, out, start.astype(acc, copy=False), dstart, inverse, dout, dq, dk, dv,
                _lengths(nq, q), _lengths(nk, k))
    return dq, dk, dv, dstart


def _lengths(n: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    return np.full(x.shape[:-2], x.shape[-2], np.intp) if n is None else np.broadcast_to(n, x.shape[:-2]).astype(np.intp)
