// pack_mma_weight: lays out a layer's weights in the order in which the tensor-core families read them.
//
//   packed[product, row_tile, chunk, pair, part, i] = 16 bytes: the weights of row = row_tile*block_rows + i at
//   tap = pair / units for the kUnit channels c_in = (chunk*units + pair % units)*kUnit ...; zeros for rows, channels and taps
//   that do not exist.
//
// float16 and bfloat16 as they are; float32 rounded to TF32, or as two parts (IS_SPLIT = 1): w_hi, and w_lo = w - w_hi. A
// weight that split_tf32 refuses has a NaN in w_hi and itself in w_lo.
//
// Products, rows, taps and boxes by IS_TRANSPOSED and PHASES_IN_ROWS: see weight_source.cuh. A box has one unit of a chunk,
// or all of them.
//
// Grid x: boxes of taps (fastest), then of channels c_in, phases, channels c_out, and products. Grid y and z: 1. Dynamic
// shared memory: the vectors of a box, kRowPadding more rows of each pair.
// Takes weights of any strides, in elements.

#include "common.cuh"
#include "tf32.cuh"
#include "weight_source.cuh"

struct Params {
    index_t row_tiles, block_rows, chunks, units, pairs;
    index_t K, C_in_g, C_out_g;
    index_t stride;
    index_t phase_gcd, tap_step, phase_inverse;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t box_out, box_phases, box_in, box_taps;
    index_t out_parts, phase_parts, in_parts, tap_parts;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/mma.py");

constexpr int kUnit = kStorageVec;
constexpr int kParts = IS_SPLIT ? 2 : 1;
constexpr int kRowPadding = 1;  // lanes that store different taps of one row meet different banks

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) pack_mma_weight(
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K], or [C_in, C_out_g, K] where IS_TRANSPOSED
    StorageVector* __restrict__ packed,           // [products, row_tiles, chunks, pairs, parts, block_rows]
    const Params p) {
    StorageVector* const shared = reinterpret_cast<StorageVector*>(dynamic_shared_memory());
    const WeightBox box(blockIdx.x, p);
    const int box_units = int(p.box_in) / kUnit;
    const int pitch = box.rows + kRowPadding;  // of the vectors of a pair

    read_box(weight, box, p, [&](int row, int c_in, int tap, storage_t w) {
        const int unit = c_in / kUnit;
        shared[(unit * int(p.box_taps) + tap) * pitch + row].element[c_in - unit * kUnit] = w;
    });
    __syncthreads();

    const index_t unit_begin = box.in_part * box_units, chunk = unit_begin / p.units;
    for (int i = threadIdx.x % 32; i < box.rows; i += 32) {
        const index_t row = box.row + i, row_tile = row / p.block_rows;
        if (row_tile >= p.row_tiles) break;
        const index_t before = ((box.product * p.row_tiles + row_tile) * p.chunks + chunk) * p.pairs;
        for (int j = threadIdx.x / 32; j < box_units * int(p.box_taps); j += BLOCK_SIZE / 32) {
            const int unit = j / int(p.box_taps), tap = j - unit * int(p.box_taps);
            const index_t pair = (box.tap + tap) * p.units + (unit_begin + unit - chunk * p.units);
            if (pair >= p.pairs) continue;
            const StorageVector from = shared[j * pitch + i];
            StorageVector first, second;
#pragma unroll
            for (int e = 0; e < kUnit; ++e) {
                const storage_t w = from.element[e];
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
            StorageVector* const to = packed + ((before + pair) * kParts * p.block_rows + (row - row_tile * p.block_rows));
            to[0] = first;
            if (IS_SPLIT) to[p.block_rows] = second;
        }
    }
}
