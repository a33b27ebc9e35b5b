"""Laws of softmax attention: every form is the oracle's equation, every backward its transpose, and masks hide all that they should."""
from __future__ import annotations

import threading
import tracemalloc
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import oracle, softmax
from refattn.softmax import (
    softmax_attention,
    softmax_attention_vjp,
    softmax_blockwise_backward,
    softmax_blockwise_forward,
    softmax_masked_backward,
    softmax_masked_forward,
    softmax_prefill,
    softmax_step,
)
from refattn.testing.budgets import assert_within
from refattn.testing.softmax_budget import softmax_backward_budget, softmax_forward_budget

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
Q_BLOCK, K_BLOCK = 4, 3     # small, so that few positions meet every border of a block


class Call(NamedTuple):
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]     # of q, k, v, out
    options: dict[str, Any]
    dtype: Any
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


@st.composite
def calls(draw: Any, longest: int = 13, dtypes: Any = DTYPES, lengths: bool = True) -> Call:
    """Shapes with pairwise different axes where that can be, the edges 0, 1, C-1, C, C+1 always among the positions."""
    positions = st.one_of(st.sampled_from([0, 1, K_BLOCK - 1, K_BLOCK, K_BLOCK + 1, Q_BLOCK + 1]), st.integers(0, longest))
    causal = draw(st.booleans())
    N = draw(positions)
    L = N if causal else draw(positions)
    lead, heads, groups = draw(st.sampled_from(
        [((2,), 3, 1), ((2,), 2, 3), ((3, 2), 2, 1), ((), 5, 2), ((2,), 6, 1), ((), 1, 4), (None, 1, 1)]))
    D, M = draw(st.sampled_from([(5, 4), (4, 7), (1, 2), (8, 1), (6, 6)]))
    q_lead, k_lead = ((), ()) if lead is None else ((*lead, heads * groups), (*lead, heads))
    seed = draw(st.integers(0, 2**32 - 1))
    options: dict[str, Any] = {"causal": causal}
    rng = np.random.default_rng(seed + 1)
    if lengths and draw(st.booleans()):
        options["query_lengths"] = rng.integers(0, N + 1, q_lead[: draw(st.integers(0, len(q_lead)))])
    if lengths and draw(st.booleans()):
        options["key_lengths"] = rng.integers(0, L + 1, k_lead[: draw(st.integers(0, len(k_lead)))])
    return Call(((*q_lead, N, D), (*k_lead, L, D), (*k_lead, L, M), (*q_lead, N, M)), options, draw(st.sampled_from(dtypes)), seed)


def arrays(call: Call, size: float = 1.0) -> list[np.ndarray]:
    """q, k, v and a cotangent of out, normal numbers in the call's dtype; `size` scales q."""
    q, k, v, dout = (call.rng.standard_normal((4, *shape))[i] for i, shape in enumerate(call.shapes))
    return [x.astype(call.dtype) for x in (q * size, k, v, dout)]


def forms(q: Any, k: Any, v: Any, dout: Any, **options: Any) -> dict[str, tuple[Any, Any]]:
    """out and (dq, dk, dv) by each form."""
    answers = {}
    for name, forward, backward, blocks in (
            ("masked", softmax_masked_forward, softmax_masked_backward, {}),
            ("blockwise", softmax_blockwise_forward, softmax_blockwise_backward, {"query_block": Q_BLOCK, "key_block": K_BLOCK}),
            ("one block", softmax_blockwise_forward, softmax_blockwise_backward, {})):
        out, residuals = forward(q, k, v, **options, **blocks)
        answers[name] = out, backward(dout, residuals)
    return answers


def decoded(q: Any, k: Any, v: Any, prompt: int, scale: Any = None) -> np.ndarray:
    """Causal attention as a prefill of `prompt` positions and a step for each further one."""
    out, cache = softmax_prefill(q[..., :prompt, :], k[..., :prompt, :], v[..., :prompt, :], scale=scale)
    rows = [out]
    for i in range(prompt, q.shape[-2]):
        out_t, cache = softmax_step(q[..., i, :], k[..., i, :], v[..., i, :], cache, scale=scale)
        rows.append(out_t[..., None, :])
    return np.concatenate(rows, -2)


