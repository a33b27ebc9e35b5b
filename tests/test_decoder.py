"""Laws of the decoder: it is its equations, its backward is the transpose, to the memory too, and its recurrent twin is the same function.

Oracle, bounds and drawing as in `test_transformer`.
"""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_transformer import ROUNDINGS, configs, draw_inputs, oracle, recurrent, seeds

from refattn.decoder import (
    DecoderState,
    decoder_backward,
    decoder_forward,
    decoder_init,
    decoder_prefill,
    decoder_shapes,
    decoder_step,
    decoder_step_init,
)
from refattn.losses import cross_entropy_backward, cross_entropy_forward
from refattn.optim import adam_init, adam_step, cosine_rate
from refattn.testing.budgets import gamma
from refattn.transformer import Config, transformer_backward, transformer_forward, transformer_init, transformer_shapes

BOUND = gamma(ROUNDINGS, "float64")
Em = 3                                              # the width of every memory here
memory_sizes = st.integers(0, 4)


def moved(rng, params, dtype=np.float64):
    """Initial parameters, moved: at the start norms are the identity and biases zero, which hides mistakes."""
    return {key: (p + 0.1 * rng.standard_normal(p.shape)).astype(dtype) for key, p in params.items()}


def draw(rng, config, shape, Nm, dtype=np.float64):
    """Parameters, tokens or vectors `shape` = (..., N), a memory for each sequence."""
    params = moved(rng, decoder_init(rng, config, Em, np.float64), dtype)
    return params, draw_inputs(rng, config, shape, dtype), rng.standard_normal((*shape[:-1], Nm, Em)).astype(dtype)


def directions(rng, arrays):
    return {key: rng.standard_normal(a.shape) for key, a in arrays.items()}


def sizes(state):
    """How many numbers a state holds."""
    return sum(sizes(x) if isinstance(x, tuple) else x.size for x in state if isinstance(x, (tuple, np.ndarray)))


# --- equations and transposes ----------------------------------------------------------------------------------------------------------------

@given(seeds, recurrent, st.integers(1, 4), memory_sizes)
def test_the_decoder_is_its_equations_and_its_backward_the_transpose(seed, config, N, Nm):
    """⟨dlogits, J u⟩ by the complex step through the oracle equals ⟨Jᵀ dlogits, u⟩, for a direction u in all parameters and the memory at
    once and for one in each alone."""
    rng = np.random.default_rng(seed)
    params, tokens, memory = draw(rng, config, (2, N), Nm)
    logits, residuals = decoder_forward(params, tokens, memory, config)
    expected = np.array([oracle(params, row, config, m) for row, m in zip(tokens, memory, strict=True)])
    assert np.abs(logits - expected).max() <= BOUND * max(1, np.abs(expected).max())
    dlogits = rng.standard_normal(logits.shape)
    dmemory, grads = decoder_backward(dlogits, residuals)
    assert list(grads) == list(params) == list(decoder_shapes(config, Em))
    args, grads = {**params, "memory": memory}, {**grads, "memory": dmemory}
    assert [(g.shape, g.dtype) for g in grads.values()] == [(a.shape, a.dtype) for a in args.values()]
    u = directions(rng, args)
    size = sum((np.abs(grads[key]) * np.abs(u[key])).sum() for key in args)
    crossed = [key for key in params if ".cross." in key]
    for keys in (list(args), ["memory"], *([key] for key in rng.choice(crossed, 5)), *([key] for key in rng.choice(list(params), 3))):
        at = {key: a + 1e-200j * u[key] if key in keys else a for key, a in args.items()}
        outs = np.array([oracle(at, row, config, m) for row, m in zip(tokens, at["memory"], strict=True)])
        forward = (dlogits * outs.imag / 1e-200).sum()
        assert abs(forward - sum((grads[key] * u[key]).sum() for key in keys)) <= BOUND * size, keys


