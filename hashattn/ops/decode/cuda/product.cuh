// A few vectors times a matrix, in float32: a program reads each weight once, and it serves all of its vectors.
#pragma once

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int ABREAST = VECTORS < 4 ? 4 / VECTORS : 1;  // rows whose vectors lie in 16 bytes

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__device__ constexpr int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

// VECTORS vectors [ROWS] times a matrix [ROWS, COLUMNS], plus a bias. A thread has a column and one of SETS sets of rows, the
// first weights of which it asks for long before the vectors are there: MOST of them at a time.
template <int ROWS, int COLUMNS, int MOST> struct Product {
  static constexpr int WIDTH = COLUMNS <= 32 ? 32 : COLUMNS <= 64 ? 64 : COLUMNS <= 128 ? 128 : THREADS;
  static constexpr int SETS = THREADS / WIDTH, SHARE = (ROWS + SETS - 1) / SETS;
  static constexpr int HELD = SHARE <= MOST ? rounded_up(SHARE, ABREAST) : 32;  // weights at a time
  static constexpr int OWN = rounded_up(SHARE, HELD);                         // rows of a set
  static constexpr int PADDED = SETS * OWN;                                   // rows of the vectors, zero beyond ROWS
  const float *matrix, *bias;
  int stride, rows, columns;
  float weights[HELD], offset;

  // The matrix's rows are `stride` apart; it ends after `rows` rows and `columns` columns. No bias: nullptr.
  __device__ __forceinline__ Product(const float *matrix, int stride, const float *bias, int rows = ROWS, int columns = COLUMNS)
      : matrix(matrix), bias(bias), stride(stride), rows(rows), columns(columns) {
    load(0, 0);
    const int lane = threadIdx.x % 32, row = threadIdx.x / WIDTH * OWN + HELD + lane;  // what follows is asked for as well
    const int column = threadIdx.x % WIDTH - lane;
    if (HELD + lane < OWN && row < rows && column < columns) prefetch_line(matrix + (size_t)row * stride + column);
  }

  __device__ __forceinline__ void load(int low, int from) {
    const int column = low + threadIdx.x % WIDTH, row = threadIdx.x / WIDTH * OWN + from;
#pragma unroll
    for (int i = 0; i < HELD; i++)
      weights[i] = row + i < rows && column < columns ? matrix[(size_t)(row + i) * stride + column] : 0;
    offset = bias != nullptr && column < columns ? bias[column] : 0;
  }

  // Gives sink(column, vector, result) each result. x: [PADDED, VECTORS] and joint: [VECTORS, THREADS] in shared memory;
  // all threads synchronise before either is written again.
  template <class Sink> __device__ __forceinline__ void times(const float *x, float *joint, Sink sink) {
#pragma unroll 1
    for (int low = 0; low < COLUMNS; low += WIDTH) {
      float sums[VECTORS] = {};
#pragma unroll 1
      for (int from = 0; from < OWN; from += HELD) {
        if (low + from > 0) load(low, from);
        const float4 *at = reinterpret_cast<const float4 *>(x + (threadIdx.x / WIDTH * OWN + from) * VECTORS);
#pragma unroll
        for (int i = 0; i < HELD * VECTORS / 4; i++) {
          const float4 four = at[i];
          const float own[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int e = 0; e < 4; e++) sums[(4 * i + e) % VECTORS] += weights[(4 * i + e) / VECTORS] * own[e];
        }
      }
      const int column = threadIdx.x % WIDTH;
      if (SETS > 1) {  // then there is one round, and vectors are summed by the threads of a set
#pragma unroll
        for (int v = 0; v < VECTORS; v++) joint[v * THREADS + threadIdx.x] = sums[v];
        __syncthreads();
#pragma unroll
        for (int v = threadIdx.x / WIDTH; v < VECTORS; v += SETS) {
          float sum = offset;
#pragma unroll
          for (int s = 0; s < SETS; s++) sum += joint[v * THREADS + s * WIDTH + column];
          if (column < COLUMNS) sink(column, v, sum);
        }
      } else if (low + column < COLUMNS) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) sink(low + column, v, sums[v] + offset);
      }
    }
  }
};
