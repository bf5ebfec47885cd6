// Samples of different lengths: the lengths of each sample's rows.
//
// Without the macro LENGTHS these are L_in and L_out of Params for all samples. With it, a kernel has one more argument, the
// table that write_samples.cu writes, and reads the lengths of its sample there. See gpuconv/families/lengths.py.
//
// A kernel has SAMPLES_ARGUMENT after its arrays, and passes SAMPLES_VALUE to functions with SAMPLES_PARAMETER.

#pragma once

#include "common.cuh"

// A row of the table. In a weight gradient, L_in is the length of fine and L_out that of coarse; in a bias gradient, L_out is
// the length of grad_output.
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
