"""The kernel families, by preference: dispatch takes the first that does not refuse."""

from __future__ import annotations

from .base import ArrayLayout, Config, Family, Launch, Layout
from .conv1d_direct import Conv1dDirect
from .conv_transpose1d_gather import ConvTranspose1dGather

FAMILIES: tuple[Family, ...] = (
    Conv1dDirect(),
    ConvTranspose1dGather(),
)

__all__ = ["FAMILIES", "ArrayLayout", "Config", "Family", "Launch", "Layout"]
