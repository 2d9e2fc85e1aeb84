// The emulated device: runs a grid, cluster after cluster, every thread of a cluster a fiber. README.md says what it
// finds and what it cannot.
#include "runtime.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>

#include "fiber.h"

namespace emulator {

Thread* current;

namespace {

struct Copy {  // of copy_async
  unsigned char* to;
  const unsigned char* from;
  int size, bytes, group;
};

struct Store {  // of bulk_store
  unsigned char *to, *from, *buffer;  // buffer: what was read, once it was
  u32 bytes;
  int group;
};

struct Block;

struct Fiber : Thread {
  Context context;
  Block* home;
  int warp, lane;
  const char* waits;    // for what: null while it can run
  const void* wait_on;  // of an mbarrier
  u32 wait_mask;        // of a warp collective; id and threads of a block barrier
  void* site;           // where in the kernel
  u32 source;           // of a collective
  u64 value, result;
  bool exited, fence_missing;
  int copy_groups, store_groups;
  std::vector<Copy> copies;
  std::vector<Store> stores;
};

// A warp collective that lanes have come to; several with disjoint masks may be open.
struct Meeting {
  u32 mask, arrived;
  Collective kind;
};

struct Warp {
  Fiber* fibers;
  u32 lanes, exited, ready;  // masks
  int place;                 // in the list of ready warps, or -1
  u32 priority;
  std::vector<Meeting> meetings;
};

struct Barrier {
  int expected = 0, votes = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  Fiber* fibers;
  Guarded* memory;
  unsigned char* shared;
  Barrier barriers[16];
  int running;
  bool started, fenced;
};

// An mbarrier's place in shared memory holds a token that leads here.
struct Mbarrier {
  u64* place;
  Block* home;
  int count, pending;
  long long bytes;
  u32 phase;
  bool fenced;
  Fiber* author;
  std::vector<Fiber*> waiting;
};
constexpr u64 TOKEN = 0x6d62617272ull << 24;

struct Bulk {
  unsigned char* to;
  const unsigned char* from;
  u32 bytes;
  int barrier;
  Block* home;
};

// How the next thread is chosen: by chance; by chance among the threads of a warp as long as it can run; or by
// priorities that seldom change, so that some warp is as far behind all others as it can be.
enum Order { CHANCE, WARP_FIRST, PRIORITY };

struct Range {  // of global memory; the layout is that of emulator.py
  u64 first, last;
  const unsigned char* access;  // of each byte, or null: all of it may be read and written
  char name[40];
};

void (*entry)(const void*);
const void* params;
int threads, ranks;
size_t shared_bytes;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Block> blocks;
std::vector<Guarded> stacks, shared_memories;
std::vector<Mbarrier> mbarriers;
std::vector<Bulk> bulks;
std::vector<int> ready;
Barrier cluster;
int alive;
Order order;
bool bulks_early;
u64 chance_state;
u64 switches, watched;
Fiber* watched_fiber;
const Range* ranges;
int range_count, last_range;
Context launcher;
sigjmp_buf fault;
bool failed;
char* message;
size_t message_size;

Fiber* self() { return static_cast<Fiber*>(current); }

u32 random_below(u32 n) {
  chance_state ^= chance_state >> 12;
  chance_state ^= chance_state << 25;
  chance_state ^= chance_state >> 27;
  return (u32)((chance_state * 0x2545f4914f6cdd1dull >> 32) * n >> 32);
}

#define SITE __builtin_return_address(0)

// Messages: @{address} is replaced by file and line in emulator.py.
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
void say(const char* format, va_list arguments) {
  const size_t used = strlen(message);
  vsnprintf(message + used, message_size - used, format, arguments);
}
void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  say(format, arguments);
  va_end(arguments);
}
void say_thread(const Fiber* f) { say("block %u, thread %u: ", f->block.x, f->thread.x); }

[[noreturn]] void leave() {
  failed = true;
  Context dead;
  gspn2_switch(&dead, &launcher);
  abort();
}

[[noreturn]] void fail_at(const void* site, const char* format, ...) __attribute__((format(printf, 2, 3)));
void fail_at(const void* site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  say_thread(self());
  say(format, arguments);
  va_end(arguments);
  if (site) say(" @{%p}", site);
  leave();
}

// Choosing who runs -----------------------------------------------------------------------------------------

void make_ready(Fiber* f) {
  Warp& w = warps[f->warp];
  f->waits = nullptr;
  if (!w.ready) {
    w.place = (int)ready.size();
    ready.push_back(f->warp);
  }
  w.ready |= 1u << f->lane;
}

void take(Warp& w, int lane) {
  w.ready &= ~(1u << lane);
  if (w.ready) return;
  ready[w.place] = ready.back();
  warps[ready[w.place]].place = w.place;
  ready.pop_back();
  w.place = -1;
}

void complete_bulk(size_t i);

int choose_warp(const Fiber* last) {
  if (order == WARP_FIRST && last && warps[last->warp].ready && random_below(64)) return last->warp;
  if (order != PRIORITY) return ready[random_below((u32)ready.size())];
  int best = ready[0];
  for (int w : ready)
    if (warps[w].priority > warps[best].priority) best = w;
  if (!random_below(512)) warps[best].priority = random_below(1 << 30);
  return best;
}

Fiber* choose(const Fiber* last) {
  // The copy engine's turn comes when nothing else can run (the latest that is legal), or earlier, by chance.
  while (!bulks.empty() && (ready.empty() || (bulks_early && !random_below(16))))
    complete_bulk(random_below((u32)bulks.size()));
  if (ready.empty()) return nullptr;
  Warp& w = warps[choose_warp(last)];
  const u32 start = random_below(32);
  const u32 turned = w.ready >> start | (u32)((u64)w.ready << 32 >> start);
  const int lane = (int)((start + (u32)__builtin_ctz(turned)) & 31);
  take(w, lane);
  return w.fibers + lane;
}

void run_another() {
  Fiber *from = self(), *to = choose(from);
  if (to == from) return;
  ++switches;
  if (to) {
    current = to;
    gspn2_switch(&from->context, &to->context);
  } else {
    gspn2_switch(&from->context, &launcher);
  }
}

void wait(const char* why, void* site) {
  self()->waits = why;
  self()->site = site;
  run_another();
}

void release(Barrier& barrier, int votes) {
  for (Fiber* f : barrier.waiting) {
    f->result = (u64)votes;
    if (f != self()) make_ready(f);
  }
  barrier.waiting.clear();
  barrier.votes = 0;
}

// Deadlock --------------------------------------------------------------------------------------------------

void say_wait(const Fiber& f) {
  const Block& b = *f.home;
  say("waits in %s", f.waits);
  if (f.wait_on) {
    for (const Mbarrier& m : mbarriers)
      if (m.place == f.wait_on)
        say(" at byte %td of shared memory for parity %u (phase %u; missing: %d arrivals, %lld bytes)",
            (unsigned char*)m.place - b.shared, f.wait_mask, m.phase, m.pending, m.bytes);
  } else if (!strcmp(f.waits, "a block barrier")) {
    const Barrier& barrier = b.barriers[f.wait_mask];
    say(" (id %u: %zu of %d threads are there)", f.wait_mask, barrier.waiting.size(), barrier.expected);
  } else if (!strcmp(f.waits, "a warp collective")) {
    for (const Meeting& m : warps[f.warp].meetings)
      if (m.mask == f.wait_mask) say(" of lanes %08x (there: %08x)", m.mask, m.arrived);
  }
  say(" @{%p}\n", f.site);
}

void report_deadlock() {
  say("deadlock: no thread can run\n");
  int lines = 0;
  for (size_t i = 0; i < fibers.size();) {
    const Fiber& f = fibers[i];
    size_t end = i + 1;
    while (end < fibers.size() && fibers[end].home == f.home && fibers[end].waits == f.waits &&
           fibers[end].exited == f.exited && fibers[end].site == f.site && fibers[end].wait_on == f.wait_on &&
           fibers[end].wait_mask == f.wait_mask)
      ++end;
    if (lines++ < 16) {
      say("  block %u, threads %u-%zu: ", f.block.x, f.thread.x, f.thread.x + end - i - 1);
      if (f.exited)
        say("have left\n");
      else
        say_wait(f);
    }
    i = end;
  }
}

// A thread's life -------------------------------------------------------------------------------------------

void start_block(Block& b) {
  b.started = true;
  if (ranks > 1) b.memory->allow(true);
  memset(b.memory->first, 0xff, (size_t)(b.memory->last - b.memory->first));
}

void check_canaries(const Block& b) {
  const unsigned char* parts[2][2] = {{b.memory->first, b.shared}, {b.shared + shared_bytes, b.memory->last}};
  for (auto& part : parts)
    for (const unsigned char* p = part[0]; p < part[1]; ++p)
      if (*p != 0xff)
        fail_at(nullptr, "byte %td of the %zu bytes of shared memory was written by some thread of this block",
                p - b.shared, shared_bytes);
}

void end_block(Block& b) {
  for (const Bulk& c : bulks)
    if (c.home == &b)
      fail_at(nullptr, "the block ends while a bulk_copy of %u bytes to byte %td of its shared memory is under way",
              c.bytes, c.to - b.shared);
  check_canaries(b);
  if (ranks > 1) b.memory->allow(false);
}

void finish_store(Store& s) {
  if (!s.buffer) return;
  memcpy(s.to, s.buffer, s.bytes);
  free(s.buffer);
  s.buffer = nullptr;
}

void exit_thread() {
  Fiber* f = self();
  f->exited = true;
  const u32 bit = 1u << f->lane;
  Warp& w = warps[f->warp];
  w.exited |= bit;
  for (const Meeting& m : w.meetings)
    if (m.mask & bit) {
      f->exited = false;
      fail_at(nullptr, "leaves while lanes %08x of its warp wait for it in a warp collective", m.arrived);
    }
  for (Store& s : f->stores)
    if (!s.buffer)
      fail_at(nullptr, "leaves while a bulk_store of it may still read shared memory: bulk_store_wait_read<0>");
  for (Store& s : f->stores) finish_store(s);
  f->stores.clear();
  --alive;
  if (--f->home->running == 0) end_block(*f->home);
  run_another();
  abort();
}

void run_thread() {
  if (!self()->home->started) start_block(*self()->home);
  entry(params);
  exit_thread();
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  say_thread(self());
  say(format, arguments);
  va_end(arguments);
  say(" @{%p}", SITE);
  leave();
}

void may_switch() {
  if (random_below(8)) return;
  make_ready(self());
  run_another();
}

void give_way() {
  warps[self()->warp].priority = 0;
  make_ready(self());
  run_another();
}

// Barriers --------------------------------------------------------------------------------------------------

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

void meet(Warp& w, const Meeting& m) {
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
    if (&f != self()) make_ready(&f);
  }
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
  const Meeting complete = m;
  m = w.meetings.back();
  w.meetings.pop_back();
  meet(w, complete);
  may_switch();
  return f->result;
}

