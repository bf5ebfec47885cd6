// weight_gradient_tiled: gradient of the weights of dense and grouped layers by register tiles.
//
//   grad_weight[r, c, k] = sum over n < N, l < L_coarse of coarse[n, r, l] * conj(fine[n, g*C_fine_g + c, l_fine]),
//   g = r / C_coarse_g,   l_fine = l*stride - padding_left + k*dilation,   terms outside [0, L_fine) left out;
//   the conjugate of that where is_conjugated.
//
// Per group and slice (slices.cuh) a product of a matrix [r, (n, l)] and one [(n, l), (c, k)], by the tiles of
// register_tile.cuh: rows r, columns c*K + k, terms (n, l). Eight neighbouring threads load neighbouring positions of one
// row or column, so that they read along l; rows of shared memory are one vector longer than the tile, so that these
// threads, and the four rows of a warp, store to different banks. Taps of one channel read the same positions again, from
// the L1 cache.
// Terms outside fine are multiplied as zeros; canonical_sum.cuh explains what follows from that.
//
// Grid x: blocks of BLOCK_M rows (fastest, so that blocks with the same window of fine run together), then of BLOCK_N
// columns, then groups, then slices. Grid y and z: 1. Dynamic shared memory: SHARED_BYTES.
// With several slices their sums are stored in `partial` and sum_slices.cu follows; with one slice `partial` is null.
// Takes arrays of any strides, in elements. Chosen for at least 4 rows and 4 columns a group.

#include "common.cuh"
#include "edge.cuh"
#include "register_tile.cuh"
#include "slices.cuh"

