// Between the two kernels of exact top-k: what all heads of the layer vote for and what the layer before gave weight comes nearer.
// Grid (chunks, B * TOKENS), THREADS threads. A program has one chunk's keys in all choices at one position, a warp for each, so
// that votes are counted in shared memory. The scan has listed all that may come near enough; lists are rewritten in place,
// and then are of the bound less REACH.
#include "step.cuh"

constexpr int THREADS = SUM > 1 || CROWDED ? 512 : 1024;
constexpr int OWN = CHUNK / THREADS, MOST_CHOICES = 512;
#include "codes.cuh"
#include "lists.cuh"

struct Search {  // of all codes of a row
  Terms terms;
  int histogram[DISTANCES], before[DISTANCES];
  Cut cut;
};

struct Row {  // a choice, in this program
  int row, first, end, wanted;
};

constexpr int HELD = SUM > 1 || WORDS > 2 ? 256 : 512;  // entries of a list that a warp keeps from when it votes until it discounts

// One warp's list of a row, 8 entries a thread; the first HELD of them were asked for before it was known how many there are.
struct List {
  u16 *at;
  int entries;
  uint4 held[HELD / 256];
  __device__ __forceinline__ List(const Step &s, int row) {
    at = s.lists + ((size_t)row * s.chunks + blockIdx.x) * CHUNK;
    entries = __ldcg(s.counts + (size_t)row * LEVELS * s.count_stride + blockIdx.x);
#pragma unroll
    for (int i = 0; i < HELD / 256; i++) held[i] = __ldcg(reinterpret_cast<const uint4 *>(at + i * 256) + threadIdx.x % 32);
  }
  // Call each(eight) for all entries, in order.
  template <class Each> __device__ __forceinline__ void walk(Each each) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < HELD / 256; i++)
      if (i * 256 < entries) each(Eight(held[i], i * 256 + lane * 8, entries));
    for (int from = HELD; from < entries; from += 256) each(Eight(at, from + lane * 8, entries));
  }
};

// The sum of a warp's threads up to each one's own.
__device__ __forceinline__ int sum_up_to(int own) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, own, d);
    if (lane >= d) own += other;
  }
  return own;
}

// One warp's: votes for the keys of its list that the choice on raw distances keeps.
__device__ __forceinline__ void vote(const Step &s, const Row &own, const List &list, Cut cut, int *votes) {
  const int chunk = blockIdx.x, lane = threadIdx.x % 32;
  const u16 *counts = s.counts + ((size_t)own.row * LEVELS + cut.level) * s.count_stride;
  int before = 0;  // at the threshold, in chunks before this one
#pragma unroll 4
  for (int c = own.first / CHUNK + lane; cut.dropped > 0 && c < chunk; c += 32)
    before += __ldcg(counts + c) - (cut.level + 1 < LEVELS ? __ldcg(counts + s.count_stride + c) : 0);
  before = __reduce_add_sync(~0u, before);
  list.walk([&](const Eight &eight) {
    u32 chosen = eight.above(cut.level);
    const u32 ties = eight.at(cut.level);
    if (cut.dropped > before) {  // some of the oldest are not
      const int count = __popc(ties), upto = sum_up_to(count);
      int tie = before + upto - count;
      for (u32 left = ties; left; left &= left - 1, tie++)
        if (tie >= cut.dropped) chosen |= left & -left;
      before += __shfl_sync(~0u, upto, 31);
    } else {
      chosen |= ties;
    }
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (chosen >> e & 1) atomicAdd(votes + eight.place(e), SUM);
  });
}

// The same from all codes, by all threads, where the bound missed the raw threshold.
__device__ __noinline__ void vote_from_codes(
    const Step &s, Row own, const u64 *query, const u64 *codes, int *votes, Search &search
) {
  const int low = blockIdx.x * CHUNK, start = own.first / PAIR * PAIR, to = min(low + CHUNK, own.end);
  __syncthreads();
  prepare(&search.terms, 1, query, TOKENS * PLANES * WORDS, WARPS);
  clear(search.histogram);
  clear(search.before);
  const Codes of_row = {s, codes, search.terms, nullptr, own.first, own.end, MOST_RANKED};
  of_row.count(start, own.end, search.histogram);
  of_row.count(start, min(low, own.end), search.before);
  __syncthreads();
  if (threadIdx.x < 32) {
    const Cut cut = cut_of(search.histogram, own.wanted);
    if (threadIdx.x == 0) search.cut = cut;
  }
  __syncthreads();
  const Cut cut = search.cut;
  int nearer = 0;
  for (int i = 0; i < cut.level; i++) nearer += search.before[i];
  of_row.choose(max(low, start), to, {nearer, search.before[cut.level]}, cut, {}, own.wanted, [&](int column, int, bool) {
    atomicAdd(votes + column - low, SUM);
  });
}

