"""Laws of the model: it is its equations, its backward is the transpose, and its recurrent twin is the same function.

All in float64 unless said otherwise. Where a bound is not derived number by number, it is ROUNDINGS units of float64 times the size of what
was added up: no path through these models has more roundings, and any mistake in a formula is many orders of magnitude larger.
"""
from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import attention_layer
from refattn import oracle as definitions
from refattn.losses import cross_entropy_backward, cross_entropy_forward
from refattn.optim import adam_init, adam_step
from refattn.testing.budgets import gamma
from refattn.transformer import (
    Config,
    transformer_backward,
    transformer_forward,
    transformer_init,
    transformer_prefill,
    transformer_shapes,
    transformer_step,
    transformer_step_init,
)

ROUNDINGS = 4096
BUCKETS, CHUNK = 4, 2       # so that five positions meet, part and change chunks
seeds = st.integers(0, 2**32 - 1)
configs = st.builds(Config, vocabulary=st.just(7), length=st.just(6), width=st.just(4), heads=st.sampled_from([1, 2, 4]),
                    layers=st.integers(1, 3), feed_forward=st.sampled_from([3, 5]),
                    attention=st.sampled_from(["linear", "softmax", "lsh-1", "lsh-3"]),
                    norm=st.sampled_from(["pre", "post"]), causal=st.booleans(), positions=st.sampled_from(["learned", "sinusoidal"]),
                    activation=st.just("gelu"), feature_map=st.just("elu1"), features=st.sampled_from([0, 0, 3]),
                    outputs=st.sampled_from([0, 0, 5]), compiled=st.just(False))
if importlib.util.find_spec("numba") is not None:                                # every second linear model has its loops compiled
    configs = st.builds(lambda c, compiled: c._replace(compiled=compiled and c.attention == "linear"), configs, st.booleans())
recurrent = st.builds(lambda c, attention: c._replace(causal=True, attention=attention, compiled=c.compiled and attention == "linear"), configs,
                      st.sampled_from(["linear", "softmax"]))


@pytest.fixture(autouse=True, scope="module")
def few_buckets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_layer, "LSH_BUCKETS", BUCKETS)
        patch.setattr(attention_layer, "LSH_CHUNK", CHUNK)
        yield


def hashes():
    """What the rotations of LSH attention are drawn from; nothing else looks at it."""
    return np.random.default_rng(7)


def draw_params(rng, config, dtype=np.float64):
    """Initial parameters, moved: at the start norms are the identity and biases zero, which hides mistakes."""
    return {key: (p + 0.1 * rng.standard_normal(p.shape)).astype(dtype) for key, p in transformer_init(rng, config, np.float64).items()}


def draw_inputs(rng, config, shape, dtype=np.float64):
    return rng.standard_normal((*shape, config.features)).astype(dtype) if config.features else rng.integers(0, 7, shape)


