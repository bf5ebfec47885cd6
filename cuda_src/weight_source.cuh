// How the kernels that pack weights read them.
//
// IS_TRANSPOSED = 0: product = g, row = c_out of the group, tap = k: weight[g*C_out_g + row, c_in, k].
// IS_TRANSPOSED = 1, PHASES_IN_ROWS = 1: product = g, row = c_out*stride + phase, k = phase + tap*stride.
// IS_TRANSPOSED = 1, PHASES_IN_ROWS = 0: product = g*stride + phase, row = c_out, k = k_first + tap*tap_step with the k_first
// of one_result.cuh. In both, weight[g*C_in_g + c_in, c_out, k].
//
// A block takes a box: box_out channels c_out, with box_phases phases of each, by box_in channels c_in, by box_taps taps of
// one product. Either box_out is 1 or the box has all phases, so that its rows are neighbours. Lanes read neighbouring
// elements, 16 bytes at a time where is_wide allows it, and store them to shared memory in the same order: [outer channel,
// inner channel, k], where the outer channel is the first axis of the weight. Outer channels are box_pitch elements apart,
// inner ones box_k. From there they are gathered in another order.
//
// Macros read: BLOCK_SIZE, IS_TRANSPOSED, PHASES_IN_ROWS.

#pragma once

#include "common.cuh"

constexpr int kWarps = BLOCK_SIZE / 32;

// Where a block's box begins. Params has the fields that are read here and below.
struct WeightBox {
    index_t product;
    index_t c_out, phase;  // of the product
    int phases;            // of the box
    index_t c_in, tap;
    index_t row;           // c_out and phase as a row
    int rows;

    template <typename Params>
    __device__ __forceinline__ WeightBox(unsigned block, const Params& p) {
        tap = index_t(next_index(block, p.tap_parts)) * p.box_taps;
        c_in = index_t(next_index(block, p.in_parts)) * p.box_in;
        phase = PHASES_IN_ROWS ? index_t(next_index(block, p.phase_parts)) * p.box_phases : 0;
        c_out = index_t(next_index(block, p.out_parts)) * p.box_out;
        product = block;
        phases = PHASES_IN_ROWS ? int(min_index(p.box_phases, p.stride - phase)) : 1;
        row = PHASES_IN_ROWS ? c_out * p.stride + phase : c_out;
        rows = int(p.box_out) * phases;
    }
};

// Copies a box to shared memory, with zeros where the layer has no weights. Every thread of the block calls this, and waits for
// the others behind it.
template <typename Params>
__device__ __forceinline__ void read_box(
    const storage_t* weight, const WeightBox& box, const Params& p, storage_t* shared) {
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
    const int pitch = int(p.box_pitch), box_k = int(p.box_k);
    const int outer = int(IS_TRANSPOSED ? p.box_in : p.box_out), inner = int(IS_TRANSPOSED ? p.box_out : p.box_in);
    const index_t first_outer = IS_TRANSPOSED ? box.c_in : box.c_out, first_inner = IS_TRANSPOSED ? box.c_out : box.c_in;
    const index_t outer_end = IS_TRANSPOSED ? p.C_in_g : p.C_out_g, inner_end = IS_TRANSPOSED ? p.C_out_g : p.C_in_g;
    const index_t outer_stride = IS_TRANSPOSED ? p.weight_stride_in : p.weight_stride_out;
    const index_t inner_stride = IS_TRANSPOSED ? p.weight_stride_out : p.weight_stride_in;
    const storage_t* const from = weight + ((g * outer_end + first_outer) * outer_stride + first_inner * inner_stride);

    if (p.is_wide) {
        const int vectors = pitch / kStorageVec, count = outer * vectors;
        const index_t existing = (inner_end - first_inner) * p.K;  // elements of an outer channel, from `from` on
#pragma unroll 4
        for (int first = 0; first < count; first += BLOCK_SIZE) {
            const int i = first + threadIdx.x, j = i / vectors, element = (i - j * vectors) * kStorageVec;
            const bool exists = i < count && first_outer + j < outer_end && element < inner * box_k && element < existing;
            const Vector<unsigned> vector =
                load_or_zero(reinterpret_cast<const Vector<unsigned>*>(from + (j * outer_stride + element)), exists);
            if (i < count) *reinterpret_cast<Vector<unsigned>*>(shared + (j * pitch + element)) = vector;
        }
        return;
    }
#pragma unroll 1
    for (int first = 0; first < inner * box_k; first += 32) {
        const int i = first + threadIdx.x % 32;
        const int channel = i / box_k, tap_and_phase = i - channel * box_k;
        const int tap = tap_and_phase / box.phases, phase = tap_and_phase - tap * box.phases;
        // The last box of phases may have fewer phases than the others, so `tap` may pass its last tap.
        const bool has_tap = has_taps && tap < p.box_taps;
        const index_t k = has_tap ? k_first + box.phase + phase + (box.tap + tap) * k_step : 0;
        const bool is_inner = has_tap && i < inner * box_k && k < p.K && first_inner + channel < inner_end;
#pragma unroll 4
        for (int j = threadIdx.x / 32; j < outer; j += kWarps) {
            const storage_t w = load_or_zero(
                from + (j * outer_stride + channel * inner_stride + k * p.weight_stride_k),
                is_inner && first_outer + j < outer_end);
            if (i < inner * box_k) shared[j * pitch + i] = w;
        }
    }
}

// A row of a box, and where its weights lie in shared memory. All are counted from the box's first.
struct BoxRow {
    int c_out, phase, phases, first, channel_step, box_k;

    template <typename Params>
    __device__ __forceinline__ BoxRow(int row, const WeightBox& box, const Params& p) {
        c_out = row / box.phases;
        phase = row - c_out * box.phases;
        phases = box.phases;
        box_k = int(p.box_k);
        first = c_out * (IS_TRANSPOSED ? box_k : int(p.box_pitch));
        channel_step = IS_TRANSPOSED ? int(p.box_pitch) : box_k;
    }
    // Boxes of all taps leave out those that the layer does not have.
    __device__ __forceinline__ bool has(int tap) const { return tap * phases + phase < box_k; }
    __device__ __forceinline__ int place(int c_in, int tap) const {
        return first + c_in * channel_step + (tap * phases + phase);
    }
};
