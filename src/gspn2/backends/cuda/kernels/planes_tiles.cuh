// Planes by tiles: what the kernels leave for each other.
//
// Scans over whole planes, states forward and in backward their gradients back, leave nothing but what
// enters tiles of SIDE x SIDE places. Then each tile computes its states, and gradients, again, all
// directions on the chip. A tile is cut into segments of LINES lines for each direction; what enters one is
//   - the line before it: the states (forward), or what later lines hand on to its last line (back), and
//   - at each of its lines, from beside the tile: the states of the line before that are next to the first
//     and the last place (forward), or what later lines' places there hand on to these two (back).
// Lines and places are counted as they are in the image, whichever way a scan goes; but the numbers of a
// tile's sides come in the order of the scan.
//
// Macro beside those of common.cuh: BACKWARD, gradients instead of y.
#pragma once
#include "common.cuh"

namespace tiles {

constexpr int SIDE = 32;
constexpr int LINES = 16;

// Of one plane and one walk: [segments][places], then [tiles along a line][first, last place][lines].
struct Borders {
  float *entering, *sides;
  int places, lines;  // in memory: whole tiles
  bool reversed;

  __device__ __forceinline__ float* line(int segment, int place) const {
    return entering + (long long)segment * places + place;
  }
  // From the first of `count` lines, `line` and those after it in the image.
  __device__ __forceinline__ float* side(int tile, int last, int line, int count) const {
    return sides + (long long)(2 * tile + last) * lines + (reversed ? lines - count - line : line);
  }
};

__device__ __forceinline__ int whole(int v) { return (v + SIDE - 1) / SIDE * SIDE; }

// Numbers of one plane and walk, lines and sides.
__device__ __forceinline__ long long plane_of_borders(const Params& p) {
  return (long long)whole(p.height) * whole(p.width) / LINES * 2;
}

// Scratch: 0 the borders, [D][forward, and with BACKWARD back][B][C].
__device__ __forceinline__ Borders borders_of(const Params& p, int d, bool back, int b, int channel) {
  const int height = whole(p.height), width = whole(p.width);
  const long long half = (long long)height * width / LINES;  // as many numbers in lines as in sides
  static_assert(2 * LINES == SIDE, "two sides of a tile are as long as what enters its segments");
  const long long walk = ((BACKWARD ? 2 * d + back : d) * (long long)p.batch + b) * p.channels + channel;
  float* all = (float*)p.scratch[0] + 2 * walk * half;
  const bool vertical = p.directions[d] < 2;
  return {all, all + half, vertical ? width : height, vertical ? height : width, (p.directions[d] & 1) != 0};
}

// The segment that a walk enters after `line`, or -1.
__device__ __forceinline__ int entered_after(int line, int lines, bool rising) {
  if (rising) return (line + 1) % LINES == 0 && line + 1 < lines ? (line + 1) / LINES : -1;
  return line % LINES == 0 ? line / LINES - 1 : -1;
}

// Scratch: 1 weights made from logits, [D][B][G][2][H][row] of float16: those of the neighbours before and
// after.
__device__ __forceinline__ const unsigned short* weights_of(const Params& p, int d, int b, int group,
                                                            int row) {
  const long long plane = (long long)p.height * row;
  return (const unsigned short*)p.scratch[1] + (((long long)d * p.batch + b) * p.groups + group) * 2 * plane;
}

}  // namespace tiles
