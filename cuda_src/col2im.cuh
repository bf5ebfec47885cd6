// Layers with few output channels a group and many taps on tensor cores: what conv1d_col2im and conv_transpose1d_col2im share.
//
// The stride is 1. Taps count in the direction of the input: tap t of a convolution is k = t, of a transposed one
// (IS_TRANSPOSED = 1) k = K - 1 - t. First, all taps meet every position m of the input,
//
//   product[t, c_out, m] = sum over c_in < C_in_g of weight[c_out, c_in, t] * input[n, g*C_in_g + c_in, m],
//
// which is the product of mma.cuh with one tap and with rows = (t, c_out), c_out inner. So few output channels leave no rows
// of a matrix empty. Then a result is the sum along a diagonal, t ascending,
//
//   output[n, c_out, l_out] = bias[c_out] + sum over t < K of product[t, c_out, l_out + first_position + t*dilation].
//
// A block computes block_results neighbouring positions of all c_out of a group, from the BLOCK_N positions of the input that
// these read. It takes pass_taps taps in a pass, as many as BLOCK_M rows hold: it multiplies, leaves the products in shared
// memory, where its operands were, and adds them to the sums of its results, which are behind. Neighbouring blocks both
// multiply the positions that results of both read.
//
// The order of summation depends on the layer alone, and a result has no other terms than its own. IS_SPLIT = 1: see mma.cuh.
// Sums that are not finite are formed again by canonical_sum.
//
// Macros read: IS_TRANSPOSED, and those of mma.cuh.

#pragma once

#include "common.cuh"
#include "edge.cuh"
#include "mma.cuh"

static_assert(!HAS_SAMPLES && SEGMENT_MODE == 0 && !PHASES_IN_ROWS, "see gpuconv/families/conv_col2im.py");

// The fields with which Params of both kernels begins.
struct Col2im : WindowConvolution {
    index_t block_results;  // of a block and channel
    index_t pass_taps, passes;
    index_t sums_begin;  // of the sums in shared memory, in units of 16 bytes
};

// From one row of products to the next: lanes that store two neighbours in each of four rows meet all banks.
constexpr int kPitch = BLOCK_N + 8;
static_assert(BLOCK_N % 32 == 0, "see gpuconv/families/conv_col2im.py");
constexpr int kLaneSums = 2;  // that a lane forms at a time

// The packed weights of an output channel, for canonical_sum, which takes k in ascending order.
template <typename P>
struct Col2imWeights : EveryWeight {
    const StorageVector* weight;  // of the group
    index_t c_out;                // in the group
    const P& p;

    __device__ __forceinline__ Col2imWeights(const StorageVector* weight, index_t c_out, const P& p)
        : weight(weight), c_out(c_out), p(p) {}
    __device__ __forceinline__ acc_t load(index_t c_in, index_t k) const {
        const index_t tap = IS_TRANSPOSED ? p.K - 1 - k : k;
        const index_t pass = tap / p.pass_taps, row = (tap - pass * p.pass_taps) * p.C_out_g + c_out;
        const index_t unit = c_in / kUnit, chunk = unit / p.units;
        const index_t pair = (pass * p.chunks + chunk) * p.pairs + (unit - chunk * p.units);
        return packed_value(weight + (pair * (kParts * BLOCK_M) + row), int(c_in - unit * kUnit));
    }
};

// Leaves the sums of a block in shared memory, row by row.
__device__ __forceinline__ void keep_products(const Sums& acc, acc_t* products) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp / WARPS_N * kWarpM + lane / 4, column = warp % WARPS_N * kWarpN + lane % 4 * 2;
    acc_t* const mine = products + (row * kPitch + column);
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Vector<acc_t, 2> pair;
                pair.element[0] = acc[i][j][2 * half];
                pair.element[1] = acc[i][j][2 * half + 1];
                *reinterpret_cast<Vector<acc_t, 2>*>(mine + ((i * 16 + half * 8) * kPitch + j * 8)) = pair;
            }
        }
    }
}

