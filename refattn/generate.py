"""Drawing sequences from a model: read the prompt at once, then one step for each new token.

    p(next = c) = exp(x_c / T) / Σ_c' exp(x_c' / T)        x the logits of the last position, T the temperature

Axes   B sequences side by side · P positions of the prompt · V vocabulary
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from ._array import check_number
from .attention_layer import attention_rounds
from .decoding import decoding_step
from .layers import Params
from .transformer import Config, transformer_forward, transformer_prefill


class Draw(Protocol):
    """How the head's numbers become tokens: `sample`, or `logistic_mixture_sample`."""

    def __call__(self, logits: np.ndarray, rng: np.random.Generator, /, *, temperature: float) -> np.ndarray: ...


def generate(params: Params, config: Config, prompt: np.ndarray, count: int, rng: np.random.Generator, *,
             temperature: float = 1.0, draw: Draw | None = None) -> np.ndarray:
    """Continue prompts by `count` tokens each: `transformer_prefill`, then `decoding_step`.

    Parameters
    ----------
    params : dict
    config : Config
        Causal.
    prompt : (B, P) integers
        P ≥ 1: what comes first is not the model's to say.
    count : int
        How many tokens to add; with learned positions P + count - 1 ≤ config.length, since the last token is not read.
    rng : numpy.random.Generator
        One uniform number is drawn for each new token.
    temperature : float
        T ≥ 0; 0 takes the most likely token (the first of equals).
    draw
        A function of the head's numbers (B, V), `rng` and `temperature` that gives (B,) integers; `sample` if None.
        `refattn.losses.logistic_mixture_sample` is one for images.

    Returns
    -------
    tokens : (B, P + count)
        The prompt and what follows, in the prompt's dtype.

    Raises
    ------
    ValueError
        `prompt: expected (B, P) with P ≥ 1, got (4, 0)`; `count: expected an integer ≥ 0, got -1`; `logits: expected a number …` where
        the model gives NaN; those of `transformer_prefill`.

    Notes
    -----
    With linear attention each token costs the same however long the sequence is, and the state keeps its size; with softmax attention
    each costs as much as the sequence is long.

    Examples
    --------
    >>> from refattn.transformer import transformer_init
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> params = transformer_init(np.random.default_rng(0), config)
    >>> generate(params, config, np.array([[1, 2], [3, 4]]), 5, np.random.default_rng(0)).shape
    (2, 7)
    """
    tokens = _room(config, prompt, count)
    drawn = generate_stream(params, config, prompt, rng, temperature=temperature, draw=draw)
    for position, token in enumerate(itertools.islice(drawn, int(count)), prompt.shape[1]):
        tokens[:, position] = token
    return tokens


def generate_stream(params: Params, config: Config, prompt: np.ndarray, rng: np.random.Generator, *, temperature: float = 1.0,
                    draw: Draw | None = None) -> Iterator[np.ndarray]:
    """The tokens that `generate` adds, (B,) each, one after another and without an end; nothing is kept of them but the model's state.

    Parameters and errors are those of `generate`, the latter when the first token is asked for. With learned positions ValueError behind
    config.length. A token is read when the next one is asked for.

    Notes
    -----
    With linear attention constant time for each token and constant memory.

    Examples
    --------
    >>> from refattn.transformer import transformer_init
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32, positions="sinusoidal")
    >>> params = transformer_init(np.random.default_rng(0), config)
    >>> stream = generate_stream(params, config, np.array([[1, 2], [3, 4]]), np.random.default_rng(0))
    >>> sum(token.shape == (2,) for token in itertools.islice(stream, 100))
    100
    """
    _room(config, prompt, 0)
    draw = draw or sample
    logits, state = transformer_prefill(params, prompt, config)
    logits_t = logits[:, -1]
    del logits                                      # of a long prompt they are much, and a stream may run long
    step = decoding_step(params, config, state)
    while True:
        token = draw(logits_t, rng, temperature=temperature)
        yield token
        logits_t = step(token)


