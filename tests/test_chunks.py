"""What every rule with a gate or a delta obeys, in all its forms: chunked, scan, masked, step; and so do their transposes."""
from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import chunks as chunks_module
from refattn import oracle
from refattn.causal import causal_masked_backward, causal_masked_forward
from refattn.delta import (
    delta_chunked_backward,
    delta_chunked_forward,
    delta_masked_backward,
    delta_masked_forward,
    delta_scan_backward,
    delta_scan_forward,
    delta_step,
    delta_step_backward,
)
from refattn.gated import (
    gated_chunked_backward,
    gated_chunked_forward,
    gated_masked_backward,
    gated_masked_forward,
    gated_scan_backward,
    gated_scan_forward,
    gated_step,
    gated_step_backward,
)
from refattn.testing import laws
from refattn.testing.budgets import assert_within
from refattn.testing.rules_budget import rules_budget
from refattn.testing.strategies import MIXTURES, Dims, RuleCase, exact_writes, log_decays, rule_cases, strided

RULES = ("gated", "delta", "gated_delta")
FORMS = {("gated", "chunked"): (gated_chunked_forward, gated_chunked_backward), ("gated", "scan"): (gated_scan_forward, gated_scan_backward),
         ("delta", "chunked"): (delta_chunked_forward, delta_chunked_backward), ("delta", "scan"): (delta_scan_forward, delta_scan_backward),
         ("gated", "masked"): (gated_masked_forward, gated_masked_backward), ("delta", "masked"): (delta_masked_forward, delta_masked_backward)}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
chunks = st.sampled_from([1, 2, 4, 8])
seeds = st.integers(0, 2**32 - 1)
each_rule = pytest.mark.parametrize("rule", RULES)


def inputs(c):
    """What the forms of c's rule take before the state: gated has no beta, delta has g even where it is None."""
    return (c.q, c.k, c.v, c.g) if c.beta is None else (c.q, c.k, c.v, c.g, c.beta)


def names(c):
    """The results of `run`: outputs, then gradients."""
    return ["out", "state", "dq", "dk", "dv", *(["dg"] if c.g is not None else []), *(["dbeta"] if c.beta is not None else []), "dstate"]


def run(form, c, chunk=4):
    """Outputs and gradients of one form, what the rule does not have left out."""
    if form == "step":
        return stepped(c)
    forward, backward = FORMS["gated" if c.beta is None else "delta", form]
    out, end, residuals = forward(*inputs(c), c.state, **({} if form == "masked" else {"chunk": chunk}))
    return [x for x in (out, end, *backward(c.dout, c.dstate, residuals)) if x is not None]


def stepped(c):
    """The step form for a whole sequence, and its backward from the last position to the first."""
    step, back = (gated_step, gated_step_backward) if c.beta is None else (delta_step, delta_step_backward)
    arrays, N = inputs(c), c.dims.N

    def at(t):
        return [None if x is None else x[..., t, :] if x.ndim == c.k.ndim else x[..., t] for x in arrays]

    states, out = [c.state], np.zeros(c.dims.out, c.state.dtype)
    for t in range(N):
        out[..., t, :], S = step(states[-1], *at(t))
        states.append(S)
    gradients, R = [None if x is None else np.zeros(x.shape, c.state.dtype) for x in arrays], c.dstate
    for t in reversed(range(N)):
        R, *d = back(c.dout[..., t, :], R, states[t], *at(t))
        for to, x in zip(gradients, d, strict=True):
            if to is not None:
                (to[..., t, :] if to.ndim == c.k.ndim else to[..., t])[...] = x
    return [out, states[-1], *(x for x in gradients if x is not None), R]


def positions(name, c, x, rows):
    """Rows of x, which has an axis for features or, as beta and one decay a head, none."""
    per_head = name in ("beta", "dbeta") or name in ("g", "dg") and c.g.ndim < c.k.ndim
    return x[..., rows] if per_head else x[..., rows, :]


def part(c, rows):
    """Positions `rows` of a case."""
    cut = {n: positions(n, c, getattr(c, n), rows) for n in ("q", "k", "v", "g", "beta", "dout") if getattr(c, n) is not None}
    n = cut["k"].shape[-2]
    return c._replace(dims=c.dims._replace(N=n, L=n), **cut)


def wide(c):
    return c.each(lambda x: x.astype(np.float64))


