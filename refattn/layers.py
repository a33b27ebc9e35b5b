"""The layers around attention: each forward with its transpose below it, so that a whole model is a list of calls and that list reversed.

    affine        y = x W + b
    layer norm    y = x̂ ∘ w + b,   x̂ = (x - mean x) / √(var x + eps)
    embedding     y_i = W[token_i]
    positions     y_i = x_i + P[i]
    gelu, relu    y = f(x), elementwise
    feed-forward  y = f(x W_in + b_in) W_out + b_out

Axes   ... any leading axes (batch) · N positions · E model width · F inner width · V vocabulary

Layers of few parameters take them as arrays. Layers made of layers take `params`, a flat dict of arrays, and the `name` in front of
their own keys: `feed_forward_forward(params, "blocks.0.feed_forward", x)` reads `params["blocks.0.feed_forward.in.weight"]`. Their
backward returns the gradients as such a dict. Weights are (in, out): `x @ weight`. float16 and bfloat16 are accumulated in float32
inside each layer, and rounded once on the way out of it.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ._array import Array, accumulator, check_dtypes, check_lengths, check_number, check_shape, dtype_name, namespace
from ._blocks import blocks, over_heads

Params = Mapping[str, Array]
Grads = dict[str, Array]
Residuals = tuple[Any, ...]

# Elements of an elementwise pass: its temporaries stay near the processor. With an eighth of that, two threads wait for one another at the
# interpreter's lock, which each NumPy call takes for a moment, more than they work.
_PIECE = 1 << 18
_BLOCK, _BLOCKS = 400, 8       # a product over many rows is cut into 2, 4 or 8 blocks of 400 rows and more
_GELU_A = 0.044715
_GELU_C = math.sqrt(2 / math.pi)


# --- affine ------------------------------------------------------------------------------------------------------------------------------

def affine_forward(x: Array, weight: Array, bias: Array) -> tuple[Array, Residuals]:
    """y = x W + b, all leading axes in one matrix product.

    Parameters
    ----------
    x : (..., E)
    weight : (E, F)
    bias : (F,)

    Returns
    -------
    out : (..., F)
    residuals : tuple
        For `affine_backward`. Holds x and the weight, copies nothing that is contiguous.

    Raises
    ------
    TypeError
        Mixed dtypes, or a dtype that is not float16, bfloat16, float32 or float64.
    ValueError
        `weight: expected (E, F) = (8, *), got (4, 3): its rows are the features of x`, and the like for the bias.

    Notes
    -----
    2·E·F flops per position. Accumulates in x's dtype, in float32 for float16 and bfloat16, and rounds once to x's dtype.

    Examples
    --------
    >>> out, residuals = affine_forward(np.ones((2, 3)), np.ones((3, 1)), np.array([0.5]))
    >>> out[:, 0].tolist()
    [3.5, 3.5]
    """
    xp = namespace(x=x, weight=weight, bias=bias)
    check_dtypes(x=x, weight=weight, bias=bias)
    _check_features("x", x)
    if weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight: expected (E, F) = ({x.shape[-1]}, *), got {tuple(weight.shape)}: its rows are the features of x")
    check_shape("bias", bias, "(F,)", (weight.shape[1],), "one for each column of the weight")
    rows, W, b = _rows(x), _wide(weight), _wide(bias)
    out = xp.empty((rows.shape[0], W.shape[1]), x.dtype)

    def some(x: Array, out: Array) -> None:
        y = xp.matmul(_wide(x), W, out=out if out.dtype == W.dtype else None)
        y += b
        if y is not out:
            out[...] = y

    _over_rows(xp, some, 2.0 * rows.size * W.shape[1], rows, out)
    return out.reshape(*x.shape[:-1], W.shape[1]), (x, weight)


def affine_backward(dout: Array, residuals: Residuals) -> tuple[Array, Array, Array]:
    """Transpose of `affine_forward`, y = x W + b.

        dx = dy Wᵀ        dW = xᵀ dy        db = Σ dy        sums over all leading axes

    Parameters
    ----------
    dout : (..., F)
        Cotangent of `out`.

    Returns
    -------
    dx : (..., E);  dweight : (E, F);  dbias : (F,)
    """
    x, weight = residuals
    check_dout(dout, (*x.shape[:-1], weight.shape[1]), x)
    xp = namespace(dout=dout)
    d, rows, W = _rows(dout), _rows(x), _wide(weight)
    dx = xp.empty(rows.shape, x.dtype)

    def some(d: Array, x: Array, dx: Array) -> tuple[Array, Array]:
        d = _wide(d)
        y = xp.matmul(d, W.T, out=dx if dx.dtype == W.dtype else None)
        if y is not dx:
            dx[...] = y
        return _wide(x).T @ d, d.sum(0)

    dweight, dbias = _over_rows(xp, some, 4.0 * rows.size * W.shape[1], d, rows, dx)
    return dx.reshape(x.shape), _narrow(dweight, x), _narrow(dbias, x)


# --- layer norm --------------------------------------------------------------------------------------------------------------------------

def layer_norm_forward(x: Array, weight: Array, bias: Array, *, eps: float = 1e-5) -> tuple[Array, Residuals]:
    """Normalise the features of each position (Ba, Kiros and Hinton, 2016).

        y = x̂ ∘ w + b        x̂ = (x - μ) r        μ = mean x        r = 1/√(mean (x - μ)² + eps)

    Parameters
    ----------
    x : (..., E)
    weight, bias : (E,)
    eps : float
        Added to the variance; ≥ 0. With 0 a constant row divides by zero.

    Returns
    -------
    out : (..., E)
    residuals : tuple
        For `layer_norm_backward`: x̂ and r.

    Raises
    ------
    TypeError, ValueError
        Mixed dtypes; `weight: expected (E,) = (8,), got (4,): one for each feature of x`.

    Notes
    -----
    About eight passes over x; one array of x's size is kept. The variance is of the centred values (two passes): no cancellation.

    Examples
    --------
    >>> out, residuals = layer_norm_forward(np.array([[1.0, 3.0]]), np.ones(2), np.zeros(2), eps=0)
    >>> out.tolist()
    [[-1.0, 1.0]]
    """
    xp = namespace(x=x, weight=weight, bias=bias)
    check_dtypes(x=x, weight=weight, bias=bias)
    _check_features("x", x)
    check_shape("weight", weight, "(E,)", x.shape[-1:], "one for each feature of x")
    check_shape("bias", bias, "(E,)", x.shape[-1:], "one for each feature of x")
    eps = check_number("eps", eps, least=0)
    rows, w, b = _rows(x), _wide(weight), _wide(bias)
    out, normal, rate = xp.empty(rows.shape, x.dtype), xp.empty(rows.shape, w.dtype), xp.empty((rows.shape[0], 1), w.dtype)

    def some(x: Array, out: Array, normal: Array, rate: Array) -> None:
        x = _wide(x)
        xp.subtract(x, _row_mean(xp, x), out=normal)
        y = xp.multiply(normal, normal)
        xp.sqrt(_row_mean(xp, y) + eps, out=rate)
        xp.divide(1, rate, out=rate)
        normal *= rate
        xp.multiply(normal, w, out=y)
        xp.add(y, b, out=y if out.dtype != y.dtype else out)
        if out.dtype != y.dtype:
            out[...] = y

    _over_rows(xp, some, 8.0 * rows.size, rows, out, normal, rate, piece=_PIECE // max(x.shape[-1], 1) + 1)
    return out.reshape(x.shape), (normal.reshape(x.shape), rate, weight)


def layer_norm_backward(dout: Array, residuals: Residuals) -> tuple[Array, Array, Array]:
    """Transpose of `layer_norm_forward`, y = x̂ ∘ w + b, x̂ = (x - μ) r.

        dw = Σ dy ∘ x̂        db = Σ dy        over all leading axes
        dx̂ = dy ∘ w
        dx = r (dx̂ - mean dx̂ - x̂ mean(dx̂ ∘ x̂))

    The last line: the Jacobian of x ↦ x̂ is r (I - 1 1ᵀ/E - x̂ x̂ᵀ/E), which is symmetric. It stays so with eps, since
    ∂r/∂x = -r² x̂/E whatever eps is.

    Parameters
    ----------
    dout : (..., E)

    Returns
    -------
    dx : (..., E);  dweight, dbias : (E,)
    """
    normal, rate, weight = residuals
    check_dout(dout, normal.shape, weight)
    xp = namespace(dout=dout)
    d, w = _rows(dout), _wide(weight)
    dx = xp.empty(d.shape, d.dtype)

    def some(d: Array, normal: Array, rate: Array, dx: Array) -> tuple[Array, Array]:
        d = _wide(d)
        product = d * normal
        dw, db = product.sum(0), d.sum(0)
        product *= w
        inner = _row_mean(xp, product)
        y = xp.multiply(d, w, out=dx if dx.dtype == w.dtype else None)
        y -= _row_mean(xp, y)
        y -= xp.multiply(normal, inner, out=product)
        y *= rate
        if y is not dx:
            dx[...] = y
        return dw, db

    dweight, dbias = _over_rows(xp, some, 10.0 * d.size, d, _rows(normal), rate, dx, piece=_PIECE // max(d.shape[1], 1) + 1)
    return dx.reshape(dout.shape), _narrow(dweight, dout), _narrow(dbias, dout)


# --- embedding and positions -------------------------------------------------------------------------------------------------------------

def embedding_forward(tokens: Array, weight: Array) -> tuple[Array, Residuals]:
    """y_i = W[token_i].

    Parameters
    ----------
    tokens : (...) integers, 0 ≤ token < V
    weight : (V, E)

    Returns
    -------
    out : (..., E)
    residuals : tuple
        For `embedding_backward`.

    Raises
    ------
    TypeError
        `tokens: expected integers, got float64`.
    ValueError
        `tokens: expected 0 ≤ token < V = 10, got values from -1 to 3`. A negative token does not count from the end.

    Examples
    --------
    >>> embedding_forward(np.array([1, 1]), np.array([[1.0], [2.0]]))[0].tolist()
    [[2.0], [2.0]]
    """
    xp = namespace(tokens=tokens, weight=weight)
    check_dtypes(weight=weight)
    if weight.ndim != 2:
        raise ValueError(f"weight: expected (V, E), got {tuple(weight.shape)}")
    check_indices("tokens", tokens, weight.shape[0], "token", "V")
    return xp.take(weight, tokens, axis=0), (tokens, weight)


def embedding_backward(dout: Array, residuals: Residuals) -> Array:
    """Transpose of `embedding_forward`: dW[t] = Σ_{i: token_i = t} dy_i. Tokens are integers and have no cotangent.

    Sorted by token, so that the sums are sums of neighbours: several times faster than `np.add.at`.

    Parameters
    ----------
    dout : (..., E)

    Returns
    -------
    dweight : (V, E)
    """
    tokens, weight = residuals
    check_dout(dout, (*tokens.shape, weight.shape[1]), weight)
    xp = namespace(dout=dout)
    dweight = xp.zeros(weight.shape, accumulator(weight.dtype))
    flat = tokens.reshape(-1)
    if flat.shape[0]:
        order = xp.argsort(flat, kind="stable")
        flat = flat[order]
        first = xp.flatnonzero(xp.concatenate([xp.ones(1, bool), flat[1:] != flat[:-1]]))
        dweight[flat[first]] = xp.add.reduceat(_rows(_wide(dout))[order], first, axis=0)
    return _narrow(dweight, weight)


def positions_forward(x: Array, weight: Array, *, start: int = 0) -> tuple[Array, Residuals]:
    """Add learned positions: y_i = x_i + P[start + i].

    Parameters
    ----------
    x : (..., N, E)
    weight : (length, E)
        P, one row for each position there can be.
    start : int
        Position of x's first row: what a decoder has already seen.

    Returns
    -------
    out : (..., N, E)
    residuals : tuple
        For `positions_backward`.

    Raises
    ------
    ValueError
        `x: expected at most length = 64 positions, got positions up to 65: …`

    Examples
    --------
    >>> positions_forward(np.zeros((2, 1)), np.array([[1.0], [2.0], [3.0]]), start=1)[0].tolist()
    [[2.0], [3.0]]
    """
    namespace(x=x, weight=weight)
    check_dtypes(x=x, weight=weight)
    if x.ndim < 2:
        raise ValueError(f"x: expected (..., N, E), got {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected (length, E) = (*, {x.shape[-1]}), got {tuple(weight.shape)}: one row for each position")
    if start < 0 or start + x.shape[-2] > weight.shape[0]:
        raise ValueError(f"x: expected at most length = {weight.shape[0]} positions, got positions up to {start + x.shape[-2]}: "
                         "shorten the sequence or initialise a model of greater length")
    rows = slice(start, start + x.shape[-2])
    return _narrow(_wide(x) + _wide(weight[rows]), x), (rows, weight)


def positions_backward(dout: Array, residuals: Residuals) -> tuple[Array, Array]:
    """Transpose of `positions_forward`, y_i = x_i + P[start + i]: dx = dy, dP[start + i] = Σ dy_i over the leading axes.

    Parameters
    ----------
    dout : (..., N, E)

    Returns
    -------
    dx : (..., N, E);  dweight : (length, E)
    """
    rows, weight = residuals
    check_dout(dout, (*dout.shape[:-2], rows.stop - rows.start, weight.shape[1]), weight)
    dweight = namespace(dout=dout).zeros(weight.shape, accumulator(weight.dtype))
    dweight[rows] = _wide(dout).sum(tuple(range(dout.ndim - 2)))
    return dout.copy(), _narrow(dweight, weight)


def sinusoidal_positions(n: int, width: int, dtype: Any = np.float32, *, start: int = 0) -> np.ndarray:
    """Positions that need no parameters (Vaswani et al., 2017, §3.5).

        P[p, 2i] = sin(p / 10000^(2i/E))        P[p, 2i + 1] = cos(p / 10000^(2i/E))        p = start … start + n - 1

    Parameters
    ----------
    n, width : int
        Positions and features E; an odd E drops the last cosine.
    dtype
        Computed in float64, rounded once.

    Returns
    -------
    positions : (n, width)

    Examples
    --------
    >>> sinusoidal_positions(1, 4, np.float64).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    angle = np.arange(start, start + n)[:, None] / 10000.0 ** (np.arange(0, width, 2) / max(width, 1))
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(n, angle.shape[1] * 2)[:, :width].astype(dtype)


