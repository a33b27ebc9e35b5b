"""The examples run by themselves, and what they print is true."""
from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import experiment, oracle
from refattn.testing import budgets

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_01_chunked_equals_recurrent(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "01_chunked_equals_recurrent.py"))
    q, k, v, dout, along, out, steps = (names[name] for name in ("q", "k", "v", "dout", "along", "out", "steps"))
    # φ: 8 roundings for each of q and k; D products and N sums above and below the line; one division
    roundings = budgets.gamma(2 * (16 + 16 + 100) + 2, np.float64)
    truth, size = (oracle.causal_linear_attention(q, k, x)[0] for x in (v, np.abs(v)))
    for form in (out, steps):
        budgets.assert_within(form, truth, roundings * size)
    # a central difference is off by the roundings of its two ends, and by a curvature of which D(h) - D(2h) shows three times as much
    slope = {}
    for h in (1e-4, 2e-4):
        ahead, behind = (oracle.causal_linear_attention(q, k + side * along, v)[0] for side in (h, -h))
        slope[h] = float((dout * (ahead - behind)).sum()) / (2 * h)
    gradient = float((names["pullback"](dout)[1] * along).sum())
    allowed = roundings * float((np.abs(dout) * size).sum()) / 1e-4 + abs(slope[1e-4] - slope[2e-4])
    assert abs(gradient - slope[1e-4]) <= allowed < 1e-5 * abs(gradient)
    printed = capsys.readouterr().out
    assert f"differ by at most {abs(out - steps).max():.1e}" in printed and f"gradient {gradient:.9f}" in printed


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles kernels with g++, which is not installed")
def test_02_a_race_in_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    names = runpy.run_path(str(EXAMPLES / "02_a_race_in_a_kernel.py"))
    assert (names["y"] == names["right"]).all() and names["report"].findings == []
    without, barrier = capsys.readouterr().out.split("WITH_BARRIER, forward")
    assert "without a barrier, forward: 252 of 256 elements are wrong" in without and "without a barrier, reverse: 0 of 256" in without
    writes, reads = (f"02_a_race_in_a_kernel.cu:{number}" for number in (5, 10))
    assert f"\nrace: {writes}: " in without and f" read at {reads} with no barrier between" in without
    assert barrier.count(": 0 of 256 elements are wrong") == 3 and barrier.endswith("no findings\n")


