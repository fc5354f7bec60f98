// First kernel of exact top-k: a chunk's keys near each row's bound, in column order, and how many there are by level.
// Grid (chunks, Hkv * G / SUM / LANES, B * TOKENS), 256 threads. Counting bits, a quarter-rate instruction, takes the time; few
// keys are candidates, so their places are queued, and all threads make lists of them.
#include "candidates.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, WRITERS = THREADS / LANES / 32 * 32;  // WRITERS make a head's list
constexpr int QUEUE = WORDS == 1 ? CHUNK : 1024;  // candidates of a head that are written at a time
static_assert(CHUNK == THREADS * KEYS, "a thread has its own keys");

// Ask for a row's keys and values, so that they are on their way when the second kernel wants them.
__device__ __forceinline__ void prefetch(const void *storage, size_t row) {
  constexpr int ROW = DIM * (TYPE == 2 ? 4 : 2);
#pragma unroll
  for (int i = 0; i < ROW; i += 128) prefetch_line(static_cast<const char *>(storage) + row * ROW + i);
}

// This program's share of the weights that the layer before gave its keys, of the heads of its rows, which are added to marks in units
// of 2^-38, so that the weights of 512 heads fit and their sum does not depend on its order. A thread's first one is asked for
// early and added late.
struct Marks {
  static constexpr bool EARLY = WORDS < 4;  // registers are few beside long codes
  int b, t, head0, heads, column, at;
  float weight;
  __device__ __forceinline__ Marks(const Step &s, int b, int t, int head0, int heads)
      : b(b), t(t), head0(head0), heads(heads), column(-1), at(blockIdx.x * THREADS + threadIdx.x), weight(0) {
    if (EARLY && s.kept != nullptr) load(s);
  }
  __device__ __forceinline__ void load(const Step &s) {
    column = -1;
    if (at >= heads * s.kept_slots) return;
    const int q_heads = s.kv_heads * G, head = head0 + at / s.kept_slots, slot = at % s.kept_slots;
    const size_t ids = ((size_t)(b * s.kept_heads + head / (q_heads / s.kept_heads)) * TOKENS + t) * s.kept_slots;
    column = __ldcg(s.kept + ids + slot);
    weight = __ldcg(s.kept_weights + ((size_t)(b * q_heads + head) * TOKENS + t) * s.kept_slots + slot);
  }
  __device__ __forceinline__ void add(const Step &s) {
    if (s.kept == nullptr) return;
    if (!EARLY) load(s);
    for (; at < heads * s.kept_slots; at += gridDim.x * THREADS, load(s))
      if (column >= 0 && column < s.code_room && weight > 0)
        atomicAdd(s.marks + (size_t)(b * TOKENS + t) * s.code_room + column, max((u64)(weight * 0x1p38f), (u64)1));
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) scan(const __grid_constant__ Step s) {
  __shared__ Terms terms[LANES];
  __shared__ int bounds[LANES], histogram[LANES * LEVELS], found[WARPS][4];
  __shared__ __align__(16) Staged staged[WARPS];
  __shared__ Flags all_flags[WARPS];
  __shared__ u16 queue[LANES][QUEUE];  // places of candidates, in the order of columns
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  constexpr int GROUPS = G / SUM / LANES;
  const int b = blockIdx.z / TOKENS, t = blockIdx.z % TOKENS, group = blockIdx.y % GROUPS;
  const int kv = b * s.kv_heads + blockIdx.y / GROUPS, chunk = blockIdx.x, low = chunk * CHUNK;
  const int row0 = (kv * (G / SUM) + group * LANES) * TOKENS + t;  // the next lane's is T further
  const u64 *codes = s.codes + (size_t)kv * s.code_room * WORDS;
  Staged &own = staged[warp];
  const int piece = warp * WARP_PIECES + lane;  // of the chunk, and every 32nd of the warp's
  auto copy = [&](int from, int to) {           // pieces with columns from `from` on, up to `to`
    const u64 *at = codes + (size_t)low * WORDS + piece * 2;
#pragma unroll
    for (int i = 0; i < OWN_PIECES; i++) {
      const int column = low + (piece + i * 32) * 2 / WORDS;
      if (column + 2 > from) stage(own.at(i * 32 + lane), at + i * 64, WORDS == 1 ? to - column : column < to ? 2 : 0);
    }
  };
  // Codes stay what they are, so that they can be read while the kernel before is at work, but for the newest.
  const int early = min(max(filled(s), 0), s.code_room);
  copy(0, early);
  if (thread < LANES) prefetch_line(s.bounds + row0 + thread * TOKENS);
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
#if PRIOR
  Marks marks(s, b, t, blockIdx.y / GROUPS * G + group * LANES * SUM, LANES * SUM);
#endif
  int first, end;
  span(s, b, t, first, end);
  if (thread < LANES) bounds[thread] = read_bound(s, row0 + thread * TOKENS);
  if (thread < LANES * LEVELS) histogram[thread] = 0;
  const u64 *query = s.query + ((size_t)(kv * G + group * LANES * SUM) * TOKENS + t) * PLANES * WORDS;
  prepare(terms, LANES, query, TOKENS * PLANES * WORDS, WARPS);
  wait_for_copies();
  if (low >= end || low + CHUNK <= first) {  // nobody looks at what is not written
#if PRIOR
    marks.add(s);
#endif
    return;
  }
  if (low + CHUNK > min(early, end) - NEWEST) {
    copy(min(early, end) - NEWEST, s.code_room);
    wait_for_copies();
  }
  __syncthreads();

  const int column = low + thread * KEYS;
  const bool edge = low < first + s.sinks || low + CHUNK > end - s.recents;
  u32 seen = (1 << KEYS) - 1, forced = 0;
  if (edge) {
    seen = 0;
#pragma unroll
    for (int key = 0; key < KEYS; key++) {
      const int shift = offset(s, column + key, first, end);
      seen |= (u32)(shift <= 0) << key, forced |= (u32)(shift < 0) << key;
    }
  }
  compare(own, all_flags[warp], terms, bounds, seen, forced);
  __syncwarp();
  const u32 flags = read_flags(all_flags[warp]);
  const int count = __popc(flags), upto = up_to(count), head = head_read();
  if (lane % READERS == READERS - 1) found[warp][head] = upto;
  __syncthreads();
  int rank0 = upto - count, entries = 0;
  const int writer = min(thread / WRITERS, LANES - 1);  // for which head
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w < warp) rank0 += found[w][head];
    entries += found[w][writer];
  }
  u16 *list = s.lists + ((size_t)(row0 + writer * TOKENS) * s.chunks + chunk) * CHUNK;
  int low_rank = 0;
  do {
    int rank = rank0 - low_rank;
    for (u32 left = flags; left; left &= left - 1, rank++) {
      const int bit = __ffs(left) - 1;
      if (QUEUE == CHUNK || (rank >= 0 && rank < QUEUE))
        queue[head][rank] = (warp * 32 + first_read() + bit / 8) * KEYS + bit % 8;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread < LANES * WRITERS ? thread % WRITERS : QUEUE; i < min(entries - low_rank, QUEUE); i += WRITERS) {
      const int place = queue[writer][i], owner = place / KEYS;
      int level = level_of(staged[owner / 32], owner % 32, place % KEYS, terms[writer], bounds[writer]);
      if (edge && offset(s, low + place, first, end) < 0) level = LEVELS - 1;
      list[low_rank + i] = level << PLACE_BITS | place;
      atomicAdd(&histogram[writer * LEVELS + level], 1);
      if (PREFETCH && level * STEP >= s.margin + 2 && entries <= THREADS) {  // nearer than the last threshold, and few
        const size_t row = (size_t)kv * s.room + low + place;
        prefetch(s.keys, row), prefetch(s.values, row);
      }
    }
    low_rank += QUEUE;
  } while (__syncthreads_or(entries > low_rank));
  if (warp < LANES) {
    int more = histogram[warp * LEVELS + lane];  // at least this level
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_down_sync(~0u, more, d);
      if (lane + d < 32) more += other;
    }
    const int row = row0 + warp * TOKENS;
    s.counts[((size_t)row * LEVELS + lane) * s.count_stride + chunk] = more;
    if (more) atomicAdd(s.totals + row * LEVELS + lane, more);
  }
#if PRIOR
  marks.add(s);
#endif
}
