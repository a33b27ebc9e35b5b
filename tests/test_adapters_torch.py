"""Laws of the PyTorch adapter: the recurrence by the checker, the bits and the memory of refattn's own, and what autograd asks beyond that."""
from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import refattn
from refattn.features import FEATURE_MAPS, positive_random, random_fourier
from refattn.rules import _forms
from refattn.testing.check import check_kernel
from refattn.testing.laws import derivative

torch = pytest.importorskip("torch", reason="the adapter is one of PyTorch, which is not installed")

from refattn.adapters import torch as adapter  # noqa: E402

torch.set_num_threads(1)                                                          # small tensors, and the tests share the cores among themselves

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")                         # PyTorch's own forward mode calls it

RULES = ["linear", "gated", "delta", "gated_delta"]
DECAYS = [(rule, decay) for rule in RULES for decay in (("head", "channel") if "gated" in rule else ("head",))]
FUNCTIONS = ["recurrence", "recurrence_step", "causal_linear_attention", "causal_linear_attention_step", "linear_attention", "softmax_attention"]


def drawn(rng: np.random.Generator, name: str, *, lead: tuple[int, ...] = (2,), N: int = 5, exact: bool = False,
          rule: str = "gated_delta") -> list[np.ndarray | None]:
    """Arrays for the function of that name, in float64; a State as its two arrays. Exact: small integers, decays of 1 and 0, β of 1 and 2."""
    H, D, M = 2, 3, 2
    units = np.eye(D)[rng.integers(D, size=(*lead, H, N))] if exact and "delta" in rule and N > D else None        # keys that let no state grow
    kv = (*lead, H)
    draw = (lambda *shape: rng.integers(-2, 3, shape).astype(float)) if exact else (lambda *shape: rng.standard_normal(shape))
    rows = () if name.endswith("_step") else (N,)
    q, k, v = draw(*lead, 2 * H, *rows, D), draw(*kv, *rows, D) if units is None or not rows else units, draw(*kv, *rows, M)
    if name.startswith("recurrence"):
        channels = (D,) if rng.integers(2) else ()
        g = rng.choice([0.0, -np.inf], (*kv, *rows, *channels), p=[0.8, 0.2]) if exact else -abs(draw(*kv, *rows, *channels))
        beta = rng.choice([1.0, 2.0], (*kv, *rows)) if exact else abs(draw(*kv, *rows))
        return [q, k, v, g if "gated" in rule else None, beta if "delta" in rule else None, draw(*kv, D, M)]
    return [q, k, v, draw(*kv, D, M), abs(draw(*kv, D)) + 1] if name.startswith("causal") else [q, k, v]


def options(name: str) -> dict[str, Any]:
    return {"rule": "gated_delta", "scale": 0.5} if name.startswith("recurrence") else {"causal": True} if name == "softmax_attention" else {}


def called(name: str, tensors: Any, **more: Any) -> tuple[Any, ...]:
    """The adapter's function with a State from its two tensors; its outputs, flat."""
    if name.startswith("causal") and len(tensors) == 5:
        tensors = [*tensors[:3], refattn.State(*tensors[3:])]
    found = getattr(adapter, name)(*tensors, **{**options(name), **more})
    flat = (found,) if isinstance(found, torch.Tensor) else (found[0], *(found[1] if isinstance(found[1], tuple) else found[1:]))
    return flat


def leaves(arrays: Any) -> list[Any]:
    return [None if x is None else torch.from_numpy(x.copy()).requires_grad_() for x in arrays]


def there(tensors: Any) -> list[Any]:
    return [x for x in tensors if x is not None]


def cotangents(rng: np.random.Generator, outputs: Any) -> list[Any]:
    return [torch.from_numpy(np.asarray(rng.integers(-2, 3, tuple(y.shape)))).to(y.dtype) for y in outputs]


