// Rule `linear`: S_t = S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t (eq. 10, 12 of the paper), with φ and the normaliser, and its transpose.
//
// | kernel             | computes                                                       | one block takes                        |
// |--------------------|----------------------------------------------------------------|----------------------------------------|
// | causal_naive       | o_i = Σ_{j≤i} (q_i·k_j) v_j, / Σ_{j≤i} q_i·k_j  (eq. 8)         | 256 numbers of out, a thread for each  |
// | causal_sequential  | the recurrence itself, S in registers  (eq. 18-20)              | 64 columns of v, all positions         |
// | causal_step        | one position: S read once and written once                      | 64 columns of one state                |
// | group_states       | (a) each group's own Σ_j k_j v_jᵀ and Σ_j k_j                   | some chunks: a group, some columns     |
// | scan_states        | (b) what precedes each group: exclusive sums, from either end   | 256 numbers of the states of a head    |
// | group_outputs      | (c) out from the state before the group (eq. 12)                | as (a)                                 |
// | group_dq           | dden_i = -(do_i·out_i) / (den_i + ε), dφ(q)_i = S_i G_i (eq. 13) | as (a)                                 |
// | group_dk           | dφ(k)_i = R_i [v_i | 1]  (eq. 14)                               | as (a)                                 |
// | group_dv           | dv_i = R_iᵀ φ(k_i)  (eq. 15)                                    | as (a)                                 |
// | group_dk_dv        | both at once, for D and M up to 64: q, k, v, do are read once    | some chunks: a group                   |
//
// Backward: G = [do / (den + ε) | dden], R_i = dS_N + Σ_{j≥i} φ(q_j) G_jᵀ, and (eq. 13-15) are (c) with other operands: with
//
//     o_i = Sᵀ x_i + Σ_{j≤i} (x_i·y_j) z_j          x, y, z, S:    q, k, v, S      G, v, k, Sᵀ      v, G, q, Rᵀ      k, q, G, R
//
// one function, `walk`, computes out, dq, dk and dv. For the last two it goes from the end (≥ in place of ≤).
//
// Arrays are contiguous: q, dq (heads, N, D), k, dk (heads / shared, N, D), v, dv (heads / shared, N, M), out, do (heads, N, M); `shared`
// query heads read one key and value head. States are Sum<T>: for each head and group D·M numbers of S, then D of the key sum z, and up to 3
// more, so that each state starts at a multiple of 16 bytes.
// C positions at a time, VT columns of v (of k for dq and dk) for each block. FEATURE: 0 identity, 1 elu + 1. NORM: with the normaliser. Rows behind a
// length count as absent: not read, zeros where they are written.
#include "tiles.cuh"

// --- φ and what else is done to a number on its way in or out -------------------------------------------------------------------------

// eq. 7: elu(x) + 1; exp(x) for x ≤ 0, so that nothing overflows
template <int FEATURE, typename A> __device__ __forceinline__ A phi(A x) {
  if constexpr (FEATURE == 0) return x;
  else return x > 0 ? x + A(1) : exp(x);
}
template <int FEATURE, typename A> __device__ __forceinline__ A phi_slope(A x) {
  if constexpr (FEATURE == 0) return A(1);
  else return x > 0 ? A(1) : exp(x);
}

// 1 / x, and 0 where x is exactly 0: a row without keys is a row of zeros
template <typename A> __device__ __forceinline__ A inverse(A x) { return x == 0 ? A(0) : A(1) / x; }

// The positions that a block takes: first ≤ i < last, the nth group of a head
struct Group {
  long long head, nth;
  int first, last;
  __device__ Group(int groups, int rows, int N)
      : head(blockIdx.x / groups), nth(blockIdx.x % groups), first((int)(nth * rows)), last(min(first + rows, N)) {}
};

__device__ __forceinline__ int real_rows(const int* lengths, long long head, int N) { return lengths ? min(lengths[head], N) : N; }

// φ of number c of row i; 0 from row `real` on, and beyond the row's end
template <int W, int FEATURE = 0, typename T> __device__ __forceinline__ Sum<T> number(const T* rows, int i, int c, int real) {
  return i < real && c < W ? phi<FEATURE>(Sum<T>(widen(rows[(long long)i * W + c]))) : Sum<T>(0);
}

// G without its last column: do / (den + ε), with `inv` at 1 / (den + ε) of row i in shared memory, where a row's is read once for all its numbers
template <int M, bool NORM, typename T> __device__ __forceinline__ Sum<T> cotangent(const T* dout, const Sum<T>* inv, int i, int c, int real) {
  const Sum<T> x = number<M>(dout, i, c, real);
  return NORM ? x * *inv : x;
}

