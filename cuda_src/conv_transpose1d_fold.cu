// conv_transpose1d_fold: the outputs of a transposed convolution that positions in its padding mean, too (edge.cuh): the
// gradient of the samples which a convolution reads in place of its padding. The last step of all transposed families in a
// mode of padding other than zeros.
//
//   output[n, c_out, l_out] = bias[c_out] + sum over the positions l that mean l_out of value(n, c_out, l),
//   value = sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l + padding_left - k*dilation,   taps without such an l_in left out,
//
// for the `first_count` outputs from first_begin on and the others from second_begin on.
//
// A warp computes an output. Of each position, l_out itself and then those in the padding in ascending order, lane w adds the
// terms number w, w + 32, ..., c_in outer and k inner, without those that do not exist; then the upper half of the lanes'
// sums is added to the lower half until one sum is left. So the order depends on the layer and on l_out alone, and is the
// same behind every family.
//
// Grid x: blocks of BLOCK_SIZE/32 of these outputs (n, c_out, edge), edge fastest; where the grid is shorter than these,
// warps take several. Grid y and z: 1. Dynamic shared memory: one sum for each thread. No atomics.
// FOLD_MODE is the mode of the output; the input is padded by zeros. Where samples have lengths of their own (samples.cuh), the
// others begin as far from the end of the sample's output as second_begin lies from that of the longest.
// Takes arrays of any strides, zero and negative ones too, in elements.

#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "samples.cuh"

struct Params {
    index_t num_outputs;  // N * C_out * edges
    index_t edges, first_begin, first_count, second_begin;
    index_t padded_end;  // behind the last position in the padding on the right
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
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/edges.py");

// Adds this lane's terms of a position. `x` and `w` begin with the group's first channel, w with the row of c_out.
__device__ __forceinline__ acc_t add_position(
    acc_t sum, const storage_t* x, const storage_t* w, index_t l, index_t L_in, const Params& p) {
    // The taps are k_first + j*tap_step and read l_first - j*position_step; see conv_transpose1d_gather.cu.
    const index_t t = l + p.padding_left;
    const index_t t_gcd = t / p.phase_gcd;
    if (t_gcd * p.phase_gcd != t) return sum;
    const index_t k_first = t_gcd % p.tap_step * p.phase_inverse % p.tap_step;
    if (k_first >= p.K) return sum;
    const index_t l_first = (t - k_first * p.dilation) / p.stride;
    const Range taps = existing_range_down(l_first, p.position_step, ceil_div(p.K - k_first, p.tap_step), L_in);
    const index_t count = taps.end - taps.begin;
    if (count <= 0) return sum;

    const int lane = threadIdx.x % 32;
    const index_t step_c = 32 / count, step_j = 32 - step_c * count;
    index_t c_in = lane / count, j = lane - c_in * count;
#pragma unroll 4
    while (c_in < p.C_in_g) {
        const index_t tap = taps.begin + j;
        const storage_t weight = w[c_in * p.weight_stride_in + (k_first + tap * p.tap_step) * p.weight_stride_k];
        const storage_t value = x[c_in * p.input_stride_c + (l_first - tap * p.position_step) * p.input_stride_l];
        sum = multiply_add(scalar::load(weight), scalar::load(value), sum);
        c_in += step_c;
        j += step_j;
        if (j >= count) {
            j -= count;
            ++c_in;
        }
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv_transpose1d_fold(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_in, C_out_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    acc_t* const smem_sum = reinterpret_cast<acc_t*>(dynamic_shared_memory()) + threadIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const index_t grid_size = index_t(gridDim.x) * (BLOCK_SIZE / 32);
    for (index_t i = index_t(blockIdx.x) * (BLOCK_SIZE / 32) + warp; i < p.num_outputs; i += grid_size) {
        const index_t row = i / p.edges;
        const index_t edge = i - row * p.edges;
        const index_t n = row / p.C_out;
        const index_t c_out = row - n * p.C_out;
        const index_t g = c_out / p.C_out_g;
        const Extents sample = extents_of(n, p SAMPLES_VALUE);
        const index_t second_begin = p.second_begin + (sample.L_out - p.L_out);
        const index_t l_out = edge < p.first_count ? p.first_begin + edge : second_begin + (edge - p.first_count);
        if (kHasLengths && !is_index(l_out, sample.L_out)) continue;

        const storage_t* x = input + n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;  // input[n, g*C_in_g, 0]
        const storage_t* w = weight + g * p.C_in_g * p.weight_stride_in +
                             (c_out - g * p.C_out_g) * p.weight_stride_out;  // weight[g*C_in_g, c_out % C_out_g, 0]
        const index_t padded_end = p.padded_end + (sample.L_out - p.L_out);
        acc_t sum = add_position(scalar::zero(), x, w, l_out, sample.L_in, p);
#pragma unroll 1
        for (index_t l = -p.padding_left; l < padded_end; ++l) {
            if (l == 0) l = sample.L_out;  // what is no padding is passed over
            if (source_index<padding::FOLD_MODE>(l, sample.L_out).index == l_out && l < padded_end) {
                sum = add_position(sum, x, w, l, sample.L_in, p);
            }
        }
        *smem_sum = sum;
#pragma unroll
        for (int half = 16; half > 0; half /= 2) {
            __syncwarp();
            if (lane < half) *smem_sum = add(*smem_sum, smem_sum[half]);
        }
        if (lane == 0) {
            const index_t place = n * p.output_stride_n + c_out * p.output_stride_c + l_out * p.output_stride_l;
            output[place] = finish(*smem_sum, epilogue.channel(c_out), output + place);
        }
        __syncwarp();
    }
}
