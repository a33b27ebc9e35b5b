"""refattn's steps, prefills and transformers as ONNX models: what is trained here runs wherever ONNX does.

    model = transformer_step_model(params, config)                        # an onnx.ModelProto that the checker passed; onnx.save writes it
    run = onnxruntime.InferenceSession(model.SerializeToString()).run
    logits_t, *state = run(None, dict(zip(names, (token, *state))))       # the outputs replace the inputs, in their order

| function                           | of the library                 | inputs                                          | outputs                    |
|------------------------------------|--------------------------------|-------------------------------------------------|----------------------------|
| recurrence_step_model              | `recurrence_step`              | q_t, k_t, v_t, g_t, beta_t, state               | out_t, new_state           |
| recurrence_model                   | `recurrence`                   | q, k, v, g, beta, state                         | out, new_state             |
| causal_linear_attention_step_model | `causal_linear_attention_step` | q_t, k_t, v_t, S, z                             | out_t, new_S, new_z        |
| causal_linear_attention_model      | `causal_linear_attention`      | q, k, v, S, z                                   | out, new_S, new_z          |
| transformer_step_model             | `transformer_step`             | input_t, position, S0, z0, …, a pair each layer | logits_t, new_position, …  |
| transformer_model                  | `transformer_prefill`          | inputs, position, S0, z0, …                     | logits, new_position, …    |

The equations are below, as functions in ONNX's own textual form; models hold them expanded into ONNX's operators. Arrays are (B, H, N, D) with
B and N left free. A state goes in always (zeros where nothing precedes) and comes out as `new_…`: in ONNX no two values share a name.

What runs over the positions is up to `operator`:

| operator                        | rounds as  | runs in                                                                                     |
|---------------------------------|------------|---------------------------------------------------------------------------------------------|
| "Scan"                          | the step   | every runtime, float32 and float64                                                          |
| "LinearAttention"               | the loop   | where opset 27 (2026) is: onnx.reference; in onnxruntime 1.32 only with B and N made fixed  |
| "com.microsoft.LinearAttention" | the loop   | onnxruntime 1.32 and later, one fused kernel                                                |
"""
from __future__ import annotations

import math
import re
from string import Template
from typing import Any

import numpy as np

from .. import attention, rules
from .._array import Array, dtype_name, missing_extra, on_host
from ..decoding import EPS_ATTENTION, EPS_NORM
from ..layers import Params, check_choice
from ..rules import RULES
from ..transformer import (Config, check_params, check_recurrent, transformer_prefill, transformer_shapes, transformer_step,
                           transformer_step_init)

try:
    import onnx
    import onnx.inliner
    import onnx.parser
except ImportError:
    raise missing_extra("onnx", "onnx") from None

OPSET, OPSET_FUSED = 20, 27                  # of ONNX 1.15, which everything reads; of the first LinearAttention
OPERATORS = ("Scan", "LinearAttention", "com.microsoft.LinearAttention")
TYPES = {"float32": "float", "float64": "double", "int64": "int64"}

# --- the equations -----------------------------------------------------------------------------------------------------------------------

STEP = """
$name (S, $inputs) => (new_S, out_t)
{
    last = Constant <value_ints = [-1]> ()
    above = Constant <value_ints = [-2]> ()
    k = Unsqueeze (k_t, last)                           # a column (D, 1)
    v = Unsqueeze (v_t, above)                          # a row (1, M)
$fade
$error
    write = Mul (k, u)
    new_S = Add (P, write)                              # S = P + k uᵀ
    groups = Constant <value_ints = [0, $H, $G, $D]> ()
    heads = Constant <value_ints = [0, $HG, $M]> ()
    q = Reshape (q_t, groups)
    read = MatMul (q, new_S)                            # o = Sᵀ q
    out_t = Reshape (read, heads)
}"""
FADES = {False: "    P = Identity (S)", True: """
    axes = Constant <value_ints = [$axes]> ()
    g = Unsqueeze (g_t, axes)
    a = Exp (g)
    P = Mul (a, S)                                      # P = Diag(exp(g)) S"""}
ERRORS = {False: "    u = Identity (v)", True: """
    both = Constant <value_ints = [-2, -1]> ()
    beta = Unsqueeze (beta_t, both)
    k_row = Unsqueeze (k_t, above)
    known = MatMul (k_row, P)
    error = Sub (v, known)
    u = Mul (beta, error)                               # u = β (v - Pᵀ k)"""}

