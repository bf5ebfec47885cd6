// Which of a row's L samples a position inside or outside the row stands for.
//
// PADDING_MODE is the padding mode, zeros by default. With zeros, positions outside [0, L) have no sample, and sums leave out
// their terms; with the other modes they stand for other samples of the row. Only this file implements the modes. Kernels
// look up one position by source_index. For many positions they use is_inside before reading whole spans, or existing_range
// to visit only positions that exist.

#pragma once

#include "common.cuh"

#ifndef PADDING_MODE
#define PADDING_MODE zeros
#endif

// The padding modes: the index that a position outside the row stands for. For positions further outside than the mode allows,
// which kernels may load beyond the problem, it is not an index of the row, and no sample exists.
namespace padding {

struct zeros {
    static constexpr bool kIsEmpty = true;
    static __device__ __forceinline__ index_t index(index_t position, index_t) { return position; }
};
struct reflect {
    static constexpr bool kIsEmpty = false;
    static __device__ __forceinline__ index_t index(index_t position, index_t L) {
        return position < 0 ? -position : L - 1 - (position - (L - 1));
    }
};
struct symmetric {
    static constexpr bool kIsEmpty = false;
    static __device__ __forceinline__ index_t index(index_t position, index_t L) {
        return position < 0 ? -1 - position : L - 1 - (position - L);
    }
};
struct replicate {
    static constexpr bool kIsEmpty = false;
    static __device__ __forceinline__ index_t index(index_t position, index_t L) { return position < 0 ? 0 : L - 1; }
};
struct circular {
    static constexpr bool kIsEmpty = false;
    static __device__ __forceinline__ index_t index(index_t position, index_t L) {
        return position < 0 ? position + L : position - L;
    }
};

}  // namespace padding

typedef padding::PADDING_MODE padding_mode;

// Whether positions outside have no samples, so that vectors that are completely outside may be filled with zeros.
constexpr bool kIsEmptyOutside = padding_mode::kIsEmpty;

struct Source {
    bool exists;
    index_t index;  // of the sample
    index_t moved;  // index - position, for kernels that already have the address of the position
};

// The sample that a position stands for. If L is 0, no sample exists.
template <typename Mode = padding_mode>
__device__ __forceinline__ Source source_index(index_t position, index_t L) {
    if (Mode::kIsEmpty || is_index(position, L)) return Source{is_index(position, L), position, 0};
    const index_t index = Mode::index(position, L);
    return Source{is_index(index, L), index, index - position};
}

// Whether all positions from first to last are inside the row.
__device__ __forceinline__ bool is_inside(index_t first, index_t last, index_t L) { return first >= 0 && last < L; }

// Whether this position or any below it has a sample.
__device__ __forceinline__ bool exists_down(index_t position) { return !kIsEmptyOutside || position >= 0; }

struct Range {
    index_t begin, end;
};

// The numbers i < count for which position first + i*step has a sample, where step > 0.
__device__ __forceinline__ Range existing_range(index_t first, index_t step, index_t count, index_t L) {
    if (!kIsEmptyOutside) return Range{0, count};
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