def visible(call: Call) -> np.ndarray:
    """True where a query sees a key, (*q_lead, N, L), by loops over the words of the definition."""
    q, k, _, _ = call.shapes
    seen = np.zeros((*q[:-1], k[-2]), bool)
    groups = q[-3] // k[-3] if len(q) > 2 else 1
    real_q, real_k = (np.asarray(call.options.get(name, n)) for name, n in (("query_lengths", q[-2]), ("key_lengths", k[-2])))
    for at in np.ndindex(seen.shape):
        head, (i, j) = at[:-2], at[-2:]
        kv = (*head[:-1], head[-1] // groups) if head else ()
        real = i < real_q[head[: real_q.ndim]] and j < real_k[kv[: real_k.ndim]]
        seen[at] = real and (j <= i or not call.options["causal"])
    return seen


def per_query_head(x: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.repeat(x, q.shape[-3] // x.shape[-3], -3) if q.ndim > 2 else x


def matching(call: Call) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Integer arrays whose weights are exact, those weights, and how many keys share each row's weight.

    Each query asks for a class, each key has one; equal classes score 2¹⁴, others 0, and exp(-2¹⁴) is 0. So a query takes the mean of the
    keys of its class that it sees, or of all that it sees."""
    (*q_lead, N, D), (*k_lead, L, _), _, _ = call.shapes
    rng = call.rng
    asked, has = rng.integers(0, D, (*q_lead, N)), rng.integers(0, D, (*k_lead, L))
    q, k = 128.0 * np.eye(D)[asked], 128.0 * np.eye(D)[has]
    v, dout = (rng.integers(-4, 5, shape).astype(float) for shape in call.shapes[2:])
    seen = visible(call)
    same = seen & (asked[..., :, None] == per_query_head(has[..., None], q).mT)
    chosen = np.where(same.any(-1, keepdims=True), same, seen)
    count = chosen.sum(-1, keepdims=True)
    return [x.astype(call.dtype) for x in (q, k, v, dout)], chosen / np.maximum(count, 1), count


def equal_bits(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    np.testing.assert_array_equal(actual.astype(np.float64), expected.astype(np.float64), what)


# --- exact laws --------------------------------------------------------------------------------------------------------------------

@given(calls())
def test_equal_scores_share_their_values_bit_for_bit(call: Call) -> None:
    (q, k, v, dout), P, count = matching(call)
    wide = np.float64 if call.dtype is np.float64 else np.float32
    total = (P > 0).astype(wide) @ per_query_head(v, q).astype(wide)                 # exact: small integers
    expected = (total / np.maximum(count, 1).astype(wide)).astype(call.dtype)        # one rounding, or one and the cast
    for name, (out, _) in forms(q, k, v, dout, scale=1.0, **call.options).items():
        equal_bits(out, expected, name)
    if call.options == {"causal": True}:
        equal_bits(decoded(q, k, v, call.shapes[0][-2] // 2, 1.0), expected, "steps")


@given(calls(), st.sampled_from([1.0, 0.5]))
def test_gradients_of_dyadic_weights_are_exact_bit_for_bit(call: Call, scale: float) -> None:
    (q, k, v, dout), P, count = matching(call)
    dout = np.where((count & (count - 1)) == 0, dout, np.zeros((), call.dtype))       # elsewhere 1/l is no power of two
    Q, K, V, dO = (x.astype(np.float64) for x in (q, per_query_head(k, q), per_query_head(v, q), dout))
    dX = P * (dO @ V.mT - (dO * (P @ V)).sum(-1, keepdims=True))
    by_query_head = (scale * dX.mT @ Q, P.mT @ dO)
    kv = [d if q.ndim == 2 else d.reshape(*k.shape[:-2], -1, *d.shape[-2:]).sum(-3) if d.size else np.zeros((*k.shape[:-2], *d.shape[-2:]))
          for d in by_query_head]
    expected = [d.astype(call.dtype) for d in (scale * dX @ K, *kv)]
    for name, (_, gradients) in forms(q, k, v, dout, scale=scale, **call.options).items():
        for d, e, which in zip(gradients, expected, ("dq", "dk", "dv")):
            equal_bits(d, e, f"{name} {which}")


@pytest.mark.parametrize("causal", [False, True])
def test_default_blocks_and_threads_are_exact_too(causal: bool, rng: np.random.Generator) -> None:
    """Longer than a default block both ways, more heads than a stack, and work enough for threads."""
    n = softmax.KEY_BLOCK + softmax.QUERY_BLOCK + 9
    q, k = np.zeros((2, 6, n, 5), np.float32), np.zeros((2, 3, n, 5), np.float32)
    v, dout = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((2, 3, n, 4), (2, 6, n, 4)))
    lengths = np.array([n, n - 130])
    real = np.arange(n) < lengths[:, None, None, None]
    seen = np.broadcast_to(real & (np.arange(n) <= np.arange(n)[:, None] if causal else True), (2, 6, n, n))
    count = seen.sum(-1, keepdims=True)
    dout = np.where((count & (count - 1)) == 0, dout, np.float32(0))
    out, pullback = softmax_attention_vjp(q, k, v, causal=causal, key_lengths=lengths)
    equal_bits(out, (seen @ np.repeat(v, 2, 1)) / count.astype(np.float32), "out")
    dv = ((seen / count).mT @ dout.astype(float)).reshape(2, 3, 2, n, 4).sum(2)
    for d, e, which in zip(pullback(dout), (0 * q, 0 * k, dv.astype(np.float32)), ("dq", "dk", "dv")):
        equal_bits(d, e, which)


# --- laws with derived budgets -----------------------------------------------------------------------------------------------------

def exact(x: np.ndarray) -> np.ndarray:
    """What the oracle should be given to be more exact than the form that it judges."""
    return x.astype(np.longdouble if x.dtype == np.float64 else np.float64)


SLACK = 1 if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps else 2      # a float64 oracle of float64 forms errs as they do


def oracle_gradients(q: Any, k: Any, v: Any, dout: Any, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Jᵀ·dout of the oracle by the complex step, one position or feature at a time in all heads at once: heads do not see one another, and
    neither do rows of q nor columns of v."""
    h = 1e-150
    q, k, v, dout = (exact(x) for x in (q, k, v, dout))
    groups = q.shape[-3] // max(k.shape[-3], 1) if q.ndim > 2 else 1
    dout = np.where(np.arange(q.shape[-2])[:, None] < real_lengths(options.get("query_lengths"), q), dout, 0)

    def over_group(x: np.ndarray) -> np.ndarray:
        return x if q.ndim == 2 else x.reshape(*k.shape[:-2], groups, *x.shape[len(q.shape) - 2:]).sum(len(k.shape) - 2)

    def along(which: int, at: Any) -> np.ndarray:
        x = [q, k, v]
        step = np.zeros(x[which].shape, x[which].dtype)
        step[at] = h
        x[which] = x[which] + 1j * step
        return dout * oracle.softmax_attention(*x, **options).imag / h

    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    for d in range(q.shape[-1]):
        dq[..., d] = along(0, np.s_[..., d]).sum(-1)
        for j in range(k.shape[-2]):
            dk[..., j, d] = over_group(along(1, np.s_[..., j, d]).sum((-2, -1)))
    for j in range(k.shape[-2]):
        dv[..., j, :] = over_group(along(2, np.s_[..., j, :]).sum(-2))
    return dq, dk, dv


def real_lengths(lengths: Any, x: np.ndarray) -> np.ndarray:
    lengths = np.asarray(x.shape[-2] if lengths is None else lengths)
    return np.broadcast_to(lengths.reshape(lengths.shape + (1,) * (x.ndim - lengths.ndim)), (*x.shape[:-2], 1, 1))


@given(calls(), st.sampled_from([0.0, 1.0, 30.0]))
def test_every_form_keeps_the_forward_budget(call: Call, size: float) -> None:
    """Eq. (2), (3)."""
    q, k, v, dout = arrays(call, size)
    expected = oracle.softmax_attention(exact(q), exact(k), exact(v), **call.options)
    bound = SLACK * softmax_forward_budget(q, k, v, key_block=K_BLOCK, **call.options)
    for name, (out, _) in forms(q, k, v, dout, **call.options).items():
        assert out.dtype == call.dtype
        assert_within(out, expected, bound, name)
    if call.options == {"causal": True}:
        assert_within(decoded(q, k, v, call.shapes[0][-2] // 3), expected, bound, "steps")


@given(calls(longest=7), st.sampled_from([1.0, 8.0]))
def test_backward_agrees_with_the_complex_step_of_the_oracle(call: Call, size: float) -> None:
    q, k, v, dout = arrays(call, size)
    expected = oracle_gradients(q, k, v, dout, **call.options)
    bounds = softmax_backward_budget(q, k, v, dout, key_block=K_BLOCK, query_block=Q_BLOCK, **call.options)
    for name, (_, gradients) in forms(q, k, v, dout, **call.options).items():
        for d, e, bound, which, x in zip(gradients, expected, bounds, ("dq", "dk", "dv"), (q, k, v)):
            assert d.dtype == x.dtype and d.shape == x.shape
            assert_within(d, e, SLACK * bound, f"{name} {which}")


@given(calls(longest=40, dtypes=[np.float64, np.float32]))
def test_backward_is_the_transpose(call: Call) -> None:
    q, k, v, dout = arrays(call)
    directions = [call.rng.standard_normal(x.shape) for x in (q, k, v)]
    h = 1e-150
    moved = oracle.softmax_attention(*(exact(x) + 1j * h * dx for x, dx in zip((q, k, v), directions)), **call.options)
    forward = (exact(dout) * moved.imag / h).sum()
    bounds = softmax_backward_budget(q, k, v, dout, key_block=K_BLOCK, query_block=Q_BLOCK, **call.options)
    bound = sum((b * np.abs(dx)).sum() for b, dx in zip(bounds, directions))
    for name, (_, gradients) in forms(q, k, v, dout, **call.options).items():
        backward = sum((exact(d) * dx).sum() for d, dx in zip(gradients, directions))
        assert_within(backward, forward, SLACK * bound, name)


@given(calls(lengths=False, dtypes=[np.float64, np.float32]))
def test_moving_all_keys_by_one_vector_changes_nothing(call: Call) -> None:
    q, k, v, _ = arrays(call)
    shift = call.rng.integers(-3, 4, (*k.shape[:-2], 1, k.shape[-1]))
    k = np.round(8 * k) / 8                                                    # so that k + shift is exact
    moved = (k + shift).astype(k.dtype)
    bound = softmax_forward_budget(q, k, v, **call.options) + softmax_forward_budget(q, moved, v, **call.options)
    assert_within(softmax_attention(q, moved, v, **call.options), exact(softmax_attention(q, k, v, **call.options)), bound)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_of_ten_thousand_overflow_nothing(dtype: Any, causal: bool, rng: np.random.Generator) -> None:
    q, k, v, dout = (rng.standard_normal((2, 3, 9, d)).astype(dtype) for d in (4, 4, 5, 5))
    scores = q @ k.mT
    scale = float(1e4 / np.abs(scores).max())
    expected = oracle.softmax_attention(exact(q), exact(k), exact(v), causal=causal, scale=scale)
    bound = softmax_forward_budget(q, k, v, causal=causal, scale=scale, key_block=K_BLOCK)
    for name, (out, gradients) in forms(q, k, v, dout, causal=causal, scale=scale).items():
        assert_within(out, expected, SLACK * bound, name)
        assert all(np.isfinite(d).all() for d in gradients), name


# --- what a query does not see -----------------------------------------------------------------------------------------------------

@given(calls(dtypes=[np.float64, np.float32]), st.integers(0, 12))
def test_the_future_never_reaches_the_past(call: Call, now: int) -> None:
    call = call._replace(shapes=(call.shapes[0], *((*s[:-2], call.shapes[0][-2], s[-1]) for s in call.shapes[1:3]), call.shapes[3]))
    q, k, v, dout = arrays(call)
    dout[..., now:, :] = 0
    later = [x.copy() for x in (q, k, v)]
    for x in later:
        x[..., now:, :] = call.rng.standard_normal(x[..., now:, :].shape) * 100
    here, there = forms(q, k, v, dout, causal=True), forms(*later, dout, causal=True)
    for name, (out, gradients) in here.items():
        equal_bits(there[name][0][..., :now, :], out[..., :now, :], name)
        for d in gradients:
            assert not d[..., now:, :].any(), name


@given(calls(), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_garbage_in_padding_changes_nothing(call: Call, garbage: float) -> None:
    clean = arrays(call)
    lengths = [call.options.get(name) for name in ("query_lengths", "key_lengths", "key_lengths", "query_lengths")]
    with np.errstate(over="ignore"):
        dirty = [np.where(np.arange(x.shape[-2])[:, None] < real_lengths(n, x), x, np.asarray(garbage).astype(call.dtype))
                 for x, n in zip(clean, lengths)]
    answers, expected = forms(*dirty, **call.options), forms(*clean, **call.options)
    for name, (out, gradients) in answers.items():
        equal_bits(out, expected[name][0], name)
        for d, e in zip(gradients, expected[name][1]):
            equal_bits(d, e, name)
        for d, n in zip((out, *gradients), (lengths[0], *lengths)):
            behind = np.arange(d.shape[-2])[:, None] >= real_lengths(n, d)
            assert not np.where(behind, d.astype(float), 0).any(), f"{name}: padding is not zero"


@pytest.mark.parametrize("form", [softmax_masked_forward, softmax_blockwise_forward])
def test_a_row_that_sees_no_key_is_zero_and_has_zero_gradients(form: Any, rng: np.random.Generator) -> None:
    backward = {softmax_masked_forward: softmax_masked_backward, softmax_blockwise_forward: softmax_blockwise_backward}[form]
    q, k, v, dout = (rng.standard_normal((2, 3, n, d)) for n, d in ((5, 4), (6, 4), (6, 7), (5, 7)))
    out, residuals = form(q, k, v, key_lengths=np.array([0, 6]))
    gradients = backward(dout, residuals)
    assert not any(x[0].any() for x in (out, *gradients))
    assert all(x[1].any() for x in (out, *gradients))
    out, residuals = form(q, k[..., :0, :], v[..., :0, :])
    assert out.shape == (2, 3, 5, 7) and not out.any()
    assert [d.shape for d in backward(dout, residuals)] == [(2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 7)]


@pytest.mark.parametrize("shapes", [
    ((2, 3, 0, 4), (2, 3, 5, 4), (2, 3, 5, 6)), ((2, 3, 5, 0), (2, 3, 4, 0), (2, 3, 4, 6)), ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 0)),
    ((0, 3, 5, 4), (0, 3, 6, 4), (0, 3, 6, 7)), ((2, 0, 5, 4), (2, 0, 6, 4), (2, 0, 6, 7)), ((2, 0, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)),
    ((0, 4), (5, 4), (5, 6))])
def test_axes_of_size_zero(shapes: Any, rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    dout = rng.standard_normal((*q.shape[:-1], v.shape[-1]))
    answers = forms(q, k, v, dout)
    for name, (out, gradients) in answers.items():
        assert out.shape == dout.shape and [d.shape for d in gradients] == list(shapes), name
        np.testing.assert_allclose(out, oracle.softmax_attention(q, k, v), rtol=1e-14, atol=1e-14)
        for d, e in zip(gradients, answers["masked"][1]):
            np.testing.assert_allclose(d, e, rtol=1e-14, atol=1e-14)


# --- layouts, cotangents, inputs ---------------------------------------------------------------------------------------------------

def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """The same numbers in other strides."""
    wide = np.zeros((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), x.dtype)
    wide[..., ::2, ::3] = x
    read_only = x.copy()
    read_only.flags.writeable = False
    moved = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -2, -3)), -3, -2)     # a caller's (B, N, H, D)
    return {"fortran": np.asfortranarray(x), "strided": wide[..., ::2, ::3], "reversed": x[..., ::-1, ::-1].copy()[..., ::-1, ::-1],
            "read-only": read_only, "positions before heads": moved}


@given(calls(dtypes=[np.float64, np.float32, np.float16]).filter(lambda call: len(call.shapes[0]) > 2), st.permutations(range(5)))
def test_strides_change_nothing(call: Call, order: list[int]) -> None:
    (q, k, v, dout), _, count = matching(call)       # exact weights: strides decide which heads are worked on together
    contiguous = q, k, v, np.where((count & (count - 1)) == 0, dout, np.zeros((), call.dtype))
    names = list(layouts(q))
    mixed = [layouts(x)[names[i]] for x, i in zip(contiguous, order)]
    before = [x.copy() for x in mixed]
    expected = forms(*contiguous, scale=0.5, **call.options)
    for name, (out, gradients) in forms(*mixed, scale=0.5, **call.options).items():
        for x, e, which in zip((out, *gradients), (expected[name][0], *expected[name][1]), ("out", "dq", "dk", "dv")):
            equal_bits(x, e, f"{name} {which}")
    for x, was in zip(mixed, before):
        equal_bits(x, was, "inputs are never written to")


@pytest.mark.parametrize("causal", [False, True])
def test_broadcast_inputs_and_cotangents(causal: bool, rng: np.random.Generator) -> None:
    shape = (2, 3, 8)
    one = [rng.standard_normal(s) for s in ((8, 5), (1, 8, 5), (8, 1), (1, 1, 4))]
    views = [np.broadcast_to(x, (*shape, d)) for x, d in zip(one, (5, 5, 4, 4))]
    for name, (out, gradients) in forms(*views, causal=causal).items():
        copied = forms(*(x.copy() for x in views), causal=causal)[name]
        for x, y in zip((out, *gradients), (copied[0], *copied[1])):
            equal_bits(x, y, name)


@given(calls())
def test_the_pullback_is_linear_keeps_nothing_and_takes_none_for_zero(call: Call) -> None:
    q, k, v, dout = arrays(call)
    out, pullback = softmax_attention_vjp(q, k, v, **call.options)
    equal_bits(out, softmax_attention(q, k, v, **call.options), "out")
    first, twice, none, again = pullback(dout), pullback((2 * dout).astype(call.dtype)), pullback(None), pullback(dout)
    for a, b, zero, c, x in zip(first, twice, none, again, (q, k, v)):
        equal_bits(c, a, "a second pullback")
        assert zero.shape == x.shape and zero.dtype == x.dtype and not zero.any()
        if call.dtype is not np.float16:                                        # float16's subnormal numbers do not double exactly
            equal_bits(b, (2 * a).astype(call.dtype), "twice the cotangent")


def test_another_array_library_takes_the_masked_form(rng: np.random.Generator) -> None:
    xp = pytest.importorskip("array_api_strict")
    for causal, lengths in ((True, None), (False, np.array([4, 0]))):
        q, k, v, dout = (rng.standard_normal((2, h, 6, d)).astype(np.float32) for h, d in ((4, 5), (2, 5), (2, 3), (4, 3)))
        options = {"causal": causal, "key_lengths": lengths, "query_lengths": lengths}
        out, pullback = softmax_attention_vjp(*(xp.asarray(x) for x in (q, k, v)), **options)
        expected = oracle.softmax_attention(q, k, v, **options)
        assert_within(np.asarray(out), expected, softmax_forward_budget(q, k, v, **options))
        bounds = softmax_backward_budget(q, k, v, dout, **options)
        for d, e, bound in zip(pullback(xp.asarray(dout)), oracle_gradients(q, k, v, dout, **options), bounds):
            assert_within(np.asarray(d), e, bound)
        assert not np.asarray(pullback(None)[0]).any()
        with pytest.raises(TypeError, match="array_api_strict: the cache is written in place"):
            softmax_step(xp.asarray(q[..., 0, :]), xp.asarray(k[..., 0, :]), xp.asarray(v[..., 0, :]))
        with pytest.raises(TypeError, match="use softmax_masked_forward"):
            softmax_blockwise_forward(*(xp.asarray(x) for x in (q, k, v)))


def test_memory_does_not_grow_with_the_scores(rng: np.random.Generator) -> None:
    def beyond_results(n: int) -> int:
        q, k, v, dout = (rng.standard_normal((1, 1, n, 4)).astype(np.float32) for _ in range(4))
        tracemalloc.start()
        try:
            out, pullback = softmax_attention_vjp(q, k, v)
            gradients = pullback(dout)
            return tracemalloc.get_traced_memory()[1] - out.nbytes - sum(d.nbytes for d in gradients)
        finally:
            tracemalloc.stop()

    beyond_results(4096)                                   # the thread pool and the BLAS controller are made once
    rows = 4 * 4                                           # m, l and rowsum(dO ∘ out), and what else is one number per row
    assert beyond_results(4096) - beyond_results(1024) < 3072 * rows + 4096


# --- decoding ----------------------------------------------------------------------------------------------------------------------

@given(calls(lengths=False), st.integers(0, 13), st.sampled_from([None, 0.25]))
def test_prefill_and_steps_are_causal_attention(call: Call, prompt: int, scale: float | None) -> None:
    """Eq. (2), (3), causal."""
    call = call._replace(shapes=(call.shapes[0], *((*s[:-2], call.shapes[0][-2], s[-1]) for s in call.shapes[1:3]), call.shapes[3]))
    q, k, v, _ = arrays(call)
    out = decoded(q, k, v, min(prompt, q.shape[-2]), scale)
    assert out.dtype == call.dtype
    expected = oracle.softmax_attention(exact(q), exact(k), exact(v), causal=True, scale=scale)
    assert_within(out, expected, SLACK * softmax_forward_budget(q, k, v, causal=True, scale=scale))


def test_a_step_leaves_the_old_cache_as_it_was_in_every_branch(rng: np.random.Generator) -> None:
    def position() -> list[np.ndarray]:
        return [rng.standard_normal((2, h, d)).astype(np.float32) for h, d in ((6, 5), (3, 5), (3, 4))]

    def whole(positions: list[list[np.ndarray]]) -> np.ndarray:
        return oracle.softmax_attention(*(np.stack(x, -2) for x in zip(*positions)), causal=True)[..., -1, :]

    told: list[tuple[Any, list[list[np.ndarray]]]] = [(None, [])]            # caches of any age, with the positions that each one has read
    for _ in range(120):
        cache, positions = told[int(rng.integers(max(0, len(told) - 20), len(told)))]
        positions = [*positions, position()]
        out, cache = softmax_step(*positions[-1], cache)
        bound = softmax_forward_budget(*(np.stack(x, -2) for x in zip(*positions)), causal=True)[..., -1, :]
        assert_within(out, whole(positions), bound)
        told.append((cache, positions))
    for cache, positions in told[1:]:
        equal_bits(cache.keys, np.stack([k for _, k, _ in positions], -2), "keys of an old cache")
        equal_bits(cache.values, np.stack([v for _, _, v in positions], -2), "values of an old cache")
        assert not cache.keys.flags.writeable and not cache.values.flags.writeable


def test_appending_copies_the_cache_only_when_its_room_doubles(rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal((2, 300, d)).astype(np.float16) for d in (5, 5, 4))
    _, cache = softmax_prefill(q[:, :7], k[:, :7], v[:, :7])
    stores = [cache.store]
    for i in range(7, 300):
        _, cache = softmax_step(q[:, i], k[:, i], v[:, i], cache)
        stores.append(cache.store)
    assert len({id(store) for store in stores}) == 6                         # 16, 32, 64, 128, 256, 512
    equal_bits(cache.keys, k.astype(np.float32), "keys")


def test_a_prefilled_cache_is_a_copy(rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal((2, 5, 3)) for _ in range(3))
    _, cache = softmax_prefill(q, k, v)
    was = k.copy()
    k[...] = np.nan
    equal_bits(cache.keys, was, "keys")


def test_threads_that_continue_one_cache_do_not_share_a_slot(rng: np.random.Generator) -> None:
    q, k, v = (rng.standard_normal((2, 3, 4)) for _ in range(3))
    for _ in range(30):
        _, cache = softmax_prefill(q, k, v)
        found: dict[int, Any] = {}
        gate = threading.Barrier(4)

        def go(name: int, cache: Any = cache, found: Any = found, gate: Any = gate) -> None:
            gate.wait()
            one = np.full((2, 4), float(name))
            found[name] = softmax_step(one, one, one, cache)[1]

        threads = [threading.Thread(target=go, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, branch in found.items():
            assert (branch.keys[:, 3] == name).all() and (branch.values[:, 3] == name).all()


# --- errors say what to do ---------------------------------------------------------------------------------------------------------

def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(("error", "words", "call"), [
    (ValueError, r"k: causal attention needs as many keys as queries, got L = 6 keys and N = 5 queries.*softmax_step",
     lambda f: f(zeros(2, 5, 4), zeros(2, 6, 4), zeros(2, 6, 3), causal=True)),
    (ValueError, r"k: expected .* = \(2, \*, 4\), got \(2, 6, 3\): q and k must share D",
     lambda f: f(zeros(2, 5, 4), zeros(2, 6, 3), zeros(2, 6, 3))),
    (ValueError, r"q: .* Hq = 3 must be a multiple of Hkv = 2", lambda f: f(zeros(3, 5, 4), zeros(2, 6, 4), zeros(2, 6, 3))),
    (ValueError, r"key_lengths: expected 0 ≤ length ≤ L = 6, got values from 1 to 7",
     lambda f: f(zeros(2, 5, 4), zeros(2, 6, 4), zeros(2, 6, 3), key_lengths=[1, 7])),
    (ValueError, r"query_lengths: expected one length for each of the leading axes \(2,\)",
     lambda f: f(zeros(2, 5, 4), zeros(2, 6, 4), zeros(2, 6, 3), query_lengths=[1, 2, 3])),
    (TypeError, r"query_lengths: expected integers, got float64",
     lambda f: f(zeros(2, 5, 4), zeros(2, 6, 4), zeros(2, 6, 3), query_lengths=1.5)),
    (TypeError, r"q is float32 and v is float64", lambda f: f(zeros(2, 5, 4), zeros(2, 6, 4), zeros(2, 6, 3, dtype=np.float64))),
    (TypeError, r"q: expected float16, bfloat16, float32 or float64, got int64",
     lambda f: f(*(zeros(5, 4, dtype=np.int64) for _ in range(3)))),
    (TypeError, r"k: expected a NumPy or CuPy array, got list", lambda f: f(zeros(5, 4), [[1.0]], zeros(5, 4))),
    (ValueError, r"scale: expected a finite number, got nan", lambda f: f(zeros(5, 4), zeros(5, 4), zeros(5, 4), scale=float("nan"))),
    (TypeError, r"scale: expected a number, got str", lambda f: f(zeros(5, 4), zeros(5, 4), zeros(5, 4), scale="1")),
])
@pytest.mark.parametrize("f", [softmax_attention, softmax_attention_vjp, softmax_masked_forward, softmax_blockwise_forward])
def test_errors_name_the_argument_and_what_was_expected(error: Any, words: str, call: Any, f: Any) -> None:
    with pytest.raises(error, match=words):
        call(f)


@pytest.mark.parametrize(("forward", "backward"), [(softmax_masked_forward, softmax_masked_backward),
                                                   (softmax_blockwise_forward, softmax_blockwise_backward)])
def test_a_wrong_cotangent_is_named(forward: Any, backward: Any) -> None:
    _, residuals = forward(zeros(2, 5, 4), zeros(2, 6, 4), zeros(2, 6, 3))
    with pytest.raises(ValueError, match=r"dout: expected the shape of the output \(2, 5, 3\), got \(2, 5, 4\)"):
        backward(zeros(2, 5, 4), residuals)
    with pytest.raises(TypeError, match="dout is float64 and its output is float32"):
        backward(zeros(2, 5, 3, dtype=np.float64), residuals)


def test_errors_of_a_step(rng: np.random.Generator) -> None:
    _, cache = softmax_prefill(zeros(2, 5, 4), zeros(2, 5, 4), zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"cache.keys: expected \(..., Hkv, n, D\) = \(3, 5, 4\), got \(2, 5, 4\)"):
        softmax_step(zeros(3, 4), zeros(3, 4), zeros(3, 3), cache)
    with pytest.raises(ValueError, match=r"cache.values: expected \(..., Hkv, n, M\) = \(2, 5, 6\), got \(2, 5, 3\)"):
        softmax_step(zeros(2, 4), zeros(2, 4), zeros(2, 6), cache)
    with pytest.raises(TypeError, match=r"cache.keys: expected float64 as for q_t in float64, got float32"):
        softmax_step(*(zeros(2, d, dtype=np.float64) for d in (4, 4, 3)), cache)
    with pytest.raises(ValueError, match=r"k_t: expected .*q and k must share D"):
        softmax_step(zeros(2, 4), zeros(2, 5), zeros(2, 3), cache)
    with pytest.raises(ValueError, match="causal attention needs as many keys as queries"):
        softmax_prefill(zeros(2, 5, 4), zeros(2, 6, 4), zeros(2, 6, 3))
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"key_block: expected an integer ≥ 1, got {bad}"):
            softmax_blockwise_forward(zeros(5, 4), zeros(5, 4), zeros(5, 4), key_block=bad)
