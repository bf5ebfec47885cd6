// pack_col2im_weight: lays out a layer's weights in the order in which the kernels of col2im.cuh read them.
//
//   packed[g, chunk, pair, part, i] = 16 bytes: the weights of row v = i % run_rows of group g at tap j = pair / units of run
//   i / run_rows for the kUnit channels c_in = (chunk*units + pair % units)*kUnit ...; zeros for runs, taps and channels that
//   do not exist, and for taps of the last run that the run before holds.
//
// Elements, and the second part where IS_SPLIT is 1, as packed_weight.cuh says. Rows and runs: see col2im.cuh.
//
// Macros read: those of packed_weight.cuh.
//
// Grid x: blocks of BLOCK_SIZE vectors of one part; where the grid is shorter, threads take several. Grid y and z: 1. No shared
// memory.
// Takes weights of any strides, in elements. For a convolution weight_first is the place of the last tap, and weight_stride_k
// is negative, so that taps count against the direction of the input, as in a transposed convolution.

#include "common.cuh"
#include "packed_weight.cuh"

struct Params {
    index_t num_vectors;  // groups * chunks * pairs * block_rows
    index_t chunks, pairs, block_rows;
    index_t units, taps, run_taps, runs, run_rows;
    index_t K, C_in_g, stride;
    index_t weight_first, weight_stride_g, weight_stride_out, weight_stride_in, weight_stride_k;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_col2im.py");

constexpr int kUnit = kStorageVec;
constexpr int kParts = IS_SPLIT ? 2 : 1;

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_col2im_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K]
    StorageVector* __restrict__ packed,    // [groups, chunks, pairs, parts, block_rows]
    const Params p) {
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_vectors; i += grid_size) {
        const index_t pair_of_all = i / p.block_rows, row = i - pair_of_all * p.block_rows;
        const index_t chunk_of_all = pair_of_all / p.pairs, pair = pair_of_all - chunk_of_all * p.pairs;
        const index_t g = chunk_of_all / p.chunks, chunk = chunk_of_all - g * p.chunks;
        const index_t run = row / p.run_rows, v = row - run * p.run_rows;
        const index_t c_out = v / p.stride, phase = v - c_out * p.stride;
        const index_t tap_of_run = pair / p.units, unit = pair - tap_of_run * p.units;
        const index_t taps = p.taps - (phase + (p.taps - 1) * p.stride >= p.K ? 1 : 0);  // of the row
        const index_t tap = tap_of_run + (run + 1 < p.runs ? run * p.run_taps : taps - p.run_taps);
        const index_t c_in = (chunk * p.units + unit) * kUnit, k = phase + (taps - 1 - tap) * p.stride;
        const bool exists = run < p.runs && tap_of_run < p.run_taps && tap >= run * p.run_taps;
        const storage_t* const w = weight +
            (exists ? p.weight_first + g * p.weight_stride_g + c_out * p.weight_stride_out + k * p.weight_stride_k : 0);
        StorageVector* const to = packed + (pair_of_all * kParts * p.block_rows + row);

        StorageVector large, small;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
            const PackedWeight found = PackedWeight::of(
                exists && c_in + e < p.C_in_g ? w[(c_in + e) * p.weight_stride_in] : scalar::storage_zero());
            large.element[e] = found.large;
            if (IS_SPLIT) small.element[e] = found.small;
        }
        to[0] = large;
        if (IS_SPLIT) to[p.block_rows] = small;
    }
}
