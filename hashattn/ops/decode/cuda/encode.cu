// Encodes the newest queries and keys, and appends keys, values and codes. Grid (programs of queries + of keys), 256 threads.
//
// A group of VECTORS queries or keys has a program that multiplies them with the linear map and, where there is an MLP, one for
// each UNITS units of the first hidden layer, which multiplies these with their rows of the second matrix. The last of a
// group's programs to arrive adds the parts up, in order, and goes on from there. No weight is read twice for a group.
//
// PLACED: keys and values are where they belong, from the column `first` on, which the host knows, and nothing is appended but
// what is made of the keys: only queries may have programs, where nothing is. Else all goes behind the filled columns.
//
// The host defines: DIM; PLACED; TYPE of queries, keys and values (0 bfloat16, 1 float16, 2 float32); BITS; WORDS of 64 bits a code; PLANES of
// a query; UNIT: queries are scaled to unit mean square; VECTORS (2, 4 or 8); UNITS; QUERY_FIRST, QUERY_SECOND, KEY_FIRST,
// KEY_SECOND: widths of hidden layers, 0 where there is none.
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

#include "ptx.cuh"
#include "product.cuh"

struct Vectors {  // queries or keys, and the map that encodes them: x @ linear + the MLP's output
  const void *x;        // [count, DIM]; of keys in place [B * Hkv, room, DIM]
  const float *centre;  // [count / T, DIM], subtracted first; of keys
  const float *linear;  // [DIM, BITS]
  const float *first, *first_bias, *second, *second_bias, *last, *last_bias;  // of the MLP's layers: matrix and bias
  float *parts;     // [slices, count, width of the layer after the first]
  float *straight;  // [count, BITS]: x @ linear
  int *arrived;     // [groups], zero before and after
  int count, groups;
};

struct Encode {
  Vectors queries, keys;
  const void *v;         // [B * Hkv * T, DIM]
  void *held_keys, *held_values;  // [B * Hkv, room, DIM]
  u32 *query, *codes;    // [B * Hq * T, PLANES, 2 * WORDS], [B * Hkv, code_room, 2 * WORDS]
  u16 *norms;            // bfloat16 [B * Hkv, code_room]: |k - centre|; or none
  int *length, *arrived;  // [1]; the second is zero before and after
  int tokens, room, code_room, first;
};

#if TYPE == 2
typedef u32 Element;
__device__ __forceinline__ float to_float(u32 x) { return __uint_as_float(x); }
#else
typedef u16 Element;
__device__ __forceinline__ float to_float(u16 x) { return TYPE == 1 ? half_to_float(x) : __uint_as_float((u32)x << 16); }
#endif

// What an MLP of up to two hidden layers needs. `Into` makes a slice of the first layer, `Onward` its part of the next one.
template <int FIRST, int SECOND> struct Net {
  static constexpr int NEXT = SECOND > 0 ? SECOND : BITS, SLICES = (FIRST + UNITS - 1) / UNITS;
  using Linear = Product<DIM, BITS, 64>;
  using Into = Product<DIM, UNITS, 32>;
  using Onward = Product<UNITS, NEXT, 32>;
  using Last = Product<larger(SECOND, 1), BITS, 64>;
  static constexpr int HIDDEN = larger(Onward::PADDED, SECOND > 0 ? Last::PADDED : 0);
};
using QueryNet = Net<QUERY_FIRST, QUERY_SECOND>;
using KeyNet = Net<KEY_FIRST, KEY_SECOND>;
static_assert(DIM % 32 == 0 && QueryNet::Linear::PADDED == DIM && QueryNet::Into::PADDED == DIM, "heads of 64, 96, 128 or 256");

struct Shared {
  __align__(16) float x[DIM * VECTORS];
  __align__(16) float hidden[larger(QueryNet::HIDDEN, KeyNet::HIDDEN) * VECTORS];
  float joint[VECTORS * THREADS];
  float projected[VECTORS * BITS], norms[VECTORS];
  int filled, last;
};

