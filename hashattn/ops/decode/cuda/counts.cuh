// How many keys come before some column, which gives the rank of a chosen one, added up over a program of THREADS.
#pragma once
#include "step.cuh"

constexpr int WARPS = THREADS / 32;

struct Cut {  // what is chosen: keys nearer than a level, and those at it but for the `dropped` oldest
  int level, dropped;
};

struct Count {  // keys before some column that are nearer than the threshold, those at it, and those at that of critical keys
  int nearer, ties, first_ties;
};

__device__ __forceinline__ Count operator+(Count a, Count b) {
  return {a.nearer + b.nearer, a.ties + b.ties, TIERS ? a.first_ties + b.first_ties : 0};
}
__device__ __forceinline__ Count operator-(Count a, Count b) {
  return {a.nearer - b.nearer, a.ties - b.ties, TIERS ? a.first_ties - b.first_ties : 0};
}

__device__ __forceinline__ int chosen_before(Count c, int dropped) { return c.nearer + max(c.ties - dropped, 0); }

// Of a warp's threads up to each one's own.
__device__ __forceinline__ Count up_to(Count own) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int nearer = __shfl_up_sync(~0u, own.nearer, d), ties = __shfl_up_sync(~0u, own.ties, d);
    const int first_ties = TIERS ? __shfl_up_sync(~0u, own.first_ties, d) : 0;
    if (lane >= d) own = own + Count{nearer, ties, first_ties};
  }
  return own;
}

__device__ __forceinline__ Count of_lane(Count own, int lane) {
  return {__shfl_sync(~0u, own.nearer, lane), __shfl_sync(~0u, own.ties, lane),
          TIERS ? __shfl_sync(~0u, own.first_ties, lane) : 0};
}

// Counts of all threads up to each one's own, which is left out, plus `carry`, which is moved on past them all.
__device__ __forceinline__ Count before(Count own, Count &carry) {
  __shared__ Count sums[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Count upto = up_to(own);
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  Count result = carry + (upto - own);
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w < warp) result = result + sums[w];
    carry = carry + sums[w];
  }
  __syncthreads();
  return result;
}
