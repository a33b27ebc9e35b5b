// Rule `linear`, forward, for half and bfloat16 on tensor cores: phases (a) and (c) of linear.cu as products of tiles of 16 × 16 × 16.
//
// | kernel           | computes                                                       | one block takes                        |
// |------------------|----------------------------------------------------------------|----------------------------------------|
// | group_states_tc  | (a) each group's own Σ_j k_j v_jᵀ and Σ_j k_j                   | a group                                |
// | group_outputs_tc | (c) O = tril(Q Kᵀ) V + Q S, S ← S + Kᵀ V, chunk by chunk        | a group, 64 columns of v               |
//
// Arrays, states, lengths, FEATURE and NORM are those of linear.cu, and so are phase (b) and the backward. Rows and columns beyond D and M are
// zeros up to a multiple of 16. bfloat16 needs sm_80, half sm_75.
//
// What is rounded. With u the roundoff of T (2⁻¹¹ half, 2⁻⁸ bfloat16):
//
// 1. φ(q) and φ(k), once each, to T: u·φ, or half the smallest number of T where that is more. The identity is exact. Key sums are sums of
//    the rounded φ(k), so that num and den see the same keys.
// 2. Scores and the state before a chunk are floats. Each enters its product as two parts of T, x = hi + lo, hi = T(x), lo = T(x - hi),
//    which leave at most u²·|x|. Half ends at 2⁻²⁴ and 2¹⁶, so each row of scores, and the block's state, is first brought to a maximum in
//    [2¹⁴, 2¹⁵) by a power of two: what is left is at most max(u²·|x|, 2⁻³⁹·max |x|), and nothing overflows. den adds up hi + lo.
// 3. Sums are floats. A tensor core adds b ≥ 4 products at a time to a sum, and cuts each addend, and the result, off at the last place of
//    the largest: 2(b + 2)/b ≤ 3 roundings for each product, where a float sum has one.
// 4. out, once, to T.
//
// In first order, a_ij = φ(q_i)·φ(k_j) being off by δa from 1 and 2, and the sum S of the past by δS,
//     δnum_i = Σ_{j≤i} δa_ij |v_j| + δφ(q_i)·|S| + φ(q_i)·δS,    δden_i likewise with v = 1,    δout = (δnum + |out| δden) / den.
// With elu + 1 that is at most 4u times the same sum of |v|; with the identity, where only 2 is left, at most u² before the division, 2u²
// after it. A score or a state that is infinite becomes NaN.
#include "linear.cu"
#include <mma.h>

namespace wmma = nvcuda::wmma;

constexpr int CHUNK = 32, STATE_CHUNK = 64;                             // positions at a time: (c), (a)

// Strides in shared memory. A tile of T is read 8 rows of 16 bytes at a time, for which rows of an odd number of 16 bytes lie in different
// banks; a tile of floats is written 4 rows of 32 bytes at a time.
template <int W> constexpr int ROW = up(W, 16) + 8;
constexpr int STAGE_ROW = 24, STAGE = 15 * STAGE_ROW + 16, SCORE_ROW = CHUNK + 8;
template <int M> constexpr int COLUMNS = up(M, 16) < 64 ? up(M, 16) : 64;      // of v, in a block of group_outputs_tc

template <typename T> using Rows = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major>;
template <typename T> using RowsTurned = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::col_major>;
template <typename T> using Columns = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major>;
template <typename T> using ColumnsTurned = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major>;
typedef wmma::fragment<wmma::accumulator, 16, 16, 16, float> Tile;

template <typename T> constexpr bool SMALL_RANGE = false;
template <> constexpr bool SMALL_RANGE<__half> = true;

__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The power of two, at most 2¹⁰⁰, that brings `top` to [2¹⁴, 2¹⁵), by its exponent alone; 1 where T has the range of a float
template <typename T> __device__ __forceinline__ float lift(float top) {
  return SMALL_RANGE<T> ? __int_as_float(min(268 - (__float_as_int(top) >> 23), 227) << 23) : 1.f;
}

