"""Sequence parallelism over MPI: one sequence, cut along its positions into a slice for each rank; the same numbers as on one machine.

Each rule is affine in the state, so a whole slice r of it is one map of the state before it to the state behind it,

    S_{r+1} = A_r S_r + B_r        A: 1 (`linear`), a diagonal (`gated`), a D × D matrix (`delta`, `gated_delta`)

and two maps one after the other are a map of the same kind, whatever order they are joined in:

    (A_2, B_2) ∘ (A_1, B_1) = (A_2 A_1,  A_2 B_1 + B_2)

**Forward.** Each rank finds its own map in one pass without outputs; an exclusive scan over the ranks gives it the state before its slice; one
more pass, from that state, gives its outputs. The map needs no formula of its own: it is read off the recurrence, which is run
from [S | E] with values [v | 0] and ends with [S' | A E]: E is nothing, a column of ones, or the unit matrix. That end is the message.

**Backward.** With R_r the cotangent of the state before slice r, and dS_r what the caller gives for the state behind it,

    R_r = A_rᵀ (dS_r + R_{r+1}) + P_r        P_r = Σ_t q̃_t do_tᵀ,   q̃_t = A_{r:t}ᵀ q_t

since o_t = S_tᵀ q_t and S_t = A_{r:t} S_r + …, A_{r:t} being the map's matrix up to t. So the same scan in reverse order, with transposed
matrices and [P | Aᵀ] for message, gives each rank the cotangent behind its slice; with that and the state before it the library's own backward
gives every gradient of the slice: those of g and beta need nothing else from other ranks.

| for one head | linear, normalised | gated | delta rules |
|---|---|---|---|
| message, numbers | D·M; F·(M+1) | D·(M+1) | D·(M+D) |
| messages of a rank, each way | ⌈log₂ ranks⌉ | the same | the same |
| flops more than on one rank, forward | 2·N·D·M | 2·N·D·M | 4·N·D·(M+D) |
| the same, backward | 2·N·D·M | 2·N·D·M | 6·N·D·M |

to which come a few terms in N·C, and for each round of the scan a product of the matrices. The other way, outputs from a state of zeros at once and
q̃_t S_r added to them later, costs as many flops, but holds N·D numbers more for the delta rules, and would round half precision twice.

The scan goes in ⌈log₂ ranks⌉ rounds of messages from rank to rank, and not by MPI_Exscan with an operation of our own: that would call Python from
within MPI, on host memory alone, and leave the number of messages to the implementation.

**When a rank fails.** Before each scan and after the last pass all ranks agree that all went well. If one raised, all raise, with the first such
rank's number and its words, instead of waiting for it for ever. What happens to a rank outside of these functions is the program's own affair:
`mpiexec -n 4 python -m mpi4py program.py` ends all ranks at an uncaught exception.
"""
from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from . import attention, rules
from ._array import Array, accumulator, cast, check_cotangent, missing_extra, namespace, transposed
from ._blocks import Reader
from .attention import Pullback, State, attention_backward, causal_linear_attention_vjp as one_attention_vjp, linear_attention_state
from .causal import CHUNK, Side, running_product
from .chunks import States, last_state
from .decay import decays, over_group, unit_lower_inverse
from .delta import _all_scores as delta_scores, _forward as delta_forward
from .features import feature_map as find_feature_map
from .linear import full_product
from .rules import recurrence_vjp as one_recurrence_vjp

TAG = 7200        # of our messages, apart from the caller's own
Result = TypeVar("Result")


