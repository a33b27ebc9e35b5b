"""refattn for PyTorch tensors on the CPU: its forward and its hand-derived backward, as one operation of torch.autograd.

    y = f(x)          refattn's f, on the tensors' own memory
    dx = J(x)ᵀ dy     refattn's pullback, on the tensors' own memory

The functions have the names, the arguments and the shapes of refattn's own, and take and give tensors. Nothing is copied on the way in or out.

**Gradients of gradients.** Where autograd asks for gradients that can be differentiated again (`create_graph=True`, `torch.func`), the same
pullback runs on refattn's loop-free forms, whose arrays may be of any library with the array API: here tensors. So what autograd records is the
hand-derived backward, step by step, a function of x and dy that is linear in dy. With u the cotangent of dx, its transpose gives

    to dy:  J(x) u          to x:  ∂/∂x ⟨u, J(x)ᵀ dy⟩ = H u,   H the Hessian of ⟨dy, f(x)⟩

and so on to any order.

**Forward mode.** J u is read off the first of these lines: the transpose, by autograd, of dy -> J(x)ᵀ dy.
"""
from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import refattn

from .._array import missing_extra, on_host
from ..attention import State, _described

try:
    import torch
except ImportError:
    raise missing_extra("PyTorch", "torch") from None

__all__ = ["causal_linear_attention", "causal_linear_attention_step", "linear_attention", "recurrence", "recurrence_step", "softmax_attention"]

Tensor = Any


# --- the public functions -----------------------------------------------------------------------------------------------------------------

def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, beta: Tensor | None = None, state: Tensor | None = None, *,
               rule: str = "linear", scale: float = 1.0, cu_seqlens: Any = None) -> tuple[Tensor, Tensor]:
    """`refattn.recurrence` of tensors: S_t = P_t + k_t u_tᵀ, o_t = scale · S_tᵀ q_t with P_t = Diag(exp(g_t)) S_{t-1}.

    Parameters
    ----------
    q, k, v, g, beta, state
        Tensors on the CPU, any strides, of the shapes and dtypes that `refattn.recurrence` takes. None is written to.
    rule, scale, cu_seqlens
        As there.

    Returns
    -------
    out : (..., G·H, N, M)
    state : (..., H, D, M)
        Both are part of the graph; the state is in float32 for float16 and bfloat16.

    Raises
    ------
    TypeError
        "q: expected a torch.Tensor, got ndarray; …", "q: expected a tensor on the CPU, got one on cuda:0; …", and as there.
    ValueError
        As there.

    Notes
    -----
    Time and memory are those of `refattn.recurrence` and its pullback, and some tens of microseconds a call. Under `create_graph=True` the backward
    holds what autograd needs of it, N·D·M / C numbers and several arrays of N rows.

    Examples
    --------
    >>> import torch
    >>> x = torch.ones(4, 1, requires_grad=True)
    >>> out, state = recurrence(x, x, x)
    >>> out.ravel().tolist(), state.item()
    ([1.0, 2.0, 3.0, 4.0], 4.0)
    >>> out[3].sum().backward()
    >>> x.grad.ravel().tolist()
    [2.0, 2.0, 2.0, 6.0]
    """
    out, end = _apply(refattn.recurrence, {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state},
                      rule=rule, scale=scale, cu_seqlens=cu_seqlens)
    return out, end