int block_barrier(int id, int expected, int vote) {
  Fiber* f = self();
  if (id < 0 || id > 15) fail_at(SITE, "barrier %d: a block has barriers 0 to 15", id);
  if (expected < 1 || expected > threads || (expected % 32 && expected != threads))
    fail_at(SITE, "barrier %d of %d threads: whole warps of a block of %d threads", id, expected, threads);
  Barrier& barrier = f->home->barriers[id];
  if (barrier.waiting.empty()) barrier.expected = expected;
  if (barrier.expected != expected)
    fail_at(SITE, "barrier %d of %d threads, where others said %d", id, expected, barrier.expected);
  barrier.votes += vote;
  barrier.waiting.push_back(f);
  if ((int)barrier.waiting.size() < expected) {
    f->wait_mask = (u32)id;
    wait("a block barrier", SITE);
    return (int)f->result;
  }
  release(barrier, barrier.votes);
  may_switch();
  return (int)f->result;
}

void cluster_barrier() {
  Fiber* f = self();
  cluster.waiting.push_back(f);
  if ((int)cluster.waiting.size() < threads * ranks) return wait("cluster_barrier", SITE);
  release(cluster, 0);
  may_switch();
}

// Memory ----------------------------------------------------------------------------------------------------

void check_global(const void* p, size_t bytes, size_t alignment, Access access, const char* what) {
  const u64 first = (u64)p, last = first + bytes;
  if (first % alignment) fail_at(SITE, "%s of %p, which is not aligned to %zu bytes", what, p, alignment);
  if (range_count == 0) return;
  if (first < ranges[last_range].first || last > ranges[last_range].last) {
    int i = 0;
    while (i < range_count && (first < ranges[i].first || last > ranges[i].last)) ++i;
    if (i == range_count) fail_at(SITE, "%s of %zu bytes outside of the tensors", what, bytes);
    last_range = i;
  }
  const Range& r = ranges[last_range];
  if (!r.access) return;
  for (u64 at = first - r.first; at < last - r.first; ++at)
    if (!(r.access[at] & access))
      fail_at(SITE, "%s: byte %llu of the %zu bytes from byte %llu of [%s] on is not %s", what, at - (first - r.first),
              bytes, first - r.first, r.name, access == WRITE ? "an output's" : "an element's");
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const Fiber* f = self();
  const long long at = (const unsigned char*)p - f->shared;
  if (at < 0 || at + (long long)bytes > (long long)shared_bytes)
    fail_at(SITE, "%s: bytes %lld to %lld of %zu bytes of shared memory", what, at, at + (long long)bytes, shared_bytes);
  if ((u64)p % alignment) fail_at(SITE, "%s: byte %lld of shared memory is not aligned to %zu", what, at, alignment);
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
  check_shared(shared, (size_t)size, (size_t)size, "copy_async");
  if (bytes) {
    if ((u64)global % (u64)size) fail_at(SITE, "copy_async from %p, which is not aligned to %d bytes", global, size);
    check_global(global, (size_t)bytes, 1, READ, "copy_async");
  }
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
    if (c.bytes) memcpy(c.to, c.from, (size_t)c.bytes);
    memset(c.to + c.bytes, 0, (size_t)(c.size - c.bytes));
  }
  f->copies.erase(f->copies.begin(), f->copies.begin() + (long)done);
}