def share(positions: int, comm: Any = None) -> slice:
    """The slice of so many positions that this rank takes when all take the same number, to one.

    Parameters
    ----------
    positions : int
        N, of the whole sequence.
    comm : mpi4py communicator, optional
        COMM_WORLD if None.

    Returns
    -------
    rows : slice
        Slices follow each other in the order of the ranks. They are a proposal: any others that do will serve.

    >>> from types import SimpleNamespace
    >>> [share(10, SimpleNamespace(Get_rank=lambda r=r: r, Get_size=lambda: 3)) for r in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """
    comm = _communicator(comm)
    rank, size = comm.Get_rank(), comm.Get_size()
    return slice(positions * rank // size, positions * (rank + 1) // size)


def main(argv: Sequence[str] | None = None) -> int:
    """`mpiexec -n 4 python -m refattn distributed`; see `distributed_bench`."""
    from .distributed_bench import main
    return main(argv)


# --- the functions -----------------------------------------------------------------------------------------------------------------------

def recurrence(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, state: Array | None = None, *,
               rule: str = "linear", scale: float = 1.0, comm: Any = None) -> tuple[Array, Array]:
    """`refattn.recurrence` of a sequence that lies in slices on the ranks of `comm`. To be called by all of them.

    Parameters
    ----------
    q : (..., G·H, N, D)
    k : (..., H, N, D)
    v : (..., H, N, M)
    g : (..., H, N) or (..., H, N, D); None for rules `linear` and `delta`
    beta : (..., H, N); None for rules `linear` and `gated`
        This rank's slice of each. The sequence is all slices in the order of the ranks; they may have different N, also 0. All else,
        dtypes included, is the same on all ranks.
    state : (..., H, D, M), optional
        What preceded the sequence; on rank 0 alone. Zeros if None. Never changed.
    rule, scale
        As in `refattn.recurrence`; the same on all ranks.
    comm : mpi4py communicator, optional
        COMM_WORLD if None.

    Returns
    -------
    out : (..., G·H, N, M)
        Of this rank's positions.
    state : (..., H, D, M)
        Behind this rank's positions, in the accumulator dtype; so the last rank has that of the whole sequence.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        On all ranks, when one of them could not do its part: "rank 2 of 4: k: expected (..., Hkv, N, D) = …, got …". ValueError and TypeError
        stay what they are, everything else is a RuntimeError. ValueError for a state on another rank than 0, and for ranks that do not call the
        same function with the same sizes: "rank 0 of 4 calls recurrence(rule='linear', …), rank 3 recurrence(rule='gated', …)".
    ImportError
        If mpi4py or an MPI library is not installed, with the command that installs both.

    Notes
    -----
    ⌈log₂ ranks⌉ messages from each rank, D·M to D·(M+D) numbers for each key/value head, whatever N, and two agreements of three integers. Time
    and flops: see the top of `refattn.distributed`. Extra memory does not grow with N. With g above 0 the product of exp(g) over
    a slice must not overflow.
    NumPy arrays go through MPI as they are. Messages of CuPy arrays go from device to device where MPI says that it can do that
    (mpi_memory_alloc_kinds of the communicator names cuda), else through host memory.

    Examples
    --------
    In a file, and then `mpiexec -n 4 python file.py`:

    >>> from refattn import distributed
    >>> x = np.ones((2, 1))                                                       # two positions on each rank
    >>> out, state = distributed.recurrence(x, x, x)                              # doctest: +SKIP
    >>> out.ravel()                                                               # doctest: +SKIP
    array([7., 8.])

    on rank 3.
    """
    return recurrence_vjp(q, k, v, g, beta, state, rule=rule, scale=scale, comm=comm)[0]


def recurrence_vjp(q: Array, k: Array, v: Array, g: Array | None = None, beta: Array | None = None, state: Array | None = None, *,
                   rule: str = "linear", scale: float = 1.0, comm: Any = None) -> tuple[tuple[Array, Array], Pullback]:
    """`recurrence` and its pullback: (dout, dstate) -> (dq, dk, dv, dg, dbeta, dstate0), of this rank's slice.

    To be called by all ranks, the pullback too, as often on each. dstate belongs to the state that this rank returned: give it on
    the last rank for a loss of the final state, on any or all for one of the states in between. None counts as zero. dstate0 is None but on
    rank 0.

    The derivation stands at the top of this file, and with every step in docs/distributed.md.
    """
    comm = _communicator(comm)
    rank, last = comm.Get_rank(), comm.Get_size() - 1
    kwargs: dict[str, Any] = {"rule": rule, "scale": scale}

    def own() -> tuple[Array, str]:
        xp, axes, _ = rules._check(q, k, v, g, beta, rule, scale, step=False)
        _check_state_is_on_rank_0(state, rank)
        rules._check_state(state, q, axes, None)
        acc = accumulator(v.dtype)
        S = xp.zeros((*axes.kv_lead, axes.D, axes.M), dtype=acc) if state is None else cast(state, acc)
        message = xp.concat([S, _unit(axes.D, S, rule, g is not None, xp)], axis=-1)
        if rank < last:                                                                  # nobody asks the last one for its map
            message = last_state(_writes, k, (k, v, g, beta), message)
        return message, _signature("recurrence", q, k, v, g, **kwargs)

    message = _together(comm, own)
    before = _scan(comm, message, v.shape[-1])
    start = state if before is None else before[..., : v.shape[-1]]
    (out, end), inner = _together(comm, lambda: (one_recurrence_vjp(q, k, v, g, beta, start, **kwargs), ""))
    xp, A = namespace(v=v), message[..., v.shape[-1]:]

    def pullback(dout: Array | None, dstate: Array | None = None) -> tuple[Array | None, ...]:
        def own() -> tuple[Array, str]:
            check_cotangent("dout", dout, out)
            check_cotangent("dstate", dstate, end)
            R = xp.zeros_like(end) if dstate is None else dstate
            if rank:                                                                     # nobody asks the first one
                do = xp.zeros_like(out) if dout is None else rules._scaled(dout, float(scale))
                R = last_state(_reads, k, (q, do, k, g, beta), R, reverse=True)
            back = transposed(A) if A.shape[-1] == A.shape[-2] else A
            return xp.concat([R, back], axis=-1), _signature("the pullback of recurrence", q, k, v, g, **kwargs)

        behind = _scan(comm, _together(comm, own), v.shape[-1], reverse=True)
        R = dstate
        if behind is not None:
            R = behind[..., : v.shape[-1]] if dstate is None else behind[..., : v.shape[-1]] + dstate
        *gradients, dstart = _together(comm, lambda: (inner(dout, R), ""))
        return (*gradients, dstart if rank == 0 else None)

    return (out, end), pullback


def causal_linear_attention(q: Array, k: Array, v: Array, state: State | None = None, *, feature_map: Any = "elu1", eps: float = 1e-6,
                            comm: Any = None) -> tuple[Array, State]:
    """`refattn.causal_linear_attention` of a sequence that lies in slices on the ranks of `comm`. To be called by all of them.

    Parameters
    ----------
    q : (..., G·H, N, D)
    k : (..., H, N, D)
    v : (..., H, N, M)
        This rank's slice; see `recurrence`.
    state : State, optional
        S (..., H, F, M) and z (..., H, F): what preceded the sequence; on rank 0 alone.
    feature_map, eps
        As in `refattn.causal_linear_attention`; the same on all ranks.
    comm : mpi4py communicator, optional
        COMM_WORLD if None.

    Returns
    -------
    out : (..., G·H, N, M)
    state : State
        Behind this rank's positions.

    Raises
    ------
    ValueError, TypeError, RuntimeError, ImportError
        As `recurrence` does.

    Notes
    -----
    The state is [S | z], its map S ↦ S + Σ φ(k) [v | 1]ᵀ: messages of F·(M+1) numbers a head. The denominators in the backward's first pass are made
    once more.
    """
    return causal_linear_attention_vjp(q, k, v, state, feature_map=feature_map, eps=eps, comm=comm)[0]


def causal_linear_attention_vjp(q: Array, k: Array, v: Array, state: State | None = None, *, feature_map: Any = "elu1", eps: float = 1e-6,
                                comm: Any = None) -> tuple[tuple[Array, State], Pullback]:
    """`causal_linear_attention` and its pullback: (dout, dstate) -> (dq, dk, dv, dstate0), of this rank's slice; see `recurrence_vjp`.

    Here P = Σ φ(q_i) G_iᵀ, G_i = [do_i / (den_i + ε) | -(do_i · out_i) / (den_i + ε)], the [dS_0 | dz_0] of the library's own backward. On NumPy
    arrays nothing else is made for it; on others it costs a whole backward more.
    """
    comm = _communicator(comm)
    rank, last = comm.Get_rank(), comm.Get_size() - 1
    kwargs: dict[str, Any] = {"feature_map": feature_map, "eps": eps}
    named: dict[str, Any] = {}

    def own() -> tuple[Array, str]:
        xp, axes, phi, F, _ = attention._check(q, k, v, feature_map, eps, True)
        _check_state_is_on_rank_0(state, rank)
        start = attention._start(None if state is None else attention._check_state(state, q, axes, F), q, axes, F, xp)
        if rank < last:
            start = start + _joined(linear_attention_state(k, v, feature_map=feature_map), xp)
        named.update(features=F, eps=eps, **({"feature_map": feature_map} if isinstance(feature_map, str) else {}))
        return start, _signature("causal_linear_attention", q, k, v, None, **named)

    message = _together(comm, own)
    xp = namespace(v=v)
    before = _scan(comm, message, message.shape[-1])
    start = state if before is None else attention._split(before, xp)
    (out, end), inner = _together(comm, lambda: (one_attention_vjp(q, k, v, start, **kwargs), ""))

    def pullback(dout: Array | None, dstate: Any = None) -> tuple[Array, Array, Array, State | None]:
        def own() -> tuple[tuple[Array, State | None], str]:
            check_cotangent("dout", dout, out)
            given = attention._check_state_cotangent(dstate, end)
            R = xp.zeros_like(message) if given is None else _joined(given, xp)
            if rank and dout is not None:
                R = _states_cotangent(q, k, v, start, out, dout, R, inner, feature_map, eps, xp)
            return (R, given), _signature("the pullback of causal_linear_attention", q, k, v, None, **named)

        own_R, given = _together(comm, own)
        behind = _scan(comm, own_R, message.shape[-1], reverse=True)
        R: Any = given
        if behind is not None:
            R = attention._split(behind if given is None else behind + _joined(given, xp), xp)
        dq, dk, dv, dstart = _together(comm, lambda: (inner(dout, R), ""))
        return dq, dk, dv, dstart if rank == 0 else None

    return (out, end), pullback


# --- a slice's map: one pass over its chunks, arrays (..., G, T, C, ·), states (..., 1, D, ·) --------------------------------------------

def _unit(D: int, S: Array, rule: str, gated: bool, xp: Any) -> Array:
    """E (..., D, 0), (..., D, 1) or (..., D, D): what a rule makes of it is its A."""
    if "beta" in rules.RULES[rule]:
        return xp.zeros((*S.shape[:-1], D), dtype=S.dtype) + xp.eye(D, dtype=S.dtype)
    return xp.ones((*S.shape[:-1], 1), dtype=S.dtype) if gated else S[..., :0]


def _writes(xp: Any, states: States, S: Array, K: Array, V: Array, g: Array | None, beta: Array | None) -> Array:
    """[S | A E] behind the chunks from [S | E] before them."""
    V = xp.concat([V, xp.zeros((*V.shape[:-1], S.shape[-1] - V.shape[-1]), dtype=V.dtype)], axis=-1)
    if beta is not None:
        return delta_forward(xp, states, S, None, K, V, g, beta)[1]
    if g is None:
        return S + transposed(_rows(K, xp)) @ _rows(V, xp)
    p = decays(xp.exp(g), xp)
    return states(p.whole, transposed(p.behind * K) @ V, S)[2]


def _reads(xp: Any, states: States, R: Array, Q: Array, dO: Array, K: Array, g: Array | None, beta: Array | None) -> Array:
    """The cotangent of the state before the chunks from R, that of the state behind them: of each rule's backward the line of dS_0."""
    if beta is not None:
        A, B, bQ, bK, eK, whole, _, _ = delta_scores(xp, Q, K, g)
        update = (beta * bK, transposed(unit_lower_inverse(-beta * B, xp)), -over_group(transposed(A) @ dO, xp), eK)
        return states(whole, over_group(transposed(bQ) @ dO, xp), R, update, reverse=True)[2]
    if g is None:
        return R + xp.sum(transposed(_rows(Q, xp)) @ _rows(dO, xp), axis=-3, keepdims=True)
    p = decays(xp.exp(g), xp)
    return states(p.whole, over_group(transposed(p.before * Q) @ dO, xp), R, reverse=True)[2]


def _rows(x: Array, xp: Any) -> Array:
    """(..., T, C, ·) as (..., T·C, ·)."""
    return xp.reshape(x, (*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1]))


