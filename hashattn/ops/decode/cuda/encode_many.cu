// Codes, and norms if they are asked for, of many keys by a linear map: a tiled product in float32, and its signs.
// Grid (heads * tiles, WORDS), 128 threads: a program makes a word of the codes of KEYS keys of one head. A thread has the sums
// of 8 keys and 8 bits, a byte of each code; it brings in a key of its own, some dimensions at a time.
//
// The host defines: DIM; TYPE of keys (0 bfloat16, 1 float16, 2 float32); BITS; WORDS of 64 bits a code.
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#include "ptx.cuh"

struct EncodeMany {
  const void *keys;     // [heads, stride, DIM], of which `count` are meant
  const float *centre;  // [heads, DIM], subtracted first; or none
  const float *linear;  // [DIM, BITS]
  u8 *codes;            // [heads, count, 8 * WORDS]
  u16 *norms;           // bfloat16 [heads, count]: |k - centre|; or none
  long long stride;
  int count, tiles;
};

constexpr int THREADS = 128, KEYS = 128, OWN = 8;  // keys of a program; keys and bits of a thread
constexpr int DEPTH = 32;                          // dimensions at a time
constexpr int SIZE = TYPE == 2 ? 4 : 2, EACH = 16 / SIZE;
static_assert(DIM % DEPTH == 0 && KEYS == THREADS && KEYS * 64 == THREADS * OWN * OWN, "every thread has a share");

struct Shared {
  __align__(16) float x[DEPTH][KEYS];
  __align__(16) float planes[DEPTH][64];  // by octet_place()
};

// Where the weights of bit b lie: each octet's first four before all octets' last four, so that threads read other banks.
__device__ __forceinline__ int octet_place(int b) { return b % 8 / 4 * 32 + b / 8 * 4 + b % 4; }

__device__ __forceinline__ float element(const uint4 &piece, int i) {
  const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
  if (TYPE == 2) return __uint_as_float(words[i]);
  const u32 half = words[i / 2] >> 16 * (i % 2) & 0xffff;
  return TYPE == 1 ? half_to_float(half) : __uint_as_float(half << 16);
}

// DEPTH dimensions from `from` on: of this thread's key, centred, and of the word's planes. Returns the squares' sum.
__device__ __forceinline__ float bring(const EncodeMany &e, Shared &s, const uint4 *key, const float *centre, int from) {
  uint4 pieces[DEPTH / EACH];
  float weights[DEPTH * 64 / THREADS], square = 0;
  const int bit = threadIdx.x % 64, column = blockIdx.y * 64 + bit;
#pragma unroll
  for (int i = 0; i < DEPTH / EACH; i++) pieces[i] = key[from / EACH + i];
#pragma unroll
  for (int i = 0; i < DEPTH * 64 / THREADS; i++)
    weights[i] = column < BITS ? e.linear[(size_t)(from + 2 * i + threadIdx.x / 64) * BITS + column] : 0;
#pragma unroll
  for (int i = 0; i < DEPTH; i++) {
    const float x = element(pieces[i / EACH], i % EACH) - (centre != nullptr ? centre[from + i] : 0);
    s.x[i][threadIdx.x] = x, square += x * x;
  }
#pragma unroll
  for (int i = 0; i < DEPTH * 64 / THREADS; i++) s.planes[2 * i + threadIdx.x / 64][octet_place(bit)] = weights[i];
  return square;
}

__device__ __forceinline__ void load_four(float *to, const float *from) {
  const float4 four = *reinterpret_cast<const float4 *>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) encode_many(const __grid_constant__ EncodeMany e) {
  __shared__ Shared s;
  const int head = blockIdx.x / e.tiles, low = blockIdx.x % e.tiles * KEYS;
  const int octet = threadIdx.x % 8, row = threadIdx.x / 8 * OWN, mine = low + threadIdx.x;
  const size_t at = ((size_t)head * e.stride + min(mine, e.count - 1)) * DIM * SIZE;  // what lies beyond is not written
  const uint4 *key = reinterpret_cast<const uint4 *>(static_cast<const char *>(e.keys) + at);
  const float *centre = e.centre != nullptr ? e.centre + (size_t)head * DIM : nullptr;
  float sums[OWN][OWN] = {}, square = 0;
  wait_for_the_kernel_before();
#pragma unroll 1
  for (int from = 0; from < DIM; from += DEPTH) {
    square += bring(e, s, key, centre, from);
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < DEPTH; d++) {
      float x[OWN], planes[OWN];
      load_four(x, &s.x[d][row]), load_four(x + 4, &s.x[d][row + 4]);
      load_four(planes, &s.planes[d][octet * 4]), load_four(planes + 4, &s.planes[d][octet * 4 + 32]);
#pragma unroll
      for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < OWN; j++) sums[i][j] += x[i] * planes[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    u32 byte = 0;
#pragma unroll
    for (int j = 0; j < OWN; j++) byte |= (u32)(sums[i][j] >= 0 && blockIdx.y * 64 + octet * 8 + j < BITS) << j;
    if (low + row + i < e.count)
      e.codes[((size_t)head * e.count + low + row + i) * 8 * WORDS + blockIdx.y * 8 + octet] = byte;
  }
  if (e.norms != nullptr && blockIdx.y == 0 && mine < e.count)
    e.norms[(size_t)head * e.count + mine] = narrow<false>(sqrtf(square), 0);
}
