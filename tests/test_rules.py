"""`recurrence` and its step: the rules, scale, packed sequences, other libraries' arrays, their pullbacks."""
from __future__ import annotations

from fractions import Fraction

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import find as hypothesis_find
from hypothesis import given
from hypothesis import strategies as st

from refattn import oracle, recurrence, recurrence_step, vjp
from refattn.delta import delta_scan_backward, delta_scan_forward
from refattn.testing import budgets, laws
from refattn.testing.strategies import cases, rule_cases

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


# --- the rules with a gate or a delta: `test_chunks` judges their forms, these what `recurrence` puts around them ---------------------

RULES = ["gated", "delta", "gated_delta"]


def at(c, x, rows):
    """Positions `rows` of an array of the case: (..., N, D), or (..., N) for beta and one decay a head."""
    return None if x is None else x[..., rows, :] if x.ndim == c.k.ndim else x[..., rows]


def inputs(c, rows=slice(None)):
    return [at(c, x, rows) for x in (c.q, c.k, c.v, c.g, c.beta)]


def step_by_step(c, rule, scale):
    """out, the final state and all gradients by `recurrence_step` and its pullback, in float64; the definition judges the outputs."""
    c = c.each(lambda x: x.astype(float))
    S, pullbacks, outs = c.state, [], []
    for t in range(c.dims.N):
        (out, S), pullback = vjp(recurrence_step, *inputs(c, t), S, rule=rule, scale=scale)
        pullbacks.append(pullback)
        outs.append(out)
    gradients, R = [None if x is None else np.zeros(x.shape) for x in inputs(c)], c.dstate
    for t in reversed(range(c.dims.N)):
        *d, R = pullbacks[t](c.dout[..., t, :], R)
        for to, x in zip(gradients, d, strict=True):
            if to is not None:
                at(c, to, t)[...] = x
    expected = oracle.full_recurrence(*inputs(c), c.state, scale=scale)
    if outs:
        laws.law_equal_bits({"definition": expected, "steps": [np.stack(outs, -2), S]})
    return [*expected, *gradients, R]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_every_rule_is_its_definition_bit_for_bit(rule, dtype, data):
    """With scale 1 or 1/2; g and beta in the inputs' dtype or in the accumulator's, and their gradients likewise."""
    c, scale = data.draw(rule_cases(rule, dtype=dtype, exact=True, wide=data.draw(st.booleans()))), data.draw(st.sampled_from([1.0, 0.5]))
    (out, end), pullback = vjp(recurrence, *inputs(c), c.state, rule=rule, scale=scale)
    got = [out, end, *pullback(c.dout, c.dstate)]
    dtypes = [out.dtype, c.state.dtype, *(None if x is None else x.dtype for x in (*inputs(c), c.state))]
    assert out.dtype == dtype
    expected = [None if x is None else x.astype(t) for x, t in zip(step_by_step(c, rule, scale), dtypes, strict=True)]
    assert [x is None for x in got] == [x is None for x in expected]
    laws.law_equal_bits({name: [x for x in xs if x is not None] for name, xs in {"definition": expected, "recurrence": got}.items()})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_the_step_of_every_rule_is_a_sequence_of_one(rule, dtype, data):
    c = data.draw(rule_cases(rule, dtype=dtype, exact=True, longest=1).filter(lambda c: c.dims.N))
    whole, pullback = vjp(recurrence, *inputs(c), c.state, rule=rule, scale=0.5)
    step, pullback_t = vjp(recurrence_step, *inputs(c, 0), c.state, rule=rule, scale=0.5)
    laws.law_equal_bits({"whole": [whole[0][..., 0, :], whole[1]], "step": step})
    *gradients, ds = pullback(c.dout, c.dstate)
    *gradients_t, ds_t = pullback_t(c.dout[..., 0, :], c.dstate)
    laws.law_equal_bits({"whole": [*(at(c, x, 0) for x in gradients if x is not None), ds],
                         "step": [*(x for x in gradients_t if x is not None), ds_t]})
    none = vjp(recurrence_step, *inputs(c, 0), rule=rule)[0]
    laws.law_equal_bits({"zero state": recurrence_step(*inputs(c, 0), np.zeros_like(c.state), rule=rule), "none": none})


