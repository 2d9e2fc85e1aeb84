// Who runs next, what a thread's life is, and what is said when nobody can run.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "device.h"

#if defined(__x86_64__) && !defined(GSPN2_UCONTEXT)
asm(R"(
.text
.hidden gspn2_switch
.globl gspn2_switch
.type gspn2_switch, @function
gspn2_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gspn2_switch, .-gspn2_switch
)");
#endif

namespace emulator {

Thread* current;

u32 random_below(u32 n) {
  chance_state ^= chance_state >> 12;
  chance_state ^= chance_state << 25;
  chance_state ^= chance_state >> 27;
  return (u32)((chance_state * 0x2545f4914f6cdd1dull >> 32) * n >> 32);
}

// Messages --------------------------------------------------------------------------------------------------

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

void fail_at(const void* site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  say_thread(self());
  say(format, arguments);
  va_end(arguments);
  if (site) say(" @{%p}", site);
  leave();
}

void needs_hopper(const char* what, const void* site) {
  if (!hopper) fail_at(site, "%s: the device is older than sm_90", what);
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
    auto alike = [&](const Fiber& g) {
      if (g.home != f.home || g.exited != f.exited) return false;
      return f.exited || (g.waits == f.waits && g.site == f.site && g.wait_on == f.wait_on && g.wait_mask == f.wait_mask);
    };
    while (end < fibers.size() && alike(fibers[end]))
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
  memset(b.shared, leftover, shared_bytes);
  start_race_cells(b);
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
  for (const Mbarrier& m : mbarriers)
    if (m.home == &b && m.bytes)
      fail_at(nullptr, "the block ends while an mbarrier at byte %td of its shared memory waits for %lld bytes",
              (unsigned char*)m.place - b.shared, m.bytes);
  check_visits(b);
  check_canaries(b);
  if (ranks > 1) b.memory->allow(false);
}

void exit_thread() {
  Fiber* f = self();
  if (*(const u64*)f->stack != STACK_END) fail_at(nullptr, "its local variables do not fit on %zu KiB", STACK / 1024);
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

}  // namespace emulator