// Four numbers of dx = by·φ'(x) ⊙ o, zeros in a row that is not real
template <int D, int FEATURE, typename T, typename A>
__device__ __forceinline__ void put_slope(T* dx, const T* x, int c, bool real, A by, A (&o)[4]) {
  A at[4] = {};
  if (FEATURE && real) get4<D>(x, c, at);
#pragma unroll
  for (int b = 0; b < 4; ++b) o[b] = real ? o[b] * by * phi_slope<FEATURE>(at[b]) : A(0);
  put4<D>(dx, c, o);
}

// The sum over a warp, the same in every lane and always in the same order
template <typename A> __device__ __forceinline__ A warp_sum(A x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// --- naive: the definition, for reading and for cross-checks ---------------------------------------------------------------------------

template <typename T, int D, int M, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, 2) causal_naive(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                                        T* __restrict__ out, int N, long long heads, int shared, Sum<T> scale, Sum<T> eps) {
  typedef Sum<T> A;
  const long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (at >= heads * N * M) return;
  const long long head = at / M / N, i = at / M % N, kv = head / shared;
  const int c = at % M;
  A num = 0, den = 0;
  for (long long j = 0; j <= i; ++j) {
    A similarity = 0;
    for (int d = 0; d < D; ++d) similarity += scale * phi<FEATURE>(widen(q[(head * N + i) * D + d])) * phi<FEATURE>(widen(k[(kv * N + j) * D + d]));
    num += similarity * widen(v[(kv * N + j) * M + c]);
    den += similarity;
  }
  out[at] = narrow<T>(NORM ? num * inverse(den + eps) : num);
}

// --- sequential: the recurrence, a column of S and all of z in each thread's registers, which hold them up to D = 64 (double: 32) -------

template <typename T, int D, int M, int FEATURE, bool NORM>
__global__ void __launch_bounds__(64) causal_sequential(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                                        T* __restrict__ out, int N, int shared, Sum<T> scale, Sum<T> eps) {
  typedef Sum<T> A;
  __shared__ A qs[D];
  __shared__ A ks[D];
  const long long head = blockIdx.x, kv = head / shared;
  const int c = blockIdx.y * 64 + threadIdx.x;
  A S[D], z[NORM ? D : 1];
#pragma unroll
  for (int d = 0; d < D; ++d) S[d] = 0;
#pragma unroll
  for (int d = 0; d < (NORM ? D : 1); ++d) z[d] = 0;
  for (long long i = 0; i < N; ++i) {
    for (int d = threadIdx.x; d < D; d += 64) {
      qs[d] = scale * phi<FEATURE>(widen(q[(head * N + i) * D + d]));
      ks[d] = phi<FEATURE>(widen(k[(kv * N + i) * D + d]));
    }
    __syncthreads();
    const A value = c < M ? A(widen(v[(kv * N + i) * M + c])) : A(0);
    A num = 0, den = 0;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      S[d] += ks[d] * value;
      num += qs[d] * S[d];
      if constexpr (NORM) {
        z[d] += ks[d];
        den += qs[d] * z[d];
      }
    }
    if (c < M) out[(head * N + i) * M + c] = narrow<T>(NORM ? num * inverse(den + eps) : num);
    __syncthreads();
  }
}

// --- step: one position for a whole batch -----------------------------------------------------------------------------------------------

// S ← S + φ(k) vᵀ, z ← z + φ(k), out = Sᵀφ(q) / (zᵀφ(q) + ε). Thread (r, c) of 4 × 64 has rows r, r + 4, … of column c.
template <typename T, int D, int M, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, 2) causal_step(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                                       const Sum<T>* __restrict__ S, const Sum<T>* __restrict__ z, Sum<T>* __restrict__ S_new,
                                                       Sum<T>* __restrict__ z_new, T* __restrict__ out, int shared, Sum<T> scale, Sum<T> eps) {
  typedef Sum<T> A;
  __shared__ A qs[D];
  __shared__ A ks[D];
  __shared__ A parts[4][64];
  __shared__ A den_parts[WARPS];
  const long long kv = blockIdx.x;
  const int column = threadIdx.x % 64, r = threadIdx.x / 64, c = blockIdx.y * 64 + column;
  for (int d = threadIdx.x; d < D; d += THREADS) ks[d] = phi<FEATURE>(widen(k[kv * D + d]));
  const A value = c < M ? A(widen(v[kv * M + c])) : A(0);
  for (int g = 0; g < shared; ++g) {
    const long long head = kv * shared + g;
    for (int d = threadIdx.x; d < D; d += THREADS) qs[d] = scale * phi<FEATURE>(widen(q[head * D + d]));
    __syncthreads();
    A num = 0, den = 0;
    if (c < M)
      for (int d = r; d < D; d += 4) {
        const long long at = (kv * D + d) * M + c;
        const A s = S[at] + ks[d] * value;
        if (g == 0) S_new[at] = s;
        num += qs[d] * s;
      }
    if constexpr (NORM)
      for (int d = threadIdx.x; d < D; d += THREADS) {
        const A s = z[kv * D + d] + ks[d];
        if (g == 0 && blockIdx.y == 0) z_new[kv * D + d] = s;
        den += qs[d] * s;
      }
    parts[r][column] = num;
    den = warp_sum(den);
    if (threadIdx.x % 32 == 0) den_parts[threadIdx.x / 32] = den;
    __syncthreads();
    if (r == 0 && c < M) {
      A sum = eps;
      for (int w = 0; w < WARPS; ++w) sum += den_parts[w];
      num = (parts[0][column] + parts[1][column]) + (parts[2][column] + parts[3][column]);
      out[head * M + c] = narrow<T>(NORM ? num * inverse(sum) : num);
    }
    __syncthreads();
  }
}

