// weight_gradient_direct: gradient of the weights, one thread per result and slice. Takes every problem and is chosen if no
// faster family takes it. It defines the order of summation of the families on CUDA cores.
//
//   grad_weight[r, c, k] = sum over n < N, l < L_coarse of coarse[n, r, l] * conj(fine[n, g*C_fine_g + c, l_fine]),
//   g = r / C_coarse_g,   l_fine = l*stride - padding_left + k*dilation,   terms outside [0, L_fine) left out;
//   the conjugate of that where is_conjugated.
//
// Grid x: blocks of BLOCK_SIZE consecutive elements of (slice, r, c, k), k fastest; where the grid is shorter, threads take
// several. Grid y and z: 1. No shared memory.
// With several slices their sums are stored in `partial` and sum_slices.cu follows; with one slice `partial` is null.
// Takes arrays of any strides, zero and negative ones too, in elements, and samples of different lengths (samples.cuh).

#include "common.cuh"
#include "slices.cuh"

struct Params {
    index_t num_sums;  // slices * C_coarse * C_fine_g * K
    index_t N, L_coarse, L_fine, K;
    index_t C_coarse, C_coarse_g, C_fine_g;
    index_t stride, padding_left, dilation;
    index_t slice_samples, slice_positions, slice_pieces;
    index_t is_conjugated;
    index_t coarse_stride_n, coarse_stride_c, coarse_stride_l;
    index_t fine_stride_n, fine_stride_c, fine_stride_l;
    index_t weight_stride_r, weight_stride_c, weight_stride_k;
    static constexpr bool is_exchanged = false;  // for slices.cuh
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/weight_gradient_direct.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 2) weight_gradient_direct(
    const storage_t* __restrict__ coarse,  // [N, C_coarse, L_coarse]
    const storage_t* __restrict__ fine,    // [N, C_fine, L_fine]
    acc_t* __restrict__ partial,           // [slices, C_coarse, C_fine_g, K], or null
    storage_t* __restrict__ grad_weight,   // [C_coarse, C_fine_g, K], or null
    SAMPLES_ARGUMENT const Params p) {
    const index_t columns = p.C_fine_g * p.K;
    const index_t grid_size = index_t(gridDim.x) * BLOCK_SIZE;
    for (index_t i = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x; i < p.num_sums; i += grid_size) {
        const index_t row = i / columns, column = i - row * columns;
        const index_t slice = row / p.C_coarse, r = row - slice * p.C_coarse;
        const index_t c = column / p.K, k = column - c * p.K;
        const index_t g = r / p.C_coarse_g;
        const acc_t sum = canonical_slice_sum<4>(
            coarse + r * p.coarse_stride_c, fine + (g * p.C_fine_g + c) * p.fine_stride_c, k, find_slice(slice, p), p SAMPLES_VALUE);
        store_sum(sum, slice, r, column, partial, grad_weight, p);
    }
}
