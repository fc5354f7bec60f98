// Last kernel of exact top-k: the threshold, one program's share of the chosen keys, attention to them.
// Grid (slots / ROWS, Hkv * G / SUM, B * TOKENS), 128 threads. Ranks follow column order, so that the result does not depend on
// the bounds.
#include "group.cuh"
#include "codes.cuh"
#include "lists.cuh"

struct Ranks {  // of the keys that a program attends to, and where their columns go
  Cut cut, critical;
  int first, end, *columns;
  __device__ __forceinline__ void take(int column, int rank, bool medium) const {
    if (rank >= first && rank < end) columns[rank - first] = TIERS && medium ? column | MEDIUM : column;
  }
};

// Two neighbouring entries a thread of a list, from `at` on for the warp; moves the counts before them on past them.
__device__ __forceinline__ void choose_two(u32 two, int at, int entries, int low, const Ranks &ranks, Count &c) {
  const int lane = threadIdx.x % 32;
  const u32 below = (1u << lane) - 1;
  Near near = {};
  Count own = c;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int level = (two >> 16 * e & 0xffff) >> PLACE_BITS;
    const bool there = at + 2 * lane + e < entries;
    auto flag = [&](bool flag, u32 &flags, int &before, int &upto) {
      flags |= (u32)flag << e;
      const u32 all = __ballot_sync(~0u, flag);
      before += __popc(all & below), upto += __popc(all);
    };
    flag(there && level > ranks.cut.level, near.nearer, own.nearer, c.nearer);
    flag(there && level == ranks.cut.level, near.ties, own.ties, c.ties);
    if (TIERS) near.first |= (u32)(level > ranks.critical.level) << e;
    if (TIERS) flag(there && level == ranks.critical.level, near.first_ties, own.first_ties, c.first_ties);
  }
  near.choose(2, own, ranks.cut.dropped, ranks.critical.dropped, [&](int e, int rank, bool medium) {
    ranks.take(low + (two >> 16 * e & ((1 << PLACE_BITS) - 1)), rank, medium);
  });
}

// Lists that hold a program's ranks, chunk << 12 | entries, and counts before them: each warp finds them for itself.
struct Holders {
  int4 of[WARPS][ROWS];
};

__device__ __forceinline__ int chunk_of(const int4 &holder) { return holder.x >> 12; }
__device__ __forceinline__ int entries_of(const int4 &holder) { return holder.x & 0xfff; }
__device__ __forceinline__ Count before(const int4 &holder) { return {holder.y, holder.z, TIERS ? holder.w : 0}; }

__device__ __forceinline__ const u16 *counts_of(const Step &s, int row) {
  return (CALIBRATED ? s.new_counts : s.counts) + (size_t)row * LEVELS * s.count_stride;
}

