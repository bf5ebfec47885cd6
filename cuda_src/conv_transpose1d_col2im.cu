// conv_transpose1d_col2im: transposed convolution of layers with few output channels a group and many taps, on tensor cores.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in left out.
//
// The products and sums of col2im.cuh.
//
// Grid x: blocks of block_results results of each row (fastest), then samples, then groups. Grid y and z: 1. Dynamic shared
// memory: that of mma.cuh, or a block's products, whichever is more.
// Before it pack_col2im_weight.cu packs the weights.
// Needs float16, bfloat16 (sm_80) or float32 (sm_80) arrays of any strides, in elements. Chosen for at most 8 output
// channels a group, with the stride at most 12 rows, and at least 48 weights for each input (60 as split TF32), for stride or
// dilation 1; see gpuconv/families/conv_col2im.py.

#define IS_TRANSPOSED 1

#include "col2im.cuh"
#include "common.cuh"
#include "window.cuh"

struct Params : Col2im {
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_col2im.py");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) conv_transpose1d_col2im(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const StorageVector* __restrict__ weight,  // packed: see pack_col2im_weight.cu
    const storage_t* __restrict__ bias,        // [C_out], or null
    storage_t* __restrict__ output,            // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    run_col2im(input, weight, output, epilogue, p SAMPLES_VALUE);
}
