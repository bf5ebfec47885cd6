"""gpuconv in PyTorch: `conv1d` and `conv_transpose1d` of tensors with autograd, and `patch` for models as they are.

They are custom operators of the namespace `gpuconv`. Tensors on the CPU are read and written as NumPy arrays, CUDA
tensors as CuPy arrays on PyTorch's current stream, both in place. Derivatives of every order in both modes, torch.func,
torch.compile and torch.export work.

This is the only package of gpuconv that imports PyTorch; `import gpuconv` does not import it.
"""

from .functions import conv1d, conv_transpose1d
from .patching import patch

__all__ = ["conv1d", "conv_transpose1d", "patch"]
