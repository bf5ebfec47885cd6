// What a CUDA kernel text needs to be compiled by a host C++ compiler: the language's extensions, its built-in names,
// and host versions of the functions that cuda_src/ptx.cuh wraps (their bodies there are for CUDA compilers only).
//
// Each CUDA thread runs on a fiber; runtime.cpp schedules them. A new instruction that the lanes of a warp execute
// together (a shuffle, ldmatrix, mma.sync) is one Record with a `combine`, handed to `warp_collective`: see Shuffle.

#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

namespace hostcuda {

struct Index {
    unsigned x, y, z;
};

constexpr unsigned kWarpSize = 32;

// Why a launch ended early; errors.py has an exception for each.
enum FaultKind { kNoFault, kMemory, kMisaligned, kUndefined, kDivergence, kTimeLimit, kStackOverflow };

typedef void (*CombineErased)(void* const (&records)[kWarpSize]);

// A lane's fragments of a product of matrices, as cuda_src/ptx.cuh describes them; what a kind does not use is zero.
enum MatrixKind { kF16K16, kBf16K16, kF16K8, kTf32K8 };
struct MatrixProduct {
    float d[4];
    unsigned a[4], b[2];
};

}  // namespace hostcuda

extern "C" {
extern hostcuda::Index threadIdx, blockIdx, blockDim, gridDim;
unsigned char* hostcuda_shared_memory();
bool hostcuda_block_barrier(bool condition, const char* file, int line);  // whether any thread's condition holds
void hostcuda_warp_meet(
    unsigned mask, void* record, hostcuda::CombineErased combine, const char* name, const char* file, int line);
void hostcuda_copy_async(void* shared, const void* global, unsigned bytes, bool exists);
void hostcuda_copy_async_commit();
void hostcuda_copy_async_wait(unsigned pending_groups);
void hostcuda_copy_async_wait_all();
void hostcuda_read_matrix_row(const void* shared_row, unsigned short (&row)[8]);
void hostcuda_count_matrix_load(const void* const* rows, unsigned num_matrices);
void hostcuda_count_global_load(const void* const* addresses, unsigned bytes);
void hostcuda_multiply_matrices(int kind, hostcuda::MatrixProduct* const (&lanes)[hostcuda::kWarpSize]);
[[noreturn]] void hostcuda_fault(int kind, const void* address, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
}

#define HOSTCUDA_VECTORS(scalar, name)                       \
    struct alignas(2 * sizeof(scalar)) name##2 {             \
        scalar x, y;                                         \
    };                                                       \
    struct alignas(4 * sizeof(scalar) < 16 ? 4 * sizeof(scalar) : 16) name##4 { \
        scalar x, y, z, w;                                   \
    };                                                       \
    inline name##2 make_##name##2(scalar x, scalar y) { return name##2{x, y}; } \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return name##4{x, y, z, w}; }
HOSTCUDA_VECTORS(unsigned short, ushort)
HOSTCUDA_VECTORS(int, int)
HOSTCUDA_VECTORS(unsigned, uint)
HOSTCUDA_VECTORS(float, float)
HOSTCUDA_VECTORS(double, double)
#undef HOSTCUDA_VECTORS

// The default arguments name the caller's line: it identifies a barrier, and error messages show it.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    hostcuda_block_barrier(false, file, line);
}

namespace hostcuda {

template <typename Record>
void combine_erased(void* const (&records)[kWarpSize]) {
    Record* lanes[kWarpSize];
    for (unsigned lane = 0; lane < kWarpSize; ++lane) lanes[lane] = static_cast<Record*>(records[lane]);
    Record::combine(lanes);
}

// Every lane of `mask` deposits its record and waits until all have; then `Record::combine(lanes)` runs once, reads the
// operands and writes the results of all of them. `lanes` is indexed by lane; those outside the mask are null.
template <typename Record>
void warp_collective(unsigned mask, Record& record, const char* name, const char* file, int line) {
    hostcuda_warp_meet(mask, &record, combine_erased<Record>, name, file, line);
}

struct Meeting {
    static void combine(Meeting* const (&)[kWarpSize]) {}
};

template <typename T>
struct Shuffle {
    T value;
    unsigned source;  // the lane to read
    T result;

