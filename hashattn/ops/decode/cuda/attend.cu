// Second kernel of exact top-k: the threshold, one program's share of the chosen keys, attention to them.
// Grid (slots / ROWS, Hkv * G / SUM, B * TOKENS), 128 threads. Ranks follow column order, so the result does not depend on the bounds.
#include "counts.cuh"
#include "group.cuh"


struct Cut {  // what is chosen: candidates above a level, and those at it but for the `dropped` oldest
  int level, dropped;
};

// Eight entries of a chunk's list, and flags of those nearer than the threshold and at it.
struct Eight {
  u32 words[4], nearer, ties;
  __device__ __forceinline__ Eight(const u16 *list, int at, int entries, int level) : words{}, nearer(0), ties(0) {
    if (at >= entries) return;
    const uint4 all = *reinterpret_cast<const uint4 *>(list + at);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int own = (words[e / 2] >> (16 * (e % 2)) & 0xffff) >> PLACE_BITS;
      nearer |= (u32)(at + e < entries && own > level) << e;
      ties |= (u32)(at + e < entries && own == level) << e;
    }
  }
  // Write the chosen ones of ranks rank0 to rank1, if `c` is counted before them.
  __device__ __forceinline__ void choose(int *columns, int low, Count c, int dropped, int rank0, int rank1) const {
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const bool near = nearer >> e & 1, tie = ties >> e & 1;
      const int rank = chosen_before(c, dropped);
      if ((near || (tie && c.ties >= dropped)) && rank >= rank0 && rank < rank1)
        columns[rank - rank0] = low + (words[e / 2] >> (16 * (e % 2)) & ((1 << PLACE_BITS) - 1));
      c.nearer += near, c.ties += tie;
    }
  }
};

// The columns of ranks rank0 to rank1, in column order, from the lists of the chunks that hold them.
__device__ __forceinline__ void from_lists(
    const Step &s, int row, Cut cut, int first_chunk, int end_chunk, int rank0, int rank1, int *columns
) {
  constexpr int LONG = 32 * 8;  // entries: a warp reads a list that is not longer
  __shared__ int4 held[ROWS];   // chunk, entries, counts before it
  __shared__ int holders;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u16 *counts = s.counts + (size_t)row * LEVELS * s.chunks, *lists = s.lists + (size_t)row * s.chunks * CHUNK;
  if (threadIdx.x == 0) holders = 0;
  __syncthreads();
  Count carry = {0, 0};
  for (int from = first_chunk; from < end_chunk; from += THREADS) {
    const int chunk = from + threadIdx.x;
    int listed = 0;
    Count own = {0, 0};
    if (chunk < end_chunk) {
      listed = counts[chunk];
      if (cut.level < LEVELS - 1) own.nearer = counts[(cut.level + 1) * s.chunks + chunk];
      own.ties = counts[cut.level * s.chunks + chunk] - own.nearer;
    }
    const Count c = before(own, carry);
    const int start = chosen_before(c, cut.dropped);
    const int stop = chosen_before({c.nearer + own.nearer, c.ties + own.ties}, cut.dropped);
    if (start < stop && start < rank1 && stop > rank0) {  // so at most ROWS chunks
      const int i = atomicAdd(&holders, 1);
      if (i < ROWS) held[i] = make_int4(chunk, listed, c.nearer, c.ties);
    }
    if (chosen_before(carry, cut.dropped) >= rank1) break;
  }
  __syncthreads();
  for (int i = warp; i < min(holders, ROWS); i += WARPS) {
    const int4 one = held[i];
    if (one.y > LONG) continue;
    const Eight eight(lists + (size_t)one.x * CHUNK, lane * 8, one.y, cut.level);
    u32 upto = __popc(eight.nearer) | __popc(eight.ties) << 16;
    const u32 own = upto;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const u32 other = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += other;
    }
    const Count c = {one.z + (int)((upto - own) & 0xffff), one.w + (int)((upto - own) >> 16)};
    eight.choose(columns, one.x * CHUNK, c, cut.dropped, rank0, rank1);
  }
  for (int i = 0; i < min(holders, ROWS); i++) {
    const int4 one = held[i];
    Count c = {one.z, one.w};
    for (int from = 0; one.y > LONG && from < one.y && chosen_before(c, cut.dropped) < rank1; from += THREADS * 8) {
      const Eight eight(lists + (size_t)one.x * CHUNK, from + threadIdx.x * 8, one.y, cut.level);
      const Count own = before({__popc(eight.nearer), __popc(eight.ties)}, c);
      eight.choose(columns, one.x * CHUNK, own, cut.dropped, rank0, rank1);
    }
  }
}

// The same from all codes of the row, for a bound that missed the threshold. Returns the threshold's distance.
__device__ __noinline__ int from_codes(
    const Step &s, const u64 *query, const u64 *codes, int first, int end, int wanted, int rank0, int rank1, int *columns
) {
  constexpr int DISTANCES = MOST_RANKED + 2, AHEAD = 4 * PAIR;  // forced keys come first; keys of a thread at a time
  __shared__ Terms terms;
  __shared__ int histogram[DISTANCES];
  __shared__ int found[2];
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < DISTANCES; i += THREADS) histogram[i] = 0;
  prepare(&terms, 1, query, TOKENS * PLANES * WORDS, WARPS);
  __syncthreads();
  int most = MOST_RANKED;
#if RADIUS
  most = min(most, within(s.radius, terms.base()));
