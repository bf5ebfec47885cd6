// The register-tiled matrix product of conv1d_tiled and conv_transpose1d_phases.
//
// Per group, both operations are a product of a weight matrix [rows, R] and an input matrix [R, columns] that is never
// formed: R = (c_in, tap) with the tap inner, which is the canonical order of summation; a column is one position q of
// one sample, and element (c_in, tap) of column (n, q) is input[n, c_in, q*column_step + first + tap*tap_step]. A block
// computes BLOCK_M rows by BLOCK_N columns (register_tile.cuh). Chunks of BLOCK_R terms pass through two buffers of
// shared memory: the next chunk is loaded while one is multiplied. The weights come packed (pack_weight.cu), in the
// order in which blocks read them and with zeros behind the last row and term.
//
// Terms outside the input are multiplied as zeros; canonical_sum.cuh explains what follows from that. A thread that gets a
// NaN sums all results of its columns again.
//
// COLUMN_STEP > 0: a block's columns belong to one sample, the input is contiguous along l, and column_step has this value, so
// that a thread's columns share one address. COLUMN_STEP = 0: none of this need hold; columns run through the samples, which
// fills blocks if samples are short.
//
// Macros read: COLUMN_STEP, TERM_LANES, UNROLL_R, SHARED_BYTES, and those of register_tile.cuh.

#pragma once

#include "canonical_sum.cuh"
#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "register_tile.cuh"
#include "row.cuh"

constexpr bool kOneSample = COLUMN_STEP > 0;
// TERM_LANES threads load a term of a chunk, each the columns that lie TERM_LANES apart.
constexpr int kLoadColumns = BLOCK_N / TERM_LANES;
constexpr int kTermsAtOnce = kThreads / TERM_LANES;
constexpr int kWeightVectors = BLOCK_M * BLOCK_R / kAccVec;  // of a chunk
// A thread loads kMyVectors of them, kVectorStep apart, so that their offsets fit into an instruction.
constexpr int kMyVectors = kWeightVectors < kThreads ? 1 : kWeightVectors / kThreads;
constexpr int kVectorStep = kThreads < 64 ? kThreads : 64;
constexpr int kColumns = BLOCK_N / 32;  // columns that a lane stores: lane, lane + 32, ...
constexpr int kBuffer = BLOCK_R * (BLOCK_M + BLOCK_N);
constexpr int kShared = 2 * kBuffer > kWarps * kSlice ? 2 * kBuffer : kWarps * kSlice;

static_assert(BLOCK_N % TERM_LANES == 0, "threads share a term: gpuconv/families/tiles.py");
static_assert(BLOCK_R % kTermsAtOnce == 0, "threads share a chunk: gpuconv/families/tiles.py");
static_assert(kWeightVectors <= kThreads || kWeightVectors % kThreads == 0, "threads share the weights");
static_assert(BLOCK_R % UNROLL_R == 0, "a chunk is a whole number of steps: gpuconv/families/tiles.py");
static_assert(kShared * sizeof(acc_t) == SHARED_BYTES, "SHARED_BYTES differs from gpuconv/families/tiles.py");

// One block's share of the product. Offsets and strides are in elements.
struct Tile {
    const storage_t* input;
    index_t input_begin;      // offset of input[n0, first channel of the group, 0], n0 = 0 unless kOneSample
    const acc_t* weight;      // packed weights of the block's rows: [term][BLOCK_M]
    storage_t* output;        // output[n0, first channel of the group, 0]
    index_t group;
    index_t row_begin, rows;  // the block's first row, and the rows of the whole product
    index_t column_begin, columns;  // the block's first column, and the columns of sample n0 or of all samples
    index_t positions;              // columns of one sample
    index_t n_begin, q_begin;       // of the block's first column, where columns run through the samples
    index_t C_in_g, taps, L_in, L_out;
    index_t row_taps;  // of `taps`, those that each row has, if all rows have the same
    index_t column_step, first, tap_step;  // l_in = q*column_step + first + tap*tap_step
    index_t output_step, output_first;     // l_out = q*output_step + output_first + Row::shift
    index_t input_stride_n, input_stride_c, input_stride_l;
    // How the tap and the input's offset advance when r grows by kTermsAtOnce; the offset by input_carry more where the tap
    // passes the last one.
    index_t taps_advance, input_advance, input_carry;
    index_t output_stride_n, output_stride_l;

    __device__ __forceinline__ void find_samples() {
        n_begin = kOneSample ? 0 : column_begin / positions;
        q_begin = column_begin - n_begin * positions;
    }
};

// What Params of all kernels have in common.
template <typename P>
__device__ __forceinline__ Tile tile_with_layout(const P& p) {
    Tile tile;
    tile.C_in_g = p.C_in_g;
    tile.L_in = p.L_in;
    tile.L_out = p.L_out;
    tile.input_stride_n = p.input_stride_n;
    tile.input_stride_c = p.input_stride_c;
    tile.input_stride_l = kOneSample ? 1 : p.input_stride_l;
    tile.taps_advance = p.taps_advance;
    tile.input_advance = p.input_advance;
    tile.input_carry = p.input_carry;
    tile.output_stride_n = p.output_stride_n;
    tile.output_stride_l = p.output_stride_l;
    return tile;
}

