// conv1d_toeplitz: forward convolution of layers with one input channel a group and many taps, stride 1 and dilation 1, on
// tensor cores.
//
//   output[n, c_out, l_out] = bias[c_out] + sum over k < K of weight[c_out, 0, k] * input[n, c_out / C_out_g, l_in],
//   l_in = l_out - padding_left + k,   taps outside [0, L_in) left out.
//
// The taps are taken in blocks of kBlock, the depth of an mma; zeros fill up the last one. A tile is 128 neighbouring
// results y(16*c + i), i < 16, c < 8, of a row (n, c_out), and a product of matrices: with x(0) the input that y(0)
// multiplies with the first tap,
//
//   y[i][c] = sum over q of A_q[i][k] * B_q[k][c],   A_q[i][k] = x(kBlock*q + i + k),   B_q[.][c] = block q - kShift*c of
//
// the taps, kShift = 16 / kBlock, with zeros for blocks that do not exist. Each result is the sum of its blocks in
// ascending order, and blocks of zeros add nothing, so its bits do not depend on its position. (If the taps moved by one from
// column to column instead of by whole blocks, there would be fewer zeros, but neighbouring results would cut the taps into
// different blocks.)
//
// A warp works by itself on `groups` times WARP_TILES tiles of one row. It stages their inputs; if a word holds two elements,
// it stages two copies, one for each alignment, so that a lane's operands are always whole words. Consecutive blocks share
// words, so an mma loads only two of its words from shared memory.
//
// An input that is not finite gives a NaN in all results whose blocks of zeros multiply it. A warp that gets a NaN therefore
// computes its tiles again column by column, only with the column's own blocks and taps. Results that are still not finite are
// computed again by canonical_sum.
//
// Grid x: blocks of BLOCK_SIZE/32 warps, which take the segments of a row (fastest), then rows. Grid y and z: 1. Dynamic
// shared memory: for each warp the inputs, the results on their way to memory, and the blocks of taps.
// Takes arrays of any strides, in elements. Chosen for many taps and fewer than 8 output channels a group; see
// gpuconv/families/conv1d_toeplitz.py.
//
// Macros read: BLOCK_SIZE, MIN_BLOCKS, WARP_TILES, MULTIPLY_MATRICES, and those of common.cuh.

#include "canonical_sum.cuh"
#include "common.cuh"
#include "edge.cuh"
#include "finish.cuh"
#include "samples.cuh"
#include "tf32.cuh"
#include "window.cuh"

