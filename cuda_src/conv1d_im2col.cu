// conv1d_im2col: forward convolution of layers with few input channels a group and long kernels, on tensor cores.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// The product of im2col.cuh.
//
// Grid x: blocks of BLOCK_M output channels (fastest, so that blocks with the same window run together), then of BLOCK_N
// positions, then samples, then groups. Grid y and z: 1. Dynamic shared memory: the stages of weights, the window, the rows
// of pairs; or the slices through which the results pass.
// Needs float16, bfloat16 (sm_80) or float32 (sm_80) arrays of any strides, in elements. Chosen for fewer than 8 input
// channels a group and at least 8 taps and 8 output channels a group; see gpuconv/families/conv_im2col.py.

#define IS_TRANSPOSED 0

#include "common.cuh"
#include "im2col.cuh"
#include "window.cuh"

struct Params : Im2col {
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_im2col.py");

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) conv1d_im2col(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const StorageVector* __restrict__ weight,  // packed: see pack_im2col_weight.cu
    const storage_t* __restrict__ bias,        // [C_out], or null
    storage_t* __restrict__ output,            // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    run_im2col(input, weight, output, epilogue, p SAMPLES_VALUE);
}
