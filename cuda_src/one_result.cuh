// Computes one result after another in the canonical order: what the base families share with the kernels for results that
// other families leave out, at the edges of rows (conv1d_edges, conv_transpose1d_fold) and at the ends of samples (ends.cuh).
//
// The overloads for a Convolution and for a TransposedConvolution are where the two operations differ.

#pragma once

#include "common.cuh"
#include "convolution.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "samples.cuh"

// What Params begins with in kernels of the transposed operation. Those of both operations also have C_out.
struct TransposedConvolution : Convolution {
    index_t phase_gcd, tap_step, position_step, phase_inverse;
};

// weight[c_out, 0, 0] of an array [C_out, C_in_g, K].
__device__ __forceinline__ index_t first_weight(index_t c_out, index_t, const Convolution& p) {
    return c_out * p.weight_stride_out;
}
// weight[g*C_in_g, c_out % C_out_g, 0] of an array [C_in, C_out_g, K].
__device__ __forceinline__ index_t first_weight(index_t c_out, index_t g, const TransposedConvolution& p) {
    return g * p.C_in_g * p.weight_stride_in + (c_out - g * p.C_out_g) * p.weight_stride_out;
}

// A row of the output, and where its input and weights begin.
struct OutputRow {
    index_t n, c_out, g;
    const storage_t* input;   // input[n, g*C_in_g, 0]
    const storage_t* weight;  // of its output channel, the group's first input channel and tap 0

    // `number` counts the rows (n, c_out), c_out fastest.
    template <typename P>
    __device__ __forceinline__ OutputRow(index_t number, const storage_t* input, const storage_t* weight, const P& p) {
        n = number / p.C_out;
        c_out = number - n * p.C_out;
        g = c_out / p.C_out_g;
        this->input = input + n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;
        this->weight = weight + first_weight(c_out, g, p);
    }
    // The offset of output[n, c_out, l_out].
    __device__ __forceinline__ index_t place(index_t l_out, const Convolution& p) const {
        return n * p.output_stride_n + c_out * p.output_stride_c + l_out * p.output_stride_l;
    }
};

// The taps of one output: number i of them is k_first + i*k_step and reads the position l_first + i*l_step.
struct Taps {
    index_t k_first, k_step, l_first, l_step;
    Range numbers;  // of those that read a sample
};

__device__ __forceinline__ Taps taps_of(index_t l_out, index_t L_in, const Convolution& p) {
    const index_t l_first = l_out * p.stride - p.padding_left;
    return Taps{0, 1, l_first, p.dilation, existing_range(l_first, p.dilation, p.K, L_in)};
}

// Only the taps of the output's phase are visited. With t = l_out + padding_left and gcd = gcd(stride, dilation), a tap
// needs k*dilation = t (mod stride): none where gcd does not divide t, else k = k_first (mod tap_step), where
// tap_step = stride/gcd and k_first = (t/gcd) * phase_inverse (mod tap_step); phase_inverse is the inverse of
// dilation/gcd modulo tap_step. From one such tap to the next l_in falls by position_step = dilation/gcd.
__device__ __forceinline__ Taps taps_of(index_t l_out, index_t L_in, const TransposedConvolution& p) {
    const index_t t = l_out + p.padding_left;
    const index_t t_gcd = t / p.phase_gcd;
    Taps taps = {0, p.tap_step, 0, -p.position_step, {0, 0}};
    if (t_gcd * p.phase_gcd != t) return taps;
    taps.k_first = t_gcd % p.tap_step * p.phase_inverse % p.tap_step;
    taps.l_first = (t - taps.k_first * p.dilation) / p.stride;  // exact, perhaps negative
    if (taps.k_first < p.K) {
        const index_t count = ceil_div(p.K - taps.k_first, p.tap_step);
        taps.numbers = existing_range_down(taps.l_first, p.position_step, count, L_in);
    }
    return taps;
}

// begin + index*stride, which wraps around where it does not fit: the offset of a tap that need not exist, or from one tap to
// another.
__device__ __forceinline__ index_t offset_if_used(index_t begin, index_t index, index_t stride) {
    return index_t(uindex_t(begin) + uindex_t(index) * uindex_t(stride));
}

// The sum over c_in < C_in_g and the taps of an output of weight times sample. Of the taps, four are loaded together; those
// that are left over are loaded one after another, so more at a time would make short sums slower.
template <typename P>
__device__ __forceinline__ acc_t sum_of(
    const OutputRow& row, const Taps& taps, index_t L_in, const InputActivation& input_activation, const P& p) {
    acc_t sum = scalar::zero();
    const index_t k_begin = taps.k_first + taps.numbers.begin * taps.k_step;
    const index_t l_begin = taps.l_first + taps.numbers.begin * taps.l_step;
    for (index_t c_in = 0; c_in < p.C_in_g; ++c_in) {
        const Loader loaded = input_activation.channel(row.g * p.C_in_g + c_in);
        const storage_t* w = row.weight + offset_if_used(c_in * p.weight_stride_in, k_begin, p.weight_stride_k);
        const storage_t* x = row.input + offset_if_used(c_in * p.input_stride_c, l_begin, p.input_stride_l);
        index_t l_in = l_begin;
#pragma unroll 4
        for (index_t i = taps.numbers.begin; i < taps.numbers.end; ++i) {
            if (!kIsEmptyOutside) {
                const index_t index = source_index(l_in, L_in).index;
                x = row.input + (c_in * p.input_stride_c + index * p.input_stride_l);
            }
            sum = multiply_add(scalar::load(*w), scalar::load(loaded(*x)), sum);
            w += offset_if_used(0, taps.k_step, p.weight_stride_k);
            x += offset_if_used(0, taps.l_step, p.input_stride_l);
            l_in += taps.l_step;
        }
    }
    return sum;
}

// Writes every output of every row. Blocks of BLOCK_SIZE threads take consecutive elements of the flattened output
// (n, c_out, l_out), l_out fastest; where the grid is shorter than the output, threads take several.
template <typename P>
__device__ __forceinline__ void write_outputs(
    const storage_t* input, const storage_t* weight, result_t* output, const Epilogue& epilogue,
    const InputActivation& input_activation, const P& p SAMPLES_PARAMETER) {
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
#pragma unroll 1
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_outputs; i += grid_size) {
        const OutputRow row(i / p.L_out, input, weight, p);
        const index_t l_out = i % p.L_out;
        const Extents sample = extents_of(row.n, p SAMPLES_VALUE);
        if (kHasLengths && l_out >= sample.L_out) continue;
        const acc_t sum = sum_of(row, taps_of(l_out, sample.L_in, p), sample.L_in, input_activation, p);
        const index_t place = row.place(l_out, p);
        output[place] = finish(sum, epilogue.channel(row.c_out), output + place);
    }
}
