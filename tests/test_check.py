"""Laws of the checker: it finds every kernel that is wrong, and accuses none that is right."""
from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refattn
import refattn.testing
from refattn.__main__ import main
from refattn.testing import check
from refattn.testing.broken import BROKEN, RIGHT, Broken, named
from refattn.testing.check import Report, check_kernel
from refattn.testing.frameworks import MAKE, to_numpy
from refattn.testing.kernel import PRESETS


def checked(broken: Broken, **options: object) -> Report:
    return check_kernel(broken.forward, **{"backward": broken.backward, "examples": 60, **broken.options, **options})


@pytest.mark.parametrize("name", BROKEN)
def test_every_wrong_kernel_is_found(name: str) -> None:
    report = checked(BROKEN[name])
    assert not report.passed and report.seconds < 60, BROKEN[name].story
    assert f"FAILED in {report.seconds:.1f} s" in str(report) and report.failures[0].words in str(report)


@pytest.mark.parametrize(("law", "name"), [
    ("no future in the past", "sees_the_next"), ("sequences and heads apart", "heads_chained"), ("in two parts", "state_without_the_rest"),
    ("in two parts", "short_without_state"), ("padding", "state_without_the_rest"),
    ("gradients of real numbers", "dq_without_scale"), ("gradients of real numbers", "dg_shifted")])
