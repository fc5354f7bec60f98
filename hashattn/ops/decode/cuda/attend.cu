// Second kernel of exact top-k: the threshold, one program's share of the chosen keys, attention to them.
// Grid (slots / ROWS, Hkv * G / SUM, B * TOKENS), 128 threads. Ranks follow column order, so that the result does not depend on
// the bounds.
#include "counts.cuh"
#include "group.cuh"

struct Cut {  // what is chosen: candidates above a level, and those at it but for the `dropped` oldest
  int level, dropped;
};

struct Ranks {  // of the keys that a program attends to, and where their columns go
  Cut cut;
  int first, end, *columns;
};

// Eight entries of a chunk's list, and flags of those nearer than the threshold and at it.
struct Eight {
  u32 words[4], nearer, ties;
  __device__ __forceinline__ Eight(const u16 *list, int at, int entries, int level) : words{}, nearer(0), ties(0) {
    if (at >= entries) return;
    const uint4 all = __ldcg(reinterpret_cast<const uint4 *>(list + at));
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int own = (words[e / 2] >> (16 * (e % 2)) & 0xffff) >> PLACE_BITS;
      nearer |= (u32)(at + e < entries && own > level) << e;
      ties |= (u32)(at + e < entries && own == level) << e;
    }
  }
  // Write the chosen ones, if `c` is counted before them.
  __device__ __forceinline__ void choose(int low, Count c, const Ranks &ranks) const {
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const bool near = nearer >> e & 1, tie = ties >> e & 1;
      const int rank = chosen_before(c, ranks.cut.dropped);
      if ((near || (tie && c.ties >= ranks.cut.dropped)) && rank >= ranks.first && rank < ranks.end)
        ranks.columns[rank - ranks.first] = low + (words[e / 2] >> (16 * (e % 2)) & ((1 << PLACE_BITS) - 1));
      c.nearer += near, c.ties += tie;
    }
  }
};

// Two neighbouring entries a thread of a list, from `at` on for the warp; moves the counts before them on past them.
__device__ __forceinline__ void choose_two(u32 two, int at, int entries, int low, const Ranks &ranks, Count &c) {
  const int lane = threadIdx.x % 32;
  const u32 below = (1u << lane) - 1;
  bool near[2], tie[2];
  Count own = c;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int level = (two >> 16 * e & 0xffff) >> PLACE_BITS;
    const bool there = at + 2 * lane + e < entries;
    near[e] = there && level > ranks.cut.level, tie[e] = there && level == ranks.cut.level;
    const u32 nearer = __ballot_sync(~0u, near[e]), ties = __ballot_sync(~0u, tie[e]);
    own.nearer += __popc(nearer & below), own.ties += __popc(ties & below);
    c.nearer += __popc(nearer), c.ties += __popc(ties);
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int rank = chosen_before(own, ranks.cut.dropped);
    if ((near[e] || (tie[e] && own.ties >= ranks.cut.dropped)) && rank >= ranks.first && rank < ranks.end)
      ranks.columns[rank - ranks.first] = low + (two >> 16 * e & ((1 << PLACE_BITS) - 1));
    own.nearer += near[e], own.ties += tie[e];
  }
}

// Chunk, entries, counts before it, of the lists that hold a program's ranks: each warp finds them for itself.
struct Holders {
  int4 of[WARPS][ROWS];
};

