"""The CUDA kernels, run on the CPU by `refattn.simt`: the public functions on (stand-in) CuPy arrays obey the laws of the NumPy ones."""
from __future__ import annotations

from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn import State, causal_linear_attention, causal_linear_attention_step, linear_attention, oracle, recurrence, softmax_attention, vjp
from refattn.causal import causal_masked_backward, causal_masked_forward
from refattn.cuda import launch
from refattn.softmax import softmax_step
from refattn.testing import budgets, laws
from refattn.testing.softmax_budget import softmax_forward_budget
from refattn.testing.tensor_budget import tensor_budget

# One size for each dtype, so that a kernel is compiled once: D ≠ M, neither a multiple of 4, one row longer than a tile's columns
SIZES = {"float64": (5, 7), "float32": (6, 5), "float16": (8, 4), "bfloat16": (8, 4)}
# float16 and bfloat16 take the tensor cores, and the other kernels where these are not there
KERNELS = [*SIZES, "float16 without tensor cores", "bfloat16 without tensor cores"]
few = settings(max_examples=max(settings().max_examples // 4, 5))
seeds = st.integers(0, 2**32 - 1)


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


@contextmanager
def kernels_of(cp, kernels):
    """The dtype, and whether it takes the tensor cores."""
    dtype, _, without = kernels.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if without:
            patch.setattr(launch, "tensor_fits", lambda *a: False)
        yield dtype, launch.tensor_fits(int(cp.cuda.Device().compute_capability), dtype, *SIZES[dtype])


def attention_bounds(tensor, *arrays, **options):
    """A bound on the error of each result: the budget of sums in the accumulator; or that of sums of parts, before the result is rounded."""
    if tensor:
        return tensor_budget(*arrays, **options)
    return budgets.attention_budget(*arrays, phi=oracle.eq7, dphi=slope, **options)


def assert_near(tensor, name, x, right, bound):
    budgets.assert_within(x, right, bound + (budgets.rounding(np.abs(right) + bound, x.dtype) if tensor else 0), name)


@st.composite
def problems(draw, dtype, exact=False, size=None):
    """q, k, v, S, dout, dS for the dtype's size: heads and groups as they come, N at the edges of a chunk and of a group of chunks."""
    D, M = size or SIZES[dtype]
    lead, H, G = draw(st.sampled_from([((2,), 2, 1), ((), 3, 2), ((2,), 1, 3), ((), 1, 1)]))
    N = draw(st.sampled_from([0, 1, 15, 16, 17, 31, 32, 33, 70, 255, 256, 257, 300]))
    rng = np.random.default_rng(draw(seeds))
    kind, acc = dtype_of(dtype), "float64" if dtype == "float64" else "float32"

    def array(*shape, of=kind):
        return (rng.integers(-1, 2, shape) if exact else rng.standard_normal(shape)).astype(of)

    return (array(*lead, H * G, N, D), array(*lead, H, N, D), array(*lead, H, N, M), array(*lead, H, D, M, of=acc),
            array(*lead, H * G, N, M), array(*lead, H, D, M, of=acc)), rng


def to_device(cp, *arrays):
    return [None if x is None else cp.asarray(x) for x in arrays]


def to_host(*arrays):
    return [None if x is None else x.get() for x in arrays]


def slope(x):
    return np.where(x > 0, 1.0, np.exp(np.minimum(x, 0)))


# --- exact laws ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernels", KERNELS)
@few
@given(st.data())
def test_on_integers_the_kernels_give_the_bits_of_the_masked_form(cp, kernels, data):
    with kernels_of(cp, kernels) as (dtype, _):
        (q, k, v, S, dout, dS), _ = data.draw(problems(dtype, exact=True))
        (got, state), pullback = vjp(recurrence, *to_device(cp, q, k, v), None, None, cp.asarray(S))
        dq, dk, dv, _, _, dS0 = pullback(*to_device(cp, dout, dS))
    out, end, residuals = causal_masked_forward(q, k, v, S)
    laws.law_equal_bits({"masked": [out, end, *causal_masked_backward(dout, dS, residuals)],
                         "kernels": to_host(got, state, dq, dk, dv, dS0)})


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_no_order_of_threads_changes_a_bit(simt, order, rng):
    cp = simt
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 70, 6), (2, 70, 6), (2, 70, 5), (2, 70, 5))]

    def run():
        (out, end), pullback = vjp(causal_linear_attention, *to_device(cp, *arrays[:3]))
        return to_host(out, *end, *pullback(cp.asarray(arrays[3]))[:3])

    forward = run()
    with cp.threads(order, seed=3):
        laws.law_equal_bits({"forward": forward, order: run()})


