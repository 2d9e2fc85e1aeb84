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
    Stored<N> before, here, after, x;
#if HAS_LAM
    Stored<N> lam;
#endif
#if HAS_GATE
    Stored<N> gate;
#endif
#if SUMS
    Pack<float, N> sum;
#endif
  };

  __device__ __forceinline__ int row(int line) const {
    return scan.reversed ? scan.lines - 1 - (first_line + line) : first_line + line;
  }

#if BULK
  // Rows of the block's places, one bulk copy each; warps take the lines in turn.
  __device__ __forceinline__ void copy_stage(int stage) const {
    if (t.lane != 0) return;
    u64* full = (u64*)shared_memory() + (t.bulk_stages + stage) % STAGES;
    unsigned char* ring = t.ring + stage % STAGES * stage_bytes(t, tile);
    const int line0 = stage * cut.stage, count = min(cut.stage, lines - line0), held = max(0, t.end - t.begin);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, mine = (count - warp + warps - 1) / warps;
    const int tensors = 3 + t.channels * TENSORS, of_sums = SUMS && adds ? t.channels * 4 : 0;
    mbarrier_arrive_expect(full, max(0, mine) * held * (tensors * SIZE + of_sums));
    if (held == 0) return;
#pragma unroll 1
    for (int line = warp; line < count; line += warps) copy_line(ring, line, row(line0 + line), held, full);
  }

  __device__ __forceinline__ void copy_line(unsigned char* ring, int line, int row, int held, u64* full) const {
    unsigned char* to = ring + line * width * SIZE;
    const int bytes = held * SIZE;
    const storage_t* taps = from.taps + row * p.taps.h + t.begin;
#pragma unroll
    for (int k = 0; k < 3; ++k, to += tile) copy_row(to, taps + k * p.taps.k, bytes, full, t.of_taps);
#pragma unroll 1
    for (int c = 0; c < t.channels; ++c) {
      bulk_copy(to, from.x + c * p.x.c + row * p.x.h + t.begin, bytes, full), to += tile;
      if (HAS_LAM) copy_row(to, from.lam + c * p.lam.c + row * p.lam.h + t.begin, bytes, full, t.once), to += tile;
      if (HAS_GATE) copy_row(to, from.gate + c * p.gate.c + row * p.gate.h + t.begin, bytes, full, t.once), to += tile;
      if (SUMS && adds)
        bulk_copy(ring + sums_offset(t, c, tile) + line * width * 4, sums.data + c * sums.c + row * sums.h + t.begin,
                  held * 4, full);
    }
  }

  __device__ __forceinline__ void wait_bulk(int stage) const {
    const int n = t.bulk_stages + stage;
    mbarrier_wait((u64*)shared_memory() + n % STAGES, n / STAGES & 1);
  }
#else
  __device__ __forceinline__ void wait_bulk(int) const {}

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
#pragma unroll 1
    for (int c = 0; c < t.channels; ++c) {
      unsigned char* to = shared + channel_offset(c, tile);
      copy_vector(to, from.x + c * p.x.c + row * p.x.h + place, bytes);
      if (HAS_LAM) copy_vector(to + tile, from.lam + c * p.lam.c + row * p.lam.h + place, bytes);
      if (HAS_GATE) copy_vector(to + (TENSORS - 1) * tile, from.gate + c * p.gate.c + row * p.gate.h + place, bytes);
    }
    if (SUMS && adds) copy_sums(ring + at * 4, row, place, bytes);
  }

  __device__ __forceinline__ void copy_sums(unsigned char* shared, int row, int place, int bytes) const {
#pragma unroll 1
    for (int c = 0; c < t.channels; ++c) {
      const float* sum = sums.data + c * sums.c + row * sums.h + place;
      unsigned char* to = shared + sums_offset(t, c, tile);
#if STORAGE == 0
      copy_vector(to, sum, bytes);
#else
      copy_sums_vector(to, sum, bytes / SIZE);
      copy_sums_vector(to + 16, sum + 4, bytes / SIZE - 4);
#endif
    }
  }
