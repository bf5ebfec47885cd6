// What every kernel shares: index_t, the dtypes (storage, accumulator, canonical multiply-add), the vector type, small
// arithmetic.
//
// Macros read: INDEX_BITS (32 or 64) and DTYPE (float16, bfloat16, float32, float64, complex64, complex128, or an integer dtype
// and that of its sums, such as int8_to_int64).

#pragma once

#include "ptx.cuh"

#if INDEX_BITS == 64
typedef long long index_t;
typedef unsigned long long uindex_t;
#else
typedef int index_t;
typedef unsigned uindex_t;
static_assert(INDEX_BITS == 32, "INDEX_BITS is 32 or 64: see index_bits in gpuconv/families/offsets.py");
#endif

// Element offsets are products of two index_t: the host chooses INDEX_BITS so that the largest one fits.

template <typename real_t>
struct alignas(2 * sizeof(real_t)) Complex {
    real_t re, im;
};

// The dtypes. Arrays hold elements of storage_t, sums have the type acc_t, bias and output hold result_t. The copies of
// copy_to_shared are complete after copy_async_wait.
namespace dtype {

// Numbers that are summed as they are stored.
template <typename T>
struct Unconverted {
    typedef T storage_t;
    typedef T acc_t;
    typedef T result_t;
    static __device__ __forceinline__ void copy_to_shared(acc_t* shared, const storage_t* global) {
        copy_async(shared, global);
    }
    static __device__ __forceinline__ void copy_to_shared(acc_t* shared, const storage_t* global, bool exists) {
        copy_async_or_zero(shared, global, exists);
    }
    static __device__ __forceinline__ storage_t storage_zero() { return T(); }
    static __device__ __forceinline__ acc_t zero() { return T(); }
    static __device__ __forceinline__ acc_t load(storage_t value) { return value; }
    static __device__ __forceinline__ storage_t round(acc_t value) { return value; }
};

// Numbers of 16 bits, which Bits converts to float32 and back.
template <typename Bits>
struct InFloat32 {
    typedef unsigned short storage_t;
    typedef float acc_t;
    typedef unsigned short result_t;
    static __device__ __forceinline__ void copy_to_shared(acc_t* shared, const storage_t* global) {
        *shared = load(*global);
    }
    static __device__ __forceinline__ void copy_to_shared(acc_t* shared, const storage_t* global, bool exists) {
        *shared = exists ? load(*global) : zero();
    }
    static __device__ __forceinline__ storage_t storage_zero() { return 0; }
    static __device__ __forceinline__ acc_t zero() { return 0.0f; }
    static __device__ __forceinline__ acc_t load(storage_t bits) { return Bits::load(bits); }
    static __device__ __forceinline__ storage_t round(acc_t value) { return Bits::round(value); }
};
struct HalfBits {
    static __device__ __forceinline__ float load(unsigned short bits) { return half_bits_to_float(bits); }
    static __device__ __forceinline__ unsigned short round(float value) { return float_to_half_bits_rn(value); }
};
struct BfloatBits {
    static __device__ __forceinline__ float load(unsigned short bits) { return uint_as_float(unsigned(bits) << 16); }
    static __device__ __forceinline__ unsigned short round(float value) { return float_to_bfloat_bits_rn(value); }
};

// Integers wrap around, which C++ defines for unsigned arithmetic only.
template <typename integer_t, typename unsigned_t, typename sum_t>
struct Integer {
    typedef integer_t storage_t;
    typedef unsigned_t acc_t;
    typedef sum_t result_t;
    static __device__ __forceinline__ storage_t storage_zero() { return 0; }
    static __device__ __forceinline__ acc_t zero() { return 0; }
    template <typename T>
    static __device__ __forceinline__ acc_t load(T value) {
        return acc_t(value);
    }
    static __device__ __forceinline__ result_t round(acc_t value) { return result_t(value); }
};

typedef Integer<signed char, unsigned long long, long long> int8_to_int64;
typedef Integer<unsigned char, unsigned long long, long long> uint8_to_int64;
typedef Integer<short, unsigned long long, long long> int16_to_int64;
typedef Integer<int, unsigned long long, long long> int32_to_int64;
typedef Integer<long long, unsigned long long, long long> int64_to_int64;
typedef Integer<signed char, unsigned, int> int8_to_int32;
typedef Integer<unsigned char, unsigned, int> uint8_to_int32;
typedef Integer<short, unsigned, int> int16_to_int32;
typedef Integer<int, unsigned, int> int32_to_int32;
typedef Integer<long long, unsigned, int> int64_to_int32;

typedef InFloat32<HalfBits> float16;
typedef InFloat32<BfloatBits> bfloat16;
typedef Unconverted<float> float32;
typedef Unconverted<double> float64;
typedef Unconverted<Complex<float>> complex64;
typedef Unconverted<Complex<double>> complex128;

}  // namespace dtype

typedef dtype::DTYPE scalar;
typedef scalar::storage_t storage_t;
typedef scalar::acc_t acc_t;
typedef scalar::result_t result_t;

