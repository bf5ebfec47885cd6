// weight_gradient_mma: gradient of the weights of dense and grouped layers by tensor cores.
//
//   grad_weight[r, c, k] = sum over n < N, l < L_coarse of coarse[n, r, l] * fine[n, g*C_fine_g + c, l_fine],
//   g = r / C_coarse_g,   l_fine = l*stride - padding_left + k*dilation,   terms outside [0, L_fine) left out.
//
// Per group and slice (slices.cuh) a product of a matrix [r, (n, l)] and one [(n, l), (c, k)]. A block computes BLOCK_M
// rows by BLOCK_N/8 pairs of a tap k and an octet, eight neighbouring channels c: block_octets octets, with block_taps
// taps of each. Positions are taken in chunks of CHUNK_ROWS: that many of one sample, or those of chunk_samples samples,
// 1 << sample_shift each. What a chunk needs of both arrays is staged once in shared memory, transposed: one row of 16 bytes
// for each position and unit of kUnit channels. Of fine that is a window, which every tap reads at an address of its own,
// always aligned; it consists of planes, so that neighbouring l meet neighbouring rows whatever the stride. Row j of plane
// v holds position (l + j)*stride - padding_left + (the block's first tap)*dilation + v*dilation, after up to FINE_ALIGN - 1
// rows that only make it begin aligned: see Window in gpuconv/families/weight_gradient_window.py.
//
// TAPS_IN_UNITS = 1 is for few channels of fine: an octet is then a channel's eight neighbouring taps, at positions `dilation`
// apart, and what is said of taps and channels above holds for blocks of eight taps, 8*dilation apart, and for those eight.
// TAP_WIDTH = 2 loads two of them at once: dilation is 1, and they begin aligned to two at even positions.
//
// FEW_ROWS = 1 is for fewer than kUnit channels of coarse in a group: others of them fill the unit.
//
// The reduction runs over samples, and in a sample over steps of 16 positions, of which those behind the last count as
// zeros. So its order depends on the problem and the slices alone, and the bits on neither the tile nor the chunks.
//
// IS_SPLIT = 1 is float32 by TF32 products, as in mma.cuh: the small products have sums of their own, and the sum of the
// large ones of each step is added to a total in float32. Values that cannot be split become NaN. Sums that are not finite
// are formed again term by term (canonical_slice_sum), so that they follow IEEE arithmetic.
//
// Grid x: blocks of BLOCK_M rows (fastest, so that blocks which read one window of fine run together), then of taps, then
// of octets, then groups, then slices. Grid y and z: 1. Dynamic shared memory: two buffers of both operands, and tables
// of the window's rows and of the tasks of staging it; or the sums that are to be stored.
// With several slices their sums go to partial and sum_slices.cu follows; with one partial is null.
// COARSE_WIDTH and FINE_WIDTH = 4 need contiguous positions. With a stride, FINE_WIDTH = 4 needs FINE_STRIDED = 1: dilation is
// 1 and planes are as many as the stride, so that the window has all positions of a stretch. Rows begin and end at
// multiples of COARSE_ALIGN and FINE_ALIGN positions, by default the widths, and are aligned to that many. Where it is 1 and
// the width is 4, elements have 16 bits, the strides of channels are odd, none is negative, and arrays are aligned to 4 bytes
// (unaligned_runs.cuh).
// is_exchanged: coarse and fine are those of the problem in the opposite order, and the taps, too, so that the result begins
// weight_offset elements behind the one that grad_weight points to: see gpuconv/families/weight_gradient_sides.py.
// Takes other arrays of any strides, in elements. Samples with lengths of their own (samples.cuh) need widths of 1.
// COARSE_LAST and FINE_LAST = 1 (default 0) are for arrays whose channels are contiguous, in groups of whole units, each unit
// aligned to 16 bytes: a unit of one position is then 16 bytes of memory. Units of 16-bit elements go to shared memory by
// cp.async, those of 32 bits through registers, since they are rounded or split.
// Needs float16, bfloat16 (sm_80) or float32 (sm_80). Chosen for at least 8 channels or 8 taps on the fine side; see
// gpuconv/families/weight_gradient_mma.py.

