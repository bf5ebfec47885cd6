// The tensor-core engine behind conv1d_mma and conv_transpose1d_mma.
//
// Per group, both operations are a product of a weight matrix [rows, R] and an input matrix [R, columns] that is never
// formed; a column is a position q of a sample n, and the term (c_in, tap) of column (n, q) is
// input[n, c_in, q*column_step + first + tap*tap_step]. A block computes BLOCK_M rows by BLOCK_N columns.
//
// Channels are taken in chunks of `units` units of kUnit channels, 16 bytes each. The window of input that the taps of a
// block's columns read is staged once per chunk in shared memory, transposed: window[unit][row], one row of 16 bytes for
// each position. Every tap reads that window at an address of its own, always aligned, whatever padding and dilation
// are: so one binary serves all layers. The window consists of planes: row j of plane v holds position
// (q0 + j)*column_step + first + shift + v*plane_step, so that neighbouring columns always read neighbouring rows, whatever the
// stride, and ldmatrix meets no bank conflict; see Window in gpuconv/families/mma_window.py.
//
// The reduction runs over chunks, in a chunk over pairs (tap, unit) with the unit inner, two pairs per mma (a k-step). The
// packed weights (pack_mma_weight.cu) have that order; pairs that only fill up the last stage have zero weights. The
// order depends on the layer alone, so the bits of a result do not depend on the tile, the batch or the position.
//
// IS_SPLIT = 1 is float32 by TF32 products: with x = x_hi + x_lo and w = w_hi + w_lo, each part a TF32 number, a product is
// w_hi*x_hi + (w_hi*x_lo + w_lo*x_hi). The small products have sums of their own; the sum of the large ones is added to a
// total in float32, rounded to nearest, after every stage of kStageTerms terms. gpuconv/families/arithmetic.py derives why
// that keeps the error bound, beside the rule that gives a layer this arithmetic.
//
// A long reduction is cut into segments of segment_chunks chunks, by a rule on the layer alone. Each is summed for itself and
// the sums are added in order: SEGMENT_MODE = 1 does both in one block, which keeps the totals in shared memory, since its
// registers have no room for them beside wide warp tiles; where blocks are too few to fill the GPU,
// SEGMENT_MODE = 2 computes the segments in blocks of their own and leaves their sums in `partial`, and a second launch with
// SEGMENT_MODE = 3 adds them and stores the results. The bits are the same. SEGMENT_MODE = 0: there is one segment.
//
// Values that cannot be split without loss (infinities, NaN, values so small or so large that a part would underflow or
// overflow) get a NaN for x_hi or w_hi. Sums that are not finite, of any arithmetic, are formed again by canonical_sum. So
// these results follow IEEE arithmetic. Whether a result is summed again depends on its own terms alone, or, where the rows
// of a block differ in their taps, also on the positions that other rows of its column read.
//
// INPUT_WIDTH = 2 is for 16-bit input whose positions are contiguous in rows of even length that begin at multiples of 4
// bytes. A thread then loads two positions of a channel at once, which begin at an even one: see Window in
// gpuconv/families/mma_window.py.
//
// CHANNELS_LAST = 1 is for input whose channels are contiguous, in groups of whole units, each unit aligned to 16 bytes: a
// unit of one position is then 16 bytes of memory. Four neighbouring threads take the units of a row, which are neighbours in
// memory. Units of 16-bit elements go to shared memory by cp.async, those of 32 bits through registers, since they are rounded
// or split.
//
// OUTPUT_LAST = 1 is for output of that kind, where rows are channels: it is stored in units.
//
// RAW_WEIGHT = 1 is for weights that no launch before has packed: see raw_weights.cuh.
//
// Macros read: BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, NUM_STAGES, STAGE_STEPS, PREFETCH, INPUT_WIDTH, CHANNELS_LAST, OUTPUT_LAST
// and RAW_WEIGHT (0 by default), HAS_SAMPLES, IS_SPLIT, SPLIT_TERMS, SEGMENT_MODE, PHASES_IN_ROWS, MULTIPLY_MATRICES, and
// those of common.cuh. Dynamic shared memory: NUM_STAGES stages of weights (or those of raw_weights.cuh), the windows of two
// chunks (of one, where there is one chunk), and tables, where SEGMENT_MODE is 1 behind the totals; or the slices through
// which the results pass.

#pragma once

#include "canonical_sum.cuh"
#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "fragments.cuh"
#include "row.cuh"
#include "samples.cuh"
#include "staging.cuh"

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
constexpr int kTaskUnits = PREFETCH / INPUT_WIDTH;                       // that a task of staging takes
constexpr bool kCopiesUnits = CHANNELS_LAST && kUnit == 8;               // from memory to the window, as they are
constexpr int kSliceTiles = kTilesM % 2 == 0 ? 2 : 1;  // of a warp that pass through shared memory at a time in the end
constexpr int kSliceRows = 16 * kSliceTiles;
constexpr int kSlicePitch = kWarpN + 8;  // keeps the lanes of a fragment on different banks; rows may begin up to 8 later
// Elements by which the rows of each further unit of channels begin later, where OUTPUT_LAST: so lanes that read neighbouring
// units of one position meet on different banks.
constexpr int kSliceSkew = !OUTPUT_LAST ? 0 : kUnit == 8 ? 16 : 4;
constexpr int kLaneVectors = kWarpN / kUnit > 8 ? 2 : 1;  // of a row, that one lane stores in the end
__device__ constexpr int log2_of(int n) { return n < 2 ? 0 : 1 + log2_of(n / 2); }
constexpr int kTotals = SEGMENT_MODE == 1 ? kTilesM * kTilesN * kThreads : 0;  // of 16 bytes: four sums of a thread
constexpr index_t kMissing = index_t(1ull << (INDEX_BITS - 1));  // no offset: the smallest index_t

static_assert((NUM_STAGES & (NUM_STAGES - 1)) == 0, "slots are masked: gpuconv/families/mma_tiles.py");
static_assert(kStageVectors % (32 * kStageCopies) == 0, "warps copy equal shares: gpuconv/families/mma_tiles.py");
static_assert(PREFETCH % INPUT_WIDTH == 0, "tasks are of whole units: gpuconv/families/mma_tiles.py");
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
    index_t row;  // of the first position
#endif
};

// What a unit of packed weights holds: kUnit channels at one tap, or (1, conv1d_im2col.cu) kUnit taps of one channel.
#ifndef TAPS_IN_UNITS
#define TAPS_IN_UNITS 0
#endif

// Whether blocks read the layer's own weights and pack them.
#ifndef RAW_WEIGHT
#define RAW_WEIGHT 0
#endif
static_assert(!RAW_WEIGHT || !CHANNELS_LAST, "see gpuconv/families/mma.py");

