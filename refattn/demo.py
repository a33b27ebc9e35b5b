"""`python -m refattn demo`: the paper's claim on real scans, from the equations to pictures, in about three minutes.

    1. every form of attention is fed with handwritten digits and held against its definition
    2. a causal linear transformer learns to predict each pixel from the pixels before it:  p(x) = Π_i p(x_i | x_<i)
    3. the same weights, run as an RNN (eq. (16) to (20) of the paper), draw digits and complete half-shown ones
    4. that RNN is timed beside softmax attention of the same size, with a key/value cache and recomputed

The digits are those that scikit-learn carries: 1,797 scans of 8 × 8 pixels with 17 levels of ink, so sequences of 64 tokens out of 17.
Training is a fixed number of updates, not a fixed time: where it stops, and so every weight, does not depend on how fast or how often
interrupted the machine is. A checkpoint holds all that the next update depends on.
"""
from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import oracle
from ._blocks import cores
from .attention import causal_linear_attention, causal_linear_attention_step, linear_attention
from .causal import (causal_chunked_backward, causal_chunked_forward, causal_masked_backward, causal_masked_forward, causal_scan_backward,
                     causal_scan_forward, causal_step)
from .experiment import (EXTRAS, Params, Task, Training, arguments, epoch_part, mosaics_save, require_extras, train,
                         training_open)
from .generate import generate, generate_recomputed
from .losses import bits, cross_entropy_backward, cross_entropy_forward
from .optim import AdamSlots, clip_by_global_norm, cosine_rate, radam_step, warm_up
from .softmax import softmax_attention, softmax_step
from .testing import budgets
from .transformer import Config, transformer_backward, transformer_forward, transformer_init, transformer_step, transformer_step_init

LEVELS, SIDE = 17, 8
PIXELS = SIDE * SIDE
ANY = 10
HELD_OUT = 297
UPDATES_PER_MINUTE = 400          # on two ordinary cores
TEMPERATURE = 0.8                 # what is drawn is a little surer than the model is: fewer stray pixels


class Plan(NamedTuple):
    """All that decides the trained weights, beside the data and the machine's arithmetic. A checkpoint is resumed only by the same plan."""

    seed: int
    updates: int
    batch: int = 50
    learning_rate: float = 4e-3
    warm_up: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    width: int = 64
    heads: int = 4
    layers: int = 3

    def config(self, attention: str = "linear", length: int = PIXELS) -> Config:
        return Config(vocabulary=LEVELS, length=length, width=self.width, heads=self.heads, layers=self.layers,
                      feed_forward=4 * self.width, attention=attention)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0 done, 1 wrong (said on stderr), 130 interrupted (the same command goes on)."""
    chosen = arguments(__doc__, prog="python -m refattn demo", out=os.path.join("out", "demo"), minutes=2.0,
                       budget=f"training budget, counted as {UPDATES_PER_MINUTE} updates a minute on every machine").parse_args(argv)
    plan = (Plan(chosen.seed, updates=12, batch=20, warm_up=2, width=16, heads=2, layers=2) if chosen.smoke else
            Plan(chosen.seed, updates=max(round(chosen.minutes * UPDATES_PER_MINUTE), 1)))
    require_extras(*EXTRAS)
    scans = digits_load()
    path = os.path.join(chosen.out, "checkpoint.safetensors")
    try:
        start = training_open(path, digits_task(plan, scans.train, scans.train_digit), lambda: params_init(plan))
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    try:
        demo(chosen.out, path, plan, scans, start, few=chosen.smoke)
    except KeyboardInterrupt:
        print(f"\ndemo: stopped; the same command goes on from {path}", file=sys.stderr)
        return 130
    return 0


def demo(out: str, checkpoint: str, plan: Plan, scans: Scans, start: Training, *, few: bool = False) -> None:
    """All four parts, printed as they come; the picture goes to the folder `out`. `few`: less to draw and to time."""
    _say(f"refattn demo: NumPy {np.__version__}, {cores()} cores, seed {plan.seed}, folder {out}")
    _say(f"\n{len(scans.train) + len(scans.test):,} handwritten digits, {SIDE} × {SIDE} pixels of {LEVELS} levels of ink: "
         f"{len(scans.train):,} to learn from, {len(scans.test)} held out")

    _say("\n1. Every form of attention on these scans, against its definition in float64\n")
    _say(f"   {'form':<44} {'worst error':>11}  {'bound there':>11}  error / bound")
    for line in agreement(scans.train[: 2 if few else 8]):
        _say(f"   {line.form:<44} {line.error:11.1e}  {line.bound:11.1e}  {line.ratio:.3f}")
        if not line.ratio <= 1:
            raise AssertionError(f"{line.form}: its error is {line.ratio:.3g} times the derived bound; the forms disagree on this machine")

    config = plan.config()
    weights = sum(x.size for x in start.params.values())
    _say(f"\n2. Training: a causal linear transformer: {plan.layers} layers, width {plan.width}, {plan.heads} heads, {weights:,} weights,\n"
         f"   float32; {plan.updates} updates of {plan.batch} images (a fixed number: an interrupted run ends with the same weights)\n")
    state = train_digits(checkpoint, plan, scans, start)
    _say("\n" + bits_table(state.params, config, scans))
    _say(f"   trained in {state.seconds:.0f} s, interruptions left out")

    _say("\n3. The same weights as an RNN, a pixel at a time\n")
    apart, rounding = twins(state.params, config, scans.test[:50])
    _say(f"   logits on 50 held-out scans: parallel and RNN differ by at most {apart:.1e}, parallel float32 and float64 by {rounding:.1e}")
    path = os.path.join(out, "digits.png")
    draw(path, state.params, config, scans, np.random.default_rng([plan.seed, 2]), rows=1 if few else 3)
    _say(f"   drawn and completed digits: {path}")

    _say("\n4. Images per second, the same model size, float32, all in one run\n")
    _say(speed_table(plan, few=few))


def _say(line: str) -> None:
    print(line, flush=True)


# --- the data --------------------------------------------------------------------------------------------------------------------------

class Scans(NamedTuple):
    """Images as rows of 64 levels 0 … 16, top left to bottom right, and which digit each of them is."""

    train: np.ndarray
    train_digit: np.ndarray
    test: np.ndarray
    test_digit: np.ndarray


def digits_load() -> Scans:
    """scikit-learn's bundled scans, shuffled once for good, the last 297 held out. Nothing is downloaded."""
    from sklearn.datasets import load_digits

    images, digit = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))       # not the run's seed: figures of different seeds can be compared
    tokens, digit = images[order].astype(np.int64), digit[order].astype(np.int64)
    return Scans(tokens[:-HELD_OUT], digit[:-HELD_OUT], tokens[-HELD_OUT:], digit[-HELD_OUT:])


