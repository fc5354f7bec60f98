// Attention to a program's ROWS keys, its part of the result, and the last program's combination of all parts.
#pragma once
#include "step.cuh"

#ifndef CROWDED
#define CROWDED 0  // whether there are more programs than multiprocessors hold
#endif
#if LOCAL
constexpr int THREADS = 256, JOINED = LANES;  // threads, and heads whose results lie together in a part
#else
constexpr int THREADS = 128, JOINED = SUM;
#endif
constexpr float LOG2E = 1.4426950408889634f;
constexpr int EACH = TYPE == 2 ? 4 : 8;  // numbers in 16 bytes
constexpr int PIECES = DIM / EACH;       // of a row
constexpr int ABREAST = PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32;  // threads that read a row
constexpr int DEPTH = (PIECES + ABREAST - 1) / ABREAST;            // pieces of one of them
constexpr int TEAMS = THREADS / ABREAST;
#if LOCAL
constexpr int TEAMS_EACH = TEAMS / LANES;                         // of a head, which has ROWS keys of its own
constexpr int LEAST = (ROWS + TEAMS_EACH - 1) / TEAMS_EACH;
#else
constexpr int LEAST = (ROWS + TEAMS - 1) / TEAMS;                 // rows of a team
#endif
constexpr int PIECES_HELD = LOCAL || CROWDED ? 4 : 8;
constexpr int BATCH = LEAST * DEPTH <= PIECES_HELD ? LEAST : PIECES_HELD / DEPTH;  // that it holds at a time
constexpr int OWN = (LEAST + BATCH - 1) / BATCH * BATCH;          // rows of a team, some of which may not be there
#if SUM > 1 && TYPE != 2
#define TENSOR_CORES 1  // group.cuh attends, and keeps parts in an order of its own
constexpr int PART = (DIM + 63) / 64 * 64;
__device__ __forceinline__ int dim_of(int place) { return place / 64 * 64 + place % 8 * 8 + place % 64 / 8; }
#else
constexpr int PART = DIM;
__device__ __forceinline__ int dim_of(int place) { return place; }
#endif

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

constexpr int MEDIUM = 1 << 30;  // of a column, which is a medium key's: its key is not read

__device__ __forceinline__ bool is_medium(int column) { return TIERS && column >= 0 && column & MEDIUM; }
__device__ __forceinline__ int key_of(int column) { return is_medium(column) ? -1 : column; }  // where the key is, if it is read
__device__ __forceinline__ int value_of(int column) { return is_medium(column) ? column & ~MEDIUM : column; }

struct Chosen {  // ROWS keys of a program
  const int *columns;  // in shared memory, negative for none
  float *logits;       // [SUM, ROWS] with a stride of `apart`, where logits in base 2 go, with PRIOR
  size_t apart;
  float *estimated;             // [SUM, ROWS] in shared memory: q.k of medium keys, with TIERS,
  const struct Sketch *sketches;  // which are made of these, [SUM] in shared memory,
  const u64 *query, *codes;     // the first head's, the KV head's,
  const u16 *norms;             // [norm_room]
  __device__ __forceinline__ float logit(int head, int row, float product, float scale) const {
    const int column = columns[row];
    const float x = is_medium(column) ? estimated[head * ROWS + row] : product;
    return column < 0 ? -infinity() : x * (scale * LOG2E);
  }
  __device__ __forceinline__ void keep(int head, int row, float x) const {
    if (PRIOR) __stcg(logits + head * apart + row, x);
  }
};

#include "estimate.cuh"

struct Sum {  // of exp2(x - peak) over some keys, and of it times their values
  float peak, total, values[DEPTH][EACH];
};

__device__ __forceinline__ void widen(const uint4 &piece, float *to) {
  const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if TYPE == 0
    to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
#elif TYPE == 1
    to[2 * i] = half_to_float(words[i]), to[2 * i + 1] = half_to_float(words[i] >> 16);
#else
    to[i] = __uint_as_float(words[i]);
#endif
  }
}

__device__ __forceinline__ void store(void *to, size_t at, float x) {
#if TYPE == 2
  static_cast<float *>(to)[at] = x;
#else
  static_cast<u16 *>(to)[at] = narrow<TYPE == 1>(x, 0);
#endif
}

__device__ __forceinline__ bool mine(int piece) { return PIECES % ABREAST == 0 || piece < PIECES; }

