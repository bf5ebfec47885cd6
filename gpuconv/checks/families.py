"""The checks that `gpuconv.verify` runs on each kernel family of a GPU, selected by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import cases, dispatch, grad, reference, runtime
from ..cases import Case
from ..device import Device
from ..families import FAMILIES, ArrayLayout, Family, Layout, Refusal, edges
from ..families.base import contiguous_strides
from ..problem import FORMATS, BiasGradientProblem, ConvProblem, Problem, WeightGradientProblem, numpy_dtype
from ..report import BY_FAMILY, FAR, Failure, Result
from .forward import check_fusion, check_strided_arrays, every_other, swapped_axes
from .subject import Subject, exact_result, result_of, same_bits
from .target import Target

Array = npt.NDArray[Any]


def families_of(device: Device) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kernel families that a GPU has, and those that its architecture lacks."""
    has = {family.name: next(iter(family.configs(device)), None) is not None for family in FAMILIES}
    return tuple(n for n, there in has.items() if there), tuple(n for n, there in has.items() if not there)


def families_that_take(problem: ConvProblem, device: Device, *, far: bool = False) -> tuple[str, ...]:
    """The kernel families that can compute a problem, or its gradient with respect to weight or bias, the base first.

    There is none for an empty output, or an empty operand of a gradient. The arrays are contiguous, or with `far` as
    far apart as `spread` places them.
    """
    found: list[str] = []
    problems: tuple[Problem, ...] = (problem, WeightGradientProblem.of(problem), BiasGradientProblem.of(problem))
    for p in problems:
        if p.is_empty:
            continue
        *others, base = dispatch.families(p.kind)
        layout = far_layout(p) if far else Layout.contiguous(p)
        found += [f.name for f in (base, *others) if not isinstance(edges.plan(f, p, layout, device), Refusal)]
    return tuple(found)


def run_families(
    case: Case, number_format: str, target: Target, seed: int, device: Device, only: str | None = None
) -> Iterator[Result]:
    """Check every kernel family that can compute the case, or only the family `only`."""
    problem = case.at(number_format)
    for family in families_that_take(problem, device):
        if only in (None, family):
            subject = Subject(case, number_format, problem, target, seed, BY_FAMILY)
            yield result_of(subject, partial(_check_family, name=family), family)


def _check_family(s: Subject, name: str) -> Failure | None:
    family = _family(name)
    if family.kind in ("weight_gradient", "bias_gradient"):
        return _check_gradient_family(s, family)
    return _check_forward_family(s, family)


def _family(name: str) -> Family[Any]:
    return next(family for family in FAMILIES if family.name == name)


def _check_forward_family(s: Subject, family: Family[Any]) -> Failure | None:
    p = s.problem
    settings = {**s.settings, "algorithm": family.name}
    data = cases.exact_data(p, s.seed)
    output = s.target.convolve(p, data, settings)
    failure = s.expect_equal(output, exact_result(p, data), f"{family.name} must equal the reference", data)
    if failure is None:
        failure = check_strided_arrays(s, settings, f"{family.name} must equal the reference, on strided arrays")
    for kind in ("normal", "ill_scaled", "nonfinite"):
        if failure is None:
            data = cases.random_data(p, s.seed, kind)
            output = s.target.convolve(p, data, settings)
            message = f"{family.name} must lie within the error bound of the reference, on {kind} data"
            failure = s.expect_bound(output, message, data)
        if failure is None and family.canonical_order and kind != "nonfinite":
            base = s.target.convolve(p, data, {**settings, "algorithm": "base"})
            good = same_bits(output, base)
            failure = s.judge(good, output, base, f"{family.name} must equal the base family, bit for bit", data, p)
    if failure is None:
        message = f"{family.name} must fuse within the error bound of the reference"
        output, failure = check_fusion(s, settings, message)
        if failure is None and family.canonical_order:
            base, failure = check_fusion(s, {**settings, "algorithm": "base"}, message)
            good = same_bits(output, base)
            message = f"{family.name} must fuse as the base family, bit for bit"
            failure = failure or s.judge(good, output, base, message, data, p)
    return failure


