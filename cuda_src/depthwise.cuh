// What conv1d_depthwise and conv_transpose1d_depthwise share: how rows are partitioned among blocks and threads, and how the
// taps and the input window of a row are staged in shared memory by 16-byte accesses, whatever the row's alignment.
//
// A row is one output channel of one sample. A block computes one tile of outputs of each of block_rows neighbouring rows;
// row_threads threads work on a row, so that rows shorter than a block leave few threads idle. Each computes THREAD_L
// results `repeats` times, so that its start costs less per result.
//
// A sliding thread holds THREAD_L neighbouring results and slides over the taps, step by step, with a few vectors of the
// window in registers. Its block stages the taps of each row and the window of the input that they meet, both as
// accumulators, with zeros for taps and positions that do not exist. The tile of each row begins at a 16-byte boundary
// of its output, so that all stores but those at the ends of a row are 16 bytes wide; its window begins at a boundary of
// the input, and the taps shift by `lead` zeros to make up for it.
// canonical_sum.cuh explains what follows from those zeros.
//
// Skipping threads, for layers with stride 1 and a dilation, have their window and taps staged likewise, without `lead`. A warp
// holds 32*THREAD_L neighbouring results and a thread every 32nd of them, so that a warp reads neighbouring words for any
// dilation. At the end the results pass through shared memory, so that each thread stores neighbouring ones.
//
// Macros read: SLIDE_STRIDE, IS_SKIPPING, THREAD_L, DTYPE_BYTES, BLOCK_SIZE, MIN_BLOCKS, and those of common.cuh.

#pragma once

#include "canonical_sum.cuh"
#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "input.cuh"

constexpr int kPhases = SLIDE_STRIDE > 0 ? SLIDE_STRIDE : 1;
constexpr int kTaps = kPhases * kAccVec;  // of one step of a sliding thread
constexpr int kParts = kStorageVec / kAccVec;  // vectors of accumulators from one vector of elements
constexpr int kBatch = kParts == 2 ? 2 : 4;  // times 16 bytes that a thread loads before it stores the first
// With so few steps a sliding thread skips none: finding those to skip would cost as much.
constexpr int kFewSteps = 2;
static_assert(kParts == 1 || kParts == 2, "a vector of elements becomes one or two vectors of accumulators");
static_assert(sizeof(storage_t) == DTYPE_BYTES, "DTYPE_BYTES differs from gpuconv/families/depthwise.py");
static_assert(
    (SLIDE_STRIDE == 0 && !IS_SKIPPING) || (THREAD_L == 2 * kAccVec && THREAD_L % kStorageVec == 0),
    "a thread holds two vectors of accumulators: gpuconv/families/depthwise.py");

// Blocks that a multiprocessor must be able to hold; on sm_75 it holds 1024 threads. If the input is activated, more than four
// blocks would leave too few registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMinBlocks = MIN_BLOCKS * BLOCK_SIZE > 1024 ? 1024 / BLOCK_SIZE : MIN_BLOCKS;
#elif defined(INPUT_ACTIVATION)
constexpr int kMinBlocks = MIN_BLOCKS > 4 ? 4 : MIN_BLOCKS;
#else
constexpr int kMinBlocks = MIN_BLOCKS;
#endif

// What a thread works on.
struct ThreadRow {
    index_t tile;      // of the row
    int row_in_block;
    int place;         // of the thread within its row
    index_t n, c_out;
    bool has_row;      // false for threads behind the last row
};

template <typename ParamsT>
__device__ __forceinline__ ThreadRow find_row(const ParamsT& p, unsigned block) {
    ThreadRow at;
    at.row_in_block = int(divide(threadIdx.x, p.row_threads, p.row_threads_magic, p.row_threads_shift));
    at.place = int(threadIdx.x) - at.row_in_block * int(p.row_threads);
    const index_t row_group = divide(index_t(block), p.tiles, p.tiles_magic, p.tiles_shift);
    at.tile = index_t(block) - row_group * p.tiles;
    const index_t row = row_group * p.block_rows + at.row_in_block;
    at.n = divide(row, p.C_out, p.C_out_magic, p.C_out_shift);
    at.c_out = row - at.n * p.C_out;
    at.has_row = at.row_in_block < p.block_rows && at.n < p.N;
    return at;
}

// input[n, c_in, 0] and output[n, c_out, 0] of a thread's row.
template <typename ParamsT>
__device__ __forceinline__ index_t input_channel(const ThreadRow& at, const ParamsT& p) {
    return p.C_out_g == 1 ? at.c_out : at.c_out / p.C_out_g;
}
template <typename ParamsT>
__device__ __forceinline__ const storage_t* input_row(const storage_t* input, const ThreadRow& at, const ParamsT& p) {
    return input + at.n * p.input_stride_n + input_channel(at, p) * p.input_stride_c;
}
template <typename ParamsT>
__device__ __forceinline__ storage_t* output_row(storage_t* output, const ThreadRow& at, const ParamsT& p) {
    return output + at.n * p.output_stride_n + at.c_out * p.output_stride_c;
}

