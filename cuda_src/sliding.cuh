// The sums of conv1d_tail and conv_transpose1d_tail: few results a column; windows slide through registers.
//
// Column q of a sample has THREAD_C results, rows of weights over the same input: row, c_in and tap multiply
// input[n, c_in, q + first + tap], or where IS_REVERSED = 1 input[n, c_in, q + first - tap]. A thread computes kVec
// neighbouring columns, as many as 16 bytes of storage hold, and a block up to BLOCK_L of them. A thread takes the taps
// kVec at a time (a tap block). They multiply two neighbouring vectors of input; the next tap block uses one of these again, so
// that each tap block needs one load of input.
//
// Rows of input pass through two buffers of shared memory, chunk_channels channels at a time, as they are stored, and
// with them their weights, in the accumulator's type and in the order of use: [channel][tap block][THREAD_C][kVec], or
// for 4 rows and more, whose weights of one tap fill vectors, [channel][tap block][kVec][THREAD_C]. Of a row of input
// the block's window begins `lead` positions early, where a copy of copy_elements elements is aligned; the weights
// begin with as many zeros, and end with zeros that fill up the last tap block. Positions outside the input are zeros
// too; canonical_sum.cuh explains what follows from that.
// Kernels with IS_REVERSED = 1, whose taps are few and whose rows are many, stop at the last tap instead of multiplying
// zeros behind it.
//
// Macros read: BLOCK_L, THREAD_C, IS_REVERSED, and those of common.cuh.

#pragma once

#include "canonical_sum.cuh"
#include "common.cuh"
#include "edge.cuh"

constexpr int kVec = kStorageVec;  // columns of a thread, and taps that it takes at a time
constexpr int kMaxThreads = BLOCK_L / kVec;
constexpr bool kRowsInVectors = THREAD_C >= 4;
constexpr int kTapBlock = THREAD_C * kVec;  // weights of a channel's tap block
constexpr int kStoredRows = THREAD_C < 8 || INDEX_BITS == 64 ? 1 : 2;  // that are stored at a time
static_assert(kMaxThreads * kVec == BLOCK_L && kMaxThreads % 32 == 0, "whole warps own BLOCK_L: gpuconv/families/conv_tail.py");
static_assert(kTapBlock % kAccVec == 0 && (!kRowsInVectors || THREAD_C % kAccVec == 0), "weights are whole vectors");

// One block's columns. Offsets and strides are in elements.
struct Slide {
    const storage_t* input;  // input[n, first channel of the group, 0]
    index_t C_in_g, L_in, taps;
    index_t column_begin, columns;  // the block's first column, and the columns of the sample
    index_t first;
    index_t input_stride_c, input_stride_l;
    int tap_blocks, lead, chunk_channels, copy_elements;
};

// What Params of both kernels have in common, for a block of columns of one sample's group.
template <typename P>
__device__ __forceinline__ Slide slide_with_layout(
    const storage_t* input, index_t n, index_t g, index_t column_block, const P& p) {
    Slide slide;
    slide.input = input + (n * p.input_stride_n + g * p.C_in_g * p.input_stride_c);
    slide.C_in_g = p.C_in_g;
    slide.L_in = p.L_in;
    slide.column_begin = column_block * (index_t(blockDim.x) * kVec);
    slide.input_stride_c = p.input_stride_c;
    slide.input_stride_l = p.input_stride_l;
    slide.tap_blocks = int(p.tap_blocks);
    slide.lead = int(p.lead);
    slide.chunk_channels = int(p.chunk_channels);
    slide.copy_elements = int(p.copy_elements);
    return slide;
}

// Copies a block's window of some channels, `length` elements from position `start`, as values of T of several elements
// each. Either all elements of such a value exist or none.
template <typename T>
__device__ __forceinline__ void copy_windows(
    storage_t* shared, const storage_t* input, int channels, index_t start, int length, const Slide& slide) {
    const int count = sizeof(T) / sizeof(storage_t);
#pragma unroll 1
    for (int i = int(threadIdx.x) * count; i < length; i += int(blockDim.x) * count) {
        storage_t* target = shared + i;
        const Source first = source_index(start + i, slide.L_in);
        const storage_t* source = input + (first.exists ? first.index : 0);
#pragma unroll 1
        for (int c = 0; c < channels; ++c, target += length, source += slide.input_stride_c) {
            copy_async_or_zero(reinterpret_cast<T*>(target), reinterpret_cast<const T*>(source), first.exists);
        }
    }
}