// tile[r][c] = map(rows[start + r][column + c]) in T; 0 from row `end` and column W on
template <int ROWS, int W, int WIDTH, typename T, class Map>
__device__ __forceinline__ void load_rows(T* tile, const T* rows, int start, int end, int column, Map map) {
  constexpr int LD = ROW<WIDTH>, QUADS = up(WIDTH, 16) / 4;
  for (int n = threadIdx.x; n < ROWS * QUADS; n += THREADS) {
    const int r = n / QUADS, c = n % QUADS * 4;
    float x[4] = {};
    if (start + r < end) {
      get4<W>(rows + (long long)(start + r) * W, column + c, x);
#pragma unroll
      for (int b = 0; b < 4; ++b) x[b] = column + c + b < W ? map(x[b]) : 0.f;
    }
    put4<LD>(tile + r * LD, c, x);
  }
}

// Which lane holds which number of a Tile is not specified. Through `stage`, a warp's own, lane l gets rows a and a + 8 of four columns from
// c on, in the order in which no bank is passed twice.
__device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / 16 + threadIdx.x / 4 % 4 * 2; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % 4 * 4; }
__device__ __forceinline__ void take(float* stage, const Tile& tile, float (&x)[2][4]) {
  wmma::store_matrix_sync(stage, tile, STAGE_ROW, wmma::mem_row_major);
  __syncwarp();
  read4(stage + lane_row() * STAGE_ROW + lane_column(), x[0]), read4(stage + (lane_row() + 8) * STAGE_ROW + lane_column(), x[1]);
  __syncwarp();
}
__device__ __forceinline__ void give(float* stage, Tile& tile, const float (&x)[2][4]) {
  write4(stage + lane_row() * STAGE_ROW + lane_column(), x[0]), write4(stage + (lane_row() + 8) * STAGE_ROW + lane_column(), x[1]);
  __syncwarp();
  wmma::load_matrix_sync(tile, stage, STAGE_ROW, wmma::mem_row_major);
  __syncwarp();
}

// S += Yᵀ Z over ROWS positions. S has DT × MT tiles; a warp has every eighth, and where MT divides 8 all of the same columns.
template <int ROWS, int DT, int MT, int LDY, int LDZ, typename T, int EACH>
__device__ __forceinline__ void add_outer_tiles(const T* Y, const T* Z, Tile (&S)[EACH]) {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int j = 0; j < ROWS; j += 16) {
    RowsTurned<T> y;
    Columns<T> z;
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int t = warp + n * WARPS;
      if (t >= DT * MT) continue;
      wmma::load_matrix_sync(y, Y + j * LDY + t / MT * 16, LDY);
      if (n == 0 || WARPS % MT) wmma::load_matrix_sync(z, Z + j * LDZ + t % MT * 16, LDZ);
      wmma::mma_sync(S[n], y, z, S[n]);
    }
  }
}

// --- (a) the groups' own states ------------------------------------------------------------------------------------------------------

template <typename T, int D, int M, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, 2) group_states_tc(const T* __restrict__ k, const T* __restrict__ v, float* __restrict__ states,
                                                              const int* __restrict__ lengths, int N, int groups, int rows) {
  extern __shared__ __align__(32) unsigned char tiles[];
  constexpr int DT = up(D, 16) / 16, MT = up(M, 16) / 16, EACH = (DT * MT + WARPS - 1) / WARPS;
  T *ks = reinterpret_cast<T*>(tiles), *vs = ks + STATE_CHUNK * ROW<D>;
  const int t = threadIdx.x, warp = t / 32;
  float* stage = reinterpret_cast<float*>(tiles) + warp * STAGE;                  // over ks and vs, when these are done with
  const Group g(groups, rows, N);
  const int last = min(g.last, real_rows(lengths, g.head, N));
  float* state = states + (g.head * groups + g.nth) * STATE_SIZE<D, M>;
  Tile S[EACH];
#pragma unroll
  for (int n = 0; n < EACH; ++n) wmma::fill_fragment(S[n], 0.f);
  float sum = 0;
  for (int start = g.first; start < last; start += STATE_CHUNK) {
    load_rows<STATE_CHUNK, D, D>(ks, k + g.head * N * D, start, last, 0, [](float x) { return phi<FEATURE>(x); });
    load_rows<STATE_CHUNK, M, M>(vs, v + g.head * N * M, start, last, 0, [](float x) { return x; });
    __syncthreads();
    add_outer_tiles<STATE_CHUNK, DT, MT, ROW<D>, ROW<M>>(ks, vs, S);
    if (NORM && t < D)
      for (int j = 0; j < STATE_CHUNK; ++j) sum += widen(ks[j * ROW<D> + t]);
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int nth = warp + n * WARPS;
    if (nth >= DT * MT) continue;
    float x[2][4];
    take(stage, S[n], x);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int d = nth / MT * 16 + lane_row() + 8 * u;
      if (d < D) put4<M>(state + (long long)d * M, nth % MT * 16 + lane_column(), x[u]);
    }
  }
  if (t < D) state[(long long)D * M + t] = sum;
}