// Adds the products of a pass to the sums [C_out_g, block_results] of the results.
template <typename P>
__device__ __forceinline__ void add_diagonals(const acc_t* products, acc_t* sums, index_t pass, const P& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int results = int(p.block_results), parts = (results + 32 * kLaneSums - 1) / (32 * kLaneSums);
    const int first_tap = int(pass * p.pass_taps), taps = int(min_index(p.pass_taps, p.K - first_tap));
    const int step = int(p.C_out_g) * kPitch + int(p.dilation);
#pragma unroll 1
    for (int task = warp; task < int(p.C_out_g) * parts; task += kThreads / 32) {
        const int c_out = task / parts, begin = (task - c_out * parts) * (32 * kLaneSums) + lane;
        const acc_t* from[kLaneSums];
        acc_t sum[kLaneSums];
#pragma unroll
        for (int i = 0; i < kLaneSums; ++i) {
            const int result = begin + i * 32;
            const int column = int(min_index(result, results - 1));  // behind the last result, that of the last again
            from[i] = products + (c_out * kPitch + column + first_tap * int(p.dilation));
            sum[i] = pass > 0 && result < results ? sums[c_out * results + result] : scalar::zero();
        }
#pragma unroll 4
        for (int tap = 0; tap < taps; ++tap) {
#pragma unroll
            for (int i = 0; i < kLaneSums; ++i) {
                sum[i] = add(sum[i], *from[i]);
                from[i] += step;
            }
        }
#pragma unroll
        for (int i = 0; i < kLaneSums; ++i) {
            if (begin + i * 32 < results) sums[c_out * results + begin + i * 32] = sum[i];
        }
    }
}

// The first position of the input that the first tap of a block's first result reads is Tile::position_begin.
template <typename P>
__device__ __forceinline__ Tile tile_at(
    unsigned block, index_t pass, const storage_t* input, const StorageVector* weight, storage_t* output,
    const P& p SAMPLES_PARAMETER) {
    const index_t column_tile = next_index(block, p.column_tiles);
    const index_t n = next_index(block, p.N), g = block;
    const index_t reach = (p.K - 1) * p.dilation;

    Tile tile = tile_of_group(g, 0, n, input, output, p SAMPLES_VALUE);
    tile.weight = weight + (g * p.passes + pass) * (p.chunks * p.pairs * (kParts * BLOCK_M));
    tile.rows = BLOCK_M;
    tile.output_first = IS_TRANSPOSED ? reach - p.padding_left : p.padding_left;  // l_out = position + output_first
    tile.position_begin = column_tile * p.block_results - tile.output_first;
    tile.positions = tile.L_out - tile.output_first + reach;  // behind the last that a result reads
    tile.row_taps = 1;
    tile.column_step = tile.tap_step = 1;
    tile.first = 0;
    return tile;
}

// Stores the results of a block.
template <typename P>
__device__ __forceinline__ void store_results(
    const Tile& tile, const acc_t* sums, const Epilogue& epilogue, const P& p) {
    const int results = int(p.block_results);
    const index_t first = IS_TRANSPOSED ? (p.K - 1) * p.dilation : 0, tap_step = IS_TRANSPOSED ? -p.dilation : p.dilation;
#pragma unroll 1
    for (int i = threadIdx.x; i < int(p.C_out_g) * results; i += kThreads) {
        const int c_out = i / results;
        const index_t position = tile.position_begin + (i - c_out * results), l_out = position + tile.output_first;
        if (l_out >= tile.L_out) continue;
        acc_t sum = sums[i];
        if (needs_canonical_sum(multiply_add(scalar::zero(), sum, scalar::zero()))) {
            sum = canonical_sum(
                tile.input, position + first, tap_step, p.K, tile, Col2imWeights<P>(tile.weight, c_out, p));
        }
        storage_t* const place = tile.output + (c_out * p.output_stride_c + l_out * p.output_stride_l);
        *place = finish(sum, epilogue.channel(tile.group * p.C_out_g + c_out), place);
    }
}

// The block's share of the output. Tiles are found again in each pass, so that they take no registers meanwhile.
template <typename P>
__device__ __forceinline__ void run_col2im(
    const storage_t* input, const StorageVector* weight, storage_t* output, const Epilogue& epilogue,
    const P& p SAMPLES_PARAMETER) {
    const auto tile_of = [&](unsigned block, index_t pass) {
        return tile_at(block, pass, input, weight, output, p SAMPLES_VALUE);
    };
    if (kHasLengths) {  // blocks behind the sample's last output have nothing to do
        const Tile tile = tile_of(blockIdx.x, 0);
        if (tile.position_begin + tile.output_first >= tile.L_out) return;
    }
    acc_t* const products = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    const auto sums = [&] { return reinterpret_cast<acc_t*>(dynamic_shared_memory() + p.sums_begin * 16); };
#pragma unroll 1
    for (index_t pass = 0; pass < p.passes; ++pass) {
        Sums acc;
        const Window window = window_of(p);
        multiply_tile(tile_of(block_index_again(), pass), window, 0, window.chunks, acc);
        keep_products(acc, products);
        __syncthreads();
        add_diagonals(products, sums(), pass, p);
        __syncthreads();
    }
    store_results(tile_of(block_index_again(), 0), sums(), epilogue, p);
}
