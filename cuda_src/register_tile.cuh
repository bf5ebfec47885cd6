// A block's product of two matrices by register tiles: what tiled.cuh and weight_gradient_tiled.cu share.
//
// The sums of BLOCK_M rows by BLOCK_N columns lie in the registers of a block, THREAD_M by THREAD_N of them in each
// thread. A warp spans all columns. Of a thread's rows, groups of kAccVec lie kLanesM*kAccVec apart, so that a warp reads whole
// vectors side by side; its columns likewise. Chunks of BLOCK_R terms pass through two buffers of shared memory: the next
// chunk is loaded while one is multiplied.
//
// Macros read: BLOCK_M, BLOCK_N, BLOCK_R, THREAD_M, THREAD_N, and those of common.cuh.

#pragma once

#include "common.cuh"

constexpr int kLanesN = BLOCK_N / THREAD_N;
constexpr int kLanesM = 32 / kLanesN;
constexpr int kWarpRows = kLanesM * THREAD_M;
constexpr int kWarps = BLOCK_M / kWarpRows;
constexpr int kThreads = 32 * kWarps;
constexpr int kSliceRows = kLanesM * kAccVec;  // rows of a warp that pass through shared memory at a time at the end
constexpr int kSlice = kSliceRows * BLOCK_N;

static_assert(BLOCK_N % THREAD_N == 0 && kLanesN * kLanesM == 32, "a warp spans BLOCK_N: gpuconv/families/tiles.py");
static_assert(BLOCK_M % kWarpRows == 0, "BLOCK_M is a whole number of warps: gpuconv/families/tiles.py");
static_assert(THREAD_M % kAccVec == 0 && THREAD_N % kAccVec == 0, "threads own whole vectors: gpuconv/families/tiles.py");

__device__ __forceinline__ void clear(acc_t (&acc)[THREAD_M][THREAD_N]) {
#pragma unroll
    for (int i = 0; i < THREAD_M; ++i) {
#pragma unroll
        for (int j = 0; j < THREAD_N; ++j) acc[i][j] = scalar::zero();
    }
}

// Adds one term: acc = multiply(row's operand, column's operand, acc). w and x are the thread's first operands of it.
template <typename Multiply>
__device__ __forceinline__ void multiply_term(
    const AccVector* w, const AccVector* x, const Multiply& multiply, acc_t (&acc)[THREAD_M][THREAD_N]) {
    AccVector w_term[THREAD_M / kAccVec], x_term[THREAD_N / kAccVec];
#pragma unroll
    for (int i = 0; i < THREAD_M / kAccVec; ++i) w_term[i] = w[i * kLanesM];
#pragma unroll
    for (int j = 0; j < THREAD_N / kAccVec; ++j) x_term[j] = x[j * kLanesN];
#pragma unroll
    for (int i = 0; i < THREAD_M; ++i) {
#pragma unroll
        for (int j = 0; j < THREAD_N; ++j) {
            acc[i][j] = multiply(w_term[i / kAccVec].element[i % kAccVec], x_term[j / kAccVec].element[j % kAccVec], acc[i][j]);
        }
    }
}

// Sums R terms into acc, which starts at zero, one after the other: acc = multiply(row's operand, column's operand, acc).
// load_chunk(buffer, r) begins to load the terms from r on into a buffer: BLOCK_R rows of kPitchM operands of the block's
// rows, then BLOCK_R rows of kPitchN operands of its columns.
template <int kPitchM, int kPitchN, typename LoadChunk, typename Multiply>
__device__ __forceinline__ void multiply_chunks(
    index_t R, const LoadChunk& load_chunk, const Multiply& multiply, acc_t (&acc)[THREAD_M][THREAD_N]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int lane_m = lane / kLanesN, lane_n = lane % kLanesN;
    clear(acc);
    const auto multiply_one = [&](const acc_t* buffer, int term) {
        multiply_term(
            reinterpret_cast<const AccVector*>(buffer + term * kPitchM + warp * kWarpRows) + lane_m,
            reinterpret_cast<const AccVector*>(buffer + BLOCK_R * kPitchM + term * kPitchN) + lane_n, multiply, acc);
    };

    acc_t* buffer = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    acc_t* other = buffer + BLOCK_R * (kPitchM + kPitchN);
    if (R > 0) load_chunk(buffer, 0);
    copy_async_wait();
    __syncthreads();
    index_t r = 0;
    for (; r + BLOCK_R < R; r += BLOCK_R) {
        load_chunk(other, r + BLOCK_R);
#pragma unroll
        for (int term = 0; term < BLOCK_R; ++term) multiply_one(buffer, term);
        copy_async_wait();
        __syncthreads();
        acc_t* const next = other;
        other = buffer;
        buffer = next;
    }
#pragma unroll 1
    for (int term = 0; term < R - r; ++term) multiply_one(buffer, term);
    __syncthreads();
}

// Each warp passes its rows through shared memory, so that its lanes store neighbouring columns. Calls store_row(row,
// values of all columns) with all lanes of the warp for each row from row_begin, the block's first, to rows. acc is lost.
template <typename StoreRow>
__device__ __forceinline__ void store_rows(
    acc_t (&acc)[THREAD_M][THREAD_N], index_t row_begin, index_t rows, const StoreRow& store_row) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int lane_m = lane / kLanesN, lane_n = lane % kLanesN;
    acc_t* const slice = reinterpret_cast<acc_t*>(dynamic_shared_memory()) + warp * kSlice;
    AccVector* const mine = reinterpret_cast<AccVector*>(slice + lane_m * kAccVec * BLOCK_N) + lane_n;
    const index_t warp_begin = row_begin + warp * kWarpRows;
#pragma unroll 1
    for (index_t first = warp_begin; first < warp_begin + kWarpRows; first += kSliceRows) {
#pragma unroll
        for (int i = 0; i < kAccVec; ++i) {
#pragma unroll
            for (int j = 0; j < THREAD_N / kAccVec; ++j) {
                AccVector vector;
#pragma unroll
                for (int v = 0; v < kAccVec; ++v) vector.element[v] = acc[i][j * kAccVec + v];
                mine[(i * BLOCK_N) / kAccVec + j * kLanesN] = vector;
            }
        }
        // The rows of the next slice move to their place, so that one loop body is used for all slices.
#pragma unroll
        for (int i = 0; i + kAccVec < THREAD_M; ++i) {
#pragma unroll
            for (int j = 0; j < THREAD_N; ++j) acc[i][j] = acc[i + kAccVec][j];
        }
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < kSliceRows && first + i < rows; ++i) store_row(first + i, slice + i * BLOCK_N);
        __syncwarp();
    }
}
