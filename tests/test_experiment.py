"""Laws of training: an interruption changes nothing, whatever the moment, and what a run leaves behind is whole."""
from __future__ import annotations

import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refattn import experiment
from refattn.experiment import Task, Training
from refattn.losses import cross_entropy_backward, cross_entropy_forward
from refattn.optim import clip_by_global_norm, radam_step
from refattn.testing.budgets import gamma
from refattn.transformer import Config, transformer_backward, transformer_forward, transformer_init

CONFIG = Config(vocabulary=5, length=6, width=4, heads=2, layers=1, feed_forward=6, attention="lsh-2")


def tiny_task(seed: int = 5) -> Task:
    """A model whose batches and hashes are random."""
    def batch(update: int) -> Any:
        rng = np.random.default_rng([seed, update])
        return rng.integers(0, 5, (3, 7)), rng

    def loss_and_grads(params: Any, batch: Any) -> Any:
        logits, residuals = transformer_forward(params, batch[0][:, :-1], CONFIG, rng=batch[1])
        loss, r_loss = cross_entropy_forward(logits, batch[0][:, 1:])
        return loss, transformer_backward(cross_entropy_backward(1.0, r_loss), residuals)

    def optimize(params: Any, grads: Any, slots: Any, update: int) -> Any:
        return radam_step(params, clip_by_global_norm(grads, 1.0)[0], slots, learning_rate=1e-2 / (update + 1))

    return Task({"seed": seed, "shape": (3, 7)}, batch, loss_and_grads, optimize)


def begin(seed: int = 5) -> Training:
    return experiment.training_init(transformer_init(np.random.default_rng(seed), CONFIG))


def after(state: Training, updates: int) -> Training:
    for _ in range(updates):
        state = experiment.train_step(state, tiny_task())
    return state


def assert_same_training(a: Training, b: Training) -> None:
    """Bit for bit, whatever the next update depends on."""
    for one, other in ((a.params, b.params), (a.slots.mean, b.slots.mean), (a.slots.square, b.slots.square)):
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert one[name].tobytes() == other[name].tobytes(), name
    assert (a.slots.steps, a.update, a.loss) == (b.slots.steps, b.update, b.loss)


# --- an interruption changes nothing -----------------------------------------------------------------------------------------------------