@given(seeds, recurrent, configs.filter(lambda c: "lsh" not in c.attention and not c.features), st.integers(1, 3), st.integers(1, 4))
def test_encoder_and_decoder_are_one_function_with_one_transpose(seed, config, encoder_config, N, Nm):
    rng, encoder_config = np.random.default_rng(seed), encoder_config._replace(outputs=Em)
    encoder = moved(rng, transformer_init(rng, encoder_config, np.float64))
    params, tokens, _ = draw(rng, config, (2, N), 0)
    source = draw_inputs(rng, encoder_config, (2, Nm))
    memory, r_encoder = transformer_forward(encoder, source, encoder_config)
    logits, r_decoder = decoder_forward(params, tokens, memory, config)
    dlogits = rng.standard_normal(logits.shape)
    dmemory, grads = decoder_backward(dlogits, r_decoder)
    encoder_grads = transformer_backward(dmemory, r_encoder)

    def both(encoder, params):
        return np.array([oracle(params, row, config, oracle(encoder, read, encoder_config)) for row, read in zip(tokens, source, strict=True)])

    expected = both(encoder, params)
    assert np.abs(logits - expected).max() <= BOUND * max(1, np.abs(expected).max())
    u, encoder_u = directions(rng, params), directions(rng, encoder)
    size = sum((np.abs(g[key]) * np.abs(v[key])).sum() for g, v in ((grads, u), (encoder_grads, encoder_u)) for key in g)
    for keys in (list(encoder), *([key] for key in rng.choice(list(encoder), 4))):
        at = {key: p + 1e-200j * encoder_u[key] if key in keys else p for key, p in encoder.items()}
        forward = (dlogits * both(at, params).imag / 1e-200).sum()
        assert abs(forward - sum((encoder_grads[key] * encoder_u[key]).sum() for key in keys)) <= BOUND * size, keys
    forward = (dlogits * both({key: p + 1e-200j * encoder_u[key] for key, p in encoder.items()},
                              {key: p + 1e-200j * u[key] for key, p in params.items()}).imag / 1e-200).sum()
    backward = sum((g[key] * v[key]).sum() for g, v in ((grads, u), (encoder_grads, encoder_u)) for key in g)
    assert abs(forward - backward) <= BOUND * size


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_differences_converge_to_the_gradient_as_the_fourth_power_of_the_step(rng, attention):
    """Through the library's own encoder, decoder and loss, lengths included: Richardson's rule leaves an error of h⁴ until rounding takes over."""
    config = Config(11, 12, 8, 2, 2, 16, attention=attention)
    encoder_config = config._replace(causal=False, outputs=Em)
    parts = {"encoder": moved(rng, transformer_init(rng, encoder_config, np.float64)),
             "decoder": moved(rng, decoder_init(rng, config, Em, np.float64))}
    source, tokens = rng.integers(0, 11, (3, 7)), rng.integers(0, 11, (3, 10))
    lengths, source_lengths = np.array([9, 4, 5]), np.array([3, 7, 0])
    weights, u = np.arange(9) < lengths[:, None], {name: directions(rng, params) for name, params in parts.items()}

    def loss(h):
        encoder, decoder = ({key: p + h * u[name][key] for key, p in params.items()} for name, params in parts.items())
        memory, r_encoder = transformer_forward(encoder, source, encoder_config, lengths=source_lengths)
        logits, r_decoder = decoder_forward(decoder, tokens[:, :-1], memory, config, lengths=lengths, memory_lengths=source_lengths)
        value, r_loss = cross_entropy_forward(logits, tokens[:, 1:], weights=weights)
        return float(value), r_loss, r_decoder, r_encoder

    _, r_loss, r_decoder, r_encoder = loss(0.0)
    dmemory, grads = decoder_backward(cross_entropy_backward(1.0, r_loss), r_decoder)
    found = {"encoder": transformer_backward(dmemory, r_encoder), "decoder": grads}
    exact = sum((found[name][key] * d).sum() for name, ds in u.items() for key, d in ds.items())
    central = lambda h: (loss(h)[0] - loss(-h)[0]) / (2 * h)
    errors = [abs((4 * central(h / 2) - central(h)) / 3 - exact) for h in (2e-4, 1e-4, 5e-5)]
    rounding = gamma(64, "float64") / 5e-5
    assert errors[2] <= max(errors[0] / 100, rounding * 10), errors


