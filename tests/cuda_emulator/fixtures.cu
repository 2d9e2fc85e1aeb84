// Small kernels, right ones and (knob 0 not 0) wrong ones, that test the emulator. x and y are rows of float32.
#include "common.cuh"

// Thread t of a warp: what each warp collective gives it.
KERNEL(64, 1) collectives(CONSTANT_PARAMS p) {
  const int t = (int)threadIdx.x, lane = t % 32;
  const float v = p.x.data[t];
  float* y = p.y.data + 12 * t;
  y[0] = __shfl_sync(~0u, v, 5);
  y[1] = __shfl_sync(~0u, v, lane + 3, 8);
  y[2] = __shfl_up_sync(~0u, v, 2);
  y[3] = __shfl_down_sync(~0u, v, 2, 16);
  y[4] = __shfl_xor_sync(~0u, v, 17);
  y[5] = (float)__popc(__ballot_sync(~0u, lane % 3 == 0));
  y[6] = (float)__any_sync(~0u, t == 40);
  y[7] = (float)__all_sync(~0u, lane < 32);
  // Halves of a warp, each on its own and in its own order.
  y[8] = lane < 16 ? __shfl_xor_sync(0x0000ffffu, v, 1) : __shfl_xor_sync(0xffff0000u, v, 2);
  y[9] = (float)__reduce_add_sync(~0u, t);
  y[10] = (float)__reduce_max_sync(~0u, -t);
  y[11] = (float)__syncthreads_count(t % 5 == 0);
  if (p.knobs[0] == 1 && lane == 7) return;
  if (p.knobs[0] == 2 && lane == 7) __syncwarp(1u << 8);
  __syncwarp();
}

// Reverses 256 values through shared memory.
KERNEL(256, 1) reverse(CONSTANT_PARAMS p) {
  float* row = (float*)shared_memory();
  const int t = (int)threadIdx.x, n = (int)blockDim.x, wrong = p.knobs[0];
  row[t] = p.x.data[t];
  if (wrong == 2 && t == 3) return;
  if (wrong == 3 && t >= 64) named_barrier(1, n - 32);
  if (wrong == 4 && (t & 1)) {
    p.y.data[t] = 0.f;
    __syncthreads();
  } else if (wrong != 1) {
    __syncthreads();
  }
  p.y.data[t] = row[n - 1 - t];
}

// Three stages of asynchronous copies, 64 values each, of which the last may be cut short.
KERNEL(64, 1) staged(CONSTANT_PARAMS p) {
  float* stages = (float*)shared_memory();
  const int t = (int)threadIdx.x, n = p.width, steps = (n + 63) / 64, wrong = p.knobs[0];
  auto issue = [&](int step) {
    const int first = 64 * step + 4 * t;
    if (t < 16 && step < steps)
      copy_async<16>(stages + step % 3 * 64 + 4 * t, p.x.data + first, max(0, min(16, 4 * (n - first))));
    copy_commit();
  };
  issue(0);
  issue(1);
  for (int step = 0; step < steps; ++step) {
    if (wrong != 1) copy_wait<1>();
    if (wrong != 2) __syncthreads();
    const float v = stages[step % 3 * 64 + 63 - t];
    if (64 * step + t < n) p.y.data[64 * step + t] = v;
    issue(step + (wrong == 3 ? 3 : 2));
  }
}

// A warp that fetches and one that computes, with a ring of two stages between them; bulk stores of the results.
KERNEL(64, 1) ring(CONSTANT_PARAMS p) {
  unsigned char* memory = shared_memory();
  u64 *full = (u64*)memory, *empty = full + 2;
  float *stages = (float*)(memory + 128), *results = stages + 2 * 64;
  const int t = (int)threadIdx.x, steps = p.width / 64, wrong = p.knobs[0];
  if (t == 0) {
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, 32);
    }
    if (wrong != 1) mbarrier_init_fence();
  }
  __syncthreads();
  if (t == 32) {
    for (int step = 0; step < steps; ++step) {
      const int s = step % 2;
      if (wrong != 2) mbarrier_wait(empty + s, (step / 2 & 1) ^ 1);
      mbarrier_arrive_expect(full + s, wrong == 3 ? 512 : 256);
      bulk_copy(stages + 64 * s, p.x.data + 64 * step, 256, full + s);
    }
  }
  if (t >= 32) return;
  for (int step = 0; step < steps; ++step) {
    const int s = step % 2;
    if (wrong != 4) mbarrier_wait(full + s, step / 2 & 1);
    const float a = stages[64 * s + 63 - t], b = stages[64 * s + 31 - t];
    mbarrier_arrive(empty + s);
    if (t == 0 && wrong != 5) bulk_store_wait_read<1>();
    __syncwarp();
    results[64 * s + t] = a;
    results[64 * s + 32 + t] = b;
    if (wrong != 6) bulk_store_fence();
    __syncwarp();
    if (t == 0) {
      bulk_store(p.y.data + 64 * step, results + 64 * s, 256);
      bulk_store_commit();
    }
  }
  if (t == 0 && wrong != 7) bulk_store_wait_read<0>();
}

// Lanes hand values round through shared memory, in warps of their own.
KERNEL(64, 1) warp_exchange(CONSTANT_PARAMS p) {
  float* row = (float*)shared_memory();
  const int t = (int)threadIdx.x, next = t / 32 * 32 + (t + 1) % 32, wrong = p.knobs[0];
  float v = p.x.data[t];
  for (int i = 0; i < 3; ++i) {
    row[t] = v;
    if (wrong != 1) __syncwarp();
    v = row[next];
    // Of the collectives only __syncwarp orders memory.
    v += __shfl_xor_sync(~0u, v, 1);
    if (wrong != 2) __syncwarp();
  }
  p.y.data[t] = v;
}

