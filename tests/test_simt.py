"""Laws of the emulator: kernels compute what a device would, each detector sees the bug that was planted for it, and nothing where none was."""
from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import simt
from refattn.simt.build import ORDERS, Audit, _compiler, _own, rewrite
from refattn.simt.command import main

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles kernels with g++, which is not installed")

# Every kernel is right with BUG = false; with true it has one bug. A line that a finding must name ends in // and a mark.
PLANTED = r"""
template <bool BUG> __global__ void reverse_block(const float* x, float* y) {
  __shared__ float buffer[64];
  buffer[threadIdx.x] = x[threadIdx.x];                              // barrier writes
  if (!BUG) __syncthreads();
  y[threadIdx.x] = buffer[63 - threadIdx.x];                         // barrier reads
}
template <bool BUG> __global__ void overwrite(const float* x, float* y) {
  __shared__ float buffer[64];
  for (int i = 0; i < 2; ++i) {
    buffer[threadIdx.x] = x[threadIdx.x];                            // reuse writes
    __syncthreads();
    y[i * 64 + threadIdx.x] = buffer[63 - threadIdx.x];              // reuse reads
    if (!BUG) __syncthreads();
  }
}
template <bool BUG> __global__ void reverse_warp(const float* x, float* y) {
  __shared__ float buffer[64];
  buffer[threadIdx.x] = x[threadIdx.x];                              // warp writes
  if (!BUG) __syncwarp();
  y[threadIdx.x] = buffer[threadIdx.x ^ 31];                         // warp reads
}
template <bool BUG> __global__ void reverse_half_warp(const float* x, float* y) {
  __shared__ float buffer[32];
  const unsigned mine = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncwarp(mine);
  y[threadIdx.x] = buffer[threadIdx.x ^ (BUG ? 31 : 15)];            // half reads
}
template <bool BUG> __global__ void sum_block(const float* x, float* y) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (BUG) sum += x[threadIdx.x]; else atomicAdd(&sum, x[threadIdx.x]);        // add
  __syncthreads();
  if (threadIdx.x == 0) y[0] = sum;
}
template <bool BUG> __global__ void sum_grid(const float* x, float* y) {
  if (threadIdx.x) return;
  if (BUG) y[0] += x[blockIdx.x]; else atomicAdd(y, x[blockIdx.x]);            // blocks add
}
template <bool BUG> __global__ void next_block(const float* x, float* y) {
  y[blockIdx.x * 64 + threadIdx.x] = x[threadIdx.x];                           // block writes
  const float* from = BUG ? y + (blockIdx.x + 1) % gridDim.x * 64 : x;
  if (from[threadIdx.x] == 12345) y[0] = 1;                                    // block reads
}
template <bool BUG> __global__ void past_shared(const float* x, float* y) {
  __shared__ float buffer[64], other[64];
  other[threadIdx.x] = 0;
  buffer[threadIdx.x + (BUG ? 3 : 0)] = x[threadIdx.x];                        // past shared
  y[threadIdx.x] = other[threadIdx.x];
}
template <bool BUG> __global__ void past_dynamic(const float* x, float* y) {
  extern __shared__ __align__(16) unsigned char bytes[];
  float* buffer = reinterpret_cast<float*>(bytes);
  buffer[threadIdx.x + (BUG ? 1 : 0)] = x[threadIdx.x];                        // past dynamic
  y[threadIdx.x] = 0;
}
template <bool BUG> __global__ void past_global(const float* x, float* y) {
  for (int i = threadIdx.x; i < 128 + (BUG ? 2 : 0); i += 64) y[i] = x[i % 64];        // past global
}
template <bool BUG> __global__ void before_global(const float* x, float* y) { y[threadIdx.x] = x[int(threadIdx.x) - (BUG ? 1 : 0)]; }    // before
template <bool BUG> __global__ void uninitialised(const float* x, float* y) {
  __shared__ double buffer[65];
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = float(buffer[threadIdx.x + (BUG ? 1 : 0)]);                 // uninitialised
}
template <bool BUG> __global__ void misaligned(const float* x, float* y) {
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * (threadIdx.x % 8) + (BUG ? 1 : 0));        // misaligned
  y[threadIdx.x] = v.x + v.w;
}
template <bool BUG> __global__ void misaligned_store(const float* x, float* y) {
  *reinterpret_cast<double2*>(y + (BUG ? 2 : 0)) = make_double2(x[0], x[1]);         // misaligned store
}
"""
FOUND = [      # kernel, threads, kind of finding, mark of its line, what else it says
    ("reverse_block", 64, "race", "barrier writes", "barrier reads"),
    ("overwrite", 64, "race", "reuse writes", "reuse reads"),
    ("reverse_warp", 64, "race", "warp writes", "warp reads"),
    ("reverse_half_warp", 32, "race", "half reads", "element 0 of __shared__ buffer"),
    ("sum_block", 64, "race", "add", "element 0 of __shared__ sum, which thread (0, 0, 0) wrote"),
    ("sum_grid", 64, "race", "blocks add", "element 0 of argument 1 (float32, shape (128,)), which thread (0, 0, 0) of block (0, 0, 0) wrote"),
    ("next_block", 64, "race", "block writes", "block reads"),
    ("past_shared", 64, "out of bounds", "past shared", "thread (61, 0, 0) of block (0, 0, 0) writes 4 bytes, 0 bytes past the end of __shared__ b"),
    ("past_dynamic", 64, "out of bounds", "past dynamic", "writes 4 bytes, 0 bytes past the end of dynamic shared memory"),
    ("past_global", 64, "out of bounds", "past global", "writes 4 bytes, 0 bytes past the end of argument 1 (float32, shape (128,))"),
    ("before_global", 64, "out of bounds", "before", "reads 4 bytes, 4 bytes before the start of argument 0 (float32, shape (8, 8))"),
    ("uninitialised", 64, "uninitialised", "uninitialised", "thread (63, 0, 0) of block (0, 0, 0) reads element 64 of __shared__ buffer"),
    ("misaligned", 64, "misaligned", "misaligned", "uses 16 bytes at once at byte 4 of argument 0"),
    ("misaligned_store", 1, "misaligned", "misaligned store", "at once at byte 8 of argument 1"),
]


