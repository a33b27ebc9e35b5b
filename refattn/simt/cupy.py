"""A stand-in for CuPy that runs on the CPU: strict where CUDA is lenient, and odd where CUDA is odd.

    from refattn.simt import cupy as cp
    q = cp.asarray(np.ones((2, 100, 16), np.float32))
    out, state = refattn.causal_linear_attention(q, q, q)        # the kernels of refattn/cuda, run by the emulator
    out.get()                                                    # a NumPy array

The names that refattn uses of CuPy 14.0, and no others. What differs from NumPy is as in CuPy: nothing becomes a NumPy array by itself, arrays
lie on a device, a reduction gives an array without axes, and new memory holds garbage (here NaN, so that what nobody wrote shows). Where CuPy
is not sure it is stricter: no `mT` (CuPy 13 has none), no products of bfloat16 matrices (stacks of them fail in CuPy 14.2), few keywords.

Kernels are compiled and run by `refattn.simt`. Each argument is held against the kernel's real parameters, and each launch against CUDA's limits:
on a device a wrong width or a missing argument is undefined behaviour, here it is a TypeError.

    with cp.audit() as traffic: ...        # races, accesses out of bounds, uninitialised reads: SimtError. traffic: Counts by line
    with cp.threads("shuffled", seed=1): ...
    with cp.capability(75): ...            # the shared memory of another device
"""
from __future__ import annotations

import operator
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import Counts, Module, SimtError, build, dtype_code

float16, float32, float64, int32, int64 = np.float16, np.float32, np.float64, np.int32, np.int64
finfo = np.finfo

# Names that CuPy shares with NumPy and that take and return arrays. cumulative_sum came with a later CuPy than 14.0.
FUNCTIONS = frozenset("""
    abs absolute add all any arange argmax argsort array broadcast_to clip concat concatenate cos cumsum divide empty_like equal exp
    expand_dims expm1 eye flatnonzero flip floor full full_like isfinite isinf isnan log log1p matmul max maximum min minimum moveaxis
    multiply negative ones ones_like positive prod put_along_axis repeat reshape roll sign sin split sqrt square stack subtract sum swapaxes
    take take_along_axis tanh transpose where zeros zeros_like
""".split())
KEYWORDS = frozenset("a_max a_min axis axis1 axis2 copy dtype fill_value indices keepdims kind order out repeats shape shift start stop step".split())
DTYPES = frozenset("?bhilqBHILQefdFD")      # and bfloat16

SHARED_LIMITS = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
STATIC_SHARED = 48 << 10
MAX_THREADS = 1024


class Settings:
    """What `audit`, `threads` and `capability` change for a while."""

    audit: Any = False
    traffic: dict[Any, Counts]
    order: str = "forward"
    seed: int = 0
    capability: int = 90
    device: int = 0


_now = Settings()
_now.traffic = {}


# --- arrays -------------------------------------------------------------------------------------------------------------------------------

class ndarray:
    """An array in device memory: to NumPy by `.get()` only, from NumPy by `asarray` only."""

    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]
    nbytes: int

    __array_priority__ = 1000
    __array_ufunc__ = None
    __hash__ = None         # type: ignore[assignment]

    def __init__(self, host: np.ndarray, device: int | None = None) -> None:
        _check_dtype(host.dtype)
        self._host, self.device = host, Device(_now.device if device is None else device)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return sys.modules[__name__]

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def get(self) -> np.ndarray:
        return self._host.copy()

    def __repr__(self) -> str:
        return repr(self._host)

    def __len__(self) -> int:
        return len(self._host)

    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)

    def __getitem__(self, index: Any) -> ndarray:
        return ndarray(np.asarray(self._host[_unwrapped(index)]), self.device.id)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[_unwrapped(index)] = _unwrapped(value)

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return self if not copy and self.dtype == dtype else ndarray(_allocated(self._host.astype(dtype)), self.device.id)

    def copy(self) -> ndarray:
        return ndarray(_allocated(self._host), self.device.id)

    @property
    def flags(self) -> SimpleNamespace:
        flags = self._host.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata)

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self._host.ctypes.data)

    @property
    def T(self) -> ndarray:
        return ndarray(self._host.T, self.device.id)


VIEWS = ("reshape", "transpose", "swapaxes", "ravel", "squeeze")


