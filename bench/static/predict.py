"""The time that a kernel should take, from its machine code and the numbers of the GPU: the model of bench/README.md.

Predictions are written down before a measurement, so that a miss teaches something. They are never measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gpuconv.costs import (
    DRAM_EFFICIENCY,
    FMA_LATENCY_CYCLES,
    L2_BYTES_PER_CYCLE,
    LAUNCH_US,
    LOAD_LATENCY_CYCLES,
    MMA_LATENCY_CYCLES,
    WARP_ISSUES_PER_CYCLE,
    Rates,
    Work,
    blocks_per_sm,
    rates_of,
)
from gpuconv.device import Device
from gpuconv.dispatch import Choice, families
from gpuconv.families import Launch
from gpuconv.problem import Problem

from .sass import KernelReport, Loop


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted time of one call and its parts, in microseconds.

    Attributes:
        us: the launches, what they hand to each other through memory, and the largest of the parts.
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
    (family,) = (family for family in families(problem.kind) if family.name == choice.family)
    main = predict_kernel(problem, choice.launch, family.work(problem, choice.step), report, device)
    # Packed weights and partial sums are written by one kernel and read by another.
    dram_gbps = rates_of(device).dram_gbps * DRAM_EFFICIENCY
    more_us = sum(LAUNCH_US + 2 * num_bytes / (1e3 * dram_gbps) for _, num_bytes in choice.plan.scratch)
    return replace(main, us=main.us + more_us)


def predict_kernel(problem: Problem, launch: Launch, work: Work, report: KernelReport, device: Device) -> Prediction:
    """The time of the kernel that computes a problem, without those before and behind it.

    Raises:
        ValueError: not even one block fits a multiprocessor, or the architecture's rates are unknown.
    """
    rates = rates_of(device)
    shared = launch.shared_bytes + report.resources.static_shared_bytes
    per_sm = blocks_per_sm(report.resources.registers, launch.block, shared, device)
    if per_sm == 0:
        raise ValueError(f"a block of {report.config.kernel} does not fit {device.name}")
    waves = math.ceil(launch.grid / (device.num_sms * per_sm))
    cycles_per_us = 1e3 * device.clock_ghz
    # The multiprocessor with the most blocks decides.
    sm_cycles = launch.grid / math.ceil(launch.grid / device.num_sms) * cycles_per_us
    warps = work.warps or launch.grid * math.ceil(launch.block / 32)
    run = _run(problem, work, report)
    parts = {
        "dram": problem.bytes() / (1e3 * rates.dram_gbps * DRAM_EFFICIENCY),
        "l2": work.l2_bytes / (L2_BYTES_PER_CYCLE * sm_cycles),
        "issue": run.instructions / (WARP_ISSUES_PER_CYCLE * sm_cycles),
        "math": work.multiply_adds / (_fma_per_cycle(problem, report.loop, rates) * sm_cycles),
        "load/store": run.wavefronts / sm_cycles,
        "latency": waves * run.serial_cycles / warps / cycles_per_us,
    }
    limit = max(parts, key=lambda name: parts[name])
    return Prediction(LAUNCH_US + parts[limit], parts, limit, per_sm, waves)


@dataclass(frozen=True, slots=True)
class _Run:
    """Totals over all warps of a launch; `serial_cycles` is what each takes if it never waits for another."""

    instructions: float
    wavefronts: float
    serial_cycles: float


def _run(problem: Problem, work: Work, report: KernelReport) -> _Run:
    loop, around = report.loop, report.around
    if not loop.fma:
        raise ValueError(f"{report.config.kernel}: no multiply-add found in its machine code")
    if work.taps is None or around is None:
        passes = work.multiply_adds / loop.fma
        load = LOAD_LATENCY_CYCLES * work.load_share if loop.wavefronts else 0.0
        chained = MMA_LATENCY_CYCLES if loop.mix.get("tensor") else FMA_LATENCY_CYCLES
        return _Run(
            passes * loop.instructions + work.staging_instructions,
            passes * loop.wavefronts + work.staging_wavefronts,
            passes * (load + chained * loop.chain),
        )
    # The loop body is unrolled over several taps; what is left over runs in the code around it.
    per_tap = 4 if problem.dtype.startswith("complex") else 1  # multiply-adds
    main, rest = divmod(work.taps, max(1, loop.useful // per_tap))
    share = rest / max(1, around.useful // per_tap)
    visits = work.multiply_adds / per_tap / work.taps / 32
    chain = FMA_LATENCY_CYCLES * (main * loop.chain + share * around.chain)
    return _Run(
        visits * (main * loop.instructions + share * around.instructions),
        visits * (main * loop.wavefronts + share * around.wavefronts),
        visits * ((main + math.ceil(rest / 8)) * LOAD_LATENCY_CYCLES + chain),
    )


def _fma_per_cycle(problem: Problem, loop: Loop, rates: Rates) -> float:
    if loop.mix.get("tensor"):
        return rates.mma_share * (rates.tensor16 if problem.itemsize == 2 else rates.tensor16 / 2)
    return rates.fp64 if problem.dtype in ("float64", "complex128") else rates.fp32
