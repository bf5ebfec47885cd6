"""The checks that `gpuconv.verify` makes of a case, on the CPU or on a GPU."""

from __future__ import annotations

import importlib
import os
import platform
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from . import cases, functional, grad, reference, runtime
from .cases import Case, Data
from .device import Device
from .lengths import output_lengths
from .problem import INTEGERS, ArraySpec, BiasGradientProblem, ConvProblem, WeightGradientProblem, numpy_dtype
from .report import Failure, Result, Tap

Array: TypeAlias = npt.NDArray[Any]
Argument: TypeAlias = Literal["input", "weight", "bias"]

FFT = "fft"  # the check that may lack its library
MAX_TAPS = 8  # of a failing element, in a report


class Target:
    """The CPU or CuPy's current GPU."""

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu

    def put(self, array: Array) -> Any:
        if not self.on_gpu:
            return array
        runtime.check_dtype(array.dtype)
        return runtime.cupy_module().asarray(array)

    def get(self, array: Any) -> Array:
        return np.asarray(runtime.cupy_module().asnumpy(array) if self.on_gpu else array)

    def lacks(self, number_format: str) -> str | None:
        """Why this machine has no such arrays; None where it does."""
        try:
            self.put(np.zeros(1, numpy_dtype(cases.dtype_of(number_format))))
        except (ImportError, TypeError, ValueError) as error:
            return str(error)
        return None

    def lacks_fft(self) -> str | None:
        """Why nothing can be transformed here; None where it can."""
        if self.on_gpu:
            try:
                runtime.fft_module().rfft(self.put(np.zeros(8)))
            except Exception as error:  # whatever cuFFT, or what loads it, raises
                return f"{type(error).__name__}: {error}"
        return None

    def convolve(self, problem: ConvProblem, data: Data, settings: dict[str, Any] | None = None) -> Array:
        """The public function on arrays of this device, into an output of NaN."""
        out = self.put(unset(problem.output_shape, problem.dtype_of("output")))
        return self.get(self.convolve_into(out, problem, *map(self._put_if_given, data), settings=settings))

    def convolve_into(
        self,
        out: Any,
        problem: ConvProblem,
        input: Any,
        weight: Any,
        bias: Any,
        *,
        settings: dict[str, Any] | None = None,
    ) -> Any:
        """The public function on arrays of this device; `out` is None for a fresh array."""
        function = functional.conv_transpose1d if problem.transposed else functional.conv1d
        keywords = cases.call_settings(problem) if settings is None else settings
        return function(input, weight, bias, **keywords, out=out)

    def gradient(
        self, argument: Argument, problem: ConvProblem, arrays: Sequence[Array], settings: dict[str, Any]
    ) -> Array:
        """The public gradient function of an argument, on arrays of this device, into an output of NaN."""
        shapes = {"input": problem.input_shape, "weight": problem.weight_shape, "bias": (problem.C_out,)}
        out = self.put(np.full(shapes[argument], np.nan, numpy_dtype(problem.dtype)))
        given: list[Any] = [self.put(array) for array in arrays]
        if argument != "bias":
            given.insert(0 if argument == "input" else 1, shapes[argument])
        function = getattr(grad, f"{problem.op}_{argument}")
        return self.get(function(*given, **({} if argument == "bias" else settings), out=out))

    def device(self) -> Device | None:
        """The GPU; None for the CPU."""
        return runtime.device(int(runtime.cupy_module().cuda.runtime.getDevice())) if self.on_gpu else None

    def _put_if_given(self, array: Array | None) -> Any:
        return None if array is None else self.put(array)

    def description(self) -> str:
        gpu = self.device()
        if gpu is None:
            return f"CPU ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"
        index = int(runtime.cupy_module().cuda.runtime.getDevice())
        return f"GPU {index}: {gpu.name} ({gpu.arch_name}, {gpu.num_sms} multiprocessors)"

    def versions(self) -> dict[str, str]:
        found = {
            "gpuconv": str(importlib.import_module(__package__).__version__),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        if self.on_gpu:
            cupy = runtime.cupy_module()
            found["cupy"] = str(cupy.__version__)
            found["cuda_runtime"] = str(cupy.cuda.runtime.runtimeGetVersion())
            found["cuda_driver"] = str(cupy.cuda.runtime.driverGetVersion())
        return found


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
        """The keyword arguments of the call, as they are written in the case."""
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
        """Elementwise: bits on a GPU, values on the CPU, whose BLAS may give a zero either sign.

        On finite data a NaN is wrong even where the kernel that made `expected` made one too.
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
            got=_number(output[index]),
            expected=_number(expected[index]),
            bound=None if bound is None else float(bound[index]),
            taps=tuple(taps[:MAX_TAPS]),
            num_taps=None if data is None else len(taps),
        )


def _check_exact(s: Subject) -> Failure | None:
    data = cases.exact_data(s.problem, s.seed)
    return s.expect_equal(s.run(data), exact_result(s.problem, data), "must equal the reference", data)


def _check_integers(s: Subject) -> Failure | None:
    p = s.problem if s.problem.dtype in INTEGERS else cases.in_integers(s.problem, s.number_format)
    data = cases.integer_data(p, s.seed)
    return s.expect_equal(s.run(data, p), reference.compute(p, *data), "integers must equal the reference", data, p)


def _check_fused(s: Subject) -> Failure | None:
    return check_fusion(s, s.settings, "what is fused must lie within the error bound of the reference")[1]


def check_fusion(s: Subject, settings: dict[str, Any], message: str) -> tuple[Array, Failure | None]:
    """Fuse something with the case, on plain arrays and on arrays with gaps; the result, and what is wrong."""
    p, fused = cases.with_fusion(s.problem, s.seed, s.case.fusion)
    data = cases.random_data(s.problem, s.seed)
    sums = reference.convolution(p, *data, fused)
    output = np.empty(p.output_shape, numpy_dtype(p.dtype))
    for arrange in (Target.put, every_other):
        arrays = [None if array is None else arrange(s.target, array) for array in data]
        more = cases.fusion_settings(p, {name: arrange(s.target, array) for name, array in fused.items()})
        out = arrange(s.target, np.full_like(output, np.nan))
        s.target.convolve_into(out, s.problem, *arrays, settings={**settings, **more})
        output = s.target.get(out)
        failure = s.judge_comparison(sums.compare(output), message, data, p)
        if failure is not None:
            return output, failure
    return output, None


def _check_layout(s: Subject) -> Failure | None:
    return check_strided_arrays(s, s.settings, "must equal the reference, on strided arrays")


def check_strided_arrays(s: Subject, settings: dict[str, Any], message: str) -> Failure | None:
    """Run the case on arrays with gaps, reversed arrays and arrays with swapped axes, none of which is contiguous."""
    p = s.problem
    data = cases.exact_data(p, s.seed)
    out = every_other(s.target, np.full(p.output_shape, np.nan, numpy_dtype(p.dtype)))
    weight = swapped_axes(s.target, data.weight)
    bias = None if data.bias is None else every_other(s.target, data.bias)
    for arrange in (every_other, swapped_axes):
        out.fill(np.nan)
        s.target.convolve_into(out, p, arrange(s.target, data.input), weight, bias, settings=settings)
        failure = s.expect_equal(s.target.get(out), exact_result(p, data), message, data)
        if failure is not None:
            return failure
    return None


def _check_random(kind: cases.RandomKind) -> Callable[[Subject], Failure | None]:
    def check(s: Subject) -> Failure | None:
        data = cases.random_data(s.problem, s.seed, kind)
        return s.expect_bound(s.run(data), "must lie within the error bound of the reference", data)

    return check


def _check_impulse(s: Subject) -> Failure | None:
    data = cases.impulse_data(s.problem, s.seed)
    output, expected = s.run(data), exact_result(s.problem, data)
    # Compared by value: the sign of a zero depends on weights that are multiplied by the zeros of the input.
    return s.judge(output == expected, output, expected, "an impulse must give the weights", data, s.problem)


def _check_adjoint(s: Subject) -> Failure | None:
    p = replace(s.problem, has_bias=False)
    x, weight, _ = cases.exact_data(p, s.seed, adjoint_too=p.L_in > 0)
    y = s.target.convolve(p, Data(x, weight, None), s.settings)
    u = cases.exact_grad_output(p, s.seed, x)
    identities: list[tuple[Argument, Array, Array, Array]] = [("weight", u, weight, s.gradient("weight", x, u))]
    if p.L_in:
        u = cases.exact_data(p.adjoint(), s.seed, adjoint_too=True).input
        identities.append(("input", u, x, s.gradient("input", weight, u)))
    for argument, u, array, gradient in identities:
        left, right = _inner_product(y, u), _inner_product(array, gradient)
        if left != right:
            message = f"<A(input, weight), u> must equal <{argument}, its gradient>"
            return Failure(s.case.name, s.number_format, s.check, str(p), message, bad=1, got=left, expected=right)
    return None


def _check_groups(s: Subject) -> Failure | None:
    p = s.problem
    data = cases.exact_data(p, s.seed)
    output = s.run(data)
    expected = np.full_like(output, np.nan)
    chosen = sorted({0, p.groups // 2, p.groups - 1})
    for g in chosen:
        alone, channels_in, channels_out = cases.one_group(p, g)
        part = Data(
            data.input[..., channels_in, :],
            data.weight[channels_in if p.transposed else channels_out],
            None if data.bias is None else data.bias[channels_out],
        )
        expected[..., channels_out, :] = s.run(part, alone)
    compared = np.isin(np.arange(p.C_out) // p.C_out_g, chosen)[:, np.newaxis]
    good = s.equal(output, expected) | ~compared
    return s.judge(good, output, expected, "must equal the convolution of its group alone", data, p)


def _check_bias(s: Subject) -> Failure | None:
    p = replace(s.problem, has_bias=True)
    data = cases.exact_data(p, s.seed)
    assert data.bias is not None
    wide = np.complex128 if p.is_complex else np.float64
    without = s.run(data._replace(bias=None), replace(p, has_bias=False)).astype(wide)
    expected = (without + data.bias.astype(wide)[:, np.newaxis]).astype(data.bias.dtype)
    return s.expect_equal(s.run(data, p), expected, "must equal the result without bias, plus the bias", data, p)


def _check_batch(s: Subject) -> Failure | None:
    p = cases.with_batch(s.problem, 5)
    data = cases.random_data(p, s.seed)
    whole = s.run(data, p)
    output = whole.copy()
    for n in (0, p.N - 1):
        output[n] = s.run(data._replace(input=data.input[n : n + 1]), cases.with_batch(p, 1))[0]
    return s.expect_invariance(output, whole, "each sample alone must give what it gives in the batch", data, p)


def _check_chunks(s: Subject) -> Failure | None:
    p = s.problem
    data = cases.random_data(p, s.seed)
    inner, whole = cases.inner_outputs(p), s.run(data)
    output = whole.copy()
    for start, stop in chunk_bounds(len(inner)):
        piece, positions = cases.chunk(p, inner[start], inner[stop - 1] + 1)
        part = s.run(data._replace(input=data.input[..., positions]), piece)
        output[..., inner[start] : inner[stop - 1] + 1] = part
    message = "the input in chunks must give what the whole gives"
    return s.expect_invariance(output, whole, message, data, p)


class _SampleAlone(NamedTuple):
    """A sample of a batch whose samples have lengths of their own.

    Attributes:
        problem: of a call on it alone; None where it is too short to have an output.
    """

    n: int
    L_in: int
    L_out: int
    problem: ConvProblem | None


def _samples_alone(problem: ConvProblem, lengths: Sequence[int], settings: Mapping[str, Any]) -> list[_SampleAlone]:
    """The samples of a batch of these lengths; `settings` are those of the public function."""
    p, found = problem, []
    L_out = output_lengths(
        lengths, p.K, p.stride, settings.get("padding", 0), p.dilation, transposed=p.transposed,
        output_padding=settings.get("output_padding", 0),
    )  # fmt: skip
    weight = ArraySpec(p.weight_shape, p.dtype)
    bias = ArraySpec((p.C_out,), p.dtype) if p.has_bias else None
    for n, (L_in, length) in enumerate(zip(lengths, L_out.tolist(), strict=True)):
        alone = (
            ConvProblem.of(p.op, ArraySpec((1, p.C_in, L_in), p.dtype), weight, bias, **settings) if length else None
        )
        found.append(_SampleAlone(n, L_in, length, alone))
    return found


def _check_lengths(s: Subject) -> Failure | None:
    """Samples with lengths of their own, behind which there are NaNs: each gives what it gives alone."""
    samples = _samples_alone(s.problem, s.case.lengths, s.settings)
    p = cases.with_batch(s.problem, len(samples))
    data, u = cases.random_data(p, s.seed), cases.random_grad_output(p, s.seed)
    exact_x = cases.exact_data(p, s.seed, adjoint_too=True).input
    exact_u = cases.exact_grad_output(p, s.seed, exact_x)
    for alone in samples:
        for array, length in (
            (data.input, alone.L_in),
            (exact_x, alone.L_in),
            (u, alone.L_out),
            (exact_u, alone.L_out),
        ):
            array[alone.n, :, length:] = np.nan
    settings = {**s.settings, "lengths": s.case.lengths}
    output, expected = s.target.convolve(p, data, settings), np.zeros(p.output_shape, numpy_dtype(p.dtype))
    grad_input, expected_grad = s.target.gradient("input", p, (data.weight, u), settings), np.zeros_like(data.input)
    weight_sum: Array = np.zeros(p.weight_shape, np.complex128 if p.is_complex else np.float64)
    for n, L_in, L_out, problem in samples:
        if problem is None:
            continue
        x, v = data.input[n : n + 1, :, :L_in], u[n : n + 1, :, :L_out]
        sums = reference.convolution(problem, x, data.weight, data.bias).compare(output[n : n + 1, :, :L_out])
        grads = reference.input_gradient(problem, data.weight, v).compare(grad_input[n : n + 1, :, :L_in])
        for comparison in (sums, grads):
            message = f"sample {n}, or its gradient, must lie within the error bound of the sample alone"
            if (failure := s.judge_comparison(comparison, message, None, problem)) is not None:
                return failure
        expected[n, :, :L_out] = s.target.convolve(problem, data._replace(input=x), s.settings)[0]
        if L_in:
            expected_grad[n, :, :L_in] = s.target.gradient("input", problem, (data.weight, v), s.settings)[0]
        q, v = WeightGradientProblem.of(problem), exact_u[n : n + 1, :, :L_out]
        weight_sum += reference.weight_gradient(q, *q.sides(exact_x[n : n + 1, :, :L_in], v)).exact()
    for found, wanted, L, of in (
        (output, expected, [alone.L_out for alone in samples], "output"),
        (grad_input, expected_grad, [alone.L_in for alone in samples], "gradient with respect to input"),
    ):
        good = same_bits(found, wanted) if s.target.on_gpu else np.ones(found.shape, np.bool_)
        for n, length in enumerate(L):
            good[n, :, length:] = found[n, :, length:] == 0
        message = f"the {of} of each sample must be that of it alone, and zero behind it"
        if (failure := s.judge(good, found, wanted, message, None, p)) is not None:
            return failure
    found = s.target.gradient("weight", p, (exact_x, exact_u), settings)
    message = "the gradient with respect to weight must be the sum of those of the samples"
    return s.expect_equal(found, weight_sum.astype(found.dtype), message, None, p)


def _check_repeat(s: Subject) -> Failure | None:
    p = s.problem
    data = cases.random_data(p, s.seed)
    arrays = [None if array is None else s.target.put(array) for array in data]
    fresh = s.target.convolve_into(None, p, *arrays, settings=s.settings)
    output, expected = s.target.get(fresh), s.run(data)
    good = same_bits(output, expected) & np.isfinite(output)
    return s.judge(good, output, expected, "a second call must give the same bits", data, p)


def _check_gradients(s: Subject) -> Failure | None:
    p, q = s.problem, WeightGradientProblem.of(s.problem)
    r = BiasGradientProblem.of(p)
    x, weight, _ = cases.exact_data(p, s.seed, adjoint_too=p.L_in > 0)
    sparse = cases.exact_grad_output(p, s.seed, x)
    u = cases.exact_data(p.adjoint(), s.seed, adjoint_too=True).input if p.L_in else sparse
    data, v = cases.random_data(p, s.seed), cases.random_grad_output(p, s.seed)
    on_integers: dict[Argument, tuple[Array, ...]] = {"input": (weight, u), "weight": (x, sparse), "bias": (sparse,)}
    normal: dict[Argument, tuple[Array, ...]] = {"input": (data.weight, v), "weight": (data.input, v), "bias": (v,)}
    expected: dict[Argument, Callable[..., reference.Sums]] = {
        "input": lambda *arrays: reference.input_gradient(p, *arrays),
        "weight": lambda *arrays: reference.weight_gradient(q, *q.sides(*arrays)),
        "bias": lambda *arrays: reference.bias_gradient(r, *arrays),
    }
    for argument, sums_of in expected.items():
        exact = sums_of(*on_integers[argument]).exact().astype(numpy_dtype(p.dtype))
        output = s.gradient(argument, *on_integers[argument])
        failure = s.expect_equal(
            output, exact, f"the gradient with respect to {argument} must equal the reference", None
        )
        if failure is not None:
            return failure
        output = s.gradient(argument, *normal[argument])
        message = f"the gradient with respect to {argument} must lie within the error bound of the reference"
        failure = s.judge_comparison(sums_of(*normal[argument]).compare(output), message, None, p)
        if failure is not None:
            return failure
        again = s.gradient(argument, *normal[argument])
        message = f"a second call must give the same bits of the gradient with respect to {argument}"
        failure = s.judge(same_bits(again, output), again, output, message, None, p)
        if failure is not None:
            return failure
    return None


def _check_fft(s: Subject) -> Failure | None:
    p, q = s.problem, WeightGradientProblem.of(s.problem)
    data, u = cases.random_data(p, s.seed), cases.random_grad_output(p, s.seed)
    settings = {**s.settings, "algorithm": "fft"}
    found = {"output": (reference.convolution(p, *data, by_fft=True), s.target.convolve(p, data, settings))}
    if p.L_in:
        sums = reference.input_gradient(p, data.weight, u, by_fft=True)
        found["gradient with respect to input"] = sums, s.target.gradient("input", p, (data.weight, u), settings)
    sums = reference.weight_gradient(q, *q.sides(data.input, u), by_fft=True)
    found["gradient with respect to weight"] = sums, s.target.gradient("weight", p, (data.input, u), settings)
    for of, (sums, result) in found.items():
        message = f"the {of} through the FFT must lie within its error bound"
        if (failure := s.judge_comparison(sums.compare(result), message, None, p)) is not None:
            return failure
    return None


class Check(NamedTuple):
    """A row of the table of checks. `applies` tells which subjects it can check; None means all of them."""

    name: str
    run: Callable[[Subject], Failure | None]
    applies: Callable[[Subject], bool] | None = None


def _has_chunks(s: Subject) -> bool:
    return s.problem.L_in >= 1 and len(cases.inner_outputs(s.problem)) >= 3


CHECKS: tuple[Check, ...] = (
    Check("exact", _check_exact),
    Check("integers", _check_integers),
    Check("fused", _check_fused),
    Check("layout", _check_layout),
    *(Check(kind, _check_random(kind)) for kind in cases.RANDOM_KINDS),
    Check(
        "impulse", _check_impulse, lambda s: s.problem.padding_mode == "zeros"
    ),  # elsewhere an impulse may come twice
    Check("adjoint", _check_adjoint),
    Check("groups", _check_groups, lambda s: s.problem.groups > 1),
    Check("bias", _check_bias),
    Check("batch", _check_batch),
    Check("chunks", _check_chunks, _has_chunks),
    Check("lengths", _check_lengths, lambda s: bool(s.case.lengths)),
    Check("repeat", _check_repeat),
    Check("gradients", _check_gradients),
    Check(FFT, _check_fft, lambda s: "wide" not in s.case.tags),  # strides of 2**31, which make many phases of one tap
)


def run_checks(
    case: Case, number_format: str, target: Target, seed: int, skipped: Container[str] = ()
) -> Iterator[Result]:
    """Run all checks of a case, but for those named in `skipped`."""
    for check in CHECKS:
        if check.name in skipped:
            continue
        subject = Subject(case, number_format, case.at(number_format), target, seed, check.name)
        if check.applies is not None and not check.applies(subject):
            continue
        if subject.problem.dtype in INTEGERS and check.name != "integers":
            continue  # the others are of floating-point numbers
        yield result_of(subject, check.run)


def result_of(subject: Subject, run: Callable[[Subject], Failure | None], family: str | None = None) -> Result:
    """Run a check and time it. An exception that it raises becomes a failure."""
    s = subject
    started = time.perf_counter()
    try:
        failure = run(s)
    except Exception as error:  # one case that raises must not hide the results of the others
        raised = f"{'' if family is None else family + ' '}raised {error!r}"
        failure = Failure(s.case.name, s.number_format, s.check, str(s.problem), raised, traceback.format_exc())
    seconds = time.perf_counter() - started
    worst = max(s.fractions, default=None)
    return Result(s.case.name, s.number_format, s.check, seconds, worst, failure, family)


def same_bits(a: Array, b: Array) -> npt.NDArray[np.bool_]:
    """Whether two arrays of one shape and dtype hold the same bytes, element by element."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"expected {b.dtype} of shape {b.shape}, got {a.dtype} of shape {a.shape}")
    bytes_a, bytes_b = (
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(*array.shape, array.itemsize) for array in (a, b)
    )
    return np.asarray((bytes_a == bytes_b).all(axis=-1))


def chunk_bounds(L_out: int) -> Iterable[tuple[int, int]]:
    """Three uneven pieces of ``0 <= l_out < L_out``, for L_out >= 3."""
    first, second = L_out // 3, min(2 * L_out // 3 + L_out % 2, L_out - 1)
    return ((0, first), (first, second), (second, L_out))


def unset(shape: tuple[int, ...], dtype: str) -> Array:
    """An array to write a result to, of NaN, or of ones where the dtype is one of integers."""
    return np.full(shape, 1 if dtype in INTEGERS else np.nan, numpy_dtype(dtype))


def exact_result(problem: ConvProblem, data: Data) -> Array:
    return reference.compute(problem, *data).astype(numpy_dtype(problem.dtype))


def every_other(target: Target, array: Array) -> Any:
    """The array as every second element of a buffer, last axis reversed."""
    buffer = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    buffer[..., ::-2] = array
    return target.put(buffer)[..., ::-2]


def swapped_axes(target: Target, array: Array) -> Any:
    """The array with its last two axes swapped in memory."""
    return target.put(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)


def _inner_product(a: Array, b: Array) -> complex:
    """The inner product of arrays of small integers, exact in float64."""
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    return _number(np.sum(a.astype(wide) * b.astype(wide).conj()))


def _taps(problem: ConvProblem, data: Data, index: tuple[int, ...]) -> Iterator[Tap]:
    """The products that feed one output element, in the canonical order, with their factors."""
    *batch, c_out, l_out = index
    sample = data.input[tuple(batch)]
    for term in cases.terms_of(problem, c_out, l_out):
        weight, value = data.weight[term.weight_index], sample[term.channel, term.l_in]
        yield Tap(term.c_in, term.k, term.l_in, _number(weight), _number(value))


def _number(value: Any) -> complex:
    """A NumPy scalar of any supported dtype as a Python number."""
    return complex(value) if np.iscomplexobj(value) else float(value)
