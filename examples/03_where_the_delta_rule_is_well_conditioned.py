"""The delta rule in float32: right to some roundings up to β|k|² = 2; beyond it state, gradients and errors grow with every write.

The figure shows both against N. The documents have it too: with `--figure docs/derivations/delta_conditioning.svg` it is drawn there.
"""
import argparse
import os

import numpy as np

import refattn
from refattn import oracle
from refattn.experiment import require_extras

LENGTHS, HEADS, D, M = (16, 32, 64, 128, 256, 512, 1024), 4, 16, 8
FACTORS = (0.5, 1.0, 1.9, 2.0, 2.1, 3.0)                                          # β|k|²: random keys of this squared length, β = 1


def inputs(factor: float) -> tuple[np.ndarray, ...]:
    """q, k, v, beta and dout in float32, by chance but for |k|² = factor; the same at each factor."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, HEADS, LENGTHS[-1], D))
    v, dout = rng.standard_normal((2, HEADS, LENGTHS[-1], M))
    k *= np.sqrt(factor) / np.linalg.norm(k, axis=-1, keepdims=True)
    return tuple(x.astype(np.float32) for x in (q, k, v, np.ones((HEADS, LENGTHS[-1])), dout))


def out_and_dk(q: np.ndarray, k: np.ndarray, v: np.ndarray, beta: np.ndarray, dout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    (out, _), pullback = refattn.vjp(refattn.recurrence, q, k, v, None, beta, rule="delta")
    return out, pullback(dout)[1]


def measure(factor: float, N: int) -> tuple[float, float, float, float]:
    """|error| / |truth| where it is largest, of out and of dk, each row by itself; and the largest |out| and |dk|."""
    q, k, v, beta, dout = (x[:, :N] for x in inputs(factor))
    ours = out_and_dk(q, k, v, beta, dout)
    truths = oracle.full_recurrence(q, k, v, None, beta)[0], out_and_dk(*(x.astype(float) for x in (q, k, v, beta, dout)))[1]
    sizes = [np.linalg.norm(x, axis=-1) for x in truths]
    errors = [(np.linalg.norm(x - y, axis=-1) / size).max() for x, y, size in zip(ours, truths, sizes, strict=True)]
    return *errors, *(size.max() for size in sizes)


def draw(path: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "refattn"})       # text stays text; the same file each time
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for ax, title, first in zip(axes, ("error / truth, the worst position", "the largest |out| and |dk|"), (0, 2), strict=True):
        for i, factor in enumerate(FACTORS):
            for of, (name, style) in enumerate((("out", "-"), ("dk", "--"))):
                ax.loglog(LENGTHS, [figures[factor, N][first + of] for N in LENGTHS], style, color=f"C{i}",
                          label=f"β|k|² = {factor:g}" if name == "out" else None)
        ax.set(title=title, xlabel="N", xticks=LENGTHS, xticklabels=LENGTHS)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].legend(title="out solid, dk dashed", fontsize=8, title_fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default=os.path.join("out", "examples"), metavar="FOLDER", help="where the figure goes (default: %(default)s)")
parser.add_argument("--figure", metavar="PATH", help="draw it there instead, as .png, .svg or .pdf")
chosen = parser.parse_args()
require_extras("matplotlib")
path = chosen.figure or os.path.join(chosen.out, "03_where_the_delta_rule_is_well_conditioned.png")

figures = {(factor, N): measure(factor, N) for factor in FACTORS for N in LENGTHS}
print(f"rule delta in float32, D = {D}, M = {M}, random keys: error / truth at the worst position, and the largest |out|\n")
print(f"{'β|k|²':>6} {'N':>6} {'out':>9} {'dk':>9} {'|out|':>9}")
for factor in FACTORS:
    for N in (64, 256, 1024):
        out, dk, largest, _ = figures[factor, N]
        print(f"{factor:>6g} {N:>6} {out:>9.1e} {dk:>9.1e} {largest:>9.1e}")
os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
draw(path)
print(f"figure: {path}")
