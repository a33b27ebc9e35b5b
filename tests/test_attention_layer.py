"""Laws of attention as a layer: it is its equation within a derived bound, its backward the transpose, its recurrent twin the same function.

Oracles, bounds and drawing as in `test_layers`.
"""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_layers import DTYPES, REAL, Ball, Untouched, ball, draw, dtypes, gradients, seeds, within

from refattn import attention_layer, layers
from refattn.lsh import lsh_backward, lsh_buckets, lsh_forward, lsh_rotations
from refattn.testing.budgets import gamma, unit_roundoff

PARTS = [f"a.{part}.{kind}" for part in ("query", "key", "value", "out") for kind in ("weight", "bias")]
kinds = st.sampled_from(["linear", "softmax"])


def attention_params(rng, E, dtype, Em=None):
    """Keys and values of a memory have rows of their own."""
    rows = lambda key: Em if Em and ".out." not in key and ".query." not in key else E
    return {key: draw(rng, (rows(key), E) if key.endswith("weight") else (E,), dtype) for key in PARTS}


def attention_oracle(x, memory, *params, heads, attention, lengths, memory_lengths, causal=False):
    """Position by position and head by head, as the paper prints them; only real positions are looked at."""
    wq, bq, wk, bk, wv, bv, wo, bo = params
    out = np.zeros_like(x)
    for b, (n, m) in enumerate(zip(lengths, memory_lengths, strict=True)):
        q = np.einsum("ne,ef->nf", x[b, :n], wq) + bq
        k, v = (np.einsum("ne,ef->nf", memory[b, :m], w) + bias for w, bias in ((wk, bk), (wv, bv)))
        mixed = np.zeros_like(q)
        D = x.shape[-1] // heads
        for h in range(heads):
            own = slice(h * D, h * D + D)
            for i in range(n if m else 0):
                keys = range(i + 1 if causal else m)
                if attention == "linear":
                    phi = lambda a: np.where(a.real > 0, a + 1, np.exp(np.where(a.real > 0, 0, a)))
                    weights = [(phi(q[i, own]) * phi(k[j, own])).sum() for j in keys]
                    total = sum(weights) + 1e-6
                else:
                    weights = [np.exp((q[i, own] * k[j, own]).sum() / np.sqrt(D)) for j in keys]
                    total = sum(weights)
                mixed[i, own] = sum(w * v[j, own] for w, j in zip(weights, keys, strict=True)) / total
        out[b, :n] = np.einsum("ne,ef->nf", mixed, wo) + bo
    return out


def self_attention_oracle(x, *params, lengths, **options):
    return attention_oracle(x, x, *params, lengths=lengths, memory_lengths=lengths, **options)


