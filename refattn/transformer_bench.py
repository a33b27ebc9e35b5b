"""`python -m refattn bench --models`: a training step and a decoding step of whole models at the paper's sizes, beside PyTorch with the paper
authors' `pytorch-fast-transformers` where that is installed.

The model is theirs: layers of 256 with 8 heads, norm("post"), relu, a feed-forward of 1,024; tokens and learnt positions at its beginning, 30 numbers
for each position at its end. For training it gets our weights, and its outputs and gradients are compared with ours on a short sequence (in a long
one some relu stands so near to 0 that rounding decides it) before anything is timed; a step is forward, backward and Adam. Decoding is one token for
each of B sequences; theirs is measured without embedding and head.
"""
from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .bench import Contest, _check, _row, _times, _title, medians
from .decoding import decoding_step
from .optim import AdamSlots, adam_init, adam_step
from .transformer import Config, transformer_backward, transformer_forward, transformer_init, transformer_step_init

SHORT = 32                      # positions of what is compared
ROUNDINGS = 4096                # of float32 on the way through eight layers and back: what is compared is the same model, not the same sum


def models_report(peers: dict[str, Any], seconds: float, smoke: bool) -> dict[str, Any]:
    """Prints both tables; all figures."""
    return {"training": _training_table(peers, seconds, smoke), "decoding": _decoding_table(peers, seconds, smoke)}


def _model(layers: int, N: int, smoke: bool) -> Config:
    width, heads = (16, 2) if smoke else (256, 8)
    return Config(257, N, width, heads, layers, 4 * width, norm="post", activation="relu", outputs=30)


def _forms() -> dict[str, bool]:
    """What `compiled` is in each form that can be had here."""
    return {"NumPy": False} | ({"compiled": True} if importlib.util.find_spec("numba") is not None else {})


# --- training ----------------------------------------------------------------------------------------------------------------------------

def _training_table(peers: dict[str, Any], seconds: float, smoke: bool) -> list[dict[str, Any]]:
    layers, N, B = (2, 12, 2) if smoke else (8, 784, 4)
    config = _model(layers, N, smoke)
    _title(f"a training step, {layers} layers of {config.width}, N = {N}, batch {B}, ms",
           "ours", "NumPy", "compiled", "theirs", "NumPy", "compiled")
    params = transformer_init(np.random.default_rng(0), config)
    rng = np.random.default_rng(1)
    tokens, dlogits = rng.integers(0, 257, (B, N)), rng.standard_normal((B, N, 30), np.float32)
    contest: Contest = {name: _step(params, tokens, dlogits, config._replace(compiled=compiled)) for name, compiled in _forms().items()}
    if "fast_transformers" in peers:
        contest["theirs"] = _their_step(peers, params, tokens, dlogits, config)
    t = medians(contest, seconds)
    _row("", *(f"{t[name] * 1e3:.0f}" if name in t else "–" for name in ("NumPy", "compiled", "theirs")),
         *(_times(t.get("theirs"), t[name]) if name in t else "–" for name in ("NumPy", "compiled")))
    return [{"batch": B, "N": N, "layers": layers, **t}]


def _step(params: Any, tokens: np.ndarray, dlogits: np.ndarray, config: Config) -> Callable[[], Any]:
    now: tuple[Any, AdamSlots] = params, adam_init(params)

    def step() -> Any:
        nonlocal now
        _, residuals = transformer_forward(now[0], tokens, config)
        now = adam_step(now[0], transformer_backward(dlogits, residuals), now[1], learning_rate=1e-4)

    return step