def shift(images: np.ndarray, digit: np.ndarray | None = None) -> np.ndarray:
    """What the model reads when it predicts `images`: the digit (10 stands for any), x_0, …, x_62.

    The first token is one of the same seventeen; its position tells it from ink.

    >>> shift(np.array([[3, 1, 2]])), shift(np.array([[3, 1, 2]]), np.array([7]))
    (array([[10,  3,  1]]), array([[7, 3, 1]]))
    """
    first = np.full(len(images), ANY) if digit is None else digit
    return np.concatenate([first[:, None], images[:, :-1]], axis=1)


# --- the baseline ----------------------------------------------------------------------------------------------------------------------

def histogram_fit(images: np.ndarray) -> np.ndarray:
    """p (N, 17): how often each pixel has each level, one added to every count (Laplace), so that nothing is impossible.

    >>> histogram_fit(np.array([[0], [0], [1]]))[0, :3] * 20
    array([3., 2., 1.])
    """
    counts = np.stack([np.bincount(pixel, minlength=LEVELS) for pixel in images.T]) + 1.0
    return counts / counts.sum(axis=1, keepdims=True)


def histogram_bits(histogram: np.ndarray, images: np.ndarray) -> float:
    """Mean of -log2 p_i(x_i): bits per pixel if all pixels were independent. `histogram` (N, 17), or (B, N, 17): one for each image."""
    each = np.broadcast_to(histogram, (*images.shape, LEVELS))
    return float(-np.log2(np.take_along_axis(each, images[..., None], axis=-1)).mean())


# --- 1: the forms agree ----------------------------------------------------------------------------------------------------------------

class Agreement(NamedTuple):
    form: str
    error: float
    bound: float
    ratio: float


