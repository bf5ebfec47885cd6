// conv_transpose1d_depthwise: transposed convolution of layers with one input channel a group (C_in_g = 1), C_out_g
// outputs each.
//
//   output[n, c_out, l_out] = bias[c_out] + sum over k < K of weight[c_in, c_out % C_out_g, k] * input[n, c_in, l_in],
//   c_in = c_out / C_out_g,   l_in*stride = l_out + padding_left - k*dilation,   taps without such an l_in left out.
//
// Grid x: tiles of one row (n, c_out) fastest, then groups of block_rows rows. Grid y and z: 1.
//
// SLIDE_STRIDE = 1 or 2: that stride, dilation 1, input and output contiguous along l. Sliding threads, which go down the
// window as the taps go up: with l_out + padding_left = q*stride + phase, tap phase + i*stride meets l_in = q - i. A
// thread's results are THREAD_L/stride values of q in every phase; a step takes kAccVec taps of every phase, one 16-byte
// load of window and one of taps of each phase for THREAD_L*kAccVec multiply-adds. Dynamic shared memory: the taps of the
// block's rows, then the windows of the input that they meet.
// IS_SKIPPING = 1, SLIDE_STRIDE = 0: stride 1, any dilation, input and output contiguous along l. Skipping threads, with the
// same shared memory behind a buffer for each warp, through which its results pass.
// Neither: any stride and dilation, arrays of any strides. A thread sums THREAD_L results row_threads apart, one
// after the other, visits only the taps of their phases (one_result.cuh) and reads the input, which `stride` results share,
// through the cache.
//
// Chosen for fewer than 8 output channels a group.

#include "common.cuh"
#include "depthwise.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "input.cuh"
#include "window.cuh"

struct Params {
    index_t N, C_out, L_in, L_out, K;
    index_t C_out_g;
    index_t stride, stride_magic, stride_shift;
    index_t padding_left, dilation;
    index_t phase_gcd, tap_step, position_step, phase_inverse;  // as in one_result.cuh
    index_t tiles, tiles_magic, tiles_shift;                    // of one row
    index_t row_threads, row_threads_magic, row_threads_shift;  // threads of one row
    index_t block_rows, repeats;
    index_t C_out_magic, C_out_shift;
    index_t taps_pitch;    // accumulators from one row's taps to the next row's
    index_t window;        // of one tile, in 16-byte vectors
    index_t window_below;  // of these, vectors below the first thread's
    index_t window_pitch;  // vectors of a plane from one row's window to the next
    index_t plane_pitch;   // vectors from one plane to the next
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_in, weight_stride_out, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv_depthwise.py");

// weight[c_in, c_out % C_out_g, 0] of a thread's row.
__device__ __forceinline__ const storage_t* weight_row(const storage_t* weight, const ThreadRow& at, const Params& p) {
    const index_t c_in = p.C_out_g == 1 ? at.c_out : at.c_out / p.C_out_g;
    return weight + c_in * p.weight_stride_in + (at.c_out - c_in * p.C_out_g) * p.weight_stride_out;
}

// The sum at l_out over the existing taps of its phase, in the canonical order. Used for all results where threads neither
// slide nor skip, otherwise as the NaN fallback.
__device__ __forceinline__ acc_t sum_existing_terms(
    const storage_t* x, const storage_t* w, const Loader& loaded, index_t l_out, const Params& p) {
    acc_t acc = scalar::zero();
    const index_t t = l_out + p.padding_left;
    index_t k, l_in;
    if (p.dilation == 1) {
        l_in = divide(t, p.stride, p.stride_magic, p.stride_shift);
        k = t - l_in * p.stride;
    } else {
        const index_t t_gcd = t / p.phase_gcd;
        if (t_gcd * p.phase_gcd != t) return acc;
        k = t_gcd % p.tap_step * p.phase_inverse % p.tap_step;
        l_in = (t - k * p.dilation) / p.stride;  // exact, perhaps negative
    }
#pragma unroll 4
    for (; k < p.K && exists_down(l_in); k += p.tap_step, l_in -= p.position_step) {
        const Source source = source_index(l_in, p.L_in);
        if (!source.exists) continue;
        const storage_t value = x[source.index * p.input_stride_l];
        acc = multiply_add(scalar::load(w[k * p.weight_stride_k]), scalar::load(loaded(value)), acc);
    }
    return acc;
}

#if SLIDE_STRIDE > 0

constexpr int kThreadVecs = THREAD_L / kPhases / kAccVec;  // vectors of q that a thread holds
constexpr int kHeld = kThreadVecs + 1;
static_assert(kThreadVecs == 1 || kThreadVecs == 2, "a thread holds one or two vectors of positions");

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
    int steps = 0;

