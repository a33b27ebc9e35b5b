"""The gradient of every rule without the N states that the forward went through: memory beside a backward that keeps them.

What differentiates a program automatically keeps each state S_t, N·D·M numbers, since each was the operand of a product. By hand the states are
made again, by a running sum (rule `linear`), or from some of them that are kept (the others): memory that stays, or that grows with log N. The
figure has it against N, forward and backward, beyond inputs and results: it rises until the buffers, of a fixed size, are full, and then stays. The
gradients themselves are the same.
"""
import argparse
import os
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np

import refattn
from refattn.experiment import figure_save, require_extras

LENGTHS, KEPT, D = tuple(2**i for i in range(8, 17, 2)), 2**12, 32                 # states are kept up to N = 2¹²: beyond, they take GiB
RULES = ("linear", "gated", "delta", "gated_delta")


def inputs(N: int) -> tuple[np.ndarray, ...]:
    """q, unit keys k, v, a decay g and a write strength beta for each position, and dout: one head, float64."""
    rng = np.random.default_rng(N)
    q, k, v, dout = rng.standard_normal((4, N, D))
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), v, -0.1 * rng.random(N), rng.random(N), dout


def gradients(rule: str, q, k, v, g, beta, dout) -> tuple[np.ndarray, ...]:
    """out, dq, dk, dv by this library, and dg and dbeta where the rule has them."""
    arrays = [q, k, v, g if "gated" in rule else None, beta if "delta" in rule else None]
    (out, _), pullback = refattn.vjp(refattn.recurrence, *arrays, rule=rule)
    return out, *(x for x in pullback(dout) if x is not None)


def gradients_of_kept_states(q, k, v, g, beta, dout) -> tuple[np.ndarray, ...]:
    """The same of rule `linear`: S_t = Σ_{s≤t} k_s v_sᵀ and R_t = Σ_{s≥t} q_s do_sᵀ, all of them at once."""
    S = np.cumsum(k[:, :, None] * v[:, None, :], axis=0)
    R = np.cumsum((q[:, :, None] * dout[:, None, :])[::-1], axis=0)[::-1]
    return np.einsum("ndm,nd->nm", S, q), np.einsum("ndm,nm->nd", S, dout), np.einsum("ndm,nm->nd", R, v), np.einsum("ndm,nd->nm", R, k)


def extra_bytes(work: Callable[..., tuple[np.ndarray, ...]], *arrays: np.ndarray) -> int:
    """At the worst moment of forward and backward, beyond inputs and results: as tracemalloc sees it, which NumPy tells of its arrays."""
    work(*arrays)                                                                  # what is made but once in a process
    tracemalloc.start()
    results = work(*arrays)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most - sum(x.nbytes for x in results)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default=os.path.join("out", "examples"), metavar="FOLDER", help="where the figure goes (default: %(default)s)")
folder = parser.parse_args().out
require_extras("matplotlib")

memory = {"all states kept": {N: extra_bytes(gradients_of_kept_states, *inputs(N)) for N in LENGTHS if N <= KEPT}}
memory |= {rule: {N: extra_bytes(partial(gradients, rule), *inputs(N)) for N in LENGTHS} for rule in RULES}
results = gradients("linear", *inputs(KEPT)), gradients_of_kept_states(*inputs(KEPT))
apart = max(abs(x - y).max() / abs(y).max() for x, y in zip(*results, strict=True))
print(f"rule linear, N = {KEPT:,}: out, dq, dk and dv of both backwards differ by at most {apart:.0e} of the largest")
print("MiB beyond inputs and results:\n")
print(f"{'N':>8}" + "".join(f"{name:>17}" for name in memory))
for N in LENGTHS:
    print(f"{N:>8,}" + "".join(f"{sizes[N] / 2**20:>17.2f}" if N in sizes else f"{'–':>17}" for sizes in memory.values()))


def draw(path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.subplots()
    for (name, sizes), style in zip(memory.items(), ("ks-", "o-", "^-", "v-", "D-"), strict=True):
        ax.loglog(list(sizes), [size / 2**20 for size in sizes.values()], style, base=2, markersize=5, label=name)
    states = [memory["all states kept"][KEPT] / KEPT * N / 2**20 for N in LENGTHS if N >= KEPT]
    ax.loglog(LENGTHS[-len(states):], states, "k:", base=2, label="in proportion to N")
    ax.set(title=f"forward and backward, one head, D = M = {D}, float64", xlabel="N, positions", ylabel="MiB beyond inputs and results",
           xticks=LENGTHS, xticklabels=[f"{N:,}" for N in LENGTHS], yticks=[4.0**i for i in range(6)], yticklabels=[4**i for i in range(6)])
    ax.grid(alpha=0.3)
    ax.legend()
    figure_save(path, figure)


os.makedirs(folder, exist_ok=True)
draw(os.path.join(folder, "11_the_gradient_in_constant_memory.png"))
print(f"\nfigure: {os.path.join(folder, '11_the_gradient_in_constant_memory.png')}")