// --- (a) the groups' own states ------------------------------------------------------------------------------------------------------

// states[head][group] = Σ_j y_j z_jᵀ and Σ_j y_j e_j over the group's positions j. TRANSPOSE false: S, of φ(k_j) [v_j | 1]ᵀ for each key head;
// true: R, of φ(q_j) G_jᵀ for each query head.
template <typename T, int D, int M, int C, int VT, int FEATURE, bool NORM, bool TRANSPOSE>
__global__ void __launch_bounds__(THREADS, 2) group_states(const T* __restrict__ y, const T* __restrict__ z, const Sum<T>* __restrict__ inv,
                                                           const Sum<T>* __restrict__ dden, Sum<T>* __restrict__ states,
                                                           const int* __restrict__ lengths, int N, int groups, int rows, Sum<T> scale) {
  typedef Sum<T> A;
  extern __shared__ __align__(16) unsigned char bytes[];
  constexpr int LDY = STRIDE<D>, LDZ = WIDE<VT>, TILES = up(D, 4) / 4 * (VT / 4), EACH = (TILES + THREADS - 1) / THREADS;
  A *ys = reinterpret_cast<A*>(bytes), *zs = ys + C * LDY, *e = zs + C * LDZ, *invs = e + C;
  const Group g(groups, rows, N);
  const int column = blockIdx.y * VT, real = real_rows(lengths, g.head, N), last = min(g.last, real), t = threadIdx.x;
  const T *yh = y + g.head * N * D, *zh = z + g.head * N * M;
  const A* dden_h = dden + g.head * N;
  const auto read_inv = [&](int start) {
    if (NORM && TRANSPOSE && t < C) invs[t] = number<1>(inv + g.head * N, start + t, 0, real);
  };
  A* state = states + (g.head * groups + g.nth) * STATE_SIZE<D, M>;
  A s[EACH][4][4], sum = 0;
#pragma unroll
  for (int n = 0; n < EACH; ++n)
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 4; ++b) s[n][a][b] = 0;
  clear_beyond<C, D, LDY>(ys);
  read_inv(g.first);
  if (NORM && TRANSPOSE) __syncthreads();
  for (int start = g.first; start < last; start += C) {
    fill<C, D, LDY>(ys, [&](int j, int a) { return scale * number<D, FEATURE>(yh, start + j, a, real); });
    fill<C, VT, LDZ>(zs, [&](int j, int c) { return cotangent<M, NORM && TRANSPOSE>(zh, invs + j, start + j, column + c, real); });
    if (t < C) e[t] = !NORM || start + t >= real ? A(0) : TRANSPOSE ? dden_h[start + t] : A(1);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int tile = t + n * THREADS;
      if (tile < TILES) columns_times<C, LDY, LDZ>(ys, zs, tile / (VT / 4) * 4, tile % (VT / 4) * 4, s[n]);
    }
    read_inv(start + C);                                                // for the next chunk, while its place is free
    if (t < D)
      for (int j = 0; j < C; ++j) sum += ys[j * LDY + t] * e[j];
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int tile = t + n * THREADS;
    if (tile < TILES)
#pragma unroll
      for (int a = 0; a < 4; ++a) {
        const int d = tile / (VT / 4) * 4 + a;
        if (d < D) put4<M>(state + d * M, column + tile % (VT / 4) * 4, s[n][a]);
      }
  }
  if (column == 0 && t < D) state[D * M + t] = sum;
}

