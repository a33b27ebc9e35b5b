"""What the compiler's evidence is worth: figures of kernels whose figures are known, occupancy against NVIDIA's own code, HMMA where it is used.

The kernels here are small; `test_cuda_static.py` holds the library's own to their budgets.
"""
from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from functools import cache

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from refattn.testing import nvrtc
from refattn.testing.nvrtc import ARCHS, MULTIPROCESSORS, cuda_static_table, cupy_options, nvrtc_compile, occupancy, ptxas_figures, sass

OPTIONS = ("-std=c++17", *cupy_options())


KERNELS = """
#include <cuda_fp16.h>
#include <mma.h>

template <typename T, int N> __global__ void keeps(T* x) {              // N numbers of T in shared memory
  __shared__ T s[N];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[N - 1 - threadIdx.x];
}

__global__ void asks(float* x) {                                        // as much shared memory as the launch says
  extern __shared__ __align__(16) unsigned char smem[];
  float* s = reinterpret_cast<float*>(smem);
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[99 - threadIdx.x];
}

template <int THREADS, int BLOCKS> __global__ void __launch_bounds__(THREADS, BLOCKS) holds(const float* x, float* y) {
  float a[96];                                                          // 96 numbers alive at a barrier
#pragma unroll
  for (int i = 0; i < 96; ++i) a[i] = x[i * THREADS + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * THREADS + threadIdx.x] = a[i] * a[(i + 1) % 96];
}

__global__ void picks(const float* x, const int* at, float* y) {        // 40 numbers that cannot lie in registers: who knows which is meant
  float a[40];
  for (int i = 0; i < 40; ++i) a[i] = x[i];
  a[at[0]] += 1;
  y[threadIdx.x] = a[at[threadIdx.x]];
}

__global__ void __launch_bounds__(32) multiplies(const __half* a, const __half* b, float* c) {            // on tensor cores
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, __half, row_major> x;
  fragment<matrix_b, 16, 16, 16, __half, row_major> y;
  fragment<accumulator, 16, 16, 16, float> z;
  fill_fragment(z, 0.0f);
  load_matrix_sync(x, a, 16);
  load_matrix_sync(y, b, 16);
  mma_sync(z, x, y, z);
  store_matrix_sync(c, z, 16, mem_row_major);
}

__global__ void __launch_bounds__(256) multiplies_scalar(const __half* a, const __half* b, float* c) {
  float sum = 0;
  for (int k = 0; k < 16; ++k) sum += __half2float(a[threadIdx.x / 16 * 16 + k]) * __half2float(b[k * 16 + threadIdx.x % 16]);
  c[threadIdx.x] = sum;
}
"""
NAMES = ("keeps<float, 100>", "keeps<double, 100>", "asks", "holds<256, 1>", "holds<1024, 1>", "picks", "multiplies", "multiplies_scalar")


@cache
def compiled(arch):
    return nvrtc_compile(KERNELS, NAMES, arch, OPTIONS)


def figures(arch):
    found = ptxas_figures(compiled(arch).log)
    return {name: found[symbol] for name, symbol in compiled(arch).lowered.items()}


# --- figures -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_is_what_the_source_declares(arch, wheels):
    assert {name: figures(arch)[name]["shared"] for name in NAMES[:3]} == {"keeps<float, 100>": 400, "keeps<double, 100>": 800, "asks": 0}


@pytest.mark.parametrize("arch", ARCHS)
def test_spills_are_seen_and_only_where_registers_end(arch, wheels):
    """96 numbers and what addresses them need some 100 registers: 1,024 threads leave 64 for each, 256 leave 255."""
    easy, tight = figures(arch)["holds<256, 1>"], figures(arch)["holds<1024, 1>"]
    assert easy["spill_stores"] == easy["spill_loads"] == easy["stack"] == 0
    assert 96 < easy["registers"] <= 255 and tight["registers"] <= 64
    assert tight["spill_stores"] >= 4 * (96 - 64) and tight["spill_loads"] >= 4 * (96 - 64)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_array_that_registers_cannot_hold_is_stack_without_spills(arch, wheels):
    assert figures(arch)["picks"]["stack"] == 160
    assert figures(arch)["picks"]["spill_stores"] == figures(arch)["picks"]["spill_loads"] == 0