struct Params {
    index_t N, C_out, L_in, L_out, K;
    index_t C_out_g;
    index_t padding_left;
    index_t segments, groups;  // of a row; of WARP_TILES tiles in a segment
    index_t tap_blocks;
    index_t window;            // vectors of input that a warp stages
    index_t warp_vectors;      // of shared memory
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
    FUSED_FIELDS WINDOW_FIELDS
    static constexpr int C_in_g = 1;  // for canonical_sum
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/conv1d_toeplitz.py");

constexpr int kColumns = 8, kRows = 16, kTile = kRows * kColumns;
constexpr int kUnit = kStorageVec;
constexpr int kWord = 4 / int(sizeof(storage_t));  // elements of a word
constexpr int kBlock = 2 * kUnit;
constexpr int kBlockWords = 8;
constexpr int kShift = kRows / kBlock;
// Words from one block of taps to the next, chosen so that the columns of a B_q are in different banks.
constexpr int kTapPitch = kShift == 1 ? 12 : 10;
constexpr int kTileWords = kTile / kWord;
constexpr int kResults = WARP_TILES * kTile;
// Results pass through shared memory with gaps, so that the lanes that hold them write different banks.
constexpr int kGapEvery = 32, kGap = 8;
constexpr int kBufferVectors = kResults / kGapEvery * (kGapEvery + kGap) / kUnit;

// A word of an operand that begins with element `first`, with its elements from `left` on replaced by zeros.
__device__ __forceinline__ unsigned without_tail(unsigned word, int first, int left) {
    if (kWord == 1) return first < left ? word : 0;
    return first + 1 < left ? word : first < left ? word & 0xffffu : 0;
}

// The sums of neighbouring tiles over q_begin <= q < q_end; `x` and `taps` are those of the lane. kIsLastCut: of the last
// block only the first `left` taps count, whatever the inputs of the others.
template <int kTiles, bool kIsLastCut>
__device__ __forceinline__ void multiply_tiles(
    const unsigned* x, const unsigned* taps, int q_begin, int q_end, int left, acc_t (&acc)[kTiles][4]) {
    const int t = threadIdx.x % 4;
    unsigned held[kTiles][2];  // words that the previous block has loaded and the next one needs
    x += q_begin * kBlockWords;
    taps += q_begin * kTapPitch;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        held[tile][0] = x[tile * kTileWords];
        held[tile][1] = x[tile * kTileWords + 4];
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[tile][e] = 0.0f;
    }
#pragma unroll (kIsLastCut ? 1 : 2)
    for (int q = q_begin; q < q_end; ++q) {
        const unsigned b[2] = {taps[0], taps[4]};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const unsigned third = x[tile * kTileWords + 8];
            const unsigned fourth = x[tile * kTileWords + 12];
            // Rows g and g + 8 of the first half of the block, and of the second.
            unsigned a[4] = {
                held[tile][0], kWord == 1 ? third : held[tile][1], held[tile][1], kWord == 1 ? fourth : third};
            if (kIsLastCut && q + 1 == q_end) {
#pragma unroll
                for (int i = 0; i < 4; ++i) a[i] = without_tail(a[i], t * kWord + i / 2 * kUnit, left);
            }
            held[tile][0] = third;
            held[tile][1] = fourth;
            MULTIPLY_MATRICES(acc[tile], a, b);
        }
        x += kBlockWords;
        taps += kTapPitch;
    }
}

// The place of result l of a warp's tiles in its buffer.
__device__ __forceinline__ int buffered(int l) { return l + l / kGapEvery * kGap; }

// Puts a lane's sums of a tile into the buffer, or those of one column where `column` is not negative. place_of(l) is where
// result l of the tile belongs in the output.
template <typename PlaceOf>
__device__ __forceinline__ void buffer_sums(
    const acc_t (&acc)[4], storage_t* results, const Channel& channel, int column, acc_t* check,
    const PlaceOf& place_of) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        if (column >= 0 && column != 2 * t + e % 2) continue;
        const int in_columns = g + e % 2 * kRows + e / 2 * 8;
        acc_t sum = acc[e], bias = channel.bias;
        if (kIsFused) {
            const acc_t value = add_addends(sum, channel, place_of(t * 2 * kRows + in_columns));
            sum = activate(multiply_add(scalar::zero(), value, value), channel);
            bias = scalar::zero();
        }
        results[t * buffered(2 * kRows) + in_columns] = finish_or_nan(sum, bias, check);
    }
}

// Stages `count` vectors of a row from position `first` on, where two elements make a word in two copies: the second begins
// with the element behind the first one.
__device__ __forceinline__ void stage_inputs(
    const storage_t* x, index_t first, int count, bool is_aligned, StorageVector* window, const Extents& sample,
    const Params& p) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int v = lane; v < count; v += 32) {
        const index_t position = first + v * kUnit;
        storage_t element[kUnit + 1];
        if (is_aligned && is_inside(position, position + kUnit - 1, sample.L_in)) {
            const StorageVector vector = *reinterpret_cast<const StorageVector*>(x + position);
#pragma unroll
            for (int e = 0; e < kUnit; ++e) element[e] = vector.element[e];
        } else {
#pragma unroll
            for (int e = 0; e < kUnit; ++e) {
                const Source source = source_index(position + e, sample.L_in);
                element[e] = source.exists ? x[source.index * p.input_stride_l] : scalar::storage_zero();
            }
        }
        StorageVector vector;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
            vector.element[e] = kWord == 1 ? storage_t(round_to_tf32(float(element[e]))) : element[e];
        }
        window[v] = vector;
        if (kWord == 1) continue;
        const Source source = source_index(position + kUnit, sample.L_in);
        element[kUnit] = source.exists ? x[source.index * p.input_stride_l] : scalar::storage_zero();
