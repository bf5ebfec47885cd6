// conv1d_tail: forward convolution of layers with few output channels a group, stride 1 and dilation 1, where the input
// dominates.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out - padding_left + k,   taps outside [0, L_in) left out.
//
// The sums of sliding.cuh with rows = c_out of the group, columns = l_out, taps = k. A thread stores 16 bytes at once where
// vector_stores = 1 says that they are aligned.
// Grid x: blocks of neighbouring columns (fastest), then samples, then groups. Grid y and z: 1. Dynamic shared memory: two
// buffers of input and weights.
// Macros read: MIN_BLOCKS, and those of sliding.cuh.
// Takes arrays of any strides, in elements. Chosen for 1 to 4 output channels a group.

#include "common.cuh"
#include "finish.cuh"
#include "sliding.cuh"
#include "window.cuh"

struct Params {
    index_t N, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t padding_left;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    index_t column_blocks;
    index_t tap_blocks, lead, chunk_channels, copy_elements;
    index_t vector_stores;
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_tail.py");

extern "C" __global__ void __launch_bounds__(kMaxThreads, MIN_BLOCKS) conv1d_tail(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    unsigned block = blockIdx.x;
    const index_t column_block = next_index(block, p.column_blocks);
    const index_t n = next_index(block, p.N);
    const index_t g = block;

    Slide slide = slide_with_layout(input, n, g, column_block, p);
    slide.taps = p.K;
    slide.columns = p.L_out;
    slide.first = -p.padding_left;
    weight += g * p.C_out_g * p.weight_stride_out;                            // weight[g*C_out_g, 0, 0]
    output += n * p.output_stride_n + g * p.C_out_g * p.output_stride_c;      // output[n, g*C_out_g, 0]

    const auto weight_at = [&](int row, index_t c_in, index_t k) -> const storage_t* {
        if (row >= p.C_out_g) return nullptr;
        return weight + (row * p.weight_stride_out + c_in * p.weight_stride_in + k * p.weight_stride_k);
    };
    // `place` is null where the result does not exist.
    const auto result = [&](int row, acc_t sum, const storage_t* place) {
        return finish(sum, epilogue.channel(g * p.C_out_g + row), place);
    };
    const auto store = [&](int row, index_t l_out, const acc_t(&sums)[kVec]) {
        if (row >= p.C_out_g) return;
        storage_t* const y = output + (row * p.output_stride_c + l_out * p.output_stride_l);
        StorageWords vector;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const storage_t* const place = l_out + j < p.L_out ? y + j * p.output_stride_l : nullptr;
            set_element(vector, j, result(row, sums[j], place));
        }
        if (p.vector_stores && l_out + kVec <= p.L_out) {
            *reinterpret_cast<StorageWords*>(y) = vector;
            return;
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            if (l_out + j < p.L_out) y[j * p.output_stride_l] = element_of(vector, j);
        }
    };
    const auto store_one = [&](int row, index_t l_out, acc_t sum) {
        storage_t* const place = output + (row * p.output_stride_c + l_out * p.output_stride_l);
        if (row < p.C_out_g) *place = result(row, sum, place);
    };
    slide_sums(slide, weight_at, store, store_one);
}
