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

from .._array import check_number, check_positive
from ..layers import check_choice
from ..rules import RULES
from . import strategies
from .frameworks import MAKE, VJP, bfloat16
from .kernel import ATTENTIONS, LAYOUTS, NAMES, STATE_LAYOUTS, Case, Kernel, Told, call, definition, scale_of
from .kernel_laws import WITHOUT_THE_DEFINITION, Law, bounds, laws


class Failure(NamedTuple):
    """A law that does not hold, in the smallest case that was found."""

    law: str
    words: str
    case: Any = None
    guess: str = ""
    code: str = ""


class Report(NamedTuple):
    """`passed`; how many cases each law was tried on and which ones the time did not suffice for; the largest error as a part of its bound, the
    failures and how long it took."""

    passed: bool
    cases: dict[str, int]
    untried: tuple[str, ...]
    worst: float
    factor: float
    failures: tuple[Failure, ...]
    seconds: float

    def __str__(self) -> str:
        tried = ", ".join(f"{law} {count}" for law, count in self.cases.items())
        lines = [f"{'passed' if self.passed else 'FAILED'} in {self.seconds:.1f} s; cases: {tried or 'none'}"]
        if self.untried:
            lines.append(f"the time limit came before: {', '.join(self.untried)}")
        if self.passed:
            lines.append(f"largest error: {self.worst:.3g} of the bound" + (f", which was multiplied by {self.factor:g}" if self.factor != 1 else ""))
        for failure in self.failures:
            lines.append(f"\n{failure.law}: {failure.words}")
            if failure.guess:
                lines.append(f"it looks as if: {failure.guess}")
            if failure.code:
                lines.append(f"the smallest case that was found:\n\n{failure.code}")
        return "\n".join(lines)



class _Found(Exception):
    pass


# --- the search --------------------------------------------------------------------------------------------------------------------------

