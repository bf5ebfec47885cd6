"""What can be computed of a layer: number formats, and passes (forward, or a gradient of input or weight)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import gpuconv
from gpuconv import grad
from gpuconv.device import Device
from gpuconv.problem import ConvProblem, WeightGradientProblem
from gpuconv.problem.parts import call_settings

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


Direction: TypeAlias = Literal["forward", "grad_input", "grad_weight"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_weight")


def of_forward(problem: ConvProblem, direction: Direction) -> ConvProblem | WeightGradientProblem:
    """What a pass of a layer computes; the gradient of an input is the other operation."""
    if direction == "forward":
        return problem
    return problem.adjoint() if direction == "grad_input" else WeightGradientProblem.of(problem)


def without_bias(problem: ConvProblem, direction: Direction) -> ConvProblem:
    """The forward problem as far as a pass depends on it: gradients of input and weight know no bias."""
    return problem if direction == "forward" else replace(problem, has_bias=False)


def array_shapes(problem: ConvProblem, direction: Direction) -> tuple[tuple[int, ...], ...]:
    """The shapes of a pass's arrays: input, weight and, where there is one, bias or grad_output."""
    third = problem.bias_shape if direction == "forward" else problem.output_shape
    return (problem.input_shape, problem.weight_shape, *((third,) if third else ()))


def result_shape(problem: ConvProblem, direction: Direction) -> tuple[int, ...]:
    return {"forward": problem.output_shape, "grad_input": problem.input_shape, "grad_weight": problem.weight_shape}[
        direction
    ]


def our_function(problem: ConvProblem, direction: Direction, precision: str) -> Callable[..., Any]:
    """The function of gpuconv for a pass, of (input, weight, bias or grad_output) and `out`."""
    settings = call_settings(problem) | {"precision": precision}
    if direction == "forward":
        forward = gpuconv.conv_transpose1d if problem.transposed else gpuconv.conv1d
        return partial(forward, **settings)
    if direction == "grad_input":
        of_input = grad.conv_transpose1d_input if problem.transposed else grad.conv1d_input
        return lambda x, w, dy, out=None: of_input(x.shape, w, dy, **settings, out=out)
    of_weight = grad.conv_transpose1d_weight if problem.transposed else grad.conv1d_weight
    return lambda x, w, dy, out=None: of_weight(x, w.shape, dy, **settings, out=out)


def prediction_key(mode: str, direction: Direction) -> str:
    """Under which name the predictions of a mode and a pass are kept."""
    return mode if direction == "forward" else f"{mode} {direction}"
