"""What each architecture can do at best: the numbers behind occupancy, floors and predictions.

Published figures, not measurements: `bench.run` measures its own ceilings and prefers them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpuconv.device import Device

from .layers import Ceilings


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates and limits of one GPU.

    Attributes:
        dram_gbps: bandwidth of the memory on the data sheet, in GB/s, reads and writes together.
        fp32: float32 fused multiply-adds per multiprocessor and cycle.
        fp64: the same for float64.
        tensor16: fused multiply-adds per multiprocessor and cycle of the tensor cores on float16 and bfloat16 data with
            float32 accumulators; TF32 has half of it. 0 where TF32 and bfloat16 do not exist.
        warps_per_sm: most warps that one multiprocessor keeps.
        blocks_per_sm: most blocks that one multiprocessor keeps.
        reserved_shared: bytes of shared memory that the system takes from every block.
    """

    dram_gbps: float
    fp32: int
    fp64: int
    tensor16: int
    warps_per_sm: int
    blocks_per_sm: int
    reserved_shared: int


REGISTERS_PER_SM = 65536
ISSUE_SLOTS_PER_SM = 4

# Fraction of the data sheet's bandwidth that a large copy reaches; the usual result of copy benchmarks.
DRAM_EFFICIENCY = 0.9

# Limits per multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" and
# "Arithmetic Instructions". Bandwidths and tensor rates: NVIDIA's data sheets of the products in
# gpuconv.device.ARCHITECTURES.
RATES = {
    "sm_75": Rates(320, 64, 2, 0, 32, 16, 0),
    "sm_80": Rates(2039, 64, 32, 1024, 64, 32, 1024),
    "sm_86": Rates(936, 128, 2, 256, 48, 16, 1024),
    "sm_89": Rates(1008, 128, 2, 256, 48, 24, 1024),
    "sm_90": Rates(4800, 128, 64, 2048, 64, 32, 1024),
    "sm_100": Rates(8000, 128, 64, 4096, 64, 32, 1024),
    "sm_120": Rates(1792, 128, 2, 256, 48, 24, 1024),
}


# Products that differ from their architecture's entry only in the bandwidth of their memory, in GB/s on the data sheet.
SIBLINGS = {"sm_90": {"H100": 3350.0}}


def products(arch: str) -> tuple[Device, ...]:
    """The products of an architecture that predictions are made for."""
    device = Device.from_arch(arch)
    return (device, *(replace(device, name=name) for name in SIBLINGS.get(arch, {})))


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


def published_ceilings(device: Device) -> Ceilings:
    """The ceilings of a device from the table above, for floors where nothing was measured."""
    rates = rates_of(device)
    per_fma = 2e9 * device.num_sms * device.clock_ghz  # operations per second of one fused multiply-add per cycle
    flops = {"float32": rates.fp32, "float64": rates.fp64}
    if rates.tensor16:
        flops |= {"float16": rates.tensor16, "bfloat16": rates.tensor16, "tf32": rates.tensor16 // 2}
    else:
        flops |= {"float16": rates.fp32, "bfloat16": rates.fp32}
    return Ceilings(
        f"{device.name}, data sheet",
        rates.dram_gbps * DRAM_EFFICIENCY * 1e9,
        {precision: rate * per_fma for precision, rate in flops.items()},
    )
