"""Kernels that are wrong, each in one way that somebody's kernel was: what a checker has to find.

`BROKEN[name]` has the story in a line, the options of `check_kernel` under which the kernel is to be judged, its forward and its backward. All but
the one mistake is right. `RIGHT[rule]` are right ones in the calling convention of `check_kernel`: `refattn.recurrence` and the two attentions.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._vjp import vjp
from ..attention import linear_attention
from ..oracle import eq7
from ..rules import RULES, recurrence
from ..softmax import softmax_attention

CHUNK = 16
Arrays = tuple[Any, ...]


class Broken(NamedTuple):
    story: str
    options: dict[str, Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None


# --- right -------------------------------------------------------------------------------------------------------------------------------

def named(rule: str, arrays: Arrays) -> Arrays:
    """(q, k, v, g, beta, state) of the arrays that a kernel of this rule is called with."""
    q, k, v, *rest = arrays
    g = rest.pop(0) if "gated" in rule else None
    beta = rest.pop(0) if "delta" in rule else None
    return q, k, v, g, beta, rest.pop(0)


def forward(rule: str, scale: float = 1.0) -> Callable[..., Any]:
    return lambda *arrays: recurrence(*named(rule, arrays), rule=rule, scale=scale)


def backward(rule: str) -> Callable[..., Any]:
    def gradients(dout: Any, dstate: Any, *arrays: Any) -> Arrays:
        _, pullback = vjp(recurrence, *named(rule, arrays), rule=rule)
        return tuple(d for d in pullback(np.ascontiguousarray(dout), dstate) if d is not None)

    return gradients


def _attention(f: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of one of the library's two attentions."""
    return lambda *qkv: f(*qkv, **options), lambda dout, *qkv: vjp(f, *qkv, **options)[1](np.ascontiguousarray(dout))


RIGHT = {rule: Broken("nothing is wrong", {"rule": rule}, forward(rule), backward(rule)) for rule in RULES} | {
    "linear_attention": Broken("nothing is wrong", {"rule": "linear_attention"}, *_attention(linear_attention, causal=True)),
    "softmax_attention": Broken("nothing is wrong", {"rule": "softmax_attention"}, *_attention(softmax_attention, causal=True, scale=1.0))}


# --- wrong -------------------------------------------------------------------------------------------------------------------------------

def _of(rule: str, change: Callable[..., Any], **options: Any) -> tuple[dict[str, Any], Callable[..., Any]]:
    """`change(run, q, k, v, g, beta, state)`, where run is the right forward of these six."""
    def run(*six: Any) -> Any:
        return recurrence(*six, rule=rule, scale=options.get("scale", 1.0))

    return {"rule": rule, **options}, lambda *arrays: change(run, *named(rule, arrays))


def _backward_of(rule: str, change: Callable[..., Arrays], **options: Any) -> tuple[dict[str, Any], Callable[..., Any], Callable[..., Any]]:
    """A right forward, and `change(gradients, dout, dstate, q, k, v, g, beta, state)`, where `gradients(dout, dstate, …)` gives the right six."""
    scale = options.get("scale", 1.0)

    def right(dout: Any, dstate: Any, *six: Any) -> list[Any]:
        return list(vjp(recurrence, *six, rule=rule, scale=scale)[1](np.ascontiguousarray(dout), dstate))

    def gradients(dout: Any, dstate: Any, *arrays: Any) -> Arrays:
        return tuple(d for d in change(right, dout, dstate, *named(rule, arrays)) if d is not None)

    return {"rule": rule, **options}, forward(rule, scale), gradients


def _shifted(x: Any, by: int) -> Any:
    """Position t has what t - by had; zeros where nothing was."""
    y = np.zeros_like(x)
    if by > 0:
        y[:, :, by:] = x[:, :, :-by]
    else:
        y[:, :, :by] = x[:, :, -by:]
    return y


