// Tiles of rows in shared memory and the products of them that the kernels are made of.
//
// A block has THREADS threads and holds C positions at a time. Sums are kept in Sum<T>: float, or double for double.
// Every product reads 16 bytes at a time; the strides below let each such read of a warp pass all banks at once.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int THREADS = 256, WARPS = THREADS / 32;

template <typename T> struct Sums { typedef float type; };
template <> struct Sums<double> { typedef double type; };
template <typename T> using Sum = typename Sums<T>::type;
// Blocks on a multiprocessor that registers must allow: 128 registers a thread do for float, not for double
template <typename T> constexpr int BLOCKS = sizeof(Sum<T>) == 8 ? 1 : 2;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T narrow(Sum<T> x) { return x; }
template <> __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__host__ __device__ constexpr int up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Strides: 8 rows of a tile, read 16 bytes each, lie in 8 different groups of banks; so do the scores that a warp writes, and the rows of
// the state, 4 apart, that a transposed read fills
template <int W> constexpr int STRIDE = up(W, 32) + 4;
template <int V> constexpr int WIDE = V < 32 ? V + 4 : V;
template <int V> constexpr int STATE = V + 4;
template <int C> constexpr int SCORES = C + C / 2;
template <int D, int M> constexpr int STATE_SIZE = up(D * M + D, 4);

template <typename A> __device__ __forceinline__ void read4(const A* p, A (&x)[4]);
template <> __device__ __forceinline__ void read4<float>(const float* p, float (&x)[4]) {
  const float4 t = *reinterpret_cast<const float4*>(p);
  x[0] = t.x, x[1] = t.y, x[2] = t.z, x[3] = t.w;
}
template <> __device__ __forceinline__ void read4<double>(const double* p, double (&x)[4]) {
  const double2 a = *reinterpret_cast<const double2*>(p), b = *reinterpret_cast<const double2*>(p + 2);
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}
template <typename A> __device__ __forceinline__ void write4(A* p, const A (&x)[4]);
template <> __device__ __forceinline__ void write4<float>(float* p, const float (&x)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}
template <> __device__ __forceinline__ void write4<double>(double* p, const double (&x)[4]) {
  *reinterpret_cast<double2*>(p) = make_double2(x[0], x[1]);
  *reinterpret_cast<double2*>(p + 2) = make_double2(x[2], x[3]);
}
// Four results side by side, in one access where the row length W allows it for every row; else one by one, up to the end of the row
template <int W, typename T, typename A> __device__ __forceinline__ void put4(T* row, int c, const A (&x)[4]) {
  if constexpr (W % 4 == 0) {
    if (c >= W) return;
    if constexpr (sizeof(T) == 2) {
      __align__(8) const T y[4] = {narrow<T>(x[0]), narrow<T>(x[1]), narrow<T>(x[2]), narrow<T>(x[3])};
      *reinterpret_cast<uint2*>(row + c) = *reinterpret_cast<const uint2*>(y);
    } else {
      write4(row + c, x);
    }
  } else {
#pragma unroll
    for (int b = 0; b < 4; ++b)
      if (c + b < W) row[c + b] = narrow<T>(x[b]);
  }
}

// Four numbers side by side, read as they are written; 0 beyond the end of the row
template <int W, typename T, typename A> __device__ __forceinline__ void get4(const T* row, int c, A (&x)[4]) {
  if constexpr (W % 4 == 0) {
    __align__(16) T y[4] = {};
    if (c < W) {
      if constexpr (sizeof(T) == 2) *reinterpret_cast<uint2*>(y) = *reinterpret_cast<const uint2*>(row + c);
      else read4(row + c, y);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) x[b] = widen(y[b]);
  } else {
#pragma unroll
    for (int b = 0; b < 4; ++b) x[b] = c + b < W ? A(widen(row[c + b])) : A(0);
  }
}

// tile[r][c] = value(r, c) for C rows of W columns, neighbouring threads on neighbouring columns
template <int C, int W, int LD, typename A, class Value> __device__ __forceinline__ void fill(A* tile, Value value) {
  for (int i = threadIdx.x; i < C * W; i += THREADS) tile[i / W * LD + i % W] = value(i / W, i % W);
}

// tile[r][c] = rows[r][column + c] for R rows of W numbers; 0 beyond the row's end, and up to a multiple of 4 rows
template <int R, int W, int V, int LD, typename A> __device__ __forceinline__ void fill_columns(A* tile, const A* rows, int column) {
  fill<up(R, 4), V, LD>(tile, [&](int r, int c) { return r < R && column + c < W ? rows[r * W + column + c] : A(0); });
}

