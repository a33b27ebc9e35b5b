"""Linear attention as the paper defines it: the feature map φ and the normaliser around a bare product.

    V'_i = φ(q_i)ᵀ S_i / (φ(q_i)ᵀ z_i + ε)      S_i = Σ_{j≤i} φ(k_j) v_jᵀ      z_i = Σ_{j≤i} φ(k_j)         eq. (12); all j: eq. (5)

**Numerator and denominator are one product.** A column of ones beside V gives [S | z] as one state and [num | den] as one output:

    [num_i | den_i] = f(φ(q), φ(k), [v | 1]; [S_0 | z_0])          out_i = num_i / (den_i + ε)

**Backward.** With do the cotangent of out, the quotient's transpose is one more column:

    G_i = [ do_i / (den_i + ε)  |  -(do_i · out_i) / (den_i + ε) ]
    dφ(q), dφ(k), [dv | ·], [dS_0 | dz_0] = the transpose of f at G         then dq = φ'(q)ᵀ dφ(q), dk = φ'(k)ᵀ dφ(k)

f is `causal.running_product` or `linear.full_product`; both are closed under their own transpose, so the same lines serve both: with
S the running sum of φ(k) [v | 1]ᵀ and R that of φ(q) Gᵀ from behind,

    den = the last column of Sᵀ φ(q)     dφ(q) = S G     dv = Rᵀ φ(k)     dφ(k) = R [v | 1]     [dS_0 | dz_0] = R_1
A denominator of exactly 0 (no keys at all, ε = 0) defines a row of zeros with zero gradients.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._array import (Array, Axes, accumulator, cast, check_compiled, check_cotangent, check_dtypes, check_lengths, check_number, check_qkv,
                     check_shape, check_wide_dtype, dtype_name, namespace)
from ._blocks import Reader, reader, real_rows, split_groups
from .causal import (CHUNK, Store, causal_scan_backward, causal_scan_forward, causal_step, causal_step_backward, each_stack,
                     running_product, sizes, writer)
from .features import FEATURE_MAPS, FeatureMap, feature_map as find_feature_map, feature_size
from .linear import full_product, linear_backward, linear_forward

Pullback = Callable[..., tuple[Any, ...]]


class State(NamedTuple):
    """What the past leaves behind: S (..., H, F, M) = Σ φ(k_j) v_jᵀ (eq. (10)) and z (..., H, F) = Σ φ(k_j) (eq. (11)).

    In the accumulator dtype: float32 for float16 and bfloat16 inputs."""

    S: Array
    z: Array


# --- the public functions -----------------------------------------------------------------------------------------------------------

def linear_attention(q: Array, k: Array, v: Array, *, feature_map: Any = "elu1", causal: bool = False, eps: float = 1e-6,
                     query_lengths: Any = None, key_lengths: Any = None, compiled: bool = False) -> Array:
    """Linear attention: V'_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_j φ(k_j) + ε), eq. (4), (5); `causal`: j ≤ i, eq. (8), (9).

    Parameters
    ----------
    q : (..., G·H, N, D)
    k : (..., H, L, D)
    v : (..., H, L, M)
        float16, bfloat16, float32 or float64, all of one dtype. H key/value heads; query head h reads key/value head h // G.
    feature_map : str or pair of functions
        φ: a name from `refattn.features`, or (forward, backward) with y = forward(x), dx = backward(dy, x).
    causal : bool
        Position i sees keys j ≤ i only; needs N == L.
    eps : float
        ε ≥ 0 in the denominator.
    query_lengths, key_lengths : integers, optional
        Real positions per sequence, shape (B,) or any first part of the leading axes. Padded queries give rows of zeros; what stands
        in padding, NaN included, reaches no output and no gradient.
    compiled : bool
        True: causal sums of NumPy arrays go to loops that Numba compiles (extra `numba`), see `refattn.compiled`.

    Returns
    -------
    out : (..., G·H, N, M), in the inputs' dtype; sums are kept in float32 (float64 for float64).

    Raises
    ------
    ValueError
        For shapes that disagree ("k: expected (..., Hkv, L, D) = …, got …: q and k must share D"), lengths out of range, an unknown
        feature map, eps < 0.
    TypeError
        For arrays that are not arrays, of different libraries, of different dtypes or not real floats.

    Notes
    -----
    O((N + L)·F·M) flops, F the features of φ; causal O(N·F·M + N·C·(F + M)). Extra memory does not grow with N or L.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((2, 3)), np.zeros((2, 3)), np.array([[1.0], [3.0]])
    >>> linear_attention(q, k, v, eps=0).ravel(), linear_attention(q, k, v, eps=0, causal=True).ravel()
    (array([2., 2.]), array([1., 2.]))
    """
    return _linear(q, k, v, feature_map, causal, eps, query_lengths, key_lengths, compiled=compiled)[0]


def linear_attention_vjp(q: Array, k: Array, v: Array, *, feature_map: Any = "elu1", causal: bool = False, eps: float = 1e-6,
                         query_lengths: Any = None, key_lengths: Any = None, compiled: bool = False) -> tuple[Array, Pullback]:
    """`linear_attention` and its pullback: dout -> (dq, dk, dv); see `refattn.vjp`."""
    out, _, backward = _linear(q, k, v, feature_map, causal, eps, query_lengths, key_lengths, compiled=compiled)

    def pullback(dout: Array | None) -> tuple[Array, Array, Array]:
        check_cotangent("dout", dout, out)
        dq, dk, dv, _ = backward(dout, None)
        return dq, dk, dv

    return out, pullback


def causal_linear_attention(q: Array, k: Array, v: Array, state: State | None = None, *, feature_map: Any = "elu1", eps: float = 1e-6,
                            compiled: bool = False) -> tuple[Array, State]:
    """Causal linear attention that starts from a state and returns the next one: prefill, streaming, the RNN view. Eq. (8) to (12).

    Parameters
    ----------
    q : (..., G·H, N, D)
    k : (..., H, N, D)
    v : (..., H, N, M)
    state : State, optional
        S (..., H, F, M) and z (..., H, F): what preceded position 0, as an earlier call returned it. None: nothing.
    feature_map, eps, compiled
        As in `linear_attention`.

    Returns
    -------
    out : (..., G·H, N, M), in the inputs' dtype
    state : State
        Pass it on to continue: the whole sequence, the sequence split anywhere, and `causal_linear_attention_step` position by position
        give the same answer. The given state is never changed.

    Raises
    ------
    ValueError, TypeError
        As in `linear_attention`, and for a state of the wrong kind, shape or dtype.

    Notes
    -----
    4·N·F·M + 2·N·C·(F + M) flops a head; extra memory does not grow with N, in the backward neither.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.zeros((2, 3)), np.zeros((2, 3)), np.array([[1.0], [3.0]])
    >>> out, state = causal_linear_attention(q, k, v, eps=0)
    >>> out.ravel(), state.z
    (array([1., 2.]), array([2., 2., 2.]))
    """
    out, end, _ = _causal(q, k, v, state, feature_map, eps, compiled)
    return out, end


def causal_linear_attention_vjp(q: Array, k: Array, v: Array, state: State | None = None, *, feature_map: Any = "elu1", eps: float = 1e-6,
                                compiled: bool = False) -> tuple[tuple[Array, State], Pullback]:
    """`causal_linear_attention` and its pullback: (dout, dstate) -> (dq, dk, dv, dstate0); see `refattn.vjp`."""
    out, end, backward = _causal(q, k, v, state, feature_map, eps, compiled)

    def pullback(dout: Array | None, dstate: Any = None) -> tuple[Array, Array, Array, State | None]:
        check_cotangent("dout", dout, out)
        return backward(dout, _check_state_cotangent(dstate, end))

    return (out, end), pullback


def causal_linear_attention_step(q_t: Array, k_t: Array, v_t: Array, state: State | None = None, *, feature_map: Any = "elu1",
                                 eps: float = 1e-6, compiled: bool = False) -> tuple[Array, State]:
    """One position of `causal_linear_attention`: S ← S + φ(k) vᵀ, z ← z + φ(k), out = Sᵀφ(q) / (zᵀφ(q) + ε). Eq. (16) to (19).

    Parameters
    ----------
    q_t : (..., G·H, D)
    k_t : (..., H, D)
    v_t : (..., H, M)
    state : State, optional
        As returned by the previous step or by `causal_linear_attention`; None: nothing precedes. Never changed.
    feature_map, eps, compiled
        As in `linear_attention`.

    Returns
    -------
    out_t : (..., G·H, M)
    state : State

    Raises
    ------
    ValueError, TypeError
        As in `causal_linear_attention`.

    Notes
    -----
    O(F·M) time and memory a head, whatever the position.

    Examples
    --------
    >>> import numpy as np
    >>> state = None
    >>> for x in (1.0, 3.0): out, state = causal_linear_attention_step(np.zeros(3), np.zeros(3), np.array([x]), state, eps=0)
    >>> out
    array([2.])
    """
    xp, axes, phi, eps, state = _check_step(q_t, k_t, v_t, state, feature_map, eps, compiled)
    acc = accumulator(v_t.dtype)
    if compiled and q_t.size and v_t.size:
        from .compiled.launch import attend_step
        return attend_step(q_t, k_t, v_t, state, phi, eps)[0]
    if phi in _FUSED and has_kernels(xp, axes.D, axes.M):
        from .cuda import launch
        out, *new = launch.causal_step(xp, q_t, k_t, v_t, *state, feature=_FUSED[phi], normalised=True, eps=eps)
        return out, State(*new)
    fq, fk, v = phi.forward(cast(q_t, acc)), phi.forward(cast(k_t, acc)), cast(v_t, acc)
    out, end, _ = _step(fq, fk, v, state, axes, eps, xp)
    return cast(out, v_t.dtype), end


def causal_linear_attention_step_vjp(q_t: Array, k_t: Array, v_t: Array, state: State | None = None, *, feature_map: Any = "elu1",
                                     eps: float = 1e-6, compiled: bool = False) -> tuple[tuple[Array, State], Pullback]:
    """`causal_linear_attention_step` and its pullback: (dout_t, dstate) -> (dq_t, dk_t, dv_t, dstate0); see `refattn.vjp`."""
    xp, axes, phi, eps, before = _check_step(q_t, k_t, v_t, state, feature_map, eps, compiled)
    acc = accumulator(v_t.dtype)
    if compiled and q_t.size and v_t.size:
        from .compiled.launch import attend_step
        outputs, backward = attend_step(q_t, k_t, v_t, before, phi, eps)

        def loops(dout: Array | None, dstate: Any = None) -> tuple[Array, Array, Array, State | None]:
            check_cotangent("dout_t", dout, outputs[0])
            *d, dstart = backward(dout, _check_state_cotangent(dstate, outputs[1]))
            return *d, None if state is None else _state_like(dstart, State(*state), xp)

        return outputs, loops
    q, k, v = (cast(x, acc) for x in (q_t, k_t, v_t))
    fq, fk = phi.forward(q), phi.forward(k)
    out, end, inverse = _step(fq, fk, v, before, axes, eps, xp)

    def pullback(dout: Array | None, dstate: Any = None) -> tuple[Array, Array, Array, State | None]:
        check_cotangent("dout_t", dout, out if out.dtype == v_t.dtype else cast(out, v_t.dtype))
        dstate = _check_state_cotangent(dstate, end)
        do = xp.zeros_like(out) if dout is None else cast(dout, acc)
        dnum = do * inverse[..., None]                                                                     # out = num · inverse
        dden = -xp.sum(dnum * out, axis=-1)
        ones = xp.ones_like(v[..., :1])
        G, V = xp.concat([dnum, dden[..., None]], axis=-1), xp.concat([v, ones], axis=-1)                  # [num | den] = [S | z]ᵀ φ(q)
        S, dS = (xp.concat([s.S, s.z[..., None]], axis=-1) for s in (before, dstate if dstate is not None else _zeros_like(end, xp)))
        R, dfq, dfk, dV = causal_step_backward(G, dS, S, fq, fk, V)
        dq, dk, dv = phi.backward(dfq, q), phi.backward(dfk, k), dV[..., :-1]
        start = None if state is None else _state_like(R, State(*state), xp)
        return cast(dq, q_t.dtype), cast(dk, k_t.dtype), cast(dv, v_t.dtype), start

    return (cast(out, v_t.dtype), end), pullback


def linear_attention_state(k: Array, v: Array, *, feature_map: Any = "elu1", key_lengths: Any = None) -> State:
    """What `linear_attention` keeps of all keys and values: S = Σ_j φ(k_j) v_jᵀ and z = Σ_j φ(k_j), the sums in eq. (5).

    Parameters
    ----------
    k : (..., H, L, D)
    v : (..., H, L, M)
    feature_map, key_lengths
        As in `linear_attention`, and so are the errors.

    Returns
    -------
    state : State
        S (..., H, F, M) and z (..., H, F), however many keys there were; for `linear_attention_read`.

    Examples
    --------
    >>> import numpy as np
    >>> linear_attention_state(np.zeros((2, 1)), np.array([[1.0], [3.0]]))
    State(S=array([[4.]]), z=array([2.]))
    """
    xp = namespace(k=k, v=v)
    return _split(_linear(k[..., :0, :] if k.ndim > 1 else k, k, v, feature_map, False, 0, None, key_lengths)[1], xp)


def linear_attention_read(q: Array, state: State, *, feature_map: Any = "elu1", eps: float = 1e-6) -> Array:
    """The second half of `linear_attention`: V'_i = φ(q_i)ᵀ S / (φ(q_i)ᵀ z + ε), eq. (5) with its sums given.

    Parameters
    ----------
    q : (..., G·H, N, D)
    state : State
        From `linear_attention_state`. It is left as it was.
    feature_map, eps
        As in `linear_attention`; the map that the state was made with.

    Returns
    -------
    out : (..., G·H, N, M)

    Raises
    ------
    ValueError, TypeError
        As in `causal_linear_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> state = linear_attention_state(np.zeros((2, 1)), np.array([[1.0], [3.0]]))
    >>> linear_attention_read(np.zeros((1, 1)), state, eps=0)
    array([[2.]])
    """
    xp = namespace(q=q)
    if not isinstance(state, State):
        raise TypeError(f"state: expected State(S, z) from linear_attention_state, got {_described(state)}")
    k, v = (xp.zeros((*state.S.shape[:-2], 0, width), dtype=q.dtype) for width in (q.shape[-1], state.S.shape[-1]))
    return _linear(q, k, v, feature_map, False, eps, None, None, state)[0]


# --- NumPy: φ, the column of ones and the quotient inside the loop over chunks --------------------------------------------------------

def attention_forward(product: Callable[..., None], q: np.ndarray, k: np.ndarray, v: np.ndarray, start: np.ndarray, phi: FeatureMap,
                      eps: float, query_lengths: Any = None, key_lengths: Any = None, chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray]:
    """(out, [S | z] at the end) from [S_0 | z_0] = `start` (..., H, F, M+1); `product` is `running_product` or `full_product`."""
    view = _viewer(k)
    out, end = np.empty((*q.shape[:-1], v.shape[-1]), v.dtype), start.copy()

    def work(Q: Any, K: Any, V: Any, O: Any, S: Any, nq: Any, nk: Any) -> None:
        product(_mapped(K, phi, nk), _with_ones(V, nk), S, sizes(Q, K), chunk, out=(_mapped(Q, phi, nq), _quotient(O, eps, nq)))

    each_stack(work, end, chunk, view(q), view(k), view(v), view(out), end, *_views_of_lengths(query_lengths, key_lengths, k))
    return out, end


def attention_backward(product: Callable[..., None], dout: np.ndarray, dend: np.ndarray | None, q: np.ndarray, k: np.ndarray,
                       v: np.ndarray, start: np.ndarray, out: np.ndarray, phi: FeatureMap, eps: float, query_lengths: Any = None,
                       key_lengths: Any = None, chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Transpose of `attention_forward`: (dq, dk, dv, [dS_0 | dz_0]), by the derivation at the top of this file."""
    view, acc = _viewer(k), start.dtype
    dq, dk, dv = np.empty(q.shape, q.dtype), np.empty(k.shape, k.dtype), np.empty(v.shape, v.dtype)
    S, R = start.copy(), np.zeros_like(start) if dend is None else dend.copy()

    def work(Q: Any, K: Any, V: Any, O: Any, dO: Any, dQ: Any, dK: Any, dV: Any, S: Any, R: Any, nq: Any, nk: Any) -> None:
        fq, fk, V1 = _mapped(Q, phi, nq), _mapped(K, phi, nk), _with_ones(V, nk)
        # Two numbers a row, 1/(den + ε) and dden, wait where dv will stand: extra memory stays constant in N
        quotients = _scratch(dV, Q, acc)
        G = _quotient_backward(dO, quotients, nq)
        product(fk, V1, S, sizes(Q, K), chunk, columns=slice(-1, None), out=(fq, _quotients(quotients, dO, O, eps, nq)),   # den = zᵀ φ(q)
                back=(G, _unmapped(dQ, Q, phi, nq)))                                                                       # dφ(q) = S G
        product(fq, G, R, sizes(K, Q), chunk, out=(fk, _first(dV)),                                                       # dv = Rᵀ φ(k)
                back=(V1, _unmapped(dK, K, phi, nk)), reverse=True)                                                       # dφ(k) = R [v|1]

    each_stack(work, S, chunk, view(q), view(k), view(v), view(out), view(dout), view(dq), view(dk), view(dv), S, R,
               *_views_of_lengths(query_lengths, key_lengths, k))
    return dq, dk, dv, R


def _mapped(x: np.ndarray, phi: FeatureMap, lengths: np.ndarray | None) -> Reader:
    """φ of a block of x; zeros behind the length (φ(0) need not be 0)."""
    def read_mapped(rows: slice, buffer: np.ndarray) -> None:
        np.copyto(buffer, phi.forward(_block(x, rows, buffer, lengths)))
        _clear_padding(buffer, rows, lengths)

    return read_mapped


def _block(x: np.ndarray, rows: slice, like: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
    """Positions `rows` of x in the shape and dtype of a buffer `like` (but for the width): x itself, not to be written to, where nothing
    is to be cast or hidden and rows lie as in a buffer, so that no order of summation depends on strides."""
    if lengths is None and x.dtype == like.dtype and x.strides[-1] == x.itemsize:
        block = x[..., rows, :].reshape(*like.shape[:-1], x.shape[-1])
        block.flags.writeable = False
        return block
    block = np.empty((*like.shape[:-1], x.shape[-1]), like.dtype)
    reader(x, lengths)(rows, block)
    return block


def _unmapped(dx: np.ndarray, x: np.ndarray, phi: FeatureMap, lengths: np.ndarray | None) -> Store:
    """Stores φ'(x)ᵀ dφ: y = φ(x) → dx = φ'(x)ᵀ dy; zeros behind the length."""
    store = writer(dx)

    def store_unmapped(rows: slice, dy: np.ndarray) -> None:
        back = phi.backward(dy, _block(x, rows, dy, lengths))
        _clear_padding(back, rows, lengths)
        store(rows, back)

    return store_unmapped


def _with_ones(v: np.ndarray, lengths: np.ndarray | None) -> Reader:
    """[v | 1]; zeros behind the length."""
    read, ones = reader(v, lengths), _ones(lengths)

    def read_both(rows: slice, buffer: np.ndarray) -> None:
        read(rows, buffer[..., :-1])
        ones(rows, buffer[..., -1:])

    return read_both


def _ones(lengths: np.ndarray | None) -> Reader:
    def read(rows: slice, buffer: np.ndarray) -> None:
        buffer[...] = 1
        _clear_padding(buffer, rows, lengths)

    return read


def _quotient(out: np.ndarray, eps: float, lengths: np.ndarray | None) -> Store:
    """Stores num / (den + ε) of a block [num | den]; zeros behind the length."""
    store = writer(out)

    def store_quotient(rows: slice, block: np.ndarray) -> None:
        quotient = block[..., :-1] * _inverse(block[..., -1:] + block.dtype.type(eps))
        _clear_padding(quotient, rows, lengths)
        store(rows, quotient)

    return store_quotient


def _quotients(quotients: np.ndarray, dout: np.ndarray, out: np.ndarray, eps: float, lengths: np.ndarray | None) -> Store:
    """Stores [1 / (den + ε) | dden] of a block of den, dden = -(do · out) / (den + ε): out = num / (den + ε)."""
    def store_quotients(rows: slice, den: np.ndarray) -> None:
        inverse = _inverse(den + den.dtype.type(eps))[..., 0]
        do_out = np.vecdot(_block(dout, rows, den, lengths), _block(out, rows, den, None))
        to = quotients[..., rows, :].reshape(*inverse.shape, 2)
        to[..., 0], to[..., 1] = inverse, -do_out * inverse

    return store_quotients


def _quotient_backward(dout: np.ndarray, quotients: np.ndarray, lengths: np.ndarray | None) -> Reader:
    """G = [do / (den + ε) | dden]; zeros behind the length, where do is not looked at."""
    read_do = reader(dout, lengths)

    def read(rows: slice, buffer: np.ndarray) -> None:
        read_do(rows, buffer[..., :-1])
        row = quotients[..., rows, :].reshape(*buffer.shape[:-1], 2)
        buffer[..., :-1] *= row[..., :1]
        buffer[..., -1] = row[..., 1]

    return read


def _first(dv: np.ndarray) -> Store:
    """Stores a block without its last column, which belongs to the ones."""
    store = writer(dv)
    return lambda rows, block: store(rows, block[..., :-1])


def _inverse(x: Any) -> Any:
    """1 / x, and 0 where x is exactly 0: a row without keys is a row of zeros."""
    if isinstance(x, np.ndarray):
        return np.divide(1, x, out=np.zeros_like(x), where=x != 0)
    xp, zero = namespace(x=x), x == 0
    return xp.where(zero, xp.zeros_like(x), 1 / xp.where(zero, xp.ones_like(x), x))


def _clear_padding(block: np.ndarray, rows: slice, lengths: np.ndarray | None) -> None:
    if lengths is not None and lengths.size and rows.stop > lengths.min():
        np.copyto(block, 0, where=~real_rows(lengths, rows, block.shape))


def _scratch(dV: np.ndarray, Q: np.ndarray, acc: Any) -> np.ndarray:
    """Room for two numbers per query, (h, G, N, 2): columns of dV (h, 1, L, M), not yet written, where they fit and lose no digits."""
    h, G, N = Q.shape[:3]
    if dV.dtype == acc and dV.shape[2] == N and dV.shape[3] >= 2 * G:
        return dV[:, 0, :, : 2 * G].reshape(h, N, G, 2).swapaxes(1, 2)
    return np.empty((h, G, N, 2), acc)


def _viewer(k: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    headed = k.ndim > 2
    heads = k.shape[-3] if headed else 1
    return lambda x: split_groups(x, heads, headed)


def _views_of_lengths(query_lengths: Any, key_lengths: Any, k: np.ndarray) -> tuple[Any, Any]:
    """Lengths as arrays (..., H, G) and (..., H, 1), to be cut into stacks beside the arrays that they belong to."""
    if k.ndim == 2:
        return tuple(None if x is None else x.reshape(1) for x in (query_lengths, key_lengths))            # type: ignore[return-value]
    lead = k.shape[:-2]
    nq = None if query_lengths is None else query_lengths.reshape(*lead, query_lengths.shape[-1] // max(lead[-1], 1))
    return nq, None if key_lengths is None else key_lengths[..., None]


# --- any other array library: the same in functions of the array API ------------------------------------------------------------------

def attention_functional_forward(form: Callable[..., Any], q: Array, k: Array, v: Array, start: Array, phi: FeatureMap, eps: float,
                                 query_lengths: Any = None, key_lengths: Any = None) -> tuple[Array, Array, tuple[Any, ...]]:
    """(out, [S | z] at the end, residuals) by `form`: `causal_masked_forward`, `causal_scan_forward` or `linear_forward`."""
    xp = namespace(q=q, k=k, v=v)
    acc = accumulator(v.dtype)
    real_q, real_k = _real(query_lengths, q, xp), _real(key_lengths, k, xp)
    Q, K, V = (_keep(cast(x, acc), real, xp) for x, real in ((q, real_q), (k, real_k), (v, real_k)))
    fq, fk = _keep(phi.forward(Q), real_q, xp), _keep(phi.forward(K), real_k, xp)
    ones = _keep(xp.ones((*V.shape[:-1], 1), dtype=V.dtype), real_k, xp)
    both, end, residuals = form(fq, fk, xp.concat([V, ones], axis=-1), start)                          # [num | den]
    inverse = _inverse(both[..., -1:] + eps)
    out = both[..., :-1] * inverse
    return cast(out, v.dtype), end, (residuals, out, inverse, Q, K, real_q, real_k, phi, q.dtype)


def attention_functional_backward(form: Callable[..., Any], dout: Array, dend: Array | None,
                                  residuals: tuple[Any, ...]) -> tuple[Array, Array, Array, Array]:
    """Transpose of `attention_functional_forward`: (dq, dk, dv, [dS_0 | dz_0]) by the form's own backward."""
    inner, out, inverse, Q, K, real_q, real_k, phi, dtype = residuals
    xp = namespace(Q=Q)
    dnum = _keep(cast(dout, Q.dtype), real_q, xp) * inverse                                       # out = num · inverse
    dden = -xp.sum(dnum * out, axis=-1, keepdims=True)
    dfq, dfk, dV, dstart = form(xp.concat([dnum, dden], axis=-1), dend, inner)                        # [num | den] = f(φ(q), φ(k), [v | 1])
    dq, dk = _keep(phi.backward(dfq, Q), real_q, xp), _keep(phi.backward(dfk, K), real_k, xp)
    return cast(dq, dtype), cast(dk, dtype), cast(_keep(dV[..., :-1], real_k, xp), dtype), dstart


def _real(lengths: np.ndarray | None, x: Array, xp: Any) -> Array | None:
    """True at real positions, (..., N, 1)."""
    if lengths is None:
        return None
    return xp.asarray((np.arange(x.shape[-2]) < lengths[..., None])[..., None])


def _keep(x: Array, real: Array | None, xp: Any) -> Array:
    return x if real is None else xp.where(real, x, xp.zeros_like(x))


# --- what the public functions share --------------------------------------------------------------------------------------------------

def _linear(q: Array, k: Array, v: Array, feature_map: Any, causal: bool, eps: float, query_lengths: Any, key_lengths: Any,
            state: State | None = None, compiled: bool = False) -> tuple[Array, Array, Callable[[Array | None, None], Any]]:
    xp, axes, phi, F, eps = _check(q, k, v, feature_map, eps, causal)
    nq = check_lengths("query_lengths", query_lengths, axes.q_lead, axes.N, "N")
    nk = check_lengths("key_lengths", key_lengths, axes.kv_lead, axes.L, "L")
    start = _start(None if state is None else _check_state(state, q, axes, F), q, axes, F, xp)
    return _attend(causal, q, k, v, start, phi, eps, nq, nk, xp, compiled)


def _causal(q: Array, k: Array, v: Array, state: State | None, feature_map: Any, eps: float,
            compiled: bool) -> tuple[Array, State, Callable[[Array | None, State | None], Any]]:
    xp, axes, phi, F, eps = _check(q, k, v, feature_map, eps, True)
    state = None if state is None else _check_state(state, q, axes, F)
    start = _start(state, q, axes, F, xp)
    out, end, inner = _attend(True, q, k, v, start, phi, eps, None, None, xp, compiled)

    def backward(dout: Array | None, dstate: State | None) -> tuple[Array, Array, Array, State | None]:
        dend = None if dstate is None else xp.concat([dstate.S, dstate.z[..., None]], axis=-1)
        dq, dk, dv, dstart = inner(dout, dend)
        return dq, dk, dv, None if state is None else _state_like(dstart, state, xp)

    return out, _split(end, xp), backward


def _start(state: State | None, q: Array, axes: Axes, F: int, xp: Any) -> Array:
    """[S | z] to start from, in the accumulator dtype; zeros where there is no state."""
    acc = accumulator(q.dtype)
    if state is None:
        return xp.zeros((*axes.kv_lead, F, axes.M + 1), dtype=acc)
    return xp.concat([cast(state.S, acc), cast(state.z, acc)[..., None]], axis=-1)


def _attend(causal: bool, q: Array, k: Array, v: Array, start: Array, phi: FeatureMap, eps: float, nq: Any, nk: Any, xp: Any,
            compiled: bool) -> tuple[Array, Array, Callable[[Array | None, Array | None], Any]]:
    """(out, end, backward) by the fast form for NumPy arrays, by our kernels for causal sums of CuPy arrays, by the loop-free form else."""
    if compiled:
        check_compiled(xp)
    if compiled and causal and q.size and v.size:
        from .compiled.launch import attend
        return attend(q, k, v, start, phi, eps, nq, nk)
    if xp is np:
        product = running_product if causal else full_product
        chunk = {} if causal else {"chunk": 8 * CHUNK}                                                 # nothing there is quadratic in it
        out, end = attention_forward(product, q, k, v, start, phi, eps, nq, nk, **chunk)
        return out, end, lambda dout, dend: attention_backward(
            product, np.broadcast_to(out.dtype.type(0), out.shape) if dout is None else dout, dend, q, k, v, start, out, phi, eps, nq, nk,
            **chunk)
    if causal and has_kernels(xp, start.shape[-2], v.shape[-1]):
        return _attend_with_kernels(q, k, v, start, phi, eps, nq, nk, xp)
    forms = (causal_scan_forward, causal_scan_backward) if causal else (linear_forward, linear_backward)
    out, end, residuals = attention_functional_forward(forms[0], q, k, v, start, phi, eps, nq, nk)
    return out, end, lambda dout, dend: attention_functional_backward(forms[1], xp.zeros_like(out) if dout is None else dout, dend,
                                                                      residuals)


def _attend_with_kernels(q: Array, k: Array, v: Array, start: Array, phi: FeatureMap, eps: float, nq: Any, nk: Any,
                         xp: Any) -> tuple[Array, Array, Callable[[Array | None, Array | None], Any]]:
    """`_attend` on a GPU. elu1 and identity are worked out while q and k are read; other maps before, as array code."""
    from .cuda import launch
    feature = _FUSED.get(phi)
    if feature is None:
        real_q, real_k, acc = _real(nq, q, xp), _real(nk, k, xp), accumulator(v.dtype)
        Q, K = _keep(cast(q, acc), real_q, xp), _keep(cast(k, acc), real_k, xp)
        fq, fk, values = phi.forward(Q), phi.forward(K), cast(v, acc)
    else:
        fq, fk, values = q, k, v
    lengths_q, lengths_k = (None if n is None else xp.asarray(n.reshape(-1).astype(np.int32)) for n in (nq, nk))
    out, S, z, residuals = launch.causal_forward(xp, fq, fk, values, start[..., :-1], start[..., -1], feature=feature or 0, normalised=True,
                                                 eps=eps, query_lengths=lengths_q, key_lengths=lengths_k)

    def backward(dout: Array | None, dend: Array | None) -> tuple[Array, Array, Array, Array]:
        do = xp.zeros_like(out) if dout is None else cast(dout, out.dtype)
        dS, dz = (None, None) if dend is None else (dend[..., :-1], dend[..., -1])
        dq, dk, dv, dS, dz = launch.causal_backward(xp, do, dS, dz, residuals)
        if feature is None:
            dq, dk = _keep(phi.backward(dq, Q), real_q, xp), _keep(phi.backward(dk, K), real_k, xp)
        return cast(dq, q.dtype), cast(dk, k.dtype), cast(dv, v.dtype), xp.concat([dS, dz[..., None]], axis=-1)

    return cast(out, v.dtype), xp.concat([S, z[..., None]], axis=-1), backward


_FUSED = {FEATURE_MAPS["identity"]: 0, FEATURE_MAPS["elu1"]: 1}


def has_kernels(xp: Any, D: int, M: int) -> bool:
    """Whether arrays of this library can go to our CUDA kernels: CuPy's, and its stand-in's; and whether there are kernels of this size."""
    return hasattr(xp, "RawModule") and 1 <= D <= 256 and 1 <= M <= 256


def _step(fq: Array, fk: Array, v: Array, state: State, axes: Axes, eps: float, xp: Any) -> tuple[Array, State, Array]:
    """(out_t, new state, 1 / (den + ε)) for mapped φ(q), φ(k)."""
    num, S = causal_step(state.S, fq, fk, v)
    z = state.z + fk
    inverse = _inverse(xp.sum(fq * (z if axes.groups == 1 else xp.repeat(z, axes.groups, axis=-2)), axis=-1) + eps)
    return num * inverse[..., None], State(S, z), inverse


def _check(q: Array, k: Array, v: Array, feature_map: Any, eps: Any, causal: bool) -> tuple[Any, Axes, FeatureMap, int, float]:
    xp = namespace(q=q, k=k, v=v)
    check_dtypes(q=q, k=k, v=v)
    axes = check_qkv(q, k, v, causal=causal)
    phi = find_feature_map(feature_map)
    return xp, axes, phi, feature_size(phi, axes.D, _numpy_accumulator(v)), check_number("eps", eps, least=0)


def _check_step(q_t: Array, k_t: Array, v_t: Array, state: Any, feature_map: Any, eps: Any,
                compiled: bool) -> tuple[Any, Axes, FeatureMap, float, State]:
    xp = namespace(q_t=q_t, k_t=k_t, v_t=v_t)
    if compiled:
        check_compiled(xp)
    check_dtypes(q_t=q_t, k_t=k_t, v_t=v_t)
    axes = check_qkv(q_t, k_t, v_t, causal=True, step=True)
    phi, eps, acc = find_feature_map(feature_map), check_number("eps", eps, least=0), accumulator(v_t.dtype)
    F = feature_size(phi, axes.D, _numpy_accumulator(v_t))
    if state is None:
        zeros = State(xp.zeros((*axes.kv_lead, F, axes.M), dtype=acc), xp.zeros((*axes.kv_lead, F), dtype=acc))
        return xp, axes, phi, eps, zeros
    state = _check_state(state, q_t, axes, F)
    return xp, axes, phi, eps, State(cast(state.S, acc), cast(state.z, acc))


def _check_state(state: Any, q: Array, axes: Axes, F: int) -> State:
    if not isinstance(state, tuple) or len(state) != 2 or state[0] is None or state[1] is None:
        raise TypeError(f"state: expected State(S, z) as a former call returned it, got {_described(state)}")
    state = State(*state)
    namespace(q=q, **{"state.S": state.S, "state.z": state.z})
    symbols = "(..., H, F, M)" if axes.headed else "(F, M)"
    check_shape("state.S", state.S, symbols, (*axes.kv_lead, F, axes.M), "k, v and the feature map give these sizes")
    check_shape("state.z", state.z, symbols.replace(", M", ""), (*axes.kv_lead, F), "k and the feature map give these sizes")
    check_wide_dtype("state.S", state.S, q)
    check_wide_dtype("state.z", state.z, q)
    return state


def _numpy_accumulator(x: Array) -> np.dtype:
    return np.dtype("float32" if dtype_name(x) in ("float16", "bfloat16") else dtype_name(x))


def _described(state: Any) -> str:
    return f"({', '.join(type(x).__name__ for x in state)})" if isinstance(state, tuple) else type(state).__name__


def _check_state_cotangent(dstate: Any, end: State) -> State | None:
    if dstate is None:
        return None
    if not isinstance(dstate, tuple) or len(dstate) != 2:
        raise TypeError(f"dstate: expected State(dS, dz), either of them None if zero, or None, got {type(dstate).__name__}")
    check_cotangent("dstate.S", dstate[0], end.S)
    check_cotangent("dstate.z", dstate[1], end.z)
    xp = namespace(S=end.S)
    return State(*(xp.zeros_like(x) if d is None else d for d, x in zip(dstate, end, strict=True)))


def _split(both: Array, xp: Any) -> State:
    """[S | z] as State(S, z), each its own array."""
    S, z = both[..., :-1], both[..., -1]
    return State(np.ascontiguousarray(S), np.ascontiguousarray(z)) if xp is np else State(S, z)


def _state_like(both: Array, state: State, xp: Any) -> State:
    S, z = _split(both, xp)
    return State(cast(S, state.S.dtype), cast(z, state.z.dtype))


def _zeros_like(state: State, xp: Any) -> State:
    return State(xp.zeros_like(state.S), xp.zeros_like(state.z))

