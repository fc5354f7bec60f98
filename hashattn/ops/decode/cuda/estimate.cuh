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

struct Sketch {  // of each head's query: its product with the centre, and its length times the scale of estimates
  float offset, size;
};

// Into shared memory, which all threads synchronise before they read it. q is the first head's row, the next one's is `stride`
// elements further.
__device__ __forceinline__ void sketch(const void *q, size_t stride, const float *centre, const float *scale, Sketch *to) {
  const int lane = threadIdx.x % 32;
  for (int head = threadIdx.x / 32; head < SUM; head += THREADS / 32) {
    float offset = 0, square = 0;
    for (int d = lane; d < DIM; d += 32) {
      const float own = number(q, head * stride + d);
      offset += own * centre[d], square += own * own;
    }
#pragma unroll
    for (int d = 16; d; d /= 2) offset += __shfl_xor_sync(~0u, offset, d), square += __shfl_xor_sync(~0u, square, d);
    if (lane == 0) to[head] = {offset, sqrtf(square) * *scale};
  }
}

// Write q.k of SUM heads and the medium keys. Called while what is read of other keys is on its way.
__device__ __forceinline__ void estimate(const Step &s, const Chosen &chosen) {
#if TIERS
  const int column = threadIdx.x < ROWS ? chosen.columns[threadIdx.x] : -1;
  if (is_medium(column)) {  // a thread's own key
    u64 code[WORDS];
#pragma unroll
    for (int w = 0; w < WORDS; w++) code[w] = __ldcg(chosen.codes + (size_t)value_of(column) * WORDS + w);
    const float norm = __uint_as_float((u32)__ldcg(chosen.norms + value_of(column)) << 16);
    for (int head = 0; head < SUM; head++) {
      const u64 *signs = chosen.query + ((size_t)head * TOKENS * PLANES + PLANES - 1) * WORDS;
      int differing = 0;
#pragma unroll
      for (int w = 0; w < WORDS; w++) differing += __popcll(code[w] ^ __ldcg(signs + w));
      const Sketch own = chosen.sketches[head];
      chosen.estimated[head * ROWS + threadIdx.x] = own.offset + own.size * norm * (1 - s.per_bit * differing);
    }
  }
  __syncthreads();
#endif
}