@pytest.mark.parametrize("rule", RULES)
@given(st.data())
def test_packed_sequences_of_every_rule_are_those_sequences_one_by_one(rule, data):
    c = data.draw(rule_cases(rule, exact=True))
    rng, N, count = np.random.default_rng(data.draw(seeds)), c.dims.N, data.draw(st.integers(1, 4))
    cu = np.concatenate([[0], np.sort(rng.integers(0, N + 1, count - 1)), [N]])
    state, dstate = (rng.integers(-1, 2, (*c.state.shape[:-2], count, *c.state.shape[-2:])).astype(float) for _ in range(2))
    (out, end), pullback = vjp(recurrence, *inputs(c), state, rule=rule, scale=0.5, cu_seqlens=cu)
    *gradients, ds = pullback(c.dout, dstate)
    for i, (a, b) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        rows = slice(a, b)
        (out_i, end_i), pullback_i = vjp(recurrence, *inputs(c, rows), state[..., i, :, :], rule=rule, scale=0.5)
        *gradients_i, ds_i = pullback_i(c.dout[..., rows, :], dstate[..., i, :, :])
        laws.law_equal_bits({"alone": [out_i, end_i, *(x for x in gradients_i if x is not None), ds_i],
                             "packed": [out[..., rows, :], end[..., i, :, :], *(at(c, x, rows) for x in gradients if x is not None),
                                        ds[..., i, :, :]]})


@pytest.mark.parametrize("rule", RULES)
@given(st.data())
def test_arrays_of_another_library_give_the_same_bits(rule, data):
    """array-api-strict, which has no assignment and no NumPy functions: the loop-free forms and their transposes."""
    c, xp = data.draw(rule_cases(rule, exact=True)), array_api_strict
    (out, end), pullback = vjp(recurrence, *inputs(c), c.state, rule=rule)
    theirs = [None if x is None else xp.asarray(x) for x in (*inputs(c), c.state, c.dout, c.dstate)]
    (out_s, end_s), pullback_s = vjp(recurrence, *theirs[:6], rule=rule)
    results = {"NumPy": [out, end, *pullback(c.dout, c.dstate)], "strict": [out_s, end_s, *pullback_s(*theirs[6:])]}
    laws.law_equal_bits({name: [np.asarray(x) for x in xs if x is not None] for name, xs in results.items()})
    if c.dims.N:
        theirs_t = [None if x is None else xp.asarray(x) for x in inputs(c, 0)]
        ours, other = recurrence_step(*inputs(c, 0), c.state, rule=rule), recurrence_step(*theirs_t, theirs[5], rule=rule)
        laws.law_equal_bits({"NumPy": ours, "strict": [np.asarray(x) for x in other]})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_cupy_arrays_give_the_same_bits(cp, rule, dtype, rng):
    find = rule_cases(rule, dtype=dtype, exact=True)
    for c in (hypothesis_find(find, lambda c, n=n: c.dims.N >= n and c.dims.lead) for n in (1, 9)):
        (out, end), pullback = vjp(recurrence, *inputs(c), c.state, rule=rule)
        theirs = [None if x is None else cp.asarray(x) for x in (*inputs(c), c.state, c.dout, c.dstate)]
        (out_c, end_c), pullback_c = vjp(recurrence, *theirs[:6], rule=rule)
        results = [x for x in (out_c, end_c, *pullback_c(*theirs[6:])) if x is not None]
        laws.law_equal_bits({"NumPy": [x for x in (out, end, *pullback(c.dout, c.dstate)) if x is not None], "CuPy": [x.get() for x in results]})


@given(seeds, st.sampled_from([1, 3, 8]))
def test_with_beta_1_and_orthonormal_keys_it_stores_and_recalls_exactly(seed, writes):
    """The last value written under a key is what it recalls, whatever was there before; the other keys' values stand as they were."""
    rng = np.random.default_rng(seed)
    D, M, N = 5, 3, 4 * writes
    under = rng.integers(0, D, N)
    k, v, state = np.eye(D)[under], rng.integers(-9, 10, (N, M)).astype(float), rng.integers(-9, 10, (D, M)).astype(float)
    _, end = recurrence(k, k, v, None, np.ones(N), state, rule="delta")
    for key in range(D):
        written = np.flatnonzero(under == key)
        assert np.array_equal(end[key], v[written[-1]] if len(written) else state[key])


