"""Connectionist temporal classification: the cost of a label sequence whose place among the frames is not known, and how to read one off.

    p_n(c)   = exp(x_nc) / Σ_c' exp(x_nc')                     the probability of symbol c at frame n; one of the symbols is the blank
    P(y | x) = Σ_π Π_n p_n(π_n)                                over all paths π of N symbols that become y when repeats, then blanks, are dropped
    nll      = -log P(y | x)

The sum over paths is a recursion over states, of which a target of L labels has 2L + 1: a blank, the first label, a blank, …, a blank.
A start before them and an end behind them make it the same recursion for every length, and, read backwards, for the backward pass:

    state     0       1       2      3       4      …   2L       2L + 1   2L + 2
    symbol    start   blank   y_1    blank   y_2    …   y_L      blank    end

    α_n(s) = e_n(s) + log( exp α_{n-1}(s) + exp α_{n-1}(s-1) + [s may be reached from s-2] exp α_{n-1}(s-2) )

Derivation, gradient and error budget: docs/derivations/ctc.md.

Axes   B utterances · N frames · V symbols, the blank among them · L labels of a target · S = 2L + 3 states
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._array import Array, accumulator, check_dtypes, check_lengths, check_positive, check_shape, missing_extra, namespace, on_host
from ..layers import check_indices, keep_real
from .cross_entropy import shares

Residuals = tuple[Any, ...]

# The logarithm of what is impossible. Finite, so that differences of two are numbers; so low that N of them fit into float32 and that
# nothing but another one is seen beside it.
NEVER = -1e30


def ctc_forward(logits: Array, targets: Array, *, frame_lengths: Any = None, target_lengths: Any = None, weights: Array | None = None,
                blank: int = 0) -> tuple[Any, Residuals]:
    """Mean over utterances of the nats that their targets cost: -log of the probability of all alignments together.

        loss = Σ_b w_b nll_b / Σ_b w_b        nll_b = -log Σ_π Π_n p_bn(π_n)

    "Connectionist Temporal Classification", Graves, Fernández, Gomez, Schmidhuber (2006), eq. 3 to 8, in log space.

    Parameters
    ----------
    logits : (B, N, V)
        Unnormalised log-probabilities. A symbol may have -inf, and one that lies 1e30 below the frame's largest counts as such: it has
        probability 0.
    targets : (B, L) integers
        0 ≤ label < V, never the blank. May be empty.
    frame_lengths, target_lengths : (B,) integers, optional
        How many frames and labels are real; all without them. What lies behind (NaN, -1) reaches nothing.
    weights : (B,), optional
        A mask (bool), or weights ≥ 0 as integers or in the logits' dtype. Constants: they have no gradient. Logits and target of an
        utterance of weight 0 may be anything.
    blank : int
        The symbol that stands for no label.

    Returns
    -------
    loss : scalar of the logits' dtype
        Nats per unit of weight; 0 where there is no weight at all; inf where a target has probability 0 because its symbols have -inf.
    residuals : tuple
        For `ctc_backward`.

    Raises
    ------
    TypeError
        `targets: expected integers, got float64`; weights of another float dtype than the logits.
    ValueError
        `frame_lengths: utterance 3 has 4 frames and its target needs 5, …`: a target that no path can give is refused before anything is
        computed; `targets: expected 0 ≤ label < V = 34, got values from -1 to 9`; the blank in a target; shapes; lengths; negative weights.

    Notes
    -----
    A target needs a frame for each label and one more between equal neighbours. Time and memory O(B·N·(V + L)), with a Python loop over N.
    Sums are kept in the logits' dtype (float32 for float16 and bfloat16), those over frames and utterances in float64.

    Examples
    --------
    Two frames, two symbols: of the four paths three, (blank, 1), (1, blank) and (1, 1), say "1".

    >>> import numpy as np
    >>> loss, residuals = ctc_forward(np.zeros((1, 2, 2)), np.array([[1]]))
    >>> round(float(np.exp(-loss)), 12)
    0.75
    """
    xp = namespace(logits=logits, targets=targets, weights=weights)
    B, N, V, frames = _check_logits(logits, frame_lengths, blank)
    if targets.ndim != 2 or targets.shape[0] != B:
        raise ValueError(f"targets: expected (B, L) = ({B}, *), got {tuple(targets.shape)}: one row of labels for each row of logits")
    work, labels = accumulator(logits.dtype), on_host(targets)
    counts = check_lengths("target_lengths", target_lengths, (B,), targets.shape[1], "L")
    counts = np.full(B, targets.shape[1]) if counts is None else counts
    if weights is not None:
        check_shape("weights", weights, "(B,)", (B,), "one weight for each utterance")
    share, kept = shares(xp, weights, (B,), logits=logits)
    if kept is not None:
        frames, counts = (np.where(on_host(kept), n, 0) for n in (frames, counts))     # an empty target without frames: probability 1
    _check_targets(labels, counts, frames, V, blank)

    real = xp.asarray(np.arange(N) < frames[:, None])
    z = keep_real(xp, real, logits).astype(work)
    z -= z.max(-1, keepdims=True)
    p = xp.exp(z)
    total = p.sum(-1, keepdims=True)
    p /= total
    # z and not log p: the same total divides every path, so it is left out here and added once. Two more symbols: one that never comes,
    # and one that comes in each frame behind the last, of which there is at least one.
    table = xp.full((N + 1, B, V + 2), NEVER, work)
    table[:N, :, :V] = xp.where(real[..., None] & (z > NEVER), z, NEVER).swapaxes(0, 1)
    table[:, :, V + 1] = xp.asarray(np.where(np.arange(N + 1)[:, None] < frames, NEVER, 0.0).astype(work))

    symbols, skip = _states(labels, counts, V, blank)
    S = symbols.shape[1]
    first = np.arange(B) * S
    emissions = xp.take(table.reshape(N + 1, B * (V + 2)), xp.asarray((symbols + np.arange(B)[:, None] * (V + 2)).ravel()), axis=1)
    skip, start, end = xp.asarray(skip.ravel().astype(work)), xp.asarray(first), xp.asarray(first + 2 * counts + 2)
    alpha = _log_sums(xp, emissions, skip, start)
    paths = alpha[N][end]
    possible = paths > NEVER / 2
    nll = xp.where(real, xp.log(total[..., 0]), xp.zeros((), work)).sum(-1, dtype=xp.float64) - xp.where(possible, paths, -np.inf)
    loss = (nll * share).sum(dtype=xp.float64)
    share = xp.where(possible, share, np.nan)        # no path, no share of paths: the gradient is not to look like a number
    return loss.astype(logits.dtype), (p, real, emissions, alpha, skip, end, xp.asarray(symbols), share.astype(work), logits.dtype)


def ctc_backward(dloss: Any, residuals: Residuals) -> Array:
    """Transpose of `ctc_forward`, loss = -Σ_b s_b log Σ_π Π_n p_bn(π_n), s = w / Σ w.

        dx_bnc = dloss · s_b (p_bn(c) - Σ_{s: symbol c} γ_bn(s))        γ_n(s) = exp h_n(s) / Σ_s' exp h_n(s')        h = α + β - e

    softmax minus posterior: γ_n(s) is the share of the paths that are in state s at frame n. β is α with frames and states read backwards.
    exp h_n sums to the same at every frame, P up to the softmax's totals; taken anew at each frame it is free of what rounding did to α and β
    all along, and every frame's gradient sums to 0.

    Parameters
    ----------
    dloss : scalar
        Cotangent of the loss; 1.0 for the gradient of the loss itself.

    Returns
    -------
    dlogits : (B, N, V)
        In the logits' dtype. Exactly zero in padding and where the weight is 0; NaN in the frames of a target that has probability 0 (loss
        inf): no path, no share of paths.

    Examples
    --------
    >>> import numpy as np
    >>> loss, residuals = ctc_forward(np.zeros((1, 2, 2)), np.array([[1]]))
    >>> ctc_backward(1.0, residuals).round(6).tolist()
    [[[0.166667, -0.166667], [0.166667, -0.166667]]]
    """
    p, real, emissions, alpha, skip, end, symbols, share, dtype = residuals
    xp = namespace(p=p)
    (B, N, V), S = p.shape, symbols.shape[1]
    # Backwards, state s is reached from s + 2 where forwards s + 2 is from s.
    beta = _log_sums(xp, emissions[::-1, ::-1], xp.roll(skip[::-1], 2), B * S - 1 - end)[::-1, ::-1]
    h = alpha[:N] + beta[:N]
    h -= emissions[:N]
    h = h.reshape(N, B, S)
    h -= h.max(-1, keepdims=True)
    xp.exp(h, out=h)
    states = (symbols[..., None] == xp.arange(V)).astype(p.dtype)
    dlogits = h.swapaxes(0, 1) @ states
    dlogits /= -h.sum(-1).T[..., None]
    dlogits += p
    dlogits *= (share * share.dtype.type(dloss))[:, None, None]
    return keep_real(xp, real, dlogits).astype(dtype, copy=False)


def ctc_greedy_decode(logits: Array, *, frame_lengths: Any = None, blank: int = 0) -> list[np.ndarray]:
    """The labels of the most probable path: each frame's best symbol (of equals the lowest), repeats dropped, then blanks.

    Parameters
    ----------
    logits : (B, N, V)
        Unnormalised log-probabilities.
    frame_lengths : (B,) integers, optional
        How many frames are real; what lies behind is not read.
    blank : int
        The symbol that stands for no label.

    Returns
    -------
    list of B integer arrays
        NumPy's, each as long as what was read.

    Raises
    ------
    ValueError
        `logits: expected numbers, got NaN or inf in utterance 2, …`; shapes; lengths.

    Notes
    -----
    Time O(B·N·V).

    Examples
    --------
    >>> import numpy as np
    >>> ctc_greedy_decode(np.eye(3)[None, [1, 1, 0, 1, 2]])[0].tolist()
    [1, 1, 2]
    """
    return [best[np.r_[True, best[1:] != best[:-1]][:len(best)] & (best != blank)]
            for best in (logp.argmax(-1) for logp in _log_softmax(logits, frame_lengths, blank))]


def ctc_beam_decode(logits: Array, *, width: int = 16, frame_lengths: Any = None, blank: int = 0) -> list[np.ndarray]:
    """The most probable labels, all alignments together, among prefixes of which the `width` best are kept at each frame.

    Parameters
    ----------
    logits, frame_lengths, blank
        As in `ctc_greedy_decode`; so are what is returned and raised.
    width : int
        Prefixes kept, at least 1. With as many as there are the result is the most probable sequence of all.

    Notes
    -----
    Time O(B·N·width·(V + L)), on the host, in float64. Of equal prefixes that stay as they were comes before one that grew, then the one
    that was better a frame ago, then the lower label.

    Examples
    --------
    The best path is all blank, with probability 0.36; but three paths say "1", with 0.64 together.

    >>> import numpy as np
    >>> logits = np.log([[[0.6, 0.4], [0.6, 0.4]]])
    >>> ctc_greedy_decode(logits)[0].tolist(), ctc_beam_decode(logits)[0].tolist()
    ([], [1])
    """
    check_positive("width", width)
    return [np.array(_best_prefix(logp, width, blank), np.int64) for logp in _log_softmax(logits, frame_lengths, blank)]


def phoneme_error_rate(decoded: Sequence[Any], targets: Sequence[Any]) -> float:
    """Insertions, deletions and substitutions that turn what was read into what was said, per phoneme of what was said.

        rate = Σ_b distance(decoded_b, target_b) / Σ_b L_b

    Parameters
    ----------
    decoded, targets : B sequences of labels each
        Lists or arrays of integers, or of strings, without padding.

    Returns
    -------
    float
        0 for no errors; may exceed 1.

    Raises
    ------
    ImportError
        Where rapidfuzz is not installed: it names the extra `speech`.
    ValueError
        `decoded: expected as many sequences as targets, 3, got 2`; targets without a label.

    Examples
    --------
    >>> phoneme_error_rate([[1, 2, 3], []], [[1, 3], [4, 5]])
    0.75
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise missing_extra("rapidfuzz", "speech") from None
    if len(decoded) != len(targets):
        raise ValueError(f"decoded: expected as many sequences as targets, {len(targets)}, got {len(decoded)}")
    said = sum(len(target) for target in targets)
    if not said:
        raise ValueError("targets: expected at least one label in all, got none: an error rate is per label")
    return sum(Levenshtein.distance(list(a), list(b)) for a, b in zip(decoded, targets, strict=True)) / said


