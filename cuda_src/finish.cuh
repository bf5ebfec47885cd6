// The last step of every convolution and transposed convolution, from the sum of a result to the element that is stored.
//
//   output = round(activation(sum + bias + residual))
//
// Without a bias +0 is added, and the bias itself is first added to +0. So a sum of zero becomes +0, whatever the signs of the
// zeros in it, and families may add products with zeros for taps that do not exist without changing a bit. (A negative sum too
// small for the output's dtype still rounds to -0.)
//
// Optional macros say what is fused (gpuconv/families/fused.py):
//   ACTIVATION            a function of activation.cuh, with ACTIVATION_PARAMETER unless its parameters are arrays
//   HAS_RESIDUAL          the residual is an array with the strides of the output
//   INPUT_ACTIVATION      with INPUT_ACTIVATION_PARAMETER: see input.cuh
// A kernel has FUSED_ARGUMENTS before its Params and FUSED_FIELDS at the end of them. It makes its Epilogue with FUSED_VALUES,
// and, where it applies the activation of the input, its InputActivation with INPUT_ACTIVATION_VALUES.

#pragma once

#include "activation.cuh"
#include "common.cuh"

#ifdef HAS_RESIDUAL
#define RESIDUAL_ARGUMENT const result_t* __restrict__ residual, /* [N, C_out, L_out] */
#define RESIDUAL_VALUE , residual
#define RESIDUAL_PARAMETER , const result_t* residual
constexpr bool kHasResidual = true;
#else
#define RESIDUAL_ARGUMENT
#define RESIDUAL_VALUE
#define RESIDUAL_PARAMETER
constexpr bool kHasResidual = false;
#endif

#if defined(ACTIVATION) && !defined(ACTIVATION_PARAMETER)
#define ACTIVATION_ARGUMENTS \
    const storage_t* __restrict__ activation_alpha, const storage_t* __restrict__ activation_beta, /* [C_out] each */
#define ACTIVATION_FIELDS index_t activation_alpha_stride, activation_beta_stride;
#define ACTIVATION_VALUES , activation_alpha, activation_beta
#define ACTIVATION_PARAMETERS , const storage_t* alpha, const storage_t* beta
#else
#define ACTIVATION_ARGUMENTS
#define ACTIVATION_FIELDS
#define ACTIVATION_VALUES
#define ACTIVATION_PARAMETERS
#endif

#if defined(INPUT_ACTIVATION) && !defined(INPUT_ACTIVATION_PARAMETER)
#define INPUT_ACTIVATION_ARGUMENTS \
    const storage_t* __restrict__ input_activation_alpha,  /* [C_in] */ \
    const storage_t* __restrict__ input_activation_beta,   /* [C_in] */
#define INPUT_ACTIVATION_FIELDS index_t input_activation_alpha_stride, input_activation_beta_stride;
#define INPUT_ACTIVATION_VALUES , input_activation_alpha, input_activation_beta
#define INPUT_ACTIVATION_PARAMETERS , const storage_t* alpha, const storage_t* beta
#else
#define INPUT_ACTIVATION_ARGUMENTS
#define INPUT_ACTIVATION_FIELDS
#define INPUT_ACTIVATION_VALUES
#define INPUT_ACTIVATION_PARAMETERS
#endif

#if defined(HAS_RESIDUAL) || defined(ACTIVATION)
constexpr bool kIsFused = true;  // more than the bias
#else
constexpr bool kIsFused = false;
#endif

#define FUSED_ARGUMENTS RESIDUAL_ARGUMENT ACTIVATION_ARGUMENTS INPUT_ACTIVATION_ARGUMENTS
#define FUSED_FIELDS ACTIVATION_FIELDS INPUT_ACTIVATION_FIELDS
#define FUSED_VALUES RESIDUAL_VALUE ACTIVATION_VALUES