# --- the recurrent twin --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
@given(seeds, recurrent, st.integers(1, 6), st.integers(0, 6), memory_sizes)
def test_the_recurrent_twin_is_the_same_function(attention, padded, seed, config, N, at, Nm):
    rng, at = np.random.default_rng(seed), min(at, N)
    config = config._replace(attention=attention, compiled=config.compiled and attention == "linear")
    params, tokens, memory = draw(rng, config, (2, N), Nm)
    lengths = {"memory_lengths": rng.integers(0, Nm + 1, 2)} if padded else {}
    logits, _ = decoder_forward(params, tokens, memory, config, **lengths)
    bound = BOUND * max(1, np.abs(logits).max())
    prefix, state = decoder_prefill(params, tokens[:, :at], memory, config, **lengths)
    assert prefix.shape == (2, at, config.outputs or 7) and state.position == at
    assert np.abs(prefix - logits[:, :at]).max(initial=0) <= bound
    for start, begin in ((state, at), (decoder_step_init(params, memory, config, **lengths), 0)):
        state = start
        for i in range(begin, N):
            logits_t, state = decoder_step(params, tokens[:, i], state, config)
            assert np.abs(logits_t - logits[:, i]).max() <= bound
        assert state.position == N


@given(seeds, recurrent, memory_sizes)
def test_an_old_state_can_be_gone_back_to(seed, config, Nm):
    rng = np.random.default_rng(seed)
    params, tokens, memory = draw(rng, config, (3, 4), Nm)
    _, state = decoder_prefill(params, tokens, memory, config)
    first, _ = decoder_step(params, tokens[:, 0], state, config)
    memory[...] = np.nan                            # it was read; nothing looks at it again
    for token in range(1, 4):
        decoder_step(params, tokens[:, token], state, config)
    again, after = decoder_step(params, tokens[:, 0], state, config)
    np.testing.assert_array_equal(again, first)
    other, _ = decoder_step(params, tokens[:, 1], after, config)
    decoder_step(params, tokens[:, 2], after, config)
    np.testing.assert_array_equal(decoder_step(params, tokens[:, 1], after, config)[0], other)
    assert state.position == 4 and after.position == 5


def test_the_state_of_linear_attention_is_as_small_for_a_long_memory_as_for_a_short_one(rng):
    config = Config(7, 6, 4, 2, 2, 5, positions="sinusoidal")
    params, tokens, memory = draw(rng, config, (2, 9), 50)
    held = [sizes(decoder_prefill(params, tokens[:, :n], memory[:, :m], config)[1]) for n, m in ((0, 0), (0, 50), (9, 1), (9, 50))]
    assert held == [2 * 2 * (2 * 2 * (2 * 2 + 2))] * 4               # S and z, of the prefix and the memory, in two layers
    _, state = decoder_prefill(params, tokens, memory, config._replace(attention="softmax"))
    assert sizes(state.memory) == 2 * 2 * (2 * 50 * 4)               # k and v in two layers


# --- what sees what ------------------------------------------------------------------------------------------------------------------------

@given(seeds, recurrent, st.integers(1, 5), st.integers(1, 4))
def test_the_future_never_reaches_the_past_but_all_of_the_memory_reaches_every_position(seed, config, at, Nm):
    rng = np.random.default_rng(seed)
    params, tokens, memory = draw(rng, config, (2, 6), Nm)
    changed = tokens.copy()
    changed[:, at:] = changed[:, at:] + 1 if config.features else (changed[:, at:] + 1) % 7
    a, b = (decoder_forward(params, t, memory, config)[0] for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :at], b[:, :at])
    assert (a[:, at:] != b[:, at:]).any()
    for row in range(Nm):
        other = memory.copy()
        other[:, row] += 1
        assert (decoder_forward(params, tokens, other, config)[0] != a).any(-1).all()


