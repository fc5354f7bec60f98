// LocalTopK in one kernel: a program looks at its chunk's keys, keeps the ROWS nearest of each lane and attends to them.
// Grid (CHUNKS, Hkv * G / LANES, B * TOKENS), 256 threads. Column n is in chunk n / RUN % CHUNKS. A unit is a thread's KEYS
// neighbouring columns of a run.
#include "candidates.cuh"
#include "rows.cuh"
#include "counts.cuh"

constexpr int SEGMENT = 64;  // candidates of a lane that a warp finds
constexpr int UNITS = RUN / KEYS;   // of a run: a thread looks at one at a time
constexpr int DISTANCES = MOST_RANKED + 2;               // forced keys come first
static_assert(SUM == 1, "heads choose for themselves");

// Where a lane's column of this rank is kept, so that those who attend to it find it.
__device__ __forceinline__ int slot_of(int lane, int rank) {
  return rank / TEAMS_EACH * TEAMS + lane * TEAMS_EACH + rank % TEAMS_EACH;
}

struct Chunk {  // the units `from` to `to` of a chunk hold columns that are seen
  const u64 *codes;
  int number, first, end;
  __device__ __forceinline__ int from() const { return first / (RUN * CHUNKS) * UNITS; }
  __device__ __forceinline__ int to() const { return (end + RUN * CHUNKS - 1) / (RUN * CHUNKS) * UNITS; }
  __device__ __forceinline__ int column(int unit) const {
    return (unit / UNITS * CHUNKS + number) * RUN + unit % UNITS * KEYS;
  }
  // Seen columns of the chunk before a column.
  __device__ __forceinline__ int filled(int end) const {
    return end / (RUN * CHUNKS) * RUN + min(max(end % (RUN * CHUNKS) - number * RUN, 0), RUN);
  }
};

__device__ __forceinline__ void load_unit(u32 *code, const Step &s, const Chunk &c, int unit) {
#pragma unroll
  for (int key = 0; key < KEYS; key += PAIR)
    load_codes(code + key * HALVES, c.codes, unit < c.to() ? c.column(unit) + key : s.code_room, s.code_room);
}

// Which of a unit's columns are seen, and which of these are forced.
__device__ __forceinline__ void look(const Step &s, const Chunk &c, int unit, u32 &seen, u32 &forced) {
  const int column = c.column(unit);
  seen = unit < c.to() ? (1 << KEYS) - 1 : 0, forced = 0;
  if (column >= c.first + s.sinks && column + KEYS <= c.end - s.recents) return;
#pragma unroll
  for (int key = 0; key < KEYS; key++) {
    const int shift = offset(s, column + key, c.first, c.end);
    seen &= ~((u32)(shift > 0) << key), forced |= (u32)(shift < 0) << key;
  }
  forced &= seen;
}

struct Search {  // of all codes of a chunk, in shared memory
  int histogram[LANES * DISTANCES], cuts[LANES], drops[LANES];
};

// The nearest `wanted` of every lane from all codes of the chunk, for hints that failed. Sets their thresholds.
__device__ __noinline__ void from_codes(
    const Step &s, const Chunk c, const Terms *terms, int wanted, int *columns, int *thresholds, Search &search
) {
  int *histogram = search.histogram, *cuts = search.cuts, *drops = search.drops;
  for (int i = threadIdx.x; i < LANES * DISTANCES; i += THREADS) histogram[i] = 0;
  __syncthreads();
  for (int unit = c.from() + threadIdx.x; unit < c.to(); unit += THREADS) {
    u32 code[KEYS * HALVES], seen, forced;
    load_unit(code, s, c, unit);
    look(s, c, unit, seen, forced);
#pragma unroll
    for (int key = 0; key < KEYS; key++)
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
    for (int from = c.from(); from < c.to(); from += THREADS) {
      const int unit = from + threadIdx.x;
      u32 code[KEYS * HALVES], seen, forced, near = 0, ties = 0;
      load_unit(code, s, c, unit);
      look(s, c, unit, seen, forced);
#pragma unroll
      for (int key = 0; key < KEYS; key++) {
        const int place = forced >> key & 1 ? 0 : 1 + ranked(code + key * HALVES, terms[i]);
        near |= (u32)(place < cuts[i]) << key, ties |= (u32)(place == cuts[i]) << key;
      }
      near &= seen, ties &= seen;
      Count at = before({__popc(near), __popc(ties)}, carry);
      for (u32 left = near | ties; left; left &= left - 1) {
        const int key = __ffs(left) - 1;
        const bool tie = ties >> key & 1;
        if (!tie || at.ties >= drops[i]) columns[slot_of(i, chosen_before(at, drops[i]))] = c.column(unit) + key;
        at.nearer += !tie, at.ties += tie;
      }
    }
  }
}

