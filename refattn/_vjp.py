"""Reverse-mode differentiation of the public functions by their hand-derived backward passes."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import attention, rules, softmax

_WITH_PULLBACK: dict[Callable[..., Any], Callable[..., Any]] = {
    softmax.softmax_attention: softmax.softmax_attention_vjp,
    attention.linear_attention: attention.linear_attention_vjp,
    attention.causal_linear_attention: attention.causal_linear_attention_vjp,
    attention.causal_linear_attention_step: attention.causal_linear_attention_step_vjp,
    rules.recurrence: rules.recurrence_vjp,
    rules.recurrence_step: rules.recurrence_step_vjp,
}


def vjp(f: Callable[..., Any], *arrays: Any, **options: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """The outputs of f and its pullback: the transpose of f's derivative at `arrays`, derived by hand, not traced.

    Parameters
    ----------
    f : function
        One of refattn's public attention functions.
    *arrays
        f's array arguments, in its order (a `State` counts as one; None where f allows it).
    **options
        f's keyword arguments.

    Returns
    -------
    outputs
        What f returns.
    pullback : function
        pullback(*cotangents) takes one cotangent per output, each of its output's shape and dtype (None counts as zero; cotangents left
        out at the end too), and returns one gradient per array given, of its shape and dtype; None where the array was None.
        It may be called any number of times. It reads the arrays that were given: do not change them in between.

    Raises
    ------
    TypeError
        "f: expected one of softmax_attention, …, got …".
    ValueError, TypeError
        As f raises; and for a cotangent of a wrong shape or dtype ("dout: expected the shape of the output …").

    Notes
    -----
    Keeps the inputs, the outputs and at most one number per row; nothing of size N·D·M or N².

    Examples
    --------
    >>> import numpy as np
    >>> from refattn import recurrence
    >>> x = np.ones((3, 1))
    >>> (out, state), pullback = vjp(recurrence, x, x, x)
    >>> dq, dk, dv = pullback(np.array([[1.0], [0.0], [2.0]]))
    >>> dq.ravel(), dk.ravel(), dv.ravel()
    (array([1., 0., 6.]), array([3., 2., 2.]), array([3., 2., 2.]))
    """
    try:
        with_pullback = _WITH_PULLBACK[f]
    except (KeyError, TypeError):
        names = ", ".join(known.__name__ for known in _WITH_PULLBACK)
        raise TypeError(f"f: expected one of {names}, got {getattr(f, '__name__', repr(f))}") from None
    outputs, pullback = with_pullback(*arrays, **options)
    given = len(arrays)

    def per_array(*cotangents: Any) -> tuple[Any, ...]:
        expected = len(outputs) if isinstance(outputs, tuple) else 1
        if not 1 <= len(cotangents) <= expected:
            raise TypeError(f"pullback: expected {expected} cotangent{'s' if expected > 1 else ''}, one per output, got {len(cotangents)}")
        return tuple(pullback(*cotangents)[:given])

    return outputs, per_array
