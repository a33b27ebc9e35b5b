"""The Bi-LSTM that the paper's speech experiment compares with (3 layers of 320 in table 3), with its backward through time.

    a_t = x_t W_in + b + h_{t-1} W_hidden                       (4H) numbers, in the order i, f, o, g
    i, f, o = σ(a_t[:3H])        g = tanh(a_t[3H:])             σ(a) = 1/(1 + e^{-a})
    c_t = f ∘ c_{t-1} + i ∘ g                                   Hochreiter and Schmidhuber (1997), with the forget gate
    h_t = o ∘ tanh c_t                                          of Gers, Schmidhuber and Cummins (2000), no peepholes

and its transpose, from the last position to the first. dh_t and dc_t begin with what the outputs and the final state are held responsible for:

    dc_t += dh_t ∘ o ∘ (1 - tanh² c_t)
    da_t = [dc_t ∘ g ∘ i (1 - i),   dc_t ∘ c_{t-1} ∘ f (1 - f),   dh_t ∘ tanh c_t ∘ o (1 - o),   dc_t ∘ i ∘ (1 - g²)]
    dc_{t-1} += dc_t ∘ f        dh_{t-1} += da_t W_hiddenᵀ
    dW_hidden = Σ h_{t-1}ᵀ da_t        dW_in = Σ x_tᵀ da_t        db = Σ da_t        dx_t = da_t W_inᵀ

docs/derivations/lstm.md derives this.

Axes   ... any leading axes, together B sequences · N positions · E features of x · H features of h and c · L layers

| function                                | reads                        | for                                                        |
|-----------------------------------------|------------------------------|------------------------------------------------------------|
| lstm_forward, lstm_backward, lstm_step  | one layer, one direction     | training; one position of it                               |
| bilstm_forward, bilstm_backward         | L layers, both directions    | training; the output is [→, ←], 2H features a position     |

Sequences are packed: sorted by length, longest first, and written position after position, so that position t of all that have one is a block of
rows. Padding is in no block: it is neither read nor computed, and a sequence that has ended keeps its state. The other direction is the
same loop over sequences that are read from their own ends. For float16 and bfloat16 everything is float32 from the first layer to the last,
the states too; what comes out is rounded once.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ._array import Array, accumulator, cast, check_cotangent, check_dtypes, check_lengths, check_positive, check_shape, dtype_name, namespace
from ._blocks import over_heads
from .layers import Grads, Params, Residuals, affine_backward, affine_forward, affine_params

_DIRECTIONS = ("forward", "backward")


class LSTMState(NamedTuple):
    """What the positions so far leave behind: h and c, (..., H) each, for `bilstm_*` (L, 2, ..., H). Never changed in place.

    In the dtype that sums are kept in: float32 for float16 and bfloat16.
    """

    h: Array
    c: Array


# --- parameters --------------------------------------------------------------------------------------------------------------------------

def lstm_init(rng: np.random.Generator, name: str, width: int, hidden: int, dtype: Any = np.float32) -> Grads:
    """Parameters of one layer and direction to start training from.

    Weights are normal with variance 1/(rows). Biases are zero, but one for the forget gate, which then starts nearly open: σ(1) = 0.73.

    Parameters
    ----------
    rng : numpy.random.Generator
        Drawn from in float64 whatever the dtype: one seed gives one model, rounded.
    name : str
        In front of the keys.
    width, hidden : int
        E and H.
    dtype

    Returns
    -------
    params : dict
        `{name}.in.weight` (E, 4H), `{name}.in.bias` (4H,), `{name}.hidden.weight` (H, 4H); columns in the order i, f, o, g.

    Raises
    ------
    ValueError, TypeError
        `hidden: expected an integer ≥ 1, got 0`.

    Examples
    --------
    >>> {key: p.shape for key, p in lstm_init(np.random.default_rng(0), "a", 5, 2).items()}
    {'a.in.weight': (5, 8), 'a.in.bias': (8,), 'a.hidden.weight': (2, 8)}
    """
    E, H = check_positive("width", width), check_positive("hidden", hidden)
    bias = np.zeros(4 * H, dtype)
    bias[H:2 * H] = 1
    return {f"{name}.in.weight": (rng.standard_normal((E, 4 * H)) / math.sqrt(E)).astype(dtype), f"{name}.in.bias": bias,
            f"{name}.hidden.weight": (rng.standard_normal((H, 4 * H)) / math.sqrt(H)).astype(dtype)}


def bilstm_init(rng: np.random.Generator, name: str, width: int, hidden: int, dtype: Any = np.float32, *, layers: int) -> Grads:
    """Parameters of L layers in both directions to start training from: those of `lstm_init`, one after the other.

    Parameters
    ----------
    rng, name, width, hidden, dtype
        As in `lstm_init`; E is the width of the first layer, that of the others is 2H.
    layers : int
        L.

    Returns
    -------
    params : dict
        Keys of `lstm_init` under `{name}.{layer}.forward` and `{name}.{layer}.backward`.

    Examples
    --------
    >>> params = bilstm_init(np.random.default_rng(0), "a", 40, 320, layers=3)
    >>> sum(p.size for p in params.values()), params["a.2.backward.in.weight"].shape
    (5844480, (640, 1280))
    """
    params: Grads = {}
    for i in range(check_positive("layers", layers)):
        for direction in _DIRECTIONS:
            params |= lstm_init(rng, f"{name}.{i}.{direction}", width if i == 0 else 2 * hidden, hidden, dtype)
    return params


# --- one layer, one direction ------------------------------------------------------------------------------------------------------------

def lstm_forward(params: Params, name: str, x: Array, state: LSTMState | None = None, *, lengths: Any = None,
                 reverse: bool = False) -> tuple[Array, LSTMState, Residuals]:
    """h_t = o ∘ tanh c_t,  c_t = f ∘ c_{t-1} + i ∘ g,  with the gates of a_t = x_t W_in + b + h_{t-1} W_hidden; for all positions.

    Parameters
    ----------
    params : dict
        Holds the keys of `lstm_init`.
    name : str
        In front of the keys.
    x : (..., N, E)
    state : LSTMState, optional
        h and c (..., H) before the first position that is read, in the dtype that sums are kept in; zeros where there is none.
    lengths : integers (...), optional
        How many positions of each sequence are real. Padded rows of `out` are zeros; what padding holds (NaN too) is not read.
    reverse : bool
        Read each sequence from its own last position to its first.

    Returns
    -------
    out : (..., N, H)
        h_t in x's dtype.
    state : LSTMState
        Behind the last position that was read: of a sequence without positions the one that came in.
    residuals : tuple
        For `lstm_backward`.

    Raises
    ------
    TypeError
        Mixed dtypes, or a state that is not in the dtype that sums are kept in.
    ValueError
        `x: expected (..., N, E), got (3,)`; `params['a.hidden.weight']: expected (H, 4H) = (2, 8), got (2, 6): …`; `state.h: expected
        (..., H) = (5, 2), got (2,): …`; a missing key of params; lengths that are not from 0 to N.

    Notes
    -----
    8·H·(E + H) flops for each real position, and 7·H + E numbers kept. The projections of x are one product for all positions; only
    h W_hidden waits for the position before. Each step has one BLAS thread: its product is too small for more.

    Examples
    --------
    >>> params = {"a.in.weight": np.zeros((1, 4)), "a.in.bias": np.array([40.0, 40.0, 40.0, 1.0]), "a.hidden.weight": np.zeros((1, 4))}
    >>> out, state, residuals = lstm_forward(params, "a", np.zeros((3, 1)))     # all gates open: c adds up tanh 1
    >>> np.round(state.c / np.tanh(1), 5).tolist()
    [3.0]
    """
    xp, plan, weights = _checked(params, name, x, lengths)
    state = _state(xp, state, (*plan.lead, weights[2].shape[0]), x, "(..., H)")
    X = _pack(xp, x, plan, reverse)
    (run,), r_in = _layer_forward(xp, [X], [weights], [_sort(state, plan)], plan)
    out = cast(_unpack(xp, run.h[plan.B:], x.shape[:-1], plan, reverse), x.dtype)
    return out, _final(xp, run, plan), (name, plan, reverse, x.shape, x.dtype, weights, run, r_in[0])


def lstm_backward(dout: Array | None, dstate: LSTMState | None, residuals: Residuals) -> tuple[Array, LSTMState, Grads]:
    """Transpose of `lstm_forward`, last position first.

        dc_t += dh_t ∘ o ∘ (1 - tanh² c_t)
        da_t = [dc_t ∘ g ∘ i (1 - i),  dc_t ∘ c_{t-1} ∘ f (1 - f),  dh_t ∘ tanh c_t ∘ o (1 - o),  dc_t ∘ i ∘ (1 - g²)]
        dc_{t-1} += dc_t ∘ f        dh_{t-1} += da_t W_hiddenᵀ
        dW_hidden = Σ h_{t-1}ᵀ da_t        dW_in = Σ x_tᵀ da_t        db = Σ da_t        dx_t = da_t W_inᵀ

    Parameters
    ----------
    dout : (..., N, H)
        Cotangent of `out`; padded rows are not read. None counts as zero.
    dstate : LSTMState
        Cotangents of the final h and c (..., H). None, also for one of the two, counts as zero.

    Returns
    -------
    dx : (..., N, E)
        Zeros in padded rows.
    dstate : LSTMState
        Of the state that came in, zeros or not.
    grads : dict
        Under the keys that the forward read.

    Raises
    ------
    ValueError, TypeError
        Cotangents that are not shaped like their outputs, or not of their dtype.

    Notes
    -----
    About twice the flops of the forward; the sums over positions are one product each. Residuals are only read.

    Examples
    --------
    >>> params = lstm_init(np.random.default_rng(0), "a", 3, 2)
    >>> out, state, residuals = lstm_forward(params, "a", np.ones((5, 3), np.float32))
    >>> dx, dstate, grads = lstm_backward(np.ones_like(out), None, residuals)
    >>> dx.shape, dstate.c.shape, list(grads) == list(params)
    ((5, 3), (2,), True)
    """
    name, plan, reverse, shape, dtype, weights, run, r_in = residuals
    xp, H = namespace(h=run.h), run.h.shape[1]
    _check_dout(xp, dout, (*shape[:-1], H), dtype)
    dstate = _dstate(xp, dstate, (*plan.lead, H), run.h.dtype)
    packed = None if dout is None else _pack(xp, dout, plan, reverse)
    (dX,), (start,), (dweights,) = _layer_backward(xp, [packed], [_sort(dstate, plan)], [weights], [run], [r_in], plan)
    dx = cast(_unpack(xp, dX, shape[:-1], plan, reverse), dtype)
    return dx, _scatter(xp, start, plan), _named(name, dweights, dtype)


def lstm_step(params: Params, name: str, x_t: Array, state: LSTMState | None = None) -> tuple[Array, LSTMState]:
    """One position of `lstm_forward`: c = f ∘ c + i ∘ g, h = o ∘ tanh c.

    Parameters
    ----------
    params, name
        As in `lstm_forward`.
    x_t : (..., E)
    state : LSTMState, optional
        From `lstm_forward` or the step before; None where there is no past. It is left as it was.

    Returns
    -------
    out_t : (..., H)
    state : LSTMState

    Notes
    -----
    8·H·(E + H) flops; time and memory do not depend on how many positions came before.

    Examples
    --------
    >>> params = lstm_init(np.random.default_rng(0), "a", 3, 2)
    >>> out_t, state = lstm_step(params, "a", np.ones((5, 3), np.float32))
    >>> bool((out_t == state.h).all())
    True
    """
    xp = namespace(x_t=x_t)
    if x_t.ndim < 1:
        raise ValueError("x_t: expected (..., E), got ()")
    W, b, U = _weights(params, name, x_t, x_t.shape[-1])
    H = U.shape[0]
    state = _state(xp, state, (*x_t.shape[:-1], H), x_t, "(..., H)")
    rows = math.prod(x_t.shape[:-1])
    gates, _ = affine_forward(cast(x_t, U.dtype).reshape(rows, x_t.shape[-1]), W, b)
    gates += state.h.reshape(rows, H) @ U
    h, c, tanh = (xp.empty((rows, H), U.dtype) for _ in range(3))
    _cell_forward(xp, gates, state.c.reshape(rows, H), h, c, tanh)
    h, c = h.reshape(state.h.shape), c.reshape(state.h.shape)
    return h.astype(x_t.dtype), LSTMState(h, c)                            # a copy: who writes to out_t leaves the state as it is


# --- L layers, both directions -----------------------------------------------------------------------------------------------------------

def bilstm_forward(params: Params, name: str, x: Array, state: LSTMState | None = None, *, layers: int,
                   lengths: Any = None) -> tuple[Array, LSTMState, Residuals]:
    """L times  x ← [lstm(x), lstm(x) from each sequence's own end],  side by side: 2H features a position.

    Parameters
    ----------
    params : dict
        Holds the keys of `bilstm_init`.
    name, x, lengths
        As in `lstm_forward`.
    state : LSTMState, optional
        h and c (L, 2, ..., H): of each layer, for the two directions, before the first position that the direction reads.
    layers : int
        L.

    Returns
    -------
    out : (..., N, 2H)
        Zeros in padded rows.
    state : LSTMState
        (L, 2, ..., H), behind the last position that the direction reads: `state.h[l, 1]` has read the sequence back to its start.
    residuals : tuple
        For `bilstm_backward`.

    Raises
    ------
    ValueError, TypeError
        Those of `lstm_forward`; `layers: expected an integer ≥ 1, got 0`.

    Notes
    -----
    The same numbers as L pairs of `lstm_forward`, which pack and unpack in between, and in float16 and bfloat16 round there. The directions
    run on two threads.

    Examples
    --------
    >>> params = bilstm_init(np.random.default_rng(0), "a", 3, 2, layers=2)
    >>> out, state, residuals = bilstm_forward(params, "a", np.ones((4, 5, 3), np.float32), layers=2)
    >>> out.shape, state.h.shape
    ((4, 5, 4), (2, 2, 4, 2))
    """
    names = [[f"{name}.{i}.{direction}" for direction in _DIRECTIONS] for i in range(check_positive("layers", layers))]
    xp, plan, first = _checked(params, names[0][0], x, lengths)
    H = first[2].shape[0]
    weights = [[_weights(params, one, x, x.shape[-1] if i == 0 else 2 * H, H) for one in pair] for i, pair in enumerate(names)]
    state = _state(xp, state, (layers, 2, *plan.lead, H), x, "(L, 2, ..., H)")
    final = LSTMState(xp.empty_like(state.h), xp.empty_like(state.c))
    X, kept = _pack(xp, x, plan, False), []
    for i in range(layers):
        starts = [_sort(LSTMState(state.h[i, d], state.c[i, d]), plan) for d in range(2)]
        runs, r_in = _layer_forward(xp, [X, X[plan.flip]], weights[i], starts, plan)
        X = xp.empty((X.shape[0], 2 * H), X.dtype)
        X[:, :H], X[:, H:] = runs[0].h[plan.B:], runs[1].h[plan.B:][plan.flip]
        for d, run in enumerate(runs):
            final.h[i, d], final.c[i, d] = _final(xp, run, plan)
        kept.append((names[i], weights[i], runs, r_in))
    return cast(_unpack(xp, X, x.shape[:-1], plan, False), x.dtype), final, (plan, x.shape, x.dtype, kept)


def bilstm_backward(dout: Array | None, dstate: LSTMState | None, residuals: Residuals) -> tuple[Array, LSTMState, Grads]:
    """Transpose of `bilstm_forward`: the same layers, last one first; both directions add to the cotangent of what they read.

    Parameters
    ----------
    dout : (..., N, 2H)
        Padded rows are not read. None counts as zero.
    dstate : LSTMState
        Cotangents of the final h and c (L, 2, ..., H). None, also for one of the two, counts as zero.

    Returns
    -------
    dx : (..., N, E)
    dstate : LSTMState
        Of the state that came in, zeros or not.
    grads : dict
        Under the keys that the forward read, in the order of `bilstm_init`.

    Raises
    ------
    ValueError, TypeError
        Cotangents that are not shaped like their outputs, or not of their dtype.

    Examples
    --------
    >>> params = bilstm_init(np.random.default_rng(0), "a", 3, 2, layers=2)
    >>> out, state, residuals = bilstm_forward(params, "a", np.ones((4, 5, 3), np.float32), layers=2)
    >>> dx, dstate, grads = bilstm_backward(np.ones_like(out), None, residuals)
    >>> dx.shape, dstate.h.shape, list(grads) == list(params)
    ((4, 5, 3), (2, 2, 4, 2), True)
    """
    plan, shape, dtype, kept = residuals
    h = kept[0][2][0].h
    xp, H = namespace(h=h), h.shape[1]
    _check_dout(xp, dout, (*shape[:-1], 2 * H), dtype)
    dstate = _dstate(xp, dstate, (len(kept), 2, *plan.lead, H), h.dtype)
    start = LSTMState(xp.empty_like(dstate.h), xp.empty_like(dstate.c))
    dX = None if dout is None else _pack(xp, dout, plan, False)
    grads: list[Grads] = []
    for i in reversed(range(len(kept))):
        names, weights, runs, r_in = kept[i]
        douts = [None, None] if dX is None else [dX[:, :H], dX[:, H:][plan.flip]]
        ends = [_sort(LSTMState(dstate.h[i, d], dstate.c[i, d]), plan) for d in range(2)]
        dXs, starts, dweights = _layer_backward(xp, douts, ends, weights, runs, r_in, plan)
        dX = dXs[0]
        dX += dXs[1][plan.flip]
        for d in range(2):
            start.h[i, d], start.c[i, d] = _scatter(xp, starts[d], plan)
        grads[:0] = [_named(one, each, dtype) for one, each in zip(names, dweights, strict=True)]
    dx = cast(_unpack(xp, dX, shape[:-1], plan, False), dtype)
    return dx, start, {key: g for each in grads for key, g in each.items()}


# --- the loops ---------------------------------------------------------------------------------------------------------------------------

class _Run(NamedTuple):
    """What one direction of one layer leaves: gates i, f, o, g (R, 4H) and tanh c (R, H) of R packed positions; h and c (B + R, H) with the
    states that came in on top."""

    gates: Array
    tanh: Array
    h: Array
    c: Array


def _layer_forward(xp: Any, X: list[Array], weights: list[Any], starts: list[LSTMState], plan: _Plan) -> tuple[list[_Run], list[Residuals]]:
    """All directions of a layer on packed X (R, E), each with its own weights and sorted states (B, H)."""
    runs, r_in = [], []
    for x, (W, b, U), start in zip(X, weights, starts, strict=True):
        gates, residuals = affine_forward(x, W, b)
        H, rows = U.shape[0], gates.shape[0]
        h, c = (xp.empty((plan.B + rows, H), U.dtype) for _ in range(2))
        h[:plan.B], c[:plan.B] = start
        runs.append(_Run(gates, xp.empty((rows, H), U.dtype), h, c))
        r_in.append(residuals)

    def loop(run: _Run, U: Array) -> None:
        gates, tanh, h, c = run
        product = xp.empty((plan.B, U.shape[1]), U.dtype)
        for now, past, size in plan.steps:
            rows = slice(now.start - plan.B, now.stop - plan.B)
            a = gates[rows]
            a += xp.matmul(h[past], U, out=product[:size])
            _cell_forward(xp, a, c[past], h[now], c[now], tanh[rows])

    _directions(xp, loop, [[run, U] for run, (_, _, U) in zip(runs, weights, strict=True)], plan)
    return runs, r_in


def _cell_forward(xp: Any, a: Array, before: Array, h: Array, c: Array, tanh: Array) -> None:
    """a (b, 4H) becomes the gates; h, c and tanh c (b, H) are written.

    1/(1 + e^{-a}) keeps relative accuracy where σ is small. Where e^{-a} overflows to infinity σ is 0, as it should be.
    """
    H = h.shape[1]
    sigmoids, g = a[:, :3 * H], a[:, 3 * H:]
    xp.tanh(g, out=g)
    xp.negative(sigmoids, out=sigmoids)
    with np.errstate(over="ignore", under="ignore"):
        xp.exp(sigmoids, out=sigmoids)
    sigmoids += 1
    xp.divide(1, sigmoids, out=sigmoids)
    xp.multiply(sigmoids[:, H:2 * H], before, out=c)
    c += xp.multiply(sigmoids[:, :H], g, out=h)
    xp.tanh(c, out=tanh)
    xp.multiply(sigmoids[:, 2 * H:], tanh, out=h)


def _layer_backward(xp: Any, douts: list[Array | None], ends: list[LSTMState], weights: list[Any], runs: list[_Run], r_in: list[Residuals],
                    plan: _Plan) -> tuple[list[Array], list[LSTMState], list[tuple[Array, Array, Array]]]:
    """Transpose of `_layer_forward`: dX, the cotangents of the states that came in, and dW_in, db, dW_hidden, for each direction."""
    items = []
    for dout, end, run in zip(douts, ends, runs, strict=True):
        dh = xp.zeros(run.h.shape, run.h.dtype)
        if dout is not None:
            dh[plan.B:] = dout
        dh[plan.last] += end.h                                             # no row twice: each sequence has one last position
        items.append([run, dh, end.c, xp.empty_like(run.gates), xp.empty((run.h.shape[1], run.gates.shape[1]), run.h.dtype)])

    def loop(run: _Run, dh: Array, dc: Array, da: Array, dU: Array, U: Array) -> None:
        backwards = xp.ascontiguousarray(U.T)                              # once; a transposed operand costs the product at each step
        product, piece = xp.empty((plan.B, U.shape[0]), U.dtype), xp.empty((plan.B, U.shape[1]), U.dtype)
        for now, past, size in reversed(plan.steps):
            rows = slice(now.start - plan.B, now.stop - plan.B)
            _cell_backward(xp, run.gates[rows], run.c[past], run.tanh[rows], dh[now], dc[:size], da[rows], piece[:size])
            into = dh[past]
            into += xp.matmul(da[rows], backwards, out=product[:size])
        xp.matmul(run.h[plan.past].T, da, out=dU)

    _directions(xp, loop, [[*item, U] for item, (_, _, U) in zip(items, weights, strict=True)], plan)
    dXs, starts, dweights = [], [], []
    for (_, dh, dc, da, dU), residuals in zip(items, r_in, strict=True):
        dX, dW, db = affine_backward(da, residuals)
        dXs.append(dX)
        starts.append(LSTMState(dh[:plan.B], dc))
        dweights.append((dW, db, dU))
    return dXs, starts, dweights


def _cell_backward(xp: Any, gates: Array, before: Array, tanh: Array, dh: Array, dc: Array, da: Array, piece: Array) -> None:
    """Transpose of `_cell_forward`: da (b, 4H) is written, dc (b, H) goes from c_t to c_{t-1} in place; `piece` (b, 4H) is scratch."""
    H = dh.shape[1]
    i, f, o, g = (gates[:, k * H:(k + 1) * H] for k in range(4))
    part = piece[:, :H]
    xp.multiply(dh, tanh, out=da[:, 2 * H:3 * H])
    xp.multiply(tanh, tanh, out=part)
    xp.subtract(1, part, out=part)
    part *= o
    part *= dh
    dc += part
    xp.multiply(dc, g, out=da[:, :H])
    xp.multiply(dc, before, out=da[:, H:2 * H])
    xp.multiply(dc, i, out=da[:, 3 * H:])
    dc *= f
    slopes = piece[:, :3 * H]                                              # the slopes of the gates: s (1 - s), and 1 - g²
    xp.subtract(1, gates[:, :3 * H], out=slopes)
    slopes *= gates[:, :3 * H]
    slope = xp.multiply(g, g, out=piece[:, 3 * H:])
    xp.subtract(1, slope, out=slope)
    da *= piece


def _directions(xp: Any, loop: Any, items: list[list[Any]], plan: _Plan) -> None:
    """`loop(*item)` for each direction, on a thread of its own where there is enough to do, each with one BLAS thread."""
    U = items[0][-1]
    over_heads(loop, items, 2.0 * len(items) * plan.past.shape[0] * U.size if xp is np else 0)


# --- packing -----------------------------------------------------------------------------------------------------------------------------

class _Plan(NamedTuple):
    """Where the positions of B sequences stand when packed. Blocks and rows count from the states that came in, B rows on top.

    lead, B    : the leading axes, and how many sequences they hold
    order      : the sequence that became row j: longest first
    steps      : block of step t, block that it continues (as long), its size
    sequence, position, mirrored : of each packed row: where it came from; the position counted from its sequence's end
    flip       : the packed row of the mirrored position: a permutation, its own inverse
    past, last : of each packed row the one before it; of each sequence the last one, or the state that came in
    """

    lead: tuple[int, ...]
    B: int
    order: Array
    steps: list[tuple[slice, slice, int]]
    sequence: Array
    position: Array
    mirrored: Array
    flip: Array
    past: Array
    last: Array


def _plan(xp: Any, lead: tuple[int, ...], N: int, lengths: np.ndarray | None) -> _Plan:
    B = math.prod(lead)
    given = np.full(B, N) if lengths is None else lengths.reshape(B).astype(np.int64)
    order = np.argsort(-given, kind="stable")
    ends = given[order]
    step, row = np.nonzero(np.arange(ends.max(initial=0))[:, None] < ends)
    sizes = np.bincount(step)
    first = B + np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    before = np.concatenate([[0], first])[:-1]                             # the first step continues the states that came in
    steps = [(slice(int(n), int(n + s)), slice(int(p), int(p + s)), int(s)) for n, p, s in zip(first, before, sizes)]
    mirrored = ends[row] - 1 - step
    last = np.where(ends > 0, first[np.maximum(ends - 1, 0)] + np.arange(B), np.arange(B))
    indices = (order[row], step, mirrored, first[mirrored] + row - B, before[step] + row, last)
    return _Plan(lead, B, xp.asarray(order), steps, *(xp.asarray(index) for index in indices))


def _pack(xp: Any, x: Array, plan: _Plan, reverse: bool) -> Array:
    """Real positions of (..., N, F) as rows (R, F) in the dtype that sums are kept in; no others are read."""
    x = x.reshape(plan.B, *x.shape[-2:])
    return cast(x[plan.sequence, plan.mirrored if reverse else plan.position], accumulator(x.dtype))


def _unpack(xp: Any, rows: Array, shape: tuple[int, ...], plan: _Plan, reverse: bool) -> Array:
    """Transpose of `_pack`: rows at their positions of (..., N, F), zeros between them."""
    out = xp.zeros((plan.B, shape[-1], rows.shape[1]), rows.dtype)
    out[plan.sequence, plan.mirrored if reverse else plan.position] = rows
    return out.reshape(*shape, rows.shape[1])


def _sort(state: LSTMState, plan: _Plan) -> LSTMState:
    h, c = (s.reshape(plan.B, s.shape[-1])[plan.order] for s in state)
    return LSTMState(h, c)


def _scatter(xp: Any, rows: LSTMState, plan: _Plan) -> LSTMState:
    """Transpose of `_sort`."""
    h, c = (xp.empty_like(s) for s in rows)
    h[plan.order], c[plan.order] = rows
    shape = (*plan.lead, h.shape[1])
    return LSTMState(h.reshape(shape), c.reshape(shape))


def _final(xp: Any, run: _Run, plan: _Plan) -> LSTMState:
    return _scatter(xp, LSTMState(run.h[plan.last], run.c[plan.last]), plan)


# --- checks ------------------------------------------------------------------------------------------------------------------------------

def _checked(params: Params, name: str, x: Array, lengths: Any) -> tuple[Any, _Plan, tuple[Array, Array, Array]]:
    xp = namespace(x=x)
    if x.ndim < 2:
        raise ValueError(f"x: expected (..., N, E), got {tuple(x.shape)}")
    weights = _weights(params, name, x, x.shape[-1])
    lead, N = tuple(x.shape[:-2]), x.shape[-2]
    return xp, _plan(xp, lead, N, check_lengths("lengths", lengths, lead, N, "N")), weights


def _weights(params: Params, name: str, x: Array, E: int, H: int | None = None) -> tuple[Array, Array, Array]:
    """W_in, b and W_hidden in the dtype that sums are kept in."""
    keys = (f"{name}.in.weight", f"{name}.in.bias", f"{name}.hidden.weight")
    affine_params(params, f"{name}.in")
    if keys[2] not in params:
        raise ValueError(f"params: expected a key {keys[2]!r}, found none; initialise or load the parameters of this very configuration")
    W, b, U = (params[key] for key in keys)
    named = {"x": x, **{f"params[{key!r}]": params[key] for key in keys}}
    namespace(**named)
    check_dtypes(**named)
    H = (U.shape[0] if U.ndim else 0) if H is None else H
    for key, array, symbols, shape in zip(keys, (W, b, U), ("(E, 4H)", "(4H,)", "(H, 4H)"), ((E, 4 * H), (4 * H,), (H, 4 * H)), strict=True):
        check_shape(f"params[{key!r}]", array, symbols, shape, "its columns are the gates i, f, o, g, H of each")
    wide = accumulator(x.dtype)
    return cast(W, wide), cast(b, wide), cast(U, wide)


def _state(xp: Any, state: LSTMState | None, shape: tuple[int, ...], x: Array, symbols: str) -> LSTMState:
    wide = accumulator(x.dtype)
    if state is None:
        return LSTMState(xp.zeros(shape, wide), xp.zeros(shape, wide))
    for name, s in zip(("state.h", "state.c"), state, strict=True):
        namespace(**{"x": x, name: s})
        check_shape(name, s, symbols, shape, "one for each sequence of x, H as in params")
        if s.dtype != wide:
            raise TypeError(f"{name} is {dtype_name(s)} and x is {dtype_name(x)}: expected {name} in {np.dtype(wide).name}; "
                            "nothing is cast silently")
    return LSTMState(*state)


def _dstate(xp: Any, dstate: LSTMState | None, shape: tuple[int, ...], dtype: Any) -> LSTMState:
    """Cotangents of a state, zeros for those not given."""
    zeros = xp.zeros(shape, dtype)
    given = (None, None) if dstate is None else dstate
    for name, d in zip(("dstate.h", "dstate.c"), given, strict=True):
        check_cotangent(name, d, zeros)
    h, c = (zeros if d is None else d for d in given)
    return LSTMState(h, c)


def _check_dout(xp: Any, dout: Array | None, shape: tuple[int, ...], dtype: Any) -> None:
    check_cotangent("dout", dout, np.broadcast_to(np.zeros((), dtype), shape) if xp is np else xp.empty(shape, dtype))


def _named(name: str, dweights: tuple[Array, Array, Array], dtype: Any) -> Grads:
    keys = (f"{name}.in.weight", f"{name}.in.bias", f"{name}.hidden.weight")
    return {key: cast(d, dtype) for key, d in zip(keys, dweights, strict=True)}