def _states_cotangent(q: Array, k: Array, v: Array, start: Any, out: Array, dout: Array, R: Array, inner: Pullback, feature_map: Any,
                      eps: float, xp: Any) -> Array:
    """[dS_0 | dz_0] of the normalised form, from R behind the slice."""
    if xp is not np:
        return _joined(inner(dout, attention._split(R, xp))[3], xp)
    return attention_backward(_last_states, dout, R, q, k, v, _joined(start, xp), out, find_feature_map(feature_map), eps)[3]


def _last_states(read_k: Reader, read_v: Reader, S: np.ndarray, size: tuple[int, int, int, int, int], chunk: int, *, out: Side | None = None,
                 back: Side | None = None, columns: slice = slice(None), reverse: bool = False) -> None:
    """`running_product` as `attention_backward` calls it, for its R alone: of the first product the denominators, of the second the sum."""
    if reverse:
        return full_product(read_k, read_v, S, size, 8 * CHUNK)
    return running_product(read_k, lambda rows, ones: ones.fill(1), S[..., -1:], size, chunk, out=out)


def _joined(state: State, xp: Any) -> Array:
    return xp.concat([state.S, state.z[..., None]], axis=-1)


# --- between ranks -----------------------------------------------------------------------------------------------------------------------

def _communicator(comm: Any) -> Any:
    if comm is None:
        return _mpi().COMM_WORLD
    if not all(hasattr(comm, name) for name in ("Get_rank", "Get_size")):
        raise TypeError(f"comm: expected a communicator of mpi4py, got {type(comm).__name__}")
    return comm


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):                                           # RuntimeError: there is no MPI library
        raise missing_extra("mpi4py and an MPI library", "mpi") from None
    return MPI


