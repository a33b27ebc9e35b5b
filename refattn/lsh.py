"""LSH attention, the Reformer's, with which the paper compares: softmax attention among positions that fall into the same bucket.

Queries and keys are one array x, the keys normalised, k_j = x_j / |x_j|. In each of R rounds a hash puts every position into a bucket; the
positions are sorted by bucket, and by position within a bucket, and cut into chunks of C. In round r, i sees

    P_i^(r) = { j ≠ i : bucket_r(j) = bucket_r(i), chunk_r(j) = chunk_r(i) or chunk_r(i) - 1, j < i if causal }

and over all rounds P_i = ∪_r P_i^(r), or P_i = {i} where that is empty: nobody looks at itself unless it is alone. Then

    out_i = Σ_{j∈P_i} exp(s x_i·k_j) v_j / Σ_{j∈P_i} exp(s x_i·k_j)

**Rounds.** A pair that meets in n_ij rounds must count once, so each of them gives it exp(s x_i·k_j) / n_ij. With the log-sum-exp z_i^(r) of a
round and z_i that of all, out_i = Σ_r exp(z_i^(r) - z_i) out_i^(r); no exponent is positive.

**Backward**, with the buckets held fixed: P_ij^(r) = exp(s x_i·k_j - log n_ij - z_i) sum to one over j and r, so as in softmax attention

    dv_j = Σ_{r,i} P_ij^(r) do_i          dy_ij^(r) = P_ij^(r) (do_i·v_j - do_i·out_i)
    dx_i = s Σ_{r,j} dy_ij^(r) k_j        dk_j = s Σ_{r,i} dy_ij^(r) x_i          then dx_j += (dk_j - k_j (k_j·dk_j)) / |x_j|

and a position that is alone hands do_i to dv_i and nothing to x.

2·R·N·2C·(D + M) flops a head, and some R·N·2C numbers of memory for each head in work. NumPy arrays.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ._array import accumulator, check_positive
from ._blocks import BUFFER_BYTES, over_heads, stacks

Residuals = tuple[Any, ...]


def lsh_rotations(rng: np.random.Generator, rounds: int, D: int, buckets: int) -> np.ndarray:
    """Random directions (rounds, D, buckets / 2) for `lsh_buckets`, float64.

    ValueError for an odd number of buckets: "buckets: expected an even number, got 3".

    >>> lsh_rotations(np.random.default_rng(0), 4, 16, 64).shape
    (4, 16, 32)
    """
    if check_positive("buckets", buckets) % 2:
        raise ValueError(f"buckets: expected an even number, got {buckets}")
    return rng.standard_normal((check_positive("rounds", rounds), check_positive("D", D), buckets // 2))


def lsh_buckets(x: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """The bucket of each position in each round: argmax [x R; -x R], blind to the length of x.

    x (..., N, D), rotations (R, D, buckets / 2) -> integers (..., R, N).

    >>> lsh_buckets(np.array([[1.0, 0.0], [0.0, -2.0]]), np.eye(2)[None])
    array([[0, 3]])
    """
    turned = x[..., None, :, :].astype(rotations.dtype) @ rotations
    return np.concatenate([turned, -turned], axis=-1).argmax(-1)


def lsh_forward(x: np.ndarray, v: np.ndarray, buckets: np.ndarray, *, causal: bool = True, chunk: int = 32, scale: float | None = None,
                lengths: np.ndarray | None = None) -> tuple[np.ndarray, Residuals]:
    """LSH attention with given buckets; see the top of this file.

    Parameters
    ----------
    x : (..., N, D)
        Queries, and before they are normalised keys.
    v : (..., N, M)
    buckets : integers (..., R, N)
        From `lsh_buckets`.
    causal : bool
        i sees j < i only.
    chunk : int
        C.
    scale : float, optional
        s; 1/√D if None.
    lengths : integers, optional
        How many positions are real, for each head: an array of the leading axes. The rest is seen by no one and gives zeros.

    Returns
    -------
    out : (..., N, M), dtype of v
    residuals : tuple
        For `lsh_backward`.

    Raises
    ------
    ValueError
        "buckets: expected (..., R, N) = …, got …".

    >>> x = v = np.array([[1.0], [2.0], [4.0]])
    >>> lsh_forward(x, v, np.zeros((1, 3), int), scale=0.0)[0].ravel()
    array([1. , 1. , 1.5])
    """
    N, D = x.shape[-2:]
    if v.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"v: expected (..., N, M) = ({', '.join(map(str, x.shape[:-1]))}, *), got {v.shape}")
    if buckets.ndim != x.ndim or buckets.shape[:-2] != x.shape[:-2] or buckets.shape[-1] != N or not buckets.shape[-2]:
        raise ValueError(f"buckets: expected (..., R, N) = ({', '.join(map(str, (*x.shape[:-2], '*', N)))}), got {buckets.shape}")
    chunk, s = check_positive("chunk", chunk), D ** -0.5 if scale is None and D else float(scale or 0)
    acc = accumulator(v.dtype)
    out, top = np.zeros(v.shape, v.dtype), np.zeros((*x.shape[:-1], 1), acc)

    def work(x: Any, v: Any, buckets: Any, lengths: Any, out: Any, top: Any) -> None:
        p = _pairs(x.astype(acc), v.astype(acc), buckets, chunk, s, causal, lengths)
        m = np.maximum(p.logits.max(-1, initial=-np.inf), np.finfo(acc).min)                    # (h, R, T, C), finite
        weights = np.exp(p.logits - m[..., None])
        z = _unsorted(m, p.place)                                                               # (h, R, N)
        total, sums = z.max(1, keepdims=True), _unsorted(weights.sum(-1), p.place)
        by = np.exp(z - total)                                                                  # rounds on one footing
        l = (by * sums).sum(1)[..., None]
        o = (by[..., None] * _unsorted(weights @ p.values, p.place)).sum(1)
        alone = (l == 0) & p.real[..., None]
        out[...] = np.where(alone, v, (o / np.where(l == 0, 1, l)).astype(out.dtype))
        top[...] = np.where(l == 0, np.inf, total[:, 0, :, None] + np.log(np.where(l == 0, 1, l)))      # z_i; ∞ makes all weights 0

    _each(work, chunk, x, v, buckets, lengths, out, top)
    return out, (x, v, buckets, causal, chunk, s, lengths, out, top)


def lsh_backward(dout: np.ndarray, residuals: Residuals) -> tuple[np.ndarray, np.ndarray]:
    """Transpose of `lsh_forward` with the buckets held fixed; returns dx, dv.

    >>> x = v = np.array([[1.0], [2.0], [4.0]]); _, residuals = lsh_forward(x, v, np.zeros((1, 3), int), scale=0.0)
    >>> lsh_backward(np.ones((3, 1)), residuals)[1].ravel()
    array([2.5, 0.5, 0. ])
    """
    x, v, buckets, causal, chunk, s, lengths, out, top = residuals
    acc = accumulator(v.dtype)
    dx, dv = np.zeros(x.shape, x.dtype), np.zeros(v.shape, v.dtype)

    def work(x: Any, v: Any, buckets: Any, lengths: Any, out: Any, top: Any, dout: Any, dx: Any, dv: Any) -> None:
        p = _pairs(x.astype(acc), v.astype(acc), buckets, chunk, s, causal, lengths)
        x, dout = (np.where(p.real[..., None], y.astype(acc), 0) for y in (x, dout))
        do, inner, z = (_sorted(y, p.position) for y in (dout, (dout * out.astype(acc)).sum(-1, keepdims=True), top))
        P = np.exp(p.logits - z)
        dy = P * (do @ p.values.mT - inner)
        own = p.real[..., None] & np.isinf(top)
        dv[...] = (_unsorted_keys(P.mT @ do, p.place) + np.where(own, dout, 0)).astype(dv.dtype)
        dk = s * _unsorted_keys(dy.mT @ p.queries, p.place)
        norm = np.sqrt((x * x).sum(-1, keepdims=True))
        k = x / np.where(norm == 0, 1, norm)
        dnorm = np.where(norm == 0, 0, (dk - k * (k * dk).sum(-1, keepdims=True)) / np.where(norm == 0, 1, norm))
        dx[...] = (s * _unsorted(dy @ p.keys, p.place).sum(1) + dnorm).astype(dx.dtype)

    _each(work, chunk, x, v, buckets, lengths, out, top, dout, dx, dv)
    return dx, dv


# --- sorted, in chunks ------------------------------------------------------------------------------------------------------------------

class _Pairs(NamedTuple):
    """What sits where in each round, for a stack of h heads; T·C ≥ N places, of which those behind N are empty."""

    position: np.ndarray     # (h, R, T, C): who sits there; N if nobody
    place: np.ndarray        # (h, R, N): where a position sits
    queries: np.ndarray      # (h, R, T, C, D)
    keys: np.ndarray         # (h, R, T, 2C, D): of the chunk before, and the own
    values: np.ndarray       # (h, R, T, 2C, M)
    logits: np.ndarray       # (h, R, T, C, 2C): s x·k - log n, -inf where it is not seen
    real: np.ndarray         # (h, N)


def _pairs(x: np.ndarray, v: np.ndarray, buckets: np.ndarray, C: int, s: float, causal: bool, lengths: np.ndarray | None) -> _Pairs:
    h, R, N = buckets.shape
    T = -(-N // C)
    order = np.argsort(buckets, axis=-1, kind="stable")
    position = np.full((h, R, T * C), N)
    position[..., :N] = order
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(N), order.shape), axis=-1)
    position = position.reshape(h, R, T, C)
    real = np.arange(N) < (np.full((h, 1), N) if lengths is None else lengths[:, None])
    if lengths is not None:                                                                     # 0 · NaN of padding would be NaN
        x, v = (np.where(real[..., None], y, 0).astype(y.dtype) for y in (x, v))
    norm = np.sqrt((x * x).sum(-1, keepdims=True))
    queries = _sorted(x, position)
    keys, values = (_with_previous(_sorted(y, position)) for y in (x / np.where(norm == 0, 1, norm), v))
    i, j = position[..., :, None], _with_previous(position[..., None], N)[..., None, :, 0]
    real_at = np.concatenate([real, np.zeros((h, 1), bool)], axis=1)                            # nobody's place is not real
    rows = np.arange(h)[:, None, None, None]
    seen = (real_at[rows, position][..., None] & real_at[rows, j[..., 0, :]][..., None, :]
            & (j < i if causal else j != i))
    meetings = np.zeros(seen.shape, np.int8 if R < 128 else np.int32)
    for r in range(R):
        bucket, chunk = (np.concatenate([y, np.full((h, 1), -9)], axis=1) for y in (buckets[:, r], place[:, r] // C))
        back = chunk[rows, position][..., None] - chunk[rows, j[..., 0, :]][..., None, :]
        meetings += (bucket[rows, position][..., None] == bucket[rows, j[..., 0, :]][..., None, :]) & ((back == 0) | (back == 1))
        seen[:, r] &= bucket[rows[:, 0], position[:, r]][..., None] == bucket[rows[:, 0], j[:, r, :, 0]][..., None, :]
    scores = s * (queries @ keys.mT)
    if R > 1:
        scores -= np.log(np.maximum(np.arange(R + 1), 1)).astype(scores.dtype)[meetings]
    return _Pairs(position, place, queries, keys, values, np.where(seen, scores, -np.inf).astype(scores.dtype), real)


def _sorted(x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """(h, N, D) as (h, R, T, C, D); zeros where nobody sits."""
    x = np.concatenate([x, np.zeros((x.shape[0], 1, x.shape[2]), x.dtype)], axis=1)
    return x[np.arange(len(x))[:, None, None, None], position]


def _with_previous(x: np.ndarray, nobody: Any = 0) -> np.ndarray:
    """(h, R, T, C, D) as (h, R, T, 2C, D): the chunk before, and the own; nobody is before the first."""
    before = np.concatenate([np.full_like(x[:, :, :1], nobody), x[:, :, :-1]], axis=2)
    return np.concatenate([before, x], axis=3)


def _unsorted(y: np.ndarray, place: np.ndarray) -> np.ndarray:
    """(h, R, T, C, …) back to (h, R, N, …)."""
    h, R, N = place.shape
    flat = y.reshape(h, R, -1, *y.shape[4:])
    return flat[np.arange(h)[:, None, None], np.arange(R)[:, None], place]


def _unsorted_keys(y: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Transpose of `_with_previous` and `_sorted`: (h, R, T, 2C, D) as (h, N, D), summed over rounds."""
    C = y.shape[3] // 2
    own = y[:, :, :, C:].copy()
    own[:, :, :-1] += y[:, :, 1:, :C]
    return _unsorted(own, place).sum(1)


def _each(work: Any, chunk: int, x: np.ndarray, v: np.ndarray, buckets: np.ndarray, lengths: Any, *more: np.ndarray) -> None:
    R, N = buckets.shape[-2:]
    if not N:
        return
    one = R * (N + chunk) * (2 * chunk + 2 * x.shape[-1] + 2 * v.shape[-1])
    lengths = None if lengths is None else np.broadcast_to(lengths, x.shape[:-2])
    items = stacks(x.shape[:-2], x, v, buckets, lengths, *more, most=max(BUFFER_BYTES // (8 * one), 1))
    over_heads(work, list(items), 4.0 * x.size * R * chunk)