// --- (b) what precedes each group ------------------------------------------------------------------------------------------------------

// In place: states[head][group] becomes the sum of `start` and all groups before it (behind it, if `reverse`); `end` takes the whole sum.
// `shared` heads, one after another in `states`, are summed into the first of them. A thread has one number of S or z in all groups.
template <typename A>
__global__ void __launch_bounds__(THREADS, 2) scan_states(A* __restrict__ states, const A* __restrict__ start_S, const A* __restrict__ start_z,
                                                       A* __restrict__ end_S, A* __restrict__ end_z, int groups, int shared, int DM, int D,
                                                       int reverse) {
  const long long head = blockIdx.x, size = up(DM + D, 4);
  const int e = blockIdx.y * THREADS + threadIdx.x;
  if (e >= DM + D) return;
  const bool in_S = e < DM;
  const A* start = in_S ? start_S : start_z;
  A* end = in_S ? end_S : end_z;
  const long long there = in_S ? head * DM + e : head * D + (e - DM);
  A sum = start ? start[there] : A(0);
  A* own = states + head * shared * groups * size + e;
  for (int step = 0; step < groups; ++step) {
    const long long group = reverse ? groups - 1 - step : step;
    A more = 0;
    for (int g = 0; g < shared; ++g) more += own[((long long)g * groups + group) * size];
    own[group * size] = sum;
    sum += more;
  }
  if (end) end[there] = sum;
}

// --- (c) outputs ----------------------------------------------------------------------------------------------------------------------

// For the positions i of one group, first ≤ i < last, and VT columns of z:
//
//     o_i = Sᵀ x_i + e_i s + Σ_{j≤i} (x_i·y_j + e_i f_j) z_j          den_i = n·x_i + Σ_{j≤i} x_i·y_j
//
// (x | e) and (y | f) have one feature more if EXTRA, and s is its row of the state; den, the same sum with ones in the place of z and
// n in that of S, only if NORM. REVERSE: j ≥ i. `shared` sets of y, z, f, numbered g, are summed over. The functions:
// x(i, a); e(start, xs, es), which fills es from the tile xs of x; y(g, j, a, inv_j), z(g, j, c, inv_j), f(g, j); inv(g, j), called once a row
// if REVERSE, whose result lies at inv_j; s(c), n(a), and S(tile), which fills a tile with the state before the group;
// store(i, c, o, d) takes four columns, and with them den_i if NORM, e_i if EXTRA.
template <typename A, int C, int W, int VT, bool EXTRA, bool NORM, bool REVERSE, class X, class E, class Y, class Z, class F, class I,
          class S, class SE, class SN, class Store>