class _Gradient(NamedTuple):
    """The gradient of a subject with respect to weight or bias, computed by a family."""

    subject: Subject
    family: str
    of: Literal["weight", "bias"]

    @property
    def shape(self) -> tuple[int, ...]:
        p = self.subject.problem
        return p.weight_shape if self.of == "weight" else (p.C_out,)

    def sums(self, input: Array, grad_output: Array) -> reference.Sums:
        """The sums and bounds of the reference."""
        p = self.subject.problem
        if self.of == "bias":
            return reference.bias_gradient(BiasGradientProblem.of(p), grad_output)
        q = WeightGradientProblem.of(p)
        return reference.weight_gradient(q, *q.sides(input, grad_output))

    def exact(self, input: Array, grad_output: Array) -> Array:
        return np.asarray(self.sums(input, grad_output).exact().astype(numpy_dtype(self.subject.problem.dtype)))

    def run(self, input: Array, grad_output: Array, family: str | None = None) -> Array:
        """The result of the family, or of another one, into an output of NaN."""
        target = self.subject.target
        out = target.put(np.full(self.shape, np.nan, numpy_dtype(self.subject.problem.dtype)))
        return target.get(self.run_into(out, target.put(input), target.put(grad_output), family))

    def run_into(self, out: Any, input: Any, grad_output: Any, family: str | None = None) -> Any:
        """The same for arrays that are already on the GPU."""
        p = self.subject.problem
        if self.of == "bias":
            return getattr(grad, f"{p.op}_bias")(grad_output, out=out)
        function = getattr(grad, f"{p.op}_weight")
        settings = self.subject.settings
        return function(input, p.weight_shape, grad_output, **settings, algorithm=family or self.family, out=out)


def _gradient_of(s: Subject, family: str) -> _Gradient:
    return _Gradient(s, family, "weight" if _family(family).kind == "weight_gradient" else "bias")


def _exact_operands(s: Subject) -> tuple[Array, Array]:
    """Small integers as (input, grad_output)."""
    x = cases.exact_data(s.problem, s.seed, adjoint_too=s.problem.L_in > 0).input
    return x, cases.exact_grad_output(s.problem, s.seed, x)


def _check_gradient_family(s: Subject, family: Family[Any]) -> Failure | None:
    name, gradient = family.name, _gradient_of(s, family.name)
    x, u = _exact_operands(s)
    exact = gradient.exact(x, u)
    failure = s.expect_equal(gradient.run(x, u), exact, f"{name} must equal the reference", None)
    for arrange in (every_other, swapped_axes):
        if failure is None:
            out = every_other(s.target, np.full_like(exact, np.nan))
            gradient.run_into(out, arrange(s.target, x), arrange(s.target, u))
            message = f"{name} must equal the reference, on strided arrays"
            failure = s.expect_equal(s.target.get(out), exact, message, None)
    for nonfinite in (None, "grad_output") if gradient.of == "bias" else (None, "grad_output", "input"):
        if failure is not None:
            return failure
        x = cases.random_data(s.problem, s.seed, "nonfinite" if nonfinite == "input" else "normal").input
        u = cases.random_grad_output(s.problem, s.seed, "nonfinite" if nonfinite == "grad_output" else "normal")
        output = gradient.run(x, u)
        on = "on normal data" if nonfinite is None else f"on nonfinite data in {nonfinite}"
        message = f"{name} must lie within the error bound of the reference, {on}"
        failure = s.judge_comparison(gradient.sums(x, u).compare(output), message, None, s.problem)
        if failure is None and nonfinite is None and gradient.of == "weight" and family.canonical_order:
            base = gradient.run(x, u, "base")
            message = f"{name} must equal the base family, bit for bit"
            failure = s.judge(same_bits(output, base), output, base, message, None, s.problem)
    return failure


# The distance of the last row of an array from the first, in elements: one more than a signed 32-bit offset can hold.
FAR_ELEMENTS = 2**31


class Spread(NamedTuple):
    """Where arrays lie in one buffer so that the rows of each, along its first axis, are far apart; in elements.

    Attributes:
        offsets: of the first element of each array.
        strides: of the axes of each array.
        size: of the buffer.
    """

    offsets: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    size: int