@given(seeds, st.sampled_from([1, 2, 4, 8]), st.integers(0, 9))
def test_on_rationals_the_delta_rule_is_exact(seed, chunk, N):
    """Object arrays of fractions through the loop-free form: equal to the definition; its transpose is the transpose of the definition, which is
    linear in v and the state."""
    rng = np.random.default_rng(seed)
    rational = np.vectorize(lambda a, b: Fraction(int(a), int(b)), otypes=[object])
    draw = lambda *shape: rational(rng.integers(-4, 5, shape), rng.integers(1, 5, shape))
    q, k, v, beta, state, dout, dstate = draw(N, 2), draw(N, 2), draw(N, 3), draw(N), draw(2, 3), draw(N, 3), draw(2, 3)
    out, end, residuals = delta_scan_forward(q, k, v, None, beta, state, chunk=chunk)
    expected = oracle.full_recurrence(q, k, v, None, beta, state)
    assert (out == expected[0]).all() and (end == expected[1]).all()
    dq, _, dv, _, _, ds = delta_scan_backward(dout, dstate, residuals)
    other_v, other_state = draw(N, 3), draw(2, 3)
    moved = oracle.full_recurrence(q, k, other_v, None, beta, other_state)
    assert (moved[0] * dout).sum() + (moved[1] * dstate).sum() == (other_v * dv).sum() + (other_state * ds).sum()
    other_q = draw(N, 2)                                                                         # and linear in q
    assert (oracle.full_recurrence(other_q, k, v, None, beta, state)[0] * dout).sum() == (other_q * dq).sum()


@pytest.mark.parametrize("rule, changes, words", [
    ("gated", {}, r"g: rule 'gated' needs it: an array \(..., Hkv, N\) or \(..., Hkv, N, D\)"),
    ("delta", {}, r"beta: rule 'delta' needs it: an array \(..., Hkv, N\)"),
    ("delta", {"g": (2, 5), "beta": (2, 5)}, "g: rule 'delta' has no g, got an array; leave it None"),
    ("gated", {"g": (2, 5), "beta": (2, 5)}, "beta: rule 'gated' has no beta"),
    ("gated", {"g": (2, 4)}, r"g: expected \(..., Hkv, N\) = \(2, 5\), got \(2, 4\): one for each key/value head and position"),
    ("gated", {"g": (2, 5, 4)}, r"g: expected \(..., Hkv, N, D\) = \(2, 5, 3\), got \(2, 5, 4\): .* and channel"),
    ("gated", {"g": (5,)}, r"g: expected \(..., Hkv, N\) = \(2, 5\), got \(5,\)"),
    ("gated_delta", {"g": (2, 5), "beta": (2, 5, 3)}, r"beta: expected \(..., Hkv, N\) = \(2, 5\), got \(2, 5, 3\)"),
])
def test_wrong_decays_and_write_strengths_are_explained(rule, changes, words):
    arrays = {"q": np.zeros((4, 5, 3)), "k": np.zeros((2, 5, 3)), "v": np.zeros((2, 5, 4)), **{n: np.zeros(s) for n, s in changes.items()}}
    with pytest.raises(ValueError, match=words):
        recurrence(**arrays, rule=rule)


@pytest.mark.parametrize("changes, words", [
    ({"g": np.zeros((2, 5), np.float32)}, "g is float32 and q is float64: expected g in float64; nothing is cast silently"),
    ({"beta": np.zeros((2, 5), int)}, "beta is int64 and q is float64: expected beta in float64"),
    ({"g": [[0.0]]}, "g: expected a NumPy or CuPy array, got list"),
    ({"beta": array_api_strict.zeros((2, 5))}, "q is a numpy array and beta a array_api_strict array"),
])
def test_decays_of_wrong_types_are_explained(changes, words):
    arrays = {"q": np.zeros((4, 5, 3)), "k": np.zeros((2, 5, 3)), "v": np.zeros((2, 5, 4)), "g": np.zeros((2, 5)), "beta": np.zeros((2, 5))}
    with pytest.raises(TypeError, match=words):
        recurrence(**(arrays | changes), rule="gated_delta")


def test_a_steps_decays_have_no_positions():
    q, v, g = np.zeros((4, 3)), np.zeros((2, 4)), np.zeros((2, 5))
    with pytest.raises(ValueError, match=r"g_t: expected \(..., Hkv, D\) = \(2, 3\), got \(2, 5\): one for each key/value head and channel"):
        recurrence_step(q, q[:2], v, g, rule="gated")
    with pytest.raises(ValueError, match=r"beta_t: rule 'delta' needs it: an array \(..., Hkv\)"):
        recurrence_step(q, q[:2], v, rule="delta")


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