    static void combine(Shuffle* const (&lanes)[kWarpSize]) {
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
            if (lanes[lane] == nullptr) continue;
            const Shuffle* source = lanes[lanes[lane]->source];
            if (source == nullptr)
                hostcuda_fault(
                    kDivergence, nullptr, "lane %u shuffles from lane %u, which the mask leaves out", lane,
                    lanes[lane]->source);
            lanes[lane]->result = source->value;
        }
    }
};

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* name, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 4 or 8 bytes");
    Shuffle<T> record = {value, source, value};
    warp_collective(mask, record, name, file, line);
    return record.result;
}

struct Vote {
    bool condition, result;

    static void combine(Vote* const (&lanes)[kWarpSize]) {
        bool any = false;
        for (const Vote* vote : lanes) any = any || (vote != nullptr && vote->condition);
        for (Vote* vote : lanes) {
            if (vote != nullptr) vote->result = any;
        }
    }
};

inline unsigned lane() { return threadIdx.x % kWarpSize; }

}  // namespace hostcuda

inline void __syncwarp(
    unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    hostcuda::Meeting record;
    hostcuda::warp_collective(mask, record, "__syncwarp", file, line);
}

// Each reads within the lane's segment of `width` lanes (a power of two); past its end a lane reads itself.

template <typename T>
T __shfl_sync(
    unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
    const unsigned segment = hostcuda::lane() & ~unsigned(width - 1);
    return hostcuda::shuffle(mask, value, segment | (unsigned(source) & unsigned(width - 1)), "__shfl_sync", file, line);
}

template <typename T>
T __shfl_up_sync(
    unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
    const unsigned lane = hostcuda::lane(), within = lane & unsigned(width - 1);
    return hostcuda::shuffle(mask, value, within >= delta ? lane - delta : lane, "__shfl_up_sync", file, line);
}

template <typename T>
T __shfl_down_sync(
    unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
    const unsigned lane = hostcuda::lane(), within = lane & unsigned(width - 1);
    const bool inside = delta < unsigned(width) - within;
    return hostcuda::shuffle(mask, value, inside ? lane + delta : lane, "__shfl_down_sync", file, line);
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int lane_mask, int width = 32, const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
    const unsigned lane = hostcuda::lane(), source = lane ^ unsigned(lane_mask);
    const unsigned segment_end = (lane & ~unsigned(width - 1)) + unsigned(width);
    return hostcuda::shuffle(mask, value, source < segment_end ? source : lane, "__shfl_xor_sync", file, line);
}

template <typename T>
__forceinline__ T __ldg(const T* pointer) {
    return *pointer;
}

__forceinline__ float fma_rn(float w, float x, float acc) { return __builtin_fmaf(w, x, acc); }
__forceinline__ double fma_rn(double w, double x, double acc) { return __builtin_fma(w, x, acc); }

__forceinline__ float add_rn(float a, float b) { return a + b; }
__forceinline__ double add_rn(double a, double b) { return a + b; }
__forceinline__ float multiply_rn(float a, float b) { return a * b; }
__forceinline__ double multiply_rn(double a, double b) { return a * b; }
__forceinline__ float divide_rn(float a, float b) { return a / b; }
__forceinline__ double divide_rn(double a, double b) { return a / b; }
__forceinline__ float absolute(float a) { return __builtin_fabsf(a); }
__forceinline__ double absolute(double a) { return __builtin_fabs(a); }

