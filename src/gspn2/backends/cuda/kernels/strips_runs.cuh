// What a cluster scans: runs of tiles, one after the other. A run is a whole plane, or a part of one.
//
// Clusters have planes in turn. Where these do not come out even, the last, as many as are left, are cut:
// their tiles, plane by plane, are dealt out in equal shares. A cluster that has the end of its share in the
// middle of a plane leaves its states in memory, the next one goes on from there. Nobody waits long for them:
// a plane's first part comes before all whole planes, its second behind the first whole plane, and so on, so
// that the time of a plane is between them. And nobody waits for ever: who waits, waits for the cluster before
// it in the grid, which has been started.
#pragma once
#include "strips.cuh"

// Tiles of a plane, in the order of the scan.
struct Run {
  int plane, first, end;
};

struct Runs {
  int width, each;         // columns; tiles of a plane
  bool reversed;
  int first, step, whole;  // whole planes: neighbours, which may share taps, are scanned at the same time
  int cut_plane, cut_tile; // where its share of cut planes begins
  int share, turn;         // how many tiles; whole planes before them

  // Tiles of the share that are the beginning of another plane.
  __device__ __forceinline__ int begun() const { return CUT ? max(0, cut_tile + share - each) : 0; }
  __device__ __forceinline__ int count() const { return whole + (share > 0) + (begun() > 0); }
  __device__ __forceinline__ int tiles() const { return whole * each + share; }

  __device__ __forceinline__ Run run(int number) const {
    int before = number;
    if (begun() > 0 && before-- == 0) return {cut_plane + 1, 0, begun()};
    if (CUT && share > 0) {
      if (before == turn) return {cut_plane, cut_tile, min(each, cut_tile + share)};
      before -= before > turn;
    }
    return {first + before * step, 0, each};
  }

  __device__ __forceinline__ int column(int tile) const {
    return (reversed ? each - 1 - tile : tile) * COLUMNS;
  }
  __device__ __forceinline__ int vectors(int tile) const {
    return min(VECTORS, (width - column(tile)) / VECTOR);
  }
  // Columns that a scan has behind it at a tile that is not the first.
  __device__ __forceinline__ int columns_before(int tile) const {
    return vectors(0) * VECTOR + (tile - 1) * COLUMNS;
  }
};

__device__ __forceinline__ Runs runs_of(const Params& p, int cluster) {
  const int clusters = p.knobs[0], cut = p.knobs[2], planes = p.batch * p.channels - cut;
  const int each = (p.width + COLUMNS - 1) / COLUMNS, whole = (planes - cluster + clusters - 1) / clusters;
  Runs it = {p.width, each, scan_of(p, 0).reversed, cluster, clusters, whole, planes, 0, 0, 0};
  if (!CUT) return it;
  const long long tiles = (long long)cut * each, from = cluster * tiles / clusters;
  const int plane = (int)(from / each);
  // The cluster that has the first tile of this plane: its part is the first, the next one's the second.
  const int starts = (int)(((long long)plane * each * clusters + clusters - 1) / tiles);
  it.cut_plane += plane, it.cut_tile = (int)(from - (long long)plane * each);
  it.share = (int)((cluster + 1) * tiles / clusters - from), it.turn = min(cluster - starts, whole);
  return it;
}

// Where somebody is in the runs of a cluster.
struct Place {
  int number, tile;
  Run run;

  // True if another run begins.
  __device__ __forceinline__ bool next(const Runs& runs) {
    if (++tile < run.end) return false;
    if (++number == runs.count()) return false;
    run = runs.run(number), tile = run.first;
    return true;
  }
};

__device__ __forceinline__ Place start_of(const Runs& runs) {
  const Run run = runs.run(0);
  return {0, run.first, run};
}
