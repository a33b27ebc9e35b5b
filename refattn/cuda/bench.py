"""What `python -m refattn bench --cuda-static` and `--device` print: figures of the kernels without a GPU, and times with one."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .. import causal_linear_attention, linear_attention, oracle, softmax_attention, vjp
from .._array import missing_extra
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

COPY, OURS, ARRAY, SDPA, FLA = "copy of as many bytes", "refattn", "array code (cuBLAS)", "torch SDPA (softmax, quadratic)", "flash-linear-attention"
ROUNDINGS = 16         # half a dozen operands and results are rounded on the way to a number, each by u; another function is off by more
TF32 = 2.0**-11        # u of what matrix units may make of float32
CHECKED_SCORES = 2048  # positions for which softmax attention is checked: float64 on the host is quadratic too
SECONDS = 1.0          # of timing for one median at most, where three runs take no longer
Runs = tuple[Callable[[], Any], Callable[[], Any]]


class Contestant(NamedTuple):
    """`of(q, k, v, dout)` makes two functions for arrays (heads, N, D) of the device: forward() → out, both() → (out, dq, dk, dv).
    `computes` is the function of refattn that it has to agree with; None: nothing is computed."""

    name: str
    computes: Callable[..., Any] | None
    of: Callable[[Any, Any, Any, Any], Runs]
    to_host: Callable[[Any], np.ndarray]


def contestants(cp: Any, torch: Any = None, fla: Any = None) -> list[Contestant]:
    """Who is timed, the floor first. `torch`: the module, `fla`: flash-linear-attention's `chunk_linear_attn`; None where not installed."""
    found = [Contestant(COPY, None, _copies, _get), Contestant(OURS, linear_attention, _ours, _get),
             Contestant(ARRAY, linear_attention, partial(_array_code, cp), _get)]
    if torch is not None:
        sdpa = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        found.append(Contestant(SDPA, softmax_attention, partial(_by_torch, torch, sdpa, lambda x: x[None]), lambda x: _from_torch(x)[0]))
    if torch is not None and fla is not None:

        def attention(q: Any, k: Any, v: Any) -> Any:
            elu = torch.nn.functional.elu
            return fla(elu(q) + 1, elu(k) + 1, v, scale=1.0, normalize=True)[0]

        def positions_first(x: Any) -> Any:                                                        # (B, N, H, D) is its layout
            return cp.ascontiguousarray(x.swapaxes(0, 1))[None]

        found.append(Contestant(FLA, linear_attention, partial(_by_torch, torch, attention, positions_first),
                                lambda x: _from_torch(x)[0].swapaxes(0, 1)))
    return found


