// conv1d_direct: forward convolution, one thread per output element. Takes every problem; chosen when no faster family
// does, and the template for those that follow.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// Grid x: blocks of BLOCK_SIZE consecutive elements of the flattened output (n, c_out, l_out), l_out fastest; where the
// grid is shorter than the output, threads take several. Grid y and z: 1. No shared memory.
// Takes arrays of any strides, zero and negative ones too, in elements, and samples with lengths of their own (samples.cuh).

#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "samples.cuh"
#include "window.cuh"

struct Params {
    index_t num_outputs;  // N * C_out * L_out
    index_t C_out, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t stride, padding_left, dilation;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_direct.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv1d_direct(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
    const result_t* __restrict__ bias,     // [C_out], or null
    result_t* __restrict__ output,         // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_outputs; i += grid_size) {
        const index_t row = i / p.L_out;
        const index_t l_out = i - row * p.L_out;
        const index_t n = row / p.C_out;
        const index_t c_out = row - n * p.C_out;
        const index_t g = c_out / p.C_out_g;
        const Extents sample = extents_of(n, p SAMPLES_VALUE);
        if (kHasLengths && l_out >= sample.L_out) continue;

        const index_t l_first = l_out * p.stride - p.padding_left;  // l_in of tap 0
        const Range taps = existing_range(l_first, p.dilation, p.K, sample.L_in);

        const storage_t* x = input + n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;  // input[n, g*C_in_g, 0]
        const storage_t* w = weight + c_out * p.weight_stride_out;                            // weight[c_out, 0, 0]

        acc_t acc = scalar::zero();
        for (index_t c_in = 0; c_in < p.C_in_g; ++c_in) {
            const Loader loaded = input_activation.channel(g * p.C_in_g + c_in);
            for (index_t k = taps.begin; k < taps.end; ++k) {
                const index_t l_in = source_index(l_first + k * p.dilation, sample.L_in).index;
                acc = multiply_add(
                    scalar::load(w[c_in * p.weight_stride_in + k * p.weight_stride_k]),
                    scalar::load(loaded(x[c_in * p.input_stride_c + l_in * p.input_stride_l])), acc);
            }
        }
        const index_t place = n * p.output_stride_n + c_out * p.output_stride_c + l_out * p.output_stride_l;
        output[place] = finish(acc, epilogue.channel(c_out), output + place);
    }
}
