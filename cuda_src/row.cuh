// One row of a kernel's matrix product: its output channel, and its phase where rows have one.

#pragma once

#include "common.cuh"

struct Row {
    index_t taps;           // that the row has
    index_t output_offset;  // of its channel, from Tile::output
    index_t shift;          // l_out = q*output_step + output_first + shift
    index_t channel;        // of the whole output
};

// The row of a forward convolution: a channel of the tile's group. P is the kernel's Params, here and in phases.cuh.
template <typename Tile, typename P>
__device__ __forceinline__ Row channel_row(const Tile& tile, index_t row, const P& p) {
    return Row{p.K, row * p.output_stride_c, 0, tile.group * p.C_out_g + row};
}
