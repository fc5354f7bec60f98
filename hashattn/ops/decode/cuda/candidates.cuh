// Candidates of up to four lanes: how many a thread has, and a byte for each of its keys that says what its level is.
#pragma once
#include "step.cuh"

constexpr bool CLAMPED = MOST_RANKED > 96;  // a key may be nearer than the bound by more than a byte says

// Sixteen bits for each lane's number.
struct Lengths {
  u32 low, high;
  __device__ __forceinline__ void add(Lengths other) { low += other.low, high += other.high; }
  __device__ __forceinline__ void add(int lane, u32 n) { (lane < 2 ? low : high) += n << (lane % 2 * 16); }
  __device__ __forceinline__ int of(int lane) const { return (lane < 2 ? low : high) >> (lane % 2 * 16) & 0xffff; }
};

// Make keys as near as can be. `lacking` holds ranked distances minus the bound minus 1, that is ~level, in bytes.
template <int WORDS_OF_BYTES> __device__ __forceinline__ void force(u32 (&lacking)[WORDS_OF_BYTES], u32 forced) {
  if (!forced) return;
#pragma unroll
  for (int key = 0; key < 4 * WORDS_OF_BYTES; key++) {
    const u32 byte = 0xffu << key % 4 * 8;
    if (forced >> key & 1) lacking[key / 4] = lacking[key / 4] & ~byte | (u32)(-LEVELS & 0xff) << key % 4 * 8;
  }
}

__device__ __forceinline__ int level_of(u32 low, u32 high, int key) { return ~max(signed_byte(low, high, key), -LEVELS); }
