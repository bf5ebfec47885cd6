"""The number formats that layers are measured in."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from gpuconv.device import Device
from gpuconv.problem import PRECISIONS, ConvProblem

from .layers import Layer

# float64 and complex64 are measured on one layer of each kind: they matter to few users, and cuDNN's complex
# convolution is emulated by PyTorch with several real ones.
SUBSET = (
    "wav2vec2_base.feat0_k10s5",
    "wav2vec2_large.pos_conv_k128g16_b1",
    "hifigan_v1.up3_k4s2_b1",
    "hifigan_v1.resblock_k11_d5_c32",
    "mamba_2p8b.conv_k4_b1",
    "conformer_l.dw_k31",
    "tacotron2.postnet_k5",
    "convtasnet.pw_128to512",
    "leaf.gauss_pool_dw_k401s160",
)


@dataclass(frozen=True, slots=True)
class Mode:
    """A number format: the dtype of the data and the precision of the arithmetic.

    Attributes:
        name: as it is written in results.
        dtype: of input, weight, bias and output.
        precision: gpuconv's argument of that name.
        min_arch: the first architecture that has the format in hardware, 0 where any will do.
        subset: only the layers of `SUBSET` are measured.
    """

    name: str
    dtype: str
    precision: str = "float32"
    min_arch: int = 0
    subset: bool = False

    @property
    def supported(self) -> bool:
        """Whether gpuconv offers the precision today."""
        return self.precision in PRECISIONS

    def runs_on(self, device: Device) -> bool:
        return device.arch >= self.min_arch

    def includes(self, layer: Layer) -> bool:
        return not self.subset or layer.name in SUBSET

    def problem(self, layer: Layer, batch: int | None = None) -> ConvProblem:
        """The layer as a problem in this format, with its own batch unless another is given."""
        return replace(layer.problem(self.dtype, batch), precision=self.precision)


MODES = (
    Mode("float32", "float32"),
    Mode("bfloat16", "bfloat16"),
    Mode("tf32", "float32", precision="tf32", min_arch=80),
    Mode("float16", "float16"),
    Mode("float64", "float64", subset=True),
    Mode("complex64", "complex64", subset=True),
)


def modes_of(names: str, parser: argparse.ArgumentParser) -> tuple[Mode, ...]:
    """The modes that a comma-separated list names, in the order of `MODES`; "all" is every one.

    Exits through the parser where a name is unknown.
    """
    wanted = {name.strip() for name in names.split(",")}
    known = {mode.name for mode in MODES}
    if wanted == {"all"}:
        return MODES
    if unknown := wanted - known:
        parser.error(f"unknown mode {', '.join(sorted(unknown))}; known: {', '.join(mode.name for mode in MODES)}, all")
    return tuple(mode for mode in MODES if mode.name in wanted)
