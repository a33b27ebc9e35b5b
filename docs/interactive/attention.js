"use strict";
// The mathematics of the page, one head at a time: the equations of docs/derivations, each forward with its hand-derived backward below it.
//
//     P_t = Diag(exp(g_t)) S_{t-1},   S_t = P_t + k_t u_tᵀ,   o_t = scale · S_tᵀ q_t
//     u_t = v_t  (rules linear, gated)   or   β_t (v_t - P_tᵀ k_t)  (rules delta, gated_delta)
//
// A vector is a Float64Array, a matrix an array of such rows: q (N, D), k (N, D), v (N, M), S (D, M), g (N, 1) or (N, D), beta (N,).
// No function changes what it is given.

const Attention = (() => {

  // --- vectors and matrices -----------------------------------------------------------------------------------------------------------

  const vector = (n, f = () => 0) => Float64Array.from({ length: n }, (_, i) => f(i));
  const matrix = (n, m, f = () => 0) => Array.from({ length: n }, (_, i) => vector(m, j => f(i, j)));
  const identity = n => matrix(n, n, (i, j) => Number(i === j));
  const width = X => (X.length ? X[0].length : 0);
  const dot = (x, y) => x.reduce((sum, value, i) => sum + value * y[i], 0);
  const add = (X, Y) => X.map((row, i) => row.map((value, j) => value + Y[i][j]));
  const outer = (x, y) => Array.from(x, value => y.map(other => value * other));                  // x yᵀ
  const fromLeft = (x, S) => vector(width(S), m => S.reduce((sum, row, d) => sum + x[d] * row[m], 0));   // Sᵀ x
  const fromRight = (S, y) => Float64Array.from(S, row => dot(row, y));                           // S y

  // --- feature maps: one row x (D) to φ(x) (F), and dx = Jᵀ dy ---------------------------------------------------------------------------

  const each = (f, df) => ({
    forward: x => x.map(f),
    backward: (dy, x) => dy.map((value, i) => value * df(x[i])),
  });

  function softmax(x) {                                               // e^{x_i} / Σ_j e^{x_j}; the maximum cancels
    const top = Math.max(...x);
    const e = x.map(value => Math.exp(value - top));
    const sum = e.reduce((a, b) => a + b, 0);
    return e.map(value => value / sum);
  }

  const FEATURE_MAPS = {
    // elu(x) + 1 = max(x, 0) + exp(min(x, 0)), eq. 7 of the paper;  derivative exp(min(x, 0))
    elu1: each(x => Math.max(x, 0) + Math.exp(Math.min(x, 0)), x => Math.exp(Math.min(x, 0))),
    // max(x, 0);  derivative 1 above 0, else 0
    relu: each(x => Math.max(x, 0), x => Number(x > 0)),
    // max(x, 0)²;  derivative 2 max(x, 0)
    relu2: each(x => Math.max(x, 0) ** 2, x => 2 * Math.max(x, 0)),
    // x;  derivative 1
    identity: each(x => x, () => 1),
    // eˣ;  derivative eˣ
    exp: each(Math.exp, Math.exp),
    // y_i = e^{x_i} / Σ_j e^{x_j} over the features;  dx = y ⊙ (dy - Σ_j dy_j y_j)
    softmax: {
      forward: softmax,
      backward(dy, x) {
        const y = softmax(x), mean = dot(dy, y);
        return y.map((value, i) => value * (dy[i] - mean));
      },
    },
    // (1, x, vec(x xᵀ)/√2): φ(q)ᵀφ(k) = 1 + qᵀk + (qᵀk)²/2, the beginning of exp(qᵀk);  dx = dy_x + (dY + dYᵀ) x/√2
    taylor2: {
      forward: x => Float64Array.from([1, ...x, ...outer(x, x).flatMap(row => Array.from(row, value => value * Math.SQRT1_2))]),
      backward(dy, x) {
        const D = x.length, dY = (i, j) => dy[1 + D + i * D + j];
        return vector(D, i => dy[1 + i] + Math.SQRT1_2 * x.reduce((sum, value, j) => sum + (dY(i, j) + dY(j, i)) * value, 0));
      },
    },
  };

  // y = x/|x|, and 0 for x = 0;  dx = (dy - y (yᵀdy)) / |x|
  const UNIT = {
    forward(x) {
      const length = Math.sqrt(dot(x, x));
      return x.map(value => (length ? value / length : 0));
    },
    backward(dy, x) {
      const length = Math.sqrt(dot(x, x)), y = UNIT.forward(x), along = dot(y, dy);
      return dy.map((value, i) => (length ? (value - y[i] * along) / length : 0));
    },
  };

  // --- the recurrence -------------------------------------------------------------------------------------------------------------------

  // Rule linear without g and beta, gated with g, delta with beta, gated_delta with both. steps: what each position did.
  function recurrence(q, k, v, g = null, beta = null, scale = 1) {
    let S = matrix(width(k), width(v));
    const steps = q.map((_, t) => {
      const a = g && vector(S.length, d => Math.exp(g[t][g[t].length > 1 ? d : 0]));
      const P = a ? S.map((row, d) => row.map(value => a[d] * value)) : S;                        // P_t = Diag(a_t) S_{t-1}
      const error = beta ? v[t].map((value, m) => value - fromLeft(k[t], P)[m]) : v[t];           // e_t = v_t - P_tᵀ k_t
      const u = beta ? error.map(value => beta[t] * value) : v[t];                                // u_t = β_t e_t
      const write = outer(k[t], u);
      S = add(P, write);                                                                          // S_t = P_t + k_t u_tᵀ
      return { a, P, error, u, write, S, out: fromLeft(q[t], S).map(value => scale * value) };    // o_t = scale · S_tᵀ q_t
    });
    return { out: steps.map(step => step.out), steps };
  }

  // Those lines in reverse, from the last position to the first; R is the cotangent of S_t, later of P_t, and begins with 0.
  function recurrenceBackward(dout, q, k, v, g, beta, scale, steps) {
    let R = matrix(width(k), width(v));
    const dq = [], dk = [], dv = [], dg = g && [], dbeta = beta && new Float64Array(q.length);
    for (let t = q.length - 1; t >= 0; t--) {
      const { a, P, error, u, S } = steps[t], dot_ = dout[t].map(value => scale * value);
      R = add(R, outer(q[t], dot_));                                  // o = scale · Sᵀ q:   R += q (scale do)ᵀ,   dq = S (scale do)
      dq[t] = fromRight(S, dot_);
      dk[t] = fromRight(R, u);                                        // S = P + k uᵀ:       dk = R u,   du = Rᵀ k,   dP = R
      const du = fromLeft(k[t], R);
      dv[t] = du;
      if (beta) {
        dbeta[t] = dot(error, du);                                    // u = β e:            dβ = eᵀ du,   de = β du
        const de = du.map(value => beta[t] * value), lost = fromRight(P, de);
        dv[t] = de;                                                   // e = v - Pᵀ k:       dv = de,   dk -= P de,   dP -= k deᵀ
        dk[t] = dk[t].map((value, d) => value - lost[d]);
        R = R.map((row, d) => row.map((value, m) => value - k[t][d] * de[m]));
      }
      if (g) {
        const perChannel = P.map((row, d) => dot(row, R[d]));         // P = Diag(exp g) S:  dg = Σ_m P ⊙ dP,   R = Diag(a) dP
        dg[t] = Float64Array.from(g[t].length > 1 ? perChannel : [perChannel.reduce((x, y) => x + y, 0)]);
        R = R.map((row, d) => row.map(value => a[d] * value));
      }
    }
    return { dq, dk, dv, dg, dbeta };
  }

  // --- three kinds of attention: outputs, states, and backward(dout), the gradients for a cotangent dout (N, M) ---------------------------

  // A rule on mapped queries and keys, φ(q) and φ(k), at length 1 if unit. weights: out = A v, column j being the outputs for v = e_j.
  function ruleAttention(q, k, v, g, beta, { map, unit = false, scale = 1 }) {
    const phi = FEATURE_MAPS[map], length = unit ? UNIT : FEATURE_MAPS.identity;
    const mapped = X => X.map(x => length.forward(phi.forward(x)));
    const through = (dY, X) => X.map((x, t) => phi.backward(length.backward(dY[t], phi.forward(x)), x));
    const phiQ = mapped(q), phiK = mapped(k);
    const { out, steps } = recurrence(phiQ, phiK, v, g, beta, scale);
    const { out: weights } = recurrence(phiQ, phiK, identity(q.length), g, beta, scale);
    const backward = dout => {
      const d = recurrenceBackward(dout, phiQ, phiK, v, g, beta, scale, steps);
      return { ...d, dphiQ: d.dq, dphiK: d.dk, dq: through(d.dq, q), dk: through(d.dk, k) };
    };
    return { out, weights, steps, phiQ, phiK, backward };
  }

  // o_i = Σ_{j≤i} φ(q_i)ᵀφ(k_j) v_j / (Σ_{j≤i} φ(q_i)ᵀφ(k_j) + ε), eq. 8; as a recurrence with (v_j, 1) for v_j and (S | z) for S, eq. 10 to 12.
  // Where the denominator is 0 the row is 0.
  function linearAttention(q, k, v, { map, eps = 1e-6 }) {
    const phi = FEATURE_MAPS[map], M = width(v);
    const phiQ = q.map(phi.forward), phiK = k.map(phi.forward), withOne = v.map(row => Float64Array.from([...row, 1]));
    const { out: products, steps } = recurrence(phiQ, phiK, withOne);                             // (n_i, a_i) = (S_i | z_i)ᵀ φ(q_i)
    const den = products.map(row => row[M] + eps);
    const divided = (row, i) => row.map(value => (den[i] ? value / den[i] : 0));
    const out = products.map((row, i) => divided(row.slice(0, M), i));
    const weights = phiQ.map((x, i) => divided(vector(q.length, j => (j <= i ? dot(x, phiK[j]) : 0)), i));
    const backward = dout => {
      const G = dout.map((row, i) => divided(Float64Array.from([...row, -dot(row, out[i])]), i));  // (do_i | -do_iᵀo_i) / den_i
      const d = recurrenceBackward(G, phiQ, phiK, withOne, null, null, 1, steps);
      return {
        dphiQ: d.dq, dphiK: d.dk, dv: d.dv.map(row => row.slice(0, M)),                           // the column of ones is constant
        dq: q.map((x, t) => phi.backward(d.dq[t], x)), dk: k.map((x, t) => phi.backward(d.dk[t], x)), dg: null, dbeta: null,
      };
    };
    return { out, weights, steps, phiQ, phiK, den, backward };
  }

  // o_i = Σ_{j≤i} W_ij v_j,   W_i = softmax over j ≤ i of scale · q_iᵀk_j, eq. 2
  function softmaxAttention(q, k, v, { scale }) {
    const weights = q.map((x, i) => {
      const row = softmax(Float64Array.from(k.slice(0, i + 1), y => scale * dot(x, y)));
      return vector(q.length, j => (j <= i ? row[j] : 0));
    });
    const out = weights.map(row => fromLeft(row, v));
    const backward = dout => {
      // dv_j = Σ_i W_ij do_i,   dx_ij = W_ij (do_iᵀv_j - do_iᵀo_i),   dq_i = scale Σ_j dx_ij k_j,   dk_j = scale Σ_i dx_ij q_i
      const dx = weights.map((row, i) => row.map((weight, j) => scale * weight * (dot(dout[i], v[j]) - dot(dout[i], out[i]))));
      const column = (X, j) => Float64Array.from(X, row => row[j]);
      return {
        dq: dx.map(row => fromLeft(row, k)), dk: k.map((_, j) => fromLeft(column(dx, j), q)),
        dv: v.map((_, j) => fromLeft(column(weights, j), dout)), dg: null, dbeta: null,
      };
    };
    return { out, weights, backward };
  }

  // --- what a memory answers to a query that it was not asked: after the first t positions, to the query x (D) -----------------------------

  // S_tᵀ y with y = φ(x), at length 1 if unit
  function askRule(x, steps, t, { map, unit = false, scale = 1 }) {
    const y = FEATURE_MAPS[map].forward(x);
    return fromLeft(unit ? UNIT.forward(y) : y, steps[t].S).map(value => scale * value);
  }

  // S_tᵀφ(x) / (z_tᵀφ(x) + ε)
  function askLinear(x, steps, t, { map, eps = 1e-6 }) {
    const row = fromLeft(FEATURE_MAPS[map].forward(x), steps[t].S), M = row.length - 1, den = row[M] + eps;
    return row.slice(0, M).map(value => (den ? value / den : 0));
  }

  // softmax over j ≤ t of scale · xᵀk_j
  function askSoftmax(x, k, v, t, { scale }) {
    const weights = softmax(Float64Array.from(k.slice(0, t + 1), y => scale * dot(x, y)));
    return fromLeft(weights, v.slice(0, t + 1));
  }

  return {
    FEATURE_MAPS, UNIT, recurrence, recurrenceBackward, ruleAttention, linearAttention, softmaxAttention, askRule, askLinear, askSoftmax,
    vector, matrix, dot, fromLeft,
  };
})();