def attention_budget(x, memory, params, dout, heads, attention, lengths, memory_lengths, causal=False):
    """Balls of out, dx, dmemory and the gradients: the masked form and its transpose, one sequence at a time. Where the memory is x itself,
    that of dx is the one of the sum."""
    wq, bq, wk, bk, wv, bv, wo, bo = (ball(p) for p in params)
    T = lambda a: a.map(lambda m: m.swapaxes(-1, -2))
    D = x.shape[-1] // heads
    split = lambda a: a.map(lambda m: m.reshape(-1, heads, D).swapaxes(0, 1))
    merge = lambda a: a.map(lambda m: m.swapaxes(0, 1).reshape(m.shape[1], heads * D))
    outs, totals = [np.zeros(x.shape), np.zeros(x.shape), np.zeros(memory.shape)], [np.zeros(p.shape) for p in params]
    adding = lambda u: gamma(len(lengths) + 1, "float32" if u > 2.0**-50 else "float64")    # up the sequences: two more roundings of each term
    for b, (n, m) in enumerate(zip(lengths, memory_lengths, strict=True)):
        if n == 0:
            continue
        X, M, dO = ball(x[b, :n]), ball(memory[b, :m]), ball(dout[b, :n])
        totals[7] += dO.sum(0).e[0] + adding(X.u) * dO.size().sum(0)
        if m == 0:
            continue
        q, k, v = split(X @ wq + bq), split(M @ wk + bk), split(M @ wv + bv)
        see = Ball(np.tri(n) if causal else np.ones((n, m)), 0.0, X.u)
        if attention == "linear":
            phi = lambda a: Ball(np.where(a.v > 0, a.v + 1, np.exp(np.minimum(a.v, 0))), a.e * 2 + 8 * a.u * (a.size() + 1), a.u)
            slope = lambda a: Ball(np.where(a.v > 0, 1, np.exp(np.minimum(a.v, 0))), (a.e + 8 * a.u) * 3, a.u)
            fq, fk = phi(q), phi(k)
            A = (fq @ T(fk)) * see
            den = A.sum(-1) + 1e-6
        else:
            scale = Ball(1 / np.sqrt(REAL(D)), X.u, X.u)
            S = (q * scale) @ T(k)
            A = (S - Ball(np.where(see.v > 0, S.v, -np.inf).max(-1, keepdims=True), 0.0, X.u)).exp() * see
            den = A.sum(-1)
        mixed = (A @ v) / den
        outs[0][b, :n] = (merge(mixed) @ wo + bo).e
        dmixed = split(dO @ T(wo))
        dnum, dden = dmixed / den, -((dmixed * mixed).sum(-1) / den)
        dA = (dnum @ T(v) + dden) * see
        dv = T(A) @ dnum
        if attention == "linear":
            dq, dk = (dA @ fk) * slope(q), (T(dA) @ fq) * slope(k)
        else:
            dS = dA * A
            dq, dk = (dS @ k) * scale, (T(dS) @ q) * scale
        dq, dk, dv = merge(dq), merge(dk), merge(dv)
        dX, dM = dq @ T(wq), dk @ T(wk) + dv @ T(wv)
        outs[1][b, :n], outs[2][b, :m] = (dX + dM).e if memory is x else dX.e, dM.e
        for i, (left, g) in enumerate(((X, dq), (M, dk), (M, dv), (merge(mixed), dO))):
            totals[2 * i] += (T(left) @ g).e + adding(X.u) * (T(left).size() @ g.size())
            if i < 3:
                totals[2 * i + 1] += g.sum(0).e[0] + adding(X.u) * g.size().sum(0)
    return [*outs, *totals]


def self_attention_budget(x, *args, lengths, **options):
    out, dx, _, *grads = attention_budget(x, x, *args, lengths=lengths, memory_lengths=lengths, **options)
    return [out, dx, *grads]


@given(seeds, st.sampled_from([np.dtype("f8"), np.dtype("f4")]), kinds, st.booleans(), st.sampled_from([(3, 1), (4, 2), (6, 3)]),
       st.integers(0, 4), st.booleans())
def test_attention_is_its_equation_and_its_backward_the_transpose(seed, dtype, attention, causal, width, N, padded):
    (E, heads), rng = width, np.random.default_rng(seed)
    params = attention_params(rng, E, dtype)
    x, dout = draw(rng, (2, N, E), dtype), draw(rng, (2, N, E), dtype)
    lengths = rng.integers(0, N + 1, 2) if padded else None
    options = {"heads": heads, "attention": attention, "causal": causal}
    with Untouched(x, dout, *params.values()):
        out, residuals = attention_layer.attention_forward(params, "a", x, lengths=lengths, **options)
        dx, grads = attention_layer.attention_backward(dout, residuals)
    n = lengths if padded else [N, N]
    args = (x, *params.values())
    oracle = lambda *args: self_attention_oracle(*args, lengths=n, **options)
    real = (np.arange(N) < np.asarray(n)[:, None])[..., None]
    expected = [oracle(*(a.astype(REAL) for a in args)), *gradients(oracle, args, np.where(real, dout, 0))]
    budgets = self_attention_budget(x, tuple(params.values()), dout, lengths=n, **options)
    assert list(grads) and sorted(grads) == sorted(PARTS)
    for actual, value, bound, what in zip((out, dx, *(grads[key] for key in PARTS)), expected, budgets, ("out", "dx", *PARTS), strict=True):
        assert actual.dtype == dtype
        within(actual, value, Ball(bound, bound, unit_roundoff(dtype)), what)