// mbarriers and bulk copies

namespace {

Mbarrier& mbarrier_at(u64* bar, const char* what, void* site) {
  check_shared(bar, 8, 8, what);
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
  for (Fiber* f : m.waiting) make_ready(f);
  m.waiting.clear();
}

void complete_bulk(size_t i) {
  const Bulk c = bulks[i];
  bulks[i] = bulks.back();
  bulks.pop_back();
  memcpy(c.to, c.from, c.bytes);
  mbarriers[c.barrier].bytes -= c.bytes;
  may_complete(mbarriers[c.barrier]);
}

}  // namespace

void mbarrier_init(u64* bar, int count) {
  check_shared(bar, 8, 8, "mbarrier_init");
  if (count < 1 || count > (1 << 20) - 1) fail_at(SITE, "mbarrier_init with a count of %d", count);
  for (const Mbarrier& m : mbarriers)
    if (m.place == bar) fail_at(SITE, "mbarrier_init of an mbarrier that is one already");
  *bar = TOKEN ^ mbarriers.size();
  mbarriers.push_back({bar, self()->home, count, count, 0, 0, false, self(), {}});
}

void mbarrier_init_fence() {
  for (Mbarrier& m : mbarriers)
    if (m.author == self()) m.fenced = true;
  may_switch();
}

