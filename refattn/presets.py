"""The recurrences of known models: functions that set the arguments of `recurrence` and call it.

| preset            | rule          | g (log decay)                 | beta  | scale | paper                                          |
|-------------------|---------------|-------------------------------|-------|-------|------------------------------------------------|
| `retention`       | `gated`       | log(1 - 2⁻⁵⁻ʰ), one a head    | –     | 1     | Retentive Network, 2023, arXiv 2307.08621      |
| `lightning`       | `gated`       | -8h/H · (1 - l/L), one a head | –     | 1     | Lightning Attention-2, 2024, arXiv 2401.04658; |
|                   |               |                               |       |       | TransNormerLLM, 2023, arXiv 2307.14995         |
| `mamba2_ssd`      | `gated`       | dt·A, one a head              | –     | none  | Transformers are SSMs, 2024, arXiv 2405.21060  |
| `gla`             | `gated`       | given, one a key channel      | –     | 1     | Gated Linear Attention, 2023, arXiv 2312.06635 |
| `delta_net`       | `delta`       | –                             | given | 1     | DeltaNet, 2024, arXiv 2406.06484               |
| `gated_delta_net` | `gated_delta` | given, one a head             | given | 1     | Gated Delta Networks, 2024, arXiv 2412.06464   |
| `kda`             | `gated_delta` | given, one a key channel      | given | 1     | Kimi Linear, 2025, arXiv 2510.26692            |

Only the recurrence is here. What surrounds it in a model is the caller's: projections, short convolutions, rotations of q and k, the
normalising of q and k, the functions that make g, β and dt from activations, the norm and the gate of the output. The papers write their
recurrences without a scale, so it is 1; the programs published with most of them multiply by 1/√D: pass `scale=D**-0.5`.

Common to all: q (..., G·H, N, D), k (..., H, N, D), v (..., H, N, M), of one dtype; `state` (..., H, D, M), what preceded position 0, or
None; `cu_seqlens`, several sequences packed along N. The result is (out, state), out (..., G·H, N, M). Decays belong to the key/value
heads, h = 0 … H-1. ValueError and TypeError as `recurrence` raises them, whose docstring says the rest. Papers that write the state as
M × D mean the transpose of ours. To differentiate, or to take one step, give the arguments in the table to `recurrence` or
`recurrence_step` yourself: `vjp(recurrence, q, k, v, g, beta, state, rule=…, scale=…)`; the chain rule through v = dt·x and g = dt·A of
`mamba2_ssd` is then yours too.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ._array import Array, accumulator, cast, check_dtypes, check_positive, check_qkv, check_shape, check_wide_dtype, namespace
from .rules import recurrence


def retention_decay(heads: int) -> np.ndarray:
    """The g of `retention`: log γ_h, γ_h = 1 - 2⁻⁵⁻ʰ for h = 0 … heads-1 (RetNet, 2023, eq. 8). Returns (heads,), float64.

    >>> np.exp(retention_decay(3))
    array([0.96875  , 0.984375 , 0.9921875])
    """
    return np.log1p(-np.exp2(-5.0 - np.arange(check_positive("heads", heads))))


def lightning_decay(heads: int, layer: int, layers: int) -> np.ndarray:
    """The g of `lightning`: -8h/H · (1 - l/L) for h = 0 … H-1, H = heads, l = layer, L = layers. Returns (heads,), float64.

    ValueError for a layer outside 0 … layers.

    >>> lightning_decay(4, layer=1, layers=2).tolist()
    [0.0, -1.0, -2.0, -3.0]
    """
    check_positive("layers", layers)
    if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
        raise TypeError(f"layer: expected an integer, got {layer!r}")
    if not 0 <= layer <= layers:
        raise ValueError(f"layer: expected 0 ≤ layer ≤ layers = {layers}, got {layer}")
    return -8 * np.arange(check_positive("heads", heads)) / heads * (1 - layer / layers)


def retention(q: Array, k: Array, v: Array, state: Array | None = None, *, scale: float = 1.0, cu_seqlens: Any = None) -> tuple[Array, Array]:
    """RetNet. "Retentive Network: A Successor to Transformer for Large Language Models", 2023, eq. 6 with the decays of eq. 8:

        S_n = γ S_{n-1} + K_nᵀ V_n,   Retention(X_n) = Q_n S_n,   γ_h = 1 - 2⁻⁵⁻ʰ

    Here q = Q, k = K (both already rotated by their positions), v = V, g = log γ, the same at all positions: `retention_decay`. The paper's
    three normalising factors, 1/√D among them, are absorbed by the norm of the output that follows; none of them is applied here.

    >>> x = np.ones((3, 1))
    >>> out, state = retention(x, x, x)
    >>> out.ravel().round(6)
    array([1.      , 1.96875 , 2.907227])
    """
    return _fixed_decay(retention_decay, q, k, v, state, scale, cu_seqlens)


def lightning(q: Array, k: Array, v: Array, state: Array | None = None, *, layer: int, layers: int, scale: float = 1.0,
              cu_seqlens: Any = None) -> tuple[Array, Array]:
    """Lightning Attention. "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models", 2024,
    with the decays of "TransNormerLLM", 2023, eq. 2:

        kv_t = λ kv_{t-1} + k_t v_tᵀ,   o_tᵀ = q_tᵀ kv_t,   λ_h = exp(-8h/H · (1 - l/L))

    for head h = 0 … H-1 of H and layer l of L: head 0 never forgets, and later layers forget less. Here g = log λ, the same at all
    positions: `lightning_decay`. The slopes of MiniMax-01 are others, those of ALiBi, 2^(-8(h+1)/H): give g to `recurrence` yourself.

    layer, layers: l and L, 0 ≤ l ≤ L; ValueError "layer: expected 0 ≤ layer ≤ layers = …, got …".

    >>> x = np.ones((2, 3, 1))                                                   # two heads: λ = 1 and exp(-4 · 1/2)
    >>> out, state = lightning(x, x, x, layer=1, layers=2)
    >>> out[..., 0].round(6)
    array([[1.      , 2.      , 3.      ],
           [1.      , 1.135335, 1.153651]])
    """
    return _fixed_decay(lambda heads: lightning_decay(heads, layer, layers), q, k, v, state, scale, cu_seqlens)


def mamba2_ssd(C: Array, B: Array, x: Array, dt: Array, A: Array, state: Array | None = None, *, cu_seqlens: Any = None) -> tuple[Array, Array]:
    """Mamba-2. "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality", 2024, the
    selective state space model with a scalar times the identity for A, and its discretisation:

        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_tᵀ,   y_t = h_tᵀ C_t

    Here q = C, k = B, v = dt·x, g = dt·A, S = h. Neither the skip D·x nor the gate is part of it.

    C, B (..., H', N, D), x (..., H, N, M), dt (..., H, N), positive (after bias and softplus), A (H,), negative (-exp of its parameter), H a
    multiple of H': head h of x reads head h // (H/H') of B and C, the paper's groups. dt and A may be in the accumulator's dtype. Returns
    y (..., H, N, M), h (..., H, D, M).

    Beyond the errors of `recurrence`: ValueError "C: expected (..., H', N, D) = …", "dt: expected (..., H, N) = …", "A: expected (H,) = …",
    "x: expected (..., H, N, M) with H a multiple of …".

    >>> x = np.ones((1, 3, 1))
    >>> y, h = mamba2_ssd(x, x, x, np.full((1, 3), 0.5), np.array([-2.0]))
    >>> y.ravel().round(6)                                                       # decays of exp(-1), writes of 0.5
    array([0.5     , 0.68394 , 0.751607])
    """
    xp = namespace(C=C, B=B, x=x, dt=dt, A=A)
    check_dtypes(C=C, B=B, x=x)
    for name, y in (("dt", dt), ("A", A)):
        check_wide_dtype(name, y, x)
    check_shape("C", C, "(..., H', N, D)", B.shape, "C and B have one shape")
    if B.ndim > 2 and x.ndim == B.ndim and B.shape[-3] != x.shape[-3]:
        if B.shape[-3] == 0 or x.shape[-3] % B.shape[-3]:
            raise ValueError(f"x: expected (..., H, N, M) with H a multiple of the {B.shape[-3]} heads of B, got {tuple(x.shape)}")
        C, B = (xp.repeat(y, x.shape[-3] // B.shape[-3], axis=-3) for y in (C, B))
    check_shape("dt", dt, "(..., H, N)", x.shape[:-1], "one step for each head and position of x")
    check_shape("A", A, "(H,)", x.shape[-3:-2] or (1,), "one rate for each head of x")
    acc = accumulator(x.dtype)
    dt, A, wide = (cast(y, acc) for y in (dt, A, x))
    g = dt * (A[:, None] if x.ndim > 2 else A)
    return recurrence(C, B, cast(dt[..., None] * wide, x.dtype), g, None, state, rule="gated", cu_seqlens=cu_seqlens)


def gla(q: Array, k: Array, v: Array, g: Array, state: Array | None = None, *, scale: float = 1.0, cu_seqlens: Any = None) -> tuple[Array, Array]:
    """GLA. "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023:

        S_t = (α_tᵀ 1) ⊙ S_{t-1} + k_tᵀ v_t,   o_t = q_t S_t

    Here g = log α, (..., H, N, D): one decay for each key channel; with one a head `recurrence` does the same. The paper's α is a sigmoid
    to the power 1/16, so g = -softplus(-y) / 16.

    Beyond the errors of `recurrence`: ValueError "g: expected (..., H, N, D) = …".

    >>> x = np.ones((2, 2))
    >>> out, state = gla(x, x, x, np.log([[1.0, 1.0], [1.0, 0.5]]))              # the second channel keeps half
    >>> out, state
    (array([[2. , 2. ],
           [3.5, 3.5]]), array([[2. , 2. ],
           [1.5, 1.5]]))
    """
    _check_decay(k, g, channels=True)
    return recurrence(q, k, v, g, None, state, rule="gated", scale=scale, cu_seqlens=cu_seqlens)


def delta_net(q: Array, k: Array, v: Array, beta: Array, state: Array | None = None, *, scale: float = 1.0,
              cu_seqlens: Any = None) -> tuple[Array, Array]:
    """DeltaNet. "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024 (the rule itself: "Linear Transformers
    Are Secretly Fast Weight Programmers", 2021):

        S_t = S_{t-1} - β_t (S_{t-1} k_t - v_t) k_tᵀ,   o_t = S_t q_t

    Here beta = β, (..., H, N), in (0, 1); S is the transpose of the paper's. k is taken as it is: the paper normalises q and k to length 1
    before this, and so must the caller. With β = 1 and such a k, reading with k_t right afterwards gives back v_t.

    >>> k = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> v = np.array([[1.0], [2.0], [5.0]])
    >>> out, state = delta_net(k, k, v, np.array([1.0, 1.0, 0.5]))               # the third write meets the first: (1 + 5) / 2
    >>> out.ravel(), state.ravel()
    (array([1., 2., 3.]), array([3., 2.]))
    """
    return recurrence(q, k, v, None, beta, state, rule="delta", scale=scale, cu_seqlens=cu_seqlens)


def gated_delta_net(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array | None = None, *, scale: float = 1.0,
                    cu_seqlens: Any = None) -> tuple[Array, Array]:
    """Gated DeltaNet. "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024:

        S_t = S_{t-1} (α_t (I - β_t k_t k_tᵀ)) + β_t v_t k_tᵀ,   o_t = S_t q_t

    Here g = log α, one a head, (..., H, N); beta = β, (..., H, N), in (0, 1); S is the transpose of the paper's. k is taken as it is: the
    paper normalises q and k to length 1 before this, and so must the caller.

    Beyond the errors of `recurrence`: ValueError "g: expected (..., H, N) = …".

    >>> k, v = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[4.0], [2.0]])
    >>> out, state = gated_delta_net(k, k, v, np.log([1.0, 0.5]), np.ones(2))    # before the second write all fades to a half
    >>> out.ravel(), state.ravel()
    (array([4., 2.]), array([2., 2.]))
    """
    _check_decay(k, g, channels=False)
    return recurrence(q, k, v, g, beta, state, rule="gated_delta", scale=scale, cu_seqlens=cu_seqlens)


def kda(q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array | None = None, *, scale: float = 1.0,
        cu_seqlens: Any = None) -> tuple[Array, Array]:
    """KDA. "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025:

        S_t = (I - β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ,   o_t = S_tᵀ q_t

    Here g = log α, one for each key channel, (..., H, N, D); beta = β, (..., H, N), in (0, 1); S is the paper's. k is taken as it is: the
    paper normalises q and k to length 1 before this, and so must the caller.

    Beyond the errors of `recurrence`: ValueError "g: expected (..., H, N, D) = …".

    >>> k, v = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[4.0], [2.0]])
    >>> out, state = kda(k, k, v, np.log([[1.0, 1.0], [0.5, 1.0]]), np.ones(2))  # before the second write the first channel fades
    >>> out.ravel(), state.ravel()
    (array([4., 2.]), array([2., 2.]))
    """
    _check_decay(k, g, channels=True)
    return recurrence(q, k, v, g, beta, state, rule="gated_delta", scale=scale, cu_seqlens=cu_seqlens)


def _fixed_decay(decay: Any, q: Array, k: Array, v: Array, state: Array | None, scale: float, cu_seqlens: Any) -> tuple[Array, Array]:
    """Rule `gated` with `decay(H)`, (H,), at all positions."""
    xp = namespace(q=q, k=k, v=v)
    heads = check_qkv(q, k, v, causal=True).heads
    rows = xp.asarray((decay(heads) if heads else np.zeros(0)).tolist(), dtype=accumulator(k.dtype))
    return recurrence(q, k, v, xp.broadcast_to(rows[:, None] if k.ndim > 2 else rows, k.shape[:-1]), None, state, rule="gated", scale=scale,
                      cu_seqlens=cu_seqlens)


def _check_decay(k: Array, g: Array, *, channels: bool) -> None:
    """The one thing in which the presets with a given decay differ from one another; a missing one is `recurrence`'s to explain."""
    namespace(k=k, g=g)
    if g is None:
        return
    check_shape("g", g, "(..., H, N, D)" if channels else "(..., H, N)", k.shape if channels else k.shape[:-1],
                "one decay for each key channel" if channels else "one decay for each key/value head")