// One thread's pieces of a team's rows `from` to `from` + BATCH; nothing is read where a column is negative.
__device__ __forceinline__ void load_rows(uint4 (*x)[DEPTH], const void *storage, const int *columns, int from) {
  const int team = threadIdx.x / ABREAST, place = threadIdx.x % ABREAST;
#pragma unroll
  for (int i = 0; i < BATCH; i++) {
    const int column = key_of(columns[(from + i) * TEAMS + team]);
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
      const int piece = j * ABREAST + place;
      x[i][j] = make_uint4(0, 0, 0, 0);
      if (column >= 0 && mine(piece)) x[i][j] = __ldcs(static_cast<const uint4 *>(storage) + (size_t)column * PIECES + piece);
    }
  }
}

// The same into the thread's own places of shared memory, where the compiler cannot put it off until it is used.
__device__ __forceinline__ void copy_rows(uint4 (*x)[DEPTH][THREADS], const void *storage, const int *columns, int from) {
  const int team = threadIdx.x / ABREAST, place = threadIdx.x % ABREAST;
#pragma unroll
  for (int i = 0; i < BATCH; i++) {
    const int column = value_of(columns[(from + i) * TEAMS + team]);
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
      const int piece = j * ABREAST + place, bytes = column >= 0 && mine(piece) ? 16 : 0;  // the rest is filled with zeros
      const uint4 *source = static_cast<const uint4 *>(storage) + (bytes ? (size_t)column * PIECES + piece : 0);
      copy_16(&x[i][j][threadIdx.x], source, bytes);
    }
  }
}

// Add a batch of rows to a sum, its values copied before; all threads of a team get the same logits.
__device__ __forceinline__ void attend_rows(
    Sum &sum, const uint4 (*keys)[DEPTH], const uint4 (*values)[DEPTH][THREADS], const float (*q)[EACH], float scale,
    const Chosen &chosen, int head, int from
) {
  const int team = threadIdx.x / ABREAST;
  float x[BATCH], peak = sum.peak;
#pragma unroll
  for (int i = 0; i < BATCH; i++) {
    x[i] = 0;
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
      float key[EACH];
      widen(keys[i][j], key);
#pragma unroll
      for (int e = 0; e < EACH; e++) x[i] += key[e] * q[j][e];
    }
#pragma unroll
    for (int d = ABREAST / 2; d; d /= 2) x[i] += __shfl_xor_sync(~0u, x[i], d);
    const int row = (from + i) * TEAMS + team;
    x[i] = chosen.logit(head, row, x[i], scale);
    if (threadIdx.x % ABREAST == 0) chosen.keep(head, row, x[i]);
    peak = fmaxf(peak, x[i]);  // NaN is passed over, and is in the total
  }
  wait_for_copies();
  const float base = peak == -infinity() ? 0 : peak, shrink = exp2f(sum.peak - base);
  sum.peak = peak, sum.total *= shrink;
#pragma unroll
  for (int j = 0; j < DEPTH; j++)
#pragma unroll
    for (int e = 0; e < EACH; e++) sum.values[j][e] *= shrink;
#pragma unroll
  for (int i = 0; i < BATCH; i++) {
    const float p = exp2f(x[i] - base);
    sum.total += p;
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
      float value[EACH];
      widen(values[i][j][threadIdx.x], value);
#pragma unroll
      for (int e = 0; e < EACH; e++) sum.values[j][e] += p * value[e];
    }
  }
}

struct Values {  // on their way to threads, in shared memory
  uint4 of[BATCH][DEPTH][THREADS];
};