def _their_step(peers: dict[str, Any], params: Any, tokens: np.ndarray, dlogits: np.ndarray, config: Config) -> Callable[[], Any]:
    torch = peers["torch"]
    from fast_transformers.builders import TransformerEncoderBuilder
    from fast_transformers.masking import TriangularCausalMask

    size = config.width // config.heads
    encoder = TransformerEncoderBuilder.from_kwargs(
        attention_type="causal-linear", n_layers=config.layers, n_heads=config.heads, query_dimensions=size, value_dimensions=size,
        feed_forward_dimensions=config.feed_forward, activation="relu", dropout=0.0, final_normalization=False).get()
    token, head = torch.nn.Embedding(config.vocabulary, config.width), torch.nn.Linear(config.width, config.outputs)
    position = torch.nn.Parameter(torch.zeros(config.length, config.width))
    named = {"token.weight": (token.weight, False), "positions.weight": (position, False), "head.weight": (head.weight, True),
             "head.bias": (head.bias, False)}
    for i, layer in enumerate(encoder.layers):
        theirs = {"attention.query": layer.attention.query_projection, "attention.key": layer.attention.key_projection,
                  "attention.value": layer.attention.value_projection, "attention.out": layer.attention.out_projection,
                  "attention.norm": layer.norm1, "feed_forward.norm": layer.norm2,
                  "feed_forward.in": layer.linear1, "feed_forward.out": layer.linear2}
        for name, module in theirs.items():
            named[f"blocks.{i}.{name}.weight"] = module.weight, not name.endswith("norm")
            named[f"blocks.{i}.{name}.bias"] = module.bias, False
    with torch.no_grad():
        for name, (parameter, transposed) in named.items():
            parameter.copy_(torch.from_numpy(params[name].T if transposed else params[name]))
    adam = torch.optim.Adam([parameter for parameter, _ in named.values()], lr=1e-4)

    def gradients(x: Any, d: Any, mask: Any) -> Any:
        adam.zero_grad()
        logits = head(encoder(token(x) + position[: x.shape[1]], attn_mask=mask))
        logits.backward(d)
        return logits

    def given(rows: slice, positions: slice) -> tuple[Any, Any, Any]:
        x = torch.from_numpy(tokens[rows, positions].copy())
        return x, torch.from_numpy(dlogits[rows, positions].copy()), TriangularCausalMask(x.shape[1])

    logits, residuals = transformer_forward(params, tokens[:1, :SHORT], config)
    found = gradients(*given(slice(1), slice(SHORT))).detach().numpy()
    grads = transformer_backward(np.ascontiguousarray(dlogits[:1, :SHORT]), residuals)
    _check("pytorch-fast-transformers", [logits, *(grads[name] for name in named)],
           [found, *(parameter.grad.numpy().T if transposed else parameter.grad.numpy() for parameter, transposed in named.values())], ROUNDINGS)

    arguments = given(slice(None), slice(None))

    def step() -> Any:
        gradients(*arguments)
        adam.step()

    return step


# --- decoding ----------------------------------------------------------------------------------------------------------------------------

def _decoding_table(peers: dict[str, Any], seconds: float, smoke: bool) -> list[dict[str, Any]]:
    rows = []
    _title("a decoding step, ms", "layers", "batch", "NumPy", "compiled", "theirs", "NumPy", "compiled")
    for layers in (2,) if smoke else (8, 16):
        config = _model(layers, 784, smoke)._replace(norm="pre", positions="sinusoidal")    # as long as it is timed
        params = transformer_init(np.random.default_rng(0), config)
        for B in (1, 64):
            tokens = np.zeros(B, int)
            contest: Contest = {
                name: partial(decoding_step(params, config._replace(compiled=compiled), transformer_step_init(config, B)), tokens)
                for name, compiled in _forms().items()}
            if "fast_transformers" in peers:
                contest["theirs"] = _their_decoding(peers, config, B)
            t = medians(contest, seconds)
            rows.append({"layers": layers, "batch": B, **t})
            _row(layers, B, *(f"{t[name] * 1e3:.2f}" if name in t else "–" for name in ("NumPy", "compiled", "theirs")),
                 *(_times(t.get("theirs"), t[name]) if name in t else "–" for name in ("NumPy", "compiled")))
    return rows


def _their_decoding(peers: dict[str, Any], config: Config, B: int) -> Callable[[], Any]:
    torch = peers["torch"]
    from fast_transformers.builders import RecurrentEncoderBuilder

    size = config.width // config.heads
    encoder = RecurrentEncoderBuilder.from_kwargs(attention_type="linear", n_layers=config.layers, n_heads=config.heads, query_dimensions=size,
                                                  value_dimensions=size, feed_forward_dimensions=config.feed_forward, activation="relu").get().eval()
    x = torch.zeros(B, config.width)
    with torch.no_grad():
        _, memory = encoder(x)

    def step() -> Any:
        with torch.no_grad():
            return encoder(x, state=memory)

    return step