def _log_sums(xp: Any, emissions: Array, skip: Array, start: Array) -> Array:
    """α: the recursion on top, (N, B·S) → (N, B·S); before the first frame every utterance is in its state `start`.

    The states of all utterances lie in one row, so that a neighbour is a shifted slice. Nothing crosses from one utterance into the next:
    between them lies a start, which never comes.
    """
    N, M = emissions.shape
    alpha = xp.empty((N + 1, M + 2), emissions.dtype)           # two states in front of the first, to be shifted into
    alpha[0], alpha[:, :2] = NEVER, NEVER
    alpha[0, start + 2] = 0
    terms, top = xp.empty((3, M), emissions.dtype), xp.empty((M,), emissions.dtype)
    skipped, moved, stayed = terms[0], terms[1], terms[2]
    for n in range(N):
        before = alpha[n]
        xp.add(before[:-2], skip, out=skipped)
        xp.maximum(before[2:], before[1:-1], out=top)
        xp.maximum(top, skipped, out=top)
        xp.subtract(skipped, top, out=skipped)
        xp.subtract(before[1:-1], top, out=moved)
        xp.subtract(before[2:], top, out=stayed)
        xp.exp(terms, out=terms)
        xp.add(stayed, moved, out=moved)
        xp.add(moved, skipped, out=moved)
        xp.log(moved, out=moved)
        xp.add(moved, top, out=moved)
        xp.add(moved, emissions[n], out=alpha[n + 1, 2:])
    return alpha[1:, 2:]