#include "common.cuh"
#include "edge.cuh"
#include "fragments.cuh"
#include "slices.cuh"
#include "staging.cuh"
#include "weight_gradient_epilogue.cuh"
#include "weight_gradient_staging.cuh"
#include "weight_gradient_tile.cuh"

struct Params {
    index_t N, L_coarse, L_fine, K;
    index_t C_coarse, C_coarse_g, C_fine_g;
    index_t row_tiles, tap_tiles, octet_tiles, groups;
    index_t block_octets, block_taps;
    index_t taps, tap_step;  // of an octet: K and dilation, or blocks of taps and the positions from one to the next
    index_t stride, padding_left, dilation;
    index_t slice_samples, slice_positions, slice_pieces;
    index_t chunk_samples, sample_shift;  // 1 << sample_shift rows of each
    index_t planes, plane_rows, tap_rows_step;
    index_t window_rows;                // of all samples of a chunk
    index_t window_half, window_pitch;  // from unit to unit of an octet, and from octet to octet
    index_t coarse_stride_n, coarse_stride_c, coarse_stride_l;
    index_t fine_stride_n, fine_stride_c, fine_stride_l;
    index_t weight_offset, weight_stride_r, weight_stride_c, weight_stride_k;
    index_t is_exchanged;
    static constexpr bool is_conjugated = false;  // for slices.cuh
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/weight_gradient_mma.py");

// The fragments of one product of matrices are loaded from this lane's address of each operand: see ptx.cuh. 16-bit operands
// are transposed as they are loaded; 32-bit ones are read one by one.

// Bytes from an operand's start to what this lane reads of two octets of rows, the first of which begins at row `row`, or of
// a pair.
__device__ __forceinline__ int rows_address(int row, int lane) {
    if (kUnit == 8) return (row + lane / 8 % 2 * kPitchM + lane / 16 * 8 + lane % 8) * 16;
    return (row + lane / 16 * kHalfM + lane % 4) * 16 + lane / 4 % 4 * 4;
}
__device__ __forceinline__ int pair_address(int row, int half, int lane) {
    if (kUnit == 8) return (row + lane / 8 % 2 * 8 + lane % 8) * 16;
    return (row + lane / 16 * half + lane % 4) * 16 + lane / 4 % 4 * 4;
}

__device__ __forceinline__ unsigned word(const unsigned char* address) {
    return *reinterpret_cast<const unsigned*>(address);
}

__device__ __forceinline__ void load_rows(unsigned (&a)[4], const unsigned char* from) {
    if (kUnit == 8) {
        load_matrix_x4_transposed(a, from);
    } else {
        a[0] = word(from);
        a[1] = word(from + kPitchM * 16);
        a[2] = word(from + 4 * 16);
        a[3] = word(from + kPitchM * 16 + 4 * 16);
    }
}

// The sums of one slice.
__device__ __forceinline__ void multiply_slice(
    const storage_t* coarse, const storage_t* fine, const Tile& tile, const Params& p, Sums& acc SAMPLES_PARAMETER) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Slice s = find_slice(tile.slice, p);
    const int window_half = int(p.window_half), window_pitch = int(p.window_pitch), block_taps = int(p.block_taps);
    const int window_units = int(p.block_octets) * kOctetUnits;
    const int fine_part = int(p.block_octets) * window_pitch;
    const int planes = int(p.planes), plane_rows = int(p.plane_rows);

