"""`python -m refattn bench --device`, run on the stand-in for CuPy, with a stand-in for torch: who is wrong is not timed."""
from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from refattn import bench as command
from refattn import linear_attention, softmax_attention, vjp
from refattn.cuda import bench

DTYPES = ("float32", "float16", "bfloat16")
SMALL = {"lengths": (40,), "heads": 2, "D": 16, "repeats": 2}


# --- a stand-in for torch: what `bench` uses of it ----------------------------------------------------------------------------------------

class Tensor:
    """`pull` carries a cotangent to the leaves: {id: gradient}."""

    def __init__(self, x, pull=None):
        self.x, self.pull = x, pull or (lambda g: {id(self): g})

    def to(self, dtype):
        return Tensor(self.x.astype(np.float32 if dtype == "bfloat16" else dtype))

    def __add__(self, y):
        return Tensor(self.x + y, self.pull)

    def __getitem__(self, i):
        return Tensor(self.x[i])

    def clone(self):
        return Tensor(self.x)

    def requires_grad_(self):
        return self

    detach = float = cpu = requires_grad_

    def numpy(self):
        return self.x.astype(np.float32)


def applied(function, q, k, v, causal=True, **options):
    """refattn's function on tensors, with its pullback as the tape."""
    out, pullback = vjp(function, q.x, k.x, v.x, causal=causal, **options)
    return Tensor(out, lambda g: {leaf: y for x, dx in zip((q, k, v), pullback(g), strict=True) for leaf, y in x.pull(dx).items()})


def elu(x):
    exp = np.exp(np.minimum(x.x, 0))
    return Tensor(np.where(x.x > 0, x.x, exp - 1), lambda g: x.pull(g * np.where(x.x > 0, 1, exp)))


def sdpa(q, k, v, is_causal):
    assert is_causal
    return applied(softmax_attention, q, k, v)


def fla(q, k, v, scale, normalize):
    """In its layout, (B, N, H, D); q and k are mapped already, and relu leaves what is positive as it is."""
    assert scale == 1 and normalize

    def swapped(x):
        return Tensor(x.x.swapaxes(1, 2), lambda g: x.pull(g.swapaxes(1, 2)))
    return swapped(applied(linear_attention, *map(swapped, (q, k, v)), feature_map="relu")), None


def torch_like(sdpa=sdpa, grad=lambda g: g):
    def gradients(out, leaves, dout):
        found = out.pull(dout.x)
        return [Tensor(grad(found[id(leaf)])) for leaf in leaves]
    return SimpleNamespace(float32="float32", float16="float16", bfloat16="bfloat16", from_dlpack=lambda x: Tensor(x.get()), no_grad=nullcontext,
                           autograd=SimpleNamespace(grad=gradients),
                           nn=SimpleNamespace(functional=SimpleNamespace(scaled_dot_product_attention=sdpa, elu=elu)))


# --- who is timed ---------------------------------------------------------------------------------------------------------------------------

def test_each_contestant_is_checked_and_timed_and_drawn(simt, tmp_path, capsys):
    figure = tmp_path / "times.png"
    rows = bench.device_report(simt, **SMALL, figure=str(figure), peers={"torch": torch_like(), "fla": fla})["device"]
    names = [bench.COPY, bench.OURS, bench.ARRAY, bench.SDPA, bench.FLA]
    assert [(row["dtype"], row["contestant"]) for row in rows] == [(dtype, name) for dtype in DTYPES for name in names]
    assert all(row["forward"] > 0 and row["both"] > 0 for row in rows)
    assert all((0 < row["ratio"] <= 1) == (row["contestant"] != bench.COPY) for row in rows)
    assert json.loads(json.dumps(rows)) == rows and figure.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "not timed" not in said and all(name in said for name in names)


def test_those_that_are_not_installed_get_one_line(simt, capsys):
    rows = bench.device_report(simt, **SMALL, dtypes=("float32",), peers={})["device"]
    assert [row["contestant"] for row in rows] == [bench.COPY, bench.OURS, bench.ARRAY]
    said = capsys.readouterr().out
    assert [said.count(f"{name}: not installed, or no torch with CUDA; not timed\n") for name in (bench.SDPA, bench.FLA)] == [1, 1]


