"""How `check_kernel` calls a kernel: what it draws, in whose layout it is handed over, and how what comes back is read."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._array import accumulator

NAMES = ("q", "k", "v", "g", "beta", "state")


class Kernel(NamedTuple):
    """The callable, and how it wants its arrays."""

    fn: Callable[..., Any]
    backward: Callable[..., Any] | None
    rule: str
    layout: str
    state_layout: str
    scale: float | str
    decay: str
    decay_space: str
    states: bool
    grouped: bool
    resets: bool
    dtype: np.dtype
    to: Callable[[np.ndarray], Any]
    factor: float


class Case(NamedTuple):
    """One call: q (B, Hq, N, D), k (B, H, N, D), v (B, H, N, M), g (B, H, N) or (B, H, N, D), beta (B, H, N), state (B, H, D, M), and the
    cotangents of what comes out. None: the rule has no such input, or the kernel is called without a state."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray | None
    beta: np.ndarray | None
    state: np.ndarray | None
    dout: np.ndarray
    dstate: np.ndarray
    exact: bool

    @property
    def inputs(self) -> list[np.ndarray | None]:
        return list(self[:6])

    def each(self, f: Callable[[str, np.ndarray], np.ndarray]) -> Case:
        """f of the name and the array, of every array that there is."""
        changed: list[Any] = [None if x is None else f(name, x) for name, x in zip(self._fields[:8], self[:8], strict=True)]
        return Case._make([*changed, self.exact])


# --- calling it --------------------------------------------------------------------------------------------------------------------------

class Told(Exception):
    """What is wrong with a call, in words."""


LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, int], np.ndarray]]] = {
    "bhnd": (lambda x: x, lambda x, heads: x),
    "bnhd": (lambda x: np.moveaxis(x, 1, 2), lambda x, heads: np.moveaxis(x, 2, 1)),
    "bn(hd)": (lambda x: np.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1),
               lambda x, heads: np.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 1)),
}


def scale_of(kernel: Kernel, D: int) -> float:
    return D**-0.5 if isinstance(kernel.scale, str) else kernel.scale


def given_arrays(kernel: Kernel, case: Case) -> list[np.ndarray]:
    """The arrays of a call in the kernel's layout, before they become its library's."""
    there, _ = LAYOUTS[kernel.layout]
    g = case.g
    if g is not None and kernel.decay_space == "linear":
        g = np.exp(g.astype(np.float64)).astype(g.dtype)
    packed = kernel.layout == "bn(hd)"
    few = (lambda x: np.moveaxis(x, 1, 2)) if packed else there                  # one number for each head: nothing to pack
    arrays = [there(case.q), there(case.k), there(case.v)]
    if g is not None:
        arrays.append(few(g) if g.ndim == 3 else there(g))
    if case.beta is not None:
        arrays.append(few(case.beta))
    if case.state is not None:
        arrays.append(case.state.swapaxes(-1, -2) if kernel.state_layout == "bhmd" else case.state)
    elif kernel.states:
        shape = (*case.k.shape[:2], case.k.shape[-1], case.v.shape[-1])
        arrays.append(np.zeros(shape if kernel.state_layout == "bhdm" else (*shape[:2], shape[3], shape[2]), accumulator(case.q.dtype)))
    return arrays


