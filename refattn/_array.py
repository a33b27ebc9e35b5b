"""What every public function does first: find the array namespace, check types and shapes, and say clearly what is wrong.

Axes, here and everywhere: `(..., H, N, D)`; H heads, N positions (L for keys where they may differ), D key features, M value features.
Keys and values may have fewer heads than queries (grouped queries): query head h then reads key/value head h // (Hq / Hkv).
"""
from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

Array = Any  # a NumPy or CuPy array, or, for the functional forms, any array of the array API

FLOATS = ("float16", "bfloat16", "float32", "float64")


class Axes(NamedTuple):
    """The sizes of one call: `q (*lead, groups·heads, N, D)`, `k (*lead, heads, L, D)`, `v (*lead, heads, L, M)`.

    `headed` is False for plain matrices `q (N, D)`; then lead is (), heads and groups are 1, and no array has a head axis.
    """

    lead: tuple[int, ...]
    heads: int
    groups: int
    N: int
    L: int
    D: int
    M: int
    headed: bool

    @property
    def kv_lead(self) -> tuple[int, ...]:
        return (*self.lead, self.heads) if self.headed else ()

    @property
    def q_lead(self) -> tuple[int, ...]:
        return (*self.lead, self.heads * self.groups) if self.headed else ()


def namespace(**arrays: Array) -> ModuleType:
    """The one array namespace (NumPy, CuPy, …) that all given arrays come from. None entries are passed over.

    Looking it up imports nothing. Raises TypeError for what is not an array and for arrays of different libraries.
    """
    found: dict[str, ModuleType] = {}
    for name, x in arrays.items():
        if x is None:
            continue
        if isinstance(x, np.ndarray):
            if isinstance(x, (np.ma.MaskedArray, np.matrix)):
                raise TypeError(f"{name}: expected a plain array, got {type(x).__name__}; pass np.asarray({name}) and, "
                                "for masks, the lengths arguments")
            found[name] = np
        elif type(x).__module__.partition(".")[0] == "cupy":
            found[name] = sys.modules["cupy"]
        elif hasattr(x, "__array_namespace__"):
            found[name] = x.__array_namespace__()
        else:
            raise TypeError(f"{name}: expected a NumPy or CuPy array, got {type(x).__name__}; convert it with np.asarray first")
    first = next(iter(found))
    for name, xp in found.items():
        if xp is not found[first]:
            raise TypeError(f"{first} is a {found[first].__name__} array and {name} a {xp.__name__} array; "
                            "bring both to one library first")
    return found[first]


def dtype_name(x: Array) -> str:
    dtype = x.dtype
    return _name(dtype) if isinstance(dtype, np.dtype) else str(getattr(dtype, "name", dtype)).rpartition(".")[2]


@lru_cache     # NumPy puts the name together anew at every look, 3 µs each
def _name(dtype: np.dtype) -> str:
    return dtype.name


def check_dtypes(**arrays: Array) -> None:
    """All arrays are real floats of one dtype; None entries are passed over. Nothing is ever cast to make it so."""
    names = {name: dtype_name(x) for name, x in arrays.items() if x is not None}
    for name, dtype in names.items():
        if dtype not in FLOATS:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype}; "
                            f"cast it yourself, for example {name}.astype('float32')")
    first = next(iter(names))
    for name, dtype in names.items():
        if dtype != names[first]:
            raise TypeError(f"{first} is {names[first]} and {name} is {dtype}; cast one of them, nothing is cast silently")


def accumulator(dtype: Any) -> Any:
    """The dtype that sums are kept in: float32 for float16 and bfloat16, else the dtype itself (native byte order)."""
    if isinstance(dtype, np.dtype):
        return _numpy_accumulator(dtype)
    return np.dtype(np.float32) if str(dtype).rpartition(".")[2] in ("float16", "bfloat16") else dtype