void mbarrier_arrive(u64* bar, u32 expected_bytes, const char* what) {
  Mbarrier& m = mbarrier_at(bar, what, SITE);
  m.bytes += expected_bytes;
  if (m.bytes >= 1 << 20) fail_at(SITE, "%s: %lld bytes under way; an mbarrier counts to 2^20 - 1", what, m.bytes);
  if (--m.pending < 0) fail_at(SITE, "%s: more than the %d arrivals of this phase", what, m.count);
  may_complete(m);
  may_switch();
}

void mbarrier_wait(u64* bar, u32 parity) {
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
}

void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar) {
  if (bytes % 16) fail_at(SITE, "bulk_copy of %u bytes, which is no multiple of 16", bytes);
  check_shared(shared, bytes, 16, "bulk_copy");
  check_global(global, bytes, 16, READ, "bulk_copy");
  const Mbarrier& m = mbarrier_at(bar, "bulk_copy", SITE);
  if (!m.fenced) fail_at(SITE, "bulk_copy: its mbarrier was initialised without mbarrier_init_fence");
  memset(shared, 0xff, bytes);
  if (bytes)
    bulks.push_back({(unsigned char*)shared, (const unsigned char*)global, bytes, (int)(*bar ^ TOKEN), self()->home});
  may_switch();
}

// bulk_store: reads its source in the wait that makes it legal to overwrite it, and writes as late as that allows.

void bulk_store_fence() {
  self()->home->fenced = true;
  may_switch();
}

