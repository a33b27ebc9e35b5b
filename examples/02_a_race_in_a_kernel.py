"""A CUDA kernel runs on the CPU, in three orders of its threads, and a missing barrier is named by its lines."""
from pathlib import Path

import numpy as np

from refattn import simt

file = Path(__file__).with_suffix(".cu")
kernel, x = "neighbours<float, 64>", np.arange(256, dtype=np.float32)
right = np.pad(x.reshape(4, 64), ((0, 0), (0, 3)))
right = sum(right[:, j:j + 64] for j in range(4)).reshape(-1)
for defines in ([], ["WITH_BARRIER"]):
    module = simt.build(file.read_text(), [kernel], defines=defines, path=file)
    for order in ("forward", "reverse", "shuffled"):
        y = np.full_like(x, np.nan)
        module.launch(kernel, 4, 64, [x, y], order=order)
        print(f"{' '.join(defines) or 'without a barrier'}, {order}: {(y != right).sum()} of {y.size} elements are wrong")
    report = simt.build(file.read_text(), [kernel], defines=defines, path=file, audit=True).launch(kernel, 4, 64, [x, np.full_like(x, np.nan)])
    print("\n".join(report.findings) or "no findings")
