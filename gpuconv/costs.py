"""The peak rates and limits of GPUs: all constants behind predicted times and occupancy.

They are published figures and assumptions, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .device import Device


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates and limits of one GPU, besides those of `Device`.

    Attributes:
        dram_gbps: bandwidth of the memory on the data sheet, in GB/s, reads and writes together.
        fp32: float32 fused multiply-adds per multiprocessor and cycle.
        fp64: the same for float64.
        tensor16: fused multiply-adds per multiprocessor and cycle of the tensor cores on float16 and bfloat16 data with
            float32 accumulators; TF32 has half of it. 0 where TF32 and bfloat16 do not exist.
        blocks_per_sm: most blocks that one multiprocessor keeps.
        reserved_shared: bytes of shared memory that the system takes from every block.
        mma_share: of the rate of the tensor cores, what mma.sync reaches.
    """

    dram_gbps: float
    fp32: int
    fp64: int
    tensor16: int
    blocks_per_sm: int
    reserved_shared: int
    mma_share: float = 1.0


# Of every multiprocessor: its 32-bit registers; the instructions that it issues in a cycle, of warps and of threads.
REGISTERS_PER_SM = 65536
WARP_ISSUES_PER_CYCLE = 4
THREAD_ISSUES_PER_CYCLE = 32 * WARP_ISSUES_PER_CYCLE
# Bytes that a multiprocessor moves in a cycle to and from its shared memory, and L2 (an assumption).
SHARED_BYTES_PER_CYCLE = 128
L2_BYTES_PER_CYCLE = 24
# Families compare their configurations by the rates of an H200, whatever the GPU. Per multiprocessor and cycle: bytes
# to and from memory, 4.3 TB/s over 132 multiprocessors at 1.8 GHz; real multiply-adds, by the bytes of an accumulator.
MEMORY_BYTES_PER_CYCLE = 18.0
MULTIPLY_ADDS_PER_CYCLE = {4: 128, 8: 64}
# Bytes of shared memory that the system takes from every block from sm_80 on, and in those comparisons everywhere.
RESERVED_SHARED_BYTES = 1024
# Fraction of the data sheet's bandwidth that a large copy reaches; the usual result of copy benchmarks.
DRAM_EFFICIENCY = 0.9
# Cycles from a fused multiply-add, or from an mma.sync, to the next that needs its result.
FMA_LATENCY_CYCLES = 4
MMA_LATENCY_CYCLES = 33
# Cycles from a load to its data, and microseconds from one launch to the next in a CUDA graph (assumptions).
LOAD_LATENCY_CYCLES = 250
LAUNCH_US = 2.0

# Limits per multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" and
# "Arithmetic Instructions". Bandwidths and tensor rates: NVIDIA's data sheets of the products in
# gpuconv.device.ARCHITECTURES. mma.sync on sm_90: Luo et al., arXiv 2402.13499.
RATES = {
    "sm_75": Rates(320, 64, 2, 0, 16, 0),
    "sm_80": Rates(2039, 64, 32, 1024, 32, RESERVED_SHARED_BYTES),
    "sm_86": Rates(936, 128, 2, 256, 16, RESERVED_SHARED_BYTES),
    "sm_89": Rates(1008, 128, 2, 256, 24, RESERVED_SHARED_BYTES),
    "sm_90": Rates(4800, 128, 64, 2048, 32, RESERVED_SHARED_BYTES, 0.63),
    "sm_100": Rates(8000, 128, 64, 4096, 32, RESERVED_SHARED_BYTES),
    "sm_120": Rates(1792, 128, 2, 256, 24, RESERVED_SHARED_BYTES),
}

# Products that differ from their architecture's entry only in the bandwidth of their memory, in GB/s on the data sheet.
SIBLINGS = {"sm_90": {"H100": 3350.0}}


@dataclass(frozen=True, slots=True)
class Work:
    """What a family knows of the work of its kernel's launch that the machine code does not tell.

    Attributes:
        multiply_adds: real ones of all lanes, with idle lanes and the parts of tiles behind the ends of the result.
        l2_bytes: read and written through L2.
        warps: the number of those that multiply; None for all of the launch.
        load_share: the share of a load's latency that each pass of the main loop waits for.
        staging_instructions, staging_wavefronts: of all warps together, outside of the main loop.
        taps: of one visit to a main loop that is unrolled over taps; None for other main loops.
    """

    multiply_adds: float
    l2_bytes: float
    warps: int | None = None
    load_share: float = 1.0
    staging_instructions: float = 0.0
    staging_wavefronts: float = 0.0
    taps: int | None = None


def rates_of(device: Device) -> Rates:
    """The rates of a device's architecture, with the memory of the product where its name says which it is.

    Raises:
        ValueError: the architecture is not in the table.
    """
    if device.arch_name not in RATES:
        raise ValueError(f"no rates for {device.arch_name}; known: {', '.join(RATES)}")
    rates = RATES[device.arch_name]
    siblings = SIBLINGS.get(device.arch_name, {})
    bandwidth = next((gbps for name, gbps in siblings.items() if name in device.name), rates.dram_gbps)
    return replace(rates, dram_gbps=bandwidth)


def blocks_per_sm(registers: int, threads: int, shared_bytes: int, device: Device) -> int:
    """How many blocks one multiprocessor keeps at a time; 0 where not even one fits.

    Registers come in units of 256 per warp out of a quarter of the multiprocessor's file; shared memory in units of
    128 bytes, the system's share included.

    Args:
        registers: of a thread.
        threads: of a block.
        shared_bytes: of a block.
        device: the GPU.

    Raises:
        ValueError: the architecture is not in the table.
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
