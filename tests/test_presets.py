"""Presets: each is its paper's recurrence, written here as a loop of its own in the paper's letters."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refattn import oracle, presets, recurrence
from refattn.presets import delta_net, gated_delta_net, gla, kda, lightning, mamba2_ssd, retention
from refattn.testing import laws
from refattn.testing.budgets import assert_within, gamma
from refattn.testing.loop_budget import loop_budget

SCALED = [retention, lightning, gla, delta_net, gated_delta_net, kda]
NAMES = {preset: preset.__name__ for preset in [*SCALED, mamba2_ssd]}
seeds = st.integers(0, 2**32 - 1)


# --- the papers, one head: rows of Q, K, V are positions, S the state before; alpha and beta as given ---------------------------------------

def paper_retention(Q, K, V, S, h, H):
    gamma, out = 1 - 2.0 ** (-5 - h), []
    for n in range(len(Q)):
        S = gamma * S + K[n][:, None] @ V[n][None, :]                                   # K_n and V_n are rows there
        out.append(Q[n] @ S)
    return out, S


def paper_lightning(Q, K, V, kv, h, H, l, L):
    lam, out = np.exp(-8 * h / H * (1 - l / L)), []
    for t in range(len(Q)):
        kv = lam * kv + np.outer(K[t], V[t])
        out.append(Q[t] @ kv)
    return out, kv


def paper_mamba2(C, B, X, h, dt, A):
    out = []
    for t in range(len(C)):
        A_bar, B_bar = np.exp(dt[t] * A) * np.eye(len(B[t])), dt[t] * B[t]
        h = A_bar @ h + np.outer(B_bar, X[t])
        out.append(C[t] @ h)
    return out, h


def paper_gla(Q, K, V, S, alpha):
    out = []
    for t in range(len(Q)):
        G = alpha[t][:, None] @ np.ones((1, V.shape[1]))
        S = G * S + np.outer(K[t], V[t])
        out.append(Q[t] @ S)
    return out, S


def paper_delta_net(Q, K, V, S, beta):
    S, out = S.T, []                                                                    # M × D there
    for t in range(len(Q)):
        S = S - beta[t] * np.outer(S @ K[t] - V[t], K[t])
        out.append(S @ Q[t])
    return out, S.T


def paper_gated_delta_net(Q, K, V, S, alpha, beta):
    S, out = S.T, []                                                                    # M × D there
    for t in range(len(Q)):
        S = S @ (alpha[t] * (np.eye(len(K[t])) - beta[t] * np.outer(K[t], K[t]))) + beta[t] * np.outer(V[t], K[t])
        out.append(S @ Q[t])
    return out, S.T


def paper_kda(Q, K, V, S, alpha, beta):
    out = []
    for t in range(len(Q)):
        S = (np.eye(len(K[t])) - beta[t] * np.outer(K[t], K[t])) @ np.diag(alpha[t]) @ S + beta[t] * np.outer(K[t], V[t])
        out.append(S.T @ Q[t])
    return out, S


def by_heads(paper, q, k, v, S, *each):
    """A paper's loop for all heads, `each` being what has one entry per key/value head."""
    G = q.shape[1] // k.shape[1]
    out, end = np.zeros((*q.shape[:-1], v.shape[-1])), np.zeros_like(S)
    for b, j in np.ndindex(q.shape[:2]):
        h = j // G
        rows, end[b, h] = paper(q[b, j], k[b, h], v[b, h], S[b, h], *(x[b, h] for x in each))
        out[b, j] = np.reshape(rows, out[b, j].shape)
    return out, end


# --- the laws ----------------------------------------------------------------------------------------------------------------------------

