"""Laws of the LSTM: every element within a derived bound of its equation, and the backward the transpose of the forward.

The oracle is a loop over positions and units on plain numbers; gradients come from the complex step through it. Bounds come from `Ball`.
"""
from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_layers import COMPLEX, DTYPES, REAL, Ball, Untouched, ball, draw, within

from refattn._array import accumulator
from refattn._blocks import FLOPS_WORTH_THREADS
from refattn.lstm import (
    LSTMState,
    bilstm_backward,
    bilstm_forward,
    bilstm_init,
    lstm_backward,
    lstm_forward,
    lstm_init,
    lstm_step,
)
from refattn.testing.budgets import rounding

H_STEP = 1e-200
KEYS = ("in.weight", "in.bias", "hidden.weight")

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(list(DTYPES.values()))


# --- the oracle --------------------------------------------------------------------------------------------------------------------------

def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def oracle(W, b, U, x, h, c):
    """h_t of all positions and the last h and c, lists of numbers; a number may also be an array of as many copies of the problem."""
    E, H = W.shape[-2], U.shape[-2]
    h, c, out = [h[..., u] for u in range(H)], [c[..., u] for u in range(H)], []
    for t in range(x.shape[-2]):
        a = [b[..., j] + sum(x[..., t, e] * W[..., e, j] for e in range(E)) + sum(h[u] * U[..., u, j] for u in range(H)) for j in range(4 * H)]
        c = [sigmoid(a[H + u]) * c[u] + sigmoid(a[u]) * np.tanh(a[3 * H + u]) for u in range(H)]
        h = [sigmoid(a[2 * H + u]) * np.tanh(c[u]) for u in range(H)]
        out.append(h)
    return out, h, c


def oracle_gradients(arrays, dout, dh, dc):
    """Gradients of Σ dout·out + dh·h + dc·c with respect to every element of every array: one copy of the problem for each element."""
    results = []
    for which, array in enumerate(arrays):
        copies = [np.broadcast_to(a.astype(COMPLEX), (array.size, *a.shape)) for a in arrays]
        moved = copies[which].copy()
        moved.reshape(array.size, array.size)[...] += 1j * H_STEP * np.eye(array.size)
        out, h, c = oracle(*copies[:which], moved, *copies[which + 1:])
        terms = [*zip(h, dh, strict=True), *zip(c, dc, strict=True), *(pair for o, d in zip(out, dout, strict=True) for pair in zip(o, d))]
        results.append(sum(np.imag(y) / H_STEP * float(d) for y, d in terms).reshape(array.shape))
    return results


# --- bounds: the same equations on Balls ---------------------------------------------------------------------------------------------------

def stack(balls, shape):
    if not balls:
        return Ball(np.zeros(shape), 0.0, 2.0**-53)
    return Ball(np.stack([one.v for one in balls]), np.stack([one.e for one in balls]), balls[0].u)


def join(balls, axis=0):
    return Ball(np.concatenate([one.v for one in balls], axis), np.concatenate([one.e for one in balls], axis), max(one.u for one in balls))


def part(x, index):
    return x.map(lambda a: a[index])


def ball_forward(weights, x, h, c):
    """(out, h, c, saved) of one sequence x (n, E)."""
    W, b, U = weights
    H, saved = U.v.shape[0], []
    for t in range(x.v.shape[0]):
        a = part(x, t) @ W + b + h @ U
        i, f, o = (Ball(1.0, 0.0, a.u) / ((-part(a, slice(k * H, (k + 1) * H))).exp() + 1.0) for k in range(3))
        g = part(a, slice(3 * H, None)).tanh()
        past, c = (h, c), f * c + i * g
        tanh = c.tanh()
        h = o * tanh
        saved.append((*past, i, f, o, g, tanh, h))
    return stack([s[-1] for s in saved], (0, H)), h, c, saved


def ball_backward(weights, saved, dout, dh, dc):
    """(da, dx, dh, dc) of one sequence."""
    W, _, U = weights
    da = []
    for t in reversed(range(len(saved))):
        _, before, i, f, o, g, tanh, _ = saved[t]
        dh = dh + part(dout, t)
        dc = dc + (-(tanh * tanh) + 1.0) * o * dh
        da.append(join([dc * g * ((-i + 1.0) * i), dc * before * ((-f + 1.0) * f), dh * tanh * ((-o + 1.0) * o), dc * i * (-(g * g) + 1.0)]))
        dc = dc * f
        dh = da[-1] @ U.map(np.transpose)
    da = stack(da[::-1], (0, U.v.shape[1]))
    return da, da @ W.map(np.transpose), dh, dc


