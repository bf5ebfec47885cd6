// conv_transpose1d_gather: transposed convolution, one thread per output element, which gathers its own taps. Takes
// every problem; chosen when no faster family does, and the template for those that follow.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in left out.
//
// Only the taps of the output's phase are visited. With t = l_out + padding_left and gcd = gcd(stride, dilation), a tap
// needs k*dilation = t (mod stride): none where gcd does not divide t, else k = k_first (mod tap_step), where
// tap_step = stride/gcd and k_first = (t/gcd) * phase_inverse (mod tap_step); phase_inverse is the inverse of
// dilation/gcd modulo tap_step. From one such tap to the next l_in falls by position_step = dilation/gcd.
//
// Grid x: blocks of BLOCK_SIZE consecutive elements of the flattened output (n, c_out, l_out), l_out fastest; where the
// grid is shorter than the output, threads take several. Grid y and z: 1. No shared memory, no atomics.
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
    index_t phase_gcd, tap_step, position_step, phase_inverse;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_in, weight_stride_out, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
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
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_outputs; i += grid_size) {
        const index_t row = i / p.L_out;
        const index_t l_out = i - row * p.L_out;
        const index_t n = row / p.C_out;
        const index_t c_out = row - n * p.C_out;
        const index_t g = c_out / p.C_out_g;
        const Extents sample = extents_of(n, p SAMPLES_VALUE);
        if (kHasLengths && l_out >= sample.L_out) continue;

        // The phase's taps are k_first + j*tap_step and read l_first - j*position_step.
        const index_t t = l_out + p.padding_left;
        const index_t t_gcd = t / p.phase_gcd;
        index_t k_first = 0, l_first = 0;
        Range taps = {0, 0};  // of j
        if (t_gcd * p.phase_gcd == t) {
            k_first = t_gcd % p.tap_step * p.phase_inverse % p.tap_step;
            l_first = (t - k_first * p.dilation) / p.stride;  // exact, perhaps negative
            if (k_first < p.K) {
                taps = existing_range_down(l_first, p.position_step, ceil_div(p.K - k_first, p.tap_step), sample.L_in);
            }
        }

        const storage_t* x = input + n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;  // input[n, g*C_in_g, 0]
        const storage_t* w = weight + g * p.C_in_g * p.weight_stride_in +
                             (c_out - g * p.C_out_g) * p.weight_stride_out;  // weight[g*C_in_g, c_out % C_out_g, 0]

        acc_t acc = scalar::zero();
        for (index_t c_in = 0; c_in < p.C_in_g; ++c_in) {
            const Loader loaded = input_activation.channel(g * p.C_in_g + c_in);
            for (index_t j = taps.begin; j < taps.end; ++j) {
                const index_t k = k_first + j * p.tap_step;
                const index_t l_in = source_index(l_first - j * p.position_step, sample.L_in).index;
                acc = multiply_add(
                    scalar::load(w[c_in * p.weight_stride_in + k * p.weight_stride_k]),
                    scalar::load(loaded(x[c_in * p.input_stride_c + l_in * p.input_stride_l])), acc);
            }
        }
        const index_t place = n * p.output_stride_n + c_out * p.output_stride_c + l_out * p.output_stride_l;
        output[place] = finish(acc, epilogue.channel(c_out), output + place);
    }
}
