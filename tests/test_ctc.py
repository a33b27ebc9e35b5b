"""Laws of connectionist temporal classification: against the sum over all alignments, and where that is known in closed form, exactly."""
from __future__ import annotations

import itertools
import math
import sys
from functools import lru_cache
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.losses import ctc_backward, ctc_beam_decode, ctc_forward, ctc_greedy_decode, phoneme_error_rate
from refattn.testing.budgets import assert_within, gamma, rounding, unit_roundoff
from refattn.testing.laws import gradient

DTYPES = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
seeds, dtypes = st.integers(0, 2**32 - 1), st.sampled_from(DTYPES)


class Case(NamedTuple):
    logits: np.ndarray
    targets: np.ndarray
    frames: np.ndarray
    counts: np.ndarray
    blank: int

    @property
    def lengths(self):
        return {"frame_lengths": self.frames, "target_lengths": self.counts, "blank": self.blank}


def needed(labels):
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


def case(seed, dtype=DTYPES[0], B=3, N=6, V=3, L=4, scale=2.0):
    """Utterances of 0 to N frames and 0 to L labels, often repeated, of which their frames can say as many; rows of no more than L."""
    rng = np.random.default_rng(seed)
    L = int(rng.integers(1, L + 1))                                   # a short row is often full
    blank = int(rng.integers(V))
    logits = np.asarray(scale * rng.standard_normal((B, N, V))).astype(dtype)
    targets = (blank + rng.integers(1, max(V, 2), (B, L))) % V
    frames = rng.integers(0, N + 1, B)
    counts = np.array([max(n for n in range(L + 1 if V > 1 else 1) if needed(y[:n]) <= t) for y, t in zip(targets, frames)])
    return Case(logits, targets, frames, rng.integers(0, counts + 1), blank)


@lru_cache
def alignments(N, V, blank):
    """All paths (V^N, N), and for each sequence of labels which of them say it."""
    paths = np.array(list(itertools.product(range(V), repeat=N)), int).reshape(V**N, N)
    said = {}
    for i, path in enumerate(paths):
        said.setdefault(tuple(int(c) for c, _ in itertools.groupby(path) if c != blank), []).append(i)
    return paths, said


def log_probabilities(x, paths):
    """log Π_n p_n(π_n) of each path."""
    return x[np.arange(len(x)), paths].sum(-1) - np.log(np.exp(x).sum(-1)).sum()


def oracle(c, b):
    """nll, p and posterior of utterance b by its sum over all alignments, in longdouble."""
    x, labels = c.logits[b, :c.frames[b]].astype(np.longdouble), tuple(c.targets[b, :c.counts[b]].tolist())
    paths, said = alignments(*x.shape, c.blank)
    those = paths[said[labels]]
    share = np.exp(log_probabilities(x, those))
    posterior = np.zeros(x.shape, np.longdouble)
    for n in range(len(x)):
        np.add.at(posterior[n], those[:, n], share / share.sum())
    return -np.log(share.sum()), np.exp(x) / np.exp(x).sum(-1, keepdims=True), posterior


class Budget(NamedTuple):
    """docs/derivations/ctc.md, section f: the error of a loss, and the relative ones of softmax and posterior."""

    nll: float
    softmax: float
    posterior: float


def budget(dtype, T, V, L, R):
    dtype = np.dtype(np.float32) if dtype.itemsize < 4 else dtype
    u = unit_roundoff(dtype)
    A = T * (R + math.log(3))
    paths = (T + 1) * (20 + 2 * A) + T * R
    totals = T * (R + V + 8 + 8 * math.log(V)) + T * T * math.log(V)
    return Budget((paths + totals) * u, math.expm1(2 * u * R) + gamma(V + 20, dtype),
                  math.expm1(2 * u * (2 * paths + 6 * A + R + 9)) + gamma(4 * L + 12, dtype))


def budget_of(c, b):
    x = c.logits[b, :c.frames[b]].astype(float)
    return budget(c.logits.dtype, len(x), x.shape[-1], c.targets.shape[1], float((x.max(-1, initial=-99) - x.min(-1, initial=99)).max(initial=0)))


def shares(weights, B):
    return np.full(B, 1 / B) if weights is None else weights / max(weights.sum(), 1)


# --- the sum over all alignments ----------------------------------------------------------------------------------------------------