__forceinline__ float uint_as_float(unsigned bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
__forceinline__ unsigned float_as_uint(float value) {
    unsigned bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

__forceinline__ float magnitude(float value) { return __builtin_fabsf(value); }

__forceinline__ unsigned low_word(double value) {
    unsigned long long bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return unsigned(bits);
}
__forceinline__ double words_as_double(unsigned high, unsigned low) {
    const unsigned long long bits = (unsigned long long)high << 32 | low;
    double value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

__forceinline__ unsigned multiply_high(unsigned a, unsigned b) {
    return unsigned((unsigned long long)a * b >> 32);
}

__forceinline__ unsigned permute_bytes(unsigned a, unsigned b, unsigned order) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned bytes = 0;
    for (unsigned i = 0; i < 4; ++i) bytes |= unsigned(both >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
    return bytes;
}

__forceinline__ unsigned funnel_shift_right(unsigned low, unsigned high, int bits) {
    return unsigned(((unsigned long long)high << 32 | low) >> (bits & 31));
}

// Both conversions work on the bits, so they do not depend on the processor's treatment of subnormals: the GPU's
// instructions (without .ftz) keep those of float16. NaNs keep the top of their payload, by which poison is recognised
// (memory.py); a GPU makes every float16 NaN 0x7fff.

inline float half_bits_to_float(unsigned short bits) {
    const unsigned sign = unsigned(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x0400u) return uint_as_float(sign | ((magnitude << 13) + 0x38000000u));
    if (magnitude == 0) return uint_as_float(sign);
    const unsigned shift = unsigned(__builtin_clz(magnitude)) - 21;  // brings the leading one to bit 10
    return uint_as_float(sign | ((113 - shift) << 23) | ((magnitude << shift & 0x3ffu) << 13));
}

inline unsigned short float_to_half_bits_rn(float value) {
    const unsigned bits = float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (unsigned short)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);  // 65520 and above round to infinity
    if (magnitude >= 0x38800000u)  // normal: rebias by 2**-112, to nearest even on the 13 bits that go
        return (unsigned short)(sign | ((magnitude - 0x38000000u + 0x0fffu + (magnitude >> 13 & 1u)) >> 13));
    if (magnitude <= 0x33000000u) return (unsigned short)sign;  // 2**-25 and below: half of the smallest, tie to zero
    const unsigned shift = 126 - (magnitude >> 23), significand = (magnitude & 0x7fffffu) | 0x800000u;
    const unsigned kept = significand >> shift, rest = significand & ((1u << shift) - 1), half = 1u << (shift - 1);
    return (unsigned short)(sign | (kept + (rest > half || (rest == half && (kept & 1u)))));
}

template <typename T>
__forceinline__ T* keep_in_register_shared(T* pointer) {
    return pointer;
}

template <typename T>
__forceinline__ T* keep_in_register_global(T* pointer) {
    return pointer;
}

__forceinline__ unsigned block_index_again() { return blockIdx.x; }

template <typename T>
__forceinline__ T* keep_in_register(T* pointer) {
    return pointer;
}
__forceinline__ int keep_in_register(int value) { return value; }
__forceinline__ long long keep_in_register(long long value) { return value; }
__forceinline__ int keep_in_loop(int value) { return value; }
__forceinline__ long long keep_in_loop(long long value) { return value; }

inline bool any_lane(bool condition, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    hostcuda::Vote record = {condition, false};
    hostcuda::warp_collective(0xffffffffu, record, "any_lane", file, line);
    return record.result;
}

inline int warp_index(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return __shfl_sync(0xffffffffu, int(threadIdx.x / 32), 0, 32, file, line);
}

inline bool any_thread(bool condition, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return hostcuda_block_barrier(condition, file, line);
}

namespace hostcuda {

// A load from global memory by the lanes of a warp together, which is counted.
struct GlobalLoad {
    const void* address;  // null for a lane that takes no part
    unsigned bytes;

    static void combine(GlobalLoad* const (&lanes)[kWarpSize]) {
        const void* addresses[kWarpSize];
        unsigned bytes = 0;
        for (unsigned lane = 0; lane < kWarpSize; ++lane) {
            addresses[lane] = lanes[lane] == nullptr ? nullptr : lanes[lane]->address;
            if (addresses[lane] != nullptr) bytes = lanes[lane]->bytes;
        }
        hostcuda_count_global_load(addresses, bytes);
    }
};

}  // namespace hostcuda

template <typename T>
T load_or_zero(const T* global, bool exists, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    hostcuda::GlobalLoad record = {exists ? global : nullptr, sizeof(T)};
    hostcuda::warp_collective(0xffffffffu, record, "load_or_zero", file, line);
    return exists ? *global : T();
}

// To nearest even on the bits. A NaN keeps the top of its payload, by which poison is recognised, and becomes quiet: rounding
// it could carry into infinity. A GPU makes every bfloat16 NaN 0x7fff.
inline unsigned short float_to_bfloat_bits_rn(float value) {
    const unsigned bits = float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x0040u);
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__forceinline__ unsigned char* dynamic_shared_memory() { return hostcuda_shared_memory(); }

template <typename T>
void copy_async(T* shared, const T* global) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "cp.async copies 4, 8 or 16 bytes");
    hostcuda_copy_async(shared, global, sizeof(T), true);
}
template <int kShared, int kGlobal, typename T>
void copy_async_at(T* shared, const T* global) {
    copy_async(shared + kShared, global + kGlobal);
}
template <typename T>
void copy_async_if(T* shared, const T* global, bool exists) {
    if (exists) copy_async(shared, global);
}
inline void copy_async_wait() { hostcuda_copy_async_wait_all(); }

