// write_samples: writes the table of samples.cuh from the parameters of the launch, so that no copy from the host is needed,
// and a CUDA graph contains the values.
//
//   samples[first + i] = values[i]    for i < count, three values a sample
//
// Grid x: one block of BLOCK_SIZE threads. Grid y and z: 1. No shared memory. INDEX_BITS is 64.

#include "common.cuh"

struct Params {
    index_t first, count;
    index_t values[NUM_VALUES];
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/lengths.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE) write_samples(
    index_t* __restrict__ samples,  // [N, 3]
    const Params p) {
    for (index_t i = threadIdx.x; i < p.count; i += BLOCK_SIZE) samples[p.first + i] = p.values[i];
}