class Drawn:
    """Arrays of one call: keys of length 1, β and α in (0, 1)."""

    def __init__(self, seed: int, N: int, dtype=np.float64) -> None:
        rng = np.random.default_rng(seed)
        B, self.H, G, D, M = 2, int(rng.integers(2, 5)), int(rng.integers(1, 3)), 3, 4
        cast = lambda x: x.astype(dtype)
        self.q, self.v, self.state = (cast(rng.normal(size=s)) for s in ((B, self.H * G, N, D), (B, self.H, N, M), (B, self.H, D, M)))
        k = rng.normal(size=(B, self.H, N, D))
        self.k = cast(k / np.sqrt((k * k).sum(-1, keepdims=True)))
        self.g, self.gc = cast(-2 * rng.random((B, self.H, N))), cast(-2 * rng.random((B, self.H, N, D)))
        self.beta, self.dt, self.A = cast(rng.random((B, self.H, N))), cast(rng.random((B, self.H, N)) + 0.1), cast(-rng.random(self.H) - 0.1)
        self.layers = int(rng.integers(1, 9))
        self.layer = int(rng.integers(0, self.layers + 1))
        self.head = np.broadcast_to(np.arange(self.H), (B, self.H))
        self.qkv = (self.q, self.k, self.v)

    def per_head(self, decay):
        return np.broadcast_to(np.asarray(decay)[:, None], self.k.shape[:-1])

    def calls(self):
        """Of each preset: the call, the paper's answer, and what `recurrence` is to be given: g, β, rule and v."""
        d, S = self, self.state
        layer = {"layer": d.layer, "layers": d.layers}
        paper_lambda = np.exp(-8 * np.arange(d.H) / d.H * (1 - d.layer / d.layers))
        C = d.q[:, : d.H]
        rates = np.broadcast_to(d.A, d.head.shape)
        return {
            retention: (lambda **o: retention(*d.qkv, S, **o), lambda: by_heads(lambda *a: paper_retention(*a, d.H), *d.qkv, S, d.head),
                        (d.q, d.v, d.per_head(np.log(1 - 2.0 ** (-5 - np.arange(d.H)))), None, "gated")),
            lightning: (lambda **o: lightning(*d.qkv, S, **layer, **o),
                        lambda: by_heads(lambda *a: paper_lightning(*a, d.H, d.layer, d.layers), *d.qkv, S, d.head),
                        (d.q, d.v, d.per_head(np.log(paper_lambda)), None, "gated")),
            mamba2_ssd: (lambda **o: mamba2_ssd(C, d.k, d.v, d.dt, d.A, S, **o),
                         lambda: by_heads(paper_mamba2, C, d.k, d.v, S, d.dt, rates),
                         (C, d.dt[..., None] * d.v, d.dt * d.A[:, None], None, "gated")),
            gla: (lambda **o: gla(*d.qkv, d.gc, S, **o), lambda: by_heads(paper_gla, *d.qkv, S, np.exp(d.gc)),
                  (d.q, d.v, d.gc, None, "gated")),
            delta_net: (lambda **o: delta_net(*d.qkv, d.beta, S, **o), lambda: by_heads(paper_delta_net, *d.qkv, S, d.beta),
                        (d.q, d.v, None, d.beta, "delta")),
            gated_delta_net: (lambda **o: gated_delta_net(*d.qkv, d.g, d.beta, S, **o),
                              lambda: by_heads(paper_gated_delta_net, *d.qkv, S, np.exp(d.g), d.beta), (d.q, d.v, d.g, d.beta, "gated_delta")),
            kda: (lambda **o: kda(*d.qkv, d.gc, d.beta, S, **o), lambda: by_heads(paper_kda, *d.qkv, S, np.exp(d.gc), d.beta),
                  (d.q, d.v, d.gc, d.beta, "gated_delta")),
        }


def loop(q, k, v, g=None, beta=None, state=None, *, rule, scale=1.0, cu_seqlens=None):
    """The definition in `recurrence`'s place: a rule without g or beta must have been given none."""
    assert (g is not None, beta is not None) == {"gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}[rule]
    return oracle.full_recurrence(q, k, v, g, beta, state, scale=scale)


def assert_is_the_paper(preset, seed, N):
    """Both sides are loops in float64. The budget counts at least one rounding for each term of a position; the loops as the papers print
    them, with D × D matrices, have at most D + 8: a product with each of α, β, k, k and S, a difference, D sums, and exp of a rounded log."""
    d = Drawn(seed, N)
    call, paper, (q, v, g, beta, _) = d.calls()[preset]
    bounds = loop_budget(q, d.k, v, g, beta, d.state, dtype=np.float64)
    for name, found, expected, bound in zip(("out", "state"), call(), paper(), bounds, strict=True):
        assert_within(found, expected, (1 + d.k.shape[-1] + 8) * bound, f"{preset.__name__} {name}")


@pytest.mark.parametrize("preset", NAMES, ids=NAMES.get)
@given(seeds, st.integers(0, 9))
def test_a_preset_is_the_recurrence_of_its_paper(preset, seed, N):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "recurrence", loop)
        assert_is_the_paper(preset, seed, N)


MISTAKES = {
    retention: lambda q, k, v, g, beta, state, **o: loop(q, k, v, np.exp(g), beta, state, **o),                        # γ for log γ
    lightning: lambda q, k, v, g, beta, state, **o: loop(q, k, v, np.roll(g, 1, axis=1), beta, state, **o),            # h from 1
    mamba2_ssd: lambda q, k, v, g, beta, state, **o: loop(q, k, v * 2, g, beta, state, **o),                           # dt lost in the write
    gla: lambda q, k, v, g, beta, state, **o: loop(q, k, v, g[..., ::-1], beta, state, **o),                           # channels reversed
    delta_net: lambda q, k, v, g, beta, state, **o: loop(q, k, v, g, beta / 2, state, **o),
    gated_delta_net: lambda q, k, v, g, beta, state, **o: loop(q, k, v, -g, beta, state, **o),
    kda: lambda q, k, v, g, beta, state, **o: loop(q, k, v, g, beta, 0 * state, **o),                                  # the past forgotten
}


