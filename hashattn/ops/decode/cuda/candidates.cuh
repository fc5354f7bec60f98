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

// Flags of a thread's keys that are seen and within a lane's bound, or forced, and in `lacking` what their levels are.
template <int WORDS_OF_BYTES>
__device__ __forceinline__ u32 flag_near(
    const u32 *code, const Terms &terms, int bound, u32 seen, u32 forced, u32 (&lacking)[WORDS_OF_BYTES]
) {
  const int past = within(bound, terms.base()) + 1;
  u32 flags = 0;
#pragma unroll
  for (int key = 4 * WORDS_OF_BYTES - 1; key >= 0; key--) {
    const int beyond = ranked(code + key * HALVES, terms) - past;  // negative within the bound
    flags = __funnelshift_l(beyond, flags, 1);
    lacking[key / 4] = __byte_perm(CLAMPED ? max(beyond, -LEVELS) : beyond, lacking[key / 4], 0x6540);
  }
  force(lacking, forced);
  return flags & seen | forced;
}

// The sum over the warp's threads up to this one.
__device__ __forceinline__ Lengths up_to(Lengths own) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Lengths other = {__shfl_up_sync(~0u, own.low, d), __shfl_up_sync(~0u, own.high, d)};
    if (threadIdx.x % 32 >= d) own.add(other);
  }
  return own;
}
