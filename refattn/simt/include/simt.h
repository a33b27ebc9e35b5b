// What a CUDA kernel finds in place of the toolkit: the names of CUDA C++ that kernels use, as ordinary C++17 for the host.
// Every CUDA thread is a fiber; runtime.cpp switches between them at barriers and warp operations, so that each function below that waits
// is a call into it. With audit=True every load and store of the kernel also reaches audit.cpp.
#pragma once
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#include <math.h>

#define __CUDA_ARCH__ 800
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define SIMT_UNSEEN __attribute__((noinline, no_sanitize_thread))    // the audit sees such a function only through `simt::touch`

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace simt {
struct Thread { uint3 index, block; dim3 block_dim, grid_dim; unsigned linear, lane, warp; };
struct Shared { const char* name; size_t bytes; unsigned element; };    // one __shared__ array; element: bytes of one
enum Operation { SYNCWARP, SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, WMMA };
using Whole = void (*)(void* const* lanes);                             // done once for a whole warp

extern const Thread* current;
extern unsigned char memory[];                                          // of the block; dynamic shared memory lies at its start
void* shared(const Shared& array);                                      // the address of a static array in the running block
int barrier(int kind, int predicate, const char* file, int line);       // kind 0 plain, 1 count, 2 and, 3 or
uint64_t meet(Operation operation, unsigned mask, uint64_t value, int parameter, int width, const char* file, int line, Whole whole = nullptr);
void touch(const void* address, int bytes, bool write, bool atomic, void* pc);
void fail(const char* format, ...);                                     // ends the launch; does not return

template <class T> struct same { using type = T; };
template <class T> uint64_t to_bits(T value) { static_assert(sizeof(T) <= 8); uint64_t bits = 0; std::memcpy(&bits, &value, sizeof(T)); return bits; }
template <class T> T from_bits(uint64_t bits) { T value; std::memcpy(&value, &bits, sizeof(T)); return value; }

// The code of a parameter's type: i4, u8, f4, f2 half, b2 bfloat16, f4x4 float4, s12 another struct; p: pointer, pc: pointer to const.
template <class T> struct Code {
  static void write(char* to) {
    if constexpr (std::is_pointer_v<T>) {
      using Pointee = std::remove_pointer_t<T>;
      std::strcat(to, std::is_const_v<Pointee> ? "pc:" : "p:");
      Code<std::remove_cv_t<Pointee>>::write(to);
    } else if constexpr (std::is_void_v<T>) {
      std::strcat(to, "void");
    } else {
      char kind = std::is_floating_point_v<T> ? 'f' : !std::is_integral_v<T> ? 's' : std::is_signed_v<T> ? 'i' : 'u';
      std::sprintf(to + std::strlen(to), "%c%d", kind, int(sizeof(T)));
    }
  }
};

struct Entry { const char* name; char codes[512]; void (*kernel)(); void (*run)(void (*kernel)(), void** arguments); };
template <class... A, size_t... I> SIMT_UNSEEN void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A> SIMT_UNSEEN void run(void (*kernel)(), void** arguments) {
  call(reinterpret_cast<void (*)(A...)>(kernel), arguments, std::index_sequence_for<A...>{});
}
template <class... A> Entry entry(const char* name, void (*kernel)(A...)) {
  Entry made{name, "", reinterpret_cast<void (*)()>(kernel), run<std::remove_cv_t<A>...>};
  ((Code<std::remove_cv_t<A>>::write(made.codes), std::strcat(made.codes, " ")), ...);
  return made;
}
}  // namespace simt

// Vectors are copied in one access, as on the device: the union's second member makes the compiler do so.
#define SIMT_VECTOR2(NAME, T, CODE) \
  struct alignas(2 * sizeof(T)) NAME { \
    typedef T Whole __attribute__((vector_size(2 * sizeof(T)))); \
    union { struct { T x, y; }; Whole whole; }; \
    NAME() = default; \
    NAME(T a, T b) : whole{a, b} {} \
    NAME(const NAME& o) : whole(o.whole) {} \
    NAME& operator=(const NAME& o) { whole = o.whole; return *this; } \
  }; \
  inline NAME make_##NAME(T x, T y) { return NAME(x, y); } \
  template <> struct simt::Code<NAME> { static void write(char* to) { std::strcat(to, CODE "x2"); } };
#define SIMT_VECTOR4(NAME, T, CODE) \
  struct alignas(4 * sizeof(T)) NAME { \
    typedef T Whole __attribute__((vector_size(4 * sizeof(T)))); \
    union { struct { T x, y, z, w; }; Whole whole; }; \
    NAME() = default; \
    NAME(T a, T b, T c, T d) : whole{a, b, c, d} {} \
    NAME(const NAME& o) : whole(o.whole) {} \
    NAME& operator=(const NAME& o) { whole = o.whole; return *this; } \
  }; \
  inline NAME make_##NAME(T x, T y, T z, T w) { return NAME(x, y, z, w); } \
  template <> struct simt::Code<NAME> { static void write(char* to) { std::strcat(to, CODE "x4"); } };
