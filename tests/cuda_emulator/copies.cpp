// Access to memory by the functions of ptx.cuh, and asynchronous copies, as late as they may be.
#include <stdlib.h>
#include <string.h>

#include "device.h"

namespace emulator {

void check_global(const void* p, size_t bytes, size_t alignment, Access access, const char* what, const void* site) {
  const u64 first = (u64)p, last = first + bytes;
  if (first % alignment) fail_at(site, "%s of %p, which is not aligned to %zu bytes", what, p, alignment);
  if (range_count == 0) return;
  if (first < ranges[last_range].first || last > ranges[last_range].last) {
    int i = 0;
    while (i < range_count && (first < ranges[i].first || last > ranges[i].last)) ++i;
    if (i == range_count) fail_at(site, "%s touches %zu bytes outside of the tensors", what, bytes);
    last_range = i;
  }
  const Range& r = ranges[last_range];
  if (!r.access) return;
  for (u64 at = first - r.first; at < last - r.first; ++at) {
    if (r.access[at] & access) {
      if (r.written == SCRATCH && access == WRITE) r.access[at] |= READ;
      continue;
    }
    if (r.written == SCRATCH && access == WRITE)
      fail_at(site, "%s byte %llu of [%s], which the plan has not asked for", what, at, r.name);
    if (r.written == SCRATCH)
      fail_at(site, "%s byte %llu of [%s], which nobody has written (%llu of %zu bytes of this access are before it)", what,
              at, r.name, at - (first - r.first), bytes);
    else
      fail_at(site, "%s byte %llu of [%s], which is no %selement (%llu of %zu bytes of this access are before it)", what,
              at, r.name, access == WRITE ? "output's " : "", at - (first - r.first), bytes);
  }
}

void check_global(const void* p, size_t bytes, size_t alignment, Access access, const char* what) {
  check_global(p, bytes, alignment, access, what, SITE);
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, const void* site) {
  const Fiber* f = self();
  const long long at = (const unsigned char*)p - f->shared;
  if (at < 0 || at + (long long)bytes > (long long)shared_bytes)
    fail_at(site, "%s: bytes %lld to %lld of %zu bytes of shared memory", what, at, at + (long long)bytes, shared_bytes);
  if ((u64)p % alignment) fail_at(site, "%s: byte %lld of shared memory is not aligned to %zu", what, at, alignment);
}

void* cluster_map(const void* p, u32 rank) {
  Fiber* f = self();
  if (rank >= (u32)ranks) fail_at(SITE, "cluster_map to block %u of a cluster of %d", rank, ranks);
  const long long at = (const unsigned char*)p - f->shared;
  if (at < 0 || at > (long long)shared_bytes)
    fail_at(SITE, "cluster_map: byte %lld of %zu bytes of shared memory", at, shared_bytes);
  return f->home[(int)rank - (int)f->rank].shared + at;
}

u32 shared_address(const void* p) { return 1024 + (u32)((const unsigned char*)p - self()->shared); }

// copy_async: done as late as it may be, in the copy_wait of the thread that issued it.

void copy_async(void* shared, const void* global, int size, int bytes) {
  if (bytes < 0 || bytes > size) fail_at(SITE, "copy_async of %d of %d bytes", bytes, size);
  check_shared(shared, (size_t)size, (size_t)size, "copy_async", SITE);
  if (bytes) {
    if ((u64)global % (u64)size) fail_at(SITE, "copy_async from %p, which is not aligned to %d bytes", global, size);
    check_global(global, (size_t)bytes, 1, READ, "copy_async", SITE);
    touch(global, (size_t)bytes, READ, SITE);
  }
  touch(shared, (size_t)size, WRITE, SITE);
  engine(*self()->home, shared, (size_t)size, WRITE, 1);
  memset(shared, 0xff, (size_t)size);
  Fiber* f = self();
  f->copies.push_back({(unsigned char*)shared, (const unsigned char*)global, size, bytes, f->copy_groups});
}

void copy_commit() {
  ++self()->copy_groups;
  may_switch();
}

void copy_wait(int pending) {
  Fiber* f = self();
  may_switch();
  size_t done = 0;
  for (; done < f->copies.size() && f->copies[done].group < f->copy_groups - pending; ++done) {
    const Copy& c = f->copies[done];
    engine(*f->home, c.to, (size_t)c.size, WRITE, -1);
    touch(c.to, (size_t)c.size, WRITE, SITE);
    if (c.bytes) memcpy(c.to, c.from, (size_t)c.bytes);
    memset(c.to + c.bytes, 0, (size_t)(c.size - c.bytes));
  }
  f->copies.erase(f->copies.begin(), f->copies.begin() + (long)done);
}

void complete_bulk(size_t i) {
  const Bulk c = bulks[i];
  bulks[i] = bulks.back();
  bulks.pop_back();
  engine(*c.home, c.to, c.bytes, WRITE, -1);
  memcpy(c.to, c.from ? c.from : (const unsigned char*)&c.value, c.bytes);
  Mbarrier& m = mbarriers[c.barrier];
  m.arriving[c.author] = c.epoch > m.arriving[c.author] ? c.epoch : m.arriving[c.author];
  if (c.known) add(m.arriving, *c.known);
  m.bytes -= c.bytes;
  if (m.bytes <= -(1 << 20)) fail_at(nullptr, "more bytes have come than an mbarrier counts, and nobody expects them");
  may_complete(m);
}

void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar) {
  needs_hopper("bulk_copy", SITE);
  if (bytes % 16) fail_at(SITE, "bulk_copy of %u bytes, which is no multiple of 16", bytes);
  check_shared(shared, bytes, 16, "bulk_copy", SITE);
  check_global(global, bytes, 16, READ, "bulk_copy", SITE);
  const Mbarrier& m = mbarrier_at(bar, "bulk_copy", SITE);
  if (!m.fenced) fail_at(SITE, "bulk_copy: its mbarrier was initialised without mbarrier_init_fence");
  touch(global, bytes, READ, SITE);
  touch(shared, bytes, WRITE, SITE);
  engine(*self()->home, shared, bytes, WRITE, 1);
  memset(shared, 0xff, bytes);
  Fiber* f = self();
  if (bytes)
    bulks.push_back({(unsigned char*)shared, (const unsigned char*)global, bytes, (int)(*bar ^ TOKEN), f->home,
                     f->index, f->now, 0.f, {}});
  ++f->now;
  may_switch();
}

