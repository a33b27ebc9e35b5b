"""refattn in JAX: the loop-free forms, compiled, with the hand-derived backward for `jax.grad`.

    out, state = recurrence(q, k, v, g, rule="gated")          dq = jax.grad(lambda q: loss(recurrence(q, k, v, g, rule="gated")[0]))(q)

What is called is what `refattn` itself calls for arrays that are not NumPy's, the scan forms, and by `refattn.vjp` their transposes; there is no
other mathematics here. Between forward and backward only the inputs are kept, where JAX's own transpose keeps every array on the way.

Both directions are functions of the array API that JAX can trace, so that JAX differentiates the backward by itself: second and higher orders, by
reverse over reverse or forward over reverse. Forward mode alone does not know a hand-derived transpose and JAX says so; `refattn.recurrence` and
`refattn.causal_linear_attention` themselves take JAX arrays, and there JAX has its own derivatives, of either mode.

Products are asked for in full precision, whatever `jax.default_matmul_precision` says: a float32 sum is one on devices too that would round its
factors to fewer bits by default.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import attention, rules
from .._array import Array, missing_extra
from .._vjp import vjp
from ..attention import State, _described

try:
    import jax
except ImportError:
    raise missing_extra("JAX", "jax") from None

import numpy as np

Options = tuple[tuple[str, Any, str], ...]


def recurrence(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, state: Array | None = None, *,
               rule: str = "linear", scale: float = 1.0, cu_seqlens: Any = None) -> tuple[Array, Array]:
    """`refattn.recurrence` of JAX arrays: S_t = P_t + k_t u_tᵀ, o_t = scale · S_tᵀ q_t with P_t = Diag(exp(g_t)) S_{t-1}, all rules.

    Parameters
    ----------
    q, k, v, g, beta, state : jax.Array
        As there, and so are the results (out, state): shapes, dtypes, grouped heads; float64 where `jax_enable_x64` is on.
    rule, scale, cu_seqlens
        As there, and known before tracing; each new value is compiled anew.

    Raises
    ------
    ValueError
        As there.
    TypeError
        As there, and "q: expected a JAX array, got ndarray; convert it with jax.numpy.asarray first",
        "scale: expected a value that is known before tracing, got …".

    Notes
    -----
    The scan form's cost (see `refattn.gated`, `refattn.delta`): all chunks at once, memory N·D·M / C for the states. Compiled once for each set of
    shapes, dtypes and options, seconds each for the rules with a gate or a delta.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((3, 1))
    >>> out, state = recurrence(x, x, x)
    >>> out.ravel().tolist(), jax.grad(lambda v: recurrence(x, x, v)[0].sum())(x).ravel().tolist()
    ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    """
    _check(q=q, k=k, v=v, g=g, beta=beta, state=state)
    if cu_seqlens is not None and not isinstance(cu_seqlens, jax.core.Tracer):
        cu_seqlens = tuple(np.asarray(cu_seqlens).tolist())
    return _recurrence(_options(rule=rule, scale=scale, cu_seqlens=cu_seqlens), q, k, v, g, beta, state)


def recurrence_step(q_t: Array, k_t: Array, v_t: Array, g_t: Array | None = None, beta_t: Array | None = None, state: Array | None = None,
                    *, rule: str = "linear", scale: float = 1.0) -> tuple[Array, Array]:
    """`refattn.recurrence_step` of JAX arrays: one position of `recurrence`, for `jax.lax.scan` and decoding.

    Parameters, results and errors as there and in `recurrence`.

    >>> import jax.numpy as jnp
    >>> one, state = jnp.ones(1), None
    >>> for x in (1.0, 2.0): out, state = recurrence_step(one, one, x * one, state=state)
    >>> out.tolist()
    [3.0]
    """
    _check(q_t=q_t, k_t=k_t, v_t=v_t, g_t=g_t, beta_t=beta_t, state=state)
    return _recurrence_step(_options(rule=rule, scale=scale), q_t, k_t, v_t, g_t, beta_t, state)


def causal_linear_attention(q: Array, k: Array, v: Array, state: State | None = None, *, feature_map: Any = "elu1",
                            eps: float = 1e-6) -> tuple[Array, State]:
    """`refattn.causal_linear_attention` of JAX arrays: φ(q_i)ᵀ S_i / (φ(q_i)ᵀ z_i + ε), from a state to the next (eq. (8) to (12)).

    Parameters
    ----------
    q, k, v : jax.Array
    state : State of jax.Array, optional
        As there, and so are the results (out, State). A State is a tuple to JAX: differentiate by it, map over it, carry it in `jax.lax.scan`.
    feature_map, eps
        As there; a pair of your own must be functions of JAX arrays. A new pair, be it of the same code, is compiled anew: make it once.

    Raises
    ------
    ValueError, TypeError
        As there, and as in `recurrence`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> q, k, v = jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.array([[1.0], [3.0]])
    >>> out, state = causal_linear_attention(q, k, v, eps=0)
    >>> out.ravel().tolist(), state.z.tolist()
    ([1.0, 2.0], [2.0, 2.0, 2.0])
    """
    return _causal(_options(feature_map=feature_map, eps=eps), *_checked(state, q=q, k=k, v=v))


def causal_linear_attention_step(q_t: Array, k_t: Array, v_t: Array, state: State | None = None, *, feature_map: Any = "elu1",
                                 eps: float = 1e-6) -> tuple[Array, State]:
    """`refattn.causal_linear_attention_step` of JAX arrays: one position of `causal_linear_attention` (eq. (18), (19)).

    Parameters, results and errors as there and in `causal_linear_attention`.

    >>> import jax.numpy as jnp
    >>> state = None
    >>> for x in (1.0, 3.0): out, state = causal_linear_attention_step(jnp.zeros(3), jnp.zeros(3), jnp.array([x]), state, eps=0)
    >>> out.tolist()
    [2.0]
    """
    return _causal_step(_options(feature_map=feature_map, eps=eps), *_checked(state, q_t=q_t, k_t=k_t, v_t=v_t))


def _differentiable(f: Callable[..., Any]) -> Callable[..., Any]:
    """f(*arrays, **options) as a compiled function of the options and the arrays, with the gradients of `refattn.vjp`.

    The backward goes through the forward once more for its pullback; compiled, only what the gradients read of it is left."""
    def forward(options: Options, *arrays: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return f(*arrays, **{name: value for name, value, _ in options})

    def backward(options: Options, arrays: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        with jax.default_matmul_precision("highest"):
            return vjp(f, *arrays, **{name: value for name, value, _ in options})[1](*cotangents)

    call = jax.custom_vjp(forward, nondiff_argnums=(0,))
    call.defvjp(lambda options, *arrays: (forward(options, *arrays), arrays), backward)
    return jax.jit(call, static_argnums=0)


_recurrence, _recurrence_step = _differentiable(rules.recurrence), _differentiable(rules.recurrence_step)
_causal, _causal_step = _differentiable(attention.causal_linear_attention), _differentiable(attention.causal_linear_attention_step)


def _options(**options: Any) -> Options:
    """As a key of what is compiled. With its repr: True and 1 are equal, and are not taken for one another."""
    for name, value in options.items():
        if isinstance(value, jax.Array) or not _hashable(value):
            raise TypeError(f"{name}: expected a value that is known before tracing, got {type(value).__name__}")
    return tuple((name, value, repr(value)) for name, value in options.items())


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _check(**arrays: Any) -> None:
    for name, x in arrays.items():
        if x is not None and not isinstance(x, jax.Array):
            raise TypeError(f"{name}: expected a JAX array, got {type(x).__name__}; convert it with jax.numpy.asarray first")


def _checked(state: Any, **arrays: Any) -> tuple[Any, ...]:
    """The arrays and the state as a State, so that its gradient is one."""
    _check(**arrays)
    if state is None:
        return (*arrays.values(), None)
    if not isinstance(state, tuple) or len(state) != 2 or state[0] is None or state[1] is None:
        raise TypeError(f"state: expected State(S, z) as a former call returned it, got {_described(state)}")
    _check(**{"state.S": state[0], "state.z": state[1]})
    return (*arrays.values(), State(*state))