def definition(c):
    """The oracle as a function of the arrays that the rule has, and these arrays in float64."""
    c = wide(c)
    has_g, has_beta = c.g is not None, c.beta is not None

    def f(q, k, v, *more):
        *more, state = more
        return oracle.full_recurrence(q, k, v, more[0] if has_g else None, more[-1] if has_beta else None, state)

    return f, [x for x in (c.q, c.k, c.v, c.g, c.beta, c.state) if x is not None]


# --- exact laws: no tolerance ------------------------------------------------------------------------------------------------------

@each_rule
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_where_sums_are_exact_every_form_gives_the_definition_bit_for_bit(rule, dtype, data):
    """The gradients are those of the steps in float64, and exactly the transpose of the definition."""
    c = data.draw(rule_cases(rule, dtype=dtype, exact=True))
    chunk, f, arrays = data.draw(chunks), *definition(c)
    out, end, *gradients = run("step", wide(c))
    laws.law_equal_bits({"oracle": f(*arrays), "step": [out, end]})
    laws.law_backward_is_the_transpose(f, arrays, gradients, None, (wide(c).dout, wide(c).dstate), np.random.default_rng(data.draw(seeds)))
    more = c.state.dtype
    dtypes = [dtype, more, dtype, dtype, dtype, *[more] * (len(gradients) - 3)]
    expected = [x.astype(t) for x, t in zip((out, end, *gradients), dtypes, strict=True)]
    got = {form: run(form, c, chunk) for form in ("chunked", "scan", "masked")}
    laws.law_equal_bits({"oracle": expected, **got})
    for form in got:
        assert [x.dtype for x in got[form]] == [np.dtype(t) for t in dtypes], form


@each_rule
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@given(st.data())
def test_those_sums_are_exact_because_they_fit(rule, dtype, data):
    """The same sums without signs: of |q|, |k|, … raised to 1, so that whatever lies between inputs and results is no larger than they."""
    c = data.draw(rule_cases(rule, dtype=dtype, exact=True))
    one = wide(c).each(np.abs)
    q, v, state, dout, dstate = (np.maximum(x, 1) for x in (one.q, one.v, one.state, one.dout, one.dstate))
    signed = one._replace(q=q, v=v if c.beta is None else -v, g=wide(c).g, beta=None if c.beta is None else -one.beta, state=state, dout=dout,
                          dstate=dstate)                                            # S = P + |β| |k| (|v| + Pᵀ|k|)ᵀ
    results = run("step", signed)
    largest = max(np.abs(x).max(initial=0) for x in results)
    assert largest * (16 if c.beta is not None else 1) <= 2.0 ** (53 if dtype == np.float64 else 24)
    if dtype == np.float16:
        rounded = [x for name, x in zip(names(c), results, strict=True) if name in ("out", "dq", "dk", "dv")]
        assert max(np.abs(x).max(initial=0) for x in rounded) <= np.finfo(np.float16).max


@each_rule
@given(st.data())
def test_splitting_the_sequence_changes_nothing(rule, data):
    c, chunk = data.draw(rule_cases(rule, exact=True)), data.draw(chunks)
    at = data.draw(st.integers(0, c.dims.N))
    head, tail = part(c, slice(None, at)), part(c, slice(at, None))
    for form in ("chunked", "scan"):
        middle = run(form, head, chunk)[1]
        back = run(form, tail._replace(state=middle), chunk)
        first = run(form, head._replace(dstate=back[-1]), chunk)
        joined = [np.concatenate([x, y], -2 if x.ndim == c.k.ndim else -1) for x, y in zip(first[2:-1], back[2:-1], strict=True)]
        laws.law_equal_bits({"whole": run(form, c, chunk),
                             "split": [np.concatenate([first[0], back[0]], -2), back[1], *joined, first[-1]]})


