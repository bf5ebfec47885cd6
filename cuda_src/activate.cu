// activate: the activated input of a convolution, for kernels that copy their input to shared memory as it is.
//
//   activated[n, c, l] = round(INPUT_ACTIVATION(input[n, c, l])),   contiguous.
//
// Grid x: blocks of BLOCK_SIZE consecutive elements of `activated`; where the grid is shorter, threads take several. Grid y
// and z: 1. No shared memory.
// Takes an input of any strides, in elements.

#include "common.cuh"
#include "input.cuh"

struct Params {
    index_t num_elements;  // N * C_in * L_in
    index_t C_in, L_in;
    index_t input_stride_n, input_stride_c, input_stride_l;
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/fused.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) activate(
    const storage_t* __restrict__ input,  // [N, C_in, L_in]
    storage_t* __restrict__ activated,    // [N, C_in, L_in]
    FUSED_ARGUMENTS const Params p) {
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_elements; i += grid_size) {
        const index_t row = i / p.L_in;
        const index_t l = i - row * p.L_in;
        const index_t n = row / p.C_in;
        const index_t c = row - n * p.C_in;
        const storage_t sample = input[n * p.input_stride_n + c * p.input_stride_c + l * p.input_stride_l];
        activated[i] = input_activation.channel(c)(sample);
    }
}
