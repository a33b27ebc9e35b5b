"""From a `.cu` source to kernels that run on NumPy arrays.

Only the declarations of `__shared__` arrays are rewritten, in place, so that every line keeps its number; all else that CUDA adds to C++ is
declared by the headers in `include/`. g++ makes a shared library of source and runtime, which is kept in the user's cache folder.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .audit import Report, read_report, watch

HERE = Path(__file__).parent
OWN = ("include/simt.h", "include/cuda_fp16.h", "include/cuda_bf16.h", "include/mma.h", "runtime.h", "runtime.cpp", "audit.cpp")
# Products and sums are rounded one by one (no contraction), and one library's kernels are not merged with another's of the same name.
FLAGS = ("-std=c++17", "-fPIC", "-w", "-g1", "-gdwarf-4", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden", "-fno-gnu-unique")
ORDERS = ("forward", "reverse", "shuffled")
SHARED_LIMIT = 227 << 10
GUARD = 4096      # bytes before and after each array: what runs past an end meets NaN, not another array

Audit = Literal[False, True, "traffic"]


class SimtError(RuntimeError):
    """A kernel that cannot be compiled, or cannot go on: deadlock, barrier divergence, a warp operation with an undefined result."""


def build(source: str, names: Sequence[str], *, defines: Sequence[str] = (), audit: Audit = False,
          path: str | os.PathLike[str] = "kernel.cu") -> Module:
    """Compile CUDA C++ for this machine; the kernels of `names` can then be launched.

    Parameters: `source`, the text; `names`, as C++ spells them, template arguments included (`"scale<float, 64>"`); `defines`, macros
    (`"STEPS=4"`); `path`, where the source comes from: messages bear its name, and `#include "x.cuh"` is looked up in its folder.
    `audit=True` makes every launch return a report of what is wrong and of the traffic, `"traffic"` of the traffic alone, which is faster.

    Raises RuntimeError if g++ is missing, SimtError with the compiler's words if the source is wrong, TypeError and ValueError for arguments.
    Costs about a second; a source that was built before is taken from the cache (`$XDG_CACHE_HOME` or `~/.cache`, `refattn/simt`).

    >>> module = build("__global__ void twice(float* x) { x[threadIdx.x] *= 2; }", ["twice"])    # doctest: +SKIP
    >>> x = np.arange(4, dtype=np.float32)                                                       # doctest: +SKIP
    >>> module.launch("twice", 1, 4, [x]); x                                                     # doctest: +SKIP
    array([0., 2., 4., 6.], dtype=float32)
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
        raise TypeError(f"names: expected a sequence of kernel names such as ['scale<float, 64>'], got {names!r}")
    if isinstance(defines, str):
        raise TypeError(f"defines: expected a sequence such as ['STEPS=4'], got the string {defines!r}")
    if audit not in (False, True, "traffic"):
        raise ValueError(f"audit: expected False, True or 'traffic', got {audit!r}")
    path = Path(path)
    files = _sources(source, path)
    table = "".join(f"simt::entry({_quoted(name)}, {name}),\n" for name in names)
    macros = "".join(f"#define {name} {value if equals else 1}\n" for name, equals, value in (define.partition("=") for define in defines))
    main = (f'#include "simt.h"\n{macros}#include {_quoted(path.name)}\n#line 1 "names"\n'
            f'extern simt::Entry simt_entries[];\nsimt::Entry simt_entries[] = {{\n{table}}};\n')
    flags = [*FLAGS, *(("-O1", "-fsanitize=thread,alignment") if audit else ("-O2",))]

    def compile_kernels(folder: Path, to: Path) -> None:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "kernels.cpp").write_text(main, encoding="utf-8")
        objects = [_object(name) for name in ("runtime.cpp", "audit.cpp")[:1 + bool(audit)]]
        run = subprocess.run(["g++", *flags, "-I.", f"-I{HERE / 'include'}", "-c", "kernels.cpp", "-o", "kernels.o"],
                             cwd=folder, capture_output=True, text=True)
        if run.returncode:
            raise SimtError(f"{path.name} does not compile:\n{run.stderr}")
        subprocess.run(["g++", "-shared", "-o", str(to), "kernels.o", *map(str, objects)], cwd=folder, check=True)

    library = _cached(".so", [main, *files, *files.values(), *flags, *_own()], compile_kernels)
    return Module(library, tuple(names), audit, (*files, *re.findall(r'(?m)^#line \d+ "([^"]+)"', source)))


