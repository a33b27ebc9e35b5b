"""The paper's image generation (tables 1 and 2): a model reads an image value by value, says how probable each next one is, and draws images.

Values run from the top left to the bottom right, the three colours of a pixel one after another; ten logistics foretell each. Positions are
learned, and start as waves along rows, columns and colours, so that the value above is near to find from the first update on. The head counts
means in levels and starts with them spread over all, so that an update moves no mean past the narrow logistic of a level. --data has MNIST
(784 values) or CIFAR-10 (3,072); without it the model learns scikit-learn's digits, 64 values of 17 levels. The paper trains with RAdam and
1e-4, for days; the small models with Adam, a short warm-up, and a rate that falls to 0 along half a cosine. Gradients are clipped to norm 1.
Each system trains for the same time. The fall must know its end, whatever interrupts it: so a few updates are timed first, and the number of
them that --minutes are worth becomes the training's plan. The same command goes on where it was stopped.

In the folder: a checkpoint and results (JSON) of each system, and a figure of all systems trained so far; drawn images, and completions of
half-shown test images, of linear and softmax, which have a state to draw from. Bits per dimension are of test images spread evenly over all.
Those of LSH flatter it: the values that follow have a say in how the Reformer sorts those before them.
"""
from __future__ import annotations

import os
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refattn.demo import digits_load
from refattn.experiment import (COMPILED, CUPY, Params, Row, Task, arguments, curves_draw, epoch_part, figure_save, library, like, mosaics_save,
                                moved, require_extras, run, results_load, results_save, task_for_budget, train, training_open)
from refattn.generate import generate
from refattn.losses import bits, logistic_mixture_backward, logistic_mixture_forward, logistic_mixture_sample
from refattn.optim import AdamSlots, adam_step, clip_by_global_norm, cosine_rate, radam_step, warm_up
from refattn.transformer import Config, transformer_backward, transformer_forward, transformer_init

SYSTEMS, LOGISTICS, WARM_UP, TEMPERATURE = ("linear", "softmax", "lsh-1", "lsh-4"), 10, 50, 0.9
FILES, SHAPES = {"mnist": "mnist.npz", "cifar10": "cifar10_5k.npz"}, {"mnist": (28, 28), "cifar10": (32, 32, 3)}
# width, heads, layers, images an update, learning rate; test images that take about a minute (linear, small); rows of pictures
SCALES = {("digits", "small"): (64, 4, 3, 50, 4e-3), ("mnist", "small"): (128, 8, 4, 4, 2e-3), ("cifar10", "small"): (128, 4, 4, 2, 2e-3),
          ("mnist", "paper"): (256, 8, 8, 10, 1e-4), ("cifar10", "paper"): (256, 8, 16, 4, 1e-4)}
SMOKE = (16, 2, 2, 2, 4e-3)
TESTED, ROWS = {"digits": 297, "mnist": 2000, "cifar10": 500}, {"digits": 4, "mnist": 4, "cifar10": 2}
PAPER = {"mnist": {"linear": 0.644, "softmax": 0.621, "lsh-1": 0.745, "lsh-4": 0.676},
         "cifar10": {"linear": 3.40, "softmax": 3.47, "lsh-1": 3.39, "lsh-4": 3.51}}


class Images(NamedTuple):
    """Rows of values 0 … levels - 1; of the test images what they show, a number for each, and the word for each number."""

    train: np.ndarray
    test: np.ndarray
    label: np.ndarray
    words: tuple[str, ...]
    shape: tuple[int, ...]
    levels: int


