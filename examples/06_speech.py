"""The paper's speech experiment (table 3): linear, softmax, LSH attention and a Bi-LSTM learn to write down phonemes, with the CTC loss.

--data names the folder of an4_logmel.npz (948 utterances to learn from, 130 to test on: spelled names, dates, numbers) or kathleen_logmel.npz
(992 and 111 read sentences of one speaker), 40 log-mel bands a frame; without it the speech is made up: phonemes that are random spectra, held
for a few frames, in noise. Bands are normalised by what there is to learn from. In training up to two spans of frames and two of bands are
hidden in each utterance, and its first position starts up to two frames late.

Adam with 1e-3, warmed up, then falling to 0 along half a cosine; gradients are clipped to norm 1; batches of eight utterances of like length.
The fall must know its end. So an epoch is timed first, and the updates that --minutes are worth by it become the training's plan; --epochs
says directly how many. The test set is read once an epoch, for the curve; nothing is chosen by it.

The paper trains on 80 hours (WSJ), 9 layers of 6 heads. Here it is 45 minutes of speech and, in the small scale, 4 layers of 6 heads of 32 and
three frames a position; the Bi-LSTM has as many weights as they. --scale paper has the paper's layers and heads, and its Bi-LSTM of 3 layers of
320; heads of 32 and one frame a position are our reading of it.

The same command goes on where it was stopped. In the folder: a checkpoint and results (JSON) of each system, and a figure of all systems
trained so far. Seconds an epoch are of one more epoch at the end, whose result is thrown away.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from refattn.experiment import (CUPY, Params, Row, Task, arguments, curves_draw, epoch_part, figure_save, library, like, require_extras, run,
                                results_load, results_save, task_for_budget, train, training_open, update_seconds)
from refattn.layers import affine_backward, affine_forward
from refattn.losses import ctc_backward, ctc_beam_decode, ctc_forward, ctc_greedy_decode, phoneme_error_rate
from refattn.lstm import bilstm_backward, bilstm_forward, bilstm_init
from refattn.optim import AdamSlots, adam_step, clip_by_global_norm, cosine_rate, warm_up
from refattn.transformer import Config, transformer_backward, transformer_forward, transformer_init

SYSTEMS, BATCH, BANDS = ("linear", "softmax", "lsh-4", "bilstm"), 8, 40
RATE, WARM_UP, SPANS, LONGEST_SPAN = 1e-3, 200, 2, 30
# frames a position; width, heads and layers of transformers; features each way and layers of the Bi-LSTM
SCALES = {"small": (3, 192, 6, 4, 172, 3), "paper": (1, 192, 6, 9, 320, 3), "smoke": (3, 12, 2, 1, 5, 1)}


# --- speech --------------------------------------------------------------------------------------------------------------------------------

class Corpus(NamedTuple):
    """Log-mel frames (n, 40) of each utterance, and its phonemes as numbers from 1 on, of which there are `phonemes`; which are for the test."""

    name: str
    frames: list[np.ndarray]
    labels: list[np.ndarray]
    phonemes: int
    test: np.ndarray

    def part(self, test: bool) -> Corpus:
        chosen = np.flatnonzero(self.test == test)
        return self._replace(frames=[self.frames[i] for i in chosen], labels=[self.labels[i] for i in chosen], test=self.test[chosen])


def corpus_load(folder: str, name: str) -> Corpus:
    with np.load(os.path.join(folder, f"{name}_logmel.npz")) as file:
        z = {key: file[key] for key in file.files if key not in ("text", "utt")}
    frames = z["feat"] * z["feat_step"] + z["feat_min"]
    cut = lambda x, offsets: np.split(x, offsets[1:-1])
    count = len(z["frame_offsets"]) - 1
    return Corpus(name, cut(frames, z["frame_offsets"]), cut(z["phone_ids"].astype(int) + 1, z["phone_offsets"]), len(z["phones"]),
                  z.get("is_test", np.arange(count) % 10 == 0))


def corpus_made_up(count: int) -> Corpus:
    """Ten phonemes, five to fifteen an utterance, none twice in a row, four to twelve frames each. The same ones whatever the run's seed."""
    rng, phonemes = np.random.default_rng(2**32), 10
    spectra, frames, labels = rng.standard_normal((phonemes, BANDS)), [], []
    for _ in range(count):
        said = np.cumsum(rng.integers(1, phonemes, rng.integers(5, 16))) % phonemes
        held = np.repeat(spectra[said], rng.integers(4, 13, said.size), axis=0)
        frames.append((held + 3 * rng.standard_normal(held.shape)).astype(np.float32))
        labels.append(said + 1)
    return Corpus("made-up-speech", frames, labels, phonemes, np.arange(count) % 10 == 0)


