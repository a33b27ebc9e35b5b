"""What `python -m refattn bench --cuda-static` and `--device` print: figures of the kernels without a GPU, and times with one."""
from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import causal_linear_attention, oracle, vjp
from ..testing import budgets
from . import launch

H100 = {"copy": 3.0e12, "float32": 60e12, "matrix": 790e12}        # bytes/s as a copy measures it, flops/s


# --- without a GPU ------------------------------------------------------------------------------------------------------------------------

def static_report() -> dict[str, Any]:
    """Registers and occupancy, traffic, and the time that an H100 cannot beat. Needs the extra `nvrtc`, and g++."""
    return {"occupancy": occupancy_table(), "traffic": traffic_table(), "roofline": roofline_table()}


def occupancy_table(D: int = 64) -> list[dict[str, Any]]:
    """A row for each architecture and kernel: what ptxas says, and how many blocks a multiprocessor holds."""
    from ..testing import nvrtc
    print(f"\nkernels at D = M = {D}, with φ and normaliser\n")
    rows = []
    for dtype in launch.C_TYPES:
        for tensor in (False, True):
            archs = [arch for arch in nvrtc.ARCHS if not tensor or launch.tensor_fits(int(arch[3:]), dtype, D, D)]
            rows += nvrtc.cuda_static_table(launch.source(tensor), launch.instances(dtype, D, D, 1, True, tensor), archs) if archs else []
    print(nvrtc.format_table(rows))
    return rows


def traffic_table(N: int = 4096, D: int = 64, rows: int = 512) -> list[dict[str, Any]]:
    """Sectors of global memory, counted by the emulator, in units of one array, and their ratio to each input read once and each output
    written once; whether every request is ideal."""
    from ..simt import cupy as cp
    print(f"\nglobal traffic, N = {N:,}, D = M = {D}, groups of {rows}, one head, in units of one array\n")
    print(f"{'dtype':10}{'pass':10}{'moved':>8}{'least':>7}{'ratio':>8}   sectors, bank passes of all requests (1: ideal)")
    table = []
    usual, launch.group_rows = launch.group_rows, lambda heads, N: rows
    try:
        for dtype in ("float32", "float16"):
            q, k, v, dout = (cp.asarray(x.astype(dtype)) for x in np.random.default_rng(0).standard_normal((4, 1, N, D)))
            with cp.audit("traffic") as forward:
                _, pullback = vjp(causal_linear_attention, q, k, v)
            with cp.audit("traffic") as backward:
                pullback(dout)
            for name, counts, least in (("forward", forward, 4), ("backward", backward, 8)):
                sectors, fewest, passes, best = (sum(getattr(c, field) for c in counts.values())
                                                 for field in ("sectors", "ideal_sectors", "passes", "ideal_passes"))
                moved = 32 * sectors / q.nbytes
                table.append({"dtype": dtype, "pass": name, "moved": moved, "ratio": moved / least, "sectors": sectors / fewest,
                              "passes": passes / best})
                print(f"{dtype:10}{name:10}{moved:8.2f}{least:7}{moved / least:8.2f}   {sectors / fewest:.3f}, {passes / best:.3f}")
    finally:
        launch.group_rows = usual
    return table


