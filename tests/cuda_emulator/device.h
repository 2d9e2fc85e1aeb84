// The state of the emulated device, shared by the files of the runtime.
#pragma once
#include <setjmp.h>

#include <memory>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace emulator {

// What a thread knows: for each thread of the cluster the epoch up to which its accesses happened before.
typedef std::shared_ptr<const std::vector<u32>> Knowledge;

constexpr int READERS = 3;

// The latest accesses to two bytes of memory, by threads' index + 1 and epoch; sites count from the kernel's entry.
struct Cell {
  u32 writer, write_epoch;
  int write_site;
  u32 readers[READERS], read_epochs[READERS];
  u32 cluster;         // in which all this happened
  short engine_reads;  // asynchronous copies under way that read or write it
  short engine_writes;
  bool read_by_other;  // another cluster has read it
};

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
  const unsigned char* stack;
  u32 index;  // in the cluster
  Knowledge known;
  u32 now;
  Block* home;
  int warp, lane;
  const char* waits;    // for what: null while it can run
  const void* wait_on;  // of an mbarrier
  u32 wait_mask;        // of a warp collective; id and threads of a block barrier
  void* site;           // where in the kernel
  u32 source;           // of a collective
  u32 met;              // blocks of the cluster, by rank, that are known to have started
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
  u32 lanes, exited, ready, at_barrier;  // masks
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
  std::vector<Cell> cells;
  std::vector<u32> visits;  // by threads of other blocks in its shared memory: the latest epoch of each
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
  std::vector<u32> arriving;  // what those that arrived know
  Knowledge completed;        // what a wait for the latest phase brings
};
constexpr u64 TOKEN = 0x6d62617272ull << 24;

struct Bulk {  // of bulk_copy and store_counted
  unsigned char* to;
  const unsigned char* from;
  u32 bytes;
  int barrier;
  Block* home;  // where it writes
  u32 author, epoch;
  // Of store_counted, which has no `from`: what it stores, and what its thread knew.
  float value;
  Knowledge known;
};

// How the next thread is chosen: by chance; by chance among the threads of a warp as long as it can run; or by
// priorities that seldom change, so that some warp is as far behind all others as it can be.
enum Order { CHANCE, WARP_FIRST, PRIORITY };

constexpr u64 SCRATCH = 2;

struct Range {  // of global memory; the layout is that of memory.py
  u64 first, last;
  unsigned char* access;  // of each byte, or null: all of it may be read and written
  u64 written;            // some of it may be written; SCRATCH: what is written may be read from then on
  char name[40];
};

extern void (*entry)(const void*);
extern const void* params;
extern int threads, ranks;
extern size_t shared_bytes;
extern std::vector<Fiber> fibers;
extern std::vector<Warp> warps;
extern std::vector<Block> blocks;
extern Guarded stacks;
extern std::vector<Guarded> shared_memories;
extern std::vector<Mbarrier> mbarriers;
extern std::vector<Bulk> bulks;
extern std::vector<int> ready;
extern Barrier cluster;
extern int alive;
extern Order order;
extern bool bulks_early;
extern unsigned char leftover;  // what each byte of shared memory holds at first
extern bool hopper;             // the device has what sm_90 brought
extern u64 chance_state;
extern u64 switches, watched;
extern Fiber* watched_fiber;
extern const Range* ranges;
extern int range_count, last_range;
extern Context launcher;
extern sigjmp_buf fault;
extern bool failed;
extern char* message;
extern size_t message_size;

#define SITE __builtin_return_address(0)

inline Fiber* self() { return static_cast<Fiber*>(current); }
u32 random_below(u32 n);

// Messages: @{address} is replaced by file and line in emulator.py.
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
void say_thread(const Fiber* f);
[[noreturn]] void leave();
void needs_hopper(const char* what, const void* site);
[[noreturn]] void fail_at(const void* site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// schedule.cpp
void make_ready(Fiber* f);
Fiber* choose(const Fiber* last);
void wait(const char* why, void* site);
void report_deadlock();
void run_thread();

// barriers.cpp
Mbarrier& mbarrier_at(u64* bar, const char* what, void* site);
void may_complete(Mbarrier& m);

// copies.cpp
void check_global(const void* p, size_t bytes, size_t alignment, Access access, const char* what, const void* site);
void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, const void* site);
void complete_bulk(size_t i);
void finish_store(Store& s);

// races.cpp
void touch(const void* p, size_t bytes, Access access, const void* site);
// Notes that an asynchronous copy begins (by = 1) or ends (by = -1) to read or write the shared memory of b.
void engine(Block& b, const void* p, size_t bytes, Access access, int by);
void meet(const std::vector<Fiber*>& threads);
void add(std::vector<u32>& clock, const std::vector<u32>& other);
void release_to(std::vector<u32>& clock);
void acquire(const Knowledge& clock);
void start_races(u32 cluster_number);
void start_race_cells(Block& b);
// Fails if a block may end before threads of other blocks have finished with its shared memory.
void check_visits(const Block& b);
void end_races();

}  // namespace emulator
