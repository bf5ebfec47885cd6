"""The definition of both operations and of their gradients in float64 (complex128), and the bound of their errors.

This package is the oracle of gpuconv: it is written to be read beside the formulas, not to be fast.
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