def _delegate() -> None:
    """Attributes, methods and operators that mean what they mean in NumPy."""
    for name in ("shape", "dtype", "ndim", "size", "strides", "nbytes", "itemsize"):
        setattr(ndarray, name, property(_attribute(name)))
    for name in (*VIEWS, "sum", "max", "min", "any", "all", "item", "tolist"):
        setattr(ndarray, name, _method(name))
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
        for form in (name, "r" + name, "i" + name)[:2 if name == "matmul" else 3]:      # x @= y makes a new array, as in CuPy
            setattr(ndarray, f"__{form}__", _method(f"__{form}__"))
    for name in ("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"):
        setattr(ndarray, f"__{name}__", _method(f"__{name}__"))


def _attribute(name: str) -> Callable[[ndarray], Any]:
    return lambda self: getattr(self._host, name)


def _method(name: str) -> Callable[..., Any]:
    def method(self: ndarray, *args: Any, **kwargs: Any) -> Any:
        host = self._host if name in VIEWS else _unwrapped(self)
        return _called(name, getattr(host, name), args, kwargs, self)
    return method


_delegate()


def _called(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], self: ndarray | None = None) -> Any:
    """The result of a function of NumPy, on the device of `self`; an array that was written into comes back itself."""
    if not KEYWORDS.issuperset(kwargs):
        raise TypeError(f"{name}() got an unexpected keyword argument {min(set(kwargs) - KEYWORDS)!r}: CuPy has it not, or not in each release")
    given = (*args, *kwargs.values(), *([self] if self is not None else []))
    if "matmul" in name and any(getattr(x, "dtype", None) is not None and x.dtype.name == "bfloat16" for x in given):
        raise TypeError("matmul of bfloat16: CuPy and NumPy disagree, and CuPy 14 fails for stacks of matrices; cast to float32 first")
    result = function(*_unwrapped(args), **{key: _unwrapped(x) for key, x in kwargs.items()})
    same = [x for x in given if isinstance(x, ndarray) and x._host is result]
    return same[0] if same else _wrapped(result, None if self is None else self.device.id)


