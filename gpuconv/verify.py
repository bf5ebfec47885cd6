"""`verify`: does this machine compute the right numbers? Runs the case table and checks the promises of gpuconv."""

from __future__ import annotations

import importlib
import math
import os
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from . import cases, functional, grad, reference, runtime
from .cases import FORMATS, Case, Data
from .problem import BiasGradientProblem, ConvProblem, WeightGradientProblem, numpy_dtype

Array: TypeAlias = npt.NDArray[Any]
DeviceName: TypeAlias = Literal["auto", "gpu", "cpu"]
Argument: TypeAlias = Literal["input", "weight", "bias"]
Progress: TypeAlias = Callable[[int, int, str], None]

MAX_TAPS = 8  # of a failing element, in a report


class GpuUnavailableError(RuntimeError):
    """A GPU was asked for and none answers; the message names what is missing."""


class Tap(NamedTuple):
    """One product that feeds an output element: weight at (c_in, k) times input at (c_in, l_in).

    `c_in` counts within the group.
    """

    c_in: int
    k: int
    l_in: int
    weight: complex
    input: complex


@dataclass(frozen=True, slots=True)
class Failure:
    """A check that did not hold.

    Attributes:
        case, dtype, check: where; `dtype` is one of `gpuconv.cases.FORMATS`.
        problem: what was computed; the case's own problem or one derived from it.
        message: what was expected, or what was raised, in one line.
        traceback: where the call raised.
        bad: how many elements are wrong.
        index: of the first wrong output element; None where the failure is not that of an element.
        got, expected: its values.
        bound: the permitted distance of got from expected, of the real and of the imaginary part each; None where the
            values must be equal.
        taps: the first `MAX_TAPS` products that feed the element.
        num_taps: how many there are; None for an element of a gradient, whose terms are not listed.
    """

    case: str
    dtype: str
    check: str
    problem: str
    message: str
    traceback: str | None = None
    bad: int = 0
    index: tuple[int, ...] | None = None
    got: complex | None = None
    expected: complex | None = None
    bound: float | None = None
    taps: tuple[Tap, ...] = ()
    num_taps: int | None = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: complex numbers as [real, imaginary], NaN and infinities as strings."""
        return {
            "case": self.case,
            "dtype": self.dtype,
            "check": self.check,
            "problem": self.problem,
            "message": self.message,
            "traceback": self.traceback,
            "bad": self.bad,
            "index": None if self.index is None else list(self.index),
            "got": _json_number(self.got),
            "expected": _json_number(self.expected),
            "bound": _json_number(self.bound),
            "taps": [
                {**tap._asdict(), "weight": _json_number(tap.weight), "input": _json_number(tap.input)}
                for tap in self.taps
            ],
            "num_taps": self.num_taps,
        }

    def __str__(self) -> str:
        lines = [f"{self.case} [{self.dtype}] {self.check}: {self.message}", f"  {self.problem}"]
        if self.got is not None:
            place = "" if self.index is None else f" at {self.index}, the first of {self.bad} wrong elements"
            bound = "" if self.bound is None else f", bound {self.bound:.3g}"
            lines.append(f"  got {self.got!r}, expected {self.expected!r}{bound}{place}")
        if self.index is not None and self.num_taps is not None:
            lines.append(f"  fed by {self.num_taps} tap(s)" + (":" if self.taps else ""))
            lines += [
                f"    weight[c_in={tap.c_in}, k={tap.k}] = {tap.weight!r}, input[l_in={tap.l_in}] = {tap.input!r}"
                for tap in self.taps
            ]
            if self.num_taps > len(self.taps):
                lines.append("    ...")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Result:
    """One check of one case in one number format; it passed where `failure` is None. `seconds` is its wall time."""

    case: str
    dtype: str
    check: str
    seconds: float
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found. `str` gives a short table.

    Attributes:
        results: every check that was run.
        device: the device, in words.
        versions: of everything that computes.
        seed: of the data.
        skipped: dtypes that were not run although none were asked for by name, with the reason.
        elapsed: wall time in seconds.
    """

    results: tuple[Result, ...]
    device: str
    versions: dict[str, str]
    seed: int
    skipped: dict[str, str]
    elapsed: float

    @property
    def failures(self) -> tuple[Failure, ...]:
        return tuple(result.failure for result in self.results if result.failure is not None)

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """{check: {"passed": ..., "failed": ...}}, in the order in which they run."""
        counts = {check.name: {"passed": 0, "failed": 0} for check in CHECKS}
        for result in self.results:
            counts[result.check]["passed" if result.failure is None else "failed"] += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, the passed checks as counts."""
        return {
            "ok": self.ok,
            "device": self.device,
            "versions": self.versions,
            "seed": self.seed,
            "elapsed_s": self.elapsed,
            "cases": len({result.case for result in self.results}),
            "dtypes": list(dict.fromkeys(result.dtype for result in self.results)),
            "skipped": self.skipped,
            "checks": len(self.results),
            "counts": self.counts,
            "failures": [failure.to_dict() for failure in self.failures],
        }

    def to_junit(self) -> str:
        """A JUnit XML document: one test case per case and dtype, which fails with all its failed checks."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.dtype, result.case), []).append(result)
        failed = Counter(any(r.failure for r in group) for group in groups.values())
        suite = ElementTree.Element(
            "testsuite",
            name="gpuconv verify",
            tests=str(len(groups)),
            failures=str(failed[True]),
            errors="0",
            skipped="0",
            time=f"{self.elapsed:.3f}",
        )
        properties = ElementTree.SubElement(suite, "properties")
        facts = {"device": self.device, "seed": str(self.seed), **self.versions}
        facts.update({f"skipped {dtype}": reason for dtype, reason in self.skipped.items()})
        for name, value in facts.items():
            ElementTree.SubElement(properties, "property", name=name, value=_xml_text(value))
        for (dtype, case), group in groups.items():
            seconds = sum(result.seconds for result in group)
            element = ElementTree.SubElement(
                suite, "testcase", classname=f"gpuconv.verify.{dtype}", name=case, time=f"{seconds:.4f}"
            )
            failures = [result.failure for result in group if result.failure is not None]
            if failures:
                message = "; ".join(f"{failure.check}: {failure.message}" for failure in failures)
                details = ElementTree.SubElement(element, "failure", message=_xml_text(message))
                details.text = _xml_text("\n".join(f"{failure}\n{failure.traceback or ''}" for failure in failures))
        root = ElementTree.Element("testsuites")
        root.append(suite)
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"

    def __str__(self) -> str:
        dtypes = dict.fromkeys(result.dtype for result in self.results)
        num_cases = len({result.case for result in self.results})
        lines = [
            f"gpuconv {self.versions['gpuconv']} on {self.device}",
            f"{num_cases} cases, {', '.join(dtypes)}; seed {self.seed}; {self.elapsed:.1f} s",
            *(f"not run: {dtype}: {reason}" for dtype, reason in self.skipped.items()),
            "",
            f"{'check':<12}{'passed':>8}{'failed':>8}",
        ]
        lines += [f"{name:<12}{count['passed']:>8}{count['failed']:>8}" for name, count in self.counts.items()]
        shown = self.failures[:5]
        for failure in shown:
            lines += ["", str(failure)]
        if len(self.failures) > len(shown):
            lines += ["", f"... and {len(self.failures) - len(shown)} more failures"]
        lines += ["", "all checks passed" if self.ok else f"{len(self.failures)} of {len(self.results)} checks FAILED"]
        return "\n".join(lines)