def generate_recomputed(params: Params, config: Config, prompt: np.ndarray, count: int, rng: np.random.Generator, *,
                        temperature: float = 1.0, draw: Draw | None = None) -> np.ndarray:
    """What `generate` gives, but reading the whole prefix anew for each token, as a model without a state has to.

    So were the `softmax` rows of the paper's tables 1 and 2 timed.

    Parameters, returns and errors are those of `generate`; from one seed both draw the same tokens, unless rounding decides between two.
    LSH attention, which `generate` refuses, is hashed anew for each token, by rotations drawn from `rng`.

    Notes
    -----
    Token i costs as much as a forward pass over i positions: O(N²) for N tokens with linear attention, O(N³) with softmax attention.

    Examples
    --------
    >>> from refattn.transformer import transformer_init
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32, attention="softmax")
    >>> params = transformer_init(np.random.default_rng(0), config)
    >>> generate_recomputed(params, config, np.array([[1, 2], [3, 4]]), 5, np.random.default_rng(0)).shape
    (2, 7)
    """
    tokens, P, draw = _room(config, prompt, count), prompt.shape[1], draw or sample
    for position in range(P, P + count):
        prefix = tokens[:, :position]
        logits, _ = (transformer_forward(params, prefix, config, rng=rng) if attention_rounds(config.attention) else
                     transformer_prefill(params, prefix, config))
        tokens[:, position] = draw(logits[:, -1], rng, temperature=temperature)
    return tokens


def sample(logits: np.ndarray, rng: np.random.Generator, *, temperature: float = 1.0) -> np.ndarray:
    """Draw one class for each row by inverting the distribution function at one uniform number.

    Parameters
    ----------
    logits : (..., V)
        -inf excludes a class.
    rng : numpy.random.Generator
        Drawn from once, `rng.random(logits.shape[:-1])`, whatever the temperature.
    temperature : float
        T ≥ 0; 0 takes the largest logit (the first of equals).

    Returns
    -------
    classes : (...) integers

    Raises
    ------
    ValueError
        `logits: expected a number or -inf everywhere and one finite logit in each row, got NaN, …`.

    Notes
    -----
    In float64. A class of probability 0 is never drawn: the drawn one is the first whose running sum exceeds u · (the whole sum), u < 1.

    Examples
    --------
    >>> sample(np.array([[0.0, -np.inf], [-np.inf, 0.0]]), np.random.default_rng(0)).tolist()
    [0, 1]
    """
    T = check_number("temperature", temperature, least=0)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected (..., V) with V ≥ 1, got {logits.shape}")
    x = logits.astype(np.float64)
    largest = x.max(-1, keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError("logits: expected a number or -inf everywhere and one finite logit in each row, got NaN, +inf or a row of -inf; "
                         "look at the parameters")
    u = rng.random(x.shape[:-1])
    if T == 0:
        return np.asarray(x.argmax(-1))
    x -= largest
    with np.errstate(over="ignore"):                # a tiny T sends all but the largest to -inf, as it should
        x /= T
    below = np.cumsum(np.exp(x), -1)
    return np.asarray((below <= u[..., None] * below[..., -1:]).sum(-1))


def _room(config: Config, prompt: np.ndarray, count: int) -> np.ndarray:
    """An array for prompt and continuation, with the prompt in it."""
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt: expected (B, P) with P ≥ 1, got {prompt.shape}")
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 0:
        raise ValueError(f"count: expected an integer ≥ 0, got {count!r}")
    if prompt.dtype.kind not in "iu":
        raise TypeError(f"prompt: expected integers, got {prompt.dtype.name}")
    if np.iinfo(prompt.dtype).max < config.vocabulary - 1:
        raise TypeError(f"prompt is {prompt.dtype.name}, too narrow for the tokens of a vocabulary of {config.vocabulary}; use int64")
    P = prompt.shape[1]
    if config.positions == "learned" and P + count - 1 > config.length:
        raise ValueError(f"count: expected at most {config.length - P + 1} more tokens, got {count}: the prompt has {P} and "
                         f"config.length is {config.length}")
    tokens = np.empty((prompt.shape[0], P + int(count)), prompt.dtype)
    tokens[:, :P] = prompt
    return tokens