# --- gelu and relu -----------------------------------------------------------------------------------------------------------------------

def gelu_forward(x: Array) -> tuple[Array, Residuals]:
    """The Gaussian error linear unit in its tanh form (Hendrycks and Gimpel, 2016, §2), which NumPy can compute without an erf.

        y = ½ x (1 + t)        t = tanh(c (x + a x³))        c = √(2/π), a = 0.044715

    It differs from x Φ(x) by less than 5e-4. The derivative is the exact one of this form, not that of x Φ(x).

    Parameters
    ----------
    x : (...)

    Returns
    -------
    out : (...)
    residuals : tuple
        For `gelu_backward`: the slope dy/dx, made in the same pass, while x is in the cache.

    Notes
    -----
    In pieces that stay in the cache, shared among threads. Where a square would overflow, tanh has long been ±1 and y is x or 0.

    Examples
    --------
    >>> gelu_forward(np.array([-30.0, 0.0, 30.0]))[0].tolist()
    [-0.0, 0.0, 30.0]
    """
    xp = namespace(x=x)
    check_dtypes(x=x)
    wide = _wide(x).reshape(-1)
    out, slope = xp.empty_like(wide), xp.empty_like(wide)

    def piece(x: Array, y: Array, slope: Array) -> None:
        bounded = xp.clip(x, -100, 100)             # tanh is ±1 from 10 on; the squares below then stay finite in every dtype
        square = bounded * bounded
        t = square * (_GELU_C * _GELU_A)            # t = tanh(x (c + c a x²))
        t += _GELU_C
        t *= bounded
        xp.tanh(t, out=t)
        half = xp.add(t, 1, out=y)                  # ½ (1 + t)
        half *= 0.5
        square *= 3 * _GELU_C * _GELU_A             # dy/dx = ½ (1 + t) + ½ (1 + t) x (1 - t) (c + 3 c a x²)
        square += _GELU_C
        square *= bounded
        xp.subtract(1, t, out=t)
        square *= t
        square += 1
        xp.multiply(square, half, out=slope)
        y *= x

    _over_rows(xp, piece, 20.0 * wide.size, wide, out, slope, piece=_PIECE)
    return _narrow(out, x).reshape(x.shape), (_narrow(slope, x).reshape(x.shape),)