def line(source: str, mark: str) -> str:
    [number] = [i for i, text in enumerate(source.splitlines(), 1) if text.endswith(f"// {mark}")]
    return f"kernel.cu:{number}"


@cache
def planted(audit: Audit = True) -> simt.Module:
    return simt.build(PLANTED, [f"{kernel}<{bug}>" for kernel, *_ in FOUND for bug in ("false", "true")], audit=audit)


def audited(kernel: str, threads: int, bug: bool, **more: Any) -> simt.Report:
    x, y = np.arange(1, 65, dtype=np.float32).reshape(8, 8), np.zeros(128, np.float32)
    blocks = 2 if kernel in ("sum_grid", "next_block") else 1
    report = planted().launch(f"{kernel}<{str(bug).lower()}>", blocks, threads, [x, y], shared=256, **more)
    assert report is not None
    return report


# --- the detectors -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kernel", "threads", "kind", "mark", "says"), FOUND, ids=[kernel for kernel, *_ in FOUND])
def test_a_planted_bug_is_named_with_its_line(kernel: str, threads: int, kind: str, mark: str, says: str) -> None:
    says = line(PLANTED, says) if f"// {says}\n" in PLANTED else says
    findings = audited(kernel, threads, bug=True).findings
    assert any(text.startswith(f"{kind}: {line(PLANTED, mark)}: ") and says in text for text in findings), findings


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("kernel", "threads"), [found[:2] for found in FOUND])
def test_a_right_kernel_stays_clean(kernel: str, threads: int, order: str) -> None:
    assert audited(kernel, threads, bug=False, order=order).findings == []


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("kernel", "threads"), [found[:2] for found in FOUND if found[2] == "race"])
def test_a_race_is_seen_in_every_order_and_a_run_repeats_itself(kernel: str, threads: int, order: str) -> None:
    reports = [audited(kernel, threads, bug=True, order=order, seed=3) for _ in range(2)]
    assert any(text.startswith("race: ") for text in reports[0].findings)
    assert reports[0] == reports[1]


def test_a_null_or_wild_pointer_is_said_to_be_one() -> None:
    module = simt.build("__global__ void f(int* x, long long n) { x[n] = 1; }", ["f"], audit=True)
    for x, n in ((None, 1), (np.zeros(4, np.int32), 1 << 40)):
        report = module.launch("f", 1, 1, [x, np.int64(n)])
        assert report is not None and len(report.findings) == 1
        assert re.fullmatch(r"out of bounds: kernel.cu:1: thread .* writes 4 bytes at 0x[0-9a-f]+, far from every array: a null or wild pointer",
                            report.findings[0])


def test_what_runs_past_an_array_harms_no_other(rng: np.random.Generator) -> None:
    module = planted(audit=False)
    memory = rng.standard_normal(256).astype(np.float32)
    before, y = memory.copy(), memory[64:192]
    module.launch("past_global<true>", 1, 64, [memory[:64], y.copy()])
    assert (memory == before).all()
    module.launch("past_global<false>", 1, 64, [memory[:64], y])            # a view is written in place
    assert (y.reshape(2, 64) == before[:64]).all() and (memory[192:] == before[192:]).all()


