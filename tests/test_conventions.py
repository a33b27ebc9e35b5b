"""What docs/conventions.md says of others, held against the others themselves: its functions are run on the same numbers, in the same layout."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from refattn import linear_attention, softmax_attention
from refattn.testing.budgets import assert_within, gamma, rounding, unit_roundoff
from refattn.testing.loop_budget import loop_budget
from refattn.testing.softmax_budget import softmax_forward_budget

B, N, H, D, M = 2, 5, 3, 4, 6
SLACK = 4                     # of softmax: another library's exp may be off by two units in the last place where NumPy's is by a half
RULES = [("linear", ""), ("gated", "head"), ("gated", "channel"), ("delta", ""), ("gated_delta", "head"), ("gated_delta", "channel")]


@pytest.fixture(scope="module")
def page():
    text = (Path(__file__).resolve().parent.parent / "docs" / "conventions.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "conventions.md", "exec"), names)
    return names


def draw(rng, rule, decay, heads=H, queries=H):
    """q, k, v, g, beta (B, N, H, …) and the state (B, H, D, M), float32; None for what the rule has not. Decays of 0 and -inf among them."""
    q, k, v = (rng.standard_normal((B, N, h, width)).astype(np.float32) for h, width in ((queries, D), (heads, D), (heads, M)))
    g = -rng.random((B, N, heads, *([D] if decay == "channel" else []))).astype(np.float32) if decay else None
    if g is not None:
        g[0, 1], g[1, 2] = 0, -np.inf
    beta = rng.random((B, N, heads)).astype(np.float32) if "delta" in rule else None
    return q, k, v, g, beta, rng.standard_normal((B, heads, D, M)).astype(np.float32)


def wide(*arrays):
    return tuple(None if x is None else x.astype(np.float64) for x in arrays)


def bounds(page, q, k, v, g, beta, state, scale):
    """Of out (B, H, N, M) and the state, for a loop over positions in float32, whose results are then rounded to it."""
    return loop_budget(*map(page["heads"], (q, k, v, g, beta)), state, scale=scale)


@pytest.mark.parametrize("rule, decay", RULES)
@pytest.mark.parametrize("shared", [False, True])
def test_onnx_is_as_the_page_says(page, rng, rule, decay, shared):
    onnx = pytest.importorskip("onnx", minversion="1.23", reason="needs onnx 1.23 or later: pip install 'refattn[onnx]'")
    from onnx.reference import ReferenceEvaluator
    q, k, v, g, beta, state = draw(rng, rule, decay, heads=2, queries=4)
    beta = beta[:, :, :1] if shared and beta is not None else beta
    given = (*(x.reshape(B, N, -1) for x in (q, k, v)), state, None if g is None else g.reshape(B, N, -1), beta)
    names = ("query", "key", "value", "past_state", "decay", "beta")
    feeds = {name: x for name, x in zip(names, given, strict=True) if x is not None}
    info = lambda name, shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    for scale in (0.0, 0.75):
        node = onnx.helper.make_node("LinearAttention", [name if name in feeds else "" for name in names], ["out", "end"], q_num_heads=4,
                                     kv_num_heads=2, update_rule=rule, scale=scale)
        graph = onnx.helper.make_graph([node], "one", [info(n, x.shape) for n, x in feeds.items()],
                                       [info("out", (B, N, 4 * M)), info("end", state.shape)])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 27)], ir_version=10)
        out, end = ReferenceEvaluator(model).run(None, feeds)
        expected = page["onnx_linear_attention"](*wide(*given), update_rule=rule, q_num_heads=4, kv_num_heads=2, scale=scale)
        whole = None if beta is None else np.broadcast_to(beta, (B, N, 2))
        bar = bounds(page, q, k, v, g, whole, state, scale or D**-0.5)
        assert_within(out, expected[0], page["packed"](bar[0]) + rounding(expected[0], "float32"))
        assert_within(end, expected[1], bar[1] + rounding(expected[1], "float32"), "state")


@pytest.mark.parametrize("rule, decay", RULES)
def test_flash_linear_attention_is_as_the_page_says(page, rng, rule, decay):
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    import torch
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.kda.naive import naive_recurrent_kda
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.simple_gla.naive import naive_recurrent_simple_gla
    case = draw(rng, rule, decay)
    q, k, v, g, beta, state = (None if x is None else torch.from_numpy(x) for x in case)
    turn = lambda x: x.transpose(1, 2)
    kept = {"initial_state": state, "output_final_state": True}
    out, end = {
        ("linear", ""): lambda: naive_recurrent_linear_attn(q, k, v, **kept),
        ("gated", "head"): lambda: naive_recurrent_simple_gla(q, k, v, g, **kept),
        ("gated", "channel"): lambda: naive_recurrent_gla(q, k, v, g, **kept),
        ("delta", ""): lambda: (lambda o, s: (turn(o), s))(*delta_rule_recurrence(*map(turn, (q, k, v, beta)), **kept)),
        ("gated_delta", "head"): lambda: naive_recurrent_gated_delta_rule(q, k, v, beta, g, **kept),
        ("gated_delta", "channel"): lambda: naive_recurrent_kda(q, k, v, g, beta, **kept)}[rule, decay]()
    expected = page["fla"](*wide(*case), rule=rule)
    bar = bounds(page, *case, D**-0.5)
    assert_within(out.numpy(), expected[0], page["heads"](bar[0]) + rounding(expected[0], "float32"))
    assert_within(end.numpy(), expected[1], bar[1] + rounding(expected[1], "float32"), "state")


def test_several_value_heads_read_one_key_head_in_kda(page, rng):
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    import torch
    from fla.ops.kda.naive import naive_recurrent_kda
    q, k, v, g, beta, state = draw(rng, "gated_delta", "channel", heads=2 * H)
    q, k = q[:, :, :H], k[:, :, :H]
    out, end = naive_recurrent_kda(*map(torch.from_numpy, (q, k, v, g, beta)), initial_state=torch.from_numpy(state), output_final_state=True)
    case = (*(np.repeat(x, 2, axis=2) for x in (q, k)), v, g, beta, state)
    expected, bar = page["fla"](*wide(*case), rule="gated_delta"), bounds(page, *case, D**-0.5)
    assert_within(out.numpy(), expected[0], page["heads"](bar[0]) + rounding(expected[0], "float32"))
    assert_within(end.numpy(), expected[1], bar[1] + rounding(expected[1], "float32"), "state")


def test_flash_linear_attention_normalises_as_the_page_says(page, rng):
    pytest.importorskip("fla", reason="needs flash-linear-attention")
    import torch
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    q, k, v = (rng.random((B, N, H, width)).astype(np.float32) for width in (D, D, M))
    q[0, 2], k[1, 0] = 0, 0                                       # rows that ε alone keeps from 0/0
    q[1] *= 1e-10                                                 # rows in which ε counts
    out, _ = naive_recurrent_linear_attn(*map(torch.from_numpy, (q, k, v)), normalize=True)
    expected = page["fla_normalised"](*wide(q, k, v))
    assert_within(out.numpy(), expected, gamma(2 * (N + D) + 8, "float32") * expected)             # all terms are positive
    assert np.abs(page["heads"](linear_attention(*map(page["heads"], wide(q, k, v)), feature_map="identity", causal=True)) - expected).max() > 0.1


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_mlx_is_as_the_page_says(page, rng, decay):
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    q, k, v, g, beta, state = draw(rng, "gated_delta", decay, heads=2 * H)
    k = k[:, :, :H]                                               # two value heads to one key head
    out, end = mx.fast.gated_delta_update(*map(mx.array, (q, k, v, np.exp(g), beta, np.swapaxes(state, -1, -2))))
    expected = page["mlx_gated_delta_update"](*wide(q, k, v, np.exp(g), beta, np.swapaxes(state, -1, -2)))
    twice = [np.repeat(x, 2, axis=2) for x in (q, k)]
    bar = bounds(page, *twice, v, g, beta, state, 1.0)
    assert_within(np.asarray(out), expected[0], page["heads"](bar[0]) + rounding(expected[0], "float32"))
    assert_within(np.asarray(end), expected[1], np.swapaxes(bar[1], -1, -2) + rounding(expected[1], "float32"), "state")


def softmax_case(rng, width=M):
    return tuple(rng.standard_normal((B, h, N, w)).astype(np.float32) for h, w in ((4, D), (2, D), (2, width)))


@pytest.mark.parametrize("causal", [False, True])
def test_mlx_softmax_is_as_the_page_says(page, rng, causal):
    mx = pytest.importorskip("mlx.core", reason="needs mlx")
    q, k, v = softmax_case(rng)
    options = {"scale": 0.75, "mask": "causal" if causal else None}
    out = mx.fast.scaled_dot_product_attention(*map(mx.array, (q, k, v)), **options)
    bar = softmax_forward_budget(q, k, v, causal=causal, scale=0.75, key_block=1)
    assert_within(np.asarray(out), page["mlx_scaled_dot_product_attention"](*wide(q, k, v), **options), SLACK * bar)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.75])
def test_torch_is_as_the_page_says(page, rng, causal, scale):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    q, k, v = softmax_case(rng)
    out = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)), is_causal=causal, scale=scale, enable_gqa=True)
    bar = softmax_forward_budget(q, k, v, causal=causal, scale=scale, key_block=1)
    assert_within(out.numpy(), page["torch_scaled_dot_product_attention"](*wide(q, k, v), is_causal=causal, scale=scale), SLACK * bar)


@pytest.mark.parametrize("causal, lengths", [(False, None), (True, None), (False, (np.array([4, 5]), np.array([3, 5])))])
@pytest.mark.parametrize("scale", [None, 0.75])
def test_jax_is_as_the_page_says(page, rng, causal, lengths, scale):
    jax = pytest.importorskip("jax", reason="needs the extra jax")
    q, k, v = softmax_case(rng, width=D)
    given = {} if lengths is None else {"query_seq_lengths": lengths[0], "key_value_seq_lengths": lengths[1]}
    out = jax.nn.dot_product_attention(*map(page["heads"], (q, k, v)), is_causal=causal, scale=scale, **given)
    expected = page["jax_dot_product_attention"](*map(page["heads"], wide(q, k, v)), is_causal=causal, scale=scale, **given)
    bar = softmax_forward_budget(q, k, v, causal=causal, scale=scale, key_block=1, query_lengths=None if lengths is None else lengths[0],
                                 key_lengths=None if lengths is None else lengths[1])
    assert_within(np.asarray(out), expected, page["heads"](SLACK * bar))


@pytest.mark.parametrize("library", ["torch", "jax", "mlx"])
def test_who_sees_whom_where_keys_and_queries_differ_is_as_the_page_says(rng, library):
    q, k, v = (rng.standard_normal((1, 1, n, D)).astype(np.float32) for n in (2, 4, 4))
    if library == "torch":
        torch = pytest.importorskip("torch", reason="needs PyTorch")
        out, first = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)), is_causal=True).numpy(), 1
    elif library == "jax":
        jax = pytest.importorskip("jax", reason="needs the extra jax")
        out, first = np.asarray(jax.nn.dot_product_attention(*(np.swapaxes(x, 1, 2) for x in (q, k, v)), is_causal=True)).swapaxes(1, 2), 1
    else:
        mx = pytest.importorskip("mlx.core", reason="needs mlx")
        out, first = np.asarray(mx.fast.scaled_dot_product_attention(*map(mx.array, (q, k, v)), scale=D**-0.5, mask="causal")), 3
    for i in range(2):
        seen = (q[:, :, i:i + 1], k[:, :, :first + i], v[:, :, :first + i])
        assert_within(out[:, :, i:i + 1], softmax_attention(*wide(*seen)), SLACK * softmax_forward_budget(*seen, key_block=1))


@pytest.mark.parametrize("causal", [False, True])
def test_fast_transformers_is_as_the_page_says(page, rng, causal):
    pytest.importorskip("fast_transformers", reason="needs pytorch-fast-transformers")
    import torch
    from fast_transformers.attention import CausalLinearAttention, LinearAttention
    from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask
    from fast_transformers.recurrent.attention.self_attention import linear_attention as recurrent
    q, k, v = (rng.standard_normal((B, N, H, width)).astype(np.float32) for width in (D, D, M))
    module, mask = (CausalLinearAttention, TriangularCausalMask(N)) if causal else (LinearAttention, FullMask(N))
    lengths = LengthMask(torch.full((B,), N))
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    assert module(D).eps == page["fast_transformers"].__kwdefaults__["eps"]
    eps = 0.25                                                    # of a size that is seen
    out = module(D, eps=eps)(*tensors, mask, lengths, lengths).numpy()
    expected = page["fast_transformers"](*wide(q, k, v), causal=causal, eps=eps)
    size = page["fast_transformers"](*wide(q, k, np.abs(v)), causal=causal, eps=eps)
    phi = 2 * unit_roundoff("float32") / np.exp(min(q.min(), k.min(), 0.0))                         # theirs is elu(x) + 1: off by units of 1
    bar = (gamma(2 * (N + D) + 8, "float32") + 4 * phi) * size    # all terms but v are positive: so much of numerator and denominator
    assert_within(out, expected, bar)
    if causal:
        step, state, ours = recurrent.RecurrentLinearAttention(D, eps=eps), None, None
        for t in range(N):
            out_t, state = step(*(x[:, t] for x in tensors), state=state)
            ours_t, ours = page["fast_transformers_step"](*wide(q[:, t], k[:, t], v[:, t]), ours, eps=eps)
            assert_within(out_t.numpy(), ours_t, bar[:, t])
            assert [x.shape for x in state] == [x.shape for x in ours]


def test_fast_transformers_softmax_and_unequal_lengths_are_as_the_page_says(page, rng):
    pytest.importorskip("fast_transformers", reason="needs pytorch-fast-transformers")
    import torch
    from fast_transformers.attention import CausalLinearAttention, FullAttention
    from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask
    heads, whole = page["heads"], lambda n: LengthMask(torch.full((B,), n))
    q, k, v = (rng.standard_normal((B, N, H, width)).astype(np.float32) for width in (D, D, M))
    out = FullAttention().eval()(*map(torch.from_numpy, (q, k, v)), FullMask(N), whole(N), whole(N)).numpy()
    assert_within(heads(out), softmax_attention(*map(heads, wide(q, k, v))), SLACK * softmax_forward_budget(*map(heads, (q, k, v)), key_block=1))
    for L, S in ((3, N), (N, 3)):
        tensors = (torch.from_numpy(x[:, :n].copy()) for x, n in ((q, L), (k, S), (v, S)))
        out = CausalLinearAttention(D)(*tensors, TriangularCausalMask(N), whole(L), whole(S)).numpy()
        ours, size = (heads(linear_attention(*map(heads, wide(q, k, x)), causal=True, key_lengths=np.full(B, S)))[:, :L] for x in (v, np.abs(v)))
        phi = 2 * unit_roundoff("float32") / np.exp(min(q.min(), k.min(), 0.0))
        assert_within(out, ours, (gamma(2 * (N + D) + 8, "float32") + 4 * phi) * size)
