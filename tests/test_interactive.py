"""Laws of the interactive page: what its JavaScript computes, and what the page shows when its controls are used, is what the library says.

Needs `pip install 'refattn[browser]'` and a Chromium on the search path; skipped, with the reason, where one of them is absent. Nothing here
shares code with the page: numbers are read from the document, q, k and v from the page's sequence, and everything in between is the library's.
"""
from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refattn
from refattn import features
from refattn.testing.budgets import PHI_ROUNDINGS, assert_within, gamma, recurrence_budget
from refattn.testing.rules_budget import rules_budget
from refattn.testing.softmax_budget import softmax_backward_budget, softmax_forward_budget

PAGE = Path(__file__).resolve().parent.parent / "docs" / "interactive" / "index.html"
MAPS = ("elu1", "relu", "relu2", "identity", "exp", "softmax", "taylor2")
RULES = ("linear", "gated", "delta", "gated_delta")
MECHANISMS = ("attention", *RULES)
EPS = 1e-6
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

PLAIN = """const plain = x => ArrayBuffer.isView(x) ? Array.from(x) : Array.isArray(x) ? x.map(plain) : typeof x === 'function' ? null
    : x !== null && typeof x === 'object' ? Object.fromEntries(Object.entries(x).map(([name, part]) => [name, plain(part)])) : x;
const rows = X => X && X.map(row => Float64Array.from(row));"""


# --- the browser ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'refattn[browser]'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium on the search path, as in Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """The page as a reader opens it, from a file. At the end: no error, no warning, and nothing asked for but its own five files."""
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    opened, said, requests = context.new_page(), [], set()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    context.on("request", lambda request: requests.add(request.url))
    opened.goto(PAGE.as_uri())
    yield opened
    context.close()
    assert said == []
    assert requests <= {(PAGE.parent / name).as_uri() for name in ("index.html", "style.css", "attention.js", "words.js", "page.js")} | {"data:,"}


def run(page: Any, code: str, *arguments: Any) -> Any:
    """The value of a function body in the page, arrays as lists; `a` holds the arguments, `rows(a[0])` a matrix of them."""
    return page.evaluate(f"a => {{ {PLAIN}\nreturn plain((() => {{ {code} }})()); }}", [plain(x) for x in arguments])


def plain(x: Any) -> Any:
    return x.tolist() if isinstance(x, np.ndarray) else x


# --- what the library says, each with its bound ----------------------------------------------------------------------------------------

def mapped(name: str, unit: bool, X: np.ndarray) -> np.ndarray:
    """φ of each row, at length 1 if unit; a row of zeros stays one."""
    Y = features.FEATURE_MAPS[name].forward(X)
    length = np.linalg.norm(Y, axis=-1, keepdims=True)
    return np.divide(Y, length, out=np.zeros_like(Y), where=length > 0) if unit else Y


def unmapped(name: str, unit: bool, X: np.ndarray, dY: np.ndarray) -> np.ndarray:
    """Jᵀ dY, J the Jacobian of `mapped`, row by row."""
    if unit:
        Y = features.FEATURE_MAPS[name].forward(X)
        length = np.linalg.norm(Y, axis=-1, keepdims=True)
        y = np.divide(Y, length, out=np.zeros_like(Y), where=length > 0)
        dY = np.divide(dY - y * (y * dY).sum(-1, keepdims=True), length, out=np.zeros_like(dY), where=length > 0)
    return features.FEATURE_MAPS[name].backward(dY, X)


def unmapped_bar(name: str, unit: bool, X: np.ndarray, dY: np.ndarray) -> np.ndarray:
    """The same sum of absolute values: nothing in it is subtracted."""
    X, D, dY = np.asarray(X), X.shape[-1], np.abs(dY)
    Y = np.abs(features.FEATURE_MAPS[name].forward(X))
    if unit:
        length = np.linalg.norm(Y, axis=-1, keepdims=True)
        y = np.divide(Y, length, out=np.zeros_like(Y), where=length > 0)
        dY = np.divide(dY + y * (y * dY).sum(-1, keepdims=True), length, out=np.zeros_like(dY), where=length > 0)
    if name == "softmax":
        return Y * (dY + (dY * Y).sum(-1, keepdims=True))
    if name == "taylor2":
        matrices = dY[..., 1 + D:].reshape(*X.shape[:-1], D, D)
        return dY[..., 1:1 + D] + np.einsum("...ij,...j->...i", matrices + matrices.swapaxes(-1, -2), np.abs(X)) / math.sqrt(2)
    return np.abs(features.FEATURE_MAPS[name].backward(dY, X))          # elementwise with φ' ≥ 0