struct Queue {  // candidates in the order of columns: level << 20 | place in the chunk
  Staged codes[WARPS];
  Flags flags[WARPS];
  u32 of[LANES][WARPS][SEGMENT + 4];
  int histogram[LANES * LEVELS], lengths[LANES][WARPS];
};

struct Part {  // of a chunk, that a warp looks at
  int from, to;
  __device__ __forceinline__ explicit Part(const Chunk &c) {
    const int share = (c.to() - c.from() + THREADS - 1) / THREADS * 32;
    from = c.from() + threadIdx.x / 32 * share, to = min(from + share, c.to());
  }
  // Ask for the codes of 32 units from `unit` on, up to a column.
  __device__ __forceinline__ void stage(Staged &staged, const Chunk &c, int unit, int room) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < OWN_PIECES; i++) {
      const int own = unit + i * 8 + lane / OWN_PIECES, word = lane % OWN_PIECES * 2, column = c.column(own) + word / WORDS;
      const int there = own >= to ? 0 : WORDS == 1 ? room - column : column < room ? 2 : 0;
      ::stage(staged.at(i * 32 + lane), c.codes + (size_t)c.column(own) * WORDS + word, there);
    }
  }
};

// The same from the candidates within the lanes' bounds, of codes whose first are staged. Returns whether bounds were wrong
// for any lane.
__device__ __forceinline__ bool from_candidates(
    const Step &s, const Chunk &c, const Part &part, const Terms *terms, const int *bounds, int wanted, int *columns,
    int *thresholds, Queue &queue
) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = head_read();
  Staged &own = queue.codes[warp];
  int held = 0;  // of the head's candidates
