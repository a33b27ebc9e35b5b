"""The paper's copy task (fig. 2): linear, softmax and LSH attention learn to write the second w of 0 w 0 w.

w has 63 of ten symbols in half of the sequences, which are then 128 long, and 32 to 63 in the others; batches of 64; the loss is that of the
second w alone; a tenth of the learning rate from update 3,000 on. The paper trains with RAdam and 1e-3, of which less than half is let through
in the first 500 updates; the small models, whose time is short, train with Adam and 6e-3 after 100 updates of warm-up. Gradients are clipped to
norm 1. Each system trains for the same time. The same command goes on where it was stopped, with more --minutes too. In the folder: a checkpoint
and results (JSON) of each system, and a figure of all systems trained so far.
"""
from __future__ import annotations

import os
from typing import Any

import numpy as np

from refattn.experiment import (COMPILED, CUPY, Params, Row, Task, arguments, curves_draw, figure_save, library, like, require_extras, run,
                                results_load, results_save, train, training_open)
from refattn.losses import cross_entropy_backward, cross_entropy_forward
from refattn.optim import AdamSlots, adam_step, clip_by_global_norm, dropped_rate, radam_step, warm_up
from refattn.transformer import Config, transformer_backward, transformer_forward, transformer_init

SYSTEMS, SYMBOLS, BATCH, EVERY = ("linear", "softmax", "lsh-1", "lsh-4"), 10, 64, 20
# width, heads, layers and the longest w; the paper gives layers and heads, its authors' code heads of 32
SCALES = {"small": (128, 4, 2, 63), "paper": (256, 8, 4, 63), "smoke": (16, 2, 2, 7)}


