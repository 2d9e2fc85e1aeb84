// The order in which backward for channels that are adjacent goes through lines: segments, phases, and what is set on its
// way next.
#pragma once
#include "pixels_backward.cuh"

// The segments of a direction: of lines [0, boundary) and of [boundary, lines).
struct Segments {
  int lines, boundary;

  __device__ __forceinline__ int count(bool upper) const {
    return ((upper ? lines - boundary : boundary) + SEGMENT - 1) / SEGMENT;
  }
};

__device__ __forceinline__ int segments_of(int lines) { return (lines + SEGMENT - 1) / SEGMENT; }

// The adjoint over lines [begin, end) of a direction. `add` to the sums of dx that are there; `last`: the sum is dx.
struct Phase {
  int begin, end;
  bool add, last;
  int first_segment;  // kept states that belong to lines before these
};

__device__ __forceinline__ void line_barrier() {
  if (STRIPS > 1) __syncthreads();
}

#if HAS_HIDDEN
// Which line is set on its way next: from the last to the first.
struct Queue {
  int line, begin;

  __device__ __forceinline__ void start(const Phase& phase) { line = phase.end - 1, begin = phase.begin; }

  __device__ __forceinline__ void copy(Walker& walk, int slot, bool add) {
    if (line >= begin) {
      walk.copy_line(slot, add, line == 0);
      walk.move_read(-1);
      line--;
    }
    copy_commit();
  }
};
#else
// Which line is set on its way next: a segment's lines forwards, then those of the segment before. A segment's lines
// take the slots in the order in which the segment after leaves them, which is every other time from the last on.
struct Queue {
  int first, end, segment, line;
  int kept, parity;  // kept states of the segment, and where they go

  __device__ __forceinline__ void start(const Phase& phase) {
    segment = segments_of(phase.end - phase.begin) - 1;
    first = line = phase.begin + segment * SEGMENT;
    end = phase.end;
    kept = phase.first_segment + segment;
    parity = 0;
  }

  __device__ __forceinline__ void copy(Walker& walk, int slot, bool add) {
    if (segment >= 0) {
      walk.copy_line(slot, add, false);
      if (line == first) walk.copy_kept(parity, kept, first == 0);
      if (line + 1 < end) {
        line++;
        walk.move_read(1);
      } else {
        walk.move_read(first - SEGMENT - line);
        end = first;
        first -= SEGMENT;
        line = first;
        segment--, kept--, parity ^= 1;
      }
    }
    copy_commit();
  }
};

__device__ __forceinline__ int slot_of(int k, int parity) { return parity ? SEGMENT - 1 - k : k; }
#endif
