"""Laws of the layers: each is its equation within a derived bound, and each backward is the transpose of its forward.

Expected gradients come from the complex step through oracles that share no code with the layers. Bounds come from `Ball`: a number
together with how far a computation in a given dtype, in any order of summation, may be from it (running error analysis).
"""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import layers
from refattn.testing.budgets import assert_within, rounding, unit_roundoff

REAL, COMPLEX = np.longdouble, np.complex128
H = 1e-200
DTYPES = {"float64": np.dtype(np.float64), "float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
          "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LAYOUTS = ("plain", "fortran", "reversed", "strided", "read-only", "broadcast")

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(list(DTYPES.values()))
leads = st.sampled_from([(), (0,), (1,), (2,), (2, 3), (3, 5)])


class Ball:
    """A value and a bound on the error of any computation of it in a dtype of unit roundoff u. Elementary functions: 4 u."""

    def __init__(self, value, error=0.0, u=0.0):
        self.v = np.asarray(value, REAL)
        self.e = np.broadcast_to(np.asarray(error, np.float64), self.v.shape)
        self.u = u

    def _with(self, value, carried, roundings=1.0):
        size = np.abs(value).astype(np.float64) + carried
        return Ball(value, carried + roundings * self.u / (1 - roundings * self.u) * size + 1e-44, self.u)

    def _other(self, x):
        return x if isinstance(x, Ball) else Ball(x, self.u * abs(x) if np.isscalar(x) else 0.0, self.u)

    def size(self):
        return np.abs(self.v).astype(np.float64) + self.e

    def __add__(self, x):
        x = self._other(x)
        return self._with(self.v + x.v, self.e + x.e)

    def __neg__(self):
        return Ball(-self.v, self.e, self.u)

    def __sub__(self, x):
        return self + -self._other(x)

    def __mul__(self, x):
        x = self._other(x)
        return self._with(self.v * x.v, self.e * x.size() + np.abs(self.v).astype(np.float64) * x.e)

    def __truediv__(self, x):
        x = self._other(x)
        value = self.v / x.v
        return self._with(value, np.asarray((self.e + np.abs(value) * x.e) / (np.abs(x.v) - x.e), np.float64))

    def __matmul__(self, x):
        x = self._other(x)
        n, carried = self.v.shape[-1], self.e @ x.size() + np.abs(self.v).astype(np.float64) @ x.e
        return Ball(self.v @ x.v, carried + n * self.u / (1 - n * self.u) * (self.size() @ x.size()) + 1e-44, self.u)

    def sum(self, axis):
        n = np.prod([self.v.shape[a] for a in np.atleast_1d(axis)])
        big = self.size().sum(axis=axis, keepdims=True)
        error = self.e.sum(axis=axis, keepdims=True) + n * self.u / (1 - n * self.u) * big
        return Ball(self.v.sum(axis=axis, keepdims=True), error, self.u)

    def map(self, f):
        return Ball(f(self.v), f(self.e), self.u)

    def exp(self):
        value = np.exp(self.v)
        return self._with(value, np.asarray(value * np.expm1(self.e), np.float64), 4)

    def tanh(self):
        return self._with(np.tanh(self.v), self.e, 4)

    def sqrt(self):
        value = np.sqrt(self.v)
        return self._with(value, np.asarray(self.e / value, np.float64))

    def to(self, dtype):
        """Rounded on its way out of a layer, where the dtype is narrower than the accumulator."""
        if unit_roundoff(dtype) <= self.u:
            return self
        return Ball(self.v, self.e + rounding(self.size(), dtype), self.u)


def ball(x):
    return Ball(x.astype(REAL), 0.0, max(2.0**-53, min(unit_roundoff(x.dtype), 2.0**-24)))


def within(actual, expected, bound, what):
    """`expected` in longdouble, or in float64 from the complex step. A float64 oracle has an error of the same kind as float64 results
    have, and complex arithmetic rounds up to four times where real arithmetic rounds once."""
    own = 1 if expected.dtype == REAL and np.finfo(REAL).eps < np.finfo(np.float64).eps else 5
    expected = expected.astype(np.float64)
    assert_within(actual, expected, np.asarray(bound.e) * (own if bound.u <= 2.0**-53 else 1) + own * rounding(expected, np.float64), what)


def draw(rng, shape, dtype, layout=None, scale=1.0):
    """Random numbers in one of the layouts that callers have; the layout is drawn too if None."""
    layout = layout or rng.choice(LAYOUTS)
    x = np.asarray(scale * rng.standard_normal(shape)).astype(dtype)
    if layout == "fortran":
        return x.copy(order="F")
    if layout == "reversed" and x.ndim:
        return x[..., ::-1]
    if layout == "strided" and x.ndim:
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if layout == "broadcast" and x.ndim and x.shape[0]:
        return np.broadcast_to(x[:1], x.shape)
    if layout == "read-only":
        x.flags.writeable = False
    return x


def gradients(f, args, dout):
    """The gradient of Σ dout · f(*args) with respect to every element of every argument, by the complex step: no cancellation."""
    args = [a.astype(COMPLEX) for a in args]
    dout, results = dout.astype(np.float64), []
    for i, a in enumerate(args):
        g = np.zeros(a.shape)
        for at in np.ndindex(a.shape):
            moved = a.copy()
            moved[at] += 1j * H
            g[at] = (dout * f(*args[:i], moved, *args[i + 1:]).imag / H).sum()
        results.append(g)
    return results


class Untouched:
    """Inputs are the same bytes after as before."""

    def __init__(self, *arrays):
        self.arrays, self.before = arrays, [x.tobytes() for x in arrays]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        assert error[0] is not None or [x.tobytes() for x in self.arrays] == self.before


# --- affine ------------------------------------------------------------------------------------------------------------------------------

@given(seeds, dtypes, leads, st.integers(1, 5), st.integers(1, 7))
def test_affine_is_its_equation_and_its_backward_the_transpose(seed, dtype, lead, E, F):
    rng = np.random.default_rng(seed)
    x, W, b, dout = draw(rng, (*lead, E), dtype), draw(rng, (E, F), dtype), draw(rng, (F,), dtype), draw(rng, (*lead, F), dtype)
    with Untouched(x, W, b, dout):
        out, residuals = layers.affine_forward(x, W, b)
        grads = layers.affine_backward(dout, residuals)
    assert out.dtype == dtype and [(g.shape, g.dtype) for g in grads] == [(a.shape, dtype) for a in (x, W, b)]
    X, D = ball(x.reshape(-1, E) if x.size else x.reshape(0, E)), ball(dout.reshape(-1, F) if dout.size else dout.reshape(0, F))
    budget = (X @ ball(W) + ball(b)).to(dtype)
    oracle = lambda x, W, b: np.einsum("...e,ef->...f", x, W) + b
    within(out, oracle(*(a.astype(REAL) for a in (x, W, b))), budget.map(lambda a: a.reshape(out.shape)), "out")
    budgets = [(D @ ball(W).map(np.transpose)).to(dtype).map(lambda a: a.reshape(x.shape)), (X.map(np.transpose) @ D).to(dtype),
               D.sum(0).to(dtype).map(lambda a: a[0])]
    for g, expected, budget, what in zip(grads, gradients(oracle, (x, W, b), dout), budgets, ("dx", "dweight", "dbias"), strict=True):
        within(g, expected, budget, what)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 2048, 9001])