@given(seeds, recurrent, st.integers(1, 4))
def test_a_memory_is_a_set(seed, config, Nm):
    """Cross attention does not look at where in the memory something stands: that is for the encoder to say."""
    rng = np.random.default_rng(seed)
    params, tokens, memory = draw(rng, config, (2, 3), Nm)
    order, dlogits = rng.permutation(Nm), rng.standard_normal((2, 3, config.outputs or 7))
    results = []
    for m in (memory[:, order], memory):
        logits, residuals = decoder_forward(params, tokens, m, config)
        results.append((logits, decoder_backward(dlogits, residuals)[0]))
    (a, da), (b, db) = results
    assert np.abs(a - b).max() <= BOUND * max(1, np.abs(b).max())
    assert np.abs(da - db[:, order]).max() <= BOUND * max(1, np.abs(db).max())


@given(seeds, recurrent, st.sampled_from([np.nan, np.inf, 1e30]), st.sampled_from([-1, 10**9]))
def test_padding_changes_nothing(seed, config, garbage, token):
    """Not what stands in it, and not how much of it there is: neither that of the tokens nor that of the memory."""
    rng, B, N, Nm = np.random.default_rng(seed), 3, 5, 4
    params, tokens, memory = draw(rng, config, (B, N), Nm)
    lengths, memory_lengths = rng.integers(0, N + 1, B), rng.integers(0, Nm + 1, B)
    padding, memory_padding = np.arange(N) >= lengths[:, None], np.arange(Nm) >= memory_lengths[:, None]
    dlogits, dirty_tokens, dirty_memory = rng.standard_normal((B, N, config.outputs or 7)), tokens.copy(), memory.copy()
    dirty_dlogits = dlogits.copy()
    dirty_tokens[padding], dirty_dlogits[padding], dirty_memory[memory_padding] = garbage if config.features else token, garbage, garbage
    clean, residuals = decoder_forward(params, tokens, memory, config, lengths=lengths, memory_lengths=memory_lengths)
    dmemory, grads = decoder_backward(dlogits, residuals)
    dirty, residuals = decoder_forward(params, dirty_tokens, dirty_memory, config, lengths=lengths, memory_lengths=memory_lengths)
    np.testing.assert_array_equal(dirty, clean)
    assert not clean[padding].any() and not dmemory[memory_padding].any()
    dirty_dmemory, dirty_grads = decoder_backward(dirty_dlogits, residuals)
    for key, g in {**dirty_grads, "memory": dirty_dmemory}.items():
        np.testing.assert_array_equal(g, {**grads, "memory": dmemory}[key])
    clean_state, dirty_state = (decoder_step_init(params, m, config, memory_lengths=memory_lengths) for m in (memory, dirty_memory))
    steps = [decoder_step(params, tokens[:, 0], state, config)[0] for state in (clean_state, dirty_state)]
    np.testing.assert_array_equal(*steps)
    total, largest = dict.fromkeys(params, 0.0), max(np.abs(g).max() for g in (*grads.values(), dmemory))
    for b, (n, m) in enumerate(zip(lengths, memory_lengths, strict=True)):
        alone, residuals = decoder_forward(params, tokens[b, :n], memory[b, :m], config)
        assert np.abs(alone - clean[b, :n]).max(initial=0) <= BOUND * max(1, np.abs(clean).max())
        d, own = decoder_backward(dlogits[b, :n], residuals)
        assert np.abs(d - dmemory[b, :m]).max(initial=0) <= BOUND * largest
        total = {key: total[key] + g for key, g in own.items()}
    for key, g in grads.items():
        assert np.abs(total[key] - g).max() <= BOUND * largest, key


@given(seeds, recurrent)
def test_batches_are_independent_and_their_gradients_add(seed, config):
    rng = np.random.default_rng(seed)
    params, tokens, memory = draw(rng, config, (3, 2, 4), 3)
    dlogits = rng.standard_normal((3, 2, 4, config.outputs or 7))
    logits, residuals = decoder_forward(params, tokens, memory, config)
    dmemory, grads = decoder_backward(dlogits, residuals)
    total, largest = dict.fromkeys(params, 0.0), max(np.abs(g).max() for g in (*grads.values(), dmemory))
    for at in np.ndindex(3, 2):
        alone, residuals = decoder_forward(params, tokens[at], memory[at], config)
        assert np.abs(alone - logits[at]).max() <= BOUND * max(1, np.abs(logits).max())
        d, own = decoder_backward(dlogits[at], residuals)
        assert np.abs(d - dmemory[at]).max() <= BOUND * largest
        total = {key: total[key] + g for key, g in own.items()}
    for key, g in grads.items():
        assert np.abs(total[key] - g).max() <= BOUND * largest, key