@given(seeds, dtypes, st.integers(1, 3), st.booleans())
def test_the_loss_is_the_sum_over_all_alignments(seed, dtype, V, weighted):
    c = case(seed, dtype, V=V)
    weights = np.random.default_rng(seed).integers(0, 3, 3) if weighted else None
    loss, _ = ctc_forward(c.logits, c.targets, weights=weights, **c.lengths)
    share, nll = shares(weights, 3), [float(oracle(c, b)[0]) for b in range(3)]
    assert loss.dtype == dtype and np.shape(loss) == ()
    bound = share @ [budget_of(c, b).nll for b in range(3)] + gamma(5, "float32" if dtype.itemsize < 4 else dtype) * (share @ nll)
    assert_within(loss, share @ nll, bound + rounding(share @ nll, dtype))


@given(seeds, dtypes, st.integers(1, 3), st.booleans(), st.floats(-3, 3))
def test_the_gradient_is_softmax_minus_the_share_of_alignments(seed, dtype, V, weighted, dloss):
    c = case(seed, dtype, V=V)
    weights = np.random.default_rng(seed).integers(0, 3, 3) if weighted else None
    dlogits = ctc_backward(dloss, ctc_forward(c.logits, c.targets, weights=weights, **c.lengths)[1])
    assert dlogits.dtype == dtype and dlogits.shape == c.logits.shape
    for b, share in enumerate(dloss * shares(weights, 3)):
        T, wide = c.frames[b], budget_of(c, b)
        _, p, posterior = (x if i == 0 else x.astype(float) for i, x in enumerate(oracle(c, b)))
        bound = abs(share) * (p * wide.softmax + posterior * wide.posterior)
        assert_within(dlogits[b, :T], share * (p - posterior), bound + rounding(share * (p - posterior), dtype) + 1e-37)
        assert not dlogits[b, T:].any()


@given(seeds, st.integers(2, 3))
def test_the_gradient_agrees_with_the_complex_step(seed, V):
    c = case(seed, B=2, N=4, V=V)

    def loss(logits):
        nll = 0
        for b, T in enumerate(c.frames):
            paths, said = alignments(int(T), V, c.blank)
            nll -= np.log(np.exp(log_probabilities(logits[b, :T], paths[said[tuple(c.targets[b, :c.counts[b]].tolist())]])).sum())
        return [nll / 2]

    dlogits = ctc_backward(1.0, ctc_forward(c.logits, c.targets, **c.lengths)[1])
    # The oracle's own sum over 81 paths of 4 products, in float64 as well.
    assert_within(dlogits, gradient(loss, [c.logits], [np.ones(())])[0], gamma(100, "float64") + 2 * max(sum(budget_of(c, b)[1:]) for b in range(2)))


@given(seeds, st.integers(0, 4))
def test_the_probabilities_of_all_targets_sum_to_one(seed, N):
    logits = np.random.default_rng(seed).standard_normal((1, N, 3))
    total = sum(math.exp(-ctc_forward(logits, np.array([labels], int).reshape(1, -1))[0]) for labels in alignments(N, 3, 0)[1])
    assert abs(total - 1) <= gamma(200, "float64") + budget(DTYPES[0], N, 3, N, 12).nll


# --- closed forms -------------------------------------------------------------------------------------------------------------------

@given(st.integers(0, 120), st.lists(st.integers(1, 3), max_size=12), st.sampled_from(DTYPES[:2]))
def test_equal_logits_count_the_alignments(N, labels, dtype):
    """With L labels, r of them equal to the one before, N frames have C(N + L - r, 2L) alignments: each label lasts a frame or more, r of the
    L + 1 gaps too, the others may be empty: the coefficient of x^N in x^(L+r) / (1-x)^(2L+1)."""
    L, r = len(labels), needed(labels) - len(labels)
    if N < L + r:
        with pytest.raises(ValueError, match=f"utterance 0 has {N} frames and its target needs {L + r}"):
            ctc_forward(np.zeros((1, N, 4), dtype), np.array([labels], int).reshape(1, L))
        return
    loss, _ = ctc_forward(np.zeros((1, N, 4), dtype), np.array([labels], int).reshape(1, L))
    expected = N * math.log(4) - math.log(math.comb(N + L - r, 2 * L))
    assert_within(loss, expected, budget(dtype, N, 4, L, 0).nll + rounding(expected, dtype))


