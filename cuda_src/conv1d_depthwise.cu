// conv1d_depthwise: forward convolution of layers with one input channel a group (C_in_g = 1), C_out_g outputs each.
//
//   output[n, c_out, l_out] = bias[c_out] + sum over k < K of weight[c_out, 0, k] * input[n, c_out / C_out_g, l_in],
//   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// Grid x: tiles of one row (n, c_out) fastest, then groups of block_rows rows. Grid y and z: 1. Dynamic shared memory: the
// taps of the block's rows, then the windows of the input that they meet, both as accumulators; zeros outside the input.
// Terms outside the input are multiplied as zeros, which changes no bit (see bias_or_zero in common.cuh) unless a
// weight is infinite or NaN; so a thread that meets a NaN computes that result again without them.
//
// SLIDE_STRIDE = 1 or 2: that stride, dilation 1, contiguous along l. A thread holds 2*kVec neighbouring results and slides
// over the taps, kVec taps (of either phase of the stride) at a time: one 16-byte load of window and one of taps for
// 2*kVec*kVec multiply-adds. The tile of each row begins at a 16-byte boundary of its output, so that all stores but
// those at the ends of a row are 16 bytes wide; its window begins at a boundary of the input, and the taps shift by
// `lead` zeros to make up for it. So rows of any alignment move in 16-byte accesses.
// SLIDE_STRIDE = 0: any stride and dilation, arrays of any strides. A thread holds THREAD_L results row_threads apart, so
// that neighbouring threads store neighbouring elements; the window lies in shared memory by its position modulo the
// stride, so that neighbouring threads read neighbouring words whatever the stride. Rows of one input channel share
// its window.
//
// Uses: depthwise.cuh

struct Params {
    index_t N, C_out, L_in, L_out, K;
    index_t C_out_g;
    index_t stride, padding_left, dilation;
    index_t tiles, tiles_magic, tiles_shift;                    // of one row
    index_t row_threads, row_threads_magic, row_threads_shift;  // threads of one row
    index_t channels_magic, channels_shift;                     // to divide by C_out
    index_t block_rows;
    index_t taps_pitch;    // accumulators from one row's taps to the next row's
    index_t window;        // 16-byte vectors (SLIDE_STRIDE > 0) or positions of the window of one tile
    index_t window_pitch;  // from one row's window to the next: vectors of a plane, or accumulators
    index_t plane_pitch;   // from one plane or phase to the next, likewise
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv1d_depthwise.py");

// The result at l_out without the terms that do not exist, as the base family computes it.
__device__ __forceinline__ acc_t sum_existing_terms(
    const storage_t* x, const storage_t* w, index_t l_first, index_t K, index_t dilation, index_t L_in,
    index_t input_stride_l, index_t weight_stride_k) {
    acc_t acc = scalar::zero();
#pragma unroll 1
    for (index_t k = 0; k < K; ++k) {
        const index_t l_in = l_first + k * dilation;
        if (l_in < 0 || l_in >= L_in) continue;
        acc = multiply_add(scalar::load(w[k * weight_stride_k]), scalar::load(x[l_in * input_stride_l]), acc);
    }
    return acc;
}

#if SLIDE_STRIDE > 0

constexpr int kPhases = SLIDE_STRIDE;
constexpr int kTaps = kPhases * kVec;  // of a step
static_assert(THREAD_L == 2 * kVec, "a thread slides over two vectors: gpuconv/families/conv1d_depthwise.py");
static_assert(THREAD_L % kStorageVec == 0, "a thread stores whole vectors: gpuconv/families/conv1d_depthwise.py");
constexpr int kBatch = kPhases * THREAD_L / kStorageVec + 1;  // vectors that a thread loads at a time

// Position u of the window belongs to phase u % kPhases; there vector v of kVec positions lies in plane v % 2, so that
// threads, two vectors apart, read neighbouring vectors.
__device__ __forceinline__ void store_window(acc_t* window, int plane_pitch, int vector, const Vector& value) {
    if (kPhases == 1) {
        reinterpret_cast<Vector*>(window)[(vector & 1) * plane_pitch + (vector >> 1)] = value;
    } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
            const int u = vector * kVec + e;
            const int phase = u % kPhases, within = u / kPhases;
            const int plane = 2 * phase + (within / kVec & 1);
            window[(plane * plane_pitch + within / kVec / 2) * kVec + within % kVec] = value.element[e];
        }
    }
}

