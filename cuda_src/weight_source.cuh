// How the kernels that pack weights read them.
//
// IS_TRANSPOSED = 0: product = g, row = c_out of the group, tap = k: weight[g*C_out_g + row, c_in, k].
// IS_TRANSPOSED = 1, PHASES_IN_ROWS = 1: product = g, row = c_out*stride + phase, k = phase + tap*stride.
// IS_TRANSPOSED = 1, PHASES_IN_ROWS = 0: product = g*stride + phase, row = c_out, k = k_first + tap*tap_step with the k_first
// of conv_transpose1d_gather.cu. In both, weight[g*C_in_g + c_in, c_out, k].
//
// A block takes a box: box_out channels c_out, with box_phases phases of each, by box_in channels c_in, by box_taps taps of
// one product. Neighbouring lanes read neighbours in memory and leave them in shared memory, from where they are stored in
// another order. Either box_out is 1 or the box has all phases, so that its rows are neighbours.
//
// Macros read: BLOCK_SIZE, IS_TRANSPOSED, PHASES_IN_ROWS.

#pragma once

#include "common.cuh"

// Where a block's box begins. Params has the fields that are read here and in read_box.
struct WeightBox {
    index_t product;
    index_t c_out, phase;  // of the product
    int phases;            // of the box
    index_t in_part;       // of in_parts
    index_t c_in, tap;
    index_t row;           // c_out and phase as a row
    int rows;

    template <typename Params>
    __device__ __forceinline__ WeightBox(unsigned block, const Params& p) {
        tap = index_t(next_index(block, p.tap_parts)) * p.box_taps;
        in_part = next_index(block, p.in_parts);
        c_in = in_part * p.box_in;
        phase = PHASES_IN_ROWS ? index_t(next_index(block, p.phase_parts)) * p.box_phases : 0;
        c_out = index_t(next_index(block, p.out_parts)) * p.box_out;
        product = block;
        phases = PHASES_IN_ROWS ? int(min_index(p.box_phases, p.stride - phase)) : 1;
        row = PHASES_IN_ROWS ? c_out * p.stride + phase : c_out;
        rows = int(p.box_out) * phases;
    }
};

// Calls store(row, c_in, tap, weight), counted from the box's first, for every place of the box; where the layer has no
// weight it is zero. Every thread of the block calls this.
template <typename Params, typename Store>
__device__ __forceinline__ void read_box(
    const storage_t* weight, const WeightBox& box, const Params& p, const Store& store) {
    constexpr int kWarps = BLOCK_SIZE / 32;
    index_t g = box.product, k_first = 0, k_step = 1;
    bool has_taps = true;
    if (IS_TRANSPOSED && PHASES_IN_ROWS) {
        k_step = p.stride;
    } else if (IS_TRANSPOSED) {
        g = box.product / p.stride;
        const index_t phase = box.product - g * p.stride, quotient = phase / p.phase_gcd;
        has_taps = quotient * p.phase_gcd == phase;
        k_first = quotient % p.tap_step * p.phase_inverse % p.tap_step;
        k_step = p.tap_step;
    }
    // Lanes follow what is innermost in memory, warps the outer channel.
    const int inner = int(IS_TRANSPOSED ? p.box_out : p.box_in) * int(p.box_taps) * box.phases;
    const int outer = int(IS_TRANSPOSED ? p.box_in : p.box_out);
#pragma unroll 1
    for (int first = 0; first < inner; first += 32) {
        const int i = first + threadIdx.x % 32;
        const int tap_and_channel = i / box.phases, phase = i - tap_and_channel * box.phases;
        const int channel = tap_and_channel / int(p.box_taps), tap = tap_and_channel - channel * int(p.box_taps);
        const index_t k = k_first + box.phase + phase + (box.tap + tap) * k_step;
        const bool is_tap = has_taps && i < inner && k < p.K;
#pragma unroll 4
        for (int j = threadIdx.x / 32; j < outer; j += kWarps) {
            const int out = IS_TRANSPOSED ? channel : j, in = IS_TRANSPOSED ? j : channel;
            const index_t c_out = box.c_out + out, c_in = box.c_in + in;
            const bool exists = is_tap && c_out < p.C_out_g && c_in < p.C_in_g;
            const index_t o = IS_TRANSPOSED ? c_out : g * p.C_out_g + c_out, c = IS_TRANSPOSED ? g * p.C_in_g + c_in : c_in;
            const storage_t w = load_or_zero(
                weight + (o * p.weight_stride_out + c * p.weight_stride_in + k * p.weight_stride_k), exists);
            if (i < inner) store(out * box.phases + phase, in, tap, w);
        }
    }
}
