"""Laws of the Keras layer that docs/embed/keras.md shows: the page runs, and the layer is refattn's causal linear attention."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refattn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "embed" / "keras.md"

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")         # Keras's own, of its variables


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's code defines; running it is the first law: a tiny model learns, is saved, and is the same when it is read again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        pytest.importorskip("torch", reason="the layer runs on PyTorch, which is not installed")
        keras = pytest.importorskip("keras", reason="the page shows a layer of Keras, which is not installed")
        if keras.backend.backend() != "torch":
            pytest.skip(f"Keras was imported with the backend {keras.backend.backend()} before this test")
        patch.chdir(tmp_path_factory.mktemp("page"))
        names: dict[str, Any] = {"__name__": "page"}
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
            exec(compile(block, PAGE.name, "exec"), names)                                                         # noqa: S102
    return names


def test_it_learns(page: dict[str, Any]) -> None:
    losses = [float(x) for x in page["history"]["loss"]]
    assert losses[-1] < losses[0] / 3


def test_the_layer_is_the_attention_between_its_two_products(page: dict[str, Any], rng: np.random.Generator) -> None:
    """Products of integers are exact, the second one is with the identity: what is left are the attention's own bits."""
    layer, x = page["CausalLinearAttention"](heads=2, feature_map="relu"), rng.integers(-2, 3, (3, 7, 4)).astype("float32")
    layer.build(x.shape)
    into = rng.integers(-1, 2, (4, 12)).astype("float32")
    layer.set_weights([into, np.eye(4), np.zeros(4)])
    q, k, v = np.moveaxis((x @ into).reshape(3, 7, 3, 2, 2), (2, 3), (0, 2))
    attended, _ = refattn.causal_linear_attention(q, k, v, feature_map="relu")
    assert np.array_equal(layer(x).detach().numpy(), attended.swapaxes(1, 2).reshape(3, 7, 4))


def test_the_future_never_reaches_the_past(page: dict[str, Any], rng: np.random.Generator) -> None:
    layer, x = page["CausalLinearAttention"](heads=2), rng.standard_normal((2, 6, 8)).astype("float32")
    later = np.concatenate([x[:, :4], -x[:, 4:]], axis=1)
    assert np.array_equal(layer(x)[:, :4].detach().numpy(), layer(later)[:, :4].detach().numpy())


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_it_runs_in_the_precision_that_is_asked_for(page: dict[str, Any], policy: str, rng: np.random.Generator) -> None:
    if "bfloat16" in policy:
        pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 comes from ml_dtypes, which is not installed")
    layer = page["CausalLinearAttention"](heads=2, dtype=policy)
    y = layer(rng.standard_normal((2, 5, 8)))
    assert str(y.dtype) == f"torch.{policy.removeprefix('mixed_')}"
    y.sum().backward()
    assert all(w.value.grad is not None and bool(w.value.grad.isfinite().all()) for w in layer.weights)


def test_it_stands_in_a_functional_model_and_has_a_configuration(page: dict[str, Any]) -> None:
    keras, Layer = page["keras"], page["CausalLinearAttention"]
    inputs = keras.Input((None, 8))
    assert keras.Model(inputs, Layer(heads=4, feature_map="relu", name="here")(inputs)).output_shape == (None, None, 8)
    config = Layer(heads=4, feature_map="relu", name="here").get_config()
    assert Layer.from_config(config).get_config() == config and (config["heads"], config["feature_map"]) == (4, "relu")