// Neighbouring elements that are read or written at once; by default as many as 16 bytes hold.
template <typename T, int count = (sizeof(T) < 16 ? 16 / int(sizeof(T)) : 1)>
struct alignas(sizeof(T) * count) Vector {
    T element[count];
};
typedef Vector<storage_t> StorageVector;
typedef Vector<acc_t> AccVector;
constexpr int kStorageVec = 16 / int(sizeof(storage_t));  // elements of a StorageVector
constexpr int kAccVec = 16 / int(sizeof(acc_t));          // and of an AccVector

// Elements from the last 16-byte boundary to a pointer.
__device__ __forceinline__ int elements_past_boundary(const storage_t* pointer) {
    return int((unsigned long long)pointer / sizeof(storage_t) % kStorageVec);
}

// A StorageVector that keeps elements of 2 bytes in words, from which the compiler converts them without moves.
template <typename T>
struct InWords {
    typedef Vector<T> type;
};
template <>
struct InWords<unsigned short> {
    typedef Vector<unsigned> type;
};
typedef InWords<storage_t>::type StorageWords;

// One element of StorageWords. Elements must be set in ascending order.
template <typename T>
__device__ __forceinline__ T element_of(const Vector<T>& vector, int e) {
    return vector.element[e];
}
__device__ __forceinline__ unsigned short element_of(const Vector<unsigned>& words, int e) {
    return (unsigned short)(words.element[e / 2] >> 16 * (e % 2));
}
template <typename T>
__device__ __forceinline__ void set_element(Vector<T>& vector, int e, T value) {
    vector.element[e] = value;
}
__device__ __forceinline__ void set_element(Vector<unsigned>& words, int e, unsigned short value) {
    words.element[e / 2] = e % 2 == 0 ? unsigned(value) : words.element[e / 2] | unsigned(value) << 16;
}

// The canonical multiply-add: every family on CUDA cores accumulates with these, c_in outer and k inner.

__device__ __forceinline__ float multiply_add(float w, float x, float acc) { return fma_rn(w, x, acc); }
__device__ __forceinline__ double multiply_add(double w, double x, double acc) { return fma_rn(w, x, acc); }

__device__ __forceinline__ unsigned multiply_add(unsigned w, unsigned x, unsigned acc) { return w * x + acc; }
__device__ __forceinline__ unsigned long long multiply_add(
    unsigned long long w, unsigned long long x, unsigned long long acc) {
    return w * x + acc;
}

template <typename real_t>
__device__ __forceinline__ Complex<real_t> multiply_add(Complex<real_t> w, Complex<real_t> x, Complex<real_t> acc) {
    acc.re = fma_rn(w.re, x.re, acc.re);
    acc.re = fma_rn(-w.im, x.im, acc.re);
    acc.im = fma_rn(w.re, x.im, acc.im);
    acc.im = fma_rn(w.im, x.re, acc.im);
    return acc;
}

__device__ __forceinline__ bool is_nan(float a) { return a != a; }
__device__ __forceinline__ bool is_nan(double a) { return a != a; }
__device__ __forceinline__ bool is_nan(unsigned) { return false; }
__device__ __forceinline__ bool is_nan(unsigned long long) { return false; }

template <typename real_t>
__device__ __forceinline__ bool is_nan(Complex<real_t> a) {
    return a.re != a.re || a.im != a.im;
}

__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ double add(double a, double b) { return a + b; }
__device__ __forceinline__ unsigned add(unsigned a, unsigned b) { return a + b; }
__device__ __forceinline__ unsigned long long add(unsigned long long a, unsigned long long b) { return a + b; }

template <typename real_t>
__device__ __forceinline__ Complex<real_t> add(Complex<real_t> a, Complex<real_t> b) {
    return Complex<real_t>{a.re + b.re, a.im + b.im};
}

// ceil(a / b) for a >= 0, b > 0, without overflow.
__device__ __forceinline__ index_t ceil_div(index_t a, index_t b) { return a / b + (a % b != 0); }

__device__ __forceinline__ index_t min_index(index_t a, index_t b) { return a < b ? a : b; }
__device__ __forceinline__ index_t max_index(index_t a, index_t b) { return a > b ? a : b; }

// 0 <= i < extent, in one comparison.
__device__ __forceinline__ bool is_index(index_t i, index_t extent) { return uindex_t(i) < uindex_t(extent); }

// value / divisor for 0 <= value < 2^31, by the host's magic number (Divisor in families/depthwise.py); with 64-bit indices by
// a division.
__device__ __forceinline__ index_t divide(index_t value, index_t divisor, index_t magic, index_t shift) {
#if INDEX_BITS == 32
    return divisor == 1 ? value : index_t(multiply_high(unsigned(value), unsigned(magic)) >> shift);
#else
    return value / divisor;
#endif
}

// The index along the fastest dimension of a grid, of length `extent`; `block` becomes the index along the others. A grid has
// fewer than 2**31 blocks, so 32 bits suffice.
__device__ __forceinline__ unsigned next_index(unsigned& block, index_t extent) {
    const unsigned others = block / unsigned(extent);
    const unsigned index = block - others * unsigned(extent);
    block = others;
    return index;
}
