"""`vjp`: one pullback for every public function, and clear words for wrong cotangents."""
from __future__ import annotations

import numpy as np
import pytest

import refattn
from refattn import State, causal_linear_attention, causal_linear_attention_step, linear_attention, recurrence, softmax_attention, vjp


def arrays(rng, *shapes):
    return [rng.standard_normal(s) for s in shapes]


def test_it_serves_every_public_function(rng):
    q, k, v = arrays(rng, (2, 4, 5, 3), (2, 2, 5, 3), (2, 2, 5, 6))
    for name in refattn.__all__:
        f = getattr(refattn, name)
        if name in ("State", "vjp"):
            continue
        args = [x[..., 0, :] for x in (q, k, v)] if name.endswith("_step") else [q, k, v]
        outputs, pullback = vjp(f, *args)
        plain = f(*args)
        for x, y in zip(_leaves(outputs), _leaves(plain), strict=True):
            assert np.array_equal(x, y)
        out = outputs[0] if isinstance(outputs, tuple) else outputs
        cotangent = rng.standard_normal(out.shape)
        grads = pullback(cotangent)
        assert [g.shape for g in grads] == [x.shape for x in args]
        assert all(np.array_equal(a, b) for a, b in zip(grads, pullback(cotangent), strict=True)), "a pullback can be called again"


def _leaves(x):
    return [y for part in x for y in _leaves(part)] if isinstance(x, tuple) else [x]


def test_one_gradient_per_array_and_none_where_it_was_none(rng):
    q, k, v, S = arrays(rng, (2, 5, 3), (2, 5, 3), (2, 5, 4), (2, 3, 4))
    (out, end), pullback = vjp(recurrence, q, k, v)
    assert len(pullback(out, end)) == 3
    (out, end), pullback = vjp(recurrence, q, k, v, None, None)
    assert pullback(out)[3:] == (None, None)
    (out, end), pullback = vjp(recurrence, q, k, v, None, None, S)
    assert pullback(out)[5].shape == S.shape
    (out, end), pullback = vjp(causal_linear_attention, q, k, v, State(S, abs(S[..., 0])))
    assert isinstance(pullback(out)[3], State)


@pytest.mark.parametrize("f", [abs, "softmax_attention", [], vjp])
def test_other_functions_are_refused_by_name(f):
    with pytest.raises(TypeError, match="f: expected one of softmax_attention, linear_attention, causal_linear_attention, "
                                        "causal_linear_attention_step, recurrence, recurrence_step, got "):
        vjp(f, np.zeros(1))


@pytest.mark.parametrize("f", [softmax_attention, linear_attention])
def test_wrong_cotangents_are_explained(f, rng):
    q, k, v = arrays(rng, (2, 5, 3), (2, 5, 3), (2, 5, 4))
    _, pullback = vjp(f, q, k, v)
    with pytest.raises(ValueError, match=r"dout: expected the shape of the output \(2, 5, 4\), got \(2, 5, 3\)"):
        pullback(q)
    with pytest.raises(TypeError, match="dout is float32 and its output is float64; cast the cotangent, nothing is cast silently"):
        pullback(v.astype(np.float32))
    with pytest.raises(TypeError, match="dout: expected a NumPy or CuPy array, got float"):
        pullback(1.0)
    for none in ((), (v, v)):
        with pytest.raises(TypeError, match=f"pullback: expected 1 cotangent, one per output, got {len(none)}"):
            pullback(*none)


def test_wrong_state_cotangents_are_explained(rng):
    q, k, v = arrays(rng, (2, 5, 3), (2, 5, 3), (2, 5, 4))
    (out, end), pullback = vjp(causal_linear_attention, q, k, v)
    with pytest.raises(TypeError, match=r"dstate: expected State\(dS, dz\), either of them None if zero, or None, got ndarray"):
        pullback(out, end.S)
    with pytest.raises(ValueError, match=r"dstate.S: expected the shape of the output \(2, 3, 4\), got \(2, 3\)"):
        pullback(out, (end.z, end.z))
    with pytest.raises(ValueError, match=r"dstate.z: expected the shape of the output \(2, 3\), got \(2, 3, 4\)"):
        pullback(out, (end.S, end.S))
    with pytest.raises(TypeError, match="pullback: expected 2 cotangents, one per output, got 3"):
        pullback(out, end, end)
    (out, S), pullback = vjp(recurrence, q, k, v)
    with pytest.raises(ValueError, match=r"dstate: expected the shape of the output \(2, 3, 4\), got \(2, 5, 4\)"):
        pullback(out, out)
    (out, end), pullback = vjp(causal_linear_attention_step, q[:, 0], k[:, 0], v[:, 0])
    with pytest.raises(ValueError, match=r"dout_t: expected the shape of the output \(2, 4\), got \(2, 5, 4\)"):
        pullback(v)
    with pytest.raises(ValueError, match=r"dstate.S: "):
        pullback(out, (end.z, None))