def test_the_laws_that_stand_behind_the_definition_fail_by_themselves_too(law: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laws = check.laws
    monkeypatch.setattr(check, "laws", lambda kernel: (x for x in laws(kernel) if x[0] == law))
    report = checked(BROKEN[name])
    assert [failure.law for failure in report.failures] == [law]
    right = RIGHT[str(BROKEN[name].options["rule"])]
    assert checked(right).passed


def test_there_are_forty_of_them_and_each_has_its_story() -> None:
    assert len(BROKEN) >= 40 and len({broken.story for broken in BROKEN.values()}) == len(BROKEN)
    assert {broken.options["rule"] for broken in BROKEN.values()} == set(RIGHT)


ATTENTION = {"linear_attention": refattn.linear_attention, "softmax_attention": refattn.softmax_attention}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", RIGHT)
def test_no_right_kernel_is_accused(rule: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for decay in ("head", "channel") if "gated" in rule else ("head",):
        report = checked(RIGHT[rule], dtype=dtype, decay=decay, grouped=True, examples=15, seed=1)
        assert report.passed and 0 < report.worst <= 1, str(report)
        assert set(report.cases) >= {"definition, integers", "any strides", "gradients of real numbers"} and set(report.cases.values()) == {15}
        assert ({"in two parts", "padding"} <= set(report.cases)) == (rule in refattn.rules.RULES)


@pytest.mark.parametrize("form", ["masked", "scan", "chunked", "step"])
@pytest.mark.parametrize("rule", refattn.rules.RULES)
def test_no_form_of_ours_is_accused(rule: str, form: str) -> None:
    room = {"linear": "causal", "gated": "gated", "delta": "delta", "gated_delta": "delta"}[rule]
    module = importlib.import_module(f"refattn.{room}")
    own: Any = lambda six: (*six[:3], *(six[3:4] if room == "gated" else six[3:5] if room == "delta" else ()), six[5])

    def fn(*arrays: np.ndarray) -> Any:
        six = named(rule, arrays)
        if form != "step":
            return getattr(module, f"{room}_{form}_forward")(*own(six))[:2]
        state, out = six[5], []
        for t in range(six[0].shape[2]):
            o, state = refattn.recurrence_step(*(None if x is None else x[:, :, t] for x in six[:5]), state, rule=rule)
            out.append(o)
        return np.stack(out, 2), state

    def backward(dout: np.ndarray, dstate: np.ndarray, *arrays: np.ndarray) -> Any:
        residuals = getattr(module, f"{room}_{form}_forward")(*own(named(rule, arrays)))[2]
        return tuple(d for d in getattr(module, f"{room}_{form}_backward")(dout, dstate, residuals) if d is not None)

    for decay in ("head", "channel") if "gated" in rule else ("head",):
        report = check_kernel(fn, backward=None if form == "step" else backward, rule=rule, decay=decay, grouped=True, examples=8, seed=4)
        assert report.passed and not report.untried, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("rule", RIGHT)
def test_no_right_kernel_is_accused_in_a_thousand_runs(rule: str, dtype: str) -> None:
    """42 seeds for each of six rules and four dtypes."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for seed in range(42):
        decay = ("head", "channel")[seed % 2] if "gated" in rule else "head"
        report = checked(RIGHT[rule], dtype=dtype, decay=decay, grouped=True, examples=4, seed=seed)
        assert report.passed and set(report.cases.values()) == {4}, f"seed {seed}, decay {decay}: {report}"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", ATTENTION)
def test_attention_to_more_or_fewer_keys_and_in_any_layout(rule: str, causal: bool) -> None:
    options: dict[str, Any] = {"causal": causal} | ({"scale": 0.3} if rule == "softmax_attention" else {"eps": 1e-3})

    def fn(*arrays: np.ndarray) -> np.ndarray:
        return np.moveaxis(ATTENTION[rule](*(np.moveaxis(x, 1, 2) for x in arrays), **options), 1, 2)

    def backward(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        dout, *qkv = (np.moveaxis(x, 1, 2) for x in arrays)
        return tuple(np.moveaxis(d, 1, 2) for d in refattn.vjp(ATTENTION[rule], *qkv, **options)[1](np.ascontiguousarray(dout)))

    report = check_kernel(fn, backward=backward, rule=rule, layout="bnhd", examples=20, seed=3, **options)
    assert report.passed and ("no future in the past" in report.cases) == causal, str(report)
    for name, value in (("causal", not causal), ("layout", "bhnd"), *(("scale", 0.31),) * (rule == "softmax_attention"),
                        *(("eps", 1e-6),) * (rule == "linear_attention")):
        assert not check_kernel(fn, rule=rule, examples=20, **{"layout": "bnhd", **options, name: value}).passed, name


def test_results_may_be_written_into_memory_that_is_given() -> None:
    def fn(q: np.ndarray, k: np.ndarray, v: np.ndarray, state: np.ndarray, out: np.ndarray, end: np.ndarray) -> str:
        out[...], end[...] = refattn.recurrence(q, k, v, state=state)
        return "what is returned is not read"

    def backward(*arrays: np.ndarray) -> None:
        *given, dq, dk, dv, dstate = arrays
        for d, x in zip((dq, dk, dv, dstate), RIGHT["linear"].backward(*given), strict=True):                      # type: ignore[misc]
            d[...] = x

    def partly(*arrays: np.ndarray) -> None:
        kept = arrays[-3][:, :, -1:].copy()
        backward(*arrays)
        arrays[-3][:, :, -1:] = kept

    report = check_kernel(fn, backward=backward, into=True, examples=20)
    assert report.passed and "every element written" in report.cases, str(report)
    report = check_kernel(fn, backward=partly, into=True, examples=20)
    assert report.failures[0].law == "every element written"
    assert report.failures[0].words.startswith("dk[0, 0, 0, 0], written over NaN and over 7: got nan")
    report = check_kernel(lambda q, k, v, out: np.copyto(out, refattn.recurrence(q, k, v)[0]), into=True, states=False, examples=20)
    assert report.passed, str(report)


def test_a_kernel_for_some_sizes_only_is_asked_for_these() -> None:
    seen = set()

    def fn(q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, state: np.ndarray) -> Any:
        assert q.shape[2] % 16 == 0 and (q.shape[-1], v.shape[-1]) in ((8, 8), (8, 16)), "a shape that this kernel does not take"
        seen.add(q.shape[2])
        out, end = refattn.recurrence(q, k, v, g, state=state, rule="gated")
        return out, end

    options: dict[str, Any] = {"rule": "gated", "multiple_of": 16, "widths": ((8, 8), (8, 16))}
    report = check_kernel(fn, examples=15, **options)
    assert report.passed and len(seen) > 2 and max(seen) > 32, str(report)
    report = check_kernel(lambda *arrays: fn(*arrays)[0] * 2, examples=15, **options)                               # smaller, but of those sizes
    assert "all outputs are 2 times" in str(report) and report.failures[0].case.q.shape[2:] == (16, 8)
    report = check_kernel(fn, rule="gated", examples=15)
    assert "the call raised AssertionError: a shape that this kernel does not take" in report.failures[0].words and len(report.failures) == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["linear", "softmax_attention"])
def test_factors_of_products_may_be_rounded_to_half(rule: str, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")

    def fn(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        wide = [x.astype(np.float32) for x in (q, k, v)]
        A, mask = wide[0] @ wide[1].mT, np.tri(q.shape[2])
        if rule == "softmax_attention":
            A = np.where(mask, 0.25 * A, -np.inf)
            A = np.exp(A - A.max(-1, keepdims=True))
            return (A.astype(q.dtype).astype(np.float32) @ wide[2] / A.sum(-1, keepdims=True)).astype(q.dtype)
        return ((A * mask).astype(q.dtype).astype(np.float32) @ wide[2]).astype(q.dtype)

    options: dict[str, Any] = {"rule": rule, "scale": 0.25 if rule == "softmax_attention" else 1, "states": False, "dtype": dtype, "examples": 40}
    strict, lenient = check_kernel(fn, **options), check_kernel(fn, factors="dtype", **options)
    assert not strict.passed and lenient.passed and lenient.worst > 0.01, str(lenient)
    assert not check_kernel(lambda q, k, v: fn(q, k, v) * q.dtype.type(1.0625), factors="dtype", **options).passed


@pytest.mark.parametrize("rule", refattn.rules.RULES)
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


@pytest.mark.parametrize("rule", refattn.rules.RULES)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", sorted(set(MAKE) - {"cupy"}))
def test_arrays_of_other_libraries_come_and_go_as_they_are(to: str, dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    pytest.importorskip({"mlx": "mlx.core"}.get(to, to), reason=f"needs {to}")
    kind = type(MAKE[to](np.zeros(1, np.float32)))

    def fn(*arrays: Any) -> tuple[Any, Any]:
        assert all(isinstance(x, kind) for x in arrays)
        out, state = RIGHT["gated"].forward(*(to_numpy(x) for x in arrays))
        return MAKE[to](out), MAKE[to](state)

    report = check_kernel(fn, rule="gated", to=to, dtype=dtype, examples=5)
    assert report.passed, str(report)


def test_arrays_of_the_stand_in_for_cupy_too(monkeypatch: pytest.MonkeyPatch, simt: Any) -> None:
    monkeypatch.setitem(sys.modules, "cupy", simt)

    def fn(q: Any, k: Any, v: Any, state: Any) -> Any:
        assert isinstance(q, simt.ndarray)
        return refattn.recurrence(q, k, v, state=state)

    assert check_kernel(fn, to="cupy", widths=((4, 4),), contiguous=True, examples=3).passed


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="to: arrays of tensorflow are asked for, and .*: install it, or give to a function of your own"):
        check_kernel(RIGHT["linear"].forward, to="tensorflow")


def test_decays_may_have_their_gradient_by_differences() -> None:
    """dg as the reverse cumulative sum of q·dq - k·dk, from the end, where both cancel: right, and far from the bound of a sum without them."""
    def backward(dout: np.ndarray, dstate: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, g: np.ndarray, state: np.ndarray) -> Any:
        dq, dk, dv, dg, dS = RIGHT["gated"].backward(dout, dstate, q, k, v, g, state)                               # type: ignore[misc]
        end = refattn.recurrence(q, k, v, g, state=state, rule="gated")[1]
        terms = (q * dq - k * dk).sum(-1)
        terms[:, :, -1] += (end * dstate).sum((-2, -1))
        return dq, dk, dv, np.cumsum(terms[:, :, ::-1], axis=2)[:, :, ::-1], dS

    report = check_kernel(RIGHT["gated"].forward, backward=backward, rule="gated", resets=False, scale=1, examples=60)
    assert report.passed, str(report)


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

    options = {**PRESETS["flash-linear-attention"], "rule": "gated", "states": states, "backward": "autodiff", "examples": 15}
    report = check_kernel(fn, **options)
    assert report.passed and report.cases["gradients of integers"] == 15, str(report)
    report = check_kernel(forgetful, **options)
    assert not report.passed and "dv" in report.failures[0].words


@pytest.mark.parametrize("states", [True, False])
def test_gradients_of_jax_are_judged(states: bool) -> None:
    pytest.importorskip("jax")
    from refattn.causal import causal_scan_forward

    def fn(q: Any, k: Any, v: Any, state: Any = None) -> Any:
        return causal_scan_forward(q, k, v, state, chunk=4)[:2]

    report = check_kernel(fn, backward="autodiff", states=states, to="jax", examples=6)
    assert report.passed, str(report)


def test_a_kernel_that_takes_contiguous_arrays_alone_is_given_no_other() -> None:
    def fn(*arrays: np.ndarray) -> Any:
        assert all(x.flags.c_contiguous for x in arrays)
        return RIGHT["linear"].forward(*arrays)

    assert not check_kernel(fn, examples=10).passed
    report = check_kernel(fn, contiguous=True, backward=BROKEN["cotangent_as_if_contiguous"].backward, examples=10)
    assert report.passed and not {"any strides", "expanded cotangent"} & set(report.cases), str(report)


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
    code = report.failures[0].code
    assert code and code in str(report)
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
    none = checked(RIGHT["gated"], time_limit=0)
    assert none.cases == {} and "cases: none\nthe time limit came before: definition, integers, untouched inputs, same bits twice" in str(none)
    assert one.untried == ()


def test_a_factor_widens_the_bounds_and_is_told() -> None:
    assert checked(BROKEN["half_accumulator"], factor=1e5).passed
    assert "which was multiplied by 2" in str(checked(RIGHT["linear"], factor=2, examples=5))


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"rule": "linaer"}, ValueError, "rule: expected 'linear' or .* or 'softmax_attention', got 'linaer'"),
    ({"layout": "nbhd"}, ValueError, "layout: expected"), ({"dtype": "int8"}, ValueError, "dtype: expected"),
    ({"examples": 0}, ValueError, "examples: expected an integer ≥ 1, got 0"), ({"factor": -1}, ValueError, "factor: expected"),
    ({"backward": 3}, TypeError, "fn: expected a function of arrays"), ({"to": "pandas"}, ValueError, "to: expected 'numpy' or"),
    ({"backward": "autodiff"}, ValueError, "backward: 'autodiff' goes with to='jax' or"), ({"causal": False}, ValueError, "causal: expected True"),
    ({"rule": "linear_attention", "states": True}, ValueError, "states: expected False or None"),
    ({"multiple_of": 0}, ValueError, "multiple_of: expected an integer ≥ 1"), ({"widths": ((0, 1),)}, ValueError, "widths: expected"),
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


@pytest.mark.parametrize(("name", "gradient"), [("dg_shifted", 3), ("softmax_dx_without_the_row", 0), ("linear_dden_missing", 1)])
def test_the_smallest_case_of_a_gradient_is_code_too(name: str, gradient: int) -> None:
    broken = BROKEN[name]
    failure = next(f for f in checked(broken).failures if f.law.startswith("gradients"))
    names: dict[str, Any] = {}
    exec(failure.code, names)                                                    # noqa: S102
    cotangents = [names[n] for n in ("dout", "dstate") if n in names]
    assert broken.backward is not None
    found = broken.backward(*cotangents, *(x for x in failure.case.inputs if x is not None),
                            *([np.zeros_like(names["dstate"])] if failure.case.state is None and "dstate" in names else []))
    right = [x for x in names["gradients"] if x is not None]
    assert not np.allclose(found[gradient], right[gradient])


def test_bfloat16_and_minus_infinity_in_a_case_are_code() -> None:
    pytest.importorskip("ml_dtypes")
    report = checked(BROKEN["nan_at_a_reset"], dtype="bfloat16")
    names: dict[str, Any] = {}
    exec(report.failures[0].code, names)                                         # noqa: S102
    assert np.isneginf(names["g"]).any() and np.isfinite(names["out"]).all()
    assert np.array_equal(names["q"], report.failures[0].case.q.astype(np.float64))


def test_the_package_hands_out_the_checker_and_nothing_else() -> None:
    assert refattn.testing.check_kernel is check_kernel
    with pytest.raises(AttributeError, match="module 'refattn.testing' has no attribute 'check_kernels'"):
        refattn.testing.check_kernels                                            # noqa: B018
