// Rule `linear` for half and bfloat16 on tensor cores: phases (a) and (c) of linear.cu as products of tiles of 16 × 16 × 16.
//
// | kernel           | computes                                                            | one block takes                             |
// |------------------|---------------------------------------------------------------------|---------------------------------------------|
// | group_states_tc  | (a) each group's own Σ_j k_j v_jᵀ and Σ_j k_j, or Σ_j φ(q_j) G_jᵀ    | a group                                     |
// | group_outputs_tc | (c) out from the state before the group (eq. 12)                    | a group, 64 columns of the state            |
// | group_dq_tc      | δ_i = -do_i·out_i, dφ(q)_i = S_i G_i (eq. 13)                       | the same                                    |
// | group_dk_dv_tc   | dφ(k)_i = R_i [v_i | 1], dv_i = R_iᵀ φ(k_i)  (eq. 14, 15)            | a group                                     |
//
// Arrays, states, lengths, FEATURE, NORM and arguments are those of linear.cu, and so is phase (b). Rows and columns beyond D and M are zeros
// up to a multiple of 16. bfloat16 needs sm_80, half sm_75.
//
// G_j = c_j [do_j | δ_j] with c_j = 1 / (den_j + ε): do_j is a number of T, and the float c_j goes where it costs least. All of (c) is
//
//     o_i = Sᵀ x_i + e_i s + weight·Σ_{j≤i} (x_i·y_j + e_i f_j) z_j                                     (j ≥ i for dk and dv)
//
// |     | x    | e | y      | f | z      | S  | s                        | parts of x, y, z | weight |                 |
// |-----|------|---|--------|---|--------|----|--------------------------|------------------|--------|-----------------|
// | out | φ(q) |   | φ(k)   |   | v      | S  |                          | 2, 2, 1          | 1      | times scale·c_i |
// | dq  | do   | δ | v      | 1 | φ(k)   | Sᵀ | z, the sum of keys       | 1, 1, 2          | 1      | times scale·c_i |
// | dk  | v    | 1 | do     | δ | c φ(q) | Rᵀ | r, that of δ_j c_j φ(q_j) | 1, 1, 2          | scale  |                 |
// | dv  | φ(k) |   | c φ(q) |   | do     | R  |                          | 2, 2, 1          | scale  |                 |
//
// One function, `walk_tiles`, computes out and dq. dk and dv share all they read, and R, so that one kernel makes both.
//
// What is rounded. With u the roundoff of T (2⁻¹¹ half, 2⁻⁸ bfloat16), a float x enters a product as two parts of T, x = hi + lo,
// hi = T(x), lo = T(x - hi), which leave at most u²·|x|; lo·lo, another u², is left out. What T holds exactly is one part.
//
// 1. φ(q) and φ(k), where φ is not the identity: two parts. In half no number is smaller than 2⁻²⁴: 2⁻²⁵ is left where that is more. No power
//    of two comes before, for it would be one for all keys of a chunk, since S adds them up, and the later would reach the earlier.
// 2. Scores, the state before a chunk, and c φ(q): two parts. Half ends at 2⁻²⁴ and 2¹⁶, so each row of scores, the block's state, and a
//    chunk of c φ(q), is first brought to a maximum in [2¹⁴, 2¹⁵) by a power of two: what is left is at most max(u²·|x|, 2⁻³⁹·max |x|), and
//    nothing overflows.
// 3. Sums are floats. A tensor core adds b ≥ 4 products at a time to a sum, and cuts each addend, and the result, off at the last place of
//    the largest: 2(b + 2)/b ≤ 3 roundings for each product, where a float sum has one. den adds up hi + lo.
// 4. Results of T, once, to T.
//
// So a score is off by 3u² (φ(q), φ(k), lo·lo), its weight by 4u², num and den by 4u² of the same sums of |v| and of 1, out by 8u² of the
// first over den; S by u² of its own sum. c is off by 4u², c φ(q) by 5u², δ by 8u², and each term of a gradient by at most 15u²:
// `testing/tensor_budget.py` adds it all up. A score or a state that is infinite becomes NaN.
#include "linear.cu"
#include <mma.h>

namespace wmma = nvcuda::wmma;

constexpr int CHUNK = 32;                                               // positions at a time

// Strides in shared memory. A tile of T is read 8 rows of 16 bytes at a time, for which rows of an odd number of 16 bytes lie in different
// banks; a tile of floats is written 4 rows of 32 bytes at a time.
template <int W> constexpr int ROW = up(W, 16) + 8;
constexpr int STAGE_ROW = 24, STAGE = 15 * STAGE_ROW + 16, SCORE_ROW = CHUNK + 8;
template <int V> constexpr int COLUMNS = up(V, 16) < 64 ? up(V, 16) : 64;      // of the state, in a block of (c)
template <int W> constexpr int QUADS = (CHUNK * up(W, 16) / 4 + THREADS - 1) / THREADS;       // four numbers each, of a chunk, for a thread

// Blocks on a multiprocessor that registers must allow
template <int D, int M> constexpr int RESIDENT = D <= 64 && M <= 64 ? 2 : 1;

template <typename T> using Rows = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major>;
template <typename T> using RowsTurned = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::col_major>;
template <typename T> using Columns = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major>;
template <typename T> using ColumnsTurned = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major>;
typedef wmma::fragment<wmma::accumulator, 16, 16, 16, float> Tile;

__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

