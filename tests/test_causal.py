"""Rule `linear`: masked, chunked, scan and step agree with the definition, and so do their transposes."""
from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import causal, oracle
from refattn.causal import (
    causal_chunked_backward,
    causal_chunked_forward,
    causal_masked_backward,
    causal_masked_forward,
    causal_scan_backward,
    causal_scan_forward,
    causal_step,
    causal_step_backward,
)
from refattn.linear import linear_backward, linear_forward
from refattn.testing import budgets, laws
from refattn.testing.strategies import cases, strided

FORMS = {"masked": (causal_masked_forward, causal_masked_backward), "chunked": (causal_chunked_forward, causal_chunked_backward),
         "scan": (causal_scan_forward, causal_scan_backward)}
CHUNKED = ("chunked", "scan")
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
chunks = st.sampled_from([1, 2, 3, 16, 32, 64])


def stepped(q, k, v, state):
    """The step form for a whole sequence, forward and a function for backward."""
    states, outs = [state], []
    for t in range(q.shape[-2]):
        out_t, S = causal_step(states[-1], q[..., t, :], k[..., t, :], v[..., t, :])
        outs.append(out_t)
        states.append(S)
    out = np.stack(outs, -2) if outs else np.zeros((*q.shape[:-1], v.shape[-1]), v.dtype)

    def backward(dout, dstate):
        dq, dk, dv, R = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), dstate
        for t in reversed(range(q.shape[-2])):
            R, dq[..., t, :], dk[..., t, :], dv[..., t, :] = causal_step_backward(
                dout[..., t, :], R, states[t], q[..., t, :], k[..., t, :], v[..., t, :])
        return dq, dk, dv, R

    return out, states[-1], backward


def run(form, c, chunk=None):
    forward, backward = FORMS[form]
    out, end, residuals = forward(c.q, c.k, c.v, c.state, **({"chunk": chunk} if form in CHUNKED else {}))
    return out, end, *backward(c.dout, c.dstate, residuals)


# --- exact laws: no tolerance ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_on_integers_every_form_gives_the_definition_bit_for_bit(dtype, data):
    """Eq. (8), (9)."""
    c = data.draw(cases(dtype=dtype, exact=True, longest=40))
    chunk = data.draw(chunks)
    wide = c.state.dtype
    expected = [*oracle.recurrence(c.q, c.k, c.v, c.state), *oracle.recurrence_gradients(c.q, c.k, c.v, c.state, c.dout, c.dstate)]
    expected = [x.astype(t) for x, t in zip(expected, (dtype, wide, dtype, dtype, dtype, wide), strict=True)]
    laws.law_equal_bits({"oracle": expected, **{form: run(form, c, chunk) for form in FORMS}})
    for form in FORMS:
        assert [x.dtype for x in run(form, c, chunk)] == [np.dtype(dtype), wide, *[np.dtype(dtype)] * 3, wide]


@given(cases(exact=True, longest=20))
def test_on_integers_the_step_gives_the_definition_bit_for_bit(c):
    out, end, backward = stepped(c.q, c.k, c.v, c.state)
    laws.law_equal_bits({
        "oracle": [*oracle.recurrence(c.q, c.k, c.v, c.state), *oracle.recurrence_gradients(c.q, c.k, c.v, c.state, c.dout, c.dstate)],
        "step": [out, end, *backward(c.dout, c.dstate)]})


@pytest.mark.parametrize("form", ["masked", "scan"])
def test_on_rationals_the_functional_forms_are_exact(form, rng):
    def draw(*shape):
        return np.vectorize(lambda a, b: Fraction(int(a), int(b)), otypes=[object])(rng.integers(-9, 10, shape), rng.integers(1, 10, shape))

    q, k, v, state, dout, dstate = draw(2, 4, 7, 3), draw(2, 2, 7, 3), draw(2, 2, 7, 5), draw(2, 2, 3, 5), draw(2, 4, 7, 5), draw(2, 2, 3, 5)
    forward, backward = FORMS[form]
    out, end, residuals = forward(q, k, v, state, **({"chunk": 3} if form == "scan" else {}))
    laws.law_equal_bits({
        "oracle": [*oracle.recurrence(q, k, v, state), *oracle.recurrence_gradients(q, k, v, state, dout, dstate)],
        form: [out, end, *backward(dout, dstate, residuals)]})


