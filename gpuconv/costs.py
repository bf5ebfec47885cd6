"""The cost model: the predicted time of a launch, from the work that it does and the rates of the GPU.

Families compare their tiles with it, and bench.static predicts times with it. Its constants are published figures or
assumptions, not measurements; each says which.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .device import Device


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates and limits of one GPU, besides those of `Device`.

    Attributes:
        dram_gbps: bandwidth of the memory by the data sheet, in GB/s, reads and writes together.
        fp32: float32 fused multiply-adds per multiprocessor and cycle.
        fp64: the same for float64.
        tensor16: fused multiply-adds per multiprocessor and cycle of the tensor cores on float16 and, from sm_80 on,
            bfloat16 data with float32 accumulators; TF32, from sm_80 on, has half of it.
        blocks_per_sm: the most blocks that are resident on one multiprocessor.
        reserved_shared: bytes of shared memory that the system reserves for each block.
        mma_share: the fraction of the tensor cores' rate that mma.sync reaches.
    """

    dram_gbps: float
    fp32: int
    fp64: int
    tensor16: int
    blocks_per_sm: int
    reserved_shared: int
    mma_share: float = 1.0


# Of each multiprocessor: its 32-bit registers, and the warp instructions that it issues per cycle. Shared memory and L1
# serve one wavefront of a warp, 128 bytes, per cycle (CUDA C++ Programming Guide).
REGISTERS_PER_SM = 65536
WARP_ISSUES_PER_CYCLE = 4
# Bytes per cycle from L2 to one multiprocessor: while all of them read, 5.5 TB/s over 132 at 1.75 GHz (an assumption,
# from published microbenchmarks of H100); at most, the width of its port (Ampere white paper).
L2_BYTES_PER_CYCLE = 24
L2_PORT_BYTES_PER_CYCLE = 64
SECTOR_BYTES = 32  # the smallest transfer from L2 (programming guide)
LINE_BYTES = 128  # of L1, which holds some of its sectors
# Bytes of shared memory that the system reserves for each block, from sm_80 on.
RESERVED_SHARED_BYTES = 1024
# Fraction of the data sheet's bandwidth that a large copy reaches; the usual result of copy benchmarks.
DRAM_EFFICIENCY = 0.9
# Fraction of the boost clock that long kernels on tensor cores keep: 1.75 of 1.98 GHz on H100 (assumed for all GPUs).
LOAD_CLOCK_SHARE = 1.75 / 1.98
# Several limits together take longer than the largest alone, because loads, products and stores of a few warps overlap
# only in part. A norm with this exponent makes two equal limits 26 % and four 59 % longer than one (an assumption).
OVERLAP_POWER = 3.0
# Cycles from a fused multiply-add, or from an mma.sync, to the next that needs its result (microbenchmarks of sm_90).
FMA_LATENCY_CYCLES = 4
MMA_LATENCY_CYCLES = 33
# Cycles from a load of shared memory to its data (microbenchmarks of sm_90), from another load to its data, and
# microseconds from one launch to the next in a CUDA graph (assumptions).
SHARED_LATENCY_CYCLES = 30
LOAD_LATENCY_CYCLES = 250
LAUNCH_US = 2.0

# Limits per multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" and
# "Arithmetic Instructions". Bandwidths and tensor rates: NVIDIA's data sheets of the products in
# gpuconv.device.ARCHITECTURES. mma.sync on sm_90: Luo et al., arXiv 2402.13499.
RATES = {
    "sm_75": Rates(320, 64, 2, 512, 16, 0),
    "sm_80": Rates(2039, 64, 32, 1024, 32, RESERVED_SHARED_BYTES),
    "sm_86": Rates(936, 128, 2, 256, 16, RESERVED_SHARED_BYTES),
    "sm_89": Rates(1008, 128, 2, 256, 24, RESERVED_SHARED_BYTES),
    "sm_90": Rates(4800, 128, 64, 2048, 32, RESERVED_SHARED_BYTES, 0.63),
    "sm_100": Rates(8000, 128, 64, 4096, 32, RESERVED_SHARED_BYTES),
    "sm_120": Rates(1792, 128, 2, 256, 24, RESERVED_SHARED_BYTES),
}

# Products that differ from their architecture's entry only in the bandwidth of their memory, in GB/s on the data sheet.
SIBLINGS = {"sm_90": {"H100": 3350.0}}