// --- (c) outputs ----------------------------------------------------------------------------------------------------------------------

// S stays in the warps' Tiles; its parts lie in shared memory. Between barriers, for each chunk:
//
//     q, k, v  |  scores = Q Kᵀ;  S += Kᵀ V  |  weights, den  |  near = weights V;  past = Q S_before;  z += Σ_j k_j  |  out;  parts of S
template <typename T, int D, int M, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, 2) group_outputs_tc(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                                               const float* __restrict__ states, T* __restrict__ out,
                                                               float* __restrict__ inv, const int* __restrict__ query_lengths,
                                                               const int* __restrict__ key_lengths, int N, int groups, int rows, int shared,
                                                               float scale, float eps) {
  extern __shared__ __align__(32) unsigned char tiles[];
  constexpr int C = CHUNK, DP = up(D, 16), VT = COLUMNS<M>, DT = DP / 16, MT = VT / 16, EACH = (DT * MT + WARPS - 1) / WARPS;
  constexpr int LD = ROW<D>, LDV = ROW<VT>, LDW = ROW<C>;
  static_assert(C == 32 && C / 16 * MT <= WARPS, "a lane has one score of a row, a warp one tile of out");
  float *stages = reinterpret_cast<float*>(tiles), *scores = stages;
  T *qs = reinterpret_cast<T*>(stages + WARPS * STAGE), *ks = qs + C * LD, *vs = ks + C * LD;
  T *w_hi = vs + C * LDV, *w_lo = w_hi + C * LDW, *s_hi = w_lo + C * LDW, *s_lo = s_hi + DP * LDV;
  float *z = reinterpret_cast<float*>(s_lo + DP * LDV), *den = z + DP, *lowered = den + C, *tops = lowered + C;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, row = lane_row(), quad = lane_column();
  float* stage = stages + warp * STAGE;
  const Group g(groups, rows, N);
  const long long head = g.head, kv = head / shared;
  const int column = blockIdx.y * VT, real_q = real_rows(query_lengths, head, N), real_k = real_rows(key_lengths, kv, N);
  const float* state = states + (kv * groups + g.nth) * STATE_SIZE<D, M>;
  Tile S[EACH];
  float raised, sunk;                                                   // the power of two in s_hi and s_lo, and its inverse

  const auto leave_top = [&]() {                                        // of |S| in this warp's tiles
    if constexpr (SMALL_RANGE<T>) {
      float top = 0;
#pragma unroll
      for (int n = 0; n < EACH; ++n)
#pragma unroll
        for (int e = 0; e < S[n].num_elements; ++e) top = fmaxf(top, fabsf(S[n].x[e]));
      top = warp_max(top);
      if (lane == 0) tops[warp] = top;
    }
  };
  const auto split_state = [&]() {
    float top = 0;
    if constexpr (SMALL_RANGE<T>)
      for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w]);
    raised = lift<T>(top), sunk = 1 / raised;
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      const int nth = warp + n * WARPS;
      if (nth >= DT * MT) continue;
      float x[2][4];
      take(stage, S[n], x);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int at = (nth / MT * 16 + row + 8 * u) * LDV + nth % MT * 16 + quad;
        float rest[4];
#pragma unroll
        for (int b = 0; b < 4; ++b) x[u][b] *= raised, rest[b] = x[u][b] - widen(narrow<T>(x[u][b]));
        put4<LDV>(s_hi + at, 0, x[u]), put4<LDV>(s_lo + at, 0, rest);
      }
    }
  };

