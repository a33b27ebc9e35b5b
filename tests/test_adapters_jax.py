"""Laws of refattn in JAX: it is the recurrence, its gradients are the hand-derived ones, and they may be compiled, mapped and differentiated."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import refattn
from refattn.features import FeatureMap
from refattn.testing import budgets, rules_budget
from refattn.testing.check import check_kernel

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'refattn[jax]'")
jnp = jax.numpy

from refattn.adapters import jax as adapter  # noqa: E402

KINDS = [("linear", "head"), ("gated", "head"), ("gated", "channel"), ("delta", "head"), ("gated_delta", "head"), ("gated_delta", "channel")]
B, H, G, N, D, M = 2, 2, 2, 35, 3, 4                                              # two chunks, the second of three positions
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})      # the same sums, and half as long to compile


@pytest.fixture
def wide() -> Iterator[str]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield "float64"
    jax.config.update("jax_enable_x64", before)


def arrays(rule: str, decay: str, rng: np.random.Generator, *, exact: bool = True, dtype: str = "float32", n: int = N) -> tuple[Any, ...]:
    """(q, k, v, g, beta, state), (dout, dstate), as JAX arrays, None where the rule has none.

    `exact`: integers, decays of 1 and 0, and writes of a delta with β of 0, 1 or 2 under keys of one ±1, which keep the state an integer."""
    def array(*shape: int) -> Any:
        return rng.integers(-2, 3, shape).astype(float) if exact else rng.standard_normal(shape)

    q, k, v, state = array(B, H * G, n, D), array(B, H, n, D), array(B, H, n, M), array(B, H, D, M)
    positions = (B, H, n, D) if decay == "channel" else (B, H, n)
    g = np.where(rng.random(positions) < 0.1, -np.inf, 0 if exact else -rng.exponential(0.3, positions)) if "gated" in rule else None
    beta = None
    if "delta" in rule and exact:
        k, beta = np.eye(D)[rng.integers(D, size=(B, H, n))] * rng.choice([-1, 1], (B, H, n, 1)), rng.integers(0, 3, (B, H, n))
    elif "delta" in rule:
        k, beta = k / np.linalg.norm(k, axis=-1, keepdims=True), rng.random((B, H, n))
    cotangents = array(B, H * G, n, M), array(B, H, D, M)
    return (tuple(None if x is None else jnp.asarray(x, dtype) for x in (q, k, v, g, beta, state)),
            tuple(jnp.asarray(x, dtype) for x in cotangents))


def definition(q: Any, k: Any, v: Any, g: Any = None, beta: Any = None, state: Any = None, *, scale: float = 1.0) -> tuple[Any, Any]:
    """One position after the other, in JAX's own operations, whose derivatives are JAX's."""
    def position(S: Any, x: Any) -> tuple[Any, Any]:
        q_t, k_t, v_t, g_t, beta_t = x
        P = S if g_t is None else S * jnp.exp(g_t[..., None] if g_t.ndim == k_t.ndim else g_t[..., None, None])
        u = v_t if beta_t is None else beta_t[..., None] * (v_t - jnp.einsum("bhd,bhdm->bhm", k_t, P))
        S = P + k_t[..., None] * u[..., None, :]
        return S, scale * jnp.einsum("bhgd,bhdm->bhgm", q_t.reshape(*k_t.shape[:2], -1, k_t.shape[-1]), S).reshape(*q_t.shape[:2], -1)

    state, out = jax.lax.scan(position, state, tuple(None if x is None else jnp.moveaxis(x, 2, 0) for x in (q, k, v, g, beta)))
    return jnp.moveaxis(out, 0, 2), state


def by_rule(f: Any, rule: str, **options: Any) -> Any:
    return partial(f, **options) if f is definition else partial(f, rule=rule, **options)


def gradients(f: Any, inputs: Any, cotangents: Any) -> Any:
    return jax.vjp(f, *inputs)[1](cotangents)


def linear_loss(cotangents: Any, outputs: Any) -> Any:
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(cotangents), jax.tree.leaves(outputs), strict=True))


def loss(cotangents: Any, outputs: Any) -> Any:
    """Its second derivative has two parts: that of the outputs, and their first derivatives twice."""
    return linear_loss(cotangents, jax.tree.map(lambda x: x + x * x, outputs))


def forward_over_reverse(f: Any, inputs: Any, along: Any, cotangents: Any, *, loss: Any = loss) -> Any:
    return jax.jvp(jax.grad(lambda x: loss(cotangents, f(*x))), (inputs,), (along,))[1]


def reverse_over_reverse(f: Any, inputs: Any, along: Any, cotangents: Any) -> Any:
    return jax.grad(lambda x: linear_loss(along, jax.grad(lambda x: loss(cotangents, f(*x)))(x)))(inputs)


def same(found: Any, expected: Any) -> bool:
    """Bit for bit, but for the sign of a zero; of the same kind, shapes and dtypes, and nothing of it NaN."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and np.isfinite(np.asarray(x, float)).all()
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    return True