// One block's share. Offsets and strides are in elements.
struct Tile {
    const storage_t* input;  // input[n0, first channel of the group, 0]
    const StorageVector* weight;    // packed, of the block's rows; or the group's own where RAW_WEIGHT is 1
    storage_t* output;       // output[n0, first channel of the group, 0]
    index_t group;
    index_t row_begin, rows;  // the block's first row, and the rows of the product
    index_t samples;          // from n0 on
    index_t position_begin, positions;
    index_t C_in_g, L_in, L_out, K;
    index_t row_taps;                      // the taps of the block's rows: of those with the most, where rows differ
    index_t column_step, first, tap_step;  // l_in = q*column_step + first + tap*tap_step
    index_t output_step, output_first;     // l_out = q*output_step + output_first + Row::shift
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t output_stride_n, output_stride_l;
};

// How the window of a block lies in shared memory, and the order of the packed weights.
struct Window {
    index_t units, chunks, pairs;              // units of a chunk; pairs of a chunk, whole stages
    index_t segments, segment_chunks;
    index_t num_tiles;                         // of the launch, in one segment
    index_t round_stages;                      // stages in which a batch of the next chunk's input arrives
    index_t block_samples, block_positions;    // a block's columns are the positions of one or more samples
    index_t planes, plane_rows, sample_rows;   // rows of a plane, and of all planes of a sample or some more
    index_t window_rows;                       // of all samples of the block
    index_t unit_tasks, tasks_reciprocal;      // tasks of staging them for a set of units; 2^32 / unit_tasks, rounded up
    index_t tap_rows_first, tap_rows_step;     // a tap's first row: .. + tap / planes * .. + tap % planes * plane_rows
    index_t shift, plane_step;                 // position of q = 0, row 0 from Tile::first on; from plane to plane
};

// What Params of all kernels have in common, in Tile and Window.
template <typename P>
__device__ __forceinline__ Tile tile_with_layout(const P& p) {
    Tile tile;
    tile.C_in_g = p.C_in_g;
    tile.L_in = p.L_in;
    tile.L_out = p.L_out;
    tile.K = p.K;
    tile.input_stride_n = p.input_stride_n;
    tile.input_stride_c = p.input_stride_c;
    tile.input_stride_l = p.input_stride_l;
    tile.output_stride_n = p.output_stride_n;
    tile.output_stride_l = p.output_stride_l;
    return tile;
}
template <typename P>
__device__ __forceinline__ Window window_of(const P& p) {
    return Window{
        p.units, p.chunks, p.pairs, p.segments, p.segment_chunks, p.num_tiles, p.round_stages,
        p.block_samples, p.block_positions,
        p.planes, p.plane_rows, p.sample_rows, p.window_rows, p.unit_tasks, p.tasks_reciprocal,
        p.tap_rows_first, p.tap_rows_step, p.window_shift, p.plane_step};
}

// Where a thread keeps four of its sums of a segment in `partial`: those of a warp lie side by side.
__device__ __forceinline__ index_t partial_offset(const Window& window, index_t segment, index_t tile, int i, int j) {
    return (((segment * window.num_tiles + tile) * kTilesM + i) * kTilesN + j) * kThreads + threadIdx.x;
}

// A thread's share of a stage of weights, from copy kFirst on. A warp copies neighbouring vectors, so that one pair of
// addresses serves all of them by the small offsets that the instruction has: `from` points into the middle.
template <int kFirst = 0, bool kEnd = (kFirst == kStageCopies)>
struct StageCopy {
    static __device__ __forceinline__ void run(StorageVector* to, const StorageVector* from) {
        copy_async_at<kFirst * 32, (kFirst - kStageCopies / 2) * 32>(to, from);
        StageCopy<kFirst + 1>::run(to, from);
    }
};
template <int kFirst>
struct StageCopy<kFirst, true> {
    static __device__ __forceinline__ void run(StorageVector*, const StorageVector*) {}
};

// The weights of a block go round a ring of NUM_STAGES stages in shared memory: stage i is read from slot i % NUM_STAGES while
// stage i + NUM_STAGES - 1 is written, to the slot that was read last. This is a thread's part in copying them.
struct WeightRing {
    int copies_end;               // from this stage on no copies are left
    const StorageVector* weight;  // of the stage that is copied next
    StorageVector* to;            // in slot 0

    // Copies the first of `count` stages from `first` on.
    __device__ __forceinline__ WeightRing(const StorageVector* first, StorageVector* stages, int count) {
        const int first_copy = threadIdx.x / 32 * (32 * kStageCopies), lane = threadIdx.x % 32;
        copies_end = first_copy < kStageVectors ? count - (NUM_STAGES - 1) : -NUM_STAGES;
        weight = keep_in_register(first + (first_copy + lane + kStageCopies / 2 * 32));
        to = keep_in_register(stages + (first_copy + lane));
#pragma unroll
        for (int i = 0; i < NUM_STAGES - 1; ++i) load(i, i - (NUM_STAGES - 1));
    }
    // While `stage` is multiplied, copies the one NUM_STAGES - 1 behind it.
    __device__ __forceinline__ void load(int slot, int stage) {
        if (stage < copies_end) StageCopy<>::run(to + slot * kStageVectors, weight);
        weight += kStageVectors;
        copy_async_commit();
    }
};

// This lane's rows of a stage of weights: ldmatrix takes one address from each lane.
__device__ __forceinline__ const StorageVector* weight_rows(const StorageVector* stages) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return keep_in_register(stages + (lane / 16) * kParts * BLOCK_M + warp / WARPS_N * kWarpM + lane % 16);
}

// Writes where the rows of a pair begin in a window. A lane reads the pairs of its half of every k-step: those of a stage lie
// side by side.
__device__ __forceinline__ void set_pair_row(int* pair_offset, index_t pair, index_t row) {
    const index_t in_stage = pair % kStagePairs;
    pair_offset[pair - in_stage + in_stage % 2 * STAGE_STEPS + in_stage / 2] = int(row) * 16;
}

// Adds the products of a stage. `w` and `x` are this lane's rows of the weights and of the window: fragments 2*j and 2*j + 1
// of columns lie column_offset(j) bytes behind x, and the second part of the window part_rows behind the first.
template <typename ColumnOffset>
__device__ __forceinline__ void multiply_stage(
    const StorageVector* w, const unsigned char* x, const StepOffsets& pairs, const ColumnOffset& column_offset,
    int part_rows, Sums& acc, Sums& low, Sums& total) {
#pragma unroll
    for (int step = 0; step < STAGE_STEPS; ++step) {
        const unsigned char* const x_pair = x + pairs.element[step];
        unsigned a[kParts][kTilesM][4], b[kParts][kTilesN][2];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int i = 0; i < kTilesM; ++i) {
                load_matrix_x4(a[part][i], w + (2 * step * kParts + part) * BLOCK_M + i * 16);
            }
#pragma unroll
            for (int j = 0; j < kTilesN / 2; ++j) {
                unsigned both[4];
                load_matrix_x4(both, x_pair + (column_offset(j) + part * part_rows * 16));
                b[part][2 * j][0] = both[0];
                b[part][2 * j][1] = both[1];
                b[part][2 * j + 1][0] = both[2];
                b[part][2 * j + 1][1] = both[3];
            }
        }
        multiply_fragments(a, b, acc, low);
    }
    if (IS_SPLIT) add_large_products(total, acc);
}

