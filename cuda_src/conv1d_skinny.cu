// conv1d_skinny: forward convolution for few columns (n, l_out), where most of the time goes into reading the weights, as in
// one step of a stream.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// Per group a product of the weights [C_out_g, R] and a matrix [R, columns] that is never formed, R = C_in_g*K terms with k
// inner. A result is one chain of R dependent multiply-adds; because of the canonical order, threads cannot share it. So blocks
// have few rows, so that every multiprocessor gets some, and the chains should not wait for memory: chunks of chunk_terms terms
// pass through NUM_STAGES buffers of shared memory. The first compute_warps warps multiply; each of the other warps owns one
// buffer, which it refills as soon as its chunk has been multiplied.
//
// Terms outside the input are multiplied as zeros; canonical_sum.cuh explains what follows from that.
//
// Grid x: blocks of block_rows output channels of a group (fastest), then groups. Grid y and z: 1. Dynamic shared memory:
// NUM_STAGES buffers, each of block_rows rows of weights and BLOCK_N rows of input, 16 bytes between the rows.
// Macros read: BLOCK_N (columns of a block, at least all there are), THREAD_N (of a thread), NUM_STAGES, DTYPE_BYTES,
// MAX_THREADS, MIN_BLOCKS.
// Takes arrays of any strides, in elements; weights are copied 16 bytes at a time where vector_weights = 1 says
// that a row's terms are contiguous, whole vectors and aligned. Chosen for at most 16 columns.

#include "canonical_sum.cuh"
#include "common.cuh"
#include "convolution.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "window.cuh"

struct Params : Convolution {
    index_t columns;  // N * L_out
    index_t row_blocks, block_rows, compute_warps;
    index_t chunk_terms;  // a multiple of kFetch
    index_t vector_weights;
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv1d_skinny.py");

// Terms that a thread fetches at once: their multiply-adds hide the latency of the next fetch.
constexpr int kFetch = (THREAD_N > 2 ? 32 : 64) / int(sizeof(acc_t));
// Terms whose positions a lane loads before it stores the first.
constexpr int kMostBatch = 128 / (BLOCK_N * int(sizeof(acc_t)));
constexpr int kBatch = kMostBatch > 8 ? 8 : kMostBatch > 1 ? kMostBatch : 1;
static_assert(BLOCK_N % THREAD_N == 0, "threads own whole groups of columns: gpuconv/families/conv1d_skinny.py");
static_assert(kFetch % kStorageVec == 0 && kFetch % kAccVec == 0, "a fetch is whole vectors");
static_assert(sizeof(storage_t) == DTYPE_BYTES, "DTYPE_BYTES differs from gpuconv/families/conv1d_skinny.py");

// What a thread multiplies at once.
struct Fetched {
    StorageWords weight[kFetch / kStorageVec];
    AccVector input[THREAD_N][kFetch / kAccVec];
};

// One buffer: rows of weights, then rows of input.
struct Stage {
    storage_t* weight;
    acc_t* input;
    int weight_pitch, input_pitch;
};
__device__ __forceinline__ Stage stage_of(int index, const Params& p) {
    Stage stage;
    stage.weight_pitch = int(p.chunk_terms) + kStorageVec;
    stage.input_pitch = int(p.chunk_terms) + kAccVec;
    const int weight_bytes = int(p.block_rows) * stage.weight_pitch * int(sizeof(storage_t));
    const int input_bytes = BLOCK_N * stage.input_pitch * int(sizeof(acc_t));
    unsigned char* const begin = dynamic_shared_memory() + index * (weight_bytes + input_bytes);
    stage.weight = reinterpret_cast<storage_t*>(begin);
    stage.input = reinterpret_cast<acc_t*>(begin + weight_bytes);
    return stage;
}

// A term r = c_in*K + k that moves on by 32 terms.
struct Walk {
    index_t c_in, k, channels_advance, taps_advance;

    __device__ __forceinline__ Walk(const Params& p) : c_in(0), k(0) {
        channels_advance = 32 / p.K;
        taps_advance = 32 - channels_advance * p.K;
    }
    __device__ __forceinline__ void start(index_t r, const Params& p) {
        c_in = r / p.K;
        k = r - c_in * p.K;
    }
    __device__ __forceinline__ void advance(const Params& p) {
        c_in += channels_advance;
        k += taps_advance;
        if (k >= p.K) {
            k -= p.K;
            ++c_in;
        }
    }
};

// The columns, for a warp that loads. Those behind the last repeat it.
struct Columns {
    const storage_t* input;     // input[0, g*C_in_g, 0]
    index_t position[BLOCK_N];  // l_in of tap 0
    index_t offset[BLOCK_N];    // of that position, from `input`

