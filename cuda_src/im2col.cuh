// Layers with few input channels a group and long kernels on tensor cores: what conv1d_im2col and conv_transpose1d_im2col
// share.
//
// A product of matrices with rows = c_out of the group and columns = l_out of one sample. Unlike in mma.cuh, the 16 bytes of a
// unit hold kUnit neighbouring taps of one channel: the reduction runs over pairs (unit, c_in) with c_in inner, two pairs per
// mma (a k-step). The packed weights (pack_im2col_weight.cu) have that order; pairs that only fill up the last stage have
// zero weights. Where the last unit would not be whole, it holds the last kUnit taps, with zero weights for those that the
// previous unit holds, so that a result uses only inputs of its own window.
//
// The window of a block is staged once, for all taps: a row of shared memory holds the kUnit inputs that one column multiplies
// with one unit. Row j of plane v of a channel begins at position (l_begin + j)*stride + first_position + v*plane_step, so
// that neighbouring columns read neighbouring rows for any stride, and ldmatrix has no bank conflicts; units that are a
// multiple of the stride apart share a plane. A last unit that fits in no plane has its own plane after the others. See
// Window in gpuconv/families/conv_im2col.py. The weights stream through a ring of NUM_STAGES stages.
//
// Taps count in the direction of the input: in a transposed convolution (IS_TRANSPOSED = 1), whose stride is 1, tap t of a
// unit is k = K - 1 - t.
//
// The order of summation depends on the layer alone. IS_SPLIT = 1, and sums that are not finite: see mma.cuh.
//
// Macros read: IS_TRANSPOSED, and those of mma.cuh.

#pragma once

#define TAPS_IN_UNITS 1

#include "common.cuh"
#include "edge.cuh"
#include "fragments.cuh"
#include "mma_epilogue.cuh"
#include "mma_stage.cuh"
#include "mma_tile.cuh"
#include "mma_weights.cuh"
#include "ptx.cuh"
#include "samples.cuh"
#include "tf32.cuh"

static_assert(!HAS_SAMPLES && SEGMENT_MODE == 0 && !PHASES_IN_ROWS, "see gpuconv/families/conv_im2col.py");

// The fields with which Params of both kernels begins. The stride is 1 where IS_TRANSPOSED.
struct Im2col : MmaConvolution {
    index_t row_tiles;
    index_t pairs;                              // whole stages
    index_t planes, plane_rows, plane_step;     // that units share; positions from plane to plane
    index_t round_rows;                         // rows from a unit to the next one in its plane
    index_t last_row;                           // of the last unit, where that is not whole
    index_t channel_rows;                       // of all planes of a channel
    index_t plane_reciprocal, channel_reciprocal;  // 2^32 / plane_rows and 2^32 / channel_rows, rounded up
};

// The first tap of output l_out reads position l_out*stride + first_position.
template <typename P>
__device__ __forceinline__ index_t first_position(const P& p) {
    return IS_TRANSPOSED ? p.padding_left - (p.K - 1) * p.dilation : -p.padding_left;
}

template <typename P>
__device__ __forceinline__ Tile tile_at(
    unsigned block, const storage_t* input, const StorageVector* weight, storage_t* output,
    const P& p SAMPLES_PARAMETER) {
    const index_t row_tile = next_index(block, p.row_tiles);
    const index_t column_tile = next_index(block, p.column_tiles);
    const index_t n = next_index(block, p.N);
    const index_t g = block;

    Tile tile = tile_of_group(g, row_tile * BLOCK_M, n, input, output, p SAMPLES_VALUE);
    tile.weight = weight + (g * p.row_tiles + row_tile) * (p.pairs * (kParts * BLOCK_M));
    tile.pairs = p.pairs;
    tile.position_begin = column_tile * BLOCK_N;
    if (IS_TRANSPOSED) {
        tile.first = p.padding_left;
        tile.tap_step = -p.dilation;
    }
    return tile;
}

// Row `row` of the window, which counts through the planes of all channels.
template <typename P>
__device__ __forceinline__ StorageVector load_row(const Tile& tile, unsigned row, const P& p) {
    const index_t c_in = multiply_high(row, unsigned(p.channel_reciprocal));
    const unsigned row_of_channel = row - unsigned(c_in * p.channel_rows);
    const index_t plane = multiply_high(row_of_channel, unsigned(p.plane_reciprocal));
    const index_t j = index_t(row_of_channel) - plane * p.plane_rows;
    const index_t first = (tile.position_begin + j) * p.stride + first_position(p) +
        (plane < p.planes ? plane * p.plane_step : (p.K - kUnit) * p.dilation);
    // Rows that are read only for columns behind the last are not loaded.
    const bool is_read = j < tile.positions - tile.position_begin + (p.plane_rows - BLOCK_N);
    const storage_t* const x = tile.input + c_in * p.input_stride_c;
    StorageVector vector;
    if (is_read && is_inside(first, first + (kUnit - 1) * p.dilation, tile.L_in)) {
        const storage_t* const from = x + first * p.input_stride_l;
        const index_t tap_offset = p.dilation * p.input_stride_l;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) vector.element[e] = from[e * tap_offset];
    } else {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
            const Source source = source_index(first + e * p.dilation, tile.L_in);
            const bool exists = is_read && source.exists;
            vector.element[e] = exists ? x[source.index * p.input_stride_l] : scalar::storage_zero();
        }
    }
    return vector;
}