    const Side coarse_side = {
        reinterpret_cast<Vector<unsigned>*>(dynamic_shared_memory()), kCoarsePart, kPitchM, kHalfM};
    const Side fine_side = {coarse_side.buffers + 2 * kParts * kCoarsePart, fine_part, window_pitch, window_half};
    Vector<unsigned>* const tables = fine_side.buffers + 2 * kParts * fine_part;
#if FINE_LAST
    UnitTask* const tasks = keep_in_register_shared(reinterpret_cast<UnitTask*>(tables));
#else
    Place* const places = keep_in_register_shared(reinterpret_cast<Place*>(tables));
    int* const rows_apart = keep_in_register_shared(reinterpret_cast<int*>(places + p.window_rows));
    Task* const tasks =
        keep_in_register_shared(reinterpret_cast<Task*>(rows_apart + (FINE_STRIDED ? p.window_rows : 0)));
#endif
    const int fine_runs = int(p.window_rows) / FINE_WIDTH, fine_tasks = fine_runs * window_units;
    const int sample_window_rows = planes * plane_rows;
    // Planes begin at a multiple of FINE_ALIGN, so that their first rows may be ones that no tap needs. Where FINE_STRIDED,
    // this is so of all planes together.
    const index_t first = tile.tap_begin * p.tap_step - p.padding_left;
    const auto skew_of = [&](int plane) {
        return int(first + (FINE_STRIDED ? 0 : plane * p.tap_step)) & (FINE_ALIGN - 1);
    };
#if FINE_LAST
#pragma unroll 1
    for (int i = threadIdx.x; i < fine_tasks; i += kThreads) {
        const Task task = Task::of(i, window_units, fine_runs, 1, kFineLanes);
        const int sample = task.row / sample_window_rows, in_sample = task.row - sample * sample_window_rows;
        const int plane = in_sample / plane_rows;
        const index_t of_sample = (in_sample - plane * plane_rows) * p.stride + first + plane * p.tap_step;
        tasks[i] = UnitTask{
            task.unit * kUnit < tile.elements ? fine_side.row_of(task) : -1, sample, of_sample,
            sample * p.fine_stride_n + of_sample * p.fine_stride_l + task.unit * kUnit};
    }
#else
#pragma unroll 1
    for (int row = threadIdx.x; row < p.window_rows; row += kThreads) {
        const int sample = row / sample_window_rows, in_sample = row - sample * sample_window_rows;
#if FINE_STRIDED
        const int round = in_sample / planes;
        places[row] = Place{sample, first - skew_of(0) + in_sample};
        rows_apart[row] = sample * sample_window_rows + (in_sample - round * planes) * plane_rows + round;
#else
        const int plane = in_sample / plane_rows;
        places[row] = Place{
            sample, (in_sample - plane * plane_rows) * p.stride + first + plane * p.tap_step - skew_of(plane)};
#endif
    }

#pragma unroll 1
    for (int i = threadIdx.x; i < fine_tasks; i += kThreads) {
        Task task = Task::of(i, window_units, fine_runs, FINE_WIDTH, kFineLanes);
#if FINE_STRIDED
        // Of two neighbouring lanes with the same units one takes the run whose rows lie four further on: so they meet on
        // different banks.
        const int run = task.row / FINE_WIDTH, group = run / (2 * planes), in_group = run - group * (2 * planes);
        if ((group + 1) * 2 * planes <= fine_runs) {
            task.row = (run - in_group + in_group % 2 * planes + in_group / 2) * FINE_WIDTH;
        }
#endif
        tasks[i] = task;
    }
#endif

    coarse += (tile.channel + tile.row_begin) * p.coarse_stride_c;
    fine += (tile.fine_channel + tile.octet_begin * kOctetChannels) * p.fine_stride_c;
    index_t n = s.n_begin, l = s.l_begin;  // the chunk to load
    const int sample_shift = int(p.sample_shift), sample_rows = 1 << sample_shift;

