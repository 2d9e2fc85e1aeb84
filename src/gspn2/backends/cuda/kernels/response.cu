// The end of a GSPN module up to its last matrix product: GRN(LayerNorm(x + what the proxies bring)), channels_last.
//
// LANES lanes of a warp share a pixel, PER pairs of channels each. Both passes over the image begin with the same
// v = x + bias + sum over proxies of y weight. The first one normalizes, z = (v - mean) / deviation, and adds up z and z z
// for every channel, from which follows the mean square of what LayerNorm makes of it: gain and shift need not be known
// in the loop. WHOLE: a block has an image, makes GRN's scale from the sums, and reads the image again, from the cache if
// it is small. Otherwise a block has a share of an image and leaves its sums, and each pixel's mean and scale.
//
// Macros beside those of pairs.cuh:
//   CHANNELS, PROXIES  of an image, and propagated (0: none)
//   LANES              of a pixel, 16 or 32
//   STEP               pixels that a lane has in work at a time
//   THREADS, BLOCKS    bounds of a block, and blocks of a multiprocessor
//   WHOLE
#include "pairs.cuh"

constexpr int PAIRS = CHANNELS / 2, PER = (PAIRS + LANES - 1) / LANES, WARPS = THREADS / 32;
constexpr bool EVEN = PAIRS % LANES == 0;

// `response.py` packs this structure; the two must agree. Parameters are (C), weights of the proxies (C, PROXIES).
struct Params {
  const pair_t* x;  // (B, pixels, C)
  const unsigned short* y;  // (B, pixels, PROXIES)
  const weight_t* proxy_weight;
  const weight_t* proxy_bias;
  const weight_t* gain;  // LayerNorm's
  const weight_t* shift;
  const weight_t* weight;  // GRN's
  const weight_t* bias;
  float* means;    // (B, pixels); WHOLE: absent, as the next two
  float* scales;   // (B, pixels)
  float2* sums;    // (B, shares, 2, C / 2): of z, of its squares
  pair_t* to;      // (B, pixels, C); not WHOLE: absent
  int pixels, share, shares, none;  // pixels of an image, of a block; blocks of an image
  float norm_eps, eps;
};

// In shared memory, a float2 for each pair of channels.
struct Shared {
  float2* proxy;  // (PROXIES, PAIRS)
  float2* bias;   // the proxies'
  float2* first;  // sums of z, then gains
  float2* second; // sums of squares, then shifts
  float* turns;   // a number of each warp
  float* pixels;  // mean and scale of each pixel
};

__device__ __forceinline__ Shared shared_parts() {
  Shared s;
  s.proxy = (float2*)shared_memory();
  s.bias = s.proxy + PROXIES * PAIRS;
  s.first = s.bias + PAIRS;
  s.second = s.first + PAIRS;
  s.turns = (float*)(s.second + PAIRS);
  s.pixels = s.turns + 32;
  return s;
}

__device__ __forceinline__ float2 parameters(const weight_t* p, int pair) {
  return make_float2(widen(__ldg(p + 2 * pair)), widen(__ldg(p + 2 * pair + 1)));
}

__device__ __forceinline__ bool exists(int pair) { return EVEN || pair < PAIRS; }

struct Pixel {
  float2 v[PER];  // of pairs lane, lane + LANES, ...
};

// Pixels from `number` on that this lane works on; those beyond `count` are those of pixel 0 again.
__device__ __forceinline__ void load_mixed(Pixel (&pixels)[STEP], const Params& p, const Shared& s, const pair_t* x,
                                           const unsigned short* y, const int (&numbers)[STEP], int lane) {
  pair_t raw[STEP][PER];
  float proxies[STEP][PROXIES + 1];
#pragma unroll
  for (int i = 0; i < STEP; ++i) {
    const pair_t* from = x + (long long)numbers[i] * PAIRS + lane;
#pragma unroll
    for (int k = 0; k < PER; ++k) raw[i][k] = exists(lane + k * LANES) ? __ldg(from + k * LANES) : no_pair();
#pragma unroll
    for (int q = 0; q < PROXIES; ++q) {
      const u32 bits = __ldg(y + (long long)numbers[i] * PROXIES + q);
      proxies[i][q] = widen((pair_t)bits).x;
    }
  }
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    const int pair = lane + k * LANES;
    const bool there = exists(pair);
    const float2 bias = there ? s.bias[pair] : make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      pixels[i].v[k] = widen(raw[i][k]);
      pixels[i].v[k].x += bias.x, pixels[i].v[k].y += bias.y;
    }
