// The phases of a transposed convolution: what conv_transpose1d_phases.cu and conv_transpose1d_mma.cu share.
//
// Write l_out + padding_left = q*stride + phase. The taps of a phase are k = k_first + j*tap_step, j = 0, 1, ..., and read
// l_in = q + l_shift - j*position_step (see one_result.cuh).
//
// With dilation 1, k_first = phase and l_shift = 0 for every phase, so one product computes all of them: its rows are
// (c_out, phase), phase inner (PHASES_IN_ROWS = 1; a row has ceil((K - phase)/stride) taps). Otherwise every phase is a
// product of its own with rows c_out; a phase may have no tap at all.
//
// Macros read: PHASES_IN_ROWS, and those of common.cuh.

#pragma once

#include "common.cuh"
#include "row.cuh"

struct Phase {
    index_t taps, l_shift;
};

// The phase of a product, or what all phases share where they are rows. Phases are indices of blocks, so they and their
// divisors fit in 32 bits.
template <typename P>
__device__ __forceinline__ Phase find_phase(unsigned phase, const P& p) {
    if (PHASES_IN_ROWS) return Phase{p.taps, 0};
    const unsigned phase_gcd = unsigned(p.phase_gcd), tap_step = unsigned(p.tap_step);
    const unsigned quotient = phase / phase_gcd;
    Phase found = {0, 0};
    if (quotient * phase_gcd == phase) {
        const index_t k_first = uindex_t(quotient % tap_step) * uindex_t(p.phase_inverse) % tap_step;
        found.l_shift = (index_t(phase) - k_first * p.dilation) / p.stride;  // exact, perhaps negative
        if (k_first < p.K) found.taps = ceil_div(p.K - k_first, p.tap_step);
    }
    return found;
}

// The row of a tile; where phases are rows, its output channels have `phases` of them from first_phase on.
template <typename Tile, typename P>
__device__ __forceinline__ Row phase_row(
    const Tile& tile, index_t row, index_t first_phase, index_t phases, const P& p) {
    const index_t c_out = PHASES_IN_ROWS ? row / phases : row;
    const index_t phase = PHASES_IN_ROWS ? first_phase + (row - c_out * phases) : 0;
    Row found;
    found.taps = PHASES_IN_ROWS ? (phase < p.K ? ceil_div(p.K - phase, p.stride) : 0) : tile.row_taps;
    found.output_offset = c_out * p.output_stride_c;
    found.shift = phase;
    found.channel = tile.group * p.C_out_g + c_out;
    return found;
}