    __device__ __forceinline__ Columns(const storage_t* input, const Params& p) : input(input) {
#pragma unroll
        for (int j = 0; j < BLOCK_N; ++j) {
            const index_t column = min_index(j, p.columns - 1);
            const index_t n = column / p.L_out;
            position[j] = (column - n * p.L_out) * p.stride - p.padding_left;
            offset[j] = n * p.input_stride_n + position[j] * p.input_stride_l;
        }
    }
};

// A lane's part of rows of weights: terms r_begin .. r_begin + terms - 1 of `rows` rows, and zeros up to `padded`.
__device__ __forceinline__ void load_weights(
    const Stage& stage, const storage_t* weight, index_t r_begin, int terms, int padded, int rows, Walk walk,
    const Params& p) {
    const int lane = threadIdx.x % 32;
    if (p.vector_weights) {
        const StorageWords* source = reinterpret_cast<const StorageWords*>(weight + r_begin);
        StorageWords* target = reinterpret_cast<StorageWords*>(stage.weight);
        const int vectors = terms / kStorageVec;
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
#pragma unroll 4
            for (int v = lane; v < vectors; v += 32) copy_async(target + v, source + v);
            source += p.weight_stride_out / kStorageVec;
            target += stage.weight_pitch / kStorageVec;
        }
    } else {
        walk.start(r_begin + lane, p);
#pragma unroll 1
        for (int term = lane; term < terms; term += 32, walk.advance(p)) {
            const storage_t* source = weight + (walk.c_in * p.weight_stride_in + walk.k * p.weight_stride_k);
            storage_t* target = stage.weight + term;
#pragma unroll 4
            for (int row = 0; row < rows; ++row, source += p.weight_stride_out, target += stage.weight_pitch) {
#if DTYPE_BYTES == 2
                *target = *source;
#else
                copy_async(target, source);
#endif
            }
        }
    }
#pragma unroll 1
    for (int term = terms + lane; term < padded; term += 32) {
#pragma unroll 1
        for (int row = 0; row < rows; ++row) stage.weight[row * stage.weight_pitch + term] = scalar::storage_zero();
    }
}

