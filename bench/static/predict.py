"""The time that a kernel should take, from its machine code and the numbers of the GPU: the model of bench/README.md.

Predictions are written down before a measurement, so that a miss teaches something. They are never measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpuconv.costs import (
    DRAM_EFFICIENCY,
    FMA_LATENCY_CYCLES,
    L2_BYTES_PER_CYCLE,
    LAUNCH_US,
    LOAD_LATENCY_CYCLES,
    MMA_LATENCY_CYCLES,
    WARP_ISSUES_PER_CYCLE,
    Rates,
    blocks_per_sm,
    rates_of,
)
from gpuconv.device import Device
from gpuconv.dispatch import Choice
from gpuconv.families import Launch
from gpuconv.families.base import PARTIAL
from gpuconv.problem import ConvProblem, Problem, WeightGradientProblem

from .sass import KernelReport

# Instructions for each element of a window that tensor cores stage (an assumption).
STAGING_INSTRUCTIONS = 5


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted time of one call and its parts, in microseconds.

    Attributes:
        us: the launches, the packing of the weights or the addition of slices where there is any, and the largest of
            the parts.
        parts: "dram", "l2", "issue", "math", "load/store" and "latency" of the main kernel.
        limit: the name of the largest part.
        blocks_per_sm: blocks that share a multiprocessor.
        waves: rounds in which the grid runs.
    """

    us: float
    parts: dict[str, float]
    limit: str
    blocks_per_sm: int
    waves: int


def predict(problem: Problem, choice: Choice, report: KernelReport, device: Device) -> Prediction:
    """Predict one call under CUDA graph replay with cold caches; `report` is that of the chosen kernel.

    Raises:
        ValueError: not even one block fits a multiprocessor, or the architecture's rates are unknown.
    """
    # Packed weights and partial sums are written by one kernel and read by another.
    more_us = sum(_pass_us(num_bytes, device) for _, num_bytes in choice.plan.scratch)
    if isinstance(problem, WeightGradientProblem):
        work = _gradient_work(problem, choice, report)
    else:
        work = _work(problem, choice.launch, report)
    return _predict(problem, choice, report, device, work, more_us)


def _gradient_work(problem: WeightGradientProblem, choice: Choice, report: KernelReport) -> _Work:
    loop, partial = report.loop, choice.plan.scratch_bytes(PARTIAL)
    products = 3 if dict(choice.config.macros).get("IS_SPLIT") == "1" else 1  # of a multiply-add
    fma = products * problem.flops() / 2 * _gradient_waste(choice)
    passes = fma / loop.fma
    serial = passes * (_load_latency(loop.wavefronts) + FMA_LATENCY_CYCLES * loop.chain)
    return _Work(fma, passes * loop.instructions, passes * loop.wavefronts, serial, problem.bytes() + partial)


def _pass_us(num_bytes: int, device: Device) -> float:
    """A further kernel that writes or reads a buffer which another one reads or wrote."""
    return LAUNCH_US + 2 * num_bytes / (1e3 * rates_of(device).dram_gbps * DRAM_EFFICIENCY)


def _predict(
    problem: ConvProblem | WeightGradientProblem,
    choice: Choice,
    report: KernelReport,
    device: Device,
    work: _Work,
    more_us: float,
) -> Prediction:
    rates, launch = rates_of(device), choice.launch
    shared = launch.shared_bytes + report.resources.static_shared_bytes
    per_sm = blocks_per_sm(report.resources.registers, launch.block, shared, device)
    if per_sm == 0:
        raise ValueError(f"a block of {report.config.kernel} does not fit {device.name}")
    blocks_busiest_sm = math.ceil(launch.grid / device.num_sms)
    waves = math.ceil(launch.grid / (device.num_sms * per_sm))
    cycles_per_us = 1e3 * device.clock_ghz

    # The multiprocessor with the most blocks decides.
    imbalance = blocks_busiest_sm * device.num_sms / launch.grid
    sm_cycles = device.num_sms / imbalance * cycles_per_us
    warps = launch.grid * math.ceil(launch.block / 32)
    parts = {
        "dram": problem.bytes() / (1e3 * rates.dram_gbps * DRAM_EFFICIENCY),
        "l2": work.l2_bytes / (L2_BYTES_PER_CYCLE * sm_cycles),
        "issue": work.instructions / (WARP_ISSUES_PER_CYCLE * sm_cycles),
        "math": work.fma / (_fma_per_cycle(problem, report, rates) * sm_cycles),
        "load/store": work.wavefronts / sm_cycles,
        "latency": waves * work.serial_cycles / warps / cycles_per_us,
    }
    limit = max(parts, key=lambda name: parts[name])
    return Prediction(LAUNCH_US + more_us + parts[limit], parts, limit, per_sm, waves)


