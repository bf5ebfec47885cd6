// append_samples: moves the samples of a window forward and appends new ones, in place, for gpuconv/stream.
//
//   window[n, c, i] = window[n, c, i + L]    for i < held
//   window[n, c, held + l] = input[n, c, l]  for l < L
//
// Grid x: one block of BLOCK_SIZE threads for each row (n, c), c fastest. Grid y and z: 1. No shared memory.
// The window is contiguous, its rows have held + L elements; the input has any strides, in elements.

#include "common.cuh"

struct Params {
    index_t C, held, L;
    index_t input_stride_n, input_stride_c, input_stride_l;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/append.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE) append_samples(
    const storage_t* __restrict__ input,  // [N, C, L]
    storage_t* window,                    // [N, C, held + L]
    const Params p) {
    const index_t row = blockIdx.x;
    const index_t n = row / p.C, c = row - n * p.C;
    input += n * p.input_stride_n + c * p.input_stride_c;  // input[n, c, 0]
    window += row * (p.held + p.L);                        // window[n, c, 0]
    // Samples move towards the front; each is read before its place is overwritten.
    for (index_t first = 0; first < p.held; first += BLOCK_SIZE) {
        const index_t i = first + threadIdx.x;
        const bool moves = i < p.held;
        const storage_t value = moves ? window[i + p.L] : scalar::storage_zero();
        __syncthreads();
        if (moves) window[i] = value;
    }
    __syncthreads();
    for (index_t l = threadIdx.x; l < p.L; l += BLOCK_SIZE) window[p.held + l] = input[l * p.input_stride_l];
}