def roundings(name: str, unit: bool, X: np.ndarray) -> float:
    """By how many roundings, relatively, each element of φ may be off: PHI_ROUNDINGS for an exp and an addition; over features the sum, the
    quotient and the rounding of the exponent x - max ≤ 2 max|x|; twice for the length, of F squares."""
    n = PHI_ROUNDINGS + (PHI_ROUNDINGS + X.shape[-1] + 2 + 2 * np.abs(X).max(initial=0) if name == "softmax" else 0)
    F = features.feature_size(features.FEATURE_MAPS[name], X.shape[-1], X.dtype)
    return float(2 * n + F + 4 if unit else n)


Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def through(name: str, unit: bool, X: np.ndarray, dY: np.ndarray, bound: np.ndarray, off: float) -> tuple[np.ndarray, np.ndarray]:
    """Jᵀ dY and its bound: what dY may be off by passes through |J|, and making and using J adds its own roundings."""
    n = 4 * off + 4 * X.shape[-1] + 2 * dY.shape[-1] + 16
    return unmapped(name, unit, X, dY), unmapped_bar(name, unit, X, bound) + gamma(n, "float64") * unmapped_bar(name, unit, X, dY)


def rule_says(q: Any, k: Any, v: Any, g: Any, beta: Any, rule: str, name: str, unit: bool, dout: Any, scale: float = 1.0) -> Pairs:
    """Output, state behind the last position, map and gradients of a rule on φ(q), φ(k).

    A term has at most four mapped factors, each off by `off` roundings: with n ≥ 2 (N + D + M + 4) in the budget γ_n · bar, the whole is below
    γ_(n + 4 off) · bar ≤ budget · (1 + 4 off / n)."""
    Q, K, (N, M) = mapped(name, unit, q), mapped(name, unit, k), v.shape
    F, off = Q.shape[-1], roundings(name, unit, np.concatenate([q, k]))
    start, more = np.zeros((F, M)), 1 + 4 * off / (2 * (N + F + M + 4))

    def budget(v: Any, start: Any, dout: Any) -> Any:
        if rule == "linear":
            return recurrence_budget(Q, K, v, start, dout, np.zeros_like(start), scale=scale)
        return rules_budget(Q, K, v, g, beta, start, dout, np.zeros_like(start), scale=scale)

    (out, state), pullback = refattn.vjp(refattn.recurrence, Q, K, v, g, beta, rule=rule, scale=scale)
    dQ, dK, dv, dg, dbeta = pullback(dout)
    weights = refattn.recurrence(Q, K, np.eye(N), g, beta, rule=rule, scale=scale)[0]
    b, square = budget(v, start, dout), budget(np.eye(N), np.zeros((F, N)), np.zeros((N, N)))
    said = {"out": (out, more * b.out), "S": (state, more * b.S), "weights": (weights, more * square.out), "dv": (dv, more * b.dv),
            "dq": through(name, unit, q, dQ, more * b.dq, off), "dk": through(name, unit, k, dK, more * b.dk, off)}
    if g is not None:
        said["dg"] = dg, more * b.dg
    if beta is not None:
        said["dbeta"] = dbeta, more * b.dbeta
    return said


def attention_says(q: Any, k: Any, v: Any, name: str, dout: Any) -> Pairs:
    """Normalised linear attention, for any φ: num and den are each off by γ_n of their bars, num̄ and den̄, n with both φ of each term.

    den: r = γ_n den̄ / |den|, relatively. out = num / den: (γ_n num̄/|den| + r|out|) / (1 - r). G = (do/den | -doᵀo/den): |G| r' + |do| e_out/|den|,
    with r' = r/(1-r) + γ_n. The gradients are linear in G: their bars at |G|, times γ_n, and at the error of G."""
    Q, K, (N, M) = mapped(name, False, q), mapped(name, False, k), v.shape
    off = roundings(name, False, np.concatenate([q, k]))
    n = 2 * (N + Q.shape[-1] + M + 4 + 2 * off)
    c = gamma(n, "float64")
    options = {"feature_map": name, "eps": EPS}
    (out, state), pullback = refattn.vjp(refattn.causal_linear_attention, q, k, v, **options)
    dq, dk, dv = pullback(dout)
    weights = refattn.linear_attention(q, k, np.eye(N), causal=True, **options)
    lower = np.tri(N)
    A, bar = lower * (Q @ K.T), lower * (np.abs(Q) @ np.abs(K).T)
    den = np.abs(A.sum(-1, keepdims=True) + EPS)
    den = np.where(den == 0, np.inf, den)
    r = np.minimum(c * (bar.sum(-1, keepdims=True) + EPS) / den, 0.5)
    off_out = (c * (bar @ np.abs(v)) / den + r * np.abs(out)) / (1 - r)
    off_weights = (c * bar / den + r * np.abs(weights)) / (1 - r)
    G = np.concatenate([np.abs(dout), (np.abs(dout) * np.abs(out)).sum(-1, keepdims=True)], -1) / den
    off_G = G * (r / (1 - r) + c) + np.concatenate([0 * dout, (np.abs(dout) * off_out).sum(-1, keepdims=True)], -1) / den
    one = np.concatenate([np.abs(v), np.ones((N, 1))], -1)
    dA, dA_size = (lower * (x @ one.T) for x in (c * G + off_G, G))
    S, z = state
    size = np.abs(K).T @ one
    return {"out": (out, off_out), "weights": (weights, off_weights), "S": (np.concatenate([S, z[:, None]], -1), c * size),
            "dq": _with(dq, q, name, dA @ np.abs(K), dA_size @ np.abs(K), off),
            "dk": _with(dk, k, name, dA.T @ np.abs(Q), dA_size.T @ np.abs(Q), off),
            "dv": (dv, bar.T @ (c * G + off_G)[:, :M])}