def ball_weights(x, saved, da):
    """Budgets of the gradients of W_in, b and W_hidden: one sum over all positions of all sequences, in any order."""
    h = [stack([s[0] for s in one], (0, d.v.shape[1] // 4)) for one, d in zip(saved, da, strict=True)]
    x, h, da = join(x), join(h), join(da)
    return x.map(np.transpose) @ da, part(da.sum(0), 0), h.map(np.transpose) @ da


# --- examples ----------------------------------------------------------------------------------------------------------------------------

def sequences(rng, lead, N, E, H, dtype, layout=None):
    """params, x, state, dout, dstate."""
    params = {f"a.{key}": draw(rng, shape, dtype, layout) for key, shape in zip(KEYS, ((E, 4 * H), (4 * H,), (H, 4 * H)), strict=True)}
    wide = accumulator(dtype)
    state, dstate = (LSTMState(draw(rng, (*lead, H), wide, layout), draw(rng, (*lead, H), wide, layout)) for _ in range(2))
    return params, draw(rng, (*lead, N, E), dtype, layout), state, draw(rng, (*lead, N, H), dtype, layout), dstate


def some_lengths(rng, lead, N):
    return rng.integers(0, N + 1, lead)


def flip(x, n, axis):
    """The first n positions in reverse order."""
    x = np.moveaxis(x.copy(), axis, 0)
    x[:n] = x[:n][::-1]
    return np.moveaxis(x, 0, axis)


def apart(actual, other, budget, what):
    """Two computations that both keep the budget."""
    within(np.asarray(actual), np.asarray(other).astype(np.float64), Ball(budget.v, 2 * budget.e, budget.u), what)


def budgets(params, x, state, dout, dstate, lengths=None, reverse=False):
    """Balls of everything that forward and backward return, for arrays with one leading axis, zero behind the lengths."""
    dtype, order = x.dtype, slice(None, None, -1 if reverse else 1)
    weights = [ball(params[f"a.{key}"]) for key in KEYS]
    lengths = np.full(len(x), x.shape[-2]) if lengths is None else lengths
    inputs, results, backs = [], [], []
    for k, n in enumerate(lengths):
        inputs.append(ball(x[k, :n][order]))
        results.append(ball_forward(weights, inputs[-1], ball(state.h[k]), ball(state.c[k])))
        backs.append(ball_backward(weights, results[-1][3], ball(dout[k, :n][order]), ball(dstate.h[k]), ball(dstate.c[k])))

    def padded(rows, F):
        full = Ball(np.zeros((len(x), x.shape[-2], F)), 0.0, rows[0].u)
        full.e = full.e.copy()
        for k, (one, n) in enumerate(zip(rows, lengths, strict=True)):
            full.v[k, :n], full.e[k, :n] = one.v[order], one.e[order]
        return full.to(dtype)

    H = state.h.shape[-1]
    return {"out": padded([r[0] for r in results], H), "h": stack([r[1] for r in results], (0, H)), "c": stack([r[2] for r in results], (0, H)),
            "dx": padded([d[1] for d in backs], x.shape[-1]), "dh": stack([d[2] for d in backs], (0, H)),
            "dc": stack([d[3] for d in backs], (0, H)),
            **{key: g.to(dtype) for key, g in zip(KEYS, ball_weights(inputs, [r[3] for r in results], [d[0] for d in backs]), strict=True)}}


def everything(params, x, state, dout, dstate, **options):
    """All that forward and backward return, under the names of `budgets`."""
    out, final, residuals = lstm_forward(params, "a", x, state, **options)
    dx, start, grads = lstm_backward(dout, dstate, residuals)
    return {"out": out, "h": final.h, "c": final.c, "dx": dx, "dh": start.h, "dc": start.c, **{key: grads[f"a.{key}"] for key in KEYS}}


# --- one direction -----------------------------------------------------------------------------------------------------------------------

@given(seeds, dtypes, st.integers(1, 3), st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
@example(0, DTYPES["float64"], 3, 4, 3, 2, True)
def test_lstm_is_its_equation_and_its_backward_the_transpose(seed, dtype, B, N, E, H, reverse):
    rng = np.random.default_rng(seed)
    params, x, state, dout, dstate = case = sequences(rng, (B,), N, E, H, dtype)
    lengths = some_lengths(rng, (B,), N)
    with Untouched(x, dout, *state, *dstate, *params.values()):
        actual = everything(*case, lengths=lengths, reverse=reverse)
    expected = {key: np.zeros(a.shape, REAL if key in ("out", "h", "c") else np.float64) for key, a in actual.items()}
    weights = [params[f"a.{key}"] for key in KEYS]
    for k, n in enumerate(lengths):
        order = slice(None, None, -1 if reverse else 1)
        arrays = [*weights, x[k, :n][order], state.h[k], state.c[k]]
        out, h, c = oracle(*(a.astype(REAL) for a in arrays))
        expected["out"][k, :n], expected["h"][k], expected["c"][k] = np.reshape(out, (n, H))[order], h, c
        *dweights, dx, dh, dc = oracle_gradients(arrays, dout[k, :n][order], dstate.h[k], dstate.c[k])
        expected["dx"][k, :n], expected["dh"][k], expected["dc"][k] = dx[order], dh, dc
        for key, d in zip(KEYS, dweights, strict=True):
            expected[key] += d
    wide = accumulator(dtype)
    for key, budget in budgets(*case, lengths=lengths, reverse=reverse).items():
        assert actual[key].dtype == (wide if key in ("h", "c", "dh", "dc") else dtype), key
        within(actual[key], expected[key], budget, key)


@pytest.mark.parametrize("lengths", [None, [40, 0, 33, 40, 7]], ids=["whole", "padded"])
def test_backward_is_the_transpose_along_a_line(rng, lengths):
    """More positions and units than the law above has, one direction of change for all arrays at once, in float64."""
    case = params, x, state, dout, dstate = sequences(rng, (5,), 40, 11, 13, np.float64, "plain")
    params["a.hidden.weight"] *= 0.05                                      # else the bound, of absolute values, grows with each position
    lengths = None if lengths is None else np.array(lengths)
    out, _, residuals = lstm_forward(params, "a", x, state, lengths=lengths)
    dx, start, grads = lstm_backward(dout, dstate, residuals)
    along = [rng.standard_normal(a.shape) for a in (*params.values(), x, *state)]
    W, b, U, x_, h_, c_ = (a + 1j * H_STEP * d for a, d in zip((*params.values(), x, *state), along, strict=True))
    left = 0.0
    for k, n in enumerate(lengths if lengths is not None else [40] * 5):
        o, h, c = oracle(W, b, U, x_[k, :n], h_[k], c_[k])
        left += (np.imag(np.reshape(o, (n, 13))) * dout[k, :n]).sum() + np.imag(h) @ dstate.h[k] + np.imag(c) @ dstate.c[k]
    given_ = budgets(*case, lengths=lengths)
    actual = {**{key: grads[f"a.{key}"] for key in KEYS}, "dx": dx, "dh": start.h, "dc": start.c}
    right = sum((g * d).sum() for g, d in zip(actual.values(), along, strict=True))
    allowed = 5 * sum((given_[key].e * np.abs(d)).sum() for key, d in zip(actual, along, strict=True))     # complex products round more
    assert abs(left / H_STEP - right) <= allowed
    assert allowed < 1e-8 * abs(right)


@given(seeds, dtypes, st.sampled_from([(), (1,), (2, 3), (0,)]), st.booleans())
def test_padding_is_not_read_and_keeps_the_state(seed, dtype, lead, reverse):
    rng = np.random.default_rng(seed)
    N, E, H = 5, 3, 2
    params, x, state, dout, dstate = sequences(rng, lead, N, E, H, dtype, "plain")
    lengths = some_lengths(rng, lead, N)
    padding = np.arange(N) >= np.asarray(lengths)[..., None]
    x, dout = np.array(x), np.array(dout)
    x[padding], dout[padding] = 1, 1
    clean = everything(params, x, state, dout, dstate, lengths=lengths, reverse=reverse)
    x[padding], dout[padding] = np.nan, np.inf
    dirty = everything(params, x, state, dout, dstate, lengths=lengths, reverse=reverse)
    for key, value in clean.items():
        np.testing.assert_array_equal(dirty[key], value, key, strict=True)
    assert not dirty["out"][padding].any() and not dirty["dx"][padding].any()
    empty = np.asarray(lengths) == 0
    for key, value in (("h", state.h), ("c", state.c), ("dh", dstate.h), ("dc", dstate.c)):
        np.testing.assert_array_equal(dirty[key][empty], value[empty], key)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_each_sequence_is_as_it_would_be_alone_without_padding(rng, dtype, reverse):
    case = params, x, state, dout, dstate = sequences(rng, (4,), 6, 3, 2, dtype, "plain")
    lengths = np.array([3, 6, 1, 6])
    together, budget = everything(*case, lengths=lengths, reverse=reverse), budgets(*case, lengths=lengths, reverse=reverse)
    for k, n in enumerate(lengths):
        alone = everything(params, x[k, :n], LSTMState(state.h[k], state.c[k]), dout[k, :n], LSTMState(dstate.h[k], dstate.c[k]),
                           reverse=reverse)
        for key in ("out", "dx"):
            apart(together[key][k, :n], alone[key], part(budget[key], (k, slice(n))), key)
        for key in ("h", "c", "dh", "dc"):
            apart(together[key][k], alone[key], part(budget[key], k), key)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_order_of_the_batch_does_not_matter(rng, dtype):
    case = params, x, state, dout, dstate = sequences(rng, (6,), 5, 3, 2, dtype, "plain")
    lengths, order = np.array([2, 5, 0, 4, 5, 1]), rng.permutation(6)
    first, budget = everything(*case, lengths=lengths), budgets(*case, lengths=lengths)
    moved = everything(params, x[order], LSTMState(*(s[order] for s in state)), dout[order], LSTMState(*(d[order] for d in dstate)),
                       lengths=lengths[order])
    for key, value in first.items():
        index = slice(None) if key in KEYS else order
        apart(moved[key], value[index], part(budget[key], index), key)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_a_sequence_in_two_parts_is_the_whole(rng, dtype, cut):
    """Also backward: the cotangent of the state between them is handed from the second part to the first."""
    case = params, x, state, dout, dstate = sequences(rng, (3,), 7, 3, 2, dtype, "plain")
    whole, budget = everything(*case), budgets(*case)
    out_1, between, r_1 = lstm_forward(params, "a", x[:, :cut], state)
    out_2, final, r_2 = lstm_forward(params, "a", x[:, cut:], between)
    dx_2, dbetween, grads_2 = lstm_backward(dout[:, cut:], dstate, r_2)
    dx_1, start, grads_1 = lstm_backward(dout[:, :cut], dbetween, r_1)
    parts = {"out": np.concatenate([out_1, out_2], 1), "h": final.h, "c": final.c, "dx": np.concatenate([dx_1, dx_2], 1), "dh": start.h,
             "dc": start.c}
    for key, value in parts.items():
        apart(value, whole[key], budget[key], key)
    for key in KEYS:
        halves = [g[f"a.{key}"].astype(np.float64) for g in (grads_1, grads_2)]
        roundings = sum(rounding(g, dtype) for g in halves)                # each part's gradient is rounded on its own
        apart(sum(halves), whole[key], Ball(budget[key].v, budget[key].e + roundings, budget[key].u), key)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_other_direction_is_the_first_on_reversed_sequences(rng, dtype):
    """Of the same shapes, so that the bits are the same."""
    params, x, state, dout, dstate = sequences(rng, (5,), 6, 3, 2, dtype, "plain")
    lengths = np.array([4, 6, 0, 1, 6])
    turn = lambda a: np.stack([flip(one, n, 0) for one, n in zip(a, lengths, strict=True)])
    there = everything(params, x, state, dout, dstate, lengths=lengths, reverse=True)
    back = everything(params, turn(x), state, turn(dout), dstate, lengths=lengths)
    for key, value in back.items():
        np.testing.assert_array_equal(there[key], turn(value) if key in ("out", "dx") else value, key, strict=True)
    assert (there["out"] != everything(params, x, state, dout, dstate, lengths=lengths)["out"]).any()


@given(seeds, dtypes, st.sampled_from([(), (1,), (4,), (2, 3), (0,)]))
def test_a_step_is_a_forward_of_one_position_and_leaves_the_state(seed, dtype, lead):
    rng = np.random.default_rng(seed)
    params, x, state, dout, dstate = sequences(rng, lead, 1, 3, 2, dtype, "plain")
    with Untouched(x, *state):
        out_t, after = lstm_step(params, "a", x[..., 0, :], state)
        out, final, _ = lstm_forward(params, "a", x, state)
    rows = lambda a, *tail: a.reshape(int(np.prod(lead)), *tail)
    if not out.size:
        assert out_t.shape == (*lead, 2) and after.h.shape == (*lead, 2)
        return
    budget = budgets(params, rows(x, 1, 3), LSTMState(*(rows(s, 2) for s in state)), rows(dout, 1, 2), LSTMState(*(rows(d, 2) for d in dstate)))
    apart(rows(out_t, 2), rows(out, 1, 2)[:, 0], part(budget["out"], (slice(None), 0)), "out_t")
    apart(rows(after.h, 2), rows(final.h, 2), budget["h"], "h")
    apart(rows(after.c, 2), rows(final.c, 2), budget["c"], "c")
    assert out_t.dtype == dtype and not np.shares_memory(out_t, after.h)


def test_steps_without_a_past_go_on_from_one_another(rng):
    params, x, _, dout, dstate = sequences(rng, (2,), 5, 3, 4, np.float64, "plain")
    zeros = LSTMState(np.zeros((2, 4)), np.zeros((2, 4)))
    budget, state = budgets(params, x, zeros, dout, dstate), None
    out, final, _ = lstm_forward(params, "a", x)
    for t in range(5):
        out_t, state = lstm_step(params, "a", x[:, t], state)
        apart(out_t, out[:, t], part(budget["out"], (slice(None), t)), "out_t")
    apart(state.c, final.c, budget["c"], "c")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_large_numbers_saturate_and_stay_finite(dtype):
    """σ is 0 or 1 and tanh ±1, their slopes are 0; nothing overflows on the way (a warning would be an error)."""
    W = np.array([[1, 1, 1, 1]]).astype(dtype)
    params = {"a.in.weight": W, "a.in.bias": np.zeros(4, dtype), "a.hidden.weight": np.zeros((1, 4), dtype)}
    x = np.array([[3e4], [-3e4]]).astype(dtype)[:, None]
    out, final, residuals = lstm_forward(params, "a", x, LSTMState(*np.full((2, 2, 1), 0.5, accumulator(dtype))))
    np.testing.assert_array_equal(final.c[:, 0], [1.5, 0])
    np.testing.assert_allclose(out[:, 0, 0].astype(float), [np.tanh(1.5), 0], rtol=2.0**-7)
    dx, start, grads = lstm_backward(np.ones_like(out), None, residuals)
    assert not dx.any() and not grads["a.in.weight"].any() and start.c[1] == 0


def test_a_gate_that_is_nearly_closed_keeps_its_digits():
    """σ(-30) is 9.4e-14, far below the roundoff of float32; ½ + ½ tanh(-15) would be 0 there. Roundings: e^{-a} 4, sum 1, quotient 1."""
    params = {"a.in.weight": np.zeros((1, 4), np.float32), "a.in.bias": np.array([-30, 0, 30, 30], np.float32),
              "a.hidden.weight": np.zeros((1, 4), np.float32)}
    _, state, _ = lstm_forward(params, "a", np.zeros((1, 1), np.float32))
    np.testing.assert_allclose(state.c, [1 / (1 + np.exp(30.0))], rtol=10 * 2.0**-24)


def test_none_counts_as_zero(rng):
    params, x, state, dout, dstate = sequences(rng, (2,), 4, 3, 2, np.float64, "plain")
    zero, nothing = LSTMState(np.zeros((2, 2)), np.zeros((2, 2))), LSTMState(None, None)
    for one, other in (((params, x, None, dout, None), (params, x, zero, dout, zero)),
                       ((params, x, state, dout, nothing), (params, x, state, dout, zero)),
                       ((params, x, state, None, LSTMState(dstate.h, None)), (params, x, state, 0 * dout, LSTMState(dstate.h, zero.c)))):
        first, second = everything(*one), everything(*other)
        for key, value in second.items():
            np.testing.assert_array_equal(first[key], value, key, strict=True)


def test_residuals_are_only_read(rng):
    params, x, state, dout, dstate = sequences(rng, (3,), 5, 4, 2, np.float32, "plain")
    residuals = lstm_forward(params, "a", x, state, lengths=[5, 2, 3])[2]
    first, second = (lstm_backward(dout, dstate, residuals) for _ in range(2))
    for a, b in zip((first[0], *first[1], *first[2].values()), (second[0], *second[1], *second[2].values()), strict=True):
        np.testing.assert_array_equal(a, b)


# --- L layers, both directions -----------------------------------------------------------------------------------------------------------

def stacked(rng, lead, N, E, H, L, dtype, scale=1.0):
    params = {key: draw(rng, p.shape, dtype, "plain", scale) for key, p in bilstm_init(rng, "a", E, H, dtype, layers=L).items()}
    wide = accumulator(dtype)
    state, dstate = (LSTMState(*(draw(rng, (L, 2, *lead, H), wide, "plain") for _ in range(2))) for _ in range(2))
    return params, draw(rng, (*lead, N, E), dtype, "plain"), state, draw(rng, (*lead, N, 2 * H), dtype, "plain"), dstate


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lead, lengths", [((), None), ((2, 3), None), ((2, 3), [[5, 0, 2], [1, 5, 4]]), ((2, 3), [3, 5]), ((0,), None)])
def test_bilstm_is_its_layers_one_after_the_other(rng, dtype, lead, lengths):
    """Bit for bit, since it is the same products: what comes out of a layer is both directions side by side, and goes into the next."""
    L, H = 3, 2
    params, x, state, dout, dstate = stacked(rng, lead, 5, 4, H, L, dtype)
    lengths = None if lengths is None else np.array(lengths)
    out, final, residuals = bilstm_forward(params, "a", x, state, layers=L, lengths=lengths)
    dx, start, grads = bilstm_backward(dout, dstate, residuals)
    at = lambda s, i, d: LSTMState(s.h[i, d], s.c[i, d])
    y, kept = x, []
    for i in range(L):
        pair = [lstm_forward(params, f"a.{i}.{direction}", y, at(state, i, d), lengths=lengths, reverse=d == 1)
                for d, direction in enumerate(("forward", "backward"))]
        y = np.concatenate([pair[0][0], pair[1][0]], -1)
        kept.append([one[2] for one in pair])
        for d in range(2):
            for a, b in zip(at(final, i, d), pair[d][1], strict=True):
                np.testing.assert_array_equal(a, b, strict=True)
    np.testing.assert_array_equal(out, y, strict=True)
    dy, expected = dout, {}
    for i in reversed(range(L)):
        pair = [lstm_backward(dy[..., d * H:(d + 1) * H], at(dstate, i, d), kept[i][d]) for d in range(2)]
        dy = pair[0][0] + pair[1][0]
        for d in range(2):
            expected |= pair[d][2]
            for a, b in zip(at(start, i, d), pair[d][1], strict=True):
                np.testing.assert_array_equal(a, b, strict=True)
    np.testing.assert_array_equal(dx, dy, strict=True)
    assert list(grads) == list(params) and grads.keys() == expected.keys()
    for key, g in grads.items():
        np.testing.assert_array_equal(g, expected[key], key, strict=True)


def bilstm_balls(params, x, state, dout, dstate, lengths, L):
    """Balls of out and dx (list of sequences), states and gradients, for one leading axis."""
    dtype, turn = x.dtype, lambda y: part(y, slice(None, None, -1))
    X, layers = [ball(one[:n]) for one, n in zip(x, lengths, strict=True)], []
    names = lambda i, d: f"a.{i}.{('forward', 'backward')[d]}"
    weights = [[[ball(params[f"{names(i, d)}.{key}"]) for key in KEYS] for d in range(2)] for i in range(L)]
    for i in range(L):
        inputs = [X, [turn(one) for one in X]]
        runs = [[ball_forward(weights[i][d], one, ball(state.h[i, d, k]), ball(state.c[i, d, k])) for k, one in enumerate(inputs[d])]
                for d in range(2)]
        layers.append((inputs, runs))
        X = [join([a[0], turn(b[0])], 1) for a, b in zip(*runs, strict=True)]
    out, D, H = [one.to(dtype) for one in X], [ball(one[:n]) for one, n in zip(dout, lengths, strict=True)], state.h.shape[-1]
    grads, start = {}, {}
    for i in reversed(range(L)):
        inputs, runs = layers[i]
        backs = [[ball_backward(weights[i][d], run[3], (part(y, (slice(None), slice(H))), turn(part(y, (slice(None), slice(H, None)))))[d],
                                ball(dstate.h[i, d, k]), ball(dstate.c[i, d, k])) for k, (run, y) in enumerate(zip(runs[d], D, strict=True))]
                 for d in range(2)]
        for d in range(2):
            budget = ball_weights(inputs[d], [run[3] for run in runs[d]], [back[0] for back in backs[d]])
            grads |= {f"{names(i, d)}.{key}": g.to(dtype) for key, g in zip(KEYS, budget, strict=True)}
            start[i, d] = stack([back[2] for back in backs[d]], (0, H)), stack([back[3] for back in backs[d]], (0, H))
        D = [a[1] + turn(b[1]) for a, b in zip(*backs, strict=True)]
    return out, [one.to(dtype) for one in D], [[[run[1:3] for run in runs[d]] for d in range(2)] for _, runs in layers], start, grads


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_bilstm_keeps_its_budget_in_every_dtype(rng, dtype):
    """Against the equations in longdouble. Nothing is rounded to float16 or bfloat16 between the layers."""
    L, lengths = 2, np.array([4, 0, 6, 1])
    case = params, x, state, dout, dstate = stacked(rng, (4,), 6, 3, 2, L, dtype, 0.7)
    out, final, residuals = bilstm_forward(params, "a", x, state, layers=L, lengths=lengths)
    dx, start, grads = bilstm_backward(dout, dstate, residuals)
    b_out, b_dx, b_final, b_start, b_grads = bilstm_balls(*case, lengths, L)
    assert out.dtype == dx.dtype == dtype and final.h.dtype == start.c.dtype == accumulator(dtype)
    for k, n in enumerate(lengths):
        within(out[k, :n], b_out[k].v, b_out[k], "out")
        within(dx[k, :n], b_dx[k].v, b_dx[k], "dx")
        assert not out[k, n:].any() and not dx[k, n:].any()
    for i in range(L):
        for d in range(2):
            for k in range(4):
                within(final.h[i, d, k], b_final[i][d][k][0].v, b_final[i][d][k][0], "h")
                within(final.c[i, d, k], b_final[i][d][k][1].v, b_final[i][d][k][1], "c")
            within(start.h[i, d], b_start[i, d][0].v, b_start[i, d][0], "dh")
            within(start.c[i, d], b_start[i, d][1].v, b_start[i, d][1], "dc")
    for key, g in grads.items():
        assert g.dtype == dtype
        within(g, b_grads[key].v, b_grads[key], key)


def test_bilstm_threads_change_nothing(rng):
    """Large enough for two threads, one direction by itself too, so that all have one BLAS thread: the bits of two lstm_forward, which run one after
    the other."""
    params = bilstm_init(rng, "a", 40, 64, layers=1)
    x, lengths = draw(rng, (9, 60, 40), np.float32, "plain"), np.array([60, 0, 7, 41, 60, 33, 1, 52, 18])
    assert 2 * lengths.sum() * 64 * 4 * 64 > FLOPS_WORTH_THREADS
    dout = draw(rng, (9, 60, 128), np.float32, "plain")
    out, _, residuals = bilstm_forward(params, "a", x, layers=1, lengths=lengths)
    _, _, grads = bilstm_backward(dout, None, residuals)
    for d, direction in enumerate(("forward", "backward")):
        half = slice(64 * d, 64 * (d + 1))
        one, _, r = lstm_forward(params, f"a.0.{direction}", x, lengths=lengths, reverse=d == 1)
        np.testing.assert_array_equal(out[..., half], one)
        for key, g in lstm_backward(dout[..., half], None, r)[2].items():
            np.testing.assert_array_equal(grads[key], g, key)


def test_cupy_arrays_give_the_same(cp, rng):
    L, lengths = 2, [4, 0, 6, 1]
    case = params, x, state, dout, dstate = stacked(rng, (4,), 6, 3, 2, L, np.float32, 0.7)
    device = lambda arrays: LSTMState(*map(cp.asarray, arrays))
    out, _, residuals = bilstm_forward({key: cp.asarray(p) for key, p in params.items()}, "a", cp.asarray(x), device(state), layers=L,
                                       lengths=cp.asarray(lengths))
    dx, _, grads = bilstm_backward(cp.asarray(dout), device(dstate), residuals)
    b_out, b_dx, _, _, b_grads = bilstm_balls(*case, lengths, L)
    for k, n in enumerate(lengths):
        within(out.get()[k, :n], b_out[k].v, b_out[k], "out")
        within(dx.get()[k, :n], b_dx[k].v, b_dx[k], "dx")
    for key, g in grads.items():
        within(g.get(), b_grads[key].v, b_grads[key], key)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_torch_computes_the_same(rng, bidirectional):
    """Its gates stand in the order i, f, g, o. Both keep the budget of float64; two computations may be twice as far apart."""
    torch = pytest.importorskip("torch")
    L, E, H, lengths = (3, 5, 4, [7, 2, 5]) if bidirectional else (1, 5, 4, [7, 2, 5])
    params, x, state, dout, dstate = stacked(rng, (3,), 7, E, H, L, np.float64, 0.7)
    theirs = lambda a: np.concatenate([a[..., :2 * H], a[..., 3 * H:], a[..., 2 * H:3 * H]], -1)
    module = torch.nn.LSTM(E, H, L, batch_first=True, bidirectional=bidirectional, dtype=torch.float64)
    suffixes = [(i, d, f"_l{i}" + "_reverse" * d) for i in range(L) for d in range(2 if bidirectional else 1)]
    name = lambda i, d: f"a.{i}.{('forward', 'backward')[d]}"
    with torch.no_grad():
        for i, d, suffix in suffixes:
            W, b, U = (torch.from_numpy(theirs(params[f"{name(i, d)}.{key}"])) for key in KEYS)
            getattr(module, f"weight_ih{suffix}").copy_(W.T)
            getattr(module, f"weight_hh{suffix}").copy_(U.T)
            getattr(module, f"bias_ih{suffix}").copy_(b)
            getattr(module, f"bias_hh{suffix}").zero_()
    budget_out, budget_dx, _, _, budget_grads = bilstm_balls(params, x, state, dout, dstate, lengths, L)
    if bidirectional:
        out, final, residuals = bilstm_forward(params, "a", x, state, layers=L, lengths=lengths)
        dx, _, grads = bilstm_backward(dout, dstate, residuals)
    else:
        state, dstate, dout = LSTMState(*(s[:, :1] for s in state)), LSTMState(*(d[:, :1] for d in dstate)), dout[..., :H]
        out, one, residuals = lstm_forward(params, "a.0.forward", x, LSTMState(state.h[0, 0], state.c[0, 0]), lengths=lengths)
        dx, _, grads = lstm_backward(dout, LSTMState(dstate.h[0, 0], dstate.c[0, 0]), residuals)
        final = LSTMState(one.h[None, None], one.c[None, None])
        plain = {f"a.{key}": params[f"a.0.forward.{key}"] for key in KEYS}
        given_ = budgets(plain, x, LSTMState(state.h[0, 0], state.c[0, 0]), dout, LSTMState(dstate.h[0, 0], dstate.c[0, 0]), np.array(lengths))
        budget_out, budget_dx = ([part(given_[key], (k, slice(n))) for k, n in enumerate(lengths)] for key in ("out", "dx"))
        budget_grads = {f"a.0.forward.{key}": given_[key] for key in KEYS}
    flat = lambda s: torch.from_numpy(s.reshape(-1, 3, H).copy()).requires_grad_()
    leaf, start = torch.from_numpy(x.copy()).requires_grad_(), (flat(state.h), flat(state.c))
    packed = torch.nn.utils.rnn.pack_padded_sequence(leaf, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    result, last = module(packed, start)
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(result, batch_first=True)
    loss = (y * torch.from_numpy(dout.copy())).sum() + sum((s * torch.from_numpy(d.reshape(-1, 3, H).copy())).sum() for s, d in zip(last, dstate))
    loss.backward()
    for k, n in enumerate(lengths):
        apart(out[k, :n], y[k, :n].detach().numpy(), budget_out[k], "out")
        apart(dx[k, :n], leaf.grad[k, :n].numpy(), budget_dx[k], "dx")
    for i, d, suffix in suffixes:
        for key, attribute in zip(KEYS, ("weight_ih", "bias_ih", "weight_hh"), strict=True):
            apart(theirs(grads[f"{name(i, d)}.{key}"]), getattr(module, attribute + suffix).grad.numpy().T,
                  budget_grads[f"{name(i, d)}.{key}"].map(theirs), key)
    np.testing.assert_allclose(final.c.reshape(-1, 3, H), last[1].detach().numpy(), rtol=1e-12, atol=1e-14)


# --- parameters and errors ---------------------------------------------------------------------------------------------------------------

def test_init_is_that_of_one_seed_in_every_dtype_and_opens_the_forget_gate():
    make = lambda dtype: bilstm_init(np.random.default_rng(3), "speech", 40, 60, dtype, layers=2)
    wide, narrow = make(np.float64), make(np.float16)
    for key, p in wide.items():
        np.testing.assert_array_equal(narrow[key], p.astype(np.float16), strict=True)
        if key.endswith("bias"):
            np.testing.assert_array_equal(p, np.repeat([0, 1, 0, 0], 60))
        else:
            assert abs(p.var() * p.shape[0] - 1) < 6 * np.sqrt(2 / p.size), key       # six deviations of a mean of p.size squares
    assert [wide[f"speech.{i}.backward.in.weight"].shape for i in range(2)] == [(40, 240), (120, 240)]
    for one, other in pairwise(p for key, p in wide.items() if key.endswith("hidden.weight")):
        assert (one != other).all()


X = np.zeros((2, 3, 4), np.float32)
GOOD = lstm_init(np.random.default_rng(0), "a", 4, 5)


@pytest.mark.parametrize("error, words, call", [
    (ValueError, r"x: expected \(\.\.\., N, E\), got \(4,\)", lambda: lstm_forward(GOOD, "a", X[0, 0])),
    (ValueError, r"x_t: expected \(\.\.\., E\), got \(\)", lambda: lstm_step(GOOD, "a", X[0, 0, 0, ...])),
    (ValueError, r"params: expected a key 'b\.in\.weight', found none", lambda: lstm_forward(GOOD, "b", X)),
    (ValueError, r"params: expected a key 'a\.hidden\.weight', found none",
     lambda: lstm_forward({key: p for key, p in GOOD.items() if "hidden" not in key}, "a", X)),
    (ValueError, r"params\['a\.in\.weight'\]: expected \(E, 4H\) = \(3, 20\), got \(4, 20\)", lambda: lstm_forward(GOOD, "a", X[..., :3])),
    (ValueError, r"params\['a\.hidden\.weight'\]: expected \(H, 4H\) = \(5, 20\), got \(5, 19\)",
     lambda: lstm_forward(GOOD | {"a.hidden.weight": GOOD["a.hidden.weight"][:, 1:]}, "a", X)),
    (ValueError, r"params\['s\.0\.backward\.in\.weight'\]: expected \(E, 4H\) = \(4, 12\), got \(4, 20\)",
     lambda: bilstm_forward(lstm_init(np.random.default_rng(0), "s.0.forward", 4, 3) | {f"s.0.backward.{k}": GOOD[f"a.{k}"] for k in KEYS}, "s", X,
                            layers=1)),
    (TypeError, r"x is float64 and params\['a\.in\.weight'\] is float32", lambda: lstm_forward(GOOD, "a", X.astype(float))),
    (ValueError, r"state\.h: expected \(\.\.\., H\) = \(2, 5\), got \(5,\)", lambda: lstm_forward(GOOD, "a", X, LSTMState(*np.zeros((2, 5), "f4")))),
    (TypeError, r"state\.c is float64 and x is float32: expected state\.c in float32",
     lambda: lstm_step(GOOD, "a", X[:, 0], LSTMState(np.zeros((2, 5), "f4"), np.zeros((2, 5))))),
    (ValueError, r"lengths: expected 0 ≤ length ≤ N = 3, got values from 1 to 4", lambda: lstm_forward(GOOD, "a", X, lengths=[1, 4])),
    (ValueError, r"dout: expected the shape of the output \(2, 3, 5\), got \(2, 3, 4\)",
     lambda: lstm_backward(X, None, lstm_forward(GOOD, "a", X)[2])),
    (TypeError, r"dout is float64 and its output is float32",
     lambda: lstm_backward(np.zeros((2, 3, 5)), None, lstm_forward(GOOD, "a", X)[2])),
    (ValueError, r"dstate\.c: expected the shape of the output \(2, 5\), got \(2, 4\)",
     lambda: lstm_backward(None, LSTMState(None, X[:, 0]), lstm_forward(GOOD, "a", X)[2])),
    (ValueError, r"layers: expected an integer ≥ 1, got 0", lambda: bilstm_forward(GOOD, "a", X, layers=0)),
    (ValueError, r"hidden: expected an integer ≥ 1, got 0", lambda: lstm_init(np.random.default_rng(0), "a", 4, 0)),
    (ValueError, r"state\.h: expected \(L, 2, \.\.\., H\) = \(1, 2, 2, 5\), got \(2, 5\)",
     lambda: bilstm_forward(bilstm_init(np.random.default_rng(0), "a", 4, 5, layers=1), "a", X, LSTMState(*np.zeros((2, 2, 5), "f4")), layers=1)),
])
def test_errors_say_what_is_wrong(error, words, call):
    with pytest.raises(error, match=words):
        call()
