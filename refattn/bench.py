"""`python -m refattn bench`: how fast, how much memory, against what; every result is checked before it is timed.

Times are medians of rounds in which all contestants take turns, in one process, with the same cores. What counts is the ratio: a machine's
speed drifts. The limit of a form with f flops is f divided by the rate of a large float32 matrix product in the same run.

Peers are measured where they are installed: PyTorch (`scaled_dot_product_attention`) and the paper authors' `pytorch-fast-transformers`
(their C++ kernel `causal_dot_product`, and their module `CausalLinearAttention` with φ and normaliser); with `--rule`, `onnxruntime`
(the fused kernel of its operator `com.microsoft.LinearAttention`, on as many threads as we take). `--models` has steps of whole models.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from . import causal_linear_attention, causal_linear_attention_step, recurrence, vjp
from ._blocks import cores
from .causal import causal_chunked_backward, causal_chunked_forward
from .rules import RULES
from .testing.budgets import gamma, worst_ratio

Contest = dict[str, Callable[[], Any]]
WIDTH = 14    # of a table's column
SETTLE = 0.15


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m refattn bench", description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=8, help="batch × heads (default 8)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="sequence lengths N")
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128], help="D = M")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each contestant in each row (default 1)")
    parser.add_argument("--chunks", action="store_true", help="only compare chunk sizes of the chunked form")
    parser.add_argument("--compiled", action="store_true", help="our loops compiled by Numba, for the product, attention and the rules")
    parser.add_argument("--rule", nargs="+", choices=RULES, help="only compare these rules of `recurrence` with rule linear")
    parser.add_argument("--models", action="store_true", help="only a training step and a decoding step of whole models at the paper's sizes")
    parser.add_argument("--cuda-static", action="store_true", help="only the CUDA kernels, without a GPU: occupancy, traffic, roofline")
    parser.add_argument("--device", action="store_true", help="only the CUDA kernels, on a GPU: times")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", metavar="FILE", help="write all figures there too")
    parser.add_argument("--figure", metavar="FILE", help="with --device: draw its times there (PNG, SVG or PDF)")
    args = parser.parse_args(argv)
    if args.figure and not args.device:
        parser.error("--figure: expected --device beside it; only its times are drawn")
    if args.smoke:
        args.lengths, args.features, args.seconds, args.heads = [64, 128], [8], 0.01, 2
    if args.cuda_static or args.device:
        from .cuda.bench import device_report, static_report
        return _written(args.json, static_report() if args.cuda_static else
                        device_report(lengths=args.lengths, heads=args.heads, D=args.features[0], figure=args.figure))
    peers = installed_peers()
    print(f"{processor()}, {cores()} cores, Python {platform.python_version()}, NumPy {np.__version__}; "
          f"peers: {', '.join(peers) or 'none installed'}; float32, B·H = {args.heads}; {time.strftime('%Y-%m-%d')}")
    if args.models:
        from .transformer_bench import models_report
        return _written(args.json, models_report(peers, args.seconds, args.smoke))
    figures: dict[str, Any] = {"chunks": _chunk_table(args)} if args.chunks else {"rules": _rule_table(args, peers)} if args.rule else {
        "products": _product_table(args, peers), "attention": _attention_table(args, peers)}
    if args.compiled and not args.rule:
        figures |= {"cores": _cores_table(args), "first calls": _first_calls_table()}
    if not (args.chunks or args.rule or args.compiled):
        figures |= {"growth": _growth_table(args), "memory": _memory_table(args), "decoding": _decoding_table(args, peers)}
    return _written(args.json, figures)


def _written(path: str | None, figures: dict[str, Any]) -> int:
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    return 0


# --- tables ------------------------------------------------------------------------------------------------------------------------------

def _product_table(args: argparse.Namespace, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """The bare product: rule `linear`, no φ, no normaliser."""
    rows = []
    for D in args.features:
        _title(f"bare causal product, D = M = {D}",
               "N", "GEMM GF/s", "forward ms", "of limit", "theirs ms", "faster", "fwd+bwd ms", "theirs ms", "faster")
        for N in args.lengths:
            q, k, v, dout = _draw(args.heads, N, D, 4)
            square = np.ones((2048, 2048), np.float32) if not args.smoke else np.ones((64, 64), np.float32)
            product = np.empty_like(square)

            def both(q: Any = q, k: Any = k, v: Any = v, dout: Any = dout) -> Any:
                return _forward_and_backward(recurrence, dout, q, k, v, compiled=args.compiled)[:4]

            contest: Contest = {"gemm": partial(np.matmul, square, square, out=product),
                                "forward": partial(recurrence, q, k, v, compiled=args.compiled), "both": both}
            if "fast_transformers" in peers:
                theirs, theirs_both = _their_product(peers, q, k, v, dout)
                _check("causal_dot_product", both(), theirs_both(), N + D)
                contest |= {"theirs": theirs, "theirs both": theirs_both}
            t = medians(contest, args.seconds)
            rate = 2 * square.shape[0] ** 3 / t["gemm"]
            row = {"D": D, "N": N, "gemm": rate, "limit": 4 * args.heads * N * D * D / rate / t["forward"], **t}
            rows.append(row)
            _row(N, rate / 1e9, t["forward"] * 1e3, f"{row['limit']:.0%}", _ms(t.get("theirs")), _times(t.get("theirs"), t["forward"]),
                 t["both"] * 1e3, _ms(t.get("theirs both")), _times(t.get("theirs both"), t["both"]))
    return rows


def _attention_table(args: argparse.Namespace, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """φ = elu + 1, product and normaliser."""
    rows = []
    for D in args.features:
        _title(f"causal linear attention with φ and normaliser, D = M = {D}",
               "N", "forward ms", "theirs ms", "faster", "fwd+bwd ms", "theirs ms", "faster", "SDPA fwd ms", "faster")
        for N in args.lengths:
            q, k, v, dout = _draw(args.heads, N, D, 4)
            both = partial(_forward_and_backward, causal_linear_attention, dout, q, k, v, compiled=args.compiled)
            contest: Contest = {"forward": partial(causal_linear_attention, q, k, v, compiled=args.compiled), "both": both}
            if "fast_transformers" in peers:
                theirs, theirs_both = _their_attention(peers, q, k, v, dout)
                _check("CausalLinearAttention", both(), theirs_both(), 4 * (N + D))
                contest |= {"theirs": theirs, "theirs both": theirs_both}
            if "torch" in peers and N <= 16384:
                contest["sdpa"] = _sdpa(peers, q, k, v)
            t = medians(contest, args.seconds)
            rows.append({"D": D, "N": N, **t})
            _row(N, t["forward"] * 1e3, _ms(t.get("theirs")), _times(t.get("theirs"), t["forward"]),
                 t["both"] * 1e3, _ms(t.get("theirs both")), _times(t.get("theirs both"), t["both"]),
                 _ms(t.get("sdpa")), _times(t.get("sdpa"), t["forward"]))
    return rows


def _growth_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """time(2N) / time(N): 2 is linear."""
    D = args.features[0]
    _title(f"growth: time(2N) / time(N), D = M = {D}", "N", "bare", "attention", "fwd+bwd")
    rows = []
    for N in args.lengths[:-1]:
        sizes = {n: _draw(args.heads, n, D, 4) for n in (N, 2 * N)}
        contest: Contest = {}
        for n, (q, k, v, dout) in sizes.items():
            contest[f"bare {n}"] = partial(recurrence, q, k, v)
            contest[f"attention {n}"] = partial(causal_linear_attention, q, k, v)
            contest[f"both {n}"] = partial(_forward_and_backward, causal_linear_attention, dout, q, k, v)
        t = medians(contest, args.seconds)
        ratios = {name: t[f"{name} {2 * N}"] / t[f"{name} {N}"] for name in ("bare", "attention", "both")}
        rows.append({"N": N, **ratios})
        _row(N, *(f"{r:.2f}" for r in ratios.values()))
    return rows


def _cores_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One core against all of them, the main thread being kept to one in turn."""
    rows: list[dict[str, Any]] = []
    if not hasattr(os, "sched_setaffinity") or cores() < 2:
        return rows
    every = os.sched_getaffinity(0)

    def on_one(f: Callable[[], Any]) -> Any:
        os.sched_setaffinity(0, [min(every)])
        try:
            return f()
        finally:
            os.sched_setaffinity(0, every)

    for D in args.features:
        _title(f"{len(every)} cores against one, D = M = {D}", "N", "product", "fwd+bwd", "attention", "fwd+bwd")
        for N in args.lengths:
            q, k, v, dout = _draw(args.heads, N, D, 4)
            calls = [partial(recurrence, q, k, v, compiled=args.compiled),
                     partial(_forward_and_backward, recurrence, dout, q, k, v, compiled=args.compiled),
                     partial(causal_linear_attention, q, k, v, compiled=args.compiled),
                     partial(_forward_and_backward, causal_linear_attention, dout, q, k, v, compiled=args.compiled)]
            contest: Contest = {f"all {i}": call for i, call in enumerate(calls)}
            contest |= {f"one {i}": partial(on_one, call) for i, call in enumerate(calls)}
            t = medians(contest, args.seconds)
            rows.append({"D": D, "N": N, **t})
            _row(N, *(_times(t[f"one {i}"], t[f"all {i}"]) for i in range(4)))
    return rows


