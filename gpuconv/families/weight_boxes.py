"""How the kernels that pack weights cut them into boxes, one a block: see cuda_src/weight_source.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from .offsets import Overhang
from .product import Product

MAX_ROWS = 32  # of a box: lanes of a warp store those of one tap side by side
ROW_PADDING = 1  # kRowPadding of the kernels
# Of the shared memory of a block, so that a multiprocessor holds blocks enough to hide the latency of their loads.
MAX_BYTES = 24 * 1024


@dataclass(frozen=True, slots=True)
class WeightBoxes:
    """A box, and how many of them there are along each axis.

    Attributes:
        product: whose weights they are.
        out: output channels of a box.
        phases: of each of them; all, or some of one channel.
        channels: input channels.
        taps: of a product.
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

    @classmethod
    def of(
        cls, product: Product, *, rows: int, channels: int, taps: int, box_channels: int, box_taps: int
    ) -> WeightBoxes:
        """Boxes of so many input channels and at most so many taps that cover the rows, channels and taps of a product.

        Those may be more than the product has; then zeros are packed.
        """
        phases = product.phases if product.phases_in_rows else 1
        out_channels = -(-rows // phases)
        out, box_channels = min(max(1, MAX_ROWS // phases), out_channels), min(box_channels, channels)
        phase_parts, tap_parts = -(-phases // MAX_ROWS), -(-taps // box_taps)
        return cls(
            product,
            out,
            -(-phases // phase_parts),
            box_channels,
            -(-taps // tap_parts),
            -(-out_channels // out),
            phase_parts,
            -(-channels // box_channels),
            tap_parts,
        )

    @property
    def grid(self) -> int:
        """Boxes of all products. Each has 256 bytes or more, so that memory ends before the numbers of blocks do."""
        return self.product.products * self.out_parts * self.phase_parts * self.in_parts * self.tap_parts

    @property
    def overhang(self) -> Overhang:
        """How far offsets of weights reach that are formed before it is known whether these exist."""
        p = self.product.problem
        return Overhang(
            rows=self.out_parts * self.out,
            channels=self.in_parts * self.channels,
            taps=(self.tap_parts * self.taps + 1) * p.stride,
            arrays=("weight",),
        )

    def shared_bytes(self, bytes_per_row: int) -> int:
        """Of a block, where a row takes so many bytes for each channel and tap."""
        return self.channels * self.taps * (self.out * self.phases + ROW_PADDING) * bytes_per_row

    def params(self) -> dict[str, int]:
        """The fields of Params, in order."""
        return {
            "box_out": self.out,
            "box_phases": self.phases,
            "box_in": self.channels,
            "box_taps": self.taps,
            "out_parts": self.out_parts,
            "phase_parts": self.phase_parts,
            "in_parts": self.in_parts,
            "tap_parts": self.tap_parts,
        }
