"""The image experiment, examples/05_images.py: what is learnt from, what a likelihood is, and what the script leaves behind."""
from __future__ import annotations

import importlib.util
import json
import math
import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import experiment
from refattn.testing import budgets

FILE = str(Path(__file__).parent.parent / "examples" / "05_images.py")
IMAGES = runpy.run_path(FILE)
SYSTEMS = IMAGES["SYSTEMS"]
seeds = st.integers(0, 2**32 - 1)
needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="the digits are scikit-learn's, extra demo")


def config_of(system: str = "linear", values: int = 12, levels: int = 6) -> Any:
    return IMAGES["Config"](levels + 1, values, 8, 2, 1, 16, attention=system, outputs=6)


def params_of(config: Any, dtype: Any = np.float64) -> Any:
    return IMAGES["transformer_init"](np.random.default_rng(1), config, dtype)


def images_of(rng: np.random.Generator, count: int, shape: tuple[int, ...] = (4, 3), levels: int = 6) -> Any:
    values = rng.integers(0, levels, (count, math.prod(shape))).astype(np.uint8)
    return IMAGES["Images"](values, values[::-1], (3 * np.arange(count) + 1) % 10, tuple("abcdefghij"), shape, levels)


def task_of(system: str, images: Any, **plan: Any) -> Any:
    plan = {"scale": "small", "seed": 3, "batch": 4, "rate": 1e-2, "updates": 200, **plan}
    return IMAGES["image_task"](images.train, config_of(system), plan)


def write(path: Path, rng: np.random.Generator, shape: tuple[int, ...], *, differences: bool, names: bool) -> dict[str, np.ndarray]:
    x = {part: rng.integers(0, 256, (count, *shape)).astype(np.uint8) for part, count in (("train", 5), ("test", 20))}
    packed = {f"dx_{part}": np.diff(a, axis=2, prepend=np.zeros_like(a[:, :, :1])) for part, a in x.items()}
    np.savez(path, **(packed if differences else {f"x_{part}": a for part, a in x.items()}), y_test=np.arange(20) % 10,
             **({"names": np.array(list("abcdefghij"))} if names else {}))
    return x


# --- the command -----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for module in ("matplotlib", "safetensors", "tqdm"):
        pytest.importorskip(module)

    def run(*options: str, main: Any = None) -> list[list[str]]:
        monkeypatch.setattr("sys.argv", [FILE, "--seed", "3", "--out", str(tmp_path / "out"), *options])
        (main or runpy.run_path(FILE)["main"])()
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    return run


@needs_digits
def test_the_command_trains_goes_on_and_tells(command: Any, tmp_path: Path) -> None:
    first, out = command("--smoke"), tmp_path / "out"
    kept = {name: (out / name).read_bytes() for name in os.listdir(out)}
    again = command("--smoke", "--system", "softmax")
    assert " ".join(first[0]) == ("digits (of scikit-learn, since there is no --data): 64 values of 17 levels; 1,500 images to learn from, "
                                  "4 of 297 to test with")
    assert again[1][-4:] == ["update", "4", "of", "4"] and first[-6:] == again[-6:]
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == kept
    assert sorted(name for name in kept if name.endswith(".png")) == sorted(
        ["digits-smoke.png", *(f"digits-smoke-{system}-{what}.png" for system in ("linear", "softmax") for what in ("drawn", "completed"))])
    assert all(data.startswith(b"\x89PNG") for name, data in kept.items() if name.endswith(".png"))
    assert [row[0] for row in first[-6:-2]] == list(SYSTEMS)
    for row in first[-6:-2]:
        r = json.loads(kept[f"digits-smoke-{row[0]}.json"])
        assert row[1] == "4" and row[4:] == [f"{r['bits']:.3f}", f"{r['test bits']:.3f}", "±", f"{r['standard error']:.3f}", "4"]
        assert [point["update"] for point in r["history"]] == [1, 2, 3, 4] and r["bits"] == r["history"][-1]["loss"] / math.log(2)


