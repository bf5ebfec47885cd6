// conv1d_tiled: forward convolution of dense and grouped layers, register tiles over (c_out, n and l_out flattened).
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// The matrix product of tiled.cuh with rows = c_out of the group, taps = k, columns = (n, l_out).
// Grid x: blocks of BLOCK_M output channels (fastest, so that blocks with the same window run together), then of
// BLOCK_N columns, then samples where COLUMN_STEP > 0, then groups. Grid y and z: 1. Dynamic shared memory:
// SHARED_BYTES.
// pack_weight.cu packs the weights before it.
// Takes arrays of any strides, in elements. Chosen for at least 5 output channels a group.

#include "common.cuh"
#include "register_tile.cuh"
#include "tiled.cuh"
#include "window.cuh"

struct Params {
    index_t N, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t row_tiles, column_tiles;
    index_t stride, padding_left, dilation;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    index_t weight_stride_tile;  // of the packed weights, from block to block of rows
    index_t taps_advance, input_advance, input_carry;  // see Tile in tiled.cuh
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_tiled.py");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) conv1d_tiled(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const acc_t* __restrict__ weight,      // packed: [groups, C_in_g * K, C_out_g], padded to whole blocks
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    // The grid and the extents that divide it fit in 32 bits.
    const auto tile_of = [&](unsigned block) {
        const unsigned row_tile = next_index(block, p.row_tiles);
        const unsigned column_tile = next_index(block, p.column_tiles);
        const index_t n = kOneSample ? next_index(block, p.N) : 0;
        const index_t g = block;

        Tile tile = tile_with_layout(p);
        tile.input = input;
        tile.input_begin = n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;
        tile.weight = weight + (g * p.row_tiles + row_tile) * p.weight_stride_tile;
        tile.output = output + (n * p.output_stride_n + g * p.C_out_g * p.output_stride_c);
        tile.row_begin = index_t(row_tile) * BLOCK_M;
        tile.rows = p.C_out_g;
        tile.column_begin = index_t(column_tile) * BLOCK_N;
        tile.columns = kOneSample ? p.L_out : p.N * p.L_out;
        tile.positions = p.L_out;
        tile.taps = tile.row_taps = p.K;
        tile.column_step = kOneSample ? COLUMN_STEP : p.stride;
        tile.first = -p.padding_left;
        tile.tap_step = p.dilation;
        tile.output_step = 1;
        tile.output_first = 0;
        tile.group = g;
        tile.find_samples();
        return tile;
    };
    multiply_tile(tile_of, epilogue, [&](const Tile& tile, index_t row) { return channel_row(tile, row, p); });
}