__device__ __forceinline__ void walk(unsigned char* bytes, int first, int last, int shared, X x, E e, Y y, Z z, F f, I inv, S S0,
                                     SE s0, SN n0, Store store) {
  constexpr int LD = STRIDE<W>, LDZ = WIDE<VT>, LDS = STATE<VT>, LDP = SCORES<C>, H = C / 2, WP = up(W, 4), TILES = H * (VT / 4);
  static_assert(TILES <= THREADS && H * H <= THREADS && W <= THREADS, "a thread has one tile of 2 x 4 outputs and one of 2 x 2 scores");
  A *xs = reinterpret_cast<A*>(bytes), *ys = xs + C * LD, *zs = ys + C * LD, *state = zs + C * LDZ, *scores = state + WP * LDS;
  A *s = scores + C * LDP, *es = s + VT, *fs = es + C, *den = fs + C, *n = den + C, *invs = den;
  static_assert(!(NORM && REVERSE), "den and invs are one place");
  const int t = threadIdx.x, c = t % (VT / 4) * 4, i = t / (VT / 4), lane = t % 32;
  const auto read_inv = [&](int g, int start) {
    if (REVERSE && t < C) invs[t] = inv(g, start + t);
  };
  S0(state);
  if (EXTRA && t < VT) s[t] = s0(t);
  if (NORM && t < W) n[t] = n0(t);
  clear_beyond<C, W, LD>(xs);
  clear_beyond<C, W, LD>(ys);
  const int chunks = (last - first + C - 1) / C;
  for (int step = 0; step < chunks; ++step) {
    const int start = first + (REVERSE ? chunks - 1 - step : step) * C;
    fill<C, W, LD>(xs, [&](int r, int a) { return x(start + r, a); });
    read_inv(0, start);
    __syncthreads();
    if constexpr (EXTRA) {
      e(start, xs, es);
      __syncthreads();
    }
    A o[2][4] = {};
    if (t < TILES) {
      rows_times<H, WP, LD, LDS>(xs, state, i, c, o);
      if constexpr (EXTRA) {
        A more[4];
        read4(s + c, more);
#pragma unroll
        for (int b = 0; b < 4; ++b) o[0][b] += es[i] * more[b], o[1][b] += es[i + H] * more[b];
      }
    }
    for (int g = 0; g < shared; ++g) {
      fill<C, W, LD>(ys, [&](int r, int a) { return y(g, start + r, a, invs + r); });
      fill<C, VT, LDZ>(zs, [&](int r, int c) { return z(g, start + r, c, invs + r); });
      if (EXTRA && t < C) fs[t] = f(g, start + t);
      __syncthreads();
      if (t < H * H) {
        const int row = t / H, col = t % H;
        A score[2][2] = {};
        dot_rows<H, H, WP, LD, LD>(xs, ys, row, col, score);
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            const int a = row + u * H, b = col + w * H;
            if constexpr (EXTRA) score[u][w] += es[a] * fs[b];
            scores[a * LDP + b] = (REVERSE ? b < a : b > a) ? A(0) : score[u][w];          // not times 0: a hidden score may be infinite
          }
      }
      __syncthreads();
      if constexpr (NORM)
        for (int row = t / 32; row < C; row += WARPS) {
          A sum = lane < C ? scores[row * LDP + lane] : A(0);
          for (int a = lane; a < W; a += 32) sum += xs[row * LD + a] * n[a];
          sum = warp_sum(sum);
          if (lane == 0) den[row] = sum;
        }
      if (t < TILES) rows_times<H, C, LDP, LDZ>(scores, zs, i, c, o);
      add_outer<C, WP, VT, LDS, LD, LDZ>(state, ys, zs);
      if (g + 1 < shared) read_inv(g + 1, start);
      if (EXTRA && t < VT) {
        A more = s[t];
        for (int j = 0; j < C; ++j) more += fs[j] * zs[j * LDZ + t];
        s[t] = more;
      }
      __syncthreads();
    }
    if (NORM && t < W) {
      A more = n[t];
      for (int j = 0; j < C; ++j) more += ys[j * LD + t];
      n[t] = more;
    }
    if (t < TILES) {
      const A* d = NORM ? den : es;
      store(start + i, c, o[0], NORM || EXTRA ? d[i] : A(0));
      store(start + i + H, c, o[1], NORM || EXTRA ? d[i + H] : A(0));
    }
  }
}

// out = Sᵀφ(q) / (zᵀφ(q) + ε). `inv` takes 1 / (den + ε) of each row, which the backward needs.
template <typename T, int D, int M, int C, int VT, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>)
group_outputs(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const Sum<T>* __restrict__ states, T* __restrict__ out,
              Sum<T>* __restrict__ inv, const int* __restrict__ query_lengths, const int* __restrict__ key_lengths, int N, int groups, int rows,
              int shared, Sum<T> scale, Sum<T> eps) {
  typedef Sum<T> A;
  extern __shared__ __align__(16) unsigned char bytes[];
  const Group g(groups, rows, N);
  const long long kv = g.head / shared;
  const int column = blockIdx.y * VT, real_q = real_rows(query_lengths, g.head, N), real_k = real_rows(key_lengths, kv, N);
  const A* state = states + (kv * groups + g.nth) * STATE_SIZE<D, M>;
  const T *qh = q + g.head * N * D, *kh = k + kv * N * D, *vh = v + kv * N * M;
  walk<A, C, D, VT, false, NORM, false>(
      bytes, g.first, g.last, 1,
      [&](int i, int a) { return scale * number<D, FEATURE>(qh, i, a, real_q); },
      [](int, const A*, A*) {},
      [&](int, int j, int a, const A*) { return number<D, FEATURE>(kh, j, a, real_k); },
      [&](int, int j, int c, const A*) { return number<M>(vh, j, column + c, real_k); },
      [](int, int) { return A(0); },
      [](int, int) { return A(0); },
      [&](A* tile) { fill_columns<D, M, VT, STATE<VT>>(tile, state, column); },
      [](int) { return A(0); },
      [&](int a) { return state[D * M + a]; },
      [&](int i, int c, A (&o)[4], A den) {
        if (i >= g.last) return;
        if constexpr (NORM) {
          const A by = i < real_q ? inverse(den + eps) : A(0);
#pragma unroll
          for (int b = 0; b < 4; ++b) o[b] *= by;
          if (column == 0 && c == 0) inv[g.head * N + i] = by;
        }
        put4<M>(out + (g.head * N + i) * M, column + c, o);
      });
}

