// All codes of a row, from which its keys are counted and chosen where a bound missed the threshold.
#pragma once
#include "counts.cuh"

constexpr int DISTANCES = MOST_RANKED + SPAN + 2;  // forced keys come first
constexpr int FLIGHT = THREADS > 256 ? 1 : WORDS == 4 ? 2 : 8;  // loads of a thread that are waited for together
constexpr int AHEAD = FLIGHT * PAIR;  // keys of a thread at a time

// Flags of a thread's keys: nearer than the threshold and at it; nearer than that of critical keys and at it.
struct Near {
  u32 nearer, ties, first, first_ties;
  __device__ __forceinline__ Count count() const { return {__popc(nearer), __popc(ties), TIERS ? __popc(first_ties) : 0}; }
  // Call take(e, rank, medium) for each of `entries` keys that is chosen, if `c` is counted before the first.
  template <class Take>
  __device__ __forceinline__ void choose(int entries, Count c, int dropped, int first_dropped, Take take) const {
#pragma unroll
    for (int e = 0; e < entries; e++) {
      const bool near = nearer >> e & 1, tie = ties >> e & 1, first_tie = TIERS && first_ties >> e & 1;
      const bool medium = TIERS && !(first >> e & 1) && !(first_tie && c.first_ties >= first_dropped);
      if (near || (tie && c.ties >= dropped)) take(e, chosen_before(c, dropped), medium);
      c.nearer += near, c.ties += tie, c.first_ties += first_tie;
    }
  }
};

struct Codes {
  const Step &s;
  const u64 *codes;
  const Terms &terms;
  const signed char *discounts;  // of the row's columns; nullptr for raw distances
  int first, end, most;

  __device__ __forceinline__ int place(const u32 *code, int column, int to) const {  // in a histogram; -1 for none
    const int shift = column < to ? offset(s, column, first, end) : FAR;
    int d = ranked(code, terms);
    if (CALIBRATED && discounts != nullptr && shift == 0) d += REACH - __ldcg(discounts + column);
    return shift < 0 ? 0 : shift > 0 || d > most ? -1 : d + 1;
  }

  // Count the keys of columns [from, to); from is a multiple of PAIR.
  __device__ __forceinline__ void count(int from, int to, int *histogram) const {
    u32 code[FLIGHT][PAIR * HALVES];
    for (; from < to; from += THREADS * AHEAD) {
      const int column = from + threadIdx.x * PAIR;
#pragma unroll
      for (int j = 0; j < FLIGHT; j++) load_codes(code[j], codes, column + j * THREADS * PAIR, s.code_room);
#pragma unroll
      for (int j = 0; j < FLIGHT; j++)
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
          const int at = place(code[j] + i * HALVES, column + j * THREADS * PAIR + i, to);
          if (at >= 0) atomicAdd(&histogram[at], 1);
        }
    }
  }

  // Call take(column, rank, medium) for the keys of columns [from, to) that are chosen; `carry` is counted before them.
  // `last`: no rank from there on is wanted.
  template <class Take>
  __device__ __forceinline__ void choose(int from, int to, Count carry, Cut cut, Cut critical, int last, Take take) const {
    u32 code[FLIGHT][PAIR * HALVES];
    for (; from < to && chosen_before(carry, cut.dropped) < last; from += THREADS * AHEAD) {
      Near near = {};
      const int column = from + threadIdx.x * AHEAD;
#pragma unroll
      for (int j = 0; j < FLIGHT; j++) load_codes(code[j], codes, column + j * PAIR, s.code_room);
#pragma unroll
      for (int j = 0; j < FLIGHT; j++)
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
          const int at = place(code[j] + i * HALVES, column + j * PAIR + i, to), e = j * PAIR + i;
          near.nearer |= (u32)(at >= 0 && at < cut.level) << e, near.ties |= (u32)(at == cut.level) << e;
          if (TIERS) near.first |= (u32)(at >= 0 && at < critical.level) << e, near.first_ties |= (u32)(at == critical.level) << e;
        }
      const Count own = before(near.count(), carry);
      near.choose(AHEAD, own, cut.dropped, critical.dropped, [&](int e, int rank, bool medium) { take(column + e, rank, medium); });
    }
  }
};

__device__ __forceinline__ void clear(int *histogram) {
  for (int i = threadIdx.x; i < DISTANCES; i += THREADS) histogram[i] = 0;
  __syncthreads();
}

// One warp's: the place in a histogram up to which so many keys lie, and how many too many.
__device__ __forceinline__ Cut cut_of(const int *histogram, int wanted) {
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int from = 0; from < DISTANCES; from += 32) {
    int upto = from + lane < DISTANCES ? histogram[from + lane] : 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += other;
    }
    upto += sum;
    const u32 enough = __ballot_sync(~0u, upto >= wanted);
    if (enough) {
      const int at = __ffs(enough) - 1;
      return {from + at, __shfl_sync(~0u, upto, at) - wanted};
    }
    sum = __shfl_sync(~0u, upto, 31);
  }
  return {DISTANCES - 1, 0};
}