def gelu_backward(dout: Array, residuals: Residuals) -> Array:
    """Transpose of `gelu_forward`, y = ½ x (1 + t): dx = dy · slope.

        slope = ½ (1 + t) + ½ x (1 - t²) c (1 + 3 a x²)        since t' = (1 - t²) c (1 + 3 a x²)

    Parameters
    ----------
    dout : (...)

    Returns
    -------
    dx : (...)
    """
    slope, = residuals
    check_dout(dout, slope.shape, slope)
    return _narrow(_wide(dout) * _wide(slope), dout)


def relu_forward(x: Array) -> tuple[Array, Residuals]:
    """y = max(x, 0).

    Parameters
    ----------
    x : (...)

    Returns
    -------
    out : (...)
    residuals : tuple
        For `relu_backward`.

    Examples
    --------
    >>> relu_forward(np.array([-1.0, 2.0]))[0].tolist()
    [0.0, 2.0]
    """
    xp = namespace(x=x)
    check_dtypes(x=x)
    out = xp.maximum(x, xp.zeros((), x.dtype))
    return out, (out,)


def relu_backward(dout: Array, residuals: Residuals) -> Array:
    """Transpose of `relu_forward`, y = max(x, 0): dx = dy where x > 0, else 0 (also at 0, whatever dy holds there)."""
    out, = residuals
    check_dout(dout, out.shape, out)
    xp = namespace(dout=dout)
    if xp is not np:
        return xp.where(out > 0, dout, xp.zeros((), dout.dtype))
    d, dx, bits = dout.reshape(-1), np.empty(out.size, dout.dtype), f"i{dout.itemsize}"

    def piece(d: Array, y: Array, dx: Array) -> None:
        keep = np.negative((y > 0).view(np.int8)).astype(bits)          # all bits or none: no branch, and no 0·NaN
        np.bitwise_and(d.view(bits), keep, out=dx.view(bits))

    _over_rows(np, piece, 4.0 * dx.size, d, out.reshape(-1), dx, piece=_PIECE)
    return dx.reshape(out.shape)


ACTIVATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gelu": (gelu_forward, gelu_backward), "relu": (relu_forward, relu_backward)}


# --- feed-forward ------------------------------------------------------------------------------------------------------------------------

def feed_forward_forward(params: Params, name: str, x: Array, *, activation: str = "gelu") -> tuple[Array, Residuals]:
    """y = f(x W_in + b_in) W_out + b_out, for each position alone.

    Parameters
    ----------
    params : dict
        Holds `{name}.in.weight` (E, F), `{name}.in.bias` (F,), `{name}.out.weight` (F, E), `{name}.out.bias` (E,).
    x : (..., E)
    activation : "gelu" or "relu"

    Returns
    -------
    out : (..., E)
    residuals : tuple
        For `feed_forward_backward`.

    Raises
    ------
    ValueError
        `params: expected a key 'x.in.weight', found none; …` and `activation: expected 'gelu' or 'relu', got 'elu'`.

    Notes
    -----
    4·E·F flops per position. Keeps two arrays (..., F).

    Examples
    --------
    >>> params = {"f.in.weight": np.eye(2), "f.in.bias": np.zeros(2), "f.out.weight": np.eye(2), "f.out.bias": np.ones(2)}
    >>> feed_forward_forward(params, "f", np.array([-1.0, 1.0]), activation="relu")[0].tolist()
    [1.0, 2.0]
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    inner, r_in = affine_forward(x, *affine_params(params, f"{name}.in"))
    inner, r_activation = ACTIVATIONS[activation][0](inner)
    out, r_out = affine_forward(inner, *affine_params(params, f"{name}.out"))
    return out, (name, activation, r_in, r_activation, r_out)


def feed_forward_backward(dout: Array, residuals: Residuals) -> tuple[Array, Grads]:
    """Transpose of `feed_forward_forward`: its three lines, last one first.

    Parameters
    ----------
    dout : (..., E)

    Returns
    -------
    dx : (..., E)
    grads : dict
        Under the keys that the forward read.
    """
    name, activation, r_in, r_activation, r_out = residuals
    grads: Grads = {}
    dinner, grads[f"{name}.out.weight"], grads[f"{name}.out.bias"] = affine_backward(dout, r_out)
    dinner = ACTIVATIONS[activation][1](dinner, r_activation)
    dx, grads[f"{name}.in.weight"], grads[f"{name}.in.bias"] = affine_backward(dinner, r_in)
    return dx, grads


# --- what they share ---------------------------------------------------------------------------------------------------------------------

def affine_params(params: Params, name: str) -> tuple[Array, Array]:
    """`{name}.weight` and `{name}.bias`, with a clear word where one is missing."""
    for key in (f"{name}.weight", f"{name}.bias"):
        if key not in params:
            raise ValueError(f"params: expected a key {key!r}, found none; initialise or load the parameters of this very configuration")
    return params[f"{name}.weight"], params[f"{name}.bias"]


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(repr(choice) for choice in choices)}, got {value!r}")


def check_indices(name: str, indices: Array, count: int, word: str, symbol: str, where: Array = None) -> None:
    """Raise unless all `indices` are integers from 0 to count - 1; with `where`, only those where it is true are looked at."""
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {indices.dtype.name}")
    looked_at = indices if where is None else indices[where]
    if looked_at.size and (looked_at.min() < 0 or looked_at.max() >= count):
        raise ValueError(f"{name}: expected 0 ≤ {word} < {symbol} = {count}, got values from {looked_at.min()} to {looked_at.max()}")


def real_positions(xp: Any, name: str, lengths: Any, shape: tuple[int, ...]) -> Array | None:
    """True where a position of `shape` (..., N) is not padding; None without lengths."""
    given = check_lengths(name, lengths, tuple(shape[:-1]), shape[-1], "N")
    return None if given is None else xp.arange(shape[-1]) < xp.asarray(given)[..., None]


def keep_real(xp: Any, real: Array | None, x: Array) -> Array:
    """x with zeros in padded rows, chosen and not multiplied, since 0·NaN is NaN."""
    return x if real is None else xp.where(real.reshape(real.shape + (1,) * (x.ndim - real.ndim)), x, xp.zeros((), x.dtype))


def check_dout(dout: Array, shape: tuple[int, ...], like: Array) -> None:
    """`dout` has the shape of the output, which the forward did not keep, and the dtype of `like`."""
    namespace(dout=dout, output=like)
    check_shape("dout", dout, "the shape of the output", shape, "a cotangent is shaped like its output")
    if dout.dtype != like.dtype:
        raise TypeError(f"dout is {dtype_name(dout)} and its output is {dtype_name(like)}; cast the cotangent, nothing is cast silently")


def _wide(x: Array) -> Array:
    return x.astype(accumulator(x.dtype), copy=False)


def _narrow(x: Array, like: Array) -> Array:
    return x.astype(like.dtype, copy=False)


def _rows(x: Array) -> Array:
    """(..., E) as a matrix; reshape(-1, E) would not know how many rows an array without elements has."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _row_mean(xp: Any, x: Array) -> Array:
    """Means of the rows of a matrix as a product with ones, three times faster than a sum over the last axis."""
    return (x @ xp.ones((x.shape[-1], 1), x.dtype)) / max(x.shape[-1], 1)


