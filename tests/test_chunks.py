"""What every rule with a gate or a delta obeys, in all its forms: chunked, scan, masked (a scan of one chunk), step; and so do their transposes."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import oracle
from refattn.delta import (
    delta_chunked_backward,
    delta_chunked_forward,
    delta_scan_backward,
    delta_scan_forward,
    delta_step,
    delta_step_backward,
)
from refattn.gated import (
    gated_chunked_backward,
    gated_chunked_forward,
    gated_scan_backward,
    gated_scan_forward,
    gated_step,
    gated_step_backward,
)
from refattn.testing import laws
from refattn.testing.budgets import assert_within
from refattn.testing.rules_budget import rules_budget
from refattn.testing.strategies import rule_cases

RULES = ("gated", "delta", "gated_delta")
FORMS = {("gated", "chunked"): (gated_chunked_forward, gated_chunked_backward), ("gated", "scan"): (gated_scan_forward, gated_scan_backward),
         ("delta", "chunked"): (delta_chunked_forward, delta_chunked_backward), ("delta", "scan"): (delta_scan_forward, delta_scan_backward)}
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
    forward, backward = FORMS["gated" if c.beta is None else "delta", "scan" if form == "masked" else form]
    if form == "masked":
        chunk = 1 << max(c.dims.N - 1, 0).bit_length()
    out, end, residuals = forward(*inputs(c), c.state, chunk=chunk)
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


# --- laws with derived bounds --------------------------------------------------------------------------------------------------------

def budget(c, **options):
    return [x for x in rules_budget(c.q, c.k, c.v, c.g, c.beta, c.state, c.dout, c.dstate, **options) if x is not None]


@each_rule
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data())
def test_rounding_stays_within_the_budget(rule, dtype, data):
    c = data.draw(rule_cases(rule, dtype=dtype))
    chunk, expected, bounds = data.draw(chunks), run("step", wide(c)), budget(c)
    for form in ("chunked", "scan", "masked"):
        for name, x, y, bound in zip(names(c), run(form, c, chunk), expected, bounds, strict=True):
            assert_within(x, y, bound, f"{form} {name}")


@each_rule
@given(st.data())
def test_backward_is_the_transpose_of_the_definition(rule, data):
    c = data.draw(rule_cases(rule))
    (f, arrays), chunk, seed = definition(c), data.draw(chunks), data.draw(seeds)
    for form in ("step", "chunked", "scan", "masked"):
        _, _, *gradients = run(form, c, chunk)
        laws.law_backward_is_the_transpose(f, arrays, gradients, budget(c)[2:], (c.dout, c.dstate), np.random.default_rng(seed))