// Stores kUnit taps as a row of the window, rounded or split as the operands are.
__device__ __forceinline__ void stage_vector(const StorageVector& x, StorageVector* row, int part_rows) {
    StorageVector hi = x, lo;
    if (sizeof(storage_t) == 4) {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
            float large = round_to_tf32(float(x.element[e])), small;
            if (IS_SPLIT) {
                split_tf32(float(x.element[e]), &large, &small);
                lo.element[e] = storage_t(round_to_tf32(small));
            }
            hi.element[e] = storage_t(large);
        }
    }
    row[0] = hi;
    if (IS_SPLIT) row[part_rows] = lo;
}

// The sums of one tile.
template <typename P>
__device__ __forceinline__ void multiply_window(const Tile& tile, const P& p, Sums& acc) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int part_rows = int(p.C_in_g * p.channel_rows);

    // Shared memory: stages of weights, the window, and the offsets of the rows of pairs in it, in bytes.
    StorageVector* const stages = reinterpret_cast<StorageVector*>(dynamic_shared_memory());
    StorageVector* const window = stages + NUM_STAGES * kStageVectors;
    int* const pair_offset = reinterpret_cast<int*>(window + kParts * part_rows);

    const int num_stages = int(p.pairs / kStagePairs);
    WeightRing ring(tile.weight, stages, num_stages);
#pragma unroll 1
    for (index_t pair = threadIdx.x; pair < p.pairs; pair += kThreads) {
        const index_t unit = pair / p.C_in_g, c_in = pair - unit * p.C_in_g, round = unit / p.planes;
        index_t row = 0;
        if (unit < p.K / kUnit) {
            row = c_in * p.channel_rows + round * p.round_rows + (unit - round * p.planes) * p.plane_rows;
        } else if (unit * kUnit < p.K) {
            row = c_in * p.channel_rows + p.last_row;
        }
        set_pair_row(pair_offset, pair, row);
    }
#pragma unroll 1
    for (int begin = threadIdx.x; begin < part_rows; begin += PREFETCH * kThreads) {
        StorageVector ahead[PREFETCH];
#pragma unroll
        for (int i = 0; i < PREFETCH; ++i) {
            if (begin + i * kThreads < part_rows) ahead[i] = load_row(tile, begin + i * kThreads, p);
        }
#pragma unroll
        for (int i = 0; i < PREFETCH; ++i) {
            const int row = begin + i * kThreads;
            if (row < part_rows) stage_vector(ahead[i], window + row, part_rows);
        }
    }

    const StorageVector* const my_weight = weight_rows(stages);
    const int column = warp % WARPS_N * kWarpN + lane / 16 * 8 + lane % 8;
    const unsigned char* const my_window = keep_in_register(reinterpret_cast<const unsigned char*>(window + column));
    const StepOffsets* pairs_of_stage = reinterpret_cast<const StepOffsets*>(pair_offset) + lane / 8 % 2;

    Sums low, part;  // where IS_SPLIT: the small products, and the large ones of the stages before
    for_each_sum([&](int i, int j, int e) {
        acc[i][j][e] = 0.0f;
        if (IS_SPLIT) low[i][j][e] = part[i][j][e] = 0.0f;
    });
#pragma unroll 1
    for (int stage = 0; stage < num_stages; ++stage) {
        copy_async_wait_group<NUM_STAGES - 2>();
        __syncthreads();  // in the first pass for the window, too
        ring.load((stage + NUM_STAGES - 1) & (NUM_STAGES - 1), stage);
        const StorageVector* const w = my_weight + (stage & (NUM_STAGES - 1)) * kStageVectors;
        const StepOffsets pairs = *pairs_of_stage;
        pairs_of_stage += 2;  // those of both halves
        multiply_stage(w, my_window, pairs, [](int j) { return j * 256; }, part_rows, acc, low, part);
    }
    if (IS_SPLIT) {
        for_each_sum([&](int i, int j, int e) { acc[i][j][e] = part[i][j][e] + low[i][j][e]; });
    }
    copy_async_wait_group<0>();
    __syncthreads();
}

// The block's share of the output.
template <typename P>
__device__ __forceinline__ void run_im2col(
    const storage_t* input, const StorageVector* weight, storage_t* output, const Epilogue& epilogue,
    const P& p SAMPLES_PARAMETER) {
    Sums acc;
    const Tile tile = tile_at(blockIdx.x, input, weight, output, p SAMPLES_VALUE);
    if (kHasLengths && tile.position_begin >= tile.positions) return;
    multiply_window(tile, p, acc);

    Window window = {};  // the fields that store_tile reads
    window.units = p.C_in_g;
    window.block_samples = 1;
    window.block_positions = BLOCK_N;
    store_tile(
        tile_at(block_index_again(), input, weight, output, p SAMPLES_VALUE), window, epilogue,
        [&](const Tile& tile, index_t row) { return channel_row(tile, row, p); }, kAllTaps, acc);
}
