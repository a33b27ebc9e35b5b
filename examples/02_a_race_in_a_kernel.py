"""A CUDA kernel runs on the CPU, in three orders of its threads, and a missing barrier is named by its lines.

The figure shows who reads what, and which elements are wrong in which order: without a barrier a thread that has its turn before its neighbours
reads what they have not written yet. An order in which all is right by chance proves nothing; the audit finds the race in any order.
"""
import argparse
import os
from pathlib import Path

import numpy as np

from refattn import simt
from refattn.experiment import figure_save, require_extras

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default=os.path.join("out", "examples"), metavar="FOLDER", help="where the figure goes (default: %(default)s)")
folder = parser.parse_args().out
require_extras("matplotlib")

file = Path(__file__).with_suffix(".cu")
kernel, x, wrong = "neighbours<float, 64>", np.arange(256, dtype=np.float32), {}
right = np.pad(x.reshape(4, 64), ((0, 0), (0, 3)))
right = sum(right[:, j:j + 64] for j in range(4)).reshape(-1)
for defines in ([], ["WITH_BARRIER"]):
    module, name = simt.build(file.read_text(), [kernel], defines=defines, path=file), " ".join(defines) or "without a barrier"
    for order in ("forward", "reverse", "shuffled"):
        y = np.full_like(x, np.nan)
        module.launch(kernel, 4, 64, [x, y], order=order)
        wrong[name, order] = y != right
        print(f"{name}, {order}: {wrong[name, order].sum()} of {y.size} elements are wrong")
    report = simt.build(file.read_text(), [kernel], defines=defines, path=file, audit=True).launch(kernel, 4, 64, [x, np.full_like(x, np.nan)])
    print("\n".join(report.findings) or "no findings")


def draw(path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    t = np.repeat(np.arange(12), 4)                                              # thread t reads near[t] … near[t + 3]
    read = t + np.tile(np.arange(4), 12)
    early = {"no barrier, forward": read > t, "no barrier, reverse": read < t, "a barrier, any order": read < 0}
    for ax, (order, not_yet) in zip(above.subplots(1, 3, sharey=True), early.items(), strict=True):
        ax.plot(read[~not_yet], t[~not_yet], "o", color="C0", label="written before")
        ax.plot(read[not_yet], t[not_yet], "x", color="C3", label="not written yet")
        ax.set(title=order, xlabel="element of near[]", xticks=range(0, 15, 2), yticks=range(12), ylim=(11.6, -0.6))
        ax.grid(alpha=0.3)
        ax.legend(loc="lower left", fontsize=9)
        if not ax.get_subplotspec().colspan.start:
            ax.set_ylabel("thread that reads (0 to 11 of 64)")
    ax = below.subplots()
    ax.imshow(np.array(list(wrong.values())), aspect="auto", cmap="RdBu_r", vmin=-1.2, vmax=1.2, interpolation="nearest")
    ax.set_yticks(range(len(wrong)), [f"{name}, {order}: {rows.sum()} wrong" for (name, order), rows in wrong.items()])
    ax.set_xticks(range(0, 257, 64))
    for edge in range(64, 256, 64):
        ax.axvline(edge - 0.5, color="black", linewidth=1)
    for i in range(1, len(wrong)):
        ax.axhline(i - 0.5, color="white", linewidth=4)
    ax.set(title="wrong elements in red, four blocks of 64 threads", xlabel="element of y")
    figure_save(path, figure)


os.makedirs(folder, exist_ok=True)
draw(os.path.join(folder, "02_a_race_in_a_kernel.png"))
print(f"figure: {os.path.join(folder, '02_a_race_in_a_kernel.png')}")