template <typename T>
void copy_async_or_zero(T* shared, const T* global, bool exists) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "cp.async copies 4, 8 or 16 bytes");
    hostcuda_copy_async(shared, global, sizeof(T), exists);
}
inline void copy_async_commit() { hostcuda_copy_async_commit(); }
template <int kPending>
void copy_async_wait_group() {
    static_assert(kPending >= 0, "a number of groups");
    hostcuda_copy_async_wait(kPending);
}

namespace hostcuda {

// ldmatrix. A lane reads its row before the lanes meet: the instruction does not order the memory accesses of different
// lanes, so a row that another lane has stored without a barrier in between may come too early.
template <unsigned n, bool transposed>
struct LoadMatrix {
    const void* address;
    unsigned short row[8];
    unsigned fragment[n];

    static void combine(LoadMatrix* const (&lanes)[kWarpSize]) {
        const void* addresses[8 * n];
        for (unsigned lane = 0; lane < 8 * n; ++lane) addresses[lane] = lanes[lane]->address;
        hostcuda_count_matrix_load(addresses, n);
        for (unsigned lane = 0; lane < kWarpSize; ++lane)
            for (unsigned matrix = 0; matrix < n; ++matrix) {
                LoadMatrix* const* const rows = &lanes[8 * matrix];
                const unsigned g = lane / 4, t = lane % 4;
                const unsigned low = transposed ? rows[2 * t]->row[g] : rows[g]->row[2 * t];
                const unsigned high = transposed ? rows[2 * t + 1]->row[g] : rows[g]->row[2 * t + 1];
                lanes[lane]->fragment[matrix] = low | high << 16;
            }
    }
};

template <unsigned n, bool transposed>
void load_matrix(unsigned (&fragment)[n], const void* shared_row, const char* name, const char* file, int line) {
    LoadMatrix<n, transposed> record;
    record.address = shared_row;
    hostcuda_read_matrix_row(shared_row, record.row);
    warp_collective(0xffffffffu, record, name, file, line);
    for (unsigned j = 0; j < n; ++j) fragment[j] = record.fragment[j];
}

template <int kind>
struct MultiplyMatrices : MatrixProduct {
    static void combine(MultiplyMatrices* const (&lanes)[kWarpSize]) {
        MatrixProduct* products[kWarpSize];
        for (unsigned lane = 0; lane < kWarpSize; ++lane) products[lane] = lanes[lane];
        hostcuda_multiply_matrices(kind, products);
    }
};

template <int kind>
void multiply_matrices(
    float (&d)[4], const unsigned* a, unsigned num_a, const unsigned* b, unsigned num_b, const char* name,
    const char* file, int line) {
    MultiplyMatrices<kind> record = {};
    for (unsigned i = 0; i < 4; ++i) record.d[i] = d[i];
    for (unsigned i = 0; i < num_a; ++i) record.a[i] = a[i];
    for (unsigned i = 0; i < num_b; ++i) record.b[i] = b[i];
    warp_collective(0xffffffffu, record, name, file, line);
    for (unsigned i = 0; i < 4; ++i) d[i] = record.d[i];
}

}  // namespace hostcuda

