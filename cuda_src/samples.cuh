// Samples with lengths of their own: how much of the rows of each sample exists.
//
// Without the macro LENGTHS that is L_in and L_out of Params for all. With it, a kernel has one argument more, the table that
// write_samples.cu leaves, and reads there what holds for its sample. See gpuconv/families/lengths.py.
//
// A kernel has SAMPLES_ARGUMENT behind its arrays and passes on SAMPLES_VALUE, to functions with SAMPLES_PARAMETER.

#pragma once

#include "common.cuh"

// A row of the table. In a gradient of weights the rows of fine are the input and those of coarse the output, in one of a bias
// those of grad_output are the output.
struct SampleExtents {
    long long L_in, L_out, padding_left;
};

#ifdef LENGTHS
constexpr bool kHasLengths = true;
#define SAMPLES_ARGUMENT const SampleExtents* __restrict__ samples, /* [N] */
#define SAMPLES_PARAMETER , const SampleExtents* samples
#define SAMPLES_VALUE , samples
#else
constexpr bool kHasLengths = false;
#define SAMPLES_ARGUMENT
#define SAMPLES_PARAMETER
#define SAMPLES_VALUE
#endif

struct Extents {
    index_t L_in, L_out;
};

// Of sample n; P is the Params of a kernel of an operation.
template <typename P>
__device__ __forceinline__ Extents extents_of(index_t n, const P& p SAMPLES_PARAMETER) {
#ifdef LENGTHS
    return Extents{index_t(samples[n].L_in), index_t(samples[n].L_out)};
#else
    return Extents{p.L_in, p.L_out};
#endif
}