def verify(
    device: DeviceName = "auto",
    *,
    filter: str | None = None,
    seed: int = 0,
    dtypes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run the case table on a device and check what gpuconv promises. Every output array starts as NaN.

    ==========  ====================================================================================================
    exact       small integers: the result equals the reference
    layout      the same on strided, reversed and axis-swapped input, weight, bias and output
    normal      normal data: every element within the error bound of `gpuconv.reference`; NaN fails
    ill_scaled  the same for magnitudes from 2**-60 to 2**60
    cancelling  the same where the terms of an element nearly cancel
    nonfinite   a NaN and infinities stay in the windows that contain them
    impulse     a unit impulse gives the weights, unrounded
    adjoint     <A(x, w), u> equals <x, gradient in x> and <w, gradient in w>, exactly, on integers
    groups      each group equals a convolution of its own, on integers
    bias        the bias adds to the result without one, on integers
    batch       a sample's result does not depend on the batch: N = 1 against N = 5
    chunks      a long input cut into chunks gives the result of the whole
    repeat      two calls give the same bits, with and without `out`
    gradients   in input, weight and bias: exact on integers, within the bound on normal data, the same bits twice
    ==========  ====================================================================================================

    On a GPU `exact`, `layout`, `groups`, `bias`, `batch`, `chunks`, `repeat` and `gradients` compare bits. On the CPU
    only `repeat` and the last part of `gradients` do: the BLAS library picks the order of the sums by the extents of a
    call, so `batch` and `chunks` are held to the error bound, and it may give a zero either sign, so the others compare
    values.

    Args:
        device: "gpu": CuPy's current device. "cpu": the NumPy path. "auto": the GPU if one answers, else the CPU.
        filter: part of a case name, a tag, or an operation; see `gpuconv.cases.select`.
        seed: of all data.
        dtypes: names in `gpuconv.cases.FORMATS`: dtypes, and "tf32" for float32 with ``precision="tf32"``. By default
            all that this machine has: bfloat16 needs ml_dtypes, and on a GPU CuPy 14; the NumPy path computes "tf32" as
            float32, so there it is run only by name.
        progress: called as progress(done, total, label) before the first case and after each.

    Raises:
        GpuUnavailableError: `device` is "gpu" and none answers.
        ValueError: `device` or a dtype is not one of those named above, or `filter` matches no case.
        ModuleNotFoundError: bfloat16 was asked for by name, and ml_dtypes is not installed.
    """
    started = time.perf_counter()
    if device not in ("auto", "gpu", "cpu"):
        raise ValueError(f'device must be "auto", "gpu" or "cpu", got {device!r}')
    unknown = [dtype for dtype in dtypes or () if dtype not in FORMATS]
    if unknown:
        raise ValueError(f"dtypes must be among {', '.join(FORMATS)}, got {', '.join(map(repr, unknown))}")
    selected = cases.select(filter)
    missing = None if device == "cpu" else missing_gpu()
    if device == "gpu" and missing is not None:
        raise GpuUnavailableError(missing)
    target = _Target(on_gpu=device != "cpu" and missing is None)
    skipped: dict[str, str] = {}
    if dtypes is None:
        own = [name for name in FORMATS if target.on_gpu or name != "tf32"]
        skipped = {name: reason for name in own if (reason := target.lacks(name)) is not None}
        dtypes = [name for name in own if name not in skipped]
    else:
        for name in dtypes:
            numpy_dtype(cases.dtype_of(name))

    results: list[Result] = []
    total = len(dtypes) * len(selected)
    if progress is not None:
        progress(0, total, "")
    for done, (dtype, case) in enumerate(((dtype, case) for dtype in dtypes for case in selected), start=1):
        results += _run_checks(case, dtype, target, seed)
        if progress is not None:
            progress(done, total, f"{case.name} {dtype}")
    elapsed = time.perf_counter() - started
    return Report(tuple(results), target.description(), target.versions(), seed, skipped, elapsed)


def missing_gpu() -> str | None:
    """What keeps this process from a GPU, CuPy, the driver or the device; None where a GPU answers."""
    try:
        count = runtime.device_count()
    except ModuleNotFoundError as error:
        return f'no GPU: CuPy is missing ({error}); pip install "gpuconv[cuda13]", or "gpuconv[cuda12]" for CUDA 12'
    except ImportError as error:
        return f"no GPU: {error}"
    except RuntimeError as error:
        driver, needed = runtime.cuda_versions()
        if driver == 0:
            return "no GPU: no NVIDIA driver is loaded here; in a container, start it with --gpus all"
        if driver // 1000 < needed // 1000:
            have, want = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, needed))
            return f"no GPU: the NVIDIA driver supports CUDA {have}, CuPy was built for CUDA {want}"
        if "cudaErrorNoDevice" in str(error):
            count = 0
        else:
            return f"no GPU: the NVIDIA driver does not answer ({error})"
    if count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "no GPU: the NVIDIA driver sees no device" + (
        "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
    )


# -- where the arrays live -------------------------------------------------------------------------------------------


class _Target:
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

    def convolve(self, problem: ConvProblem, data: Data, settings: dict[str, Any] | None = None) -> Array:
        """The public function on arrays of this device, into an output of NaN."""
        out = self.put(np.full(problem.output_shape, np.nan, numpy_dtype(problem.dtype)))
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
        """The public function on arrays that are there already; `out` is None for a fresh array."""
        function = functional.conv_transpose1d if problem.transposed else functional.conv1d
        keywords = cases.call_settings(problem) if settings is None else settings
        return function(input, weight, bias, **keywords, out=out)

    def gradient(
        self, argument: Argument, problem: ConvProblem, arrays: Sequence[Array], settings: dict[str, Any]
    ) -> Array:
        """The public function of the gradient in an argument on arrays of this device, into an output of NaN."""
        shapes = {"input": problem.input_shape, "weight": problem.weight_shape, "bias": (problem.C_out,)}
        out = self.put(np.full(shapes[argument], np.nan, numpy_dtype(problem.dtype)))
        given: list[Any] = [self.put(array) for array in arrays]
        if argument != "bias":
            given.insert(0 if argument == "input" else 1, shapes[argument])
        function = getattr(grad, f"{problem.op}_{argument}")
        return self.get(function(*given, **({} if argument == "bias" else settings), out=out))

    def _put_if_given(self, array: Array | None) -> Any:
        return None if array is None else self.put(array)

    def description(self) -> str:
        if not self.on_gpu:
            return f"CPU ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"
        index = int(runtime.cupy_module().cuda.runtime.getDevice())
        gpu = runtime.device(index)
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


# -- the checks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Subject:
    """One case in one number format on one device, as the checks see it."""

    case: Case
    number_format: str
    problem: ConvProblem
    target: _Target
    seed: int
    check: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the call, as the case's author wrote them."""
        settings = dict(self.case.settings)
        if self.problem.precision != "float32":
            settings["precision"] = self.problem.precision
        return settings

    def run(self, data: Data, problem: ConvProblem | None = None) -> Array:
        """The case called as its author wrote it, or a problem derived from it."""
        if problem is None:
            return self.target.convolve(self.problem, data, self.settings)
        return self.target.convolve(problem, data)

    def gradient(self, argument: Argument, *arrays: Array) -> Array:
        """The gradient in an argument, with the case's settings as its author wrote them.

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
        """What no rounding can excuse. Without `data` a failure tells no taps."""
        if self.target.on_gpu:
            message += ", bit for bit"
        good = self.equal(output, expected)
        return self._judge(good, output, expected, message, data, problem or self.problem)

    def expect_bound(
        self, output: Array, message: str, data: Data, problem: ConvProblem | None = None
    ) -> Failure | None:
        p = problem or self.problem
        good = reference.within_bound(p, output, *data)
        if good.all():
            return None
        exact = reference.compute(p, *data)
        bound = reference.error_bound(p, *data, exact)
        return self._judge(good, output, exact, message, data, p, bound)

    def expect_invariance(
        self, output: Array, whole: Array, message: str, data: Data, problem: ConvProblem
    ) -> Failure | None:
        """Equal bits on a GPU; on the CPU, whose BLAS reorders sums, the bound."""
        if self.target.on_gpu:
            return self.expect_equal(output, whole, message, data, problem)
        return self.expect_bound(output, f"{message}, within the bound", data, problem)

    def _judge(
        self,
        good: npt.NDArray[np.bool_],
        output: Array,
        expected: Array,
        message: str,
        data: Data | None,
        problem: ConvProblem,
        bound: Array | None = None,
    ) -> Failure | None:
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


def _check_exact(s: _Subject) -> Failure | None:
    data = cases.exact_data(s.problem, s.seed)
    return s.expect_equal(s.run(data), _exact_result(s.problem, data), "must equal the reference", data)


def _check_layout(s: _Subject) -> Failure | None:
    p = s.problem
    data = cases.exact_data(p, s.seed)
    dtype = numpy_dtype(p.dtype)
    out = _every_other(s.target, np.full(p.output_shape, np.nan, dtype))
    weight = _swapped_axes(s.target, data.weight)
    bias = None if data.bias is None else _every_other(s.target, data.bias)
    settings = s.settings
    for arrange in (_every_other, _swapped_axes):
        out[...] = np.nan
        s.target.convolve_into(out, p, arrange(s.target, data.input), weight, bias, settings=settings)
        message = "strided arrays must give the reference"
        failure = s.expect_equal(s.target.get(out), _exact_result(p, data), message, data)
        if failure is not None:
            return failure
    return None


def _check_random(kind: cases.RandomKind) -> Callable[[_Subject], Failure | None]:
    def check(s: _Subject) -> Failure | None:
        data = cases.random_data(s.problem, s.seed, kind)
        return s.expect_bound(s.run(data), "must lie within the error bound of the reference", data)

    return check


def _check_impulse(s: _Subject) -> Failure | None:
    data = cases.impulse_data(s.problem, s.seed)
    output, expected = s.run(data), _exact_result(s.problem, data)
    # By value: the sign of a zero depends on the signs of weights that meet no impulse.
    return s._judge(output == expected, output, expected, "an impulse must give the weights", data, s.problem)


def _check_adjoint(s: _Subject) -> Failure | None:
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


def _check_groups(s: _Subject) -> Failure | None:
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
    return s._judge(good, output, expected, "must equal the convolution of its group alone", data, p)


def _check_bias(s: _Subject) -> Failure | None:
    p = replace(s.problem, has_bias=True)
    data = cases.exact_data(p, s.seed)
    assert data.bias is not None
    wide = np.complex128 if p.is_complex else np.float64
    without = s.run(data._replace(bias=None), replace(p, has_bias=False)).astype(wide)
    expected = (without + data.bias.astype(wide)[:, np.newaxis]).astype(data.bias.dtype)
    return s.expect_equal(s.run(data, p), expected, "must equal the result without bias, plus the bias", data, p)


def _check_batch(s: _Subject) -> Failure | None:
    p = cases.with_batch(s.problem, 5)
    data = cases.random_data(p, s.seed)
    whole = s.run(data, p)
    output = whole.copy()
    for n in (0, p.N - 1):
        output[n] = s.run(data._replace(input=data.input[n : n + 1]), cases.with_batch(p, 1))[0]
    return s.expect_invariance(output, whole, "each sample alone must give what it gives in the batch", data, p)


def _check_chunks(s: _Subject) -> Failure | None:
    p = s.problem
    data = cases.random_data(p, s.seed)
    pieces = []
    for start, stop in chunk_bounds(p.L_out):
        piece, positions = cases.chunk(p, start, stop)
        pieces.append(s.run(data._replace(input=data.input[..., positions]), piece))
    message = "the input in chunks must give what the whole gives"
    return s.expect_invariance(np.concatenate(pieces, axis=-1), s.run(data), message, data, p)


def _check_repeat(s: _Subject) -> Failure | None:
    p = s.problem
    data = cases.random_data(p, s.seed)
    arrays = [None if array is None else s.target.put(array) for array in data]
    fresh = s.target.convolve_into(None, p, *arrays, settings=s.settings)
    output, expected = s.target.get(fresh), s.run(data)
    good = same_bits(output, expected) & np.isfinite(output)
    return s._judge(good, output, expected, "a second call must give the same bits", data, p)


def _check_gradients(s: _Subject) -> Failure | None:
    p, q = s.problem, WeightGradientProblem.of(s.problem)
    r = BiasGradientProblem(p.N, p.C_out, p.L_out, p.dtype)
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
        failure = s.expect_equal(output, exact, f"the gradient in {argument} must equal the reference", None)
        if failure is not None:
            return failure
        output, sums = s.gradient(argument, *normal[argument]), sums_of(*normal[argument])
        message = f"the gradient in {argument} must lie within the error bound of the reference"
        good = sums.within_bound(output)
        failure = s._judge(good, output, sums.exact(), message, None, p, None if good.all() else sums.error_bound())
        if failure is not None:
            return failure
        again = s.gradient(argument, *normal[argument])
        message = f"a second call must give the same bits of the gradient in {argument}"
        failure = s._judge(same_bits(again, output), again, output, message, None, p)
        if failure is not None:
            return failure
    return None


class Check(NamedTuple):
    """A row of the table of checks. `applies` tells the problems that it can be asked of; None: of all."""

    name: str
    run: Callable[[_Subject], Failure | None]
    applies: Callable[[ConvProblem], bool] | None = None


CHECKS: tuple[Check, ...] = (
    Check("exact", _check_exact),
    Check("layout", _check_layout),
    *(Check(kind, _check_random(kind)) for kind in cases.RANDOM_KINDS),
    Check("impulse", _check_impulse),
    Check("adjoint", _check_adjoint),
    Check("groups", _check_groups, lambda p: p.groups > 1),
    Check("bias", _check_bias),
    Check("batch", _check_batch),
    Check("chunks", _check_chunks, lambda p: p.L_in >= 1 and p.L_out >= 3),
    Check("repeat", _check_repeat),
    Check("gradients", _check_gradients),
)


def _run_checks(case: Case, number_format: str, target: _Target, seed: int) -> Iterator[Result]:
    subject = _Subject(case, number_format, case.at(number_format), target, seed)
    for check in CHECKS:
        if check.applies is not None and not check.applies(subject.problem):
            continue
        started = time.perf_counter()
        try:
            failure = check.run(replace(subject, check=check.name))
        except Exception as error:  # one case that raises must not hide the results of the others
            failure = Failure(
                case.name, number_format, check.name, str(subject.problem), f"raised {error!r}", traceback.format_exc()
            )
        yield Result(case.name, number_format, check.name, time.perf_counter() - started, failure)


# -- pieces ----------------------------------------------------------------------------------------------------------


def same_bits(a: Array, b: Array) -> npt.NDArray[np.bool_]:
    """Elementwise: do two arrays of one shape and dtype hold the same bytes?"""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"expected {b.dtype} of shape {b.shape}, got {a.dtype} of shape {a.shape}")
    bytes_a, bytes_b = (
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(*array.shape, array.itemsize) for array in (a, b)
    )
    return np.asarray((bytes_a == bytes_b).all(axis=-1))


def chunk_bounds(L_out: int) -> Iterable[tuple[int, int]]:
    """Three uneven pieces of ``0 <= l_out < L_out``, for L_out >= 3."""
    first, second = max(1, L_out // 3), max(2, 2 * L_out // 3 + L_out % 2)
    return ((0, first), (first, second), (second, L_out))


def _exact_result(problem: ConvProblem, data: Data) -> Array:
    return reference.compute(problem, *data).astype(numpy_dtype(problem.dtype))


def _every_other(target: _Target, array: Array) -> Any:
    """The array as every second element of a buffer, last axis reversed."""
    buffer = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, array.dtype)
    buffer[..., ::-2] = array
    return target.put(buffer)[..., ::-2]


def _swapped_axes(target: _Target, array: Array) -> Any:
    """The array with its last two axes swapped in memory."""
    return target.put(np.ascontiguousarray(array.swapaxes(-1, -2))).swapaxes(-1, -2)


def _inner_product(a: Array, b: Array) -> complex:
    """The inner product of arrays of small integers, exact in float64."""
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    return _number(np.sum(a.astype(wide) * b.astype(wide).conj()))


def _taps(problem: ConvProblem, data: Data, index: tuple[int, ...]) -> Iterator[Tap]:
    """The products that feed one output element, in the canonical order: c_in outer, k inner."""
    p = problem
    *batch, c_out, l_out = index
    g, c_out_g = divmod(c_out, p.C_out_g)
    sample = data.input[tuple(batch)]
    for c_in in range(p.C_in_g):
        c = g * p.C_in_g + c_in
        for k in range(p.K):
            if p.transposed:
                l_in, rest = divmod(l_out + p.padding_left - k * p.dilation, p.stride)
                weight = data.weight[c, c_out_g, k]
            else:
                l_in, rest = l_out * p.stride - p.padding_left + k * p.dilation, 0
                weight = data.weight[c_out, c_in, k]
            if rest == 0 and 0 <= l_in < p.L_in:
                yield Tap(c_in, k, l_in, _number(weight), _number(sample[c, l_in]))


def _number(value: Any) -> complex:
    """A NumPy scalar of any supported dtype as a Python number."""
    return complex(value) if np.iscomplexobj(value) else float(value)


def _json_number(value: complex | None) -> Any:
    if value is None:
        return None
    if isinstance(value, complex):
        return [_json_number(value.real), _json_number(value.imag)]
    return value if math.isfinite(value) else str(value)


def _xml_text(text: str) -> str:
    """The text without the control characters that XML cannot hold."""
    return "".join(c if c >= " " or c in "\t\n" else "?" for c in text)
