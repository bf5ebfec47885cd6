// sum_slices: adds the partial sums of a gradient's slices and rounds once.
//
//   result[i0, i1, i2] = sum over s < slices of partial[s, i0, i1, i2], or its conjugate
//
// in an order that depends on the number of slices alone: way w < ways adds the slices w, w + ways, w + 2*ways, ...; then
// the ways are added from the first to the last.
//
// Grid x: blocks of BLOCK_SIZE/ways consecutive results, i2 fastest; a thread takes one way of one of them. Grid y and z:
// 1. Dynamic shared memory: one sum for each thread where there are several ways.

#include "common.cuh"
#include "slices.cuh"

struct Params {
    index_t num_results;
    index_t slices, ways;
    index_t extent_1, extent_2;
    index_t is_conjugated;
    index_t result_offset;  // of element [0, 0, 0]
    index_t result_stride_0, result_stride_1, result_stride_2;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/slices.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 4) sum_slices(
    const acc_t* __restrict__ partial,   // [slices, extent_0, extent_1, extent_2]
    storage_t* __restrict__ result,      // [extent_0, extent_1, extent_2]
    const Params p) {
    acc_t* const smem_sums = reinterpret_cast<acc_t*>(dynamic_shared_memory());  // [ways][BLOCK_SIZE / ways]
    const int block_results = BLOCK_SIZE / int(p.ways);
    const int way = threadIdx.x / block_results;
    const index_t i = index_t(blockIdx.x) * block_results + (threadIdx.x - way * block_results);
    const bool exists = i < p.num_results;

    acc_t sum = scalar::zero();
    if (exists) {
        partial += i;
#pragma unroll 8
        for (index_t s = way; s < p.slices; s += p.ways) sum = add(sum, partial[s * p.num_results]);
    }
    if (p.ways > 1) {
        smem_sums[threadIdx.x] = sum;
        __syncthreads();
        if (way > 0) return;
        for (int other = 1; other < p.ways; ++other) sum = add(sum, smem_sums[other * block_results + threadIdx.x]);
    }
    if (!exists) return;
    const index_t row = i / p.extent_2, i2 = i - row * p.extent_2;
    const index_t i0 = row / p.extent_1, i1 = row - i0 * p.extent_1;
    result += p.result_offset;
    result[i0 * p.result_stride_0 + i1 * p.result_stride_1 + i2 * p.result_stride_2] =
        finish_gradient(sum, p.is_conjugated);
}