template <typename T> constexpr bool SMALL_RANGE = false;
template <> constexpr bool SMALL_RANGE<__half> = true;

// --- numbers as parts of T, and powers of two that keep them in half's range -----------------------------------------------------------------

__device__ __forceinline__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
// The power of two, at most 2¹⁰⁰, that brings `top` to [2¹⁴, 2¹⁵), by its exponent alone; 1 where T has the range of a float
template <typename T> __device__ __forceinline__ float lift(float top) {
  return SMALL_RANGE<T> ? __int_as_float(min(268 - (__float_as_int(top) >> 23), 227) << 23) : 1.f;
}
// The same for all numbers of a block: each warp leaves the largest of its own, and after a barrier all threads read them. An infinite one
// does not count: it is lost anyway, and all others would be with it.
template <typename T, int R, int C> __device__ __forceinline__ void leave_top(float* tops, const float (&x)[R][C]) {
  if constexpr (SMALL_RANGE<T>) {
    float top = 0;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < C; ++c) top = fmaxf(top, fabsf(x[r][c]) < __int_as_float(255 << 23) ? fabsf(x[r][c]) : 0.f);
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  }
}
template <typename T> __device__ __forceinline__ float lift(const float* tops) {
  float top = 0;
  if constexpr (SMALL_RANGE<T>)
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w]);
  return lift<T>(top);
}

// Four numbers, times `by`, to `at`, and what that leaves of them to `at + more`
template <int PARTS, typename T> __device__ __forceinline__ void put_parts(T* at, int more, float by, const float (&x)[4]) {
  float lifted[4], rest[4];
#pragma unroll
  for (int b = 0; b < 4; ++b) lifted[b] = x[b] * by, rest[b] = lifted[b] - widen(narrow<T>(lifted[b]));
  put4<4>(at, 0, lifted);
  if constexpr (PARTS == 2) put4<4>(at + more, 0, rest);
}
template <int PARTS, typename T> __device__ __forceinline__ float whole(const T* at, int more) {
  return PARTS == 2 ? widen(at[0]) + widen(at[more]) : widen(at[0]);
}

// φ of four numbers of row i from c on; x stays as it is, zeros, in a row that is not real
template <int W, int FEATURE, typename T> __device__ __forceinline__ void four(const T* rows, int i, int c, bool real, float (&x)[4]) {
  if (!real) return;
  get4<W>(rows + (long long)i * W, c, x);
#pragma unroll
  for (int b = 0; b < 4; ++b) x[b] = c + b < W ? phi<FEATURE>(x[b]) : 0.f;
}

// c_i φ(q_i) if SCALED, with c_i = 1 / (den_i + ε) at `inv` in shared memory, where a row's is read once for all its numbers; else φ(q_i)
template <int W, int FEATURE, bool SCALED, typename T>
__device__ __forceinline__ void scaled(const T* rows, const float* inv, int i, int c, bool real, float (&x)[4]) {
  four<W, FEATURE>(rows, i, c, real, x);
  if (SCALED && real)
#pragma unroll
    for (int b = 0; b < 4; ++b) x[b] *= *inv;
}

// A chunk on its way to shared memory: a thread has four numbers of row r from c on in x[0], and so on; row(r, c, x) reads four
template <int W, class Row> __device__ __forceinline__ void fetch(float (&x)[QUADS<W>][4], Row row) {
  constexpr int WIDE = up(W, 16) / 4;
#pragma unroll
  for (int n = 0; n < QUADS<W>; ++n) {
    const int at = threadIdx.x + n * THREADS;
#pragma unroll
    for (int b = 0; b < 4; ++b) x[n][b] = 0;
    if (at < CHUNK * WIDE) row(at / WIDE, at % WIDE * 4, x[n]);
  }
}
template <int W, int PARTS, typename T> __device__ __forceinline__ void put_chunk(T* tile, float by, const float (&x)[QUADS<W>][4]) {
  constexpr int WIDE = up(W, 16) / 4;
#pragma unroll
  for (int n = 0; n < QUADS<W>; ++n) {
    const int at = threadIdx.x + n * THREADS;
    if (at < CHUNK * WIDE) put_parts<PARTS>(tile + at / WIDE * ROW<W> + at % WIDE * 4, CHUNK * ROW<W>, by, x[n]);
  }
}

// --- tiles ------------------------------------------------------------------------------------------------------------------------------

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

// sum += A B, the small products first; the second part of A and of B lies `more_a` and `more_b` behind the first
template <class A, class B, int PARTS_A, int PARTS_B, typename T>
__device__ __forceinline__ void add_product(Tile& sum, const T* a, int lda, int more_a, const T* b, int ldb, int more_b) {
  A x;
  B y;
  wmma::load_matrix_sync(y, b, ldb);
  if constexpr (PARTS_A == 2) {
    wmma::load_matrix_sync(x, a + more_a, lda);
    wmma::mma_sync(sum, x, y, sum);
  }
  wmma::load_matrix_sync(x, a, lda);
  if constexpr (PARTS_B == 2) {
    B rest;
    wmma::load_matrix_sync(rest, b + more_b, ldb);
    wmma::mma_sync(sum, x, rest, sum);
  }
  wmma::mma_sync(sum, x, y, sum);
}

