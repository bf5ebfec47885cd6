// Copies channels from global memory, where each is a row of positions, to shared memory, where kUnit channels of one position
// (a unit) are a vector of 16 bytes: what mma.cuh and weight_gradient_mma.cu share.
//
// Macros read: IS_SPLIT, and those of fragments.cuh.

#pragma once

#include "common.cuh"
#include "fragments.cuh"
#include "tf32.cuh"

// kWidth neighbouring positions of one channel as they lie in memory, in words.
template <int kWidth>
struct alignas(kWidth * sizeof(storage_t)) Run {
    static constexpr int kWords = kWidth * int(sizeof(storage_t)) / 4;
    unsigned word[kWords];

    static __device__ __forceinline__ Run load(const storage_t* from) { return *reinterpret_cast<const Run*>(from); }
};
template <int kBytes>
struct HalfWord {
    static constexpr int kWords = 1;
    unsigned word[1];

    static __device__ __forceinline__ HalfWord load(const storage_t* from) {
        return HalfWord{unsigned(*reinterpret_cast<const unsigned short*>(from))};
    }
};
template <int kWidth, bool kIsHalfWord = (kWidth * sizeof(storage_t) == 2)>
struct RunOf {
    typedef Run<kWidth> type;
};
template <int kWidth>
struct RunOf<kWidth, true> {
    typedef HalfWord<2> type;
};

constexpr unsigned kLowHalves = 0x5410, kHighHalves = 0x7632;  // of two words: see permute_bytes

// kWidth neighbouring positions of a unit.
template <int kWidth>
struct Block {
    typename RunOf<kWidth>::type run[kUnit];

    // `from` is the first position of the first channel of unit 0.
    __device__ __forceinline__ void load(const storage_t* from, index_t channel_stride, int unit = 0) {
#pragma unroll
        // A product of 64 bits is one instruction with the addition.
        for (int e = 0; e < kUnit; ++e) {
            run[e] = RunOf<kWidth>::type::load(from + (long long)channel_stride * (unit * kUnit + e));
        }
    }
    // The same with channel `last`, counted from unit 0 on, in place of those behind it.
    __device__ __forceinline__ void load_up_to(int last, const storage_t* from, index_t channel_stride, int unit = 0) {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
            // In bytes of a stride of one byte, which takes no further instruction.
            const int channel = (unit * kUnit + e) * int(sizeof(storage_t)), end = last * int(sizeof(storage_t));
            const char* const row =
                reinterpret_cast<const char*>(from) + (long long)channel_stride * (channel < end ? channel : end);
            run[e] = RunOf<kWidth>::type::load(reinterpret_cast<const storage_t*>(row));
        }
    }
    // All channels of one position of 32-bit elements, where they lie side by side from `from` on.
    __device__ __forceinline__ void load_unit(const storage_t* from) {
        const Vector<unsigned> x = *reinterpret_cast<const Vector<unsigned>*>(from);
#pragma unroll
        for (int e = 0; e < kUnit; ++e) run[e].word[0] = x.element[e % 4];
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) run[e] = typename RunOf<kWidth>::type();
    }

    // All channels of position v side by side.
    __device__ __forceinline__ Vector<unsigned> vector(int v) const {
        if (kUnit == 8) return pick(v / 2, v % 2 == 0 ? kLowHalves : kHighHalves);
        Vector<unsigned> x;
#pragma unroll
        for (int i = 0; i < 4; ++i) x.element[i] = run[i % kUnit].word[v];
        return x;
    }
    // Of elements of 2 bytes: all channels of one of the two positions in word w.
    __device__ __forceinline__ Vector<unsigned> pick(int w, unsigned halves) const {
        Vector<unsigned> x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x.element[i] = permute_bytes(run[2 * i % kUnit].word[w], run[(2 * i + 1) % kUnit].word[w], halves);
        }
        return x;
    }
};

// Whether adding 0x1000 to the bits of each value rounds it to nearest: not to those of a NaN.
template <int kCount>
__device__ __forceinline__ bool are_rounded_by_addition(const Vector<unsigned> (&x)[kCount]) {
    bool has_nan = false;
#pragma unroll
    for (int i = 0; i < 4 * kCount; i += 2) {
        // Both of a pair are tested by one instruction.
        const float a = uint_as_float(x[i / 4].element[i % 4]), b = uint_as_float(x[i / 4].element[i % 4 + 1]);
        const bool either = is_nan(a) || is_nan(b);
        has_nan = has_nan || either;
    }
    return !has_nan;
}

