"""`gpuconv.verify`: good kernels pass, each planted fault is found and described, reports can be read by machines."""

from __future__ import annotations

import json
import operator
import re
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import cases, cpu, dispatch, fft, reference, runtime
from gpuconv.cases import NUMBER_FORMATS
from gpuconv.checks import CHECKS, MAX_TAPS, same_bits, unset
from gpuconv.checks.families import (
    families_of,
    families_that_take,
    far_layout,
    far_runs,
    spread,
)
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import FAMILIES, Layout, Plan
from gpuconv.gpus import GpuUnavailableError, missing_gpu
from gpuconv.problem import DTYPES, BiasGradientProblem, ConvProblem, WeightGradientProblem
from gpuconv.report import BY_FAMILY, FAR
from gpuconv.verify import verify
from tests import hostcuda
from tests.plans import FORWARD_FAMILIES, kernel_of

Array = npt.NDArray[Any]
Kernel = Callable[[ConvProblem, Array, Array, Array | None, Array], None]


def correct(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    """What `cpu.convolve` must do."""
    out[...] = reference.compute(p, x, w, b).astype(out.dtype)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], None]:
    """Puts another kernel in the place of the CPU path, which finishes what is fused."""

    def spoil(kernel: Kernel) -> None:
        def convolve(
            p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array, arrays: Sequence[Array | None] = ()
        ) -> None:
            if p.fusion:
                cpu.fused.convolve(p, x, w, b, out, arrays, kernel)
            else:
                kernel(p, x, w, b, out)

        monkeypatch.setattr(cpu, "convolve", convolve)

    return spoil


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that answers and whose arrays are NumPy arrays."""
    versions = SimpleNamespace(
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13010,
        memGetInfo=lambda: (2**30, 2**31),
    )
    module = SimpleNamespace(
        __version__="14.2.0", asarray=np.array, asnumpy=np.asarray, cuda=SimpleNamespace(runtime=versions)
    )
    monkeypatch.setattr(runtime, "cupy_module", lambda: module)
    monkeypatch.setattr(runtime, "device_count", lambda: 1)
    monkeypatch.setattr(runtime, "current_index", lambda: 0)
    monkeypatch.setattr(runtime, "current_gpu", lambda: Device.from_arch("sm_90"))


@pytest.mark.parametrize(
    ("dtype", "filter"),
    [
        ("float32", None),
        ("float16", "padding"),
        ("bfloat16", "channels"),
        ("float64", "conv_transpose1d"),
        ("complex64", "model"),
        ("complex128", "groups"),
    ],
)
def test_the_cpu_path_passes(dtype: str, filter: str | None) -> None:
    report = verify("cpu", dtypes=[dtype], filter=filter)
    assert report.ok, str(report)
    assert sum(sum(count.values()) for count in report.counts.values()) == len(report.results)
    of_few_cases = {"groups", "lengths"}
    assert all(
        count["passed"] > 0 for name, count in report.counts.items() if filter is None or name not in of_few_cases
    )


def run_on_hostcuda(
    p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array, fused: Sequence[Array | None] = ()
) -> None:
    """Stands in for `cpu.convolve`; the kernels themselves apply what is fused."""
    out[...] = hostcuda.compute(p, *(array for array in (x, w, b, *fused) if array is not None))


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(
    ("dtype", "tags"),
    [
        ("float16", ("unbatched", "dilation")),
        ("float32", ("unbatched", "padding")),
        ("complex128", ("unbatched", "zero")),
    ],
)
def test_the_kernels_pass_bit_for_bit(dtype: str, tags: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode for GPUs, which compares bits across batches and chunks, with the kernels executed on the CPU.

    `test_the_gpu_passes` meets the other dtypes, tests/kernels/test_kernels.py every family in all of them.
    """
    monkeypatch.setattr(cpu, "convolve", run_on_hostcuda)
    for tag in tags:
        report = verify("gpu", dtypes=[dtype], filter=tag)
        assert report.ok, str(report)
    assert report.device == "GPU 0: H200 (sm_90, 132 multiprocessors)"
    assert report.versions["cupy"] == "14.2.0"