def check_kernel(fn: Callable[..., Any], *, rule: str = "linear", backward: Callable[..., Any] | str | None = None, layout: str = "bhnd",
                 state_layout: str = "bhdm", scale: float | str = 1.0, decay: str = "head", decay_space: str = "log", causal: bool = True,
                 eps: float = 1e-6, states: bool | None = None, grouped: bool = False, resets: bool = True, into: bool = False,
                 contiguous: bool = False, multiple_of: int = 1, widths: tuple[tuple[int, int], ...] | None = None,
                 dtype: Any = "float32", factors: str = "accumulator", to: Callable[[np.ndarray], Any] | str = "numpy", examples: int = 100,
                 seed: int = 0, time_limit: float = 60.0, factor: float = 1.0) -> Report:
    """Look for a case in which `fn` is not the recurrence, or not the attention, that it is said to be.

    Parameters
    ----------
    fn
        `fn(q, k, v, [g,] [beta,] [state])` gives out, or (out, final state): arrays in its own layout, of any library that NumPy can read.
        What it raises, returns and writes to is part of what is judged.
    rule
        "linear", "gated", "delta" or "gated_delta", as of `refattn.recurrence`; "linear_attention" (φ = elu + 1 and the normaliser) or
        "softmax_attention", as of `refattn`'s functions of these names, called with q, k and v.
    backward
        `backward(dout, [dstate,] q, k, v, [g,] [beta,] [state])` gives the gradients of those inputs in this order, in their layouts; dstate
        is missing where there are no states. "autodiff": the gradients that the library of `to` finds. None: gradients are not judged.
    layout
        The axes of q: "bhnd", "bnhd", or "bn(hd)" where heads lie in one axis with features. g and beta have the same without d.
    state_layout
        "bhdm", or "bhmd" for the transposed state.
    scale
        The number by which the kernel multiplies its outputs (or its scores), or "1/sqrt(d)". Of all but "linear_attention".
    decay
        "head" or "channel": one for each head, or for each of its key features too.
    decay_space
        "log" for g, "linear" for exp(g).
    causal
        Of the two attentions. False: there may be more keys than queries, or fewer.
    eps
        What "linear_attention" adds to its denominator.
    states
        False: the kernel takes no initial state (it may still return a final one). By default True for the rules of the recurrence; the
        attentions have none.
    grouped
        True: several query heads may share a key/value head.
    resets
        False: no decays of exactly 0 (g = -inf).
    into
        True: results are written into given memory. `fn` is called with the output, and the final state if there are states, behind its
        inputs, `backward` with the gradients behind its own; what they return is not read. The memory is poisoned before.
    contiguous
        True: the kernel takes contiguous arrays alone, and says so to those who give it others.
    multiple_of, widths
        The numbers of positions and the pairs (D, M) that the kernel takes: by default any number, and small odd widths.
    dtype
        Of the arrays: "float16", "bfloat16", "float32" or "float64". Sums are expected in float32 for the half precisions.
    factors
        What queries, scores, weights and states are kept in where they enter a product: "accumulator", or "dtype" where they are rounded to
        a half precision, as tensor cores want them; bounds are wider then and no case is exact.
    to
        The library of the kernel's arrays, "numpy", "cupy", "jax", "mlx", "tensorflow" or "torch", or what makes such an array from NumPy's.
        They are copies.
    examples
        How many cases each law is tried on, at most.
    seed, time_limit
        Of the search; seconds, after which nothing new is tried. The report names the laws that it came before.
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
        If Hypothesis or the library of `to` is not installed.

    Notes
    -----
    Laws, those of small integers first: see `refattn.testing.kernel_laws`, where each is a function. Of the right kernel all hold, whatever
    the order in which it sums.

    Examples
    --------
    >>> import refattn
    >>> check_kernel(lambda q, k, v, state: refattn.recurrence(q, k, v, state=state), examples=5).passed
    True
    >>> report = check_kernel(lambda q, k, v, state: refattn.recurrence(k, q, v, state=state), examples=20)
    >>> report.passed, report.failures[0].law
    (False, 'definition, integers')
    """
    check_choice("rule", rule, (*RULES, *ATTENTIONS))
    check_choice("layout", layout, tuple(LAYOUTS))
    check_choice("state_layout", state_layout, tuple(STATE_LAYOUTS))
    check_choice("decay", decay, ("head", "channel"))
    check_choice("decay_space", decay_space, ("log", "linear"))
    check_choice("factors", factors, ("accumulator", "dtype"))
    if isinstance(scale, str):
        check_choice("scale", scale, ("1/sqrt(d)",))
    else:
        scale = check_number("scale", scale)
    check_choice("dtype", str(dtype), ("float16", "bfloat16", "float32", "float64"))
    attention = rule in ATTENTIONS
    if attention and states:
        raise ValueError(f"states: expected False or None with rule {rule!r}, whose state is not judged, got True")
    if not attention and not causal:
        raise ValueError(f"causal: expected True with rule {rule!r}, got False")
    vjp = None
    if isinstance(to, str):
        check_choice("to", to, tuple(MAKE))
    if isinstance(backward, str):
        check_choice("backward", backward, ("autodiff",))
        if into or not isinstance(to, str) or to not in VJP:
            raise ValueError(f"backward: 'autodiff' goes with to={' or '.join(map(repr, VJP))} and without into, got to={to!r} and into={into!r}")
        backward, vjp = None, VJP[to]
    if not callable(fn) or not (backward is None or callable(backward)):
        raise TypeError("fn: expected a function of arrays, and for backward one too, 'autodiff' or None")
    kind = bfloat16() if str(dtype) == "bfloat16" else np.dtype(str(dtype))
    kernel = Kernel(fn, backward, vjp, rule, layout, state_layout, scale, decay, decay_space, bool(causal), check_number("eps", eps, least=0),
                    not attention if states is None else bool(states), grouped, resets, into, contiguous, check_positive("multiple_of", multiple_of),
                    None if widths is None else tuple((check_positive("widths", D), check_positive("widths", M)) for D, M in widths), kind,
                    factors == "dtype" and kind.itemsize == 2, MAKE[to] if isinstance(to, str) else to, check_number("factor", factor, least=0))
    kernel.to(np.zeros(1, kind))                                                 # a library that is not there is told now, not in a report
    start, worst = time.monotonic(), [0.0]
    failures: list[Failure] = []
    counts: dict[str, int] = {}
    untried: list[str] = []
    limit = start + check_number("time_limit", time_limit, least=0)
    for law, integers, test in laws(kernel):
        if time.monotonic() > limit:
            untried.append(law)
            continue
        if any(f.law.startswith("definition") for f in failures) and law not in WITHOUT_THE_DEFINITION:
            continue
        failure, counts[law] = _search(kernel, law, integers, test, worst, check_positive("examples", examples), seed, limit)
        if failure is not None:
            failures.append(failure)
            if failure.words.startswith("the call raised"):                      # so it will under every law
                break
    return Report(not failures, counts, tuple(untried), worst[0], kernel.factor, tuple(failures), time.monotonic() - start)