@given(seeds, kinds | st.just("lsh-2"), st.booleans(), st.sampled_from([np.nan, np.inf, 1e30]))
def test_padding_changes_nothing(seed, attention, causal, garbage):
    rng, B, N, E = np.random.default_rng(seed), 3, 5, 4
    params, lengths = attention_params(rng, E, "f8"), rng.integers(0, N + 1, B)
    x, dout = draw(rng, (B, N, E), "f8", "plain"), draw(rng, (B, N, E), "f8", "plain")
    padding = np.arange(N) >= lengths[:, None]
    dirty_x, dirty_dout = x.copy(), dout.copy()
    dirty_x[padding] = dirty_dout[padding] = garbage
    results = []
    for a, d in ((x, dout), (dirty_x, dirty_dout)):
        out, residuals = attention_layer.attention_forward(params, "a", a, heads=2, attention=attention, causal=causal, lengths=lengths,
                                                  rng=np.random.default_rng(1))
        dx, grads = attention_layer.attention_backward(d, residuals)
        results.append([out, dx, *grads.values()])
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(dirty, clean)
    assert not results[1][0][padding].any() and not results[1][1][padding].any()


@given(seeds, st.sampled_from([np.dtype("f8"), np.dtype("f4")]), kinds, st.integers(1, 6), st.integers(0, 6))
def test_the_steps_and_the_prefill_are_the_causal_form(seed, dtype, attention, N, at):
    rng, E, at = np.random.default_rng(seed), 6, min(at, N)
    params, x = attention_params(rng, E, dtype), draw(rng, (2, N, E), dtype)
    options = {"heads": 3, "attention": attention}
    bound = self_attention_budget(x, tuple(params.values()), x, causal=True, lengths=[N, N], **options)[0]
    expected = self_attention_oracle(*(a.astype(REAL) for a in (x, *params.values())), causal=True, lengths=[N, N], **options)
    out, state = attention_layer.attention_prefill(params, "a", x[:, :at], **options)
    within(out, expected[:, :at], Ball(bound[:, :at], bound[:, :at], unit_roundoff(dtype)), "prefill")
    first = attention_layer.attention_init((2,), E, dtype, **options)
    for start, begin in ((state, at), (first, 0), (None, 0)):
        state = start
        for i in range(begin, N):
            kept = [np.copy(a) for a in state if isinstance(a, np.ndarray)] if state is not None else []
            out_t, after = attention_layer.attention_step(params, "a", x[:, i], state, **options)
            for a, b in zip([a for a in state or () if isinstance(a, np.ndarray)], kept, strict=True):
                np.testing.assert_array_equal(a, b)
            within(out_t, expected[:, i], Ball(bound[:, i], bound[:, i], unit_roundoff(dtype)), f"step {i}")
            state = after


def test_half_precision_attention_is_that_of_single_up_to_its_rounding(rng):
    """Every layer rounds once on its way out, so the error is a few units of the narrow dtype; here all numbers are at most 4."""
    for dtype in (DTYPES["float16"], DTYPES["bfloat16"]):
        params = {key: (p / 2).astype(dtype) for key, p in attention_params(rng, 4, "f8").items()}
        x = rng.uniform(-1, 1, (2, 5, 4)).astype(dtype)
        for attention in ("linear", "softmax"):
            out, residuals = attention_layer.attention_forward(params, "a", x, heads=2, attention=attention, causal=True)
            dx, grads = attention_layer.attention_backward(out, residuals)
            assert out.dtype == dx.dtype == dtype and {g.dtype for g in grads.values()} == {dtype}
            wide, _ = attention_layer.attention_forward({key: p.astype("f4") for key, p in params.items()}, "a", x.astype("f4"), heads=2,
                                               attention=attention, causal=True)
            assert np.abs(out.astype("f4") - wide).max() <= 64 * unit_roundoff(dtype)
            out, residuals = attention_layer.cross_attention_forward(params, "a", x, x[:, ::2], heads=2, attention=attention)
            *dx, grads = attention_layer.cross_attention_backward(out, residuals)
            state = attention_layer.cross_attention_init(params, "a", x[:, ::2], heads=2, attention=attention)
            read = attention_layer.cross_attention_read(params, "a", x, state, heads=2, attention=attention)
            assert {a.dtype for a in (out, read, *dx, *grads.values())} == {dtype}
            wide, _ = attention_layer.cross_attention_forward({key: p.astype("f4") for key, p in params.items()}, "a", x.astype("f4"),
                                                              x[:, ::2].astype("f4"), heads=2, attention=attention)
            for narrow in (out, read):
                assert np.abs(narrow.astype("f4") - wide).max() <= 64 * unit_roundoff(dtype)


