// Elements packed in words, and where the operands and the gradients of a plane are in memory.
#pragma once
#include "planes_backward.cuh"

// Packed elements: 16-bit ones two a word.
__device__ constexpr int words_of(int elements) { return elements * SIZE / 4; }

__device__ __forceinline__ float element(const u32* words, int i) {
#if STORAGE == 0
  return __uint_as_float(words[i]);
#elif STORAGE == 1
  return __uint_as_float(i & 1 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
#else
  return __half2float(__ushort_as_half((unsigned short)(i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu)));
#endif
}

// The same of weights, which are float16 beside 16-bit storage.
__device__ __forceinline__ float weight_element(const u32* words, int i) {
#if STORAGE == 0
  return __uint_as_float(words[i]);
#else
  return __half2float(__ushort_as_half((unsigned short)(i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu)));
#endif
}

#if STORAGE != 0
// Two neighbours, the lower address first.
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
#if STORAGE == 1
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return (u32)__bfloat16_as_ushort(v.x) | (u32)__bfloat16_as_ushort(v.y) << 16;
#else
  const __half2 v = __floats2half2_rn(low, high);
  return (u32)__half_as_ushort(__low2half(v)) | (u32)__half_as_ushort(__high2half(v)) << 16;
#endif
}
#endif

// COUNT elements of storage; and COUNT float32 numbers as the SUMS operands hold them: with 16-bit storage the upper
// and the lower halves of their bits are planes of their own, so that they travel like any other operand.
template <int COUNT>
struct Packed {
  u32 words[words_of(COUNT)];

  __device__ __forceinline__ float operator[](int i) const { return element(words, i); }
};

// Element i of the operands that taps are in: as they are stored, or with WEIGHTS the three weights.
template <int COUNT>
__device__ __forceinline__ Taps taps_in(const Packed<COUNT>& first, const Packed<COUNT>& second,
                                        [[maybe_unused]] const Packed<COUNT>& third, int i) {
#if WEIGHTS
  const float before = weight_element(first.words, i), after = weight_element(second.words, i);
  return {before, 1.f - before - after, after};
#else
  return {first[i], second[i], third[i]};
#endif
}

template <int COUNT>
__device__ __forceinline__ void narrow_all(Packed<COUNT>& packed, const float (&v)[COUNT]) {
#if STORAGE == 0
#pragma unroll
  for (int i = 0; i < COUNT; i++) packed.words[i] = __float_as_uint(v[i]);
#else
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) packed.words[i / 2] = narrow_pair(v[i], v[i + 1]);
#endif
}

struct Pair {
  u32 upper, lower;
};
// Two float32 numbers as upper and lower halves, and back.
__device__ __forceinline__ Pair split(float first, float second) {
  const u32 a = __float_as_uint(first), b = __float_as_uint(second);
  return {__byte_perm(a, b, 0x7632), __byte_perm(a, b, 0x5410)};
}
__device__ __forceinline__ float joined(u32 upper, u32 lower, int i) {
  return __uint_as_float(__byte_perm(lower, upper, i & 1 ? 0x7632 : 0x5410));
}

// Operand `op` of a plane: its first element. Partial sums of dx are in dx itself; with 16-bit storage their upper halves
// are, and the lower ones in scratch memory.
__device__ __forceinline__ unsigned char* plane_of(const View& v, int b, int d, int c, int k) {
  return (unsigned char*)(v.data + (b * v.b + d * v.d + c * v.c + k * v.k));
}
__device__ __forceinline__ unsigned char* lower_sums_of(const Params& p, int b, int c) {
  return (unsigned char*)p.scratch[0] + ((long long)b * p.channels + c) * p.height * p.knobs[2] * SIZE;
}
// The same of the states in scratch memory, which has room for those of some planes. What a tile of a walk has of a plane lies
// together, its rows one after the other: [tiles][height][elements of a row in a tile].
__device__ __forceinline__ unsigned char* states_of(const Params& p, int b, int c, int half) {
#if HORIZONTAL && defined(PIECE)
  constexpr int COUNT = PIECE / SIZE;
  const long long plane = (long long)p.height * ((p.width + COUNT - 1) / COUNT * COUNT);
#else
  const long long plane = 0;
#endif
  const long long number = (long long)b * p.channels + c - p.knobs[7];
  return (unsigned char*)p.scratch[3] + ((long long)half * p.knobs[9] + number) * plane * SIZE;
}
__device__ __forceinline__ const unsigned char* source_of(const Params& p, int op, int b, int group, int c) {
  const int d = p.knobs[0];
  if (op == X) return plane_of(p.x, b, 0, c, 0);
  if (HAS_LAM && op == LAM) return plane_of(p.lam, b, d, c, 0);
#if WEIGHTS
  const long long pair = ((long long)b * p.groups + group) * 2;
  if (op < DY && op >= TAPS) return (unsigned char*)p.scratch[1] + (pair + op - TAPS) * p.height * p.knobs[2] * SIZE;
#endif
  if (op < DY) return plane_of(p.taps, b, d, group, op - TAPS);
  if (op == DY) return plane_of(p.dy, b, 0, c, 0);
  if (HAS_GATE && op == GATE) return plane_of(p.gate, b, d, c, 0);
  if (HAS_HIDDEN && op < SUM) return OWN_STATES ? states_of(p, b, c, op - HIDDEN) : plane_of(p.y, b, d, c, 0);
  return op == SUM ? plane_of(p.dx, b, 0, c, 0) : lower_sums_of(p, b, c);
}
// Elements from one row to the next. They fit 32 bits: the plan sees to it.
__device__ __forceinline__ int source_pitch(const Params& p, int op) {
  if (op == X) return (int)p.x.h;
  if (HAS_LAM && op == LAM) return (int)p.lam.h;
  if (op < DY) return WEIGHTS ? p.knobs[2] : (int)p.taps.h;
  if (op == DY) return (int)p.dy.h;
  if (HAS_GATE && op == GATE) return (int)p.gate.h;
#if OWN_STATES
  if (HAS_HIDDEN && op < SUM) return PIECE / SIZE;
#endif
  if (HAS_HIDDEN && op < SUM) return (int)p.y.h;
  return op == SUM ? (int)p.dx.h : p.knobs[2];
}

