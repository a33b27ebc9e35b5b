"""What bad input is told: the argument, what was expected, what came, what to do."""
from __future__ import annotations

import sys
import types

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

from refattn import (
    State,
    causal_linear_attention,
    causal_linear_attention_step,
    linear_attention,
    recurrence,
    recurrence_step,
    softmax_attention,
    vjp,
)
from refattn._array import accumulator, check_positive, missing_extra

SEQUENCES = [softmax_attention, linear_attention, causal_linear_attention, recurrence]
STEPS = [causal_linear_attention_step, recurrence_step]
Q, K, V = (2, 4, 7, 3), (2, 2, 7, 3), (2, 2, 7, 5)


def zeros(*shapes, dtype=np.float64):
    return [np.zeros(s, dtype) for s in shapes]


@pytest.mark.parametrize("f", SEQUENCES)
@pytest.mark.parametrize("shapes, words", [
    (((3,), (3,), (5,)), r"q: expected \(..., H, N, D\) with at least 2 axes, got \(3,\)"),
    (((7, 3), (2, 7, 3), (7, 5)), r"k: expected 2 axes as in q \(7, 3\), got \(2, 7, 3\): add or drop leading axes"),
    (((7, 3), (7, 3), (5,)), r"v: expected \(..., H, N, M\) with at least 2 axes, got \(5,\)"),
    ((Q, (2, 2, 7, 4), V), r"k: expected \(..., Hkv, [LN], D\) = \(2, 2, (7|\*), 3\), got \(2, 2, 7, 4\): q and k must share D"),
    ((Q, (3, 2, 7, 3), V), r"k: .* = \(2, \*, (7|\*), 3\), got \(3, 2, 7, 3\): q and k must share the leading axes"),
    ((Q, K, (2, 2, 6, 5)), r"v: expected \(..., Hkv, [LN], M\) = \(2, 2, 7, \*\), got \(2, 2, 6, 5\): k and v must share"),
    ((Q, K, (2, 4, 7, 5)), r"v: expected .* = \(2, 2, 7, \*\), got \(2, 4, 7, 5\): k and v must share the leading axes, the heads"),
    (((2, 3, 7, 3), K, V), r"q: expected \(..., Hq, N, D\) = \(2, multiple of 2, 7, 3\), got \(2, 3, 7, 3\): Hq = 3 must be a multiple of Hkv = 2"),
    (((2, 4, 7, 3), (2, 0, 7, 3), (2, 0, 7, 5)), r"q: .* Hq = 4 must be a multiple of Hkv = 0"),
])
def test_disagreeing_shapes(f, shapes, words):
    with pytest.raises(ValueError, match=words):
        f(*zeros(*shapes))


@pytest.mark.parametrize("f", STEPS)
@pytest.mark.parametrize("shapes, words", [
    (((), (), ()), r"q_t: expected \(..., H, D\) with at least 1 axis, got \(\)"),
    (((3,), (2, 3), (5,)), r"k_t: expected 1 axes as in q_t \(3,\), got \(2, 3\)"),
    (((4, 3), (2, 4), (2, 5)), r"k_t: expected \(..., Hkv, D\) = \(2, 3\), got \(2, 4\): q and k must share D"),
    (((4, 3), (2, 3), (4, 5)), r"v_t: expected \(..., Hkv, M\) = \(2, \*\), got \(4, 5\): k and v must share the leading axes, the heads"),
    (((3, 3), (2, 3), (2, 5)), r"q_t: expected \(..., Hq, D\) = \(multiple of 2, 3\), got \(3, 3\): Hq = 3 must be a multiple of Hkv = 2"),
])
def test_disagreeing_shapes_of_a_step(f, shapes, words):
    with pytest.raises(ValueError, match=words):
        f(*zeros(*shapes))


@pytest.mark.parametrize("f", [causal_linear_attention, recurrence, lambda *a: linear_attention(*a, causal=True),
                               lambda *a: softmax_attention(*a, causal=True)])
def test_causal_attention_needs_as_many_keys_as_queries(f):
    with pytest.raises(ValueError, match="causal attention needs as many keys as queries"):
        f(*zeros((2, 7, 3), (2, 8, 3), (2, 8, 5)))


@pytest.mark.parametrize("f", SEQUENCES)
@pytest.mark.parametrize("dtype", [np.int64, np.complex128, np.bool_, object, np.longdouble, "S3"])
def test_only_real_floats(f, dtype):
    with pytest.raises(TypeError, match=r"[qkv]: expected float16, bfloat16, float32 or float64, got .*; cast it yourself"):
        f(*zeros(Q, K, V, dtype=dtype))