def test_half_as_many_registers_spill_more(wheels):
    found = ptxas_figures(nvrtc_compile(KERNELS, ("holds<1024, 1>", "holds<1024, 2>"), "sm_90", OPTIONS).log)
    one, two = sorted((figure for symbol, figure in found.items() if "holds" in symbol), key=lambda figure: -figure["registers"])
    assert (one["registers"], two["registers"]) == (64, 32)
    assert 0 < one["spill_stores"] < two["spill_stores"]


def test_spills_of_a_function_that_is_called_are_not_lost(wheels):
    """ptxas counts them for the function alone, not for the kernel."""
    far = KERNELS[KERNELS.index("template <int THREADS"): KERNELS.index("__global__ void picks")]
    far = re.sub(r"__global__ void __launch_bounds__\(.*?\)", "__device__ __noinline__ void", far.replace("int THREADS, int BLOCKS", "int THREADS"))
    source = far + """
    __global__ void __launch_bounds__(1024) tight(const float* x, float* y) { holds<1024>(x, y); }
    __global__ void __launch_bounds__(256) easy(const float* x, float* y) { holds<1024>(x, y); }
    """
    for names in (("tight", "easy"), ("easy", "tight")):
        result = nvrtc_compile(source, names, "sm_90", OPTIONS)
        found = ptxas_figures(result.log)
        (called,) = found.keys() - set(result.lowered.values())
        assert found[called]["registers"] == 0 < found[result.lowered["tight"]]["registers"] <= 64
        assert found[called]["spill_stores"] > 0 == found[result.lowered["tight"]]["spill_stores"]
        (row,) = cuda_static_table(source, [("tight", 1024, 0)], ["sm_90"])
        assert row["spill_stores"] == found[called]["spill_stores"] and row["spill_loads"] == found[called]["spill_loads"]


def test_a_called_function_shows_its_worst_figures_and_the_kernel_its_registers():
    """Whatever the order in which kernels and what they call stand in the log."""
    def called(stack, stores, loads):
        return (f"ptxas info    : Function properties for called\n    {stack} bytes stack frame, {stores} bytes spill stores, "
                f"{loads} bytes spill loads\n")

    def kernel(name, between):
        return (f"ptxas info    : Compiling entry function '{name}' for 'sm_90'\nptxas info    : Function properties for {name}\n"
                f"    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n{between}"
                "ptxas info    : Used 30 registers, 64 bytes smem, 360 bytes cmem[0]\n")

    own = {"registers": 30, "spill_stores": 0, "spill_loads": 0, "stack": 16, "shared": 64}
    worst = {"registers": 0, "spill_stores": 8, "spill_loads": 12, "stack": 4, "shared": 0}
    for log in (kernel("one", called(4, 8, 12)) + kernel("two", called(0, 0, 0)),
                kernel("one", "") + called(0, 0, 0) + kernel("two", "") + called(4, 8, 12)):
        assert ptxas_figures(log) == {"one": own, "two": own, "called": worst}


# --- instructions ------------------------------------------------------------------------------------------------------------------------

def opcodes(arch, name):
    """Names of the instructions without their modifiers and predicates."""
    return {re.sub(r"^@!?U?P\w+ ", "", line).split(" ")[0].split(".")[0] for line in sass(compiled(arch).cubin)[compiled(arch).lowered[name]]}


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_tensor_cores_work_where_they_are_asked_and_nowhere_else(arch, wheels):
    assert "HMMA" in opcodes(arch, "multiplies")
    assert "HMMA" not in opcodes(arch, "multiplies_scalar") and "FFMA" in opcodes(arch, "multiplies_scalar")


@pytest.mark.parametrize("arch", ["sm_75", "sm_120"])
def test_local_memory_is_in_the_instructions_where_it_is_in_the_figures(arch, wheels):
    for name, figure in figures(arch).items():
        assert bool(opcodes(arch, name) & {"LDL", "STL"}) == bool(figure["stack"] or figure["spill_stores"]), name


