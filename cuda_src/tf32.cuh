// Rounding to TF32: float32 with the 10 leading bits of the fraction.

#pragma once

#include "ptx.cuh"

// To nearest, ties away from zero; the 13 low bits of the result are zero. A value that rounds past the largest TF32
// number becomes an infinity. Infinities and subnormals are treated like other values. A NaN becomes quiet, so that it is still
// a NaN for the tensor cores, which ignore the low bits.
__device__ __forceinline__ float round_to_tf32(float x) {
    const unsigned bits = float_as_uint(x);
    // In integers the carry of an all-ones fraction goes into the exponent, as it should.
    return uint_as_float(x == x ? (bits + 0x1000u) & 0xffffe000u : bits | 0x00400000u);
}

// The same, except that finite values stay finite: those that would overflow become the largest TF32 number.
__device__ __forceinline__ float round_to_finite_tf32(float x) {
    const unsigned bits = float_as_uint(x), last = 0x7f7fe000u;
    const bool rounds_up = (bits & 0x7fffffffu) > last && (bits & 0x7f800000u) != 0x7f800000u;
    return rounds_up ? uint_as_float((bits & 0x80000000u) | last) : round_to_tf32(x);
}

// x = *hi + *lo, where *hi is a TF32 number and |*lo| <= 2^-11 |x|. From 2^-102 on the last bit of x is a normal number, so
// that the difference is exact even where subnormals are flushed, and below 2^127 rounding up cannot overflow. Subnormals
// are flushed to zero. Other values give a NaN for *hi.
__device__ __forceinline__ void split_tf32(float x, float* hi, float* lo) {
    const unsigned bits = float_as_uint(x), magnitude = bits & 0x7fffffffu;
    const bool is_zero = magnitude < 1u << 23;
    const unsigned smallest = 25u << 23, end = 254u << 23;
    const unsigned rounded = is_zero ? 0 : (bits + 0x1000u) & 0xffffe000u;
    *lo = is_zero ? 0.0f : x - uint_as_float(rounded);
    *hi = uint_as_float(is_zero || magnitude - smallest < end - smallest ? rounded : 0x7fffffffu);
}