def test_the_naive_and_the_sequential_kernel_give_the_same_bits_on_integers(cp, rng):
    q, k, v = (rng.integers(-2, 3, (4, 40, n)).astype(np.float32) for n in (6, 6, 5))
    module = cp.RawModule(code=launch.source(), options=("-std=c++17",),
                          name_expressions=("causal_naive<float, 6, 5, 0, false>", "causal_sequential<float, 6, 5, 0, false>"))
    f4, i4 = np.float32, np.int32
    naive, sequential = cp.empty(v.shape, dtype=f4), cp.empty(v.shape, dtype=f4)
    arrays = to_device(cp, q, k, v)
    module.get_function("causal_naive<float, 6, 5, 0, false>")((-(-4 * 40 * 5 // 256),), (256,), (
        *arrays, naive, i4(40), np.int64(4), i4(1), f4(1), f4(0)))
    module.get_function("causal_sequential<float, 6, 5, 0, false>")((4, 1), (64,), (*arrays, sequential, i4(40), i4(1), f4(1), f4(0)))
    laws.law_equal_bits({"masked": [causal_masked_forward(q, k, v)[0]], "naive": to_host(naive), "sequential": to_host(sequential)})


# --- laws with derived bounds -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kernels", KERNELS)
@few
@given(st.data())
def test_attention_and_its_gradients_stay_within_the_budget(cp, kernels, data):
    with kernels_of(cp, kernels) as (dtype, tensor):
        (q, k, v, S, dout, dS), rng = data.draw(problems(dtype))
        z, dz = np.abs(rng.standard_normal(S.shape[:-1])).astype(S.dtype), rng.standard_normal(S.shape[:-1]).astype(S.dtype)
        eps = data.draw(st.sampled_from([0.0, 1e-6, 0.5]))
        (out, end), pullback = vjp(causal_linear_attention, *to_device(cp, q, k, v), State(*to_device(cp, S, z)), eps=eps)
        dq, dk, dv, start = pullback(cp.asarray(dout), State(*to_device(cp, dS, dz)))
    b = attention_bounds(tensor, q, k, v, S, z, dout, dS, dz, eps=eps)
    expected, (end_S, end_z) = oracle.causal_linear_attention(q, k, v, State(S, z), eps=eps)
    wide = [x.astype(np.float64) for x in (q, k, v, S, z, dout, dS, dz)]
    gq, gk, gv, gs = vjp(causal_linear_attention, *wide[:3], State(*wide[3:5]), eps=eps)[1](wide[5], State(*wide[6:]))
    got = to_host(out, *end, dq, dk, dv, *start)
    assert [x.dtype for x in got] == [q.dtype, *[S.dtype] * 2, *[q.dtype] * 3, *[S.dtype] * 2]
    for name, x, y, bound in zip(("out", "S", "z", "dq", "dk", "dv", "dS", "dz"), got, (expected, end_S, end_z, gq, gk, gv, *gs),
                                 (b.out, b.S, b.z, b.dq, b.dk, b.dv, b.dS, b.dz), strict=True):
        assert_near(tensor, name, x, y, bound)


@pytest.mark.parametrize("kernels", ["float64", "float16", "float16 without tensor cores"])
@few
@given(st.data())
def test_padding_changes_nothing_and_garbage_in_it_reaches_nothing(cp, kernels, data):
    (q, k, v, S, dout, _), rng = data.draw(problems(kernels.split()[0]))
    nq, nk = rng.integers(0, q.shape[-2] + 1, q.shape[:-2]), rng.integers(0, q.shape[-2] + 1, k.shape[:-2])

    def spoiled(x, lengths, by):
        x = x.copy()
        for at in np.ndindex(x.shape[:-2]):
            x[at][lengths[at]:] = by
        return x

    def run(by, **options):
        out, pullback = vjp(linear_attention, *to_device(cp, spoiled(q, nq, by), spoiled(k, nk, by), spoiled(v, nk, by)), causal=True,
                            query_lengths=nq, key_lengths=nk, **options)
        return to_host(out, *pullback(cp.asarray(spoiled(dout, nq, by))))

    with kernels_of(cp, kernels) as (_, tensor):
        for feature_map in ("relu", "elu1"):                                      # as array code, and fused
            garbage = run(np.nan, feature_map=feature_map)
            laws.law_equal_bits({"zeros": run(0, feature_map=feature_map), "NaN": garbage})
    zero = 0 * S, 0 * S[..., 0]
    b = attention_bounds(tensor, q, k, v, *zero, dout, *zero, query_lengths=nq, key_lengths=nk)
    wide = [x.astype(np.float64) for x in (q, k, v, dout)]
    out, pullback = vjp(linear_attention, *wide[:3], causal=True, query_lengths=nq, key_lengths=nk)
    for name, x, y, bound in zip(("out", "dq", "dk", "dv"), garbage, (out, *pullback(wide[3])), (b.out, b.dq, b.dk, b.dv), strict=True):
        assert_near(tensor, name, x, y, bound)


@pytest.mark.parametrize("D, M, normalised", [(64, 64, True), (40, 130, True), (130, 40, True), (256, 256, False)])
def test_sizes_of_several_tiles(cp, D, M, normalised, rng):
    q, k, v, dout = (rng.standard_normal((2, 45, n)).astype(np.float32) for n in (D, D, M, M))
    q = rng.standard_normal((4, 45, D)).astype(np.float32)
    dout = rng.standard_normal((4, 45, M)).astype(np.float32)
    zero = np.zeros((2, D, M), np.float32)
    if normalised:
        (out, _), pullback = vjp(causal_linear_attention, *to_device(cp, q, k, v))
        b = budgets.attention_budget(q, k, v, zero, zero[..., 0], dout, zero, zero[..., 0], phi=oracle.eq7, dphi=slope)
        (expected, _), exact = vjp(causal_linear_attention, *(x.astype(float) for x in (q, k, v)))
    else:
        (out, _), pullback = vjp(recurrence, *to_device(cp, q, k, v))
        b = budgets.recurrence_budget(q, k, v, zero, dout, zero)
        (expected, _), exact = vjp(recurrence, *(x.astype(float) for x in (q, k, v)))
    got, right = to_host(out, *pullback(cp.asarray(dout))[:3]), (expected, *exact(dout.astype(float))[:3])
    for name, x, y, bound in zip(("out", "dq", "dk", "dv"), got, right, (b.out, b.dq, b.dk, b.dv), strict=True):
        budgets.assert_within(x, y, bound, name)


@pytest.mark.parametrize("kernels", ["float32", "float16", "float16 without tensor cores"])
def test_a_step_continues_a_prefix(cp, kernels, rng):
    """The prefix by one kernel, its steps by another, both near the NumPy form, which has an error of its own."""
    with kernels_of(cp, kernels) as (dtype, tensor):
        D, M = SIZES[dtype]
        q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in ((2, 4, 9, D), (2, 2, 9, D), (2, 2, 9, M)))
        whole, end = causal_linear_attention(q, k, v)
        problem = q, k, v, 0 * end.S, 0 * end.z, q[..., :1] * np.ones(M, dtype), end.S, end.z
        usual, ours = attention_bounds(False, *problem), attention_bounds(tensor, *problem)
        arrays, outs = to_device(cp, q, k, v), []
        _, state = causal_linear_attention(*(x[..., :5, :] for x in arrays))
        for t in range(5, 9):
            before = to_host(*state)
            out, new = causal_linear_attention_step(*(x[..., t, :] for x in arrays), state)
            laws.law_equal_bits({"before": before, "after": to_host(*state)})
            outs, state = [*outs, out.get()], new
    assert_near(tensor, "out", np.stack(outs, -2), whole[..., 5:, :].astype(float), (usual.out + ours.out)[..., 5:, :])
    for name, x, y in zip("Sz", to_host(*state), end, strict=True):
        assert_near(tensor, name, x, y, getattr(usual, name) + getattr(ours, name))