def test_every_function_has_its_instructions_and_ends(wheels):
    code = sass(compiled("sm_90").cubin)
    assert set(code) == set(compiled("sm_90").lowered.values())
    for name, lines in code.items():
        assert any(re.fullmatch(r"(@!?U?P\w+ )?EXIT", line) for line in lines), name


@pytest.mark.parametrize("arch", ["sm_75", "sm_120"])
def test_a_predicate_stands_before_its_instruction(arch, wheels):
    result = nvrtc_compile("__global__ void f(float* x, int n) { if (threadIdx.x < n) x[threadIdx.x] = 0; }", ["f"], arch)
    (lines,) = sass(result.cubin).values()
    assert any(re.fullmatch(r"@!?U?P\d EXIT", line) for line in lines), lines


def test_cupys_option_turns_subnormal_numbers_to_zero(wheels):
    """What CuPy adds is not harmless; a table made without it describes other code."""
    source = "__global__ void adds(float* x) { x[threadIdx.x] += x[threadIdx.x + 32]; }"
    for options, flushes in (((), False), (cupy_options(), True)):
        (lines,) = sass(nvrtc_compile(source, ("adds",), "sm_90", options).cubin).values()
        assert any("FADD.FTZ" in line for line in lines) == flushes
        assert any(line.startswith("FADD ") for line in lines) != flushes


# --- occupancy ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, blocks, fraction, limit", [
    (("sm_75", 256, 64, 0), 4, 1.0, "threads"),                # 1024 / 256; registers allow 32 / 8 = 4 too
    (("sm_75", 256, 32, 20000), 3, 0.75, "shared"),            # 20,000 → 20,224, a multiple of 256; 65,536 / 20,224
    (("sm_75", 32, 16, 9300), 6, 0.1875, "shared"),            # → 9,472; 128 at a time it would be 9,344, and 7 blocks
    (("sm_75", 32, 16, 0), 16, 0.5, "blocks"),
    (("sm_75", 32, 16, 64 << 10), 1, 1 / 32, "shared"),        # all there is
    (("sm_75", 32, 16, (64 << 10) + 1), 0, 0.0, "shared"),
    (("sm_80", 256, 33, 0), 6, 0.75, "registers"),             # 33 · 32 → 1,280; 16,384 / 1,280 = 12 warps in each of 4 partitions: 48
    (("sm_80", 96, 40, 0), 16, 0.75, "registers"),             # 48 warps / 3; 65,536 / 1,280 = 51 would be 17
    (("sm_80", 256, 128, 45440), 2, 0.25, "registers"),
    (("sm_80", 256, 64, 54 << 10), 2, 0.25, "shared"),         # (54 + 1) · 3 = 165 KB of 164
    (("sm_80", 256, 64, 53 << 10), 3, 0.375, "shared"),        # (53 + 1) · 3 = 162 KB
    (("sm_86", 768, 40, 0), 2, 1.0, "threads"),
    (("sm_86", 32, 32, 0), 16, 1 / 3, "blocks"),
    (("sm_86", 256, 64, 49 << 10), 2, 1 / 3, "shared"),        # 50 · 2 = 100 KB
    (("sm_86", 256, 64, (49 << 10) + 1), 1, 1 / 6, "shared"),
    (("sm_89", 32, 32, 0), 24, 0.5, "blocks"),
    (("sm_89", 32, 32, (99 << 10) + 1), 0, 0.0, "shared"),
    (("sm_90", 1024, 65, 0), 0, 0.0, "registers"),             # 65 · 32 → 2,304, 32 of them: 73,728 registers for a block
    (("sm_90", 1024, 64, 0), 1, 0.5, "registers"),
    (("sm_90", 128, 32, 100 << 10), 2, 0.125, "shared"),
    (("sm_100", 256, 255, 0), 1, 0.125, "registers"),
    (("sm_100", 64, 32, 227 << 10), 1, 1 / 32, "shared"),
    (("sm_120", 512, 40, 0), 3, 1.0, "threads"),
    (("sm_120", 33, 24, 0), 24, 1.0, "threads"),               # 33 threads are 2 warps: 48 of 48 warps
])
def test_occupancy_by_hand(arguments, blocks, fraction, limit):
    assert occupancy(*arguments) == (blocks, pytest.approx(fraction, rel=1e-15), limit)


