// Micro-experiments of bench/micro.py: the rates on which the predictions rest. Each kernel does one thing as fast as it
// can; none computes anything of use. Needs sm_80 or later for the tensor-core kernels.

// Copies with 16 bytes per access: output[i] = input[i] for i < count. Grid x: any number of blocks.
extern "C" __global__ void __launch_bounds__(256) copy_16_bytes(
    const uint4* __restrict__ input,  // [count]
    uint4* __restrict__ output,       // [count]
    const long long count) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) output[i] = input[i];
}

// The same with 2 bytes per access, as an odd length of 16-bit data forces.
extern "C" __global__ void __launch_bounds__(256) copy_2_bytes(
    const unsigned short* __restrict__ input,  // [count]
    unsigned short* __restrict__ output,       // [count]
    const long long count) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) output[i] = input[i];
}

// Reads input[i] for i < count, `rounds` times over, from L2: loads with .cg leave out the caches of the multiprocessors.
extern "C" __global__ void __launch_bounds__(256) read_l2(
    const uint4* __restrict__ input,  // [count]
    unsigned* __restrict__ sink,      // [1], never written in practice
    const int count, const int rounds) {
    unsigned sum = 0;
    for (int round = 0; round < rounds; ++round) {
#pragma unroll 6
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
            const uint4 vector = __ldcg(&input[i]);
            sum += vector.x ^ vector.y ^ vector.z ^ vector.w;
        }
        sum = sum * 3 + round;
    }
    if (sum == 12345678u) *sink = sum;  // keeps the work alive
}

// Does nothing: its time is that of a launch.
extern "C" __global__ void nothing() {}

constexpr int kAccumulators = 16;
constexpr int kUnroll = 8;

// kAccumulators * kUnroll * rounds dependent chains of fused multiply-adds per thread, none waiting for another chain.
extern "C" __global__ void __launch_bounds__(256) fma_rate(
    float* __restrict__ sink,  // [1], never written in practice
    const int rounds, const float factor, const float addend) {
    float acc[kAccumulators];
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc[i] = float(threadIdx.x + 31 * i);
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int step = 0; step < kUnroll; ++step) {
#pragma unroll
            for (int i = 0; i < kAccumulators; ++i) acc[i] = __fmaf_rn(acc[i], factor, addend);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) sum += acc[i];
    if (sum == 12345.678f) *sink = sum;  // keeps the work alive
}

#if __CUDA_ARCH__ >= 800

constexpr int kTiles = 8;  // independent accumulator tiles of one warp

// Bits of a number between 1 and 2 of random sign, from a counter: 16-bit halves for bfloat16, whole words for TF32.
__device__ __forceinline__ unsigned random_bits(unsigned seed, unsigned ones, unsigned free_bits) {
    seed = (seed ^ (seed >> 16)) * 0x7feb352du;
    seed = (seed ^ (seed >> 15)) * 0x846ca68bu;
    return ones | (seed & free_bits);
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename Mma>
__device__ __forceinline__ void mma_rate(float* sink, int rounds, unsigned ones, unsigned free_bits, Mma mma) {
    unsigned a[4], b[kTiles][2];
    float acc[kTiles][4] = {};
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = random_bits(97 * thread + i, ones, free_bits);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
        b[t][0] = random_bits(89 * thread + 2 * t, ones, free_bits);
        b[t][1] = random_bits(83 * thread + 2 * t + 1, ones, free_bits);
    }
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int t = 0; t < kTiles; ++t) mma(acc[t], a, b[t]);
    }
    float sum = 0.0f;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) sum += acc[t][0] + acc[t][1] + acc[t][2] + acc[t][3];
    if (sum == 12345.678f) *sink = sum;
}

// kTiles * rounds products m16n8k16 per warp.
extern "C" __global__ void __launch_bounds__(256) mma_bf16_rate(
    float* __restrict__ sink,  // [1], never written in practice
    const int rounds) {
    mma_rate(sink, rounds, 0x3f803f80u, 0x807f807fu, [](auto& d, auto& a, auto& b) { mma_m16n8k16_bf16(d, a, b); });
}

// kTiles * rounds products m16n8k8 per warp.
extern "C" __global__ void __launch_bounds__(256) mma_tf32_rate(
    float* __restrict__ sink,  // [1], never written in practice
    const int rounds) {
    mma_rate(sink, rounds, 0x3f800000u, 0x807fe000u, [](auto& d, auto& a, auto& b) { mma_m16n8k8_tf32(d, a, b); });
}

#endif
