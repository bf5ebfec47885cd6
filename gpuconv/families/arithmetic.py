"""How tensor cores form the products of each dtype and precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from ..device import Device

WARP = 32
UNIT_BYTES = 16  # of neighbouring channels, in shared memory and in packed weights
PAIRS_PER_STEP = 2  # (tap, unit) pairs of one mma
STAGE_STEPS = 2
STAGE_PAIRS = PAIRS_PER_STEP * STAGE_STEPS

# float32 by split TF32 (see cuda_src/mma.cuh): x = x_hi + x_lo and w = w_hi + w_lo with |x_lo| <= 2**-11 |x|, so that
#
#     w*x = w_hi*x_hi + (w_hi*x_lo + w_lo*x_hi) + w_lo*x_lo.
#
# In units of u = 2**-24 times the magnitude (the sum of |w|*|x|), the error of a sum of n products is at most
#     4           for w_lo*x_lo, which is left out: 2**-22;
#     4           for x_lo, rounded to TF32: 2**-11 of 2**-11;
#     8           for w_lo, cut off to TF32 by the hardware: 2**-10 of 2**-11;
#     n/400       for the sums of the small products, 2n of them and each at most 2**-11 of its large one;
#     20          for the sums of the large products, by blocks of at least 4: 5/4 of SPLIT_TERMS (see
#                 `gpuconv.reference.Sums.error_bound`). Each sum is of SPLIT_TERMS products alone, so these errors do
#                 not grow with n;
#     n/10 + 2    for adding those sums to a total, to nearest, and the small products' sum and the bias to that; sums
#                 of fewer than SPLIT_TERMS products, at the end of channels, included.
# That is within the n + 2 of the bound from n = 41 on. With one sum for all large products, in the place of 20 there
# would be 5n/4, which alone is more than the bound for n > 8. MIN_SPLIT_TERMS leaves a margin.
SPLIT_TERMS = 16
MIN_SPLIT_TERMS = 64


class Access(IntEnum):
    """What one access of the threads that stage the input loads.

    Attributes:
        POSITION: one position of a channel.
        PAIR: two neighbouring positions of a channel, of 16 bits each, in an aligned word.
        UNIT: one position of all channels of a unit, which are contiguous, 16 aligned bytes.
    """

    POSITION, PAIR, UNIT = range(3)

    @property
    def width(self) -> int:
        """How many positions it loads."""
        return 2 if self is Access.PAIR else 1

    @property
    def words(self) -> str:
        """What `explain` says of it."""
        return ("one position of a channel", "two positions of a channel", "16 bytes of contiguous channels")[self]


class Staging(NamedTuple):
    """Instructions of a lane that stages input: for each task, and for each element of it."""

    task: float
    element: float


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How tensor cores form the products of a dtype and precision.

    Attributes:
        instruction: the function of ptx.cuh that wraps one mma instruction.
        channels: of a unit, 16 bytes.
        parts: numbers that stand for one operand.
        min_arch: the first architecture that has the instruction.
        staging: of the input, for the cost model; by `Access`, None where there is none.
    """

    instruction: str
    channels: int
    parts: int
    min_arch: int
    staging: tuple[Staging | None, ...]

    @property
    def itemsize(self) -> int:
        return UNIT_BYTES // self.channels

    @property
    def products(self) -> int:
        """Instructions that multiply one pair of matrices."""
        return 3 if self.parts == 2 else 1


# Read from what of the machine code for sm_90 around the main loop runs where all channels exist (bench.static; a test
# compares them). Position by position a task of 4 and of 2 units takes 120 and 87 instructions in 16 bits, 107 and 82
# in TF32, 207 and 129 to 143 in split TF32, of 1 unit 89; at two positions 149 and 103. Where an access loads a unit,
# TF32 takes 96 and 60, split TF32 209, 115 to 140, and 92; 16-bit units are copied by a loop of their own.
#
# The least for 16 elements of 16 bits is 42 and 26: for each position or pair a load and its address, a permutation for
# two elements, a store for eight. For one element of split TF32 it is 9.5:
#     2           its load, and the address;
#     2           its large part: an addition and a mask, which are also what cvt.rna.tf32 is in machine code;
#     2           its small part: a subtraction, and an addition that rounds it;
#     3           whether it can be split: twice its bits minus a bound and a comparison find what is too small but not
#                 zero, a sum of magnitudes what is too large;
#     0.5         a quarter of two stores.
# Two positions a load would save 1 of them, four 1.5, but their stores meet bank conflicts.
_POSITIONS, _PAIRS, _UNITS = Staging(53, 2.1), Staging(58, 1.4), Staging(0, 1.3)
_FLOAT16 = Arithmetic("multiply_matrices_f16", 8, 1, 75, (_POSITIONS, _PAIRS, _UNITS))
_BFLOAT16 = Arithmetic("multiply_matrices_bf16", 8, 1, 80, (_POSITIONS, _PAIRS, _UNITS))
_TF32 = Arithmetic("multiply_matrices_tf32", 4, 1, 80, (Staging(57, 3.1), None, Staging(24, 4.5)))
_SPLIT_TF32 = Arithmetic("multiply_matrices_tf32", 4, 2, 80, (Staging(58, 9.4), None, Staging(52, 9.9)))

# By dtype and precision.
ARITHMETICS = {
    ("float16", "float32"): _FLOAT16,
    ("bfloat16", "float32"): _BFLOAT16,
    ("float32", "tf32"): _TF32,
    ("float32", "float32"): _SPLIT_TF32,
}


NO_ARITHMETIC = "needs float16 (sm_75), bfloat16 or float32 (sm_80)"


def arithmetics(device: Device) -> dict[tuple[str, str], Arithmetic]:
    """The entries of `ARITHMETICS` that a device supports."""
    return {key: found for key, found in ARITHMETICS.items() if device.arch >= found.min_arch}