// The NaN fallback's sum at l of a thread's row, which is determined again to save registers. weight_row and
// sum_existing_terms are the kernel's own.
template <typename ParamsT>
__device__ __forceinline__ acc_t sum_again(
    const storage_t* input, const storage_t* weight, const InputActivation& input_activation, index_t l, const ParamsT& p) {
    const ThreadRow at = find_row(p, block_index_again());
    return sum_existing_terms(
        input_row(input, at, p), weight_row(weight, at, p), input_activation.channel(input_channel(at, p)), l, p);
}

// taps[k + lead] = weight of tap k, zeros before and behind, `count` in all.
__device__ __forceinline__ void stage_taps(
    acc_t* taps, const storage_t* w, index_t weight_stride_k, index_t K, int lead, int count, int place, int row_threads) {
#pragma unroll 1
    for (int i = place; i < count; i += row_threads) {
        const bool exists = i >= lead && i - lead < K;
        taps[i] = exists ? scalar::load(w[(i - lead) * weight_stride_k]) : scalar::zero();
    }
}

// The vector of a row x[0 .. L_in) that begins at position `first`, which need not exist as a whole.
__device__ __forceinline__ StorageWords load_edge(
    const storage_t* x, index_t first, index_t L_in, const Loader& loaded) {
    StorageWords vector;
#pragma unroll
    for (int e = 0; e < kStorageVec; ++e) {
        const Source source = source_index(first + e, L_in);
        set_element(vector, e, source.exists ? loaded(x[source.index]) : scalar::storage_zero());
    }
    return vector;
}

#if SLIDE_STRIDE > 0 || IS_SKIPPING

// Where stage_window puts its vectors: vector v of the window lies in plane v % kPlanes. One vector in front of each plane
// and one behind it are written too, where the 16-byte accesses at either end reach beyond the window.
template <int kPlanes>
struct WindowTarget {
    AccVector* first[kParts];
    int plane_pitch;

    __device__ __forceinline__ WindowTarget(AccVector* window, int pitch, int ahead) : plane_pitch(pitch) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const int vector = part - ahead / kAccVec;
            first[part] = window + ((vector & (kPlanes - 1)) * pitch + (vector >> (kPlanes - 1)));
        }
    }
    __device__ __forceinline__ void store(int storage_vector, int part, const AccVector& value) const {
        const int vector = storage_vector * kParts;
        first[part][vector % kPlanes * plane_pitch + vector / kPlanes] = value;
    }
};

// Elements between the 16-byte boundary at or before x + start and x + start.
__device__ __forceinline__ int elements_ahead(const storage_t* x, index_t start) {
    return kParts == 1 ? 0 : elements_past_boundary(x + start);
}

// Passes positions start .. start + kAccVec*vectors - 1 of a row x[0 .. L_in) to target.store, 16 bytes of elements in kParts
// vectors at a time; the first of them begins `ahead` positions before `start`. x + start is aligned to kAccVec elements.
template <typename Target>
__device__ __forceinline__ void stage_window(
    const storage_t* x, index_t L_in, const Loader& sample, index_t start, int ahead, int vectors, int place,
    int row_threads, const Target& target) {
    const int count = (vectors * kAccVec + ahead + kStorageVec - 1) / kStorageVec;
#pragma unroll 1
    for (int first = place; first < count; first += kBatch * row_threads) {
        StorageWords loaded[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int v = first + b * row_threads;
            const index_t l_in = start - ahead + v * kStorageVec;
            if (v >= count) break;
            if (is_inside(l_in, l_in + kStorageVec - 1, L_in)) {
                loaded[b] = sample.vector(*reinterpret_cast<const StorageWords*>(x + l_in));
            } else {
                loaded[b] = load_edge(x, l_in, L_in, sample);
            }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int v = first + b * row_threads;
            if (v >= count) break;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                AccVector value;
#pragma unroll
                for (int e = 0; e < kAccVec; ++e) value.element[e] = scalar::load(element_of(loaded[b], part * kAccVec + e));
                target.store(v, part, value);
            }
        }
    }
}