    // Channels of the arrays from the first of the block on.
    const index_t coarse_channels = p.C_coarse - tile.channel - tile.row_begin;
    const index_t fine_channels = p.groups * p.C_fine_g - tile.fine_channel - tile.octet_begin * kOctetChannels;
    // Units that exist. The others are never written: they have a part in no result.
    const int coarse_units = (int(tile.rows) + kUnit - 1) / kUnit, fine_units = (int(tile.elements) + kUnit - 1) / kUnit;
#if COARSE_LAST
    const storage_t* coarse_chunk;  // the chunk's first element
    const auto coarse_task = [&](int i) {
        const Task task = Task::of(i * kThreads + int(threadIdx.x), kUnitsM, CHUNK_ROWS, 1, kCoarseLanes);
        const int n_of_chunk = task.row >> sample_shift, l_of_chunk = task.row - (n_of_chunk << sample_shift);
        return UnitTask{
            task.unit < coarse_units ? coarse_side.row_of(task) : -1, n_of_chunk, l_of_chunk,
            n_of_chunk * p.coarse_stride_n + l_of_chunk * p.coarse_stride_l + task.unit * kUnit};
    };
    const auto is_coarse = [&](const UnitTask& task) { return task.row >= 0; };
    const auto load_coarse = [&](Block<1>& block, int buffer, const UnitTask& task) {
        bool exists = n + task.n < s.n_end && l + task.l < s.l_end;
#ifdef LENGTHS
        exists = exists && l + task.l < extents_of_sides(samples[n + task.n], p).L_out;
#endif
        stage_unit<kCopiesCoarse>(block, coarse_side.vectors_of(task, buffer), coarse_chunk + task.offset, exists);
    };
#else
    const auto coarse_task = [&](int i) {
        return Task::of(
            i * kThreads + int(threadIdx.x), kUnitsM, CHUNK_ROWS / COARSE_WIDTH, COARSE_WIDTH, kCoarseLanes);
    };
    const auto is_coarse = [&](const Task& task) { return task.unit < coarse_units; };
    const auto load_coarse = [&](CoarseRuns& runs, int, const Task& task) {
        const int sample = task.row >> sample_shift;
        const index_t l_coarse = l + (task.row - (sample << sample_shift)), c = first_row_of_unit(task.unit, tile.rows);
        index_t l_end = n + sample < s.n_end ? s.l_end : 0;
#ifdef LENGTHS
        if (l_end > 0) l_end = min_index(l_end, index_t(extents_of_sides(samples[n + sample], p).L_out));
#endif
        const UnitChannels channels = {FEW_ROWS ? int(tile.rows) - 1 : kUnit - 1, c + kUnit >= coarse_channels};
        load_run<COARSE_ALIGN>(
            runs, channels,
            coarse + ((n + sample) * p.coarse_stride_n + l_coarse * p.coarse_stride_l + c * p.coarse_stride_c),
            keep_in_register(p.coarse_stride_c), l_coarse, l_end);
    };
#endif
#if FINE_LAST
    const storage_t* fine_chunk;  // the element that the chunk's first l meets, before padding
    index_t l_fine;
    const auto fine_task = [&](int i) {
        // Threads from the last on, as those of coarse may be few.
        const int index = (i + 1) * kThreads - 1 - int(threadIdx.x);
        UnitTask task = tasks[index < fine_tasks ? index : 0];
        if (index >= fine_tasks) task.row = -1;
        return task;
    };
    const auto is_fine = [&](const UnitTask& task) { return task.row >= 0; };
    const auto load_fine = [&](Block<1>& block, int buffer, const UnitTask& task) {
        const index_t of_sample = l_fine + task.l;
        const bool sample_exists = n + task.n < s.n_end;
        index_t position = of_sample, L_fine = p.L_fine;
#ifdef LENGTHS
        if (sample_exists) {
            const SampleExtents of_sides = extents_of_sides(samples[n + task.n], p);
            position += p.padding_left - index_t(of_sides.padding_left);
            L_fine = index_t(of_sides.L_in);
        }
#endif
        const Source source = source_index(position, L_fine);
        stage_unit<kCopiesFine>(
            block, fine_side.vectors_of(task, buffer),
            fine_chunk + (task.offset + (source.index - of_sample) * p.fine_stride_l), sample_exists && source.exists);
    };
#else
    const auto fine_task = [&](int i) {
        // Threads from the last on, as those of coarse may be few.
        const int index = (i + 1) * kThreads - 1 - int(threadIdx.x);
        return index < fine_tasks ? tasks[index] : Task{window_units, 0};
    };
    const auto is_fine = [&](const Task& task) { return task.unit < fine_units; };
    const auto load_fine = [&](FineRuns& runs, int, const Task& task) {
        const Place place = places[task.row];
        const bool sample_exists = n + place.n < s.n_end;
        index_t position = l * p.stride + place.l, L_fine = p.L_fine;
#ifdef LENGTHS
        if (sample_exists) {
            const SampleExtents of_sides = extents_of_sides(samples[n + place.n], p);
            position += p.padding_left - index_t(of_sides.padding_left);
            L_fine = index_t(of_sides.L_in);
        }
#endif
#if TAPS_IN_UNITS
        const unsigned unit = task.unit;
        const index_t octet = unit / kOctetUnits, tap_of_octet = unit % kOctetUnits * kUnit;
        const storage_t* const x = fine + ((n + place.n) * p.fine_stride_n + octet * p.fine_stride_c);
        load_taps(runs, x, position + tap_of_octet * p.dilation, sample_exists ? L_fine : 0, p);
#else
        const index_t c = first_of_unit(task.unit, tile.elements);
        const Source source = source_index(position, L_fine);
        load_run<FINE_ALIGN>(
            runs, UnitChannels{kUnit - 1, c + kUnit >= fine_channels},
            fine + ((n + place.n) * p.fine_stride_n + source.index * p.fine_stride_l + c * p.fine_stride_c),
            keep_in_register(p.fine_stride_c), source.index, sample_exists ? L_fine : 0);
#endif
    };
#endif
    const auto store_fine = [&](const FineRuns& runs, const decltype(fine_task(0))& task, int buffer) {
#if FINE_STRIDED
        fine_side.store_apart(runs, task, rows_apart, buffer);
#else
        fine_side.store<kCopiesFine>(runs, task, buffer);
#endif
    };
    __syncthreads();  // the tables

