// Attention in 16-bit types on tensor cores: a warp attends to 8 or 16 keys at a time, for up to 16 heads that share them.
//
// A product does not care about the order of what it sums over, so that fragments are read straight from memory in 16
// bytes: of queries and keys, a thread's two words of a step are 4 of 8 neighbouring dimensions; of values, a thread holds
// 8 neighbouring dimensions of 2 or 4 keys, which are columns of 8 products. So the parts' dimensions lie as dim_of says.
#pragma once
#include "rows.cuh"

#if TENSOR_CORES
constexpr int EIGHTS = TILE / 8, HALF = SUM > 8 ? 2 : 1;         // of keys, of heads
constexpr int LOADS_OF_A_KEY = DIM / 32, SPANS = PART / 64;      // 16 bytes of a thread, 64 dimensions
constexpr int AT_ONCE = SUM * SPANS <= 8 ? SPANS : 1;            // spans that are added up between two barriers
constexpr int STRIDE = AT_ONCE * 64 + 8, HEADS_AT_ONCE = SUM < 8 ? SUM : 8;
constexpr int ROUNDS = ROWS / WARPS_EACH / TILE, BUSY = WARPS_EACH * (LOCAL ? LANES : 1);  // of a warp, and such warps
static_assert(SUM <= 16 && ROUNDS * TILE * WARPS_EACH == ROWS, "all keys are attended to");

struct Tiles {  // of a program, in shared memory
  uint4 values[2 * EIGHTS][SPANS][THREADS];  // each thread's own
  float sums[BUSY][HEADS_AT_ONCE * STRIDE], peaks[BUSY][SUM], totals[BUSY][SUM];
};

// A warp's, for heads slow and slow + 8: the weights of its two keys of each eight, which are exp2(logits - peak), their sum
// over all keys so far, and what sums of before are now to be multiplied with.
struct Weights {
  u32 words[4];
  float peaks[HALF], totals[HALF], shrinks[HALF];
  __device__ __forceinline__ Weights() : words{}, totals{}, shrinks{} {
#pragma unroll
    for (int h = 0; h < HALF; h++) peaks[h] = -infinity();
  }
  __device__ __forceinline__ void keep(Tiles &tiles) const {
    const int lane = threadIdx.x % 32, slow = lane / 4;
#pragma unroll
    for (int h = 0; h < HALF; h++) {
      const float total = totals[h] + __shfl_xor_sync(~0u, totals[h], 1), all = total + __shfl_xor_sync(~0u, total, 2);
      if (lane % 4 || slow + 8 * h >= SUM) continue;
      tiles.peaks[threadIdx.x / 32][slow + 8 * h] = peaks[h], tiles.totals[threadIdx.x / 32][slow + 8 * h] = all;
    }
  }
};

// Weigh a tile's `columns`, negative ones for none; the values are on their way when it returns.
__device__ __forceinline__ void weigh(
    const Step &s, const void *q, size_t stride, const void *keys, const void *values, const int *columns, Tiles &tiles,
    Weights &weights
) {
  const int lane = threadIdx.x % 32, slow = lane / 4, fast = lane % 4;
  const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll  // asked for first, so that the compiler does not put it off
  for (int i = 0; i < 2 * EIGHTS; i++) {
    const int column = columns[i / 2 * 8 + fast * 2 + i % 2];
    const uint4 *row = static_cast<const uint4 *>(values) + (size_t)max(column, 0) * PIECES + slow;
#pragma unroll
    for (int j = 0; j < SPANS; j++) {
      const bool there = column >= 0 && (PIECES % 8 == 0 || j * 8 + slow < PIECES);
      copy_16(&tiles.values[i][j][threadIdx.x], there ? row + j * 8 : row - slow, there ? 16 : 0);
    }
  }
  uint4 k[EIGHTS][LOADS_OF_A_KEY];
#pragma unroll
  for (int i = 0; i < EIGHTS; i++) {
    const int column = columns[i * 8 + slow];
    const uint4 *row = static_cast<const uint4 *>(keys) + (size_t)max(column, 0) * PIECES + fast;
#pragma unroll
    for (int j = 0; j < LOADS_OF_A_KEY; j++) k[i][j] = column < 0 ? none : __ldcs(row + j * 4);
  }
  float x[EIGHTS][4] = {};  // logits of heads slow and slow + 8 to keys 2 * fast and the next, of either eight
#pragma unroll
  for (int j = 0; j < LOADS_OF_A_KEY; j++) {
    const uint4 *rows = static_cast<const uint4 *>(q) + j * 4 + fast;
    const uint4 low = slow < SUM ? rows[slow * stride / EACH] : none;
    const uint4 high = HALF > 1 && slow + 8 < SUM ? rows[(slow + 8) * stride / EACH] : none;
    const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
      multiply<TYPE == 1>(x[i], first, k[i][j].x, k[i][j].y);
      multiply<TYPE == 1>(x[i], second, k[i][j].z, k[i][j].w);
    }
  }
  bool there[EIGHTS][2];
#pragma unroll
  for (int i = 0; i < EIGHTS; i++)
#pragma unroll
    for (int e = 0; e < 2; e++) there[i][e] = columns[i * 8 + fast * 2 + e] >= 0;
#pragma unroll
  for (int h = 0; h < HALF; h++) {
    float peak = weights.peaks[h];
#pragma unroll
    for (int i = 0; i < EIGHTS; i++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float &y = x[i][2 * h + e];
        y = there[i][e] ? y * (s.scale * LOG2E) : -infinity();
        peak = fmaxf(peak, y);
      }
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
    const float base = peak == -infinity() ? 0 : peak;
    const float shrink = weights.shrinks[h] = exp2f(weights.peaks[h] - base);
    weights.peaks[h] = peak, weights.totals[h] *= shrink;
#pragma unroll
    for (int i = 0; i < EIGHTS; i++) {
      const float first = exp2f(x[i][2 * h] - base), second = exp2f(x[i][2 * h + 1] - base);
      weights.totals[h] += first + second, weights.words[2 * i + h] = narrow<TYPE == 1>(first, second);
    }
  }
}

