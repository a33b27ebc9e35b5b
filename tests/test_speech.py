"""The speech experiment, examples/06_speech.py: what is learnt from, what is learnt, and what the script leaves behind."""
from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import experiment
from refattn.testing import budgets

FILE = str(Path(__file__).parent.parent / "examples" / "06_speech.py")
SPEECH = runpy.run_path(FILE)
SYSTEMS = SPEECH["SYSTEMS"]
seeds = st.integers(0, 2**32 - 1)
needs_rapidfuzz = pytest.mark.skipif(importlib.util.find_spec("rapidfuzz") is None, reason="the phoneme error rate needs rapidfuzz, extra speech")


def made_up(count: int = 40) -> Any:
    return SPEECH["normalised"](SPEECH["corpus_made_up"](count))


def task_of(system: str, corpus: Any, updates: int = 8, seed: int = 3) -> Any:
    return SPEECH["speech_task"](system, "smoke", corpus, {"seed": seed}, updates)


def params_of(system: str, corpus: Any, dtype: Any = np.float32) -> Any:
    params = SPEECH["model_of"](system, "smoke", corpus.phonemes + 1).init(np.random.default_rng(0))
    return {key: p.astype(dtype) for key, p in params.items()}


# --- the command -----------------------------------------------------------------------------------------------------------------------------

@needs_rapidfuzz
def test_the_command_trains_goes_on_and_tells(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "safetensors", "tqdm"):
        pytest.importorskip(module)

    def run(*options: str) -> list[list[str]]:
        monkeypatch.setattr("sys.argv", [FILE, "--smoke", "--seed", "3", "--out", str(tmp_path / "out"), *options])
        runpy.run_path(FILE, run_name="__main__")
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    first = run(*(word for system in SYSTEMS for word in ("--system", system)))
    again = run("--system", "bilstm")
    assert first[0][:7] == "made-up-speech: 36 utterances to learn from, 4".split() and first[0][-3:] == ["--data,", "real", "speech"]
    assert again[1][:6] == ["bilstm:", "5,161", "weights,", "from", "update", "8"]
    assert (tmp_path / "out" / "smoke-made-up-speech.png").read_bytes().startswith(b"\x89PNG")
    table = first[-6:-2]
    assert [row[0] for row in table] == list(SYSTEMS)
    for row, repeated in zip(table, again[-6:-2], strict=True):
        assert row[:4] + row[6:] == repeated[:4] + repeated[6:]                  # all but the seconds of one more epoch
        r = json.loads((tmp_path / "out" / f"smoke-made-up-speech-{row[0]}.json").read_text())
        assert row[1:3] == [f"{r['weights']:,}", "2.0"] and row[6:] == [f"{r['loss']:.3f}", f"{r['test loss']:.3f}", f"{r['greedy']:.2%}",
                                                                     f"{r['beam']:.2%}"]
        assert repeated[4:6] == [f"{r['epoch']['processor']:.1f}", f"{r['epoch']['wall']:.1f}"]
        assert [(point["update"], point["greedy"] > 0) for point in r["history"]] == [(4, True), (8, True)]
        assert all(r["history"][-1][key] == r[key] for key in ("loss", "test loss", "greedy"))


