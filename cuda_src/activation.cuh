// The activations, as functions of a real accumulator; gpuconv/fusion.py has their formulas.
//
// They consist of operations that are rounded as written, so that every kernel and every architecture gives the same bits.
// The error of each is at most ULPS units in the last place (gpuconv/fusion.py; gelu has one more unit of x, since its exponent
// has a power of x), or TINY times the smallest normal number where an exponential underflows. At infinities they have their
// limits. A NaN stays a NaN: comparisons with it are false.
//
// Macros read: those of common.cuh. Without ACTIVATION and INPUT_ACTIVATION (finish.cuh) this file is empty.

#pragma once

#include "common.cuh"

#if defined(ACTIVATION) || defined(INPUT_ACTIVATION)

// The parameters of a function besides x: leaky_relu's slope, elu's alpha, or snake's alpha and 1/beta of the channel.
struct Parameters {
    acc_t first, second;
};

// The arrays of snake; where beta is null, it is alpha.
struct ChannelArrays {
    const storage_t *alpha, *beta;
    index_t alpha_stride, beta_stride;

    __device__ __forceinline__ Parameters parameters(index_t channel) const {
        const acc_t first = scalar::load(alpha[channel * alpha_stride]);
        const acc_t second = beta == nullptr ? first : scalar::load(beta[channel * beta_stride]);
        return Parameters{first, divide_rn(acc_t(1), second)};
    }
};