// One warp's: rewrite its list and its counts.
__device__ __forceinline__ void discount(const Step &s, const Row &own, const List &list, const signed char *nearer, int *levels) {
  const int lane = threadIdx.x % 32;
  levels[lane] = 0;
  int taken = 0;
  list.walk([&](const Eight &eight) {
    u32 kept = 0;
    int level[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      level[e] = eight.level(e);
      if (level[e] < LEVELS - 1) level[e] += nearer[eight.place(e)] - REACH;  // above it are forced keys
      kept |= (u32)(e < eight.entries && level[e] >= 0) << e;
    }
    const int count = __popc(kept), upto = sum_up_to(count);  // all have read what is written over
    int to = taken + upto - count;
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (kept >> e & 1) {
        list.at[to++] = level[e] << PLACE_BITS | eight.place(e);
        atomicAdd(levels + level[e], 1);
      }
    taken += __shfl_sync(~0u, upto, 31);
  });
  __syncwarp();
  int more = levels[lane];  // at least this level
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_down_sync(~0u, more, d);
    if (lane + d < 32) more += other;
  }
  s.new_counts[((size_t)own.row * LEVELS + lane) * s.count_stride + blockIdx.x] = more;
  if (more) atomicAdd(s.new_totals + own.row * LEVELS + lane, more);
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS) calibrate(const __grid_constant__ Step s) {
  __shared__ int votes[CHUNK], levels[WARPS][LEVELS];
  __shared__ signed char nearer[CHUNK];
  __shared__ u32 missed[MOST_CHOICES / 32];
  __shared__ Search search;
  const int b = blockIdx.y / TOKENS, t = blockIdx.y % TOKENS, low = blockIdx.x * CHUNK;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, choices = s.kv_heads * (G / SUM);
  for (int i = threadIdx.x; i < CHUNK; i += THREADS) votes[i] = 0;
  if (threadIdx.x < MOST_CHOICES / 32) missed[threadIdx.x] = 0;
  int first, end;
  span(s, b, t, first, end);
  const int wanted = budget(s, end - first);
  const bool seen = low < end && low + CHUNK > first;  // nothing is listed of others
  auto row_of = [&](int choice) -> Row { return {(b * choices + choice) * TOKENS + t, first, end, wanted}; };
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  auto totals_of = [&](int choice) { return __ldcg(s.totals + row_of(choice).row * LEVELS + lane); };
  const List kept(s, row_of(min(warp, choices - 1)).row);  // of this warp's first choice
  const int candidates = totals_of(min(warp, choices - 1));
#pragma unroll
  for (int i = 0; i < OWN; i++) {  // what the layer before gave weight
    const int place = threadIdx.x + i * THREADS;
    u64 *mark = s.marks + (size_t)blockIdx.y * s.code_room + low + place;
    const u64 weight = PRIOR && low + place < s.code_room ? __ldcg(mark) : 0;
    if (weight) *mark = 0;
    nearer[place] = PRIOR && s.kept != nullptr && (float)weight * 0x1p-38f * (float)(end - first) > s.ratio ? s.prior : 0;
  }
  __syncthreads();
  auto list_of = [&](int choice) { return choice == warp ? kept : List(s, row_of(choice).row); };
  for (int choice = warp; VOTES && seen && choice < choices; choice += WARPS) {
    const Row own = row_of(choice);
    const int count = choice == warp ? candidates : totals_of(choice);  // of at least this level
    const u32 enough = __ballot_sync(~0u, count >= wanted);
    const int level = 31 - __clz(enough), dropped = __shfl_sync(~0u, count, level & 31) - wanted;
    if (enough && !(level == LEVELS - 1 && dropped > 0)) vote(s, own, list_of(choice), {level, dropped}, votes);
    else if (lane == 0) atomicOr(missed + choice / 32, 1u << choice % 32);
  }
  __syncthreads();
  for (int i = 0; VOTES && seen && i < (choices + 31) / 32; i++)
    for (u32 left = missed[i]; left; left &= left - 1) {
      const int choice = i * 32 + __ffs(left) - 1, kv = b * s.kv_heads + choice / (G / SUM);
      const u64 *query = s.query + ((size_t)(b * choices + choice) * SUM * TOKENS + t) * PLANES * WORDS;
      vote_from_codes(s, row_of(choice), query, s.codes + (size_t)kv * s.code_room * WORDS, votes, search);
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int place = threadIdx.x + i * THREADS;
    const size_t at = (size_t)blockIdx.y * s.code_room + low + place;
    if (low + place >= s.code_room) break;
    if (VOTES && votes[place] >= s.votes) nearer[place] += s.agreement;
    s.nearer[at] = nearer[place];
  }
  __syncthreads();
  for (int choice = warp; seen && choice < choices; choice += WARPS) discount(s, row_of(choice), list_of(choice), nearer, levels[warp]);
}
