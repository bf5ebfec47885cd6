// conv_transpose1d_mma: transposed convolution of dense and grouped layers on tensor cores, phase by phase.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in left out.
//
// The product of mma.cuh with columns (n, q) and with rows and taps as phases.cuh says. Where phases are rows, those that lack
// the last tap may have blocks of their own, which saves products with zeros but stores results apart. The bits are the same.
// Grid x: blocks of BLOCK_M rows (fastest), of block_positions positions, of block_samples samples, products, and
// segments where SEGMENT_MODE is 2. Grid y and z: 1. Dynamic shared memory: see mma.cuh.
// Before it pack_mma_weight.cu packs the weights, with zeros for the taps that a phase lacks; or the blocks do, where
// RAW_WEIGHT is 1 (raw_weights.cuh).
// Needs float16, bfloat16 (sm_80) or float32 (sm_80) arrays of any strides, in elements. Chosen for at least 8 input
// channels and 8 output channels (times stride where dilation is 1) a group; see gpuconv/families/mma.py.

#define IS_TRANSPOSED 1

#include "common.cuh"
#include "mma.cuh"
#include "phases.cuh"
#include "window.cuh"

struct Params : WindowConvolution {
    index_t row_tiles, sample_tiles;
    index_t positions;  // of q in one sample
    index_t q_begin;    // the first of them
    index_t phase_gcd, tap_step, position_step, phase_inverse;  // as in one_result.cuh
    index_t taps;                                               // of the phase with the most
    // Where phases are rows: the first full_phases have all taps, or share blocks with others; they have full_row_tiles blocks
    // of rows.
    index_t full_phases, full_row_tiles, short_pairs;
    index_t product_pairs;  // of packed weights, in all blocks of rows of a product
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_mma.py");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) conv_transpose1d_mma(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const StorageVector* __restrict__ weight,    // packed: see pack_mma_weight.cu; or [C_in, C_out_g, K]
    const storage_t* __restrict__ bias,   // [C_out], or null
    storage_t* __restrict__ output,       // [N, C_out, L_out]
#if SEGMENT_MODE >= 2
    AccVector* __restrict__ partial,      // sums of segments: see mma.cuh
#endif
    SAMPLES_ARGUMENT FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
#if SEGMENT_MODE < 2
    AccVector* const partial = nullptr;
#endif
    const auto tile_of = [&](unsigned block) {
        const index_t row_tile = next_index(block, p.row_tiles);
        const index_t column_tile = next_index(block, p.column_tiles);
        const index_t n = index_t(next_index(block, p.sample_tiles)) * p.block_samples;
        const index_t product = block;
        const index_t g = PHASES_IN_ROWS ? product : product / p.stride;
        const index_t phase = PHASES_IN_ROWS ? 0 : product - g * p.stride;

        const Phase found = find_phase(unsigned(phase), p);
        const bool is_short = PHASES_IN_ROWS && row_tile >= p.full_row_tiles;
        const index_t tiles_before = is_short ? p.full_row_tiles : 0;

        Tile tile = tile_of_group(g, (row_tile - tiles_before) * BLOCK_M, n, input, output, p SAMPLES_VALUE);
        tile.pairs = is_short ? p.short_pairs : p.pairs;
        tile.weight = weight + (RAW_WEIGHT
            ? g * p.C_in_g * (p.C_out_g * p.K / kUnit)
            : (product * p.product_pairs + p.chunks * (tiles_before * p.pairs + (row_tile - tiles_before) * tile.pairs)) *
                (kParts * BLOCK_M));
        if (PHASES_IN_ROWS) {
            tile.first_phase = is_short ? p.full_phases : 0;
            tile.phases = is_short ? p.stride - p.full_phases : p.full_phases;
            tile.rows *= tile.phases;
            // Phases without any tap are no matter: their sums are zeros in any order.
            tile.rows_differ = p.full_phases == p.stride && p.taps > 1 && p.K != p.taps * p.stride;
        }
        tile.position_begin = column_tile * p.block_positions;
        tile.positions = p.positions;
        if (kHasLengths) {
            tile.positions = tile.L_out > 0 ? (tile.L_out - 1 + p.padding_left) / p.stride - p.q_begin + 1 : 0;
        }
        tile.row_taps = found.taps - is_short;
        tile.column_step = 1;
        tile.first = p.q_begin + found.l_shift;
        tile.tap_step = -p.position_step;
        tile.output_step = p.stride;
        tile.output_first = p.q_begin * p.stride + phase - p.padding_left;
        return tile;
    };
    run_block(
        tile_of, window_of(p), epilogue,
        [&](const Tile& tile, index_t row) { return phase_row(tile, row, tile.first_phase, tile.phases, p); }, partial);
}
