"""Definitions: each equation of the paper as it is printed, slow and obviously right.

Nothing here shares code with what it judges. float16, bfloat16, float32 and float64 arrays are computed in float64; complex (for the
complex step), longdouble and object arrays (`fractions.Fraction`: exact on rationals) stay what they are. Heads, groups and lengths are
handled here, once, by looping over heads; the equations below are then those of one head: `q (N, D)`, `k (L, D)`, `v (L, M)`.

Equation numbers are those of "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (2020).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Matrix = Any
Phi = Callable[[np.ndarray], np.ndarray]


# --- the equations, for one head -------------------------------------------------------------------------------------------------

def eq1(x: Matrix, attend: Callable[[Matrix], Matrix], f: Callable[[Matrix], Matrix]) -> Matrix:
    """T(x) = f(A(x) + x): a layer, from its attention A and from f, which looks at each row by itself. Eq. (1)."""
    return f(attend(x) + x)


def eq2(q: Matrix, k: Matrix, v: Matrix, scale: Any, causal: bool) -> Matrix:
    """V'_i = Σ_j exp(s·q_iᵀk_j) v_j / Σ_j exp(s·q_iᵀk_j); j ≤ i if causal. Eq. (2) and (3), the similarity exponential."""
    out = np.zeros((len(q), v.shape[-1]), v.dtype)
    for i in range(len(q)):
        last = i + 1 if causal else len(k)
        scores = scale * (k[:last] @ q[i])
        if len(scores):
            weights = np.exp(scores - scores.real.max())
            out[i] = weights @ v[:last] / weights.sum()
    return out


def eq4(phi_q: Matrix, phi_k: Matrix, v: Matrix, eps: Any, causal: bool) -> Matrix:
    """V'_i = Σ_j φ(q_i)ᵀφ(k_j) v_j / (Σ_j φ(q_i)ᵀφ(k_j) + ε); j ≤ i if causal. Eq. (4); causal: eq. (8).

    ε is the library's one addition; the paper has ε = 0. A row whose denominator is 0 has no keys to look at: it is 0.
    """
    out = np.zeros((len(phi_q), v.shape[-1]), v.dtype)
    for i in range(len(phi_q)):
        last = i + 1 if causal else len(phi_k)
        similarity = phi_k[:last] @ phi_q[i]
        out[i] = _quotient(similarity @ v[:last], similarity.sum() + eps)
    return out


def eq5(phi_q: Matrix, phi_k: Matrix, v: Matrix, eps: Any) -> Matrix:
    """V'_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_j φ(k_j) + ε). Eq. (5) and (6): `eq4` in the other order."""
    S, z = phi_k.T @ v, phi_k.sum(0)
    out = np.zeros((len(phi_q), v.shape[-1]), v.dtype)
    for i in range(len(phi_q)):
        out[i] = _quotient(phi_q[i] @ S, phi_q[i] @ z + eps)
    return out


def eq7(x: Matrix) -> Matrix:
    """φ(x) = elu(x) + 1: x + 1 above 0, eˣ below. Eq. (7)."""
    return np.where(x.real > 0, x + 1, np.exp(np.where(x.real > 0, 0, x)))


def eq9(q: Matrix, k: Matrix, v: Matrix, S0: Matrix) -> Matrix:
    """V̄_i = S_0ᵀ q_i + Σ_{j≤i} (q_iᵀk_j) v_j: the numerator of eq. (9), with a past S_0 that the paper sets to 0."""
    out = np.zeros((len(q), v.shape[-1]), v.dtype)
    for i in range(len(q)):
        out[i] = q[i] @ S0
        for j in range(i + 1):
            out[i] += (q[i] @ k[j]) * v[j]
    return out


def eq10(k: Matrix, v: Matrix, S0: Matrix) -> Matrix:
    """S_N = S_0 + Σ_j k_j v_jᵀ. Eq. (10); eq. (11) is the same with v_j = 1."""
    S = S0.copy()
    for j in range(len(k)):
        S = S + np.outer(k[j], v[j])
    return S


