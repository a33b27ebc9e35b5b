"""Laws of generation."""
from __future__ import annotations

import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.generate import generate, generate_recomputed, generate_stream, sample
from refattn.losses import logistic_mixture_sample
from refattn.transformer import Config, transformer_forward, transformer_init

seeds = st.integers(0, 2**32 - 1)
configs = st.builds(Config, vocabulary=st.just(7), length=st.just(12), width=st.just(4), heads=st.just(2), layers=st.integers(1, 2),
                    feed_forward=st.just(5), attention=st.sampled_from(["linear", "softmax"]),
                    positions=st.sampled_from(["learned", "sinusoidal"]), feature_map=st.just("elu1"),
                    norm=st.sampled_from(["pre", "post"]), causal=st.just(True), activation=st.sampled_from(["gelu", "relu"]),
                    features=st.just(0), outputs=st.just(0), compiled=st.just(False))


@given(seeds, configs, st.integers(1, 5), st.integers(0, 6), st.sampled_from([0.0, 0.5, 1.0]))
def test_steps_draw_what_recomputing_draws(seed, config, P, count, temperature):
    params = transformer_init(np.random.default_rng(seed), config, np.float64)
    prompt = np.random.default_rng(seed).integers(0, 7, (3, P))
    a, b = (f(params, config, prompt, count, np.random.default_rng(seed), temperature=temperature) for f in (generate, generate_recomputed))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[:, :P], prompt)
    assert a.shape == (3, P + count) and a.dtype == prompt.dtype and ((a >= 0) & (a < 7)).all()


@given(seeds, configs)
def test_at_temperature_zero_each_token_is_the_likeliest(seed, config):
    params = transformer_init(np.random.default_rng(seed), config, np.float64)
    tokens = generate(params, config, np.array([[1], [2]]), 5, np.random.default_rng(0), temperature=0)
    logits, _ = transformer_forward(params, tokens[:, :-1], config)
    np.testing.assert_array_equal(logits.argmax(-1), tokens[:, 1:])


def test_lsh_attention_is_recomputed_with_hashes_of_the_same_generator(rng):
    config = Config(7, 12, 4, 2, 1, 5, attention="lsh-2")
    params, prompt = transformer_init(rng, config, np.float64), np.array([[1, 2], [3, 4]])
    tokens = generate_recomputed(params, config, prompt, 6, np.random.default_rng(3))
    again = np.random.default_rng(3)
    for i in range(2, 8):
        logits, _ = transformer_forward(params, tokens[:, :i], config, rng=again)
        np.testing.assert_array_equal(tokens[:, i], sample(logits[:, -1], again))
    with pytest.raises(ValueError, match="got 'lsh-2', which sorts whole sequences .* as generate_recomputed does"):
        generate(params, config, prompt, 6, rng)


def test_images_are_drawn_from_the_mixtures_of_the_head():
    """With and without the recurrence, and what is read next is what was drawn."""
    config = Config(257, 9, 8, 2, 1, 16, outputs=6)
    params = transformer_init(np.random.default_rng(0), config, np.float64)
    prompt = np.full((4, 1), 256)
    tokens = generate(params, config, prompt, 9, np.random.default_rng(1), temperature=0.8, draw=logistic_mixture_sample)
    np.testing.assert_array_equal(tokens, generate_recomputed(params, config, prompt, 9, np.random.default_rng(1), temperature=0.8,
                                                              draw=logistic_mixture_sample))
    assert tokens[:, 1:].max() <= 255 and len(np.unique(tokens[:, 1:])) > 9
    rng = np.random.default_rng(1)
    for i in range(1, 10):
        mixtures = transformer_forward(params, tokens[:, :i], config)[0][:, -1]
        np.testing.assert_array_equal(tokens[:, i], logistic_mixture_sample(mixtures, rng, temperature=0.8))


