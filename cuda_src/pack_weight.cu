// pack_weight: lays out a layer's weights in the order in which the tiled families read them.
//
//   packed[product, row / block_rows, r, row % block_rows] = the weight of term r = c_in * taps + tap of that row, in the
//   accumulator's type; zero for rows, terms and taps that do not exist.
//
// Products, rows and taps by IS_TRANSPOSED and PHASES_IN_ROWS: see weight_source.cuh.
//
// Grid x: blocks of BLOCK_SIZE consecutive elements of packed; where the grid is shorter, threads take several. Grid y
// and z: 1. No shared memory.
// Takes weights of any strides, in elements.

#include "common.cuh"
#include "weight_source.cuh"

struct Params {
    index_t num_elements;  // products * row_tiles * padded_terms * block_rows
    index_t padded_terms, block_rows, row_tiles;
    index_t rows, taps, K;
    index_t C_in_g, C_out_g;
    index_t stride;
    index_t phase_gcd, tap_step, phase_inverse;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/tiles.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K] where IS_TRANSPOSED
    acc_t* __restrict__ packed,            // [products, row_tiles, padded_terms, block_rows]
    const Params p) {
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_elements; i += grid_size) {
        const index_t tile_term = i / p.block_rows;
        const index_t tile = tile_term / p.padded_terms;
        const index_t r = tile_term - tile * p.padded_terms;
        const index_t product = tile / p.row_tiles;
        const index_t row = (tile - product * p.row_tiles) * p.block_rows + (i - tile_term * p.block_rows);
        const index_t c_in = r / p.taps;
        const index_t tap = r - c_in * p.taps;

        index_t offset;
        packed[i] = find_weight(p, product, row, tap, c_in, &offset) ? scalar::load(weight[offset]) : scalar::zero();
    }
}