// The packed weights of one row, for canonical_sum.
struct PackedWeights : EveryWeight {
    const StorageVector* weight;         // of the row's first pair
    index_t units, pairs;                // of a chunk
    index_t taps;                        // of the row
    index_t chunk_pair = 0, unit = 0;    // of the channel: the chunk's first pair, and the unit in it
    int e = 0;                           // of the channel, in its unit

    __device__ __forceinline__ PackedWeights(const Tile& tile, const Window& window, index_t row)
        : weight(tile.weight + (row - tile.row_begin)), units(window.units), pairs(window.pairs), taps(tile.row_taps) {}
    __device__ __forceinline__ acc_t load(index_t c_in, index_t tap) const {
        if (!TAPS_IN_UNITS) return weight_of(chunk_pair + tap * units + unit, e);
        const index_t begin = tap / kUnit * kUnit;  // a last unit that is not whole holds the last kUnit taps
        return weight_of(begin / kUnit * units + c_in, int(tap - min_index(begin, taps - kUnit)));
    }
    __device__ __forceinline__ acc_t weight_of(index_t pair, int element) const {
        const StorageVector* const packed = weight + pair * (kParts * BLOCK_M);
        const acc_t w = scalar::load(packed->element[element]);
        if (!IS_SPLIT) return w;
        const acc_t low = scalar::load(packed[BLOCK_M].element[element]);
        return is_nan(w) ? low : w + low;  // where w_hi is a NaN, w_lo holds the weight itself
    }
    __device__ __forceinline__ void next_channel() {
        if (++e < kUnit) return;
        e = 0;
        if (++unit < units) return;
        unit = 0;
        chunk_pair += pairs;
    }
};

#if RAW_WEIGHT
#include "raw_weights.cuh"
#else
typedef PackedWeights TileWeights;
#endif

// The results of a warp pass through shared memory, kSliceRows rows at a time, and are stored 16 bytes at a time where they
// are neighbours in the output.

// A row of a slice: its bias, where column 0 lies among the slice's elements, and the distance to the next column. The rows
// of a channel, its phases, are interleaved as they are in the output.
struct alignas(16) SliceRow {
    acc_t bias;
    int place, step;
};
// The whole vectors that the lanes of a row copy from the slice to the output, and the elements in front of and behind them.
struct alignas(16) Piece {
    index_t to;  // elements, from Tile::output
    int from;    // bytes, in the slice
    int vectors;
    int ends;  // head, and the rest behind the vectors in the upper half
};
static_assert(sizeof(SliceRow) + sizeof(Piece) <= 48, "SLICE_TABLE_BYTES differs from gpuconv/families/mma_tiles.py");
struct Slice {
    storage_t element[kSliceRows * kSlicePitch + (kSliceRows / kUnit - 1) * kSliceSkew];
    SliceRow row[kSliceRows];
#if !OUTPUT_LAST
    Piece piece[kSliceRows];
#endif
};

// Where the result of a row in a column of the block belongs in the output; null where there is no such result. It is asked
// for the residual alone.
__device__ __forceinline__ const storage_t* place_of(const Tile& tile, const Window& window, const Row& row, index_t column) {
    const index_t sample = HAS_SAMPLES ? column / window.block_positions : 0;
    const index_t q = tile.position_begin + (column - sample * window.block_positions);
    const index_t l = q * tile.output_step + tile.output_first + row.shift;
    const bool exists = sample < (HAS_SAMPLES ? min_index(window.block_samples, tile.samples) : 1) &&
                        q < tile.positions && is_index(l, tile.L_out);
    if (!exists) return nullptr;
    return tile.output + (row.output_offset + sample * tile.output_stride_n + l * tile.output_stride_l);
}

// What lane i of a warp knows of row i % kSliceRows of its slice.
struct MyRow {
    Row info;
    int first, count;  // the rows of the slice that belong to its channel
    int start, place;  // of the channel, and of the row, among the slice's elements
    bool exists;
};

// Elements of a vector that lie in front of output[offset], a vector being aligned to its own size.
__device__ __forceinline__ int elements_before(const storage_t* output, index_t offset) {
    const unsigned address = unsigned(reinterpret_cast<unsigned long long>(output) / sizeof(storage_t));
    return int((address + unsigned(offset)) % kUnit);
}

template <typename RowOf>
__device__ __forceinline__ MyRow my_row(
    const Tile& tile, const RowOf& row_of, index_t row_begin, index_t column_begin) {
    const int row = threadIdx.x % kSliceRows;
    MyRow mine;
    mine.exists = row_begin + row < tile.rows;
    mine.info = row_of(tile, row_begin + row);
    mine.first = row;
    mine.count = 1;
    if (PHASES_IN_ROWS) {
        const index_t channel = row - mine.info.shift;  // its first row, perhaps in front of the slice
        mine.first = int(max_index(channel, 0));
        mine.count = int(min_index(channel + tile.output_step, kSliceRows)) - mine.first;
    }
    mine.start = mine.first * kSlicePitch + mine.first / kUnit * kSliceSkew;
    if (!HAS_SAMPLES && !OUTPUT_LAST) {
        // As far behind a multiple of 16 bytes as in the output, but an even number of elements: lanes store two at once.
        const index_t l = (tile.position_begin + column_begin) * tile.output_step + tile.output_first;
        mine.start += (elements_before(tile.output, mine.info.output_offset + l) + 1) & ~1;
    }
    mine.place = mine.start + (row - mine.first);
    return mine;
}

// The NaN fallback: results that finish_or_nan marked are summed again, by lanes that lie side by side in a row.
template <typename RowOf>
__device__ __forceinline__ void sum_marked_again(
    const Tile& tile, const Window& window, const Epilogue& epilogue, const RowOf& row_of, Slice* slice, index_t row_begin,
    index_t column_begin) {
#pragma unroll 1
    for (int e = threadIdx.x % 32; e < kSliceRows * kWarpN; e += 32) {
        const int row = e / kWarpN;
        const index_t column = column_begin + e % kWarpN;
        const SliceRow at = slice->row[row];
        storage_t* const value = slice->element + (at.place + e % kWarpN * at.step);
        if (row_begin + row >= tile.rows || !is_nan(scalar::load(*value))) continue;
        const index_t sample = HAS_SAMPLES ? column / window.block_positions : 0;
        const index_t q = tile.position_begin + (column - sample * window.block_positions);
        if (sample >= window.block_samples || sample >= tile.samples || q >= tile.positions) continue;
        const Row info = row_of(tile, row_begin + row);
        const acc_t sum = canonical_sum(
            tile.input + sample * tile.input_stride_n, q * tile.column_step + tile.first, tile.tap_step, info.taps, tile,
            TileWeights(tile, window, row_begin + row));
        // The compiler must not make two loops of this one, with and without bias.
        Epilogue kept = epilogue;
        kept.bias = keep_in_register(kept.bias);
        const storage_t* const place = kHasResidual ? place_of(tile, window, info, column) : nullptr;
        *value = finish(sum, kept.channel(info.channel), place);
    }
    __syncwarp();
}

