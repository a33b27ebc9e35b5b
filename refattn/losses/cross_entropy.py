"""Cross entropy: how many nats a model needs for each symbol, on average.

    nll_i = log Σ_c exp(x_ic) - x_{i,t_i}
          = log Σ_c exp(x_ic - m_i) - (x_{i,t_i} - m_i)        m_i = max_c x_ic: no exponential overflows and their sum is at least 1
    loss  = Σ_i w_i nll_i / Σ_i w_i

Axes   ... positions, any number of axes · V classes
"""
from __future__ import annotations

import math
from typing import Any

from .._array import Array, accumulator, check_dtypes, dtype_name, namespace
from ..layers import check_indices

Residuals = tuple[Any, ...]


def cross_entropy_forward(logits: Array, targets: Array, *, weights: Array | None = None) -> tuple[Any, Residuals]:
    """Mean cross entropy in nats of integer targets.

        loss = Σ_i w_i (log Σ_c exp(x_ic) - x_{i,t_i}) / Σ_i w_i

    Parameters
    ----------
    logits : (..., V)
        Unnormalised log-probabilities. A class may have -inf: it has probability 0.
    targets : (...) integers
        0 ≤ target < V wherever the weight is not 0.
    weights : (...), optional
        A mask (bool), or weights ≥ 0 as integers or in the logits' dtype. Constants: they have no gradient. What logits and targets
        hold where the weight is 0 (NaN, -1) reaches nothing.

    Returns
    -------
    loss : scalar of the logits' dtype
        Nats per unit of weight; 0 where there is no weight at all.
    residuals : tuple
        For `cross_entropy_backward`: the probabilities.

    Raises
    ------
    TypeError
        `targets: expected integers, got float64`; weights of another float dtype than the logits.
    ValueError
        `targets: expected 0 ≤ target < V = 10, got values from -1 to 9`; shapes; negative weights.

    Notes
    -----
    One exponential for each logit. Sums are kept in the logits' dtype (float32 for float16 and bfloat16), that over positions in float64.

    Examples
    --------
    >>> import numpy as np
    >>> loss, residuals = cross_entropy_forward(np.zeros((3, 2)), np.array([0, 1, 1]))
    >>> float(bits(loss))
    1.0
    """
    xp = namespace(logits=logits, targets=targets, weights=weights)
    check_dtypes(logits=logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected (..., V) with V ≥ 1, got {tuple(logits.shape)}")
    if tuple(targets.shape) != tuple(logits.shape[:-1]):
        raise ValueError(f"targets: expected the leading axes of logits {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}: "
                         "one class for each position")
    work = accumulator(logits.dtype)
    z = logits.astype(work)                         # a copy: all that follows happens in it
    share, kept = shares(xp, weights, tuple(targets.shape), logits=logits)
    if kept is not None:
        z = xp.where(kept[..., None], z, xp.zeros((), work))
    check_indices("targets", targets, logits.shape[-1], "target", "V", kept)
    at = (targets if kept is None else xp.where(kept, targets, 0))[..., None]
    z -= z.max(-1, keepdims=True)
    chosen = xp.take_along_axis(z, at, -1)[..., 0]
    xp.exp(z, out=z)
    total = z.sum(-1, keepdims=True)
    nll = xp.log(total[..., 0]) - chosen
    z /= total
    loss = (nll * share).sum(dtype=xp.float64)
    return loss.astype(logits.dtype), (z, at, share, logits.dtype)


def cross_entropy_backward(dloss: Any, residuals: Residuals) -> Array:
    """Transpose of `cross_entropy_forward`, loss = Σ_i s_i (log Σ_c exp(x_ic) - x_{i,t_i}), s_i = w_i / Σ w.

        dx_ic = dloss · s_i (p_ic - [c = t_i])        p_ic = exp(x_ic) / Σ_c' exp(x_ic')

    Parameters
    ----------
    dloss : scalar
        Cotangent of the loss; 1.0 for the gradient of the loss itself.

    Returns
    -------
    dlogits : (..., V)
        In the logits' dtype. Exactly zero where the weight is 0.

    Examples
    --------
    >>> import numpy as np
    >>> loss, residuals = cross_entropy_forward(np.zeros((1, 2)), np.array([0]))
    >>> cross_entropy_backward(1.0, residuals).tolist()
    [[-0.5, 0.5]]
    """
    p, at, share, dtype = residuals
    xp = namespace(p=p)
    scale = (share * share.dtype.type(dloss))[..., None]
    dlogits = p * scale
    chosen = xp.take_along_axis(p, at, -1)
    xp.put_along_axis(dlogits, at, scale * (chosen - 1), -1)
    return dlogits.astype(dtype, copy=False)


def bits(nats: Any) -> Any:
    """Nats in bits: nats / ln 2. Of a mean over a picture's values it makes the bits per dimension of the paper's tables.

    Examples
    --------
    >>> bits(math.log(8))
    3.0
    """
    return nats / math.log(2)


def shares(xp: Any, weights: Array | None, shape: tuple[int, ...], **predictions: Array) -> tuple[Array, Array | None]:
    """w_i / Σ w in the accumulator's dtype, and where it is not 0: equal shares and None without weights. For all losses; `predictions` is the
    one array whose dtype the weights share, by its name."""
    (name, x), = predictions.items()
    work = accumulator(x.dtype)
    if weights is None:
        return xp.full(shape, 1 / max(math.prod(shape), 1), work), None
    if tuple(weights.shape) != shape:
        raise ValueError(f"weights: expected the shape of targets {shape}, got {tuple(weights.shape)}")
    if weights.dtype.kind not in "biu" and weights.dtype != x.dtype:
        raise TypeError(f"weights is {dtype_name(weights)} and {name} is {dtype_name(x)}; cast one of them, nothing is cast silently")
    wide = weights.astype(xp.float64)
    if wide.size and not (wide.min() >= 0 and xp.isfinite(wide.max())):
        raise ValueError(f"weights: expected finite numbers ≥ 0, got values from {wide.min()} to {wide.max()}")
    total = wide.sum()
    return (wide / (total if total > 0 else 1)).astype(work), wide > 0
