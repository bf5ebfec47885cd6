// Layers with few output channels a group and many taps on tensor cores: what conv1d_col2im and conv_transpose1d_col2im share.
//
// The results of a group are taken row by row: row v = c_out*stride + phase has the results q of channel c_out at
// l_out = q*stride + phase + output_first (0 <= phase < stride; the stride of a convolution is 1 here). Taps count in the
// direction of the input: tap t < taps_v of row v reads position q + first_position + lead_v + t*dilation, where
// lead_v = taps - taps_v is 1 if the phase has a tap less than others. Of a convolution k = t, of a transposed one
// (IS_TRANSPOSED = 1) k = phase + (taps_v - 1 - t)*stride.
//
// The taps of a row form `runs` runs of run_taps neighbouring ones. Run r begins with tap r*run_taps; the last one consists
// of the last run_taps taps, with zero weights for those that the run before holds, so that a result uses only inputs of its
// own window. First, all runs meet every position m of the input,
//
//   product[r, v, m] = sum over c_in < C_in_g, j < run_taps of weight[v, c_in, tap j of run r] * input[c_in, m + j*dilation],
//
// which is the product of mma.cuh with run_taps taps and with rows (r, v), v inner. So few output channels leave few rows of
// a matrix empty. Then a result is the sum of one product of each run, r ascending, which lie along a diagonal:
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over r < runs of product[r, v, q + first_position + lead_v + (first tap of run r)*dilation].
//
// A block computes block_results neighbouring results of all rows of a group, from the products at BLOCK_N positions. It
// multiplies, leaves the products in shared memory, where its operands were, adds them up, and stores the results.
// Neighbouring blocks both multiply the positions that results of both need.
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
    index_t results, block_results;  // of a row; of a block and row
    index_t taps, run_taps, runs;
    index_t run_rows;  // C_out_g * stride
};

// From one row of products to the next: lanes that store two neighbours in each of four rows meet all banks.
constexpr int kPitch = BLOCK_N + 8;
static_assert(BLOCK_N % 32 == 0, "see gpuconv/families/conv_col2im.py");
constexpr int kLaneSums = 2;  // that a lane forms at a time

// The stride between results, of which a convolution has none.
template <typename P>
__device__ __forceinline__ index_t stride_of(const P& p) {
    return IS_TRANSPOSED ? p.stride : 1;
}

// By how many taps the rows of a phase are shorter than others.
template <typename P>
__device__ __forceinline__ index_t lead_of(index_t phase, const P& p) {
    return IS_TRANSPOSED && phase + (p.taps - 1) * p.stride >= p.K ? 1 : 0;
}

// The packed weights of a row, for canonical_sum, which takes k in ascending order.
template <typename P>
struct Col2imWeights : EveryWeight {
    const StorageVector* weight;  // of the row, in run 0
    index_t taps;                 // of the row
    const P& p;

