"""Discretised mixture of logistics: the probability of one of V ordered levels, as the area under K bell curves over the level's bin.

    edge_t = (2t - V) / (V - 1)   t = 1 … V-1;   edge_0 = -∞, edge_V = ∞           bin t of [-1, 1] lies between edge_t and edge_{t+1}
    a, b   = (edge_t - μ) e^{-s}, (edge_{t+1} - μ) e^{-s}        w = b - a         the ends of the target's bin, for each logistic
    P      = σ(b) - σ(a) = σ(b) σ(-a) (1 - e^{-w})                                 no difference is left: the logarithm is a sum of terms ≤ 0
    nll    = -log Σ_k π_k P_k                                    π = softmax(logits)

As in PixelCNN++ and the paper's image experiments, of one value at a time. Derived in docs/derivations/logistic_mixture.md.

Axes   ... positions, any number of axes · K logistics · V levels; parameters (..., 3K): K logits, K means μ, K log-scales s
"""
from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from .._array import Array, accumulator, check_dtypes, check_number, check_positive, namespace
from ..layers import check_indices
from .cross_entropy import Residuals, shares


def logistic_mixture_forward(params: Array, targets: Array, *, levels: int = 256, weights: Array | None = None) -> tuple[Any, Residuals]:
    """Mean negative log-likelihood in nats of integer levels under mixtures of logistics.

        loss = -Σ_i w_i log Σ_k π_ik (σ(b_ik) - σ(a_ik)) / Σ_i w_i

    Parameters
    ----------
    params : (..., 3K)
        Logits of the mixture, means (levels span [-1, 1]), log-scales: K each. A logit may be -inf: its logistic is not there.
    targets : (...) integers
        0 ≤ target < V wherever the weight is not 0.
    levels : int
        V ≥ 2.
    weights : (...), optional
        A mask (bool), or weights ≥ 0 as integers or in the parameters' dtype. Constants: they have no gradient. What parameters and
        targets hold where the weight is 0 (NaN, -1) reaches nothing.

    Returns
    -------
    loss : scalar of the parameters' dtype
        Nats per unit of weight, `bits(loss)` the bits per dimension; 0 where there is no weight at all.
    residuals : tuple
        For `logistic_mixture_backward`: six numbers for each logistic of each position.

    Raises
    ------
    TypeError
        `targets: expected integers, got float64`; weights of another float dtype than the parameters.
    ValueError
        `params: expected (..., 3K) with K ≥ 1, got (5, 4)`; `targets: expected 0 ≤ target < levels = 256, got values from -1 to 9`;
        `levels: expected an integer ≥ 2, got 1`; shapes; negative weights.

    Notes
    -----
    The loss is a number for all finite parameters, a logarithm's error is a few u·(1 + |s| + |log P|). Kept in the parameters' dtype
    (float32 for float16 and bfloat16), the sum over positions in float64. What exceeds a quarter of the largest number of that dtype
    (a mean 10⁶ off at a log-scale of -80 in float32) is cut off there; nothing else is bounded or replaced.

    Examples
    --------
    >>> params = np.array([[0.0, 0.0, -0.5, 0.5, -100.0, -100.0]])     # two spikes of equal weight, on levels 1 and 2 of 0 … 3
    >>> loss, residuals = logistic_mixture_forward(params, np.array([2]), levels=4)
    >>> round(float(loss / math.log(2)), 12)
    1.0
    """
    xp = namespace(params=params, targets=targets, weights=weights)
    K = _components(params)
    V = _levels(levels)
    if tuple(targets.shape) != tuple(params.shape[:-1]):
        raise ValueError(f"targets: expected the leading axes of params {tuple(params.shape[:-1])}, got {tuple(targets.shape)}: "
                         "one level for each position")
    work = accumulator(params.dtype)
    x = params.astype(work)
    share, kept = shares(xp, weights, tuple(targets.shape), params=params)
    if kept is not None:
        x = xp.where(kept[..., None], x, xp.zeros((), work))
    check_indices("targets", targets, V, "target", "levels", kept)
    t = (targets if kept is None else xp.where(kept, targets, 0)).astype(xp.int64)     # t + 1 is to fit
    with np.errstate(over="ignore", divide="ignore"):         # what overflows is cut off, what is divided by 0 not chosen
        log_pi = x[..., :K] - x[..., :K].max(-1, keepdims=True)
        log_pi -= xp.log(xp.exp(log_pi).sum(-1, keepdims=True))
        a, b, w, inverse = _ends(xp, x[..., K:2 * K], x[..., 2 * K:], t, V)
        share_of = log_pi + _log_bin(xp, a, b, w, math.log(2 / (V - 1)) - x[..., 2 * K:])
        largest = share_of.max(-1, keepdims=True)
        share_of = xp.exp(share_of - largest)
        total = share_of.sum(-1, keepdims=True)
        share_of /= total
        loss = -((largest + xp.log(total))[..., 0] * share).sum(dtype=xp.float64)
        return loss.astype(params.dtype), (a, b, w, inverse, xp.exp(log_pi), share_of, share, params.dtype)


