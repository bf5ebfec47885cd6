// Every PTX instruction and CUDA intrinsic that gpuconv uses, each wrapped once in a function with a name.
//
// Only CUDA compilers see the bodies: on a host compiler the same names come from the header that runs the kernels on
// the CPU (tests/hostcuda), so everything after this file is the same text in both places.

#ifdef __CUDACC__

// w*x + acc with one rounding to nearest even.
__device__ __forceinline__ float fma_rn(float w, float x, float acc) { return __fmaf_rn(w, x, acc); }
__device__ __forceinline__ double fma_rn(double w, double x, double acc) { return __fma_rn(w, x, acc); }

// IEEE binary16 in the low bits of an unsigned short.
__device__ __forceinline__ float half_bits_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ unsigned short float_to_half_bits_rn(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float uint_as_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned float_as_uint(float value) { return __float_as_uint(value); }

// bfloat16 in an unsigned short, to nearest even; a NaN becomes any NaN.
__device__ __forceinline__ unsigned short float_to_bfloat_bits_rn(float value) {
#if __CUDA_ARCH__ >= 800
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    // A NaN keeps its sign and becomes quiet: rounding it could carry into infinity.
    const unsigned bits = float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x0040u);
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// blockIdx.x as a value that the compiler cannot know to be the one read before: what is derived from it is computed
// again instead of being kept in registers.
__device__ __forceinline__ unsigned block_index_again() {
    unsigned index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}

// The upper half of the 64-bit product.
__device__ __forceinline__ unsigned multiply_high(unsigned a, unsigned b) { return __umulhi(a, b); }

// The block's dynamic shared memory, 16-byte aligned. The only way to shared memory in gpuconv.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
    extern __shared__ uint4 dynamic_shared_memory_base[];
    return reinterpret_cast<unsigned char*>(dynamic_shared_memory_base);
}

// Copies sizeof(T) = 4, 8 or 16 bytes from global to shared memory, both aligned to that size. The copy is complete after
// copy_async_wait in this thread, and visible to others after a barrier behind it.
template <typename T>
__device__ __forceinline__ void copy_async(T* shared, const T* global) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(global), "n"(sizeof(T)) : "memory");
#else
    *shared = *global;
#endif
}
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#endif  // __CUDACC__
