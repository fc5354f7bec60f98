// First kernel of exact top-k: a chunk's keys near each row's bound, in column order, and how many there are by level.
// Grid (chunks, Hkv * G / SUM / LANES, B * TOKENS), 256 threads. A thread looks at a few neighbouring keys. Counting bits, a
// quarter-rate instruction, takes the time; candidates are few, so they are queued and written by all threads at once.
#include "candidates.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, KEYS = CHUNK / THREADS;
// Ask for a row's keys and values, so that they are on their way when the second kernel wants them.
__device__ __forceinline__ void prefetch(const void *storage, size_t row) {
  constexpr int BYTES = DIM * (TYPE == 2 ? 4 : 2);
#pragma unroll
  for (int i = 0; i < BYTES; i += 128)
    prefetch_line(static_cast<const char *>(storage) + row * BYTES + i);
}

extern "C" __global__ void __launch_bounds__(THREADS) scan(const __grid_constant__ Step s) {
  __shared__ Terms terms[LANES];
  __shared__ int bounds[LANES], histogram[LANES * LEVELS];
  __shared__ Lengths found[WARPS];
  __shared__ u16 queue[LANES * CHUNK];  // candidates of all lanes, one lane's after the other's
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  constexpr int GROUPS = G / SUM / LANES;
  const int b = blockIdx.z / TOKENS, t = blockIdx.z % TOKENS, group = blockIdx.y % GROUPS;
  const int kv = b * s.kv_heads + blockIdx.y / GROUPS, chunk = blockIdx.x, low = chunk * CHUNK;
  const int row0 = (kv * (G / SUM) + group * LANES) * TOKENS + t;  // the next lane's is T further
  const u64 *codes = s.codes + (size_t)kv * s.code_room * WORDS;
  constexpr int LINE = 16 / WORDS;  // codes in 128 bytes
  if (thread < CHUNK / LINE && low + thread * LINE < min(filled(s), s.code_room))  // a length of before is as good
    prefetch_line(codes + (size_t)(low + thread * LINE) * WORDS);
  wait_for_the_kernel_before();
  const int own = low + thread * KEYS;  // this thread's first column
  u32 code[KEYS * HALVES];
#pragma unroll
  for (int key = 0; key < KEYS; key += PAIR) load_codes(code + key * HALVES, codes, own + key, s.code_room);
  int first, end;
  span(s, b, t, first, end);
  if (low >= end || low + CHUNK <= first) return;  // nobody looks at what is not written
  if (thread < LANES) bounds[thread] = read_bound(s, row0 + thread * TOKENS);
  if (thread < LANES * LEVELS) histogram[thread] = 0;
  const u64 *query = s.query + ((size_t)(kv * G + group * LANES * SUM) * TOKENS + t) * PLANES * WORDS;
  prepare(terms, LANES, query, TOKENS * PLANES * WORDS, WARPS);
  __syncthreads();

  u32 seen = (1 << KEYS) - 1, forced = 0;
  if (low < first + s.sinks || low + CHUNK > end - s.recents) {
    seen = 0;
#pragma unroll
    for (int key = 0; key < KEYS; key++) {
      const int shift = offset(s, own + key, first, end);
      seen |= (u32)(shift <= 0) << key, forced |= (u32)(shift < 0) << key;
    }
  }
  u32 flags[LANES], lacking[LANES][KEYS / 4];  // lacking: a byte for each key, ~level
  Lengths length = {0, 0};
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    flags[i] = flag_near(code, terms[i], bounds[i], seen, forced, lacking[i]);
    length.add(i, __popc(flags[i]));
  }
  const Lengths upto = up_to(length);
  if (lane == 31) found[warp] = upto;
  __syncthreads();
  Lengths before = {upto.low - length.low, upto.high - length.high}, all = {0, 0};
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    if (w < warp) before.add(found[w]);
    all.add(found[w]);
  }
  int start = 0;
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    u16 *to = queue + start + before.of(i);
    for (u32 left = flags[i]; left; left &= left - 1) {
      const int key = __ffs(left) - 1, level = level_of(lacking[i][0], lacking[i][KEYS / 4 - 1], key);
      *to++ = level << PLACE_BITS | (thread * KEYS + key);
    }
    start += all.of(i);
  }
  __syncthreads();
#pragma unroll 1
  for (int at = thread; at < start; at += THREADS) {
    int i = 0, rank = at;
#pragma unroll
    for (int j = 0; j < LANES - 1; j++)
      if (i == j && rank >= all.of(j)) rank -= all.of(j), i++;
    const u32 entry = queue[at];
    const int level = entry >> PLACE_BITS;
    s.lists[((size_t)(row0 + i * TOKENS) * s.chunks + chunk) * CHUNK + rank] = entry;
    atomicAdd(&histogram[i * LEVELS + level], 1);
    if (PREFETCH && level * STEP >= s.margin + 2 && start <= 2 * THREADS) {  // nearer than the last threshold, and few
      const size_t row = (size_t)kv * s.room + low + (entry & ((1 << PLACE_BITS) - 1));
      prefetch(s.keys, row), prefetch(s.values, row);
    }
  }
  __syncthreads();
  if (warp < LANES) {
    int count = histogram[warp * LEVELS + lane];  // at least this level
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_down_sync(~0u, count, d);
      if (lane + d < 32) count += other;
    }
    const int row = row0 + warp * TOKENS;
    s.counts[((size_t)row * LEVELS + lane) * s.chunks + chunk] = count;
    if (count) atomicAdd(s.totals + row * LEVELS + lane, count);
  }
  let_the_next_kernel_start();
}