#if OUTPUT_LAST
// Stores a slice in units of channels. A lane takes one unit of one position, its neighbours the next units.
__device__ __forceinline__ void store_slice(
    const Tile& tile, const Window& window, const MyRow&, const Slice* slice, index_t row_begin, index_t column_begin) {
    constexpr int kUnits = kSliceRows / kUnit, kPositions = 32 / kUnits;  // of a pass
    const int lane = threadIdx.x % 32;
    // 16-bit elements are read as matrices of eight channels by eight positions, transposed: a lane has two of the channels of
    // each matrix, so matrix m consists of the m-th two channels of four units, or of two units at twice the positions.
    const int unit = kUnit == 8 ? lane % 4 % kUnits : lane % kUnits;
    const int position = kUnit == 8 ? lane / 4 + lane % 4 / kUnits * 8 : lane / kUnits;
    const int two = lane % 8 / 2;
    const int row = kUnit == 8 ? two % kUnits * 8 + lane / 8 * 2 + lane % 2 : unit * kUnit;
    const storage_t* from = slice->element + (row * kSlicePitch + row / kUnit * kSliceSkew +
        (kUnit == 8 ? two / kUnits * 8 : position));
    const bool exists = row_begin + unit * kUnit < tile.rows;
    storage_t* const to = tile.output + (row_begin + unit * kUnit);
#pragma unroll(HAS_SAMPLES ? 1 : 4)
    for (int begin = 0; begin < kWarpN; begin += kPositions) {
        Vector<unsigned> vector;
        if (kUnit == 8) {
            load_matrix_x4_transposed(vector.element, from + begin);
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                vector.element[e] = reinterpret_cast<const unsigned*>(from)[begin + e * kSlicePitch];
            }
        }
        const index_t column = column_begin + begin + position;
        const index_t sample = HAS_SAMPLES ? column / window.block_positions : 0;
        const index_t q = tile.position_begin + (column - sample * window.block_positions);
        const index_t l = q * tile.output_step + tile.output_first;
        const bool is_stored = exists && sample < (HAS_SAMPLES ? min_index(window.block_samples, tile.samples) : 1) &&
                               q < tile.positions && is_index(l, tile.L_out);
        if (is_stored) {
            *reinterpret_cast<Vector<unsigned>*>(to + (sample * tile.output_stride_n + l * tile.output_stride_l)) = vector;
        }
    }
}
#else
// kUnit elements of a slice, from any byte on at which one begins.
__device__ __forceinline__ Vector<unsigned> load_slice(const Slice* slice, int byte) {
    const unsigned* const words =
        reinterpret_cast<const unsigned*>(reinterpret_cast<const unsigned char*>(slice->element) + (byte & ~3));
    Vector<unsigned> from;
    if ((!HAS_SAMPLES && sizeof(storage_t) == 2) || (byte & 12) == 0) {
        from = *reinterpret_cast<const Vector<unsigned>*>(words);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) from.element[i] = words[i];
    }
    if (sizeof(storage_t) == 4) return from;
    Vector<unsigned> vector;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        vector.element[i] = funnel_shift_right(from.element[i], i < 3 ? from.element[i + 1] : words[4], 8 * byte);
    }
    return vector;
}

// Stores columns begin to end - 1 of a slice, which are positions q and what follows of one sample: of those rows whose
// lanes say that their channel's results are neighbours in the output. 1 << lane_bits lanes take a row.
__device__ __forceinline__ void store_neighbours(
    const Tile& tile, const MyRow& mine, bool is_stored, Slice* slice, int begin, int end, index_t sample, index_t q,
    int lane_bits) {
    const int lane = threadIdx.x % 32;
    // The channel's piece of the output, from `first` on the part of it that exists.
    const index_t l = q * tile.output_step + tile.output_first;
    const int length = is_stored ? (end - begin) * mine.count : 0;
    const int first = int(min_index(max_index(-l, 0), length));
    const int elements = int(max_index(min_index(tile.L_out - l, length) - first, 0));
    const index_t offset = mine.info.output_offset + sample * tile.output_stride_n + (l + first);
    const int head = int(min_index(-elements_before(tile.output, offset) & (kUnit - 1), elements));
    const unsigned behind = unsigned(elements - head);
    // The rows of a channel share its vectors; the first one has what lies around them, too.
    const int row_of_channel = lane % kSliceRows - mine.first, vectors_before = row_of_channel * (kLaneVectors << lane_bits);
    const bool has_ends = row_of_channel == 0;
    const bool has_rest = any_lane(has_ends && (head != 0 || behind % kUnit != 0));
    if (kSliceRows == 32 || lane < kSliceRows) {
        Piece piece;
        piece.to = offset + head + vectors_before * kUnit;
        piece.from = (mine.start + begin * mine.count + first + head) * int(sizeof(storage_t)) + vectors_before * 16;
        piece.vectors = int(behind / kUnit) - vectors_before;
        piece.ends = has_ends ? head | int(behind % kUnit) << 16 : 0;
        slice->piece[lane] = piece;
    }
    __syncwarp();

    const int part = lane & ((1 << lane_bits) - 1);
#pragma unroll(HAS_SAMPLES ? 1 : 4 / kLaneVectors)
    for (int row = lane >> lane_bits; row < kSliceRows; row += 32 >> lane_bits) {
        const Piece piece = slice->piece[row];
#pragma unroll
        for (int i = 0; i < kLaneVectors; ++i) {
            const int vector = part + (i << lane_bits);
            if (vector >= piece.vectors) continue;
            *reinterpret_cast<Vector<unsigned>*>(tile.output + (piece.to + vector * kUnit)) =
                load_slice(slice, piece.from + vector * 16);
        }
    }
    if (!has_rest) return;
#pragma unroll 1
    for (int row = lane / kUnit; row < kSliceRows; row += 32 / kUnit) {
        const Piece piece = slice->piece[row];
        const int head = piece.ends & 0xffff, ends = head + (piece.ends >> 16);
#pragma unroll 1
        for (int e = lane % kUnit; e < ends; e += kUnit) {
            const int i = (e < head ? 0 : piece.vectors * kUnit) + (e - head);
            tile.output[piece.to + i] = slice->element[piece.from / int(sizeof(storage_t)) + i];
        }
    }
}

