// The fields with which Params begins in kernels that read the weights of a layer as they lie in memory.

#pragma once

#include "common.cuh"

struct Convolution {
    index_t L_in, L_out, K;
    index_t C_in_g, C_out_g;
    index_t stride, padding_left, dilation;
    index_t input_stride_n, input_stride_c, input_stride_l;
    index_t weight_stride_out, weight_stride_in, weight_stride_k;
    index_t bias_stride;
    index_t output_stride_n, output_stride_c, output_stride_l;
};