WAITING = r"""
__global__ void some_wait(float* x) {
  if (threadIdx.x < 32) __syncthreads();
  x[0] = 1;
}
__global__ void two_places(float* x) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void lanes_at_a_barrier(float* x) {
  if (threadIdx.x < 24) x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
  __syncthreads();
}
__global__ void other_masks(float* x) { x[0] = __shfl_sync(threadIdx.x ? 0xffffffffu : 0x3u, 1.f, 0); }
__global__ void lane_not_in_mask(float* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.f, 16);
}
__global__ void own_lane(float* x) { x[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.f, 0); }
__global__ void two_operations(float* x) {
  if (threadIdx.x < 16) __syncwarp(); else x[0] = __any_sync(0xffffffffu, 1);
}
__global__ void width(float* x) { x[0] = __shfl_sync(0xffffffffu, 1.f, 0, 12); }
__global__ void too_much_shared(float* x) {
  __shared__ float a[40000], b[20000];
  a[threadIdx.x] = b[threadIdx.x] = 0;
}
__global__ void in_second_warp(float* x) { if (threadIdx.x >= 32 && threadIdx.x < 36) __syncwarp(); __syncthreads(); }
"""
STUCK = {
    "some_wait": "barrier divergence: 32 threads wait at kernel.cu:3 in __syncthreads, but 32 have returned, the first of them thread (32, 0, 0)",
    "two_places": "barrier divergence: thread (0, 0, 0) of block (0, 0, 0) waits at kernel.cu:8, "
                  "thread (40, 0, 0) of block (0, 0, 0) at kernel.cu:10",
    "lanes_at_a_barrier": "deadlock: thread (0, 0, 0) of block (0, 0, 0) waits at kernel.cu:13 in __shfl_xor_sync with mask 0xffffffff; "
                          "lane 24 waits at kernel.cu:14 in __syncthreads instead",
    "other_masks": "deadlock: thread (0, 0, 0) of block (0, 0, 0) waits at kernel.cu:16 in __shfl_sync with mask 0x00000003; "
                   "other lanes of the mask came with another mask",
    "lane_not_in_mask": "kernel.cu:18: thread (15, 0, 0) of block (0, 0, 0) "
                        "reads in __shfl_xor_sync from a lane that is not in the mask or has returned",
    "own_lane": "kernel.cu:20: thread (16, 0, 0) of block (0, 0, 0) calls __shfl_sync with mask 0x0000ffff, which lacks its own lane 16",
    "two_operations": "lanes of one warp meet in different operations: thread (0, 0, 0) of block (0, 0, 0) kernel.cu:22 in __syncwarp, "
                      "thread (16, 0, 0) of block (0, 0, 0) kernel.cu:22 in __any_sync",
    "width": "kernel.cu:24: __shfl_sync: expected width 1, 2, 4, 8, 16 or 32, got 12",
    "too_much_shared": "__shared__ b: the block asks for 240000 bytes of static and 0 of dynamic shared memory",
    "in_second_warp": "deadlock: thread (32, 0, 0) of block (0, 0, 0) waits at kernel.cu:29 in __syncwarp with mask 0xffffffff; "
                      "lane 4 waits at kernel.cu:29 in __syncthreads instead",
}


@pytest.mark.parametrize("audit", [False, True])
@pytest.mark.parametrize("kernel", STUCK)
def test_a_kernel_that_cannot_go_on_says_where_it_waits(kernel: str, audit: bool) -> None:
    module = simt.build(WAITING, list(STUCK), audit=audit)
    with pytest.raises(simt.SimtError, match=re.escape(STUCK[kernel])):
        module.launch(kernel, 1, 64, [np.zeros(64, np.float32)])


# --- traffic -----------------------------------------------------------------------------------------------------------------------------

TRAFFIC = r"""
template <int PITCH> __global__ void transpose(const float* x, float* y) {
  __shared__ float tile[32][PITCH];
  for (int i = 0; i < 32; ++i) tile[i][threadIdx.x] = x[i * 32 + threadIdx.x];       // rows
  __syncthreads();
  for (int i = 0; i < 32; ++i) y[i * 32 + threadIdx.x] = tile[threadIdx.x][i];       // columns
}
template <int STRIDE> __global__ void strided(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x * STRIDE]; }
__global__ void shifted(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
__global__ void same(const float* x, float* y) { y[threadIdx.x] = x[7]; }
__global__ void by_four(const float4* x, float4* y) {
  __shared__ float4 tile[32];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = tile[31 - threadIdx.x];
}
"""


@cache
def traffic(name: str, audit: Audit = "traffic") -> dict[tuple[str, str, str, int], simt.Counts]:
    names = ["transpose<32>", "transpose<33>", "transpose<34>", *(f"strided<{stride}>" for stride in (1, 2, 8, 16)), "shifted", "same", "by_four"]
    x = np.random.default_rng(1).standard_normal(1024).astype(np.float32)
    module, y = simt.build(TRAFFIC, names, audit=audit), np.full(1024, np.nan, np.float32)
    report = module.launch(name, 1, 32, [x, y])
    assert report is not None and report.findings == []
    if name.startswith("transpose"):
        assert (y.reshape(32, 32) == x.reshape(32, 32).T).all()
    return report.traffic


@pytest.mark.parametrize(("pitch", "conflicts"), [(32, 32), (33, 1), (34, 2)])
def test_bank_conflicts_are_counted_exactly(pitch: int, conflicts: int) -> None:
    counts, rows, columns = traffic(f"transpose<{pitch}>"), line(TRAFFIC, "rows"), line(TRAFFIC, "columns")
    assert counts[rows, "shared", "W", 4] == (32, 1024, 0, 0, 32, 32)
    assert counts[columns, "shared", "R", 4] == (32, 1024, 0, 0, 32 * conflicts, 32)
    assert counts[rows, "global", "R", 4] == counts[columns, "global", "W", 4] == (32, 1024, 128, 128, 0, 0)


@pytest.mark.parametrize(("name", "sectors", "ideal"), [("strided<1>", 4, 4), ("strided<2>", 8, 4), ("strided<8>", 32, 4), ("strided<16>", 32, 4),
                                                        ("shifted", 5, 4), ("same", 1, 1)])
def test_sectors_are_counted_exactly(name: str, sectors: int, ideal: int) -> None:
    [counts] = [counts for (_, _, way, _), counts in traffic(name).items() if way == "R"]
    assert counts == (1, 32, sectors, ideal, 0, 0)


def test_sixteen_bytes_are_one_access_and_go_by_quarter_warps() -> None:
    counts = {key[1:]: value for key, value in traffic("by_four").items()}
    assert counts["global", "R", 16] == counts["global", "W", 16] == (1, 32, 16, 16, 0, 0)
    assert counts["shared", "R", 16] == counts["shared", "W", 16] == (1, 32, 0, 0, 4, 4)