SCAN = """
Recurrence (S, $names) => (new_S, out)
{
$rows
    new_S, rows = Scan <num_scan_inputs = $count, body = position (S_t, $inputs) => (S_n, out_t)
        { S_n, out_t = refattn.Step (S_t, $inputs) }> (S, $taken)
    out = Transpose <perm = [1, 2, 0, 3]> (rows)
}"""
FUSED = """
Recurrence (S, $names) => (new_S, out)
{
    packed = Constant <value_ints = [0, 0, -1]> ()
$rows
    rows, new_S = $operator <q_num_heads = $HG, kv_num_heads = $H, update_rule = "$rule", scale = 1.0> ($taken)
    heads = Constant <value_ints = [0, 0, $HG, $M]> ()
    split = Reshape (rows, heads)
    out = Transpose <perm = [0, 2, 1, 3]> (split)
}"""

PHI = {"elu1": """
Phi (x) => (y)
{
    zero = Constant <value = $T {0}> ()
    above = Max (x, zero)
    below = Min (x, zero)
    exp = Exp (below)
    y = Add (above, exp)                                # max(x, 0) + exp(min(x, 0))
}""", "relu": "Phi (x) => (y) { y = Relu (x) }", "exp": "Phi (x) => (y) { y = Exp (x) }"}
ATTENTION = """
Attention (q, k, v, S, z) => (out, new_S, new_z)
{
    last = Constant <value_ints = [-1]> ()
    behind = Constant <value_ints = [$zeros, 1]> ()
    one = Constant <value = $T {1}> ()
    zero = Constant <value = $T {0}> ()
    eps = Constant <value = $T {$eps}> ()
    widths = Constant <value_ints = [$M, 1]> ()
    fq = refattn.Phi (q)
    fk = refattn.Phi (k)
    v_one = Pad (v, behind, one)                        # [v | 1]
    z_column = Unsqueeze (z, last)
    Sz = Concat <axis = -1> (S, z_column)               # [S | z]
    new_Sz, both = refattn.Recurrence (Sz, fq, fk, v_one)
    new_S, new_z_column = Split <axis = -1> (new_Sz, widths)
    new_z = Squeeze (new_z_column, last)
    num, den = Split <axis = -1> (both, widths)
    den_eps = Add (den, eps)
    nothing = Equal (den_eps, zero)
    quotient = Div (num, den_eps)
    out = Where (nothing, zero, quotient)               # num / (den + ε), 0 where no key counts
}"""

LAYERS = """
Affine (x, W, b) => (y)
{
    product = MatMul (x, W)
    y = Add (product, b)
}

Norm (x, w, b) => (y)
{
    last = Constant <value_ints = [-1]> ()
    eps = Constant <value = $T {$eps_norm}> ()
    mean = ReduceMean (x, last)
    c = Sub (x, mean)
    square = Mul (c, c)
    var = ReduceMean (square, last)
    var_eps = Add (var, eps)
    std = Sqrt (var_eps)
    normal = Div (c, std)
    scaled = Mul (normal, w)
    y = Add (scaled, b)
}

Same (x, w, b) => (y) { y = Identity (x) }

Gelu (x) => (y)
{
    half = Constant <value = $T {0.5}> ()
    one = Constant <value = $T {1}> ()
    a = Constant <value = $T {0.044715}> ()
    c = Constant <value = $T {$gelu_c}> ()
    square = Mul (x, x)
    a_square = Mul (a, square)
    slope = Add (one, a_square)
    x_slope = Mul (x, slope)
    inner = Mul (c, x_slope)
    t = Tanh (inner)                                    # tanh(c (x + a x³))
    one_t = Add (one, t)
    half_x = Mul (half, x)
    y = Mul (half_x, one_t)
}

Positions (x, position, $positions) => (y, new_position)
{
    one = Constant <value_int = 1> ()
$rows
$vectors
    y = Add (x, P)
}

Block (x, S, z, $own) => (y, new_S, new_z)
{
    a = refattn.$enter (x, "attention.norm.weight", "attention.norm.bias")
    q_wide = refattn.Affine (a, "attention.query.weight", "attention.query.bias")
    k_wide = refattn.Affine (a, "attention.key.weight", "attention.key.bias")
    v_wide = refattn.Affine (a, "attention.value.weight", "attention.value.bias")
    q = refattn.Heads (q_wide)
    k = refattn.Heads (k_wide)
    v = refattn.Heads (v_wide)
    mixed, new_S, new_z = refattn.Attention (q, k, v, S, z)
    merged = refattn.Merge (mixed)
    attended = refattn.Affine (merged, "attention.out.weight", "attention.out.bias")
    x_attended = Add (x, attended)
    h = refattn.$leave (x_attended, "attention.norm.weight", "attention.norm.bias")
    f = refattn.$enter (h, "feed_forward.norm.weight", "feed_forward.norm.bias")
    inner = refattn.Affine (f, "feed_forward.in.weight", "feed_forward.in.bias")
    active = $activation (inner)
    fed = refattn.Affine (active, "feed_forward.out.weight", "feed_forward.out.bias")
    h_fed = Add (h, fed)
    y = refattn.$leave (h_fed, "feed_forward.norm.weight", "feed_forward.norm.bias")
}"""

