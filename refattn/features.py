"""Feature maps φ: what makes similarity a product, sim(q, k) = φ(q)ᵀφ(k) (eq. (4) of the paper), each with its derivative.

    y = φ(x)        x (..., D)  →  y (..., F), row by row: a row of y depends on the same row of x and on nothing else
    dx = Jᵀ dy      J = ∂φ/∂x at x; no residual but x itself

| name | φ(x) | φ(q)ᵀφ(k) | F | φ ≥ 0 |
|---|---|---|---|---|
| `"elu1"` | elu(x) + 1 (eq. (7), the paper's default) | Σ φ(q_i) φ(k_i) | D | > 0 |
| `"relu"` | max(x, 0) | Σ φ(q_i) φ(k_i) | D | yes |
| `"relu2"` | max(x, 0)² | Σ φ(q_i) φ(k_i) | D | yes |
| `"identity"` | x | qᵀk | D | no |
| `"exp"` | eˣ | Σ exp(q_i + k_i) | D | > 0 |
| `"softmax"` | eˣ / Σ eˣ over the features | Σ φ(q_i) φ(k_i) ≤ 1 | D | yes |
| `"poly2"` | vec(x xᵀ) | (qᵀk)² | D² | no, but φ(q)ᵀφ(k) is |
| `"taylor2"` | (1, x, vec(x xᵀ)/√2) | 1 + qᵀk + (qᵀk)²/2 ≥ 1/2 | 1 + D + D² | no, but φ(q)ᵀφ(k) is |
| `"dpfp"`, `dpfp(nu)` | r_i r_{i+ν}, r = relu((x, -x)) | Σ φ(q_i) φ(k_i) | 2·D·nu | yes |
| `random_fourier(D, F, seed)` | (cos Wx, sin Wx)·√(2/F) | ≈ exp(-|q - k|²/2) | F | no |
| `positive_random(D, F, seed)` | exp(Wx - |x|²/2)/√F | ≈ exp(qᵀk) | F | yes |

What holds for all of them, and is not said again below:

- Arrays are float32 or float64, and the results have the same dtype; sums are kept in it. float16 and bfloat16 are refused with a TypeError:
  the attention functions hand over blocks already read into float32. (A longdouble is let through, for checking derivatives.)
- Nothing is written in place and no mask is assigned to, so CuPy, JAX and other arrays of the array API work too.
- forward raises TypeError for `x` that is no array or has another dtype, ValueError for `x` without axes; backward also ValueError for `dy`
  whose shape is not that of y, and TypeError where its dtype is not that of x.
- Derivatives at kinks: relu'(0) = 0, and so for `relu2` and `dpfp`; elu1'(0) = 1, which both sides agree on.
- At x = -∞ and +∞, φ and its derivative are the limits where there are limits (`elu1`, `relu`, `identity`). At finite x a derivative is
  never NaN. Where eˣ, x² or x_i x_j is larger than the dtype's largest number the result is inf and NumPy says so with its own overflow
  warning; it is never silently cut off.
- Time and extra memory are O(rows · F) unless said otherwise.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ._array import Array, accumulator, check_positive, dtype_name, namespace


class FeatureMap(NamedTuple):
    """A feature map: two functions. Any pair of your own will do; `refattn.testing.feature_laws` has the laws it must obey.

    Parameters
    ----------
    forward : function
        `forward(x) -> y`, x (..., D), y (..., F) of the same dtype; F depends on D only. It must treat rows independently: the attention
        functions call it on whatever block of positions they are at.
    backward : function
        `backward(dy, x) -> dx`, dy (..., F), dx (..., D) of x's dtype: the transpose of forward's Jacobian at x, applied to dy.

    Examples
    --------
    >>> import numpy as np
    >>> sigmoid = lambda x: 1 / (1 + np.exp(-x))
    >>> fm = FeatureMap(sigmoid, lambda dy, x: dy * sigmoid(x) * sigmoid(-x))
    >>> fm.backward(np.ones(1), np.zeros(1))
    array([0.25])
    """

    forward: Callable[[Array], Array]
    backward: Callable[[Array, Array], Array]


# --- elementwise maps: y_i = f(x_i), F = D, so J is diagonal and dx_i = f'(x_i) dy_i --------------------------------------------------

def elu1_forward(x: Array) -> Array:
    """φ(x) = elu(x) + 1: 1 + x above 0, eˣ below. Eq. (7) of the paper.

    Computed as max(x, 0) + exp(min(x, 0)), which is x + 1 above 0 and 0 + eˣ below. Never overflows. Far below 0 it underflows to
    0, where eˣ does.

    Parameters
    ----------
    x : (..., D)

    Returns
    -------
    y : (..., D)

    Notes
    -----
    Error: 1/2 ulp for x > 0, that of `exp` below. The zeros are an array because NumPy's maximum and minimum are three times slower with
    a scalar. This form, unlike max(1 + x, exp(-|x|)), also has the derivative 1 at x = 0 for a library that differentiates it by itself
    and splits ties evenly.

    Examples
    --------
    >>> import numpy as np
    >>> elu1_forward(np.array([-1000.0, 0.0, 2.0]))
    array([0., 1., 3.])
    """
    xp = _namespace(x)
    zero = xp.zeros(x.shape, dtype=x.dtype)
    return xp.maximum(x, zero) + xp.exp(xp.minimum(x, zero))


def elu1_backward(dy: Array, x: Array) -> Array:
    """Transpose of `elu1_forward`: dx = dy · exp(min(x, 0)), since (1 + x)' = 1 = e⁰ and (eˣ)' = eˣ.

    Parameters
    ----------
    dy, x : (..., D)

    Returns
    -------
    dx : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> elu1_backward(np.array([3.0, 3.0, 3.0]), np.array([-1000.0, 0.0, 1000.0]))
    array([0., 3., 3.])
    """
    xp = _elementwise(dy, x)
    return dy * xp.exp(xp.minimum(x, xp.zeros(x.shape, dtype=x.dtype)))


def relu_forward(x: Array) -> Array:
    """φ(x) = max(x, 0).

    Parameters
    ----------
    x : (..., D)

    Returns
    -------
    y : (..., D)

    Notes
    -----
    Exact. A query whose features are all 0 sees no key; its quotient is then 0/eps.

    Examples
    --------
    >>> import numpy as np
    >>> relu_forward(np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 3.])
    """
    return _namespace(x).maximum(x, 0)


def relu_backward(dy: Array, x: Array) -> Array:
    """Transpose of `relu_forward`: dx = dy where x > 0, else 0. At x = 0 it is 0.

    Parameters
    ----------
    dy, x : (..., D)

    Returns
    -------
    dx : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> relu_backward(np.array([5.0, 5.0, 5.0]), np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 5.])
    """
    return _elementwise(dy, x).where(x > 0, dy, 0)


def relu2_forward(x: Array) -> Array:
    """φ(x) = max(x, 0)².

    Parameters
    ----------
    x : (..., D)

    Returns
    -------
    y : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> relu2_forward(np.array([-2.0, 0.0, 3.0]))
    array([0., 0., 9.])
    """
    r = _namespace(x).maximum(x, 0)
    return r * r


def relu2_backward(dy: Array, x: Array) -> Array:
    """Transpose of `relu2_forward`: dx = 2 max(x, 0) dy.

    Parameters
    ----------
    dy, x : (..., D)

    Returns
    -------
    dx : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> relu2_backward(np.array([5.0, 5.0, 5.0]), np.array([-2.0, 0.0, 3.0]))
    array([ 0.,  0., 30.])
    """
    r = _elementwise(dy, x).maximum(x, 0)
    return 2 * (r * dy)                 # not (2r)·dy: 2r overflows where r does not


def identity_forward(x: Array) -> Array:
    """φ(x) = x: linear attention without a feature map. A copy, so that y may be written to.

    Parameters
    ----------
    x : (..., D)

    Returns
    -------
    y : (..., D)

    Notes
    -----
    φ(q)ᵀφ(k) = qᵀk has either sign, so the normaliser may be 0: for the unnormalised forms.

    Examples
    --------
    >>> import numpy as np
    >>> identity_forward(np.array([-2.0, 3.0]))
    array([-2.,  3.])
    """
    return _namespace(x).positive(x)


def identity_backward(dy: Array, x: Array) -> Array:
    """Transpose of `identity_forward`: dx = dy, a copy.

    Parameters
    ----------
    dy, x : (..., D)

    Returns
    -------
    dx : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> identity_backward(np.array([5.0, 7.0]), np.array([-2.0, 3.0]))
    array([5., 7.])
    """
    return _elementwise(dy, x).positive(dy)


def exp_forward(x: Array) -> Array:
    """φ(x) = eˣ.

    Parameters
    ----------
    x : (..., D)

    Returns
    -------
    y : (..., D)

    Notes
    -----
    inf, with NumPy's overflow warning, only where eˣ itself is larger than the largest number: x > 88.72 in float32, 709.78 in float64.
    A shift of the row by its maximum would avoid that, but would weigh each key by e^-max: see `softmax_forward` if that is what you want.

    Examples
    --------
    >>> import numpy as np
    >>> exp_forward(np.array([-1000.0, 0.0]))
    array([0., 1.])
    """
    return _namespace(x).exp(x)


def exp_backward(dy: Array, x: Array) -> Array:
    """Transpose of `exp_forward`: dx = eˣ dy.

    Computed as (dy · e^{x/2}) · e^{x/2}, with e^{x/2} kept finite: right wherever eˣ dy is representable for x ≤ 2·log(largest), also where
    eˣ itself is not, and 0 for dy = 0 at any x instead of the NaN that 0·inf makes.

    Parameters
    ----------
    dy, x : (..., D)

    Returns
    -------
    dx : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> exp_backward(np.array([0.0, 5.0, 0.0]), np.array([-1000.0, 0.0, 1000.0]))
    array([0., 5., 0.])
    """
    xp = _elementwise(dy, x)
    root = xp.exp(xp.minimum(x / 2, 0.999 * math.log(xp.finfo(x.dtype).max)))
    return dy * root * root


# --- softmax over the features -------------------------------------------------------------------------------------------------------

def softmax_forward(x: Array) -> Array:
    """φ(x)_i = e^{x_i} / Σ_j e^{x_j}, the sum over the features of one row.

    Computed after subtracting the row's maximum, which cancels here: no exponent is positive and the sum is at least 1.

    Parameters
    ----------
    x : (..., D)

    Returns
    -------
    y : (..., D)
        Rows sum to 1.

    Notes
    -----
    An entry of -∞ counts as absent. A row with +∞, or of nothing but -∞, has no limit: NaN.

    Examples
    --------
    >>> import numpy as np
    >>> softmax_forward(np.array([1000.0, 1000.0, -1000.0]))
    array([0.5, 0.5, 0. ])
    """
    return _softmax(_namespace(x), x)


def softmax_backward(dy: Array, x: Array) -> Array:
    """Transpose of `softmax_forward`: dx = y ⊙ (dy - Σ_j dy_j y_j).

    From ∂y_j/∂x_i = y_j (δ_ij - y_i): dx_i = Σ_j dy_j y_j (δ_ij - y_i) = y_i (dy_i - Σ_j dy_j y_j).

    Parameters
    ----------
    dy, x : (..., D)

    Returns
    -------
    dx : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> softmax_backward(np.array([4.0, 8.0]), np.zeros(2))
    array([-1.,  1.])
    """
    xp = _elementwise(dy, x)
    y = _softmax(xp, x)
    return y * (dy - xp.sum(dy * y, axis=-1, keepdims=True))


def _softmax(xp: ModuleType, x: Array) -> Array:
    if x.shape[-1] == 0:
        return xp.positive(x)           # the maximum of no features does not exist
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


# --- polynomials: the outer product of x with itself ---------------------------------------------------------------------------------

def poly2_forward(x: Array) -> Array:
    """φ(x) = vec(x xᵀ), y_{i·D+j} = x_i x_j, so that φ(q)ᵀφ(k) = Σ_ij q_i q_j k_i k_j = (qᵀk)².

    Parameters
    ----------
    x : (..., D)

    Returns
    -------
    y : (..., D²)

    Examples
    --------
    >>> import numpy as np
    >>> poly2_forward(np.array([2.0, 3.0]))
    array([4., 6., 6., 9.])
    """
    return _outer(_namespace(x), x)


def poly2_backward(dy: Array, x: Array) -> Array:
    """Transpose of `poly2_forward`: dx = (dY + dYᵀ) x, dY (D, D) being dy as a matrix.

    x_i stands in row i and in column i of x xᵀ: dx_i = Σ_j dY_ij x_j + Σ_j dY_ji x_j.

    Parameters
    ----------
    dy : (..., D²)
    x : (..., D)

    Returns
    -------
    dx : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> poly2_backward(np.array([1.0, 0.0, 1.0, 0.0]), np.array([2.0, 3.0]))
    array([7., 2.])
    """
    return _outer_backward(_pair(dy, x, lambda D: D * D), dy, x)


def taylor2_forward(x: Array) -> Array:
    """φ(x) = (1, x, vec(x xᵀ)/√2), so that φ(q)ᵀφ(k) = 1 + qᵀk + (qᵀk)²/2, the second-order Taylor polynomial of exp(qᵀk).

    Parameters
    ----------
    x : (..., D)

    Returns
    -------
    y : (..., 1 + D + D²)

    Notes
    -----
    The polynomial is at least 1/2, so the normaliser is positive although the features are not. exp(qᵀk/√D) asks for q and k scaled by
    D^(-1/4) first.

    Examples
    --------
    >>> import numpy as np
    >>> y = taylor2_forward(np.array([2.0, 3.0]))
    >>> y.shape, y[:3]
    ((7,), array([1., 2., 3.]))
    """
    xp = _namespace(x)
    return xp.concat((xp.ones((*x.shape[:-1], 1), dtype=x.dtype), x, _outer(xp, x) * _SQRT_HALF), axis=-1)


def taylor2_backward(dy: Array, x: Array) -> Array:
    """Transpose of `taylor2_forward`: dx = dy_x + (dY + dYᵀ) x/√2, where dy = (dy_1, dy_x, vec(dY)); the constant feature has none.

    Parameters
    ----------
    dy : (..., 1 + D + D²)
    x : (..., D)

    Returns
    -------
    dx : (..., D)

    Examples
    --------
    >>> import numpy as np
    >>> taylor2_backward(np.array([9.0, 5.0, 0.0]), np.array([2.0]))
    array([5.])
    """
    xp, D = _pair(dy, x, lambda D: 1 + D + D * D), x.shape[-1]
    return dy[..., 1:1 + D] + _outer_backward(xp, dy[..., 1 + D:], x) * _SQRT_HALF


_SQRT_HALF = math.sqrt(0.5)


def _outer(xp: ModuleType, x: Array) -> Array:
    D = x.shape[-1]
    return xp.reshape(x[..., :, None] * x[..., None, :], (*x.shape[:-1], D * D))


def _outer_backward(xp: ModuleType, dy: Array, x: Array) -> Array:
    D = x.shape[-1]
    dY = xp.reshape(dy, (*x.shape[:-1], D, D))
    return xp.matmul(dY, x[..., :, None])[..., :, 0] + xp.matmul(x[..., None, :], dY)[..., 0, :]


# --- deterministic parameter-free projection -----------------------------------------------------------------------------------------

def dpfp(nu: int = 1) -> FeatureMap:
    """The deterministic parameter-free projection of "Linear Transformers Are Secretly Fast Weight Programmers" (Schlag et al. 2021).

        r = max((x, -x), 0) ∈ R^{2D}          y_{(ν-1)·2D + i} = r_i r_{i+ν mod 2D},   ν = 1 … nu

    Parameters
    ----------
    nu : int
        How many shifts, 1 ≤ nu ≤ 2D - 1. `dpfp(1)` is the map named `"dpfp"`.

    Returns
    -------
    FeatureMap
        x (..., D) → y (..., 2·D·nu), y ≥ 0. Backward, from y_i = r_i r_{i+ν}, where r_i stands in two products:

            dr_i = Σ_ν (dy^ν_i r_{i+ν} + dy^ν_{i-ν} r_{i-ν})
            dx_i = dr_i where x_i > 0, -dr_{D+i} where x_i < 0, 0 at x_i = 0

    Raises
    ------
    TypeError, ValueError
        `nu: expected an integer ≥ 1, got 0`; when called, `x: expected D ≥ 2 features for nu = 3 (nu ≤ 2D - 1), got D = 1`.

    Notes
    -----
    Of r_i and r_{D+i} one is 0, so y has zeros wherever ν joins them: for D = 1 nothing else is left.

    Examples
    --------
    >>> import numpy as np
    >>> dpfp(1).forward(np.array([2.0, 3.0, -5.0]))
    array([ 6.,  0.,  0.,  0.,  0., 10.])
    """
    nu = check_positive("nu", nu)

    def size(D: int) -> int:
        if D and nu >= 2 * D:
            raise ValueError(f"x: expected D ≥ {nu // 2 + 1} features for nu = {nu} (nu ≤ 2D - 1), got D = {D}")
        return 2 * D * nu

    def forward(x: Array) -> Array:
        xp = _namespace(x)
        size(x.shape[-1])
        r = xp.maximum(xp.concat((x, -x), axis=-1), 0)
        return xp.concat([r * xp.roll(r, -shift, axis=-1) for shift in range(1, nu + 1)], axis=-1)

    def backward(dy: Array, x: Array) -> Array:
        xp = _pair(dy, x, size)
        D = x.shape[-1]
        r = xp.maximum(xp.concat((x, -x), axis=-1), 0)
        dr = xp.zeros_like(r)
        for shift in range(1, nu + 1):
            d = dy[..., 2 * D * (shift - 1):2 * D * shift]
            dr = dr + d * xp.roll(r, -shift, axis=-1) + xp.roll(d * r, shift, axis=-1)
        return xp.where(x > 0, dr[..., :D], 0) - xp.where(x < 0, dr[..., D:], 0)

    return FeatureMap(forward, backward)


# --- random features -----------------------------------------------------------------------------------------------------------------

def random_fourier(D: int, features: int, seed: Any, dtype: Any = "float32") -> FeatureMap:
    """Random Fourier features of the Gaussian kernel (Rahimi and Recht 2007).

        φ(x) = √(2/F) (cos Wx, sin Wx),   W (F/2, D) ~ N(0, 1)          E φ(q)ᵀφ(k) = E cos(wᵀ(q - k)) = exp(-|q - k|²/2)

    exp(qᵀk) = exp(|q|²/2) exp(-|q - k|²/2) exp(|k|²/2): for the exponential similarity multiply the mapped keys by exp(|k|²/2) yourself, or use
    `positive_random`.

    Parameters
    ----------
    D : int
        Features of x.
    features : int
        F, even.
    seed : int or numpy.random.Generator
        The same seed gives the same W, whatever the dtype.
    dtype : dtype
        W is rounded to it once. Arrays of x may have that dtype or a wider one, where W is the same numbers: never a narrower one.

    Returns
    -------
    FeatureMap
        x (..., D) → y (..., F). Backward, with dy = (dc, ds), y = (c, s):  dx = Wᵀ(ds ⊙ c - dc ⊙ s), since (cos)' = -sin, (sin)' = cos.

    Raises
    ------
    ValueError
        `features: expected an even number, one cosine and one sine for each frequency, got 3`; when called, for x without D features.
    TypeError
        `dtype: expected float32 or float64, got float16`; when called, for x narrower than dtype.

    Notes
    -----
    O(rows · D · F) time. Each φ(q)ᵀφ(k) has the variance (1 - exp(-|q - k|²))²/F about the kernel. It may be negative, and so may the
    normaliser: for small similarities prefer `positive_random`. Wx is taken in x's dtype: its rounding, about |Wx|·u, is a phase error, so
    that far out (|x| beyond 1/u) the features are finite but arbitrary.

    Examples
    --------
    >>> import numpy as np
    >>> fm = random_fourier(4, 64, seed=0, dtype="float64")
    >>> y = fm.forward(np.ones((2, 4)))
    >>> y.shape, float(y[0] @ y[1])
    ((2, 64), 1.0)
    """
    D, features = check_positive("D", D), check_positive("features", features)
    if features % 2:
        raise ValueError(f"features: expected an even number, one cosine and one sine for each frequency, got {features}")
    weights = _Weights(np.random.default_rng(seed).standard_normal((features // 2, D)), dtype)
    norm = math.sqrt(2 / features)

    def forward(x: Array) -> Array:
        xp = _namespace(x)
        phase = xp.matmul(x, weights.like(x, xp).T)
        return xp.concat((xp.cos(phase), xp.sin(phase)), axis=-1) * norm

    def backward(dy: Array, x: Array) -> Array:
        xp = _pair(dy, x, lambda D: features)
        W = weights.like(x, xp)
        phase = xp.matmul(x, W.T)
        dc, ds = dy[..., :features // 2], dy[..., features // 2:]
        return xp.matmul((ds * xp.cos(phase) - dc * xp.sin(phase)) * norm, W)

    return FeatureMap(forward, backward)


def positive_random(D: int, features: int, seed: Any, orthogonal: bool = True, dtype: Any = "float32") -> FeatureMap:
    """Positive random features of the exponential kernel: FAVOR+ of "Rethinking Attention with Performers" (Choromanski et al. 2021).

        φ(x) = exp(Wx - |x|²/2)/√F,   W (F, D), each row w ~ N(0, I)          E φ(q)ᵀφ(k) = E exp(wᵀ(q + k) - (|q|² + |k|²)/2) = exp(qᵀk)

    since E exp(wᵀz) = exp(|z|²/2) and |q + k|² - |q|² - |k|² = 2 qᵀk.

    Parameters
    ----------
    D : int
        Features of x.
    features : int
        F, the number of random vectors.
    seed : int or numpy.random.Generator
        The same seed gives the same W, whatever the dtype.
    orthogonal : bool
        Draw the rows of W in blocks of D that are orthogonal to each other, with norms drawn independently from the chi distribution of D
        degrees of freedom: each row alone is still N(0, I), so nothing is biased, and the variance is smaller.
    dtype : dtype
        W is rounded to it once. Arrays of x may have that dtype or a wider one, where W is the same numbers: never a narrower one.

    Returns
    -------
    FeatureMap
        x (..., D) → y (..., F), y ≥ 0. Backward, from ∂y_f/∂x_i = y_f (W_fi - x_i):  dx = Wᵀ(dy ⊙ y) - x Σ_f dy_f y_f.

    Raises
    ------
    ValueError
        When called, `x: expected (..., D) = (*, 4), got (2, 3)`.
    TypeError
        `dtype: expected float32 or float64, got float16`; when called, for x narrower than dtype.

    Notes
    -----
    Stabilisation. The exponent is |w|²/2 - |x - w|²/2 ≤ |w|²/2: it is bounded by W alone, whatever x. Since |w|² is about D, nothing can
    overflow in float32 up to D of about 100, and beyond that only for x close to one of the w. So no shift is subtracted, and φ(q)ᵀφ(k)
    estimates exp(qᵀk) itself. The shift by the row's maximum that is often used is harmless on queries, where it cancels in the quotient of
    eq. (5) (with eps = 0), and wrong on keys, where it weighs each key by another factor; a maximum over all keys would be right, but it
    changes from chunk to chunk and lets the future reach the past. Elements of x so large that φ underflows to 0 anyway are clipped, so that
    |x|² does not overflow on the way; no result changes by it.

    exp(qᵀk/√D) asks for q and k scaled by D^(-1/4) first. The relative variance grows as exp(|q + k|²)/F.
    O(rows · D · F) time; the draw of W O(F · D²).

    Examples
    --------
    >>> import numpy as np
    >>> fm = positive_random(4, 4096, seed=0)
    >>> q, k = np.array([0.5, 0.0, 0.1, -0.2]), np.array([0.3, -0.1, 0.0, 0.4])
    >>> bool(abs(fm.forward(q) @ fm.forward(k) / np.exp(q @ k) - 1) < 0.1)
    True
    """
    D, features = check_positive("D", D), check_positive("features", features)
    rng = np.random.default_rng(seed)
    weights = _Weights(_orthogonal_rows(features, D, rng) if orthogonal else rng.standard_normal((features, D)), dtype)
    norm = 1 / math.sqrt(features)
    # One element of x at B = 2 max|w| + 160 brings the exponent |w||x| - |x|²/2 below -80·|x| ≤ -12800: e^-12800 is 0 in every dtype.
    B = 2 * float(np.sqrt((weights.widest**2).sum(-1).max())) + 160

    def exponential(xp: ModuleType, x: Array, W: Array) -> Array:
        return xp.exp(xp.matmul(x, W.T) - xp.sum(x * x, axis=-1, keepdims=True) / 2) * norm

    def forward(x: Array) -> Array:
        xp = _namespace(x)
        W = weights.like(x, xp)
        return exponential(xp, xp.clip(x, -B, B), W)

    def backward(dy: Array, x: Array) -> Array:
        xp = _pair(dy, x, lambda D: features)
        W = weights.like(x, xp)
        x = xp.clip(x, -B, B)
        d = dy * exponential(xp, x, W)
        return xp.matmul(d, W) - x * xp.sum(d, axis=-1, keepdims=True)

    return FeatureMap(forward, backward)


def _orthogonal_rows(rows: int, D: int, rng: np.random.Generator) -> np.ndarray:
    blocks = []
    for _ in range(-(-rows // D)):
        Q, R = np.linalg.qr(rng.standard_normal((D, D)))
        directions = (Q * np.sign(np.diag(R))).T            # the sign makes Q uniform among the rotations (Haar): QR alone is not
        blocks.append(directions * np.linalg.norm(rng.standard_normal((D, D)), axis=-1, keepdims=True))
    return np.concatenate(blocks)[:rows]


class _Weights:
    """W (F, D) in the dtypes that hold it exactly, ready for NumPy; other libraries get it converted at each call."""

    def __init__(self, W: np.ndarray, dtype: Any) -> None:
        name = np.dtype(dtype).name
        if name not in ("float32", "float64"):
            raise TypeError(f"dtype: expected float32 or float64, got {name}")
        self.name, self.D = name, W.shape[-1]
        W = W.astype(name)
        self.widest = W.astype(np.float64)
        self.by_char = {"d": self.widest, "g": W.astype(np.longdouble)}
        if name == "float32":
            self.by_char["f"] = W

    def like(self, x: Array, xp: ModuleType) -> Array:
        if x.shape[-1] != self.D:
            raise ValueError(f"x: expected (..., D) = (*, {self.D}), got {tuple(x.shape)}")
        char = x.dtype.char if xp is np else "f" if x.dtype == xp.float32 else "d"
        if char not in self.by_char:
            raise TypeError("x is float32 and the feature map float64; draw the map with dtype='float32' or cast x, nothing is cast silently")
        W = self.by_char[char]
        return W if xp is np else xp.asarray(W)


# --- by name -------------------------------------------------------------------------------------------------------------------------

FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu1": FeatureMap(elu1_forward, elu1_backward),
    "relu": FeatureMap(relu_forward, relu_backward),
    "relu2": FeatureMap(relu2_forward, relu2_backward),
    "identity": FeatureMap(identity_forward, identity_backward),
    "exp": FeatureMap(exp_forward, exp_backward),
    "softmax": FeatureMap(softmax_forward, softmax_backward),
    "poly2": FeatureMap(poly2_forward, poly2_backward),
    "taylor2": FeatureMap(taylor2_forward, taylor2_backward),
    "dpfp": dpfp(1),
}


def feature_map(spec: Any) -> FeatureMap:
    """The feature map that `spec` stands for: a name from the table of this module, or a pair of functions.

    Parameters
    ----------
    spec : str, FeatureMap or tuple of two functions
        `(forward(x) -> y, backward(dy, x) -> dx)`; see `FeatureMap`.

    Returns
    -------
    FeatureMap

    Raises
    ------
    ValueError
        `feature_map: expected one of 'elu1', 'relu', …, got 'elu'`.
    TypeError
        `feature_map: expected a name or a pair of functions (forward(x) -> y, backward(dy, x) -> dx), got int`.

    Examples
    --------
    >>> feature_map("elu1").forward is elu1_forward
    True
    """
    if isinstance(spec, FeatureMap):
        return spec
    if isinstance(spec, str):
        if spec not in FEATURE_MAPS:
            raise ValueError(f"feature_map: expected one of {', '.join(map(repr, FEATURE_MAPS))}, got {spec!r}; "
                             "or pass a pair of functions (forward, backward)")
        return FEATURE_MAPS[spec]
    pair = "a pair of functions (forward(x) -> y, backward(dy, x) -> dx)"
    if not isinstance(spec, tuple):
        hint = "; linear attention needs the derivative too" if callable(spec) else ""
        raise TypeError(f"feature_map: expected a name or {pair}, got {type(spec).__name__}{hint}")
    if len(spec) != 2 or not all(map(callable, spec)):
        raise TypeError(f"feature_map: expected {pair}, got a tuple of ({', '.join(type(part).__name__ for part in spec)})")
    return FeatureMap(*spec)


def feature_size(fm: FeatureMap, D: int, dtype: Any = np.float32) -> int:
    """F, the number of features that `fm` makes of D: what `fm.forward` returns for an empty (0, D) array.

    Parameters
    ----------
    fm : FeatureMap
    D : int
    dtype : dtype
        Of the inputs. For float16 and bfloat16 forward is asked in float32, as the attention functions do.

    Returns
    -------
    F : int

    Raises
    ------
    TypeError, ValueError
        Where a pair of your own returns no array, another dtype or other leading axes, with what it returned:
        `feature_map: forward returned the shape (3,) for x (0, 3), expected (0, F): it must keep all axes but the last`.

    Examples
    --------
    >>> feature_size(feature_map("taylor2"), 3)
    13
    """
    x = np.empty((0, D), accumulator(np.dtype(dtype)))
    y = fm.forward(x)
    if not hasattr(y, "shape") or not hasattr(y, "dtype"):
        raise TypeError(f"feature_map: forward returned {type(y).__name__} for x (0, {D}), expected an array (0, F)")
    if len(y.shape) != 2 or y.shape[0] != 0:
        raise ValueError(f"feature_map: forward returned the shape {tuple(y.shape)} for x (0, {D}), expected (0, F): "
                         "it must keep all axes but the last")
    if dtype_name(y) != dtype_name(x):
        raise TypeError(f"feature_map: forward returned {dtype_name(y)} for {dtype_name(x)}; it must keep the dtype of x")
    return int(y.shape[1])


# --- checks: these run on every block, so plain NumPy arrays take the short way ------------------------------------------------------

def _namespace(x: Array) -> ModuleType:
    if type(x) is np.ndarray and x.dtype.char in "fdg" and x.ndim:
        return np
    xp = namespace(x=x)
    if x.dtype not in (xp.float32, xp.float64) and not (xp is np and x.dtype.char in "fdg"):
        raise TypeError(f"x: expected float32 or float64, got {dtype_name(x)}; cast it yourself, for example x.astype('float32')")
    if not x.ndim:
        raise ValueError("x: expected (..., D) with at least 1 axis, got ()")
    return xp


def _pair(dy: Array, x: Array, size: Callable[[int], int]) -> ModuleType:
    """The namespace of dy (..., F = size(D)) and x (..., D), checked."""
    xp = _namespace(x)
    if type(dy) is not np.ndarray or xp is not np:
        if dy is None:
            raise TypeError("dy: expected an array of the shape of the mapped features, got None")
        namespace(dy=dy, x=x)
    shape = (*x.shape[:-1], size(x.shape[-1]))
    if dy.shape != shape:
        raise ValueError(f"dy: expected the shape of the mapped features {shape}, got {tuple(dy.shape)}")
    if dy.dtype != x.dtype and dtype_name(dy) != dtype_name(x):
        raise TypeError(f"dy is {dtype_name(dy)} and x is {dtype_name(x)}; cast the cotangent, nothing is cast silently")
    return xp


def _elementwise(dy: Array, x: Array) -> ModuleType:
    return _pair(dy, x, lambda D: D)
