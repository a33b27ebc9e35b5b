"""Laws of the cross entropy."""
from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.losses import bits, cross_entropy_backward, cross_entropy_forward
from refattn.testing.budgets import assert_within, gamma, rounding, unit_roundoff

DTYPES = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
seeds, dtypes = st.integers(0, 2**32 - 1), st.sampled_from(DTYPES)
leads = st.sampled_from([(), (0,), (1,), (4,), (2, 3), (2, 0, 3)])


def case(seed, dtype, lead, V, weighted, scale=3.0):
    rng = np.random.default_rng(seed)
    logits = np.asarray(scale * rng.standard_normal((*lead, V))).astype(dtype)
    targets = np.asarray(rng.integers(0, V, lead))
    weights = np.asarray(rng.integers(0, 4, lead)) if weighted else None
    return logits, targets, weights


def oracle(logits, targets, weights):
    """(loss, dlogits, Σ share·size of a term) one position at a time, in longdouble."""
    x, loss, size = logits.astype(np.longdouble), np.longdouble(0), np.longdouble(0)
    dx, total = np.zeros(x.shape, np.longdouble), targets.size if weights is None else weights.sum()
    for at in np.ndindex(targets.shape):
        w = np.longdouble(1 if weights is None else weights[at])
        if w:
            m = x[at].max()
            p = np.exp(x[at] - m)
            log = np.log(p.sum())
            loss += w / total * (log - (x[at][targets[at]] - m))
            size += w / total * (log + np.abs(x[at] - m).max() + 1)
            dx[at] = w / total * (p / p.sum() - np.eye(x.shape[-1])[targets[at]])
    return loss, dx, float(size)


def work(dtype):
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


@given(seeds, dtypes, leads, st.integers(1, 7), st.booleans())
def test_the_loss_is_its_equation(seed, dtype, lead, V, weighted):
    logits, targets, weights = case(seed, dtype, lead, V, weighted)
    loss, _ = cross_entropy_forward(logits, targets, weights=weights)
    expected, _, size = oracle(logits, targets, weights)
    assert loss.dtype == dtype and np.shape(loss) == ()
    # Each term: its subtraction and exponential (4 u) within V additions, a logarithm (4 u), a subtraction, its share (2 u).
    assert_within(loss, float(expected), gamma(V + 14, work(dtype)) * size + rounding(float(expected), dtype))


@given(seeds, dtypes, leads, st.integers(1, 7), st.booleans(), st.floats(-3, 3))
def test_the_gradient_is_the_transpose(seed, dtype, lead, V, weighted, dloss):
    logits, targets, weights = case(seed, dtype, lead, V, weighted)
    _, residuals = cross_entropy_forward(logits, targets, weights=weights)
    dlogits = cross_entropy_backward(dloss, residuals)
    _, dx, _ = oracle(logits, targets, weights)
    p, u = np.abs(dx.astype(np.float64)), work(dtype)
    largest = np.abs(logits.astype(np.float64)).max(initial=0) * 2
    chosen = np.abs(p).max(-1, keepdims=True) if p.size else p
    assert dlogits.dtype == dtype and dlogits.shape == logits.shape
    # An exponent is rounded once, which moves a probability by u · its size; p - 1 has the absolute error of p.
    share = np.zeros(targets.shape) if not targets.size else (np.full(targets.shape, 1 / targets.size) if weights is None else
                                                              weights / max(weights.sum(), 1))
    bound = gamma(V + 12 + largest, u) * (p + chosen * 0 + share[..., None] * (p > 0)) * abs(dloss)
    assert_within(dlogits, (dloss * dx).astype(np.float64), bound + rounding((dloss * dx).astype(np.float64), dtype) + 1e-44)


@given(seeds, st.integers(2, 5), st.booleans())
def test_the_gradient_agrees_with_the_complex_step(seed, V, weighted):
    logits, targets, weights = case(seed, np.dtype(np.float64), (3,), V, weighted)
    share = (np.ones(3) if weights is None else weights) / (3 if weights is None else max(weights.sum(), 1))
    direction = np.random.default_rng(seed + 1).standard_normal(logits.shape)
    x = logits + 1e-200j * direction
    along = (share * (np.log(np.exp(x).sum(-1)) - x[np.arange(3), targets])).sum().imag / 1e-200
    dlogits = cross_entropy_backward(1.0, cross_entropy_forward(logits, targets, weights=weights)[1])
    assert_within((dlogits * direction).sum(), along, gamma(40 * V, "float64") * (share[:, None] * np.abs(direction)).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand_give_numbers(dtype):
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]]).astype(dtype)
    loss, residuals = cross_entropy_forward(logits, np.array([0, 1, 2]))
    dlogits = cross_entropy_backward(1.0, residuals)
    assert np.isfinite(loss) and np.isfinite(dlogits).all()
    assert_within(loss, float((math.log(3) + 2 * logits[0, 0].astype(float) + math.log(2)) / 3), rounding(7e3, dtype) * 2)


