// pack_mma_weight: lays out a layer's weights in the order in which the tensor-core families read them.
//
//   packed[product, row_tile, chunk, pair, part, i] = 16 bytes: the weights of row = row_tile*block_rows + i at
//   tap = pair / units for the kUnit channels c_in = (chunk*units + pair % units)*kUnit ...; zeros for rows, channels and taps
//   that do not exist.
//
// float16 and bfloat16 as they are; float32 rounded to TF32, or as two parts (IS_SPLIT = 1): w_hi, and w_lo = w - w_hi. A
// weight that split_tf32 refuses has a NaN in w_hi and itself in w_lo.
//
// Products, rows and taps by IS_TRANSPOSED and PHASES_IN_ROWS (weight_source.cuh).
//
// Grid x: blocks of BLOCK_SIZE consecutive rows of one part; where the grid is shorter, threads take several. Grid y and z:
// 1. No shared memory.
// Takes weights of any strides, in elements.

#include "common.cuh"
#include "tf32.cuh"
#include "weight_source.cuh"

struct Params {
    index_t num_vectors;  // products * row_tiles * chunks * pairs * block_rows
    index_t row_tiles, block_rows, chunks, units, pairs;
    index_t rows, taps, K;
    index_t C_in_g, C_out_g;
    index_t stride;
    index_t phase_gcd, tap_step, phase_inverse;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/mma.py");

constexpr int kUnit = kStorageVec;
constexpr int kParts = IS_SPLIT ? 2 : 1;

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_mma_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K] where IS_TRANSPOSED
    StorageVector* __restrict__ packed,           // [products, row_tiles, chunks, pairs, parts, block_rows]
    const Params p) {
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_vectors; i += grid_size) {
        const index_t pairs_before = i / p.block_rows;
        const index_t in_block = i - pairs_before * p.block_rows;
        const index_t chunks_before = pairs_before / p.pairs;
        const index_t pair = pairs_before - chunks_before * p.pairs;
        const index_t tiles_before = chunks_before / p.chunks;
        const index_t product = tiles_before / p.row_tiles;
        const index_t row = (tiles_before - product * p.row_tiles) * p.block_rows + in_block;
        const index_t tap = pair / p.units;
        const index_t unit = (chunks_before - tiles_before * p.chunks) * p.units + (pair - tap * p.units);
        StorageVector* const to = packed + (pairs_before * kParts * p.block_rows + in_block);

        StorageVector first, second;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
            index_t offset;
            const bool exists = find_weight(p, product, row, tap, unit * kUnit + e, &offset);
            const storage_t w = exists ? weight[offset] : scalar::storage_zero();
            storage_t packed_w = w;
            if (IS_SPLIT) {
                float hi, lo;
                split_tf32(float(w), &hi, &lo);
                packed_w = storage_t(hi);
                second.element[e] = hi == hi ? storage_t(lo) : w;
            } else if (sizeof(storage_t) == 4) {
                packed_w = storage_t(round_to_finite_tf32(float(w)));
            }
            first.element[e] = packed_w;
        }
        to[0] = first;
        if (IS_SPLIT) to[p.block_rows] = second;
    }
}
