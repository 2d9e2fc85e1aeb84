// Types and arithmetic of CUDA C++ that the host lacks: vectors, bfloat16, float16, bits.
#pragma once
#include <string.h>

#include <type_traits>

#include "runtime.h"

#define EMULATED inline __attribute__((always_inline))

// Of <math.h>, which as a whole takes as long to compile as a small kernel.
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define GSPN2_MATH_1(name) double name(double); float name##f(float);
#define GSPN2_MATH_2(name) double name(double, double); float name##f(float, float);
extern "C" {
GSPN2_MATH_1(exp) GSPN2_MATH_1(exp2) GSPN2_MATH_1(log) GSPN2_MATH_1(log2) GSPN2_MATH_1(sqrt) GSPN2_MATH_1(fabs)
GSPN2_MATH_1(floor) GSPN2_MATH_1(ceil) GSPN2_MATH_1(rint) GSPN2_MATH_1(nearbyint) GSPN2_MATH_1(tanh)
GSPN2_MATH_2(fmin) GSPN2_MATH_2(fmax) GSPN2_MATH_2(copysign) GSPN2_MATH_2(pow) GSPN2_MATH_2(fmod)
double fma(double, double, double);
float fmaf(float, float, float);
int abs(int);
}
EMULATED bool isnan(float v) { return __builtin_isnan(v); }
EMULATED bool isinf(float v) { return __builtin_isinf(v); }

// Vectors: aligned as on the device, so that a misaligned access through one is found.
#define GSPN2_VECTORS(type, name)                                                              \
  struct name##1 { type x; };                                                                  \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                     \
  struct name##3 { type x, y, z; };                                                            \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };  \
  EMULATED name##1 make_##name##1(type x) { return {x}; }                                      \
  EMULATED name##2 make_##name##2(type x, type y) { return {x, y}; }                           \
  EMULATED name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                \
  EMULATED name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
GSPN2_VECTORS(signed char, char)
GSPN2_VECTORS(unsigned char, uchar)
GSPN2_VECTORS(short, short)
GSPN2_VECTORS(unsigned short, ushort)
GSPN2_VECTORS(int, int)
GSPN2_VECTORS(unsigned int, uint)
GSPN2_VECTORS(long long, longlong)
GSPN2_VECTORS(unsigned long long, ulonglong)
GSPN2_VECTORS(float, float)
GSPN2_VECTORS(double, double)

// Bits ------------------------------------------------------------------------------------------------------

template <typename To, typename From>
EMULATED To same_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To r;
  memcpy(&r, &v, sizeof(To));
  return r;
}
EMULATED u32 __float_as_uint(float v) { return same_bits<u32>(v); }
EMULATED int __float_as_int(float v) { return same_bits<int>(v); }
EMULATED float __uint_as_float(u32 v) { return same_bits<float>(v); }
EMULATED float __int_as_float(int v) { return same_bits<float>(v); }
EMULATED int __popc(u32 v) { return __builtin_popcount(v); }
EMULATED int __popcll(u64 v) { return __builtin_popcountll(v); }
EMULATED int __ffs(int v) { return __builtin_ffs(v); }
EMULATED int __clz(int v) { return v == 0 ? 32 : __builtin_clz((u32)v); }
EMULATED u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
EMULATED int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
EMULATED u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
EMULATED u32 __brev(u32 v) {
  u32 r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
EMULATED u32 __funnelshift_r(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) >> (by & 31)); }
EMULATED u32 __funnelshift_l(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) << (by & 31) >> 32); }
EMULATED u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 s = selector >> 4 * i & 15;
    u32 byte = (u32)(bytes >> 8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}

// Arithmetic ------------------------------------------------------------------------------------------------

