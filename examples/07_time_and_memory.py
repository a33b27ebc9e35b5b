"""Time and memory against the length of the sequence (fig. 1 of the paper): linear, softmax and LSH attention, forward and backward.

2^16 positions are cut into B = 2^16/N sequences of N = 2^9 … 2^16. A causal attention layer, 8 heads of 32 with the projections around them,
reads them and hands back all gradients, and what that took is divided by B, as in the paper. The layer alone, since norms and feed-forward cost
the same whatever the attention, several times as much as linear attention itself, and would hide what differs.

Each point is measured in a process of its own: the median time of a few passes, and by how much the first of them raised the peak of resident
memory, as the operating system tells it. Unlike the paper's, this softmax attention works in blocks and holds no N × N matrix: its memory grows
like N too, only its time like N². The same command goes on where it was stopped; points that are done are not measured again. In the folder:
results (JSON) and a figure.
"""
from __future__ import annotations

import json
import math
import os
import time
from typing import Any

import numpy as np

from refattn._blocks import cores
from refattn.experiment import Row, arguments, check_plan, figure_save, peak_bytes, require_extras, run, results_load, results_save, run_apart
from refattn.attention_layer import attention_backward, attention_forward, attention_inputs

SYSTEMS = ("linear", "softmax", "lsh-1", "lsh-4")
# positions in a batch, the lengths of its sequences, width, heads
SCALES = {"full": (2**16, tuple(2**i for i in range(9, 17)), 256, 8), "smoke": (2**12, (256, 512), 64, 2)}
PASSES, SECONDS = 5, 15.0         # so many passes for a point, or fewer once so much time was spent on them
QUANTITIES = (("seconds", "time for a sequence, ms", 1e3), ("bytes", "peak memory for a sequence, MiB", 2.0**-20))


def measure(system: str, N: int, scale: str, seed: int) -> Row:
    """One point, in this process: seconds and bytes for one sequence."""
    count, _, width, heads = SCALES[scale]
    rng, params = np.random.default_rng(seed), {}
    for part in (*attention_inputs(system), "out"):
        params[f"attention.{part}.weight"] = (rng.standard_normal((width, width)) / math.sqrt(width)).astype(np.float32)
        params[f"attention.{part}.bias"] = np.zeros(width, np.float32)
    x, dout = rng.standard_normal((2, count // N, N, width), np.float32)

    def seconds(x: np.ndarray, dout: np.ndarray) -> float:
        start = time.perf_counter()
        _, residuals = attention_forward(params, "attention", x, heads=heads, attention=system, causal=True, rng=np.random.default_rng(seed))
        attention_backward(dout, residuals)
        return time.perf_counter() - start

    seconds(x[:1, :512], dout[:1, :512])                                         # modules, threads and BLAS make themselves at home
    before = peak_bytes()
    times = [seconds(x, dout)]
    memory = peak_bytes() - before
    while len(times) < PASSES and sum(times) < SECONDS:
        times.append(seconds(x, dout))
    return {"seconds": float(np.median(times)) / len(x), "bytes": memory / len(x), "passes": len(times)}


def slope(lengths: tuple[int, ...], points: dict[str, Row], quantity: str) -> float | None:
    """Of log(quantity) over log(N), by least squares over the longer half of the lengths; None if fewer than two of them were measured."""
    longer = [N for N in lengths[len(lengths) // 2:] if str(N) in points]
    if len(longer) < 2:
        return None
    return float(np.polyfit(np.log(longer), np.log([points[str(N)][quantity] for N in longer]), 1)[0])


def left_out(lengths: tuple[int, ...], points: dict[str, Row]) -> list[int]:
    return [N for N in lengths if str(N) not in points]


def figure(path: str, results: dict[str, Any], lengths: tuple[int, ...]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    for ax, (quantity, label, unit) in zip(drawn.subplots(1, 2), QUANTITIES, strict=True):
        for i, (system, points) in enumerate(results["points"].items()):
            fitted, missing = results["slopes"][system][quantity], left_out(lengths, points)
            words = system + ("" if fitted is None else f", slope {fitted:.2f}")
            words += f"\n(N = {', '.join(f'{N:,}' for N in missing)} left out)" if missing else ""
            at = [N for N in lengths if str(N) in points]
            ax.plot(at, [unit * points[str(N)][quantity] for N in at], ("o-", "s--", "^-", "v-")[i], markersize=4, color=f"C{i}", label=words)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(xlabel="N", ylabel=label, xlim=(lengths[0] / 1.3, lengths[-1] * 1.3))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure_save(path, drawn)


def table(results: dict[str, Any], lengths: tuple[int, ...]) -> None:
    cell = lambda x, form: f"{'–' if x is None else format(x, form):>12}"
    for quantity, label, unit in QUANTITIES:
        print(f"\n{label}\n{'N':>8}" + "".join(f"{system:>12}" for system in SYSTEMS))
        for N in lengths:
            values = [results["points"][system].get(str(N)) for system in SYSTEMS]
            print(f"{N:>8}" + "".join(cell(row and unit * row[quantity], ",.2f") for row in values))
        print(f"{'slope':>8}" + "".join(cell(results["slopes"][system][quantity], ".2f") for system in SYSTEMS))
    for system in SYSTEMS:
        if missing := left_out(lengths, results["points"][system]):
            print(f"\n{system}: N = {', '.join(map(str, missing))} left out, where one pass would take longer than --minutes allows")


def main() -> None:
    parser = arguments(__doc__, out=os.path.join("out", "scaling"), minutes=5.0,
                       budget="leave out the points where one pass over a batch would take longer, in minutes")
    parser.add_argument("--point", nargs=2, metavar=("SYSTEM", "N"), help="measure this one in this very process and print it as JSON")
    chosen = parser.parse_args()
    scale = "smoke" if chosen.smoke else "full"
    if chosen.point:
        print(json.dumps(measure(chosen.point[0], int(chosen.point[1]), scale, chosen.seed)))
        return
    require_extras("tqdm", "matplotlib")
    from tqdm import tqdm

    count, lengths, width, heads = SCALES[scale]
    path = os.path.join(chosen.out, f"{scale}.json")
    plan = {"positions": count, "width": width, "heads": heads, "cores": cores(), "seed": chosen.seed}
    os.makedirs(chosen.out, exist_ok=True)
    results = results_load(path) or {"plan": plan, "points": {system: {} for system in SYSTEMS}}
    check_plan(path, results["plan"], plan, what="measurements")
    same = [*(["--smoke"] if chosen.smoke else []), "--seed", str(chosen.seed)]
    with tqdm(total=len(SYSTEMS) * len(lengths), desc="measuring", disable=None, leave=False) as bar:
        for system, points in results["points"].items():
            batch = 0.0                                                          # seconds for a pass at the length before
            for N in lengths:
                bar.set_postfix_str(f"{system}, N = {N}")
                if str(N) not in points and 2 * batch <= 60 * chosen.minutes:    # sequences twice as long take at most twice the time
                    points[str(N)] = run_apart(__file__, *same, "--point", system, str(N))
                    results_save(path, results)
                batch = points[str(N)]["seconds"] * (count // N) if str(N) in points else math.inf
                bar.update()
    results["slopes"] = {system: {quantity: slope(lengths, points, quantity) for quantity, *_ in QUANTITIES}
                         for system, points in results["points"].items()}
    results_save(path, results)
    figure(os.path.join(chosen.out, f"{scale}.png"), results, lengths)
    table(results, lengths)
    print(f"\nfigure: {os.path.join(chosen.out, scale)}.png")


if __name__ == "__main__":
    run(main)