// One program's attention to its keys, of each of SUM heads, into parts and stats at `part`.
// q is the first head's row, the next one's is `stride` elements further.
__device__ __forceinline__ void attend_part(
    const Step &s, const void *q, size_t stride, const void *keys, const void *values, const Chosen &chosen, size_t part,
    Values &room
) {
  __shared__ float sums[TEAMS][DIM], peaks[TEAMS], totals[TEAMS];
  const int team = threadIdx.x / ABREAST, place = threadIdx.x % ABREAST;
  uint4 k[BATCH][DEPTH];
  load_rows(k, keys, chosen.columns, 0);
  copy_rows(room.of, values, chosen.columns, 0);
  estimate(s, chosen);
#pragma unroll 1
  for (int head = 0; head < SUM; head++) {
    float own_q[DEPTH][EACH];
    Sum sum = {-infinity(), 0};
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
      const int piece = j * ABREAST + place;
      uint4 x = make_uint4(0, 0, 0, 0);
      if (mine(piece)) x = static_cast<const uint4 *>(q)[(head * stride) / EACH + piece];
      widen(x, own_q[j]);
#pragma unroll
      for (int e = 0; e < EACH; e++) sum.values[j][e] = 0;
    }
#pragma unroll 1
    for (int from = 0; from < OWN; from += BATCH) {
      if (BATCH < OWN && (head || from)) {
        load_rows(k, keys, chosen.columns, from);
        copy_rows(room.of, values, chosen.columns, from);
      }
      attend_rows(sum, k, room.of, own_q, s.scale, chosen, head, from);
    }
    if (head) __syncthreads();
#pragma unroll
    for (int j = 0; j < DEPTH; j++) {
      const int piece = j * ABREAST + place;
#pragma unroll
      for (int e = 0; e < EACH; e++)
        if (mine(piece)) sums[team][piece * EACH + e] = sum.values[j][e];
    }
    if (place == 0) peaks[team] = sum.peak, totals[team] = sum.total;
    __syncthreads();
    float peak = -infinity(), total = 0;
#pragma unroll
    for (int i = 0; i < TEAMS; i++) peak = fmaxf(peak, peaks[i]);
    const float base = peak == -infinity() ? 0 : peak;
    float weights[TEAMS];
#pragma unroll
    for (int i = 0; i < TEAMS; i++) weights[i] = exp2f(peaks[i] - base), total += weights[i] * totals[i];
    for (int d = threadIdx.x; d < DIM; d += THREADS) {
      float x = 0;
#pragma unroll
      for (int i = 0; i < TEAMS; i++) x += weights[i] * sums[i][d];
      __stcg(s.parts + (part * SUM + head) * PART + d, x);
    }
    if (threadIdx.x == 0) __stcg(reinterpret_cast<float2 *>(s.stats) + part * SUM + head, make_float2(peak, total));
  }
}

// Whether this program is the last of `programs` that arrive at a counter, which is then zero again.
__device__ __forceinline__ bool is_last(int *arrived, int programs) {
  __shared__ int last;
  __syncthreads();
  if (threadIdx.x == 0) {  // publishes what the program's threads wrote, and sees what others published
    last = add_and_publish(arrived) == programs - 1;
    if (last) *arrived = 0;
  }
  __syncthreads();
  return last;
}

// How parts are kept between programs: as they are summed up; or, where many are joined, divided by their totals in the type
// of the values, which rounds them as the result is rounded.
constexpr bool NARROW = LOCAL && TYPE != 2;
constexpr int NUMBERS = NARROW ? 8 : 4;  // in 16 bytes

// Join `programs` parts from `part` on and write JOINED rows of out and lse from row0 on, TOKENS apart. A spoilt result is
// NaN, and so is one of keys that were kept whose logits are all -infinity; without any it is zero. 16 bytes of a part are a
// piece; where threads outnumber pieces, they share the parts. With PRIOR, logits become softmax weights.
__device__ __forceinline__ void combine(
    const Step &s, size_t part, int programs, size_t row0, bool kept, bool spoilt, float *logits = nullptr, size_t apart = 0
) {
  constexpr int TILE = 64, AT_ONCE = 8, ALL = JOINED * PART / NUMBERS;
  constexpr int SHARES = ALL >= THREADS ? 1 : THREADS / ALL, OUTPUTS = (ALL + THREADS - 1) / THREADS;
  __shared__ float weights[JOINED][TILE], peaks[JOINED], sums[JOINED], shrinks[JOINED];
  __shared__ __align__(16) float shared[SHARES > 1 ? SHARES * ALL * NUMBERS : 1];
  const int lane = threadIdx.x % 32, share = SHARES > 1 ? threadIdx.x / ALL : 0;
  const float2 *stats = reinterpret_cast<const float2 *>(s.stats) + part * JOINED;
  const uint4 *parts = reinterpret_cast<const uint4 *>(s.parts) + part * ALL;
  float x[OUTPUTS][NUMBERS] = {};
  uint4 ahead[AT_ONCE];
  auto load = [&](int piece, int from) {  // of every SHARES-th part
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int at = from + j * SHARES + share;
      const bool there = at < programs && piece < ALL && share < SHARES;
      ahead[j] = there ? __ldcg(parts + (size_t)at * ALL + piece) : make_uint4(0, 0, 0, 0);
    }
  };
  const int first = SHARES > 1 ? threadIdx.x % ALL : threadIdx.x;
  load(first, 0);  // on their way while the weights are found
  if (threadIdx.x < JOINED) peaks[threadIdx.x] = -infinity(), sums[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll 1
  for (int from = 0; from < programs; from += TILE) {
    for (int head = threadIdx.x / 32; head < JOINED; head += THREADS / 32) {
      float2 own[TILE / 32];
      float peak = peaks[head];
      const float old = peak;
#pragma unroll
      for (int i = 0; i < TILE / 32; i++) {
        const int at = from + i * 32 + lane;
        own[i] = at < programs ? __ldcg(stats + (size_t)at * JOINED + head) : make_float2(-infinity(), 0);
        peak = fmaxf(peak, own[i].x);
      }
#pragma unroll
      for (int d = 16; d; d /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, d));
      const float base = peak == -infinity() ? 0 : peak;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < TILE / 32; i++) {
        const float weight = exp2f(own[i].x - base), total = weight * own[i].y;
        weights[head][i * 32 + lane] = NARROW ? total : weight, sum += total;
      }
#pragma unroll
      for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      __syncwarp();
      if (lane == 0) {
        const float shrink = exp2f(old - base);
        shrinks[head] = shrink, peaks[head] = peak, sums[head] = sums[head] * shrink + sum;
      }
    }
    __syncthreads();