    if (at.has_row) {
        const storage_t* const x = input_row(input, at, p);
        const storage_t* const w = weight_row(weight, at, p);
        l_begin = at.tile * row_threads * p.repeats * THREAD_L - elements_past_boundary(y);
        // With `lead` zeros before the taps the tile begins with phase 0, and its q at a boundary of the input.
        const index_t t = l_begin + p.padding_left;
        const int lead = int(-(t + kPhases * elements_past_boundary(x))) & (kTaps - 1);
        start = (t + lead) / kPhases - p.window_below * kAccVec;
        steps = int(ceil_div(p.K + lead, kTaps));
        stage_taps(taps, w, p.weight_stride_k, p.K, lead, steps * kTaps, at.place, row_threads);
        const int ahead = elements_ahead(x, start);
        stage_window(
            x, p.L_in, input_activation.channel(input_channel(at, p)), start, ahead, int(p.window), at.place, row_threads,
            WindowTarget<kThreadVecs>(window, plane_pitch, ahead));
    }
    __syncthreads();
    if (!at.has_row) return;

    const Channel channel = epilogue.channel(at.c_out);
#pragma unroll 1
    for (int place = at.place; place < row_threads * int(p.repeats); place += row_threads) {
        const index_t l_out = l_begin + place * THREAD_L;
        if (l_out >= p.L_out) return;

        // In step s the thread's q - i are in vectors lowest - s - 1 to lowest - s + kThreadVecs - 1 of the window. If there
        // are many steps, those whose positions are all outside the input are skipped; the first step is even, as the planes
        // require.
        const int lowest = int(p.window_below) + kThreadVecs * place;
        int step = 0, steps_end = steps;
        if (kIsEmptyOutside && steps > kFewSteps) {
            const index_t behind = min_index(p.L_in - start, p.window * kAccVec);  // the position behind the input's last
            const index_t before = max_index(-start, 0);                       // the input's first
            step = int(max_index(lowest - 1 - ceil_div(max_index(behind, 0), kAccVec), 0)) & ~1;
            steps_end = behind > 0 ? int(min_index(steps, lowest + kThreadVecs - before / kAccVec)) : 0;
        }

        acc_t acc[THREAD_L];
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) acc[j] = scalar::zero();
        if (step < steps_end) {
            const AccVector* tap = reinterpret_cast<const AccVector*>(taps) + kPhases * step;
            const AccVector* next = window + (lowest - step) / kThreadVecs;  // lowest - step is a multiple of kThreadVecs
            AccVector held[kHeld];
#pragma unroll
            for (int v = 0; v < kThreadVecs; ++v) held[v] = next[v * plane_pitch];
            // Of the vectors held, `first` has the position of the thread's first q for the step's first tap; the step loads
            // the vector below it.
            const auto multiply_step = [&](int index, int first) {
                const int below = (first + kHeld - 1) % kHeld;
                held[below] = kThreadVecs == 1 ? next[-1 - index]
                                               : next[(index + 1) % 2 * plane_pitch - (index + 2) / 2];
                AccVector term[kPhases];
#pragma unroll
                for (int phase = 0; phase < kPhases; ++phase) term[phase] = tap[index * kPhases + phase];
#pragma unroll
                for (int t = 0; t < kTaps; ++t) {
#pragma unroll
                    for (int j = t % kPhases; j < THREAD_L; j += kPhases) {
                        const int position = j / kPhases - t / kPhases + kAccVec;  // from the beginning of the vector below
                        acc[j] = multiply_add(
                            term[t / kAccVec].element[t % kAccVec],
                            held[(below + position / kAccVec) % kHeld].element[position % kAccVec], acc[j]);
                    }
                }
            };
#pragma unroll 1
            for (int left = steps_end - step;; left -= 6) {
                multiply_step(0, 0);
                if (left == 1) break;
                multiply_step(1, (5 * kHeld - 1) % kHeld);
                if (left == 2) break;
                multiply_step(2, (5 * kHeld - 2) % kHeld);
                if (left == 3) break;
                multiply_step(3, (5 * kHeld - 3) % kHeld);
                if (left == 4) break;
                multiply_step(4, (5 * kHeld - 4) % kHeld);
                if (left == 5) break;
                multiply_step(5, (5 * kHeld - 5) % kHeld);
                if (left == 6) break;
                next -= 6 / kThreadVecs;
                tap += 6 * kPhases;
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
    convolve_skipping(input, weight, output, epilogue, input_activation, p.padding_left, -int(p.dilation), p);
}

#else

__device__ __forceinline__ void convolve_rows(
    const storage_t* input, const storage_t* weight, storage_t* output, const Epilogue& epilogue,
    const InputActivation& input_activation, const Params& p) {
    const ThreadRow at = find_row(p, blockIdx.x);
    if (!at.has_row) return;
    const storage_t* const x = input_row(input, at, p);
    const storage_t* const w = weight_row(weight, at, p);
    storage_t* const y = output_row(output, at, p);
    const Loader loaded = input_activation.channel(input_channel(at, p));
    const Channel channel = epilogue.channel(at.c_out);
    const int results = THREAD_L * int(p.repeats);
    index_t l_out = at.tile * p.row_threads * results + at.place;
#pragma unroll 1
    for (int j = 0; j < results && l_out < p.L_out; ++j, l_out += p.row_threads) {
        storage_t* const place = y + l_out * p.output_stride_l;
        *place = finish(sum_existing_terms(x, w, loaded, l_out, p), channel, place);
    }
}

#endif

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, kMinBlocks) conv_transpose1d_depthwise(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_in, C_out_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    convolve_rows(input, weight, output, epilogue, InputActivation(p INPUT_ACTIVATION_VALUES), p);
}