@each_rule
@given(st.data())
def test_the_future_never_reaches_the_past_and_the_past_never_the_cotangents_of_the_future(rule, data):
    """Bit for bit, on any numbers: what is hidden is multiplied by 0 at most."""
    c, other = data.draw(rule_cases(rule, mixtures=("none", "mild", "resets"))), np.random.default_rng(data.draw(seeds))
    chunk, at = data.draw(chunks), data.draw(st.integers(0, c.dims.N))

    def changed(x, rows):
        y = x.copy()
        (y[..., rows, :] if x.ndim == c.k.ndim else y[..., rows])[...] *= other.uniform(0.1, 2)
        return y

    late, early = slice(at, None), slice(None, at)
    future = c._replace(**{n: changed(getattr(c, n), late) for n in ("q", "k", "v", "g", "beta") if getattr(c, n) is not None},
                        dstate=-c.dstate)
    past = c._replace(q=changed(c.q, early), dout=changed(c.dout, early))
    for form in ("chunked", "scan", "masked"):
        assert np.array_equal(run(form, c, chunk)[0][..., :at, :], run(form, future, chunk)[0][..., :at, :])
        for name, x, y in zip(names(c)[3:-1], run(form, c, chunk)[3:-1], run(form, past, chunk)[3:-1], strict=True):
            assert np.array_equal(positions(name, c, x, late), positions(name, c, y, late)), name


@each_rule
@given(st.data())
def test_padding_changes_nothing(rule, data):
    """Positions behind the last that write nothing, forget nothing and are not read."""
    c, chunk, more = data.draw(rule_cases(rule, exact=True)), data.draw(chunks), data.draw(st.integers(1, 9))
    rng, N = np.random.default_rng(data.draw(seeds)), c.dims.N

    def longer(x, zero=False):
        fill = rng.integers(-2, 3, (*c.dims.lead, x.shape[len(c.dims.lead)], more, *x.shape[len(c.dims.lead) + 2:]))
        return np.concatenate([x, 0 * fill if zero else fill], len(c.dims.lead) + 1)

    zero = ("k", "g", "dout")
    padded = c._replace(dims=c.dims._replace(N=N + more, L=N + more), **{
        n: longer(getattr(c, n), n in zero) for n in ("q", "k", "v", "g", "beta", "dout") if getattr(c, n) is not None})
    for form in ("chunked", "scan", "masked"):
        laws.law_equal_bits({"alone": run(form, c, chunk), "padded": [
            x if n in ("state", "dstate") else positions(n, c, x, slice(None, N))
            for n, x in zip(names(c), run(form, padded, chunk), strict=True)]})


@each_rule
@given(st.data())
def test_the_order_of_heads_and_batches_commutes(rule, data):
    c, chunk = data.draw(rule_cases(rule, exact=True)), data.draw(chunks)
    if c.dims.lead:
        order = np.random.default_rng(data.draw(seeds)).permutation(c.dims.lead[0])
        for form in ("chunked", "scan"):
            laws.law_equal_bits({"after": [x[order] for x in run(form, c, chunk)], "before": run(form, c.each(lambda x: x[order]), chunk)})


@each_rule
@given(st.data())
def test_strides_do_not_matter_and_inputs_stay_untouched(rule, data):
    c, chunk, rng = data.draw(rule_cases(rule, exact=True)), data.draw(chunks), np.random.default_rng(data.draw(seeds))
    awkward = c.each(lambda x: strided(x, rng))
    for form in ("chunked", "scan", "masked", "step"):
        laws.law_equal_bits({"contiguous": run(form, c, chunk), "strided": run(form, awkward, chunk)})
    for x, y in zip(c[1:], awkward[1:], strict=True):
        assert x is None or np.array_equal(x, y)


@each_rule
@given(st.data())
def test_no_state_and_no_cotangent_mean_zero(rule, data):
    c, chunk = data.draw(rule_cases(rule, exact=True)), data.draw(chunks)
    zeros = c._replace(state=0 * c.state, dstate=0 * c.dstate)
    for form in ("chunked", "scan"):
        laws.law_equal_bits({"zeros": run(form, zeros, chunk), "none": run(form, c._replace(state=None, dstate=None), chunk)})