# --- dtypes, layouts, edges ----------------------------------------------------------------------------------------------------------------

@given(seeds, recurrent, st.sampled_from([np.float32, np.float16]))
def test_dtype_stays_and_the_error_is_of_its_size(seed, config, dtype):
    rng = np.random.default_rng(seed)
    params, tokens, memory = draw(rng, config, (2, 5), 4, dtype)
    logits, residuals = decoder_forward(params, tokens, memory, config)
    dmemory, grads = decoder_backward(rng.standard_normal(logits.shape).astype(dtype), residuals)
    prefix, _ = decoder_prefill(params, tokens, memory, config)
    logits_t, state = decoder_step(params, tokens[:, 0], decoder_step_init(params, memory, config), config)
    assert {x.dtype for x in (logits, prefix, logits_t, dmemory, *grads.values())} == {np.dtype(dtype)}
    wide, _ = decoder_forward({key: p.astype(np.float64) for key, p in params.items()},
                              tokens.astype(np.float64) if config.features else tokens, memory.astype(np.float64), config)
    # Each of at most 3·22 layers rounds once; norms in between may enlarge an error by the inverse of a row's spread, drawn here ≥ 1/20.
    assert np.abs(logits - wide).max() <= gamma(66, dtype) * 20 * max(1, np.abs(wide).max())


def test_read_only_parameters_and_strided_memories_and_cotangents_are_fine(rng):
    config = Config(7, 6, 4, 2, 2, 5)
    params, tokens, memory = draw(rng, config, (6, 5), 4)
    expected, residuals = decoder_forward(params, tokens, memory, config)
    d = rng.standard_normal((6, 1, 7))
    dmemory, grads = decoder_backward(np.repeat(d, 5, 1), residuals)
    strided = np.repeat(np.asfortranarray(memory[::-1]), 2, axis=-1)[::-1, :, ::2]
    for x in (*params.values(), strided, d):
        x.flags.writeable = False
    logits, residuals = decoder_forward({key: np.asfortranarray(p) for key, p in params.items()}, tokens, strided, config)
    assert np.abs(logits - expected).max() <= BOUND
    for _ in range(2):
        again, grads_again = decoder_backward(np.broadcast_to(d, (6, 5, 7)), residuals)
        for g, same in ((again, dmemory), *((grads_again[key], grads[key]) for key in grads)):
            assert np.abs(g - same).max() <= BOUND * 100


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_no_sequences_and_no_positions_give_empty_logits_and_zero_gradients(rng, attention):
    config = Config(7, 6, 4, 2, 2, 5, attention=attention)
    for shape in ((0, 3), (2, 0)):
        params, tokens, memory = draw(rng, config, shape, 4)
        logits, residuals = decoder_forward(params, tokens, memory, config)
        assert logits.shape == (*shape, 7)
        dmemory, grads = decoder_backward(logits, residuals)
        assert dmemory.shape == memory.shape and not dmemory.any() and not any(g.any() for g in grads.values())


def test_one_seed_gives_one_model_in_every_dtype_and_three_parts_a_layer_share_the_stream():
    config = Config(7, 6, 64, 2, 2, 64)
    a, b = (decoder_init(np.random.default_rng(3), config, 32, dtype) for dtype in (np.float64, np.float32))
    assert list(a) == list(decoder_shapes(config, 32))
    for key in a:
        np.testing.assert_array_equal(a[key].astype(np.float32), b[key])
    # 2 layers of 3 weights that write into the stream; the variance of n normal numbers has a spread of √(2/n), n ≥ 2048
    for key, variance in (("cross.query", 1 / 64), ("cross.key", 1 / 32), ("cross.value", 1 / 32), ("cross.out", 1 / 64 / 6),
                          ("attention.out", 1 / 64 / 6), ("feed_forward.out", 1 / 64 / 6), ("feed_forward.in", 1 / 64)):
        assert abs(a[f"blocks.1.{key}.weight"].var() / variance - 1) < 5 * np.sqrt(2 / 2048), key
    assert (a["blocks.1.cross.norm.weight"] == 1).all() and not a["blocks.1.cross.out.bias"].any()


