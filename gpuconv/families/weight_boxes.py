"""How the kernels that pack weights cut them into boxes, one a block: see cuda_src/weight_source.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Layout, contiguous_strides
from .offsets import Overhang
from .product import Product

MAX_ROWS = 64
# Shared memory of a block without the rows' padding: small enough that a multiprocessor holds several blocks, which
# hide the latency of each other's loads.
MAX_BYTES = 24 * 1024
VECTOR_BYTES = 16


@dataclass(frozen=True, slots=True)
class WeightBoxes:
    """A box, and how many of them there are along each axis.

    Attributes:
        product: the product whose weights are packed.
        out: output channels of a box.
        phases: phases of each of them; all phases, or some of one channel.
        channels: input channels of a box.
        taps: taps of a box.
        out_parts, phase_parts, in_parts, tap_parts: the numbers of boxes.
    """

    product: Product
    out: int
    phases: int
    channels: int
    taps: int
    out_parts: int
    phase_parts: int
    in_parts: int
    tap_parts: int

    @staticmethod
    def max_terms(product: Product) -> int:
        """The (input channel, tap) pairs that a box holds at most."""
        out, phases, _ = _rows(product)
        return MAX_BYTES // (out * phases * product.problem.itemsize)

    @classmethod
    def of(cls, product: Product, *, rows: int, channels: int, taps: int, box_channels: int) -> WeightBoxes:
        """Boxes of `box_channels` input channels that cover `rows`, `channels` and `taps`.

        These may be more than the product has; zeros are packed for the rest.
        """
        out, box_phases, phase_parts = _rows(product)
        phases = product.phases if product.phases_in_rows else 1
        tap_parts = -(-taps // max(1, cls.max_terms(product) // box_channels))
        return cls(
            product,
            out,
            box_phases,
            box_channels,
            -(-taps // tap_parts),
            -(-rows // (phases * out)),
            phase_parts,
            -(-channels // box_channels),
            tap_parts,
        )

    @property
    def grid(self) -> int:
        """Boxes of all products. A box has hundreds of bytes, so memory is exhausted before the grid is too large."""
        return self.product.products * self.out_parts * self.phase_parts * self.in_parts * self.tap_parts

    @property
    def overhang(self) -> Overhang:
        """How far behind the weights offsets are formed before they are checked."""
        return Overhang(
            rows=self.out_parts * self.out,
            channels=self.in_parts * self.channels,
            taps=(self.tap_parts * self.taps + 1) * self.product.problem.stride,
            arrays=("weight",),
        )

    @property
    def _is_whole(self) -> bool:
        """Whether a box has every k of its channels."""
        has_all = not self.product.problem.transposed or self.product.phases_in_rows or self.product.phases == 1
        return has_all and self.tap_parts == self.phase_parts == 1

    @property
    def _k(self) -> int:
        return self.product.problem.K if self._is_whole else self.taps * self.phases

    @property
    def _pitch(self) -> int:
        """Elements from an outer channel to the next: an odd number of vectors, for lanes that read several of them."""
        inner, itemsize = self.out if self.product.problem.transposed else self.channels, self.product.problem.itemsize
        return (-(-inner * self._k * itemsize // VECTOR_BYTES) | 1) * VECTOR_BYTES // itemsize

    def _is_wide(self, layout: Layout) -> bool:
        """Whether a box's weights of an outer channel are contiguous and begin and end at multiples of 16 bytes."""
        p, weight = self.product.problem, layout["weight"]
        row_bytes = p.weight_shape[1] * p.K * p.itemsize
        inner, inner_parts = (self.out, self.out_parts) if p.transposed else (self.channels, self.in_parts)
        return (
            self._is_whole
            and weight.alignment == VECTOR_BYTES
            and weight.strides == contiguous_strides(p.weight_shape)
            and row_bytes % VECTOR_BYTES == 0
            and (inner_parts == 1 or inner * p.K * p.itemsize % VECTOR_BYTES == 0)
        )

    @property
    def shared_bytes(self) -> int:
        outer = self.channels if self.product.problem.transposed else self.out
        return outer * self._pitch * self.product.problem.itemsize

    def params(self, layout: Layout) -> dict[str, int]:
        """The fields of Params, in order."""
        return {
            "box_out": self.out,
            "box_phases": self.phases,
            "box_in": self.channels,
            "box_taps": self.taps,
            "box_pitch": self._pitch,
            "box_k": self._k,
            "out_parts": self.out_parts,
            "phase_parts": self.phase_parts,
            "in_parts": self.in_parts,
            "tap_parts": self.tap_parts,
            "is_wide": int(self._is_wide(layout)),
        }


def _rows(product: Product) -> tuple[int, int, int]:
    """Output channels and phases of a box, and the boxes of all phases.

    The number of channels is a power of two, so that boxes are aligned for any K.
    """
    if not product.phases_in_rows or product.phases == 1:
        return MAX_ROWS // 2, 1, 1
    parts = -(-product.phases // MAX_ROWS)
    phases = -(-product.phases // parts)
    return (1 << (MAX_ROWS // phases).bit_length() - 1 if parts == 1 else 1), phases, parts