#define HOSTCUDA_LOAD_MATRIX(name, n, transposed) \
    inline void name( \
        unsigned (&fragment)[n], const void* shared_row, const char* file = __builtin_FILE(), \
        int line = __builtin_LINE()) { \
        hostcuda::load_matrix<n, transposed>(fragment, shared_row, #name, file, line); \
    }
HOSTCUDA_LOAD_MATRIX(load_matrix_x4, 4, false)
HOSTCUDA_LOAD_MATRIX(load_matrix_x4_transposed, 4, true)
#undef HOSTCUDA_LOAD_MATRIX

#define HOSTCUDA_MULTIPLY_MATRICES(name, kind) \
    inline void name( \
        float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const char* file = __builtin_FILE(), \
        int line = __builtin_LINE()) { \
        hostcuda::multiply_matrices<hostcuda::kind>(d, a, 4, b, 2, #name, file, line); \
    }
HOSTCUDA_MULTIPLY_MATRICES(multiply_matrices_f16, kF16K16)
HOSTCUDA_MULTIPLY_MATRICES(multiply_matrices_bf16, kBf16K16)
HOSTCUDA_MULTIPLY_MATRICES(multiply_matrices_tf32, kTf32K8)
#undef HOSTCUDA_MULTIPLY_MATRICES

inline void multiply_matrices_f16_k8(
    float (&d)[4], const unsigned (&a)[2], unsigned b, const char* file = __builtin_FILE(),
    int line = __builtin_LINE()) {
    hostcuda::multiply_matrices<hostcuda::kF16K8>(d, a, 2, &b, 1, "multiply_matrices_f16_k8", file, line);
}

namespace hostcuda {

template <typename T>
struct Argument {  // by value: a slot of the argument list points to the bytes
    static const T& get(void* slot) { return *static_cast<const T*>(slot); }
};
template <typename T>
struct Argument<T*> {  // a pointer: the slot is the pointer itself
    static T* get(void* slot) { return static_cast<T*>(slot); }
};

template <unsigned... i>
struct Indices {};
template <unsigned n, unsigned... i>
struct MakeIndices : MakeIndices<n - 1, n - 1, i...> {};
template <unsigned... i>
struct MakeIndices<0, i...> {
    typedef Indices<i...> type;
};

template <typename... Parameters, unsigned... i>
__forceinline__ void call(void (*kernel)(Parameters...), void* const* slots, Indices<i...>) {
    kernel(Argument<Parameters>::get(slots[i])...);
}

// Calls a kernel for the current thread.
template <typename... Parameters>
__forceinline__ void call(void (*kernel)(Parameters...), void* const* slots) {
    call(kernel, slots, typename MakeIndices<sizeof...(Parameters)>::type());
}

template <typename... Parameters>
constexpr unsigned count_parameters(void (*)(Parameters...)) {
    return sizeof...(Parameters);
}

}  // namespace hostcuda