// Stores element by element, each lane in its row, what are no neighbours in the output.
__device__ __forceinline__ void store_apart(
    const Tile& tile, const Window& window, const MyRow& mine, const Slice* slice, index_t column_begin) {
    const int first = threadIdx.x % 32 / kSliceRows;
    index_t sample = 0, q = column_begin + first;
    storage_t* const y = tile.output + mine.info.output_offset;
#pragma unroll 1
    for (int column = first; column < kWarpN; column += 32 / kSliceRows, q += 32 / kSliceRows) {
        if (HAS_SAMPLES) {
            for (; q >= window.block_positions; q -= window.block_positions) ++sample;
            if (sample >= window.block_samples || sample >= tile.samples) break;
        }
        const index_t position = tile.position_begin + q;
        const index_t l = position * tile.output_step + tile.output_first + mine.info.shift;
        if (position < tile.positions && is_index(l, tile.L_out)) {
            const storage_t value = slice->element[mine.place + column * mine.count];
            y[sample * tile.output_stride_n + l * tile.output_stride_l] = value;
        }
    }
}

__device__ __forceinline__ void store_slice(
    const Tile& tile, const Window& window, const MyRow& mine, Slice* slice, index_t, index_t column_begin) {
    // Of several samples pieces of less than two vectors are not worth the effort.
    const bool are_neighbours = tile.output_stride_l == 1 &&
        (!HAS_SAMPLES || window.block_positions * tile.output_step >= 2 * kUnit);
    const bool is_whole = are_neighbours && mine.count == tile.output_step;
    if (mine.exists && !is_whole) store_apart(tile, window, mine, slice, column_begin);
    if (!are_neighbours) return;
    constexpr int kLaneBits = log2_of(kWarpN / kUnit / kLaneVectors);  // where a row is all of one sample
    if (!HAS_SAMPLES) {
        const index_t q = tile.position_begin + column_begin;
        const int columns = int(min_index(kWarpN, max_index(tile.positions - q, 0)));
        store_neighbours(tile, mine, mine.exists && is_whole, slice, 0, columns, 0, q, kLaneBits);
        return;
    }
    int lane_bits = log2_of(32 / kSliceRows);
    while (lane_bits < kLaneBits && (kLaneVectors * kUnit) << lane_bits < window.block_positions) ++lane_bits;
    index_t sample = column_begin / window.block_positions;
    index_t begin = sample * window.block_positions - column_begin;  // of the sample's columns, perhaps in front of the warp's
#pragma unroll 1
    for (; begin < kWarpN && sample < min_index(window.block_samples, tile.samples); ++sample) {
        const int first = int(max_index(begin, 0)), end = int(min_index(begin + window.block_positions, kWarpN));
        const index_t q = tile.position_begin + (first - begin);
        store_neighbours(tile, mine, mine.exists && is_whole, slice, first, end, sample, q, lane_bits);
        __syncwarp();
        begin += window.block_positions;
    }
}
#endif

// Adds to the sums of a warp's first 16 rows what is fused, and applies it; see finish_unrounded. Sums that are not finite
// become NaN, as finish_or_nan makes them.
template <typename RowOf>
__device__ __forceinline__ void apply_fused(
    const Tile& tile, const Window& window, const Epilogue& epilogue, const RowOf& row_of, index_t row_begin,
    index_t column_begin, Sums& acc) {
    const int lane = threadIdx.x % 32;
    Row rows[2];
    Channel channels[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const index_t row = row_begin + half * 8 + lane / 4;
        rows[half] = row_of(tile, row);
        exists[half] = row < tile.rows;
        channels[half] = epilogue.channel(exists[half] ? rows[half].channel : 0);
    }
    index_t column = column_begin + lane % 4 * 2;
#pragma unroll 1
    for (int j = 0; j < kTilesN; ++j, column += 8) {
        acc_t finished[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int half = e / 2;
            const storage_t* const place =
                kHasResidual && exists[half] ? place_of(tile, window, rows[half], column + e % 2) : nullptr;
            const acc_t value = add_addends(acc[0][0][e], channels[half], place);
            finished[e] = activate(multiply_add(scalar::zero(), value, value), channels[half]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int k = 0; k + 1 < kTilesN; ++k) acc[0][k][e] = acc[0][k + 1][e];
            acc[0][kTilesN - 1][e] = finished[e];
        }
    }
}

// Stores the sums of a block; row_of(tile, row) is the kernel's Row. A warp stores kSliceRows rows at a time; after each,
// the rest of `acc` moves up, so that one loop body serves all rows.
template <typename RowOf>
__device__ __forceinline__ void store_tile(
    Tile tile, const Window& window, const Epilogue& epilogue, const RowOf& row_of, Sums& acc) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Slice* const slice = keep_in_register_shared(reinterpret_cast<Slice*>(dynamic_shared_memory()) + warp);
    tile.output = keep_in_register_global(tile.output);
    const index_t column_begin = warp % WARPS_N * kWarpN;
    index_t row_begin = tile.row_begin + warp / WARPS_N * kWarpM;
#pragma unroll 1
    for (int i = 0; i < kTilesM && row_begin < tile.rows; i += kSliceTiles, row_begin += kSliceRows) {
        if (kIsFused) {
#pragma unroll 1
            for (int tiles = 0; tiles < kSliceTiles; ++tiles) {  // in turn, so that one loop body serves all
                apply_fused(tile, window, epilogue, row_of, row_begin + tiles * 16, column_begin, acc);
                if (kSliceTiles == 2) swap_first_tiles(acc);
            }
        }
        const MyRow mine = my_row(tile, row_of, row_begin, column_begin);
        const acc_t bias = kIsFused ? scalar::zero() : epilogue.bias_of(mine.exists ? mine.info.channel : 0);
        if (kSliceRows == 32 || lane < kSliceRows) slice->row[lane] = SliceRow{bias, mine.place, mine.count};
        __syncwarp();
        bool sum_again = false;
#pragma unroll
        for (int half = 0; half < 2 * kSliceTiles; ++half) {
            const SliceRow row = slice->row[half * 8 + lane / 4];
            const int step = PHASES_IN_ROWS ? row.step : 1;
            storage_t* const to = slice->element + (row.place + lane % 4 * 2 * step);
            Vector<storage_t, 2> pairs[kTilesN];
            acc_t check = scalar::zero();
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    pairs[j].element[e] = finish_or_nan(acc[half / 2][j][half % 2 * 2 + e], row.bias, &check);
                }
            }
            sum_again = sum_again || is_nan(check);
            if (!PHASES_IN_ROWS || tile.output_step == 1) {
#pragma unroll
                for (int j = 0; j < kTilesN; ++j) reinterpret_cast<Vector<storage_t, 2>*>(to)[4 * j] = pairs[j];
            } else {
#pragma unroll
                for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) to[(j * 8 + e) * step] = pairs[j].element[e];
                }
            }
        }
        sum_again = NAN_FALLBACK && any_lane(sum_again);
        __syncwarp();
        if (sum_again) sum_marked_again(tile, window, epilogue, row_of, slice, row_begin, column_begin);
        store_slice(tile, window, mine, slice, row_begin, column_begin);
        __syncwarp();
        move_sums_up<kSliceTiles>(acc);
    }
}