def _with(dx: Any, x: Any, name: str, bound: Any, size: Any, off: float) -> tuple[np.ndarray, np.ndarray]:
    return dx, through(name, False, x, size, bound, off)[1]


def softmax_says(q: Any, k: Any, v: Any, dout: Any, scale: float = 1.0) -> Pairs:
    options = {"causal": True, "scale": scale}
    out, pullback = refattn.vjp(refattn.softmax_attention, q, k, v, **options)
    eye = np.eye(len(q))
    gradients = zip(pullback(dout), softmax_backward_budget(q, k, v, dout, **options))
    return {"out": (out, softmax_forward_budget(q, k, v, **options)),
            "weights": (refattn.softmax_attention(q, k, eye, **options), softmax_forward_budget(q, k, eye, **options)),
            **dict(zip(("dq", "dk", "dv"), gradients))}


def assert_says(found: Any, said: Pairs, what: str = "") -> None:
    for name, (value, bound) in said.items():
        assert_within(np.reshape(found[name], np.shape(value)), value, bound, f"{what}{name}")


# --- the mathematics, on arrays of our own -----------------------------------------------------------------------------------------------

N, D, M = 7, 3, 5


def case(rng: np.random.Generator, rule: str, channels: bool = False, F: int = D) -> tuple[Any, ...]:
    """q, k, v, g, beta, dout: decays of 1, nearly 0 and 0 among them, β of 0 and beyond 1; sizes that differ, and a cotangent for each output."""
    q, k = rng.standard_normal((2, N, D))
    v, dout = rng.standard_normal((2, N, M))
    g = -rng.exponential(1.0, (N, F) if channels else (N,))
    g[1], g[3] = 0.0, -40.0
    g[5, ...] = -np.inf
    beta = rng.uniform(0, 1.2, N)
    beta[2] = 0.0
    return q, k, v, g if "gated" in rule else None, beta if "delta" in rule else None, dout


def two_axes(g: Any) -> Any:
    return g[:, None] if g is not None and g.ndim == 1 else g


RUN_RULE = """const made = Attention.ruleAttention(rows(a[0]), rows(a[1]), rows(a[2]), rows(a[3]), a[4] && Float64Array.from(a[4]), a[6]);
return { ...made, states: made.steps.map(step => step.S), kept: made.steps.map(step => step.P), u: made.steps.map(step => step.u),
         written: made.steps.map(step => step.write), ...made.backward(rows(a[5])) };"""


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_with_each_feature_map_is_the_library_s(page: Any, rng: np.random.Generator, rule: str, name: str) -> None:
    for unit, channels in itertools.product((False, True), {False, "gated" in rule}):
        F = features.feature_size(features.FEATURE_MAPS[name], D, np.float64)
        q, k, v, g, beta, dout = case(rng, rule, channels, F)
        found = run(page, RUN_RULE, q, k, v, two_axes(g), beta, dout, {"map": name, "unit": unit, "scale": 0.7})
        said = rule_says(q, k, v, g, beta, rule, name, unit, dout, scale=0.7)
        found["S"] = found["states"][-1]
        assert_says(found, said)
        before, zero = np.zeros((F, M)), np.zeros((F, M))
        for t in range(N):                                              # all that a step shows, from the states before and behind it
            part = [None if x is None else x[:t + 1] for x in (q, k, v, g, beta)]
            S, bound = rule_says(*part, rule, name, unit, dout[:t + 1])["S"]
            assert_within(found["states"][t], S, bound, f"S_{t}")
            a = np.ones(F) if g is None else np.broadcast_to(np.exp(g[t]), F)
            P, key = a[:, None] * before, mapped(name, unit, k)[t]
            off = a[:, None] * zero + gamma(8, "float64") * np.abs(P)
            assert_within(found["kept"][t], P, off, f"P_{t}")
            u = v[t] if beta is None else beta[t] * (v[t] - P.T @ key)
            size = np.abs(v[t]) + np.abs(P).T @ np.abs(key)
            n = 2 * roundings(name, unit, k) + F + 4
            off_u = 0 * u if beta is None else beta[t] * (gamma(n, "float64") * size + off.T @ np.abs(key))
            assert_within(found["u"][t], u, off_u, f"u_{t}")
            assert np.array_equal(found["written"][t], np.outer(found["phiK"][t], found["u"][t]))
            before, zero = S, 2 * bound


