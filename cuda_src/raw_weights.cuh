// Weights of mma.cuh in the layer's own order (RAW_WEIGHT = 1): each block packs those of its rows for itself, chunk by chunk,
// where another launch that packs them all would take longer. The products are those of packed weights, in their order.
//
// Along the last axes of the weight a block needs one piece of each line, from a multiple of 16 bytes on. Of
// weight[C_out, C_in_g, K] a line is a row, whose piece are the channels and taps of a chunk. Of weight[C_in, C_out_g, K]
// (IS_TRANSPOSED = 1) a line is an input channel of the chunk, whose piece are the rows of the block with their taps. The
// pieces make a box, which arrives in one of kBoxes buffers of shared memory while earlier chunks are multiplied. From there
// its elements are gathered into the chunk's packed weights (pack_mma_weight.cu), which all stages of the chunk read.
//
// Needs contiguous weights that begin at a multiple of 16 bytes, in lines of whole vectors, and phases that are rows.
//
// Macros read: IS_TRANSPOSED, PHASES_IN_ROWS, and those of fragments.cuh.

#pragma once

#include "canonical_sum.cuh"
#include "common.cuh"
#include "fragments.cuh"
#include "mma_tile.cuh"
#include "packed_weight.cuh"

constexpr int kBoxes = 2;
constexpr int kRowGroups = BLOCK_M / 8;  // of eight rows, which a warp packs at a time, by four pairs
constexpr int kGroupWarps = kRowGroups < kThreads / 32 ? kRowGroups : kThreads / 32;
constexpr int kPairWarps = kThreads / 32 / kGroupWarps;  // warps that share a group's pairs
constexpr int kPackWarps = kGroupWarps * kPairWarps;     // others have no part in packing

// Neighbouring rows that are phases of one output channel, and from tap to tap of a row; 1 where rows are channels.
template <typename Tile>
__device__ __forceinline__ int phases_of(const Tile& tile) { return PHASES_IN_ROWS ? int(tile.phases) : 1; }
template <typename Tile>
__device__ __forceinline__ int tap_step_of(const Tile& tile) { return PHASES_IN_ROWS ? int(tile.output_step) : 1; }

// The weights of one row, for canonical_sum.
struct TileWeights : EveryWeight {
    const storage_t* weight;
    index_t channel_step;
    int tap_step;

    template <typename Tile, typename Window>
    __device__ __forceinline__ TileWeights(const Tile& tile, const Window&, index_t row)
        : weight(reinterpret_cast<const storage_t*>(tile.weight)), channel_step(tile.K), tap_step(tap_step_of(tile)) {
        const int phases = phases_of(tile);
        const index_t c_out = row / phases;
        weight += c_out * (IS_TRANSPOSED ? tile.K : tile.C_in_g * tile.K) + (tile.first_phase + row - c_out * phases);
        if (IS_TRANSPOSED) channel_step *= tile.rows / phases;
    }
    __device__ __forceinline__ acc_t load(index_t c_in, index_t tap) const {
        return PackedWeight::of(weight[c_in * channel_step + tap * tap_step]).value();
    }
};

// Vectors of a piece, and lines of a box.
struct Box {
    int vectors, lines;

    template <typename Tile, typename Window>
    static __device__ __forceinline__ Box of(const Tile& tile, const Window& window) {
        const int K = int(tile.K), phases = phases_of(tile), channels = int(window.units) * kUnit;
        if (!IS_TRANSPOSED) return Box{int(window.units) * K, BLOCK_M};
        // Output channels that a block may meet, and what lies in front of the first and behind the last in its vectors.
        const int met = BLOCK_M / phases + (BLOCK_M % phases == 0 ? 0 : 2);
        return Box{met * K / kUnit + 2, channels};
    }
    // From line to line: odd, so that eight of them lie on different banks.
    __device__ __forceinline__ int pitch() const { return vectors | 1; }
    __device__ __forceinline__ int size() const { return lines * pitch(); }
};

// What a block keeps of them from chunk to chunk; all else is computed again, since registers are few.
struct RawWeights {
    const StorageVector* weight;  // where the first piece begins of the chunk that is copied next
    index_t left;                 // of what the chunks take from: vectors of a row, or (IS_TRANSPOSED) input channels
    int slot = 0;                 // of the box that is packed next, and then of the one that is copied

    // 16-byte vectors of shared memory: the packed weights of a chunk, then boxes.
    template <typename Tile>
    static __device__ __forceinline__ index_t packed_vectors(const Tile& tile) {
        return tile.pairs * (kParts * BLOCK_M);
    }
    template <typename Tile, typename Window>
    static __device__ __forceinline__ index_t shared_vectors(const Tile& tile, const Window& window) {
        return packed_vectors(tile) + kBoxes * Box::of(tile, window).size();
    }
    // Of a line.
    template <typename Tile>
    static __device__ __forceinline__ index_t line_vectors(const Tile& tile) {
        return (IS_TRANSPOSED ? tile.rows / phases_of(tile) : tile.C_in_g) * tile.K / kUnit;
    }
    // From the group's first output channel on, the elements of a line in front of the block's first row.
    template <typename Tile>
    static __device__ __forceinline__ index_t elements_before(const Tile& tile) {
        return tile.row_begin / phases_of(tile) * tile.K;
    }

