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

struct Params : WindowConvolution {
    index_t row_tiles, sample_tiles;
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

        Tile tile = tile_of_group(g, row_tile * BLOCK_M, n, input, output, p SAMPLES_VALUE);
        tile.weight = weight + (RAW_WEIGHT
            ? g * p.C_out_g * (p.C_in_g * p.K / kUnit)
            : (g * p.row_tiles + row_tile) * (p.chunks * p.pairs * (kParts * BLOCK_M)));
        tile.pairs = p.pairs;
        tile.position_begin = column_tile * p.block_positions;
        return tile;
    };
    Window window = window_of(p);
    window.fold = p.fold;
    window.fold_chunks = p.fold_chunks;
    run_block(
        tile_of, window, epilogue, [&](const Tile& tile, index_t row) { return channel_row(tile, row, p); }, partial);
}