#pragma unroll
        for (int e = 0; e < kUnit; ++e) vector.element[e] = element[e + 1];
        window[count + v] = vector;
    }
}

// Stages the blocks of taps that exist, with zeros before and behind them; true where one of a lane's is not finite.
__device__ __forceinline__ bool stage_taps(const storage_t* w, unsigned* taps, const Params& p) {
    const int lane = threadIdx.x % 32;
    bool is_special = false;
#pragma unroll 1
    for (int i = lane; i < int(p.tap_blocks + 14 * kShift) * kBlockWords; i += 32) {
        const int block = i / kBlockWords, word = i % kBlockWords;
        const int tap = (block - 7 * kShift) * kBlock + word * kWord;
        Vector<storage_t, kWord> pair;
#pragma unroll
        for (int e = 0; e < kWord; ++e) {
            storage_t value = is_index(tap + e, p.K) ? w[(tap + e) * p.weight_stride_k] : scalar::storage_zero();
            if (kWord == 1) value = storage_t(round_to_finite_tf32(float(value)));
            pair.element[e] = value;
            const acc_t wide = scalar::load(value);
            is_special = is_special || is_nan(multiply_add(scalar::zero(), wide, scalar::zero()));
        }
        taps[block * kTapPitch + word] = *reinterpret_cast<const unsigned*>(&pair);
    }
    return is_special;
}

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, MIN_BLOCKS) conv1d_toeplitz(
    INPUT_ARGUMENT  // [N, C_in, L_in]
    const storage_t* __restrict__ weight,  // [C_out, 1, K]
    const storage_t* __restrict__ bias,    // [C_out], or null
    storage_t* __restrict__ output,        // [N, C_out, L_out]
    SAMPLES_ARGUMENT FUSED_ARGUMENTS WINDOW_ARGUMENTS const Params p) {
    const Epilogue epilogue(bias, output, p FUSED_VALUES);
    MOVE_WINDOW
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const index_t warp_of_all = index_t(blockIdx.x) * (BLOCK_SIZE / 32) + warp;
    const index_t row = warp_of_all / p.segments, segment = warp_of_all - row * p.segments;
    const index_t n = row / p.C_out, c_out = row - n * p.C_out;
    if (n >= p.N) return;
    const Extents sample = extents_of(n, p SAMPLES_VALUE);

    // Of this warp: the inputs, the results on their way to memory, the blocks of taps.
    StorageVector* const window = reinterpret_cast<StorageVector*>(dynamic_shared_memory()) + warp * p.warp_vectors;
    StorageVector* const buffer = window + kWord * p.window;
    unsigned* const taps = reinterpret_cast<unsigned*>(buffer + kBufferVectors);
    storage_t* const results = reinterpret_cast<storage_t*>(buffer);

    input += n * p.input_stride_n + c_out / p.C_out_g * p.input_stride_c;
    weight += c_out * p.weight_stride_out;
    output += n * p.output_stride_n + c_out * p.output_stride_c;
    const Channel channel = epilogue.channel(c_out);

    const index_t l_begin = segment * p.groups * kResults;
    const bool is_row = p.input_stride_l == 1;
    const index_t first = l_begin - p.padding_left;  // l_in of the first result's first tap
    const int ahead = is_row ? int(first + elements_past_boundary(input)) & (kUnit - 1) : 0;
    stage_inputs(input, first - ahead, int(p.window), is_row, window, sample, p);
    const bool has_special_taps = any_lane(stage_taps(weight, taps, p));
    __syncwarp();

    const int offset = ahead + g + t * kWord;
    const unsigned* const my_window = reinterpret_cast<const unsigned*>(window) +
        (offset % kWord * int(p.window) * 4 + offset / kWord);
    const unsigned* const my_taps = taps + ((7 - g) * kShift * kTapPitch + t);
    const int tap_blocks = int(p.tap_blocks), left = int(p.K) - (tap_blocks - 1) * kBlock;

#pragma unroll 1
    for (int group = 0; group < p.groups; ++group) {
        const index_t l_first = l_begin + group * kResults;
        if (l_first >= sample.L_out) return;
        const int count = int(min_index(kResults, sample.L_out - l_first));
        const unsigned* const x = my_window + group * (kResults / kWord);
        // Blocks that multiply no sample are skipped if all taps are finite, so that their products would be zeros.
        int q_begin = 0, q_end = tap_blocks + 7 * kShift;
        if (kIsEmptyOutside && !has_special_taps) {
            const index_t position = l_first - p.padding_left;
            const index_t last = position + (kBlock + kRows - 2 + kResults - kTile);  // of the first block and all tiles
            q_begin = int(min_index(existing_range(last, kBlock, q_end, sample.L_in).begin, q_end));
            q_end = int(existing_range(position, kBlock, q_end, sample.L_in).end);
        }

        storage_t* const y = output + l_first * p.output_stride_l;
        const auto place_of = [&](int l) { return kHasResidual && l < count ? y + l * p.output_stride_l : nullptr; };
        acc_t acc[WARP_TILES][4];
        acc_t check = scalar::zero();
        multiply_tiles<WARP_TILES, false>(x, my_taps, q_begin, q_end, kBlock, acc);
#pragma unroll
        for (int tile = 0; tile < WARP_TILES; ++tile) {
            buffer_sums(
                acc[tile], results + tile * buffered(kTile), channel, -1, &check,
                [&](int l) { return place_of(tile * kTile + l); });
        }
        if (NAN_FALLBACK && any_lane(is_nan(check))) {
#pragma unroll 1
            for (int i = 0; i < WARP_TILES * kColumns; ++i) {
                const int tile = i / kColumns, column = i % kColumns;
                acc_t alone[1][4];
                multiply_tiles<1, true>(
                    x + tile * kTileWords, my_taps, column * kShift, column * kShift + tap_blocks, left, alone);
                buffer_sums(
                    alone[0], results + tile * buffered(kTile), channel, column, &check,
                    [&](int l) { return place_of(tile * kTile + l); });
            }
            __syncwarp();
            Params own = p;  // of this sample
            own.L_in = sample.L_in;
#pragma unroll 1
            for (int l = lane; l < count; l += 32) {
                if (!is_nan(scalar::load(results[buffered(l)]))) continue;
                const acc_t sum = canonical_sum(
                    input, l_first + l - p.padding_left, 1, p.K, own, RowWeights(weight, 0, p.weight_stride_k));
                results[buffered(l)] = finish(sum, channel, place_of(l));
            }
        }
        __syncwarp();

        if (p.output_stride_l == 1) {
            const int skew = elements_past_boundary(y);
#pragma unroll 1
            for (int l = lane * kUnit - skew; l < count; l += 32 * kUnit) {
                if (l >= 0 && l + kUnit <= count) {
                    StorageVector vector;
                    if (skew == 0) {
                        vector = *reinterpret_cast<const StorageVector*>(results + buffered(l));
                    } else {
#pragma unroll
                        for (int e = 0; e < kUnit; ++e) vector.element[e] = results[buffered(l + e)];
                    }
                    *reinterpret_cast<StorageVector*>(y + l) = vector;
                } else {
#pragma unroll 1
                    for (int e = l < 0 ? -l : 0; e < kUnit && l + e < count; ++e) y[l + e] = results[buffered(l + e)];
                }
            }
        } else {
#pragma unroll 1
            for (int l = lane; l < count; l += 32) y[l * p.output_stride_l] = results[buffered(l)];
        }
        __syncwarp();  // the buffer is read
    }
}
