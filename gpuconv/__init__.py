"""1-D convolution and transposed convolution for CuPy and NumPy arrays, with PyTorch's semantics."""

__version__ = "0.1.0"
