// conv_transpose1d_phases: transposed convolution of dense and grouped layers, each output phase a stride-1 convolution.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in left out.
//
// Write l_out + padding_left = q*stride + phase. The taps of a phase are k = k_first + j*tap_step, j = 0, 1, ..., and read
// l_in = q + l_shift - j*position_step: a matrix product of tiled.cuh with columns (n, q) and taps j.
//
// With dilation 1, k_first = phase and l_shift = 0 for every phase, so that one product serves them all: its rows are
// (c_out, phase), phase inner (PHASES_IN_ROWS = 1; a row has ceil((K - phase)/stride) taps). Otherwise every
// phase is a product of its own with rows c_out, and each block derives its l_shift; a phase may have no tap at all and
// then writes the bias.
//
// Grid x: blocks of BLOCK_M rows (fastest), of BLOCK_N columns, samples where COLUMN_STEP > 0, products. Grid y and z: 1.
// Dynamic shared memory: SHARED_BYTES.
// Before it pack_weight.cu packs the weights, with zeros for the taps that a phase lacks.
// Needs nothing: arrays of any strides, in elements. Chosen for at least 5 rows.

#include "common.cuh"
#include "register_tile.cuh"
#include "tiled.cuh"

struct Params {
    index_t N, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t row_tiles, column_tiles;
    index_t positions;  // of q in one sample
    index_t q_begin;    // the first of them
    index_t stride, padding_left, dilation;
    index_t phase_gcd, tap_step, position_step, phase_inverse;  // as in conv_transpose1d_gather.cu
    index_t taps;  // of the phase with the most
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    index_t weight_stride_tile;  // of the packed weights, from block to block of rows
    index_t taps_advance, input_advance, input_carry;  // see Tile in tiled.cuh
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_transpose1d_phases.py");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) conv_transpose1d_phases(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const acc_t* __restrict__ weight,      // packed: [groups (* stride), C_in_g * taps, rows], padded to whole blocks
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    const Params p) {
    // The grid is short enough for 32 bits, and so are the extents that divide it.
    const auto tile_of = [&](unsigned block) {
        const unsigned row_tile = next_index(block, p.row_tiles);
        const unsigned column_tile = next_index(block, p.column_tiles);
        const index_t n = kOneSample ? next_index(block, p.N) : 0;
        const index_t product = block;
        const unsigned phase = PHASES_IN_ROWS ? 0 : next_index(block, p.stride);
        const index_t g = block;

        // The phase of this block, if it has one: see conv_transpose1d_gather.cu.
        index_t l_shift = 0, taps = p.taps;
        if (!PHASES_IN_ROWS) {
            // Phases are blocks' indices: they, and what divides them, have 32 bits.
            const unsigned phase_gcd = unsigned(p.phase_gcd), tap_step = unsigned(p.tap_step);
            const unsigned phase_quotient = phase / phase_gcd;
            taps = 0;
            if (phase_quotient * phase_gcd == phase) {
                const index_t k_first = uindex_t(phase_quotient % tap_step) * uindex_t(p.phase_inverse) % tap_step;
                l_shift = (index_t(phase) - k_first * p.dilation) / p.stride;  // exact, perhaps negative
                if (k_first < p.K) taps = ceil_div(p.K - k_first, p.tap_step);
            }
        }

        Tile tile;
        tile.input = input;
        tile.input_begin = n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;
        tile.weight = weight + (product * p.row_tiles + row_tile) * p.weight_stride_tile;
        tile.output = output + (n * p.output_stride_n + g * p.C_out_g * p.output_stride_c);
        tile.row_begin = index_t(row_tile) * BLOCK_M;
        tile.rows = PHASES_IN_ROWS ? p.C_out_g * p.stride : p.C_out_g;
        tile.column_begin = index_t(column_tile) * BLOCK_N;
        tile.columns = kOneSample ? p.positions : p.N * p.positions;
        tile.positions = p.positions;
        tile.C_in_g = taps > 0 ? p.C_in_g : 0;
        tile.taps = p.taps;
        tile.L_in = p.L_in;
        tile.L_out = p.L_out;
        tile.column_step = 1;
        tile.first = p.q_begin + l_shift;
        tile.tap_step = PHASES_IN_ROWS ? -1 : -p.position_step;
        tile.output_step = p.stride;
        tile.output_first = p.q_begin * p.stride + index_t(phase) - p.padding_left;
        tile.input_stride_n = p.input_stride_n;
        tile.input_stride_l = kOneSample ? 1 : p.input_stride_l;
        tile.output_stride_n = p.output_stride_n;
        tile.output_stride_l = p.output_stride_l;
        tile.input_stride_c = p.input_stride_c;
        tile.taps_advance = p.taps_advance;
        tile.input_advance = p.input_advance;
        tile.input_carry = p.input_carry;
        tile.group = g;
        tile.row_taps = taps;
        tile.find_samples();
        return tile;
    };
    multiply_tile(tile_of, bias, [&](const Tile& tile, index_t row) {
        const index_t c_out = PHASES_IN_ROWS ? row / p.stride : row;
        const index_t row_phase = PHASES_IN_ROWS ? row - c_out * p.stride : 0;
        Row info;
        info.taps = PHASES_IN_ROWS ? (row_phase < p.K ? ceil_div(p.K - row_phase, p.stride) : 0) : tile.row_taps;
        info.output_offset = c_out * p.output_stride_c;
        info.shift = row_phase;
        info.bias_offset = (tile.group * p.C_out_g + c_out) * p.bias_stride;
        return info;
    });
}