#pragma unroll
    for (int output = 0; output < OUTPUTS; output++) {
      const int piece = first + output * THREADS, head = min(piece * NUMBERS / PART, JOINED - 1);
#pragma unroll
      for (int e = 0; e < NUMBERS; e++) x[output][e] *= shrinks[head];
      for (int i = 0; i < min(TILE, programs - from); i += AT_ONCE * SHARES) {
        if (output || from || i) load(piece, from + i);
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
          const int at = i + j * SHARES + share;
          const float weight = at < TILE ? weights[head][at] : 0;  // nothing is loaded beyond
          float own[8];
          if (NARROW) widen(ahead[j], own);
          else own[0] = __uint_as_float(ahead[j].x), own[1] = __uint_as_float(ahead[j].y),
               own[2] = __uint_as_float(ahead[j].z), own[3] = __uint_as_float(ahead[j].w);
#pragma unroll
          for (int e = 0; e < NUMBERS; e++) x[output][e] += weight * own[e];
        }
      }
    }
    __syncthreads();
  }
  const float nan = __int_as_float(0x7fffffff), empty = kept ? nan : 0;
  auto finish = [&](int number, float x) {
    const int head = number / PART, d = dim_of(number % PART);
    const float sum = sums[head], result = spoilt ? nan : sum == 0 ? empty : x / sum;
    if (d < DIM) store(s.out, (row0 + (size_t)head * TOKENS) * DIM + d, result);
  };
  if (SHARES > 1) {
#pragma unroll
    for (int e = 0; e < NUMBERS; e++)
      if (share < SHARES) shared[(share * ALL + first) * NUMBERS + e] = x[0][e];
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < ALL * NUMBERS; i += THREADS) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < SHARES; j++) sum += shared[j * ALL * NUMBERS + i];
      finish(i, sum);
    }
  } else {
#pragma unroll
    for (int output = 0; output < OUTPUTS; output++)
#pragma unroll
      for (int e = 0; e < NUMBERS; e++)
        if (first + output * THREADS < ALL) finish((first + output * THREADS) * NUMBERS + e, x[output][e]);
  }
  if (threadIdx.x < JOINED) {
    const float peak = peaks[threadIdx.x], sum = sums[threadIdx.x];
    const float lse = ((peak == -infinity() ? 0 : peak) + log2f(sum)) / LOG2E;
    s.lse[row0 + (size_t)threadIdx.x * TOKENS] = kept && sum == 0 ? nan : lse;
  }
#pragma unroll 8
  for (int i = threadIdx.x; i < (PRIOR ? JOINED * programs * ROWS : 0); i += THREADS) {
    const int head = i / (programs * ROWS);
    const float peak = peaks[head] == -infinity() ? 0 : peaks[head], sum = sums[head];
    float *x = logits + head * apart + i % (programs * ROWS);
    __stcg(x, exp2f(__ldcg(x) - peak) * (sum == 0 ? (kept ? nan : 1) : 1 / sum));
  }
}
