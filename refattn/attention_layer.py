"""Attention as a layer of a model: projections into heads, attention in each of them, and back; its transpose, and its recurrent twin.

    y = merge(attend(split(x W_q), split(x W_k), split(x W_v))) W_out + b_out        (eq. 2-12 of the paper, per head; biases left out)

Attention is "linear", "softmax" or "lsh-R", the Reformer's with R rounds of hashing, whose queries are its keys. Parameters, gradients and
dtypes as in `refattn.layers`.

Axes   ... any leading axes (batch) · N positions · E model width · H heads · D = E/H features of a head
"""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ._array import Array, accumulator, check_positive, namespace
from .attention import causal_linear_attention, causal_linear_attention_step, linear_attention_vjp
from .layers import Grads, Params, Residuals, affine_backward, affine_forward, affine_params, keep_real, real_positions
from .lsh import lsh_backward, lsh_buckets, lsh_forward, lsh_rotations
from .softmax import softmax_attention_vjp, softmax_prefill, softmax_step

LSH_BUCKETS, LSH_CHUNK = 64, 32          # the paper's, whatever the length


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


def attention_inputs(attention: str) -> tuple[str, ...]:
    """The projections that attention reads, by name. Those of LSH attention: the query is the key too.

    >>> attention_inputs("linear"), attention_inputs("lsh-1")
    (('query', 'key', 'value'), ('query', 'value'))
    """
    return ("query", "value") if attention_rounds(attention) else ("query", "key", "value")


def attention_forward(params: Params, name: str, x: Array, *, heads: int, attention: str = "linear", feature_map: str = "elu1",
                      causal: bool = False, lengths: Any = None, rng: np.random.Generator | None = None) -> tuple[Array, Residuals]:
    """Multi-head self-attention.

        q, k, v = split(x W_q + b_q), split(x W_k + b_k), split(x W_v + b_v)        split: (..., N, E) → (..., H, N, D), D = E/H
        y = merge(attend(q, k, v)) W_out + b_out                                    eq. 2 or eq. 5, 9 of the paper, per head

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

    Returns
    -------
    out : (..., N, E)
    residuals : tuple
        For `attention_backward`.

    Raises
    ------
    ValueError
        `heads: expected a divisor of E = 8, got 3`; `attention: expected 'linear', 'softmax' or 'lsh-R' …`; `rng: expected …`; a missing key
        of params.

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
    _check_attention(x, heads, attention, "(..., N, E)", 2)
    real = real_positions(xp, "lengths", lengths, x.shape[:-1])
    x = keep_real(xp, real, x)
    inputs, rounds = attention_inputs(attention), attention_rounds(attention)
    weights, biases = zip(*(affine_params(params, f"{name}.{part}") for part in inputs), strict=True)
    projected, r_in = affine_forward(x, xp.concatenate(weights, axis=1), xp.concatenate(biases))
    qkv = _split(projected, heads, len(inputs))
    options = {"causal": causal, "query_lengths": lengths, "key_lengths": lengths}
    pullback: Callable[..., Any]
    if rounds:
        mixed, pullback = _lsh_vjp(*qkv, rounds=rounds, causal=causal, lengths=lengths, real=real, rng=rng)
    elif attention == "linear":
        mixed, pullback = linear_attention_vjp(*qkv, feature_map=feature_map, **options)
    else:
        mixed, pullback = softmax_attention_vjp(*qkv, **options)
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
    xp, parts = namespace(dout=dout), len(inputs)
    grads: Grads = {}
    dmerged, grads[f"{name}.out.weight"], grads[f"{name}.out.bias"] = affine_backward(keep_real(xp, real, dout), r_out)
    dmixed, = _split(dmerged, heads, 1)
    dprojected = xp.empty((*dmerged.shape[:-1], parts * dmerged.shape[-1]), dmerged.dtype)
    for into, d in zip(_split(dprojected, heads, parts), pullback(dmixed), strict=True):
        into[...] = d
    dx, dweight, dbias = affine_backward(dprojected, r_in)
    for part, dw, db in zip(inputs, xp.split(dweight, parts, axis=1), xp.split(dbias, parts), strict=True):
        grads[f"{name}.{part}.weight"], grads[f"{name}.{part}.bias"] = dw, db
    return dx, grads


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
                      feature_map: str = "elu1") -> tuple[Array, Any]:
    """Causal attention of a whole prefix, as `attention_forward(…, causal=True)`, together with what `attention_step` goes on from.

    Parameters
    ----------
    params, name, x, heads, attention, feature_map
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
    _check_attention(x, heads, attention, "(..., N, E)", 2)
    q, k, v = (_split(affine_forward(x, *affine_params(params, f"{name}.{part}"))[0], heads, 1)[0] for part in recurrent_inputs(attention))
    state: Any
    if attention == "linear":
        mixed, state = causal_linear_attention(q, k, v, feature_map=feature_map)
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
                   feature_map: str = "elu1") -> tuple[Array, Any]:
    """One position of causal attention (eq. 16-20 of the paper for linear attention): the recurrent twin of `attention_forward`.

    Parameters
    ----------
    params, name, heads, attention, feature_map
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
    _check_attention(x_t, heads, attention, "(..., E)", 1)
    shape = (*x_t.shape[:-1], heads, x_t.shape[-1] // heads)
    q, k, v = (affine_forward(x_t, *affine_params(params, f"{name}.{part}"))[0].reshape(shape) for part in recurrent_inputs(attention))
    if attention == "linear":
        mixed, state = causal_linear_attention_step(q, k, v, state, feature_map=feature_map)
    else:
        mixed, state = softmax_step(q, k, v, state)
    return affine_forward(mixed.reshape(x_t.shape), *affine_params(params, f"{name}.out"))[0], state


# --- what they share ---------------------------------------------------------------------------------------------------------------------

def _split(x: Array, heads: int, parts: int) -> list[Array]:
    """(..., N, parts·E) as `parts` views (..., H, N, D)."""
    x = x.reshape(*x.shape[:-1], parts, heads, x.shape[-1] // (parts * heads))
    return [x[..., part, :, :].swapaxes(-3, -2) for part in range(parts)]


def _merge(x: Array) -> Array:
    """(..., H, N, D) → (..., N, E)."""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _check_attention(x: Array, heads: int, attention: str, axes: str, least: int) -> None:
    if x.ndim < least:
        raise ValueError(f"x: expected {axes}, got {tuple(x.shape)}")
    attention_rounds(attention)
    if x.shape[-1] % check_positive("heads", heads):
        raise ValueError(f"heads: expected a divisor of E = {x.shape[-1]}, got {heads}")