void bulk_store(void* global, const void* shared, u32 bytes) {
  if (bytes % 16) fail_at(SITE, "bulk_store of %u bytes, which is no multiple of 16", bytes);
  check_shared(shared, bytes, 16, "bulk_store");
  check_global(global, bytes, 16, WRITE, "bulk_store");
  Fiber* f = self();
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
    if (!s.buffer) s.buffer = (unsigned char*)memcpy(malloc(s.bytes), s.from, s.bytes);
    if (!only_read) finish_store(s);
  }
  if (!only_read) f->stores.erase(f->stores.begin(), f->stores.begin() + (long)done);
}

// Faults ----------------------------------------------------------------------------------------------------

namespace {

void say_address(const unsigned char* p) {
  for (const Guarded& stack : stacks)
    if (p >= stack.first - PAGE && p < stack.first) return say("memory below its stack of %zu KiB", STACK / 1024);
  for (const Block& b : blocks)
    if (p >= b.memory->first - PAGE && p < b.memory->last + PAGE) {
      const bool inside = p >= b.shared && p < b.shared + shared_bytes;
      say("byte %td of the %zu bytes of shared memory of block %u of the cluster%s", p - b.shared, shared_bytes,
          b.fibers->rank, inside ? (b.started ? ", which has ended" : ", which has not started") : "");
      return;
    }
  for (int i = 0; i < range_count; ++i)
    if ((u64)p + (1 << 16) > ranges[i].first && (u64)p < ranges[i].last + (1 << 16)) {
      say("byte %lld of the %llu bytes of [%s]", (long long)((u64)p - ranges[i].first), ranges[i].last - ranges[i].first,
          ranges[i].name);
      return;
    }
  say("%p, which is nowhere near a tensor or shared memory", p);
}

void on_fault(int number, siginfo_t* info, void* state) {
  const void* site = nullptr;
#ifdef __x86_64__
  site = (const void*)((ucontext_t*)state)->uc_mcontext.gregs[REG_RIP];
#endif
  (void)state;
  if (number == SIGVTALRM) {
    const bool stuck = watched == switches && watched_fiber == self();
    watched = switches;
    watched_fiber = self();
    if (!stuck) return;
  }
  say_thread(self());
  if (number == SIGVTALRM) {
    say("runs for seconds without waiting for anything");
  } else if (number == SIGFPE) {
    say("integer division by zero");
  } else {
    say("touches ");
    say_address((const unsigned char*)info->si_addr);
  }
  if (site) say(" @{%p}", (const void*)((const char*)site + 1));
  siglongjmp(fault, 1);
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};

// Handlers on a stack of their own for as long as a launch takes.
struct Handlers {
  struct sigaction before[5];
  stack_t stack_before;
  itimerval timer_before;
  unsigned char* stack;

  Handlers() {
    stack = (unsigned char*)malloc(1 << 16);
    stack_t here = {};
    here.ss_sp = stack;
    here.ss_size = 1 << 16;
    sigaltstack(&here, &stack_before);
    for (int i = 0; i < 5; ++i) {
      struct sigaction action = {};
      action.sa_sigaction = on_fault;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK;
      sigaction(SIGNALS[i], &action, before + i);
    }
    const itimerval ticks = {{5, 0}, {5, 0}};
    watched = ~0ull;
    setitimer(ITIMER_VIRTUAL, &ticks, &timer_before);
  }
  ~Handlers() {
    setitimer(ITIMER_VIRTUAL, &timer_before, nullptr);
    for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], before + i, nullptr);
    sigaltstack(&stack_before, nullptr);
    free(stack);
  }
};

// Launch ----------------------------------------------------------------------------------------------------

bool grow(std::vector<Guarded>& pool, size_t count, size_t bytes) {
  while (pool.size() < count) {
    pool.emplace_back(bytes);
    if (!pool.back().first) {
      pool.pop_back();
      return false;
    }
  }
  return true;
}

