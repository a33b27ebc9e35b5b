"""Laws of the optimisers: each is its algorithm, one number at a time; nothing of the caller's is written to."""
from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import optim
from refattn.testing.budgets import assert_within, gamma, rounding

DTYPES = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
seeds, dtypes = st.integers(0, 2**32 - 1), st.sampled_from(DTYPES)
SHAPES = {"w": (3, 4), "b": (4,), "none": (0, 2), "one": ()}
STEPS = 9


def draw(rng, dtype):
    return {key: np.asarray(rng.standard_normal(shape)).astype(dtype) for key, shape in SHAPES.items()}


def adam_oracle(theta, grads, rate, b1, b2, eps, decay, rectified):
    """Kingma and Ba, Algorithm 1, and Liu et al., Algorithm 2, as printed, for one number, in Python floats."""
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        move = m_hat / (math.sqrt(v_hat) + eps)
        if rectified:
            longest = 2 / (1 - b2) - 1
            length = longest - 2 * t * b2**t / (1 - b2**t)
            r = math.sqrt(max((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length), 0))
            move = r * move if length > 4 else m_hat
        theta = theta - rate * move - rate * decay * theta
    return theta


@given(seeds, st.sampled_from(DTYPES[:2]), st.booleans(), st.sampled_from([0.999, 0.9]), st.sampled_from([0.0, 0.1]))
def test_adam_and_radam_are_their_algorithms(seed, dtype, rectified, beta2, decay):
    rng = np.random.default_rng(seed)
    params, step = draw(rng, dtype), optim.radam_step if rectified else optim.adam_step
    first, slots, history = params, optim.adam_init(params), []
    for _ in range(STEPS):
        history.append(draw(rng, dtype))
        params, slots = step(params, history[-1], slots, learning_rate=0.01, beta2=beta2, weight_decay=decay)
    assert slots.steps == STEPS
    for key, shape in SHAPES.items():
        assert params[key].dtype == dtype and params[key].shape == shape
        for at in np.ndindex(*shape):
            g = [float(h[key][at]) for h in history]
            expected = adam_oracle(float(first[key][at]), g, 0.01, 0.9, beta2, 1e-8, decay, rectified)
            # A step is at most α Σ|g| / √v̂; m may cancel, v may not: 4 t + 20 roundings of terms as large as the gradients.
            size = abs(float(first[key][at])) + STEPS * 0.01 * STEPS * max(map(abs, g)) / min(map(abs, g)) + STEPS * 0.01 * max(map(abs, g))
            assert_within(params[key][at], expected, gamma(4 * STEPS + 20, dtype) * size)


@given(seeds, dtypes, st.sampled_from([0.0, 0.75]), st.sampled_from([0.0, 0.5]))
def test_sgd_is_exact_on_dyadic_numbers(seed, dtype, momentum, decay):
    rng = np.random.default_rng(seed)
    params = {key: np.asarray(rng.integers(-2, 3, shape)).astype(dtype) for key, shape in SHAPES.items()}
    slots, expected, m = optim.sgd_init(params), {k: p.astype(np.float64) for k, p in params.items()}, dict.fromkeys(SHAPES, 0.0)
    for _ in range(2):
        grads = {key: np.asarray(rng.integers(-2, 3, shape)).astype(dtype) for key, shape in SHAPES.items()}
        params, slots = optim.sgd_step(params, grads, slots, learning_rate=0.25, momentum=momentum, weight_decay=decay)
        for key in SHAPES:
            m[key] = momentum * m[key] + grads[key].astype(np.float64)
            expected[key] = (expected[key] * (1 - 0.25 * decay) - 0.25 * m[key]).astype(dtype).astype(np.float64)
    for key in SHAPES:
        np.testing.assert_array_equal(params[key], expected[key].astype(dtype))


@given(seeds, dtypes, st.sampled_from([optim.sgd_step, optim.adam_step, optim.radam_step]))
def test_a_step_leaves_the_callers_arrays_untouched_and_shares_none(seed, dtype, step):
    rng = np.random.default_rng(seed)
    params, grads = draw(rng, dtype), draw(rng, dtype)
    slots = optim.sgd_init(params) if step is optim.sgd_step else optim.adam_init(params)
    held = [*params.values(), *grads.values(), *(a for part in slots if isinstance(part, dict) for a in part.values())]
    for a in held:
        a.flags.writeable = False
    new, after = step(params, grads, slots, learning_rate=0.1)
    made = [*new.values(), *(a for part in after if isinstance(part, dict) for a in part.values())]
    assert not any(np.shares_memory(a, b) for a in made for b in held)
    assert all(new[key].dtype == dtype for key in params)
    wide = np.float32 if dtype.itemsize < 4 else dtype
    assert all(a.dtype == wide for part in after if isinstance(part, dict) for a in part.values())


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_half_precision_is_one_rounding_of_single(rng, dtype):
    params, grads = draw(rng, dtype), draw(rng, dtype)
    wide = [{key: a.astype(np.float32) for key, a in d.items()} for d in (params, grads)]
    for step in (optim.adam_step, optim.radam_step):
        narrow, _ = step(params, grads, optim.adam_init(params), learning_rate=0.1, weight_decay=0.1)
        single, _ = step(*wide, optim.adam_init(wide[0]), learning_rate=0.1, weight_decay=0.1)
        for key in params:
            np.testing.assert_array_equal(narrow[key], single[key].astype(dtype))


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
def test_radam_falls_back_to_momentum_until_the_variance_is_tractable(beta2):
    """ρ_t > 4 for the first time at t = 5 or 6, whatever β2; before that a step does not depend on g's size, only on m̂."""
    longest = 2 / (1 - beta2) - 1
    params, g = {"w": np.array([0.0])}, {"w": np.array([2.0])}
    slots, moves = optim.adam_init(params), []
    for _ in range(7):
        before = params["w"][0]
        params, slots = optim.radam_step(params, g, slots, learning_rate=1.0, beta2=beta2, eps=0.0)
        moves.append(before - params["w"][0])
    for t, move in enumerate(moves, 1):
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        assert (abs(move - 2.0) < 1e-12) == (length <= 4)
        assert length <= 4 or 0 < move < 1