@dataclass(frozen=True, slots=True)
class _Work:
    """Totals over all warps of a launch."""

    fma: float
    instructions: float
    wavefronts: float
    serial_cycles: float
    l2_bytes: float


def _work(problem: ConvProblem, launch: Launch, report: KernelReport) -> _Work:
    loop, around = report.loop, report.around
    if report.config.kernel == "conv1d_skinny":
        return _skinny_work(problem, launch, report)
    if report.config.kernel.endswith("_mma"):
        return _mma_work(problem, launch, report)
    fma = problem.flops() / 2 * _tile_waste(problem, launch, report)
    if not loop.fma:
        raise ValueError(f"{report.config.kernel}: no multiply-add found in its machine code")
    taps = _taps_per_pass(problem, report)
    if taps is None or around is None:
        passes = fma / loop.fma
        serial = passes * (_load_latency(loop.wavefronts) + FMA_LATENCY_CYCLES * loop.chain)
        return _Work(fma, passes * loop.instructions, passes * loop.wavefronts, serial, problem.bytes())

    # The loop body is unrolled over several taps; what is left over runs in the code around it.
    fma_per_tap = 4 if problem.is_complex else 1
    unroll = max(1, loop.useful // fma_per_tap)
    unroll_around = max(1, around.useful // fma_per_tap)
    main, rest = divmod(taps, unroll)
    rounds = fma / fma_per_tap / taps / 32  # visits of all warps to the loop
    instructions = main * loop.instructions + rest * around.instructions / unroll_around
    wavefronts = main * loop.wavefronts + rest * around.wavefronts / unroll_around
    steps = main + math.ceil(rest / 8)
    chain = FMA_LATENCY_CYCLES * (main * loop.chain + rest * around.chain / unroll_around)
    serial = steps * LOAD_LATENCY_CYCLES + chain
    return _Work(fma, rounds * instructions, rounds * wavefronts, rounds * serial, _re_read_bytes(problem))


def _skinny_work(problem: ConvProblem, launch: Launch, report: KernelReport) -> _Work:
    """Of the warps that multiply: their lanes may be few, and a chain of multiply-adds hides the loads that feed it."""
    loop, params = report.loop, dict(launch.params)
    macros = dict(report.config.macros)
    terms = loop.useful / int(macros["THREAD_N"]) / (4 if problem.is_complex else 1)  # of one pass
    passes = problem.C_in_g * problem.K / terms
    computing = launch.grid * params["compute_warps"]
    warps = launch.grid * math.ceil(launch.block / 32)
    input_bytes = launch.grid * problem.C_in_g * problem.K * int(macros["BLOCK_N"]) * problem.itemsize
    return _Work(
        fma=computing * passes * loop.fma,
        instructions=computing * passes * loop.instructions,
        wavefronts=computing * passes * loop.wavefronts,
        serial_cycles=warps * passes * FMA_LATENCY_CYCLES * loop.chain,
        l2_bytes=problem.bytes() + input_bytes,
    )


def _mma_work(problem: ConvProblem, launch: Launch, report: KernelReport) -> _Work:
    """Tensor cores: a pass of the loop is a stage of weights, and every chunk of channels stages a window around it."""
    loop, params, macros = report.loop, dict(launch.params), dict(report.config.macros)
    chunks = params["segment_chunks"] if macros["SEGMENT_MODE"] == "2" else params["chunks"]
    stages = chunks * params["pairs"] / (2 * int(macros["STAGE_STEPS"]))
    warps = launch.grid * launch.block / 32
    unit = 16 // problem.itemsize
    parts = 1 + int(macros["IS_SPLIT"])
    window_vectors = launch.grid * chunks * params["units"] * params["window_rows"]
    weight_bytes = launch.grid * chunks * params["pairs"] * parts * int(macros["BLOCK_M"]) * 16
    # Of each vector of the window a lane loads its elements one by one and stores its parts.
    staging = window_vectors / 32 * (unit + 4 * parts)
    return _Work(
        fma=warps * stages * loop.fma,
        instructions=warps * stages * loop.instructions + window_vectors / 32 * STAGING_INSTRUCTIONS * unit,
        wavefronts=warps * stages * loop.wavefronts + staging,
        serial_cycles=warps * stages * (LOAD_LATENCY_CYCLES / 4 + MMA_LATENCY_CYCLES * loop.chain),
        l2_bytes=weight_bytes + window_vectors * 16 + problem.bytes(),
    )


def _tile_waste(problem: ConvProblem, launch: Launch, report: KernelReport) -> float:
    """Outputs that the tiles cover over outputs that there are; 1 for kernels whose macros name no tile."""
    macros = dict(report.config.macros)
    if report.config.kernel == "conv1d_narrow":
        return int(macros["THREAD_C"]) / problem.C_out_g
    if not {"BLOCK_M", "BLOCK_N"} <= macros.keys():
        return 1.0
    covered = launch.grid * int(macros["BLOCK_M"]) * int(macros["BLOCK_N"])
    return max(1.0, covered / (problem.N * problem.C_out * problem.L_out))


def _gradient_waste(choice: Choice) -> float:
    """Sums that the threads of a weight gradient hold over sums that there are."""
    macros, params = dict(choice.config.macros), dict(choice.launch.params)
    if "BLOCK_M" in macros:
        held = choice.launch.grid * int(macros["BLOCK_M"]) * int(macros["BLOCK_N"])
    elif "THREAD_K" in macros:
        held = choice.launch.grid * choice.launch.block * int(macros["THREAD_K"])
    else:
        return 1.0
    slices = -(-params["N"] // params["slice_samples"]) * params["slice_pieces"]
    return held / (slices * params["C_coarse"] * params["C_fine_g"] * params["K"])


def _taps_per_pass(problem: ConvProblem, report: KernelReport) -> int | None:
    """Taps that one thread of a base kernel visits per input channel; None for kernels that unroll otherwise."""
    if report.config.kernel == "conv1d_direct":
        return problem.K
    if report.config.kernel == "conv_transpose1d_gather":
        return -(-problem.K // (problem.stride // math.gcd(problem.stride, problem.dilation)))
    return None


def _re_read_bytes(problem: ConvProblem) -> float:
    """What the blocks of a base kernel read through L2: 256 outputs of one row share a window and a row of weights."""
    p = problem
    outputs = p.N * p.C_out * p.L_out
    window = 256 / p.stride if p.transposed else 256 * p.stride
    span = p.dilation * (p.K - 1) / (p.stride if p.transposed else 1)
    per_block = p.C_in_g * (min(window + span, 256.0 * p.K) + p.K) * p.itemsize
    return outputs / 256 * per_block + outputs * p.itemsize


def _load_latency(wavefronts: int) -> int:
    return LOAD_LATENCY_CYCLES if wavefronts else 0


def _fma_per_cycle(problem: ConvProblem | WeightGradientProblem, report: KernelReport, rates: Rates) -> float:
    if report.loop.mix.get("tensor"):
        rate = rates.tensor16 if problem.itemsize == 2 else rates.tensor16 / 2
        return rate * rates.mma_share
    return rates.fp64 if problem.dtype in ("float64", "complex128") else rates.fp32
