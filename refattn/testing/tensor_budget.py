"""Error budget of the kernels on tensor cores, componentwise: what `cuda/tensor.cu` says of its roundings, as arithmetic.

Everything is computed twice in float64 on absolute values: as it is, and with every intermediate result grown by the error that it may have.
All of it is sums and products of numbers that are not negative, and one division, whose divisor is made smaller by its error; so the
difference of the two bounds the error of the result, in any order: |ãb̃ - ab| ≤ (|a| + δa)(|b| + δb) - |a||b|.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import oracle
from . import budgets
from .budgets import Budget, gamma, rounding

# What two parts leave of a number, of the largest number that it is lifted with, and of a number that is not lifted
PARTS = {"float16": (2.0**-22, 2.0**-39, 2.0**-25), "bfloat16": (2.0**-16, 0.0, 2.0**-134)}


def tensor_budget(q: Any, k: Any, v: Any, S: Any, z: Any, dout: Any, dS: Any, dz: Any, *, feature: int = 1, normalised: bool = True,
                  scale: float = 1.0, eps: float = 1e-6, query_lengths: Any = None, key_lengths: Any = None) -> Budget:
    """Bounds of out, S_N, z_N and of all gradients before each is rounded to its dtype, for arrays of float16 and bfloat16. `feature`: 0 identity,
    1 elu + 1.

    AssertionError where den is not larger than its own error: then there is no bound.
    """
    options = dict(feature=feature, normalised=normalised, scale=scale, eps=eps, query_lengths=query_lengths, key_lengths=key_lengths)
    arrays, kind = tuple(budgets._f64(x) for x in (q, k, v, S, z, dout, dS, dz)), q.dtype.name
    den, usual = _absolute(kind, None, *arrays, **options)
    _, grown = _absolute(kind, den, *arrays, **options)
    bounds = Budget(*(b - a for a, b in zip(usual, grown, strict=True)))
    return bounds if normalised else bounds._replace(z=None, dz=None)


def _absolute(kind: str, den: Any, q: Any, k: Any, v: Any, S: Any, z: Any, dout: Any, dS: Any, dz: Any, *, feature: int, normalised: bool,
              scale: float, eps: float, query_lengths: Any, key_lengths: Any) -> tuple[Any, tuple[Any, ...]]:
    """den, and out … dz, on absolute values; grown by their errors where `den`, as it is without them, is given."""
    groups, (N, D), M, off = budgets._groups(q, k), q.shape[-2:], v.shape[-1], float(den is not None)
    real_q, real_k = (1.0 * budgets._real(n, x) for n, x in ((query_lengths, q), (key_lengths, k)))
    ones, mask = real_k[..., :1], np.tril(np.ones((N, N)))
    rest, floor, least = (off * x for x in PARTS[kind])
    # Roundings of a sum: three for each product of a chunk or of a row of features, in three pairs of parts; one for each chunk, of each
    # head that shares a key, and, in the sums of keys, for each position; a dozen single steps
    g = off * gamma(N * groups + 9 * max(32, D, M) + 12, np.float32)
    g_phi = off * feature * gamma(budgets.PHI_ROUNDINGS, np.float32)

    def half(x: Any) -> Any:
        return x + feature * (rest * x + least)

    def product(X: Any, Y: Any) -> Any:
        return (1 + rest) * (1 + g) * (X @ Y)

    def near(X: Any, Y: Any, Z: Any, mask: Any, e: Any = None, f: Any = None) -> Any:
        P = mask * (product(X, Y.mT) + (0 if e is None else (1 + g) * e * f.mT))
        return product((1 + rest) * P + floor * P.max(-1, keepdims=True, initial=0), Z)

    def past(X: Any, start: Any, end: Any) -> Any:
        return product(X, (1 + rest) * start + floor * end.max((-1, -2), keepdims=True, initial=0))

    def to_heads(*arrays: Any) -> tuple[Any, ...]:
        return tuple(budgets._repeat(x, groups) for x in arrays)

    def over(x: Any) -> Any:
        return budgets._over_group(x, groups)

    mapped = oracle.eq7 if feature else np.abs
    slope_q, slope_k = ((1 + g_phi) * (np.where(x > 0, 1.0, np.exp(np.minimum(x, 0))) if feature else 1.0) * real for x, real in
                        ((q, real_q), (k, real_k)))
    q, k = ((1 + g_phi) * real * mapped(np.where(real > 0, x, 0)) for x, real in ((q, real_q), (k, real_k)))
    v, dout = (np.abs(np.where(real[..., :1] > 0, x, 0)) for x, real in ((v, real_k), (dout, real_q)))
    S, z, dS, dz = (np.abs(x) for x in (S, z[..., None], dS, dz[..., None]))
    Q, K = half(q) * real_q, half(k) * real_k

    K_, V_, S_, z_, ones_ = to_heads(K, v, S, z, ones)
    S_N, z_N = (1 + g) * (S + K.mT @ v), (1 + g) * (z + K.mT @ ones)
    end_, = to_heads(S_N)
    out = scale * (near(Q, K_, V_, mask) + past(Q, S_, end_))
    inverse = 1.0
    if normalised:
        mine = scale * (near(Q, K_, ones_, mask) + product(Q, z_)) + eps
        some, least_den = mine > 0, mine if den is None else 2 * den - mine
        assert (least_den > 0)[some].all(), "the bound holds only where den is larger than its error"
        inverse, den = np.divide(1 + g, least_den, out=np.zeros_like(mine), where=some), mine
        out = out * inverse

    delta = (1 + g) * (dout * (out + off * rounding(out, kind))).sum(-1, keepdims=True) * normalised
    dq = scale * inverse * slope_q * (near(dout, V_, K_, mask, delta, ones_) + past(dout, S_.mT, end_.mT) + (1 + g) * delta * z_.mT)
    c_q = scale * Q
    if normalised:
        c_q = scale * (1 + g) * inverse * q
        c_q = (1 + rest) * c_q + floor * c_q.max((-1, -2), keepdims=True, initial=0)
    R, r = (1 + g) * (dS + over(c_q.mT @ dout)), (1 + g) * (dz + over(c_q.mT @ delta))
    dk = slope_k * (over(near(V_, dout, c_q, mask.T, ones_, delta)) + past(v, dS.mT, R.mT) + (1 + g) * ones * dz.mT * normalised)
    dv = over(near(K_, c_q, dout, mask.T)) + past(K, dS, R)
    return 0.0 if den is None else den, (out, S_N, z_N[..., 0], dq, dk, dv, R, r[..., 0])