# --- audits -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("D, M, N, G", [(6, 5, 40, 2), (64, 64, 64, 1), (40, 130, 20, 1)])
def test_audits_find_nothing(simt, D, M, N, G, rng):
    cp = simt
    q, k, v, dout = (rng.standard_normal((h, N, n)).astype(np.float32) for h, n in ((2 * G, D), (2, D), (2, M), (2 * G, M)))
    with cp.audit() as traffic:
        (out, end), pullback = vjp(causal_linear_attention, *to_device(cp, q, k, v))
        pullback(cp.asarray(dout), end)
        causal_linear_attention_step(*(x[:, 0] for x in to_device(cp, q, k, v)), end)
        linear_attention(*to_device(cp, q, k, v), causal=True, key_lengths=np.array([N // 2, N]), query_lengths=np.arange(2 * G) % (N + 1))
    assert traffic
    if D == M == 64:
        for where, counts in traffic.items():
            if where[1] == "shared":
                assert counts.passes == counts.ideal_passes, where
            else:
                assert counts.sectors <= 1.01 * counts.ideal_sectors, where


# --- launch code --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (2, 5, 0)])
def test_empty_batches_launch_nothing(simt, shape, monkeypatch):
    cp = simt
    monkeypatch.setattr(launch.Kernels, "launch", lambda *a: pytest.fail("launched"))
    B, H, N = shape
    q, v = cp.ones((B, H, N, 6), dtype=np.float32), cp.ones((B, H, N, 5), dtype=np.float32)
    state = State(cp.ones((B, H, 6, 5), dtype=np.float32), cp.ones((B, H, 6), dtype=np.float32))
    (out, end), pullback = vjp(causal_linear_attention, q, q, v, state)
    dq, dk, dv, start = pullback(out, end)
    assert out.shape == v.shape and dq.shape == dk.shape == q.shape and dv.shape == v.shape
    laws.law_equal_bits({"in": to_host(*state), "out": to_host(*end), "back": to_host(*start)})


def test_a_grid_that_cuda_cannot_launch_is_a_clear_error():
    with pytest.raises(ValueError, match=r"group_dq: \(1, 70000\) blocks are more than CUDA can launch .* split the batch"):
        launch.Kernels({}, 1, 1, 4).launch("group_dq", (1, 70000), 0)


def test_strides_and_the_inputs_are_as_before(cp, rng):
    q, k, v = (rng.standard_normal((2, 20, n)).astype(np.float32) for n in (6, 6, 5))
    arrays = to_device(cp, q, k, v)
    swapped = [cp.asarray(x.swapaxes(0, 1).copy()).swapaxes(0, 1) for x in (q, k, v)]
    results = [to_host(causal_linear_attention(*x)[0])[0] for x in (arrays, swapped)]
    laws.law_equal_bits({"contiguous": [results[0]], "swapped": [results[1]]})
    laws.law_equal_bits({"before": [q, k, v], "after": to_host(*arrays)})


def test_shared_memory_is_exactly_what_the_kernels_use(simt, rng):
    """One number less and the audit reports the kernel that reaches beyond."""
    cp = simt
    q, k, v, dout = to_device(cp, *(rng.standard_normal((1, 20, n)).astype(np.float32) for n in (6, 6, 5, 5)))
    for name in ("walk_bytes", "both_bytes", "state_bytes"):
        right = getattr(launch, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, name, lambda *a, right=right: right(*a) - 4)
            with cp.audit(), pytest.raises(RuntimeError, match="out of bounds"):
                _, pullback = vjp(causal_linear_attention, q, k, v)
                pullback(dout)


@few
@given(seeds)
def test_lengths_and_bounds_may_lie_on_the_device(cp, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, 3, 20, n)).astype(np.float32) for n in (6, 6, 5))
    nk, bounds = rng.integers(0, 21, 2), np.array([0, 7, 20])
    arrays = to_device(cp, q, k, v)
    laws.law_equal_bits({where: to_host(linear_attention(*arrays, causal=True, key_lengths=n), *recurrence(*arrays, cu_seqlens=b))
                         for where, n, b in (("host", nk, bounds), ("device", cp.asarray(nk), cp.asarray(bounds)))})


def test_softmax_decodes_with_a_cache_on_the_device(cp, rng):
    q, k, v = (rng.standard_normal((2, 4, 6)).astype(np.float32) for _ in range(3))
    whole, cache, outs = softmax_attention(q, k, v, causal=True), None, []
    for t in range(4):
        out, cache = softmax_step(*to_device(cp, q[:, t], k[:, t], v[:, t]), cache)
        outs.append(out.get())
    budget = softmax_forward_budget(q, k, v, causal=True)
    budgets.assert_within(np.stack(outs, -2), whole, 2 * budget)


def test_a_view_that_starts_between_alignments_is_read_right(cp, rng):
    """Contiguous, and yet no place for reads of 16 bytes."""
    x = rng.standard_normal((4, 2, 20, 8)).astype(np.float32)
    off = [cp.asarray(np.concatenate([[0], a.ravel()]).astype(np.float32))[1:].reshape(a.shape) for a in x]
    results = []
    for q, k, v, dout in (to_device(cp, *x), off):
        out, pullback = vjp(linear_attention, q, k, v, causal=True)
        results.append(to_host(out, *pullback(dout)))
    laws.law_equal_bits({"aligned": results[0], "between": results[1]})
