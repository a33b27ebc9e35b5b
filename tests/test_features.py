"""Feature maps: each against its definition, its kernel and its derivative, and the laws that any map must obey."""
from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import features
from refattn.features import FEATURE_MAPS, FeatureMap, dpfp, feature_map, feature_size, positive_random, random_fourier
from refattn.testing import feature_laws as laws
from refattn.testing.budgets import assert_within, gamma

# NumPy's exp, sin and cos are taken to be within 4 units in the last place, 8 u. Every other operation rounds once.
E = 8


# --- definitions, one row at a time, for real and for complex x (complex step) -------------------------------------------------------

def relu(t: Any) -> Any:
    return t if t.real > 0 else 0 * t


def define_elu1(x: Any) -> list[Any]:
    return [1 + t if t.real > 0 else np.exp(t) for t in x]


def define_relu(x: Any) -> list[Any]:
    return [relu(t) for t in x]


def define_relu2(x: Any) -> list[Any]:
    return [relu(t) ** 2 for t in x]


def define_identity(x: Any) -> list[Any]:
    return list(x)


def define_exp(x: Any) -> list[Any]:
    return [np.exp(t) for t in x]


def define_softmax(x: Any) -> list[Any]:
    return [1 / sum(np.exp(s - t) for s in x) for t in x]


def define_poly2(x: Any) -> list[Any]:
    return [s * t for s in x for t in x]


def define_taylor2(x: Any) -> list[Any]:
    return [1 + 0 * x.sum(), *x, *(s * t / np.sqrt(np.longdouble(2)) for s in x for t in x)]


def define_dpfp(nu: int) -> Callable[[Any], list[Any]]:
    def define(x: Any) -> list[Any]:
        r = [*(relu(t) for t in x), *(relu(-t) for t in x)]
        return [r[i] * r[(i + shift) % len(r)] for shift in range(1, nu + 1) for i in range(len(r))]
    return define


def define_fourier(W: np.ndarray) -> Callable[[Any], list[Any]]:
    norm = 1 / np.sqrt(np.longdouble(len(W)))
    return lambda x: [f((w * x).sum()) * norm for f in (np.cos, np.sin) for w in W]


def define_positive(W: np.ndarray) -> Callable[[Any], list[Any]]:
    norm = 1 / np.sqrt(np.longdouble(len(W)))
    return lambda x: [np.exp((w * x).sum() - (x * x).sum() / 2) * norm for w in W]


def rowwise(define: Callable[[Any], list[Any]], x: np.ndarray, F: int) -> np.ndarray:
    y = np.empty((*x.shape[:-1], F), x.dtype)
    for row in np.ndindex(x.shape[:-1]):
        y[row] = define(x[row])
    return y


