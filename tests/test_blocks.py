"""Threads and blocks: the same answers from any thread, BLAS left as it was found."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from refattn import _blocks, recurrence
from refattn._blocks import blocks, merged, over_heads, reader, stacks


def blas_threads():
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


def test_blocks_cover_every_position_once_in_either_direction():
    for n in range(8):
        for size in (1, 2, 3, 9):
            forward = list(blocks(n, size))
            assert [i for s in forward for i in range(n)[s]] == list(range(n))
            assert list(blocks(n, size, reverse=True)) == forward[::-1]


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1), (0, 3), (3, 0)])
def test_stacks_are_views_that_cover_every_head_once(lead):
    x = np.zeros((*lead, 4, 2))
    other = np.swapaxes(np.zeros((4, *lead, 2)), 0, -2) if len(lead) == 1 else np.moveaxis(np.zeros((4, *lead, 2)), 0, -2)
    for arrays in ((x, None), (x, other)):
        x[...] = other[...] = 0
        for parts in stacks(lead, *arrays, most=2):
            assert parts[0].ndim == 3 and parts[0].shape[0] <= 2
            for part in parts:
                if part is not None:
                    part += 1
        assert (x == 1).all() and (arrays[1] is None or (other == 1).all())


def test_stacks_over_two_axes_are_views_too_and_merge_to_one():
    packed = np.arange(5 * 4 * 3 * 2.0).reshape(5, 4, 3, 2)                    # (B, N, 3·H…): no common step for B and H
    x, out = packed[:, :, :2].swapaxes(1, 2), np.zeros((5, 2, 4, 2))
    assert [part.shape[:2] for part, _ in stacks((5, 2), x, out, most=5, two_axes=True)] == [(2, 2), (2, 2), (1, 2)]
    for part, to in (map(merged, stack) for stack in stacks((5, 2), x, out, most=5, two_axes=True)):
        to[...] = part
        if len(part) > 2:                                                      # two rows of B: a copy
            with pytest.raises(ValueError, match="read-only"):
                part[...] = 0
    assert np.array_equal(out, x) and merged(None) is None
    assert [part.shape for part, in stacks((5, 2), x, most=2, two_axes=True)] == [(2, 4, 2)] * 5
    assert [part.shape for part, in stacks((5, 2), out, most=5, two_axes=True)] == [(5, 4, 2)] * 2


def test_a_reader_never_looks_behind_a_length(rng):
    x = rng.standard_normal((3, 2, 6, 2))
    lengths = np.array([0, 3, 6])[:, None]
    expected = np.where(np.arange(6)[:, None] < lengths[..., None, None], x, 0)
    for h, n in enumerate((0, 3, 6)):
        x[h, :, n:] = np.nan
    for rows in (slice(0, 6), slice(2, 4), slice(4, 6)):
        flat, chunked = np.empty((3, 2, rows.stop - rows.start, 2)), np.empty((3, 2, (rows.stop - rows.start) // 2, 2, 2))
        reader(x, lengths)(rows, flat)
        reader(x, lengths)(rows, chunked)
        assert np.array_equal(flat, expected[:, :, rows]) and np.array_equal(chunked.reshape(flat.shape), flat)


def test_eight_threads_at_once_get_right_answers_and_blas_keeps_its_threads(rng):
    q, k, v = (rng.integers(-1, 2, (8, 2000, 32)).astype(np.float32) for _ in range(3))
    before, expected = blas_threads(), recurrence(q, k, v)
    with ThreadPoolExecutor(8) as pool:
        for out, state in pool.map(lambda _: recurrence(q, k, v), range(16)):
            assert np.array_equal(out, expected[0]) and np.array_equal(state, expected[1])
    assert blas_threads() == before
    with threadpool_limits(1, user_api="blas"):
        assert np.array_equal(recurrence(q, k, v)[0], expected[0])
        assert set(blas_threads()) == {1}


def test_an_error_in_a_thread_is_raised_and_blas_keeps_its_threads():
    before = blas_threads()

    def fail(i):
        raise RuntimeError(f"head {i}")

    with pytest.raises(RuntimeError, match="head"):
        over_heads(fail, [[i] for i in range(5)], flops=1e12)
    assert blas_threads() == before and _blocks._guests == 0


def test_the_callers_errstate_holds_in_every_thread():
    q, k, v = (np.full((4, 4000, 32), 1e30, np.float32) for _ in range(3))
    with np.errstate(all="ignore"):
        assert np.isinf(recurrence(q, k, v)[0]).all()
    with np.errstate(over="raise"), pytest.raises(FloatingPointError, match="overflow"):
        recurrence(q, k, v)


def test_work_runs_on_every_item_whatever_its_size():
    for flops in (0.0, 1e12):
        for count in (0, 1, 5):
            done = []
            over_heads(lambda i, done=done: done.append(i), [[i] for i in range(count)], flops)
            assert sorted(done) == list(range(count))
