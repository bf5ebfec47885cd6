// conv1d_narrow: forward convolution of layers with few output channels a group, any stride and dilation.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// A thread computes all output channels of its group, at most THREAD_C, for THREAD_L columns. For each tap it reads a position
// of the input once for all channels; later taps find it in the cache. The weights pass through shared memory, chunk_terms
// terms (c_in, k) at a time.
//
// THREAD_L > 1: stride 1 and an input contiguous along l. Columns are positions of one sample; those of a thread lie 32
// apart, so that lanes read neighbouring positions and a thread needs one address.
// THREAD_L = 1: columns run through the samples.
// Grid x: blocks of BLOCK_SIZE*THREAD_L columns (fastest), then samples where THREAD_L > 1, then groups. Grid y and z: 1.
// Dynamic shared memory: chunk_terms rows of THREAD_C weights.
// Macros read: BLOCK_SIZE, THREAD_C, THREAD_L, MIN_BLOCKS, and those of common.cuh.
// Takes arrays of any strides, in elements. Chosen for at most 8 output channels a group.

#include "common.cuh"
#include "convolution.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "window.cuh"

struct Params : Convolution {
    index_t N, column_blocks;
    index_t chunk_terms;
    index_t tap_step, channel_step;  // elements of the input from a tap to the next, and from the last to the next channel
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv1d_narrow.py");

constexpr int kAccess = THREAD_C * sizeof(acc_t) % 16 == 0 ? 16 : 8;  // bytes of weights that are read at once
constexpr int kVec = sizeof(acc_t) < kAccess ? kAccess / int(sizeof(acc_t)) : 1;
constexpr int kUnroll = THREAD_L > 1 ? 4 : 8;  // terms whose positions are loaded together
static_assert(THREAD_C % kVec == 0, "a term's weights are whole vectors: gpuconv/families/conv1d_narrow.py");
typedef Vector<acc_t, kVec> WeightVector;

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, MIN_BLOCKS) conv1d_narrow(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    constexpr bool kOneSample = THREAD_L > 1;
    const index_t rest = index_t(blockIdx.x) / p.column_blocks;
    const index_t g = kOneSample ? rest / p.N : rest;
    const index_t columns = kOneSample ? p.L_out : p.N * p.L_out;
    const index_t column_begin =  // this thread's first
        ((index_t(blockIdx.x) - rest * p.column_blocks) * BLOCK_SIZE + threadIdx.x / 32 * 32) * THREAD_L +
        threadIdx.x % 32;
    // A column behind the last of all samples repeats it: its loads are valid and its results are not stored.
    const index_t n = kOneSample ? rest - g * p.N : min_index(column_begin, columns - 1) / p.L_out;
    const index_t l_begin = kOneSample ? column_begin : min_index(column_begin, columns - 1) - n * p.L_out;
    const index_t R = p.C_in_g * p.K;
    input += n * p.input_stride_n + g * p.C_in_g * p.input_stride_c;     // input[n, g*C_in_g, 0]
    weight += g * p.C_out_g * p.weight_stride_out;                       // weight[g*C_out_g, 0, 0]
    output += n * p.output_stride_n + g * p.C_out_g * p.output_stride_c;  // output[n, g*C_out_g, 0]
    acc_t* const smem_weight = reinterpret_cast<acc_t*>(dynamic_shared_memory());

    const index_t position = l_begin * p.stride - p.padding_left;  // of the first column, tap 0
    const index_t last = position + 32 * (THREAD_L - 1) + (p.K - 1) * p.dilation;
    const bool inside = is_inside(position, last, p.L_in);  // all taps of all columns exist

    acc_t acc[THREAD_C][THREAD_L];
#pragma unroll
    for (int row = 0; row < THREAD_C; ++row) {
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) acc[row][j] = scalar::zero();
    }

    const storage_t* x = input + position * p.input_stride_l;  // of the term, in the first column
    index_t k = 0;
    const auto advance = [&]() {
        ++k;
        const bool is_last = k == p.K;
        x += is_last ? p.channel_step : p.tap_step;
        if (is_last) k = 0;
    };
    for (index_t r_begin = 0; r_begin < R; r_begin += p.chunk_terms) {
        const int terms = int(min_index(p.chunk_terms, R - r_begin));
        __syncthreads();
#pragma unroll 1
        for (int term = threadIdx.x; term < terms; term += BLOCK_SIZE) {
            const index_t c_in = (r_begin + term) / p.K;
            const index_t tap = r_begin + term - c_in * p.K;
            const storage_t* const w = weight + (c_in * p.weight_stride_in + tap * p.weight_stride_k);
#pragma unroll
            for (int row = 0; row < THREAD_C; ++row) {
                const bool exists = row < p.C_out_g;
                smem_weight[term * THREAD_C + row] =
                    exists ? scalar::load(w[row * p.weight_stride_out]) : scalar::zero();
            }
        }
        __syncthreads();
        if (column_begin >= columns) continue;

        const WeightVector* w = reinterpret_cast<const WeightVector*>(smem_weight);
        const auto multiply = [&](int j, storage_t value) {
            const acc_t x = scalar::load(value);
#pragma unroll
            for (int row = 0; row < THREAD_C; ++row) {
                acc[row][j] = multiply_add(w[row / kVec].element[row % kVec], x, acc[row][j]);
            }
        };
        if (inside) {
#pragma unroll kUnroll
            for (int term = 0; term < terms; ++term, w += THREAD_C / kVec) {
#pragma unroll
                for (int j = 0; j < THREAD_L; ++j) multiply(j, x[32 * j]);
                advance();
            }
        } else {
#pragma unroll 1
            for (int term = 0; term < terms; ++term, w += THREAD_C / kVec) {
#pragma unroll
                for (int j = 0; j < THREAD_L; ++j) {
                    const Source source = source_index(position + 32 * j + k * p.dilation, p.L_in);
                    if (source.exists) multiply(j, x[32 * j + source.moved * p.input_stride_l]);
                }
                advance();
            }
        }
    }

#pragma unroll
    for (int j = 0; j < THREAD_L; ++j) {
        if (column_begin + 32 * j >= columns) return;
        storage_t* const y = output + (l_begin + 32 * j) * p.output_stride_l;
#pragma unroll
        for (int row = 0; row < THREAD_C; ++row) {
            if (row >= p.C_out_g) break;
            storage_t* const place = y + row * p.output_stride_c;
            *place = finish(acc[row][j], epilogue.channel(g * p.C_out_g + row), place);
        }
    }
}