def test_blocks_of_rows_change_nothing(rng, dtype, rows):
    """Small integers: every order of summation gives the same bits."""
    x, W, b, dout = (rng.integers(-1, 2, shape).astype(dtype) for shape in ((rows, 24), (24, 40), (40,), (rows, 40)))
    i, j, k, d = (a.astype(np.int64) for a in (x, W, b, dout))
    out, residuals = layers.affine_forward(x, W, b)
    for actual, expected in zip((out, *layers.affine_backward(dout, residuals)), (i @ j + k, d @ j.T, i.T @ d, d.sum(0)), strict=True):
        np.testing.assert_array_equal(actual, expected.astype(dtype))


# --- layer norm --------------------------------------------------------------------------------------------------------------------------

def layer_norm_oracle(x, w, b, eps=1e-5):
    centred = x - x.sum(-1, keepdims=True) / x.shape[-1]
    return centred / np.sqrt((centred**2).sum(-1, keepdims=True) / x.shape[-1] + eps) * w + b


def layer_norm_budget(x, w, b, dout, eps=1e-5):
    X, W, E = ball(x), ball(w), x.shape[-1]
    centred = X - X.sum(-1) / E
    rate = Ball(1.0, 0.0, X.u) / ((centred * centred).sum(-1) / E + eps).sqrt()
    normal = centred * rate
    D, lead = ball(dout), tuple(range(x.ndim - 1))
    dnormal = D * W
    dx = (dnormal - dnormal.sum(-1) / E - normal * ((dnormal * normal).sum(-1) / E)) * rate
    total = lambda g: (g.sum(lead) if lead else g).map(lambda a: a.reshape(E)).to(x.dtype)
    return [(normal * W + ball(b)).to(x.dtype), dx.to(x.dtype), total(D * normal), total(D)]


