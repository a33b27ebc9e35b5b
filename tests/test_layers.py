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
from refattn.lsh import lsh_backward, lsh_buckets, lsh_forward, lsh_rotations
from refattn.testing.budgets import assert_within, gamma, rounding, unit_roundoff

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


# --- attention ---------------------------------------------------------------------------------------------------------------------------

PARTS = [f"a.{part}.{kind}" for part in ("query", "key", "value", "out") for kind in ("weight", "bias")]
kinds = st.sampled_from(["linear", "softmax"])


def attention_params(rng, E, dtype):
    return {key: draw(rng, (E, E) if key.endswith("weight") else (E,), dtype) for key in PARTS}


def attention_oracle(x, *params, heads, attention, causal, lengths):
    """Position by position and head by head, as eq. 2, 5 and 9 are printed; only real positions are looked at."""
    wq, bq, wk, bk, wv, bv, wo, bo = params
    out = np.zeros_like(x)
    for b, n in enumerate(lengths):
        q, k, v = (np.einsum("ne,ef->nf", x[b, :n], w) + bias for w, bias in ((wq, bq), (wk, bk), (wv, bv)))
        mixed = np.zeros_like(q)
        D = x.shape[-1] // heads
        for h in range(heads):
            own = slice(h * D, h * D + D)
            for i in range(n):
                keys = range(i + 1 if causal else n)
                if attention == "linear":
                    phi = lambda a: np.where(a.real > 0, a + 1, np.exp(np.where(a.real > 0, 0, a)))
                    weights = [(phi(q[i, own]) * phi(k[j, own])).sum() for j in keys]
                    total = sum(weights) + 1e-6
                else:
                    weights = [np.exp((q[i, own] * k[j, own]).sum() / np.sqrt(D)) for j in keys]
                    total = sum(weights)
                mixed[i, own] = sum(w * v[j, own] for w, j in zip(weights, keys, strict=True)) / total
        out[b, :n] = np.einsum("ne,ef->nf", mixed, wo) + bo
    return out


def attention_budget(x, params, dout, heads, attention, causal, lengths):
    """Balls of out, dx and the gradients: the masked form and its transpose, one sequence at a time."""
    wq, bq, wk, bk, wv, bv, wo, bo = (ball(p) for p in params)
    T = lambda a: a.map(lambda m: m.swapaxes(-1, -2))
    D = x.shape[-1] // heads
    split = lambda a: a.map(lambda m: m.reshape(-1, heads, D).swapaxes(0, 1))
    merge = lambda a: a.map(lambda m: m.swapaxes(0, 1).reshape(m.shape[1], heads * D))
    outs, totals = [np.zeros(x.shape), np.zeros(x.shape)], [np.zeros(p.shape) for p in params]
    for b, n in enumerate(lengths):
        if n == 0:
            continue
        X, dO = ball(x[b, :n]), ball(dout[b, :n])
        q, k, v = split(X @ wq + bq), split(X @ wk + bk), split(X @ wv + bv)
        see = Ball(np.tri(n) if causal else np.ones((n, n)), 0.0, X.u)
        if attention == "linear":
            phi = lambda a: Ball(np.where(a.v > 0, a.v + 1, np.exp(np.minimum(a.v, 0))), a.e * 2 + 8 * a.u * (a.size() + 1), a.u)
            slope = lambda a: Ball(np.where(a.v > 0, 1, np.exp(np.minimum(a.v, 0))), (a.e + 8 * a.u) * 3, a.u)
            fq, fk = phi(q), phi(k)
            A = (fq @ T(fk)) * see
            den = A.sum(-1) + 1e-6
        else:
            scale = Ball(1 / np.sqrt(REAL(D)), X.u, X.u)
            S = (q * scale) @ T(k)
            A = (S - Ball(np.where(see.v > 0, S.v, -np.inf).max(-1, keepdims=True), 0.0, X.u)).exp() * see
            den = A.sum(-1)
        mixed = (A @ v) / den
        outs[0][b, :n] = (merge(mixed) @ wo + bo).e
        dmixed = split(dO @ T(wo))
        dnum, dden = dmixed / den, -((dmixed * mixed).sum(-1) / den)
        dA = (dnum @ T(v) + dden) * see
        dv = T(A) @ dnum
        if attention == "linear":
            dq, dk = (dA @ fk) * slope(q), (T(dA) @ fq) * slope(k)
        else:
            dS = dA * A
            dq, dk = (dS @ k) * scale, (T(dS) @ q) * scale
        dq, dk, dv = merge(dq), merge(dk), merge(dv)
        outs[1][b, :n] = (dq @ T(wq) + dk @ T(wk) + dv @ T(wv)).e
        for i, g in enumerate((dq, dk, dv)):
            totals[2 * i] += (T(X) @ g).e
            totals[2 * i + 1] += g.sum(0).e[0]
        totals[6] += (T(merge(mixed)) @ dO).e
        totals[7] += dO.sum(0).e[0]
        for i, g in enumerate((dq, dk, dv, dO)):            # adding the sequences up: two more roundings of each term
            left = X if i < 3 else merge(mixed)
            totals[2 * i] += gamma(len(lengths) + 1, "float32" if X.u > 2.0**-50 else "float64") * (T(left).size() @ g.size())
            totals[2 * i + 1] += gamma(len(lengths) + 1, "float32" if X.u > 2.0**-50 else "float64") * g.size().sum(0)
    return [*outs, *totals]