class Module:
    """Compiled kernels; made by `build`."""

    def __init__(self, library: Path, names: tuple[str, ...], audit: Audit, files: tuple[str, ...]) -> None:
        self.names, self.audit, self._path, self._files = names, audit, library, files
        self._library = ctypes.CDLL(str(library))
        self._library.simt_signature.restype = self._library.simt_error.restype = ctypes.c_char_p
        self._lock = threading.Lock()      # the library runs one launch at a time

    def signature(self, name: str) -> list[str]:
        """The codes of a kernel's parameters: `i4` int, `u8`, `f4` float, `f2` half, `b2` bfloat16, `f4x4` float4; `p:f4` float*,
        `pc:f4` const float*; `s12` for another type of 12 bytes."""
        return self._library.simt_signature(self._index(name)).decode().split()

    def launch(self, name: str, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[Any], *, shared: int = 0,
               order: str = "forward", seed: int = 0) -> Report | None:
        """Run a kernel. `args`, in order: C-contiguous NumPy arrays for pointers, changed in place; NumPy scalars; for a null
        pointer None or np.uint64(0).

        Blocks run one after another, the threads of a block in turns: first to last (`order="forward"`), last to first (`"reverse"`) or in
        an order drawn anew whenever all have had their turn (`"shuffled"`, by `seed`). A right kernel gives the same bits in each.
        Arrays lie at multiples of 256 bytes, as on a device, and views where they lie in their arrays; `shared` is the size of the dynamic
        shared memory, which like the static one starts as NaN.

        Returns None, or a `Report` if the module was built with `audit`. Raises SimtError where the kernel cannot go on, TypeError and
        ValueError for arguments that do not fit the kernel or CUDA's limits.
        """
        index = self._index(name)
        grid, block = _extent("grid", grid, (2**31 - 1, 65535, 65535)), _extent("block", block, (1024, 1024, 64))
        if np.prod(block) > 1024:
            raise ValueError(f"block: expected at most 1024 threads, got {' × '.join(map(str, block))} = {np.prod(block)}")
        if not 0 <= shared <= SHARED_LIMIT:
            raise ValueError(f"shared: expected 0 ≤ bytes ≤ {SHARED_LIMIT}, got {shared}")
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
        codes = self.signature(name)
        _check_arguments(name, codes, args)
        arrays = {i: arg for i, arg in enumerate(args) if isinstance(arg, np.ndarray)}
        memory, addresses = _to_device(arrays)
        values = [np.uint64(addresses.get(i, 0)) if code[0] == "p" else args[i] for i, code in enumerate(codes)]
        cells = [ctypes.create_string_buffer(value.tobytes(), value.nbytes) for value in values]
        pointers = (ctypes.c_void_p * max(len(cells), 1))(*(ctypes.addressof(cell) for cell in cells))
        triple = ctypes.c_uint * 3
        with self._lock:
            if self.audit:
                watch(self._library, arrays, addresses, traffic_only=self.audit == "traffic")
            self._library.simt_launch(index, triple(*grid), triple(*block), ctypes.c_size_t(shared), pointers, ORDERS.index(order),
                                      ctypes.c_uint(seed))
            error = self._library.simt_error().decode()
            report = read_report(self._library, self._path, self._files, arrays) if self.audit else None
        for i, array in arrays.items():
            if not codes[i].startswith("pc:"):
                ctypes.memmove(array.ctypes.data, addresses[i], array.nbytes)
        del memory      # lived until here
        if error:
            raise SimtError(error)
        return report

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ValueError(f"name: expected one of {', '.join(self.names)}, got {name!r}; name it in build")
        return self.names.index(name)