def device_report(cp: Any = None, lengths: Sequence[int] = (1024, 4096, 16384, 65536), heads: int = 8, D: int = 64,
                  dtypes: Sequence[str] = ("float32", "float16", "bfloat16"), repeats: int = 20, figure: str | None = None,
                  peers: dict[str, Any] | None = None) -> dict[str, Any]:
    """Median milliseconds of forward, and of forward and backward, of each contestant, a row for each dtype and N.

    Every result is checked first, ours within the bounds derived for it: a wrong one of ours is a RuntimeError, a peer that is wrong or fails
    is not timed, and a line says why. `peers`: torch and fla as `contestants` takes them; None: those that are installed. `figure`: the file
    to draw the times in. ImportError without CuPy, ml_dtypes or Matplotlib, RuntimeError without a device.
    """
    cp = _cupy() if cp is None else cp
    kinds = [_dtype(name) for name in dtypes]
    if figure is not None:
        _matplotlib()                                                                              # before minutes are spent
    found, rows = contestants(cp, **(_peers() if peers is None else peers)), []
    for name in (SDPA, FLA):
        if name not in [c.name for c in found]:
            print(f"{name}: not installed, or no torch with CUDA; not timed")
    for dtype in kinds:
        print(f"\ncausal attention on a device, {dtype.name}, B·H = {heads}, D = M = {D}\n")
        print(f"{'N':>8}{'forward ms':>12}{'of copy':>9}{'fwd+bwd ms':>12}{'of copy':>9}{'error / bound':>15}")
        for N in lengths:
            host = np.random.default_rng(0).standard_normal((4, heads, N, D)).astype(dtype)
            if (ratio := _worst_ratio(cp, *host[:, :1, : min(N, 512)])) > 1:
                raise RuntimeError(f"{dtype.name}, N = {N}: the result is {ratio:.3g} times its bound off; nothing is timed")
            arrays, floor = [cp.asarray(x) for x in host], None
            for c in found:
                try:
                    checked = _check(cp, c, host[:, :1])
                    forward, both = (_median(cp, f, repeats) for f in c.of(*arrays))
                except Exception as error:                                       # a peer's fault, want of memory too, costs its own row only
                    if c.name == OURS:
                        raise
                    print(f"{N:8}   {c.name}: not timed: {type(error).__name__}: {error}")
                    continue
                floor = floor or (forward, both)
                rows.append({"dtype": dtype.name, "N": N, "heads": heads, "D": D, "contestant": c.name, "forward": forward, "both": both,
                             "ratio": max(ratio, checked) if c.name == OURS else checked})
                print(f"{N:8}{forward:12.3f}{forward / floor[0]:9.2f}{both:12.3f}{both / floor[1]:9.2f}{rows[-1]['ratio']:15.3f}   {c.name}")
    if figure is not None:
        device_figure(rows, figure)
    return {"device": rows}


