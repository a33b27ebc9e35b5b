"""Optimisers as functions: (params, grads, slots) → (params, slots).

Parameters, gradients and slots are flat dicts of arrays with the same keys. Every step returns new arrays and leaves the caller's as
they were, so a rejected step is undone by keeping the old dict. With θ the parameters, g the gradients, α the learning rate:

    sgd      m = μ m + g                                      θ = θ - α m
    adam     m = β1 m + (1-β1) g, v = β2 v + (1-β2) g²        θ = θ - α m̂ / (√v̂ + eps)        m̂ = m/(1-β1ᵗ), v̂ = v/(1-β2ᵗ)
    radam    the same m and v                                 θ = θ - α r_t m̂ / (√v̂ + eps), or θ - α m̂ while √v̂ cannot be trusted

Slots, and all arithmetic, are in float32 for float16 and bfloat16 parameters, else in the parameters' dtype.
Weight decay λ is decoupled (Loshchilov and Hutter, 2019): θ = θ - α λ θ, beside the step and not inside the gradient.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ._array import Array, accumulator, check_number, check_positive, check_shape, dtype_name, namespace

Params = Mapping[str, Array]


class SgdSlots(NamedTuple):
    """`momentum[key]`: the m of sgd."""

    momentum: dict[str, Array]


class AdamSlots(NamedTuple):
    """How many steps were taken, and for each key the running means of g and g², not yet divided by 1-βᵗ."""

    steps: int
    mean: dict[str, Array]
    square: dict[str, Array]


# --- sgd ---------------------------------------------------------------------------------------------------------------------------------

def sgd_init(params: Params) -> SgdSlots:
    """The slots of `sgd_step` before the first step: zeros.

    >>> import numpy as np
    >>> sgd_init({"w": np.ones(2)}).momentum["w"].tolist()
    [0.0, 0.0]
    """
    return SgdSlots(_zeros(params))


def sgd_step(params: Params, grads: Params, slots: SgdSlots, *, learning_rate: float, momentum: float = 0.0,
             weight_decay: float = 0.0) -> tuple[dict[str, Array], SgdSlots]:
    """Gradient descent with heavy-ball momentum.

        m = μ m + g        θ = θ - α (m + λ θ)

    Parameters
    ----------
    params, grads : dict
        The same keys; each gradient with its parameter's shape and dtype.
    slots : SgdSlots
    learning_rate, momentum, weight_decay : float
        α, μ, λ.

    Returns
    -------
    params : dict
        New arrays.
    slots : SgdSlots

    Raises
    ------
    ValueError, TypeError
        `grads: expected the keys of params, …`; `grads['w']: expected the shape of params['w'] = (2,), got (3,): …`; a learning rate
        that is negative or not a number.

    Examples
    --------
    >>> import numpy as np
    >>> params, slots = sgd_step({"w": np.ones(1)}, {"w": np.ones(1)}, sgd_init({"w": np.ones(1)}), learning_rate=0.25)
    >>> params["w"].tolist()
    [0.75]
    """
    rate, mu, decay = (check_number(name, value, least=0) for name, value in (
        ("learning_rate", learning_rate), ("momentum", momentum), ("weight_decay", weight_decay)))
    _check(params, grads, slots.momentum)
    new, means = {}, {}
    for key, theta in params.items():
        m = _lined(slots.momentum[key]) * mu
        m += _lined(grads[key])
        new[key] = _moved(theta, m * -rate, rate * decay)
        means[key] = m.reshape(theta.shape)
    return new, SgdSlots(means)


# --- adam and radam ----------------------------------------------------------------------------------------------------------------------

def adam_init(params: Params) -> AdamSlots:
    """The slots of `adam_step` and of `radam_step` before the first step: zeros.

    >>> import numpy as np
    >>> adam_init({"w": np.ones(2)}).steps
    0
    """
    return AdamSlots(0, _zeros(params), _zeros(params))


def adam_step(params: Params, grads: Params, slots: AdamSlots, *, learning_rate: float, beta1: float = 0.9, beta2: float = 0.999,
              eps: float = 1e-8, weight_decay: float = 0.0) -> tuple[dict[str, Array], AdamSlots]:
    """Adam (Kingma and Ba, 2015, Algorithm 1).

        m = β1 m + (1-β1) g        v = β2 v + (1-β2) g²
        θ = θ - α (m / (1-β1ᵗ)) / (√(v / (1-β2ᵗ)) + eps) - α λ θ

    Parameters
    ----------
    params, grads : dict
        The same keys; each gradient with its parameter's shape and dtype.
    slots : AdamSlots
        From `adam_init` or the step before.
    learning_rate, beta1, beta2, eps, weight_decay : float
        α ≥ 0, 0 ≤ β < 1, eps ≥ 0, λ ≥ 0 (decoupled).

    Returns
    -------
    params : dict
        New arrays.
    slots : AdamSlots
        New arrays.

    Raises
    ------
    ValueError, TypeError
        As `sgd_step`; `beta2: expected 0 ≤ beta2 < 1, got 1.0`.

    Notes
    -----
    About ten passes over each array, with one temporary.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"w": np.array([1.0, 1.0])}
    >>> params, slots = adam_step(params, {"w": np.array([1e-3, -5.0])}, adam_init(params), learning_rate=0.1)
    >>> np.round(params["w"], 5).tolist()
    [0.9, 1.1]
    """
    return _adam(params, grads, slots, learning_rate, beta1, beta2, eps, weight_decay, lambda t: 1.0)


def radam_step(params: Params, grads: Params, slots: AdamSlots, *, learning_rate: float, beta1: float = 0.9, beta2: float = 0.999,
               eps: float = 1e-8, weight_decay: float = 0.0) -> tuple[dict[str, Array], AdamSlots]:
    """Rectified Adam (Liu et al., 2020, Algorithm 2), the paper's optimiser. Its slots are those of `adam_init`.

        ρ∞ = 2/(1-β2) - 1        ρ_t = ρ∞ - 2 t β2ᵗ/(1-β2ᵗ)
        ρ_t > 4:   θ = θ - α r_t (m/(1-β1ᵗ)) / (√(v/(1-β2ᵗ)) + eps) - α λ θ        r_t = √((ρ_t-4)(ρ_t-2) ρ∞ / ((ρ∞-4)(ρ∞-2) ρ_t))
        else:      θ = θ - α (m/(1-β1ᵗ)) - α λ θ

    ρ_t is how many gradients the running mean v is worth. While it is at most 4 the variance of 1/√v is infinite, and the step falls
    back to momentum alone (the first four steps with β2 = 0.999); then r_t grows from 0.02 to 1, which is the warm-up.

    Parameters, returns, raises
    ---------------------------
    As `adam_step`. The paper's algorithm has no eps; it is kept against division by zero.

    Examples
    --------
    >>> import numpy as np
    >>> params = {"w": np.array([1.0, 1.0])}
    >>> params, slots = radam_step(params, {"w": np.array([1e-3, -5.0])}, adam_init(params), learning_rate=0.1)
    >>> np.round(params["w"], 5).tolist()
    [0.9999, 1.5]
    """
    def rectification(t: int) -> float | None:
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        if length <= 4:
            return None
        return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))

    return _adam(params, grads, slots, learning_rate, beta1, beta2, eps, weight_decay, rectification)


def _adam(params: Params, grads: Params, slots: AdamSlots, learning_rate: float, beta1: float, beta2: float, eps: float,
          weight_decay: float, rectification: Callable[[int], float | None]) -> tuple[dict[str, Array], AdamSlots]:
    """Adam with its step scaled by `rectification(t)`, or without its denominator where that is None."""
    rate, eps, decay = (check_number(name, value, least=0) for name, value in (
        ("learning_rate", learning_rate), ("eps", eps), ("weight_decay", weight_decay)))
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not check_number(name, beta, least=0) < 1:
            raise ValueError(f"{name}: expected 0 ≤ {name} < 1, got {beta}")
    beta1, beta2 = float(beta1), float(beta2)
    _check(params, grads, slots.mean, slots.square)
    t = slots.steps + 1
    scale, rectified = rate / (1 - beta1**t), rectification(t)
    correction = math.sqrt(1 - beta2**t)            # √(v/c²) + eps = (√v + eps c)/c: the division moves out of the arrays
    new, means, squares = {}, {}, {}
    for key, theta in params.items():
        xp = namespace(params=theta)
        g = _lined(grads[key]).astype(accumulator(theta.dtype), copy=False)
        m = _lined(slots.mean[key]) * beta1
        work = g * (1 - beta1)
        m += work
        v = _lined(slots.square[key]) * beta2
        xp.multiply(g, g, out=work)
        work *= 1 - beta2
        v += work
        if rectified is None:
            xp.multiply(m, -scale, out=work)
        else:
            xp.sqrt(v, out=work)
            work += eps * correction
            xp.divide(m, work, out=work)
            work *= -scale * rectified * correction
        new[key] = _moved(theta, work, rate * decay)
        means[key], squares[key] = m.reshape(theta.shape), v.reshape(theta.shape)
    return new, AdamSlots(t, means, squares)


# --- clipping ----------------------------------------------------------------------------------------------------------------------------

def clip_by_global_norm(grads: Params, limit: float) -> tuple[dict[str, Array], float]:
    """Scale all gradients by one number so that together they are no longer than `limit`.

        norm = √(Σ g²) over all elements of all arrays        g = g · min(1, limit / norm)

    Parameters
    ----------
    grads : dict
    limit : float
        > 0.

    Returns
    -------
    grads : dict
        A new dict: of new arrays, or of the very same arrays where nothing had to be clipped.
    norm : float
        Before clipping.

    Raises
    ------
    ValueError
        `grads: expected finite gradients, got a norm of nan in 'head.weight'`; `limit: expected a finite number ≥ 0, …`.

    Notes
    -----
    Squares are summed in float64, scaled by the largest element: no gradient that is finite overflows the norm.

    Examples
    --------
    >>> import numpy as np
    >>> clipped, norm = clip_by_global_norm({"a": np.array([3.0]), "b": np.array([4.0])}, 1.0)
    >>> norm, clipped["b"].tolist()
    (5.0, [0.8])
    """
    limit = check_number("limit", limit, least=0)
    if limit == 0:
        raise ValueError("limit: expected a number > 0, got 0: all gradients would vanish")
    norms = {key: _norm(g) for key, g in grads.items()}
    for key, norm in norms.items():
        if not math.isfinite(norm):
            raise ValueError(f"grads: expected finite gradients, got a norm of {norm} in {key!r}; lower the learning rate or look at "
                             "the loss")
    norm = math.hypot(*norms.values())
    if norm <= limit:
        return dict(grads), norm
    factor = limit / norm
    scaled = {key: _lined(g).astype(accumulator(g.dtype), copy=False) * factor for key, g in grads.items()}
    return {key: scaled[key].astype(g.dtype, copy=False).reshape(g.shape) for key, g in grads.items()}, norm


# --- schedules: learning rates as functions of the step 0, 1, 2, … -----------------------------------------------------------------------

def constant_rate(step: int, rate: float) -> float:
    """α, always.

    >>> constant_rate(7, 1e-3)
    0.001
    """
    _check_step(step)
    return float(rate)


def dropped_rate(step: int, rate: float, at: int, to: float) -> float:
    """α until step `at`, `to` from then on. The paper's copy task: `dropped_rate(step, 1e-3, 3000, 1e-4)`.

    >>> dropped_rate(2999, 1e-3, 3000, 1e-4), dropped_rate(3000, 1e-3, 3000, 1e-4)
    (0.001, 0.0001)
    """
    _check_step(step)
    return float(rate if step < at else to)


def cosine_rate(step: int, rate: float, steps: int, floor: float = 0.0) -> float:
    """From α at step 0 along half a cosine to `floor` at step `steps`, and there from then on (Loshchilov and Hutter, 2017, eq. 5).

        floor + (α - floor) (1 + cos(π step/steps)) / 2

    >>> cosine_rate(0, 1.0, 10), round(cosine_rate(5, 1.0, 10), 9), cosine_rate(99, 1.0, 10, floor=0.25)
    (1.0, 0.5, 0.25)
    """
    _check_step(step)
    done = min(step / check_positive("steps", steps), 1.0)
    return floor + (rate - floor) * (1 + math.cos(math.pi * done)) / 2


def warm_up(step: int, steps: int) -> float:
    """A factor for any of the rates above: (step + 1)/steps for the first `steps` steps, then 1. The first step already moves.

    >>> [warm_up(step, 4) * constant_rate(step, 1.0) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    _check_step(step)
    return min((step + 1) / check_positive("steps", steps), 1.0)


# --- what they share ---------------------------------------------------------------------------------------------------------------------

def _zeros(params: Params) -> dict[str, Array]:
    return {key: namespace(params=p).zeros(p.shape, accumulator(p.dtype)) for key, p in params.items()}


def _lined(x: Array) -> Array:
    """x, a single number as an array of one: arithmetic on arrays without axes would give scalars, which have no place to write to."""
    return x if x.ndim else x.reshape(1)


def _moved(theta: Array, move: Array, shrink: float) -> Array:
    """θ (1 - shrink) + move, rounded once to θ's dtype. `move` is the caller's own temporary and is written to."""
    move += _lined(theta) if not shrink else _lined(theta).astype(move.dtype, copy=False) * (1 - shrink)
    return move.astype(theta.dtype, copy=False).reshape(theta.shape)


def _norm(g: Array) -> float:
    wide = g.astype(namespace(grads=g).float64)
    largest = float(abs(wide).max()) if wide.size else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    wide /= largest
    return largest * math.sqrt(float((wide * wide).sum()))


def _check_step(step: Any) -> None:
    if step < 0:
        raise ValueError(f"step: expected a step ≥ 0, got {step}")


def _check(params: Params, grads: Params, *slots: Params) -> None:
    for name, given in (("grads", grads), *(("slots", slot) for slot in slots)):
        if given.keys() != params.keys():
            odd = sorted(params.keys() ^ given.keys())
            raise ValueError(f"{name}: expected the keys of params, got {len(odd)} that only one of them has, first {odd[0]!r}")
    for key, theta in params.items():
        like = f"the shape of params[{key!r}]"
        check_shape(f"grads[{key!r}]", grads[key], like, theta.shape, "each gradient is shaped like its parameter")
        if grads[key].dtype != theta.dtype:
            raise TypeError(f"params[{key!r}] is {dtype_name(theta)} and its gradient is {dtype_name(grads[key])}; "
                            "cast one of them, nothing is cast silently")
        for slot in slots:
            check_shape(f"slots[{key!r}]", slot[key], like, theta.shape, "make the slots with these params")
