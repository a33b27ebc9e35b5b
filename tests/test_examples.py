"""The examples run by themselves, and what they print is true."""
from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from refattn import oracle
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
