// Logits of a program's medium keys, from their codes and norms: see ops/decode/estimate.py.
#pragma once
#include "rows.cuh"

#if TIERS
__device__ __forceinline__ float number(const void *x, size_t i) {
#if TYPE == 2
  return static_cast<const float *>(x)[i];
#elif TYPE == 1
  return half_to_float(static_cast<const u16 *>(x)[i]);
#else
  return __uint_as_float((u32)static_cast<const u16 *>(x)[i] << 16);
#endif
}

// q.k of SUM heads, [SUM, ROWS] in shared memory, where columns are of medium keys. q is the first head's row, the next one's is
// `stride` elements further; query: the first head's code.
__device__ __forceinline__ void estimate(
    const Step &s, int kv, const void *q, size_t stride, const u64 *query, const u64 *codes, const int *columns, float *x
) {
  __shared__ float offsets[SUM], sizes[SUM];
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < SUM; head += THREADS / 32) {
    float offset = 0, square = 0;
    for (int d = lane; d < DIM; d += 32) {
      const float own = number(q, head * stride + d);
      offset += own * s.centre[(size_t)kv * DIM + d], square += own * own;
    }
#pragma unroll
    for (int d = 16; d; d /= 2) offset += __shfl_xor_sync(~0u, offset, d), square += __shfl_xor_sync(~0u, square, d);
    if (lane == 0) offsets[head] = offset, sizes[head] = sqrtf(square) * *s.a;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < SUM * ROWS; i += THREADS) {
    const int head = i / ROWS, column = columns[i % ROWS];
    if (!is_medium(column)) continue;
    const u64 *code = codes + (size_t)value_of(column) * WORDS;
    const u64 *signs = query + ((size_t)head * TOKENS * PLANES + PLANES - 1) * WORDS;
    int differing = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) differing += __popcll(__ldcg(code + w) ^ __ldcg(signs + w));
    const float norm = __uint_as_float((u32)__ldcg(s.norms + (size_t)kv * s.norm_room + value_of(column)) << 16);
    x[i] = offsets[head] + sizes[head] * norm * (1 - s.per_bit * differing);
  }
  __syncthreads();
}
#endif