// The columns of these ranks, in column order, from the lists of the chunks that hold them.
__device__ __forceinline__ void from_lists(
    const Step &s, int row, int first_chunk, int end_chunk, const Ranks &ranks, Holders &holding
) {
  constexpr int LONG = 4 * 64;  // entries: a warp reads a list that is not longer
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dropped = ranks.cut.dropped, level = ranks.cut.level;
  int4 *held = holding.of[warp];
  const u16 *counts = counts_of(s, row), *lists = s.lists + (size_t)row * s.chunks * CHUNK;
  Count carry = {};
  int holders = 0;
  for (int from = first_chunk & ~3; from < end_chunk && chosen_before(carry, dropped) < ranks.end; from += 128) {
    const int chunk = from + 4 * lane;  // and three more
    auto load = [&](int at) {
      const bool there = chunk < end_chunk && at < LEVELS;
      return there ? __ldcg(reinterpret_cast<const uint2 *>(counts + at * s.count_stride + chunk)) : make_uint2(0, 0);
    };
    const uint2 none = make_uint2(0, 0), listed = load(0), least = load(level), above = load(level + 1);
    const uint2 first = TIERS ? load(ranks.critical.level) : none, beyond = TIERS ? load(ranks.critical.level + 1) : none;
    auto of = [&](const uint2 &four, int j) {  // nothing is written for chunks without keys that are seen
      const int count = (j < 2 ? four.x : four.y) >> 16 * (j % 2) & 0xffff;
      return chunk + j >= first_chunk && chunk + j < end_chunk ? count : 0;
    };
    auto count = [&](int j) -> Count { return {of(above, j), of(least, j) - of(above, j), of(first, j) - of(beyond, j)}; };
    Count own = {};
#pragma unroll
    for (int j = 0; j < 4; j++) own = own + count(j);
    const Count upto = up_to(own);
    Count c = carry + (upto - own);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const Count start = c;
      c = c + count(j);
      const int rank0 = chosen_before(start, dropped), rank1 = chosen_before(c, dropped);
      const bool holds = rank0 < rank1 && rank0 < ranks.end && rank1 > ranks.first;  // so at most ROWS chunks
      const u32 all = __ballot_sync(~0u, holds);
      const int list = (chunk + j) << 12 | of(listed, j);
      if (holds) held[holders + __popc(all & ((1u << lane) - 1))] = make_int4(list, start.nearer, start.ties, start.first_ties);
      holders += __popc(all);
    }
    carry = carry + of_lane(upto, 31);
  }
  __syncwarp();
  for (int i = warp; i < holders; i += 2 * WARPS) {  // two at a time, so that they are waited for together
    int4 one[2];
    u32 two[2][LONG / 64];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      one[j] = held[min(i + j * WARPS, holders - 1)];
      if (i + j * WARPS >= holders || entries_of(one[j]) > LONG) one[j].x = 0;
#pragma unroll
      for (int at = 0; at < LONG; at += 64) {
        const u32 *list = reinterpret_cast<const u32 *>(lists + (size_t)chunk_of(one[j]) * CHUNK + at);
        two[j][at / 64] = at + 2 * lane < entries_of(one[j]) ? __ldcg(list + lane) : 0;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int entries = entries_of(one[j]);
      Count c = before(one[j]);
#pragma unroll
      for (int at = 0; at < LONG; at += 64)
        if (at < entries) choose_two(two[j][at / 64], at, entries, chunk_of(one[j]) * CHUNK, ranks, c);
    }
  }
  for (int i = 0; i < holders; i++) {
    const int4 one = held[i];  // the same in all warps
    const int entries = entries_of(one), low = chunk_of(one) * CHUNK;
    Count c = before(one);
    for (int from = 0; entries > LONG && from < entries && chosen_before(c, dropped) < ranks.end; from += THREADS * 8) {
      const Eight eight(lists + low, from + threadIdx.x * 8, entries);
      Near near = {eight.above(level), eight.at(level)};
      if (TIERS) near.first = eight.above(ranks.critical.level), near.first_ties = eight.at(ranks.critical.level);
      const Count own = before(near.count(), c);
      near.choose(8, own, dropped, ranks.critical.dropped, [&](int e, int rank, bool medium) {
        ranks.take(low + eight.place(e), rank, medium);
      });
    }
  }
}

constexpr int SHARERS = 16;        // programs of a row that count its keys together, at most
constexpr int PATIENCE = 200'000;  // nanoseconds: whoever waited as long counts all keys alone

struct Search {  // of all codes of a row, in shared memory
  Terms terms;
  int histogram[DISTANCES];
  Cut cut, critical;
  Count shares[SHARERS];
};

// Whether all sharers of a row have counted; none that has not begun is waited for without end.
__device__ __forceinline__ bool all_counted(const int *counted, int sharers, int &result) {
  if (threadIdx.x == 0) {
    const u64 began = nanoseconds();
    while ((result = read_published(counted) >= sharers) == 0 && nanoseconds() - began < PATIENCE) nap();
  }
  __syncthreads();
  return result;
}

struct Seen {  // a row's codes, the columns that it sees, and how many keys it wants, critical ones first
  const u64 *query, *codes;
  const signed char *discounts;
  int row, first, end, wanted, critical;
};

