"""refattn in HIPS autograd: the public functions as primitives, whose gradients are those of `refattn.vjp`.

    out, state = recurrence(q, k, v, g, rule="gated")          dq = autograd.grad(lambda q: loss(recurrence(q, k, v, g, rule="gated")[0]))(q)

autograd asks a primitive for the gradients of one output at a time; ours has all outputs as one tuple, and all gradients come from one call of the
pullback. The forward runs once, with `refattn.vjp`, and the primitive is only told of what it gave:

    outputs(found, backward, q, k, …) = found          its gradients at g: backward(g)

**Second order** is there for rule `linear` without packed sequences, and so are all others: that sum is its own transpose (eq. (13) to (15);
see `refattn.causal`), so its gradients are three more calls of `recurrence`,

    dq = f(do, v, k; S_0ᵀ)          dk = rev f(rev v, rev do, rev q) + v Rᵀ          dv = rev f(rev k, rev q, rev do) + k R          R = dS_N

which autograd differentiates as it does any call. Elsewhere the backward is not made of primitives: asked for its derivative, it raises
NotImplementedError. Normalised attention is a quotient of two columns of rule `linear`, and written as that has all orders.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import attention, rules, softmax
from .._array import Array, accumulator, cast, missing_extra
from .._vjp import vjp
from ..attention import State

try:
    from autograd.extend import defvjp_argnums, primitive
    from autograd.tracer import getval, isbox
except ImportError:
    raise missing_extra("autograd", "autograd") from None


def softmax_attention(q: Array, k: Array, v: Array, *, causal: bool = False, scale: float | None = None, query_lengths: Any = None,
                      key_lengths: Any = None) -> Array:
    """`refattn.softmax_attention` for autograd: Σ_j exp(s q_i·k_j) v_j / Σ_j exp(s q_i·k_j), first derivatives.

    Parameters, results and errors as there.

    >>> from autograd import grad
    >>> x = np.zeros((2, 1))
    >>> grad(lambda v: softmax_attention(x, x, v)[0].sum())(x).ravel()
    array([0.5, 0.5])
    """
    return _call(softmax.softmax_attention, q, k, v, causal=causal, scale=scale, query_lengths=query_lengths, key_lengths=key_lengths)


def linear_attention(q: Array, k: Array, v: Array, *, feature_map: Any = "elu1", causal: bool = False, eps: float = 1e-6,
                     query_lengths: Any = None, key_lengths: Any = None) -> Array:
    """`refattn.linear_attention` for autograd: φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_j φ(k_j) + ε), first derivatives.

    Parameters, results and errors as there.

    >>> from autograd import grad
    >>> x = np.zeros((2, 1))
    >>> grad(lambda v: linear_attention(x, x, v, eps=0)[0].sum())(x).ravel()
    array([0.5, 0.5])
    """
    return _call(attention.linear_attention, q, k, v, feature_map=feature_map, causal=causal, eps=eps, query_lengths=query_lengths,
                 key_lengths=key_lengths)


def causal_linear_attention(q: Array, k: Array, v: Array, state: Any = None, *, feature_map: Any = "elu1",
                            eps: float = 1e-6) -> tuple[Array, State]:
    """`refattn.causal_linear_attention` for autograd: φ(q_i)ᵀ S_i / (φ(q_i)ᵀ z_i + ε), from a state to the next, first derivatives.

    Parameters
    ----------
    q, k, v, feature_map, eps
        As there, and so are results and errors.
    state : State or tuple (S, z), optional
        autograd knows tuples: to differentiate by a state, hand over `tuple(state)`.

    >>> from autograd import grad
    >>> x = np.zeros((2, 1))
    >>> grad(lambda v: causal_linear_attention(x, x, v, eps=0)[0].sum())(x).ravel()
    array([1.5, 0.5])
    """
    return _call(attention.causal_linear_attention, q, k, v, state, feature_map=feature_map, eps=eps)


def causal_linear_attention_step(q_t: Array, k_t: Array, v_t: Array, state: Any = None, *, feature_map: Any = "elu1",
                                 eps: float = 1e-6) -> tuple[Array, State]:
    """`refattn.causal_linear_attention_step` for autograd: one position of `causal_linear_attention`.

    >>> from autograd import grad
    >>> x = np.zeros(1)
    >>> grad(lambda v: causal_linear_attention_step(x, x, v, eps=0)[0].sum())(x)
    array([1.])
    """
    return _call(attention.causal_linear_attention_step, q_t, k_t, v_t, state, feature_map=feature_map, eps=eps)


def recurrence(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, state: Array | None = None, *,
               rule: str = "linear", scale: float = 1.0, cu_seqlens: Any = None) -> tuple[Array, Array]:
    """`refattn.recurrence` for autograd: S_t = P_t + k_t u_tᵀ, o_t = scale · S_tᵀ q_t with P_t = Diag(exp(g_t)) S_{t-1}, all rules.

    Parameters, results and errors as there. A cotangent that autograd made in another precision is rounded to that of its output.

    Raises
    ------
    NotImplementedError
        Where a derivative of a gradient is asked for, but for rule `linear` without `cu_seqlens`, which has all orders.

    Examples
    --------
    >>> from autograd import grad
    >>> x = np.ones((3, 1))
    >>> loss = lambda v: (recurrence(x, x, v)[0]**2).sum()
    >>> grad(loss)(x).ravel(), grad(lambda v: (grad(loss)(v)**2).sum())(x).ravel()
    (array([12., 10.,  6.]), array([248., 200., 112.]))
    """
    again = None if rule != "linear" or cu_seqlens is not None else lambda *x: _gradients(*x, scale=scale)
    return _call(rules.recurrence, q, k, v, g, beta, state, again=again, rule=rule, scale=scale, cu_seqlens=cu_seqlens)


def recurrence_step(q_t: Array, k_t: Array, v_t: Array, g_t: Array | None = None, beta_t: Array | None = None, state: Array | None = None,
                    *, rule: str = "linear", scale: float = 1.0) -> tuple[Array, Array]:
    """`refattn.recurrence_step` for autograd: one position of `recurrence`, first derivatives.

    >>> from autograd import grad
    >>> x = np.ones(1)
    >>> grad(lambda v: recurrence_step(x, x, v)[0].sum())(x)
    array([1.])
    """
    return _call(rules.recurrence_step, q_t, k_t, v_t, g_t, beta_t, state, rule=rule, scale=scale)


# --- the one primitive ------------------------------------------------------------------------------------------------------------------

@primitive                                                                       # type: ignore[untyped-decorator, unused-ignore]
def outputs_of_refattn(found: Any, backward: Callable[..., Any], *arrays: Any) -> Any:
    """`found`, which depends on the arrays as `backward` says: backward(g, arrays) gives one gradient for each."""
    return found


defvjp_argnums(outputs_of_refattn, lambda argnums, ans, args, kwargs: lambda g: _chosen(args[1](g, args[2:]), argnums))


def _chosen(gradients: tuple[Any, ...], argnums: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(gradients[i - 2] for i in argnums)


def _call(f: Callable[..., Any], *arrays: Any, again: Callable[..., Any] | None = None, **options: Any) -> Any:
    """f(*arrays, **options), known to autograd where an array is one of its boxes. `again`: the gradients of cotangents and arrays as calls of
    primitives."""
    flat = _flat(arrays)
    if not any(map(isbox, flat)):
        return f(*arrays, **options)
    found, pullback = vjp(f, *(State(*map(getval, x)) if _is_state(x) else getval(x) for x in arrays), **options)
    alone = not isinstance(found, tuple)
    values = (found,) if alone else _flat(found)

    def backward(g: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        cotangents = [cast(d, x.dtype) for d, x in zip([g] if alone else [g[i] for i in range(len(values))], values, strict=True)]
        if any(map(isbox, (*cotangents, *inputs))):
            if again is None:
                raise NotImplementedError(f"{f.__name__}: a derivative of its gradients was asked for; in autograd only recurrence with "
                                          "rule='linear', without cu_seqlens, has them; refattn.adapters.jax has those of all rules")
            return tuple(again(*cotangents, *inputs))
        dout, *dstate = cotangents
        return _flat(pullback(dout, *([State(*dstate)] if len(dstate) == 2 else dstate)))

    known = outputs_of_refattn(found if alone else values, backward, *flat)
    return known if alone else (known[0], known[1] if len(values) == 2 else State(known[1], known[2]))


def _is_state(x: Any) -> bool:
    """A State, a tuple, or autograd's box of one."""
    return isinstance(getval(x), tuple) and len(x) == 2


