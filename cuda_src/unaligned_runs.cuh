// Loads runs, neighbouring positions of all channels of a unit, from rows that need not begin or end where a run does.
//
// A row has the positions from 0 to `end`. Positions of a run outside of it are zeros in shared memory.

#pragma once

#include "common.cuh"
#include "edge.cuh"
#include "staging.cuh"

// Which channels of a unit exist: from 0 to `last`, which stands for those behind it. `ends_array` says that the last one is
// that of the whole array.
struct UnitChannels {
    int last;
    bool ends_array;

    __device__ __forceinline__ int at(int e) const { return e < last ? e : last; }
};

// Loads a run from rows that begin at multiples of kAlign positions, in pieces of as many. `from` is its first position, at
// place `first` of the row, of channel 0.
template <int kAlign, int kWidth>
__device__ __forceinline__ void load_run(
    Block<kWidth>& block, const UnitChannels& channels, const storage_t* from, index_t channel_stride, index_t first,
    index_t end) {
    if (kAlign == kWidth) {
        if (is_index(first, end)) {
            block.load_up_to(channels.last, from, channel_stride);
        } else {
            block.clear();
        }
        return;
    }
    constexpr int kPieces = kWidth / kAlign, kWords = RunOf<kAlign>::type::kWords;
    const auto load = [&](int j) {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
            const storage_t* const row = from + (long long)channel_stride * channels.at(e);
            const typename RunOf<kAlign>::type piece = RunOf<kAlign>::type::load(row + j * kAlign);
#pragma unroll
            for (int w = 0; w < kWords; ++w) block.run[e].word[j * kWords + w] = piece.word[w];
        }
    };
    from = keep_in_register_global(from);
    if (is_inside(first, first + kWidth - kAlign, end)) {
#pragma unroll
        for (int j = 0; j < kPieces; ++j) load(j);
        return;
    }
    block.clear();
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
        if (is_index(first + j * kAlign, end)) load(j);
    }
}

// Four neighbouring positions of a unit of 16-bit channels whose rows are an odd number of elements apart. So of each pair of
// channels one row is aligned to words at the run's first position, and the other one is shifted: its words begin a position
// earlier. Five aligned words hold the run of both.
struct ShiftedRuns {
    static constexpr int kPairs = kUnit / 2;
    unsigned aligned[kPairs][2], shifted[kPairs][3];
    index_t first, end;   // the place of the first position in its row, and that behind the row's last one
    bool begins_shifted;  // the shifted channel of each pair is its first one

    __device__ __forceinline__ bool exists(int v) const { return is_index(first + v, end); }

    // All channels of position v side by side.
    __device__ __forceinline__ Vector<unsigned> vector(int v) const {
        // The half of a word of the aligned channel and that of a word of the other one, in the order of the channels.
        const unsigned halves = v % 2 == 0 ? (begins_shifted ? 0x1076 : 0x7610) : (begins_shifted ? 0x3254 : 0x5432);
        Vector<unsigned> x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x.element[i] = permute_bytes(aligned[i % kPairs][v / 2], shifted[i % kPairs][(v + 1) / 2], halves);
        }
        return x;
    }
};

template <int kAlign>
__device__ __forceinline__ void load_run(
    ShiftedRuns& runs, const UnitChannels& channels, const storage_t* from, index_t channel_stride, index_t first,
    index_t end) {
    from = keep_in_register_global(from);
    const bool begins_shifted = (unsigned long long)from % 4 != 0;
    runs.begins_shifted = begins_shifted;
    runs.first = first;
    runs.end = end;
    const storage_t* const first_aligned = from + keep_in_register(begins_shifted ? channel_stride : 0);
    const storage_t* const first_shifted = from + keep_in_register(begins_shifted ? -1 : channel_stride - 1);
    // Pairs of which a channel does not exist have that of another pair in its place.
    const int last_aligned = (channels.last - (begins_shifted ? 1 : 0)) / 2;
    const int last_shifted = (channels.last - (begins_shifted ? 0 : 1)) / 2;
    const auto aligned_of = [&](int i) {
        return keep_in_register_global(
            first_aligned + (long long)channel_stride * (2 * (i < last_aligned ? i : last_aligned)));
    };
    const auto shifted_of = [&](int i) {
        return keep_in_register_global(
            first_shifted + (long long)channel_stride * (2 * (i < last_shifted ? i : last_shifted)));
    };
    // A word is loaded if one of its positions exists. Its other half may lie outside of the row, but not of the array: in
    // front of a shifted row and behind every row but the last one there are other rows.
    const index_t words_end = channels.ends_array || end == 0 ? end : end + 1;
#pragma unroll
    for (int i = 0; i < ShiftedRuns::kPairs; ++i) {
        const storage_t *const aligned = aligned_of(i), *const shifted = shifted_of(i);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (is_index(first + 2 * m + 1, words_end)) runs.aligned[i][m] = Run<2>::load(aligned + 2 * m).word[0];
        }
#pragma unroll
        for (int m = 0; m < 3; ++m) {
            if (is_index(first + 2 * m, words_end)) runs.shifted[i][m] = Run<2>::load(shifted + 2 * m).word[0];
        }
    }
    const index_t last = end - 1 - first;  // position of the run
    if (!channels.ends_array || end == 0 || !is_index(last, 4)) return;
    // The row's last element may begin a word, of which the rest lies behind the array.
#pragma unroll
    for (int i = 0; i < ShiftedRuns::kPairs; ++i) {
        const storage_t *const aligned = aligned_of(i), *const shifted = shifted_of(i);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (last == 2 * m) runs.aligned[i][m] = HalfWord<2>::load(aligned + 2 * m).word[0];
            if (last == 2 * m + 1) runs.shifted[i][m + 1] = HalfWord<2>::load(shifted + 2 * m + 2).word[0];
        }
    }
}

// Stores the vectors of a run where row_of says.
template <typename RowOf>
__device__ __forceinline__ void stage_shifted(const ShiftedRuns& runs, const RowOf& row_of) {
    if (is_inside(runs.first, runs.first + 3, runs.end)) {
#pragma unroll
        for (int v = 0; v < 4; ++v) *row_of(v) = runs.vector(v);
        return;
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) *row_of(v) = runs.exists(v) ? runs.vector(v) : Vector<unsigned>();
}
__device__ __forceinline__ void stage(const ShiftedRuns& runs, Vector<unsigned>* rows, index_t) {
    stage_shifted(runs, [&](int v) { return rows + v; });
}

// The same as stage() with a row of its own for each position, in the order of `rows`.
__device__ __forceinline__ void stage_apart(
    const ShiftedRuns& runs, Vector<unsigned>* unit, const Vector<int>& rows, index_t) {
    stage_shifted(runs, [&](int v) { return unit + rows.element[v]; });
}
__device__ __forceinline__ void stage_apart(
    const Block<4>& block, Vector<unsigned>* unit, const Vector<int>& rows, index_t part_rows) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
        if (kUnit == 8) {
            unit[rows.element[v]] = block.vector(v);
            continue;
        }
        Block<1> position;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) position.run[e].word[0] = block.run[e].word[v % block.run[e].kWords];
        stage(position, unit + rows.element[v], part_rows);
    }
}

// What holds a run of kWidth positions.
template <int kWidth, int kAlign, bool kIsShifted = (kWidth == 4 && kAlign == 1 && kUnit == 8)>
struct RunsOf {
    typedef Block<kWidth> type;
};
template <int kWidth, int kAlign>
struct RunsOf<kWidth, kAlign, true> {
    typedef ShiftedRuns type;
};
