"""The error budget of the recurrence as a loop over positions, for all four rules: that of decoders and of ONNX's runtimes."""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import oracle
from .budgets import _f64, _groups, _repeat, gamma

EXP_ROUNDINGS = 5    # NumPy's float32 exp is within 2.52 units in the last place


def loop_budget(q: Any, k: Any, v: Any, g: Any = None, beta: Any = None, state: Any = None, *, scale: float = 1.0,
                dtype: Any = "float32") -> tuple[np.ndarray, np.ndarray]:
    """How far out and state may be from exact when positions are taken one by one in `dtype`, each sum within a position in any order.

    Let hats be what is computed, and η what rounding adds in one operation:

        P̂ = âŜ               = aŜ + η_P              |η_P| ≤ γ_6 |aŜ|                 exp and a product
        r̂ = P̂ᵀk              = P̂ᵀk + η_r             |η_r| ≤ γ_D |P̂|ᵀ|k|              a sum of D products
        ŵ = β(v - r̂)         = β(v - r̂) + η_w        |η_w| ≤ γ_2 β (|v| + |r̂|)        a difference, a product
        Ŝ' = P̂ + kŵᵀ         = P̂ + kŵᵀ + η_S         |η_S| ≤ γ_2 (|P̂| + |k||ŵ|ᵀ)      a product, a sum

    Put together, S' being the exact next state, with δ = Ŝ - S and δ' = Ŝ' - S':

        δ' = (I - βkkᵀ) Diag(a) δ  +  (I - βkkᵀ) η_P + k(η_w - βη_r)ᵀ + η_S

    Bounded element by element, |βkkᵀ| would let it grow as 2^N. But the 2-norm of I - βkkᵀ is ρ = max(1, |1 - β·kᵀk|), which is 1 for
    |k| ≤ 1 and 0 ≤ β ≤ 2, and that of Diag(a) is max a ≤ 1: errors are not amplified. So take each column (value feature) by itself, and
    let e be at least the 2-norm of its δ. As |Ŝ| ≤ |S| + e in the bounds of the η,

        e' = ρ·max(a)·e + ρ‖η_P‖ + ‖k‖(|η_w| + β|η_r|) + ‖η_S‖          |ô - o| ≤ s·(‖q‖·e' + γ_{D+3} |q|ᵀ(|S'| + e')),

    the latter for a sum of D products, the product with s, and s = 1/√D itself, a root and a quotient. Nothing is dropped as being of
    second order. Without g, a = 1 and η_P = 0; without β, w = v and only η_S is left. (βk)(v - r)ᵀ and a·(Sᵀk) round each term as often.
    What underflows may be flushed to 0. The exact states are the oracle's, in float64; to compare two float64 loops take twice the budget.

    >>> one = np.ones((1, 1))
    >>> out, state = loop_budget(one, one, one)
    >>> bool(2.0**-23 <= state[0, 0] <= out[0, 0] <= 7 * 2.0**-24)
    True
    """
    Q, K, V = (np.abs(_f64(x)) for x in (q, k, v))
    groups, (N, D), M = _groups(Q, K), K.shape[-2:], V.shape[-1]
    a = np.ones(K.shape[:-1]) if g is None else np.exp(_f64(g))
    a = a if a.ndim == K.ndim else a[..., None]
    b = np.zeros(K.shape[:-1]) if beta is None else _f64(beta)
    rho = np.maximum(1, np.abs(1 - b * (K * K).sum(-1)))
    tiny = float(np.finfo(dtype).tiny)
    S = np.zeros((*K.shape[:-2], D, M)) if state is None else _f64(state)
    e, out = np.zeros((*K.shape[:-2], 1, M)), np.zeros((*Q.shape[:-1], M))
    for t in range(N):
        at = (..., slice(t, t + 1), slice(None))                                         # q[at], k[at] are rows, kt is a column
        kt, b_t, rho_t, a_t = K[at].mT, b[..., t, None, None], rho[..., t, None, None], a[at].mT
        P = a_t * (np.abs(S) + e)
        eta_P = 0 * P if g is None else gamma(EXP_ROUNDINGS + 1, dtype) * P + tiny * (1 + np.abs(S) + e)
        P = P + eta_P
        w, eta_r, eta_w = V[at], 0 * e, 0 * e
        if beta is not None:
            eta_r = gamma(D, dtype) * (kt.mT @ P) + D * tiny
            w = b_t * (w + kt.mT @ P + eta_r)
            eta_w = gamma(2, dtype) * w + 2 * tiny
        eta_S = gamma(2, dtype) * (P + kt * (w + eta_w)) + 2 * tiny
        e = rho_t * (a_t.max(-2, keepdims=True) * e + _norm(eta_P)) + _norm(kt) * (eta_w + b_t * eta_r) + _norm(eta_S)
        g_t, beta_t = (None if x is None else x[at] if x.ndim == K.ndim else x[..., t:t + 1] for x in (g, beta))
        S = oracle.full_recurrence(q[at], k[at], v[at], g_t, beta_t, S)[1]
        e_, S_ = _repeat(e, groups), _repeat(np.abs(S), groups)
        out[at] = abs(scale) * (_norm(Q[at].mT) * e_ + gamma(D + 3, dtype) * (Q[at] @ (S_ + e_))) + (D + 1) * tiny
    return out, np.broadcast_to(e, S.shape)


def _norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x * x).sum(-2, keepdims=True))