// S += by · Yᵀ Z over a chunk. S has WT × VT tiles; a warp has every eighth.
template <int WT, int VT, int LDY, int LDZ, int PY, int PZ, typename T, int EACH>
__device__ __forceinline__ void add_outer_tiles(const T* Y, const T* Z, Tile (&S)[EACH], float by) {
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int nth = threadIdx.x / 32 + n * WARPS;
    if (nth >= WT * VT) continue;
    Tile sum;
    wmma::fill_fragment(sum, 0.f);
#pragma unroll 1
    for (int j = 0; j < CHUNK; j += 16)
      add_product<RowsTurned<T>, Columns<T>, PY, PZ>(sum, Y + j * LDY + nth / VT * 16, LDY, CHUNK * LDY, Z + j * LDZ + nth % VT * 16, LDZ,
                                                     CHUNK * LDZ);
#pragma unroll
    for (int e = 0; e < sum.num_elements; ++e) S[n].x[e] += by * sum.x[e];
  }
}

// A state of WT × VT tiles, of which a warp has every eighth: read by read(a, c, four); the largest number of it; and by·S as two parts of T,
// rows `from` to `from` + ROWS of it
template <int WT, int VT, int EACH, class Read> __device__ __forceinline__ void read_tiles(float* stage, Tile (&S)[EACH], Read read) {
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    wmma::fill_fragment(S[n], 0.f);
    const int nth = threadIdx.x / 32 + n * WARPS;
    if (nth >= WT * VT) continue;
    float part[2][4] = {};
#pragma unroll
    for (int u = 0; u < 2; ++u) read(nth / VT * 16 + lane_row() + 8 * u, nth % VT * 16 + lane_column(), part[u]);
    give(stage, S[n], part);
  }
}
template <typename T, int EACH> __device__ __forceinline__ void leave_state_top(float* tops, const Tile (&S)[EACH]) {
  float all[EACH][8];
#pragma unroll
  for (int n = 0; n < EACH; ++n)
#pragma unroll
    for (int b = 0; b < 8; ++b) all[n][b] = S[n].x[b];
  leave_top<T>(tops, all);
}
template <int WT, int VT, int LD, int ROWS, typename T, int EACH>
__device__ __forceinline__ void split_tiles(T* parts, float* stage, float by, const Tile (&S)[EACH], int from = 0) {
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int nth = threadIdx.x / 32 + n * WARPS, a = nth / VT * 16 - from;
    if (nth >= WT * VT || a < 0 || a >= ROWS) continue;
    float part[2][4];
    take(stage, S[n], part);
#pragma unroll
    for (int u = 0; u < 2; ++u) put_parts<2>(parts + (a + lane_row() + 8 * u) * LD + nth % VT * 16 + lane_column(), ROWS * LD, by, part[u]);
  }
}

// The nth tile of scores = X Yᵀ: (0, 0), (1, 0) or (0, 1), (1, 1); the fourth is hidden
template <int W, int PX, int PY, bool REVERSE, typename T>
__device__ __forceinline__ void score_tile(float* scores, const T* xs, const T* ys, int nth) {
  constexpr int LD = ROW<W>;
  const int one = (nth + 1) / 2 * 16, other = nth / 2 * 16, a = REVERSE ? other : one, b = REVERSE ? one : other;
  Tile tile;
  wmma::fill_fragment(tile, 0.f);
#pragma unroll 1
  for (int w = 0; w < up(W, 16); w += 16)
    add_product<Rows<T>, ColumnsTurned<T>, PX, PY>(tile, xs + a * LD + w, LD, CHUNK * LD, ys + b * LD + w, LD, CHUNK * LD);
  wmma::store_matrix_sync(scores + a * SCORE_ROW + b, tile, SCORE_ROW, wmma::mem_row_major);
}

// Row i of the weights: two parts of the scores, of which each lane has one, times a power of two, which is returned; score takes what they hold
template <typename T> __device__ __forceinline__ float weigh(T* weights, int i, float& score) {
  const float up = lift<T>(SMALL_RANGE<T> ? warp_max(fabsf(score)) : 0.f), lifted = score * up;
  const T hi = narrow<T>(lifted), lo = narrow<T>(lifted - widen(hi));
  T* at = weights + i * ROW<CHUNK> + threadIdx.x % 32;
  at[0] = hi, at[CHUNK * ROW<CHUNK>] = lo;
  score = (widen(hi) + widen(lo)) / up;
  return up;
}

// The tiles of a chunk's results, V columns of them, a warp every eighth: near = weights Z; o += by(row) · tile
template <int V, int PZ, bool REVERSE, typename T, int EACH>
__device__ __forceinline__ void near_tiles(Tile (&near)[EACH], const T* weights, const T* zs) {
  constexpr int VT = up(V, 16) / 16, LDP = ROW<CHUNK>, LDZ = ROW<V>;
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int nth = threadIdx.x / 32 + n * WARPS, r = nth / VT * 16, c = nth % VT * 16;
    wmma::fill_fragment(near[n], 0.f);
    if (r >= CHUNK) continue;
#pragma unroll 1
    for (int j = REVERSE ? r : 0; j <= (REVERSE ? CHUNK - 16 : r); j += 16)
      add_product<Rows<T>, Columns<T>, 2, PZ>(near[n], weights + r * LDP + j, LDP, CHUNK * LDP, zs + j * LDZ + c, LDZ, CHUNK * LDZ);
  }
}
template <int VT, int EACH, class By>
__device__ __forceinline__ void add_tiles(float (&o)[EACH][2][4], float* stage, const Tile (&tiles)[EACH], By by) {
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int r = (threadIdx.x / 32 + n * WARPS) / VT * 16;
    if (r >= CHUNK) continue;
    float part[2][4];
    take(stage, tiles[n], part);
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int b = 0; b < 4; ++b) o[n][u][b] += part[u][b] * by(r + lane_row() + 8 * u);
  }
}

