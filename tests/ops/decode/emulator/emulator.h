// Runs CUDA kernels on a CPU: one block after the other, its threads as fibers that take turns at barriers and votes.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define threadIdx emulator::now->index
#define blockIdx emulator::block
#define gridDim emulator::grid

using std::max;
using std::min;
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {
struct Index { int x, y, z; };
struct Barrier {  // of those that have not returned
  int alive = 0, waiting = 0, turn = 0;
  void open() { waiting = 0, turn++; }
  void leave() { if (--alive > 0 && waiting == alive) open(); }
};
struct Warp {
  Barrier barrier;
  uint64_t values[2][32];
  int turn = 0, arrived = 0;
};
struct Thread {
  ucontext_t context;
  Index index;
  bool done = false;
  int exchanges = 0;
  std::vector<char> stack;
};
inline Thread *now;
inline Index block, grid;
inline bool backwards;  // threads run in the order of their numbers, or against it: a missing barrier shows in one of them
inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier all;
inline int votes[2], vote_turn;
inline void (*body)(const void *);
inline const void *argument;

inline void wait(Barrier &b) {
  const int turn = b.turn;
  if (++b.waiting == b.alive) return b.open();
  while (b.turn == turn) swapcontext(&now->context, &scheduler);
}
inline int lane() { return now->index.x % 32; }
inline Warp &warp() { return warps[now->index.x / 32]; }

// What every lane of the warp gives; valid until the exchange after the next.
inline const uint64_t *exchange(uint64_t value) {
  Warp &w = warp();
  uint64_t *values = w.values[now->exchanges++ % 2];
  values[lane()] = value;
  wait(w.barrier);
  return values;
}
inline void start() {
  body(argument);
  now->done = true;
  all.leave(), warp().barrier.leave();
  swapcontext(&now->context, &scheduler);
}
inline void run_block(int count) {
  threads = std::vector<Thread>(count), warps = std::vector<Warp>(count / 32), all = Barrier{count};
  for (auto &w : warps) w.barrier.alive = 32;
  for (int i = 0; i < count; i++) {
    Thread &t = threads[i];
    t.index = {i, 0, 0}, t.stack.resize(1 << 17);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data(), t.context.uc_stack.ss_size = t.stack.size(), t.context.uc_link = nullptr;
    makecontext(&t.context, start, 0);
  }
  for (long round = 0;; round++) {
    bool left = false;
    for (int i = 0; i < count; i++) {
      Thread &t = threads[backwards ? count - 1 - i : i];
      if (!t.done) now = &t, left = true, swapcontext(&scheduler, &t.context);
    }
    if (!left) return;
    if (round > 10'000'000) fprintf(stderr, "a barrier that not all threads reach\n"), abort();
  }
}
template <class T> T from(uint64_t bits) {
  T x;
  memcpy(&x, &bits, sizeof(T));
  return x;
}
template <class T> uint64_t to(T x) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  return bits;
}
}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::all); }
inline int __syncthreads_or(int x) {
  static int any[2];
  static int turn;
  const int mine = turn;
  if (x) any[mine] = 1;
  __syncthreads();
  const int result = any[mine];
  __syncthreads();
  any[mine] = 0, turn = 1 - mine;
  __syncthreads();
  return result;
}
inline void __syncwarp() { emulator::exchange(0); }
inline void __threadfence() {}
inline unsigned __ballot_sync(unsigned, int x) {
  const uint64_t *all = emulator::exchange(x != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (unsigned)all[i] << i;
  return bits;
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
template <class T> T __shfl_sync(unsigned, T x, int from) { return emulator::from<T>(emulator::exchange(emulator::to(x))[from % 32]); }
template <class T> T __shfl_up_sync(unsigned, T x, int d) {
  const uint64_t *all = emulator::exchange(emulator::to(x));
  return emulator::from<T>(all[emulator::lane() >= d ? emulator::lane() - d : emulator::lane()]);
}
template <class T> T __shfl_down_sync(unsigned, T x, int d) {
  const uint64_t *all = emulator::exchange(emulator::to(x));
  return emulator::from<T>(all[emulator::lane() + d < 32 ? emulator::lane() + d : emulator::lane()]);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int d) { return emulator::from<T>(emulator::exchange(emulator::to(x))[emulator::lane() ^ d]); }
inline int __reduce_add_sync(unsigned, int x) {
  const uint64_t *all = emulator::exchange(emulator::to(x));
  int sum = 0;
  for (int i = 0; i < 32; i++) sum += emulator::from<int>(all[i]);
  return sum;
}
template <class T> T atomicAdd(T *at, T x) { const T before = *at; *at += x; return before; }
inline unsigned atomicOr(unsigned *at, unsigned x) { const unsigned before = *at; *at |= x; return before; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __funnelshift_l(unsigned low, unsigned high, int d) { return d ? high << d | low >> (32 - d) : high; }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = (uint64_t)high << 32 | low;
  unsigned x = 0;
  for (int i = 0; i < 4; i++) x |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return x;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __uint_as_float(unsigned x) { return emulator::from<float>(x); }
inline float __int_as_float(int x) { return emulator::from<float>((unsigned)x); }
template <class T> T __ldcs(const T *at) { return *at; }
template <class T> T __ldcg(const T *at) { return *at; }
template <class T> void __stcg(T *at, T x) { *at = x; }

// What ptx.cuh defines on a GPU.
inline void wait_for_the_kernel_before() {}
inline void let_the_next_kernel_start() {}
inline void prefetch_line(const void *) {}
inline void copy_16(uint4 *to, const uint4 *from, int bytes) {
  *to = make_uint4(0, 0, 0, 0);
  if (bytes) memcpy(to, from, bytes);
}
inline void wait_for_copies() {}
inline int add_and_publish(int *at) { return atomicAdd(at, 1); }
inline int read_published(const int *at) { return *at; }
inline unsigned long long nanoseconds() {  // nobody else comes while a block waits
  static unsigned long long now = 0;
  return now += 1'000'000;
}
inline void nap() {}
inline float half_to_float(unsigned short x) { return (float)emulator::from<_Float16>(x); }
inline unsigned bf16(float x) {
  const unsigned bits = (unsigned)emulator::to(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <bool HALF> unsigned narrow(float low, float high) {
  if (HALF) return (unsigned)emulator::to((_Float16)low) | (unsigned)emulator::to((_Float16)high) << 16;
  return bf16(low) | bf16(high) << 16;
}
template <bool HALF> float widened(unsigned two, int i) {
  const unsigned x = i ? two >> 16 : two & 0xffff;
  return HALF ? half_to_float(x) : __uint_as_float(x << 16);
}
template <bool HALF> void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  float rows[16][16], columns[8][16];  // a, and b transposed
  for (int r = 0; r < 4; r++) {
    const uint64_t *all = emulator::exchange(a[r]);
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 2; i++) rows[l / 4 + r % 2 * 8][l % 4 * 2 + i + r / 2 * 8] = widened<HALF>((unsigned)all[l], i);
  }
  for (int r = 0; r < 2; r++) {
    const uint64_t *all = emulator::exchange(r ? b1 : b0);
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 2; i++) columns[l / 4][l % 4 * 2 + i + r * 8] = widened<HALF>((unsigned)all[l], i);
  }
  const int l = emulator::lane();
  for (int e = 0; e < 4; e++)
    for (int k = 0; k < 16; k++) c[e] += rows[l / 4 + e / 2 * 8][k] * columns[l % 4 * 2 + e % 2][k];
}
