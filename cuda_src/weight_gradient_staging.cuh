// How the blocks of weight_gradient_mma.cu bring both arrays to shared memory: the tasks of their threads.

#pragma once

#include "common.cuh"
#include "edge.cuh"
#include "staging.cuh"
#include "weight_gradient_tile.cuh"

// Units of coarse as Task::of counts them: whole eights where lanes take as many.
constexpr int kTaskUnitsM =
    (COARSE_WIDTH == 1 && !COARSE_LAST) || kUnitsM < 8 ? kUnitsM : (kUnitsM + 7) / 8 * 8;
constexpr int kCoarseTasks = kTaskUnitsM * CHUNK_ROWS / COARSE_WIDTH;
constexpr int kAheadCoarse = (kCoarseTasks + kThreads - 1) / kThreads * COARSE_WIDTH < AHEAD_COARSE
    ? (kCoarseTasks + kThreads - 1) / kThreads : AHEAD_COARSE / COARSE_WIDTH;
constexpr int kAheadFine = AHEAD_FINE / FINE_WIDTH;
static_assert(AHEAD_COARSE % COARSE_WIDTH == 0 && AHEAD_FINE % FINE_WIDTH == 0,
              "whole tasks are loaded ahead: gpuconv/families/weight_gradient_mma.py");

// Where a row of the window lies, from the chunk's first sample and the position that its first l meets.
struct Place {
    index_t n, l;
};

// A thread's task in staging: `width` neighbouring positions of a unit. Neighbouring lanes take neighbouring positions of
// one unit or, where those are several each, which would meet on the same banks, one of up to eight units each; so they do
// where units are neighbours in memory.
struct Task {
    int unit, row;

    __device__ __forceinline__ static Task of(int index, int units, int runs, int width, bool is_last) {
        const int low = width == 1 && !is_last ? 1 : units < 8 ? units : 8;
        const int rest = index / low, block = rest / runs;
        return Task{block * low + (index - rest * low), (rest - block * runs) * width};
    }
};

// A task where units are contiguous: its row of a buffer, -1 where the unit does not exist, and what it adds to the chunk's first
// sample, position and element.
struct alignas(16) UnitTask {
    int row;
    index_t n, l, offset;
};
static_assert(INDEX_BITS == 32 || !(COARSE_LAST || FINE_LAST), "UnitTask: gpuconv/families/weight_gradient_mma.py");

// kUnit neighbours of a row, two at a time.
template <int kWidth>
__device__ __forceinline__ void load_neighbours(Block<kWidth>& block, const storage_t* from) {
#pragma unroll
    for (int e = 0; e < kUnit; e += 2) {
        const Run<2> both = Run<2>::load(from + e);
        block.run[e].word[0] = both.word[0];
        // Of elements of 2 bytes the lower half of a word counts.
        block.run[e + 1].word[0] = kUnit == 8 ? both.word[0] >> 16 : both.word[Run<2>::kWords - 1];
    }
}

// Copies a unit of one position to its row of a buffer, or loads it to registers; as zeros where it does not exist.
template <bool kCopies>
__device__ __forceinline__ void stage_unit(Block<1>& block, Vector<unsigned>* row, const storage_t* from, bool exists) {
    if (kCopies) {
        copy_async_if(row, reinterpret_cast<const Vector<unsigned>*>(from), exists);
        if (!exists) *row = Vector<unsigned>();
    } else {
        block.clear();
        if (exists) block.load_unit(from);
    }
}

// Loads the elements of fine that kUnit neighbouring taps meet, the first of them at a position; zeros where there are none.
template <int kWidth, typename P>
__device__ __forceinline__ void load_taps(
    Block<kWidth>& block, const storage_t* x, index_t first, index_t L_fine, bool exists, const P& p) {
    if (exists && is_inside(first, first + (kUnit - 1) * p.dilation, L_fine)) {
        if (TAP_WIDTH == 2) {
            load_neighbours(block, x + first);
        } else {
            block.load(x + first * p.fine_stride_l, keep_in_register(p.dilation * p.fine_stride_l));
        }
        return;
    }
    block.clear();
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
        const Source source = source_index(first + e * p.dilation, L_fine);
        if (exists && source.exists) {
            block.run[e] = RunOf<kWidth>::type::load(x + source.index * p.fine_stride_l);
        }
    }
}