def test_adam_descends_and_the_first_step_is_the_learning_rate():
    params = {"x": np.array([3.0, -2.0])}
    slots = optim.adam_init(params)
    first, _ = optim.adam_step(params, params, slots, learning_rate=0.1)
    np.testing.assert_allclose(params["x"] - first["x"], [0.1, -0.1], rtol=1e-7)
    for step in range(300):
        params, slots = optim.adam_step(params, params, slots, learning_rate=optim.cosine_rate(step, 0.1, 300))
    assert np.abs(params["x"]).max() < 1e-2


@given(seeds, dtypes, st.floats(0.01, 100))
def test_clipping_keeps_the_direction_and_bounds_the_norm(seed, dtype, limit):
    rng = np.random.default_rng(seed)
    grads = draw(rng, dtype)
    clipped, norm = optim.clip_by_global_norm(grads, limit)
    flat = np.concatenate([g.astype(np.float64).ravel() for g in grads.values()])
    expected = math.sqrt(math.fsum(flat**2))
    assert_within(norm, expected, gamma(30, "float64") * expected)
    factor = min(1.0, limit / expected)
    for key, g in grads.items():
        wide = np.dtype(np.float32) if dtype.itemsize < 4 else dtype
        exact = factor * g.astype(np.float64)
        assert clipped[key].dtype == dtype
        assert_within(clipped[key], exact, gamma(34, "float64") * np.abs(exact) + gamma(3, wide) * np.abs(exact) + rounding(exact, dtype))
        assert norm > limit or clipped[key] is g


def test_no_finite_gradient_overflows_the_norm():
    for size in (1e300, 1e-300):
        clipped, norm = optim.clip_by_global_norm({"a": np.array([3 * size]), "b": np.array([4 * size])}, 1.0)
        assert norm == pytest.approx(5 * size, rel=1e-15)
    assert optim.clip_by_global_norm({}, 1.0) == ({}, 0.0)
    assert optim.clip_by_global_norm({"a": np.zeros(3)}, 1.0)[1] == 0
    with pytest.raises(ValueError, match="grads: expected finite gradients, got a norm of nan in 'b'"):
        optim.clip_by_global_norm({"a": np.ones(2), "b": np.array([1.0, np.nan])}, 1.0)


def test_schedules_are_their_equations():
    assert [optim.constant_rate(i, 0.5) for i in (0, 9)] == [0.5, 0.5]
    assert [optim.dropped_rate(i, 1.0, 3, 0.1) for i in range(5)] == [1.0, 1.0, 1.0, 0.1, 0.1]
    assert [optim.warm_up(i, 2) for i in range(4)] == [0.5, 1.0, 1.0, 1.0]
    cosine = [optim.cosine_rate(i, 1.0, 8, 0.2) for i in range(12)]
    assert cosine[0] == 1.0 and cosine[8:] == [0.2] * 4 and all(a > b for a, b in zip(cosine[:8], cosine[1:9], strict=True))
    assert cosine[4] == pytest.approx(0.6, rel=1e-15)


P, G = {"w": np.ones(2)}, {"w": np.ones(2)}


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: optim.adam_step(P, {"v": np.ones(2)}, optim.adam_init(P), learning_rate=0.1),
     ValueError, "grads: expected the keys of params"),
    (lambda: optim.adam_step(P, {"w": np.ones(3)}, optim.adam_init(P), learning_rate=0.1), ValueError,
     r"grads\['w'\]: expected the shape of params\['w'\] = \(2,\), got \(3,\)"),
    (lambda: optim.adam_step(P, {"w": np.ones(2, "f4")}, optim.adam_init(P), learning_rate=0.1), TypeError, r"params\['w'\] is float64"),
    (lambda: optim.adam_step(P, G, optim.adam_init({"w": np.ones(3)}), learning_rate=0.1), ValueError, r"slots\['w'\]: expected the shape"),
    (lambda: optim.adam_step(P, G, optim.adam_init(P), learning_rate=-0.1),
     ValueError, "learning_rate: expected a finite number ≥ 0, got -0.1"),
    (lambda: optim.adam_step(P, G, optim.adam_init(P), learning_rate=float("nan")), ValueError, "learning_rate"),
    (lambda: optim.radam_step(P, G, optim.adam_init(P), learning_rate=0.1, beta2=1.0),
     ValueError, "beta2: expected 0 ≤ beta2 < 1, got 1.0"),
    (lambda: optim.sgd_step(P, G, optim.sgd_init({}), learning_rate=0.1), ValueError, "slots: expected the keys of params"),
    (lambda: optim.clip_by_global_norm(G, 0), ValueError, "limit: expected a number > 0"),
    (lambda: optim.cosine_rate(-1, 1.0, 5), ValueError, "step: expected a step ≥ 0, got -1"),
    (lambda: optim.warm_up(0, 0), ValueError, "steps: expected an integer ≥ 1, got 0"),
])
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