// The columns of these ranks, in column order, from the lists of the chunks that hold them.
__device__ __forceinline__ void from_lists(
    const Step &s, int row, int first_chunk, int end_chunk, const Ranks &ranks, Holders &holding
) {
  constexpr int LONG = 4 * 64;  // entries: a warp reads a list that is not longer
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dropped = ranks.cut.dropped, level = ranks.cut.level;
  int4 *held = holding.of[warp];
  const u16 *counts = s.counts + (size_t)row * LEVELS * s.count_stride;
  const u16 *lists = s.lists + (size_t)row * s.chunks * CHUNK;
  Count carry = {0, 0};
  int holders = 0;
  for (int from = first_chunk & ~3; from < end_chunk && chosen_before(carry, dropped) < ranks.end; from += 128) {
    const int chunk = from + 4 * lane;  // and three more
    auto load = [&](int at) {
      const bool there = chunk < end_chunk && at < LEVELS;
      return there ? __ldcg(reinterpret_cast<const uint2 *>(counts + at * s.count_stride + chunk)) : make_uint2(0, 0);
    };
    const uint2 listed = load(0), least = load(level), above = load(level + 1);
    auto of = [&](const uint2 &four, int j) {  // nothing is written for chunks without keys that are seen
      const int count = (j < 2 ? four.x : four.y) >> 16 * (j % 2) & 0xffff;
      return chunk + j >= first_chunk && chunk + j < end_chunk ? count : 0;
    };
    Count own = {0, 0};
#pragma unroll
    for (int j = 0; j < 4; j++) own.nearer += of(above, j), own.ties += of(least, j);
    own.ties -= own.nearer;
    Count upto = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int nearer = __shfl_up_sync(~0u, upto.nearer, d), ties = __shfl_up_sync(~0u, upto.ties, d);
      if (lane >= d) upto.nearer += nearer, upto.ties += ties;
    }
    Count c = {carry.nearer + upto.nearer - own.nearer, carry.ties + upto.ties - own.ties};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const Count start = c;
      c.nearer += of(above, j), c.ties += of(least, j) - of(above, j);
      const int rank0 = chosen_before(start, dropped), rank1 = chosen_before(c, dropped);
      const bool holds = rank0 < rank1 && rank0 < ranks.end && rank1 > ranks.first;  // so at most ROWS chunks
      const u32 all = __ballot_sync(~0u, holds);
      if (holds)
        held[holders + __popc(all & ((1u << lane) - 1))] = make_int4(chunk + j, of(listed, j), start.nearer, start.ties);
      holders += __popc(all);
    }
    carry.nearer += __shfl_sync(~0u, upto.nearer, 31), carry.ties += __shfl_sync(~0u, upto.ties, 31);
  }
  __syncwarp();
  for (int i = warp; i < holders; i += 2 * WARPS) {  // two at a time, so that they are waited for together
    int4 one[2];
    u32 two[2][LONG / 64];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      one[j] = held[min(i + j * WARPS, holders - 1)];
      if (i + j * WARPS >= holders || one[j].y > LONG) one[j].y = 0;
#pragma unroll
      for (int at = 0; at < LONG; at += 64) {
        const u32 *list = reinterpret_cast<const u32 *>(lists + (size_t)one[j].x * CHUNK + at);
        two[j][at / 64] = at + 2 * lane < one[j].y ? __ldcg(list + lane) : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      Count c = {one[j].z, one[j].w};
#pragma unroll
      for (int at = 0; at < LONG; at += 64)
        if (at < one[j].y) choose_two(two[j][at / 64], at, one[j].y, one[j].x * CHUNK, ranks, c);
    }
  }
  for (int i = 0; i < holders; i++) {
    const int4 one = held[i];  // the same in all warps
    Count c = {one.z, one.w};
    for (int from = 0; one.y > LONG && from < one.y && chosen_before(c, dropped) < ranks.end; from += THREADS * 8) {
      const Eight eight(lists + (size_t)one.x * CHUNK, from + threadIdx.x * 8, one.y, level);
      const Count own = before({__popc(eight.nearer), __popc(eight.ties)}, c);
      eight.choose(one.x * CHUNK, own, ranks);
    }
  }
}

constexpr int DISTANCES = MOST_RANKED + 2;  // forced keys come first
constexpr int FLIGHT = WORDS == 4 ? 2 : 8;  // loads of a thread that are waited for together
constexpr int AHEAD = FLIGHT * PAIR;        // keys of a thread at a time
constexpr int SHARERS = 16;                 // programs of a row that count its keys together, at most
constexpr int PATIENCE = 200'000;           // nanoseconds: whoever waited as long counts all keys alone

