// The loop of conv1d_ends and conv_transpose1d_ends over the outputs of a row that must be written after another kernel.
//
// These are the first `first` outputs, and all from kept_outputs(sample, p) on. Outputs behind the sample's output length are
// cleared, the others are summed in the canonical order.
//
// Blocks have BLOCK_SIZE/32 warps, `parts` of them for each row (n, c_out), c_out fastest; where the grid is shorter, warps take
// several. The lanes of a row's warps take its outputs in turn.

#pragma once

#include "common.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "one_result.cuh"
#include "samples.cuh"

template <typename P>
__device__ __forceinline__ void write_ends(
    const storage_t* input, const storage_t* weight, result_t* output, const Epilogue& epilogue,
    const InputActivation& input_activation, const P& p SAMPLES_PARAMETER) {
    const int lane = threadIdx.x % 32;
    const index_t grid_warps = index_t(gridDim.x) * (BLOCK_SIZE / 32);
    for (index_t warp = index_t(blockIdx.x) * (BLOCK_SIZE / 32) + threadIdx.x / 32; warp < p.num_warps; warp += grid_warps) {
        const index_t number = warp / p.parts, part = warp - number * p.parts;
        const OutputRow row(number, input, weight, p);
        const Extents sample = extents_of(row.n, p SAMPLES_VALUE);
        const index_t kept = kept_outputs(sample, p);
        for (index_t i = part * 32 + lane; i < p.first + (p.L_out - kept); i += p.parts * 32) {
            const index_t l_out = i < p.first ? i : kept + (i - p.first);
            const index_t place = row.place(l_out, p);
            if (l_out >= sample.L_out) {
                output[place] = result_t();
                continue;
            }
            const acc_t sum = sum_of(row, taps_of(l_out, sample.L_in, p), sample.L_in, input_activation, p);
            output[place] = finish(sum, epilogue.channel(row.c_out), output + place);
        }
    }
}