__device__ __forceinline__ float relu(float x) { return x <= 0 ? 0 : x; }  // NaN stays

// The vectors from row0 on as float32 [DIM, VECTORS], zero beyond the last one, and for keys their norms and how many columns
// are filled. A warp takes a vector.
template <bool KEY> __device__ __forceinline__ void stage(const Encode &e, const Vectors &of, Shared &s, int row0) {
  constexpr int EACH = DIM / 32;
  const int lane = threadIdx.x % 32, vector = threadIdx.x / 32, row = row0 + vector;
  if (KEY && threadIdx.x == THREADS - 1) s.filled = PLACED || e.first >= 0 ? e.first : __ldcg(e.length);
  if (PLACED && blockIdx.x == 0 && threadIdx.x == 0) *e.length = e.first + e.tokens;  // which nobody reads meanwhile
  if (vector < VECTORS) {
    const int some = min(row, of.count - 1);  // reads wait for no condition
    const size_t from = KEY && PLACED ? (size_t)(some / e.tokens) * e.room + e.first + some % e.tokens : some;
    float own[EACH], square = 0;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      own[j] = to_float(static_cast<const Element *>(of.x)[from * DIM + j * 32 + lane]);
      if (KEY) own[j] -= of.centre[(size_t)(some / e.tokens) * DIM + j * 32 + lane];
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      if (row >= of.count) own[j] = 0;
      square += own[j] * own[j];
    }
    if (KEY ? e.norms != nullptr : UNIT) {
#pragma unroll
      for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
    }
    const float factor = KEY || !UNIT ? 1 : rsqrtf(fmaxf(square / DIM, 1e-12f));
    if (KEY && lane == 0) s.norms[vector] = sqrtf(square);
#pragma unroll
    for (int j = 0; j < EACH; j++) s.x[(j * 32 + lane) * VECTORS + vector] = own[j] * factor;
  }
  __syncthreads();
}

// Where key `row` goes behind the filled columns: its head's column, and whether there is room for it.
struct Place {
  size_t head;
  int column;
  bool fits;
  __device__ __forceinline__ Place(const Encode &e, int filled, int row)
      : head(row / e.tokens), column(filled + row % e.tokens),
        fits(row < e.keys.count && column < e.room && column < e.code_room) {}
};

struct Rows {  // this thread's share of the group's new keys and values
  static constexpr int EACH = (VECTORS * DIM + THREADS - 1) / THREADS;
  Element keys[EACH], values[EACH];
  __device__ __forceinline__ Rows(const Encode &e, int row0) {
    const Element *k = static_cast<const Element *>(e.keys.x), *v = static_cast<const Element *>(e.v);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const size_t from = min((size_t)row0 * DIM + j * THREADS + threadIdx.x, (size_t)e.keys.count * DIM - 1);
      keys[j] = k[from], values[j] = v[from];
    }
  }
  __device__ __forceinline__ void append(const Encode &e, const Shared &s, int row0) const {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int i = j * THREADS + threadIdx.x;
      const Place to(e, s.filled, row0 + i / DIM);
      if (i >= VECTORS * DIM || !to.fits) continue;
      const size_t at = (to.head * e.room + to.column) * DIM + i % DIM;
      static_cast<Element *>(e.held_keys)[at] = keys[j], static_cast<Element *>(e.held_values)[at] = values[j];
    }
  }
};

// Norms of the group's new keys, if they are kept.
__device__ __forceinline__ void append_norms(const Encode &e, const Shared &s, int row0) {
  const Place to(e, s.filled, row0 + threadIdx.x);
  if (threadIdx.x < VECTORS && to.fits && e.norms != nullptr)
    e.norms[to.head * e.code_room + to.column] = narrow<false>(s.norms[threadIdx.x], 0);
}

// The larger of two; NaN if either is.
__device__ __forceinline__ float larger_or_nan(float a, float b) { return a >= b || a != a ? a : b; }

