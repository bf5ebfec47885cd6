// Rounding to TF32: float32 with the 10 leading bits of the fraction.

// To nearest, ties away from zero; the 13 low bits of the result are zero. A value that rounds past the largest TF32 number
// becomes an infinity, infinities and subnormals are values like any other, and a NaN stays one for the tensor cores too,
// which ignore the low bits: it becomes quiet.
__device__ __forceinline__ float round_to_tf32(float x) {
    const unsigned bits = float_as_uint(x);
    // In integers the carry of an all-ones fraction goes into the exponent, as it should.
    return uint_as_float(x == x ? (bits + 0x1000u) & 0xffffe000u : bits | 0x00400000u);
}
