// pack_weight: lays out a layer's weights in the order in which the tiled families read them.
//
//   packed[product, row / block_rows, r, row % block_rows] = the weight of term r = c_in * taps + tap of that row, in the
//   accumulator's type; zero for rows, terms and taps that do not exist.
//
// Products, rows, taps and boxes by IS_TRANSPOSED and PHASES_IN_ROWS: see weight_source.cuh. A box has one channel c_in, or
// all taps.
//
// Grid x: boxes of taps (fastest), then of channels c_in, phases, channels c_out, and products. Grid y and z: 1. Dynamic
// shared memory: the elements of a box, kRowPadding more rows of each term.
// Takes weights of any strides, in elements.

#include "common.cuh"
#include "weight_source.cuh"

struct Params {
    index_t padded_terms, block_rows, row_tiles;
    index_t taps, K, C_in_g, C_out_g;
    index_t stride;
    index_t phase_gcd, tap_step, phase_inverse;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t box_out, box_phases, box_in, box_taps;
    index_t out_parts, phase_parts, in_parts, tap_parts;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/tiles.py");

constexpr int kRowPadding = 1;  // lanes that store different terms of one row meet different banks

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K] where IS_TRANSPOSED
    acc_t* __restrict__ packed,            // [products, row_tiles, padded_terms, block_rows]
    const Params p) {
    acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    const WeightBox box(blockIdx.x, p);
    const int pitch = box.rows + kRowPadding;  // of the rows of a term

    read_box(weight, box, p, [&](int row, int c_in, int tap, storage_t w) {
        shared[(c_in * int(p.box_taps) + tap) * pitch + row] = scalar::load(w);
    });
    __syncthreads();

    const index_t term_begin = box.c_in * p.taps + box.tap;
    // Of one channel the taps may end before the box does.
    const index_t terms = p.tap_parts > 1 ? min_index(p.box_taps, p.taps - box.tap) : p.box_in * p.box_taps;
    const int term_end = int(min_index(terms, p.padded_terms - term_begin));
    for (int i = threadIdx.x % 32; i < box.rows; i += 32) {
        const index_t row = box.row + i, row_tile = row / p.block_rows;
        if (row_tile >= p.row_tiles) break;
        acc_t* const to = packed + ((box.product * p.row_tiles + row_tile) * p.padded_terms + term_begin) * p.block_rows +
            (row - row_tile * p.block_rows);
        for (int j = threadIdx.x / 32; j < term_end; j += BLOCK_SIZE / 32) to[j * p.block_rows] = shared[j * pitch + i];
    }
}