def agreement(images: np.ndarray) -> Iterator[Agreement]:
    """Each form on `images`: its largest error, the bound at that element, and the largest ratio of error to bound anywhere.

    Two heads read each scan row by row and column by column. Position i's key is the 3 × 3 pixels around it, its query the same turned
    half round, its value the five pixels of a cross: D = 9, M = 5. As integers they make every sum exact, in float32 too (64·9·16³ < 2²⁴):
    the bound is 0. Scaled to [-1, 1] they go through φ, division and exp, and meet a bound of rounding errors.
    """
    square, cross = _neighbourhoods(images)
    yield from _agreement_on_integers(square, cross)
    k, v = (square / 8 - 1).astype(np.float32), (cross / 8 - 1).astype(np.float32)
    q = k[..., ::-1].copy()
    for causal in (True, False):
        sees = "causal" if causal else "all"
        truth, size = (oracle.linear_attention(q, k, x, causal=causal) for x in (v, np.abs(v)))
        # φ: 8 roundings for each of q and k; D products and N sums above and below the line; one division
        bound = budgets.gamma(2 * (16 + 9 + PIXELS) + 2, np.float32) * size
        yield _compare(f"linear attention, {sees}", [linear_attention(q, k, v, causal=causal)], [truth], [bound])
        if causal:
            head, state = causal_linear_attention(q[..., :21, :], k[..., :21, :], v[..., :21, :])
            tail, _ = causal_linear_attention(q[..., 21:, :], k[..., 21:, :], v[..., 21:, :], state)
            yield _compare("linear attention, causal, in two pieces", [np.concatenate([head, tail], -2)], [truth], [bound])
            yield _compare("linear attention, causal, as an RNN", [_stepwise(causal_linear_attention_step, q, k, v)], [truth], [bound])
        truth, size = (oracle.softmax_attention(q, k, x, causal=causal) for x in (v, np.abs(v)))
        # a score is off by at most γ·|q|·|k|/√D, its difference to the largest score by twice that; exp makes it relative, in both sums
        score = 2 * budgets.gamma(9 + 3, np.float32) * (np.abs(q) @ np.abs(k).mT).max(-1, keepdims=True).astype(np.float64) / 3
        bound = (np.expm1(2 * score) + budgets.gamma(2 * (8 + PIXELS) + 2, np.float32)) * size
        yield _compare(f"softmax attention, {sees}", [softmax_attention(q, k, v, causal=causal)], [truth], [bound])
        if causal:
            yield _compare("softmax attention, causal, from its cache", [_stepwise(softmax_step, q, k, v)], [truth], [bound])


def _agreement_on_integers(square: np.ndarray, cross: np.ndarray) -> Iterator[Agreement]:
    k, v = square.astype(np.float32), cross.astype(np.float32)
    q, dout = k[..., ::-1].copy(), v[..., ::-1].copy()
    zero = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]), np.float32)
    truth, _ = oracle.recurrence(q, k, v)
    gradients = oracle.recurrence_gradients(q, k, v, zero, dout, zero)
    for name, forward, backward in (("masked", causal_masked_forward, causal_masked_backward),
                                    ("chunked", causal_chunked_forward, causal_chunked_backward),
                                    ("scan", causal_scan_forward, causal_scan_backward)):
        out, _, residuals = forward(q, k, v)
        yield _compare(f"causal sum on integers, {name}", [out], [truth], [0])
        yield _compare(f"causal sum on integers, {name}, backward", backward(dout, None, residuals), gradients, [0] * 4)
    state, out = zero, np.empty_like(v)
    for i in range(PIXELS):
        out[..., i, :], state = causal_step(state, q[..., i, :], k[..., i, :], v[..., i, :])
    yield _compare("causal sum on integers, as an RNN", [out], [truth], [0])


