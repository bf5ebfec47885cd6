"""The shared case table, the data that cases run on, and the problems derived from a problem.

Tests, `gpuconv.verify` and the benchmarks all read `CASES`.
"""

from ..problem.parts import call_settings, chunk, inner_outputs
from .data import (
    RANDOM_KINDS,
    Data,
    GradOutputKind,
    RandomKind,
    exact_data,
    exact_grad_output,
    fusion_settings,
    impulse_data,
    integer_data,
    random_data,
    random_grad_output,
    with_fusion,
)
from .derived import (
    NUMBER_FORMATS,
    Term,
    dtype_of,
    in_format,
    in_integers,
    one_group,
    terms_of,
    with_batch,
)
from .table import CASES, WIDE_CASES, Case, quick_pairs, select

__all__ = [
    "CASES",
    "NUMBER_FORMATS",
    "RANDOM_KINDS",
    "WIDE_CASES",
    "Case",
    "Data",
    "GradOutputKind",
    "RandomKind",
    "Term",
    "call_settings",
    "chunk",
    "dtype_of",
    "exact_data",
    "exact_grad_output",
    "fusion_settings",
    "impulse_data",
    "in_format",
    "in_integers",
    "inner_outputs",
    "integer_data",
    "one_group",
    "quick_pairs",
    "random_data",
    "random_grad_output",
    "select",
    "terms_of",
    "with_batch",
    "with_fusion",
]