SIMT_VECTOR2(float2, float, "f4") SIMT_VECTOR2(double2, double, "f8") SIMT_VECTOR2(int2, int, "i4") SIMT_VECTOR2(uint2, unsigned, "u4")
SIMT_VECTOR4(float4, float, "f4") SIMT_VECTOR4(int4, int, "i4") SIMT_VECTOR4(uint4, unsigned, "u4")

#define threadIdx (simt::current->index)
#define blockIdx (simt::current->block)
#define blockDim (simt::current->block_dim)
#define gridDim (simt::current->grid_dim)
static constexpr int warpSize = 32;

#define SIMT_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(SIMT_AT) { simt::barrier(0, 0, file, line); }
inline int __syncthreads_count(int predicate, SIMT_AT) { return simt::barrier(1, !!predicate, file, line); }
inline int __syncthreads_and(int predicate, SIMT_AT) { return simt::barrier(2, !!predicate, file, line); }
inline int __syncthreads_or(int predicate, SIMT_AT) { return simt::barrier(3, !!predicate, file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_AT) { simt::meet(simt::SYNCWARP, mask, 0, 0, 32, file, line); }
#define SIMT_SHUFFLE(NAME, OPERATION) \
  template <class T> inline T NAME(unsigned mask, T value, int parameter, int width = 32, SIMT_AT) { \
    return simt::from_bits<T>(simt::meet(simt::OPERATION, mask, simt::to_bits(value), parameter, width, file, line)); \
  }
SIMT_SHUFFLE(__shfl_sync, SHFL) SIMT_SHUFFLE(__shfl_up_sync, SHFL_UP) SIMT_SHUFFLE(__shfl_down_sync, SHFL_DOWN)
SIMT_SHUFFLE(__shfl_xor_sync, SHFL_XOR)
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_AT) {
  return unsigned(simt::meet(simt::BALLOT, mask, !!predicate, 0, 32, file, line));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_AT) { return int(simt::meet(simt::ANY, mask, !!predicate, 0, 32, file, line)); }
inline int __all_sync(unsigned mask, int predicate, SIMT_AT) { return int(simt::meet(simt::ALL, mask, !!predicate, 0, 32, file, line)); }
inline unsigned __activemask() { return 1u << simt::current->lane; }     // the least that the device may answer
inline void __threadfence() {}                                           // threads run one at a time, in one order for all memory
inline void __threadfence_block() {}

// Nothing comes between two statements of a fiber, so a plain update is atomic; the audit is told that it is meant so.
#define SIMT_ATOMIC(NAME, UPDATED) \
  template <class T> SIMT_UNSEEN T NAME(T* address, typename simt::same<T>::type value) { \
    simt::touch(address, sizeof(T), true, true, __builtin_return_address(0)); \
    T old = *address; *address = UPDATED; return old; \
  }
SIMT_ATOMIC(atomicAdd, old + value) SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicMin, value < old ? value : old) SIMT_ATOMIC(atomicMax, old < value ? value : old)
template <class T> SIMT_UNSEEN T atomicCAS(T* address, typename simt::same<T>::type compare, typename simt::same<T>::type value) {
  simt::touch(address, sizeof(T), true, true, __builtin_return_address(0));
  T old = *address;
  if (old == compare) *address = value;
  return old;
}

// Arithmetic. The device's fast intrinsics are approximate; here they are exact to rounding.
template <class A, class B> inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b)); else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B> inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b)); else return T(a) < T(b) ? T(b) : T(a);
}
template <class T> inline T __ldg(const T* address) { return *address; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __int_as_float(int x) { return simt::from_bits<float>(simt::to_bits(x)); }
inline int __float_as_int(float x) { return simt::from_bits<int>(simt::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return simt::from_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return unsigned(simt::to_bits(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

// What half and bfloat16 have in common: done in float, then rounded.
#define SIMT_SIXTEEN(T, CODE) \
  template <> struct simt::Code<T> { static void write(char* to) { std::strcat(to, CODE); } }; \
  inline T operator+(T a, T b) { return T(float(a) + float(b)); } \
  inline T operator-(T a, T b) { return T(float(a) - float(b)); } \
  inline T operator*(T a, T b) { return T(float(a) * float(b)); } \
  inline T operator/(T a, T b) { return T(float(a) / float(b)); } \
  inline T operator-(T a) { a.bits ^= 0x8000; return a; } \
  inline T& operator+=(T& a, T b) { return a = a + b; } \
  inline T& operator-=(T& a, T b) { return a = a - b; } \
  inline T& operator*=(T& a, T b) { return a = a * b; } \
  inline T& operator/=(T& a, T b) { return a = a / b; } \
  inline bool operator==(T a, T b) { return float(a) == float(b); } \
  inline bool operator!=(T a, T b) { return float(a) != float(b); } \
  inline bool operator<(T a, T b) { return float(a) < float(b); } \
  inline bool operator>(T a, T b) { return float(a) > float(b); } \
  inline bool operator<=(T a, T b) { return float(a) <= float(b); } \
  inline bool operator>=(T a, T b) { return float(a) >= float(b); } \
  inline T __hadd(T a, T b) { return a + b; } \
  inline T __hsub(T a, T b) { return a - b; } \
  inline T __hmul(T a, T b) { return a * b; } \
  inline T __hdiv(T a, T b) { return a / b; } \
  inline T __hneg(T a) { return -a; }
