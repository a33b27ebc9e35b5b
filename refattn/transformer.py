"""The smallest useful model: tokens or vectors in, logits out, with its backward, and the recurrent twin that reads the same parameters.

    x = W_token[token] + P[position]       (with `features`: x = input W_input + b_input + P[position])
    x = x + attention(norm(x))          }  for every layer; with norm="post"  x = norm(x + attention(x))
    x = x + feed_forward(norm(x))       }                                     x = norm(x + feed_forward(x))     eq. (1) of the paper
    logits = norm(x) W_head + b_head       (the last norm with norm="pre" only)

Axes   B batch (any leading axes) · N positions · E model width · V vocabulary

| function                                   | reads                     | for                                                     |
|--------------------------------------------|---------------------------|---------------------------------------------------------|
| transformer_forward, transformer_backward  | whole sequences           | training                                                |
| transformer_prefill                        | a whole prefix            | logits and the state behind the prefix                  |
| transformer_step                           | one token for each batch  | decoding: with linear attention a state of constant size|

Parameters are a flat dict of arrays, `{"token.weight": …, "blocks.0.attention.query.weight": …, "head.bias": …}`; gradients come back under
the same keys. The model is its list of layers, and the backward is that list reversed.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import attention_layer, layers
from ._array import Array, check_dtypes, check_positive, check_shape, namespace
from .layers import Grads, Params, Residuals, affine_params, check_choice, keep_real, real_positions

# The parts of a block that attend, in order: what each does with (index of the block, its name in params, its input)
Attends = Mapping[str, Callable[[int, str, Array], tuple[Array, Any]]]


class Config(NamedTuple):
    """What the parameters do not say.

    vocabulary, length : V tokens; at most `length` positions (learned positions only, sinusoidal ones have no end)
    features : 0, or the model reads vectors of so many numbers instead of tokens;  outputs : 0, or the head gives so many numbers instead of V
    width, heads, layers, feed_forward : E, H (a divisor of E), the number of blocks, the inner width of their feed-forward
    attention : "linear", "softmax" or "lsh-R", the Reformer's with R rounds of hashing;  feature_map : φ of linear attention
    norm : "pre" or "post";  causal : position i sees positions ≤ i only
    positions : "learned" or "sinusoidal";  activation : "gelu" or "relu"
    compiled : causal linear attention by loops that Numba compiles (extra `numba`); decoding, with `decoding_step`, all of it
    """

    vocabulary: int
    length: int
    width: int
    heads: int
    layers: int
    feed_forward: int
    attention: str = "linear"
    feature_map: str = "elu1"
    norm: str = "pre"
    causal: bool = True
    positions: str = "learned"
    activation: str = "gelu"
    features: int = 0
    outputs: int = 0
    compiled: bool = False


class TransformerState(NamedTuple):
    """What a prefix leaves behind: how long it was, and each layer's attention state. Never changed in place."""

    position: int
    layers: tuple[Any, ...]


# --- parameters --------------------------------------------------------------------------------------------------------------------------

