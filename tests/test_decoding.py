"""Laws of prepared decoding: the same function as `transformer_step`, which stays what it is judged by."""
from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import decoding
from refattn.decoding import decoding_step
from refattn.simt import cupy
from refattn.testing.budgets import gamma
from refattn.transformer import Config, transformer_init, transformer_prefill, transformer_step, transformer_step_init

ROUNDINGS = 4096            # as in tests/test_transformer.py: no path through these models has more, and a mistake is orders of magnitude larger
seeds = st.integers(0, 2**32 - 1)
configs = st.builds(Config, vocabulary=st.just(7), length=st.just(12), width=st.sampled_from([4, 8]), heads=st.sampled_from([1, 2, 4]),
                    layers=st.integers(1, 3), feed_forward=st.sampled_from([3, 5]), attention=st.sampled_from(["linear", "linear", "softmax"]),
                    feature_map=st.sampled_from(["elu1", "relu", "dpfp"]), norm=st.sampled_from(["pre", "pre", "post"]), causal=st.just(True),
                    positions=st.sampled_from(["learned", "sinusoidal"]), activation=st.sampled_from(["gelu", "relu"]),
                    features=st.sampled_from([0, 0, 3]), outputs=st.sampled_from([0, 5]), compiled=st.just(False))
loops = [False, pytest.param(True, marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs the extra numba"))]


def draw_params(rng, config, dtype=np.float64):
    """Norms are the identity and biases zero at the start, which hides mistakes: moved."""
    return {key: (p + 0.2 * rng.standard_normal(p.shape)).astype(dtype) for key, p in transformer_init(rng, config, np.float64).items()}


def draw_inputs(rng, config, shape, dtype=np.float64):
    return rng.standard_normal((*shape, config.features)).astype(dtype) if config.features else rng.integers(0, 7, shape)


def steps_of(params, inputs, state, config):
    found = []
    for i in range(inputs.shape[1]):
        logits, state = transformer_step(params, inputs[:, i], state, config)
        found.append(logits)
    return found


def compiled_too(config, compiled):
    """The same model with its loops compiled, where there are some: with linear attention."""
    return config._replace(compiled=compiled and config.attention == "linear")


@pytest.mark.parametrize("compiled", loops)
@given(seeds, configs, st.integers(0, 5), st.integers(0, 4), st.sampled_from([np.float64, np.float64, np.float32, np.float16]))
def test_it_is_the_step(compiled, seed, config, B, prefix, dtype):
    rng, plain = np.random.default_rng(seed), config
    config = compiled_too(config, compiled)
    params, inputs = draw_params(rng, config, dtype), draw_inputs(rng, config, (B, prefix + 6), dtype)
    state = transformer_prefill(params, inputs[:, :prefix], config)[1] if prefix else transformer_step_init(config, B, dtype)
    step = decoding_step(params, config, state)
    found = [step(inputs[:, i]) for i in range(prefix, prefix + 6)]
    for ours, expected in zip(found, steps_of(params, inputs[:, prefix:], state, plain), strict=True):
        assert ours.dtype == dtype and ours.shape == (B, config.outputs or 7)
        # float64: 2⁻⁵³ leaves room for every rounding there is; float32: at most 14 layers a block, norms that enlarge by 20, as in that file
        bound = gamma(ROUNDINGS, dtype) if dtype == np.float64 else gamma(40, dtype) * 20
        assert np.abs(ours.astype(float) - expected).max(initial=0) <= bound * max(1, np.abs(expected).max(initial=0))


@pytest.mark.parametrize("compiled", loops)
@given(seeds, configs, st.integers(1, 4))
def test_the_state_it_was_given_can_be_gone_on_from_again(compiled, seed, config, B):
    rng, config = np.random.default_rng(seed), compiled_too(config, compiled)
    params, inputs = draw_params(rng, config), draw_inputs(rng, config, (B, 8))
    state = transformer_prefill(params, inputs[:, :3], config)[1]
    before = steps_of(params, inputs[:, 3:], state, config)
    one, other = decoding_step(params, config, state), decoding_step(params, config, state)
    first = [one(inputs[:, i]) for i in range(3, 8)]
    kept = [x.copy() for x in first]
    second = [other(inputs[:, i]) for i in range(3, 8)]
    for a, b, c in zip(first, second, kept, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)                                      # a result is not written to by later steps
    for a, b in zip(before, steps_of(params, inputs[:, 3:], state, config), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state.position == 3


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs the extra numba")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("B", "width", "heads", "inner"), [(1, 32, 1, 32), (70, 48, 3, 40), (3, 130, 2, 7), (66, 64, 2, 100)])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_compiled_it_is_the_step_for_whole_and_part_vectors_and_groups(rng, activation, B, width, heads, inner, dtype):
    """Sequences in several groups and on several threads, features that fill vectors and that do not; each sequence by itself gives the same bits."""
    config = Config(7, 12, width, heads, 2, inner, activation=activation, compiled=True)
    params, inputs = draw_params(rng, config, dtype), draw_inputs(rng, config, (B, 5))
    step = decoding_step(params, config, transformer_step_init(config, B, dtype))
    found = [step(inputs[:, i]) for i in range(5)]
    expected = steps_of(params, inputs, transformer_step_init(config, B, dtype), config._replace(compiled=False))
    bound = gamma(ROUNDINGS, dtype) if dtype == np.float64 else gamma(40, dtype) * 20
    for ours, right in zip(found, expected, strict=True):
        assert np.abs(ours.astype(float) - right).max() <= bound * max(1, np.abs(right).max())
    for b in {0, B // 2, B - 1}:
        alone = decoding_step(params, config, transformer_step_init(config, 1, dtype))
        for i in range(5):
            np.testing.assert_array_equal(alone(inputs[b:b + 1, i])[0], found[i][b])


@pytest.mark.parametrize("some", [1, 2, 3, 1 << 19])
def test_how_many_states_are_at_hand_changes_nothing(rng, monkeypatch, some):
    config = Config(7, 12, 8, 2, 2, 5)
    params, inputs = draw_params(rng, config), draw_inputs(rng, config, (5, 6))
    whole = decoding_step(params, config, transformer_step_init(config, 5, np.float64))
    monkeypatch.setattr(decoding, "STEP_BYTES", some * 2 * 4 * 4 * 8)
    parts = decoding_step(params, config, transformer_step_init(config, 5, np.float64))
    for i in range(6):
        np.testing.assert_array_equal(parts(inputs[:, i]), whole(inputs[:, i]))


def test_other_arrays_and_other_shapes_take_the_plain_step(rng):
    config = Config(7, 12, 8, 2, 1, 5)
    params, inputs = draw_params(rng, config, np.float32), draw_inputs(rng, config, (2, 3))
    there = {key: cupy.asarray(p) for key, p in params.items()}
    _, state = transformer_prefill(there, cupy.asarray(inputs[:, :2]), config)
    expected, _ = transformer_step(there, cupy.asarray(inputs[:, 2]), state, config)
    np.testing.assert_array_equal(decoding_step(there, config, state)(cupy.asarray(inputs[:, 2])).get(), expected.get())
    _, state = transformer_prefill(params, inputs[0, :2], config)                # one sequence without an axis for it
    np.testing.assert_array_equal(decoding_step(params, config, state)(inputs[0, 2]), transformer_step(params, inputs[0, 2], state, config)[0])


GOOD = Config(7, 3, 4, 2, 1, 5)
PARAMS = transformer_init(np.random.default_rng(0), GOOD)


def a_step(config=GOOD, state=None):
    return decoding_step(PARAMS, config, state or transformer_step_init(GOOD, 2))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: a_step(GOOD._replace(layers=2)), ValueError, "params: expected the keys of this configuration"),
    (lambda: a_step(GOOD._replace(causal=False)), ValueError, "config: expected causal=True"),
    (lambda: a_step(state=transformer_step_init(GOOD._replace(layers=2), 2)), ValueError, "layers = 1 layers, got 2"),
    (lambda: a_step(state=transformer_step_init(GOOD._replace(heads=1), 2)), ValueError, "state.S: expected"),
    (lambda: a_step(GOOD._replace(attention="softmax", compiled=True)), ValueError, "compiled: expected False for attention 'softmax', got True"),
    (lambda: a_step()(np.zeros(3, int)), ValueError, r"input_t: expected \(B,\) = \(2,\), got \(3,\); the state is of so many sequences"),
    (lambda: a_step()(np.array([1, 7])), ValueError, "tokens: expected 0 ≤ token < V = 7"),
    (lambda: a_step()(np.array([1.0, 2.0])), TypeError, "tokens: expected integers, got float64"),
    (lambda: [step(np.zeros(2, int)) for step in [a_step()] for _ in range(4)], ValueError, "at most length = 3 positions"),
])
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
