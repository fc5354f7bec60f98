// LocalTopK in one kernel: a program looks at its chunk's keys, keeps the ROWS nearest of each lane and attends to them.
// Grid (CHUNKS, Hkv * G / LANES, B * TOKENS), 256 threads. Column n is in chunk n / RUN % CHUNKS: a thread looks at 8 columns.
#include "candidates.cuh"
#include "counts.cuh"

constexpr int SEGMENT = 64;  // candidates of a lane that a warp finds
constexpr int EIGHT = 8, PIECES_OF_A_RUN = RUN / EIGHT;  // columns of a thread at a time
constexpr int DISTANCES = MOST_RANKED + 2;                  // forced keys come first
static_assert(SUM == 1, "heads choose for themselves");

// Where a lane's column of this rank is kept, so that a team finds its rows.
__device__ __forceinline__ int slot_of(int lane, int rank) {
  return rank / TEAMS_EACH * TEAMS + lane * TEAMS_EACH + rank % TEAMS_EACH;
}

struct Chunk {  // the runs `from` to `to` of a chunk hold columns that are seen
  const u64 *codes;
  int number, from, to, first, end;
  __device__ __forceinline__ int column(int own) const {
    return (own / PIECES_OF_A_RUN * CHUNKS + number) * RUN + own % PIECES_OF_A_RUN * EIGHT;
  }
  // Seen columns of the chunk before a column.
  __device__ __forceinline__ int filled(int end) const {
    return end / (RUN * CHUNKS) * RUN + min(max(end % (RUN * CHUNKS) - number * RUN, 0), RUN);
  }
};

__device__ __forceinline__ void load_run(u32 *code, const Step &s, const Chunk &c, int run) {
#pragma unroll
  for (int key = 0; key < EIGHT; key += PAIR)
    load_codes(code + key * HALVES, c.codes, run < c.to ? c.column(run) + key : s.code_room, s.code_room);
}

// Which of a run's columns are seen, and which of these are forced.
__device__ __forceinline__ void look(const Step &s, const Chunk &c, int run, u32 &seen, u32 &forced) {
  const int column = c.column(run);
  seen = run < c.to ? 0xff : 0, forced = 0;
  if (column >= c.first + s.sinks && column + EIGHT <= c.end - s.recents) return;
#pragma unroll
  for (int key = 0; key < EIGHT; key++) {
    const int shift = offset(s, column + key, c.first, c.end);
    seen &= ~((u32)(shift > 0) << key), forced |= (u32)(shift < 0) << key;
  }
  forced &= seen;
}

// The nearest `wanted` of every lane from all codes of the chunk, for hints that failed. Sets their thresholds.
__device__ __noinline__ void from_codes(const Step &s, const Chunk c, const Terms *terms, int wanted, int *columns, int *thresholds) {
  __shared__ int histogram[LANES * DISTANCES], cuts[LANES], drops[LANES];
  for (int i = threadIdx.x; i < LANES * DISTANCES; i += THREADS) histogram[i] = 0;
  __syncthreads();
  for (int run = c.from + threadIdx.x; run < c.to; run += THREADS) {
    u32 code[EIGHT * HALVES], seen, forced;
    load_run(code, s, c, run);
    look(s, c, run, seen, forced);
#pragma unroll
    for (int key = 0; key < EIGHT; key++)
      if (seen >> key & 1)
        for (int i = 0; i < LANES; i++)
          atomicAdd(&histogram[i * DISTANCES + (forced >> key & 1 ? 0 : 1 + ranked(code + key * HALVES, terms[i]))], 1);
  }
  __syncthreads();
  if (threadIdx.x < LANES) {
    const int *own = histogram + threadIdx.x * DISTANCES;
    int sum = 0, cut = 0;
    while (cut < DISTANCES - 1 && sum + own[cut] < wanted) sum += own[cut++];
    cuts[threadIdx.x] = cut, drops[threadIdx.x] = sum + own[cut] - wanted;
    thresholds[threadIdx.x] = terms[threadIdx.x].base() + STEP * (cut - 1);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < LANES; i++) {
    Count carry = {0, 0};
    for (int from = c.from; from < c.to; from += THREADS) {
      const int run = from + threadIdx.x;
      u32 code[EIGHT * HALVES], seen, forced, near = 0, ties = 0;
      load_run(code, s, c, run);
      look(s, c, run, seen, forced);
#pragma unroll
      for (int key = 0; key < EIGHT; key++) {
        const int place = forced >> key & 1 ? 0 : 1 + ranked(code + key * HALVES, terms[i]);
        near |= (u32)(place < cuts[i]) << key, ties |= (u32)(place == cuts[i]) << key;
      }
      near &= seen, ties &= seen;
      Count at = before({__popc(near), __popc(ties)}, carry);
      for (u32 left = near | ties; left; left &= left - 1) {
        const int key = __ffs(left) - 1;
        const bool tie = ties >> key & 1;
        if (!tie || at.ties >= drops[i]) columns[slot_of(i, chosen_before(at, drops[i]))] = c.column(run) + key;
        at.nearer += !tie, at.ties += tie;
      }
    }
  }
}