def eq12(phi_q: Matrix, phi_k: Matrix, v: Matrix, S: Matrix, z: Matrix, eps: Any) -> tuple[Matrix, Matrix, Matrix]:
    """V'_i = φ(q_i)ᵀ S_i / (φ(q_i)ᵀ z_i + ε), S_i = S_{i-1} + φ(k_i) v_iᵀ, z_i = z_{i-1} + φ(k_i). Eq. (12) by running sums.

    Returns (V', S_N, z_N)."""
    out = np.zeros((len(phi_q), v.shape[-1]), v.dtype)
    for i in range(len(phi_q)):
        S = S + np.outer(phi_k[i], v[i])
        z = z + phi_k[i]
        out[i] = _quotient(phi_q[i] @ S, phi_q[i] @ z + eps)
    return out, S, z


def eq13(k: Matrix, v: Matrix, G: Matrix, S0: Matrix) -> Matrix:
    """∂L/∂q_i = (S_0 + Σ_{j≤i} k_j v_jᵀ) G_i. Eq. (13)."""
    return np.stack([(S0 + k[: i + 1].T @ v[: i + 1]) @ G[i] for i in range(len(k))]) if len(k) else np.zeros_like(k)


def eq14(q: Matrix, v: Matrix, G: Matrix, dS: Matrix) -> Matrix:
    """∂L/∂k_i = (dS_N + Σ_{j≥i} q_j G_jᵀ) v_i. Eq. (14), with the final state's cotangent."""
    return np.stack([(dS + q[i:].T @ G[i:]) @ v[i] for i in range(len(q))]) if len(q) else np.zeros_like(q)


def eq15(q: Matrix, k: Matrix, G: Matrix, dS: Matrix) -> Matrix:
    """∂L/∂v_i = (dS_N + Σ_{j≥i} q_j G_jᵀ)ᵀ k_i. Eq. (15), with the final state's cotangent."""
    return np.stack([(dS + q[i:].T @ G[i:]).T @ k[i] for i in range(len(q))]) if len(q) else np.zeros_like(G)


def eq20(x: Matrix, w_q: Matrix, w_k: Matrix, w_v: Matrix, f: Callable[[Matrix], Matrix], phi: Phi, eps: Any) -> Matrix:
    """s_0 = 0, z_0 = 0, s_i = s_{i-1} + φ(x_i W_K) (x_i W_V)ᵀ, z_i = z_{i-1} + φ(x_i W_K), y_i = f(φ(x_i W_Q)ᵀ s_i / (φ(x_i W_Q)ᵀ z_i + ε) + x_i):
    a layer of one head as a recurrent network. Eq. (16) to (20)."""
    s, z = np.zeros((len(phi(w_k[0])), w_v.shape[1])), np.zeros(len(phi(w_k[0])))
    y = np.zeros_like(x)
    for i in range(len(x)):
        s = s + np.outer(phi(x[i] @ w_k), x[i] @ w_v)
        z = z + phi(x[i] @ w_k)
        y[i] = f(_quotient(phi(x[i] @ w_q) @ s, phi(x[i] @ w_q) @ z + eps) + x[i])
    return y


def gated_delta(q: Matrix, k: Matrix, v: Matrix, g: Matrix | None, beta: Matrix | None, S: Matrix) -> tuple[Matrix, Matrix]:
    """S_t = P + β_t k_t (v_t - Pᵀ k_t)ᵀ with P = Diag(exp(g_t)) S_{t-1}, o_t = S_tᵀ q_t: the recurrence of all rules, for one head.

    Without g nothing fades, P = S_{t-1}; without β what is written is k_t v_tᵀ. g (N,) or (N, D). Returns (o, S_N)."""
    out = np.zeros((len(q), v.shape[-1]), v.dtype)
    for t in range(len(q)):
        P = S if g is None else np.exp(g[t]) * S if g.ndim == 1 else np.exp(g[t])[:, None] * S
        write = v[t] if beta is None else beta[t] * (v[t] - P.T @ k[t])
        S = P + np.outer(k[t], write)
        out[t] = S.T @ q[t]
    return out, S


# --- the same for whole arrays (..., H, N, D): the signatures of the public functions ----------------------------------------------

def softmax_attention(q: Any, k: Any, v: Any, *, causal: bool = False, scale: Any = None, query_lengths: Any = None,
                      key_lengths: Any = None) -> np.ndarray:
    """Softmax attention by `eq2`, in float64; see `refattn.softmax_attention`."""
    q, k, v = _wide(q), _wide(k), _wide(v)
    s = 1 / np.sqrt(max(q.shape[-1], 1)) if scale is None else scale
    out = np.zeros((*q.shape[:-1], v.shape[-1]), np.result_type(q, k, v))
    for at, Q, K, V in _heads(q, k, v, query_lengths, key_lengths):
        out[at][: len(Q)] = eq2(Q, K, V.astype(out.dtype), s, causal)
    return out


