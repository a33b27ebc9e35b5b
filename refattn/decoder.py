"""A decoder: a causal transformer that also attends to a memory, what an encoder made of another sequence; its backward, its recurrent twin.

    x = W_token[token] + P[position]
    x = x + attention(norm(x))         position i sees positions ≤ i         }
    x = x + cross(norm(x), m)          every position sees all of m          } for every layer; with norm="post"  x = norm(x + cross(x, m))
    x = x + feed_forward(norm(x))                                            }
    logits = norm(x) W_head + b_head

It is the model of `refattn.transformer` with one more part in its blocks. Per head, with q = x W_q, k = m W_k, v = m W_v and linear attention,
the cross attention is eq. (5) and (6) of the paper,

    S = Σ_j φ(k_j) v_jᵀ        z = Σ_j φ(k_j)        over the memory, once        o_i = Sᵀ φ(q_i) / (zᵀ φ(q_i) + ε)

so that the recurrent twin keeps S and z, and no more than that of a memory however long; with softmax attention it keeps all k and v.
The memory is behind k and v alone, in every layer: dm = Σ_layers Σ_heads (dk W_kᵀ + dv W_vᵀ).

The encoder is `refattn.transformer`, not causal or causal, whose head gives the memory: `Config(outputs=Em, causal=False, …)`. To train both,

    memory, r_encoder = transformer_forward(encoder, source, encoder_config)
    logits, r_decoder = decoder_forward(decoder, tokens, memory, decoder_config)
    dmemory, decoder_grads = decoder_backward(dlogits, r_decoder)
    encoder_grads = transformer_backward(dmemory, r_encoder)

Axes   ... any leading axes (batch) · N positions · E model width · V vocabulary · Nm positions and Em width of the memory

| function                          | reads                                     | for                                                     |
|-----------------------------------|-------------------------------------------|---------------------------------------------------------|
| decoder_forward, decoder_backward | whole sequences, whole memories           | training                                                |
| decoder_prefill                   | a whole memory, a whole prefix            | logits and the state behind the prefix                  |
| decoder_step_init                 | a whole memory                            | the state behind an empty prefix                        |
| decoder_step                      | one token for each batch, and no memory   | decoding: with linear attention a state of constant size|
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import attention_layer
from ._array import Array, check_positive
from .layers import Grads, Params, Residuals, affine_params
from .transformer import (
    Config,
    affine_shapes,
    attention_options,
    check_inputs,
    check_params,
    check_recurrent,
    check_state,
    first_states,
    params_init,
    positions_forward,
    read_forward,
    self_options,
    stack_backward,
    stack_decode,
    stack_forward,
    transformer_shapes,
)


class DecoderState(NamedTuple):
    """What a prefix and a memory leave behind: how long the prefix was, each layer's attention state, and what each layer keeps of the
    memory, the same at all positions. Never changed in place."""

    position: int
    layers: tuple[Any, ...]
    memory: tuple[Any, ...]


# --- parameters --------------------------------------------------------------------------------------------------------------------------

def decoder_shapes(config: Config, memory_width: int) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every parameter: those of `transformer_shapes`, and `blocks.i.cross.…` behind `blocks.i.attention.…`.

    Parameters
    ----------
    config : Config
        Causal, with attention "linear" or "softmax", which both attentions of a block have.
    memory_width : int
        Em.

    Raises
    ------
    ValueError, TypeError
        `attention: expected 'linear' or 'softmax', got 'lsh-4', whose queries are its keys: it has no cross attention`; `config: expected
        causal=True, …`; `memory_width: expected an integer ≥ 1, got 0`; those of `transformer_shapes`.

    Examples
    --------
    >>> shapes = decoder_shapes(Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32), memory_width=5)
    >>> shapes["blocks.0.cross.query.weight"], shapes["blocks.0.cross.key.weight"]
    ((8, 8), (5, 8))
    """
    inputs = attention_layer.cross_inputs(config.attention)
    check_recurrent(config)
    check_positive("memory_width", memory_width)
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in transformer_shapes(config).items():
        shapes[key] = shape
        if key.endswith(".attention.out.bias"):
            name, E = key.replace(".attention.out.bias", ".cross"), config.width
            shapes |= affine_shapes(f"{name}.norm", E)
            for part in (*inputs, "out"):
                shapes |= affine_shapes(f"{name}.{part}", memory_width if part in ("key", "value") else E, E)
    return shapes


