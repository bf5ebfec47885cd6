// conv1d_depthwise: forward convolution of layers with one input channel a group (C_in_g = 1), C_out_g outputs each.
//
//   output[n, c_out, l_out] = bias[c_out] + sum over k < K of weight[c_out, 0, k] * input[n, c_out / C_out_g, l_in],
//   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// Grid x: tiles of one row (n, c_out) fastest, then groups of block_rows rows. Grid y and z: 1. Dynamic shared memory: the
// taps of the block's rows and the windows of the input that they meet; with IS_SKIPPING, first a buffer for each warp,
// through which its results pass.
//
// SLIDE_STRIDE = 1 or 2: that stride, dilation 1, input and output contiguous along l. Sliding threads: a step takes kAccVec
// taps of either phase of the stride, one 16-byte load of window and one of taps for THREAD_L*kAccVec multiply-adds.
// IS_SKIPPING = 1, SLIDE_STRIDE = 0: stride 1, any dilation, input and output contiguous along l. Skipping threads.
// IS_STRIDING = 1: a stride of whole 16-byte vectors, dilation 1, input contiguous along l. A thread holds one result and
// reads its window vector by vector. The window in shared memory is ordered as in global memory, but the first positions of
// neighbouring results are an odd number of vectors apart, so that neighbouring threads read different banks.
// None of these: any stride and dilation, arrays of any strides. A thread holds THREAD_L results row_threads apart, so
// that neighbouring threads store neighbouring elements; the window lies in shared memory by its position modulo the
// stride, so that neighbouring threads read neighbouring words whatever the stride.
//
// Chosen for fewer than 8 output channels a group.

#include "canonical_sum.cuh"
#include "common.cuh"
#include "depthwise.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "window.cuh"

struct Params {
    index_t N, C_out, L_in, L_out, K;
    index_t C_out_g;
    index_t stride, padding_left, dilation;
    index_t tiles, tiles_magic, tiles_shift;                    // of one row
    index_t row_threads, row_threads_magic, row_threads_shift;  // threads of one row
    index_t block_rows, repeats;
    index_t C_out_magic, C_out_shift;
    index_t taps_pitch;    // accumulators from one row's taps to the next row's
    index_t window;        // of one tile: 16-byte vectors, or positions where threads neither slide nor skip
    index_t window_pitch;  // from one row's window to the next: vectors (of a plane), or accumulators
    index_t plane_pitch;   // from one plane, one result (IS_STRIDING) or one phase of a window to the next, likewise
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS WINDOW_FIELDS
    static constexpr int C_in_g = 1;  // for canonical_sum
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_depthwise.py");

// weight[c_out, 0, 0] of a thread's row.
__device__ __forceinline__ const storage_t* weight_row(const storage_t* weight, const ThreadRow& at, const Params& p) {
    return weight + at.c_out * p.weight_stride_out;
}

// The NaN fallback's sum at l_out.
__device__ __forceinline__ acc_t sum_existing_terms(
    const storage_t* x, const storage_t* w, const Loader& loaded, index_t l_out, const Params& p) {
    return canonical_sum(
        x, l_out * p.stride - p.padding_left, p.dilation, p.K, p, RowWeights(w, 0, p.weight_stride_k), loaded);
}

#if SLIDE_STRIDE > 0

// Position u of the window belongs to phase u % 2; there vector v of kAccVec positions lies in plane v % 2 of the phase.
struct PhasesTarget {
    acc_t* window;
    int plane_pitch, ahead;

