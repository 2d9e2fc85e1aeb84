// Accesses that no barrier orders. The kernel is compiled with -fsanitize=thread, which calls a function before each
// plain access; here these functions are ours. Every thread carries what it knows of the epochs of all others (a vector
// clock); barriers spread that knowledge, and every two bytes remember who touched them last.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>

#include "device.h"

namespace emulator {

namespace {

// Cells of what this launch may write in global memory, one table for each range.
struct Table {
  Cell* cells = nullptr;
  size_t bytes = 0;
};
std::vector<Table> tables;
u32 cluster_number;

// What a thread knew when it raised a flag, and in which cluster; and who in this cluster has waited for it, and when.
struct Raised {
  u32 cluster;
  std::vector<u32> clock;
};
struct Waited {
  Raised raised;
  u32 by, epoch;
};
std::map<const u32*, Raised> flags;
std::vector<Waited> waited;

int site_of(const void* site) { return (int)((const char*)site - (const char*)entry); }

bool known(const Fiber& f, u32 thread, u32 epoch) { return thread == f.index || f.known->data()[thread] >= epoch; }

void say_place(const void* p, const Block* b, const Range* r) {
  if (b)
    say("byte %td of shared memory of block %u", (const unsigned char*)p - b->shared, b->fibers->block.x);
  else
    say("byte %llu of [%s]", (u64)p - r->first, r->name);
}

[[noreturn]] void race(const char* now, const char* before, u32 thread, int site, const void* here, const void* p,
                       const Block* b, const Range* r) {
  const Fiber& other = fibers[thread];
  say_thread(self());
  say("%s ", now);
  say_place(p, b, r);
  say(" @{%p}, which block %u, thread %u %s", here, other.block.x, other.thread.x, before);
  if (site) say(" @{%p}", (const void*)((const char*)entry + site));
  say(", and no barrier is between");
  leave();
}

void note_read(Cell& c, const Fiber& f) {
  int slot = -1;
  for (int i = 0; i < READERS && slot < 0; ++i)
    if (!c.read_epochs[i] || known(f, c.readers[i], c.read_epochs[i])) slot = i;
  if (slot < 0) slot = (int)random_below(READERS);
  c.readers[slot] = f.index;
  c.read_epochs[slot] = f.now;
}

void check_cell(Cell& c, Access access, const void* here, const void* p, const Block* b, const Range* r) {
  const Fiber& f = *self();
  if (c.engine_writes || (access == WRITE && c.engine_reads)) {
    say_thread(&f);
    say("%s ", access == READ ? "reads" : "writes");
    say_place(p, b, r);
    say(" @{%p}, which an asynchronous copy may still %s", here, c.engine_writes ? "write" : "read");
    leave();
  }
  if (c.write_epoch && !known(f, c.writer, c.write_epoch))
    race(access == READ ? "reads" : "writes", "wrote", c.writer, c.write_site, here, p, b, r);
  if (access == READ) return note_read(c, f);
  for (int i = 0; i < READERS; ++i)
    if (c.read_epochs[i] && !known(f, c.readers[i], c.read_epochs[i]))
      race("writes", "read", c.readers[i], 0, here, p, b, r);
  c.writer = f.index;
  c.write_epoch = f.now;
  c.write_site = site_of(here);
  memset(c.read_epochs, 0, sizeof c.read_epochs);
}

// The thread of this cluster that has waited for a flag raised after the latest write to a cell, or null. Of several, one
// that this thread has met since.
const Waited* handed_over(const Cell& c) {
  const Waited* found = nullptr;
  for (const Waited& w : waited) {
    if (w.raised.cluster != c.cluster || w.raised.clock[c.writer] < c.write_epoch) continue;
    if (!found || known(*self(), w.by, w.epoch)) found = &w;
  }
  return found;
}

// Clusters run one after another here, at once on a device: nothing but flags orders them.
void enter_cluster(Cell& c, Access access, const void* here, const void* p, const Range& r) {
  if (c.cluster == cluster_number) return;
  const bool read = c.read_by_other || c.read_epochs[0];
  if (const Waited* w = c.write_epoch && !read ? handed_over(c) : nullptr) {
    const int site = c.write_site;
    c = {};
    c.cluster = cluster_number;
    c.writer = w->by, c.write_epoch = w->epoch, c.write_site = site;  // who has met that thread may go on
    return;
  }
  if (c.write_epoch || (access == WRITE && read)) {
    say_thread(self());
    say("%s ", access == WRITE ? "writes" : "reads");
    say_place(p, nullptr, &r);
    say(" @{%p}, which a block of another cluster %s", here, c.write_epoch ? "wrote" : "read");
    if (c.write_epoch) say(" @{%p}", (const void*)((const char*)entry + c.write_site));
    leave();
  }
  c = {};
  c.cluster = cluster_number;
  c.read_by_other = read;
}

// Another block's shared memory is there only between that block's start and its end: a barrier has to order both, in
// whatever order the blocks happened to run.
void visit(Block& b, const void* site) {
  Fiber& f = *self();
  const u32 rank = b.fibers->rank;
  if (!(f.met >> rank & 1)) {
    const u32 first = b.fibers->index;
    for (u32 t = first; t < first + (u32)threads; ++t)
      if (f.known->data()[t]) f.met |= 1u << rank;
    if (!(f.met >> rank & 1))
      fail_at(site, "touches shared memory of block %u of the cluster, which may not have started: no barrier is between",
              rank);
  }
  b.visits.resize(fibers.size());
  b.visits[f.index] = f.now;
}

bool touch_shared(const unsigned char* p, size_t bytes, Access access, const void* site, Block& b) {
  if (p < b.memory->first || p >= b.memory->last) return false;
  const long long at = p - b.shared;
  if (at < 0 || at + (long long)bytes > (long long)shared_bytes)
    fail_at(site, "touches bytes %lld to %lld of %zu bytes of shared memory", at, at + (long long)bytes, shared_bytes);
  if (!b.started || !b.running) return true;  // faults
  if (&b != self()->home) visit(b, site);
  for (size_t cell = (size_t)at / 2; cell < ((size_t)at + bytes + 1) / 2; ++cell)
    check_cell(b.cells[cell], access, site, b.shared + 2 * cell, &b, nullptr);
  return true;
}

void touch_global(u64 first, size_t bytes, Access access, const void* site) {
  int i = last_range;
  if (first < ranges[i].first || first >= ranges[i].last) {
    for (i = 0; i < range_count; ++i)
      if (first >= ranges[i].first && first < ranges[i].last) break;
    if (i == range_count) return;
    last_range = i;
  }
  const Range& r = ranges[i];
  check_global((const void*)first, bytes, 1, access, access == WRITE ? "writes" : "reads", site);
  if (!r.written) return;
  Table& table = tables[(size_t)i];
  if (!table.cells) {
    table.bytes = ((r.last - r.first) / 2 + 1) * sizeof(Cell);
    table.cells = (Cell*)mmap(nullptr, table.bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (table.cells == MAP_FAILED) {
      table.cells = nullptr;
      fail_at(site, "no memory to note accesses to [%s]", r.name);
    }
  }
  for (u64 cell = (first - r.first) / 2; cell < (first - r.first + bytes + 1) / 2; ++cell) {
    const void* p = (const void*)(r.first + 2 * cell);
    enter_cluster(table.cells[cell], access, site, p, r);
    check_cell(table.cells[cell], access, site, p, nullptr, &r);
  }
}

}  // namespace

void touch(const void* p, size_t bytes, Access access, const void* site) {
  const unsigned char* byte = (const unsigned char*)p;
  Fiber* f = self();
  if (byte >= f->stack && byte < f->stack + STACK) return;
  if (touch_shared(byte, bytes, access, site, *f->home)) return;
  if (ranks > 1)
    for (Block& b : blocks)
      if (touch_shared(byte, bytes, access, site, b)) return;
  if (range_count) touch_global((u64)p, bytes, access, site);
}

void engine(Block& b, const void* p, size_t bytes, Access access, int by) {
  const size_t at = (size_t)((const unsigned char*)p - b.shared);
  for (size_t cell = at / 2; cell < (at + bytes) / 2; ++cell)
    (access == READ ? b.cells[cell].engine_reads : b.cells[cell].engine_writes) += (short)by;
}

// Knowledge -------------------------------------------------------------------------------------------------

void add(std::vector<u32>& clock, const std::vector<u32>& other) {
  u32* to = clock.data();
  const u32* from = other.data();
  for (size_t i = 0, n = clock.size(); i < n; ++i) to[i] = from[i] > to[i] ? from[i] : to[i];
}

void meet(const std::vector<Fiber*>& threads) {
  auto joined = std::make_shared<std::vector<u32>>(*threads[0]->known);
  const std::vector<u32>* last = threads[0]->known.get();
  for (Fiber* f : threads)
    if (f->known.get() != last) add(*joined, *(last = f->known.get()));
  for (Fiber* f : threads) (*joined)[f->index] = f->now++;
  const Knowledge shared = std::move(joined);
  for (Fiber* f : threads) f->known = shared;
}

void release_to(std::vector<u32>& clock) {
  Fiber* f = self();
  add(clock, *f->known);
  clock[f->index] = f->now++;
}

void acquire(const Knowledge& clock) {
  Fiber* f = self();
  if (!clock) return;
  // Many threads wait for the same phase, knowing the same.
  static Knowledge known, added, sum;
  if (f->known != known || clock != added) {
    auto joined = std::make_shared<std::vector<u32>>(*f->known);
    add(*joined, *clock);
    known = f->known;
    added = clock;
    sum = std::move(joined);
  }
  f->known = sum;
}

void raise_flag(u32* flag, u32 value) {
  check_global(flag, 4, 4, READ, "raise_flag", SITE);
  check_global(flag, 4, 4, WRITE, "raise_flag", SITE);
  if (value <= *flag) fail_at(SITE, "raise_flag from %u to %u", *flag, value);
  may_switch();
  *flag = value;
  Raised& raised = flags[flag];
  raised.cluster = cluster_number;
  raised.clock.resize(fibers.size());
  release_to(raised.clock);
}

void wait_flag(const u32* flag, u32 value) {
  check_global(flag, 4, 4, READ, "wait_flag", SITE);
  may_switch();
  if (*flag < value) fail_at(SITE, "wait_flag for %u: at %u, and all earlier clusters have ended", value, *flag);
  const auto found = flags.find(flag);
  if (found != flags.end()) waited.push_back({found->second, self()->index, self()->now});
}

void start_races(u32 number) {
  cluster_number = number;
  waited.clear();
  tables.resize((size_t)range_count);
  const auto nothing = std::make_shared<const std::vector<u32>>(fibers.size());
  for (Fiber& f : fibers) {
    f.known = nothing;
    f.now = 1;
  }
}

void start_race_cells(Block& b) { b.cells.assign(shared_bytes / 2 + 1, {}); }

void check_visits(const Block& b) {
  for (size_t i = 0; i < b.visits.size(); ++i) {
    bool over = !b.visits[i];
    for (int t = 0; t < threads && !over; ++t) over = b.fibers[t].known->data()[i] >= b.visits[i];
    if (!over)
      fail_at(nullptr, "the block may end while block %u, thread %u touches its shared memory: no barrier is between",
              fibers[i].block.x, fibers[i].thread.x);
  }
}

void end_races() {
  for (Table& table : tables)
    if (table.cells) munmap(table.cells, table.bytes);
  tables.clear();
  flags.clear();
  waited.clear();
}

}  // namespace emulator

extern "C" {
#define GSPN2_ACCESS(name, bytes, access) \
  void __tsan_##name(void* p) { emulator::touch(p, bytes, emulator::access, SITE); }
#define GSPN2_ACCESSES(bytes)                    \
  GSPN2_ACCESS(read##bytes, bytes, READ)         \
  GSPN2_ACCESS(write##bytes, bytes, WRITE)       \
  GSPN2_ACCESS(unaligned_read##bytes, bytes, READ) \
  GSPN2_ACCESS(unaligned_write##bytes, bytes, WRITE)
GSPN2_ACCESSES(1)
GSPN2_ACCESSES(2)
GSPN2_ACCESSES(4)
GSPN2_ACCESSES(8)
GSPN2_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { emulator::touch(p, bytes, emulator::READ, SITE); }
void __tsan_write_range(void* p, size_t bytes) { emulator::touch(p, bytes, emulator::WRITE, SITE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