def images_load(dataset: str, path: str | None) -> Images:
    """From `path`, a folder or the file itself: uint8 images x_train and x_test, or dx_train and dx_test, their differences along the width
    modulo 256, and y_test."""
    if dataset == "digits":
        scans = digits_load()
        return Images(scans.train, scans.test, scans.test_digit, tuple("0123456789"), (8, 8), 17)
    assert path is not None
    with np.load(os.path.join(path, FILES[dataset]) if os.path.isdir(path) else path) as file:
        train, test = (np.cumsum(file[f"dx_{part}"], axis=2, dtype=np.uint8) if f"dx_{part}" in file else file[f"x_{part}"]
                       for part in ("train", "test"))
        label, words = file["y_test"], tuple(file["names"]) if "names" in file else tuple("0123456789")
    for part, images in (("train", train), ("test", test)):
        if images.shape[1:] != SHAPES[dataset] or images.dtype != np.uint8:
            raise ValueError(f"{path}: expected x_{part} = (images, {', '.join(map(str, SHAPES[dataset]))}) of uint8, got {images.shape} of "
                             f"{images.dtype}; is it {dataset}?")
    return Images(train.reshape(len(train), -1), test.reshape(len(test), -1), label, words, SHAPES[dataset], 256)


def waves(shape: tuple[int, ...], width: int) -> np.ndarray:
    """(N, width): for each axis, sines and cosines from a quarter of a turn in all to one turn in two steps. Each vector has the length 1.
    The waves of `refattn.layers.sinusoidal_positions` are for thousands of positions: over 28 rows most of them would hardly move."""
    count = width // (2 * len(shape))
    parts = []
    for axis, n in enumerate(shape):
        angles = np.arange(n)[:, None] * np.geomspace(np.pi / (2 * n), np.pi, count)[::-1]
        along = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        parts.append(np.broadcast_to(along.reshape(n, *[1] * (len(shape) - 1 - axis), -1), (*shape, 2 * count)))
    found = np.concatenate(parts, axis=-1).reshape(-1, 2 * count * len(shape)) / np.sqrt(count * len(shape))
    return np.pad(found, [(0, 0), (0, width - found.shape[1])]).astype(np.float32)