// Where SEGMENT_MODE is 1: adds a thread's sums of a segment, where IS_SPLIT those of the small products too, to its totals in
// shared memory (kTilesM by kTilesN times four, kThreads apart). The last totals are left in `acc`; before, new sums begin. One loop body serves all rows,
// which move up behind one another, as in store_tile.
template <bool kIsLast>
__device__ __forceinline__ void add_to_totals(AccVector* totals, Sums& acc, Sums& low) {
#pragma unroll 1
    for (int i = 0; i < kTilesM; ++i, totals += kTilesN * kThreads) {
        acc_t next[kTilesN][4];
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
            AccVector total = totals[j * kThreads];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                total.element[e] += IS_SPLIT ? acc[0][j][e] + low[0][j][e] : acc[0][j][e];
                next[j][e] = kIsLast ? total.element[e] : 0.0f;
            }
            if (!kIsLast) totals[j * kThreads] = total;
        }
        move_sums_up(acc);
        if (IS_SPLIT) move_sums_up(low);
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                acc[kTilesM - 1][j][e] = next[j][e];
                if (IS_SPLIT) low[kTilesM - 1][j][e] = 0.0f;
            }
        }
    }
}

// The sums of one tile over chunks chunk_begin to chunk_end - 1.
__device__ __forceinline__ void multiply_tile(
    const Tile& tile, const Window& window, index_t chunk_begin, index_t chunk_end, Sums& acc) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const index_t part_rows = window.units * window.window_rows;

    // Shared memory: totals, stages of weights, windows, tables.
    AccVector* const my_totals = reinterpret_cast<AccVector*>(dynamic_shared_memory()) + threadIdx.x;
    StorageVector* const stages = reinterpret_cast<StorageVector*>(dynamic_shared_memory()) + kTotals;
#if RAW_WEIGHT
    const index_t stage_vectors = RawWeights::shared_vectors(tile, window);
#else
    constexpr index_t stage_vectors = NUM_STAGES * kStageVectors;
#endif
    Vector<unsigned>* const windows = reinterpret_cast<Vector<unsigned>*>(stages + stage_vectors);
    const index_t window_vectors = kParts * part_rows, all_windows = (window.chunks > 1 ? 2 : 1) * window_vectors;
    int* const pair_offset = reinterpret_cast<int*>(windows + all_windows);      // of pairs, in a window, in bytes
    Task* const tasks = reinterpret_cast<Task*>(pair_offset + window.pairs);

    // Rows that no sample belongs to are zeros in all chunks.
#pragma unroll 1
    for (index_t row = threadIdx.x; row < all_windows; row += kThreads) windows[row] = Vector<unsigned>();

    // Planes of pairs begin at even positions, where needed one before the first that a column reads. Neighbouring rows are
    // pairs where neighbouring columns read neighbouring positions, else the same rows of two planes.
    const bool has_pairs_in_planes = tile.column_step == 1;
    const index_t first = tile.position_begin * tile.column_step + tile.first + window.shift;
    const auto skew_of = [&](index_t plane) {
        return INPUT_WIDTH == 1 ? 0 : int(first + (has_pairs_in_planes ? plane * window.plane_step : 0)) & 1;
    };
#pragma unroll 1
    for (index_t t = threadIdx.x; t < window.unit_tasks; t += kThreads) {
        const index_t sample_tasks =
            INPUT_WIDTH == 1 ? window.sample_rows : window.planes * window.plane_rows / INPUT_WIDTH;
        const index_t sample = t / sample_tasks, in_sample = t - sample * sample_tasks;
        const index_t row = in_sample * (has_pairs_in_planes ? INPUT_WIDTH : 1);  // but for the second planes of pairs
        // Rows between samples belong to no plane.
        const index_t first_planes = min_index(row / window.plane_rows, window.planes);
        const index_t j = row - first_planes * window.plane_rows;
        const index_t plane = first_planes * (has_pairs_in_planes ? 1 : INPUT_WIDTH);
        const Source source = source_index(
            first + j * tile.column_step + plane * window.plane_step - skew_of(plane), tile.L_in);
        // Rows that only columns behind the last would read, or none, are not loaded.
        const index_t end = tile.positions - tile.position_begin + (window.plane_rows - window.block_positions);
        const bool is_read =
            sample < min_index(tile.samples, window.block_samples) && plane < window.planes && j < end;
        tasks[t].offset = is_read && source.exists
            ? sample * tile.input_stride_n + source.index * tile.input_stride_l
            : kMissing;
#if INPUT_WIDTH == 2
        tasks[t].row = sample * window.sample_rows + plane * window.plane_rows + j;
#endif
    }
#pragma unroll 1
    for (index_t pair = threadIdx.x; pair < window.pairs; pair += kThreads) {
        const index_t pair_tap = pair / window.units;
        // Pairs of no tap read what the first one does.
        const bool exists = pair_tap < tile.row_taps;
        const index_t unit = exists ? pair - pair_tap * window.units : 0;
        const index_t tap = (exists ? pair_tap : 0) + (has_pairs_in_planes ? 0 : skew_of(0));
        const index_t round = tap / window.planes, plane = tap - round * window.planes;
        const index_t row = window.tap_rows_first + round * window.tap_rows_step + plane * window.plane_rows +
            (has_pairs_in_planes ? skew_of(plane) : 0) + unit * window.window_rows;
        set_pair_row(pair_offset, pair, row);
    }

    // Split products leave no registers to keep what can be computed again.
    const auto hold = [](int value) { return IS_SPLIT ? value : keep_in_register(value); };
    unsigned char* const shared = dynamic_shared_memory();
    const int windows_begin = (kTotals + int(stage_vectors)) * 16;  // in shared memory, in bytes
    const int tasks_begin = hold(windows_begin + int(all_windows) * 16 + int(window.pairs) * 4);
    const int unit_bytes = int(window.window_rows) * 16;
    // What staging must know of a chunk.
    struct Chunk {
        const storage_t* input;
        int channels;  // that exist
        int window, window_end;  // in shared memory, in bytes
    };