// A lane's part of the columns' positions for the same terms.
__device__ __forceinline__ void load_input(
    const Stage& stage, const Columns& columns, index_t r_begin, int terms, int padded, Walk walk, const Params& p) {
    const int lane = threadIdx.x % 32;
    walk.start(r_begin + lane, p);
#pragma unroll 1
    for (int first = lane; first < padded; first += 32 * kBatch) {
        storage_t value[kBatch][BLOCK_N];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const index_t shift = walk.k * p.dilation;
            const storage_t* const source = columns.input + (walk.c_in * p.input_stride_c + shift * p.input_stride_l);
            const index_t length = first + 32 * b < terms ? p.L_in : 0;
#pragma unroll
            for (int j = 0; j < BLOCK_N; ++j) {
                const Source at = source_index(columns.position[j] + shift, length);
                value[b][j] =
                    at.exists ? source[columns.offset[j] + at.moved * p.input_stride_l] : scalar::storage_zero();
            }
            walk.advance(p);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int term = first + 32 * b;
            if (term >= padded) break;
#pragma unroll
            for (int j = 0; j < BLOCK_N; ++j) stage.input[j * stage.input_pitch + term] = scalar::load(value[b][j]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) conv1d_skinny(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    const index_t g = index_t(blockIdx.x) / p.row_blocks;
    const index_t row_begin = (index_t(blockIdx.x) - g * p.row_blocks) * p.block_rows;
    const int rows = int(min_index(p.block_rows, p.C_out_g - row_begin));
    input += g * p.C_in_g * p.input_stride_c;                          // input[0, g*C_in_g, 0]
    weight += (g * p.C_out_g + row_begin) * p.weight_stride_out;       // weight[the block's first row, 0, 0]
    output += (g * p.C_out_g + row_begin) * p.output_stride_c;         // output[0, the block's first row, 0]
    const index_t R = p.C_in_g * p.K;
    const index_t chunks = ceil_div(R, p.chunk_terms);

    // For a warp that loads: the buffer that it owns (negative in warps that multiply), the columns, and the walk over terms.
    const int loader = int(threadIdx.x) / 32 - int(p.compute_warps);
    const Columns columns(input, p);
    const Walk walk(p);

    // For a thread that multiplies: its results.
    const int column_begin = int(threadIdx.x) / int(p.block_rows) * THREAD_N;
    const int row = int(threadIdx.x) % int(p.block_rows);
    const bool has_results = loader < 0 && row < rows && column_begin < min_index(BLOCK_N, p.columns);
    acc_t acc[THREAD_N];
#pragma unroll
    for (int j = 0; j < THREAD_N; ++j) acc[j] = scalar::zero();

    int turn = -1;  // the buffer of the chunk
#pragma unroll 1
    for (index_t chunk = -1; chunk < chunks; ++chunk, turn = turn + 1 == NUM_STAGES ? 0 : turn + 1) {
        if (loader == turn) copy_async_wait();
        if (chunk >= 0) __syncthreads();
        if (loader >= 0) {
            // Now the previous chunk is multiplied and its buffer is free; at the beginning all buffers are.
            const index_t next = chunk < 0 ? loader : chunk - 1 + NUM_STAGES;
            const bool is_free = chunk < 0 || (chunk > 0 && loader == (turn == 0 ? NUM_STAGES - 1 : turn - 1));
            if (!is_free || next >= chunks) continue;
            const Stage stage = stage_of(loader, p);
            const index_t r_begin = next * p.chunk_terms;
            const int terms = int(min_index(p.chunk_terms, R - r_begin));
            const int padded = (terms + kFetch - 1) / kFetch * kFetch;
            load_weights(stage, weight, r_begin, terms, padded, rows, walk, p);
            load_input(stage, columns, r_begin, terms, padded, walk, p);
            continue;
        }
        if (chunk < 0 || !has_results) continue;

        const Stage stage = stage_of(turn, p);
        const StorageWords* const w = reinterpret_cast<const StorageWords*>(stage.weight + row * stage.weight_pitch);
        const AccVector* const x = reinterpret_cast<const AccVector*>(stage.input + column_begin * stage.input_pitch);
        const int input_pitch = stage.input_pitch / kAccVec;
        const int count = int((min_index(p.chunk_terms, R - chunk * p.chunk_terms) + kFetch - 1) / kFetch);
        const auto fetch = [&](Fetched& fetched, int index) {
#pragma unroll
            for (int v = 0; v < kFetch / kStorageVec; ++v) fetched.weight[v] = w[index * (kFetch / kStorageVec) + v];
#pragma unroll
            for (int j = 0; j < THREAD_N; ++j) {
#pragma unroll
                for (int v = 0; v < kFetch / kAccVec; ++v) {
                    fetched.input[j][v] = x[j * input_pitch + index * (kFetch / kAccVec) + v];
                }
            }
        };
        const auto multiply = [&](const Fetched& fetched) {
#pragma unroll
            for (int t = 0; t < kFetch; ++t) {
#pragma unroll
                for (int j = 0; j < THREAD_N; ++j) {
                    acc[j] = multiply_add(
                        scalar::load(element_of(fetched.weight[t / kStorageVec], t % kStorageVec)),
                        fetched.input[j][t / kAccVec].element[t % kAccVec], acc[j]);
                }
            }
        };
        // Two sets of registers: the next terms are fetched while these are multiplied. After the last terms, the last ones are
        // fetched again.
        Fetched even, odd;
        fetch(even, 0);
#pragma unroll 1
        for (int index = 0;; index += 2) {
            fetch(odd, index + 1 < count ? index + 1 : index);
            multiply(even);
            if (index + 1 == count) break;
            fetch(even, index + 2 < count ? index + 2 : index);
            multiply(odd);
            if (index + 2 == count) break;
        }
    }
    if (!has_results) return;

    const Channel channel = epilogue.channel(g * p.C_out_g + row_begin + row);
    storage_t* const y = output + row * p.output_stride_c;
    bool sum_again = false;
#pragma unroll
    for (int j = 0; j < THREAD_N; ++j) {
        const index_t column = column_begin + j;
        if (column >= p.columns) break;
        const index_t n = column / p.L_out;
        storage_t* const place = y + (n * p.output_stride_n + (column - n * p.L_out) * p.output_stride_l);
        *place = finish(acc[j], channel, place);
        sum_again = sum_again || needs_canonical_sum(acc[j]);
    }
    if (!sum_again) return;
    const storage_t* const w = weight + row * p.weight_stride_out;
#pragma unroll 1
    for (index_t column = column_begin; column < min_index(column_begin + THREAD_N, p.columns); ++column) {
        const index_t n = column / p.L_out, l_out = column - n * p.L_out;
        const acc_t sum = canonical_sum(
            input + n * p.input_stride_n, l_out * p.stride - p.padding_left, p.dilation, p.K, p,
            RowWeights(w, p.weight_stride_in, p.weight_stride_k));
        storage_t* const place = y + (n * p.output_stride_n + l_out * p.output_stride_l);
        *place = finish(sum, channel, place);
    }
}
