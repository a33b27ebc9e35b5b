"""Decoding that never goes back: `transformer_step` with all that does not depend on the token done once, and a state that is its own.

    step = decoding_step(params, config, state)
    logits_t = step(token_t)                                    # transformer_step(params, token_t, state, config), up to rounding

Nothing is checked twice, the state is updated in place, query, key and value are one product, and what a norm multiplies and adds goes into the
product behind it. With c = x - mean(x) and x̂ = c / √(mean(c²) + ε),

    (x̂ ∘ w + b) W + a  =  (c / √(Σ c² + E ε)) (√E Diag(w) W) + (b W + a)

The equations are those of `refattn.transformer`; the laws hold both to be the same function. `refattn/compiled/model.py` does the same in one loop.

Axes   B sequences side by side · E model width · H heads · D, M features of a head · F = φ's
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import layers
from .attention import _inverse
from .causal import STEP_BYTES
from .features import feature_map as find_feature_map
from .layers import Params, affine_params
from .softmax import softmax_step
from .transformer import Config, TransformerState, check_inputs, check_params, positions_forward, read_forward, transformer_shapes, transformer_step

EPS_NORM, EPS_ATTENTION = 1e-5, 1e-6       # those of layer_norm_forward and of causal_linear_attention


def decoding_step(params: Params, config: Config, state: TransformerState) -> Callable[[np.ndarray], np.ndarray]:
    """A function that reads one token, or one vector, for each sequence and returns the logits of what follows: with each call one further.

    Parameters
    ----------
    params : dict
        Read now and with each call: not to be written to as long as the function is in use.
    config : Config
        Causal.
    state : TransformerState
        Where to begin: from `transformer_step_init`, `transformer_prefill` or `transformer_step`. It is left as it was.

    Returns
    -------
    step
        A function of `input_t`, (B,) tokens or (B, features), whose results are new arrays. Not for several threads at once.

    Raises
    ------
    ValueError, TypeError
        Those of `transformer_step`; `input_t: expected (B,) = (4,) …`.

    Notes
    -----
    The flops of `transformer_step` without its copy of the states. Where it has no shorter way (norm "post", float16, arrays other than NumPy's)
    it is `transformer_step`. With `compiled` of the config and φ = elu + 1 the whole step is one loop that Numba compiles, each thread having some of
    the sequences.

    Examples
    --------
    >>> from refattn.transformer import transformer_init, transformer_step_init
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params = transformer_init(np.random.default_rng(0), config)
    >>> step = decoding_step(params, config, transformer_step_init(config, batch=1))
    >>> logits_0, logits_1 = step(np.array([1])), step(np.array([2]))
    >>> logits_1.shape
    (1, 10)
    """
    check_params(params, transformer_shapes(config))
    head = params["head.weight"]
    zeros = np.zeros((*_lead(state), *([config.features] if config.features else [])), head.dtype if config.features else int)
    short = config.norm == "pre" and isinstance(head, np.ndarray) and head.dtype.name in ("float32", "float64") and zeros.ndim == 1 + bool(
        config.features) and len(zeros) > 0
    if not short:
        now = state

        def plain(input_t: np.ndarray) -> np.ndarray:
            nonlocal now
            logits, now = transformer_step(params, input_t, now, config)
            return logits

        return plain
    transformer_step(params, zeros, state, config)                  # says what is wrong with any of them
    B, E, position = len(zeros), config.width, state.position
    products = [_products(params, f"blocks.{i}") for i in range(config.layers)]
    W_head, b_head = _folded(params, "norm", *affine_params(params, "head"))

    def read(input_t: np.ndarray) -> np.ndarray:
        nonlocal position
        if input_t.shape != zeros.shape:
            raise ValueError(f"input_t: expected {'(B, features)' if config.features else '(B,)'} = {zeros.shape}, got {input_t.shape}; "
                             "the state is of so many sequences")
        check_inputs(params, input_t, config, ())
        x, _ = read_forward(params, input_t, config)
        x = positions_forward(params, x[:, None], config, position)[0][:, 0]
        position += 1
        return x

    if config.compiled and config.feature_map == "elu1":
        from .compiled.launch import decoder
        decode = decoder([*(part for block in products for part in block), (W_head, b_head)], state.layers, EPS_NORM, EPS_ATTENTION,
                         config.activation)
        return lambda input_t: decode(read(input_t))
    attends = [_attend(layer, config, B, head.dtype) for layer in state.layers]
    mean_of, mean, rate = np.full((E, 1), 1 / E, head.dtype), np.empty((B, 1), head.dtype), np.empty((B, 1), head.dtype)
    centred, more = np.empty((B, E), head.dtype), np.empty((B, E), head.dtype)
    projected, inner = np.empty((B, 3 * E), head.dtype), np.empty((B, config.feed_forward), head.dtype)

    def normalised(x: np.ndarray) -> np.ndarray:
        """x̂ / √E."""
        np.matmul(x, mean_of, out=mean)
        np.subtract(x, mean, out=centred)
        np.vecdot(centred, centred, out=rate[:, 0])
        np.add(rate, E * EPS_NORM, out=rate)
        np.sqrt(rate, out=rate)
        return np.divide(centred, rate, out=centred)

    def step(input_t: np.ndarray) -> np.ndarray:
        x = read(input_t)
        for ((W_qkv, b_qkv), (W_out, b_out), (W_in, b_in), (W_back, b_back)), attend in zip(products, attends, strict=True):
            np.matmul(normalised(x), W_qkv, out=projected)
            np.add(projected, b_qkv, out=projected)
            x += np.matmul(attend(projected.reshape(B, 3, config.heads, -1)), W_out, out=more)
            x += b_out
            np.matmul(normalised(x), W_in, out=inner)
            np.add(inner, b_in, out=inner)
            active = np.maximum(inner, 0, out=inner) if config.activation == "relu" else layers.gelu_forward(inner)[0]
            x += np.matmul(active, W_back, out=more)
            x += b_back
        return np.asarray(normalised(x) @ W_head + b_head)

    return step


def _products(params: Params, block: str) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(W, b) of a block in the order of their use: query, key and value side by side, out, and both of the feed-forward."""
    parts = [affine_params(params, f"{block}.attention.{part}") for part in ("query", "key", "value")]
    qkv = np.concatenate([w for w, _ in parts], 1), np.concatenate([b for _, b in parts])
    return (_folded(params, f"{block}.attention.norm", *qkv), affine_params(params, f"{block}.attention.out"),
            _folded(params, f"{block}.feed_forward.norm", *affine_params(params, f"{block}.feed_forward.in")),
            affine_params(params, f"{block}.feed_forward.out"))


def _folded(params: Params, norm: str, W: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """√E Diag(w) W and b W + a, for the norm's w and b."""
    w, b = affine_params(params, norm)
    return W * (w * w.dtype.type(math.sqrt(len(w))))[:, None], b @ W + a


def _attend(state: Any, config: Config, B: int, dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Attention of one layer: from q, k and v (B, 3, H, D), which come position after position, to (B, E). It owns its state."""
    if config.attention == "softmax":
        cache = state

        def softmax(qkv: np.ndarray) -> np.ndarray:
            nonlocal cache
            out, cache = softmax_step(qkv[:, 0], qkv[:, 1], qkv[:, 2], cache)
            return out.reshape(B, -1)

        return softmax
    S, z, phi = state.S.copy(), state.z.copy(), find_feature_map(config.feature_map)
    H, F, M = S.shape[1:]
    some = max(STEP_BYTES // max(S[:1].nbytes, 1), 1)               # sequences whose states stay in the cache between the three passes below
    write, num = np.empty((min(some, B), H, F, M), dtype), np.empty((B, H, 1, M), dtype)
    # φ(k) vᵀ as [φ(k) 0] [v 0]ᵀ: a product of matrices, for which BLAS takes half the time that NumPy takes for an outer product
    keys, values = np.zeros((B, H, 2, F), dtype), np.zeros((B, H, 2, M), dtype)

    def linear(qkv: np.ndarray) -> np.ndarray:
        mapped = phi.forward(qkv[:, :2])
        q, k = mapped[:, 0], mapped[:, 1]
        keys[:, :, 0], values[:, :, 0] = k, qkv[:, 2]
        for start in range(0, B, some):                             # S ← S + φ(k) vᵀ, num = Sᵀ φ(q)                          (eq. 18, 20)
            b = slice(start, start + some)
            after = S[b]
            np.matmul(keys[b].mT, values[b], out=write[:len(after)])
            np.add(after, write[:len(after)], out=after)
            np.matmul(q[b, :, None, :], after, out=num[b])
        np.add(z, k, out=z)                                         # z ← z + φ(k), out = num / (zᵀ φ(q) + ε)                 (eq. 19, 20)
        np.multiply(num, _inverse(np.vecdot(q, z) + EPS_ATTENTION)[..., None, None], out=num)
        return num.reshape(B, -1)

    return linear


def _lead(state: TransformerState) -> tuple[int, ...]:
    """(...) of the sequences that a state is of."""
    first = state.layers[0]
    return tuple((first.S.shape if hasattr(first, "S") else first.keys.shape)[:-3])