class Ending(NamedTuple):
    """What the blocks of a launch do after their main loop.

    Attributes:
        instructions, wavefronts: as of `Code`.
        stored_bytes: that they store.
        sector_bytes: what L2 takes besides, where the results in a sector are stored by several instructions.
    """

    instructions: float = 0.0
    wavefronts: float = 0.0
    stored_bytes: float = 0.0
    sector_bytes: float = 0.0


_NO_ENDING = Ending()


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a launch as a family knows it without the machine code, of all blocks together.

    Attributes:
        multiply_adds: real ones, including those of idle lanes and of the parts of tiles beyond the result.
        l2_bytes: read and written through L2.
        warps: the number of warps that multiply; None for all warps of the launch.
        load_share: the fraction of a load's latency for which each pass of the main loop waits.
        staging_instructions, staging_wavefronts: those of the staging code that `visits` does not count, of all warps.
        taps: those of one visit to a main loop that is unrolled over taps; None for other main loops.
        visits: how often warps run the code around their main loop, of all warps.
        dram_bytes: read from memory and written to it; None for the bytes of the problem's arrays.
        waits: cycles for which a single block waits outside of its main loop.
        ending: what follows the main loop; only its bytes are also counted above.
    """

    multiply_adds: float
    l2_bytes: float
    warps: int | None = None
    load_share: float = 1.0
    staging_instructions: float = 0.0
    staging_wavefronts: float = 0.0
    taps: int | None = None
    visits: float = 0.0
    dram_bytes: float | None = None
    waits: float = 0.0
    ending: Ending = _NO_ENDING


class Code(NamedTuple):
    """What a launch executes before its ending, of all warps together: read from the machine code, or estimated.

    Attributes:
        instructions: warp instructions.
        wavefronts: accesses to shared memory and L1, 128 bytes each.
        chain: cycles that one block takes alone.
    """

    instructions: float
    wavefronts: float
    chain: float


class Unit(NamedTuple):
    """The units that multiply: multiply-adds per cycle of a multiprocessor, and whether they are tensor cores."""

    rate: float
    is_tensor: bool = False


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted time of a launch, or of several, and its parts, in microseconds.

    Attributes:
        us: from the launch to the next one; several launches are added up.
        parts: "dram", "l2", "issue", "math", "load/store" and "latency": what each would take by itself.
        limit: the name of the largest part.
        blocks_per_sm: blocks that are resident on one multiprocessor.
        waves: the number of waves of the grid.
    """

    us: float
    parts: dict[str, float]
    limit: str
    blocks_per_sm: int
    waves: int