# --- the recurrence ------------------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize(("rule", "decay"), KINDS)
def test_it_is_the_recurrence_and_its_gradients_are_the_hand_derived_ones(rule: str, decay: str) -> None:
    check(rule, decay, "float32", examples=2)                                     # few: each shape is compiled anew


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "decay"), KINDS)
def test_it_is_so_in_float64(rule: str, decay: str, wide: str) -> None:
    check(rule, decay, wide, examples=1)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "dtype"), [("linear", "float16"), ("gated_delta", "bfloat16")])
def test_half_precisions_are_summed_in_float32(rule: str, dtype: str) -> None:
    check(rule, "head", dtype, examples=1)


def check(rule: str, decay: str, dtype: str, examples: int) -> None:
    def fn(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        g, beta, state = (rest[0] if "gated" in rule else None), (rest[-2] if "delta" in rule else None), rest[-1]
        return adapter.recurrence(q, k, v, g, beta, state, rule=rule, scale=0.5)

    report = check_kernel(fn, backward="autodiff", rule=rule, decay=decay, grouped=True, scale=0.5, dtype=dtype, to="jax",
                          examples=examples, time_limit=600)
    assert report.passed and not report.untried and {"in two parts", "gradients of real numbers"} <= set(report.cases), str(report)


@pytest.mark.parametrize(("rule", "decay"), KINDS)
def test_gradients_are_those_of_the_definition_and_of_the_scan_form_traced(rule: str, decay: str, rng: np.random.Generator) -> None:
    ours, traced = (compiled(partial(gradients, by_rule(f, rule, scale=-2.0))) for f in (adapter.recurrence, refattn.recurrence))
    inputs, cotangents = arrays(rule, decay, rng)
    expected = compiled(partial(gradients, by_rule(definition, rule, scale=-2.0)))(inputs, cotangents)
    same(ours(inputs, cotangents), expected)
    same(traced(inputs, cotangents), expected)
    inputs, cotangents = arrays(rule, decay, rng, exact=False)
    found, expected = ours(inputs, cotangents), traced(inputs, cotangents)
    budget = (budgets.recurrence_budget(*inputs[:3], inputs[5], *cotangents, scale=2.0) if rule == "linear" else
              rules_budget.rules_budget(*inputs, *cotangents, scale=2.0))
    for name, x, y in zip(("dq", "dk", "dv", "dg", "dbeta", "dS"), found, expected, strict=True):
        if x is not None:
            budgets.assert_within(x, y, 2 * getattr(budget, name), name)         # each may be off by that much


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "decay"), KINDS)
def test_second_derivatives_are_those_of_the_definition(rule: str, decay: str, rng: np.random.Generator, wide: str) -> None:
    inputs, cotangents = arrays(rule, decay, rng, dtype=wide)
    along = jax.tree.map(lambda x: jnp.asarray(rng.integers(-1, 2, x.shape), x.dtype), inputs)
    expected = compiled(partial(forward_over_reverse, definition))(inputs, along, cotangents)
    assert all(np.any(x) for x in jax.tree.leaves(expected))
    for order in (forward_over_reverse, reverse_over_reverse):
        same(compiled(partial(order, by_rule(adapter.recurrence, rule)))(inputs, along, cotangents), expected)