def test_03_where_the_delta_rule_is_well_conditioned(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, figure = str(EXAMPLES / "03_where_the_delta_rule_is_well_conditioned.py"), tmp_path / "figure.svg"
    with_figure = importlib.util.find_spec("matplotlib") is not None
    monkeypatch.setattr("sys.argv", [file, str(figure)] if with_figure else [file])
    names = runpy.run_path(file, run_name="__main__")
    figures, inputs, out_and_dk = (names[name] for name in ("figures", "inputs", "out_and_dk"))
    table = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert len(table) == 3 * len(names["FACTORS"])
    for factor, N, *printed in table:
        assert printed == [f"{x:.1e}" for x in figures[float(factor), int(N)][:3]]
    for (factor, N), (*errors, largest, _) in figures.items():
        q, k, v, beta, dout = (x[:, :N] for x in inputs(factor))
        norms = [np.linalg.norm(x.astype(float), axis=-1) for x in (q, k, v)]
        assert np.allclose(beta * norms[1] ** 2, factor, rtol=1e-6)
        # |I - β k kᵀ| = ρ, and a write is β k vᵀ: the state is at most the sum of the writes, each ρ times as large after each later one
        rho = max(1.0, abs(1 - factor)) * (1 + 1e-6)
        most = (rho ** np.minimum(np.arange(N), 1000)[::-1] * norms[1] * norms[2]).sum(-1) * norms[0].max(-1)     # 2¹⁰⁰⁰ is enough
        assert 1e-8 < min(errors) and largest <= most.max()
        if N > 64:
            continue
        truth, ours = oracle.full_recurrence(q, k, v, None, beta)[0], out_and_dk(q, k, v, beta, dout)[0]
        again = max(np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(ours.reshape(-1, 8), truth.reshape(-1, 8), strict=True))
        assert abs(errors[0] - again) <= budgets.gamma(24, np.float64) * again           # two norms of eight numbers, in two orders
        # the truth of dk is good enough for two digits of its error: against the complex step of the oracle along k times some signs
        along = k * np.random.default_rng(1).choice([-1.0, 1.0], k.shape)
        dk = out_and_dk(*(x.astype(float) for x in (q, k, v, beta, dout)))[1]
        slope = (dout * oracle.full_recurrence(q, k + 1e-30j * along, v, None, beta)[0].imag).sum() / 1e-30
        assert abs(slope - (dk * along).sum()) <= 5e-3 * errors[1] * np.abs(dk * along).sum()
    # what the figure shows: two is the end
    for of in (0, 1):
        assert figures[3.0, 1024][of] > 10 * max(figures[factor, 1024][of] for factor in (0.5, 1.0, 1.9, 2.0))
    assert figures[3.0, 1024][2] > 1e30
    if with_figure:
        drawn = figure.read_text(encoding="utf-8")
        assert len(drawn) < 60_000 and all(f"β|k|² = {factor:g}" in drawn for factor in names["FACTORS"])


def test_04_copy_task(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "safetensors", "tqdm"):
        pytest.importorskip(module)
    file = str(EXAMPLES / "04_copy_task.py")

    def run(*options: str) -> list[list[str]]:
        monkeypatch.setattr("sys.argv", [file, "--smoke", "--seed", "3", "--out", str(tmp_path / "out"), *options])
        runpy.run_path(file, run_name="__main__")
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    names = runpy.run_path(file)
    first = run("--system", "linear", "--system", "lsh-1")
    again = run("--system", "lsh-1")
    assert first[-4:] == again[-4:] and [row[0] for row in first[-4:-2]] == ["linear", "lsh-1"] and again[0][-1] == "40"
    assert (tmp_path / "out" / "smoke.png").read_bytes().startswith(b"\x89PNG")
    results = {system: json.loads((tmp_path / "out" / f"smoke-{system}.json").read_text()) for system in ("linear", "lsh-1")}
    for row, r in zip(first[-4:-2], results.values(), strict=True):
        assert row[1] == "40" and row[4:] == [f"{r['loss']:.4f}", f"{r['test loss']:.4f}", f"{r['accuracy']:.2%}", f"{r['whole']:.1%}",
                                              f"{r['shorter']:.2%}"]
        assert [point["update"] for point in r["history"]] == [20, 40] and r["history"][-1]["loss"] == r["loss"]
    # what is learnt from: 0 w 0 w, and just the second w counts
    tokens, n = names["copy_batch"](np.random.default_rng(0), 50, 4, 7)
    assert set(n) == {4, 5, 6, 7} and 20 < (n == 7).sum() < 45 and set(tokens.ravel()) == set(range(11)) and tokens.shape == (50, 16)
    task, config = names["copy_task"]("linear", "smoke", 3)
    params = names["transformer_init"](np.random.default_rng(0), config)
    logits, targets, second, _ = names["read"](params, config, tokens, n, np.random.default_rng(0))
    for row, length, follows, counts in zip(tokens, n, targets, second, strict=True):
        w = row[1: length + 1]
        assert w.all() and row[: 2 * length + 2].tolist() == [0, *w, 0, *w] and not row[2 * length + 2:].any()
        assert follows[counts].tolist() == w.tolist() and np.flatnonzero(counts)[0] == length + 1
    # a model that knows the answer is right throughout; one wrong symbol is one wrong symbol
    test = names["copy_test"]
    for wrong in (0, 1):
        def known(params: object, config: object, tokens: np.ndarray, n: np.ndarray, rng: object, wrong: int = wrong) -> tuple:
            logits = 99.0 * np.eye(11)[tokens[:, 1:]]
            logits[:wrong, -1] = np.roll(logits[:wrong, -1], 1, axis=-1)
            return logits, tokens[:, 1:], np.broadcast_to(np.arange(tokens.shape[1] - 1) > n[:, None], logits.shape[:2]), None

        monkeypatch.setitem(test.__globals__, "read", known)
        found = test(params, config, 8)
        assert (found["accuracy"], found["whole"]) == (1 - wrong / 56, 1 - wrong / 8) and abs(found["test loss"] - 99 * wrong / 56) < 1e-12
    # the hashes and batches of an update are its own, whenever it is asked for
    for one, other, third in zip(*(task.batch(i)[:2] for i in (4, 4, 5)), strict=True):
        assert (one == other).all() and (one != third).any()


def test_04_learns_to_copy_short_words() -> None:
    """With w of three or four symbols the linear model is on its way: far below the log 10 = 2.30 of guessing."""
    names = runpy.run_path(str(EXAMPLES / "04_copy_task.py"))
    names["SCALES"]["smoke"] = (32, 4, 2, 4)
    task, config = names["copy_task"]("linear", "smoke", 0)
    state = experiment.training_init(names["transformer_init"](np.random.default_rng(0), config))
    for _ in range(150):
        state = experiment.train_step(state, task)
    assert names["copy_test"](state.params, config, 64)["test loss"] < 1.6, state.loss


def test_09_images_per_second(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    file = str(EXAMPLES / "09_images_per_second.py")
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")                                            # the script sets them; here they are put back
    monkeypatch.setattr("sys.argv", [file, "--smoke", "--dataset", "mnist", "--out", str(tmp_path)])
    names = runpy.run_path(file, run_name="__main__")
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["mnist"]
    assert set(found["systems"]) == {"linear", "softmax", "stateful softmax", "lsh-1", "lsh-4"}
    for system, of in found["systems"].items():
        row, = (line for line in printed.splitlines() if line.startswith(f"{system:<18} "))
        times = found["systems"]["softmax"]["seconds"] / of["seconds"]
        assert f" {of['seconds']:>11.3g} {1 / of['seconds']:>10.3g} {times:>10.3g} " in row and of["batch"] in (1, 2, 16)
    assert (tmp_path / "images-per-second.png").read_bytes().startswith(b"\x89PNG")
    # the two ratios that the paper's sizes have: N/2 times the products with weights, and attention over n in place of over a state
    for N, layers in ((784, 8), (3072, 16)):
        counted = (24 * 256**2 * (N + 1) / 2 + 4 * 256 * (N + 1) * (2 * N + 1) / 6) / (24 * 256**2 + 4 * 256 * 32)
        assert abs(names["flops_ratio"](N, layers) / counted - 1) < 1e-12
    # an image is the sum over its pixels: with times of n² and of n for reading n, and of n for a step behind n
    at, taken, N, of = [7], [0.0], 200, names["point"].__globals__

    def known(real: Callable[..., Any], clock: Callable[[int], float]) -> Callable[..., Any]:
        def called(params: Any, tokens: np.ndarray, *rest: Any, **options: Any) -> Any:
            at[0] = tokens.shape[1]
            taken[0] = clock(at[0])
            return real(params, tokens, *rest, **options)
        return called

    def decoding_step(*arguments: Any) -> Callable[..., None]:
        def step(tokens: np.ndarray) -> None:
            taken[0] = 2.0 * at[0]
        return step

    def seconds_of(f: Callable[[], Any], least: float, most: float = 1) -> float:
        f()
        return taken[0]

    for name, value in {"transformer_prefill": known(of["transformer_prefill"], lambda n: 3.0 * n**2 + n), "decoding_step": decoding_step,
                        "transformer_forward": known(of["transformer_forward"], lambda n: 5.0 * n), "seconds_of": seconds_of}.items():
        monkeypatch.setitem(of, name, value)
    assert names["point"]("linear", N, 1, 2, 0.0) == {"linear": N * 14.0 / 2}
    found = names["point"]("softmax", N, 1, 2, 0.0)
    assert abs(found["softmax"] - (N**3 + N**2 / 2) / 2) < 0.01 * N**3 / 2 and abs(found["stateful softmax"] - N**2 / 2) < 0.01 * N**2 / 2
    assert abs(names["point"]("lsh-1", N, 1, 2, 0.0)["lsh-1"] - 5 * N**2 / 2 / 2) < 0.01 * N**2
    # processes side by side: their rates add
    rates = iter([2.0, 6.0, 3.0])
    monkeypatch.setitem(of, "cores", lambda: 3)
    monkeypatch.setitem(of, "run_apart", lambda *arguments: {"linear": 1 / next(rates)})
    assert abs(names["on_all_cores"]("mnist", "linear", "2")["linear"] - 1 / 11) < 1e-12
