// Warp collectives, barriers of blocks and clusters, mbarriers.
#include "device.h"

namespace emulator {

namespace {

// A barrier of some of a block's threads takes whole warps, and all lanes of one come to it by the same instruction.
void check_warps(const Barrier& barrier, void* site) {
  for (Fiber* f : barrier.waiting) warps[f->warp].at_barrier |= 1u << f->lane;
  for (Fiber* f : barrier.waiting) {
    Warp& w = warps[f->warp];
    if (w.at_barrier != w.lanes && w.at_barrier)
      fail_at(site, "a block barrier met by lanes %08x only of a warp", w.at_barrier);
    w.at_barrier = 0;
    if (f->site != w.fibers->site)
      fail_at(site, "a block barrier that lanes of a warp come to in different branches; lane %d @{%p}", f->lane, f->site);
  }
}

void release(Barrier& barrier) {
  meet(barrier.waiting);
  for (Fiber* f : barrier.waiting) {
    f->result = (u64)barrier.votes;
    if (f != self()) make_ready(f);
  }
  barrier.waiting.clear();
  barrier.votes = 0;
}

}  // namespace

namespace {

u64 combine(Collective kind, u64 a, u64 b) {
  switch (kind) {
    case ADD: return a + b;
    case MIN: return (u32)a < (u32)b ? a : b;
    case MAX: return (u32)a > (u32)b ? a : b;
    case MIN_SIGNED: return (int)a < (int)b ? a : b;
    case MAX_SIGNED: return (int)a > (int)b ? a : b;
    case AND: return a & b;
    case OR: return a | b;
    case XOR: return a ^ b;
    default: return 0;
  }
}

void complete(Warp& w, const Meeting& m) {
  static std::vector<Fiber*> lanes;
  lanes.clear();
  u64 all = 0;
  bool first = true;
  for (u32 rest = m.mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const u64 value = w.fibers[lane].value;
    if (m.kind == BALLOT)
      all |= value << lane;
    else
      all = first ? value : combine(m.kind, all, value);
    first = false;
  }
  for (u32 rest = m.mask; rest; rest &= rest - 1) {
    Fiber& f = w.fibers[__builtin_ctz(rest)];
    // What a lane outside the mask holds is undefined.
    f.result = m.kind != SHUFFLE ? all : m.mask >> f.source & 1 ? w.fibers[f.source].value : ~0ull;
    lanes.push_back(&f);
    if (&f != self()) make_ready(&f);
  }
  // Of all collectives only __syncwarp orders memory.
  if (m.kind == SYNC) meet(lanes);
}

}  // namespace

u64 collective(Collective kind, u32 mask, u64 value, u32 source) {
  Fiber* f = self();
  Warp& w = warps[f->warp];
  const u32 bit = 1u << f->lane;
  if (!(mask & bit)) fail_at(SITE, "the mask %08x of a warp collective leaves out the lane that calls it", mask);
  if (mask & w.exited) fail_at(SITE, "lanes %08x of a warp collective's mask %08x have left", mask & w.exited, mask);
  mask &= w.lanes;
  f->value = value;
  f->source = source & 31;
  size_t i = 0;
  while (i < w.meetings.size() && w.meetings[i].mask != mask) ++i;
  if (i == w.meetings.size()) w.meetings.push_back({mask, 0, kind});
  Meeting& m = w.meetings[i];
  if (m.kind != kind) fail_at(SITE, "lanes %08x of the warp are in another kind of collective", m.arrived);
  m.arrived |= bit;
  if (m.arrived != mask) {
    f->wait_mask = mask;
    wait("a warp collective", SITE);
    return f->result;
  }
  const Meeting done = m;
  m = w.meetings.back();
  w.meetings.pop_back();
  complete(w, done);
  may_switch();
  return f->result;
}

int block_barrier(int id, int expected, int vote) {
  Fiber* f = self();
  if (id < 0 || id > 15) fail_at(SITE, "barrier %d: a block has barriers 0 to 15", id);
  if (expected < 1 || expected > threads || (expected % 32 && (id || expected != threads)))
    fail_at(SITE, "barrier %d of %d threads: whole warps of a block of %d threads", id, expected, threads);
  Barrier& barrier = f->home->barriers[id];
  if (barrier.waiting.empty()) barrier.expected = expected;
  if (barrier.expected != expected)
    fail_at(SITE, "barrier %d of %d threads, where others said %d", id, expected, barrier.expected);
  barrier.votes += vote;
  f->site = SITE;
  barrier.waiting.push_back(f);
  if ((int)barrier.waiting.size() < expected) {
    f->wait_mask = (u32)id;
    wait("a block barrier", SITE);
    return (int)f->result;
  }
  check_warps(barrier, SITE);
  release(barrier);
  may_switch();
  return (int)f->result;
}

void cluster_barrier() {
  needs_hopper("cluster_barrier", SITE);
  Fiber* f = self();
  cluster.waiting.push_back(f);
  if ((int)cluster.waiting.size() < threads * ranks) return wait("cluster_barrier", SITE);
  release(cluster);
  may_switch();
}

// mbarriers -------------------------------------------------------------------------------------------------

Mbarrier& mbarrier_at(u64* bar, const char* what, void* site) {
  check_shared(bar, 8, 8, what, site);
  const u64 i = *bar ^ TOKEN;
  if (i >= mbarriers.size() || mbarriers[i].place != bar)
    fail_at(site, "%s: no mbarrier at byte %td of shared memory (not initialised, or overwritten)", what,
            (unsigned char*)bar - self()->shared);
  if (!mbarriers[i].fenced && mbarriers[i].author != self())
    fail_at(site, "%s: its mbarrier was initialised without mbarrier_init_fence", what);
  return mbarriers[i];
}

void may_complete(Mbarrier& m) {
  if (m.pending > 0 || m.bytes != 0) return;
  m.phase ^= 1;
  m.pending = m.count;
  m.completed = std::make_shared<const std::vector<u32>>(m.arriving);
  for (Fiber* f : m.waiting) make_ready(f);
  m.waiting.clear();
}

void mbarrier_init(u64* bar, int count) {
  check_shared(bar, 8, 8, "mbarrier_init", SITE);
  if (count < 1 || count > (1 << 20) - 1) fail_at(SITE, "mbarrier_init with a count of %d", count);
  for (const Mbarrier& m : mbarriers)
    if (m.place == bar) fail_at(SITE, "mbarrier_init of an mbarrier that is one already");
  *bar = TOKEN ^ mbarriers.size();
  mbarriers.push_back({bar, self()->home, count, count, 0, 0, false, self(), {}, std::vector<u32>(fibers.size()), {}});
}

void mbarrier_init_fence() {
  needs_hopper("mbarrier_init_fence", SITE);
  for (Mbarrier& m : mbarriers)
    if (m.author == self()) m.fenced = true;
  may_switch();
}

void mbarrier_arrive(u64* bar, u32 expected_bytes, const char* what) {
  Mbarrier& m = mbarrier_at(bar, what, SITE);
  m.bytes += expected_bytes;
  if (m.bytes >= 1 << 20) fail_at(SITE, "%s: %lld bytes under way; an mbarrier counts to 2^20 - 1", what, m.bytes);
  release_to(m.arriving);
  if (--m.pending < 0) fail_at(SITE, "%s: more than the %d arrivals of this phase", what, m.count);
  may_complete(m);
  may_switch();
}

void mbarrier_wait(u64* bar, u32 parity) {
  needs_hopper("mbarrier_wait", SITE);
  if (parity > 1) fail_at(SITE, "mbarrier_wait for parity %u", parity);
  may_switch();
  Fiber* f = self();
  // Asked again after each wake: a phase that comes and goes meanwhile is missed, as it may be on the device.
  while (mbarrier_at(bar, "mbarrier_wait", SITE).phase == parity) {
    mbarrier_at(bar, "mbarrier_wait", SITE).waiting.push_back(f);
    f->wait_on = bar;
    f->wait_mask = parity;
    wait("mbarrier_wait", SITE);
    f->wait_on = nullptr;
  }
  acquire(mbarrier_at(bar, "mbarrier_wait", SITE).completed);
}

}  // namespace emulator
