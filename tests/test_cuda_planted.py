"""Every planted bug in the kernels is caught, each by the detector that should: so a clean audit and a passed law mean something."""
from __future__ import annotations

import numpy as np
import pytest

from refattn import linear_attention, oracle, vjp
from refattn.cuda import launch
from refattn.testing import budgets

FORWARD, BACKWARD = ("group_states", "scan_states", "group_outputs"), None
SYNC = "__syncthreads();\n"
KEYS = "return number<D, FEATURE>(kh, j, a, real_k); },\n      [&](int, int j, int c, const A*) { return number<M>(vh"
SCORES = "const int row = t / H, col = t % H;\n        A score[2][2] = {};\n        dot_rows<H, H, WP, LD, LD>(xs, ys, row, col, score);"
STATE = "* groups + g.nth) * STATE_SIZE<D, M>;\n  const T *qh = q + g.head * N * D, *kh = k + kv * N * D, *vh = v + kv * N * M;\n"

# the bug: (what stands in the source, what is planted there, how far to run, how it shows)
PLANTED = {
    "no barrier between loading and scores": (
        "fs[t] = f(g, start + t);\n      " + SYNC, "fs[t] = f(g, start + t);\n", FORWARD, "race"),
    "no barrier between scores and outputs": (
        "      }\n      " + SYNC + "      if constexpr (NORM)\n", "      }\n      if constexpr (NORM)\n", FORWARD, "race"),
    "no barrier before the next chunk": (
        "        s[t] = more;\n      }\n      " + SYNC, "        s[t] = more;\n      }\n", FORWARD, "race"),
    "no barrier between loading and a group's state": (
        "dden_h[start + t] : A(1);\n    " + SYNC, "dden_h[start + t] : A(1);\n", FORWARD, "race"),
    "no barrier after a chunk of a group's state": (
        "sum += ys[j * LDY + t] * e[j];\n    " + SYNC, "sum += ys[j * LDY + t] * e[j];\n", FORWARD, "race"),
    "dden read before it is there": (
        "      e(start, xs, es);\n      " + SYNC, "      e(start, xs, es);\n", BACKWARD, "race"),
    "no barrier before the first chunk of a group's costate": (
        "  if (NORM && TRANSPOSE) " + SYNC, "", BACKWARD, "race"),
    "every block of columns writes 1 / den": (
        "if (column == 0 && c == 0) inv[", "if (c == 0) inv[", FORWARD, "blocks run in any order"),
    "the state is not loaded": ("  S0(state);\n", "", FORWARD, "uninitialised"),
    "columns that round up are not cleared": ("  clear_beyond<C, W, LD>(xs);\n", "", FORWARD, "uninitialised"),
    "rows behind the last are written": (
        "        if (i >= g.last) return;\n        if constexpr (NORM) {", "        if constexpr (NORM) {", FORWARD, "out of bounds|race"),
    "keys behind the last are read": (KEYS, KEYS.replace("real_k", "N + 1", 1), FORWARD, "out of bounds"),
    "scores far below the tile": (
        SCORES, SCORES.replace("t / H", "t / H + 40 * C").replace("row, col, s", "row - 40 * C, col, s"), FORWARD, "out of bounds"),
    "half of the block at a barrier": (
        "      e(start, xs, es);\n      " + SYNC, "      e(start, xs, es);\n      if (t < 128) " + SYNC, BACKWARD, "diverge|barrier"),
    "a shuffle that half of the warp never reaches": (
        "sum = warp_sum(sum);\n          if (lane == 0) den[row] = sum;",
        "if (lane < 16) sum = warp_sum(sum);\n          if (lane == 0) den[row] = sum;", FORWARD, "__shfl_xor_sync"),
    "four numbers read from an odd address": ("read4(Z + (w + e) * LDZ + c, z)", "read4(Z + (w + e) * LDZ + c + 1, z)", FORWARD, "misaligned"),
    "the mask hides the diagonal": ("(REVERSE ? b < a : b > a)", "(REVERSE ? b < a : b >= a)", FORWARD, "wrong"),
    "sums up to and with the group": (
        "    own[group * size] = sum;\n    sum += more;", "    sum += more;\n    own[group * size] = sum;", FORWARD, "wrong"),
    "the scan from the end starts at the front": ("reverse ? groups - 1 - step : step", "step", BACKWARD, "wrong"),
    "all groups take the first one's state": ("(kv " + STATE, "(kv " + STATE.replace("+ g.nth", "+ 0", 1), FORWARD, "wrong"),
    "queries behind their length are read": ("(qh, i, a, real_q); },", "(qh, i, a, N); },", FORWARD, "NaN"),
    "φ' of the wrong side": ("else return x > 0 ? A(1) : exp(x);", "else return x < 0 ? A(1) : exp(x);", BACKWARD, "wrong"),
    "the normaliser's path is forgotten": ("sum -= xs[r * STRIDE<M> + a]", "sum += 0 * xs[r * STRIDE<M> + a]", BACKWARD, "wrong"),
    "all heads of a key take the first one's 1 / den": ("      if (g + 1 < shared) read_inv(g + 1, start);\n", "", BACKWARD, "wrong"),
    "the group's heads are not summed": ("g < shared; ++g) more += own", "g < 1; ++g) more += own", BACKWARD, "wrong"),
    "the mask of the forward in the backward": ("(REVERSE ? b < a : b > a)", "(b > a)", BACKWARD, "wrong"),
}


