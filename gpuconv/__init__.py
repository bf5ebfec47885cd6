"""1-D convolution and transposed convolution for CuPy and NumPy arrays, with PyTorch's semantics."""

from . import grad, nn
from .explain import explain
from .functional import conv1d, conv_transpose1d, prepare
from .verify import verify

__version__ = "0.1.0"

__all__ = ["conv1d", "conv_transpose1d", "explain", "grad", "nn", "prepare", "verify"]
