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
// these results follow IEEE arithmetic. Whether a result is summed again depends on its own terms alone.
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
// FOLDS_STRIDE = 1 is for layers, by a rule on the layer alone, of which the positions of one stride are channels: see
// folded() in mma_tile.cuh. A chunk then has positions of one channel of the input. Rows of the window that lie in part outside
// the input, at the edges, are loaded element by element.
//
// OUTPUT_LAST = 1 is for output of that kind, where rows are channels: it is stored in units.
//
// RAW_WEIGHT = 1 is for weights that no launch before has packed: see raw_weights.cuh.
//
// Macros read: BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, NUM_STAGES, STAGE_STEPS, PREFETCH, INPUT_WIDTH, CHANNELS_LAST, OUTPUT_LAST,
// FOLDS_STRIDE and RAW_WEIGHT (0 by default), HAS_SAMPLES, IS_SPLIT, SPLIT_TERMS, SEGMENT_MODE, PHASES_IN_ROWS,
// MULTIPLY_MATRICES, and those of common.cuh. Dynamic shared memory: NUM_STAGES stages of weights (or those of
// raw_weights.cuh), the windows of two chunks (of one, where there is one chunk), and tables, where SEGMENT_MODE is 1 behind
// the totals; or the slices through which the results pass.

#pragma once

#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "fragments.cuh"
#include "mma_epilogue.cuh"
#include "mma_stage.cuh"
#include "mma_tile.cuh"
#include "mma_weights.cuh"
#include "samples.cuh"
#include "staging.cuh"

