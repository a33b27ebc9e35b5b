"""The transformer is an RNN, and its gradient is derived by hand: eight lines that check both. Then a figure, one number at a time.

Values that are unit vectors come out as the weights themselves, so both forms can show whom each position reads, and how far they are apart. Each
gradient element is held against a central difference of its own.
"""
import argparse
import os

import numpy as np

import refattn
from refattn.experiment import figure_save, require_extras

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default=os.path.join("out", "examples"), metavar="FOLDER", help="where the figure goes (default: %(default)s)")
folder = parser.parse_args().out
require_extras("matplotlib")

q, k, v, dout, along = np.random.default_rng(0).standard_normal((5, 2, 4, 100, 16))        # five times (B, H, N, D)
(out, _), pullback = refattn.vjp(refattn.causal_linear_attention, q, k, v)                 # a chunk of positions at a time
state, steps = None, np.empty_like(out)
for t in range(100):                                                                       # one position at a time
    steps[..., t, :], state = refattn.causal_linear_attention_step(q[..., t, :], k[..., t, :], v[..., t, :], state)
change = sum(side * refattn.causal_linear_attention(q, k + side * 1e-5 * along, v)[0] for side in (1, -1)) / 2e-5
print(f"chunked and recurrent differ by at most {abs(out - steps).max():.1e}")
print(f"along one direction: gradient {(pullback(dout)[1] * along).sum():.9f}, central difference {(dout * change).sum():.9f}")


def weights() -> tuple[np.ndarray, np.ndarray]:
    """Of the first head, by both forms: row i says how much of each position's value reaches output i."""
    q1, k1, unit, state = q[0, 0], k[0, 0], np.eye(100), None
    chunked, recurrent = refattn.causal_linear_attention(q1, k1, unit)[0], np.empty((100, 100))
    for t in range(100):
        recurrent[t], state = refattn.causal_linear_attention_step(q1[t], k1[t], unit[t], state)
    return chunked, recurrent


def slopes(count: int = 50, h: float = 1e-5) -> dict[str, tuple[np.ndarray, np.ndarray, list]]:
    """For `count` elements of each gradient: by the backward, by a central difference of that one element, and which elements they are."""
    rng, arrays, found = np.random.default_rng(1), {"dq": q[0, 0], "dk": k[0, 0], "dv": v[0, 0]}, {}
    gradients = dict(zip(arrays, pullback(dout), strict=True))
    for name, x in arrays.items():
        at = [tuple(index) for index in rng.integers(0, x.shape, (count, 2)).tolist()]
        differences = []
        for index in at:
            ends = []
            for side in (h, -h):
                moved = x.copy()
                moved[index] += side
                ends.append(refattn.causal_linear_attention(*(moved if x is y else y for y in arrays.values()))[0])
            differences.append((dout[0, 0] * (ends[0] - ends[1])).sum() / (2 * h))
        gradient = gradients[name][0, 0]
        found[name] = np.array([gradient[index] for index in at]), np.array(differences), at
    return found


def draw(path: str) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.6), layout="constrained")
    (chunked_axes, recurrent_axes), (apart_axes, slope_axes) = figure.subplots(2, 2)
    for ax, form, title in ((chunked_axes, chunked, "weights, 32 positions at a time"), (recurrent_axes, recurrent, "weights, one at a time")):
        image = ax.imshow(np.where(form > 0, form, np.nan), norm=LogNorm(3e-3, 1), cmap="viridis")
        ax.set(title=title, xlabel="position that is read", ylabel="position that reads")
        for border in (32, 64, 96) if form is chunked else ():
            ax.plot((-0.5, border - 0.5), (border - 0.5,) * 2, "w:", (border - 0.5,) * 2, (border - 0.5, 99.5), "w:", linewidth=1)
        figure.colorbar(image, ax=ax)
    past = np.tri(100) == 1
    apart = np.divide(chunked - recurrent, recurrent, where=past, out=np.full((100, 100), np.nan))
    image = apart_axes.imshow(apart * 2**53, vmin=-8, vmax=8, cmap="RdBu")
    apart_axes.set(title="relative difference, in units of one rounding, 2⁻⁵³", xlabel="position that is read", ylabel="position that reads")
    figure.colorbar(image, ax=apart_axes)
    slope_axes.plot((-1, 1), (-1, 1), color="0.7", linewidth=1)
    for (name, (gradient, difference, _)), mark in zip(elements.items(), "osD", strict=True):
        largest = abs(gradient).max()
        slope_axes.plot(gradient / largest, difference / largest, mark, markersize=5, fillstyle="none",
                        label=f"{name}: at most {abs(gradient - difference).max() / largest:.0e} apart")
    slope_axes.set(title="50 elements of each gradient, the largest as 1", xlabel="by hand: the backward", ylabel="central difference")
    slope_axes.grid(alpha=0.3)
    slope_axes.legend()
    figure_save(path, figure)


chunked, recurrent = weights()
elements = slopes()
os.makedirs(folder, exist_ok=True)
draw(os.path.join(folder, "01_chunked_equals_recurrent.png"))
print(f"weights of one head: rows sum to 1 within {abs(chunked.sum(1) - 1).max():.1e}, nothing from the future: {(np.triu(chunked, 1) == 0).all()}")
print(f"figure: {os.path.join(folder, '01_chunked_equals_recurrent.png')}")