    // Where this lane reads its operands.
    const int a_address = rows_address(warp / WARPS_N * (kWarpM / 8) * kPitchM, lane);
    // 16-bit pairs are loaded two by two, the second by the upper half of the lanes.
    constexpr int kLoads = kUnit == 8 ? kTilesN / 2 : kTilesN;
    const int pair_begin = warp % WARPS_N * kTilesN;
    const int pairs = int(p.block_octets) * block_taps;
    int b_address[kLoads] = {};
    int pair = pair_begin + (kUnit == 8 ? lane / 16 : 0);
    // One loop body serves all loads: each moves by one place, and the next enters at the end.
#pragma unroll 1
    for (int j = 0; j < kLoads; ++j, pair += kTilesN / kLoads) {
        const int octet = pair / block_taps, tap = pair - octet * block_taps;
        const int place = tap + (FINE_STRIDED ? skew_of(0) : 0), round = place / planes, plane = place - round * planes;
        const int row = octet * window_pitch + round * int(p.tap_rows_step) + plane * plane_rows +
                        (FINE_STRIDED ? 0 : skew_of(plane));
#pragma unroll
        for (int i = 0; i + 1 < kLoads; ++i) b_address[i] = b_address[i + 1];
        b_address[kLoads - 1] = pair_address(pair < pairs ? row : 0, window_half, lane);
    }
    // No step is behind the last position of a sample: what its zeros meet in fine might be infinite.
    const int sample_steps = (int(min_index(s.l_end - s.l_begin, sample_rows)) + kStepRows - 1) / kStepRows;
    const int sample_skip = (sample_window_rows - sample_steps * kStepRows) * 16;

    Sums low;    // where IS_SPLIT: sums of the small products
    Sums total;  // and of the large ones
    for_each_sum([&](int i, int j, int e) {
        acc[i][j][e] = 0.0f;
        if (IS_SPLIT) low[i][j][e] = total[i][j][e] = 0.0f;
    });

    int buffer = 0, steps = 0;  // of the chunk that lies in shared memory
    const auto multiply_chunk = [&] {
        const unsigned char* a = coarse_side.buffer(buffer) + a_address;
        const unsigned char* b = fine_side.buffer(buffer);
        int steps_of_sample = sample_steps;
#pragma unroll 1
        for (int step = pair_begin < pairs ? steps : 0; step > 0; --step) {
#pragma unroll 1
            for (int depth = 0; depth < kStepRows; depth += kDepth) {
                unsigned a_fragment[kParts][kTilesM][4], b_fragment[kParts][kTilesN][2];
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
#pragma unroll
                    for (int i = 0; i < kTilesM; ++i) {
                        load_rows(a_fragment[part][i], a + (part * kCoarsePart + i * 2 * kPitchM) * 16);
                    }
#pragma unroll
                    for (int j = 0; j < kLoads; ++j) {
                        const unsigned char* const from = b + part * fine_part * 16 + b_address[j];
                        if (kUnit == 8) {
                            unsigned both[4];
                            load_matrix_x4_transposed(both, from);
#pragma unroll
                            for (int e = 0; e < 4; ++e) b_fragment[part][(2 * j + e / 2) % kTilesN][e % 2] = both[e];
                        } else {
                            b_fragment[part][j][0] = word(from);
                            b_fragment[part][j][1] = word(from + 4 * 16);
                        }
                    }
                }
                multiply_fragments(a_fragment, b_fragment, acc, low);
                a += kDepth * 16;
                b += kDepth * 16;
            }
            if (IS_SPLIT) add_large_products(total, acc);
            if (--steps_of_sample == 0) {
                steps_of_sample = sample_steps;
                b += sample_skip;
                // Samples of short chunks have one step.
                if (CHUNK_ROWS > 2 * kStepRows) a += (sample_rows - sample_steps * kStepRows) * 16;
            }
        }
    };