// Stores the results of y[l_out .. l_out + THREAD_L), as far as they exist. sum_again_at(l) is the NaN fallback's sum.
template <typename SumAgain>
__device__ __forceinline__ void store_results(
    storage_t* y, index_t l_out, index_t L_out, const acc_t (&acc)[THREAD_L], const Channel& channel,
    const SumAgain& sum_again_at) {
    bool sum_again = false;
#pragma unroll
    for (int j = 0; j < THREAD_L; ++j) sum_again = sum_again || needs_canonical_sum(acc[j]);
    if (sum_again) {
#pragma unroll 1
        for (index_t l = max_index(l_out, 0); l < min_index(l_out + THREAD_L, L_out); ++l) {
            y[l] = finish(sum_again_at(l), channel, y + l);
        }
        return;
    }
#pragma unroll
    for (int first = 0; first < THREAD_L; first += kStorageVec) {
        StorageWords result;
#pragma unroll
        for (int e = 0; e < kStorageVec; ++e) {
            const index_t l = l_out + first + e;
            const storage_t* const place = is_index(l, L_out) ? y + l : nullptr;
            set_element(result, e, finish(acc[first + e], channel, place));
        }
        if (l_out + first >= 0 && l_out + first + kStorageVec <= L_out) {
            *reinterpret_cast<StorageWords*>(y + l_out + first) = result;
        } else {
#pragma unroll
            for (int e = 0; e < kStorageVec; ++e) {
                const index_t l = l_out + first + e;
                if (l >= 0 && l < L_out) y[l] = element_of(result, e);
            }
        }
    }
}

#endif

#if IS_SKIPPING

// The kernel of skipping threads. From one tap to the next a result's position moves by `step` = dilation or -dilation;
// first_position is that of tap 0 for l_out = 0.
template <typename ParamsT>
__device__ __forceinline__ void convolve_skipping(
    const storage_t* input, const storage_t* weight, storage_t* output, const Epilogue& epilogue,
    const InputActivation& input_activation, index_t first_position, int step, const ParamsT& p) {
    const ThreadRow at = find_row(p, blockIdx.x);
    const int row_threads = int(p.row_threads), lane = threadIdx.x % 32;
    const int reach = (int(p.K) - 1) * step;  // of the last tap from the first
    storage_t* const y = output_row(output, at, p);
    acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    acc_t* const slice = shared + threadIdx.x / 32 * (32 * THREAD_L);
    acc_t* const windows = shared + blockDim.x * THREAD_L;
    AccVector* const window = reinterpret_cast<AccVector*>(windows) + (at.row_in_block * p.window_pitch + 1);
    acc_t* const taps = windows + p.block_rows * p.window_pitch * kAccVec + at.row_in_block * p.taps_pitch;
    index_t l_begin = 0;  // of the tile
    int begin = 0;        // in the window, of tap 0 of the tile's first result

    if (at.has_row) {
        const storage_t* const x = input_row(input, at, p);
        l_begin = at.tile * row_threads * p.repeats * THREAD_L - elements_past_boundary(y);
        const index_t lowest = l_begin + first_position + (reach < 0 ? reach : 0);
        const int lead = int(lowest + elements_past_boundary(x)) & (kAccVec - 1);
        begin = lead - (reach < 0 ? reach : 0);
        stage_taps(taps, weight_row(weight, at, p), p.weight_stride_k, p.K, 0, int(p.K), at.place, row_threads);
        const int ahead = elements_ahead(x, lowest - lead);
        stage_window(
            x, p.L_in, input_activation.channel(input_channel(at, p)), lowest - lead, ahead, int(p.window), at.place,
            row_threads, WindowTarget<1>(window, 0, ahead));
    }
    __syncthreads();
    if (!at.has_row) return;

    const Channel channel = epilogue.channel(at.c_out);
#pragma unroll 1
    for (int place = at.place - lane; place < row_threads * int(p.repeats); place += row_threads) {
        const index_t l_out = l_begin + place * THREAD_L;  // the warp's first
        if (l_out >= p.L_out) return;
        acc_t acc[THREAD_L];
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) acc[j] = scalar::zero();
        const acc_t* position = window->element + (begin + place * THREAD_L + lane);
#pragma unroll 4
        for (int k = 0; k < p.K; ++k, position += step) {
            const acc_t tap = taps[k];
#pragma unroll
            for (int j = 0; j < THREAD_L; ++j) acc[j] = multiply_add(tap, position[32 * j], acc[j]);
        }
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) slice[32 * j + lane] = acc[j];
        __syncwarp();
#pragma unroll
        for (int v = 0; v < THREAD_L / kAccVec; ++v) {
            const AccVector vector = reinterpret_cast<const AccVector*>(slice)[lane * (THREAD_L / kAccVec) + v];
#pragma unroll
            for (int e = 0; e < kAccVec; ++e) acc[v * kAccVec + e] = vector.element[e];
        }
        __syncwarp();
        store_results(y, l_out + lane * THREAD_L, p.L_out, acc, channel, [&](index_t l) {
            return sum_again(input, weight, input_activation, l, p);
        });
    }
}

#endif
