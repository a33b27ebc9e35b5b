"""LSH attention: its definition by sets judges it, and the transpose of that its backward."""
from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import oracle
from refattn.lsh import lsh_backward, lsh_buckets, lsh_forward, lsh_rotations
from refattn.testing import laws
from refattn.testing.budgets import assert_within, gamma, rounding, unit_roundoff
from refattn.testing.strategies import strided

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
EXP = 6                 # NumPy's float32 exp is within 2.52 units in the last place


class Case(NamedTuple):
    x: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    buckets: np.ndarray
    options: dict

    def wide(self):
        return self._replace(**{n: getattr(self, n).astype(float) for n in ("x", "v", "dout")})


@st.composite
def cases(draw, dtype=np.float64, lengths=None, longest=24):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead, (D, M) = draw(st.sampled_from([(2,), (2, 3), ()])), draw(st.sampled_from([(4, 3), (3, 5), (1, 2)]))
    N, R = draw(st.one_of(st.sampled_from([0, 1, 3, 4, 5, 8]), st.integers(0, longest))), draw(st.integers(1, 4))
    x, v, dout = (rng.standard_normal((*lead, N, width)).astype(dtype) for width in (D, M, M))
    with_lengths = draw(st.booleans()) if lengths is None else lengths
    options = {"causal": draw(st.booleans()), "chunk": draw(st.sampled_from([1, 2, 4, 8, 32])), "scale": draw(st.sampled_from([0.0, 0.5, 3.0])),
               "lengths": rng.integers(0, N + 1, lead) if with_lengths else None}
    return Case(x, v, dout, lsh_buckets(x.astype(float), lsh_rotations(rng, R, D, draw(st.sampled_from([2, 4, 6])))), options)


def definition(c):
    return lambda x, v: [oracle.lsh_attention(x, v, c.buckets, **c.options)]


def weights(c):
    """P of the definition: its answer for values that are unit vectors."""
    one = np.broadcast_to(np.eye(c.x.shape[-2]), (*c.x.shape[:-1], c.x.shape[-2]))
    return oracle.lsh_attention(c.x.astype(float), one, c.buckets, **c.options)