// What is written in the place of operand `op`: null if nobody asks for it. dx belongs to x where it is complete
// (or float32), to the sums where it is not.
__device__ __forceinline__ bool is_first(const Params& p) { return !HAS_SUMS || p.knobs[0] == 0; }
__device__ __forceinline__ bool is_last(const Params& p) { return !HAS_SUMS || p.knobs[0] + 1 == p.scans; }
__device__ __forceinline__ bool wants_sums(const Params& p) {
  return HAS_SUMS && STORAGE != 0 && WANTS_X && !is_last(p);
}
__device__ __forceinline__ bool reads_sums(const Params& p) { return HAS_SUMS && WANTS_X && !is_first(p); }

// Is the operand read in this launch?
__device__ __forceinline__ bool is_read(const Params& p, int op) {
  if (HAS_HIDDEN && op == HIDDEN) return NEEDS_STATES;
  return op < SUM || reads_sums(p);
}

__device__ __forceinline__ bool is_wanted(const Params& p, int op) {
  if (op == X) return WANTS_X && (STORAGE == 0 || is_last(p));
  if (HAS_LAM && op == LAM) return WANTS_LAM;
  if (op < DY) return WANTS_TAPS;
  if (HAS_GATE && op == GATE) return WANTS_GATE;
  return SUMS == 2 && op >= SUM && wants_sums(p);
}
__device__ __forceinline__ unsigned char* sink_of(const Params& p, int op, int b, int group, int c) {
  const int d = p.knobs[0];
  if (op == X || op == SUM) return plane_of(p.dx, b, 0, c, 0);
  if (HAS_LAM && op == LAM) return plane_of(p.dlam, b, d, c, 0);
  if (op < DY) return plane_of(p.dtaps, b, d, group, op - TAPS);
  if (HAS_GATE && op == GATE) return plane_of(p.dgate, b, d, c, 0);
  return lower_sums_of(p, b, c);
}
__device__ __forceinline__ int sink_pitch(const Params& p, int op) {
  if (op == X || op == SUM) return (int)p.dx.h;
  if (HAS_LAM && op == LAM) return (int)p.dlam.h;
  if (op < DY) return (int)p.dtaps.h;
  if (HAS_GATE && op == GATE) return (int)p.dgate.h;
  return p.knobs[2];
}
// Strides are not negative: PyTorch has no such.
__device__ __forceinline__ unsigned char* at_row(unsigned char* base, int row, int pitch) {
  return base + (u64)((u32)row * SIZE) * (u32)pitch;
}
__device__ __forceinline__ const unsigned char* at_row(const unsigned char* base, int row, int pitch) {
  return base + (u64)((u32)row * SIZE) * (u32)pitch;
}

// Words between shared or global memory and registers, in accesses as wide as they go.
template <int WORDS>
__device__ __forceinline__ void read_words(u32 (&to)[WORDS], const unsigned char* from) {
  static_assert(WORDS == 1 || WORDS == 2 || WORDS % 4 == 0, "4, 8 or a multiple of 16 bytes");
  if constexpr (WORDS == 1) {
    to[0] = *(const u32*)from;
  } else if constexpr (WORDS == 2) {
    const uint2 v = *(const uint2*)from;
    to[0] = v.x, to[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 v = *(const uint4*)(from + 4 * i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  }
}
template <int WORDS>
__device__ __forceinline__ void write_words(unsigned char* to, const u32 (&from)[WORDS]) {
  if constexpr (WORDS == 1) {
    *(u32*)to = from[0];
  } else if constexpr (WORDS == 2) {
    *(uint2*)to = make_uint2(from[0], from[1]);
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) *(uint4*)(to + 4 * i) = make_uint4(from[i], from[i + 1], from[i + 2], from[i + 3]);
  }
}
// To global memory, where it is not read again soon.
template <int WORDS>
__device__ __forceinline__ void store_words(unsigned char* to, const u32 (&from)[WORDS]) {
  if constexpr (WORDS == 1) {
    __stcs((u32*)to, from[0]);
  } else if constexpr (WORDS == 2) {
    __stcs((uint2*)to, make_uint2(from[0], from[1]));
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
      store_stream(to + 4 * i, make_uint4(from[i], from[i + 1], from[i + 2], from[i + 3]));
  }
}