def logistic_mixture_backward(dloss: Any, residuals: Residuals) -> Array:
    """Transpose of `logistic_mixture_forward`, loss = -Σ_i c_i log Σ_k π_ik P_ik, c_i = w_i / Σ w, log P = log(1 - e^{-w}) - log(1 + e^a)
    - log(1 + e^{-b}). With r_ik = π_ik P_ik / Σ_k' π_ik' P_ik', and δa = -e^{-s} δμ - a δs (b and w likewise, but w does not move with μ):

        dlogits_ik =  dloss · c_i (π_ik - r_ik)
        dmeans_ik  = -dloss · c_i r_ik e^{-s} (σ(a) - σ(-b))               σ(a) - σ(-b) = ± σ(±a) σ(±b) (1 - e^{-|a+b|}), ± the sign of a + b
        dscales_ik = -dloss · c_i r_ik (a σ(a) - b σ(-b) - w / (e^w - 1))

    Parameters
    ----------
    dloss : scalar
        Cotangent of the loss; 1.0 for the gradient of the loss itself.

    Returns
    -------
    dparams : (..., 3K)
        In the parameters' dtype. Exactly zero where the weight is 0.

    Notes
    -----
    Three exponentials for each logistic. A number for all finite parameters: see `logistic_mixture_forward`.

    Examples
    --------
    >>> loss, residuals = logistic_mixture_forward(np.array([[0.0, 1e4, 0.0]]), np.array([0]))     # 10001 scales away from edge_1 ≈ -1
    >>> logistic_mixture_backward(1.0, residuals).round(2).tolist()
    [[0.0, 1.0, -10001.0]]
    """
    a, b, w, inverse, pi, share_of, share, dtype = residuals
    xp = namespace(a=a)
    K = a.shape[-1]
    scale = (share * share.dtype.type(dloss))[..., None]
    side, c = xp.sign(a + b), xp.abs(a + b)
    dparams = xp.empty((*a.shape[:-1], 3 * K), a.dtype)
    with np.errstate(over="ignore"):
        dparams[..., :K] = pi - share_of
        dparams[..., K:2 * K] = share_of * (inverse * (side * _sigmoid(xp, side * a) * _sigmoid(xp, side * b) * xp.expm1(-c)))
        dparams[..., 2 * K:] = share_of * (b * _sigmoid(xp, -b) - a * _sigmoid(xp, a) - w * xp.exp(-w) / xp.expm1(-w))
        dparams *= scale
        return dparams.astype(dtype, copy=False)


