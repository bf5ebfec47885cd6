"""The checks that `gpuconv.verify` runs on a case, on the CPU or on a GPU.

`gpuconv.checks.families` has the checks of single kernel families.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from .. import cases
from ..cases import Case
from ..problem import INTEGERS
from ..report import Failure, Result
from .forward import (
    check_batch,
    check_bias,
    check_chunks,
    check_exact,
    check_fused,
    check_groups,
    check_impulse,
    check_integers,
    check_layout,
    check_random,
    check_repeat,
    chunk_bounds,
)
from .gradients import check_adjoint, check_fft, check_gradients
from .lengths import check_lengths
from .subject import MAX_TAPS, Subject, result_of, same_bits
from .target import Target, unset

__all__ = ["CHECKS", "FFT", "MAX_TAPS", "Check", "Target", "chunk_bounds", "run_checks", "same_bits", "unset"]

FFT = "fft"  # the check that is skipped where its library is missing


class Check(NamedTuple):
    """A row of the table of checks. `applies` says whether it can check a subject; None means it checks all."""

    name: str
    run: Callable[[Subject], Failure | None]
    applies: Callable[[Subject], bool] | None = None


def _has_chunks(s: Subject) -> bool:
    return s.problem.L_in >= 1 and len(cases.inner_outputs(s.problem)) >= 3


CHECKS: tuple[Check, ...] = (
    Check("exact", check_exact),
    Check("integers", check_integers),
    Check("fused", check_fused),
    Check("layout", check_layout),
    *(Check(kind, check_random(kind)) for kind in cases.RANDOM_KINDS),
    # In other modes an impulse may reach an output several times.
    Check("impulse", check_impulse, lambda s: s.problem.padding_mode == "zeros"),
    Check("adjoint", check_adjoint),
    Check("groups", check_groups, lambda s: s.problem.groups > 1),
    Check("bias", check_bias),
    Check("batch", check_batch),
    Check("chunks", check_chunks, _has_chunks),
    Check("lengths", check_lengths, lambda s: bool(s.case.lengths)),
    Check("repeat", check_repeat),
    Check("gradients", check_gradients),
    # The strides and dilations of wide cases leave one tap or one result to each transform.
    Check(FFT, check_fft, lambda s: "wide" not in s.case.tags),
)


def run_checks(
    case: Case, number_format: str, target: Target, seed: int, skipped: Container[str] = ()
) -> Iterator[Result]:
    """Run all checks of a case except those named in `skipped`."""
    for check in CHECKS:
        if check.name in skipped:
            continue
        subject = Subject(case, number_format, case.at(number_format), target, seed, check.name)
        if check.applies is not None and not check.applies(subject):
            continue
        if subject.problem.dtype in INTEGERS and check.name != "integers":
            continue  # the other checks are for floating-point numbers
        yield result_of(subject, check.run)
