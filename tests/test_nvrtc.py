"""Every kernel compiles for every architecture as CuPy would compile it: no warning, nothing spilled, two blocks on a multiprocessor."""
from __future__ import annotations

import re
from functools import cache

import pytest

from refattn.cuda import launch
from refattn.testing import nvrtc
from refattn.testing.nvrtc import ARCHITECTURES, Occupancy, nvrtc_compile, occupancy, sass


@pytest.fixture(scope="module", autouse=True)
def wheels():
    try:
        nvrtc._library()
    except ImportError as error:
        pytest.skip(str(error))


# dtype, D, M, φ, normaliser: one dk_dv and one pair; an odd size; the largest, whose shared memory is
INSTANCES = [("float32", 64, 64, 1, True), ("float16", 64, 64, 1, True), ("bfloat16", 64, 64, 1, True), ("float64", 64, 64, 1, True),
             ("float32", 128, 128, 1, True), ("float32", 256, 256, 0, False), ("float64", 256, 256, 1, True), ("float16", 37, 50, 1, True)]


def expressions(dtype, D, M, feature, normalised):
    T, flags = launch.C_TYPES[dtype], f"{feature}, {str(normalised).lower()}"
    names = dict(launch.names(dtype, D, M, feature, normalised))
    names["causal_naive"] = f"causal_naive<{T}, {D}, {M}, {flags}>"
    if D <= (32 if dtype == "float64" else 64):
        names["causal_sequential"] = f"causal_sequential<{T}, {D}, {M}, {flags}>"
    return names


@cache
def compiled(instance, architecture):
    return nvrtc_compile(launch.source(), tuple(dict.fromkeys(expressions(*instance).values())), architecture)


def dynamic_shared(kernel, dtype, D, M):
    size = 8 if dtype == "float64" else 4
    if kernel in ("group_states", "group_costates"):
        return launch.state_bytes(D, launch.tile(D, M, size), size)
    if kernel == "group_dk_dv":
        return launch.both_bytes(D, M, size)
    if kernel in ("group_outputs", "group_dv"):
        return launch.walk_bytes(D, launch.tile(D, M, size), size)
    return launch.walk_bytes(M, launch.tile(M, D, size), size) if kernel in ("group_dq", "group_dk") else 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("instance", INSTANCES, ids=lambda i: "-".join(map(str, i)))
def test_every_instance_compiles_spills_nothing_and_fits(instance, architecture):
    dtype, D, M, *_ = instance
    result = compiled(instance, architecture)
    assert "warning" not in result.log.lower(), result.log
    for kernel, name in expressions(*instance).items():
        figures = result.figures[name]
        assert figures.spilled == 0 and figures.stack == 0, (name, figures)
        threads = 64 if kernel == "causal_sequential" else launch.THREADS
        held = occupancy(architecture, threads, figures.registers, figures.shared + dynamic_shared(kernel, dtype, D, M))
        least = 2 if D == M == 64 and dtype != "float64" and architecture >= 80 else 1
        assert held.blocks >= least, (name, figures, held)


def test_no_kernel_adds_by_atomics_or_uses_local_memory():
    code = sass(compiled(INSTANCES[0], 90))
    assert len(code) >= 8
    for name, instructions in code.items():
        assert len(instructions) > 20, name
        assert not [i for i in instructions if re.search(r"\b(ATOM|ATOMG|RED|ATOMS|LDL|STL)\b", i)], name
    assert any("FFMA" in i for i in code[launch.names(*INSTANCES[0])["group_outputs"]])


SMALL = """
#include <mma.h>
#include <cuda_fp16.h>
extern "C" __global__ void __launch_bounds__(32) tile(const __half* a, const __half* b, float* c) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, __half, row_major> x;
  fragment<matrix_b, 16, 16, 16, __half, row_major> y;
  fragment<accumulator, 16, 16, 16, float> z;
  fill_fragment(z, 0.0f), load_matrix_sync(x, a, 16), load_matrix_sync(y, b, 16), mma_sync(z, x, y, z), store_matrix_sync(c, z, 16, mem_row_major);
}
extern "C" __global__ void still(float* x) {
  __shared__ float s[100];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[99 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float s[96];
  for (int i = 0; i < 96; ++i) s[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < 3; ++k)
    for (int i = 0; i < 96; ++i) s[i] = s[i] * s[(i + 7 * k + 1) % 96] + x[i];
  float sum = 0;
  for (int i = 0; i < 96; ++i) sum += s[i];
  x[threadIdx.x] = sum;
}
"""


def test_the_figures_of_known_kernels():
    """A kernel with tensor cores, one with 400 bytes of shared memory, and one that must spill: the checks above can fail."""
    result = nvrtc_compile(SMALL, ("tile", "still", "spills"), 80)
    assert result.figures["still"].shared == 400 and result.figures["still"].spilled == 0
    assert result.figures["spills"].spilled > 0 and result.figures["spills"].registers <= 32
    code = sass(result)
    assert any("HMMA" in i for i in code["tile"]) and not any("HMMA" in i for i in code["still"])
    assert any(re.search(r"\b(LDL|STL)\b", i) for i in code["spills"])


def test_errors_say_what_is_wrong():
    with pytest.raises(RuntimeError, match=r"NVRTC for sm_80:\n(.|\n)*identifier \"nothing\" is undefined"):
        nvrtc_compile('extern "C" __global__ void f(int* x) { *x = nothing; }', ("f",), 80)
    with pytest.raises(ValueError, match="architecture: expected one of 75, .*, got 13"):
        nvrtc_compile("", (), 13)
    with pytest.raises(ValueError, match="architecture: expected one of 75, 80, .* got 70"):
        occupancy(70, 256, 32, 0)
    assert "warning" in nvrtc_compile('extern "C" __global__ void f(int* x) { int unused; *x = 0; }', ("f",), 80).log


@pytest.mark.parametrize("arguments, expected", [
    ((75, 256, 64, 0), Occupancy(4, 1.0, "threads")),                    # 1024 / 256; 65536 / (64·256) = 4 too
    ((80, 256, 32, 0), Occupancy(8, 1.0, "threads")),
    ((80, 256, 33, 0), Occupancy(6, 0.75, "registers")),                 # 33 → 40 registers: 65536 / 1280 / 8 = 6
    ((86, 256, 128, 50048), Occupancy(2, 1 / 3, "registers")),           # 102400 / (50048 + 1024) = 2, 65536 / 4096 / 8 = 2
    ((90, 128, 32, 100 << 10), Occupancy(2, 0.125, "shared memory")),
    ((120, 32, 16, 0), Occupancy(24, 0.5, "blocks")),
    ((75, 256, 32, 65 << 10), Occupancy(0, 0.0, "shared memory")),
    ((100, 1024, 32, 0), Occupancy(2, 1.0, "threads"))])
def test_occupancy_by_hand(arguments, expected):
    assert occupancy(*arguments) == expected
