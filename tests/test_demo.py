"""Laws of the demo: an interruption changes nothing, a pixel never sees itself, and the numbers it prints are what they say."""
from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refattn import demo
from refattn.demo import Plan, Training

TINY = Plan(seed=5, updates=9, batch=7, warm_up=2, width=8, heads=2, layers=1)


def some_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, demo.LEVELS, (count, demo.PIXELS))


def after(state: Training, updates: int, images: np.ndarray, plan: Plan = TINY) -> Training:
    for _ in range(updates):
        state, _ = demo.train_step(state, images, images[:, 0] % 10, plan)
    return state


def assert_same_training(a: Training, b: Training) -> None:
    """Bit for bit, whatever the next update depends on."""
    for one, other in ((a.params, b.params), (a.slots.mean, b.slots.mean), (a.slots.square, b.slots.square)):
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert one[name].tobytes() == other[name].tobytes(), name
    np.testing.assert_array_equal(a.order, b.order)
    assert (a.slots.steps, a.position, a.rng, a.update) == (b.slots.steps, b.position, b.rng, b.update)


# --- training ----------------------------------------------------------------------------------------------------------------------------

@given(at=st.integers(0, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
def test_an_interruption_changes_nothing(tmp_path: Path, at: int) -> None:
    images = some_images(17)                                        # two batches to an epoch, three images left over
    whole = after(demo.train_init(TINY, len(images)), 9, images)
    part = after(demo.train_init(TINY, len(images)), at, images)
    demo.training_save(tmp_path / "x", part._replace(seconds=1.5, history=[{"update": 1}]), TINY)
    loaded = demo.training_load(tmp_path / "x", TINY)
    assert_same_training(loaded, part)
    assert (loaded.seconds, loaded.history) == (1.5, [{"update": 1}])
    assert_same_training(after(loaded, 9 - at, images), whole)


def test_a_step_leaves_the_old_state_untouched() -> None:
    images = some_images(17)
    state = after(demo.train_init(TINY, len(images)), 2, images)
    once = after(state, 3, images)                                  # over the end of an epoch
    assert_same_training(after(state, 3, images), once)


def test_every_image_has_its_turn_once_an_epoch() -> None:
    images = some_images(21)
    state, seen = demo.train_init(TINY, len(images)), []
    for _ in range(6):
        state, _ = demo.train_step(state, images, images[:, 0] % 10, TINY)
        seen.append(state.order[state.position - TINY.batch: state.position])
    for epoch in (np.concatenate(seen[:3]), np.concatenate(seen[3:])):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(21))
    assert not np.array_equal(seen[0], seen[3])


def test_another_seed_gives_other_weights_and_another_order() -> None:
    a, b = demo.train_init(TINY, 21), demo.train_init(TINY._replace(seed=6), 21)
    assert not np.array_equal(a.params["head.weight"], b.params["head.weight"])
    assert not np.array_equal(a.order, b.order)


def test_the_model_learns_one_image_by_heart() -> None:
    images = np.repeat(some_images(1), 7, axis=0)
    plan = TINY._replace(updates=100, learning_rate=3e-2, weight_decay=0.0)
    state = after(demo.train_init(plan, 7), 100, images, plan)
    assert demo.bits_per_pixel(state.params, images, plan.config()) < math.log2(17) / 2


DYING = """
import os, signal, sys
import numpy as np
from refattn import checkpoint, demo

path, module, name, at = sys.argv[1:]
module, calls = {"os": checkpoint.os, "demo": demo}[module], 0
lives = getattr(module, name)

def dies(*arguments, **options):
    global calls
    calls += 1
    if calls == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return lives(*arguments, **options)

setattr(module, name, dies)
demo.CHECKPOINT_SECONDS = 0
x = np.random.default_rng(0).integers(0, demo.LEVELS, (17, demo.PIXELS))
plan = demo.Plan(**PLAN)
start = demo.training_load(path, plan) if os.path.exists(path) else demo.train_init(plan, len(x))
demo.train(path, plan, demo.Scans(x, x[:, 0] % 10, x, x[:, 0] % 10), start)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_process_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Killed within an update, before the new file is whole, before and after it replaces the old one, while measuring; then left alone."""
    plan, path = TINY._replace(updates=14), tmp_path / "x.safetensors"
    script, images = DYING.replace("PLAN", repr(plan._asdict())), some_images(17)
    whole = [demo.train_init(plan, 17)]
    for _ in range(plan.updates):
        whole.append(after(whole[-1], 1, images, plan))
    reached = 0
    for module, name, at, gain in (("demo", "radam_step", 3, 2), ("os", "fsync", 5, 2), ("os", "replace", 2, 1), ("os", "open", 3, 3),
                                   ("demo", "bits_per_pixel", 3, 1)):
        killed = subprocess.run([sys.executable, "-c", script, str(path), module, name, str(at)], stdout=subprocess.DEVNULL)
        assert killed.returncode == -signal.SIGKILL
        reached += gain
        assert_same_training(demo.training_load(path, plan), whole[reached])
    subprocess.run([sys.executable, "-c", script, str(path), "os", "replace", "99"], check=True, stdout=subprocess.DEVNULL)
    assert_same_training(demo.training_load(path, plan), whole[-1])


def test_the_loss_is_in_bits_per_pixel_and_all_images_count_alike() -> None:
    images = some_images(203)                                       # two full batches of the evaluation and a short one
    state = demo.train_init(TINY, len(images))
    config, params = TINY.config(), state.params
    flat = {name: x * 0 for name, x in params.items()}
    assert demo.bits_per_pixel(flat, images, config) == pytest.approx(math.log2(17), abs=1e-6)     # float32: a rounding of log 17
    digit = images[:, 0] % 10
    for told in (None, digit):
        each = [demo.bits_per_pixel(params, images[i: i + 1], config, None if told is None else told[i: i + 1]) for i in range(203)]
        assert demo.bits_per_pixel(params, images, config, told) == pytest.approx(np.mean(each), abs=1e-5)


@given(at=st.integers(0, demo.PIXELS - 1), seed=st.integers(0, 99))
def test_a_pixel_is_predicted_without_itself_and_what_follows(at: int, seed: int) -> None:
    params = demo.train_init(TINY, 1).params
    image = some_images(1, seed)
    changed = image.copy()
    changed[:, at:] = some_images(1, seed + 1)[:, at:]
    one, other = (demo.transformer_forward(params, demo.shift(x), TINY.config())[0][:, : at + 1] for x in (image, changed))
    np.testing.assert_array_equal(one, other)


def test_the_model_sees_only_the_digits_that_it_is_told() -> None:
    images, digit = some_images(14), np.arange(14) % 10
    state = demo.train_init(TINY, 14)
    told, untold = state.order[:7:2], state.order[1:7:2]
    other = digit.copy()
    other[untold] += 1
    assert_same_training(demo.train_step(state, images, digit, TINY)[0], demo.train_step(state, images, other % 10, TINY)[0])
    other[told] += 1
    one, two = (demo.train_step(state, images, d, TINY)[0].params["token.weight"] for d in (digit, other % 10))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("change", [{"seed": 6}, {"updates": 10}, {"width": 16}])
def test_a_checkpoint_of_another_plan_is_refused_with_words(tmp_path: Path, change: dict[str, int]) -> None:
    demo.training_save(tmp_path / "x", demo.train_init(TINY, 17), TINY)
    (name, value), = change.items()
    words = rf"x: a training with {name} = {getattr(TINY, name)} \(now {value}\); ask for the same, name another folder by --out, or"
    with pytest.raises(ValueError, match=words):
        demo.training_load(tmp_path / "x", TINY._replace(**change))


# --- the data, the baseline, the forms ---------------------------------------------------------------------------------------------------

def test_the_scans_are_whole_and_no_image_is_on_both_sides() -> None:
    from sklearn.datasets import load_digits

    scans, (images, digit) = demo.digits_load(), load_digits(return_X_y=True)
    assert scans.train.shape == (1500, 64) and scans.test.shape == (297, 64)
    everything = np.concatenate([scans.train, scans.test])
    np.testing.assert_array_equal(everything[np.lexsort(everything.T)], images[np.lexsort(images.T)])
    assert sorted(set(scans.test_digit)) == list(range(10))
    for some, digits in ((scans.train[:20], scans.train_digit), (scans.test[:20], scans.test_digit)):
        for image, d in zip(some, digits):
            assert d in digit[(images == image).all(axis=1)]


@given(count=st.integers(0, 5), pixels=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_histogram_is_the_add_one_frequency(count: int, pixels: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, demo.LEVELS, (count, pixels))
    histogram = demo.histogram_fit(images)
    for i in range(pixels):
        for level in range(demo.LEVELS):
            assert histogram[i, level] == ((images[:, i] == level).sum() + 1) / (count + demo.LEVELS)
    np.testing.assert_allclose(histogram.sum(axis=1), 1, rtol=0, atol=17 * 2.0**-53)
    if count:
        by_hand = -sum(math.log2(histogram[i, image[i]]) for image in images for i in range(pixels)) / (count * pixels)
        assert demo.histogram_bits(histogram, images) == pytest.approx(by_hand, rel=1e-12)
        assert demo.histogram_bits(np.stack([histogram] * count), images) == pytest.approx(by_hand, rel=1e-12)


def test_every_form_stays_within_its_bound_and_integers_are_exact() -> None:
    lines = list(demo.agreement(demo.digits_load().train[:3]))
    assert len({line.form for line in lines}) == len(lines) >= 14
    for line in lines:
        assert line.ratio <= 1, line
        assert ("integers" in line.form) == (line.bound == 0)
        assert line.error == 0 or line.bound > 0


@pytest.mark.parametrize("form", ["causal_chunked_forward", "causal_scan_backward", "causal_step", "linear_attention", "softmax_step"])
def test_a_wrong_form_is_found_out(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    right = getattr(demo, form)

    def wrong(*arrays: Any, **options: Any) -> Any:
        found = right(*arrays, **options)
        first = np.array(found[0] if isinstance(found, tuple) else found)
        first.flat[-1] *= 1.001
        return (first, *found[1:]) if isinstance(found, tuple) else first

    monkeypatch.setattr(demo, form, wrong)
    assert max(line.ratio for line in demo.agreement(demo.digits_load().train[:2])) > 1


def test_neighbourhoods_are_the_pixels_around() -> None:
    image = np.arange(64).reshape(8, 8)
    square, cross = demo._neighbourhoods(image.reshape(1, 64))
    np.testing.assert_array_equal(square[0, 0, 9], [0, 1, 2, 8, 9, 10, 16, 17, 18])
    np.testing.assert_array_equal(cross[0, 0, 9], [1, 8, 9, 10, 17])
    np.testing.assert_array_equal(square[0, 1, 8 * 2 + 3][[3, 4, 5]], image[[2, 3, 4], 2])      # head 1 reads columns
    np.testing.assert_array_equal(square[0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 8, 9])


def test_the_model_and_its_recurrent_twin_are_compared_pixel_by_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    params, images, right = demo.train_init(TINY, 1).params, some_images(3), demo.transformer_step
    apart, rounding = demo.twins(params, TINY.config(), images)
    assert rounding > 0
    assert demo.twins({name: x.astype(np.float64) for name, x in params.items()}, TINY.config(), images)[1] == 0

    def late(params: Any, token: Any, state: Any, config: Any) -> Any:
        logits, new = right(params, token, state, config)
        return logits + np.float32(state.position == demo.PIXELS - 1), new

    monkeypatch.setattr(demo, "transformer_step", late)
    assert 1 - 2 * apart <= demo.twins(params, TINY.config(), images)[0] <= 1 + 2 * apart < 1.5


# --- the picture -------------------------------------------------------------------------------------------------------------------------

def test_a_mosaic_shows_every_image_in_its_place() -> None:
    rows = some_images(6).reshape(2, 3, 64).astype(float)
    rows[1, 2, 32:] = np.nan
    picture = demo.mosaic(rows)
    for r in range(2):
        for c in range(3):
            tile, image = picture[9 * r: 9 * r + 8, 9 * c: 9 * c + 8], rows[r, c].reshape(8, 8)
            seen = ~np.isnan(image)
            np.testing.assert_allclose(tile[seen], np.repeat(1 - image[seen][:, None] / 16, 3, axis=1))
            assert (tile[~seen] == (0.93, 0.89, 0.80)).all()
    assert (picture[8] == picture[:, 8, None]).all() and not (picture[8] == picture[8, :, :1]).all()


def test_the_shown_half_is_kept_and_only_the_rest_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(demo, "_figure", lambda path, drawn, completions: kept.update(drawn=drawn, **completions))
    scans = demo.digits_load()
    demo.draw("", demo.train_init(TINY, 1).params, TINY.config(), scans, np.random.default_rng(0), rows=3)
    assert kept["drawn"].shape == (3, 10, 64)
    for digit, image in enumerate(kept["original"]):
        assert digit in scans.test_digit[(scans.test == image).all(axis=1)]
    assert list(kept)[1:] == ["shown half", "completion 1", "completion 2", "completion 3", "original"]
    for name in ("shown half", "completion 1", "completion 3"):
        np.testing.assert_array_equal(kept[name][:, :32], kept["original"][:, :32])
    assert np.isnan(kept["shown half"][:, 32:]).all()
    assert not np.array_equal(kept["completion 1"], kept["completion 2"])


# --- the command -------------------------------------------------------------------------------------------------------------------------

def test_the_smoke_run_does_everything_and_a_second_one_finds_it_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "folder"
    assert demo.main(["--smoke", "--out", str(out)]) == 0
    first, errors = capsys.readouterr()
    assert errors == ""
    for words in ("1,500 to learn from, 297 held out", "uniform: log2 17                        4.087     4.087", "histogram of each pixel",
                  "linear, as an RNN", "softmax, key/value cache", "softmax, recomputed", "12 updates of 20 images"):
        assert words in first
    assert sorted(os.listdir(out)) == ["checkpoint.safetensors", "digits.png"]
    picture = (out / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82")
    assert demo.main(["--smoke", "--out", str(out)]) == 0
    second, _ = capsys.readouterr()
    assert "trained already" in second
    table = first[first.index("   update"): first.index("   trained in")].splitlines()
    assert [line for line in table if line not in second.splitlines()] == []
    assert (out / "digits.png").read_bytes() == picture


def test_an_unfit_folder_is_refused_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert demo.main(["--smoke", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("demo: ")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    assert demo.main(["--smoke", "--out", str(tmp_path)]) == 1
    assert "expected a whole checkpoint of refattn" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == b"torn"


def test_an_interrupt_keeps_what_was_learnt_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    right, calls = demo.bits_per_pixel, []

    def interrupted(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 4:                                          # the second half of the second row of the table
            raise KeyboardInterrupt
        return right(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "bits_per_pixel", interrupted)
        assert demo.main(["--smoke", "--out", str(tmp_path / "a")]) == 130
    assert f"the same command goes on from {tmp_path / 'a'}" in capsys.readouterr().err
    plan = Plan(0, updates=12, batch=20, warm_up=2, width=16, heads=2, layers=2)
    scans, paths = demo.digits_load(), [tmp_path / name / "checkpoint.safetensors" for name in "ab"]
    state = demo.training_load(paths[0], plan)
    assert (state.update, [row["update"] for row in state.history]) == (2, [2])
    paths[1].parent.mkdir()
    one, other = (demo.train(path, plan, scans, start) for path, start in zip(paths, (state, demo.train_init(plan, len(scans.train)))))
    assert_same_training(one, other)
    assert [row | {"seconds": 0} for row in one.history] == [row | {"seconds": 0} for row in other.history]


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--minutes", "soon"], ["--seed", "-1"], ["--bogus"]])
def test_arguments_that_mean_nothing_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        demo.main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m refattn demo")


def test_minutes_are_updates_and_a_fixed_number_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(demo, "demo", lambda out, path, plan, scans, start, few: plans.append(plan))
    for minutes in ("2", "0.5", "1e-9"):
        assert demo.main(["--minutes", minutes, "--out", str(tmp_path)]) == 0
    per = demo.UPDATES_PER_MINUTE
    assert [plan.updates for plan in plans] == [2 * per, round(per / 2), 1]


@pytest.mark.parametrize("module, package", sorted(demo.EXTRAS.items()))
def test_a_missing_extra_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"this needs {package}, which is not installed; install it with: pip install 'refattn\[demo\]'"):
        demo.main(["--smoke", "--out", str(tmp_path / "out")])
    assert os.listdir(tmp_path) == []
