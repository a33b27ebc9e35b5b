"""Linear attention with φ and its normaliser: the public functions against eq. (4) to (12), forward and backward."""
from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import State, causal_linear_attention, causal_linear_attention_step, linear_attention, oracle, recurrence, vjp
from refattn.attention import (
    attention_backward,
    attention_forward,
    attention_functional_backward,
    attention_functional_forward,
    linear_attention_read,
    linear_attention_state,
)
from refattn.causal import causal_masked_backward, causal_masked_forward, causal_scan_backward, causal_scan_forward, running_product
from refattn.features import feature_map
from refattn.linear import full_product, linear_backward, linear_forward
from refattn.testing import budgets, laws
from refattn.testing.strategies import cases, strided

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
seeds = st.integers(0, 2**32 - 1)


def elu1_slope(x):
    return np.where(x > 0, 1.0, np.exp(np.minimum(x, 0)))


def state_of(c, rng):
    """A past: z > 0, as sums of positive features are."""
    return State(c.state, np.abs(rng.standard_normal(c.state.shape[:-1])).astype(c.state.dtype))


def oracle_arrays(q, k, v, S, z, **options):
    out, (S, z) = oracle.causal_linear_attention(q, k, v, (S, z), **options)
    return out, S, z


def lengths_of(c, rng):
    return (rng.integers(0, c.dims.N + 1, c.q.shape[:-2]), rng.integers(0, c.dims.L + 1, c.k.shape[:-2]))


def spoiled(x, lengths, with_):
    """x with garbage behind each length."""
    x = x.copy()
    for at in np.ndindex(x.shape[:-2]):
        x[at][lengths[at]:] = with_
    return x


# --- causal, with states -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_causal_attention_is_the_recurrence_within_the_budget(dtype, data):
    """Eq. (12)."""
    c, rng = data.draw(cases(dtype=dtype, longest=40)), np.random.default_rng(data.draw(seeds))
    state, dz = state_of(c, rng), rng.standard_normal(c.state.shape[:-1]).astype(c.state.dtype)
    eps = data.draw(st.sampled_from([0, 1e-6, 0.5]))
    (out, end), pullback = vjp(causal_linear_attention, c.q, c.k, c.v, state, eps=eps)
    dq, dk, dv, start = pullback(c.dout, State(c.dstate, dz))
    assert [x.dtype for x in (out, end.S, end.z, dq, dk, dv, *start)] == [c.q.dtype, *[c.state.dtype] * 2, *[c.q.dtype] * 3, *[c.state.dtype] * 2]
    b = budgets.attention_budget(c.q, c.k, c.v, *state, c.dout, c.dstate, dz, phi=oracle.eq7, dphi=elu1_slope, eps=eps)
    expected, (S, z) = oracle.causal_linear_attention(c.q, c.k, c.v, state, eps=eps)
    wide = [x.astype(np.float64) for x in (c.q, c.k, c.v, *state)]
    (_, _), exact = vjp(causal_linear_attention, *wide[:3], State(*wide[3:]), eps=eps)
    gq, gk, gv, gs = exact(c.dout.astype(float), State(c.dstate.astype(float), dz.astype(float)))
    for name, x, y, bound in (("out", out, expected, b.out), ("S", end.S, S, b.S), ("z", end.z, z, b.z), ("dq", dq, gq, b.dq),
                              ("dk", dk, gk, b.dk), ("dv", dv, gv, b.dv), ("dS", start.S, gs.S, b.dS), ("dz", start.z, gs.z, b.dz)):
        budgets.assert_within(x, y, bound, name)