#endif
  auto place_of = [&](const u32 *code, int column) {  // in the histogram; -1 for keys that may not be chosen
    const int d = ranked(code, terms), shift = offset(s, column, first, end);
    return shift < 0 ? 0 : shift > 0 || d > most ? -1 : d + 1;
  };
  const int start = first / PAIR * PAIR;
  for (int from = start; from < end; from += THREADS * PAIR) {
    u32 code[PAIR * HALVES];
    const int column = from + threadIdx.x * PAIR;
    load_codes(code, codes, column, s.code_room);
#pragma unroll
    for (int i = 0; i < PAIR; i++) {
      const int place = place_of(code + i * HALVES, column + i);
      if (place >= 0) atomicAdd(&histogram[place], 1);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int sum = 0, cut = DISTANCES - 1, dropped = 0;
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
        cut = from + at, dropped = __shfl_sync(~0u, upto, at) - wanted;
        break;
      }
      sum = __shfl_sync(~0u, upto, 31);
    }
    if (lane == 0) found[0] = cut, found[1] = dropped;
  }
  __syncthreads();
  const int cut = found[0], dropped = found[1];
  Count carry = {0, 0};
  for (int from = start; from < end && chosen_before(carry, dropped) < rank1; from += THREADS * AHEAD) {
    u32 nearer = 0, ties = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 code[PAIR * HALVES];
      const int column = from + threadIdx.x * AHEAD + j * PAIR;
      load_codes(code, codes, column, s.code_room);
#pragma unroll
      for (int i = 0; i < PAIR; i++) {
        const int place = place_of(code + i * HALVES, column + i);
        nearer |= (u32)(place >= 0 && place < cut) << (j * PAIR + i);
        ties |= (u32)(place == cut) << (j * PAIR + i);
      }
    }
    Count c = before({__popc(nearer), __popc(ties)}, carry);
#pragma unroll
    for (int e = 0; e < AHEAD; e++) {
      const bool near = nearer >> e & 1, tie = ties >> e & 1;
      const int rank = chosen_before(c, dropped);
      if ((near || (tie && c.ties >= dropped)) && rank >= rank0 && rank < rank1)
        columns[rank - rank0] = from + threadIdx.x * AHEAD + e;
      c.nearer += near, c.ties += tie;
    }
  }
  return terms.base() + STEP * (cut - 1);
}

extern "C" __global__ void __launch_bounds__(THREADS, DIM <= 128 ? 4 : SUM > 8 ? 2 : 3) attend(const __grid_constant__ Step s) {
  __shared__ int columns[ROWS];
  const int part = blockIdx.x, lane = threadIdx.x % 32, b = blockIdx.z / TOKENS, t = blockIdx.z % TOKENS;
  const int head = b * gridDim.y + blockIdx.y, kv = b * s.kv_heads + blockIdx.y / (G / SUM), row = head * TOKENS + t;
  int first, end;
  span(s, b, t, first, end);
  const int visible = end - first;
#if SHARE
  int wanted = (int)ceil((double)visible * s.share);
#else
  int wanted = min(s.k, visible);
#endif
  wanted = max(wanted, min(visible, s.sinks + s.recents));
  wait_for_the_kernel_before();
  const int count = s.totals[row * LEVELS + lane];  // candidates of at least this level
  const int found = __shfl_sync(~0u, count, 0);
#if RADIUS
  wanted = min(wanted, found);
#endif
  const int rank0 = part * ROWS, rank1 = min(rank0 + ROWS, wanted), programs = max(1, (wanted + ROWS - 1) / ROWS);
  if (threadIdx.x < ROWS) columns[threadIdx.x] = -1;
  __syncthreads();
  if (rank0 < rank1) {
    const u32 enough = __ballot_sync(~0u, count >= wanted);
    const int level = 31 - __clz(enough);
    const int here = __shfl_sync(~0u, count, level & 31);
    // too few candidates, or too many at the last level, which holds all that are nearer as well
    const bool missed = enough == 0 || (level == LEVELS - 1 && here > wanted);
    int threshold = 0;
    if (missed) {
      const u64 *query = s.query + ((size_t)head * SUM * TOKENS + t) * PLANES * WORDS;
      const u64 *codes = s.codes + (size_t)kv * s.code_room * WORDS;
      threshold = from_codes(s, query, codes, first, end, wanted, rank0, rank1, columns);
    } else {
      threshold = read_bound(s, row) - STEP * level;
      from_lists(s, row, {level, here - wanted}, first / CHUNK, (end + CHUNK - 1) / CHUNK, rank0, rank1, columns);
    }
#if !RADIUS
    if (part == 0 && threadIdx.x == 0)  // falls by one level in 16 steps
      s.bounds[row] = max((threshold + s.margin) * 16, min(s.bounds[row], FAR * 16) - 1);
#endif
    __syncthreads();
  }
  if (threadIdx.x < ROWS) s.ids[(size_t)row * s.slots + rank0 + threadIdx.x] = columns[threadIdx.x];
  if (part >= programs) return;
  constexpr size_t SIZE = TYPE == 2 ? 4 : 2;
  const size_t programs_most = s.slots / ROWS, storage = (size_t)kv * s.room * DIM * SIZE;
  const size_t q_row = (size_t)head * SUM * TOKENS + t;
#if TENSOR_CORES
  attend_group(
#else
  attend_part(
#endif
      s, static_cast<const char *>(s.q) + q_row * DIM * SIZE, (size_t)TOKENS * DIM,
      static_cast<const char *>(s.keys) + storage, static_cast<const char *>(s.values) + storage, columns,
      row * programs_most + part
  );
  let_the_next_kernel_start();
  if (!is_last(s.arrived + row, programs)) return;
  if (threadIdx.x < LEVELS) s.totals[row * LEVELS + threadIdx.x] = 0;
  combine(s, row * programs_most, programs, q_row, filled(s) > s.room);
}
