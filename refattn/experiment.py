"""What experiments share: a training that may be killed at any moment, its progress bar, and the files that it leaves.

    batch = task.batch(i)        loss, grads = task.loss_and_grads(params, batch)        params, slots = task.optimize(params, grads, slots, i)

An update is a function of parameters, slots and its number i. Whatever is random in it comes from a generator that is made for it,
`numpy.random.default_rng([seed, i])`, and not from one that runs along: so a checkpoint needs no generator, and a training that was killed
and goes on from its checkpoint ends with the very bits of one that was not. What it costs in time does not enter the weights either, except
through a budget of seconds, which says where to stop.
"""
from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._array import missing_extra, namespace, on_host
from .checkpoint import checkpoint_load, checkpoint_save, replace_file
from .optim import AdamSlots, adam_init

Params = dict[str, np.ndarray]
Row = dict[str, float]

CHECKPOINT_SECONDS = 60.0
BUDGET = "training budget in minutes of processor time, of which two busy cores use up two a minute"
CUPY = "train with CuPy arrays, on a GPU; the budget then counts the processor's waiting for it"
COMPILED = "linear attention by loops that Numba compiles, not with --cupy"
LOSS_MEMORY = 0.95                # the loss that is shown is a running mean of about the last 20


class Task(NamedTuple):
    """All that decides the trained weights, beside those at the start and the machine's arithmetic."""

    plan: Mapping[str, Any]                                                     # what JSON can hold; only the same plan resumes a checkpoint
    batch: Callable[[int], Any]                                                 # of update i; a function of i alone
    loss_and_grads: Callable[[Params, Any], tuple[Any, Params]]                 # of params and a batch
    optimize: Callable[[Params, Params, AdamSlots, int], tuple[Params, AdamSlots]]      # of params, grads, slots and i


class Training(NamedTuple):
    """All that the next update depends on, and what is worth telling. A value: `train_step` returns the next one."""

    params: Params
    slots: AdamSlots
    update: int = 0
    loss: float | None = None         # a running mean
    seconds: float = 0.0              # of processor time spent on updates so far, over all runs
    history: tuple[Row, ...] = ()


def training_init(params: Params) -> Training:
    """The state before the first update, for `adam_step` and `radam_step`."""
    return Training(params, adam_init(params))


def train_step(state: Training, task: Task) -> Training:
    """One update.

    >>> batch, loss_and_grads = lambda i: 1.0, lambda params, b: (params["w"].sum() * b, {"w": np.full(2, b)})
    >>> task = Task({}, batch, loss_and_grads, lambda params, grads, slots, i: ({"w": params["w"] - grads["w"]}, slots))
    >>> state = train_step(training_init({"w": np.array([3.0, 4.0])}), task)
    >>> state.update, state.loss, state.params["w"].tolist()
    (1, 7.0, [2.0, 3.0])
    """
    loss, grads = task.loss_and_grads(state.params, task.batch(state.update))
    params, slots = task.optimize(state.params, grads, state.slots, state.update)
    mean = float(loss) if state.loss is None else LOSS_MEMORY * state.loss + (1 - LOSS_MEMORY) * float(loss)
    return state._replace(params=params, slots=slots, update=state.update + 1, loss=mean)


