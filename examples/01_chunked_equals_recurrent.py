"""The transformer is an RNN, and its gradient is derived by hand: eight lines that check both."""
import numpy as np

import refattn

q, k, v, dout, along = np.random.default_rng(0).standard_normal((5, 2, 4, 100, 16))        # five times (B, H, N, D)
(out, _), pullback = refattn.vjp(refattn.causal_linear_attention, q, k, v)                 # a chunk of positions at a time
state, steps = None, np.empty_like(out)
for t in range(100):                                                                       # one position at a time
    steps[..., t, :], state = refattn.causal_linear_attention_step(q[..., t, :], k[..., t, :], v[..., t, :], state)
change = sum(side * refattn.causal_linear_attention(q, k + side * 1e-5 * along, v)[0] for side in (1, -1)) / 2e-5
print(f"chunked and recurrent differ by at most {abs(out - steps).max():.1e}")
print(f"along one direction: gradient {(pullback(dout)[1] * along).sum():.9f}, central difference {(dout * change).sum():.9f}")
