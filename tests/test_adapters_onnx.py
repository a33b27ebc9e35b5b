"""Laws of the ONNX models: run by onnxruntime and by onnx.reference, they are the library's functions."""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import State, causal_linear_attention, oracle
from refattn.generate import generate
from refattn.losses import cross_entropy_backward, cross_entropy_forward
from refattn.optim import adam_init, adam_step
from refattn.rules import RULES
from refattn.testing.budgets import assert_within, attention_budget, gamma
from refattn.testing.check import check_kernel
from refattn.testing.strategies import cases
from refattn.transformer import (Config, transformer_backward, transformer_forward, transformer_init, transformer_prefill, transformer_step_init)

onnx = pytest.importorskip("onnx", minversion="1.23", reason="needs onnx 1.23 or later: pip install 'refattn[onnx]'")
adapter = pytest.importorskip("refattn.adapters.onnx")
seeds = st.integers(0, 2**32 - 1)
SCAN, STANDARD, FUSED = adapter.OPERATORS
Run = Callable[..., list[np.ndarray]]


# --- the programs ------------------------------------------------------------------------------------------------------------------------

def onnx_reference(model: Any) -> Run:
    from onnx.reference import ReferenceEvaluator
    evaluator = ReferenceEvaluator(model)
    return lambda *arrays: evaluator.run(None, dict(zip(evaluator.input_names, arrays, strict=True)))


def onnxruntime(model: Any) -> Run:
    runtime = pytest.importorskip("onnxruntime", minversion="1.32", reason="needs onnxruntime 1.32 or later, which there is for Python 3.11 and "
                                  "later: pip install 'refattn[onnx]'")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


PROGRAMS = [onnx_reference, onnxruntime]
PREFILLS = [(onnx_reference, SCAN), (onnx_reference, STANDARD), (onnxruntime, SCAN), (onnxruntime, STANDARD), (onnxruntime, FUSED)]
DECAYS = [(rule, decay) for rule, more in RULES.items() for decay in ("head", "channel")[:1 + ("g" in more)]]


# --- the recurrence ----------------------------------------------------------------------------------------------------------------------

def kernel(program: Callable[[Any], Run], export: Callable[..., Any], rule: str) -> Callable[..., Any]:
    """A function of q, k, v, g, beta and the state for `check_kernel`. A model is exported once for all numbers of sequences and positions."""
    exported: dict[Any, Run] = {}

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        key = tuple((x.shape[1], *x.shape[3:]) for x in arrays)
        if key not in exported:
            exported[key] = program(export(**dict(zip(names, arrays[:-1], strict=True))))
        return exported[key](*arrays)

    names = ("q", "k", "v", *RULES[rule])
    return run


def stepped(program: Callable[[Any], Run], rule: str) -> Callable[..., Any]:
    def export(**arrays: np.ndarray) -> Run:
        return program(adapter.recurrence_step_model(**{f"{name}_t": x[:, :, 0] for name, x in arrays.items()}, rule=rule))

    def run(step: Run) -> Run:
        def positions(*arrays: np.ndarray) -> list[np.ndarray]:
            *inputs, state = arrays
            out = []
            for t in range(inputs[0].shape[2]):
                out_t, state = step(*(np.ascontiguousarray(x[:, :, t]) for x in inputs), state)
                out.append(out_t)
            return [np.stack(out, 2), state]
        return positions

    return kernel(run, export, rule)


@pytest.mark.parametrize(("program", "operator"), PREFILLS)
@pytest.mark.parametrize(("rule", "decay"), DECAYS)
def test_a_prefill_is_the_recurrence(rule, decay, program, operator):
    fn = kernel(program, functools.partial(adapter.recurrence_model, rule=rule, operator=operator), rule)
    report = check_kernel(fn, rule=rule, decay=decay, grouped=True, examples=8)
    assert report.passed and "in two parts" in report.cases, str(report)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("rule", "decay"), DECAYS)
def test_steps_are_the_recurrence(rule, decay, program):
    report = check_kernel(stepped(program, rule), rule=rule, decay=decay, grouped=True, examples=5)
    assert report.passed, str(report)


@pytest.mark.parametrize("rule", RULES)
def test_float64_stays_float64(rule):
    whole = kernel(onnxruntime, functools.partial(adapter.recurrence_model, rule=rule), rule)
    for fn in (whole, stepped(onnxruntime, rule)):
        report = check_kernel(fn, rule=rule, dtype="float64", grouped=True, examples=5)
        assert report.passed, str(report)


