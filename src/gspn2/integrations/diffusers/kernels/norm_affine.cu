// Scale and shift of every channel, from the moments of its group's channels in all slabs. A block takes a group of an
// image. Moments are joined around the group's mean, in a fixed order.
#include "pixels.cuh"

__device__ __forceinline__ float total(float v, float* shared) {
  shared[threadIdx.x] = v;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  const float sum = shared[0];
  __syncthreads();
  return sum;
}

KERNEL(256, 1) norm_affine(CONSTANT_PARAMS p) {
  float* shared = (float*)shared_memory();
  const int image = blockIdx.x / p.groups, group = blockIdx.x % p.groups;
  const int channels = p.channels / p.groups, from = group * channels;
  const float2* moments = p.moments + (long long)image * p.slabs * p.channels + from;
  const int parts = p.slabs * channels;
  const float all = (float)p.pixels * channels;
  float sum = 0.f;
  for (int i = threadIdx.x; i < parts; i += blockDim.x) {
    const int slab = i / channels;
    const float count = (float)(slab_begin(p, slab + 1) - slab_begin(p, slab));
    sum += moments[(long long)slab * p.channels + i % channels].x * (count / all);
  }
  const float mean = total(sum, shared);
  float square = 0.f;
  for (int i = threadIdx.x; i < parts; i += blockDim.x) {
    const int slab = i / channels;
    const float count = (float)(slab_begin(p, slab + 1) - slab_begin(p, slab));
    const float2 part = moments[(long long)slab * p.channels + i % channels];
    const float d = part.x - mean;
    square += (part.y + count * d * d) / all;
  }
  const float scale = rsqrtf(total(square, shared) + p.eps);
  for (int c = from + threadIdx.x; c < from + channels; c += blockDim.x) {
    const float weight = p.weight ? widen(p.weight[c]) : 1.f, bias = p.bias ? widen(p.bias[c]) : 0.f;
    p.affine[(long long)image * p.channels + c] = make_float2(scale * weight, bias - mean * scale * weight);
  }
}