@pytest.mark.parametrize("preset", NAMES, ids=NAMES.get)
def test_a_wrong_argument_would_be_seen(preset, monkeypatch):
    monkeypatch.setattr(presets, "recurrence", MISTAKES[preset])
    with pytest.raises(AssertionError, match="times the bound"):
        assert_is_the_paper(preset, 0, 5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("preset", NAMES, ids=NAMES.get)
@given(seeds, st.integers(0, 40), st.sampled_from([1.0, 0.5]), st.booleans())
def test_a_preset_calls_recurrence_and_does_nothing_else(preset, dtype, seed, N, scale, packed):
    """Bit for bit, with scale and packed sequences, in every dtype; fixed decays in the accumulator's."""
    d = Drawn(seed, N, dtype)
    call, _, (q, v, g, beta, rule) = d.calls()[preset]
    wide = d.state.dtype if dtype in (np.float64, np.float32) else np.float32
    if preset in (retention, lightning):
        H = d.H
        g = d.per_head(presets.retention_decay(H) if preset is retention else presets.lightning_decay(H, d.layer, d.layers)).astype(wide)
    if preset is mamba2_ssd:
        g = d.dt.astype(wide) * d.A.astype(wide)[:, None]
        v = (d.dt.astype(wide)[..., None] * d.v.astype(wide)).astype(dtype)
    options = {"scale": scale} if preset in SCALED else {}
    if packed:
        options["cu_seqlens"], d.state = [0, N // 2, N], np.stack([d.state, 2 * d.state], axis=2)
        call = d.calls()[preset][0]
    laws.law_equal_bits({"recurrence": recurrence(q, d.k, v, g, beta, d.state, rule=rule, **options), "preset": call(**options)})


@given(seeds, st.integers(0, 20))
def test_heads_of_mamba2_share_B_and_C(seed, N):
    d = Drawn(seed, N)
    share = 3
    x, dt = (np.repeat(y, share, axis=1) * np.arange(1.0, share * d.H + 1).reshape(-1, *[1] * (y.ndim - 2)) for y in (d.v, d.dt))
    A, C = np.repeat(d.A, share), d.q[:, : d.H]
    shared = mamba2_ssd(C, d.k, x, dt, A)
    for i in range(share * d.H):
        h = i // share
        laws.law_equal_bits({"alone": mamba2_ssd(C[:, h], d.k[:, h], x[:, i], dt[:, i], A[i:i + 1][0] * np.ones(x.shape[0])),
                             "shared": [y[:, i] for y in shared]})


def test_one_head_needs_no_axis_for_it(rng):
    q, k, v = rng.normal(size=(3, 5, 2))
    dt, A = rng.random(5), np.array([-0.5])
    for preset, options in ((retention, {}), (lightning, {"layer": 1, "layers": 3})):
        laws.law_equal_bits({"axis": [y[0] for y in preset(q[None], k[None], v[None], **options)], "none": preset(q, k, v, **options)})
    laws.law_equal_bits({"axis": [y[0] for y in mamba2_ssd(q[None], k[None], v[None], dt[None], A)], "none": mamba2_ssd(q, k, v, dt, A)})


def test_no_heads_at_all():
    x = np.zeros((2, 0, 5, 3))
    for out, state in (retention(x, x, x), lightning(x, x, x, layer=0, layers=1)):
        assert out.shape == (2, 0, 5, 3) and state.shape == (2, 0, 3, 3)


def test_fixed_decays_by_hand():
    forgotten = np.exp2(-5.0 - np.arange(40))
    assert_within(-np.expm1(presets.retention_decay(40)), forgotten, gamma(4, np.float64) * forgotten)    # log1p and expm1, 2 units each
    assert presets.lightning_decay(4, 0, 7).tolist() == [0, -2, -4, -6]                # the first layer: -8h/H
    assert not presets.lightning_decay(4, 7, 7).any()                                  # behind the last: nothing fades


Z = np.zeros


@pytest.mark.parametrize("call, words", [
    (lambda: gla(Z((2, 5, 3)), Z((2, 5, 3)), Z((2, 5, 4)), Z((2, 5))), r"g: expected \(\.\.\., H, N, D\) = \(2, 5, 3\), got \(2, 5\)"),
    (lambda: kda(Z((2, 5, 3)), Z((2, 5, 3)), Z((2, 5, 4)), Z((2, 5)), Z((2, 5))), r"g: expected \(\.\.\., H, N, D\) .* for each key channel"),
    (lambda: gated_delta_net(Z((2, 5, 3)), Z((2, 5, 3)), Z((2, 5, 4)), Z((2, 5, 3)), Z((2, 5))),
     r"g: expected \(\.\.\., H, N\) = \(2, 5\), got \(2, 5, 3\): one decay for each key/value head"),
    (lambda: gla(Z((2, 5, 3)), Z((2, 5, 3)), Z((2, 5, 4)), None), "g: rule 'gated' needs it"),
    (lambda: delta_net(Z((2, 5, 3)), Z((2, 5, 3)), Z((2, 5, 4)), Z((2, 4))), "beta: expected"),
    (lambda: lightning(Z((5, 3)), Z((5, 3)), Z((5, 4)), layer=3, layers=2), "layer: expected 0 ≤ layer ≤ layers = 2, got 3"),
    (lambda: lightning(Z((5, 3)), Z((5, 3)), Z((5, 4)), layer=-1, layers=2), "layer: expected 0 ≤ layer"),
    (lambda: lightning(Z((5, 3)), Z((5, 3)), Z((5, 4)), layer=0, layers=0), "layers: expected an integer ≥ 1, got 0"),
    (lambda: presets.retention_decay(0), "heads: expected an integer ≥ 1, got 0"),
    (lambda: mamba2_ssd(Z((2, 5, 3)), Z((2, 5, 3)), Z((2, 5, 4)), Z((2, 4)), Z(2)), r"dt: expected \(\.\.\., H, N\) = \(2, 5\), got \(2, 4\)"),
    (lambda: mamba2_ssd(Z((2, 5, 3)), Z((2, 5, 3)), Z((2, 5, 4)), Z((2, 5)), Z(3)), r"A: expected \(H,\) = \(2,\), got \(3,\)"),
    (lambda: mamba2_ssd(Z((5, 3)), Z((5, 3)), Z((5, 4)), Z(5), Z(())), r"A: expected \(H,\) = \(1,\), got \(\)"),
    (lambda: mamba2_ssd(Z((4, 5, 3)), Z((2, 5, 3)), Z((2, 5, 4)), Z((2, 5)), Z(2)), "C: expected .* C and B have one shape"),
    (lambda: mamba2_ssd(Z((2, 5, 3)), Z((2, 5, 3)), Z((3, 5, 4)), Z((3, 5)), Z(3)), r"x: expected .* multiple of the 2 heads of B, got \(3, 5, 4\)"),
    (lambda: mamba2_ssd(Z((0, 5, 3)), Z((0, 5, 3)), Z((3, 5, 4)), Z((3, 5)), Z(3)), "x: expected .* multiple of the 0 heads of B"),
    (lambda: retention(Z((2, 5, 3)), Z((2, 5, 4)), Z((2, 5, 4))), "q and k must share D"),
])
def test_bad_shapes_are_explained(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("call, words", [
    (lambda: mamba2_ssd(Z((5, 3)), Z((5, 3)), Z((5, 4)), Z(5, np.float32), Z(1)), "dt is float32 and q is float64: expected dt in float64"),
    (lambda: mamba2_ssd(Z((5, 3)), Z((5, 3)), Z((5, 4)), Z(5), Z(1, np.float32)), "A is float32 and q is float64: expected A in float64"),
    (lambda: mamba2_ssd(Z((5, 3)), Z((5, 3)), Z((5, 4), np.float32), Z(5), Z(1)), "C is float64 and x is float32"),
    (lambda: mamba2_ssd(Z((5, 3)), Z((5, 3)), Z((5, 4)), Z(5), -1.0), "A: expected a NumPy or CuPy array, got float"),
    (lambda: gla(Z((5, 3)), Z((5, 3)), Z((5, 4)), [[0.0]]), "g: expected a NumPy or CuPy array, got list"),
    (lambda: retention([[1.0]], Z((5, 3)), Z((5, 4))), "q: expected a NumPy or CuPy array, got list"),
    (lambda: lightning(Z((5, 3)), Z((5, 3)), Z((5, 4)), layer=0.5, layers=2), "layer: expected an integer, got 0.5"),
    (lambda: presets.lightning_decay(4, True, 2), "layer: expected an integer, got True"),
    (lambda: retention(Z((5, 3), int), Z((5, 3), int), Z((5, 4), int)), "q: expected float16"),
])
def test_wrong_types_are_explained(call, words):
    with pytest.raises(TypeError, match=words):
        call()