@pytest.mark.parametrize("kind", [("linear", "head"), ("gated", "channel")])
def test_second_derivatives_of_real_numbers_keep_the_budget(kind: tuple[str, str], rng: np.random.Generator, wide: str) -> None:
    """A gradient's bar is a sum of products of inputs and decays, all of them positive. Along t its derivative is at most the bar itself at
    |x| + |t|, with decays of g + |t|, and a path through it has at most as many roundings again."""
    inputs, cotangents = arrays(*kind, rng, exact=False, dtype=wide)
    narrow = jax.tree.map(lambda x: x.astype("float32"), (inputs, cotangents))
    inputs, cotangents = jax.tree.map(lambda x: x.astype("float64"), narrow)
    along = jax.tree.map(lambda x: jnp.asarray(rng.integers(-1, 2, x.shape), x.dtype), inputs)
    expected = compiled(partial(forward_over_reverse, definition, loss=linear_loss))(inputs, along, cotangents)
    found = compiled(partial(forward_over_reverse, by_rule(adapter.recurrence, kind[0]), loss=linear_loss))(
        narrow[0], jax.tree.map(lambda x: x.astype("float32"), along), narrow[1])
    raised = [None if x is None else (x if i == 3 else jnp.abs(x)) + jnp.abs(t) for i, (x, t) in enumerate(zip(inputs, along, strict=True))]
    budget = (budgets.recurrence_budget(*raised[:3], raised[5], *cotangents, dtype="float32") if kind[0] == "linear" else
              rules_budget.rules_budget(*raised, *cotangents, dtype="float32"))
    for name, x, y in zip(("dq", "dk", "dv", "dg", "dbeta", "dS"), found, expected, strict=True):
        if x is not None:
            assert x.dtype == "float32"
            budgets.assert_within(x, y, 2 * getattr(budget, name), name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("linear", "head"), ("delta", "head")])
def test_compiled_and_not_compiled_give_the_same(kind: tuple[str, str], rng: np.random.Generator) -> None:
    inputs, cotangents = arrays(*kind, rng)
    f = by_rule(adapter.recurrence, kind[0])
    expected = f(*inputs), gradients(f, inputs, cotangents)
    same((jax.jit(f)(*inputs), jax.jit(partial(gradients, f))(inputs, cotangents)), expected)
    with jax.disable_jit():
        same((f(*inputs), gradients(f, inputs, cotangents)), expected)


@pytest.mark.parametrize("kind", [("linear", "head"), ("gated_delta", "channel")])
def test_mapped_is_a_loop(kind: tuple[str, str], rng: np.random.Generator) -> None:
    """Over all arrays, and over some of them: q, v and the cotangents, for the same keys, decays and state."""
    f = compiled(partial(gradients, by_rule(adapter.recurrence, kind[0])))
    drawn = [arrays(*kind, rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
    same(jax.vmap(f)(*stacked), jax.tree.map(lambda *x: jnp.stack(x), *(f(*x) for x in drawn)))
    (q, k, v, g, beta, state), cotangents = stacked
    one = drawn[0][0]
    mapped = jax.vmap(f, in_axes=((0, None, 0, None, None, None), 0))((q, one[1], v, *one[3:]), cotangents)
    same(mapped, jax.tree.map(lambda *x: jnp.stack(x), *(f((q[i], one[1], v[i], *one[3:]), (cotangents[0][i], cotangents[1][i]))
                                                         for i in range(3))))


def test_only_the_inputs_wait_for_the_backward(rng: np.random.Generator) -> None:
    inputs, _ = arrays("gated_delta", "channel", rng)
    kept = jax.tree.leaves(jax.vjp(by_rule(adapter.recurrence, "gated_delta"), *inputs)[1])
    assert sorted(x.shape for x in kept) == sorted(x.shape for x in jax.tree.leaves(inputs))


def test_every_product_is_asked_for_in_full_precision(rng: np.random.Generator) -> None:
    """Where the device has a faster one, float32 factors would else be rounded to fewer bits."""
    inputs, cotangents = arrays("gated_delta", "channel", rng)
    f = by_rule(adapter.recurrence, "gated_delta")
    with jax.default_matmul_precision("bfloat16"):
        for code in (jax.make_jaxpr(f)(*inputs), jax.make_jaxpr(partial(gradients, f))(inputs, cotangents),
                     jax.make_jaxpr(lambda x: jax.jvp(lambda x: gradients(f, x, cotangents), (x,), (x,)))(inputs)):
            products = str(code).split("dot_general[")[1:]
            assert len(products) > 10 and all("precision=(Precision.HIGHEST, Precision.HIGHEST)" in x.partition("] ")[0] for x in products)


def test_a_scan_over_steps_is_the_sequence_gradients_too(rng: np.random.Generator) -> None:
    inputs, cotangents = arrays("gated_delta", "channel", rng)

    def steps(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            return adapter.recurrence_step(*x, state, rule="gated_delta", scale=2.0)[::-1]

        state, out = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v, g, beta)))
        return jnp.moveaxis(out, 0, 2), state

    whole = by_rule(adapter.recurrence, "gated_delta", scale=2.0)
    same(steps(*inputs), whole(*inputs))
    same(compiled(partial(gradients, steps))(inputs, cotangents), gradients(whole, inputs, cotangents))