@pytest.mark.usefixtures("fake_gpu")
def test_tf32_is_run_where_there_is_one_or_by_name(plant: Callable[[Kernel], None]) -> None:
    called: list[ConvProblem] = []

    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        called.append(p)
        correct(p, x, w, b, out)

    plant(kernel)
    assert {r.dtype for r in verify("gpu", filter="hifigan_resblock").results} == set(NUMBER_FORMATS)
    assert any(p.precision == "tf32" for p in called)
    assert {r.dtype for r in verify("cpu", filter="hifigan_resblock").results} == set(DTYPES)
    called.clear()
    report = verify("cpu", filter="hifigan_resblock", dtypes=["tf32"])
    assert report.ok
    assert {r.dtype for r in report.results} == {"tf32"}
    assert {(p.dtype, p.precision) for p in called if p.dtype in DTYPES} == {("float32", "tf32")}
    plant(without_the_last_tap)
    assert {f.dtype for f in verify("cpu", filter="k3", dtypes=["tf32"]).failures} == {"tf32"}


@pytest.mark.long
@pytest.mark.gpu
def test_the_gpu_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one in 32 of the pairs that `verify` selects, and all that it adds so that every family is reached."""
    every = cases.quick_pairs
    monkeypatch.setattr(cases, "quick_pairs", lambda formats: every(formats)[::32])
    report = verify("gpu")
    assert report.ok, str(report)
    assert report.device.startswith("GPU")


def without_the_last_tap(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    short = w.copy()
    short[..., -1] = 0
    correct(p, x, short, b, out)


def one_position_late(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    correct(p, x, w, b, out)
    out[...] = np.roll(out, 1, axis=-1)


def unwritten_tail(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    result = np.empty_like(out)
    correct(p, x, w, b, result)
    out[..., :-1] = result[..., :-1]


def nan_in_the_last_element(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    correct(p, x, w, b, out)
    if out.size:
        out.flat[-1] = np.nan


def without_bias(p: ConvProblem, x: Array, w: Array, _b: Array | None, out: Array) -> None:
    correct(p, x, w, None, out)


def in_half_precision(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    with np.errstate(over="ignore"):
        rounded = [None if a is None else a.astype(np.float16) for a in (x, w, b)]
    correct(p, *rounded, out)


def weights_of_the_first_group(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    first = w[: w.shape[0] // p.groups]
    correct(p, x, np.tile(first, (p.groups, 1, 1)), b, out)


def deaf_to_strides(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    as_it_lies = np.lib.stride_tricks.as_strided(x, strides=np.empty(x.shape, x.dtype).strides)
    correct(p, as_it_lies if x.strides[-1] > 0 else x, w, b, out)


def padding_multiplied_too(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
    """Infinite weights times the zeros of the padding give NaN."""
    correct(p, x, w, b, out)
    if not np.isfinite(w).all():
        out[..., 0] = np.nan


class EveryOtherCallRoundsUp:
    """The last bit of the result depends on the run."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        correct(p, x, w, b, out)
        self.calls += 1
        if self.calls % 2:
            out[...] = np.nextafter(out, out.dtype.type(np.inf))


FAULTS: list[tuple[Kernel, str, set[str]]] = [
    (without_the_last_tap, "k3", {"exact", "layout", "normal", "ill_scaled", "impulse", "batch", "chunks"}),
    (one_position_late, "up_k3", {"exact", "normal", "impulse", "chunks"}),
    (unwritten_tail, "stride_equals_k", {"exact", "layout", "normal", "impulse", "adjoint", "bias", "repeat"}),
    (nan_in_the_last_element, "whisper_conv2", {"exact", "normal", "ill_scaled", "impulse", "adjoint", "batch"}),
    (without_bias, "k2_even", {"exact", "normal", "bias"}),
    (in_half_precision, "stft", {"normal", "ill_scaled", "cancelling"}),
    (weights_of_the_first_group, "groups4_strided", {"exact", "normal", "impulse", "groups"}),
    (deaf_to_strides, "k5", {"layout"}),
    (padding_multiplied_too, "padding_left_only", {"nonfinite"}),
    (EveryOtherCallRoundsUp(), "k31", {"repeat"}),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "name", "checks"), FAULTS, ids=[fault[1] for fault in FAULTS])
def test_a_fault_is_found(kernel: Kernel, name: str, checks: set[str], plant: Callable[[Kernel], None]) -> None:
    assert verify("cpu", filter=name, dtypes=["float32"]).ok
    plant(kernel)
    report = verify("cpu", filter=name, dtypes=["float32"])
    assert not report.ok
    assert checks <= {failure.check for failure in report.failures if failure.case == name}
    assert {failure.dtype for failure in report.failures} == {"float32"}
    assert "FAILED" in str(report)


Gradient = Callable[[WeightGradientProblem, Array, Array, Array], None]


def unconjugated(p: WeightGradientProblem, coarse: Array, fine: Array, out: Array) -> None:
    coarse, fine = (coarse.conj(), fine) if p.transposed else (coarse, fine.conj())
    out[...] = reference.weight_gradient(p, coarse, fine).exact()