// Threads hand values round through global memory.
KERNEL(64, 1) global_exchange(CONSTANT_PARAMS p) {
  float* y = p.y.data;
  const int t = (int)threadIdx.x, wrong = p.knobs[0];
  if (blockIdx.x == 0) y[t] = p.x.data[t];
  if (wrong != 1) __syncthreads();
  const float v = y[63 - t];
  __syncthreads();
  y[t] = v;
}

// Each block of a cluster reads what the next one holds.
KERNEL(32, 1) neighbours(CONSTANT_PARAMS p) {
  float* row = (float*)shared_memory();
  const int t = (int)threadIdx.x, wrong = p.knobs[0];
  const u32 ranks = (u32)p.knobs[1], rank = cluster_rank();
  row[t] = p.x.data[32 * blockIdx.x + t];
  if (wrong != 1) cluster_barrier();
  p.y.data[32 * blockIdx.x + t] = *cluster_map(row + t, (rank + 1) % ranks);
  if (wrong != 2) cluster_barrier();
}

// Blocks of a cluster hand rows on to the next one, three times, into two rows by turns. With two blocks a row has been
// read when the next but one comes; with four nothing says so.
KERNEL(32, 1) relay(CONSTANT_PARAMS p) {
  float* rows = (float*)(shared_memory() + 128);
  u64* full = (u64*)shared_memory();
  const int t = (int)threadIdx.x, wrong = p.knobs[0];
  const u32 ranks = (u32)p.knobs[1], next = (cluster_rank() + 1) % ranks;
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(full + 1, 1);
    mbarrier_init_fence();
  }
  if (wrong != 3) cluster_barrier();
  float v = p.x.data[32 * blockIdx.x + t];
  for (int step = 0; step < 3; ++step) {
    const int s = step & 1;
    if (t == 0) mbarrier_arrive_expect(full + s, wrong == 2 ? 132 : 128);
    store_counted<1>(rows + 32 * s + t, full + s, next, &v);
    if (wrong == 4 && step == 2) return;
    if (wrong != 1) mbarrier_wait(full + s, step >> 1 & 1);
    v = rows[32 * s + t];
  }
  // Nobody has to wait for anybody: what came has been waited for.
  p.y.data[32 * blockIdx.x + t] = v;
}

// What must be caught, by knob 0.
KERNEL(32, 1) strays(CONSTANT_PARAMS p) {
  float* row = (float*)shared_memory();
  float* y = p.y.data;
  const float* x = p.x.data;
  const int size = p.knobs[1];
  if (threadIdx.x != 9) return;
  switch (p.knobs[0]) {
    case 0: row[0] = 1.f; break;
    case 1: row[size / 4 + 40] = 1.f; break;
    case 2: row[size / 4] = 1.f; break;
    case 3: y[0] = row[-1024]; break;
    case 4: y[0] = __ldg(x + p.width); break;
    case 5: __stcs(y - 1, 0.f); break;
    case 6: y[p.width] = 0.f; break;
    case 7: y[0] = x[p.width + 4096]; break;
    case 8: y[0] = (*(const float4*)(x + 1)).x; break;
    case 9: load_stream(x + 1); break;
    case 10: copy_async<8>(row, x + 1); break;
    case 11: __stcs((float*)x, 0.f); break;
    case 12: ((float*)x)[1] = 0.f; break;
    case 13: y[0] = (float)(p.width / (p.knobs[2])); break;
    case 15: while (((volatile int*)p.knobs)[2] == 0) {} break;
    case 16: y[0] = row[1]; break;
    case 17: if (p.knobs[2] != 1) __trap(); break;
    case 18: named_barrier(1, 24); break;
  }
}

// Rounding to bfloat16 and float16 and back.
KERNEL(128, 1) roundings(CONSTANT_PARAMS p) {
  for (int i = (int)threadIdx.x; i < p.width; i += (int)blockDim.x) {
    p.y.data[i] = __bfloat162float(__float2bfloat16_rn(p.x.data[i]));
    p.y.data[p.width + i] = __half2float(__float2half_rn(p.x.data[i]));
    const float2 pair = __half22float2(__floats2half2_rn(p.x.data[i], 1.f));
    p.y.data[2 * p.width + i] = pair.x * pair.y;
  }
}

// Scratch memory: each thread writes its float and reads another's.
KERNEL(64, 1) scratch_exchange(CONSTANT_PARAMS p) {
  float* row = (float*)p.scratch[0];
  const int t = (int)threadIdx.x, wrong = p.knobs[0];
  if (wrong != 1 || t != 13) row[t] = p.x.data[t];
  __syncthreads();
  p.y.data[t] = wrong == 2 ? row[t + 1] : row[63 - t];
}

// Blocks that add to what the block before left, told by flags; y is the sum. The flags are all 0 before.
KERNEL(64, 1) relay_race(CONSTANT_PARAMS p) {
  float* sum = (float*)p.scratch[0];
  u32* flags = (u32*)p.scratch[1];
  const int t = (int)threadIdx.x, block = (int)blockIdx.x, wrong = p.knobs[0];
  if (block > 0 && t == 0 && wrong != 1) wait_flag(flags + block - 1, wrong == 2 ? 2 : 1);
  if (wrong != 3) __syncthreads();
  const float v = p.x.data[64 * block + t] + (block > 0 ? sum[t] : 0.f);
  sum[t] = v;
  if (wrong != 4) __syncthreads();
  if (t == 0) raise_flag(flags + block, 1);
  if (block + 1 == (int)gridDim.x) p.y.data[t] = v;
}
