// conv1d_mma: forward convolution of dense and grouped layers on tensor cores.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// The product of mma.cuh with rows = c_out of the group, taps = k, columns = (n, l_out).
// Grid x: blocks of BLOCK_M output channels (fastest, so that blocks which read one window run together), then of
// block_positions positions, then of block_samples samples, then groups, then segments
// where SEGMENT_MODE is 2. Grid y and z: 1. Dynamic shared memory: see mma.cuh.
// Before it pack_mma_weight.cu packs the weights, or pack_im2col_weight.cu where positions are channels (FOLDS_STRIDE = 1); or
// the blocks do, where RAW_WEIGHT is 1 (raw_weights.cuh).
// Needs float16, bfloat16 (sm_80) or float32 (sm_80) arrays of any strides, in elements. Chosen for at least 8 input and
// output channels a group; see gpuconv/families/mma.py.

#include "common.cuh"
#include "mma.cuh"
#include "window.cuh"

struct Params {
    index_t N, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t row_tiles, column_tiles, sample_tiles;
    index_t stride, padding_left, dilation;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    // See Window in mma_tile.cuh.
    index_t units, chunks, pairs, segments, segment_chunks, num_tiles, round_stages;
    index_t block_samples, block_positions;
    index_t planes, plane_rows, sample_rows, window_rows, unit_tasks, tasks_reciprocal;
    index_t tap_rows_first, tap_rows_step, window_shift, plane_step;
    index_t fold, fold_chunks;
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_mma.py");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) conv1d_mma(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const StorageVector* __restrict__ weight,    // packed: see pack_mma_weight.cu; or [C_out, C_in_g, K]
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
        const index_t g = block;

        Tile tile = tile_with_layout(p);
        tile.input = input + (n * p.input_stride_n + g * p.C_in_g * p.input_stride_c);
        tile.weight = weight + (RAW_WEIGHT
            ? g * p.C_out_g * (p.C_in_g * p.K / kUnit)
            : (g * p.row_tiles + row_tile) * (p.chunks * p.pairs * (kParts * BLOCK_M)));
        tile.output = output + (n * p.output_stride_n + g * p.C_out_g * p.output_stride_c);
        tile.group = g;
        tile.row_begin = row_tile * BLOCK_M;
        tile.rows = p.C_out_g;
        tile.samples = p.N - n;
        tile.position_begin = column_tile * p.block_positions;
        tile.positions = p.L_out;
        tile.row_taps = p.K;
        tile.column_step = p.stride;
        tile.first = -p.padding_left;
        tile.tap_step = p.dilation;
        tile.output_step = 1;
        tile.output_first = 0;
        if (kHasLengths) {
            const Extents sample = extents_of(n, p SAMPLES_VALUE);
            tile.L_in = sample.L_in;
            tile.L_out = tile.positions = sample.L_out;
        }
        return tile;
    };
    Window window = window_of(p);
    window.fold = p.fold;
    window.fold_chunks = p.fold_chunks;
    run_block(
        tile_of, window, epilogue, [&](const Tile& tile, index_t row) { return channel_row(tile, row, p); }, partial);
}
