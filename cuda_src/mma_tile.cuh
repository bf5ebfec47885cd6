// What the parts of the tensor-core engine (mma.cuh) share: sizes that the macros fix, a block's share of the problem, and how
// its window lies in shared memory. Macros read: those of mma.cuh.

#pragma once

#include "common.cuh"
#include "edge.cuh"
#include "fragments.cuh"
#include "samples.cuh"

#ifndef IS_TRANSPOSED
#define IS_TRANSPOSED 0
#endif
#ifndef FOLDS_STRIDE
#define FOLDS_STRIDE 0
#endif
#ifndef CHANNELS_LAST
#define CHANNELS_LAST 0
#endif
#ifndef OUTPUT_LAST
#define OUTPUT_LAST 0
#endif

constexpr int kStagePairs = 2 * STAGE_STEPS;
constexpr int kStageTerms = kStagePairs * kUnit;
constexpr int kStageVectors = kStagePairs * kParts * BLOCK_M;           // of 16 bytes
constexpr int kStageCopies = (kStageVectors + kThreads - 1) / kThreads;  // of a thread, if its warp takes part
constexpr int kMaxUnits = 4;                                             // of a chunk
constexpr int kTaskUnits = PREFETCH;                                     // that a task of staging takes
constexpr bool kHasAllUnits = kTaskUnits >= kMaxUnits;                   // a task, of its positions
constexpr bool kCopiesUnits = CHANNELS_LAST && kUnit == 8;               // from memory to the window, as they are
constexpr int kTotals = SEGMENT_MODE == 1 ? kTilesM * kTilesN * kThreads : 0;  // of 16 bytes: four sums of a thread
constexpr index_t kMissing = index_t(1ull << (INDEX_BITS - 1));  // no offset: the smallest index_t

static_assert((NUM_STAGES & (NUM_STAGES - 1)) == 0, "slots are masked: gpuconv/families/mma_tiles.py");
static_assert(kStageVectors % (32 * kStageCopies) == 0, "warps copy equal shares: gpuconv/families/mma_tiles.py");
static_assert(kTaskUnits <= kMaxUnits, "a task is of one chunk: gpuconv/families/mma_tiles.py");
static_assert(INPUT_WIDTH == 1 || (INPUT_WIDTH == 2 && kUnit == 8 && kIsEmptyOutside),
              "pairs lie inside or outside: gpuconv/families/mma.py");
static_assert(INPUT_WIDTH == 1 || !CHANNELS_LAST, "units are of one position: gpuconv/families/mma.py");
static_assert(!OUTPUT_LAST || !PHASES_IN_ROWS, "rows are channels: gpuconv/families/mma.py");
static_assert(IS_SPLIT == 0 || kStageTerms == SPLIT_TERMS, "SPLIT_TERMS differs from gpuconv/families/arithmetic.py");
static_assert(!kHasLengths || (INPUT_WIDTH == 1 && !HAS_SAMPLES), "a block is of one sample: gpuconv/families/mma.py");

// What the k-steps of a stage add to a lane's address in the window, in bytes.
typedef Vector<int, STAGE_STEPS> StepOffsets;

// A task of staging: one position, or two, of kTaskUnits units. Task t of each set of units has the row t where INPUT_WIDTH
// is 1.
struct alignas(INPUT_WIDTH * sizeof(index_t)) Task {
    index_t offset;  // of the first position, from Tile::input, or kMissing
#if INPUT_WIDTH == 2
    index_t row;  // where the row of the first position begins in a window, in bytes
#endif
};

// What a unit of packed weights holds: kUnit channels at one tap, or (1, im2col.cuh) kUnit taps of one channel.
#ifndef TAPS_IN_UNITS
#define TAPS_IN_UNITS 0
#endif

// Whether blocks read the layer's own weights and pack them.
#ifndef RAW_WEIGHT
#define RAW_WEIGHT 0
#endif
static_assert(!RAW_WEIGHT || !CHANNELS_LAST, "see gpuconv/families/mma.py");

// The fields with which Params of all kernels on tensor cores begins.
struct MmaConvolution {
    index_t N, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t column_tiles;  // of a sample
    index_t stride, padding_left, dilation;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
};

// Those of kernels that multiply by multiply_tile: see Window.
struct WindowConvolution : MmaConvolution {
    index_t units, chunks, pairs, segments, segment_chunks, num_tiles, round_stages;
    index_t block_samples, block_positions;
    index_t planes, plane_rows, sample_rows, window_rows, unit_tasks, tasks_reciprocal;
    index_t tap_rows_first, tap_rows_step, window_shift, plane_step;
};

// One block's share. Offsets and strides are in elements.
struct Tile {
    const storage_t* input;  // input[n0, first channel of the group, 0]
    const StorageVector* weight;    // packed, of the block's rows; or the group's own where RAW_WEIGHT is 1
    storage_t* output;       // output[n0, first channel of the group, 0]
    index_t group;
    index_t row_begin, rows;  // the block's first row, and all rows that are numbered with it
    index_t first_phase, phases;  // where rows are phases: those of an output channel
    bool rows_differ;  // where rows are phases: whether some of the block have a tap less than others
    index_t samples;          // from n0 on; 1 where HAS_SAMPLES is 0
    index_t position_begin, positions;
    index_t C_in_g, L_in, L_out, K;
    index_t row_taps;                      // the taps of the block's rows
    index_t pairs;                         // of a chunk of packed weights, whole stages
    index_t column_step, first, tap_step;  // l_in = q*column_step + first + tap*tap_step
    index_t output_step, output_first;     // l_out = q*output_step + output_first + Row::shift
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t output_stride_n, output_stride_l;
};