// The columns of a program's ranks from all codes of its row, for a bound that missed the threshold; its first programs share the
// count. Returns the threshold's distance.
__device__ __noinline__ int from_codes(const Step &s, Seen seen, Ranks ranks, Search &search) {
  int *histogram = search.histogram;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = blockIdx.x, most_sharers = min(SHARERS, s.slots / ROWS);
  const int sharers = min(SHARERS, (seen.wanted + ROWS - 1) / ROWS), start = seen.first / PAIR * PAIR, end = seen.end;
  const int own = ((end - start + sharers - 1) / sharers + PAIR - 1) / PAIR * PAIR;  // columns of a sharer
  int *shared = s.histograms + (size_t)seen.row * most_sharers * DISTANCES, *counted = s.counted + seen.row;
  prepare(&search.terms, 1, seen.query, TOKENS * PLANES * WORDS, WARPS);
  clear(histogram);
  int most = MOST_RANKED + SPAN;
#if RADIUS
  most = min(most, within(s.radius, search.terms.base()));
#endif
  const Codes of_row = {s, seen.codes, search.terms, seen.discounts, seen.first, end, most};
  bool together = sharers > 1;
  if (together) {
    if (part < sharers) {
      of_row.count(start + part * own, min(start + (part + 1) * own, end), histogram);
      __syncthreads();
      for (int i = threadIdx.x; i < DISTANCES; i += THREADS) __stcg(shared + part * DISTANCES + i, histogram[i]);
      __syncthreads();
      if (threadIdx.x == 0) add_and_publish(counted);
    }
    together = all_counted(counted, sharers, search.cut.level);
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
    const Cut cut = cut_of(histogram, seen.wanted), critical = TIERS ? cut_of(histogram, seen.critical) : cut;
    if (lane == 0) search.cut = cut, search.critical = critical;
  }
  __syncthreads();
  ranks.cut = search.cut, ranks.critical = search.critical;
  auto choose = [&](int from, int to, Count carry) {
    of_row.choose(from, to, carry, ranks.cut, ranks.critical, ranks.end, [&](int column, int rank, bool medium) {
      ranks.take(column, rank, medium);
    });
  };
  const int threshold = search.terms.base() + STEP * (ranks.cut.level - 1 - REACH);
  if (!together) {
    choose(start, end, {});
    return threshold;
  }
  for (int j = warp; j < sharers; j += WARPS) {
    int nearer = 0;
    for (int i = lane; i < ranks.cut.level; i += 32) nearer += __ldcg(shared + j * DISTANCES + i);
    nearer = __reduce_add_sync(~0u, nearer);
    const int *at = shared + j * DISTANCES;
    if (lane == 0) search.shares[j] = {nearer, __ldcg(at + ranks.cut.level), TIERS ? __ldcg(at + ranks.critical.level) : 0};
  }
  __syncthreads();
  Count carry = {};
  for (int j = 0; j < sharers; j++) {  // those that hold any of the ranks
    const Count upto = carry + search.shares[j];
    const int rank0 = chosen_before(carry, ranks.cut.dropped), rank1 = chosen_before(upto, ranks.cut.dropped);
    if (rank0 < rank1 && rank0 < ranks.end && rank1 > ranks.first)
      choose(start + j * own, min(start + (j + 1) * own, end), carry);
    carry = upto;
  }
  return threshold;
}

// Of a multiprocessor, at least: as many as registers allow without spilling any.
constexpr int FEWER = DIM > 128 ? (SUM > 8 ? 2 : 3) : 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int MOST_PROGRAMS = 6;
#else
constexpr int MOST_PROGRAMS = 8;
#endif
constexpr int PROGRAMS = DIM > 128 || !CROWDED || SUM > 8 ? FEWER : TIERS || PRIOR ? (SUM > 1 ? 5 : 6) : SUM > 1 ? (DIM == 128 ? 6 : 5) : DIM == 128 ? MOST_PROGRAMS : 7;

union Space {
  Holders holders;
  Search search;
#if !TENSOR_CORES
  Values values;
#endif
};

// Where a row's threshold is among its candidates.
struct Threshold {
  Cut cut;
  bool missed;  // too few candidates, or too many at the last level that is told apart, which holds all that are nearer as well
};