def test_packed_sequences_are_sequences_apart(rng: np.random.Generator) -> None:
    (q, k, v, g, _, _), (dout, _) = arrays("gated", "head", rng)
    f = partial(adapter.recurrence, rule="gated", cu_seqlens=[0, 10, 10, N])
    (out, state), pullback = jax.vjp(f, q, k, v, g)
    parts = [slice(0, 10), slice(10, 10), slice(10, N)]
    alone = [jax.vjp(partial(adapter.recurrence, rule="gated"), q[:, :, rows], k[:, :, rows], v[:, :, rows], g[:, :, rows]) for rows in parts]
    same(out, jnp.concatenate([outputs[0] for outputs, _ in alone], axis=2))
    same(state, jnp.stack([outputs[1] for outputs, _ in alone], axis=2))
    dstate = jnp.asarray(rng.integers(-2, 3, state.shape), "float32")
    expected = [pull((dout[:, :, rows], dstate[:, :, i])) for i, (rows, (_, pull)) in enumerate(zip(parts, alone, strict=True))]
    same(pullback((dout, dstate)), tuple(jnp.concatenate(x, axis=2) for x in zip(*expected, strict=True)))


@pytest.mark.parametrize(("rule", "decay"), KINDS)
def test_no_positions_leave_the_state_as_it_was(rule: str, decay: str, rng: np.random.Generator) -> None:
    inputs, cotangents = arrays(rule, decay, rng, n=0)
    f = by_rule(adapter.recurrence, rule)
    out, state = f(*inputs)
    assert out.shape == (B, H * G, 0, M) and same(state, inputs[5])
    *empty, dstate = gradients(f, inputs, cotangents)
    assert same(dstate, cotangents[1]) and [None if x is None else x.shape for x in empty] == [None if x is None else x.shape for x in inputs[:5]]


# --- causal linear attention ---------------------------------------------------------------------------------------------------------

def normalised_definition(q: Any, k: Any, v: Any, state: Any, *, phi: Any, eps: float) -> Any:
    """Attention with its normaliser, with JAX's own derivatives."""
    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    both, end = definition(phi(q), phi(k), jnp.concatenate([v, ones], axis=-1), state=jnp.concatenate([state.S, state.z[..., None]], axis=-1))
    return both[..., :-1] / (both[..., -1:] + eps), refattn.State(end[..., :-1], end[..., -1])


def dyadic(rng: np.random.Generator) -> tuple[Any, Any]:
    """Integers for which every denominator q·z is 1, -1, 2 or ½: the first feature of all keys is 0 and of z is 1, and that of q makes it so."""
    q, k, v, S = (rng.integers(-2, 3, shape).astype(float) for shape in ((B, H * G, N, D), (B, H, N, D), (B, H, N, M), (B, H, D, M)))
    k[..., 0], z = 0, rng.integers(-2, 3, (B, H, D)).astype(float)
    z[..., 0] = 1
    behind = np.repeat(z[:, :, None] + np.cumsum(k, axis=2), G, axis=1)
    q[..., 0] = rng.choice([1, -1, 2, 0.5], (B, H * G, N)) - (q[..., 1:] * behind[..., 1:]).sum(-1)
    cotangents = tuple(rng.integers(-2, 3, shape).astype(float) for shape in ((B, H * G, N, M), S.shape, z.shape))
    return jax.tree.map(jnp.asarray, ((q, k, v, refattn.State(S, z)), (cotangents[0], refattn.State(*cotangents[1:]))))