def _check_state_is_on_rank_0(state: Any, rank: int) -> None:
    if state is not None and rank:
        raise ValueError("state: expected None, got a state; what preceded the sequence belongs to rank 0 alone")


def _signature(function: str, q: Array, k: Array, v: Array, g: Array | None, **options: Any) -> str:
    """What has to be the same on all ranks."""
    sizes = [f"{name} {tuple('*' if i == q.ndim - 2 else n for i, n in enumerate(x.shape))}".replace("'", "")
             for name, x in (("q", q), ("k", k), ("v", v), ("g", g)) if x is not None]
    return f"{function}({', '.join([*sizes, str(q.dtype), *(f'{name}={value!r}' for name, value in options.items())])})"


def _together(comm: Any, work: Callable[[], tuple[Result, str]]) -> Result:
    """The first of what work() returns, if it returns on every rank, and the second is the same on all; else one error on all."""
    rank, size = comm.Get_rank(), comm.Get_size()
    if size == 1:
        return work()[0]
    result: Any = None
    signature, error = "", None
    try:
        result, signature = work()
    except Exception as raised:                                                   # whatever it is, the others must hear of it
        error = raised
    code = zlib.crc32(signature.encode())
    mine, least = np.array([size if error is None else rank, code, -code]), np.empty(3, int)
    comm.Allreduce(mine, least, op=_mpi().MIN)
    if (failed := int(least[0])) < size:
        words = comm.bcast((next((kind.__name__ for kind in (ValueError, TypeError) if isinstance(error, kind)), None),
                            str(error) if isinstance(error, (ValueError, TypeError)) else f"{type(error).__name__}: {error}"), root=failed)
        kind = {"ValueError": ValueError, "TypeError": TypeError}.get(words[0], RuntimeError)
        raise kind(f"rank {failed} of {size}: {words[1]}") from error
    if least[1] != -least[2]:
        calls: Sequence[str] = comm.allgather(signature)
        other = next(i for i, call in enumerate(calls) if call != calls[0])
        raise ValueError(f"rank 0 of {size} calls {calls[0]}, rank {other} {calls[other]}: expected the same on all ranks")
    return result                                                                 # type: ignore[no-any-return]


