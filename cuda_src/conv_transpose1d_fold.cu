// conv_transpose1d_fold: the outputs of a transposed convolution onto which its padding folds (edge.cuh): those for which also
// positions in the padding stand. In the gradient of a convolution these are the samples that it reads for its padding. The
// kernel is the last step of all transposed families in padding modes other than zeros.
//
//   output[n, c_out, l_out] = bias[c_out] + sum over the positions l that stand for l_out of value(n, c_out, l),
//   value = sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l + padding_left - k*dilation,   taps without such an l_in left out,
//
// for the `first_count` outputs from first_begin on and the others from second_begin on.
//
// A warp computes an output. For each position, first l_out itself and then those in the padding in ascending order, lane w
// adds the existing terms number w, w + 32, ..., c_in outer and k inner; then the upper half of the lanes' sums is added to the
// lower half until one sum is left. So the order of summation depends on the layer and on l_out alone, not on the family.
//
// Grid x: blocks of BLOCK_SIZE/32 of these outputs (n, c_out, edge), edge fastest; where the grid is shorter than these,
// warps take several. Grid y and z: 1. Dynamic shared memory: one sum for each thread. No atomics.
// FOLD_MODE is the padding mode of the output; the input is padded with zeros. For samples of different lengths (samples.cuh),
// second_begin is counted from the end of the longest output, and moves with the end of each sample's output.
// Takes arrays of any strides, zero and negative ones too, in elements.

#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "one_result.cuh"
#include "samples.cuh"

struct Params : TransposedConvolution {
    index_t C_out, num_outputs;  // N * C_out * edges
    index_t edges, first_begin, first_count, second_begin;
    index_t padded_end;  // behind the last position in the padding on the right
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/edges.py");

// Adds this lane's terms of a position.
__device__ __forceinline__ acc_t add_position(acc_t sum, const OutputRow& row, index_t l, index_t L_in, const Params& p) {
    const Taps taps = taps_of(l, L_in, p);
    const index_t count = taps.numbers.end - taps.numbers.begin;
    if (count <= 0) return sum;

    const int lane = threadIdx.x % 32;
    const index_t step_c = 32 / count, step_i = 32 - step_c * count;
    index_t c_in = lane / count, i = lane - c_in * count;
#pragma unroll 4
    while (c_in < p.C_in_g) {
        const index_t tap = taps.numbers.begin + i;
        const index_t k = taps.k_first + tap * taps.k_step, l_in = taps.l_first + tap * taps.l_step;
        const storage_t weight = row.weight[c_in * p.weight_stride_in + k * p.weight_stride_k];
        const storage_t value = row.input[c_in * p.input_stride_c + l_in * p.input_stride_l];
        sum = multiply_add(scalar::load(weight), scalar::load(value), sum);
        c_in += step_c;
        i += step_i;
        if (i >= count) {
            i -= count;
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
        const index_t number = i / p.edges, edge = i - number * p.edges;
        const OutputRow row(number, input, weight, p);
        const Extents sample = extents_of(row.n, p SAMPLES_VALUE);
        const index_t second_begin = p.second_begin + (sample.L_out - p.L_out);
        const index_t l_out = edge < p.first_count ? p.first_begin + edge : second_begin + (edge - p.first_count);
        if (kHasLengths && !is_index(l_out, sample.L_out)) continue;

        const index_t padded_end = p.padded_end + (sample.L_out - p.L_out);
        acc_t sum = add_position(scalar::zero(), row, l_out, sample.L_in, p);
#pragma unroll 1
        for (index_t l = -p.padding_left; l < padded_end; ++l) {
            if (l == 0) l = sample.L_out;  // skip positions outside the padding
            if (source_index<padding::FOLD_MODE>(l, sample.L_out).index == l_out && l < padded_end) {
                sum = add_position(sum, row, l, sample.L_in, p);
            }
        }
        *smem_sum = sum;
#pragma unroll
        for (int half = 16; half > 0; half /= 2) {
            __syncwarp();
            if (lane < half) *smem_sum = add(*smem_sum, smem_sum[half]);
        }
        if (lane == 0) {
            const index_t place = row.place(l_out, p);
            output[place] = finish(*smem_sum, epilogue.channel(row.c_out), output + place);
        }
        __syncwarp();
    }
}
