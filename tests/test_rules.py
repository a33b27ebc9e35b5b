"""`recurrence` and its step: rule `linear`, scale, packed sequences, their pullbacks."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import oracle, recurrence, recurrence_step, vjp
from refattn.testing import budgets, laws
from refattn.testing.strategies import cases

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
scales = st.sampled_from([1.0, 0.5, 2, -0.25])
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_on_integers_and_dyadic_scales_it_is_the_definition_bit_for_bit(dtype, data):
    c, scale = data.draw(cases(dtype=dtype, exact=True, longest=33)), data.draw(scales)
    (out, end), pullback = vjp(recurrence, c.q, c.k, c.v, None, None, c.state, scale=scale)
    dq, dk, dv, dg, dbeta, dstate = pullback(c.dout, c.dstate)
    assert dg is None and dbeta is None
    wide, scaled = c.state.dtype, (scale * c.dout.astype(float))
    expected = [*oracle.recurrence(c.q, c.k, c.v, c.state, scale=scale),
                *oracle.recurrence_gradients(c.q, c.k, c.v, c.state, scaled, c.dstate)]
    laws.law_equal_bits({
        "oracle": [x.astype(t) for x, t in zip(expected, (dtype, wide, dtype, dtype, dtype, wide), strict=True)],
        "recurrence": [out, end, dq, dk, dv, dstate]})
    laws.law_equal_bits({"with": recurrence(c.q, c.k, c.v, state=c.state, scale=scale), "vjp": [out, end]})


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_the_step_is_a_sequence_of_one(dtype, data):
    c, scale = data.draw(cases(dtype=dtype, exact=True, longest=1).filter(lambda c: c.dims.N)), data.draw(scales)
    whole, pullback = vjp(recurrence, c.q, c.k, c.v, None, None, c.state, scale=scale)
    step, pullback_t = vjp(recurrence_step, *(x[..., 0, :] for x in (c.q, c.k, c.v)), None, None, c.state, scale=scale)
    laws.law_equal_bits({"whole": [whole[0][..., 0, :], whole[1]], "step": step})
    dq, dk, dv, *_, ds = pullback(c.dout, c.dstate)
    dq_t, dk_t, dv_t, dg, dbeta, ds_t = pullback_t(c.dout[..., 0, :], c.dstate)
    assert dg is None and dbeta is None
    laws.law_equal_bits({"whole": [*(x[..., 0, :] for x in (dq, dk, dv)), ds], "step": [dq_t, dk_t, dv_t, ds_t]})
    laws.law_equal_bits({"zero": pullback_t(np.zeros_like(step[0]), c.dstate)[:3], "None": pullback_t(None, c.dstate)[:3]})
    laws.law_equal_bits({"zero": pullback_t(c.dout[..., 0, :], np.zeros_like(c.dstate))[:3], "None": pullback_t(c.dout[..., 0, :])[:3]})
    laws.law_equal_bits({"zero state": recurrence_step(*(x[..., 0, :] for x in (c.q, c.k, c.v)), state=np.zeros_like(c.state)),
                         "none": recurrence_step(*(x[..., 0, :] for x in (c.q, c.k, c.v)))})


@given(cases(longest=40), seeds, scales)
def test_backward_is_the_transpose_of_the_definition(c, seed, scale):
    _, pullback = vjp(recurrence, c.q, c.k, c.v, None, None, c.state, scale=scale)
    b = budgets.recurrence_budget(c.q, c.k, c.v, c.state, c.dout, c.dstate, scale=scale)
    dq, dk, dv, _, _, ds = pullback(c.dout, c.dstate)
    laws.law_backward_is_the_transpose(lambda *x: oracle.recurrence(*x, scale=scale), (c.q, c.k, c.v, c.state), (dq, dk, dv, ds),
                                       (b.dq, b.dk, b.dv, b.dS), (c.dout, c.dstate), np.random.default_rng(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_packed_sequences_are_those_sequences_one_by_one(dtype, data):
    c = data.draw(cases(dtype=dtype, exact=True, longest=50))
    rng = np.random.default_rng(data.draw(seeds))
    N, count = c.dims.N, data.draw(st.integers(1, 4))
    cu = np.concatenate([[0], np.sort(rng.integers(0, N + 1, count - 1)), [N]])                    # empty sequences among them
    shape = (*c.state.shape[:-2], count, *c.state.shape[-2:])
    state, dstate = (rng.integers(-2, 3, shape).astype(c.state.dtype) for _ in range(2))
    (out, end), pullback = vjp(recurrence, c.q, c.k, c.v, None, None, state, scale=0.5, cu_seqlens=cu)
    dq, dk, dv, _, _, ds = pullback(c.dout, dstate)
    for i, (a, b) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        q, k, v, dout = (x[..., a:b, :] for x in (c.q, c.k, c.v, c.dout))
        (out_i, end_i), pullback_i = vjp(recurrence, q, k, v, None, None, state[..., i, :, :], scale=0.5)
        dq_i, dk_i, dv_i, _, _, ds_i = pullback_i(dout, dstate[..., i, :, :])
        laws.law_equal_bits({"alone": [out_i, end_i, dq_i, dk_i, dv_i, ds_i],
                             "packed": [*(x[..., a:b, :] for x in (out,)), end[..., i, :, :], *(x[..., a:b, :] for x in (dq, dk, dv)),
                                        ds[..., i, :, :]]})
    laws.law_equal_bits({"zeros": recurrence(c.q, c.k, c.v, state=np.zeros_like(state), cu_seqlens=cu.tolist()),
                         "none": recurrence(c.q, c.k, c.v, cu_seqlens=cu.tolist())})
    _, plain = vjp(recurrence, c.q, c.k, c.v, cu_seqlens=cu)
    laws.law_equal_bits({"zeros": plain(c.dout, np.zeros_like(dstate)), "none": plain(c.dout)})


def test_no_sequences_at_all():
    q, v = np.zeros((2, 0, 3)), np.zeros((2, 0, 4))
    (out, end), pullback = vjp(recurrence, q, q, v, cu_seqlens=[0])
    assert out.shape == (2, 0, 4) and end.shape == (2, 0, 3, 4)
    assert [g.shape for g in pullback(out, end)] == [(2, 0, 3), (2, 0, 3), (2, 0, 4)]


@pytest.mark.parametrize("changes, words", [
    ({"rule": "linaer"}, "rule: expected one of 'linear', 'gated', 'delta', 'gated_delta', got 'linaer'"),
    ({"rule": None}, "rule: expected one of 'linear', 'gated', 'delta', 'gated_delta', got None"),
    ({"g": np.zeros((2, 5))}, "g: rule 'linear' has no g, got an array; leave it None"),
    ({"beta": np.zeros((2, 5))}, "beta: rule 'linear' has no beta"),
    ({"scale": np.inf}, "scale: expected a finite number, got inf"),
    ({"state": np.zeros((2, 3, 5))}, r"state: expected \(..., H, D, M\) = \(2, 3, 4\), got \(2, 3, 5\)"),
    ({"cu_seqlens": [0, 4]}, r"cu_seqlens: expected one axis that starts with 0, never falls and ends with N = 5, got \[0, 4\]"),
    ({"cu_seqlens": [1, 5]}, "cu_seqlens: expected one axis that starts with 0"),
    ({"cu_seqlens": [0, 4, 3, 5]}, "cu_seqlens: .* never falls"),
    ({"cu_seqlens": [[0, 5]]}, "cu_seqlens: expected one axis"),
    ({"cu_seqlens": np.zeros(0, int)}, "cu_seqlens: expected one axis"),
    ({"cu_seqlens": [0, 2, 5], "state": np.zeros((2, 3, 4))}, r"state: expected \(..., H, sequences, D, M\) = \(2, 2, 3, 4\), got \(2, 3, 4\)"),
])
def test_bad_options_are_explained(changes, words):
    arguments = {"q": np.zeros((2, 5, 3)), "k": np.zeros((2, 5, 3)), "v": np.zeros((2, 5, 4)), **changes}
    with pytest.raises(ValueError, match=words):
        recurrence(**arguments)


@pytest.mark.parametrize("changes, words", [
    ({"scale": "1"}, "scale: expected a number, got str"),
    ({"scale": True}, "scale: expected a number, got bool"),
    ({"cu_seqlens": [0.0, 5.0]}, "cu_seqlens: expected integers, got float64"),
    ({"state": np.zeros((2, 3, 4), np.float32)}, "state is float32 and q is float64: expected state in float64; nothing is cast silently"),
    ({"state": [[0.0]]}, "state: expected a NumPy or CuPy array, got list"),
])
def test_wrong_types_are_explained(changes, words):
    arguments = {"q": np.zeros((2, 5, 3)), "k": np.zeros((2, 5, 3)), "v": np.zeros((2, 5, 4)), **changes}
    with pytest.raises(TypeError, match=words):
        recurrence(**arguments)


def test_a_half_precision_state_is_taken_and_its_gradient_has_its_dtype():
    q, state = np.ones((2, 1, 3), np.float16), np.ones((2, 3, 3), np.float16)
    (out, end), pullback = vjp(recurrence, q, q, q, None, None, state)
    assert end.dtype == np.float32 and pullback(out, end)[5].dtype == np.float16
    (out, end), pullback = vjp(recurrence_step, q[:, 0], q[:, 0], q[:, 0], None, None, state)
    assert end.dtype == np.float32 and pullback(out, end)[5].dtype == np.float16