NVIDIAS = """
#include <cuda_occupancy.h>
extern "C" int blocks(int major, int minor, int sm_threads, size_t sm_shared, size_t block_shared, size_t reserved,
                      int threads, int registers, size_t shared, int* limits) {
  cudaOccDeviceProp p = {};
  p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024; p.maxThreadsPerMultiprocessor = sm_threads;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.warpSize = 32; p.sharedMemPerBlock = 48 << 10; p.sharedMemPerMultiprocessor = sm_shared;
  p.numSms = 1; p.sharedMemPerBlockOptin = block_shared; p.reservedSharedMemPerBlock = reserved;
  cudaOccFuncAttributes a = {};
  a.maxThreadsPerBlock = 1024; a.numRegs = registers; a.partitionedGCConfig = PARTITIONED_GC_OFF; a.numBlockBarriers = 1;
  a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; a.maxDynamicSharedSizeBytes = shared;
  cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &a, &state, threads, shared) != CUDA_OCC_SUCCESS) return -1;
  *limits = result.limitingFactors;
  return result.activeBlocksPerMultiprocessor;
}
"""
LIMITS = {"threads": 0x01, "registers": 0x02, "shared": 0x04, "blocks": 0x08}      # OCC_LIMIT_WARPS, _REGISTERS, _SHARED_MEMORY, _BLOCKS