@pytest.mark.parametrize("name", ["transpose<32>", "strided<8>", "by_four"])
def test_counting_alone_counts_the_same(name: str) -> None:
    assert traffic(name, "traffic") == traffic(name, True) != {}


def test_views_lie_where_they_lie_in_their_arrays() -> None:
    module = simt.build(TRAFFIC, ["strided<1>"], audit="traffic")
    x, y = np.zeros(64, np.float32), np.zeros(32, np.float32)
    for start, sectors in ((0, 4), (8, 4), (3, 5)):
        report = module.launch("strided<1>", 1, 32, [x[start:], y])
        assert report is not None
        assert [counts.sectors for key, counts in report.traffic.items() if key[2] == "R"] == [sectors]


# --- what kernels compute ----------------------------------------------------------------------------------------------------------------

COLLECTIVES = r"""
namespace warp {
template <int WIDTH> __global__ void shuffles(const int* x, int* y) {
  const int lane = threadIdx.x % 32, t = threadIdx.x, n = blockDim.x;
  const unsigned all = 0xffffffffu;
  y[t] = __shfl_sync(all, x[t], 5, WIDTH);
  y[n + t] = __shfl_up_sync(all, x[t], 3, WIDTH);
  y[2 * n + t] = __shfl_down_sync(all, x[t], 3, WIDTH);
  y[3 * n + t] = __shfl_xor_sync(all, x[t], 6, WIDTH);
}
}
extern "C" __global__ void votes(const int* x, unsigned* y) {
  const int t = threadIdx.x, n = blockDim.x;
  y[t] = __ballot_sync(0xffffffffu, x[t] > 0);
  y[n + t] = __any_sync(0xffffffffu, x[t] > 30);
  y[2 * n + t] = __all_sync(0xffffffffu, x[t] > 30);
  y[3 * n + t] = __syncthreads_count(x[t] > 0);
  y[4 * n + t] = __syncthreads_or(x[t] > 60);
  y[5 * n + t] = __syncthreads_and(x[t] > 60);
}
template <class T> __global__ void atomics(const T* x, T* y) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(y, x[t]);
  atomicMax(y + 1, x[t]);
  atomicMin(y + 2, x[t]);
  if (atomicCAS(reinterpret_cast<int*>(y + 3), 0, 1) == 0) atomicExch(y + 4, T(t));
}
__global__ void where(unsigned* y) {
  const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  y[b * blockDim.x * blockDim.y * blockDim.z + t] = b * 1000 + t;
}
"""
TURNS = {"warp::shuffles<32>": "i4", "warp::shuffles<8>": "i4", "votes": "u4", "atomics<int>": "i4", "atomics<float>": "f4", "atomics<double>": "f8"}


@cache
def collectives() -> simt.Module:
    return simt.build(COLLECTIVES, [*TURNS, "where"])


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles_move_values_between_lanes_of_a_segment(width: int) -> None:
    x, y, lane = np.arange(64, dtype=np.int32) * 7, np.zeros((4, 64), np.int32), np.arange(64)
    collectives().launch(f"warp::shuffles<{width}>", 1, 64, [x, y])
    start = lane // width * width
    source = np.stack([start + 5, np.where(lane - 3 < start, lane, lane - 3), np.where(lane + 3 >= start + width, lane, lane + 3), lane ^ 6])
    assert (y == x[source]).all()


def test_votes_count_the_lanes_of_a_warp_and_the_threads_of_a_block() -> None:
    x, y = np.arange(-8, 40, dtype=np.int32), np.zeros((6, 48), np.uint32)      # the second warp has sixteen lanes
    collectives().launch("votes", 1, 48, [x, y])
    warps = x[:32], x[32:]
    ballots = [sum(1 << i for i, value in enumerate(warp) if value > 0) for warp in warps]
    assert (y[0] == np.repeat(ballots, [32, 16])).all()
    assert (y[1] == np.repeat([(warp > 30).any() for warp in warps], [32, 16])).all()
    assert (y[2] == np.repeat([(warp > 30).all() for warp in warps], [32, 16])).all()
    assert (y[3:] == np.array([[(x > 0).sum()], [0], [0]])).all()


@pytest.mark.parametrize("T", ["int", "float", "double"])
def test_atomics_of_all_blocks_add_up(T: str) -> None:
    dtype = TURNS[f"atomics<{T}>"]
    x, y = np.arange(1, 257).astype(dtype), np.array([0, -1, 999, 0, -1], dtype)
    collectives().launch(f"atomics<{T}>", 4, 64, [x, y])
    assert y[[0, 1, 2, 4]].tolist() == [x.sum(), 256, 1, 0]


def test_every_thread_of_a_grid_of_three_axes_runs_once() -> None:
    y = np.zeros((24, 30), np.uint32)
    collectives().launch("where", (2, 3, 4), (5, 3, 2), [y])
    assert (y == np.arange(24)[:, None] * 1000 + np.arange(30)).all()


@pytest.mark.parametrize("name", TURNS)
def test_a_right_kernel_gives_the_same_bits_in_every_order(name: str) -> None:
    x, results = np.arange(-30, 34).astype(TURNS[name]), []
    if name == "votes":
        x = x.astype(np.int32)
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
        y = np.zeros((6, 64), TURNS[name])
        collectives().launch(name, 1, 64, [x, y], order=order, seed=seed)
        results.append(y[:, :3] if name.startswith("atomics") else y)           # which thread comes first at a CAS is the order's to say
    assert all((y == results[0]).all() for y in results)


