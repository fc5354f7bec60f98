// What both kernels of a decode step are given, and the device functions that they share.
//
// The host defines: G query heads a KV head; SUM heads that choose together (1 or G); LANES rows that a program of the
// scan serves; WORDS of 64 bits a code; PLANES of a query; DIM of a head; TYPE of keys and values (0 bfloat16, 1 float16,
// 2 float32); TOKENS queries a head; ROWS that a program of the second kernel attends to, and whether such programs are CROWDED,
// more than multiprocessors hold; CAUSAL, SHARE, RADIUS; BIASED: the last byte of a key's code is a number to add; ALIGNED: codes may be read in 16 bytes. A row is one choice of keys: a query head's, or a KV head's with SUM = G, at one of T positions.
// Where distances are CALIBRATED, calibrate.cu runs between the two kernels: REACH, by how much a key may come nearer at most, and
// SPAN, by how much that may differ, in units of `ranked`. VOTES: whether it counts votes. PRIOR: whether weights are read of
// the layer before and given to the next one. TIERS: the logits of keys that are not critical are estimated.
#pragma once

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

#include "ptx.cuh"

#ifndef LOCAL
#define LOCAL 0
#endif
#ifndef BIASED
#define BIASED 0
#endif
#ifndef CALIBRATED
#define CALIBRATED 0
#define REACH 0
#define SPAN 0
#define VOTES 0
#define PRIOR 0
#endif
#ifndef TIERS
#define TIERS 0
#endif

// Kernels let the next one start when they have waited for the one before. So a kernel that has waited finds all that came
// before it done; until then it may read what the one before does not write. What may lie in the first-level cache from before
// is read past it.
struct Step {
  const void *q, *keys, *values;  // [B, Hq, T, DIM], [B, Hkv, room, DIM]
  const u64 *query, *codes;       // [B, Hq, T, PLANES, WORDS], [B, Hkv, code_room, WORDS]
  const int *starts, *length;     // [B], [1]
  int *bounds;                    // [rows], sixteenths: how far candidates are looked for
  int *totals;                    // [rows, LEVELS], zero before and after
  int *arrived, *counted;         // [rows], zero before and after
  u16 *lists;                     // [rows, chunks, CHUNK]: level << PLACE_BITS | place, in column order
  u16 *counts;                    // [rows, LEVELS, count_stride]: candidates of at least this level
  float *parts, *stats;           // [parts, JOINED, PART], [parts, JOINED, 2]
  int *histograms;                // [rows, sharers, DISTANCES]: of keys at each distance
  int *ids;                       // [rows, slots]
  void *out;                      // [B, Hq, T, DIM]
  float *lse;                     // [B, Hq, T]
  // of a calibration
  u64 *marks;                     // [B, T, code_room], the weights that the layer before gave; zero before and after
  signed char *nearer;            // [B, T, code_room], by how much a key comes nearer, in units of `ranked`
  int *new_totals;                // [rows, LEVELS], as totals, of what the lists are then
  u16 *new_counts;                // [rows, LEVELS, count_stride]
  const int *kept;                // [B, kept_heads, T, kept_slots], keys of the layer before; nullptr if there are none
  const float *kept_weights;      // [B, Hq, T, kept_slots]
  float *weights;                 // [B, Hq, T, slots], softmax weights for the next layer
  // of tiers
  const u16 *norms;               // [B, Hkv, norm_room], bfloat16
  const float *centre, *a;        // [B, Hkv, DIM], [1]
  signed char *tier;              // [rows, slots], 1 for keys that are not critical
  double share, critical;
  float scale, ratio, per_bit;
  int k, least, radius, sinks, recents, margin, room, code_room, chunks, count_stride, slots, kv_heads;
  int votes, agreement, prior, kept_heads, kept_slots, norm_room;
};

constexpr int LEVELS = 32;  // how much nearer than the bound a candidate is, where it is no more than LEVELS - 1
constexpr int FAR = 1 << 14;  // beyond every distance
constexpr int PLACE_BITS = 11;
constexpr int PAIR = WORDS == 1 ? 2 : 1;  // codes in 16 bytes, or 1
constexpr int CHUNK = WORDS == 4 ? 1024 : 2048;  // keys of a program of the scan
constexpr int NEWEST = 64;                // columns that the kernel before may be writing
constexpr int HALVES = 2 * WORDS;         // 32-bit words of a code

// The summed distance of a key to SUM queries of PLANES bit planes counts, for each bit, the weight of the terms that
// differ. Let the cheaper value of the bit cost `cheap` of WEIGHT in all: then the other costs WEIGHT - 2 * cheap more,
// which is odd or even as WEIGHT is. So distance = base + STEP * ranked, and `ranked` needs few population counts:
// one of the bits that are not the cheaper ones if WEIGHT is odd, and one for each of SLICES masks.
constexpr int WEIGHT = SUM * ((1 << PLANES) - 1);
constexpr int ODD = WEIGHT & 1;
constexpr int STEP = 2 - ODD;
constexpr int MOST = WEIGHT / 2;
constexpr int SLICES = MOST == 0 ? 0 : MOST < 2 ? 1 : MOST < 4 ? 2 : MOST < 8 ? 3 : MOST < 16 ? 4 : MOST < 32 ? 5 : 6;
constexpr int FARTHEST = (64 * WORDS + 255 * BIASED) * WEIGHT;
constexpr int MOST_RANKED = FARTHEST / STEP;