def moved(xp: Any, x: Any) -> Any:
    """x with the arrays of xp, NumPy or CuPy, in place of all NumPy and CuPy arrays in it, in tuples and dicts too; the rest as it is.

    >>> moved(np, {"a": (np.ones(1), 2.0)})
    {'a': (array([1.]), 2.0)}
    """
    if isinstance(x, dict):
        return {name: moved(xp, part) for name, part in x.items()}
    if isinstance(x, tuple):
        parts = [moved(xp, part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not hasattr(x, "shape") or isinstance(x, np.generic):
        return x
    return on_host(x) if xp is np else xp.asarray(x)


def like(params: Params, x: Any) -> Any:
    """x moved to where the parameters are."""
    return moved(namespace(params=next(iter(params.values()))), x)


def epoch_part(update: int, size: int, count: int, seed: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """Which `size` of `count` examples update i takes: each has its turn once an epoch, in an order of the epoch's own; the few that are left
    over have theirs in another. With `lengths` (count,), the examples of an update are about equally long, and so need little padding: they
    are neighbours in the order of length, each length taken up to a tenth too long, so that every epoch has other neighbours.

    >>> sorted(int(x) for i in (4, 5) for x in epoch_part(i, 2, 4, seed=0))
    [0, 1, 2, 3]
    >>> sorted(sorted(epoch_part(i, 2, 4, 0, np.array([9, 70, 10, 60])).tolist()) for i in (4, 5))
    [[0, 2], [1, 3]]
    """
    if not 0 < size <= count:
        raise ValueError(f"size: expected 1 to count = {count} examples for an update, got {size}")
    epoch, part = divmod(update, count // size)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(count)
    if lengths is not None:
        order = order[: count // size * size]
        order = order[np.argsort(lengths[order] * rng.uniform(1.0, 1.1, order.size))]
        part = rng.permutation(count // size)[part]
    return order[part * size: (part + 1) * size]


# --- the file that it goes on from -------------------------------------------------------------------------------------------------------

def training_save(path: str | os.PathLike[str], state: Training, task: Task) -> None:
    """One file, replaced whole: every array by name, the rest as its record."""
    parts = {"params": state.params, "mean": state.slots.mean, "square": state.slots.square}
    arrays = {f"{part}/{name}": on_host(x) for part, named in parts.items() for name, x in named.items()}
    record = {"plan": task.plan, "steps": state.slots.steps, "update": state.update, "loss": state.loss, "seconds": state.seconds,
              "history": state.history}
    checkpoint_save(path, arrays, record)


def training_load(path: str | os.PathLike[str], task: Task) -> Training:
    """What `training_save` wrote; ValueError if it was written under another plan."""
    arrays, record = checkpoint_load(path)
    check_plan(path, record.get("plan", {}), task.plan, what="a training")

    def named(part: str) -> Params:
        return {name.removeprefix(part): x for name, x in arrays.items() if name.startswith(part)}

    return Training(named("params/"), AdamSlots(record["steps"], named("mean/"), named("square/")), record["update"], record["loss"],
                    record["seconds"], tuple(record["history"]))


def training_open(path: str | os.PathLike[str], task: Task, init: Callable[[], Params], xp: Any = np) -> Training:
    """The training in `path` if there is one, else a new one from `init()`, with arrays of xp; makes the folder."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    return moved(xp, training_load(path, task) if os.path.exists(path) else training_init(init()))       # type: ignore[no-any-return]


def check_plan(path: str | os.PathLike[str], theirs: Mapping[str, Any], ours: Mapping[str, Any], *, what: str) -> None:
    """ValueError unless `what` is in the file, made under `theirs`, is what is asked for now."""
    ours = json.loads(json.dumps(ours))
    other = [f"{name} = {theirs.get(name)} (now {ours.get(name)})" for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if other:
        raise ValueError(f"{os.fspath(path)}: {what} with {', '.join(other)}; ask for the same, name another folder by --out, or delete it")


# --- the loop ----------------------------------------------------------------------------------------------------------------------------

def train(path: str | os.PathLike[str], task: Task, state: Training, *, updates: float = math.inf, seconds: float = math.inf,
          measure: Callable[[Params], Row] = lambda params: {}, measured: Callable[[int], bool] = lambda update: False,
          show: Callable[[Row], None] = lambda row: None, loss: Callable[[float], str] = "loss {:.4f}".format) -> Training:
    """From `state` on until there were so many updates, or so many seconds were spent on them; a progress bar shows loss and remaining time.

    Parameters
    ----------
    path
        Where `training_save` writes to: every minute, at the end, and when interrupted.
    task : Task
    state : Training
        From `training_open`.
    updates, seconds
        At least one of them; they count what earlier runs did. Seconds are processor time, of all threads together: so much work, whatever
        else the machine has to do; two busy cores use up two a second. The last update may go over the time.
    measure
        A function of the parameters: numbers for the row of an update for which `measured` is true. Rows have "update", "seconds" and "loss"
        too, and stay in `history`. Its time is not counted.
    show
        What to do with a new row; may print.
    loss
        The words for a loss in the progress bar.

    Returns
    -------
    state : Training

    Raises
    ------
    ValueError
        "updates: expected a positive number of updates or of seconds, got updates = inf and seconds = inf".
    ImportError
        If tqdm or safetensors is not installed, with the command that installs it.
    """
    if not 0 < min(updates, seconds) < math.inf:
        raise ValueError(f"updates: expected a positive number of updates or of seconds, got updates = {updates} and seconds = {seconds}")
    require_extras("tqdm", "safetensors")
    from tqdm import tqdm

    kept, saved = state, time.perf_counter()

    def done(state: Training) -> float:
        return min(max(state.update / updates, state.seconds / seconds), 1.0)

    with tqdm(total=1.0, initial=done(state), desc="   training", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", disable=None,
              leave=False) as bar:
        try:
            while state.update < updates and state.seconds < seconds:
                start = time.process_time()
                new = train_step(state, task)
                new = new._replace(seconds=new.seconds + time.process_time() - start)
                assert new.loss is not None
                words = f"update {new.update}, {loss(new.loss)}"
                if measured(new.update):
                    row = {"update": new.update, "seconds": new.seconds, "loss": new.loss, **measure(new.params)}
                    new = new._replace(history=(*new.history, row))
                    with tqdm.external_write_mode():
                        show(row)
                state = new
                bar.set_postfix_str(words, refresh=False)
                bar.update(done(state) - bar.n)
                if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                    training_save(path, state, task)
                    kept, saved = state, time.perf_counter()
        finally:                    # `state` is whole at any moment: an update that was cut short is not in it
            if state is not kept:
                training_save(path, state, task)
    return state


# --- a budget of time for a schedule that must know its end ------------------------------------------------------------------------------

def update_seconds(state: Training, task: Task, updates: Sequence[int]) -> tuple[float, float]:
    """Seconds by the wall clock, and of processor time, that an update takes: the mean over those numbered `updates`. Nothing is learnt."""
    train_step(state._replace(update=updates[0]), task)                          # whatever is done but once in a process
    wall, processor = time.perf_counter(), time.process_time()
    for update in updates:
        train_step(state._replace(update=update), task)
    return (time.perf_counter() - wall) / len(updates), (time.process_time() - processor) / len(updates)


def task_for_budget(path: str | os.PathLike[str], task: Callable[[int], Task], init: Callable[[], Params], seconds: float,
                    updates: Sequence[int], xp: Any = np) -> Task:
    """`task(n)` with as many updates n as so many seconds of processor time are worth, by the mean cost of those numbered `updates`.

    n has to stand in the plan, under "updates". It is measured once: a training in `path` has its own already, and a new one is saved there
    at once, so that after an interruption, whatever the moment, the rate decays as it would have.
    """
    if os.path.exists(path):
        return task(checkpoint_load(path)[1].get("plan", {}).get("updates", 1))
    state = moved(xp, training_init(init()))
    planned = task(max(round(seconds / update_seconds(state, task(max(updates) + 1), updates)[1]), 1))
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    training_save(path, state, planned)
    return planned


# --- measuring ---------------------------------------------------------------------------------------------------------------------------

def peak_bytes() -> int:
    """The most memory that this process has had resident so far, in bytes, to some dozens of pages. Not on Windows.

    Linux keeps two such numbers. That of getrusage lives through exec, and so begins with the peak of the process that started this one; that of
    /proc does not.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_apart(script: str | os.PathLike[str], *arguments: str) -> Any:
    """What the script prints, JSON, in a process of its own: its memory and its threads are those of nothing else.

    subprocess.CalledProcessError where it fails; its own words are on stderr by then.
    """
    done = subprocess.run([sys.executable, os.fspath(script), *arguments], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


# --- the command and its files -----------------------------------------------------------------------------------------------------------

EXTRAS = {"sklearn": "scikit-learn", "safetensors": "safetensors", "tqdm": "tqdm", "matplotlib": "matplotlib"}


def require_extras(*modules: str) -> None:
    """ImportError that says what to install, now and not after an hour of training."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing_extra(EXTRAS[module], "demo")


def arguments(doc: str | None, *, out: str, minutes: float, prog: str | None = None,
              budget: str = BUDGET) -> argparse.ArgumentParser:
    """The options that all experiments have: --out, --minutes, --seed, --smoke."""
    parser = argparse.ArgumentParser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=out, metavar="FOLDER", help="where checkpoints, results and figures go (default: %(default)s)")
    parser.add_argument("--minutes", type=_minutes, default=minutes, metavar="M", help=f"{budget} (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="S", help="of all that is drawn at random (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a few updates, to see that everything runs: takes seconds")
    return parser


def run(main: Callable[[], None]) -> None:
    """`main()`; an interrupt ends it with words, not with a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from there")


def library(cupy: bool) -> Any:
    """The arrays to train with: NumPy's, or CuPy's. ImportError that says what to install."""
    if not cupy:
        return np
    if importlib.util.find_spec("cupy") is None:
        raise missing_extra("CuPy", "cuda13x")
    import cupy as cp
    return cp


def results_save(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """A JSON file, replaced whole; NaN is refused."""
    replace_file(path, json.dumps(record, indent=1, allow_nan=False).encode())


def results_load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `results_save` wrote; nothing, {}, if there is no such file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(json.load(file))


def curves_draw(axes: Sequence[Any], results: Mapping[str, Any], order: Sequence[str], across: Mapping[str, Callable[[Row], float]],
                up: tuple[str, Callable[[Row], float]]) -> None:
    """Each history of `results` on each of matplotlib's `axes`, one for each label in `across`; a name has its colour by its place in `order`."""
    for ax, (label, x) in zip(axes, across.items(), strict=True):
        for name, record in results.items():
            ax.plot([x(row) for row in record["history"]], [up[1](row) for row in record["history"]], label=name, color=f"C{order.index(name)}")
        ax.set(xlabel=label, ylabel=up[0])
        ax.label_outer()
        ax.grid(alpha=0.3)
    axes[-1].legend()


def figure_save(path: str | os.PathLike[str], figure: Any) -> None:
    """A figure of matplotlib as .png, .svg or .pdf, replaced whole."""
    data = io.BytesIO()
    figure.savefig(data, format=os.path.splitext(path)[1].removeprefix("."))
    replace_file(path, data.getvalue())


def mosaic(rows: np.ndarray) -> np.ndarray:
    """Rows of pictures (R, C, height, width) of brightness 0 … 1, or (R, C, height, width, 3) in colours, as one picture of colours: a gap
    between pictures is blue, a NaN sand.

    >>> mosaic(np.zeros((2, 3, 8, 8))).shape
    (17, 26, 3)
    """
    colours = rows if rows.ndim == 5 else np.repeat(rows[..., None], 3, axis=-1)
    R, C, height, width, _ = colours.shape
    whole = np.full((R, height + 1, C, width + 1, 3), (0.80, 0.86, 0.93))
    whole[:, :height, :, :width] = np.where(np.isnan(colours), (0.93, 0.89, 0.80), colours).swapaxes(1, 2)
    return whole.reshape(R * (height + 1), C * (width + 1), 3)[:-1, :-1]


def mosaics_save(path: str | os.PathLike[str], blocks: Sequence[tuple[str, Sequence[str], np.ndarray]], columns: Sequence[str]) -> None:
    """A figure of mosaics, one below the other: a title, the words beside each row, and the rows of pictures, of each."""
    from matplotlib.figure import Figure

    def middle(count: int, extent: int) -> list[float]:
        return [i * (extent + 1) + (extent - 1) / 2 for i in range(count)]

    count = [len(rows) for _, _, rows in blocks]
    figure = Figure(figsize=(0.82 * len(columns) + 0.8, 0.82 * sum(count) + 0.6 * len(blocks)), dpi=110, layout="constrained")
    for ax, (title, names, rows) in zip(figure.subplots(len(blocks), 1, squeeze=False, height_ratios=count)[:, 0], blocks, strict=True):
        ax.imshow(mosaic(rows), interpolation="nearest")
        ax.set_xticks(middle(len(columns), rows.shape[3]), columns)
        ax.set_yticks(middle(len(names), rows.shape[2]), names)
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
        ax.set_title(title, fontsize=11)
    figure_save(path, figure)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text}")
    return minutes


def _seed(text: str) -> int:
    seed = int(text)
    if seed < 0:
        raise argparse.ArgumentTypeError(f"expected an integer ≥ 0, got {text}")
    return seed
