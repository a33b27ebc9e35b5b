"""Laws of streams: blocks are the whole, a kill leaves no trace, memory does not grow, and the error of a compensated state does not either."""
from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import State, causal_linear_attention, oracle
from refattn.experiment import results_load
from refattn.streaming import Stream, stream_drift, stream_load, stream_run, stream_save, stream_step, two_sum
from refattn.testing import laws
from refattn.testing.budgets import PHI_ROUNDINGS, gamma, unit_roundoff

EXAMPLE = Path(__file__).parent.parent / "examples" / "10_a_hundred_million_positions.py"
seeds = st.integers(0, 2**32 - 1)
both_kinds = pytest.mark.parametrize("compensated", [False, True])
U = unit_roundoff("float32")


def streamed(q, k, v, block, **options):
    stream, outs = Stream(), []
    for a in range(0, k.shape[-2], block):
        out, stream = stream_step(stream, *(x[..., a:a + block, :] for x in (q, k, v)), **options)
        outs.append(out)
    return np.concatenate(outs, -2), stream


@given(seeds)
def test_two_sum_loses_nothing_that_two_numbers_can_hold(seed):
    """Without a second number before, S + x is kept whole; with one, to 2u² of the sum. float64 holds the sums of these numbers exactly."""
    rng = np.random.default_rng(seed)
    S, x = (np.ldexp(rng.standard_normal(100), rng.integers(-8, 9, 100)).astype(np.float32) for _ in "12")
    high, low = two_sum(S, np.zeros_like(S), x)
    assert (high.astype(float) + low == S.astype(float) + x).all() and (high == S + x).all()
    again = two_sum(high, low, x[::-1])
    exact = high.astype(np.longdouble) + low + x[::-1]
    error = np.abs(again[0].astype(np.longdouble) + again[1] - exact)
    assert (error <= 2 * U**2 * np.abs(exact)).all()
    assert (np.abs(again[1]) <= U * np.abs(again[0])).all()


@both_kinds
@given(seeds, st.integers(1, 40), st.integers(1, 70))
def test_blocks_are_the_whole_bit_for_bit_on_integers(compensated, seed, block, N):
    rng = np.random.default_rng(seed)
    q, k = rng.integers(0, 3, (2, 4, N, 3)).astype(np.float32)
    v = rng.integers(-2, 3, (2, N, 5)).astype(np.float32)
    k = k[:2]
    out, stream = streamed(q, k, v, block, compensated=compensated, feature_map="identity", eps=0.5)
    whole, end = causal_linear_attention(q, k, v, feature_map="identity", eps=0.5)
    laws.law_equal_bits({"whole": [whole, *end], "blocks": [out, *stream.state]})
    assert stream.position == N and (stream.rest is None) != compensated and stream_drift(stream) == {"S": 0.0, "z": 0.0}
    laws.law_equal_bits({"in float32": [x.astype(float) for x in end], "in float64": stream.exact})


def table(seed=0, H=2, D=3):
    return np.random.default_rng(seed).standard_normal((3, H, 256, D)).astype(np.float32)


def errors(tokens, block, compensated, marks):
    """The errors of [S | z] as a part of Σ|φ(k)||v|, at each mark: against the sums that the counts of the tokens give, in float64."""
    q, k, v = table()
    phi = oracle.eq7(k.astype(float))
    ones = np.concatenate([v.astype(float), np.ones((*v.shape[:-1], 1))], -1)
    stream, found = Stream(), {}
    for a in range(0, len(tokens), block):
        here = tokens[a:a + block]
        _, stream = stream_step(stream, q[:, here], k[:, here], v[:, here], compensated=compensated)
        if stream.position in marks:
            weighed = np.bincount(tokens[:stream.position], minlength=256)[:, None] * phi
            exact, size = weighed.mT @ ones, weighed.mT @ np.abs(ones)
            state = [x.astype(float) + (0 if r is None else r) for x, r in zip(stream.state, stream.rest or (None, None), strict=True)]
            judged = np.concatenate([stream.exact.S, stream.exact.z[..., None]], -1)
            assert (np.abs(judged - exact) <= gamma(2 * len(tokens), np.float64) * size).all(), "the state in float64 is not"
            found[stream.position] = float((np.abs(np.concatenate([state[0], state[1][..., None]], -1) - exact) / size).max())
    return found


def bound(block, N):
    """γ_{B+p} + 2 T u² and u: see `streaming`; p is of φ, of the product, and of the float64 sums that judge."""
    return gamma(block + PHI_ROUNDINGS + 1, np.float32) + 2 * (N / block) * U**2 + gamma(2 * N, np.float64)


