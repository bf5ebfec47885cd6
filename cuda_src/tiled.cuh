// The register-tiled matrix product behind conv1d_tiled and conv_transpose1d_phases.
//
// Per group, both operations are a product of a weight matrix [rows, R] and an input matrix [R, columns] that is never
// formed: R = (c_in, tap) with the tap inner, which is the canonical order of summation; a column is one position q of
// one sample, and element (c_in, tap) of column (n, q) is input[n, c_in, q*column_step + first + tap*tap_step]. A block
// computes BLOCK_M rows by BLOCK_N columns (register_tile.cuh). The weights come packed (pack_weight.cu), in the order in
// which blocks read them and with zeros behind the last row and term.
//
// Terms outside the input are multiplied as zeros. For finite weights this changes no bit (see bias_or_zero in
// common.cuh); an infinite or NaN weight times such a zero makes a NaN out of nothing, so a thread that meets a NaN
// computes all results of its columns again without the missing terms, as the base families do.
//
// COLUMN_STEP > 0 says that a block's columns belong to one sample, that the input is contiguous along l, and that
// column_step has this value, so that one address serves a thread's columns. COLUMN_STEP = 0 says nothing: columns run
// through the samples, which fills blocks where samples are short.
//
// Macros read: COLUMN_STEP, SHARED_BYTES, and those of register_tile.cuh.

constexpr int kColumns = BLOCK_N / 32;         // columns that a lane loads and stores: lane, lane + 32, ...
constexpr int kInputTerms = BLOCK_R / kWarps;  // terms of a chunk that a warp loads for all columns
constexpr int kWeightVectors = BLOCK_M * BLOCK_R / kVec;  // of a chunk
constexpr int kBuffer = BLOCK_R * (BLOCK_M + BLOCK_N);
constexpr int kShared = 2 * kBuffer > kWarps * kSlice ? 2 * kBuffer : kWarps * kSlice;
constexpr bool kOneSample = COLUMN_STEP > 0;

static_assert(BLOCK_R % kWarps == 0, "warps load whole terms of a chunk: gpuconv/families/tiles.py");
static_assert(kShared * sizeof(acc_t) == SHARED_BYTES, "SHARED_BYTES differs from gpuconv/families/tiles.py");

// One block's share of the product. Offsets and strides are in elements.
struct Tile {
    const storage_t* input;   // input[n0, first channel of the group, 0], n0 = 0 unless kOneSample
    const acc_t* weight;      // packed weights of row 0, term 0
    storage_t* output;        // output[n0, first channel of the group, 0]
    index_t group;
    index_t row_begin, rows;  // the block's first row, and the rows of the whole product
    index_t column_begin, columns;  // the block's first column, and the columns of sample n0 or of all samples
    index_t positions;              // columns of one sample
    index_t C_in_g, taps, L_in, L_out;
    index_t row_taps;  // of taps, those that every row of the block has, where rows do not differ
    index_t column_step, first, tap_step;  // l_in = q*column_step + first + tap*tap_step
    index_t output_step, output_first;     // l_out = q*output_step + output_first + Row::shift
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_pitch;  // from one term to the next
    // How the tap and the input's address move when r grows by kWarps; input_carry more where the tap passes the last.
    index_t taps_advance, input_advance, input_carry;
    index_t output_stride_n, output_stride_l;
};

// What a kernel knows of a row of the product; row_of(tile, row) returns it.
struct Row {
    index_t taps;           // of Tile::taps, those that the row has
    index_t output_offset;  // of its channel, from Tile::output
    index_t shift;          // see Tile::output_first
    index_t bias_offset;
};

// A term (c_in, tap) of R that moves on by kWarps terms, and the input's address for it.
struct Walk {
    index_t tap;
    const storage_t* address;

    __device__ __forceinline__ void start(index_t r, const storage_t* base, const Tile& tile) {
        const index_t c_in = r / tile.taps;
        tap = r - c_in * tile.taps;
        address = base + (c_in * tile.input_stride_c + tap * tile.tap_step * tile.input_stride_l);
    }
    __device__ __forceinline__ void advance(const Tile& tile) {
        tap += tile.taps_advance;
        address += tile.input_advance;
        if (tap >= tile.taps) {
            tap -= tile.taps;
            address += tile.input_carry;
        }
    }
};

// Stores the sums of a block.
template <typename RowOf>
__device__ __forceinline__ void store_tile(
    const Tile& tile, const storage_t* bias, const RowOf& row_of, const acc_t (&acc)[THREAD_M][THREAD_N]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    index_t l_out[kColumns];          // of shift 0, and L_out behind the last column: shifts only go up
    index_t output_offset[kColumns];  // of that position, from Tile::output
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        const index_t column = tile.column_begin + lane + 32 * j;
        const index_t n = kOneSample ? 0 : column / tile.positions;
        l_out[j] = (column - n * tile.positions) * tile.output_step + tile.output_first;
        output_offset[j] = n * tile.output_stride_n + l_out[j] * tile.output_stride_l;
        if (column >= tile.columns) l_out[j] = tile.L_out;
    }
    bool met_nan = false;
    store_rows(acc, tile.row_begin, tile.rows, [&](index_t row, const acc_t* values) {
        const Row info = row_of(tile, row);
        const acc_t offset = bias_or_zero(bias, info.bias_offset);
        storage_t* const y = tile.output + (info.output_offset + info.shift * tile.output_stride_l);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const acc_t value = values[lane + 32 * j];
            const index_t l = l_out[j] + info.shift;
            if (l >= 0 && l < tile.L_out) {
                y[output_offset[j]] = scalar::round(add(value, offset));
                met_nan = met_nan || is_nan(value);
            }
        }
    });
    if (!met_nan) return;

    // -- the rare way out: all results of this lane's columns are summed again, without the terms that are missing -----