// tile[a][c] = rows[column + c][a] for `rows` of W numbers, V of them; 0 beyond. Two threads read a sector of 32 bytes of a row, and each
// turns 4 × 4 numbers over.
template <int W, int V, int VT, int LD, typename A> __device__ __forceinline__ void fill_transposed(A* tile, const A* rows, int column) {
  if constexpr (W % 8 == 0) {
    for (int t = threadIdx.x; t < W / 4 * (VT / 4); t += THREADS) {
      const int c = t / 2 % (VT / 4) * 4, a = (t / 2 / (VT / 4) * 2 + t % 2) * 4;
      A x[4][4] = {};
#pragma unroll
      for (int u = 0; u < 4; ++u)
        if (column + c + u < V) read4(rows + (column + c + u) * W + a, x[u]);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const A y[4] = {x[0][w], x[1][w], x[2][w], x[3][w]};
        write4(tile + (a + w) * LD + c, y);
      }
    }
  } else {
    fill<up(W, 4), VT, LD>(tile, [&](int a, int c) { return a < W && column + c < V ? rows[(column + c) * W + a] : A(0); });
  }
}

// Columns that only round a row up to a multiple of 4 are 0 once and for all
template <int C, int W, int LD, typename A> __device__ __forceinline__ void clear_beyond(A* tile) {
  constexpr int MORE = up(W, 4) - W;
  if constexpr (MORE > 0)
    for (int i = threadIdx.x; i < C * MORE; i += THREADS) tile[i / MORE * LD + W + i % MORE] = 0;
}

// s[a][b] += Σ_w X[i + a·H][w] Y[j + b·STEP][w], W a multiple of 4
template <int H, int STEP, int W, int LDX, int LDY, typename A, int B>
__device__ __forceinline__ void dot_rows(const A* X, const A* Y, int i, int j, A (&s)[2][B]) {
#pragma unroll 4
  for (int w = 0; w < W; w += 4) {
    A x[2][4], y[4];
    read4(X + i * LDX + w, x[0]), read4(X + (i + H) * LDX + w, x[1]);
#pragma unroll
    for (int b = 0; b < B; ++b) {
      read4(Y + (j + b * STEP) * LDY + w, y);
#pragma unroll
      for (int a = 0; a < 2; ++a)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[a][b] += x[a][e] * y[e];
    }
  }
}

// o[a][b] += Σ_w X[i + a·H][w] Z[w][c + b·STEP], W a multiple of 4
template <int H, int W, int LDX, int LDZ, int STEP = 1, typename A>
__device__ __forceinline__ void rows_times(const A* X, const A* Z, int i, int c, A (&o)[2][4]) {
#pragma unroll 4
  for (int w = 0; w < W; w += 4) {
    A x[2][4], z[4];
    read4(X + i * LDX + w, x[0]), read4(X + (i + H) * LDX + w, x[1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (STEP == 1) {
        read4(Z + (w + e) * LDZ + c, z);
      } else {
#pragma unroll
        for (int b = 0; b < 4; ++b) z[b] = Z[(w + e) * LDZ + c + b * STEP];
      }
#pragma unroll
      for (int a = 0; a < 2; ++a)
#pragma unroll
        for (int b = 0; b < 4; ++b) o[a][b] += x[a][e] * z[b];
    }
  }
}

// s[a][b] += Σ_j Y[j][r + a] Z[j][c + b]
template <int C, int LDY, int LDZ, typename A> __device__ __forceinline__ void columns_times(const A* Y, const A* Z, int r, int c, A (&s)[4][4]) {
#pragma unroll 4
  for (int j = 0; j < C; ++j) {
    A y[4], z[4];
    read4(Y + j * LDY + r, y), read4(Z + j * LDZ + c, z);
#pragma unroll
    for (int a = 0; a < 4; ++a)
#pragma unroll
      for (int b = 0; b < 4; ++b) s[a][b] += y[a] * z[b];
  }
}

// S += Yᵀ Z for R rows and V columns of S in shared memory, both multiples of 4; each thread its tiles of 4 × 4
template <int C, int R, int V, int LDS, int LDY, int LDZ, typename A> __device__ __forceinline__ void add_outer(A* S, const A* Y, const A* Z) {
  for (int tile = threadIdx.x; tile < R / 4 * (V / 4); tile += THREADS) {
    const int r = tile / (V / 4) * 4, c = tile % (V / 4) * 4;
    A s[4][4];
#pragma unroll
    for (int u = 0; u < 4; ++u) read4(S + (r + u) * LDS + c, s[u]);
    columns_times<C, LDY, LDZ>(Y, Z, r, c, s);
#pragma unroll
    for (int u = 0; u < 4; ++u) write4(S + (r + u) * LDS + c, s[u]);
  }
}