@pytest.mark.parametrize("kind", ["random", "one token"])
def test_the_error_of_a_compensated_state_does_not_grow_with_the_sequence(kind):
    """It stays under a bound that N hardly enters; a plain state passes that bound, on a token that repeats by more than ten times."""
    N, block = 2**18, 128
    tokens = np.random.default_rng(1).integers(0, 256, N) if kind == "random" else np.full(N, 7)
    marks = {2**i for i in range(7, 19)}
    kept, plain = (errors(tokens, block, compensated, marks) for compensated in (True, False))
    assert bound(block, N) < 1.01 * bound(block, block)
    for n in marks:
        assert kept[n] <= bound(block, n), f"{n} positions: {kept[n]:.2e}, bound {bound(block, n):.2e}"
    assert kept[N] <= 2 * max(kept[n] for n in marks if n <= N // 256) + 2 * U
    if kind == "one token":
        assert plain[N] > 10 * bound(block, N) and plain[N] > 20 * kept[N]
    else:
        assert plain[N] > 5 * kept[N]


def read_tokens(tokens):
    q, k, v = table()
    return lambda rows: (q[:, tokens[rows]], k[:, tokens[rows]], v[:, tokens[rows]])


def same(a, b):
    assert (a.position, a.digest, [{**r, "seconds": 0} for r in a.history]) == (b.position, b.digest, [{**r, "seconds": 0} for r in b.history])
    pairs = [(x, y) for p in ("state", "rest", "exact") for x, y in zip(getattr(a, p) or (), getattr(b, p) or (), strict=True)]
    assert len(pairs) in (4, 6) and all(x.tobytes() == y.tobytes() and x.dtype == y.dtype for x, y in pairs)


@both_kinds
@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_a_stream_that_was_cut_short_ends_with_the_same_bits(compensated, at, tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("tqdm")
    tokens, written = np.random.default_rng(2).integers(0, 256, 1250), np.zeros((2, 1250, 3), np.float32)
    read, options = read_tokens(tokens), {"block": 100, "compensated": compensated}
    whole = stream_run(tmp_path / "whole", read, 1250, {"x": 1}, **options)

    def read_or_stop(rows):
        if rows.start == 100 * at:
            raise KeyboardInterrupt
        return read(rows)

    def write(rows, out):
        written[:, rows] = out

    with pytest.raises(KeyboardInterrupt):
        stream_run(tmp_path / "cut", read_or_stop, 1250, {"x": 1}, write=write, **options)
    assert os.path.exists(tmp_path / "cut") == (at > 0)
    rest = stream_run(tmp_path / "cut", read, 1250, {"x": 1}, write=write, **options)
    same(whole, rest)
    same(whole, stream_run(tmp_path / "cut", read_or_stop, 1250, {"x": 1}, **options))             # it is done: nothing is read
    out, _ = streamed(*read(slice(None)), 100, compensated=compensated)
    assert out.tobytes() == written.tobytes()


def test_when_the_time_is_up_it_stops_and_goes_on(tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("tqdm")
    read = read_tokens(np.arange(1000) % 256)
    stopped = stream_run(tmp_path / "cut", read, 1000, {}, block=10, seconds=0.0)
    assert stopped.position == 0
    same(stream_run(tmp_path / "whole", read, 1000, {}, block=10), stream_run(tmp_path / "cut", read, 1000, {}, block=10))


def test_a_checkpoint_is_resumed_by_the_same_plan_alone(tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("tqdm")
    read = read_tokens(np.arange(200) % 256)
    stream_run(tmp_path / "x", read, 100, {"seed": 1}, block=50)
    for change in ({"plan": {"seed": 2}}, {"block": 25}, {"compensated": True}):
        options = {"plan": {"seed": 1}, "block": 50} | change
        with pytest.raises(ValueError, match=r"a stream with .*\(now"):
            stream_run(tmp_path / "x", read, 200, **options)
    stream = stream_load(tmp_path / "x", {"seed": 1, "block": 50, "compensated": False})
    stream_save(tmp_path / "y", stream, {})
    same(stream, stream_load(tmp_path / "y", {}))


def test_memory_does_not_grow_with_the_stream(tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("tqdm")

    def peak(N):
        tracemalloc.start()
        stream_run(tmp_path / str(N), read_tokens(np.zeros(N, np.uint8)), N, {}, block=256, rows=2)
        peak = tracemalloc.get_traced_memory()[1] - N                             # the tokens themselves
        tracemalloc.stop()
        return peak

    peak(2**10)
    assert peak(2**16) < peak(2**12) + 2**16                                      # less than half a block


def test_keys_in_float64_are_refused():
    one = np.ones((4, 1))
    with pytest.raises(TypeError, match="k: expected float32, got float64"):
        stream_step(Stream(), one, one, one)


def test_drift_is_told_of_the_state_that_is_carried():
    S = State(np.float32([[1.0]]), np.float32([2.0]))
    exact = State(np.array([[1.5]]), np.array([2.0]))
    assert stream_drift(Stream(1, S, None, exact)) == {"S": 0.5 / 1.5, "z": 0.0}
    assert stream_drift(Stream(1, S, State(np.float32([[0.5]]), np.float32([1.0])), exact)) == {"S": 0.0, "z": 0.5}


# --- the example -------------------------------------------------------------------------------------------------------------------------

def run_example(monkeypatch, folder, *more):
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--smoke", "--out", str(folder), *more])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return results_load(folder / "smoke.json")


def test_10_a_hundred_million_positions(monkeypatch, tmp_path, capsys):
    for module in ("safetensors", "tqdm", "matplotlib"):
        pytest.importorskip(module)
    run_example(monkeypatch, tmp_path / "a")
    results = run_example(monkeypatch, tmp_path / "a", "--compensated")
    assert list(results) == ["plain", "compensated"] and (tmp_path / "a" / "smoke.png").stat().st_size > 1000
    last = {kind: record["history"][-1] for kind, record in results.items()}
    assert all(row["position"] == 200_000 for row in last.values()) and last["plain"]["z"] > 5 * last["compensated"]["z"]
    printed = capsys.readouterr().out
    assert f"CRC-32 of all outputs {results['plain']['digest']:08x}" in printed and "200,000 positions: drift of S" in printed
    # the same, killed without warning as soon as there is a checkpoint
    command = [sys.executable, str(EXAMPLE), "--smoke", "--out", str(tmp_path / "b"), "--every", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(EXAMPLE.parent.parent)})
    while process.poll() is None and not (tmp_path / "b" / "smoke-plain.safetensors").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
    again = run_example(monkeypatch, tmp_path / "b")
    assert again["plain"]["digest"] == results["plain"]["digest"]
    drifts = [[{**row, "seconds": 0} for row in r["plain"]["history"]] for r in (results, again)]
    assert drifts[0] == drifts[1]