// Where SEGMENT_MODE is 1: adds a thread's sums of a segment, where IS_SPLIT those of the small products too, to its totals in
// shared memory (kTilesM by kTilesN times four, kThreads apart). The last totals are left in `acc`; before, new sums begin. One
// loop body serves all rows, which move up behind one another, as in store_tile.
__device__ __forceinline__ void add_to_totals(AccVector* totals, bool is_last, Sums& acc, Sums& low) {
#pragma unroll 1
    for (int i = 0; i < kTilesM; ++i, totals += kTilesN * kThreads) {
        acc_t next[kTilesN][4];
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
            AccVector total = totals[j * kThreads];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                total.element[e] += IS_SPLIT ? acc[0][j][e] + low[0][j][e] : acc[0][j][e];
                next[j][e] = is_last ? total.element[e] : 0.0f;
            }
            totals[j * kThreads] = total;
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
    const Tile& whole, const Window& window, index_t chunk_begin, index_t chunk_end, Sums& acc) {
    const Tile tile = folded(whole, window);
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
    Task* const tasks = reinterpret_cast<Task*>(pair_offset + tile.pairs);

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
    // What task t loads of each channel: `is_read` where a column of the block reads that.
    struct Place {
        index_t sample, position;
        index_t row;  // of the window
        bool is_read;
    };
    const auto place_of_task = [&](index_t t) {
        const index_t sample_tasks =
            INPUT_WIDTH == 1 ? window.sample_rows : window.planes * window.plane_rows / INPUT_WIDTH;
        const index_t sample = t / sample_tasks, in_sample = t - sample * sample_tasks;
        const index_t row = in_sample * (has_pairs_in_planes ? INPUT_WIDTH : 1);  // but for the second planes of pairs
        // Rows between samples belong to no plane.
        const index_t first_planes = min_index(row / window.plane_rows, window.planes);
        const index_t j = row - first_planes * window.plane_rows;
        const index_t plane = first_planes * (has_pairs_in_planes ? 1 : INPUT_WIDTH);
        // Rows that only columns behind the last would read, or none, are not loaded.
        const index_t end = tile.positions - tile.position_begin + (window.plane_rows - window.block_positions);
        const bool is_read =
            sample < min_index(tile.samples, window.block_samples) && plane < window.planes && j < end;
        return Place{
            sample, first + j * tile.column_step + plane * window.plane_step - skew_of(plane),
            sample * window.sample_rows + plane * window.plane_rows + j, is_read};
    };
    const index_t lead = FOLDS_STRIDE ? fold_lead(whole, window) : 0;
    // Where positions are channels: whether those of a row are all inside the input. load_partial_rows loads other rows.
    const auto is_row_inside = [&](index_t position) {
        const index_t begin = position * window.fold - lead;
        return is_inside(begin, begin + (window.fold - 1), tile.L_in);
    };
    bool has_partial_rows = false;  // this thread's
#pragma unroll 1
    for (index_t t = threadIdx.x; t < window.unit_tasks; t += kThreads) {
        const Place place = place_of_task(t);
        Source source = source_index(place.position, tile.L_in);
        if (FOLDS_STRIDE) source = Source{is_row_inside(place.position), place.position, 0};
        has_partial_rows = has_partial_rows || (place.is_read && !source.exists);
        tasks[t].offset = place.is_read && source.exists
            ? place.sample * tile.input_stride_n + source.index * tile.input_stride_l
            : kMissing;
#if INPUT_WIDTH == 2
        tasks[t].row = place.row * 16;
#endif
    }
#pragma unroll 1
    for (index_t pair = threadIdx.x; pair < tile.pairs; pair += kThreads) {
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

    // Three sets of sums seldom leave registers to keep what can be computed again.
    constexpr bool kHasRegisters = !IS_SPLIT || 3 * 4 * kTilesM * kTilesN <= 144;
    const auto hold = [](int value) { return kHasRegisters ? keep_in_register(value) : value; };
    unsigned char* const shared = dynamic_shared_memory();
    const int windows_begin = (kTotals + int(stage_vectors)) * 16;  // in shared memory, in bytes
    const int tasks_begin = hold(windows_begin + int(all_windows) * 16 + int(tile.pairs) * 4);
    const int unit_bytes = int(window.window_rows) * 16;
    // What staging must know of a chunk.
    struct Chunk {
        const storage_t* input;
        int channels;  // that exist
        int window, window_end;  // in shared memory, in bytes; the end where registers hold it
    };
    const auto window_end = [&](int begin, int channels) { return begin + (channels + kUnit - 1) / kUnit * unit_bytes; };

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
        const auto exists = [&](int i) {
            if (row + i * kRowStep >= staged_rows) return false;
            // But for rows that load_partial_rows stores, and others that keep their zeros.
            return !FOLDS_STRIDE || my_tasks[row - my_row + i * kRowStep].offset != kMissing;
        };
        stage_blocks(blocks, reinterpret_cast<Vector<unsigned>*>(shared + to), kRowStep, part_rows, exists);
    };
#else
    // What registers do not hold is computed again where it is used, and not before.
    const auto channels_of = [](const Chunk& chunk) { return kHasRegisters ? chunk.channels : keep_in_loop(chunk.channels); };
    // Whether all chunks are known to consist of whole tasks; whether one has unit u of the task that is stored from `to` on.
    const auto has_whole_tasks = [&] {
        return !kHasRegisters && (tile.C_in_g | window.units * kUnit) % (kTaskUnits * kUnit) == 0;
    };
    const auto has_unit = [&](const Chunk& chunk, int to, int u) {
        if (kHasAllUnits) return u == 0 || chunk.channels > u * kUnit;
        if (u == 0 || has_whole_tasks()) return true;
        return to + u * unit_bytes < (kHasRegisters ? chunk.window_end : window_end(chunk.window, channels_of(chunk)));
    };
    // The window of a chunk is distributed over the threads: `task` counts the tasks of the first kTaskUnits units, then those
    // of the next. The result is where the task's first row begins in shared memory, in bytes; -1 where no sample exists.
    //
    // Channels behind the last have zero weights. In their place the last one of the unit is loaded again, and whole units
    // keep what an earlier chunk left. So infinities and NaNs there are terms of the same columns in another place, too.
    const auto load_task = [&](Block<INPUT_WIDTH> (&blocks)[kTaskUnits], const Chunk& chunk, int task) {
        int group = kHasAllUnits ? 0 : int(task >= int(window.unit_tasks));
        if (2 * kTaskUnits < kMaxUnits) group = int(multiply_high(unsigned(task), unsigned(window.tasks_reciprocal)));
        const int before = group * int(window.unit_tasks), t = task - before, unit = group * kTaskUnits;
        const Task found = reinterpret_cast<const Task*>(shared + tasks_begin)[t];
        if (found.offset == kMissing) return -1;
#if INPUT_WIDTH == 2
        const int to = chunk.window + int(found.row) + unit * unit_bytes;
#else
        const int to = chunk.window + (t + before * kTaskUnits) * 16;  // each row of a unit has a task
#endif
        const storage_t* const x = keep_in_register_global(
            chunk.input + (long long)(found.offset + unit * (kUnit * tile.input_stride_c)));
        // Whole tasks need no test for each unit.
        if (kHasAllUnits ? chunk.channels == kMaxUnits * kUnit : has_whole_tasks()) {
            const index_t channel_stride = keep_in_loop(tile.input_stride_c);
#pragma unroll
            for (int u = 0; u < kTaskUnits; ++u) blocks[u].load(x, channel_stride, u);
        } else if (channels_of(chunk) % kUnit == 0) {
#pragma unroll
            for (int u = 0; u < kTaskUnits - kHasAllUnits; ++u) {
                if (has_unit(chunk, to, u)) {
                    blocks[u].load(x, keep_in_loop(tile.input_stride_c), u);
                } else if (kUnit == 4) {
                    blocks[u].clear();  // stage_blocks tests it with the others
                }
            }
        } else {
            const int last = channels_of(chunk) - unit * kUnit - 1;
            const index_t channel_stride = keep_in_loop(tile.input_stride_c);
#pragma unroll
            for (int u = 0; u < kTaskUnits; ++u) blocks[u].load_up_to(last, x, channel_stride, u);
        }
        return to;
    };
    const PairOrder pair_order = PairOrder::of((has_pairs_in_planes ? 1 : int(window.plane_rows)) * 16);
    const auto store_unit = [&](const Block<INPUT_WIDTH>& block, int to) {
        if (INPUT_WIDTH == 2) {
            stage_pair(block, shared + to, pair_order);
        } else {
            stage(block, reinterpret_cast<Vector<unsigned>*>(shared + to), part_rows);
        }
    };
    const auto store_task = [&](const Block<INPUT_WIDTH> (&blocks)[kTaskUnits], const Chunk& chunk, int to) {
        const auto exists = [&](int u) { return has_unit(chunk, to, u); };
#if INPUT_WIDTH == 1
        Vector<unsigned>* const rows = reinterpret_cast<Vector<unsigned>*>(shared + to);
        if (kUnit == 4) return stage_blocks(blocks, rows, window.window_rows, part_rows, exists);
#endif
        if (kHasAllUnits && chunk.channels > (kMaxUnits - 1) * kUnit) {
#pragma unroll
            for (int u = 0; u < kTaskUnits; ++u) store_unit(blocks[u], to + u * unit_bytes);
            return;
        }
#pragma unroll
        for (int u = 0; u < kTaskUnits - kHasAllUnits; ++u) {
            if (exists(u)) store_unit(blocks[u], to + u * unit_bytes);
        }
    };
#endif
    // Loads and stores the rows of which parts lie outside the input, where positions are channels. `begin` is the first
    // position of the chunk among those of a stride.
    const auto load_partial_rows = [&](const Chunk& chunk, index_t begin) {
#pragma unroll 1
        for (index_t t = threadIdx.x; t < window.unit_tasks; t += kThreads) {
            const Place place = place_of_task(t);
            if (!place.is_read || is_row_inside(place.position)) continue;
#pragma unroll 1
            for (int unit = 0; unit < int(window.units); ++unit) {
                Block<1> block;
                block.clear();
#pragma unroll
                for (int e = 0; e < kUnit; ++e) {
                    const index_t channel = unit * kUnit + e;
                    const Source source =
                        source_index(place.position * window.fold - lead + begin + channel, tile.L_in);
                    if (!source.exists) continue;
                    const index_t offset = place.sample * tile.input_stride_n + place.position * tile.input_stride_l;
                    block.run[e] = RunOf<1>::type::load(
                        chunk.input + (offset + (channel + source.moved) * tile.input_stride_c));
                }
                const int to = chunk.window + unit * unit_bytes + int(t) * 16;
                stage(block, reinterpret_cast<Vector<unsigned>*>(shared + to), part_rows);
            }
        }
    };
    const int chunk_stages = int(tile.pairs / kStagePairs);
#if RAW_WEIGHT
    RawWeights weights(tile, window, chunk_begin, chunk_end, stages);
#else
    WeightRing ring(
        tile.weight + chunk_begin * tile.pairs * (kParts * BLOCK_M), stages, int(chunk_end - chunk_begin) * chunk_stages);
    int slot = NUM_STAGES - 1;  // read last
#endif
    int stage = 0;              // read next
    int stages_end = 0;         // of the chunk
    __syncthreads();  // the tables

    const StorageVector* const my_weight = weight_rows(stages);
    // This lane's rows of a window, in bytes. Neighbouring columns of one sample are neighbouring rows, so one address serves
    // them all.
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

    // Of the next chunk; where positions are channels, the next channel of the input begins fold_skip behind the last chunk of
    // the one before.
    const index_t first_channel = FOLDS_STRIDE ? chunk_begin / window.fold_chunks : 0;
    const index_t chunks_before = chunk_begin - first_channel * (FOLDS_STRIDE ? window.fold_chunks : 0);  // of the channel
    const storage_t* input = tile.input + chunks_before * window.units * kUnit * tile.input_stride_c;
    const index_t fold_skip = whole.input_stride_c - tile.input_stride_l;
    index_t fold_chunks_left = 0;
    if (FOLDS_STRIDE) {
        input += first_channel * whole.input_stride_c;
        fold_chunks_left = window.fold_chunks - chunks_before;
    }
#pragma unroll 1
    for (index_t chunk = chunk_begin - 1; chunk < chunk_end; ++chunk) {
        // The next chunk's input arrives while this one is multiplied, in batches of what the registers hold: a batch is
        // loaded, a round of stages is multiplied, the batch is stored.
        Chunk next;
        next.input = input;
        next.channels = hold(int(min_index(tile.C_in_g - (chunk + 1) * window.units * kUnit, window.units * kUnit)));
        next.window = hold(windows_begin + int((chunk + 1) & 1) * int(window_vectors) * 16);
        next.window_end = kHasAllUnits || !kHasRegisters ? 0 : hold(window_end(next.window, next.channels));
#if CHANNELS_LAST
        int rows_begin = keep_in_register(!kCopiesUnits && chunk + 1 < chunk_end ? 0 : staged_rows);
#else
        const int groups = (next.channels + (kTaskUnits * kUnit - 1)) / (kTaskUnits * kUnit);
        int last_task = keep_in_register((chunk + 1 < chunk_end ? groups * int(window.unit_tasks) : 0) - 1);
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
        for (; last_task >= 0 || stage < stages_end; last_task -= kThreads) {
            Block<INPUT_WIDTH> ahead[kTaskUnits];
            const int task = last_task - int(threadIdx.x);
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
        // Since this chunk's first barrier nobody reads what the next chunk's window held before.
        if (FOLDS_STRIDE && has_partial_rows && chunk + 1 < chunk_end) {
            load_partial_rows(next, (window.fold_chunks - fold_chunks_left) * window.units * kUnit);
        }
        input += window.units * kUnit * tile.input_stride_c;
        if (FOLDS_STRIDE && --fold_chunks_left == 0) {
            fold_chunks_left = window.fold_chunks;
            input += fold_skip;
        }
        stages_end += chunk_stages;
        if (SEGMENT_MODE == 1 && chunk >= chunk_begin) {
            const bool is_last = chunk + 1 == chunk_end;
            if (--segment_left == 0 || is_last) {
                segment_left = window.segment_chunks;
                add_to_totals(my_totals, is_last, IS_SPLIT ? part : acc, low);
            }
        }
    }
    if (IS_SPLIT) {
        for_each_sum([&](int i, int j, int e) {
            acc[i][j][e] = SEGMENT_MODE == 1 ? part[i][j][e] : part[i][j][e] + low[i][j][e];
        });
    }
    copy_async_wait_group<0>();
    __syncthreads();
}

// Segments whose sums are loaded at a time where SEGMENT_MODE is 3: up to four, which take up to 64 registers.
constexpr int kSegmentsAhead = kTilesM * kTilesN <= 4 ? 4 : kTilesM * kTilesN <= 8 ? 2 : 1;

// tile_of(tile index) is the kernel's reading of its grid.
template <typename TileOf, typename RowOf>
__device__ __forceinline__ void run_block(
    const TileOf& tile_of, const Window& window, const Epilogue& epilogue, const RowOf& row_of, AccVector* partial) {
    Sums acc;
    const index_t segment = SEGMENT_MODE == 2 ? index_t(blockIdx.x) / window.num_tiles : 0;
    const index_t index = index_t(blockIdx.x) - segment * window.num_tiles;
    if (kHasLengths) {  // blocks behind the sample's last output have nothing to do
        const Tile tile = tile_of(index);
        if (tile.position_begin >= tile.positions) return;
    }
    if (SEGMENT_MODE == 2) {
        const index_t chunk_begin = segment * window.segment_chunks;
        multiply_tile(
            tile_of(index), window, chunk_begin, min_index(chunk_begin + window.segment_chunks, window.chunks), acc);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
            for (int j = 0; j < kTilesN; ++j) {
                AccVector sums;
#pragma unroll
                for (int e = 0; e < 4; ++e) sums.element[e] = acc[i][j][e];
                partial[partial_offset(window, segment, index, i, j)] = sums;
            }
        }
        return;
    }
    if (SEGMENT_MODE == 3) {
        for_each_sum([&](int i, int j, int e) { acc[i][j][e] = 0.0f; });
#pragma unroll kSegmentsAhead
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
        store_tile(tile_of(block_index_again()), window, epilogue, row_of, kAllTaps, acc);
        return;
    }
    // Rows that lack the last tap multiply zeros by samples outside of their windows. Where that may have made a NaN, the block
    // computes them once more, and then reads the samples of the first tap in their place.
#pragma unroll 1
    for (int missing = 0;; ++missing) {
        Tile tile = tile_of(index);
        tile.row_taps -= missing;
        multiply_tile(tile, window, 0, window.chunks, acc);
        tile = tile_of(block_index_again());
        const index_t stored_taps = missing > 0 ? tile.row_taps - missing : kAllTaps;
        const bool is_finite = store_tile(tile, window, epilogue, row_of, stored_taps, acc);
        if (!kRowsMayDiffer || !tile.rows_differ || missing > 0 || !any_thread(!is_finite)) return;
    }
}
