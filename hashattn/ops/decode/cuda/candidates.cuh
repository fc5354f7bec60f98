// Candidates among a warp's keys, of up to four lanes, which are heads here. A thread compares KEYS neighbouring keys with
// each of them. Then the threads share out the flags, READERS of them a head, so that few find many candidates.
#pragma once
#include "step.cuh"

constexpr int KEYS = LOCAL ? 8 / WORDS : WORDS == 4 ? 4 : 8;  // of a thread
constexpr int OWN_PIECES = KEYS * WORDS / 2, WARP_PIECES = 32 * OWN_PIECES;  // of 16 bytes
constexpr int BYTES = LANES > 2 ? 4 : LANES, READERS = 32 / BYTES;           // threads whose flags one reads, which has them all

// Codes of a warp's keys in shared memory, with a gap after each eight pieces, so that threads read their own without conflicts.
struct Staged {
  uint4 pieces[WARP_PIECES + WARP_PIECES / 8];
  __device__ __forceinline__ uint4 &at(int piece) { return pieces[piece + piece / 8]; }
};

struct Shared {  // of a warp
  Staged codes;
  u32 flags[4][8];  // a byte a thread
};

__device__ __forceinline__ int head_read() { return threadIdx.x % 32 / READERS; }
__device__ __forceinline__ int first_read() { return threadIdx.x % READERS * BYTES; }  // thread of the warp

// Ask for a piece of the warp's codes, from a column of which `room` are there.
__device__ __forceinline__ void stage(Staged &staged, int piece, const u64 *codes, int column, int room) {
#if ALIGNED
  const bool there = column < room;
  copy_16(&staged.at(piece), reinterpret_cast<const uint4 *>(codes + (there ? (size_t)column * WORDS : 0)) + piece % (WORDS > 2 ? 2 : 1), there ? 16 : 0);
#else
  uint2 *to = reinterpret_cast<uint2 *>(&staged.at(piece));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const size_t at = WORDS == 1 ? column + i : (size_t)column * WORDS + piece % (WORDS / 2) * 2 + i;
    const u64 word = at < (size_t)room * WORDS ? codes[at] : 0;
    to[i] = make_uint2((u32)word, (u32)(word >> 32));
  }
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
__device__ __forceinline__ void compare(Shared &shared, const Terms *terms, const int *bounds, u32 seen, u32 forced) {
  const int lane = threadIdx.x % 32;
  u32 code[KEYS * HALVES];
#pragma unroll
  for (int i = 0; i < OWN_PIECES; i++) {
    const uint4 piece = shared.codes.at(lane * OWN_PIECES + i);
    code[4 * i] = piece.x, code[4 * i + 1] = piece.y, code[4 * i + 2] = piece.z, code[4 * i + 3] = piece.w;
  }
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    const u32 near = flag_near(code, terms[i], within(bounds[i], terms[i].base()));
    reinterpret_cast<unsigned char *>(shared.flags[i])[lane] = near & seen | forced;
  }
}

// Flags that this thread reads: the keys of thread first_read() + i / 8, key i % 8, for head_read().
__device__ __forceinline__ u32 read_flags(const Shared &shared) {
  const int head = head_read(), at = first_read();
  if (head >= LANES) return 0;
  const u32 word = shared.flags[head][at / 4];
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
__device__ __forceinline__ int level_of(Shared &shared, int thread, int key, const Terms &terms, int bound) {
  u32 code[HALVES];
  const int piece = thread * OWN_PIECES + key * WORDS / 2;
#pragma unroll
  for (int i = 0; i < (WORDS + 1) / 2; i++) {
    const uint4 x = shared.codes.at(piece + i);
    const bool odd = WORDS == 1 && key % 2;
    code[4 * i] = odd ? x.z : x.x, code[4 * i + 1] = odd ? x.w : x.y;
    if (WORDS > 1) code[(4 * i + 2) % HALVES] = x.z, code[(4 * i + 3) % HALVES] = x.w;
  }
  return min(within(bound, terms.base()) - ranked(code, terms), LEVELS - 1);
}
