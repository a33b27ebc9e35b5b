"""Laws of refattn in HIPS autograd: its gradients are the hand-derived ones, of rule `linear` in every order, and elsewhere it says so."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import refattn
from refattn import _vjp, oracle
from refattn.testing import budgets, strategies
from refattn.testing.check import check_kernel

autograd = pytest.importorskip("autograd", reason="autograd is not installed: pip install 'refattn[autograd]'")

from autograd.builtins import tuple as tuple_of  # noqa: E402
from autograd.core import make_jvp, make_vjp  # noqa: E402
from autograd.extend import vspace  # noqa: E402

from refattn.adapters import autograd as adapter  # noqa: E402

B, H, G, N, D, M = 2, 2, 3, 35, 3, 4
KINDS = [("linear", "head"), ("gated", "head"), ("gated", "channel"), ("delta", "head"), ("gated_delta", "head"), ("gated_delta", "channel")]


def gradients(f: Callable[..., Any], inputs: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
    """What autograd says of f(*inputs), a tuple of arrays or one array, by all inputs at once."""
    def flat(x: Any) -> Any:
        found = f(*x)
        return tuple_of([y for part in found for y in (part if isinstance(part, refattn.State) else (part,))]) if isinstance(found, tuple) else found

    return make_vjp(flat, inputs)[0](cotangents)


def integers(rng: np.random.Generator, *shapes: tuple[int, ...], dtype: str = "float64") -> tuple[np.ndarray, ...]:
    return tuple(rng.integers(-2, 3, shape).astype(dtype) for shape in shapes)


LAYOUTS = {"grouped": ((B, H * G), (B, H)), "each its own": ((B, H), (B, H)), "one matrix": ((), ())}


def linear_case(rng: np.random.Generator, layout: str = "grouped", dtype: str = "float64") -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(q, k, v, state), (dout, dstate) of small integers."""
    queries, keys = LAYOUTS[layout]
    q, k, v, dout = integers(rng, (*queries, N, D), (*keys, N, D), (*keys, N, M), (*queries, N, M), dtype=dtype)
    state, dstate = integers(rng, (*keys, D, M), (*keys, D, M), dtype="float64" if dtype == "float64" else "float32")
    return (q, k, v, state), (dout, dstate)


def linear(q: Any, k: Any, v: Any, state: Any, scale: float = 2.0) -> Any:
    return adapter.recurrence(q, k, v, state=state, scale=scale)


def inner(x: Any, y: Any) -> Any:
    return sum((a * b).sum() for a, b in zip(x, y, strict=True))


# --- first order -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rule", "decay", "dtype"), [*((*kind, "float32") for kind in KINDS), *(
    (*kind, dtype) for kind in (KINDS[0], KINDS[-1]) for dtype in ("float64", "float16", "bfloat16"))])