WRONG = {   # the contestant, what it does, what is said
    "sees the future": (bench.SDPA, {"sdpa": lambda q, k, v, is_causal: applied(softmax_attention, q, k, v, causal=False)},
                        "out is not that of softmax_attention"),
    "another scale": (bench.SDPA, {"sdpa": lambda q, k, v, is_causal: applied(softmax_attention, q, k, v, scale=1)},
                      "out is not that of softmax_attention"),
    "gradients of half the size": (bench.FLA, {"grad": lambda g: g / 2}, "dq is not that of linear_attention"),
    "NaN": (bench.FLA, {"grad": lambda g: np.nan * g}, "dq is not that of linear_attention: inf times the bound"),
    "no φ": (bench.FLA, {"fla": lambda q, k, v, **options: fla(q + -1, k + -1, v, **options)}, "out is not that of linear_attention"),
    "other arguments": (bench.FLA, {"fla": lambda q, k, v: v}, "TypeError: .* unexpected keyword argument"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_contestant_is_named_and_never_timed(simt, fault, dtype, monkeypatch, capsys):
    name, planted, said = WRONG[fault]
    timed, median = [], bench._median
    monkeypatch.setattr(bench, "_median", lambda cp, f, repeats: timed.append(f) or median(cp, f, repeats))
    wrong = {key: x for key, x in planted.items() if key != "fla"}
    rows = bench.device_report(simt, **SMALL, dtypes=(dtype,), peers={"torch": torch_like(**wrong), "fla": planted.get("fla", fla)})["device"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"{name}: not timed" in line]
    assert re.search(said, line)
    assert name not in [row["contestant"] for row in rows] and len(timed) == 2 * len(rows)


def test_a_wrong_result_of_ours_ends_it(simt, monkeypatch):
    right = bench._ours
    with monkeypatch.context() as patch:
        patch.setattr(bench, "_worst_ratio", lambda *a: 1.5)
        patch.setattr(bench, "_median", lambda *a: pytest.fail("timed"))
        with pytest.raises(RuntimeError, match="float32, N = 40: the result is 1.5 times its bound off; nothing is timed"):
            bench.device_report(simt, **SMALL, peers={})
    monkeypatch.setattr(bench, "_ours", lambda q, k, v, dout: right(q, k, q, dout))
    with pytest.raises(RuntimeError, match="out is not that of linear_attention"):
        bench.device_report(simt, **SMALL, peers={})


def test_a_median_takes_the_runs_it_is_given_or_a_second():
    for milliseconds, runs in ((1.0, 20), (2000.0, 3), (90.0, 12)):
        calls = []
        event = lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        cp = SimpleNamespace(cuda=SimpleNamespace(Event=event, get_elapsed_time=lambda start, end, t=milliseconds: t))
        assert bench._median(cp, lambda calls=calls: calls.append(1), 20) == milliseconds
        assert len(calls) == 3 + runs                                                              # three to warm up


def test_the_figure_has_a_line_for_each_contestant(monkeypatch, tmp_path):
    figures, Figure = [], bench._matplotlib()
    monkeypatch.setattr(bench, "_matplotlib", lambda: lambda **options: figures.append(Figure(**options)) or figures[0])
    rows = [{"dtype": dtype, "N": N, "contestant": name, "forward": N * f, "both": 3 * N * f}
            for dtype in DTYPES[:2] for name, f in ((bench.COPY, 1), (bench.OURS, 2)) for N in (16, 64) if (dtype, N, f) != ("float16", 64, 2)]
    bench.device_figure(rows, str(tmp_path / "times.svg"))
    panels = figures[0].axes
    assert [x.get_title() for x in panels] == [f"{what}, {dtype}" for what in ("forward", "forward + backward") for dtype in DTYPES[:2]]
    assert {(x.get_xscale(), x.get_yscale()) for x in panels} == {("log", "log")}
    drawn = [[(line.get_label(), *map(list, line.get_data())) for line in x.lines] for x in panels]
    copy, ours = (bench.COPY, [16, 64]), (bench.OURS, [16, 64])
    assert drawn == [[(*copy, [16, 64]), (*ours, [32, 128])], [(*copy, [16, 64]), (bench.OURS, [16], [32])],
                     [(*copy, [48, 192]), (*ours, [96, 384])], [(*copy, [48, 192]), (bench.OURS, [16], [96])]]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [bench.COPY, bench.OURS]
    assert "<svg" in (tmp_path / "times.svg").read_text(encoding="utf-8")


# --- what is missing, and the command -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module, extra", [("cupy", "cuda13x"), ("matplotlib.figure", "demo"), ("ml_dtypes", "bf16")])
def test_a_missing_package_is_named_before_anything_is_timed(module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(bench, "_worst_ratio", lambda *a: pytest.fail("began"))
    with pytest.raises(ImportError, match=extra):
        bench.device_report(None if module == "cupy" else SimpleNamespace(), figure="times.png", peers={})


def test_peers_are_those_installed_with_cuda(monkeypatch):
    torch, ops = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)), SimpleNamespace(chunk_linear_attn=fla)
    for modules, expected in (((None, None), {}), ((torch, None), {"torch": torch}), ((torch, ops), {"torch": torch, "fla": fla})):
        for name, module in zip(("torch", "fla.ops.linear_attn"), modules, strict=True):
            monkeypatch.setitem(sys.modules, name, module)
        for parent in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, parent, SimpleNamespace(__path__=[]))
        assert bench._peers() == expected
    torch.cuda.is_available = lambda: False
    assert bench._peers() == {}


def test_the_command_writes_json_and_hands_the_figure_on(monkeypatch, tmp_path, capsys):
    given = {}
    monkeypatch.setattr(bench, "device_report", lambda **options: given.update(options) or {"device": []})
    path = tmp_path / "times.json"
    assert command.main(["--device", "--json", str(path), "--figure", "times.png", "--lengths", "64", "--heads", "2"]) == 0
    assert json.loads(path.read_text(encoding="utf-8")) == {"device": []}
    assert given == {"lengths": [64], "heads": 2, "D": 64, "figure": "times.png"}
    with pytest.raises(SystemExit) as end:
        command.main(["--figure", "times.png"])
    assert end.value.code == 2 and "--figure: expected --device beside it" in capsys.readouterr().err
