// conv1d_col2im: forward convolution, stride 1, of layers with few output channels a group and many taps, on tensor
// cores.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// col2im.cuh describes the products and how they are summed.
//
// Grid x: blocks of block_results results of each row (fastest), then samples, then groups. Grid y and z: 1. Dynamic shared
// memory: that of mma.cuh, or a block's products, whichever is more.
// Before it pack_col2im_weight.cu packs the weights.
// Needs float16, bfloat16 (sm_80) or float32 (sm_80) arrays of any strides, in elements. Chosen for stride 1, at most 8 output
// channels a group and at least 48 weights for each input (60 as split TF32); see gpuconv/families/conv_col2im.py.

#define IS_TRANSPOSED 0

#include "col2im.cuh"
#include "common.cuh"
#include "window.cuh"

struct Params : Col2im {
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_col2im.py");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) conv1d_col2im(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const StorageVector* __restrict__ weight,  // packed: see pack_col2im_weight.cu
    const storage_t* __restrict__ bias,        // [C_out], or null
    storage_t* __restrict__ output,            // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    run_col2im(input, weight, output, epilogue, p SAMPLES_VALUE);
}