def call(kernel: Kernel, case: Case, given: list[np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """(out, state or None) in our layout; Told where it cannot be understood."""
    arrays = [np.ascontiguousarray(x) for x in given_arrays(kernel, case)] if given is None else given
    try:
        found = kernel.fn(*(kernel.to(x) for x in arrays))
    except Exception as error:
        raise Told(f"the call raised {type(error).__name__}: {error}") from None
    out, state = found if isinstance(found, (tuple, list)) and len(found) == 2 else (found, None)
    B, heads, N, _ = case.q.shape
    M = case.v.shape[-1]
    shape = {"bhnd": (B, heads, N, M), "bnhd": (B, N, heads, M), "bn(hd)": (B, N, heads * M)}[kernel.layout]
    H, D = case.k.shape[1], case.k.shape[-1]
    out = LAYOUTS[kernel.layout][1](read_result("out", out, shape, kernel.dtype), heads)
    if state is None:
        return out, None
    state = read_result("state", state, (B, H, D, M) if kernel.state_layout == "bhdm" else (B, H, M, D), None)
    return out, state if kernel.state_layout == "bhdm" else state.swapaxes(-1, -2)


def call_backward(kernel: Kernel, case: Case, dout: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Gradients in our layout by name. `dout`: this very array, in the kernel's layout, in place of the case's."""
    there, back = LAYOUTS[kernel.layout]
    arrays = [np.ascontiguousarray(x) for x in given_arrays(kernel, case)]
    cotangents = [np.ascontiguousarray(there(case.dout)) if dout is None else dout]
    if kernel.states:
        cotangents.append(np.ascontiguousarray(case.dstate if kernel.state_layout == "bhdm" else case.dstate.swapaxes(-1, -2)))
    assert kernel.backward is not None
    try:
        found = kernel.backward(*(kernel.to(x) for x in (*cotangents, *arrays)))
    except Exception as error:
        raise Told(f"the backward raised {type(error).__name__}: {error}") from None
    names = [name for name, x in zip(NAMES, case.inputs, strict=True) if x is not None or name == "state" and kernel.states]
    if not isinstance(found, (tuple, list)) or len(found) != len(names):
        raise Told(f"backward: expected the gradients of {', '.join(names)}, got "
                    f"{len(found) if isinstance(found, (tuple, list)) else type(found).__name__}")
    gradients: dict[str, np.ndarray] = {}
    for name, x, d in zip(names, arrays, found, strict=True):
        d = read_result(f"d{name}", d, x.shape, None)
        if name == "state":
            gradients[name] = d if kernel.state_layout == "bhdm" else d.swapaxes(-1, -2)
        elif kernel.layout == "bn(hd)" and (name == "beta" or name == "g" and kernel.decay == "head"):
            gradients[name] = np.moveaxis(d, 2, 1)
        else:
            gradients[name] = back(d, case.q.shape[1] if name == "q" else case.k.shape[1])
    return gradients


def read_result(name: str, x: Any, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
    try:
        for method in ("detach", "cpu", "get"):
            x = getattr(x, method)() if hasattr(x, method) and not isinstance(x, np.ndarray) else x
        array = np.asarray(x)
    except Exception as error:
        raise Told(f"{name}: expected an array that NumPy can read, got {type(x).__name__} ({error})") from None
    if array.shape != shape:
        raise Told(f"{name}: expected the shape {shape}, got {array.shape}")
    if dtype is not None and array.dtype != dtype:
        raise Told(f"{name}: expected {dtype.name} as the inputs, got {array.dtype.name}")
    return array


PRESETS: dict[str, dict[str, Any]] = {
    "onnx": {"layout": "bn(hd)", "scale": "1/sqrt(d)", "grouped": True},
    "flash-linear-attention": {"layout": "bnhd", "scale": "1/sqrt(d)"},
    "fast-transformers": {"layout": "bhnd", "states": False},                   # its causal_dot_product; its modules have "bnhd" and a normaliser
}


def torch_backward(fn: Callable[..., Any], *, states: bool = True) -> Callable[..., tuple[Any, ...]]:
    """The `backward` of `check_kernel` for a function of PyTorch tensors: what torch.autograd gives. `states` as there."""
    import torch

    def backward(*arrays: Any) -> tuple[Any, ...]:
        count = 1 + states
        leaves = [x.detach().clone().requires_grad_() for x in arrays[count:]]
        return tuple(torch.autograd.grad(_outputs(fn, leaves, count), leaves, arrays[:count]))

    return backward


def jax_backward(fn: Callable[..., Any], *, states: bool = True) -> Callable[..., tuple[Any, ...]]:
    """The `backward` of `check_kernel` for a function of JAX arrays: what jax.vjp gives. `states` as there."""
    import jax

    def backward(*arrays: Any) -> tuple[Any, ...]:
        count = 1 + states
        _, pullback = jax.vjp(lambda *leaves: _outputs(fn, leaves, count), *arrays[count:])
        return tuple(pullback(tuple(arrays[:count])))

    return backward


def _outputs(fn: Callable[..., Any], arrays: Any, count: int) -> tuple[Any, ...]:
    found = fn(*arrays)
    return tuple(found)[:count] if isinstance(found, (tuple, list)) else (found,)