// What the results of one output channel need to be finished.
struct Channel {
    acc_t bias;
#ifdef ACTIVATION
    Parameters parameters;
#endif
#ifdef HAS_RESIDUAL
    long long residual_shift;  // bytes from an element of the output to that of the residual
#endif
};

// The same for all output channels.
struct Epilogue {
    const result_t* bias;
    index_t bias_stride;
#if defined(ACTIVATION) && !defined(ACTIVATION_PARAMETER)
    ChannelArrays arrays;
#endif
#ifdef HAS_RESIDUAL
    long long residual_shift;
#endif

    // `output` is the kernel's argument.
    template <typename P>
    __device__ __forceinline__ Epilogue(
        const result_t* bias, const result_t* output, const P& p RESIDUAL_PARAMETER ACTIVATION_PARAMETERS)
        : bias(bias), bias_stride(p.bias_stride) {
#if defined(ACTIVATION) && !defined(ACTIVATION_PARAMETER)
        arrays = ChannelArrays{alpha, beta, p.activation_alpha_stride, p.activation_beta_stride};
#endif
#ifdef HAS_RESIDUAL
        residual_shift = reinterpret_cast<long long>(residual) - reinterpret_cast<long long>(output);
#endif
    }

    __device__ __forceinline__ acc_t bias_of(index_t c_out) const {
        return bias == nullptr ? scalar::zero() : add(scalar::load(bias[c_out * bias_stride]), scalar::zero());
    }
    __device__ __forceinline__ Channel channel(index_t c_out) const { return channel(c_out, bias_of(c_out)); }
    // The same with a bias that was loaded before.
    __device__ __forceinline__ Channel channel(index_t c_out, acc_t channel_bias) const {
        Channel found;
        found.bias = channel_bias;
#if defined(ACTIVATION) && defined(ACTIVATION_PARAMETER)
        found.parameters = Parameters{acc_t(ACTIVATION_PARAMETER), acc_t(0)};
#elif defined(ACTIVATION)
        found.parameters = arrays.parameters(c_out);
#endif
#ifdef HAS_RESIDUAL
        found.residual_shift = residual_shift;
#endif
        return found;
    }
};

// `place` is where the result belongs in the output, or null where it will not be stored.
__device__ __forceinline__ acc_t add_addends(acc_t sum, const Channel& channel, const result_t* place) {
    acc_t value = add(sum, channel.bias);
#ifdef HAS_RESIDUAL
    if (place != nullptr) {
        const char* const residual = reinterpret_cast<const char*>(place) + channel.residual_shift;
        value = add(value, scalar::load(*reinterpret_cast<const result_t*>(residual)));
    }
#endif
    return value;
}

__device__ __forceinline__ acc_t activate(acc_t value, const Channel& channel) {
#ifdef ACTIVATION
    return activation::ACTIVATION(value, channel.parameters);
#else
    return value;
#endif
}

__device__ __forceinline__ result_t finish(acc_t sum, const Channel& channel, const result_t* place) {
    return scalar::round(activate(add_addends(sum, channel, place), channel));
}

// Threads with many sums finish them in two steps, so that one loop body is used for all: this function applies what is fused,
// then round_finished rounds. In that loop the sums rotate through the registers: each moves by one place, and finished sums
// enter at the end.
__device__ __forceinline__ acc_t finish_unrounded(acc_t sum, const Channel& channel, const result_t* place) {
    return activate(add_addends(sum, channel, place), channel);
}
__device__ __forceinline__ result_t round_finished(acc_t value) { return scalar::round(value); }

// The same where sum + bias is finite. Where it is not, the result is a NaN and *check, a zero before, becomes one.
__device__ __forceinline__ result_t finish_or_nan(acc_t sum, acc_t bias, acc_t* check) {
    const acc_t value = add(sum, bias);
    *check = multiply_add(scalar::zero(), value, *check);
    return scalar::round(multiply_add(scalar::zero(), value, value));
}
