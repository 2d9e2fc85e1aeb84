// Right and left over planes: lines are columns, memory runs along the scan. A thread holds N neighbouring rows, and
// takes 16 bytes of each at a time: several columns, which it then computes from registers. Nothing is transposed.
//
// In shared memory a row has SPAN bytes a stage. Rows that neighbouring threads read together come one after
// another (slot = row % N * M + row / N), and their vectors are permuted so that 8 threads meet 8 banks of 16 bytes.
#pragma once
#include "planes.cuh"

constexpr int COLUMNS = SPAN / SIZE;      // of a stage
constexpr int ROW_VECTORS = SPAN / 16;    // of a row in a stage

template <int VECTORS>
__device__ __forceinline__ int slot_offset(int slot, int vector) {
  constexpr int shift = VECTORS >= 8 ? 0 : VECTORS == 4 ? 1 : VECTORS == 2 ? 2 : 3;
  constexpr int mask = (VECTORS < 8 ? VECTORS : 8) - 1;
  return (slot * VECTORS + (vector ^ (slot >> shift & mask))) * 16;
}

template <int N, bool REVERSED>
struct HorizontalScan {
  const Params& p;
  Worker& t;
  const Scan& scan;
  const Cut& cut;
  Sources from;
  Sums sums;
  int slots, tile;  // M, and bytes of a tensor's rows in a stage
  bool adds, last;  // is there a sum of earlier directions; does this direction complete it

  typedef Stored<VECTOR> Vector;

  __device__ __forceinline__ void copy_stage(int stage, int column0) const {
    unsigned char* ring = t.ring + stage % STAGES * stage_bytes(t, tile);
    const int vector = threadIdx.x % ROW_VECTORS, column = column0 + vector * VECTOR;
    const int bytes = min(16, (p.width - column) * SIZE);
    if (bytes <= 0) return;
    const int held = t.end - t.begin;
    for (int m = threadIdx.x / ROW_VECTORS; m * N < held; m += blockDim.x / ROW_VECTORS) {
#pragma unroll
      for (int r = 0; r < N; ++r)
        if (m * N + r < held) copy_row(ring, r * slots + m, t.begin + m * N + r, vector, column, bytes);
    }
  }

  // 16 bytes of each tensor, and as many places of the sums.
  __device__ __forceinline__ void copy_row(unsigned char* ring, int slot, int row, int vector, int column,
                                           int bytes) const {
    unsigned char* shared = ring + slot_offset<ROW_VECTORS>(slot, vector);
    const storage_t* taps = from.taps + row * p.taps.h + column;
#pragma unroll
    for (int k = 0; k < 3; ++k) copy_vector(shared + k * tile, taps + k * p.taps.k, bytes);
#pragma unroll 1
    for (int c = 0; c < t.channels; ++c) {
      unsigned char* to = shared + channel_offset(c, tile);
      copy_vector(to, from.x + c * p.x.c + row * p.x.h + column, bytes);
      if (HAS_LAM) copy_vector(to + tile, from.lam + c * p.lam.c + row * p.lam.h + column, bytes);
      if (HAS_GATE) copy_vector(to + (TENSORS - 1) * tile, from.gate + c * p.gate.c + row * p.gate.h + column, bytes);
    }
    if (SUMS && adds) copy_sums(ring, slot, row, vector, column, bytes);
  }

  __device__ __forceinline__ void copy_sums(unsigned char* ring, int slot, int row, int vector, int column,
                                            int bytes) const {
#pragma unroll 1
    for (int c = 0; c < t.channels; ++c) {
      const float* sum = sums.data + c * sums.c + row * sums.h + column;
      unsigned char* to = ring + sums_offset(t, c, tile);
#if STORAGE == 0
      copy_vector(to + slot_offset<ROW_VECTORS>(slot, vector), sum, bytes);
#else
      copy_sums_vector(to + slot_offset<2 * ROW_VECTORS>(slot, 2 * vector), sum, bytes / SIZE);
      copy_sums_vector(to + slot_offset<2 * ROW_VECTORS>(slot, 2 * vector + 1), sum + 4, bytes / SIZE - 4);
#endif
    }
  }

