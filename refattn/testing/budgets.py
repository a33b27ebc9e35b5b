"""Error budgets: how far a right implementation may be from the exact answer, derived and never guessed.

A sum of products of n terms, in any order, differs from the exact one by at most γ_n · (the same sum of absolute values), where
γ_n = n·u / (1 - n·u) and u is the unit roundoff (Higham, Accuracy and Stability of Numerical Algorithms, §3.1). So the budget of a form
is γ_n times the same computation on absolute values, from the oracle in float64; n counts the roundings on the longest path.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._array import accumulator

_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53,
             np.dtype(np.longdouble).name: float(np.finfo(np.longdouble).eps) / 2}
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}


def unit_roundoff(dtype: Any) -> float:
    """u: half the gap between 1 and the next number. 2⁻¹¹ float16, 2⁻⁸ bfloat16, 2⁻²⁴ float32, 2⁻⁵³ float64.

    >>> unit_roundoff("float32") == 2.0**-24
    True
    """
    return _ROUNDOFF[np.dtype(dtype).name if not isinstance(dtype, str) else dtype]


def gamma(n: float, dtype: Any) -> float:
    """γ_n = n·u / (1 - n·u), the relative error of n roundings in a row.

    >>> gamma(1000, "float32") < 1000.1 * 2.0**-24
    True
    """
    nu = n * unit_roundoff(dtype)
    if nu >= 1:
        raise ValueError(f"n: expected n·u < 1, got n = {n} in {np.dtype(dtype).name}: no bound exists for that many roundings")
    return nu / (1 - nu)


def rounding(x: Any, dtype: Any) -> np.ndarray:
    """The rounding of x on its way to `dtype`: u·|x|, and half the smallest subnormal number for results that underflow."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    return unit_roundoff(name) * np.abs(x) + _SMALLEST[name] / 2


def worst_ratio(actual: Any, expected: Any, bound: Any) -> float:
    """max |actual - expected| / bound over all elements; 0 / 0 counts as 0, NaN as infinity. At most 1 when the bound holds.

    >>> worst_ratio(np.array([1.0, 2.0]), np.array([1.0, 2.5]), np.array([0.0, 1.0]))
    0.5
    """
    actual, expected = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    if actual.shape != expected.shape:
        raise ValueError(f"actual: expected the shape {expected.shape}, got {actual.shape}")
    bound = np.broadcast_to(bound, actual.shape)
    with np.errstate(all="ignore"):
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
        ratio = np.where(error == 0, 0.0, np.where(np.isfinite(error), error / bound, np.inf))
    return float(ratio.max(initial=0.0))


def assert_within(actual: Any, expected: Any, bound: Any, what: str = "out") -> None:
    """Raise AssertionError, with the worst element, its index and its error/bound ratio, unless |actual - expected| ≤ bound everywhere."""
    ratio = worst_ratio(actual, expected, bound)
    if ratio <= 1:
        return
    wide, bound = np.asarray(actual).astype(np.float64), np.broadcast_to(bound, np.shape(actual))
    with np.errstate(all="ignore"):
        error = np.abs(wide - expected)
        error = np.where(np.isnan(error), np.inf, np.where(wide == expected, 0.0, error))
        at = tuple(int(i) for i in np.unravel_index(np.argmax(np.where(error == 0, 0.0, error / np.maximum(bound, 1e-300))), error.shape))
    raise AssertionError(f"{what}{list(at)}: got {float(wide[at])!r}, expected {float(np.asarray(expected)[at])!r}; "
                         f"error {error[at]:.3e} is {ratio:.3g} times the bound {bound[at]:.3e}")


class Budget(NamedTuple):
    """Bounds of the outputs and of the gradients, each of its array's shape, in float64; z and dz are None where there is no normaliser."""

    out: np.ndarray
    S: np.ndarray
    z: np.ndarray | None
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dS: np.ndarray
    dz: np.ndarray | None


def recurrence_budget(q: Any, k: Any, v: Any, state: Any, dout: Any, dstate: Any, *, scale: float = 1.0, dtype: Any = None) -> Budget:
    """Rule `linear`: o = scale·(tril(Q Kᵀ) V + Q S_0) and its gradients, in `dtype` (q's if None) with its accumulator.

    A term of an output is a product of at most four factors and passes at most N + D + M additions whatever the order: n = N + D + M + 4,
    twice that for dk, dv and dS_0, whose terms also carry a group's sum.
    """
    dtype, acc = _dtypes(q, dtype)
    Q, K, V, S, G, R = (np.abs(_f64(x)) for x in (q, k, v, state, dout, dstate))
    groups, (N, D), M = _groups(Q, K), Q.shape[-2:], V.shape[-1]
    n = 2 * (N * groups + D + M + 4)
    K_, V_, S_, R_ = (_repeat(x, groups) for x in (K, V, S, R))
    mask, s = np.tril(np.ones((N, N))), abs(scale)
    A, dA = mask * (Q @ K_.mT), mask * (s * G @ V_.mT)
    W = _over_group(Q.mT @ (s * G), groups) + R
    exact = (s * (A @ V_ + Q @ S_), S + K.mT @ V, dA @ K_ + s * G @ S_.mT, _over_group(dA.mT @ Q, groups) + V @ R.mT,
             _over_group(A.mT @ (s * G), groups) + K @ R, W)
    out, end, dq, dk, dv, dS = (gamma(n, acc) * x for x in exact)
    dq, dk, dv = (b + rounding(x, dtype) for b, x in zip((dq, dk, dv), exact[2:5], strict=True))
    return Budget(out + rounding(exact[0], dtype), end + rounding(0, acc), None, dq, dk, dv, dS + rounding(0, acc), None)