// Which of 2^PLANES levels, symmetric about zero, a value lies in, on a scale that ends at `largest`.
__device__ __forceinline__ int level_of(float x, float largest) {
  constexpr int HALF = 1 << (PLANES - 1);
  const float steps = fabsf(x) / largest * HALF;
  const int whole = steps >= 1 ? (int)fminf(steps, HALF - 1) : 0;  // none for NaN
  return x >= 0 ? HALF + whole : HALF - 1 - whole;
}

// Pack the projections [VECTORS, BITS] from row0 on. A warp makes 32 bits of each plane.
template <bool KEY> __device__ __forceinline__ void pack(const Encode &e, const float *projected, int filled, int row0) {
  constexpr int HALVES = 2 * WORDS;
  const int lane = threadIdx.x % 32;
  for (int task = threadIdx.x / 32; task < VECTORS * HALVES; task += WARPS) {
    const int row = row0 + task / HALVES, half = task % HALVES, bit = half * 32 + lane;
    const float *own = projected + task / HALVES * BITS;
    const float x = bit < BITS ? own[bit] : -1;
    if (KEY || PLANES == 1) {
      const u32 bits = __ballot_sync(~0u, x >= 0);
      const Place to(e, filled, row);
      if (lane > 0) continue;
      if (!KEY && row < e.queries.count) e.query[(size_t)row * HALVES + half] = bits;
      if (KEY && to.fits) e.codes[(to.head * e.code_room + to.column) * HALVES + half] = bits;
      continue;
    }
    float largest = 1.17549435e-38f;
    for (int i = lane; i < BITS; i += 32) largest = larger_or_nan(largest, fabsf(own[i]));
#pragma unroll
    for (int d = 16; d > 0; d /= 2) largest = larger_or_nan(largest, __shfl_xor_sync(~0u, largest, d));
    const int level = level_of(x, largest);
#pragma unroll
    for (int j = 0; j < PLANES; j++) {
      const u32 bits = __ballot_sync(~0u, bit < BITS && level >> j & 1);
      if (lane == 0 && row < e.queries.count) e.query[((size_t)row * PLANES + j) * HALVES + half] = bits;
    }
  }
}

// A slice of the first hidden layer, and its part of the next layer.
template <class Net, bool KEY, int FIRST>
__device__ __forceinline__ void add_slice(const Encode &e, const Vectors &of, Shared &s, int number, int row0) {
  const int low = number * UNITS, units = FIRST % UNITS == 0 ? UNITS : min(UNITS, FIRST - low);
  typename Net::Into into(of.first + low, FIRST, of.first_bias + low, DIM, units);
  typename Net::Onward onward(of.second + (size_t)low * Net::NEXT, Net::NEXT, number == 0 ? of.second_bias : nullptr, units);
  wait_for_the_kernel_before();
  let_the_next_kernel_start();
  stage<KEY>(e, of, s, row0);
  into.times(s.x, s.joint, [&](int unit, int v, float x) { s.hidden[unit * VECTORS + v] = relu(x); });
  __syncthreads();
  float *parts = of.parts + ((size_t)number * of.count + row0) * Net::NEXT;
  onward.times(s.hidden, s.joint, [&](int column, int v, float x) {
    if (row0 + v < of.count) __stcg(parts + v * Net::NEXT + column, x);
  });
}

// PARTS parts [count, WIDTH] of the vectors from row0 on, added up in order.
template <int PARTS, int WIDTH> struct Sums {
  static constexpr int EACH = (VECTORS * WIDTH + THREADS - 1) / THREADS;  // of a thread
  float own[EACH];
  __device__ __forceinline__ Sums(const float *parts, int count, int row0) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int i = j * THREADS + threadIdx.x;
      const int at = i < VECTORS * WIDTH && row0 + i / WIDTH < count ? i : 0;  // what else is read is not used
      own[j] = 0;
#pragma unroll
      for (int part = 0; part < PARTS; part++) own[j] += __ldcg(parts + ((size_t)part * count + row0) * WIDTH + at);
    }
  }
  // Gives sink(column, vector, sum) each of them.
  template <class Sink> __device__ __forceinline__ void give(Sink sink) const {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int i = j * THREADS + threadIdx.x;
      if (i < VECTORS * WIDTH) sink(i % WIDTH, i / WIDTH, own[j]);
    }
  }
};