template <typename A, typename B>
EMULATED constexpr typename std::common_type<A, B>::type min(A a, B b) {
  static_assert(std::is_integral<A>::value && std::is_integral<B>::value, "fminf");
  typedef typename std::common_type<A, B>::type T;
  return (T)b < (T)a ? (T)b : (T)a;
}
template <typename A, typename B>
EMULATED constexpr typename std::common_type<A, B>::type max(A a, B b) {
  static_assert(std::is_integral<A>::value && std::is_integral<B>::value, "fmaxf");
  typedef typename std::common_type<A, B>::type T;
  return (T)a < (T)b ? (T)b : (T)a;
}
EMULATED float min(float a, float b) { return fminf(a, b); }
EMULATED float max(float a, float b) { return fmaxf(a, b); }
EMULATED double min(double a, double b) { return fmin(a, b); }
EMULATED double max(double a, double b) { return fmax(a, b); }
EMULATED float __fadd_rn(float a, float b) { return a + b; }
EMULATED float __fsub_rn(float a, float b) { return a - b; }
EMULATED float __fmul_rn(float a, float b) { return a * b; }
EMULATED float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMULATED float __fdiv_rn(float a, float b) { return a / b; }
EMULATED float __fdividef(float a, float b) { return a / b; }
EMULATED float __frcp_rn(float a) { return 1.f / a; }
EMULATED float __expf(float v) { return expf(v); }
EMULATED float __logf(float v) { return logf(v); }
EMULATED float __saturatef(float v) { return v > 0.f ? (v < 1.f ? v : 1.f) : 0.f; }
EMULATED float rsqrtf(float v) { return 1.f / sqrtf(v); }
EMULATED float erff(float v) { return __builtin_erff(v); }
EMULATED int __float2int_rn(float v) { return (int)nearbyintf(v); }
EMULATED float __int2float_rn(int v) { return (float)v; }
EMULATED float __uint2float_rn(u32 v) { return (float)v; }

// bfloat16 and float16, rounded to nearest even -------------------------------------------------------------

EMULATED unsigned short bfloat16_bits(float v) {
  const u32 bits = __float_as_uint(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
EMULATED float bfloat16_value(unsigned short bits) { return __uint_as_float((u32)bits << 16); }

EMULATED unsigned short float16_bits(float v) {
  const u32 bits = __float_as_uint(v), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);
  // Below the smallest normal number: 0.5 has the step of a subnormal float16, so that the sum is rounded to it.
  if (size < 0x38800000u) {
    const u32 rounded = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
    return (unsigned short)(sign | rounded);
  }
  return (unsigned short)(sign | (size + 0xc8000fffu + (size >> 13 & 1)) >> 13);
}
EMULATED float float16_value(unsigned short bits) {
  const u32 sign = (u32)(bits & 0x8000u) << 16, size = bits & 0x7fffu;
  if (size >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (size & 0x3ffu) << 13);
  if (size < 0x400u) return __uint_as_float(sign | __float_as_uint((float)size * 5.9604644775390625e-8f));
  return __uint_as_float(sign | ((size << 13) + 0x38000000u));
}

// Conversions are by name only: an implicit one would hide arithmetic that the device rounds otherwise.
struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) : bits(bfloat16_bits(v)) {}
  explicit operator float() const { return bfloat16_value(bits); }
};
struct __half {
  unsigned short bits;
  __half() = default;
  explicit __half(float v) : bits(float16_bits(v)) {}
  explicit operator float() const { return float16_value(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

EMULATED __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
EMULATED __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
EMULATED float __bfloat162float(__nv_bfloat16 v) { return float(v); }
EMULATED __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
EMULATED __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
EMULATED __nv_bfloat162 __float2bfloat162_rn(float v) { return __floats2bfloat162_rn(v, v); }
EMULATED float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
EMULATED __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
EMULATED __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 v) { return {v, v}; }
EMULATED __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
EMULATED __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
EMULATED float __low2float(__nv_bfloat162 v) { return float(v.x); }
EMULATED float __high2float(__nv_bfloat162 v) { return float(v.y); }
EMULATED unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
EMULATED __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return same_bits<__nv_bfloat16>(v); }

EMULATED __half __float2half_rn(float v) { return __half(v); }
EMULATED __half __float2half(float v) { return __half(v); }
EMULATED float __half2float(__half v) { return float(v); }
EMULATED __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
EMULATED __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
EMULATED __half2 __float2half2_rn(float v) { return __floats2half2_rn(v, v); }
EMULATED float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
EMULATED __half2 __halves2half2(__half x, __half y) { return {x, y}; }
EMULATED __half2 __half2half2(__half v) { return {v, v}; }
EMULATED __half __low2half(__half2 v) { return v.x; }
EMULATED __half __high2half(__half2 v) { return v.y; }
EMULATED float __low2float(__half2 v) { return float(v.x); }
EMULATED float __high2float(__half2 v) { return float(v.y); }
EMULATED unsigned short __half_as_ushort(__half v) { return v.bits; }
EMULATED __half __ushort_as_half(unsigned short v) { return same_bits<__half>(v); }
