"""One process, constant memory, as many positions as there are: causal linear attention over a stream, block by block, with exact resume.

    out, (S, z) = causal_linear_attention(block, (S, z))

Between blocks nothing is kept but the state, and a checkpoint is nothing else. A block is a fixed number of positions: so a run that was
killed goes on from its checkpoint to the very bits of one that was not.

**What N does to a state in float32.** S and z are sums of N terms that never fade; every chunk adds to them, and each addition is off by up to u
of the whole sum: after T additions by up to γ_T Σ|φ(k)||v|, at random by about √T u, and for terms that repeat, whose roundings all have one
sign, by T u in earnest.

**Compensated.** The state is carried as two numbers, S + S', S' being what S has no digits for. A block's own sum W, from a state of zeros, is
added by

    s, e = TwoSum(S, W)        S, S' = FastTwoSum(s, S' + e)

within 2u² of exact (Joldes, Muller and Popescu, Tight and rigorous error bounds for basic building blocks of double-word arithmetic, 2017,
algorithm 4). Hence, for blocks of B positions and T of them,

    |S + S' - exact| ≤ (γ_{B+p} + 2 T u²) Σ|φ(k)||v|        p: the roundings in φ, and the product

and S alone is off by u|S| more. The first part does not know of N; the second reaches u at T = 1/(2u) = 8 million blocks. It costs a pass over keys
and values more, 2·F·M flops a position and head.
"""
from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .attention import State, causal_linear_attention, linear_attention_state
from .checkpoint import checkpoint_load, checkpoint_save
from .experiment import CHECKPOINT_SECONDS, Row, check_plan, require_extras

Block = tuple[np.ndarray, np.ndarray, np.ndarray]


class Stream(NamedTuple):
    """All that the next block depends on, and what is told of the past. A value: `stream_step` returns the next one."""

    position: int = 0
    state: State | None = None         # None at position 0
    rest: State | None = None          # what the state has no digits for, where it is compensated
    exact: State | None = None         # the same state in float64
    digest: int = 0                    # CRC-32 of all outputs so far
    history: tuple[Row, ...] = ()


def stream_step(stream: Stream, q: np.ndarray, k: np.ndarray, v: np.ndarray, *, compensated: bool = False, feature_map: Any = "elu1",
                eps: float = 1e-6) -> tuple[np.ndarray, Stream]:
    """The next block: `refattn.causal_linear_attention` from the state so far.

    Parameters
    ----------
    stream : Stream
        Stream() before the first block. Never changed.
    q : (..., G·H, B, D)
    k : (..., H, B, D)
    v : (..., H, B, M)
        float32, NumPy. All blocks but the last of one length: what a compensated state's error depends on.
    compensated : bool
        Carry the state as two numbers; see the top of this file.
    feature_map, eps
        As in `refattn.causal_linear_attention`.

    Returns
    -------
    out : (..., G·H, B, M)
    stream : Stream

    Raises
    ------
    ValueError, TypeError
        As `refattn.causal_linear_attention` does, and "k: expected float32, got float64: a float64 state is what the drift is measured against".

    Notes
    -----
    4·F·M + 2·C·(F + M) flops a position and head, 2·F·M of them once more in float64, and once more if compensated. Memory: a block.

    >>> one = np.ones((4, 1), np.float32)
    >>> out, stream = stream_step(Stream(), one, one, one)
    >>> stream.position, stream.state.z, stream_drift(stream)
    (4, array([8.], dtype=float32), {'S': 0.0, 'z': 0.0})
    """
    if k.dtype != np.float32:
        raise TypeError(f"k: expected float32, got {k.dtype}: a float64 state is what the drift is measured against")
    out, end = causal_linear_attention(q, k, v, stream.state, feature_map=feature_map, eps=eps)
    wide = linear_attention_state(k.astype(float), v.astype(float), feature_map=feature_map)
    exact, rest = _sum(stream.exact, wide), None
    if compensated:
        own = linear_attention_state(k, v, feature_map=feature_map)
        if stream.state is None or stream.rest is None:
            end, rest = own, State(*(np.zeros_like(x) for x in own))
        else:
            pairs = [two_sum(*x) for x in zip(stream.state, stream.rest, own, strict=True)]
            end, rest = State(*(p[0] for p in pairs)), State(*(p[1] for p in pairs))
    digest = _crc(out, stream.digest)
    return out, stream._replace(position=stream.position + k.shape[-2], state=end, rest=rest, exact=exact, digest=digest)


