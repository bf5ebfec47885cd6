// pack_im2col_weight: lays out a layer's weights in the order in which the kernels of im2col.cuh read them.
//
//   packed[g, row_tile, pair, part, i] = 16 bytes: the weights of channel row_tile*block_rows + i of the output and channel
//   c_in = pair % C_in_g of the input, both counted in group g, at the kUnit taps of unit pair / C_in_g; zeros for rows and
//   pairs that do not exist.
//
// IN_CHUNKS = 1 is for conv1d_mma where the positions of a stride are channels: see folded() in mma_tile.cuh. There a pair is
// (c_in, chunk of the channel, tap j < K / stride, unit of the chunk), the last fastest, and holds the taps from
// j*stride + (chunk*units + unit)*kUnit on.
//
// A unit holds neighbouring taps. Where the last of K / kUnit rounded up is not whole, it holds the last kUnit taps of all,
// with zeros for those that the unit before it holds, too.
//
// Elements, and the second part where IS_SPLIT is 1, as packed_weight.cuh says.
//
// Macros read: IN_CHUNKS, and those of packed_weight.cuh.
//
// Grid x: blocks of BLOCK_SIZE vectors of one part; where the grid is shorter, threads take several. A warp takes kWarpRows
// rows of kWarpPairs pairs, so that it reads and writes neighbouring bytes. Grid y and z: 1. No shared memory.
// Takes weights of any strides, in elements, with K >= kUnit. For a transposed convolution weight_first is the place of the
// last tap, and weight_stride_k is negative.

#include "common.cuh"
#include "packed_weight.cuh"

struct Params {
    index_t num_vectors;  // groups * row_tiles * pairs * block_rows
    index_t row_tiles, block_rows, pairs;
    index_t K, C_in_g, C_out_g;
    index_t stride, units, fold_chunks;  // of IN_CHUNKS
    index_t weight_first, weight_stride_g, weight_stride_out, weight_stride_in, weight_stride_k;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/mma_packing.py");

constexpr int kUnit = kStorageVec;
constexpr int kParts = IS_SPLIT ? 2 : 1;
constexpr int kWarpRows = 8, kWarpPairs = 4;  // block_rows and pairs are multiples of these: gpuconv/families/mma_tiles.py

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_im2col_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K]
    StorageVector* __restrict__ packed,    // [groups, row_tiles, pairs, parts, block_rows]
    const Params p) {
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    const int lane = threadIdx.x % 32;
    const index_t warps_of_pairs = p.block_rows / kWarpRows, warps_of_tile = p.pairs / kWarpPairs * warps_of_pairs;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_vectors; i += grid_size) {
        const index_t tile = i / 32 / warps_of_tile, warp_of_tile = i / 32 - tile * warps_of_tile;
        const index_t warp_pair = warp_of_tile / warps_of_pairs, warp_row = warp_of_tile - warp_pair * warps_of_pairs;
        const index_t pair = warp_pair * kWarpPairs + lane / kWarpRows;
        const index_t in_block = warp_row * kWarpRows + lane % kWarpRows;
        const index_t g = tile / p.row_tiles;
        const index_t row = (tile - g * p.row_tiles) * p.block_rows + in_block;
        index_t c_in, begin;  // the first tap
        if (IN_CHUNKS) {
            const index_t tap_of_chunk = pair / p.units, unit = pair - tap_of_chunk * p.units;
            const index_t taps = p.K / p.stride, chunk = tap_of_chunk / taps;
            c_in = chunk / p.fold_chunks;
            begin = (tap_of_chunk - chunk * taps) * p.stride + ((chunk - c_in * p.fold_chunks) * p.units + unit) * kUnit;
        } else {
            const index_t unit = pair / p.C_in_g;
            c_in = pair - unit * p.C_in_g;
            begin = unit * kUnit;
        }
        const index_t first = min_index(begin, p.K - kUnit);
        const bool exists = row < p.C_out_g && begin < p.K;
        const storage_t* const w = weight +
            (exists ? p.weight_first + g * p.weight_stride_g + row * p.weight_stride_out + c_in * p.weight_stride_in +
                    first * p.weight_stride_k
                    : 0);
        StorageVector* const to = packed + ((tile * p.pairs + pair) * kParts * p.block_rows + in_block);

        StorageVector large, small;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
            const PackedWeight tap = PackedWeight::of(
                exists && first + e >= begin ? w[e * p.weight_stride_k] : scalar::storage_zero());
            large.element[e] = tap.large;
            if (IS_SPLIT) small.element[e] = tap.small;
        }
        to[0] = large;
        if (IS_SPLIT) to[p.block_rows] = small;
    }
}
