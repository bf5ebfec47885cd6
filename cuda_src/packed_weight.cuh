// How tensor cores read a weight: as it is, rounded to TF32, or (IS_SPLIT = 1) as two parts, w_hi and w_lo = w - w_hi. A weight
// that split_tf32 refuses has a NaN in w_hi and itself in w_lo.

#pragma once

#include "common.cuh"
#include "tf32.cuh"

struct PackedWeight {
    storage_t large, small;  // the second part where IS_SPLIT

    static __device__ __forceinline__ PackedWeight of(storage_t w) {
        PackedWeight packed;
        packed.large = packed.small = w;
        if (IS_SPLIT) {
            float hi, lo;
            split_tf32(float(w), &hi, &lo);
            packed.large = storage_t(hi);
            if (hi == hi) packed.small = storage_t(lo);
        } else if (sizeof(storage_t) == 4) {
            packed.large = storage_t(round_to_finite_tf32(float(w)));
        }
        return packed;
    }
    // What products are formed with.
    __device__ __forceinline__ acc_t value() const {
        const acc_t hi = scalar::load(large);
        return !IS_SPLIT ? hi : is_nan(hi) ? scalar::load(small) : hi + scalar::load(small);
    }
};