@pytest.mark.parametrize(("program", "operator"), PREFILLS)
def test_the_scale_is_a_number_like_any_other(program, operator):
    """Of ONNX's operator, 0 would mean 1/√D."""
    for scale in (0, 0.3, -2.0, 1e-5):
        fn = kernel(program, functools.partial(adapter.recurrence_model, scale=scale, operator=operator), "linear")
        report = check_kernel(fn, scale=scale, grouped=True, examples=4)
        assert report.passed, str(report)


# --- attention ---------------------------------------------------------------------------------------------------------------------------

PHIS = {"elu1": oracle.eq7, "relu": lambda x: np.maximum(x, 0), "exp": np.exp}


@functools.cache
def attention_run(program: Callable[[Any], Run], operator: str | None, phi: str, eps: float, *sizes: int) -> Run:
    H, G, D, M = sizes
    n = () if operator is None else (2,)
    arrays = [np.zeros((1, heads, *n, width), np.float32) for heads, width in ((G * H, D), (H, D), (H, M))]
    if operator is None:
        return program(adapter.causal_linear_attention_step_model(*arrays, feature_map=phi, eps=eps))
    return program(adapter.causal_linear_attention_model(*arrays, feature_map=phi, eps=eps, operator=operator))


def attended(program: Callable[[Any], Run], operator: str | None, phi: str, eps: float, *arrays: np.ndarray) -> list[np.ndarray]:
    """What a prefill gives; for operator None, step after step."""
    q, k, v, S, z = arrays
    run = attention_run(program, operator, phi, eps, k.shape[1], q.shape[1] // k.shape[1], k.shape[-1], v.shape[-1])
    if operator is not None:
        return run(*arrays)
    out = []
    for t in range(q.shape[2]):
        out_t, S, z = run(q[:, :, t], k[:, :, t], v[:, :, t], S, z)
        out.append(out_t)
    return [np.stack(out, 2), S, z]


ATTENTIONS = [*PREFILLS, (onnx_reference, None), (onnxruntime, None)]


@pytest.mark.parametrize(("program", "operator"), ATTENTIONS)
@given(st.sampled_from(list(adapter.PHI)), cases(dtype="float32", longest=20).filter(lambda c: c.dims.N > 0), seeds, st.sampled_from([1e-6, 0.5]))
def test_normalised_attention_is_that_of_the_oracle(program, operator, phi, c, seed, eps):
    q, k, v, S = (x.reshape(-1, *x.shape[len(c.dims.lead):]) for x in (c.q, c.k, c.v, c.state))
    z = np.random.default_rng(seed).random(S.shape[:-1], np.float32)
    b = attention_budget(q, k, v, S, z, 0 * c.dout.reshape(*q.shape[:-1], -1), 0 * S, 0 * z, phi=PHIS[phi], dphi=PHIS[phi], eps=eps)
    out, state = oracle.causal_linear_attention(q, k, v, (S, z), phi=PHIS[phi], eps=eps)
    found = attended(program, operator, phi, eps, q, k, v, S, z)
    for name, x, y, bound in zip(("out", "S", "z"), found, (out, *state), (b.out, b.S, b.z), strict=True):
        assert x.dtype == np.float32
        assert_within(x, y, bound, name)


@pytest.mark.parametrize(("program", "operator"), ATTENTIONS)
def test_a_query_that_no_key_counts_for_gets_zeros(program, operator, rng):
    """The denominator is exactly 0, whatever S holds: ε = 0, z = 0 and φ(k) = 0 up to position 2."""
    q, k = np.abs(rng.standard_normal((2, 2, 3, 4, 5))).astype(np.float32)
    k[:, :, :2] *= -1
    v, S, z = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5)))
    z *= 0
    out, _, _ = attended(program, operator, "relu", 0.0, q, k, v, S, z)
    expected, _ = causal_linear_attention(q, k, v, State(S, z), feature_map="relu", eps=0)
    assert (out[:, :, :2] == 0).all() and (out[:, :, 2:] != 0).all() and np.isfinite(out).all()
    np.testing.assert_array_equal(out == 0, expected == 0)


# --- the transformer ---------------------------------------------------------------------------------------------------------------------

ROUNDINGS = 4096            # as in tests/test_transformer.py: no path through these models has more, and a mistake is orders of magnitude larger
configs = st.builds(Config, vocabulary=st.just(7), length=st.just(12), width=st.sampled_from([4, 8, 6]), heads=st.sampled_from([1, 2]),
                    layers=st.integers(1, 2), feed_forward=st.sampled_from([3, 5]), attention=st.just("linear"), causal=st.just(True),
                    feature_map=st.sampled_from(list(adapter.PHI)), norm=st.sampled_from(["pre", "post"]),
                    positions=st.sampled_from(["learned", "sinusoidal"]),
                    activation=st.sampled_from(["gelu", "relu"]), features=st.sampled_from([0, 0, 3]), outputs=st.sampled_from([0, 5]),
                    compiled=st.just(False))