def logistic_mixture_sample(params: Array, rng: Any, *, levels: int = 256, temperature: float = 1.0) -> Array:
    """Draw one level for each position by inverting distribution functions: one uniform number chooses the logistic, one the point in it.

        x = μ + T e^s log(u / (1 - u))        level = ⌊(x + 1) (V - 1) / 2 + 1/2⌋, cut off at 0 and V - 1

    Parameters
    ----------
    params : (..., 3K)
        As in `logistic_mixture_forward`.
    rng : numpy.random.Generator
        Drawn from once, `rng.random((2, *params.shape[:-1]))`. A CuPy generator serves too.
    levels : int
        V ≥ 2.
    temperature : float
        T ≥ 0: logistics are chosen with the logits divided by T, and are T times as wide. 0 takes the mean of the likeliest.

    Returns
    -------
    levels : (...) integers
        int64, 0 ≤ level < V.

    Raises
    ------
    ValueError
        `params: expected finite numbers (a logit may be -inf, not all of a position), got NaN or an infinity; …`; `temperature: expected a
        finite number ≥ 0, …`; those of `logistic_mixture_forward`.

    Notes
    -----
    In float64. With T = 1 the levels have exactly the probabilities of `logistic_mixture_forward`, none of which is computed.

    Examples
    --------
    >>> spikes = np.array([[0.0, -np.inf, -0.5, 0.5, -100.0, -100.0], [0.0, 3.0, -0.5, 0.5, -100.0, -100.0]])
    >>> logistic_mixture_sample(spikes, np.random.default_rng(0), levels=4).tolist()
    [1, 2]
    """
    xp = namespace(params=params)
    K = _components(params)
    V, T = _levels(levels), check_number("temperature", temperature, least=0)
    x = params.astype(xp.float64)
    largest = x[..., :K].max(-1, keepdims=True)
    if not (xp.isfinite(largest).all() and xp.isfinite(x[..., K:]).all()):
        raise ValueError("params: expected finite numbers (a logit may be -inf, not all of a position), got NaN or an infinity; "
                         "look at the model's parameters")
    which, u = xp.asarray(rng.random((2, *x.shape[:-1])))
    with np.errstate(over="ignore", divide="ignore"):         # logits 10³⁰⁸ apart, a scale of e¹⁰⁰⁰, u = 0: infinite, and that is right
        below = xp.cumsum(xp.exp((x[..., :K] - largest) / T), -1) if T else None
        at = x[..., :K].argmax(-1)[..., None] if below is None else (below <= which[..., None] * below[..., -1:]).sum(-1)[..., None]
        mean, log_scale = (xp.take_along_axis(x[..., i * K:(i + 1) * K], at, -1)[..., 0] for i in (1, 2))
        logit = xp.log(u) - xp.log1p(-u)
        point = mean + xp.sign(logit) * xp.exp(log_scale + xp.log(xp.abs(logit)) + math.log(T)) if T else mean
        return xp.asarray(xp.clip(xp.floor((point + 1) * ((V - 1) / 2) + 0.5), 0, V - 1).astype(xp.int64))


def _ends(xp: Any, mean: Array, log_scale: Array, t: Array, V: int) -> tuple[Array, Array, Array, Array]:
    """a, b, w and e^{-s}. Each end has a relative error of a few u, however near the mean is to the edge and however narrow the scale."""
    work = mean.dtype
    largest, smallest = float(np.finfo(work).max) / 4, float(np.finfo(work).tiny)
    edges = xp.asarray(_edges(V, work))
    inverse = xp.minimum(xp.exp(-log_scale), largest)
    lower, upper = (xp.clip(((hi[..., None] - mean) + lo[..., None]) * inverse, -largest, largest)
                    for hi, lo in ((edges[0, t], edges[1, t]), (edges[0, t + 1], edges[1, t + 1])))
    first, last = (t == 0)[..., None], (t == V - 1)[..., None]
    w = xp.where(first | last, largest, xp.maximum(inverse * (2 / (V - 1)), smallest))
    return xp.where(first, -largest, lower), xp.where(last, largest, upper), w, inverse


def _log_bin(xp: Any, a: Array, b: Array, w: Array, log_w: Array) -> Array:
    """log (σ(b) - σ(a)) = log(1 - e^{-w}) - log(1 + e^a) - log(1 + e^{-b}); log_w is log w, right also where w underflows."""
    log_width = xp.where(w < 1, log_w + xp.log(-xp.expm1(-w) / w), xp.log1p(-xp.exp(-w)))
    return xp.maximum(log_width - (_softplus(xp, a) + _softplus(xp, -b)), -float(np.finfo(w.dtype).max) / 4)


def _softplus(xp: Any, x: Array) -> Array:
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))


def _sigmoid(xp: Any, x: Array) -> Array:
    e = xp.exp(-xp.abs(x))
    return xp.where(x < 0, e, 1) / (1 + e)


@lru_cache
def _edges(V: int, work: np.dtype) -> np.ndarray:
    """(2, V + 1): edge_t as a sum of two numbers of the dtype, so that edge - μ is right where it cancels; the ends, not read, are 0."""
    edges = np.zeros((2, V + 1), work)
    for t in range(1, V):
        exact = Fraction(2 * t - V, V - 1)
        edges[0, t] = float(exact)
        edges[1, t] = float(exact - Fraction(float(edges[0, t])))
    edges.flags.writeable = False
    return edges


def _components(params: Array) -> int:
    check_dtypes(params=params)
    if params.ndim < 1 or params.shape[-1] < 3 or params.shape[-1] % 3:
        raise ValueError(f"params: expected (..., 3K) with K ≥ 1, got {tuple(params.shape)}: K logits, K means, K log-scales")
    return params.shape[-1] // 3


def _levels(levels: int) -> int:
    if check_positive("levels", levels) < 2:
        raise ValueError(f"levels: expected an integer ≥ 2, got {levels}: one level alone has nothing to say")
    return int(levels)
