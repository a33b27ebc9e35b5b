"""What `check_kernel` asks of a kernel: each law a function that gives words for what is wrong in a case, or None; and how far off it may be.

`laws(kernel)` has those that apply. A case is exact where every right implementation gives the same bits; in any other an element may be off by
its own bound (`bounds`, `gradient_bounds`), and two answers by twice that from one another.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .._array import accumulator
from ..oracle import eq7
from . import strategies
from .budgets import attention_budget, recurrence_budget, rounding, unit_roundoff
from .kernel import ATTENTIONS, LAYOUTS, Case, Kernel, call, call_backward, definition, given_arrays, gradients, input_names, read_result, scale_of
from .loop_budget import loop_budget
from .rules_budget import rules_budget
from .softmax_budget import _exact, softmax_backward_budget, softmax_forward_budget

Law = Callable[[Kernel, Case, list[float]], "str | None"]
WITHOUT_THE_DEFINITION = ("untouched inputs", "same bits twice", "gradients of integers")       # what may still be told where outputs are wrong
CHUNKS = (1, 16, 64, None)


def laws(kernel: Kernel) -> Iterator[tuple[str, bool, Law]]:
    """(name, of integers, law) of each that applies, the exact ones first."""
    if kernel.into:
        yield "every element written", True, law_written
    yield "definition, integers", True, law_definition
    yield "untouched inputs", True, law_untouched
    yield "same bits twice", True, law_twice
    if kernel.causal:
        yield "no future in the past", True, law_causal
    yield "sequences and heads apart", True, law_apart
    if kernel.rule not in ATTENTIONS:
        yield "padding", True, law_padding
    if kernel.states:
        yield "in two parts", True, law_parts
    if not kernel.contiguous:
        yield "any strides", True, law_strides
    if kernel.gradients:
        yield "gradients of integers", True, law_gradients
    if kernel.gradients and not kernel.contiguous:
        yield "expanded cotangent", True, law_expanded
    yield "definition, real numbers", False, law_definition
    if kernel.gradients:
        yield "gradients of real numbers", False, law_gradients


def law_definition(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """Outputs and final state are those of the definition."""
    out, state = call(kernel, case)
    expected = definition(kernel, case)
    bound = (None, None) if case.exact else bounds(kernel, case)
    return (compare("out", out, expected[0], bound[0], kernel, worst) or
            (None if state is None or expected[1] is None else compare("state", state, expected[1], bound[1], kernel, worst)))


def law_written(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """What stood in the memory that is to be written to is nowhere to be seen afterwards."""
    words = None
    for name, one, other in zip(("out", "state"), *(call(kernel, case, poison=p) for p in (np.nan, 7.0)), strict=True):
        if one is not None and other is not None:
            words = words or same(f"{name}, written over NaN and over 7", one, other)
    if words is None and kernel.backward is not None:
        one_, other_ = (call_backward(kernel, case, poison=p) for p in (np.nan, 7.0))
        for name in one_:
            words = words or same(f"d{name}, written over NaN and over 7", one_[name], other_[name])
    return words


def law_untouched(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """The call wrote to none of its inputs."""
    arrays = given_arrays(kernel, case)
    theirs: list[Any] = []

    def kept(x: np.ndarray) -> Any:
        theirs.append(kernel.to(x))
        return theirs[-1]

    call(kernel._replace(to=kept), case)
    for name, x, y in zip(input_names(kernel, case), arrays, theirs, strict=False):                 # behind them stands memory to write to
        if not np.array_equal(read_result(name, y, x.shape, None), x, equal_nan=True):
            return f"{name}: the call wrote to it"
    return None


def law_twice(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """Two calls give the same bits: nothing is left of the one before, and no order of threads shows."""
    first, again = call(kernel, case), call(kernel, case)
    return same("out, called again", again[0], first[0]) or (None if first[1] is None or again[1] is None else
                                                             same("state, called again", again[1], first[1]))


def law_causal(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """Other positions later leave earlier outputs as they were."""
    at = case.q.shape[2] // 2
    sign: Callable[[str], int] = lambda name: 1 if name in ("g", "beta") else -1
    later = case.each(lambda name, x: x if name in ("state", "dstate") else np.concatenate(
        [x[:, :, :at], x[:, :, at:][:, :, ::-1] * x.dtype.type(sign(name))], axis=2))
    return same(f"out before position {at}, with other positions from there on", call(kernel, later)[0][:, :, :at],
                call(kernel, case)[0][:, :, :at], _slack(kernel, case)[0][:, :, :at])


def law_apart(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """A sequence and a head alone give what they give among others."""
    (out, _), (slack, _) = call(kernel, case), _slack(kernel, case)
    B, H, G = case.q.shape[0], case.k.shape[1], case.q.shape[1] // case.k.shape[1]
    for b, h in {(0, 0), (B - 1, H - 1)}:
        queries = slice(h * G, (h + 1) * G)
        alone = case.each(lambda name, x, b=b, h=h, queries=queries: x[b: b + 1, queries if name in ("q", "dout") else slice(h, h + 1)])  # type: ignore[misc]
        words = same(f"out of sequence {b} and head {h} alone", call(kernel, alone)[0], out[b: b + 1, queries],
                     slack[b: b + 1, queries])
        if words:
            return words
    return None


def law_padding(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """Positions behind the last that write nothing, k = v = 0 with g = β = 0, leave outputs and state as they were."""
    (out, state), (slack, slack_state), N = call(kernel, case), _slack(kernel, case), case.q.shape[2]
    more = kernel.multiple_of * (1 + N % 3)
    zeros: Callable[[np.ndarray], np.ndarray] = lambda x: np.zeros((*x.shape[:2], more, *x.shape[3:]), x.dtype)
    longer = case.each(lambda name, x: x if name in ("state", "dstate") else np.concatenate(
        [x, zeros(x) + x.dtype.type(name == "q")], axis=2))
    out2, state2 = call(kernel, longer)
    return (same(f"out before {more} positions that write nothing", out2[:, :, :N], out, slack) or
            (None if state is None or state2 is None else same(f"state behind {more} positions that write nothing", state2, state, slack_state)))


def law_parts(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """A sequence read in two parts, the state handed over, is the sequence."""
    N = case.q.shape[2]
    out, state = call(kernel, case)
    at = kernel.multiple_of * (1 + N // (3 * kernel.multiple_of))
    if state is None or at >= N:
        return None
    slack, slack_state = _slack(kernel, case)

    def cut(rows: slice, start: np.ndarray | None) -> Case:
        return case.each(lambda name, x: x if name in ("state", "dstate") else x[:, :, rows])._replace(state=start)

    first, middle = call(kernel, cut(slice(at), case.state))
    assert middle is not None
    second, end = call(kernel, cut(slice(at, None), middle))
    return (same(f"out of positions up to {at}, read first", first, out[:, :, :at], slack[:, :, :at]) or
            same(f"out from position {at} on, read from the state before it", second, out[:, :, at:], slack[:, :, at:]) or
            (None if end is None else same("state, read in two parts", end, state, slack_state)))


def law_strides(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """Gaps and other orders in memory change nothing."""
    rng, contiguous = np.random.default_rng(case.q.size), call(kernel, case)[0]
    awkward = [strategies.strided(np.ascontiguousarray(x), rng) for x in given_arrays(kernel, case)]
    for x in awkward:                                                            # PyTorch and others refuse what cannot be written to, and
        if any(step < 0 for step in x.strides):                                  # negative steps
            return None
        x.flags.writeable = True
    strides = (f"{name} {tuple(step // x.itemsize for step in x.strides)}" for name, x in zip(input_names(kernel, case), awkward, strict=True))
    return same(f"out, for inputs with the strides {', '.join(strides)}", call(kernel, case, awkward)[0], contiguous, _slack(kernel, case)[0])


def law_gradients(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """Those of the library's own backward in float64."""
    found = call_backward(kernel, case)
    if case.state is None and kernel.states:
        case = case._replace(state=np.zeros(case.dstate.shape, accumulator(kernel.dtype)))
    expected = gradients(kernel, case)
    bound: dict[str, Any] = {} if case.exact else gradient_bounds(kernel, case)
    for name, d in found.items():
        exact, b = expected[name], bound.get(name)
        if name == "g" and kernel.decay_space == "linear":                       # dL/da = dL/dg / a
            a = np.exp(case.g.astype(np.float64))                                # type: ignore[union-attr]
            if (a == 0).any():
                continue
            exact, b = exact / a, None if b is None else b / a + 4 * unit_roundoff(accumulator(kernel.dtype)) * np.abs(exact / a)
        words = compare(f"d{name}", d, exact, b, kernel, worst)
        if words:
            return words
    return None