def decoder_init(rng: np.random.Generator, config: Config, memory_width: int, dtype: Any = np.float32) -> Grads:
    """Parameters to start training from, drawn as in `transformer_init`; three weights a layer write into the residual stream.

    Parameters
    ----------
    rng : numpy.random.Generator
    config : Config
    memory_width : int
        Em.
    dtype

    Returns
    -------
    params : dict
        Keys and shapes of `decoder_shapes`.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> sum(p.size for p in decoder_init(np.random.default_rng(0), config, memory_width=5).values())
    1442
    """
    return params_init(rng, decoder_shapes(config, memory_width), config, dtype)


# --- whole sequences ---------------------------------------------------------------------------------------------------------------------

def decoder_forward(params: Params, inputs: Array, memory: Array, config: Config, *, lengths: Any = None,
                    memory_lengths: Any = None) -> tuple[Array, Residuals]:
    """Logits for every position of whole sequences, each with its memory.

    Parameters
    ----------
    params : dict
        From `decoder_init`, of this configuration.
    inputs : (..., N) integers, or (..., N, features)
        Tokens; vectors in the parameters' dtype if config.features > 0.
    memory : (..., Nm, Em)
        In the parameters' dtype.
    config : Config
    lengths, memory_lengths : integers (...), optional
        How many positions of each sequence, and of each memory, are real. Logits of padded positions are zeros; what stands in padding (NaN
        too) does not matter.

    Returns
    -------
    logits : (..., N, V)
        Position i predicts what follows it from the tokens ≤ i and the whole memory.
    residuals : tuple
        For `decoder_backward`.

    Raises
    ------
    ValueError
        `memory: expected (..., Nm, Em) = (2, 7, 16), got (3, 7, 16): one memory for each sequence, …`; those of `decoder_shapes` and of
        `transformer_forward`.
    TypeError
        A memory in another dtype than the parameters; those of `transformer_forward`.

    Notes
    -----
    4·B·(N·E² + Nm·Em·E) flops a layer more than `transformer_forward`, outside attention.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params, memory = decoder_init(np.random.default_rng(0), config, memory_width=5), np.ones((1, 7, 5), np.float32)
    >>> logits, residuals = decoder_forward(params, np.array([[1, 2, 3]]), memory, config)
    >>> logits.shape
    (1, 3, 10)
    """
    width = _check_params(params, config)
    options = attention_options(config)
    logits, residuals = stack_forward(params, inputs, config, lengths, {
        "attention": lambda i, name, y: attention_layer.attention_forward(params, name, y, causal=True, lengths=lengths, **self_options(config)),
        "cross": lambda i, name, y: attention_layer.cross_attention_forward(params, name, y, memory, lengths=lengths,
                                                                            memory_lengths=memory_lengths, **options)})
    return logits, (config, width, residuals)


def decoder_backward(dlogits: Array, residuals: Residuals) -> tuple[Array, Grads]:
    """Transpose of `decoder_forward`: the same list of layers, last one first; every layer adds to the cotangent of the memory.

    Parameters
    ----------
    dlogits : (..., N, V)
        Padded rows are not read.

    Returns
    -------
    dmemory : (..., Nm, Em)
        For the encoder's `transformer_backward`. Zeros in padded rows.
    grads : dict
        Keys, order, shapes and dtype of the parameters.

    Notes
    -----
    About twice the flops of the forward. May be called again on the same residuals, and from several threads.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params, memory = decoder_init(np.random.default_rng(0), config, memory_width=5), np.ones((1, 7, 5), np.float32)
    >>> logits, residuals = decoder_forward(params, np.array([[1, 2, 3]]), memory, config)
    >>> dmemory, grads = decoder_backward(np.ones_like(logits), residuals)
    >>> dmemory.shape, list(grads) == list(params)
    ((1, 7, 5), True)
    """
    config, width, r_stack = residuals
    dmemory: Any = None

    def cross_backward(dout: Array, r_cross: Residuals) -> tuple[Array, Grads]:
        nonlocal dmemory
        dx, d, grads = attention_layer.cross_attention_backward(dout, r_cross)
        dmemory = d if dmemory is None else dmemory + d
        return dx, grads

    grads = stack_backward(dlogits, r_stack, {"attention": attention_layer.attention_backward, "cross": cross_backward})
    return dmemory, {key: grads[key] for key in decoder_shapes(config, width)}


# --- the recurrent twin ------------------------------------------------------------------------------------------------------------------

