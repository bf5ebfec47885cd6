"""Convolutions of signals that arrive in pieces: layers that keep the samples that the next outputs need.

The outputs of all pushes and of the flush, one after the other, are those of one call on the whole signal: bit for bit
on a GPU, within the error bound on the CPU. A stream keeps the samples that later windows read, so its memory depends
only on the layer and the longest push. Only one thread may use a stream at a time; several streams, in any threads, may
share a layer or a prepared weight.
"""

from .conv1d import Conv1d
from .conv_transpose1d import ConvTranspose1d

__all__ = ["Conv1d", "ConvTranspose1d"]
