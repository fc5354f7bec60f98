// How many keys come before some column, which gives the rank of a chosen one, added up over a program.
#pragma once
#include "rows.cuh"

constexpr int WARPS = THREADS / 32;

struct Count {  // keys before some column that are nearer than the threshold, and those at it
  int nearer, ties;
};

__device__ __forceinline__ int chosen_before(Count c, int dropped) { return c.nearer + max(c.ties - dropped, 0); }

// Counts of all threads up to each one's own, which is left out, plus `carry`, which is moved on past them all.
__device__ __forceinline__ Count before(Count own, Count &carry) {
  __shared__ int2 sums[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Count upto = own;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int nearer = __shfl_up_sync(~0u, upto.nearer, d), ties = __shfl_up_sync(~0u, upto.ties, d);
    if (lane >= d) upto.nearer += nearer, upto.ties += ties;
  }
  if (lane == 31) sums[warp] = make_int2(upto.nearer, upto.ties);
  __syncthreads();
  Count result = {carry.nearer + upto.nearer - own.nearer, carry.ties + upto.ties - own.ties};
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w < warp) result.nearer += sums[w].x, result.ties += sums[w].y;
    carry.nearer += sums[w].x, carry.ties += sums[w].y;
  }
  __syncthreads();
  return result;
}