#if CHANNELS_LAST
    // Four neighbouring threads, as many as a chunk has units at most, stage a row, and this one its unit of rows my_row,
    // my_row + kRowStep and so on.
    constexpr int kRowStep = kThreads / 4;
    const int my_unit = threadIdx.x % 4, my_row = threadIdx.x / 4;
    const Task* const my_tasks = reinterpret_cast<const Task*>(shared + tasks_begin) + my_row;
    const int staged_rows = int(window.unit_tasks);
    const auto offset_of = [&](int row, const Task* task) { return row < staged_rows ? task->offset : kMissing; };

    const auto copy_window = [&](const Chunk& chunk) {
        if (my_unit * kUnit >= chunk.channels) return;
        const storage_t* const x = keep_in_register_global(chunk.input + my_unit * kUnit);
        const Task* task = my_tasks;
        StorageVector* to = reinterpret_cast<StorageVector*>(shared + (chunk.window + my_unit * unit_bytes)) + my_row;
#pragma unroll 1
        for (int row = my_row; row < staged_rows; row += 4 * kRowStep, task += 4 * kRowStep, to += 4 * kRowStep) {
            index_t offset[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) offset[i] = offset_of(row + i * kRowStep, task + i * kRowStep);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                copy_async_if(to + i * kRowStep, reinterpret_cast<const StorageVector*>(x + offset[i]), offset[i] != kMissing);
            }
        }
    };
    // Loads PREFETCH rows, kRowStep apart, from `row` on, as zeros where no sample exists. The result is where the first of
    // them begins in shared memory, in bytes; -1 where the chunk lacks the unit.
    const auto load_rows = [&](Block<1> (&blocks)[PREFETCH], const Chunk& chunk, int row) {
        if (my_unit * kUnit >= chunk.channels) return -1;
        const storage_t* const x = keep_in_register_global(chunk.input + my_unit * kUnit);
        const Task* const task = my_tasks + (row - my_row);
#pragma unroll
        for (int i = 0; i < PREFETCH; ++i) {
            const index_t offset = offset_of(row + i * kRowStep, task + i * kRowStep);
            blocks[i].clear();
            if (offset != kMissing) blocks[i].load_unit(x + offset);
        }
        return chunk.window + row * 16 + my_unit * unit_bytes;
    };
    const auto store_rows = [&](const Block<1> (&blocks)[PREFETCH], int row, int to) {
        Vector<unsigned>* const rows = reinterpret_cast<Vector<unsigned>*>(shared + to);
#pragma unroll
        for (int i = 0; i < PREFETCH; ++i) {
            if (row + i * kRowStep < staged_rows) stage(blocks[i], rows + i * kRowStep, part_rows);
        }
    };
#else
    // The window of a chunk is distributed over the threads: `task` counts the tasks of the first kTaskUnits units, then those
    // of the next. The result is where the task's first row begins in shared memory, in bytes; -1 where no sample exists.
    //
    // Channels behind the last have zero weights. In their place the last one of the unit is loaded again, and whole units
    // keep what an earlier chunk left. So infinities and NaNs there are terms of the same columns in another place, too.
    const auto load_task = [&](Block<INPUT_WIDTH> (&blocks)[kTaskUnits], const Chunk& chunk, int task) {
        const int group = int(multiply_high(unsigned(task), unsigned(window.tasks_reciprocal)));
        const int t = task - group * int(window.unit_tasks), unit = group * kTaskUnits;
        const Task found = reinterpret_cast<const Task*>(shared + tasks_begin)[t];
        if (found.offset == kMissing) return -1;
        const storage_t* const x = chunk.input + (found.offset + unit * (kUnit * tile.input_stride_c));
        const int channels = chunk.channels - unit * kUnit;
        if (chunk.channels % kUnit == 0) {
#pragma unroll
            for (int u = 0; u < kTaskUnits; ++u) {
                if (u == 0 || channels > u * kUnit) blocks[u].load(x, tile.input_stride_c, u);
            }
        } else {
#pragma unroll
            for (int u = 0; u < kTaskUnits; ++u) blocks[u].load_up_to(channels - 1, x, tile.input_stride_c, u);
        }
#if INPUT_WIDTH == 2
        const int row = int(found.row);
#else
        const int row = t;
#endif
        return chunk.window + row * 16 + unit * unit_bytes;
    };
    const PairOrder pair_order = PairOrder::of(has_pairs_in_planes ? 1 : int(window.plane_rows));
    const auto store_task = [&](const Block<INPUT_WIDTH> (&blocks)[kTaskUnits], const Chunk& chunk, int to) {
#pragma unroll
        for (int u = 0; u < kTaskUnits; ++u, to += unit_bytes) {
            if (u > 0 && to >= chunk.window_end) continue;
            Vector<unsigned>* const row = reinterpret_cast<Vector<unsigned>*>(shared + to);
            if (INPUT_WIDTH == 2) {
                stage_pair(blocks[u], row, pair_order);
            } else {
                stage(blocks[u], row, part_rows);
            }
        }
    };
#endif
    const int chunk_stages = int(window.pairs / kStagePairs);
#if RAW_WEIGHT
    RawWeights weights(tile, window, chunk_begin, chunk_end, stages);
#else
    WeightRing ring(
        tile.weight + chunk_begin * window.pairs * (kParts * BLOCK_M), stages, int(chunk_end - chunk_begin) * chunk_stages);
    int slot = NUM_STAGES - 1;  // read last
#endif
    int stage = 0;              // read next
    int stages_end = 0;         // of the chunk
    __syncthreads();  // the tables

    const StorageVector* const my_weight = weight_rows(stages);
    // This lane's rows of a window, in bytes. Neighbouring columns of one sample are neighbouring rows, so one address serves them all.
    int column_offset[HAS_SAMPLES ? kTilesN / 2 : 1];
#pragma unroll
    for (int j = 0; j < (HAS_SAMPLES ? kTilesN / 2 : 1); ++j) {
        const index_t column = warp % WARPS_N * kWarpN + j * 16 + lane / 16 * 8 + lane % 8;
        const index_t sample = HAS_SAMPLES ? column / window.block_positions : 0;
        // Samples lie at such distances that eight neighbouring columns are in different banks (Window.sample_rows in
        // gpuconv/families/mma_window.py). Columns behind the last sample read a row of their own bank, too.
        const index_t row = sample < window.block_samples
            ? sample * window.sample_rows + (column - sample * window.block_positions)
            : column % 8;
        column_offset[j] = int(row) * 16;
    }
    const unsigned char* const my_window =
        reinterpret_cast<const unsigned char*>(windows) + (HAS_SAMPLES ? 0 : column_offset[0]);
    const StepOffsets* const my_pairs = reinterpret_cast<const StepOffsets*>(pair_offset) + lane / 8 % 2;

    Sums low, part;  // where IS_SPLIT: the small products, and the large ones of the stages before
    for_each_sum([&](int i, int j, int e) {
        acc[i][j][e] = 0.0f;
        if (IS_SPLIT) low[i][j][e] = part[i][j][e] = 0.0f;
        if (SEGMENT_MODE == 1) my_totals[(i * kTilesN + j) * kThreads].element[e] = 0.0f;
    });
    index_t segment_left = window.segment_chunks;

    const storage_t* input = tile.input + chunk_begin * window.units * kUnit * tile.input_stride_c;  // of the next chunk