    __device__ __forceinline__ PhasesTarget(AccVector* window, int plane_pitch, int ahead)
        : window(window->element), plane_pitch(plane_pitch), ahead(ahead) {}
    __device__ __forceinline__ void store(int storage_vector, int part, const AccVector& value) const {
        const int begin = storage_vector * kStorageVec + part * kAccVec - ahead;  // a multiple of kAccVec
        if (begin < 0) return;
        const unsigned within = unsigned(begin) / 2, vector = within / kAccVec;
        acc_t* const target = window + (((vector & 1) * plane_pitch + vector / 2) * kAccVec + within % kAccVec);
        if (kAccVec == 1) {
            target[begin % 2 * 2 * plane_pitch] = value.element[0];
            return;
        }
#pragma unroll
        for (int e = 0; e < kAccVec; ++e) target[e % 2 * 2 * plane_pitch * kAccVec + e / 2] = value.element[e];
    }
};

// Threads lie two vectors apart, and with two planes they read neighbouring vectors.
template <int kPhasesOf>
struct TargetOf {
    typedef WindowTarget<2> type;
};
template <>
struct TargetOf<2> {
    typedef PhasesTarget type;
};
typedef TargetOf<kPhases>::type Target;

__device__ __forceinline__ void convolve_rows(
    const storage_t* input, const storage_t* weight, storage_t* output, const Epilogue& epilogue,
    const InputActivation& input_activation, const Params& p) {
    const ThreadRow at = find_row(p, blockIdx.x);
    const int row_threads = int(p.row_threads), plane_pitch = int(p.plane_pitch);
    storage_t* const y = output_row(output, at, p);
    acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    acc_t* const taps = shared + at.row_in_block * p.taps_pitch;
    AccVector* const window =
        reinterpret_cast<AccVector*>(shared + p.block_rows * p.taps_pitch) + (at.row_in_block * p.window_pitch + 1);
    index_t l_begin = 0, start = 0;  // of the tile, and of its window
    int steps = 0, last_taps = 0;    // steps, and the taps of the last one

    if (at.has_row) {
        const storage_t* const x = input_row(input, at, p);
        const storage_t* const w = weight_row(weight, at, p);
        l_begin = at.tile * row_threads * p.repeats * THREAD_L - elements_past_boundary(y);
        const index_t l_first = l_begin * kPhases - p.padding_left;
        const int lead = int(l_first + elements_past_boundary(x)) & (kAccVec - 1);
        start = l_first - lead;
        steps = int(ceil_div(p.K + lead, kTaps));
        last_taps = int(p.K) + lead - (steps - 1) * kTaps;
        stage_taps(taps, w, p.weight_stride_k, p.K, lead, steps * kTaps, at.place, row_threads);
        const int ahead = elements_ahead(x, start);
        stage_window(
            x, p.L_in, input_activation.channel(input_channel(at, p)), start, ahead, int(p.window), at.place, row_threads,
            Target(window, plane_pitch, ahead));
    }
    __syncthreads();
    if (!at.has_row) return;

    const Channel channel = epilogue.channel(at.c_out);
#pragma unroll 1
    for (int place = at.place; place < row_threads * int(p.repeats); place += row_threads) {
        const index_t l_out = l_begin + place * THREAD_L;
        if (l_out >= p.L_out) return;

        // If there are many steps, those whose positions are all outside the input are skipped; the first step is even, as
        // the planes require.
        int step = 0, steps_end = steps;
        if (kIsEmptyOutside && steps > kFewSteps) {
            const index_t before = -start - kPhases * (THREAD_L * place + 3 * kAccVec - 1);
            const index_t behind = min_index(p.window * kAccVec, p.L_in - start) - kPhases * THREAD_L * place;
            step = before > 0 ? int(before / kTaps) & ~1 : 0;
            steps_end = behind > 0 ? int(min_index(steps, ceil_div(behind, kTaps))) : 0;
        }

        acc_t acc[THREAD_L];
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) acc[j] = scalar::zero();
        if (step < steps_end) {
            const AccVector* tap = reinterpret_cast<const AccVector*>(taps) + kPhases * step;
            const AccVector* even = window + (place + step / 2);
            const AccVector* odd = even + plane_pitch;
            AccVector held[kPhases][3];
#pragma unroll
            for (int phase = 0; phase < kPhases; ++phase) {
                held[phase][0] = even[2 * phase * plane_pitch];
                held[phase][1] = odd[2 * phase * plane_pitch];
            }
            // Of the three vectors held, the step's first tap multiplies `oldest`; the next vector replaces the one before it.
            const auto multiply_step = [&](const AccVector* next, int index, int oldest, int count = kTaps) {
                AccVector term[kPhases];
#pragma unroll
                for (int phase = 0; phase < kPhases; ++phase) {
                    held[phase][(oldest + 2) % 3] = next[2 * phase * plane_pitch];
                    term[phase] = tap[index * kPhases + phase];
                }
#pragma unroll
                for (int t = 0; t < kTaps; ++t) {
                    if (t >= count) break;
#pragma unroll
                    for (int j = 0; j < THREAD_L; ++j) {
                        const int position = j + t / kPhases;
                        acc[j] = multiply_add(
                            term[t / kAccVec].element[t % kAccVec],
                            held[t % kPhases][(oldest + position / kAccVec) % 3].element[position % kAccVec], acc[j]);
                    }
                }
            };
            if (steps <= kFewSteps) {
                multiply_step(even + 1, 0, 0);
                if (steps == 2) multiply_step(odd + 1, 1, 1, last_taps);
            } else {
#pragma unroll 1
                for (int left = steps_end - step;; left -= 6) {
                    multiply_step(even + 1, 0, 0);
                    if (left == 1) break;
                    multiply_step(odd + 1, 1, 1);
                    if (left == 2) break;
                    multiply_step(even + 2, 2, 2);
                    if (left == 3) break;
                    multiply_step(odd + 2, 3, 0);
                    if (left == 4) break;
                    multiply_step(even + 3, 4, 1);
                    if (left == 5) break;
                    multiply_step(odd + 3, 5, 2);
                    if (left == 6) break;
                    even += 3;
                    odd += 3;
                    tap += 6 * kPhases;
                }
            }
        }
        store_results(y, l_out, p.L_out, acc, channel, [&](index_t l) {
            return sum_again(input, weight, input_activation, l, p);
        });
    }
}