// --- (a) the groups' own states ------------------------------------------------------------------------------------------------------

// As group_states of linear.cu: of φ(k_j) [v_j | 1]ᵀ, or, if TRANSPOSE, of scale·φ(q_j) G_jᵀ as scale·(c_j φ(q_j)) [do_j | δ_j]ᵀ; `delta` holds δ
template <typename T, int D, int M, int FEATURE, bool NORM, bool TRANSPOSE>
__global__ void __launch_bounds__(THREADS, RESIDENT<D, M>)
group_states_tc(const T* __restrict__ y, const T* __restrict__ z, const float* __restrict__ inv, const float* __restrict__ delta,
                float* __restrict__ states, const int* __restrict__ lengths, int N, int groups, int rows, float scale) {
  extern __shared__ __align__(32) unsigned char bytes[];
  constexpr bool SCALED = NORM && TRANSPOSE;
  constexpr int C = CHUNK, LD = ROW<D>, DT = up(D, 16) / 16, MT = up(M, 16) / 16, EACH = (DT * MT + WARPS - 1) / WARPS;
  constexpr int PY = FEATURE || SCALED ? 2 : 1;
  T *ys = reinterpret_cast<T*>(bytes), *zs = ys + PY * C * LD;
  float *e = reinterpret_cast<float*>(zs + C * ROW<M>), *invs = e + C, *tops = invs + C;
  const int t = threadIdx.x, warp = t / 32;
  float* stage = reinterpret_cast<float*>(bytes) + warp * STAGE;                  // over all of these, when they are done with
  const Group g(groups, rows, N);
  const int last = min(g.last, real_rows(lengths, g.head, N));
  const T *yh = y + g.head * N * D, *zh = z + g.head * N * M;
  const auto read_inv = [&](int start) {
    if (SCALED && t < C) invs[t] = start + t < last ? inv[g.head * N + start + t] : 0.f;
  };
  const float* delta_h = delta + g.head * N;
  float* state = states + (g.head * groups + g.nth) * STATE_SIZE<D, M>;
  Tile S[EACH];
#pragma unroll
  for (int n = 0; n < EACH; ++n) wmma::fill_fragment(S[n], 0.f);
  float sum = 0;
  read_inv(g.first);
  if (SCALED) __syncthreads();
  for (int start = g.first; start < last; start += C) {
    float from_y[QUADS<D>][4], from_z[QUADS<M>][4];
    fetch<D>(from_y, [&](int r, int c, float (&x)[4]) { scaled<D, FEATURE, SCALED>(yh, invs + r, start + r, c, start + r < last, x); });
    fetch<M>(from_z, [&](int r, int c, float (&x)[4]) { four<M, 0>(zh, start + r, c, start + r < last, x); });
    if constexpr (SCALED) leave_top<T>(tops, from_y);
    __syncthreads();
    const float by = SCALED ? lift<T>(tops) : 1.f, back = (TRANSPOSE ? scale : 1.f) / by;
    put_chunk<D, PY>(ys, by, from_y), put_chunk<M, 1>(zs, 1.f, from_z);
    if (SCALED && t < C) e[t] = start + t < last ? delta_h[start + t] : 0.f;
    read_inv(start + C);                                                // for the next chunk, while its place is free
    __syncthreads();
    add_outer_tiles<DT, MT, LD, ROW<M>, PY, 1>(ys, zs, S, back);
    if (NORM && t < D) {
      float more = 0;
      for (int j = 0; j < C; ++j) more += whole<PY>(ys + j * LD + t, C * LD) * (SCALED ? e[j] : 1.f);
      sum += back * more;
    }
  }
  __syncthreads();
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

// Row a of Sᵀ from c on; S has D rows of M numbers
template <int D, int M> __device__ __forceinline__ void four_turned(const float* S, int a, int c, float (&x)[4]) {
#pragma unroll
  for (int b = 0; b < 4; ++b) x[b] = a < M && c + b < D ? S[(c + b) * M + a] : 0.f;
}

// --- (c) outputs ----------------------------------------------------------------------------------------------------------------------

// `walk` of linear.cu with all products on tensor cores, j ≤ i and one set of y, z; x, y and z take PX, PY, PZ parts. The functions:
// x(i, c, four), y(j, c, four), z(j, c, four) read four numbers of a row; e(start, xs, es), which fills es from the tile xs of x; f(j); d(i), which
// is handed on; S(a, c, four), s(c) and n(a) read the state before the group; store(i, c, o, d, e) takes four columns, d being den_i if NORM.
//
// S stays in the warps' Tiles; its parts lie in shared memory. Between barriers, for each chunk:
//
//     x  |  y, z  |  scores = X Yᵀ;  past = X S;  S += Yᵀ Z;  sums  |  weights, den  |  near = weights Z;  s, n  |  o;  parts of S
template <typename T, int W, int V, int PX, int PY, int PZ, bool EXTRA, bool NORM, class X, class E, class Y, class Z, class F, class D, class S,
          class SE, class SN, class Store>
__device__ __forceinline__ void walk_tiles(unsigned char* bytes, int first, int last, X x, E e, Y y, Z z, F f, D d, S S0, SE s0, SN n0,
                                           Store store) {
  constexpr int C = CHUNK, WP = up(W, 16), WT = WP / 16, VT = V / 16, EACH = (WT * VT + WARPS - 1) / WARPS, LD = ROW<W>, LDZ = ROW<V>;
  constexpr int Y_SIZE = larger(PY * C * LD, 2 * C * ROW<C>), YZ_SIZE = larger(Y_SIZE + PZ * C * LDZ, 2 * WARPS * STAGE);
  static_assert(C == 32 && C / 16 * VT <= WARPS && V == VT * 16, "a lane has one score of a row, a warp one tile of o");
  T *xs = reinterpret_cast<T*>(bytes), *ys = xs + PX * C * LD, *zs = ys + Y_SIZE, *parts = ys + YZ_SIZE;
  T* weights = ys;                                                      // over y, when the scores are there
  float* scores = reinterpret_cast<float*>(parts + 2 * WP * LDZ);
  float *s = scores + C * SCORE_ROW, *n = s + V, *es = n + WP, *fs = es + C, *ds = fs + C, *lowered = ds + C, *tops = lowered + C;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, row = lane_row(), quad = lane_column(), r = warp / VT * 16, c = warp % VT * 16;
  float* stage = reinterpret_cast<float*>(ys) + warp * STAGE;           // over y, z and weights, between near and the next y
  Tile state[EACH];
  read_tiles<WT, VT>(stage, state, S0);
  if (EXTRA && t < V) s[t] = s0(t);
  if (NORM && t < W) n[t] = n0(t);
  leave_state_top<T>(tops, state);
  __syncthreads();
  float raised = lift<T>(tops);                                         // the power of two in the state's parts
  split_tiles<WT, VT, LDZ, WP>(parts, stage, raised, state);

  for (int start = first; start < last; start += C) {
    float o[1][2][4] = {}, from_x[QUADS<W>][4], from_y[QUADS<W>][4], from_z[QUADS<V>][4];
    fetch<W>(from_x, [&](int a, int b, float (&to)[4]) { x(start + a, b, to); });
    put_chunk<W, PX>(xs, 1.f, from_x);
    fetch<W>(from_y, [&](int a, int b, float (&to)[4]) { y(start + a, b, to); });
    fetch<V>(from_z, [&](int a, int b, float (&to)[4]) { z(start + a, b, to); });
    const float my_f = EXTRA && t < C ? f(start + t) : 0.f, my_d = EXTRA && t < C ? d(start + t) : 0.f;
    __syncthreads();
    put_chunk<W, PY>(ys, 1.f, from_y), put_chunk<V, PZ>(zs, 1.f, from_z);
    if (EXTRA && t < C) fs[t] = my_f, ds[t] = my_d;
    __syncthreads();
    if (EXTRA) e(start, xs, es);
    if (warp < 3) score_tile<W, PX, PY, false>(scores, xs, ys, warp);
    Tile near[1], past[1];
    wmma::fill_fragment(past[0], 0.f);
    if (r < C) {
#pragma unroll 1
      for (int w = 0; w < WP; w += 16)
        add_product<Rows<T>, Columns<T>, PX, 2>(past[0], xs + r * LD + w, LD, C * LD, parts + w * LDZ + c, LDZ, WP * LDZ);
    }
    add_outer_tiles<WT, VT, LD, LDZ, PY, PZ>(ys, zs, state, 1.f);
    leave_state_top<T>(tops, state);
    float more_s = 0, more_n = 0;
    if (EXTRA && t < V)
      for (int j = 0; j < C; ++j) more_s += fs[j] * whole<PZ>(zs + j * LDZ + t, C * LDZ);
    if (NORM && t < W)
      for (int j = 0; j < C; ++j) more_n += whole<PY>(ys + j * LD + t, C * LD);
    __syncthreads();
    if (EXTRA && r < C)
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int b = 0; b < 4; ++b) o[0][u][b] = es[r + row + 8 * u] * s[c + quad + b];
    for (int i = warp; i < C; i += WARPS) {
      float score = 0;                                                  // not times 0: a hidden score may be infinite
      if (lane <= i) score = EXTRA ? scores[i * SCORE_ROW + lane] + es[i] * fs[lane] : scores[i * SCORE_ROW + lane];
      const float up = weigh<T>(weights, i, score);
      if constexpr (NORM) {
        for (int a = lane; a < W; a += 32) score += whole<PX>(xs + i * LD + a, C * LD) * n[a];
        score = warp_sum(score);
        if (lane == 0) ds[i] = score;
      }
      if (lane == 0) lowered[i] = 1 / up;
    }
    __syncthreads();
    near_tiles<V, PZ, false>(near, weights, zs);
    if (EXTRA && t < V) s[t] += more_s;
    if (NORM && t < W) n[t] += more_n;
    __syncthreads();
    add_tiles<VT>(o, stage, near, [&](int i) { return lowered[i]; });
    add_tiles<VT>(o, stage, past, [&](int) { return 1 / raised; });
    if (r < C)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int i = r + row + 8 * u;
        store(start + i, c + quad, o[0][u], NORM || EXTRA ? ds[i] : 0.f, EXTRA ? es[i] : 0.f);
      }
    raised = lift<T>(tops);
    split_tiles<WT, VT, LDZ, WP>(parts, stage, raised, state);
  }
}

