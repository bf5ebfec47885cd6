// The window of a stream, which the kernel that reads it also moves (gpuconv/families/windows.py).
//
// Where MOVES_WINDOW is defined, the input of a kernel is the last samples of a stream's slots: those that it holds, and
// behind them the new ones, which come in an array of their own. A row is a ring of period = held + length places, kept
// twice:
//
//   window[n, c, i] = window[n, c, i + period]    for i < period
//
// so that the samples are contiguous wherever the oldest of them lies, and a kernel reads them as it reads any input.
// For each block `window_starts` has the place at which its next window begins. Every block has its own, so that none
// waits for another, and they are in memory, so that each launch of a CUDA graph goes on where the last one stopped.
//
// Each block writes the new samples before it reads them. All blocks write the same bits to the same places, and no
// block of the launch reads an older sample there, since a ring has as many places as a window has samples. The first
// block writes the second copy, for later launches.
//
// It saves a launch, some 2 us. It costs a load of the start, then that of the samples, which hide behind nothing: some
// 0.5 us; and for each new sample of a thread 56 instructions, most of them for two divisions, so that eight for each
// thread of a block (families/windows.py) take as long again. For a step of a dense layer of 512 channels and 7 taps, whose
// 16-bit weights are 3.7 MB, 0.9 us of an H200's memory, the cost model expects 14 us of conv1d_mma on 16 blocks and 12 us of
// the canonical order, 3584 multiply-adds one after the other. So the kernel is as long as several launches, and which it is
// follows from the bits of one call.
//
// The input is no pointer to constants here, for which the hardware has loads that may miss what the block has written.
//
// A kernel has INPUT_ARGUMENT for its input, WINDOW_ARGUMENTS before its Params and WINDOW_FIELDS at the end of them. All
// threads of a block reach MOVE_WINDOW before any reads the input.

#pragma once

#include "common.cuh"

#ifdef MOVES_WINDOW

#define INPUT_ARGUMENT storage_t *input,
#define WINDOW_ARGUMENTS \
    const storage_t* __restrict__ new_samples, /* [N, C_in, length] */ \
    int* __restrict__ window_starts,           /* [blocks] */
#define WINDOW_FIELDS \
    index_t num_samples, window_channels, window_held, window_length; /* N * C_in * length, C_in, held, length */ \
    index_t samples_stride_n, samples_stride_c, samples_stride_l;
#define MOVE_WINDOW input = move_window(input, new_samples, window_starts, p);

// The first sample of this launch's window in the first row.
template <typename P>
__device__ __forceinline__ storage_t* move_window(storage_t* window, const storage_t* samples, int* starts, const P& p) {
    const int start = starts[blockIdx.x];
    const index_t period = p.window_held + p.window_length;
    for (index_t i = threadIdx.x; i < p.num_samples; i += blockDim.x) {
        const index_t row = i / p.window_length, l = i - row * p.window_length;
        const index_t n = row / p.window_channels, c = row - n * p.window_channels;
        const storage_t value = samples[n * p.samples_stride_n + c * p.samples_stride_c + l * p.samples_stride_l];
        const index_t place = start + p.window_held + l;
        storage_t* const target = window + (row * 2 * period + place);
        *target = value;
        if (blockIdx.x == 0) target[place < period ? period : -period] = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const index_t next = start + p.window_length;
        starts[blockIdx.x] = int(next < period ? next : next - period);
    }
    return window + start;
}

#else

#define INPUT_ARGUMENT const storage_t *__restrict__ input,
#define WINDOW_ARGUMENTS
#define WINDOW_FIELDS
#define MOVE_WINDOW

#endif