def predict_launch(work: Work, code: Code, *, blocks: int, resident: int, unit: Unit, device: Device) -> Prediction:
    """The time of one launch under CUDA graph replay with cold caches: the model of bench/README.md.

    Args:
        work: what the launch does; `dram_bytes` must be given.
        code: what it executes.
        blocks: the number of its blocks.
        resident: how many of them are resident on one multiprocessor.
        unit: the units that multiply.
        device: the GPU; an architecture that is not in the table counts as the nearest older one.
    """
    assert work.dram_bytes is not None
    machine = _machine(device)
    ending = work.ending
    busiest = -(-blocks // machine.num_sms)  # blocks of the multiprocessor with the most
    waves = -(-busiest // resident)
    share = busiest / blocks
    cycles = _Parts(
        dram=(work.dram_bytes - ending.stored_bytes) / machine.dram_bytes,
        l2=_l2_cycles(work.l2_bytes - ending.stored_bytes, share, machine),
        issue=code.instructions * share / WARP_ISSUES_PER_CYCLE,
        math=work.multiply_adds * share / unit.rate,
        local=code.wavefronts * share,
        latency=waves * (code.chain + work.waits),
    )
    stores = _Parts(
        dram=ending.stored_bytes / machine.dram_bytes,
        l2=_l2_cycles(ending.stored_bytes + ending.sector_bytes, share, machine),
        issue=ending.instructions * share / WARP_ISSUES_PER_CYCLE,
        math=0.0,
        local=ending.wavefronts * share,
        latency=0.0,
    )
    together = _Parts(*map(sum, zip(cycles, stores, strict=True)))
    joint = together.norm(unit)
    total = joint
    if ending != _NO_ENDING:
        # Each block first multiplies and then stores, but while one block stores, other resident blocks multiply.
        total += (cycles.norm(unit) + stores.norm(unit) - joint) / min(resident, busiest)
    parts = {name: value / machine.cycles_per_us for name, value in zip(_PARTS, together, strict=True)}
    return Prediction(
        LAUNCH_US + total / machine.cycles_per_us, parts, max(parts, key=parts.__getitem__), resident, waves
    )


_PARTS = ("dram", "l2", "issue", "math", "load/store", "latency")


class _Parts(NamedTuple):
    """Cycles of the multiprocessor with the most blocks, by what limits them."""

    dram: float
    l2: float
    issue: float
    math: float
    local: float
    latency: float

    def norm(self, unit: Unit) -> float:
        """The cycles of all limits together.

        Bytes from memory also pass through L2, and a fused multiply-add of the CUDA cores is also an issued
        instruction, so of each of these pairs only the larger limit counts.
        """
        memory = max(self.dram, self.l2)
        issue, math = (self.issue, self.math) if unit.is_tensor else (max(self.issue, self.math), 0.0)
        powers = (part**OVERLAP_POWER for part in (memory, issue, math, self.local, self.latency))
        return float(sum(powers) ** (1 / OVERLAP_POWER))


class _Machine(NamedTuple):
    """A GPU under load; `dram_bytes` is the bandwidth of its memory in bytes per cycle."""

    num_sms: int
    cycles_per_us: float
    dram_bytes: float


@lru_cache(maxsize=64)
def _machine(device: Device) -> _Machine:
    cycles_per_us = 1e3 * clock_under_load(device)
    return _Machine(device.num_sms, cycles_per_us, rates_of(device).dram_gbps * DRAM_EFFICIENCY * 1e3 / cycles_per_us)


def _l2_cycles(num_bytes: float, share: float, machine: _Machine) -> float:
    """Cycles of the slower one: L2 as a whole, or the port of the multiprocessor with the most blocks."""
    return num_bytes * max(1 / (L2_BYTES_PER_CYCLE * machine.num_sms), share / L2_PORT_BYTES_PER_CYCLE)


def memory_bytes_per_cycle(device: Device) -> float:
    """Bytes of memory per cycle for each multiprocessor while all are at work."""
    return _machine(device).dram_bytes / device.num_sms


def clock_under_load(device: Device) -> float:
    """Cycles per nanosecond that a busy GPU keeps."""
    return LOAD_CLOCK_SHARE * device.clock_ghz


def rates_of(device: Device) -> Rates:
    """The rates of a device's architecture, with the bandwidth of the product if its name is in `SIBLINGS`.

    An architecture that is not in the table has the rates of the nearest older one, or of the first.
    """
    known = {int(name[3:]): name for name in RATES}
    arch = known[max((arch for arch in known if arch <= device.arch), default=min(known))]
    siblings = SIBLINGS.get(arch, {}) if arch == device.arch_name else {}
    bandwidth = next((gbps for name, gbps in siblings.items() if name in device.name), RATES[arch].dram_gbps)
    return replace(RATES[arch], dram_gbps=bandwidth)


def cuda_cores(device: Device, accumulator_bytes: int, *, is_complex: bool = False) -> Unit:
    """The CUDA cores that compute fused multiply-adds with accumulators of so many bytes."""
    rates = rates_of(device)
    is_double = accumulator_bytes // (2 if is_complex else 1) == 8
    return Unit(rates.fp64 if is_double else rates.fp32)


def tensor_cores(device: Device, itemsize: int) -> Unit:
    """The tensor cores, through mma.sync: for data of 2 bytes, or of 4 bytes as TF32."""
    rates = rates_of(device)
    return Unit(rates.mma_share * (rates.tensor16 if itemsize == 2 else rates.tensor16 / 2), is_tensor=True)


def blocks_by_shared(shared_bytes: int, device: Device) -> int:
    """How many blocks with so much dynamic shared memory fit on one multiprocessor, as far as shared memory limits."""
    return device.shared_per_sm // (shared_bytes + RESERVED_SHARED_BYTES)


def blocks_per_sm(registers: int, threads: int, shared_bytes: int, device: Device) -> int:
    """How many blocks are resident on one multiprocessor at a time; 0 where not even one fits.

    Registers are allocated in units of 256 per warp, from a quarter of the multiprocessor's register file; shared
    memory in units of 128 bytes, including what the system reserves.

    Args:
        registers: of a thread.
        threads: of a block.
        shared_bytes: of a block.
        device: the GPU.
    """
    rates = rates_of(device)
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    warps_by_registers = REGISTERS_PER_SM // WARP_ISSUES_PER_CYCLE // per_warp * WARP_ISSUES_PER_CYCLE
    shared = -(-(shared_bytes + rates.reserved_shared) // 128) * 128
    limits = [rates.blocks_per_sm, device.threads_per_sm // 32 // warps, warps_by_registers // warps]
    if shared:
        limits.append(device.shared_per_sm // shared)
    return min(limits)
