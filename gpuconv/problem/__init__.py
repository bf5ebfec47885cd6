"""Convolution problems and the problems of their gradients: validated, hashable values that all of gpuconv works on.

The functions of `gpuconv.arguments` check the arguments. This package also exports the types and dtypes that describe
problems, so that its users need one import.
"""

from ..arguments import MAX_EXTENT, ArrayLike, ArraySpec, Op, Padding, Setting, Settings
from ..dtypes import DTYPES, FORMATS, INTEGER_SUMS, INTEGERS, PRECISIONS, Format, dtype_name, numpy_dtype
from .base import Kind, Problem
from .forward import ConvProblem
from .gradients import BiasGradientProblem, WeightGradientProblem, bias_gradient_problem, gradient_problem

__all__ = [
    "DTYPES",
    "FORMATS",
    "INTEGERS",
    "INTEGER_SUMS",
    "MAX_EXTENT",
    "PRECISIONS",
    "ArrayLike",
    "ArraySpec",
    "BiasGradientProblem",
    "ConvProblem",
    "Format",
    "Kind",
    "Op",
    "Padding",
    "Problem",
    "Setting",
    "Settings",
    "WeightGradientProblem",
    "bias_gradient_problem",
    "dtype_name",
    "gradient_problem",
    "numpy_dtype",
]