// Whether each value is zero or at least 2^-102, and all are below 2^127: then split_tf32 only rounds and subtracts.
template <int kCount>
__device__ __forceinline__ bool are_split_by_addition(const Vector<unsigned> (&x)[kCount]) {
    // Doubling the bits removes the sign. After subtracting the bits of 2^-102, zero and the numbers that are too small wrap
    // around to the largest values, and zero is the smallest of these. The sum finds numbers that are too large; no other
    // test is cheaper.
    bool has_small = false;
    float sum = magnitude(uint_as_float(x[0].element[0]));
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) {
        const unsigned bits = x[i / 4].element[i % 4];
        has_small = has_small || 2 * bits - (25u << 24) > (256u - 25u) << 24;
        if (i > 0) sum += magnitude(uint_as_float(bits));
    }
    return !has_small && sum < uint_as_float(254u << 23);
}

// Stores those vectors of 32-bit elements that exist(index), rounded or split, row_step rows apart. Where an operand has two
// parts, they are part_rows apart.
template <int kCount, typename Exists>
__device__ __forceinline__ void stage_rounded(
    const Vector<unsigned> (&x)[kCount], Vector<unsigned>* rows, index_t row_step, index_t part_rows, const Exists& exists) {
    // Nearly all values are rounded by an addition in integers. The tensor cores ignore the low 13 bits. One test for all
    // vectors takes less than a test and a branch for each.
    if (IS_SPLIT ? are_split_by_addition(x) : are_rounded_by_addition(x)) {
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
            if (!exists(v)) continue;
            Vector<unsigned> hi, lo;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                hi.element[i] = x[v].element[i] + 0x1000u;
                if (!IS_SPLIT) continue;
                hi.element[i] &= 0xffffe000u;
                lo.element[i] = float_as_uint(uint_as_float(x[v].element[i]) - uint_as_float(hi.element[i])) + 0x1000u;
            }
            rows[v * row_step] = hi;
            if (IS_SPLIT) rows[v * row_step + part_rows] = lo;
        }
        return;
    }
    // The values are converted in shared memory, which can be indexed in a loop.
    int count = 0;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
        if (!exists(v)) continue;
        rows[v * row_step] = x[v];
        count = v + 1;
    }
#pragma unroll 1
    for (int i = 0; i < 4 * count; ++i) {
        unsigned* const element = rows[i / 4 * row_step].element + i % 4;
        const float value = uint_as_float(*element);
        float hi = round_to_tf32(value), lo = 0.0f;
        if (IS_SPLIT) split_tf32(value, &hi, &lo);
        *element = float_as_uint(hi);
        if (IS_SPLIT) element[part_rows * 4] = float_as_uint(round_to_tf32(lo));
    }
}

// Stores the vectors of a block in neighbouring rows; where an operand has two parts, they are part_rows apart.
template <int kWidth>
__device__ __forceinline__ void stage(const Block<kWidth>& block, Vector<unsigned>* rows, index_t part_rows) {
    Vector<unsigned> x[kWidth];
#pragma unroll
    for (int v = 0; v < kWidth; ++v) x[v] = block.vector(v);
    if (kUnit != 8) return stage_rounded(x, rows, 1, part_rows, [](int) { return true; });
#pragma unroll
    for (int v = 0; v < kWidth; ++v) rows[v] = x[v];
}

// The same for blocks of 32-bit elements at one position each, whose rows are row_step apart; for those that exist(index).
template <int kCount, typename Exists>
__device__ __forceinline__ void stage_blocks(
    const Block<1> (&blocks)[kCount], Vector<unsigned>* rows, index_t row_step, index_t part_rows, const Exists& exists) {
    Vector<unsigned> x[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = blocks[i].vector(0);
    stage_rounded(x, rows, row_step, part_rows, exists);
}

// The order in which a lane stores the two rows of a pair, which are pair_bytes apart. If they are neighbours, eight
// neighbouring lanes would use only half of the banks, so four of them begin with the second row.
struct PairOrder {
    int begins_with_second;  // 1 or 0
    int pair_bytes;

    static __device__ __forceinline__ PairOrder of(int pair_bytes) {
        return PairOrder{keep_in_register(pair_bytes == 16 && threadIdx.x % 8 >= 4 ? 1 : 0), pair_bytes};
    }
    // From the first row, in bytes.
    __device__ __forceinline__ int first() const { return begins_with_second * 16; }
    __device__ __forceinline__ int second() const { return pair_bytes - first(); }
    // Of the words of each channel, for the row that is stored first.
    __device__ __forceinline__ unsigned halves() const {
        return kLowHalves + unsigned(begins_with_second) * (kHighHalves - kLowHalves);
    }
};

// Stores both positions of a block of 16-bit elements. `row` is where the first one's begins.
template <int kWidth>
__device__ __forceinline__ void stage_pair(const Block<kWidth>& pair, unsigned char* row, const PairOrder& order) {
    *reinterpret_cast<Vector<unsigned>*>(row + order.first()) = pair.pick(0, order.halves());
    *reinterpret_cast<Vector<unsigned>*>(row + order.second()) = pair.pick(0, order.halves() ^ kLowHalves ^ kHighHalves);
}
