"""CUDA kernels compiled for every architecture without a GPU, and what the compiler says about them.

NVRTC, the compiler that CuPy uses, needs neither a driver nor a device. What it hands back is evidence, not a measurement: registers, spills
and shared memory as ptxas counts them; from those, by NVIDIA's rule, how many blocks a multiprocessor holds at once; and the instructions.

    compiled = nvrtc_compile(source, ["scale<float>"], "sm_90", ("-std=c++17", *cupy_options()))
    ptxas_figures(compiled.log)[compiled.lowered["scale<float>"]]["spill_stores"]
    sass(compiled.cubin)[compiled.lowered["scale<float>"]]

Needs the extra `nvrtc` (wheels for Linux, no CUDA toolkit). How fast a kernel is, and whether it is right, is not seen here.
"""
from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .._array import missing_extra


class Multiprocessor(NamedTuple):
    """What one multiprocessor has: resident threads and blocks, bytes of shared memory. `reserved` bytes of each block are the driver's."""

    threads: int
    blocks: int
    shared: int
    shared_per_block: int
    reserved: int
    shared_unit: int


# CUDA programming guide, "technical specifications per compute capability", and cuda_occupancy.h, with which the tests compare.
MULTIPROCESSORS = {
    "sm_75": Multiprocessor(1024, 16, 64 << 10, 64 << 10, 0, 256),
    "sm_80": Multiprocessor(2048, 32, 164 << 10, 163 << 10, 1 << 10, 128),
    "sm_86": Multiprocessor(1536, 16, 100 << 10, 99 << 10, 1 << 10, 128),
    "sm_89": Multiprocessor(1536, 24, 100 << 10, 99 << 10, 1 << 10, 128),
    "sm_90": Multiprocessor(2048, 32, 228 << 10, 227 << 10, 1 << 10, 128),
    "sm_100": Multiprocessor(2048, 32, 228 << 10, 227 << 10, 1 << 10, 128),
    "sm_120": Multiprocessor(1536, 24, 100 << 10, 99 << 10, 1 << 10, 128),
}
ARCHS = tuple(MULTIPROCESSORS)
REGISTERS, REGISTER_UNIT, PARTITIONS, WARP = 65536, 256, 4, 32      # the same on all of them


class Compiled(NamedTuple):
    """`lowered`: name expression → the symbol in the cubin. `log`: warnings, and the figures of ptxas."""

    cubin: bytes
    lowered: dict[str, str]
    log: str


class Occupancy(NamedTuple):
    """Blocks on one multiprocessor at once, the share of its warps that they are, and what stops one more."""

    blocks: int
    fraction: float
    limit: str


def cupy_options() -> tuple[str, ...]:
    """What CuPy adds to the options of a RawModule, besides -arch=sm_XX and include folders, and what changes the code that comes out.

    Read in the source of CuPy 14.2 and seen in its call of NVRTC. Subnormal floats become 0 (-ftz=true) even where nobody asks for it. Also
    added is --std=c++17, but only where the options name no standard, and in older releases another one: name it. Include folders are those of
    CuPy's own copies of CUB, Thrust and libcu++ and that of the toolkit; only the last is here. Warnings are not shown.

    >>> cupy_options()
    ('-ftz=true', '--device-as-default-execution-space')
    """
    return "-ftz=true", "--device-as-default-execution-space"


