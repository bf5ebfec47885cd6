// pack_col2im_weight: lays out a layer's weights in the order in which the kernels of col2im.cuh read them.
//
//   packed[g, pass, chunk, pair, part, i] = 16 bytes: the weights of output channel i % C_out_g of group g at tap
//   t = pass*pass_taps + i / C_out_g for the kUnit channels c_in = (chunk*units + pair)*kUnit ...; zeros for taps, channels and
//   pairs that do not exist, and for i >= pass_taps*C_out_g.
//
// Elements, and the second part where IS_SPLIT is 1, as packed_weight.cuh says.
//
// Macros read: those of packed_weight.cuh.
//
// Grid x: blocks of BLOCK_SIZE vectors of one part; where the grid is shorter, threads take several. Grid y and z: 1. No shared
// memory.
// Takes weights of any strides, in elements. For a transposed convolution weight_first is the place of the last tap, and
// weight_stride_k is negative.

#include "common.cuh"
#include "packed_weight.cuh"

struct Params {
    index_t num_vectors;  // groups * passes * chunks * pairs * block_rows
    index_t passes, chunks, pairs, block_rows;
    index_t units, pass_taps;
    index_t K, C_in_g, C_out_g;
    index_t weight_first, weight_stride_g, weight_stride_out, weight_stride_in, weight_stride_k;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_col2im.py");

constexpr int kUnit = kStorageVec;
constexpr int kParts = IS_SPLIT ? 2 : 1;

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_col2im_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K]
    StorageVector* __restrict__ packed,    // [groups, passes, chunks, pairs, parts, block_rows]
    const Params p) {
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t v = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; v < p.num_vectors; v += grid_size) {
        const index_t pair_of_all = v / p.block_rows, row = v - pair_of_all * p.block_rows;
        const index_t chunk_of_all = pair_of_all / p.pairs, pair = pair_of_all - chunk_of_all * p.pairs;
        const index_t pass_of_all = chunk_of_all / p.chunks, chunk = chunk_of_all - pass_of_all * p.chunks;
        const index_t g = pass_of_all / p.passes, pass = pass_of_all - g * p.passes;
        const index_t tap_of_pass = row / p.C_out_g, c_out = row - tap_of_pass * p.C_out_g;
        const index_t tap = pass * p.pass_taps + tap_of_pass, c_in = (chunk * p.units + pair) * kUnit;
        const bool exists = tap_of_pass < p.pass_taps && tap < p.K && pair < p.units;
        const storage_t* const w = weight +
            (exists ? p.weight_first + g * p.weight_stride_g + c_out * p.weight_stride_out + tap * p.weight_stride_k : 0);
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