FIRST_CALLS = """
import json, time
import numpy as np
from refattn import causal_linear_attention, recurrence, vjp
x, seconds = np.ones((2, 8, 4), np.float32), []
for f in (recurrence, causal_linear_attention):
    start = time.perf_counter()
    (out, _), pullback = vjp(f, x, x, x, compiled=True)
    between = time.perf_counter()
    pullback(out)
    seconds += [between - start, time.perf_counter() - between]
print(json.dumps(seconds))
"""


def _first_calls_table() -> list[dict[str, Any]]:
    """Seconds that the first call of each kind takes in a new process: where nothing is kept yet, and where it is on disk."""
    _title("first call, seconds", "", "product", "its backward", "attention", "its backward")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("compiled", "from disk"):
            done = subprocess.run([sys.executable, "-c", FIRST_CALLS], env={**os.environ, "NUMBA_CACHE_DIR": folder}, stdout=subprocess.PIPE,
                                  check=True)
            rows.append({"from": name, "seconds": json.loads(done.stdout)})
            _row(name, *rows[-1]["seconds"])
    return rows


def _memory_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak of what is allocated beyond inputs and outputs, as Python's allocator tracing sees it."""
    D = args.features[0]
    _title(f"peak memory beyond inputs and outputs, KiB, one head, D = M = {D}",
           "N", "bare fwd", "bare bwd", "attention fwd", "attention bwd")
    rows = []
    for power in (14, 16, 18, 20) if not args.smoke else (7, 8):
        N = 2**power
        q, k, v, dout = _draw(1, N, D, 4)
        figures = {"N": N}
        for name, f in (("bare", recurrence), ("attention", causal_linear_attention)):
            (out, state), pullback = vjp(f, q, k, v)
            figures[f"{name} forward"] = _peak(partial(f, q, k, v))
            figures[f"{name} backward"] = _peak(partial(pullback, dout))
            del out, state, pullback
        rows.append(figures)
        _row(N, *(f"{b / 1024:.0f}" for b in list(figures.values())[1:]))
    return rows