def test_the_order_is_the_one_that_was_asked_for() -> None:
    source = "__global__ void turns(int* next, int* y) { y[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(next, 1); }"
    module, turns = simt.build(source, ["turns"]), {}
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)):
        turns[order, seed] = y = np.full(128, -1, np.int32)
        module.launch("turns", 2, 64, [np.zeros(1, np.int32), y], order=order, seed=seed)
        assert sorted(y) == list(range(128))
    assert turns["forward", 0].tolist() == turns["reverse", 0].tolist()[::-1] == list(range(128))
    assert len({tuple(y) for y in turns.values()}) == 4


def test_memory_that_nobody_wrote_is_nan_and_subnormals_stay() -> None:
    source = """__global__ void look(const float* x, float* y) {
      __shared__ float a[4]; extern __shared__ float b[];
      y[0] = a[0]; y[1] = b[0]; y[2] = x[1]; y[3] = x[0] / 2;
      a[0] = b[0] = 0;      // the next block must not see it
    }"""
    y = np.zeros(4, np.float32)
    simt.build(source, ["look"]).launch("look", 3, 1, [np.full(1, 1e-40, np.float32), y], shared=16)
    assert np.isnan(y[:3]).all() and y[3] == np.float32(1e-40) / 2 > 0


SIXTEEN = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
inline float widen(__half h) { return __half2float(h); }
inline float widen(__nv_bfloat16 h) { return __bfloat162float(h); }
inline void narrow(float x, __half& h) { h = __float2half(x); }
inline void narrow(float x, __nv_bfloat16& h) { h = __float2bfloat16(x); }
template <class T> __global__ void up(const T* x, float* y) { const int i = blockIdx.x * 256 + threadIdx.x; y[i] = widen(x[i]); }
template <class T> __global__ void down(const float* x, T* y) { const int i = blockIdx.x * 256 + threadIdx.x; narrow(x[i], y[i]); }
template <class T> __global__ void arithmetic(const T* a, const T* b, T* y) {
  const int i = blockIdx.x * 256 + threadIdx.x, n = gridDim.x * 256;
  y[i] = a[i] + b[i]; y[n + i] = a[i] - b[i]; y[2 * n + i] = a[i] * b[i]; y[3 * n + i] = a[i] / b[i];
}
"""


@cache
def sixteen() -> simt.Module:
    return simt.build(SIXTEEN, [f"{kernel}<{T}>" for kernel in ("up", "down", "arithmetic") for T in ("__half", "__nv_bfloat16")])


@pytest.fixture(params=["__half", "__nv_bfloat16"])
def narrow(request: pytest.FixtureRequest) -> tuple[str, np.dtype]:
    return request.param, np.dtype(np.float16) if request.param == "__half" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    """Equal, signed zeros told apart; NaN is NaN."""
    bits = np.dtype(f"u{got.itemsize}")
    nan = want != want
    return bool(((got != got) == nan).all() and (got.view(bits) == want.view(bits))[~nan].all())


def test_every_pattern_of_sixteen_bits_widens_exactly(narrow: tuple[str, np.dtype]) -> None:
    name, dtype = narrow
    x, y = np.arange(65536, dtype=np.uint16).view(dtype), np.zeros(65536, np.float32)
    sixteen().launch(f"up<{name}>", 256, 256, [x, y])
    assert same_bits(y, x.astype(np.float32))


def test_floats_round_to_nearest_even(narrow: tuple[str, np.dtype], rng: np.random.Generator) -> None:
    name, dtype = narrow
    every = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    with np.errstate(all="ignore"):
        middle = ((every.astype(np.float64) + np.roll(every, 1)) / 2).astype(np.float32)        # halfway between neighbours: ties
        x = np.concatenate([every, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf)),
                            rng.integers(0, 2**32, 65536, dtype=np.uint32).view(np.float32)])
        want = x.astype(dtype)
    y = np.zeros(len(x), dtype)
    sixteen().launch(f"down<{name}>", len(x) // 256, 256, [x, y])
    assert same_bits(y, want)


def test_arithmetic_of_sixteen_bits_rounds_once(narrow: tuple[str, np.dtype], rng: np.random.Generator) -> None:
    name, dtype = narrow
    a, b = (rng.integers(0, 65536, 65536, dtype=np.uint16).view(dtype) for _ in range(2))
    y = np.zeros((4, 65536), dtype)
    sixteen().launch(f"arithmetic<{name}>", 256, 256, [a, b, y])
    with np.errstate(all="ignore"):
        wide = a.astype(np.float64), b.astype(np.float64)
        for got, exact in zip(y, (wide[0] + wide[1], wide[0] - wide[1], wide[0] * wide[1], wide[0] / wide[1])):
            assert same_bits(got, exact.astype(dtype))


WMMA = r"""
#include <mma.h>
using namespace nvcuda;
template <class T, class LA, class LB, wmma::layout_t LC> __global__ void product(const T* a, const T* b, const float* c, float* y) {
  __shared__ __align__(32) T as[16 * 24];
  for (int i = threadIdx.x; i < 16 * 24; i += 32) as[i] = a[i];
  __syncwarp();
  wmma::fragment<wmma::matrix_a, 16, 16, 16, T, LA> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, T, LB> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc, two;
  wmma::load_matrix_sync(fa, as, 24);
  wmma::load_matrix_sync(fb, b, 24);
  wmma::load_matrix_sync(fc, c, 20, LC);
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::fill_fragment(two, 2.f);
  for (int i = 0; i < fc.num_elements; ++i) fc.x[i] *= two.x[i];
  wmma::store_matrix_sync(y, fc, 20, LC);
}
__global__ void crooked(const __half* a, float* y) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> fa;
  wmma::load_matrix_sync(fa, a, 20);
}
"""


@pytest.mark.parametrize("layouts", ["row row row", "row col row", "col row row", "col col col"])
def test_wmma_multiplies_tiles(narrow: tuple[str, np.dtype], layouts: str, rng: np.random.Generator) -> None:
    T, dtype = narrow
    every = {(n, key): "product<{}, wmma::{}_major, wmma::{}_major, wmma::mem_{}_major>".format(n, *key.split())
             for n in ("__half", "__nv_bfloat16") for key in ("row row row", "row col row", "col row row", "col col col")}
    a, b = (rng.integers(-8, 9, (16, 24)).astype(dtype) for _ in range(2))           # small integers: every order of summation gives the same
    c, y = rng.integers(-8, 9, (16, 20)).astype(np.float32), np.full((16, 20), np.nan, np.float32)
    for audit in (False, True):
        report = simt.build(WMMA, [*every.values()], audit=audit).launch(every[T, layouts], 1, 32, [a, b, c, y])
    assert report is not None and report.findings == []
    wide = (tile[:, :16].astype(np.float64) for tile in (a, b, c))
    A, B, C = (tile.T if layout == "col" else tile for tile, layout in zip(wide, layouts.split()))
    want = 2 * (A @ B + C)
    assert (y[:, :16] == (want.T if layouts.endswith("col") else want)).all() and np.isnan(y[:, 16:]).all()
    by_row = {key[1:]: counts for key, counts in report.traffic.items() if key[1] == "global" and key[3] == 16}
    assert by_row["global", "R", 16].sectors >= by_row["global", "R", 16].ideal_sectors > 0


def test_wmma_asks_for_aligned_tiles() -> None:
    with pytest.raises(simt.SimtError, match=r"kernel.cu:21: wmma: expected a tile that starts at a multiple of 32 bytes.*rows 40 bytes apart"):
        simt.build(WMMA, ["crooked"]).launch("crooked", 1, 32, [np.zeros(512, np.float16), np.zeros(1, np.float32)])


# --- sources -----------------------------------------------------------------------------------------------------------------------------

def test_declarations_of_shared_memory_are_rewritten_where_they_stand() -> None:
    source = """/* __shared__ float in_a_comment[4]; */