// Add a span of 64 dimensions of the weighted values to the warp's sums, for the first or second eight heads.
__device__ __forceinline__ void weigh_values(const Weights &weights, int span, int half, Tiles &tiles, bool first) {
  const int lane = threadIdx.x % 32, slow = lane / 4, fast = lane % 4;
  const u32 p[4] = {weights.words[half], 0, EIGHTS > 1 ? weights.words[2 + half] : 0, 0};
  uint4 v[2 * EIGHTS];
#pragma unroll
  for (int i = 0; i < 2 * EIGHTS; i++) v[i] = tiles.values[i][span][threadIdx.x];
#pragma unroll
  for (int e = 0; e < 8; e++) {
    u32 word[4] = {};
#pragma unroll
    for (int i = 0; i < 2 * EIGHTS; i++) word[i] = e < 2 ? v[i].x : e < 4 ? v[i].y : e < 6 ? v[i].z : v[i].w;
    const int halves = e % 2 ? 0x7632 : 0x5410;
    float c[4] = {};
    multiply<TYPE == 1>(c, p, __byte_perm(word[0], word[1], halves), __byte_perm(word[2], word[3], halves));
    if (slow + 8 * half >= SUM) continue;
    float *at = tiles.sums[threadIdx.x / 32] + slow * STRIDE + span % AT_ONCE * 64 + e * 8 + fast * 2;
    float2 &sum = *reinterpret_cast<float2 *>(at);
    if (!first) c[0] += sum.x * weights.shrinks[half], c[1] += sum.y * weights.shrinks[half];
    sum = make_float2(c[0], c[1]);
  }
}

struct Joint {  // of a choice's warps from `first` on, for one head
  float weights[WARPS_EACH], peak, total;
  __device__ __forceinline__ Joint(const Tiles &tiles, int first, int head) : peak(-infinity()), total(0) {
#pragma unroll
    for (int i = 0; i < WARPS_EACH; i++) peak = fmaxf(peak, tiles.peaks[first + i][head]);
    const float base = peak == -infinity() ? 0 : peak;
#pragma unroll
    for (int i = 0; i < WARPS_EACH; i++) {
      weights[i] = exp2f(tiles.peaks[first + i][head] - base);
      total += weights[i] * tiles.totals[first + i][head];
    }
  }
  __device__ __forceinline__ float of(const Tiles &tiles, int first, int place) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS_EACH; i++) sum += weights[i] * tiles.sums[first + i][place];
    return sum;
  }
};

#if LOCAL
// One program's attention to `columns` [LANES, ROWS] in shared memory, of a head each, into parts and stats at `part`.
__device__ __forceinline__ void attend_heads(
    const Step &s, const void *q, size_t stride, const void *keys, const void *values, const int *columns, size_t part,
    Tiles &tiles
) {
  const int warp = threadIdx.x / 32, head = warp / WARPS_EACH;
  if (warp < BUSY) {
    Weights weights;
#pragma unroll 1
    for (int round = 0; round < ROUNDS; round++) {
      const void *own = static_cast<const uint4 *>(q) + head * stride / EACH;
      weigh(s, own, 0, keys, values, columns + (warp * ROUNDS + round) * TILE, tiles, weights);
      wait_for_copies();
#pragma unroll
      for (int span = 0; span < SPANS; span++) weigh_values(weights, span, 0, tiles, round == 0);
    }
    weights.keep(tiles);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < LANES * PART; i += THREADS) {
    const int own = i / PART, first = own * WARPS_EACH;
    const Joint joint(tiles, first, 0);
    __stcg(s.parts + part * LANES * PART + i, joint.of(tiles, first, i % PART));
    if (i % PART == 0) __stcg(reinterpret_cast<float2 *>(s.stats) + part * LANES + own, make_float2(joint.peak, joint.total));
  }
}
#else
// As attend_part.
__device__ __forceinline__ void attend_group(
    const Step &s, const void *q, size_t stride, const void *keys, const void *values, const int *columns, size_t part,
    Tiles &tiles
) {
  static_assert(ROUNDS == 1, "spans follow one another instead");
  Weights weights;
  weigh(s, q, stride, keys, values, columns + threadIdx.x / 32 * TILE, tiles, weights);
  weights.keep(tiles);
  wait_for_copies();
#pragma unroll
  for (int round = 0; round < HALF * SPANS / AT_ONCE; round++) {
    const int half = round % HALF, span = round / HALF * AT_ONCE;
    if (round) __syncthreads();
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) weigh_values(weights, span + j, half, tiles, true);
    __syncthreads();
    constexpr int WIDTH = AT_ONCE * 64;
    const int heads = min(SUM - 8 * half, 8);
#pragma unroll 2
    for (int i = threadIdx.x; i < heads * WIDTH; i += THREADS) {
      const int head = i / WIDTH, place = i % WIDTH;
      const float sum = Joint(tiles, 0, 8 * half + head).of(tiles, 0, head * STRIDE + place);
      __stcg(s.parts + (part * SUM + 8 * half + head) * PART + span * 64 + place, sum);
    }
  }
  if (threadIdx.x < SUM) {
    const Joint joint(tiles, 0, threadIdx.x);
    __stcg(reinterpret_cast<float2 *>(s.stats) + part * SUM + threadIdx.x, make_float2(joint.peak, joint.total));
  }
}
#endif
#endif