@pytest.mark.parametrize("rule", RULES)
def test_on_small_integers_the_page_and_the_library_give_the_same_bits(page: Any, rng: np.random.Generator, rule: str) -> None:
    q, k = rng.integers(-2, 3, (2, N, D)).astype(float)
    v, dout = rng.integers(-2, 3, (2, N, M)).astype(float)
    g, beta = np.where(rng.random((N, D)) < 0.3, -np.inf, 0.0), rng.choice([0.0, 0.5, 1.0], N)
    g, beta = g if "gated" in rule else None, beta if "delta" in rule else None
    found = run(page, RUN_RULE, q, k, v, g, beta, dout, {"map": "identity", "scale": 0.5})
    (out, state), pullback = refattn.vjp(refattn.recurrence, q, k, v, g, beta, rule=rule, scale=0.5)
    assert np.array_equal(found["out"], out) and np.array_equal(found["states"][-1], state)
    for name, gradient in zip(("dq", "dk", "dv", "dg", "dbeta"), pullback(dout)):
        assert found[name] is None if gradient is None else np.array_equal(found[name], gradient), name


RUN_ATTENTION = """const made = Attention.linearAttention(rows(a[0]), rows(a[1]), rows(a[2]), { map: a[4] });
return { ...made, S: made.steps.at(-1).S, states: made.steps.map(step => step.S), ...made.backward(rows(a[3])) };"""


@pytest.mark.parametrize("name", MAPS)
def test_linear_attention_with_each_feature_map_is_the_library_s(page: Any, rng: np.random.Generator, name: str) -> None:
    q, k, v, _, _, dout = case(rng, "linear")
    found = run(page, RUN_ATTENTION, q, k, v, dout, name)
    assert_says(found, attention_says(q, k, v, name, dout))
    for t in range(N):
        value, bound = attention_says(q[:t + 1], k[:t + 1], v[:t + 1], name, dout[:t + 1])["S"]
        assert_within(found["states"][t], value, bound, f"S_{t}")


def test_a_query_that_sees_nothing_gives_zero_and_so_do_its_gradients(page: Any, rng: np.random.Generator) -> None:
    _, k, v, _, _, dout = case(rng, "linear")
    code = RUN_ATTENTION.replace("{ map: a[4] }", "{ map: a[4], eps: 0 }")
    found = run(page, code, np.full_like(k, -1.0), k, v, dout, "relu")
    for name in ("out", "weights", "dq", "dk", "dv"):
        assert not np.any(found[name]), name


@pytest.mark.parametrize("scale", [1.0, -0.3, 40.0])
def test_softmax_attention_is_the_library_s(page: Any, rng: np.random.Generator, scale: float) -> None:
    q, k, v, _, _, dout = case(rng, "linear")
    found = run(page, """const made = Attention.softmaxAttention(rows(a[0]), rows(a[1]), rows(a[2]), { scale: a[4] });
        return { ...made, ...made.backward(rows(a[3])) };""", q, k, v, dout, scale)
    assert_says(found, softmax_says(q, k, v, dout, scale))


@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_and_their_derivatives_are_those_of_the_table(page: Any, rng: np.random.Generator, name: str) -> None:
    X = np.concatenate([rng.standard_normal((4, D)), [[0.0, -0.0, 1.0], [30.0, -30.0, 2.0], [-700.0, -1.0, -2.0]],
                        1e-8 * rng.standard_normal((1, D))])
    F, off = features.feature_size(features.FEATURE_MAPS[name], D, X.dtype), roundings(name, False, X)
    dY = rng.standard_normal((len(X), F))
    for unit in (False, True):
        phi = "x => Attention.UNIT.forward(map.forward(x))" if unit else "map.forward"
        back = "map.backward(Attention.UNIT.backward(dY[i], map.forward(x)), x)" if unit else "map.backward(dY[i], x)"
        found = run(page, f"""const map = Attention.FEATURE_MAPS[a[1]], X = rows(a[0]), dY = rows(a[2]);
            return [X.map({phi}), X.map((x, i) => {back})];""", X, name, dY)
        Y = mapped(name, unit, X)
        assert_within(found[0], Y, gamma(roundings(name, unit, X), "float64") * np.abs(Y) + 2.0**-1074, name)
        assert_within(found[1], *through(name, unit, X, dY, 0 * dY, off), name)


def test_the_page_offers_exactly_these_feature_maps_and_rules(page: Any) -> None:
    assert set(run(page, "return Object.keys(Attention.FEATURE_MAPS);")) == set(MAPS) < set(features.FEATURE_MAPS)
    assert tuple(run(page, "return Array.from($('map').options, o => o.value);")) == MAPS
    assert tuple(run(page, "return Array.from($('mechanism').options, o => o.value);")) == MECHANISMS