#endif

  __device__ __forceinline__ Line read_line(const unsigned char* ring, int line) const {
    const int at = line * width + (t.inside ? t.first - t.begin : 0);
    const unsigned char *taps = ring + at * SIZE, *tensors = taps + channel_offset(t.mine, tile);
    typedef const Stored<N>* Source;
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
      store_places(sum, pack, RAGGED ? scan.places - t.first : N);
    } else {
      Pack<storage_t, N> pack;
#pragma unroll
      for (int e = 0; e < N; ++e) pack.v[e] = narrow(v[e]);
      store_places(y, pack, RAGGED ? scan.places - t.first : N);
    }
  }

  // What one line does to the states: its operands, unpacked.
  struct Step {
    float u[N], gate[N], sum[N];
    Taps w[N];
  };

  __device__ __forceinline__ Step unpack(const Line& line, const Ends& ends) const {
    Step s;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      s.u[e] = element(line.x, e);
#if HAS_LAM
      s.u[e] *= element(line.lam, e);
#endif
      s.w[e] = tap_weights({element(line.before, e), element(line.here, e), element(line.after, e)},
                           has_before<N>(ends, e), has_after<N>(ends, e));
#if HAS_GATE
      s.gate[e] = element(line.gate, e);
#endif
#if SUMS
      s.sum[e] = adds ? line.sum.v[e] : 0.f;
#endif
    }
    return s;
  }

  // gate h, added to the sum of earlier directions.
  __device__ __forceinline__ void weigh(const Step& s, const float (&h)[N], float (&v)[N]) const {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      v[e] = h[e];
#if HAS_GATE
      v[e] *= s.gate[e];
#endif
#if SUMS
      v[e] += s.sum[e];
#endif
    }
  }

  // The stage is there, everybody is done with the one before, and states are exchanged; then the next copies start.
  __device__ __forceinline__ void enter_stage(int stage, int stages, float (&h)[N]) const {
    if (!BULK) copy_wait<STAGES - 2>();
    const bool exchanges = stage > 0 && shared_line(cut);
    if (exchanges) publish(t, cut, h, true);
    barrier(true);
    if (stage + STAGES - 1 < stages) copy_stage(stage + STAGES - 1);
    if (!BULK) copy_commit();
    if (exchanges) refresh(t, h, true);
    if (BULK) wait_bulk(stage);
  }

  // Where a thread is in the scan.
  struct Cursor {
    const unsigned char* ring;  // the stage
    int next;                   // line of the stage whose operands are not loaded yet
    Line line;                  // operands of the line before that
    storage_t* y;
    float* sum;
    long long y_step, sum_step;
    bool writes;
  };

  __device__ __forceinline__ void scan_next(Cursor& at, int count, float (&h)[N], bool restart,
                                            const Ends& ends) const {
    const Step step = unpack(at.line, ends);
    // The next line's operands travel while this one is computed.
    if (at.next < count) at.line = read_line(at.ring, at.next);
    ++at.next;
    scan_line(h, step.u, step.w, restart, ends);
    float v[N];
    weigh(step, h, v);
    if (at.writes) write_line(v, at.y, at.sum);
    at.y += at.y_step;
    if (SUMS) at.sum += at.sum_step;
  }

  // The lines of one stage, in runs without exchange and restart.
  __device__ __forceinline__ void scan_stage(Cursor& at, int count, float (&h)[N], int& until_restart,
                                             const Ends& ends) const {
    int until_exchange = cut.run, until_crossing = cut.beyond;
    at.line = read_line(at.ring, 0);
    at.next = 1;
    for (int i = 0; i < count;) {
      if (until_exchange == 0) {
        const bool across = CLUSTER && until_crossing == 0;
        exchange(t, cut, h, across);
        until_exchange = cut.run;
        if (across) until_crossing = cut.beyond;
      }
      int lines_now = 1;
      if (until_restart == 0) {
        scan_next(at, count, h, true, ends);
        until_restart = p.chunk;
      } else {
        lines_now = min(min(until_exchange, until_restart), count - i);
#pragma unroll 1
        for (int n = 0; n < lines_now; ++n) scan_next(at, count, h, false, ends);
      }
      i += lines_now;
      until_restart -= lines_now, until_exchange -= lines_now, until_crossing -= lines_now;
    }
  }

  __device__ __forceinline__ void run() {
    const int stages = (lines + cut.stage - 1) / cut.stage;
    const Ends ends = ends_of<N>(t, scan.places);
    const long long c = t.channel + t.mine;
    Cursor at;
    at.writes = t.owner && t.first >= t.own_begin && t.first < t.own_end;
    at.y = p.y.data + t.b * p.y.b + c * p.y.c + row(0) * p.y.h + t.first;
    at.y_step = line_step(p.y, scan);
    at.sum = sums.data + t.mine * sums.c + row(0) * sums.h + t.first;
    at.sum_step = scan.reversed ? -sums.h : sums.h;
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < stages) copy_stage(s);
      if (!BULK) copy_commit();
    }
    float h[N];
#pragma unroll
    for (int e = 0; e < N; ++e) h[e] = 0.f;
    int until_restart = 0;
#pragma unroll 1
    for (int s = 0; s < stages; ++s) {
      enter_stage(s, stages, h);
      at.ring = t.ring + s % STAGES * stage_bytes(t, tile);
      scan_stage(at, min(cut.stage, lines - s * cut.stage), h, until_restart, ends);
    }
    if (BULK) t.bulk_stages += stages;
  }
};

template <int N>
__device__ __forceinline__ void scan_vertical(const Params& p, Worker& t, const Scan& scan, int d) {
  const Cut cut = cut_of(p, true);
  take_places<N>(t, cut, scan.places);
  const int width = (cut.own + 2 * cut.beyond + VECTOR - 1) / VECTOR * VECTOR;
  const int first_line = t.segment * p.knobs[4];
  VerticalScan<N> run = {p,     t,          scan,
                         cut,   sources_of(p, t, d), sums_of(p, t),
                         width, cut.stage * width * SIZE,
                         first_line, min(p.knobs[4], scan.lines - first_line), d > 0, d == p.scans - 1};
  run.run();
}
