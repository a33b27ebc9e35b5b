"""`mpiexec -n 4 python -m refattn distributed`: a sequence cut over the ranks, checked against one process, timed; what a cluster would take.

**The model.** For N positions and H heads on P ranks, each with as many positions as the others, one direction takes

    T(N, P) = t + c · H·N/P + ⌈log₂ P⌉ · (l + bytes/w + j) + 2 · 2 · ⌈log₂ P⌉ · l

t, c: what a rank does for itself, measured as one rank in the middle of a chain does it, with empty messages, at two lengths; l, w: latency and
bandwidth of a message between two ranks; j: joining two maps. The last term is the two agreements, each a reduction and a broadcast
of a few bytes. One process takes c₁·H·N, so the efficiency is c₁·H·N / (P·T), and c₁/c is what it comes near to for long sequences.

It assumes that all ranks are as fast as the one that was measured, that messages do not slow one another down, and that no rank waits for anything
but messages; and of the network that it is what carries messages between the ranks of this run: on one machine that is its memory. `--latency`
and `--bandwidth` put a real network's in their place.
"""
from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import causal_linear_attention, distributed, recurrence, vjp
from .bench import processor
from .experiment import results_save
from .rules import RULES

POSITIONS = (10**6, 10**7, 10**8, 10**9)
RANKS = (8, 32, 128, 512, 1024)
DRAWN = 1024             # positions with one generator: a rank draws its own slice and no more
AGREEMENTS = 2           # of one direction