    // Of chunks `chunk` to chunk_end - 1.
    template <typename Tile, typename Window>
    __device__ __forceinline__ RawWeights(
        const Tile& tile, const Window& window, index_t chunk, index_t chunk_end, StorageVector* packed) {
        const Box box = Box::of(tile, window);
        if (IS_TRANSPOSED) {
            left = min_index(tile.C_in_g, chunk_end * box.lines) - chunk * box.lines;
            weight = tile.weight + (chunk * box.lines * line_vectors(tile) + elements_before(tile) / kUnit);
        } else {
            left = min_index(line_vectors(tile), chunk_end * box.vectors) - chunk * box.vectors;
            weight = tile.weight + (tile.row_begin * line_vectors(tile) + chunk * box.vectors);
        }
        // Pairs that only fill up the last stage have zero weights.
#pragma unroll 1
        for (index_t i = window.units * tile.row_taps * (kParts * BLOCK_M) + threadIdx.x; i < packed_vectors(tile);
             i += kThreads) {
            packed[i] = StorageVector();
        }
    }

    // Before the first chunk is loaded: has the first boxes copied. Before each chunk that is multiplied: packs it, and has the
    // next box copied. All threads of the block call this together; it separates what they wrote before from what they read
    // behind it.
    template <typename Tile, typename Window>
    __device__ __forceinline__ void next(
        bool is_multiplied, const Tile& tile, const Window& window, StorageVector* packed) {
        if (is_multiplied) pack(tile, window, packed);
#pragma unroll 1
        for (int boxes_left = is_multiplied ? 1 : kBoxes; boxes_left > 0; --boxes_left) {
            copy(tile, window, packed + packed_vectors(tile));
        }
    }

private:
    // Copies the next chunk's pieces to a buffer, with zeros for what does not exist.
    template <typename Tile, typename Window>
    __device__ __forceinline__ void copy(const Tile& tile, const Window& window, StorageVector* boxes) {
        const Box box = Box::of(tile, window);
        const int vectors = box.vectors, pitch = box.pitch();
        const index_t line_vectors = RawWeights::line_vectors(tile);
        const index_t vectors_left = IS_TRANSPOSED ? line_vectors - elements_before(tile) / kUnit : left;
        const index_t lines_left = IS_TRANSPOSED ? left : tile.rows - tile.row_begin;
        const int step_line = kThreads / vectors, step_v = kThreads - step_line * vectors;
        int line = int(threadIdx.x) / vectors, v = int(threadIdx.x) - line * vectors;
        StorageVector* to = boxes + (slot * box.size() + line * pitch + v);
        const StorageVector* from = weight + (line * line_vectors + v);
        const int end = left > 0 ? box.lines : 0;
#pragma unroll 1
        while (line < end) {
            if (line < lines_left && v < vectors_left) {
                copy_async(to, from);
            } else {
                *to = StorageVector();
            }
            line += step_line;
            v += step_v;
            to += step_line * pitch + step_v;
            from += step_line * line_vectors + step_v;
            if (v >= vectors) {
                ++line;
                v -= vectors;
                to += pitch - vectors;
                from += line_vectors - vectors;
            }
        }
        copy_async_commit();
        slot = slot + 1 == kBoxes ? 0 : slot + 1;
        weight += IS_TRANSPOSED ? box.lines * line_vectors : vectors;
        left -= IS_TRANSPOSED ? box.lines : vectors;
    }

    // Gathers the elements of a box.
    template <typename Tile, typename Window>
    __device__ __forceinline__ void pack(const Tile& tile, const Window& window, StorageVector* packed) {
        copy_async_wait_group<kBoxes - 1>();
        __syncthreads();
        const Box box = Box::of(tile, window);
        const int K = int(tile.K), taps = int(tile.row_taps), units = int(window.units);
        const int phases = phases_of(tile), tap_step = tap_step_of(tile);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int first_pair = lane / 8 + warp / kGroupWarps * 4, step = 4 * kPairWarps;
        const int step_unit = step / taps, step_tap = step - step_unit * taps;
        const int element_step = IS_TRANSPOSED ? box.pitch() * kUnit : K;  // from channel to channel
        // The block's first row among the rows of its output channel, and that channel in a piece.
        const int phase_begin = PHASES_IN_ROWS ? int(tile.row_begin % phases) : 0;
        const int first = IS_TRANSPOSED ? int(elements_before(tile) % kUnit) : 0;
        const storage_t* const elements =
            reinterpret_cast<const storage_t*>(packed + packed_vectors(tile) + slot * box.size()) + first;
#pragma unroll 1
        for (int group = warp % kGroupWarps; group < kRowGroups; group += kGroupWarps) {
            if (kPackWarps < kThreads / 32 && warp >= kPackWarps) break;
            const int row = group * 8 + lane % 8;
            const int c_out = (row + phase_begin) / phases;
            const int phase = int(tile.first_phase) + row + phase_begin - c_out * phases;
            const storage_t* const from = elements + (IS_TRANSPOSED ? c_out * K + phase : row * box.pitch() * kUnit);
            int unit = first_pair / taps, tap = first_pair - unit * taps;
#pragma unroll 1
            while (unit < units) {
                const bool exists = !PHASES_IN_ROWS || phase + tap * tap_step < K;
                StorageVector large, small;
#pragma unroll
                for (int e = 0; e < kUnit; ++e) {
                    const PackedWeight w = PackedWeight::of(
                        exists ? from[(unit * kUnit + e) * element_step + tap * tap_step] : scalar::storage_zero());
                    large.element[e] = w.large;
                    if (IS_SPLIT) small.element[e] = w.small;
                }
                StorageVector* const to = packed + ((tap * units + unit) * (kParts * BLOCK_M) + row);
                to[0] = large;
                if (IS_SPLIT) to[BLOCK_M] = small;
                unit += step_unit;
                tap += step_tap;
                if (tap >= taps) {
                    tap -= taps;
                    ++unit;
                }
            }
        }
        __syncthreads();
    }
};
