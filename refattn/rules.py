"""The recurrence in the vocabulary of ONNX's operator `LinearAttention`: rules, scale, state, packed sequences.

    S_t = S_{t-1} + k_t v_tᵀ          o_t = scale · S_tᵀ q_t                                            (rule `linear`)

Bare: q and k are taken as they are (apply φ yourself), and there is no normaliser. The sums themselves are `causal`'s.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._array import Array, Axes, accumulator, cast, check_cotangent, check_dtypes, check_number, check_qkv, check_shape, namespace, on_host
from .attention import Pullback, check_state_dtype, has_kernels
from .causal import (causal_chunked_backward, causal_chunked_forward, causal_scan_backward, causal_scan_forward, causal_step,
                     causal_step_backward)

RULES = ("linear",)


def recurrence(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, state: Array | None = None, *,
               rule: str = "linear", scale: float = 1.0, cu_seqlens: Any = None) -> tuple[Array, Array]:
    """S_t = S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t for a whole sequence: rule `linear` (eq. 10 of the paper, without φ and normaliser).

    Parameters
    ----------
    q : (..., G·H, N, D)
    k : (..., H, N, D)
    v : (..., H, N, M)
        float16, bfloat16, float32 or float64, all of one dtype. H key/value heads; query head h reads key/value head h // G.
    g, beta : None
        Log decay and write strength. Rule `linear` has neither: S neither fades nor is written with less than full strength.
    state : (..., H, D, M), optional
        S_0, what preceded position 0; zeros if None. Never changed. With `cu_seqlens`: (..., H, sequences, D, M), one for each sequence.
    rule : str
        "linear".
    scale : float
        Multiplies the outputs; ONNX uses 1/√D by default, this function 1.
    cu_seqlens : integers (sequences + 1,), optional
        Several sequences packed along N one behind the other: sequence i is positions cu_seqlens[i] … cu_seqlens[i+1] - 1, and starts
        from its own state. Starts with 0, never falls, ends with N; empty sequences are allowed.

    Returns
    -------
    out : (..., G·H, N, M), in the inputs' dtype
    state : (..., H, D, M), or (..., H, sequences, D, M) with `cu_seqlens`
        S_N, in the accumulator dtype: float32 for float16 and bfloat16 inputs, else the inputs' dtype.

    Raises
    ------
    ValueError
        For shapes that disagree ("k: expected (..., Hkv, N, D) = …, got …: q and k must share D"), an unknown rule, a g or beta that the
        rule does not have, a scale that is not finite, cu_seqlens that do not cover N.
    TypeError
        For arrays that are not arrays, of different libraries, of different dtypes or not real floats.

    Notes
    -----
    4·N·D·M + 2·N·C·(D + M) flops a head; extra memory does not grow with N, in the backward neither.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((4, 1))
    >>> out, state = recurrence(x, x, x)
    >>> out.ravel(), state
    (array([1., 2., 3., 4.]), array([[4.]]))
    >>> recurrence(x, x, x, cu_seqlens=[0, 1, 4])[0].ravel()
    array([1., 1., 2., 3.])
    """
    return recurrence_vjp(q, k, v, g, beta, state, rule=rule, scale=scale, cu_seqlens=cu_seqlens)[0]


def recurrence_vjp(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, state: Array | None = None, *,
                   rule: str = "linear", scale: float = 1.0, cu_seqlens: Any = None) -> tuple[tuple[Array, Array], Pullback]:
    """`recurrence` and its pullback: (dout, dstate) -> (dq, dk, dv, dg, dbeta, dstate0); see `refattn.vjp`.

    With o = scale · f: the transpose of f at scale · do."""
    xp, axes, scale = _check(q, k, v, g, beta, rule, scale, step=False)
    bounds = _check_packing(cu_seqlens, axes.N)
    _check_state(state, q, axes, None if bounds is None else len(bounds) - 1)
    forward, backward = _forms(xp, axes)
    if bounds is None:
        out, end, residuals = forward(q, k, v, state)
        parts = [(slice(None), residuals)]
    else:
        packed = [(slice(int(a), int(b)), None if state is None else state[..., i, :, :])
                  for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))]
        results = [forward(q[..., rows, :], k[..., rows, :], v[..., rows, :], S) for rows, S in packed]
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
            dq, dk, dv, dstart = backward(do, dstate, parts[0][1])
        else:
            pieces = [backward(do[..., rows, :], None if dstate is None else dstate[..., i, :, :], residuals)
                      for i, (rows, residuals) in enumerate(parts)]
            dq, dk, dv = (xp.concat([p[j] for p in pieces], axis=-2) if pieces else xp.zeros_like(x) for j, x in enumerate((q, k, v)))
            dstart = xp.stack([p[3] for p in pieces], axis=-3) if pieces else xp.zeros_like(end)
        return dq, dk, dv, None, None, None if state is None else cast(dstart, state.dtype)

    return (out, end), pullback


def recurrence_step(q_t: Array, k_t: Array, v_t: Array, g_t: Array | None = None, beta_t: Array | None = None, state: Array | None = None,
                    *, rule: str = "linear", scale: float = 1.0) -> tuple[Array, Array]:
    """One position of `recurrence`: S ← S + k vᵀ, o = scale · Sᵀ q.

    Parameters
    ----------
    q_t : (..., G·H, D)
    k_t : (..., H, D)
    v_t : (..., H, M)
    g_t, beta_t : None
        Rule `linear` has neither.
    state : (..., H, D, M), optional
        As returned by the previous step or by `recurrence`; zeros if None. Never changed.
    rule, scale
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
    4·D·M flops a head, whatever the position.

    Examples
    --------
    >>> import numpy as np
    >>> one, state = np.ones(1), None
    >>> for x in (1.0, 2.0): out, state = recurrence_step(one, one, x * one, state=state)
    >>> out
    array([3.])
    """
    return recurrence_step_vjp(q_t, k_t, v_t, g_t, beta_t, state, rule=rule, scale=scale)[0]


def recurrence_step_vjp(q_t: Array, k_t: Array, v_t: Array, g_t: Array | None = None, beta_t: Array | None = None,
                        state: Array | None = None, *, rule: str = "linear", scale: float = 1.0) -> tuple[tuple[Array, Array], Pullback]:
    """`recurrence_step` and its pullback: (dout_t, dstate) -> (dq_t, dk_t, dv_t, dg_t, dbeta_t, dstate0); see `refattn.vjp`."""
    xp, axes, scale = _check(q_t, k_t, v_t, g_t, beta_t, rule, scale, step=True)
    _check_state(state, q_t, axes, None)
    acc = accumulator(v_t.dtype)
    q, k, v = (cast(x, acc) for x in (q_t, k_t, v_t))
    S = xp.zeros((*axes.kv_lead, axes.D, axes.M), dtype=acc) if state is None else cast(state, acc)
    wide, end = causal_step(S, q, k, v)
    out = cast(_scaled(wide, scale), v_t.dtype)

    def pullback(dout: Array | None, dstate: Array | None = None) -> tuple[Array | None, ...]:
        check_cotangent("dout_t", dout, out)
        check_cotangent("dstate", dstate, end)
        do = xp.zeros_like(wide) if dout is None else _scaled(cast(dout, acc), scale)
        dS, dq, dk, dv = causal_step_backward(do, xp.zeros_like(end) if dstate is None else dstate, S, q, k, v)
        dstart = None if state is None else cast(dS, state.dtype)
        return (*(cast(d, x.dtype) for d, x in ((dq, q_t), (dk, k_t), (dv, v_t))), None, None, dstart)

    return (out, end), pullback


def _forms(xp: Any, axes: Axes) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The fast form for NumPy arrays, our kernels for CuPy arrays, the loop-free form for all others."""
    if xp is np:
        return causal_chunked_forward, causal_chunked_backward
    if not has_kernels(xp, axes.D, axes.M):
        return causal_scan_forward, causal_scan_backward
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
    for name, x in ((f"g{t}", g), (f"beta{t}", beta)):
        if x is not None:
            raise ValueError(f"{name}: rule {rule!r} has no {name}, got an array; leave it None")
    named: dict[str, Array] = {f"q{t}": q, f"k{t}": k, f"v{t}": v}
    xp = namespace(**named)
    check_dtypes(**named)
    return xp, check_qkv(q, k, v, causal=True, step=step), check_number("scale", scale)


def _check_state(state: Array | None, q: Array, axes: Axes, sequences: int | None) -> None:
    if state is None:
        return
    namespace(q=q, state=state)
    packed = () if sequences is None else (sequences,)
    symbols = f"({'..., H, ' if axes.headed else ''}{'sequences, ' if packed else ''}D, M)"
    check_shape("state", state, symbols, (*axes.kv_lead, *packed, axes.D, axes.M), "k and v give these sizes")
    check_state_dtype(state, q)


def _check_packing(cu_seqlens: Any, n: int) -> np.ndarray | None:
    if cu_seqlens is None:
        return None
    bounds = on_host(cu_seqlens)
    if bounds.dtype.kind not in "iu":
        raise TypeError(f"cu_seqlens: expected integers, got {bounds.dtype.name}")
    if bounds.ndim != 1 or not len(bounds) or bounds[0] != 0 or bounds[-1] != n or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(f"cu_seqlens: expected one axis that starts with 0, never falls and ends with N = {n}, got {bounds.tolist()}")
    return bounds


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1 else x * x.dtype.type(scale) if isinstance(x, np.ndarray) else x * scale
