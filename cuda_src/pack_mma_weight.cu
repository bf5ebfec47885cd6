// pack_mma_weight: lays out a layer's weights in the order in which the tensor-core families read them.
//
//   packed[product, row_tile, chunk, pair, part, i] = 16 bytes: the weights of row = row_tile*block_rows + i at
//   tap = pair / units for the kUnit channels c_in = (chunk*units + pair % units)*kUnit ...; zeros for rows, channels and taps
//   that do not exist.
//
// Where PHASES_IN_ROWS is 1, the rows of the first full_phases phases of all channels come first, in full_row_tiles tiles; in
// the tiles of the others a chunk has short_pairs pairs. See conv_transpose1d_mma.cu.
//
// Elements, and the second part where IS_SPLIT is 1, as packed_weight.cuh says.
//
// Products, rows, taps and boxes by IS_TRANSPOSED and PHASES_IN_ROWS: see weight_source.cuh. A box has units of one chunk.
//
// Grid x: boxes of taps (fastest), then of channels c_in, phases, channels c_out, and products. Grid y and z: 1. Dynamic
// shared memory: a box.
// Takes weights of any strides, in elements.

#include "common.cuh"
#include "packed_weight.cuh"
#include "weight_source.cuh"

struct Params {
    index_t row_tiles, block_rows, chunks, units, pairs;
    index_t full_phases, full_row_tiles, short_pairs, product_pairs;
    index_t K, C_in_g, C_out_g;
    index_t stride;
    index_t phase_gcd, tap_step, phase_inverse;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t box_out, box_phases, box_in, box_taps, box_pitch, box_k;
    index_t out_parts, phase_parts, in_parts, tap_parts;
    index_t is_wide;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/mma_packing.py");

constexpr int kUnit = kStorageVec;
constexpr int kParts = IS_SPLIT ? 2 : 1;

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_mma_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K] where IS_TRANSPOSED
    StorageVector* __restrict__ packed,           // [products, row tile, chunks, pairs, parts, block_rows]
    const Params p) {
    storage_t* const shared = reinterpret_cast<storage_t*>(dynamic_shared_memory());
    const WeightBox box(blockIdx.x, p);
    read_box(weight, box, p, shared);
    __syncthreads();

    const int box_taps = int(p.box_taps), box_pairs = int(p.box_in) / kUnit * box_taps;
    const index_t first_unit = box.c_in / kUnit, chunk = first_unit / p.units;
    // Eight lanes take neighbouring rows of a pair, so that a warp meets most banks of shared memory and stores whole lines.
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32 * 8 + lane % 8; i < box.rows; i += 8 * kWarps) {
        const BoxRow from(i, box, p);
        index_t row = box.row + i, pairs = p.pairs, tiles_before = 0, tiles = p.full_row_tiles;
        if (PHASES_IN_ROWS) {
            const index_t c_out = box.c_out + from.c_out, phase = box.phase + from.phase;
            row = c_out * p.full_phases + phase;
            if (phase >= p.full_phases) {
                row = c_out * (p.stride - p.full_phases) + (phase - p.full_phases);
                pairs = p.short_pairs;
                tiles_before = p.full_row_tiles;
                tiles = p.row_tiles - tiles_before;
            }
        }
        const index_t row_tile = row / p.block_rows;
        if (row_tile >= tiles) continue;
        const index_t before =
            box.product * p.product_pairs + p.chunks * tiles_before * p.pairs + (row_tile * p.chunks + chunk) * pairs;
#pragma unroll 1
        for (int j = lane / 8; j < box_pairs; j += 4) {
            const int unit = j / box_taps, tap = j - unit * box_taps;
            const index_t pair = (box.tap + tap) * p.units + (first_unit + unit - chunk * p.units);
            if (pair >= pairs) continue;
            StorageVector first, second;
#pragma unroll
            for (int e = 0; e < kUnit; ++e) {
                const PackedWeight w = PackedWeight::of(
                    from.has(tap) ? shared[from.place(unit * kUnit + e, tap)] : scalar::storage_zero());
                first.element[e] = w.large;
                if (IS_SPLIT) second.element[e] = w.small;
            }
            StorageVector* const to = packed + ((before + pair) * kParts * p.block_rows + (row - row_tile * p.block_rows));
            to[0] = first;
            if (IS_SPLIT) to[p.block_rows] = second;
        }
    }
}