#pragma unroll 1
  for (int unit = part.from; unit < part.to; unit += 32) {
    if (unit > part.from) part.stage(own, c, unit, s.code_room);
    if (unit + 32 + lane < part.to) prefetch_line(c.codes + (size_t)c.column(unit + 32 + lane) * WORDS);
    const int last = c.column(min(unit + 31, part.to - 1)) + KEYS;
    const bool edge = c.column(unit) < c.first + s.sinks || last > c.end - s.recents;
    u32 seen = unit + lane < part.to ? (1 << KEYS) - 1 : 0, forced = 0;
    if (edge && seen) look(s, c, unit + lane, seen, forced);
    wait_for_copies();
    __syncwarp();
    compare(own, queue.flags[warp], terms, bounds, seen, forced);
    __syncwarp();
    const u32 flags = read_flags(queue.flags[warp]);
    const int count = __popc(flags), upto = up_to(count);
    int at = held + upto - count;
#pragma unroll 1
    for (u32 left = flags; left && at < SEGMENT; left &= left - 1) {
      const int bit = __ffs(left) - 1, owner = first_read() + bit / 8, key = bit % 8;
      int level = level_of(own, owner, key, terms[head], bounds[head]);
      if (edge && offset(s, c.column(unit + owner) + key, c.first, c.end) < 0) level = LEVELS - 1;
      queue.of[head][warp][at++] = level << 20 | (unit + owner - c.from()) * KEYS + key;
      atomicAdd(&queue.histogram[head * LEVELS + level], 1);
    }
    held += __shfl_sync(~0u, upto, lane | (READERS - 1));
  }
  if (lane % READERS == 0 && head < LANES) queue.lengths[head][warp] = held;
  __syncthreads();
  bool missed = false;
  if (warp < LANES) {  // a warp for a head, and four of its threads for a segment
    const int segment = lane / 4, length = queue.lengths[warp][segment];
    int count = queue.histogram[warp * LEVELS + lane];  // at least this level
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_down_sync(~0u, count, d);
      if (lane + d < 32) count += other;
    }
    const u32 enough = __ballot_sync(~0u, count >= wanted);
    const int level = 31 - __clz(enough), drop = __shfl_sync(~0u, count, level & 31) - wanted;
    missed = __any_sync(~0u, length > SEGMENT) || enough == 0 || (level == LEVELS - 1 && drop > 0);
    const int each = (min(length, SEGMENT) + 3) / 4, from = lane % 4 * each, to = min(from + each, min(length, SEGMENT));
    const u32 *entries = queue.of[warp][segment];
    Count own = {0, 0};
    for (int at = from; at < to; at++) {
      const int one = entries[at] >> 20;
      own.nearer += one > level, own.ties += one == level;
    }
    u32 upto = own.nearer | own.ties << 16;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const u32 other = __shfl_up_sync(~0u, upto, d);
      if (lane >= d) upto += other;
    }
    Count before = {(int)(upto & 0xffff) - own.nearer, (int)(upto >> 16) - own.ties};
    for (int at = from; at < to && !missed; at++) {
      const int one = entries[at] >> 20, place = entries[at] & 0xfffff;
      if (one > level || (one == level && before.ties >= drop))
        columns[slot_of(warp, chosen_before(before, drop))] = c.column(c.from() + place / KEYS) + place % KEYS;
      before.nearer += one > level, before.ties += one == level;
    }
    if (lane == 0) thresholds[warp] = bounds[warp] - STEP * level;
  }
  return __syncthreads_or(missed);
}

struct Teams {  // of a program, in shared memory
  Values values;
  float sums[TEAMS][DIM], peaks[TEAMS], totals[TEAMS];
};

// A program's attention to its columns, of a head each, into parts and stats at `part`.
__device__ __forceinline__ void attend_lanes(
    const Step &s, int row0, const void *keys, const void *values, const int *columns, size_t part, Teams &teams
) {
  auto &sums = teams.sums;
  auto &peaks = teams.peaks, &totals = teams.totals;
  const int thread = threadIdx.x, team = thread / ABREAST, place = thread % ABREAST;
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
    for (int e = 0; e < EACH; e++) sum.values[j][e] = 0;
  }
#pragma unroll 1
  for (int from = 0; from < OWN; from += BATCH) {
    uint4 k[BATCH][DEPTH];
    load_rows(k, keys, columns, from);
    copy_rows(teams.values.of, values, columns, from);
    attend_rows(sum, k, teams.values.of, q, s.scale, {columns}, 0, from);
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
  for (int i = thread; i < LANES * DIM / 2; i += THREADS) {  // two neighbours
    const int own = i / (DIM / 2), first = own * TEAMS_EACH;
    float peak = -infinity(), total = 0, x[2] = {};
#pragma unroll
    for (int j = 0; j < TEAMS_EACH; j++) peak = fmaxf(peak, peaks[first + j]);
    const float base = peak == -infinity() ? 0 : peak;
#pragma unroll
    for (int j = 0; j < TEAMS_EACH; j++) {
      const float weight = exp2f(peaks[first + j] - base), *sum = &sums[first + j][i % (DIM / 2) * 2];
      x[0] += weight * sum[0], x[1] += weight * sum[1], total += weight * totals[first + j];
    }
    const float one = total == 0 ? 0 : 1 / total;
    const size_t to = part * (LANES * DIM / 2) + i;
    if (NARROW) __stcg(reinterpret_cast<u32 *>(s.parts) + to, narrow<TYPE == 1>(x[0] * one, x[1] * one));
    else __stcg(reinterpret_cast<float2 *>(s.parts) + to, make_float2(x[0], x[1]));
    if (i % (DIM / 2) == 0) __stcg(reinterpret_cast<float2 *>(s.stats) + part * LANES + own, make_float2(peak, total));
  }
}

