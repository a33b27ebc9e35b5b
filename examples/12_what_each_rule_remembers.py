"""One recurrence, four rules: after a text of m pairs a table of n, each entry written twice. What is still there, and what should not be?

The state is a memory of D × M numbers. A sum (rule `linear`) mixes the new value under a key with the old one, with those of other keys and with the
text before. A gate that closes once, where the text ends, forgets the text and nothing else. The delta rule replaces the old value, but what it reads
under the text's keys is still the text, as far as the table has not overwritten it. `gated_delta` does both. Of unit keys by chance, k_i·k_j has a
mean square of 1/D, so that for the first two the mean square of the errors is a formula, in units of a value:

                     the n keys, beside their new values     the m keys of the text, beside nothing
    linear           1 + (2 (n - 1) + m) / D                 1 + (2 n + m - 1) / D
    gated            1 + 2 (n - 1) / D                       2 n / D

The figure has the measured errors against n, with these as lines. No rule has more room than D keys.
"""
import argparse
import os

import numpy as np

import refattn
from refattn.experiment import figure_save, require_extras

D, M, TEXT, TRIES = 32, 16, 64, 64                                # key and value features, pairs in the text, tables to average over
COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
RULES = ("linear", "gated", "delta", "gated_delta")
SIDES = ("the table's keys: off the new value by", "the text's keys: off nothing by")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pairs(n: int) -> tuple[np.ndarray, ...]:
    """The text, the table, the table again with new values, then a reading of all keys: q, k, v, g and beta; and what should be read. A reading
    is a position that writes nothing, since its value is 0 and its beta too."""
    rng = np.random.default_rng(n)
    text, table = unit(rng.standard_normal((TRIES, TEXT, D))), unit(rng.standard_normal((TRIES, n, D)))
    values, written = unit(rng.standard_normal((TRIES, TEXT + 2 * n, M))), np.arange(2 * TEXT + 3 * n) < TEXT + 2 * n
    k = np.concatenate([text, table, table, table, text], axis=1)
    v = np.concatenate([values, np.zeros((TRIES, n + TEXT, M))], axis=1)
    g = np.where(np.arange(len(written)) == TEXT, -np.inf, np.zeros((TRIES, 1)))           # forgets all that was before the table
    return k, k, v, g, np.where(written, 1.0, np.zeros((TRIES, 1))), np.concatenate([values[:, -n:], np.zeros((TRIES, TEXT, M))], axis=1)


def errors(rule: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the readings: of the table (tries, n) and of the text (tries, m), each as a length."""
    q, k, v, g, beta, right = pairs(n)
    out, _ = refattn.recurrence(q, k, v, g if "gated" in rule else None, beta if "delta" in rule else None, rule=rule)
    wrong = np.linalg.norm(out[:, -len(right[0]):] - right, axis=-1)
    return wrong[:, :n], wrong[:, n:]


def formulas(rule: str, n: int) -> tuple[float, float]:
    """The root of the mean square of each, for rules `linear` and `gated`."""
    text = (TEXT, TEXT - 1 + D) if rule == "linear" else (0, 0)
    return float(np.sqrt(1 + (2 * (n - 1) + text[0]) / D)), float(np.sqrt((2 * n + text[1]) / D))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default=os.path.join("out", "examples"), metavar="FOLDER", help="where the figure goes (default: %(default)s)")
folder = parser.parse_args().out
require_extras("matplotlib")

measured = {(rule, n): [float(np.sqrt((x ** 2).mean())) for x in errors(rule, n)] for rule in RULES for n in COUNTS}
print(f"D = {D}, {TEXT} pairs of text, then a table of n written twice; root of the mean square, a value is 1; in brackets the formula")
for side, title in enumerate(SIDES):
    print(f"\n{title}\n{'n':>4}" + "".join(f"{rule:>17}" for rule in RULES))
    for n in COUNTS:
        cells = (f"{measured[rule, n][side]:.3f}" + (f" ({formulas(rule, n)[side]:.3f})" if "delta" not in rule else "") for rule in RULES)
        print(f"{n:>4}" + "".join(f"{cell:>17}" for cell in cells))


def draw(path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for side, (ax, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True)):
        for i, (rule, mark) in enumerate(zip(RULES, "osD^", strict=True)):
            if "delta" not in rule:
                ax.plot(COUNTS, [formulas(rule, n)[side] for n in COUNTS], color=f"C{i}", linewidth=1)
            ax.plot(COUNTS, [measured[rule, n][side] for n in COUNTS], mark if "delta" not in rule else mark + ":", color=f"C{i}", label=rule)
        ax.axvline(D, color="0.6", linewidth=1, linestyle="--")
        ax.set(title=title, xlabel=f"n, keys in the table; D = {D} is dashed", ylim=(-0.05, 2.9))
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("error, a value is 1")
    figure.axes[1].legend()
    figure_save(path, figure)


os.makedirs(folder, exist_ok=True)
draw(os.path.join(folder, "12_what_each_rule_remembers.png"))
print(f"\nfigure: {os.path.join(folder, '12_what_each_rule_remembers.png')}")