def derivative(define: Callable[[Any], list[Any]], dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dx_i = Σ_f dy_f ∂φ_f/∂x_i by the complex step: Im φ(x + i·h·e_i)/h, exact to rounding for h so small that h² vanishes."""
    h = 1e-200
    wide, dx = x.astype(np.clongdouble), np.empty(x.shape, np.longdouble)
    for i in range(x.shape[-1]):
        moved = wide.copy()
        moved[..., i] += 1j * h
        dx[..., i] = (dy.astype(np.longdouble) * (rowwise(define, moved, dy.shape[-1]).imag / h)).sum(-1)
    return dx


# --- the maps under test: definition, and how large the error may be -----------------------------------------------------------------

class Case(NamedTuple):
    """`forward_size` and `backward_size`: the map's computation on absolute values; `*_roundings`: how many roundings it takes."""

    fm: FeatureMap
    define: Callable[[Any], list[Any]]
    F: int
    forward_size: Callable[[np.ndarray], np.ndarray]
    forward_roundings: float
    backward_size: Callable[[np.ndarray, np.ndarray], np.ndarray]
    backward_roundings: float


REACH = 3.0                                                           # x is drawn from [-REACH, REACH]
DTYPES = ("float32", "float64")
NAMES = (*FEATURE_MAPS, "dpfp3", "random_fourier", "positive_random", "positive_random_independent")
NONNEGATIVE = ("elu1", "relu", "relu2", "exp", "softmax", "dpfp", "dpfp3", "positive_random", "positive_random_independent")


def case(name: str, D: int) -> Case:
    return _case(name, D)


@pytest.fixture(autouse=True, scope="module")
def made_anew() -> None:
    """What an earlier run in this process made (mutation tests fork one) is not what is to be judged."""
    _case.cache_clear()


@functools.cache
def _case(name: str, D: int) -> Case:
    fm = None if name == "dpfp" else FEATURE_MAPS.get(name)           # maps that are made: here, of the code as it is now

    def elementwise(define: Callable[[Any], list[Any]], slope: Callable[[np.ndarray], np.ndarray], n: float, m: float) -> Case:
        return Case(fm, define, D, lambda x: np.abs(rowwise(define, x, D)), n, lambda dy, x: np.abs(dy) * slope(x), m)

    if name == "elu1":
        return elementwise(define_elu1, lambda x: np.exp(np.minimum(x, 0)), E, E + 1)
    if name == "relu":
        return elementwise(define_relu, lambda x: 1.0 * (x > 0), 0, 0)
    if name == "relu2":
        return elementwise(define_relu2, lambda x: 2 * np.maximum(x, 0), 1, 1)
    if name == "identity":
        return elementwise(define_identity, np.ones_like, 0, 0)
    if name == "exp":
        return elementwise(define_exp, np.exp, E, 2 * E + 2)
    if name == "softmax":                                             # e^(x-m): E, and |x - m| for the rounding of x - m; sum D; quotient 1
        n = 2 * (E + 2 * REACH) + D + 1
        y = functools.partial(rowwise, define_softmax, F=D)
        return Case(fm, define_softmax, D, y, n,
                    lambda dy, x: y(x) * (np.abs(dy) + (np.abs(dy) * y(x)).sum(-1, keepdims=True)), 2 * n + D + 3)

    def mirrored(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
        dY = np.abs(dy).reshape(*x.shape[:-1], D, D)
        return ((dY + dY.swapaxes(-1, -2)) * np.abs(x)[..., None, :]).sum(-1)

    if name == "poly2":
        return Case(fm, define_poly2, D * D, lambda x: np.abs(rowwise(define_poly2, x, D * D)), 1, mirrored, D + 1)
    if name == "taylor2":                                             # 3: the product, √½ rounded, and times it
        F = 1 + D + D * D
        return Case(fm, define_taylor2, F, lambda x: np.abs(rowwise(define_taylor2, x, F)), 3,
                    lambda dy, x: np.abs(dy[..., 1:1 + D]) + mirrored(dy[..., 1 + D:], x), D + 4)
    if name.startswith("dpfp"):
        nu = int(name[4:] or 1)
        define = define_dpfp(nu)
        return Case(dpfp(nu), define, 2 * D * nu, lambda x: rowwise(define, x, 2 * D * nu), 1,
                    lambda dy, x: np.abs(derivative(define, np.abs(dy), x)), 2 * nu + 2)   # all ∂y_f/∂x_i have the sign of x_i
    if name == "random_fourier":                                      # the phase: D roundings of |W||x|
        F = 6
        fm = random_fourier(D, F, seed=7)
        W = np.random.default_rng(7).standard_normal((F // 2, D)).astype(np.float32).astype(np.longdouble)
        norm = math.sqrt(2 / F)

        def phases(x: np.ndarray) -> np.ndarray:
            return 1 + np.abs(x) @ np.abs(W).T

        def fourier_size(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
            return (np.abs(dy[..., :F // 2]) + np.abs(dy[..., F // 2:])) * phases(x) @ np.abs(W) * norm

        return Case(fm, define_fourier(W), F, lambda x: np.concatenate([phases(x)] * 2, -1) * norm, D + E + 2, fourier_size, D + E + F + 5)

    F = 2 * D + 1                                                     # two whole blocks of orthogonal rows and part of a third
    fm = positive_random(D, F, seed=7, orthogonal=name == "positive_random")
    W = recovered_weights(fm, D, np.longdouble).astype(np.float32).astype(np.longdouble)
    define = define_positive(W)

    def exponents(x: np.ndarray) -> np.ndarray:                       # the exponent's absolute error is γ times this, and so y's relative error
        return rowwise(define, x, F) * (1 + np.abs(x) @ np.abs(W).T + (x * x).sum(-1, keepdims=True) / 2)

    def positive_size(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
        d = np.abs(dy) * exponents(x)
        return d @ np.abs(W) + np.abs(x) * d.sum(-1, keepdims=True)

    return Case(fm, define, F, exponents, D + E + 4, positive_size, D + E + F + 8)


def recovered_weights(fm: FeatureMap, D: int, dtype: Any = np.float64) -> np.ndarray:
    """W (F, D), from log φ(e_i) - log φ(0) = W_i - 1/2."""
    return (np.log(fm.forward(np.eye(D, dtype=dtype))) - np.log(fm.forward(np.zeros((1, D), dtype)))).T + 0.5


# --- drawn inputs: shapes with their edges, layouts, exact zeros ---------------------------------------------------------------------

LAYOUTS = ("contiguous", "fortran", "reversed", "every other", "one row for all", "read-only")


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    if layout == "fortran":
        return np.asfortranarray(x)
    if layout == "reversed":
        return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    if layout == "every other":
        wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "one row for all" and x.size:
        return np.broadcast_to(x[(0,) * (x.ndim - 1)], x.shape)
    if layout == "read-only":
        x.flags.writeable = False
    return x


@st.composite
def problems(draw: Any, names: tuple[str, ...] = NAMES, kinks: bool = True) -> tuple[str, Case, np.ndarray, np.ndarray]:
    name, dtype = draw(st.sampled_from(names)), draw(st.sampled_from(DTYPES))
    D = draw(st.sampled_from([D for D in (1, 2, 5) if not (name == "dpfp3" and D == 1)]))
    lead = draw(st.sampled_from([(3, 4, 0), (3, 4, 1), (2, 3, 4), (2, 3, 7), (6,), (0, 3), ()]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    c = case(name, D)
    x, dy = rng.uniform(-REACH, REACH, (*lead, D)), rng.standard_normal((*lead, c.F))
    x = np.where(np.abs(x) < 0.01, 0.5, x)
    if kinks:
        x = np.where(rng.random(x.shape) < 0.1, draw(st.sampled_from([0.0, -0.0])), x)
    layouts = st.sampled_from(LAYOUTS if lead else LAYOUTS[:1])
    return name, c, laid_out(x.astype(dtype), draw(layouts)), laid_out(dy.astype(dtype), draw(layouts))


def budget(n: float, dtype: Any, size: np.ndarray) -> np.ndarray:
    """n roundings of the map, and as many of the definition in longdouble, which on some machines is float64."""
    return (gamma(n, dtype) + gamma(n + 4, np.longdouble)) * size if n else 0 * size


def judge(actual: np.ndarray, exact: np.ndarray, bound: np.ndarray, what: str) -> None:
    """|actual - exact| ≤ bound, the difference taken in longdouble: assert_within alone would round `exact` to float64 first."""
    error = actual.astype(np.longdouble) - exact
    assert_within(error, np.zeros_like(error), bound, "error of " + what)


# --- laws ----------------------------------------------------------------------------------------------------------------------------

@given(problems())
def test_forward_is_its_definition(problem):
    """Eq. (7), and every other map."""
    name, c, x, _ = problem
    wide = x.astype(np.longdouble)
    judge(c.fm.forward(x), rowwise(c.define, wide, c.F), budget(c.forward_roundings, x.dtype, c.forward_size(wide)), name)


@given(problems())
def test_backward_is_the_derivative_of_the_definition(problem):
    """Eq. (7), and every other map."""
    name, c, x, dy = problem
    wide, dwide = x.astype(np.longdouble), dy.astype(np.longdouble)
    size = c.backward_size(dwide, wide)
    judge(c.fm.backward(dy, x), derivative(c.define, dy, x), budget(c.backward_roundings, x.dtype, size), "dx of " + name)


@given(problems(kinks=False))
def test_backward_is_the_transpose(problem):
    _, c, x, dy = problem
    laws.law_backward_is_the_transpose(c.fm, x, dy)
    laws.law_backward_is_linear_in_the_cotangent(c.fm, x, dy)


@given(problems())
def test_the_inner_product_law_holds(problem):
    """⟨dy, J·t⟩ = ⟨Jᵀ·dy, t⟩ with J·t by the complex step of the definition along one direction t for all coordinates at once."""
    name, c, x, dy = problem
    t = np.random.default_rng(x.size).standard_normal(x.shape).astype(np.longdouble)
    wide, h = x.astype(np.longdouble), np.longdouble(1e-200)
    forward = (dy * rowwise(c.define, wide + 1j * h * t, c.F).imag / h).sum()
    size = (c.backward_size(dy.astype(np.longdouble), wide) * np.abs(t)).sum()
    backward = (c.fm.backward(dy, x).astype(np.longdouble) * t).sum()
    sums = gamma(c.backward_roundings + x.size + dy.size + 8, np.longdouble) * size
    judge(backward, forward, budget(c.backward_roundings, x.dtype, size) + sums, name)


@given(problems())
def test_shape_dtype_and_inputs_are_kept(problem):
    _, c, x, dy = problem
    laws.law_keeps_shape_and_dtype(c.fm, x, dy)
    assert feature_size(c.fm, x.shape[-1], x.dtype) == c.F


@given(problems())
def test_rows_keep_to_themselves(problem):
    _, c, x, dy = problem
    laws.law_rows_keep_to_themselves(c.fm, x, dy)


@given(problems(names=NONNEGATIVE))
def test_features_are_nonnegative_where_promised(problem):
    name, c, x, dy = problem
    laws.law_is_nonnegative(c.fm, x, dy)
    if name in ("elu1", "exp", "softmax", "positive_random"):
        assert (c.fm.forward(x) > 0).all()


@given(problems(names=("softmax",)))
def test_softmax_rows_sum_to_one(problem):
    _, c, x, _ = problem
    y = c.fm.forward(x)
    assert_within(y.sum(-1), np.ones(y.shape[:-1]), gamma(3 * x.shape[-1] + 1, x.dtype) * np.ones(y.shape[:-1]))


@given(problems())
def test_another_array_library_gives_the_same_bits(problem):
    _, c, x, dy = problem
    strict_x, strict_dy = array_api_strict.asarray(np.array(x)), array_api_strict.asarray(np.array(dy))
    # A product of a vector of 5 with a matrix was once seen to raise BLAS's flag "invalid"; what counts here are the values
    with np.errstate(invalid="ignore"):
        y, dx = c.fm.forward(strict_x), c.fm.backward(strict_dy, strict_x)
        same_y, same_dx = c.fm.forward(np.array(x)), c.fm.backward(np.array(dy), np.array(x))
    assert type(y) is type(dx) is type(strict_x)
    assert np.isfinite(same_y).all() and np.isfinite(same_dx).all()
    assert np.asarray(y).tobytes() == same_y.tobytes()
    assert np.asarray(dx).tobytes() == same_dx.tobytes()


# --- kernels: φ(q)·φ(k) ---------------------------------------------------------------------------------------------------------------

def dot(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return (q * k).sum(-1)


def dpfp_kernel(nu: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def kernel(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        a, b = (np.maximum(np.concatenate((x, -x), -1), 0) for x in (q, k))
        n = a.shape[-1]
        return sum(a[..., i] * a[..., (i + s) % n] * b[..., i] * b[..., (i + s) % n] for i in range(n) for s in range(1, nu + 1))
    return kernel


INTEGER_KERNELS = {
    "identity": dot,
    "relu": lambda q, k: dot(np.maximum(q, 0), np.maximum(k, 0)),
    "relu2": lambda q, k: dot(np.maximum(q, 0) ** 2, np.maximum(k, 0) ** 2),
    "poly2": lambda q, k: dot(q, k) ** 2,
    "dpfp": dpfp_kernel(1),
    "dpfp3": dpfp_kernel(3),
}


def elu1_kernel(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return sum((1 + np.maximum(q, 0)[..., i] - (q < 0)[..., i] + (q < 0)[..., i] * np.exp(np.minimum(q, 0)[..., i]))
               * np.where(k[..., i] > 0, k[..., i] + 1, np.exp(np.minimum(k[..., i], 0))) for i in range(q.shape[-1]))


# kernel, and the roundings of the two features together
REAL_KERNELS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], float]] = {
    "elu1": (elu1_kernel, 2 * E),
    "exp": (lambda q, k: np.exp(q + k).sum(-1), 2 * E),
    "softmax": (lambda q, k: np.exp(q + k).sum(-1) / (np.exp(q).sum(-1) * np.exp(k).sum(-1)), 2 * (2 * (E + 2 * REACH) + 6)),
    "taylor2": (lambda q, k: 1 + dot(q, k) + dot(q, k) ** 2 / 2, 6),
}


@given(st.sampled_from(sorted(INTEGER_KERNELS)), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_kernels_of_integers_are_exact(name, dtype, seed):
    q, k = np.random.default_rng(seed).integers(-8, 9, (2, 2, 3, 7, 4)).astype(dtype)      # sums stay below 4·8⁴·6 < 2^24
    laws.law_has_kernel(case(name, 4).fm, INTEGER_KERNELS[name], q, k, roundings=0)


@given(st.sampled_from(sorted(REAL_KERNELS)), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_kernels_of_reals_are_within_rounding(name, dtype, seed):
    q, k = np.random.default_rng(seed).uniform(-REACH, REACH, (2, 2, 3, 7, 5)).astype(dtype)
    kernel, roundings = REAL_KERNELS[name]
    laws.law_has_kernel(case(name, 5).fm, kernel, q, k, roundings)


@given(problems(names=("taylor2",)))
def test_taylor2_similarities_are_at_least_one_half(problem):
    _, c, x, _ = problem
    y = c.fm.forward(x)
    k = c.fm.forward(np.ascontiguousarray(-x[..., ::-1]))
    assert ((y * k).sum(-1) >= 0.5 - gamma(c.F + 6, x.dtype) * (np.abs(y) * np.abs(k)).sum(-1)).all()


# --- random features: fixed seeds, and bounds that a right map breaks with the stated probability at most -----------------------------

SEEDS = 1000
Q, K = np.array([0.5, -0.3, 0.2, 0.4]), np.array([0.1, 0.6, -0.2, 0.3])


def estimates(make: Callable[[int], FeatureMap]) -> np.ndarray:
    both = np.stack([Q, K])
    return np.array([float(np.prod(make(seed).forward(both), 0).sum()) for seed in range(SEEDS)])


def test_random_fourier_features_are_unbiased():
    """The estimates are means of cosines in [-1, 1]: Hoeffding's bound, broken with probability 10⁻⁶."""
    F = 8
    found = estimates(lambda seed: random_fourier(4, F, seed, "float64"))
    exact = math.exp(-((Q - K) ** 2).sum() / 2)
    assert abs(found.mean() - exact) <= math.sqrt(2 * math.log(2 / 1e-6) / (SEEDS * F / 2))
    # and their variance is (1 - κ²)²/F: each is a mean, so the variance's own standard error is at most that of a normal variable, times 2
    variance = (1 - exact**2) ** 2 / F
    assert abs(found.var(ddof=1) / variance - 1) <= 6 * 2 * math.sqrt(2 / SEEDS)


def positive_variance(F: int) -> float:
    """Var of one estimate with independent w: (exp(|q + k|²) - 1) exp(2 qᵀk)/F."""
    return float(np.expm1(((Q + K) ** 2).sum()) * np.exp(2 * Q @ K) / F)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_positive_random_features_are_unbiased(orthogonal):
    """Chebyshev's bound at ten standard deviations would be broken with probability 1 %; at these seeds six must do."""
    F = 8
    found = estimates(lambda seed: positive_random(4, F, seed, orthogonal, "float64"))
    assert abs(found.mean() - math.exp(Q @ K)) <= 6 * math.sqrt(positive_variance(F) / SEEDS)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_orthogonal_features_have_a_smaller_error(orthogonal):
    """The error of a mean of F terms f is Var(f)/F + (F - 1)/F · Cov(f, f'): orthogonality helps by a negative covariance, of at most
    -2/(D + 2) · (exp(qᵀk) - exp(-(|q|² + |k|²)/2))² for F ≤ D (Choromanski et al. 2021, theorem 2); independent terms have none.
    The covariance is judged rather than the error itself, whose squares have tails too heavy for a test."""
    D = F = 4
    q = k = np.full(D, math.sqrt(0.75 / D))
    covariances = np.empty(2 * SEEDS)
    for seed in range(len(covariances)):
        fm = positive_random(D, F, seed, orthogonal, "float64")
        f = F * fm.forward(q) * fm.forward(k)
        covariances[seed] = (f.sum() ** 2 - (f**2).sum()) / (F * (F - 1)) - math.exp(2 * q @ k)
    mean, error = covariances.mean(), covariances.std(ddof=1) / math.sqrt(len(covariances))
    if orthogonal:
        assert mean <= -2 / (D + 2) * (math.exp(q @ k) - math.exp(-(q @ q + k @ k) / 2)) ** 2 + 3 * error
        assert mean <= -5 * error
    else:
        assert abs(mean) <= 5 * error


@pytest.mark.parametrize("D", [1, 2, 5])
def test_orthogonal_rows_are_orthogonal_and_gaussian_in_length(D):
    F = 200 * D + 3
    fm = positive_random(D, F, seed=3, dtype="float64")
    W = recovered_weights(fm, D)
    for block in range(0, F, D):
        rows = W[block:block + D]
        lengths = np.linalg.norm(rows, axis=-1)
        gram = rows @ rows.T
        # log and exp return W with an absolute error of E·u·(1 + |W|) or so; QR keeps orthogonality to D² u
        size = (1 + lengths)[:, None] * (1 + lengths)
        assert_within(gram - np.diag(np.diag(gram)), np.zeros_like(gram), gamma(10 * E + 4 * D * D, "float64") * size, "gram")
    squares = (W**2).sum(-1)                                            # chi-square with D degrees of freedom: mean D, variance 2D
    assert abs(squares.mean() - D) <= 5 * math.sqrt(2 * D / F)
    assert squares.std() > math.sqrt(2 * D) / 2                         # lengths of D each would have none
    # Each place of a block is N(0, 1) over the 200 blocks. A QR whose signs are left as LAPACK makes them fails here.
    assert np.abs(W[:200 * D].reshape(200, D, D).mean(0)).max() <= 5 / math.sqrt(200)


def test_random_maps_repeat_with_their_seed_and_differ_without():
    x = np.random.default_rng(0).standard_normal((5, 4))
    for make in (random_fourier, positive_random):
        assert make(4, 6, 1).forward(x).tobytes() == make(4, 6, 1).forward(x).tobytes()
        assert make(4, 6, 1).forward(x).tobytes() != make(4, 6, 2).forward(x).tobytes()
        assert make(4, 6, np.random.default_rng(1)).forward(x).tobytes() == make(4, 6, 1).forward(x).tobytes()


# --- extremes ------------------------------------------------------------------------------------------------------------------------

def extremes(dtype: str, *magnitudes: float) -> np.ndarray:
    values = [sign * m for m in (0.0, 1.0, *magnitudes) for sign in (1, -1)]
    tiny = float(np.finfo(dtype).smallest_subnormal)
    return np.array([[a, b, c, tiny] for a in values for b in values for c in (0.5, values[-1])], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_large_inputs_stay_finite(name, dtype):
    boundless = name in ("elu1", "relu", "identity", "softmax", "positive_random", "positive_random_independent")
    magnitudes = (1000.0, 1e30) if boundless else (80.0,) if name == "exp" else (1000.0,)
    x, c = extremes(dtype, *magnitudes), case(name, 4)
    laws.law_large_inputs_stay_finite(c.fm, x, np.random.default_rng(0).standard_normal((*x.shape[:-1], c.F)).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exp", "relu2", "poly2", "taylor2", "dpfp"])
def test_what_cannot_be_represented_is_inf_and_said(name, dtype):
    x = np.array([[1000.0 if name == "exp" else float(np.finfo(dtype).max) / 2] * 2 + [0.5, -1.0]], dtype)
    with pytest.warns(RuntimeWarning, match="overflow"):
        y = case(name, 4).fm.forward(x)
    assert np.isinf(y).any() and not np.isnan(y).any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert not np.isnan(case(name, 4).fm.backward(np.zeros_like(y), x)).any()
        assert not np.isnan(case(name, 4).fm.backward(np.ones_like(y), x)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_features_keep_their_digits(dtype):
    """Far below 0 elu + 1 is eˣ to its last digits: computed as (eˣ - 1) + 1 it would have none left."""
    x = np.linspace(-80, -3, 78, dtype=dtype)
    exact = np.exp(x.astype(np.longdouble))
    judge(features.elu1_forward(x), exact, budget(E, dtype, exact), "elu1")
    judge(features.elu1_backward(np.ones_like(x), x), exact, budget(E + 1, dtype, exact), "dx of elu1")


def test_derivatives_survive_where_their_factors_do_not():
    """eˣ and 2x are larger than the largest number, their products with dy are not. (Warnings are errors.)"""
    dy = np.array([1e-10], np.float32)
    for backward, x, slope in ((features.exp_backward, np.float32(95), np.exp(np.float64(95))),
                               (features.relu2_backward, np.float32(3e38), 2 * np.float64(np.float32(3e38)))):
        exact = dy.astype(np.float64) * slope
        assert_within(backward(dy, x[None]), exact, gamma(2 * E + 2, "float32") * exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_at_kinks_and_limits(dtype):
    x, dy = np.array([0.0, -0.0, np.inf, -np.inf], dtype), np.array([2.0, 3.0, 5.0, 7.0], dtype)
    for name, y, dx in (("elu1", [1, 1, np.inf, 0], [2, 3, 5, 0]), ("relu", [0, 0, np.inf, 0], [0, 0, 5, 0]),
                        ("identity", [0, 0, np.inf, -np.inf], dy)):
        assert np.array_equal(FEATURE_MAPS[name].forward(x), np.array(y, dtype))
        assert np.array_equal(FEATURE_MAPS[name].backward(dy, x), np.array(dx, dtype))
    for name in ("relu2", "dpfp"):
        zero = np.zeros((2, 4), dtype)
        assert not FEATURE_MAPS[name].backward(np.ones((2, case(name, 4).F), dtype), zero).any()
    assert np.array_equal(FEATURE_MAPS["softmax"].forward(np.array([-np.inf, 1, 1], dtype)), np.array([0, 0.5, 0.5], dtype))


def test_a_shift_of_keys_would_not_cancel():
    """Why `positive_random` subtracts no maximum: scaling a query row leaves the quotient alone, scaling key rows does not."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 5, 4))
    fm = positive_random(4, 16, 0, dtype="float64")
    a, b = fm.forward(q), fm.forward(k)

    def quotient(a, b):
        weights = a @ b.T
        return weights @ v / weights.sum(-1, keepdims=True)

    # F products for each of 5 weights, 5 for the sum, the quotient, and the row's scale: every term is bounded by |v|, since φ ≥ 0
    bound = 2 * gamma(2 * (16 + 5 + 2), "float64") * np.abs(v).max(0) * np.ones((5, 1))
    assert_within(quotient(a / a.max(-1, keepdims=True), b), quotient(a, b), bound)
    assert np.abs(quotient(a, b / b.max(-1, keepdims=True)) - quotient(a, b)).max() > 1e3 * bound.max()


# --- names, sizes and a map of one's own ---------------------------------------------------------------------------------------------

def test_names_stand_for_the_functions_of_the_module():
    for name, fm in FEATURE_MAPS.items():
        assert feature_map(name) is fm is feature_map(fm)
        if name == "dpfp":
            x, dy = np.random.default_rng(0).standard_normal((2, 3, 8))
            assert np.array_equal(fm.forward(x[:, :4]), dpfp(1).forward(x[:, :4]))
            assert np.array_equal(fm.backward(dy, x[:, :4]), dpfp(1).backward(dy, x[:, :4]))
        else:
            assert fm.forward is getattr(features, f"{name}_forward") and fm.backward is getattr(features, f"{name}_backward")
    pair = feature_map((features.exp_forward, features.exp_backward))
    assert isinstance(pair, FeatureMap) and pair == FEATURE_MAPS["exp"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_feature_size_is_the_length_of_forward(dtype):
    for name in NAMES:
        for D in (2, 5):
            assert feature_size(case(name, D).fm, D, dtype) == case(name, D).F
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    assert feature_size(FEATURE_MAPS["poly2"], 3, bfloat16) == 9


def test_no_features_make_no_features():
    for name in FEATURE_MAPS:
        assert feature_size(FEATURE_MAPS[name], 0) == (1 if name == "taylor2" else 0)
        x = np.zeros((3, 0))
        assert FEATURE_MAPS[name].backward(FEATURE_MAPS[name].forward(x), x).shape == (3, 0)


def softplus_forward(x):
    return np.logaddexp(x, np.zeros((), x.dtype))


def softplus_backward(dy, x):
    return dy / (1 + np.exp(-x))


@pytest.mark.parametrize("law", laws.LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_of_ones_own_obeys_the_same_laws(law, dtype):
    x, dy = np.random.default_rng(0).standard_normal((2, 2, 3, 7, 4)).astype(dtype)
    fm = feature_map((softplus_forward, softplus_backward))
    law(fm, x, dy)
    laws.law_is_nonnegative(fm, x, dy)
    laws.law_large_inputs_stay_finite(fm, 10 * x, dy)


def grow(x):
    x *= 2
    return x / 2


BROKEN = [
    (laws.law_keeps_shape_and_dtype, lambda x: softplus_forward(x)[..., :3 if x.size else 4], softplus_backward),
    (laws.law_keeps_shape_and_dtype, grow, lambda dy, x: dy.copy()),
    (laws.law_keeps_shape_and_dtype, lambda x: x, lambda dy, x: dy.copy()),
    (laws.law_keeps_shape_and_dtype, softplus_forward, lambda dy, x: dy),
    (laws.law_keeps_shape_and_dtype, softplus_forward, lambda dy, x: softplus_backward(dy, x)[..., :1]),
    (laws.law_keeps_shape_and_dtype, softplus_forward, lambda dy, x: softplus_backward(dy, x).astype(np.float32)),
    (laws.law_rows_keep_to_themselves, lambda x: x - x.mean(-2, keepdims=True), lambda dy, x: dy - dy.mean(-2, keepdims=True)),
    (laws.law_rows_keep_to_themselves, lambda x: np.exp(x - x.max()), lambda dy, x: dy * np.exp(x - x.max())),
    (laws.law_backward_is_linear_in_the_cotangent, softplus_forward, lambda dy, x: np.abs(dy)),
    (laws.law_backward_is_linear_in_the_cotangent, softplus_forward, lambda dy, x: dy + 1e-300),
    (laws.law_backward_is_the_transpose, softplus_forward, lambda dy, x: softplus_backward(dy, x) * (1 + 1e-9)),
    (laws.law_backward_is_the_transpose, softplus_forward, lambda dy, x: softplus_backward(dy[..., ::-1], x)),
    (laws.law_is_nonnegative, lambda x: np.tanh(x), lambda dy, x: dy / np.cosh(x) ** 2),
    (laws.law_large_inputs_stay_finite, lambda x: np.log(np.maximum(x, 0) + 1), lambda dy, x: dy / np.maximum(x, 0)),
]


@pytest.mark.parametrize("law, forward, backward", BROKEN)
def test_a_broken_map_breaks_its_law(law, forward, backward):
    x, dy = np.random.default_rng(0).standard_normal((2, 2, 3, 7, 4))
    laws_of_the_sound = FeatureMap(softplus_forward, softplus_backward)
    if law is not laws.law_large_inputs_stay_finite:
        law(laws_of_the_sound, x, dy)
    with pytest.raises((AssertionError, FloatingPointError, ValueError)):
        law(FeatureMap(forward, backward), x, dy)


# --- words of errors -----------------------------------------------------------------------------------------------------------------

def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"feature_map: expected one of 'elu1', 'relu', .*'dpfp', got 'elu'"):
        feature_map("elu")


@pytest.mark.parametrize("spec, words", [
    (3, "a name or a pair of functions .* got int"), (None, "got NoneType"), (np.exp, "got ufunc; linear attention needs the derivative too"),
    ((np.exp,), r"got a tuple of \(ufunc\)"), ((np.exp, 3), r"got a tuple of \(ufunc, int\)"), ([np.exp, np.exp], "got list")])
def test_what_is_no_map_is_a_type_error(spec, words):
    with pytest.raises(TypeError, match="feature_map: expected .*" + words):
        feature_map(spec)


@pytest.mark.parametrize("forward, error, words", [
    (lambda x: x.sum(0), ValueError, r"returned the shape \(3,\) for x \(0, 3\), expected \(0, F\)"),
    (lambda x: x.T, ValueError, r"returned the shape \(3, 0\)"),
    (lambda x: x.astype(np.float64), TypeError, "returned float64 for float32"),
    (lambda x: x.tolist(), TypeError, "returned list")])
def test_a_map_that_returns_nonsense_is_told_so(forward, error, words):
    with pytest.raises(error, match="feature_map: forward " + words):
        feature_size(FeatureMap(forward, lambda dy, x: dy), 3, np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_bad_arrays_are_named(name):
    fm, F = case(name, 4).fm, case(name, 4).F
    x, dy = np.ones((2, 4)), np.ones((2, F))
    for bad, error, words in (([[1.0] * 4], TypeError, "x: expected a NumPy or CuPy array, got list"),
                              (np.ones((2, 4), np.float16), TypeError, "x: expected float32 or float64, got float16"),
                              (np.ones((2, 4), int), TypeError, "x: expected float32 or float64, got int64"),
                              (np.ones(()), ValueError, r"x: expected \(\.\.\., D\) with at least 1 axis, got \(\)"),
                              (np.ma.ones((2, 4)), TypeError, "x: expected a plain array, got MaskedArray")):
        with pytest.raises(error, match=words):
            fm.forward(bad)
        with pytest.raises(error, match=words):
            fm.backward(dy, bad)
    for bad, error, words in ((np.ones((3, F)), ValueError, rf"dy: expected the shape of the mapped features \(2, {F}\), got \(3, {F}\)"),
                              (np.ones((2, F + 1)), ValueError, "dy: expected the shape"), (np.ones(F), ValueError, "dy: expected the shape"),
                              (np.ones((2, F), np.float32), TypeError, "dy is float32 and x is float64"),
                              (None, TypeError, "dy: expected an array of the shape of the mapped features, got None"),
                              (array_api_strict.ones((2, F)), TypeError, "array_api_strict array")):
        with pytest.raises(error, match=words):
            fm.backward(bad, x)


def test_bad_sizes_are_named():
    for make in (lambda: dpfp(0), lambda: random_fourier(0, 4, 0), lambda: positive_random(3, 0, 0)):
        with pytest.raises(ValueError, match="expected an integer ≥ 1, got 0"):
            make()
    with pytest.raises(TypeError, match="nu: expected an integer"):
        dpfp(1.5)
    with pytest.raises(ValueError, match="features: expected an even number"):
        random_fourier(3, 5, 0)
    with pytest.raises(ValueError, match=r"x: expected D ≥ 2 features for nu = 3 \(nu ≤ 2D - 1\), got D = 1"):
        dpfp(3).forward(np.ones((2, 1)))
    for make in (random_fourier, positive_random):
        with pytest.raises(ValueError, match=r"x: expected \(\.\.\., D\) = \(\*, 3\), got \(2, 4\)"):
            make(3, 4, 0).forward(np.ones((2, 4)))
        with pytest.raises(TypeError, match="dtype: expected float32 or float64, got float16"):
            make(3, 4, 0, dtype=np.float16)
        with pytest.raises(TypeError, match="x is float32 and the feature map float64"):
            make(3, 4, 0, dtype="float64").forward(np.ones((2, 3), np.float32))
