"""Laws of two experiments: time and memory against the length, and the character model."""
from __future__ import annotations

import gzip
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import experiment
from refattn._blocks import BUFFER_BYTES
from refattn.generate import generate
from refattn.testing import budgets
from refattn.transformer import transformer_init

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows does not tell the peak of memory")
EXAMPLES = Path(__file__).parent.parent / "examples"
SCALING, TEXT = (str(EXAMPLES / name) for name in ("07_time_and_memory.py", "08_text.py"))
Run = Callable[..., list[list[str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script at its smallest size and gives the words of what it prints."""
    for module in ("matplotlib", "safetensors", "tqdm"):
        pytest.importorskip(module)

    def runs(file: str, *options: str, **instead: Any) -> list[list[str]]:
        monkeypatch.setattr("sys.argv", [file, "--smoke", "--out", str(tmp_path / "out"), *options])
        main = runpy.run_path(file)["main"]
        main.__globals__.update(instead)
        main()
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    return runs


# --- time and memory against the length --------------------------------------------------------------------------------------------------

def test_points_are_measured_once_and_shown_as_measured(run: Run, tmp_path: Path) -> None:
    path, calls = tmp_path / "out" / "smoke.json", []

    def counted(*arguments: str) -> Any:
        calls.append(arguments[-2:])
        return experiment.run_apart(*arguments)

    first = run(SCALING, run_apart=counted)
    results = json.loads(path.read_text())
    systems = ("linear", "softmax", "lsh-1", "lsh-4")
    assert calls == [(system, N) for system in systems for N in ("256", "512")]
    assert (tmp_path / "out" / "smoke.png").read_bytes().startswith(b"\x89PNG")
    for N, time, memory in (("256", 3, 9), ("512", 4, 10)):
        points = [results["points"][system][N] for system in systems]
        assert first[time] == [N, *(f"{1e3 * point['seconds']:,.2f}" for point in points)]
        assert first[memory] == [N, *(f"{point['bytes'] / 2**20:,.2f}" for point in points)]
        # the forward keeps x, q, k, v (or x, v), what attention gave, and the backward gives as many: 4 bytes each, 64 wide
        assert all(6 * 64 * 4 * int(N) < point["bytes"] < 60 * 64 * 4 * int(N) and point["seconds"] > 0 for point in points)
    del results["points"]["softmax"]["512"]
    experiment.results_save(path, results)
    again = run(SCALING, run_apart=counted)
    assert calls[8:] == [("softmax", "512")] and [row[:2] + row[3:] for row in again[3:5]] == [row[:2] + row[3:] for row in first[3:5]]
    with pytest.raises(ValueError, match=r"smoke.json: measurements with seed = 0 \(now 1\); ask for the same, name another folder"):
        run(SCALING, "--seed", "1")


def test_what_would_take_too_long_is_left_out_and_said(run: Run, tmp_path: Path) -> None:
    """Softmax with a pass of N/1000 seconds, whatever the batch; one minute allows a pass of 32,768 positions, and not that of twice as many."""
    lengths = tuple(2**i for i in range(9, 17))

    def claimed(*arguments: str) -> Any:
        system, N = arguments[-2], int(arguments[-1])
        return {"seconds": (N / 1000 if system == "softmax" else 1.0) / (2**16 // N), "bytes": 100.0 * N, "passes": 1}

    scales = {"smoke": (2**16, lengths, 8, 2)}
    words = run(SCALING, "--minutes", "1", run_apart=claimed, SCALES=scales)
    results = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert [len(results["points"][system]) for system in ("linear", "softmax", "lsh-1", "lsh-4")] == [8, 7, 8, 8]
    assert words[10] == ["65536", "1,000.00", "–", "1,000.00", "1,000.00"] and words[11] == ["slope", "1.00", "2.00", "1.00", "1.00"]
    assert "softmax: N = 65536 left out, where one pass would take longer".split() in [row[:12] for row in words]
    assert len(json.loads((tmp_path / "out" / "smoke.json").read_text())["points"]["softmax"]) == 7
    run(SCALING, "--minutes", "2", run_apart=claimed, SCALES=scales)
    assert len(json.loads((tmp_path / "out" / "smoke.json").read_text())["points"]["softmax"]) == 8


def test_the_slope_of_a_power_is_its_exponent() -> None:
    slope, lengths = runpy.run_path(SCALING)["slope"], tuple(2**i for i in range(9, 17))
    for exponent in (-1.0, 0.5, 2.0):
        points = {str(N): {"bytes": 3.0 * N**exponent if N >= 2**13 else 1e9} for N in lengths}           # the shorter half does not count
        assert abs(slope(lengths, points, "bytes") - exponent) < budgets.gamma(1000, np.float64)
        assert slope(lengths, {N: row for N, row in points.items() if int(N) <= 2**13}, "bytes") is None


AGREE = """
import runpy, sys, tracemalloc
names = runpy.run_path(sys.argv[1])
if sys.argv[2] == "traced":
    tracemalloc.start()
    names["measure"].__globals__["peak_bytes"] = lambda: tracemalloc.get_traced_memory()[1]
names["measure"].__globals__.update(PASSES=1, SCALES={"smoke": (2**15, None, 64, 2)})
print(names["measure"](sys.argv[3], 2**11, "smoke", 0)["bytes"])
"""


@pytest.mark.parametrize("system", ["linear", "softmax", "lsh-1"])
def test_the_operating_system_and_the_allocator_agree_on_the_peak(system: str) -> None:
    """What is resident is what NumPy asked for, but for buffers that a thread keeps or does not fill."""
    resident, traced = (16 * float(subprocess.run([sys.executable, "-c", AGREE, SCALING, how, system], check=True, stdout=subprocess.PIPE,
                                                  env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}).stdout) for how in ("resident", "traced"))
    assert abs(resident - traced) < 4 * BUFFER_BYTES < traced / 4


# --- the character model -----------------------------------------------------------------------------------------------------------------

def test_08_text(run: Run, tmp_path: Path) -> None:
    first = run(TEXT, "--seed", "3", "--characters", "320")
    out = tmp_path / "out"
    results = {system: json.loads((out / f"smoke-{system}.json").read_text()) for system in ("linear", "softmax")}
    assert first[0][1:5] == ["characters", "of", "invented", "sentences;"]
    rows = {row[0]: row for row in first[3:] if row[:1] in (["linear"], ["softmax"])}
    for system, r in results.items():
        assert rows[system][1] == "50" and rows[system][5:] == [f"{r['bits']:.4f}", f"{r['restarted']:.4f}"]
        assert rows[system][4] == f"{r['loss'] / math.log(2):.4f}"
        assert [point["update"] for point in r["history"]] == [25, 50]
        assert [along[-1][0] for along in r["along"]] == ([256, len(held_out(3)) - 1] if system == "linear" else [256])
    # as many characters as were asked for, all of them the model's, and time and memory for each part of them
    drawn = results["linear"]["drawn"] | results["softmax"]["drawn"]
    for how, count in (("linear", 320), ("restarted", 320), ("softmax", 64)):
        text = (out / f"smoke-{how}.txt").read_text()
        assert len(text) == count and set(text) <= set(results["linear"]["plan"]["characters"])
        assert [row["position"] for row in drawn[how]] == list(range(32, count + 1, 32))
        assert all(row["seconds"] > 0 and abs(row["bytes"]) < 2**23 for row in drawn[how])
    for name in ("smoke-bits.png", "smoke-drawing.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    # what is done is not done again; one seed gives one text
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.txt")}
    assert run(TEXT, "--seed", "3", "--characters", "320")[4:] == first[4:]
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.txt")} == before
    text = (out / "smoke-linear.txt").read_text()
    (out / "smoke-linear.json").unlink()
    run(TEXT, "--seed", "3", "--characters", "320", "--system", "linear")
    assert (out / "smoke-linear.txt").read_text() == text


def names() -> dict[str, Any]:
    return runpy.run_path(TEXT)


def held_out(seed: int) -> np.ndarray:
    of = names()
    return of["text_task"]("linear", "smoke", seed, of["text_read"](None, seed, "smoke"))[2]


def test_the_last_tenth_is_never_learnt() -> None:
    task, config, rest = names()["text_task"]("linear", "smoke", 0, "ab" * 450 + "c" * 100)
    assert config.vocabulary == 3 and rest.tolist() == [2] * 100
    batches = np.stack([task.batch(update) for update in range(100)])
    assert batches.shape == (100, 4, 17) and set(batches.ravel().tolist()) == {0, 1}
    assert (batches[..., 1:] != batches[..., :-1]).all()                          # windows of the text as it stands
    assert (task.batch(7) == batches[7]).all() and (task.batch(8) != task.batch(7)).any()
    with pytest.raises(SystemExit, match="the text has 300 characters; expected more than 320, so that a tenth has two windows of 16"):
        names()["text_task"]("linear", "smoke", 0, "abc" * 100)


@pytest.mark.parametrize("behind", [1, 8, 16])
def test_bits_are_those_of_every_character_that_counts_once(behind: int) -> None:
    """Against the definition, with a model whose prediction depends on all that a window has before a character."""
    of = names()
    tokens, L, V = np.random.default_rng(0).integers(0, 5, 16 * 41 + 5), 16, 5
    config = of["text_task"]("linear", "smoke", 0, "abcde" * 200)[1]
    size = []

    def model(params: Any, inputs: np.ndarray, config: Any) -> tuple[np.ndarray, None]:
        size.append(inputs.shape)
        seen = np.cumsum(inputs, -1)[..., None] * np.arange(1, V + 1)
        return np.sin(seen + np.arange(inputs.shape[-1])[:, None]), None

    of["held_out_bits"].__globals__["transformer_prefill"] = model

    def missing(start: int, at: int) -> float:
        """Bits that token `at` takes, all tokens from `start` on being known."""
        x = model(None, tokens[None, start:at], config)[0][0, -1]
        return float(np.log2(np.exp(x).sum()) - x[tokens[at]] / math.log(2))

    scored = [(start, at) for start in range(0, len(tokens) - L, L + 1 - behind) for at in range(start + behind, start + L + 1)]
    assert [at for _, at in scored] == list(range(behind, scored[-1][1] + 1))     # each once
    expected = np.mean([missing(*pair) for pair in scored])
    # V exponentials, a logarithm, and sums of them all; none of the terms is larger than log2 V + 2/ln 2
    allowed = budgets.gamma(4 * V + len(scored), np.float64) * 6
    weights = {"w": np.ones(1)}
    assert abs(of["held_out_bits"](weights, config, tokens, behind=behind) - expected) <= allowed
    some = [pair for i, pair in enumerate(scored) if i // (L + 1 - behind) % 3 == 0]
    count = len(scored) // (L + 1 - behind)
    of_some = of["held_out_bits"](weights, config, tokens, behind=behind, most=-(-count // 3))
    assert abs(of_some - np.mean([missing(*pair) for pair in some])) <= allowed
    # along sequences of 100: 16 characters, 16 more, 32 more, 36 more
    along = of["bits_along"](weights, config, tokens, 100)
    assert [end for end, _ in along] == [16, 32, 64, 100]
    for begin, (end, value) in zip((0, 16, 32, 64), along, strict=True):
        terms = [missing(start, start + j) for start in range(0, 600, 100) for j in range(begin + 1, end + 1)]
        assert abs(value - np.mean(terms)) <= allowed
    assert max(shape[0] for shape in size) <= 32


def test_a_restarted_text_has_always_read_the_last_few_characters() -> None:
    of = names()
    config = of["text_task"]("linear", "smoke", 0, "abcde" * 200)[1]
    params = transformer_init(np.random.default_rng(0), config, np.float64)
    prompt, rng = np.array([[0, 1, 2]]), np.random.default_rng(5)
    stream = of["restarted"](params, config, prompt, np.random.default_rng(5), temperature=0.7)
    text = [0, 1, 2, *(int(next(stream)[0]) for _ in range(14))]
    for start in range(0, 15, 3):
        part = generate(params, config, np.array([text[start: start + 3]]), 3, rng, temperature=0.7)[0, 3:]
        assert part.tolist()[: len(text[start + 3: start + 6])] == text[start + 3: start + 6]


def test_invented_sentences_agree() -> None:
    of = names()
    text = of["invented"](np.random.default_rng(0), 20_000)
    assert len(text) >= 20_000 and text == of["invented"](np.random.default_rng(0), 20_000) != of["invented"](np.random.default_rng(1), 20_000)
    assert not re.search("[A-Z]", text) and len(set(text)) < 32
    nouns, see = "|".join(of["GRAMMAR"]["NOUN"]), "|".join(of["GRAMMAR"]["SEE"])
    for clause in re.findall(rf"the (?:\w+ )?({nouns})(s?) that ({see})(s?)\b", text):
        assert (clause[1] == "s") != (clause[3] == "s")
    for clause in re.findall(rf"(?:^|, |(?:when|because|until) )the (?:\w+ )?({nouns})(s?) ({see})(s?)\b", text, re.M):
        assert (clause[1] == "s") != (clause[3] == "s")


def test_a_text_is_read_compressed_or_not(tmp_path: Path) -> None:
    read, text = names()["text_read"], "Où est la forêt ?\n" * 3
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert read(str(tmp_path / "a.txt"), 0, "small") == read(str(tmp_path / "a.txt.gz"), 0, "small") == text


@pytest.mark.skipif("REFATTN_DATA" not in os.environ, reason="REFATTN_DATA names no folder with real data")
def test_tiny_shakespeare() -> None:
    of = names()
    text = of["text_read"](os.path.join(os.environ["REFATTN_DATA"], "tinyshakespeare.txt.gz"), 0, "small")
    task, config, rest = of["text_task"]("softmax", "small", 0, text)
    assert (len(text), config.vocabulary, len(rest)) == (1_115_394, 65, 111_539)
    assert "".join(task.plan["characters"][token] for token in rest[:20]) == text[-111_539:][:20]
    assert of["known_words"](text[-111_539:], text[:-111_539]) > 0.9 and of["known_words"]("to be ftzk not", text) == 0.75


def test_08_learns_the_invented_sentences() -> None:
    """Far below the bits of knowing only how often each character comes."""
    of = names()
    of["SCALES"]["smoke"] = (32, 4, 2, 32, 8, 5e-3, 200)
    task, config, rest = of["text_task"]("linear", "smoke", 0, of["invented"](np.random.default_rng(0), 20_000))
    state = experiment.training_init(transformer_init(np.random.default_rng(0), config))
    for _ in range(200):
        state = experiment.train_step(state, task)
    often = np.bincount(rest)[np.unique(rest)] / len(rest)
    assert of["held_out_bits"](state.params, config, rest) < 0.6 * -(often * np.log2(often)).sum()
