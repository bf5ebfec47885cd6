"""The kernel families, by preference: of those for a kind of problem, dispatch takes the first that does not refuse."""

from __future__ import annotations

from typing import Any

from . import conv1d_depthwise_push, edges, fused, lengths, windows
from .base import ArrayLayout, Config, Family, Launch, Layout, Plan, Refusal, Step
from .bias_gradient_rows import BiasGradientRows
from .conv1d_depthwise import Conv1dDepthwise
from .conv1d_im2col import Conv1dIm2col
from .conv1d_narrow import Conv1dNarrow
from .conv1d_skinny import Conv1dSkinny
from .conv1d_stem import Conv1dStem
from .conv1d_tail import Conv1dTail
from .conv1d_toeplitz import Conv1dToeplitz
from .conv_direct import Conv1dDirect, ConvTranspose1dGather
from .conv_mma import Conv1dMma, ConvTranspose1dMma
from .conv_tiled import Conv1dTiled, ConvTranspose1dPhases
from .conv_transpose1d_depthwise import ConvTranspose1dDepthwise
from .conv_transpose1d_tail import ConvTranspose1dTail
from .weight_gradient_direct import WeightGradientDirect
from .weight_gradient_mma import WeightGradientMma
from .weight_gradient_pairs import WeightGradientPairs
from .weight_gradient_tiled import WeightGradientTiled

# Tensor cores first: which layers they take must not depend on whether a CUDA-core family takes a batch or a length.
# Those agree in their bits, so among them it may.
FAMILIES: tuple[Family[Any], ...] = (
    Conv1dMma(),
    ConvTranspose1dMma(),
    Conv1dIm2col(),
    Conv1dToeplitz(),
    Conv1dDepthwise(),
    Conv1dSkinny(),
    Conv1dStem(),
    Conv1dTail(),
    Conv1dNarrow(),
    Conv1dTiled(),
    ConvTranspose1dDepthwise(),
    ConvTranspose1dTail(),
    ConvTranspose1dPhases(),
    Conv1dDirect(),
    ConvTranspose1dGather(),
    WeightGradientMma(),
    WeightGradientPairs(),
    WeightGradientTiled(),
    WeightGradientDirect(),
    BiasGradientRows(),
)

__all__ = [
    "FAMILIES",
    "ArrayLayout",
    "Config",
    "Family",
    "Launch",
    "Layout",
    "Plan",
    "Refusal",
    "Step",
    "conv1d_depthwise_push",
    "edges",
    "fused",
    "lengths",
    "windows",
]