def main(argv: Sequence[str] | None = None) -> int:
    """The command; rank 0 prints. Returns the exit status: 1 where the ranks' answer is not that of one process."""
    parser = argparse.ArgumentParser(prog="mpiexec -n 4 python -m refattn distributed", description=__doc__.splitlines()[0].partition(": ")[2],
                                     epilog="example: mpiexec -n 4 python -m refattn distributed --rule gated_delta --positions 100000")
    parser.add_argument("--rule", choices=["attention", *RULES], default="attention", help="what to compute (default: normalised, φ = elu + 1)")
    parser.add_argument("--positions", type=int, default=65536, metavar="N", help="of the whole sequence (default %(default)s)")
    parser.add_argument("--heads", type=int, default=4, metavar="H", help="(default %(default)s)")
    parser.add_argument("--features", type=int, default=64, metavar="D", help="D = M (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median time is told (default %(default)s)")
    parser.add_argument("--latency", type=float, metavar="SECONDS", help="of a message, for the model; measured if not given")
    parser.add_argument("--bandwidth", type=float, metavar="BYTES", help="a second, for the model; measured if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the sequence (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny sequence, to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    args = parser.parse_args(argv)
    for name in ("positions", "heads", "features", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected an integer ≥ 1, got {getattr(args, name)}")
    if args.smoke:
        args.positions, args.heads, args.features, args.rounds = 1000, 2, 8, 1
    comm = distributed._communicator(None)
    rank, size = comm.Get_rank(), comm.Get_size()
    figures = {"machine": processor(), "python": platform.python_version(), "numpy": np.__version__, "date": time.strftime("%Y-%m-%d"),
               **{name: getattr(args, name) for name in ("rule", "positions", "heads", "features", "seed")}, "ranks": size}
    figures |= run(args, comm)
    figures["constants"] = constants = measured(args, comm)
    figures["model"] = [predicted(constants, N, P, way) for way in ("forward", "both") for N in POSITIONS for P in RANKS]
    if rank == 0:
        print(report(figures))
        if args.json:
            results_save(args.json, json.loads(json.dumps(figures)))
    return 0 if figures["worst"] <= figures["allowed"] else 1


# --- one sequence ------------------------------------------------------------------------------------------------------------------------

def inputs(args: argparse.Namespace, rows: slice) -> tuple[list[Any], np.ndarray]:
    """q, k, v, g and beta as the rule has them, and dout, of positions `rows`; float32, keys of length 1, decays and β of all strengths."""
    parts = []
    for block in range(rows.start // DRAWN, -(-rows.stop // DRAWN) if rows.stop > rows.start else rows.start // DRAWN):
        rng = np.random.default_rng([args.seed, block])
        x = rng.standard_normal((4, args.heads, DRAWN, args.features), np.float32)
        y = rng.random((2, args.heads, DRAWN), np.float32)
        inside = slice(max(rows.start - block * DRAWN, 0), min(rows.stop - block * DRAWN, DRAWN))
        parts.append((x[..., inside, :], y[..., inside]))
    x, y = (np.concatenate([p[i] for p in parts], axis=2) if parts else
            np.zeros(((4, 2)[i], args.heads, 0, args.features)[: 4 - i], np.float32) for i in (0, 1))
    q, k, v, dout = x
    if args.rule == "attention":
        return [q, k, v], dout
    k = k / np.sqrt((k * k).sum(-1, keepdims=True))
    return [q, k, v, -y[0] if "gated" in args.rule else None, y[1] if "delta" in args.rule else None], dout


def functions(args: argparse.Namespace) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]:
    """The function on one process, its distributed twin with pullback, and their options."""
    if args.rule == "attention":
        return causal_linear_attention, distributed.causal_linear_attention_vjp, {}
    return recurrence, distributed.recurrence_vjp, {"rule": args.rule}


def run(args: argparse.Namespace, comm: Any) -> dict[str, Any]:
    """Times of one process and of all ranks, the largest difference of their answers, and the bytes of the messages."""
    rank, size = comm.Get_rank(), comm.Get_size()
    rows = distributed.share(args.positions, comm)
    alone, cut, options = functions(args)
    arrays, dout = inputs(args, rows)
    counting, sent = counted(comm)

    def both() -> tuple[float, float, list[np.ndarray]]:
        comm.Barrier()
        start = time.perf_counter()
        (out, state), pullback = cut(*arrays, comm=counting, **options)
        middle = time.perf_counter()
        gradients = pullback(dout)
        return middle - start, time.perf_counter() - start, [out, *(x for x in gradients[: len(arrays)] if x is not None)]

    times = []
    for _ in range(args.rounds):
        sent.clear()
        *t, mine = both()
        times.append([max(comm.allgather(x)) for x in t])
    messages = comm.allgather(list(sent))
    one: dict[str, Any] = {}
    pieces: Any = None
    if rank == 0:
        whole, whole_dout = inputs(args, slice(0, args.positions))
        seconds = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            (out, _), pullback = vjp(alone, *whole, **options)
            middle = time.perf_counter()
            gradients = pullback(whole_dout)
            seconds.append((middle - start, time.perf_counter() - start))
        answers = [out, *(x for x in gradients if x is not None)]
        one = {"forward": float(np.median([s[0] for s in seconds])), "both": float(np.median([s[1] for s in seconds]))}
        pieces = [[x[:, a:b] for x in answers] for a, b in ((args.positions * r // size, args.positions * (r + 1) // size) for r in range(size))]
        largest = [float(np.abs(x).max(initial=0)) for x in answers]
    quietly(comm)
    theirs = comm.scatter(pieces)
    largest = comm.bcast(largest if rank == 0 else None)
    worst = max(float(np.abs(x - y).max(initial=0)) / (most or 1) for x, y, most in zip(mine, theirs, largest, strict=True))
    # Two orders of the same sums, each of as many roundings as there are positions: √n in place of n, but for one case in 10^13 (Higham and
    # Mary, A new approach to probabilistic rounding error analysis, 2019, λ = 8)
    allowed = 8 * 2.0**-24 * math.sqrt(2 * args.positions + 1024)
    return {"one process": comm.bcast(one), "all ranks": dict(zip(("forward", "both"), np.median(times, axis=0).tolist(), strict=True)),
            "worst": max(comm.allgather(worst)), "allowed": allowed, "messages": messages}


def counted(comm: Any) -> tuple[Any, list[int]]:
    """The communicator, and the bytes of each message that it has sent from rank to rank."""
    sent: list[int] = []
    nobody = distributed._mpi().PROC_NULL

    def sendrecv(buffer: Any, to: int, *rest: Any) -> None:
        if to != nobody:
            sent.append(buffer.nbytes)
        comm.Sendrecv(buffer, to, *rest)

    kept = {name: getattr(comm, name) for name in ("Get_rank", "Get_size", "Get_info", "Allreduce", "bcast", "allgather")}
    return SimpleNamespace(**kept, Sendrecv=sendrecv), sent


def quietly(comm: Any) -> None:
    """A barrier at which ranks sleep: a rank that waits in MPI keeps a core busy, which the one that works may need."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.005)


# --- the model ---------------------------------------------------------------------------------------------------------------------------

def measured(args: argparse.Namespace, comm: Any) -> dict[str, Any]:
    """The constants: rank 0 works, with rank 1 for the messages; the others sleep."""
    rank, size = comm.Get_rank(), comm.Get_size()
    constants: dict[str, Any] = {"H": args.heads, "D": args.features}
    extra = {"attention": 1, "linear": 0, "gated": 1}.get(args.rule, args.features)
    constants["bytes"] = 4 * args.heads * args.features * (args.features + extra)
    if rank == 0:
        constants |= local_constants(args)
    quietly(comm)
    if size > 1 and rank < 2:
        constants |= message_constants(comm)
    quietly(comm)
    constants = comm.bcast(constants)
    for name in ("latency", "bandwidth"):
        if getattr(args, name) is not None:
            constants[name] = getattr(args, name)
    return constants | {"latency": constants.get("latency", 2e-6), "bandwidth": constants.get("bandwidth", 1e10)}


def local_constants(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds: for each position and head on one process ("one") and on one rank of many ("many"), for a slice without positions, for a join."""
    alone, cut, options = functions(args)
    between = SimpleNamespace(Get_rank=lambda: 1, Get_size=lambda: 3, Get_info=dict, Sendrecv=lambda x, to, tag, y, *_: y.fill(0),
                              Allreduce=lambda x, y, op: np.copyto(y, [3, x[1], x[2]]))
    n = min(args.positions, 8192)
    seconds: dict[str, dict[str, float]] = {}
    for name, length, f in (("one", n, lambda *x: vjp(alone, *x, **options)), ("many", n, lambda *x: cut(*x, comm=between, **options)),
                            ("empty", 0, lambda *x: cut(*x, comm=between, **options))):
        arrays, dout = inputs(args, slice(0, length))
        times = []
        for _ in range(2 * args.rounds + 1):
            start = time.perf_counter()
            _, pullback = f(*arrays)
            middle = time.perf_counter()
            pullback(dout)
            times.append((middle - start, time.perf_counter() - start))
        seconds[name] = dict(zip(("forward", "both"), np.min(times, axis=0).tolist(), strict=True))      # whatever else runs can only add
    shape = (args.heads, args.features, args.features + {"attention": 1, "linear": 0, "gated": 1}.get(args.rule, args.features))
    first, then = np.zeros((2, *shape), np.float32)
    start = time.perf_counter()
    for _ in range(10):
        distributed._composed(first, then, shape[2] if args.rule == "attention" else args.features)
    per = {name: {way: max(x - seconds["empty"][way] * (name == "many"), 0.0) / (n * args.heads) for way, x in seconds[name].items()}
           for name in ("one", "many")}
    return {**per, "empty": seconds["empty"], "join": (time.perf_counter() - start) / 10}


def message_constants(comm: Any) -> dict[str, float]:
    """Latency and bandwidth, from ranks 0 and 1 sending a message to and fro: the median of a short one, and of a long one beside it."""
    seconds = []
    for count in (1, 1 << 20):
        buffer, times = np.zeros(count, np.float32), []
        for _ in range(20):
            start = time.perf_counter()
            if comm.Get_rank() == 0:
                comm.Send(buffer, 1)
                comm.Recv(buffer, 1)
            else:
                comm.Recv(buffer, 0)
                comm.Send(buffer, 0)
            times.append((time.perf_counter() - start) / 2)
        seconds.append(float(np.median(times)))
    return {"latency": seconds[0], "bandwidth": 4 * ((1 << 20) - 1) / max(seconds[1] - seconds[0], 1e-9)}


def predicted(constants: dict[str, Any], N: int, P: int, way: str) -> dict[str, Any]:
    """The model at the top of this file for one number of positions and ranks; way is "forward", or "both" for forward and backward.

    >>> way = {"forward": 1e-6}
    >>> row = predicted({"H": 1, "D": 8, "bytes": 256, "one": way, "many": {"forward": 2e-6}, "empty": {"forward": 0.0}, "join": 0.0,
    ...                  "latency": 1e-3, "bandwidth": 1e9}, 10**6, 8, "forward")
    >>> round(row["seconds"], 4), round(row["efficiency"], 3)
    (0.265, 0.472)
    """
    rounds, ways = math.ceil(math.log2(P)), 2 if way == "both" else 1
    message = constants["latency"] + constants["bytes"] / constants["bandwidth"] + constants["join"]
    between = ways * rounds * (message + AGREEMENTS * 2 * constants["latency"])
    seconds = constants["empty"][way] + constants["many"][way] * constants["H"] * N / P + between
    return {"way": way, "N": N, "ranks": P, "seconds": seconds, "efficiency": constants["one"][way] * constants["H"] * N / (P * seconds),
            "GB of inputs and outputs on a rank": 16 * constants["H"] * constants["D"] * N / P / 1e9}


# --- words -------------------------------------------------------------------------------------------------------------------------------

def report(figures: dict[str, Any]) -> str:
    """What rank 0 prints."""
    c, size = figures["constants"], figures["ranks"]
    lines = [f"{figures['machine']}, Python {figures['python']}, NumPy {figures['numpy']}, {figures['date']}",
             f"{figures['rule']}: {figures['positions']:,} positions, H = {figures['heads']}, D = M = {c['D']}, float32, on {size} ranks",
             f"largest difference from one process: {figures['worst']:.1e} of the largest number ({figures['allowed']:.1e} allowed)",
             f"messages from rank to rank, forward and backward: {sum(map(len, figures['messages']))}, "
             f"{sum(map(sum, figures['messages'])):,} bytes in all, at most {max(map(sum, figures['messages'])):,} from one rank"]
    for way, words in (("forward", "forward"), ("both", "forward and backward")):
        one, many = figures["one process"][way], figures["all ranks"][way]
        lines.append(f"{words}: one process {1e3 * one:.1f} ms, {size} ranks {1e3 * many:.1f} ms, efficiency {one / many / size:.0%}")
    lines += ["", "model, from this machine's constants: " + ", ".join(
        [f"{1e9 * c[name][way]:.1f} ns a position and head {words} ({way.replace('both', 'and backward')})"
         for way in ("forward", "both") for name, words in (("one", "alone"), ("many", "on a rank"))]
        + [f"message {1e6 * c['latency']:.1f} µs + {c['bytes']:,} bytes at {c['bandwidth'] / 1e9:.1f} GB/s", f"join {1e6 * c['join']:.0f} µs"])]
    for way, words in (("forward", "forward"), ("both", "forward and backward")):
        lines += ["", f"{words}: seconds (efficiency)", f"{'N':>14}" + "".join(f"{f'{P} ranks':>18}" for P in RANKS)]
        for N in POSITIONS:
            row = [r for r in figures["model"] if r["way"] == way and r["N"] == N]
            lines.append(f"{N:>14,}" + "".join(f"{r['seconds']:>11.4g} ({r['efficiency']:4.0%})" for r in row))
    return "\n".join(lines)