template <int N, typename T> __device__ T* own(T x) { __shared__ T mine; mine = x; return &mine; }
__global__ void f(float* y) {
  __shared__ __align__(16) unsigned char a[3]
     [4], b[2];      // two lines, two arrays
  static __shared__ float c[N2<2, 3>()] ; __shared__ volatile int n;
  extern __shared__ __align__(16) double d[];
  if (reinterpret_cast<size_t>(b) % 128 || sizeof a != 12 || sizeof c != 24 || (void*)d == (void*)c) return;
  n = 7; a[2][3] = 1; b[1] = 2; c[5] = 3; d[1] = 4;
  *own<1>(1.f) = 5; y[0] = *own<2>(6.f) + *own<1>(5.f) + n + a[2][3] + b[1] + c[5] + float(d[1]);
}
"""
    text = rewrite(source)
    assert text.count("\n") == source.count("\n")
    kept = [i for i, (old, new) in enumerate(zip(source.splitlines(), text.splitlines())) if old == new]
    assert kept == [2, 7, 8, 9, 10]
    y = np.zeros(1, np.float32)
    simt.build("template <int A, int B> constexpr int N2() { return A * B; }\n" + source, ["f"]).launch("f", 1, 1, [y], shared=16)
    assert y[0] == 6 + 5 + 7 + 1 + 2 + 3 + 4


@pytest.mark.parametrize("declaration", ["__shared__ float x[4] = {0};", "__shared__ 4;"])
def test_a_declaration_that_cuda_does_not_know_is_named_by_line(declaration: str) -> None:
    with pytest.raises(ValueError, match=r"kernel.cu:2: expected `__shared__ type name\[size\];`"):
        rewrite(f"\n{declaration}\n")


def test_included_files_keep_their_own_lines(tmp_path: Path) -> None:
    (tmp_path / "sum.cuh").write_text("""#pragma once
