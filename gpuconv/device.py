"""What the kernel families need to know about a GPU, as a value that tests can construct."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """The properties of a GPU on which configurations depend.

    Attributes:
        name: the product, for display; `gpuconv.costs` also finds its memory bandwidth by it.
        arch: compute capability as one number, 90 for sm_90.
        num_sms: streaming multiprocessors.
        shared_per_block: the most bytes of shared memory of one block (the opt-in maximum).
        shared_per_sm: bytes of shared memory of one multiprocessor.
        l2_bytes: size of the L2 cache.
    """

    name: str
    arch: int
    num_sms: int
    shared_per_block: int
    shared_per_sm: int
    l2_bytes: int

    @property
    def arch_name(self) -> str:
        return f"sm_{self.arch}"

    @property
    def threads_per_sm(self) -> int:
        """The most resident threads of a multiprocessor (CUDA C++ Programming Guide, as for the table below)."""
        return {75: 1024, 86: 1536, 87: 1536, 89: 1536, 120: 1536, 121: 1536}.get(self.arch, 2048)

    @property
    def clock_ghz(self) -> float:
        """Boost clock in cycles per nanosecond: that of the product below (NVIDIA's data sheets), else a guess."""
        return {
            75: 1.590, 80: 1.410, 86: 1.695, 89: 2.520, 90: 1.980, 100: 1.850, 120: 2.407,
        }.get(self.arch, 1.8)  # fmt: skip

    @classmethod
    def from_arch(cls, arch: str) -> Device:
        """A typical GPU of an architecture, for planning without that GPU.

        Args:
            arch: "sm_90" and so on; see `ARCHITECTURES`.

        Raises:
            ValueError: the architecture is not in the table.
        """
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        return ARCHITECTURES[arch]


_KIB = 1024
_MIB = 1024 * 1024

# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Multiprocessors and L2:
# NVIDIA's architecture white papers, for the named product.
ARCHITECTURES = {
    "sm_75": Device("Tesla T4", 75, 40, 64 * _KIB, 64 * _KIB, 4 * _MIB),
    "sm_80": Device("A100", 80, 108, 163 * _KIB, 164 * _KIB, 40 * _MIB),
    "sm_86": Device("GeForce RTX 3090", 86, 82, 99 * _KIB, 100 * _KIB, 6 * _MIB),
    "sm_89": Device("GeForce RTX 4090", 89, 128, 99 * _KIB, 100 * _KIB, 72 * _MIB),
    "sm_90": Device("H200", 90, 132, 227 * _KIB, 228 * _KIB, 50 * _MIB),
    "sm_100": Device("B200", 100, 148, 227 * _KIB, 228 * _KIB, 126 * _MIB),
    "sm_120": Device("GeForce RTX 5090", 120, 170, 99 * _KIB, 100 * _KIB, 96 * _MIB),
}
