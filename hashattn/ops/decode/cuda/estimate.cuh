// Logits of a program's medium keys, from their codes and norms: see ops/decode/estimate.py. Part of rows.cuh.
#pragma once

__device__ __forceinline__ float number(const void *x, size_t i) {
#if TYPE == 2
  return static_cast<const float *>(x)[i];
#elif TYPE == 1
  return half_to_float(static_cast<const u16 *>(x)[i]);
#else
  return __uint_as_float((u32)static_cast<const u16 *>(x)[i] << 16);
#endif
}

// Write q.k of SUM heads and the medium keys. q is the first head's row, the next one's is `stride` elements further. Called while
// what is read of other keys is on its way.
__device__ __forceinline__ void estimate(const Step &s, const void *q, size_t stride, const Chosen &chosen) {
#if TIERS
  __shared__ float offsets[SUM], sizes[SUM];
  const int lane = threadIdx.x % 32, column = threadIdx.x < ROWS ? chosen.columns[threadIdx.x] : -1;
  u64 code[WORDS];
  float norm = 0;
  if (is_medium(column)) {  // a thread's own key
#pragma unroll
    for (int w = 0; w < WORDS; w++) code[w] = __ldcg(chosen.codes + (size_t)value_of(column) * WORDS + w);
    norm = __uint_as_float((u32)__ldcg(chosen.norms + value_of(column)) << 16);
  }
  for (int head = threadIdx.x / 32; head < SUM; head += THREADS / 32) {
    float offset = 0, square = 0;
    for (int d = lane; d < DIM; d += 32) {
      const float own = number(q, head * stride + d);
      offset += own * chosen.centre[d], square += own * own;
    }
#pragma unroll
    for (int d = 16; d; d /= 2) offset += __shfl_xor_sync(~0u, offset, d), square += __shfl_xor_sync(~0u, square, d);
    if (lane == 0) offsets[head] = offset, sizes[head] = sqrtf(square) * *chosen.size;
  }
  __syncthreads();
  for (int head = 0; is_medium(column) && head < SUM; head++) {
    const u64 *signs = chosen.query + ((size_t)head * TOKENS * PLANES + PLANES - 1) * WORDS;
    int differing = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) differing += __popcll(code[w] ^ __ldcg(signs + w));
    chosen.estimated[head * ROWS + threadIdx.x] = offsets[head] + sizes[head] * norm * (1 - s.per_bit * differing);
  }
  __syncthreads();
#endif
}
