// The products of one stage of packed weights: what the engine of mma.cuh and that of im2col.cuh share. Macros read: those of
// mma.cuh.

#pragma once

#include "common.cuh"
#include "fragments.cuh"
#include "mma_tile.cuh"

// Writes where the rows of a pair begin in a window. A lane reads the pairs of its half of every k-step: those of a stage lie
// side by side.
__device__ __forceinline__ void set_pair_row(int* pair_offset, index_t pair, index_t row) {
    const index_t in_stage = pair % kStagePairs;
    pair_offset[pair - in_stage + in_stage % 2 * STAGE_STEPS + in_stage / 2] = int(row) * 16;
}

// Adds the products of a stage. `w` and `x` are this lane's rows of the weights and of the window: fragments 2*j and 2*j + 1
// of columns lie column_offset(j) bytes behind x, and the second part of the window part_rows behind the first.
template <typename ColumnOffset>
__device__ __forceinline__ void multiply_stage(
    const StorageVector* w, const unsigned char* x, const StepOffsets& pairs, const ColumnOffset& column_offset,
    int part_rows, Sums& acc, Sums& low, Sums& total) {
#pragma unroll
    for (int step = 0; step < STAGE_STEPS; ++step) {
        const unsigned char* const x_pair = x + pairs.element[step];
        unsigned a[kParts][kTilesM][4], b[kParts][kTilesN][2];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int i = 0; i < kTilesM; ++i) {
                load_matrix_x4(a[part][i], w + (2 * step * kParts + part) * BLOCK_M + i * 16);
            }
#pragma unroll
            for (int j = 0; j < kTilesN / 2; ++j) {
                unsigned both[4];
                load_matrix_x4(both, x_pair + (column_offset(j) + part * part_rows * 16));
                b[part][2 * j][0] = both[0];
                b[part][2 * j][1] = both[1];
                b[part][2 * j + 1][0] = both[2];
                b[part][2 * j + 1][1] = both[3];
            }
        }
        multiply_fragments(a, b, acc, low);
    }
    if (IS_SPLIT) add_large_products(total, acc);
}
