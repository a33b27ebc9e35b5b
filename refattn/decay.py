"""Decays inside a chunk, as products of a_s = exp(g_s), and the scores that they weaken; shared by `gated` and `delta`.

    A_tj = Σ_d x_td k_jd Π_{j<s≤t} a_sd        for j ≤ t, else 0

A difference of cumulated logarithms would give the same product, until one of them is -inf, or so large that the small differences are lost.
Here nothing is ever subtracted and nothing divided: a chunk is cut in halves, halves in quarters, …, and for t in the right and j in the left
half of a pair the product is split at the border between them,

    Π_{j<s≤t} a_s = behind_j · before_t        behind_j: after j to the end of the left half, before_t: from the start of the right half to t

so that all pairs of two halves are one matrix product, and a factor that is 0 (g = -inf) is only a 0. Each product of m factors is made by
m - 1 multiplications, in whatever order: off by m roundings and m exponentials or less.

**Backward** without subtraction too: what a decay's logarithm receives from a product is the product times its cotangent, so

    dg_s = Σ over all products p that contain a_s of p · dp

and the sums over t ≥ s (for before) and j < s (for behind) run down the same tree.

Arrays are cut into chunks: (..., T, C, D) with C a power of two; a (..., T, C, W) with W = 1 for a scalar decay, W = D for one per channel.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._array import Array, transposed

Halves = tuple[Array, Array]


class Decays(NamedTuple):
    """Products of a over parts of each chunk.

    pairs: for blocks of s = 1, 2, …, C/2, two and two: before (..., T, C/2s, s, W) of the right ones, behind of the left ones.
    before (..., T, C, W): Π_{s≤t}, what the state before the chunk has become at t. behind (..., T, C, W): Π_{s>t}, what a write at t has
    become behind the chunk. whole (..., T, W, 1): Π over the chunk.
    """

    pairs: list[Halves]
    before: Array
    behind: Array
    whole: Array


def decays(a: Array, xp: Any) -> Decays:
    """All products of a (..., T, C, W) that a chunk needs: C·log₂ C multiplications a channel."""
    before = whole = a[..., None, :]                                              # blocks of one position: (..., T, C, 1, W)
    behind = xp.ones_like(before)
    pairs = []
    while before.shape[-3] > 1:
        (b, b_right), (e_left, e), (w_left, w_right) = _halves(before), _halves(behind), _halves(whole)
        pairs.append((b_right, e_left))
        before, behind = xp.concat([b, w_left * b_right], axis=-2), xp.concat([e_left * w_right, e], axis=-2)
        whole = w_left * w_right
    return Decays(pairs, before[..., 0, :, :], behind[..., 0, :, :], transposed(whole[..., 0, :, :]))


def decays_backward(dpairs: list[Halves], dbefore: Array, dbehind: Array, dwhole: Array, xp: Any) -> Array:
    """dg (..., T, C, W) from what the logarithms of all products receive, dwhole as (..., T, 1, W): the tree from the root down."""
    B, E, w = dbefore[..., None, :, :], dbehind[..., None, :, :], dwhole[..., None, :, :]
    for b_right, e_left in reversed(dpairs):
        s = b_right.shape[-2]
        w_left = w + xp.sum(B[..., s:, :], axis=-2, keepdims=True)                # before of the right half = w_left · before inside it
        w_right = w + xp.sum(E[..., :s, :], axis=-2, keepdims=True)               # behind of the left half = behind inside it · w_right
        B = _interleaved(B[..., :s, :], B[..., s:, :] + b_right, xp)
        E = _interleaved(E[..., :s, :] + e_left, E[..., s:, :], xp)
        w = _interleaved(w_left, w_right, xp)
    return (B + w)[..., 0, :]


def scores(X: Array, K: Array, g: Array | None, xp: Any) -> tuple[Array, Array, Array, Array | None]:
    """A (..., T, C, C) of x (..., T, C, D) and k (..., T, C, D); b ⊙ X and e ⊙ K with b = Π_{s≤t} a_s, e = Π_{s>t} a_s; Π a (..., T, W, 1).

    Without g the lower triangle of X Kᵀ, X, K and None."""
    if g is None:
        return _lower(X @ transposed(K), xp), X, K, None
    if g.shape[-1] == 1 < X.shape[-1]:                                            # one decay for all channels: drawn out of the sum
        weights, before, behind, whole = _weights(g, xp)
        A = _lower(X @ transposed(K), xp)
        A *= weights
        return A, before * X, behind * K, whole
    a = xp.exp(g)
    A, w = xp.sum(X * K, axis=-1)[..., None, None], a[..., None, :]               # blocks of one position: (..., T, C, 1, 1)
    bX, eK = (a * X)[..., None, :], (xp.ones_like(a) * K)[..., None, :]
    while w.shape[-3] > 1:
        A = _joined(A, _halves(bX)[1] @ transposed(_halves(eK)[0]), xp)
        left, right = _halves(w)
        bX, eK, w = _pairs(bX, xp, right=left), _pairs(eK, xp, left=right), left * right
    return A[..., 0, :, :], bX[..., 0, :, :], eK[..., 0, :, :], transposed(w[..., 0, :, :])


def _weights(g: Array, xp: Any) -> tuple[Array, Array, Array, Array]:
    """`scores` of ones, for one decay: Γ_tj = Π_{j<s≤t} a_s (..., T, C, C), b, e, Π a. NumPy goes from row to row, Γ_tj = a_t Γ_{t-1,j}: C
    products of rows are fewer and shorter calls than the tree of all the others."""
    if not isinstance(g, np.ndarray):
        one = xp.ones_like(g)
        return scores(one, one, g, xp)
    a, C = np.exp(g), g.shape[-2]
    weights = np.zeros((*g.shape[:-1], C), g.dtype)
    weights[..., np.arange(C), np.arange(C)] = 1
    for t in range(1, C):
        np.multiply(weights[..., t - 1, :t], a[..., t, :], out=weights[..., t, :t])
    before = a[..., :1, :] * weights[..., :1]
    return weights, before, weights[..., -1, :, None], before[..., -1:, :]


def scores_backward(dA: Array, dbX: Array, deK: Array, dwhole: Array, A: Array, X: Array, K: Array, g: Array | None,
                    xp: Any) -> tuple[Array, Array, Array | None]:
    """Transpose of `scores`: dX, dK, dg. Of dA only j ≤ t is read; dwhole is (..., T, D, 1).

    X (..., G, T, C, D) may have more heads than K (..., 1, T, C, D), whose gradient, like that of g, is the sum over them."""
    if g is None:
        dA = _lower(dA, xp)
        return dA @ K + dbX, over_group(transposed(dA) @ X, xp) + deK, None
    p, scalar = decays(xp.exp(g), xp), g.shape[-1] == 1 < X.shape[-1]
    if scalar:
        dA = _lower(dA, xp)                                                       # dA is read here alone
        offs, _ = _below(over_group(dA * A, xp), xp)
        dpairs = [(xp.sum(off, axis=-1, keepdims=True), transposed(xp.sum(off, axis=-2, keepdims=True))) for off in offs]
        dA = dA * _weights(g, xp)[0]
        dX, dK = dA @ K, over_group(transposed(dA) @ X, xp)
    else:
        dX, dK, dpairs = _pair_scores_backward(dA, X, K, p, xp)

    def shared(x: Array) -> Array:
        return xp.sum(x, axis=-1, keepdims=True) if scalar else x                 # one decay receives what all channels do

    dg = decays_backward(dpairs, shared(over_group(p.before * X * dbX, xp)), shared(p.behind * K * deK),
                         shared(transposed(p.whole * dwhole)), xp)
    return dX + p.before * dbX, dK + p.behind * deK, dg


def _pair_scores_backward(dA: Array, X: Array, K: Array, p: Decays, xp: Any) -> tuple[Array, Array, list[Halves]]:
    """dX and dK from the scores alone, and what the logarithms of the decays in `p.pairs` receive: from single positions up."""
    offs, diagonal = _below(dA, xp)
    dX, dK, dpairs = (diagonal * K)[..., None, :], over_group((diagonal * X)[..., None, :], xp, blocks=True), []
    for off, (before, behind) in zip(offs, p.pairs, strict=True):
        right, left = _blocked(X, before, xp)[..., 1::2, :, :] * before, _blocked(K, behind, xp)[..., 0::2, :, :] * behind
        dright, dleft = off @ left, over_group(transposed(off) @ right, xp, blocks=True)
        dpairs.append((over_group(right * dright, xp, blocks=True), left * dleft))
        (x, x_right), (k_left, k) = _halves(dX), _halves(dK)
        dX = xp.concat([x, x_right + dright * before], axis=-2)
        dK = xp.concat([k_left + dleft * behind, k], axis=-2)
    return dX[..., 0, :, :], dK[..., 0, :, :], dpairs


def unit_lower_inverse(L: Array, xp: Any) -> Array:
    """T = (I - L)⁻¹ for the strictly lower triangle of L (..., C, C), C a power of two, by halves:

        [I - L₁    0  ]⁻¹   [    T₁        0 ]
        [ -B    I - L₂]   = [ T₂ B T₁      T₂]
    """
    offs, diagonal = _below(L, xp)
    T = xp.ones_like(diagonal)[..., None]                                         # blocks of one position: (..., C, 1, 1)
    for off in offs:
        left, right = _halves(T)
        T = _joined(T, off if off.shape[-1] == 1 else right @ off @ left, xp)
    return T[..., 0, :, :]


def strictly_lower(A: Array, xp: Any) -> Array:
    i = xp.arange(A.shape[-1])
    return xp.where(i[:, None] > i, A, xp.zeros_like(A))


# --- blocks of a chunk --------------------------------------------------------------------------------------------------------------

def _halves(x: Array) -> Halves:
    """(..., n, s, ·) as its even and its odd blocks."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def _pairs(x: Array, xp: Any, *, left: Array | None = None, right: Array | None = None) -> Array:
    """Blocks (..., n, s, D) two and two as (..., n/2, 2s, D), those on one side weakened. x is the caller's own: on NumPy in place."""
    if isinstance(x, np.ndarray):
        side, by = (x[..., 0::2, :, :], left) if right is None else (x[..., 1::2, :, :], right)
        side *= by
        return x.reshape(*x.shape[:-3], x.shape[-3] // 2, 2 * x.shape[-2], x.shape[-1])
    a, b = _halves(x)
    return xp.concat([a if left is None else a * left, b if right is None else b * right], axis=-2)


def _blocked(x: Array, like: Array, xp: Any) -> Array:
    return xp.reshape(x, (*x.shape[:-2], 2 * like.shape[-3], like.shape[-2], x.shape[-1]))


def _interleaved(left: Array, right: Array, xp: Any) -> Array:
    """(..., n, s, ·) twice as (..., 2n, s, ·): left, right, left, right, …"""
    both = xp.stack([left, right], axis=-3)
    return xp.reshape(both, (*both.shape[:-4], 2 * both.shape[-4], *both.shape[-2:]))


def _joined(A: Array, off: Array, xp: Any) -> Array:
    """Blocks on the diagonal (..., n, s, s) and those below them (..., n/2, s, s) as blocks (..., n/2, 2s, 2s)."""
    left, right = _halves(A)
    if isinstance(A, np.ndarray):
        s = A.shape[-1]
        both = np.zeros((*off.shape[:-2], 2 * s, 2 * s), A.dtype)
        both[..., :s, :s], both[..., s:, :s], both[..., s:, s:] = left, off, right
        return both
    return xp.concat([xp.concat([left, xp.zeros_like(off)], axis=-1), xp.concat([off, right], axis=-1)], axis=-2)


def _below(A: Array, xp: Any) -> tuple[list[Array], Array]:
    """The lower triangle of A (..., C, C) taken apart: blocks (..., C/2s, s, s) below the diagonal for s = 1, 2, …, C/2, and the diagonal
    (..., C, 1). The reverse of `_joined`."""
    if isinstance(A, np.ndarray):                                                 # views
        C, lead = A.shape[-1], A.shape[:-2]
        blocks = [A.reshape(*lead, C // w, w, C // w, w).diagonal(axis1=-4, axis2=-2) for w in (2**i for i in range(C.bit_length()))]
        return [np.moveaxis(b, -1, -3)[..., b.shape[-2] // 2:, : b.shape[-2] // 2] for b in blocks[1:]], np.moveaxis(blocks[0], -1, -3)[..., 0]
    offs, A = [], A[..., None, :, :]
    while A.shape[-1] > 1:
        s = A.shape[-1] // 2
        offs.append(A[..., s:, :s])
        A = _interleaved(A[..., :s, :s], A[..., s:, s:], xp)
    return offs[::-1], A[..., 0]


def _lower(A: Array, xp: Any) -> Array:
    """A, the caller's own, with zeros above the diagonal. Not a product with 0: a hidden score may have overflowed."""
    i = xp.arange(A.shape[-1])
    if isinstance(A, np.ndarray):
        np.copyto(A, 0, where=i[:, None] < i)
        return A
    return xp.where(i[:, None] >= i, A, xp.zeros_like(A))


def over_group(x: Array, xp: Any, *, blocks: bool = False) -> Array:
    """The sum over the G axis of (..., G, T, C, ·), or of (..., G, T, n, s, ·)."""
    axis = -5 if blocks else -4
    return x if x.shape[axis] == 1 else xp.sum(x, axis=axis, keepdims=True)