#pragma unroll 1
    for (;;) {
        // The next chunk is on its way while this one is multiplied.
        const bool has_next = n < s.n_end;
#if COARSE_LAST
        coarse_chunk = keep_in_register_global(coarse + (n * p.coarse_stride_n + l * p.coarse_stride_l));
#endif
#if FINE_LAST
        l_fine = keep_in_register(l * p.stride);
        fine_chunk = keep_in_register_global(fine + (n * p.fine_stride_n + l_fine * p.fine_stride_l));
#endif
        // Both in batches, so that one loop body serves all; the first of them arrive while this chunk is multiplied.
#pragma unroll 1
        for (int first_coarse = 0; first_coarse * kThreads < kCoarseTasks; first_coarse += kAheadCoarse) {
            CoarseRuns ahead_coarse[kAheadCoarse];
#pragma unroll
            for (int i = 0; i < kAheadCoarse; ++i) {
                const auto task = coarse_task(first_coarse + i);
                if (has_next && is_coarse(task)) load_coarse(ahead_coarse[i], buffer ^ 1, task);
            }
#pragma unroll 1
            for (int first = 0; first_coarse == 0 && (first == 0 || first * kThreads < fine_tasks); first += kAheadFine) {
                FineRuns ahead_fine[kAheadFine];
#pragma unroll
                for (int i = 0; i < kAheadFine; ++i) {
                    const auto task = fine_task(first + i);
                    if (has_next && is_fine(task)) load_fine(ahead_fine[i], buffer ^ 1, task);
                }
                if (first == 0) multiply_chunk();
                if (!has_next) break;
#pragma unroll
                for (int i = 0; i < kAheadFine; ++i) {
                    const auto task = fine_task(first + i);
                    if (is_fine(task)) store_fine(ahead_fine[i], task, buffer ^ 1);
                }
            }
            if (!has_next) break;
#pragma unroll
            for (int i = 0; i < kAheadCoarse; ++i) {
                const auto task = coarse_task(first_coarse + i);
                if (is_coarse(task)) coarse_side.store<kCopiesCoarse>(ahead_coarse[i], task, buffer ^ 1);
            }
        }
        if (!has_next) break;

        buffer ^= 1;
        steps = p.chunk_samples > 1 ? int(min_index(p.chunk_samples, s.n_end - n)) * sample_steps
                                    : (int(min_index(s.l_end - l, CHUNK_ROWS)) + kStepRows - 1) / kStepRows;
        l += sample_rows;
        if (l >= s.l_end) {
            l = s.l_begin;
            n += p.chunk_samples;
        }
        if (kCopiesCoarse || kCopiesFine) copy_async_wait();
        __syncthreads();
    }
    if (IS_SPLIT) for_each_sum([&](int i, int j, int e) { acc[i][j][e] = total[i][j][e] + low[i][j][e]; });
}

// Registers for three blocks are too few on sm_75.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMinBlocks = MIN_BLOCKS < 2 ? MIN_BLOCKS : 2;
#else
constexpr int kMinBlocks = MIN_BLOCKS;
#endif

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) weight_gradient_mma(
    const storage_t* __restrict__ coarse,  // [N, C_coarse, L_coarse]
    const storage_t* __restrict__ fine,    // [N, C_fine, L_fine]
    acc_t* __restrict__ partial,           // [slices, C_coarse, C_fine_g, K], or null
    storage_t* __restrict__ grad_weight,   // [C_coarse, C_fine_g, K], or null
    SAMPLES_ARGUMENT const Params p) {
    Sums acc;
    multiply_slice(coarse, fine, find_tile(blockIdx.x, p), p, acc SAMPLES_VALUE);
    store_tile(
        acc, find_tile(block_index_again(), p), coarse, fine, partial, grad_weight + p.weight_offset, p SAMPLES_VALUE);
}