def _states(labels: np.ndarray, counts: np.ndarray, V: int, blank: int) -> tuple[np.ndarray, np.ndarray]:
    """The symbols of the states (B, S), where V never comes and V + 1 comes behind the last frame; and 0 where a state may be reached from
    the one before its neighbour, else NEVER: over a blank, and not to the label that one comes from."""
    B, L = labels.shape
    state, end = np.arange(2 * L + 3), 2 * counts[:, None] + 2
    symbols = np.full((B, 2 * L + 3), blank)
    symbols[:, 2:-1:2] = labels
    symbols = np.where(state < end, symbols, np.where(state == end, V + 1, V))
    symbols[:, 0] = V
    skip = np.full(symbols.shape, NEVER)
    skip[:, 2:][symbols[:, 2:] != symbols[:, :-2]] = 0
    return symbols, skip


def _best_prefix(logp: np.ndarray, width: int, blank: int) -> tuple[int, ...]:
    """Beam search over prefixes; of each, the log-probability of the paths that end in a blank, and of those that end in its last label."""
    beam: list[tuple[int, ...]] = [()]
    in_blank, in_label = np.zeros(1), np.full(1, -np.inf)
    for row in logp:
        last, rank = np.array([prefix[-1] if prefix else blank for prefix in beam]), {prefix: i for i, prefix in enumerate(beam)}
        either = np.logaddexp(in_blank, in_label)
        grown = either[:, None] + row
        grown[np.arange(len(beam)), last] = in_blank + row[last]                  # the same label anew needs a blank between
        grown[:, blank] = -np.inf
        in_blank, in_label = either + row[blank], in_label + row[last]
        for i, prefix in enumerate(beam):
            parent = rank.get(prefix[:-1]) if prefix else None
            if parent is not None:                                                # its parent grows into it: one prefix, not two
                in_label[i] = np.logaddexp(in_label[i], grown[parent, prefix[-1]])
                grown[parent, prefix[-1]] = -np.inf
        scores = np.concatenate([np.logaddexp(in_blank, in_label), grown.ravel()])
        best = np.argsort(-scores, kind="stable")[:width]
        best = best[scores[best] > -np.inf]
        stays = best < len(beam)
        parents, symbols = np.divmod(best - len(beam), len(row))
        in_blank, in_label = (np.where(stays, x[np.where(stays, best, 0)], y) for x, y in ((in_blank, -np.inf), (in_label, scores[best])))
        beam = [beam[b] if stay else (*beam[i], int(c)) for stay, b, i, c in zip(stays, best, parents, symbols, strict=True)]
    return beam[0]