def nvrtc_compile(source: str, names: Sequence[str], arch: str, options: Sequence[str] = (), headers: Mapping[str, str] | None = None,
                  path: str = "kernel.cu") -> Compiled:
    """Machine code of the kernels `names` (expressions such as `scale<float>`) for `arch`, "sm_75" to what the wheel knows.

    `options` are NVRTC's; CuPy's are `cupy_options()`. `headers` maps the name in an #include to its text; those of CUDA are found without.
    `path` is what messages call the source. -Xptxas=-v is always added: the figures in the log.

    ValueError: `arch: expected one of sm_75, ..., got 'sm_70'`. RuntimeError with the log where it does not compile. ImportError names the
    extra `nvrtc`.

        nvrtc_compile("__global__ void zero(float* x) { x[threadIdx.x] = 0; }", ["zero"], "sm_90").lowered   # {'zero': '_Z4zeroPf'}
    """
    library, include = _nvrtc()
    known = _known_archs()
    if arch not in known:
        raise ValueError(f"arch: expected one of {', '.join(known)}, got {arch!r}: this NVRTC compiles for no other")
    program, text, size = ctypes.c_void_p(), {key: value.encode() for key, value in (headers or {}).items()}, ctypes.c_size_t()
    _ok(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), path.encode(), len(text), _strings(text.values()),
                                   _strings(key.encode() for key in text)))
    try:
        for name in names:
            _ok(library.nvrtcAddNameExpression(program, name.encode()))
        every = (f"-arch={arch}", "-Xptxas=-v", f"-I{include}", *options)
        failed = library.nvrtcCompileProgram(program, len(every), _strings(option.encode() for option in every))
        _ok(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        _ok(library.nvrtcGetProgramLog(program, buffer))
        log = buffer.value.decode(errors="replace")
        if failed:
            raise RuntimeError(f"{path} does not compile for {arch}: {library.nvrtcGetErrorString(failed).decode()}\n{log}")
        _ok(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _ok(library.nvrtcGetCUBIN(program, cubin))
        lowered, symbol = {}, ctypes.c_char_p()
        for name in names:
            _ok(library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol)))
            lowered[name] = (symbol.value or b"").decode()
        return Compiled(cubin.raw, lowered, log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def log_warnings(log: str) -> list[str]:
    """The lines of a log that warn: of the compiler, of ptxas, and what ptxas calls a performance loss.

    >>> log_warnings('k.cu(3): warning #177-D: variable "x" was declared but never referenced\\nptxas info    : 0 bytes gmem')
    ['k.cu(3): warning #177-D: variable "x" was declared but never referenced']
    """
    return [line for line in log.splitlines() if re.search(r"\bwarning\b *[:#]|Potential Performance Loss", line)]


def ptxas_figures(log: str) -> dict[str, dict[str, int]]:
    """For each function in the log: registers a thread, bytes of spills and of stack a thread, bytes of static shared memory a block.

    A stack without spills holds arrays that do not fit registers, because their indices are not known to the compiler. A device function
    that is called and not inlined has registers 0, for the kernel's are counted with its callees', but spills of its own, which the kernel's
    do not contain; called by some kernels, it is there once, with the worst of them.

    >>> ptxas_figures('''
    ... ptxas info    : Compiling entry function 'f' for 'sm_90'
    ... ptxas info    : Function properties for f
    ... ptxas         .     16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
    ... ptxas info    : Used 32 registers, used 1 barriers, 400 bytes smem
    ... ''')
    {'f': {'registers': 32, 'spill_stores': 12, 'spill_loads': 8, 'stack': 16, 'shared': 400}}
    """
    found: dict[str, dict[str, int]] = {}
    symbol = entry = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            entry = match[1]
        elif match := re.search(r"Function properties for (\S+)", line):
            symbol = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            before = found.get(symbol, {"spill_stores": 0, "spill_loads": 0, "stack": 0})
            found[symbol] = {"registers": 0, "spill_stores": max(stores, before["spill_stores"]),
                             "spill_loads": max(loads, before["spill_loads"]), "stack": max(stack, before["stack"]), "shared": 0}
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[entry].update(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return found


def occupancy(arch: str, threads: int, registers: int, shared: int) -> Occupancy:
    """How many blocks of so many threads, registers a thread and bytes of shared memory (static and dynamic) one multiprocessor holds.

    Registers are given to warps, 256 at a time, in four partitions; shared memory to blocks. 0 blocks: such a block cannot be launched.
    `limit` is threads, blocks, registers or shared; where some are equally tight, the first of these. Shared memory over 48 KB is counted as
    asked for (`max_dynamic_shared_size_bytes`), and the multiprocessor's L1 as giving all that shared memory may have.

    ValueError names the argument: `registers: expected 1 to 255, got 300`.

    >>> occupancy("sm_80", 256, 128, 45440)
    Occupancy(blocks=2, fraction=0.25, limit='registers')
    >>> occupancy("sm_75", 256, 40, 40000)
    Occupancy(blocks=1, fraction=0.25, limit='shared')
    """
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"arch: expected one of {', '.join(ARCHS)}, got {arch!r}: its limits are not in the table")
    for name, value, low, high in (("threads", threads, 1, 1024), ("registers", registers, 1, 255), ("shared", shared, 0, 2**31)):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {value}: no kernel has another number")
    sm, warps = MULTIPROCESSORS[arch], _up(threads, WARP) // WARP
    a_warps_registers = _up(registers * WARP, REGISTER_UNIT)
    a_blocks_shared = _up(shared + sm.reserved, sm.shared_unit)
    warps_by_registers = REGISTERS // PARTITIONS // a_warps_registers * PARTITIONS
    most = {
        "threads": sm.threads // WARP // warps,
        "blocks": sm.blocks,
        "registers": warps_by_registers // warps,
        "shared": sm.shared // a_blocks_shared if 0 < a_blocks_shared <= sm.shared_per_block + sm.reserved else 0 if a_blocks_shared else sm.blocks,
    }
    limit = min(most, key=lambda name: most[name])
    return Occupancy(most[limit], most[limit] * warps * WARP / sm.threads, limit)


def sass(cubin: bytes) -> dict[str, list[str]]:
    """The machine instructions of each function, `"HMMA.16816.F32 R4, ..."`, a predicate such as `@P0` before its instruction.

    HMMA is a tensor core at work; LDL and STL are loads and stores of local memory, that is of spills and of stack.

    ImportError names the extra `nvrtc`; RuntimeError with nvdisasm's words where the cubin is none.
    """
    tool = next((folder / "bin" / "nvdisasm" for folder in _folders() if (folder / "bin" / "nvdisasm").exists()), None)
    if tool is None:
        raise missing_extra("nvidia-cuda-nvdisasm", "nvrtc")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-json", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm cannot read the cubin: {done.stderr.strip() or done.stdout.strip()}")
    _, functions = json.loads(done.stdout)
    return {function["function-name"]: [_instruction(x) for x in function["sass-instructions"]] for function in functions}


