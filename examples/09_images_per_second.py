"""How many images a second each model draws, at the paper's own sizes (tables 1 and 2): MNIST 784 pixels and 8 layers, CIFAR-10 3,072 and 16.

All have 8 heads of 32, a feed-forward of 1,024 and ten logistics for each pixel; the weights are random, which does not change the time.

    linear               one step for each pixel: always the same time, so any pixel tells
    stateful softmax     one step for each pixel, from a cache of those before: takes longer from pixel to pixel
    softmax, lsh-R       nothing is kept: for each pixel all those before are read again, as the paper's tables have it

An image is the sum over its pixels. Where the time depends on the pixel it is measured at three of them, the points of Gauss's rule, whose
weighted sum is exact for polynomials up to degree five; these times are one of degree two. Images are independent, so that each core draws its
own: as many processes as cores, each with one thread, at the same time. Each system has the batch, out of several, that is best for it.

Where `pytorch-fast-transformers` is installed, a step of its recurrent model takes turns with ours, both on all cores; ours reads tokens and
gives mixtures, while theirs is measured without either. The activation is relu, the default there.

Beside the ratio of times stands that of flops: what is arithmetic, and what is left is efficiency.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from refattn._blocks import cores
from refattn.bench import installed_peers, medians, processor
from refattn.decoding import decoding_step
from refattn.experiment import COMPILED, figure_save, require_extras, results_save, run_apart
from refattn.transformer import Config, transformer_forward, transformer_init, transformer_prefill, transformer_step_init

# pixels and layers; and the paper's images a second on a GPU (tables 1 and 2)
SIZES = {"mnist": (784, 8), "cifar10": (3072, 16)}
PAPER = {"mnist": {"softmax": 0.45, "lsh-1": 0.68, "lsh-4": 0.27, "linear": 142.8},
         "cifar10": {"softmax": 0.004, "lsh-1": 0.015, "lsh-4": 0.005, "linear": 17.85}}
GAUSS = [((1 - math.sqrt(0.6)) / 2, 5 / 18), (0.5, 8 / 18), ((1 + math.sqrt(0.6)) / 2, 5 / 18)]
NUMBERS = 2**27                   # in the caches of a process: half a gigabyte; a batch that would need more is left out
BATCHES = {"linear": (1, 16, 64, 128, 192, 256), "softmax": (1, 2, 4, 8, 16), "lsh-1": (1, 2), "lsh-4": (1, 2)}


def model(pixels: int, layers: int, attention: str, compiled: bool = False, heads: int = 8, size: int = 32) -> tuple[Any, Config]:
    config = Config(257, pixels, heads * size, heads, layers, 4 * heads * size, attention=attention, activation="relu",
                    positions="sinusoidal", outputs=30, compiled=compiled)       # positions: a step may be timed for longer than an image
    return transformer_init(np.random.default_rng(0), config), config


def seconds_of(f: Callable[[], Any], least: float, most: float = math.inf) -> float:
    """The median of as many runs as take `least` seconds together, at most `most`, after one that is not counted."""
    f()
    times: list[float] = []
    while not times or sum(times) < least and len(times) < most:
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def point(system: str, pixels: int, layers: int, batch: int, least: float, compiled: bool = False) -> dict[str, float]:
    """Seconds that an image takes in this process, which draws `batch` at once. Reading a prefix anew is what softmax does where nothing is kept,
    and what makes the cache that a step is timed with."""
    params, config = model(pixels, layers, system, compiled and system == "linear")
    if system == "linear":
        step = decoding_step(params, config, transformer_step_init(config, batch))
        return {system: pixels * seconds_of(partial(step, np.zeros(batch, int)), least) / batch}
    found = dict.fromkeys(("softmax", "stateful softmax") if system == "softmax" else (system,), 0.0)
    for at, weight in GAUSS:
        tokens = np.zeros((batch, round(at * pixels)), int)
        if system == "softmax":
            state = transformer_prefill(params, tokens, config)[1]
            taken = [seconds_of(partial(transformer_prefill, params, tokens, config), least),
                     seconds_of(partial(decoding_step(params, config, state), tokens[:, 0]), least, most=16)]      # each one pixel further
        else:
            taken = [seconds_of(lambda tokens=tokens: transformer_forward(params, tokens, config, rng=np.random.default_rng(0)), least)]
        for name, seconds in zip(found, taken, strict=True):
            found[name] += weight * pixels * seconds / batch
    return found


def on_all_cores(*arguments: str) -> dict[str, float]:
    """`point` in as many processes as cores at the same time: seconds from one image to the next."""
    with ThreadPoolExecutor(cores()) as pool:
        found = list(pool.map(lambda _: run_apart(__file__, "--point", *arguments), range(cores())))
    return {name: 1 / sum(1 / f[name] for f in found) for name in found[0]}


def flops_ratio(pixels: int, layers: int, width: int = 256, heads: int = 8) -> float:
    """Softmax recomputed over linear: 2·12 E² for the products with weights, and 4·E·n for attention over n positions or 4·E·D for a state."""
    dense = 24 * width**2
    recomputed = sum(n * (dense + 4 * width * n) for n in range(1, pixels + 1))
    return recomputed / (pixels * (dense + 4 * width * width // heads))


def theirs(pixels: int, layers: int, batches: list[int], least: float, compiled: bool = False) -> list[dict[str, Any]]:
    """A step of the authors' recurrent model, and of ours in turn with it."""
    torch = installed_peers()["torch"]
    from fast_transformers.builders import RecurrentEncoderBuilder
    encoder = RecurrentEncoderBuilder.from_kwargs(attention_type="linear", n_layers=layers, n_heads=8, query_dimensions=32, value_dimensions=32,
                                                  feed_forward_dimensions=1024, activation="relu").get().eval()
    params, config = model(pixels, layers, "linear", compiled)
    rows = []
    for batch in batches:
        tokens, x = np.zeros(batch, int), torch.zeros(batch, config.width)
        step = decoding_step(params, config, transformer_step_init(config, batch))
        with torch.no_grad():
            _, memory = encoder(x)

            def their_step(x: Any = x, memory: Any = memory) -> Any:
                with torch.no_grad():
                    return encoder(x, state=memory)

            t = medians({"ours": partial(step, tokens), "theirs": their_step}, least)
        rows.append({"batch": batch, **t})
    return rows