void set_up_cluster(u32 first_block, u32 grid) {
  const int warps_each = (threads + 31) / 32;
  blocks.assign((size_t)ranks, {});
  warps.assign((size_t)(ranks * warps_each), {});
  fibers.assign((size_t)(ranks * threads), {});
  mbarriers.clear();
  bulks.clear();
  ready.clear();
  cluster = {};
  alive = ranks * threads;
  for (int r = 0; r < ranks; ++r) {
    Block& b = blocks[r];
    b.fibers = &fibers[r * threads];
    b.memory = &shared_memories[r];
    b.shared = b.memory->last - (shared_bytes + 127) / 128 * 128;
    b.running = threads;
    if (ranks > 1) b.memory->allow(false);
    for (int t = 0; t < threads; ++t) {
      Fiber& f = b.fibers[t];
      f.thread = {(u32)t, 0, 0};
      f.block = {first_block + (u32)r, 0, 0};
      f.block_size = {(u32)threads, 1, 1};
      f.grid_size = {grid, 1, 1};
      f.rank = (u32)r;
      f.ranks = (u32)ranks;
      f.shared = b.shared;
      f.home = &b;
      f.warp = r * warps_each + t / 32;
      f.lane = t % 32;
      Warp& w = warps[f.warp];
      if (t % 32 == 0) {
        w.fibers = &f;
        w.place = -1;
        w.priority = random_below(1 << 30);
      }
      w.lanes |= 1u << f.lane;
      prepare(f.context, stacks[r * threads + t].first, run_thread);
      make_ready(&f);
    }
  }
}

void run_cluster() {
  current = choose(nullptr);
  gspn2_switch(&launcher, &self()->context);
  if (failed || alive == 0) return;
  report_deadlock();
  failed = true;
}

extern "C" __attribute__((weak)) const int __start_gspn2_bounds[], __stop_gspn2_bounds[];

bool check_launch(u32 grid) {
  int bound = 0;
  for (const int* b = __start_gspn2_bounds; b < __stop_gspn2_bounds; ++b) bound = *b > bound ? *b : bound;
  if (threads < 1 || threads > bound)
    say("a block of %d threads, where the kernel's launch bound is %d", threads, bound);
  else if (grid < 1 || ranks < 1 || ranks > 16 || grid % (u32)ranks)
    say("a grid of %u blocks in clusters of %d", grid, ranks);
  else
    return true;
  return false;
}

}  // namespace

// Runs a grid. Returns whether it went well; otherwise `text` says what happened.
extern "C" __attribute__((visibility("default"))) bool gspn2_emulate(void* function, const void* arguments, u32 grid,
                                                                     int block, u64 shared, int cluster_size, u64 seed,
                                                                     const Range* memory, int memories, char* text,
                                                                     size_t text_size) {
  entry = (void (*)(const void*))function;
  params = arguments;
  threads = block;
  ranks = cluster_size;
  shared_bytes = shared;
  ranges = memory;
  range_count = memories;
  last_range = 0;
  chance_state = (seed + 1) * 0x9e3779b97f4a7c15ull;
  order = (Order)(seed % 3);
  bulks_early = seed / 3 % 2;
  failed = false;
  message = text;
  message_size = text_size;
  *message = 0;
  if (!check_launch(grid)) return false;
  if (!grow(stacks, (size_t)(ranks * threads), STACK) || !grow(shared_memories, (size_t)ranks, shared)) {
    say("not enough memory for the stacks of %d threads and %d x %llu bytes of shared memory", ranks * threads, ranks,
        shared);
    return false;
  }
  {
    Handlers handlers;
    if (sigsetjmp(fault, 1) == 0) {
      for (u32 b = 0; b < grid && !failed; b += (u32)ranks) {
        set_up_cluster(b, grid);
        run_cluster();
      }
    } else {
      failed = true;
    }
  }
  for (Guarded& m : shared_memories) m.release();
  shared_memories.clear();
  return !failed;
}

// What -fsanitize found: the first member of `data` says where.
namespace {
struct SourceLocation {
  const char* file;
  u32 line, column;
};
[[noreturn]] void undefined(const void* data, const char* what) {
  const SourceLocation* at = (const SourceLocation*)data;
  fail_at(nullptr, "%s (%s:%u:%u)", what, at->file, at->line, at->column);
}
}  // namespace

}  // namespace emulator

extern "C" {
#define GSPN2_SANITIZER(name, what) \
  void __ubsan_handle_##name(const void* data) { emulator::undefined(data, what); }
GSPN2_SANITIZER(type_mismatch_v1, "misaligned access")
GSPN2_SANITIZER(out_of_bounds, "index out of bounds")
GSPN2_SANITIZER(shift_out_of_bounds, "shift by more than the width")
GSPN2_SANITIZER(add_overflow, "integer overflow")
GSPN2_SANITIZER(sub_overflow, "integer overflow")
GSPN2_SANITIZER(mul_overflow, "integer overflow")
GSPN2_SANITIZER(negate_overflow, "integer overflow")
GSPN2_SANITIZER(divrem_overflow, "integer division by zero, or overflow")
}