def linear_attention(q: Any, k: Any, v: Any, *, phi: Phi = eq7, causal: bool = False, eps: Any = 1e-6, query_lengths: Any = None,
                     key_lengths: Any = None) -> np.ndarray:
    """Linear attention by `eq4`, in float64 and quadratic time; see `refattn.linear_attention`. `phi` is a function of an array."""
    q, k, v = _wide(q), _wide(k), _wide(v)
    dtype = np.result_type(q, k, v)
    out = np.zeros((*q.shape[:-1], v.shape[-1]), dtype)
    for at, Q, K, V in _heads(q, k, v, query_lengths, key_lengths):
        # a causal query may stand behind the last real key: it sees all real keys
        K, V = (np.concatenate([K, np.zeros((max(len(Q) - len(K), 0), K.shape[-1]), K.dtype)]),
                np.concatenate([V, np.zeros((max(len(Q) - len(V), 0), V.shape[-1]), V.dtype)])) if causal else (K, V)
        phi_k = phi(K)
        phi_k[_length(key_lengths, at, q, k):] = 0
        out[at][: len(Q)] = eq4(phi(Q), phi_k, V.astype(dtype), eps, causal)
    return out


def causal_linear_attention(q: Any, k: Any, v: Any, state: Any = None, *, phi: Phi = eq7, eps: Any = 1e-6) -> tuple[Any, tuple[Any, Any]]:
    """Causal linear attention as the recurrence, by `eq12`, in float64; returns (out, (S, z)); see
    `refattn.causal_linear_attention`."""
    q, k, v = _wide(q), _wide(k), _wide(v)
    dtype = np.result_type(q, k, v, *(() if state is None else (_wide(state[0]), _wide(state[1]))))
    F = phi(q[..., :0, :]).shape[-1]
    S = np.zeros((*k.shape[:-2], F, v.shape[-1]), dtype) if state is None else _wide(state[0]).astype(dtype)
    z = np.zeros((*k.shape[:-2], F), dtype) if state is None else _wide(state[1]).astype(dtype)
    out, S_end, z_end = np.zeros((*q.shape[:-1], v.shape[-1]), dtype), S.copy(), z.copy()
    for at, Q, K, V in _heads(q, k, v):
        kv = _kv(at, q, k)
        out[at], S_end[kv], z_end[kv] = eq12(phi(Q), phi(K), V.astype(dtype), S[kv], z[kv], eps)
    return out, (S_end, z_end)


def recurrence(q: Any, k: Any, v: Any, state: Any = None, *, scale: Any = 1) -> tuple[Any, Any]:
    """Rule `linear`: S_t = S_{t-1} + k_t v_tᵀ, o_t = scale·S_tᵀ q_t by `eq9` and `eq10`; returns (out, state)."""
    q, k, v = _wide(q), _wide(k), _wide(v)
    dtype = np.result_type(q, k, v, *(() if state is None else (_wide(state),)))
    S = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), dtype) if state is None else _wide(state).astype(dtype)
    out, S_end = np.zeros((*q.shape[:-1], v.shape[-1]), dtype), S.copy()
    for at, Q, K, V in _heads(q, k, v):
        out[at] = scale * eq9(Q, K, V.astype(dtype), S[_kv(at, q, k)])
    for at in np.ndindex(k.shape[:-2]):
        S_end[at] = eq10(k[at], v[at], S[at])
    return out, S_end


def full_recurrence(q: Any, k: Any, v: Any, g: Any = None, beta: Any = None, state: Any = None, *, scale: Any = 1) -> tuple[Any, Any]:
    """Rules `gated` (g), `delta` (beta) and `gated_delta` (both), `linear` with neither, as the loop over positions; see
    `refattn.recurrence`."""
    q, k, v = _wide(q), _wide(k), _wide(v)
    g, beta = (None if x is None else _wide(x) for x in (g, beta))
    dtype = np.result_type(q, k, v, *(_wide(x) for x in (g, beta, state) if x is not None))
    S = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), dtype) if state is None else _wide(state).astype(dtype)
    out, S_end = np.zeros((*q.shape[:-1], v.shape[-1]), dtype), S.copy()
    for at, Q, K, V in _heads(q, k, v):
        kv = _kv(at, q, k)
        o, S_end[kv] = gated_delta(Q, K, V.astype(dtype), None if g is None else g[kv], None if beta is None else beta[kv], S[kv])
        out[at] = scale * o
    return out, S_end


