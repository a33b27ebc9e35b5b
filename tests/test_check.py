"""Laws of the checker: it finds every kernel that is wrong, and accuses none that is right."""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refattn
from refattn.__main__ import main
from refattn.testing import check
from refattn.testing.broken import BROKEN, RIGHT, Broken
from refattn.testing.check import Report, case_code, check_kernel
from refattn.testing.kernel import PRESETS, Case, jax_backward, torch_backward


def checked(broken: Broken, **options: object) -> Report:
    return check_kernel(broken.forward, **{"backward": broken.backward, "examples": 60, **broken.options, **options})


@pytest.mark.parametrize("name", BROKEN)
def test_every_wrong_kernel_is_found(name: str) -> None:
    report = checked(BROKEN[name])
    assert not report.passed and report.seconds < 60, BROKEN[name].story
    assert f"FAILED in {report.seconds:.1f} s" in str(report) and report.failures[0].words in str(report)


@pytest.mark.parametrize(("law", "name"), [
    ("no future in the past", "sees_the_next"), ("sequences and heads apart", "heads_chained"), ("in two parts", "state_without_the_rest"),
    ("in two parts", "short_without_state"), ("gradients, rounded", "dq_without_scale"), ("gradients, rounded", "dg_shifted")])
def test_the_laws_that_stand_behind_the_definition_fail_by_themselves_too(law: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laws = check._laws
    monkeypatch.setattr(check, "_laws", lambda kernel: (x for x in laws(kernel) if x[0] == law))
    report = checked(BROKEN[name])
    assert [failure.law for failure in report.failures] == [law]
    right = RIGHT[str(BROKEN[name].options["rule"])]
    assert checked(right).passed


def test_there_are_forty_of_them_and_each_has_its_story() -> None:
    assert len(BROKEN) >= 40 and len({broken.story for broken in BROKEN.values()}) == len(BROKEN)
    assert {broken.options["rule"] for broken in BROKEN.values()} == set(RIGHT)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", RIGHT)
def test_no_right_kernel_is_accused(rule: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for decay in ("head", "channel") if "gated" in rule else ("head",):
        report = checked(RIGHT[rule], dtype=dtype, decay=decay, grouped=True, examples=15, seed=1)
        assert report.passed and 0 < report.worst <= 1, str(report)
        assert set(report.cases) >= {"definition, exact", "in two parts", "gradients, rounded"} and set(report.cases.values()) == {15}


@pytest.mark.parametrize("rule", RIGHT)
def test_the_definition_itself_is_right_when_it_runs_in_float64(rule: str) -> None:
    def fn(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q, k, v, *rest = arrays
        g, beta = rest.pop(0) if "gated" in rule else None, rest.pop(0) if "delta" in rule else None
        return refattn.oracle.full_recurrence(q, k, v, g, beta, rest[0])

    report = check_kernel(fn, rule=rule, dtype="float64", examples=15)
    assert report.passed and report.worst == 0, str(report)


def their_conventions(rule: str) -> Broken:
    """Ours, behind another layout: positions before heads, the state transposed, decays as numbers, a scale."""
    def ours(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray | None, ...]:
        q, k, v, *rest = (np.moveaxis(x, 1, 2) if i < len(arrays) - 1 else x.swapaxes(-1, -2) for i, x in enumerate(arrays))
        with np.errstate(divide="ignore"):
            g = np.log(rest.pop(0)) if "gated" in rule else None
        return q, k, v, g, rest.pop(0) if "delta" in rule else None, rest.pop(0)

    def forward(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out, state = refattn.recurrence(*ours(arrays), rule=rule, scale=0.3)
        return np.moveaxis(out, 1, 2), state.swapaxes(-1, -2)

    def backward(dout: np.ndarray, dstate: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        six = ours(arrays)
        _, pullback = refattn.vjp(refattn.recurrence, *six, rule=rule, scale=0.3)
        *gradients, dstart = pullback(np.ascontiguousarray(np.moveaxis(dout, 1, 2)), dstate.swapaxes(-1, -2))
        if gradients[3] is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                gradients[3] = gradients[3] / np.exp(six[3])
        return *(np.moveaxis(d, 1, 2) for d in gradients if d is not None), dstart.swapaxes(-1, -2)

    options = {"rule": rule, "layout": "bnhd", "state_layout": "bhmd", "decay_space": "linear", "scale": 0.3}
    return Broken("right, told differently", options, forward, backward)


@pytest.mark.parametrize("rule", RIGHT)
def test_other_conventions_are_described_by_arguments(rule: str) -> None:
    broken = their_conventions(rule)
    report = checked(broken, examples=15, seed=2)
    assert report.passed, str(report)
    for name, value in (("layout", "bhnd"), ("state_layout", "bhdm"), ("scale", 0.31), *([("decay_space", "log")] if "gated" in rule else [])):
        assert not checked(broken, examples=15, **{name: value}).passed, name


def test_a_scale_may_depend_on_the_width() -> None:
    def fn(q: np.ndarray, k: np.ndarray, v: np.ndarray, state: np.ndarray, power: float = -0.5) -> tuple[np.ndarray, np.ndarray]:
        return refattn.recurrence(q, k, v, state=state, scale=q.shape[-1]**power)

    report = check_kernel(fn, scale="1/sqrt(d)", examples=40)
    assert report.passed, str(report)
    assert not check_kernel(lambda *arrays: fn(*arrays, power=-1), scale="1/sqrt(d)", examples=40).passed


@pytest.mark.parametrize("states", [True, False])
def test_gradients_of_torch_are_judged(states: bool) -> None:
    torch = pytest.importorskip("torch")

    def fn(q: Any, k: Any, v: Any, g: Any, state: Any = None) -> Any:
        """The loop over positions; PRESETS["flash-linear-attention"] has its layout."""
        S, out = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]) if state is None else state, []
        for t in range(q.shape[1]):
            S = torch.exp(g[:, t])[..., None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
            out.append((q[:, t, :, :, None] * S).sum(-2) * q.shape[-1] ** -0.5)
        return (torch.stack(out, 1), S) if states else torch.stack(out, 1)

    def forgetful(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return fn(q, k, v.detach() + 0 * v, *rest)

    options = {**PRESETS["flash-linear-attention"], "rule": "gated", "states": states, "to": torch.from_numpy, "examples": 15}
    report = check_kernel(fn, backward=torch_backward(fn, states=states), **options)
    assert report.passed and report.cases["gradients, exact"] == 15, str(report)
    report = check_kernel(forgetful, backward=torch_backward(forgetful, states=states), **options)
    assert not report.passed and "dv" in report.failures[0].words


@pytest.mark.parametrize("states", [True, False])
def test_gradients_of_jax_are_judged(states: bool) -> None:
    jax = pytest.importorskip("jax")
    from refattn.causal import causal_scan_forward

    def fn(q: Any, k: Any, v: Any, state: Any = None) -> Any:
        return causal_scan_forward(q, k, v, state, chunk=4)[:2]

    report = check_kernel(fn, backward=jax_backward(fn, states=states), states=states, to=jax.numpy.asarray, examples=6)
    assert report.passed, str(report)


def test_packed_heads_without_a_state() -> None:
    def split(x: np.ndarray, heads: int) -> np.ndarray:
        return np.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 1)

    def fn(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray) -> np.ndarray:
        H = g.shape[-1]
        out, _ = refattn.recurrence(*(split(x, H) for x in (q, k, v)), np.moveaxis(g, 1, 2), rule="gated")
        return np.moveaxis(out, 1, 2).reshape(*v.shape)

    report = check_kernel(fn, rule="gated", layout="bn(hd)", states=False, examples=20)
    assert report.passed and "in two parts" not in report.cases, str(report)


def test_the_smallest_case_is_code_that_shows_the_bug() -> None:
    broken = BROKEN["excludes_itself"]
    report = checked(broken)
    code = case_code(report.failures[0].case)
    assert code in str(report)
    names: dict[str, np.ndarray] = {}
    exec(code, names)                                                            # noqa: S102
    found = broken.forward(names["q"], names["k"], names["v"], names.get("state", np.zeros_like(names["end"], np.float32)))[0]
    assert (found != names["out"]).any()
    at = tuple(int(i) for i in re.findall(r"\d+", report.failures[0].words.partition(":")[0]))
    assert f"got {found[at]}, expected {names['out'][at]}" in report.failures[0].words
    assert names["q"].shape[2] == 1                                              # one position is enough to show it


@pytest.mark.parametrize(("name", "clue"), [
    ("heads_chained", "more than one head"), ("first_state_for_all", "more than one sequence"), ("groups_interleaved", "grouped queries"),
    ("short_without_state", "initial state"), ("nan_at_a_reset", "g = -inf"), ("one_element", "only from position 17 on"),
    ("dk_of_one_of_a_group", "grouped queries"), ("overflow_at_strong_decay", "decay")])
def test_what_it_looks_like_is_said(name: str, clue: str) -> None:
    assert clue in checked(BROKEN[name]).failures[0].guess


def test_one_seed_finds_one_case_and_a_limit_of_time_is_kept() -> None:
    one, other = (checked(BROKEN["sees_the_next"], seed=5) for _ in range(2))
    assert [f.words for f in one.failures] == [f.words for f in other.failures] and one.cases == other.cases
    assert checked(RIGHT["gated"], time_limit=0).cases == {}


def test_a_factor_widens_the_bounds_and_is_told() -> None:
    assert checked(BROKEN["half_accumulator"], factor=1e5).passed
    assert "which was multiplied by 2" in str(checked(RIGHT["linear"], factor=2, examples=5))


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"rule": "linaer"}, ValueError, "rule: expected 'linear' or 'gated' or 'delta' or 'gated_delta', got 'linaer'"),
    ({"layout": "nbhd"}, ValueError, "layout: expected"), ({"dtype": "int8"}, ValueError, "dtype: expected"),
    ({"examples": 0}, ValueError, "examples: expected an integer ≥ 1, got 0"), ({"factor": -1}, ValueError, "factor: expected"),
    ({"backward": 3}, TypeError, "fn: expected a function of arrays"),
])
def test_options_that_are_not_understood_are_said(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_kernel(RIGHT["linear"].forward, **options)


def command(*arguments: str) -> int:
    try:
        return main(["check", *arguments])
    except SystemExit as end:
        return int(str(end.code))


def test_the_command_judges_tells_and_says_what_it_does_not_understand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernels_of_a_test.py").write_text(
        "import refattn\nfrom refattn.testing.broken import BROKEN, RIGHT\n"
        "right, right_backward = RIGHT['gated'].forward, RIGHT['gated'].backward\nwrong = BROKEN['decay_clamped'].forward\nnumber = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    name = "kernels_of_a_test"
    assert command(f"{name}:right", "--backward", f"{name}:right_backward", "--rule", "gated", "--max-examples", "5") == 0
    assert "passed in" in capsys.readouterr().out
    assert command(f"{name}:wrong", "--rule", "gated", "--max-examples", "30", "--seed", "1", "--json", "report.json") == 1
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert "FAILED" in printed and record["passed"] is False
    assert record["failures"][0]["words"] in printed and record["failures"][0]["case"] in printed
    for arguments, words in (([f"{name}:nothing"], "argument kernel: module 'kernels_of_a_test' has no attribute 'nothing'"),
                             (["no_such_module_here:f"], "argument kernel: No module named 'no_such_module_here'"),
                             ([name], "argument kernel: expected module:function, got 'kernels_of_a_test'"),
                             ([f"{name}:number"], "argument kernel: expected a function, got int"),
                             ([f"{name}:right", "--max-examples", "0"], "examples: expected an integer ≥ 1, got 0")):
        assert command(*arguments) == 2
        assert words in capsys.readouterr().err


def test_a_backward_of_too_few_gradients_is_told() -> None:
    report = check_kernel(RIGHT["linear"].forward, backward=lambda *arrays: arrays[:2], examples=3)
    assert report.failures[0].words == "backward: expected the gradients of q, k, v, state, got 2"


def test_a_case_is_code_whatever_is_in_it() -> None:
    one = np.ones((1, 1, 1, 1), np.float32)
    code = case_code(Case(one, one, one, np.full((1, 1, 1), -np.inf, np.float32), None, None, one, one, True))
    names: dict[str, np.ndarray] = {}
    exec(code, names)                                                            # noqa: S102
    assert names["g"].tolist() == [[[-np.inf]]] and names["out"].tolist() == [[[[1.0]]]]
