"""The time that a kernel should take, from its machine code and the numbers of the GPU: the model of bench/README.md.

Predictions are written down before a measurement, so that a miss teaches something. They are never measurements.
"""

from __future__ import annotations

import math
from dataclasses import replace

from gpuconv.costs import (
    FMA_LATENCY_CYCLES,
    LOAD_LATENCY_CYCLES,
    MMA_LATENCY_CYCLES,
    SHARED_LATENCY_CYCLES,
    Code,
    Prediction,
    Unit,
    Work,
    blocks_per_sm,
    cuda_cores,
    predict_launch,
    tensor_cores,
)
from gpuconv.device import Device
from gpuconv.dispatch import Choice, families
from gpuconv.families import Launch
from gpuconv.families.passes import predict_pass
from gpuconv.problem import Problem

from .sass import KernelReport, Loop


def predict(problem: Problem, choice: Choice, report: KernelReport, device: Device) -> Prediction:
    """Predict one call under CUDA graph replay with cold caches; `report` is that of the chosen kernel.

    The parts are those of the chosen kernel; what packs weights and adds sums is only in the total.

    Raises:
        ValueError: not even one block fits a multiprocessor.
    """
    (family,) = (family for family in families(problem.kind) if family.name == choice.family)
    main = predict_kernel(problem, choice.launch, family.work(problem, choice.step), report, device)
    others = (predict_pass(problem, step, device).us for step in choice.plan.steps if step is not choice.step)
    return replace(main, us=main.us + sum(others))


def predict_kernel(problem: Problem, launch: Launch, work: Work, report: KernelReport, device: Device) -> Prediction:
    """The time of the kernel that computes a problem, without those before and behind it.

    Raises:
        ValueError: not even one block fits a multiprocessor.
    """
    shared = launch.shared_bytes + report.resources.static_shared_bytes
    per_sm = blocks_per_sm(report.resources.registers, launch.block, shared, device)
    if per_sm == 0:
        raise ValueError(f"a block of {report.config.kernel} does not fit {device.name}")
    if work.dram_bytes is None:
        work = replace(work, dram_bytes=problem.bytes())
    warps = work.warps or launch.grid * math.ceil(launch.block / 32)
    return predict_launch(
        work,
        _code(problem, work, report, warps),
        blocks=launch.grid,
        resident=per_sm,
        unit=_unit(problem, report.loop, device),
        device=device,
    )


def _code(problem: Problem, work: Work, report: KernelReport, warps: int) -> Code:
    loop, around = report.loop, report.around
    if not loop.fma:
        raise ValueError(f"{report.config.kernel}: no multiply-add found in its machine code")
    if work.taps is None or around is None:
        passes = work.multiply_adds / loop.fma
        load = work.load_share * _load_latency(loop)
        chained = MMA_LATENCY_CYCLES if loop.mix.get("tensor") else FMA_LATENCY_CYCLES
        instructions, wavefronts = work.staging_instructions, work.staging_wavefronts
        if around is not None:
            instructions += work.visits * around.instructions
            wavefronts += work.visits * around.wavefronts
        return Code(
            passes * loop.instructions + instructions,
            passes * loop.wavefronts + wavefronts,
            passes / warps * (load + chained * loop.chain),
        )
    # The loop body is unrolled over several taps; what is left over runs in the code around it.
    per_tap = 4 if problem.dtype.startswith("complex") else 1  # multiply-adds
    main, rest = divmod(work.taps, max(1, loop.useful // per_tap))
    share = rest / max(1, around.useful // per_tap)
    visits = work.multiply_adds / per_tap / work.taps / 32
    chain = FMA_LATENCY_CYCLES * (main * loop.chain + share * around.chain)
    return Code(
        visits * (main * loop.instructions + share * around.instructions),
        visits * (main * loop.wavefronts + share * around.wavefronts),
        visits / warps * ((main + math.ceil(rest / 8)) * LOAD_LATENCY_CYCLES + chain),
    )


def _load_latency(loop: Loop) -> int:
    """Cycles from the slowest load of a pass to its data."""
    if any(kind.startswith(("global load", "asynchronous copy")) for kind in loop.accesses):
        return LOAD_LATENCY_CYCLES
    return SHARED_LATENCY_CYCLES if loop.wavefronts else 0


def _unit(problem: Problem, loop: Loop, device: Device) -> Unit:
    if loop.mix.get("tensor"):
        return tensor_cores(device, problem.itemsize)
    is_double = problem.dtype in ("float64", "complex128")
    return cuda_cores(device, 8 if is_double else 4)