namespace activation {

// c_0*x^n + ... + c_n by Horner's rule.
template <typename real_t>
__device__ __forceinline__ real_t polynomial(real_t, real_t last) {
    return last;
}
template <typename real_t, typename... Rest>
__device__ __forceinline__ real_t polynomial(real_t x, real_t first, real_t second, Rest... rest) {
    return polynomial(x, fma_rn(first, x, second), rest...);
}

// The constants of a type. exponential(r) is (exp(r) - 1 - r)/r^2 where |r| <= log(2)/2, sine(r^2) is (sin(r)/r - 1)/r^2 where
// |r| <= pi/2, and tail(t) is P in erfc(a/sqrt(2))/2 = exp(-a*a/2) * P(t)/(a + k) with t = (a - k)/(a + k), k = tail_shift; all
// are fitted at Chebyshev points. gpuconv/cpu/activations.py has the source of the last.
template <typename real_t>
struct Numbers;

template <>
struct Numbers<float> {
    // 1.5 * 2^23: adding it rounds a number to an integer
    static __device__ __forceinline__ float rounder() { return 12582912.0f; }
    static __device__ __forceinline__ float log2_e() { return 1.44269502f; }
    static __device__ __forceinline__ float ln2_high() { return 0.693359375f; }
    static __device__ __forceinline__ float ln2_low() { return -2.12194442e-4f; }
    static __device__ __forceinline__ float inverse_pi() { return 0.318309873f; }
    static __device__ __forceinline__ float pi_high() { return 3.14159274f; }
    static __device__ __forceinline__ float pi_low() { return -8.74227766e-8f; }
    static __device__ __forceinline__ float tail_shift() { return 4.0f; }
    // From these values on, exp(-x), exp(-x*x/2) and gelu_tanh(-x) are taken as zero.
    static __device__ __forceinline__ float exponential_end() { return 87.5f; }
    static __device__ __forceinline__ float tail_end() { return 13.0f; }
    static __device__ __forceinline__ float gelu_tanh_end() { return 10.0f; }
    // From this value on, the argument has a rounding error of a quarter or more.
    static __device__ __forceinline__ float sine_end() { return 4194304.0f; }
    static __device__ __forceinline__ float exponential(float r) {
        return polynomial(
            r, 1.98910799e-4f, 1.39337312e-3f, 8.33331048e-3f, 4.1666463e-2f, 1.66666672e-1f, 0.5f);
    }
    static __device__ __forceinline__ float sine(float z) {
        return polynomial(z, -2.40792364e-8f, 2.75364232e-6f, -1.98410853e-4f, 8.33333284e-3f, -1.66666672e-1f);
    }
    static __device__ __forceinline__ float tail(float t) {
        return polynomial(
            t, -0.000117137752f, 0.000208466168f, 0.00157600967f, -0.00352875562f, -0.00753153441f, 0.0604068227f,
            -0.18652235f, 0.387136698f, -0.607896626f, 0.755285144f);
    }
    // 2^n from rounder + n, where -127 <= n <= 127; 0 instead of 2^-127.
    static __device__ __forceinline__ float power_of_two(float shifted) {
        return uint_as_float((float_as_uint(shifted) << 23) + 0x3f800000u);
    }
};

template <>
struct Numbers<double> {
    // 1.5 * 2^52
    static __device__ __forceinline__ double rounder() { return 6755399441055744.0; }
    static __device__ __forceinline__ double log2_e() { return 1.4426950408889634; }
    static __device__ __forceinline__ double ln2_high() { return 0.6931471805598903; }
    static __device__ __forceinline__ double ln2_low() { return 5.497923018708371e-14; }
    static __device__ __forceinline__ double inverse_pi() { return 0.3183098861837907; }
    static __device__ __forceinline__ double pi_high() { return 3.141592653589793; }
    static __device__ __forceinline__ double pi_low() { return 1.2246467991473532e-16; }
    static __device__ __forceinline__ double tail_shift() { return 5.0; }
    static __device__ __forceinline__ double exponential_end() { return 708.0; }
    static __device__ __forceinline__ double tail_end() { return 37.5; }
    static __device__ __forceinline__ double gelu_tanh_end() { return 21.0; }
    static __device__ __forceinline__ double sine_end() { return 2251799813685248.0; }
    static __device__ __forceinline__ double exponential(double r) {
        return polynomial(
            r, 2.09147553258932e-09, 2.5105312729622103e-08, 2.755727347871858e-07, 2.755725517000089e-06,
            2.480158732567746e-05, 0.0001984126987500228, 0.0013888888888883711, 0.008333333333326084,
            0.04166666666666667, 0.1666666666666667, 0.5);
    }
    static __device__ __forceinline__ double sine(double z) {
        return polynomial(
            z, -8.005858059980551e-18, 2.810466816590253e-15, -7.647139048550473e-13, 1.605904347799452e-10,
            -2.505210838237619e-08, 2.7557319223971175e-06, -0.00019841269841269806, 0.008333333333333333,
            -0.16666666666666666);
    }
    static __device__ __forceinline__ double tail(double t) {
        return polynomial(
            t, -3.817059749433349e-10, -1.1613988117963691e-09, 2.2201175016558965e-09, 1.0798061850653808e-08,
            -8.553364558046826e-09, -7.014184378551324e-08, 4.017523150089386e-08, 4.362911487401573e-07,
            -3.345721937861036e-07, -2.770719146152548e-06, 3.97980433807949e-06, 1.6681639003552632e-05,
            -4.976245606842442e-05, -5.937580719746401e-05, 0.0005448989927521901, -0.0007978693893219596,
            -0.00299337676186944, 0.020795066799262733, -0.06911863870687801, 0.16502036617040702, -0.31353315667128745,
            0.4953056159699761, -0.6653825028900568, 0.769193049750063);
    }
    static __device__ __forceinline__ double power_of_two(double shifted) {
        return words_as_double((low_word(shifted) + 1023u) << 20, 0u);
    }
};

// exp(x) = power * (1 + fraction), where |x| < exponential_end.
template <typename real_t>
struct Exponential {
    real_t power, fraction;

