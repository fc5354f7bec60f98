// First kernel of exact top-k: a chunk's keys near each row's bound, in column order, and how many there are by level.
// Grid (chunks, B * Hkv * T * G / SUM / LANES), 256 threads. Eight keys or four a thread; a row's candidates are few, so
// that counting bits, a quarter-rate instruction, is what takes the time.
#include "step.cuh"

constexpr int WARPS = 8, LOADS = 4, KEYS = LOADS * PAIR;
constexpr int TILE = CHUNK / WARPS;  // columns of a warp: load j of lane l holds PAIR columns from (32 j + l) * PAIR on

// Four counters of 8 bits, of the flagged keys of each load.
__device__ __forceinline__ u32 by_load(u32 flags) {
  if (PAIR == 1) return (flags | flags << 7 | flags << 14 | flags << 21) & 0x01010101;
  const u32 pairs = (flags & 0x55) + (flags >> 1 & 0x55);
  return (pairs | pairs << 6 | pairs << 12 | pairs << 18) & 0x03030303;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) scan(const __grid_constant__ Step s) {
  __shared__ Terms terms[LANES];
  __shared__ int histogram[LANES][LEVELS];
  __shared__ u16 found[LANES][WARPS];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int groups = G / SUM / LANES, group = blockIdx.y % groups, t = blockIdx.y / groups % s.T;
  const int kv = blockIdx.y / groups / s.T, chunk = blockIdx.x, low = chunk * CHUNK;
  const int row0 = (kv * (G / SUM) + group * LANES) * s.T + t;  // the next lane's is T further
  const u64 *codes = s.codes + (size_t)kv * s.code_room * WORDS;
  wait_for_the_kernel_before();
  int first, end;
  span(s, kv / s.kv_heads, t, first, end);
  if (low >= end || low + CHUNK <= first) return;  // nobody looks at what is not written

  u32 code[KEYS][HALVES];
#pragma unroll
  for (int j = 0; j < LOADS; j++)
    load_codes(code[j * PAIR], codes, low + warp * TILE + (j * 32 + lane) * PAIR, s.code_room);
  if (thread < LANES) terms[thread].base = 0;
  for (int i = thread; i < LANES * LEVELS; i += 32 * WARPS) histogram[0][i] = 0;
  __syncthreads();
  const u64 *query = s.query + ((size_t)(kv * G + group * LANES * SUM) * s.T + t) * PLANES * WORDS;
  prepare(terms, LANES, query, s.T * PLANES * WORDS, WARPS);
  __syncthreads();

  const bool edge = low < first + s.sinks || low + CHUNK > end - s.recents;  // holds keys that are unseen or forced
  u32 flags[LANES], nearer[LANES][KEYS / 4], before[LANES];
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    const int past = within(read_bound(s, row0 + i * s.T), terms[i].base) + 1;
    flags[i] = 0;
#pragma unroll
    for (int key = KEYS - 1; key >= 0; key--) {
      int short_of = ranked(code[key], terms[i]) - past;  // negative within the bound
      if (edge) short_of += offset(s, low + warp * TILE + (key / PAIR * 32 + lane) * PAIR + key % PAIR, first, end);
      flags[i] = __funnelshift_l(short_of, flags[i], 1);
      nearer[i][key / 4] = __byte_perm(max(short_of, -LEVELS), nearer[i][key / 4], 0x6540);
    }
    const u32 own = by_load(flags[i]);
    u32 upto = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const u32 other = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += other;
    }
    const u32 all = __shfl_sync(~0u, upto, 31), loads_before = all * 0x01010100u;
    if (lane == 0) found[i][warp] = (loads_before >> 24) + (all >> 24);
    before[i] = upto - own + loads_before;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < LANES; i++) {
    int at = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) at += w < warp ? found[i][w] : 0;
    u16 *list = s.lists + ((size_t)(row0 + i * s.T) * s.chunks + chunk) * CHUNK + at;
    for (u32 left = flags[i]; left; left &= left - 1) {
      const int key = __ffs(left) - 1, load = key / PAIR;
      int rank = before[i] >> (8 * load) & 255;
      if (key % PAIR) rank += flags[i] >> (key - 1) & 1;
      const int level = ~(int)(signed char)(nearer[i][key / 4] >> (8 * (key % 4)));  // bound - ranked
      const int place = warp * TILE + (load * 32 + lane) * PAIR + key % PAIR;
      list[rank] = level << PLACE_BITS | place;
      atomicAdd(&histogram[i][level], 1);
    }
  }
  __syncthreads();
  if (warp < LANES) {
    int count = histogram[warp][lane];  // at least this level
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_down_sync(~0u, count, d);
      if (lane + d < 32) count += other;
    }
    const int row = row0 + warp * s.T;
    s.counts[((size_t)row * LEVELS + lane) * s.chunks + chunk] = count;
    if (count) atomicAdd(s.totals + row * LEVELS + lane, count);
  }
  let_the_next_kernel_start();
}
