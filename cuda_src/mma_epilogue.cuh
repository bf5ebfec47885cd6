// The end of a block of the tensor-core engine (mma.cuh): sums that are not finite are formed again; bias, activation and
// residual are applied; the results are stored.
//
// The results of a warp pass through shared memory, kSliceRows rows at a time, and are stored 16 bytes at a time where they
// are neighbours in the output.

#pragma once

#include "canonical_sum.cuh"
#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "fragments.cuh"
#include "mma_tile.cuh"
#include "mma_weights.cuh"
#include "row.cuh"

constexpr index_t kAllTaps = -1;  // rows are stored, however many taps they have
constexpr bool kRowsMayDiffer = PHASES_IN_ROWS && NAN_FALLBACK && SEGMENT_MODE < 2;  // in their taps
constexpr int kSliceTiles = kTilesM % 2 == 0 ? 2 : 1;  // of a warp that pass through shared memory at a time in the end
constexpr int kSliceRows = 16 * kSliceTiles;
constexpr int kSlicePitch = kWarpN + 8;  // keeps the lanes of a fragment on different banks; rows may begin up to 8 later
// Elements by which the rows of each further unit of channels begin later, where OUTPUT_LAST: so lanes that read neighbouring
// units of one position meet on different banks.
constexpr int kSliceSkew = !OUTPUT_LAST ? 0 : kUnit == 8 ? 16 : 4;
constexpr int kLaneVectors = kWarpN / kUnit > 8 ? 2 : 1;  // of a row, that one lane stores in the end
// Rounded up.
__device__ constexpr int log2_of(int n) { return n < 2 ? 0 : 1 + log2_of((n + 1) / 2); }

// A row of a slice: its bias, where column 0 lies among the slice's elements, the distance to the next column, and the taps.
// The rows of a channel, its phases, are interleaved as they are in the output, or lie apart where their results do.
struct alignas(16) SliceRow {
    acc_t bias;
    int place, step, taps;
};
// The whole vectors that the lanes of a row copy from the slice to the output, and the elements in front of and behind them.
struct alignas(16) Piece {
    index_t to;  // elements, from Tile::output
    int from;    // bytes, in the slice
    int vectors;
    int ends;  // head, and the rest behind the vectors in the upper half
};
// A row whose results are stored element by element.
struct alignas(16) ApartRow {
    index_t to;     // elements, from Tile::output to the result of l = shift
    index_t shift;  // Row::shift; kMissing where it has none to store
    int place;      // of column 0 among the slice's elements; the next ones follow
};
static_assert(sizeof(ApartRow) <= sizeof(Piece), "SLICE_TABLE_BYTES differs from gpuconv/families/mma_tiles.py");
static_assert(sizeof(SliceRow) + sizeof(Piece) <= 48, "SLICE_TABLE_BYTES differs from gpuconv/families/mma_tiles.py");
struct Slice {
    storage_t element[kSliceRows * kSlicePitch + (kSliceRows / kUnit - 1) * kSliceSkew];
    SliceRow row[kSliceRows];
#if !OUTPUT_LAST
    union {
        Piece piece[kSliceRows];
        ApartRow apart[kSliceRows];
    };
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
    bool is_apart;  // its results are no neighbours in the output, not even with those of the channel's other rows
};

// Elements of a vector that lie in front of output[offset], a vector being aligned to its own size.
__device__ __forceinline__ int elements_before(const storage_t* output, index_t offset) {
    const unsigned address = unsigned(reinterpret_cast<unsigned long long>(output) / sizeof(storage_t));
    return int((address + unsigned(offset)) % kUnit);
}