@given(seeds, dtypes, st.integers(1, 3), st.booleans(), st.sampled_from([0, 1, 5, 40]), st.booleans())
def test_lsh_attention_is_its_parts_one_by_one(seed, dtype, rounds, causal, N, padded):
    """Bit for bit: the parts have their own laws. Its query is the key too; padding is sorted last."""
    rng, H, D = np.random.default_rng(seed), 2, 3
    params = {key: draw(rng, (6, 6) if key.endswith("weight") else (6,), dtype, "plain") for key in PARTS if ".key." not in key}
    x, dout = draw(rng, (2, N, 6), dtype, "plain"), draw(rng, (2, N, 6), dtype, "plain")        # sums depend on strides to the last bit
    lengths = rng.integers(0, N + 1, 2) if padded else None
    real = (np.arange(N) < (lengths if padded else np.array([N, N]))[:, None])[..., None]
    with Untouched(x, dout, *params.values()):
        out, residuals = attention_layer.attention_forward(params, "a", x, heads=H, attention=f"lsh-{rounds}", causal=causal, lengths=lengths,
                                                  rng=np.random.default_rng(seed))
        dx, grads = attention_layer.attention_backward(dout, residuals)
    heads = lambda a: a.reshape(2, N, H, D).swapaxes(1, 2)
    both = np.concatenate([params["a.query.weight"], params["a.value.weight"]], 1), np.concatenate([params["a.query.bias"], params["a.value.bias"]])
    projected, r_in = layers.affine_forward(np.where(real, x, np.zeros((), dtype)), *both)
    turns = lsh_rotations(np.random.default_rng(seed), rounds, D, 64).astype(np.promote_types(dtype, np.float32))
    q, v = heads(projected[..., :6]), heads(projected[..., 6:])
    buckets = np.where(real[:, None, None, :, 0], lsh_buckets(q, turns), 64)
    mixed, r_lsh = lsh_forward(q, v, buckets, causal=causal, chunk=32, lengths=real.sum((1, 2))[:, None].repeat(H, 1))
    expected, r_out = layers.affine_forward(mixed.swapaxes(1, 2).reshape(2, N, 6), params["a.out.weight"], params["a.out.bias"])
    np.testing.assert_array_equal(out, np.where(real, expected, np.zeros((), dtype)))
    dmerged, dw, db = layers.affine_backward(np.where(real, dout, np.zeros((), dtype)), r_out)
    dq, dv = (d.swapaxes(1, 2).reshape(2, N, 6) for d in lsh_backward(heads(dmerged), r_lsh))
    right_dx, right_dw, right_db = layers.affine_backward(np.concatenate([dq, dv], -1), r_in)
    right = [right_dx, right_dw[:, :6], right_db[:6], right_dw[:, 6:], right_db[6:], dw, db]
    for actual, value in zip((dx, *(grads[key] for key in params)), right, strict=True):
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, value)
    assert grads.keys() == params.keys()


# --- cross attention ---------------------------------------------------------------------------------------------------------------------

crossed = st.sampled_from([(3, 1, 2), (4, 2, 4), (6, 3, 5)])      # E, heads, Em