# --- arguments ----------------------------------------------------------------------------------------------------------------------------

def _extent(name: str, value: int | Sequence[int], limits: tuple[int, int, int]) -> tuple[int, ...]:
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not 1 <= len(given) <= 3 or not all(isinstance(n, (int, np.integer)) for n in given):
        raise TypeError(f"{name}: expected an integer or one to three of them, got {value!r}")
    for n, limit in zip(given, limits):
        if not 1 <= n <= limit:
            empty = "; launch nothing where there is nothing to do" if n == 0 else ""
            raise ValueError(f"{name}: expected from 1 to {limits}, got {given}{empty}")
    return tuple(map(int, given)) + (1,) * (3 - len(given))


def dtype_code(dtype: np.dtype) -> str:
    """The code of `Module.signature` for a dtype: f4 for float32, b2 for bfloat16.

    >>> dtype_code(np.dtype(np.int64))
    'i8'
    """
    if dtype.name == "bfloat16":
        return "b2"
    return {"b": "u", "V": "s"}.get(dtype.kind, dtype.kind) + str(dtype.itemsize)


def _check_arguments(name: str, codes: list[str], args: Sequence[Any]) -> None:
    if len(args) != len(codes):
        raise ValueError(f"args: {name} has {len(codes)} parameters ({', '.join(codes)}), got {len(args)}")
    for i, (code, arg) in enumerate(zip(codes, args)):
        where, kind = f"argument {i} of {name}", code.rpartition(":")[2]
        got = f"{arg.dtype.name} {'array' if isinstance(arg, np.ndarray) else 'scalar'}" if hasattr(arg, "dtype") else type(arg).__name__
        if code[0] == "p":
            if arg is None or (isinstance(arg, np.uint64) and arg == 0):
                continue
            if not isinstance(arg, np.ndarray):
                raise TypeError(f"{where}: expected a NumPy array for {code}, got {got}")
            if kind[0] not in "sv" and kind.partition("x")[0] != dtype_code(arg.dtype):
                raise TypeError(f"{where}: expected an array of {kind}, got {got} ({dtype_code(arg.dtype)})")
            if not arg.flags.c_contiguous:
                raise ValueError(f"{where}: expected a C-contiguous array, got strides {arg.strides} for shape {arg.shape}; "
                                 "pass np.ascontiguousarray of it")
            if code.startswith("p:") and not arg.flags.writeable:
                raise ValueError(f"{where}: the kernel may write through it, and the array is read-only")
        elif not isinstance(arg, np.generic) or (dtype_code(arg.dtype) != kind and (kind[0] != "s" or arg.nbytes != int(kind[1:]))):
            raise TypeError(f"{where}: expected a NumPy scalar of {kind}, got {got}; pass for example np.int32(…) for i4, np.float32(…) for f4")


def _to_device(arrays: dict[int, np.ndarray]) -> tuple[Any, dict[int, int]]:
    """Copy the arrays to where a device would have them; returns that memory and the address of each.

    Views go with the array that they are views of, so that two of them overlap there as they do here.
    """
    owners: dict[int, np.ndarray] = {}
    for i, array in arrays.items():
        while isinstance(array.base, np.ndarray):
            array = array.base
        owners[i] = array
    spans = {id(owner): np.lib.array_utils.byte_bounds(owner) for owner in owners.values()}
    memory = np.full(sum(high - low + 2 * GUARD for low, high in spans.values()) + GUARD, 0xFF, np.uint8)
    at, moved = memory.ctypes.data + GUARD, {}
    for key, (low, high) in spans.items():
        at += -at % 256
        ctypes.memmove(at, low, high - low)
        moved[key] = at - low
        at += high - low + GUARD
    return memory, {i: array.ctypes.data + moved[id(owners[i])] for i, array in arrays.items()}


# --- source -------------------------------------------------------------------------------------------------------------------------------

