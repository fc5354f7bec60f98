// First kernel of exact top-k: a chunk's keys near each row's bound, in column order, and how many there are by level.
// Grid (chunks / each, Hkv * G / SUM / LANES, B * TOKENS), 256 threads. A program's chunks follow one another, and the next
// one's codes are on their way meanwhile.
#include "candidates.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
static_assert(CHUNK == THREADS * KEYS, "a thread has its own keys");

// Ask for a row's keys and values, so that they are on their way when the second kernel wants them.
__device__ __forceinline__ void prefetch(const void *storage, size_t row) {
  constexpr int ROW = DIM * (TYPE == 2 ? 4 : 2);
#pragma unroll
  for (int i = 0; i < ROW; i += 128) prefetch_line(static_cast<const char *>(storage) + row * ROW + i);
}

extern "C" __global__ void __launch_bounds__(THREADS, 5) scan(const __grid_constant__ Step s) {
  __shared__ Terms terms[LANES];
  __shared__ int bounds[LANES], histogram[LANES * LEVELS], found[WARPS][4];
  __shared__ __align__(16) Staged staged[2][WARPS];
  __shared__ Flags flags_of[WARPS];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  constexpr int GROUPS = G / SUM / LANES;
  const int b = blockIdx.z / TOKENS, t = blockIdx.z % TOKENS, group = blockIdx.y % GROUPS;
  const int kv = b * s.kv_heads + blockIdx.y / GROUPS, chunk0 = blockIdx.x * s.each;
  const int row0 = (kv * (G / SUM) + group * LANES) * TOKENS + t;  // the next lane's is T further
  const u64 *codes = s.codes + (size_t)kv * s.code_room * WORDS;
  const int piece = warp * WARP_PIECES + lane;  // of a chunk, and every 32nd of the warp's
  const u64 *source = codes + piece * 2;
  auto copy = [&](int chunk, int from, int to) {  // the warp's pieces with columns from `from` on, up to `to`
    uint4 *own = &staged[chunk % 2][warp].at(lane);
    const u64 *at = source + (size_t)chunk * (CHUNK * WORDS);
#pragma unroll
    for (int i = 0; i < OWN_PIECES; i++) {
      const int column = chunk * CHUNK + (piece + i * 32) * 2 / WORDS;
      if (column + 2 > from) stage(own[i * 36], at + i * 64, WORDS == 1 ? to - column : column < to ? 2 : 0);
    }
  };
  // Codes stay what they are, so that they can be read while the kernel before is at work, but for the newest.
  const int early = min(max(filled(s), 0), s.code_room);
  copy(chunk0, 0, early);
  close_copies();
  if (thread < LANES) prefetch_line(s.bounds + row0 + thread * TOKENS);
  wait_for_the_kernel_before();
#if EARLY_SCAN
  let_the_next_kernel_start();
#endif
  int first, end;
  span(s, b, t, first, end);
  if (thread < LANES) bounds[thread] = read_bound(s, row0 + thread * TOKENS);
  const u64 *query = s.query + ((size_t)(kv * G + group * LANES * SUM) * TOKENS + t) * PLANES * WORDS;
  prepare(terms, LANES, query, TOKENS * PLANES * WORDS, WARPS);
  int total = 0;  // of a head's keys that are at least as near as a level: a warp a head, a thread a level
#pragma unroll 1
  for (int chunk = chunk0; chunk < min(chunk0 + s.each, s.chunks); chunk++) {
    const int low = chunk * CHUNK;
    if (low >= end) break;  // nobody looks at what is not written
    if (chunk + 1 < chunk0 + s.each) copy(chunk + 1, 0, s.code_room);
    close_copies();
    if (low + CHUNK <= first) continue;
    wait_for_earlier_copies();
    if (chunk == chunk0 && low + CHUNK > min(early, end) - NEWEST) {
      copy(chunk, min(early, end) - NEWEST, s.code_room);
      wait_for_copies();
    }
    if (thread < LANES * LEVELS) histogram[thread] = 0;
    __syncthreads();

    const bool edge = low < first + s.sinks || low + CHUNK > end - s.recents;
    u32 seen = (1 << KEYS) - 1, forced = 0;
    if (edge) {
      seen = 0;
#pragma unroll
      for (int key = 0; key < KEYS; key++) {
        const int shift = offset(s, low + thread * KEYS + key, first, end);
        seen |= (u32)(shift <= 0) << key, forced |= (u32)(shift < 0) << key;
      }
    }
    Staged &own = staged[chunk % 2][warp];
    compare(own, flags_of[warp], terms, bounds, seen, forced);
    __syncwarp();
    const u32 flags = read_flags(flags_of[warp]);
    const int count = __popc(flags), upto = up_to(count), head = head_read();
    if (lane % READERS == READERS - 1) found[warp][head] = upto;
    __syncthreads();
    int rank = upto - count, all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const int other = found[w][head];
      all += other;
      if (w < warp) rank += other;
    }
    u16 *list = s.lists + ((size_t)(row0 + head * TOKENS) * s.chunks + chunk) * CHUNK;
#pragma unroll 1
    for (u32 left = flags; left; left &= left - 1) {
      const int bit = __ffs(left) - 1, owner = first_read() + bit / 8, key = bit % 8;
      const int place = (warp * 32 + owner) * KEYS + key;
      int level = level_of(own, owner, key, terms[head], bounds[head]);
      if (edge && offset(s, low + place, first, end) < 0) level = LEVELS - 1;
      list[rank++] = level << PLACE_BITS | place;
      atomicAdd(&histogram[head * LEVELS + level], 1);
      if (PREFETCH && level * STEP >= s.margin + 2 && all <= THREADS) {  // nearer than the last threshold, and few
        const size_t row = (size_t)kv * s.room + low + place;
        prefetch(s.keys, row), prefetch(s.values, row);
      }
    }
    __syncthreads();
    if (warp < LANES) {
      int more = histogram[warp * LEVELS + lane];  // at least this level
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_down_sync(~0u, more, d);
        if (lane + d < 32) more += other;
      }
      s.counts[((size_t)(row0 + warp * TOKENS) * LEVELS + lane) * s.count_stride + chunk] = more;
      total += more;
    }
  }
  if (warp < LANES && total) atomicAdd(s.totals + (row0 + warp * TOKENS) * LEVELS + lane, total);
  wait_for_copies();
#if !EARLY_SCAN
  let_the_next_kernel_start();
#endif
}