@each_rule
@given(st.data())
def test_outputs_are_linear_in_values_and_state(rule, data):
    c, chunk, rng = data.draw(rule_cases(rule, exact=True)), data.draw(chunks), np.random.default_rng(data.draw(seeds))
    other = c._replace(v=rng.integers(-2, 3, c.v.shape) + 0.0, state=rng.integers(-2, 3, c.state.shape) + 0.0)
    both = c._replace(v=c.v + other.v, state=c.state + other.state)
    for form in ("chunked", "scan", "masked"):
        one, two = run(form, c, chunk), run(form, other, chunk)
        laws.law_equal_bits({"of the sum": run(form, both, chunk)[:2], "sum": [x + y for x, y in zip(one[:2], two[:2], strict=True)]})


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
@pytest.mark.parametrize("channels", [False, True])
@given(st.data())
def test_without_decay_it_is_the_rule_without_a_gate(rule, channels, data):
    c, chunk = data.draw(rule_cases(rule, exact=True, channels=channels)), data.draw(chunks)
    still = c._replace(g=0 * np.isfinite(c.g) * 1.0)
    for form in ("chunked", "scan", "masked"):
        got = [x for n, x in zip(names(c), run(form, still, chunk), strict=True) if n != "dg"]
        if rule == "gated":
            out, end, residuals = causal_masked_forward(c.q, c.k, c.v, c.state)
            plain = [out, end, *causal_masked_backward(c.dout, c.dstate, residuals)]
        else:
            plain = run(form, c._replace(g=None), chunk)
        laws.law_equal_bits({"without": plain, "with": got})


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
@given(st.data())
def test_one_decay_is_the_same_decay_for_every_channel(rule, data):
    """dg of the head is the sum over its channels. Bits where sums are exact, else each within its bound."""
    exact = data.draw(st.booleans())
    c, chunk = data.draw(rule_cases(rule, exact=exact, channels=False)), data.draw(chunks)
    equal = c._replace(g=np.repeat(c.g[..., None], c.dims.D, -1))
    bounds = [2 * x for x in budget(c)]
    for form in ("chunked", "scan", "masked", "step"):
        got = [x.sum(-1) if n == "dg" else x for n, x in zip(names(c), run(form, equal, chunk), strict=True)]
        for name, x, y, bound in zip(names(c), got, run(form, c, chunk), bounds, strict=True):
            assert_within(x, y, 0 if exact else bound, f"{form} {name}")


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
@given(st.data())
def test_a_reset_forgets_exactly(rule, data):
    """What lies before it changes no bit behind it, on any numbers; on exact ones a run that starts there with an empty state gives the same
    bits. Cotangents from behind it leave exact zeros before it, at g_t itself and at the state."""
    exact = data.draw(st.booleans())
    c = data.draw(rule_cases(rule, exact=exact, mixtures=("mild", "all")).filter(lambda c: c.dims.N))
    chunk, at, rng = data.draw(chunks), data.draw(st.integers(0, c.dims.N - 1)), np.random.default_rng(data.draw(seeds))
    g, dout = c.g.copy(), c.dout.copy()
    positions("dg", c, g, slice(at, at + 1))[...] = -np.inf
    dout[..., :at, :] = 0
    c = c._replace(g=g, dout=dout)
    tail = part(c, slice(at, None))._replace(state=None)
    before = {n: getattr(c, n).copy() for n in ("q", "k", "v", "g", "beta", "state") if getattr(c, n) is not None}
    for n, x in before.items():
        y = x if n == "state" else positions(n, c, x, slice(None, at))
        y[...] = rng.standard_normal(y.shape) - (1 if n == "g" else 0)
    for form in ("chunked", "scan", "masked", "step"):
        got, other = run(form, c, chunk), run(form, c._replace(**before), chunk)
        behind = [x if n == "state" else positions(n, c, x, slice(at, None)) for n, x in zip(names(c), got[:-1], strict=False)]
        for n, x, y in zip(names(c)[:-1], behind, other, strict=False):
            assert np.array_equal(x, y if n == "state" else positions(n, c, y, slice(at, None))), f"{form} {n}"
        for n, x in zip(names(c)[2:-1], got[2:-1], strict=True):
            assert not positions(n, c, x, slice(None, at)).any(), f"{form} {n}"
        assert not got[-1].any() and not positions("dg", c, got[names(c).index("dg")], slice(at, at + 1)).any()
        if exact:
            laws.law_equal_bits({"starts there": run(form, tail, chunk)[:-1] if form != "step" else behind, "reset": behind})


@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
@given(st.data())
def test_with_beta_0_nothing_is_written(rule, data):
    c, chunk, rng = data.draw(rule_cases(rule)), data.draw(chunks), np.random.default_rng(data.draw(seeds))
    c = c._replace(beta=0 * c.beta)
    other = c._replace(k=rng.standard_normal(c.k.shape), v=rng.standard_normal(c.v.shape))
    for form in ("chunked", "scan", "masked", "step"):
        result, changed = dict(zip(names(c), run(form, c, chunk), strict=True)), run(form, other, chunk)
        laws.law_equal_bits({"one": [result["out"], result["state"]], "other": changed[:2]})
        assert not result["dk"].any() and not result["dv"].any()
        if rule == "delta":
            assert np.array_equal(result["state"], c.state)