def decoder_prefill(params: Params, inputs: Array, memory: Array, config: Config, *,
                    memory_lengths: Any = None) -> tuple[Array, DecoderState]:
    """The logits of `decoder_forward` for a whole prefix, and the state from which `decoder_step` goes on. Keeps no residuals.

    Parameters
    ----------
    params : dict
    inputs : (..., N) integers, or (..., N, features)
        All of one length; N = 0 gives the state of `decoder_step_init`.
    memory : (..., Nm, Em)
    config : Config
    memory_lengths : integers (...), optional

    Returns
    -------
    logits : (..., N, V)
    state : DecoderState

    Raises
    ------
    ValueError, TypeError
        Those of `decoder_forward`.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params, memory = decoder_init(np.random.default_rng(0), config, memory_width=5), np.ones((1, 7, 5), np.float32)
    >>> logits, state = decoder_prefill(params, np.array([[1, 2, 3]]), memory, config)
    >>> state.position
    3
    """
    _check_params(params, config)
    kept = _read_memory(params, memory, config, memory_lengths)
    shape = check_inputs(params, inputs, config, ("N",))
    x, _ = read_forward(params, inputs, config)
    x, _ = positions_forward(params, x, config, 0)
    options = attention_options(config)
    logits, states = stack_decode(params, x, config, {
        "attention": lambda i, name, y: attention_layer.attention_prefill(params, name, y, **self_options(config)),
        "cross": lambda i, name, y: (attention_layer.cross_attention_read(params, name, y, kept[i], **options), None)})
    return logits, DecoderState(shape[-1], states, kept)


def decoder_step_init(params: Params, memory: Array, config: Config, *, memory_lengths: Any = None) -> DecoderState:
    """Read the memory: the state behind it and an empty prefix.

    Parameters
    ----------
    params : dict
    memory : (..., Nm, Em)
    config : Config
    memory_lengths : integers (...), optional

    Returns
    -------
    state : DecoderState
        With linear attention S (..., H, F, D) and z (..., H, F) of the prefix, zeros, and of the memory, for each layer.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=3, feed_forward=32)
    >>> params, memory = decoder_init(np.random.default_rng(0), config, memory_width=6), np.ones((5, 7, 6), np.float32)
    >>> state = decoder_step_init(params, memory, config)
    >>> state.position, len(state.memory), state.memory[0].S.shape
    (0, 3, (5, 2, 4, 4))
    """
    _check_params(params, config)
    kept = _read_memory(params, memory, config, memory_lengths)
    return DecoderState(0, first_states(memory.shape[:-2], config, memory.dtype), kept)


def decoder_step(params: Params, input_t: Array, state: DecoderState, config: Config) -> tuple[Array, DecoderState]:
    """Read one token, or one vector, for each sequence and predict what follows it.

    Parameters
    ----------
    params : dict
    input_t : (...) integers, or (..., features)
    state : DecoderState
        From `decoder_step_init`, `decoder_prefill` or the step before. It is left as it was: go back to it to try another token.
    config : Config

    Returns
    -------
    logits_t : (..., V)
        What `decoder_forward` gives at this position, up to rounding.
    state : DecoderState

    Notes
    -----
    With linear attention time and memory depend neither on how many tokens came before nor on the length of the memory; with softmax
    attention they grow with both.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params, memory = decoder_init(np.random.default_rng(0), config, memory_width=5), np.ones((1, 7, 5), np.float32)
    >>> logits_t, state = decoder_step(params, np.array([1]), decoder_step_init(params, memory, config), config)
    >>> logits_t.shape, state.position
    ((1, 10), 1)
    """
    attention_layer.cross_inputs(config.attention)
    check_recurrent(config)
    check_state(state, config)
    check_inputs(params, input_t, config, ())
    x, _ = read_forward(params, input_t, config)
    x, _ = positions_forward(params, x[..., None, :], config, state.position)
    options = attention_options(config)
    logits_t, states = stack_decode(params, x[..., 0, :], config, {
        "attention": lambda i, name, y: attention_layer.attention_step(params, name, y, state.layers[i], **self_options(config)),
        "cross": lambda i, name, y: (
            attention_layer.cross_attention_read(params, name, y[..., None, :], state.memory[i], **options)[..., 0, :], None)})
    return logits_t, DecoderState(state.position + 1, states, state.memory)


# --- what they share ---------------------------------------------------------------------------------------------------------------------

def _check_params(params: Params, config: Config) -> int:
    """The width of the memory that the parameters are for."""
    attention_layer.cross_inputs(config.attention)
    width = int(affine_params(params, "blocks.0.cross.key")[0].shape[0])
    check_params(params, decoder_shapes(config, width))
    return width


def _read_memory(params: Params, memory: Array, config: Config, memory_lengths: Any) -> tuple[Any, ...]:
    return tuple(attention_layer.cross_attention_init(params, f"blocks.{i}.cross", memory, memory_lengths=memory_lengths,
                                                      **attention_options(config)) for i in range(config.layers))