// The same from the candidates within the lanes' bounds. A warp looks at a part of the chunk for itself. Returns whether
// bounds were wrong for any lane.
__device__ __forceinline__ bool from_candidates(
    const Step &s, const Chunk &c, const Terms *terms, const int *bounds, int wanted, int *columns, int *thresholds
) {
  __shared__ u32 queue[LANES][WARPS][SEGMENT];  // level << 20 | place in the chunk
  __shared__ int histogram[LANES * LEVELS], lengths[LANES][WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = (c.to - c.from + THREADS - 1) / THREADS * 32;
  const int from = c.from + warp * share, to = min(from + share, c.to);
  u32 code[EIGHT * HALVES];
  load_run(code, s, c, from + lane < to ? from + lane : c.to);
  if (threadIdx.x < LANES * LEVELS) histogram[threadIdx.x] = 0;
  __syncthreads();  // terms and bounds are there as well
  Lengths held = {0, 0};
#pragma unroll 1
  for (int run = from + lane; run - lane < to; run += 32) {
    u32 seen, forced, flags[LANES], lacking[LANES][2];
    Lengths own = {0, 0};
    look(s, c, run, seen, forced);
    if (run >= to) seen = forced = 0;
#pragma unroll
    for (int i = 0; i < LANES; i++) {
      flags[i] = flag_near(code, terms[i], bounds[i], seen, forced, lacking[i]);
      own.add(i, __popc(flags[i]));
    }
    if (run - lane + 32 < to) load_run(code, s, c, run + 32 < to ? run + 32 : c.to);  // on its way meanwhile
    const Lengths upto = up_to(own);
    const Lengths all = {__shfl_sync(~0u, upto.low, 31), __shfl_sync(~0u, upto.high, 31)};
#pragma unroll
    for (int i = 0; i < LANES; i++) {
      int at = held.of(i) + upto.of(i) - own.of(i);
      for (u32 left = flags[i]; left && at < SEGMENT; left &= left - 1) {
        const int key = __ffs(left) - 1, level = level_of(lacking[i][0], lacking[i][1], key);
        queue[i][warp][at++] = level << 20 | (run - c.from) * EIGHT + key;
      }
    }
    held.add(all);
  }
#pragma unroll
  for (int i = 0; i < LANES; i++)
    if (lane == 0) lengths[i][warp] = held.of(i);
  __syncthreads();
  bool missed = false;
  if (warp < LANES) {  // a warp for a lane
    int length = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) length += lengths[warp][w];
    auto entry = [&](int at) {  // of all segments, one after the other
      int w = 0;
#pragma unroll
      for (int i = 0; i < WARPS - 1; i++)
        if (w == i && at >= lengths[warp][i]) at -= lengths[warp][i], w++;
      return queue[warp][w][min(at, SEGMENT - 1)];
    };
    const bool full = __any_sync(~0u, lengths[warp][lane % WARPS] > SEGMENT);
    for (int at = lane; !full && at < length; at += 32) atomicAdd(&histogram[warp * LEVELS + (entry(at) >> 20)], 1);
    __syncwarp();
    int count = histogram[warp * LEVELS + lane];  // at least this level
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_down_sync(~0u, count, d);
      if (lane + d < 32) count += other;
    }
    const u32 enough = __ballot_sync(~0u, count >= wanted);
    const int level = 31 - __clz(enough), drop = __shfl_sync(~0u, count, level & 31) - wanted;
    missed = full || enough == 0 || (level == LEVELS - 1 && drop > 0);
    int nearer = 0, equal = 0;
    for (int at = lane; !missed && at - lane < length; at += 32) {
      const u32 one = entry(min(at, length - 1));
      const int own = one >> 20, place = one & 0xfffff;
      const u32 near = __ballot_sync(~0u, at < length && own > level), below = (1u << lane) - 1;
      const u32 ties = __ballot_sync(~0u, at < length && own == level);
      const int ties_before = equal + __popc(ties & below);
      if (near >> lane & 1 || (ties >> lane & 1 && ties_before >= drop))
        columns[slot_of(warp, nearer + __popc(near & below) + max(ties_before - drop, 0))] =
            c.column(c.from + place / EIGHT) + place % EIGHT;
      nearer += __popc(near), equal += __popc(ties);
    }
    if (lane == 0) thresholds[warp] = bounds[warp] - STEP * level;
  }
  return __syncthreads_or(missed);
}

