"""How `check_kernel` calls a kernel: what it draws, in whose layout it is handed over, and how what comes back is read."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import oracle
from .._array import accumulator
from ..attention import linear_attention_vjp
from ..rules import recurrence_vjp
from ..softmax import softmax_attention_vjp
from .frameworks import Function, to_numpy

NAMES = ("q", "k", "v", "g", "beta", "state")
ATTENTIONS = ("linear_attention", "softmax_attention")


class Kernel(NamedTuple):
    """The callable, and how it wants its arrays: the arguments of `check_kernel`, understood."""

    fn: Function
    backward: Function | None
    vjp: Function | None
    rule: str
    layout: str
    state_layout: str
    scale: float | str
    decay: str
    decay_space: str
    causal: bool
    eps: float
    states: bool
    grouped: bool
    resets: bool
    into: bool
    contiguous: bool
    multiple_of: int
    widths: tuple[tuple[int, int], ...] | None
    dtype: np.dtype
    rounds: bool
    to: Callable[[np.ndarray], Any]
    factor: float

    @property
    def gradients(self) -> bool:
        return self.backward is not None or self.vjp is not None


class Case(NamedTuple):
    """One call: q (B, Hq, N, D), k (B, H, L, D), v (B, H, L, M), g (B, H, N) or (B, H, N, D), beta (B, H, N), state (B, H, D, M), and the
    cotangents of what comes out. None: the rule has no such input, or the kernel is called without a state. L is N but for attention that is
    not causal."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray | None
    beta: np.ndarray | None
    state: np.ndarray | None
    dout: np.ndarray
    dstate: np.ndarray
    exact: bool

    def __repr__(self) -> str:
        return f"Case(q {self.q.shape}, k {self.k.shape}, v {self.v.shape}, {self.q.dtype})"

    @property
    def inputs(self) -> list[np.ndarray | None]:
        return list(self[:6])

    def each(self, f: Callable[[str, np.ndarray], np.ndarray]) -> Case:
        """f of the name and the array, of every array that there is."""
        changed: list[Any] = [None if x is None else f(name, x) for name, x in zip(self._fields[:8], self[:8], strict=True)]
        return Case._make([*changed, self.exact])


# --- the right answer ----------------------------------------------------------------------------------------------------------------------

def definition(kernel: Kernel, case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """(out, final state or None) in float64, by `refattn.oracle`."""
    if kernel.rule == "softmax_attention":
        return oracle.softmax_attention(case.q, case.k, case.v, causal=kernel.causal, scale=scale_of(kernel, case)), None
    if kernel.rule == "linear_attention":
        return oracle.linear_attention(case.q, case.k, case.v, causal=kernel.causal, eps=kernel.eps), None
    return oracle.full_recurrence(*case.inputs, scale=scale_of(kernel, case))


def gradients(kernel: Kernel, case: Case) -> dict[str, np.ndarray]:
    """Of every input, in float64, by the library's own backward, which its laws hold to the definition."""
    q, k, v, g, beta, state = (None if x is None else x.astype(np.float64) for x in case.inputs)
    dout = case.dout.astype(np.float64)
    if kernel.rule in ATTENTIONS:
        _, back = (softmax_attention_vjp(q, k, v, causal=kernel.causal, scale=scale_of(kernel, case)) if kernel.rule == "softmax_attention" else
                   linear_attention_vjp(q, k, v, causal=kernel.causal, eps=kernel.eps))
        return dict(zip(NAMES, back(dout), strict=False))
    state = np.zeros(case.dstate.shape) if state is None and kernel.states else state
    _, pullback = recurrence_vjp(q, k, v, g, beta, state, rule=kernel.rule, scale=scale_of(kernel, case))
    return dict(zip(NAMES, pullback(dout, case.dstate.astype(np.float64) if kernel.states else None), strict=True))


def scale_of(kernel: Kernel, case: Case) -> float:
    return case.q.shape[-1] ** -0.5 if isinstance(kernel.scale, str) else kernel.scale


# --- calling it --------------------------------------------------------------------------------------------------------------------------

class Told(Exception):
    """What is wrong with a call, in words."""


LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, int], np.ndarray]]] = {
    "bhnd": (lambda x: x, lambda x, heads: x),
    "bnhd": (lambda x: np.moveaxis(x, 1, 2), lambda x, heads: np.moveaxis(x, 2, 1)),
    "bn(hd)": (lambda x: np.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1),
               lambda x, heads: np.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 1)),
}
STATE_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bhdm": lambda x: x, "bhmd": lambda x: x.swapaxes(-1, -2)}


def input_names(kernel: Kernel, case: Case) -> list[str]:
    """Of what the kernel is called with."""
    return [name for name, x in zip(NAMES, case.inputs, strict=True) if x is not None or name == "state" and kernel.states]


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
    if kernel.states:
        state = np.zeros(case.dstate.shape, accumulator(case.q.dtype)) if case.state is None else case.state
        arrays.append(STATE_LAYOUTS[kernel.state_layout](state))
    return arrays


