"""Convolutions of signals that arrive piece by piece: layers that remember what the next outputs need.

The outputs of all pushes and of the flush, one behind the other, are those of one call on the whole signal: bit for bit
on a GPU, within the error bound on the CPU. A stream keeps the samples that later windows read, so its memory depends
on the layer and on the longest push alone. It is for one thread at a time; several streams may share a layer or a
prepared weight in any threads.
"""

from .conv1d import Conv1d
from .conv_transpose1d import ConvTranspose1d

__all__ = ["Conv1d", "ConvTranspose1d"]