#pragma unroll
    for (int q = 0; q < PROXIES; ++q) {
      const float2 weight = there ? s.proxy[q * PAIRS + pair] : make_float2(0.f, 0.f);
#pragma unroll
      for (int i = 0; i < STEP; ++i) {
        pixels[i].v[k].x = fmaf(proxies[i][q], weight.x, pixels[i].v[k].x);
        pixels[i].v[k].y = fmaf(proxies[i][q], weight.y, pixels[i].v[k].y);
      }
    }
  }
}

__device__ __forceinline__ float over_lanes(float v) {
#pragma unroll
  for (int bits = LANES / 2; bits; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
  return v;
}

// Mean and one over the standard deviation of a pixel, which is centered.
__device__ __forceinline__ float2 center(Pixel& pixel, float eps, int lane) {
  float total = 0.f;
#pragma unroll
  for (int k = 0; k < PER; ++k) total += pixel.v[k].x + pixel.v[k].y;
  const float mean = over_lanes(total) / CHANNELS;
  float squares = 0.f;
#pragma unroll
  for (int k = 0; k < PER; ++k) {
    pixel.v[k].x -= mean, pixel.v[k].y -= mean;
    if (exists(lane + k * LANES)) squares += pixel.v[k].x * pixel.v[k].x + pixel.v[k].y * pixel.v[k].y;
  }
  return make_float2(mean, rsqrtf(over_lanes(squares) / CHANNELS + eps));
}

// Sums of the block in their order, the first of `first` and `second` after those of all warps before.
__device__ __forceinline__ void add_up(const Shared& s, float2 (&sums)[2][PER], int warp, int lane) {
#pragma unroll
  for (int which = 0; which < 2; ++which)
#pragma unroll
    for (int k = 0; k < PER; ++k)
#pragma unroll
      for (int bits = 16; bits >= LANES; bits /= 2) {
        sums[which][k].x += __shfl_xor_sync(0xffffffffu, sums[which][k].x, bits);
        sums[which][k].y += __shfl_xor_sync(0xffffffffu, sums[which][k].y, bits);
      }
  for (int turn = 0; turn < WARPS; ++turn) {
    if (turn == warp && lane < LANES)
#pragma unroll
      for (int k = 0; k < PER; ++k) {
        const int pair = lane + k * LANES;
        if (!exists(pair)) continue;
        float2 first = sums[0][k], second = sums[1][k];
        if (turn) {
          first.x += s.first[pair].x, first.y += s.first[pair].y;
          second.x += s.second[pair].x, second.y += s.second[pair].y;
        }
        s.first[pair] = first, s.second[pair] = second;
      }
    __syncthreads();
  }
}

#if WHOLE
__device__ __forceinline__ float response_of(float mean_square, float eps) { return sqrtf(fmaxf(mean_square, 0.f) + eps * eps); }

// LayerNorm's gain and shift with GRN's after them, from the sums, in their place.
__device__ __forceinline__ void fold(const Params& p, const Shared& s, int warp, int lane) {
  const float each = 1.f / p.pixels;
  float total = 0.f;
  for (int pair = threadIdx.x; pair < PAIRS; pair += THREADS) {
    const float2 g = parameters(p.gain, pair), h = parameters(p.shift, pair), first = s.first[pair], second = s.second[pair];
    const float2 r = make_float2(
        response_of((g.x * g.x * second.x + 2.f * g.x * h.x * first.x) * each + h.x * h.x, p.eps),
        response_of((g.y * g.y * second.y + 2.f * g.y * h.y * first.y) * each + h.y * h.y, p.eps));
    s.first[pair] = r;
    total += r.x + r.y;
  }
#pragma unroll
  for (int bits = 16; bits; bits /= 2) total += __shfl_xor_sync(0xffffffffu, total, bits);
  if (lane == 0) s.turns[warp] = total;
  __syncthreads();
  total = 0.f;
  for (int turn = 0; turn < WARPS; ++turn) total += s.turns[turn];
  const float relative = 1.f / (total / CHANNELS + p.eps);
  for (int pair = threadIdx.x; pair < PAIRS; pair += THREADS) {
    const float2 g = parameters(p.gain, pair), h = parameters(p.shift, pair), r = s.first[pair];
    const float2 w = parameters(p.weight, pair), b = parameters(p.bias, pair);
    const float2 scale = make_float2(1.f + w.x * r.x * relative, 1.f + w.y * r.y * relative);
    s.first[pair] = make_float2(g.x * scale.x, g.y * scale.y);
    s.second[pair] = make_float2(h.x * scale.x + b.x, h.y * scale.y + b.y);
  }
  __syncthreads();
}

__device__ __forceinline__ void apply(const Params& p, const Shared& s, const pair_t* x, const unsigned short* y, pair_t* to,
                                      int begin, int count, int lane) {
  for (int base = begin; base < count; base += WARPS * STEP * (32 / LANES)) {
    int numbers[STEP];
#pragma unroll
    for (int i = 0; i < STEP; ++i) numbers[i] = base + i * (32 / LANES) < count ? base + i * (32 / LANES) : 0;
    Pixel pixels[STEP];
    load_mixed(pixels, p, s, x, y, numbers, lane);
#pragma unroll
    for (int k = 0; k < PER; ++k) {
      const int pair = lane + k * LANES;
      if (!exists(pair)) continue;
      const float2 gain = s.first[pair], shift = s.second[pair];
#pragma unroll
      for (int i = 0; i < STEP; ++i) {
        const float mean = s.pixels[2 * numbers[i]], scale = s.pixels[2 * numbers[i] + 1];
        const float2 z = make_float2((pixels[i].v[k].x - mean) * scale, (pixels[i].v[k].y - mean) * scale);
        if (base + i * (32 / LANES) < count)
          __stwb(to + (long long)numbers[i] * PAIRS + pair, narrow(make_float2(fmaf(z.x, gain.x, shift.x), fmaf(z.y, gain.y, shift.y))));
      }
    }
  }
}
#endif

KERNEL(THREADS, BLOCKS) response(CONSTANT_PARAMS p) {
  const Shared s = shared_parts();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, sub = threadIdx.x % 32 / LANES;
  const int image = blockIdx.x / p.shares, number = blockIdx.x - image * p.shares;
  const long long start = (long long)image * p.pixels + (long long)number * p.share;
  const int count = min(p.share, p.pixels - number * p.share);
  const pair_t* x = p.x + start * PAIRS;
  const unsigned short* y = p.y + start * PROXIES;
  for (int pair = threadIdx.x; pair < PAIRS; pair += THREADS) {
#pragma unroll
    for (int q = 0; q < PROXIES; ++q)
      s.proxy[q * PAIRS + pair] = make_float2(widen(__ldg(p.proxy_weight + 2 * pair * PROXIES + q)),
                                              widen(__ldg(p.proxy_weight + (2 * pair + 1) * PROXIES + q)));
    s.bias[pair] = p.proxy_bias ? parameters(p.proxy_bias, pair) : make_float2(0.f, 0.f);
  }
  __syncthreads();
  float2 sums[2][PER];
#pragma unroll
  for (int k = 0; k < PER; ++k) sums[0][k] = sums[1][k] = make_float2(0.f, 0.f);
  const int begin = warp * STEP * (32 / LANES) + sub;
  // The bound is that of the warp: its lanes add up together.
  for (int base = begin; base - sub < count; base += WARPS * STEP * (32 / LANES)) {
    int numbers[STEP];
#pragma unroll
    for (int i = 0; i < STEP; ++i) numbers[i] = base + i * (32 / LANES) < count ? base + i * (32 / LANES) : 0;
    Pixel pixels[STEP];
    load_mixed(pixels, p, s, x, y, numbers, lane);
#pragma unroll
    for (int i = 0; i < STEP; ++i) {
      const bool live = base + i * (32 / LANES) < count;
      const float2 found = center(pixels[i], p.norm_eps, lane);
      if (live && lane == 0) {
#if WHOLE
        s.pixels[2 * numbers[i]] = found.x, s.pixels[2 * numbers[i] + 1] = found.y;
#else
        p.means[start + numbers[i]] = found.x, p.scales[start + numbers[i]] = found.y;
#endif
      }
      const float scale = live ? found.y : 0.f;
#pragma unroll
      for (int k = 0; k < PER; ++k) {
        const float2 z = make_float2(pixels[i].v[k].x * scale, pixels[i].v[k].y * scale);
        sums[0][k].x += z.x, sums[0][k].y += z.y;
        sums[1][k].x = fmaf(z.x, z.x, sums[1][k].x), sums[1][k].y = fmaf(z.y, z.y, sums[1][k].y);
      }
    }
  }
  add_up(s, sums, warp, threadIdx.x % 32);
#if WHOLE
  fold(p, s, warp, threadIdx.x % 32);
  apply(p, s, x, y, p.to + start * PAIRS, begin, count, lane);
#else
  float2* to = p.sums + (long long)blockIdx.x * 2 * PAIRS;
  for (int pair = threadIdx.x; pair < PAIRS; pair += THREADS) to[pair] = s.first[pair], to[PAIRS + pair] = s.second[pair];
#endif
}