  // One vector of columns of this thread's rows.
  struct Block {
    Vector before[N], here[N], after[N], x[N];
#if HAS_LAM
    Vector lam[N];
#endif
#if HAS_GATE
    Vector gate[N];
#endif
#if SUMS
    Pack<float, VECTOR> sum[N];
#else
    Pack<storage_t, VECTOR> y[N];
#endif
  };

  __device__ __forceinline__ void read_block(const unsigned char* ring, int vector, Block& k) const {
    const int m = t.inside ? (t.first - t.begin) / N : 0;
    const unsigned char* taps = ring + slot_offset<ROW_VECTORS>(m, vector);
    const unsigned char* tensors = taps + channel_offset(t.mine, tile);
#pragma unroll
    for (int r = 0; r < N; ++r) {
      // slots is a multiple of 8: the permutation of vectors is the same for every r.
      const int at = r * slots * SPAN;
      k.before[r] = *(const Vector*)(taps + at);
      k.here[r] = *(const Vector*)(taps + at + tile);
      k.after[r] = *(const Vector*)(taps + at + 2 * tile);
      k.x[r] = *(const Vector*)(tensors + at);
#if HAS_LAM
      k.lam[r] = *(const Vector*)(tensors + at + tile);
#endif
#if HAS_GATE
      k.gate[r] = *(const Vector*)(tensors + at + (TENSORS - 1) * tile);
#endif
    }
#if SUMS
    read_sums(ring + sums_offset(t, t.mine, tile), m, vector, k);
#endif
  }

#if SUMS
  __device__ __forceinline__ void read_sums(const unsigned char* tile_of_sums, int m, int vector, Block& k) const {
    constexpr int PARTS = 4 / SIZE;
    typedef Pack<float, 4> Part;
#pragma unroll
    for (int r = 0; r < N; ++r)
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const int at = slot_offset<PARTS * ROW_VECTORS>(m, PARTS * vector + part) + r * slots * SPAN * PARTS;
        Part four = {};
        if (adds) four = *(const Part*)(tile_of_sums + at);
#pragma unroll
        for (int e = 0; e < 4; ++e) k.sum[r].v[4 * part + e] = four.v[e];
      }
  }
#endif

  // One column; its operands are element e of the block's vectors.
  __device__ __forceinline__ void scan_column(Block& k, int e, float (&h)[N], bool restart, const Ends& ends) const {
    float u[N];
    Taps w[N];
#pragma unroll
    for (int r = 0; r < N; ++r) {
      u[r] = element(k.x[r], e);
#if HAS_LAM
      u[r] *= element(k.lam[r], e);
#endif
      w[r] = tap_weights({element(k.before[r], e), element(k.here[r], e), element(k.after[r], e)},
                         has_before<N>(ends, r), has_after<N>(ends, r));
    }
    scan_line(h, u, w, restart, ends);
#pragma unroll
    for (int r = 0; r < N; ++r) {
      float v = h[r];
#if HAS_GATE
      v *= element(k.gate[r], e);
#endif
#if SUMS
      k.sum[r].v[e] += v;
#else
      k.y[r].v[e] = narrow(v);
#endif
    }
  }

  // All columns of the block. Restarts are rare: what they cost is kept out of the usual path.
  __device__ __forceinline__ void scan_block(Block& k, float (&h)[N], int& until_restart, const Ends& ends) const {
    if (until_restart >= VECTOR) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) scan_column(k, REVERSED ? VECTOR - 1 - i : i, h, false, ends);
      until_restart -= VECTOR;
    } else {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        scan_column(k, REVERSED ? VECTOR - 1 - i : i, h, until_restart == 0, ends);
        until_restart = (until_restart == 0 ? p.chunk : until_restart) - 1;
      }
    }
  }

  // The block's columns from `column` on, those that are in the image.
  __device__ __forceinline__ void write_block(const Block& k, int column, const Ends& ends) const {
    const long long c = t.channel + t.mine;
    storage_t* y = p.y.data + t.b * p.y.b + c * p.y.c + t.first * p.y.h + column;
    const int count = p.width - column;
#pragma unroll
    for (int r = 0; r < N; ++r) {
      if (RAGGED && r >= ends.places) break;
#if SUMS
      if (!last) {
        store_places(sums.data + t.mine * sums.c + (t.first + r) * sums.h + column, k.sum[r], count);
      } else {
        Pack<storage_t, VECTOR> pack;
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) pack.v[e] = narrow(k.sum[r].v[e]);
        store_places(y + r * p.y.h, pack, count);
      }
#else
      store_places(y + r * p.y.h, k.y[r], count);
#endif
    }
  }

  __device__ __forceinline__ void run(int first_column, int end_column) {
    const int first_stage = first_column / COLUMNS, stages = (end_column + COLUMNS - 1) / COLUMNS - first_stage;
    const int step = REVERSED ? -COLUMNS : COLUMNS;
    int column0 = (REVERSED ? first_stage + stages - 1 : first_stage) * COLUMNS;
    const Ends ends = ends_of<N>(t, scan.places);
    const bool writes = t.owner && t.first >= t.own_begin && t.first < t.own_end;
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < stages) copy_stage(s, column0 + s * step);
      copy_commit();
    }
    float h[N];