def _decoding_table(args: argparse.Namespace, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """One normalised step with φ, 8 heads."""
    D = args.features[0]
    _title(f"one decoding step, H = 8, D = M = {D}", "B", "step µs", "theirs µs", "faster", "copy state µs", "of that")
    rows = []
    for B in (1, 64):
        q, k, v = (np.random.default_rng(0).standard_normal((B, 8, D)).astype(np.float32) for _ in range(3))
        _, state = causal_linear_attention_step(q, k, v)
        to = np.empty_like(state.S)
        contest: Contest = {"step": partial(causal_linear_attention_step, q, k, v, state), "copy": partial(np.copyto, to, state.S)}
        if "fast_transformers" in peers:
            contest["theirs"] = _their_step(peers, q, k, v)
        t = medians(contest, args.seconds)
        rows.append({"B": B, **t})
        _row(B, t["step"] * 1e6, f"{t['theirs'] * 1e6:.0f}" if "theirs" in t else "–", _times(t.get("theirs"), t["step"]), t["copy"] * 1e6,
             f"{t['step'] / t['copy']:.2f}×")
    return rows


def _chunk_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for D in args.features:
        _title(f"chunk sizes, bare product, D = M = {D}, ms", "N", "form", *(str(c) for c in (16, 32, 64, 128)))
        for N in args.lengths:
            q, k, v, dout = _draw(args.heads, N, D, 4)
            contest: Contest = {}
            for chunk in (16, 32, 64, 128):
                residuals = causal_chunked_forward(q, k, v, chunk=chunk)[2]
                contest[f"forward {chunk}"] = partial(causal_chunked_forward, q, k, v, chunk=chunk)
                contest[f"backward {chunk}"] = partial(causal_chunked_backward, dout, None, residuals)
            t = medians(contest, args.seconds)
            for form in ("forward", "backward"):
                rows.append({"D": D, "N": N, "form": form, **{str(c): t[f"{form} {c}"] for c in (16, 32, 64, 128)}})
                _row(N, form, *(t[f"{form} {c}"] * 1e3 for c in (16, 32, 64, 128)))
    return rows


def _rule_table(args: argparse.Namespace, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """Each rule against rule `linear` and onnxruntime; keys of length 1, β and decays between the extremes."""
    rows = []
    for D in args.features:
        _title(f"rules of `recurrence`, D = M = {D}", "rule", "decay", "N", "linear ms", "forward ms", "of linear", "fwd+bwd ms", "of linear",
               "onnxruntime", "faster")
        for N in args.lengths:
            q, k, v, dout = _draw(args.heads, N, D, 4)
            k /= np.sqrt((k * k).sum(-1, keepdims=True))
            rng = np.random.default_rng(1)
            for rule, channels in [(r, c) for r in args.rule for c in ([False, True] if "g" in RULES[r] else [None])]:
                g = None if channels is None else -rng.random(k.shape if channels else k.shape[:-1], np.float32)
                beta = rng.random(k.shape[:-1], np.float32) if "beta" in RULES[rule] else None
                ours = {"compiled": args.compiled}
                contest: Contest = {"linear": partial(recurrence, q, k, v, **ours),
                                    "linear both": partial(_forward_and_backward, recurrence, dout, q, k, v, **ours),
                                    "forward": partial(recurrence, q, k, v, g, beta, rule=rule, **ours),
                                    "both": partial(_forward_and_backward, recurrence, dout, q, k, v, g, beta, rule=rule, **ours)}
                if "onnxruntime" in peers:
                    theirs = contest["theirs"] = _their_rule(peers, q, k, v, g, beta, rule)
                    _check("com.microsoft.LinearAttention", contest["forward"](), theirs(), 8 * (N + D))
                t = medians(contest, args.seconds)
                decay = {None: "–", False: "a head", True: "a channel"}[channels]
                rows.append({"rule": rule, "decay": decay, "D": D, "N": N, **t})
                _row(rule, decay, N, t["linear"] * 1e3, t["forward"] * 1e3, f"{t['forward'] / t['linear']:.2f}×", t["both"] * 1e3,
                     f"{t['both'] / t['linear both']:.2f}×", _ms(t.get("theirs")), _times(t.get("theirs"), t["forward"]))
    return rows


# --- peers -------------------------------------------------------------------------------------------------------------------------------

def installed_peers() -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        import torch
        torch.set_num_threads(cores())
        found["torch"] = torch
        import fast_transformers.attention.causal_linear_attention
        import fast_transformers.causal_product
        import fast_transformers.recurrent.attention.self_attention.linear_attention  # noqa: F401
        found["fast_transformers"] = fast_transformers
    except ImportError:
        pass                                       # a peer that is not installed is not measured; the heading lists those that are
    try:
        import onnx  # noqa: F401
        import onnxruntime
        found["onnxruntime"] = onnxruntime
    except ImportError:
        pass
    return found


def _their_product(peers: dict[str, Any], *arrays: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    torch, product = peers["torch"], peers["fast_transformers"].causal_product.causal_dot_product
    q, k, v, dout = (torch.from_numpy(x) for x in arrays)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward() -> Any:
        with torch.no_grad():
            return product(q, k, v)

    def both() -> Any:
        out = product(*leaves)
        return out.detach().numpy(), *(g.numpy() for g in torch.autograd.grad(out, leaves, dout))

    return forward, both


def _their_attention(peers: dict[str, Any], *arrays: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    torch, ft = peers["torch"], peers["fast_transformers"]
    from fast_transformers.masking import LengthMask, TriangularCausalMask
    q, k, v, dout = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays)         # their layout is (B, N, H, D)
    module = ft.attention.causal_linear_attention.CausalLinearAttention(q.shape[-1])
    masks = TriangularCausalMask(q.shape[1]), LengthMask(torch.full((q.shape[0],), q.shape[1]))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward() -> Any:
        with torch.no_grad():
            return module(q, k, v, masks[0], masks[1], masks[1])

    def both() -> Any:
        out = module(*leaves, masks[0], masks[1], masks[1])
        grads = torch.autograd.grad(out, leaves, dout)
        return tuple(x.detach().transpose(1, 2).numpy() for x in (out, *grads))

    return forward, both


def _their_step(peers: dict[str, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Callable[[], Any]:
    torch, ft = peers["torch"], peers["fast_transformers"]
    module = ft.recurrent.attention.self_attention.linear_attention.RecurrentLinearAttention(q.shape[-1])
    Q, K, V = (torch.from_numpy(x) for x in (q, k, v))
    with torch.no_grad():
        _, state = module(Q, K, V)

    def step() -> Any:
        with torch.no_grad():
            return module(Q, K, V, state)

    return step


def _their_rule(peers: dict[str, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray | None, beta: np.ndarray | None,
                rule: str) -> Callable[[], Any]:
    from onnx import TensorProto, helper
    packed = [None if x is None else np.ascontiguousarray(np.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)) for x in (q, k, v, g, beta)]
    names = [n if x is not None else "" for n, x in zip(("q", "k", "v", "decay", "beta"), packed, strict=True)]
    feeds = {n: x for n, x in zip(names, packed, strict=True) if x is not None}
    (B, H, N, D), M = k.shape, v.shape[-1]
    node = helper.make_node("LinearAttention", [*names[:3], "", *names[3:]], ["out", "state"], domain="com.microsoft", q_num_heads=q.shape[1],
                            kv_num_heads=H, update_rule=rule, scale=1.0, chunk_size=64)
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in feeds.items()]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("out", (B, N, q.shape[1] * M)), ("state", (B, H, D, M)))]
    model = helper.make_model(helper.make_graph([node], "rule", given, made), ir_version=10,
                              opset_imports=[helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", 21)])
    options = peers["onnxruntime"].SessionOptions()
    options.intra_op_num_threads = cores()
    session = peers["onnxruntime"].InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def forward() -> tuple[np.ndarray, np.ndarray]:
        out, state = session.run(None, feeds)
        return np.moveaxis(out.reshape(B, N, -1, M), 2, 1), state

    return forward


def _sdpa(peers: dict[str, Any], *arrays: np.ndarray) -> Callable[[], Any]:
    torch = peers["torch"]
    q, k, v = (torch.from_numpy(x) for x in arrays)

    def forward() -> Any:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return forward


# --- small things ----------------------------------------------------------------------------------------------------------------------

def _forward_and_backward(f: Callable[..., Any], dout: np.ndarray, *arrays: np.ndarray | None, **options: Any) -> tuple[Any, ...]:
    (out, _), pullback = vjp(f, *arrays, **options)
    return out, *pullback(dout)


def _draw(heads: int, N: int, D: int, count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, heads, N, D), np.float32) for _ in range(count)]


def _check(name: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], n: int) -> None:
    """A peer that computes something else would make its time worthless. Both round: γ of n on the largest magnitude at hand."""
    for x, y in zip(ours, theirs, strict=True):
        bound = 2 * gamma(n, np.float32) * float(np.abs(x).max())
        if (ratio := worst_ratio(x, y, bound)) > 1:
            raise SystemExit(f"{name} gives another answer than refattn: {ratio:.2g} times the bound; nothing is timed")


def medians(contest: Contest, seconds: float) -> dict[str, float]:
    """Median time of each, for about `seconds` each: they take turns of five runs, or of a third of the time before them, in which runs are not
    counted, since the threads of the one before (OpenBLAS, OpenMP) go on spinning for some 100 ms."""
    times: dict[str, list[float]] = {name: [] for name in contest}
    while any(len(t) < 3 or sum(t) < seconds and len(t) < 1000 for t in times.values()):
        for name, f in contest.items():
            start = time.perf_counter()
            while time.perf_counter() - start < SETTLE * (seconds > SETTLE):
                f()
            turn: list[float] = []
            while len(turn) < 5 or sum(turn) < min(SETTLE / 3, seconds):
                start = time.perf_counter()
                f()
                turn.append(time.perf_counter() - start)
            times[name] += turn
    return {name: float(np.median(t)) for name, t in times.items()}


def _peak(f: Callable[[], Any]) -> int:
    """Bytes allocated at the peak of f() beyond what it returns."""
    f()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = f()
        after, peak = tracemalloc.get_traced_memory()
        del result
        return max(peak - after, 0) if after >= before else peak - before
    finally:
        tracemalloc.stop()


def _title(text: str, *columns: str) -> None:
    print(f"\n{text}")
    _row(*columns)


def _row(*cells: Any) -> None:
    texts = [c if isinstance(c, str) else f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells]
    print("".join(f"{t:>{WIDTH}}" for t in texts), flush=True)


def _ms(t: float | None) -> str:
    return "–" if t is None else f"{t * 1e3:.1f}"


def _times(theirs: float | None, ours: float) -> str:
    return "–" if theirs is None else f"{theirs / ours:.2f}×"


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