struct Search {  // of all codes of a row, in shared memory
  Terms terms;
  int histogram[DISTANCES], found[2];
  Count shares[SHARERS];
};

// A row's codes, from which its keys are counted and chosen where a bound missed the threshold.
struct Codes {
  const Step &s;
  const u64 *codes;
  const Terms &terms;
  int first, end, most;

  __device__ __forceinline__ int place(const u32 *code, int column, int to) const {  // in the histogram; -1 for none
    const int d = ranked(code, terms), shift = column < to ? offset(s, column, first, end) : FAR;
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

  // Of the keys of columns [from, to), those with these ranks: `carry` is counted before them.
  __device__ __forceinline__ void choose(int from, int to, Count carry, const Ranks &ranks) const {
    u32 code[FLIGHT][PAIR * HALVES];
    const int cut = ranks.cut.level, dropped = ranks.cut.dropped;
    for (; from < to && chosen_before(carry, dropped) < ranks.end; from += THREADS * AHEAD) {
      u32 nearer = 0, ties = 0;
      const int column = from + threadIdx.x * AHEAD;
#pragma unroll
      for (int j = 0; j < FLIGHT; j++) load_codes(code[j], codes, column + j * PAIR, s.code_room);
#pragma unroll
      for (int j = 0; j < FLIGHT; j++)
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
          const int at = place(code[j] + i * HALVES, column + j * PAIR + i, to);
          nearer |= (u32)(at >= 0 && at < cut) << (j * PAIR + i);
          ties |= (u32)(at == cut) << (j * PAIR + i);
        }
      Count c = before({__popc(nearer), __popc(ties)}, carry);
#pragma unroll
      for (int e = 0; e < AHEAD; e++) {
        const bool near = nearer >> e & 1, tie = ties >> e & 1;
        const int rank = chosen_before(c, dropped);
        if ((near || (tie && c.ties >= dropped)) && rank >= ranks.first && rank < ranks.end)
          ranks.columns[rank - ranks.first] = column + e;
        c.nearer += near, c.ties += tie;
      }
    }
  }
};

__device__ __forceinline__ void clear(int *histogram) {
  for (int i = threadIdx.x; i < DISTANCES; i += THREADS) histogram[i] = 0;
  __syncthreads();
}

// Whether all sharers of a row have counted; none that has not begun is waited for without end.
__device__ __forceinline__ bool all_counted(const int *counted, int sharers, int &result) {
  if (threadIdx.x == 0) {
    const u64 began = nanoseconds();
    while ((result = read_published(counted) >= sharers) == 0 && nanoseconds() - began < PATIENCE) nap();
  }
  __syncthreads();
  return result;
}

