// conv1d_stem: forward convolution of layers with few input channels a group and many output channels, where the output
// dominates.
//
//   output[n, c_out, l_out] = bias[c_out]
//       + sum over c_in < C_in_g, k < K of weight[c_out, c_in, k] * input[n, g*C_in_g + c_in, l_in],
//   g = c_out / C_out_g,   l_in = l_out*stride - padding_left + k*dilation,   taps outside [0, L_in) left out.
//
// A warp computes THREAD_C output channels of a tile of BLOCK_L = 32*THREAD_L columns, a lane THREAD_L of these columns:
// positions l_begin + lane + j*step_l of samples n_begin + j*step_n, j < THREAD_L. Either step_l is 32 and step_n is 0 (a
// tile is a piece of one sample) or step_l is 0 and step_n is 1 (a tile is 32 positions of THREAD_L samples, for short
// samples). So a warp stores 32 neighbours at a time, whatever the alignment of the row. With IS_CONTIGUOUS = 1 the steps are
// the former and the output is contiguous along l, so that the stores of a row share one address.
//
// The input of a tile is in shared memory as rows (c_in, r), r < row_taps, of row_pitch entries. Entry i of a row holds the
// inputs that tap r multiplies at positions l_begin + i + j*step_l of samples n_begin + j*step_n, j < THREAD_L, so that one load
// gives a lane its THREAD_L operands, and lanes read neighbouring entries for any stride. Taps r, r + row_taps,
// r + 2*row_taps, ... share row r: the operands of tap r + m*row_taps are in entry lane + m*row_advance. This needs
// row_taps*dilation = row_advance*stride, or one tap a row.
//
// The weights pass through shared memory chunk_terms terms (c_in, k) at a time.
//
// Grid x: blocks of channels (fastest), then of tiles, then groups. Grid y and z: 1. Block: warps_c warps along the
// channels by any number along the tiles. A block computes `repeats` rows of tiles, and loads its weights only once if they
// are one chunk. Dynamic shared memory: the offsets of the entries of each term, weights, biases, entries.
// Terms outside the input are multiplied as zeros; canonical_sum.cuh explains what follows from that.
// Takes arrays of any strides, in elements. Chosen for 1 to 4 input channels a group and at least 8 output channels
// a group, or fewer with a stride or a dilation where there are several input channels, if the input of a tile fits in
// shared memory.
//
// Macros read: BLOCK_L, THREAD_C, THREAD_L, IS_CONTIGUOUS, MAX_THREADS, MIN_BLOCKS, and those of common.cuh.

#include "canonical_sum.cuh"
#include "common.cuh"
#include "convolution.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "window.cuh"