def test_without_cross_attention_it_is_the_transformer(rng):
    """A cross attention that writes nothing leaves the causal transformer of the other parameters."""
    config = Config(7, 6, 4, 2, 2, 5)
    params, tokens, memory = draw(rng, config, (2, 5), 4)
    params |= {key: np.zeros_like(p) for key, p in params.items() if ".cross.out." in key}
    logits, residuals = decoder_forward(params, tokens, memory, config)
    rest = {key: params[key] for key in transformer_shapes(config)}
    expected, r_expected = transformer_forward(rest, tokens, config)
    np.testing.assert_array_equal(logits, expected)
    dmemory, grads = decoder_backward(expected, residuals)
    assert not dmemory.any()
    for key, g in transformer_backward(expected, r_expected).items():
        np.testing.assert_array_equal(grads[key], g)


# --- learning ------------------------------------------------------------------------------------------------------------------------------

def test_encoder_and_decoder_learn_to_reverse_what_was_read():
    """Linear attention. Symbols are 1 to 5, 0 begins the answer; every string of four is then reversed by greedy decoding, a step at a time."""
    rng, n, updates = np.random.default_rng(0), 4, 300
    config = Config(6, n, 32, 4, 1, 64)
    encoder_config = config._replace(causal=False, outputs=32)
    encoder, decoder = transformer_init(rng, encoder_config), decoder_init(rng, config, 32)
    slots, decoder_slots, losses = adam_init(encoder), adam_init(decoder), []
    for update in range(updates):
        source = rng.integers(1, 6, (32, n))
        target = source[:, ::-1]
        tokens = np.concatenate([np.zeros((32, 1), int), target[:, :-1]], 1)
        memory, r_encoder = transformer_forward(encoder, source, encoder_config)
        logits, r_decoder = decoder_forward(decoder, tokens, memory, config)
        loss, r_loss = cross_entropy_forward(logits, target)
        losses.append(float(loss))
        dmemory, grads = decoder_backward(cross_entropy_backward(1.0, r_loss), r_decoder)
        rate = cosine_rate(update, 1e-2, updates)
        encoder, slots = adam_step(encoder, transformer_backward(dmemory, r_encoder), slots, learning_rate=rate)
        decoder, decoder_slots = adam_step(decoder, grads, decoder_slots, learning_rate=rate)
    assert losses[0] > 1.6 and losses[-1] < 0.1, losses
    source = np.stack(np.meshgrid(*[np.arange(1, 6)] * n), -1).reshape(-1, n)
    memory, _ = transformer_forward(encoder, source, encoder_config)
    state, token, answer = decoder_step_init(decoder, memory, config), np.zeros(len(source), int), []
    for _ in range(n):
        logits_t, state = decoder_step(decoder, token, state, config)
        token = logits_t.argmax(-1)
        answer.append(token)
    right = (np.stack(answer, 1) == source[:, ::-1]).all(1).mean()
    assert right > 0.99, right


# --- words ---------------------------------------------------------------------------------------------------------------------------------

GOOD = Config(7, 6, 4, 2, 1, 5)
PARAMS = decoder_init(np.random.default_rng(0), GOOD, Em)
TOKENS, MEMORY = np.array([[1, 2, 3]]), np.ones((1, 5, Em), np.float32)
STATE = decoder_step_init(PARAMS, MEMORY, GOOD)
LSH = GOOD._replace(attention="lsh-2")
EVERY = [lambda config: decoder_shapes(config, Em), lambda config: decoder_init(np.random.default_rng(0), config, Em),
         lambda config: decoder_forward(PARAMS, TOKENS, MEMORY, config), lambda config: decoder_prefill(PARAMS, TOKENS, MEMORY, config),
         lambda config: decoder_step_init(PARAMS, MEMORY, config), lambda config: decoder_step(PARAMS, TOKENS[:, 0], STATE, config)]
