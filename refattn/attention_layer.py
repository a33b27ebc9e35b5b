"""Attention as a layer of a model: projections into heads, attention in each of them, and back; its transpose, and its recurrent twin.

    self-attention     y = merge(attend(split(x W_q), split(x W_k), split(x W_v))) W_out        eq. (2) to (12) of the paper, per head
    cross attention    y = merge(attend(split(x W_q), split(m W_k), split(m W_v))) W_out        m a memory, of a length and a width of its own

Each W with its bias. Attention is "linear", "softmax" or "lsh-R", the Reformer's with R rounds of hashing, whose queries are its keys, so that
it has no cross attention. Parameters, gradients and dtypes as in `refattn.layers`.

Axes   ... any leading axes (batch) · N positions · E model width · H heads · D = E/H features of a head · Nm, Em those of the memory
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._array import Array, accumulator, check_dtypes, check_positive, check_shape, namespace
from .attention import (
    causal_linear_attention,
    causal_linear_attention_step,
    linear_attention_read,
    linear_attention_state,
    linear_attention_vjp,
)
from .layers import Grads, Params, Residuals, affine_backward, affine_forward, affine_params, keep_real, real_positions
from .lsh import lsh_backward, lsh_buckets, lsh_forward, lsh_rotations
from .softmax import softmax_attention, softmax_attention_vjp, softmax_prefill, softmax_step

LSH_BUCKETS, LSH_CHUNK = 64, 32          # the paper's, whatever the length
_OF_X, _OF_MEMORY = ("query",), ("key", "value")         # what cross attention projects from where


def attention_rounds(attention: Any) -> int:
    """R of "lsh-R"; 0 for "linear" and "softmax". ValueError for anything else.

    >>> attention_rounds("lsh-4"), attention_rounds("linear")
    (4, 0)
    """
    if attention in ("linear", "softmax"):
        return 0
    if not re.fullmatch("lsh-[1-9][0-9]*", str(attention)):
        raise ValueError(f"attention: expected 'linear', 'softmax' or 'lsh-R' with R ≥ 1 rounds, as in 'lsh-4', got {attention!r}")
    return int(attention.removeprefix("lsh-"))


def check_compiles(attention: str, compiled: bool) -> None:
    if compiled and attention != "linear":
        raise ValueError(f"compiled: expected False for attention {attention!r}, got True; only linear attention has compiled loops")


def attention_inputs(attention: str) -> tuple[str, ...]:
    """The projections that attention reads, by name. Those of LSH attention: the query is the key too.

    >>> attention_inputs("linear"), attention_inputs("lsh-1")
    (('query', 'key', 'value'), ('query', 'value'))
    """
    return ("query", "value") if attention_rounds(attention) else ("query", "key", "value")


def attention_forward(params: Params, name: str, x: Array, *, heads: int, attention: str = "linear", feature_map: str = "elu1",
                      causal: bool = False, lengths: Any = None, rng: np.random.Generator | None = None,
                      compiled: bool = False) -> tuple[Array, Residuals]:
    """Multi-head self-attention.

        q, k, v = split(x W_q + b_q), split(x W_k + b_k), split(x W_v + b_v)        split: (..., N, E) → (..., H, N, D), D = E/H
        y = merge(attend(q, k, v)) W_out + b_out                                    eq. (2) or eq. (5), (9) of the paper, per head

    LSH attention has no W_k: q is x of `refattn.lsh`. The projections are one product with the weights side by side, and so is each product
    of the backward.

    Parameters
    ----------
    params : dict
        Holds `.weight` (E, E) and `.bias` (E,) of `{name}.query`, `{name}.key` (not with "lsh-R"), `{name}.value`, `{name}.out`.
    x : (..., N, E)
    heads : int
        H, a divisor of E.
    attention : "linear", "softmax" or "lsh-R"
        R rounds of hashing into 64 buckets, sorted and cut into chunks of 32, as in the paper. NumPy arrays only.
    feature_map : str
        φ of linear attention.
    causal : bool
        Position i sees positions ≤ i only, or < i with "lsh-R". There the hashes of later ones still decide which of the earlier ones share
        a chunk with i.
    lengths : integers (...), optional
        How many positions of each sequence are real. Padded rows of y are zeros, and whatever padding holds (NaN too) reaches nothing.
    rng : numpy.random.Generator, optional
        Needed by "lsh-R" and by nothing else: its rotations are drawn from it, the same for all sequences and heads.
    compiled : bool
        True: causal linear attention of NumPy arrays by loops that Numba compiles, see `refattn.compiled`. The others have none.

    Returns
    -------
    out : (..., N, E)
    residuals : tuple
        For `attention_backward`.

    Raises
    ------
    ValueError
        `heads: expected a divisor of E = 8, got 3`; `attention: expected 'linear', 'softmax' or 'lsh-R' …`; `compiled: expected False for attention
        'softmax', got True; …`; `rng: expected …`; a missing key of params.

    Notes
    -----
    8·N·E² flops for the projections, 6·N·E² with "lsh-R"; attention itself takes time N·E·D (linear), N²·E (softmax) or R·N·E (LSH).

    Examples
    --------
    >>> params = {f"a.{part}.weight": np.eye(2) for part in ("query", "key", "value", "out")}
    >>> params |= {f"a.{part}.bias": np.zeros(2) for part in ("query", "key", "value", "out")}
    >>> out, residuals = attention_forward(params, "a", np.ones((3, 2)), heads=1, causal=True)
    >>> np.round(out, 5).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    xp = namespace(x=x)
    _check_attention(x, heads, attention, "(..., N, E)", 2, compiled)
    real = real_positions(xp, "lengths", lengths, x.shape[:-1])
    x = keep_real(xp, real, x)
    inputs, rounds = attention_inputs(attention), attention_rounds(attention)
    qkv, r_in = _project_forward(params, name, inputs, x, heads)
    if rounds:
        mixed, pullback = _lsh_vjp(*qkv, rounds=rounds, causal=causal, lengths=lengths, real=real, rng=rng)
    else:
        loops = {"compiled": True} if compiled else {}
        mixed, pullback = _attend_vjp(attention, feature_map, *qkv, causal=causal, query_lengths=lengths, key_lengths=lengths, **loops)
    out, r_out = affine_forward(_merge(mixed), *affine_params(params, f"{name}.out"))
    return keep_real(xp, real, out), (name, inputs, heads, real, r_in, pullback, r_out)