@given(seeds, st.sampled_from([np.dtype("f8"), np.dtype("f4")]), kinds, crossed, st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_cross_attention_is_its_equation_and_its_backward_the_transpose(seed, dtype, attention, width, N, Nm, padded):
    (E, heads, Em), rng = width, np.random.default_rng(seed)
    params = attention_params(rng, E, dtype, Em)
    x, memory, dout = draw(rng, (2, N, E), dtype), draw(rng, (2, Nm, Em), dtype), draw(rng, (2, N, E), dtype)
    given_lengths = {"lengths": rng.integers(0, N + 1, 2), "memory_lengths": rng.integers(0, Nm + 1, 2)} if padded else {}
    options = {"heads": heads, "attention": attention}
    with Untouched(x, memory, dout, *params.values()):
        out, residuals = attention_layer.cross_attention_forward(params, "a", x, memory, **given_lengths, **options)
        dx, dmemory, grads = attention_layer.cross_attention_backward(dout, residuals)
        state = attention_layer.cross_attention_init(params, "a", memory, memory_lengths=given_lengths.get("memory_lengths"), **options)
        reads = [attention_layer.cross_attention_read(params, "a", x[:, rows], state, **options)
                 for rows in (slice(None), *(slice(i, i + 1) for i in range(N)))]
    options |= given_lengths or {"lengths": [N, N], "memory_lengths": [Nm, Nm]}
    args = (x, memory, *params.values())
    oracle = lambda *args: attention_oracle(*args, **options)
    real = (np.arange(N) < np.asarray(options["lengths"])[:, None])[..., None]
    expected = [oracle(*(a.astype(REAL) for a in args)), *gradients(oracle, args, np.where(real, dout, 0))]
    budgets = attention_budget(x, memory, tuple(params.values()), dout, **options)
    assert sorted(grads) == sorted(PARTS) and dmemory.shape == memory.shape
    check = lambda actual, value, bound, what: within(actual, value, Ball(bound, bound, unit_roundoff(dtype)), what)
    for actual, value, bound, what in zip((out, dx, dmemory, *(grads[key] for key in PARTS)), expected, budgets,
                                          ("out", "dx", "dmemory", *PARTS), strict=True):
        assert actual.dtype == dtype
        check(actual, value, bound, what)
    # its recurrent twin, all positions at once and one by one; rows that are padding to the one are positions to the other
    check(np.where(real, reads[0], 0), expected[0], budgets[0], "read")
    if N:
        check(np.where(real, np.concatenate(reads[1:], 1), 0), expected[0], budgets[0], "read one by one")


@given(seeds, kinds, st.sampled_from([np.nan, np.inf, 1e30]))
def test_padding_of_a_memory_changes_nothing(seed, attention, garbage):
    """Not what stands in it, and not how much of it there is."""
    rng, B, N, Nm, E, Em = np.random.default_rng(seed), 3, 4, 5, 4, 3
    params, options = attention_params(rng, E, "f8", Em), {"heads": 2, "attention": attention}
    lengths, memory_lengths = rng.integers(0, N + 1, B), rng.integers(0, Nm + 1, B)
    x, memory, dout = (draw(rng, shape, "f8", "plain") for shape in ((B, N, E), (B, Nm, Em), (B, N, E)))
    padding, memory_padding = np.arange(N) >= lengths[:, None], np.arange(Nm) >= memory_lengths[:, None]
    dirty_x, dirty_memory, dirty_dout = x.copy(), memory.copy(), dout.copy()
    dirty_x[padding] = dirty_dout[padding] = garbage
    dirty_memory[memory_padding] = garbage
    results = []
    for a, m, d in ((x, memory, dout), (dirty_x, dirty_memory, dirty_dout)):
        out, residuals = attention_layer.cross_attention_forward(params, "a", a, m, lengths=lengths, memory_lengths=memory_lengths, **options)
        dx, dmemory, grads = attention_layer.cross_attention_backward(d, residuals)
        state = attention_layer.cross_attention_init(params, "a", m, memory_lengths=memory_lengths, **options)
        results.append([out, dx, dmemory, *grads.values(), attention_layer.cross_attention_read(params, "a", x, state, **options)])
    for clean, dirty in zip(*results, strict=True):
        np.testing.assert_array_equal(dirty, clean)
    out, dx, dmemory, *_, read = results[0]
    assert not out[padding].any() and not dx[padding].any() and not dmemory[memory_padding].any()
    bound = attention_budget(x, memory, tuple(params.values()), dout, lengths=[N] * B, memory_lengths=memory_lengths, **options)[0]
    for b, m in enumerate(memory_lengths):
        alone, _ = attention_layer.cross_attention_forward(params, "a", x[b], memory[b, :m], **options)
        within(read[b], alone.astype(REAL), Ball(bound[b], 2 * bound[b], 2.0**-53), "alone")


# --- words -------------------------------------------------------------------------------------------------------------------------------

ones = np.ones
PARAMS = {key: ones((4, 4) if key.endswith("weight") else 4) for key in PARTS}
MEMORY = attention_layer.cross_attention_init(PARAMS, "a", ones((5, 4)), heads=2)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: attention_layer.attention_forward(PARAMS, "a", ones((3, 4)), heads=3), ValueError, "heads: expected a divisor of E = 4, got 3"),
    (lambda: attention_layer.attention_forward(PARAMS, "a", ones((3, 4)), heads=2, attention="lsh"),
     ValueError, "attention: expected 'linear', 'softmax' or 'lsh-R' with R ≥ 1 rounds, as in 'lsh-4', got 'lsh'"),
    (lambda: attention_layer.attention_forward(PARAMS, "a", ones((3, 4)), heads=2, attention="lsh-1"),
     ValueError, "rng: expected a numpy.random.Generator, got None; attention 'lsh-1' draws its rotations from it"),
    *((lambda call=call: call(heads=2, attention="lsh-1"), ValueError, "attention: expected 'linear' or 'softmax', got 'lsh-1', which sorts")
      for call in (lambda **o: attention_layer.attention_prefill(PARAMS, "a", ones((3, 4)), **o),
                   lambda **o: attention_layer.attention_init((), 4, **o),
                   lambda **o: attention_layer.attention_step(PARAMS, "a", ones(4), **o))),
    (lambda: attention_layer.attention_forward(PARAMS, "a", ones((2, 3, 4)), heads=2, lengths=np.array([1, 4])),
     ValueError, "lengths: expected 0 ≤ length ≤ N = 3"),
    *((lambda call=call: call(heads=2, attention="lsh-1"), ValueError,
       "attention: expected 'linear' or 'softmax', got 'lsh-1', whose queries are its keys: it has no cross attention")
      for call in (lambda **o: attention_layer.cross_attention_forward(PARAMS, "a", ones((3, 4)), ones((5, 4)), **o),
                   lambda **o: attention_layer.cross_attention_init(PARAMS, "a", ones((5, 4)), **o),
                   lambda **o: attention_layer.cross_attention_read(PARAMS, "a", ones((3, 4)), MEMORY, **o))),
    *((lambda call=call: call(heads=3), ValueError, "heads: expected a divisor of E = 4, got 3")
      for call in (lambda **o: attention_layer.cross_attention_forward(PARAMS, "a", ones((3, 4)), ones((5, 4)), **o),
                   lambda **o: attention_layer.cross_attention_init(PARAMS, "a", ones((5, 4)), **o),
                   lambda **o: attention_layer.cross_attention_read(PARAMS, "a", ones((3, 4)), MEMORY, **o))),
    *((lambda memory=memory: attention_layer.cross_attention_forward(PARAMS, "a", ones((2, 3, 4)), memory, heads=2), ValueError,
       rf"memory: expected \(\.\.\., Nm, Em\) = \({words}, 4\), got ") for memory, words in (
           (ones((3, 5, 4)), "2, 5"), (ones((5, 4)), "2, 5"), (ones((2, 5, 3)), "2, 5"))),
    (lambda: attention_layer.cross_attention_init(PARAMS, "a", ones(4), heads=2), ValueError,
     r"memory: expected \(\.\.\., Nm, Em\), got \(4,\)"),
    (lambda: attention_layer.cross_attention_forward(PARAMS, "a", ones((3, 4)), ones((5, 4), "f4"), heads=2), TypeError,
     "x is float64 and memory is float32"),
    (lambda: attention_layer.cross_attention_forward(PARAMS, "a", ones((3, 4)), ones((5, 4)), heads=2, memory_lengths=np.array(6)),
     ValueError, "memory_lengths: expected 0 ≤ length ≤ N = 5"),
    (lambda: attention_layer.cross_attention_read(PARAMS, "a", ones((2, 3, 4)), MEMORY, heads=2),
     ValueError, r"state: expected \(\.\.\., H, \*, D\) = \(2, 2, 2, 2\), got \(2, 2, 2\): one memory for each sequence"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_wrong_is_said(call, error, words):
    with pytest.raises(error, match=words):
        call()