// How the window of a block lies in shared memory, and the order of the packed weights.
struct Window {
    index_t units, chunks;                     // units of a chunk
    index_t segments, segment_chunks;
    index_t num_tiles;                         // of the launch, in one segment
    index_t round_stages;                      // stages in which a batch of the next chunk's input arrives
    index_t block_samples, block_positions;    // a block's columns are the positions of one or more samples
    index_t planes, plane_rows, sample_rows;   // rows of a plane, and of all planes of a sample or some more
    index_t window_rows;                       // of all samples of the block
    index_t unit_tasks, tasks_reciprocal;      // tasks of staging them for a set of units; 2^32 / unit_tasks, rounded up
    index_t tap_rows_first, tap_rows_step;     // a tap's first row: .. + tap / planes * .. + tap % planes * plane_rows
    index_t shift, plane_step;                 // position of q = 0, row 0 from Tile::first on; from plane to plane
    // Where FOLDS_STRIDE is 1, the positions of one stride are channels: see folded(). `fold` of them belong to a channel of
    // the input, which has fold_chunks chunks.
    index_t fold, fold_chunks;
};

// The tile of rows from row_begin on of group g and of samples from n on, but for `weight`, `pairs` and position_begin. Rows
// are output channels and columns positions of the output, as in a convolution; kernels with others change what differs.
__device__ __forceinline__ Tile tile_of_group(
    index_t g, index_t row_begin, index_t n, const storage_t* input, storage_t* output,
    const MmaConvolution& p SAMPLES_PARAMETER) {
    const Extents sample = extents_of(n, p SAMPLES_VALUE);
    Tile tile;
    tile.input = input + (n * p.input_stride_n + g * p.C_in_g * p.input_stride_c);
    tile.output = output + (n * p.output_stride_n + g * p.C_out_g * p.output_stride_c);
    tile.group = g;
    tile.row_begin = row_begin;
    tile.rows = p.C_out_g;
    tile.first_phase = 0;
    tile.phases = 1;
    tile.rows_differ = false;
    tile.samples = HAS_SAMPLES ? p.N - n : 1;
    tile.C_in_g = p.C_in_g;
    tile.L_in = sample.L_in;
    tile.L_out = tile.positions = sample.L_out;
    tile.K = tile.row_taps = p.K;
    tile.column_step = p.stride;
    tile.first = -p.padding_left;
    tile.tap_step = p.dilation;
    tile.output_step = 1;
    tile.output_first = 0;
    tile.input_stride_n = p.input_stride_n;
    tile.input_stride_c = p.input_stride_c;
    tile.input_stride_l = p.input_stride_l;
    tile.output_stride_n = p.output_stride_n;
    tile.output_stride_l = p.output_stride_l;
    return tile;
}
__device__ __forceinline__ Window window_of(const WindowConvolution& p) {
    return Window{
        p.units, p.chunks, p.segments, p.segment_chunks, p.num_tiles, p.round_stages,
        p.block_samples, p.block_positions,
        p.planes, p.plane_rows, p.sample_rows, p.window_rows, p.unit_tasks, p.tasks_reciprocal,
        p.tap_rows_first, p.tap_rows_step, p.window_shift, p.plane_step, 1, 0};
}

// Positions of a stride that lie in front of the first sample where that stride begins: see folded().
__device__ __forceinline__ index_t fold_lead(const Tile& tile, const Window& window) { return -tile.first % window.fold; }

// The tile as it is staged and multiplied where FOLDS_STRIDE is 1. Without dilation, and where the stride divides K, channel c
// at position q*stride + r - lead is also channel c*stride + r at position q: then K / stride taps read neighbouring positions,
// and the channels of a unit are neighbours in memory. Window::fold is the stride. `lead` is the padding modulo the stride, so
// that the window of every result consists of whole positions q. Some channels of a position may lie outside the input.
__device__ __forceinline__ Tile folded(Tile tile, const Window& window) {
    if (FOLDS_STRIDE) {
        tile.input -= fold_lead(tile, window) * tile.input_stride_l;
        tile.first = -(-tile.first / window.fold);
        tile.C_in_g *= window.fold;
        tile.row_taps /= window.fold;
        tile.column_step = 1;
        tile.input_stride_c = tile.input_stride_l;
        tile.input_stride_l *= window.fold;
    }
    return tile;
}

// Where a thread keeps four of its sums of a segment in `partial`: those of a warp lie side by side.
__device__ __forceinline__ index_t partial_offset(const Window& window, index_t segment, index_t tile, int i, int j) {
    return (((segment * window.num_tiles + tile) * kTilesM + i) * kTilesN + j) * kThreads + threadIdx.x;
}