def test_normalised_attention_its_gradients_and_second_derivatives_are_the_definitions(rng: np.random.Generator, wide: str) -> None:
    inputs, cotangents = dyadic(rng)
    along = jax.tree.map(lambda x: jnp.asarray(rng.integers(-1, 2, x.shape), x.dtype), inputs)
    ours = partial(adapter.causal_linear_attention, feature_map="identity", eps=0)
    theirs = partial(normalised_definition, phi=lambda x: x, eps=0)
    same(ours(*inputs), theirs(*inputs))
    same(compiled(partial(gradients, ours))(inputs, cotangents), compiled(partial(gradients, theirs))(inputs, cotangents))
    for order in (forward_over_reverse, reverse_over_reverse):
        same(compiled(partial(order, ours))(inputs, along, cotangents), compiled(partial(order, theirs))(inputs, along, cotangents))


@pytest.mark.parametrize("half", [False, True])
def test_the_papers_attention_keeps_the_budget(half: bool, rng: np.random.Generator) -> None:
    dtype = "bfloat16" if half else "float32"
    q, k, v, dout = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, H * G, N, D), (B, H, N, D), (B, H, N, M), (B, H * G, N, M)))
    S, z, dS, dz = (jnp.asarray(rng.random(shape), "float32") for shape in ((B, H, D, M), (B, H, D)) * 2)
    (out, end), pullback = jax.vjp(adapter.causal_linear_attention, q, k, v, refattn.State(S, z))
    dq, dk, dv, dstart = pullback((dout, refattn.State(dS, dz)))
    assert {x.dtype for x in (out, dq, dk, dv)} == {jnp.dtype(dtype)} and {x.dtype for x in (*end, *dstart)} == {jnp.dtype("float32")}
    wide = [np.asarray(x).astype(np.float64) for x in (q, k, v, S, z, dout, dS, dz)]
    (out_, end_), pull = refattn.vjp(refattn.causal_linear_attention, *wide[:3], refattn.State(*wide[3:5]))
    dq_, dk_, dv_, dstart_ = pull(wide[5], refattn.State(*wide[6:]))
    budget = budgets.attention_budget(*wide, phi=refattn.oracle.eq7, dphi=lambda x: np.exp(np.minimum(x, 0)), dtype=np.asarray(q).dtype)
    for name, x, y, bound in zip(("out", "S", "z", "dq", "dk", "dv", "dS", "dz"), (out, *end, dq, dk, dv, *dstart),
                                 (out_, *end_, dq_, dk_, dv_, *dstart_), budget, strict=True):
        budgets.assert_within(x, y, bound, name)


def test_attention_may_be_mapped_and_scanned_and_its_state_handed_on(rng: np.random.Generator, wide: str) -> None:
    drawn = [dyadic(rng) for _ in range(2)]
    f = partial(adapter.causal_linear_attention, feature_map="identity", eps=0)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
    same(jax.vmap(partial(gradients, f))(*stacked), jax.tree.map(lambda *x: jnp.stack(x), *(gradients(f, *x) for x in drawn)))
    (q, k, v, state), cotangents = drawn[0]

    def steps(q: Any, k: Any, v: Any, state: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            return adapter.causal_linear_attention_step(*x, state, feature_map="identity", eps=0)[::-1]

        state, out = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))
        return jnp.moveaxis(out, 0, 2), state

    def parts(q: Any, k: Any, v: Any, state: Any) -> Any:
        first, state = f(q[:, :, :20], k[:, :, :20], v[:, :, :20], state)
        second, state = f(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], tuple(state))
        return jnp.concatenate([first, second], axis=2), state

    for other in (steps, parts):
        same(other(q, k, v, state), f(q, k, v, state))
        same(compiled(partial(gradients, other))((q, k, v, state), cotangents), gradients(f, (q, k, v, state), cotangents))