#include "one.cuh"
__device__ inline void add(float* y) {
  __shared__ float part[ONE];
  part[0] += 1;                  // part was never written
  y[0] = part[0];
}
""")
    (tmp_path / "one.cuh").write_text("#pragma once\n#define ONE 1\n")
    file = tmp_path / "whole.cu"
    file.write_text('#include "sum.cuh"\n#include "one.cuh"\n\n__global__ void whole(float* y, int n) {\n  add(y);\n  y[n] = 0;\n}\n')
    report = simt.build(file.read_text(), ["whole"], audit=True, path=file).launch("whole", 1, 1, [np.zeros(2, np.float32), np.int32(2)])
    assert report is not None
    assert [text.partition(": thread")[0] for text in report.findings] == ["out of bounds: whole.cu:6", "uninitialised: sum.cuh:5"]
    (tmp_path / "one.cuh").write_text("#pragma once\n#define ONE none\n")
    with pytest.raises(simt.SimtError, match=r"(?s)whole.cu does not compile:.*one.cuh:2:.*none.*sum.cuh:4:"):
        simt.build(file.read_text(), ["whole"], path=file)


def test_a_wrong_source_is_shown_with_its_own_lines() -> None:
    with pytest.raises(simt.SimtError, match=r"(?s)mine.cu does not compile:.*mine.cu:3:\d+: error: .*nothing"):
        simt.build("\n\n__global__ void f(int* x) { *x = nothing; }\n", ["f"], path="mine.cu")
    with pytest.raises(simt.SimtError, match="(?s)names:3:.*error: .*unknown"):
        simt.build("__global__ void f(int* x) {}\n", ["unknown"])


def test_a_macro_chooses_what_is_compiled() -> None:
    y = np.zeros(1, np.int32)
    for steps in (3, 5):
        simt.build("__global__ void f(int* y) { *y = STEPS; }", ["f"], defines=[f"STEPS={steps}"]).launch("f", 1, 1, [y])
        assert y[0] == steps


def test_a_macro_may_be_called_as_something_in_our_headers() -> None:
    y = np.zeros(1, np.int32)
    simt.build("__global__ void f(int* y) { *y = A + T + N; }", ["f"], defines=["A", "T=2", "N=3"]).launch("f", 1, 1, [y])
    assert y[0] == 6


def test_two_libraries_with_kernels_of_one_name_do_not_mix() -> None:
    source = "template <class T> __global__ void f(T* y) {{ __shared__ T a[{0}]; *y = T(sizeof a); }}"
    y = np.zeros(2, np.float32)
    first, second = (simt.build(source.format(n), ["f<float>"]) for n in (2, 7))
    for module, out in ((first, y[:1]), (second, y[1:])):
        module.launch("f<float>", 1, 1, [out])
    assert y.tolist() == [8, 28]


def test_what_was_built_is_kept_and_everything_that_goes_in_is_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, folder = "__global__ void f(int* y) { *y = 1; }", tmp_path / "refattn" / "simt"
    simt.build(source, ["f"])
    assert sorted(file.suffix for file in folder.iterdir()) == [".o", ".so"]            # nothing else is left behind
    for changed in ({"defines": ["A"]}, {"audit": True}, {"path": "other.cu"}):
        before = set(folder.glob("*.so"))
        simt.build(source, ["f"], **changed)                                              # type: ignore[arg-type]
        assert len(set(folder.glob("*.so")) - before) == 1
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    simt.build(source, ["f"])


def test_without_the_compiler_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _compiler.cache_clear(), _own.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"compiles kernels with g\+\+, which is not on the PATH; install it"):
        simt.build("__global__ void f() {}", ["f"])
    _compiler.cache_clear(), _own.cache_clear()


# --- arguments ---------------------------------------------------------------------------------------------------------------------------

ARGUMENTS = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
struct Three { int a, b, c; };
__global__ void many(const float* x, double* y, const float4* v, __half* h, const __nv_bfloat16* b, void* any, Three* s, int i, long long n,
                     unsigned u, float f, bool t, const int k) {}
__global__ void scale(const float* x, float* y, int n) { if (y) for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = 2 * x[i]; }
"""


@cache
def arguments() -> simt.Module:
    return simt.build(ARGUMENTS, ["many", "scale"])


def test_a_signature_says_what_a_kernel_takes() -> None:
    assert arguments().signature("many") == "pc:f4 p:f8 pc:f4x4 p:f2 pc:b2 p:void p:s12 i4 i8 u4 f4 u1 i4".split()


def test_the_codes_are_those_of_the_dtypes() -> None:
    assert [simt.dtype_code(np.dtype(t)) for t in ("float16", "float64", "int8", "uint32", "bool", "V12")] == ["f2", "f8", "i1", "u4", "u1", "s12"]


