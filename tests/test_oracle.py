"""The definitions against one another: the paper's equalities, exactly, on rationals and integers."""
from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import oracle
from refattn.testing import budgets, laws
from refattn.testing.strategies import cases


def identity(x):
    return x.copy()


@pytest.fixture
def rational(rng):
    def draw(*shape):
        return np.vectorize(lambda a, b: Fraction(int(a), int(b)), otypes=[object])(rng.integers(1, 10, shape), rng.integers(1, 10, shape))
    return draw


def test_eq4_is_eq5_and_eq8_is_eq12_on_rationals(rational):
    """Eq. (4) and (5), (8) and (12)."""
    q, k, v = rational(2, 4, 5, 3), rational(2, 2, 5, 3), rational(2, 2, 5, 4)
    quadratic = oracle.linear_attention(q, k, v, phi=identity, eps=0)
    for at in np.ndindex(2, 4):
        kv = (at[0], at[1] // 2)
        assert (quadratic[at] == oracle.eq5(q[at], k[kv], v[kv], 0)).all()
    causal = oracle.linear_attention(q, k, v, phi=identity, causal=True, eps=0)
    assert (causal == oracle.causal_linear_attention(q, k, v, phi=identity, eps=0)[0]).all()


def test_eq9_is_eq10_read_by_its_queries(rational):
    q, k, v, S = rational(5, 3), rational(5, 3), rational(5, 4), rational(3, 4)
    out = oracle.eq9(q, k, v, S)
    for i in range(5):
        assert (out[i] == q[i] @ oracle.eq10(k[: i + 1], v[: i + 1], S)).all()


def test_eq7_is_elu_plus_one():
    x = np.array([-1000.0, -1.0, 0.0, 0.5, 1000.0])
    assert oracle.eq7(x).tolist() == [0.0, np.exp(-1.0), 1.0, 1.5, 1001.0]


@given(cases(longest=6), st.integers(0, 2**32 - 1))
def test_eq13_to_15_are_the_derivative_of_eq9(c, seed):
    """Eq. (13) to (15)."""
    b = budgets.recurrence_budget(c.q, c.k, c.v, c.state, c.dout, c.dstate)
    laws.law_backward_is_the_transpose(oracle.recurrence, (c.q, c.k, c.v, c.state),
                                       oracle.recurrence_gradients(c.q, c.k, c.v, c.state, c.dout, c.dstate), (b.dq, b.dk, b.dv, b.dS),
                                       (c.dout, c.dstate), np.random.default_rng(seed))


def test_eq2_by_hand():
    """Two keys with scores 0 and log 3: weights 1/4 and 3/4."""
    q, k, v = np.array([[1.0], [1.0]]), np.array([[0.0], [np.log(3.0)]]), np.array([[4.0], [8.0]])
    full, causal = (oracle.softmax_attention(q, k, v, causal=causal) for causal in (False, True))
    u = budgets.gamma(8, np.float64) * 8
    assert abs(full - 7.0).max() <= u and abs(causal - [[4.0], [7.0]]).max() <= u
    assert abs(oracle.softmax_attention(q, k, v, scale=0) - 6.0).max() <= u
    assert oracle.softmax_attention(q, k, v, query_lengths=1)[1] == 0
    assert oracle.softmax_attention(q, k, v, key_lengths=1).tolist() == [[4.0], [4.0]]
    assert not oracle.softmax_attention(q, k, v, key_lengths=0).any()


def test_lengths_name_first_leading_axes():
    q = np.ones((2, 4, 3, 1))
    k = v = np.ones((2, 2, 3, 1))
    v = v * np.arange(3.0)[:, None]
    out = oracle.linear_attention(q, k, v, eps=0, query_lengths=[3, 2], key_lengths=[[1, 2], [3, 0]])
    assert out[0, :2].ravel().tolist() == [0.0] * 6 and out[0, 2:].ravel().tolist() == [0.5] * 6
    assert out[1, :2].ravel().tolist() == [1.0, 1.0, 0.0] * 2 and not out[1, 2:].any()


def test_a_causal_query_behind_the_last_key_sees_all_keys():
    q = k = np.ones((4, 1))
    v = np.arange(4.0)[:, None]
    assert oracle.linear_attention(q, k, v, causal=True, eps=0, key_lengths=2).ravel().tolist() == [0.0, 0.5, 0.5, 0.5]


def test_half_precision_is_read_as_it_is_and_computed_in_float64():
    x = np.full((3, 1), 0.1, np.float16)
    out, S = oracle.recurrence(x, x, x)
    assert out.dtype == np.float64 and S[0, 0] == 3 * float(x[0, 0]) ** 2


@pytest.mark.parametrize("n, name", [(1, "float32"), (1000, "float64"), (10, "bfloat16")])
def test_gamma(n, name):
    u = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8}[name]
    assert budgets.gamma(n, name) == n * u / (1 - n * u)
    with pytest.raises(ValueError, match="no bound exists"):
        budgets.gamma(1 / u, name)


def test_the_judge_sees_one_wrong_element_a_nan_and_a_wrong_shape():
    x = np.ones((100, 100))
    y = x.copy()
    y[7, 9] += 1e-9
    budgets.assert_within(x, x, 0)
    with pytest.raises(AssertionError, match=r"dq\[7, 9\]: got 1.000000001, expected 1.0; error 1.000e-09 is 1e\+03 times the bound 1.000e-12"):
        budgets.assert_within(y, x, 1e-12, "dq")
    y[7, 9] = np.nan
    with pytest.raises(AssertionError, match=r"out\[7, 9\]: got nan"):
        budgets.assert_within(y, x, 1e9)
    with pytest.raises(ValueError, match="actual: expected the shape"):
        budgets.worst_ratio(x[:1], x, 1)
    assert budgets.worst_ratio(np.array([np.inf]), np.array([np.inf]), 0) == 0
    with pytest.raises(AssertionError):
        laws.law_equal_bits({"a": [x], "b": [y]})
    with pytest.raises(AssertionError, match="shape"):
        laws.law_equal_bits({"a": [x], "b": [x[1:]]})