    __device__ __forceinline__ Col2imWeights(const StorageVector* weight, index_t taps, const P& p)
        : weight(weight), taps(taps), p(p) {}
    __device__ __forceinline__ acc_t load(index_t c_in, index_t k) const {
        const index_t tap = IS_TRANSPOSED ? taps - 1 - k : k;
        const index_t run = min_index(tap / p.run_taps, p.runs - 1);
        const index_t first = run + 1 < p.runs ? run * p.run_taps : taps - p.run_taps;
        const index_t unit = c_in / kUnit, chunk = unit / p.units;
        const index_t pair = chunk * p.pairs + (tap - first) * p.units + (unit - chunk * p.units);
        return packed_value(weight + (pair * (kParts * BLOCK_M) + run * p.run_rows), int(c_in - unit * kUnit));
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

// Where the last run's products begin that belong to the results of row v. The sums take their place.
template <typename P>
__device__ __forceinline__ acc_t* last_products(acc_t* products, int v, const P& p) {
    return products + ((int(p.runs - 1) * int(p.run_rows) + v) * kPitch + int((p.taps - p.run_taps) * p.dilation));
}

// Adds up the products of each result.
template <typename P>
__device__ __forceinline__ void add_diagonals(acc_t* products, const P& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int results = int(p.block_results), parts = (results + 32 * kLaneSums - 1) / (32 * kLaneSums);
    const int step = int(p.run_rows) * kPitch + int(p.run_taps * p.dilation), runs = int(p.runs);
#pragma unroll 1
    for (int task = warp; task < int(p.run_rows) * parts; task += kThreads / 32) {
        const int v = task / parts, result = (task - v * parts) * (32 * kLaneSums) + lane;
        const int lead = int(lead_of(v % int(stride_of(p)), p) * p.dilation);
        const acc_t* from = products + (v * kPitch + lead + result);
        acc_t* const last = last_products(products, v, p) + result;
        const auto exists = [&](int i) { return result + i * 32 < results; };
        acc_t sum[kLaneSums];
#pragma unroll
        for (int i = 0; i < kLaneSums; ++i) sum[i] = scalar::zero();
#pragma unroll 4
        for (int run = 0; run + 1 < runs; ++run, from += step) {
#pragma unroll
            for (int i = 0; i < kLaneSums; ++i) {
                if (exists(i)) sum[i] = add(sum[i], from[i * 32]);
            }
        }
#pragma unroll
        for (int i = 0; i < kLaneSums; ++i) {
            if (exists(i)) last[i * 32] = add(sum[i], last[i * 32]);
        }
    }
}

// The products of a block begin at Tile::position_begin, those of its results q - q_begin further on.
template <typename P>
__device__ __forceinline__ Tile tile_at(
    unsigned block, const storage_t* input, const StorageVector* weight, storage_t* output,
    const P& p SAMPLES_PARAMETER) {
    const index_t column_tile = next_index(block, p.column_tiles);
    const index_t n = next_index(block, p.N), g = block;

    Tile tile = tile_of_group(g, 0, n, input, output, p SAMPLES_VALUE);
    index_t results = p.results;
    if (IS_TRANSPOSED) {
        const index_t skipped = p.padding_left / p.stride;
        tile.position_begin = skipped - (p.taps - 1) * p.dilation;
        tile.output_first = skipped * p.stride - p.padding_left;
    } else {
        tile.position_begin = -p.padding_left;
    }
    if (kHasLengths) results = tile.L_out > 0 ? (tile.L_out - 1 - tile.output_first) / stride_of(p) + 1 : 0;
    tile.positions = tile.position_begin + results + (p.taps - p.run_taps) * p.dilation;
    const index_t q_begin = column_tile * p.block_results;
    tile.position_begin += q_begin;
    tile.output_first += q_begin * stride_of(p);
    tile.weight = weight + g * (p.chunks * p.pairs * (kParts * BLOCK_M));
    tile.pairs = p.pairs;
    tile.rows = BLOCK_M;
    tile.output_step = stride_of(p);
    tile.row_taps = p.run_taps;
    tile.column_step = 1;
    tile.tap_step = p.dilation;
    tile.first = 0;
    return tile;
}

// Stores the results of a block, each thread those kThreads apart in the output.
template <typename P>
__device__ __forceinline__ void store_results(const Tile& tile, acc_t* products, const Epilogue& epilogue, const P& p) {
    const int stride = int(stride_of(p));
    const int q_step = kThreads / stride, phase_step = kThreads - q_step * stride;
    const int q_first = threadIdx.x / stride, phase_first = threadIdx.x - q_first * stride;
#pragma unroll 1
    for (int c_out = 0; c_out < int(p.C_out_g); ++c_out) {
        const Channel channel = epilogue.channel(tile.group * p.C_out_g + c_out);
        int phase = phase_first;
#pragma unroll 1
        for (int q = q_first; q < int(p.block_results); q += q_step) {
            const index_t l_out = q * stride + phase + tile.output_first;
            if (is_index(l_out, tile.L_out)) {
                acc_t sum = last_products(products, c_out * stride + phase, p)[q];
                if (needs_canonical_sum(multiply_add(scalar::zero(), sum, scalar::zero()))) {
                    const index_t lead = lead_of(phase, p), taps = p.taps - lead;
                    const index_t first = tile.position_begin + q + lead;
                    sum = canonical_sum(
                        tile.input, IS_TRANSPOSED ? first + (taps - 1) * p.dilation : first,
                        IS_TRANSPOSED ? -p.dilation : p.dilation, taps, tile,
                        Col2imWeights<P>(tile.weight + (c_out * stride + phase), taps, p));
                }
                storage_t* const place = tile.output + (c_out * p.output_stride_c + l_out * p.output_stride_l);
                *place = finish(sum, channel, place);
            }
            phase += phase_step;
            if (IS_TRANSPOSED && phase >= stride) {
                phase -= stride;
                ++q;
            }
        }
    }
}

// The block's share of the output. The tile is found again for its results, so that it takes no registers meanwhile.
template <typename P>
__device__ __forceinline__ void run_col2im(
    const storage_t* input, const StorageVector* weight, storage_t* output, const Epilogue& epilogue,
    const P& p SAMPLES_PARAMETER) {
    const auto tile_of = [&](unsigned block) { return tile_at(block, input, weight, output, p SAMPLES_VALUE); };
    if (kHasLengths) {  // blocks behind the sample's last output have nothing to do
        const Tile tile = tile_of(blockIdx.x);
        if (tile.output_first >= tile.L_out) return;
    }
    acc_t* const products = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    {
        Sums acc;
        const Window window = window_of(p);
        multiply_tile(tile_of(blockIdx.x), window, 0, window.chunks, acc);
        keep_products(acc, products);
    }
    __syncthreads();
    add_diagonals(products, p);
    __syncthreads();
    store_results(tile_of(block_index_again()), products, epilogue, p);
}