X, READ_ONLY = np.zeros(4, np.float32), np.zeros(4, np.float32)
READ_ONLY.flags.writeable = False
FOUR = np.int32(4)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"args": [X, X]}, ValueError, r"args: scale has 3 parameters (pc:f4, p:f4, i4), got 2"),
    ({"args": [X.astype(float), X, FOUR]}, TypeError, "argument 0 of scale: expected an array of f4, got float64 array (f8)"),
    ({"args": [X, [0.0], FOUR]}, TypeError, "argument 1 of scale: expected a NumPy array for p:f4, got list"),
    ({"args": [X, X, 4]}, TypeError, "argument 2 of scale: expected a NumPy scalar of i4, got int; pass for example np.int32"),
    ({"args": [X, X, np.int64(4)]}, TypeError, "argument 2 of scale: expected a NumPy scalar of i4, got int64 scalar"),
    ({"args": [X, X, X]}, TypeError, "argument 2 of scale: expected a NumPy scalar of i4, got float32 array"),
    ({"args": [X[::2], X, FOUR]}, ValueError, "argument 0 of scale: expected a C-contiguous array, got strides (8,) for shape (2,)"),
    ({"args": [X, READ_ONLY, FOUR]}, ValueError, "argument 1 of scale: the kernel may write through it, and the array is read-only"),
    ({"name": "scal"}, ValueError, "name: expected one of many, scale, got 'scal'"),
    ({"grid": 0}, ValueError, "grid: expected from 1 to (2147483647, 65535, 65535), got (0,); launch nothing where there is nothing to do"),
    ({"grid": (1, 65536)}, ValueError, "grid: expected from 1 to (2147483647, 65535, 65535), got (1, 65536)"),
    ({"grid": 1.5}, TypeError, "grid: expected an integer or one to three of them, got 1.5"),
    ({"block": (64, 32)}, ValueError, "block: expected at most 1024 threads, got 64 × 32 × 1 = 2048"),
    ({"block": (1, 1, 65)}, ValueError, "block: expected from 1 to (1024, 1024, 64), got (1, 1, 65)"),
    ({"shared": 300000}, ValueError, "shared: expected 0 ≤ bytes ≤ 232448, got 300000"),
    ({"order": "random"}, ValueError, "order: expected one of forward, reverse, shuffled, got 'random'"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_a_launch_says_what_is_wrong_with_it(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    right = {"name": "scale", "grid": 1, "block": 32, "args": [X, X.copy(), FOUR]}
    arguments().launch(**right)
    with pytest.raises(error, match=re.escape(words)):
        arguments().launch(**{**right, **wrong})


@pytest.mark.parametrize(("wrong", "error", "words"), [
    ({"names": "f"}, TypeError, "names: expected a sequence of kernel names"), ({"names": []}, TypeError, "names: expected a sequence"),
    ({"defines": "A=1"}, TypeError, "defines: expected a sequence such as ['STEPS=4'], got the string 'A=1'"),
    ({"audit": "race"}, ValueError, "audit: expected False, True or 'traffic', got 'race'")])
def test_a_build_says_what_is_wrong_with_it(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        simt.build(**{"source": "__global__ void f() {}", "names": ["f"], **wrong})


@pytest.mark.parametrize("null", [None, np.uint64(0)])
def test_a_null_pointer_is_null(null: Any) -> None:
    arguments().launch("scale", 1, 32, [X, null, FOUR])


def test_arrays_that_overlap_do_so_on_the_device(rng: np.random.Generator) -> None:
    memory = rng.standard_normal(12).astype(np.float32)
    want = memory.copy()
    for i in range(8):
        want[i + 4] = 2 * want[i]
    arguments().launch("scale", 1, 1, [memory, memory[4:], np.int32(8)])
    assert (memory == want).all()


def test_arrays_without_elements_are_passed() -> None:
    arguments().launch("scale", 1, 32, [X[:0], X[:0].copy(), np.int32(0)])


# --- the command -------------------------------------------------------------------------------------------------------------------------

def command(tmp_path: Path, *more: str, kernel: str = "reverse_block<true>", threads: int = 64) -> list[str]:
    file = tmp_path / "planted.cu"
    file.write_text(PLANTED)
    return [str(file), "--kernel", kernel, "--grid", "1", "--block", str(threads), "--array", "float32 8,8", *more]


def test_the_command_shows_findings_and_traffic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--array", "out:float32 128")) == 1
    out = capsys.readouterr().out
    assert "argument 1 (float32, shape (128,)) after the run: " in out and "\nrace: planted.cu:4: thread " in out
    assert re.search(r"\nplanted.cu:4 +global R +4 +2 +32.0 +4.00 sectors \(4.00\)\n", out)
    assert main(command(tmp_path, "--array", "out:float32 128", kernel="reverse_block<false>")) == 0
    out = capsys.readouterr().out
    assert "64 of 128 elements are NaN or infinite" in out and "\nno findings\n" in out


def test_the_command_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path)) == 1
    assert "args: reverse_block<true> has 2 parameters (pc:f4, p:f4), got 1" in capsys.readouterr().err
    assert main(command(tmp_path, "--array", "out:float32 128", kernel="reverse<int>")) == 1
    assert "planted.cu does not compile" in capsys.readouterr().err
    assert main(["nowhere.cu", *command(tmp_path)[1:]]) == 1
    assert "nowhere.cu" in capsys.readouterr().err
    for wrong, words in (("--array=float32", "expected a dtype and a shape"), ("--scalar=int32", "expected a dtype and a value"),
                         ("--array=nothing 3", "nothing")):
        with pytest.raises(SystemExit) as end:
            main(command(tmp_path, wrong))
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_the_command_passes_arguments_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "set.cu"
    file.write_text("template <class T> __global__ void set(int n, const T* x, T* y, float f) { extern __shared__ T s[]; s[OFFSET] = x[0] * T(f);"
                    " for (int i = 0; i < n; ++i) y[i] = s[OFFSET]; }")
    assert main([str(file), "--kernel", "set<double>", "--grid", "1,1", "--block", "1", "--shared", "16", "--define", "OFFSET=1",
                 "--scalar", "int32:3", "--array", "float64 1", "--array", "out:float64 4", "--scalar", "float32:2.5"]) == 0
    assert "argument 2 (float64, shape (4,)) after the run: 1 of 4 elements are NaN or infinite" in capsys.readouterr().out


def test_the_documented_session_is_what_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    document = (Path(__file__).parent.parent / "docs" / "simt.md").read_text(encoding="utf-8")
    sessions, text = 0, ""
    for language, block in re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", document):
        if language == "cpp" and block.startswith("//"):
            text = block
        elif language == "cpp":                                             # line 8 alone
            text = "".join(block if number == 8 else kept for number, kept in enumerate(text.splitlines(keepends=True), 1))
        elif language == "console":
            shown, _, printed = block.partition("\n")
            Path("rows.cu").write_text(text)
            main(shlex.split(shown.removeprefix("$ python -m refattn simt ")))
            assert capsys.readouterr().out == printed
            sessions += 1
    assert sessions == 4