// dq_i = φ'(q_i) ⊙ scale·S_i G_i, and dden, which the other two need. x holds do, and e -do·out: the division comes last, once for each row.
template <typename T, int D, int M, int C, int VT, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>)
group_dq(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout, const T* __restrict__ out,
         const Sum<T>* __restrict__ states, const Sum<T>* __restrict__ inv, Sum<T>* __restrict__ dden, T* __restrict__ dq,
         const int* __restrict__ query_lengths, const int* __restrict__ key_lengths, int N, int groups, int rows, int shared, Sum<T> scale) {
  typedef Sum<T> A;
  extern __shared__ __align__(16) unsigned char bytes[];
  const Group g(groups, rows, N);
  const long long kv = g.head / shared;
  const int column = blockIdx.y * VT, real_q = real_rows(query_lengths, g.head, N), real_k = real_rows(key_lengths, kv, N);
  const A* state = states + (kv * groups + g.nth) * STATE_SIZE<D, M>;
  const T *qh = q + g.head * N * D, *kh = k + kv * N * D, *vh = v + kv * N * M, *doh = dout + g.head * N * M, *outh = out + g.head * N * M;
  walk<A, C, M, VT, NORM, false, false>(
      bytes, g.first, g.last, 1,
      [&](int i, int a) { return number<M>(doh, i, a, real_q); },
      [&](int start, const A* xs, A* es) {                              // each row by a warp
        for (int r = threadIdx.x / 32; r < C; r += WARPS) {
          A sum = 0;
          for (int a = threadIdx.x % 32; a < M; a += 32) sum -= xs[r * STRIDE<M> + a] * number<M>(outh, start + r, a, real_q);
          sum = warp_sum(sum);
          if (threadIdx.x % 32 == 0) es[r] = sum;
        }
      },
      [&](int, int j, int a, const A*) { return number<M>(vh, j, a, real_k); },
      [&](int, int j, int c, const A*) { return number<D, FEATURE>(kh, j, column + c, real_k); },
      [&](int, int j) { return j < real_k ? A(1) : A(0); },
      [](int, int) { return A(0); },
      [&](A* tile) { fill_transposed<M, D, VT, STATE<VT>>(tile, state, column); },
      [&](int c) { return column + c < D ? state[D * M + column + c] : A(0); },
      [](int) { return A(0); },
      [&](int i, int c, A (&o)[4], A e) {
        if (i >= g.last) return;
        const A by = NORM ? number<1>(inv + g.head * N, i, 0, real_q) : A(1);
        if (NORM && column == 0 && c == 0) dden[g.head * N + i] = e * by;
        put_slope<D, FEATURE>(dq + (g.head * N + i) * D, qh + (long long)i * D, column + c, i < real_q, scale * by, o);
      });
}

// dk_i = φ'(k_i) ⊙ R_i [v_i | 1], over the query heads that share the key
template <typename T, int D, int M, int C, int VT, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>)
group_dk(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout, const Sum<T>* __restrict__ states,
         const Sum<T>* __restrict__ inv, const Sum<T>* __restrict__ dden, T* __restrict__ dk, const int* __restrict__ query_lengths,
         const int* __restrict__ key_lengths, int N, int groups, int rows, int shared, Sum<T> scale) {
  typedef Sum<T> A;
  extern __shared__ __align__(16) unsigned char bytes[];
  const Group g(groups, rows, N);
  const long long head = g.head * shared;
  const int column = blockIdx.y * VT, real_k = real_rows(key_lengths, g.head, N);
  const A* state = states + (head * groups + g.nth) * STATE_SIZE<D, M>;
  const T *kh = k + g.head * N * D, *vh = v + g.head * N * M;
  walk<A, C, M, VT, NORM, false, true>(
      bytes, g.first, g.last, shared,
      [&](int i, int a) { return number<M>(vh, i, a, real_k); },
      [&](int start, const A*, A* es) {
        if (threadIdx.x < C) es[threadIdx.x] = start + (int)threadIdx.x < real_k ? A(1) : A(0);
      },
      [&](int h, int j, int a, const A* inv_j) {
        return cotangent<M, NORM>(dout + (head + h) * N * M, inv_j, j, a, real_rows(query_lengths, head + h, N));
      },
      [&](int h, int j, int c, const A*) {
        return scale * number<D, FEATURE>(q + (head + h) * N * D, j, column + c, real_rows(query_lengths, head + h, N));
      },
      [&](int h, int j) { return number<1>(dden + (head + h) * N, j, 0, real_rows(query_lengths, head + h, N)); },
      [&](int h, int j) { return NORM ? number<1>(inv + (head + h) * N, j, 0, real_rows(query_lengths, head + h, N)) : A(0); },
      [&](A* tile) { fill_transposed<M, D, VT, STATE<VT>>(tile, state, column); },
      [&](int c) { return column + c < D ? state[D * M + column + c] : A(0); },
      [](int) { return A(0); },
      [&](int i, int c, A (&o)[4], A) {
        if (i < g.last) put_slope<D, FEATURE>(dk + (g.head * N + i) * D, kh + (long long)i * D, column + c, i < real_k, A(1), o);
      });
}

