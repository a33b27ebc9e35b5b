"""Laws of the loops that Numba compiles: they are the recurrence and the attention, in every rule, dtype, layout and number of threads."""
from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refattn
from refattn import State, oracle
from refattn.rules import RULES
from refattn.testing.broken import named
from refattn.testing.budgets import assert_within, attention_budget
from refattn.testing.check import check_kernel
from refattn.testing.laws import law_equal_bits
from refattn.testing.strategies import cases, rule_cases, strided

pytest.importorskip("numba", reason="needs numba: pip install 'refattn[numba]'")
from refattn.compiled.attention import KEPT, TILE  # noqa: E402

DECAYS = [(rule, decay) for rule, more in RULES.items() for decay in ("head", "channel")[: 1 + ("g" in more)]]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("rule", "decay"), DECAYS)
def test_it_is_the_recurrence_and_its_transpose(rule: str, decay: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")

    def forward(*arrays: np.ndarray) -> Any:
        return refattn.recurrence(*named(rule, arrays), rule=rule, scale=0.5, compiled=True)

    def backward(dout: np.ndarray, dstate: np.ndarray, *arrays: np.ndarray) -> Any:
        _, pullback = refattn.vjp(refattn.recurrence, *named(rule, arrays), rule=rule, scale=0.5, compiled=True)
        return tuple(d for d in pullback(dout, dstate) if d is not None)

    report = check_kernel(forward, backward=backward, rule=rule, decay=decay, scale=0.5, dtype=dtype, grouped=True,
                          examples=15 if dtype == "float32" else 6, time_limit=300)
    assert report.passed and not report.untried, str(report)


@pytest.mark.parametrize(("rule", "decay"), DECAYS)
@pytest.mark.parametrize(("D", "M"), [(16, 32), (33, 40), (64, 64), (70, 3), (600, 90)])
def test_whole_and_part_vectors_of_features(rule: str, decay: str, D: int, M: int, rng: np.random.Generator) -> None:
    """On integers the same bits as the chunked form in NumPy, for features that fill vectors and for those that do not, over several tiles; a state
    too large for the heap, whose pages would be gone if nothing held it."""
    N = 75
    q, k, v, do = (rng.integers(-2, 3, (3, N, x)).astype(np.float32) for x in (D, D, M, M))
    S, dS = (rng.integers(-2, 3, (3, D, M)).astype(np.float32) for _ in range(2))
    g = np.where(rng.random((3, N, D) if decay == "channel" else (3, N)) < 0.2, -np.inf, 0).astype(np.float32) if "gated" in rule else None
    beta = None
    if "delta" in rule:
        k, beta = np.zeros_like(k), np.zeros((3, N), np.float32)
        for t in rng.permutation(N)[:5]:
            k[:, t, rng.permutation(D)[:2]], beta[:, t] = rng.choice([-1, 1]), 0.5
    both = [refattn.vjp(refattn.recurrence, q, k, v, g, beta, S, rule=rule, compiled=compiled) for compiled in (False, True)]
    for x, y in zip(both[0][0], both[1][0], strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(*(pullback(do, dS) for _, pullback in both), strict=True):
        if x is not None:
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("rule", RULES)
def test_any_strides_of_inputs_and_cotangents(rule: str, rng: np.random.Generator) -> None:
    q, k, v, do = (rng.integers(-2, 3, (2, 3, 40, x)).astype(np.float32) for x in (5, 5, 7, 7))
    g = np.where(rng.random((2, 3, 40)) < 0.3, -np.inf, 0).astype(np.float32) if "gated" in rule else None
    beta = (np.arange(240).reshape(2, 3, 40) % 40 == 7).astype(np.float32) if "delta" in rule else None
    S, dS = rng.integers(-2, 3, (2, 2, 3, 5, 7)).astype(np.float32)
    (out, end), pullback = refattn.vjp(refattn.recurrence, q, k, v, g, beta, S, rule=rule, compiled=True)
    expected = [out, end, *(d for d in pullback(do, dS) if d is not None)]
    for _ in range(4):
        awkward = [None if x is None else strided(x, rng) for x in (q, k, v, g, beta, S)]
        (out, end), pullback = refattn.vjp(refattn.recurrence, *awkward, rule=rule, compiled=True)
        for x, y in zip(expected, [out, end, *(d for d in pullback(strided(do, rng), strided(dS, rng)) if d is not None)], strict=True):
            np.testing.assert_array_equal(x, y)
    same = np.broadcast_to(do[..., :1], do.shape)
    for x, y in zip(pullback(same), pullback(same.copy()), strict=True):
        assert x is None or np.array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_heads_side_by_side_in_a_row_are_read_and_written_where_they_stand(dtype: str, rng: np.random.Generator) -> None:
    """(B, N, H, D) seen as (B, H, N, D), as a model has it, part of one array: the bits of contiguous arrays, in every result, dtype and kind of
    feature map; results stand in memory as their inputs do."""
    both = (0.15 * rng.standard_normal((2, 50, 3, 4, 32))).astype(dtype)                # keys of length 1 or less: no rule with a delta grows
    q, k, v = (both[:, :, i].swapaxes(1, 2) for i in range(3))
    do = rng.standard_normal((2, 50, 4, 32)).astype(dtype).swapaxes(1, 2)
    g, beta = -rng.random((2, 4, 50)).astype(dtype), rng.random((2, 4, 50)).astype(dtype)
    calls: list[Any] = [(refattn.recurrence, (q, k, v, g if "g" in more else None, beta if "beta" in more else None), {"rule": rule})
                        for rule, more in RULES.items()]
    calls += [(refattn.causal_linear_attention, (q, k, v), {"feature_map": feature_map}) for feature_map in ("elu1", "relu", "dpfp")]
    lengths = {"query_lengths": np.array([50, 7]), "key_lengths": np.array([3, 50]), "causal": True}
    calls.append((refattn.linear_attention, (q, k, v), lengths))
    for f, arrays, options in calls:
        found = []
        for copy in (False, True):
            given = [None if x is None else np.ascontiguousarray(x) if copy else x for x in arrays]
            outputs, pullback = refattn.vjp(f, *given, **options, compiled=True)
            out, *end = outputs if isinstance(outputs, tuple) else (outputs,)
            gradients = [d for d in pullback(np.ascontiguousarray(do) if copy else do) if d is not None]
            found.append([out, *(x for state in end for x in (state if isinstance(state, tuple) else (state,))), *gradients])
            assert copy or all(x.swapaxes(1, 2).flags.c_contiguous for x in (out, *gradients[:2]))
            assert all(x.dtype == dtype for x in (out, *gradients))
        law_equal_bits(dict(zip(("in a row", "copied"), found, strict=True)))


@pytest.mark.parametrize("feature_map", ["elu1", "relu", "identity"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=25)
@given(data=st.data())
def test_attention_is_that_of_the_oracle(dtype: str, feature_map: str, data: Any) -> None:
    """With a state before, lengths of queries and keys, grouped queries; NaN in padding reaches nothing."""
    case = data.draw(cases(dtype=dtype, longest=70))
    d, lengths = case.dims, data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    phi = {"elu1": oracle.eq7, "relu": lambda x: np.maximum(x, 0), "identity": lambda x: x}[feature_map]
    dphi = {"elu1": lambda x: np.exp(np.minimum(x, 0)), "relu": lambda x: (x > 0).astype(float), "identity": np.ones_like}[feature_map]
    q, k, v, dout = (np.abs(x) if feature_map == "identity" and i < 2 else x for i, x in enumerate((case.q, case.k, case.v, case.dout)))
    options: dict[str, Any] = {"feature_map": feature_map, "eps": 0.5, "causal": True}
    padding: dict[str, Any] = {}
    if lengths and d.lead:
        padding = {name: rng.integers(0, d.N + 1, d.lead[:1]) for name in ("query_lengths", "key_lengths")}
        for name, arrays in (("query_lengths", (q, dout)), ("key_lengths", (k, v))):
            for b, n in enumerate(padding[name]):
                for x in arrays:
                    x[b, ..., n:, :] = np.nan
    out, pullback = refattn.vjp(refattn.linear_attention, q, k, v, **options, **padding, compiled=True)
    none = np.zeros((*d.lead, d.H, d.D, d.M))
    budget = attention_budget(q, k, v, none, none[..., 0], dout, none, none[..., 0], phi=phi, dphi=dphi, eps=0.5, **padding)
    with np.errstate(invalid="ignore"):
        assert_within(out, oracle.linear_attention(q, k, v, phi=phi, causal=True, eps=0.5, **padding), budget.out)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    right = refattn.vjp(refattn.linear_attention, *wide, **options, **padding)[1](dout.astype(np.float64))
    for name, x, y, bound in zip("qkv", pullback(dout), right, (budget.dq, budget.dk, budget.dv), strict=True):
        assert_within(x, y, bound, f"d{name}")


@settings(max_examples=20)
@given(case=cases(dtype=np.float32, longest=40), seed=st.integers(0, 2**32 - 1))
def test_attention_from_a_state_to_a_state(case: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    S, z = rng.random(case.state.shape).astype(np.float32), rng.random(case.state.shape[:-1]).astype(np.float32)
    dz = rng.standard_normal(z.shape).astype(np.float32)
    (out, end), pullback = refattn.vjp(refattn.causal_linear_attention, case.q, case.k, case.v, State(S, z), compiled=True)
    wide = [x.astype(np.float64) for x in (case.q, case.k, case.v)]
    (right, right_end), right_pullback = refattn.vjp(refattn.causal_linear_attention, *wide, State(S.astype(float), z.astype(float)))
    b = attention_budget(case.q, case.k, case.v, S, z, case.dout, case.dstate, dz, phi=oracle.eq7, dphi=lambda x: np.exp(np.minimum(x, 0)))
    for name, x, y, bound in (("out", out, right, b.out), ("S", end.S, right_end.S, b.S), ("z", end.z, right_end.z, b.z)):
        assert_within(x, y, bound, name)
    *three, dstart = pullback(case.dout, State(case.dstate, dz))
    *right_three, right_start = right_pullback(case.dout.astype(float), State(case.dstate.astype(float), dz.astype(float)))
    for name, x, y, bound in zip(("dq", "dk", "dv", "dS", "dz"), (*three, *dstart), (*right_three, *right_start), (b.dq, b.dk, b.dv, b.dS, b.dz),
                                 strict=True):
        assert_within(x, y, bound, name)


def test_gradients_are_the_same_bits_whether_what_they_read_is_kept_or_made_again(rng: np.random.Generator) -> None:
    """A few positions more, of which no cotangent comes, change no bit of the gradients before them; with them a head is too large to be kept."""
    q, k, v, do = rng.standard_normal((4, 2, 700, 128)).astype(np.float32)
    N = 672
    assert N % TILE == 0 and N * 3 * 128 <= KEPT < 700 * 3 * 128
    do[:, N:] = 0
    short, long = (refattn.vjp(refattn.causal_linear_attention, *(x[:, :n] for x in (q, k, v)), compiled=True)[1](do[:, :n]) for n in (N, 700))
    for x, y in zip(short[:3], long[:3], strict=True):
        np.testing.assert_array_equal(x, y[:, :N])
    assert not long[1][:, N:].any() and not long[2][:, N:].any() and np.abs(short[1]).min(-1).max() > 0


# --- one position ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=30)
@given(data=st.data())
def test_on_integers_its_step_and_the_transpose_have_the_bits_of_the_other(rule: str, dtype: str, data: Any) -> None:
    """From any strides; the state is left as it was; without a state as with one of zeros."""
    c = data.draw(rule_cases(rule, dtype=np.dtype(dtype), exact=True, longest=1).filter(lambda c: c.dims.N))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    at = [None if x is None else strided(x[..., 0, :] if x.ndim == c.k.ndim else x[..., 0], rng) for x in (c.q, c.k, c.v, c.g, c.beta)]
    state, kept = strided(c.state, rng), c.state.copy()
    results: dict[str, Any] = {}
    for compiled in (False, True):
        outputs, pullback = refattn.vjp(refattn.recurrence_step, *at, state, rule=rule, scale=0.5, compiled=compiled)
        plain = refattn.recurrence_step(*at, state, rule=rule, scale=0.5, compiled=compiled)
        fresh = refattn.recurrence_step(*at, None, rule=rule, compiled=compiled)
        gradients = (*pullback(strided(c.dout[..., 0, :], rng), strided(c.dstate, rng)), *pullback(None, c.dstate), *pullback(c.dout[..., 0, :]))
        results[f"compiled={compiled}"] = [*outputs, *plain, *fresh, *(d for d in gradients if d is not None)]
    law_equal_bits(results)
    np.testing.assert_array_equal(state, kept)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("rule", "decay"), DECAYS)
def test_step_by_step_it_is_the_recurrence_and_its_transpose(rule: str, decay: str, dtype: str) -> None:
    def steps(arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[Any]]:
        state, outs, pullbacks = arrays["state"], [np.zeros((*arrays["q"].shape[:-2], 0, arrays["v"].shape[-1]), dtype)], []
        for t in range(arrays["q"].shape[-2]):
            at = [None if x is None else x[..., t, :] if x.ndim == arrays["k"].ndim else x[..., t] for x in six(arrays)[:5]]
            (out, state), pullback = refattn.vjp(refattn.recurrence_step, *at, state, rule=rule, compiled=True)
            outs.append(out[..., None, :])
            pullbacks.append(pullback)
        return np.concatenate(outs, -2), state, pullbacks

    def six(arrays: dict[str, Any]) -> list[Any]:
        return [arrays.get(name) for name in ("q", "k", "v", "g", "beta", "state")]

    def by_name(arrays: tuple[np.ndarray, ...]) -> dict[str, Any]:
        return dict(zip(("q", "k", "v", "g", "beta", "state"), named(rule, arrays), strict=True))

    def forward(*arrays: np.ndarray) -> Any:
        return steps(by_name(arrays))[:2]

    def backward(dout: np.ndarray, R: np.ndarray, *arrays: np.ndarray) -> Any:
        given = by_name(arrays)
        gradients = {name: None if x is None else np.zeros_like(x) for name, x in given.items()}
        pullbacks = steps(given)[2]
        for t in reversed(range(len(pullbacks))):
            *d, R = pullbacks[t](dout[..., t, :], R)
            for name, x in zip(("q", "k", "v", "g", "beta"), d, strict=True):
                if x is not None:
                    gradients[name][(..., t, slice(None)) if gradients[name].ndim == given["k"].ndim else (..., t)] = x
        return (*(gradients[name] for name in ("q", "k", "v", "g", "beta") if gradients[name] is not None), R)

    report = check_kernel(forward, backward=backward, rule=rule, decay=decay, dtype=dtype, grouped=True, examples=5, time_limit=300)
    assert report.passed and not report.untried, str(report)


@pytest.mark.parametrize("feature_map", ["elu1", "relu"])
@settings(max_examples=20)
@given(case=cases(dtype=np.float32, longest=9), seed=st.integers(0, 2**32 - 1))
def test_attention_step_by_step_is_attention(feature_map: str, case: Any, seed: int) -> None:
    """From a state, eq. (16) to (19), forwards and backwards through all steps, within the bound of the loop over positions."""
    rng, six = np.random.default_rng(seed), ("dq", "dk", "dv")
    S, z = (rng.random(shape).astype(np.float32) + 0.25 for shape in (case.state.shape, case.state.shape[:-1]))
    dz = rng.standard_normal(z.shape).astype(np.float32)
    phi, dphi = {"elu1": (oracle.eq7, lambda x: np.exp(np.minimum(x, 0))),
                 "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float))}[feature_map]
    options: dict[str, Any] = {"feature_map": feature_map, "eps": 0.5}
    state, outs, pullbacks = State(strided(S, rng), strided(z, rng)), [], []
    for t in range(case.dims.N):
        (out, state), pullback = refattn.vjp(refattn.causal_linear_attention_step, *(x[..., t, :] for x in (case.q, case.k, case.v)), state,
                                             **options, compiled=True)
        outs.append(out)
        pullbacks.append(pullback)
    wide = [x.astype(np.float64) for x in (case.q, case.k, case.v)]
    (right, right_end), right_pullback = refattn.vjp(refattn.causal_linear_attention, *wide, State(S.astype(float), z.astype(float)), **options)
    *right_three, right_start = right_pullback(case.dout.astype(float), State(case.dstate.astype(float), dz.astype(float)))
    b = attention_budget(case.q, case.k, case.v, S, z, case.dout, case.dstate, dz, phi=phi, dphi=dphi, eps=0.5)
    R: Any = State(case.dstate, dz)
    found = [np.zeros_like(x) for x in (case.q, case.k, case.v)]
    for t in reversed(range(case.dims.N)):
        *d, R = pullbacks[t](case.dout[..., t, :], R)
        for to, x in zip(found, d, strict=True):
            to[..., t, :] = x
        assert_within(outs[t], right[..., t, :], b.out[..., t, :], "out")
    for name, x, y, bound in (("S", state.S, right_end.S, b.S), ("z", state.z, right_end.z, b.z),
                              *zip((*six, "dS", "dz"), (*found, *R), (*right_three, *right_start), (b.dq, b.dk, b.dv, b.dS, b.dz), strict=True)):
        assert_within(x, y, bound, name)


@pytest.mark.parametrize(("rule", "shape"), [*((rule, shape) for rule in RULES for shape in ((2, 0, 3), (0, 3), (0, 4, 3))), ("linear", (2, 4, 0))])
def test_nothing_is_looped_over_where_nothing_is(rule: str, shape: tuple[int, ...]) -> None:
    q, v, S = np.ones(shape), np.ones((*shape[:-1], 5)), np.ones((*shape[:-2], shape[-1], 5))
    g, beta = (-np.ones(shape[:-1]) if name in RULES[rule] else None for name in ("g", "beta"))
    both = [refattn.vjp(refattn.recurrence, q, q, v, g, beta, S, rule=rule, compiled=compiled) for compiled in (False, True)]
    for x, y in zip(*((*outputs, *pullback(outputs[0], S)) for outputs, pullback in both), strict=True):
        np.testing.assert_array_equal(x, y)
    attend = [refattn.vjp(refattn.causal_linear_attention, q, q, v, compiled=compiled) for compiled in (False, True)]
    for x, y in zip(*((outputs[0], *pullback(outputs[0])[:3]) for outputs, pullback in attend), strict=True):
        np.testing.assert_array_equal(x, y)


def test_eight_threads_at_once_get_right_answers(rng: np.random.Generator) -> None:
    problems = [[rng.standard_normal((4, 200, 32)).astype(np.float32) for _ in range(3)] for _ in range(8)]
    alone = [refattn.recurrence(*x, compiled=True)[0] for x in problems]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for x, y in zip(alone, pool.map(lambda x: refattn.recurrence(*x, compiled=True)[0], problems), strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_its_exponential_is_within_two_units(dtype: str) -> None:
    """Over all of the range, subnormal results and those that are 0 or infinite too: g is one decay after one write."""
    least = {"float32": -105.0, "float64": -750.0}[dtype]
    g = np.concatenate([np.linspace(least, 5, 20_000), -np.logspace(-30, 1, 2_000), [0.0, -np.inf, -1e30]]).astype(dtype)[:, None, None]
    one = np.ones((len(g), 1, 1), dtype)
    for gates in (g[..., 0], g):
        _, state = refattn.recurrence(one * 0, one * 0, one * 0, gates, state=one, rule="gated", compiled=True)
        exact = np.exp(g.astype(np.longdouble)).reshape(state.shape)
        unit = np.spacing(np.maximum(exact.astype(dtype), np.finfo(dtype).smallest_subnormal))
        assert (np.abs(state.astype(np.longdouble) - exact) <= 2 * unit).all()


def test_numba_is_not_imported_before_it_is_asked_for() -> None:
    code = ("import sys, numpy as np, refattn; x = np.ones((5, 2)); refattn.recurrence(x, x, x); assert 'numba' not in sys.modules; "
            "refattn.recurrence(x, x, x, compiled=True); assert 'numba' in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_there_and_what_is_not_numpy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = pytest.importorskip("array_api_strict")
    x = strict.ones((4, 2))
    with pytest.raises(TypeError, match="compiled: expected NumPy arrays, got those of array_api_strict; leave it False"):
        refattn.recurrence(x, x, x, compiled=True)
    with pytest.raises(TypeError, match="compiled: expected NumPy arrays, got those of array_api_strict; leave it False"):
        refattn.causal_linear_attention_step(x, x, x, compiled=True)
    monkeypatch.setitem(sys.modules, "numba", None)
    y = np.ones((4, 2))
    for call in (refattn.recurrence, refattn.causal_linear_attention, refattn.recurrence_step,
                 refattn.causal_linear_attention_step):
        with pytest.raises(ImportError, match=r"pip install 'refattn\[numba\]'"):
            call(y, y, y, compiled=True)