template <typename RowOf>
__device__ __forceinline__ MyRow my_row(
    const Tile& tile, const Window& window, const RowOf& row_of, index_t row_begin, index_t column_begin,
    index_t stored_taps) {
    const int row = threadIdx.x % kSliceRows;
    MyRow mine;
    mine.info = row_of(tile, row_begin + row);
    const bool are_some = kRowsMayDiffer && stored_taps != kAllTaps;
    mine.exists = row_begin + row < tile.rows && (!are_some || mine.info.taps == stored_taps);
    // Of several samples pieces of less than two vectors are not worth the effort.
    mine.is_apart = are_some || tile.output_stride_l != 1 ||
        (HAS_SAMPLES && window.block_positions * tile.output_step < 2 * kUnit);
    mine.first = row;
    mine.count = 1;
    if (PHASES_IN_ROWS) {
        const index_t channel = row - (mine.info.shift - tile.first_phase);  // its first row, perhaps in front of the slice
        mine.first = int(max_index(channel, 0));
        mine.count = int(min_index(channel + tile.phases, kSliceRows)) - mine.first;
    }
    mine.is_apart = mine.is_apart || mine.count != tile.output_step;
    if (PHASES_IN_ROWS && mine.is_apart) {
        mine.first = row;
        mine.count = 1;
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
        const acc_t sum = canonical_sum(
            tile.input + sample * tile.input_stride_n, q * tile.column_step + tile.first, tile.tap_step, at.taps, tile,
            TileWeights(tile, window, row_begin + row));
        if (!kIsFused) {
            *value = finish(sum, epilogue.channel(0, at.bias), nullptr);
            continue;
        }
        // The compiler must not make two loops of this one, with and without bias.
        Epilogue kept = epilogue;
        kept.bias = keep_in_register(kept.bias);
        const Row info = row_of(tile, row_begin + row);
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

// Stores element by element what are no neighbours in the output, of rows whose lanes say so. Lanes take neighbouring columns,
// whose results share sectors of memory, or a row each where the columns of a row are further apart.
__device__ __forceinline__ void store_apart(
    const Tile& tile, const Window& window, const MyRow& mine, bool is_stored, Slice* slice, index_t column_begin) {
    const int lane = threadIdx.x % 32;
    if (kSliceRows == 32 || lane < kSliceRows) {
        const index_t shift = mine.info.shift;
        slice->apart[lane] = ApartRow{
            mine.info.output_offset + shift * tile.output_stride_l, is_stored ? shift : kMissing, mine.place};
    }
    __syncwarp();
    const bool are_columns_near = tile.output_stride_l == 1;
    const int column_lanes = are_columns_near ? 32 : 32 / kSliceRows;
#pragma unroll 1
    for (int i = are_columns_near ? lane : lane / kSliceRows; i < kWarpN; i += column_lanes) {
        const index_t column = column_begin + i, sample = HAS_SAMPLES ? column / window.block_positions : 0;
        const index_t q = tile.position_begin + (column - sample * window.block_positions);
        const index_t l = q * tile.output_step + tile.output_first;
        if (q >= tile.positions || sample >= (HAS_SAMPLES ? min_index(window.block_samples, tile.samples) : 1)) continue;
        const index_t to = sample * tile.output_stride_n + l * tile.output_stride_l;
        const auto store = [&](int row) {
            const ApartRow at = slice->apart[row];
            const storage_t value = slice->element[at.place + i];
            if (uindex_t(l) + uindex_t(at.shift) < uindex_t(tile.L_out)) tile.output[at.to + to] = value;
        };
        if (!are_columns_near) {
            store(lane % kSliceRows);
            continue;
        }
#pragma unroll(PHASES_IN_ROWS ? 4 : 1)
        for (int row = 0; row < kSliceRows; ++row) store(row);
    }
    __syncwarp();
}

__device__ __forceinline__ void store_slice(
    const Tile& tile, const Window& window, const MyRow& mine, Slice* slice, index_t, index_t column_begin) {
    const bool is_apart = mine.exists && mine.is_apart, is_whole = mine.exists && !mine.is_apart;
    if (any_lane(is_apart)) store_apart(tile, window, mine, is_apart, slice, column_begin);
    if (!any_lane(is_whole)) return;
    constexpr int kLaneBits = log2_of(kWarpN / kUnit / kLaneVectors);  // where a row is all of one sample
    if (!HAS_SAMPLES) {
        const index_t q = tile.position_begin + column_begin;
        const int columns = int(min_index(kWarpN, max_index(tile.positions - q, 0)));
        store_neighbours(tile, mine, is_whole, slice, 0, columns, 0, q, kLaneBits);
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
        store_neighbours(tile, mine, is_whole, slice, first, end, sample, q, lane_bits);
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

// Stores the sums of a block, of rows with stored_taps taps or of all; row_of(tile, row) is the kernel's Row. A warp stores
// kSliceRows rows at a time; after each, the rest of `acc` moves up, so that one loop body serves all rows. The result is
// whether the warp's results are all finite.
template <typename RowOf>
__device__ __forceinline__ bool store_tile(
    Tile tile, const Window& window, const Epilogue& epilogue, const RowOf& row_of, index_t stored_taps, Sums& acc) {
    const int warp = warp_index(), lane = threadIdx.x % 32;
    Slice* const slice = keep_in_register_shared(reinterpret_cast<Slice*>(dynamic_shared_memory()) + warp);
    tile.output = keep_in_register_global(tile.output);
    const index_t column_begin = warp % WARPS_N * kWarpN;
    index_t row_begin = tile.row_begin + warp / WARPS_N * kWarpM;
    bool is_finite = true;
#pragma unroll 1
    for (int i = 0; i < kTilesM && row_begin < tile.rows; i += kSliceTiles, row_begin += kSliceRows) {
        const MyRow mine = my_row(tile, window, row_of, row_begin, column_begin, stored_taps);
        const acc_t bias = kIsFused ? scalar::zero() : epilogue.bias_of(mine.exists ? mine.info.channel : 0);
        if (kSliceRows == 32 || lane < kSliceRows) {
            slice->row[lane] = SliceRow{bias, mine.place, mine.count, int(mine.info.taps)};
        }
        __syncwarp();
        bool sum_again = false;
#pragma unroll 1
        for (int tiles = 0; tiles < kSliceTiles; ++tiles) {  // in turn, so that one loop body serves both
            if (kIsFused) apply_fused(tile, window, epilogue, row_of, row_begin + tiles * 16, column_begin, acc);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const SliceRow row = slice->row[tiles * 16 + half * 8 + lane / 4];
                const int step = PHASES_IN_ROWS ? row.step : 1;
                storage_t* const to = slice->element + (row.place + lane % 4 * 2 * step);
                Vector<storage_t, 2> pairs[kTilesN];
                acc_t check = scalar::zero();
#pragma unroll
                for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        pairs[j].element[e] = finish_or_nan(acc[0][j][half * 2 + e], row.bias, &check);
                    }
                }
                sum_again = sum_again || is_nan(check);
                if (!PHASES_IN_ROWS) {  // else the stride is at least 2: the rows of a single phase are channels
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
            if (kSliceTiles == 2) copy_second_tile(acc);
        }
        sum_again = NAN_FALLBACK && any_lane(sum_again);
        is_finite = is_finite && !sum_again;
        __syncwarp();
        if (sum_again) sum_marked_again(tile, window, epilogue, row_of, slice, row_begin, column_begin);
        store_slice(tile, window, mine, slice, row_begin, column_begin);
        __syncwarp();
        move_sums_up<kSliceTiles>(acc);
    }
    return is_finite;
}
