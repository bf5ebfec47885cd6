"""The definition of both operations and of their gradients in float64 (complex128), and the bound of their errors.

All results of gpuconv are compared with this package: its code follows the formulas and is not meant to be fast.
"""

from .definition import (
    bias_gradient,
    compute,
    convolution,
    error_bound,
    input_gradient,
    weight_gradient,
    within_bound,
)
from .sums import Comparison, Sums

__all__ = [
    "Comparison",
    "Sums",
    "bias_gradient",
    "compute",
    "convolution",
    "error_bound",
    "input_gradient",
    "weight_gradient",
    "within_bound",
]
