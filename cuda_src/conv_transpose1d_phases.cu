// conv_transpose1d_phases: transposed convolution of dense and grouped layers, each output phase a stride-1 convolution.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in left out.
//
// The matrix product of tiled.cuh with columns (n, q) and with rows and taps as phases.cuh says. A phase without taps writes
// the bias.
//
// Grid x: blocks of BLOCK_M rows (fastest), of BLOCK_N columns, samples where COLUMN_STEP > 0, products. Grid y and z: 1.
// Dynamic shared memory: SHARED_BYTES.
// pack_weight.cu packs the weights before it, with zeros for the taps that a phase lacks.
// Takes arrays of any strides, in elements. Chosen for at least 5 rows.

#include "common.cuh"
#include "phases.cuh"
#include "register_tile.cuh"
#include "tiled.cuh"
#include "window.cuh"

struct Params {
    index_t N, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t row_tiles, column_tiles;
    index_t positions;  // of q in one sample
    index_t q_begin;    // the first of them
    index_t stride, padding_left, dilation;
    index_t phase_gcd, tap_step, position_step, phase_inverse;  // as in one_result.cuh
    index_t taps;  // of the phase with the most
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    index_t weight_stride_tile;  // of the packed weights, from block to block of rows
    index_t taps_advance, input_advance, input_carry;  // see Tile in tiled.cuh
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_tiled.py");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) conv_transpose1d_phases(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const acc_t* __restrict__ weight,      // packed: [groups (* stride), C_in_g * taps, rows], padded to whole blocks
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
        const index_t product = block;
        const unsigned phase = PHASES_IN_ROWS ? 0 : next_index(block, p.stride);
        const index_t g = block;

        const Phase found = find_phase(phase, p);

        Tile tile = tile_with_layout(p);
        tile.input = input;
        tile.input_begin = n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;
        tile.weight = weight + (product * p.row_tiles + row_tile) * p.weight_stride_tile;
        tile.output = output + (n * p.output_stride_n + g * p.C_out_g * p.output_stride_c);
        tile.row_begin = index_t(row_tile) * BLOCK_M;
        tile.rows = PHASES_IN_ROWS ? p.C_out_g * p.stride : p.C_out_g;
        tile.column_begin = index_t(column_tile) * BLOCK_N;
        tile.columns = kOneSample ? p.positions : p.N * p.positions;
        tile.positions = p.positions;
        tile.C_in_g = found.taps > 0 ? p.C_in_g : 0;
        tile.taps = p.taps;
        tile.column_step = 1;
        tile.first = p.q_begin + found.l_shift;
        tile.tap_step = PHASES_IN_ROWS ? -1 : -p.position_step;
        tile.output_step = p.stride;
        tile.output_first = p.q_begin * p.stride + index_t(phase) - p.padding_left;
        tile.group = g;
        tile.row_taps = found.taps;
        tile.find_samples();
        return tile;
    };
    multiply_tile(tile_of, epilogue, [&](const Tile& tile, index_t row) { return phase_row(tile, row, 0, p.stride, p); });
}