@pytest.mark.parametrize("name", MAPS)
def test_a_memory_answers_as_if_the_query_had_stood_at_its_last_position(page: Any, rng: np.random.Generator, name: str) -> None:
    q, k, v, g, beta, dout = case(rng, "gated_delta")
    t, options = 4, {"map": name, "unit": True}
    x = rng.standard_normal(D)
    found = run(page, """const [q, k, v, g] = a.slice(0, 4).map(rows), beta = Float64Array.from(a[4]), x = Float64Array.from(a[5]), t = a[6];
        return [Attention.askRule(x, Attention.ruleAttention(q, k, v, g, beta, a[7]).steps, t, a[7]),
                Attention.askLinear(x, Attention.linearAttention(q, k, v, a[7]).steps, t, a[7]),
                Attention.askSoftmax(x, k, v, t, { scale: 0.8 })];""", q, k, v, two_axes(g), beta, x, t, options)
    asked, (k, v, g, beta, dout) = np.concatenate([q[:t], x[None]]), (y[:t + 1] for y in (k, v, g, beta, dout))
    for what, answer, said in (("rule", found[0], rule_says(asked, k, v, g, beta, "gated_delta", name, True, dout)),
                               ("linear", found[1], attention_says(asked, k, v, name, dout)),
                               ("softmax", found[2], softmax_says(asked, k, v, dout, 0.8))):
        value, bound = said["out"]
        assert_within(answer, value[t], bound[t], what)


def test_codes_are_fixed_of_length_one_and_perpendicular_within_a_group(page: Any) -> None:
    codes = np.array(run(page, "return a[0].map(c => code(c, 1));", list("abcdefghijklmnop")))
    for group in (codes[:8], codes[8:]):
        assert np.abs(group @ group.T - np.eye(8)).max() < gamma(100, "float64")
    again = np.array(run(page, "return a[0].map(c => code(c, 1));", list("ponmlkjihgfedcba")))
    assert np.array_equal(again[::-1], codes)
    assert not np.array_equal(run(page, "return code('a', 2);"), codes[0])


def test_a_height_shared_between_levels_is_read_back(page: Any, rng: np.random.Generator) -> None:
    heights = np.concatenate([[0.0, 1.0, 1 / 7], rng.random(20)])
    shared, back = run(page, "return [a[0].map(levels), a[0].map(h => height(levels(h)))];", heights)
    assert np.abs(np.sum(shared, -1) - 1).max() <= gamma(20, "float64") and (np.count_nonzero(shared, axis=-1) <= 2).all()
    assert_within(back, heights, gamma(40, "float64"), "height")


# --- the page, used as a reader uses it ---------------------------------------------------------------------------------------------------

def shown(page: Any, host: str) -> np.ndarray:
    """The numbers of a heat map as they stand in the document; for a block of the state: its matrix."""
    cells = page.eval_on_selector_all(f"{host} rect.cell", "all => all.map(r => [+r.dataset.row, +r.dataset.column, Number(r.dataset.value)])")
    size = [int(max(cell[axis] for cell in cells)) + 1 for axis in (0, 1)]
    assert len(cells) == size[0] * size[1]
    return np.array([cell[2] for cell in sorted(cells)]).reshape(size)


def controls(page: Any) -> dict[str, Any]:
    """What the reader sees chosen, from the controls themselves."""
    return page.evaluate("""() => ({ ...Object.fromEntries(['mechanism', 'map', 'cotangent'].map(id => [id, document.getElementById(id).value])),
        ...Object.fromEntries(['beta', 'decay', 'sharpness', 'place', 'position', 'focus']
            .map(id => [id, Number(document.getElementById(id).value)])),
        ...Object.fromEntries(['unit', 'channels', 'follow'].map(id => [id, document.getElementById(id).checked])),
        curve: document.getElementById('mode-curve').checked, text: document.getElementById('text').value })""")


