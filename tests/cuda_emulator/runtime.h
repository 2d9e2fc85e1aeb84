// What the emulated device does for a thread: the interface of runtime.cpp. A thread is a fiber; each of these
// functions is called on the fiber of the thread that the kernel's code runs for.
#pragma once
#include <cstddef>
#include <cstdint>

typedef unsigned int u32;
typedef unsigned long long u64;

namespace emulator {

struct Index {
  u32 x, y, z;
};

// What a thread may read of itself.
struct Thread {
  Index thread, block, block_size, grid_size;
  u32 rank, ranks;  // of the block in its cluster
  unsigned char* shared;
};

extern Thread* current;  // the thread that runs

// Ends the launch with an error that names the thread and the line.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Lets another thread run, or not.
void may_switch();
// Lets every other thread that can run go first: for loops that poll.
void give_way();

// Warp collectives: waits for all lanes of `mask`. Result for SHUFFLE: the value of lane `source`; for the
// others, of all lanes' values.
enum Collective { SYNC, SHUFFLE, BALLOT, ADD, MIN, MAX, MIN_SIGNED, MAX_SIGNED, AND, OR, XOR };
u64 collective(Collective kind, u32 mask, u64 value, u32 source);

// Block barriers; `vote` is added up over all threads and returned.
int block_barrier(int id, int threads, int vote);
void cluster_barrier();

enum Access { READ = 1, WRITE = 2 };
// Fails unless `bytes` at p, aligned to `alignment`, are elements of the tensors or of scratch memory.
void check_global(const void* p, size_t bytes, size_t alignment, Access access, const char* what);

void copy_async(void* shared, const void* global, int size, int bytes);
void copy_commit();
void copy_wait(int pending);

void mbarrier_init(u64* bar, int count);
void mbarrier_init_fence();
void mbarrier_arrive(u64* bar, u32 expected_bytes, const char* what);
void mbarrier_wait(u64* bar, u32 parity);
void bulk_copy(void* shared, const void* global, u32 bytes, u64* bar);
void store_counted(void* shared, u64* bar, u32 rank, const float* words, int count);

// Flags that order what blocks of different clusters do: raised by one that comes earlier in the grid.
void raise_flag(u32* flag, u32 value);
void wait_flag(const u32* flag, u32 value);

void bulk_store_fence();
void bulk_store(void* global, const void* shared, u32 bytes);
void bulk_store_commit();
void bulk_store_wait(int pending, bool only_read);

void* cluster_map(const void* p, u32 rank);
u32 shared_address(const void* p);

}  // namespace emulator