void finish_store(Store& s) {
  if (!s.buffer) return;
  memcpy(s.to, s.buffer, s.bytes);
  free(s.buffer);
  s.buffer = nullptr;
}

// Words for the memory of another block, counted by an mbarrier there: each arrives when it likes.
void store_counted(void* shared, u64* bar, u32 rank, const float* words, int count) {
  needs_hopper("store_counted", SITE);
  // An H200 takes it for an illegal instruction.
  if (ranks == 1) fail_at(SITE, "store_counted in a launch without clusters");
  check_shared(shared, 4 * (size_t)count, 4 * (size_t)count, "store_counted", SITE);
  check_shared(bar, 8, 8, "store_counted", SITE);
  Fiber* f = self();
  float* there = (float*)cluster_map(shared, rank);
  const u64* counter = (const u64*)cluster_map(bar, rank);
  Block& home = f->home[(int)rank - (int)f->rank];
  const u64 i = home.started ? *counter ^ TOKEN : ~0ull;
  if (i >= mbarriers.size() || mbarriers[i].place != counter)
    fail_at(SITE, "store_counted: no mbarrier there%s", home.started ? "" : ", as the block has not started");
  if (!mbarriers[i].fenced) fail_at(SITE, "store_counted: its mbarrier was initialised without mbarrier_init_fence");
  for (int w = 0; w < count; ++w, ++there) {
    touch(there, 4, WRITE, SITE);
    engine(home, there, 4, WRITE, 1);
    memset(there, 0xff, 4);
    bulks.push_back({(unsigned char*)there, nullptr, 4, (int)i, &home, f->index, f->now, words[w], f->known});
  }
  ++f->now;
  may_switch();
}

// bulk_store: reads its source in the wait that makes it legal to overwrite it, and writes as late as that allows.

void bulk_store_fence() {
  self()->home->fenced = true;
  may_switch();
}

void bulk_store(void* global, const void* shared, u32 bytes) {
  needs_hopper("bulk_store", SITE);
  if (bytes % 16) fail_at(SITE, "bulk_store of %u bytes, which is no multiple of 16", bytes);
  check_shared(shared, bytes, 16, "bulk_store", SITE);
  check_global(global, bytes, 16, WRITE, "bulk_store", SITE);
  Fiber* f = self();
  touch(shared, bytes, READ, SITE);
  touch(global, bytes, WRITE, SITE);
  engine(*self()->home, shared, bytes, READ, 1);
  if (!f->home->fenced) fail_at(SITE, "bulk_store, but no thread of the block has called bulk_store_fence");
  f->stores.push_back({(unsigned char*)global, (unsigned char*)shared, nullptr, bytes, f->store_groups});
  may_switch();
}

void bulk_store_commit() {
  ++self()->store_groups;
  may_switch();
}

void bulk_store_wait(int pending, bool only_read) {
  Fiber* f = self();
  may_switch();
  size_t done = 0;
  for (; done < f->stores.size() && f->stores[done].group < f->store_groups - pending; ++done) {
    Store& s = f->stores[done];
    if (!s.buffer) {
      engine(*f->home, s.from, s.bytes, READ, -1);
      touch(s.from, s.bytes, READ, SITE);
      s.buffer = (unsigned char*)memcpy(malloc(s.bytes), s.from, s.bytes);
    }
    if (!only_read) finish_store(s);
  }
  if (!only_read) f->stores.erase(f->stores.begin(), f->stores.begin() + (long)done);
}

}  // namespace emulator