def assert_the_page_is_right(page: Any) -> None:
    """The numbers that the page shows, from its sequence and the settings of its controls; of what a memory answers, every second or fifth row."""
    c = controls(page)
    made = run(page, "const { q, k, v, labels } = sequence(settings); return { q, k, v, labels };")
    q, k, v = (np.array(made[name]) for name in "qkv")
    N, t, i = len(q), c["position"] - 1, c["focus"] - 1
    if not c["curve"]:
        assert "".join(made["labels"]) == c["text"]
    assert np.allclose(np.linalg.norm(q, axis=-1)**2, c["sharpness"], rtol=1e-14)
    rule, F = "linear" if c["mechanism"] == "attention" else c["mechanism"], features.feature_size(features.FEATURE_MAPS[c["map"]], 8, q.dtype)
    with np.errstate(divide="ignore"):
        decay = np.log(float(c["decay"]))
    g = np.full(N, decay) if not c["channels"] else np.tile(decay * np.arange(1, F + 1) / F, (N, 1))
    g, beta = g if "gated" in rule else None, np.full(N, float(c["beta"])) if "delta" in rule else None
    nothing = np.zeros_like(v)

    def cotangent(out: np.ndarray) -> np.ndarray:
        dout = np.zeros_like(v)
        dout[i] = out[i] if c["cotangent"] == "self" else np.eye(8)[int(c["cotangent"])]
        return dout

    def all_of(dout: np.ndarray, upto: int = N, asked: np.ndarray | None = None) -> Pairs:
        """The chosen memory on the first positions, the last query replaced by `asked`."""
        first = [None if x is None else x[:upto].copy() for x in (q, k, v, g, beta)]
        if asked is not None:
            first[0][-1] = asked
        if c["mechanism"] == "attention":
            return attention_says(*first[:3], c["map"], dout[:upto])
        return rule_says(*first, rule, c["map"], c["unit"], dout[:upto])

    ruled, attention, softmax = (rule_says(q, k, v, g, beta, rule, c["map"], c["unit"], nothing), attention_says(q, k, v, c["map"], nothing),
                                 softmax_says(q, k, v, nothing))
    for host, said in (("softmax", softmax), ("attention", attention), ("rule", ruled)):
        assert_within(shown(page, f"[data-heat=map-{host}]"), *said["weights"], f"map-{host}")
        assert_within(shown(page, f"[data-heat=out-{host}]"), *(x.T for x in said["out"]), f"out-{host}")
    assert_within(shown(page, "[data-heat=values]"), v.T, 0, "values")

    chosen = all_of(nothing)
    # a loss of ½|o|² hands on the error of o as an error of do: the gradients are linear in it
    for which, said, again in (("", chosen, all_of), ("-softmax", softmax, lambda dout: softmax_says(q, k, v, dout))):
        dout = cotangent(said["out"][0])
        gradients = again(dout)
        for name in {"dq", "dk", "dv", "dg", "dbeta"} - gradients.keys() if not which else ():
            assert page.locator(f"[data-heat={name}]").is_hidden()
        for name, (value, bound) in gradients.items():
            if not name.startswith("d"):
                continue
            if c["cotangent"] == "self":
                off = np.zeros_like(dout)
                off[i] = said["out"][1][i]
                bound = 2 * bound + sum(np.abs(again(row)[name][0]) for row in _rows_of(off))
            found = shown(page, f"[data-heat={name}{which}]")
            assert_within(found.T.reshape(np.shape(value)), value, bound, f"{name}{which}")

    S, bound = all_of(nothing, t + 1)["S"]
    block = {f"{name} {part}": shown(page, f"[data-block={name}] .{part}")
             for name, part in itertools.product(("kept", "written", "state"), ("matrix", "left", "top"))}
    assert_within(block["state matrix"], S, bound, "S_t")
    a = np.ones((F, 1)) if g is None else np.exp(g[t].reshape(-1, 1))
    before, off = all_of(nothing, t)["S"] if t else (0 * S, 0 * S)
    assert_within(block["kept matrix"], a * before, a * off + gamma(8, "float64") * a * np.abs(before), "P_t")
    key, query = (mapped(c["map"], c["unit"] and c["mechanism"] != "attention", X)[t] for X in (k, q))
    n = roundings(c["map"], c["unit"] and c["mechanism"] != "attention", np.concatenate([q, k]))
    for name, y in (("kept left", key), ("written left", key), ("state left", query)):
        assert_within(block[name][:, 0], y, gamma(n, "float64") * np.abs(y), name)
    assert np.array_equal(block["written matrix"], np.outer(block["written left"], block["written top"]))
    assert np.array_equal(block["state matrix"], block["kept matrix"] + block["written matrix"])
    known, size = (x.T @ y for x, y in ((block["kept matrix"], key), (np.abs(block["kept matrix"]), np.abs(key))))
    assert_within(block["kept top"][0], known, gamma(2 * F + n, "float64") * size, "Pᵀk")
    assert_within(block["state top"][0, :8], chosen["out"][0][t], chosen["out"][1][t], "o_t")
    facts = page.locator("#facts").inner_text().replace("−", "-")
    assert f"{S.shape[0]} × {S.shape[1]} numbers" in facts
    size_S, strength = re.search(r"\|S\| = ([\d.e-]+),", facts), re.search(r"β\|k\|² = ([\d.e-]*\d)", facts)
    assert size_S and math.isclose(float(size_S[1]), np.linalg.norm(S), rel_tol=0.06, abs_tol=0.0)        # two digits at least are shown
    assert (strength is None) == (beta is None)
    if strength and beta is not None:
        assert math.isclose(float(strength[1]), beta[t] * (key @ key), rel_tol=0.06, abs_tol=0.0)
        assert ("errors grow" in facts) == (beta[t] * (key @ key) > 2 + 1e-9)

    def answer(x: np.ndarray, softly: bool) -> tuple[np.ndarray, np.ndarray]:
        asked = np.concatenate([q[:t], x[None]])
        said = softmax_says(asked, k[:t + 1], v[:t + 1], nothing[:t + 1]) if softly else all_of(nothing, t + 1, x)
        return said["out"][0][t], said["out"][1][t]

    if c["curve"]:
        curve = np.array(page.eval_on_selector_all("#pad circle", "all => all.map(x => Number(x.dataset.value))"))
        level = np.arange(8) / 7
        assert_within(v @ level, curve, gamma(40, "float64"), "curve")
        for line, softly in (("remembered", False), ("softmax", True)):
            values = np.array(page.eval_on_selector(f"#pad polyline.{line}", "x => JSON.parse(x.dataset.values)"))
            for j in range(0, N, 5):
                value, bound = answer(q[j], softly)
                assert_within(values[j], level @ value, level @ bound + gamma(20, "float64") * (level @ np.abs(value)), f"{line} {j}")
        return
    labels = list(dict.fromkeys(made["labels"]))
    codes, asking = np.array(run(page, "return [a[0].map(c => code(c, 2)), a[0].map(c => askFor(c, a[1], settings))];", labels, t))
    for host, softly in (("answers", False), ("answers-softmax", True)):
        found = shown(page, f"[data-heat={host}]")
        for j in range(0, len(labels), 2):
            value, bound = answer(asking[j], softly)
            assert_within(found[j], codes @ value, np.abs(codes) @ bound + gamma(20, "float64") * (np.abs(codes) @ np.abs(value)), host)
    chips = page.eval_on_selector_all("#chips button", "all => all.map(x => [x.dataset.expected, Number(x.dataset.value)])")
    out, bound = chosen["out"]
    scores, off = out @ codes.T, bound @ np.abs(codes.T) + gamma(20, "float64") * (np.abs(out) @ np.abs(codes.T))
    for at, (expected, score) in enumerate(chips):
        assert_within(score, scores[at, labels.index(expected)], off[at, labels.index(expected)], f"chip {at}")
        assert score >= (scores[at] - 2 * off[at]).max()


