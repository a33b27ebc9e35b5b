// nvcuda::wmma for tiles of 16 × 16 × 16: half and bfloat16 factors, sums in float (or half).
// Which lane holds which element is unspecified on the device. Here a lane holds runs of 16 bytes of the tile as it lies in memory: for half
// the lane l has half of row l / 2, for float (l % 4) of four parts of the rows l / 4 and l / 4 + 8. Code that builds on another order fails.
#pragma once
#include "cuda_fp16.h"
#include "cuda_bf16.h"

namespace nvcuda { namespace wmma {
struct row_major; struct col_major; struct matrix_a; struct matrix_b; struct accumulator;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "the emulator has wmma tiles of 16 x 16 x 16 only");
  static constexpr int num_elements = 8;
  T x[8];
};

template <class T> struct Tile {                                         // element e of a lane lies at [row][col] of the tile in memory
  static constexpr int run = sizeof(T) == 2 ? 8 : 2;
  static int row(int lane, int e) { return run == 8 ? lane % 16 : lane / 4 + e / 2 % 2 * 8; }
  static int col(int lane, int e) { return run == 8 ? lane / 16 * 8 + e : lane % 4 * 2 + e / 4 * 8 + e % 2; }
};

template <class T> void check(const T* p, unsigned ld, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(p) % 32 || ld * sizeof(T) % 16)
    simt::fail("%s:%d: wmma: expected a tile that starts at a multiple of 32 bytes, with rows a multiple of 16 bytes apart; got a start %d bytes off and rows %u bytes apart",
               file, line, int(reinterpret_cast<uintptr_t>(p) % 32), unsigned(ld * sizeof(T)));
}
inline void meet(const char* file, int line, const void* mine = nullptr, simt::Whole whole = nullptr) {
  simt::meet(simt::WMMA, 0xffffffffu, reinterpret_cast<uint64_t>(mine), 0, 32, file, line, whole);
}

// Moves a lane's elements between its fragment and memory: in runs of 16 bytes, or one by one where the memory is transposed.
template <bool STORE, class T, class F> SIMT_UNSEEN void move(F& f, T* p, unsigned ld, bool transposed, void* pc) {
  const int lane = simt::current->lane;
  for (int e = 0; e < 8; e++) {
    const int row = Tile<std::remove_const_t<T>>::row(lane, e), col = Tile<std::remove_const_t<T>>::col(lane, e);
    T* at = transposed ? p + size_t(col) * ld + row : p + size_t(row) * ld + col;
    constexpr int run = Tile<std::remove_const_t<T>>::run;
    if (transposed || e % run == 0) simt::touch(at, (transposed ? 1 : run) * sizeof(T), STORE, false, pc);
    if constexpr (STORE) *at = f.x[e]; else f.x[e] = *at;
  }
}

template <class F, class V> inline void fill_fragment(F& f, V value) { for (auto& x : f.x) x = value; }
template <class Use, class T, class Layout>
SIMT_UNSEEN void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* p, unsigned ld, SIMT_AT) {
  check(p, ld, file, line);
  move<false>(f, p, ld, false, __builtin_return_address(0));
  meet(file, line);
}
template <class T> SIMT_UNSEEN void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& f, const T* p, unsigned ld, layout_t layout, SIMT_AT) {
  check(p, ld, file, line);
  move<false>(f, p, ld, layout == mem_col_major, __builtin_return_address(0));
  meet(file, line);
}
template <class T> SIMT_UNSEEN void store_matrix_sync(T* p, const fragment<accumulator, 16, 16, 16, T>& f, unsigned ld, layout_t layout, SIMT_AT) {
  check(p, ld, file, line);
  move<true>(f, p, ld, layout == mem_col_major, __builtin_return_address(0));
  meet(file, line);
}

template <class T, class D, class LA, class LB> struct Product {
  const fragment<matrix_a, 16, 16, 16, T, LA>* a;
  const fragment<matrix_b, 16, 16, 16, T, LB>* b;
  const fragment<accumulator, 16, 16, 16, D>* c;
  fragment<accumulator, 16, 16, 16, D>* d;
  static void whole(void* const* lanes) {                                // once, by the last lane that comes
    float a[16][16], b[16][16];
    for (int lane = 0; lane < 32; lane++) {
      const Product& p = *static_cast<const Product*>(lanes[lane]);
      for (int e = 0; e < 8; e++) {
        const int row = Tile<T>::row(lane, e), col = Tile<T>::col(lane, e);
        (std::is_same_v<LA, row_major> ? a[row][col] : a[col][row]) = float(p.a->x[e]);
        (std::is_same_v<LB, row_major> ? b[row][col] : b[col][row]) = float(p.b->x[e]);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      const Product& p = *static_cast<const Product*>(lanes[lane]);
      for (int e = 0; e < 8; e++) {
        const int row = Tile<D>::row(lane, e), col = Tile<D>::col(lane, e);
        float sum = float(p.c->x[e]);
        for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][col];
        p.d->x[e] = D(sum);
      }
    }
  }
};
template <class T, class D, class LA, class LB>
SIMT_UNSEEN void mma_sync(fragment<accumulator, 16, 16, 16, D>& d, const fragment<matrix_a, 16, 16, 16, T, LA>& a,
                          const fragment<matrix_b, 16, 16, 16, T, LB>& b, const fragment<accumulator, 16, 16, 16, D>& c, SIMT_AT) {
  Product<T, D, LA, LB> mine{&a, &b, &c, &d};
  meet(file, line, &mine, &Product<T, D, LA, LB>::whole);
}
} }  // namespace nvcuda::wmma