LENGTHS = {False: """
    new_position = Add (position, one)
    rows = Identity (position)
""", True: """
    axis = Shape <start = 1, end = 2> (x)
    N = Squeeze (axis)
    new_position = Add (position, N)
    rows = Range (position, new_position, one)
"""}
VECTORS = {"learned": "    P = Gather (W, rows)", "sinusoidal": """
    p = Cast <to = 11> (rows)                           # in float64, as the library
    last = Constant <value_ints = [-1]> ()
    column = Unsqueeze (p, last)
    angle = Div (column, rates)
    sin = Sin (angle)
    cos = Cos (angle)
    wave = Where (even, sin, cos)
    size = Constant <value = double {$size}> ()
    sized = Div (wave, size)
    P = CastLike (sized, x)"""}
HEADS = {False: """
Heads (x) => (y)
{
    heads = Constant <value_ints = [0, $H, $D]> ()
    y = Reshape (x, heads)
}

Merge (x) => (y)
{
    width = Constant <value_ints = [0, $E]> ()
    y = Reshape (x, width)
}""", True: """
Heads (x) => (y)
{
    heads = Constant <value_ints = [0, 0, $H, $D]> ()
    split = Reshape (x, heads)
    y = Transpose <perm = [0, 2, 1, 3]> (split)
}

Merge (x) => (y)
{
    width = Constant <value_ints = [0, 0, $E]> ()
    rows = Transpose <perm = [0, 2, 1, 3]> (x)
    y = Reshape (rows, width)
}"""}


# --- the recurrence ----------------------------------------------------------------------------------------------------------------------

def recurrence_step_model(q_t: Array, k_t: Array, v_t: Array, g_t: Array | None = None, beta_t: Array | None = None, *,
                          rule: str = "linear", scale: float = 1.0) -> Any:
    """Step."""
    out, state = rules.recurrence_step(q_t, k_t, v_t, g_t, beta_t, rule=rule, scale=scale)
    return _recurrence_model({"q_t": q_t, "k_t": k_t, "v_t": v_t, "g_t": g_t, "beta_t": beta_t}, state, "out_t", out, rule, scale, None)


def recurrence_model(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, *, rule: str = "linear",
                     scale: float = 1.0, operator: str = "Scan") -> Any:
    """Whole."""
    check_choice("operator", operator, OPERATORS)
    out, state = rules.recurrence(q, k, v, g, beta, rule=rule, scale=scale)
    return _recurrence_model({"q": q, "k": k, "v": v, "g": g, "beta": beta}, state, "out", out, rule, scale, operator)


def _recurrence_model(given: dict[str, Any], state: Array, name: str, out: Array, rule: str, scale: float, operator: str | None) -> Any:
    q, k, v, g, _ = given.values()
    free = "B" if operator is None else "B.N"
    inputs = {x: (array, free) for x, array in given.items() if array is not None}
    body = f"""
    new_state, read = refattn.Recurrence (state, {', '.join(inputs)})
    scale = Constant <value = {_type(out)} {{{float(scale)!r}}}> ()
    {name} = Mul (scale, read)"""
    functions = _recurrence(_sizes(q, k, v), rule, g is not None and g.ndim == k.ndim, operator)
    return _model(name, inputs | {"state": (state, "B")}, {name: (out, free), "new_state": (state, "B")}, body, functions, operator)