#elif IS_SKIPPING

__device__ __forceinline__ void convolve_rows(
    const storage_t* input, const storage_t* weight, storage_t* output, const Epilogue& epilogue,
    const InputActivation& input_activation, const Params& p) {
    convolve_skipping(input, weight, output, epilogue, input_activation, -p.padding_left, int(p.dilation), p);
}

#elif IS_STRIDING

__device__ __forceinline__ void convolve_rows(
    const storage_t* input, const storage_t* weight, storage_t* output, const Epilogue& epilogue,
    const InputActivation& input_activation, const Params& p) {
    const ThreadRow at = find_row(p, blockIdx.x);
    const int row_threads = int(p.row_threads), pitch = int(p.plane_pitch);
    const int stride_vectors = int(p.stride) / kStorageVec;
    acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    acc_t* const taps = shared + at.row_in_block * p.taps_pitch;
    StorageWords* const window =
        reinterpret_cast<StorageWords*>(shared + p.block_rows * p.taps_pitch) + at.row_in_block * p.window_pitch;
    const index_t l_begin = at.tile * row_threads * p.repeats;
    int steps = 0;

    if (at.has_row) {
        const storage_t* const x = input_row(input, at, p);
        const Loader loaded = input_activation.channel(input_channel(at, p));
        const index_t l_first = l_begin * p.stride - p.padding_left;
        const int lead = int(l_first + elements_past_boundary(x)) & (kStorageVec - 1);
        steps = int(ceil_div(p.K + lead, kStorageVec));
        stage_taps(
            taps, weight_row(weight, at, p), p.weight_stride_k, p.K, lead, steps * kStorageVec, at.place, row_threads);
        const int result_step = row_threads / stride_vectors, vector_step = row_threads - result_step * stride_vectors;
        int result = at.place / stride_vectors, vector = at.place - result * stride_vectors;
#pragma unroll 2
        for (int v = at.place; v < p.window; v += row_threads) {
            const index_t l_in = l_first - lead + v * kStorageVec;
            StorageWords* const target = window + (result * pitch + vector);
            const StorageWords* const source = reinterpret_cast<const StorageWords*>(x + l_in);
            if (!is_inside(l_in, l_in + kStorageVec - 1, p.L_in)) {
                *target = load_edge(x, l_in, p.L_in, loaded);
            } else if (kLoadsAsStored) {
                copy_async(target, source);
            } else {
                *target = loaded.vector(*source);
            }
            result += result_step;
            vector += vector_step;
            if (vector >= stride_vectors) {
                vector -= stride_vectors;
                ++result;
            }
        }
    }
    copy_async_wait();
    __syncthreads();
    if (!at.has_row) return;

    const Channel channel = epilogue.channel(at.c_out);
    storage_t* const y = output_row(output, at, p);
#pragma unroll 1
    for (int place = at.place; place < row_threads * int(p.repeats); place += row_threads) {
        const index_t l_out = l_begin + place;
        if (l_out >= p.L_out) return;
        acc_t acc = scalar::zero();
        const StorageWords* next = window + place * pitch;
        const AccVector* tap = reinterpret_cast<const AccVector*>(taps);
        int left = stride_vectors;  // vectors before the next result's first
#pragma unroll (4 / kParts)
        for (int step = 0; step < steps; ++step) {
            const StorageWords positions = *next;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const AccVector term = *tap++;
#pragma unroll
                for (int e = 0; e < kAccVec; ++e) {
                    acc = multiply_add(term.element[e], scalar::load(element_of(positions, part * kAccVec + e)), acc);
                }
            }
            ++next;
            if (--left == 0) {
                left = stride_vectors;
                next += pitch - stride_vectors;
            }
        }
        if (needs_canonical_sum(acc)) acc = sum_again(input, weight, input_activation, l_out, p);
        storage_t* const place_out = y + l_out * p.output_stride_l;
        *place_out = finish(acc, channel, place_out);
    }
}

