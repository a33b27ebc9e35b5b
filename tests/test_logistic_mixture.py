"""Laws of the discretised mixture of logistics."""
from __future__ import annotations

import decimal
import math
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.losses import bits, logistic_mixture_backward, logistic_mixture_forward, logistic_mixture_sample
from refattn.testing.budgets import assert_within, gamma, rounding, unit_roundoff

DTYPES = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
seeds, dtypes = st.integers(0, 2**32 - 1), st.sampled_from(DTYPES)
components, levels = st.integers(1, 3), st.sampled_from([2, 3, 16, 256])


def work(dtype):
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def case(seed, dtype, lead, K, V, weighted=False, spread=12.0):
    """Parameters, half of the means within some units in the last place of an edge of the target's bin."""
    rng = np.random.default_rng(seed)
    targets = np.asarray(rng.integers(0, V, lead))
    logits, means = 2 * rng.standard_normal((*lead, K)), rng.uniform(-2, 2, (*lead, K))
    edge = (2 * targets[..., None] - V + 2 * rng.integers(0, 2, (*lead, K))) / (V - 1)
    near = edge.astype(dtype).astype(np.float64) * (1 + rng.integers(-2, 3, (*lead, K)) * unit_roundoff(dtype.name))
    means = np.where(rng.random((*lead, K)) < 0.5, near, means)
    params = np.concatenate([logits, means, rng.uniform(-spread, spread, (*lead, K))], -1).astype(dtype)
    return params, targets, rng.integers(0, 4, lead) if weighted else None


def loss_and_gradient(params, targets, V, weights=None, dloss=1.0):
    loss, residuals = logistic_mixture_forward(params, targets, levels=V, weights=weights)
    return loss, logistic_mixture_backward(dloss, residuals)


def nats(params, targets, V):
    """The loss of each position by itself."""
    return np.array([logistic_mixture_forward(p, np.asarray(t), levels=V)[0] for p, t in zip(params, targets)]).astype(np.float64)


# The definition, log Σ π (σ(b) - σ(a)), in decimal numbers of as many digits as it takes.

NOISE = 1e-120


def exact_nats(row, t, V):
    K, total, weight = len(row) // 3, Decimal(0), Decimal(0)
    top = max(row[:K])
    for logit, mean, log_scale in zip(row[:K], row[K:2 * K], row[2 * K:]):
        a, b = ((Decimal(2 * j - V) / (V - 1) - mean) * (-log_scale).exp() for j in (t, t + 1))
        above = t == V - 1 or (t > 0 and a > 0)          # σ(b) - σ(a) = σ(-a) - σ(-b): from the side on which both are small
        outer, inner = (-a, -b) if above else (b, a)
        pi = (logit - top).exp()
        weight += pi
        total += pi / (1 + (-outer).exp()) - (0 if t in (0, V - 1) else pi / (1 + (-inner).exp()))
    return weight.ln() - total.ln()