__device__ __forceinline__ void convolve_rows(
    const storage_t* __restrict__ input, const storage_t* __restrict__ weight, const storage_t* __restrict__ bias,
    storage_t* __restrict__ output, const Params& p) {
    acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    const int row_threads = int(p.row_threads);
    const int row_in_block = int(divide(threadIdx.x, p.row_threads, p.row_threads_magic, p.row_threads_shift));
    const int place = threadIdx.x - row_in_block * row_threads;  // of this thread within its row
    const index_t row_group = divide(blockIdx.x, p.tiles, p.tiles_magic, p.tiles_shift);
    const index_t tile = index_t(blockIdx.x) - row_group * p.tiles;
    const index_t row = row_group * p.block_rows + row_in_block;
    const index_t n = divide(row, p.C_out, p.channels_magic, p.channels_shift);
    const index_t c_out = row - n * p.C_out;
    const bool has_row = row_in_block < p.block_rows && n < p.N;

    const storage_t* x = input;
    const storage_t* const w = weight + c_out * p.weight_stride_out;  // weight[c_out, 0, 0]
    storage_t* y = output;
    acc_t* const taps = shared + row_in_block * p.taps_pitch;
    acc_t* const window = shared + p.block_rows * p.taps_pitch + row_in_block * p.window_pitch * kVec;
    const int plane_pitch = int(p.plane_pitch);
    index_t l_begin = 0, start = 0;
    int lead = 0, steps = 0;

    if (has_row) {
        const index_t c_in = p.C_out_g == 1 ? c_out : c_out / p.C_out_g;
        x += n * p.input_stride_n + c_in * p.input_stride_c;     // input[n, c_in, 0]
        y += n * p.output_stride_n + c_out * p.output_stride_c;  // output[n, c_out, 0]
        const int past_x = elements_past_boundary(x);
        l_begin = tile * row_threads * THREAD_L - elements_past_boundary(y);
        const index_t l_first = l_begin * kPhases - p.padding_left;
        lead = int(l_first + past_x) & (kVec - 1);
        start = l_first - lead;  // position of the window in the row
        steps = int(ceil_div(p.K + lead, kTaps));

#pragma unroll 1
        for (int k = place; k < steps * kTaps; k += row_threads) {
            const bool exists = k >= lead && k - lead < p.K;
            taps[k] = exists ? scalar::load(w[(k - lead) * p.weight_stride_k]) : scalar::zero();
        }
        const int ahead = int(start + past_x) & (kStorageVec - 1);  // positions of the first 16 bytes before the window
#pragma unroll 1
        for (int first = place; first * kStorageVec < p.window * kVec + ahead; first += kBatch * row_threads) {
            StorageVector loaded[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const index_t l_in = start - ahead + (first + b * row_threads) * kStorageVec;
                if (l_in >= 0 && l_in + kStorageVec <= p.L_in) {
                    loaded[b] = *reinterpret_cast<const StorageVector*>(x + l_in);
                } else {
#pragma unroll
                    for (int e = 0; e < kStorageVec; ++e) {
                        const bool exists = l_in + e >= 0 && l_in + e < p.L_in;
                        loaded[b].element[e] = exists ? x[l_in + e] : scalar::storage_zero();
                    }
                }
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
#pragma unroll
                for (int part = 0; part < kStorageVec / kVec; ++part) {
                    const int u = (first + b * row_threads) * kStorageVec + part * kVec - ahead;
                    if (u < 0 || u >= p.window * kVec) continue;
                    Vector value;
#pragma unroll
                    for (int e = 0; e < kVec; ++e) value.element[e] = scalar::load(loaded[b].element[part * kVec + e]);
                    store_window(window, plane_pitch, u / kVec, value);
                }
            }
        }
    }
    __syncthreads();
    const index_t l_out = l_begin + place * THREAD_L;
    if (!has_row || l_out >= p.L_out) return;

    // Steps whose positions all lie outside the input are left out; the first one is even, as the planes want it.
    const index_t behind = min_index(p.window * kVec, p.L_in - start) - kPhases * THREAD_L * place;
    const index_t before = -start - kPhases * (THREAD_L * place + 3 * kVec - 1);
    int step = before > 0 ? int(before / kTaps) & ~1 : 0;
    const int steps_end = behind > 0 ? int(min_index(steps, ceil_div(behind, kTaps))) : 0;

    acc_t acc[THREAD_L];
#pragma unroll
    for (int j = 0; j < THREAD_L; ++j) acc[j] = scalar::zero();

    if (step < steps_end) {
        const Vector* tap = reinterpret_cast<const Vector*>(taps) + kPhases * step;
        const Vector* even = reinterpret_cast<const Vector*>(window) + (place + step / 2);
        const Vector* odd = even + plane_pitch;
        Vector held[kPhases][3];
#pragma unroll
        for (int phase = 0; phase < kPhases; ++phase) {
            held[phase][0] = even[2 * phase * plane_pitch];
            held[phase][1] = odd[2 * phase * plane_pitch];
        }
        // Of the three vectors held, `oldest` meets the first taps of this step; the next vector replaces the one before it.
        const auto multiply_step = [&](const Vector* next, int ahead, int oldest) {
            Vector term[kPhases];
#pragma unroll
            for (int phase = 0; phase < kPhases; ++phase) {
                held[phase][(oldest + 2) % 3] = next[2 * phase * plane_pitch];
                term[phase] = tap[ahead * kPhases + phase];
            }
#pragma unroll
            for (int t = 0; t < kTaps; ++t) {
                const acc_t weight_t = term[t / kVec].element[t % kVec];
#pragma unroll
                for (int j = 0; j < THREAD_L; ++j) {
                    const int position = j + t / kPhases;
                    const acc_t x_t = held[t % kPhases][(oldest + position / kVec) % 3].element[position % kVec];
                    acc[j] = multiply_add(weight_t, x_t, acc[j]);
                }
            }
        };
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

    bool met_nan = false;
#pragma unroll
    for (int j = 0; j < THREAD_L; ++j) met_nan = met_nan || is_nan(acc[j]);
    const acc_t offset = bias_or_zero(bias, c_out * p.bias_stride);
    if (met_nan) {
#pragma unroll 1
        for (index_t l = max_index(l_out, 0); l < min_index(l_out + THREAD_L, p.L_out); ++l) {
            const acc_t sum =
                sum_existing_terms(x, w, l * kPhases - p.padding_left, p.K, 1, p.L_in, 1, p.weight_stride_k);
            y[l] = scalar::round(add(sum, offset));
        }
    } else if (l_out >= 0 && l_out + THREAD_L <= p.L_out) {
#pragma unroll
        for (int first = 0; first < THREAD_L; first += kStorageVec) {
            StorageVector result;
#pragma unroll
            for (int e = 0; e < kStorageVec; ++e) result.element[e] = scalar::round(add(acc[first + e], offset));
            *reinterpret_cast<StorageVector*>(y + l_out + first) = result;
        }
    } else {
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) {
            if (l_out + j >= 0 && l_out + j < p.L_out) y[l_out + j] = scalar::round(add(acc[j], offset));
        }
    }
}