@given(cases(exact=True), chunks, st.data())
def test_splitting_the_sequence_changes_nothing(c, chunk, data):
    """Eq. (10), (11)."""
    at = data.draw(st.integers(0, c.dims.N))
    whole = causal_chunked_forward(c.q, c.k, c.v, c.state, chunk=chunk)[:2]
    head, middle, _ = causal_chunked_forward(c.q[..., :at, :], c.k[..., :at, :], c.v[..., :at, :], c.state, chunk=chunk)
    tail, end, _ = causal_chunked_forward(c.q[..., at:, :], c.k[..., at:, :], c.v[..., at:, :], middle, chunk=chunk)
    laws.law_equal_bits({"whole": whole, "split": [np.concatenate([head, tail], -2), end]})


@given(cases(exact=True), chunks, st.data())
def test_the_future_never_reaches_the_past_and_the_past_never_the_cotangents_of_the_future(c, chunk, data):
    """Eq. (8), (9)."""
    at = data.draw(st.integers(0, c.dims.N))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    other = [x.copy() for x in (c.q, c.k, c.v, c.dout)]
    for x in other:
        x[..., at:, :] = rng.integers(-2, 3, x[..., at:, :].shape)
    changed = run("chunked", c._replace(q=other[0], k=other[1], v=other[2]), chunk)
    assert np.array_equal(changed[0][..., :at, :], run("chunked", c, chunk)[0][..., :at, :])
    for x, y in ((c.q, other[0]), (c.dout, other[3])):
        x[..., :at, :], y[..., :at, :] = x[..., :at, :], rng.integers(-2, 3, x[..., :at, :].shape)
    other[0][..., at:, :], other[3][..., at:, :] = c.q[..., at:, :], c.dout[..., at:, :]
    *_, dk, dv, _ = run("chunked", c, chunk)
    *_, dk2, dv2, _ = run("chunked", c._replace(q=other[0], dout=other[3]), chunk)
    assert np.array_equal(dk[..., at:, :], dk2[..., at:, :]) and np.array_equal(dv[..., at:, :], dv2[..., at:, :])


@given(cases(exact=True), st.integers(0, 2**32 - 1))
def test_the_order_of_heads_and_batches_commutes(c, seed):
    if not c.dims.lead:
        return
    order = np.random.default_rng(seed).permutation(c.dims.lead[0])
    for x, y in zip(run("chunked", c, 16), run("chunked", c._replace(**{n: getattr(c, n)[order] for n in c._fields[1:]}), 16), strict=True):
        assert np.array_equal(x[order], y)


@given(cases(exact=True), st.integers(0, 2**32 - 1))
def test_strides_do_not_matter_and_inputs_stay_untouched(c, seed):
    rng = np.random.default_rng(seed)
    awkward = c._replace(**{n: strided(getattr(c, n), rng) for n in c._fields[1:]})
    for form in FORMS:
        laws.law_equal_bits({"contiguous": run(form, c, 16), "strided": run(form, awkward, 16)})
    for name in c._fields[1:]:
        assert np.array_equal(getattr(c, name), getattr(awkward, name))


@given(cases(exact=True))
def test_broadcast_inputs_and_cotangents_count_as_what_they_show(c):
    one = c._replace(q=c.q[..., :1, :] if c.dims.N else c.q, dout=np.ones((1, 1)), dstate=np.ones((1, 1)) * 2)
    shown = c._replace(**{n: np.broadcast_to(getattr(one, n), getattr(c, n).shape) for n in ("q", "dout", "dstate")})
    copied = shown._replace(**{n: getattr(shown, n).copy() for n in ("q", "dout", "dstate")})
    for form in FORMS:
        laws.law_equal_bits({"copied": run(form, copied, 16), "broadcast": run(form, shown, 16)})


@given(cases(exact=True))
def test_no_state_and_no_cotangent_mean_zero(c):
    zeros = c._replace(state=np.zeros_like(c.state), dstate=np.zeros_like(c.dstate))
    for form, (forward, backward) in FORMS.items():
        out, end, residuals = forward(c.q, c.k, c.v)
        laws.law_equal_bits({"zeros": run(form, zeros, 32), form: [out, end, *backward(c.dout, None, residuals)]})


@pytest.mark.parametrize("lead, H, G, D, M", [((2,), 3, 1, 4, 5), ((2,), 3, 2, 4, 5),                       # a small state
                                              ((40,), 8, 1, 32, 33), ((50,), 3, 2, 32, 33), ((), 300, 1, 32, 33)])  # one to be cut
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_step_leaves_the_old_state_untouched(dtype, lead, H, G, D, M, rng, monkeypatch):
    """Eq. (18)."""
    monkeypatch.setattr(causal, "STEP_BYTES", 1 << 16)
    def draw(*shape):
        return rng.integers(-2, 3, (*lead, *shape)).astype(dtype)

    state, q, k, v = draw(H, D, M), draw(H * G, D), draw(H, D), draw(H, M)
    before = state.copy()
    out, after = causal_step(state, q, k, v)
    assert np.array_equal(state, before)
    laws.law_equal_bits({
        "definition": [np.einsum("...d,...dm->...m", q, np.repeat(before + k[..., :, None] * v[..., None, :], G, axis=-3)),
                       before + k[..., :, None] * v[..., None, :]],
        "step": [out, after]})
    assert out.dtype == after.dtype == dtype