struct Params : Convolution {
    index_t N, channel_blocks, tile_blocks, tiles, tiles_of_sample, repeats;
    index_t warps_c, step_n, step_l;
    index_t row_taps, row_advance, row_pitch;
    index_t chunk_terms;
    FUSED_FIELDS WINDOW_FIELDS
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv1d_stem.py");

static_assert(BLOCK_L == 32 * THREAD_L, "a warp's lanes own its columns: gpuconv/families/conv1d_stem.py");
static_assert(THREAD_C % kAccVec == 0, "a thread's weights are whole vectors: gpuconv/families/conv1d_stem.py");

typedef Vector<acc_t, THREAD_L> Entry;
typedef Vector<int> Offsets;

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS) conv1d_stem(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, C_in_g, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warps = blockDim.x / 32, warps_c = int(p.warps_c);
    const int warp_l = warp / warps_c, warp_c = warp - warp_l * warps_c, warps_l = warps / warps_c;
    const int R = int(p.C_in_g * p.K);
    const int K = int(p.K), row_taps = int(p.row_taps), row_pitch = int(p.row_pitch);
    const int chunk_terms = int(p.chunk_terms);
    const int rows = int(p.C_in_g) * row_taps;

    // [chunk_terms], in bytes, rounded up to whole vectors
    int* const smem_offset = reinterpret_cast<int*>(dynamic_shared_memory());
    // [warps_c][chunk_terms][THREAD_C], [warps_c][THREAD_C] and [warps_l][rows][row_pitch]
    AccVector* const smem_weight = reinterpret_cast<AccVector*>(smem_offset + (chunk_terms + 3) / 4 * 4);
    acc_t* const smem_bias = reinterpret_cast<acc_t*>(smem_weight + warps_c * chunk_terms * (THREAD_C / kAccVec));
    Entry* const smem_input = reinterpret_cast<Entry*>(smem_bias + warps_c * THREAD_C);
    Entry* const entries = smem_input + warp_l * rows * row_pitch;  // of this warp's tile
    const unsigned char* const lane_entries = reinterpret_cast<const unsigned char*>(entries + lane);
    const AccVector* const weights = smem_weight + warp_c * chunk_terms * (THREAD_C / kAccVec);  // of its channels

    unsigned block = blockIdx.x;
    const index_t channel_begin = index_t(next_index(block, p.channel_blocks)) * (warps_c * THREAD_C);
    const index_t tile_begin = index_t(next_index(block, p.tile_blocks)) * p.repeats * warps_l + warp_l;
    const index_t g = block;
    const index_t c_begin = channel_begin + warp_c * THREAD_C;  // of the group, like every channel below

    weight += g * p.C_out_g * p.weight_stride_out;                                          // weight[g*C_out_g, 0, 0]
    input += g * p.C_in_g * p.input_stride_c;                                               // input[0, g*C_in_g, 0]
    output += (g * p.C_out_g + c_begin) * p.output_stride_c;                                // output[0, c_begin, 0]

    // Terms r_begin to r_end; eight lanes read neighbouring terms of one channel. A channel behind the last repeats it: its
    // results are not stored.
    const auto load_weights = [&](int r_begin, int r_end) {
#pragma unroll 1
        for (int r = r_begin + lane % 8; r < r_end; r += 8) {
            const int c_in = r / K, k = r - c_in * K;
            const storage_t* const w = weight + (c_in * p.weight_stride_in + k * p.weight_stride_k);
            acc_t* const term = reinterpret_cast<acc_t*>(smem_weight) + (r - r_begin) * THREAD_C;
#pragma unroll 4
            for (int c = warp * 4 + lane / 8; c < warps_c * THREAD_C; c += 4 * warps) {
                term[c / THREAD_C * chunk_terms * THREAD_C + c % THREAD_C] =
                    scalar::load(w[min_index(channel_begin + c, p.C_out_g - 1) * p.weight_stride_out]);
            }
        }
#pragma unroll 1
        for (int r = r_begin + int(threadIdx.x); r < r_end; r += blockDim.x) {
            const int c_in = r / K, k = r - c_in * K, m = k / row_taps;
            const int entry = (c_in * row_taps + (k - m * row_taps)) * row_pitch + m * int(p.row_advance);
            smem_offset[r - r_begin] = entry * int(sizeof(Entry));
        }
    };
#pragma unroll 1
    for (int c = threadIdx.x; c < warps_c * THREAD_C; c += blockDim.x) {
        smem_bias[c] = epilogue.bias_of(g * p.C_out_g + min_index(channel_begin + c, p.C_out_g - 1));
    }

    // From the first of a lane's columns to the others, in elements.
    index_t input_offset[THREAD_L], output_offset[THREAD_L];
#pragma unroll
    for (int j = 0; j < THREAD_L; ++j) {
        input_offset[j] = j * (p.step_n * p.input_stride_n + p.step_l * p.stride * p.input_stride_l);
        output_offset[j] =
            IS_CONTIGUOUS ? 32 * j : j * (p.step_n * p.output_stride_n + p.step_l * p.output_stride_l);
    }

    for (index_t repeat = 0; repeat < p.repeats; ++repeat) {
        const index_t tile = tile_begin + repeat * warps_l;
        const bool exists = tile < p.tiles;
        const index_t tile_row = tile / p.tiles_of_sample;
        const index_t n_begin = tile_row * (p.step_n == 0 ? 1 : THREAD_L);
        const index_t l_begin = (tile - tile_row * p.tiles_of_sample) * (p.step_l == 0 ? 32 : BLOCK_L);
        const index_t first = l_begin * p.stride - p.padding_left;  // l_in of column 0, tap 0

        const index_t last = first + 31 * p.stride + (p.K - 1) * p.dilation;  // of column 31, last tap
        const bool inside = is_inside(first, last + (THREAD_L - 1) * p.step_l * p.stride, p.L_in) &&
                            n_begin + (THREAD_L - 1) * p.step_n < p.N;  // all terms of all columns exist

        if (repeat > 0) __syncthreads();  // all threads have read the entries of the previous tile
        if (exists) {
            for (int row = warp_c; row < rows; row += warps_c) {
                const int c_in = row / row_taps, r = row - c_in * row_taps;
                const index_t row_first = first + r * p.dilation;
                const storage_t* const x = input + (n_begin * p.input_stride_n + c_in * p.input_stride_c);
                Entry* const row_entries = entries + row * row_pitch;
                if (inside) {
                    // A row may have entries behind the last tap's, which nothing reads: they repeat the last.
#pragma unroll 2
                    for (int i = lane; i < row_pitch; i += 32) {
                        const storage_t* const x_entry =
                            x + min_index(row_first + i * p.stride, last) * p.input_stride_l;
                        Entry entry;
#pragma unroll
                        for (int j = 0; j < THREAD_L; ++j) entry.element[j] = scalar::load(x_entry[input_offset[j]]);
                        row_entries[i] = entry;
                    }
                } else {
#pragma unroll 1
                    for (int i = lane; i < row_pitch; i += 32) {
#pragma unroll 1
                        for (int j = 0; j < THREAD_L; ++j) {
                            const Source source = source_index(row_first + (i + j * p.step_l) * p.stride, p.L_in);
                            acc_t value = scalar::zero();
                            if (source.exists && n_begin + j * p.step_n < p.N) {
                                value = scalar::load(
                                    x[j * p.step_n * p.input_stride_n + source.index * p.input_stride_l]);
                            }
                            row_entries[i].element[j] = value;
                        }
                    }
                }
            }
        }

        acc_t acc[THREAD_C][THREAD_L];
#pragma unroll
        for (int c = 0; c < THREAD_C; ++c) {
#pragma unroll
            for (int j = 0; j < THREAD_L; ++j) acc[c][j] = scalar::zero();
        }
        const auto multiply_term = [&](int term, int offset) {
            const Entry x = *reinterpret_cast<const Entry*>(lane_entries + offset);
            AccVector w[THREAD_C / kAccVec];
#pragma unroll
            for (int c = 0; c < THREAD_C / kAccVec; ++c) w[c] = weights[term * (THREAD_C / kAccVec) + c];
#pragma unroll
            for (int c = 0; c < THREAD_C; ++c) {
#pragma unroll
                for (int j = 0; j < THREAD_L; ++j) {
                    acc[c][j] = multiply_add(w[c / kAccVec].element[c % kAccVec], x.element[j], acc[c][j]);
                }
            }
        };

        for (int r_begin = 0; r_begin < R; r_begin += chunk_terms) {
            const int terms = R - r_begin < chunk_terms ? R - r_begin : chunk_terms;
            if (r_begin > 0) __syncthreads();  // all threads have read the previous weights
            if (repeat == 0 || R > chunk_terms) load_weights(r_begin, r_begin + terms);
            __syncthreads();
            if (!exists) continue;
            int term = 0;
#pragma unroll 1
            for (; term + 4 <= terms; term += 4) {
                const Offsets offsets = *reinterpret_cast<const Offsets*>(smem_offset + term);
#pragma unroll
                for (int i = 0; i < 4; ++i) multiply_term(term + i, offsets.element[i]);
            }
#pragma unroll 1
            for (; term < terms; ++term) multiply_term(term, smem_offset[term]);
        }
        if (!exists) continue;

        const index_t l_lane = l_begin + lane;
        bool is_output[THREAD_L];
#pragma unroll
        for (int j = 0; j < THREAD_L; ++j) {
            is_output[j] = l_lane + j * p.step_l < p.L_out && n_begin + j * p.step_n < p.N;
        }
        storage_t* const y_begin = output + (n_begin * p.output_stride_n + l_lane * p.output_stride_l);
        const auto channel_of = [&](int c) {
            return epilogue.channel(
                g * p.C_out_g + min_index(c_begin + c, p.C_out_g - 1), smem_bias[warp_c * THREAD_C + c]);
        };
        if (kIsFused) {
#pragma unroll 1
            for (int c = 0; c < THREAD_C; ++c) {
                const Channel channel = channel_of(c);
                acc_t finished[THREAD_L];
#pragma unroll
                for (int j = 0; j < THREAD_L; ++j) {
                    const bool exists = is_output[j] && c_begin + c < p.C_out_g;
                    const storage_t* const place =
                        exists ? y_begin + (c * p.output_stride_c + output_offset[j]) : nullptr;
                    finished[j] = finish_unrounded(acc[0][j], channel, place);
                }
#pragma unroll
                for (int j = 0; j < THREAD_L; ++j) {
#pragma unroll
                    for (int i = 0; i + 1 < THREAD_C; ++i) acc[i][j] = acc[i + 1][j];
                    acc[THREAD_C - 1][j] = finished[j];
                }
            }
        }
        storage_t* y = y_begin;
#pragma unroll
        for (int c = 0; c < THREAD_C; ++c) {
            if (c_begin + c >= p.C_out_g) break;
            const Channel channel = channel_of(c);
#pragma unroll
            for (int j = 0; j < THREAD_L; ++j) {
                if (!is_output[j]) continue;
                y[output_offset[j]] = kIsFused ? round_finished(acc[c][j]) : finish(acc[c][j], channel, nullptr);
            }
            y += p.output_stride_c;
        }

        if (inside) continue;  // no zero replaced a sample
        bool sum_again = false;
#pragma unroll
        for (int c = 0; c < THREAD_C; ++c) {
#pragma unroll
            for (int j = 0; j < THREAD_L; ++j) sum_again = sum_again || needs_canonical_sum(acc[c][j]);
        }
        if (!sum_again) continue;
#pragma unroll 1
        for (int e = 0; e < THREAD_C * THREAD_L; ++e) {
            const int c = e / THREAD_L, j = e % THREAD_L;
            const index_t n = n_begin + j * p.step_n, l_out = l_lane + j * p.step_l;
            if (c_begin + c >= p.C_out_g || n >= p.N || l_out >= p.L_out) continue;
            const storage_t* const w = weight + (c_begin + c) * p.weight_stride_out;
            const acc_t sum = canonical_sum(
                input + n * p.input_stride_n, l_out * p.stride - p.padding_left, p.dilation, p.K, p,
                RowWeights(w, p.weight_stride_in, p.weight_stride_k));
            storage_t* const place =
                output + (n * p.output_stride_n + c * p.output_stride_c + l_out * p.output_stride_l);
            *place = finish(sum, channel_of(c), place);
        }
    }
}
