// Entries of the scan's lists, which 8 neighbours of a thread read in 16 bytes.
#pragma once
#include "counts.cuh"

struct Eight {
  u32 words[4];
  int entries;  // that are there
  __device__ __forceinline__ Eight(const uint4 &all, int at, int end) : words{all.x, all.y, all.z, all.w}, entries(min(end - at, 8)) {}
  __device__ __forceinline__ Eight(const u16 *list, int at, int end) : words{}, entries(min(end - at, 8)) {
    if (entries <= 0) return;
    const uint4 all = __ldcg(reinterpret_cast<const uint4 *>(list + at));
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }
  __device__ __forceinline__ int entry(int e) const { return words[e / 2] >> (16 * (e % 2)) & 0xffff; }
  __device__ __forceinline__ int level(int e) const { return entry(e) >> PLACE_BITS; }
  __device__ __forceinline__ int place(int e) const { return entry(e) & ((1 << PLACE_BITS) - 1); }
  // Flags of those above a level, and of those at it.
  __device__ __forceinline__ u32 above(int least) const {
    u32 flags = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) flags |= (u32)(e < entries && level(e) > least) << e;
    return flags;
  }
  __device__ __forceinline__ u32 at(int own) const {
    u32 flags = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) flags |= (u32)(e < entries && level(e) == own) << e;
    return flags;
  }
};