def test_a_feature_map_of_your_own(rng: np.random.Generator) -> None:
    doubled = FeatureMap(lambda x: 2 * jnp.abs(x) + 1, lambda dy, x: 2 * dy * jnp.sign(x))
    q, k, v = (jnp.asarray(rng.integers(1, 3, shape), "float32") for shape in ((B, H * G, N, D), (B, H, N, D), (B, H, N, M)))
    for f in (adapter.causal_linear_attention, lambda *x, **more: refattn.vjp(refattn.causal_linear_attention, *x, **more)[0]):
        found = f(q, k, v, feature_map=doubled)
        same(found, refattn.causal_linear_attention(2 * q + 1, 2 * k + 1, v, feature_map="identity"))


# --- what it cannot do, and says ------------------------------------------------------------------------------------------------------

def test_forward_mode_alone_is_refused_and_the_bare_function_has_it(rng: np.random.Generator) -> None:
    inputs, _ = arrays("linear", "head", rng)
    with pytest.raises(TypeError, match="forward-mode .* custom_vjp"):
        jax.jvp(adapter.recurrence, inputs[:3], inputs[:3])
    found = jax.jvp(refattn.recurrence, inputs[:3], inputs[:3])[1]
    expected = jax.jvp(partial(definition, state=jnp.zeros((B, H, D, M))), inputs[:3], inputs[:3])[1]
    same(found, expected)


X, STATE = jnp.ones((2, 3)), refattn.State(jnp.ones((3, 3)), jnp.ones(3))


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: adapter.recurrence(np.ones((2, 3)), X, X), TypeError, "q: expected a JAX array, got ndarray; convert it with jax.numpy.asarray first"),
    (lambda: adapter.recurrence(X, X, X, state=3.0), TypeError, "state: expected a JAX array, got float"),
    (lambda: adapter.recurrence(X, X, X, rule="lin"), ValueError, "rule: expected one of 'linear', 'gated'"),
    (lambda: adapter.recurrence(X, X, X, rule="delta"), ValueError, "beta: rule 'delta' needs it"),
    (lambda: adapter.recurrence(X, X[:, :2], X), ValueError, "q and k must share D"),
    (lambda: adapter.recurrence(X, X, X.astype("bfloat16")), TypeError, "q is float32 and v is bfloat16"),
    (lambda: adapter.recurrence(X, X, X.astype(int)), TypeError, "v: expected float16, bfloat16, float32 or float64, got int32"),
    (lambda: adapter.recurrence(X, X, X, scale=jnp.ones(())), TypeError, "scale: expected a value that is known before tracing, got ArrayImpl"),
    (lambda: (adapter.recurrence(X, X, X, scale=1), adapter.recurrence(X, X, X, scale=True)), TypeError, "scale: expected a number, got bool"),
    (lambda: adapter.recurrence(X, X, X, cu_seqlens=[0, 3]), ValueError, "cu_seqlens: expected one axis that starts with 0"),
    (lambda: jax.jit(lambda at: adapter.recurrence(X, X, X, cu_seqlens=at))(jnp.array([0, 2])), TypeError,
     "cu_seqlens: expected a value that is known before tracing, got DynamicJaxprTracer"),
    (lambda: adapter.recurrence_step(X, X, [1.0]), TypeError, "v_t: expected a JAX array, got list"),
    (lambda: adapter.recurrence_step(X, X, X, X), ValueError, "g_t: rule 'linear' has no g_t"),
    (lambda: adapter.causal_linear_attention(X, X, X, STATE.S), TypeError, r"state: expected State\(S, z\) as a former call .* got ArrayImpl"),
    (lambda: adapter.causal_linear_attention(X, X, X, (STATE.S, None)), TypeError, r"as a former call returned it, got \(ArrayImpl, NoneType\)"),
    (lambda: adapter.causal_linear_attention(X, X, X, (STATE.S, 1.0)), TypeError, "state.z: expected a JAX array, got float"),
    (lambda: adapter.causal_linear_attention(X, X, X, refattn.State(STATE.S, STATE.S)), ValueError, "state.z: expected"),
    (lambda: adapter.causal_linear_attention(X, X, X, feature_map="elu"), ValueError, "feature_map: expected one of"),
    (lambda: adapter.causal_linear_attention_step(X, X, X, eps=-1), ValueError, "eps: expected a finite number ≥ 0"),
])
def test_what_is_wrong_is_said(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
