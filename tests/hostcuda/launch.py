"""Runs a launch, or a whole problem as dispatch would launch it, on the CPU with every check on."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np

from gpuconv.device import Device
from gpuconv.dispatch import StridedPointer, choose, lay_out
from gpuconv.families import ArrayLayout, Config, Launch, Layout
from gpuconv.families.base import ACTIVATED, PARTIAL, SAMPLES
from gpuconv.problem import ConvProblem, Problem, numpy_dtype
from gpuconv.source import pack_params

from . import build
from .errors import (
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
from .memory import (
    GAP_POISON,
    OUTPUT_POISON,
    SHARED_POISON,
    Array,
    GuardedArray,
    Placement,
    first_poisoned,
)

Schedule: TypeAlias = Literal["forward", "reverse", "every"] | int

EVERY: tuple[tuple[Schedule, Placement], ...] = (("forward", "end"), ("reverse", "start"), (1, "end"))
"""The runs that schedule "every" stands for: both sides of every array guarded, three orders of the threads."""

# Without a device of its own a launch is held to the largest limits there are.
_MAX_THREADS = 1024
_MAX_SHARED = 227 * 1024


@dataclass(frozen=True, slots=True)
class TensorCores:
    """How an architecture's tensor cores add up products of 16-bit and TF32 numbers.

    Attributes:
        block_bytes: products of so many bytes of an operand are added at a time.
        fraction_bits: terms are cut off so many bits behind the leading bit of the largest, 23 to 25.
    """

    block_bytes: int
    fraction_bits: int

    @classmethod
    def of(cls, device: Device) -> TensorCores:
        return HOPPER if device.arch >= 90 else AMPERE


AMPERE = TensorCores(block_bytes=16, fraction_bits=24)
"""Also Turing and Ada."""

HOPPER = TensorCores(block_bytes=32, fraction_bits=25)
"""Also Blackwell."""

_running = threading.Lock()  # the runtime has one launch at a time


class LaunchRecord(ctypes.Structure):
    """`struct Launch` of runtime.cpp."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("grid", ctypes.c_uint),
        ("block", ctypes.c_uint),
        ("block_order", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        ("shared_bytes", ctypes.c_size_t),
        ("schedule", ctypes.c_int),
        ("flush_subnormals", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("block_bytes", ctypes.c_uint),
        ("fraction_bits", ctypes.c_uint),
    )


class Fault(ctypes.Structure):
    """`struct Fault` of runtime.cpp."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("block", ctypes.c_uint),
        ("thread", ctypes.c_uint),
        ("is_write", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("message", ctypes.c_char * 512),
    )


class Counts(ctypes.Structure):
    """What the warps of a launch have executed; `struct Counts` of runtime.cpp.

    Attributes:
        products: of matrices, each one mma.sync.
        loads: of 8x8 matrices from shared memory, up to four by one ldmatrix.
        wavefronts: in which these loads read shared memory: as many as loads where no two rows meet in a bank.
        sectors: of 32 bytes of global memory, each counted once for every load of a warp by `load_or_zero`.
    """

    products: int
    loads: int
    wavefronts: int
    sectors: int
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("products", "loads", "wavefronts", "sectors"))


# enum FaultKind of hostcuda.h
_NO_FAULT, _MEMORY, _MISALIGNED = 0, 1, 2
_ERRORS: dict[int, type[HostCudaError]] = {
    3: UndefinedBehaviourError,
    4: DivergenceError,
    5: TimeLimitError,
    6: StackOverflowError,
}


def run(
    kernel: Config | build.Program,
    launch: Launch,
    arrays: Mapping[str, Array | None],
    *,
    outputs: Sequence[str] = ("output",),
    keeps: Sequence[str] = (),
    completes: bool = True,
    layouts: Mapping[str, ArrayLayout] | None = None,
    device: Device | None = None,
    schedule: Schedule = "forward",
    placement: Placement = "end",
    seconds: float = 60.0,
    tensor_cores: TensorCores | None = None,
    counts: Counts | None = None,
) -> Array:
    """Launch a kernel.

    Args:
        kernel: what to run.
        launch: grid, block, shared memory and parameters.
        arrays: the kernel's array arguments in order, None for a null pointer. Each is copied into guarded memory with
            its strides and the alignment of its first element.
        outputs: the arrays that the kernel writes. Their contents are ignored; the results are stored in them.
        keeps: those of them of which it writes a part and leaves the rest as it is.
        completes: whether they are complete then; a later launch may write the rest.
        layouts: strides and alignments that overrule the arrays' own.
        device: whose limits the launch must keep.
        schedule: the order of blocks and threads, an int being the seed of a random one; "every" runs them all, with
            both placements, and compares the bits.
        placement: which side of each array touches a guard page.
        seconds: the processor time after which the kernel is stopped.
        tensor_cores: the arithmetic of matrix products; the device's by default, and Hopper's without a device.
        counts: is filled in, for one run.

    Returns:
        The first of `outputs`.

    Raises:
        HostCudaError: see errors.py.
    """
    program = build.Program.of(kernel) if isinstance(kernel, Config) else kernel
    binary = build.binary(program)
    _check_launch(program, binary, launch, len(arrays) + 1, device)

    tensor_cores = tensor_cores or (TensorCores.of(device) if device else HOPPER)
    runs = EVERY if schedule == "every" else ((schedule, placement),)
    bits: dict[str, Array] = {}
    counts = counts or Counts()
    for order, side in runs:
        results = _run_once(
            program,
            binary,
            launch,
            arrays,
            outputs,
            keeps,
            completes,
            layouts or {},
            order,
            side,
            seconds,
            tensor_cores,
            counts,
        )
        for name, result in results.items():
            if name in bits:
                _check_same(program, name, bits[name], result, order)
            bits.setdefault(name, result)
    for name in outputs:
        array = arrays[name]
        assert array is not None
        array[...] = bits[name]
    first = arrays[outputs[0]]
    assert first is not None
    return first


def execute(what: LaunchRecord, counts: Counts) -> Fault:
    """Run a launch as it stands; how it ended. Only one runs at a time in a process.

    Raises:
        MemoryError: there is no address space for the threads' stacks.
    """
    fault = Fault()
    with _running:
        structures = (ctypes.byref(structure) for structure in (what, fault, counts))
        if _runtime().hostcuda_launch(*structures, SHARED_POISON) != 0:
            raise MemoryError("hostcuda: no address space for the stacks of a block")
    return fault


def compute(
    problem: Problem,
    *inputs: Array | None,
    layout: Layout | None = None,
    device: Device | None = None,
    family: str | None = None,
    samples: Array | None = None,
    schedule: Schedule = "forward",
    placement: Placement = "end",
    counts: Counts | None = None,
) -> Array:
    """Evaluate a problem with the kernels and launches that dispatch chooses.

    Args:
        problem: extents and settings.
        inputs: the arrays in the order of `problem.shapes`; a single sample may lack the axis of samples.
        layout: strides and alignments of all arrays; by default those of the given arrays, and a contiguous result.
        device: the GPU to plan for, an H200 by default.
        family: the kernel family to take instead of the one that dispatch prefers.
        samples: what cuda_src/samples.cuh says of samples with lengths of their own, (N, 3) int64.
        schedule: see `run`.
        placement: see `run`.
        counts: see `run`; of the family's own kernel.

    Returns:
        The result, C-contiguous.

    Raises:
        HostCudaError: see errors.py.
        ValueError: the named family refuses the problem.
    """
    device = device or Device.from_arch("sm_90")
    given = {name: array for name, array in zip(problem.shapes, inputs, strict=False) if array is not None}
    arrays = {n: a if a.ndim == len(problem.shapes[n]) else a[np.newaxis] for n, a in given.items()}
    result = problem.result
    arrays[result] = np.empty(problem.shapes[result], numpy_dtype(problem.dtype_of(result)))
    if layout is None:  # arrays whose elements kernels cannot read where they are come out as contiguous copies
        layout, _ = lay_out(problem, {n: StridedPointer(a.strides, _address(a)) for n, a in given.items()})
    choice = choose(problem, layout, device, None if problem.is_empty else family)
    steps = () if choice is None else choice.plan.steps
    unwritten = dict(() if choice is None else choice.plan.scratch)
    # Types that recognise poison. Partial sums have the accumulator's; only kernels know that of packed weights.
    sums = numpy_dtype(problem.dtype) if problem.itemsize >= 4 else np.dtype(np.float32)
    kinds = {PARTIAL: sums, ACTIVATED: numpy_dtype(problem.dtype)}
    written: set[str] = set()
    if samples is not None:
        arrays[SAMPLES] = samples
    for step in steps:
        outputs = [name for name in step.arrays if name in unwritten] or [result]
        for name in outputs:
            if name in unwritten:
                dtype = kinds.get(name, np.dtype(np.uint32))
                arrays[name] = np.empty(unwritten.pop(name) // dtype.itemsize, dtype)
        run(
            step.config,
            step.launch,
            {name or f"null {place}": arrays[name] if name else None for place, name in enumerate(step.arrays)},
            outputs=outputs,
            keeps=[name for name in outputs if name in written],
            completes=samples is None or step is steps[-1] or result not in outputs,
            layouts={name: layout[name] for name in step.arrays if name is not None and name in layout},
            device=device,
            schedule=schedule,
            placement=placement,
            counts=counts if choice is not None and step is choice.step else None,
        )
        written.update(outputs)
    return arrays[result].reshape(problem.output_shape) if isinstance(problem, ConvProblem) else arrays[result]


def array_layout(array: Array) -> ArrayLayout:
    """The layout of a NumPy array: strides in elements, and the alignment of its first element up to 16 bytes."""
    layout = ArrayLayout.of(array.shape, array.strides, _address(array), array.itemsize)
    if layout is None:
        raise ValueError(f"hostcuda: elements must lie at multiples of their size, got strides {array.strides}")
    return layout


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _check_launch(
    program: build.Program, binary: build.Binary, launch: Launch, num_arguments: int, device: Device | None
) -> None:
    shared = device.shared_per_block if device else _MAX_SHARED
    for what, value, least, most in (
        ("grid", launch.grid, 1, 2**31 - 1),
        ("block", launch.block, 1, min(_MAX_THREADS, binary.max_threads)),
        ("shared_bytes", launch.shared_bytes, 0, shared),
    ):
        if not least <= value <= most:
            raise LaunchError(f"{program.kernel}: {what} must be from {least} to {most}, got {value}")
    if num_arguments != binary.num_parameters:
        raise LaunchError(
            f"{program.kernel}: takes {binary.num_parameters} arguments, got {num_arguments} (arrays, then Params)"
        )


def _run_once(
    program: build.Program,
    binary: build.Binary,
    launch: Launch,
    arrays: Mapping[str, Array | None],
    outputs: Sequence[str],
    keeps: Sequence[str],
    completes: bool,
    layouts: Mapping[str, ArrayLayout],
    schedule: Schedule,
    placement: Placement,
    seconds: float,
    tensor_cores: TensorCores,
    counts: Counts,
) -> dict[str, Array]:
    guarded: dict[str, GuardedArray] = {}
    try:
        for name, array in arrays.items():
            if array is not None:
                layout = layouts.get(name) or array_layout(array)
                poison = OUTPUT_POISON if name in outputs else GAP_POISON
                dtype = array.dtype.newbyteorder("=")
                guarded[name] = memory = GuardedArray(
                    name, array.shape, layout.strides, dtype, poison, layout.alignment, placement
                )
                if name not in outputs or name in keeps:
                    memory.view[...] = array
                if name not in outputs:
                    memory.make_read_only()
        shared = GuardedArray(
            "shared memory", (launch.shared_bytes,), (1,), np.dtype(np.uint8), SHARED_POISON, 16, placement
        )
        guarded[shared.name] = shared

        fault = _launch(program, binary, launch, arrays, guarded, schedule, seconds, tensor_cores, counts)
        if fault.kind != _NO_FAULT:
            raise _error(program, fault, guarded, outputs)
        _check_gaps(program, shared)
        return {name: _collect(program, guarded[name], completes) for name in outputs}
    finally:
        for memory in guarded.values():
            memory.free()


def _launch(
    program: build.Program,
    binary: build.Binary,
    launch: Launch,
    arrays: Mapping[str, Array | None],
    guarded: Mapping[str, GuardedArray],
    schedule: Schedule,
    seconds: float,
    tensor_cores: TensorCores,
    counts: Counts,
) -> Fault:
    params = pack_params(dict(launch.params), launch.index_bits)
    addresses = [guarded[name].address if name in guarded else None for name in arrays]
    slots = (ctypes.c_void_p * (len(arrays) + 1))(*addresses, params.ctypes.data)
    seed = schedule if isinstance(schedule, int) else 0
    block_order = None
    if schedule == "reverse":
        block_order = np.arange(launch.grid, dtype=np.uint32)[::-1].copy()
    elif schedule != "forward":
        block_order = np.random.default_rng(seed).permutation(launch.grid).astype(np.uint32)
    what = LaunchRecord(
        entry=binary.entry,
        slots=ctypes.addressof(slots),
        grid=launch.grid,
        block=launch.block,
        block_order=None if block_order is None else block_order.ctypes.data,
        shared=guarded["shared memory"].address,
        shared_bytes=launch.shared_bytes,
        schedule={"forward": 0, "reverse": 1}.get(str(schedule), 2),
        flush_subnormals=program.flush_subnormals,
        seed=seed,
        seconds=seconds,
        block_bytes=tensor_cores.block_bytes,
        fraction_bits=tensor_cores.fraction_bits,
    )
    return execute(what, counts)


@lru_cache(maxsize=1)
def _runtime() -> ctypes.CDLL:
    library = build.runtime()
    library.hostcuda_launch.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_uint16]
    return library


def _error(
    program: build.Program, fault: Fault, guarded: Mapping[str, GuardedArray], outputs: Sequence[str]
) -> HostCudaError:
    where = f"{program.kernel}, block {fault.block}, thread {fault.thread}"
    message = fault.message.decode(errors="replace")
    memory = next((memory for memory in guarded.values() if memory.contains(fault.address)), None)
    place = memory.describe(fault.address) if memory else f"address {fault.address:#x}, which belongs to no array"
    if fault.kind == _MISALIGNED:
        return MisalignedError(f"{where}: {message}; got {place}")
    if fault.kind != _MEMORY:
        return _ERRORS[fault.kind](f"{where}: {message}")
    if message:  # an instruction's own complaint: whatever lies at the address, it is not shared memory
        return OutOfBoundsError(f"{where}: {message}, at {place}")
    access = {1: "write to", 0: "read of"}.get(fault.is_write, "access to")
    if memory is None or memory.name in outputs or not memory.lowest <= memory.offset(fault.address) <= memory.highest:
        return OutOfBoundsError(f"{where}: out-of-bounds {access} {place}")
    if fault.is_write:
        return WriteToInputError(f"{where}: {access} the input {memory.name} at {place}")
    return OutOfBoundsError(f"{where}: {access} the gap at {place}")


def _collect(program: build.Program, memory: GuardedArray, completes: bool) -> Array:
    """The result in an output's memory, once nothing else was written, and all of it where it must be complete."""
    result: Array = memory.view.copy()
    _check_gaps(program, memory)
    for poison, error, reason in (
        (OUTPUT_POISON, UnwrittenError, "never written, or computed from what was there before"),
        (SHARED_POISON, PoisonReadError, "computed from shared memory that was never written"),
        (GAP_POISON, PoisonReadError, "computed from bytes of an input that belong to no element"),
    ):
        found = first_poisoned(result, poison)
        if found is not None and (completes or error is not UnwrittenError):
            index, count = found
            raise error(
                f"{program.kernel}: {count} of {result.size} elements of {memory.name} are {reason}; "
                f"the first is {memory.name}[{', '.join(map(str, index))}]"
            )
    return result


def _check_gaps(program: build.Program, memory: GuardedArray) -> None:
    address = memory.first_gap_written()
    if address is not None:
        raise GapWrittenError(f"{program.kernel}: wrote outside the elements, at {memory.describe(address)}")


def _check_same(program: build.Program, name: str, expected: Array, result: Array, schedule: Schedule) -> None:
    byte = np.dtype((np.void, result.itemsize))
    differs = np.ascontiguousarray(expected).view(byte) != np.ascontiguousarray(result).view(byte)
    if differs.any():
        index = tuple(int(i) for i in np.unravel_index(int(differs.argmax()), differs.shape))
        raise ScheduleError(
            f"{program.kernel}: {name}[{', '.join(map(str, index))}] is {expected[index]} when threads run forward, "
            f"but {result[index]} under schedule {schedule!r} ({int(differs.sum())} of {result.size} elements differ)"
        )