// The weights of one row, for canonical_sum.
template <typename WeightAt>
struct WeightsOf : EveryWeight {
    const WeightAt& weight_at;
    int row;

    __device__ __forceinline__ WeightsOf(const WeightAt& weight_at, int row) : weight_at(weight_at), row(row) {}
    __device__ __forceinline__ bool has(index_t c_in, index_t tap) const {
        return weight_at(row, c_in, tap) != nullptr;
    }
    __device__ __forceinline__ acc_t load(index_t c_in, index_t tap) const {
        return scalar::load(*weight_at(row, c_in, tap));
    }
};

// weight_at(row, c_in, tap) is the address of a weight, or null where a row has no such tap; store(row, first column,
// sums of kVec columns) takes the results; store_one(row, column, sum) those that were summed again.
template <typename WeightAt, typename Store, typename StoreOne>
__device__ __forceinline__ void slide_sums(
    const Slide& slide, const WeightAt& weight_at, const Store& store, const StoreOne& store_one) {
    const int window = (int(blockDim.x) + slide.tap_blocks) * kVec;
    const int channel_weights = slide.tap_blocks * kTapBlock;
    storage_t* const smem_input = reinterpret_cast<storage_t*>(dynamic_shared_memory());  // [2][chunk_channels][window]
    acc_t* const smem_weight =  // [2][chunk_channels][tap_blocks][THREAD_C][kVec]
        reinterpret_cast<acc_t*>(smem_input + 2 * slide.chunk_channels * window);
    const index_t start = slide.column_begin + slide.first +
                          (IS_REVERSED ? slide.lead - slide.tap_blocks * kVec : -slide.lead);  // of the window

    const auto load_chunk = [&](int buffer, index_t c_begin) {
        const int channels = int(min_index(slide.chunk_channels, slide.C_in_g - c_begin));
        storage_t* const windows = smem_input + buffer * slide.chunk_channels * window;
        const storage_t* const x = slide.input + c_begin * slide.input_stride_c;
        const bool copies_vectors = kIsEmptyOutside && slide.input_stride_l == 1;
        const int copy_bytes = copies_vectors ? slide.copy_elements * int(sizeof(storage_t)) : 0;
        if (copy_bytes == 16) {
            copy_windows<Vector<unsigned, 4>>(windows, x, channels, start, window, slide);
        } else if (copy_bytes == 8) {
            copy_windows<Vector<unsigned, 2>>(windows, x, channels, start, window, slide);
        } else if (copy_bytes == 4) {
            copy_windows<Vector<unsigned, 1>>(windows, x, channels, start, window, slide);
        } else {
#pragma unroll 1
            for (int i = threadIdx.x; i < window; i += blockDim.x) {
                const Source at = source_index(start + i, slide.L_in);
                const storage_t* source = x + (at.exists ? at.index * slide.input_stride_l : 0);
#pragma unroll 4
                for (int c = 0; c < channels; ++c, source += slide.input_stride_c) {
                    windows[c * window + i] = at.exists ? *source : scalar::storage_zero();
                }
            }
        }
        acc_t* const w = smem_weight + buffer * slide.chunk_channels * channel_weights;
#pragma unroll 1
        for (int e = threadIdx.x; e < channels * channel_weights; e += blockDim.x) {
            const int c = e / channel_weights, in_channel = e - c * channel_weights;
            const int block = in_channel / kTapBlock, in_block = in_channel % kTapBlock;
            const int i = kRowsInVectors ? in_block / THREAD_C : in_block % kVec;
            const int row = kRowsInVectors ? in_block % THREAD_C : in_block / kVec;
            const int tap = block * kVec + i - slide.lead;
            const storage_t* source = nullptr;
            if (tap >= 0 && tap < slide.taps) source = weight_at(row, c_begin + c, tap);
            scalar::copy_to_shared(w + e, source, source != nullptr);
        }
    };

    acc_t acc[THREAD_C][kVec];
#pragma unroll
    for (int row = 0; row < THREAD_C; ++row) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) acc[row][j] = scalar::zero();
    }
    const index_t column = slide.column_begin + index_t(threadIdx.x) * kVec;  // this thread's first
    const bool warp_has_columns = column - index_t(threadIdx.x % 32) * kVec < slide.columns;

    int buffer = 1;
    for (index_t c_begin = -slide.chunk_channels; c_begin < slide.C_in_g; c_begin += slide.chunk_channels, buffer ^= 1) {
        copy_async_wait();
        __syncthreads();
        if (c_begin + slide.chunk_channels < slide.C_in_g) load_chunk(buffer ^ 1, c_begin + slide.chunk_channels);
        if (c_begin < 0 || !warp_has_columns) continue;  // the first round only loads
        const int channels = int(min_index(slide.chunk_channels, slide.C_in_g - c_begin));
        const StorageWords* row = reinterpret_cast<const StorageWords*>(
                                     smem_input + buffer * slide.chunk_channels * window) + threadIdx.x;
        const AccVector* w =
            reinterpret_cast<const AccVector*>(smem_weight + buffer * slide.chunk_channels * channel_weights);
        for (int c = 0; c < channels; ++c, row += window / kVec) {
            const StorageWords* next = row + (IS_REVERSED ? slide.tap_blocks : 0);
            acc_t x[2 * kVec];  // the tap block's two vectors, the one that the next needs again in its own half
            const auto load_half = [&](int half) {
                const StorageWords vector = *next;
                next += IS_REVERSED ? -1 : 1;
#pragma unroll
                for (int j = 0; j < kVec; ++j) x[half * kVec + j] = scalar::load(element_of(vector, j));
            };
            // The taps of a block against the vectors in halves `low` (the lower positions) and 1 - low.
            const auto multiply_block = [&](int low, int taps) {
                AccVector vectors[kTapBlock / kAccVec];
                if (!kRowsInVectors) {
#pragma unroll
                    for (int v = 0; v < kTapBlock / kAccVec; ++v) vectors[v] = w[v];
                }
#pragma unroll
                for (int i = 0; i < kVec; ++i) {
                    if (IS_REVERSED && i >= taps) break;
                    if (kRowsInVectors) {
#pragma unroll
                        for (int v = 0; v < THREAD_C / kAccVec; ++v) vectors[v] = w[i * (THREAD_C / kAccVec) + v];
                    }
#pragma unroll
                    for (int r = 0; r < THREAD_C; ++r) {
                        const int at_weight = kRowsInVectors ? r : r * kVec + i;
                        const acc_t weight = vectors[at_weight / kAccVec].element[at_weight % kAccVec];
#pragma unroll
                        for (int j = 0; j < kVec; ++j) {
                            const int at = IS_REVERSED ? kVec + j - i : j + i;
                            const int half = at < kVec ? low : 1 - low;
                            acc[r][j] = multiply_add(weight, x[half * kVec + at % kVec], acc[r][j]);
                        }
                    }
                }
                w += kTapBlock / kAccVec;
            };
            load_half(0);
            int taps = slide.lead + int(slide.taps);
            if (kRowsInVectors) {
#pragma unroll 1
                for (; taps > 0; taps -= kVec) {
                    load_half(1);
                    multiply_block(IS_REVERSED ? 1 : 0, taps);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) x[j] = x[kVec + j];
                }
            } else {
                // Two blocks at a time, since moving the vector that the next block uses again would cost too much here.
#pragma unroll 1
                for (; taps > kVec; taps -= 2 * kVec) {
                    load_half(1);
                    multiply_block(IS_REVERSED ? 1 : 0, taps);
                    load_half(0);
                    multiply_block(IS_REVERSED ? 0 : 1, taps - kVec);
                }
                if (taps > 0) {
                    load_half(1);
                    multiply_block(IS_REVERSED ? 1 : 0, taps);
                }
            }
        }
    }
    if (!warp_has_columns) return;

    bool sum_again = false;
#pragma unroll 1
    for (int row = 0; row < THREAD_C; row += kStoredRows) {
#pragma unroll
        for (int i = 0; i < kStoredRows; ++i) {
            store(row + i, column, acc[i]);
#pragma unroll
            for (int j = 0; j < kVec; ++j) sum_again = sum_again || needs_canonical_sum(acc[i][j]);
        }
        // The next rows move to their place, so that one loop body stores all rows.
#pragma unroll
        for (int i = 0; i + kStoredRows < THREAD_C; ++i) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) acc[i][j] = acc[i + kStoredRows][j];
        }
    }
    if (!sum_again) return;
#pragma unroll 1
    for (int e = 0; e < THREAD_C * kVec; ++e) {
        const int row = e / kVec;
        const index_t q = column + e % kVec;
        if (q >= slide.columns) continue;
        store_one(row, q, canonical_sum(
            slide.input, q + slide.first, IS_REVERSED ? -1 : 1, slide.taps, slide,
            WeightsOf<WeightAt>(weight_at, row)));
    }
}