@given(seeds)
def test_with_no_frame_to_spare_there_is_one_alignment(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 4, 7)
    path = [c for a, b in itertools.pairwise([0, *labels]) for c in ([0, b] if a == b else [b])]
    logits = rng.standard_normal((1, len(path), 4))
    loss, residuals = ctc_forward(logits, labels[None])
    p = np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True)
    wide = budget(DTYPES[0], len(path), 4, 7, float(np.ptp(logits[0], axis=-1).max()))
    assert_within(loss, -np.log(p[np.arange(len(path)), path]).sum(), 2 * wide.nll)
    one = np.eye(4)[path]
    assert_within(ctc_backward(1.0, residuals)[0], p - one, p * (2 * wide.softmax) + one * wide.posterior)


def test_what_is_certain_costs_nothing():
    logits = np.where(np.eye(3, dtype=bool)[[1, 1, 0, 1, 2]], 0, -np.inf)[None]
    loss, residuals = ctc_forward(logits, np.array([[1, 1, 2]]))
    assert loss == 0 and not ctc_backward(1.0, residuals).any()


# --- symmetries ---------------------------------------------------------------------------------------------------------------------

@given(seeds, st.sampled_from(DTYPES[:2]))
def test_time_reversed_is_the_same(seed, dtype):
    c = case(seed, dtype, B=1, N=30, V=6, L=9)
    T, n = int(c.frames[0]), int(c.counts[0])
    x, y = c.logits[:, :T], c.targets[:, :n]
    (a, ra), (b, rb) = ctc_forward(x, y, blank=c.blank), ctc_forward(x[:, ::-1], y[:, ::-1], blank=c.blank)
    wide = budget_of(c, 0)
    assert_within(a, float(b), 2 * wide.nll + rounding(float(b), dtype) * 4)
    assert_within(ctc_backward(1.0, ra), ctc_backward(1.0, rb)[:, ::-1].astype(float), 2 * (wide.softmax + wide.posterior))


@given(seeds, st.sampled_from(DTYPES[:2]))
def test_a_permuted_batch_gives_permuted_gradients(seed, dtype):
    c = case(seed, dtype, B=5, N=12, V=5, L=6)
    order = np.random.default_rng(seed).permutation(5)
    loss, residuals = ctc_forward(c.logits, c.targets, **c.lengths)
    other, permuted = ctc_forward(c.logits[order], c.targets[order], frame_lengths=c.frames[order], target_lengths=c.counts[order], blank=c.blank)
    np.testing.assert_array_equal(ctc_backward(2.0, permuted), ctc_backward(2.0, residuals)[order])
    assert_within(other, float(loss), gamma(12, "float64") * abs(float(loss)) + 2 * rounding(float(loss), dtype))


@given(seeds, st.sampled_from(DTYPES[:2]))
def test_symbols_renamed_rename_the_gradient(seed, dtype):
    """The blank among them. The order of the symbols is that of their sum, no more."""
    c = case(seed, dtype, B=2, N=12, V=5, L=6)
    new = np.random.default_rng(seed).permutation(5)
    renamed = np.empty_like(c.logits)
    renamed[..., new] = c.logits
    loss, residuals = ctc_forward(c.logits, c.targets, **c.lengths)
    other, r = ctc_forward(renamed, new[c.targets], **{**c.lengths, "blank": int(new[c.blank])})
    wide = [budget_of(c, b) for b in range(2)]
    assert_within(other, float(loss), 2 * max(w.nll for w in wide) + 4 * rounding(float(loss), dtype))
    assert_within(ctc_backward(1.0, r)[..., new], ctc_backward(1.0, residuals).astype(float), 2 * max(w.softmax + w.posterior for w in wide))