// out = Sᵀφ(q) / (zᵀφ(q) + ε). `inv` takes 1 / (den + ε) of each row, which the backward needs.
template <typename T, int D, int M, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, RESIDENT<D, M>)
group_outputs_tc(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const float* __restrict__ states,
                 T* __restrict__ out, float* __restrict__ inv, const int* __restrict__ query_lengths, const int* __restrict__ key_lengths, int N,
                 int groups, int rows, int shared, float scale, float eps) {
  extern __shared__ __align__(32) unsigned char bytes[];
  constexpr int V = COLUMNS<M>, PARTS = FEATURE ? 2 : 1;
  const Group g(groups, rows, N);
  const long long kv = g.head / shared;
  const int column = blockIdx.y * V, real_q = real_rows(query_lengths, g.head, N), real_k = real_rows(key_lengths, kv, N);
  const float* state = states + (kv * groups + g.nth) * STATE_SIZE<D, M>;
  const T *qh = q + g.head * N * D, *kh = k + kv * N * D, *vh = v + kv * N * M;
  walk_tiles<T, D, V, PARTS, PARTS, 1, false, NORM>(
      bytes, g.first, g.last,
      [&](int i, int c, float (&x)[4]) { four<D, FEATURE>(qh, i, c, i < real_q, x); },
      [](int, const T*, float*) {},
      [&](int j, int c, float (&x)[4]) { four<D, FEATURE>(kh, j, c, j < real_k, x); },
      [&](int j, int c, float (&x)[4]) { four<M, 0>(vh, j, column + c, j < real_k, x); },
      [](int) { return 0.f; },
      [](int) { return 0.f; },
      [&](int a, int c, float (&x)[4]) {
        if (a < D) get4<M>(state + a * M, column + c, x);
      },
      [](int) { return 0.f; },
      [&](int a) { return state[D * M + a]; },
      [&](int i, int c, float (&o)[4], float den, float) {
        if (i >= g.last) return;
        const float by = i >= real_q ? 0.f : NORM ? inverse(scale * den + eps) : 1.f;
#pragma unroll
        for (int b = 0; b < 4; ++b) o[b] = i < real_q ? scale * o[b] * by : 0.f;
        if (NORM && column + c == 0) inv[g.head * N + i] = by;
        put4<M>(out + (g.head * N + i) * M, column + c, o);
      });
}