def test_it_is_the_recurrence_and_its_gradients_are_the_hand_derived_ones(rule: str, decay: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes: pip install 'refattn[bf16]'")

    def fn(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        g, beta = rest[0] if "gated" in rule else None, rest[-2] if "delta" in rule else None
        return adapter.recurrence(q, k, v, g, beta, rest[-1], rule=rule, scale=0.5)

    report = check_kernel(fn, backward=lambda dout, dstate, *inputs: gradients(fn, inputs, (dout, dstate)), rule=rule, decay=decay, grouped=True,
                          scale=0.5, dtype=dtype, examples=5)
    assert report.passed and not report.untried and {"in two parts", "gradients of real numbers"} <= set(report.cases), str(report)


def cases(rng: np.random.Generator) -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]:
    q, k, v = (rng.standard_normal(shape) for shape in ((B, H * G, N, D), (B, H, N, D), (B, H, N, M)))
    S, z = rng.random((B, H, D, M)), rng.random((B, H, D))
    g, beta, lengths = -rng.random((B, H, N, D)), rng.random((B, H, N)), {"query_lengths": [N, 20], "key_lengths": [N, 20]}
    q_t, k_t, v_t = q[..., 0, :], k[..., 0, :], v[..., 0, :]
    return {
        "softmax": ("softmax_attention", (q, k, v), {"causal": True, "scale": 0.3, **lengths}),
        "linear": ("linear_attention", (q, k, v), {"feature_map": "relu2", "eps": 0.1, **lengths}),
        "linear, causal": ("linear_attention", (q, k, v), {"causal": True}),
        "causal": ("causal_linear_attention", (q, k, v), {"feature_map": "taylor2"}),
        "causal, state": ("causal_linear_attention", (q, k, v, (S, z)), {"eps": 0.1}),
        "step": ("causal_linear_attention_step", (q_t, k_t, v_t, (S, z)), {}),
        "gated delta": ("recurrence", (q, k, v, g, beta, S), {"rule": "gated_delta", "scale": 0.5}),
        "delta, no state": ("recurrence", (q, k, v, None, beta), {"rule": "delta"}),
        "packed": ("recurrence", (q, k, v), {"cu_seqlens": [0, 10, 10, N]}),
        "one position": ("recurrence_step", (q_t, k_t, v_t, g[..., 0, :], beta[..., 0], S), {"rule": "gated_delta", "scale": 0.5}),
        "one position, linear": ("recurrence_step", (q_t, k_t, v_t), {}),
    }


def flat(arrays: Any) -> list[Any]:
    return [leaf for x in (arrays if isinstance(arrays, tuple) else (arrays,)) for leaf in (x if isinstance(x, tuple) else (x,))]


@pytest.mark.parametrize("name", cases(np.random.default_rng(0)))
def test_outputs_and_gradients_are_those_of_vjp_bit_for_bit(name: str, rng: np.random.Generator) -> None:
    function, inputs, options = cases(rng)[name]
    f, ours = partial(getattr(refattn, function), **options), partial(getattr(adapter, function), **options)
    found, pullback = refattn.vjp(f.func, *inputs, **options)
    cotangents = [rng.standard_normal(x.shape) for x in flat(found)]
    grads = pullback(cotangents[0], *([] if len(cotangents) == 1 else [cotangents[1]] if len(cotangents) == 2 else [refattn.State(*cotangents[1:])]))
    given = tuple(x for x in inputs if x is not None)
    at = [i for i, x in enumerate(inputs) if x is not None]

    def of_given(*x: Any) -> Any:
        every: list[Any] = [None] * len(inputs)
        for i, y in zip(at, x, strict=True):
            every[i] = y
        return ours(*every)

    plain = ours(*inputs)
    assert type(plain) is type(found) and all(np.array_equal(x, y) for x, y in zip(flat(plain), flat(found), strict=True))
    assert "ndarray" == type(flat(plain)[0]).__name__                            # without autograd's boxes nothing is wrapped
    theirs = gradients(of_given, given, cotangents[0] if len(cotangents) == 1 else tuple(cotangents))
    expected = flat(tuple(grads[i] for i in at))
    assert len(flat(theirs)) == len(expected)
    for x, y in zip(flat(theirs), expected, strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y)


def test_one_forward_and_one_backward_whatever_is_asked_for(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    forward = refattn.rules.recurrence_vjp

    def counted(*arrays: Any, **options: Any) -> Any:
        calls.append("forward")
        found, pullback = forward(*arrays, **options)

        def back(*cotangents: Any) -> Any:
            calls.append("backward")
            return pullback(*cotangents)

        return found, back

    monkeypatch.setitem(_vjp._WITH_PULLBACK, refattn.recurrence, counted)
    inputs, (dout, dstate) = linear_case(rng)
    autograd.grad(lambda x: inner(linear(*x), (dout, dstate)))(inputs)
    assert calls == ["forward", "backward"]


def test_an_output_that_nothing_reads_has_no_cotangent(rng: np.random.Generator) -> None:
    inputs, (dout, dstate) = linear_case(rng)
    for i, d in enumerate((dout, dstate)):
        found = autograd.grad(lambda x, i=i, d=d: (linear(*x)[i] * d).sum())(inputs)
        _, pullback = refattn.vjp(refattn.recurrence, *inputs[:3], None, None, inputs[3], scale=2.0)
        expected = pullback(*(x if i == j else None for j, x in enumerate((dout, dstate))))
        assert all(np.array_equal(x, y) for x, y in zip(found, (*expected[:3], expected[5]), strict=True))


def test_a_cotangent_of_another_precision_is_rounded_to_its_outputs(rng: np.random.Generator) -> None:
    inputs, (dout, dstate) = linear_case(rng, dtype="float32")
    expected = gradients(linear, inputs, (dout, dstate))
    found = gradients(linear, inputs, (dout.astype("float64"), dstate.astype("float64")))
    assert all(x.dtype == "float32" and np.array_equal(x, y) for x, y in zip(found, expected, strict=True))
    q, k, v, _ = inputs
    one, other = (gradients(adapter.softmax_attention, (q, k, v), d) for d in (dout, dout.astype("float64")))
    assert all(x.dtype == "float32" and np.array_equal(x, y) for x, y in zip(other, one, strict=True))


def test_nothing_is_written_to_and_any_strides_do(rng: np.random.Generator) -> None:
    inputs, cotangents = linear_case(rng)
    expected = gradients(linear, inputs, cotangents)
    awkward = [strategies.strided(x, rng) for x in (*inputs, *cotangents)]      # read-only, all of them
    assert all(np.array_equal(x, y) for x, y in zip(gradients(linear, tuple(awkward[:4]), tuple(awkward[4:])), expected, strict=True))
    one = np.broadcast_to(np.float64(1), cotangents[0].shape), np.broadcast_to(np.float64(2), cotangents[1].shape)
    summed = autograd.grad(lambda x: linear(*x)[0].sum() + 2 * linear(*x)[1].sum())(inputs)
    assert all(np.array_equal(x, y) for x, y in zip(summed, gradients(linear, inputs, one), strict=True))


@pytest.mark.parametrize("rule", ["linear", "gated_delta"])
def test_no_positions_leave_the_state_as_it_was(rule: str, rng: np.random.Generator) -> None:
    q, k, v, state, dstate = integers(rng, (B, H, 0, D), (B, H, 0, D), (B, H, 0, M), (B, H, D, M), (B, H, D, M))
    more = (np.zeros((B, H, 0)), np.zeros((B, H, 0))) if rule == "gated_delta" else (None, None)
    found = gradients(lambda *x: adapter.recurrence(*x[:3], *more, x[3], rule=rule), (q, k, v, state), (np.zeros((B, H, 0, M)), dstate))
    assert [x.shape for x in found] == [x.shape for x in (q, k, v, state)] and np.array_equal(found[3], dstate)


# --- every order of rule linear -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradients_in_calls_of_itself_are_the_gradients(layout: str, dtype: str, rng: np.random.Generator) -> None:
    inputs, (dout, dstate) = linear_case(rng, layout, dtype)
    for state in (inputs[3], None):
        _, pullback = refattn.vjp(refattn.recurrence, *inputs[:3], None, None, state, scale=2.0)
        found, expected = adapter._gradients(dout, dstate, *inputs[:3], None, None, state, scale=2.0), pullback(dout, dstate)
        for x, y in zip(found, expected, strict=True):
            assert (x is None) == (y is None) and (x is None or x.dtype == y.dtype and np.array_equal(x, y))


def test_of_real_numbers_they_keep_the_budget(rng: np.random.Generator) -> None:
    (q, k, v, state), (dout, dstate) = (tuple(rng.standard_normal(x.shape).astype("float32") for x in part) for part in linear_case(rng))
    found = adapter._gradients(dout, dstate, q, k, v, None, None, state, scale=0.3)
    wide = [x.astype(np.float64) for x in (q, k, v, state, dout, dstate)]
    _, pullback = refattn.vjp(refattn.recurrence, *wide[:3], None, None, wide[3], scale=0.3)
    budget = budgets.recurrence_budget(q, k, v, state, dout, dstate, scale=0.3)
    for name, x, y in zip(("dq", "dk", "dv", "", "", "dS"), found, pullback(*wide[4:]), strict=True):
        if x is not None:
            budgets.assert_within(x, y, getattr(budget, name), name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_element_of_a_second_derivative_is_the_complex_step_of_the_definition(layout: str, rng: np.random.Generator) -> None:
    """Outputs and gradients are sums of products of inputs and cotangents: at z + iεt their imaginary part is ε times the derivative along t,
    an integer here, and a term in ε³."""
    inputs, cotangents = linear_case(rng, layout)
    z = (*inputs, *cotangents)
    along = tuple(rng.integers(-1, 2, x.shape).astype(float) for x in z)
    q, k, v, state, dout, dstate = (x + 2.0**-100 * 1j * t for x, t in zip(z, along, strict=True))
    stepped = *oracle.recurrence_gradients(q, k, v, state, 2 * dout, dstate), *oracle.recurrence(q, k, v, state, scale=2)

    def loss(z: Any) -> Any:
        return inner(linear(*z[:4]), z[4:])

    found = autograd.grad(lambda z: inner(autograd.grad(loss)(z), along))(z)     # the Hessian, which is symmetric, times t
    assert all(y.imag.any() and np.array_equal(x, np.rint(y.imag * 2.0**100)) for x, y in zip(found, stepped, strict=True))


def test_a_third_derivative_is_a_third_difference(rng: np.random.Generator) -> None:
    """The loss along t is a polynomial of degree three, so its third difference is its third derivative."""
    inputs, cotangents = linear_case(rng)
    along = tuple(rng.integers(-1, 2, x.shape).astype(float) for x in inputs)

    def on_the_way(s: Any) -> Any:
        return inner(linear(*(x + s * t for x, t in zip(inputs, along, strict=True))), cotangents)

    third = on_the_way(3.0) - 3 * on_the_way(2.0) + 3 * on_the_way(1.0) - on_the_way(0.0)
    assert autograd.grad(autograd.grad(autograd.grad(on_the_way)))(0.0) == third != 0


# --- what it cannot do, and says -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", cases(np.random.default_rng(0)))
def test_a_second_derivative_that_is_not_there_is_refused_in_words(name: str, rng: np.random.Generator) -> None:
    function, (q, *rest), options = cases(rng)[name]

    def loss(q: Any) -> Any:
        return (flat(getattr(adapter, function)(q, *rest, **options))[0] ** 2).sum()

    with pytest.raises(NotImplementedError, match=f"{function}: a derivative of its gradients .* only recurrence with rule='linear'"):
        autograd.grad(lambda q: (autograd.grad(loss)(q) ** 2).sum())(q)


def test_forward_mode_is_refused_by_autograd(rng: np.random.Generator) -> None:
    (q, *rest), _ = linear_case(rng)
    with pytest.raises(NotImplementedError, match="JVP of outputs_of_refattn"):
        make_jvp(lambda q: linear(q, *rest)[0], q)(q)


X = np.ones((2, 3))


@pytest.mark.parametrize(("f", "error", "words"), [
    (lambda x: adapter.recurrence(x, X, X, rule="lin"), ValueError, "rule: expected one of 'linear', 'gated'"),
    (lambda x: adapter.recurrence(x, X[:, :2], X), ValueError, "q and k must share D"),
    (lambda x: adapter.recurrence(x, X.astype("float32"), X), TypeError, "q is float64 and k is float32"),
    (lambda x: adapter.recurrence(x, [1.0], X), TypeError, "k: expected a NumPy or CuPy array, got list"),
    (lambda x: adapter.recurrence(X, X, X, state=x), ValueError, "state: expected"),
    (lambda x: adapter.recurrence_step(x, X, X, X), ValueError, "g_t: rule 'linear' has no g_t"),
    (lambda x: adapter.causal_linear_attention(x, X, X, x), TypeError, r"state: expected State\(S, z\) as a former call returned it, got ndarray"),
    (lambda x: adapter.causal_linear_attention(X, X, X, (x, X)), ValueError, "state.S: expected"),
    (lambda x: adapter.linear_attention(x, X, X, feature_map="elu"), ValueError, "feature_map: expected one of"),
    (lambda x: adapter.softmax_attention(x, X, X, key_lengths=[3]), ValueError, "key_lengths: expected"),
])
def test_what_is_wrong_is_said_with_and_without_boxes(f: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    for call in (f, lambda x: make_vjp(lambda x: f(x)[0], x)):
        with pytest.raises(error, match=words):
            call(X)


def test_a_space_of_bfloat16_is_one_of_its_zeros() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes: pip install 'refattn[bf16]'")
    assert vspace(np.ones(2, ml_dtypes.bfloat16)).zeros().dtype == ml_dtypes.bfloat16
