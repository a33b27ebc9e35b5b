"""Decays inside a chunk: products in a tree, the scores that they weaken, the inverse of a unit triangle; each against its equation in loops."""
from __future__ import annotations

import itertools
from fractions import Fraction

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.decay import decays, scores, scores_backward, strictly_lower, unit_lower_inverse
from refattn.testing import laws
from refattn.testing.budgets import assert_within, gamma

sizes = st.sampled_from([1, 2, 4, 8, 16])
seeds = st.integers(0, 2**32 - 1)
each_library = pytest.mark.parametrize("xp", [np, array_api_strict], ids=["NumPy", "strict"])      # their ways through `decay` differ


def product(a, first, last):
    """Π a_s over first ≤ s ≤ last: of rows (C, W)."""
    out = np.ones_like(a[0])
    for s in range(first, last + 1):
        out = out * a[s]
    return out


def between(a):
    """P (C, C, W): Π_{j<s≤t} a_s for j ≤ t, else 0."""
    C = len(a)
    P = np.zeros((C, C, a.shape[-1]), a.dtype)
    for t, j in itertools.product(range(C), repeat=2):
        if j <= t:
            P[t, j] = product(a, j + 1, t)
    return P


def equation(X, K, a, dA, dbX, deK, dwhole):
    """What `scores` and its transpose give for one head, X (G, C, D), K (C, D), decays a (C, W), in loops: A, b ⊙ X, e ⊙ K, Π a; dX, dK, dg.

    dg_s is the sum over all products p that contain a_s of p · dp."""
    (C, D), W = K.shape, a.shape[-1]
    a = np.broadcast_to(a, (C, D))
    P, last = between(a), C - 1
    b, e = (np.stack(x) for x in zip(*((product(a, 0, t), product(a, t + 1, last)) for t in range(C)), strict=True))
    A = np.einsum("gtd,jd,tjd->gtj", X, K, P)
    dX, dK = np.einsum("gtj,jd,tjd->gtd", dA, K, P) + b * dbX, np.einsum("gtj,gtd,tjd->jd", dA, X, P) + e * deK
    dP, db, de = np.einsum("gtj,gtd,jd,tjd->tjd", dA, X, K, P), (b * X * dbX).sum(0), e * K * deK
    dg = np.zeros((C, D))
    for s in range(C):
        dg[s] = dP[s:, :s].sum((0, 1)) + db[s:].sum(0) + de[:s].sum(0) + product(a, 0, last) * dwhole[:, 0]
    return [A, b * X, e * K, product(a, 0, last)[:W, None], dX, dK, dg if W == D else dg.sum(-1, keepdims=True)]