def two_sum(S: np.ndarray, rest: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S + rest + x as two numbers, the second at most half a unit in the last place of the first; off by 2u² of the sum at most.

    >>> high, rest = two_sum(np.float32(2**24), np.float32(0), np.float32(1))
    >>> int(high) - 2**24, float(rest)
    (0, 1.0)
    """
    s = S + x
    t = s - S
    e = rest + ((S - (s - t)) + (x - t))                                          # TwoSum: S + x = s + e exactly, whichever is larger
    high = s + e
    return high, e - (high - s)                                                   # FastTwoSum


def stream_drift(stream: Stream) -> Row:
    """How far S and z are from those in float64, as a part of the largest number in each; the second numbers of a compensated state counted in."""
    if stream.state is None or stream.exact is None:
        return {"S": 0.0, "z": 0.0}
    rest = stream.rest or (0.0, 0.0)
    return {name: float(np.abs(x.astype(float) + r - y).max(initial=0.0) / (np.abs(y).max(initial=0.0) or 1.0))
            for name, x, r, y in zip(State._fields, stream.state, rest, stream.exact, strict=True)}


# --- the loop ----------------------------------------------------------------------------------------------------------------------------

def stream_run(path: str | os.PathLike[str], read: Callable[[slice], Block], positions: int, plan: Mapping[str, Any], *, block: int,
               compensated: bool = False, write: Callable[[slice, np.ndarray], None] | None = None,
               show: Callable[[Row], None] = lambda row: None, rows: int = 20, every: float = CHECKPOINT_SECONDS,
               seconds: float = math.inf) -> Stream:
    """From the checkpoint in `path`, if there is one, to the end, or until the time is up: read, `stream_step`, write; with a progress bar.

    Parameters
    ----------
    path
        Of the checkpoint: written every so many seconds, at the end, and when interrupted. Its folder must exist.
    read : function
        q, k and v (float32) of positions `rows`, a slice; a function of nothing else.
    positions, block : int
        How many there are; how many at a time.
    plan : dict
        All else that the numbers depend on; only the same plan resumes a checkpoint.
    compensated : bool
        As in `stream_step`.
    write : function, optional
        write(rows, out) keeps the outputs; after a kill it is called again for those since the last checkpoint, with the same bits.
    show : function
        What to do with a new row of the history: {"position", "S", "z", "seconds"}, the drift and the time since the run began.
    rows : int
        At so many positions, evenly spaced in the logarithm, a row is added.
    every : float
        Seconds between checkpoints.
    seconds : float
        Stop after so many by the clock; the block that is being worked on is finished.

    Returns
    -------
    stream : Stream

    Raises
    ------
    ValueError
        If the checkpoint was written under another plan, block or kind of state.
    ImportError
        If tqdm or safetensors is not installed, with the command that installs it.
    """
    require_extras("tqdm", "safetensors")
    from tqdm import tqdm

    plan = {**plan, "block": block, "compensated": compensated}
    stream = stream_load(path, plan) if os.path.exists(path) else Stream()
    marks = set(np.geomspace(block, max(positions, block), rows).astype(int) // block * block) | {positions}
    kept, start = stream, time.perf_counter()
    saved = start
    with tqdm(total=positions, initial=stream.position, unit="", unit_scale=True, desc="   positions", disable=None, leave=False) as bar:
        try:
            while stream.position < positions and time.perf_counter() - start < seconds:
                here = slice(stream.position, min(stream.position + block, positions))
                out, new = stream_step(stream, *read(here), compensated=compensated)
                if write is not None:
                    write(here, out)
                if new.position in marks:
                    row = {"position": new.position, **stream_drift(new), "seconds": time.perf_counter() - start}
                    new = new._replace(history=(*new.history, row))
                    with tqdm.external_write_mode():
                        show(row)
                    bar.set_postfix_str(f"drift of S {row['S']:.1e}, of z {row['z']:.1e}", refresh=False)
                stream = new
                bar.update(here.stop - here.start)
                if time.perf_counter() - saved >= every:
                    stream_save(path, stream, plan)
                    kept, saved = stream, time.perf_counter()
        finally:                    # `stream` is whole at any moment: a block that was cut short is not in it
            if stream is not kept:
                stream_save(path, stream, plan)
    return stream


def stream_save(path: str | os.PathLike[str], stream: Stream, plan: Mapping[str, Any]) -> None:
    """One file, replaced whole."""
    parts = {part: getattr(stream, part) for part in ("state", "rest", "exact")}
    arrays = {f"{part}.{name}": x for part, pair in parts.items() if pair is not None for name, x in pair._asdict().items()}
    checkpoint_save(path, arrays, {"plan": plan, "position": stream.position, "digest": stream.digest, "history": stream.history})


def stream_load(path: str | os.PathLike[str], plan: Mapping[str, Any]) -> Stream:
    """What `stream_save` wrote; ValueError if it was written under another plan."""
    arrays, record = checkpoint_load(path)
    check_plan(path, record.get("plan", {}), plan, what="a stream")
    parts = {part: State(*(arrays[f"{part}.{name}"] for name in State._fields)) if f"{part}.S" in arrays else None
             for part in ("state", "rest", "exact")}
    return Stream(record["position"], **parts, digest=record["digest"], history=tuple(record["history"]))


def _sum(past: State | None, own: State) -> State:
    return own if past is None else State(*(x + y for x, y in zip(past, own, strict=True)))


def _crc(x: np.ndarray, digest: int) -> int:
    from zlib import crc32
    return crc32(x.tobytes(), digest)