@given(seeds, dtypes, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_padding_changes_nothing(seed, dtype, garbage):
    c = case(seed, dtype, B=4, N=12, V=5, L=6)
    dirty, wrong = c.logits.copy(), c.targets.copy()
    dirty[np.arange(12) >= c.frames[:, None]] = garbage
    wrong[np.arange(wrong.shape[1]) >= c.counts[:, None]] = -1 - seed % 7
    clean, other = (ctc_forward(x, y, **c.lengths) for x, y in ((c.logits, c.targets), (dirty, wrong)))
    assert clean[0] == other[0]
    a, b = (ctc_backward(1.0, residuals) for _, residuals in (clean, other))
    np.testing.assert_array_equal(a, b)
    assert not b[np.arange(12) >= c.frames[:, None]].any()
    for decode in (ctc_greedy_decode, ctc_beam_decode):
        for x, y in zip(decode(c.logits, frame_lengths=c.frames), decode(dirty, frame_lengths=c.frames), strict=True):
            np.testing.assert_array_equal(x, y)


@given(seeds, st.sampled_from(DTYPES[:2]))
def test_an_utterance_does_not_see_the_others(seed, dtype):
    """Not their length, not their targets, not their NaN."""
    c = case(seed, dtype, B=3, N=12, V=5, L=6)
    dirty = c.logits.copy()
    dirty[1] = np.nan
    loss, residuals = ctc_forward(dirty, c.targets, **c.lengths)
    dlogits = ctc_backward(3.0, residuals)
    assert np.isnan(loss) == (c.frames[1] > 0) and np.isnan(dlogits[1, :c.frames[1]]).all()
    for b in (0, 2):
        T, n = c.frames[b], c.counts[b]
        alone = ctc_backward(1.0, ctc_forward(c.logits[b:b + 1, :T], c.targets[b:b + 1, :n], blank=c.blank)[1])
        assert_within(dlogits[b, :T], alone[0].astype(float), (budget_of(c, b).softmax + budget_of(c, b).posterior) * 2)


def test_a_likely_utterance_that_ends_early_does_not_help_the_next():
    """States of all utterances lie in one row: what has come to the end of the first must not go on as the start of the second, nor back."""
    x = np.zeros((2, 5, 3))
    x[:, :, 1] = np.array([[20.0], [-20.0]])
    nll = [float(ctc_forward(x[b:b + 1, :T], np.array([[1]]))[0]) for b, T in enumerate((2, 5))]
    for order in ([0, 1], [1, 0]):
        loss, residuals = ctc_forward(x[order], np.array([[1], [1]]), frame_lengths=np.array([2, 5])[order])
        assert_within(loss, sum(nll) / 2, 2 * budget(DTYPES[0], 5, 3, 1, 20).nll)
        alone = ctc_backward(0.5, ctc_forward(x[1:], np.array([[1]]))[1])
        assert_within(ctc_backward(1.0, residuals)[order.index(1)], alone[0], sum(budget(DTYPES[0], 5, 3, 1, 20)[1:]))


@given(seeds, dtypes)
def test_what_has_no_weight_changes_nothing(seed, dtype):
    c = case(seed, dtype, B=4, N=9, V=4, L=5)
    dirty, wrong, frames = c.logits.copy(), c.targets.copy(), c.frames.copy()
    dirty[1], wrong[1], frames[1] = np.nan, -1, 0                     # a target that those frames could not say, too
    lengths = {**c.lengths, "frame_lengths": frames}
    weights = np.array([2, 0, 1, 3])
    clean = ctc_forward(c.logits, c.targets, weights=weights, **c.lengths)
    for given_weights in (weights, weights.astype(dtype)):
        other = ctc_forward(dirty, wrong, weights=given_weights, **lengths)
        assert clean[0] == other[0]
        np.testing.assert_array_equal(ctc_backward(1.0, clean[1]), ctc_backward(1.0, other[1]))
    assert not ctc_backward(1.0, other[1])[1].any()
    mask = weights > 1
    assert ctc_forward(dirty, wrong, weights=mask, **lengths)[0] == ctc_forward(dirty, wrong, weights=mask.astype(int), **lengths)[0]
    loss, residuals = ctc_forward(dirty, wrong, weights=weights * 0, **lengths)
    assert loss == 0 and not ctc_backward(1.0, residuals).any()
    assert ctc_forward(c.logits, c.targets, weights=np.ones(4, int), **c.lengths)[0] == ctc_forward(c.logits, c.targets, **c.lengths)[0]


@given(seeds, st.sampled_from(DTYPES[:2]))
def test_layout_changes_nothing_and_inputs_are_left_alone(seed, dtype):
    c = case(seed, dtype, B=3, N=9, V=4, L=5)
    loss, residuals = ctc_forward(c.logits, c.targets, **c.lengths)
    dlogits = ctc_backward(2.0, residuals)
    for view in (np.asfortranarray(c.logits), np.repeat(c.logits, 2, 1)[:, ::2], c.logits[::-1, :, ::-1].copy()[::-1, :, ::-1]):
        before, view.flags.writeable = view.tobytes(), False
        other, r = ctc_forward(view, np.asfortranarray(c.targets.astype(np.int16)), **c.lengths)
        assert other == loss and view.tobytes() == before
        for _ in range(2):
            np.testing.assert_array_equal(ctc_backward(2.0, r), dlogits)


# --- far out ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_float32_stays_within_its_budget_over_a_thousand_frames(rng, scale):
    """A probability of e^-30000 is no number of any dtype; its logarithm is one."""
    x, y = np.float32(scale * rng.standard_normal((2, 1000, 5))), rng.integers(1, 5, (2, 150))
    (loss, r), (expected, r64) = ctc_forward(x, y), ctc_forward(x.astype(float), y)
    d, d64 = ctc_backward(1.0, r), ctc_backward(1.0, r64)
    R = float(np.ptp(x, axis=-1).max())
    assert_within(loss, expected, budget(DTYPES[1], 1000, 5, 150, R).nll + rounding(expected, "float32"))
    # A worst case of a thousand roundings in α would allow any gradient; but softmax and posterior have each their own total, at every frame:
    # sums of V and of 2L + 3 terms, twice.
    for gradients in (d, d64):
        assert_within(gradients.astype(float).sum(-1), np.zeros((2, 1000)), gamma(2 * (5 + 303) + 20, gradients.dtype) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand_give_numbers(dtype):
    x = np.array([[[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]]]).astype(dtype)
    loss, residuals = ctc_forward(x, np.array([[1]]))
    expected = math.log(3) + math.log(2) - math.log(1 + 1 + 1)        # (0, 0, 1), (0, 1, 0), (0, 1, 1), the others 0
    assert_within(loss, expected, budget(dtype, 3, 3, 1, 2e4).nll + rounding(expected, dtype))
    assert np.isfinite(ctc_backward(1.0, residuals)).all()


def test_a_target_of_probability_zero_costs_infinity_and_has_no_gradient():
    x = np.zeros((3, 4, 3))
    x[1, :, 2] = -np.inf
    loss, residuals = ctc_forward(x, np.array([[2], [2], [1]]))
    dlogits = ctc_backward(1.0, residuals)
    assert loss == np.inf and np.isnan(dlogits[1]).all()
    np.testing.assert_array_equal(dlogits[[0, 2]], ctc_backward(2 / 3, ctc_forward(x[[0, 2]], np.array([[2], [1]]))[1]))
    loss, residuals = ctc_forward(x[1:2], np.array([[1]]))            # the excluded symbol is not needed: C(5, 2) alignments of 2^4 paths
    assert_within(loss, 4 * math.log(2) - math.log(10), budget(DTYPES[0], 4, 3, 1, 0).nll)
    assert not ctc_backward(1.0, residuals)[..., 2].any()


@pytest.mark.parametrize(("B", "N", "L"), [(0, 4, 2), (2, 0, 0), (2, 4, 0), (0, 0, 0)])
def test_nothing_has_a_loss(B, N, L):
    logits = np.arange(B * N * 3.0).reshape(B, N, 3) % 5
    loss, residuals = ctc_forward(logits, np.zeros((B, L), int))
    p, wide = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), budget(DTYPES[0], N, 3, L, 4)
    assert_within(loss, -np.log(p[..., 0]).sum() / max(B, 1), 2 * wide.nll)
    assert_within(ctc_backward(1.0, residuals), (p - np.eye(3)[0]) / max(B, 1), 2 * wide.softmax + wide.posterior)
    assert [len(x) for x in ctc_greedy_decode(logits[:, :0])] == [len(x) for x in ctc_beam_decode(logits[:, :0])] == [0] * B


def test_cupy_arrays_give_the_same(cp):
    c = case(5, B=3, N=12, V=5, L=6)
    loss, residuals = ctc_forward(c.logits, c.targets, weights=np.array([1, 2, 1]), **c.lengths)
    other, r = ctc_forward(cp.asarray(c.logits), cp.asarray(c.targets), weights=cp.asarray(np.array([1, 2, 1])), **c.lengths)
    wide = [budget_of(c, b) for b in range(3)]
    assert_within(other.get(), loss, 2 * max(w.nll for w in wide))
    assert_within(ctc_backward(1.0, r).get(), ctc_backward(1.0, residuals), 2 * max(w.softmax + w.posterior for w in wide))
    for decode in (ctc_greedy_decode, ctc_beam_decode):
        assert [x.tolist() for x in decode(cp.asarray(c.logits))] == [x.tolist() for x in decode(c.logits)]


@given(seeds, st.sampled_from(DTYPES[:2]))
def test_torch_agrees(seed, dtype):
    torch = pytest.importorskip("torch", reason="compares with torch.nn.functional.ctc_loss; torch is not installed")
    c = case(seed, dtype, B=4, N=40, V=8, L=12)
    x = torch.tensor(c.logits, requires_grad=True)
    nll = torch.nn.functional.ctc_loss(x.log_softmax(-1).transpose(0, 1), torch.tensor(c.targets), torch.tensor(c.frames), torch.tensor(c.counts),
                                       blank=c.blank, reduction="none")
    nll.mean().backward()
    nll = float(nll.detach().mean())
    loss, residuals = ctc_forward(c.logits, c.targets, **c.lengths)
    wide = [budget_of(c, b) for b in range(4)]
    assert_within(loss, nll, 2 * max(w.nll for w in wide) + 4 * rounding(float(loss), dtype))
    assert_within(ctc_backward(1.0, residuals), x.grad.numpy().astype(float), max(w.softmax + w.posterior for w in wide) / 2)


# --- reading off --------------------------------------------------------------------------------------------------------------------

@given(seeds, st.sampled_from(DTYPES[:2]), st.integers(1, 3), st.integers(0, 6))
def test_greedy_says_what_the_best_path_says(seed, dtype, V, N):
    c = case(seed, dtype, B=2, N=N, V=V)
    paths, said = alignments(N, V, c.blank)
    for x, got in zip(c.logits, ctc_greedy_decode(c.logits, blank=c.blank), strict=True):
        best = int(log_probabilities(x.astype(float), paths).argmax())
        assert best in said[tuple(got.tolist())] and got.dtype.kind == "i"


@given(seeds, st.sampled_from(DTYPES[:2]), st.integers(1, 3), st.integers(0, 6))
def test_a_beam_of_any_width_finds_the_best_labels(seed, dtype, V, N):
    c = case(seed, dtype, B=2, N=N, V=V, scale=0.7)
    paths, said = alignments(N, V, c.blank)
    for x, got in zip(c.logits, ctc_beam_decode(c.logits, width=10**6, blank=c.blank), strict=True):
        share = np.exp(log_probabilities(x.astype(float), paths))
        assert tuple(got.tolist()) == max(said, key=lambda labels: share[said[labels]].sum())


@given(seeds)
def test_a_beam_follows_what_is_certain(seed):
    """Frames that leave no doubt: any width reads what greedy reads, repeats across a blank included."""
    path = np.random.default_rng(seed).integers(0, 3, 30)
    logits = np.where(np.eye(3, dtype=bool)[path], 0.0, -40.0)[None]
    for width in (1, 2, 16):
        assert ctc_beam_decode(logits, width=width)[0].tolist() == ctc_greedy_decode(logits)[0].tolist()


def test_a_narrow_beam_merges_a_prefix_that_it_reaches_twice():
    """Two frames of blank 0.5, 1: 0.3, 2: 0.2. "1" is (1, 1) and (1, 0), 0.24, and (0, 1), 0.15; "" is 0.25, more than either part."""
    logits = np.log(np.array([[[0.5, 0.3, 0.2]] * 2]))
    assert ctc_beam_decode(logits, width=3)[0].tolist() == [1]
    assert ctc_beam_decode(logits, width=1)[0].tolist() == []         # "1" was dropped after the first frame


def test_ties_go_to_what_stayed_and_to_the_lower_label():
    assert ctc_beam_decode(np.zeros((1, 1, 3)))[0].tolist() == ctc_greedy_decode(np.zeros((1, 1, 3)))[0].tolist() == []
    assert ctc_beam_decode(np.zeros((1, 1, 3)), blank=2)[0].tolist() == []
    assert ctc_greedy_decode(np.zeros((1, 1, 3)), blank=2)[0].tolist() == [0]
    likely = np.log([[[0.2, 0.4, 0.4]]])
    assert ctc_beam_decode(likely)[0].tolist() == ctc_greedy_decode(likely)[0].tolist() == [1]


def distance(a, b):
    """Levenshtein's, from its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=4), st.lists(st.integers(0, 2), max_size=4)), min_size=1, max_size=3))
def test_the_error_rate_counts_edits(pairs):
    pytest.importorskip("rapidfuzz", reason="the phoneme error rate needs rapidfuzz, extra speech, which is not installed")
    decoded, targets = ([np.array(x, int) for x in side] for side in zip(*pairs))
    said = sum(map(len, targets))
    if not said:
        with pytest.raises(ValueError, match="targets: expected at least one label in all, got none"):
            phoneme_error_rate(decoded, targets)
        return
    assert phoneme_error_rate(decoded, targets) == sum(distance(a, b) for a, b in pairs) / said
    names = ["AH", "B", "T"]
    assert phoneme_error_rate(*([[names[i] for i in x] for x in side] for side in (decoded, targets))) == phoneme_error_rate(decoded, targets)
    with pytest.raises(ValueError, match=f"decoded: expected as many sequences as targets, {len(targets)}, got {len(decoded) + 1}"):
        phoneme_error_rate([*decoded, []], targets)


def test_without_rapidfuzz_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(ImportError, match=r"needs rapidfuzz, .* pip install 'refattn\[speech\]'"):
        phoneme_error_rate([[1]], [[1]])


X = np.zeros((2, 4, 3))


@pytest.mark.parametrize(("logits", "targets", "options", "error", "words"), [
    (X, np.ones((2, 1)), {}, TypeError, "targets: expected integers, got float64"),
    (X, np.array([[1], [3]]), {}, ValueError, "targets: expected 0 ≤ label < V = 3, got values from 1 to 3"),
    (X, np.array([[1], [0]]), {}, ValueError, "targets: expected labels, got the blank, 0, in utterance 1"),
    (X, np.array([[1]]), {}, ValueError, r"targets: expected \(B, L\) = \(2, \*\), got \(1, 1\)"),
    (X, np.array([1, 1]), {}, ValueError, r"got \(2,\)"),
    (X[0], np.array([[1]]), {}, ValueError, r"logits: expected \(B, N, V\) with V ≥ 1, got \(4, 3\)"),
    (X.astype(int), np.array([[1], [1]]), {}, TypeError, "logits: expected float16"),
    (X, np.array([[1, 1, 1], [1, 2, 1]]), {}, ValueError, "frame_lengths: utterance 0 has 4 frames and its target needs 5, one for each of 3 labels"),
    (X, np.array([[1], [1]]), {"frame_lengths": [4, 0]}, ValueError, "utterance 1 has 0 frames and its target needs 1"),
    (X, np.array([[1], [1]]), {"frame_lengths": [4, 5]}, ValueError, "frame_lengths: expected 0 ≤ length ≤ N = 4, got values from 4 to 5"),
    (X, np.array([[1], [1]]), {"target_lengths": [1, 2]}, ValueError, "target_lengths: expected 0 ≤ length ≤ L = 1"),
    (X, np.array([[1], [1]]), {"target_lengths": [1.0, 1.0]}, TypeError, "target_lengths: expected integers, got float64"),
    (X, np.array([[1], [1]]), {"weights": np.ones(3)}, ValueError, r"weights: expected \(B,\) = \(2,\), got \(3,\)"),
    (X, np.array([[1], [1]]), {"weights": np.ones(2, "f4")}, TypeError, "weights is float32 and logits is float64"),
    (X, np.array([[1], [1]]), {"weights": np.array([1.0, -1.0])}, ValueError, "weights: expected finite numbers ≥ 0"),
    (X, np.array([[1], [1]]), {"blank": 3}, ValueError, "blank: expected 0 ≤ blank < V = 3, got 3"),
    (X, np.array([[1], [1]]), {"blank": 0.0}, TypeError, "blank: expected an integer, got 0.0"),
])
def test_what_is_wrong_is_said(logits, targets, options, error, words):
    with pytest.raises(error, match=words):
        ctc_forward(logits, targets, **options)


@pytest.mark.parametrize("decode", [ctc_greedy_decode, ctc_beam_decode])
def test_what_cannot_be_read_is_refused(decode):
    for garbage in (np.nan, np.inf):
        x = X.copy()
        x[1, 2, 1] = garbage
        with pytest.raises(ValueError, match="logits: expected numbers, got NaN or inf in utterance 1"):
            decode(x)
    with pytest.raises(ValueError, match="width: expected an integer ≥ 1, got 0"):
        ctc_beam_decode(X, width=0)