#else

__device__ __forceinline__ void convolve_rows(
    const storage_t* input, const storage_t* weight, storage_t* output, const Epilogue& epilogue,
    const InputActivation& input_activation, const Params& p) {
    const ThreadRow at = find_row(p, blockIdx.x);
    const int row_threads = int(p.row_threads), stride = int(p.stride), plane_pitch = int(p.plane_pitch);
    const storage_t* const x = input_row(input, at, p);
    const storage_t* const w = weight_row(weight, at, p);
    const Loader loaded = input_activation.channel(input_channel(at, p));
    acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    acc_t* const taps = shared + at.row_in_block * p.taps_pitch;
    acc_t* const window = shared + p.block_rows * p.taps_pitch + at.row_in_block * p.window_pitch;
    const index_t l_begin = at.tile * row_threads * p.repeats * THREAD_L;
    const index_t start = l_begin * stride - p.padding_left;  // position of the window in the row

    if (at.has_row) {
#pragma unroll 1
        for (int k = at.place; k < p.K; k += row_threads) taps[k] = scalar::load(w[k * p.weight_stride_k]);
        const int index_step = row_threads / stride, phase_step = row_threads - index_step * stride;
        int index = at.place / stride, phase = at.place - index * stride;
#pragma unroll 8
        for (int u = at.place; u < p.window; u += row_threads) {
            const Source source = source_index(start + u, p.L_in);
            acc_t* const target = window + (phase * plane_pitch + index);
            if (!source.exists) {
                *target = scalar::zero();
            } else if (kLoadsAsStored) {
                scalar::copy_to_shared(target, x + source.index * p.input_stride_l);
            } else {
                *target = scalar::load(loaded(x[source.index * p.input_stride_l]));
            }
            index += index_step;
            phase += phase_step;
            if (phase >= stride) {
                phase -= stride;
                ++index;
            }
        }
    }
    copy_async_wait();
    __syncthreads();
    if (!at.has_row) return;

    // Tap k reads phase k*dilation % stride; its place advances by the same step from tap to tap, except where the phase wraps.
    const int phase_step = int(p.dilation % stride);
    const int position_step = phase_step * plane_pitch + int(p.dilation / stride);
    const int position_wrap = 1 - stride * plane_pitch;
    const Channel channel = epilogue.channel(at.c_out);
    storage_t* const y = output_row(output, at, p);
    const int places = row_threads * THREAD_L * int(p.repeats);
#pragma unroll 1
    for (int place = at.place; place < places; place += row_threads * THREAD_L) {
        if (l_begin + place >= p.L_out) return;
        acc_t acc[THREAD_L];
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) acc[j] = scalar::zero();
        const acc_t* position = window + place;
        int phase = 0;
#pragma unroll 4
        for (int k = 0; k < p.K; ++k) {
#pragma unroll
            for (int j = 0; j < THREAD_L; ++j) acc[j] = multiply_add(taps[k], position[j * row_threads], acc[j]);
            position += position_step;
            phase += phase_step;
            if (phase >= stride) {
                phase -= stride;
                position += position_wrap;
            }
        }

        bool sum_again = false;
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) {
            const index_t l_out = l_begin + place + j * row_threads;
            if (l_out < p.L_out) {
                storage_t* const place_out = y + l_out * p.output_stride_l;
                *place_out = finish(acc[j], channel, place_out);
            }
            sum_again = sum_again || needs_canonical_sum(acc[j]);
        }
        if (!sum_again) continue;
#pragma unroll 1
        for (int j = 0; j < THREAD_L; ++j) {
            const index_t l_out = l_begin + place + j * row_threads;
            if (l_out >= p.L_out) break;
            storage_t* const place_out = y + l_out * p.output_stride_l;
            *place_out = finish(sum_existing_terms(x, w, loaded, l_out, p), channel, place_out);
        }
    }
}

#endif

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, kMinBlocks) conv1d_depthwise(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, 1, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    convolve_rows(input, weight, output, epilogue, InputActivation(p INPUT_ACTIVATION_VALUES), p);
}