@needs_digits
def test_a_budget_of_minutes_is_kept_in_the_plan(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, tested = runpy.run_path(FILE), []
    names["SCALES"]["digits", "small"] = (8, 2, 1, 2, 1e-3)
    monkeypatch.setitem(names["main"].__globals__, "image_test", lambda *at: tested.append(at[2]) or names["image_test"](*at))
    options = ["--system", "linear", "--test", "7"]
    first, again = (command("--minutes", "0.001", *options, main=names["main"]) for _ in range(2))
    r = json.loads((tmp_path / "out" / "digits-small-linear.json").read_text())
    assert r["updates"] == r["plan"]["updates"] >= 1 and r["test images"] == 7
    np.testing.assert_array_equal(tested[0], names["images_load"]("digits", None).test[[0, 42, 84, 127, 169, 212, 254]])     # all over the 297
    assert first[1][-4:] == ["update", "0", "of", f"{r['updates']:,}"] and again[1][-3:] == [f"{r['updates']:,}", "of", f"{r['updates']:,}"]
    with pytest.raises(ValueError, match=r"minutes = 0.001 \(now 2.0\)"):
        command("--minutes", "2", *options, main=names["main"])


def test_mnist_is_set_beside_the_papers_figures(command: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "mnist.npz", rng, (28, 28), differences=False, names=False)
    told = command("--smoke", "--data", str(tmp_path), "--system", "lsh-1", "--test", "3")
    assert told[0][:6] == "mnist: 784 values of 256 levels;".split() and told[-3][0] == "lsh-1" and told[-3][-2:] == ["3", "0.745"]


@pytest.mark.parametrize(("options", "words"), [
    (["--dataset", "cifar10"], "argument --dataset: cifar10 is not in the package; name its file, or the folder of cifar10_5k.npz, by --data"),
    (["--scale", "paper"], "argument --scale: the paper has mnist and cifar10, not digits"),
    (["--test", "0"], "argument --test: expected at least one image, got 0")])
def test_options_that_mean_nothing_end_with_usage(options: list[str], words: str, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [FILE, *options])
    with pytest.raises(SystemExit) as end:
        IMAGES["main"]()
    assert end.value.code == 2 and words in capsys.readouterr().err


# --- what is learnt from ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("dataset", "shape"), [("mnist", (28, 28)), ("cifar10", (32, 32, 3))])
@pytest.mark.parametrize("differences", [True, False])
def test_images_are_read_as_they_are_from_a_folder_or_a_file(tmp_path: Path, rng: np.random.Generator, dataset: str, shape: tuple[int, ...],
                                                             differences: bool) -> None:
    x = write(tmp_path / IMAGES["FILES"][dataset], rng, shape, differences=differences, names=differences)
    for path in (tmp_path, tmp_path / IMAGES["FILES"][dataset]):
        images = IMAGES["images_load"](dataset, str(path))
        assert (images.shape, images.levels) == (shape, 256)
        assert "".join(images.words) == ("abcdefghij" if differences else "0123456789")
        np.testing.assert_array_equal(images.train, x["train"].reshape(5, -1))
        np.testing.assert_array_equal(images.test, x["test"].reshape(20, -1))
        np.testing.assert_array_equal(images.label, np.arange(20) % 10)


def test_images_of_another_kind_are_refused_with_words(tmp_path: Path, rng: np.random.Generator) -> None:
    write(tmp_path / "mnist.npz", rng, (28, 27), differences=False, names=False)
    with pytest.raises(ValueError, match=r"mnist.npz: expected x_train = \(images, 28, 28\) of uint8, got \(5, 28, 27\) of uint8; is it mnist?"):
        IMAGES["images_load"]("mnist", str(tmp_path / "mnist.npz"))


@pytest.mark.skipif(not os.environ.get("REFATTN_DATA"), reason="reads real images from the folder that REFATTN_DATA names, which it does not")
def test_real_images_are_those_of_their_makers() -> None:
    mnist, cifar = (IMAGES["images_load"](dataset, os.environ["REFATTN_DATA"]) for dataset in ("mnist", "cifar10"))
    assert (len(mnist.train), len(mnist.test), mnist.train.shape[1]) == (60_000, 10_000, 784)
    assert abs(mnist.train.mean() / 255 - 0.1307) < 5e-5 and mnist.label[:3].tolist() == [7, 2, 1]
    assert (len(cifar.train), len(cifar.test), cifar.train.shape[1]) == (4000, 1000, 3072)
    assert cifar.train[0, :3].tolist() == [59, 62, 63] and cifar.test[0, :3].tolist() == [158, 112, 49]
    assert [cifar.words[kind] for kind in cifar.label[:3]] == ["cat", "ship", "ship"]


@pytest.mark.parametrize("width", [6, 17, 64])
@pytest.mark.parametrize("shape", [(8, 8), (5, 3), (6, 7, 3)])
def test_positions_start_as_waves_that_know_distances_alone(shape: tuple[int, ...], width: int) -> None:
    """cos a cos b + sin a sin b = cos(a - b): what two positions have in common depends on how far apart they are along each axis, no two are
    alike, and each has the length 1."""
    w, off = IMAGES["waves"](shape, width).reshape(*shape, width).astype(np.float64), 1.01 * float(np.finfo(np.float32).eps)
    gram = lambda x: x.reshape(-1, width) @ x.reshape(-1, width).T    # of vectors of length 1, both rounded: off by 2u + u² = eps, and float64's
    for axis, n in enumerate(shape):
        before, behind = (w.take(range(start, n - 1 + start), axis) for start in (0, 1))
        np.testing.assert_allclose(gram(before), gram(behind), rtol=0, atol=2 * off)
    np.testing.assert_allclose(np.diag(gram(w)), 1, rtol=0, atol=off)
    assert (gram(w) - np.eye(math.prod(shape))).max() < 1 - 2 * off


@given(seeds, st.integers(2, 256), st.integers(1, 10))
def test_means_start_spread_over_all_levels(seed: int, levels: int, count: int) -> None:
    """The head's bias, in its units: logits 0, means from the lowest level to the highest, log-scales 0. One rounding to float32, one product."""
    config = config_of(levels=levels)._replace(outputs=3 * count)
    bias = IMAGES["weights_init"](seed, config, (4, 3))["head.bias"] * IMAGES["units"](config)
    np.testing.assert_allclose(bias, [*[0] * count, *np.linspace(-1, 1, count), *[0] * count], rtol=float(np.finfo(np.float32).eps), atol=0)


@given(seeds, st.sampled_from(SYSTEMS))
def test_an_update_is_a_function_of_its_number(seed: int, system: str) -> None:
    task, config = task_of(system, images_of(np.random.default_rng(seed), 21), seed=seed), config_of(system)
    params = params_of(config)
    (loss, grads), (other, ograds), (third, _) = (task.loss_and_grads(params, task.batch(i)) for i in (6, 6, 7))
    assert loss == other != third and all((grads[key] == ograds[key]).all() for key in params)
    if system.startswith("lsh"):                                                 # the rotations are the update's own
        assert [task.batch(i)[1].random() for i in (6, 7)] == [np.random.default_rng([seed, 1, i]).random() for i in (6, 7)]


# --- what a likelihood is --------------------------------------------------------------------------------------------------------------------

def probabilities(params: Any, config: Any, values: list[int]) -> np.ndarray:
    """p(x_i | x_<i), each the area under the logistics, whose means are counted in levels, from a model that reads x_<i and no more."""
    logistic, V, p = lambda x: 1 / (1 + math.exp(-x)), config.vocabulary - 1, []
    for i, x in enumerate(values):
        logits, means, scales = IMAGES["transformer_forward"](params, np.array([V, *values[:i]]), config)[0][-1].reshape(3, -1)
        below = lambda t, means=means, scales=scales: np.array([
            0.0 if t == 0 else 1.0 if t == V else logistic((2 * t - V - 2 * m) / (V - 1) / math.exp(s)) for m, s in zip(means, scales)])
        p.append((np.exp(logits) / np.exp(logits).sum() * (below(x + 1) - below(x))).sum())
    return np.array(p)


@given(seeds, st.sampled_from(["linear", "softmax"]))
def test_bits_per_dimension_are_of_each_value_given_those_before_it(seed: int, system: str) -> None:
    """Two images and one: the last, shorter part counts as much for each of its images."""
    images, config = images_of(np.random.default_rng(seed), 3), config_of(system)
    params = params_of(config)
    p = np.array([probabilities(params, config, values) for values in images.test.tolist()])
    each = -np.log2(p).mean(-1)
    found = IMAGES["image_test"](params, config, images.test, 2)
    # fewer than a thousand roundings count, and of an area, which is at most 1, each is up to 1/p times as much of p
    allowed = budgets.gamma(1000, np.float64) * (1 / p).mean(-1).max()
    assert abs(found["test bits"] - each.mean()) <= allowed < 1e-9
    assert abs(found["standard error"] - math.sqrt(((each - each.mean()) ** 2).mean() / 3)) <= allowed
    loss, _ = task_of(system, images).loss_and_grads(params, (images.test, np.random.default_rng(0)))
    assert abs(loss / math.log(2) - each.mean()) <= allowed


@pytest.mark.parametrize("system", ["linear", "softmax"])
def test_the_gradient_of_an_update_is_that_of_its_loss(system: str, rng: np.random.Generator) -> None:
    """By central differences. They are off by a curvature, of which D(h) - D(2h) shows three times as much, and by the roundings of their two
    ends: sums of fewer than a thousand terms, one after another."""
    images, config = images_of(rng, 8), config_of(system)
    params, task, slope, h = params_of(config), task_of(system, images), {}, 1e-5
    along = {key: rng.standard_normal(p.shape) for key, p in params.items()}
    at = lambda params: task.loss_and_grads(params, task.batch(0))
    loss, grads = at(params)
    for step in (h, 2 * h):
        ahead, behind = (at({key: p + side * along[key] for key, p in params.items()})[0] for side in (step, -step))
        slope[step] = (ahead - behind) / (2 * step)
    found = sum(float((grads[key] * along[key]).sum()) for key in params)
    roundings = budgets.gamma(1000, np.float64) * loss / h
    assert abs(found - slope[h]) <= abs(slope[h] - slope[2 * h]) + roundings < 1e-4 * abs(found)


def test_the_small_models_rate_falls_to_nothing_and_the_papers_stays(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    told = lambda name: lambda params, grads, slots, learning_rate: (name, grads["w"].tolist(), learning_rate)
    small, paper = (task_of("linear", images_of(rng, 8), scale=scale, rate=1e-3).optimize for scale in ("small", "paper"))
    for name in ("adam_step", "radam_step"):
        monkeypatch.setitem(small.__globals__, name, told(name))
    grads, warm = {"w": np.array([3.0, 4.0])}, IMAGES["WARM_UP"]
    rates = [small({}, grads, None, update)[2] for update in range(201)]
    assert small({}, grads, None, 0)[:2] == ("adam_step", [0.6000000000000001, 0.8]) and rates[0] == 1e-3 / warm and rates[-1] == 0
    assert rates[100] == pytest.approx(5e-4, rel=1e-15) and all((a > b) == (i >= warm - 1) for i, (a, b) in enumerate(zip(rates, rates[1:])))
    assert {paper({}, grads, None, update)[2] for update in (0, 7, 200)} == {1e-3} and paper({}, grads, None, 0)[0] == "radam_step"


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_image_is_learnt_by_heart(system: str, rng: np.random.Generator) -> None:
    one = images_of(rng, 1)
    task = task_of(system, one._replace(train=np.repeat(one.train, 8, axis=0)), rate=2e-2, updates=150)
    state = experiment.training_init(params_of(config_of(system), np.float32))
    for _ in range(150):
        state = experiment.train_step(state, task)
    assert IMAGES["image_test"](state.params, config_of(system), one.train, 1)["test bits"] < math.log2(6) / 3


# --- what is drawn ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("system", ["linear", "softmax"])
def test_values_are_drawn_from_the_logistics_that_the_likelihood_is_of(system: str, monkeypatch: pytest.MonkeyPatch,
                                                                       rng: np.random.Generator) -> None:
    draw, images, config, used, pictures = IMAGES["draw"], images_of(rng, 30), config_of(system), [], []
    params, sample = params_of(config), IMAGES["logistic_mixture_sample"]
    monkeypatch.setitem(draw.__globals__, "logistic_mixture_sample", lambda x, *rest, **options: (used.append(x), sample(x, *rest, **options))[1])
    monkeypatch.setitem(draw.__globals__, "mosaics_save", lambda path, blocks, columns: pictures.append(blocks[0][2]))
    draw("x", params, config, images, rng, 1)
    drawn = np.rint((1 - pictures[0]) * 5).astype(int).reshape(10, 12)           # the first twelve draws; the others complete
    expected = IMAGES["read"](params, config, drawn, rng)[0]
    size = np.abs(expected).max()                                                # one position at a time, or all: a thousand roundings each
    np.testing.assert_allclose(np.stack(used[:12], axis=1), expected, rtol=0, atol=2 * budgets.gamma(1000, np.float64) * size)


@pytest.mark.parametrize("system", ["linear", "softmax"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_the_shown_half_is_kept_and_only_the_rest_is_drawn(system: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch,
                                                           rng: np.random.Generator) -> None:
    kept: dict[str, Any] = {}
    draw, images, config = IMAGES["draw"], images_of(rng, 30, shape), config_of(system, math.prod(shape))
    monkeypatch.setitem(draw.__globals__, "mosaics_save", lambda path, blocks, columns: kept.update({path: (*blocks[0], columns)}))
    draw("x", params_of(config), config, images, rng, 2)
    (_, _, drawn, _), (_, names, rows, columns) = kept["x-drawn.png"], kept["x-completed.png"]
    assert drawn.shape == (2, 10, *shape) and rows.shape == (4, 10, *shape) and columns == images.words
    assert names == ["original", "shown half", "completion 1", "completion 2"]
    levels = [x if len(shape) == 3 else 1 - x for x in (drawn, rows)]            # ink is black
    for i, whole in enumerate(levels[1][0]):
        same = (np.abs(images.test.reshape(-1, *shape) / 5 - whole) < 1e-9).reshape(30, -1).all(1)
        assert i in images.label[same]
    for half in levels[1][1:]:
        np.testing.assert_array_equal(half[:, :2], levels[1][0, :, :2])
    assert np.isnan(levels[1][1, :, 2:]).all() and not np.array_equal(levels[1][2], levels[1][3])
    for x in (levels[0], levels[1][2:, :, 2:]):                                  # from the blackest to the whitest, and nothing but levels
        assert (x.min(), x.max()) == (0, 1) and np.abs(5 * x - np.round(5 * x)).max() < 1e-9
    monkeypatch.setitem(draw.__globals__, "TEMPERATURE", 0)
    draw("x", params_of(config), config, images, rng, 2)
    np.testing.assert_array_equal(*kept["x-completed.png"][2][2:])               # the likeliest, whatever the generator says


def test_an_image_that_is_known_by_heart_is_completed_as_it_was(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    kept: dict[str, Any] = {}
    draw, one, config = IMAGES["draw"], images_of(rng, 1), config_of("linear")
    monkeypatch.setitem(draw.__globals__, "mosaics_save", lambda path, blocks, columns: kept.update({path: blocks[0][2]}))
    monkeypatch.setitem(draw.__globals__, "TEMPERATURE", 0)
    task = task_of("linear", one._replace(train=np.repeat(one.train, 8, axis=0)), rate=2e-2, updates=150)
    state = experiment.training_init(params_of(config, np.float32))
    for _ in range(150):
        state = experiment.train_step(state, task)
    draw("x", state.params, config, one._replace(test=np.repeat(one.train, 10, axis=0), label=np.arange(10)), rng, 1)
    np.testing.assert_array_equal(kept["x-completed.png"][2], kept["x-completed.png"][0])
    np.testing.assert_array_equal(kept["x-drawn.png"][0], kept["x-completed.png"][0])
