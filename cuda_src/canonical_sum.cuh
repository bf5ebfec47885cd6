// The NaN fallback: sums a result again, without the taps that read no sample.
//
// Kernels multiply zeros in place of samples that do not exist. For finite weights this changes no bit (finish.cuh). But an
// infinite or NaN weight times such a zero is a NaN, although the sum has no such term. Therefore a thread that gets a NaN sums
// its results again in the canonical order, c_in outer and tap inner, as the base families do. Tests disable this by the macro
// NAN_FALLBACK = 0, to check that a kernel does not depend on it for finite weights.

#pragma once

#include "common.cuh"
#include "edge.cuh"

#ifndef NAN_FALLBACK
#define NAN_FALLBACK 1
#endif

// Whether the results of this sum must be summed again.
__device__ __forceinline__ bool needs_canonical_sum(acc_t sum) { return NAN_FALLBACK && is_nan(sum); }

// The weights of one row, as canonical_sum reads them: load(c_in, tap), where has(c_in, tap). next_tap and next_channel are
// called after every tap and every channel, for weights that advance an address.
struct EveryWeight {
    __device__ __forceinline__ bool has(index_t, index_t) const { return true; }
    __device__ __forceinline__ void next_tap() {}
    __device__ __forceinline__ void next_channel() {}
};

// The weights of a row in the layer's array.
struct RowWeights : EveryWeight {
    const storage_t* weight;
    index_t stride_in, stride_k;

    __device__ __forceinline__ RowWeights(const storage_t* weight, index_t stride_in, index_t stride_k)
        : weight(weight), stride_in(stride_in), stride_k(stride_k) {}
    __device__ __forceinline__ acc_t load(index_t c_in, index_t tap) const {
        return scalar::load(weight[c_in * stride_in + tap * stride_k]);
    }
};

// What most kernels do to a sample that they load; see input.cuh.
struct AsStored {
    __device__ __forceinline__ storage_t operator()(storage_t sample) const { return sample; }
};

// The sum over c_in < C_in_g and tap < taps of weight times sample, where both exist; tap reads the sample at position
// first + tap*tap_step. `input` begins with the group's first channel, position 0. P has the fields that are read here.
template <typename P, typename Weights, typename Loaded = AsStored>
__device__ __forceinline__ acc_t canonical_sum(
    const storage_t* input, index_t first, index_t tap_step, index_t taps, const P& p, Weights weights,
    const Loaded& loaded = Loaded()) {
    acc_t sum = scalar::zero();
#pragma unroll 1
    for (index_t c_in = 0; c_in < p.C_in_g; ++c_in, weights.next_channel()) {
#pragma unroll 1
        for (index_t tap = 0; tap < taps; ++tap, weights.next_tap()) {
            const Source source = source_index(first + tap * tap_step, p.L_in);
            if (!weights.has(c_in, tap) || !source.exists) continue;
            const storage_t value = input[c_in * p.input_stride_c + source.index * p.input_stride_l];
            sum = multiply_add(weights.load(c_in, tap), scalar::load(loaded(value)), sum);
        }
    }
    return sum;
}