def _rows_of(off: np.ndarray) -> list[np.ndarray]:
    """One cotangent for each element that is not 0: what an error of that size does, each by itself."""
    found = []
    for at in zip(*np.nonzero(off)):
        single = np.zeros_like(off)
        single[at] = off[at]
        found.append(single)
    return found


def test_every_experiment_shows_what_the_library_says(page: Any) -> None:
    buttons = page.locator("#experiments button")
    assert buttons.count() >= 6
    for number in range(buttons.count()):
        buttons.nth(number).click()
        assert buttons.nth(number).get_attribute("aria-pressed") == "true" and len(page.locator("#note").inner_text()) > 60
        assert_the_page_is_right(page)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_choice_of_memory_and_feature_map_shows_what_the_library_says(page: Any, mechanism: str) -> None:
    page.locator("#mechanism").select_option(mechanism)
    for number, name in enumerate(MAPS):
        page.locator("#map").select_option(name)
        page.locator("#chips button").nth(3 + number).click()
        assert_the_page_is_right(page)


def test_sliders_and_boxes_change_what_is_shown(page: Any) -> None:
    page.locator("#text").fill("abcab")
    page.locator("#mechanism").select_option("gated_delta")
    page.locator("#map").select_option("identity")

    def keys(slider: str, *pressed: str) -> None:
        before = shown(page, "[data-heat=map-rule]")
        page.locator(f"#{slider}").focus()
        for key in pressed:
            page.keyboard.press(key)
        if slider != "focus":
            assert not np.array_equal(before, shown(page, "[data-heat=map-rule]"))
        assert_the_page_is_right(page)

    keys("beta", "ArrowLeft", "ArrowLeft", "ArrowLeft")
    keys("decay", "ArrowLeft")
    page.locator("#channels").check()
    assert_the_page_is_right(page)
    keys("place", "ArrowRight", "ArrowRight")
    page.locator("#unit").uncheck()
    keys("sharpness", "ArrowLeft", "ArrowLeft")
    page.locator("#cotangent").select_option("3")
    keys("focus", "Home", "ArrowRight")
    assert controls(page)["focus"] == 2 and not controls(page)["follow"]
    assert not shown(page, "[data-heat=dv]")[:, 2:].any()                        # the future has no part in the past
    keys("decay", "Home")                                                       # g = -inf: nothing is left of the past
    assert (np.tril(shown(page, "[data-heat=map-rule]"), -1) == 0).all()
    keys("beta", "Home")                                                        # β = 0: nothing is written
    assert not shown(page, "[data-block=state] .matrix").any()