// The sample and the position in it of a column.
struct Column {
    index_t n, q;

    // Of the block's column `at`; a column behind the last repeats it.
    __device__ __forceinline__ void find(const Tile& tile, int at) {
        if (kOneSample) {
            n = 0;
            q = tile.column_begin + at;
            return;
        }
        n = tile.n_begin;
        q = tile.q_begin + min_index(at, tile.columns - 1 - tile.column_begin);
        if (tile.positions > BLOCK_N) {
            if (q >= tile.positions) {
                q -= tile.positions;
                ++n;
            }
        } else {
            const unsigned samples = unsigned(q) / unsigned(tile.positions);  // q < positions + BLOCK_N
            q -= samples * tile.positions;
            n += samples;
        }
    }
};

// The packed weights of one row, for canonical_sum.
struct PackedWeights : EveryWeight {
    const acc_t* weight;
    index_t taps;  // of Tile::taps, those that the row has

    __device__ __forceinline__ PackedWeights(const acc_t* weight, index_t taps) : weight(weight), taps(taps) {}
    __device__ __forceinline__ bool has(index_t, index_t tap) const { return tap < taps; }
    __device__ __forceinline__ acc_t load(index_t, index_t) const { return *weight; }
    __device__ __forceinline__ void next_tap() { weight += BLOCK_M; }
};

// Stores the sums of a block. row_of(tile, row) is the kernel's Row.
template <typename RowOf>
__device__ __forceinline__ void store_tile(
    const Tile& tile, const Epilogue& epilogue, const RowOf& row_of, acc_t (&acc)[THREAD_M][THREAD_N]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    index_t l_out[kColumns];          // of shift 0, and L_out behind the last column: shifts only go up
    index_t output_offset[kColumns];  // of that position, from Tile::output
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        Column column;
        column.find(tile, lane + 32 * j);
        l_out[j] = column.q * tile.output_step + tile.output_first;
        output_offset[j] = column.n * tile.output_stride_n + l_out[j] * tile.output_stride_l;
        if (tile.column_begin + lane + 32 * j >= tile.columns) l_out[j] = tile.L_out;
    }
    bool sum_again = false;
    store_rows(acc, tile.row_begin, tile.rows, [&](index_t row, const acc_t* values) {
        const Row info = row_of(tile, row);
        const Channel channel = epilogue.channel(info.channel);
        storage_t* const y = tile.output + (info.output_offset + info.shift * tile.output_stride_l);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const acc_t value = values[lane + 32 * j];
            sum_again = sum_again || needs_canonical_sum(value);
            storage_t* const place = y + output_offset[j];
            if (is_index(l_out[j] + info.shift, tile.L_out)) *place = finish(value, channel, place);
        }
    });
    if (!sum_again) return;
#pragma unroll 1
    for (int e = 0; e < kWarpRows * kColumns; ++e) {
        const int row = warp * kWarpRows + e / kColumns, at = lane + 32 * (e % kColumns);
        if (tile.row_begin + row >= tile.rows || tile.column_begin + at >= tile.columns) continue;
        const Row info = row_of(tile, tile.row_begin + row);
        Column column;
        column.find(tile, at);
        const index_t l = column.q * tile.output_step + tile.output_first + info.shift;
        if (!is_index(l, tile.L_out)) continue;
        const acc_t sum = canonical_sum(
            tile.input + (tile.input_begin + column.n * tile.input_stride_n),
            column.q * tile.column_step + tile.first, tile.tap_step, tile.taps, tile,
            PackedWeights(tile.weight + row, info.taps));
        storage_t* const place =
            tile.output + (info.output_offset + column.n * tile.output_stride_n + l * tile.output_stride_l);
        *place = finish(sum, epilogue.channel(info.channel), place);
    }
}

