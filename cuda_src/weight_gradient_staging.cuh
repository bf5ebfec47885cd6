// How the blocks of weight_gradient_mma.cu bring both arrays to shared memory: the tasks of their threads.

#pragma once

#include "common.cuh"
#include "edge.cuh"
#include "staging.cuh"
#include "unaligned_runs.cuh"
#include "weight_gradient_tile.cuh"

// Units that neighbouring lanes take: see Task.
__device__ constexpr int lane_units(int width, int align, bool is_last) {
    return width == 1 ? (is_last ? 8 : 1) : kUnit == 8 && align < width ? 4 : 8;
}
constexpr int kCoarseLanes = lane_units(COARSE_WIDTH, COARSE_ALIGN, COARSE_LAST);
constexpr int kFineLanes = lane_units(FINE_WIDTH, FINE_ALIGN, FINE_LAST || TAPS_IN_UNITS);
constexpr int kCoarseTasks = kUnitsM * CHUNK_ROWS / COARSE_WIDTH;
constexpr int kAheadCoarse = (kCoarseTasks + kThreads - 1) / kThreads * COARSE_WIDTH < AHEAD_COARSE
    ? (kCoarseTasks + kThreads - 1) / kThreads : AHEAD_COARSE / COARSE_WIDTH;
constexpr int kAheadFine = AHEAD_FINE / FINE_WIDTH;
static_assert(AHEAD_COARSE % COARSE_WIDTH == 0 && AHEAD_FINE % FINE_WIDTH == 0,
              "whole tasks are loaded ahead: gpuconv/families/weight_gradient_mma.py");

// Where a row of the window lies, from the chunk's first sample and the position that its first l meets.
struct alignas(2 * sizeof(index_t)) Place {
    index_t n, l;
};

// A thread's task in staging: `width` neighbouring positions of a unit. Neighbouring lanes take neighbouring positions of
// one unit or, where those are several each, which would meet on the same banks, one of `lanes` units each: of up to eight, or
// of four where words are loaded, so that the loads of a warp meet few lines. So they do where units are neighbours in memory.
struct alignas(8) Task {
    int unit, row;

    __device__ __forceinline__ static Task of(int index, int units, int runs, int width, int lanes) {
        const int most = units < lanes ? units : lanes;
        const int block = index / (most * runs), in_block = index - block * (most * runs);
        // The last units may be fewer, so that more indices than tasks lead to them.
        const bool is_even = units % most == 0;
        const int left = units - block * most, low = is_even || left >= most ? most : left < 1 ? 1 : left;
        const int run = in_block / low;
        return Task{is_even || run < runs ? block * most + (in_block - run * low) : units, run * width};
    }
};

// A task where units are contiguous: its row of a buffer, -1 where the unit does not exist, and what it adds to the chunk's
// first sample, position and element.
struct alignas(16) UnitTask {
    int row;
    index_t n, l, offset;
};
static_assert(INDEX_BITS == 32 || !(COARSE_LAST || FINE_LAST), "UnitTask: gpuconv/families/weight_gradient_mma.py");

// Where an array's share of a chunk lies in shared memory: two buffers of kParts parts. A part has so many rows of 16 bytes,
// `pitch` from octet to octet and `half` from unit to unit of an octet.
struct Side {
    Vector<unsigned>* buffers;
    int part, pitch, half;

    __device__ __forceinline__ int row_of(const Task& task) const {
        const unsigned unit = task.unit;
        return int(unit / kOctetUnits) * pitch + int(unit % kOctetUnits) * half + task.row;
    }
    __device__ __forceinline__ int row_of(const UnitTask& task) const { return task.row; }

    __device__ __forceinline__ const unsigned char* buffer(int number) const {
        return reinterpret_cast<const unsigned char*>(buffers + number * kParts * part);
    }
    template <typename AnyTask>
    __device__ __forceinline__ Vector<unsigned>* vectors_of(const AnyTask& task, int buffer) const {
        return buffers + (buffer * kParts * part + row_of(task));
    }
    // Stores what was loaded for a task, unless it was copied.
    template <bool kIsCopied, typename Loaded, typename AnyTask>
    __device__ __forceinline__ void store(const Loaded& loaded, const AnyTask& task, int buffer) const {
        if (!kIsCopied) stage(loaded, vectors_of(task, buffer), part);
    }
    // The same of a run whose positions have the rows that a table tells.
    template <typename Loaded>
    __device__ __forceinline__ void store_apart(
        const Loaded& loaded, const Task& task, const int* rows, int buffer) const {
        const Vector<int> of_run = *reinterpret_cast<const Vector<int>*>(rows + task.row);
        stage_apart(loaded, vectors_of(Task{task.unit, 0}, buffer), of_run, part);
    }
};

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

typedef RunsOf<COARSE_WIDTH, COARSE_ALIGN>::type CoarseRuns;
typedef RunsOf<FINE_WIDTH, FINE_ALIGN>::type FineRuns;

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
    Block<kWidth>& block, const storage_t* x, index_t first, index_t L_fine, const P& p) {
    const index_t dilation = TAP_WIDTH == 2 ? 1 : p.dilation, stride = TAP_WIDTH == 2 ? 1 : p.fine_stride_l;
    if (is_inside(first, first + (kUnit - 1) * dilation, L_fine)) {
        if (TAP_WIDTH == 2) {
            load_neighbours(block, x + first);
        } else {
            block.load(x + first * stride, keep_in_register(dilation * stride));
        }
        return;
    }
    block.clear();
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
        const Source source = source_index(first + e * dilation, L_fine);
        if (source.exists) block.run[e] = RunOf<kWidth>::type::load(x + source.index * stride);
    }
}