union Space {
  Queue queue;
  Search search;
  Teams teams;
};

extern "C" __global__ void __launch_bounds__(THREADS, WORDS > 2 || DEPTH > 1 ? 2 : 4) local(const __grid_constant__ Step s) {
  constexpr int GROUPS = G / LANES;
  __shared__ Terms terms[LANES];
  __shared__ int bounds[LANES], thresholds[LANES], columns[OWN * TEAMS];
  __shared__ __align__(16) Space space;
  const int thread = threadIdx.x, number = blockIdx.x;
  const int b = blockIdx.z / TOKENS, t = blockIdx.z % TOKENS, group = blockIdx.y % GROUPS;
  const int kv = b * s.kv_heads + blockIdx.y / GROUPS, row0 = (kv * G + group * LANES) * TOKENS + t;
  // Codes stay what they are, so that they can be read while the kernel before is at work, but for the newest.
  Chunk c = {s.codes + (size_t)kv * s.code_room * WORDS, number};
  c.first = __ldcg(s.starts + b), c.end = min(max(filled(s), 0), s.code_room);
  const int early = c.end;
  const Part guess(c);
  Staged &staged = space.queue.codes[thread / 32];
  if (guess.from < guess.to) guess.stage(staged, c, guess.from, early);
  if (thread < LANES) prefetch_line(s.bounds + (size_t)(row0 + thread * TOKENS) * CHUNKS + number);
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  span(s, b, t, c.first, c.end);
  const Part part(c);
  const int wanted = min(ROWS, c.filled(c.end) - c.filled(c.first));
  if (thread < LANES) bounds[thread] = read_bound(s, (size_t)(row0 + thread * TOKENS) * CHUNKS + number);
  for (int i = thread; i < OWN * TEAMS; i += THREADS) columns[i] = -1;
  for (int i = thread; i < LANES * LEVELS; i += THREADS) space.queue.histogram[i] = 0;
  prepare(terms, LANES, s.query + (size_t)row0 * PLANES * WORDS, TOKENS * PLANES * WORDS, WARPS);
  wait_for_copies();
  const int last = c.column(min(part.from + 31, part.to - 1)) + KEYS;  // of what is staged
  if (wanted > 0 && (part.from != guess.from || part.to != guess.to || last > min(early, c.end) - NEWEST)) {
    __syncwarp();
    if (part.from < part.to) part.stage(staged, c, part.from, s.code_room);
  }
  __syncthreads();
  if (wanted > 0) {
    if (from_candidates(s, c, part, terms, bounds, wanted, columns, thresholds, space.queue))
      from_codes(s, c, terms, wanted, columns, thresholds, space.search);
    if (thread < LANES) {  // falls by one in 16 steps
      int *bound = s.bounds + (size_t)(row0 + thread * TOKENS) * CHUNKS + number;
      *bound = max((thresholds[thread] + s.margin) * 16, min(*bound, FAR * 16) - 1);
    }
  }
  __syncthreads();
  for (int i = thread; i < LANES * ROWS; i += THREADS)
    s.ids[((size_t)(row0 + i / ROWS * TOKENS) * CHUNKS + number) * ROWS + i % ROWS] = columns[slot_of(i / ROWS, i % ROWS)];

  constexpr size_t SIZE = TYPE == 2 ? 4 : 2;
  const size_t storage = (size_t)kv * s.room * DIM * SIZE;
  const void *keys = static_cast<const char *>(s.keys) + storage, *values = static_cast<const char *>(s.values) + storage;
  const int joint = blockIdx.z * gridDim.y + blockIdx.y;  // whose parts lie together
  const size_t parts = (size_t)joint * CHUNKS;
  attend_lanes(s, row0, keys, values, columns, parts + number, space.teams);
  if (is_last(s.arrived + joint, CHUNKS)) combine(s, parts, CHUNKS, row0, c.end > c.first, filled(s) > room_of(s));
}
