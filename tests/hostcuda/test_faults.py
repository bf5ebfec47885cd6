"""The harness can fail: each of these kernels has one planted fault, and hostcuda must name it.

The process must survive every one of them, so a correct kernel runs after each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from gpuconv.device import Device
from gpuconv.families import ArrayLayout, Launch, Layout
from gpuconv.problem import DTYPES, ConvProblem, numpy_dtype
from tests import hostcuda
from tests.hostcuda.errors import (
    BuildError,
    DivergenceError,
    GapWrittenError,
    HostCudaError,
    LaunchError,
    MisalignedError,
    OutOfBoundsError,
    PoisonReadError,
    ScheduleError,
    StackOverflowError,
    TimeLimitError,
    UndefinedBehaviourError,
    UnwrittenError,
    WriteToInputError,
)
from tests.plans import FORWARD_FAMILIES, kernel_of

BLOCK = 64
SEEDS = (1, 2, 3)


def toy(name: str, body: str) -> hostcuda.Program:
    """A kernel that has `i`, `t`, `n` and an array of shared floats at hand; line 1 of its file is line 1 of `body`."""
    text = f"""
        struct Params {{ int n; }};
        struct alignas(16) Pack {{ float element[4]; }};
        extern "C" __global__ void __launch_bounds__({BLOCK}) {name}(
            const float* __restrict__ input, float* __restrict__ output, const Params p) {{
            const int n = p.n, t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
            float* smem = reinterpret_cast<float*>(dynamic_shared_memory());
            (void)n, (void)t, (void)i, (void)smem;
        #line 1 "{name}.cu"
        {body.strip()}
        }}"""
    return hostcuda.Program(name, text)


# Sums each tile of 64 elements by shuffles and shared memory, and adds the sum to the tile's elements in reverse.
CONTROL = toy(
    "control",
    """
    for (int tile = blockIdx.x * 64; tile < n; tile += gridDim.x * 64) {
        const float x = __ldg(&input[tile + t]);
        float sum = x;
        #pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        smem[t] = x;
        if (t % 32 == 0) smem[64 + t / 32] = sum;
        __syncthreads();
        output[tile + t] = smem[63 - t] + smem[64] + smem[65];
        __syncthreads();
    }
    """,
)


def control_answer(x: np.ndarray) -> np.ndarray:
    tiles = x.reshape(-1, BLOCK)
    return (tiles[:, ::-1] + tiles.sum(axis=1, keepdims=True)).reshape(-1)


@dataclass(frozen=True)
class Fault:
    """A broken kernel body, and the error that it must raise.

    Attributes:
        error: its class.
        message: a regular expression that its message must contain.
        body: of the kernel.
        n: elements of input and of output.
        launch: what differs from a launch of one thread per element and 66 shared floats.
        input: the input, where it is not 0, 1, 2, ... float32.
        output_step: distance between the output's elements.
        start: run only with the arrays at the start of their memory.
        seconds: the time limit.
    """

    error: type[HostCudaError]
    message: str
    body: str
    n: int = 2 * BLOCK
    launch: dict[str, int] = field(default_factory=dict)
    input: np.ndarray | None = None
    output_step: int = 1
    start: bool = False
    seconds: float = 60.0


FAULTS = {
    # -- arrays
    "off_by_one_read": Fault(
        OutOfBoundsError,
        r"thread 63: out-of-bounds read of element offset 128 of input \(its buffer: 0 to 127\)",
        "output[i] = input[i + 1];",
    ),
    "off_by_one_read_below": Fault(
        OutOfBoundsError,
        r"block 0, thread 0: out-of-bounds read of element offset -1 of input",
        "output[i] = input[i - 1];",
        start=True,
    ),
    "off_by_one_read_below_in_slack": Fault(
        PoisonReadError,
        r"1 of 128 elements of output are computed from bytes of an input that belong to no element.*output\[0\]",
        "output[i] = input[i - 1] / 3;",
    ),
    "off_by_one_write": Fault(
        OutOfBoundsError,
        r"out-of-bounds write to element offset 128 of output",
        "output[i] = 0; output[i + 1] = 0;",
    ),
    "off_by_one_write_beside_slack": Fault(
        GapWrittenError,
        r"wrote outside the elements, at element offset 61 of output \(its buffer: 0 to 60\)",
        "if (i < n) output[i + 1] = output[i] = 0;",
        n=61,
    ),
    "far_read": Fault(
        OutOfBoundsError,
        r"out-of-bounds read of element offset 1000000 of input",
        "output[i] = input[i + 1000000];",
    ),
    "unwritten_tail": Fault(
        UnwrittenError,
        r"1 of 128 elements of output are never written.*output\[127\]",
        "if (i < n - 1) output[i] = input[i];",
    ),
    "too_short_a_grid": Fault(
        UnwrittenError,
        r"64 of 128 elements of output are never written.*output\[64\]",
        "output[i] = input[i];",
        launch={"grid": 1},
    ),
    "accumulates_into_the_output": Fault(
        UnwrittenError,
        r"128 of 128 elements of output are .*computed from what was there before",
        "output[i] += input[i];",
    ),
    "write_to_an_input": Fault(
        WriteToInputError,
        r"block 0, thread 5: write to the input input at element offset 5",
        "output[i] = 0; if (t == 5) const_cast<float*>(input)[i] = 0;",
    ),
    "write_between_elements": Fault(
        GapWrittenError,
        r"element offset 1 of output \(its buffer: 0 to 381\)",
        "output[3 * i] = 0; if (i == 0) output[1] = 0;",
        output_step=3,
    ),
    "read_between_elements": Fault(
        PoisonReadError,
        r"1 of 128 elements of output are computed from bytes of an input that belong to no element.*output\[7\]",
        "output[i] = input[2 * i + (i == 7)] + 1;",
        input=np.arange(256, dtype=np.float32)[::2],
    ),
    "null_pointer": Fault(
        UndefinedBehaviourError,
        r"load of '(const )?float' through a null pointer at null_pointer.cu:2",
        "const float* bias = n < 0 ? input : nullptr;\noutput[i] = bias[0];",
    ),
    # -- vectors
    "misaligned_load": Fault(
        MisalignedError,
        r"needs an address divisible by 16 at misaligned_load.cu:1; got element offset 1 of input",
        "const float4 v = *reinterpret_cast<const float4*>(input + 4 * (t / 16) + 1); output[i] = v.x;",
    ),
    "misaligned_view": Fault(
        MisalignedError,
        r"needs an address divisible by 16 .*element offset 0 of input",
        "output[i] = reinterpret_cast<const Pack*>(input)->element[0];",
        input=np.arange(129, dtype=np.float32)[1:],
    ),
    "misaligned_store": Fault(
        MisalignedError,
        r"misaligned store: 'struct float2' needs an address divisible by 8 .*element offset 1 of output",
        "*reinterpret_cast<float2*>(output + i + 1) = make_float2(0, 0);",
    ),
    # -- shared memory, barriers, schedules
    "missing_barrier": Fault(
        PoisonReadError,
        r"elements of output are computed from shared memory that was never written",
        "smem[t] = input[i]; output[i] = smem[63 - t] + 1;",
    ),
    "missing_barrier_between_warps": Fault(
        PoisonReadError,
        r"computed from shared memory that was never written",
        # The lanes of a warp meet, warps do not.
        "smem[t] = input[i]; __syncwarp(); output[i] = smem[63 - t] * 2;",
    ),
    "missing_barrier_in_a_loop": Fault(
        ScheduleError,
        r"output\[\d+\] is \S+ when threads run forward, but \S+ under schedule 'reverse'",
        """float sum = 0;
        for (int tile = 0; tile < 2; ++tile) {
            smem[t] = input[64 * tile + t];
            __syncthreads();
            sum += smem[63 - t];  // another thread's next store may come first
        }
        output[i] = sum;""",
    ),
    "race_of_threads": Fault(
        ScheduleError,
        r"output\[0\] is 63.0 when threads run forward, but 0.0 under schedule 'reverse' \(2 of 128 elements differ\)",
        "output[i] = 0; __syncthreads(); output[64 * blockIdx.x] = t;",
    ),
    "race_of_blocks": Fault(
        ScheduleError,
        r"output\[0\] is 1.0 when threads run forward, but 0.0 under schedule 'reverse'",
        "if (i > 0) output[i] = 0; if (t == 0) output[0] = blockIdx.x;",
    ),
    "shared_read_before_write": Fault(
        PoisonReadError,
        r"65 of 128 elements of output are computed from shared memory",
        "if (blockIdx.x > 0) smem[t + 1] = 0; __syncthreads(); output[i] = 2 * smem[t] + 1;",
        launch={"grid": 2},
    ),
    "shared_overrun": Fault(
        OutOfBoundsError,
        r"out-of-bounds write to element offset 256 of shared memory \(its buffer: 0 to 255\)",
        "smem[t + 1] = input[i]; __syncthreads(); output[i] = smem[t];",
        launch={"shared_bytes": 256},
    ),
    "shared_overrun_beside_slack": Fault(
        GapWrittenError,
        r"element offset 264 of shared memory",
        "smem[t + 3] = 0; output[i] = 0;",
        launch={"shared_bytes": 264},
    ),
    "shared_memory_not_asked_for": Fault(
        OutOfBoundsError,
        r"element offset 0 of shared memory \(it is empty\)",
        "smem[t] = 0; output[i] = smem[t];",
        launch={"shared_bytes": 0},
    ),
    "copy_without_wait": Fault(
        PoisonReadError,
        r"128 of 128 elements of output are computed from shared memory that was never written",
        "copy_async(&smem[t], &input[i]); __syncthreads(); output[i] = smem[63 - t] + 1;",
    ),
    "copy_without_barrier": Fault(
        PoisonReadError,
        r"computed from shared memory that was never written",
        "copy_async(&smem[t], &input[i]); copy_async_wait(); output[i] = smem[63 - t] + 1;",
    ),
    "copy_over_data_in_use": Fault(
        ScheduleError,
        r"under schedule 'reverse' \(64 of 64 elements differ\)",
        """copy_async(&smem[t], &input[t]);
        copy_async_wait();
        __syncthreads();
        copy_async(&smem[t], &input[63 - t]);  // other threads have yet to read the first round
        output[i] = smem[63 - t];
        copy_async_wait();
        __syncthreads();
        output[i] += 100 * smem[t];""",
        n=64,
    ),
    "misaligned_copy": Fault(
        MisalignedError,
        r"misaligned cp.async: 8 bytes need addresses divisible by 8; got element offset 1 of input",
        """const float2* source = reinterpret_cast<const float2*>(reinterpret_cast<const char*>(input) + 4);
        copy_async(reinterpret_cast<float2*>(smem), source); output[i] = 0;""",
    ),
    "copy_beyond_shared_memory": Fault(
        OutOfBoundsError,
        r"element offset 264 of shared memory",
        "if (t < 34) copy_async(reinterpret_cast<float2*>(smem) + t, reinterpret_cast<const float2*>(input) + t);\n"
        "output[i] = 0;",
    ),
    "divergent_barrier": Fault(
        DivergenceError,
        r"divergent __syncthreads: thread 0 waits at divergent_barrier.cu:1, but thread 32 has returned without",
        "output[i] = 0; if (t < 32) __syncthreads();",
    ),
    "divergent_barriers": Fault(
        DivergenceError,
        r"thread 0 waits at divergent_barriers.cu:2, but thread 1 waits in __syncthreads at divergent_barriers.cu:3",
        "output[i] = 0;\nif (t % 2 == 0) __syncthreads();\nelse __syncthreads();",
    ),
    "barrier_after_an_early_return": Fault(
        DivergenceError,
        r"but thread 36 has returned without reaching it",
        "if (i >= n) return; smem[t] = 0; __syncthreads(); output[i] = smem[t];",
        n=100,
    ),
    "barrier_against_shuffle": Fault(
        DivergenceError,
        r"but thread 32 waits in __syncwarp at barrier_against_shuffle.cu:2",
        "if (t < 32) __syncthreads();\nelse if (t < 40) __syncwarp(); else __syncthreads();",
    ),
    # -- warps
    "mask_without_own_lane": Fault(
        DivergenceError,
        r"wrong mask: thread 4 calls __shfl_sync at mask_without_own_lane.cu:1 with the mask 0x0000000f, which lacks",
        "output[i] = __shfl_sync(0x0000000fu, input[i], 0);",
    ),
    "mask_names_absent_lanes": Fault(
        DivergenceError,
        r"divergent __shfl_down_sync: thread 0 waits at .*, but thread 16, which the mask names, has returned",
        "output[i] = 0; if (t % 32 < 16) output[i] = __shfl_down_sync(0xffffffffu, input[i], 1);",
    ),
    "mask_beyond_the_block": Fault(
        DivergenceError,
        r"wrong mask: __syncwarp at .* has the mask 0xffffffff, but the block's last warp has 16 lanes",
        "__syncwarp(); output[i] = 0;",
        launch={"block": 48},
        n=96,
    ),
    "unlike_masks": Fault(
        DivergenceError,
        r"wrong mask: in __shfl_up_sync at .* thread 0 gives the mask 0x0000ffff and thread 1 gives 0x0000fffe",
        "output[i] = t % 32 < 16 ? __shfl_up_sync(0xffffu - t % 2, input[i], 1) : 0;",
        n=BLOCK,
    ),
    "shuffle_from_outside_the_mask": Fault(
        DivergenceError,
        r"lane 0 shuffles from lane 20, which the mask leaves out",
        "output[i] = t % 32 < 16 ? __shfl_sync(0xffffu, input[i], 20) : 0;",
    ),
    # -- arithmetic and control flow
    "int32_overflow": Fault(
        UndefinedBehaviourError,
        r"block 0, thread 54: signed integer overflow: 54 \* 40000000 does not fit 'int' at int32_overflow.cu:2",
        "const int stride = n * 312500;\nconst int offset = i * stride;\noutput[i] = offset == 1 ? 1 : 0;",
    ),
    "division_by_zero": Fault(
        UndefinedBehaviourError,
        r"integer division by zero: 7 / 0 at division_by_zero.cu:1",
        "output[i] = (i + 7) / (n - 128);",
    ),
    "shift_too_far": Fault(
        UndefinedBehaviourError, r"shift out of range: 1 by 128 bits in 'unsigned int'", "output[i] = 1u << n;"
    ),
    "local_index_out_of_bounds": Fault(
        UndefinedBehaviourError,
        r"index 4 out of bounds of 'float *\[4\]'",
        "float acc[4] = {}; for (int j = 0; j <= 4 * n / 128; ++j) acc[j] += input[i]; output[i] = acc[i % 4];",
    ),
    "endless_loop": Fault(
        TimeLimitError,
        r"block 0, thread 0: still running after 0.1 s of processor time",
        "for (volatile int j = 0; j < n; j += (n - 128)) {} output[i] = 0;",
        seconds=0.1,
    ),
    "stack_overflow": Fault(
        StackOverflowError,
        r"stack overflow",
        "volatile char frame[300000]; frame[(n - 128)] = 0; output[i] = frame[0];",
    ),
    # -- launches that a GPU would refuse
    "block_above_its_bound": Fault(
        LaunchError, r"block must be from 1 to 64, got 128", "output[i] = 0;", launch={"block": 128}
    ),
    "too_much_shared_memory": Fault(
        LaunchError,
        r"shared_bytes must be from 0 to 232448, got 232449",
        "output[i] = 0;",
        launch={"shared_bytes": 232449},
    ),
    "empty_grid": Fault(LaunchError, r"grid must be from 1 to 2147483647, got 0", "output[i] = 0;", launch={"grid": 0}),
}

PROGRAMS = {name: toy(name, fault.body) for name, fault in FAULTS.items()}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    hostcuda.prebuild([CONTROL, *PROGRAMS.values()])


def launch(n: int, **changes: int) -> Launch:
    values = {"grid": -(-n // changes.get("block", BLOCK)), "block": BLOCK, "shared_bytes": 66 * 4} | changes
    return Launch(**values, index_bits=32, params=(("n", n),))


def run_control(schedule: hostcuda.Schedule) -> None:
    x = np.random.default_rng(0).integers(-9, 10, 6 * BLOCK).astype(np.float32)
    y = hostcuda.run(CONTROL, launch(x.size, grid=2), {"input": x, "output": np.empty_like(x)}, schedule=schedule)
    np.testing.assert_array_equal(y, control_answer(x))


@pytest.fixture
def survives() -> Iterator[None]:
    """The process is sound after a fault: kernels run, and NumPy's arithmetic keeps subnormals."""
    yield
    run_control("forward")
    tiny = np.full(100, 2.0**-140, np.float32)
    assert (tiny + tiny == np.float32(2.0**-139)).all()


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str) -> None:
    fault = FAULTS[name]
    x = np.arange(fault.n, dtype=np.float32) if fault.input is None else fault.input
    y = np.empty(fault.n * fault.output_step, np.float32)[:: fault.output_step]
    with pytest.raises(fault.error, match=fault.message) as caught:
        hostcuda.run(
            PROGRAMS[name],
            launch(fault.n, **fault.launch),
            {"input": x, "output": y},
            schedule="forward" if fault.start else "every",
            placement="start",  # where the schedule is not "every"
            seconds=fault.seconds,
        )
    assert name in str(caught.value)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "every", *SEEDS])
