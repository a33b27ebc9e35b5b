"""Non-causal linear attention's bare product: every query sees every key, in linear time.

    o_i = (S_0 + Σ_j k_j v_jᵀ)ᵀ q_i          (Q Kᵀ) V = Q (Kᵀ V)                                            eq. (5), (6)

No feature map and no normaliser: `attention` puts them around it. N queries and L keys need not be equally many.

**Closed under its own transpose,** as the causal sum is: with S = S_0 + Σ_j k_j v_jᵀ and R = dS + Σ_i q_i do_iᵀ,

    dq_i = S do_i          dk_j = R v_j          dv_j = Rᵀ k_j          dS_0 = R
"""
from __future__ import annotations

import numpy as np

from ._array import Array, transposed
from ._blocks import Reader, blocks
from .causal import Residuals, Side, _cotangent_state, _functional, _like_state, _over_group, _positions, _squeeze, grouped, like

BLOCK = 256    # positions at a time; nothing here is quadratic in it


def linear_forward(q: Array, k: Array, v: Array, state: Array | None = None) -> tuple[Array, Array, Residuals]:
    """S = S_0 + Kᵀ V,  O = Q S: eq. (5), (6). Any array-API namespace, object arrays too; 2·(N + L)·D·M flops, nothing quadratic.

    Shapes as in `causal_chunked_forward`, but for L keys; returns (out, S, residuals).

    >>> q, k, v = np.ones((2, 1)), np.ones((3, 1)), np.array([[1.], [2.], [3.]])
    >>> linear_forward(q, k, v)[0].ravel()
    array([6., 6.])
    """
    xp, (Q, K, V), S, give_back = _functional(q, k, v, state)
    S = S + transposed(K) @ V
    return give_back(Q @ S), _squeeze(S), (q, k, v, state)


def linear_backward(dout: Array, dstate: Array | None, residuals: Residuals) -> tuple[Array, Array, Array, Array]:
    """Transpose of `linear_forward`, its two lines in reverse; returns (dq, dk, dv, dstate0).

    >>> q, k, v = np.ones((2, 1)), np.ones((3, 1)), np.array([[1.], [2.], [3.]])
    >>> dq, dk, dv, _ = linear_backward(np.array([[1.], [2.]]), None, linear_forward(q, k, v)[2])
    >>> dq.ravel(), dk.ravel(), dv.ravel()
    (array([ 6., 12.]), array([3., 6., 9.]), array([3., 3., 3.]))
    """
    q, k, v, state = residuals
    xp, (Q, K, V), S, _ = _functional(q, k, v, state)
    dO, R = grouped(dout, K, xp), _cotangent_state(dstate, S, xp)
    S = S + transposed(K) @ V
    dq = dO @ transposed(S)                              # O = Q @ S
    R = R + _over_group(transposed(Q) @ dO, xp)          # O = Q @ S
    dk, dv = V @ transposed(R), K @ R                    # S = S_0 + Kᵀ @ V
    return like(dq, q, xp), like(dk, k, xp), like(dv, v, xp), _like_state(R, state, xp)


def full_product(read_k: Reader, read_v: Reader, S: np.ndarray, size: tuple[int, int, int, int, int], chunk: int = BLOCK, *,
                 out: Side | None = None, back: Side | None = None, columns: slice = slice(None), reverse: bool = False) -> None:
    """S ← S + Σ_j k_j v_jᵀ in place, then Sᵀ q_i and S r_i, for a stack of heads: `causal.running_product` without the mask.

    `size` = (heads, Gq, Gk, N, L). The order of the positions (`reverse`) does not matter here.
    """
    heads, gq, gk, n, m = size
    own = np.empty_like(S)

    def read(reader: Reader, rows: slice, groups: int, width: int) -> np.ndarray:
        x = np.empty((heads, 1, groups * (rows.stop - rows.start), width), S.dtype)
        reader(rows, _positions(x, rows.stop - rows.start))
        return x

    for rows in blocks(m, chunk):
        K, V = (read(x, rows, gk, width) for x, width in zip((read_k, read_v), S.shape[-2:], strict=True))
        np.matmul(K[:, 0].mT, V[:, 0], out=own)
        np.add(S, own, out=S)
    for rows in blocks(n, chunk):
        for side, matrix in ((out, S[..., columns]), (back, S.mT)):
            if side is not None:
                x = read(side[0], rows, gq, matrix.shape[-2])
                side[1](rows, _positions(x @ matrix[:, None], rows.stop - rows.start))
