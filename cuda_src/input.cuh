// How a sample of the input is loaded: unchanged, or, if INPUT_ACTIVATION is defined, through that function of activation.cuh,
// rounded to the dtype. activate.cu writes the same values to memory. See finish.cuh for the macros.

#pragma once

#include "activation.cuh"
#include "common.cuh"
#include "finish.cuh"

#ifdef INPUT_ACTIVATION
constexpr bool kLoadsAsStored = false;
#else
constexpr bool kLoadsAsStored = true;
#endif

// For one input channel. Positions outside the input are zeros whatever the activation, so they do not pass through it.
struct Loader {
#ifdef INPUT_ACTIVATION
    Parameters parameters;
#endif

    __device__ __forceinline__ storage_t operator()(storage_t sample) const {
#ifdef INPUT_ACTIVATION
        return scalar::round(activation::INPUT_ACTIVATION(scalar::load(sample), parameters));
#else
        return sample;
#endif
    }
    __device__ __forceinline__ StorageWords vector(const StorageWords& samples) const {
#ifdef INPUT_ACTIVATION
        StorageWords loaded;
#pragma unroll
        for (int e = 0; e < kStorageVec; ++e) set_element(loaded, e, (*this)(storage_t(element_of(samples, e))));
        return loaded;
#else
        return samples;
#endif
    }
};

// For all input channels.
struct InputActivation {
#if defined(INPUT_ACTIVATION) && !defined(INPUT_ACTIVATION_PARAMETER)
    ChannelArrays arrays;
#endif

    template <typename P>
    __device__ __forceinline__ explicit InputActivation(const P& p INPUT_ACTIVATION_PARAMETERS) {
#if defined(INPUT_ACTIVATION) && !defined(INPUT_ACTIVATION_PARAMETER)
        arrays = ChannelArrays{alpha, beta, p.input_activation_alpha_stride, p.input_activation_beta_stride};
#endif
    }
    // `c_in` counts the channels of all groups.
    __device__ __forceinline__ Loader channel(index_t c_in) const {
        Loader loader;
#if defined(INPUT_ACTIVATION) && defined(INPUT_ACTIVATION_PARAMETER)
        loader.parameters = Parameters{acc_t(INPUT_ACTIVATION_PARAMETER), acc_t(0)};
#elif defined(INPUT_ACTIVATION)
        loader.parameters = arrays.parameters(c_in);
#endif
        return loader;
    }
};