def recurrence_step(q_t: Tensor, k_t: Tensor, v_t: Tensor, g_t: Tensor | None = None, beta_t: Tensor | None = None,
                    state: Tensor | None = None, *, rule: str = "linear", scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`refattn.recurrence_step` of tensors: one position of `recurrence`; arguments, results and errors as there.

    >>> import torch
    >>> one, state = torch.ones(1), None
    >>> for x in (1.0, 2.0): out, state = recurrence_step(one, one, x * one, state=state)
    >>> out
    tensor([3.])
    """
    out, end = _apply(refattn.recurrence_step, {"q_t": q_t, "k_t": k_t, "v_t": v_t, "g_t": g_t, "beta_t": beta_t, "state": state},
                      rule=rule, scale=scale)
    return out, end


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, state: State | None = None, *, feature_map: Any = "elu1",
                            eps: float = 1e-6) -> tuple[Tensor, State]:
    """`refattn.causal_linear_attention` of tensors: φ(q_i)ᵀ Σ_{j≤i} φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_{j≤i} φ(k_j) + ε), eq. (12) of the paper.

    Parameters
    ----------
    q, k, v
        Tensors on the CPU, any strides, of the shapes and dtypes that `refattn.causal_linear_attention` takes.
    state : State of tensors, optional
        As an earlier call returned it; its gradients go back into that call.
    feature_map, eps
        As there. A pair of functions of your own gets NumPy arrays; for gradients of gradients it gets tensors.

    Returns
    -------
    out : (..., G·H, N, M)
    state : State of tensors

    Raises
    ------
    ValueError, TypeError
        As in `recurrence`.

    Examples
    --------
    >>> import torch
    >>> out, state = causal_linear_attention(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[1.0], [3.0]]), eps=0)
    >>> out.ravel(), state.z
    (tensor([1., 2.]), tensor([2., 2., 2.]))
    """
    out, S, z = _apply(refattn.causal_linear_attention, {"q": q, "k": k, "v": v, **_apart(state)}, feature_map=feature_map, eps=eps)
    return out, State(S, z)


def causal_linear_attention_step(q_t: Tensor, k_t: Tensor, v_t: Tensor, state: State | None = None, *, feature_map: Any = "elu1",
                                 eps: float = 1e-6) -> tuple[Tensor, State]:
    """`refattn.causal_linear_attention_step` of tensors: one position of `causal_linear_attention`; arguments, results and errors as there.

    >>> import torch
    >>> state = None
    >>> for x in (1.0, 3.0): out, state = causal_linear_attention_step(torch.zeros(3), torch.zeros(3), torch.tensor([x]), state, eps=0)
    >>> out
    tensor([2.])
    """
    out, S, z = _apply(refattn.causal_linear_attention_step, {"q_t": q_t, "k_t": k_t, "v_t": v_t, **_apart(state)},
                       feature_map=feature_map, eps=eps)
    return out, State(S, z)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, feature_map: Any = "elu1", causal: bool = False, eps: float = 1e-6,
                     query_lengths: Any = None, key_lengths: Any = None) -> Tensor:
    """`refattn.linear_attention` of tensors: φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / (φ(q_i)ᵀ Σ_j φ(k_j) + ε), eq. (5) of the paper; `causal`: j ≤ i.

    Arguments, results and errors as in `causal_linear_attention` and `refattn.linear_attention`.

    >>> import torch
    >>> linear_attention(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[1.0], [3.0]]), eps=0).ravel()
    tensor([2., 2.])
    """
    return _apply(refattn.linear_attention, {"q": q, "k": k, "v": v}, feature_map=feature_map, causal=causal, eps=eps,
                  query_lengths=query_lengths, key_lengths=key_lengths)[0]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, query_lengths: Any = None,
                      key_lengths: Any = None) -> Tensor:
    """`refattn.softmax_attention` of tensors: Σ_j exp(s q_i·k_j) v_j / Σ_j exp(s q_i·k_j), eq. (2) of the paper; `causal`: j ≤ i.

    Arguments, results and errors as in `recurrence` and `refattn.softmax_attention`. Under `create_graph=True` N·L numbers a head are held.

    >>> import torch
    >>> q = k = torch.zeros(3, 1)
    >>> softmax_attention(q, k, torch.tensor([[0.0], [2.0], [4.0]]), causal=True).ravel()
    tensor([0., 1., 2.])
    """
    return _apply(refattn.softmax_attention, {"q": q, "k": k, "v": v}, causal=causal, scale=scale,
                  query_lengths=query_lengths, key_lengths=key_lengths)[0]


# --- one operation of autograd for all of them ----------------------------------------------------------------------------------------------

class Call(NamedTuple):
    """A function of refattn, its options, and the pullback of the forward, if no backward has used it up yet."""

    f: Callable[..., Any]
    options: dict[str, Any]
    kept: list[Callable[..., tuple[Any, ...]]]


class _Attention(torch.autograd.Function):                                        # type: ignore[misc]
    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, pullback = _flat_vjp(call, *(None if x is None else _array(x) for x in tensors))
        call.kept.append(pullback)
        return tuple(_tensor(y) for y in outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.outputs = [(y.shape, y.dtype) for y in output]
        for save in (ctx.save_for_backward, ctx.save_for_forward):
            save(*tensors, output[0])                                             # the pullback reads them: autograd sees to it that no one writes
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        call, (*tensors, _) = ctx.call, ctx.saved_tensors
        if torch.is_grad_enabled():                                               # they are to be differentiated again
            gradients = _pullback_in_torch(call, tensors)(*cotangents)
        else:                                                                     # kept no longer: a graph may outlive its backward
            pullback = call.kept.pop() if call.kept else _flat_vjp(call, *(None if x is None else _array(x) for x in tensors))[1]
            gradients = tuple(None if x is None else _tensor(x) for x in pullback(*(None if d is None else _array(d) for d in cotangents)))
        return None, *(d if needed else None for d, needed in zip(gradients, ctx.needs_input_grad[1:], strict=True))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        pullback = _pullback_in_torch(ctx.call, ctx.saved_tensors[:-1])
        moved = [i for i, x in enumerate(tangents) if x is not None]
        zeros = [torch.zeros(shape, dtype=dtype) for shape, dtype in ctx.outputs]                   # linear in dy: any dy will do
        _, transpose = torch.func.vjp(lambda *dy: tuple(pullback(*dy)[i] for i in moved), *zeros)
        return tuple(transpose(tuple(tangents[i] for i in moved)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The axis that is mapped over is one more leading axis."""
        n = info.batch_size
        in_front = (None if x is None else x.expand(n, *x.shape) if axis is None else x.movedim(axis, 0)
                    for x, axis in zip(tensors, in_dims[1:], strict=True))
        lengths = {name: np.broadcast_to(on_host(x), (n, *np.shape(x))) for name, x in call.options.items()
                   if name.endswith("lengths") and x is not None}
        outputs = _Attention.apply(call._replace(options={**call.options, **lengths}, kept=[]), *in_front)
        return outputs, (0,) * len(outputs)