@pytest.mark.parametrize("f", SEQUENCES)
def test_mixed_dtypes_name_both(f):
    q, k, v = zeros(Q, K, V)
    with pytest.raises(TypeError, match="q is float64 and k is float32; cast one of them, nothing is cast silently"):
        f(q, k.astype(np.float32), v)
    with pytest.raises(TypeError, match="q is float64 and v is bfloat16"):
        f(q, k, v.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("f", SEQUENCES)
@pytest.mark.parametrize("what, words", [
    ([[1.0]], "k: expected a NumPy or CuPy array, got list; convert it with np.asarray first"),
    (1.0, "k: expected a NumPy or CuPy array, got float"),
    (np.ma.masked_array(np.zeros(K)), "k: expected a plain array, got MaskedArray; pass np.asarray"),
    (np.zeros((1, 1)).view(np.matrix), "k: expected a plain array, got matrix"),
    (array_api_strict.zeros(K), "q is a numpy array and k a array_api_strict array; bring both to one library first"),
])
def test_what_is_no_array_or_another_librarys(f, what, words):
    q, _, v = zeros(Q, K, V)
    with pytest.raises(TypeError, match=words):
        f(q, what, v)


@pytest.mark.parametrize("f", [softmax_attention, linear_attention])
@pytest.mark.parametrize("options, error, words", [
    ({"key_lengths": [8, 1]}, ValueError, "key_lengths: expected 0 ≤ length ≤ L = 7, got values from 1 to 8"),
    ({"query_lengths": [-1, 1]}, ValueError, "query_lengths: expected 0 ≤ length ≤ N = 7, got values from -1 to 1"),
    ({"key_lengths": [1, 2, 3]}, ValueError, r"key_lengths: expected one length for each of the leading axes \(2, 2\) or of the first of them, "
                                             r"got \(3,\)"),
    ({"query_lengths": np.ones((2, 4, 1), int)}, ValueError, r"query_lengths: .*\(2, 4\).*got \(2, 4, 1\)"),
    ({"key_lengths": [1.0, 2.0]}, TypeError, "key_lengths: expected integers, got float64"),
    ({"query_lengths": [True, False]}, TypeError, "query_lengths: expected integers, got bool"),
])
def test_lengths(f, options, error, words):
    with pytest.raises(error, match=words):
        f(*zeros(Q, K, V), **options)


@pytest.mark.parametrize("f", [linear_attention, causal_linear_attention])
@pytest.mark.parametrize("options, error, words", [
    ({"eps": -1e-6}, ValueError, "eps: expected a finite number ≥ 0, got -1e-06"),
    ({"eps": np.nan}, ValueError, "eps: expected a finite number ≥ 0, got nan"),
    ({"eps": None}, TypeError, "eps: expected a number, got NoneType"),
    ({"feature_map": "elu"}, ValueError, "feature_map: .*elu1"),
    ({"feature_map": 3}, TypeError, "feature_map: "),
])
def test_options(f, options, error, words):
    with pytest.raises(error, match=words):
        f(*zeros(Q, K, V), **options)


@pytest.mark.parametrize("state, error, words", [
    (np.zeros((2, 2, 3, 5)), TypeError, r"state: expected State\(S, z\) as a former call returned it, got ndarray"),
    ((np.zeros((2, 2, 3, 5)),), TypeError, r"state: expected State\(S, z\)"),
    (State(np.zeros((2, 2, 5, 3)), np.zeros((2, 2, 3))), ValueError, r"state.S: expected \(..., H, F, M\) = \(2, 2, 3, 5\), got \(2, 2, 5, 3\)"),
    (State(np.zeros((2, 2, 3, 5)), np.zeros((2, 2, 5))), ValueError, r"state.z: expected \(..., H, F\) = \(2, 2, 3\), got \(2, 2, 5\)"),
    (State(np.zeros((2, 2, 3, 5), "f"), np.zeros((2, 2, 3))), TypeError, "state.S is float32 and q is float64"),
    (State(np.zeros((2, 2, 3, 5)), np.zeros((2, 2, 3), "f")), TypeError, "state.z is float32 and q is float64"),
    (State(None, None), TypeError, r"state: expected State\(S, z\) as a former call returned it, got \(NoneType, NoneType\)"),
    (State(np.zeros((2, 2, 3, 5)), [0.0]), TypeError, "state.z: expected a NumPy or CuPy array, got list"),
])
def test_states(state, error, words):
    for f, arrays in ((causal_linear_attention, zeros(Q, K, V)), (causal_linear_attention_step, zeros((2, 4, 3), (2, 2, 3), (2, 2, 5)))):
        with pytest.raises(error, match=words):
            f(*arrays, state)


@pytest.mark.parametrize("f", SEQUENCES)
def test_cupy_and_numpy_do_not_mix(f, monkeypatch):
    """Known by the module of its type: nothing is imported to find out."""
    module = types.ModuleType("cupy")
    foreign = type("ndarray", (), {"__module__": "cupy"})()
    monkeypatch.setitem(sys.modules, "cupy", module)
    q, k, v = zeros(Q, K, V)
    with pytest.raises(TypeError, match="q is a numpy array and v a cupy array; bring both to one library first"):
        f(q, k, foreign)
    with pytest.raises(TypeError, match="q is a cupy array and k a numpy array"):
        f(foreign, k, v)


def test_a_matrix_has_no_heads():
    with pytest.raises(ValueError, match=r"state: expected \(D, M\) = \(3, 5\), got \(1, 3, 5\)"):
        recurrence(*zeros((7, 3), (7, 3), (7, 5)), state=np.zeros((1, 3, 5)))


def test_positive_integers():
    assert check_positive("chunk", np.int32(3)) == 3
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"chunk: expected an integer ≥ 1, got {bad}"):
            check_positive("chunk", bad)
    for bad in (1.0, "1", None, True):
        with pytest.raises(TypeError, match="chunk: expected an integer ≥ 1, got "):
            check_positive("chunk", bad)


