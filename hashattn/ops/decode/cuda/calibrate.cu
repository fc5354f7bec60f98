// Between the two kernels of exact top-k: what all heads of the layer vote for and what the layer before gave weight comes nearer.
// Grid (chunks, B * TOKENS), 1024 threads. A program has one chunk's keys in all choices at one position, a warp for each, so
// that votes are counted in shared memory. The scan has listed all that may come near enough; lists are rewritten in place,
// and then are of the bound less REACH.
#include "step.cuh"

constexpr int THREADS = 1024;
constexpr int MOST_CHOICES = 512;
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

// One warp's: votes for the keys of a list that the choice on raw distances keeps.
__device__ __forceinline__ void vote(const Step &s, const Row &own, Cut cut, int *votes) {
  const int chunk = blockIdx.x, lane = threadIdx.x % 32;
  const u16 *counts = s.counts + (size_t)own.row * LEVELS * s.count_stride;
  const u16 *list = s.lists + ((size_t)own.row * s.chunks + chunk) * CHUNK;
  const int entries = __ldcg(counts + chunk);
  int before = 0;  // at the threshold, in chunks before this one
  for (int c = own.first / CHUNK + lane; cut.dropped > 0 && c < chunk; c += 32) {
    const u16 *at = counts + cut.level * s.count_stride + c;
    before += __ldcg(at) - (cut.level + 1 < LEVELS ? __ldcg(at + s.count_stride) : 0);
  }
  before = __reduce_add_sync(~0u, before);
  for (int from = 0; from < entries; from += 256) {
    const Eight eight(list, from + lane * 8, entries);
    const u32 nearer = eight.above(cut.level), ties = eight.at(cut.level);
    const Count upto = up_to(Count{0, __popc(ties)});
    int tie = before + upto.ties - __popc(ties);
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (nearer >> e & 1 || (ties >> e & 1 && tie >= cut.dropped)) atomicAdd(votes + eight.place(e), SUM);
      tie += ties >> e & 1;
    }
    before += __shfl_sync(~0u, upto.ties, 31);
  }
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

// One warp's: rewrite a list and its counts.
__device__ __forceinline__ void discount(const Step &s, const Row &own, const signed char *nearer, int *levels) {
  const int chunk = blockIdx.x, lane = threadIdx.x % 32;
  u16 *list = s.lists + ((size_t)own.row * s.chunks + chunk) * CHUNK;
  const int entries = __ldcg(s.counts + (size_t)own.row * LEVELS * s.count_stride + chunk);
  levels[lane] = 0;
  int taken = 0;
  for (int from = 0; from < entries; from += 256) {
    const Eight eight(list, from + lane * 8, entries);
    u32 kept = 0;
    int level[8];
#pragma unroll
    for (int e = 0; e < 8; e++) {
      level[e] = eight.level(e);
      if (level[e] < LEVELS - 1) level[e] += nearer[eight.place(e)] - REACH;  // above it are forced keys
      kept |= (u32)(e < eight.entries && level[e] >= 0) << e;
    }
    const Count upto = up_to(Count{__popc(kept)});
    int to = taken + upto.nearer - __popc(kept);
    __syncwarp();  // all have read what is written over
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (kept >> e & 1) {
        list[to++] = level[e] << PLACE_BITS | eight.place(e);
        atomicAdd(levels + level[e], 1);
      }
    taken += __shfl_sync(~0u, upto.nearer, 31);
  }
  __syncwarp();
  int more = levels[lane];  // at least this level
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_down_sync(~0u, more, d);
    if (lane + d < 32) more += other;
  }
  s.new_counts[((size_t)own.row * LEVELS + lane) * s.count_stride + chunk] = more;
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
  auto row_of = [&](int choice) -> Row { return {(b * choices + choice) * TOKENS + t, first, end, wanted}; };
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  __syncthreads();
  const bool seen = low < end && low + CHUNK > first;  // nothing is listed of others
  for (int choice = warp; VOTES && seen && choice < choices; choice += WARPS) {
    const Row own = row_of(choice);
    const int count = __ldcg(s.totals + own.row * LEVELS + lane);  // candidates of at least this level
    const u32 enough = __ballot_sync(~0u, count >= wanted);
    const int level = 31 - __clz(enough), dropped = __shfl_sync(~0u, count, level & 31) - wanted;
    if (enough && !(level == LEVELS - 1 && dropped > 0)) vote(s, own, {level, dropped}, votes);
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
  for (int i = threadIdx.x; i < CHUNK && low + i < s.code_room; i += THREADS) {
    const size_t at = (size_t)blockIdx.y * s.code_room + low + i;
    int near = VOTES && votes[i] >= s.votes ? s.agreement : 0;
#if PRIOR
    const u64 weight = __ldcg(s.marks + at);
    if (weight) s.marks[at] = 0;
    if (s.kept != nullptr && (float)weight * 0x1p-38f * (float)(end - first) > s.ratio) near += s.prior;
#endif
    nearer[i] = near, s.nearer[at] = near;
  }
  __syncthreads();
  for (int choice = warp; seen && choice < choices; choice += WARPS) discount(s, row_of(choice), nearer, levels[warp]);
}
