// conv_transpose1d_ends: the outputs at the ends of samples of different lengths (samples.cuh), after a family that computes a
// transposed convolution as if all rows had the same length.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in within the sample's
//   length left out, for the outputs to which positions behind that length would contribute;
//   output[n, c_out, l_out] = 0 behind the sample's output length.
//
// Sums in the order of conv_transpose1d_gather. is_computed, the grid and the arrays are as in conv1d_ends.cu.

#include "common.cuh"
#include "ends.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "one_result.cuh"
#include "samples.cuh"

struct Params : TransposedConvolution {
    index_t C_out, num_warps, parts;
    index_t is_computed;
    FUSED_FIELDS
    static constexpr int first = 0;  // for ends.cuh
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/lengths.py");

// The outputs up to this one are already right: their taps read no position behind (l_out + padding_left) / stride.
__device__ __forceinline__ index_t kept_outputs(const Extents& sample, const Params& p) {
    return p.is_computed ? min_index(sample.L_out, max_index(sample.L_in * p.stride - p.padding_left, 0)) : sample.L_out;
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv_transpose1d_ends(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_in, C_out_g, K]
    const result_t* __restrict__ bias,     // [C_out], or null
    result_t* __restrict__ output,         // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    write_ends(input, weight, output, epilogue, input_activation, p SAMPLES_VALUE);
}