def normalised(corpus: Corpus) -> Corpus:
    """Each band with the mean 0 and the deviation 1 over what there is to learn from."""
    known = np.concatenate(corpus.part(False).frames).astype(np.float64)
    mean, scale = known.mean(0).astype(np.float32), known.std(0).astype(np.float32)
    return corpus._replace(frames=[(x - mean) / scale for x in corpus.frames])


def masked(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Spans of frames and spans of bands are set to 0, the mean: two of each (Park et al., 2019), at most a sixth of the whole and 30 long."""
    frames = frames.copy()
    for view in (frames, frames.T):
        for _ in range(SPANS):
            span = rng.integers(0, min(len(view) // 6, LONGEST_SPAN) + 1)
            start = rng.integers(0, len(view) - span + 1)
            view[start: start + span] = 0
    return frames


def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(B, N, ...) with zeros behind each row's end, and where those are (B,)."""
    lengths = np.array([len(row) for row in rows])
    out = np.zeros((len(rows), lengths.max(), *rows[0].shape[1:]), rows[0].dtype)
    for row, into in zip(rows, out, strict=True):
        into[: len(row)] = row
    return out, lengths


def utterances(corpus: Corpus, chosen: np.ndarray, together: int, rng: np.random.Generator | None = None) -> tuple[np.ndarray, ...]:
    """Vectors (B, N, 40·together), N (B,), labels (B, L), L (B,). With `rng`, for training, parts are hidden, and positions may start a frame
    or two late. Frames that are left over at the end are not read."""
    rows = []
    for i in chosen:
        x = corpus.frames[i]
        if rng is not None:
            x = masked(x, rng)[rng.integers(together):]
        rows.append(x[: len(x) // together * together].reshape(-1, together * BANDS))
    return *padded(rows), *padded([corpus.labels[i] for i in chosen])


# --- systems -------------------------------------------------------------------------------------------------------------------------------

class Model(NamedTuple):
    """Vectors (B, N, F), N (B,) and a generator in, logits (B, N, 1 + phonemes) out: symbol 0 is the blank."""

    config: dict[str, Any]
    init: Callable[[np.random.Generator], Params]
    forward: Callable[[Params, np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, Any]]
    backward: Callable[[np.ndarray, Any], Params]


def model_of(system: str, scale: str, symbols: int) -> Model:
    together, width, heads, layers, hidden, deep = SCALES[scale]
    if system == "bilstm":
        return bilstm(together * BANDS, hidden, deep, symbols)
    config = Config(symbols, 1, width, heads, layers, 4 * width, attention=system, causal=False, positions="sinusoidal", features=together * BANDS)
    return Model(config._asdict(), lambda rng: transformer_init(rng, config),
                 lambda params, x, lengths, rng: transformer_forward(params, x, config, lengths=lengths, rng=rng), transformer_backward)


def bilstm(features: int, hidden: int, layers: int, symbols: int) -> Model:
    def init(rng: np.random.Generator) -> Params:
        head = rng.standard_normal((2 * hidden, symbols)) / np.sqrt(2 * hidden)
        return {**bilstm_init(rng, "lstm", features, hidden, layers=layers), "head.weight": head.astype(np.float32),
                "head.bias": np.zeros(symbols, np.float32)}

    def forward(params: Params, x: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
        out, _, residuals = bilstm_forward(params, "lstm", x, layers=layers, lengths=lengths)
        logits, r_head = affine_forward(out, params["head.weight"], params["head.bias"])
        return logits, (residuals, r_head)

    def backward(dlogits: np.ndarray, residuals: Any) -> Params:
        dout, dweight, dbias = affine_backward(dlogits, residuals[1])
        return {**bilstm_backward(dout, None, residuals[0])[2], "head.weight": dweight, "head.bias": dbias}

    return Model({"features": features, "hidden": hidden, "layers": layers, "symbols": symbols}, init, forward, backward)


def read(params: Params, model: Model, x: np.ndarray, lengths: np.ndarray, labels: np.ndarray, counts: np.ndarray,
         rng: np.random.Generator) -> tuple[Any, Any, np.ndarray, Any]:
    """Loss in nats a phoneme and what its backward needs, logits and what theirs needs."""
    logits, residuals = model.forward(params, like(params, x), lengths, rng)
    loss, r_loss = ctc_forward(logits, like(params, labels), frame_lengths=lengths, target_lengths=counts)
    per_phoneme = len(counts) / counts.sum()
    return loss * per_phoneme, (per_phoneme, r_loss), logits, residuals


def speech_task(system: str, scale: str, corpus: Corpus, plan: dict[str, Any], updates: int) -> Task:
    seed, model, known = plan["seed"], model_of(system, scale, corpus.phonemes + 1), corpus.part(False)
    lengths = np.array([len(x) for x in known.frames])

    def batch(update: int) -> tuple[Any, ...]:
        rng = np.random.default_rng([seed, 1, update])                           # what is hidden, and the rotations of LSH
        return *utterances(known, epoch_part(update, BATCH, len(lengths), seed, lengths), SCALES[scale][0], rng), rng

    def loss_and_grads(params: Params, batch: Any) -> tuple[float, Params]:
        loss, (per_phoneme, r_loss), _, residuals = read(params, model, *batch)
        return float(loss), model.backward(ctc_backward(per_phoneme, r_loss), residuals)

    def optimize(params: Params, grads: Params, slots: AdamSlots, update: int) -> tuple[Params, AdamSlots]:
        rate = warm_up(update, WARM_UP) * cosine_rate(update, RATE, updates)
        return adam_step(params, clip_by_global_norm(grads, 1.0)[0], slots, learning_rate=rate)

    return Task({**plan, "system": system, "scale": scale, "updates": updates, **model.config}, batch, loss_and_grads, optimize)


def speech_test(params: Params, system: str, scale: str, corpus: Corpus, **decoders: Callable[..., list[np.ndarray]]) -> Row:
    """On utterances that no training saw: nats a phoneme, and the phoneme error rate of each way to decode."""
    model, rng, unseen = model_of(system, scale, corpus.phonemes + 1), np.random.default_rng(2**32), corpus.part(True)
    order = np.argsort([len(x) for x in unseen.frames])
    nats, decoded = 0.0, {name: [] for name in decoders}
    for chosen in np.array_split(order, -(-len(order) // (2 * BATCH))):
        x, lengths, labels, counts = utterances(unseen, chosen, SCALES[scale][0])
        loss, _, logits, _ = read(params, model, x, lengths, labels, counts, rng)
        nats += float(loss) * int(counts.sum())
        for name, decode in decoders.items():
            decoded[name] += decode(logits, frame_lengths=lengths)
    said = [unseen.labels[i] for i in order]
    return {"test loss": nats / sum(len(labels) for labels in said), **{name: phoneme_error_rate(found, said) for name, found in decoded.items()}}


# --- the command -----------------------------------------------------------------------------------------------------------------------------

def figure(path: str, results: dict[str, Any], name: str, per_epoch: int) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    curves_draw(axes, results, SYSTEMS, {"epochs": lambda row: row["update"] / per_epoch,
                                         "minutes of processor time": lambda row: row["seconds"] / 60},
                (f"phoneme errors, test set of {name}, %", lambda row: 100 * row["greedy"]))
    axes[0].set_ylim(bottom=0)
    figure_save(path, drawn)


def main() -> None:
    parser = arguments(__doc__, out=os.path.join("out", "speech"), minutes=25.0)
    parser.add_argument("--data", metavar="FOLDER", help="where the corpus is (default: made-up speech)")
    parser.add_argument("--corpus", choices=("an4", "kathleen"), default="an4", help="which one (default: %(default)s)")
    parser.add_argument("--epochs", type=int, metavar="E", help="so many instead of --minutes")
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="train this one; may be repeated (default: all, one after another)")
    parser.add_argument("--scale", choices=("small", "paper"), default="small", help="size of the models (default: %(default)s)")
    parser.add_argument("--cupy", action="store_true", help=CUPY)
    chosen = parser.parse_args()
    if chosen.epochs is not None and chosen.epochs < 1:
        parser.error(f"argument --epochs: expected a positive number of epochs, got {chosen.epochs}")
    require_extras("safetensors", "tqdm", "matplotlib")
    xp = library(chosen.cupy)
    phoneme_error_rate([[1]], [[1]])                                             # says that rapidfuzz is missing now, not after an epoch
    scale, epochs = ("smoke", 2) if chosen.smoke else (chosen.scale, chosen.epochs)
    corpus = corpus_load(chosen.data, chosen.corpus) if chosen.data else corpus_made_up(40 if chosen.smoke else 1000)
    if chosen.smoke:
        corpus = corpus._replace(frames=corpus.frames[:40], labels=corpus.labels[:40], test=np.arange(40) % 10 == 0)
    corpus = normalised(corpus)
    per_epoch = int((~corpus.test).sum()) // BATCH
    print(f"{corpus.name}: {(~corpus.test).sum()} utterances to learn from, {corpus.test.sum()} to test on, {corpus.phonemes} phonemes"
          + ("" if chosen.data else "; with --data, real speech"), flush=True)
    plan = {"seed": chosen.seed, "corpus": corpus.name, "epochs": epochs, "minutes": None if epochs else chosen.minutes}
    name = lambda system, ending: os.path.join(chosen.out, f"{scale}-{corpus.name}-{system}{ending}")
    for system in chosen.system or SYSTEMS:
        path, init = name(system, ".safetensors"), lambda system=system: model_of(system, scale, corpus.phonemes + 1).init(
            np.random.default_rng(chosen.seed))
        some = lambda updates, system=system: speech_task(system, scale, corpus, plan, updates)
        test = lambda params, system=system, **decoders: speech_test(params, system, scale, corpus, greedy=ctc_greedy_decode, **decoders)
        if not epochs and not os.path.exists(path):
            print(f"{system}: an epoch is timed", flush=True)
        task = some(epochs * per_epoch) if epochs else task_for_budget(path, some, init, 60 * chosen.minutes, range(per_epoch), xp)
        state = training_open(path, task, init, xp)
        weights = sum(x.size for x in state.params.values())
        print(f"{system}: {weights:,} weights, from update {state.update} of {task.plan['updates']}, {per_epoch} an epoch", flush=True)
        end = task.plan["updates"]
        state = train(path, task, state, updates=end, measure=test, measured=lambda update, end=end: update % per_epoch == 0 or update == end,
                      loss="{:.3f} nats a phoneme".format)
        wall, processor = (per_epoch * seconds for seconds in update_seconds(state, task, range(per_epoch)))
        results_save(name(system, ".json"), {
            "plan": task.plan, "weights": weights, "updates": state.update, "epochs": state.update / per_epoch, "seconds": state.seconds,
            "epoch": {"wall": wall, "processor": processor}, "loss": state.loss, **test(state.params, beam=ctc_beam_decode),
            "history": state.history})
    results = {system: r for system in SYSTEMS if (r := results_load(name(system, ".json")))}
    figure(os.path.join(chosen.out, f"{scale}-{corpus.name}.png"), results, corpus.name, per_epoch)
    print(f"\n{'':<8} {'':>10} {'':>7} {'':>8} {'seconds an epoch':>17}  {'nats a phoneme':>15}  {'phoneme errors':>15}")
    print(f"{'system':<8} {'weights':>10} {'epochs':>7} {'minutes':>8} {'processor':>10} {'wall':>6}  {'training':>8} {'test':>6}  "
          f"{'greedy':>7} {'beam':>7}")
    for system, r in results.items():
        print(f"{system:<8} {r['weights']:>10,} {r['epochs']:>7.1f} {r['seconds'] / 60:>8.1f} {r['epoch']['processor']:>10.1f} "
              f"{r['epoch']['wall']:>6.1f}  {r['loss']:>8.3f} {r['test loss']:>6.3f}  {r['greedy']:>7.2%} {r['beam']:>7.2%}")
    print(f"\nfigure: {os.path.join(chosen.out, f'{scale}-{corpus.name}.png')}")


if __name__ == "__main__":
    run(main)