def _recurrence(sizes: dict[str, int], rule: str, channels: bool, operator: str | None) -> str:
    """The function Recurrence: of one position for operator None, else of all of them."""
    names = ("q", "k", "v", *RULES[rule])
    inputs = ", ".join(f"{x}_t" for x in names)
    fade = _fill(FADES["g" in RULES[rule]], axes="-1" if channels else "-2, -1")
    step = _fill(STEP, name="Step" if operator else "Recurrence", inputs=inputs, fade=fade, error=ERRORS["beta" in RULES[rule]], **sizes)
    if operator is None:
        return step
    order = "2, 0, 1" if operator == "Scan" else "0, 2, 1"
    rows = [f"    {x}_rows = Transpose <perm = [{order}{', 3' * (x in 'qkv' or x == 'g' and channels)}]> ({x})" for x in names]
    if operator == "Scan":
        return step + "\n" + _fill(SCAN, names=", ".join(names), rows="\n".join(rows), count=len(names), inputs=inputs,
                                   taken=", ".join(f"{x}_rows" for x in names))
    rows += [f"    {x}_packed = Reshape ({x}_rows, packed)" for x in names]
    taken = ", ".join("S" if x == "S" else f"{x}_packed" if x in names else '""' for x in ("q", "k", "v", "S", "g", "beta"))
    return _fill(FUSED, names=", ".join(names), rows="\n".join(rows), operator=operator, rule=rule, taken=taken, **sizes)


# --- attention ---------------------------------------------------------------------------------------------------------------------------

def causal_linear_attention_step_model(q_t: Array, k_t: Array, v_t: Array, *, feature_map: str = "elu1", eps: float = 1e-6) -> Any:
    """Step."""
    _check_phi(feature_map)
    out, state = attention.causal_linear_attention_step(q_t, k_t, v_t, feature_map=feature_map, eps=eps)
    return _attention_model({"q_t": q_t, "k_t": k_t, "v_t": v_t}, state, "out_t", out, feature_map, eps, None)


def causal_linear_attention_model(q: Array, k: Array, v: Array, *, feature_map: str = "elu1", eps: float = 1e-6,
                                  operator: str = "Scan") -> Any:
    """Whole."""
    check_choice("operator", operator, OPERATORS)
    _check_phi(feature_map)
    out, state = attention.causal_linear_attention(q, k, v, feature_map=feature_map, eps=eps)
    return _attention_model({"q": q, "k": k, "v": v}, state, "out", out, feature_map, eps, operator)


def _attention_model(given: dict[str, Any], state: attention.State, name: str, out: Array, feature_map: str, eps: float,
                     operator: str | None) -> Any:
    free = "B" if operator is None else "B.N"
    inputs = {x: (array, free) for x, array in given.items()} | {"S": (state.S, "B"), "z": (state.z, "B")}
    outputs = {name: (out, free), "new_S": (state.S, "B"), "new_z": (state.z, "B")}
    return _model(name, inputs, outputs, f"{', '.join(outputs)} = refattn.Attention ({', '.join(inputs)})",
                  _attention(_sizes(*given.values()), feature_map, eps, _type(out), operator), operator)


def _attention(sizes: dict[str, int], feature_map: str, eps: float, T: str, operator: str | None) -> str:
    return "\n".join((_fill(PHI[feature_map], T=T), _fill(ATTENTION, T=T, M=sizes["M"], eps=float(eps),
                      zeros="0, 0, 0, 0, 0, 0, 0" if operator else "0, 0, 0, 0, 0"),
                      _recurrence(sizes | {"M": sizes["M"] + 1}, "linear", False, operator)))


# --- the transformer ---------------------------------------------------------------------------------------------------------------------

def transformer_step_model(params: Params, config: Config) -> Any:
    """Step."""
    return _transformer_model(params, config, None)


def transformer_model(params: Params, config: Config, *, operator: str = "Scan") -> Any:
    """Whole."""
    check_choice("operator", operator, OPERATORS)
    return _transformer_model(params, config, operator)