@pytest.fixture(scope="module")
def nvidias(tmp_path_factory, wheels):
    """The occupancy calculator that comes with CUDA's headers, compiled for the host."""
    if shutil.which("g++") is None:
        pytest.skip("NVIDIA's header needs g++")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "occupancy.cpp").write_text(NVIDIAS)
    subprocess.run(["g++", "-shared", "-fPIC", f"-I{nvrtc._nvrtc()[1]}", "occupancy.cpp", "-o", "occupancy.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "occupancy.so")).blocks


@given(arch=st.sampled_from(ARCHS), threads=st.integers(1, 1024) | st.sampled_from([64, 96, 128, 256, 512]), registers=st.integers(1, 255),
       shared=st.just(0) | st.integers(0, 230 << 10))
@example("sm_75", 32, 16, (64 << 10) + 1)
@example("sm_80", 96, 40, 0)
@example("sm_86", 256, 64, (49 << 10) + 1)
@example("sm_90", 1000, 65, 0)
def test_occupancy_is_nvidias(nvidias, arch, threads, registers, shared):
    sm, number, limits = MULTIPROCESSORS[arch], int(arch[3:]), ctypes.c_int()
    expected = nvidias(number // 10, number % 10, sm.threads, ctypes.c_size_t(sm.shared), ctypes.c_size_t(sm.shared_per_block),
                       ctypes.c_size_t(sm.reserved), threads, registers, ctypes.c_size_t(shared), ctypes.byref(limits))
    got = occupancy(arch, threads, registers, shared)
    assert got.blocks == expected
    assert got.fraction == expected * -(-threads // 32) / (sm.threads // 32)
    if expected:                       # where nothing fits, NVIDIA names no reason, or all of them
        assert limits.value & LIMITS[got.limit], f"{got.limit} does not limit, NVIDIA says {limits.value}"


# --- the table ---------------------------------------------------------------------------------------------------------------------------

def test_the_table_has_a_row_for_each_architecture_and_instance(wheels):
    instances = [("keeps<float, 100>", 100, 99 << 10), ("asks", 256, 100 << 10), ("asks", 256, 1024)]
    rows = cuda_static_table(KERNELS, instances, ["sm_80", "sm_86"])
    assert [(row["arch"], row["kernel"], row["threads"], row["dynamic_shared"]) for row in rows] == [
        (arch, *instance) for arch in ("sm_80", "sm_86") for instance in instances]
    assert [(row["static_shared"], row["blocks"], row["limit"]) for row in rows] == [
        (400, 1, "shared"), (0, 1, "shared"), (0, 8, "threads"), (400, 0, "shared"), (0, 0, "shared"), (0, 6, "threads")]
    for row in rows:
        own = figures(row["arch"])[row["kernel"]]
        assert {key: row[key] for key in ("registers", "spill_stores", "spill_loads", "stack")} == {
            key: own[key] for key in ("registers", "spill_stores", "spill_loads", "stack")}
        assert row["occupancy"] == occupancy(row["arch"], row["threads"], row["registers"], row["static_shared"] + row["dynamic_shared"]).fraction
    assert len(nvrtc.format_table(rows).splitlines()) == 1 + len(rows) and nvrtc.format_table([]) == ""


@pytest.mark.parametrize("source, arch, words", [
    ("__global__ void f(float* x) { int unused; x[0] = 1; }", "sm_80", r"mine\.cu compiles for sm_80 with warnings:\nmine\.cu\(1\): .*\"unused\""),
    ("__global__ void __launch_bounds__(1024, 2) f(float* x) { x[0] = 1; }", "sm_75", r"sm_75 with warnings:\nptxas warning : .*out of range")])
def test_a_warning_of_either_compiler_stops_the_table(source, arch, words, wheels):
    with pytest.raises(RuntimeError, match=words):
        cuda_static_table(source, [("f", 32, 0)], [arch], path="mine.cu")


# --- errors ------------------------------------------------------------------------------------------------------------------------------

def test_a_source_that_does_not_compile_is_an_error_with_the_log(wheels):
    with pytest.raises(RuntimeError, match=r'mine\.cu does not compile for sm_80: NVRTC_ERROR_COMPILATION\nmine\.cu\(2\): error: identifier "y"'):
        nvrtc_compile("\n__global__ void f(float* x) { x[0] = y; }", ["f"], "sm_80", path="mine.cu")


def test_headers_can_be_given_as_texts(wheels):
    source = '#include "one.cuh"\n__global__ void f(float* x) { x[0] = ONE; }'
    assert nvrtc_compile(source, ["f"], "sm_80", headers={"one.cuh": "#define ONE 1.0f\n"}).lowered == {"f": "_Z1fPf"}
    with pytest.raises(RuntimeError, match=r"one\.cuh"):
        nvrtc_compile(source, ["f"], "sm_80")


def test_an_unknown_architecture_is_an_error(wheels):
    with pytest.raises(ValueError, match="arch: expected one of sm_75, .*sm_120.*, got 'sm_70': this NVRTC compiles for no other"):
        nvrtc_compile("", [], "sm_70")


@pytest.mark.parametrize("arguments, words", [
    (("sm_70", 256, 32, 0), "arch: expected one of sm_75, sm_80, .*, got 'sm_70'"),
    (("sm_80", 0, 32, 0), "threads: expected 1 to 1024, got 0"),
    (("sm_80", 1025, 32, 0), "threads: expected 1 to 1024, got 1025"),
    (("sm_80", 256, 256, 0), "registers: expected 1 to 255, got 256"),
    (("sm_80", 256, 32, -1), "shared: expected 0 to .*, got -1")])
def test_occupancy_names_the_argument_that_no_kernel_has(arguments, words):
    with pytest.raises(ValueError, match=words):
        occupancy(*arguments)


def test_bytes_that_are_no_cubin_are_an_error(wheels):
    with pytest.raises(RuntimeError, match="nvdisasm cannot read the cubin: .*nvdisasm"):
        sass(b"no machine code")


def test_without_the_wheels_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    nvrtc._nvrtc.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"NVRTC .*pip install 'refattn\[nvrtc\]'"):
            nvrtc_compile("", [], "sm_80")
        with pytest.raises(ImportError, match=r"nvidia-cuda-nvdisasm, .*pip install 'refattn\[nvrtc\]'"):
            sass(b"")
    finally:
        nvrtc._nvrtc.cache_clear()
