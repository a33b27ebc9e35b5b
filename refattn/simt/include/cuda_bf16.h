// bfloat16: the upper half of a float, rounded to nearest even.
#pragma once
#include "simt.h"

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  inline __nv_bfloat16(float value);
  __nv_bfloat16(double value) : __nv_bfloat16(float(value)) {}
  __nv_bfloat16(int value) : __nv_bfloat16(float(value)) {}
  inline operator float() const;
};

inline float __bfloat162float(__nv_bfloat16 h) { return simt::from_bits<float>(uint64_t(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float value) {
  const uint32_t bits = uint32_t(simt::to_bits(value));
  __nv_bfloat16 h;
  h.bits = (bits & 0x7fffffff) > 0x7f800000u ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return h;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __float2bfloat16(value); }
inline __nv_bfloat16::__nv_bfloat16(float value) { *this = __float2bfloat16(value); }
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }
typedef __nv_bfloat16 nv_bfloat16;
SIMT_SIXTEEN(__nv_bfloat16, "b2")
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
template <> struct simt::Code<__nv_bfloat162> { static void write(char* to) { std::strcat(to, "b2x2"); } };
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { __nv_bfloat16 h; h.bits = bits; return h; }
