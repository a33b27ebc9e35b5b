"""Compile CUDA kernels for any architecture without a GPU, and read what the compiler says of them.

    compiled = nvrtc_compile(source, ["scale<float>"], 90)
    compiled.figures["scale<float>"]          # Figures(registers=…, spilled=0, stack=0, shared=…)
    occupancy(90, 256, 64, 49152)             # Occupancy(blocks=4, fraction=0.5, limit="shared memory")
    sass(compiled)["scale<float>"]            # the machine's instructions

NVRTC comes from pip (extra `nvrtc`, CUDA 13: one set of wheels whose names have no version) and is called through ctypes. With -Xptxas=-v its log
has registers, spills and shared memory of each kernel for the architecture asked for. sm_75 to sm_120 need neither driver nor device.
"""
from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .._array import missing_extra

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# What CuPy adds to a RawModule's own options: its headers, the default device of functions, and that subnormal numbers count as 0
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")

# Per multiprocessor: threads, blocks, registers, bytes of shared memory; the most of it for one block; bytes that the driver keeps per block.
# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
MULTIPROCESSOR = {
    75: (1024, 16, 65536, 64 << 10, 64 << 10, 0),
    80: (2048, 32, 65536, 164 << 10, 163 << 10, 1024),
    86: (1536, 16, 65536, 100 << 10, 99 << 10, 1024),
    89: (1536, 24, 65536, 100 << 10, 99 << 10, 1024),
    90: (2048, 32, 65536, 228 << 10, 227 << 10, 1024),
    100: (2048, 32, 65536, 228 << 10, 227 << 10, 1024),
    120: (1536, 24, 65536, 100 << 10, 99 << 10, 1024),
}


class Figures(NamedTuple):
    """Of one kernel: registers a thread, bytes spilled to local memory (stores and loads), bytes of stack, bytes of static shared memory."""

    registers: int
    spilled: int
    stack: int
    shared: int


class Compiled(NamedTuple):
    """`figures` and `symbols` by name expression; `cubin` is the machine code; `log` all that the compiler said."""

    cubin: bytes
    figures: dict[str, Figures]
    symbols: dict[str, str]
    log: str


class Occupancy(NamedTuple):
    """Blocks that a multiprocessor holds at a time, the fraction of its warps that are then in use, and what allows no more."""

    blocks: int
    fraction: float
    limit: str


def nvrtc_compile(source: str, names: Sequence[str], architecture: int, options: Sequence[str] = ("-std=c++17", *CUPY_OPTIONS)) -> Compiled:
    """Compile `source` and instantiate `names` (template instances too) for sm_`architecture`.

    Raises ImportError naming the extra where NVRTC is not installed, RuntimeError with the compiler's log for a source that does not compile,
    and ValueError for an architecture that this NVRTC does not know.
    """
    library, include = _library(), _folder() / "include"
    count = ctypes.c_int()
    _check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check(library.nvrtcGetSupportedArchs(known))
    if architecture not in known:
        raise ValueError(f"architecture: expected one of {', '.join(map(str, known))}, got {architecture}")
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        for name in names:
            _check(library.nvrtcAddNameExpression(program, name.encode()))
        given = [*options, f"-arch=sm_{architecture}", "-Xptxas=-v", f"-I{include}", f"-I{include / 'cccl'}"]
        failed = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*(x.encode() for x in given)))
        log = _bytes(program, "ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise RuntimeError(f"NVRTC for sm_{architecture}:\n{log}")
        symbols = {name: _lowered(program, name) for name in names}
        figures = ptxas_figures(log)
        return Compiled(_bytes(program, "CUBIN"), {name: figures[symbol] for name, symbol in symbols.items()}, symbols, log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def ptxas_figures(log: str) -> dict[str, Figures]:
    """The figures of each symbol in a log of ptxas -v.

    >>> ptxas_figures("Compiling entry function 'f' for 'sm_90'\\n 8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\\n"
    ...               "Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem")
    {'f': Figures(registers=40, spilled=8, stack=8, shared=512)}
    """
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if numbers is None or used is None:
            continue
        stack, stores, loads = map(int, numbers.groups())
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.partition("'")[0]] = Figures(int(used[1]), stores + loads, stack, int(shared[1]) if shared else 0)
    return found


def occupancy(architecture: int, threads: int, registers: int, shared: int) -> Occupancy:
    """How many blocks of `threads` threads with so many registers each and so many bytes of shared memory are on a multiprocessor at a time.

    Registers are given to warps in units of 256, shared memory to blocks in units of 128 bytes.

    >>> occupancy(80, 256, 64, 50048)
    Occupancy(blocks=3, fraction=0.375, limit='shared memory')
    """
    if architecture not in MULTIPROCESSOR:
        raise ValueError(f"architecture: expected one of {', '.join(map(str, MULTIPROCESSOR))}, got {architecture}")
    most_threads, most_blocks, all_registers, all_shared, block_shared, kept = MULTIPROCESSOR[architecture]
    warps = -(-threads // 32)
    if shared > block_shared:
        return Occupancy(0, 0.0, "shared memory")
    allowed = {"threads": most_threads // (32 * warps), "blocks": most_blocks,
               "registers": all_registers // (-(-registers * 32 // 256) * 256) // warps,
               "shared memory": all_shared // max(-(-(shared + kept) // 128) * 128, 1)}
    limit = min(allowed, key=lambda name: allowed[name])
    return Occupancy(allowed[limit], allowed[limit] * warps * 32 / most_threads, limit)


def sass(compiled: Compiled) -> dict[str, list[str]]:
    """The instructions of each kernel, by nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        text = subprocess.run([_folder() / "bin" / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\w+):", text, flags=re.MULTILINE)[1:]
    by_symbol = dict(zip(parts[::2], parts[1::2], strict=True))
    return {name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", by_symbol[symbol]) for name, symbol in compiled.symbols.items()}


@cache
def _folder() -> Path:
    """Where pip put the CUDA 13 wheels."""
    found = importlib.util.find_spec("nvidia")
    for root in (found.submodule_search_locations or []) if found else []:
        if (Path(root) / "cu13" / "include").is_dir():
            return Path(root) / "cu13"
    raise missing_extra("nvidia-cuda-nvrtc", "nvrtc")


@cache
def _library() -> ctypes.CDLL:
    for path in sorted((_folder() / "lib").glob("libnvrtc.so*")):
        return ctypes.CDLL(str(path))
    raise missing_extra("nvidia-cuda-nvrtc", "nvrtc")


def _check(code: int) -> None:
    if code:
        name = _library().nvrtcGetErrorString
        name.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {name(code).decode()}")


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size, library = ctypes.c_size_t(), _library()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _lowered(program: ctypes.c_void_p, name: str) -> str:
    symbol = ctypes.c_char_p()
    _check(_library().nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol)))
    return (symbol.value or b"").decode()
