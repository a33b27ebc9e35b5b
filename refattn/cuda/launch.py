"""Launches the kernels of `linear.cu`, and for float16 and bfloat16 those of `tensor.cu`, on CuPy arrays.

The array module comes with the call: CuPy, or its stand-in `refattn.simt.cupy`, which runs the same kernels on the CPU. Forward:

    group_states  →  scan_states  →  group_outputs
       own Kᵀ V      what precedes      out, 1/(den + ε), and the last sum is the final state

Backward: the states before each group are kept (N / rows of them), so

    group_dq  →  group_states of φ(q) and G  →  scan_states from the end  →  group_dk_dv, or group_dk and group_dv where `both_at_once` is false

Where `tensor_fits` says so, (a) and (c) are the kernels of the same names with `_tc`, which take the same arguments, and group_dk_dv_tc serves all.

Shapes are those of `causal`: q (..., G·H, N, D), k (..., H, N, D), v (..., H, N, M), S (..., H, D, M), z (..., H, D). Nothing is checked here but
what CUDA limits; `causal_linear_attention` and `recurrence` check the rest.
"""
from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._array import Array, accumulator, dtype_name

Residuals = tuple[Any, ...]

THREADS = 256
GROUP_ROWS = 1024, 512, 256       # positions that one block walks through: the longer, the less is moved; the shorter, the more blocks there are
BLOCKS_WANTED = 256
BOTH_ROWS = 16                    # positions at a time where one kernel makes dk and dv
TENSOR_COLUMNS = 64               # of v, in a block of group_outputs_tc
STATIC_SHARED = 48 << 10          # more shared memory than this a kernel must ask for
C_TYPES = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}
NULL = np.uint64(0)


class Tile(NamedTuple):
    """How a block cuts operands of `width` features: C positions at a time, `columns` of the state."""

    C: int
    columns: int


def source(tensor: bool = False) -> str:
    """`linear.cu`, or `tensor.cu`, with what it includes, as one text for NVRTC. `#line` keeps the names of the files in messages."""
    return _with_includes("tensor.cu" if tensor else "linear.cu")


