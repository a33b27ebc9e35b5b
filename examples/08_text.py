"""A character model of a text: bits per character with linear and with softmax attention, then 100,000 characters from the linear model.

--data names a text, tiny Shakespeare for example, as it is or compressed (.gz); without it the script makes up sentences of a tiny grammar.
The last tenth is held out. Both systems read the same windows of 256 characters and have the same time. Adam; the rate rises for 50 updates,
then falls along half a cosine to a tenth, and stays there.

Then characters are drawn at temperature 0.8, each system in a process of its own, and time for a character and memory are measured as the text
grows: with one state from the first character to the last, for softmax (whose state is all the past) a fifth as far; and from the linear model
once more with a state that is made anew from the last 128 characters after each 128. Positions are sinusoidal, so that they never end; but no
training saw what the sums of linear attention are like behind more than 256 characters. How well one state predicts there is measured on the held-out
text, read as one sequence. The same command goes on where it was stopped. In the folder: checkpoints, results (JSON), texts and two figures.
"""
from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from refattn.experiment import (
    COMPILED,
    CUPY,
    Params,
    Row,
    Task,
    arguments,
    curves_draw,
    figure_save,
    library,
    like,
    moved,
    peak_bytes,
    require_extras,
    run,
    results_load,
    results_save,
    run_apart,
    train,
    training_open,
)
from refattn.generate import generate, generate_stream
from refattn.losses import bits, cross_entropy_backward, cross_entropy_forward
from refattn.optim import AdamSlots, adam_step, clip_by_global_norm, cosine_rate, warm_up
from refattn.transformer import Config, transformer_backward, transformer_forward, transformer_init, transformer_prefill

SYSTEMS, EVERY, TEMPERATURE = ("linear", "softmax"), 25, 0.8
DRAWN = {"linear": "linear, one state", "restarted": "linear, restarted", "softmax": "softmax, one state"}
# width, heads, layers, length, batch, rate, updates until it is lowest
SCALES = {"small": (128, 4, 4, 256, 8, 2e-3, 6000), "large": (384, 6, 6, 256, 64, 1e-3, 5000), "smoke": (16, 2, 1, 16, 4, 1e-2, 50)}
GRAMMAR = {
    "TEXT": ("ONE SEES THING.", "MANY SEE THING.", "WHEN ONE SEES THING, MANY SEE THING.", "WHEN MANY SEE THING, ONE SEES THING."),
    "ONE": ("the NOUN", "the KIND NOUN", "the NOUN that SEES THING"), "MANY": ("the NOUNs", "the KIND NOUNs", "the NOUNs that SEE THING"),
    "THING": ("ONE", "MANY"), "NOUN": ("king", "ship", "garden", "stone", "river", "baker"), "KIND": ("old", "small", "silent", "distant"),
    "SEES": ("sees", "builds", "forgets", "follows"), "SEE": ("see", "build", "forget", "follow"), "WHEN": ("when", "because", "until"),
}


# --- the text ----------------------------------------------------------------------------------------------------------------------------

def invented(rng: np.random.Generator, count: int) -> str:
    """Sentences whose verbs agree with their nouns, `count` characters at least."""
    def expanded(words: str) -> str:
        return re.sub("[A-Z]+", lambda name: expanded(GRAMMAR[name[0]][rng.integers(len(GRAMMAR[name[0]]))]), words)

    lines: list[str] = []
    while sum(map(len, lines)) + len(lines) < count:
        lines.extend(expanded("TEXT") for _ in range(100))
    return "\n".join(lines) + "\n"