@given(at=st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
def test_an_interruption_changes_nothing(tmp_path: Path, at: int) -> None:
    part = after(begin(), at)._replace(seconds=1.5, history=({"update": 1, "loss": 0.1},))
    experiment.training_save(tmp_path / "x", part, tiny_task())
    loaded = experiment.training_load(tmp_path / "x", tiny_task())
    assert_same_training(loaded, part)
    assert (loaded.seconds, loaded.history) == (part.seconds, part.history)
    assert_same_training(after(loaded, 9 - at), after(begin(), 9))


def test_a_step_leaves_the_old_state_untouched() -> None:
    state = after(begin(), 7)                                           # RAdam trusts its denominator from the sixth step on
    assert_same_training(after(state, 3), after(state, 3))
    assert state.params["head.weight"].tobytes() != after(state, 1).params["head.weight"].tobytes()


DYING = """
import os, signal, sys
sys.path.insert(0, TESTS)
from test_experiment import begin, tiny_task
import test_experiment
from refattn import checkpoint, experiment

path, module, name, at = sys.argv[1:]
module, calls = {"os": checkpoint.os, "test": test_experiment}[module], 0
lives = getattr(module, name)

def dies(*arguments, **options):
    global calls
    calls += 1
    if calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return lives(*arguments, **options)

setattr(module, name, dies)
experiment.CHECKPOINT_SECONDS = 0
start = experiment.training_open(path, tiny_task(), lambda: begin().params)
experiment.train(path, tiny_task(), start, updates=9, measured=lambda update: update % 2 == 0)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_process_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Killed within an update, before the new file is whole, before and after it replaces the old one; then left alone."""
    path, script = tmp_path / "deep" / "x.safetensors", DYING.replace("TESTS", repr(str(Path(__file__).parent)))
    run = lambda *arguments: subprocess.run([sys.executable, "-c", script, str(path), *arguments], stdout=subprocess.DEVNULL).returncode
    whole, reached = [after(begin(), i) for i in range(10)], 0
    for module, name, at, gain in (("test", "radam_step", 3, 2), ("os", "fsync", 3, 1), ("os", "replace", 2, 1), ("os", "open", 2, 2)):
        assert run(module, name, str(at)) == -signal.SIGKILL
        reached += gain
        assert_same_training(experiment.training_load(path, tiny_task()), whole[reached])
    assert run("os", "replace", "99") == 0
    state = experiment.training_load(path, tiny_task())
    assert_same_training(state, whole[9])
    assert [row["update"] for row in state.history] == [2, 4, 6, 8]
    assert [row["loss"] for row in state.history] == [whole[i].loss for i in (2, 4, 6, 8)]


@pytest.mark.parametrize("end", [KeyboardInterrupt, ZeroDivisionError])
def test_whatever_ends_a_run_the_updates_that_it_made_are_kept(tmp_path: Path, end: type[BaseException]) -> None:
    task, path = tiny_task(), tmp_path / "x"

    def batch(update: int) -> Any:
        if update == 3:
            raise end
        return task.batch(update)

    with pytest.raises(end):
        experiment.train(path, task._replace(batch=batch), begin(), updates=9)
    assert_same_training(experiment.training_load(path, task), after(begin(), 3))


def test_a_budget_of_seconds_counts_updates_alone_and_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(experiment.time, "process_time", lambda: clock[0])
    step = experiment.train_step

    def slow(state: Training, task: Task) -> Training:
        clock[0] += 2.0
        return step(state, task)

    def measure(params: Any) -> dict[str, float]:
        clock[0] += 100.0
        return {"x": 1.0}

    monkeypatch.setattr(experiment, "train_step", slow)
    shown: list[Any] = []
    go = lambda state, seconds: experiment.train(tmp_path / "x", tiny_task(), state, seconds=seconds, measure=measure,
                                                 measured=lambda update: update == 2, show=shown.append)
    state = go(begin(), 5.0)
    assert (state.update, state.seconds) == (3, 6.0)
    assert shown == [{"update": 2, "seconds": 4.0, "loss": after(begin(), 2).loss, "x": 1.0}] == list(state.history)
    state = go(experiment.training_load(tmp_path / "x", tiny_task()), 10.0)
    assert (state.update, state.seconds) == (5, 10.0)
    assert_same_training(state, after(begin(), 5))


def schedule(updates: int) -> Task:
    task = tiny_task()
    return task._replace(plan={**task.plan, "updates": updates},
                         optimize=lambda *at: radam_step(*at[:3], learning_rate=1e-2 * (1 - at[3] / updates)))


def test_a_budget_of_seconds_becomes_a_number_of_updates_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Update i costs i seconds of processor time here, and half as many by the clock."""
    clock, step = [0.0], experiment.train_step

    def slow(state: Training, task: Task) -> Training:
        clock[0] += state.update
        return step(state, task)

    monkeypatch.setattr(experiment, "train_step", slow)
    monkeypatch.setattr(experiment.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(experiment.time, "perf_counter", lambda: clock[0] / 2)
    state = begin()
    assert experiment.update_seconds(state, tiny_task(), (2, 3, 7)) == (2.0, 4.0)
    assert_same_training(state, begin())
    init = lambda: begin().params
    task = experiment.task_for_budget(tmp_path / "deep" / "x", schedule, init, 83.0, range(3, 6))
    assert task.plan["updates"] == 21                                            # 83 / 4
    assert_same_training(experiment.training_load(tmp_path / "deep" / "x", task), begin())
    # a machine that has grown slower, or a process that starts again, finds the number that there is
    monkeypatch.delattr(experiment, "train_step")
    again = experiment.task_for_budget(tmp_path / "deep" / "x", schedule, init, 83.0, range(30, 60))
    assert again.plan == task.plan
    experiment.training_save(tmp_path / "y", begin(), tiny_task())               # one without a number: its plan is another
    with pytest.raises(ValueError, match=r"updates = None \(now 1\)"):
        experiment.training_open(tmp_path / "y", experiment.task_for_budget(tmp_path / "y", schedule, init, 83.0, range(3)), init)


def test_a_budget_for_less_than_one_update_is_one(tmp_path: Path) -> None:
    assert experiment.task_for_budget(tmp_path / "x", schedule, lambda: begin().params, 1e-9, range(2)).plan["updates"] == 1


def test_a_training_that_is_done_is_left_as_it_is(tmp_path: Path) -> None:
    state = experiment.train(tmp_path / "x", tiny_task(), begin(), updates=2)
    before = os.stat(tmp_path / "x").st_mtime_ns, (tmp_path / "x").read_bytes()
    assert experiment.train(tmp_path / "x", tiny_task(), state, updates=2) is state
    assert (os.stat(tmp_path / "x").st_mtime_ns, (tmp_path / "x").read_bytes()) == before


def test_the_bar_shows_the_part_that_is_done_the_loss_and_the_remaining_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, init = Terminal(), tqdm.tqdm.__init__
    monkeypatch.setattr(tqdm.tqdm, "__init__", lambda bar, **options: init(bar, **options, file=terminal, mininterval=0, ncols=120))
    experiment.train(tmp_path / "x", tiny_task(), after(begin(), 2), updates=4, loss="{:.2f} nats".format)
    lines = [line for line in terminal.getvalue().split("\r") if line.strip()]
    assert " 50%|" in lines[0] and " 75%|" in "".join(lines) and "100%|" in lines[-1]
    assert f"update 4, {after(begin(), 4).loss:.2f} nats" in lines[-1] and "<00:00" in lines[-1]


def test_the_loss_is_a_running_mean(tmp_path: Path) -> None:
    losses = [float(tiny_task().loss_and_grads(after(begin(), i).params, tiny_task().batch(i))[0]) for i in range(3)]
    assert after(begin(), 1).loss == losses[0]
    assert after(begin(), 3).loss == pytest.approx(0.95 * (0.95 * losses[0] + 0.05 * losses[1]) + 0.05 * losses[2], rel=1e-15)


# --- measuring ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(os.name != "posix", reason="Windows does not tell the peak of memory")
def test_the_peak_is_this_process_s_own_and_stays(tmp_path: Path) -> None:
    """It rises by what is touched, not by what is freed, and does not begin with that of the process that started this one."""
    script = tmp_path / "child.py"
    script.write_text("import sys, json, numpy as np; from refattn.experiment import peak_bytes\n"
                      "before = peak_bytes(); x = np.ones(2**23); during = peak_bytes(); del x; print(json.dumps([before, during, peak_bytes()]))")
    large = np.ones(2**25)                                                          # 256 MiB
    before, during, after = experiment.run_apart(script)
    assert abs(during - before - 2**26) < 2**22 and abs(after - during) < 2**20 and experiment.peak_bytes() > large.nbytes
    assert before < large.nbytes or not os.path.exists("/proc/self/status")


def test_without_proc_the_peak_comes_from_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")

    def missing(*arguments: Any, **options: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(experiment, "open", missing, raising=False)
    unit = 1 if sys.platform == "darwin" else 1024
    assert experiment.peak_bytes() == unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 2**20


def test_a_script_that_fails_apart_fails_here(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import sys, json; print(json.dumps(sys.argv[1:])); sys.exit(len(sys.argv) > 2)")
    assert experiment.run_apart(tmp_path / "x.py", "a") == ["a"]
    with pytest.raises(subprocess.CalledProcessError, match="exit status 1"):
        experiment.run_apart(tmp_path / "x.py", "a", "b")


# --- data, files, words ------------------------------------------------------------------------------------------------------------------

@given(size=st.integers(1, 5), count=st.integers(5, 17), epoch=st.integers(0, 3), seed=st.integers(0, 99))
def test_every_example_has_its_turn_at_most_once_an_epoch(size: int, count: int, epoch: int, seed: int) -> None:
    parts = count // size
    seen = [experiment.epoch_part(epoch * parts + i, size, count, seed) for i in range(parts)]
    assert all(part.shape == (size,) for part in seen)
    assert len(set(np.concatenate(seen).tolist())) == parts * size and set(np.concatenate(seen).tolist()) <= set(range(count))


@given(size=st.integers(1, 5), count=st.integers(5, 17), epoch=st.integers(0, 3), seed=st.integers(0, 99))
def test_examples_of_like_length_go_together(size: int, count: int, epoch: int, seed: int) -> None:
    """Each at most once an epoch; and of two updates one has no example that is more than a tenth longer than any of the other's."""
    lengths, parts = np.random.default_rng(seed).integers(1, 50, count), count // size
    seen = [experiment.epoch_part(epoch * parts + i, size, count, seed, lengths) for i in range(parts)]
    assert all(part.shape == (size,) for part in seen)
    assert len(set(np.concatenate(seen).tolist())) == parts * size and set(np.concatenate(seen).tolist()) <= set(range(count))
    for i in range(parts):
        for one, other in ((lengths[seen[i]], lengths[seen[j]]) for j in range(i)):
            assert one.max() <= 1.1 * other.min() or other.max() <= 1.1 * one.min()


@pytest.mark.parametrize("lengths", [None, np.arange(40, 80)])
def test_epochs_and_seeds_have_orders_of_their_own(lengths: np.ndarray | None) -> None:
    """Of the examples of an update, and of the updates: the shortest do not always come first."""
    whole = lambda epoch, seed: [experiment.epoch_part(10 * epoch + i, 4, 40, seed, lengths) for i in range(10)]
    epochs = [whole(epoch, seed) for epoch, seed in ((0, 0), (1, 0), (0, 1), (2, 0))]
    assert len({tuple(tuple(sorted(part.tolist())) for part in parts) for parts in epochs}) == 4
    assert len({frozenset(frozenset(part.tolist()) for part in parts) for parts in epochs}) == 4
    assert len({tuple(np.argsort([part.mean() for part in parts])) for parts in epochs}) == 4
    left = [set(range(40)) - {int(x) for i in range(4) for x in experiment.epoch_part(4 * epoch + i, 9, 40, 0, lengths)} for epoch in range(99)]
    assert set.union(*left) == set(range(40))                                    # each is left over now and then, and not the longest always


def test_a_checkpoint_of_another_plan_is_refused_with_words(tmp_path: Path) -> None:
    experiment.training_save(tmp_path / "x", begin(), tiny_task())
    with pytest.raises(ValueError, match=r"x: a training with seed = 5 \(now 6\); ask for the same, name another folder by --out, or delete"):
        experiment.training_load(tmp_path / "x", tiny_task(6))
    with pytest.raises(ValueError, match=r"seed = 5 \(now None\), shape = \[3, 7\] \(now None\), new = None \(now 1\)"):
        experiment.training_open(tmp_path / "x", tiny_task()._replace(plan={"new": 1}), dict)


@pytest.mark.parametrize("budget", [{}, {"updates": 0}, {"seconds": -1.0}, {"seconds": math.nan}, {"updates": math.inf}])
def test_a_training_without_an_end_is_refused(tmp_path: Path, budget: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="updates: expected a positive number of updates or of seconds, got updates = "):
        experiment.train(tmp_path / "x", tiny_task(), begin(), **budget)


def test_more_examples_than_there_are_cannot_be_asked_for() -> None:
    for size in (0, 6):
        with pytest.raises(ValueError, match=f"size: expected 1 to count = 5 examples for an update, got {size}"):
            experiment.epoch_part(0, size, 5, 0)


def test_results_are_json_and_whole(tmp_path: Path) -> None:
    experiment.results_save(tmp_path / "r.json", {"x": [1, 0.1]})
    with pytest.raises(ValueError, match="JSON"):
        experiment.results_save(tmp_path / "r.json", {"x": math.nan})
    assert json.loads((tmp_path / "r.json").read_text()) == {"x": [1, 0.1]} == experiment.results_load(tmp_path / "r.json")
    assert experiment.results_load(tmp_path / "none.json") == {}


def test_curves_are_drawn_as_they_are(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    results = {name: {"history": [{"update": 10 * i, "seconds": 60.0 * i, "loss": k + i} for i in range(3)]} for k, name in enumerate("ca")}
    axes = figure.subplots(1, 2)
    experiment.curves_draw(axes, results, "abc", {"updates": lambda row: row["update"], "minutes": lambda row: row["seconds"] / 60},
                           ("loss", lambda row: 2 * row["loss"]))
    for ax, label, across in zip(axes, ("updates", "minutes"), ([0, 10, 20], [0, 1, 2]), strict=True):
        assert ax.get_xlabel() == label
        assert [(line.get_label(), line.get_color(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.get_lines()] == [
            ("c", "C2", across, [0, 2, 4]), ("a", "C0", across, [2, 4, 6])]
    assert axes[0].get_ylabel() == "loss" and [text.get_text() for text in axes[1].get_legend().get_texts()] == ["c", "a"]


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), height=st.integers(1, 4), width=st.integers(1, 4), colours=st.booleans(),
       seed=st.integers(0, 99))
def test_a_mosaic_shows_every_picture_in_its_place(rows: int, columns: int, height: int, width: int, colours: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pictures = rng.random((rows, columns, height, width, *((3,) if colours else ())))
    hidden = rng.random((rows, columns, height, width)) < 0.3
    pictures[hidden] = np.nan
    shown = experiment.mosaic(pictures)
    assert shown.shape == (rows * (height + 1) - 1, columns * (width + 1) - 1, 3)
    left = np.ones(shown.shape[:2], bool)
    for r in range(rows):
        for c in range(columns):
            at = slice((height + 1) * r, (height + 1) * r + height), slice((width + 1) * c, (width + 1) * c + width)
            tile, picture, left[at] = shown[at], pictures[r, c], False
            there = ~hidden[r, c]
            np.testing.assert_array_equal(tile[there], picture[there] if colours else np.repeat(picture[there][:, None], 3, axis=1))
            assert (tile[~there] == (0.93, 0.89, 0.80)).all()
    assert (shown[left] == (0.80, 0.86, 0.93)).all()


def test_the_words_of_a_figure_of_mosaics_stand_at_the_middle_of_their_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    kept: list[Any] = []
    monkeypatch.setattr(experiment, "figure_save", lambda path, figure: kept.append(figure))
    upper, lower = np.zeros((1, 3, 4, 7)), np.ones((2, 3, 4, 7))
    experiment.mosaics_save(tmp_path / "x.png", [("one", ["a"], upper), ("two", ["b", "c"], lower)], ["x", "y", "z"])
    for ax, title, names, rows in zip(kept[0].axes, ("one", "two"), (["a"], ["b", "c"]), (upper, lower), strict=True):
        assert ax.get_title() == title and [text.get_text() for text in ax.get_yticklabels()] == names
        np.testing.assert_array_equal(ax.get_images()[0].get_array(), experiment.mosaic(rows))
        assert [text.get_text() for text in ax.get_xticklabels()] == ["x", "y", "z"]
        assert ax.get_xticks().tolist() == [3, 11, 19] and ax.get_yticks().tolist() == [1.5, 6.5][: len(rows)]


@pytest.mark.parametrize("options", [["--minutes", "0"], ["--minutes", "nan"], ["--minutes", "soon"], ["--seed", "-1"], ["--seed", "x"]])
def test_options_that_mean_nothing_end_with_usage(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        experiment.arguments("what it does", prog="x", out="out", minutes=2).parse_args(options)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: x")


@pytest.mark.parametrize("module", ["tqdm", "safetensors"])
def test_a_missing_extra_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"this needs {module}, which is not installed; install it with: pip install 'refattn\[demo\]'"):
        experiment.train(tmp_path / "x", tiny_task(), begin(), updates=1)


def of_example(script: str, system: str) -> tuple[Task, Any]:
    """A tiny task of one of the numbered experiments, and parameters in float64."""
    of, rng = runpy.run_path(str(Path(__file__).parent.parent / "examples" / script)), np.random.default_rng(0)
    if script == "06_speech.py":
        corpus = of["corpus_made_up"](40)
        corpus = corpus._replace(frames=[x.astype(np.float64) for x in corpus.frames])
        task, params = of["speech_task"](system, "smoke", corpus, {"seed": 3}, 8), of["model_of"](system, "smoke", corpus.phonemes + 1).init(rng)
    else:
        if script == "04_copy_task.py":
            task, config = of["copy_task"](system, "smoke", 0)
        elif script == "05_images.py":
            config = Config(18, 9, 8, 2, 1, 16, attention=system, outputs=30)
            plan = {"scale": "small", "seed": 3, "batch": 4, "rate": 1e-2, "updates": 8}
            task = of["image_task"](rng.integers(0, 17, (8, 9), np.uint8), config, plan)
        else:
            task, config, _ = of["text_task"](system, "smoke", 0, "abc, ca bb. " * 40)
        params = transformer_init(rng, config)
    return task, {name: x.astype(np.float64) for name, x in params.items()}


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles kernels with g++, which is not installed")
@pytest.mark.parametrize(("script", "system"), [("04_copy_task.py", "linear"), ("04_copy_task.py", "softmax"), ("05_images.py", "linear"),
                                                ("06_speech.py", "linear"), ("06_speech.py", "bilstm"), ("08_text.py", "linear")])
def test_the_experiments_train_with_cupy_arrays_too(script: str, system: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from refattn.simt import cupy

    task, params = of_example(script, system)
    there = experiment.training_open(tmp_path / "x", task, lambda: params, cupy)
    (loss, grads), (loss_there, grads_there) = (task.loss_and_grads(p, task.batch(0)) for p in (params, there.params))
    size, bound = max(np.abs(g).max() for g in grads.values()), gamma(4096, "float64")
    assert abs(loss - loss_there) <= bound * abs(loss)
    for name, g in grads.items():
        assert np.abs(grads_there[name].get() - g).max() <= bound * size
    # what is saved is what is gone on with, on a device or without one
    experiment.training_save(tmp_path / "x", state := experiment.train_step(there, task), task)
    for xp in (np, cupy):
        again = experiment.training_open(tmp_path / "x", task, lambda: params, xp)
        for part in ("params", "slots"):
            ours, theirs = (experiment.moved(np, getattr(s, part)) for s in (state, again))
            for one, other in ((ours, theirs),) if part == "params" else zip(ours[1:], theirs[1:], strict=True):
                assert all((one[name] == other[name]).all() for name in params)
        assert all(type(x) is type(xp.zeros(1)) for x in again.params.values()) and again.slots.steps == again.update == 1


def test_moving_arrays_leaves_the_rest() -> None:
    from refattn.simt import cupy

    x = Training({"w": np.ones(2)}, experiment.adam_init({"w": np.ones(2)}), 3, 0.5, 1.5, ({"loss": 0.5},))
    there = experiment.moved(cupy, x)
    assert type(there) is Training and there[2:] == x[2:] and type(there.slots.mean["w"]) is type(cupy.zeros(1))
    rng, back = np.random.default_rng(0), experiment.moved(np, (there, "name", None, np.float32(1)))
    assert experiment.moved(np, back[0].params["w"]).tolist() == [1, 1] and back[1:] == ("name", None, 1) and experiment.moved(cupy, rng) is rng


def test_cupy_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment.library(False) is np
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"this needs CuPy, which is not installed; install it with: pip install 'refattn\[cuda13x\]'"):
        experiment.library(True)


def test_an_interrupt_ends_an_experiment_with_words() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="stopped; the same command goes on from there"):
        experiment.run(interrupted)
    experiment.run(lambda: None)
