// The same for a group of heads that share their keys, on tensor cores, in 16-bit types.
//
// A product does not care about the order of what it sums over, so that fragments are read straight from memory in 16
// bytes: of queries and keys, a thread's two words of a step are 4 of 8 neighbouring dimensions; of values, a thread holds
// 8 neighbouring dimensions of 4 keys, which are columns of 8 products. So the parts' dimensions lie as dim_of says.
#pragma once
#include "rows.cuh"

#if TENSOR_CORES
constexpr int HEADS = SUM <= 8 ? 8 : 16, WARPS_HERE = THREADS / 32, OWN_KEYS = 16;  // of a warp
constexpr int LOADS_OF_A_KEY = DIM / 32, SPANS = PART / 64, STRIDE = 72;            // floats, for a head's 64 dimensions
static_assert(SUM <= 16 && ROWS == WARPS_HERE * OWN_KEYS, "a warp attends to 16 keys");

// As attend_part.
__device__ __forceinline__ void attend_group(
    const Step &s, const void *q, size_t stride, const void *keys, const void *values, const Chosen &chosen, size_t part
) {
  __shared__ float peaks[WARPS_HERE][HEADS], totals[WARPS_HERE][HEADS];
  __shared__ __align__(16) float sums[WARPS_HERE][HEADS * STRIDE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slow = lane / 4, fast = lane % 4;
  const int *own = chosen.columns + warp * OWN_KEYS;
  const uint4 none = make_uint4(0, 0, 0, 0);
  uint4 k[2][LOADS_OF_A_KEY], v[4][SPANS];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < LOADS_OF_A_KEY; j++) {
      const int column = key_of(own[i * 8 + slow]);
      k[i][j] = column < 0 ? none : __ldcs(static_cast<const uint4 *>(keys) + (size_t)column * PIECES + j * 4 + fast);
    }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < SPANS; j++) {
      const int column = value_of(own[i / 2 * 8 + fast * 2 + i % 2]), piece = j * 8 + slow;
      const bool there = column >= 0 && piece < PIECES;
      v[i][j] = there ? __ldcs(static_cast<const uint4 *>(values) + (size_t)column * PIECES + piece) : none;
    }
  estimate(s, chosen);
  float x[2][4] = {};  // logits of heads slow and slow + 8 to keys 2 * fast and the next, of either eight
#pragma unroll
  for (int j = 0; j < LOADS_OF_A_KEY; j++) {
    const uint4 *rows = static_cast<const uint4 *>(q) + j * 4 + fast;
    const uint4 low = slow < SUM ? rows[slow * stride / EACH] : none;
    const uint4 high = HEADS > 8 && slow + 8 < SUM ? rows[(slow + 8) * stride / EACH] : none;
    const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      multiply<TYPE == 1>(x[i], first, k[i][j].x, k[i][j].y);
      multiply<TYPE == 1>(x[i], second, k[i][j].z, k[i][j].w);
    }
  }
  float peak[2] = {-infinity(), -infinity()}, total[2] = {0, 0};  // of the two heads
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int head = slow + 8 * (e / 2), row = warp * OWN_KEYS + i * 8 + fast * 2 + e % 2;
      x[i][e] = chosen.logit(min(head, SUM - 1), row, x[i][e], s.scale);
      if (head < SUM) chosen.keep(head, row, x[i][e]);
      peak[e / 2] = fmaxf(peak[e / 2], x[i][e]);
    }
#pragma unroll
  for (int h = 0; h < HEADS / 8; h++) {
    peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 1));
    peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 2));
    if (fast == 0) peaks[warp][slow + 8 * h] = peak[h];
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < HEADS / 8; h++) {
#pragma unroll
    for (int w = 0; w < WARPS_HERE; w++) peak[h] = fmaxf(peak[h], peaks[w][slow + 8 * h]);
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float base = peak[e / 2] == -infinity() ? 0 : peak[e / 2];
      x[i][e] = exp2f(x[i][e] - base);
      total[e / 2] += x[i][e];
    }
#pragma unroll
  for (int h = 0; h < HEADS / 8; h++) {
    total[h] += __shfl_xor_sync(~0u, total[h], 1);
    total[h] += __shfl_xor_sync(~0u, total[h], 2);
    if (fast == 0) totals[warp][slow + 8 * h] = total[h];
    if (fast == 0 && warp == 0 && slow + 8 * h < SUM) s.stats[(part * SUM + slow + 8 * h) * 2] = peak[h];
  }
  u32 p[4];
#pragma unroll
  for (int i = 0; i < 4; i++) p[i] = narrow<TYPE == 1>(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
#pragma unroll
  for (int j = 0; j < SPANS; j++) {
    if (j) __syncthreads();
#pragma unroll
    for (int e = 0; e < 8; e++) {
      u32 word[4];
#pragma unroll
      for (int i = 0; i < 4; i++) word[i] = e < 2 ? v[i][j].x : e < 4 ? v[i][j].y : e < 6 ? v[i][j].z : v[i][j].w;
      const int halves = e % 2 ? 0x7632 : 0x5410;
      float c[4] = {};
      multiply<TYPE == 1>(c, p, __byte_perm(word[0], word[1], halves), __byte_perm(word[2], word[3], halves));
      float *to = sums[warp] + slow * STRIDE + e * 8 + fast * 2;
      *reinterpret_cast<float2 *>(to) = make_float2(c[0], c[1]);
      if (HEADS > 8) *reinterpret_cast<float2 *>(to + 8 % HEADS * STRIDE) = make_float2(c[2], c[3]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SUM * 64; i += THREADS) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS_HERE; w++) sum += sums[w][i / 64 * STRIDE + i % 64];
      __stcg(s.parts + (part * SUM + i / 64) * PART + j * 64 + i % 64, sum);
    }
  }
  if (threadIdx.x < SUM) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS_HERE; w++) sum += totals[w][threadIdx.x];
    s.stats[(part * SUM + threadIdx.x) * 2 + 1] = sum;
  }
}
#endif