struct Terms {
  u32 cheaper[HALVES];
  u32 masks[SLICES > 0 ? SLICES : 1][HALVES];
  int bases[HALVES];  // of each word's bits
  __device__ __forceinline__ int base() const {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < HALVES; w++) sum += bases[w];
    return WEIGHT == 1 ? 0 : sum;
  }
};

// Columns that are filled. Read past the first-level cache, which would go on to give what was read too early.
__device__ __forceinline__ int filled(const Step &s) { return __ldcg(s.length); }

// Columns that keys, values and codes have room for.
__device__ __forceinline__ int room_of(const Step &s) { return min(s.room, s.code_room); }

// The columns [first, end) that query t of row b sees, none beyond the room.
__device__ __forceinline__ void span(const Step &s, int b, int t, int &first, int &end) {
  first = __ldcg(s.starts + b);
  end = min(filled(s), room_of(s));
#if CAUSAL
  end += t - (TOKENS - 1);
#endif
  end = max(end, first);
}

// -FAR ranks forced keys before every distance, FAR keeps unseen ones from being candidates.
__device__ __forceinline__ int offset(const Step &s, int column, int first, int end) {
  if (column < first || column >= end) return FAR;
  return column < first + s.sinks || column >= end - s.recents ? -FAR : 0;
}

// Keys that a row of so many visible ones wants.
__device__ __forceinline__ int budget(const Step &s, int visible) {
#if SHARE
  const int wanted = (int)ceil((double)visible * s.share);
#else
  const int wanted = min(s.k, visible);
#endif
  return max(wanted, min(visible, s.least));
}

__device__ __forceinline__ int read_bound(const Step &s, size_t row) {
#if RADIUS
  return s.radius;
#else
  return min(max(__ldcg(s.bounds + row) >> 4, 0), FARTHEST);
#endif
}

// Terms of `lanes` rows, from the query of the first; the next row's is SUM * stride words further. All threads call it,
// and synchronise after it. What the kernel before wrote is read past the first-level cache, as above.
__device__ __forceinline__ void prepare(Terms *terms, int lanes, const u64 *query, int stride, int warps) {
  const u32 *words = reinterpret_cast<const u32 *>(query);
  if (WEIGHT == 1) {
    const int row = threadIdx.x / HALVES, word = threadIdx.x % HALVES;
    if (row < lanes) terms[row].cheaper[word] = __ldcg(words + row * stride * 2 + word);
    return;
  }
  const int lane = threadIdx.x % 32;
  for (int task = threadIdx.x / 32; task < lanes * HALVES; task += warps) {
    const int row = task / HALVES, word = task % HALVES;
    int dear = 0;  // what a bit that is 0 costs
#pragma unroll
    for (int i = 0; i < SUM; i++)
#pragma unroll
      for (int p = 0; p < PLANES; p++)
        dear += (__ldcg(words + ((row * SUM + i) * stride + p * WORDS) * 2 + word) >> lane & 1) << p;
    const int cheap = min(dear, WEIGHT - dear), extra = (WEIGHT - 2 * cheap) / 2;
    const u32 cheaper = __ballot_sync(~0u, dear > WEIGHT - dear);
#pragma unroll
    for (int p = 0; p < SLICES; p++) {
      const u32 mask = __ballot_sync(~0u, extra >> p & 1);
      if (lane == 0) terms[row].masks[p][word] = mask;
    }
    const int base = __reduce_add_sync(~0u, cheap);
    if (lane == 0) terms[row].cheaper[word] = cheaper, terms[row].bases[word] = base;
  }
}

__device__ __forceinline__ int ranked(const u32 *code, const Terms &terms) {
  int d = 0;
#pragma unroll
  for (int w = 0; w < HALVES; w++) {
    u32 unequal = code[w] ^ terms.cheaper[w];
    if (BIASED && w == HALVES - 1) {  // the queries' last byte is zero
      d += (unequal >> 24) * (WEIGHT / STEP);
      unequal &= 0xffffff;
    }
    if (ODD) d += __popc(unequal);
#pragma unroll
    for (int p = 0; p < SLICES; p++) d += __popc(unequal & terms.masks[p][w]) << (p + ODD);
  }
  return d;
}

// The largest `ranked` within a distance; less than zero for none.
__device__ __forceinline__ int within(int bound, int base) {
  const int left = bound - base;
  return STEP == 1 ? left : left >> 1;
}

// Codes of the PAIR columns from `column` on, which must be a multiple of PAIR; zero beyond the room.
__device__ __forceinline__ void load_codes(u32 *x, const u64 *codes, int column, int room) {
#if ALIGNED
  const uint4 *at = reinterpret_cast<const uint4 *>(codes + (size_t)column * WORDS);
#pragma unroll
  for (int i = 0; i < PAIR * HALVES / 4; i++) {
    const uint4 y = column < room ? at[i] : make_uint4(0, 0, 0, 0);
    x[4 * i] = y.x, x[4 * i + 1] = y.y, x[4 * i + 2] = y.z, x[4 * i + 3] = y.w;
  }
#else
#pragma unroll
  for (int i = 0; i < PAIR * WORDS; i++) {
    const u64 y = column + i / WORDS < room ? codes[(size_t)column * WORDS + i] : 0;
    x[2 * i] = (u32)y, x[2 * i + 1] = (u32)(y >> 32);
  }
#endif
}
