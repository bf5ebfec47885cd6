// Where the kernels that pack weights find the weight of a row, a tap and a channel of a product.
//
// IS_TRANSPOSED = 0: product = g, row = c_out of the group, tap = k: weight[g*C_out_g + row, c_in, k].
// IS_TRANSPOSED = 1, PHASES_IN_ROWS = 1: product = g, row = c_out*stride + phase, k = phase + tap*stride.
// IS_TRANSPOSED = 1, PHASES_IN_ROWS = 0: product = g*stride + phase, row = c_out, k = k_first + tap*tap_step with the k_first
// of conv_transpose1d_gather.cu. In both, weight[g*C_in_g + c_in, c_out, k].
//
// Macros read: IS_TRANSPOSED, PHASES_IN_ROWS.

#pragma once

#include "common.cuh"

// Whether the weight exists; if so, *offset is its place. Params has the fields that are read here.
template <typename Params>
__device__ __forceinline__ bool find_weight(
    const Params& p, index_t product, index_t row, index_t tap, index_t c_in, index_t* offset) {
    index_t g = product, c_out = row, k = tap;
    bool exists = row < p.rows && c_in < p.C_in_g && tap < p.taps;
    if (IS_TRANSPOSED) {
        if (PHASES_IN_ROWS) {
            c_out = row / p.stride;
            k = row - c_out * p.stride + tap * p.stride;
        } else {
            g = product / p.stride;
            const index_t phase = product - g * p.stride;
            const index_t quotient = phase / p.phase_gcd;
            exists = exists && quotient * p.phase_gcd == phase;
            k = quotient % p.tap_step * p.phase_inverse % p.tap_step + tap * p.tap_step;
        }
        exists = exists && k < p.K;
    }
    const index_t outer = IS_TRANSPOSED ? c_out : g * p.C_out_g + c_out;
    const index_t inner = IS_TRANSPOSED ? g * p.C_in_g + c_in : c_in;
    *offset = outer * p.weight_stride_out + inner * p.weight_stride_in + k * p.weight_stride_k;
    return exists;
}