def spread(shapes: Sequence[tuple[int, ...]]) -> Spread:
    """Place arrays of these shapes; the last row of each begins at least `FAR_ELEMENTS` behind its first row."""
    row_sizes = [int(np.prod(shape[1:])) for shape in shapes]
    # The buffer is a sequence of blocks. The rows of an array have the same place in each block, so that no two arrays
    # overlap; the place begins at a multiple of 16 bytes for any dtype.
    places = np.cumsum([0, *(-(-size // 8) * 8 for size in row_sizes)]).tolist()
    *offsets, block = places
    strides, size = [], block
    for shape in shapes:
        step = block * -(-FAR_ELEMENTS // (block * max(shape[0] - 1, 1)))
        strides.append((step, *contiguous_strides(shape)[1:]))
        size = max(size, (shape[0] - 1) * step + block)
    return Spread(tuple(offsets), tuple(strides), size)


def far_bytes(number_format: str) -> int:
    """The memory that `run_far` needs on the GPU, apart from some KiB."""
    return FAR_ELEMENTS * FORMATS[cases.dtype_of(number_format)].itemsize


def far_runs(
    selected: Sequence[Case], number_format: str, families: Sequence[str], device: Device
) -> list[tuple[str, Case, str]]:
    """What `run_far` is to run, as (number format, case, family): for each family the longest case that it can compute.

    The case must have several taps, and each of its arrays several rows.
    """
    longest: dict[str, Case] = {}
    for case in sorted(selected, key=lambda case: case.problem.N * min(case.problem.L_in, case.problem.L_out)):
        p = case.at(number_format)
        if p.batched and p.has_bias and min(p.N, p.weight_shape[0], p.C_out, p.K) > 1:
            longest.update(dict.fromkeys(families_that_take(p, device, far=True), case))
    return [(number_format, longest[name], name) for name in families if name in longest]


def far_layout(problem: Problem) -> Layout:
    """Where `run_far` places the arrays of a problem."""
    layouts = map(ArrayLayout, spread(tuple(problem.shapes.values())).strides)
    return Layout(tuple(zip(problem.shapes, layouts, strict=True)))


def run_far(case: Case, number_format: str, target: Target, seed: int, family: str) -> Result:
    """Check the kernels of a family that have 64-bit offsets, on arrays whose rows are far apart."""
    subject = Subject(case, number_format, case.at(number_format), target, seed, FAR)
    return result_of(subject, partial(_check_far, name=family), family)


def _check_far(s: Subject, name: str) -> Failure | None:
    p, message = s.problem, f"{name} must equal the reference, on arrays that reach beyond 2**31 elements"
    if _family(name).kind not in ("weight_gradient", "bias_gradient"):
        data = cases.exact_data(p, s.seed)
        expected = exact_result(p, data)
        *arrays, out = _put_far((*data, np.full_like(expected, np.nan)))
        s.target.convolve_into(out, p, *arrays, settings={**s.settings, "algorithm": name})
        return s.expect_equal(_get_far(out), expected, message, data)
    gradient = _gradient_of(s, name)
    x, u = _exact_operands(s)
    expected = gradient.exact(x, u)
    far_x, far_u, out = _put_far((x, u, np.full_like(expected, np.nan)))
    gradient.run_into(out, far_x, far_u)
    return s.expect_equal(_get_far(out), expected, message, None)


def _put_far(arrays: Sequence[Array | None]) -> list[Any]:
    """The arrays on the GPU, as `spread` places them."""
    cupy = runtime.cupy_module()
    given = [array for array in arrays if array is not None]
    where = spread([array.shape for array in given])
    buffer = cupy.cuda.Memory(where.size * given[0].itemsize)  # not from CuPy's pool, which would keep it
    found = []
    for array, offset, strides in zip(given, where.offsets, where.strides, strict=True):
        start = cupy.cuda.MemoryPointer(buffer, offset * array.itemsize)
        far = cupy.ndarray(array.shape, array.dtype, start, tuple(step * array.itemsize for step in strides))
        for i in range(len(array)):
            far[i : i + 1].set(array[i : i + 1])
        found.append(far)
    return found


def _get_far(array: Any) -> Array:
    return np.concatenate([array[i : i + 1].get() for i in range(len(array))])
