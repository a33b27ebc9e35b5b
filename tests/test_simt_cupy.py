"""The stand-in for CuPy: every fault of launch code that a device would pass over in silence is an error here, and nothing converts by itself."""
from __future__ import annotations

import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn.simt import SimtError
from refattn.simt import cupy as cp

SOURCE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
constexpr int THREADS = 64;
template <typename T> __global__ void __launch_bounds__(THREADS) scale(const T* x, T* y, int n, long long from, float by) {
  const long long i = from + blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = (T)((float)x[i] * by);
}
extern "C" __global__ void mark(int* y) { y[0] = 1; }
extern "C" __global__ void stage(const float* x, float* y, int wait) {
  extern __shared__ float buffer[];
  buffer[threadIdx.x] = x[threadIdx.x];
  if (wait) __syncthreads();
  y[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}
extern "C" __launch_bounds__(32) __global__ void by_four(const float4* x, void* y) { ((float4*)y)[threadIdx.x] = x[threadIdx.x]; }
template <int T> __global__ void __launch_bounds__(T) bound_by_template(int* y) { y[0] = 1; }
"""
NAME = "scale<float>"
f4, i4, i8 = np.float32, np.int32, np.int64

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="kernels are compiled for the CPU by g++, which is not here")


@pytest.fixture(scope="module")
def module():
    return cp.RawModule(code=SOURCE, options=("-std=c++17",), name_expressions=(
        NAME, "scale<__half>", "scale<__nv_bfloat16>", "mark", "stage", "by_four", "bound_by_template<32>"))


def arrays(n=100, dtype=f4):
    return cp.asarray(np.arange(n).astype(dtype)), cp.empty(n, dtype=dtype)


@needs_compiler
@pytest.mark.parametrize("dtype, name", [(f4, NAME), (np.float16, "scale<__half>"), (ml_dtypes.bfloat16, "scale<__nv_bfloat16>")])
def test_a_right_launch_runs(module, dtype, name):
    x, y = arrays(dtype=dtype)
    module.get_function(name)((2,), (64,), (x, y, i4(100), i8(0), f4(2)))
    assert np.array_equal(y.get(), np.arange(100).astype(dtype) * dtype(2))


FAULTS = {
    "a Python int where the kernel has int": (lambda x, y: (x, y, 100, i8(0), f4(2)), TypeError, "argument 2 .* expected i4, got int64"),
    "int32 where it has long long": (lambda x, y: (x, y, i4(100), i4(0), f4(2)), TypeError, "argument 3 .* expected i8, got int32"),
    "a Python float where it has float": (lambda x, y: (x, y, i4(100), i8(0), 2.0), TypeError, "argument 4 .* expected f4, got float64"),
    "an integer where it has float": (lambda x, y: (x, y, i4(100), i8(0), i4(2)), TypeError, "argument 4 .* expected f4, got int32"),
    "unsigned where it has int": (lambda x, y: (x, y, np.uint32(100), i8(0), f4(2)), TypeError, "argument 2 .* expected i4, got uint32"),
    "an array where it has a number": (lambda x, y: (x, y, x, i8(0), f4(2)), TypeError, "argument 2 .* expected a scalar i4, got an array"),
    "a number where it has a pointer": (lambda x, y: (x, i4(0), i4(100), i8(0), f4(2)), TypeError, "argument 1 .* expected an array or np.uint64"),
    "an address": (lambda x, y: (x, np.uint64(y.data.ptr), i4(100), i8(0), f4(2)), TypeError, "argument 1 .* expected an array or np.uint64.0."),
    "None": (lambda x, y: (x, None, i4(100), i8(0), f4(2)), TypeError, "argument 1 .* Unsupported type"),
    "a NumPy array": (lambda x, y: (x, y.get(), i4(100), i8(0), f4(2)), TypeError, "argument 1 .* Unsupported type <class 'numpy.ndarray'>"),
    "float64 for float": (lambda x, y: (x.astype(np.float64), y, i4(100), i8(0), f4(2)), TypeError, "argument 0 .* an array of f4, got float64"),
    "float16 for float": (lambda x, y: (x, y.astype(np.float16), i4(100), i8(0), f4(2)), TypeError, "argument 1 .* an array of f4, got float16"),
    "every second element": (lambda x, y: (x[::2], y, i4(50), i8(0), f4(2)), TypeError, "argument 0 .* expected a contiguous array"),
    "one argument missing": (lambda x, y: (x, y, i4(100), i8(0)), TypeError, "expected 5 arguments, got 4"),
    "one too many": (lambda x, y: (x, y, i4(100), i8(0), f4(2), i4(0)), TypeError, "expected 5 arguments, got 6"),
    "two exchanged": (lambda x, y: (x, y, i8(0), i4(100), f4(2)), TypeError, "argument 2 .* expected i4, got int64"),
    "a list of arguments": (lambda x, y: [x, y, i4(100), i8(0), f4(2)], TypeError, "args: expected a tuple, got list"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_arguments_are_named(fault, module):
    args, error, words = FAULTS[fault]
    with pytest.raises(error, match=words):
        module.get_function(NAME)((2,), (64,), args(*arrays()))


@needs_compiler
def test_an_array_of_another_device_is_refused(module):
    x, y = arrays()
    with cp.cuda.Device(1):
        assert cp.cuda.runtime.getDevice() == 1
        z = cp.empty(100, dtype=f4)
    with pytest.raises(cp.CUDADriverError, match="argument 1 .* on device 1, the kernel runs on 0"):
        module.get_function(NAME)((2,), (64,), (x, z, i4(100), i8(0), f4(2)))
    for use in (lambda: x + z, lambda: z + 1, lambda: z.sum(), lambda: cp.exp(z), lambda: z.__iadd__(1)):
        with pytest.raises(ValueError, match="array device = 1 while current = 0"):
            use()
    for view in (z[1:], z.reshape(10, 10), z.reshape(10, 10).swapaxes(0, 1), z.T):
        assert view.device == cp.cuda.Device(1) != x.device               # a view lies where its array lies


@needs_compiler
def test_faults_of_the_launch_are_named(module):
    x, y = arrays()
    kernel, args = module.get_function(NAME), (x, y, i4(100), i8(0), f4(2))
    for grid, block, words in (((1,), (65,), "bound to 64 threads"), ((1, 65536), (64,), "grid .1, 65536, 1."), ((2**31,), (64,), "grid"),
                               ((1,), (1, 1, 65), "block")):
        with pytest.raises(cp.CUDADriverError, match=words):
            kernel(grid, block, args)
    with pytest.raises(cp.CUDADriverError, match="block .1025, 1, 1."):
        module.get_function("mark")((1,), (1025,), (cp.zeros(1, dtype=i4),))
    for grid, block, words in ((1, (64,), "grid: expected a tuple"), ((1,), 64, "block: expected a tuple"), ((100 / 64,), (64,), "float"),
                               ((1,), (64.0,), "float")):
        with pytest.raises(TypeError, match=words):
            kernel(grid, block, args)
    with pytest.raises(cp.CUDADriverError, match="CUDA_ERROR_NOT_FOUND: .*scale<double>"):
        module.get_function("scale<double>")
    with pytest.raises(TypeError, match="options must be a tuple"):
        cp.RawModule(code=SOURCE, options=["-std=c++17"])
    assert cp.RawModule(code=SOURCE).names == ("mark", "stage", "by_four")


@needs_compiler
def test_launch_bounds_hold_wherever_they_stand_and_are_never_passed_over(module):
    x, y = arrays(128)
    kernel = module.get_function("by_four")
    kernel((1,), (32,), (x, y))                                         # float4* and void* take arrays of float32
    assert np.array_equal(x.get(), y.get())
    with pytest.raises(cp.CUDADriverError, match="block .33, 1, 1., where by_four is bound to 32 threads"):
        kernel((1,), (33,), (x, y))
    with pytest.raises(TypeError, match="argument 0 of by_four: expected an array of f4x4, got float64"):
        kernel((1,), (32,), (x.astype(np.float64), y))
    with pytest.raises(ValueError, match=r"__launch_bounds__\(T\): expected a number or a constexpr int"):
        module.get_function("bound_by_template<32>")


@needs_compiler
def test_much_shared_memory_must_be_asked_for_and_has_the_devices_limit(module):
    x, y = arrays(32)
    kernel = module.get_function("stage")
    kernel((1,), (32,), (x, y, i4(1)), shared_mem=48 << 10)
    assert np.array_equal(y.get(), np.arange(32)[::-1])
    with pytest.raises(cp.CUDADriverError, match="49153 bytes of dynamic shared memory, 49152 are allowed; set max_dynamic_shared_size_bytes"):
        kernel((1,), (32,), (x, y, i4(1)), shared_mem=(48 << 10) + 1)
    kernel.max_dynamic_shared_size_bytes = 100 << 10
    kernel((1,), (32,), (x, y, i4(1)), shared_mem=100 << 10)
    with cp.capability(86), pytest.raises(cp.CUDADriverError, match="sm_86 has 101376 for a block"):
        kernel.max_dynamic_shared_size_bytes = 100 << 10


@needs_compiler
def test_an_empty_grid_runs_one_block(module):
    y = cp.zeros(1, dtype=i4)
    assert cp.max(y).get() == 0 and not cp.any(y)                       # NumPy's max and any do not become the stand-in's own
    module.get_function("mark")((0,), (1,), (y,))
    assert y.get() == 1


@needs_compiler
def test_an_audit_finds_the_race_that_a_plain_run_passes_over(module):
    x, y = arrays(64)
    kernel = module.get_function("stage")
    kernel((1,), (64,), (x, y, i4(0)), shared_mem=256)
    with cp.audit(), pytest.raises(SimtError, match="stage: .*race|stage: .*uninitialised"):
        kernel((1,), (64,), (x, y, i4(0)), shared_mem=256)
    with cp.audit() as traffic:
        with cp.audit() as inner:
            kernel((1,), (64,), (x, y, i4(1)), shared_mem=256)
        assert not traffic
        kernel((1,), (64,), (x, y, i4(1)), shared_mem=256)
    assert traffic == inner and sum(c.requests for c in traffic.values()) == 8              # two warps: x, buffer, buffer, y


@needs_compiler
def test_the_order_of_the_threads_shows_in_a_race_and_nowhere_else(module):
    x, y = arrays(64)
    kernel, results = module.get_function("stage"), {0: [], 1: []}
    for order in ("forward", "reverse"):
        with cp.threads(order):
            for wait, found in results.items():
                kernel((1,), (64,), (x, y, i4(wait)), shared_mem=256)
                found.append(y.get().tobytes())
    assert results[1][0] == results[1][1] and results[0][0] != results[0][1]


# --- arrays -------------------------------------------------------------------------------------------------------------------------------

def test_nothing_becomes_a_numpy_array_by_itself():
    x, host = cp.ones((2, 3), dtype=f4), np.ones((2, 3), f4)
    with pytest.raises(TypeError, match=r"Implicit conversion to a NumPy array is not allowed. Please use `.get\(\)`"):
        np.asarray(x)
    for mixed in (lambda: x + host, lambda: host + x, lambda: cp.exp(host), lambda: cp.concat([x, host]), lambda: np.exp(x),
                  lambda: x.__setitem__(0, host[0])):
        with pytest.raises(TypeError):
            mixed()
    kept = x.get()
    kept[...] = 0
    assert (x.get() == 1).all()
    y = cp.asarray(host)
    host[...] = 0
    assert (y.get() == 1).all()


def test_what_cupy_lacks_is_lacking_and_what_is_new_is_garbage():
    x = cp.ones((2, 3), dtype=f4)
    assert not hasattr(x, "mT") and not hasattr(cp, "cumulative_sum")
    with pytest.raises(AttributeError, match="has no attribute 'lexsort'"):
        _ = cp.lexsort
    for missing in (lambda: hash(x), lambda: x.flags.writeable, lambda: cp.exp.reduceat, lambda: cp.sum(x, where=x > 0),
                    lambda: cp.max(x, initial=0)):
        with pytest.raises((AttributeError, TypeError), match="unhashable|no attribute|unexpected keyword argument '(where|initial)'"):
            missing()
    for dtype in (object, np.longdouble, ">f4", "S3", ml_dtypes.float8_e4m3fn):
        with pytest.raises(ValueError, match="Unsupported dtype"):
            cp.asarray(np.zeros(2, dtype))
    for y in (cp.empty((2, 3), dtype=np.float16), cp.empty_like(x), cp.empty(4, dtype=ml_dtypes.bfloat16)):
        assert np.isnan(y.get().astype(float)).all()
    assert x.__array_namespace__() is cp and isinstance(cp.sum(x), cp.ndarray) and cp.sum(x).shape == ()
    assert cp.asarray(x) is x and x.astype(f4, copy=False) is x and x.astype(f4) is not x
    assert cp.ascontiguousarray(x) is x and cp.ascontiguousarray(x.T).flags.c_contiguous


def test_matrix_products_in_half_precision_sum_in_float32_and_those_in_bfloat16_are_refused():
    half = cp.ones((1, 4096), dtype=np.float16)
    assert (half @ half.T).get() == 4096 and (half @ half.T).dtype == np.float16              # a sum in float16 would stop at 2048
    wide = cp.ones((2, 3), dtype=ml_dtypes.bfloat16)
    for product in (lambda: wide @ wide.T, lambda: cp.matmul(wide, wide.T), lambda: wide @ cp.ones((3, 1), dtype=f4)):
        with pytest.raises(TypeError, match="matmul of bfloat16: .* cast to float32 first"):
            product()


def test_what_is_written_into_comes_back_itself():
    x, y = cp.ones(3, dtype=f4), cp.empty(3, dtype=f4)
    assert cp.add(x, 1, out=y) is y and (y.get() == 2).all()
    assert cp.add.reduceat(y, cp.asarray(np.array([0, 1])), axis=0).get().tolist() == [2, 4]
    z = y
    y += x
    assert z is y and (z.get() == 3).all()


ONE = ("exp", "tanh", "sqrt", "abs", "isfinite", "negative", "square", "zeros_like", "ones_like", "positive")
TWO = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "equal")
REDUCING = ("sum", "max", "min", "any", "all", "prod", "argmax")


@given(st.integers(0, 2**32 - 1), st.sampled_from([(), (3,), (2, 0), (2, 3), (2, 1, 3)]), st.sampled_from([np.float32, np.float64]))
def test_functions_and_operators_are_numpys(seed, shape, dtype):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, *shape)).astype(dtype)
    x, y = cp.asarray(a), cp.asarray(b)

    def same(got, expected):
        assert isinstance(got, cp.ndarray) and got.dtype == expected.dtype and got.shape == expected.shape
        assert got.get().tobytes() == np.ascontiguousarray(expected).tobytes()

    for name in ONE:
        same(getattr(cp, name)(x), getattr(np, name)(a))
    for name in TWO:
        same(getattr(cp, name)(x, y), np.asarray(getattr(np, name)(a, b)))
    if a.size:
        for name in REDUCING:
            same(getattr(cp, name)(x), np.asarray(getattr(np, name)(a)))
    for operate in (lambda u, w: u + w, lambda u, w: 2 * u - w / 3, lambda u, w: -u * w, lambda u, w: u**2 <= w, lambda u, w: (u != w) & (u < 1)):
        same(operate(x, y), np.asarray(operate(a, b)))
    z = x.copy()
    z += y
    same(z, np.asarray(a + b))
    same(x, np.asarray(a))
    if len(shape) > 1:
        same(x[..., 1:], a[..., 1:])
        same(x.swapaxes(0, 1) @ y if len(shape) == 2 else cp.matmul(x.swapaxes(1, 2), y), np.swapaxes(a, -1, -2) @ b)
        same(cp.concat([x, y], axis=-1), np.concatenate([a, b], axis=-1))
        same(cp.where(x > y, x, 0), np.where(a > b, a, 0))
        same(cp.flip(cp.cumsum(x, axis=-1), axis=0), np.flip(np.cumsum(a, axis=-1), axis=0))
        z[0] = 7
        assert (z.get()[0] == 7).all()