def cuda_static_table(source: str, instances: Iterable[tuple[str, int, int]], archs: Sequence[str] = ARCHS,
                      options: Sequence[str] = ("-std=c++17", *cupy_options()), path: str = "kernel.cu") -> list[dict[str, Any]]:
    """A row for each architecture and instance, `(name expression, threads, bytes of dynamic shared memory)`.

    Keys: kernel, arch, threads, registers, spill_stores, spill_loads, stack, static_shared, dynamic_shared, blocks, occupancy, limit. Spills
    and stack of device functions that were not inlined count for every kernel: which of them calls one, the log does not say.

    RuntimeError where the source does not compile, or compiles with a warning; its words are the log's.
    """
    rows, instances = [], list(instances)
    for arch in archs:
        compiled = nvrtc_compile(source, list(dict.fromkeys(name for name, _, _ in instances)), arch, options, path=path)
        if warned := log_warnings(compiled.log):
            raise RuntimeError(f"{path} compiles for {arch} with warnings:\n" + "\n".join(warned))
        figures = ptxas_figures(compiled.log)
        called = [figure for figure in figures.values() if not figure["registers"]]
        for name, threads, dynamic in instances:
            own = figures[compiled.lowered[name]]
            total = {key: own[key] + sum(figure[key] for figure in called) for key in ("spill_stores", "spill_loads", "stack")}
            held = occupancy(arch, threads, own["registers"], own["shared"] + dynamic)
            rows.append({"kernel": name, "arch": arch, "threads": threads, "registers": own["registers"], **total,
                         "static_shared": own["shared"], "dynamic_shared": dynamic,
                         "blocks": held.blocks, "occupancy": held.fraction, "limit": held.limit})
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as lines of text, numbers to the right.

    >>> print(format_table([{"kernel": "f<64>", "registers": 40, "occupancy": 0.5}, {"kernel": "g", "registers": 128, "occupancy": 0.25}]))
    kernel  registers  occupancy
    f<64>          40       0.50
    g             128       0.25
    """
    if not rows:
        return ""
    cells = [list(rows[0]), *([f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    words = [isinstance(x, str) for x in rows[0].values()]
    return "\n".join("  ".join(x.ljust(width) if word else x.rjust(width) for x, width, word in zip(line, widths, words)).rstrip()
                     for line in cells)


# --- the wheels ------------------------------------------------------------------------------------------------------------------------

def _folders() -> list[Path]:
    """Where the wheels of CUDA 13 put what they bring: all into one folder of the namespace package `nvidia`."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) / "cu13" for place in spec.submodule_search_locations or ()] if spec else []


@cache
def _nvrtc() -> tuple[ctypes.CDLL, Path]:
    """The library, and the folder of CUDA's headers."""
    for folder in _folders():
        library, include = folder / "lib" / "libnvrtc.so.13", folder / "include"
        if library.exists() and (include / "cuda_fp16.h").exists() and (include / "crt" / "mma.h").exists():
            loaded = ctypes.CDLL(str(library))
            loaded.nvrtcGetErrorString.restype = ctypes.c_char_p
            return loaded, include
    raise missing_extra("NVRTC for CUDA 13 with its headers (Linux)", "nvrtc")


@cache
def _known_archs() -> list[str]:
    library, _ = _nvrtc()
    number = ctypes.c_int()
    _ok(library.nvrtcGetNumSupportedArchs(ctypes.byref(number)))
    known = (ctypes.c_int * number.value)()
    _ok(library.nvrtcGetSupportedArchs(known))
    return [f"sm_{arch}" for arch in known]


def _ok(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC: {_nvrtc()[0].nvrtcGetErrorString(code).decode()}")


def _strings(texts: Iterable[bytes]) -> Any:
    every = list(texts)
    return (ctypes.c_char_p * len(every))(*every)


def _instruction(x: Mapping[str, str]) -> str:
    return " ".join(word for word in (x.get("predicate"), x["opcode"], x.get("operands")) if word)


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
