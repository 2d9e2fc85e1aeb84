// Fibers: memory for their stacks, and the switch from one to another.
#pragma once
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

namespace emulator {

constexpr size_t PAGE = 4096, STACK = 32 * PAGE;
constexpr unsigned long long STACK_END = 0x5741434b454e4421ull;  // the lowest word of a stack, never reached

#if defined(__x86_64__) && !defined(GSPN2_UCONTEXT)

struct Context {
  void* stack_pointer;
};

// Saves what a call must keep, and returns on the other stack (schedule.cpp).
extern "C" void gspn2_switch(Context* from, const Context* to);


inline void prepare(Context& context, const unsigned char* stack, void (*entry)()) {
  void** top = (void**)(stack + STACK);
  *--top = nullptr;        // where entry would return to: it never does
  *--top = (void*)entry;   // the stack is 8 past a multiple of 16 on entry, as after a call
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

#else

}  // namespace emulator
#include <ucontext.h>
namespace emulator {

typedef ucontext_t Context;
inline void gspn2_switch(Context* from, const Context* to) { swapcontext(from, to); }
inline void prepare(Context& context, const unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = (void*)stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

// Memory that faults below its first and behind its last byte; pages are used when they are touched.
struct Guarded {
  unsigned char *first = nullptr, *last = nullptr;  // what may be touched: [first, last)

  Guarded() = default;
  explicit Guarded(size_t bytes) {
    const size_t pages = (bytes + PAGE - 1) / PAGE * PAGE;
    unsigned char* memory = (unsigned char*)mmap(nullptr, pages + 2 * PAGE, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return;
    mprotect(memory, PAGE, PROT_NONE);
    mprotect(memory + PAGE + pages, PAGE, PROT_NONE);
    first = memory + PAGE;
    last = first + pages;
  }
  void allow(bool access) { mprotect(first, (size_t)(last - first), access ? PROT_READ | PROT_WRITE : PROT_NONE); }
  void release() {
    if (first) munmap(first - PAGE, (size_t)(last - first) + 2 * PAGE);
    first = last = nullptr;
  }
};

}  // namespace emulator