def _stepwise(step: Callable[..., tuple[np.ndarray, Any]], q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    state, out = None, np.empty_like(v)
    for i in range(q.shape[-2]):
        out[..., i, :], state = step(q[..., i, :], k[..., i, :], v[..., i, :], state)
    return out


def _neighbourhoods(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, 2, 64, 9) and (B, 2, 64, 5): the pixels around each pixel, read along rows (head 0) and along columns (head 1)."""
    scans = images.reshape(-1, SIDE, SIDE)
    both = np.pad(np.stack([scans, scans.mT], axis=1), ((0, 0), (0, 0), (1, 1), (1, 1)))
    square = np.lib.stride_tricks.sliding_window_view(both, (3, 3), axis=(2, 3)).reshape(len(scans), 2, PIXELS, 9)
    return square, square[..., [1, 3, 4, 5, 7]]


def _compare(form: str, actual: Sequence[np.ndarray], expected: Sequence[np.ndarray], bounds: Sequence[Any]) -> Agreement:
    """The worst of several outputs: the one whose error is the largest part of its bound."""
    worst = Agreement(form, 0.0, 0.0, -1.0)
    for a, e, b in zip(actual, expected, bounds):
        error, b, ratio = np.abs(a.astype(np.float64) - e), np.broadcast_to(b, e.shape), budgets.worst_ratio(a, e, b)
        if ratio > worst.ratio:
            at = np.unravel_index(np.argmax(error), error.shape)
            worst = Agreement(form, float(error[at]), float(b[at]), ratio)
    return worst


# --- 2: training, interrupted at any moment --------------------------------------------------------------------------------------------

def params_init(plan: Plan) -> Params:
    """What training starts from.

    Tokens and positions start five times smaller than `transformer_init` makes them: from so few images the model then learns more of what
    pixels have in common, and less by heart (about 1.90 instead of 1.95 bits per held-out pixel).
    """
    params = transformer_init(np.random.default_rng(plan.seed), plan.config())
    return params | {name: params[name] / 5 for name in ("token.weight", "positions.weight")}


def digits_task(plan: Plan, images: np.ndarray, digit: np.ndarray) -> Task:
    """Every other image comes with its digit, so that one model learns to draw what it is asked for and to go on without being told."""
    def batch(update: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = epoch_part(update, plan.batch, len(images), plan.seed)
        return images[chosen], np.where(np.arange(plan.batch) % 2, ANY, digit[chosen])

    def loss_and_grads(params: Params, batch: tuple[np.ndarray, np.ndarray]) -> tuple[float, Params]:
        logits, residuals = transformer_forward(params, shift(*batch), plan.config())
        loss, r_loss = cross_entropy_forward(logits, batch[0])
        return float(loss), transformer_backward(cross_entropy_backward(1.0, r_loss), residuals)

    def optimize(params: Params, grads: Params, slots: AdamSlots, update: int) -> tuple[Params, AdamSlots]:
        rate = warm_up(update, plan.warm_up) * cosine_rate(update, plan.learning_rate, plan.updates)
        return radam_step(params, clip_by_global_norm(grads, plan.clip)[0], slots, learning_rate=rate, weight_decay=plan.weight_decay)

    return Task(plan._asdict(), batch, loss_and_grads, optimize)


def train_digits(path: str, plan: Plan, scans: Scans, state: Training) -> Training:
    """From `state` to the last update of the plan; tells its bits eight times on the way."""
    _say(f"   {'update':>6}  {'seconds':>7}  {'training':>8}  {'held out':>8}   bits per pixel")
    for row in state.history:
        _say(_history_row(row))
    if state.update:
        _say(f"   {path}: going on from update {state.update}" if state.update < plan.updates else f"   {path}: trained already")

    def measure(params: Params) -> dict[str, float]:
        seen, held_out = (bits_per_pixel(params, x, plan.config()) for x in (scans.train[:HELD_OUT], scans.test))
        return {"training": seen, "held out": held_out}

    return train(path, digits_task(plan, scans.train, scans.train_digit), state, updates=plan.updates, measure=measure,
                 measured={round(plan.updates * part / 8) for part in range(1, 9)}.__contains__, show=lambda row: _say(_history_row(row)),
                 loss=lambda nats: f"{bits(nats):.3f} bits per pixel")


def _history_row(row: dict[str, float]) -> str:
    return f"   {row['update']:6.0f}  {row['seconds']:7.1f}  {row['training']:8.3f}  {row['held out']:8.3f}"


def bits_per_pixel(params: Params, images: np.ndarray, config: Config, digit: np.ndarray | None = None) -> float:
    """Mean of -log2 p(x_i | x_<i) over all pixels of all images, or p(x_i | x_<i, digit): a code of that many bits could store them."""
    nats = 0.0
    for i in range(0, len(images), 100):
        some, told = images[i: i + 100], None if digit is None else digit[i: i + 100]
        logits, _ = transformer_forward(params, shift(some, told), config)
        nats += float(cross_entropy_forward(logits, some)[0]) * len(some)
    return float(bits(nats / len(images)))


def bits_table(params: Params, config: Config, scans: Scans) -> str:
    """The model beside what it has to beat, on the images it learnt from and on those it never saw."""
    sides = ((scans.train, scans.train_digit), (scans.test, scans.test_digit))
    alone = histogram_fit(scans.train)
    by_digit = np.stack([histogram_fit(scans.train[scans.train_digit == d]) for d in range(10)])
    rows = {"uniform: log2 17": [math.log2(LEVELS)] * 2,
            "histogram of each pixel": [histogram_bits(alone, x) for x, _ in sides],
            "linear transformer": [bits_per_pixel(params, x, config) for x, _ in sides],
            "histogram, told the digit": [histogram_bits(by_digit[d], x) for x, d in sides],
            "linear transformer, told the digit": [bits_per_pixel(params, x, config, d) for x, d in sides]}
    return "\n".join([f"   {'bits per pixel':<36} {'training':>8}  {'held out':>8}",
                      *(f"   {name:<36} {a:8.3f}  {b:8.3f}" for name, (a, b) in rows.items())])


# --- 3: drawing ------------------------------------------------------------------------------------------------------------------------

def twins(params: Params, config: Config, images: np.ndarray) -> tuple[float, float]:
    """The largest difference between the logits in parallel and as an RNN; for scale, that between float32 and float64 in parallel."""
    tokens = shift(images)
    parallel, _ = transformer_forward(params, tokens, config)
    exact, _ = transformer_forward({name: x.astype(np.float64) for name, x in params.items()}, tokens, config)
    state, apart = transformer_step_init(config, len(images), parallel.dtype), 0.0
    for i in range(PIXELS):
        logits, state = transformer_step(params, tokens[:, i], state, config)
        apart = max(apart, float(np.abs(logits - parallel[:, i]).max()))
    return apart, float(np.abs(parallel - exact).max())


def draw(path: str, params: Params, config: Config, scans: Scans, rng: np.random.Generator, *, rows: int) -> None:
    """Draw each digit `rows` times; complete the lower half of ten held-out scans as often, untold what they are; save one PNG."""
    half, digits = PIXELS // 2, np.arange(10)
    drawn = generate(params, config, np.tile(digits, rows)[:, None], PIXELS, rng, temperature=TEMPERATURE)[:, 1:]
    originals = scans.test[[np.flatnonzero(scans.test_digit == digit)[0] for digit in digits]]
    prompt = np.tile(shift(originals)[:, : 1 + half], (rows, 1))
    completed = generate(params, config, prompt, PIXELS - half, rng, temperature=TEMPERATURE)[:, 1:]
    shown = np.where(np.arange(PIXELS) < half, originals, np.nan)
    completions = {f"completion {i + 1}": completed[10 * i: 10 * i + 10] for i in range(rows)}
    _figure(path, drawn.reshape(rows, 10, PIXELS), {"shown half": shown, **completions, "original": originals})


def _figure(path: str, drawn: np.ndarray, completions: dict[str, np.ndarray]) -> None:
    blocks = ((f"Asked for 0 to 9, the linear transformer draws pixel after pixel (temperature {TEMPERATURE})", [""] * len(drawn), drawn),
              ("Held-out scans: shown the upper half, it draws the lower half", list(completions), np.stack(list(completions.values()))))
    mosaics_save(path, [(title, names, 1 - levels.reshape(-1, 10, SIDE, SIDE) / (LEVELS - 1)) for title, names, levels in blocks],
                 [str(digit) for digit in range(10)])


# --- 4: speed --------------------------------------------------------------------------------------------------------------------------

def speed_table(plan: Plan, *, few: bool = False) -> str:
    """How many images each model draws per second, the best of three turns. The weights are fresh ones, which does not change the time.

    At the digits' 64 pixels a cache is still short; the second column has MNIST's 784, without the recomputation, which would take minutes.
    """
    ways = {"linear, as an RNN": ("linear", generate), "softmax, key/value cache": ("softmax", generate),
            "softmax, recomputed": ("softmax", generate_recomputed)}
    columns = [(PIXELS, 2 if few else 32, list(ways)), (80 if few else 784, 2 if few else 16, list(ways)[:2])]
    header, lines = f"   {'':<26}", {name: f"   {name:<26}" for name in ways}
    for pixels, batch, names in columns:
        seconds = dict.fromkeys(names, math.inf)
        for _ in range(3):
            for name in names:
                attention, draw_images = ways[name]
                config = plan.config(attention, pixels)
                params = transformer_init(np.random.default_rng(plan.seed), config)
                start = time.perf_counter()
                draw_images(params, config, np.full((batch, 1), ANY), pixels, np.random.default_rng(plan.seed))
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        header += f"{f'{pixels} pixels, {batch} at once':>27}"
        for name in ways:
            rate = f"{batch / seconds[name]:.2f} {f'(× {max(seconds.values()) / seconds[name]:.1f})':>10}" if name in seconds else ""
            lines[name] += f"{rate:>27}"
    return "\n".join([header, *(line.rstrip() for line in lines.values())])
