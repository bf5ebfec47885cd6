// conv_transpose1d_gather: transposed convolution, one thread per output element, which gathers its own taps. Takes every
// problem and is chosen if no faster family takes it. New families start from this file.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in left out.
//
// Only the taps of the output's phase are visited; see one_result.cuh.
//
// Grid x: blocks of BLOCK_SIZE consecutive elements of the flattened output (n, c_out, l_out), l_out fastest; where the
// grid is shorter than the output, threads take several. Grid y and z: 1. No shared memory, no atomics.
// Takes arrays of any strides, zero and negative ones too, in elements, and samples of different lengths (samples.cuh).

#include "common.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "one_result.cuh"
#include "samples.cuh"
#include "window.cuh"

struct Params : TransposedConvolution {
    index_t C_out, num_outputs;  // N * C_out * L_out
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_direct.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv_transpose1d_gather(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_in, C_out_g, K]
    const result_t* __restrict__ bias,     // [C_out], or null
    result_t* __restrict__ output,         // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    write_outputs(input, weight, output, epilogue, input_activation, p SAMPLES_VALUE);
}