PHI_ROUNDINGS = 8    # elu+1, float32: NumPy's exp is within 2.52 units in the last place (5 u), and one addition; its derivative likewise


def attention_budget(q: Any, k: Any, v: Any, S: Any, z: Any, dout: Any, dS: Any, dz: Any, *, phi: Any, dphi: Any, causal: bool = True,
                     eps: float = 1e-6, query_lengths: Any = None, key_lengths: Any = None, dtype: Any = None) -> Budget:
    """Normalised linear attention with a positive φ: `phi(x)` and `dphi(x)`, its elementwise derivative, in float64.

    num and den are sums of positive or absolute terms with n = N + F + M + … roundings; den's relative error is γ_n, so out's error is
    γ_n·(num_abs / den + |out|) ≤ 2·γ_n·num_abs / den. G carries those of den and of out (3n), and each gradient one more sum (n).
    """
    dtype, acc = _dtypes(q, dtype)
    q, k, v, S, z, dout, dS, dz = (_f64(x) for x in (q, k, v, S, z, dout, dS, dz))
    groups, N, L, M = _groups(q, k), q.shape[-2], k.shape[-2], v.shape[-1]
    real_q, real_k = _real(query_lengths, q), _real(key_lengths, k)
    q, dout, k, v = (np.where(real, x, 0) for real, x in ((real_q, q), (real_q, dout), (real_k, k), (real_k, v)))
    Q, K, V, ones = real_q * phi(q), real_k * phi(k), np.abs(v), real_k * np.ones((*k.shape[:-1], 1))
    S, z, G, R, r = (np.abs(x) for x in (S, z, dout, dS, dz))
    n = max(N, L) * groups + Q.shape[-1] + M + 2 * PHI_ROUNDINGS + 8
    K_, V_, ones_, S_, z_, R_, r_ = (_repeat(x, groups) for x in (K, V, ones, S, z[..., None], R, r[..., None]))
    mask = np.tril(np.ones((N, L))) if causal else np.ones((N, L))
    A = mask * (Q @ K_.mT)
    den = A @ ones_ + Q @ z_ + eps
    inverse = np.divide(1, den, out=np.zeros_like(den), where=den != 0)
    out = (A @ V_ + Q @ S_) * inverse
    Gn, Gd = G * inverse, (G * out).sum(-1, keepdims=True) * inverse
    dA = mask * (Gn @ V_.mT + Gd @ ones_.mT)
    dq = (dA @ K_ + Gn @ S_.mT + Gd @ z_.mT) * np.abs(dphi(q)) * real_q
    dk = (_over_group(dA.mT @ Q, groups) + V @ R.mT + ones @ r[..., None].mT) * np.abs(dphi(k)) * real_k
    dv = (_over_group(A.mT @ Gn, groups) + K @ R) * real_k
    dS0, dz0 = _over_group(Q.mT @ Gn, groups) + R, _over_group(Q.mT @ Gd, groups)[..., 0] + r
    forward, backward = gamma(2 * n, acc), gamma(4 * n, acc)
    half = 0.0 if np.dtype(acc) == dtype else 2 * unit_roundoff(dtype.name)     # the backward reads out as it was returned: rounded to half
    halved = _rounded_out(half, G, out, inverse, mask, Q, K_, ones_, z_, real_q, real_k, dphi, q, k, groups)
    return Budget(forward * out + rounding(out, dtype), forward * (S + K.mT @ V) + rounding(0, acc),
                  forward * (z + K.sum(-2)) + rounding(0, acc), backward * dq + halved[0] + rounding(dq, dtype),
                  backward * dk + halved[1] + rounding(dk, dtype),
                  backward * dv + rounding(dv, dtype), backward * dS0 + rounding(0, acc), backward * dz0 + halved[2] + rounding(0, acc))


def _rounded_out(u: float, G: Any, out: Any, inverse: Any, mask: Any, Q: Any, K_: Any, ones_: Any, z_: Any, real_q: Any,
                          real_k: Any, dphi: Any, q: Any, k: Any, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an error of u·|out| in the out that the backward reads adds to dq, dk and dz: it enters through -(do·out)/den alone."""
    d = u * (G * out).sum(-1, keepdims=True) * inverse
    dA = mask * (d @ ones_.mT)
    return ((dA @ K_ + d @ z_.mT) * np.abs(dphi(q)) * real_q, _over_group(dA.mT @ Q, groups) * np.abs(dphi(k)) * real_k,
            _over_group(Q.mT @ d, groups)[..., 0])


def _dtypes(q: Any, dtype: Any) -> tuple[np.dtype, np.dtype]:
    dtype = np.dtype(q.dtype if dtype is None else dtype)
    return dtype, accumulator(dtype)


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _groups(q: np.ndarray, k: np.ndarray) -> int:
    return q.shape[-3] // k.shape[-3] if q.ndim > 2 and k.shape[-3] else 1


def _repeat(x: np.ndarray, groups: int) -> np.ndarray:
    return x if groups == 1 else np.repeat(x, groups, axis=-3)


def _over_group(x: np.ndarray, groups: int) -> np.ndarray:
    return x if groups == 1 else x.reshape(*x.shape[:-3], x.shape[-3] // groups, groups, *x.shape[-2:]).sum(-3)


def _real(lengths: Any, x: np.ndarray) -> np.ndarray:
    if lengths is None:
        return np.ones((*x.shape[:-1], 1), bool)
    lengths = np.asarray(lengths)
    return (np.arange(x.shape[-2]) < lengths.reshape(lengths.shape + (1,) * (x.ndim - 1 - lengths.ndim)))[..., None] & np.ones(
        (*x.shape[:-1], 1), bool)