// The columns of a program's ranks from all codes of its row, for a bound that missed the threshold; its first programs share the
// count. Returns the threshold's distance.
__device__ __noinline__ int from_codes(
    const Step &s, const u64 *query, const u64 *codes, int row, int first, int end, int wanted, Ranks ranks, Search &search
) {
  int *histogram = search.histogram, *found = search.found;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = blockIdx.x, most_sharers = min(SHARERS, s.slots / ROWS);
  const int sharers = min(SHARERS, (wanted + ROWS - 1) / ROWS), start = first / PAIR * PAIR;
  const int own = ((end - start + sharers - 1) / sharers + PAIR - 1) / PAIR * PAIR;  // columns of a sharer
  int *shared = s.histograms + (size_t)row * most_sharers * DISTANCES;
  prepare(&search.terms, 1, query, TOKENS * PLANES * WORDS, WARPS);
  clear(histogram);
  int most = MOST_RANKED;
#if RADIUS
  most = min(most, within(s.radius, search.terms.base()));
#endif
  const Codes of_row = {s, codes, search.terms, first, end, most};
  bool together = sharers > 1;
  if (together) {
    if (part < sharers) {
      of_row.count(start + part * own, min(start + (part + 1) * own, end), histogram);
      __syncthreads();
      for (int i = threadIdx.x; i < DISTANCES; i += THREADS) __stcg(shared + part * DISTANCES + i, histogram[i]);
      __syncthreads();
      if (threadIdx.x == 0) add_and_publish(s.counted + row);
    }
    together = all_counted(s.counted + row, sharers, found[0]);
  }
  if (together) {
    for (int i = threadIdx.x; i < DISTANCES; i += THREADS) {
      int sum = 0;
      for (int j = 0; j < sharers; j++) sum += __ldcg(shared + j * DISTANCES + i);
      histogram[i] = sum;
    }
  } else {
    clear(histogram);
    of_row.count(start, end, histogram);
  }
  __syncthreads();
  if (warp == 0) {
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
  ranks.cut = {found[0], found[1]};
  if (!together) {
    of_row.choose(start, end, {0, 0}, ranks);
    return search.terms.base() + STEP * (ranks.cut.level - 1);
  }
  for (int j = warp; j < sharers; j += WARPS) {
    int nearer = 0;
    for (int i = lane; i < ranks.cut.level; i += 32) nearer += __ldcg(shared + j * DISTANCES + i);
    nearer = __reduce_add_sync(~0u, nearer);
    if (lane == 0) search.shares[j] = {nearer, __ldcg(shared + j * DISTANCES + ranks.cut.level)};
  }
  __syncthreads();
  Count carry = {0, 0};
  for (int j = 0; j < sharers; j++) {  // those that hold any of the ranks
    const Count upto = {carry.nearer + search.shares[j].nearer, carry.ties + search.shares[j].ties};
    const int rank0 = chosen_before(carry, ranks.cut.dropped), rank1 = chosen_before(upto, ranks.cut.dropped);
    if (rank0 < rank1 && rank0 < ranks.end && rank1 > ranks.first)
      of_row.choose(start + j * own, min(start + (j + 1) * own, end), carry, ranks);
    carry = upto;
  }
  return search.terms.base() + STEP * (ranks.cut.level - 1);
}

// Of a multiprocessor, at least: as many as registers allow without spilling any.
constexpr int PROGRAMS = DIM > 128 ? (SUM > 8 ? 2 : 3) : !CROWDED || SUM > 8 ? 4 : SUM > 1 ? 6 : DIM == 128 ? 8 : 7;

union Space {
  Holders holders;
  Search search;
#if !TENSOR_CORES
  Values values;
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) attend(const __grid_constant__ Step s) {
  __shared__ int columns[ROWS];
  __shared__ __align__(16) Space space;
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
  wanted = max(wanted, min(visible, s.least));
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  const int count = __ldcg(s.totals + row * LEVELS + lane);  // candidates of at least this level
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
      threshold = from_codes(s, query, codes, row, first, end, wanted, {{0, 0}, rank0, rank1, columns}, space.search);
    } else {
      threshold = read_bound(s, row) - STEP * level;
      const Ranks ranks = {{level, here - wanted}, rank0, rank1, columns};
      from_lists(s, row, first / CHUNK, (end + CHUNK - 1) / CHUNK, ranks, space.holders);
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
  const void *q = static_cast<const char *>(s.q) + q_row * DIM * SIZE;
  const void *keys = static_cast<const char *>(s.keys) + storage, *values = static_cast<const char *>(s.values) + storage;
#if TENSOR_CORES
  attend_group(s, q, (size_t)TOKENS * DIM, keys, values, columns, row * programs_most + part);
#else
  attend_part(s, q, (size_t)TOKENS * DIM, keys, values, columns, row * programs_most + part, space.values);
#endif
  if (!is_last(s.arrived + row, programs)) return;
  if (threadIdx.x < LEVELS) s.totals[row * LEVELS + threadIdx.x] = 0;
  if (threadIdx.x == 0) s.counted[row] = 0;
  combine(s, row * programs_most, programs, q_row, wanted > 0, filled(s) > room_of(s));
}
