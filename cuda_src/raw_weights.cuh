// Weights of mma.cuh in the layer's own order (RAW_WEIGHT = 1): each block packs those of its rows for itself, chunk by chunk,
// where another launch that packs them all would take longer. The products are those of packed weights, in their order.
//
// Of a row of weight[C_out, C_in_g, K] a chunk has a piece of units*K vectors of 16 bytes. The pieces of a block's rows make a
// box, which arrives in one of kBoxes buffers of shared memory while earlier chunks are multiplied. From there its elements
// are gathered into the chunk's packed weights (pack_mma_weight.cu), which all stages of the chunk read.
//
// Needs contiguous weights that begin at a multiple of 16 bytes, in rows of whole vectors.

#pragma once

#include "packed_weight.cuh"

constexpr int kBoxes = 2;
constexpr int kRowGroups = BLOCK_M / 8;  // of eight rows, which a warp packs at a time, by four pairs
constexpr int kGroupWarps = kRowGroups < kThreads / 32 ? kRowGroups : kThreads / 32;
constexpr int kPairWarps = kThreads / 32 / kGroupWarps;  // warps that share a group's pairs

// The weights of one row, for canonical_sum.
struct TileWeights : EveryWeight {
    const storage_t* weight;
    index_t taps;

    __device__ __forceinline__ TileWeights(const Tile& tile, const Window&, index_t row)
        : weight(reinterpret_cast<const storage_t*>(tile.weight) + (row - tile.row_begin) * (tile.C_in_g * tile.row_taps)),
          taps(tile.row_taps) {}
    __device__ __forceinline__ acc_t load(index_t c_in, index_t tap) const {
        return PackedWeight::of(weight[c_in * taps + tap]).value();
    }
};

struct RawWeights {
    const StorageVector* weight;  // of the block's first row, the chunk that is copied next
    index_t row_vectors, left;    // vectors of a row, and those from `weight` on
    StorageVector* boxes;
    StorageVector* packed;
    int rows, taps, units;  // of the block, those that exist; of a chunk
    int vectors, pitch;     // of a piece; from row to row of a box, an odd number, so that eight rows are in different banks
    int slot = 0;           // that is packed next

    // 16-byte vectors of shared memory.
    static __device__ __forceinline__ index_t shared_vectors(const Tile& tile, const Window& window) {
        return window.pairs * (kParts * BLOCK_M) + kBoxes * BLOCK_M * (window.units * tile.row_taps | 1);
    }

    // Copies the first chunks from `chunk` on.
    __device__ __forceinline__ RawWeights(
        const Tile& tile, const Window& window, index_t chunk, index_t chunk_end, StorageVector* shared)
        : row_vectors(tile.C_in_g * tile.row_taps / kUnit), packed(shared),
          rows(int(tile.rows - tile.row_begin)), taps(int(tile.row_taps)), units(int(window.units)) {
        vectors = units * taps;
        pitch = vectors | 1;
        weight = tile.weight + chunk * vectors;
        left = min_index(row_vectors, chunk_end * vectors) - chunk * vectors;
        boxes = packed + window.pairs * (kParts * BLOCK_M);
        // Pairs that only fill up the last stage have zero weights.
        for (index_t i = vectors * (kParts * BLOCK_M) + threadIdx.x; i < window.pairs * (kParts * BLOCK_M); i += kThreads) {
            packed[i] = StorageVector();
        }
#pragma unroll 1
        for (int box = 0; box < kBoxes; ++box) copy(box);
    }

    // Copies the next chunk's pieces to a buffer, with zeros for rows and channels that do not exist.
    __device__ __forceinline__ void copy(int box) {
        const int step_row = kThreads / vectors, step_v = kThreads - step_row * vectors;
        int row = int(threadIdx.x) / vectors, v = int(threadIdx.x) - row * vectors;
        StorageVector* to = boxes + (box * BLOCK_M + row) * pitch + v;
        const StorageVector* from = weight + (row * row_vectors + v);
#pragma unroll 1
        while (row < (left > 0 ? BLOCK_M : 0)) {
            if (row < rows && v < left) {
                copy_async(to, from);
            } else {
                *to = StorageVector();
            }
            row += step_row;
            v += step_v;
            to += step_row * pitch + step_v;
            from += step_row * row_vectors + step_v;
            if (v >= vectors) {
                ++row;
                v -= vectors;
                to += pitch - vectors;
                from += row_vectors - vectors;
            }
        }
        copy_async_commit();
        weight += vectors;
        left -= vectors;
    }

    // Packs the chunk that is multiplied next, and has the one behind the others copied. All threads of the block call this
    // together; it separates what they wrote before from what they read behind it.
    __device__ __forceinline__ void pack() {
        copy_async_wait_group<kBoxes - 1>();
        __syncthreads();
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int first = lane / 8 + warp / kGroupWarps * 4, step = 4 * kPairWarps;
        const int step_unit = step / taps, step_tap = step - step_unit * taps;
#pragma unroll 1
        for (int group = warp % kGroupWarps; group < kRowGroups; group += kGroupWarps) {
            const int row = group * 8 + lane % 8;
            const storage_t* const from = reinterpret_cast<const storage_t*>(boxes + (slot * BLOCK_M + row) * pitch);
            int unit = first / taps, tap = first - unit * taps;
#pragma unroll 1
            while (unit < units) {
                StorageVector large, small;
#pragma unroll
                for (int e = 0; e < kUnit; ++e) {
                    const PackedWeight w = PackedWeight::of(from[(unit * kUnit + e) * taps + tap]);
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
        copy(slot);
        slot = slot + 1 == kBoxes ? 0 : slot + 1;
    }
};
