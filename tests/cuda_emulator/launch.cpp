// A launch: clusters one after another, and what ends one: faults of memory and arithmetic.
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <ucontext.h>

#include "device.h"

namespace emulator {

void (*entry)(const void*);
const void* params;
int threads, ranks;
size_t shared_bytes;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Block> blocks;
Guarded stacks;
std::vector<Guarded> shared_memories;
std::vector<Mbarrier> mbarriers;
std::vector<Bulk> bulks;
std::vector<int> ready;
Barrier cluster;
int alive;
Order order;
bool bulks_early;
unsigned char leftover;
bool hopper;
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

// Faults ----------------------------------------------------------------------------------------------------

namespace {

void say_address(const unsigned char* p) {
  if (p >= stacks.first - PAGE && p < stacks.first) return say("memory below its stack of %zu KiB", STACK / 1024);
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
  } else if (number == SIGILL || number == SIGTRAP) {
    say("undefined behaviour: an access misaligned, an index out of an array, a shift too far, or a division by zero");
  } else {
    say("touches ");
    say_address((const unsigned char*)info->si_addr);
  }
  if (site) say(" @{%p}", (const void*)((const char*)site + 1));
  siglongjmp(fault, 1);
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};

// Handlers on a stack of their own for as long as a launch takes.
struct Handlers {
  struct sigaction before[6];
  stack_t stack_before;
  itimerval timer_before;
  unsigned char* stack;

  Handlers() {
    stack = (unsigned char*)malloc(1 << 16);
    stack_t here = {};
    here.ss_sp = stack;
    here.ss_size = 1 << 16;
    sigaltstack(&here, &stack_before);
    for (int i = 0; i < 6; ++i) {
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
    for (int i = 0; i < 6; ++i) sigaction(SIGNALS[i], before + i, nullptr);
    sigaltstack(&stack_before, nullptr);
    free(stack);
  }
};

// Launch ----------------------------------------------------------------------------------------------------

bool reserve() {
  stacks = Guarded((size_t)(ranks * threads) * STACK);
  bool fine = stacks.first;
  for (int r = 0; r < ranks && fine; ++r) {
    shared_memories.emplace_back(shared_bytes);
    fine = shared_memories.back().first;
  }
  return fine;
}

void release() {
  stacks.release();
  for (Guarded& m : shared_memories) m.release();
  shared_memories.clear();
  end_races();
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
  start_races(first_block / (u32)ranks);
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
      f.stack = stacks.first + (size_t)(r * threads + t) * STACK;
      *(u64*)f.stack = STACK_END;
      f.index = (u32)(r * threads + t);
      f.warp = r * warps_each + t / 32;
      f.lane = t % 32;
      Warp& w = warps[f.warp];
      if (t % 32 == 0) {
        w.fibers = &f;
        w.place = -1;
        w.priority = random_below(1 << 30);
      }
      w.lanes |= 1u << f.lane;
      prepare(f.context, f.stack, run_thread);
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
  else if (grid < 1 || grid > 0x7fffffffu || ranks < 1 || ranks > (hopper ? 16 : 1) || grid % (u32)ranks)
    say("a grid of %u blocks in clusters of %d", grid, ranks);
  else
    return true;
  return false;
}

}  // namespace

// Runs a grid. Returns whether it went well; otherwise `text` says what happened.
extern "C" __attribute__((visibility("default"))) bool gspn2_emulate(void* function, const void* arguments, u32 grid,
                                                                     int block, u64 shared, int cluster_size,
                                                                     int capability, u64 seed, const Range* memory,
                                                                     int memories, char* text, size_t text_size) {
  entry = (void (*)(const void*))function;
  params = arguments;
  threads = block;
  ranks = cluster_size;
  shared_bytes = shared;
  hopper = capability >= 90;
  ranges = memory;
  range_count = memories;
  last_range = 0;
  chance_state = (seed + 1) * 0x9e3779b97f4a7c15ull;
  order = (Order)(seed % 3);
  bulks_early = seed / 3 % 2;
  leftover = seed / 6 % 2 ? 0x3f : 0xff;  // some 0.75 in all types, or NaN
  failed = false;
  message = text;
  message_size = text_size;
  *message = 0;
  if (!check_launch(grid)) return false;
  if (!reserve()) {
    say("not enough memory for the stacks of %d threads and %d x %llu bytes of shared memory", ranks * threads, ranks,
        shared);
    failed = true;
  } else {
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
  release();
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
GSPN2_SANITIZER(divrem_overflow, "integer division by zero, or overflow")
}