// dv_i = R_iᵀ φ(k_i), over the query heads that share the value
template <typename T, int D, int M, int C, int VT, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>)
group_dv(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ dout, const Sum<T>* __restrict__ states,
         const Sum<T>* __restrict__ inv, T* __restrict__ dv, const int* __restrict__ query_lengths, const int* __restrict__ key_lengths, int N,
         int groups, int rows, int shared, Sum<T> scale) {
  typedef Sum<T> A;
  extern __shared__ __align__(16) unsigned char bytes[];
  const Group g(groups, rows, N);
  const long long head = g.head * shared;
  const int column = blockIdx.y * VT, real_k = real_rows(key_lengths, g.head, N);
  const A* state = states + (head * groups + g.nth) * STATE_SIZE<D, M>;
  const T* kh = k + g.head * N * D;
  walk<A, C, D, VT, false, false, true>(
      bytes, g.first, g.last, shared,
      [&](int i, int a) { return number<D, FEATURE>(kh, i, a, real_k); },
      [](int, const A*, A*) {},
      [&](int h, int j, int a, const A*) { return scale * number<D, FEATURE>(q + (head + h) * N * D, j, a, real_rows(query_lengths, head + h, N)); },
      [&](int h, int j, int c, const A* inv_j) {
        return cotangent<M, NORM>(dout + (head + h) * N * M, inv_j, j, column + c, real_rows(query_lengths, head + h, N));
      },
      [](int, int) { return A(0); },
      [&](int h, int j) { return NORM ? number<1>(inv + (head + h) * N, j, 0, real_rows(query_lengths, head + h, N)) : A(0); },
      [&](A* tile) { fill_columns<D, M, VT, STATE<VT>>(tile, state, column); },
      [](int) { return A(0); },
      [](int) { return A(0); },
      [&](int i, int c, A (&o)[4], A) {
        if (i < g.last) put4<M>(dv + (g.head * N + i) * M, column + c, o);
      });
}