def test_a_number_of_epochs_is_positive(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [FILE, "--epochs", "0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(FILE, run_name="__main__")
    assert end.value.code == 2 and "--epochs: expected a positive number of epochs, got 0" in capsys.readouterr().err


def test_a_missing_extra_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "safetensors", "tqdm"):
        pytest.importorskip(module)
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    monkeypatch.setattr("sys.argv", [FILE, "--smoke"])
    with pytest.raises(ImportError, match=r"needs rapidfuzz, .* pip install 'refattn\[speech\]'"):
        runpy.run_path(FILE, run_name="__main__")


# --- what is learnt from ---------------------------------------------------------------------------------------------------------------------

@given(seeds, st.integers(1, 400), st.integers(6, 40))
def test_what_is_hidden_is_two_spans_of_each_and_the_rest_is_as_it_was(seed: int, n: int, bands: int) -> None:
    rng = np.random.default_rng(seed)
    frames = rng.uniform(1.0, 2.0, (n, bands))
    frames.flags.writeable = False
    out = SPEECH["masked"](frames, rng)
    hidden = [(out == 0).all(1), (out == 0).all(0)]
    np.testing.assert_array_equal(out, np.where(hidden[0][:, None] | hidden[1], 0, frames))
    for gone in hidden:
        starts = np.flatnonzero(np.diff(gone, prepend=False) & gone)
        assert len(starts) <= 2 and gone.sum() <= 2 * min(len(gone) // 6, 30)


def test_all_that_may_be_hidden_is_hidden_at_some_time() -> None:
    """And two spans of 0 to a sixth hide from nothing to a third, more than 30 not being a span."""
    rng = np.random.default_rng(0)
    for shape in ((30, 12), (400, 12)):
        gone, counts = np.zeros(shape, bool), (set(), set())
        for _ in range(4000):
            out = SPEECH["masked"](np.ones(shape), rng)
            gone |= out == 0
            for axis, found in zip((1, 0), counts, strict=True):
                found.add(int((out == 0).all(axis).sum()))
        assert gone.all() and counts == tuple(set(range(2 * min(n // 6, 30) + 1)) for n in shape)


@given(seeds, st.integers(1, 3))
def test_positions_are_frames_side_by_side(seed: int, together: int) -> None:
    corpus, rng = made_up(), np.random.default_rng(seed)
    chosen = rng.choice(40, 5, replace=False)
    x, lengths, labels, counts = SPEECH["utterances"](corpus, chosen, together)
    assert x.dtype == np.float32 and x.shape == (5, lengths.max(), 40 * together) and labels.shape == (5, counts.max())
    for i, row, length, said, count in zip(chosen, x, lengths, labels, counts, strict=True):
        assert length == len(corpus.frames[i]) // together and said[:count].tolist() == corpus.labels[i].tolist()
        np.testing.assert_array_equal(row[:length].reshape(-1, 40), corpus.frames[i][: length * together])
        assert not row[length:].any() and not said[count:].any()


def test_in_training_they_start_up_to_two_frames_late_and_parts_are_hidden() -> None:
    corpus, rng, late = made_up(), np.random.default_rng(0), []
    for i in range(40):
        (row,), (length,), *_ = SPEECH["utterances"](corpus, np.array([i]), 3, rng)
        frames, seen = corpus.frames[i], row.reshape(-1, 40)
        as_it_was = [start for start in range(3) if start + 3 * length <= len(frames)
                     and ((seen == frames[start: start + 3 * length]) | (seen == 0)).all()]
        late += as_it_was
        assert len(as_it_was) == 1 and length == (len(frames) - as_it_was[0]) // 3
    assert set(late) == {0, 1, 2}


def test_an_update_is_a_function_of_its_number() -> None:
    task = task_of("lsh-4", made_up())
    (*one, rng), (*other, _), (*third, _) = (task.batch(i) for i in (4, 4, 5))
    assert all((a == b).all() for a, b in zip(one, other, strict=True)) and any(a.shape != b.shape or (a != b).any() for a, b in zip(one, third))
    params = params_of("lsh-4", made_up())
    grads = [task.loss_and_grads(params, task.batch(4))[1] for _ in range(2)]
    assert all((grads[0][key] == grads[1][key]).all() for key in params)
    one = made_up()._replace(frames=[made_up().frames[0]] * 40, labels=[made_up().labels[0]] * 40)
    a, b = (task_of("linear", one).batch(i)[0][:, :20] for i in (4, 5))          # the same utterances, but other parts of them are hidden
    assert (a != b).any()
    lengths = [task.batch(i)[1] for i in range(4)]
    assert max(n.max() / n.min() for n in lengths) < 2 < max(n.max() for n in lengths) / min(n.min() for n in lengths)


def test_bands_are_normalised_by_what_there_is_to_learn_from() -> None:
    raw = SPEECH["corpus_made_up"](40)
    other = raw._replace(frames=[9 + 5 * x if test else x for x, test in zip(raw.frames, raw.test, strict=True)])
    (a, b), known = (SPEECH["normalised"](corpus) for corpus in (raw, other)), ~raw.test
    assert raw.test.tolist() == [i % 10 == 0 for i in range(40)]
    for i in range(40):
        assert (a.frames[i] == b.frames[i]).all() == known[i]
    seen = np.concatenate([a.frames[i] for i in np.flatnonzero(known)]).astype(float)
    # in float32: x and the mean, each rounded once and up to 9 of both; the deviation; a subtraction and a division
    budgets.assert_within(seen.mean(0), np.zeros(40), budgets.gamma(4, np.float32) * 9)
    budgets.assert_within(seen.std(0), np.ones(40), budgets.gamma(4, np.float32) * 9)


def test_no_phoneme_comes_twice_in_a_row_and_all_come() -> None:
    corpus = SPEECH["corpus_made_up"](40)
    assert {int(c) for said in corpus.labels for c in said} == set(range(1, 11)) and corpus.phonemes == 10
    for x, said in zip(corpus.frames, corpus.labels, strict=True):
        assert 5 <= len(said) <= 15 and (said[1:] != said[:-1]).all() and 4 * len(said) <= len(x) <= 12 * len(said)


# --- real speech -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("marked", [True, False])
def test_a_corpus_is_read_from_its_file(tmp_path: Path, rng: np.random.Generator, marked: bool) -> None:
    count, feat = 12, rng.integers(0, 99, (200, 40)).astype(np.uint8)
    offsets, places = (np.r_[0, np.sort(rng.choice(np.arange(1, n), count - 1, replace=False)), n] for n in (200, 60))
    ids, test = rng.integers(0, 3, 60).astype(np.uint8), rng.integers(0, 2, count).astype(bool)
    np.savez(tmp_path / "an4_logmel.npz", feat=feat, feat_step=np.float32([0.25]), feat_min=np.float32([-18.5]), frame_offsets=offsets,
             phone_ids=ids, phone_offsets=places, phones=np.array(["A", "B", "T"]), text=np.array(["?"] * count), utt=np.array(["?"] * count),
             **({"is_test": test} if marked else {}))
    corpus = SPEECH["corpus_load"](str(tmp_path), "an4")
    assert (corpus.name, corpus.phonemes, corpus.test.tolist()) == ("an4", 3, test.tolist() if marked else [i % 10 == 0 for i in range(count)])
    for i in range(count):
        assert corpus.frames[i].dtype == np.float32 and corpus.labels[i].dtype.kind == "i"
        np.testing.assert_array_equal(corpus.frames[i], feat[offsets[i]: offsets[i + 1]] / 4 - 18.5)
        np.testing.assert_array_equal(corpus.labels[i], ids[places[i]: places[i + 1]] + 1.0)
    assert [len(part.frames) for part in map(corpus.part, (False, True))] == [(~corpus.test).sum(), corpus.test.sum()]


@pytest.mark.skipif(not os.environ.get("REFATTN_DATA"), reason="reads real speech from the folder that REFATTN_DATA names, which it does not")
@pytest.mark.parametrize(("name", "known", "unseen", "phonemes"), [("an4", 948, 130, 33), ("kathleen", 992, 111, 39)])
def test_real_speech_has_frames_enough_for_its_phonemes(name: str, known: int, unseen: int, phonemes: int) -> None:
    corpus = SPEECH["normalised"](SPEECH["corpus_load"](os.environ["REFATTN_DATA"], name))
    assert ((~corpus.test).sum(), corpus.test.sum(), corpus.phonemes) == (known, unseen, phonemes)
    assert {int(c) for said in corpus.labels for c in said} == set(range(1, phonemes + 1))
    for x, said in zip(corpus.frames, corpus.labels, strict=True):
        assert (len(x) - 2) // 3 >= len(said) + (said[1:] == said[:-1]).sum() and np.isfinite(x).all()
    task = task_of("linear", corpus)
    loss, _ = task.loss_and_grads(params_of("linear", corpus), task.batch(0))
    assert 1 < loss < 100


# --- what is learnt --------------------------------------------------------------------------------------------------------------------------

def test_the_loss_is_nats_a_phoneme_whatever_stands_in_padding() -> None:
    corpus = made_up()
    for system in SYSTEMS:
        params, model = params_of(system, corpus, np.float64), SPEECH["model_of"](system, "smoke", 11)
        x, lengths, labels, counts = SPEECH["utterances"](corpus, np.arange(6), 3)
        x = x.astype(float)
        x[np.arange(x.shape[1]) >= lengths[:, None]] = np.nan
        labels[np.arange(labels.shape[1]) >= counts[:, None]] = -1
        loss, back, logits, residuals = SPEECH["read"](params, model, x, lengths, labels, counts, np.random.default_rng(0))
        nats = [SPEECH["ctc_forward"](y[None, :n], said[None, :c])[0] for y, n, said, c in zip(logits, lengths, labels, counts, strict=True)]
        # the same recursion in another shape: up to 2·N roundings of sums of N log-probabilities
        assert abs(loss - sum(nats) / counts.sum()) <= budgets.gamma(4 * x.shape[1] ** 2, "float64") * loss
        grads = model.backward(SPEECH["ctc_backward"](*back), residuals)
        assert all(np.isfinite(g).all() for g in grads.values()) and grads.keys() == params.keys()


def test_the_rate_rises_to_a_thousandth_and_falls_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = task_of("linear", made_up(), updates=1000).optimize
    monkeypatch.setitem(optimize.__globals__, "adam_step", lambda params, grads, slots, learning_rate: (grads["w"].tolist(), learning_rate))
    rates = [optimize({}, {"w": np.array([3.0, 4.0])}, None, update) for update in range(1001)]
    assert rates[0] == ([0.6000000000000001, 0.8], 1e-3 / 200) and rates[-1][1] == 0 and rates[500][1] == pytest.approx(5e-4, rel=1e-15)
    assert np.argmax([rate for _, rate in rates]) == 199 and all((a[1] > b[1]) == (i >= 199) for i, (a, b) in enumerate(zip(rates, rates[1:])))


@pytest.mark.parametrize("system", ["linear", "softmax", "bilstm"])
def test_the_gradient_of_an_update_is_that_of_its_loss(system: str) -> None:
    """By central differences. They are off by a curvature, of which D(h) - D(2h) shows three times as much, and by the roundings of their two
    ends: sums of fewer than a thousand terms, one after another."""
    corpus = made_up()
    params, rng = params_of(system, corpus, np.float64), np.random.default_rng(1)
    x, lengths, labels, counts = SPEECH["utterances"](corpus, np.arange(5), 3)
    task, slope, h = task_of(system, corpus), {}, 1e-5
    along = {key: rng.standard_normal(p.shape) for key, p in params.items()}
    at = lambda params: task.loss_and_grads(params, (x.astype(float), lengths, labels, counts, np.random.default_rng(0)))
    loss, grads = at(params)
    for step in (h, 2 * h):
        ahead, behind = (at({key: p + side * along[key] for key, p in params.items()})[0] for side in (step, -step))
        slope[step] = (ahead - behind) / (2 * step)
    found = sum(float((grads[key] * along[key]).sum()) for key in params)
    roundings = budgets.gamma(1000, "float64") * loss / h
    assert abs(found - slope[h]) <= abs(slope[h] - slope[2 * h]) + roundings < 1e-4 * abs(found)
    for key, g in grads.items():                                                 # and none of them was left out of the sum
        assert g.shape == params[key].shape and np.abs(g * along[key]).sum() > 0 or key.endswith("key.bias"), key


@needs_rapidfuzz
def test_a_model_that_knows_the_answer_makes_no_errors_and_one_wrong_phoneme_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = made_up(200)
    test, total = SPEECH["speech_test"], sum(len(said) for said in corpus.part(True).labels)
    for wrong in (0, 1):
        left = wrong

        def known(params: Any, model: Any, x: Any, lengths: Any, labels: np.ndarray, counts: np.ndarray, rng: Any) -> tuple:
            nonlocal left
            said = labels.copy()
            if left:
                said[0, 0], left = said[0, 0] % 10 + 1 if said[0, 0] % 10 + 1 != said[0, 1] else (said[0, 0] + 1) % 10 + 1, 0
            path = np.zeros((len(x), x.shape[1]), int)
            path[:, :labels.shape[1]] = np.where(np.arange(labels.shape[1]) < counts[:, None], said, 0)
            path[np.arange(x.shape[1]) >= lengths[:, None]] = 5                  # which no one has said
            return 2.0, None, 99.0 * np.eye(11)[path], None

        monkeypatch.setitem(test.__globals__, "read", known)
        row = test({}, "linear", "smoke", corpus, greedy=SPEECH["ctc_greedy_decode"], beam=SPEECH["ctc_beam_decode"])
        assert row == {"test loss": 2.0, "greedy": wrong / total, "beam": wrong / total}


@needs_rapidfuzz
@pytest.mark.parametrize("system", SYSTEMS)
def test_made_up_phonemes_are_learnt(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPEECH["SCALES"], "smoke", (3, 32, 4, 1, 24, 1))
    monkeypatch.setitem(SPEECH["speech_task"].__globals__, "RATE", 1e-2)
    monkeypatch.setitem(SPEECH["speech_task"].__globals__, "WARM_UP", 20)
    corpus = made_up(200)
    task = task_of(system, corpus, updates=150)
    state = experiment.training_init(params_of(system, corpus))
    for _ in range(150):
        state = experiment.train_step(state, task)
    found = SPEECH["speech_test"](state.params, system, "smoke", corpus, greedy=SPEECH["ctc_greedy_decode"])
    assert found["greedy"] < 0.5, found                                          # 0.9 is what the blank and the likeliest phoneme would give