def budget(c):
    """Bounds of out, dx, dv. A score s x·k is off by γ of D + 4 roundings (|k| by two of a sum of D, and a division) of |s| |x||k|, and by the
    subtractions of log n and of the maximum, each at most of the largest score; exp, sums of at most 2C·R weights and the rounds' factors add
    theirs. So a weight is off by δ, relatively, and Σ P = 1; out and the inner do·out by twice that; each gradient by a few δ of its sum
    of absolute values."""
    acc = np.float32 if c.x.dtype.itemsize == 2 else c.x.dtype
    (N, D), M = c.x.shape[-2:], c.v.shape[-1]
    s, norm = abs(c.options["scale"]), np.sqrt((c.x.astype(float) ** 2).sum(-1, keepdims=True))
    k = c.x / np.where(norm == 0, 1, norm)
    size, P = s * np.abs(c.x.astype(float)) @ np.abs(k).mT, weights(c)
    top = size.max(initial=0) + np.log(8)
    R, C = c.buckets.shape[-2], c.options["chunk"]
    delta = (gamma(2 * D + 6, acc) * size + gamma(6, acc) * top + gamma(2 * EXP + 2 * C * R + R + N + D + M + 12, acc))
    per_row = (P * delta).sum(-1, keepdims=True)
    v, do = np.abs(c.v.astype(float)), np.abs(c.dout.astype(float))
    out = P @ v
    lost = 2 * unit_roundoff(c.x.dtype) if c.x.dtype.itemsize == 2 else 0.0                     # the backward reads out as it was rounded
    e_out = 2 * ((P * delta) @ v + per_row * out)
    dv = P.mT @ do
    dP = do @ v.mT + (do * out).sum(-1, keepdims=True)
    dy, e_dy = P * dP, 4 * P * (delta + per_row) * dP + P * ((do * (e_out + lost * out)).sum(-1, keepdims=True))
    safe = np.where(norm == 0, 1, norm)

    def gradient(dy):
        dk = s * dy.mT @ np.abs(c.x.astype(float))
        return s * dy @ np.abs(k) + (dk + np.abs(k) * (np.abs(k) * dk).sum(-1, keepdims=True)) / safe

    dx, e_dx = gradient(dy), gradient(e_dy + gamma(4 * (N + D + M + 8), acc) * dy)
    e_dv = 4 * (P * (delta + per_row)).mT @ do + gamma(2 * N + 4, acc) * dv
    return [e_out + rounding(out, c.x.dtype), e_dx + rounding(dx, c.x.dtype), e_dv + rounding(dv, c.x.dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_it_is_the_softmax_over_the_sets_of_the_definition(dtype, data):
    c = data.draw(cases(dtype))
    out, residuals = lsh_forward(c.x, c.v, c.buckets, **c.options)
    dx, dv = lsh_backward(c.dout, residuals)
    assert [y.dtype for y in (out, dx, dv)] == [np.dtype(dtype)] * 3 and dx.shape == c.x.shape and dv.shape == c.v.shape
    w = c.wide()
    exact, wide_residuals = lsh_forward(w.x, w.v, w.buckets, **w.options)
    expected = [definition(w)(w.x, w.v)[0], *lsh_backward(w.dout, wide_residuals)]              # whose gradients the next law judges
    for name, y, right, bound in zip(("out", "dx", "dv"), (out, dx, dv), expected, budget(c), strict=True):
        assert_within(y, right, bound, name)


@given(cases(), st.integers(0, 2**32 - 1))
def test_backward_is_the_transpose_of_the_definition(c, seed):
    _, residuals = lsh_forward(c.x, c.v, c.buckets, **c.options)
    dx, dv = lsh_backward(c.dout, residuals)
    laws.law_backward_is_the_transpose(definition(c), (c.x, c.v), (dx, dv), budget(c)[1:], (c.dout,), np.random.default_rng(seed))


@given(cases(longest=9))
def test_every_element_of_the_gradients_is_the_definitions(c):
    if c.x.ndim > 2:
        c = c._replace(**{n: getattr(c, n)[0] for n in ("x", "v", "dout", "buckets")},
                       options=c.options | {"lengths": None if c.options["lengths"] is None else c.options["lengths"][0]})
    _, residuals = lsh_forward(c.x, c.v, c.buckets, **c.options)
    expected = laws.gradient(definition(c), (c.x, c.v), (c.dout,))
    for name, y, right, bound in zip(("dx", "dv"), lsh_backward(c.dout, residuals), expected, budget(c)[1:], strict=True):
        assert_within(y, right, 2 * bound, name)


@given(cases(lengths=True), st.integers(0, 2**32 - 1))
def test_what_is_behind_a_length_is_never_looked_at(c, seed):
    """NaN in padding changes no bit, and gives zeros."""
    behind = np.arange(c.x.shape[-2]) >= c.options["lengths"][..., None]
    spoiled = [np.where(behind[..., None], np.nan, y) for y in (c.x, c.v, c.dout)]
    results = []
    for x, v, dout in ((c.x, c.v, c.dout), spoiled):
        out, residuals = lsh_forward(x, v, c.buckets, **c.options)
        results.append([out, *lsh_backward(dout, residuals)])
    laws.law_equal_bits({"clean": results[0], "spoiled": results[1]})
    assert not any(y[behind].any() for y in results[1])


@given(cases(lengths=False), st.integers(0, 24))
def test_with_the_same_buckets_the_future_never_reaches_the_past(c, at):
    c = c._replace(options=c.options | {"causal": True})
    x, v = c.x.copy(), c.v.copy()
    x[..., at:, :] *= -2
    v[..., at:, :] += 1
    one, two = (lsh_forward(a, b, c.buckets, **c.options)[0] for a, b in ((c.x, c.v), (x, v)))
    assert np.array_equal(one[..., :at, :], two[..., :at, :])


@given(cases())
def test_strides_and_the_order_of_heads_do_not_matter_and_inputs_stay_untouched(c):
    rng = np.random.default_rng(0)
    c = c._replace(options=c.options | {"lengths": None})
    arrays = [strided(y, rng) for y in (c.x, c.v, c.dout)]
    out, residuals = lsh_forward(c.x, c.v, c.buckets, **c.options)
    other, other_residuals = lsh_forward(*arrays[:2], c.buckets, **c.options)
    laws.law_equal_bits({"contiguous": [out, *lsh_backward(c.dout, residuals)], "strided": [other, *lsh_backward(arrays[2], other_residuals)]})
    if c.x.ndim > 2:
        laws.law_equal_bits({"before": [out[::-1]], "after": [lsh_forward(c.x[::-1], c.v[::-1], c.buckets[::-1], **c.options)[0]]})


def test_alone_a_position_looks_at_itself_and_else_never(rng):
    x, v = rng.standard_normal((4, 2)), rng.standard_normal((4, 3))
    out, residuals = lsh_forward(x, v, np.array([[0, 1, 0, 2]]), scale=5.0)
    assert np.array_equal(out[[0, 1, 3]], v[[0, 1, 3]]) and np.array_equal(out[2], v[0])
    dx, dv = lsh_backward(np.ones((4, 3)), residuals)
    assert np.array_equal(dv, [[2] * 3, [1] * 3, [0] * 3, [1] * 3]) and not dx.any()


def test_a_pair_that_meets_in_many_rounds_counts_once(rng):
    """Equal scores: the mean over those seen, whatever the rounds."""
    x, v = rng.standard_normal((6, 2)), np.arange(6.0)[:, None]
    one = np.array([[0, 0, 0, 0, 1, 1]])
    rounds = np.concatenate([one, one, one, np.array([[0, 1, 1, 1, 1, 0]])])
    out, _ = lsh_forward(x, v, rounds, scale=0.0)
    np.testing.assert_allclose(out[:, 0], [0, 0, 0.5, 1, 2, 2], rtol=1e-15)                    # sets ∅, 0, 01, 012, 123, 04


def test_buckets_are_those_of_the_nearest_direction(rng):
    rotations = lsh_rotations(rng, 3, 4, 6)
    x = rng.standard_normal((5, 7, 4))
    buckets = lsh_buckets(x, rotations)
    assert buckets.shape == (5, 3, 7) and np.array_equal(buckets, lsh_buckets(7 * x, rotations))
    for b, r, i in np.ndindex(buckets.shape):
        directions = np.concatenate([rotations[r], -rotations[r]], axis=1)
        assert (x[b, i] @ directions).argmax() == buckets[b, r, i]


def test_extreme_scores_stay_finite(rng):
    x = rng.standard_normal((2, 20, 3)).astype(np.float32) * np.float32(1e4)
    x[0, 3] = 0
    v = rng.standard_normal((2, 20, 2)).astype(np.float32)
    buckets = lsh_buckets(x, lsh_rotations(rng, 3, 3, 2))
    out, residuals = lsh_forward(x, v, buckets, scale=1.0, chunk=4)
    assert all(np.isfinite(y).all() for y in (out, *lsh_backward(v, residuals)))


@pytest.mark.parametrize("call, words", [
    (lambda x, v: lsh_forward(x, v[:2], np.zeros((1, 4), int)), r"v: expected \(..., N, M\) = \(4, \*\), got \(2, 3\)"),
    (lambda x, v: lsh_forward(x, v, np.zeros((1, 5), int)), r"buckets: expected \(..., R, N\) = \(\*, 4\), got \(1, 5\)"),
    (lambda x, v: lsh_forward(x, v, np.zeros((0, 4), int)), r"buckets: expected"),
    (lambda x, v: lsh_forward(x, v, np.zeros((1, 4), int), chunk=0), "chunk: expected an integer ≥ 1, got 0"),
    (lambda x, v: lsh_rotations(np.random.default_rng(0), 1, 2, 3), "buckets: expected an even number, got 3"),
])
def test_bad_arguments_are_explained(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.zeros((4, 2)), np.zeros((4, 3)))