@given(seeds, dtypes, leads, st.integers(1, 6))
def test_layer_norm_is_its_equation_and_its_backward_the_transpose(seed, dtype, lead, E):
    rng = np.random.default_rng(seed)
    x, w, b, dout = draw(rng, (*lead, E), dtype, scale=3), draw(rng, (E,), dtype), draw(rng, (E,), dtype), draw(rng, (*lead, E), dtype)
    with Untouched(x, w, b, dout):
        out, residuals = layers.layer_norm_forward(x, w, b)
        grads = layers.layer_norm_backward(dout, residuals)
    assert out.dtype == dtype and [(g.shape, g.dtype) for g in grads] == [(a.shape, dtype) for a in (x, w, b)]
    expected = [layer_norm_oracle(*(a.astype(REAL) for a in (x, w, b))), *gradients(layer_norm_oracle, (x, w, b), dout)]
    budgets = layer_norm_budget(x, w, b, dout)
    for actual, value, budget, what in zip((out, *grads), expected, budgets, ("out", "dx", "dw", "db"), strict=True):
        within(actual, value, budget, what)


@pytest.mark.parametrize("rows", [700, 2000])
def test_layer_norm_of_many_rows_is_that_of_each_row(rng, rows):
    x, w, b, dout = draw(rng, (rows, 24), "f4", "plain"), draw(rng, (24,), "f4"), draw(rng, (24,), "f4"), draw(rng, (rows, 24), "f4")
    out, residuals = layers.layer_norm_forward(x, w, b)
    grads = layers.layer_norm_backward(dout, residuals)
    X, D = x.astype(REAL), dout.astype(REAL)
    budgets = layer_norm_budget(x, w, b, dout)
    centred = X - X.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    for actual, value, budget in zip((out, grads[1], grads[2]), (layer_norm_oracle(X, w, b), (D * normal).sum(0), D.sum(0)),
                                     (budgets[0], *budgets[2:]), strict=True):
        within(actual, value, budget, "many rows")
    for at in (0, rows // 2, rows - 1):
        one = layers.layer_norm_backward(dout[at:at + 1], layers.layer_norm_forward(x[at:at + 1], w, b)[1])[0]
        within(grads[0][at:at + 1], one.astype(REAL), Ball(one, 2 * budgets[1].e[at:at + 1], 0), "dx")


# --- embedding and positions: exact ------------------------------------------------------------------------------------------------------

@given(seeds, dtypes, leads, st.integers(1, 9), st.integers(1, 4))
def test_embedding_takes_rows_and_its_backward_adds_them_up(seed, dtype, lead, V, E):
    rng = np.random.default_rng(seed)
    W, tokens, dout = draw(rng, (V, E), dtype), rng.integers(0, V, lead), rng.integers(-3, 4, (*lead, E)).astype(dtype)
    out, residuals = layers.embedding_forward(tokens, W)
    dW = layers.embedding_backward(dout, residuals)
    expected = np.zeros((V, E))
    for at in np.ndindex(*lead):
        np.testing.assert_array_equal(out[at], W[tokens[at]])
        expected[tokens[at]] += dout[at].astype(np.float64)
    assert out.dtype == dW.dtype == dtype and dW.shape == W.shape
    np.testing.assert_array_equal(dW, expected.astype(dtype))


@given(seeds, dtypes, st.sampled_from([(), (2,), (2, 3), (0,)]), st.integers(0, 4), st.integers(0, 3), st.integers(1, 4))
def test_positions_are_added_and_their_backward_adds_over_the_batch(seed, dtype, lead, N, start, E):
    rng = np.random.default_rng(seed)
    x, P, dout = (rng.integers(-9, 9, shape).astype(dtype) for shape in ((*lead, N, E), (start + N + 2, E), (*lead, N, E)))
    out, residuals = layers.positions_forward(x, P, start=start)
    dx, dP = layers.positions_backward(dout, residuals)
    np.testing.assert_array_equal(out, x + P[start:start + N])
    np.testing.assert_array_equal(dx, dout)
    expected = np.zeros(P.shape)
    expected[start:start + N] = dout.astype(np.float64).reshape(-1, N, E).sum(0) if dout.size else 0
    np.testing.assert_array_equal(dP, expected.astype(dtype))
    assert not np.shares_memory(dx, dout) and dP.dtype == dtype


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_sinusoidal_positions_are_their_definition_and_go_on(width):
    expected = [[(np.cos if c % 2 else np.sin)(p / 10000 ** ((c - c % 2) / width)) for c in range(width)] for p in range(7)]
    np.testing.assert_array_equal(layers.sinusoidal_positions(7, width, np.float64), expected)
    np.testing.assert_array_equal(layers.sinusoidal_positions(4, width, start=3), np.float32(expected)[3:])
    assert layers.sinusoidal_positions(0, width).shape == (0, width)


# --- gelu and relu -----------------------------------------------------------------------------------------------------------------------

def gelu_oracle(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / x.real.dtype.type(np.pi)) * (x + 0.044715 * x**3)))


