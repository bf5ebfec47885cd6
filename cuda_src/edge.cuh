// Which of a row's L samples a position means, inside the row and outside.
//
// Padding is by zeros: a position outside [0, L) has no sample, and sums leave out its terms. Only this file knows that.
// A kernel asks for one position by source_index; it asks for many at once by is_inside, where it then reads whole spans,
// or by existing_range, where it then visits only those that exist.

#pragma once

#include "common.cuh"

// Positions outside have no samples, so that neighbours which all lie outside may be filled with zeros at once.
constexpr bool kIsEmptyOutside = true;

struct Source {
    bool exists;
    index_t index;  // of the sample
    index_t moved;  // index - position, for kernels that already have the address of the position
};

// What a position means. Where L is 0 no sample exists.
__device__ __forceinline__ Source source_index(index_t position, index_t L) {
    return Source{is_index(position, L), position, 0};
}

// Whether every position from first to last means the sample of the same index.
__device__ __forceinline__ bool is_inside(index_t first, index_t last, index_t L) { return first >= 0 && last < L; }

// Whether this position or any below it has a sample.
__device__ __forceinline__ bool exists_down(index_t position) { return position >= 0; }

struct Range {
    index_t begin, end;
};

// The numbers i < count for which position first + i*step has a sample, where step > 0.
__device__ __forceinline__ Range existing_range(index_t first, index_t step, index_t count, index_t L) {
    return Range{
        first < 0 ? ceil_div(-first, step) : 0,
        first < L ? min_index(count, ceil_div(L - first, step)) : 0};
}

// The same for positions that fall, first - i*step, where count > 0.
__device__ __forceinline__ Range existing_range_down(index_t first, index_t step, index_t count, index_t L) {
    Range range = {0, 0};
    if (first >= 0) {
        range.end = min_index(count, first / step + 1);
        if (first >= L) range.begin = ceil_div(first - L + 1, step);
    }
    return range;
}
