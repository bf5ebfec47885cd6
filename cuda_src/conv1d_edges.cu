// conv1d_edges: the outputs of a convolution whose windows reach over an edge of the input, into padding that means samples
// (edge.cuh); one thread per output element. The second step of the families that compute as with padding by zeros.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in is what the position l_out*stride - padding_left + k*dilation means,
//   for the first `first` and the last `edges` - `first` of l_out.
//
// In the order of conv1d_direct, so that the result is that of the base family to the bit.
//
// Grid x: blocks of BLOCK_SIZE consecutive elements of these outputs (n, c_out, edge), edge fastest; where the grid is
// shorter than these, threads take several. Grid y and z: 1. No shared memory.
// Takes arrays of any strides, zero and negative ones too, in elements.

#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"

struct Params {
    index_t num_outputs;  // N * C_out * edges
    index_t edges, first;
    index_t C_out, L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t stride, padding_left, dilation;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/edges.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv1d_edges(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    const Params p) {
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_outputs; i += grid_size) {
        const index_t row = i / p.edges;
        const index_t edge = i - row * p.edges;
        const index_t n = row / p.C_out;
        const index_t c_out = row - n * p.C_out;
        const index_t g = c_out / p.C_out_g;
        const index_t l_out = edge < p.first ? edge : p.L_out - p.edges + edge;

        const storage_t* x = input + n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;  // input[n, g*C_in_g, 0]
        const storage_t* w = weight + c_out * p.weight_stride_out;                            // weight[c_out, 0, 0]
        const index_t l_first = l_out * p.stride - p.padding_left;  // the position of tap 0

        acc_t sum = scalar::zero();
        for (index_t c_in = 0; c_in < p.C_in_g; ++c_in) {
#pragma unroll 4
            for (index_t k = 0; k < p.K; ++k) {  // every position means a sample
                const index_t l_in = source_index(l_first + k * p.dilation, p.L_in).index;
                sum = multiply_add(
                    scalar::load(w[c_in * p.weight_stride_in + k * p.weight_stride_k]),
                    scalar::load(x[c_in * p.input_stride_c + l_in * p.input_stride_l]), sum);
            }
        }
        output[n * p.output_stride_n + c_out * p.output_stride_c + l_out * p.output_stride_l] =
            finish(sum, bias_or_zero(bias, c_out * p.bias_stride));
    }
}