@lru_cache
def _numpy_accumulator(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype.name in ("float16", "bfloat16") else dtype.newbyteorder("=")


def cast(x: Array, dtype: Any) -> Array:
    """x in `dtype`; x itself where it has it already. The array API has no method for it, NumPy and CuPy have no other way."""
    return x if x.dtype == dtype else x.astype(dtype) if hasattr(x, "astype") else x.__array_namespace__().astype(x, dtype)


def on_host(x: Any) -> np.ndarray:
    """Integers that are needed here, as a NumPy array: from a list, from NumPy, or from a device by `.get()`."""
    return x.get() if hasattr(x, "get") and not isinstance(x, np.ndarray) else np.asarray(x)


def transposed(x: Array) -> Array:
    """The last two axes exchanged; not all libraries' arrays have mT (CuPy's before 14)."""
    return x.mT if hasattr(x, "mT") else x.swapaxes(-1, -2)


def check_qkv(q: Array, k: Array, v: Array, *, causal: bool, step: bool = False) -> Axes:
    """Check the shapes of q, k, v against one another; `causal` asks for N == L. `step`: arrays without the axis N."""
    positions = "" if step else "N, "
    least = 1 if step else 2
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < least:
            raise ValueError(f"{_t(name, step)}: expected (..., H, {positions}{'M' if name == 'v' else 'D'}) with at least {least} "
                             f"ax{'is' if least == 1 else 'es'}, got {_shape(x)}")
        if x.ndim != q.ndim:
            raise ValueError(f"{_t(name, step)}: expected {q.ndim} axes as in {_t('q', step)} {_shape(q)}, got {_shape(x)}: "
                             "add or drop leading axes")
    tail = 1 if step else 2
    headed = q.ndim > tail
    lead = tuple(k.shape[: -tail - 1]) if headed else ()
    q_lead, k_lead, v_lead = (tuple(x.shape[:-tail]) for x in (q, k, v))
    N, L, D, M = (1, 1) + (q.shape[-1], v.shape[-1]) if step else (q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])

    def wrong(name: str, expected: str, values: tuple[Any, ...], x: Array, why: str) -> ValueError:
        return ValueError(f"{_t(name, step)}: expected {expected} = {_values(values)}, got {_shape(x)}: {why}")

    axes_k = "(..., Hkv, D)" if step else "(..., Hkv, L, D)" if not causal else "(..., Hkv, N, D)"
    axes_v = axes_k.replace("D", "M")
    free = () if step else ("*",) if not causal else (N,)
    if k.shape[-1] != D:
        raise wrong("k", axes_k, (*k_lead, *free, D), k, "q and k must share D")
    if not step and causal and L != N:
        raise wrong("k", axes_k, (*k_lead, N, D), k, "causal attention needs as many keys as queries")
    if q_lead[:-1] != k_lead[:-1]:
        raise wrong("k", axes_k, (*q_lead[:-1], "*", *free, D), k, "q and k must share the leading axes")
    if v_lead != k_lead or (not step and v.shape[-2] != L):
        raise wrong("v", axes_v, (*k_lead, *(() if step else (L,)), "*"), v,
                    "k and v must share the leading axes, the heads" + ("" if step else " and the positions"))
    heads_q, heads = (q_lead[-1], k_lead[-1]) if headed else (1, 1)
    if heads_q != heads and (heads == 0 or heads_q % heads):
        raise wrong("q", "(..., Hq, N, D)" if not step else "(..., Hq, D)",
                    (*q_lead[:-1], f"multiple of {heads}", *(() if step else (N,)), D), q,
                    f"Hq = {heads_q} must be a multiple of Hkv = {heads}")
    groups = heads_q // heads if heads else 1
    return Axes(lead, heads, groups, N, L, D, M, headed)


def check_shape(name: str, x: Array, symbols: str, shape: tuple[int, ...], why: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {symbols} = {_values(shape)}, got {_shape(x)}: {why}")


def check_lengths(name: str, lengths: Any, lead: tuple[int, ...], n: int, symbol: str) -> np.ndarray | None:
    """Lengths as an integer array of shape `lead`. They may be given for the first leading axes only: (B,) serves (B, H, N, D)."""
    if lengths is None:
        return None
    given = on_host(lengths)
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {given.dtype.name}")
    if given.ndim > len(lead) or given.shape != lead[: given.ndim]:
        raise ValueError(f"{name}: expected one length for each of the leading axes {_values(lead)} or of the first of them, "
                         f"got {_values(given.shape)}")
    if given.size and (given.min() < 0 or given.max() > n):
        raise ValueError(f"{name}: expected 0 ≤ length ≤ {symbol} = {n}, got values from {given.min()} to {given.max()}")
    return np.broadcast_to(given.reshape(given.shape + (1,) * (len(lead) - given.ndim)), lead)


def check_cotangent(name: str, d: Array, like: Array) -> None:
    """A cotangent has the shape and the dtype of the output that it belongs to; None counts as zero."""
    if d is None:
        return
    namespace(**{name: d, "the output": like})
    if tuple(d.shape) != tuple(like.shape):
        raise ValueError(f"{name}: expected the shape of the output {_values(like.shape)}, got {_shape(d)}")
    if dtype_name(d) != dtype_name(like):
        raise TypeError(f"{name} is {dtype_name(d)} and its output is {dtype_name(like)}; cast the cotangent, nothing is cast silently")


def check_wide_dtype(name: str, x: Array, q: Array) -> None:
    """States, decays and the like have the accumulator dtype; that of the inputs is taken too (it loses nothing)."""
    given, inputs = dtype_name(x), dtype_name(q)
    wide = "float32" if inputs in ("float16", "bfloat16") else inputs
    if given not in (inputs, wide):
        raise TypeError(f"{name} is {given} and q is {inputs}: expected {name} in {wide}; nothing is cast silently")


def check_positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer ≥ 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer ≥ 1, got {value}")
    return int(value)


def check_number(name: str, value: Any, *, least: float | None = None) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not np.isfinite(value) or (least is not None and value < least):
        raise ValueError(f"{name}: expected a finite number{'' if least is None else f' ≥ {least:g}'}, got {value}")
    return float(value)


def missing_extra(package: str, extra: str) -> ImportError:
    return ImportError(f"this needs {package}, which is not installed; install it with: pip install 'refattn[{extra}]'")


def _t(name: str, step: bool) -> str:
    return name + "_t" if step else name


def _shape(x: Array) -> str:
    return _values(tuple(x.shape))


def _values(values: tuple[Any, ...]) -> str:
    return "(" + ", ".join(str(value) for value in values) + ("," if len(values) == 1 else "") + ")"


def check_compiled(xp: Any) -> None:
    """Raise unless arrays of this library can go to the loops that Numba compiles, and Numba is there."""
    if xp is not np:
        raise TypeError(f"compiled: expected NumPy arrays, got those of {getattr(xp, '__name__', xp)}; leave it False, they have a form of their own")
    try:
        import numba                                                              # noqa: F401
    except ImportError:
        raise missing_extra("numba", "numba") from None
