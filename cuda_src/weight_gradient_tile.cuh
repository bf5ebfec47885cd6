// What the parts of weight_gradient_mma.cu share: the sizes that its macros fix, and a block's share of the result.
//
// P stands for its Params.

#pragma once

#include "common.cuh"
#include "edge.cuh"
#include "fragments.cuh"

#ifndef TAP_WIDTH
#define TAP_WIDTH 1
#endif
#ifndef FEW_ROWS
#define FEW_ROWS 0
#endif
#ifndef COARSE_ALIGN
#define COARSE_ALIGN COARSE_WIDTH
#endif
#ifndef FINE_ALIGN
#define FINE_ALIGN FINE_WIDTH
#endif
#ifndef FINE_STRIDED
#define FINE_STRIDED 0
#endif
#ifndef COARSE_LAST
#define COARSE_LAST 0
#endif
#ifndef FINE_LAST
#define FINE_LAST 0
#endif

constexpr int kOctetUnits = 8 / kUnit;
constexpr int kOctetChannels = TAPS_IN_UNITS ? 1 : 8, kOctetTaps = 8 / kOctetChannels;
constexpr int kStepRows = 16;                  // positions of a step
constexpr int kDepth = 2 * kUnit;              // and of one product of matrices
constexpr int kUnitsM = BLOCK_M / kUnit;
// Rows from unit to unit of an octet, and from octet to octet: fragments of 32-bit operands read both units of an octet at
// once, and stores go to eight units.
constexpr int kHalfM = CHUNK_ROWS + (kUnit == 8 ? 0 : 4);
constexpr int kPitchM = kOctetUnits * kHalfM + 1;
constexpr int kCoarsePart = BLOCK_M / 8 * kPitchM;  // vectors
constexpr bool kCopiesCoarse = COARSE_LAST && kUnit == 8, kCopiesFine = FINE_LAST && kUnit == 8;  // as they are
static_assert(CHUNK_ROWS % kStepRows == 0, "chunks are whole steps: gpuconv/families/weight_gradient_mma.py");
static_assert(!TAPS_IN_UNITS || FINE_WIDTH == 1,
              "windows of taps are loaded position by position: gpuconv/families/weight_gradient_mma.py");
static_assert(kUnit == 8 || (COARSE_WIDTH == COARSE_ALIGN || COARSE_ALIGN > 1) && (FINE_WIDTH == FINE_ALIGN || FINE_ALIGN > 1),
              "only rows of 16 bits share words: gpuconv/families/weight_gradient_mma.py");
static_assert((!COARSE_LAST || COARSE_WIDTH == 1) && (!FINE_LAST || (FINE_WIDTH == 1 && !TAPS_IN_UNITS)),
              "units are of one position and of channels: gpuconv/families/weight_gradient_mma.py");
static_assert(!FINE_STRIDED || FINE_WIDTH == 4,
              "rows of windows are loaded by fours: gpuconv/families/weight_gradient_mma.py");
static_assert(!FEW_ROWS || !COARSE_LAST, "units of fewer rows are no whole ones: gpuconv/families/weight_gradient_mma.py");
static_assert(kIsEmptyOutside || FINE_WIDTH == 1,
              "positions outside fine are loaded together: gpuconv/families/weight_gradient_mma.py");
static_assert(kStepRows == SPLIT_TERMS, "SPLIT_TERMS differs from gpuconv/families/arithmetic.py");

// What a block computes. Rows, octets and taps are those of the group.
struct Tile {
    index_t slice, channel, fine_channel;  // the first channels of the group
    index_t row_begin, octet_begin, tap_begin;
    index_t rows, channels, taps;  // that exist: of coarse, of fine, and of each channel of fine
    index_t elements;              // of all octets
};

template <typename P>
__device__ __forceinline__ Tile find_tile(unsigned block, const P& p) {
    Tile tile;
    tile.row_begin = index_t(next_index(block, p.row_tiles)) * BLOCK_M;
    tile.tap_begin = index_t(next_index(block, p.tap_tiles)) * p.block_taps;
    tile.octet_begin = index_t(next_index(block, p.octet_tiles)) * p.block_octets;
    const index_t group = next_index(block, p.groups);
    tile.slice = block;
    tile.channel = group * p.C_coarse_g;
    tile.fine_channel = group * p.C_fine_g;
    tile.rows = min_index(p.C_coarse_g - tile.row_begin, BLOCK_M);
    tile.channels = min_index(p.C_fine_g - tile.octet_begin * kOctetChannels, p.block_octets * kOctetChannels);
    tile.taps = min_index(p.K - tile.tap_begin * kOctetTaps, p.block_taps * kOctetTaps);
    tile.elements = tile.channels * kOctetTaps;
    return tile;
}

// The channel of a unit's first element, of `channels`. The last unit ends with the last channel, so that it may begin with
// some that the unit before has too, and all channels of every unit exist.
__device__ __forceinline__ int first_of_unit(int unit, index_t channels) {
    return int(min_index(unit * kUnit, channels - kUnit));
}
__device__ __forceinline__ int first_row_of_unit(int unit, index_t rows) {
    return FEW_ROWS ? 0 : first_of_unit(unit, rows);
}