@given(cases(longest=40), seeds, st.sampled_from([0, 1e-6, 0.5]))
def test_backward_is_the_transpose_of_the_recurrence(c, seed, eps):
    """Eq. (13) to (15)."""
    rng = np.random.default_rng(seed)
    state, dz = state_of(c, rng), rng.standard_normal(c.state.shape[:-1])
    _, pullback = vjp(causal_linear_attention, c.q, c.k, c.v, state, eps=eps)
    dq, dk, dv, start = pullback(c.dout, State(c.dstate, dz))
    b = budgets.attention_budget(c.q, c.k, c.v, *state, c.dout, c.dstate, dz, phi=oracle.eq7, dphi=elu1_slope, eps=eps)
    laws.law_backward_is_the_transpose(lambda *x: oracle_arrays(*x, eps=eps), (c.q, c.k, c.v, *state), (dq, dk, dv, *start),
                                       (b.dq, b.dk, b.dv, b.dS, b.dz), (c.dout, c.dstate, dz), rng)


def test_every_gradient_element_is_the_complex_steps(rng):
    """Eq. (13) to (15)."""
    q, k, v = rng.standard_normal((2, 4, 3, 2)), rng.standard_normal((2, 2, 3, 2)), rng.standard_normal((2, 2, 3, 3))
    state = State(rng.standard_normal((2, 2, 2, 3)), rng.random((2, 2, 2)))
    cotangents = rng.standard_normal(q.shape[:-1] + (3,)), rng.standard_normal((2, 2, 2, 3)), rng.standard_normal((2, 2, 2))
    _, pullback = vjp(causal_linear_attention, q, k, v, state)
    dq, dk, dv, start = pullback(cotangents[0], State(*cotangents[1:]))
    b = budgets.attention_budget(q, k, v, *state, *cotangents, phi=oracle.eq7, dphi=elu1_slope)
    expected = laws.gradient(oracle_arrays, (q, k, v, *state), cotangents)
    for name, x, y, bound in zip("qkvSz", (dq, dk, dv, *start), expected, (b.dq, b.dk, b.dv, b.dS, b.dz), strict=True):
        budgets.assert_within(x, y, 2 * bound, "d" + name)


@given(cases(longest=40), seeds, st.data())
def test_whole_split_and_step_by_step_give_the_same(c, seed, data):
    """Eq. (16) to (19)."""
    rng = np.random.default_rng(seed)
    state = state_of(c, rng)
    b = budgets.attention_budget(c.q, c.k, c.v, *state, c.dout, c.dstate, c.dstate[..., 0], phi=oracle.eq7, dphi=elu1_slope)
    whole, end = causal_linear_attention(c.q, c.k, c.v, state)
    at = data.draw(st.integers(0, c.dims.N))
    head, s = causal_linear_attention(c.q[..., :at, :], c.k[..., :at, :], c.v[..., :at, :], state)
    outs = [head]
    for t in range(at, c.dims.N):
        out_t, s = causal_linear_attention_step(c.q[..., t, :], c.k[..., t, :], c.v[..., t, :], s)
        outs.append(out_t[..., None, :])
    budgets.assert_within(np.concatenate(outs, -2), whole, 2 * b.out)
    budgets.assert_within(s.S, end.S, 2 * b.S, "S")
    budgets.assert_within(s.z, end.z, 2 * b.z, "z")


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_the_steps_backward_is_that_of_a_sequence_of_one(dtype, data):
    c, rng = data.draw(cases(dtype=dtype, longest=1).filter(lambda c: c.dims.N == 1)), np.random.default_rng(data.draw(seeds))
    state, dz = state_of(c, rng), rng.standard_normal(c.state.shape[:-1]).astype(c.state.dtype)
    (out, end), pullback = vjp(causal_linear_attention_step, *(x[..., 0, :] for x in (c.q, c.k, c.v)), state)
    (whole, end2), pullback2 = vjp(causal_linear_attention, c.q, c.k, c.v, state)
    b = budgets.attention_budget(c.q, c.k, c.v, *state, c.dout, c.dstate, dz, phi=oracle.eq7, dphi=elu1_slope)
    budgets.assert_within(out, whole[..., 0, :], 2 * b.out[..., 0, :])
    budgets.assert_within(end.S, end2.S, 2 * b.S)
    *got, ds = pullback(c.dout[..., 0, :], State(c.dstate, dz))
    *expected, ds2 = pullback2(c.dout, State(c.dstate, dz))
    for name, x, y, bound in zip("qkv", got, expected, (b.dq, b.dk, b.dv), strict=True):
        assert x.dtype == c.q.dtype
        budgets.assert_within(x, y[..., 0, :], 2 * bound[..., 0, :], "d" + name)
    budgets.assert_within(ds.S, ds2.S, 2 * b.dS, "dS")
    budgets.assert_within(ds.z, ds2.z, 2 * b.dz, "dz")


