// bias_gradient_rows: gradient of the bias, the sum of each channel over samples and positions.
//
//   grad_bias[c] = sum over n < N, l < L of grad_output[n, c, l]
//
// The positions (n, l), l fastest, are cut into slices as in slices.cuh, where coarse stands for grad_output. In a slice,
// thread t of a block adds the positions t, t + BLOCK_SIZE, ...; then the upper half of the threads' sums is added to the
// lower half until one sum is left. So the order of summation depends on the problem's shape alone.
//
// Grid x: blocks, one for each (slice, c), c fastest; where the grid is shorter, blocks take several. Grid y and z: 1.
// Dynamic shared memory: one sum for each thread.
// With several slices their sums are stored in `partial` and sum_slices.cu follows; with one slice `partial` is null.
// Takes arrays of any strides, in elements, and samples of different lengths (samples.cuh).

#include "common.cuh"
#include "slices.cuh"

struct Params {
    index_t num_sums;  // slices * C
    index_t N, C, L_coarse;
    index_t slice_samples, slice_positions, slice_pieces;
    // How a thread's position and address advance by BLOCK_SIZE positions; the address by `carry` more where the position
    // passes the end of a sample.
    index_t step_l, advance, carry;
    index_t grad_output_stride_n, grad_output_stride_c, grad_output_stride_l;
    index_t grad_bias_stride;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "Params differs from gpuconv/families/bias_gradient_rows.py");

extern "C" __global__ void __launch_bounds__(BLOCK_SIZE, 8) bias_gradient_rows(
    const storage_t* __restrict__ grad_output,  // [N, C, L_coarse]
    acc_t* __restrict__ partial,                // [slices, C], or null
    storage_t* __restrict__ grad_bias,          // [C], or null
    SAMPLES_ARGUMENT const Params p) {
    acc_t* const smem_sums = reinterpret_cast<acc_t*>(dynamic_shared_memory());
    const index_t n_first = index_t(threadIdx.x) / p.L_coarse;
    const index_t l_first = index_t(threadIdx.x) - n_first * p.L_coarse;
    for (index_t i = blockIdx.x; i < p.num_sums; i += gridDim.x) {
        const index_t slice = i / p.C, c = i - slice * p.C;
        const Slice s = find_slice(slice, p);
        const index_t terms = (s.n_end - s.n_begin) * (s.l_end - s.l_begin);
        const storage_t* x = grad_output + c * p.grad_output_stride_c +
                             ((s.n_begin + n_first) * p.grad_output_stride_n +
                              (s.l_begin + l_first) * p.grad_output_stride_l);
        index_t l = s.l_begin + l_first;
#ifdef LENGTHS
        index_t n = s.n_begin + n_first;
#endif
        acc_t sum = scalar::zero();
#pragma unroll 8
        for (index_t q = threadIdx.x; q < terms; q += BLOCK_SIZE) {
#ifdef LENGTHS
            if (l < samples[n].L_out) sum = add(sum, scalar::load(*x));
            n += BLOCK_SIZE / p.L_coarse;
#else
            sum = add(sum, scalar::load(*x));
#endif
            l += p.step_l;
            x += p.advance;
            if (l >= p.L_coarse) {
                l -= p.L_coarse;
                x += p.carry;
#ifdef LENGTHS
                ++n;
#endif
            }
        }
        smem_sums[threadIdx.x] = sum;
#pragma unroll
        for (int half = BLOCK_SIZE / 2; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.x < half) {
                smem_sums[threadIdx.x] = add(smem_sums[threadIdx.x], smem_sums[threadIdx.x + half]);
            }
        }
        if (threadIdx.x == 0) {
            if (partial != nullptr) {
                partial[i] = smem_sums[0];
            } else {
                grad_bias[c * p.grad_bias_stride] = finish_gradient(smem_sums[0], false);
            }
        }
        __syncthreads();
    }
}