// From how many candidates there are of at least each lane's level.
__device__ __forceinline__ Threshold threshold_of(int count, int wanted) {
  const u32 enough = __ballot_sync(~0u, count >= wanted);
  const int level = 31 - __clz(enough), here = __shfl_sync(~0u, count, level & 31);
  constexpr int LAST = LEVELS - 1 - SPAN;
  return {{level, here - wanted}, enough == 0 || level > LAST || (level == LAST && here > wanted)};
}

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) attend(const __grid_constant__ Step s) {
  __shared__ int columns[ROWS];
  __shared__ __align__(16) Space space;
  const int part = blockIdx.x, lane = threadIdx.x % 32, b = blockIdx.z / TOKENS, t = blockIdx.z % TOKENS;
  const int head = b * gridDim.y + blockIdx.y, kv = b * s.kv_heads + blockIdx.y / (G / SUM), row = head * TOKENS + t;
  int first, end;
  span(s, b, t, first, end);
  int wanted = budget(s, end - first);
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  constexpr size_t SIZE = TYPE == 2 ? 4 : 2;
  const size_t q_row = (size_t)head * SUM * TOKENS + t;
  const void *q = static_cast<const char *>(s.q) + q_row * DIM * SIZE;
  int *totals = (CALIBRATED ? s.new_totals : s.totals) + row * LEVELS;
  const int count = __ldcg(totals + lane);  // candidates of at least this level
#if TIERS
  __shared__ float estimated[SUM * ROWS];
  __shared__ Sketch sketches[SUM];
  sketch(q, (size_t)TOKENS * DIM, s.centre + (size_t)kv * DIM, s.a, sketches);
#endif
#if RADIUS
  wanted = min(wanted, __shfl_sync(~0u, count, 0));
#endif
  int critical = wanted;
#if TIERS
  critical = min(wanted, max((int)ceil((double)(end - first) * s.critical), min(end - first, s.least)));
#endif
  const int rank0 = part * ROWS, rank1 = min(rank0 + ROWS, wanted), programs = max(1, (wanted + ROWS - 1) / ROWS);
  const u64 *query = s.query + ((size_t)head * SUM * TOKENS + t) * PLANES * WORDS;
  const u64 *codes = s.codes + (size_t)kv * s.code_room * WORDS;
  if (threadIdx.x < ROWS) columns[threadIdx.x] = -1;
  __syncthreads();
  if (rank0 < rank1) {
    const Threshold found = threshold_of(count, wanted), nearest = TIERS ? threshold_of(count, critical) : found;
    int threshold = 0;
    if (found.missed || nearest.missed) {
      const signed char *discounts = CALIBRATED ? s.nearer + (size_t)blockIdx.z * s.code_room : nullptr;
      const Seen seen = {query, codes, discounts, row, first, end, wanted, critical};
      threshold = from_codes(s, seen, {{}, {}, rank0, rank1, columns}, space.search);
    } else {
      threshold = read_bound(s, row) - STEP * (found.cut.level + REACH);
      const Ranks ranks = {found.cut, nearest.cut, rank0, rank1, columns};
      from_lists(s, row, first / CHUNK, (end + CHUNK - 1) / CHUNK, ranks, space.holders);
    }
#if !RADIUS
    if (part == 0 && threadIdx.x == 0)  // falls by one level in 16 steps
      s.bounds[row] = max((threshold + s.margin) * 16, min(s.bounds[row], FAR * 16) - 1);
#endif
    __syncthreads();
  }
  const size_t slot = (size_t)row * s.slots + rank0, apart = (size_t)TOKENS * s.slots;
  float *logits = PRIOR ? s.weights + q_row * s.slots : nullptr;  // of the first head; the next one's are `apart`
  if (threadIdx.x < ROWS) {
    s.ids[slot + threadIdx.x] = value_of(columns[threadIdx.x]);
#if TIERS
    s.tier[slot + threadIdx.x] = is_medium(columns[threadIdx.x]);
#endif
  }
  if (part >= programs) {
    for (int i = threadIdx.x; PRIOR && i < SUM * ROWS; i += THREADS) logits[i / ROWS * apart + rank0 + i % ROWS] = 0;
    return;
  }
  const size_t programs_most = s.slots / ROWS, storage = (size_t)kv * s.room * DIM * SIZE, at = row * programs_most + part;
  const char *keys = static_cast<const char *>(s.keys) + storage, *values = static_cast<const char *>(s.values) + storage;
#if TIERS
  const u16 *norms = s.norms + (size_t)kv * s.norm_room;
  const Chosen chosen = {columns, logits + rank0, apart, estimated, sketches, query, codes, norms};
#else
  const Chosen chosen = {columns, logits + rank0, apart};
#endif
#if TENSOR_CORES
  attend_group(s, q, (size_t)TOKENS * DIM, keys, values, chosen, at);
#else
  attend_part(s, q, (size_t)TOKENS * DIM, keys, values, chosen, at, space.values);
#endif
  if (!is_last(s.arrived + row, programs)) return;
  if (threadIdx.x < LEVELS) {
    s.totals[row * LEVELS + threadIdx.x] = 0;
    if (CALIBRATED) totals[threadIdx.x] = 0;
  }
  if (threadIdx.x == 0) s.counted[row] = 0;
  combine(s, row * programs_most, programs, q_row, wanted > 0, filled(s) > room_of(s), logits, apart);
}