// dq_i = φ'(q_i) ⊙ scale·c_i (S do_i + δ_i z + Σ_{j≤i} (do_i·v_j + δ_i) φ(k_j)), and δ, which dk and dv need
template <typename T, int D, int M, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, RESIDENT<D, M>)
group_dq_tc(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout, const T* __restrict__ out,
            const float* __restrict__ states, const float* __restrict__ inv, float* __restrict__ delta, T* __restrict__ dq,
            const int* __restrict__ query_lengths, const int* __restrict__ key_lengths, int N, int groups, int rows, int shared, float scale) {
  extern __shared__ __align__(32) unsigned char bytes[];
  constexpr int V = COLUMNS<D>;
  const Group g(groups, rows, N);
  const long long kv = g.head / shared;
  const int column = blockIdx.y * V, real_q = real_rows(query_lengths, g.head, N), real_k = real_rows(key_lengths, kv, N);
  const float* state = states + (kv * groups + g.nth) * STATE_SIZE<D, M>;
  const T *qh = q + g.head * N * D, *kh = k + kv * N * D, *vh = v + kv * N * M, *doh = dout + g.head * N * M, *outh = out + g.head * N * M;
  walk_tiles<T, M, V, 1, 1, FEATURE ? 2 : 1, NORM, false>(
      bytes, g.first, g.last,
      [&](int i, int c, float (&x)[4]) { four<M, 0>(doh, i, c, i < real_q, x); },
      [&](int start, const T* xs, float* es) {                          // δ of each row, by a warp: x holds do
        for (int r = threadIdx.x / 32; r < CHUNK; r += WARPS) {
          float sum = 0;
          if (start + r < real_q)
            for (int a = threadIdx.x % 32; a < M; a += 32) sum -= widen(xs[r * ROW<M> + a]) * widen(outh[(long long)(start + r) * M + a]);
          sum = warp_sum(sum);
          if (threadIdx.x % 32 == 0) es[r] = sum;
        }
      },
      [&](int j, int c, float (&x)[4]) { four<M, 0>(vh, j, c, j < real_k, x); },
      [&](int j, int c, float (&x)[4]) { four<D, FEATURE>(kh, j, column + c, j < real_k, x); },
      [&](int j) { return j < real_k ? 1.f : 0.f; },
      [&](int i) { return i < real_q ? inv[g.head * N + i] : 0.f; },
      [&](int a, int c, float (&x)[4]) { four_turned<D, M>(state, a, column + c, x); },
      [&](int c) { return column + c < D ? state[D * M + column + c] : 0.f; },
      [](int) { return 0.f; },
      [&](int i, int c, float (&o)[4], float by, float sum) {
        if (i >= g.last) return;
        if (NORM && column + c == 0) delta[g.head * N + i] = sum;
        put_slope<D, FEATURE>(dq + (g.head * N + i) * D, qh + (long long)i * D, column + c, i < real_q, NORM ? scale * by : scale, o);
      });
}

