"""Oracles that no one here wrote: ONNX's standard operator `LinearAttention` (opset 27), as three programs compute it in float32.

Each judges our definition, and with it `recurrence`, on random cases of all four rules. Layouts differ: ONNX packs the heads into the last
axis, (B, T, H·D); scale 0 means 1/√D there; beta (B, T, 1) is one number for all heads.
"""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import oracle, recurrence
from refattn.testing.budgets import assert_within
from refattn.testing.check import check_kernel
from refattn.testing.loop_budget import loop_budget

onnx = pytest.importorskip("onnx", minversion="1.23", reason="needs onnx 1.23 or later: pip install 'refattn[onnx]'")
RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}    # has decay, has beta
INPUTS = ("query", "key", "value", "past_state", "decay", "beta")


# --- the programs ----------------------------------------------------------------------------------------------------------------------

class Case(NamedTuple):
    """One call in our layout, float32; `shared` for a beta that is the same for all heads; `scale` as ONNX has it."""

    rule: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray | None
    beta: np.ndarray | None
    state: np.ndarray | None
    shared: bool
    scale: float
    chunk: int

    @property
    def factor(self) -> float:
        return self.scale or self.q.shape[-1] ** -0.5


def packed(x: np.ndarray | None) -> np.ndarray | None:
    """(B, H, T, D) or (B, H, T) -> (B, T, H·D) or (B, T, H)."""
    return None if x is None else np.ascontiguousarray(np.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1))


def model(c: Case, domain: str, version: int) -> tuple[Any, dict[str, np.ndarray]]:
    """A model of one node, and what to feed it. All shapes are in the model: onnxruntime asks for them (see `onnxruntime_standard`)."""
    arrays = (packed(c.q), packed(c.k), packed(c.v), c.state, packed(c.g), packed(c.beta[:, :1] if c.shared and c.beta is not None else c.beta))
    feeds = {name: x for name, x in zip(INPUTS, arrays, strict=True) if x is not None}
    B, Hq, T, _ = c.q.shape
    shapes = {"output": (B, T, Hq * c.v.shape[-1]), "present_state": (B, c.k.shape[1], c.k.shape[-1], c.v.shape[-1])}
    value = lambda name, shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    node = onnx.helper.make_node("LinearAttention", [name if name in feeds else "" for name in INPUTS], list(shapes), domain=domain, q_num_heads=Hq,
                                 kv_num_heads=c.k.shape[1], update_rule=c.rule, scale=c.scale, chunk_size=c.chunk)
    graph = onnx.helper.make_graph([node], "one", [value(n, x.shape) for n, x in feeds.items()], [value(n, s) for n, s in shapes.items()])
    opsets = [onnx.helper.make_opsetid(domain, version), *([onnx.helper.make_opsetid("", 21)] if domain else [])]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


def onnx_reference(c: Case) -> list[np.ndarray]:
    """onnx.reference: the standard's own definition in NumPy."""
    from onnx.reference import ReferenceEvaluator
    whole, feeds = model(c, "", 27)
    return ReferenceEvaluator(whole).run(None, feeds)