def copy_batch(rng: np.random.Generator, count: int, shortest: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (count, 2·longest + 2) that start with 0 w 0 w, w of `longest` symbols 1 … 10 or, every other time, of `shortest` or more; and how
    long each w is."""
    n, w = rng.integers(shortest, longest + 1, count), rng.integers(1, SYMBOLS + 1, (count, longest))
    n = np.where(rng.random(count) < 0.5, longest, n)
    i = np.arange(2 * longest + 2) % (n[:, None] + 1)                            # where in 0 w
    tokens = np.where(i == 0, 0, np.take_along_axis(w, np.maximum(i - 1, 0), axis=1))
    return np.where(np.arange(2 * longest + 2) < 2 * n[:, None] + 2, tokens, 0), n


def read(params: Params, config: Config, tokens: np.ndarray, n: np.ndarray, rng: np.random.Generator) -> tuple[Any, ...]:
    """Logits and what follows each token, true where that is in the second w, and the residuals."""
    i = np.arange(tokens.shape[1] - 1)
    second = (i > n[:, None]) & (i < 2 * n[:, None] + 1)
    tokens, targets, second = like(params, (tokens[:, :-1], tokens[:, 1:], second))
    logits, residuals = transformer_forward(params, tokens, config, lengths=2 * n + 1, rng=rng)
    return logits, targets, second, residuals


def copy_task(system: str, scale: str, seed: int, compiled: bool = False) -> tuple[Task, Config]:
    width, heads, layers, longest = SCALES[scale]
    config = Config(SYMBOLS + 1, 2 * longest + 1, width, heads, layers, 4 * width, attention=system, positions="sinusoidal", activation="relu",
                    compiled=compiled and system == "linear")
    step, rate = (radam_step, 1e-3) if scale == "paper" else (adam_step, 6e-3)

    def batch(update: int) -> tuple[Any, ...]:
        rng = np.random.default_rng([seed, 1, update])                           # the rotations of LSH are drawn anew in each update
        return (*copy_batch(rng, BATCH, longest // 2 + 1, longest), rng)

    def loss_and_grads(params: Params, batch: Any) -> tuple[float, Params]:
        logits, targets, second, residuals = read(params, config, *batch)
        loss, r_loss = cross_entropy_forward(logits, targets, weights=second)
        return float(loss), transformer_backward(cross_entropy_backward(1.0, r_loss), residuals)

    def optimize(params: Params, grads: Params, slots: AdamSlots, update: int) -> tuple[Params, AdamSlots]:
        scheduled = dropped_rate(update, rate, 3000, rate / 10) * (1.0 if step is radam_step else warm_up(update, 100))
        return step(params, clip_by_global_norm(grads, 1.0)[0], slots, learning_rate=scheduled)

    return Task({"system": system, "scale": scale, "seed": seed, **config._asdict()}, batch, loss_and_grads, optimize), config


def copy_test(params: Params, config: Config, count: int, shortest: int | None = None) -> Row:
    """On w that no training saw, all of full length or drawn as in training from `shortest` on: loss in nats, symbols that are right when those
    before them are given, and sequences that are right throughout, which is how many the model would copy by itself, taking the likeliest symbol
    each time."""
    rng, longest = np.random.default_rng(2**32), config.length // 2
    logits, targets, second, _ = read(params, config, *copy_batch(rng, count, shortest or longest, longest), rng)
    right = logits.argmax(-1) == targets
    return {"test loss": float(cross_entropy_forward(logits, targets, weights=second)[0]), "accuracy": float(right[second].mean()),
            "whole": float((right | ~second).all(1).mean())}


def figure(path: str, results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    curves_draw(axes, results, SYSTEMS, {"updates": lambda row: row["update"], "minutes of processor time": lambda row: row["seconds"] / 60},
                ("loss of the second half, nats", lambda row: row["loss"]))
    axes[0].set_yscale("log")
    figure_save(path, drawn)


def main() -> None:
    parser = arguments(__doc__, out=os.path.join("out", "copy"), minutes=90.0)
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="train this one; may be repeated (default: all, one after another)")
    parser.add_argument("--scale", choices=("small", "paper"), default="small", help="size of the models (default: %(default)s)")
    parser.add_argument("--cupy", action="store_true", help=CUPY)
    parser.add_argument("--compiled", action="store_true", help=COMPILED)
    chosen = parser.parse_args()
    require_extras("safetensors", "tqdm", "matplotlib")
    xp = library(chosen.cupy)
    scale, count = ("smoke", 8) if chosen.smoke else (chosen.scale, BATCH)
    budget: dict[str, float] = {"updates": 2 * EVERY} if chosen.smoke else {"seconds": 60 * chosen.minutes}
    name = lambda system, ending: os.path.join(chosen.out, f"{scale}-{system}{ending}")
    for system in chosen.system or SYSTEMS:
        task, config = copy_task(system, scale, chosen.seed, chosen.compiled)
        init = lambda config=config: transformer_init(np.random.default_rng(chosen.seed), config)
        state = training_open(name(system, ".safetensors"), task, init, xp)
        print(f"{system}: {sum(x.size for x in state.params.values()):,} weights, from update {state.update}", flush=True)
        state = train(name(system, ".safetensors"), task, state, measured=lambda update: update % EVERY == 0, **budget,
                      measure=lambda params, config=config: copy_test(params, config, count))
        results_save(name(system, ".json"), {
            "plan": task.plan, "updates": state.update, "seconds": state.seconds, "loss": state.loss, **copy_test(state.params, config, 4 * count),
            "shorter": copy_test(state.params, config, 4 * count, config.length // 4 + 1)["accuracy"], "history": state.history})
    results = {system: r for system in SYSTEMS if (r := results_load(name(system, ".json")))}
    figure(os.path.join(chosen.out, f"{scale}.png"), results)
    print(f"\n{'system':<8} {'updates':>8} {'minutes':>8} {'a second':>9} {'loss':>8} {'test loss':>10} {'accuracy':>9} {'whole':>7} "
          f"{'shorter too':>12}")
    for system, r in results.items():
        print(f"{system:<8} {r['updates']:>8,} {r['seconds'] / 60:>8.1f} {r['updates'] / r['seconds']:>9.2f} {r['loss']:>8.4f} "
              f"{r['test loss']:>10.4f} {r['accuracy']:>9.2%} {r['whole']:>7.1%} {r['shorter']:>12.2%}")
    print(f"\nfigure: {os.path.join(chosen.out, scale)}.png")


if __name__ == "__main__":
    run(main)
