"""The NumPy side's one way to be fast: stacks of heads shared among threads, blocks of positions read into reused buffers.

A fast form never touches a whole (N, D) array at once. It reads a block of positions into a small buffer (casting float16 and bfloat16
to float32, skipping what lies behind a sequence's length), works there with one BLAS thread, and writes the block's results.
Any strides are fine, since everything is read through a copy that stays in the cache.
"""
from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import numpy as np

Stack = list[Any]
Reader = Callable[[slice, np.ndarray], object]

# What one thread works on at a time. A second-level cache holds less; but each NumPy call takes the interpreter's lock for a moment, and
# two threads with short calls wait for one another more than they work: 2^20 bytes made two threads hardly faster than one, 2^22 made
# them 1.6 to 1.9 times as fast, 2^23 no faster.
BUFFER_BYTES = 1 << 22
HEADS_PER_STACK = 4
FLOPS_WORTH_THREADS = 1 << 22


def blocks(n: int, size: int, reverse: bool = False) -> Iterator[slice]:
    """Positions 0 … n-1 in consecutive slices of `size`; the last one may be shorter. One at a time: a list would grow with n."""
    starts = range(0, n, size)
    return (slice(i, min(i + size, n)) for i in (reversed(starts) if reverse else starts))


def stacks(lead: tuple[int, ...], *arrays: np.ndarray | None, most: int = HEADS_PER_STACK, two_axes: bool = False) -> Iterator[Stack]:
    """Cut arrays `(*lead, …)` into views `(h, …)` of at most `most` heads; None stays None. Nothing is copied.

    With `two_axes`, where the strides of the leading axes have no common step (q, k and v side by side in one array) and the last of them
    has fewer than `most` heads: views `(r, h, …)`, for `merged` to make one axis of."""
    lead, arrays = _merge_leading(lead, arrays)
    if not lead:
        yield [None if x is None else x[None] for x in arrays]
    elif two_axes and len(lead) > 1 and most > lead[-1] > 0:
        for index in np.ndindex(lead[:-2]):
            for part in blocks(lead[-2], most // lead[-1]):
                yield [None if x is None else x[index][part] for x in arrays]
    else:
        for index in np.ndindex(lead[:-1]):
            for heads in blocks(lead[-1], most):
                yield [None if x is None else x[index][heads] for x in arrays]


def merged(x: np.ndarray | None) -> np.ndarray | None:
    """(r, h, …) as (r·h, …): a view where that is possible, as it is for all contiguous arrays, else a read-only copy."""
    if x is None:
        return None
    one = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    if not np.may_share_memory(one, x):
        one.flags.writeable = False                                        # what is written to a copy would be lost
    return one


def _merge_leading(lead: tuple[int, ...], arrays: tuple[np.ndarray | None, ...]) -> tuple[tuple[int, ...], tuple[np.ndarray | None, ...]]:
    """All leading axes as one where strides allow it without a copy, so that (B, 1, N, D) makes full stacks too."""
    if len(lead) < 2:
        return lead, arrays
    count = int(np.prod(lead))
    try:
        return (count,), tuple(None if x is None else x.reshape(count, *x.shape[len(lead):], copy=False) for x in arrays)
    except ValueError:
        return lead, arrays


def split_groups(x: np.ndarray, heads: int, headed: bool) -> np.ndarray:
    """`(..., groups·heads, N, D)` as a view `(..., heads, groups, N, D)`; a matrix (N, D) as (1, N, D): one group."""
    if not headed:
        return x[None]
    return x.reshape(*x.shape[:-3], heads, x.shape[-3] // heads if heads else 1, *x.shape[-2:])


def reader(x: np.ndarray, lengths: np.ndarray | None = None) -> Reader:
    """Copies positions `rows` of x (h, G, N, D) into a buffer (h, G, rows, D), or (h, G, chunks, rows per chunk, D). Behind a head's length
    the buffer gets zeros and x is not even looked at, so that no garbage from padding can reach a result."""
    shortest = None if lengths is None or not lengths.size else int(lengths.min())

    def read(rows: slice, buffer: np.ndarray) -> None:
        block = x[..., rows, :].reshape(buffer.shape)                      # splits an axis at most: a view
        if shortest is None or rows.stop <= shortest:
            np.copyto(buffer, block)
        else:
            buffer[...] = 0
            np.copyto(buffer, block, where=real_rows(lengths, rows, buffer.shape))

    return read


def real_rows(lengths: np.ndarray | None, rows: slice, shape: tuple[int, ...]) -> Any:
    """True where a position is not padding, for a block of `shape` (h, G, rows, D) or (h, G, chunks, rows per chunk, D).

    `lengths` is (h,), or (h, G)."""
    if lengths is None:
        return True
    positions = np.arange(rows.start, rows.stop).reshape(*shape[2:-1], 1)
    return positions < lengths.reshape(lengths.shape + (1,) * (len(shape) - lengths.ndim))


def over_heads(work: Callable[..., None], items: Sequence[Stack], flops: float) -> None:
    """`work(*item)` for every item, on as many threads as BLAS would use, each with one BLAS thread. Small work runs at once, here."""
    if flops < FLOPS_WORTH_THREADS:
        for item in items:
            work(*item)
        return
    with _one_blas_thread() as threads:
        threads = min(threads, len(items))
        if threads < 2:
            for item in items:
                work(*item)
        else:
            # each item in a copy of the caller's context, so that its np.errstate holds there too; list: exceptions are raised here
            contexts = [copy_context() for _ in items]
            list(_pool(threads).map(lambda context, item: context.run(work, *item), contexts, items))


_lock = threading.Lock()
_guests = 0
_limiter: Any = None
_allowed = 1
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


@contextmanager
def _one_blas_thread() -> Iterator[int]:
    """BLAS with one thread while inside; yields how many it had. Several callers at once share one limit: first in sets it, last out
    restores what the first one found."""
    global _guests, _limiter, _allowed
    with _lock:
        if _guests == 0:
            controller = _controller()
            blas = [lib.num_threads for lib in controller.lib_controllers if lib.user_api == "blas"]
            _allowed = min(max(blas, default=1), cores())
            _limiter = controller.limit(limits=1, user_api="blas")
        _guests += 1
        threads = _allowed
    try:
        yield threads
    finally:
        with _lock:
            _guests -= 1
            if _guests == 0:
                _limiter.restore_original_limits()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_found: Any = None


def _controller() -> Any:
    global _found
    if _found is None:
        from threadpoolctl import ThreadpoolController   # imported at the first large call: `import refattn` stays as cheap as NumPy
        _found = ThreadpoolController()
    return _found


def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept between calls; one per process, since threads do not survive a fork."""
    with _lock:
        key = (os.getpid(), threads)
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(threads, thread_name_prefix="refattn")
        return _pools[key]