def draw_params(rng, config, dtype):
    """Norms are the identity and biases zero at the start, which hides mistakes: moved."""
    return {key: (p + 0.2 * rng.standard_normal(p.shape)).astype(dtype) for key, p in transformer_init(rng, config, np.float64).items()}


def draw_inputs(rng, config, shape, dtype):
    return rng.standard_normal((*shape, config.features)).astype(dtype) if config.features else rng.integers(0, 7, shape)


def flat(state) -> list[np.ndarray]:
    return [np.array(state.position), *(x for layer in state.layers for x in layer)]


def near(found, expected, dtype) -> None:
    """float64: 2⁻⁵³ leaves room for every rounding there is; float32: at most 14 layers a block, norms that enlarge by 20, as in that file."""
    bound = gamma(ROUNDINGS, dtype) if dtype == np.float64 else gamma(40, dtype) * 20
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.abs(x - y).max() <= bound * max(1, np.abs(y).max())


@pytest.mark.parametrize(("program", "operator", "dtype"), [(onnx_reference, SCAN, np.float64), (onnxruntime, SCAN, np.float64),
                                                           (onnx_reference, STANDARD, np.float32), (onnxruntime, FUSED, np.float32)])
@given(seeds, configs, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_the_models_are_the_transformer(program, operator, dtype, seed, config, B, head, tail):
    """A prompt in two parts, the second from the state of the first, and then steps: logits and states all along."""
    rng = np.random.default_rng(seed)
    params, inputs = draw_params(rng, config, dtype), draw_inputs(rng, config, (B, head + tail + 3), dtype)
    expected, _ = transformer_prefill(params, inputs, config)
    whole, step = program(adapter.transformer_model(params, config, operator=operator)), program(adapter.transformer_step_model(params, config))
    first, *state = whole(inputs[:, :head], *flat(transformer_step_init(config, B, dtype)))
    second, *state = whole(inputs[:, head:head + tail], *state)
    near(state, flat(transformer_prefill(params, inputs[:, :head + tail], config)[1]), dtype)
    logits = [first, second]
    for t in range(head + tail, head + tail + 3):
        logits_t, *state = step(inputs[:, t], *state)
        logits.append(logits_t[:, None])
    near([np.concatenate(logits, 1)], [expected], dtype)
    near(state, flat(transformer_prefill(params, inputs, config)[1]), dtype)


@pytest.fixture(scope="module")
def trained():
    """Letters of which each third one is the sum of the two before, modulo 8."""
    rng = np.random.default_rng(0)
    config = Config(8, 24, 32, 4, 2, 64)
    params = transformer_init(rng, config)
    slots, losses = adam_init(params), []
    for _ in range(250):
        text = texts(rng, 32)
        logits, residuals = transformer_forward(params, text[:, :-1], config)
        loss, r_loss = cross_entropy_forward(logits[:, 1::3], text[:, 2::3])
        dlogits = np.zeros_like(logits)
        dlogits[:, 1::3] = cross_entropy_backward(1.0, r_loss)
        params, slots = adam_step(params, transformer_backward(dlogits, residuals), slots, learning_rate=3e-3)
        losses.append(float(loss))
    return config, params, losses


def texts(rng: np.random.Generator, count: int) -> np.ndarray:
    text = rng.integers(0, 8, (count, 24))
    text[:, 2::3] = (text[:, ::3] + text[:, 1::3]) % 8
    return text


@pytest.mark.parametrize("operator", [SCAN, FUSED])
def test_a_trained_model_says_in_onnxruntime_what_it_says_here(trained, operator):
    config, params, losses = trained
    kept = {key: x.copy() for key, x in params.items()}
    whole = onnxruntime(adapter.transformer_model(params, config, operator=operator))
    step = onnxruntime(adapter.transformer_step_model(params, config))
    assert losses[0] > 1.8 and losses[-1] < 0.2, losses                          # nats; of eight letters at random ln 8 = 2.08
    text = texts(np.random.default_rng(1), 16)
    near([whole(text, *flat(transformer_step_init(config, 16)))[0]], [transformer_forward(params, text, config)[0]], np.float32)

    prompt, count = text[:, :8], 16
    expected = generate(params, config, prompt, count, np.random.default_rng(0), temperature=0)
    logits, *state = whole(prompt, *flat(transformer_step_init(config, 16)))
    tokens, logits_t, margins = [prompt], logits[:, -1], []
    for _ in range(count):
        likeliest = np.sort(logits_t, -1)
        margins.append(likeliest[:, -1] - likeliest[:, -2])
        token = logits_t.argmax(-1)
        tokens.append(token[:, None])
        if len(margins) < count:
            logits_t, *state = step(token, *state)
    np.testing.assert_array_equal(np.concatenate(tokens, 1), expected)
    assert np.min(margins) > 2 * gamma(40, np.float32) * 20 * np.abs(logits).max()         # no luck: roundings do not decide
    assert (expected[:, 8::3] == (expected[:, 6::3] + expected[:, 7::3]) % 8).mean() > 0.9
    assert all((kept[key] == x).all() for key, x in params.items())


# --- what a model is ---------------------------------------------------------------------------------------------------------------------

def signature(model: Any) -> list[str]:
    def text(value: Any) -> str:
        sizes = ", ".join(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim)
        return f"{value.name} {onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name}({sizes})"

    return [", ".join(map(text, values)) for values in (model.graph.input, model.graph.output)]


def arrays(*shapes: tuple[int, ...], dtype: Any = np.float32) -> list[np.ndarray]:
    return [np.zeros(shape, dtype) for shape in shapes]


CONFIG = Config(7, 12, 8, 2, 1, 5)
PARAMS = transformer_init(np.random.default_rng(0), CONFIG)
QKV, QKV_T = arrays((5, 6, 9, 4), (5, 2, 9, 4), (5, 2, 9, 3)), arrays((5, 6, 4), (5, 2, 4), (5, 2, 3))


def test_inputs_and_outputs_are_called_as_in_the_library_and_free_in_b_and_n():
    gates, gates_t = arrays((5, 2, 9, 4), (5, 2, 9)), arrays((5, 2), (5, 2))
    assert signature(adapter.recurrence_model(*QKV, *gates, rule="gated_delta")) == [
        "q float32(B, 6, N, 4), k float32(B, 2, N, 4), v float32(B, 2, N, 3), g float32(B, 2, N, 4), beta float32(B, 2, N), "
        "state float32(B, 2, 4, 3)",
        "out float32(B, 6, N, 3), new_state float32(B, 2, 4, 3)"]
    assert signature(adapter.recurrence_step_model(*QKV_T, beta_t=gates_t[1], rule="delta")) == [
        "q_t float32(B, 6, 4), k_t float32(B, 2, 4), v_t float32(B, 2, 3), beta_t float32(B, 2), state float32(B, 2, 4, 3)",
        "out_t float32(B, 6, 3), new_state float32(B, 2, 4, 3)"]
    assert signature(adapter.causal_linear_attention_model(*QKV)) == [
        "q float32(B, 6, N, 4), k float32(B, 2, N, 4), v float32(B, 2, N, 3), S float32(B, 2, 4, 3), z float32(B, 2, 4)",
        "out float32(B, 6, N, 3), new_S float32(B, 2, 4, 3), new_z float32(B, 2, 4)"]
    assert signature(adapter.transformer_model(PARAMS, CONFIG)) == [
        "inputs int64(B, N), position int64(), S0 float32(B, 2, 4, 4), z0 float32(B, 2, 4)",
        "logits float32(B, N, 7), new_position int64(), new_S0 float32(B, 2, 4, 4), new_z0 float32(B, 2, 4)"]
    vectors = CONFIG._replace(features=3)
    assert signature(adapter.transformer_step_model(transformer_init(np.random.default_rng(0), vectors, np.float64), vectors)) == [
        "input_t float64(B, 3), position int64(), S0 float64(B, 2, 4, 4), z0 float64(B, 2, 4)",
        "logits_t float64(B, 7), new_position int64(), new_S0 float64(B, 2, 4, 4), new_z0 float64(B, 2, 4)"]


def nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


@pytest.mark.parametrize(("operator", "opsets", "found"), [
    (SCAN, {"": 20}, {("", "Scan")}), (STANDARD, {"": 27}, {("", "LinearAttention")}),
    (FUSED, {"": 20, "com.microsoft": 1}, {("com.microsoft", "LinearAttention")})])
def test_a_model_has_the_one_operator_that_was_asked_for_and_plain_ones(operator, opsets, found):
    plain = {"Add", "Concat", "Constant", "Div", "Equal", "Exp", "Gather", "MatMul", "Max", "Min", "Mul", "Pad", "Range", "ReduceMean", "Reshape",
             "Shape", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where"}
    for model in (adapter.transformer_model(PARAMS, CONFIG, operator=operator), adapter.recurrence_model(*QKV, operator=operator)):
        onnx.checker.check_model(model, full_check=True)
        assert {opset.domain: opset.version for opset in model.opset_import} == opsets and not model.functions
        assert {(node.domain, node.op_type) for node in nodes(model.graph)} - {("", kind) for kind in plain} == found
    step = adapter.transformer_step_model(PARAMS, CONFIG)
    assert {(node.domain, node.op_type) for node in nodes(step.graph)} <= {("", kind) for kind in plain}
    assert {x.name for x in step.graph.initializer} == set(PARAMS)


# --- what differs, and what is refused ---------------------------------------------------------------------------------------------------

def test_what_onnx_does_where_the_library_raises():
    """A negative token counts from the end of the table; a position behind its end is refused by the runtime; no position at all, by Scan."""
    step, state = onnxruntime(adapter.transformer_step_model(PARAMS, CONFIG)), flat(transformer_step_init(CONFIG, 1))
    np.testing.assert_array_equal(step(np.array([-1]), *state)[0], step(np.array([6]), *state)[0])
    for token, position in ((7, 0), (0, 12)):
        with pytest.raises(Exception, match="out of data bounds"):
            step(np.array([token]), np.array(position), *state[1:])
    for program in PROGRAMS:
        run = program(adapter.transformer_model(PARAMS, CONFIG))
        with pytest.raises(Exception, match="(?i)scan"):
            run(np.zeros((1, 0), int), *state)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: adapter.recurrence_model(*QKV, operator="Loop"), ValueError, "operator: expected 'Scan' or 'LinearAttention' or "
     "'com.microsoft.LinearAttention', got 'Loop'"),
    (lambda: adapter.recurrence_model(*(x.astype(float) for x in QKV), operator=FUSED), ValueError, "operator: expected 'Scan' for float64 arrays, "
     "got 'com.microsoft.LinearAttention', which has float32 at most; cast them, or scan"),
    (lambda: adapter.recurrence_model(*(x.astype(np.float16) for x in QKV)), ValueError, "dtype: expected float32 or float64, got float16, whose "
     "sums the library keeps in float32; export float32 and cast"),
    (lambda: adapter.recurrence_model(*QKV_T), ValueError, r"q: expected \(B, Hq, N, D\), got \(5, 6, 4\); a model has the axes of sequences"),
    (lambda: adapter.recurrence_step_model(*QKV), ValueError, r"q_t: expected \(B, Hq, D\), got \(5, 6, 9, 4\)"),
    (lambda: adapter.recurrence_model(*QKV, rule="delta"), ValueError, "beta: rule 'delta' needs it"),
    (lambda: adapter.recurrence_step_model(*QKV_T, rule="linaer"), ValueError, "rule: expected one of"),
    (lambda: adapter.causal_linear_attention_model(*QKV, feature_map="dpfp"), ValueError, "feature_map: expected 'elu1', 'relu', 'exp', got 'dpfp'; "
     "train with one of these, or map q and k"),
    (lambda: adapter.causal_linear_attention_step_model(*QKV_T, eps=-1), ValueError, "eps: expected"),
    (lambda: adapter.causal_linear_attention_model(*QKV_T), ValueError, r"q: expected \(B, Hq, N, D\)"),
    (lambda: adapter.causal_linear_attention_model([[1.0]], *QKV[1:]), TypeError, "q: expected a NumPy or CuPy array, got list"),
    (lambda: adapter.transformer_model({}, CONFIG), ValueError, "params: expected the keys of this configuration"),
    (lambda: adapter.transformer_step_model(PARAMS, CONFIG._replace(attention="softmax")), ValueError, "attention: expected 'linear', got 'softmax', "
     "whose state grows with each position; export a model of linear attention"),
    (lambda: adapter.transformer_model(PARAMS, CONFIG._replace(causal=False)), ValueError, "config: expected causal=True"),
    (lambda: adapter.transformer_model(PARAMS, CONFIG._replace(feature_map="softmax")), ValueError, "feature_map: expected 'elu1', 'relu', 'exp', "),
    (lambda: adapter.transformer_model({key: x.astype(np.float16) for key, x in PARAMS.items()}, CONFIG), ValueError, "dtype: expected float32 or"),
    (lambda: adapter.transformer_model(PARAMS, CONFIG, operator="scan"), ValueError, "operator: expected"),
])
def test_what_cannot_be_exported_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
