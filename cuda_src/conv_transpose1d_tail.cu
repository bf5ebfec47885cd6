// conv_transpose1d_tail: transposed convolution of layers with few output channels a group and dilation 1, where the input
// dominates.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[g*C_in_g + c_in, c_out % C_out_g, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in*stride = l_out + padding_left - k,   taps without such an l_in left out.
//
// With l_out + padding_left = q*stride + phase the taps are k = phase + tap*stride, and tap reads l_in = q - tap: the sums of
// sliding.cuh with rows = (c_out, phase), columns = q.
// Grid x: blocks of THREAD_C rows (fastest, so that blocks with the same window run together), then of neighbouring columns,
// then samples, then groups. Grid y and z: 1. Dynamic shared memory: two buffers of input and weights.
// Macros read: MIN_BLOCKS, and those of sliding.cuh.
// Takes arrays of any strides, in elements. Chosen for 1 to 4 output channels a group and few rows.

#include "common.cuh"
#include "finish.cuh"
#include "sliding.cuh"
#include "window.cuh"

struct Params {
    index_t N, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t stride, padding_left;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_in, weight_stride_out, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    index_t row_blocks, column_blocks, columns, q_begin, taps;
    index_t tap_blocks, lead, chunk_channels, copy_elements;
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_tail.py");

extern "C" __global__ void __launch_bounds__(kMaxThreads, MIN_BLOCKS) conv_transpose1d_tail(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_in, C_out_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    unsigned block = blockIdx.x;
    const int row_begin = int(next_index(block, p.row_blocks)) * THREAD_C;
    const index_t column_block = next_index(block, p.column_blocks);
    const index_t n = next_index(block, p.N);
    const index_t g = block;
    const int stride = int(p.stride), rows = int(p.C_out_g) * stride;  // few, since the family refuses many

    Slide slide = slide_with_layout(input, n, g, column_block, p);
    slide.taps = p.taps;
    slide.columns = p.columns;
    slide.first = p.q_begin;
    weight += g * p.C_in_g * p.weight_stride_in;                          // weight[g*C_in_g, 0, 0]
    output += n * p.output_stride_n + g * p.C_out_g * p.output_stride_c;  // output[n, g*C_out_g, 0]

    const auto weight_at = [&](int row, index_t c_in, index_t tap) -> const storage_t* {
        const int c_out = (row_begin + row) / stride;
        const index_t k = row_begin + row - c_out * stride + tap * stride;
        if (row_begin + row >= rows || k >= p.K) return nullptr;
        return weight + (c_in * p.weight_stride_in + c_out * p.weight_stride_out + k * p.weight_stride_k);
    };
    // Stores `count` columns of one row from `column` on.
    const auto store_some = [&](int row, index_t column, const acc_t* sums, int count) {
        if (row_begin + row >= rows) return;
        const int c_out = (row_begin + row) / stride, phase = row_begin + row - c_out * stride;
        const Channel channel = epilogue.channel(g * p.C_out_g + c_out);
        index_t l_out = (p.q_begin + column) * stride + phase - p.padding_left;
        index_t offset = c_out * p.output_stride_c + l_out * p.output_stride_l;
#pragma unroll
        for (int j = 0; j < count; ++j) {
            storage_t* const place = output + offset;
            if (is_index(l_out, p.L_out)) *place = finish(sums[j], channel, place);
            l_out += stride;
            offset += stride * p.output_stride_l;
        }
    };
    const auto store = [&](int row, index_t column, const acc_t(&sums)[kVec]) { store_some(row, column, sums, kVec); };
    const auto store_one = [&](int row, index_t column, acc_t sum) { store_some(row, column, &sum, 1); };
    slide_sums(slide, weight_at, store, store_one);
}