extern "C" __global__ void __launch_bounds__(THREADS, WORDS > 1 ? 2 : DEPTH > 1 ? 3 : 4) local(const __grid_constant__ Step s) {
  constexpr int GROUPS = G / LANES;
  __shared__ Terms terms[LANES];
  __shared__ int bounds[LANES], thresholds[LANES], columns[OWN * TEAMS];
  __shared__ float sums[TEAMS][DIM], peaks[TEAMS], totals[TEAMS];
  __shared__ uint4 v[BATCH][DEPTH][THREADS];
  const int thread = threadIdx.x, number = blockIdx.x, team = thread / ABREAST, place = thread % ABREAST;
  const int b = blockIdx.z / TOKENS, t = blockIdx.z % TOKENS, group = blockIdx.y % GROUPS;
  const int kv = b * s.kv_heads + blockIdx.y / GROUPS, row0 = (kv * G + group * LANES) * TOKENS + t;
  wait_for_the_kernel_before();
  Chunk c = {s.codes + (size_t)kv * s.code_room * WORDS, number};
  span(s, b, t, c.first, c.end);
  constexpr int stride = RUN * CHUNKS;
  c.from = c.first / stride * PIECES_OF_A_RUN, c.to = (c.end + stride - 1) / stride * PIECES_OF_A_RUN;
  const int wanted = min(ROWS, c.filled(c.end) - c.filled(c.first));
  if (thread < LANES) bounds[thread] = min(max(s.bounds[(row0 + thread * TOKENS) * CHUNKS + number] >> 4, 0), 64 * WORDS * WEIGHT);
  for (int i = thread; i < OWN * TEAMS; i += THREADS) columns[i] = -1;
  prepare(terms, LANES, s.query + (size_t)row0 * PLANES * WORDS, TOKENS * PLANES * WORDS, WARPS);
  if (wanted > 0) {
    if (from_candidates(s, c, terms, bounds, wanted, columns, thresholds))
      from_codes(s, c, terms, wanted, columns, thresholds);
    if (thread < LANES) {  // falls by one in 16 steps
      int *bound = s.bounds + (row0 + thread * TOKENS) * CHUNKS + number;
      *bound = max((thresholds[thread] + s.margin) * 16, min(*bound, FAR * 16) - 1);
    }
  }
  __syncthreads();
  for (int i = thread; i < LANES * ROWS; i += THREADS)
    s.ids[((size_t)(row0 + i / ROWS * TOKENS) * CHUNKS + number) * ROWS + i % ROWS] = columns[slot_of(i / ROWS, i % ROWS)];

  constexpr size_t SIZE = TYPE == 2 ? 4 : 2;
  const size_t storage = (size_t)kv * s.room * DIM * SIZE;
  const void *keys = static_cast<const char *>(s.keys) + storage, *values = static_cast<const char *>(s.values) + storage;
  const int head = min(team / TEAMS_EACH, LANES - 1);
  float q[DEPTH][EACH];
  Sum sum = {-infinity(), 0};
#pragma unroll
  for (int j = 0; j < DEPTH; j++) {
    const int piece = j * ABREAST + place;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (mine(piece)) x = static_cast<const uint4 *>(s.q)[(size_t)(row0 + head * TOKENS) * PIECES + piece];
    widen(x, q[j]);
#pragma unroll
    for (int e = 0; e < EACH; e++) q[j][e] *= s.scale * LOG2E, sum.values[j][e] = 0;
  }
#pragma unroll 1
  for (int from = 0; from < OWN; from += BATCH) {
    uint4 k[BATCH][DEPTH];
    load_rows(k, keys, columns, from);
    copy_rows(v, values, columns, from);
    attend_rows(sum, k, v, q, columns, from);
  }
#pragma unroll
  for (int j = 0; j < DEPTH; j++) {
    const int piece = j * ABREAST + place;
#pragma unroll
    for (int e = 0; e < EACH; e++)
      if (mine(piece)) sums[team][piece * EACH + e] = sum.values[j][e];
  }
  if (place == 0) peaks[team] = sum.peak, totals[team] = sum.total;
  __syncthreads();
  const int joint = blockIdx.z * gridDim.y + blockIdx.y;  // whose parts lie together
  const size_t part = (size_t)joint * CHUNKS + number;
  for (int i = thread; i < LANES * DIM; i += THREADS) {
    const int own = i / DIM;
    float peak = -infinity(), total = 0, x = 0;
#pragma unroll
    for (int j = 0; j < TEAMS_EACH; j++) peak = fmaxf(peak, peaks[own * TEAMS_EACH + j]);
    const float base = peak == -infinity() ? 0 : peak;
#pragma unroll
    for (int j = 0; j < TEAMS_EACH; j++) {
      const float weight = exp2f(peaks[own * TEAMS_EACH + j] - base);
      x += weight * sums[own * TEAMS_EACH + j][i % DIM], total += weight * totals[own * TEAMS_EACH + j];
    }
    __stcg(s.parts + part * LANES * DIM + i, x);
    if (i % DIM == 0) __stcg(reinterpret_cast<float2 *>(s.stats) + part * LANES + own, make_float2(peak, total));
  }
  let_the_next_kernel_start();
  if (is_last(s.arrived + joint, CHUNKS))
    combine(s, part - number, CHUNKS, row0, filled(s) > s.room);
}