def attention_backward(dout: Array, residuals: Residuals) -> tuple[Array, Grads]:
    """Transpose of `attention_forward`: merge turns into split and split into merge; the rest last line first.

    Parameters
    ----------
    dout : (..., N, E)

    Returns
    -------
    dx : (..., N, E)
        Zeros in padded rows.
    grads : dict
        Under the keys that the forward read.
    """
    name, inputs, heads, real, r_in, pullback, r_out = residuals
    grads: Grads = {}
    dmixed = _out_backward(grads, name, keep_real(namespace(dout=dout), real, dout), heads, r_out)
    return _project_backward(grads, name, inputs, heads, pullback(dmixed), r_in), grads


def _lsh_vjp(x: np.ndarray, v: np.ndarray, *, rounds: int, causal: bool, lengths: Any, real: np.ndarray | None,
             rng: np.random.Generator | None) -> tuple[np.ndarray, Callable[..., Any]]:
    if rng is None:
        raise ValueError(f"rng: expected a numpy.random.Generator, got None; attention 'lsh-{rounds}' draws its rotations from it")
    rotations = lsh_rotations(rng, rounds, x.shape[-1], LSH_BUCKETS).astype(accumulator(x.dtype))
    buckets = lsh_buckets(x, rotations)
    if real is not None:                            # padding is sorted behind all that is real, and so moves no border of a chunk
        buckets = np.where(real[..., None, None, :], buckets, LSH_BUCKETS)
        lengths = np.broadcast_to(np.asarray(lengths)[..., None], x.shape[:-2])
    out, residuals = lsh_forward(x, v, buckets, causal=causal, chunk=LSH_CHUNK, lengths=lengths)
    return out, lambda dout: lsh_backward(dout, residuals)


