// Candidates among a warp's keys, of up to four lanes, which are heads here. A thread compares KEYS neighbouring keys with
// each of them. Then the threads share out the flags, READERS of them a head, so that few find many candidates.
#pragma once
#include "step.cuh"

constexpr int KEYS = LOCAL ? 8 / WORDS : CHUNK / 256;                        // of a thread
constexpr int OWN_PIECES = KEYS * WORDS / 2, WARP_PIECES = 32 * OWN_PIECES;  // of 16 bytes
constexpr int BYTES = LANES > 2 ? 4 : LANES, READERS = 32 / BYTES;  // threads whose flags one reads, and readers of a head

// Codes of a warp's keys in shared memory, with a gap after each eight pieces, so that threads do not wait for one another.
struct Staged {
  uint4 pieces[WARP_PIECES + WARP_PIECES / 8];
  __device__ __forceinline__ uint4 &at(int piece) { return pieces[piece + piece / 8]; }
};

using Flags = u32[4][8];  // of a warp's threads, a byte each, for each head

__device__ __forceinline__ int head_read() { return threadIdx.x % 32 / READERS; }
__device__ __forceinline__ int first_read() { return threadIdx.x % READERS * BYTES; }  // thread of the warp

// Ask for a piece of the warp's codes; nothing is read unless `words` of it, 0 to 2, are there.
__device__ __forceinline__ void stage(uint4 &to, const u64 *codes, int words) {
#if ALIGNED
  copy_16(&to, reinterpret_cast<const uint4 *>(codes), words > 0 ? 16 : 0);
#else
  const u64 first = words > 0 ? codes[0] : 0, second = words > 1 ? codes[1] : 0;
  to = make_uint4((u32)first, (u32)(first >> 32), (u32)second, (u32)(second >> 32));
#endif
}

// Flags of a thread's keys that are within a bound, as ranked distances have it.
__device__ __forceinline__ u32 flag_near(const u32 *code, const Terms &terms, int most) {
  u32 flags = 0;
#pragma unroll
  for (int key = KEYS - 1; key >= 0; key--) flags = __funnelshift_l(ranked(code + key * HALVES, terms) - most - 1, flags, 1);
  return flags;
}

// Flags of all lanes' keys, for each head, that are seen and near or forced.
__device__ __forceinline__ void compare(
    Staged &codes, Flags &all, const Terms *terms, const int *bounds, u32 seen, u32 forced
) {
  const int lane = threadIdx.x % 32;
  u32 code[KEYS * HALVES];
#pragma unroll
  for (int i = 0; i < OWN_PIECES; i++) {
    const uint4 piece = codes.at(lane * OWN_PIECES + i);
    code[4 * i] = piece.x, code[4 * i + 1] = piece.y, code[4 * i + 2] = piece.z, code[4 * i + 3] = piece.w;
  }
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    const u32 near = flag_near(code, terms[i], within(bounds[i], terms[i].base()));
    reinterpret_cast<unsigned char *>(all[i])[lane] = near & seen | forced;
  }
}

// Flags that this thread reads: the keys of thread first_read() + i / 8, key i % 8, for head_read().
__device__ __forceinline__ u32 read_flags(const Flags &all) {
  const int head = head_read(), at = first_read();
  if (head >= LANES) return 0;
  const u32 word = all[head][at / 4];
  return BYTES == 4 ? word : word >> 8 * (at % 4) & ((1u << 8 * BYTES % 32) - 1);
}

// The sum over a head's readers up to this one.
__device__ __forceinline__ int up_to(int own) {
#pragma unroll
  for (int d = 1; d < READERS; d *= 2) {
    const int other = __shfl_up_sync(~0u, own, d);
    if (threadIdx.x % READERS >= d) own += other;
  }
  return own;
}

// How much nearer than the bound a key of a thread of the warp is.
__device__ __forceinline__ int level_of(Staged &codes, int thread, int key, const Terms &terms, int bound) {
  u32 code[HALVES];
  const int piece = thread * OWN_PIECES + key * WORDS / 2;
#pragma unroll
  for (int i = 0; i < (WORDS + 1) / 2; i++) {
    const uint4 x = codes.at(piece + i);
    const bool odd = WORDS == 1 && key % 2;
    code[4 * i] = odd ? x.z : x.x, code[4 * i + 1] = odd ? x.w : x.y;
    if (WORDS > 1) code[(4 * i + 2) % HALVES] = x.z, code[(4 * i + 3) % HALVES] = x.w;
  }
  return min(within(bound, terms.base()) - ranked(code, terms), LEVELS - 1);
}