// tile_of(block index) gives the tile of a block of the kernel's grid.
template <typename TileOf, typename RowOf>
__device__ __forceinline__ void multiply_tile(const TileOf& tile_of, const Epilogue& epilogue, const RowOf& row_of) {
    const Tile tile = tile_of(blockIdx.x);
    acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int lane_m = lane / kLanesN, lane_n = lane % kLanesN;

    // This thread loads of a chunk the terms first_term, first_term + kTermsAtOnce, ... of kLoadColumns columns, and
    // vectors of weights.
    const int first_term = threadIdx.x / TERM_LANES, first_column = threadIdx.x % TERM_LANES;
    index_t position[kOneSample ? 1 : kLoadColumns];         // l_in of tap 0
    index_t position_offset[kOneSample ? 1 : kLoadColumns];  // of that position, from input_begin
#pragma unroll
    for (int j = 0; j < (kOneSample ? 1 : kLoadColumns); ++j) {
        Column column;
        column.find(tile, first_column + j * TERM_LANES);
        position[j] = column.q * tile.column_step + tile.first;
        position_offset[j] = column.n * tile.input_stride_n + position[j] * tile.input_stride_l;
    }
    // The term (c_in, tap) that is loaded next, and the offset of its input, in column 0 or where l is 0.
    const int c_in = tile.taps > kTermsAtOnce ? 0 : unsigned(first_term) / unsigned(tile.taps);
    index_t tap = first_term - c_in * tile.taps;
    index_t offset = tile.input_begin + (kOneSample ? position_offset[0] : 0) + c_in * tile.input_stride_c +
                     tap * tile.tap_step * tile.input_stride_l;

    const index_t R = tile.C_in_g * tile.taps;
    const int first_vector = threadIdx.x / kVectorStep * kVectorStep * kMyVectors + threadIdx.x % kVectorStep;
    // The end of the weights: the remaining terms are counted back from there.
    const AccVector* const weight_end = keep_in_register(
        reinterpret_cast<const AccVector*>(tile.weight + (R - first_term) * BLOCK_M) + first_vector);
    AccVector* weight_to = keep_in_register_shared(reinterpret_cast<AccVector*>(shared) + first_vector);
    acc_t* input_to = keep_in_register_shared(shared + (BLOCK_R * BLOCK_M + first_term * BLOCK_N + first_column));
    index_t my_rest = R - first_term;  // from this thread's first term to the last that is to be loaded

    const auto load_chunk = [&]() {
#pragma unroll
        for (int i = 0; i < BLOCK_R; i += kTermsAtOnce) {
            const index_t shift = tap * tile.tap_step;
            const storage_t* const x = tile.input + offset;
#pragma unroll
            for (int j = 0; j < kLoadColumns; ++j) {
                const int step = j * TERM_LANES * COLUMN_STEP;
                const Source source =
                    source_index((kOneSample ? position[0] + step : position[j]) + shift, tile.L_in);
                const storage_t* const from = kOneSample ? x + step : tile.input + (offset + position_offset[j]);
                scalar::copy_to_shared(
                    input_to + (i * BLOCK_N + j * TERM_LANES), from + source.moved * tile.input_stride_l,
                    my_rest > i && source.exists);
            }
            tap += tile.taps_advance;
            offset += tile.input_advance;
            if (tap >= tile.taps) {
                tap -= tile.taps;
                offset += tile.input_carry;
            }
        }
        const AccVector* const weight = weight_end - my_rest * (BLOCK_M / kAccVec);
        if (kWeightVectors >= kThreads || threadIdx.x < kWeightVectors) {
#pragma unroll
            for (int v = 0; v < kMyVectors; ++v) copy_async(weight_to + v * kVectorStep, weight + v * kVectorStep);
        }
    };

    acc_t acc[THREAD_M][THREAD_N];
    clear(acc);
    // Each round loads a chunk into one buffer and multiplies the previous one in the other; the first round only loads, the
    // last only multiplies. A chunk is multiplied UNROLL_R terms at a time; its terms behind the last one are zeros.
    const int chunk_m = BLOCK_R * BLOCK_M / kAccVec, chunk_n = BLOCK_R * BLOCK_N / kAccVec;
    int other = kBuffer / kAccVec;  // from the buffer that is loaded to the other
    // After a round these point behind the chunk.
    const AccVector* w = keep_in_register_shared(
        reinterpret_cast<const AccVector*>(shared + kBuffer + warp * kWarpRows) + lane_m + chunk_m);
    const AccVector* x =
        keep_in_register_shared(reinterpret_cast<const AccVector*>(shared + kBuffer) + chunk_m + lane_n + chunk_n);
    int terms = 0;  // that are ready in the other buffer
    for (index_t rest = R;; rest -= BLOCK_R) {
        if (rest > 0) load_chunk();
#pragma unroll 1
        for (; terms > 0; terms -= UNROLL_R) {
#pragma unroll
            for (int i = 0; i < UNROLL_R; ++i) {
                multiply_term(
                    w + i * (BLOCK_M / kAccVec), x + i * (BLOCK_N / kAccVec),
                    [](acc_t weight, acc_t input, acc_t sum) { return multiply_add(weight, input, sum); }, acc);
            }
            w += UNROLL_R * (BLOCK_M / kAccVec);
            x += UNROLL_R * (BLOCK_N / kAccVec);
        }
        if (rest <= 0) break;
        copy_async_wait();
        __syncthreads();
        terms = int(min_index(BLOCK_R, rest));
        my_rest -= BLOCK_R;
        input_to += other * kAccVec;
        weight_to += other;
        w += -other - chunk_m;
        x += -other - chunk_n;
        other = -other;
    }
    __syncthreads();

    store_tile(tile_of(block_index_again()), epilogue, row_of, acc);
}