def recurrent_inputs(attention: str) -> tuple[str, ...]:
    """`attention_inputs` where attention can go on from a state; ValueError for LSH attention."""
    if attention_rounds(attention):
        raise ValueError(f"attention: expected 'linear' or 'softmax', got {attention!r}, which sorts whole sequences and has no state to go on "
                         "from; read the whole prefix each time, as generate_recomputed does")
    return attention_inputs(attention)


def attention_prefill(params: Params, name: str, x: Array, *, heads: int, attention: str = "linear",
                      feature_map: str = "elu1", compiled: bool = False) -> tuple[Array, Any]:
    """Causal attention of a whole prefix, as `attention_forward(…, causal=True)`, together with what `attention_step` goes on from.

    Parameters
    ----------
    params, name, x, heads, attention, feature_map, compiled
        As in `attention_forward`; no padding, and not "lsh-R", which sorts whole sequences and so has no state.

    Returns
    -------
    out : (..., N, E)
    state
        `State(S, z)` of linear attention, whose size does not depend on N, or the key/value cache of softmax attention.

    Examples
    --------
    >>> params = {f"a.{part}.weight": np.eye(2) for part in ("query", "key", "value", "out")}
    >>> params |= {f"a.{part}.bias": np.zeros(2) for part in ("query", "key", "value", "out")}
    >>> out, state = attention_prefill(params, "a", np.ones((3, 2)), heads=1)
    >>> state.z.tolist()
    [[6.0, 6.0]]
    """
    _check_attention(x, heads, attention, "(..., N, E)", 2, compiled)
    q, k, v = (_split(affine_forward(x, *affine_params(params, f"{name}.{part}"))[0], heads, 1)[0] for part in recurrent_inputs(attention))
    state: Any
    if attention == "linear":
        mixed, state = causal_linear_attention(q, k, v, feature_map=feature_map, compiled=compiled)
    else:
        mixed, state = softmax_prefill(q, k, v)
    return affine_forward(_merge(mixed), *affine_params(params, f"{name}.out"))[0], state


def attention_init(lead: tuple[int, ...], width: int, dtype: Any = np.float32, *, heads: int, attention: str = "linear",
                   feature_map: str = "elu1") -> Any:
    """The state of attention before the first position: that of a prefix of no positions.

    Parameters
    ----------
    lead : tuple of int
        The leading axes of the `x_t` to come, without E.
    width : int
        E.

    Returns
    -------
    state
        For `attention_step`.

    Examples
    --------
    >>> attention_init((5,), 8, heads=2).S.shape
    (5, 2, 4, 4)
    """
    nothing = np.zeros((*lead, 0, width), dtype)
    _check_attention(nothing, heads, attention, "(..., N, E)", 2)
    recurrent_inputs(attention)
    x, = _split(nothing, heads, 1)
    return causal_linear_attention(x, x, x, feature_map=feature_map)[1] if attention == "linear" else softmax_prefill(x, x, x)[1]