@given(seeds, st.sampled_from([np.dtype("f8"), np.dtype("f4")]), kinds, st.booleans(), st.sampled_from([(3, 1), (4, 2), (6, 3)]),
       st.integers(0, 4), st.booleans())
def test_attention_is_its_equation_and_its_backward_the_transpose(seed, dtype, attention, causal, width, N, padded):
    (E, heads), rng = width, np.random.default_rng(seed)
    params = attention_params(rng, E, dtype)
    x, dout = draw(rng, (2, N, E), dtype), draw(rng, (2, N, E), dtype)
    lengths = rng.integers(0, N + 1, 2) if padded else None
    options = {"heads": heads, "attention": attention, "causal": causal}
    with Untouched(x, dout, *params.values()):
        out, residuals = layers.attention_forward(params, "a", x, lengths=lengths, **options)
        dx, grads = layers.attention_backward(dout, residuals)
    n = lengths if padded else [N, N]
    args = (x, *params.values())
    oracle = lambda *args: attention_oracle(*args, lengths=n, **options)
    real = (np.arange(N) < np.asarray(n)[:, None])[..., None]
    expected = [oracle(*(a.astype(REAL) for a in args)), *gradients(oracle, args, np.where(real, dout, 0))]
    budgets = attention_budget(x, tuple(params.values()), dout, lengths=n, **options)
    assert list(grads) and sorted(grads) == sorted(PARTS)
    for actual, value, bound, what in zip((out, dx, *(grads[key] for key in PARTS)), expected, budgets, ("out", "dx", *PARTS), strict=True):
        assert actual.dtype == dtype
        within(actual, value, Ball(bound, bound, unit_roundoff(dtype)), what)


@given(seeds, kinds | st.just("lsh-2"), st.booleans(), st.sampled_from([np.nan, np.inf, 1e30]))
def test_padding_changes_nothing(seed, attention, causal, garbage):
    rng, B, N, E = np.random.default_rng(seed), 3, 5, 4
    params, lengths = attention_params(rng, E, "f8"), rng.integers(0, N + 1, B)
    x, dout = draw(rng, (B, N, E), "f8", "plain"), draw(rng, (B, N, E), "f8", "plain")
    padding = np.arange(N) >= lengths[:, None]
    dirty_x, dirty_dout = x.copy(), dout.copy()
    dirty_x[padding] = dirty_dout[padding] = garbage
    results = []
    for a, d in ((x, dout), (dirty_x, dirty_dout)):
        out, residuals = layers.attention_forward(params, "a", a, heads=2, attention=attention, causal=causal, lengths=lengths,
                                                  rng=np.random.default_rng(1))
        dx, grads = layers.attention_backward(d, residuals)
        results.append([out, dx, *grads.values()])
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(dirty, clean)
    assert not results[1][0][padding].any() and not results[1][1][padding].any()


@given(seeds, st.sampled_from([np.dtype("f8"), np.dtype("f4")]), kinds, st.integers(1, 6), st.integers(0, 6))
def test_the_steps_and_the_prefill_are_the_causal_form(seed, dtype, attention, N, at):
    rng, E, at = np.random.default_rng(seed), 6, min(at, N)
    params, x = attention_params(rng, E, dtype), draw(rng, (2, N, E), dtype)
    options = {"heads": 3, "attention": attention}
    bound = attention_budget(x, tuple(params.values()), x, causal=True, lengths=[N, N], **options)[0]
    expected = attention_oracle(*(a.astype(REAL) for a in (x, *params.values())), causal=True, lengths=[N, N], **options)
    out, state = layers.attention_prefill(params, "a", x[:, :at], **options)
    within(out, expected[:, :at], Ball(bound[:, :at], bound[:, :at], unit_roundoff(dtype)), "prefill")
    first = layers.attention_init((2,), E, dtype, **options)
    for start, begin in ((state, at), (first, 0), (None, 0)):
        state = start
        for i in range(begin, N):
            kept = [np.copy(a) for a in state if isinstance(a, np.ndarray)] if state is not None else []
            out_t, after = layers.attention_step(params, "a", x[:, i], state, **options)
            for a, b in zip([a for a in state or () if isinstance(a, np.ndarray)], kept, strict=True):
                np.testing.assert_array_equal(a, b)
            within(out_t, expected[:, i], Ball(bound[:, i], bound[:, i], unit_roundoff(dtype)), f"step {i}")
            state = after