struct Params {
    index_t N, L_coarse, L_fine, K;
    index_t C_coarse, C_coarse_g, C_fine_g;
    index_t row_tiles, column_tiles, groups;
    index_t stride, padding_left, dilation;
    index_t slice_samples, slice_positions, slice_pieces;
    index_t is_conjugated;
    // How a thread's position l and its addresses advance by kLoadPositions positions; the addresses by `carry` more where l
    // passes the end of a sample.
    index_t step_l, coarse_advance, coarse_carry, fine_advance, fine_carry;
    index_t coarse_stride_n, coarse_stride_c, coarse_stride_l;
    index_t fine_stride_n, fine_stride_c, fine_stride_l;
    index_t weight_stride_r, weight_stride_c, weight_stride_k;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/weight_gradient_tiled.py");

constexpr int kPitchM = BLOCK_M + kAccVec, kPitchN = BLOCK_N + kAccVec;  // operands of one term in shared memory
constexpr int kLoadPositions = 8;
constexpr int kLoadRows = kThreads / kLoadPositions;  // rows or columns that the block loads at a time
constexpr int kMyRows = BLOCK_M / kLoadRows, kMyColumns = BLOCK_N / kLoadRows;
constexpr int kBuffers = 2 * BLOCK_R * (kPitchM + kPitchN);
constexpr int kSums = kBuffers > kWarps * kSlice ? kBuffers : kWarps * kSlice;
static_assert(BLOCK_R % kLoadPositions == 0, "chunks are whole loads: gpuconv/families/weight_gradient_tiled.py");
static_assert(kMyRows * kLoadRows == BLOCK_M && kMyColumns * kLoadRows == BLOCK_N,
              "tiles are whole loads: gpuconv/families/weight_gradient_tiled.py");
static_assert(
    kSums * sizeof(acc_t) + BLOCK_N * sizeof(index_t) == SHARED_BYTES,
    "SHARED_BYTES differs from gpuconv/families/weight_gradient_tiled.py");

// What a block computes. Rows and columns are those of the group.
struct Tile {
    index_t slice, row_begin, column_begin, channel, fine_channel;  // the first channels of the group
};

__device__ __forceinline__ Tile find_tile(index_t block, const Params& p) {
    const index_t column_block = block / p.row_tiles;
    const index_t group_block = column_block / p.column_tiles;
    Tile tile;
    tile.slice = group_block / p.groups;
    const index_t g = group_block - tile.slice * p.groups;
    tile.row_begin = (block - column_block * p.row_tiles) * BLOCK_M;
    tile.column_begin = (column_block - group_block * p.column_tiles) * BLOCK_N;
    tile.channel = g * p.C_coarse_g;
    tile.fine_channel = g * p.C_fine_g;
    return tile;
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) weight_gradient_tiled(
    const storage_t* __restrict__ coarse,  // [N, C_coarse, L_coarse]
    const storage_t* __restrict__ fine,    // [N, C_fine, L_fine]
    acc_t* __restrict__ partial,           // [slices, C_coarse, C_fine_g, K], or null
    storage_t* __restrict__ grad_weight,   // [C_coarse, C_fine_g, K], or null
    const Params p) {
    const index_t columns = p.C_fine_g * p.K;
    acc_t acc[THREAD_M][THREAD_N];
    {
        const Tile tile = find_tile(blockIdx.x, p);
        const Slice s = find_slice(tile.slice, p);
        const index_t terms = (s.n_end - s.n_begin) * (s.l_end - s.l_begin);
        const int load_position = threadIdx.x % kLoadPositions, load_row = threadIdx.x / kLoadPositions;

        // What this thread loads of each of its terms. A row or column behind the last repeats it: its loads are valid and
        // its results are not stored.
        index_t row_offset[kMyRows];
#pragma unroll
        for (int i = 0; i < kMyRows; ++i) {
            const index_t row = min_index(tile.row_begin + load_row + i * kLoadRows, p.C_coarse_g - 1);
            row_offset[i] = row * p.coarse_stride_c;
        }
        // The distance of a column's tap from position l*stride - padding_left. It is in shared memory, since it is seldom
        // needed.
        index_t* const smem_shift =
            reinterpret_cast<index_t*>(reinterpret_cast<acc_t*>(dynamic_shared_memory()) + kSums) + load_row;
        index_t column_offset[kMyColumns];
#pragma unroll
        for (int i = 0; i < kMyColumns; ++i) {
            const index_t column = min_index(tile.column_begin + load_row + i * kLoadRows, columns - 1);
            const index_t c = column / p.K;
            const index_t shift = (column - c * p.K) * p.dilation;
            column_offset[i] = c * p.fine_stride_c + shift * p.fine_stride_l;
            if (load_position == 0) smem_shift[i * kLoadRows] = shift;
        }
        __syncthreads();
        const index_t n_first = load_position / p.L_coarse;
        index_t l = s.l_begin + load_position - n_first * p.L_coarse;
        const storage_t* a = coarse + (tile.channel * p.coarse_stride_c + (s.n_begin + n_first) * p.coarse_stride_n +
                                       l * p.coarse_stride_l);
        const storage_t* b = fine + (tile.fine_channel * p.fine_stride_c + (s.n_begin + n_first) * p.fine_stride_n +
                                     (l * p.stride - p.padding_left) * p.fine_stride_l);

        // Terms behind the last are not loaded: they are never multiplied.
        const auto load_chunk = [&](acc_t* buffer, index_t first) {
#pragma unroll
            for (int part = 0; part < BLOCK_R; part += kLoadPositions) {
                const int term = part + load_position;
                if (first + term >= terms) break;
                acc_t* const rows = buffer + term * kPitchM + load_row;
                acc_t* const columns_of_term = buffer + BLOCK_R * kPitchM + term * kPitchN + load_row;
#pragma unroll
                for (int i = 0; i < kMyRows; ++i) scalar::copy_to_shared(rows + i * kLoadRows, a + row_offset[i]);
                const index_t position = l * p.stride - p.padding_left;
                if (is_inside(position, position + (p.K - 1) * p.dilation, p.L_fine)) {
#pragma unroll
                    for (int i = 0; i < kMyColumns; ++i) {
                        scalar::copy_to_shared(columns_of_term + i * kLoadRows, b + column_offset[i]);
                    }
                } else {
#pragma unroll
                    for (int i = 0; i < kMyColumns; ++i) {
                        const Source source = source_index(position + smem_shift[i * kLoadRows], p.L_fine);
                        acc_t value = scalar::zero();
                        if (source.exists) {
                            value = scalar::load(b[column_offset[i] + source.moved * p.fine_stride_l]);
                        }
                        columns_of_term[i * kLoadRows] = value;
                    }
                }
                l += p.step_l;
                a += p.coarse_advance;
                b += p.fine_advance;
                if (l >= p.L_coarse) {
                    l -= p.L_coarse;
                    a += p.coarse_carry;
                    b += p.fine_carry;
                }
            }
        };
        multiply_chunks<kPitchM, kPitchN>(
            terms, load_chunk, [](acc_t w, acc_t x, acc_t sum) { return multiply_add_conjugate(w, x, sum); }, acc);
    }

    const Tile tile = find_tile(block_index_again(), p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bool sum_again = false;
    store_rows(acc, tile.row_begin, p.C_coarse_g, [&](index_t row, const acc_t* values) {
#pragma unroll 1
        for (int j = lane; j < BLOCK_N && tile.column_begin + j < columns; j += 32) {
            store_sum(values[j], tile.slice, tile.channel + row, tile.column_begin + j, partial, grad_weight, p);
            sum_again = sum_again || needs_canonical_sum(values[j]);
        }
    });
    if (!sum_again) return;

    // The NaN fallback: all results of this lane's columns are summed again.
    const Slice s = find_slice(tile.slice, p);
#pragma unroll 1
    for (int e = 0; e < kWarpRows * ((BLOCK_N + 31) / 32); ++e) {
        const index_t row = tile.row_begin + warp * kWarpRows + e % kWarpRows;
        const int j = lane + 32 * (e / kWarpRows);
        const index_t column = tile.column_begin + j;
        if (row >= p.C_coarse_g || j >= BLOCK_N || column >= columns) continue;
        const index_t c = column / p.K;
        const acc_t sum = canonical_slice_sum(
            coarse + (tile.channel + row) * p.coarse_stride_c, fine + (tile.fine_channel + c) * p.fine_stride_c,
            column - c * p.K, s, p);
        store_sum(sum, tile.slice, tile.channel + row, column, partial, grad_weight, p);
    }
}
