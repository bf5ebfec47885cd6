// conv1d_edges: the outputs of a convolution whose windows cross an edge of the input, for padding modes other than zeros
// (edge.cuh); one thread per output element. It is the second step of the families that compute as with zeros.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in is the index that the position l_out*stride - padding_left + k*dilation stands for,
//   for the first `first` and the last `edges` - `first` of l_out.
//
// Sums in the order of conv1d_direct, so that the results have the bits of the base family.
//
// Grid x: blocks of BLOCK_SIZE consecutive elements of these outputs (n, c_out, edge), edge fastest; where the grid is
// shorter than these, threads take several. Grid y and z: 1. No shared memory.
// Takes arrays of any strides, zero and negative ones too, in elements.

#include "common.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "one_result.cuh"

struct Params : Convolution {
    index_t C_out, num_outputs;  // N * C_out * edges
    index_t edges, first;
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/edges.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) conv1d_edges(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_outputs; i += grid_size) {
        const index_t number = i / p.edges, edge = i - number * p.edges;
        const OutputRow row(number, input, weight, p);
        const index_t l_out = edge < p.first ? edge : p.L_out - p.edges + edge;
        const acc_t sum = sum_of(row, taps_of(l_out, p.L_in, p), p.L_in, input_activation, p);
        const index_t place = row.place(l_out, p);
        output[place] = finish(sum, epilogue.channel(row.c_out), output + place);
    }
}