def roofline_table(D: int = 64, C: int = 32) -> list[dict[str, Any]]:
    """Forward: flops and bytes per position, and the least time on an H100, beside the paper authors' kernel: one block for each head and
    8 columns of v, sequential in N; q and k are read again by each."""
    print(f"\nforward in float32, D = M = {D}, on an H100 ({H100['copy'] / 1e12:.1f} TB/s, {H100['float32'] / 1e12:.0f} TFLOP/s)\n")
    print(f"{'':14}{'B·H':>5}{'N':>9}{'blocks':>9}{'flops/byte':>12}{'memory µs':>11}{'arithmetic µs':>15}")
    table = []
    for heads, N in ((1, 65536), (8, 4096), (64, 4096)):
        rows = launch.group_rows(heads, N)
        ours = {"blocks": heads * -(-N // rows), "flops": 6 * D * D + 4 * C * D, "bytes": 4 * (6 * D + 4 * (D * D + D) / rows)}
        theirs = {"blocks": heads * D // 8, "flops": 4 * D * D, "bytes": 4 * (2 * D * D // 8 + 2 * D)}
        for name, x in (("ours", ours), ("the authors'", theirs)):
            memory, arithmetic = heads * N * x["bytes"] / H100["copy"], heads * N * x["flops"] / H100["float32"]
            table.append({"kernel": name, "heads": heads, "N": N, **x, "memory_s": memory, "arithmetic_s": arithmetic})
            print(f"{name:14}{heads:5}{N:9}{x['blocks']:9}{x['flops'] / x['bytes']:12.1f}{memory * 1e6:11.1f}{arithmetic * 1e6:15.1f}")
    return table


# --- with a GPU ---------------------------------------------------------------------------------------------------------------------------

def device_report(cp: Any = None, lengths: tuple[int, ...] = (1024, 4096, 16384, 65536), heads: int = 8, D: int = 64,
                  repeats: int = 20) -> dict[str, Any]:
    """Medians of forward, and of forward and backward, against the time of a copy of the same inputs and outputs, and against the loop-free
    array code; every result is held against float64 first. ImportError without CuPy, RuntimeError without a device."""
    cp = _cupy() if cp is None else cp
    print(f"\ncausal linear attention on a device, float32, B·H = {heads}, D = M = {D}, ms\n")
    print(f"{'N':>8}{'forward':>10}{'of copy':>9}{'fwd+bwd':>10}{'of copy':>9}{'array code':>12}{'error / bound':>15}")
    rows = []
    for N in lengths:
        host = np.random.default_rng(0).standard_normal((4, heads, N, D)).astype(np.float32)
        q, k, v, dout = (cp.asarray(x) for x in host)
        ratio = _worst_ratio(cp, *host[:, :1, : min(N, 512)])
        if ratio > 1:
            raise RuntimeError(f"N = {N}: the result is {ratio:.3g} times its bound off; nothing is timed")

        def forward(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return causal_linear_attention(q, k, v)

        def both(q: Any = q, k: Any = k, v: Any = v, dout: Any = dout) -> Any:
            return vjp(causal_linear_attention, q, k, v)[1](dout)

        def copies(count: int, x: Any = q) -> Any:
            return [x.copy() for _ in range(count)]

        contest: dict[str, Callable[[], Any]] = {"forward": forward, "both": both, "copy 2": partial(copies, 2), "copy 6": partial(copies, 6),
                                                 "array": partial(_array_code, cp, q, k, v)}
        t = {name: _median(cp, f, repeats) for name, f in contest.items()}
        rows.append({"N": N, "heads": heads, "D": D, "ratio": ratio, **t})
        print(f"{N:8}{t['forward']:10.3f}{t['forward'] / t['copy 2']:9.2f}{t['both']:10.3f}{t['both'] / t['copy 6']:9.2f}"
              f"{t['array']:12.3f}{ratio:15.3f}")
    return {"device": rows}


def _array_code(cp: Any, q: Any, k: Any, v: Any) -> Any:
    """The loop-free form in CuPy's own functions, whose products are cuBLAS's."""
    from ..attention import attention_functional_forward
    from ..causal import causal_scan_forward
    from ..features import FEATURE_MAPS
    start = cp.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1] + 1), dtype=v.dtype)
    return attention_functional_forward(causal_scan_forward, q, k, v, start, FEATURE_MAPS["elu1"], 1e-6)[0]


def _worst_ratio(cp: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> float:
    """The largest error of out, dq, dk and dv in units of the bound derived for it."""
    zero = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]))
    b = budgets.attention_budget(q, k, v, zero, zero[..., 0], dout, zero, zero[..., 0], phi=oracle.eq7,
                                 dphi=lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0))))
    (out, _), pullback = vjp(causal_linear_attention, *(cp.asarray(x) for x in (q, k, v)))
    (right, _), exact = vjp(causal_linear_attention, *(x.astype(np.float64) for x in (q, k, v)))
    got, expected = (out, *pullback(cp.asarray(dout))[:3]), (right, *exact(dout.astype(np.float64))[:3])
    return max(budgets.worst_ratio(x.get(), y, bound) for x, y, bound in zip(got, expected, (b.out, b.dq, b.dk, b.dv), strict=True))


def _median(cp: Any, f: Callable[[], Any], repeats: int) -> float:
    """Milliseconds between two events on the stream, after three calls to warm up."""
    for _ in range(3):
        f()
    times = []
    for _ in range(repeats):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end))
    return statistics.median(times)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError:
        from .._array import missing_extra
        raise missing_extra("cupy", "cuda13x") from None
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"no CUDA device: CuPy is here and says {error}; python -m refattn bench --cuda-static needs none") from None
    return cupy
