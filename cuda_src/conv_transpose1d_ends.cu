// conv_transpose1d_ends: the ends of samples with lengths of their own (samples.cuh), behind a family that computes a
// transposed convolution as if all rows had the same length.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in left out, as those
//   behind the sample's length are, for the outputs that a position behind that length would reach;
//   output[n, c_out, l_out] = 0 behind the sample's output length.
//
// In the order of conv_transpose1d_gather, which explains the phases. What is_computed means, the grid and the arrays are
// those of conv1d_ends.

#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "samples.cuh"

struct Params {
    index_t num_warps, parts;
    index_t is_computed;
    index_t C_out, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t stride, padding_left, dilation;
    index_t phase_gcd, tap_step, position_step, phase_inverse;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_in, weight_stride_out, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/lengths.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv_transpose1d_ends(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_in, C_out_g, K]
    const result_t* __restrict__ bias,     // [C_out], or null
    result_t* __restrict__ output,         // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    const int lane = threadIdx.x % 32;
    const index_t grid_warps = index_t(gridDim.x) * (BLOCK_SIZE / 32);
    for (index_t warp = index_t(blockIdx.x) * (BLOCK_SIZE / 32) + threadIdx.x / 32; warp < p.num_warps; warp += grid_warps) {
        const index_t row = warp / p.parts, part = warp - row * p.parts;
        const index_t n = row / p.C_out, c_out = row - n * p.C_out;
        const index_t g = c_out / p.C_out_g;
        const Extents sample = extents_of(n, p SAMPLES_VALUE);

        // The outputs below `kept` are right: no tap of theirs reads a position behind (l_out + padding_left) / stride.
        index_t kept = sample.L_out;
        if (p.is_computed) kept = min_index(kept, max_index(sample.L_in * p.stride - p.padding_left, 0));

        const storage_t* x = input + n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;  // input[n, g*C_in_g, 0]
        const storage_t* w = weight + g * p.C_in_g * p.weight_stride_in +
                             (c_out - g * p.C_out_g) * p.weight_stride_out;  // weight[g*C_in_g, c_out % C_out_g, 0]
        for (index_t l_out = kept + part * 32 + lane; l_out < p.L_out; l_out += p.parts * 32) {
            const index_t place = n * p.output_stride_n + c_out * p.output_stride_c + l_out * p.output_stride_l;
            if (l_out >= sample.L_out) {
                output[place] = result_t();
                continue;
            }
            // The phase's taps are k_first + j*tap_step and read l_first - j*position_step.
            const index_t t = l_out + p.padding_left;
            const index_t t_gcd = t / p.phase_gcd;
            index_t k_first = 0, l_first = 0;
            Range taps = {0, 0};  // of j
            if (t_gcd * p.phase_gcd == t) {
                k_first = t_gcd % p.tap_step * p.phase_inverse % p.tap_step;
                l_first = (t - k_first * p.dilation) / p.stride;  // exact, perhaps negative
                if (k_first < p.K) {
                    taps =
                        existing_range_down(l_first, p.position_step, ceil_div(p.K - k_first, p.tap_step), sample.L_in);
                }
            }
            acc_t sum = scalar::zero();
            for (index_t c_in = 0; c_in < p.C_in_g; ++c_in) {
                const Loader loaded = input_activation.channel(g * p.C_in_g + c_in);
                for (index_t j = taps.begin; j < taps.end; ++j) {
                    const index_t k = k_first + j * p.tap_step;
                    const index_t l_in = l_first - j * p.position_step;
                    sum = multiply_add(
                        scalar::load(w[c_in * p.weight_stride_in + k * p.weight_stride_k]),
                        scalar::load(loaded(x[c_in * p.input_stride_c + l_in * p.input_stride_l])), sum);
                }
            }
            output[place] = finish(sum, epilogue.channel(c_out), output + place);
        }
    }
}