def _flat(arrays: Any) -> tuple[Any, ...]:
    return tuple(leaf for x in arrays for leaf in ((x[0], x[1]) if _is_state(x) else (x,)))


# --- rule linear: the gradients in calls of itself ----------------------------------------------------------------------------------------

def _gradients(dout: Array, dstate: Array, q: Array, k: Array, v: Array, g: None, beta: None, state: Array | None, *,
               scale: float) -> tuple[Array | None, ...]:
    """dq, dk, dv, None, None, dstate0 of `recurrence`, rule `linear`; see the top of this file. Query heads that share keys are summed over."""
    acc = accumulator(dstate.dtype)
    o, Q, K, V = (cast(x, acc) for x in (dout, q, k, v))
    o = o * scale
    shared = [x if q.shape == k.shape or q.ndim == 2 else x[..., np.arange(q.shape[-3]) * k.shape[-3] // q.shape[-3], :, :] for x in (K, V)]

    def over_group(x: Array) -> Array:
        return x if q.ndim == 2 else x.reshape((*k.shape[:-2], -1, *x.shape[-2:])).sum(axis=-3)

    def behind(*arrays: Array) -> tuple[Array, Array]:
        out, end = recurrence(*(x[..., ::-1, :] for x in arrays))
        return over_group(out[..., ::-1, :]), over_group(end)

    dq, _ = recurrence(o, V, K, state=None if state is None else cast(state, acc).swapaxes(-1, -2))
    dk, _ = behind(shared[1], o, Q)
    dv, dS = behind(shared[0], Q, o)
    dk, dv, dS = dk + V @ dstate.swapaxes(-1, -2), dv + K @ dstate, dS + dstate
    return cast(dq, q.dtype), cast(dk, k.dtype), cast(dv, v.dtype), None, None, None if state is None else cast(dS, state.dtype)