def _over_rows(xp: Any, work: Callable[..., Any], flops: float, *arrays: Array, piece: int | None = None) -> Any:
    """`work` on a few blocks of rows of all arrays, on as many threads as there are; the sums of the arrays that it returns, if any.

    Blocks are the same whatever the number of threads, and sums over them are in order: so are the results. Each block has one BLAS thread:
    faster than BLAS's own threads on matrices of many rows and few columns, and much faster where something else uses the cores.
    `piece`: cut blocks into pieces of so many rows, whose temporaries stay in the cache. Where arrays are not NumPy's, one block is best.
    """
    n = arrays[0].shape[0]
    count = min(_BLOCKS, 1 << max(n // (piece or _BLOCK), 1).bit_length() - 1) if xp is np else 1      # as many for each thread
    size = max(-(-n // count), 1)
    results: list[Any] = [None] * max(-(-n // size), 1)

    def block(index: int, *arrays: Array) -> None:
        cuts = blocks(arrays[0].shape[0], piece) if piece and xp is np else []
        parts = [work(*(x[rows] for x in arrays)) for rows in cuts] or [work(*arrays)]
        results[index] = _sum(parts)

    if len(results) == 1:
        block(0, *arrays)
    else:
        over_heads(block, [[i, *(x[rows] for x in arrays)] for i, rows in enumerate(blocks(n, size))], flops)
    return _sum(results)


def _sum(parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:] if total is not None else ():
        for into, term in zip(total, part, strict=True):
            into += term
    return total


def _check_features(name: str, x: Array) -> None:
    if x.ndim < 1:
        raise ValueError(f"{name}: expected (..., E), got (): a layer needs at least the axis of features")