def _scan(comm: Any, own: Array, M: int, *, reverse: bool = False) -> Array | None:
    """The maps [B | A] of all ranks before this one (behind it, if reverse) as one map; None on the first.

    In round i ranks 2^i apart: before it `total` is the map of 2^i ranks up to this one, `before` the same without this one."""
    size = comm.Get_size()
    place = size - 1 - comm.Get_rank() if reverse else comm.Get_rank()
    total, before, distance = own, None, 1
    while distance < size:
        got = _exchange(comm, total, place + distance, place - distance, reverse)
        if got is not None:
            before = got if before is None else _composed(got, before, M)
            if place + 2 * distance < size:
                total = _composed(got, total, M)
        distance *= 2
    return before


def _composed(first: Array, then: Array, M: int) -> Array:
    """[B₁ | A₁] and then [B₂ | A₂]: [A₂ B₁ + B₂ | A₂ A₁]."""
    B, A = then[..., :M], then[..., M:]
    moved = first if not A.shape[-1] else A * first if A.shape[-1] == 1 else A @ first
    return namespace(B=B).concat([moved[..., :M] + B, moved[..., M:]], axis=-1)


def _exchange(comm: Any, x: Array, to: int, source: int, reverse: bool) -> Array | None:
    """x to place `to`, and what the rank in place `source` sends; where there is no such place, nothing."""
    size, nobody = comm.Get_size(), _mpi().PROC_NULL

    def rank(place: int) -> int:
        return nobody if not 0 <= place < size else size - 1 - place if reverse else place

    xp = namespace(x=x)
    direct = xp is np or "cuda" in (comm.Get_info().get("mpi_memory_alloc_kinds") or "")
    buffer = np.ascontiguousarray(x if xp is np else x.get()) if xp is np or not direct else xp.ascontiguousarray(x)
    if xp is not np and direct:
        xp.cuda.get_current_stream().synchronize()                                # MPI knows nothing of streams
    got = (xp if direct else np).empty_like(buffer)
    comm.Sendrecv(buffer, rank(to), TAG, got, rank(source), TAG)
    if source < 0:
        return None
    return got if direct else xp.asarray(got)
