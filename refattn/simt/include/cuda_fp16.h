// half: every operation is done in float and rounded once, to nearest even; for + - * / that equals the device's own half arithmetic, because
// float has more than twice the digits.
#pragma once
#include "simt.h"

struct alignas(2) __half {
  uint16_t bits;
  __half() = default;
  inline __half(float value);
  __half(double value) : __half(float(value)) {}
  __half(int value) : __half(float(value)) {}
  inline operator float() const;
};

inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  if (exponent == 31) return simt::from_bits<float>(sign | 0x7f800000u | fraction << 13);          // inf, NaN
  if (exponent) return simt::from_bits<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float tiny = float(fraction) * 0x1p-24f;                                                    // subnormal: exact in float
  return sign ? -tiny : tiny;
}
inline __half __float2half(float value) {
  const uint32_t bits = uint32_t(simt::to_bits(value)), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  uint32_t made;
  if (size > 0x7f800000u) made = 0x7fff;                                                            // the device's NaN
  else if (size >= 0x477ff000u) made = 0x7c00;                                                      // from 65520 on: inf
  else if (size >= 0x38800000u) made = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
  else made = uint32_t(std::lrint(simt::from_bits<float>(size) * 0x1p24f));                         // subnormal, a multiple of 2^-24
  __half h;
  h.bits = uint16_t(size > 0x7f800000u ? made : sign | made);
  return h;
}
inline __half __float2half_rn(float value) { return __float2half(value); }
inline __half::__half(float value) { *this = __float2half(value); }
inline __half::operator float() const { return __half2float(*this); }
typedef __half half;
SIMT_SIXTEEN(__half, "f2")
struct alignas(4) __half2 {
  __half x, y;
};
typedef __half2 half2;
template <> struct simt::Code<__half2> { static void write(char* to) { std::strcat(to, "f2x2"); } };
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { __half h; h.bits = bits; return h; }