def without_the_last_position(p: WeightGradientProblem, coarse: Array, fine: Array, out: Array) -> None:
    cut = coarse.copy()
    cut[..., -1] = 0
    out[...] = reference.weight_gradient(p, cut, fine).exact()


def rounded_to_half(p: WeightGradientProblem, coarse: Array, fine: Array, out: Array) -> None:
    out[...] = reference.weight_gradient(p, coarse, fine).exact()
    out.real[...] = out.real.astype(np.float16)


class EveryOtherGradientRoundsUp:
    """The last bit of the result depends on the run."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, p: WeightGradientProblem, coarse: Array, fine: Array, out: Array) -> None:
        out[...] = reference.weight_gradient(p, coarse, fine).exact()
        self.calls += 1
        if self.calls % 3 == 0:
            out.real[...] = np.nextafter(out.real, np.float32(np.inf))


@pytest.mark.parametrize(
    ("fault", "name", "checks", "says"),
    [
        (
            unconjugated,
            "up_groups2",
            {"adjoint", "gradients"},
            "the gradient with respect to weight must equal the reference",
        ),
        (
            unconjugated,
            "groups2",
            {"adjoint", "gradients"},
            "the gradient with respect to weight must equal the reference",
        ),
        (
            without_the_last_position,
            "k3",
            {"adjoint", "gradients"},
            "the gradient with respect to weight must equal the reference",
        ),
        (rounded_to_half, "stft", {"gradients"}, "the gradient with respect to weight must lie within the error bound"),
        (
            EveryOtherGradientRoundsUp(),
            "k31",
            {"gradients"},
            "must give the same bits of the gradient with respect to weight",
        ),
    ],
    ids=["unconjugated, transposed", "unconjugated", "last position", "half", "run"],
)
def test_a_fault_of_a_weight_gradient_is_found(
    fault: Gradient, name: str, checks: set[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.weight_gradient, "compute", fault)
    failures = [f for f in verify("cpu", filter=name, dtypes=["complex64"]).failures if f.case == name]
    assert {failure.check for failure in failures} == checks
    (failure,) = (failure for failure in failures if failure.check == "gradients")
    assert says in failure.message
    assert failure.num_taps is None
    assert "fed by" not in str(failure)
    json.dumps(failure.to_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_found_in_every_dtype(dtype: str, plant: Callable[[Kernel], None]) -> None:
    plant(nan_in_the_last_element)
    report = verify("cpu", filter="groups2", dtypes=[dtype])
    failures = {failure.check: failure for failure in report.failures if failure.case == "groups2"}
    assert {"exact", "layout", "normal", "ill_scaled", "cancelling", "bias", "groups", "chunks"} <= set(failures)
    (case,) = (case for case in cases.CASES if case.name == "groups2")
    last = tuple(extent - 1 for extent in case.problem.output_shape)
    for check in ("exact", "normal"):
        assert failures[check].index == last
        assert np.isnan(failures[check].got)
        assert np.isfinite(failures[check].expected)
        assert failures[check].bad == 1


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(
    ("check", "depends"), [("batch", lambda p: p.N > 1), ("chunks", lambda p: p.L_out > 30)], ids=["batch", "chunks"]
)
def test_one_bit_that_depends_on_the_extents_is_found(
    check: str, depends: Callable[[ConvProblem], bool], plant: Callable[[Kernel], None]
) -> None:
    """On a GPU bits may depend on the layer alone; a result within the bound is not enough."""

    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        correct(p, x, w, b, out)
        if depends(p):
            out[..., 0] = np.nextafter(out[..., 0], out.dtype.type(np.inf))

    plant(kernel)
    report = verify("gpu", filter="hifigan_resblock", dtypes=["float32"])
    (failure,) = (failure for failure in report.failures if failure.check == check)
    assert failure.bound is None
    assert "bit for bit" in failure.message
    assert failure.got == np.nextafter(np.float32(failure.expected), np.float32(-np.inf))
    assert "normal" not in {failure.check for failure in report.failures}


@pytest.mark.usefixtures("fake_gpu")
def test_the_sign_of_a_zero_counts_on_a_gpu_alone(plant: Callable[[Kernel], None]) -> None:
    """The BLAS library behind the CPU path may give a zero either sign.

    No tap reaches two thirds of the outputs of the case, which has no bias, so that these are zeros with any data.
    """

    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        correct(p, x, w, b, out)
        for part in (out.real, out.imag) if p.is_complex else ():
            np.copyto(part, -0.0, where=part == 0)

    plant(kernel)
    assert verify("cpu", filter="up_stride3_k1", dtypes=["complex64"]).ok
    failures = verify("gpu", filter="up_stride3_k1", dtypes=["complex64"]).failures
    assert "exact" in {failure.check for failure in failures}
    assert all("bit for bit" in failure.message for failure in failures)


NAMES = tuple(family.name for family in FAMILIES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_quick_run_reaches_every_family(arch: str) -> None:
    device = Device.from_arch(arch)
    has, lacking = families_of(device)
    assert {*has, *lacking} == set(NAMES)
    reached = {
        name for dtype, case in cases.quick_pairs(NUMBER_FORMATS) for name in families_that_take(case.at(dtype), device)
    }
    assert reached == set(has)


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_far_runs_every_family_with_64_bit_offsets(number_format: str) -> None:
    device = Device.from_arch("sm_90")
    runs = {name: case.at(number_format) for _, case, name in far_runs(cases.select(), number_format, NAMES, device)}
    taken = {name for case in cases.CASES for name in families_that_take(case.at(number_format), device)}
    assert set(runs) == taken - {"conv1d_skinny"}  # which refuses such arrays
    for family in FAMILIES:
        if family.name in runs:
            p = runs[family.name]
            of_gradient = WeightGradientProblem.of if family.kind == "weight_gradient" else BiasGradientProblem.of
            problem = p if family.kind == p.kind else of_gradient(p)
            assert kernel_of(family, problem, far_layout(problem), device)[1].index_bits == 64


def test_arrays_far_apart_do_not_meet() -> None:
    shapes = ((3, 4, 5), (7, 2, 3), (7,), (1, 9), (2, 3, 1))
    where = spread(shapes)
    taken: set[int] = set()
    for shape, offset, strides in zip(shapes, where.offsets, where.strides, strict=True):
        own = {offset + sum(map(operator.mul, index, strides)) for index in np.ndindex(*shape)}
        assert len(own) == np.prod(shape)
        assert taken.isdisjoint(own)
        assert offset % 8 == strides[0] % 8 == 0
        assert (shape[0] - 1) * strides[0] >= 2**31 or shape[0] == 1
        taken |= own
    assert min(taken) == 0
    assert max(taken) < where.size < 2**31 + 2**12


@pytest.mark.usefixtures("fake_gpu")
def test_what_far_needs_is_told_where_it_is_missing(plant: Callable[[Kernel], None]) -> None:
    plant(correct)
    report = verify("gpu", dtypes=["float32", "complex64"], family="conv_transpose1d_gather")
    assert report.skipped == {"far float32": "needs 8 GiB of free memory on the GPU, 1.0 GiB are free"}
    assert "not run: far float32: needs 8 GiB" in str(report)
    assert report.counts[FAR] == {"passed": 0, "failed": 0}
    every = verify("gpu", dtypes=["float32", "complex64"], family="conv_transpose1d_gather", quick=False)
    assert list(every.skipped) == ["far float32", "far complex64"]
    assert FAR not in verify("gpu", dtypes="float32", filter="up_k1").counts


@pytest.mark.parametrize(
    ("kernel", "macro", "values"),
    [
        ("conv1d_mma", "SEGMENT_MODE", "0123"),
        ("conv_transpose1d_mma", "SEGMENT_MODE", "0123"),
        ("conv1d_depthwise", "IS_SKIPPING", "01"),
        ("conv1d_depthwise", "IS_STRIDING", "01"),
        ("conv_transpose1d_depthwise", "IS_SKIPPING", "01"),
        ("conv1d_direct", "INDEX_BITS", ("32", "64")),
        ("conv1d_mma", "INDEX_BITS", ("32", "64")),
        ("conv1d_im2col", "INDEX_BITS", ("32", "64")),
        ("conv1d_im2col", "IS_SPLIT", "01"),
        ("pack_weight", "INDEX_BITS", ("32", "64")),
        ("pack_mma_weight", "INDEX_BITS", ("32", "64")),
    ],
)
def test_the_quick_run_reaches_every_mode(kernel: str, macro: str, values: Sequence[str]) -> None:
    device = Device.from_arch("sm_90")
    found = set()
    for number_format, case in cases.quick_pairs(NUMBER_FORMATS):
        p = case.at(number_format)
        for family in FORWARD_FAMILIES:
            plan = family.plan(p, Layout.contiguous(p), device) if family.kind == p.kind and not p.is_empty else None
            steps = plan.steps if isinstance(plan, Plan) else ()
            found |= {dict(step.config.macros)[macro] for step in steps if step.config.kernel == kernel}
    assert found == set(values)


def test_the_base_family_takes_every_case_and_comes_first() -> None:
    device = Device.from_arch("sm_90")
    for case in cases.CASES:
        p = case.problem
        names = families_that_take(p, device)
        if p.N and p.C_out:
            assert names[0] == {"conv1d": "conv1d_direct", "conv_transpose1d": "conv_transpose1d_gather"}[p.op]
            assert dispatch.choose(p, Layout.contiguous(p), device).family in names
        if 0 not in (p.N, p.C_in, p.C_out, p.L_in):
            assert {"weight_gradient_direct", "bias_gradient_rows"} <= set(names)


@pytest.mark.gpu
def test_families_run_on_the_kernels_themselves(launched: list[str]) -> None:
    """Each family by its name, counted."""
    report = verify("gpu", filter="hifigan_resblock", dtypes="float32")
    assert report.ok, str(report)
    runs = {name: count for name, count in report.family_runs.items() if count}
    device = runtime.current_gpu()
    assert set(runs) == set(families_that_take(cases.select("hifigan_resblock")[0].problem, device))
    assert {"conv1d_direct", "weight_gradient_direct"} <= set(runs) <= set(launched)
    assert set(runs.values()) == {1}
    assert f"{'conv1d_direct':<28}{1:>6}" in str(report).splitlines()
    assert report.to_dict()["family_runs"]["conv1d_direct"] == 1
    assert "conv1d_depthwise" in report.to_dict()["unreached_families"]  # which a filter may leave out


@pytest.mark.usefixtures("fake_gpu")
def test_a_family_that_no_case_reaches_fails_the_run(
    plant: Callable[[Kernel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(correct)
    monkeypatch.setattr(cases.table, "CASES", cases.select("up_k1"))
    monkeypatch.setattr(cases.table, "WIDE_CASES", ())
    report = verify("gpu")
    assert report.failures == ()
    assert not report.ok
    assert "conv1d_mma" in report.unreached
    assert str(report).splitlines()[-1].startswith("FAILED: no case reaches conv1d_col2im, ")
    assert f"{'conv1d_mma':<28}  NOT REACHED by any case" in str(report).splitlines()
    assert report.to_dict()["ok"] is False
    for restriction in ({"filter": "up_k1"}, {"dtypes": "float32"}, {"family": "conv_transpose1d_gather"}):
        assert verify("gpu", **restriction).ok


@pytest.mark.usefixtures("fake_gpu")
def test_what_an_architecture_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    (mma,) = (family for family in FORWARD_FAMILIES if family.name == "conv1d_mma")
    monkeypatch.setattr(type(mma), "configs", lambda *_: iter(()))
    report = verify("gpu", filter="up_k1", dtypes="float32")
    assert report.lacking == ("conv1d_mma",)
    assert "conv1d_mma" not in report.family_runs
    assert f"{'conv1d_mma':<28}  not on this architecture" in str(report).splitlines()


@pytest.mark.usefixtures("fake_gpu")
def test_one_family_alone() -> None:
    report = verify("gpu", family="conv1d_depthwise", dtypes="float32")
    assert report.ok
    assert {result.check for result in report.results} == {"families"}
    assert {result.family for result in report.results} == {"conv1d_depthwise"}
    device = Device.from_arch("sm_90")
    taken = {case.name for case in cases.select() if "conv1d_depthwise" in families_that_take(case.problem, device)}
    assert {result.case for result in report.results} == taken
    with pytest.raises(ValueError, match=r"^verify: family must name a kernel family .*, got 'fast'; this GPU has"):
        verify("gpu", family="fast")
    with pytest.raises(
        ValueError, match=r"^verify: no case of this filter and these dtypes reaches .* conv1d_depthwise$"
    ):
        verify("gpu", family="conv1d_depthwise", filter="up_k1")
    with pytest.raises(ValueError, match=r"got 'conv1d_direct'; there is none on the CPU$"):
        verify("cpu", family="conv1d_direct")


def test_a_failure_names_the_element_and_its_taps(plant: Callable[[Kernel], None]) -> None:
    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        correct(p, x, w, b, out)
        if (p.N, p.C_out) == (2, 13):
            out[1, 4, 0] += 1
            out[1, 7, 64] -= 1

    plant(kernel)
    report = verify("cpu", filter="depthwise", dtypes=["float64"])
    failure = next(failure for failure in report.failures if (failure.case, failure.check) == ("depthwise", "exact"))
    (case,) = (case for case in cases.CASES if case.name == "depthwise")
    data = cases.exact_data(case.at("float64"), seed=0)
    assert failure.index == (1, 4, 0)
    assert failure.bad == 2
    assert failure.got == failure.expected + 1
    assert failure.bound is None
    assert failure.problem == str(case.at("float64"))
    # K = 3 and padding 1: tap 0 of the first output falls into the padding.
    assert [(tap.c_in, tap.k, tap.l_in) for tap in failure.taps] == [(0, 1, 0), (0, 2, 1)]
    assert [tap.weight for tap in failure.taps] == data.weight[4, 0, 1:].tolist()
    assert [tap.input for tap in failure.taps] == data.input[1, 4, :2].tolist()
    assert data.bias[4] + sum(tap.weight * tap.input for tap in failure.taps) == failure.expected
    text = str(failure)
    assert "depthwise [float64] exact" in text
    assert "(1, 4, 0)" in text
    assert f"weight[c_in=0, k=2] = {data.weight[4, 0, 2]!r}".replace("np.float64(", "").replace(")", "") in text

    normal = next(failure for failure in report.failures if (failure.case, failure.check) == ("depthwise", "normal"))
    assert normal.index == (1, 4, 0)
    assert 0 < normal.bound < 1e-12
    assert abs(normal.got - normal.expected - 1) < 1e-12


def test_taps_of_a_transposed_element_are_those_of_its_phase(plant: Callable[[Kernel], None]) -> None:
    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        correct(p, x, w, b, out)
        if p.transposed:
            out[..., 2, 33] = 1000

    plant(kernel)
    report = verify("cpu", filter="hifigan_up", dtypes=["complex64"])
    failure = next(failure for failure in report.failures if failure.check == "exact")
    assert failure.index == (0, 2, 33)
    # l_out = l_in*8 - 4 + k with 24 input channels: k = 5 at l_in = 4 and k = 13 at l_in = 3, the first 8 of 48.
    assert [(tap.c_in, tap.k, tap.l_in) for tap in failure.taps] == [
        (c_in, k, l_in) for c_in in range(4) for k, l_in in ((5, 4), (13, 3))
    ]
    assert failure.num_taps == 48
    assert len(failure.taps) == MAX_TAPS
    assert isinstance(failure.got, complex)


def test_a_call_that_raises_is_a_failure_and_not_the_end(plant: Callable[[Kernel], None]) -> None:
    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        if p.stride == 2:
            raise ZeroDivisionError("planted")
        correct(p, x, w, b, out)

    plant(kernel)
    report = verify("cpu", filter="stride", dtypes=["float32"])
    failures = [failure for failure in report.failures if failure.case == "docs_example"]
    assert {failure.check for failure in failures} == {check.name for check in CHECKS} - {"groups", "lengths", "fft"}
    assert {failure.message for failure in failures} == {"raised ZeroDivisionError('planted')"}
    assert "in kernel" in failures[0].traceback
    assert {"stride_equals_k", "stride7_pair"}.isdisjoint({failure.case for failure in report.failures})
    assert "planted" in report.to_junit()
    assert "and " in str(report)
    assert "more failures" in str(report)


def test_report_as_json(plant: Callable[[Kernel], None]) -> None:
    plant(nan_in_the_last_element)
    report = verify("cpu", filter="unbatched", dtypes=["float32", "complex128"], seed=7)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["ok"] is False
    assert found["seed"] == 7
    assert found["dtypes"] == ["float32", "complex128"]
    assert found["cases"] == 4
    assert found["checks"] == len(report.results)
    assert found["versions"]["gpuconv"] == gpuconv.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["elapsed_s"] > 0
    assert found["counts"]["exact"] == {"passed": 0, "failed": 8}
    real = next(failure for failure in found["failures"] if failure["check"] == "exact")
    assert real["got"] == "nan"
    assert real["index"] == [7, 20]
    complex_ = next(failure for failure in found["failures"] if failure["dtype"] == "complex128")
    assert complex_["got"][0] == "nan"
    assert len(complex_["taps"][0]["weight"]) == 2


def test_report_as_junit(plant: Callable[[Kernel], None]) -> None:
    plant(without_bias)
    report = verify("cpu", filter="unbatched", dtypes=["float32", "float64"])
    root = ElementTree.fromstring(report.to_junit())
    (suite,) = root
    tests = suite.findall("testcase")
    assert root.tag == "testsuites"
    assert suite.get("tests") == str(len(tests)) == "8"
    # Even the case without bias fails, in the check that adds one.
    assert suite.get("failures") == str(len(suite.findall("testcase/failure"))) == "8"
    assert {test.get("classname") for test in tests} == {"gpuconv.verify.float32", "gpuconv.verify.float64"}
    failure = tests[0].find("failure")
    assert failure is not None
    assert "exact: must equal the reference" in str(failure.get("message"))
    assert "fed by" in str(failure.text)
    properties = {element.get("name"): element.get("value") for element in suite.findall("properties/property")}
    assert properties["device"] == report.device
    assert properties["seed"] == "0"


def test_report_of_success() -> None:
    report = verify("cpu", filter="unbatched", dtypes="float32")
    lines = str(report).splitlines()
    assert lines[1].startswith("4 cases, float32; seed 0; ")
    assert "selection" not in str(report)
    one = str(verify("cpu", filter="docs_example", dtypes="float32"))
    assert one.splitlines()[1].startswith("1 case, float32; ")
    assert len(lines) <= 26
    assert lines[0].startswith(f"gpuconv {gpuconv.__version__} on CPU")
    assert lines[-1] == "all checks passed"
    assert report.to_dict()["failures"] == []
    (suite,) = ElementTree.fromstring(report.to_junit())
    assert suite.get("failures") == "0"
    assert suite.find("testcase/failure") is None


def test_the_quick_run_is_a_selection() -> None:
    report = verify("cpu", dtypes=["float32", "complex64"])
    assert report.ok, str(report)
    chosen = {(case.name, dtype) for dtype, case in cases.quick_pairs(["float32", "complex64"])}
    assert {(result.case, result.dtype) for result in report.results} == chosen
    assert all(count["passed"] > 0 for count in report.counts.values())
    total = 2 * len(cases.select())
    told = f"a selection: {len(chosen)} of {total} pairs of case and dtype; --all runs them all"
    assert told in str(report).splitlines()
    found = report.to_dict()
    assert (found["pairs"], found["total_pairs"]) == (len(chosen), total)


def test_quick_false_runs_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.table, "CASES", cases.CASES[:4])
    monkeypatch.setattr(cases.table, "WIDE_CASES", ())
    report = verify("cpu", dtypes=["float32", "float64"], quick=False)
    assert report.pairs == report.total == 8
    assert verify("cpu", dtypes=["float32", "float64"]).pairs == 4


def test_the_worst_element_is_told(plant: Callable[[Kernel], None]) -> None:
    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        exact = reference.compute(p, x, w, b)
        out[...] = exact
        with np.errstate(invalid="ignore"):
            out[..., -1] += 0.75 * reference.error_bound(p, x, w, b, exact)[..., -1]

    plant(kernel)
    report = verify("cpu", filter="sincnet", dtypes="float32")
    worst = report.worst
    assert worst is not None
    assert worst.check in (*cases.RANDOM_KINDS, "batch", "chunks", "gradients")
    assert worst.worst == pytest.approx(0.75, rel=0.05)
    where = f"sincnet [float32] {worst.check}"
    assert f"worst element: {worst.worst:.3g} of its error bound, in {where}" in str(report).splitlines()
    assert report.to_dict()["worst"]["fraction_of_bound"] == worst.worst
    assert all(result.worst is None for result in report.results if result.check == "exact")


def test_every_check_is_documented() -> None:
    assert verify.__doc__ is not None
    documented = re.findall(r"^ {8}(\w+)  +\S", verify.__doc__, re.MULTILINE)
    assert documented == [*(check.name for check in CHECKS), BY_FAMILY, FAR]


def test_the_seed_decides_the_data(plant: Callable[[Kernel], None]) -> None:
    seen: list[Array] = []

    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        seen.append(w.copy())
        correct(p, x, w, b, out)

    plant(kernel)
    runs = []
    for seed in (3, 3, 4):
        seen.clear()
        verify("cpu", filter="k_equals_input", dtypes=["float32"], seed=seed)
        runs.append(list(seen))
    assert all((a == b).all() for a, b in zip(runs[0], runs[1], strict=True))
    assert any((a != b).any() for a, b in zip(runs[0], runs[2], strict=True))


def test_outputs_are_poisoned(plant: Callable[[Kernel], None]) -> None:
    """Every output that a check hands over is NaN (of integers 1) all over; the one that `repeat` allocates is not."""
    clean = []

    def kernel(p: ConvProblem, x: Array, w: Array, b: Array | None, out: Array) -> None:
        clean.append(not np.array_equal(out, unset(out.shape, out.dtype.name), equal_nan=True))
        correct(p, x, w, b, out)

    plant(kernel)
    verify("cpu", filter="k64_even", dtypes=["float32"])
    assert len(clean) > 20
    assert sum(clean) <= 2  # k64_even and up_k64_even: one allocated output each


def test_progress() -> None:
    calls: list[tuple[int, int, str]] = []
    verify("cpu", filter="up_k", dtypes=["float32", "float64"], progress=lambda *args: calls.append(args))
    assert [call[0] for call in calls] == list(range(len(calls)))
    assert {call[1] for call in calls} == {len(calls) - 1}
    assert calls[-1][2] == "up_k64_even float64"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, 'verify: device must be "auto", "gpu" or "cpu", got \'tpu\''),
        ({"device": "cpu", "dtypes": ["float32", "int8"]}, "verify: dtypes must be among float16, .*, got 'int8'"),
        ({"device": "cpu", "filter": "nothing"}, "filter 'nothing' matches no case"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(**arguments)


@pytest.mark.parametrize(
    ("answer", "driver", "message"),
    [
        (ModuleNotFoundError("No module named 'cupy'"), 13000, "CuPy is missing"),
        (RuntimeError("cudaErrorInsufficientDriver: insufficient"), 0, "no NVIDIA driver is loaded here"),
        (
            RuntimeError("cudaErrorInsufficientDriver: insufficient"),
            12080,
            "supports CUDA 12.8, CuPy was built for CUDA 13",
        ),
        (RuntimeError("cudaErrorNoDevice: none"), 13000, "sees no device; CUDA_VISIBLE_DEVICES is '7'"),
        (RuntimeError("cudaErrorUnknown"), 13000, "does not answer (cudaErrorUnknown)"),
        (0, 13000, "sees no device; CUDA_VISIBLE_DEVICES is '7'"),
    ],
)
def test_what_is_missing_of_a_gpu(
    answer: Exception | int, driver: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device_count() -> int:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(runtime, "device_count", device_count)
    monkeypatch.setattr(runtime, "cuda_versions", lambda: (driver, 13020))
    assert message in str(missing_gpu())
    with pytest.raises(GpuUnavailableError, match=re.escape(message)):
        verify("gpu", filter="k1", dtypes=["float32"])
    assert verify("auto", filter="k1", dtypes=["float32"]).device.startswith("CPU")


@pytest.mark.usefixtures("fake_gpu")
def test_a_missing_cufft_is_told_and_a_broken_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("there is no cuFFT")

    def fails(*_: Any) -> Any:
        raise RuntimeError("CUFFT_INTERNAL_ERROR")

    monkeypatch.setattr(runtime, "fft_module", missing)
    report = verify("gpu", filter="stride2_k1", dtypes=["float32"])
    assert report.skipped == {"fft": "there is no cuFFT"}
    assert "not run: fft: there is no cuFFT" in str(report)
    assert "fft" not in {result.check for result in report.results}
    broken = SimpleNamespace(rfft=fails, irfft=fails)
    monkeypatch.setattr(runtime, "fft_module", lambda: broken)
    monkeypatch.setattr(fft.executor, "_of_numpy", lambda: broken)  # the fake GPU's arrays are NumPy's
    report = verify("gpu", filter="stride2_k1", dtypes=["float32"])
    assert not report.skipped
    (failure,) = (failure for failure in report.failures if failure.check == "fft")
    assert failure.message == "raised RuntimeError('CUFFT_INTERNAL_ERROR')"
    assert not report.ok


@pytest.mark.usefixtures("fake_gpu")
def test_auto_takes_a_gpu_that_answers() -> None:
    assert verify("auto", filter="stride2_k1", dtypes=["float32"]).device.startswith("GPU")


def test_bfloat16_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    report = verify("cpu", filter="no_samples")
    assert "ml_dtypes" in report.skipped["bfloat16"]
    assert "bfloat16" not in {result.dtype for result in report.results}
    assert "not run: bfloat16" in str(report)
    with pytest.raises(ModuleNotFoundError, match="ml_dtypes"):
        verify("cpu", filter="no_samples", dtypes=["bfloat16"])


def test_same_bits() -> None:
    a = np.array([1.0, 0.0, np.nan, 2.0], np.float32)
    b = np.array([1.0, -0.0, np.nan, 3.0], np.float32)
    assert same_bits(a, b).tolist() == [True, False, True, False]
    assert same_bits(a[::-2], b[::-2]).tolist() == [False, False]
    assert same_bits(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0, 3)
    with pytest.raises(ValueError, match="float64"):
        same_bits(a, a.astype(np.float64))
