// Every PTX instruction and CUDA intrinsic that gpuconv uses, each wrapped once in a function with a name.
//
// Only CUDA compilers see the bodies: on a host compiler the same names come from the header that runs the kernels on
// the CPU (tests/hostcuda), so everything after this file is the same text in both places.

#pragma once

#ifdef __CUDACC__

// w*x + acc with one rounding to nearest even.
__device__ __forceinline__ float fma_rn(float w, float x, float acc) { return __fmaf_rn(w, x, acc); }
__device__ __forceinline__ double fma_rn(double w, double x, double acc) { return __fma_rn(w, x, acc); }

// Rounded to nearest even as written: the compiler does not contract them with what follows.
__device__ __forceinline__ float add_rn(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add_rn(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float multiply_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float divide_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ double divide_rn(double a, double b) { return __ddiv_rn(a, b); }
__device__ __forceinline__ float absolute(float a) { return fabsf(a); }
__device__ __forceinline__ double absolute(double a) { return fabs(a); }

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
__device__ __forceinline__ float magnitude(float value) { return fabsf(value); }

// The words of a binary64.
__device__ __forceinline__ unsigned low_word(double value) { return unsigned(__double2loint(value)); }
__device__ __forceinline__ double words_as_double(unsigned high, unsigned low) {
    return __hiloint2double(int(high), int(low));
}

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

// blockIdx.x, hidden from the compiler's knowledge that it was read before: values derived from it are computed again instead
// of being kept in registers.
__device__ __forceinline__ unsigned block_index_again() {
    unsigned index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}

// The same value, hidden from the compiler's knowledge of how it was computed: it stays in registers instead of being
// computed again wherever it is used. keep_in_register_shared and keep_in_register_global are for pointers of which the
// compiler must go on to know that they lead to shared memory, where they are 32 bits wide, or to global memory.
template <typename T>
__device__ __forceinline__ T* keep_in_register(T* pointer) {
    asm("" : "+l"(pointer));
    return pointer;
}
__device__ __forceinline__ int keep_in_register(int value) {
    asm("" : "+r"(value));
    return value;
}
__device__ __forceinline__ long long keep_in_register(long long value) {
    asm("" : "+l"(value));
    return value;
}
// Also hidden is what follows from it, which else might be computed before a loop and take registers there.
__device__ __forceinline__ int keep_in_loop(int value) {
    asm volatile("" : "+r"(value));
    return value;
}
__device__ __forceinline__ long long keep_in_loop(long long value) {
    asm volatile("" : "+l"(value));
    return value;
}
template <typename T>
__device__ __forceinline__ T* keep_in_register_shared(T* pointer) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(pointer));
    asm("" : "+r"(address));
    return static_cast<T*>(__cvta_shared_to_generic(address));
}
template <typename T>
__device__ __forceinline__ T* keep_in_register_global(T* pointer) {
    unsigned long long address = __cvta_generic_to_global(pointer);
    asm("" : "+l"(address));
    return static_cast<T*>(__cvta_global_to_generic(address));
}

// The upper half of the 64-bit product.
__device__ __forceinline__ unsigned multiply_high(unsigned a, unsigned b) { return __umulhi(a, b); }

// Four of the bytes of a (0 to 3) and b (4 to 7): byte i of the result is the one that hexadecimal digit i of order names.
__device__ __forceinline__ unsigned permute_bytes(unsigned a, unsigned b, unsigned order) {
    unsigned bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(order));
    return bytes;
}

// The lower half of the 64-bit number {high, low} shifted right by bits % 32.
__device__ __forceinline__ unsigned funnel_shift_right(unsigned low, unsigned high, int bits) {
    return __funnelshift_r(low, high, bits);
}

// The block's dynamic shared memory, 16-byte aligned. Kernels reach shared memory by this function alone.
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
// The same of the elements at offsets of the pointers, which become part of the instruction where they are small.
template <int kShared, int kGlobal, typename T>
__device__ __forceinline__ void copy_async_at(T* shared, const T* global) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0 + %3], [%1 + %4], %2;"
        ::"r"(address), "l"(global), "n"(sizeof(T)), "n"(kShared * int(sizeof(T))), "n"(kGlobal * int(sizeof(T)))
        : "memory");
#else
    shared[kShared] = global[kGlobal];