def test_a_missing_extra_is_named():
    assert str(missing_extra("tqdm", "demo")) == "this needs tqdm, which is not installed; install it with: pip install 'refattn[demo]'"


def test_accumulators():
    for dtype, wide in ((np.float16, "float32"), (ml_dtypes.bfloat16, "float32"), (np.float32, "float32"), (">f8", "float64"), (">f4", "float32")):
        assert accumulator(np.dtype(dtype)) == np.dtype(wide)
        assert accumulator(np.dtype(dtype)).isnative


def test_foreign_byte_order_counts_as_its_value(rng):
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in (Q, K, V))
    for f in SEQUENCES:
        native, swapped = f(q, k, v), f(*(x.astype(">f4") for x in (q, k, v)))
        native, swapped = (x[0] if isinstance(x, tuple) else x for x in (native, swapped))
        assert np.array_equal(native, swapped)


@pytest.mark.parametrize("f", [*SEQUENCES, *STEPS])
def test_another_array_library_gets_the_same_answer_in_its_own_arrays(f, rng):
    """The functional forms: what CuPy arrays run on."""
    shapes = ((2, 4, 3), (2, 2, 3), (2, 2, 5)) if f in STEPS else (Q, K, V)
    arrays = [rng.integers(-2, 3, s).astype(float) for s in shapes]
    outputs, pullback = vjp(f, *arrays)
    xp = array_api_strict
    foreign, foreign_pullback = vjp(f, *(xp.asarray(x) for x in arrays))
    first, foreign_first = (x[0] if isinstance(x, tuple) else x for x in (outputs, foreign))
    dout = rng.integers(-2, 3, first.shape).astype(float)
    assert isinstance(foreign_first, type(xp.zeros(1)))
    # one order of summation against another: 64 roundings in float64 on numbers of order one, and the exponentials are the same
    for x, y in zip((first, *pullback(dout)), (foreign_first, *foreign_pullback(xp.asarray(dout))), strict=True):
        assert np.abs(x - np.asarray(y)).max() <= 64 * 2.0**-53 * (1 + np.abs(x).max()) * 4


def test_zero_sizes_everywhere():
    for shapes in (((0, 4, 7, 3), (0, 2, 7, 3), (0, 2, 7, 5)), ((2, 0, 7, 3), (2, 0, 7, 3), (2, 0, 7, 5)), ((2, 4, 0, 3), (2, 2, 0, 3), (2, 2, 0, 5)),
                   ((2, 4, 7, 0), (2, 2, 7, 0), (2, 2, 7, 5)), ((2, 4, 7, 3), (2, 2, 7, 3), (2, 2, 7, 0))):
        for f in SEQUENCES:
            outputs, pullback = vjp(f, *zeros(*shapes))
            out = outputs[0] if isinstance(outputs, tuple) else outputs
            assert out.shape == (*shapes[0][:-1], shapes[2][-1]) and np.isfinite(out).all()
            assert [g.shape for g in pullback(out)] == list(shapes)
