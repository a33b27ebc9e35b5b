"""Is this kernel the recurrence? Searched for a counterexample, made as small as it gets, and told as code that can be run.

    report = check_kernel(mine, rule="gated", layout="bnhd", scale=0.125, backward=mine_backward)
    print(report)                       # which laws were tried on how many cases; the smallest failing case of each that fails

Two kinds of laws. **Exact** ones draw small integers, decays of 1 and 0 and dyadic β, so that every right implementation gives the same bits in
whatever order it sums: there is no tolerance to argue about. **Rounded** ones draw real numbers, and what a right implementation may be off by is
derived for each element (`budgets`, `rules_budget`, `loop_budget`); the report gives the error as a part of that bound.

The kernel is called with q, k, v, then g and beta where the rule has them, then the initial state (unless `states=False`), in its own layout.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .. import oracle
from .._array import accumulator, check_number, check_positive, missing_extra
from ..layers import check_choice
from ..rules import RULES, recurrence_vjp
from . import strategies
from .budgets import recurrence_budget, rounding, unit_roundoff
from .kernel import LAYOUTS, NAMES, Case, Kernel, Told, call, call_backward, given_arrays, read_result, scale_of
from .loop_budget import loop_budget
from .rules_budget import rules_budget

class Failure(NamedTuple):
    """A law that does not hold, in the smallest case that was found."""

    law: str
    words: str
    case: Any = None
    guess: str = ""


class Report(NamedTuple):
    """`passed`; how many cases each law was tried on, the largest error as a part of its bound, the failures and how long it took."""

    passed: bool
    cases: dict[str, int]
    worst: float
    factor: float
    failures: tuple[Failure, ...]
    seconds: float

    def __str__(self) -> str:
        tried = ", ".join(f"{law} {count}" for law, count in self.cases.items())
        lines = [f"{'passed' if self.passed else 'FAILED'} in {self.seconds:.1f} s; cases: {tried or 'none'}"]
        if self.passed:
            lines.append(f"largest error: {self.worst:.3g} of the bound" + (f", which was multiplied by {self.factor:g}" if self.factor != 1 else ""))
        for failure in self.failures:
            lines.append(f"\n{failure.law}: {failure.words}")
            if failure.guess:
                lines.append(f"it looks as if: {failure.guess}")
            if failure.case is not None:
                lines.append(f"the smallest case that was found:\n\n{case_code(failure.case)}")
        return "\n".join(lines)


Test = Callable[[Kernel, Case, list[float]], "str | None"]
WITHOUT_THE_DEFINITION = ("untouched inputs", "same bits twice", "gradients, exact")    # what may still be told where outputs are wrong


class _Found(Exception):
    pass


# --- the search --------------------------------------------------------------------------------------------------------------------------

def check_kernel(fn: Callable[..., Any], *, rule: str = "linear", backward: Callable[..., Any] | None = None, layout: str = "bhnd",
                 state_layout: str = "bhdm", scale: float | str = 1.0, decay: str = "head", decay_space: str = "log", states: bool = True,
                 grouped: bool = False, resets: bool = True, dtype: Any = "float32", to: Callable[[np.ndarray], Any] = np.asarray,
                 examples: int = 100, seed: int = 0, time_limit: float = 60.0, factor: float = 1.0) -> Report:
    """Look for a case in which `fn` is not the recurrence.

    Parameters
    ----------
    fn
        `fn(q, k, v, [g,] [beta,] [state])` gives out, or (out, final state): arrays in its own layout, of any library that NumPy can read
        by `np.asarray` (or whose arrays have `detach` and `cpu`, as PyTorch's). What it raises, returns and writes to is part of what is judged.
    rule
        "linear", "gated", "delta" or "gated_delta", as of `refattn.recurrence`.
    backward
        `backward(dout, dstate, q, k, v, [g,] [beta,] [state])` gives the gradients of those inputs in this order, in their layouts; dstate
        is missing where `states=False`. None: gradients are not judged.
    layout
        The axes of q: "bhnd", "bnhd", or "bn(hd)" where heads lie in one axis with features. g and beta have the same without d.
    state_layout
        "bhdm", or "bhmd" for the transposed state.
    scale
        The number by which the kernel multiplies its outputs (or its queries), or "1/sqrt(d)".
    decay
        "head" or "channel": one for each head, or for each of its key features too.
    decay_space
        "log" for g, "linear" for exp(g).
    states
        False: the kernel takes no initial state. (It may still return a final one.)
    grouped
        True: several query heads may share a key/value head.
    resets
        False: no decays of exactly 0 (g = -inf).
    dtype
        Of the arrays: "float16", "bfloat16", "float32" or "float64". Sums are expected in float32 for the half precisions.
    to
        Makes the kernel's arrays from NumPy's, `torch.from_numpy` for example. It gets copies.
    examples
        How many cases each law is tried on, at most.
    seed, time_limit
        Of the search; seconds, after which no new law is begun.
    factor
        What bounds are multiplied by; the report says so.

    Returns
    -------
    report : Report

    Raises
    ------
    ValueError, TypeError
        For options that are not understood. Never for what the kernel does: that is in the report.
    ImportError
        If Hypothesis is not installed, with the command that installs it.

    Notes
    -----
    Laws, exact ones first: the outputs have the right shapes and dtypes and are those of the definition; inputs are left as they were; two calls
    give the same bits; later positions do not reach earlier ones; sequences and heads do not reach one another; a sequence read in two parts
    is the sequence; memory layout does not matter; gradients; then outputs and gradients of real numbers within their bounds, decays strong
    and mild.

    Examples
    --------
    >>> import refattn
    >>> check_kernel(lambda q, k, v, state: refattn.recurrence(q, k, v, state=state), examples=5).passed
    True
    >>> report = check_kernel(lambda q, k, v, state: refattn.recurrence(k, q, v, state=state), examples=20)
    >>> report.passed, report.failures[0].law
    (False, 'definition, exact')
    """
    check_choice("rule", rule, tuple(RULES))
    check_choice("layout", layout, tuple(LAYOUTS))
    check_choice("state_layout", state_layout, ("bhdm", "bhmd"))
    check_choice("decay", decay, ("head", "channel"))
    check_choice("decay_space", decay_space, ("log", "linear"))
    if isinstance(scale, str):
        check_choice("scale", scale, ("1/sqrt(d)",))
    else:
        scale = check_number("scale", scale)
    check_choice("dtype", str(dtype), ("float16", "bfloat16", "float32", "float64"))
    if not callable(fn) or not (backward is None or callable(backward)):
        raise TypeError("fn: expected a function of arrays, and for backward one too, or None")
    kernel = Kernel(fn, backward, rule, layout, state_layout, scale, decay, decay_space, states, grouped, resets,
                    _dtype(str(dtype)), to, check_number("factor", factor, least=0))
    start, worst = time.monotonic(), [0.0]
    failures: list[Failure] = []
    counts: dict[str, int] = {}
    limit = start + check_number("time_limit", time_limit, least=0)
    for law, exact, test in _laws(kernel):
        if time.monotonic() > limit or any(f.law.startswith("definition") for f in failures) and law not in WITHOUT_THE_DEFINITION:
            continue
        failure, counts[law] = _search(kernel, law, exact, test, worst, check_positive("examples", examples), seed, limit)
        if failure is not None:
            failures.append(failure)
    return Report(not failures, counts, worst[0], kernel.factor, tuple(failures), time.monotonic() - start)


def _search(kernel: Kernel, law: str, exact: bool, test: Test, worst: list[float], examples: int, seed: int,
            limit: float) -> tuple[Failure | None, int]:
    """The smallest failure that was found, and how many cases were tried."""
    import hypothesis                                                            # that it is installed `strategies` has seen to
    given: Any = hypothesis.given

    found: list[Failure] = []
    count = [0]

    def run(case: Case) -> None:
        if time.monotonic() > limit:
            return
        count[0] += 1
        failure = _tried(kernel, law, test, case, worst)
        if failure is not None:
            found.append(failure)
            raise _Found

    search: Any = hypothesis.seed(seed)(hypothesis.settings(
        max_examples=examples, deadline=None, database=None, report_multiple_bugs=False, suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink], verbosity=hypothesis.Verbosity.quiet)(
            given(_cases(kernel, exact))(run)))
    try:
        search()
    except (_Found, hypothesis.errors.Flaky):                                    # flaky: the limit came while a case was made smaller
        pass
    if not found:
        return None, count[0]
    least = min(found, key=lambda failure: sum(x.size for x in failure.case[:6] if x is not None))
    guess = _guess(kernel, least, test)                                          # of heads and sequences, before they are taken away
    return _least(kernel, least, test)._replace(guess=guess), count[0]


def _least(kernel: Kernel, failure: Failure, test: Test) -> Failure:
    """A part of the case that still fails and of which no part does, as far as a few seconds reach."""
    limit, again = time.monotonic() + 5, True
    while again and time.monotonic() < limit:
        again = False
        for part in _parts(failure.case):
            smaller = _tried(kernel, failure.law, test, part, [0.0])
            if smaller is not None:
                failure, again = smaller, True
                break
    return failure


def _parts(case: Case) -> Iterator[Case]:
    """One sequence, one key head with its queries, half the positions or one less, one feature, no state."""
    (B, H, N, D), M, G = case.k.shape, case.v.shape[-1], case.q.shape[1] // case.k.shape[1]
    for i in {0, B - 1} if B > 1 else ():
        yield case.each(lambda name, x, i=i: x[i: i + 1])                                                               # type: ignore[misc]
    for i in {0, H - 1} if H > 1 else ():
        yield case.each(lambda name, x, i=i: x[:, i * G: (i + 1) * G] if name in ("q", "dout") else x[:, i: i + 1])     # type: ignore[misc]
    for n in {N // 2, N - 1} if N > 1 else ():
        for rows in (slice(n), slice(N - n, None)):
            yield case.each(lambda name, x, rows=rows: x if name in ("state", "dstate") else x[:, :, rows])             # type: ignore[misc]
    if M > 1:
        yield case.each(lambda name, x: x[..., :1] if name in ("v", "dout", "state", "dstate") else x)
    if D > 1:
        yield case.each(lambda name, x: x[..., :1] if name in ("q", "k") or name == "g" and x.ndim == 4 else
                        x[:, :, :1] if name in ("state", "dstate") else x)
    if case.state is not None and case.state.any():
        yield case._replace(state=np.zeros_like(case.state))


def _tried(kernel: Kernel, law: str, test: Test, case: Case, worst: list[float]) -> Failure | None:
    try:
        words = test(kernel, case, worst)
    except Told as told:
        words = str(told)
    return None if words is None else Failure(law, words, case)


def _cases(kernel: Kernel, exact: bool) -> Any:
    """Of `strategies`, as Case: leading axes become one, and there is at least one position."""
    from hypothesis import strategies as st

    @st.composite
    def draw_case(draw: Any) -> Case:
        if kernel.rule == "linear":
            c = draw(strategies.cases(dtype=kernel.dtype, exact=exact, longest=70).filter(lambda c: c.dims.N > 0))
            g = beta = None
        else:
            mixtures = tuple(name for name, weights in strategies.MIXTURES.items() if kernel.resets or not weights[-1])
            c = draw(strategies.rule_cases(kernel.rule, dtype=kernel.dtype, exact=exact, channels=kernel.decay == "channel", mixtures=mixtures,
                                           longest=70 if kernel.rule == "gated" else 20).filter(lambda c: c.dims.N > 0))
            g, beta = c.g, c.beta
        d = c.dims
        B, H, G, N = math.prod(d.lead), d.H, d.G if kernel.grouped else 1, d.N
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

        def fit(x: Any, *shape: int) -> Any:
            if x is None:
                return None
            x = x.reshape(B, *x.shape[len(d.lead):])
            x = x[:, :: x.shape[1] // shape[0]]                                  # one of a group's query heads, if they are not to be grouped
            assert x.shape == (B, *shape)
            return x

        if exact and g is not None and not kernel.resets:
            g = np.zeros_like(g)
        dyadic = math.frexp(scale_of(kernel, d.D))[0] in (0.5, -0.5, 0.0)                 # else it rounds, in one place or in another
        with_state = kernel.states and bool(rng.integers(4))
        return Case(fit(c.q, H * G, N, d.D), fit(c.k, H, N, d.D), fit(c.v, H, N, d.M), fit(g, H, N, *([d.D] if kernel.decay == "channel" else [])),
                    fit(beta, H, N), fit(c.state, H, d.D, d.M) if with_state else None, fit(c.dout, H * G, N, d.M),
                    fit(c.dstate, H, d.D, d.M), exact and dyadic)

    return draw_case()


# --- laws --------------------------------------------------------------------------------------------------------------------------------

def _laws(kernel: Kernel) -> Iterator[tuple[str, bool, Test]]:
    """(name, exact, test): a test gives words for what is wrong, or None."""
    yield "definition, exact", True, _law_definition
    yield "untouched inputs", True, _law_untouched
    yield "same bits twice", True, _law_twice
    yield "no future in the past", True, _law_causal
    yield "sequences and heads apart", True, _law_apart
    if kernel.states:
        yield "in two parts", True, _law_parts
    yield "any strides", True, _law_strides
    if kernel.backward is not None:
        yield "gradients, exact", True, _law_gradients
        yield "expanded cotangent", True, _law_expanded
    yield "definition, rounded", False, _law_definition
    if kernel.backward is not None:
        yield "gradients, rounded", False, _law_gradients


def _law_definition(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    out, state = call(kernel, case)
    expected = oracle.full_recurrence(*case.inputs, scale=scale_of(kernel, case.q.shape[-1]))
    bounds = (None, None) if case.exact else _bounds(kernel, case)
    return (_compare("out", out, expected[0], bounds[0], kernel, worst) or
            (None if state is None else _compare("state", state, expected[1], bounds[1], kernel, worst)))


def _law_untouched(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    arrays = [np.ascontiguousarray(x) for x in given_arrays(kernel, case)]
    theirs = [kernel.to(x.copy()) for x in arrays]
    try:
        kernel.fn(*theirs)
    except Exception as error:
        raise Told(f"the call raised {type(error).__name__}: {error}") from None
    names = [name for name, x in zip(NAMES, case.inputs, strict=True) if x is not None or name == "state" and kernel.states]
    for name, x, y in zip(names, arrays, theirs, strict=True):
        if not np.array_equal(read_result(name, y, x.shape, None), x, equal_nan=True):
            return f"{name}: the call wrote to it"
    return None


def _law_twice(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    first, again = call(kernel, case), call(kernel, case)
    return _same("out, called again", again[0], first[0]) or (None if first[1] is None or again[1] is None else
                                                               _same("state, called again", again[1], first[1]))


def _law_causal(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    at = case.q.shape[2] // 2
    sign: Callable[[str], int] = lambda name: 1 if name in ("g", "beta") else -1
    later = case.each(lambda name, x: x if name in ("state", "dstate") else np.concatenate(
        [x[:, :, :at], x[:, :, at:][:, :, ::-1] * x.dtype.type(sign(name))], axis=2))
    return _same(f"out before position {at}, with other positions from there on", call(kernel, later)[0][:, :, :at],
                 call(kernel, case)[0][:, :, :at], _slack(kernel, case)[0][:, :, :at])


def _law_apart(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    (out, _), (slack, _) = call(kernel, case), _slack(kernel, case)
    B, H, G = case.q.shape[0], case.k.shape[1], case.q.shape[1] // case.k.shape[1]
    for b, h in {(0, 0), (B - 1, H - 1)}:
        queries = slice(h * G, (h + 1) * G)
        alone = case.each(lambda name, x, b=b, h=h, queries=queries: x[b: b + 1, queries if name in ("q", "dout") else slice(h, h + 1)])  # type: ignore[misc]
        words = _same(f"out of sequence {b} and head {h} alone", call(kernel, alone)[0], out[b: b + 1, queries],
                      slack[b: b + 1, queries])
        if words:
            return words
    return None


def _law_parts(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    N = case.q.shape[2]
    out, state = call(kernel, case)
    if state is None or N < 2:
        return None
    slack, slack_state = _slack(kernel, case)
    at = 1 + N // 3

    def cut(rows: slice, start: np.ndarray | None) -> Case:
        return case.each(lambda name, x: x if name in ("state", "dstate") else x[:, :, rows])._replace(state=start)

    first, middle = call(kernel, cut(slice(at), case.state))
    assert middle is not None
    second, end = call(kernel, cut(slice(at, None), middle))
    return (_same(f"out of positions up to {at}, read first", first, out[:, :, :at], slack[:, :, :at]) or
            _same(f"out from position {at} on, read from the state before it", second, out[:, :, at:], slack[:, :, at:]) or
            (None if end is None else _same("state, read in two parts", end, state, slack_state)))


def _law_strides(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    rng, contiguous = np.random.default_rng(case.q.size), call(kernel, case)[0]
    awkward = [strategies.strided(np.ascontiguousarray(x), rng) for x in given_arrays(kernel, case)]
    for x in awkward:                                                            # PyTorch and others refuse what cannot be written to, and
        if any(step < 0 for step in x.strides):                                  # negative steps
            return None
        x.flags.writeable = True
    return _same("out, for inputs that are not contiguous", call(kernel, case, awkward)[0], contiguous, _slack(kernel, case)[0])


def _law_gradients(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    found = call_backward(kernel, case)
    state = case.state
    if state is None and kernel.states:
        state = np.zeros((*case.k.shape[:2], case.k.shape[-1], case.v.shape[-1]))
    wide: list[Any] = [None if x is None else x.astype(np.float64) for x in (*case.inputs[:5], state)]
    dstate = case.dstate.astype(np.float64) if kernel.states else None
    _, pullback = recurrence_vjp(*wide, rule=kernel.rule, scale=scale_of(kernel, case.q.shape[-1]))
    expected = dict(zip(NAMES, pullback(case.dout.astype(np.float64), dstate), strict=True))
    bounds: dict[str, Any] = {} if case.exact else _gradient_bounds(kernel, case._replace(state=state))
    for name, d in found.items():
        exact = expected[name]
        bound = bounds.get(name)
        if name == "g" and kernel.decay_space == "linear":                       # dL/da = dL/dg / a
            a = np.exp(case.g.astype(np.float64))                                # type: ignore[union-attr]
            if (a == 0).any():
                continue
            exact, bound = exact / a, None if bound is None else bound / a + 4 * unit_roundoff(accumulator(kernel.dtype)) * np.abs(exact / a)
        words = _compare(f"d{name}", d, exact, bound, kernel, worst)
        if words:
            return words
    return None


def _law_expanded(kernel: Kernel, case: Case, worst: list[float]) -> str | None:
    """`out.sum().backward()` and its like give a cotangent whose strides are 0."""
    whole = np.ascontiguousarray(LAYOUTS[kernel.layout][0](case.dout))
    expanded = np.lib.stride_tricks.as_strided(whole, whole.shape, (*whole.strides[:-1], 0))      # PyTorch refuses what may not be written to
    expected, found = (call_backward(kernel, case, dout) for dout in (np.ascontiguousarray(expanded), expanded))
    for name, d in found.items():
        words = _same(f"d{name}, for a cotangent with a stride of 0", d, expected[name], 0.0 if case.exact else np.inf)
        if words:
            return words
    return None


# --- how far off it may be -----------------------------------------------------------------------------------------------------------------

def _slack(kernel: Kernel, case: Case) -> tuple[Any, Any]:
    """Bounds of out and state, and zeros where the case is exact."""
    return (np.zeros(case.dout.shape), np.zeros(case.dstate.shape)) if case.exact else _bounds(kernel, case)


def _bounds(kernel: Kernel, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Of out and state: the widest of the forms there are, chunks of any size, scans and loops."""
    q, k, v, g, beta, *_ = case
    state = np.zeros((*case.k.shape[:2], case.k.shape[-1], case.v.shape[-1])) if case.state is None else case.state
    if kernel.rule == "linear":
        b = recurrence_budget(case.q, case.k, case.v, state, case.dout, case.dstate, scale=scale_of(kernel, case.q.shape[-1]), dtype=kernel.dtype)
        return b.out + _more(kernel, case, b.out), b.S + _more(kernel, case, b.S)
    acc = accumulator(kernel.dtype)
    out, end = loop_budget(q, k, v, g, beta, state, scale=scale_of(kernel, case.q.shape[-1]), dtype=acc.name)
    exact_out, exact_end = oracle.full_recurrence(q, k, v, g, beta, state, scale=scale_of(kernel, case.q.shape[-1]))
    out, end = out + rounding(exact_out, kernel.dtype), end + rounding(exact_end, acc)
    for chunk in (1, 16, 64, None):
        b2 = rules_budget(q, k, v, g, beta, state, case.dout, case.dstate, scale=scale_of(kernel, case.q.shape[-1]), dtype=kernel.dtype, chunk=chunk)
        out, end = np.maximum(out, b2.out + _more(kernel, case, b2.out)), np.maximum(end, b2.S + _more(kernel, case, b2.S))
    return out, end


def _gradient_bounds(kernel: Kernel, case: Case) -> dict[str, np.ndarray]:
    dstate = case.dstate if kernel.states else np.zeros_like(case.dstate)
    state = np.zeros(case.dstate.shape) if case.state is None else case.state
    if kernel.rule == "linear":
        b = recurrence_budget(case.q, case.k, case.v, state, case.dout, dstate, scale=scale_of(kernel, case.q.shape[-1]), dtype=kernel.dtype)
        return {name: x + _more(kernel, case, x) for name, x in (("q", b.dq), ("k", b.dk), ("v", b.dv), ("state", b.dS))}
    bounds: dict[str, np.ndarray] = {}
    for chunk in (1, 16, 64, None):
        b2 = rules_budget(case.q, case.k, case.v, case.g, case.beta, state, case.dout, dstate, scale=scale_of(kernel, case.q.shape[-1]),
                          dtype=kernel.dtype, chunk=chunk)
        for name, x in (("q", b2.dq), ("k", b2.dk), ("v", b2.dv), ("g", b2.dg), ("beta", b2.dbeta), ("state", b2.dS)):
            if x is not None:
                bounds[name] = np.maximum(bounds.get(name, 0.0), x + _more(kernel, case, x))
    return bounds


def _more(kernel: Kernel, case: Case, bound: np.ndarray) -> np.ndarray:
    """What differences of cumulated logarithms add, by which many kernels weigh a pair of positions: exp(G_t - G_j) is off by the roundings of
    both sums, up to 2 |G| N of them beside the n that `bound` counts; and a kernel may scale its queries before, which is one rounding more."""
    n = 2 * (case.q.shape[2] + case.k.shape[-1] + case.v.shape[-1] + 4)
    extra = 2.0
    if case.g is not None:
        finite = np.where(np.isfinite(case.g), case.g, 0).astype(np.float64)
        extra += 4 * float(np.abs(np.cumsum(finite, axis=2)).max(initial=0.0)) * (1 + np.log2(case.q.shape[2] + 1))
    return bound * (extra / n)


def _compare(name: str, x: np.ndarray, expected: np.ndarray, bound: np.ndarray | None, kernel: Kernel, worst: list[float]) -> str | None:
    """Words for the worst element, or None if all are right: equal where there is no bound, else within it."""
    wide, exact = x.astype(np.float64), expected.astype(np.float64)
    if bound is None:
        return _same(name, wide, exact.astype(x.dtype).astype(np.float64))       # sums are exact, what comes out is rounded once to half a float
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


def _same(name: str, x: np.ndarray, expected: np.ndarray, twice: Any = 0.0) -> str | None:
    """Words for the first element that differs; by more than twice a bound, where a scale that rounds keeps exact cases from being exact."""
    with np.errstate(invalid="ignore"):
        near = np.abs(x.astype(np.float64) - expected.astype(np.float64)) <= 2 * twice
        wrong = np.argwhere(~((x == expected) | np.isnan(x) & np.isnan(expected) | near))
    if not len(wrong):
        return None
    at = tuple(int(i) for i in wrong[0])
    return f"{name}{list(at)}: got {float(x[at])!r}, expected {float(expected[at])!r}; {len(wrong)} of {x.size} elements differ"


# --- what is told ------------------------------------------------------------------------------------------------------------------------

def _guess(kernel: Kernel, failure: Failure, test: Test) -> str:
    """From where it goes wrong in the smallest case, and from whether it still does in simpler ones."""
    case: Case = failure.case

    def fails(simpler: Case) -> bool:
        return _tried(kernel, failure.law, test, simpler, [0.0]) is not None

    clues = []
    if case.state is not None and case.state.any() and not fails(case._replace(state=np.zeros_like(case.state))):
        clues.append("only with an initial state")
    if case.k.shape[1] > 1:
        if not fails(case.each(lambda name, x: x[:, : x.shape[1] // case.k.shape[1]])):
            clues.append("only with more than one head")
    if case.q.shape[1] > case.k.shape[1]:
        single = case._replace(q=case.q[:, :: case.q.shape[1] // case.k.shape[1]], dout=case.dout[:, :: case.q.shape[1] // case.k.shape[1]])
        if not fails(single):
            clues.append("only with grouped queries")
    if case.q.shape[0] > 1 and not fails(case.each(lambda name, x: x[:1])):
        clues.append("only with more than one sequence")
    if case.g is not None and np.isneginf(case.g).any() and not fails(case._replace(g=np.where(np.isneginf(case.g), 0, case.g).astype(case.g.dtype))):
        clues.append("only with g = -inf")
    elif case.g is not None and not fails(case._replace(g=np.zeros_like(case.g))):
        clues.append("only with decay")
    if failure.law.startswith("definition"):
        try:
            out = call(kernel, case)[0].astype(np.float64)
        except Told:
            return ", ".join(clues)
        expected = oracle.full_recurrence(*case.inputs, scale=scale_of(kernel, case.q.shape[-1]))[0]
        bound = 0 if case.exact else _bounds(kernel, case)[0] * kernel.factor
        with np.errstate(all="ignore"):
            rows = np.flatnonzero((~(np.abs(out - expected) <= bound)).any((0, 1, 3)))
        N = case.q.shape[2]
        if len(rows) and N > 1:
            if rows[0] == N - 1:
                clues.append("only the last position")
            elif rows[0] == 0 and len(rows) == 1:
                clues.append("only the first position")
            elif rows[0] > 0:
                clues.append(f"only from position {rows[0]} on")
        if scale_of(kernel, case.q.shape[-1]) == 1 and case.exact and out.any():
            ratio = out[expected != 0] / expected[expected != 0]
            if len(ratio) and np.allclose(ratio, ratio[0]) and abs(ratio[0] - 1) > 1e-6 and np.isfinite(ratio[0]):
                clues.append(f"all outputs are {ratio[0]:.6g} times what they should be: another scale")
    return ", ".join(clues)


def case_code(case: Case) -> str:
    """A case as Python: arrays in the layout (B, H, N, …), and the right answer.

    >>> one = np.ones((1, 1, 1, 1), np.float32)
    >>> print(case_code(Case(one, one, one, None, None, None, one, one, True)))
    import numpy as np, refattn.oracle
    q = np.array([[[[1.0]]]], 'float32')
    k = np.array([[[[1.0]]]], 'float32')
    v = np.array([[[[1.0]]]], 'float32')
    out, end = refattn.oracle.full_recurrence(q, k, v)
    """
    lines, names = ["import numpy as np, refattn.oracle"], []
    for name, x in zip((*NAMES, "dout", "dstate"), case[:8], strict=True):
        if x is None or name in ("dout", "dstate") and not np.any(x != 1):
            continue
        numbers = repr(x.astype(np.float64).tolist()).replace("inf", "np.inf")
        lines.append(f"{name} = np.array({numbers}, {x.dtype.name!r})")
        names.append(f"{name}={name}" if name in ("g", "beta", "state") else name)
    return "\n".join([*lines, f"out, end = refattn.oracle.full_recurrence({', '.join(n for n in names if n not in ('dout', 'dstate'))})"])


def _dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise missing_extra("ml_dtypes", "bf16") from None
    return np.dtype(ml_dtypes.bfloat16)
