// pack_weight: lays out a layer's weights in the order in which the tiled families read them.
//
//   packed[product, row / block_rows, r, row % block_rows] = the weight of term r = c_in * taps + tap of that row, in the
//   accumulator's type; zero for rows, terms and taps that do not exist.
//
// Products, rows, taps and boxes by IS_TRANSPOSED and PHASES_IN_ROWS: see weight_source.cuh. A box has one channel c_in, or
// all taps.
//
// Grid x: boxes of taps (fastest), then of channels c_in, phases, channels c_out, and products. Grid y and z: 1. Dynamic
// shared memory: a box.
// Takes weights of any strides, in elements.

#include "common.cuh"
#include "weight_source.cuh"

struct Params {
    index_t padded_terms, block_rows, row_tiles;
    index_t taps, K, C_in_g, C_out_g;
    index_t stride;
    index_t phase_gcd, tap_step, phase_inverse;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t box_out, box_phases, box_in, box_taps, box_pitch, box_k;
    index_t out_parts, phase_parts, in_parts, tap_parts;
    index_t is_wide;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/tiles.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K] where IS_TRANSPOSED
    acc_t* __restrict__ packed,            // [products, row_tiles, padded_terms, block_rows]
    const Params p) {
    storage_t* const shared = reinterpret_cast<storage_t*>(dynamic_shared_memory());
    const WeightBox box(blockIdx.x, p);
    read_box(weight, box, p, shared);
    __syncthreads();

    const int box_taps = int(p.box_taps);
    const index_t first_term = box.c_in * p.taps + box.tap;
    // Of one channel the taps may end before the box does.
    const index_t terms = p.tap_parts > 1 ? min_index(box_taps, p.taps - box.tap) : p.box_in * box_taps;
    const int box_terms = int(min_index(terms, p.padded_terms - first_term));
    // Eight lanes take neighbouring rows of a term, so that a warp meets most banks of shared memory and stores whole sectors.
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32 * 8 + lane % 8; i < box.rows; i += 8 * kWarps) {
        const index_t row = box.row + i, row_tile = row / p.block_rows;
        if (row_tile >= p.row_tiles) break;
        const BoxRow from(i, box, p);
        acc_t* const to = packed + ((box.product * p.row_tiles + row_tile) * p.padded_terms + first_term) * p.block_rows +
            (row - row_tile * p.block_rows);
        int c_in = 0, tap = lane / 8;
#pragma unroll 1
        for (int j = lane / 8; j < box_terms; j += 4, tap += 4) {
#pragma unroll 1
            for (; tap >= box_taps; tap -= box_taps) ++c_in;
            to[j * p.block_rows] = from.has(tap) ? scalar::load(shared[from.place(c_in, tap)]) : scalar::zero();
        }
    }
}