def _sources(source: str, path: Path) -> dict[str, str]:
    """The source and the files of its folder that it includes, rewritten, by name."""
    files: dict[str, str] = {}
    pending = {path.name: source}
    while pending:
        name, text = pending.popitem()
        files[name] = rewrite(text, name)
        for included in re.findall(r'(?m)^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', text):
            file = path.parent / included
            if included not in files and ".." not in Path(included).parts and file.is_file():
                pending[included] = file.read_text(encoding="utf-8")
    return files


def rewrite(source: str, name: str = "kernel.cu") -> str:
    """Turn declarations of `__shared__` arrays into references to memory of the block; comments are blanked. Every line keeps its number."""
    source = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', lambda m: m[0] if m[0][0] == '"' else re.sub(r"[^\n]", " ", m[0]), source, flags=re.S)
    count = 0

    def declare(match: re.Match[str]) -> str:
        nonlocal count
        line = source.count("\n", 0, match.start()) + 1
        text = re.sub(r"\b(__align__|alignas)\s*\([^()]*\)|\bvolatile\b", lambda m: re.sub(r"[^\n]", "", m[0]), match[2])
        first, *more = _split(text)
        parts = re.fullmatch(r"\s*(.*\S[\s*&>]|\w+\s)\s*(\w+)\s*((?:\[[^\]]*\]\s*)*)", first, flags=re.S)
        if parts is None or "=" in text:
            raise ValueError(f"{name}:{line}: expected `__shared__ type name[size];`, got {match[0]!r}")
        base, out = parts[1].strip(), ""
        for declarator in (f"{parts[2]} {parts[3]}", *more):
            array = re.fullmatch(r"\s*(\w+)\s*(.*?)\s*", declarator, flags=re.S)
            if array is None:
                raise ValueError(f"{name}:{line}: expected `__shared__ type name[size];`, got {match[0]!r}")
            if match[1]:
                out += f"{base}* const {array[1]} = reinterpret_cast<{base}*>(simt::memory); "
                continue
            count += 1
            tag = f"{re.sub(r'[^A-Za-z0-9]', '_', name)}_{count}"
            out += (f"using simt_type_{tag} = {base}{array[2]}; static constexpr simt::Shared simt_array_{tag}{{{_quoted('__shared__ ' + array[1])}, "
                    f"sizeof(simt_type_{tag}), sizeof(std::remove_all_extents_t<simt_type_{tag}>)}}; "
                    f"simt_type_{tag}& {array[1]} = *static_cast<simt_type_{tag}*>(simt::shared(simt_array_{tag})); ")
        return out + "\n" * (match[0].count("\n") - out.count("\n"))

    return re.sub(r"(\bextern\s+)?(?:\bstatic\s+)?\b__shared__\b([^;]*);", declare, source)


def _split(text: str) -> list[str]:
    """Split at the commas that are outside of all brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "<([{") - (letter in ">)]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --- cache --------------------------------------------------------------------------------------------------------------------------------

@lru_cache
def _own() -> tuple[str, ...]:
    return (_compiler(), *((HERE / name).read_text(encoding="utf-8") for name in OWN))


@lru_cache
def _compiler() -> str:
    if shutil.which("g++") is None:
        raise RuntimeError("refattn.simt compiles kernels with g++, which is not on the PATH; install it, on Debian and Ubuntu with: apt install g++")
    return subprocess.run(["g++", "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, check=True).stdout


def _object(name: str) -> Path:
    flags = (*FLAGS, "-O2")
    return _cached(".o", [name, *flags, *_own()],
                   lambda folder, to: subprocess.run(["g++", *flags, "-c", str(HERE / name), "-o", str(to)], check=True))


def _cached(suffix: str, inputs: Sequence[str], make: Callable[[Path, Path], object]) -> Path:
    """The file that `make(folder, to)` writes from these inputs; made once. It appears whole or not at all, also if two make it at once."""
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refattn" / "simt"
    file = folder / (key + suffix)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary).resolve() / file.name
            make(made.parent, made)
            os.replace(made, file)
    return file
