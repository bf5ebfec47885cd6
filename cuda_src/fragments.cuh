// How the sums of a block lie in the registers of its warps where tensor cores form them: what mma.cuh and
// weight_gradient_mma.cu share.
//
// A block computes BLOCK_M rows by BLOCK_N columns, by WARPS_M by WARPS_N warps. A warp's share consists of fragments of 16
// rows by 8 columns, of which each lane holds four sums (see multiply_matrices in ptx.cuh).
//
// Macros read: BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, IS_SPLIT, MULTIPLY_MATRICES, and those of common.cuh.

#pragma once

#include "common.cuh"

constexpr int kUnit = kStorageVec;           // elements of an operand that lie side by side
constexpr int kParts = IS_SPLIT ? 2 : 1;     // of an operand
constexpr int kThreads = 32 * WARPS_M * WARPS_N;
constexpr int kWarpM = BLOCK_M / WARPS_M, kWarpN = BLOCK_N / WARPS_N;
constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
static_assert(sizeof(acc_t) == 4, "float32 accumulators: gpuconv/families/mma_tiles.py");
static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "warps own whole fragments: gpuconv/families/mma_tiles.py");

typedef acc_t Sums[kTilesM][kTilesN][4];

template <typename Function>
__device__ __forceinline__ void for_each_sum(const Function& function) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) function(i, j, e);
        }
    }
}

// Adds the products of one k-step. Where operands have two parts, products of two large ones go to `acc`, those of a large and
// a small one to `low`.
__device__ __forceinline__ void multiply_fragments(
    const unsigned (&a)[kParts][kTilesM][4], const unsigned (&b)[kParts][kTilesN][2], Sums& acc, Sums& low) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
            if (IS_SPLIT) {
                MULTIPLY_MATRICES(low[i][j], a[kParts - 1][i], b[0][j]);
                MULTIPLY_MATRICES(low[i][j], a[0][i], b[kParts - 1][j]);
            }
            MULTIPLY_MATRICES(acc[i][j], a[0][i], b[0][j]);
        }
    }
}

// Moves the sums of large products to a total, rounded to nearest.
__device__ __forceinline__ void add_large_products(Sums& total, Sums& acc) {
    for_each_sum([&](int i, int j, int e) {
        total[i][j][e] += acc[i][j][e];
        acc[i][j][e] = 0.0f;
    });
}

// Puts the second 16 rows of a warp's sums in place of the first.
__device__ __forceinline__ void copy_second_tile(Sums& acc) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[0][j][e] = acc[kTilesM > 1][j][e];
    }
}

// Moves a warp's sums up by kCount fragments of rows, so that one loop body is used for all rows.
template <int kCount = 1>
__device__ __forceinline__ void move_sums_up(Sums& acc) {
#pragma unroll
    for (int next = kCount; next < kTilesM; ++next) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[next - kCount][j][e] = acc[next][j][e];
        }
    }
}
