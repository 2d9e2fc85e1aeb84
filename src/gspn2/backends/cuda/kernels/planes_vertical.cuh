// Down and up over planes: lines are rows. A thread holds N neighbours of a row, and a stage of lines lies in shared
// memory row by row.
#pragma once
#include "planes.cuh"

template <int N>
struct VerticalScan {
  const Params& p;
  Worker& t;
  const Scan& scan;
  const Cut& cut;
  Sources from;
  Sums sums;
  int width, tile;       // elements of a row in shared memory, bytes of a tensor's rows
  int first_line, lines;  // of this segment
  bool adds, last;       // is there a sum of earlier directions; does this direction complete it

  // The operands of one line, as they lie in memory.
  struct Line {
    Pack<storage_t, N> before, here, after, x;
#if HAS_LAM
    Pack<storage_t, N> lam;
#endif
#if HAS_GATE
    Pack<storage_t, N> gate;
#endif
#if SUMS
    Pack<float, N> sum;
#endif
  };

  __device__ __forceinline__ int row(int line) const {
    return scan.reversed ? scan.lines - 1 - (first_line + line) : first_line + line;
  }

  __device__ __forceinline__ void copy_stage(int stage) const {
    unsigned char* ring = t.ring + stage % STAGES * stage_bytes(t, tile);
    const int line0 = stage * cut.stage, count = min(cut.stage, lines - line0);
    const int vectors = (t.end - t.begin + VECTOR - 1) / VECTOR;
    if (vectors <= 0) return;
    const int threads = blockDim.x, line_step = threads / vectors, vector_step = threads - line_step * vectors;
    int line = threadIdx.x / vectors, vector = threadIdx.x - line * vectors;
    while (line < count) {
      copy_line(ring, line * width + vector * VECTOR, row(line0 + line), t.begin + vector * VECTOR);
      line += line_step, vector += vector_step;
      if (vector >= vectors) vector -= vectors, ++line;
    }
  }

  // 16 bytes of each tensor, and as many places of the sums, to element `at` of their tiles.
  __device__ __forceinline__ void copy_line(unsigned char* ring, int at, int row, int place) const {
    unsigned char* shared = ring + at * SIZE;
    const int bytes = min(16, (scan.places - place) * SIZE);
    const storage_t* taps = from.taps + row * p.taps.h + place;
#pragma unroll
    for (int k = 0; k < 3; ++k) copy_vector(shared + k * tile, taps + k * p.taps.k, bytes);
    for (int c = 0; c < t.channels; ++c) {
      unsigned char* to = shared + channel_offset(c, tile);
      copy_vector(to, from.x + c * p.x.c + row * p.x.h + place, bytes);
      if (HAS_LAM) copy_vector(to + tile, from.lam + c * p.lam.c + row * p.lam.h + place, bytes);
      if (HAS_GATE) copy_vector(to + (TENSORS - 1) * tile, from.gate + c * p.gate.c + row * p.gate.h + place, bytes);
    }
    if (SUMS && adds) copy_sums(ring + at * 4, row, place, bytes);
  }

  __device__ __forceinline__ void copy_sums(unsigned char* shared, int row, int place, int bytes) const {
    for (int c = 0; c < t.channels; ++c) {
      const float* sum = sums.data + c * sums.c + row * sums.h + place;
      unsigned char* to = shared + sums_offset(t, c, tile);
#if STORAGE == 0
      copy_vector(to, sum, bytes);
#else
      copy_async<16>(to, sum);
      if (bytes > 8) copy_async<16>(to + 16, sum + 4);
#endif
    }
  }

  __device__ __forceinline__ Line read_line(const unsigned char* ring, int line) const {
    const int at = line * width + (t.inside ? t.first - t.begin : 0);
    const unsigned char *taps = ring + at * SIZE, *tensors = taps + channel_offset(t.mine, tile);
    typedef const Pack<storage_t, N>* Source;
    Line r;
    r.before = *(Source)taps, r.here = *(Source)(taps + tile), r.after = *(Source)(taps + 2 * tile);
    r.x = *(Source)tensors;
#if HAS_LAM
    r.lam = *(Source)(tensors + tile);
#endif
#if HAS_GATE
    r.gate = *(Source)(tensors + (TENSORS - 1) * tile);
#endif
#if SUMS
    if (adds) r.sum = *(const Pack<float, N>*)(ring + sums_offset(t, t.mine, tile) + at * 4);
#endif
    return r;
  }

