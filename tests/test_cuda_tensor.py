"""The kernels on tensor cores obey the laws of the NumPy forms, within the bounds that `tensor.cu` states; run on the CPU by `refattn.simt`."""
from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn import State, causal_linear_attention, linear_attention, recurrence, vjp
from refattn.causal import causal_masked_backward, causal_masked_forward
from refattn.cuda import launch
from refattn.testing import budgets, laws
from refattn.testing.nvrtc import ARCHS
from refattn.testing.tensor_budget import tensor_budget

KINDS = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Odd sizes; some tiles; the most features and two blocks of columns. Tiles that are mostly padding, of 8 and 4, are in test_cuda.py.
SIZES = [("float16", (37, 21)), ("bfloat16", (37, 21)), ("float16", (64, 64)), ("float16", (128, 100))]
few = settings(max_examples=max(settings().max_examples // 4, 5))


@pytest.fixture(scope="module", autouse=True)
def with_tensor_cores(request):
    if "cp" in request.fixturenames:
        capability = int(request.getfixturevalue("cp").cuda.Device().compute_capability)
        if capability < 80:
            pytest.skip(f"sm_{capability} has no tensor cores for bfloat16")


FORWARD = ["group_states_tc", "scan_states", "group_outputs_tc"]
BACKWARD = ["group_dq_tc", "group_costates_tc", "scan_states", "group_dk_dv_tc"]
NAMES = "out", "S", "z", "dq", "dk", "dv", "dS", "dz"


def run(cp, q, k, v, S=None, z=None, dout=None, dS=None, dz=None, **options):
    """out, S_N, z_N, and with dout all gradients, on the host; an error where the tensor kernels were not chosen, for then nothing is tested."""
    chosen, launched = [], launch.Kernels.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Kernels, "launch", lambda self, name, *rest: (chosen.append(name), launched(self, name, *rest))[1])
        arrays = [None if x is None else cp.asarray(x) for x in (q, k, v, S, z)]
        for name in ("query_lengths", "key_lengths"):
            if name in options:
                options[name] = cp.asarray(options[name].reshape(-1).astype(np.int32))
        *results, residuals = launch.causal_forward(cp, *arrays, **options)
        if dout is not None:
            results += launch.causal_backward(cp, *(cp.asarray(x) for x in (dout, dS, dz)), residuals)
    assert chosen == (FORWARD + BACKWARD * (dout is not None)) * bool(q.size)
    return [x.get() for x in results]


def problem(rng, kind, D, M, N, lead=(2,), H=2, G=1, exact=False):
    """q, k, v, S, z, dout, dS, dz: whole numbers from -1 to 1, or normal ones and a positive z."""
    def array(*shape, of=kind):
        return (rng.integers(-1, 2, shape) if exact else rng.standard_normal(shape)).astype(of)
    S, z = array(*lead, H, D, M, of=np.float32), array(*lead, H, D, of=np.float32)
    return (array(*lead, H * G, N, D), array(*lead, H, N, D), array(*lead, H, N, M), S, z if exact else np.abs(z),
            array(*lead, H * G, N, M), array(*S.shape, of=np.float32), array(*z.shape, of=np.float32))


def exact(q, k, v, S, z, dout, dS, dz, *, feature=0, normalised=False, scale=1.0, eps=0.0, **lengths):
    """The same in float64, by the NumPy forms: num·s / (den·s + ε) = num / (den + ε/s)."""
    q, k, v, S, z, dout, dS, dz = (x.astype(float) for x in (q, k, v, S, z, dout, dS, dz))
    if not normalised:
        (out, end), pullback = vjp(recurrence, q, k, v, None, None, S, scale=scale)
        dq, dk, dv, _, _, dS = pullback(dout, dS)
        return out, end, None, dq, dk, dv, dS, None
    how = {"feature_map": "elu1" if feature else "identity", "eps": eps / scale}
    if lengths:
        out, pullback = vjp(linear_attention, q, k, v, causal=True, **how, **lengths)
        return out, None, None, *pullback(dout), None, None
    (out, end), pullback = vjp(causal_linear_attention, q, k, v, State(S, z), **how)
    dq, dk, dv, start = pullback(dout, State(dS, dz))
    return out, *end, dq, dk, dv, *start


def assert_near(name, got, right, bound):
    """Within the bound and the rounding of the result."""
    budgets.assert_within(got, right, bound + budgets.rounding(np.abs(right) + bound, got.dtype), name)


def assert_right(got, *arrays, **options):
    bounds = tensor_budget(*arrays, **{"feature": 0, "normalised": False, "eps": 0.0, **options})
    for name, x, right in zip(NAMES, got, exact(*arrays, **options)):
        if right is not None:
            assert_near(name, x, right, getattr(bounds, name))


# --- exact laws ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, size", SIZES, ids=str)
@few
@given(st.data())
def test_on_integers_the_tensor_kernels_give_the_bits_of_the_masked_form(cp, dtype, size, data):
    lead, H, G = data.draw(st.sampled_from([((2,), 2, 1), ((), 3, 2), ((), 1, 1)]))
    N = data.draw(st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 64, 65, 100, 256, 257]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    q, k, v, S, z, dout, dS, dz = arrays = problem(rng, KINDS[dtype], *size, N, lead, H, G, exact=True)
    out, end, residuals = causal_masked_forward(q, k, v, S)
    got, got_S, _, dq, dk, dv, dS0, _ = run(cp, *arrays)
    laws.law_equal_bits({"masked": [out, end, *causal_masked_backward(dout, dS, residuals)], "tensor": [got, got_S, dq, dk, dv, dS0]})


@pytest.mark.parametrize("dtype, order", [("float16", "shuffled"), ("bfloat16", "reverse")])
def test_no_order_of_threads_changes_a_bit(simt, order, dtype, rng):
    arrays = problem(rng, KINDS[dtype], 37, 21, 70, G=2)
    usual = run(simt, *arrays, feature=1, normalised=True, eps=1e-6)
    with simt.threads(order, seed=3):
        laws.law_equal_bits({"usual": usual, order: run(simt, *arrays, feature=1, normalised=True, eps=1e-6)})


@pytest.mark.parametrize("dtype", KINDS)
def test_garbage_behind_lengths_reaches_nothing(cp, dtype, rng):
    q, k, v, S, z, dout, dS, dz = problem(rng, KINDS[dtype], 37, 21, 70, G=2)
    S, z, dS, dz = (0 * x for x in (S, z, dS, dz))
    options = {"query_lengths": rng.integers(0, 71, q.shape[:-2]), "key_lengths": rng.integers(0, 71, k.shape[:-2]), "feature": 1,
               "normalised": True, "eps": 1e-6}

    def spoiled(by):
        spoiled = [x.copy() for x in (q, k, v, dout)]
        for x, name in zip(spoiled, ("query_lengths", "key_lengths", "key_lengths", "query_lengths")):
            for at in np.ndindex(x.shape[:-2]):
                x[at][options[name][at]:] = by
        return run(cp, *spoiled[:3], S, z, spoiled[3], dS, dz, **options)

    zeros, garbage = spoiled(0), spoiled(np.nan)
    laws.law_equal_bits({"zeros": zeros, "NaN": garbage})
    behind_q, behind_k = (~budgets._real(options[f"{name}_lengths"], x)[..., 0] for name, x in (("query", q), ("key", k)))
    assert behind_q.any() and behind_k.any()
    for name, x in zip(NAMES, garbage):
        if name in ("out", "dq", "dk", "dv"):
            assert (x[behind_k if name in ("dk", "dv") else behind_q] == 0).all(), name
    assert_right(garbage, q, k, v, S, z, dout, dS, dz, **options)
    v[..., 0, 0] = np.inf                                                        # of a real key: 0 times it would be NaN
    assert (spoiled(np.nan)[0][behind_q] == 0).all()


@pytest.mark.parametrize("dtype", KINDS)
def test_the_future_reaches_no_bit_of_the_past(cp, dtype, rng):
    """However large it is: no power of two that a row is lifted by comes from a later one. 40 is within a chunk."""
    q, k, v, S, z, *_ = problem(rng, KINDS[dtype], 37, 21, 70)
    k[..., 3, :] -= 12                                                           # φ of 2⁻¹⁷, of which half has few bits
    before = run(cp, q, k, v, S, z, feature=1, normalised=True)[0]
    for x, large in ((q, 500), (k, 6e4), (v, 6e4)):
        x[..., 40:, :] = large
    laws.law_equal_bits({"before": [before[..., :40, :]], "after": [run(cp, q, k, v, S, z, feature=1, normalised=True)[0][..., :40, :]]})


@pytest.mark.parametrize("dtype", KINDS)
def test_the_state_is_not_rounded_to_the_dtype(cp, dtype):
    """S is 2ⁿ + 1 and 2ⁿ, both the same in T; their difference must come out. S may also be far beyond the largest half."""
    big = 2.0 ** (13 if dtype == "bfloat16" else 19)
    q, zero = np.zeros((1, 1, 37), KINDS[dtype]), np.zeros((1, 1, 21), KINDS[dtype])
    q[..., :2] = 1, -1
    S = np.zeros((1, 37, 21), np.float32)
    S[0, 0], S[0, 1] = big + 1, big
    assert budgets.unit_roundoff(dtype) * big > 1
    out, end, _ = run(cp, q, 0 * q, zero, S, np.zeros((1, 37), np.float32))
    assert (out == 1).all() and (end == S).all()


@pytest.mark.parametrize("n", [-11, 7])
def test_powers_of_two_in_q_and_k_change_nothing_but_the_exponent(cp, n, rng):
    """Scores of half from 2⁻²² up to 2¹⁸, from below its normal numbers to beyond its largest, where the product of weights is a float."""
    q, k, v, S, z, dout, dS, dz = problem(rng, KINDS["float16"], 37, 21, 70)
    q, k = ((1 + np.abs(x.astype(float)) % 0.5).astype(np.float16) for x in (q, k))
    ratio, by = np.float16(2.0**n), np.float32(2.0**n)
    out, _, _, _, _, dv, *_ = run(cp, q, k, v, S, z, dout, dS, dz, normalised=True)
    other, _, _, _, _, other_dv, *_ = run(cp, q * ratio, k * ratio, v, S * by, z * by, dout, dS / by, dz / by, normalised=True)
    laws.law_equal_bits({"usual": [out, dv], "other": [other, other_dv]})


# --- laws with derived bounds -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, size", SIZES, ids=str)
@few
@given(st.data())
def test_outputs_states_and_gradients_stay_within_the_budget(cp, dtype, size, data):
    lead, H, G = data.draw(st.sampled_from([((2,), 2, 1), ((), 2, 2), ((), 1, 3)]))
    N = data.draw(st.sampled_from([1, 16, 31, 33, 70, 257]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    arrays = problem(rng, KINDS[dtype], *size, N, lead, H, G)
    for options in ({"feature": 1, "normalised": True, "eps": data.draw(st.sampled_from([0.0, 1e-6, 0.5])), "scale": 0.5},
                    {"feature": 0, "normalised": False, "scale": 0.3}):
        assert_right(run(cp, *arrays, **options), *arrays, **options)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size, of", [("small", 2.0**-12), ("large", 2.0**9)])
def test_rows_of_very_small_and_very_large_scores_are_right(cp, dtype, size, of, rng):
    """Half alone would lose most bits of scores of 2⁻²⁴, and has no number for one of 2¹⁸."""
    q, k, v, S, *rest = problem(rng, KINDS[dtype], 37, 21, 70)
    q[..., ::2, :] *= KINDS[dtype].type(of)
    k *= KINDS[dtype].type(of)
    arrays, scale = (q, k, (v / 64).astype(v.dtype), S * np.float32(of), *rest), float(of) ** -2
    got, right, bound = run(cp, *arrays, scale=scale)[0], exact(*arrays, scale=scale)[0], tensor_budget(
        *arrays, feature=0, normalised=False, scale=scale, eps=0).out
    fits = np.abs(right) + bound < float(ml_dtypes.finfo(KINDS[dtype]).max)
    assert fits.mean() > 0.9
    assert_near("out", np.where(fits, got, 0).astype(got.dtype), np.where(fits, right, 0), bound)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("z", [2.0**-20, 2.0**30])
def test_gradients_are_right_where_one_over_den_is_no_number_of_half(cp, dtype, z, rng):
    """c φ(q) is about 2⁻³⁴ or 2¹⁷ and do as much the other way: of such products half has none."""
    q, k, v, S, _, dout, dS, dz = problem(rng, KINDS[dtype], 37, 21, 70)
    arrays = ((q / 8 - 10 * (z < 1)).astype(q.dtype), (k / 8 - 10 * (z < 1)).astype(q.dtype), v, S * np.float32(z),
              np.full(S.shape[:-1], z, np.float32), (dout * min(2.0**10, z)).astype(q.dtype), 0 * dS, 0 * dz)
    assert_right(run(cp, *arrays, feature=1, normalised=True), *arrays, feature=1, normalised=True)


# --- audits, shared memory, choice ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, D, M, N, G", [("float16", 64, 64, 96, 2), ("bfloat16", 64, 64, 64, 1), ("float16", 37, 21, 70, 2),
                                               ("bfloat16", 70, 100, 33, 1)])
def test_audits_find_nothing(simt, dtype, D, M, N, G, rng):
    q, k, v, S, z, *cotangents = problem(rng, KINDS[dtype], D, M, N, (), G=G)
    with simt.audit() as traffic, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "group_rows", lambda heads, N: 32)
        run(simt, q, k, v, S, z, *cotangents, feature=1, normalised=True)
        run(simt, q, k, v, S, z, *cotangents, query_lengths=rng.integers(0, N + 1, q.shape[:-2]), key_lengths=rng.integers(0, N + 1, k.shape[:-2]))
    assert traffic
    if D == M == 64:
        for where, counts in traffic.items():
            if where[1] == "global":
                assert counts.sectors <= 1.01 * counts.ideal_sectors, where
            else:
                assert counts.passes == counts.ideal_passes, where


