"""A hundred million positions in one process, at constant memory: causal linear attention over the bytes of a file.

Each byte has a query, a key and a value, drawn once; the file is memory-mapped and never read whole. Nothing is kept between blocks but
the state, a few kilobytes. Every minute it is written to a checkpoint, and the same command goes on from there, to the same bits. As it goes the
drift of the float32 state from one in float64 is told; with --compensated the state is kept as two numbers and stays as near as it was.

Without --file a file of random bytes is made. In the folder: checkpoints, results (JSON) and a figure of both kinds of state.
"""
from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from refattn.experiment import Row, arguments, figure_save, peak_bytes, require_extras, results_load, results_save, run
from refattn.streaming import Block, stream_run

HEADS, FEATURES, BLOCK = 4, 32, 1 << 14


def bytes_make(path: str, count: int, seed: int) -> None:
    """A file of random bytes, a part at a time, unless it is there already."""
    if os.path.exists(path) and os.path.getsize(path) == count:
        return
    with open(path, "wb") as file:
        for part, start in enumerate(range(0, count, 1 << 20)):
            file.write(np.random.default_rng([seed, part]).integers(0, 256, min(1 << 20, count - start), np.uint8).tobytes())


def reader(tokens: np.ndarray, seed: int) -> Callable[[slice], Block]:
    """q, k and v (H, B, D) of the bytes in a slice."""
    q, k, v = np.random.default_rng(seed).standard_normal((3, HEADS, 256, FEATURES), np.float32)
    return lambda rows: (q[:, tokens[rows]], k[:, tokens[rows]], v[:, tokens[rows]])


def figure(path: str, results: dict[str, dict]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), layout="constrained")
    ax = drawn.subplots()
    for i, (kind, record) in enumerate(results.items()):
        for name, line in (("S", "o-"), ("z", "s--")):
            rows = [row for row in record["history"] if row[name]]
            ax.loglog([row["position"] for row in rows], [row[name] for row in rows], line, color=f"C{i}", markersize=3, label=f"{kind}, {name}")
    ax.axhline(2.0**-24, color="0.6", linewidth=1)
    ax.set(xlabel="positions", ylabel="drift from float64, of the largest number")
    ax.grid(alpha=0.3)
    ax.legend()
    figure_save(path, drawn)


def main() -> None:
    parser = arguments(__doc__, out=os.path.join("out", "long"), minutes=60.0, budget="stop after so many minutes; the same command goes on")
    parser.add_argument("--file", metavar="PATH", help="whose bytes are the positions; without it one of random bytes is made in the folder")
    parser.add_argument("--positions", type=int, default=10**8, metavar="N", help="at most so many (default %(default)s)")
    parser.add_argument("--compensated", action="store_true", help="carry the state as two float32 numbers")
    parser.add_argument("--every", type=float, default=60.0, metavar="SECONDS", help="between checkpoints (default %(default)s)")
    args = parser.parse_args()
    require_extras("tqdm", "safetensors", "matplotlib")
    os.makedirs(args.out, exist_ok=True)
    count, block = (200_000, 1 << 10) if args.smoke else (args.positions, BLOCK)
    path, what = args.file, args.file
    if path is None:
        path, what = os.path.join(args.out, f"bytes-{count}"), "random bytes"
        bytes_make(path, count, args.seed)
    tokens = np.memmap(path, np.uint8, mode="r")[:count]
    kind = "compensated" if args.compensated else "plain"
    name = f"{'smoke' if args.smoke else 'full'}-{kind}"
    print(f"{len(tokens):,} positions ({what}), {HEADS} heads, D = M = {FEATURES}, a {kind} state")

    def show(row: Row) -> None:
        print(f"{row['position']:>13,} positions: drift of S {row['S']:.1e}, of z {row['z']:.1e}", flush=True)

    start = time.process_time()
    plan = {"file": os.path.basename(path), "bytes": len(tokens), "seed": args.seed}
    stream = stream_run(os.path.join(args.out, name + ".safetensors"), reader(tokens, args.seed), len(tokens), plan, block=block,
                        compensated=args.compensated, show=show, every=args.every, seconds=60 * args.minutes)
    if stream.position < len(tokens):
        return print(f"stopped at {stream.position:,} positions; the same command goes on from there")
    results_path = os.path.join(args.out, f"{'smoke' if args.smoke else 'full'}.json")
    results = results_load(results_path)
    results[kind] = {"plan": plan, "digest": stream.digest, "history": stream.history, "peak bytes": peak_bytes(),
                     "processor seconds of the last run": time.process_time() - start}
    results_save(results_path, results)
    figure(results_path.replace(".json", ".png"), results)
    print(f"CRC-32 of all outputs {stream.digest:08x}; {peak_bytes() / 2**20:.0f} MiB at the peak")


if __name__ == "__main__":
    run(main)