def _log_softmax(logits: Array, frame_lengths: Any, blank: int) -> list[np.ndarray]:
    """log p of the real frames of each utterance, on the host and in float64."""
    namespace(logits=logits)
    *_, frames = _check_logits(logits, frame_lengths, blank)
    found = []
    for b, (x, n) in enumerate(zip(on_host(logits), frames, strict=True)):
        z = x[:n].astype(np.float64)
        largest = z.max(-1, keepdims=True)
        if not np.isfinite(largest).all():
            raise ValueError(f"logits: expected numbers, got NaN or inf in utterance {b}, or a frame of -inf alone; look for where they come from")
        z -= largest
        found.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
    return found


def _check_logits(logits: Array, frame_lengths: Any, blank: int) -> tuple[int, int, int, np.ndarray]:
    """B, N, V and the frames of each utterance."""
    check_dtypes(logits=logits)
    if logits.ndim != 3 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected (B, N, V) with V ≥ 1, got {tuple(logits.shape)}")
    B, N, V = logits.shape
    if isinstance(blank, bool) or not isinstance(blank, (int, np.integer)):
        raise TypeError(f"blank: expected an integer, got {blank!r}")
    if not 0 <= blank < V:
        raise ValueError(f"blank: expected 0 ≤ blank < V = {V}, got {blank}")
    frames = check_lengths("frame_lengths", frame_lengths, (B,), N, "N")
    return B, N, V, np.full(B, N) if frames is None else frames


def _check_targets(labels: np.ndarray, counts: np.ndarray, frames: np.ndarray, V: int, blank: int) -> None:
    """Labels are labels, and there is a frame for each and one between equal neighbours."""
    real = np.arange(labels.shape[1]) < counts[:, None]
    check_indices("targets", labels, V, "label", "V", real)
    wrong = (real & (labels == blank)).any(-1)
    if wrong.any():
        raise ValueError(f"targets: expected labels, got the blank, {blank}, in utterance {wrong.argmax()}: leave it out, blanks between labels "
                         "are put in here")
    needed = counts + (real[:, 1:] & (labels[:, 1:] == labels[:, :-1])).sum(-1)
    short = frames < needed
    if short.any():
        b = short.argmax()
        raise ValueError(f"frame_lengths: utterance {b} has {frames[b]} frames and its target needs {needed[b]}, one for each of {counts[b]} labels "
                         "and one between equal neighbours: leave it out, or give it the weight 0")