def their_own(name: str, arrays: Any, dy: Any, **more: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs and gradients by `refattn.vjp`, flat."""
    if name.startswith("causal"):
        arrays, dy = [*arrays[:3], refattn.State(*arrays[3:])], [dy[0], refattn.State(*dy[1:])]
    outputs, pullback = refattn.vjp(getattr(refattn, name), *arrays, **{**options(name), **more})
    flat = lambda xs: [y for x in xs if x is not None for y in (x if isinstance(x, tuple) else (x,))]
    return flat(outputs if isinstance(outputs, tuple) else (outputs,)), flat(pullback(*dy))


def numpys(tensors: Any) -> list[np.ndarray]:
    return [adapter._array(x) for x in tensors]


def same_bits(found: Any, expected: Any) -> None:
    """Of tensors, of arrays, of both."""
    for i, pair in enumerate(zip(found, expected, strict=True)):
        x, y = (adapter._array(z) if isinstance(z, torch.Tensor) else np.asarray(z) for z in pair)
        assert x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y), f"number {i}: {x.dtype} {x}, expected {y.dtype} {y}"


# --- first order: the checker's laws, refattn's own bits, nothing copied ------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize(("rule", "decay"), DECAYS)
def test_it_is_the_recurrence(rule: str, decay: str, dtype: str) -> None:
    def fn(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        *more, state = rest
        g, beta = more.pop(0) if "gated" in rule else None, more.pop(0) if "delta" in rule else None
        return adapter.recurrence(q, k, v, g, beta, state, rule=rule, scale=0.5)

    report = check_kernel(fn, rule=rule, backward="autodiff", decay=decay, scale=0.5, grouped=True, dtype=dtype, to="torch",
                          examples=15 if dtype == "float32" else 5)
    assert report.passed and {"gradients of integers", "expanded cotangent", "any strides"} <= set(report.cases), str(report)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_and_gradients_are_bit_for_bit_those_of_refattn(name: str, dtype: str, rng: np.random.Generator) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 comes from ml_dtypes, which is not installed")
    tensors = [x.detach().to(getattr(torch, dtype)).requires_grad_() for x in leaves(drawn(rng, name))]
    outputs = called(name, tensors)
    dy = cotangents(rng, outputs)
    arrays = numpys(tensors)
    expected, gradients = their_own(name, arrays, numpys(dy))
    same_bits(outputs, expected)
    same_bits(torch.autograd.grad(outputs, tensors, dy), gradients)
    assert [x.dtype for x in outputs] == [getattr(torch, dtype), *[torch.promote_types(getattr(torch, dtype), torch.float32)] * (len(outputs) - 1)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_copied_on_the_way_in_or_out(name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {}
    vjp = refattn.vjp

    def addresses(arrays: Any) -> list[int]:
        return [y.ctypes.data for x in arrays if x is not None for y in (x if isinstance(x, tuple) else (x,))]

    def watched(f: Any, *arrays: Any, **options: Any) -> Any:
        outputs, pullback = vjp(f, *arrays, **options)

        def pull(*dy: Any) -> Any:
            gradients = pullback(*dy)
            seen["cotangents"], seen["gradients"] = addresses(dy), addresses(gradients)
            return gradients

        seen["inputs"], seen["outputs"] = addresses(arrays), addresses(outputs if isinstance(outputs, tuple) else (outputs,))
        return outputs, pull

    monkeypatch.setattr(refattn, "vjp", watched)
    tensors = leaves(drawn(rng, name))
    outputs = called(name, tensors)
    dy = cotangents(rng, outputs)
    gradients = torch.autograd.grad(outputs, tensors, dy)
    given, made = [*tensors, *dy], [*outputs, *gradients]
    assert seen["inputs"] + seen["cotangents"] == [x.data_ptr() for x in given]
    assert seen["outputs"] + seen["gradients"] == [x.data_ptr() for x in made]
    arrays = [x.detach().numpy() for x in (*given, *made)]
    for i in range(len(given), len(arrays)):
        assert not any(np.may_share_memory(arrays[i], x) for x in arrays[:i]), "a result lies in memory that is another's"


def test_any_strides_and_shared_memory_change_nothing(rng: np.random.Generator) -> None:
    whole = torch.from_numpy(rng.standard_normal((2, 7, 2, 4, 3))).requires_grad_()                       # q and k side by side, positions first
    q, k = (x.transpose(1, 2) for x in whole.unbind(2))
    out, state = adapter.recurrence(q, k, q, state=torch.ones(3, 3, dtype=torch.float64).expand(2, 4, 3, 3))
    dout = torch.from_numpy(rng.standard_normal((2, 4, 7, 1))).expand(out.shape)
    dstate = torch._neg_view(torch.from_numpy(rng.standard_normal((2, 4, 3, 3)))).transpose(2, 3)
    before = whole.detach().clone()
    (found,) = torch.autograd.grad((out, state), whole, (dout, dstate))
    assert torch.equal(whole, before)
    arrays = [np.ascontiguousarray(x.detach().numpy()) for x in (q, k, q)]
    expected, (dq, dk, dv, _) = their_own("recurrence", [*arrays, None, None, np.ones((2, 4, 3, 3))],
                                           [np.ascontiguousarray(x.resolve_neg().numpy()) for x in (dout, dstate)], rule="linear", scale=1)
    same_bits((out, state), expected)
    same_bits([found], [np.stack([x.swapaxes(1, 2) for x in (dq + dv, dk)], axis=2)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_cotangent_of_stride_0_is_the_one_that_it_stands_for(name: str, rng: np.random.Generator) -> None:
    tensors = leaves(drawn(rng, name))
    outputs = called(name, tensors)
    sum(y.sum() * (2 + i) for i, y in enumerate(outputs)).backward()
    _, expected = their_own(name, numpys(tensors), [np.full(tuple(y.shape), 2.0 + i) for i, y in enumerate(outputs)])
    same_bits([x.grad for x in tensors], expected)


def test_an_array_of_another_library_goes_in_and_out_by_dlpack(rng: np.random.Generator) -> None:
    arrays = [rng.standard_normal(shape) for shape in ((2, 5, 3), (2, 5, 3), (2, 5, 2))]
    out, state = adapter.recurrence(*(torch.from_dlpack(x) for x in arrays))
    back = np.from_dlpack(out)
    assert back.ctypes.data == out.data_ptr()
    same_bits((back, np.from_dlpack(state)), refattn.recurrence(*arrays))


# --- what autograd asks: which gradients, when, how often ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_the_gradients_that_are_needed_are_given(name: str, rng: np.random.Generator) -> None:
    arrays = drawn(rng, name)
    tensors = [torch.from_numpy(x) for x in arrays]
    assert not any(y.requires_grad for y in called(name, tensors))
    tensors[1].requires_grad_()
    with torch.no_grad():
        assert not any(y.requires_grad for y in called(name, tensors))
    with torch.inference_mode():
        same_bits(called(name, tensors), called(name, leaves(arrays)))
    outputs = called(name, tensors)
    dy = cotangents(rng, outputs)
    with torch.no_grad():
        given = adapter._Attention.backward(outputs[0].grad_fn, *dy)
    assert [d is not None for d in given] == [False, False, True, *[False] * (len(tensors) - 2)]
    torch.autograd.backward(outputs, dy)
    same_bits([tensors[1].grad], their_own(name, arrays, numpys(dy))[1][1:2])
    assert all(x.grad is None for i, x in enumerate(tensors) if i != 1)


def test_of_two_outputs_one_may_go_unused(rng: np.random.Generator) -> None:
    arrays = drawn(rng, "recurrence")
    zeros = None
    for used in (0, 1):
        tensors = leaves(arrays)
        outputs = called("recurrence", tensors)
        dy = cotangents(rng, outputs)
        zeros = [d if i == used else 0 * d for i, d in enumerate(dy)]
        torch.autograd.backward(outputs[used], dy[used])
        same_bits([x.grad for x in tensors], their_own("recurrence", arrays, numpys(zeros))[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_that_is_kept_gives_the_same_again_and_one_that_is_not_keeps_no_arrays(name: str, rng: np.random.Generator,
                                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    to_array = adapter._array
    monkeypatch.setattr(adapter, "_array", lambda x: (alive.append(weakref.ref(y := to_array(x))), y)[1])
    tensors = leaves(drawn(rng, name))
    outputs = called(name, tensors)
    dy = cotangents(rng, outputs)
    first = torch.autograd.grad(outputs, tensors, dy, retain_graph=True)
    same_bits(torch.autograd.grad(outputs, tensors, dy), first)
    gc.collect()
    assert alive and not any(x() is not None for x in alive)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, tensors, dy)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("which", ["input", "output"])
def test_writing_to_what_the_backward_reads_is_noticed(name: str, which: str, rng: np.random.Generator) -> None:
    tensors = leaves(drawn(rng, name))
    given = [1 * x for x in tensors]
    outputs = called(name, given)
    with torch.no_grad():
        (outputs[0] if which == "output" else given[1]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


def test_a_sequence_in_two_calls_has_the_gradients_of_both_through_the_state(rng: np.random.Generator) -> None:
    q, k, v, S, z = leaves(drawn(rng, "causal_linear_attention", N=6))
    first, middle = adapter.causal_linear_attention(q[..., :4, :], k[..., :4, :], v[..., :4, :], refattn.State(S, z))
    second, end = adapter.causal_linear_attention(q[..., 4:, :], k[..., 4:, :], v[..., 4:, :], middle)
    dy = cotangents(rng, (first, second, *end))
    found = torch.autograd.grad((first, second, *end), (q, k, v, S, z), dy)
    arrays, (do1, do2, dS, dz) = numpys((q, k, v)), numpys(dy)
    (_, state), earlier = refattn.vjp(refattn.causal_linear_attention, *(x[..., :4, :] for x in arrays), refattn.State(*numpys((S, z))))
    _, later = refattn.vjp(refattn.causal_linear_attention, *(x[..., 4:, :] for x in arrays), state)
    *late, dmiddle = later(do2, refattn.State(dS, dz))
    *early, dstart = earlier(do1, dmiddle)
    same_bits(found, [*(np.concatenate(x, axis=-2) for x in zip(early, late, strict=True)), *dstart])


def test_threads_do_not_meet(rng: np.random.Generator) -> None:
    arrays = drawn(rng, "recurrence", N=300)
    dy = [torch.from_numpy(rng.standard_normal(shape)) for shape in ((2, 4, 300, 2), (2, 2, 3, 2))]

    def once(_: int) -> list[Any]:
        tensors = leaves(arrays)
        outputs = called("recurrence", tensors)
        return [*outputs, *torch.autograd.grad(outputs, tensors, dy)]

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(once, range(8))
    for other in others:
        same_bits(other, first)


# --- gradients of gradients, forward mode ---------------------------------------------------------------------------------------------------

def of_tensors(name: str, arrays: Any, **more: Any) -> tuple[Any, list[Any]]:
    """The function of those tensors alone that are there, and these."""
    def f(*tensors: Any) -> Any:
        rest = iter(tensors)
        return called(name, [None if x is None else next(rest) for x in arrays], **more)

    return f, there(leaves(arrays))


CASES = [("recurrence", {"rule": rule}) for rule in RULES] + [("recurrence_step", {"rule": rule}) for rule in RULES] + [
    ("causal_linear_attention", {}), ("causal_linear_attention_step", {}),
    *(("linear_attention", {"feature_map": phi}) for phi in FEATURE_MAPS),
    *(("linear_attention", {"feature_map": phi(3, 2, 0, dtype="float64")}) for phi in (random_fourier, positive_random)),
    ("linear_attention", {"causal": True}), ("linear_attention", {"key_lengths": [3, 0], "query_lengths": [2, 3]}),
    ("softmax_attention", {}), ("softmax_attention", {"causal": False, "key_lengths": [1, 3]})]


@pytest.mark.parametrize(("name", "more", "states"), [(*case, states) for case in CASES for states in (True, False)
                                                      if states or case[0].startswith(("recurrence", "causal"))])
def test_torch_finds_both_orders_right_in_both_modes(name: str, more: dict[str, Any], states: bool, rng: np.random.Generator) -> None:
    arrays = drawn(rng, name, lead=(2,) if "key_lengths" in more else (), N=3, rule=more.get("rule", ""))
    if not states:
        arrays[5 if name.startswith("recurrence") else 3:] = [None] * (len(arrays) - (5 if name.startswith("recurrence") else 3))
    f, tensors = of_tensors(name, arrays, **more)
    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, tensors, check_fwd_over_rev=True, fast_mode=True)


def chunked_backward(arrays: Any, rule: str, dout: np.ndarray, dstate: np.ndarray) -> list[np.ndarray]:
    """The hand-derived backward as NumPy arrays get it, complex ones too."""
    forward, backward = _forms(np, None, rule)
    *_, residuals = forward(*arrays)
    return there(backward(dout, dstate, residuals))


@pytest.mark.parametrize(("dtype", "states"), [("float64", True), ("float64", False), ("float32", True), ("float16", True)])
@pytest.mark.parametrize("rule", RULES)
def test_second_order_is_exactly_the_complex_step_of_the_backward(rule: str, dtype: str, states: bool, rng: np.random.Generator) -> None:
    """For integers, decays of 1 and 0 and β of 1 and 2 every sum is exact: H u and J u bit by bit, over more than one chunk."""
    arrays = drawn(rng, "recurrence", N=37, exact=True, rule=rule)
    arrays[5] = arrays[5] if states else None
    f, tensors = of_tensors("recurrence", arrays, rule=rule, scale=1.0)
    tensors = [x.detach().to(getattr(torch, dtype)).requires_grad_() for x in tensors]
    outputs = f(*tensors)
    dy = [d.requires_grad_() for d in cotangents(rng, outputs)]
    gradients = torch.autograd.grad(outputs, tensors, dy, create_graph=True)
    u = cotangents(rng, gradients)
    found = torch.autograd.grad(gradients, [*tensors, *dy], u)
    assert [x.dtype for x in found] == [x.dtype for x in (*tensors, *dy)]

    def placed(given: Any) -> list[Any]:
        rest = iter(given)
        return [None if x is None else next(rest) for x in arrays]

    wide, directions, (dout, dstate) = ([x.detach().double().numpy() for x in xs] for xs in (tensors, u, dy))
    Hu = derivative(lambda *x: chunked_backward(placed(x), rule, dout + 0j, dstate + 0j)[: len(x)], wide, directions)
    Ju = derivative(lambda *x: refattn.oracle.full_recurrence(*placed(x)), wide, directions)
    same_bits(found, [torch.from_numpy(x).to(y.dtype) for x, y in zip([*Hu, *Ju], found, strict=True)])
    same_bits(gradients, torch.autograd.grad(f(*tensors), tensors, dy))


def test_packed_sequences_have_both_orders(rng: np.random.Generator) -> None:
    arrays = drawn(rng, "recurrence", lead=(), N=4)
    arrays[5] = rng.standard_normal((2, 3, 3, 2))
    f, tensors = of_tensors("recurrence", arrays, cu_seqlens=torch.tensor([0, 1, 1, 4]))
    assert torch.autograd.gradgradcheck(f, tensors, fast_mode=True)


def test_there_is_a_third_order(rng: np.random.Generator) -> None:
    f, tensors = of_tensors("recurrence", drawn(rng, "recurrence", lead=(), N=2, rule="linear"), rule="linear")

    def second(*tensors: Any) -> Any:
        gradients = torch.autograd.grad(sum((y**2).sum() for y in f(*tensors)), tensors, create_graph=True)
        return torch.autograd.grad(sum((d**2).sum() for d in gradients), tensors, create_graph=True)

    assert torch.autograd.gradcheck(second, tensors, fast_mode=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_precision_has_the_second_order_of_float32(name: str, rng: np.random.Generator) -> None:
    arrays, found = drawn(rng, name, exact=True), []
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [x.detach().to(dtype).requires_grad_() for x in leaves(arrays)]
        outputs = called(name, tensors)
        gradients = torch.autograd.grad(outputs, tensors, cotangents(np.random.default_rng(3), outputs), create_graph=True)
        found.append(torch.autograd.grad(gradients, tensors, cotangents(np.random.default_rng(4), gradients), allow_unused=True))
        assert all(x is None or x.dtype == dtype for x in found[-1])
    same_bits(there(found[0]), there(x if x is None else x.to(torch.bfloat16) for x in found[1]))


# --- torch.func, torch.compile, empty axes, words ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_is_one_more_leading_axis(name: str, rng: np.random.Generator) -> None:
    shared, *mapped = drawn(rng, name, lead=(3, 2))
    arrays = [torch.from_numpy(x) for x in (shared[0], *(np.moveaxis(x, 0, 2) for x in mapped))]           # all queries are the same
    more = {"query_lengths": [2, 5], "key_lengths": [5, 1]} if name.startswith("linear") else {}
    f = lambda *tensors: called(name, tensors, **more)
    loss = lambda *tensors: sum((y**2).sum() for y in f(*tensors))
    axes = (None, *(2 for _ in mapped))

    def one_by_one(f: Any) -> list[Any]:
        return [torch.stack(x) for x in zip(*(f(arrays[0], *(x[:, :, i] for x in arrays[1:])) for i in range(3)), strict=True)]

    same_bits(torch.func.vmap(f, in_dims=axes)(*arrays), one_by_one(f))
    grad = torch.func.grad(loss, tuple(range(len(arrays))))
    for x, y in zip(torch.func.vmap(grad, in_dims=axes)(*arrays), one_by_one(grad), strict=True):
        torch.testing.assert_close(x, y)
    leaf = arrays[1].clone().requires_grad_()
    (found,) = torch.autograd.grad(sum(y.sum() for y in torch.func.vmap(f, in_dims=axes)(arrays[0], leaf, *arrays[2:])), leaf)
    torch.testing.assert_close(found, torch.stack(torch.autograd.grad(
        [sum(y.sum() for y in f(arrays[0], leaf[:, :, i], *(x[:, :, i] for x in arrays[2:]))) for i in range(3)], [leaf])).sum(0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians_and_hessians_of_torch_func_agree_with_those_of_autograd(name: str, rng: np.random.Generator) -> None:
    tensors = tuple(torch.from_numpy(x) for x in drawn(rng, name, lead=(), N=2))
    loss = lambda *tensors: sum((y**2).sum() for y in called(name, tensors))
    every = tuple(range(len(tensors)))
    f = lambda *tensors: called(name, tensors)[0]
    for a, b, c in zip(torch.func.jacrev(f, every)(*tensors), torch.func.jacfwd(f, every)(*tensors),
                       torch.autograd.functional.jacobian(f, tensors), strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)
    for row, expected in zip(torch.func.hessian(loss, every)(*tensors), torch.autograd.functional.hessian(loss, tensors), strict=True):
        for a, b in zip(row, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")                   # torch's own, of its compiled graphs
def test_a_compiled_function_runs_it_as_it_is(rng: np.random.Generator) -> None:
    tensors = leaves(drawn(rng, "recurrence"))

    def loss(*tensors: Any) -> Any:
        out, state = adapter.recurrence(2 * tensors[0], *tensors[1:], rule="gated_delta")
        return (3 * out).sum() + state.sum()

    compiled = torch.compile(loss, backend="eager")
    same_bits(torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend="eager", fullgraph=True)(*tensors)


def test_batched_cotangents_of_the_old_kind_are_refused() -> None:
    x = torch.ones(2, 3, 1)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.functional.jacobian(lambda q: adapter.recurrence(q, x, x)[0], x, vectorize=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_changes_no_gradient_and_frees_memory_only_if_it_is_reentrant(reentrant: bool, rng: np.random.Generator,
                                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint
    alive: list[Any] = []
    to_array = adapter._array
    tensors = leaves(drawn(rng, "softmax_attention"))
    f = lambda *tensors: adapter.softmax_attention(*(2 * x for x in tensors))
    dy = cotangents(rng, [f(*tensors)])
    expected = torch.autograd.grad(f(*tensors), tensors, dy)
    monkeypatch.setattr(adapter, "_array", lambda x: (alive.append(weakref.ref(y := to_array(x))), y)[1])
    out = checkpoint(f, *tensors, use_reentrant=reentrant)
    gc.collect()
    assert any(x() is not None for x in alive) != reentrant
    torch.autograd.backward(out, dy[0])
    same_bits([x.grad for x in tensors], expected)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.endswith("_step")])
@pytest.mark.parametrize("create_graph", [False, True])
def test_no_positions_are_no_error(name: str, create_graph: bool, rng: np.random.Generator) -> None:
    arrays = drawn(rng, name, N=0)
    tensors = leaves(arrays)
    outputs = called(name, tensors)
    dy = cotangents(rng, outputs)
    expected, gradients = their_own(name, arrays, numpys(dy))
    same_bits(outputs, expected)
    same_bits(torch.autograd.grad(outputs, tensors, dy, create_graph=create_graph), gradients)


X = torch.ones(2, 3, 1)


@pytest.mark.parametrize(("words", "error", "name", "given"), [
    ("q: expected a torch.Tensor, got ndarray; for NumPy arrays there is refattn.recurrence", TypeError, "recurrence", [X.numpy(), X, X]),
    ("k: expected a torch.Tensor, got NoneType", TypeError, "softmax_attention", [X, None, X]),
    ("state: expected a torch.Tensor, got float", TypeError, "recurrence", [X, X, X, None, None, 0.0]),
    (r"v: expected a tensor on the CPU, got one on meta; for a GPU hand CuPy arrays to refattn.linear_attention itself, "
     r"cupy.from_dlpack\(v.detach\(\)\)", TypeError, "linear_attention", [X, X, X.to("meta")]),
    ("q: expected a dense tensor, got one of torch.sparse_coo; pass q.to_dense()", TypeError, "recurrence", [X.to_sparse(), X, X]),
    ("q is float32 and k is float64; cast one of them, nothing is cast silently", TypeError, "recurrence", [X, X.double(), X]),
    ("q: expected float16, bfloat16, float32 or float64, got int64", TypeError, "linear_attention", [X.long(), X.long(), X.long()]),
    (r"state: expected State\(S, z\) as a former call returned it, got Tensor", TypeError, "causal_linear_attention", [X, X, X, X]),
    (r"state: expected State\(S, z\) as a former call returned it, got \(NoneType, ndarray\)", TypeError, "causal_linear_attention",
     [X, X, X, refattn.State(None, X[:, 0])]),
    (r"k: expected \(..., Hkv, N, D\) = \(2, 3, 1\), got \(2, 2, 1\)", ValueError, "recurrence", [X, X[:, :2], X])])
def test_what_is_wrong_is_said(words: str, error: type[Exception], name: str, given: list[Any]) -> None:
    with pytest.raises(error, match=words):
        getattr(adapter, name)(*given)