#endif
}
// The same if `exists`, else nothing: without the branches that a condition around a copy becomes.
template <typename T>
__device__ __forceinline__ void copy_async_if(T* shared, const T* global, bool exists) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile(
        "{.reg .pred %%exists; setp.ne.u32 %%exists, %3, 0; @%%exists cp.async.ca.shared.global [%0], [%1], %2;}"
        ::"r"(address), "l"(global), "n"(sizeof(T)), "r"(unsigned(exists)) : "memory");
#else
    if (exists) *shared = *global;
#endif
}
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The same with zeros in place of the data where `exists` is false: then `global` is not read, but must be aligned.
template <typename T>
__device__ __forceinline__ void copy_async_or_zero(T* shared, const T* global, bool exists) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared)), bytes = exists ? sizeof(T) : 0;
    if (sizeof(T) == 16)  // past the L1 cache, which only this size can be
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
            ::"r"(address), "l"(global), "n"(sizeof(T)), "r"(bytes) : "memory");
#else
    *shared = exists ? *global : T();
#endif
}

// Closes a group: this thread's copies since the last one. copy_async_wait_group waits until at most the kPending groups
// closed last are on their way; copies that no group has closed are not waited for.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
__device__ __forceinline__ void copy_async_wait_group() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Whether the condition of any thread of the block holds. A barrier of all of them, as __syncthreads is.
__device__ __forceinline__ bool any_thread(bool condition) { return __syncthreads_or(condition); }

// All lanes of a warp must call the functions below together. g = lane/4 and t = lane%4.

// The thread's warp. The compiler knows of a shuffled value that all lanes share it: so lanes that branch by it stay together,
// and there is no second copy of what they do together for lanes that have parted.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, int(threadIdx.x / 32), 0); }

// Whether any lane's condition holds.
__device__ __forceinline__ bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }

// The value in global memory if it exists, else zeros.
template <typename T>
__device__ __forceinline__ T load_or_zero(const T* global, bool exists) { return exists ? *global : T(); }

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones) from shared memory. Lane i gives the address of row i%8 of
// matrix i/8, 16 bytes, aligned. fragment[j]: elements 2t and 2t+1 of row g of matrix j (the 32-bit element t of that row).
__device__ __forceinline__ void load_matrix_x4(unsigned (&fragment)[4], const void* shared_row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared_row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(address) : "memory");
}
// Each matrix transposed: fragment[j]: elements g of rows 2t and 2t+1 of matrix j.
__device__ __forceinline__ void load_matrix_x4_transposed(unsigned (&fragment)[4], const void* shared_row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared_row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3]) : "r"(address) : "memory");
}

// d[16][8] = a[16][k] * b[k][8] + d by the tensor cores. Fragments, of 16-bit elements low half first:
//   d[0..3]         d(g, 2t), d(g, 2t+1), d(g+8, 2t), d(g+8, 2t+1)
//   k 16: a[0..3]   a(g, 2t..), a(g+8, 2t..), a(g, 2t+8..), a(g+8, 2t+8..), two elements along k each
//         b[0..1]   b(2t.., g), b(2t+8.., g), two elements along k each
//   k 8:  a[0..1]   a(g, 2t..), a(g+8, 2t..);  b: b(2t.., g)
//   tf32: a[0..3]   a(g, t), a(g+8, t), a(g, t+4), a(g+8, t+4);  b[0..1]: b(t, g), b(t+4, g)
// Sums are not IEEE arithmetic: products are exact, but terms are aligned to the largest one and cut off 24 or 25 bits
// below its leading bit, and results are rounded toward zero. Subnormals count, in and out; any NaN comes out as 0x7fffffff.

__device__ __forceinline__ void multiply_matrices_f16_k8(float (&d)[4], const unsigned (&a)[2], unsigned b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// sm_75 has the float16 product of depth 8 alone. A kernel that names the others does not compile for it.
__device__ __forceinline__ void multiply_matrices_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const unsigned first[2] = {a[0], a[1]}, second[2] = {a[2], a[3]};
    multiply_matrices_f16_k8(d, first, b[0]);
    multiply_matrices_f16_k8(d, second, b[1]);
}
__device__ void multiply_matrices_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) = delete;
__device__ void multiply_matrices_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) = delete;
#else
__device__ __forceinline__ void multiply_matrices_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_matrices_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The operands are float32 of which the low 13 bits are ignored, so that they are rounded toward zero: round first.
__device__ __forceinline__ void multiply_matrices_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#endif  // __CUDACC__
