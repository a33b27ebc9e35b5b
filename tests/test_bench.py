"""The bench measures what it says, writes all that it prints, and times nothing that is wrong."""
from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refattn import bench, transformer_bench

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba: pip install 'refattn[numba]'")


def numbers(x: Any) -> list[float]:
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else []
    return [x] if isinstance(x, int | float) else [y for part in parts for y in numbers(part)]


@pytest.mark.parametrize(("options", "tables"), [
    pytest.param([], {"products": 2, "attention": 2, "growth": 1, "memory": 2, "decoding": 2}, id="plain"),
    pytest.param(["--chunks"], {"chunks": 4}, id="chunks"),
    pytest.param(["--rule", "gated", "delta"], {"rules": 6}, id="rules"),
    pytest.param(["--models"], {"training": 1, "decoding": 2}, id="models"),
    pytest.param(["--compiled"], {"products": 2, "attention": 2, "cores": 2, "first calls": 2}, id="compiled", marks=needs_numba),
    pytest.param(["--compiled", "--rule", "gated_delta"], {"rules": 4}, id="compiled rules", marks=needs_numba)])
def test_each_table_is_printed_and_written(options: list[str], tables: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """Without peers, of which a machine may have any: theirs is then a dash."""
    monkeypatch.setattr(bench, "installed_peers", lambda: {})
    assert bench.main([*options, "--smoke", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    if bench.cores() < 2:
        tables = tables | ({"cores": 0} if "cores" in tables else {})
    assert {name: len(rows) for name, rows in figures.items()} == tables
    assert all(math.isfinite(x) and x >= 0 for x in numbers(figures)) and numbers(figures)
    printed = capsys.readouterr().out.splitlines()
    assert "peers: none installed" in printed[0]
    assert sum(line.startswith(" ") for line in printed) == sum(tables.values()) + printed.count("")       # a heading above each table's rows


@needs_numba
def test_a_model_has_the_loops_that_its_column_says() -> None:
    assert transformer_bench._forms() == {"NumPy": False, "compiled": True}


def test_a_row_says_what_its_times_say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, from times that are known: two heads of N = 64 and 128 at D = 8 are 4·2·N·8² flops; at the rate of a 64 × 64
    product in 1 ms, 2·64³ flops, that is 1/16 and 1/8 of a millisecond."""
    seconds = {"gemm": 1e-3, "forward": 2.5e-4, "both": 5e-4, "step": 2e-6, "copy": 5e-7}
    growing = lambda name: float(name.split()[1]) ** 2 if name.split()[0] in ("bare", "attention", "both") and " " in name else seconds[name]
    monkeypatch.setattr(bench, "medians", lambda contest, _: {name: growing(name) for name in contest})
    monkeypatch.setattr(bench, "installed_peers", lambda: {})
    assert bench.main(["--smoke"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line and line[0] in ("1", "64")]
    assert rows == [["64", "0.5", "0.2", "25%", "–", "–", "0.5", "–", "–"], ["64", "0.2", "–", "–", "0.5", "–", "–", "–", "–"],
                    ["64", "4.00", "4.00", "4.00"], ["1", "2.0", "–", "–", "0.5", "4.00×"], ["64", "2.0", "–", "–", "0.5", "4.00×"]]
    assert ["128", "0.5", "0.2", "50%"] in [line[:4] for line in lines]
    assert (bench._ms(0.0015), bench._times(3.0, 2.0)) == ("1.5", "1.50×")


def test_memory_is_what_is_allocated_beyond_the_result() -> None:
    def f() -> np.ndarray:
        both = np.empty(2**20, np.uint8), np.empty(2**19, np.uint8)
        return both[1]

    assert 2**20 <= bench._peak(f) < 2**20 + 2**12


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    x = np.linspace(1, 2, 10, dtype=np.float32)
    bench._check("peer", [x], [x * (1 + 1e-7)], 10)
    with pytest.raises(SystemExit, match="peer gives another answer than refattn: .* nothing is timed"):
        bench._check("peer", [x], [x * (1 + 1e-4)], 10)


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is run before it counts, and no one's runs are all before another's."""
    calls: list[str] = []
    now = 0.0

    def call(name: str, seconds: float) -> None:
        nonlocal now
        calls.append(name)
        now += seconds

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    found = bench.medians({"quick": lambda: call("quick", 0.001), "slow": lambda: call("slow", 0.5)}, 4.0)
    assert found == {"quick": pytest.approx(0.001), "slow": pytest.approx(0.5)}
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert len(turns) > 4 and turns == ["quick", "slow"] * (len(turns) // 2)
    assert calls.count("quick") > 1000 and calls.count("slow") >= 8