@given(cases(longest=40), seeds)
def test_missing_states_and_cotangents_count_as_zero(c, seed):
    zeros = State(np.zeros_like(c.state), np.zeros_like(c.state[..., 0]))
    (out, end), without = vjp(causal_linear_attention, c.q, c.k, c.v)
    (out2, end2), with_ = vjp(causal_linear_attention, c.q, c.k, c.v, zeros)
    laws.law_equal_bits({"with": [out2, *end2], "without": [out, *end]})
    laws.law_equal_bits({"zeros": with_(c.dout, zeros)[:3], "None": without(c.dout, None), "left out": without(c.dout)})
    laws.law_equal_bits({"zeros": without(np.zeros_like(out), State(c.dstate, zeros.z)), "None": without(None, State(c.dstate, None))})
    _, given_none = vjp(causal_linear_attention, c.q, c.k, c.v, None)
    assert given_none(c.dout)[3] is None and len(without(c.dout)) == 3


# --- both forms, with lengths and cross ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_padding_changes_nothing_and_garbage_in_it_reaches_nothing(dtype, causal, data):
    c, rng = data.draw(cases(dtype=dtype, cross=not causal, longest=40)), np.random.default_rng(data.draw(seeds))
    nq, nk = lengths_of(c, rng)
    garbage = data.draw(st.sampled_from([np.nan, np.inf, 3e4]))
    options = {"causal": causal, "query_lengths": nq, "key_lengths": nk, "eps": data.draw(st.sampled_from([0, 1e-6]))}
    q, k, v, dout = spoiled(c.q, nq, garbage), spoiled(c.k, nk, garbage), spoiled(c.v, nk, garbage), spoiled(c.dout, nq, garbage)
    out, pullback = vjp(linear_attention, q, k, v, **options)
    clean, clean_pullback = vjp(linear_attention, *(spoiled(x, n, 0) for x, n in ((c.q, nq), (c.k, nk), (c.v, nk))), **options)
    laws.law_equal_bits({"clean": [clean, *clean_pullback(spoiled(c.dout, nq, 0))], "garbage": [out, *pullback(dout)]})
    zero = np.zeros((*c.state.shape[:-1], c.dims.M))
    b = budgets.attention_budget(c.q, c.k, c.v, zero, zero[..., 0], c.dout, zero, zero[..., 0], phi=oracle.eq7, dphi=elu1_slope, dtype=dtype,
                                 **options)
    budgets.assert_within(out, oracle.linear_attention(c.q, c.k, c.v, **options), b.out)
    wide = [x.astype(np.float64) for x in (c.q, c.k, c.v)]
    _, exact = vjp(linear_attention, *wide, **options)
    for name, x, y, bound in zip("qkv", pullback(dout), exact(spoiled(c.dout, nq, 0).astype(float)), (b.dq, b.dk, b.dv), strict=True):
        budgets.assert_within(x, y, bound, "d" + name)
    for at in np.ndindex(nq.shape):
        assert not out[at][nq[at]:].any() and not pullback(dout)[0][at][nq[at]:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_what_all_keys_leave_behind_can_be_read_later_and_again(dtype, data):
    """Bit for bit: state and read are the two halves of the whole, in which no key meets a query."""
    c, rng = data.draw(cases(dtype=dtype, cross=True, longest=40)), np.random.default_rng(data.draw(seeds))
    phi, eps = data.draw(st.sampled_from(["elu1", "relu"])), data.draw(st.sampled_from([0, 1e-6, 0.5]))
    _, nk = lengths_of(c, rng)
    state = linear_attention_state(spoiled(c.k, nk, np.nan), spoiled(c.v, nk, np.nan), feature_map=phi, key_lengths=nk)
    kept = State(*(x.copy() for x in state))
    whole = linear_attention(c.q, c.k, c.v, feature_map=phi, eps=eps, key_lengths=nk)
    for _ in range(2):
        laws.law_equal_bits({"read": linear_attention_read(c.q, state, feature_map=phi, eps=eps), "whole": whole})
        laws.law_equal_bits({"after": [*state], "before": [*kept]})
    assert {x.dtype for x in state} == {c.state.dtype}


def test_any_array_library_reads_what_it_kept(rng):
    xp = pytest.importorskip("array_api_strict")
    q, k, v = (rng.integers(0, 4, shape).astype("f8") for shape in ((2, 6, 4, 5), (2, 3, 7, 5), (2, 3, 7, 2)))
    lengths = np.array([7, 4])
    state = linear_attention_state(xp.asarray(k), xp.asarray(v), feature_map="relu", key_lengths=lengths)
    expected = linear_attention_state(k, v, feature_map="relu", key_lengths=lengths)
    laws.law_equal_bits({"strict": [np.asarray(x) for x in state], "numpy": [*expected]})
    out = linear_attention_read(xp.asarray(q), state, feature_map="relu", eps=0.5)
    laws.law_equal_bits({"strict": np.asarray(out), "numpy": linear_attention_read(q, expected, feature_map="relu", eps=0.5)})
    for wrong in ((*expected,), None, k):
        with pytest.raises(TypeError, match=r"state: expected State\(S, z\) from linear_attention_state, got "):
            linear_attention_read(q, wrong)


@pytest.mark.parametrize("causal", [False, True])
@given(st.data())
def test_backward_with_lengths_is_the_transpose_of_the_definition(causal, data):
    c, rng = data.draw(cases(cross=not causal, longest=40)), np.random.default_rng(data.draw(seeds))
    nq, nk = lengths_of(c, rng) if data.draw(st.booleans()) else (None, None)
    options = {"causal": causal, "query_lengths": nq, "key_lengths": nk}
    out, pullback = vjp(linear_attention, c.q, c.k, c.v, **options)
    zero = np.zeros((*c.state.shape[:-1], c.dims.M))
    b = budgets.attention_budget(c.q, c.k, c.v, zero, zero[..., 0], c.dout, zero, zero[..., 0], phi=oracle.eq7, dphi=elu1_slope, **options)
    laws.law_backward_is_the_transpose(lambda *x: (oracle.linear_attention(*x, **options),), (c.q, c.k, c.v), pullback(c.dout),
                                       (b.dq, b.dk, b.dv), (c.dout,), rng)


@given(cases(longest=40), seeds)
def test_lengths_of_the_first_axes_serve_all_heads(c, seed):
    if not c.dims.lead:
        return
    rng = np.random.default_rng(seed)
    nq, nk = rng.integers(0, c.dims.N + 1, c.dims.lead[0]), rng.integers(0, c.dims.N + 1, c.dims.lead[0])

    def spread(n, shape):
        return np.broadcast_to(n.reshape(-1, *(1,) * (len(shape) - 1)), shape)

    laws.law_equal_bits({
        "per head": [linear_attention(c.q, c.k, c.v, query_lengths=spread(nq, c.q.shape[:-2]), key_lengths=spread(nk, c.k.shape[:-2]))],
        "per sequence": [linear_attention(c.q, c.k, c.v, query_lengths=nq, key_lengths=nk)],
        "as a list": [linear_attention(c.q, c.k, c.v, query_lengths=nq.tolist(), key_lengths=nk)]})


@pytest.mark.parametrize("causal", [False, True])
@given(st.data())
def test_fast_masked_and_scan_agree(causal, data):
    """One φ, one normaliser, any product: the functional forms that other array libraries run."""
    c, rng = data.draw(cases(cross=not causal, longest=40)), np.random.default_rng(data.draw(seeds))
    nq, nk = lengths_of(c, rng)
    phi, start = feature_map("elu1"), np.abs(rng.standard_normal((*c.state.shape[:-1], c.dims.M + 1)))
    dend = rng.standard_normal(start.shape)
    b = budgets.attention_budget(c.q, c.k, c.v, start[..., :-1], start[..., -1], c.dout, dend[..., :-1], dend[..., -1], phi=oracle.eq7,
                                 dphi=elu1_slope, causal=causal, query_lengths=nq, key_lengths=nk)
    bounds = (b.out, np.concatenate([b.S, b.z[..., None]], -1), b.dq, b.dk, b.dv, np.concatenate([b.dS, b.dz[..., None]], -1))
    product = running_product if causal else full_product
    chunk = data.draw(st.sampled_from([1, 3, 16, 32]))
    out, end = attention_forward(product, c.q, c.k, c.v, start, phi, 1e-6, nq, nk, chunk)
    fast = [out, end, *attention_backward(product, c.dout, dend, c.q, c.k, c.v, start, out, phi, 1e-6, nq, nk, chunk)]
    forms = [(causal_masked_forward, causal_masked_backward), (causal_scan_forward, causal_scan_backward)] if causal else [
        (linear_forward, linear_backward)]
    for forward, backward in forms:
        out, end, residuals = attention_functional_forward(forward, c.q, c.k, c.v, start, phi, 1e-6, nq, nk)
        for x, y, bound in zip(fast, [out, end, *attention_functional_backward(backward, c.dout, dend, residuals)], bounds, strict=True):
            budgets.assert_within(x, y, 2 * bound, forward.__name__)


@given(cases(dtype=np.float32, longest=40), seeds)
def test_constant_values_pass_through(c, seed):
    """Eq. (4). ε = 0: a weighted mean of one value is that value, to the rounding of one quotient of equal sums."""
    row = np.random.default_rng(seed).integers(-3, 4, c.dims.M).astype(np.float32)
    v = np.broadcast_to(row, c.v.shape)
    n = c.dims.N + c.dims.D + 2
    for causal in (False, True):
        out = linear_attention(c.q, c.k, v, causal=causal, eps=0)
        budgets.assert_within(out, np.broadcast_to(row, out.shape), budgets.gamma(2 * n + 2, np.float32) * np.abs(row))


@given(cases(longest=40), seeds)
def test_linear_in_v_and_blind_to_the_length_of_phi_q(c, seed):
    """Eq. (12). With φ = identity and ε = 0 the map is linear in v, and a positive factor on q cancels; powers of two do so exactly."""
    rng = np.random.default_rng(seed)
    q, k = np.abs(c.q) + 0.1, np.abs(c.k) + 0.1
    laws.law_equal_bits({
        "4·f(v)": [4 * linear_attention(q, k, c.v, feature_map="identity", eps=0, causal=True)],
        "f(4·v)": [linear_attention(q, k, 4 * c.v, feature_map="identity", eps=0, causal=True)],
        "4·f(v), 8·q": [4 * linear_attention(8 * q, k, c.v, feature_map="identity", eps=0, causal=True)]})
    w = rng.standard_normal(c.v.shape)
    f = [linear_attention(q, k, x, feature_map="identity", eps=0, causal=True) for x in (c.v, w, c.v + w)]
    zero = np.zeros((*c.state.shape[:-1], c.dims.M))
    b = budgets.attention_budget(q, k, np.abs(c.v) + np.abs(w), zero, zero[..., 0], c.dout, zero, zero[..., 0], phi=np.abs, dphi=np.ones_like,
                                 eps=0)
    budgets.assert_within(f[0] + f[1], f[2], 3 * b.out)


@given(cases(longest=40), seeds)
def test_strides_do_not_matter_and_inputs_stay_untouched(c, seed):
    rng = np.random.default_rng(seed)
    state, dz = state_of(c, rng), rng.standard_normal(c.state.shape[:-1])
    plain = (c.q, c.k, c.v, *state, c.dout, c.dstate, dz)
    awkward = [strided(x, rng) for x in plain]

    def everything(q, k, v, S, z, dout, dS, dz):
        (out, end), pullback = vjp(causal_linear_attention, q, k, v, State(S, z))
        *grads, start = pullback(dout, State(dS, dz))
        full, back = vjp(linear_attention, q, k, v)
        return [out, *end, *grads, *start, full, *back(dout)]

    laws.law_equal_bits({"contiguous": everything(*plain), "strided": everything(*awkward)})
    for x, y in zip(plain, awkward, strict=True):
        assert np.array_equal(x, y)


@given(cases(longest=40), st.data())
def test_a_broadcast_cotangent_counts_as_what_it_shows(c, data):
    shown = np.broadcast_to(np.asarray(data.draw(st.integers(-3, 3))) * 0.5, c.dout.shape)
    for f, arrays in ((linear_attention, (c.q, c.k, c.v)), (causal_linear_attention, (c.q, c.k, c.v))):
        _, pullback = vjp(f, *arrays)
        laws.law_equal_bits({"copied": pullback(shown.copy()), "broadcast": pullback(shown)})


# --- rows without keys, feature maps, threads ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eps", [0, 1e-6])
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_without_keys_is_zero_and_so_are_its_gradients(eps, causal, rng):
    q, k, v = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((2, 3, 5, 2))
    out, pullback = vjp(linear_attention, q, k, v, causal=causal, eps=eps, key_lengths=[0, 5])
    grads = pullback(rng.standard_normal(out.shape))
    assert not out[0].any() and not any(g[0].any() for g in grads) and all(np.isfinite(g).all() for g in grads) and out[1].all()
    no_keys = linear_attention(q, k[..., :0, :], v[..., :0, :], eps=eps)
    assert no_keys.shape == out.shape and not no_keys.any()


@pytest.mark.parametrize("name", ["elu1", "relu", "relu2", "exp", "softmax", "poly2", "taylor2", "dpfp"])
def test_every_feature_map_gives_the_definition_and_its_transpose(name, rng):
    """The definition with φ by the same function: what is tested is everything around φ."""
    phi = feature_map(name)
    q, k, v = rng.standard_normal((2, 4, 35, 3)), rng.standard_normal((2, 2, 35, 3)), rng.standard_normal((2, 2, 35, 4))
    dout = rng.standard_normal((2, 4, 35, 4))
    for causal in (False, True):
        out, pullback = vjp(linear_attention, q, k, v, feature_map=name, causal=causal)
        fq, fk = phi.forward(q), phi.forward(k)
        zero = np.zeros((2, 2, fq.shape[-1], 4))
        b = budgets.attention_budget(fq, fk, v, zero, zero[..., 0], dout, zero, zero[..., 0], phi=np.abs, dphi=np.ones_like, causal=causal)
        budgets.assert_within(out, oracle.linear_attention(q, k, v, phi=phi.forward, causal=causal), b.out)
        dfq, dfk, dv = vjp(linear_attention, fq, fk, v, feature_map="identity", causal=causal)[1](dout)
        dq, dk, dv2 = pullback(dout)
        # φ's transpose is linear with finitely many terms: it carries the budget of dφ through as it carries the values
        for name_, x, y, bound, at in (("dq", dq, dfq, b.dq, q), ("dk", dk, dfk, b.dk, k)):
            reach = sum(np.abs(phi.backward(_only(bound, f), at)) for f in range(bound.shape[-1]))
            size = sum(np.abs(phi.backward(_only(y, f), at)) for f in range(bound.shape[-1]))
            budgets.assert_within(x, phi.backward(y, at), 2 * reach + budgets.gamma(4 * fq.shape[-1] + 16, np.float64) * size, name_)
        budgets.assert_within(dv2, dv, 2 * b.dv, "dv")


def _only(x, f):
    y = np.zeros_like(x)
    y[..., f] = x[..., f]
    return y


def test_a_users_own_pair_of_functions_is_a_feature_map(rng):
    q, k, v = (rng.standard_normal((2, 6, n)) for n in (3, 3, 2))
    mine = (lambda x: x**2 + 1, lambda dy, x: 2 * x * dy)
    out, pullback = vjp(linear_attention, q, k, v, feature_map=mine, causal=True)
    options = {"phi": lambda x: x**2 + 1, "causal": True}
    zero = np.zeros((2, 3, 2))
    b = budgets.attention_budget(q, k, v, zero, zero[..., 0], dout := rng.standard_normal(out.shape), zero, zero[..., 0],
                                 phi=lambda x: x**2 + 1, dphi=lambda x: 2 * x)
    budgets.assert_within(out, oracle.linear_attention(q, k, v, **options), b.out)
    laws.law_backward_is_the_transpose(lambda *x: (oracle.linear_attention(*x, **options),), (q, k, v), pullback(dout), (b.dq, b.dk, b.dv),
                                       (dout,), rng)


def test_a_long_sequence_on_threads_equals_the_scan(rng):
    q, k, v, dout = (rng.standard_normal((2, 3, 1100, 16)).astype(np.float32) for _ in range(4))
    out, pullback = vjp(linear_attention, q, k, v, causal=True)
    start, phi = np.zeros((2, 3, 16, 17), np.float32), feature_map("elu1")
    out2, _, residuals = attention_functional_forward(causal_scan_forward, q, k, v, start, phi, 1e-6)
    b = budgets.attention_budget(q, k, v, start[..., :-1], start[..., -1], dout, start[..., :-1], start[..., -1], phi=oracle.eq7,
                                 dphi=elu1_slope)
    for x, y, bound in zip((out, *pullback(dout)), (out2, *attention_functional_backward(causal_scan_backward, dout, None, residuals)),
                           (b.out, b.dq, b.dk, b.dv, None), strict=False):
        budgets.assert_within(x, y, 2 * bound)


@pytest.mark.parametrize("f, options", [(recurrence, {}), (causal_linear_attention, {}), (linear_attention, {"causal": True})])
def test_extra_memory_does_not_grow_with_the_sequence(f, options, rng):
    """Beyond inputs and outputs, forward and backward: eight times the positions, not one buffer more."""
    def peak(work):
        work()
        tracemalloc.start()
        try:
            result = work()
            after, most = tracemalloc.get_traced_memory()
            del result
            return most - after
        finally:
            tracemalloc.stop()

    peaks = []
    for N in (2**14, 2**17):
        q, k, v, dout = (rng.standard_normal((1, N, 16)).astype(np.float32) for _ in range(4))
        pull = vjp(f, q, k, v, **options)[1]
        peaks.append((peak(lambda q=q, k=k, v=v: f(q, k, v, **options)), peak(lambda pull=pull, dout=dout: pull(dout))))
    for short, long in zip(*peaks, strict=True):
        assert long <= short + 2**16 < 2**24, peaks               # 64 KiB for Python's own objects; one number per row would be 512


def test_short_sequences_side_by_side_in_one_array_give_the_same_bits(rng):
    packed = rng.standard_normal((9, 5, 4, 2, 8)).astype(np.float32)                     # (B, N, q k v do, H, D): B and H have no common step
    views = [packed[:, :, i].swapaxes(1, 2) for i in range(4)]
    results = []
    for q, k, v, dout in (views, [x.copy() for x in views]):
        out, pull = vjp(linear_attention, q, k, v, causal=True, key_lengths=np.array([5, 0, 3, 4, 5, 1, 2, 5, 5]))
        results.append((out, *pull(dout)))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
