// An experiment for bench/wgmma.py, sm_90a: wgmma on a window that is shifted for each tap by its start address alone.
//
//     output[m, l] = rounds * sum over k, c of weight[k, m, c] * input[c, l + k * dilation]
//
// with bfloat16 operands in shared memory in the layout without swizzle, in which eight channels of one row or position
// are 16 bytes side by side and eight rows or positions 128 bytes: a tap moves the window by k * dilation * 16 bytes.
// Whether the hardware takes a start address that is no multiple of 128 bytes, and at which rate, is the question.
// Grid x: any number of blocks, which all compute and write the same.

constexpr int kRows = 64;
constexpr int kPositions = 256;
constexpr int kChannels = CHANNELS;
constexpr int kTaps = TAPS;
constexpr int kWindow = WINDOW;  // positions in shared memory
constexpr int kUnits = kChannels / 8;
constexpr int kThreads = 128;
constexpr int kSums = kRows * kPositions / kThreads;

static_assert(kChannels % 16 == 0, "bench/wgmma.py: CHANNELS must be whole steps of 16");

// The descriptor of an operand without swizzle at address 0. The hardware takes 8 by 16 bytes at once; the steps lead to
// the neighbours of these along the channels (the "leading" one by the manual) and along the rows or positions (the
// "stride"). Where `swapped`, the other way round.
__device__ __forceinline__ unsigned long long descriptor(unsigned channel_step, unsigned row_step, bool swapped) {
    const unsigned long long leading = swapped ? row_step : channel_step, stride = swapped ? channel_step : row_step;
    return leading >> 4 << 16 | stride >> 4 << 32;
}

__device__ __forceinline__ unsigned long long at(unsigned long long descriptor, unsigned address) {
    return descriptor | (address & 0x3ffff) >> 4;
}

// d = d * scale + A * B for 64 rows, 256 columns and 16 terms.
__device__ __forceinline__ void multiply(float (&d)[kSums], unsigned long long a, unsigned long long b, int scale) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
        "}, %128, %129, p, 1, 1, 0, 0;\n}\n"
        :
          "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(scale));
}

extern "C" __global__ void __launch_bounds__(kThreads, 2) wgmma_shifted(
    const uint4* __restrict__ weight,  // [kTaps][kUnits][kRows] units of eight channels
    const uint4* __restrict__ input,   // [kUnits][kWindow] units of eight channels
    float* __restrict__ output,        // [kRows][kPositions]
    const int dilation, const int rounds, const int swapped) {
    extern __shared__ __align__(128) uint4 shared[];
    uint4* const window = shared + kTaps * kUnits * kRows;
    for (int i = threadIdx.x; i < kTaps * kUnits * kRows; i += kThreads) shared[i] = weight[i];
    for (int i = threadIdx.x; i < kUnits * kWindow; i += kThreads) window[i] = input[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads past the ordinary path
    __syncthreads();

    const unsigned weight_address = (unsigned)__cvta_generic_to_shared(shared);
    const unsigned window_address = (unsigned)__cvta_generic_to_shared(window);
    const unsigned long long of_weight = descriptor(kRows * 16, 128, swapped);
    const unsigned long long of_window = descriptor(kWindow * 16, 128, swapped);
    float d[kSums];
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int round = 0; round < rounds; ++round) {
        for (int k = 0; k < kTaps; ++k) {
#pragma unroll
            for (int unit = 0; unit < kUnits; unit += 2) {
                multiply(
                    d, at(of_weight, weight_address + (k * kUnits + unit) * kRows * 16),
                    at(of_window, window_address + (unit * kWindow + k * dilation) * 16), round + k + unit);
            }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");

    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        output[(row + i / 2 % 2 * 8) * kPositions + i / 4 * 8 + column + i % 2] = d[i];
    }
}
