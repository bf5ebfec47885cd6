// The last step of every convolution and transposed convolution, from the sum of a result to the element that is stored.
//
//   output = round(sum + bias)
//
// Without a bias +0 is added, and the bias itself is added to +0 first. So a sum of zero comes out as +0, whatever signs of
// zero came up on the way, and a family may add products with zeros in place of taps that do not exist without changing a
// bit. (A negative sum too small for the output's dtype still rounds to -0.)

#pragma once

#include "common.cuh"

// The bias of the channel that `offset` leads to, as `finish` takes it.
__device__ __forceinline__ acc_t bias_or_zero(const result_t* bias, index_t offset) {
    return bias == nullptr ? scalar::zero() : add(scalar::load(bias[offset]), scalar::zero());
}

__device__ __forceinline__ result_t finish(acc_t sum, acc_t bias) { return scalar::round(add(sum, bias)); }

// The same where sum + bias is finite. Where it is not, the result is a NaN and *check, a zero before, becomes one.
__device__ __forceinline__ result_t finish_or_nan(acc_t sum, acc_t bias, acc_t* check) {
    const acc_t value = add(sum, bias);
    *check = multiply_add(scalar::zero(), value, *check);
    return scalar::round(multiply_add(scalar::zero(), value, value));
}
