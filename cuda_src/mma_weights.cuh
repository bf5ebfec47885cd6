// How the weights of a block come to shared memory in the tensor-core engine (mma.cuh): a ring of packed stages, or, where
// RAW_WEIGHT is 1, raw_weights.cuh.

#pragma once

#include "canonical_sum.cuh"
#include "common.cuh"
#include "fragments.cuh"
#include "mma_tile.cuh"
#include "packed_weight.cuh"

// A thread's share of a stage of weights, from copy kFirst on. A warp copies neighbouring vectors, so that one pair of
// addresses serves all of them by the small offsets that the instruction has: `from` points into the middle.
template <int kFirst = 0, bool kEnd = (kFirst == kStageCopies)>
struct StageCopy {
    static __device__ __forceinline__ void run(StorageVector* to, const StorageVector* from) {
        copy_async_at<kFirst * 32, (kFirst - kStageCopies / 2) * 32>(to, from);
        StageCopy<kFirst + 1>::run(to, from);
    }
};
template <int kFirst>
struct StageCopy<kFirst, true> {
    static __device__ __forceinline__ void run(StorageVector*, const StorageVector*) {}
};

// The weights of a block go round a ring of NUM_STAGES stages in shared memory: stage i is read from slot i % NUM_STAGES while
// stage i + NUM_STAGES - 1 is written, to the slot that was read last. This is a thread's part in copying them.
struct WeightRing {
    int copies_end;               // from this stage on no copies are left
    const StorageVector* weight;  // of the stage that is copied next
    StorageVector* to;            // in slot 0

    // Copies the first of `count` stages from `first` on.
    __device__ __forceinline__ WeightRing(const StorageVector* first, StorageVector* stages, int count) {
        const int first_copy = threadIdx.x / 32 * (32 * kStageCopies), lane = threadIdx.x % 32;
        copies_end = first_copy < kStageVectors ? count - (NUM_STAGES - 1) : -NUM_STAGES;
        weight = keep_in_register(first + (first_copy + lane + kStageCopies / 2 * 32));
        to = keep_in_register(stages + (first_copy + lane));
#pragma unroll
        for (int i = 0; i < NUM_STAGES - 1; ++i) load(i, i - (NUM_STAGES - 1));
    }
    // While `stage` is multiplied, copies the one NUM_STAGES - 1 behind it.
    __device__ __forceinline__ void load(int slot, int stage) {
        if (stage < copies_end) StageCopy<>::run(to + slot * kStageVectors, weight);
        weight += kStageVectors;
        copy_async_commit();
    }
};

// This lane's rows of a stage of weights: ldmatrix takes one address from each lane.
__device__ __forceinline__ const StorageVector* weight_rows(const StorageVector* stages) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return keep_in_register(stages + (lane / 16) * kParts * BLOCK_M + warp / WARPS_N * kWarpM + lane % 16);
}

// A weight of a packed vector, whose second part lies BLOCK_M vectors behind the first.
__device__ __forceinline__ acc_t packed_value(const StorageVector* packed, int element) {
    const acc_t w = scalar::load(packed->element[element]);
    if (!IS_SPLIT) return w;
    const acc_t low = scalar::load(packed[BLOCK_M].element[element]);
    return is_nan(w) ? low : w + low;  // where w_hi is a NaN, w_lo holds the weight itself
}

// The packed weights of one row, for canonical_sum.
struct PackedWeights : EveryWeight {
    const StorageVector* weight;         // of the row's first pair
    index_t units, pairs;                // of a chunk
    index_t taps;                        // of the row
    index_t fold;                        // see Window
    index_t chunk_pair = 0, unit = 0;    // of the channel: the chunk's first pair, and the unit in it
    int e = 0;                           // of the channel, in its unit

    __device__ __forceinline__ PackedWeights(const Tile& tile, const Window& window, index_t row)
        : weight(tile.weight + (row - tile.row_begin)), units(window.units), pairs(tile.pairs), taps(tile.row_taps),
          fold(window.fold) {}
    __device__ __forceinline__ acc_t load(index_t c_in, index_t tap) const {
        if (FOLDS_STRIDE) {
            const index_t taps_of_channel = tap / fold, channel = c_in * fold + (tap - taps_of_channel * fold);
            const index_t all_units = channel / kUnit, chunk = all_units / units;
            return weight_of(
                chunk * pairs + taps_of_channel * units + (all_units - chunk * units), int(channel - all_units * kUnit));
        }
        if (!TAPS_IN_UNITS) return weight_of(chunk_pair + tap * units + unit, e);
        const index_t place = IS_TRANSPOSED ? taps - 1 - tap : tap;
        const index_t begin = place / kUnit * kUnit;  // a last unit that is not whole holds the last kUnit taps
        return weight_of(begin / kUnit * units + c_in, int(place - min_index(begin, taps - kUnit)));
    }
    __device__ __forceinline__ acc_t weight_of(index_t pair, int element) const {
        return packed_value(weight + pair * (kParts * BLOCK_M), element);
    }
    __device__ __forceinline__ void next_channel() {
        if (++e < kUnit) return;
        e = 0;
        if (++unit < units) return;
        unit = 0;
        chunk_pair += pairs;
    }
};

#if RAW_WEIGHT
#include "raw_weights.cuh"
#else
typedef PackedWeights TileWeights;
#endif