def onnxruntime_on_cpu(c: Case, domain: str, version: int) -> list[np.ndarray]:
    onnxruntime = pytest.importorskip("onnxruntime", minversion="1.32", reason="needs onnxruntime 1.32 or later, which there is for "
                                      "Python 3.11 and later: pip install 'refattn[onnx]'")
    whole, feeds = model(c, domain, version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def onnxruntime_standard(c: Case) -> list[np.ndarray]:
    """ai.onnx, opset 27. onnxruntime 1.32 has no kernel for it: it expands the operator's function body into a Scan, which runs only where
    all shapes stand in the model."""
    return onnxruntime_on_cpu(c, "", 27)


def onnxruntime_fused(c: Case) -> list[np.ndarray]:
    """com.microsoft, version 1: the fused CPU kernel, with the same inputs and attributes."""
    return onnxruntime_on_cpu(c, "com.microsoft", 1)


PROGRAMS = [onnx_reference, onnxruntime_standard, onnxruntime_fused]


def unpacked(c: Case, found: list[np.ndarray]) -> list[np.ndarray]:
    out, state = found
    B, Hq, T, _ = c.q.shape
    return [np.moveaxis(out.reshape(B, T, Hq, -1), 1, 2), state]


# --- ours ------------------------------------------------------------------------------------------------------------------------------

def definition(c: Case) -> tuple[np.ndarray, np.ndarray]:
    return oracle.full_recurrence(c.q, c.k, c.v, c.g, c.beta, c.state, scale=c.factor)


def fast(c: Case) -> tuple[np.ndarray, np.ndarray]:
    wide = (None if x is None else x.astype(np.float64) for x in (c.q, c.k, c.v, c.g, c.beta, c.state))
    return recurrence(*wide, rule=c.rule, scale=c.factor)


OURS = [definition, fast]


def bounds(c: Case) -> tuple[np.ndarray, ...]:
    """That of the program, in float32. Ours are in float64, where a unit roundoff is 2⁻²⁹ as large, and judged elsewhere: 2⁻¹⁰ is for them."""
    budgets = loop_budget(c.q, c.k, c.v, c.g, c.beta, c.state, scale=c.factor)
    return tuple((1 + 2.0**-10) * b for b in budgets)


def judge(program, ours, c: Case) -> None:
    for name, found, expected, bound in zip(("out", "state"), unpacked(c, program(c)), ours(c), bounds(c), strict=True):
        assert found.dtype == np.float32
        assert_within(found, expected, bound, f"{program.__name__} {c.rule} {name}")


# --- the cases -------------------------------------------------------------------------------------------------------------------------

def case(rng: np.random.Generator, rule: str, B: int, H: int, G: int, N: int, D: int, M: int, *, channels: bool = False, shared: bool = False,
         past: bool = True, scale: float = 0.0, chunk: int = 64, strongest: float = 3.0, resets: bool = False) -> Case:
    """Normal q and v, keys of length 1, β in (0, 1), decays in (-strongest, 0), with `resets` some of -inf."""
    has_g, delta = RULES[rule]
    f32 = lambda x: np.asarray(x, np.float32)
    k = rng.normal(size=(B, H, N, D))
    g = -strongest * rng.random((B, H, N, D) if channels else (B, H, N))
    beta = np.broadcast_to(rng.uniform(0.01, 0.99, (B, 1 if shared else H, N)), (B, H, N))
    if resets:
        g[rng.random(g.shape) < 0.2] = -np.inf
    return Case(rule, f32(rng.normal(size=(B, H * G, N, D))), f32(k / np.maximum(np.sqrt((k * k).sum(-1, keepdims=True)), 1e-3)),
                f32(rng.normal(size=(B, H, N, M))), f32(g) if has_g else None, f32(beta) if delta else None,
                f32(rng.normal(size=(B, H, D, M))) if past else None, shared, scale, chunk)


@st.composite
def cases(draw, rule: str) -> Case:
    # D > 1: with one channel a decay per channel and one per head have the same shape in ONNX
    B, H, G, N, D, M = (draw(st.integers(least, most)) for least, most in ((1, 3), (1, 3), (1, 3), (1, 9), (2, 5), (1, 5)))
    flags = {name: draw(st.booleans()) for name in ("channels", "shared", "past", "resets")}
    return case(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), rule, B, H, G, N, D, M, **flags,
                scale=draw(st.sampled_from([0.0, 1.0, 0.375])), chunk=draw(st.sampled_from([1, 2, 4, 64])),
                strongest=draw(st.sampled_from([1.0, 50.0])))


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("rule", RULES)
@given(st.data())
def test_they_compute_what_we_define(rule, program, ours, data):
    judge(program, ours, data.draw(cases(rule)))


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_they_do_so_across_their_chunks(rule, channels, program, ours, rng):
    """150 positions are two of their chunks of 64 and a part of one."""
    judge(program, ours, case(rng, rule, B=2, H=2, G=3, N=150, D=16, M=8, channels=channels, strongest=0.1))