def _apply(f: Callable[..., Any], named: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    for name, x in named.items():
        if x is not None or name[0] in "qkv":
            _check(name, x, f.__name__)
    apply = torch.compiler.disable(_Attention.apply) if torch.compiler.is_compiling() else _Attention.apply    # the disabling is slow to import
    return apply(Call(f, options, []), *named.values())


def _flat_vjp(call: Call, *arrays: Any) -> tuple[tuple[Any, ...], Callable[..., tuple[Any, ...]]]:
    """`refattn.vjp`, a State as its two arrays: autograd knows tensors only."""
    if "feature_map" not in call.options or len(arrays) == 3:
        outputs, pullback = refattn.vjp(call.f, *arrays, **call.options)
        return outputs if isinstance(outputs, tuple) else (outputs,), pullback
    *qkv, S, z = arrays
    (out, end), of_state = refattn.vjp(call.f, *qkv, None if S is None and z is None else State(S, z), **call.options)

    def flat_pullback(dout: Any, dS: Any, dz: Any) -> tuple[Any, ...]:
        *gradients, dstate = of_state(dout, State(dS, dz))
        return *gradients, *(dstate or (None, None))

    return (out, *end), flat_pullback


# --- tensors as arrays ------------------------------------------------------------------------------------------------------------------------

class _ArrayOfTorch(torch.Tensor):                                                # type: ignore[misc]
    """A tensor that says which functions the array API has for it."""

    def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
        return _namespace


def _creating(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **options: function(*arguments, **options).as_subclass(_ArrayOfTorch)


_namespace = ModuleType("torch")                                                  # PyTorch's functions, and what the array API has otherwise
vars(_namespace).update(vars(torch))
vars(_namespace).update({name: _creating(getattr(torch, name)) for name in ("arange", "asarray", "empty", "eye", "ones", "zeros")})
vars(_namespace).update(
    astype=lambda x, dtype: x.to(dtype),
    cumulative_sum=lambda x, *, axis: torch.cumsum(x, axis),
    flip=lambda x, *, axis: torch.flip(x, (axis,)),
    max=lambda x, *, axis, keepdims=False: torch.amax(x, axis, keepdims),
    maximum=lambda x, y: torch.maximum(x, torch.as_tensor(y, dtype=x.dtype)),
    minimum=lambda x, y: torch.minimum(x, torch.as_tensor(y, dtype=x.dtype)),
    repeat=lambda x, repeats, *, axis: torch.repeat_interleave(x, repeats, axis),
    roll=lambda x, shift, *, axis: torch.roll(x, shift, axis))


def _pullback_in_torch(call: Call, tensors: Any) -> Callable[..., tuple[Tensor | None, ...]]:
    """The pullback of the loop-free form, in operations that PyTorch differentiates; half precision as float32, as sums are kept."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)

    def view(x: Tensor | None) -> Any:
        return None if x is None else x.to(wide).as_subclass(_ArrayOfTorch)

    pullback = _flat_vjp(call, *(view(x) for x in tensors))[1]
    return lambda *dy: tuple(None if x is None else d.as_subclass(torch.Tensor).to(x.dtype)
                             for x, d in zip(tensors, pullback(*(view(d) for d in dy)), strict=True))


def _array(x: Tensor) -> np.ndarray:
    """The tensor's memory as a NumPy array. NumPy has no bfloat16 of its own."""
    x = x.detach().resolve_neg()
    if x.dtype is not torch.bfloat16:
        return x.numpy()
    return x.view(torch.int16).numpy().view(_bfloat16())


def _tensor(x: Any) -> Tensor:
    """The array's memory as a tensor."""
    x = np.asarray(x)                                                             # NumPy has numbers where arrays have no axes
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise missing_extra("ml_dtypes", "bf16") from error
    return ml_dtypes.bfloat16


def _check(name: str, x: Any, f: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}; for NumPy arrays there is refattn.{f}")
    if x.device.type != "cpu":
        raise TypeError(f"{name}: expected a tensor on the CPU, got one on {x.device}; for a GPU hand CuPy arrays to refattn.{f} itself, "
                        f"cupy.from_dlpack({name}.detach()), and take the result back by torch.from_dlpack; or pass {name}.cpu()")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of {x.layout}; pass {name}.to_dense()")


def _apart(state: Any) -> dict[str, Any]:
    if state is None:
        return {"state.S": None, "state.z": None}
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: expected State(S, z) as a former call returned it, got {_described(state)}")
    return {"state.S": state[0], "state.z": state[1]}