  // Writes gate h, or adds it to the sum, which is complete after the last direction.
  __device__ __forceinline__ void write_line(const float (&v)[N], storage_t* y, float* sum) const {
    if (SUMS && !last) {
      Pack<float, N> pack;
#pragma unroll
      for (int e = 0; e < N; ++e) pack.v[e] = v[e];
      store_places(sum, pack, scan.places - t.first);
    } else {
      Pack<storage_t, N> pack;
#pragma unroll
      for (int e = 0; e < N; ++e) pack.v[e] = narrow(v[e]);
      store_places(y, pack, scan.places - t.first);
    }
  }

  __device__ __forceinline__ void run() {
    const int stages = (lines + cut.stage - 1) / cut.stage;
    const Ends ends = ends_of<N>(t, scan.places);
    const bool writes = t.owner && t.first >= t.own_begin && t.first < t.own_end;
    const long long c = t.channel + t.mine;
    storage_t* y = p.y.data + t.b * p.y.b + c * p.y.c + row(0) * p.y.h + t.first;
    const long long y_step = line_step(p.y, scan);
    float* sum = sums.data + t.mine * sums.c + row(0) * sums.h + t.first;
    const long long sum_step = scan.reversed ? -sums.h : sums.h;
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < stages) copy_stage(s);
      copy_commit();
    }
    float h[N];
#pragma unroll
    for (int e = 0; e < N; ++e) h[e] = 0.f;
    int until_restart = 0;
    for (int s = 0; s < stages; ++s) {
      copy_wait<STAGES - 2>();
      const bool exchanges = s > 0 && shared_line(cut);
      if (exchanges) publish(t, cut, h, true);
      barrier(true);
      if (s + STAGES - 1 < stages) copy_stage(s + STAGES - 1);
      copy_commit();
      if (exchanges) refresh(t, h, true);
      const unsigned char* ring = t.ring + s % STAGES * stage_bytes(t, tile);
      const int count = min(cut.stage, lines - s * cut.stage);
      int until_exchange = cut.run;
      Line line = read_line(ring, 0);
      for (int i = 0; i < count; ++i) {
        if (until_exchange == 0) {
          exchange_warps(t, cut, h);
          until_exchange = cut.run;
        }
        --until_exchange;
        float u[N], v[N], sum_before[N];
        Taps w[N];
#pragma unroll
        for (int e = 0; e < N; ++e) {
          u[e] = widen(line.x.v[e]);
#if HAS_LAM
          u[e] *= widen(line.lam.v[e]);
#endif
          w[e] = tap_weights({widen(line.before.v[e]), widen(line.here.v[e]), widen(line.after.v[e])},
                             has_before<N>(ends, e), has_after<N>(ends, e));
#if HAS_GATE
          v[e] = widen(line.gate.v[e]);
#else
          v[e] = 1.f;
#endif
#if SUMS
          sum_before[e] = adds ? line.sum.v[e] : 0.f;
#else
          sum_before[e] = 0.f;
#endif
        }
        // The next line's operands travel while this one is computed.
        if (i + 1 < count) line = read_line(ring, i + 1);
        scan_line(h, u, w, until_restart == 0, ends);
        until_restart = (until_restart == 0 ? p.chunk : until_restart) - 1;
#pragma unroll
        for (int e = 0; e < N; ++e) v[e] = SUMS ? fmaf(v[e], h[e], sum_before[e]) : v[e] * h[e];
        if (writes) write_line(v, y, sum);
        y += y_step, sum += sum_step;
      }
    }
  }
};

template <int N>
__device__ __forceinline__ void scan_vertical(const Params& p, Worker& t, const Scan& scan, int d) {
  const Cut cut = cut_of(p, true);
  take_places<N>(t, cut, scan.places);
  const int width = (cut.own + 2 * CLUSTER * cut.beyond + VECTOR - 1) / VECTOR * VECTOR;
  const int first_line = t.segment * p.knobs[5];
  VerticalScan<N> run = {p,     t,          scan,
                         cut,   sources_of(p, t, d), sums_of(p, t),
                         width, cut.stage * width * SIZE,
                         first_line, min(p.knobs[5], scan.lines - first_line), d > 0, d == p.scans - 1};
  run.run();
}
