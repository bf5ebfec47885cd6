// conv1d_depthwise_push: a few new samples of the streams of a depthwise layer (C_in_g = C_out_g = 1), for
// gpuconv/stream/window.py. It convolves the samples that the streams hold, followed by the new ones, and keeps the last.
//
//   output[n, c, l_out] = bias[c] + sum over k < K of weight[c, k] * x(l_out*stride + k*dilation)
//   x(l) = ring[n, (start + l) % held, c] for l < held,   input[n, c, l - held] from there on
//   then ring[n, (start + l) % held, c] = input[n, c, l] for l < length, and start moves on by `length`.
//
// Grid x: blocks of BLOCK_SIZE consecutive rows (n, c), c fastest. Grid y and z: 1. No shared memory.
// A thread owns a row: no other thread reads or writes its samples. Channels are fastest in the ring, so that neighbouring
// threads read neighbouring samples. Each block has its own start: see window.cuh.
// TAPS: K, in layers of a few taps that get one sample and give one result; else 0. There tap k < K - 1 reads a sample
// that is held and the last tap the new one, which then takes the place of the oldest.
// Needs length <= held, every window complete (no padding), and contiguous weights from a 16-byte boundary on. Input and
// output have any strides, in elements.
//
// With many slots it is limited by bandwidth: for each row and new sample it moves K + 2 elements; it reads K - 1 of them from
// the ring and writes one there. causal_conv1d_update of causal-conv1d moves 2*K + 2 where its state has K places a row, as in
// Mamba, since it shifts the row. Expected for K = 4 in float32 on an H200: 24 bytes and 100 instructions a row, so that 64
// slots of 4096 channels take 1.5 us from memory and 0.9 us to issue, and less while the rings are in the L2 cache; a single
// slot takes the time of a launch.

#include "common.cuh"
#include "finish.cuh"
#include "input.cuh"

struct Params {
    index_t rows, C_out, C_out_magic, C_out_shift;  // rows: N * C_out
    index_t L_out, K, stride, dilation;
    index_t held, length;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv1d_depthwise_push.py");

// The place in a ring of a sample, given its number from the oldest, below 2 * held.
__device__ __forceinline__ index_t place_of(index_t start, index_t number, const Params& p) {
    const index_t place = start + number;
    return place < p.held ? place : place - p.held;
}

#if TAPS > 0
constexpr int kTapsOfVector = (TAPS & (TAPS - 1)) == 0 && TAPS * sizeof(storage_t) <= 16 ? TAPS : 1;

// The taps of a row, loaded at once where they are one vector.
__device__ __forceinline__ void load_taps(const storage_t* weight, acc_t (&taps)[TAPS]) {
#pragma unroll
    for (int first = 0; first < TAPS; first += kTapsOfVector) {
        const auto loaded = *reinterpret_cast<const Vector<storage_t, kTapsOfVector>*>(weight + first);
#pragma unroll
        for (int e = 0; e < kTapsOfVector; ++e) taps[first + e] = scalar::load(loaded.element[e]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE) conv1d_depthwise_push(
    storage_t* ring,                       // [N, held, C_out]
    const storage_t* __restrict__ weight,  // [C_out, 1, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    const storage_t* __restrict__ input,   // [N, C_out, length]
    int* __restrict__ window_starts,       // [blocks]
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    const index_t row = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
    const index_t start = window_starts[blockIdx.x];
    __syncthreads();  // every thread has read it before the first thread advances it
    if (threadIdx.x == 0) {
        const index_t next = start + p.length;
        window_starts[blockIdx.x] = int(next < p.held ? next : next - p.held);
    }
    if (row >= p.rows) return;
    const index_t n = divide(row, p.C_out, p.C_out_magic, p.C_out_shift), c = row - n * p.C_out;
    ring += n * p.held * p.C_out + c;                         // ring[n, 0, c]
    input += n * p.input_stride_n + c * p.input_stride_c;     // input[n, c, 0]
    output += n * p.output_stride_n + c * p.output_stride_c;  // output[n, c, 0]
    weight += c * p.K;                                        // weight[c, 0, 0]
    const Loader loaded = input_activation.channel(c);
    const Channel channel = epilogue.channel(c);

#if TAPS > 0
    acc_t taps[TAPS], acc = scalar::zero();
    load_taps(weight, taps);
    const storage_t sample = *input;
#pragma unroll
    for (int k = 0; k < TAPS - 1; ++k) {
        const storage_t held = ring[place_of(start, k * p.dilation, p) * p.C_out];
        acc = multiply_add(taps[k], scalar::load(loaded(held)), acc);
    }
    acc = multiply_add(taps[TAPS - 1], scalar::load(loaded(sample)), acc);
    *output = finish(acc, channel, output);
    ring[start * p.C_out] = sample;
#else
#pragma unroll 1
    for (index_t l_out = 0; l_out < p.L_out; ++l_out) {
        acc_t acc = scalar::zero();
#pragma unroll 4
        for (index_t k = 0; k < p.K; ++k) {
            const index_t l = l_out * p.stride + k * p.dilation;
            // Without this the compiler would take the selected address for one of the input, which is never written.
            const storage_t* const sample = keep_in_register_global(
                l < p.held ? ring + place_of(start, l, p) * p.C_out : input + (l - p.held) * p.input_stride_l);
            acc = multiply_add(scalar::load(weight[k]), scalar::load(loaded(*sample)), acc);
        }
        storage_t* const place = output + l_out * p.output_stride_l;
        *place = finish(acc, channel, place);
    }
#pragma unroll 1
    for (index_t l = 0; l < p.length; ++l) ring[place_of(start, l, p) * p.C_out] = input[l * p.input_stride_l];
#endif
}