def test_a_class_that_is_excluded_has_probability_zero():
    loss, residuals = cross_entropy_forward(np.array([[0.0, -np.inf, 0.0]]), np.array([0]))
    assert abs(bits(loss) - 1) <= 4 * unit_roundoff("float64")
    np.testing.assert_array_equal(cross_entropy_backward(1.0, residuals), [[-0.5, 0.0, 0.5]])


@given(seeds, dtypes, st.integers(1, 6), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_has_no_weight_changes_nothing(seed, dtype, V, garbage):
    logits, targets, weights = case(seed, dtype, (2, 5), V, True)
    hidden = weights == 0
    dirty, wrong = logits.copy(), targets.copy()
    dirty[hidden], wrong[hidden] = garbage, -1
    clean = cross_entropy_forward(logits, targets, weights=weights)
    other = cross_entropy_forward(dirty, wrong, weights=weights)
    assert clean[0] == other[0]
    a, b = (cross_entropy_backward(1.0, residuals) for _, residuals in (clean, other))
    np.testing.assert_array_equal(a, b)
    assert not b[hidden].any()


def test_a_mask_is_weights_of_one_and_none_is_a_mask_of_all():
    logits, targets, weights = case(1, np.dtype(np.float64), (2, 5), 4, True)
    mask = weights > 1
    for a, b in ((mask, mask.astype(int)), (mask, mask.astype(float))):
        assert cross_entropy_forward(logits, targets, weights=a)[0] == cross_entropy_forward(logits, targets, weights=b)[0]
    assert cross_entropy_forward(logits, targets, weights=np.ones_like(mask))[0] == cross_entropy_forward(logits, targets)[0]
    loss, residuals = cross_entropy_forward(logits, targets, weights=np.zeros_like(mask))
    assert loss == 0 and not cross_entropy_backward(1.0, residuals).any()


@given(seeds, st.sampled_from([np.float64, np.float32]))
def test_layout_changes_nothing_and_inputs_are_left_alone(seed, dtype):
    logits, targets, _ = case(seed, np.dtype(dtype), (3, 4), 5, False)
    expected, residuals = cross_entropy_forward(logits, targets)
    dexpected = cross_entropy_backward(2.0, residuals)
    for view in (np.asfortranarray(logits), logits[::-1, :, ::-1].copy()[::-1, :, ::-1], np.repeat(logits, 2, 1)[:, ::2]):
        before = view.tobytes()
        view.flags.writeable = False
        loss, residuals = cross_entropy_forward(view, targets)
        again = [cross_entropy_backward(2.0, residuals) for _ in range(2)]
        assert_within(loss, float(expected), gamma(60, dtype) * float(abs(expected) + 20))
        np.testing.assert_array_equal(again[0], again[1])
        assert_within(again[0], dexpected.astype(np.float64), gamma(60, dtype) * np.ones_like(dexpected))
        assert view.tobytes() == before


@pytest.mark.parametrize(("logits", "targets", "weights", "error", "words"), [
    (np.zeros((2, 3)), np.zeros(2), None, TypeError, "targets: expected integers, got float64"),
    (np.zeros((2, 3)), np.array([0, 3]), None, ValueError, "targets: expected 0 ≤ target < V = 3, got values from 0 to 3"),
    (np.zeros((2, 3)), np.array([0, -1]), None, ValueError, "got values from -1 to 0"),
    (np.zeros((2, 3)), np.array([0]), None, ValueError, r"targets: expected the leading axes of logits \(2,\), got \(1,\)"),
    (np.zeros((2, 0)), np.array([0, 0]), None, ValueError, "V ≥ 1"),
    (np.zeros((2, 3), int), np.array([0, 0]), None, TypeError, "logits: expected float16"),
    (np.zeros((2, 3)), np.array([0, 0]), np.ones(3), ValueError, r"weights: expected the shape of targets \(2,\), got \(3,\)"),
    (np.zeros((2, 3)), np.array([0, 0]), np.ones(2, "f4"), TypeError, "weights is float32 and logits is float64"),
    (np.zeros((2, 3)), np.array([0, 0]), np.array([1.0, -1.0]), ValueError, "weights: expected finite numbers ≥ 0"),
])
def test_what_is_wrong_is_said(logits, targets, weights, error, words):
    with pytest.raises(error, match=words):
        cross_entropy_forward(logits, targets, weights=weights)