READING = [lambda params, memory: decoder_forward(params, TOKENS, memory, GOOD), lambda params, memory: decoder_step_init(params, memory, GOOD),
           lambda params, memory: decoder_prefill(params, TOKENS, memory, GOOD)]


@pytest.mark.parametrize(("call", "error", "words"), [
    *((lambda call=call: call(LSH), ValueError,
       "attention: expected 'linear' or 'softmax', got 'lsh-2', whose queries are its keys: it has no cross attention") for call in EVERY),
    *((lambda call=call: call(GOOD._replace(causal=False)), ValueError, "config: expected causal=True, got causal=False") for call in EVERY),
    (lambda: decoder_shapes(GOOD, 0), ValueError, "memory_width: expected an integer ≥ 1, got 0"),
    (lambda: decoder_shapes(GOOD, 2.0), TypeError, "memory_width: expected an integer ≥ 1, got 2.0"),
    (lambda: decoder_shapes(GOOD._replace(heads=3), Em), ValueError, "heads: expected a divisor of width = 4, got 3"),
    (lambda: decoder_forward(transformer_init(np.random.default_rng(0), GOOD), TOKENS, MEMORY, GOOD),
     ValueError, "params: expected a key 'blocks.0.cross.key.weight', found none"),
    (lambda: transformer_forward(PARAMS, TOKENS, GOOD), ValueError, r"10 foreign \(first \['blocks.0.cross.key.bias'\]\)"),
    (lambda: decoder_forward(PARAMS, TOKENS, MEMORY, GOOD._replace(layers=2)),
     ValueError, "params: expected the keys of this configuration, got 26 missing"),
    *((lambda call=call: call(PARAMS, MEMORY[..., :2]), ValueError,
       r"memory: expected \(\.\.\., Nm, Em\) = \(1, 5, 3\), got \(1, 5, 2\): one memory for each sequence, as wide as") for call in READING),
    *((lambda call=call: call(PARAMS, MEMORY.astype(float)), TypeError, "memory is float64") for call in READING),
    *((lambda call=call: call(PARAMS, MEMORY[0, 0]), ValueError, r"memory: expected \(\.\.\., Nm, Em\), got \(3,\)") for call in READING),
    (lambda: decoder_forward(PARAMS, TOKENS, np.repeat(MEMORY, 2, 0), GOOD), ValueError,
     r"memory: expected \(\.\.\., Nm, Em\) = \(1, 5, 3\), got \(2, 5, 3\): one memory for each sequence"),
    (lambda: decoder_prefill(PARAMS, TOKENS, np.repeat(MEMORY, 2, 0), GOOD), ValueError, "one memory for each sequence"),
    (lambda: decoder_forward(PARAMS, TOKENS, MEMORY, GOOD, memory_lengths=np.array([6])),
     ValueError, "memory_lengths: expected 0 ≤ length ≤ N = 5, got values from 6 to 6"),
    (lambda: decoder_forward(PARAMS, TOKENS, MEMORY, GOOD, lengths=np.array([4])), ValueError, "^lengths: expected 0 ≤ length ≤ N = 3"),
    (lambda: decoder_forward(PARAMS, TOKENS + 4, MEMORY, GOOD), ValueError, "tokens: expected 0 ≤ token < V = 7, got values from 5 to 7"),
    (lambda: decoder_forward(PARAMS, np.array(1), MEMORY, GOOD), ValueError, r"tokens: expected \(\.\.\., N\), got \(\)"),
    (lambda: decoder_step(PARAMS, TOKENS[:, 0], DecoderState(6, STATE.layers, STATE.memory), GOOD),
     ValueError, "at most length = 6 positions, got positions up to 7"),
    (lambda: decoder_step(PARAMS, TOKENS[:, 0], DecoderState(0, (), ()), GOOD), ValueError, "layers = 1 layers, got 0"),
    (lambda: decoder_step(PARAMS, np.array([1, 2]), STATE, GOOD), ValueError, "state.S: expected"),
    (lambda: decoder_backward(np.zeros((1, 3, 8), "f4"), decoder_forward(PARAMS, TOKENS, MEMORY, GOOD)[1]),
     ValueError, r"\(1, 3, 7\), got \(1, 3, 8\)"),
])
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