def _copied(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """A kernel that writes to its inputs writes to these."""
    return [np.array(x, order="C") for x in arrays]


def _called(what: str, fn: Function, kernel: Kernel, arrays: list[np.ndarray], written: list[tuple[tuple[int, ...], Any]], poison: float) -> Any:
    """What comes back; where the kernel writes into given memory, that memory, with `poison` in it before the call."""
    inputs = [kernel.to(x) for x in arrays]
    memory = [kernel.to(np.full(shape, poison, dtype)) for shape, dtype in written] if kernel.into else []
    try:
        found = fn(*inputs, *memory)
    except Exception as error:
        raise Told(f"{what} raised {type(error).__name__}: {error}") from None
    return memory if kernel.into else found


def call(kernel: Kernel, case: Case, given: list[np.ndarray] | None = None, poison: float = np.nan) -> tuple[np.ndarray, np.ndarray | None]:
    """(out, state or None) in our layout; Told where it cannot be understood. `given`: these very arrays, in the kernel's layout."""
    there, back = LAYOUTS[kernel.layout]
    end = STATE_LAYOUTS[kernel.state_layout]
    acc = accumulator(kernel.dtype)
    written = [(there(case.dout).shape, kernel.dtype), *([(end(case.dstate).shape, acc)] if kernel.states else [])]
    found = _called("the call", kernel.fn, kernel, _copied(given_arrays(kernel, case)) if given is None else given, written, poison)
    out, state = found if isinstance(found, (tuple, list)) and len(found) == 2 else (found[0], None) if kernel.into else (found, None)
    out = back(read_result("out", out, written[0][0], kernel.dtype), case.q.shape[1])
    if state is None or kernel.rule in ATTENTIONS:                               # beside an attention's output may stand anything
        return out, None
    return out, end(read_result("state", state, end(case.dstate).shape, None))


def call_backward(kernel: Kernel, case: Case, dout: np.ndarray | None = None, poison: float = np.nan) -> dict[str, np.ndarray]:
    """Gradients in our layout by name. `dout`: this very array, in the kernel's layout, in place of the case's."""
    there, back = LAYOUTS[kernel.layout]
    arrays, names = _copied(given_arrays(kernel, case)), input_names(kernel, case)
    cotangents = _copied([there(case.dout)]) if dout is None else [dout]
    if kernel.states:
        cotangents += _copied([STATE_LAYOUTS[kernel.state_layout](case.dstate)])
    if kernel.backward is not None:
        found = _called("the backward", kernel.backward, kernel, [*cotangents, *arrays], [(x.shape, x.dtype) for x in arrays], poison)
    else:
        vjp, fn = kernel.vjp, kernel.fn
        assert vjp is not None
        found = _called("its gradient", lambda *all_: list(vjp(fn, all_[len(cotangents):], all_[: len(cotangents)])), kernel,
                        [*cotangents, *arrays], [], poison)
    if not isinstance(found, (tuple, list)) or len(found) != len(names):
        raise Told(f"backward: expected the gradients of {', '.join(names)}, got "
                   f"{len(found) if isinstance(found, (tuple, list)) else type(found).__name__}")
    gradients: dict[str, np.ndarray] = {}
    for name, x, d in zip(names, arrays, found, strict=True):
        d = read_result(f"d{name}", d, x.shape, None)
        if name == "state":
            gradients[name] = STATE_LAYOUTS[kernel.state_layout](d)
        elif kernel.layout == "bn(hd)" and (name == "beta" or name == "g" and kernel.decay == "head"):
            gradients[name] = np.moveaxis(d, 2, 1)
        else:
            gradients[name] = back(d, case.q.shape[1] if name == "q" else case.k.shape[1])
    return gradients


def read_result(name: str, x: Any, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
    try:
        array = to_numpy(x)
    except Exception as error:
        raise Told(f"{name}: expected an array that NumPy can read, got {type(x).__name__} ({error})") from None
    if array.dtype == object:
        raise Told(f"{name}: expected an array of numbers, got {type(x).__name__}")
    if array.shape != shape:
        raise Told(f"{name}: expected the shape {shape}, got {array.shape}")
    if dtype is not None and array.dtype != dtype:
        raise Told(f"{name}: expected {dtype.name} as the inputs, got {array.dtype.name}")
    return array


PRESETS: dict[str, dict[str, Any]] = {
    "onnx": {"layout": "bn(hd)", "scale": "1/sqrt(d)", "grouped": True},
    "flash-linear-attention": {"to": "torch", "layout": "bnhd", "scale": "1/sqrt(d)"},
    "fast-transformers": {"to": "torch", "layout": "bnhd", "rule": "linear_attention"},               # CausalLinearAttention and its like
    "causal_dot_product": {"to": "torch", "layout": "bhnd", "rule": "linear", "states": False},
    "torch-sdpa": {"to": "torch", "layout": "bhnd", "rule": "softmax_attention", "scale": "1/sqrt(d)"},
    "mlx": {"to": "mlx", "layout": "bnhd", "rule": "gated_delta", "decay_space": "linear", "state_layout": "bhmd"},
}