def problem(rng):
    """Two groups of positions, one of them of two chunks, two heads for each key head, M beyond one block of columns, and sizes that fill no tile."""
    q, k, v, dout = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 75, 6), (1, 75, 6), (1, 75, 70), (2, 75, 70)))
    return q, k, v, dout


def judged(cp, rng, direction):
    """Runs forward, and backward if asked; what is wrong with the results, in a word."""
    q, k, v, dout = problem(rng)
    lengths = {"query_lengths": np.array([75, 71]), "key_lengths": np.array([75])}
    spoiled = q.copy()
    spoiled[1, 71:] = np.nan
    out, pullback = vjp(linear_attention, *(cp.asarray(x) for x in (spoiled, k, v)), causal=True, **lengths)
    expected, exact = vjp(linear_attention, *(x.astype(float) for x in (q, k, v)), causal=True, **lengths)
    zero = np.zeros((1, 6, 70))
    b = budgets.attention_budget(q, k, v, zero, zero[..., 0], dout, zero, zero[..., 0], phi=oracle.eq7,
                                 dphi=lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0))), **lengths)
    results = [(out, expected, b.out)]
    if direction is BACKWARD:
        results += zip(pullback(cp.asarray(dout)), exact(dout.astype(float)), (b.dq, b.dk, b.dv), strict=True)
    for got, right, bound in results:
        if np.isnan(got.get()).any():
            return "NaN"
        if budgets.worst_ratio(got.get(), right, bound) > 1:
            return "wrong"
    return "right"


def only(names, wanted):
    return lambda *a: {name: expression for name, expression in names(*a).items() if wanted is None or name in wanted}


def test_the_kernels_themselves_pass(simt, small_groups, rng):
    with simt.audit():
        assert judged(simt, rng, BACKWARD) == "right"


@pytest.mark.parametrize("bug", PLANTED)
def test_each_planted_bug_is_caught(simt, bug, small_groups, monkeypatch, rng):
    right, wrong, direction, shows = PLANTED[bug]
    source, names = launch.source(), launch.names
    assert source.count(right) == 1, "the place where the bug is planted has changed"
    monkeypatch.setattr(launch, "source", lambda tensor: source.replace(right, wrong))
    monkeypatch.setattr(launch, "names", only(names, direction))
    if shows in ("wrong", "NaN"):
        assert judged(simt, rng, direction) == shows
    else:
        with simt.audit(), pytest.raises(RuntimeError, match=shows):
            judged(simt, rng, direction)