def law_expanded(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """`out.sum().backward()` and its like give a cotangent whose strides are 0."""
    whole = np.ascontiguousarray(LAYOUTS[kernel.layout][0](case.dout))
    expanded = np.lib.stride_tricks.as_strided(whole, whole.shape, (*whole.strides[:-1], 0))      # PyTorch refuses what may not be written to
    expected, found = (call_backward(kernel, case, dout) for dout in (np.ascontiguousarray(expanded), expanded))
    for name, d in found.items():
        words = same(f"d{name}, for a cotangent with a stride of 0", d, expected[name], 0.0 if case.exact else np.inf)
        if words:
            return words
    return None


# --- how far off it may be -----------------------------------------------------------------------------------------------------------------

def bounds(kernel: Kernel, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Of out and state: the widest of the forms there are, chunks of any size, scans and loops, for a right kernel of any order of summation."""
    if kernel.rule == "softmax_attention":
        out = softmax_forward_budget(case.q, case.k, case.v, causal=kernel.causal, scale=scale_of(kernel, case), key_block=1)
        return out + _rounded_weights(kernel, case)[0], np.zeros(case.dstate.shape)
    widest = _widest(kernel, case)
    out, end = widest["out"], widest["end"]
    if case.g is not None or case.beta is not None:
        acc = accumulator(kernel.dtype)
        loop = loop_budget(case.q, case.k, case.v, case.g, case.beta, _state(case), scale=scale_of(kernel, case), dtype=acc.name)
        exact_out, exact_end = definition(kernel, case)
        out, end = np.maximum(out, loop[0] + rounding(exact_out, kernel.dtype)), np.maximum(end, loop[1] + rounding(exact_end, acc))
    return out, end


def gradient_bounds(kernel: Kernel, case: Case) -> dict[str, np.ndarray]:
    """Of the gradients by name, like `bounds`."""
    if kernel.rule == "softmax_attention":
        three = softmax_backward_budget(case.q, case.k, case.v, case.dout, causal=kernel.causal, scale=scale_of(kernel, case), key_block=1,
                                        query_block=1)
        return {name: x + more for name, x, more in zip("qkv", three, _rounded_weights(kernel, case)[1:], strict=True)}
    found = _widest(kernel, case)
    if "g" in found:
        found["g"] = found["g"] + _by_differences(case, found)
    return found


def _by_differences(case: Case, found: dict[str, np.ndarray]) -> np.ndarray:
    """What dg may be off by where it is the reverse cumulative sum of q·dq - k·dk (- v·dv with a delta), as most kernels have it: terms that
    cancel in exact numbers leave their errors, and the sum adds as much again. Of a delta's keys, what is read and what is written."""
    G = case.q.shape[1] // case.k.shape[1]
    queries = np.abs(case.q.astype(np.float64)) * found["q"]
    terms = queries.reshape(*case.k.shape[:2], G, *case.q.shape[2:]).sum(2) + 2 * np.abs(case.k.astype(np.float64)) * found["k"]
    assert case.g is not None
    if case.g.ndim == 3:
        terms = terms.sum(-1) + (np.abs(case.v.astype(np.float64)) * found["v"]).sum(-1)
    end = np.abs(case.dstate.astype(np.float64)) * found["end"]
    last = end.sum((-2, -1))[:, :, None] if case.g.ndim == 3 else end.sum(-1)[:, :, None]
    sums: np.ndarray = 2 * (np.cumsum(terms[:, :, ::-1], axis=2)[:, :, ::-1] + last)
    return sums


def _widest(kernel: Kernel, case: Case) -> dict[str, np.ndarray]:
    """Of all forms' budgets, with what `_more` says on top: of out and end, and of each input's gradient."""
    acc, more = accumulator(kernel.dtype), _more(kernel, case)
    widest: dict[str, np.ndarray] = {}
    for chunk in CHUNKS if case.g is not None or case.beta is not None else (None,):
        whole = _budget(kernel, case, kernel.dtype, chunk)
        sums = whole if acc == kernel.dtype else _budget(kernel, case, acc, chunk)                     # without the rounding of what comes out
        floor = _underflow(kernel, case, chunk)
        for name, x in whole.items():
            widest[name] = np.maximum(widest.get(name, 0.0), x + more * sums[name] + floor.get(name, 0.0))
    return widest


def _underflow(kernel: Kernel, case: Case, chunk: int | None) -> dict[str, float]:
    """Where factors are rounded to a half precision, one that underflows is off by half the smallest number of that precision, and what it is
    multiplied by is at most what there is when nothing decays: of each array the largest such product."""
    if not kernel.rounds:
        return {}
    acc = accumulator(kernel.dtype)
    lasting = case._replace(g=None if case.g is None else np.zeros_like(case.g))
    half = HALF_ROUNDINGS * float(rounding(0.0, kernel.dtype))
    return {name: half * (1 + float(x.max(initial=0.0)) / unit_roundoff(acc)) for name, x in _budget(kernel, lasting, acc, chunk).items()}


def _budget(kernel: Kernel, case: Case, dtype: np.dtype, chunk: int | None) -> dict[str, np.ndarray]:
    """One form's, with results in `dtype`."""
    q, k, v, g, beta, *_ = case
    dstate = case.dstate if kernel.states else np.zeros(case.dstate.shape)
    if kernel.rule == "linear_attention":
        none = np.zeros(case.dstate.shape)
        b: Any = attention_budget(q, k, v, none, none[..., 0], case.dout, none, none[..., 0], phi=eq7, dphi=_dphi, causal=kernel.causal,
                                  eps=kernel.eps, dtype=dtype)
    elif kernel.rule == "linear":
        b = recurrence_budget(q, k, v, _state(case), case.dout, dstate, scale=scale_of(kernel, case), dtype=dtype)
    else:
        b = rules_budget(q, k, v, g, beta, _state(case), case.dout, dstate, scale=scale_of(kernel, case), dtype=dtype, chunk=chunk)
    named = {"out": b.out, "end": b.S, "q": b.dq, "k": b.dk, "v": b.dv, "g": getattr(b, "dg", None), "beta": getattr(b, "dbeta", None), "state": b.dS}
    return {name: x for name, x in named.items() if x is not None}


def _state(case: Case) -> np.ndarray:
    return np.zeros(case.dstate.shape) if case.state is None else case.state


def _dphi(x: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(x, 0))


HALF_ROUNDINGS = 8        # on the way of one term, where `rounds`: q·scale, k, v, the score, the state, dout, and two products of a triangle


def _more(kernel: Kernel, case: Case) -> float:
    """What a right kernel may be off by beyond the roundings of its sums, as a part of a budget, which counts n of them.

    Many weigh a pair of positions by differences of cumulated logarithms: exp(G_t - G_j) is off by the roundings of both sums, up to 2 |G| N. A
    kernel may scale its queries before, which is one rounding more. Where it rounds the factors of its products to the half dtype of its
    inputs, as tensor cores want them, each of those roundings weighs u(half) / u(float32) of the others."""
    n = 2 * (case.q.shape[2] + case.k.shape[-1] + case.v.shape[-1] + 4)
    extra = 2.0
    if kernel.rounds:
        extra += HALF_ROUNDINGS * unit_roundoff(kernel.dtype) / unit_roundoff(accumulator(kernel.dtype))
    if case.g is not None:
        finite = np.where(np.isfinite(case.g), case.g, 0).astype(np.float64)
        extra += 4 * float(np.abs(np.cumsum(finite, axis=2)).max(initial=0.0)) * (1 + np.log2(case.q.shape[2] + 1))
    return extra / n


def _rounded_weights(kernel: Kernel, case: Case) -> tuple[Any, ...]:
    """What softmax attention may be off by beyond its budget, out, dq, dk, dv, where weights, dx and v are rounded to the half dtype before they
    are multiplied: two roundings of each term, three in the backward, whose own out is one of a rounded P."""
    if not kernel.rounds:
        return 0.0, 0.0, 0.0, 0.0
    u, tiny = unit_roundoff(kernel.dtype), float(rounding(0.0, kernel.dtype))     # the latter for factors that underflow
    x = _exact(case.q, case.k, case.v, kernel.causal, scale_of(kernel, case), None, None, 1)
    dO: Any = np.abs(case.dout.astype(np.float64)).reshape(x.out.shape)
    Y = dO @ np.abs(x.v).mT + (dO * np.abs(x.out)).sum(-1, keepdims=True)
    P, dx, s = x.P * u + tiny, (x.P * u + tiny) * Y + tiny, abs(x.s)
    return ((2 * P @ np.abs(x.v)).reshape(case.dout.shape), (4 * s * (dx @ np.abs(x.k))).reshape(case.q.shape),
            (4 * s * (dx.mT @ np.abs(x.q)).sum(-3)).reshape(case.k.shape), (3 * (P.mT @ dO).sum(-3)).reshape(case.v.shape))


def _slack(kernel: Kernel, case: Case) -> tuple[Any, Any]:
    """Bounds of out and state, and zeros where the case is exact."""
    return (np.zeros(case.dout.shape), np.zeros(case.dstate.shape)) if case.exact else bounds(kernel, case)


# --- words -----------------------------------------------------------------------------------------------------------------------------

def compare(name: str, x: np.ndarray, expected: np.ndarray, bound: np.ndarray | None, kernel: Kernel, worst: list[float]) -> str | None:
    """Words for the worst element, or None if all are right: equal where there is no bound, else within it."""
    wide, exact = x.astype(np.float64), expected.astype(np.float64)
    if bound is None:
        return same(name, wide, exact.astype(x.dtype).astype(np.float64))        # sums are exact, what comes out is rounded once to half a float
    bound = kernel.factor * np.broadcast_to(bound, exact.shape)
    with np.errstate(all="ignore"):
        error = np.where(wide == exact, 0.0, np.abs(wide - exact))
        ratio = np.where(error == 0, 0.0, np.where(np.isfinite(error), error / bound, np.inf))
    if not ratio.size:
        return None
    if ratio.max() <= 1:
        worst[0] = max(worst[0], float(ratio.max()))
        return None
    at = tuple(int(i) for i in np.unravel_index(np.argmax(ratio), ratio.shape))
    finite = np.isfinite(wide)
    rms = float(np.sqrt(np.mean(np.where(finite, wide - exact, 0) ** 2) / max(float(np.mean(exact**2)), 1e-300)))
    return (f"{name}{list(at)}: got {float(wide[at])!r}, expected {float(exact[at])!r}; the error is {ratio[at]:.3g} times its bound "
            f"{bound[at]:.3g}. "
            f"{int((ratio > 1).sum())} of {ratio.size} elements are off, {int((~finite).sum())} are not finite; largest error "
            f"{float(np.where(finite, error, 0).max()):.3g}, relative RMS {rms:.3g}")


def same(name: str, x: np.ndarray, expected: np.ndarray, bound: Any = 0.0) -> str | None:
    """Words for the first element that differs; by more than twice a bound, where cases are not exact."""
    with np.errstate(invalid="ignore"):
        near = np.abs(x.astype(np.float64) - expected.astype(np.float64)) <= 2 * bound
        wrong = np.argwhere(~((x == expected) | np.isnan(x) & np.isnan(expected) | near))
    if not len(wrong):
        return None
    at = tuple(int(i) for i in wrong[0])
    array = name.split(" ")[0].rstrip(",")
    return f"{array}{list(at)}{name[len(array):]}: got {float(x[at])!r}, expected {float(expected[at])!r}; {len(wrong)} of {x.size} elements differ"