def oracle(params, tokens, config, memory=None):
    """Logits of one unpadded sequence (N,), a position and a head at a time; with a memory (Nm, Em) those of the decoder. For real and for
    complex numbers."""
    norm = lambda x, name: ((x - x.mean()) / np.sqrt(((x - x.mean())**2).mean() + 1e-5)) * params[f"{name}.weight"] + params[f"{name}.bias"]
    affine = lambda x, name: (x[:, None] * params[f"{name}.weight"]).sum(0) + params[f"{name}.bias"]
    gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    phi = lambda x: np.where(x.real > 0, x + 1, np.exp(np.where(x.real > 0, 0, x)))
    E, D, rng = config.width, config.width // config.heads, hashes()

    def position(p):
        if config.positions == "learned":
            return params["positions.weight"][p]
        return np.array([(np.sin, np.cos)[c % 2](p / 10000 ** ((c - c % 2) / E)) for c in range(E)]) / np.sqrt(E / 2)

    def attend(rows, name, memory=None):
        q, k, v = ([affine(x, f"{name}.{part}") for x in (rows if part == "query" or memory is None else memory)]
                   for part in ("query", "key", "value"))
        out = []
        for i in range(len(rows)):
            heads = []
            for h in range(config.heads):
                own, seen = slice(h * D, h * D + D), range(i + 1 if config.causal and memory is None else len(k))
                if not seen:
                    heads.append(np.zeros(D))
                    continue
                if config.attention == "linear":
                    w, eps = [(phi(q[i][own]) * phi(k[j][own])).sum() for j in seen], 1e-6
                else:
                    w, eps = [np.exp((q[i][own] * k[j][own]).sum() / np.sqrt(D)) for j in seen], 0
                heads.append(sum(a * v[j][own] for a, j in zip(w, seen, strict=True)) / (sum(w) + eps))
            out.append(affine(np.concatenate(heads), f"{name}.out"))
        return out

    def attend_lsh(rows, name):
        turns = rng.standard_normal((int(config.attention[4:]), D, BUCKETS // 2))
        x, v = (np.array([affine(x, f"{name}.{part}") for x in rows]) for part in ("query", "value"))
        heads = []
        for h in range(config.heads):
            own = slice(h * D, h * D + D)
            nearest = lambda row, turn: max(range(BUCKETS), key=lambda b: (1 - 2 * (b >= BUCKETS // 2)) * (row @ turn[:, b % (BUCKETS // 2)]))
            buckets = [[nearest(row, turn) for row in x.real[:, own]] for turn in turns]
            heads.append(definitions.lsh_attention(x[:, own], v[:, own], buckets, causal=config.causal, chunk=CHUNK, scale=1 / np.sqrt(D)))
        return [affine(row, f"{name}.out") for row in np.concatenate(heads, axis=1)]

    def feed(rows, name):
        return [affine(gelu(affine(x, f"{name}.in")), f"{name}.out") for x in rows]

    read = lambda x: affine(x, "input") if config.features else params["token.weight"][x]
    rows = [read(x) + position(p) for p, x in enumerate(tokens)]
    for i in range(config.layers):
        parts = {"attention": attend_lsh if "lsh" in config.attention else attend, "feed_forward": feed}
        if memory is not None:
            parts = {"attention": attend, "cross": lambda rows, name: attend(rows, name, memory), "feed_forward": feed}
        for name, inner in ((f"blocks.{i}.{part}", inner) for part, inner in parts.items()):
            if config.norm == "pre":
                rows = [x + y for x, y in zip(rows, inner([norm(x, f"{name}.norm") for x in rows], name), strict=True)]
            else:
                rows = [norm(x + y, f"{name}.norm") for x, y in zip(rows, inner(rows, name), strict=True)]
    if config.norm == "pre":
        rows = [norm(x, "norm") for x in rows]
    return np.array([affine(x, "head") for x in rows])


@given(seeds, configs, st.integers(1, 5))
def test_the_model_is_its_equations_and_its_backward_the_transpose(seed, config, N):
    """⟨dlogits, J u⟩ by the complex step through the oracle equals ⟨Jᵀ dlogits, u⟩, for a direction u in all parameters at once and for
    one in each parameter alone."""
    rng = np.random.default_rng(seed)
    params, tokens = draw_params(rng, config), draw_inputs(rng, config, (2, N))
    logits, residuals = transformer_forward(params, tokens, config, rng=hashes())
    expected = np.array([oracle(params, row, config) for row in tokens])
    assert np.abs(logits - expected).max() <= gamma(ROUNDINGS, "float64") * max(1, np.abs(expected).max())
    dlogits = rng.standard_normal(logits.shape)
    grads = transformer_backward(dlogits, residuals)
    assert list(grads) == list(params) == list(transformer_shapes(config))
    assert [(g.shape, g.dtype) for g in grads.values()] == [(p.shape, p.dtype) for p in params.values()]
    u = {key: rng.standard_normal(p.shape) for key, p in params.items()}
    size = sum((np.abs(grads[key]) * np.abs(u[key])).sum() for key in params)
    for keys in (list(params), *([key] for key in rng.permutation(list(params))[:6])):
        moved = {key: p + 1e-200j * u[key] if key in keys else p for key, p in params.items()}
        forward = (dlogits * np.array([oracle(moved, row, config) for row in tokens]).imag / 1e-200).sum()
        backward = sum((grads[key] * u[key]).sum() for key in keys)
        assert abs(forward - backward) <= gamma(ROUNDINGS, "float64") * size, keys


@pytest.mark.parametrize("attention", ["linear", "softmax", "lsh-2"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_differences_converge_to_the_gradient_as_the_fourth_power_of_the_step(rng, attention, activation):
    """Through the library's own forward, loss included: Richardson's rule leaves an error of h⁴ until rounding takes over."""
    config = Config(11, 12, 8, 2, 2, 16, attention=attention, activation=activation)
    params, tokens = draw_params(rng, config), rng.integers(0, 11, (3, 10))
    lengths, weights = np.array([9, 4, 0]), np.arange(9) < np.array([9, 4, 0])[:, None]
    u = {key: rng.standard_normal(p.shape) for key, p in params.items()}

    def loss(h):
        moved = {key: p + h * u[key] for key, p in params.items()}
        logits, residuals = transformer_forward(moved, tokens[:, :-1], config, lengths=lengths, rng=hashes())
        value, r_loss = cross_entropy_forward(logits, tokens[:, 1:], weights=weights)
        return float(value), r_loss, residuals

    _, r_loss, residuals = loss(0.0)
    grads = transformer_backward(cross_entropy_backward(1.0, r_loss), residuals)
    exact = sum((grads[key] * u[key]).sum() for key in params)
    central = lambda h: (loss(h)[0] - loss(-h)[0]) / (2 * h)
    errors = [abs((4 * central(h / 2) - central(h)) / 3 - exact) for h in (2e-4, 1e-4, 5e-5)]
    rounding = gamma(64, "float64") / 5e-5
    assert errors[2] <= max(errors[0] / 100, rounding * 10), errors


@given(seeds, recurrent, st.integers(1, 6), st.integers(0, 6))
def test_the_recurrent_twin_is_the_same_function(seed, config, N, at):
    rng, at = np.random.default_rng(seed), min(at, N)
    params, tokens = draw_params(rng, config), draw_inputs(rng, config, (2, N))
    logits, _ = transformer_forward(params, tokens, config, rng=hashes())
    bound = gamma(ROUNDINGS, "float64") * max(1, np.abs(logits).max())
    prefix, state = transformer_prefill(params, tokens[:, :at], config)
    assert prefix.shape == (2, at, config.outputs or 7) and state.position == at
    assert np.abs(prefix - logits[:, :at]).max(initial=0) <= bound
    for start, begin in ((state, at), (transformer_step_init(config, 2, np.float64), 0)):
        state = start
        for i in range(begin, N):
            logits_t, state = transformer_step(params, tokens[:, i], state, config)
            assert np.abs(logits_t - logits[:, i]).max() <= bound
        assert state.position == N


@given(seeds, st.sampled_from(["gelu", "relu"]), st.integers(1, 6))
def test_a_layer_is_the_papers_and_its_steps_are_the_papers_recurrent_network(seed, activation, N):
    """Eq. (1), and eq. (16) to (20). One head, no biases around the attention, W_out the identity: as printed."""
    rng, config = np.random.default_rng(seed), Config(7, 6, 4, 1, 1, 5, norm="post", activation=activation)
    params, tokens = draw_params(rng, config), rng.integers(0, 7, N)
    w_q, w_k, w_v = (params[f"blocks.0.attention.{part}.weight"] for part in ("query", "key", "value"))
    params |= {f"blocks.0.attention.{part}.bias": np.zeros(4) for part in ("query", "key", "value", "out")}
    params["blocks.0.attention.out.weight"] = np.eye(4)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params[f"{name}.weight"] + params[f"{name}.bias"]

    def f(x):
        x = norm(x, "blocks.0.attention.norm")
        inner = x @ params["blocks.0.feed_forward.in.weight"] + params["blocks.0.feed_forward.in.bias"]
        inner = np.maximum(inner, 0) if activation == "relu" else inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        return norm(x + inner @ params["blocks.0.feed_forward.out.weight"] + params["blocks.0.feed_forward.out.bias"], "blocks.0.feed_forward.norm")

    x, phi = params["token.weight"][tokens] + params["positions.weight"][:N], definitions.eq7
    layer = definitions.eq1(x, lambda x: definitions.eq4(phi(x @ w_q), phi(x @ w_k), x @ w_v, 1e-6, True), f)
    network = definitions.eq20(x, w_q, w_k, w_v, f, phi, 1e-6)
    logits, state = transformer_forward(params, tokens, config)[0], transformer_step_init(config, 1, np.float64)
    for expected in (layer, network):
        expected = expected @ params["head.weight"] + params["head.bias"]
        bound = gamma(ROUNDINGS, "float64") * max(1, np.abs(expected).max())
        assert np.abs(logits - expected).max() <= bound
        running = state
        for i in range(N):
            logits_t, running = transformer_step(params, tokens[i:i + 1], running, config)
            assert np.abs(logits_t[0] - expected[i]).max() <= bound


@given(seeds, recurrent)
def test_an_old_state_can_be_gone_back_to(seed, config):
    rng = np.random.default_rng(seed)
    params, tokens = draw_params(rng, config), draw_inputs(rng, config, (3, 4))
    _, state = transformer_prefill(params, tokens, config)
    first, _ = transformer_step(params, tokens[:, 0], state, config)
    for token in range(1, 4):
        transformer_step(params, tokens[:, token], state, config)
    again, after = transformer_step(params, tokens[:, 0], state, config)
    np.testing.assert_array_equal(again, first)
    other, _ = transformer_step(params, tokens[:, 1], after, config)
    transformer_step(params, tokens[:, 2], after, config)
    np.testing.assert_array_equal(transformer_step(params, tokens[:, 1], after, config)[0], other)
    assert state.position == 4 and after.position == 5


@given(seeds, recurrent, st.integers(1, 5))
def test_the_future_never_reaches_the_past(seed, config, at):
    rng = np.random.default_rng(seed)
    params, tokens = draw_params(rng, config), draw_inputs(rng, config, (2, 6))
    changed = tokens.copy()
    changed[:, at:] = changed[:, at:] + 1 if config.features else (changed[:, at:] + 1) % 7
    a, b = (transformer_forward(params, t, config)[0] for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :at], b[:, :at])
    assert (a[:, at:] != b[:, at:]).any()


@given(seeds, configs, st.sampled_from([np.nan, np.inf, 1e30]), st.sampled_from([-1, 10**9]))
def test_padding_changes_nothing(seed, config, garbage, token):
    """Not what stands in it, and not how much of it there is."""
    rng, B, N = np.random.default_rng(seed), 3, 5
    params, tokens, lengths = draw_params(rng, config), draw_inputs(rng, config, (B, N)), rng.integers(0, N + 1, B)
    padding = np.arange(N) >= lengths[:, None]
    dlogits, dirty_tokens = rng.standard_normal((B, N, config.outputs or 7)), tokens.copy()
    dirty_dlogits = dlogits.copy()
    dirty_tokens[padding], dirty_dlogits[padding] = garbage if config.features else token, garbage
    clean, residuals = transformer_forward(params, tokens, config, lengths=lengths, rng=hashes())
    grads = transformer_backward(dlogits, residuals)
    dirty, residuals = transformer_forward(params, dirty_tokens, config, lengths=lengths, rng=hashes())
    np.testing.assert_array_equal(dirty, clean)
    assert not clean[padding].any()
    for key, g in transformer_backward(dirty_dlogits, residuals).items():
        np.testing.assert_array_equal(g, grads[key])
    for b, n in enumerate(lengths):
        alone, _ = transformer_forward(params, tokens[b:b + 1, :n], config, rng=hashes())
        assert np.abs(alone[0] - clean[b, :n]).max(initial=0) <= gamma(ROUNDINGS, "float64") * max(1, np.abs(clean).max())


@given(seeds, configs)
def test_batches_are_independent_and_their_gradients_add(seed, config):
    rng = np.random.default_rng(seed)
    params, tokens, dlogits = draw_params(rng, config), draw_inputs(rng, config, (3, 4)), rng.standard_normal((3, 4, config.outputs or 7))
    logits, residuals = transformer_forward(params, tokens, config, rng=hashes())
    grads, total = transformer_backward(dlogits, residuals), dict.fromkeys(params, 0.0)
    for b in range(3):
        alone, residuals = transformer_forward(params, tokens[b], config, rng=hashes())
        assert np.abs(alone - logits[b]).max() <= gamma(ROUNDINGS, "float64") * max(1, np.abs(logits).max())
        for key, g in transformer_backward(dlogits[b], residuals).items():
            total[key] = total[key] + g
    size = max(np.abs(g).max() for g in grads.values())
    for key in params:
        assert np.abs(total[key] - grads[key]).max() <= gamma(ROUNDINGS, "float64") * size


@given(seeds, recurrent, st.sampled_from([np.float32, np.float16]))
def test_dtype_stays_and_the_error_is_of_its_size(seed, config, dtype):
    rng = np.random.default_rng(seed)
    params, tokens = draw_params(rng, config, dtype), draw_inputs(rng, config, (2, 5), dtype)
    logits, residuals = transformer_forward(params, tokens, config, rng=hashes())
    grads = transformer_backward(rng.standard_normal(logits.shape).astype(dtype), residuals)
    logits_t, _ = transformer_step(params, tokens[:, 0], transformer_step_init(config, 2, dtype), config)
    assert logits.dtype == logits_t.dtype == dtype and {g.dtype for g in grads.values()} == {np.dtype(dtype)}
    wide, _ = transformer_forward({key: p.astype(np.float64) for key, p in params.items()},
                                  tokens.astype(np.float64) if config.features else tokens, config)
    # Each of at most 3·14 layers rounds once; norms in between may enlarge an error by the inverse of a row's spread, drawn here ≥ 1/20.
    assert np.abs(logits - wide).max() <= gamma(40, dtype) * 20 * max(1, np.abs(wide).max())


def test_read_only_parameters_and_strided_tokens_and_cotangents_are_fine(rng):
    config = Config(7, 6, 4, 2, 2, 5)
    params, tokens = draw_params(rng, config), rng.integers(0, 7, (6, 5)).T
    expected, residuals = transformer_forward(params, tokens.copy(), config)
    d = rng.standard_normal((5, 1, 7))
    grads = transformer_backward(np.repeat(d, 6, 1), residuals)
    for p in params.values():
        p.flags.writeable = False
    logits, residuals = transformer_forward({key: np.asfortranarray(p) for key, p in params.items()}, tokens, config)
    assert np.abs(logits - expected).max() <= gamma(ROUNDINGS, "float64")
    d.flags.writeable = False
    for _ in range(2):
        for key, g in transformer_backward(np.broadcast_to(d, (5, 6, 7)), residuals).items():
            assert np.abs(g - grads[key]).max() <= gamma(ROUNDINGS, "float64") * 100


def test_no_sequences_and_no_positions_give_empty_logits_and_zero_gradients(rng):
    for attention in ("linear", "softmax", "lsh-2"):
        config = Config(7, 6, 4, 2, 2, 5, attention=attention)
        params = draw_params(rng, config)
        for shape in ((0, 3), (2, 0)):
            logits, residuals = transformer_forward(params, np.zeros(shape, int), config, rng=hashes())
            assert logits.shape == (*shape, 7)
            assert not any(g.any() for g in transformer_backward(logits, residuals).values())


def test_lsh_attention_is_hashed_by_the_generator_it_is_given(rng):
    config = Config(7, 6, 4, 2, 2, 5, attention="lsh-1")
    params, tokens = draw_params(rng, config), rng.integers(0, 7, (9, 6))
    forward = lambda seed: transformer_forward(params, tokens, config, rng=np.random.default_rng(seed))[0]
    np.testing.assert_array_equal(forward(3), forward(3))
    assert (forward(3) != forward(4)).any()
    assert not any(".key." in name for name in params)


def test_one_seed_gives_one_model_in_every_dtype():
    config = Config(7, 6, 4, 2, 2, 5)
    a, b = (transformer_init(np.random.default_rng(3), config, dtype) for dtype in (np.float64, np.float32))
    for key in a:
        np.testing.assert_array_equal(a[key].astype(np.float32), b[key])


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_a_model_learns_to_copy(attention):
    """The paper's copy task in small: the second half of w 0 w is certain."""
    rng, config = np.random.default_rng(0), Config(6, 7, 16, 4, 2, 32, attention=attention)
    params = transformer_init(rng, config)
    slots, losses = adam_init(params), []
    for _ in range(80):
        w = rng.integers(1, 6, (32, 3))
        tokens = np.concatenate([w, np.zeros((32, 1), int), w], 1)
        logits, residuals = transformer_forward(params, tokens[:, :-1], config)
        loss, r_loss = cross_entropy_forward(logits, tokens[:, 1:], weights=np.broadcast_to(np.arange(6) >= 3, (32, 6)))
        losses.append(float(loss))
        grads = transformer_backward(cross_entropy_backward(1.0, r_loss), residuals)
        params, slots = adam_step(params, grads, slots, learning_rate=1e-2)
    assert losses[0] > 1.6 and losses[-1] < 0.1, losses


GOOD = Config(7, 6, 4, 2, 1, 5)
PARAMS = transformer_init(np.random.default_rng(0), GOOD)
TOKENS = np.array([[1, 2, 3]])
LSH = GOOD._replace(attention="lsh-2")
VECTORS = GOOD._replace(features=2)
PARAMS_VECTORS = transformer_init(np.random.default_rng(0), VECTORS)
PARAMS_LSH = {key: p for key, p in PARAMS.items() if ".key." not in key}


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: transformer_shapes(GOOD._replace(width=0)), ValueError, "width: expected an integer ≥ 1, got 0"),
    (lambda: transformer_shapes(GOOD._replace(heads=3)), ValueError, "heads: expected a divisor of width = 4, got 3"),
    (lambda: transformer_shapes(GOOD._replace(norm="rms")), ValueError, "norm: expected 'pre' or 'post', got 'rms'"),
    *((lambda attention=attention: transformer_shapes(GOOD._replace(attention=attention)), ValueError,
       f"attention: expected 'linear', 'softmax' or 'lsh-R' with R ≥ 1 rounds, as in 'lsh-4', got {attention!r}")
      for attention in ("lsh", "lsh-0", "lsh-04", "lsh--1", "lsh-1.5", "LSH-1", None)),
    (lambda: transformer_forward(PARAMS_LSH, TOKENS, LSH), ValueError, "rng: expected a numpy.random.Generator, got None; attention 'lsh-2' "),
    *((lambda call=call: call(PARAMS_LSH, LSH), ValueError,
       "attention: expected 'linear' or 'softmax', got 'lsh-2', which sorts whole sequences and has no state to go on from")
      for call in (lambda params, config: transformer_prefill(params, TOKENS, config), lambda params, config: transformer_step_init(config, 1),
                   lambda params, config: transformer_step(params, TOKENS[:, 0], transformer_step_init(GOOD, 1), config))),
    (lambda: transformer_forward(PARAMS, TOKENS, GOOD._replace(layers=2)),
     ValueError, "params: expected the keys of this configuration, got 16 missing"),
    (lambda: transformer_forward(PARAMS, TOKENS, GOOD._replace(feed_forward=6)), ValueError, "feed_forward.in.weight"),
    (lambda: transformer_forward({**PARAMS, "head.bias": np.zeros(7)}, TOKENS, GOOD), TypeError, "head.bias is float64"),
    (lambda: transformer_forward(PARAMS, TOKENS + 4, GOOD), ValueError, "tokens: expected 0 ≤ token < V = 7, got values from 5 to 7"),
    (lambda: transformer_forward(PARAMS, TOKENS.astype(float), GOOD), TypeError, "tokens: expected integers, got float64"),
    (lambda: transformer_shapes(GOOD._replace(features=-1)), ValueError, "features: expected an integer ≥ 1, got -1"),
    (lambda: transformer_shapes(GOOD._replace(outputs=2.0)), TypeError, "outputs: expected an integer"),
    (lambda: transformer_forward(PARAMS_VECTORS, np.ones((1, 3, 4), "f4"), VECTORS),
     ValueError, r"inputs: expected \(\.\.\., N, features\) = \(\.\.\., 2\), got \(1, 3, 4\)"),
    (lambda: transformer_step(PARAMS_VECTORS, np.ones(3, "f4"), transformer_step_init(VECTORS, 1), VECTORS),
     ValueError, r"inputs: expected \(\.\.\., features\) = \(\.\.\., 2\), got \(3,\)"),
    (lambda: transformer_forward(PARAMS_VECTORS, np.ones((1, 3, 2)), VECTORS), TypeError, "inputs is float64 and params.* is float32"),
    (lambda: transformer_forward(PARAMS, np.array(1), GOOD), ValueError, r"tokens: expected \(\.\.\., N\), got \(\)"),
    (lambda: transformer_forward(PARAMS, np.ones((1, 7), int), GOOD), ValueError, "at most length = 6 positions, got positions up to 7"),
    (lambda: transformer_forward(PARAMS, TOKENS, GOOD, lengths=np.array([4])), ValueError, "lengths: expected 0 ≤ length ≤ N = 3"),
    (lambda: transformer_prefill(PARAMS, TOKENS, GOOD._replace(causal=False)),
     ValueError, "config: expected causal=True, got causal=False"),
    (lambda: transformer_step(PARAMS, TOKENS[:, 0], transformer_step_init(GOOD._replace(layers=2), 1), GOOD),
     ValueError, "layers = 1 layers, got 2"),
    (lambda: transformer_backward(np.zeros((1, 3, 8), "f4"), transformer_forward(PARAMS, TOKENS, GOOD)[1]),
     ValueError, r"\(1, 3, 7\), got \(1, 3, 8\)"),
])
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