@pytest.mark.parametrize("program", [onnx_reference, onnxruntime_fused])
@pytest.mark.parametrize(("rule", "decay"), [(rule, decay) for rule, (has_g, _) in RULES.items() for decay in ("head", "channel")[: 1 + has_g]])
def test_the_checker_finds_nothing_in_them(rule: str, decay: str, program: Any) -> None:
    """Single channels apart: with D = 1 a decay per channel and one per head have the same shape in ONNX."""
    has_g, delta = RULES[rule]

    def fn(q: np.ndarray, k: np.ndarray, v: np.ndarray, *rest: np.ndarray) -> list[np.ndarray]:
        *gates, state = rest
        g, beta = (gates.pop(0) if has else None for has in (has_g, delta))
        c = Case(rule, q, k, v, g, beta, state, False, 0.0, 64)
        return unpacked(c, program(c))

    report = check_kernel(fn, rule=rule, decay=decay, scale="1/sqrt(d)", grouped=True, widths=((5, 4), (4, 7)), examples=6)
    assert report.passed and report.cases["definition, integers"] == 6, str(report)


# --- what this would catch -----------------------------------------------------------------------------------------------------------------

def planted(mistake: str):
    """The equation of one head with one mistake."""
    def equation(q, k, v, g, beta, S):
        out = np.zeros((len(q), v.shape[-1]))
        for t in range(len(q)):
            a = 1.0 if g is None else 1 + g[t] if mistake == "decay in linear space" else np.exp(g[t])
            P = S * (a[:, None] if np.ndim(a) else a)
            kept = S if mistake == "the delta looks at the state before its decay" else P
            if beta is None:
                write = v[t]
            elif mistake == "beta before the subtraction":
                write = beta[t] * v[t] - kept.T @ k[t]
            else:
                write = beta[t] * (v[t] - kept.T @ k[t])
            S, old = P + np.outer(k[t], write), S
            out[t] = (old if mistake == "read before the write" else S).T @ q[t]
        return out, S
    return equation


MISTAKES = {"decay in linear space": ("gated", "gated_delta"), "the delta looks at the state before its decay": ("gated_delta",),
            "beta before the subtraction": ("delta", "gated_delta"), "read before the write": tuple(RULES), "heads modulo": tuple(RULES),
            "no scale": tuple(RULES), "one position late": tuple(RULES)}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("rule, mistake", [(rule, mistake) for mistake, rules in MISTAKES.items() for rule in rules])
def test_a_mistake_in_the_definition_would_be_seen(rule, mistake, program, rng, monkeypatch):
    c = case(rng, rule, B=2, H=2, G=2, N=6, D=3, M=4, channels=mistake == "decay in linear space", strongest=0.5)
    found, bound = program(c), bounds(c)
    recorded = functools.wraps(program)(lambda _: found)
    judge(recorded, definition, c)
    monkeypatch.setattr(f"{__name__}.bounds", lambda _: bound)                          # the judge stays right, the definition does not
    if mistake == "heads modulo":
        monkeypatch.setattr(oracle, "_kv", lambda at, q, k: (*at[:-1], at[-1] % k.shape[-3]))
    elif mistake == "no scale":
        monkeypatch.setattr(Case, "factor", 1.0)
    elif mistake == "one position late":
        c = c._replace(v=np.roll(c.v, 1, axis=-2))
    else:
        monkeypatch.setattr(oracle, "gated_delta", planted(mistake))
    with pytest.raises(AssertionError, match="times the bound"):
        judge(recorded, definition, c)


@pytest.mark.parametrize("rule", RULES)
def test_the_planted_equation_without_a_mistake_is_the_definition(rule, rng, monkeypatch):
    """So what the law above catches is the mistake, not the copy."""
    c = case(rng, rule, B=2, H=2, G=2, N=6, D=3, M=4)
    right = definition(c)
    monkeypatch.setattr(oracle, "gated_delta", planted("none"))
    assert all(np.array_equal(x, y) for x, y in zip(right, definition(c), strict=True))