def test_correct_kernel_passes(schedule: hostcuda.Schedule) -> None:
    run_control(schedule)


@pytest.mark.parametrize("schedule", ["every", *SEEDS])
def test_shuffles_follow_the_cuda_definition(schedule: hostcuda.Schedule) -> None:
    kernel = toy(
        "shuffles",
        """
        const int lane = t % 32, delta = 3;
        output[0 * 32 + lane] = __shfl_sync(0xffffffffu, lane, 5, 8);
        output[1 * 32 + lane] = __shfl_up_sync(0xffffffffu, lane, delta, 16);
        output[2 * 32 + lane] = __shfl_down_sync(0xffffffffu, lane, delta, 16);
        output[3 * 32 + lane] = __shfl_xor_sync(0xffffffffu, lane, 9, 8);
        output[4 * 32 + lane] = __shfl_sync(0xffffffffu, double(lane), 40);
        """,
    )
    y = np.empty((5, 32), np.float32)
    hostcuda.run(kernel, launch(32, block=32), {"input": y[0].copy(), "output": y}, schedule=schedule)
    lane = np.arange(32)
    expected = [
        lane // 8 * 8 + 5,
        np.where(lane % 16 >= 3, lane - 3, lane),
        np.where(lane % 16 < 13, lane + 3, lane),
        np.where((lane ^ 9) < lane // 8 * 8 + 8, lane ^ 9, lane),  # a lane may read an earlier segment, not a later one
        np.full(32, 8),
    ]
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("schedule", ["every", *SEEDS])
def test_parts_of_a_warp_meet_on_their_own(schedule: hostcuda.Schedule) -> None:
    kernel = toy(
        "parts",
        """
        float x = input[i];
        const unsigned mask = t % 32 < 8 ? 0xffu : 0xffffff00u;
        for (int round = 0; round < (t % 32 < 8 ? 3 : 5); ++round) {
            x += __shfl_sync(mask, x, t % 32 < 8 ? 7 : 8);
            __syncwarp(mask);
        }
        __syncthreads();
        output[i] = x;
        """,
    )
    x = np.random.default_rng(1).integers(-9, 10, 2 * BLOCK).astype(np.float32)
    y = hostcuda.run(kernel, launch(x.size), {"input": x, "output": np.empty_like(x)}, schedule=schedule)
    expected = x.reshape(-1, 32).copy()
    for part, source, rounds in ((slice(0, 8), 7, 3), (slice(8, 32), 8, 5)):
        for _ in range(rounds):
            expected[:, part] += expected[:, source, None]
    np.testing.assert_array_equal(y, expected.reshape(-1))


@pytest.mark.parametrize("flush", [True, False])
def test_subnormals_are_flushed_as_on_a_gpu(flush: bool) -> None:
    text = toy("subnormals", "output[i] = fma_rn(input[i], 0.5f, -0.0f);").text
    kernel = hostcuda.Program("subnormals", text, flush_subnormals=flush)
    x = np.array([2.0**-125, 2.0**-126, -(2.0**-127)], np.float32).repeat(BLOCK)
    y = hostcuda.run(kernel, launch(x.size), {"input": x, "output": np.empty_like(x)})
    expected = np.array([2.0**-126, 0, -0.0], np.float32).repeat(BLOCK) if flush else x / 2
    np.testing.assert_array_equal(y.view(np.uint32), expected.view(np.uint32))


def test_output_is_stored_in_place_between_untouched_neighbours() -> None:
    kernel = toy("strided", "output[-2 * i] = input[3 * i];")
    buffer = np.full(2 * BLOCK + 5, -1, np.float32)
    x = np.arange(3 * BLOCK, dtype=np.float32)[::3]
    hostcuda.run(kernel, launch(BLOCK), {"input": x, "output": buffer[-2:4:-2]}, schedule="every")
    np.testing.assert_array_equal(buffer[-2:4:-2], x)
    assert (np.delete(buffer, np.arange(buffer.size)[-2:4:-2]) == -1).all()


# What a wrong launch of a real kernel does: the parameter that is wrong, by how much, and the error.
WRONG_PARAMS = {
    "num_outputs": (-1, UnwrittenError, r"1 of 144 elements of output are never written.*output\[1, 3, 17\]"),
    "L_in": (+1, OutOfBoundsError, r"out-of-bounds read of element offset \d+ of input"),
    "K": (+1, OutOfBoundsError, r"out-of-bounds read of element offset 48 of weight"),
    "input_stride_l": (-1, PoisonReadError, r"computed from bytes of an input that belong to no element"),
    "output_stride_l": (+1, OutOfBoundsError, r"out-of-bounds write to element offset \d+ of output"),
    "stride": (2**31 - 2, UndefinedBehaviourError, r"signed integer overflow: .* at one_result.cuh:\d+"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG_PARAMS)
def test_wrong_launch_of_a_real_kernel_is_caught(name: str, dtype: str) -> None:
    change, error, message = WRONG_PARAMS[name]
    p = ConvProblem("conv1d", N=2, C_in=4, C_out=4, L_in=19, K=3, padding_right=1, dtype=dtype)
    contiguous = Layout.contiguous(p)
    layout = contiguous.replaced(input=ArrayLayout((1004, 101, 2)))
    (family,) = (family for family in FORWARD_FAMILIES if family.name == "conv1d_direct")
    config, correct = kernel_of(family, p, layout, Device.from_arch("sm_90"))
    arrays = {
        "input": np.ones(p.input_shape, numpy_dtype(dtype)),
        "weight": np.ones(p.weight_shape, numpy_dtype(dtype)),
        "bias": None,
        "output": np.empty(p.output_shape, numpy_dtype(dtype)),
    }
    layouts = {"input": layout["input"]}
    output = hostcuda.run(config, correct, arrays, layouts=layouts, schedule="every")
    assert (output == np.array([12] * 17 + [8])).all()
    params = dict(correct.params)
    params[name] += change
    with pytest.raises(error, match=message):
        hostcuda.run(config, replace(correct, params=tuple(params.items())), arrays, layouts=layouts)


@pytest.mark.usefixtures("survives")
def test_compiler_messages_name_the_kernel_file() -> None:
    with pytest.raises(BuildError, match=r"broken.cu:2:.*'?undeclared_name'?"):
        hostcuda.prebuild([toy("broken", "output[i] = 0;\nundeclared_name = 1;")])


def test_wrong_number_of_arguments_is_refused() -> None:
    x = np.zeros(BLOCK, np.float32)
    with pytest.raises(LaunchError, match="takes 3 arguments, got 2"):
        hostcuda.run(CONTROL, launch(BLOCK), {"output": x})
