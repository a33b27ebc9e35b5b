"""Laws of the demo: an interruption changes nothing, a pixel never sees itself, and the numbers it prints are what they say."""
from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import demo, experiment
from refattn.demo import Plan, Training
from refattn.testing.laws import law_equal_bits

TINY = Plan(seed=5, updates=9, batch=7, warm_up=2, width=8, heads=2, layers=1)


def some_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, demo.LEVELS, (count, demo.PIXELS))


def after(state: Training, updates: int, images: np.ndarray, plan: Plan = TINY) -> Training:
    for _ in range(updates):
        state = experiment.train_step(state, demo.digits_task(plan, images, images[:, 0] % 10))
    return state


def begin(plan: Plan = TINY) -> Training:
    return experiment.training_init(demo.params_init(plan))


# --- training ----------------------------------------------------------------------------------------------------------------------------

def test_every_image_has_its_turn_once_an_epoch() -> None:
    images = some_images(21)
    task = demo.digits_task(TINY, images, images[:, 0] % 10)
    for epoch in (range(3), range(3, 6)):
        seen = np.concatenate([task.batch(update)[0] for update in epoch])
        np.testing.assert_array_equal(seen[np.lexsort(seen.T)], images[np.lexsort(images.T)])


def test_another_seed_gives_other_weights_and_another_order() -> None:
    plans, images = (TINY, TINY._replace(seed=6)), some_images(21)
    a, b = (demo.params_init(plan) for plan in plans)
    assert not np.array_equal(a["head.weight"], b["head.weight"])
    a, b = (demo.digits_task(plan, images, images[:, 0] % 10).batch(0)[0] for plan in plans)
    assert not np.array_equal(a, b)


def test_the_model_learns_one_image_by_heart() -> None:
    images = np.repeat(some_images(1), 7, axis=0)
    plan = TINY._replace(updates=100, learning_rate=3e-2, weight_decay=0.0)
    state = after(begin(plan), 100, images, plan)
    assert demo.bits_per_pixel(state.params, images, plan.config()) < math.log2(17) / 2


def test_the_loss_is_in_bits_per_pixel_and_all_images_count_alike() -> None:
    images = some_images(203)                                       # two full batches of the evaluation and a short one
    config, params = TINY.config(), demo.params_init(TINY)
    flat = {name: x * 0 for name, x in params.items()}
    assert demo.bits_per_pixel(flat, images, config) == pytest.approx(math.log2(17), abs=1e-6)     # float32: a rounding of log 17
    digit = images[:, 0] % 10
    for told in (None, digit):
        each = [demo.bits_per_pixel(params, images[i: i + 1], config, None if told is None else told[i: i + 1]) for i in range(203)]
        assert demo.bits_per_pixel(params, images, config, told) == pytest.approx(np.mean(each), abs=1e-5)


@given(at=st.integers(0, demo.PIXELS - 1), seed=st.integers(0, 99))
def test_a_pixel_is_predicted_without_itself_and_what_follows(at: int, seed: int) -> None:
    params = demo.params_init(TINY)
    image = some_images(1, seed)
    changed = image.copy()
    changed[:, at:] = some_images(1, seed + 1)[:, at:]
    one, other = (demo.transformer_forward(params, demo.shift(x), TINY.config())[0][:, : at + 1] for x in (image, changed))
    np.testing.assert_array_equal(one, other)


def test_the_model_sees_only_the_digits_that_it_is_told() -> None:
    images, digit = np.repeat(np.arange(14)[:, None], demo.PIXELS, 1), np.arange(14) % 10
    chosen, told = demo.digits_task(TINY, images, digit).batch(0)
    np.testing.assert_array_equal(told[::2], digit[chosen[::2, 0]])
    np.testing.assert_array_equal(told[1::2], demo.ANY)


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
    params, images, right = demo.params_init(TINY), some_images(3), demo.transformer_step
    apart, rounding = demo.twins(params, TINY.config(), images)
    assert rounding > 0
    assert demo.twins({name: x.astype(np.float64) for name, x in params.items()}, TINY.config(), images)[1] == 0

    def late(params: Any, token: Any, state: Any, config: Any) -> Any:
        logits, new = right(params, token, state, config)
        return logits + np.float32(state.position == demo.PIXELS - 1), new

    monkeypatch.setattr(demo, "transformer_step", late)
    assert 1 - 2 * apart <= demo.twins(params, TINY.config(), images)[0] <= 1 + 2 * apart < 1.5


# --- the picture -------------------------------------------------------------------------------------------------------------------------

def test_the_shown_half_is_kept_and_only_the_rest_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(demo, "_figure", lambda path, drawn, completions: kept.update(drawn=drawn, **completions))
    scans = demo.digits_load()
    demo.draw("", demo.params_init(TINY), TINY.config(), scans, np.random.default_rng(0), rows=3)
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
    state = experiment.training_load(paths[0], demo.digits_task(plan, scans.train, scans.train_digit))
    assert (state.update, [row["update"] for row in state.history]) == (2, [2])
    paths[1].parent.mkdir()
    one, other = (demo.train_digits(path, plan, scans, start) for path, start in zip(paths, (state, begin(plan))))
    law_equal_bits({"interrupted": list(one.params.values()), "in one": list(other.params.values())})
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
