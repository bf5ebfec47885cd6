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
            const int channel = unit * kUnit + e;
            run[e] = RunOf<kWidth>::type::load(from + (long long)channel_stride * (channel < last ? channel : last));
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

// Whether adding 0x1000 to the bits of each of four values rounds it to nearest: not to those of a NaN.
__device__ __forceinline__ bool are_rounded_by_addition(const Vector<unsigned>& x) {
    bool has_nan = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) has_nan = has_nan || is_nan(uint_as_float(x.element[i]));
    return !has_nan;
}

// Whether each of four values is zero or at least 2^-102, and all are below 2^127: then split_tf32 only rounds and subtracts.
__device__ __forceinline__ bool are_split_by_addition(const Vector<unsigned>& x) {
    // Doubling the bits removes the sign. After subtracting the bits of 2^-102, zero and the numbers that are too small wrap
    // around to the largest values, and zero is the smallest of these. The sum finds numbers that are too large; no other
    // test is cheaper.
    bool has_small = false;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        has_small = has_small || 2 * x.element[i] - (25u << 24) > (256u - 25u) << 24;
        sum += magnitude(uint_as_float(x.element[i]));
    }
    return !has_small && sum < uint_as_float(254u << 23);
}

// Stores the vectors of a block in neighbouring rows; where an operand has two parts, they are part_rows apart.
template <int kWidth>
__device__ __forceinline__ void stage(const Block<kWidth>& block, Vector<unsigned>* rows, index_t part_rows) {
    if (kUnit == 8) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v) rows[v] = block.vector(v);
        return;
    }
    // Nearly all values are rounded by an addition in integers. The tensor cores ignore the low 13 bits.
    bool by_addition = true;
#pragma unroll
    for (int v = 0; v < kWidth; ++v) {
        const Vector<unsigned> x = block.vector(v);
        by_addition = by_addition && (IS_SPLIT ? are_split_by_addition(x) : are_rounded_by_addition(x));
    }
    if (by_addition) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v) {
            const Vector<unsigned> x = block.vector(v);
            Vector<unsigned> hi, lo;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                hi.element[i] = x.element[i] + 0x1000u;
                if (!IS_SPLIT) continue;
                hi.element[i] &= 0xffffe000u;
                lo.element[i] = float_as_uint(uint_as_float(x.element[i]) - uint_as_float(hi.element[i])) + 0x1000u;
            }
            rows[v] = hi;
            if (IS_SPLIT) rows[v + part_rows] = lo;
        }
        return;
    }
    // The values are converted in shared memory, which can be indexed in a loop.
#pragma unroll
    for (int v = 0; v < kWidth; ++v) rows[v] = block.vector(v);
#pragma unroll 1
    for (int i = 0; i < 4 * kWidth; ++i) {
        unsigned* const element = rows[i / 4].element + i % 4;
        const float value = uint_as_float(*element);
        float hi = round_to_tf32(value), lo = 0.0f;
        if (IS_SPLIT) split_tf32(value, &hi, &lo);
        *element = float_as_uint(hi);
        if (IS_SPLIT) element[part_rows * 4] = float_as_uint(round_to_tf32(lo));
    }
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
