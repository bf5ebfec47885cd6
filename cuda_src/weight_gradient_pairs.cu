// weight_gradient_pairs: gradient of the weights of depthwise layers and of others with few channels on one side of a group,
// which have few multiply-adds for the data that they read.
//
//   grad_weight[r, c, k] = sum over n < N, l < L_coarse of coarse[n, r, l] * conj(fine[n, g*C_fine_g + c, l_fine]),
//   g = r / C_coarse_g,   l_fine = l*stride - padding_left + k*dilation,   terms outside [0, L_fine) left out;
//   the conjugate of that where is_conjugated.
//
// A pair is (slice, r, c): a row of coarse and a row of fine. A thread sums THREAD_K neighbouring taps of one pair.
// A block takes block_pairs neighbouring pairs, a multiple of 32, by tap_threads threads each; a warp has 32 pairs and the
// same taps of each. Pieces of `chunk` positions of the rows pass through two buffers of shared memory as they are stored:
// the next is loaded while one is summed, eight threads along a row. Rows are an odd number of vectors (IS_SLIDING = 1) or of
// 4-byte words (IS_SLIDING = 0) apart, so that the pairs of a warp read from different banks.
//
// IS_SLIDING = 1: stride and dilation 1. For each vector of positions a thread reads one vector of fine, and keeps the vectors
// that later positions use in registers. The window of fine begins `lead` positions early, where copies of fine_copy elements
// are aligned; the first `lead` taps then do not exist.
// IS_SLIDING = 0: any stride and dilation, one read for each position and tap.
// Terms outside fine are multiplied as zeros; canonical_sum.cuh explains what follows from that.
//
// Grid x: blocks of pairs (fastest), then tiles of tap_threads*THREAD_K taps. Grid y and z: 1. Dynamic shared memory: a
// Pair for each pair, then two buffers of block_pairs rows of coarse and as many of fine.
// With several slices their sums are stored in `partial` and sum_slices.cu follows; with one slice `partial` is null.
// Takes arrays of any strides, in elements. Chosen for at most 4 channels a group on one side.

#include "common.cuh"
#include "edge.cuh"
#include "slices.cuh"