    __device__ __forceinline__ explicit Exponential(real_t x) {
        typedef Numbers<real_t> N;
        const real_t shifted = fma_rn(x, N::log2_e(), N::rounder());
        const real_t n = add_rn(shifted, -N::rounder());
        const real_t r = fma_rn(-n, N::ln2_low(), fma_rn(-n, N::ln2_high(), x));
        power = N::power_of_two(shifted);
        fraction = fma_rn(multiply_rn(r, r), N::exponential(r), r);
    }
    __device__ __forceinline__ real_t value() const { return fma_rn(power, fraction, power); }
    __device__ __forceinline__ real_t minus_one() const { return fma_rn(power, fraction, add_rn(power, real_t(-1))); }
};

template <typename real_t>
__device__ __forceinline__ real_t relu(real_t x, const Parameters&) {
    return x < 0 ? real_t(0) : x;
}

template <typename real_t>
__device__ __forceinline__ real_t leaky_relu(real_t x, const Parameters& p) {
    return x < 0 ? multiply_rn(p.first, x) : x;
}

template <typename real_t>
__device__ __forceinline__ real_t elu(real_t x, const Parameters& p) {
    const real_t below = x <= -Numbers<real_t>::exponential_end() ? real_t(-1) : Exponential<real_t>(x).minus_one();
    return x < 0 ? multiply_rn(p.first, below) : x;
}

template <typename real_t>
__device__ __forceinline__ real_t tanh(real_t x, const Parameters&) {
    const real_t a = absolute(x);
    const real_t m = Exponential<real_t>(multiply_rn(real_t(-2), a)).minus_one();
    const real_t value = a >= 22 ? real_t(1) : divide_rn(add_rn(real_t(0), -m), add_rn(m, real_t(2)));
    return x < 0 ? -value : value;
}

template <typename real_t>
__device__ __forceinline__ real_t sigmoid(real_t x, const Parameters&) {
    const real_t a = absolute(x);
    const real_t small = a >= Numbers<real_t>::exponential_end() ? real_t(0) : Exponential<real_t>(-a).value();
    return divide_rn(x < 0 ? small : real_t(1), add_rn(small, real_t(1)));
}

// x / (1 + exp(-y)), where y has the sign of x and is finite, or a NaN.
template <typename real_t>
__device__ __forceinline__ real_t gated(real_t x, real_t y) {
    const real_t small = Exponential<real_t>(-absolute(y)).value();
    return divide_rn(x < 0 ? multiply_rn(x, small) : x, add_rn(small, real_t(1)));
}

template <typename real_t>
__device__ __forceinline__ real_t silu(real_t x, const Parameters& p) {
    return absolute(x) >= Numbers<real_t>::exponential_end() ? relu(x, p) : gated(x, x);
}

template <typename real_t>
__device__ __forceinline__ real_t gelu_tanh(real_t x, const Parameters& p) {
    const real_t slope = real_t(1.5957691216057308), cubic = real_t(0.07135481627260025);  // 2*sqrt(2/pi), 0.044715 times it
    const real_t y = multiply_rn(x, fma_rn(multiply_rn(x, x), cubic, slope));
    return absolute(x) >= Numbers<real_t>::gelu_tanh_end() ? relu(x, p) : gated(x, y);
}

template <typename real_t>
__device__ __forceinline__ real_t gelu(real_t x, const Parameters& p) {
    typedef Numbers<real_t> N;
    const real_t a = absolute(x);
    const real_t inverse = divide_rn(real_t(1), add_rn(a, N::tail_shift()));
    const real_t t = multiply_rn(add_rn(a, -N::tail_shift()), inverse);
    const real_t bell = Exponential<real_t>(multiply_rn(multiply_rn(real_t(-0.5), a), a)).value();
    const real_t beyond = multiply_rn(multiply_rn(N::tail(t), inverse), bell);  // the normal distribution's tail beyond a
    return a >= N::tail_end() ? relu(x, p) : fma_rn(-a, beyond, relu(x, p));
}

template <typename real_t>
__device__ __forceinline__ real_t snake(real_t x, const Parameters& p) {
    typedef Numbers<real_t> N;
    const real_t angle = multiply_rn(p.first, x);
    // The square of the sine has the period pi. If the rounding error of an angle spans a period, any value is right.
    const real_t n = add_rn(fma_rn(angle, N::inverse_pi(), N::rounder()), -N::rounder());
    const real_t reduced = fma_rn(-n, N::pi_low(), fma_rn(-n, N::pi_high(), angle));
    const real_t r = absolute(angle) >= N::sine_end() ? real_t(0) : reduced;
    const real_t z = multiply_rn(r, r);
    const real_t sine = fma_rn(multiply_rn(r, z), N::sine(z), r);
    return fma_rn(multiply_rn(sine, sine), p.second, x);
}

}  // namespace activation

#endif