def test_one_seed_gives_one_text_and_the_prompt_is_left_alone():
    config = Config(7, 12, 4, 2, 1, 5)
    params = transformer_init(np.random.default_rng(0), config)
    prompt = np.array([[1, 2], [3, 4]], np.uint8)
    prompt.flags.writeable = False
    a, b, c = (generate(params, config, prompt, 8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any() and a.dtype == np.uint8


def test_the_last_token_needs_no_position_of_its_own():
    config = Config(7, 4, 4, 2, 1, 5)
    params = transformer_init(np.random.default_rng(0), config)
    assert generate(params, config, np.array([[1, 2]]), 3, np.random.default_rng(0)).shape == (1, 5)
    with pytest.raises(ValueError, match="count: expected at most 3 more tokens, got 4"):
        generate(params, config, np.array([[1, 2]]), 4, np.random.default_rng(0))
    endless = config._replace(positions="sinusoidal")
    params = transformer_init(np.random.default_rng(0), endless)
    assert generate(params, endless, np.array([[1, 2]]), 40, np.random.default_rng(0)).shape == (1, 42)


@given(seeds, configs, st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_stream_goes_on_as_generate_does(seed, config, P, temperature):
    """To the last position of a model that has one; without an end if it has none."""
    params = transformer_init(np.random.default_rng(seed), config, np.float64)
    prompt = np.random.default_rng(seed).integers(0, 7, (3, P))
    stream = generate_stream(params, config, prompt, np.random.default_rng(seed), temperature=temperature)
    tokens = generate(params, config, prompt, 13 - P, np.random.default_rng(seed), temperature=temperature)
    np.testing.assert_array_equal(np.stack(list(islice(stream, 13 - P)), axis=1), tokens[:, P:])
    if config.positions == "learned":
        with pytest.raises(ValueError, match="at most length = 12 positions"):
            next(stream)
    else:
        assert next(stream).shape == (3,)


def test_a_stream_of_a_linear_model_keeps_nothing():
    """Not even the logits of its prompt, once it has moved on; softmax attention keeps the past."""
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    kept = {}
    for attention in ("linear", "softmax"):
        config = Config(7, 12, 8, 2, 1, 5, attention=attention, positions="sinusoidal")
        params = transformer_init(np.random.default_rng(0), config)
        stream = generate_stream(params, config, np.zeros((1, 5000), int), np.random.default_rng(0))
        tracemalloc.start()
        for tokens in (50, 550):
            for _ in islice(stream, tokens):
                pass
            kept[attention, tokens] = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
        tracemalloc.stop()
    assert kept["linear", 50] == kept["linear", 550] < 5000 and kept["softmax", 50] > 5000 * 2 * 8 * 4


class Fixed:
    """A generator whose uniform numbers are given."""

    def __init__(self, u):
        self.u = np.asarray(u, float)

    def random(self, shape):
        assert self.u.shape == shape
        return self.u


@given(seeds, st.integers(1, 6), st.sampled_from([0.25, 1.0, 3.0]))
def test_a_class_is_drawn_just_where_the_distribution_function_passes_the_number(seed, V, T):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(V) * 3
    p = np.exp((x - x.max()) / T)
    edges = np.concatenate([[0], np.cumsum(p) / p.sum()])
    middle = (edges[1:] + edges[:-1]) / 2
    wide = np.diff(edges) > 1e-12                       # the middle of a narrower step is its edge, to rounding
    np.testing.assert_array_equal(sample(np.tile(x, (wide.sum(), 1)), Fixed(middle[wide]), temperature=T), np.arange(V)[wide])
    assert sample(x, Fixed(0.0), temperature=T) == 0
    assert sample(x, Fixed(np.nextafter(1, 0)), temperature=T) <= V - 1


def test_a_class_without_probability_is_never_drawn():
    logits = np.array([-np.inf, 0.0, -1e4, 0.0, -np.inf])
    for u in (0.0, 0.25, 0.5, np.nextafter(0.5, 0), np.nextafter(1, 0)):
        assert sample(logits, Fixed(u)) in (1, 3)
    assert sample(logits, Fixed(0.9), temperature=1e-300) in (1, 3)
    assert sample(np.array([1e4, -1e4]), Fixed(np.nextafter(1, 0)), temperature=1e-3) == 0


def test_frequencies_are_the_probabilities(rng):
    x = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    counts = np.bincount(sample(np.tile(x, (40000, 1)), rng), minlength=4) / 40000
    assert np.abs(counts - np.exp(x)).max() < 5 * np.sqrt(0.25 / 40000)        # five standard deviations


CONFIG = Config(7, 12, 4, 2, 1, 5)
PARAMS = transformer_init(np.random.default_rng(0), CONFIG)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: generate(PARAMS, CONFIG, np.zeros((4, 0), int), 2, RNG), ValueError, r"prompt: expected \(B, P\) with P ≥ 1, got \(4, 0\)"),
    (lambda: generate(PARAMS, CONFIG, np.zeros(4, int), 2, RNG), ValueError, r"prompt: expected \(B, P\)"),
    (lambda: generate(PARAMS, CONFIG, np.zeros((1, 1)), 2, RNG), TypeError, "prompt: expected integers, got float64"),
    (lambda: generate(PARAMS, CONFIG, np.zeros((1, 1), int), -1, RNG), ValueError, "count: expected an integer ≥ 0, got -1"),
    (lambda: generate(PARAMS, CONFIG._replace(vocabulary=300), np.zeros((1, 1), np.uint8), 1, RNG),
     TypeError, "prompt is uint8, too narrow"),
    (lambda: generate(PARAMS, CONFIG._replace(causal=False), np.zeros((1, 1), int), 1, RNG), ValueError, "expected causal=True"),
    (lambda: generate(PARAMS, CONFIG, np.zeros((1, 1), int), 1, RNG, temperature=-1),
     ValueError, "temperature: expected a finite number ≥ 0"),
    (lambda: next(generate_stream(PARAMS, CONFIG, np.zeros((4, 0), int), RNG)), ValueError, r"prompt: expected \(B, P\) with P ≥ 1"),
    (lambda: sample(np.array([0.0, np.nan]), RNG), ValueError, "logits: expected a number or -inf everywhere"),
    (lambda: sample(np.array([-np.inf, -np.inf]), RNG), ValueError, "logits: expected a number or -inf everywhere"),
    (lambda: sample(np.zeros((2, 0)), RNG), ValueError, "V ≥ 1"),
])
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