def text_read(path: str | None, seed: int, scale: str) -> str:
    if path is None:
        return invented(np.random.default_rng(seed), 4000 if scale == "smoke" else 400_000)
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def text_task(system: str, scale: str, seed: int, text: str, compiled: bool = False) -> tuple[Task, Config, np.ndarray]:
    """What to learn, by which model, and the held-out tokens."""
    width, heads, layers, length, batch_size, rate, lowest = SCALES[scale]
    characters = "".join(sorted(set(text)))
    config = Config(len(characters), length, width, heads, layers, 4 * width, attention=system, positions="sinusoidal",
                    compiled=compiled and system == "linear")
    index = {character: i for i, character in enumerate(characters)}
    tokens = np.array([index[character] for character in text])
    learnt, held_out = np.split(tokens, [len(tokens) - len(tokens) // 10])
    if len(held_out) <= 2 * length:
        raise SystemExit(f"the text has {len(text):,} characters; expected more than {20 * length:,}, so that a tenth has two windows of {length}")

    def batch(update: int) -> np.ndarray:
        start = np.random.default_rng([seed, 1, update]).integers(0, len(learnt) - length, batch_size)
        return learnt[start[:, None] + np.arange(length + 1)]

    def loss_and_grads(params: Params, batch: np.ndarray) -> tuple[float, Params]:
        read, told = like(params, (batch[:, :-1], batch[:, 1:]))
        logits, residuals = transformer_forward(params, read, config)
        loss, r_loss = cross_entropy_forward(logits, told)
        return float(loss), transformer_backward(cross_entropy_backward(1.0, r_loss), residuals)

    def optimize(params: Params, grads: Params, slots: AdamSlots, update: int) -> tuple[Params, AdamSlots]:
        learning_rate = warm_up(update, 50) * cosine_rate(update, rate, lowest, rate / 10)
        return adam_step(params, clip_by_global_norm(grads, 1.0)[0], slots, learning_rate=learning_rate)

    plan = {"system": system, "scale": scale, "seed": seed, "text": hashlib.sha256(text.encode()).hexdigest()[:16], "characters": characters,
            "batch": batch_size, "rate": rate, "lowest at": lowest, **config._asdict()}
    return Task(plan, batch, loss_and_grads, optimize), config, held_out


# --- bits per character ------------------------------------------------------------------------------------------------------------------

def held_out_bits(params: Params, config: Config, tokens: np.ndarray, *, behind: int = 1, most: int | None = None) -> float:
    """Bits per character in windows of config.length and one more, each read by itself; those behind at least `behind` others of their window
    count, and windows overlap so that each does once. `most`: so many windows, evenly spread, are enough."""
    starts = np.arange(0, len(tokens) - config.length, config.length + 1 - behind)
    starts = starts[::-(-len(starts) // (most or len(starts)))]
    nats = 0.0
    for part in np.array_split(starts, -(-len(starts) // 32)):
        window = like(params, tokens[part[:, None] + np.arange(config.length + 1)])
        logits, _ = transformer_prefill(params, window[:, :-1], config)
        nats += float(cross_entropy_forward(logits[:, behind - 1:], window[:, behind:])[0]) * len(part)
    return float(bits(nats / len(starts)))


def bits_along(params: Params, config: Config, tokens: np.ndarray, length: int) -> list[tuple[int, float]]:
    """(end, bits per character before it) for config.length, and for each doubling of it the characters new in it: sequences of `length`
    are each read with one state from their beginning, as many as there are."""
    ends = [config.length]
    while ends[-1] < length:
        ends.append(min(2 * ends[-1], length))
    starts = range(0, len(tokens) - length, length)
    nats = np.zeros(len(ends))
    for start in starts:
        logits, _ = transformer_prefill(params, tokens[None, start: start + length], config)
        for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False)):
            nats[i] += float(cross_entropy_forward(logits[:, a:b], tokens[None, start + a + 1: start + b + 1])[0])
    return [(end, float(bits(x))) for end, x in zip(ends, nats / len(starts), strict=True)]


def judged(params: Params, config: Config, held_out: np.ndarray) -> dict[str, Any]:
    """Bits of the held-out text: in windows as they were learnt, as `restarted` reads it, and along longer sequences. For the linear model the
    last of these is all of it; for softmax attention that would be N² too much."""
    lengths = [16 * config.length] if len(held_out) > 16 * config.length else []
    lengths += [len(held_out) - 1] if config.attention == "linear" else []
    return {"bits": held_out_bits(params, config, held_out), "restarted": held_out_bits(params, config, held_out, behind=config.length // 2),
            "along": [bits_along(params, config, held_out, length) for length in lengths]}


# --- drawing -----------------------------------------------------------------------------------------------------------------------------

def restarted(params: Params, config: Config, prompt: np.ndarray, rng: np.random.Generator, *, temperature: float) -> Iterator[np.ndarray]:
    """As `generate_stream`, but the state has never read more than twice the prompt's length: then the last so many tokens are the prompt of
    a new one. Which is no dearer: a prompt is read at once."""
    while True:
        prompt = generate(params, config, prompt, prompt.shape[1], rng, temperature=temperature)[:, prompt.shape[1]:]
        yield from prompt.T


def draw_text(path: str, how: str, params: Params, config: Config, prompt: np.ndarray, characters: str, count: int, seed: int) -> list[Row]:
    """`count` characters to a file, rounded down to twice config.length, and what each so many of them took: seconds for a character, and by
    how much the peak of memory has grown since the first character."""
    from tqdm import tqdm

    rows, some = [], 2 * config.length
    stream = (restarted if how == "restarted" else generate_stream)(params, config, prompt, np.random.default_rng(seed), temperature=TEMPERATURE)
    next(stream)
    before = peak_bytes()
    with open(path, "w", encoding="utf-8") as file:
        for position in tqdm(range(some, count + 1, some), desc=f"drawing, {DRAWN[how]}", disable=None, leave=False):
            start = time.perf_counter()
            tokens = [int(token[0]) for token in islice(stream, some)]
            rows.append({"position": position, "seconds": (time.perf_counter() - start) / some, "bytes": peak_bytes() - before})
            file.write("".join(characters[token] for token in tokens))
    return rows


def known_words(text: str, learnt: str) -> float:
    """The part of the words of a text that are words of the learnt one."""
    words, known = re.findall(r"\w+", text), set(re.findall(r"\w+", learnt))
    return sum(word in known for word in words) / max(len(words), 1)


# --- what is shown -----------------------------------------------------------------------------------------------------------------------

def figure_bits(path: str, results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4), layout="constrained")
    curves_draw(drawn.subplots(1, 2, sharey=True), results, SYSTEMS, {"updates": lambda row: row["update"],
                                                                      "minutes of processor time": lambda row: row["seconds"] / 60},
                ("held-out bits per character", lambda row: row["bits"]))
    figure_save(path, drawn)


def figure_drawing(path: str, results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(14, 4), layout="constrained")
    axes = drawn.subplots(1, 3)
    colours = dict(zip(DRAWN, ("C0", "C2", "C1"), strict=True))
    for system, r in results.items():
        for how, rows in r["drawn"].items():
            for ax, quantity, unit in ((axes[0], "seconds", 1e3), (axes[1], "bytes", 2.0**-20)):
                ax.plot([row["position"] for row in rows], [unit * row[quantity] for row in rows], label=DRAWN[how], color=colours[how])
        for style, marker, along in zip(("-", "--"), "os", r["along"], strict=False):
            axes[2].plot(*zip(*along, strict=True), style + marker, markersize=4, color=colours[system],
                         label=f"{system}, sequences of {along[-1][0]:,}")
        axes[2].axhline(r["restarted"], color=colours["restarted" if system == "linear" else system], linestyle=":", label=f"{system}, restarted")
    axes[0].set(xlabel="characters drawn", ylabel="time for a character, ms", ylim=(0, None))
    axes[1].set(xlabel="characters drawn", ylabel="growth of peak memory, MiB")
    axes[2].set(xlabel="position in the held-out text, up to", ylabel="bits per character", xscale="log")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure_save(path, drawn)


def table(results: dict[str, Any]) -> None:
    print(f"\n{'system':<8} {'updates':>8} {'minutes':>8} {'a second':>9} {'bits learnt':>12} {'held out':>9} {'restarted':>10}")
    for system, r in results.items():
        print(f"{system:<8} {r['updates']:>8,} {r['seconds'] / 60:>8.1f} {r['updates'] / r['seconds']:>9.2f} {bits(r['loss']):>12.4f} "
              f"{r['bits']:>9.4f} {r['restarted']:>10.4f}")
    print(f"\n{'drawn':<20} {'characters':>11} {'ms a character, first tenth':>28} {'last tenth':>11} {'MiB more':>9} {'known words':>12}")
    for r in results.values():
        for how, rows in r["drawn"].items():
            tenth = -(-len(rows) // 10)
            first, last = (1e3 * float(np.mean([row["seconds"] for row in part])) for part in (rows[:tenth], rows[-tenth:]))
            print(f"{DRAWN[how]:<20} {rows[-1]['position']:>11,} {first:>28.3f} {last:>11.3f} {rows[-1]['bytes'] / 2**20:>9.2f} "
                  f"{r['known words'][how]:>12.1%}")


def main() -> None:
    parser = arguments(__doc__, out=os.path.join("out", "text"), minutes=20.0)
    parser.add_argument("--data", metavar="FILE", help="the text, UTF-8, compressed if it ends with .gz (default: invented sentences)")
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="train this one; may be repeated (default: both, one after another)")
    parser.add_argument("--scale", choices=("small", "large"), default="small", help="size of the models (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=100_000, metavar="N", help="how many to draw (default: %(default)s)")
    parser.add_argument("--draw", choices=DRAWN, help="draw from the checkpoint in this very process, and print what it took as JSON")
    parser.add_argument("--cupy", action="store_true", help=CUPY)
    parser.add_argument("--compiled", action="store_true", help=COMPILED)
    chosen = parser.parse_args()
    scale = "smoke" if chosen.smoke else chosen.scale
    length = SCALES[scale][3]
    if chosen.characters < 10 * length:
        parser.error(f"--characters: expected at least {10 * length}, got {chosen.characters}")
    require_extras("safetensors", "tqdm", "matplotlib")
    xp, text = library(chosen.cupy and not chosen.draw), text_read(chosen.data, chosen.seed, scale)      # drawn on the host
    name = lambda system, ending: os.path.join(chosen.out, f"{scale}-{system}{ending}")
    budget: dict[str, float] = {"updates": 2 * EVERY} if chosen.smoke else {"seconds": 60 * chosen.minutes}

    def opened(system: str) -> tuple[Any, ...]:
        task, config, held_out = text_task(system, scale, chosen.seed, text, chosen.compiled)
        return task, config, held_out, training_open(name(system, ".safetensors"), task,
                                                     lambda: transformer_init(np.random.default_rng(chosen.seed), config), xp)

    if chosen.draw:
        task, config, held_out, state = opened("softmax" if chosen.draw == "softmax" else "linear")
        count = chosen.characters // (5 if chosen.draw == "softmax" else 1)
        print(json.dumps(draw_text(name(chosen.draw, ".txt"), chosen.draw, state.params, config, held_out[None, :length // 2],
                                   task.plan["characters"], count, chosen.seed)))
        return
    print(f"{len(text):,} characters of {chosen.data or 'invented sentences; --data names a real text'}, the last tenth held out")
    for system in chosen.system or SYSTEMS:
        task, config, held_out, state = opened(system)
        print(f"{system}: {sum(x.size for x in state.params.values()):,} weights, from update {state.update}", flush=True)
        measure = lambda params, config=config, held_out=held_out: {"bits": held_out_bits(params, config, held_out, most=32)}
        state = train(name(system, ".safetensors"), task, state, measured=lambda update: update % EVERY == 0, measure=measure, **budget)
        done = results_load(name(system, ".json"))
        if (done.get("updates"), done.get("characters")) == (state.update, chosen.characters):
            continue
        drawn, learnt, rest = {}, text[:-len(held_out)], text[-len(held_out):]
        words = {"held out": known_words(rest, learnt)}
        for how in ("linear", "restarted") if system == "linear" else ("softmax",):
            drawn[how] = run_apart(__file__, *sys.argv[1:], "--draw", how)
            with open(name(how, ".txt"), encoding="utf-8") as file:
                words[how] = known_words(file.read(), learnt)
        results_save(name(system, ".json"), {
            "plan": task.plan, "updates": state.update, "seconds": state.seconds, "loss": state.loss, "characters": chosen.characters,
            **judged(moved(np, state.params), config, held_out), "drawn": drawn, "known words": words, "history": state.history})
    results = {system: r for system in SYSTEMS if (r := results_load(name(system, ".json")))}
    figure_bits(os.path.join(chosen.out, f"{scale}-bits.png"), results)
    figure_drawing(os.path.join(chosen.out, f"{scale}-drawing.png"), results)
    table(results)
    print(f"\nfigures: {os.path.join(chosen.out, scale)}-bits.png and -drawing.png; texts beside them")


if __name__ == "__main__":
    run(main)