def _unwrapped(x: Any) -> Any:
    """Device arrays as the memory that they stand for; a NumPy array among them is an error, as in CuPy."""
    if isinstance(x, ndarray):
        if x.device.id != _now.device:
            raise ValueError(f"Array device must be same as the current device: array device = {x.device.id} while current = {_now.device}")
        return x._host
    if isinstance(x, np.ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    return type(x)(map(_unwrapped, x)) if type(x) in (tuple, list) else x


def _wrapped(x: Any, device: int | None = None) -> Any:
    if isinstance(x, (np.ndarray, np.generic)):
        return ndarray(np.asarray(x), device)
    return [_wrapped(y) for y in x] if isinstance(x, list) and x and isinstance(x[0], np.ndarray) else x


def _check_dtype(dtype: np.dtype) -> None:
    if (dtype.char not in DTYPES and dtype.name != "bfloat16") or not dtype.isnative:
        raise ValueError(f"Unsupported dtype {dtype}")


def _allocated(values: np.ndarray) -> np.ndarray:
    host = _new(values.shape, values.dtype)
    host[...] = values
    return host


def _new(shape: Any, dtype: Any) -> np.ndarray:
    """Memory of its own, which a launch aligns as a device would; all bits are 1: NaN in every float type."""
    dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    _check_dtype(dtype)
    return np.full(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


def empty(shape: Any, dtype: Any = np.float64) -> ndarray:
    return ndarray(_new(shape, dtype))


def asarray(x: Any, dtype: Any = None) -> ndarray:
    if isinstance(x, ndarray):
        return x if dtype is None else x.astype(dtype, copy=False)
    return ndarray(_allocated(np.asarray(x, dtype)))


def ascontiguousarray(x: Any) -> ndarray:
    return x if isinstance(x, ndarray) and x._host.flags.c_contiguous else ndarray(_allocated(_unwrapped(x)))


def __getattr__(name: str) -> Any:
    """The function of NumPy's name, made anew each time: in this module's globals `max` and `any` would hide Python's own."""
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(np, name)

    def on_host(*args: Any, **kwargs: Any) -> Any:
        result = _called(name, function, args, kwargs)
        return empty(result.shape, result.dtype) if name == "empty_like" else result

    on_host.__name__ = name
    if name == "add":        # the one ufunc that has it in CuPy
        on_host.reduceat = lambda *args, **kwargs: _called("reduceat", np.add.reduceat, args, kwargs)     # type: ignore[attr-defined]
    return on_host


# --- devices and streams -----------------------------------------------------------------------------------------------------------------

class Device:
    """A device as a context manager; there are two, so that a mixture shows."""

    def __init__(self, device: int = 0) -> None:
        self.id, self._before = device, [0]

    @property
    def compute_capability(self) -> str:
        return str(_now.capability)

    def __enter__(self) -> Device:
        self._before.append(_now.device)
        _now.device = self.id
        return self

    def __exit__(self, *_: object) -> None:
        _now.device = self._before.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


class Event:
    """A moment, by the host's clock."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


cuda = SimpleNamespace(
    Device=Device, Event=Event, get_elapsed_time=lambda start, end: 1e3 * (end.at - start.at),
    get_current_stream=lambda: SimpleNamespace(ptr=0, synchronize=lambda: None),
    driver=SimpleNamespace(CUDADriverError=CUDADriverError),
    runtime=SimpleNamespace(getDevice=lambda: _now.device, getDeviceCount=lambda: 2, CUDARuntimeError=CUDARuntimeError))


@contextmanager
def audit(how: Any = True) -> Iterator[dict[Any, Counts]]:
    """Every launch inside is audited; findings raise SimtError. Yields the traffic by line, of all launches together. `how="traffic"` only
    counts, which is faster."""
    before = _now.audit, _now.traffic
    _now.audit, _now.traffic = how, {}
    try:
        yield _now.traffic
    finally:
        _now.audit, _now.traffic = before


@contextmanager
def threads(order: str, seed: int = 0) -> Iterator[None]:
    """The order in which threads and blocks take turns: "forward", "reverse" or "shuffled"."""
    before = _now.order, _now.seed
    _now.order, _now.seed = order, seed
    try:
        yield
    finally:
        _now.order, _now.seed = before


@contextmanager
def capability(number: int) -> Iterator[None]:
    """A device of another compute capability, 75 to 120: it is the limit of shared memory that changes."""
    before = _now.capability
    _now.capability = number
    try:
        yield
    finally:
        _now.capability = before


# --- kernels --------------------------------------------------------------------------------------------------------------------------------

class RawModule:
    """CUDA source and the kernels in it. Compiled when one is first launched."""

    def __init__(self, *, code: str | None = None, path: str | None = None, options: tuple[str, ...] = (), backend: str = "nvrtc",
                 name_expressions: Sequence[str] | None = None) -> None:
        if not isinstance(options, tuple):
            raise TypeError("options must be a tuple")
        if code is None or path is not None:
            raise TypeError("code: expected the source; the stand-in reads no files")
        if backend != "nvrtc":
            raise ValueError(f"backend: expected 'nvrtc', got {backend!r}")
        self.code, self.options = code, options
        bounds = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
        self.names = tuple(dict.fromkeys(re.findall(rf'extern\s+"C"\s+{bounds}__global__\s+{bounds}void\s+{bounds}(\w+)', code)
                                         if name_expressions is None else name_expressions))
        self._built: dict[Any, Module] = {}

    def get_function(self, name: str) -> RawKernel:
        if name not in self.names:
            raise CUDADriverError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        return RawKernel(self, name)

    def compiled(self) -> Module:
        audited = _now.audit
        if audited not in self._built:
            defines = tuple(option[2:] for option in self.options if option.startswith("-D"))
            self._built[audited] = build(self.code, self.names, defines=defines, audit=audited)
        return self._built[audited]


class RawKernel:
    """A kernel to be called as CuPy's: kernel(grid, block, args, shared_mem=bytes)."""

    def __init__(self, module: RawModule, name: str) -> None:
        self.module, self.name, self._allowed = module, name, STATIC_SHARED
        bare = re.escape(name.partition("<")[0])
        found = re.search(rf"__launch_bounds__\s*\(\s*(\w+)[^)]*\)\s*(?:__global__\s+)?(?:void\s+)?{bare}\s*\(", module.code)
        if not found and re.search(rf"__launch_bounds__[^;{{}}]*\b{bare}\s*\(", module.code):
            raise ValueError(f"{name}: expected __launch_bounds__(number or constexpr int, …) before the name; the stand-in reads no other")
        self._bound = _constant(found[1], module.code) if found else MAX_THREADS

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._allowed

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        limit = SHARED_LIMITS[_now.capability]
        if size > limit:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {size} bytes of shared memory, sm_{_now.capability} has {limit} for a block")
        self._allowed = size

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], *, shared_mem: int = 0, stream: Any = None) -> None:
        for name, value in (("grid", grid), ("block", block), ("args", args)):
            if not isinstance(value, tuple):
                raise TypeError(f"{name}: expected a tuple, got {type(value).__name__}")
        blocks, size = (tuple(max(1, operator.index(n)) for n in (*x, 1, 1)[:3]) for x in (grid, block))   # CuPy makes 1 of 0: an empty grid RUNS
        if int(np.prod(size)) > min(MAX_THREADS, self._bound) or size[2] > 64:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: block {size}, where {self.name} is bound to {self._bound} threads")
        if blocks[0] >= 2**31 or max(blocks[1:]) >= 2**16:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: grid {blocks}, where CUDA ends at (2147483647, 65535, 65535)")
        if shared_mem > self._allowed:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of dynamic shared memory, {self._allowed} are allowed; "
                                  "set max_dynamic_shared_size_bytes")
        module = self.module.compiled()
        packed = _packed(self.name, module.signature(self.name), args)
        report = module.launch(self.name, blocks, size, packed, shared=shared_mem, order=_now.order, seed=_now.seed)
        if report is None:
            return
        if report.findings:
            raise SimtError(f"{self.name}: " + "\n".join(report.findings))
        for where, counts in report.traffic.items():
            total = _now.traffic.get(where, Counts(*(0,) * len(Counts._fields)))
            _now.traffic[where] = Counts(*(a + b for a, b in zip(total, counts, strict=True)))