#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    wmma::fill_fragment(S[n], 0.f);
    const int nth = warp + n * WARPS;
    if (nth >= DT * MT) continue;
    float x[2][4] = {};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int d = nth / MT * 16 + row + 8 * u;
      if (d < D) get4<M>(state + d * M, column + nth % MT * 16 + quad, x[u]);
    }
    give(stage, S[n], x);
  }
  if (NORM && t < D) z[t] = state[D * M + t];
  leave_top();
  __syncthreads();
  split_state();

  for (int start = g.first; start < g.last; start += C) {
    load_rows<C, D, D>(qs, q + head * N * D, start, real_q, 0, [](float x) { return phi<FEATURE>(x); });
    load_rows<C, D, D>(ks, k + kv * N * D, start, real_k, 0, [](float x) { return phi<FEATURE>(x); });
    load_rows<C, M, VT>(vs, v + kv * N * M, start, real_k, column, [](float x) { return x; });
    __syncthreads();
    if (warp < 3) {                                                     // tiles (0, 0), (1, 0), (1, 1): the fourth is hidden
      const int r = (warp + 1) / 2 * 16, c = warp / 2 * 16;
      Tile tile;
      wmma::fill_fragment(tile, 0.f);
#pragma unroll 2
      for (int d = 0; d < DP; d += 16) {
        Rows<T> x;
        ColumnsTurned<T> y;
        wmma::load_matrix_sync(x, qs + r * LD + d, LD);
        wmma::load_matrix_sync(y, ks + c * LD + d, LD);
        wmma::mma_sync(tile, x, y, tile);
      }
      wmma::store_matrix_sync(scores + r * SCORE_ROW + c, tile, SCORE_ROW, wmma::mem_row_major);
    }
    add_outer_tiles<C, DT, MT, LD, LDV>(ks, vs, S);
    leave_top();
    __syncthreads();
    for (int i = warp; i < C; i += WARPS) {
      const float score = lane <= i ? scores[i * SCORE_ROW + lane] : 0.f;          // not times 0: a hidden score may be infinite
      const float by = lift<T>(SMALL_RANGE<T> ? warp_max(fabsf(score)) : 0.f), x = score * by;
      const T hi = narrow<T>(x), lo = narrow<T>(x - widen(hi));
      w_hi[i * LDW + lane] = hi, w_lo[i * LDW + lane] = lo;
      if constexpr (NORM) {
        float sum = (widen(hi) + widen(lo)) / by;
        for (int a = lane; a < D; a += 32) sum += widen(qs[i * LD + a]) * z[a];
        sum = warp_sum(sum);
        if (lane == 0) den[i] = sum;
      }
      if (lane == 0) lowered[i] = 1 / by;
    }
    __syncthreads();
    const int r = warp / MT * 16, c = warp % MT * 16;
    Tile near, past;
    if (r < C) {
      Rows<T> x;
      Columns<T> y;
      wmma::fill_fragment(near, 0.f), wmma::fill_fragment(past, 0.f);
      for (int j = 0; j <= r; j += 16) {
        wmma::load_matrix_sync(y, vs + j * LDV + c, LDV);
        wmma::load_matrix_sync(x, w_lo + r * LDW + j, LDW);
        wmma::mma_sync(near, x, y, near);
        wmma::load_matrix_sync(x, w_hi + r * LDW + j, LDW);
        wmma::mma_sync(near, x, y, near);
      }
#pragma unroll 2
      for (int d = 0; d < DP; d += 16) {
        wmma::load_matrix_sync(x, qs + r * LD + d, LD);
        wmma::load_matrix_sync(y, s_lo + d * LDV + c, LDV);
        wmma::mma_sync(past, x, y, past);
        wmma::load_matrix_sync(y, s_hi + d * LDV + c, LDV);
        wmma::mma_sync(past, x, y, past);
      }
    }
    if (NORM && t < D) {
      float more = z[t];
      for (int j = 0; j < C; ++j) more += widen(ks[j * LD + t]);
      z[t] = more;
    }
    __syncthreads();
    if (r < C) {
      float x[2][4], y[2][4];
      take(stage, near, x), take(stage, past, y);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int i = r + row + 8 * u, at = start + i;
        if (at >= g.last) continue;
        const float by = at >= real_q ? 0.f : NORM ? inverse(scale * den[i] + eps) : 1.f;
#pragma unroll
        for (int b = 0; b < 4; ++b) x[u][b] = at < real_q ? scale * (x[u][b] * lowered[i] + y[u][b] * sunk) * by : 0.f;
        if (NORM && column + c + quad == 0) inv[head * N + at] = by;
        put4<M>(out + (head * N + at) * M, column + c + quad, x[u]);
      }
    }
    split_state();
  }
}
