// The end of a block of weight_gradient_mma.cu: sums that are not finite are formed again, and all are stored, 16 rows of each
// warp at a time, which pass through shared memory so that they are stored in the order of (c, k).

#pragma once

#include "common.cuh"
#include "fragments.cuh"
#include "slices.cuh"
#include "weight_gradient_tile.cuh"

constexpr int kOutPitch = BLOCK_N + 4;            // of the sums that are to be stored
constexpr int kOutColumns = (BLOCK_N + 31) / 32;  // that a lane stores of a row

__device__ __forceinline__ bool is_finite(float x) { return (float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Stores the sums of a tile: among those of all slices, or as results where there is one slice.
template <typename P>
__device__ __forceinline__ void store_tile(
    Sums& acc, const Tile& tile, const storage_t* coarse, const storage_t* fine, acc_t* partial, storage_t* grad_weight,
    const P& p SAMPLES_PARAMETER) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    acc_t* const out = reinterpret_cast<acc_t*>(dynamic_shared_memory());  // [WARPS_M * 16][kOutPitch]
    acc_t* const mine = out + (warp / WARPS_N * 16 + lane / 4) * kOutPitch + warp % WARPS_N * kWarpN + lane % 4 * 2;
    // A lane stores the m-th of these of every row.
    int from[kOutColumns] = {};
    index_t to[kOutColumns] = {};
    const index_t to_c = partial != nullptr ? p.K : p.weight_stride_c;
    const index_t to_k = partial != nullptr ? 1 : p.weight_stride_k;
    const auto column_of = [&](int c, int tap) {
        if (TAPS_IN_UNITS) return c * int(p.block_taps) * 8 + tap;
        const int unit = c / kUnit, place = unit * kUnit + (c - first_of_unit(unit, tile.channels));
        return (place / 8 * int(p.block_taps) + tap) * 8 + place % 8;
    };
    const index_t first_c = tile.octet_begin * kOctetChannels, first_k = tile.tap_begin * kOctetTaps;
    const int taps = int(tile.taps), step_c = 32 / taps, step_tap = 32 - step_c * taps;
    int c = lane / taps, tap = lane - c * taps;
    // A single loop body keeps the code short: all entries move by one place, and the next one enters at the end.
#pragma unroll 1
    for (int m = 0; m < kOutColumns; ++m) {
#pragma unroll
        for (int e = 0; e + 1 < kOutColumns; ++e) {
            from[e] = from[e + 1];
            to[e] = to[e + 1];
        }
        from[kOutColumns - 1] = c < tile.channels ? column_of(c, tap) : -1;
        to[kOutColumns - 1] = (first_c + c) * to_c + (first_k + tap) * to_k;
        c += step_c;
        tap += step_tap;
        if (tap >= taps) {
            tap -= taps;
            ++c;
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kTilesM && i * 16 < tile.rows; ++i) {
#pragma unroll
        for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) mine[e / 2 * 8 * kOutPitch + j * 8 + e % 2] = acc[0][j][e];
        }
        __syncthreads();
        acc_t check = scalar::zero();  // becomes a NaN if a sum is not finite
        // The row of one of these places, or -1 if another place already has that channel.
        const auto row_of = [&](int place) {
            const int in_tile = place / 16 * kWarpM + i * 16 + place % 16, unit = in_tile / kUnit;
            const int row = first_row_of_unit(unit, tile.rows) + in_tile % kUnit;
            return row < unit * kUnit || (FEW_ROWS && row >= tile.rows) ? -1 : row;
        };
#pragma unroll 1
        for (int row = warp; row < WARPS_M * 16; row += kThreads / 32) {
            if (row_of(row) < 0) continue;
            const index_t r = tile.channel + tile.row_begin + row_of(row);
#pragma unroll
            for (int m = 0; m < kOutColumns; ++m) {
                if (from[m] < 0) continue;
                const acc_t sum = out[row * kOutPitch + from[m]];
                check = multiply_add(scalar::zero(), sum, check);
                if (partial != nullptr) {
                    partial[(tile.slice * p.C_coarse + r) * (p.C_fine_g * p.K) + to[m]] = sum;
                } else {
                    grad_weight[r * p.weight_stride_r + to[m]] = finish_gradient(sum, false);
                }
            }
        }
        if (NAN_FALLBACK && is_nan(check)) {
            const Slice s = find_slice(tile.slice, p);
#pragma unroll 1
            for (int task = 0; task < WARPS_M * 16 * kOutColumns; ++task) {
                const int row = task / kOutColumns, e = task % kOutColumns * 32 + lane;
                const int c = e / taps, tap = e - c * taps;
                if (row % (kThreads / 32) != warp || row_of(row) < 0 || c >= tile.channels) continue;
                if (is_finite(out[row * kOutPitch + column_of(c, tap)])) continue;
                const index_t r = tile.channel + tile.row_begin + row_of(row), k = first_k + tap;
                const index_t c_of_group = first_c + c;
                const acc_t sum = canonical_slice_sum(
                    coarse + r * p.coarse_stride_c, fine + (tile.fine_channel + c_of_group) * p.fine_stride_c, k, s,
                    p SAMPLES_VALUE);
                store_sum(sum, tile.slice, r, c_of_group * p.K + k, partial, grad_weight, p);
            }
        }
        __syncthreads();
        move_sums_up(acc);
    }
}
