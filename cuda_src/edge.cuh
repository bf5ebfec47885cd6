// Which of a row's L samples a position means, inside the row and outside.
//
// PADDING_MODE says what padding means, zeros unless the macro is given. With zeros a position outside [0, L) has no sample,
// and sums leave out its terms; with the others it means another sample of the row. Only this file knows that. A kernel
// asks for one position by source_index; it asks for many at once by is_inside, where it then reads whole spans, or by
// existing_range, where it then visits only those that exist.

#pragma once

#include "common.cuh"

#ifndef PADDING_MODE
#define PADDING_MODE zeros
#endif

// The modes of padding: the index that a position outside of the row means. It is no index of the row where the padding is
// longer than the mode allows, as it is for what kernels load beyond the problem: there no sample exists.
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

// Whether positions outside have no samples, so that neighbours which all lie outside may be filled with zeros at once.
constexpr bool kIsEmptyOutside = padding_mode::kIsEmpty;

struct Source {
    bool exists;
    index_t index;  // of the sample
    index_t moved;  // index - position, for kernels that already have the address of the position
};

// What a position means. Where L is 0 no sample exists.
template <typename Mode = padding_mode>
__device__ __forceinline__ Source source_index(index_t position, index_t L) {
    if (Mode::kIsEmpty || is_index(position, L)) return Source{is_index(position, L), position, 0};
    const index_t index = Mode::index(position, L);
    return Source{is_index(index, L), index, index - position};
}

// Whether every position from first to last means the sample of the same index.
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
