// conv1d_ends: the outputs at the ends of samples of different lengths (samples.cuh), after a family that computes a
// convolution as if all rows had the same length.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in is the index that the position l_out*stride - padding_left + k*dilation stands for in a row of
//   the sample's length (edge.cuh), for the first `first` outputs of a row and for those whose windows extend past that length;
//   output[n, c_out, l_out] = 0 behind the sample's output length.
//
// Sums in the order of conv1d_direct, so that the results have the bits of the base family. If is_computed is 0, the family
// has observed the lengths itself, and only the outputs behind them are cleared.
//
// Grid x: blocks of BLOCK_SIZE/32 warps, `parts` of them for each row (n, c_out), c_out fastest; where the grid is shorter,
// warps take several. The lanes of a row's warps take its outputs in turn. Grid y and z: 1. No shared memory.
// Takes arrays of any strides, zero and negative ones too, in elements.

#include "common.cuh"
#include "ends.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "one_result.cuh"
#include "samples.cuh"

struct Params : Convolution {
    index_t C_out, num_warps, parts;
    index_t first, is_computed;
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/lengths.py");

// The outputs from `first` up to this one are already right.
__device__ __forceinline__ index_t kept_outputs(const Extents& sample, const Params& p) {
    const index_t last = sample.L_in - 1 + p.padding_left - (p.K - 1) * p.dilation;  // tap 0 of windows up to here
    index_t kept = sample.L_out;
    if (p.is_computed) kept = min_index(kept, last < 0 ? 0 : last / p.stride + 1);
    return max_index(kept, p.first);
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv1d_ends(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
    const result_t* __restrict__ bias,     // [C_out], or null
    result_t* __restrict__ output,         // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    write_ends(input, weight, output, epilogue, input_activation, p SAMPLES_VALUE);
}