// dk and dv at once. Threads 0 … 127 have dk: thread (i, d) rows i, i + C/2 of columns d, d + VD/4, …, so that R serves as it lies,
//
//     dφ(k)_i[d] = Σ_m v_i[m] R[d][m] + r[d] + Σ_{j≥i} (v_i·G_j + dden_j) φ(q_j)[d]
//
// and the others dv: rows i, i + C/2 of four columns of dv_i = Rᵀ φ(k_i) + Σ_{j≥i} (φ(k_i)·φ(q_j)) G_j. Both update R and r.
template <typename T, int D, int M, int C, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, 2)
group_dk_dv(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout, const Sum<T>* __restrict__ states,
            const Sum<T>* __restrict__ inv, const Sum<T>* __restrict__ dden, T* __restrict__ dk, T* __restrict__ dv,
            const int* __restrict__ query_lengths, const int* __restrict__ key_lengths, int N, int groups, int rows, int shared, Sum<T> scale) {
  typedef Sum<T> A;
  extern __shared__ __align__(16) unsigned char bytes[];
  constexpr int H = C / 2, VD = up(D, 32), VM = up(M, 32), LDK = STRIDE<D>, LDV = STRIDE<M>, LDP = SCORES<C>, HALF = THREADS / 2;
  static_assert(H * (VD / 4) <= HALF && H * (VM / 4) <= HALF && H * H <= HALF, "a thread has one tile of dk or of dv");
  A *ks = reinterpret_cast<A*>(bytes), *qs = ks + C * LDK, *vs = qs + C * LDK, *gs = vs + C * LDV, *R = gs + C * LDV;
  A *scores_k = R + VD * LDV, *scores_v = scores_k + C * LDP, *r = scores_v + C * LDP, *fs = r + VD, *invs = fs + C;
  const Group g(groups, rows, N);
  const long long kv = g.head, head = kv * shared;
  const int real_k = real_rows(key_lengths, kv, N), chunks = (g.last - g.first + C - 1) / C;
  const T *kh = k + kv * N * D, *vh = v + kv * N * M;
  const auto read_inv = [&](int h, int start) {
    const int j = threadIdx.x;
    if (NORM && j < C) invs[j] = number<1>(inv + (head + h) * N, start + j, 0, real_rows(query_lengths, head + h, N));
  };
  const bool for_k = threadIdx.x < HALF;
  const int t = threadIdx.x % HALF, row = t / H, col = t % H;
  const int nth = for_k ? t / (VD / 4) : t / (VM / 4), c = for_k ? t % (VD / 4) : t % (VM / 4) * 4;
  const int i = nth % 2 * (H / 2) + nth / 2;                            // rows 4 apart in the halves of a warp: other banks
  const bool busy = nth < H;
  const A* state = states + (head * groups + g.nth) * STATE_SIZE<D, M>;
  // Columns beyond D and M are 0 up to a multiple of 32, and stay so
  fill<C, VD, LDK>(ks, [&](int, int) { return A(0); });
  fill<C, VD, LDK>(qs, [&](int, int) { return A(0); });
  fill<C, VM, LDV>(vs, [&](int, int) { return A(0); });
  fill<C, VM, LDV>(gs, [&](int, int) { return A(0); });
  fill<VD, VM, LDV>(R, [&](int a, int b) { return a < D && b < M ? state[a * M + b] : A(0); });
  if (threadIdx.x < VD) r[threadIdx.x] = threadIdx.x < D ? state[D * M + threadIdx.x] : A(0);
  for (int step = chunks - 1; step >= 0; --step) {
    const int start = g.first + step * C;
    __syncthreads();
    fill<C, D, LDK>(ks, [&](int j, int a) { return number<D, FEATURE>(kh, start + j, a, real_k); });
    fill<C, M, LDV>(vs, [&](int j, int a) { return number<M>(vh, start + j, a, real_k); });
    read_inv(0, start);
    __syncthreads();
    A o[2][4] = {};
    if (for_k && busy) {
#pragma unroll
      for (int b = 0; b < 4; ++b)
        if constexpr (NORM) o[0][b] = o[1][b] = r[c + b * (VD / 4)];
      dot_rows<H, VD / 4, VM, LDV, LDV>(vs, R, i, c, o);
    } else if (!for_k && busy) {
      rows_times<H, VD, LDK, LDV>(ks, R, i, c, o);
    }
    for (int h = 0; h < shared; ++h) {
      const long long at = (head + h) * N;
      const int real_q = real_rows(query_lengths, head + h, N);
      fill<C, D, LDK>(qs, [&](int j, int a) { return scale * number<D, FEATURE>(q + at * D, start + j, a, real_q); });
      fill<C, M, LDV>(gs, [&](int j, int a) { return cotangent<M, NORM>(dout + at * M, invs + j, start + j, a, real_q); });
      if (NORM && threadIdx.x < C) fs[threadIdx.x] = number<1>(dden + at, start + threadIdx.x, 0, real_q);
      __syncthreads();
      if (t < H * H) {
        A score[2][2] = {};
        if (for_k) dot_rows<H, H, up(M, 4), LDV, LDV>(vs, gs, row, col, score);
        else dot_rows<H, H, up(D, 4), LDK, LDK>(ks, qs, row, col, score);
        A* scores = for_k ? scores_k : scores_v;
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            const int a = row + u * H, b = col + w * H;
            if (NORM && for_k) score[u][w] += fs[b];
            scores[a * LDP + b] = b < a ? A(0) : score[u][w];
          }
      }
      __syncthreads();
      if (for_k && busy) rows_times<H, C, LDP, LDK, VD / 4>(scores_k, qs, i, c, o);
      else if (!for_k && busy) rows_times<H, C, LDP, LDV>(scores_v, gs, i, c, o);
      add_outer<C, VD, VM, LDV, LDK, LDV>(R, qs, gs);
      if (h + 1 < shared) read_inv(h + 1, start);
      if (NORM && threadIdx.x < VD) {
        A more = r[threadIdx.x];
        for (int j = 0; j < C; ++j) more += qs[j * LDK + threadIdx.x] * fs[j];
        r[threadIdx.x] = more;
      }
      __syncthreads();
    }
    if (busy)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int n = start + i + u * H;
        if (n >= g.last) continue;
        if (!for_k) {
          put4<M>(dv + (kv * N + n) * M, c, o[u]);
          continue;
        }
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int d = c + b * (VD / 4);
          // elu: φ'(x) = min(φ(x), 1), and φ(k) is at hand
          const A mapped = FEATURE ? ks[(i + u * H) * LDK + d] : A(1), slope = mapped < 1 ? mapped : A(1);
          if (d < D) dk[(kv * N + n) * D + d] = narrow<T>(n < real_k ? o[u][b] * slope : A(0));
        }
      }
  }
}