# --- laws with derived bounds --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_rounding_stays_within_the_budget(dtype, data):
    c = data.draw(cases(dtype=dtype, longest=40))
    chunk = data.draw(chunks)
    b = budgets.recurrence_budget(c.q, c.k, c.v, c.state, c.dout, c.dstate)
    expected = [*oracle.recurrence(c.q, c.k, c.v, c.state), *oracle.recurrence_gradients(c.q, c.k, c.v, c.state, c.dout, c.dstate)]
    for form in FORMS:
        got = run(form, c, chunk)
        for name, x, y, bound in zip(("out", "state", "dq", "dk", "dv", "dstate"), got, expected,
                                     (b.out, b.S, b.dq, b.dk, b.dv, b.dS), strict=True):
            budgets.assert_within(x, y, bound, f"{form} {name}")


@given(cases(longest=12), st.integers(0, 2**32 - 1))
def test_the_definitions_gradients_are_the_transpose_of_the_definition(c, seed):
    b = budgets.recurrence_budget(c.q, c.k, c.v, c.state, c.dout, c.dstate)
    gradients = oracle.recurrence_gradients(c.q, c.k, c.v, c.state, c.dout, c.dstate)
    laws.law_backward_is_the_transpose(oracle.recurrence, (c.q, c.k, c.v, c.state), gradients, (b.dq, b.dk, b.dv, b.dS),
                                       (c.dout, c.dstate), np.random.default_rng(seed))


def test_a_long_sequence_crosses_many_blocks_and_threads(rng):
    q, k, v, dout = (rng.integers(-1, 2, (2, 4, 3001, 16)).astype(np.float32) for _ in range(4))
    state, dstate = (rng.integers(-1, 2, (2, 4, 16, 16)).astype(np.float32) for _ in range(2))
    expected = causal_scan_forward(q, k, v, state, chunk=100)
    got = causal_chunked_forward(q, k, v, state)
    laws.law_equal_bits({
        "scan": [*expected[:2], *causal_scan_backward(dout, dstate, expected[2])],
        "chunked": [*got[:2], *causal_chunked_backward(dout, dstate, got[2])]})


@pytest.mark.parametrize("form", CHUNKED)
def test_a_chunk_holds_at_least_one_position(form):
    x = np.ones((3, 1))
    for bad, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"chunk: expected an integer ≥ 1, got {bad}"):
            FORMS[form][0](x, x, x, chunk=bad)


def test_a_future_score_that_overflows_does_not_reach_the_past():
    q, k, v = np.full((2, 1), 1e200), np.array([[1.0], [1e200]]), np.array([[3.0], [0.0]])
    with np.errstate(over="ignore", invalid="ignore"):
        for form, (forward, _) in FORMS.items():
            assert forward(q, k, v)[0][0, 0] == 3e200, form


# --- the non-causal product ---------------------------------------------------------------------------------------------------------------

@given(cases(exact=True, cross=True))
def test_without_a_mask_the_two_orders_of_summation_agree(c):
    """Eq. (5), (6)."""
    groups = c.q.shape[-3] // c.k.shape[-3]
    K, V, S = (np.repeat(x, groups, axis=-3) if groups > 1 else x for x in (c.k, c.v, c.state))

    def over_group(x):
        return x.reshape(*c.dims.lead, c.dims.H, groups, *x.shape[-2:]).sum(-3)

    out, end, residuals = linear_forward(c.q, c.k, c.v, c.state)
    A, dA = c.q @ K.mT, c.dout @ V.mT
    W = c.dstate + over_group(c.q.mT @ c.dout)
    laws.law_equal_bits({
        "quadratic": [A @ V + c.q @ S, c.state + c.k.mT @ c.v, dA @ K + c.dout @ S.mT, over_group(dA.mT @ c.q) + c.v @ c.dstate.mT,
                      over_group(A.mT @ c.dout) + c.k @ c.dstate, W],
        "linear": [out, end, *linear_backward(c.dout, c.dstate, residuals)]})
