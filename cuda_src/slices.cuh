// What the gradients of weights and biases share: slices of the sum over positions; for weights also the sum of a slice term by
// term, and storing it.
//
// The sum over the samples n and the positions l of coarse is cut into slices, by a rule on the problem alone
// (gpuconv/families/slices.py). A slice is slice_positions neighbouring positions of one sample or slice_samples whole
// samples. Each slice is summed in one order, n outer and l inner, by multiply_add_conjugate, and sum_slices.cu adds the
// slices. So on CUDA cores the bits depend on neither the kernel, nor its tiles, nor the GPU.
//
// With complex data, fine is always conjugated. If coarse must be conjugated instead, the conjugate of the result is stored,
// which has the same bits.
//
// P stands for a kernel's Params; the fields read here have the same names in all of them.

#pragma once

#include "canonical_sum.cuh"
#include "common.cuh"
#include "edge.cuh"
#include "samples.cuh"

struct Slice {
    index_t n_begin, n_end;  // samples
    index_t l_begin, l_end;  // positions of each of them
};

template <typename P>
__device__ __forceinline__ Slice find_slice(index_t slice, const P& p) {
    const index_t sample_group = slice / p.slice_pieces;
    const index_t piece = slice - sample_group * p.slice_pieces;
    Slice s;
    s.n_begin = sample_group * p.slice_samples;
    s.n_end = min_index(s.n_begin + p.slice_samples, p.N);
    s.l_begin = piece * p.slice_positions;
    s.l_end = min_index(s.l_begin + p.slice_positions, p.L_coarse);
    return s;
}

#ifdef LENGTHS
// The lengths of coarse (L_out) and fine (L_in) in a sample, and its padding. Where is_exchanged, the table speaks of the other
// sides: see gpuconv/families/weight_gradient_sides.py.
template <typename P>
__device__ __forceinline__ SampleExtents extents_of_sides(const SampleExtents& row, const P& p) {
    if (!p.is_exchanged) return row;
    return SampleExtents{row.L_out, row.L_in, (p.K - 1) * p.dilation - row.padding_left};
}
#endif

// a * conj(b) + acc.
__device__ __forceinline__ float multiply_add_conjugate(float a, float b, float acc) { return fma_rn(a, b, acc); }
__device__ __forceinline__ double multiply_add_conjugate(double a, double b, double acc) { return fma_rn(a, b, acc); }

template <typename real_t>
__device__ __forceinline__ Complex<real_t> multiply_add_conjugate(
    Complex<real_t> a, Complex<real_t> b, Complex<real_t> acc) {
    acc.re = fma_rn(a.re, b.re, acc.re);
    acc.re = fma_rn(a.im, b.im, acc.re);
    acc.im = fma_rn(-a.re, b.im, acc.im);
    acc.im = fma_rn(a.im, b.re, acc.im);
    return acc;
}

__device__ __forceinline__ float conjugate(float value) { return value; }
__device__ __forceinline__ double conjugate(double value) { return value; }

template <typename real_t>
__device__ __forceinline__ Complex<real_t> conjugate(Complex<real_t> value) {
    return Complex<real_t>{value.re, -value.im};
}

// The last step of every gradient: as in finish.cuh a zero becomes +0.
__device__ __forceinline__ storage_t finish_gradient(acc_t sum, bool is_conjugated) {
    return scalar::round(add(is_conjugated ? conjugate(sum) : sum, scalar::zero()));
}

// The sum of one slice for tap k over the terms that exist: what weight_gradient_direct.cu computes, and the NaN fallback of
// the others. coarse and fine begin with the channels r and c, sample 0, position 0. Unrolling by kUnroll pays only where this
// computes all results. Where it does not, a test of every position takes less code than the divisions of existing_range; the
// compiler must not turn the test into loops of their own. In padding modes other than zeros hardly any position is left out.
template <int kUnroll = 1, typename P>
__device__ __forceinline__ acc_t canonical_slice_sum(
    const storage_t* coarse, const storage_t* fine, index_t k, const Slice& s, const P& p SAMPLES_PARAMETER) {
    index_t offset = k * p.dilation - p.padding_left;  // position of fine that l = 0 meets
    index_t L_fine = p.L_fine;
    constexpr bool kTestsPositions = kUnroll == 1 && kIsEmptyOutside;
    Range existing = kTestsPositions ? Range{0, p.L_coarse} : existing_range(offset, p.stride, p.L_coarse, L_fine);
    index_t l_begin = max_index(s.l_begin, existing.begin), l_end = min_index(s.l_end, existing.end);
    acc_t acc = scalar::zero();
#pragma unroll 1
    for (index_t n = s.n_begin; n < s.n_end; ++n) {
        const storage_t* const a = coarse + n * p.coarse_stride_n;
        const storage_t* const b = fine + n * p.fine_stride_n;
#ifdef LENGTHS
        const SampleExtents of_sides = extents_of_sides(samples[n], p);
        offset = k * p.dilation - index_t(of_sides.padding_left);
        L_fine = index_t(of_sides.L_in);
        existing = existing_range(offset, p.stride, index_t(of_sides.L_out), L_fine);
        l_begin = max_index(s.l_begin, existing.begin);
        l_end = min_index(s.l_end, existing.end);
#endif
#pragma unroll kUnroll
        for (index_t l = l_begin; l < l_end; ++l) {
            const index_t position = l * p.stride + offset;
            const Source source = source_index(kTestsPositions ? keep_in_loop(position) : position, L_fine);
            if (kTestsPositions && !source.exists) continue;
            acc = multiply_add_conjugate(
                scalar::load(a[l * p.coarse_stride_l]), scalar::load(b[source.index * p.fine_stride_l]), acc);
        }
    }
    return acc;
}

// Stores the sum of a slice for row r and column c*K + k: among the partial sums, or as the result where there is only
// one slice and no array of partial sums.
template <typename P>
__device__ __forceinline__ void store_sum(
    acc_t sum, index_t slice, index_t r, index_t column, acc_t* partial, storage_t* grad_weight, const P& p) {
    if (partial != nullptr) {
        partial[(slice * p.C_coarse + r) * (p.C_fine_g * p.K) + column] = sum;
    } else {
        const index_t c = column / p.K, k = column - c * p.K;
        grad_weight[r * p.weight_stride_r + c * p.weight_stride_c + k * p.weight_stride_k] =
            finish_gradient(sum, p.is_conjugated);
    }
}