#pragma unroll 1
    for (index_t chunk = chunk_begin - 1; chunk < chunk_end; ++chunk) {
        // The next chunk's input arrives while this one is multiplied, in batches of what the registers hold: a batch is
        // loaded, a round of stages is multiplied, the batch is stored.
        Chunk next;
        next.input = input;
        next.channels = hold(int(min_index(tile.C_in_g - (chunk + 1) * window.units * kUnit, window.units * kUnit)));
        next.window = hold(windows_begin + int((chunk + 1) & 1) * int(window_vectors) * 16);
        next.window_end = hold(next.window + (next.channels + kUnit - 1) / kUnit * unit_bytes);
#if CHANNELS_LAST
        int rows_begin = keep_in_register(!kCopiesUnits && chunk + 1 < chunk_end ? 0 : staged_rows);
#else
        const int groups = (next.channels + (kTaskUnits * kUnit - 1)) / (kTaskUnits * kUnit);
        int tasks_left = keep_in_register(chunk + 1 < chunk_end ? groups * int(window.unit_tasks) : 0);
#endif
        const unsigned char* const x = keep_in_register_shared(my_window + int((chunk & 1) * window_vectors) * 16);
        const StepOffsets* pairs_of_stage = my_pairs;
#if RAW_WEIGHT
        weights.next(chunk >= chunk_begin, tile, window, stages);
        const StorageVector* w = my_weight;  // this lane's rows of the stage that is read next
#endif
        const auto multiply_next = [&] {  // a stage that has arrived
#if !RAW_WEIGHT
            ring.load(slot, stage);
            slot = keep_in_register(stage & (NUM_STAGES - 1));
            const StorageVector* const w = my_weight + slot * kStageVectors;
#endif
            ++stage;
            const StepOffsets pairs = *pairs_of_stage;
            pairs_of_stage += 2;  // those of both halves
            multiply_stage(
                w, x, pairs, [&](int j) { return HAS_SAMPLES ? column_offset[j] : j * 256; }, int(part_rows), acc, low,
                part);
#if RAW_WEIGHT
            w += kStageVectors;
#endif
        };
#if CHANNELS_LAST
        if (kCopiesUnits) {
            // The next window is copied in one group with the weights of NUM_STAGES - 1 stages later. A chunk of as many
            // stages has waited for that group when the next one begins; a shorter one has not.
            if (chunk >= chunk_begin) {
                if (chunk == chunk_begin || chunk_stages < NUM_STAGES - 1) {
                    copy_async_wait();
                } else {
                    copy_async_wait_group<NUM_STAGES - 2>();
                }
                __syncthreads();
            }
            if (chunk + 1 < chunk_end) copy_window(next);
#pragma unroll 1
            while (stage < stages_end) {
                multiply_next();
                if (stage == stages_end) break;
                copy_async_wait_group<NUM_STAGES - 2>();
                __syncthreads();
            }
        }
#pragma unroll 1
        for (; !kCopiesUnits && (rows_begin < staged_rows || stage < stages_end); rows_begin += PREFETCH * kRowStep) {
            Block<1> ahead[PREFETCH];
            const int row = rows_begin + my_row, to = row < staged_rows ? load_rows(ahead, next, row) : -1;
            const int round_end = int(min_index(stage + window.round_stages, stages_end));
#pragma unroll 1
            while (stage < round_end) {
                copy_async_wait_group<NUM_STAGES - 2>();
                __syncthreads();
                multiply_next();
            }
            if (to >= 0) store_rows(ahead, row, to);
        }
#else
#pragma unroll 1
        for (; tasks_left > 0 || stage < stages_end; tasks_left -= kThreads) {
            Block<INPUT_WIDTH> ahead[kTaskUnits];
            const int task = tasks_left - 1 - int(threadIdx.x);
            const int to = task >= 0 ? load_task(ahead, next, task) : -1;
            const int round_end = int(min_index(stage + window.round_stages, stages_end));
#pragma unroll 1
            while (stage < round_end) {
#if !RAW_WEIGHT
                copy_async_wait_group<NUM_STAGES - 2>();
                __syncthreads();
#endif
                multiply_next();
            }
            if (to >= 0) store_task(ahead, next, to);
        }
#endif
        input += window.units * kUnit * tile.input_stride_c;
        stages_end += chunk_stages;
        if (SEGMENT_MODE == 1 && chunk >= chunk_begin && --segment_left == 0 && chunk + 1 < chunk_end) {
            segment_left = window.segment_chunks;
            add_to_totals<false>(my_totals, IS_SPLIT ? part : acc, low);
        }
    }
    if (SEGMENT_MODE == 1) {
        add_to_totals<true>(my_totals, IS_SPLIT ? part : acc, low);
        if (IS_SPLIT) for_each_sum([&](int i, int j, int e) { acc[i][j][e] = part[i][j][e]; });
    } else if (IS_SPLIT) {
        for_each_sum([&](int i, int j, int e) { acc[i][j][e] = part[i][j][e] + low[i][j][e]; });
    }
    copy_async_wait_group<0>();
    __syncthreads();
}

// tile_of(tile index) is the kernel's reading of its grid.
template <typename TileOf, typename RowOf>
__device__ __forceinline__ void run_block(
    const TileOf& tile_of, const Window& window, const Epilogue& epilogue, const RowOf& row_of, AccVector* partial) {
    Sums acc;
    if (kHasLengths) {  // blocks behind the sample's last output have nothing to do
        const Tile tile = tile_of(SEGMENT_MODE == 2 ? blockIdx.x % unsigned(window.num_tiles) : blockIdx.x);
        if (tile.position_begin >= tile.positions) return;
    }
    if (SEGMENT_MODE == 3) {
        for_each_sum([&](int i, int j, int e) { acc[i][j][e] = 0.0f; });
#pragma unroll 1
        for (index_t segment = 0; segment < window.segments; ++segment) {
#pragma unroll
            for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
                for (int j = 0; j < kTilesN; ++j) {
                    const AccVector sums = partial[partial_offset(window, segment, blockIdx.x, i, j)];
#pragma unroll
                    for (int e = 0; e < 4; ++e) acc[i][j][e] += sums.element[e];
                }
            }
        }
    } else {
        const index_t segment = SEGMENT_MODE == 2 ? index_t(blockIdx.x) / window.num_tiles : 0;
        const index_t tile = index_t(blockIdx.x) - segment * window.num_tiles;
        const index_t chunk_begin = segment * window.segment_chunks;
        const index_t chunk_end =
            SEGMENT_MODE == 2 ? min_index(chunk_begin + window.segment_chunks, window.chunks) : window.chunks;
        multiply_tile(tile_of(tile), window, chunk_begin, chunk_end, acc);
        if (SEGMENT_MODE == 2) {
#pragma unroll
            for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
                for (int j = 0; j < kTilesN; ++j) {
                    AccVector sums;
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums.element[e] = acc[i][j][e];
                    partial[partial_offset(window, segment, tile, i, j)] = sums;
                }
            }
            return;
        }
    }
    store_tile(tile_of(block_index_again()), window, epilogue, row_of, acc);
}