#pragma unroll 1
    for (int e = 0; e < kWarpRows * kColumns; ++e) {
        const index_t row = tile.row_begin + warp * kWarpRows + e / kColumns;
        const index_t column = tile.column_begin + lane + 32 * (e % kColumns);
        if (row >= tile.rows || column >= tile.columns) continue;
        const Row info = row_of(tile, row);
        const index_t n = kOneSample ? 0 : column / tile.positions, q = column - n * tile.positions;
        const index_t l = q * tile.output_step + tile.output_first + info.shift;
        if (l < 0 || l >= tile.L_out) continue;
        const storage_t* const x = tile.input + n * tile.input_stride_n;
        const acc_t* w = tile.weight + row;
        acc_t sum = scalar::zero();
        for (index_t c_in = 0; c_in < tile.C_in_g; ++c_in) {
            for (index_t tap = 0; tap < tile.taps; ++tap, w += tile.weight_pitch) {
                const index_t l_in = q * tile.column_step + tile.first + tap * tile.tap_step;
                if (tap >= info.taps || l_in < 0 || l_in >= tile.L_in) continue;
                const storage_t value = x[c_in * tile.input_stride_c + l_in * tile.input_stride_l];
                sum = multiply_add(*w, scalar::load(value), sum);
            }
        }
        tile.output[info.output_offset + n * tile.output_stride_n + l * tile.output_stride_l] =
            scalar::round(add(sum, bias_or_zero(bias, info.bias_offset)));
    }
}

// tile_of(block index) is the kernel's reading of its grid.
template <typename TileOf, typename RowOf>
__device__ __forceinline__ void multiply_tile(const TileOf& tile_of, const storage_t* bias, const RowOf& row_of) {
    const Tile tile = tile_of(blockIdx.x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const index_t R = tile.C_in_g * tile.taps;

    // -- what this thread loads of a chunk: kInputTerms terms of kColumns columns, and vectors of weights ------------
    index_t position[kOneSample ? 1 : kColumns];         // l_in of tap 0
    index_t position_offset[kOneSample ? 1 : kColumns];  // of that position, from Tile::input
    const auto position_of = [&](int j) { return kOneSample ? position[0] + j * 32 * COLUMN_STEP : position[j]; };
    bool inside = true;  // all terms of all these columns exist
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        if (j == 0 || !kOneSample) {
            // A column behind the last one repeats it: its loads are valid and its results are not stored.
            const index_t column = min_index(tile.column_begin + lane + 32 * j, tile.columns - 1);
            const index_t n = kOneSample ? 0 : column / tile.positions;
            position[j] = (column - n * tile.positions) * tile.column_step + tile.first;
            position_offset[j] = n * tile.input_stride_n + position[j] * tile.input_stride_l;
        }
        const index_t last = position_of(j) + (tile.taps - 1) * tile.tap_step;
        inside = inside && min_index(position_of(j), last) >= 0 && max_index(position_of(j), last) < tile.L_in;
    }
    const storage_t* const input_base = tile.input + (kOneSample ? position_offset[0] : 0);
    Walk input_walk;
    input_walk.start(warp, input_base, tile);
    const acc_t* weight = tile.weight + tile.row_begin;

    // Terms behind the last are not loaded: they are never multiplied.
    const auto load_chunk = [&](acc_t* buffer, index_t r) {
#pragma unroll
        for (int i = 0; i < kInputTerms; ++i) {
            if (r + warp + i * kWarps >= R) break;
            const storage_t* const x = input_walk.address;
            acc_t* const row = buffer + BLOCK_R * BLOCK_M + (warp + i * kWarps) * BLOCK_N + lane;
            if (inside) {
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    scalar::copy_to_shared(row + 32 * j, x + (kOneSample ? j * 32 * COLUMN_STEP : position_offset[j]));
                }
            } else {
                const index_t shift = input_walk.tap * tile.tap_step;
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    const index_t l_in = position_of(j) + shift;
                    acc_t value = scalar::zero();
                    if (l_in >= 0 && l_in < tile.L_in) {
                        value = scalar::load(x[kOneSample ? j * 32 * COLUMN_STEP : position_offset[j]]);
                    }
                    row[32 * j] = value;
                }
            }
            input_walk.advance(tile);
        }
#pragma unroll
        for (int first = 0; first < kWeightVectors; first += kThreads) {
            const int vector = first + threadIdx.x;
            if (kWeightVectors % kThreads != 0 && vector >= kWeightVectors) break;
            const int term = vector / (BLOCK_M / kVec), row = vector % (BLOCK_M / kVec) * kVec;
            copy_async(
                reinterpret_cast<Vector*>(buffer + term * BLOCK_M + row),
                reinterpret_cast<const Vector*>(weight + term * tile.weight_pitch + row));
        }
        weight += BLOCK_R * tile.weight_pitch;
    };

    acc_t acc[THREAD_M][THREAD_N];
    multiply_chunks<BLOCK_M, BLOCK_N>(
        R, load_chunk, [](acc_t w, acc_t x, acc_t sum) { return multiply_add(w, x, sum); }, acc);
    store_tile(tile_of(block_index_again()), bias, row_of, acc);
}