def _packed(name: str, codes: Sequence[str], args: Sequence[Any]) -> list[Any]:
    """The arguments as bytes of the right kind, or the TypeError that CUDA does not have."""
    if len(args) != len(codes):
        raise TypeError(f"{name}: expected {len(codes)} arguments, got {len(args)}: on a device the kernel would read what lies behind them")
    return [_packed_one(f"argument {i} of {name}", code, x) for i, (code, x) in enumerate(zip(codes, args, strict=True))]


def _packed_one(where: str, code: str, x: Any) -> Any:
    pointer = code.startswith("p")
    if isinstance(x, ndarray):
        kind = code.rpartition(":")[2]
        if not pointer:
            raise TypeError(f"{where}: expected a scalar {code}, got an array")
        if x.device.id != _now.device:
            raise CUDADriverError(f"{where}: the array is on device {x.device.id}, the kernel runs on {_now.device}")
        if kind != "void" and kind.partition("x")[0] != dtype_code(x.dtype):                # float4* takes an array of float32
            raise TypeError(f"{where}: expected an array of {kind}, got {x.dtype}")
        if not x._host.flags.c_contiguous:
            raise TypeError(f"{where}: expected a contiguous array, got strides {x.strides}: a kernel sees only where it starts")
        return x._host
    if isinstance(x, bool) or not isinstance(x, (int, float, np.generic)):
        raise TypeError(f"{where}: Unsupported type {type(x)}")
    scalar = x if isinstance(x, np.generic) else np.int64(x) if isinstance(x, int) else np.float64(x)              # as CuPy packs them
    if pointer:
        if isinstance(scalar, np.uint64) and scalar == 0:
            return scalar
        raise TypeError(f"{where}: expected an array or np.uint64(0) for a pointer, got {type(x).__name__}")
    if dtype_code(scalar.dtype) != code:
        raise TypeError(f"{where}: expected {code}, got {scalar.dtype}: the kernel would read other bytes")
    return scalar


def _constant(text: str, code: str) -> int:
    """A number, or the constexpr int that is named."""
    if text.isdigit():
        return int(text)
    found = re.search(rf"\bint\s+{text}\s*=\s*(\d+)\s*[;,]", code)
    if found is None:
        raise ValueError(f"__launch_bounds__({text}): expected a number or a constexpr int whose value is a number")
    return int(found[1])