def _loop(position: Callable[..., Any]) -> Callable[..., Any]:
    """out and state of a loop in which `position(S, q, k, v, g, beta)`, of one position, gives (S, o)."""
    def change(run: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
        S, out = state.copy(), np.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
        for t in range(q.shape[2]):
            a = None if g is None else np.exp(g[:, :, t])[..., None] if g.ndim == 4 else np.exp(g[:, :, t])[..., None, None]
            b = None if beta is None else beta[:, :, t, None]
            S, out[:, :, t] = position(S, q[:, :, t], k[:, :, t], v[:, :, t], a, b)
        return out, S

    return change


def _outer(k: Any, v: Any) -> Any:
    return k[..., :, None] * v[..., None, :]


def _read(S: Any, q: Any) -> Any:
    return (q[..., None, :] @ S)[..., 0, :]


def _in_float16(run: Any, *six: Any) -> Any:
    half: list[Any] = [None if x is None else x.astype(np.float16) for x in six]
    q, k, v, state = half[0], half[1], half[2], half[5].copy()
    out = np.empty((*q.shape[:3], v.shape[-1]), np.float16)
    for t in range(q.shape[2]):
        state += _outer(k[:, :, t], v[:, :, t])
        out[:, :, t] = (q[:, :, t, :, None] * state).sum(-2, dtype=np.float16)
    return out.astype(six[0].dtype), state.astype(six[5].dtype)


def _heads_chained(run: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    out, end = run(q, k, v, g, beta, state)
    for h in range(1, k.shape[1]):
        own = slice(h, h + 1)
        out[:, own], end[:, own] = run(q[:, own], k[:, own], v[:, own], g, beta, end[:, h - 1: h])
    return out, end


def _in_place(run: Any, *six: Any) -> Any:
    out, end = run(*six)
    six[5][...] = end
    return out, six[5]


def _patched(where: Callable[..., Any], value: Callable[[Any], Any]) -> Callable[..., Any]:
    """The right answer, but for out[where(q)] = value(out there)."""
    def change(run: Any, *six: Any) -> Any:
        out, end = run(*six)
        at = where(six[0])
        if at is not None:
            out[at] = value(out[at])
        return out, end

    return change


_left_over: dict[str, Any] = {}


def _grown(run: Any, *six: Any) -> Any:
    out, end = run(*six)
    kept = _left_over.get("state")
    same = kept is not None and kept.shape == end.shape
    _left_over["state"] = end.copy()
    return out + (_read(kept, six[0][:, :, -1])[:, :, None] if same else 0), end                        # the last call's state


def _as_if_contiguous(x: Any) -> Any:
    return np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides)


def _factored(run: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    G = np.cumsum(g, axis=2)[..., None]
    with np.errstate(all="ignore"):
        A = np.tril((q * np.exp(G)) @ (k * np.exp(-G)).mT)
        out = A @ v + (q * np.exp(G)) @ state
    return out.astype(q.dtype), run(q, k, v, g, beta, state)[1]


def _differences(run: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    with np.errstate(all="ignore"):
        G = np.cumsum(g, axis=2)
        P = np.exp(np.where(np.tri(q.shape[2], dtype=bool), G[..., :, None] - G[..., None, :], -np.inf))
        out = (P * (q @ k.mT)) @ v + (q * np.exp(G)[..., None]) @ state
    return out.astype(q.dtype), run(q, k, v, g, beta, state)[1]


def _one_order(run: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
    B = beta[..., None] * np.tril(k @ k.mT, -1)
    Z = beta[..., None] * (v - k @ state)
    U = Z - B @ Z                                                   # I - B, where the inverse of I + B belongs
    return (np.tril(q @ k.mT) @ U + q @ state).astype(q.dtype), state + k.mT @ U


def _with(rule: str, index: int, value: Callable[..., Any], **options: Any) -> tuple[dict[str, Any], Callable[..., Any], Callable[..., Any]]:
    """The right gradients, but for the one of that index: `value(d, dout, dstate, q, k, v, g, beta, state)`."""
    def change(right: Any, dout: Any, dstate: Any, *six: Any) -> Arrays:
        gradients = right(dout, dstate, *six)
        gradients[index] = value(gradients[index], dout, dstate, *six)
        return tuple(gradients)

    return _backward_of(rule, change, **options)


def _one_of_a_group(right: Any, dout: Any, dstate: Any, *six: Any) -> Arrays:
    gradients, G = right(dout, dstate, *six), six[0].shape[1] // six[1].shape[1]
    first = np.arange(six[0].shape[1]) % G == 0
    only = right(np.where(first[:, None, None], dout, 0).astype(dout.dtype), dstate, *six)
    return (gradients[0], only[1], *gradients[2:])


def _seen(q: Any, k: Any, causal: bool) -> Any:
    return np.tri(q.shape[2], k.shape[2], dtype=bool) if causal else np.ones((q.shape[2], k.shape[2]), bool)


def _softmax(q: Any, k: Any, v: Any, *, causal: bool = True, scale: float = 1.0, most: Callable[..., Any] = np.max, axis: int = -1,
             seen: Any = None, exp: Callable[..., Any] = np.exp) -> Any:
    """The masked form in the dtype of q, so that one step of it can be another."""
    X = np.where(_seen(q, k, causal) if seen is None else seen, q.dtype.type(scale) * (q @ k.mT), -np.inf)
    with np.errstate(all="ignore"):
        P = exp(X - most(X, axis=axis, keepdims=True))
        return ((P / P.sum(axis, keepdims=True)) @ v).astype(q.dtype)


def _linear(q: Any, k: Any, v: Any, *, causal: bool = True, phi: Callable[..., Any] = eq7,
            total: Callable[..., Any] = lambda A: A.sum(-1, keepdims=True), eps: float = 1e-6) -> Any:
    """The same of linear attention."""
    A = np.where(_seen(q, k, causal), phi(q) @ phi(k).mT, 0)
    with np.errstate(all="ignore"):
        return (A @ v / (total(A) + eps)).astype(q.dtype)


def _softmax_backward(change: Callable[..., Any]) -> tuple[dict[str, Any], Callable[..., Any], Callable[..., Any]]:
    """A right forward, and `change(P, dP, D)` for dx = P (dP - D), where dP = do·v and D = do·out."""
    def gradients(dout: Any, q: Any, k: Any, v: Any) -> Arrays:
        X = np.where(_seen(q, k, True), q @ k.mT, -np.inf)
        P = np.exp(X - X.max(-1, keepdims=True))
        P = P / P.sum(-1, keepdims=True)
        dP = dout @ v.mT
        dx = change(P, dP, (P * dP).sum(-1, keepdims=True))
        return (dx @ k).astype(q.dtype), (dx.mT @ q).astype(q.dtype), (P.mT @ dout).astype(q.dtype)

    return {"rule": "softmax_attention"}, lambda *qkv: softmax_attention(*qkv, causal=True, scale=1.0), gradients


def _linear_backward(weight: Callable[..., Any]) -> tuple[dict[str, Any], Callable[..., Any], Callable[..., Any]]:
    """A right forward, and gradients with `weight(do·v, do·out, 1 / den)` for what each pair's similarity gets."""
    def gradients(dout: Any, q: Any, k: Any, v: Any) -> Arrays:
        A = np.where(_seen(q, k, True), eq7(q) @ eq7(k).mT, 0)
        inverse = 1 / (A.sum(-1, keepdims=True) + 1e-6)
        out = A @ v * inverse
        dA = np.where(_seen(q, k, True), weight(dout @ v.mT, (dout * out).sum(-1, keepdims=True), inverse), 0)
        dq, dk = (dA @ eq7(k) * np.exp(np.minimum(q, 0)), dA.mT @ eq7(q) * np.exp(np.minimum(k, 0)))
        return dq.astype(q.dtype), dk.astype(q.dtype), (A.mT @ (dout * inverse)).astype(q.dtype)

    return {"rule": "linear_attention"}, lambda *qkv: linear_attention(*qkv, causal=True), gradients


def _reads_as_many_keys_as_queries(q: Any, k: Any, v: Any) -> Any:
    short, n = max(q.shape[2] - k.shape[2], 0), q.shape[2]
    k, v = (np.concatenate([x, np.ones((*x.shape[:2], short, x.shape[3]), x.dtype)], 2)[:, :, :n] for x in (k, v))
    return softmax_attention(q, k, v, scale=1.0)


def _filled(where: Callable[..., Any], add: bool = False) -> Callable[..., Any]:
    """The right answer written into the memory that is given, where `where(q)`."""
    def write(q: Any, k: Any, v: Any, state: Any, out: Any, end: Any) -> None:
        found, end[...] = recurrence(q, k, v, state=state)
        at = where(q)
        out[at] = out[at] + found[at] if add else found[at]

    return write


BROKEN: dict[str, Broken] = {
    # masks and chunks
    "excludes_itself": Broken("the mask is j < i: a position does not see itself",
                              *_of("linear", lambda run, q, k, v, g, b, S: (run(q, _shifted(k, 1), _shifted(v, 1), g, b, S)[0],
                                                                            run(q, k, v, g, b, S)[1]))),
    "sees_the_next": Broken("the mask is j ≤ i + 1: a position sees the next one",
                            *_of("linear", lambda run, q, k, v, g, b, S: (run(q, k, v, g, b, S)[0] + (q * _shifted(k, -1)).sum(-1, keepdims=True)
                                                                          * _shifted(v, -1), run(q, k, v, g, b, S)[1]))),
    "drops_the_rest": Broken("positions behind the last whole chunk are left at zero",
                             *_of("linear", _patched(lambda q: np.s_[:, :, q.shape[2] // CHUNK * CHUNK:], np.zeros_like))),
    "state_without_the_rest": Broken("the final state lacks the last, partial chunk", *_of("linear", lambda run, q, k, v, g, b, S: (
        run(q, k, v, g, b, S)[0], run(*(x[:, :, : q.shape[2] // CHUNK * CHUNK] for x in (q, k, v)), g, b, S)[1]))),
    "forgets_after_two_chunks": Broken("from the third chunk on the state of the first is lost", *_of("linear", lambda run, q, k, v, g, b, S: (
        run(q, k, v, g, b, S) if q.shape[2] <= 2 * CHUNK else (np.concatenate(
            [run(*(x[:, :, : 2 * CHUNK] for x in (q, k, v)), g, b, S)[0], run(*(x[:, :, 2 * CHUNK:] for x in (q, k, v)), g, b, 0 * S)[0]], 2),
            run(q, k, v, g, b, S)[1])))),
    "short_without_state": Broken("sequences shorter than a chunk ignore the initial state",
                                  *_of("linear", lambda run, q, k, v, g, b, S: run(q, k, v, g, b, S if q.shape[2] >= CHUNK else 0 * S))),
    "last_row_doubled": Broken("the last position is counted twice", *_of("linear", _patched(lambda q: np.s_[:, :, -1:], lambda x: 2 * x))),
    "one_element": Broken("a single element of some thousands is off by one", *_of("linear", _patched(
        lambda q: (0, -1, 17, 0) if q.shape[2] > 17 else None, lambda x: x + 1))),
    # heads, sequences, layouts
    "heads_chained": Broken("each head starts from the final state of the one before", *_of("linear", _heads_chained)),
    "summed_over_heads": Broken("keys are summed over the heads", *_of("linear", lambda run, q, k, v, g, b, S: run(
        q, np.broadcast_to(k.sum(1, keepdims=True), k.shape), v, g, b, S))),
    "first_state_for_all": Broken("the initial state of the first sequence serves all",
                                  *_of("linear", lambda run, q, k, v, g, b, S: run(q, k, v, g, b, np.repeat(S[:1], len(S), 0)))),
    "groups_interleaved": Broken("query head h reads key head h mod H in place of h // G", *_of("linear", lambda run, q, k, v, g, b, S: (
        run(q.reshape(len(q), -1, k.shape[1], *q.shape[2:]).swapaxes(1, 2).reshape(q.shape), k, v, g, b, S)[0].reshape(
            len(q), k.shape[1], -1, *q.shape[2:3], v.shape[-1]).swapaxes(1, 2).reshape(*q.shape[:3], -1), run(q, k, v, g, b, S)[1]), grouped=True)),
    "state_transposed_in_memory": Broken("the state comes back with its numbers in the order of its transpose", *_of(
        "linear", lambda run, *six: (lambda out, S: (out, S.swapaxes(-1, -2).reshape(S.shape)))(*run(*six)))),
    "out_in_another_layout": Broken("the output comes back as (B, N, H, M)", *_of(
        "linear", lambda run, *six: (lambda out, S: (np.moveaxis(out, 1, 2), S))(*run(*six)))),
    "out_in_float64": Broken("the output comes back in float64", *_of(
        "linear", lambda run, *six: (lambda out, S: (out.astype(float), S))(*run(*six)))),
    "only_contiguous": Broken("inputs are read as if they were contiguous", *_of(
        "linear", lambda run, q, k, v, g, b, S: run(_as_if_contiguous(q), k, v, g, b, S))),
    "state_in_place": Broken("the caller's initial state is updated in place", *_of("linear", _in_place)),
    "keys_scaled_in_place": Broken("the caller's keys are scaled in place", *_of("linear", lambda run, q, k, v, g, b, S: (
        lambda found, _: found)(run(q, k, v, g, b, S), np.multiply(k, 0.5, out=k)))),
    "left_over": Broken("what the last call left in a buffer is added", *_of("linear", _grown)),
    "raises_for_one": Broken("a sequence of one position raises", *_of("linear", lambda run, q, *rest: run(q, *rest) if q.shape[2] > 1 else 1 / 0)),
    "no_output": Broken("nothing is returned", *_of("linear", lambda run, *six: None)),
    # numbers
    "scale_missing": Broken("the scale is forgotten", *_of("linear", lambda run, q, *rest: recurrence(q, *rest), scale=0.5)),
    "scale_twice": Broken("the scale is applied to queries and to outputs", *_of("linear", lambda run, q, *rest: run(0.5 * q, *rest), scale=0.5)),
    "scale_on_state": Broken("the initial state is read without the scale", *_of(
        "linear", lambda run, q, k, v, g, b, S: (run(q, k, v, g, b, 2 * S)[0], run(q, k, v, g, b, S)[1]), scale=0.5)),
    "scale_of_another_width": Broken("the scale is 1/√M in place of 1/√D: 0.35 for 0.4", *_of(
        "linear", lambda run, q, *rest: recurrence(q, *rest, scale=0.35), scale=0.4)),
    "half_accumulator": Broken("float32 arrays are summed in float16", *_of("linear", _in_float16)),
    "biased": Broken("one part in 2,000 is added to every output, as by a coarse exponential", *_of("linear", _patched(
        lambda q: np.s_[:], lambda x: x * x.dtype.type(1.0005)))),
    # decays
    "decay_after_the_write": Broken("the new key is weakened too: S = a (S + k vᵀ)", *_of("gated", _loop(
        lambda S, q, k, v, a, b: (lambda T: (T, _read(T, q)))(a * (S + _outer(k, v)))))),
    "decay_of_the_last_position": Broken("position t has the decay of t - 1", *_of(
        "gated", lambda run, q, k, v, g, b, S: run(q, k, v, _shifted(g, 1), b, S))),
    "decay_not_exponentiated": Broken("g itself is the factor", *_of("gated", lambda run, q, k, v, g, b, S: _loop(
        lambda S, q, k, v, a, b: (lambda T: (T, _read(T, q)))(np.log(np.maximum(a, 1e-30)) * S + _outer(k, v)))(run, q, k, v, g, b, S))),
    "decay_skips_the_state": Broken("the initial state never decays", *_of("gated", lambda run, q, k, v, g, b, S: (
        run(q, k, v, g, b, 0 * S)[0] + q @ S, run(q, k, v, g, b, S)[1]))),
    "decay_clamped": Broken("decays are cut off at g = -5, for stability", *_of(
        "gated", lambda run, q, k, v, g, b, S: run(q, k, v, np.maximum(g, -5), b, S))),
    "decay_of_the_first_channel": Broken("all key channels decay like the first", *_of("gated", lambda run, q, k, v, g, b, S: run(
        q, k, v, np.repeat(g[..., :1], g.shape[-1], -1), b, S), decay="channel")),
    "decay_summed_over_heads": Broken("decays are cumulated over heads in place of positions", *_of(
        "gated", lambda run, q, k, v, g, b, S: run(q, k, v, np.broadcast_to(g.sum(1, keepdims=True), g.shape), b, S))),
    "nan_at_a_reset": Broken("differences of cumulated logarithms: NaN behind g = -inf", *_of("gated", _differences)),
    "overflow_at_strong_decay": Broken("exp(G_i) exp(-G_j), whose second factor overflows", *_of("gated", _factored, resets=False)),
    "end_decays_once_too_often": Broken("the final state has one decay too many", *_of("gated", lambda run, q, k, v, g, b, S: (
        run(q, k, v, g, b, S)[0], run(q, k, v, g, b, S)[1] * np.exp(g[:, :, -1])[..., None, None]))),
    # deltas
    "beta_on_the_value_alone": Broken("β (v) - r in place of β (v - r)", *_of("delta", _loop(
        lambda S, q, k, v, a, b: (lambda T: (T, _read(T, q)))(S + _outer(k, b * v - _read(S, k)))))),
    "beta_twice": Broken("β enters squared", *_of("delta", lambda run, q, k, v, g, b, S: run(q, k, v, g, b * b, S))),
    "beta_through_a_sigmoid": Broken("β goes through a sigmoid that the caller has applied already", *_of(
        "delta", lambda run, q, k, v, g, b, S: run(q, k, v, g, 1 / (1 + np.exp(-b)), S))),
    "reads_before_the_write": Broken("outputs are read before the write", *_of("delta", _loop(
        lambda S, q, k, v, a, b: (S + _outer(k, b * (v - _read(S, k))), _read(S, q))))),
    "triangle_to_first_order": Broken("the inverse of I + B is taken as I - B", *_of("delta", _one_order)),
    "keys_normalised": Broken("keys are normalised again", *_of("delta", lambda run, q, k, v, g, b, S: run(
        q, k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-6).astype(k.dtype), v, g, b, S))),
    "reads_before_the_decay": Broken("what is to be replaced is read from the state before its decay", *_of("gated_delta", _loop(
        lambda S, q, k, v, a, b: (lambda T: (T, _read(T, q)))(a * S + _outer(k, b * (v - _read(S, k))))))),
    # gradients
    "dq_without_scale": Broken("dq lacks the scale", *_with("linear", 0, lambda d, *rest: 2 * d, scale=0.5)),
    "dq_without_state": Broken("dq ignores the initial state", *_backward_of("linear", lambda right, dout, dstate, q, k, v, g, b, S: (
        right(dout, dstate, q, k, v, g, b, 0 * S)[0], *right(dout, dstate, q, k, v, g, b, S)[1:]))),
    "dk_without_dstate": Broken("dk ignores the final state's cotangent", *_backward_of("linear", lambda right, dout, dstate, *six: (
        right(dout, dstate, *six)[0], right(dout, 0 * dstate, *six)[1], *right(dout, dstate, *six)[2:]))),
    "dv_excludes_itself": Broken("dv at a position lacks that position's own output", *_with(
        "linear", 2, lambda d, dout, dstate, q, k, v, g, b, S: d - (q * k).sum(-1, keepdims=True) * dout)),
    "dstate_missing_when_short": Broken("the initial state's gradient is zero for sequences shorter than a chunk", *_with(
        "linear", 5, lambda d, dout, *rest: d if dout.shape[2] >= CHUNK else 0 * d)),
    "dk_of_one_of_a_group": Broken("dk of a group is that of its first query head", *_backward_of("linear", _one_of_a_group, grouped=True)),
    "cotangent_as_if_contiguous": Broken("an expanded cotangent is read as if it were contiguous", {"rule": "linear"}, forward("linear"),
                                         lambda dout, dstate, *arrays: backward("linear")(dout if dout.strides[-1] else dout * np.arange(
                                             dout.shape[-1]).astype(dout.dtype), dstate, *arrays)),
    "dg_missing": Broken("decays get no gradient", *_with("gated", 3, lambda d, *rest: 0 * d)),
    "dg_of_the_wrong_sign": Broken("dg has the wrong sign", *_with("gated", 3, lambda d, *rest: -d)),
    "dg_shifted": Broken("dg of position t stands at t + 1", *_with("gated", 3, lambda d, *rest: _shifted(d, 1))),
    "dbeta_through_values_alone": Broken("dβ ignores what β erases", *_with(
        "delta", 4, lambda d, dout, dstate, q, k, v, g, b, S: (v * vjp(recurrence, q, k, v, g, b, S, rule="delta")[1](
            np.ascontiguousarray(dout), dstate)[2]).sum(-1) / np.where(b == 0, 1, b))),
    "dk_of_the_delta_as_of_the_sum": Broken("dk as if nothing were erased", *_with(
        "delta", 1, lambda d, dout, dstate, q, k, v, g, b, S: vjp(recurrence, q, k, (b[..., None] * v).astype(v.dtype), None, None, S)[1](
            np.ascontiguousarray(dout), dstate)[1])),
    # softmax attention
    "softmax_without_the_maximum": Broken("exp of the scores themselves, which overflows", {"rule": "softmax_attention"},
                                          lambda *qkv: _softmax(*qkv, most=lambda X, **_: 0)),
    "softmax_with_the_heads_maximum": Broken("the maximum is that of the whole head: rows far below it underflow", {"rule": "softmax_attention"},
                                             lambda *qkv: _softmax(*qkv, most=lambda X, **_: X.max((-2, -1), keepdims=True))),
    "softmax_over_queries": Broken("weights sum to 1 over queries in place of keys", {"rule": "softmax_attention", "causal": False},
                                   lambda *qkv: _softmax(*qkv, causal=False, axis=-2)),
    "softmax_excludes_itself": Broken("the mask is j < i, but for the first", {"rule": "softmax_attention"}, lambda q, k, v: _softmax(
        q, k, v, seen=np.tri(q.shape[2], k=-1, dtype=bool) | (np.arange(q.shape[2]) == 0))),
    "softmax_of_another_scale": Broken("the scale is 1/√M in place of 1/√D", {"rule": "softmax_attention", "scale": "1/sqrt(d)"},
                                       lambda q, k, v: _softmax(q, k, v, scale=v.shape[-1] ** -0.5)),
    "softmax_as_many_keys_as_queries": Broken("reads as many keys as there are queries, those behind the last too", {
        "rule": "softmax_attention", "causal": False}, _reads_as_many_keys_as_queries),
    "softmax_coarse_exp": Broken("exp with 11 bits", {"rule": "softmax_attention"}, lambda *qkv: _softmax(
        *qkv, exp=lambda x: np.exp(x).astype(np.float16).astype(x.dtype))),
    "softmax_dx_without_the_row": Broken("dx = P do·v: what the row's sum gives back is missing", *_softmax_backward(lambda P, dP, D: P * dP)),
    "softmax_dx_of_another_row": Broken("do·out is taken from the row before", *_softmax_backward(lambda P, dP, D: P * (dP - np.roll(D, 1, 2)))),
    # linear attention with its normaliser
    "linear_sums_all_keys": Broken("the normaliser sums over all keys, not those up to the position", {"rule": "linear_attention"},
                                   lambda q, k, v: _linear(q, k, v, total=lambda A: (eq7(q) @ eq7(k).mT).sum(-1, keepdims=True))),
    "linear_elu_alone": Broken("φ = elu, without the one", {"rule": "linear_attention"}, lambda *qkv: _linear(
        *qkv, phi=lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))))),
    "linear_unnormalised": Broken("no division", {"rule": "linear_attention"}, lambda *qkv: _linear(
        *qkv, total=lambda A: np.ones_like(A[..., :1]), eps=0)),
    "linear_large_eps": Broken("ε = 10⁻³ in place of 10⁻⁶", {"rule": "linear_attention"}, lambda *qkv: _linear(*qkv, eps=1e-3)),
    "linear_keys_not_mapped": Broken("φ is applied to the queries alone", {"rule": "linear_attention", "causal": False}, lambda q, k, v: _linear(
        q, np.where(k > 1, k - 1, np.log(np.maximum(k, 1e-3))), v, causal=False)),
    "linear_dden_missing": Broken("the normaliser has no gradient", *_linear_backward(lambda dP, D, inverse: dP * inverse)),
    "linear_dden_of_the_wrong_sign": Broken("the normaliser's gradient has the wrong sign", *_linear_backward(
        lambda dP, D, inverse: (dP + D) * inverse)),
    # memory that is given
    "rows_not_written": Broken("the last row of the given output is never written", {"rule": "linear", "into": True},
                               _filled(lambda q: np.s_[:, :, :-1])),
    "adds_to_what_is_there": Broken("results are added to what stands in the given output", {"rule": "linear", "into": True},
                                    _filled(lambda q: np.s_[:], add=True)),
}