#pragma unroll
    for (int r = 0; r < N; ++r) h[r] = 0.f;
    // Columns beyond the image come first where the scan starts at its ragged end; the scan starts after them.
    int until_restart = REVERSED ? (VECTOR - end_column % VECTOR) % VECTOR : 0;
#pragma unroll 1
    for (int s = 0; s < stages; ++s, column0 += step) {
      copy_wait<STAGES - 2>();
      const bool exchanges = s > 0 && shared_line(cut);
      if (exchanges) publish(t, cut, h, true);
      barrier(true);
      if (s + STAGES - 1 < stages) copy_stage(s + STAGES - 1, column0 + (STAGES - 1) * step);
      copy_commit();
      if (exchanges) refresh(t, h, true);
      const unsigned char* ring = t.ring + s % STAGES * stage_bytes(t, tile);
      const int vectors = min(ROW_VECTORS, (p.width - column0 + VECTOR - 1) / VECTOR);
      int until_exchange = cut.run, until_crossing = cut.beyond;
#pragma unroll 1
      for (int j = 0; j < vectors; ++j) {
        if (until_exchange == 0) {
          const bool across = CLUSTER && until_crossing == 0;
          exchange(t, cut, h, across);
          until_exchange = cut.run;
          if (across) until_crossing = cut.beyond;
        }
        until_exchange -= VECTOR, until_crossing -= VECTOR;
        const int vector = REVERSED ? vectors - 1 - j : j;
        Block block;
        read_block(ring, vector, block);
        scan_block(block, h, until_restart, ends);
        if (writes) write_block(block, column0 + vector * VECTOR, ends);
      }
    }
  }
};

template <int N, bool REVERSED>
__device__ __forceinline__ void scan_horizontal(const Params& p, Worker& t, const Scan& scan, int d) {
  const Cut cut = cut_of(p, false);
  take_places<N>(t, cut, scan.places);
  const int slots = ((cut.own + 2 * cut.beyond + N - 1) / N + 7) / 8 * 8;
  const int first = t.segment * p.knobs[4], count = min(p.knobs[4], scan.lines - first);
  HorizontalScan<N, REVERSED> run = {p,     t, scan, cut, sources_of(p, t, d), sums_of(p, t),
                                     slots, N * slots * SPAN, d > 0, d == p.scans - 1};
  const int first_column = REVERSED ? p.width - first - count : first;
  run.run(first_column, first_column + count);
}