@given(sizes, st.sampled_from([1, 3]), seeds)
def test_products_are_those_of_a_loop(C, W, seed):
    """Powers of two and 0: exact in any order."""
    rng = np.random.default_rng(seed)
    a = rng.choice([0.0, 0.5, 1, 1, 2], (2, 3, C, W))
    p = decays(a, np)
    assert [x.shape for x in (p.before, p.behind, p.whole)] == [(2, 3, C, W), (2, 3, C, W), (2, 3, W, 1)]
    assert [x.shape[-2] for x, _ in p.pairs] == [1 << i for i in range(C.bit_length() - 1)]
    for at in np.ndindex(2, 3):
        P = between(a[at])
        for t in range(C):
            assert (p.before[at][t] == product(a[at], 0, t)).all() and (p.behind[at][t] == product(a[at], t + 1, C - 1)).all()
        assert (p.whole[at][:, 0] == product(a[at], 0, C - 1)).all()
        for before, behind in p.pairs:
            s = before.shape[-2]
            for block, i, j in itertools.product(range(C // (2 * s)), range(s), range(s)):
                t, start = (2 * block + 1) * s + i, 2 * block * s
                assert (before[at][block, i] * behind[at][block, j] == P[t, start + j]).all()


@each_library
@given(sizes, st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.booleans(), seeds)
def test_scores_and_their_transpose_are_the_equations(xp, C, W, G, exact, seed):
    """Keys and decays get the sum over their queries. Integers and decays of 0 and 1 give bits; else each is off by γ times the same sum of
    absolute values: a product of m decays by 2m roundings and m exponentials of two each, sums by 2 (C·G + D)."""
    rng, D = np.random.default_rng(seed), 3
    draw = lambda *shape: rng.integers(-3, 4, shape).astype(float) if exact else rng.standard_normal(shape)
    g = np.where(rng.random((2, 1, 1, C, W)) < 0.3, -np.inf, 0) if exact else -np.exp(rng.uniform(-5, 2, (2, 1, 1, C, W)))
    X, K, dA, dbX, deK, dwhole = (draw(2, *shape) for shape in ((G, 1, C, D), (1, 1, C, D), (G, 1, C, C), (G, 1, C, D), (1, 1, C, D), (1, 1, D, 1)))
    kept = [x.copy() for x in (X, K, g)]
    X_, K_, g_, dA_, *more = (xp.asarray(x.copy()) for x in (X, K, g, dA, dbX, deK, dwhole))
    A, bX, eK, whole = scores(X_, K_, g_, xp)
    dX, dK, dg = scores_backward(dA_, *more, A, X_, K_, g_, xp)
    for x, y in zip(kept, (X_, K_, g_), strict=True):
        assert np.array_equal(x, np.asarray(y))
    for h in range(2):
        one = [x[h] for x in (X[:, :, 0], K[:, 0, 0], np.exp(g)[:, 0, 0], dA[:, :, 0], dbX[:, :, 0], deK[:, 0, 0], dwhole[:, 0, 0])]
        got = [np.asarray(x)[h] for x in (A[:, :, 0, ...], bX[:, :, 0, ...], eK[:, 0, 0, ...], whole[:, 0, 0, ...], dX[:, :, 0, ...],
                                          dK[:, 0, 0, ...], dg[:, 0, 0, ...])]
        bars = equation(*map(np.abs, one))
        for name, x, y, bar in zip(("A", "bX", "eK", "whole", "dX", "dK", "dg"), got, equation(*one), bars, strict=True):
            assert_within(x, y, 0 if exact else gamma(4 * C + 2 * (C * G + D), np.float64) * bar, name)


@each_library
@given(sizes, seeds)
def test_without_decays_scores_are_a_lower_triangle(xp, C, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.integers(-3, 4, shape).astype(float)
    X, K, dA, dbX, deK = draw(2, 2, 1, C, 3), draw(2, 1, 1, C, 3), draw(2, 2, 1, C, C), draw(2, 2, 1, C, 3), draw(2, 1, 1, C, 3)
    low = np.tril(dA)
    X_, K_, dA_, dbX_, deK_ = (xp.asarray(x.copy()) for x in (X, K, dA, dbX, deK))
    A, bX, eK, whole = scores(X_, K_, None, xp)
    dX, dK, dg = scores_backward(dA_, dbX_, deK_, None, A, X_, K_, None, xp)
    laws.law_equal_bits({"triangle": [np.tril(X @ K.mT), X, K, low @ K + dbX, (low.mT @ X).sum(1, keepdims=True) + deK],
                         "scores": [np.asarray(x) for x in (A, bX, eK, dX, dK)]})
    assert whole is None and dg is None


@each_library
@pytest.mark.parametrize("W", [0, 1])
def test_a_hidden_score_that_overflows_does_not_reach_the_past(xp, W):
    X, K = xp.asarray(np.full((1, 1, 1, 2, 2), 1e200)), xp.asarray(np.array([1.0, 1, 1e200, 1e200]).reshape(1, 1, 1, 2, 2))
    with np.errstate(over="ignore", invalid="ignore"):
        A = scores(X, K, xp.asarray(np.full((1, 1, 1, 2, 1), -0.5)) if W else None, xp)[0]
    assert np.isfinite(np.asarray(A)[..., 0, :]).all()


@pytest.mark.parametrize("C", [1, 2, 4, 8, 16])
def test_the_inverse_of_a_unit_triangle_is_exact_on_rationals(C, rng):
    """T (I - L) = (I - L) T = I; what stands on and above L's diagonal is not read."""
    L = np.vectorize(lambda a, b: Fraction(int(a), int(b)), otypes=[object])(rng.integers(-5, 6, (2, C, C)), rng.integers(1, 6, (2, C, C)))
    T, low = unit_lower_inverse(L, np), strictly_lower(L, np)
    one = np.eye(C, dtype=int) + 0 * L
    assert (T - T @ low == one).all() and (T - low @ T == one).all()
    assert all(low[at] == (L[at] if at[2] < at[1] else 0) for at in np.ndindex(2, C, C))


@each_library
@given(sizes, st.sampled_from([0.3, 1.0, 3.0]), seeds)
def test_the_inverse_is_as_exact_as_its_analysis_says(xp, C, size, seed):
    """|δT| ≤ γ G |T| |L| G |T| with G = |T| (I + |L|): see `rules_budget`. Two products of C terms for each block."""
    L = np.tril(size * np.random.default_rng(seed).standard_normal((3, C, C)), -1).astype(np.float32)
    got, exact, T = np.asarray(unit_lower_inverse(xp.asarray(L), xp)), L.astype(np.longdouble), np.zeros((3, C, C), np.longdouble)
    for t in range(C):                                                                         # forward substitution
        T[:, t] = np.eye(C)[t] + (exact[:, t, None, :] @ T)[:, 0]
    G = np.abs(T) @ (np.eye(C) + np.abs(exact))
    assert_within(got, T.astype(float), (gamma(2 * C, np.float32) * (G @ np.abs(T) @ np.abs(exact) @ G @ np.abs(T))).astype(float), "T")