# --- laws with derived bounds --------------------------------------------------------------------------------------------------------

def budget(c, **options):
    return [x for x in rules_budget(c.q, c.k, c.v, c.g, c.beta, c.state, c.dout, c.dstate, **options) if x is not None]


@each_rule
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_rounding_stays_within_the_budget(rule, dtype, data):
    c = data.draw(rule_cases(rule, dtype=dtype))
    chunk, expected = data.draw(chunks), run("step", wide(c))
    bounds = {"chunked": budget(c, chunk=chunk), "scan": budget(c)}
    bounds["masked"] = bounds["scan"]
    if dtype in (np.float64, np.float32):
        bounds["step"] = budget(c, chunk=1)
    for form in bounds:
        for name, x, y, bound in zip(names(c), run(form, c, chunk), expected, bounds[form], strict=True):
            assert_within(x, y, bound, f"{form} {name}")


@each_rule
@pytest.mark.parametrize("length, most, N", [(1, 1, 8), (1, 2, 6), (2, 0.5, 6)])
def test_the_budget_is_tight_enough_to_see_one_part_in_a_thousand(rule, length, most, N, rng):
    """Planted in float32 in each result: unit keys and β in (0, 1) or (0, 2), keys of length 2 and β |k|² in (0, 2)."""
    d = Dims((2,), 2, 2, N, N, 8, 6)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
    k = draw(d.k)
    k *= np.float32(length) / np.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = -np.exp(rng.uniform(-4, 0, d.k[:-1])).astype(np.float32), rng.uniform(0, most, d.k[:-1]).astype(np.float32)
    c = RuleCase(d, draw(d.q), k, draw(d.v), g if "gated" in rule else None, beta if "delta" in rule else None, draw(d.state), draw(d.out),
                 draw(d.state))
    for name, x, bound in zip(names(c), run("step", wide(c)), budget(c, chunk=4), strict=True):
        assert (1e-3 * np.abs(x) > bound).any(), name


@each_rule
@given(st.data())
def test_backward_is_the_transpose_of_the_definition(rule, data):
    c = data.draw(rule_cases(rule))
    (f, arrays), chunk, seed = definition(c), data.draw(chunks), data.draw(seeds)
    for form, of in (("step", 1), ("chunked", chunk), ("scan", None), ("masked", None)):
        _, _, *gradients = run(form, c, chunk)
        laws.law_backward_is_the_transpose(f, arrays, gradients, budget(c, chunk=of)[2:], (c.dout, c.dstate), np.random.default_rng(seed))


@each_rule
@given(st.data())
def test_every_element_of_every_gradient_is_the_definitions(rule, data):
    """By the complex step, one element at a time, for one key/value head and its queries."""
    c, chunk = data.draw(rule_cases(rule, longest=6)), data.draw(chunks)
    first, G = (0,) * len(c.dims.lead), c.dims.G
    c = RuleCase(c.dims._replace(lead=(), H=1), *(None if x is None else x[first][: G if n in ("q", "dout") else 1]
                                                   for n, x in zip(c._fields[1:], c[1:], strict=True)))
    f, arrays = definition(c)
    expected = laws.gradient(f, arrays, (c.dout, c.dstate))
    for form, of in (("step", 1), ("chunked", chunk), ("scan", None), ("masked", None)):
        got, bounds = run(form, c, chunk)[2:], budget(c, chunk=of)[2:]
        for name, x, y, bound in zip(names(c)[2:], got, expected, bounds, strict=True):
            assert_within(x, y, 2 * bound, f"{form} {name}")                          # the complex step rounds the same products in float64


# --- strong decays, long sequences ---------------------------------------------------------------------------------------------------

MARGIN, WINDOW = 64, 192