def test_half_precision_attention_is_that_of_single_up_to_its_rounding(rng):
    """Every layer rounds once on its way out, so the error is a few units of the narrow dtype; here all numbers are at most 4."""
    for dtype in (DTYPES["float16"], DTYPES["bfloat16"]):
        params = {key: (p / 2).astype(dtype) for key, p in attention_params(rng, 4, "f8").items()}
        x = rng.uniform(-1, 1, (2, 5, 4)).astype(dtype)
        for attention in ("linear", "softmax"):
            out, residuals = layers.attention_forward(params, "a", x, heads=2, attention=attention, causal=True)
            dx, grads = layers.attention_backward(out, residuals)
            assert out.dtype == dx.dtype == dtype and {g.dtype for g in grads.values()} == {dtype}
            wide, _ = layers.attention_forward({key: p.astype("f4") for key, p in params.items()}, "a", x.astype("f4"), heads=2,
                                               attention=attention, causal=True)
            assert np.abs(out.astype("f4") - wide).max() <= 64 * unit_roundoff(dtype)


@given(seeds, dtypes, st.integers(1, 3), st.booleans(), st.sampled_from([0, 1, 5, 40]), st.booleans())
def test_lsh_attention_is_its_parts_one_by_one(seed, dtype, rounds, causal, N, padded):
    """Bit for bit: the parts have their own laws. Its query is the key too; padding is sorted last."""
    rng, H, D = np.random.default_rng(seed), 2, 3
    params = {key: draw(rng, (6, 6) if key.endswith("weight") else (6,), dtype, "plain") for key in PARTS if ".key." not in key}
    x, dout = draw(rng, (2, N, 6), dtype, "plain"), draw(rng, (2, N, 6), dtype, "plain")        # sums depend on strides to the last bit
    lengths = rng.integers(0, N + 1, 2) if padded else None
    real = (np.arange(N) < (lengths if padded else np.array([N, N]))[:, None])[..., None]
    with Untouched(x, dout, *params.values()):
        out, residuals = layers.attention_forward(params, "a", x, heads=H, attention=f"lsh-{rounds}", causal=causal, lengths=lengths,
                                                  rng=np.random.default_rng(seed))
        dx, grads = layers.attention_backward(dout, residuals)
    heads = lambda a: a.reshape(2, N, H, D).swapaxes(1, 2)
    both = np.concatenate([params["a.query.weight"], params["a.value.weight"]], 1), np.concatenate([params["a.query.bias"], params["a.value.bias"]])
    projected, r_in = layers.affine_forward(np.where(real, x, np.zeros((), dtype)), *both)
    turns = lsh_rotations(np.random.default_rng(seed), rounds, D, 64).astype(np.promote_types(dtype, np.float32))
    q, v = heads(projected[..., :6]), heads(projected[..., 6:])
    buckets = np.where(real[:, None, None, :, 0], lsh_buckets(q, turns), 64)
    mixed, r_lsh = lsh_forward(q, v, buckets, causal=causal, chunk=32, lengths=real.sum((1, 2))[:, None].repeat(H, 1))
    expected, r_out = layers.affine_forward(mixed.swapaxes(1, 2).reshape(2, N, 6), params["a.out.weight"], params["a.out.bias"])
    np.testing.assert_array_equal(out, np.where(real, expected, np.zeros((), dtype)))
    dmerged, dw, db = layers.affine_backward(np.where(real, dout, np.zeros((), dtype)), r_out)
    dq, dv = (d.swapaxes(1, 2).reshape(2, N, 6) for d in lsh_backward(heads(dmerged), r_lsh))
    right_dx, right_dw, right_db = layers.affine_backward(np.concatenate([dq, dv], -1), r_in)
    right = [right_dx, right_dw[:, :6], right_db[:6], right_dw[:, 6:], right_db[6:], dw, db]
    for actual, value in zip((dx, *(grads[key] for key in params)), right, strict=True):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, value)
    assert grads.keys() == params.keys()


# --- words -------------------------------------------------------------------------------------------------------------------------------

ones = np.ones
PARAMS = {key: ones((4, 4) if key.endswith("weight") else 4) for key in PARTS}


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
    (lambda: layers.attention_forward(PARAMS, "a", ones((3, 4)), heads=3), ValueError, "heads: expected a divisor of E = 4, got 3"),
    (lambda: layers.attention_forward(PARAMS, "a", ones((3, 4)), heads=2, attention="lsh"),
     ValueError, "attention: expected 'linear', 'softmax' or 'lsh-R' with R ≥ 1 rounds, as in 'lsh-4', got 'lsh'"),
    (lambda: layers.attention_forward(PARAMS, "a", ones((3, 4)), heads=2, attention="lsh-1"),
     ValueError, "rng: expected a numpy.random.Generator, got None; attention 'lsh-1' draws its rotations from it"),
    *((lambda call=call: call(heads=2, attention="lsh-1"), ValueError, "attention: expected 'linear' or 'softmax', got 'lsh-1', which sorts")
      for call in (lambda **o: layers.attention_prefill(PARAMS, "a", ones((3, 4)), **o), lambda **o: layers.attention_init((), 4, **o),
                   lambda **o: layers.attention_step(PARAMS, "a", ones(4), **o))),
    (lambda: layers.attention_forward(PARAMS, "a", ones((2, 3, 4)), heads=2, lengths=np.array([1, 4])),
     ValueError, "lengths: expected 0 ≤ length ≤ N = 3"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