def gelu_budget(x):
    """(y, slope) as Balls."""
    c = float(np.sqrt(2 / np.pi))
    t = ((x * x * (c * 0.044715) + c) * x).tanh()
    half = (t + 1.0) * 0.5
    return half * x, ((x * x * (3 * c * 0.044715) + c) * x * (-t + 1.0) + 1.0) * half


@given(seeds, dtypes, leads, st.sampled_from([1e-3, 1.0, 4.0]))
def test_gelu_is_its_equation_and_its_backward_the_transpose(seed, dtype, lead, scale):
    rng = np.random.default_rng(seed)
    x, dout = draw(rng, lead, dtype, scale=scale), draw(rng, lead, dtype)
    with Untouched(x, dout):
        out, residuals = layers.gelu_forward(x)
        dx = layers.gelu_backward(dout, residuals)
    assert out.dtype == dx.dtype == dtype and out.shape == dx.shape == x.shape
    y, slope = gelu_budget(ball(x))
    within(out, gelu_oracle(x.astype(REAL)), y.to(dtype), "out")
    expected = dout.astype(np.float64) * (gelu_oracle(x.astype(COMPLEX) + 1j * H).imag / H)
    within(dx, expected, (slope.to(dtype) * ball(dout)).to(dtype), "dx")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_gelu_of_large_numbers_is_them_or_zero(dtype):
    x = np.array([-6e4, -1e4, -200.0, -50.0, 50.0, 200.0, 1e4, 6e4]).astype(dtype)
    out, residuals = layers.gelu_forward(x)
    np.testing.assert_array_equal(out, np.where(x > 0, x, 0))
    np.testing.assert_array_equal(layers.gelu_backward(np.ones_like(x), residuals), x > 0)


def test_gelu_of_many_numbers_is_that_of_each(rng):
    x = draw(rng, (3, 70001), np.float32, "plain")
    whole, (slope,) = layers.gelu_forward(x)
    for rows in (slice(0, 40), slice(30000, 30040), slice(69961, 70001)):
        some, (some_slope,) = layers.gelu_forward(x[:, rows])
        y, s = gelu_budget(ball(x[:, rows]))
        assert_within(whole[:, rows], some.astype(np.float64), 2 * y.e)
        assert_within(slope[:, rows], some_slope.astype(np.float64), 2 * s.e)


@given(seeds, dtypes, leads)
def test_relu_keeps_the_positive_and_its_backward_lets_nothing_else_pass(seed, dtype, lead):
    rng = np.random.default_rng(seed)
    x, dout = np.asarray(rng.integers(-2, 3, lead)).astype(dtype), draw(rng, lead, dtype).copy()
    dout[x <= 0] = np.nan
    out, residuals = layers.relu_forward(x)
    dx = layers.relu_backward(dout, residuals)
    np.testing.assert_array_equal(out, np.where(x > 0, x, 0))
    np.testing.assert_array_equal(dx, np.where(x > 0, dout, 0))
    assert out.dtype == dx.dtype == dtype


# --- feed-forward ------------------------------------------------------------------------------------------------------------------------

