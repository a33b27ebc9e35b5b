"""The examples run by themselves, and what they print is true."""
from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import experiment, oracle
from refattn.losses import cross_entropy_forward
from refattn.testing import budgets
from refattn.testing.rules_budget import rules_budget
from refattn.transformer import transformer_forward

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT, ORDERS = ("01", "02", "03", "11", "12", "13"), ("forward", "reverse", "shuffled")


def run_short(number: str, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[dict[str, Any], Path]:
    """The names that the example leaves behind, and its figure, which is a picture by then."""
    pytest.importorskip("matplotlib")
    file, = EXAMPLES.glob(f"{number}_*.py")
    monkeypatch.setattr("sys.argv", [str(file), "--out", str(out / "figures"), *options])
    names = runpy.run_path(str(file), run_name="__main__")
    figure = out / "figures" / f"{file.stem}.png"
    if not options:
        from matplotlib.image import imread
        assert figure.read_bytes().startswith(b"\x89PNG") and [path.name for path in figure.parent.iterdir()] == [figure.name]
        assert len(np.unique(imread(figure)[..., :3].reshape(-1, 3), axis=0)) > 10                  # more than an empty frame
    return names, figure


@pytest.mark.parametrize("number", SHORT)
def test_a_short_example_says_what_to_install_before_it_works(number: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    file, = EXAMPLES.glob(f"{number}_*.py")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("sys.argv", [str(file), "--out", str(tmp_path / "figures")])
    with pytest.raises(ImportError, match=r"this needs matplotlib, .* pip install 'refattn\[demo\]'"):
        runpy.run_path(str(file), run_name="__main__")
    assert capsys.readouterr().out == "" and not (tmp_path / "figures").exists()


def test_the_page_lists_every_example_in_the_order_of_its_number() -> None:
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in EXAMPLES.glob("*.py"))
    assert re.findall(r"^- \[`(\w+\.py)`\]\(\.\./examples/\1\), ", page, flags=re.MULTILINE) == files


def test_the_readme_is_in_the_order_that_a_reader_needs_and_its_example_has_eight_lines() -> None:
    text = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    sections = re.findall("^## (.*)", text, flags=re.MULTILINE)
    wanted = ["Install", "Example", "Test your kernel", "From the paper to the code", "Conventions", "Speed", "Citation"]
    assert [name for name in sections if name in wanted] == wanted
    assert text.count(". ", 0, text.index("## Install")) == 0                                                # one sentence
    first = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[0].splitlines()
    assert first[0].startswith("import ") and len(first) == 1 + 8


def test_01_chunked_equals_recurrent(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, figure = run_short("01", tmp_path, monkeypatch)
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
    by_hand = float((names["pullback"](dout)[1] * along).sum())
    allowed = roundings * float((np.abs(dout) * size).sum()) / 1e-4 + abs(slope[1e-4] - slope[2e-4])
    assert abs(by_hand - slope[1e-4]) <= allowed < 1e-5 * abs(by_hand)
    # the figure's weights: the oracle with unit vectors for values, and nothing above the diagonal
    weights = oracle.causal_linear_attention(q[0, 0], k[0, 0], np.eye(100))[0]
    for form in (names["chunked"], names["recurrent"]):
        budgets.assert_within(form, weights, roundings * weights)
        assert (form[np.triu_indices(100, 1)] == 0).all() and (form[np.tril_indices(100)] > 0).all()
    # its gradients: by the complex step of the oracle within the budget; its differences as above, of one element each
    one = [x[:1, :1] for x in (q, k, v)]
    start = np.zeros((1, 1, 16, 16))
    budget = budgets.attention_budget(*one, start, start[..., 0], dout[:1, :1], start, start[..., 0], phi=oracle.eq7,
                                      dphi=lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0))))
    wider = names["slopes"](h=2e-5)
    cost = roundings * float((np.abs(dout) * size)[0, 0].sum()) / 1e-5
    for i, name in enumerate(("dq", "dk", "dv")):
        gradient, difference, at = names["elements"][name]
        assert len(set(at)) > 40 and wider[name][2] == at
        for index, ours, change, twice in zip(at, gradient, difference, wider[name][1], strict=True):
            moved = [x[0, 0].astype(complex) for x in one]
            moved[i][index] += 1e-30j
            exact = (dout[0, 0] * oracle.causal_linear_attention(*moved)[0].imag).sum() / 1e-30
            assert abs(ours - exact) <= 2 * getattr(budget, name)[0, 0][index]
            assert abs(change - exact) <= 2 * cost + abs(change - twice)
    printed = capsys.readouterr().out
    assert f"differ by at most {abs(out - steps).max():.1e}" in printed and f"gradient {by_hand:.9f}" in printed
    assert f"rows sum to 1 within {abs(names['chunked'].sum(1) - 1).max():.1e}, nothing from the future: True" in printed
    assert printed.endswith(f"figure: {figure}\n")


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator compiles kernels with g++, which is not installed")
def test_02_a_race_in_a_kernel(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, figure = run_short("02", tmp_path, monkeypatch)
    x, right = names["x"], names["right"]
    assert right.tolist() == [sum(x[i:min(i + 4, i // 64 * 64 + 64)]) for i in range(256)]
    assert (names["y"] == right).all() and names["report"].findings == []
    # first to last, a thread is right only where it has no neighbour; last to first, all neighbours have written
    wrong = names["wrong"]
    assert (wrong["without a barrier", "forward"] == (np.arange(256) % 64 != 63)).all() and not wrong["without a barrier", "reverse"].any()
    assert 0 < wrong["without a barrier", "shuffled"].sum() < 252 and not any(wrong["WITH_BARRIER", order].any() for order in ORDERS)
    without, barrier = capsys.readouterr().out.split("WITH_BARRIER, forward")
    assert "without a barrier, forward: 252 of 256 elements are wrong" in without and "without a barrier, reverse: 0 of 256" in without
    assert f"without a barrier, shuffled: {wrong['without a barrier', 'shuffled'].sum()} of 256" in without
    writes, reads = (f"02_a_race_in_a_kernel.cu:{number}" for number in (5, 10))
    assert f"\nrace: {writes}: " in without and f" read at {reads} with no barrier between" in without
    assert barrier.count(": 0 of 256 elements are wrong") == 3 and barrier.endswith(f"no findings\nfigure: {figure}\n")


def test_03_where_the_delta_rule_is_well_conditioned(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, path = run_short("03", tmp_path, monkeypatch)
    figures, inputs, out_and_dk = (names[name] for name in ("figures", "inputs", "out_and_dk"))
    *lines, last = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[3:]]
    assert len(table) == 3 * len(names["FACTORS"]) and last == f"figure: {path}"
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
    # drawn elsewhere, as the documents have it: the same measurements as text and lines
    run_short("03", tmp_path, monkeypatch, "--figure", str(tmp_path / "docs" / "figure.svg"))
    drawn = (tmp_path / "docs" / "figure.svg").read_text(encoding="utf-8")
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


def test_11_the_gradient_in_constant_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, figure = run_short("11", tmp_path, monkeypatch)
    memory, lengths, D = (names[name] for name in ("memory", "LENGTHS", "D"))
    printed = capsys.readouterr().out
    rows = [line.replace(",", "").split() for line in printed.splitlines()[4: 4 + len(lengths)]]
    assert list(memory) == ["all states kept", "linear", "gated", "delta", "gated_delta"] and printed.endswith(f"figure: {figure}\n")
    for N, (first, *cells) in zip(lengths, rows, strict=True):
        assert first == str(N) and cells == [f"{sizes[N] / 2**20:.2f}" if N in sizes else "–" for sizes in memory.values()]
    # kept: S, R and what R sums up are there at once, and of the results none yet, which were taken off; objects of Python come on top
    for N, size in memory["all states kept"].items():
        assert 0 <= size - 8 * N * (3 * D * D - 4 * D) < 20_000
    # ours: from full buffers to the longest the states grow by PARTS = 16 at most for each power of 16 that the length gains, and one begun
    for rule in names["RULES"]:
        grown = memory[rule][65536] - memory[rule][4096]
        assert grown <= (0 if rule == "linear" else 2 * 16 * 8 * D * D) + 20_000 < memory["all states kept"][4096] / 100
        assert all(memory[rule][N] < size for N, size in memory["all states kept"].items())
    # both backwards are the paper's, eq. 13 to 15, to some roundings, and every rule's is the slope of the definition
    q, k, v, g, beta, dout = names["inputs"](256)
    zero = np.zeros((D, D))
    truth = oracle.eq9(q, k, v, zero), oracle.eq13(k, v, dout, zero), oracle.eq14(q, v, dout, zero), oracle.eq15(q, k, dout, zero)
    budget = budgets.recurrence_budget(q, k, v, zero, dout, zero)
    for work in (names["gradients_of_kept_states"], lambda *arrays: names["gradients"]("linear", *arrays)):
        for found, right, bound in zip(work(q, k, v, g, beta, dout), truth, (budget.out, budget.dq, budget.dk, budget.dv), strict=True):
            budgets.assert_within(found, right, bound)
    rng = np.random.default_rng(0)
    for rule in names["RULES"]:
        arrays = [x if x is None else x[:64] for x in (q, k, v, g if "gated" in rule else None, beta if "delta" in rule else None)]
        out, *gradients = names["gradients"](rule, *(x[:64] for x in (q, k, v, g, beta, dout)))
        bounds = rules_budget(*arrays, zero, dout[:64], zero)
        budgets.assert_within(out, oracle.full_recurrence(*arrays)[0], bounds.out, rule)
        along = [x if x is None else rng.standard_normal(x.shape) for x in arrays]
        moved = [x if x is None else x + 1e-30j * step for x, step in zip(arrays, along, strict=True)]
        slope = (dout[:64] * oracle.full_recurrence(*moved)[0].imag).sum() / 1e-30
        steps = [step for step in along if step is not None]
        allowed = [(bound * np.abs(step)).sum() for bound, step in zip([b for b in bounds[2:7] if b is not None], steps, strict=True)]
        assert abs(slope - sum((x * step).sum() for x, step in zip(gradients, steps, strict=True))) <= 2 * sum(allowed), rule
    ours, theirs = names["results"]
    apart = max(abs(x - y).max() / abs(y).max() for x, y in zip(ours, theirs, strict=True))
    assert f"N = 4,096: out, dq, dk and dv of both backwards differ by at most {apart:.0e} of the largest" in printed


def test_12_what_each_rule_remembers(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, figure = run_short("12", tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    measured, counts, rules, D, tries = (names[name] for name in ("measured", "COUNTS", "RULES", "D", "TRIES"))
    tables = [[line.split() for line in part.splitlines()[2:2 + len(counts)]] for part in printed.split("\n\n")[1:3]]
    assert printed.endswith(f"figure: {figure}\n")
    for n in counts:
        found = {rule: names["errors"](rule, n) for rule in rules}
        for side, rows in enumerate(tables):
            row = [str(n)]
            formulas = {"linear": (1 + (2 * (n - 1) + 64) / 32, 1 + (2 * n + 63) / 32)[side], "gated": (1 + 2 * (n - 1) / 32, 2 * n / 32)[side]}
            for rule in rules:
                squares = (found[rule][side] ** 2).mean(-1)                                  # of each table
                again = float(np.sqrt(squares.mean()))
                assert abs(measured[rule, n][side] - again) <= budgets.gamma(squares.size * 128, np.float64) * again
                row += [f"{measured[rule, n][side]:.3f}", *([f"({formulas[rule] ** 0.5:.3f})"] if rule in formulas else [])]
                if rule in formulas:                                                         # tables are drawn independently of each other
                    chance = 5 * squares.std(ddof=1) / np.sqrt(tries) + budgets.gamma(D + 3 * n + 2, np.float64) * formulas[rule]
                    assert abs(squares.mean() - formulas[rule]) <= chance, (rule, n)
            assert row in rows
        # the order that the figure shows
        of = {rule: measured[rule, n] for rule in rules}
        assert of["delta"][0] < of["gated"][0] < of["linear"][0] and of["gated"][1] < of["linear"][1]
        assert of["gated_delta"][1] < min(of[rule][1] for rule in ("linear", "gated", "delta")) and of["delta"][1] > 0.9
        assert n == 1 or of["gated_delta"][0] < of["delta"][0]
    # against the definition: the length of the difference of two errors is at most that of their bounds
    for n in (1, 8):
        q, k, v, g, beta, right = (x[:3] for x in names["pairs"](n))
        for rule in rules:
            of_rule = g if "gated" in rule else None, beta if "delta" in rule else None
            out = oracle.full_recurrence(q, k, v, *of_rule)[0]
            bound = rules_budget(q, k, v, *of_rule, np.zeros((3, D, 16)), np.zeros_like(v), np.zeros((3, D, 16))).out
            read = slice(-right.shape[1], None)
            wrong, allowed = np.linalg.norm(out[:, read] - right, axis=-1), np.linalg.norm(bound[:, read], axis=-1)
            ours = np.concatenate([x[:3] for x in names["errors"](rule, n)], axis=1)
            budgets.assert_within(ours, wrong, allowed + budgets.gamma(20, np.float64) * wrong, rule)


def test_13_a_model_of_your_own(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, figure = run_short("13", tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    params, config, seen, drawn, symbols = (names[name] for name in ("params", "config", "seen", "drawn", "SYMBOLS"))
    # the text is sums, every one of the hundred as likely
    lines = ["".join(symbols[i] for i in line) for line in names["text"](np.random.default_rng(0), 500)]
    sums = Counter(re.fullmatch(r"(;\d\+\d=\d\d){4}", line) and tuple(line[1:].split(";")) for line in lines)
    flat = Counter(one for line in sums.elements() for one in line)
    assert len(flat) == 100 and all(int(one[0]) + int(one[2]) == int(one[4:]) for one in flat) and max(flat.values()) < 20 + 5 * np.sqrt(20)
    # of the first sum everything can be counted: no model's loss is below ln 100 (Gibbs), and those that are right have exp(-excess) or more (Jensen)
    every = np.array([[symbols.index(symbol) for symbol in f";{a}+{b}={a + b:02}"] for a in range(10) for b in range(10)])
    logits = transformer_forward(params, every[:, :-1], config)[0].astype(float)
    chosen = np.take_along_axis(logits, every[:, 1:, None], axis=-1)[..., 0]
    nats = (np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1) - chosen).sum(-1)
    excess, likely = nats.mean() - np.log(100), np.exp(-nats).sum()
    assert 0 < excess and np.exp(-excess) <= likely <= 1
    # what was drawn has these chances: the first sums are right as often, to five standard deviations
    first = sum(line[:7] in {f";{a}+{b}={a + b:02}" for a in range(10) for b in range(10)} for line in drawn) / len(drawn)
    assert len(drawn) == 2000 and abs(first - likely) <= 5 * np.sqrt(likely * (1 - likely) / 2000)
    # recounted without the example's own words
    share = sum(all(int(one[0]) + int(one[2]) == int(one[4:]) for one in line[1:].split(";")) for line in drawn
                if re.fullmatch(r"(;\d\+\d=\d\d){4}", line)) / 2000
    assert f"of 2,000 lines drawn {share:.1%} are right throughout" in printed and f"drawn: {' '.join(drawn[:3])}\n" in printed
    # the loss: by the model's own cross entropy, in float32, of which every line is a sum of 27 numbers below 100 and the mean one of 13,500
    tokens = names["text"](np.random.default_rng(2**32), 500)
    loss = float(cross_entropy_forward(transformer_forward(params, tokens[:, :-1], config)[0], tokens[:, 1:])[0]) * 27
    assert abs(loss - seen[600].sum()) <= budgets.gamma(13_500 + 20, np.float32) * loss
    assert seen[100].sum() > seen[200].sum() > seen[600].sum() and abs(names["FLOOR"] - 8 * np.log(10)) < 1e-12
    assert np.exp(names["FLOOR"] - seen[600].sum()) > 0.5 and share > 0.5                                    # it has learnt to add
    for updates, nats_of in seen.items():
        assert f"after {updates} updates {nats_of.sum():.3f} nats a line; in the mean no model has fewer than 4 ln 100 = 18.421" in printed
    assert f"exp(-excess) is {np.exp(names['FLOOR'] - seen[600].sum()):.1%}\nfigure: {figure}\n" in printed