struct Params {
    index_t N, L_coarse, L_fine, K;
    index_t C_coarse, C_coarse_g, C_fine_g;
    index_t pairs, pair_blocks, block_pairs, tap_threads;
    index_t stride, padding_left, dilation;
    index_t slice_samples, slice_positions, slice_pieces;
    index_t is_conjugated;
    index_t chunk, chunks;               // positions of a chunk, and chunks of one sample of a slice
    index_t coarse_copy, fine_copy;      // elements that one copy takes
    index_t lead, window;                // positions of fine that lie early; positions of a chunk's window
    index_t coarse_pitch, fine_pitch;    // elements from one row in shared memory to the next
    index_t coarse_stride_n, coarse_stride_c, coarse_stride_l;
    index_t fine_stride_n, fine_stride_c, fine_stride_l;
    index_t weight_stride_r, weight_stride_c, weight_stride_k;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/weight_gradient_pairs.py");

constexpr int kVec = kStorageVec;
constexpr int kHeld = (THREAD_K + kVec - 2) / kVec + 1;  // vectors of fine that kVec positions and THREAD_K taps meet
constexpr int kRowThreads = 8;                           // threads that load one row
static_assert(THREAD_K % kVec == 0, "threads begin at whole vectors: gpuconv/families/weight_gradient_pairs.py");

// One pair: the offsets of its first chunk in coarse and of that chunk's window in fine; the number of samples of its slice,
// and the slice's positions in each of them.
struct Pair {
    index_t coarse, fine;
    index_t samples, l_begin, l_end;
};

// Copies the positions begin to begin + length of a row, which `source` points to, to shared memory, as values of T of
// several elements each. Either all elements of such a value exist or none; those that do not exist become zeros.
template <typename T>
__device__ __forceinline__ void copy_row(
    storage_t* shared, const storage_t* source, index_t begin, int length, index_t L) {
    const int count = sizeof(T) / sizeof(storage_t);
#pragma unroll 1
    for (int i = int(threadIdx.x) % kRowThreads * count; i < length; i += kRowThreads * count) {
        if (source_index(begin + i, L).exists) {
            copy_async(reinterpret_cast<T*>(shared + i), reinterpret_cast<const T*>(source + i));
        } else {
            *reinterpret_cast<T*>(shared + i) = T{};
        }
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) weight_gradient_pairs(
    const storage_t* __restrict__ coarse,  // [N, C_coarse, L_coarse]
    const storage_t* __restrict__ fine,    // [N, C_fine, L_fine]
    acc_t* __restrict__ partial,           // [slices, C_coarse, C_fine_g, K], or null
    storage_t* __restrict__ grad_weight,   // [C_coarse, C_fine_g, K], or null
    const Params p) {
    const int block_pairs = int(p.block_pairs), coarse_pitch = int(p.coarse_pitch), fine_pitch = int(p.fine_pitch);
    Pair* const smem_pairs = reinterpret_cast<Pair*>(dynamic_shared_memory());  // [block_pairs]
    storage_t* const buffers = reinterpret_cast<storage_t*>(smem_pairs + block_pairs);
    const int buffer_size = block_pairs * (coarse_pitch + fine_pitch);

    const index_t tap_tile = index_t(blockIdx.x) / p.pair_blocks;
    const index_t pair_begin = (index_t(blockIdx.x) - tap_tile * p.pair_blocks) * block_pairs;
    const int block_rows = int(min_index(block_pairs, p.pairs - pair_begin));
    const int tap_thread = int(threadIdx.x) / block_pairs, in_block = int(threadIdx.x) - tap_thread * block_pairs;
    const index_t tile_tap = tap_tile * p.tap_threads * THREAD_K;  // the first of the tile, `lead` of them not existing

    const auto channels_of = [&](index_t pair, index_t* slice, index_t* r, index_t* c) {
        const index_t slice_and_r = pair / p.C_fine_g;
        *c = pair - slice_and_r * p.C_fine_g;
        *slice = slice_and_r / p.C_coarse;
        *r = slice_and_r - *slice * p.C_coarse;
    };
    const index_t window_first = (IS_SLIDING ? tile_tap : tile_tap * p.dilation) - p.padding_left - p.lead;  // where l = 0
    for (int i = threadIdx.x; i < block_rows; i += blockDim.x) {
        index_t slice, r, c;
        channels_of(pair_begin + i, &slice, &r, &c);
        const Slice s = find_slice(slice, p);
        Pair pair;
        pair.coarse = r * p.coarse_stride_c + s.n_begin * p.coarse_stride_n + s.l_begin * p.coarse_stride_l;
        pair.fine = (r / p.C_coarse_g * p.C_fine_g + c) * p.fine_stride_c + s.n_begin * p.fine_stride_n +
                    (s.l_begin * p.stride + window_first) * p.fine_stride_l;
        pair.samples = s.n_end - s.n_begin;
        pair.l_begin = s.l_begin;
        pair.l_end = s.l_end;
        smem_pairs[i] = pair;
    }

    const auto load_chunk = [&](int buffer, index_t sample, index_t l_first) {
        storage_t* const smem_coarse = buffers + buffer * buffer_size;
        storage_t* const smem_fine = smem_coarse + block_pairs * coarse_pitch;
        const storage_t* const a = coarse + (sample * p.coarse_stride_n + l_first * p.coarse_stride_l);
        const storage_t* const b = fine + (sample * p.fine_stride_n + l_first * p.stride * p.fine_stride_l);
#pragma unroll 1
        for (int i = int(threadIdx.x) / kRowThreads; i < block_rows; i += int(blockDim.x) / kRowThreads) {
            const Pair pair = smem_pairs[i];
            const index_t l = pair.l_begin + l_first;
            if (sample >= pair.samples || l >= pair.l_end) continue;
            storage_t* shared = smem_coarse + i * coarse_pitch;
            const storage_t* source = a + pair.coarse;
            index_t begin = l, L = p.L_coarse, stride = p.coarse_stride_l;
            int length = int(min_index(p.chunk, pair.l_end - l)), copy = int(p.coarse_copy);
            // One loop for both rows halves the code.
#pragma unroll 1
            for (int side = 0; side < 2; ++side) {
                const int copy_bytes = kIsEmptyOutside && stride == 1 ? copy * int(sizeof(storage_t)) : 0;
                if (copy_bytes == 16) {
                    copy_row<Vector<unsigned, 4>>(shared, source, begin, length, L);
                } else if (copy_bytes == 8) {
                    copy_row<Vector<unsigned, 2>>(shared, source, begin, length, L);
                } else if (copy_bytes == 4) {
                    copy_row<Vector<unsigned, 1>>(shared, source, begin, length, L);
                } else {
#pragma unroll 2
                    for (int e = int(threadIdx.x) % kRowThreads; e < length; e += kRowThreads) {
                        const Source at = source_index(begin + e, L);
                        shared[e] = at.exists ? source[(e + at.moved) * stride] : scalar::storage_zero();
                    }
                }
                shared = smem_fine + i * fine_pitch;
                source = b + pair.fine;
                begin = l * p.stride + window_first;
                L = p.L_fine;
                stride = p.fine_stride_l;
                length = int(p.window);
                copy = int(p.fine_copy);
            }
        }
    };

    acc_t acc[THREAD_K];
#pragma unroll
    for (int j = 0; j < THREAD_K; ++j) acc[j] = scalar::zero();

    // From the first tap of the tile, or of the thread where that slides. A tap behind the last repeats it: its sum is not
    // stored.
    int tap_offset[THREAD_K];
#pragma unroll
    for (int j = 0; j < THREAD_K; ++j) {
        const index_t tap = min_index(tap_thread * THREAD_K + j, p.K - 1 - tile_tap);
        tap_offset[j] = IS_SLIDING ? j : int(tap * p.dilation);
    }

    const auto sum_position = [&](storage_t coarse_value, const storage_t* b) {
        const acc_t value = scalar::load(coarse_value);
#pragma unroll
        for (int j = 0; j < THREAD_K; ++j) {
            acc[j] = multiply_add_conjugate(value, scalar::load(b[tap_offset[j]]), acc[j]);
        }
    };

    // Sums `count` positions of a row of coarse with a window of fine.
    const auto sum_positions = [&](const storage_t* a, const storage_t* b, int count) {
#if IS_SLIDING
        const StorageVector* const a_vectors = reinterpret_cast<const StorageVector*>(a);
        const StorageVector* const b_vectors = reinterpret_cast<const StorageVector*>(b);
        acc_t held[kHeld][kVec];
        const auto hold = [&](int slot, int vector) {
            const StorageVector next = b_vectors[vector];
#pragma unroll
            for (int e = 0; e < kVec; ++e) held[slot][e] = scalar::load(next.element[e]);
        };
        const int vectors = count / kVec;
        if (vectors > 0) {
#pragma unroll
            for (int v = 0; v < kHeld - 1; ++v) hold(v, v);
        }
#pragma unroll 1
        for (int first = 0; first < vectors; first += kHeld) {
#pragma unroll
            for (int v = 0; v < kHeld; ++v) {
                if (first + v >= vectors) break;
                hold((v + kHeld - 1) % kHeld, first + v + kHeld - 1);
                const StorageVector x = a_vectors[first + v];
#pragma unroll
                for (int e = 0; e < kVec; ++e) {
                    const acc_t value = scalar::load(x.element[e]);
#pragma unroll
                    for (int j = 0; j < THREAD_K; ++j) {
                        acc[j] = multiply_add_conjugate(value, held[(v + (e + j) / kVec) % kHeld][(e + j) % kVec], acc[j]);
                    }
                }
            }
        }
#pragma unroll 1
        for (int l = vectors * kVec; l < count; ++l) sum_position(a[l], b + l);
#else
#pragma unroll 4
        for (int l = 0; l < count; ++l) sum_position(a[l], b + l * int(p.stride));
#endif
    };

    // The first round only loads. Chunks follow each other, first those of one sample, then those of the next.
    const bool has_pair = in_block < block_rows;
    index_t next_sample = 0, next_chunk = 0, sample = -1, piece = 0;
    int buffer = 1;
    for (; sample < p.slice_samples; buffer ^= 1) {
        copy_async_wait();
        __syncthreads();
        if (next_sample < p.slice_samples) load_chunk(buffer ^ 1, next_sample, next_chunk * p.chunk);
        if (sample >= 0 && has_pair) {
            const Pair pair = smem_pairs[in_block];
            const index_t l = pair.l_begin + piece * p.chunk;
            if (sample < pair.samples && l < pair.l_end) {
                const storage_t* const a = buffers + buffer * buffer_size + in_block * coarse_pitch;
                const storage_t* const b = buffers + buffer * buffer_size + block_pairs * coarse_pitch +
                                           in_block * fine_pitch + (IS_SLIDING ? tap_thread * THREAD_K : int(p.lead));
                sum_positions(a, b, int(min_index(p.chunk, pair.l_end - l)));
            }
        }
        sample = next_sample;
        piece = next_chunk;
        if (++next_chunk == p.chunks) {
            next_chunk = 0;
            ++next_sample;
        }
    }
    if (!has_pair) return;

    const index_t pair = pair_begin + in_block;
    index_t slice, r, c;
    channels_of(pair, &slice, &r, &c);
    const index_t first_tap = tile_tap + tap_thread * THREAD_K - (IS_SLIDING ? p.lead : 0);
    acc_t* const partial_pair = partial + pair * p.K;  // [slice, r, c, 0]
    storage_t* const result_pair =
        grad_weight + (r * p.weight_stride_r + c * p.weight_stride_c);
    const auto store = [&](acc_t sum, index_t k) {
        if (partial != nullptr) {
            partial_pair[k] = sum;
        } else {
            result_pair[k * p.weight_stride_k] = finish_gradient(sum, p.is_conjugated);
        }
    };
    bool sum_again = false;
#pragma unroll
    for (int j = 0; j < THREAD_K; ++j) {
        if (first_tap + j >= 0 && first_tap + j < p.K) {
            store(acc[j], first_tap + j);
            sum_again = sum_again || needs_canonical_sum(acc[j]);
        }
    }
    if (!sum_again) return;
    coarse += r * p.coarse_stride_c;
    fine += (r / p.C_coarse_g * p.C_fine_g + c) * p.fine_stride_c;
    const Slice s = find_slice(slice, p);
#pragma unroll 1
    for (index_t k = max_index(first_tap, 0); k < min_index(first_tap + THREAD_K, p.K); ++k) {
        store(canonical_slice_sum(coarse, fine, k, s, p), k);
    }
}