def strong(rule, channels, kind, rng):
    """4,096 steps in float32: all of -50; or -50, 0 and mild ones; or these and -inf."""
    d = Dims((), 1, 2, 4096, 4096, 4, 3)
    draw = lambda shape: rng.standard_normal(shape).astype(np.float32)
    k, shape = draw(d.k), d.k if channels else d.k[:-1]
    if "delta" in rule:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    weights = {"-50": (0, 0, 0, 1, 0), "mixed": MIXTURES["strong"], "with resets": (0.1, 0.3, 0, 0.5, 0.1)}
    return RuleCase(d, draw(d.q), k, draw(d.v), log_decays(shape, weights[kind], rng).astype(np.float32),
                    rng.uniform(0, 2, d.k[:-1]).astype(np.float32) if "delta" in rule else None, draw(d.state), draw(d.out), draw(d.state))


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("kind", ["-50", "mixed", "with resets"])
def test_decays_of_minus_50_over_4096_steps_are_finite_and_right_in_float32(rule, channels, kind, rng):
    """The reference is the steps' chain in float64, and the bound that of windows of 192 positions, the first, the last and some between, for
    those with 64 others on each side or none. Every 64 decays have a product of exp(-750) or less, 0 in float64 and in float32: what lies farther off
    takes no part in sums, reference or bound."""
    c = strong(rule, channels, kind, rng)
    N, g = c.dims.N, c.g.reshape(c.dims.N, -1).astype(float)
    assert max(g[i: i + MARGIN].sum(0).max() for i in range(N - MARGIN + 1)) < -750
    expected, got = run("step", wide(c)), {form: run(form, c, 64) for form in ("chunked", "scan")}
    assert all(np.isfinite(x).all() for form in got for x in got[form])
    inside = WINDOW - 2 * MARGIN
    for start in (0, *rng.integers(0, N - inside, 3), N - inside):
        here = slice(max(start - MARGIN, 0), min(start + inside + MARGIN, N))
        first, last = here.start == 0, here.stop == N
        window = part(c, here)._replace(state=c.state * first, dstate=c.dstate * last)
        inner = slice(start - here.start, start - here.start + inside)
        for name, y, bound, *forms in zip(names(c), expected, budget(window), *got.values(), strict=True):
            if name in ("state", "dstate"):
                if not (last if name == "state" else first):
                    continue
            else:
                bound = positions(name, c, bound, inner)
                y, *forms = (positions(name, c, positions(name, c, x, here), inner) for x in (y, *forms))
            for form, x in zip(got, forms, strict=True):
                assert_within(x, y, bound, f"{form} {name} from {start}")


@each_rule
def test_a_long_sequence_crosses_blocks_parts_and_threads(rule, rng, monkeypatch):
    """Bits, with blocks of one chunk, so that parts of 16 blocks are cut into parts again."""
    monkeypatch.setattr(chunks_module, "BUFFER_BYTES", 1)
    N = 700
    d = Dims((2,), 3, 2, N, N, 4, 3)
    draw = lambda shape, low=-1: rng.integers(low, 2, shape).astype(float)
    g = np.where(rng.random(d.k[:-1]) < 0.02, -np.inf, 0) if "gated" in rule else None
    beta = None
    k = draw(d.k)
    if "delta" in rule:
        k, beta = exact_writes(d, 12, rng)
    c = RuleCase(d, draw(d.q), k, draw(d.v), g, beta, draw(d.state), draw(d.out), draw(d.state))
    laws.law_equal_bits({"step": run("step", c), "chunked": run("chunked", c, 2), "scan": run("scan", c, 4)})


@each_rule
def test_the_memory_of_the_backward_grows_with_the_logarithm_of_the_length(rule, rng, monkeypatch):
    """Beside the gradients that it returns it holds at most PARTS states more for each power of PARTS in the number of blocks, here 4 and
    blocks of one chunk; another half state is for Python's objects. The states between all chunks of the longest would be 256."""
    monkeypatch.setattr(chunks_module, "BUFFER_BYTES", 1)
    monkeypatch.setattr(chunks_module, "PARTS", 4)
    D, M, C, peaks = 64, 48, 4, []
    for N in (C * 4**2, C * 4**3, C * 4**4):
        d = Dims((), 1, 1, N, N, D, M)
        draw = lambda shape: rng.standard_normal(shape) / 4
        c = RuleCase(d, draw(d.q), draw(d.k), draw(d.v), -np.abs(draw(d.k)) if "gated" in rule else None,
                     np.abs(draw(d.k[:-1])) if "delta" in rule else None, draw(d.state), draw(d.out), draw(d.state))
        forward, backward = FORMS["gated" if c.beta is None else "delta", "chunked"]
        residuals = forward(*inputs(c), c.state, chunk=C)[2]
        tracemalloc.start()
        results = backward(c.dout, c.dstate, residuals)
        peaks.append(tracemalloc.get_traced_memory()[1] - sum(x.nbytes for x in results if x is not None))
        tracemalloc.stop()
    assert (np.diff(peaks) <= 4.5 * 8 * D * M).all()
