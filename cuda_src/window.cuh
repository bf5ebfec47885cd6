// The window of a stream, which is moved by the kernel that reads it (gpuconv/families/windows.py).
//
// If MOVES_WINDOW is defined, the input of a kernel is the last samples of a stream's slots: those that the stream holds,
// followed by the new ones, which are in their own array. Each row has twice as many places as a window has samples
// (period = held + length), and a window begins at one of the first half, so that its samples are contiguous and a kernel reads
// them like any input. From launch to launch it begins `length` places later, and before it would begin in the second half,
// `period` places earlier again. So that it finds its samples there, too, new samples in the second half are also written
// `period` places before.
//
// `window_starts` has the place at which the next window begins, for each block separately, so that no block waits for
// another. It is in memory, so that each launch of a CUDA graph continues where the last one stopped.
//
// Each block writes the new samples before it reads them. All blocks write the same bits to the same places, and no
// block of the launch reads an older sample there, since a window has `period` samples. The first block writes the copies in
// the first half, for later launches.
//
// This saves a launch, about 2 us. It costs about 0.5 us for loading the start and then the samples, which nothing hides, and
// 56 instructions for each new sample of a thread, most of them for two divisions; eight samples for each thread of a block
// (families/windows.py) take about another 0.5 us. For a step of a dense layer of 512 channels and 7 taps, whose 16-bit weights
// are 3.7 MB (0.9 us at an H200's bandwidth), the cost model expects 14 us with conv1d_mma on 16 blocks and 12 us in the
// canonical order, 3584 dependent multiply-adds. So the kernel takes as long as several launches; its family must be that of
// one call, to give the same bits.
//
// The input is not declared const and __restrict__ here: the read-only loads that this allows may miss what the block wrote.
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
        if (blockIdx.x == 0 && place >= period) target[-period] = value;
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
