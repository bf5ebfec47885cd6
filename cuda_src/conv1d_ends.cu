// conv1d_ends: the ends of samples with lengths of their own (samples.cuh), behind a family that computes a convolution as
// if all rows had the same length.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in is what the position l_out*stride - padding_left + k*dilation means in a row of the sample's
//   length (edge.cuh), for the first `first` outputs of a row and for those whose windows reach behind that length;
//   output[n, c_out, l_out] = 0 behind the sample's output length.
//
// In the order of conv1d_direct, so that the result is that of the base family to the bit. Where is_computed is 0, the
// family has kept to the lengths itself, and outputs behind them are cleared alone.
//
// Grid x: blocks of BLOCK_SIZE/32 warps, `parts` of them for each row (n, c_out), c_out fastest; where the grid is shorter,
// warps take several. The lanes of a row's warps take its outputs in turn. Grid y and z: 1. No shared memory.
// Takes arrays of any strides, zero and negative ones too, in elements.

#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "samples.cuh"

struct Params {
    index_t num_warps, parts;
    index_t first, is_computed;
    index_t C_out, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t stride, padding_left, dilation;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/lengths.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv1d_ends(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
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

        // The outputs from `first` to kept - 1 are right.
        const index_t last = sample.L_in - 1 + p.padding_left - (p.K - 1) * p.dilation;  // tap 0 of windows up to here
        index_t kept = sample.L_out;
        if (p.is_computed) kept = min_index(kept, last < 0 ? 0 : last / p.stride + 1);
        kept = max_index(kept, p.first);
        const index_t count = p.first + (p.L_out - kept);

        const storage_t* x = input + n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;  // input[n, g*C_in_g, 0]
        const storage_t* w = weight + c_out * p.weight_stride_out;                            // weight[c_out, 0, 0]
        for (index_t i = part * 32 + lane; i < count; i += p.parts * 32) {
            const index_t l_out = i < p.first ? i : kept + (i - p.first);
            const index_t place = n * p.output_stride_n + c_out * p.output_stride_c + l_out * p.output_stride_l;
            if (l_out >= sample.L_out) {
                output[place] = result_t();
                continue;
            }
            const index_t l_first = l_out * p.stride - p.padding_left;  // the position of tap 0
            const Range taps = existing_range(l_first, p.dilation, p.K, sample.L_in);
            acc_t sum = scalar::zero();
            for (index_t c_in = 0; c_in < p.C_in_g; ++c_in) {
                const Loader loaded = input_activation.channel(g * p.C_in_g + c_in);
                for (index_t k = taps.begin; k < taps.end; ++k) {
                    const index_t l_in = source_index(l_first + k * p.dilation, sample.L_in).index;
                    sum = multiply_add(
                        scalar::load(w[c_in * p.weight_stride_in + k * p.weight_stride_k]),
                        scalar::load(loaded(x[c_in * p.input_stride_c + l_in * p.input_stride_l])), sum);
                }
            }
            output[place] = finish(sum, epilogue.channel(c_out), output + place);
        }
    }
}