def exact(params, targets, V):
    """(nats, their gradients) of each position, as float64, the gradients by central differences.

    Their step is 30 digits below the narrowest scale, so what they leave out is of relative size 1e-60; nats down to the smallest number of
    float64 keep 150 digits: they are the logarithm of a number as near to 1. Differences of them keep 120, NOISE.
    """
    nll, gradient = np.zeros(targets.shape), np.zeros(params.shape)
    for at in np.ndindex(targets.shape):
        row = [Decimal(float(x)) for x in params[at]]
        scales = [float(x) for x in params[at][2 * len(row) // 3:]]
        extent = sum(math.ceil(abs(s) / 2) for s in scales)
        with decimal.localcontext(decimal.Context(prec=480 + 3 * extent, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)):
            step = Decimal(10) ** (-30 - extent)
            nll[at] = float(exact_nats(row, int(targets[at]), V))
            for i in range(len(row)):
                up, down = ([*row[:i], row[i] + side, *row[i + 1:]] for side in (step, -step))
                gradient[at][i] = float((exact_nats(up, int(targets[at]), V) - exact_nats(down, int(targets[at]), V)) / (2 * step))
    return nll, gradient


def budget(params, targets, V, dtype):
    """Bounds of (nats, their gradients), position by position, from float64: the roundings of each line, times what it does to the result.

    In units of u an exponential, a logarithm and their likes count 5, all else 1. An end of a bin: 2 for its difference, 5 for e^{-s}, 1 for
    their product. A probability's relative error is that of its logarithm, of which there are two: of itself and of the sum. One logistic
    alone has the weight 1 and the share 1, without rounding.
    """
    u, K = unit_roundoff(dtype.name), params.shape[-1] // 3
    x, t = params.astype(np.float64), targets[..., None]
    z, mean, s = x[..., :K] - x[..., :K].max(-1, keepdims=True), x[..., K:2 * K], x[..., 2 * K:]
    softplus, sigmoid = lambda y: np.logaddexp(0, y), lambda y: np.exp(-np.logaddexp(0, -y))
    average = lambda weight, y: (weight * y).sum(-1, keepdims=True)
    inner = (t > 0) & (t < V - 1)
    inverse, log_w = np.exp(-s), math.log(2 / (V - 1)) - s
    w = np.exp(log_w)
    a, b = ((2 * j - V) / (V - 1) - mean for j in (t, t + 1))
    a, b = np.where(t == 0, -1e300, a * inverse), np.where(t == V - 1, 1e300, b * inverse)
    slope = lambda y: sigmoid(y) * sigmoid(-y)
    ea, eb = (np.where(np.abs(y) == 1e300, 0, gamma(8, dtype) * np.abs(y) + 2 * u * u * inverse) for y in (a, b))
    below, above = softplus(a), softplus(-b)
    width = np.where(inner, np.where(w < 1, log_w + np.log(-np.expm1(-np.minimum(w, 1)) / np.minimum(w, 1)), np.log1p(-np.exp(-np.maximum(w, 1)))), 0)
    e_width = np.where(w < 1, 20 + abs(math.log(2 / (V - 1))) + np.abs(log_w), 13 * np.maximum(w, 1) / np.expm1(np.clip(w, 1, 700)))
    e_width = np.where(inner, u * (e_width + 6 * np.abs(width)), 0)
    log_p = width - below - above
    e_p = e_width + sigmoid(a) * ea + sigmoid(-b) * eb + 14 * u * np.abs(log_p)
    pi = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    log_pi = z - np.log(np.exp(z).sum(-1, keepdims=True))
    e_pi = (K > 1) * u * (np.abs(z) + average(pi, np.abs(z)) + K + 12 + 5 * math.log(K) + np.abs(log_pi))
    joint = log_pi + log_p
    e_joint = e_pi + e_p + u * np.abs(joint)
    largest = joint.max(-1, keepdims=True)
    r = np.exp(joint - largest)
    nll = -(largest + np.log(r.sum(-1, keepdims=True)))
    r /= r.sum(-1, keepdims=True)
    off = largest - joint
    e_r = np.expm1(e_joint + average(r, e_joint) + u * (off + average(r, off) + K + 14))
    e_nll = average(r, e_joint) + u * ((K > 1) * (K + 10) + average(r, off) + 5 * math.log(K) + 4 * np.abs(nll))
    tail = np.where(inner, w / np.expm1(np.minimum(w, 700)), 0)
    side = np.sign(a + b)
    pull = side * sigmoid(side * a) * sigmoid(side * b) * np.expm1(-np.abs(a + b))
    at_a, at_b = np.where(t == 0, 0, np.abs(a)), np.where(t == V - 1, 0, np.abs(b))
    terms = at_a * sigmoid(a) + at_b * sigmoid(-b) + tail
    shrink = np.where(t == V - 1, 0, b) * sigmoid(-b) - np.where(t == 0, 0, a) * sigmoid(a) + tail
    logits = r * e_r + pi * (e_pi + 8 * u) + 4 * u * (pi + r)
    means = inverse * r * (np.abs(pull) * (e_r + 45 * u) + slope(a) * ea + slope(b) * eb)
    scales = r * (np.abs(shrink) * e_r + 25 * u * terms + 7 * u * inner + ea * (sigmoid(a) + at_a * slope(a)) + eb * (sigmoid(-b) + at_b * slope(b)))
    underflow = 4 * rounding(0, dtype) * np.concatenate([np.ones_like(r), 1 + inverse, 1 + terms], -1)
    return e_nll[..., 0], np.concatenate([logits, means, scales], -1) + underflow


def shares(targets, weights):
    return np.full(targets.shape, 1 / max(targets.size, 1)) if weights is None else weights / max(weights.sum(), 1)


@given(seeds, dtypes, st.sampled_from([(), (0,), (1,), (2, 2)]), components, levels, st.booleans())
def test_the_loss_and_the_gradient_are_those_of_the_definition(seed, dtype, lead, K, V, weighted):
    params, targets, weights = case(seed, dtype, lead, K, V, weighted, spread=6 if dtype == np.float16 else 12)   # float16 ends at 65504
    loss, dparams = loss_and_gradient(params, targets, V, weights, dloss=-1.5)
    nll, gradient = exact(params, targets, V)
    e_nll, e_gradient = budget(params, targets, V, work(dtype))
    share = shares(targets, weights)
    assert loss.dtype == dparams.dtype == dtype and np.shape(loss) == () and dparams.shape == params.shape
    assert_within(loss, (share * nll).sum(), (share * e_nll).sum() + rounding((share * nll).sum(), dtype), "loss")
    gradient, e_gradient = (1.5 * share[..., None] * x for x in (-gradient, e_gradient))
    assert_within(dparams, gradient, e_gradient + rounding(gradient, dtype) + rounding(0, work(dtype)) + NOISE, "dparams")


@pytest.mark.parametrize("V", [2, 256])
@pytest.mark.parametrize(("spread", "means"), [(3, 1), (12, 2), (0.5, 1e4), (80, 1e4)])
def test_float32_is_as_near_to_float64_as_its_roundings_allow(rng, V, spread, means):
    n, K = 2000, 10
    params, targets, _ = case(int(rng.integers(2**32)), np.dtype(np.float32), (n,), K, V, spread=spread)
    params[:n // 2, K:2 * K] = rng.uniform(-means, means, (n // 2, K))
    if spread == 80:
        params[..., 2 * K:] = np.abs(params[..., 2 * K:])         # narrow scales far away have no gradient that float32 can hold
    (loss, dparams), (wide, gradient) = (loss_and_gradient(params.astype(dtype), targets, V) for dtype in (np.float32, np.float64))
    e_nll, e_gradient = budget(params, targets, V, np.dtype(np.float32))
    assert_within(loss, float(wide), e_nll.mean() + rounding(wide, "float32"))
    assert_within(dparams, gradient, e_gradient / n + rounding(gradient, "float32"))


@pytest.mark.parametrize("t", [0, 1, 128, 254, 255])
@pytest.mark.parametrize(("mean", "log_scale"), [(1e4, 0.0), (-1e4, -7.0), (1e4, -20.0), (0.3, -20.0), (1e4, 8.0), (0.0, 100.0),
                                                 (1e-3, -5.5), (0.3, 3.0)])
def test_far_tails_and_narrow_bins_are_those_of_the_definition(t, mean, log_scale):
    params, targets = np.array([[0.5, -0.5, mean, mean / 2, log_scale, log_scale + 0.1]]), np.array([t])
    loss, dparams = loss_and_gradient(params, targets, 256)
    nll, gradient = exact(params, targets, 256)
    e_nll, e_gradient = budget(params, targets, 256, np.dtype(np.float64))
    assert e_nll[0] < 1e-12 * (1 + nll[0]) and (0 < loss < np.inf or nll[0] < 1e-15)
    assert_within(loss, nll[0], e_nll[0] + rounding(0, "float64"))
    assert_within(dparams, gradient, e_gradient + NOISE)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("log_scale", [-6.0, -7.0, -8.0, -9.0])
def test_what_little_a_sure_level_costs_is_right_to_its_last_digits(dtype, log_scale):
    for t, mean in ((0, -1.0), (1, -0.992), (166, 0.302), (255, 1.0)):
        params, targets = np.array([[0, mean, log_scale]], dtype), np.array([t])
        nll, _ = exact(params, targets, 256)
        e_nll, _ = budget(params, targets, 256, dtype)
        assert e_nll[0] < 1e-4 * nll[0] < 1e-4
        assert_within(nats(params, targets, 256), nll, e_nll)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_logistic_without_width_is_a_step(dtype):
    """At a log-scale of -100, e^100 = 2.7e43; float32 ends at 3.4e38, and a quarter of that stands for it."""
    nll = lambda mean, t: float(logistic_mixture_forward(np.array([0, mean, -100], dtype), np.array(t), levels=256)[0])
    narrow, few = min(math.exp(100), float(np.finfo(dtype).max) / 4), gamma(8, dtype)
    for t in range(256):
        assert nll((2 * t - 255) / 255, t) == 0                      # on its level
        if t not in (0, 128):
            edge = np.array((2 * t - 256) / 255, dtype)              # rounded: it lies on one side of the edge itself
            above = Fraction(float(edge)) > Fraction(2 * t - 256, 255)
            assert (nll(edge, t) == 0, nll(edge, t - 1) == 0) == (above, not above)
            sides = [nll(np.nextafter(edge, np.array(towards, dtype)), t) for towards in (-1, 1)]
            assert sides[0] > 1e20 and sides[1] == 0                 # one unit in the last place decides
    for t, sign in ((127, 1), (128, -1)):                            # the edge between them, 0, is a number
        loss, dparams = loss_and_gradient(np.array([0, 0, -100], dtype), np.array(t), 256)
        assert_within(loss, math.log(2), few)
        assert_within(dparams, [0, sign * narrow / 2, 0], few * np.array([0, narrow, 0]))
    assert_within(nll(0.5, 3), min(narrow * (0.5 + 248 / 255), float(np.finfo(dtype).max) / 4), few * narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logistic_without_bounds_is_a_coin_for_the_two_ends(dtype):
    """And a level between them has the width 2/255 e^-s of the density's maximum, 1/4, also where e^-s is no number of the dtype."""
    u = unit_roundoff(dtype.name)
    for log_scale in np.array([100, 1e4], dtype):
        for t in (0, 255):
            loss, dparams = loss_and_gradient(np.array([0, 1, log_scale], dtype), np.array(t), 256)
            assert_within(bits(float(loss)), 1, 4 * u)
            assert_within(dparams[2], 0, 1e-40)
        loss, dparams = loss_and_gradient(np.array([0, 1, log_scale], dtype), np.array(128), 256)
        nll = float(log_scale) + math.log(4 * 255 / 2)
        assert_within(loss, nll, 4 * u * nll)
        assert_within(dparams, [0, 0, 1], 4 * u + np.array([0, 1e-40, 0]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_quarter_of_the_largest_number_stands_for_what_is_beyond_it(dtype):
    largest = float(np.finfo(dtype).max)
    for far in ([0, 0, largest], [0, largest, -50], [0, -largest, -largest]):
        for n in (1, 3, 49):
            loss, dparams = loss_and_gradient(np.tile(np.array(far, dtype), (n, 1)), np.full(n, 7), 256)
            assert_within(loss, largest / 4, gamma(n + 2, dtype) * largest / 4)
            assert np.isfinite(dparams).all()


EXTREMES = [0.0, -0.0, 1.0, -1.0, 1 / 255, 100.0, -100.0, 88.0, -88.7, 103.9, -104.0, 1e4, -1e4, 710.0, -745.0, 1e-45, "max", "-max"]


@given(dtypes, components, levels, st.data())
def test_finite_parameters_give_numbers(dtype, K, V, data):
    largest = float(np.finfo(dtype).max if dtype.itemsize > 2 else ml_dtypes.finfo(dtype).max)
    drawn = data.draw(st.lists(st.one_of(st.sampled_from(EXTREMES), st.floats(-largest, largest)), min_size=9 * K, max_size=9 * K))
    params = np.array([{"max": largest, "-max": -largest}.get(x, x) for x in drawn])
    params = np.clip(params, -largest, largest).astype(dtype).reshape(3, 3 * K)
    targets = np.array([0, V // 2, V - 1])
    loss, dparams = loss_and_gradient(params, targets, V)
    assert not np.isnan(loss) and not np.isnan(dparams).any() and not np.isnan(bits(float(loss)))
    assert dtype.itemsize == 2 or (np.isfinite(loss) and np.isfinite(dparams).all())
    drawn = logistic_mixture_sample(params, np.random.default_rng(0), levels=V)
    assert drawn.shape == (3,) and 0 <= drawn.min() and drawn.max() < V


@given(seeds, st.sampled_from(DTYPES[:2]), components, levels)
def test_the_probabilities_of_all_levels_sum_to_one(seed, dtype, K, V):
    params = np.repeat(case(seed, dtype, (1,), K, V)[0], V, 0)
    p = np.exp(-nats(params, np.arange(V), V))
    e_nll, _ = budget(params, np.arange(V), V, dtype)
    assert_within(p.sum(), 1.0, (p * np.expm1(e_nll + rounding(-np.log(np.maximum(p, 1e-300)), dtype))).sum() + gamma(V + 5, "float64"))


@given(seeds, st.sampled_from(DTYPES[:2]), components, levels)
def test_a_mirror_changes_nothing(seed, dtype, K, V):
    params, targets, _ = case(seed, dtype, (2, 3), K, V)
    sign = np.repeat(np.array([1, -1, 1], dtype), K)
    loss, dparams = loss_and_gradient(params, targets, V)
    mirrored, dmirrored = loss_and_gradient(params * sign, V - 1 - targets, V)
    assert loss == mirrored
    np.testing.assert_array_equal(dmirrored, dparams * sign)


@given(seeds, st.sampled_from(DTYPES[:2]), levels)
def test_a_logistic_of_logit_minus_infinity_is_not_there(seed, dtype, V):
    params, targets, _ = case(seed, dtype, (4,), 3, V)
    params[:, 1] = -np.inf
    there = np.arange(9) % 3 != 1
    loss, dparams = loss_and_gradient(params, targets, V)
    expected, dexpected = loss_and_gradient(params[:, there], targets, V)
    assert loss == expected and not dparams[:, ~there].any()
    np.testing.assert_array_equal(dparams[:, there], dexpected)


@given(seeds, dtypes, components, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_has_no_weight_changes_nothing(seed, dtype, K, garbage):
    params, targets, weights = case(seed, dtype, (2, 5), K, 16, True)
    hidden = weights == 0
    dirty, wrong = params.copy(), targets.copy()
    dirty[hidden], wrong[hidden] = garbage, -1
    (clean, a), (other, b) = loss_and_gradient(params, targets, 16, weights), loss_and_gradient(dirty, wrong, 16, weights)
    assert clean == other and not b[hidden].any()
    np.testing.assert_array_equal(a, b)


def test_a_mask_is_weights_of_one_and_none_is_a_mask_of_all():
    params, targets, weights = case(1, np.dtype(np.float64), (2, 5), 3, 256, True)
    mask = weights > 1
    value = lambda weights: logistic_mixture_forward(params, targets, weights=weights)[0]
    assert value(mask) == value(mask.astype(int)) == value(mask.astype(float)) != value(None) == value(np.ones_like(mask))
    loss, dparams = loss_and_gradient(params, targets, 256, np.zeros_like(mask))
    assert loss == 0 and not dparams.any()


@given(seeds, st.sampled_from(DTYPES[:2]), components)
def test_layout_and_integers_change_nothing_and_inputs_are_left_alone(seed, dtype, K):
    params, targets, _ = case(seed, dtype, (3, 4), K, 256)
    targets[0, :2] = 127, 255                                        # where narrow integers have no next one
    expected, dexpected = loss_and_gradient(params, targets, 256)
    small = np.minimum(targets, 127)
    assert logistic_mixture_forward(params, small)[0] == logistic_mixture_forward(params, small.astype(np.int8))[0]
    for view in (np.asfortranarray(params), params[::-1, :, ::-1].copy()[::-1, :, ::-1], np.repeat(params, 2, 1)[:, ::2]):
        before = view.tobytes()
        view.flags.writeable = False
        loss, residuals = logistic_mixture_forward(view, targets.astype(np.uint8))
        again = [logistic_mixture_backward(1.0, residuals) for _ in range(2)]
        assert loss == expected and view.tobytes() == before
        np.testing.assert_array_equal(again[0], dexpected)
        np.testing.assert_array_equal(again[1], dexpected)


def test_arrays_of_a_device_stay_there(simt):
    params, targets, weights = case(3, np.dtype(np.float32), (2, 5), 3, 256, True)
    loss, dparams = loss_and_gradient(params, targets, 256, weights)
    there, dthere = loss_and_gradient(simt.asarray(params), simt.asarray(targets), 256, simt.asarray(weights))
    assert isinstance(dthere, simt.ndarray) and float(there) == loss
    np.testing.assert_array_equal(dthere.get(), dparams)
    drawn = logistic_mixture_sample(simt.asarray(params), np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.get(), logistic_mixture_sample(params, np.random.default_rng(0)))


# Drawing

def drawn_at(params, which, u, V):
    """What is drawn where the generator gives these two numbers."""
    return logistic_mixture_sample(params, SimpleNamespace(random=lambda shape: np.broadcast_to([[which], [u]], shape)), levels=V)


@given(seeds, dtypes, components, levels, st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_the_drawn_level_is_the_one_whose_bin_holds_the_quantile(seed, dtype, K, V, which, u):
    row = case(seed, dtype, (1,), K, V, spread=3)[0].astype(np.float64)
    level, = drawn_at(row.astype(dtype), which, u, V)
    pi = np.exp(row[0, :K] - row[0, :K].max())
    k = int(np.searchsorted(np.cumsum(pi), which * pi.sum(), side="right"))
    mean, scale = row[0, K + k], math.exp(row[0, 2 * K + k])
    point = -math.inf if u == 0 else mean + scale * (math.log(u) - math.log1p(-u))
    slack = 20 * unit_roundoff("float64") * (1 + abs(mean) + abs(point - mean)) if u else 0
    assert level == 0 or (2 * level - V) / (V - 1) <= point + slack
    assert level == V - 1 or point - slack < (2 * level + 2 - V) / (V - 1)


@pytest.mark.parametrize("V", [2, 5, 16])
def test_levels_are_drawn_as_often_as_they_are_probable(rng, V):
    K, n = 3, 20_000
    params = np.concatenate([rng.standard_normal(K), rng.uniform(-1, 1, K), rng.uniform(-2, -0.5, K)])
    p = np.exp(-nats(np.tile(params, (V, 1)), np.arange(V), V))
    counts = np.bincount(logistic_mixture_sample(np.tile(params, (n, 1)), rng, levels=V), minlength=V)
    # Of f degrees of freedom, χ² exceeds f + 2 √(f y) + 2 y with a probability of e^-y at most (Laurent and Massart 2000, lemma 1); y = 12.
    assert n * p.min() > 10
    assert ((counts - n * p) ** 2 / (n * p)).sum() <= V - 1 + 2 * math.sqrt((V - 1) * 12) + 24


def test_a_seed_fixes_what_is_drawn_and_one_call_draws_two_numbers_for_each_position(rng):
    params = case(5, np.dtype(np.float32), (4, 6), 3, 256)[0]
    first, again, other = (logistic_mixture_sample(params, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.int64 and first.shape == (4, 6) and (first != other).any()
    np.testing.assert_array_equal(logistic_mixture_sample(params.astype(np.float64), np.random.default_rng(1)), first)
    used, ahead = np.random.default_rng(1), np.random.default_rng(1)
    logistic_mixture_sample(params, used)
    ahead.random((2, 4, 6))
    assert used.random() == ahead.random()
    one = logistic_mixture_sample(params[0, 0], np.random.default_rng(1))
    assert isinstance(one, np.ndarray) and one.shape == () and logistic_mixture_sample(params[:0], rng).shape == (0, 6)


@pytest.mark.parametrize("T", [0.25, 0.7, 2.0])
def test_temperature_divides_the_logits_and_multiplies_the_scales(rng, T):
    params = case(6, np.dtype(np.float64), (200,), 3, 256)[0]
    warmed = params.copy()
    warmed[:, :3] /= T
    warmed[:, 6:] += math.log(T)
    drawn = logistic_mixture_sample(params, np.random.default_rng(3), temperature=T)
    np.testing.assert_array_equal(drawn, logistic_mixture_sample(warmed, np.random.default_rng(3)))
    assert (drawn != logistic_mixture_sample(params, np.random.default_rng(3))).any()


def test_at_temperature_zero_the_mean_of_the_likeliest_is_drawn():
    params = np.array([[1.0, 2.0, 2.0, -1.0, 1 / 255, 0.5, 0.0, 900.0, 0.0], [0.0, -np.inf, -1.0, -3.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert logistic_mixture_sample(params, np.random.default_rng(0), temperature=0).tolist() == [128, 0]


def test_the_ends_of_the_uniform_numbers_give_the_ends_of_the_levels():
    for log_scale in (-1.0, 800.0):
        row = np.array([[0.0, 0.0, log_scale]])
        assert [drawn_at(row, 0.0, u, 256)[0] for u in (0.0, 0.5, 1 - 2**-53)] == [0, 128, 255]
    assert drawn_at(np.array([[-np.inf, 0.0, 0.0, 0.9, -9.0, -9.0]]), 0.0, 0.5, 256)[0] == 242


@pytest.mark.parametrize(("params", "targets", "options", "error", "words"), [
    (np.zeros((2, 6)), np.zeros(2), {}, TypeError, "targets: expected integers, got float64"),
    (np.zeros((2, 6)), np.array([0, 256]), {}, ValueError, "targets: expected 0 ≤ target < levels = 256, got values from 0 to 256"),
    (np.zeros((2, 6)), np.array([0, -1]), {}, ValueError, "got values from -1 to 0"),
    (np.zeros((2, 6)), np.array([0]), {}, ValueError, r"targets: expected the leading axes of params \(2,\), got \(1,\)"),
    (np.zeros((2, 4)), np.array([0, 0]), {}, ValueError, r"params: expected \(..., 3K\) with K ≥ 1, got \(2, 4\)"),
    (np.zeros((2, 0)), np.array([0, 0]), {}, ValueError, "K ≥ 1"),
    (np.zeros((2, 3), int), np.array([0, 0]), {}, TypeError, "params: expected float16"),
    (np.zeros((2, 3)), np.array([0, 0]), {"levels": 1}, ValueError, "levels: expected an integer ≥ 2, got 1"),
    (np.zeros((2, 3)), np.array([0, 0]), {"levels": 8.0}, TypeError, "levels: expected an integer"),
    (np.zeros((2, 3)), np.array([0, 0]), {"weights": np.ones(3)}, ValueError, r"weights: expected the shape of targets \(2,\), got \(3,\)"),
    (np.zeros((2, 3)), np.array([0, 0]), {"weights": np.ones(2, "f4")}, TypeError, "weights is float32 and params is float64"),
    (np.zeros((2, 3)), np.array([0, 0]), {"weights": np.array([1.0, -1.0])}, ValueError, "weights: expected finite numbers ≥ 0"),
])
def test_what_is_wrong_is_said(params, targets, options, error, words):
    with pytest.raises(error, match=words):
        logistic_mixture_forward(params, targets, **options)


@pytest.mark.parametrize("row", [[np.nan, 0.0, 0.0], [-np.inf, 0.0, 0.0], [0.0, np.inf, 0.0], [0.0, 0.0, np.nan]])
def test_nothing_is_drawn_from_what_is_no_distribution(rng, row):
    with pytest.raises(ValueError, match="params: expected finite numbers .* look at the model's parameters"):
        logistic_mixture_sample(np.array([row]), rng)
