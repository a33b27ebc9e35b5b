"""Arrays of other libraries, for `check_kernel`: made from NumPy's, read back, and the gradients that a library finds by itself.

A library is imported when it is asked for, and not before.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Function = Callable[..., Any]


def library(name: str) -> Any:
    """The module of that name in `MAKE`; ImportError if it is not installed."""
    module = {"mlx": "mlx.core"}.get(name, name)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"to: arrays of {name} are asked for, and {error}: install it, or give to a function of your own") from None


def bfloat16() -> np.dtype:
    """NumPy's dtype of that name, which the extra bf16 brings."""
    return np.dtype(library("ml_dtypes").bfloat16)


# --- from NumPy ------------------------------------------------------------------------------------------------------------------------

def _torch(x: np.ndarray) -> Any:
    torch = library("torch")
    if x.dtype.name == "bfloat16":                                               # torch has no way to read NumPy's, nor NumPy torch's
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def _mlx(x: np.ndarray) -> Any:
    mx = library("mlx")
    return mx.array(x.astype(np.float32)).astype(mx.bfloat16) if x.dtype.name == "bfloat16" else mx.array(x)


MAKE: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": np.asarray,
    "cupy": lambda x: library("cupy").asarray(x),
    "jax": lambda x: library("jax").numpy.asarray(x),
    "mlx": _mlx,
    "tensorflow": lambda x: library("tensorflow").constant(x),
    "torch": _torch,
}


# --- to NumPy ----------------------------------------------------------------------------------------------------------------------------

def to_numpy(x: Any) -> np.ndarray:
    """The values of an array of any library, by `__array__`, DLPack or the buffer protocol, from a device too.

    >>> to_numpy([1.0, 2.0])
    array([1., 2.])
    """
    if isinstance(x, np.ndarray):
        return x
    if hasattr(x, "detach"):                                                     # PyTorch's, from its graph and its device
        x = x.detach().cpu()
    elif hasattr(x, "get"):                                                      # CuPy's
        x = x.get()
    if str(getattr(x, "dtype", "")) == "torch.bfloat16":
        return np.asarray(x.view(library("torch").int16)).view(bfloat16())
    if str(getattr(x, "dtype", "")) == "mlx.core.bfloat16":
        return np.asarray(x.astype(library("mlx").float32)).astype(bfloat16())
    if hasattr(x, "__dlpack__") and not hasattr(x, "__array__"):
        return np.from_dlpack(x)
    return np.asarray(x)


# --- gradients -----------------------------------------------------------------------------------------------------------------------------

def _torch_vjp(fn: Function, inputs: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found: Sequence[Any] = library("torch").autograd.grad(_outputs(fn, leaves, len(cotangents)), leaves, cotangents)
    return found


def _jax_vjp(fn: Function, inputs: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
    _, pullback = library("jax").vjp(lambda *leaves: _outputs(fn, leaves, len(cotangents)), *inputs)
    found: Sequence[Any] = pullback(tuple(cotangents))
    return found


def _mlx_vjp(fn: Function, inputs: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
    _, found = library("mlx").vjp(lambda *leaves: _outputs(fn, leaves, len(cotangents)), list(inputs), list(cotangents))
    return found                                                                                              # type: ignore[no-any-return]


def _tensorflow_vjp(fn: Function, inputs: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
    with library("tensorflow").GradientTape() as tape:
        for x in inputs:
            tape.watch(x)
        outputs = _outputs(fn, inputs, len(cotangents))
    return tape.gradient(outputs, list(inputs), output_gradients=list(cotangents))                            # type: ignore[no-any-return]


VJP: dict[str, Callable[[Function, Sequence[Any], Sequence[Any]], Sequence[Any]]] = {
    "jax": _jax_vjp, "mlx": _mlx_vjp, "tensorflow": _tensorflow_vjp, "torch": _torch_vjp}


def _outputs(fn: Function, arrays: Sequence[Any], count: int) -> tuple[Any, ...]:
    """As many as there are cotangents: a final state that is not judged has none."""
    found = fn(*arrays)
    return tuple(found)[:count] if isinstance(found, (tuple, list)) else (found,)
