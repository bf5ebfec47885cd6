"""What a check examines, and how it judges what was computed."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import cases, reference
from ..cases import Case, Data
from ..problem import ConvProblem, numpy_dtype
from ..report import Failure, Result, Tap
from .target import Argument, Array, Target

MAX_TAPS = 8  # the most taps of a failing element that a report lists


@dataclass(frozen=True, slots=True)
class Subject:
    """What a check examines: one case in one number format on one device."""

    case: Case
    number_format: str
    problem: ConvProblem
    target: Target
    seed: int
    check: str = ""
    fractions: list[float] = field(default_factory=list)
    """For each comparison made so far, the largest distance from the exact value as a fraction of the bound."""

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the call: those of the case, and its precision."""
        settings = dict(self.case.settings)
        if self.problem.precision != "float32":
            settings["precision"] = self.problem.precision
        return settings

    def run(self, data: Data, problem: ConvProblem | None = None) -> Array:
        """Run the case with its own settings, or a problem derived from it."""
        if problem is None:
            return self.target.convolve(self.problem, data, self.settings)
        return self.target.convolve(problem, data)

    def gradient(self, argument: Argument, *arrays: Array) -> Array:
        """The gradient with respect to an argument, with the case's own settings.

        `arrays` are weight and grad_output, input and grad_output, or grad_output alone.
        """
        return self.target.gradient(argument, self.problem, arrays, self.settings)

    def equal(self, output: Array, expected: Array) -> npt.NDArray[np.bool_]:
        """Compare elementwise: bits on a GPU, values on the CPU, where BLAS may give a zero either sign.

        Data are finite here, so NaN and infinities are wrong even where `expected` has the same ones.
        """
        same = same_bits(output, expected) if self.target.on_gpu else output == expected
        return np.asarray(same & np.isfinite(output))

    def expect_equal(
        self, output: Array, expected: Array, message: str, data: Data | None, problem: ConvProblem | None = None
    ) -> Failure | None:
        """Require equal elements, as `equal` defines them. Without `data` a failure lists no taps."""
        if self.target.on_gpu:
            message += ", bit for bit"
        good = self.equal(output, expected)
        return self.judge(good, output, expected, message, data, problem or self.problem)

    def expect_bound(
        self, output: Array, message: str, data: Data, problem: ConvProblem | None = None
    ) -> Failure | None:
        """Require every element to lie within the error bound of the reference."""
        p = problem or self.problem
        return self.judge_comparison(reference.convolution(p, *data).compare(output), message, data, p)

    def expect_invariance(
        self, output: Array, whole: Array, message: str, data: Data, problem: ConvProblem
    ) -> Failure | None:
        """Require equal bits on a GPU; on the CPU, whose BLAS reorders sums, require the error bound."""
        if self.target.on_gpu:
            return self.expect_equal(output, whole, message, data, problem)
        return self.expect_bound(output, f"{message}, within the bound", data, problem)

    def judge_comparison(
        self, found: reference.Comparison, message: str, data: Data | None, problem: ConvProblem
    ) -> Failure | None:
        """Require every element to lie within its error bound."""
        self.fractions.append(found.worst)
        return self.judge(found.right, found.output, found.exact, message, data, problem, found.bound)

    def judge(
        self,
        good: npt.NDArray[np.bool_],
        output: Array,
        expected: Array,
        message: str,
        data: Data | None,
        problem: ConvProblem,
        bound: Array | None = None,
    ) -> Failure | None:
        """A failure that describes the first element that is not good; None where all are good."""
        if good.all():
            return None
        bad = np.argwhere(~good)
        index = tuple(int(i) for i in bad[0])
        taps = [] if data is None else list(_taps(problem, data, index))
        return Failure(
            self.case.name,
            self.number_format,
            self.check,
            str(problem),
            message,
            bad=len(bad),
            index=index,
            got=number(output[index]),
            expected=number(expected[index]),
            bound=None if bound is None else float(bound[index]),
            taps=tuple(taps[:MAX_TAPS]),
            num_taps=None if data is None else len(taps),
        )


def result_of(subject: Subject, run: Callable[[Subject], Failure | None], family: str | None = None) -> Result:
    """Run a check and time it. An exception that it raises becomes a failure."""
    s = subject
    started = time.perf_counter()
    try:
        failure = run(s)
    except Exception as error:  # the other checks must still run
        raised = f"{'' if family is None else family + ' '}raised {error!r}"
        failure = Failure(s.case.name, s.number_format, s.check, str(s.problem), raised, traceback.format_exc())
    seconds = time.perf_counter() - started
    worst = max(s.fractions, default=None)
    return Result(s.case.name, s.number_format, s.check, seconds, worst, failure, family)


def same_bits(a: Array, b: Array) -> npt.NDArray[np.bool_]:
    """Whether the elements of two arrays of one shape and dtype have the same bytes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"expected {b.dtype} of shape {b.shape}, got {a.dtype} of shape {a.shape}")
    bytes_a, bytes_b = (
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(*array.shape, array.itemsize) for array in (a, b)
    )
    return np.asarray((bytes_a == bytes_b).all(axis=-1))


def exact_result(problem: ConvProblem, data: Data) -> Array:
    return reference.compute(problem, *data).astype(numpy_dtype(problem.dtype))


def _taps(problem: ConvProblem, data: Data, index: tuple[int, ...]) -> Iterator[Tap]:
    """The products of one output element, in the canonical order, with their factors."""
    *batch, c_out, l_out = index
    sample = data.input[tuple(batch)]
    for term in cases.terms_of(problem, c_out, l_out):
        weight, value = data.weight[term.weight_index], sample[term.channel, term.l_in]
        yield Tap(term.c_in, term.k, term.l_in, number(weight), number(value))


def number(value: Any) -> complex:
    """A NumPy scalar of any supported dtype as a Python number."""
    return complex(value) if np.iscomplexobj(value) else float(value)