def test_the_buttons_step_play_and_pause(page: Any) -> None:
    at = lambda: controls(page)["position"]
    page.get_by_role("button", name="First position").click()
    assert at() == 1 and page.get_by_role("button", name="Position 1, a").get_attribute("aria-current") == "step"
    page.get_by_role("button", name="One position on").click()
    page.get_by_role("button", name="One position on").click()
    page.get_by_role("button", name="One position back").click()
    assert at() == 2
    assert_the_page_is_right(page)
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("Number(document.getElementById('position').value) >= 4", timeout=20_000)
    page.get_by_role("button", name="Pause").click()
    stopped = at()
    page.wait_for_timeout(1500)
    assert at() == stopped
    assert_the_page_is_right(page)
    page.locator("#position").focus()
    page.keyboard.press("End")
    assert at() == 11
    page.get_by_role("button", name="Play").click()                              # from the end: once more from the beginning
    assert at() == 1
    page.get_by_role("button", name="Pause").click()
    page.locator("#position").focus()
    for key in ("End", "ArrowLeft"):
        page.keyboard.press(key)
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").wait_for(state="detached", timeout=20_000)             # at the end it stops by itself
    assert at() == 11


def test_what_is_typed_is_what_is_stored(page: Any) -> None:
    text = page.locator("#text")
    text.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("to be é🙂to b")
    assert page.locator("#chips b").all_inner_texts() == [*"to", "␣", *"be", "␣", *"é🙂to", "␣", "b"]
    assert_the_page_is_right(page)
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")                                               # an empty field keeps the last sequence
    assert page.locator("#chips b").count() == 12
    page.keyboard.press("Tab")
    assert text.input_value() == "to be é🙂to b"
    text.fill("x" * 24)
    assert page.locator("#chips b").count() == 24
    text.fill("a")
    assert_the_page_is_right(page)


def test_the_same_key_twice_is_overwritten_by_rule_delta_and_added_by_rule_linear(page: Any) -> None:
    """The experiment of the page, in its own words: after a came b, then c."""
    page.get_by_role("button", name="Overwrite").click()
    a, b, c = range(3)
    asked = shown(page, "[data-heat=answers]")[a]
    assert abs(asked[c] - 1) < 1e-12 and abs(asked[b]) < 1e-12
    page.locator("#mechanism").select_option("linear")
    asked = shown(page, "[data-heat=answers]")[a]
    assert abs(asked[b] - asked[c]) < 1e-12 and asked[b] > 0.9


def test_what_is_drawn_is_what_is_stored(page: Any) -> None:
    page.get_by_text("Draw", exact=True).click()
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.8 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.2 * box["height"])        # one jump: what lies between is a line
    page.mouse.up()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.9 * box["height"])        # not pressed: draws nothing
    curve = np.array(page.eval_on_selector_all("#pad circle", "all => all.map(x => Number(x.dataset.value))"))
    drawn = curve[2:22]
    assert np.abs(np.diff(drawn) - (drawn[-1] - drawn[0]) / 19).max() < gamma(100, "float64")
    assert abs(drawn[0] - (180 - 160) / 160) < 0.01 and abs(drawn[-1] - (180 - 40) / 160) < 0.01      # 200 high, of which 20 at each edge
    assert_the_page_is_right(page)
    page.locator("#mechanism").select_option("gated_delta")
    page.locator("#pad").focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    assert controls(page)["position"] == 22
    changed = np.array(page.eval_on_selector_all("#pad circle", "all => all.map(x => Number(x.dataset.value))"))
    assert abs(changed[21] - curve[21] - 0.05) < 1e-15 and np.array_equal(np.delete(changed, 21), np.delete(curve, 21))
    assert_the_page_is_right(page)


def test_pointing_at_a_cell_and_the_arrow_keys_say_its_number(page: Any) -> None:
    panel, cell = page.locator(".panel:has([data-heat=map-softmax])"), page.locator("[data-heat=map-softmax] rect.cell")
    cell.nth(2 * 11 + 1).hover()
    expected = shown(page, "[data-heat=map-softmax]")
    said = panel.locator(".readout").inner_text()
    assert said.startswith("softmax weight [3, 2] = ") and float(said.rpartition("= ")[2]) == expected[2, 1]
    page.locator("[data-heat=map-rule] svg").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):                      # the first key reads the first cell
        page.keyboard.press(key)
    assert panel.locator(".readout").inner_text().startswith("A [3, 2] = ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 800, 1360, 2000])
def test_nothing_scrolls_sideways_on_any_screen(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    for number in range(page.locator("#experiments button").count()):
        page.locator("#experiments button").nth(number).click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    empty = page.evaluate("getComputedStyle(document.querySelector('[data-heat=dq] rect.cell')).fill")
    assert empty == {"light": "rgb(243, 241, 234)", "dark": "rgb(35, 38, 45)"}[scheme]     # a number of 0 has the colour of nothing


def test_every_control_and_every_map_has_a_name(page: Any) -> None:
    nameless = page.evaluate("""() => Array.from(document.querySelectorAll('button, input, select, svg[tabindex]'))
        .filter(x => !(x.getAttribute('aria-label') || x.labels?.length && x.labels[0].textContent.trim() || x.textContent.trim()))
        .map(x => x.outerHTML.slice(0, 80))""")
    assert nameless == []
    assert page.evaluate("document.querySelectorAll('svg[role=img]').length") >= 20