def device_figure(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Draw time against N for the rows of `device_report`: a column of panels for each dtype, a line for each contestant."""
    Figure = _matplotlib()
    dtypes, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("dtype", "contestant"))
    figure = Figure(figsize=(1 + 3.6 * len(dtypes), 7), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(dtypes), sharex=True, sharey=True, squeeze=False)
    for (r, c), axes in np.ndenumerate(panels):
        for i, name in enumerate(names):
            mine = [row for row in rows if (row["dtype"], row["contestant"]) == (dtypes[c], name)]
            axes.loglog([row["N"] for row in mine], [row[("forward", "both")[r]] for row in mine], color=f"C{i}", marker="os^vD"[i % 5],
                        linestyle="--" if name == COPY else "-", label=name)
        axes.set_title(f"{('forward', 'forward + backward')[r]}, {dtypes[c]}", fontsize=11)
        axes.set_xticks(lengths := sorted({row["N"] for row in rows}), [f"{N:,}" for N in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.supxlabel("N"), figure.supylabel("ms")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def _copies(q: Any, k: Any, v: Any, dout: Any) -> Runs:
    """The floor: a forward reads q, k, v and writes out, as two copies do; a backward reads 5 arrays and writes 3."""
    def copies(count: int) -> Any:
        return [q.copy() for _ in range(count)]
    return partial(copies, 2), partial(copies, 6)


def _ours(q: Any, k: Any, v: Any, dout: Any) -> Runs:
    def both() -> Any:
        out, pullback = vjp(linear_attention, q, k, v, causal=True)
        return out, *pullback(dout)
    return partial(linear_attention, q, k, v, causal=True), both


def _array_code(cp: Any, q: Any, k: Any, v: Any, dout: Any) -> Runs:
    """The loop-free form in CuPy's own functions, whose products are cuBLAS's; sums in float32."""
    from .._array import accumulator
    from ..attention import attention_functional_backward, attention_functional_forward
    from ..causal import causal_scan_backward, causal_scan_forward
    from ..features import FEATURE_MAPS
    start = cp.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1] + 1), dtype=accumulator(v.dtype))

    def forward() -> Any:
        return attention_functional_forward(causal_scan_forward, q, k, v, start, FEATURE_MAPS["elu1"], 1e-6)[0]

    def both() -> Any:
        out, _, residuals = attention_functional_forward(causal_scan_forward, q, k, v, start, FEATURE_MAPS["elu1"], 1e-6)
        return out, *attention_functional_backward(causal_scan_backward, dout, None, residuals)[:3]
    return forward, both


def _by_torch(torch: Any, f: Callable[..., Any], layout: Callable[[Any], Any], *arrays: Any) -> Runs:
    """f(q, k, v) on tensors, its gradients by autograd. Through DLPack as float32, which holds every number of the narrower dtypes."""
    dtype = getattr(torch, arrays[0].dtype.name)
    *inputs, dout = (torch.from_dlpack(layout(x).astype(np.float32)).to(dtype) for x in arrays)
    leaves = [x.clone().requires_grad_() for x in inputs]

    def forward() -> Any:
        with torch.no_grad():
            return f(*inputs)

    def both() -> Any:
        out = f(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)
    return forward, both


def _get(x: Any) -> np.ndarray:
    return x.get()


def _from_torch(x: Any) -> np.ndarray:
    return x.detach().float().cpu().numpy()


def _check(cp: Any, c: Contestant, host: np.ndarray) -> float:
    """The largest error of a contestant's results against float64, in units of ROUNDINGS of the largest number; RuntimeError if that is over
    1: one that computes something else would make its time worthless."""
    worst = 0.0
    if c.computes is None:
        return worst
    q, k, v, dout = host[:, :, : CHECKED_SCORES if c.computes is softmax_attention else None]
    forward, both = c.of(*(cp.asarray(x) for x in (q, k, v, dout)))
    out, pullback = vjp(c.computes, *(x.astype(np.float64) for x in (q, k, v)), causal=True)
    u = max(budgets.unit_roundoff(host.dtype.name), TF32)
    for what, x, y in zip(("out", "out, with gradients,", "dq", "dk", "dv"), (forward(), *both()), (out, out, *pullback(dout.astype(np.float64))),
                          strict=True):
        if (ratio := budgets.worst_ratio(c.to_host(x), y, ROUNDINGS * u * np.abs(y).max())) > 1:
            raise RuntimeError(f"{what} is not that of {c.computes.__name__}: {ratio:.3g} times the bound off")
        worst = max(worst, ratio)
    return worst


def _worst_ratio(cp: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> float:
    """The largest error of out, dq, dk and dv in units of the bound derived for it."""
    zero = np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]))
    b = budgets.attention_budget(q, k, v, zero, zero[..., 0], dout, zero, zero[..., 0], phi=oracle.eq7,
                                 dphi=lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0))))
    out, pullback = vjp(linear_attention, *(cp.asarray(x) for x in (q, k, v)), causal=True)
    right, exact = vjp(linear_attention, *(x.astype(np.float64) for x in (q, k, v)), causal=True)
    got, expected = (out, *pullback(cp.asarray(dout))), (right, *exact(dout.astype(np.float64)))
    return max(budgets.worst_ratio(x.get(), y, bound) for x, y, bound in zip(got, expected, (b.out, b.dq, b.dk, b.dv), strict=True))


def _median(cp: Any, f: Callable[[], Any], repeats: int) -> float:
    """Milliseconds between two events on the stream, after three calls to warm up."""
    for _ in range(3):
        f()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or sum(times) < 1e3 * SECONDS):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end))
    return statistics.median(times)


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            raise missing_extra("ml_dtypes", "bf16") from None
        return np.dtype(bfloat16)
    return np.dtype(name)


def _matplotlib() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "demo") from None
    return Figure


def _peers() -> dict[str, Any]:
    """torch, where it has CUDA, and flash-linear-attention's function, where they are installed."""
    found: dict[str, Any] = {}
    try:
        import torch
        if torch.cuda.is_available():
            found["torch"] = torch
            from fla.ops.linear_attn import chunk_linear_attn
            found["fla"] = chunk_linear_attn
    except ImportError:
        pass                                       # not installed: not timed, and a line says so
    return found


def _cupy() -> Any:
    try:
        import cupy
    except ImportError:
        raise missing_extra("cupy", "cuda13x") from None
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"no CUDA device: CuPy is here and says {error}; python -m refattn bench --cuda-static needs none") from None
    return cupy
