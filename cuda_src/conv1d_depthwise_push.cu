// conv1d_depthwise_push: a few new samples of the streams of a depthwise layer (C_in_g = C_out_g = 1), for
// gpuconv/window.py. It convolves the samples that the streams hold, followed by the new ones, and keeps the last.
//
//   output[n, c, l_out] = bias[c] + sum over k < K of weight[c, k] * x(l_out*stride + k*dilation)
//   x(l) = ring[n, (start + l) % held, c] for l < held,   input[n, c, l - held] from there on
//   then ring[n, (start + l) % held, c] = input[n, c, l] for l < length, and start moves on by `length`.
//
// Grid x: blocks of BLOCK_SIZE consecutive rows (n, c), c fastest. Grid y and z: 1. No shared memory.
// A thread owns a row: no other reads its samples or writes them. Channels are fastest in the ring, so that neighbouring
// threads read neighbouring samples. Each block has a start of its own: see window.cuh.
// TAPS: K, where the taps stay in registers, or 0 for any K.
// Needs length <= held, every window complete (no padding), and contiguous weights from a 16-byte boundary on. Input and
// output have any strides, in elements.
//
// It is bound by bytes where slots are many: of a row and a new sample K + 2 elements, K - 1 of them read from the ring
// and one written. causal_conv1d_update of causal-conv1d moves 2*K + 2 where its state has K places, as Mamba's has: it
// shifts the state, whose places it finds and leaves in the same sectors.

#include "common.cuh"
#include "finish.cuh"
#include "input.cuh"

struct Params {
    index_t rows, C_out, L_out, K;  // rows: N * C_out
    index_t stride, dilation;
    index_t held, length;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv1d_depthwise_push.py");

// The samples of a row.
struct Row {
    const storage_t* ring;   // ring[n, 0, c]
    const storage_t* input;  // input[n, c, 0]
    index_t start;

    // The place of a sample, given its position from the oldest place, below 2 * held.
    __device__ __forceinline__ index_t offset(index_t position, const Params& p) const {
        const index_t place = start + position;
        return (place < p.held ? place : place - p.held) * p.C_out;
    }
    __device__ __forceinline__ acc_t load(index_t l, const Loader& loaded, const Params& p) const {
        const storage_t* const held = ring + offset(l, p);
        return scalar::load(loaded(*(l < p.held ? held : input + (l - p.held) * p.input_stride_l)));
    }
};

#if TAPS > 0
// The taps of a row, loaded at once where they are one vector.
constexpr bool kIsVector = (TAPS & (TAPS - 1)) == 0 && TAPS * sizeof(storage_t) <= 16;
typedef Vector<storage_t, kIsVector ? TAPS : 1> Taps;

__device__ __forceinline__ void load_taps(const storage_t* weight, acc_t (&taps)[TAPS]) {
#pragma unroll
    for (int v = 0; v < TAPS; v += kIsVector ? TAPS : 1) {
        const Taps loaded = *reinterpret_cast<const Taps*>(weight + v);
#pragma unroll
        for (int e = 0; e < (kIsVector ? TAPS : 1); ++e) taps[v + e] = scalar::load(loaded.element[e]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE) conv1d_depthwise_push(
    storage_t* __restrict__ ring,           // [N, held, C_out]
    const storage_t* __restrict__ weight,   // [C_out, 1, K]
    const storage_t* __restrict__ bias,     // [C_out], or null
    const storage_t* __restrict__ input,    // [N, C_out, length]
    int* __restrict__ window_starts,        // [blocks]
    storage_t* __restrict__ output,         // [N, C_out, L_out]
    FUSED_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    const InputActivation input_activation(p INPUT_ACTIVATION_VALUES);
    const index_t row = index_t(blockIdx.x) * BLOCK_SIZE + threadIdx.x;
    const index_t start = window_starts[blockIdx.x];
    __syncthreads();  // every thread has it before the first thread moves it
    if (threadIdx.x == 0) {
        const index_t next = start + p.length;
        window_starts[blockIdx.x] = int(next < p.held ? next : next - p.held);
    }
    if (row >= p.rows) return;
    const index_t n = row / p.C_out, c = row - n * p.C_out;
    ring += n * p.held * p.C_out + c;
    input += n * p.input_stride_n + c * p.input_stride_c;
    output += n * p.output_stride_n + c * p.output_stride_c;
    weight += c * p.K;

    const Row x = {ring, input, start};
    const Loader loaded = input_activation.channel(c);
    const Channel channel = epilogue.channel(c);
#if TAPS > 0
    acc_t taps[TAPS];
    load_taps(weight, taps);
#endif
#pragma unroll 1
    for (index_t l_out = 0; l_out < p.L_out; ++l_out) {
        const index_t first = l_out * p.stride;
        acc_t acc = scalar::zero();
#if TAPS > 0
#pragma unroll
        for (int k = 0; k < TAPS; ++k) acc = multiply_add(taps[k], x.load(first + k * p.dilation, loaded, p), acc);
#else
#pragma unroll 4
        for (index_t k = 0; k < p.K; ++k) {
            acc = multiply_add(scalar::load(weight[k]), x.load(first + k * p.dilation, loaded, p), acc);
        }
#endif
        storage_t* const place = output + l_out * p.output_stride_l;
        *place = finish(acc, channel, place);
    }
#pragma unroll 1
    for (index_t l = 0; l < p.length; ++l) ring[x.offset(l, p)] = input[l * p.input_stride_l];
}