def sizes(dataset: str, smoke: bool) -> tuple[int, int, float]:
    """Pixels, layers, and the least time that is spent on a figure."""
    return (12, 2, 0.0) if smoke else (*SIZES[dataset], 2.0)


def measure(dataset: str, smoke: bool, compiled: bool = False) -> dict[str, Any]:
    pixels, layers, least = sizes(dataset, smoke)
    found: dict[str, dict[str, Any]] = {}
    options = [option for option, chosen in (("--smoke", smoke), ("--compiled", compiled)) if chosen]
    for system, batches in BATCHES.items():
        for batch in batches[:2] if smoke else batches:
            if system == "softmax" and 2 * batch * pixels * layers * 2 * 256 > NUMBERS:
                continue
            for name, seconds in on_all_cores(dataset, system, str(batch), *options).items():
                print(f"   {dataset} {name}: {batch} at once on each core, {seconds:.3g} s an image", file=sys.stderr, flush=True)
                if name not in found or seconds < found[name]["seconds"]:
                    found[name] = {"batch": batch, "seconds": seconds}
    return {"pixels": pixels, "layers": layers, "cores": cores(), "flops ratio": flops_ratio(pixels, layers), "systems": found,
            "steps": theirs(pixels, layers, [1, 64], least, compiled) if "fast_transformers" in installed_peers() else []}


def table(dataset: str, of: dict[str, Any]) -> str:
    paper, systems = PAPER[dataset], of["systems"]
    lines = [f"{dataset}: {of['pixels']:,} pixels, {of['layers']} layers; recomputed softmax has {of['flops ratio']:,.0f} times the flops of linear",
             f"{'':<18} {'at once':>9} {'s an image':>11} {'images/s':>10} {'× softmax':>10} {'paper, GPU':>11} {'× softmax':>10}"]
    for system in ("softmax", "stateful softmax", "lsh-1", "lsh-4", "linear"):
        batch, seconds = f"{of['cores']} × {systems[system]['batch']}", systems[system]["seconds"]
        lines.append(f"{system:<18} {batch:>9} {seconds:>11.3g} {1 / seconds:>10.3g} {systems['softmax']['seconds'] / seconds:>10.3g} "
                     + (f"{paper[system]:>11.3g} {paper[system] / paper['softmax']:>10.0f}" if system in paper else f"{'–':>11} {'–':>10}"))
    for row in of["steps"]:
        lines.append(f"a step of {row['batch']:>2}: {row['ours'] * 1e3:.2f} ms; the authors' recurrent model {row['theirs'] * 1e3:.2f} ms, "
                     f"{row['theirs'] / row['ours']:.2f} times as long")
    return "\n".join(lines)


def figure(path: str, results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.2), layout="constrained")
    for ax, (dataset, of) in zip(np.atleast_1d(drawn.subplots(1, len(results))), results.items(), strict=True):
        names = ["softmax", "lsh-4", "lsh-1", "stateful softmax", "linear"]
        rates = [1 / of["systems"][name]["seconds"] for name in names]
        ax.barh(names, rates, color=["C1", "C3", "C2", "C4", "C0"])
        ax.bar_label(ax.containers[0], [f"{rate:.3g}" for rate in rates], padding=3)
        ax.set(xscale="log", xlabel="images a second", title=f"{dataset}, {of['pixels']:,} pixels", xlim=(min(rates) / 2, max(rates) * 6))
    figure_save(path, drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join("out", "images-per-second"), metavar="FOLDER",
                        help="where results and figure go (default: %(default)s)")
    parser.add_argument("--dataset", choices=tuple(SIZES), action="append", help="this one only; may be repeated (default: both)")
    parser.add_argument("--smoke", action="store_true", help="tiny models, to see that everything runs: takes seconds")
    parser.add_argument("--compiled", action="store_true", help=COMPILED)
    parser.add_argument("--point", nargs=3, metavar=("DATASET", "SYSTEM", "BATCH"), help="measure this in this very process, and print it as JSON")
    chosen = parser.parse_args()
    if chosen.point:
        dataset, system, batch = chosen.point
        pixels, layers, least = sizes(dataset, chosen.smoke)
        print(json.dumps(point(system, pixels, layers, int(batch), least, chosen.compiled)))
        return
    require_extras("matplotlib")
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")     # of the processes that measure
    os.makedirs(chosen.out, exist_ok=True)
    print(f"{processor()}, {cores()} cores, NumPy {np.__version__}, float32, {time.strftime('%Y-%m-%d')}")
    results = {dataset: measure(dataset, chosen.smoke, chosen.compiled) for dataset in chosen.dataset or SIZES}
    for dataset, of in results.items():
        print(f"\n{table(dataset, of)}")
    results_save(os.path.join(chosen.out, "results.json"), results)
    path = os.path.join(chosen.out, "images-per-second.png")
    figure(path, results)
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