def _transformer_model(params: Params, config: Config, operator: str | None) -> Any:
    check_params(params, transformer_shapes(config))
    check_recurrent(config)
    if config.attention != "linear":
        raise ValueError(f"attention: expected 'linear', got {config.attention!r}, whose state grows with each position; export a model of "
                         "linear attention")
    _check_phi(config.feature_map)
    dtype, E, H = params["head.weight"].dtype, config.width, config.heads
    many, learned = operator is not None, config.positions == "learned"
    given, name, logits, free = ("inputs", "transformer", "logits", "BN") if many else ("input_t", "transformer_step", "logits_t", "B")
    state = transformer_step_init(config, 1, dtype)
    states = {f"{x}{i}": (getattr(layer, x), "B") for i, layer in enumerate(state.layers) for x in "Sz"}
    position = {"position": (np.array(0), "")}
    example = np.zeros((1,) * len(free) + (config.features,) * (config.features > 0), dtype if config.features else int)
    out = transformer_prefill(params, example, config)[0] if many else transformer_step(params, example, state, config)[0]

    own = [key.removeprefix("blocks.0.") for key in params if key.startswith("blocks.0.")]
    pre, where, constants = config.norm == "pre", '"positions.weight"' if learned else "rates, even", dict(params)
    if not learned:
        constants |= {"rates": np.repeat(10000.0 ** (np.arange(0, E, 2) / E), 2)[:E], "even": np.arange(E) % 2 == 0}
    body = [f'x = refattn.Affine ({given}, "input.weight", "input.bias")' if config.features else f'x = Gather ("token.weight", {given})',
            f"x0, new_position = refattn.Positions (x, position, {where})"]
    for i in range(config.layers):
        weights = ", ".join(f'"blocks.{i}.{key}"' for key in own)
        body.append(f"x{i + 1}, new_S{i}, new_z{i} = refattn.Block (x{i}, S{i}, z{i}, {weights})")
    body += [f'y = refattn.Norm (x{config.layers}, "norm.weight", "norm.bias")' if pre else f"y = Identity (x{config.layers})",
             f'{logits} = refattn.Affine (y, "head.weight", "head.bias")']
    sizes = {"H": H, "G": 1, "HG": H, "D": E // H, "M": E // H, "E": E}
    T = _type(out)
    functions = "\n".join((
        _fill(LAYERS, T=T, eps_norm=EPS_NORM, gelu_c=math.sqrt(2 / math.pi), rows=LENGTHS[many], positions="W" if learned else "rates, even",
              vectors=_fill(VECTORS[config.positions], size=math.sqrt(E / 2)), own=", ".join(f'"{key}"' for key in own),
              enter="Norm" if pre else "Same", leave="Same" if pre else "Norm",
              activation="Relu" if config.activation == "relu" else "refattn.Gelu"),
        _fill(HEADS[many], **sizes), _attention(sizes, config.feature_map, EPS_ATTENTION, T, operator)))
    return _model(name, {given: (example, free)} | position | states,
                  {logits: (out, free)} | {f"new_{x}": value for x, value in (position | states).items()}, "\n".join(body), functions, operator,
                  constants)


# --- what they share ---------------------------------------------------------------------------------------------------------------------

def _model(name: str, inputs: dict[str, tuple[Array, str]], outputs: dict[str, tuple[Array, str]], body: str, functions: str,
           operator: str | None, constants: Params | None = None) -> Any:
    """The checked model of one body. Inputs and outputs are (an example, the letters of its free axes: "B.N" for the first and the third)."""
    opset = OPSET_FUSED if operator == "LinearAttention" else OPSET
    domains = f'"": {opset}, "refattn": 1' + ', "com.microsoft": 1' * (operator == OPERATORS[2])
    version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    text = f"<ir_version: {version}, opset_import: [{domains}]>\n{name} ({_values(inputs)}) => ({_values(outputs)})\n{{\n{body}\n}}\n"
    text += "\n".join(f'<domain: "refattn", opset_import: [{domains}]>\n{function}' for function in re.split(r"\n+(?=[A-Z])", functions.strip()))
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(on_host(x), key) for key, x in (constants or {}).items())
    model = onnx.inliner.inline_local_functions(model)
    del model.opset_import[[x.domain for x in model.opset_import].index("refattn")]
    model.producer_name = "refattn"
    onnx.checker.check_model(model, full_check=True)
    return model


def _values(named: dict[str, tuple[Array, str]]) -> str:
    def value(name: str, x: Array, free: str) -> str:
        sizes = ", ".join(letter if letter.isalpha() else str(n) for n, letter in zip(x.shape, free.ljust(x.ndim, "."), strict=True))
        return f"{_type(x)}{f'[{sizes}]' * bool(x.ndim)} {name}"

    return ", ".join(value(name, x, free) for name, (x, free) in named.items())


def _type(x: Array) -> str:
    name = dtype_name(x)
    if name not in TYPES:
        raise ValueError(f"dtype: expected float32 or float64, got {name}; the library keeps sums of {name} in float32, so export float32 and "
                         "cast at the model's border")
    return TYPES[name]


def _fill(text: str, **values: Any) -> str:
    return Template(text).substitute(values)


def _sizes(q: Array, k: Array, v: Array) -> dict[str, int]:
    return {"H": k.shape[1], "G": q.shape[1] // k.shape[1], "HG": q.shape[1], "D": k.shape[-1], "M": v.shape[-1]}


def _check_phi(feature_map: Any) -> None:
    if feature_map not in PHI:
        raise ValueError(f"feature_map: expected {', '.join(map(repr, PHI))}, got {feature_map!r}; map q and k in a model of your own in front "
                         "of recurrence_model, or train with one of these")