// dk_i = φ'(k_i) ⊙ (R v_i + r + scale·Σ_{j≥i} (v_i·do_j + δ_j) c_j φ(q_j))  and  dv_i = Rᵀ φ(k_i) + scale·Σ_{j≥i} (φ(k_i)·c_j φ(q_j)) do_j,
// over the query heads that share the key. Between barriers, for each chunk, from the last:
//
//     φ(k), v;  parts of R, up to 64 rows at a time  |  past: V Rᵀ, φ(K) R  |  (for each query head:)  c φ(q), do  |
//     scores: V doᵀ, φ(K) (c φ(Q))ᵀ;  R += (c φ(Q))ᵀ do;  sums  |  weights;  r  |  near: weights c φ(Q), weights do  |  dk, dv
template <typename T, int D, int M, int FEATURE, bool NORM>
__global__ void __launch_bounds__(THREADS, RESIDENT<D, M>)
group_dk_dv_tc(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout,
               const float* __restrict__ states, const float* __restrict__ inv, const float* __restrict__ delta, T* __restrict__ dk,
               T* __restrict__ dv, const int* __restrict__ query_lengths, const int* __restrict__ key_lengths, int N, int groups, int rows,
               int shared, float scale) {
  extern __shared__ __align__(32) unsigned char bytes[];
  constexpr int C = CHUNK, DP = up(D, 16), DT = DP / 16, MT = up(M, 16) / 16, LDK = ROW<D>, LDV = ROW<M>, SLICE = COLUMNS<D>, LDP = ROW<C>;
  constexpr int PK = FEATURE ? 2 : 1, PQ = FEATURE || NORM ? 2 : 1, EACH = (DT * MT + WARPS - 1) / WARPS;
  constexpr int EACH_K = (C / 16 * DT + WARPS - 1) / WARPS, EACH_V = (C / 16 * MT + WARPS - 1) / WARPS;
  constexpr int QG_SIZE = larger(PQ * C * LDK + C * LDV, 2 * WARPS * STAGE), PARTS_SIZE = larger(2 * SLICE * LDV, 4 * C * (SCORE_ROW + LDP));
  T *ks = reinterpret_cast<T*>(bytes), *vs = ks + PK * C * LDK, *qs = vs + C * LDV, *gs = qs + PQ * C * LDK, *parts = qs + QG_SIZE;
  float* scores = reinterpret_cast<float*>(parts);                      // over the parts of R, after past: those of dk, then those of dv
  T *weights_k = parts + 4 * C * SCORE_ROW, *weights_v = weights_k + 2 * C * LDP;
  float *r = reinterpret_cast<float*>(parts + PARTS_SIZE), *fs = r + DP, *invs = fs + C, *lowered = invs + C, *tops = lowered + 2 * C;
  float* tops_q = tops + WARPS;
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, row = lane_row(), quad = lane_column();
  float* stage = reinterpret_cast<float*>(qs) + warp * STAGE;           // over c φ(q) and do, between near and the next ones
  const Group g(groups, rows, N);
  const long long head = g.head * shared;
  const int real_k = real_rows(key_lengths, g.head, N);
  const float* state = states + (head * groups + g.nth) * STATE_SIZE<D, M>;
  const T *kh = k + g.head * N * D, *vh = v + g.head * N * M;
  const auto real_q = [&](int h) { return real_rows(query_lengths, head + h, N); };
  const auto read_inv = [&](int h, int start) {
    if (NORM && t < C && start >= g.first) invs[t] = start + t < real_q(h) ? inv[(head + h) * N + start + t] : 0.f;
  };
  Tile R[EACH];
  read_tiles<DT, MT>(stage, R, [&](int a, int c, float (&x)[4]) {
    if (a < D) get4<M>(state + a * M, c, x);
  });
  if (NORM && t < DP) r[t] = t < D ? state[D * M + t] : 0.f;
  leave_state_top<T>(tops, R);
  int start = g.first + (g.last - g.first - 1) / C * C;
  read_inv(0, start);
  for (; start >= g.first; start -= C) {
    __syncthreads();
    float at[EACH_K][2][4] = {}, o_k[EACH_K][2][4] = {}, o_v[EACH_V][2][4] = {}, from_v[QUADS<M>][4];
#pragma unroll
    for (int n = 0; n < EACH_K; ++n) {                                  // each lane k where it will write dk, for φ'(k)
      const int nth = warp + n * WARPS, c = nth % DT * 16 + quad;
      if (nth >= C / 16 * DT) continue;
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int i = nth / DT * 16 + row + 8 * u;
        float mapped[4];
        four<D, 0>(kh, start + i, c, start + i < real_k, at[n][u]);
#pragma unroll
        for (int b = 0; b < 4; ++b) mapped[b] = start + i < real_k && c + b < D ? phi<FEATURE>(at[n][u][b]) : 0.f;
        put_parts<PK>(ks + i * LDK + c, C * LDK, 1.f, mapped);
      }
    }
    fetch<M>(from_v, [&](int j, int c, float (&x)[4]) { four<M, 0>(vh, start + j, c, start + j < real_k, x); });
    put_chunk<M, 1>(vs, 1.f, from_v);
    const float raised = lift<T>(tops);                                 // the power of two in the parts of R
    Tile past_k[EACH_K], past_v[EACH_V];
#pragma unroll
    for (int n = 0; n < EACH_V; ++n) wmma::fill_fragment(past_v[n], 0.f);
#pragma unroll
    for (int n = 0; n < EACH_K; ++n) wmma::fill_fragment(past_k[n], 0.f);
    for (int d = 0; d < DP; d += SLICE) {
      if (d > 0) __syncthreads();
      split_tiles<DT, MT, LDV, SLICE>(parts, stage, raised, R, d);
      __syncthreads();
#pragma unroll
      for (int n = 0; n < EACH_K; ++n) {
        const int nth = warp + n * WARPS, i = nth / DT * 16, c = nth % DT * 16 - d;
        if (nth >= C / 16 * DT || c < 0 || c >= SLICE) continue;
#pragma unroll 1
        for (int m = 0; m < up(M, 16); m += 16)
          add_product<Rows<T>, ColumnsTurned<T>, 1, 2>(past_k[n], vs + i * LDV + m, LDV, C * LDV, parts + c * LDV + m, LDV, SLICE * LDV);
      }
#pragma unroll
      for (int n = 0; n < EACH_V; ++n) {
        const int nth = warp + n * WARPS, i = nth / MT * 16, c = nth % MT * 16;
        if (nth >= C / 16 * MT) continue;
#pragma unroll 1
        for (int w = 0; w < min(SLICE, DP - d); w += 16)
          add_product<Rows<T>, Columns<T>, PK, 2>(past_v[n], ks + i * LDK + d + w, LDK, C * LDK, parts + w * LDV + c, LDV, SLICE * LDV);
      }
    }
    if (NORM)
#pragma unroll
      for (int n = 0; n < EACH_K; ++n)
#pragma unroll
        for (int b = 0; b < 4; ++b) o_k[n][0][b] = o_k[n][1][b] = r[(warp + n * WARPS) % DT * 16 + quad + b];
    add_tiles<DT>(o_k, stage, past_k, [&](int) { return 1 / raised; });
    add_tiles<MT>(o_v, stage, past_v, [&](int) { return 1 / raised; });
    for (int h = 0; h < shared; ++h) {
      const int real = real_q(h);
      float from_q[QUADS<D>][4], from_g[QUADS<M>][4];
      fetch<D>(from_q, [&](int j, int c, float (&x)[4]) {
        scaled<D, FEATURE, NORM>(q + (head + h) * N * D, invs + j, start + j, c, start + j < real, x);
      });
      fetch<M>(from_g, [&](int j, int c, float (&x)[4]) { four<M, 0>(dout + (head + h) * N * M, start + j, c, start + j < real, x); });
      if constexpr (PQ == 2) leave_top<T>(tops_q, from_q);
      __syncthreads();
      const float by = PQ == 2 ? lift<T>(tops_q) : 1.f, back = scale / by;
      put_chunk<D, PQ>(qs, by, from_q), put_chunk<M, 1>(gs, 1.f, from_g);
      if (NORM && t < C) fs[t] = start + t < real ? delta[(head + h) * N + start + t] : 0.f;
      __syncthreads();
      if (h + 1 < shared) read_inv(h + 1, start);                       // for the next queries, while its place is free
      else read_inv(0, start - C);
      if (warp < 3) score_tile<M, 1, 1, true>(scores, vs, gs, warp);
      else if (warp < 6) score_tile<D, PK, PQ, true>(scores + C * SCORE_ROW, ks, qs, warp - 3);
      add_outer_tiles<DT, MT, LDK, LDV, PQ, 1>(qs, gs, R, back);
      leave_state_top<T>(tops, R);
      float more = 0;
      if (NORM && t < D)
        for (int j = 0; j < C; ++j) more += fs[j] * whole<PQ>(qs + j * LDK + t, C * LDK);
      __syncthreads();
      for (int n = warp; n < 2 * C; n += WARPS) {                       // row i of the scores of dk, then of dv
        const int i = n % C;
        float score = 0;
        if (lane >= i) score = NORM && n < C ? scores[n * SCORE_ROW + lane] + fs[lane] : scores[n * SCORE_ROW + lane];
        const float up = weigh<T>(n < C ? weights_k : weights_v, i, score);
        if (lane == 0) lowered[n] = back / up;
      }
      if (NORM && t < D) r[t] += back * more;
      __syncthreads();
      Tile near_k[EACH_K], near_v[EACH_V];
      near_tiles<M, 1, true>(near_v, weights_v, gs), near_tiles<D, PQ, true>(near_k, weights_k, qs);
      __syncthreads();
      add_tiles<DT>(o_k, stage, near_k, [&](int i) { return lowered[i]; });
      add_tiles<MT>(o_v, stage, near_v, [&](int i) { return lowered[C + i]; });
    }
#pragma unroll
    for (int n = 0; n < EACH_K; ++n)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int nth = warp + n * WARPS, i = start + nth / DT * 16 + row + 8 * u;
        if (nth >= C / 16 * DT || i >= g.last) continue;
#pragma unroll
        for (int b = 0; b < 4; ++b) o_k[n][u][b] = i < real_k ? o_k[n][u][b] * phi_slope<FEATURE>(at[n][u][b]) : 0.f;
        put4<D>(dk + (g.head * N + i) * D, nth % DT * 16 + quad, o_k[n][u]);
      }
#pragma unroll
    for (int n = 0; n < EACH_V; ++n)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int nth = warp + n * WARPS, i = start + nth / MT * 16 + row + 8 * u;
        if (nth >= C / 16 * MT || i >= g.last) continue;
#pragma unroll
        for (int b = 0; b < 4; ++b) o_v[n][u][b] = i < real_k ? o_v[n][u][b] : 0.f;
        put4<M>(dv + (g.head * N + i) * M, nth % MT * 16 + quad, o_v[n][u]);
      }
  }
}