def transformer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and the shape of every parameter, in the order in which the model uses them.

    Raises
    ------
    ValueError, TypeError
        `width: expected an integer ≥ 1, got 0`; `heads: expected a divisor of width = 8, got 3`; `norm: expected 'pre' or 'post',
        got 'rms'`.

    Examples
    --------
    >>> shapes = transformer_shapes(Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32))
    >>> shapes["blocks.0.feed_forward.in.weight"]
    (8, 32)
    """
    for name in ("vocabulary", "length", "width", "heads", "layers", "feed_forward"):
        check_positive(name, getattr(config, name))
    if config.width % config.heads:
        raise ValueError(f"heads: expected a divisor of width = {config.width}, got {config.heads}")
    attention_layer.check_compiles(config.attention, config.compiled)
    check_choice("norm", config.norm, ("pre", "post"))
    check_choice("positions", config.positions, ("learned", "sinusoidal"))
    check_choice("activation", config.activation, tuple(layers.ACTIVATIONS))
    for name in ("features", "outputs"):
        if getattr(config, name) != 0:
            check_positive(name, getattr(config, name))
    E, F, V = config.width, config.feed_forward, config.vocabulary
    shapes: dict[str, tuple[int, ...]] = affine_shapes("input", config.features, E) if config.features else {"token.weight": (V, E)}
    if config.positions == "learned":
        shapes["positions.weight"] = (config.length, E)
    for i in range(config.layers):
        shapes |= affine_shapes(f"blocks.{i}.attention.norm", E)
        for part in (*attention_layer.attention_inputs(config.attention), "out"):
            shapes |= affine_shapes(f"blocks.{i}.attention.{part}", E, E)
        shapes |= affine_shapes(f"blocks.{i}.feed_forward.norm", E)
        shapes |= affine_shapes(f"blocks.{i}.feed_forward.in", E, F) | affine_shapes(f"blocks.{i}.feed_forward.out", F, E)
    if config.norm == "pre":
        shapes |= affine_shapes("norm", E)
    return shapes | affine_shapes("head", E, config.outputs or V)


def transformer_init(rng: np.random.Generator, config: Config, dtype: Any = np.float32) -> Grads:
    """Parameters to start training from.

    Weights are normal with variance 1/(rows), so that activations keep their size; the two that write into the residual stream of L layers
    have it divided by 2L, so that the stream keeps its size too; token and position vectors have a variance of 1/E each; norms start as the
    identity, biases at zero.

    Parameters
    ----------
    rng : numpy.random.Generator
        Drawn from in float64 whatever the dtype: one seed gives one model, rounded.
    config : Config
    dtype

    Returns
    -------
    params : dict
        Keys and shapes of `transformer_shapes`.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> sum(p.size for p in transformer_init(np.random.default_rng(0), config).values())
    1186
    """
    return params_init(rng, transformer_shapes(config), config, dtype)


# --- whole sequences ---------------------------------------------------------------------------------------------------------------------

def transformer_forward(params: Params, inputs: Array, config: Config, *, lengths: Any = None,
                        rng: np.random.Generator | None = None) -> tuple[Array, Residuals]:
    """Logits for every position of whole sequences. With norm="post" each layer is eq. (1) of the paper, T(x) = f(A(x) + x).

    Parameters
    ----------
    params : dict
        From `transformer_init`, of this configuration.
    inputs : (..., N) integers, or (..., N, features)
        Tokens; vectors in the parameters' dtype if config.features > 0.
    config : Config
    lengths : integers (...), optional
        How many positions of each sequence are real. Logits of the others are zeros; what stands there (NaN too) does not matter.
    rng : numpy.random.Generator, optional
        Needed by attention "lsh-R" and by nothing else: each layer draws its rotations from it. To hash anew in each update, and the same
        again after an interruption, give update i `numpy.random.default_rng([seed, i])`.

    Returns
    -------
    logits : (..., N, V)
        In the parameters' dtype. With `causal`, position i predicts what follows it from the tokens ≤ i. With "lsh-R" later tokens still
        have a say in which of those share a chunk with i.
    residuals : tuple
        For `transformer_backward`.

    Raises
    ------
    ValueError
        `params: expected 'head.bias' = (10,), got (8,): …`, missing or foreign keys; `tokens: expected 0 ≤ token < V = 10, …`;
        `inputs: expected (..., N, features) = (..., 40), got (2, 9, 39)`;
        more positions than `config.length` with learned positions; `rng: expected a numpy.random.Generator, got None; …`.
    TypeError
        Parameters of several dtypes; tokens that are not integers, or vectors in another dtype than the parameters.

    Notes
    -----
    About 2·B·N·(4 E² + 2·E·F) flops a layer outside attention, and about 10·E + 2·F numbers kept for each position and layer.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params = transformer_init(np.random.default_rng(0), config)
    >>> logits, residuals = transformer_forward(params, np.array([[1, 2, 3]]), config)
    >>> logits.shape
    (1, 3, 10)
    """
    check_params(params, transformer_shapes(config))
    return stack_forward(params, inputs, config, lengths, {"attention": lambda i, name, y: attention_layer.attention_forward(
        params, name, y, causal=config.causal, lengths=lengths, rng=rng, **self_options(config))})


def transformer_backward(dlogits: Array, residuals: Residuals) -> Grads:
    """Transpose of `transformer_forward`: the same list of layers, last one first.

    Parameters
    ----------
    dlogits : (..., N, V)
        Cotangent of the logits, for example from `cross_entropy_backward`. Padded rows are not read.

    Returns
    -------
    grads : dict
        Keys, order, shapes and dtype of the parameters.

    Notes
    -----
    About twice the flops of the forward. May be called again on the same residuals, and from several threads.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params = transformer_init(np.random.default_rng(0), config)
    >>> logits, residuals = transformer_forward(params, np.array([[1, 2, 3]]), config)
    >>> grads = transformer_backward(np.ones_like(logits), residuals)
    >>> list(grads) == list(params), grads["head.bias"].tolist()[:2]
    (True, [3.0, 3.0])
    """
    grads = stack_backward(dlogits, residuals, {"attention": attention_layer.attention_backward})
    return {key: grads[key] for key in transformer_shapes(residuals[0])}


# --- the recurrent twin ------------------------------------------------------------------------------------------------------------------

def transformer_prefill(params: Params, inputs: Array, config: Config) -> tuple[Array, TransformerState]:
    """The logits of `transformer_forward` for a whole prefix, and the state from which `transformer_step` goes on. Keeps no residuals.

    Parameters
    ----------
    params : dict
    inputs : (..., N) integers, or (..., N, features)
        All of one length; N = 0 gives the state of `transformer_step_init`.
    config : Config
        Causal.

    Returns
    -------
    logits : (..., N, V)
    state : TransformerState

    Raises
    ------
    ValueError
        `config: expected causal=True, …`; `attention: expected 'linear' or 'softmax', got 'lsh-4', …`; those of `transformer_forward`.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params = transformer_init(np.random.default_rng(0), config)
    >>> logits, state = transformer_prefill(params, np.array([[1, 2, 3]]), config)
    >>> state.position
    3
    """
    check_params(params, transformer_shapes(config))
    check_recurrent(config)
    shape = check_inputs(params, inputs, config, ("N",))
    x, _ = read_forward(params, inputs, config)
    x, _ = positions_forward(params, x, config, 0)
    logits, states = stack_decode(params, x, config, {"attention": lambda i, name, y: attention_layer.attention_prefill(
        params, name, y, **self_options(config))})
    return logits, TransformerState(shape[-1], states)


def transformer_step_init(config: Config, batch: int, dtype: Any = np.float32) -> TransformerState:
    """The state behind an empty prefix.

    Parameters
    ----------
    config : Config
    batch : int
        B, how many sequences are decoded side by side.
    dtype
        That of the parameters.

    Returns
    -------
    state : TransformerState
        With linear attention S (B, H, D, M) and z (B, H, D) for each layer, all zeros; with softmax attention an empty cache.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=3, feed_forward=32)
    >>> state = transformer_step_init(config, batch=5)
    >>> state.position, len(state.layers), state.layers[0].S.shape
    (0, 3, (5, 2, 4, 4))
    """
    transformer_shapes(config)
    check_recurrent(config)
    return TransformerState(0, first_states((batch,), config, dtype))


def transformer_step(params: Params, input_t: Array, state: TransformerState, config: Config) -> tuple[Array, TransformerState]:
    """Read one token, or one vector, for each sequence and predict what follows it (eq. (16) to (20) of the paper, for every layer).

    Parameters
    ----------
    params : dict
    input_t : (...) integers, or (..., features)
    state : TransformerState
        From `transformer_step_init`, `transformer_prefill` or the step before. It is left as it was: go back to it to try another token.
    config : Config

    Returns
    -------
    logits_t : (..., V)
        What `transformer_forward` gives at this position, up to rounding.
    state : TransformerState

    Notes
    -----
    With linear attention time and memory do not depend on how many tokens came before; with softmax attention both grow with them.

    Examples
    --------
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params = transformer_init(np.random.default_rng(0), config)
    >>> logits_t, state = transformer_step(params, np.array([1]), transformer_step_init(config, batch=1), config)
    >>> logits_t.shape, state.position
    ((1, 10), 1)
    """
    check_recurrent(config)
    check_state(state, config)
    check_inputs(params, input_t, config, ())
    x, _ = read_forward(params, input_t, config)
    x, _ = positions_forward(params, x[..., None, :], config, state.position)
    logits_t, states = stack_decode(params, x[..., 0, :], config, {"attention": lambda i, name, y: attention_layer.attention_step(
        params, name, y, state.layers[i], **self_options(config))})
    return logits_t, TransformerState(state.position + 1, states)


# --- what they share ---------------------------------------------------------------------------------------------------------------------

def stack_forward(params: Params, inputs: Array, config: Config, lengths: Any, attends: Attends) -> tuple[Array, Residuals]:
    """The model for whole sequences, in every block the parts that attend and then the feed-forward: (logits, residuals)."""
    xp = namespace(inputs=inputs)
    real = real_positions(xp, "lengths", lengths, check_inputs(params, inputs, config, ("N",)))
    x, r_read = read_forward(params, keep_real(xp, real, inputs), config)
    x, r_positions = positions_forward(params, x, config, 0)
    r_blocks = []
    for name, inner in _parts(params, config, attends):
        x, r_part = _around_forward(params, name, x, config, inner)
        r_blocks.append(r_part)
    r_norm = None
    if config.norm == "pre":
        x, r_norm = layers.layer_norm_forward(x, *affine_params(params, "norm"))
    logits, r_head = layers.affine_forward(x, *affine_params(params, "head"))
    return keep_real(xp, real, logits), (config, real, r_read, r_positions, r_blocks, r_norm, r_head)


def stack_backward(dlogits: Array, residuals: Residuals, attends: Mapping[str, Callable[[Array, Any], tuple[Array, Grads]]]) -> Grads:
    """Transpose of `stack_forward`; `attends` are the transposes of its parts, in the order of the forward."""
    config, real, r_read, r_positions, r_blocks, r_norm, (x_head, w_head) = residuals
    layers.check_dout(dlogits, (*x_head.shape[:-1], w_head.shape[1]), x_head)
    xp = namespace(dlogits=dlogits)
    grads: Grads = {}
    dx, grads["head.weight"], grads["head.bias"] = layers.affine_backward(keep_real(xp, real, dlogits), (x_head, w_head))
    if r_norm is not None:
        dx, grads["norm.weight"], grads["norm.bias"] = layers.layer_norm_backward(dx, r_norm)
    parts = {**attends, "feed_forward": layers.feed_forward_backward}
    names = [(f"blocks.{i}.{part}", backward) for i in range(config.layers) for part, backward in parts.items()]
    for (name, backward), r_part in zip(reversed(names), reversed(r_blocks), strict=True):
        dx = _around_backward(grads, name, dx, config, r_part, backward)
    if r_positions is not None:
        dx, grads["positions.weight"] = layers.positions_backward(dx, r_positions)
    if config.features:
        _, grads["input.weight"], grads["input.bias"] = layers.affine_backward(dx, r_read)
    else:
        grads["token.weight"] = layers.embedding_backward(dx, r_read)
    return grads


def stack_decode(params: Params, x: Array, config: Config, attends: Attends) -> tuple[Array, tuple[Any, ...]]:
    """`stack_forward` of what was read, x (..., E) or (..., N, E), where parts give states and not residuals, of which none are kept: the
    logits, and what the self-attention of each block leaves behind."""
    states = []
    for name, inner in _parts(params, config, attends):
        x, (_, state) = _around_forward(params, name, x, config, inner)
        if name.endswith(".attention"):
            states.append(state)
    if config.norm == "pre":
        x, _ = layers.layer_norm_forward(x, *affine_params(params, "norm"))
    return layers.affine_forward(x, *affine_params(params, "head"))[0], tuple(states)


def _parts(params: Params, config: Config, attends: Attends) -> Iterator[tuple[str, Callable[[Array], tuple[Array, Any]]]]:
    """Every part of every block in order: its name, and what it does."""
    for i in range(config.layers):
        for part, attend in attends.items():
            yield f"blocks.{i}.{part}", partial(attend, i, f"blocks.{i}.{part}")
        name = f"blocks.{i}.feed_forward"
        yield name, partial(layers.feed_forward_forward, params, name, activation=config.activation)


def _around_forward(params: Params, name: str, x: Array, config: Config,
                    inner: Callable[[Array], tuple[Array, Any]]) -> tuple[Array, tuple[Any, Any]]:
    """The residual connection and the norm around `inner`: x + inner(norm(x)), or norm(x + inner(x))."""
    norm = affine_params(params, f"{name}.norm")
    if config.norm == "pre":
        y, r_norm = layers.layer_norm_forward(x, *norm)
        y, r_inner = inner(y)
        y += x                                      # y is the inner layer's own product; nothing else holds it
        return y, (r_norm, r_inner)
    y, r_inner = inner(x)
    y += x
    y, r_norm = layers.layer_norm_forward(y, *norm)
    return y, (r_norm, r_inner)


def _around_backward(grads: Grads, name: str, dout: Array, config: Config, residuals: tuple[Any, Any],
                     inner_backward: Callable[[Array, Any], tuple[Array, Grads]]) -> Array:
    """Transpose of `_around_forward`; puts the gradients of its parameters into `grads` and returns dx."""
    r_norm, r_inner = residuals
    if config.norm == "pre":
        dy, inner_grads = inner_backward(dout, r_inner)
        dx, grads[f"{name}.norm.weight"], grads[f"{name}.norm.bias"] = layers.layer_norm_backward(dy, r_norm)
        dx += dout
    else:
        dout, grads[f"{name}.norm.weight"], grads[f"{name}.norm.bias"] = layers.layer_norm_backward(dout, r_norm)
        dx, inner_grads = inner_backward(dout, r_inner)
        dx += dout
    grads.update(inner_grads)
    return dx


def read_forward(params: Params, inputs: Array, config: Config) -> tuple[Array, Residuals]:
    if config.features:
        return layers.affine_forward(inputs, *affine_params(params, "input"))
    return layers.embedding_forward(inputs, params["token.weight"])


def positions_forward(params: Params, x: Array, config: Config, start: int) -> tuple[Array, Residuals | None]:
    if config.positions == "learned":
        return layers.positions_forward(x, params["positions.weight"], start=start)
    positions = layers.sinusoidal_positions(x.shape[-2], config.width, np.float64, start=start)
    positions /= math.sqrt(config.width / 2)        # to the size of the token vectors: Σ of the squares of a row is E/2
    x += namespace(x=x).asarray(positions.astype(x.dtype))
    return x, None


def attention_options(config: Config) -> dict[str, Any]:
    return {"heads": config.heads, "attention": config.attention, "feature_map": config.feature_map}


def self_options(config: Config) -> dict[str, Any]:
    return {**attention_options(config), "compiled": config.compiled}


def affine_shapes(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}


def params_init(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]], config: Config, dtype: Any) -> Grads:
    """Parameters of these shapes as `transformer_init` says; all that write into the residual stream share it alike."""
    writers = {key for key in shapes if key.startswith("blocks.") and key.endswith(".out.weight")}
    params: Grads = {}
    for key, shape in shapes.items():
        if len(shape) == 1:
            params[key] = np.full(shape, float("norm." in key and key.endswith(".weight")), dtype)
            continue
        fan = config.width if key in ("token.weight", "positions.weight") else shape[0]
        fan *= len(writers) if key in writers else 1
        params[key] = (rng.standard_normal(shape) / math.sqrt(fan)).astype(dtype)
    return params


def first_states(lead: tuple[int, ...], config: Config, dtype: Any) -> tuple[Any, ...]:
    """The self-attention states of all layers before the first position."""
    return tuple(attention_layer.attention_init(lead, config.width, dtype, **attention_options(config)) for _ in range(config.layers))


def check_params(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if params.keys() != shapes.keys():
        missing, foreign = sorted(shapes.keys() - params.keys()), sorted(params.keys() - shapes.keys())
        raise ValueError(f"params: expected the keys of this configuration, got {len(missing)} missing (first {missing[:1]}) and "
                         f"{len(foreign)} foreign (first {foreign[:1]}); initialise or load with this very configuration")
    check_dtypes(**params)
    for key, shape in shapes.items():
        check_shape(f"params[{key!r}]", params[key], "the shape of this configuration", shape,
                    "initialise or load with this very configuration")


def check_inputs(params: Params, inputs: Array, config: Config, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The axes of the tokens, or of the vectors without their own: what comes before, and `axes`."""
    named = ", ".join(("...", *axes))
    if not config.features:
        if inputs.ndim < len(axes):
            raise ValueError(f"tokens: expected ({named}), got {tuple(inputs.shape)}")
        return tuple(inputs.shape)
    if inputs.ndim < len(axes) + 1 or inputs.shape[-1] != config.features:
        raise ValueError(f"inputs: expected ({named}, features) = (..., {config.features}), got {tuple(inputs.shape)}")
    check_dtypes(inputs=inputs, **{"params['input.weight']": params["input.weight"]})
    return tuple(inputs.shape[:-1])


def check_recurrent(config: Config) -> None:
    attention_layer.recurrent_inputs(config.attention)
    if not config.causal:
        raise ValueError("config: expected causal=True, got causal=False: only a causal model can be read as a recurrence")


def check_state(state: Any, config: Config) -> None:
    if len(state.layers) != config.layers:
        raise ValueError(f"state: expected the states of layers = {config.layers} layers, got {len(state.layers)}; make it with this "
                         "config")
