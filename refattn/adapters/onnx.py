"""Steps, prefills and whole transformers as ONNX models: what is trained here runs wherever ONNX does.

    model = transformer_step_model(params, config)                        # an onnx.ModelProto that the checker passed; onnx.save writes it
    run = onnxruntime.InferenceSession(model.SerializeToString()).run
    logits_t, *state = run(None, dict(zip(names, (tokens_t, *state))))    # the outputs replace the inputs, in their order

| function                           | of the library                 | inputs                            | outputs                      |
|------------------------------------|--------------------------------|-----------------------------------|------------------------------|
| recurrence_step_model              | `recurrence_step`              | q_t, k_t, v_t, g_t, beta_t, state | out_t, new_state             |
| recurrence_model                   | `recurrence`                   | q, k, v, g, beta, state           | out, new_state               |
| causal_linear_attention_step_model | `causal_linear_attention_step` | q_t, k_t, v_t, S, z               | out_t, new_S, new_z          |
| causal_linear_attention_model      | `causal_linear_attention`      | q, k, v, S, z                     | out, new_S, new_z            |
| transformer_step_model             | `transformer_step`             | input_t, position, S0, z0, S1, …  | logits_t, new_position, …    |
| transformer_model                  | `transformer_prefill`          | inputs, position, S0, z0, S1, …   | logits, new_position, …      |

Arrays are (B, H, N, D), with B and N left free and all other sizes in the model. A state always goes in, zeros where nothing precedes, and comes
out under a name with `new_`, since in ONNX no two values share one. Of many positions N ≥ 1. The `operator` that runs over them is

| operator                        | runs in                                                                        | arrays                    |
|---------------------------------|--------------------------------------------------------------------------------|---------------------------|
| "Scan"                          | what knows opset 20; the step is its body                                      | float32, float64          |
| "LinearAttention"               | what knows opset 27: onnx.reference 1.23; onnxruntime 1.32, as a Scan again    | float32                   |
| "com.microsoft.LinearAttention" | onnxruntime 1.32: one fused kernel                                             | float32                   |

All else is operators of opset 20, of 2023. Below, op("Add", x, y) adds a node to the graph and gives the name of its output; numbers and lists
become constants.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import attention, rules
from .._array import Array, dtype_name, missing_extra, namespace, on_host
from ..decoding import EPS_ATTENTION, EPS_NORM
from ..layers import _GELU_A, _GELU_C, Params, check_choice
from ..transformer import (Config, check_params, check_recurrent, positions_forward, transformer_prefill, transformer_shapes, transformer_step,
                           transformer_step_init)

try:
    import onnx
except ImportError:
    raise missing_extra("onnx", "onnx") from None

Op = Callable[..., Any]

OPERATORS = ("Scan", "LinearAttention", "com.microsoft.LinearAttention")
PHI: dict[str, Callable[[Op, str], str]] = {
    "elu1": lambda op, x: op("Add", op("Max", x, 0.0), op("Exp", op("Min", x, 0.0))),
    "relu": lambda op, x: op("Relu", x),
    "exp": lambda op, x: op("Exp", x)}


# --- the recurrence ----------------------------------------------------------------------------------------------------------------------

def recurrence_step_model(q_t: Array, k_t: Array, v_t: Array, g_t: Array | None = None, beta_t: Array | None = None, *,
                          rule: str = "linear", scale: float = 1.0) -> Any:
    """One position of all four rules as a model of plain operators: `refattn.recurrence_step`.

    Parameters
    ----------
    q_t : (B, G·H, D);  k_t : (B, H, D);  v_t : (B, H, M);  g_t : (B, H) or (B, H, D);  beta_t : (B, H)
        Examples of what the model will be given, float32 or float64: of them it takes dtype and sizes, but for B.
    rule, scale
        As in `refattn.recurrence_step`.

    Returns
    -------
    model : onnx.ModelProto
        From q_t, k_t, v_t, g_t and beta_t as far as the rule has them, and state (B, H, D, M), to out_t (B, G·H, M) and new_state.

    Raises
    ------
    ValueError, TypeError
        Those of `refattn.recurrence_step`, which is called once; `q_t: expected (B, Hq, D), got (4, 8); …`; `dtype: expected float32 or float64, got
        float16, …`.

    Examples
    --------
    >>> from onnx.reference import ReferenceEvaluator
    >>> one = np.ones((1, 1, 1), np.float32)
    >>> model = recurrence_step_model(one, one, one)
    >>> out_t, state = ReferenceEvaluator(model).run(None, {"q_t": one, "k_t": one, "v_t": one, "state": np.ones((1, 1, 1, 1), np.float32)})
    >>> out_t.tolist()
    [[[2.0]]]
    """
    arrays = {"q_t": q_t, "k_t": k_t, "v_t": v_t, "g_t": g_t, "beta_t": beta_t}
    return _recurrence_model(rules.recurrence_step, arrays, rule, scale, None)


def recurrence_model(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, *, rule: str = "linear",
                     scale: float = 1.0, operator: str = "Scan") -> Any:
    """Any number of positions of all four rules, from a state to a state: `refattn.recurrence`.

    Parameters
    ----------
    q : (B, G·H, N, D);  k : (B, H, N, D);  v : (B, H, N, M);  g : (B, H, N) or (B, H, N, D);  beta : (B, H, N)
        Examples, as in `recurrence_step_model`; N is free too.
    rule, scale
        As in `refattn.recurrence`.
    operator : str
        "Scan", "LinearAttention" or "com.microsoft.LinearAttention": see the top of this file.

    Returns
    -------
    model : onnx.ModelProto
        From q, k, v, g and beta as far as the rule has them, and state (B, H, D, M), to out (B, G·H, N, M) and new_state.

    Raises
    ------
    ValueError, TypeError
        Those of `recurrence_step_model`; `operator: expected 'Scan' for float64 arrays, got 'LinearAttention', …`.

    Notes
    -----
    A Scan takes as long as N steps, at some 10 operators each.

    Examples
    --------
    >>> from onnx.reference import ReferenceEvaluator
    >>> x = np.ones((1, 1, 3, 1), np.float32)
    >>> out, state = ReferenceEvaluator(recurrence_model(x, x, x)).run(None, {"q": x, "k": x, "v": x, "state": x[:, :, :1]})
    >>> out.ravel().tolist()
    [2.0, 3.0, 4.0]
    """
    check_choice("operator", operator, OPERATORS)
    return _recurrence_model(rules.recurrence, {"q": q, "k": k, "v": v, "g": g, "beta": beta}, rule, scale, operator)


def _recurrence_model(f: Callable[..., Any], arrays: dict[str, Any], rule: str, scale: float, operator: str | None) -> Any:
    _check_axes(arrays, operator)
    out, state = f(*arrays.values(), rule=rule, scale=scale)                        # says what is wrong with any of them
    q, k, v, g, _ = arrays.values()
    sizes, channels = _sizes(q, k, v), g is not None and g.ndim == k.ndim
    op, nodes = _graph(dtype_name(v), operator)
    arrays = {name: x for name, x in arrays.items() if x is not None}
    given = {name.removesuffix("_t"): name for name in arrays}
    new_state, read = _recurrence(op, "state", given, rule=rule, sizes=sizes, channels=channels, operator=operator)
    return _model(nodes, arrays, {"out": out}, {"state": state}, [op("Mul", read, float(scale)), new_state], operator)


def _recurrence(op: Op, S: str, given: dict[str, str], *, rule: str, sizes: tuple[int, ...], channels: bool = False,
                operator: str | None) -> tuple[str, str]:
    """(new S, o) of all positions, or of the one for operator None. `given`: what q, k, v, g and beta are called, as far as there are any."""
    if operator is None:
        return _step(op, S, given, sizes=sizes, channels=channels)
    H, G, _, M = sizes
    first = [2, 0, 1] if operator == "Scan" else [0, 2, 1]                          # positions in front, or in front of the heads
    rows = {x: op("Transpose", y, perm=[*first, 3] if x in "qkv" or x == "g" and channels else first) for x, y in given.items()}
    if operator == "Scan":
        inner, nodes = _graph("float32", None, "step_")
        one = {x: f"step_{x}" for x in rows}
        after = _step(inner, "step_S", one, sizes=sizes, channels=channels)
        body = onnx.helper.make_graph(nodes, "step", *([onnx.ValueInfoProto(name=x) for x in names] for names in (("step_S", *one.values()), after)))
        S, read = op("Scan", S, *rows.values(), outputs=2, body=body, num_scan_inputs=len(rows))
        return S, op("Transpose", read, perm=[1, 2, 0, 3])
    domain, _, kind = operator.rpartition(".")
    packed = {x: op("Reshape", y, [0, 0, -1]) for x, y in rows.items()}             # the heads packed into the last axis
    read, S = op(kind, packed["q"], packed["k"], packed["v"], S, packed.get("g", ""), packed.get("beta", ""), outputs=2, domain=domain,
                 q_num_heads=G * H, kv_num_heads=H, update_rule=rule, scale=1.0)    # 0 would mean 1/√D
    return S, op("Transpose", op("Reshape", read, [0, 0, G * H, M]), perm=[0, 2, 1, 3])


def _step(op: Op, S: str, given: dict[str, str], *, sizes: tuple[int, ...], channels: bool) -> tuple[str, str]:
    """P = Diag(exp(g)) S, u = β (v - Pᵀ k), S ← P + k uᵀ, o = Sᵀ q: (new S, o)."""
    H, G, D, M = sizes
    P, k, u = S, op("Unsqueeze", given["k"], [-1]), op("Unsqueeze", given["v"], [-2])               # (D, 1) and (1, M)
    if "g" in given:
        P = op("Mul", op("Exp", op("Unsqueeze", given["g"], [-1] if channels else [-2, -1])), S)
    if "beta" in given:
        u = op("Mul", op("Unsqueeze", given["beta"], [-2, -1]), op("Sub", u, op("MatMul", op("Unsqueeze", given["k"], [-2]), P)))
    S = op("Add", P, op("Mul", k, u))
    return S, op("Reshape", op("MatMul", op("Reshape", given["q"], [0, H, G, D]), S), [0, G * H, M])


# --- attention ---------------------------------------------------------------------------------------------------------------------------

def causal_linear_attention_step_model(q_t: Array, k_t: Array, v_t: Array, *, feature_map: str = "elu1", eps: float = 1e-6) -> Any:
    """One position with feature map and normaliser, in plain operators: `refattn.causal_linear_attention_step` (eq. (18), (19)).

    Parameters
    ----------
    q_t : (B, G·H, D);  k_t : (B, H, D);  v_t : (B, H, M)
        Examples, as in `recurrence_step_model`.
    feature_map : str
        "elu1", "relu" or "exp".
    eps : float
        As in `refattn.causal_linear_attention_step`.

    Returns
    -------
    model : onnx.ModelProto
        From q_t, k_t, v_t, S (B, H, D, M) and z (B, H, D) to out_t (B, G·H, M), new_S and new_z.

    Raises
    ------
    ValueError, TypeError
        `feature_map: expected 'elu1', 'relu', 'exp', got 'dpfp'; …`; those of `refattn.causal_linear_attention_step` and `recurrence_step_model`.

    Examples
    --------
    >>> x = np.zeros((1, 2, 4), np.float32)
    >>> [value.name for value in causal_linear_attention_step_model(x, x, x).graph.input]
    ['q_t', 'k_t', 'v_t', 'S', 'z']
    """
    return _attention_model(attention.causal_linear_attention_step, {"q_t": q_t, "k_t": k_t, "v_t": v_t}, feature_map, eps, None)


def causal_linear_attention_model(q: Array, k: Array, v: Array, *, feature_map: str = "elu1", eps: float = 1e-6,
                                  operator: str = "Scan") -> Any:
    """Any number of positions with feature map and normaliser, from a state to a state: `refattn.causal_linear_attention` (eq. (8) to (12)).

    φ and the normaliser, which is one more column of ones in v, are plain operators around the recurrence, whatever its `operator`.

    Parameters
    ----------
    q : (B, G·H, N, D);  k : (B, H, N, D);  v : (B, H, N, M)
        Examples, as in `recurrence_model`.
    feature_map, eps
        As in `causal_linear_attention_step_model`.
    operator : str
        As in `recurrence_model`.

    Returns
    -------
    model : onnx.ModelProto
        From q, k, v, S (B, H, D, M) and z (B, H, D) to out (B, G·H, N, M), new_S and new_z.

    Raises
    ------
    ValueError, TypeError
        Those of `causal_linear_attention_step_model` and `recurrence_model`.

    Examples
    --------
    >>> x = np.zeros((1, 2, 3, 4), np.float32)
    >>> [value.name for value in causal_linear_attention_model(x, x, x).graph.output]
    ['out', 'new_S', 'new_z']
    """
    check_choice("operator", operator, OPERATORS)
    return _attention_model(attention.causal_linear_attention, {"q": q, "k": k, "v": v}, feature_map, eps, operator)


def _attention_model(f: Callable[..., Any], arrays: dict[str, Any], feature_map: str, eps: float, operator: str | None) -> Any:
    _check_axes(arrays, operator)
    _check_phi(feature_map)
    out, state = f(*arrays.values(), feature_map=feature_map, eps=eps)
    op, nodes = _graph(dtype_name(out), operator)
    results = _attention(op, [*arrays, "S", "z"], _sizes(*arrays.values()), feature_map, float(eps), operator)
    return _model(nodes, arrays, {"out": out}, state._asdict(), results, operator)


def _attention(op: Op, given: list[str], sizes: tuple[int, ...], feature_map: str, eps: float, operator: str | None) -> list[str]:
    """[num | den] = f(φ(q), φ(k), [v | 1]; [S | z]), out = num / (den + ε), and 0 where that is 0: (out, new S, new z)."""
    (q, k, v, S, z), (*others, M), phi = given, sizes, PHI[feature_map]
    v_one = op("Pad", v, [0] * (5 if operator is None else 7) + [1], 1.0)           # onnxruntime 1.32 mistakes the shorter form, with axes
    Sz, both = _recurrence(op, op("Concat", S, op("Unsqueeze", z, [-1]), axis=-1), {"q": phi(op, q), "k": phi(op, k), "v": v_one}, rule="linear",
                           sizes=(*others, M + 1), operator=operator)
    num, den = op("Split", both, [M, 1], outputs=2, axis=-1)
    S, z = op("Split", Sz, [M, 1], outputs=2, axis=-1)
    den = op("Add", den, eps)
    return [op("Div", num, op("Where", op("Equal", den, 0.0), math.inf, den)), S, op("Squeeze", z, [-1])]


# --- the transformer ---------------------------------------------------------------------------------------------------------------------

def transformer_step_model(params: Params, config: Config) -> Any:
    """One token, or vector, of a causal transformer with linear attention, in plain operators: `transformer_step`.

    Parameters
    ----------
    params : dict
        float32 or float64; they become the model's initialisers under their own names.
    config : Config
        causal, attention "linear", feature_map "elu1", "relu" or "exp". Sinusoidal positions become a table of config.length rows; for longer
        sequences give a config of greater length.

    Returns
    -------
    model : onnx.ModelProto
        From input_t, (B,) int64 or (B, features), position, an int64, and S0, z0, S1, … of `transformer_step_init(…).layers` to logits_t (B, V),
        new_position, new_S0, …

    Raises
    ------
    ValueError, TypeError
        `attention: expected 'linear', got 'softmax', whose state grows with each position; …`; `feature_map: …`; those of `transformer_step`.

    Examples
    --------
    >>> from refattn.transformer import transformer_init
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> model = transformer_step_model(transformer_init(np.random.default_rng(0), config), config)
    >>> [value.name for value in model.graph.input], [value.name for value in model.graph.output]
    (['input_t', 'position', 'S0', 'z0'], ['logits_t', 'new_position', 'new_S0', 'new_z0'])
    """
    return _transformer_model(params, config, None)


def transformer_model(params: Params, config: Config, *, operator: str = "Scan") -> Any:
    """Whole sequences, prompts or parts of them: `transformer_prefill`, but from any state and not only from the first one.

    Parameters
    ----------
    params, config
        As in `transformer_step_model`.
    operator : str
        As in `recurrence_model`.

    Returns
    -------
    model : onnx.ModelProto
        From inputs, (B, N) int64 or (B, N, features), position, S0, z0, S1, … to logits (B, N, V), new_position, new_S0, …: the state from which
        the same model, or that of `transformer_step_model`, goes on.

    Raises
    ------
    ValueError, TypeError
        Those of `transformer_step_model` and `recurrence_model`.

    Examples
    --------
    >>> from onnx.reference import ReferenceEvaluator
    >>> from refattn.transformer import transformer_init
    >>> config = Config(vocabulary=10, length=16, width=8, heads=2, layers=1, feed_forward=32)
    >>> model = transformer_model(transformer_init(np.random.default_rng(0), config), config)
    >>> state = [np.array(0), *transformer_step_init(config, batch=1).layers[0]]
    >>> logits, position, *state = ReferenceEvaluator(model).run(None, dict(zip(["inputs", "position", "S0", "z0"], [np.array([[1, 2, 3]]), *state])))
    >>> logits.shape, position.tolist()
    ((1, 3, 10), 3)
    """
    check_choice("operator", operator, OPERATORS)
    return _transformer_model(params, config, operator)


def _transformer_model(params: Params, config: Config, operator: str | None) -> Any:
    check_params(params, transformer_shapes(config))
    check_recurrent(config)
    if config.attention != "linear":
        raise ValueError(f"attention: expected 'linear', got {config.attention!r}, whose state grows with each position; export a model of "
                         "linear attention")
    _check_phi(config.feature_map)
    params = {key: on_host(x) for key, x in params.items()}
    head, E, H = params["head.weight"], config.width, config.heads
    start = transformer_step_init(config, 1, head.dtype)
    axes = (1,) if operator is None else (1, 1)
    inputs = np.zeros((*axes, config.features), head.dtype) if config.features else np.zeros(axes, int)
    logits = (transformer_step(params, inputs, start, config) if operator is None else transformer_prefill(params, inputs, config))[0]
    if config.positions == "sinusoidal":
        params["positions.weight"] = positions_forward(params, np.zeros((config.length, E), head.dtype), config, 0)[0]
    op, nodes = _graph(head.dtype.name, operator)

    def affine(name: str, x: str) -> str:
        return op("Add", op("MatMul", x, f"{name}.weight"), f"{name}.bias")

    def norm(name: str, x: str) -> str:
        c = op("Sub", x, op("ReduceMean", x, [-1]))
        rate = op("Sqrt", op("Add", op("ReduceMean", op("Mul", c, c), [-1]), EPS_NORM))
        return op("Add", op("Mul", op("Div", c, rate), f"{name}.weight"), f"{name}.bias")

    def gelu(x: str) -> str:
        slope = op("Add", op("Mul", op("Mul", x, x), _GELU_A), 1.0)
        return op("Mul", op("Mul", x, 0.5), op("Add", op("Tanh", op("Mul", op("Mul", x, slope), _GELU_C)), 1.0))

    def around(name: str, x: str, inner: Callable[[str, str], str]) -> str:
        if config.norm == "pre":
            return op("Add", x, inner(name, norm(f"{name}.norm", x)))
        return norm(f"{name}.norm", op("Add", x, inner(name, x)))

    def heads(x: str) -> str:
        return op("Reshape", x, [0, H, E // H]) if operator is None else op("Transpose", op("Reshape", x, [0, 0, H, E // H]), perm=[0, 2, 1, 3])

    def attend(name: str, x: str) -> str:
        q, k, v = (heads(affine(f"{name}.{part}", x)) for part in ("query", "key", "value"))
        mixed, *state = _attention(op, [q, k, v, f"S{i}", f"z{i}"], (H, 1, E // H, E // H), config.feature_map, EPS_ATTENTION, operator)
        states.extend(state)
        merged = mixed if operator is None else op("Transpose", mixed, perm=[0, 2, 1, 3])
        return affine(f"{name}.out", op("Reshape", merged, [0, E] if operator is None else [0, 0, E]))

    def feed_forward(name: str, x: str) -> str:
        inner = affine(f"{name}.in", x)
        return affine(f"{name}.out", op("Relu", inner) if config.activation == "relu" else gelu(inner))

    given = "input_t" if operator is None else "inputs"
    x = affine("input", given) if config.features else op("Gather", "token.weight", given)
    count = 1 if operator is None else op("Squeeze", op("Shape", x, start=1, end=2))
    new_position = op("Add", "position", count)
    x = op("Add", x, op("Gather", "positions.weight", "position" if operator is None else op("Range", "position", new_position, 1)))
    states: list[str] = []
    for i in range(config.layers):
        x = around(f"blocks.{i}.attention", x, attend)
        x = around(f"blocks.{i}.feed_forward", x, feed_forward)
    if config.norm == "pre":
        x = norm("norm", x)
    state = {"position": np.array(0)} | {f"{name}{i}": x for i, layer in enumerate(start.layers) for name, x in layer._asdict().items()}
    return _model(nodes, {given: inputs}, {"logits": logits}, state, [affine("head", x), new_position, *states], operator, params)


# --- what they share ---------------------------------------------------------------------------------------------------------------------

def _graph(dtype: str, operator: str | None, prefix: str = "") -> tuple[Op, list[Any]]:
    """`op`, and the list of nodes that it adds to."""
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype: expected float32 or float64, got {dtype}, whose sums the library keeps in float32; export float32 and cast at the "
                         "border of the model")
    if dtype == "float64" and operator in OPERATORS[1:]:
        raise ValueError(f"operator: expected 'Scan' for float64 arrays, got {operator!r}, which has float32 at most; cast them, or scan")
    nodes: list[Any] = []

    def add(kind: str, inputs: list[str], outputs: int, **attributes: Any) -> Any:
        made = [f"{prefix}{kind}_{len(nodes)}" + f"_{i}" * (outputs > 1) for i in range(outputs)]
        nodes.append(onnx.helper.make_node(kind, inputs, made, **attributes))
        return made if outputs > 1 else made[0]

    def op(kind: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        return add(kind, [x if isinstance(x, str) else add("Constant", [], 1, value=onnx.numpy_helper.from_array(np.array(
            x, dtype if isinstance(x, float) else np.int64))) for x in inputs], outputs, **attributes)

    return op, nodes


def _model(nodes: list[Any], arrays: dict[str, Array], out: dict[str, Array], state: dict[str, Array], results: list[str],
           operator: str | None, params: Params | None = None) -> Any:
    """The checked model. `results`: what the outputs and the new state are called in `nodes`. Arrays are examples of what goes in and out."""
    free = ("B",) if operator is None else ("B", None, "N") if params is None else ("B", "N")
    out = {name + "_t" * (operator is None): x for name, x in out.items()}
    after = {f"new_{name}": x for name, x in state.items()}
    named = dict(zip(results, (*out, *after), strict=True))
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [named.get(name, name) for name in names]

    def values(arrays: dict[str, Array], free: tuple[str | None, ...]) -> list[Any]:
        return [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype_name(x))), [
            letter or n for n, letter in zip(x.shape, (*free, None, None, None), strict=False)]) for name, x in arrays.items()]

    opsets = [onnx.helper.make_opsetid("", 27 if operator == "LinearAttention" else 20)]
    version = onnx.helper.find_min_ir_version_for(opsets)
    opsets += [onnx.helper.make_opsetid("com.microsoft", 1)] * (operator == OPERATORS[2])
    graph = onnx.helper.make_graph(nodes, "refattn", values(arrays, free) + values(state, ("B",)), values(out, free) + values(after, ("B",)),
                                   [onnx.numpy_helper.from_array(x, name) for name, x in (params or {}).items()])
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="refattn")
    onnx.checker.check_model(model, full_check=True)
    return model


def _sizes(q: Array, k: Array, v: Array) -> tuple[int, int, int, int]:
    """(H, G, D, M)."""
    return k.shape[1], q.shape[1] // max(k.shape[1], 1), k.shape[-1], v.shape[-1]


def _check_axes(arrays: dict[str, Any], operator: str | None) -> None:
    namespace(**arrays)
    name, q = next(iter(arrays.items()))
    if q.ndim != (3 if operator is None else 4):
        raise ValueError(f"{name}: expected {'(B, Hq, D)' if operator is None else '(B, Hq, N, D)'}, got {tuple(q.shape)}; a model has the axes of "
                         "sequences and heads, be they of size 1")


def _check_phi(feature_map: Any) -> None:
    if feature_map not in PHI:
        raise ValueError(f"feature_map: expected {', '.join(map(repr, PHI))}, got {feature_map!r}; train with one of these, or map q and k in a "
                         "model of your own in front of recurrence_model")