def attention_step(params: Params, name: str, x_t: Array, state: Any = None, *, heads: int, attention: str = "linear",
                   feature_map: str = "elu1", compiled: bool = False) -> tuple[Array, Any]:
    """One position of causal attention (eq. (16) to (19) of the paper for linear attention): the recurrent twin of `attention_forward`.

    Parameters
    ----------
    params, name, heads, attention, feature_map, compiled
        As in `attention_forward`.
    x_t : (..., E)
    state : optional
        From `attention_prefill` or the step before; None where there is no past. It is left as it was.

    Returns
    -------
    out_t : (..., E)
    state

    Examples
    --------
    >>> params = {f"a.{part}.weight": np.eye(2) for part in ("query", "key", "value", "out")}
    >>> params |= {f"a.{part}.bias": np.zeros(2) for part in ("query", "key", "value", "out")}
    >>> out_t, state = attention_step(params, "a", np.ones(2), heads=1)
    >>> np.round(out_t, 5).tolist()
    [1.0, 1.0]
    """
    _check_attention(x_t, heads, attention, "(..., E)", 1, compiled)
    shape = (*x_t.shape[:-1], heads, x_t.shape[-1] // heads)
    q, k, v = (affine_forward(x_t, *affine_params(params, f"{name}.{part}"))[0].reshape(shape) for part in recurrent_inputs(attention))
    if attention == "linear":
        mixed, state = causal_linear_attention_step(q, k, v, state, feature_map=feature_map, compiled=compiled)
    else:
        mixed, state = softmax_step(q, k, v, state)
    return affine_forward(mixed.reshape(x_t.shape), *affine_params(params, f"{name}.out"))[0], state


# --- cross attention ---------------------------------------------------------------------------------------------------------------------

def cross_attention_forward(params: Params, name: str, x: Array, memory: Array, *, heads: int, attention: str = "linear",
                            feature_map: str = "elu1", lengths: Any = None, memory_lengths: Any = None) -> tuple[Array, Residuals]:
    """Multi-head attention of every position to all of a memory, for example what an encoder made of another sequence.

        q = split(x W_q + b_q)        k, v = split(m W_k + b_k), split(m W_v + b_v)        split: (..., N, E) → (..., H, N, D), D = E/H
        y = merge(attend(q, k, v)) W_out + b_out                                           eq. (2) or eq. (5) of the paper, per head

    Parameters
    ----------
    params : dict
        Holds `.weight` and `.bias` of `{name}.query` (E, E), `{name}.key` (Em, E), `{name}.value` (Em, E), `{name}.out` (E, E).
    x : (..., N, E)
    memory : (..., Nm, Em)
        m, one for each sequence.
    heads : int
        H, a divisor of E.
    attention : "linear" or "softmax"
    feature_map : str
        φ of linear attention.
    lengths, memory_lengths : integers (...), optional
        How many positions of each sequence, and of each memory, are real. Padded rows of y are zeros, and whatever padding holds (NaN too)
        reaches nothing. Where no position of a memory is real, y is b_out.

    Returns
    -------
    out : (..., N, E)
    residuals : tuple
        For `cross_attention_backward`.

    Raises
    ------
    ValueError
        `attention: expected 'linear' or 'softmax', got 'lsh-4', whose queries are its keys: …`; `memory: expected (..., Nm, Em) = …`;
        those of `attention_forward`.
    TypeError
        A memory in another dtype than x.

    Notes
    -----
    4·N·E² + 4·Nm·Em·E flops for the projections; attention itself takes time (N + Nm)·E·D (linear) or N·Nm·E (softmax).

    Examples
    --------
    >>> params = {f"a.{part}.weight": np.eye(2) for part in ("query", "key", "value", "out")}
    >>> params |= {f"a.{part}.bias": np.zeros(2) for part in ("query", "key", "value", "out")}
    >>> out, residuals = cross_attention_forward(params, "a", np.zeros((3, 2)), np.ones((5, 2)), heads=1)
    >>> np.round(out, 5).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    xp = namespace(x=x, memory=memory)
    _check_attention(x, heads, attention, "(..., N, E)", 2)
    _check_memory(params, name, memory, heads, attention, x)
    real, real_memory = real_positions(xp, "lengths", lengths, x.shape[:-1]), real_positions(xp, "memory_lengths", memory_lengths, memory.shape[:-1])
    (q,), r_query = _project_forward(params, name, _OF_X, keep_real(xp, real, x), heads)
    (k, v), r_memory = _project_forward(params, name, _OF_MEMORY, keep_real(xp, real_memory, memory), heads)
    mixed, pullback = _attend_vjp(attention, feature_map, q, k, v, query_lengths=lengths, key_lengths=memory_lengths)
    out, r_out = affine_forward(_merge(mixed), *affine_params(params, f"{name}.out"))
    return keep_real(xp, real, out), (name, heads, real, r_query, r_memory, pullback, r_out)


def cross_attention_backward(dout: Array, residuals: Residuals) -> tuple[Array, Array, Grads]:
    """Transpose of `cross_attention_forward`, last line first: x is behind q alone, the memory behind k and v.

        dq, dk, dv = attendᵀ(split(dy W_outᵀ))        dx = merge(dq) W_qᵀ        dm = merge(dk) W_kᵀ + merge(dv) W_vᵀ

    Parameters
    ----------
    dout : (..., N, E)

    Returns
    -------
    dx : (..., N, E);  dmemory : (..., Nm, Em)
        Zeros in padded rows.
    grads : dict
        Under the keys that the forward read.
    """
    name, heads, real, r_query, r_memory, pullback, r_out = residuals
    grads: Grads = {}
    dq, dk, dv = pullback(_out_backward(grads, name, keep_real(namespace(dout=dout), real, dout), heads, r_out))
    dx = _project_backward(grads, name, _OF_X, heads, (dq,), r_query)
    dmemory = _project_backward(grads, name, _OF_MEMORY, heads, (dk, dv), r_memory)
    return dx, dmemory, grads


class SoftmaxMemory(NamedTuple):
    """What softmax cross attention keeps of a memory: its keys and values (..., H, Nm, D), and how many of them are real."""

    keys: Array
    values: Array
    lengths: Any


def cross_attention_init(params: Params, name: str, memory: Array, *, heads: int, attention: str = "linear", feature_map: str = "elu1",
                         memory_lengths: Any = None) -> Any:
    """Read a memory once; `cross_attention_read` then needs nothing else of it.

    Parameters
    ----------
    params, name, memory, heads, attention, feature_map, memory_lengths
        As in `cross_attention_forward`, and so are the errors.

    Returns
    -------
    state
        Of linear attention `State(S, z)`, S = Σ_j φ(k_j) v_jᵀ and z = Σ_j φ(k_j) for each head, (..., H, F, D) and (..., H, F), however
        long the memory is; of softmax attention all keys and values.

    Examples
    --------
    >>> params = {f"a.{part}.weight": np.eye(2) for part in ("query", "key", "value", "out")}
    >>> params |= {f"a.{part}.bias": np.zeros(2) for part in ("query", "key", "value", "out")}
    >>> cross_attention_init(params, "a", np.ones((5, 2)), heads=1).z.tolist()
    [[10.0, 10.0]]
    """
    xp = namespace(memory=memory)
    _check_memory(params, name, memory, heads, attention)
    real = real_positions(xp, "memory_lengths", memory_lengths, memory.shape[:-1])
    (k, v), _ = _project_forward(params, name, _OF_MEMORY, keep_real(xp, real, memory), heads)
    if attention == "linear":
        return linear_attention_state(k, v, feature_map=feature_map, key_lengths=memory_lengths)
    return SoftmaxMemory(k, v, memory_lengths)


def cross_attention_read(params: Params, name: str, x: Array, state: Any, *, heads: int, attention: str = "linear",
                         feature_map: str = "elu1") -> Array:
    """`cross_attention_forward` from what `cross_attention_init` kept of the memory: for one position or for many.

    Parameters
    ----------
    params, name, heads, attention, feature_map
        As in `cross_attention_forward`.
    x : (..., N, E)
        Positions do not see one another: whether they come at once or one by one changes nothing.
    state
        It is left as it was, and serves all positions.

    Returns
    -------
    out : (..., N, E)

    Notes
    -----
    Attention itself takes time N·E·D (linear), whatever Nm was, or N·Nm·E (softmax).

    Examples
    --------
    >>> params = {f"a.{part}.weight": np.eye(2) for part in ("query", "key", "value", "out")}
    >>> params |= {f"a.{part}.bias": np.zeros(2) for part in ("query", "key", "value", "out")}
    >>> state = cross_attention_init(params, "a", np.ones((5, 2)), heads=1)
    >>> np.round(cross_attention_read(params, "a", np.zeros((1, 2)), state, heads=1), 5).tolist()
    [[1.0, 1.0]]
    """
    _check_attention(x, heads, attention, "(..., N, E)", 2)
    cross_inputs(attention)
    (q,), _ = _project_forward(params, name, _OF_X, x, heads)
    check_shape("state", state[0], "(..., H, *, D)", (*q.shape[:-2], state[0].shape[-2], q.shape[-1]), "one memory for each sequence")
    if attention == "linear":
        mixed = linear_attention_read(q, state, feature_map=feature_map)
    else:
        mixed = softmax_attention(q, *state[:2], key_lengths=state.lengths)
    return affine_forward(_merge(mixed), *affine_params(params, f"{name}.out"))[0]


def cross_inputs(attention: str) -> tuple[str, ...]:
    """The projections that cross attention reads, by name; ValueError for LSH attention."""
    if attention_rounds(attention):
        raise ValueError(f"attention: expected 'linear' or 'softmax', got {attention!r}, whose queries are its keys: it has no cross attention")
    return (*_OF_X, *_OF_MEMORY)


# --- what they share ---------------------------------------------------------------------------------------------------------------------

def _project_forward(params: Params, name: str, inputs: Sequence[str], x: Array, heads: int) -> tuple[list[Array], Residuals]:
    """split(x W + b) for each of `inputs`, by one product with the weights side by side."""
    xp = namespace(x=x)
    weights, biases = zip(*(affine_params(params, f"{name}.{part}") for part in inputs), strict=True)
    projected, residuals = affine_forward(x, xp.concatenate(weights, axis=1), xp.concatenate(biases))
    return _split(projected, heads, len(inputs)), residuals


def _project_backward(grads: Grads, name: str, inputs: Sequence[str], heads: int, dparts: Sequence[Array], residuals: Residuals) -> Array:
    """Transpose of `_project_forward`: puts the gradients of its parameters into `grads` and returns dx."""
    x, weight = residuals
    xp, parts = namespace(x=x), len(inputs)
    dprojected = xp.empty((*x.shape[:-1], weight.shape[1]), x.dtype)
    for into, d in zip(_split(dprojected, heads, parts), dparts, strict=True):
        into[...] = d
    dx, dweight, dbias = affine_backward(dprojected, residuals)
    for part, dw, db in zip(inputs, xp.split(dweight, parts, axis=1), xp.split(dbias, parts), strict=True):
        grads[f"{name}.{part}.weight"], grads[f"{name}.{part}.bias"] = dw, db
    return dx


def _out_backward(grads: Grads, name: str, dout: Array, heads: int, residuals: Residuals) -> Array:
    """Transpose of y = merge(·) W_out + b_out."""
    dmerged, grads[f"{name}.out.weight"], grads[f"{name}.out.bias"] = affine_backward(dout, residuals)
    return _split(dmerged, heads, 1)[0]


def _attend_vjp(attention: str, feature_map: str, q: Array, k: Array, v: Array, **options: Any) -> tuple[Array, Callable[..., Any]]:
    if attention == "linear":
        return linear_attention_vjp(q, k, v, feature_map=feature_map, **options)
    return softmax_attention_vjp(q, k, v, **options)


def _split(x: Array, heads: int, parts: int) -> list[Array]:
    """(..., N, parts·E) as `parts` views (..., H, N, D)."""
    x = x.reshape(*x.shape[:-1], parts, heads, x.shape[-1] // (parts * heads))
    return [x[..., part, :, :].swapaxes(-3, -2) for part in range(parts)]


def _merge(x: Array) -> Array:
    """(..., H, N, D) → (..., N, E)."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _check_attention(x: Array, heads: int, attention: str, axes: str, least: int, compiled: bool = False) -> None:
    if x.ndim < least:
        raise ValueError(f"x: expected {axes}, got {tuple(x.shape)}")
    attention_rounds(attention)
    check_compiles(attention, compiled)
    _check_heads(heads, x.shape[-1])


def _check_heads(heads: int, width: int) -> None:
    if width % check_positive("heads", heads):
        raise ValueError(f"heads: expected a divisor of E = {width}, got {heads}")


def _check_memory(params: Params, name: str, memory: Array, heads: int, attention: str, x: Array = None) -> None:
    cross_inputs(attention)
    weight = affine_params(params, f"{name}.key")[0]
    _check_heads(heads, weight.shape[1])
    if memory.ndim < 2:
        raise ValueError(f"memory: expected (..., Nm, Em), got {tuple(memory.shape)}")
    lead = memory.shape[:-2] if x is None else x.shape[:-2]
    check_shape("memory", memory, "(..., Nm, Em)", (*lead, memory.shape[-2], weight.shape[0]),
                "one memory for each sequence, as wide as the key's weight has rows")
    check_dtypes(x=x, memory=memory, **{f"{name}.key.weight": weight})