@pytest.mark.parametrize("width", range(16, 144, 16))
def test_rows_of_tiles_lie_in_different_banks(width):
    """The machine code reads tiles of half by LDSM, 16 bytes of 8 rows at once; those of bfloat16 by 4 bytes a lane, at row l / 4; and writes
    tiles of floats by STS.64, half of a warp at once: row l / 4, pair l % 4."""
    text = Path(launch.__file__).with_name("tensor.cu").read_text(encoding="utf-8")
    more, stage, score = (int(re.search(rf"{name} (\d+)[,;]", text)[1]) for name in (r"ROW = up\(W, 16\) \+", "STAGE_ROW =", r"SCORE_ROW = CHUNK \+"))
    row = 2 * (width + more)
    assert row % 16 == 0 and len({(r * row + b) // 4 % 32 for r in range(8) for b in range(0, 16, 4)}) == 32
    for pitch in (4 * stage, 4 * (32 + score)):
        assert pitch % 16 == 0 and len({(r * pitch + b) // 4 % 32 for r in range(4) for b in range(0, 32, 4)}) == 32


@pytest.mark.parametrize("D, M", [(64, 64), (8, 4), (128, 40)])
def test_shared_memory_is_no_more_than_the_kernels_use(simt, D, M, rng):
    """18 bytes less, one number beyond the padding of a row, and the audit reports the kernel that reaches beyond."""
    arrays = problem(rng, KINDS["float16"], D, M, 40)
    right = launch.tensor_bytes
    for kernel in dict.fromkeys(FORWARD + BACKWARD):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "tensor_bytes", lambda name, *size, kernel=kernel: right(name, *size) - 18 * (name == kernel))
            if kernel == "scan_states" or right(kernel, D, M) == 12032:          # a tile for each warp, of which so small a state needs one
                continue
            with simt.audit(), pytest.raises(RuntimeError, match=f"{kernel.replace('costates', 'states')}.*out of bounds"):
                run(simt, *arrays, feature=1, normalised=True)


@pytest.mark.parametrize("capability, dtype, D, M, chosen", [
    (75, "float16", 64, 64, True), (75, "float16", 128, 128, False), (75, "bfloat16", 64, 64, False), (80, "bfloat16", 128, 128, True),
    (120, "float16", 128, 128, True), (90, "float16", 129, 64, False), (90, "float16", 64, 129, False), (90, "float32", 64, 64, False)])
def test_tensor_cores_are_chosen_where_they_can(capability, dtype, D, M, chosen):
    assert launch.tensor_fits(capability, dtype, D, M) is chosen


@pytest.mark.parametrize("why", ["capability", "dtype", "size"])
def test_what_does_not_fit_takes_the_scalar_kernels(simt, why, rng, monkeypatch):
    arrays = problem(rng, np.float32 if why == "dtype" else KINDS["bfloat16"], 129 if why == "size" else 8, 4, 40)
    called = []
    monkeypatch.setattr(launch.Kernels, "launch", lambda self, name, *rest: called.append(name))
    with simt.capability(75 if why == "capability" else 80):
        *_, residuals = launch.causal_forward(simt, *map(simt.asarray, arrays[:5]))
        launch.causal_backward(simt, *map(simt.asarray, arrays[5:]), residuals)
    assert called[:5] == ["group_states", "scan_states", "group_outputs", "group_dq", "group_costates"] and not any("_tc" in x for x in called)


def test_without_the_headers_of_cuda_the_error_says_what_to_install(simt):
    class NoHeaders:
        def RawModule(self, **options):
            raise RuntimeError('catastrophic error: cannot open source file "mma.h"')

    with pytest.raises(ImportError, match=r"float16: .* mma.h, .* pip install 'cupy-cuda13x\[ctk\]'"):
        launch._kernels.__wrapped__(NoHeaders(), 0, "float16", 8, 4, 0, False, True)
    with pytest.raises(RuntimeError, match="catastrophic"):
        launch._kernels.__wrapped__(NoHeaders(), 0, "float16", 8, 4, 0, False, False)


# --- planted bugs ---------------------------------------------------------------------------------------------------------------------------

def without_barrier(before, indent):
    """What stands in the source, and what is planted there."""
    return f"{before}\n{' ' * indent}__syncthreads();\n", f"{before}\n"


STATES, OUT, DQ, COSTATES, BOTH = "group_states_tc", "group_outputs_tc", "group_dq_tc", "group_costates_tc", "group_dk_dv_tc"
# the bug: (the kernel that it is planted in, what stands in the source, what is planted there, how it shows)
PLANTED = {
    "no barrier before y lies over the tiles of o": (OUT, *without_barrier("? d(start + t) : 0.f;", 4), "race"),
    "no barrier between loading and products": (OUT, *without_barrier("fs[t] = my_f, ds[t] = my_d;", 4), "race"),
    "no barrier between scores and weights": (OUT, *without_barrier("more_n += whole<PY>(ys + j * LD + t, C * LD);", 4), "race"),
    "no barrier between weights and products": (OUT, *without_barrier("lowered[i] = 1 / up;\n    }", 4), "race"),
    "no barrier before the tiles of o lie over weights": (OUT, *without_barrier("n[t] += more_n;", 4), "race"),
    "no barrier before the tiles lie over k and v": (STATES, "  }\n  __syncthreads();\n#pragma", "  }\n#pragma", "race"),
    "no __syncwarp before the next tile": (OUT, "x[1]);\n  __syncwarp();\n}\n__device__", "x[1]);\n}\n__device__", "race"),
    "the fourth tile of scores is read": (OUT, "if (lane <= i)", "if (true)", "uninitialised"),
    "a tile that starts at an odd column": (OUT, "tile, xs + a * LD + w, LD", "tile, xs + a * LD + w + 1, LD", "32 bytes"),
    "the mask hides the diagonal": (OUT, "if (lane <= i)", "if (lane < i)", "wrong"),
    "K is not turned": (OUT, "ColumnsTurned<T>, PX, PY>", "Columns<T>, PX, PY>", "wrong"),
    "the low part of the state is lost": (OUT, "parts + w * LDZ + c, LDZ, WP * LDZ", "parts + w * LDZ + c, LDZ, 0 * LDZ", "wrong"),
    "the low part of the weights is lost": (OUT, "lo = narrow<T>(lifted - widen(hi));", "lo = narrow<T>(0.f);", "wrong"),
    "the low part of φ is lost": (OUT, "put4<4>(at + more, 0, rest)", "put4<4>(at + more, 0, {0, 0, 0, 0})", "wrong"),
    "the parts change before they are read": (
        OUT, "    float more_s", "    split_tiles<WT, VT, LDZ, WP>(parts, stage, raised, state);\n    float more_s", "race"),
    "padding is mapped": (OUT, "c + b < W ? phi<FEATURE>(x[b]) : 0.f", "phi<FEATURE>(x[b])", "wrong"),
    "the power of two is forgotten": (OUT, "near, [&](int i) { return lowered[i]; });", "near, [&](int) { return 1.f; });", "wrong"),
    "keys behind their length": (OUT, "(kh, j, c, j < real_k, x)", "(kh, j, c, j < N, x)", "wrong"),
    "scale outside of the normaliser": (OUT, "inverse(scale * den + eps)", "inverse(den + eps)", "wrong"),
    "the key sum stands still": (OUT, "n[t] += more_n", "n[t] += 0 * more_n", "wrong"),
    "S is not turned": (DQ, "S[(c + b) * M + a]", "S[a * D + c + b]", "wrong"),
    "the sum of keys in dq stands still": (DQ, "s[t] += more_s", "s[t] += 0 * more_s", "wrong"),
    "one over den is forgotten": (DQ, "NORM ? scale * by : scale", "NORM ? scale : scale", "wrong"),
    "the normaliser's path is forgotten": (DQ, "delta[g.head * N + i] = sum", "delta[g.head * N + i] = 0 * sum", "wrong"),
    "no barrier before the first one over den": (COSTATES, "  if (SCALED) __syncthreads();\n", "", "race"),
    "no barrier between loading and a group's state": (COSTATES, *without_barrier("while its place is free", 4), "race"),
    "one over den of the chunk before": (COSTATES, "delta_h[start + t] : 0.f;\n    read_inv(start + C);", "delta_h[start + t] : 0.f;\n", "wrong"),
    "the power of two of c φ(q) stays in a group's state": (COSTATES, "PY, 1>(ys, zs, S, back)", "PY, 1>(ys, zs, S, 1.f)", "wrong"),
    "no barrier before the next k": (BOTH, *without_barrier("start -= C) {", 4), "race"),
    "no barrier between R's parts and products": (BOTH, *without_barrier("(parts, stage, raised, R, d);", 6), "race"),
    "no barrier before the next rows of R": (BOTH, "      if (d > 0) __syncthreads();\n", "", "race"),
    "no barrier before c φ(q) lies over the tiles": (BOTH, *without_barrier("leave_top<T>(tops_q, from_q);", 6), "race"),
    "no barrier between loading c φ(q) and products": (BOTH, *without_barrier("delta[(head + h) * N + start + t] : 0.f;", 6), "race"),
    "no barrier between scores and weights of dk": (BOTH, *without_barrier("whole<PQ>(qs + j * LDK + t, C * LDK);", 6), "race"),
    "no barrier between weights and products of dk": (BOTH, *without_barrier("r[t] += back * more;", 6), "race"),
    "no barrier before the tiles lie over c φ(q)": (BOTH, *without_barrier("(near_k, weights_k, qs);", 6), "race"),
    "the mask of the forward in the backward": (BOTH, "if (lane >= i)", "if (lane <= i)", "uninitialised"),
    "the mask hides the diagonal of dk": (BOTH, "if (lane >= i)", "if (lane > i)", "wrong"),
    "rows behind the last are written": (BOTH, "* DT || i >= g.last) continue", "* DT) continue", "out of bounds|race"),
    "the chunks of the forward in the backward": (
        BOTH, "for (; start >= g.first; start -= C)", "for (start = g.first; start < g.last; start += C)", "wrong"),
    "R is turned": (BOTH, "ColumnsTurned<T>, 1, 2>", "Columns<T>, 1, 2>", "wrong"),
    "the low part of R is lost": (BOTH, "parts + c * LDV + m, LDV, SLICE * LDV", "parts + c * LDV + m, LDV, 0 * LDV", "wrong"),
    "the power of two of c φ(q) stays in R": (BOTH, "(qs, gs, R, back)", "(qs, gs, R, scale)", "wrong"),
    "δ is no part of a score": (BOTH, "scores[n * SCORE_ROW + lane] + fs[lane]", "scores[n * SCORE_ROW + lane]", "wrong"),
    "the normaliser's row of R stands still": (BOTH, "r[t] += back * more", "r[t] += 0 * back * more", "wrong"),
    "dv takes the powers of two of dk": (BOTH, "lowered[C + i]", "lowered[i]", "wrong"),
    "φ' is forgotten": (BOTH, "o_k[n][u][b] * phi_slope<FEATURE>(at[n][u][b])", "o_k[n][u][b]", "wrong"),
    "one over den of the chunk behind": (BOTH, "      else read_inv(0, start - C);\n", "", "wrong"),
    "all heads of a key take the first one's one over den": (BOTH, "read_inv(h + 1, start);  ", "read_inv(0, start);  ", "wrong"),
    "the group's heads are not summed": (BOTH, "h < shared; ++h) {\n      const int real =", "h < 1; ++h) {\n      const int real =", "wrong"),
}


def judged(cp, rng, backward, dtype, D, M):
    """Runs some groups: with φ, normaliser and lengths; with φ, normaliser, state and scale; without."""
    arrays = problem(rng, KINDS[dtype], D, M, 90, (), 2, 2)
    stateless = [0 * x if n in (3, 4, 6, 7) else x for n, x in enumerate(arrays)]
    lengths = {"query_lengths": np.array([90, 50, 90, 3]), "key_lengths": np.array([90, 60])}
    for case, options in ((stateless, {"feature": 1, "normalised": True, **lengths}),
                          (arrays, {"feature": 1, "normalised": True, "scale": 0.25, "eps": 0.5}), (arrays, {"scale": 3.0})):
        try:
            assert_right(run(cp, *case[:None if backward else 5], **options), *case, **options)
        except AssertionError:
            return "wrong"
    return "right"


@pytest.fixture
def groups_of_64(monkeypatch):
    monkeypatch.setattr(launch, "group_rows", lambda heads, N: 64)


@pytest.mark.parametrize("size", [("float16", 37, 21), ("bfloat16", 70, 100)], ids=str)
def test_the_kernels_themselves_pass(simt, size, groups_of_64, rng):
    with simt.audit():
        assert judged(simt, rng, True, *size) == "right"


@pytest.mark.parametrize("bug", PLANTED)
def test_each_planted_bug_is_caught(simt, bug, groups_of_64, monkeypatch, rng):
    kernel, right, wrong, shows = PLANTED[bug]
    source, kernels = launch.source(True), launch._kernels
    assert source.count(right) == 1, "the place where the bug is planted has changed"

    def with_bug(xp, device, *size):
        """All kernels as they are, but one."""
        usual, name = kernels(xp, device, *size), launch.names(*size)[kernel]
        planted = xp.RawModule(code=source.replace(right, wrong), options=("-std=c++17",), name_expressions=(name,)).get_function(name)
        planted.max_dynamic_shared_size_bytes = launch.tensor_bytes(kernel, *size[1:3])
        return usual._replace(functions={**usual.functions, kernel: planted})

    monkeypatch.setattr(launch, "_kernels", with_bug)
    size = ("bfloat16", 70, 100) if "rows of R" in bug else ("float16", 37, 21)      # R over 64 rows is split in two
    backward = kernel not in FORWARD
    if shows == "wrong":
        assert judged(simt, rng, backward, *size) == "wrong"
    else:
        with simt.audit(), pytest.raises(RuntimeError, match=shows):
            judged(simt, rng, backward, *size)


# --- what the compiler says -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", KINDS)
def test_every_instance_compiles_spills_nothing_and_uses_tensor_cores(dtype, arch, wheels, monkeypatch):
    """Where kernels take the most registers, the largest size, too, and no φ; and once neither φ nor normaliser."""
    sizes = [(64, 64, 1, True), *{("sm_120", "bfloat16"): [(64, 64, 0, True), (128, 128, 1, True)],
                                  ("sm_80", "float16"): [(100, 96, 0, False)]}.get((arch, dtype), [])]
    if not launch.tensor_fits(int(arch[3:]), dtype, 64, 64):
        assert (dtype, arch) == ("bfloat16", "sm_75")
        return
    compile_, made = wheels.nvrtc_compile, []
    monkeypatch.setattr(wheels, "nvrtc_compile", lambda *a, **options: made.append(compile_(*a, **options)) or made[-1])
    instances = list(dict.fromkeys(x for size in sizes for x in launch.instances(dtype, *size, True)))
    for row in wheels.cuda_static_table(launch.source(True), instances, [arch]):                          # a warning is a RuntimeError
        assert row["spill_stores"] == row["spill_loads"] == row["stack"] == 0, row
        assert row["blocks"] >= (2 if ", 64, 64," in row["kernel"] and arch != "sm_75" else 1), row
    code = wheels.sass(made[0].cubin)
    for name in (name for name, *_ in instances if "_tc<" in name):
        assert [x for x in code[made[0].lowered[name]] if re.search(r"\bHMMA\.\w+\.F32", x)], name
        assert not [x for x in code[made[0].lowered[name]] if re.search(r"\b(ATOM|ATOMG|RED|ATOMS|LDL|STL)\b", x)], name