def lsh_attention(x: Any, v: Any, buckets: Any, *, causal: bool, chunk: int, scale: Any, lengths: Any = None) -> np.ndarray:
    """LSH attention as a softmax over the set P_i of each position, written as sets; see `refattn.lsh`."""
    x, v, buckets = _wide(x), _wide(v), np.asarray(buckets)
    out = np.zeros(v.shape, np.result_type(x, v))
    for at in np.ndindex(x.shape[:-2]):
        n = x.shape[-2] if lengths is None else int(lengths[at])
        for i in range(n):
            seen = set()
            for bucket in buckets[at]:
                order = sorted(range(len(bucket)), key=lambda j: (bucket[j], j))
                chunk_of = {j: place // chunk for place, j in enumerate(order)}
                seen |= {j for j in range(n) if j != i and (j < i or not causal) and bucket[j] == bucket[i]
                         and chunk_of[i] - chunk_of[j] in (0, 1)}
            visible = sorted(seen) or [i]
            keys = [x[at][j] / np.sqrt((x[at][j] ** 2).sum()) for j in visible]
            weights = np.exp(np.array([scale * (x[at][i] * k).sum() for k in keys]))
            out[at][i] = (weights[:, None] * v[at][visible]).sum(0) / weights.sum()
    return out


def recurrence_gradients(q: Any, k: Any, v: Any, state: Any, dout: Any, dstate: Any) -> tuple[Any, Any, Any, Any]:
    """Rule `linear` with scale 1: (dq, dk, dv, dstate0) by `eq13`, `eq14` and `eq15`; state and dstate are arrays."""
    q, k, v, S, G, dS = (_wide(x) for x in (q, k, v, state, dout, dstate))
    dq, dk, dv, dS0 = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), dS.copy()
    for at in np.ndindex(q.shape[:-2]):
        kv = _kv(at, q, k)
        first = not q.shape[:-2] or at[-1] % (q.shape[-3] // k.shape[-3]) == 0
        R = dS[kv] if first else np.zeros_like(dS[kv])             # every query head of a group adds to dk, dv; dS_N counts once
        dq[at] = eq13(k[kv], v[kv], G[at], S[kv])
        dk[kv] += eq14(q[at], v[kv], G[at], R)
        dv[kv] += eq15(q[at], k[kv], G[at], R)
        dS0[kv] += q[at].T @ G[at]
    return dq, dk, dv, dS0


# --- small things ------------------------------------------------------------------------------------------------------------------

def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x if x.dtype.kind in "cO" or x.dtype == np.longdouble else x.astype(np.float64)


def _quotient(numerator: Any, denominator: Any) -> Any:
    return numerator / denominator if denominator != 0 else 0 * numerator


def _kv(at: tuple[int, ...], q: Any, k: Any) -> tuple[int, ...]:
    """The key/value head that query head `at` reads."""
    return (*at[:-1], at[-1] // (q.shape[-3] // k.shape[-3])) if at else at


def _length(lengths: Any, at: tuple[int, ...], q: Any, k: Any) -> int:
    """The length that holds for head `at`; lengths may name the first leading axes only."""
    if lengths is None:
        return int(k.shape[-2])
    lengths = np.asarray(lengths)
    return int(lengths[_kv(at, q, k)[: lengths.ndim]])


def _heads(q: Any, k: Any, v: Any, query_lengths: Any = None, key_lengths: Any = None) -> Iterator[tuple[Any, Any, Any, Any]]:
    """For each query head: its index, and its q, k, v without their padding."""
    for at in np.ndindex(q.shape[:-2]):
        kv, lengths = _kv(at, q, k), np.asarray(q.shape[-2] if query_lengths is None else query_lengths)
        n, m = int(lengths[at[: lengths.ndim]]), _length(key_lengths, at, q, k)
        yield at, q[at][:n], k[kv][:m], v[kv][:m]
