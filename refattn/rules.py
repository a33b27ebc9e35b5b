"""The recurrence in the vocabulary of ONNX's operator `LinearAttention`: rules, scale, state, packed sequences.

    P_t = Diag(exp(g_t)) S_{t-1},   S_t = P_t + k_t u_tᵀ          o_t = scale · S_tᵀ q_t

| rule          | g    | u_t                     | forms     |
|---------------|------|-------------------------|-----------|
| `linear`      | 0    | v_t                     | `causal`  |
| `gated`       | yes  | v_t                     | `gated`   |
| `delta`       | 0    | β_t (v_t - P_tᵀ k_t)    | `delta`   |
| `gated_delta` | yes  | β_t (v_t - P_tᵀ k_t)    | `delta`   |

Bare: q and k are taken as they are (apply φ yourself), and there is no normaliser.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._array import (Array, Axes, accumulator, cast, check_compiled, check_cotangent, check_dtypes, check_number, check_qkv, check_shape,
                     check_wide_dtype, namespace, on_host)
from .attention import Pullback, has_kernels
from .causal import (causal_chunked_backward, causal_chunked_forward, causal_scan_backward, causal_scan_forward, causal_step,
                     causal_step_backward)
from .delta import (delta_chunked_backward, delta_chunked_forward, delta_scan_backward, delta_scan_forward, delta_step,
                    delta_step_backward)
from .gated import (gated_chunked_backward, gated_chunked_forward, gated_scan_backward, gated_scan_forward, gated_step,
                    gated_step_backward)

RULES = {"linear": (), "gated": ("g",), "delta": ("beta",), "gated_delta": ("g", "beta")}     # and what each has beside q, k and v


def recurrence(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, state: Array | None = None, *,
               rule: str = "linear", scale: float = 1.0, cu_seqlens: Any = None, compiled: bool = False) -> tuple[Array, Array]:
    """S_t = P_t + k_t u_tᵀ, o_t = scale · S_tᵀ q_t with P_t = Diag(exp(g_t)) S_{t-1}, for a whole sequence.

    Rule `linear`: no g, u = v (eq. (10) of the paper, without φ and normaliser). `gated`: u = v (RetNet, GLA, Mamba-2). `delta`: no g,
    u = β (v - Pᵀ k) (DeltaNet). `gated_delta`: both (Gated DeltaNet, KDA). `presets` names the models.

    Parameters
    ----------
    q : (..., G·H, N, D)
    k : (..., H, N, D)
    v : (..., H, N, M)
        float16, bfloat16, float32 or float64, all of one dtype. H key/value heads; query head h reads key/value head h // G.
    g : (..., H, N) or (..., H, N, D); None for rules `linear` and `delta`
        Log decay, one for each head or for each key channel, in the inputs' or the accumulator's dtype. 0 keeps the state, -inf forgets it;
        above 0 the state grows.
    beta : (..., H, N); None for rules `linear` and `gated`
        How much of the error v - Pᵀ k is written; dtype as g's.
    state : (..., H, D, M), optional
        S_0, what preceded position 0; zeros if None. Never changed. With `cu_seqlens`: (..., H, sequences, D, M), one for each sequence.
    rule : str
        "linear", "gated", "delta" or "gated_delta".
    scale : float
        Multiplies the outputs; ONNX uses 1/√D by default, this function 1.
    cu_seqlens : integers (sequences + 1,), optional
        Several sequences packed along N one behind the other: sequence i is positions cu_seqlens[i] … cu_seqlens[i+1] - 1, and starts
        from its own state. Starts with 0, never falls, ends with N; empty sequences are allowed.
    compiled : bool
        True: NumPy arrays go to loops that Numba compiles (extra `numba`), see `refattn.compiled`; the same answer to within its bound, in half
        the time or less. The first call of each kind takes some seconds, once: what is compiled is kept on disk.

    Returns
    -------
    out : (..., G·H, N, M), in the inputs' dtype
    state : (..., H, D, M), or (..., H, sequences, D, M) with `cu_seqlens`
        S_N, in the accumulator dtype: float32 for float16 and bfloat16 inputs, else the inputs' dtype.

    Raises
    ------
    ValueError
        For shapes that disagree ("k: expected (..., Hkv, N, D) = …, got …: q and k must share D"), an unknown rule, a g or beta that the
        rule does not have or that is missing ("beta: rule 'delta' needs it: an array (..., Hkv, N)"), a scale that is not finite,
        cu_seqlens that do not cover N.
    TypeError
        For arrays that are not arrays, of different libraries, of different dtypes or not real floats.

    Notes
    -----
    Rule `linear`: 4·N·D·M + 2·N·C·(D + M) flops a head; the other rules: see `gated` and `delta`. Extra memory does not grow with N, in the
    backward neither (but for 16 states for each power of 16 in the number of blocks, a few hundred
    positions each, with g or beta).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((4, 1))
    >>> out, state = recurrence(x, x, x)
    >>> out.ravel(), state
    (array([1., 2., 3., 4.]), array([[4.]]))
    >>> recurrence(x, x, x, cu_seqlens=[0, 1, 4])[0].ravel()
    array([1., 1., 2., 3.])
    >>> recurrence(x, x, x, np.log([0.5, 0.5, 0.5, 0.5]), rule="gated")[0].ravel()
    array([1.   , 1.5  , 1.75 , 1.875])
    """
    return recurrence_vjp(q, k, v, g, beta, state, rule=rule, scale=scale, cu_seqlens=cu_seqlens, compiled=compiled)[0]


def recurrence_vjp(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, state: Array | None = None, *,
                   rule: str = "linear", scale: float = 1.0, cu_seqlens: Any = None,
                   compiled: bool = False) -> tuple[tuple[Array, Array], Pullback]:
    """`recurrence` and its pullback: (dout, dstate) -> (dq, dk, dv, dg, dbeta, dstate0); see `refattn.vjp`.

    With o = scale · f: the transpose of f at scale · do."""
    xp, axes, scale = _check(q, k, v, g, beta, rule, scale, step=False)
    arrays = (q, k, v, g, beta)
    bounds = _check_packing(cu_seqlens, axes.N)
    _check_state(state, q, axes, None if bounds is None else len(bounds) - 1)
    forward, backward = _compiled(xp, axes, rule, bool(q.size and v.size)) if compiled else _forms(xp, axes, rule)
    if bounds is None:
        out, end, residuals = forward(*arrays, state)
        parts = [(slice(None), residuals)]
    else:
        packed = [(slice(int(a), int(b)), None if state is None else state[..., i, :, :])
                  for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))]
        results = [forward(*(_positions(x, rows, q) for x in arrays), S) for rows, S in packed]
        out = xp.concat([r[0] for r in results], axis=-2) if results else xp.zeros((*q.shape[:-1], v.shape[-1]), dtype=v.dtype)
        acc = accumulator(v.dtype)
        end = (xp.stack([r[1] for r in results], axis=-3) if results
               else xp.zeros((*axes.kv_lead, 0, axes.D, axes.M), dtype=acc))
        parts = [(rows, r[2]) for (rows, _), r in zip(packed, results, strict=True)]
    out = _scaled(out, scale)

    def pullback(dout: Array | None, dstate: Array | None = None) -> tuple[Array | None, ...]:
        check_cotangent("dout", dout, out)
        check_cotangent("dstate", dstate, end)
        do = xp.zeros_like(out) if dout is None else _scaled(dout, scale)
        if bounds is None:
            *gradients, dstart = backward(do, dstate, parts[0][1])
        else:
            pieces = [backward(do[..., rows, :], None if dstate is None else dstate[..., i, :, :], residuals)
                      for i, (rows, residuals) in enumerate(parts)]
            gradients = [None if x is None else xp.concat([p[j] for p in pieces], axis=-2 if x.ndim == q.ndim else -1) if pieces
                         else xp.zeros_like(x) for j, x in enumerate(arrays)]
            dstart = xp.stack([p[5] for p in pieces], axis=-3) if pieces else xp.zeros_like(end)
        return (*gradients, None if state is None else cast(dstart, state.dtype))

    return (out, end), pullback


def recurrence_step(q_t: Array, k_t: Array, v_t: Array, g_t: Array | None = None, beta_t: Array | None = None, state: Array | None = None,
                    *, rule: str = "linear", scale: float = 1.0, compiled: bool = False) -> tuple[Array, Array]:
    """One position of `recurrence`: P = Diag(exp(g)) S, S ← P + k uᵀ, o = scale · Sᵀ q.

    Parameters
    ----------
    q_t : (..., G·H, D)
    k_t : (..., H, D)
    v_t : (..., H, M)
    g_t : (..., H) or (..., H, D); None for rules `linear` and `delta`
    beta_t : (..., H); None for rules `linear` and `gated`
    state : (..., H, D, M), optional
        As returned by the previous step or by `recurrence`; zeros if None. Never changed.
    rule, scale, compiled
        As in `recurrence`.

    Returns
    -------
    out_t : (..., G·H, M)
    state : (..., H, D, M)

    Raises
    ------
    ValueError, TypeError
        As in `recurrence`.

    Notes
    -----
    4·D·M flops a head, with g 5, with beta 7, whatever the position.

    Examples
    --------
    >>> import numpy as np
    >>> one, state = np.ones(1), None
    >>> for x in (1.0, 2.0): out, state = recurrence_step(one, one, x * one, state=state)
    >>> out
    array([3.])
    """
    return recurrence_step_vjp(q_t, k_t, v_t, g_t, beta_t, state, rule=rule, scale=scale, compiled=compiled)[0]


def recurrence_step_vjp(q_t: Array, k_t: Array, v_t: Array, g_t: Array | None = None, beta_t: Array | None = None,
                        state: Array | None = None, *, rule: str = "linear", scale: float = 1.0,
                        compiled: bool = False) -> tuple[tuple[Array, Array], Pullback]:
    """`recurrence_step` and its pullback: (dout_t, dstate) -> (dq_t, dk_t, dv_t, dg_t, dbeta_t, dstate0); see `refattn.vjp`."""
    xp, axes, scale = _check(q_t, k_t, v_t, g_t, beta_t, rule, scale, step=True)
    _check_state(state, q_t, axes, None)
    acc = accumulator(v_t.dtype)
    arrays = (q_t, k_t, v_t, g_t, beta_t)
    if compiled:
        check_compiled(xp)
        if q_t.size and v_t.size:
            return _compiled_step(arrays, state, scale)
    q, k, v, g, beta = wide_arrays = tuple(None if x is None else cast(x, acc) for x in arrays)
    S = xp.zeros((*axes.kv_lead, axes.D, axes.M), dtype=acc) if state is None else cast(state, acc)
    wide, end = (delta_step(S, q, k, v, g, beta) if beta is not None else causal_step(S, q, k, v) if g is None
                 else gated_step(S, q, k, v, g))
    out = cast(_scaled(wide, scale), v_t.dtype)

    def pullback(dout: Array | None, dstate: Array | None = None) -> tuple[Array | None, ...]:
        check_cotangent("dout_t", dout, out)
        check_cotangent("dstate", dstate, end)
        do = xp.zeros_like(wide) if dout is None else _scaled(cast(dout, acc), scale)
        R = xp.zeros_like(end) if dstate is None else dstate
        if beta is not None:
            dS, *d = delta_step_backward(do, R, S, *wide_arrays)
        elif g is not None:
            dS, *d = *gated_step_backward(do, R, S, *wide_arrays[:4]), None
        else:
            dS, *d = *causal_step_backward(do, R, S, q, k, v), None, None
        return (*(None if x is None else cast(y, x.dtype) for y, x in zip(d, arrays, strict=True)),
                None if state is None else cast(dS, state.dtype))

    return (out, end), pullback


def _compiled_step(arrays: tuple[Any, ...], state: Any, scale: float) -> tuple[tuple[Array, Array], Pullback]:
    from .compiled.launch import backward, forward_step
    q, k, v, g, beta = arrays
    out, end, residuals = forward_step(q, k, v, g, beta, state)
    out = _scaled(out, scale)

    def pullback(dout: Array | None, dstate: Array | None = None) -> tuple[Array | None, ...]:
        check_cotangent("dout_t", dout, out)
        check_cotangent("dstate", dstate, end)
        do = np.zeros_like(out) if dout is None else _scaled(dout, scale)
        *gradients, dstart = backward(do[..., None, :], dstate, residuals)
        return (*(None if x is None else d.reshape(x.shape) for d, x in zip(gradients, arrays, strict=True)),
                None if state is None else cast(dstart, state.dtype))

    return (out, end), pullback


def _compiled(xp: Any, axes: Axes, rule: str, anything: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    check_compiled(xp)
    if not anything:                                                              # no positions, heads or features: nothing to loop over
        return _forms(xp, axes, rule)
    from .compiled.launch import backward, forward
    return forward, backward


def _forms(xp: Any, axes: Axes, rule: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The fast form for NumPy arrays, our kernels for CuPy arrays and rule `linear`, the loop-free form for all others:
    forward(q, k, v, g, beta, state) -> out, state, residuals; backward(dout, dstate, residuals) -> dq, dk, dv, dg, dbeta, dstate0."""
    of, back = _with_own_inputs(xp, axes, rule)
    if "beta" in RULES[rule]:
        return of, back

    def forward(q: Array, k: Array, v: Array, g: Array | None, beta: None, S: Array | None) -> Any:
        return of(q, k, v, *(() if g is None else (g,)), S)

    def backward(dout: Array, dS: Array | None, residuals: Any) -> tuple[Any, ...]:
        dq, dk, dv, *dg, dstart = back(dout, dS, residuals)
        return dq, dk, dv, dg[0] if dg else None, None, dstart

    return forward, backward