#else

__device__ __forceinline__ void convolve_rows(
    const storage_t* __restrict__ input, const storage_t* __restrict__ weight, const storage_t* __restrict__ bias,
    storage_t* __restrict__ output, const Params& p) {
    acc_t* const shared = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    const int row_threads = int(p.row_threads);
    const int row_in_block = int(divide(threadIdx.x, p.row_threads, p.row_threads_magic, p.row_threads_shift));
    const int place = threadIdx.x - row_in_block * row_threads;  // of this thread within its row
    const index_t row_group = divide(blockIdx.x, p.tiles, p.tiles_magic, p.tiles_shift);
    const index_t tile = index_t(blockIdx.x) - row_group * p.tiles;
    const index_t first_row = row_group * p.block_rows;
    const index_t row = first_row + row_in_block;
    const index_t n = divide(row, p.C_out, p.channels_magic, p.channels_shift);
    const index_t c_out = row - n * p.C_out;
    const bool has_row = row_in_block < p.block_rows && n < p.N;

    // Rows of the flattened (n, c_in): this thread's, and the first and last of the block.
    const auto input_row_of = [&](index_t r) { return p.C_out_g == 1 ? r : r / p.C_out_g; };
    const index_t first_input_row = input_row_of(first_row);
    const index_t last_input_row = input_row_of(min_index(first_row + p.block_rows, p.N * p.C_out) - 1);
    const index_t C_in = input_row_of(p.C_out);
    const index_t l_begin = tile * row_threads * THREAD_L;
    const index_t start = l_begin * p.stride - p.padding_left;  // position of the window in the row

    const storage_t* const w = weight + c_out * p.weight_stride_out;  // weight[c_out, 0, 0]
    acc_t* const taps = shared + row_in_block * p.taps_pitch;
    acc_t* const windows = shared + p.block_rows * p.taps_pitch;
    if (has_row) {
#pragma unroll 1
        for (index_t k = place; k < p.K; k += row_threads) taps[k] = scalar::load(w[k * p.weight_stride_k]);
    }
    // Rows with windows of their own stage them each with its own threads; a shared window is staged by the whole block.
    const bool shares = p.C_out_g > 1;
    const int stagers = shares ? int(blockDim.x) : row_threads;
    const index_t stage_begin = shares ? first_input_row : first_input_row + row_in_block;
    const index_t stage_end = shares ? last_input_row + 1 : stage_begin + has_row;
    const int index_step = stagers / int(p.stride), phase_step = stagers - index_step * int(p.stride);
    const int u_begin = shares ? int(threadIdx.x) : place;
    const int index_begin = u_begin / int(p.stride);
#pragma unroll 1
    for (index_t input_row = stage_begin; input_row < stage_end; ++input_row) {
        const index_t n_staged = input_row / C_in;
        const storage_t* const x =
            input + n_staged * p.input_stride_n + (input_row - n_staged * C_in) * p.input_stride_c;
        acc_t* const window = windows + (input_row - first_input_row) * p.window_pitch;
        int index = index_begin, phase = u_begin - index_begin * int(p.stride);
#pragma unroll 4
        for (int u = u_begin; u < p.window; u += stagers) {
            const index_t l_in = start + u;
            const bool exists = l_in >= 0 && l_in < p.L_in;
            window[phase * int(p.plane_pitch) + index] =
                exists ? scalar::load(x[l_in * p.input_stride_l]) : scalar::zero();
            index += index_step;
            phase += phase_step;
            if (phase >= p.stride) {
                phase -= int(p.stride);
                ++index;
            }
        }
    }
    __syncthreads();
    if (!has_row || l_begin + place >= p.L_out) return;

    const index_t input_row = input_row_of(row);
    const acc_t* const window = windows + (input_row - first_input_row) * p.window_pitch + place;
    acc_t acc[THREAD_L];
#pragma unroll
    for (int j = 0; j < THREAD_L; ++j) acc[j] = scalar::zero();
    if (p.stride == 1) {
        const acc_t* position = window;
#pragma unroll 4
        for (int k = 0; k < p.K; ++k, position += int(p.dilation)) {
#pragma unroll
            for (int j = 0; j < THREAD_L; ++j) acc[j] = multiply_add(taps[k], position[j * row_threads], acc[j]);
        }
    } else {
        // Tap k meets phase k*dilation % stride; its offset grows by the same from tap to tap, but where the phase wraps.
        const int step = int(p.dilation % p.stride);
        const int offset_step = step * int(p.plane_pitch) + int(p.dilation / p.stride);
        const int offset_wrap = offset_step + 1 - int(p.stride * p.plane_pitch);
        const acc_t* position = window;
        int phase = 0;
#pragma unroll 4
        for (int k = 0; k < p.K; ++k) {
#pragma unroll
            for (int j = 0; j < THREAD_L; ++j) acc[j] = multiply_add(taps[k], position[j * row_threads], acc[j]);
            phase += step;
            const bool wraps = phase >= p.stride;
            position += wraps ? offset_wrap : offset_step;
            if (wraps) phase -= int(p.stride);
        }
    }

    const acc_t bias_c = bias_or_zero(bias, c_out * p.bias_stride);
    storage_t* const y = output + n * p.output_stride_n + c_out * p.output_stride_c;  // output[n, c_out, 0]
    bool met_nan = false;
#pragma unroll
    for (int j = 0; j < THREAD_L; ++j) {
        const index_t l_out = l_begin + place + j * row_threads;
        if (l_out < p.L_out) y[l_out * p.output_stride_l] = scalar::round(add(acc[j], bias_c));
        met_nan = met_nan || is_nan(acc[j]);
    }
    if (!met_nan) return;
    const storage_t* const x = input + n * p.input_stride_n + (input_row - n * C_in) * p.input_stride_c;
#pragma unroll 1
    for (int j = 0; j < THREAD_L; ++j) {
        const index_t l_out = l_begin + place + j * row_threads;
        if (l_out >= p.L_out) break;
        const acc_t sum = sum_existing_terms(
            x, w, l_out * p.stride - p.padding_left, p.K, p.dilation, p.L_in, p.input_stride_l, p.weight_stride_k);
        y[l_out * p.output_stride_l] = scalar::round(add(sum, bias_c));
    }
}

#endif

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, MIN_BLOCKS) conv1d_depthwise(
    const storage_t* __restrict__ input,   // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, 1, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    const Params p) {
    convolve_rows(input, weight, bias, output, p);
}