def _search(kernel: Kernel, law: str, integers: bool, test: Law, worst: list[float], examples: int, seed: int,
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
            given(_cases(kernel, integers))(run)))
    try:
        search()
    except (_Found, hypothesis.errors.Flaky):                                    # flaky: the limit came while a case was made smaller
        pass
    if not found:
        return None, count[0]
    least = min(found, key=lambda failure: sum(x.size for x in failure.case[:6] if x is not None))
    guess = _guess(kernel, least, test)                                          # of heads and sequences, before they are taken away
    least = _least(kernel, least, test)
    return least._replace(guess=guess, code=case_code(kernel, least.case, least.law.startswith(("gradients", "expanded")))), count[0]


def _least(kernel: Kernel, failure: Failure, test: Law) -> Failure:
    """A part of the case that still fails and of which no part does, as far as a few seconds reach."""
    limit, again = time.monotonic() + 5, True
    while again and time.monotonic() < limit:
        again = False
        for part in _parts(kernel, failure.case):
            smaller = _tried(kernel, failure.law, test, part, [0.0])
            if smaller is not None:
                failure, again = smaller, True
                break
    return failure


def _parts(kernel: Kernel, case: Case) -> Iterator[Case]:
    """One sequence, one key head with its queries, half the positions or fewer by the least number, one feature, no state."""
    (B, H, _, D), M, G = case.k.shape, case.v.shape[-1], case.q.shape[1] // case.k.shape[1]
    for i in {0, B - 1} if B > 1 else ():
        yield case.each(lambda name, x, i=i: x[i: i + 1])                                                               # type: ignore[misc]
    for i in {0, H - 1} if H > 1 else ():
        yield case.each(lambda name, x, i=i: x[:, i * G: (i + 1) * G] if name in ("q", "dout") else x[:, i: i + 1])     # type: ignore[misc]
    at_once = (("q", "k", "v", "g", "beta", "dout"),) if kernel.causal else (("q", "dout"), ("k", "v"))
    for names in at_once:
        N, least = case._asdict()[names[0]].shape[2], kernel.multiple_of
        for n in {N // least // 2 * least, N - least} - {0} if N > least else ():
            for rows in (slice(n), slice(N - n, None)):
                yield case.each(lambda name, x, names=names, rows=rows: x[:, :, rows] if name in names else x)          # type: ignore[misc]
    if M > 1 and kernel.widths is None:
        yield case.each(lambda name, x: x[..., :1] if name in ("v", "dout", "state", "dstate") else x)
    if D > 1 and kernel.widths is None:
        yield case.each(lambda name, x: x[..., :1] if name in ("q", "k") or name == "g" and x.ndim == 4 else
                        x[:, :, :1] if name in ("state", "dstate") else x)
    if case.state is not None and case.state.any():
        yield case._replace(state=np.zeros_like(case.state))


def _tried(kernel: Kernel, law: str, test: Law, case: Case, worst: list[float]) -> Failure | None:
    try:
        words = test(kernel, case, worst)
    except Told as told:
        words = str(told)
    return None if words is None else Failure(law, words, case)


def _cases(kernel: Kernel, integers: bool) -> Any:
    """Of `strategies`, as Case: leading axes become one, and there is at least one position."""
    from hypothesis import strategies as st

    attention = kernel.rule in ATTENTIONS
    longest = 20 if "delta" in kernel.rule else 70
    squares = ((4, 7), (1, 6), (4, 1), (16, 5)) if integers and isinstance(kernel.scale, str) else None             # whose 1/√D is exact
    sizes = strategies.dims(cross=not kernel.causal, edges=(1, 3, 4, 5, 7, 8, 9) if longest == 20 else (1, 31, 32, 33), longest=longest, shortest=1,
                            multiple_of=kernel.multiple_of, widths=kernel.widths or squares)

    @st.composite
    def draw_case(draw: Any) -> Case:
        if attention or kernel.rule == "linear":
            c = draw(strategies.cases(dtype=kernel.dtype, exact=integers, sizes=sizes))
            g = beta = None
        else:
            mixtures = tuple(name for name, weights in strategies.MIXTURES.items() if kernel.resets or not weights[-1])
            c = draw(strategies.rule_cases(kernel.rule, dtype=kernel.dtype, exact=integers, channels=kernel.decay == "channel", mixtures=mixtures,
                                           sizes=sizes))
            g, beta = c.g, c.beta
        d = c.dims
        B, H, G, N, L = math.prod(d.lead), d.H, d.G if kernel.grouped else 1, d.N, d.L
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

        def fit(x: Any, *shape: int) -> Any:
            if x is None:
                return None
            x = x.reshape(B, *x.shape[len(d.lead):])
            x = x[:, :: x.shape[1] // shape[0]]                                  # one of a group's query heads, if they are not to be grouped
            assert x.shape == (B, *shape)
            return x

        if integers and g is not None and not kernel.resets:
            g = np.zeros_like(g)
        with_state = kernel.states and bool(rng.integers(4))
        case = Case(fit(c.q, H * G, N, d.D), fit(c.k, H, L, d.D), fit(c.v, H, L, d.M), fit(g, H, N, *([d.D] if kernel.decay == "channel" else [])),
                    fit(beta, H, N), fit(c.state, H, d.D, d.M) if with_state else None, fit(c.dout, H * G, N, d.M),
                    fit(c.dstate, H, d.D, d.M), False)
        if kernel.rule == "linear_attention" and integers:                       # φ(x) = x + 1 of these, without rounding
            case = case._replace(q=np.abs(case.q), k=np.abs(case.k))
        if kernel.rule == "softmax_attention" and draw(st.booleans()):
            if integers:
                q, k = strategies.clear_cut(d, scale_of(kernel, case), rng)
                case = case._replace(q=fit(q, H * G, N, d.D).astype(kernel.dtype), k=fit(k, H, L, d.D).astype(kernel.dtype))
            else:
                case = case._replace(q=case.q * case.q.dtype.type(8))            # one key, or few, for each query
        dyadic = math.frexp(scale_of(kernel, case))[0] in (0.5, -0.5, 0.0)       # else it rounds, in one place or in another
        return case._replace(exact=integers and dyadic and not attention and not kernel.rounds)

    return draw_case()


# --- what is told ------------------------------------------------------------------------------------------------------------------------

def _guess(kernel: Kernel, failure: Failure, test: Law) -> str:
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
    if case.k.shape[2] != case.q.shape[2] and not fails(_square(case)):
        clues.append("only with more or fewer keys than queries")
    if failure.law.startswith("definition"):
        try:
            out = call(kernel, case)[0].astype(np.float64)
        except Told:
            return ", ".join(clues)
        expected = definition(kernel, case)[0]
        bound = 0 if case.exact else bounds(kernel, case)[0] * kernel.factor
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
        if scale_of(kernel, case) == 1 and case.exact and out.any():
            ratio = out[expected != 0] / expected[expected != 0]
            if len(ratio) and np.allclose(ratio, ratio[0]) and abs(ratio[0] - 1) > 1e-6 and np.isfinite(ratio[0]):
                clues.append(f"all outputs are {ratio[0]:.6g} times what they should be: another scale")
    return ", ".join(clues)


def _square(case: Case) -> Case:
    """As many keys as queries."""
    n = min(case.q.shape[2], case.k.shape[2])
    return case.each(lambda name, x: x if name in ("state", "dstate") else x[:, :, :n])


def case_code(kernel: Kernel, case: Case, backward: bool = False) -> str:
    """A case as Python that can be run: arrays in the layout (B, H, N, …), the right answer in float64, and where `backward` the right gradients."""
    lines, names = ["import numpy as np, refattn, refattn.oracle"], []
    for name, x in zip((*NAMES, "dout", "dstate"), case[:8], strict=True):
        if x is None or name in ("dout", "dstate") and not (backward and (name == "dout" or kernel.states)):
            continue
        numbers = repr(x.astype(np.float64).tolist()).replace("inf", "np.inf")
        kind = "np.float64" if x.dtype.name == "bfloat16" else repr(x.dtype.name)                   # its values, exactly
        lines.append(f"{name} = np.array({numbers}, {kind})")
        names.append(name)
    s = scale_of(kernel, case)
    given = [name for name in names if name not in ("dout", "dstate")]
    if kernel.rule in ATTENTIONS:
        more = f"causal={kernel.causal}, " + (f"scale={s!r}" if kernel.rule == "softmax_attention" else f"eps={kernel.eps!r}")
        lines.append(f"out = refattn.oracle.{kernel.rule}(q, k, v, {more})")
        if backward:
            lines.append(f"_, back = refattn.vjp(refattn.{kernel.rule}, *(x.astype(float) for x in (q, k, v)), {more})")
    else:
        lines.append(f"out, end = refattn.oracle.full_recurrence({', '.join(n if n in 'qkv' else f'{n}={n}' for n in given)}, scale={s!r})")
        if backward:
            six = ", ".join(n if n in names else "None" for n in NAMES)
            lines.append(f"_, back = refattn.vjp(refattn.recurrence, *(x if x is None else x.astype(float) for x in ({six})), "
                         f"rule={kernel.rule!r}, scale={s!r})")
    if backward:
        lines.append(f"gradients = back({', '.join(f'{n}.astype(float)' for n in names if n in ('dout', 'dstate'))})")
    return "\n".join(lines)
