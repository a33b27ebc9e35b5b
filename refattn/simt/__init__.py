"""Run CUDA kernels, unmodified, on the CPU, and be shown what is wrong with them. Needs g++ on Linux, and no GPU.

    import numpy as np
    from refattn import simt

    source = '''
    __global__ void reverse(const float* x, float* y) {
      __shared__ float buffer[64];
      buffer[threadIdx.x] = x[threadIdx.x];
      y[threadIdx.x] = buffer[63 - threadIdx.x];
    }
    '''
    x, y = np.arange(64, dtype=np.float32), np.full(64, np.nan, np.float32)
    module = simt.build(source, ["reverse"], audit=True)
    report = module.launch("reverse", 1, 64, [x, y])
    print("\\n".join(report.findings))      # the race: a __syncthreads() is missing

`build(source, names, *, defines=(), audit=False, path="kernel.cu")` compiles; `Module.signature(name)` says what the kernel's parameters are;
`Module.launch(name, grid, block, args, *, shared=0, order="forward", seed=0)` runs it on NumPy arrays, in place. A kernel that cannot go on
raises `SimtError`. `python -m refattn simt` does all of this for a file.

What runs as on a device: blocks and threads, `__syncthreads` and its counting forms, `__syncwarp`, shuffles, votes, atomics, static and
dynamic shared memory, templates, half and bfloat16 with their rounding, `wmma` tiles of 16 × 16 × 16, vectors such as float4. Threads are
fibers that run one at a time, in an order that you choose. Shared memory starts as NaN, and so does what lies around the arrays.

What is said without `audit`: deadlocks, barriers that not all threads reach, warp operations that read a lane which is not there.

With `audit=True` also, in `Report.findings`, each with the line and the thread:

- races: two threads touch the same bytes, one of them writes, and no `__syncthreads` or `__syncwarp` orders them; across blocks nothing does;
- accesses out of bounds, with the array and the distance, and misaligned ones; such a finding ends the launch before the access is made;
- reads of shared memory that no thread of the block has written;

and in `Report.traffic`, by line: requests of warps to global memory with the 32-byte sectors that they touch, and to shared memory with the
passes that they take over its 32 banks. `audit="traffic"` counts only, in about half the time.

What is not seen: speed, the hardware's own faults, memory order finer than barriers (`__threadfence` does nothing), the error of fast
intrinsics such as `__expf`, contraction to fused multiply-adds, flushing of subnormals to zero, and the order in which tensor cores sum.
Races are found between accesses to the same two bytes, or the same byte in arrays of bytes. A warp's requests are told apart by counting: the
n-th access of each lane at an instruction, since the last barrier, belongs to the n-th request.
"""
from .audit import Counts, Report, traffic_table
from .build import Module, SimtError, build, dtype_code
from .command import main as main

__all__ = ["Counts", "Module", "Report", "SimtError", "build", "dtype_code", "traffic_table"]
