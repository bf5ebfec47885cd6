// What conv1d_depthwise and conv_transpose1d_depthwise share: how a block's threads are dealt to rows, and the staging of
// a row's taps and of the window of its input in shared memory by 16-byte accesses, whatever the row's alignment.
//
// A row is one output channel of one sample. A block takes block_rows neighbouring rows, and of each one tile of outputs;
// row_threads threads work on a row, so that rows shorter than a block leave few threads idle.
//
// A sliding thread holds THREAD_L neighbouring results and slides over the taps, step by step, with a few vectors of the
// window in registers. Its block stages the taps of each row and the window of the input that they meet, both as
// accumulators, with zeros for taps and positions that do not exist. The tile of each row begins at a 16-byte boundary
// of its output, so that all stores but those at the ends of a row are 16 bytes wide; its window begins at a boundary of
// the input, and the taps shift by `lead` zeros to make up for it.
// Products with those zeros change no bit (see bias_or_zero in common.cuh) unless the other factor is infinite or NaN; so
// a thread that meets a NaN computes its results again, without them.
//
// Macros read: SLIDE_STRIDE, THREAD_L, and those of common.cuh.

constexpr int kVec = sizeof(acc_t) < 16 ? 16 / int(sizeof(acc_t)) : 1;  // accumulators of a 16-byte access
constexpr int kStorageVec = 16 / int(sizeof(storage_t));               // elements of a 16-byte access
constexpr int kPhases = SLIDE_STRIDE > 0 ? SLIDE_STRIDE : 1;
constexpr int kTaps = kPhases * kVec;  // of one step of a sliding thread
static_assert(kStorageVec % kVec == 0, "a vector of elements is a whole number of vectors of accumulators");
static_assert(
    SLIDE_STRIDE == 0 || (THREAD_L == 2 * kVec && THREAD_L % kStorageVec == 0),
    "a sliding thread holds two vectors of accumulators: gpuconv/families/depthwise.py");

struct alignas(16) Vector {
    acc_t element[kVec];
};
struct alignas(16) StorageVector {
    storage_t element[kStorageVec];
};

// Elements from the last 16-byte boundary to a pointer.
__device__ __forceinline__ int elements_past_boundary(const storage_t* pointer) {
    return int((unsigned long long)pointer / sizeof(storage_t) % kStorageVec);
}

// value / divisor for 0 <= value < 2^31: the host's magic number spares the division (Divisor in families/depthwise.py).
// With 64-bit indices it divides.
__device__ __forceinline__ index_t divide(index_t value, index_t divisor, index_t magic, index_t shift) {
#if INDEX_BITS == 32
    return divisor == 1 ? value : index_t(multiply_high(unsigned(value), unsigned(magic)) >> shift);
#else
    return value / divisor;
#endif
}

// What a thread works on.
struct Place {
    index_t tile;      // of the row
    int row_in_block;
    int place;         // of the thread within its row
    index_t n, c_out;
    bool has_row;      // threads behind the last row have none
};

template <typename ParamsT>
__device__ __forceinline__ Place find_place(const ParamsT& p) {
    Place at;
    at.row_in_block = int(divide(threadIdx.x, p.row_threads, p.row_threads_magic, p.row_threads_shift));
    at.place = int(threadIdx.x) - at.row_in_block * int(p.row_threads);
    const index_t row_group = divide(blockIdx.x, p.tiles, p.tiles_magic, p.tiles_shift);
    at.tile = index_t(blockIdx.x) - row_group * p.tiles;
    const index_t row = row_group * p.block_rows + at.row_in_block;
    at.n = divide(row, p.C_out, p.C_out_magic, p.C_out_shift);
    at.c_out = row - at.n * p.C_out;
    at.has_row = at.row_in_block < p.block_rows && at.n < p.N;
    return at;
}

#if SLIDE_STRIDE > 0

// taps[k + lead] = weight of tap k, zeros before and behind, `count` in all.
__device__ __forceinline__ void stage_taps(
    acc_t* taps, const storage_t* w, index_t weight_stride_k, index_t K, int lead, int count, int place, int row_threads) {
#pragma unroll 1
    for (int i = place; i < count; i += row_threads) {
        const bool exists = i >= lead && i - lead < K;
        taps[i] = exists ? scalar::load(w[(i - lead) * weight_stride_k]) : scalar::zero();
    }
}

// Hands positions start .. start + kVec*vectors - 1 of a row x[0 .. L_in) to store(vector, value), in vectors of kVec;
// x + start lies at a boundary of as many elements. A thread loads kBatch 16-byte vectors at a time.
template <int kBatch, typename Store>
__device__ __forceinline__ void stage_window(
    const storage_t* x, index_t L_in, index_t start, int vectors, int place, int row_threads, const Store& store) {
    const int ahead = elements_past_boundary(x + start);  // positions of the first 16 bytes before the window
#pragma unroll 1
    for (int first = place; first * kStorageVec < vectors * kVec + ahead; first += kBatch * row_threads) {
        StorageVector loaded[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const index_t l_in = start - ahead + (first + b * row_threads) * kStorageVec;
            if (l_in >= 0 && l_in + kStorageVec <= L_in) {
                loaded[b] = *reinterpret_cast<const StorageVector*>(x + l_in);
            } else {
#pragma unroll
                for (int e = 0; e < kStorageVec; ++e) {
                    const bool exists = l_in + e >= 0 && l_in + e < L_in;
                    loaded[b].element[e] = exists ? x[l_in + e] : scalar::storage_zero();
                }
            }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
            for (int part = 0; part < kStorageVec / kVec; ++part) {
                const int u = (first + b * row_threads) * kStorageVec + part * kVec - ahead;
                if (u < 0 || u >= vectors * kVec) continue;
                Vector value;
#pragma unroll
                for (int e = 0; e < kVec; ++e) value.element[e] = scalar::load(loaded[b].element[part * kVec + e]);
                store(u / kVec, value);
            }
        }
    }
}

// Stores the results of y[l_out .. l_out + THREAD_L), as far as they exist. sum_again(l) is the result at l without terms
// that do not exist, before the bias.
template <typename SumAgain>
__device__ __forceinline__ void store_results(
    storage_t* y, index_t l_out, index_t L_out, const acc_t (&acc)[THREAD_L], acc_t offset, const SumAgain& sum_again) {
    bool met_nan = false;
#pragma unroll
    for (int j = 0; j < THREAD_L; ++j) met_nan = met_nan || is_nan(acc[j]);
    if (met_nan) {
#pragma unroll 1
        for (index_t l = max_index(l_out, 0); l < min_index(l_out + THREAD_L, L_out); ++l) {
            y[l] = scalar::round(add(sum_again(l), offset));
        }
        return;
    }
#pragma unroll
    for (int first = 0; first < THREAD_L; first += kStorageVec) {
        StorageVector result;
#pragma unroll
        for (int e = 0; e < kStorageVec; ++e) result.element[e] = scalar::round(add(acc[first + e], offset));
        if (l_out + first >= 0 && l_out + first + kStorageVec <= L_out) {
            *reinterpret_cast<StorageVector*>(y + l_out + first) = result;
        } else {
#pragma unroll
            for (int e = 0; e < kStorageVec; ++e) {
                const index_t l = l_out + first + e;
                if (l >= 0 && l < L_out) y[l] = result.element[e];
            }
        }
    }
}

#endif