def _with_own_inputs(xp: Any, axes: Axes, rule: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same with the rule's own signature: only `delta` takes g and beta, present or not."""
    if "beta" in RULES[rule]:
        return (delta_chunked_forward, delta_chunked_backward) if xp is np else (delta_scan_forward, delta_scan_backward)
    if rule == "gated":
        return (gated_chunked_forward, gated_chunked_backward) if xp is np else (gated_scan_forward, gated_scan_backward)
    if xp is np:
        return causal_chunked_forward, causal_chunked_backward
    return _kernels(xp) if has_kernels(xp, axes.D, axes.M) else (causal_scan_forward, causal_scan_backward)


def _kernels(xp: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    from .cuda import launch

    def forward(q: Array, k: Array, v: Array, S: Array | None) -> tuple[Array, Array, Any]:
        out, end, _, residuals = launch.causal_forward(xp, q, k, v, None if S is None else cast(S, accumulator(v.dtype)))
        return out, end, residuals

    def backward(dout: Array, dS: Array | None, residuals: Any) -> tuple[Array, Array, Array, Array]:
        return launch.causal_backward(xp, dout, dS, None, residuals)[:4]

    return forward, backward


def _check(q: Array, k: Array, v: Array, g: Any, beta: Any, rule: Any, scale: Any, *, step: bool) -> tuple[Any, Axes, float]:
    t = "_t" if step else ""
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(repr(r) for r in RULES)}, got {rule!r}")
    more = {"g": g, "beta": beta}
    positions = "" if step else ", N"
    for name, x in more.items():
        if x is not None and name not in RULES[rule]:
            raise ValueError(f"{name}{t}: rule {rule!r} has no {name}{t}, got an array; leave it None")
        if x is None and name in RULES[rule]:
            shapes = f"(..., Hkv{positions})" + (f" or (..., Hkv{positions}, D)" if name == "g" else "")
            raise ValueError(f"{name}{t}: rule {rule!r} needs it: an array {shapes}")
    named: dict[str, Array] = {f"q{t}": q, f"k{t}": k, f"v{t}": v}
    xp = namespace(**named, **{f"{name}{t}": x for name, x in more.items()})
    check_dtypes(**named)
    axes = check_qkv(q, k, v, causal=True, step=step)
    shape = (*axes.kv_lead, *(() if step else (axes.N,)))
    for name, x in more.items():
        if x is None:
            continue
        check_wide_dtype(f"{name}{t}", x, q)
        channels = name == "g" and x.ndim == k.ndim
        symbols = f"({'..., Hkv' if axes.headed else ''}{positions if axes.headed else positions[2:]}{', D' if channels else ''})"
        why = "one for each key/value head and position" if not step else "one for each key/value head"
        check_shape(f"{name}{t}", x, symbols, (*shape, axes.D) if channels else shape, why + (" and channel" if channels else ""))
    return xp, axes, check_number("scale", scale)


def _check_state(state: Array | None, q: Array, axes: Axes, sequences: int | None) -> None:
    if state is None:
        return
    namespace(q=q, state=state)
    packed = () if sequences is None else (sequences,)
    symbols = f"({'..., H, ' if axes.headed else ''}{'sequences, ' if packed else ''}D, M)"
    check_shape("state", state, symbols, (*axes.kv_lead, *packed, axes.D, axes.M), "k and v give these sizes")
    check_wide_dtype("state", state, q)


def _check_packing(cu_seqlens: Any, n: int) -> np.ndarray | None:
    if cu_seqlens is None:
        return None
    bounds = on_host(cu_seqlens)
    if bounds.dtype.kind not in "iu":
        raise TypeError(f"cu_seqlens: expected integers, got {bounds.dtype.name}")
    if bounds.ndim != 1 or not len(bounds) or bounds[0] != 0 or bounds[-1] != n or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(f"cu_seqlens: expected one axis that starts with 0, never falls and ends with N = {n}, got {bounds.tolist()}")
    return bounds


def _positions(x: Array | None, rows: slice, q: Array) -> Array | None:
    """Positions `rows` of q, k, v or g (..., N, D), of g or beta (..., N)."""
    return None if x is None else x[..., rows, :] if x.ndim == q.ndim else x[..., rows]


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1 else x * x.dtype.type(scale) if isinstance(x, np.ndarray) else x * scale