@given(seeds, st.sampled_from([np.dtype("f8"), np.dtype("f4")]), leads, st.sampled_from(["gelu", "relu"]))
def test_feed_forward_is_its_equation_and_its_backward_the_transpose(seed, dtype, lead, activation):
    rng, E, F = np.random.default_rng(seed), 2, 3
    shapes = {"f.in.weight": (E, F), "f.in.bias": (F,), "f.out.weight": (F, E), "f.out.bias": (E,)}
    params = {key: draw(rng, shape, dtype) for key, shape in shapes.items()}
    x, dout = draw(rng, (*lead, E), dtype), draw(rng, (*lead, E), dtype)
    with Untouched(x, dout, *params.values()):
        out, residuals = layers.feed_forward_forward(params, "f", x, activation=activation)
        dx, grads = layers.feed_forward_backward(dout, residuals)
    f = gelu_oracle if activation == "gelu" else lambda a: a * (a.real > 0)

    def oracle(x, a, b, c, d):
        return np.einsum("...f,fe->...e", f(np.einsum("...e,ef->...f", x, a) + b), c) + d

    args = (x, *params.values())
    flat = lambda a: a.reshape(int(np.prod(lead)), E)
    X, D, (A, b, C, d) = ball(flat(x)), ball(flat(dout)), (ball(p) for p in params.values())
    inner = X @ A + b
    y, slope = gelu_budget(inner) if activation == "gelu" else (inner, Ball(inner.v > 0, 0.0, X.u))
    dinner = (D @ C.map(np.transpose)) * slope
    budgets = [(dinner @ A.map(np.transpose)).map(lambda a: a.reshape(x.shape)), X.map(np.transpose) @ dinner,
               dinner.sum(0).map(lambda a: a[0]), y.map(np.transpose) @ D, D.sum(0).map(lambda a: a[0])]
    within(out, oracle(*(a.astype(REAL) for a in args)), (y @ C + d).map(lambda a: a.reshape(x.shape)), "out")
    for actual, expected, budget, what in zip((dx, *(grads[key] for key in shapes)), gradients(oracle, args, dout), budgets,
                                              ("dx", *shapes), strict=True):
        within(actual, expected, budget, what)


# --- words -------------------------------------------------------------------------------------------------------------------------------

ones = np.ones


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: layers.affine_forward(ones((2, 8)), ones((4, 3)), ones(3)),
     ValueError, r"weight: expected \(E, F\) = \(8, \*\), got \(4, 3\)"),
    (lambda: layers.affine_forward(ones((2, 4)), ones((4, 3)), ones(4)), ValueError, r"bias: expected \(F,\) = \(3,\), got \(4,\)"),
    (lambda: layers.affine_forward(ones((2, 4)), ones((4, 3), "f4"), ones(3)), TypeError, "x is float64 and weight is float32"),
    (lambda: layers.affine_forward(ones(()), ones((4, 3)), ones(3)), ValueError, r"x: expected \(\.\.\., E\), got \(\)"),
    (lambda: layers.affine_backward(ones((2, 4)), layers.affine_forward(ones((2, 4)), ones((4, 3)), ones(3))[1]), ValueError,
     r"dout: expected the shape of the output = \(2, 3\), got \(2, 4\)"),
    (lambda: layers.affine_backward(ones((2, 3), "f4"), layers.affine_forward(ones((2, 4)), ones((4, 3)), ones(3))[1]), TypeError,
     "dout is float32 and its output is float64"),
    (lambda: layers.layer_norm_forward(ones((2, 8)), ones(4), ones(8)), ValueError, r"weight: expected \(E,\) = \(8,\), got \(4,\)"),
    (lambda: layers.layer_norm_forward(ones((2, 8)), ones(8), ones(8), eps=-1), ValueError, "eps: expected a finite number ≥ 0, got -1"),
    (lambda: layers.embedding_forward(np.array([1.0]), ones((4, 3))), TypeError, "tokens: expected integers, got float64"),
    (lambda: layers.embedding_forward(np.array([-1, 3]), ones((4, 3))), ValueError, "0 ≤ token < V = 4, got values from -1 to 3"),
    (lambda: layers.embedding_forward(np.array([0, 4]), ones((4, 3))), ValueError, "got values from 0 to 4"),
    (lambda: layers.positions_forward(ones((3, 2)), ones((4, 2)), start=2),
     ValueError, "at most length = 4 positions, got positions up to 5"),
    (lambda: layers.feed_forward_forward({}, "f", ones((3, 2))), ValueError, "params: expected a key 'f.in.weight', found none"),
    (lambda: layers.feed_forward_forward({}, "f", ones((3, 2)), activation="elu"),
     ValueError, "activation: expected 'gelu' or 'relu', got 'elu'"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