template <int FIRST, int SECOND, bool KEY>
__device__ __forceinline__ void encode_group(const Encode &e, const Vectors &of, Shared &s, int at) {
  using Own = Net<FIRST, SECOND>;
  const int number = at / of.groups, group = at % of.groups, row0 = group * VECTORS;
  const int line = at * THREADS + threadIdx.x;
  if (SECOND > 0 && line < SECOND * BITS / 32) prefetch_line(of.last + line * 32);
  if constexpr (FIRST > 0) {
    if (number < Own::SLICES) add_slice<Own, KEY, FIRST>(e, of, s, number, row0);
  }
  if (number == Own::SLICES) {
    typename Own::Linear linear(of.linear, BITS, nullptr);
    wait_for_the_kernel_before();
    let_the_next_kernel_start();
    auto encode = [&] {
      stage<KEY>(e, of, s, row0);
      linear.times(s.x, s.joint, [&](int column, int v, float x) {
        if (FIRST == 0) s.projected[v * BITS + column] = x;
        else if (row0 + v < of.count) __stcg(of.straight + (size_t)(row0 + v) * BITS + column, x);
      });
    };
    if constexpr (KEY && !PLACED) {
      const Rows rows(e, row0);
      encode();
      rows.append(e, s, row0);
    } else {
      encode();
    }
    if constexpr (KEY) append_norms(e, s, row0);
  }
  if constexpr (FIRST > 0) {
    __syncthreads();
    if (threadIdx.x == 0) {  // publishes what the program's threads wrote, and sees what others published
      s.last = add_and_publish(of.arrived + group) == Own::SLICES;
      if (s.last) of.arrived[group] = 0;
    }
    __syncthreads();
    if (!s.last) return;
    const Sums<1, BITS> straight(of.straight, of.count, row0);
    const Sums<Own::SLICES, Own::NEXT> next(of.parts, of.count, row0);
    auto add = [&](int column, int v, float x) { s.projected[v * BITS + column] += x; };
    if constexpr (SECOND > 0) {
      typename Own::Last last(of.last, BITS, of.last_bias);
      for (int i = SECOND * VECTORS + threadIdx.x; i < Own::Last::PADDED * VECTORS; i += THREADS) s.hidden[i] = 0;
      next.give([&](int unit, int v, float x) { s.hidden[unit * VECTORS + v] = relu(x); });
      straight.give([&](int column, int v, float x) { s.projected[v * BITS + column] = x; });
      __syncthreads();
      last.times(s.hidden, s.joint, add);
    } else {
      straight.give([&](int column, int v, float x) { s.projected[v * BITS + column] = x; });
      next.give(add);  // by the same threads
    }
  }
  // The last of the programs that pack keys sets the length: all have read it by then.
  const int turn = KEY && !PLACED && threadIdx.x == 0 ? atomicAdd(e.arrived, 1) : -1;
  __syncthreads();
  pack<KEY>(e, s.projected, s.filled, row0);
  if (turn == of.groups - 1) *e.arrived = 0, *e.length = s.filled + e.tokens;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) encode(const __grid_constant__ Encode e) {
  __shared__ Shared s;
  const int at = blockIdx.x, queries = e.queries.groups * (QueryNet::SLICES + 1);
  if (at < queries) encode_group<QUERY_FIRST, QUERY_SECOND, false>(e, e.queries, s, at);
  else encode_group<KEY_FIRST, KEY_SECOND, true>(e, e.keys, s, at - queries);
}
