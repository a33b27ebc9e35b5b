"""A small model, trained and drawn from in a dozen lines: it learns to add, from a text of sums.

A line of the text is four sums of two digits, ;3+9=12;7+1=08;… The digits before = are by chance, all else follows from them. So it is known how low
the loss can get, ln 100 for each sum, and no model can do better. What is above that is how unlike the text the drawn lines are: if p are the lines
of the text, all equally likely, and q the model, then the excess in nats a line is the mean of -ln(q / p) over the text, and

    q(all four sums are right) = Σ q ≥ exp(-excess)        by Jensen's inequality.

The model is trained in chunks, and draws as an RNN: one character at a time, from a state of constant size. The figure has the loss beside its floor,
and which characters it was lost on.
"""
import argparse
import os

import numpy as np

from refattn.experiment import figure_save, require_extras
from refattn.generate import generate
from refattn.losses import cross_entropy_backward, cross_entropy_forward
from refattn.optim import adam_init, adam_step, clip_by_global_norm, cosine_rate, warm_up
from refattn.transformer import Config, transformer_backward, transformer_forward, transformer_init

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default=os.path.join("out", "examples"), metavar="FOLDER", help="where the figure goes (default: %(default)s)")
folder = parser.parse_args().out
require_extras("matplotlib")

SYMBOLS, SUMS, UPDATES = "0123456789+=;", 4, 600
LENGTH, FLOOR = 7 * SUMS, SUMS * np.log(100)                       # characters in a line; nats in a line


def text(rng: np.random.Generator, count: int) -> np.ndarray:
    """So many lines as numbers of symbols (count, LENGTH)."""
    a, b = rng.integers(0, 10, (2, count, SUMS))
    plus, equals, ends = (np.full_like(a, SYMBOLS.index(symbol)) for symbol in "+=;")
    return np.stack([ends, a, plus, b, equals, (a + b) // 10, (a + b) % 10], axis=-1).reshape(count, LENGTH)


def by_character(params: dict[str, np.ndarray], count: int = 500) -> np.ndarray:
    """Nats for each character but the first, a mean over lines that no training saw."""
    tokens = text(np.random.default_rng(2**32), count)
    logits = transformer_forward(params, tokens[:, :-1], config)[0].astype(float)
    right = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return (np.log(np.exp(logits).sum(-1)) - right).mean(0)


rng = np.random.default_rng(0)
config = Config(vocabulary=len(SYMBOLS), length=LENGTH, width=32, heads=4, layers=1, feed_forward=128)
params = transformer_init(rng, config)
slots, losses, seen = adam_init(params), [], {}
for update in range(UPDATES):
    tokens = text(rng, 64)
    logits, residuals = transformer_forward(params, tokens[:, :-1], config)
    loss, r_loss = cross_entropy_forward(logits, tokens[:, 1:])
    grads = transformer_backward(cross_entropy_backward(1.0, r_loss), residuals)
    rate = warm_up(update, 50) * cosine_rate(update, 1e-2, UPDATES)
    params, slots = adam_step(params, clip_by_global_norm(grads, 1.0)[0], slots, learning_rate=rate)
    losses.append(float(loss) * (LENGTH - 1))
    if update + 1 in (100, 200, UPDATES):
        seen[update + 1] = by_character(params)
        print(f"after {update + 1} updates {seen[update + 1].sum():.3f} nats a line; in the mean no model has fewer than 4 ln 100 = {FLOOR:.3f}")
begin = np.full((2000, 1), SYMBOLS.index(";"))
drawn = ["".join(SYMBOLS[i] for i in line) for line in generate(params, config, begin, LENGTH - 1, np.random.default_rng(1))]


def is_right(line: str) -> bool:
    """Four sums, and each of them true."""
    sums = [f";{a}+{b}={a + b:02}" for a in range(10) for b in range(10)]
    return all(line[i:i + 7] in sums for i in range(0, LENGTH, 7))


right = sum(is_right(line) for line in drawn) / len(drawn)
print("drawn: " + " ".join(drawn[:3]))
print(f"of {len(drawn):,} lines drawn {right:.1%} are right throughout, give or take {np.sqrt(right * (1 - right) / len(drawn)):.1%}; "
      f"exp(-excess) is {np.exp(FLOOR - seen[UPDATES].sum()):.1%}")


def draw(path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curve, characters = figure.subplots(1, 2, width_ratios=(2, 3))
    curve.semilogy(losses, linewidth=1, label="loss of the update")
    curve.axhline(FLOOR, color="black", linestyle="--", linewidth=1, label="the text's own chance, 4 ln 100")
    curve.set(xlabel="updates", ylabel="nats a line", yticks=(20, 30, 40, 50, 60), yticklabels=(20, 30, 40, 50, 60))
    curve.minorticks_off()
    curve.grid(alpha=0.3)
    curve.legend()
    places = np.arange(1, LENGTH)
    for i, (updates, nats) in enumerate(seen.items()):
        characters.bar(places + 0.28 * (i - 1), nats, 0.28, color=f"C{i}", label=f"after {updates} updates")
    chance = [np.log(10) if i % 7 in (1, 3) else 0 for i in range(1, LENGTH)]
    characters.plot(places, chance, "k_", markersize=9, label="the text's own chance")
    characters.set(xlabel="character of the line; t and u are tens and units of a sum", ylabel="nats", ylim=(0, 3.2))
    characters.set_xticks(places, [";a+b=tu"[i % 7] for i in places])
    characters.legend(ncols=2, fontsize=9, loc="upper right")
    figure_save(path, figure)


os.makedirs(folder, exist_ok=True)
draw(os.path.join(folder, "13_a_model_of_your_own.png"))
print(f"figure: {os.path.join(folder, '13_a_model_of_your_own.png')}")