def _with_includes(name: str) -> str:
    """A file of this folder, the one include of this folder in it replaced by that file's text."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8").replace("#pragma once\n", "\n")
    for found in re.finditer(r'^#include "([^"]+)"\n', text, flags=re.MULTILINE):
        before, after = text[:found.start()], text[found.end():]
        line = before.count("\n") + 2
        return f'{before}#line 1 "{found[1]}"\n{_with_includes(found[1])}#line {line} "{name}"\n{after}'
    return text


def tile(width: int, columns: int, itemsize: int) -> Tile:
    """Fewer positions and columns where rows are long, so that a block fits the smallest shared memory there is, 64 KB.

    >>> tile(64, 64, 4), tile(256, 256, 4), tile(64, 20, 8)
    (Tile(C=32, columns=64), Tile(C=16, columns=16), Tile(C=16, columns=24))
    """
    fit = min(max(16384 // (itemsize * _up(width, 4)) // 8 * 8, 8), 64)
    return Tile((32 if width <= 128 else 16) * 4 // itemsize, min(fit, _up(columns, 8)))


def walk_bytes(width: int, tile: Tile, itemsize: int) -> int:
    """Shared memory of group_outputs, group_dq, group_dk and group_dv: x, y, z, the state, the scores, and a few rows of numbers."""
    C, columns = tile
    wide = columns + 4 if columns < 32 else columns
    numbers = 2 * C * (_up(width, 32) + 4) + C * wide + _up(width, 4) * (columns + 4) + C * (C + C // 2) + 3 * C + columns + width
    return numbers * itemsize


def both_at_once(D: int, M: int, itemsize: int) -> bool:
    """Whether dk and dv are one kernel: where its state leaves room for two blocks on a multiprocessor."""
    return max(D, M) <= 64 and itemsize == 4


def both_bytes(D: int, M: int, itemsize: int) -> int:
    """Shared memory of group_dk_dv: k, q, v, G, the state, two sets of scores, and three rows of numbers."""
    wide_d, wide_m, C = _up(D, 32), _up(M, 32), BOTH_ROWS
    return (2 * C * (wide_d + wide_m + 8) + wide_d * (wide_m + 4) + 2 * C * (C + C // 2) + wide_d + 2 * C) * itemsize


def state_bytes(width: int, tile: Tile, itemsize: int) -> int:
    """Shared memory of group_states: y, z, and two numbers a row."""
    C, columns = tile
    return (C * (_up(width, 32) + 4) + C * (columns + 4 if columns < 32 else columns) + 2 * C) * itemsize


def tensor_bytes(kernel: str, D: int, M: int) -> int:
    """Shared memory of group_states_tc: y and z, a few numbers, or a tile of each warp; of group_outputs_tc and group_dq_tc: x; y, under it the
    weights, and z, under both these tiles; the state, as two parts; the scores; and a few rows of numbers; of group_dk_dv_tc: k and v; q and do,
    under them these tiles; up to 64 rows of the state, as two parts, under them scores and weights; and a few rows of numbers. What may be two
    parts is counted as two."""
    C, stages, turned = 32, 8 * (15 * 24 + 16) * 4, kernel == "group_dq_tc"
    width, columns = (_up(M, 16), _up(D, 16)) if turned else (_up(D, 16), _up(M, 16))
    if kernel in ("group_states_tc", "group_costates_tc"):
        return max(2 * C * (2 * (width + 8) + columns + 8) + 4 * (2 * C + 8) * (kernel == "group_costates_tc"), stages)
    if kernel == "group_dk_dv_tc":
        operands = 2 * C * (2 * (width + 8) + columns + 8)
        state = max(4 * min(width, TENSOR_COLUMNS) * (columns + 8), 16 * C * (C + 8))
        return operands + max(operands, stages) + state + 4 * (width + 4 * C + 16)
    (x_parts, z_parts), columns = (1, 2) if turned else (2, 1), min(columns, TENSOR_COLUMNS)
    x, z, state = 2 * x_parts * C * (width + 8), 2 * z_parts * C * (columns + 8), 4 * width * (columns + 8)
    return x + max(max(x, 4 * C * (C + 8)) + z, stages) + state + 4 * (C * (C + 8) + columns + width + 4 * C + 8)


def tensor_fits(capability: int, dtype: str, D: int, M: int) -> bool:
    """Whether the tensor cores of a device take arrays: bfloat16 needs sm_80, and so does a block of half with over 64 KB.

    >>> tensor_fits(75, "float16", 64, 64), tensor_fits(75, "float16", 128, 128), tensor_fits(80, "bfloat16", 128, 128)
    (True, False, True)
    """
    if dtype not in ("float16", "bfloat16") or max(D, M) > 128:
        return False
    most = max(tensor_bytes(kernel, D, M) for kernel in ("group_outputs_tc", "group_dq_tc", "group_dk_dv_tc"))
    return capability >= (75 if dtype == "float16" and most <= 64 << 10 else 80)


def instances(dtype: str, D: int, M: int, feature: int, normalised: bool, tensor: bool = False) -> list[tuple[str, int, int]]:
    """(name expression, threads, dynamic shared memory) of every kernel in `source(tensor)` for one size, those for reading too."""
    size, flags = 8 if dtype == "float64" else 4, f"{C_TYPES[dtype]}, {D}, {M}, {feature}, {str(normalised).lower()}"
    launched = [(name, THREADS, shared_bytes(kernel, D, M, size)) for kernel, name in names(dtype, D, M, feature, normalised, tensor).items()]
    if tensor:
        return launched
    sequential = [(f"causal_sequential<{flags}>", 64, 0)] if D * size <= 256 else []
    return [*launched, (f"causal_naive<{flags}>", THREADS, 0), *sequential]


def shared_bytes(kernel: str, D: int, M: int, itemsize: int) -> int:
    """Dynamic shared memory of a kernel, by its name in `names`."""
    if kernel.endswith("_tc"):
        return tensor_bytes(kernel, D, M)
    if kernel in ("group_states", "group_costates"):
        return state_bytes(D, tile(D, M, itemsize), itemsize)
    if kernel in ("group_outputs", "group_dv"):
        return walk_bytes(D, tile(D, M, itemsize), itemsize)
    if kernel in ("group_dq", "group_dk"):
        return walk_bytes(M, tile(M, D, itemsize), itemsize)
    return both_bytes(D, M, itemsize) if kernel == "group_dk_dv" else 0


def group_rows(heads: int, N: int) -> int:
    """Positions in a group: the most that still leave every multiprocessor something to do.

    >>> group_rows(1, 65536), group_rows(32, 4096), group_rows(64, 4096)
    (256, 512, 1024)
    """
    for rows in GROUP_ROWS:
        if heads * -(-N // rows) >= BLOCKS_WANTED:
            return rows
    return rows


def names(dtype: str, D: int, M: int, feature: int, normalised: bool, tensor: bool = False) -> dict[str, str]:
    """The instances that one call of forward and backward needs: kernel → name expression. `tensor`: those on tensor cores."""
    T, size = C_TYPES[dtype], 8 if dtype == "float64" else 4
    flags = f"{feature}, {str(normalised).lower()}"
    over_d, over_m = (f"{T}, {D}, {M}, {t.C}, {t.columns}, {flags}" for t in (tile(D, M, size), tile(M, D, size)))
    if tensor:
        kinds = {"group_states": ", false", "group_costates": ", true", "group_outputs": "", "group_dq": "", "group_dk_dv": ""}
        return {"scan_states": "scan_states<float>", **{
            f"{kernel}_tc": f"{kernel.replace('costates', 'states')}_tc<{T}, {D}, {M}, {flags}{more}>" for kernel, more in kinds.items()}}
    return {
        "group_states": f"group_states<{over_d}, false>", "group_costates": f"group_states<{over_d}, true>",
        "scan_states": f"scan_states<{'double' if size == 8 else 'float'}>", "group_outputs": f"group_outputs<{over_d}>",
        "group_dq": f"group_dq<{over_m}>", "causal_step": f"causal_step<{T}, {D}, {M}, {flags}>",
        **({"group_dk_dv": f"group_dk_dv<{T}, {D}, {M}, {BOTH_ROWS}, {flags}>"} if both_at_once(D, M, size) else
           {"group_dk": f"group_dk<{over_m}>", "group_dv": f"group_dv<{over_d}>"}),
    }


def causal_forward(xp: Any, q: Array, k: Array, v: Array, S: Array | None = None, z: Array | None = None, *, feature: int = 0,
                   normalised: bool = False, scale: float = 1.0, eps: float = 0.0, query_lengths: Array | None = None,
                   key_lengths: Array | None = None) -> tuple[Array, Array, Array, Residuals]:
    """out, S_N, z_N and what the backward needs. `feature`: 0 identity, 1 elu + 1, applied to q and k while they are read.

    Lengths are int32, one for each head. O(N·D·M) flops; extra memory a state for each group of positions, see `group_rows`.
    """
    heads, shared, N, D, M, acc = _sizes(q, k, v)
    with _device(xp, q):
        q, k, v = (_ready(xp, x) for x in (q, k, v))
        out = xp.empty((*q.shape[:-1], M), dtype=v.dtype)
        end_S, end_z = xp.zeros((*k.shape[:-2], D, M), dtype=acc), xp.zeros((*k.shape[:-2], D), dtype=acc)
        if S is not None:
            end_S, end_z = _ready(xp, S), end_z if z is None else _ready(xp, z)
        rows = group_rows(heads, N)
        groups = -(-N // rows)
        states = xp.empty((heads // max(shared, 1), groups, _up(D * M + D, 4)), dtype=acc)
        inv = xp.empty((heads, N) if normalised else (0,), dtype=acc)
        residuals = q, k, v, out, inv, states, query_lengths, key_lengths, rows, feature, normalised, scale
        if not heads * N:
            return out, end_S, end_z, residuals
        start_S, start_z, end_S, end_z = end_S, end_z, xp.empty_like(end_S), xp.empty_like(end_z)
        kernels = _kernels(xp, _device_id(xp), dtype_name(v), D, M, feature, normalised, _tensor(xp, v, D, M))
        number, i4, kv = states.dtype.type, np.int32, heads // shared
        shape = i4(N), i4(groups), i4(rows)
        kernels.run("group_states", kv * groups, k, v, NULL, NULL, states, _or_null(key_lengths), *shape, number(1))
        kernels.launch("scan_states", (kv, -(-(D * M + D) // THREADS)), 0,
                       states, start_S, start_z, end_S, end_z, i4(groups), i4(1), i4(D * M), i4(D), i4(0))
        kernels.run("group_outputs", heads * groups, q, k, v, states, out, inv if normalised else NULL, _or_null(query_lengths),
                    _or_null(key_lengths), *shape, i4(shared), number(scale), number(eps))
        return out, end_S, end_z, residuals


def causal_backward(xp: Any, dout: Array, dS: Array | None, dz: Array | None,
                    residuals: Residuals) -> tuple[Array, Array, Array, Array, Array]:
    """Transpose of `causal_forward`: dq, dk, dv, dS_0, dz_0. 5/2 of the forward's flops."""
    q, k, v, out, inv, states, query_lengths, key_lengths, rows, feature, normalised, scale = residuals
    heads, shared, N, D, M, acc = _sizes(q, k, v)
    with _device(xp, q):
        dout = _ready(xp, dout)
        dq, dk, dv = xp.empty_like(q), xp.empty_like(k), xp.empty_like(v)
        end_S = xp.zeros((*k.shape[:-2], D, M), dtype=acc) if dS is None else _ready(xp, dS)
        end_z = xp.zeros((*k.shape[:-2], D), dtype=acc) if dz is None else _ready(xp, dz)
        if not heads * N:
            return dq, dk, dv, end_S, end_z
        kernels = _kernels(xp, _device_id(xp), dtype_name(v), D, M, feature, normalised, _tensor(xp, v, D, M))
        dS, dz = xp.empty_like(end_S), xp.empty_like(end_z)
        groups, kv, number, i4 = states.shape[1], heads // shared, states.dtype.type, np.int32
        lengths = _or_null(query_lengths), _or_null(key_lengths)
        shape = i4(N), i4(groups), i4(rows), i4(shared), number(scale)
        quotient = (inv, xp.empty_like(inv)) if normalised else (NULL, NULL)
        costates = xp.empty((heads, groups, _up(D * M + D, 4)), dtype=acc)
        kernels.run("group_dq", heads * groups, q, k, v, dout, out, states, *quotient, dq, *lengths, *shape)
        kernels.run("group_costates", heads * groups, q, dout, *quotient, costates, lengths[0], i4(N), i4(groups), i4(rows), number(scale))
        kernels.launch("scan_states", (kv, -(-(D * M + D) // THREADS)), 0,
                       costates, end_S, end_z, dS, dz, i4(groups), i4(shared), i4(D * M), i4(D), i4(1))
        if "group_dk" not in kernels.functions:
            kernels.run("group_dk_dv", kv * groups, q, k, v, dout, costates, *quotient, dk, dv, *lengths, *shape)
            return dq, dk, dv, dS, dz
        kernels.run("group_dk", kv * groups, q, k, v, dout, costates, *quotient, dk, *lengths, *shape)
        kernels.run("group_dv", kv * groups, q, k, dout, costates, quotient[0], dv, *lengths, *shape)
        return dq, dk, dv, dS, dz


def causal_step(xp: Any, q_t: Array, k_t: Array, v_t: Array, S: Array, z: Array, *, feature: int = 0, normalised: bool = False,
                scale: float = 1.0, eps: float = 0.0) -> tuple[Array, Array, Array]:
    """One position: out_t, the new S and z. Each state is read once and written once."""
    heads, shared, _, D, M, _ = _sizes(q_t[..., None, :], k_t[..., None, :], v_t[..., None, :])
    with _device(xp, q_t):
        q_t, k_t, v_t, S, z = (_ready(xp, x) for x in (q_t, k_t, v_t, S, z))
        out, S_new, z_new = xp.empty((*q_t.shape[:-1], M), dtype=v_t.dtype), xp.empty_like(S), xp.empty_like(z)
        if heads:
            kernels, number = _kernels(xp, _device_id(xp), dtype_name(v_t), D, M, feature, normalised), S.dtype.type
            kernels.launch("causal_step", (heads // shared, -(-M // 64)), 0,
                           q_t, k_t, v_t, S, z, S_new, z_new, out, np.int32(shared), number(scale), number(eps))
        return out, S_new, z_new if normalised else z


class Kernels(NamedTuple):
    """The compiled instances of one size; by `names`."""

    functions: dict[str, Any]
    D: int
    M: int
    itemsize: int

    def run(self, name: str, blocks: int, *arguments: Any) -> None:
        """A kernel of (a) or (c), or that of tensor cores where there is one, with `blocks` blocks for each of its blocks of columns."""
        name = f"{name}_tc" if f"{name}_tc" in self.functions else name
        self.launch(name, (blocks, column_blocks(name, self.D, self.M, self.itemsize)), shared_bytes(name, self.D, self.M, self.itemsize), *arguments)

    def launch(self, name: str, grid: tuple[int, ...], shared_bytes: int, *arguments: Any) -> None:
        """On the current stream, with THREADS threads a block. ValueError where CUDA has no grid so large."""
        if grid[0] >= 2**31 or max(grid[1:], default=1) >= 2**16:
            raise ValueError(f"{name}: {grid} blocks are more than CUDA can launch (2³¹ - 1, 65,535): split the batch")
        self.functions[name](grid, (THREADS,), arguments, shared_mem=shared_bytes)


def column_blocks(kernel: str, D: int, M: int, itemsize: int) -> int:
    """How many blocks share the columns of the state, or of its transpose, in a kernel of (a) or (c)."""
    width, columns = (M, D) if kernel.startswith(("group_dq", "group_dk")) else (D, M)
    if kernel in ("group_dk_dv", "group_dk_dv_tc", "group_states_tc", "group_costates_tc"):
        return 1
    return -(-columns // (TENSOR_COLUMNS if kernel.endswith("_tc") else tile(width, columns, itemsize).columns))


@cache
def _kernels(xp: Any, device: int, dtype: str, D: int, M: int, feature: int, normalised: bool, tensor: bool = False) -> Kernels:
    """The compiled instances, once for each device; CuPy keeps what NVRTC made on disk. ImportError where CUDA's mma.h is needed and missing."""
    expressions, size = names(dtype, D, M, feature, normalised, tensor), 8 if dtype == "float64" else 4
    try:
        module = xp.RawModule(code=source(tensor), options=("-std=c++17",), name_expressions=tuple(expressions.values()))
        functions = {name: module.get_function(expression) for name, expression in expressions.items()}
    except Exception as error:
        if not (tensor and '"mma.h"' in str(error)):
            raise
        raise ImportError(f"{dtype}: the kernels for tensor cores need mma.h, of CUDA's own headers, which CuPy does not find; install them with: "
                          "pip install 'cupy-cuda13x[ctk]', or 'cupy-cuda12x[ctk]', whichever CuPy is here") from error
    for name, function in functions.items():
        needed = shared_bytes(name, D, M, size)
        if needed > STATIC_SHARED:
            function.max_dynamic_shared_size_bytes = needed
    return Kernels(functions, D, M, size)


def _tensor(xp: Any, v: Array, D: int, M: int) -> bool:
    return tensor_fits(int(xp.cuda.Device(_device_id(xp)).compute_capability), dtype_name(v), D, M)


def _sizes(q: Array, k: Array, v: Array) -> tuple[int, int, int, int, int, Any]:
    """(query heads in all, of them for one key head, N, D, M, accumulator)."""
    heads, kv = math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
    return heads, heads // max(kv, 1), q.shape[-2], q.shape[-1], v.shape[-1], accumulator(v.dtype)


def _device(xp: Any, x: Array) -> Any:
    """The device that the array lies on, as the current one."""
    return x.device if hasattr(x.device, "__enter__") else xp.cuda.Device(x.device)


def _device_id(xp: Any) -> int:
    return int(xp.cuda.runtime.getDevice())


def _or_null(x: Array | None) -> Any:
    return NULL if x is None else x


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _ready(xp: Any, x: Array) -> Array:
    """x as the kernels read it: contiguous, and from an address that 16 divides; a copy where it is not so."""
    x = xp.ascontiguousarray(x)
    return x.copy() if x.size and x.data.ptr % 16 else x