def units(config: Config) -> np.ndarray:
    """(3K,) what the head's numbers are worth: the mixture's logits 1, means 2 / (V - 1), one of V levels between -1 and 1, log-scales 1."""
    return np.repeat([1, 2 / (config.vocabulary - 2), 1], config.outputs // 3)


def weights_init(seed: int, config: Config, shape: tuple[int, ...]) -> Params:
    params = transformer_init(np.random.default_rng(seed), config)
    none, means = np.zeros(config.outputs // 3), np.linspace(-1, 1, config.outputs // 3)
    bias = np.concatenate([none, means, none]) / units(config)
    return {**params, "positions.weight": waves(shape, config.width), "head.bias": bias.astype(np.float32)}


def shift(values: np.ndarray, config: Config) -> np.ndarray:
    """What the model reads when it foretells `values`: the start token, which is no level, and all of them but the last."""
    return np.concatenate([np.full((len(values), 1), config.vocabulary - 1), values[:, :-1]], axis=1)


def read(params: Params, config: Config, images: np.ndarray, rng: np.random.Generator) -> tuple[Any, ...]:
    """The logistics for each value, the values, and the residuals with what the head's numbers are worth."""
    values, worth = images.astype(np.int64), like(params, units(config).astype(params["head.bias"].dtype))
    numbers, residuals = transformer_forward(params, like(params, shift(values, config)), config, rng=rng)
    return numbers * worth, like(params, values), (worth, residuals)


def image_task(images: np.ndarray, config: Config, plan: dict[str, Any]) -> Task:
    def batch(update: int) -> tuple[Any, ...]:
        chosen = epoch_part(update, plan["batch"], len(images), plan["seed"])
        return images[chosen], np.random.default_rng([plan["seed"], 1, update])              # the rotations of LSH, new in each update

    def loss_and_grads(params: Params, batch: Any) -> tuple[float, Params]:
        logistics, values, (worth, residuals) = read(params, config, *batch)
        loss, r_loss = logistic_mixture_forward(logistics, values, levels=config.vocabulary - 1)
        return float(loss), transformer_backward(logistic_mixture_backward(1.0, r_loss) * worth, residuals)

    def optimize(params: Params, grads: Params, slots: AdamSlots, update: int) -> tuple[Params, AdamSlots]:
        grads = clip_by_global_norm(grads, 1.0)[0]
        if plan["scale"] == "paper":
            return radam_step(params, grads, slots, learning_rate=plan["rate"])
        rate = warm_up(update, WARM_UP) * cosine_rate(update, plan["rate"], plan["updates"])
        return adam_step(params, grads, slots, learning_rate=rate)

    return Task({**plan, "images": len(images), **config._asdict()}, batch, loss_and_grads, optimize)


def image_test(params: Params, config: Config, images: np.ndarray, size: int) -> Row:
    """Mean bits per dimension, and what it may be off by because there are more images than these: its standard error."""
    rng, each = np.random.default_rng(2**32), []
    for i in range(0, len(images), size):
        logistics, values, _ = read(params, config, images[i: i + size], rng)
        each += [float(bits(logistic_mixture_forward(x, v, levels=config.vocabulary - 1)[0])) for x, v in zip(logistics, values, strict=True)]
    return {"test bits": float(np.mean(each)), "standard error": float(np.std(each) / len(each) ** 0.5)}


def draw(path: str, params: Params, config: Config, images: Images, rng: np.random.Generator, rows: int) -> None:
    """Save `rows` rows of ten drawn images, and a test image of each kind, whole, its upper half, and that half completed `rows` times."""
    N, half = config.length, config.length // 2
    sample = lambda numbers, rng, temperature: logistic_mixture_sample(numbers * units(config), rng, levels=images.levels, temperature=temperature)
    go_on = partial(generate, params, config, rng=rng, temperature=TEMPERATURE, draw=sample)
    originals = images.test[[np.flatnonzero(images.label == kind)[0] for kind in range(10)]].astype(np.int64)
    drawn = go_on(np.full((10 * rows, 1), config.vocabulary - 1), N)[:, 1:]
    completed = go_on(np.tile(shift(originals, config)[:, : 1 + half], (rows, 1)), N - half)[:, 1:]
    shown = np.where(np.arange(N) < half, originals, np.nan)

    def bright(values: np.ndarray) -> np.ndarray:                   # ink is black
        x = values.reshape(-1, 10, *images.shape) / (images.levels - 1)
        return x if len(images.shape) == 3 else 1 - x

    mosaics_save(f"{path}-drawn.png", [(f"Drawn value after value by the {config.attention} model, temperature {TEMPERATURE}", [""] * rows,
                                        bright(drawn))], [""] * 10)
    mosaics_save(f"{path}-completed.png", [(f"Test images: shown the upper half, the {config.attention} model draws the lower half",
                                            ["original", "shown half", *(f"completion {i + 1}" for i in range(rows))],
                                            bright(np.concatenate([originals, shown, completed])))], images.words)


# --- the command -----------------------------------------------------------------------------------------------------------------------------

def figure(path: str, results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    curves_draw(drawn.subplots(1, 2, sharey=True), results, SYSTEMS, {"updates": lambda row: row["update"],
                                                                      "minutes of processor time": lambda row: row["seconds"] / 60},
                ("bits per dimension, training", lambda row: bits(row["loss"])))
    figure_save(path, drawn)


def main() -> None:
    parser = arguments(__doc__, out=os.path.join("out", "images"), minutes=30.0)
    parser.add_argument("--data", metavar="PATH", help=f"folder of {' and '.join(FILES.values())}, or the file (default: scikit-learn's digits)")
    parser.add_argument("--dataset", choices=("digits", *FILES), help="(default: mnist with --data, digits without)")
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="train this one; may be repeated (default: all, one after another)")
    parser.add_argument("--scale", choices=("small", "paper"), default="small", help="size of the models (default: %(default)s)")
    parser.add_argument("--test", type=int, metavar="COUNT", help="test images (default: about a minute's)")
    parser.add_argument("--cupy", action="store_true", help=CUPY)
    parser.add_argument("--compiled", action="store_true", help=COMPILED)
    chosen = parser.parse_args()
    dataset = chosen.dataset or ("mnist" if chosen.data else "digits")
    scale = "smoke" if chosen.smoke else chosen.scale
    if dataset != "digits" and chosen.data is None:
        parser.error(f"argument --dataset: {dataset} is not in the package; name its file, or the folder of {FILES[dataset]}, by --data")
    if (dataset, scale) == ("digits", "paper"):
        parser.error("argument --scale: the paper has mnist and cifar10, not digits")
    if chosen.test is not None and chosen.test < 1:
        parser.error(f"argument --test: expected at least one image, got {chosen.test}")
    require_extras("safetensors", "tqdm", "matplotlib", *(["sklearn"] if dataset == "digits" else []))
    xp, images = library(chosen.cupy), images_load(dataset, chosen.data)
    tested = min(chosen.test or (4 if chosen.smoke else TESTED[dataset]), len(images.test))
    test, N = images.test[np.arange(tested) * len(images.test) // tested], images.test.shape[1]
    print(f"{dataset}{'' if chosen.data else ' (of scikit-learn, since there is no --data)'}: {N:,} values of {images.levels} levels; "
          f"{len(images.train):,} images to learn from, {tested:,} of {len(images.test):,} to test with", flush=True)
    width, heads, layers, size, rate = SCALES[dataset, scale] if scale != "smoke" else SMOKE
    plan = {"dataset": dataset, "scale": scale, "seed": chosen.seed, "minutes": None if chosen.smoke else chosen.minutes, "batch": size, "rate": rate}
    name = lambda system, ending="": os.path.join(chosen.out, f"{dataset}-{scale}-{system}{ending}")
    for system in chosen.system or SYSTEMS:
        config = Config(images.levels + 1, N, width, heads, layers, 4 * width, attention=system, outputs=3 * LOGISTICS,
                        compiled=chosen.compiled and system == "linear")
        path, init = name(system, ".safetensors"), lambda config=config: weights_init(chosen.seed, config, images.shape)
        some = lambda updates, config=config: image_task(images.train, config, {**plan, "updates": updates})
        task = some(4) if chosen.smoke else task_for_budget(path, some, init, 60 * chosen.minutes, range(3), xp)
        state, updates = training_open(path, task, init, xp), task.plan["updates"]
        print(f"{system}: {sum(x.size for x in state.params.values()):,} weights, from update {state.update:,} of {updates:,}", flush=True)
        every = max(updates // 200, 1)
        state = train(path, task, state, updates=updates, loss=lambda nats: f"{bits(nats):.3f} bits/dim",
                      measured=lambda update, every=every: update % every == 0)
        results_save(name(system, ".json"), {"plan": task.plan, "updates": state.update, "seconds": state.seconds, "bits": bits(state.loss),
                                             **image_test(state.params, config, test, size), "test images": tested,
                                             "paper": PAPER.get(dataset, {}).get(system), "history": state.history})
        if not system.startswith("lsh"):
            draw(name(system), moved(np, state.params), config, images, np.random.default_rng([chosen.seed, 2]), 1 if chosen.smoke else ROWS[dataset])
            print(f"   pictures: {name(system)}-drawn.png, {name(system)}-completed.png", flush=True)
    results = {system: r for system in SYSTEMS if (r := results_load(name(system, ".json")))}
    figure(os.path.join(chosen.out, f"{dataset}-{scale}.png"), results)
    print(f"\n{'':<37} {'bits per dimension':^36}\n{'system':<8} {'updates':>8} {'minutes':>8} {'a second':>9}   "
          f"{'training':>9} {'test':>15} {'images':>7} {'paper':>6}")
    for system, r in results.items():
        print(f"{system:<8} {r['updates']:>8,} {r['seconds'] / 60:>8.1f} {r['updates'] / r['seconds']:>9.2f}   {r['bits']:>9.3f} "
              f"{r['test bits']:>7.3f} ± {r['standard error']:.3f} {r['test images']:>7,} {r['paper'] or '':>6}")
    print(f"\nfigure: {os.path.join(chosen.out, f'{dataset}-{scale}.png')}")


if __name__ == "__main__":
    run(main)
