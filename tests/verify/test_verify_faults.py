"""One fault in the text of each kernel, and `verify` on a GPU, which must catch it and say which family has it.

The tests that run kernels need a GPU, or `python -m tests.gpu_on_cpu python -m pytest -m gpu` in front of this file's
name. No fault reads or writes outside an array, so a GPU survives them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from gpuconv import caches, calls, cases, runtime, source
from gpuconv.cases import Case
from gpuconv.checks import Target
from gpuconv.checks.families import families_of, families_that_take, far_runs, run_far
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import FAMILIES
from gpuconv.report import BY_FAMILY, Report
from gpuconv.verify import verify
from tests.plans import forget_kernels

EQUAL = "must equal the reference, bit for bit"
BOUND = "must lie within the error bound of the reference"
NONFINITE = f"{BOUND}, on nonfinite data"
STRIDED = "must equal the reference, on strided arrays, bit for bit"
SAME = "must equal the base family, bit for bit"
FUSED = "must fuse within the error bound of the reference"


@dataclass(frozen=True)
class Fault:
    """A fault in the text of a kernel, and the run that meets it.

    Attributes:
        kernel: whose assembled text has `right`, once.
        right: what the text says.
        wrong: what it says instead.
        family: the kernel family that is run.
        case: the name of the case that it is run on.
        dtype: the number format.
        says: what the failure says behind the family's name.
        leaves_nan: an element keeps the NaN with which every output starts.
    """

    kernel: str
    right: str
    wrong: str
    family: str
    case: str
    dtype: str = "float32"
    says: str = EQUAL
    leaves_nan: bool = False

    @property
    def the_case(self) -> Case:
        (case,) = cases.select(self.case)
        return case

    def run(self) -> Report:
        return verify("gpu", family=self.family, filter=self.case, dtypes=self.dtype)


BIAS_OF_BASE = "finish(sum, epilogue.channel(row.c_out), output + place)"
NO_BIAS = "finish(sum, epilogue.channel(row.c_out, scalar::zero()), output + place)"
LAST_TAP, LAST_BUT_ONE = "i < taps.numbers.end; ++i", "i + 1 < taps.numbers.end; ++i"
FALLBACK, NO_FALLBACK = "#define NAN_FALLBACK 1", "#define NAN_FALLBACK 0"

FAULTS: Mapping[str, Fault] = {
    # -- a tap, a position or a slice is left out
    "conv1d_direct drops the last tap": Fault(
        "conv1d_direct", LAST_TAP, LAST_BUT_ONE, "conv1d_direct", "dilation_spans_input"
    ),
    "conv1d_tail drops the last tap": Fault(
        "conv1d_tail",
        "if (tap >= 0 && tap < slide.taps)",
        "if (tap >= 0 && tap + 1 < slide.taps)",
        "conv1d_tail",
        "one_channel",
    ),
    "pack_weight drops the last tap": Fault(
        "pack_weight",
        "from.has(tap) ? scalar::load(",
        "tap + 1 < p.taps && from.has(tap) ? scalar::load(",
        "conv1d_tiled",
        "padding_same_strided_even",
    ),
    "pack_mma_weight drops the first tap": Fault(
        "pack_mma_weight", "from.has(tap) ? shared[", "tap > 0 && from.has(tap) ? shared[",
        "conv1d_mma", "channels_17_33", "float16",
    ),
    "blocks that pack their weights drop the first tap": Fault(
        "conv1d_mma",
        "exists ? from[(unit * kUnit + e)",
        "exists && tap > 0 ? from[(unit * kUnit + e)",
        "conv1d_mma", "mimi_stream", "float16",
    ),
    "pack_im2col_weight drops the first tap": Fault(
        "pack_im2col_weight",
        "exists && first + e >= begin ?",
        "exists && first + e >= begin && first + e > 0 ?",
        "conv1d_im2col",
        "enformer_stem",
        "float16",
    ),
    "pack_col2im_weight drops the first tap": Fault(
        "pack_col2im_weight",
        "tap >= run * p.run_taps;",
        "tap >= run * p.run_taps && tap > 0;",
        "conv1d_col2im",
        "bpnet_head_49_5",
        "float16",
    ),
    "conv_transpose1d_col2im drops the last run but one": Fault(
        "conv_transpose1d_col2im",
        "run + 1 < runs; ++run",
        "run + 2 < runs; ++run",
        "conv_transpose1d_col2im",
        "up_channels_52_4",
        "float16",
    ),
    "weight_gradient_mma drops the last position": Fault(
        "weight_gradient_mma",
        "n + sample < s.n_end ? s.l_end : 0;",
        "n + sample < s.n_end ? s.l_end - COARSE_ALIGN : 0;",
        "weight_gradient_mma",
        "mimi_stream",
        "float16",
    ),
    "bias_gradient_rows drops the last position": Fault(
        "bias_gradient_rows",
        "q < terms; q += BLOCK_SIZE",
        "q + 1 < terms; q += BLOCK_SIZE",
        "bias_gradient_rows",
        "dilation_spans_input",
    ),
    "sum_slices drops the last slice": Fault(
        "sum_slices",
        "s < p.slices; s += p.ways",
        "s + 1 < p.slices; s += p.ways",
        "weight_gradient_direct",
        "groups_to_one_each",
    ),
    "conv1d_edges drops the last tap": Fault(
        "conv1d_edges", LAST_TAP, LAST_BUT_ONE, "conv1d_narrow", "reflect_same"
    ),
    # -- a wrong offset at an edge
    "conv1d_direct takes the last position for padding": Fault(
        "conv1d_direct",
        "ceil_div(L - first,",
        "ceil_div(L - 1 - first,",
        "conv1d_direct",
        "dilation_spans_input",
    ),
    "conv1d_skinny takes the last position for padding": Fault(
        "conv1d_skinny", "? p.L_in : 0", "? p.L_in - 1 : 0", "conv1d_skinny", "length1_padded"
    ),
    "conv1d_stem takes the first position for padding": Fault(
        "conv1d_stem",
        "if (source.exists && n_begin",
        "if (source.exists && source.index > 0 && n_begin",
        "conv1d_stem",
        "padding_exceeds_input",
    ),
    "conv1d_im2col takes the last position for padding": Fault(
        "conv1d_im2col",
        "const bool exists = is_read && source.exists;",
        "const bool exists = is_read && source.exists && source.index + 1 < tile.L_in;",
        "conv1d_im2col",
        "enformer_stem",
        "float16",
    ),
    "conv_transpose1d_im2col takes the last position for padding": Fault(
        "conv_transpose1d_im2col",
        "const bool exists = is_read && source.exists;",
        "const bool exists = is_read && source.exists && source.index + 1 < tile.L_in;",
        "conv_transpose1d_im2col",
        "up_long_kernel",
        "float16",
    ),
    "weight_gradient_direct begins a position late": Fault(
        "weight_gradient_direct",
        "first < 0 ? ceil_div(-first, step) : 0",
        "first < 0 ? ceil_div(-first, step) : 1",
        "weight_gradient_direct",
        "dilation_spans_input",
    ),
    "weight_gradient_tiled takes the first position for padding": Fault(
        "weight_gradient_tiled",
        "if (source.exists) {",
        "if (source.exists && source.index > 0) {",
        "weight_gradient_tiled",
        "padding_exceeds_input",
    ),
    # -- no bias
    "conv1d_direct adds no bias": Fault(
        "conv1d_direct", BIAS_OF_BASE, NO_BIAS, "conv1d_direct", "dilation_spans_input"
    ),
    "conv_transpose1d_gather adds no bias": Fault(
        "conv_transpose1d_gather", BIAS_OF_BASE, NO_BIAS, "conv_transpose1d_gather", "up_dilation4_stride6"
    ),
    "conv1d_narrow adds no bias": Fault(
        "conv1d_narrow",
        "epilogue.channel(g * p.C_out_g + row), place)",
        "epilogue.channel(g * p.C_out_g + row, scalar::zero()), place)",
        "conv1d_narrow",
        "dilation_spans_input",
    ),
    "conv1d_mma adds no bias": Fault(
        "conv1d_mma",
        "kIsFused ? scalar::zero()",
        "true ? scalar::zero()",
        "conv1d_mma",
        "mimi_stream",
        "float16",
    ),
    # -- something is not fused
    "conv1d_direct adds no residual": Fault(
        "conv1d_direct", "value = add(value, scalar::load(", "add(value, scalar::load(", "conv1d_direct",
        "dilation_spans_input", says=FUSED,
    ),
    "conv1d_mma finishes one half of its rows": Fault(
        "conv1d_mma", "const int half = e / 2;", "const int half = 0;", "conv1d_mma", "mimi_stream", "float16",
        says=FUSED,
    ),
    "activate copies the input": Fault(
        "activate", "activated[i] = input_activation.channel(c)(sample);", "activated[i] = sample;", "conv1d_tiled",
        "padding_same_strided_even", says=FUSED,
    ),
    # -- an element is never written
    "conv1d_tiled leaves the last column": Fault(
        "conv1d_tiled",
        "lane + 32 * j >= tile.columns) l_out[j]",
        "lane + 32 * j >= tile.columns - 1) l_out[j]",
        "conv1d_tiled",
        "padding_same_strided_even",
        leaves_nan=True,
    ),
    "conv1d_depthwise leaves the last position": Fault(
        "conv1d_depthwise",
        "if (l_out < p.L_out) {\n                storage_t* const place_out",
        "if (l_out + 1 < p.L_out) {\n                storage_t* const place_out",
        "conv1d_depthwise",
        "depthwise_strided_dilated",
        leaves_nan=True,
    ),
    "conv_transpose1d_tail leaves the last position": Fault(
        "conv_transpose1d_tail",
        "if (is_index(l_out, p.L_out)) *place",
        "if (is_index(l_out, p.L_out - 1)) *place",
        "conv_transpose1d_tail",
        "up_length127",
        leaves_nan=True,
    ),
    "weight_gradient_pairs leaves the last tap": Fault(
        "weight_gradient_pairs",
        "if (first_tap + j >= 0 && first_tap + j < p.K)",
        "if (first_tap + j >= 0 && first_tap + j < p.K - 1)",
        "weight_gradient_pairs",
        "padding_exceeds_input",
        leaves_nan=True,
    ),
    # -- a wrong phase
    "conv_transpose1d_gather takes another phase's taps": Fault(
        "conv_transpose1d_gather",
        "taps.k_first = t_gcd % p.tap_step * p.phase_inverse % p.tap_step;",
        "taps.k_first = t_gcd % p.tap_step;",
        "conv_transpose1d_gather",
        "up_dilation4_stride6",
    ),
    "conv_transpose1d_phases takes another phase's input": Fault(
        "conv_transpose1d_phases",
        "uindex_t(quotient % tap_step) * uindex_t(p.phase_inverse) % tap_step;",
        "quotient % tap_step;",
        "conv_transpose1d_phases",
        "up_dilation4_stride6",
    ),
    "conv_transpose1d_depthwise takes another phase's taps": Fault(
        "conv_transpose1d_depthwise",
        "k = t_gcd % p.tap_step * p.phase_inverse",
        "k = (t_gcd + 1) % p.tap_step * p.phase_inverse",
        "conv_transpose1d_depthwise",
        "up_depthwise_dilated",
    ),
    "conv_transpose1d_mma stores the phases in reverse": Fault(
        "conv_transpose1d_mma",
        "found.shift = phase;",
        "found.shift = p.stride - 1 - phase;",
        "conv_transpose1d_mma",
        "up_stride2_k4",
        "float16",
    ),
    "pack_weight takes another phase's taps": Fault(
        "pack_weight",
        "k_first = quotient % p.tap_step * p.phase_inverse % p.tap_step;",
        "k_first = quotient % p.tap_step;",
        "conv_transpose1d_phases",
        "up_dilation4_stride6",
    ),
    # -- an infinity times the zero that stands for padding stays in the sum
    "conv1d_skinny keeps a NaN": Fault(
        "conv1d_skinny", FALLBACK, NO_FALLBACK, "conv1d_skinny", "encodec_down", says=NONFINITE
    ),
    "weight_gradient_pairs keeps a NaN": Fault(
        "weight_gradient_pairs",
        FALLBACK,
        NO_FALLBACK,
        "weight_gradient_pairs",
        "padding_exceeds_input",
        says=NONFINITE,
    ),
    "weight_gradient_tiled keeps a NaN": Fault(
        "weight_gradient_tiled",
        FALLBACK,
        NO_FALLBACK,
        "weight_gradient_tiled",
        "padding_exceeds_input",
        says=NONFINITE,
    ),
    "weight_gradient_mma keeps a NaN": Fault(
        "weight_gradient_mma",
        FALLBACK,
        NO_FALLBACK,
        "weight_gradient_mma",
        "diffusion_policy_mid",
        "float16",
        says=NONFINITE,
    ),
    "conv1d_mma keeps a NaN": Fault(
        "conv1d_mma", FALLBACK, NO_FALLBACK, "conv1d_mma", "whisper_conv1", "float16", says=NONFINITE
    ),
    "conv1d_im2col keeps a NaN": Fault(
        "conv1d_im2col", FALLBACK, NO_FALLBACK, "conv1d_im2col", "enformer_stem", "float16", says=NONFINITE
    ),
    "conv1d_col2im keeps a NaN": Fault(
        "conv1d_col2im", FALLBACK, NO_FALLBACK, "conv1d_col2im", "bpnet_head_49_5", "float16", says=NONFINITE
    ),
    "conv1d_toeplitz keeps a NaN": Fault(
        "conv1d_toeplitz", FALLBACK, NO_FALLBACK, "conv1d_toeplitz", "quartznet_dw", "float16", says=NONFINITE
    ),
    "conv1d_tail keeps a NaN": Fault(
        "conv1d_tail", FALLBACK, NO_FALLBACK, "conv1d_tail", "one_channel", says=NONFINITE
    ),
    "conv1d_tiled keeps a NaN": Fault(
        "conv1d_tiled",
        FALLBACK,
        NO_FALLBACK,
        "conv1d_tiled",
        "padding_same_strided_even",
        says=NONFINITE,
    ),
    "conv_transpose1d_depthwise keeps a NaN": Fault(
        "conv_transpose1d_depthwise",
        FALLBACK,
        NO_FALLBACK,
        "conv_transpose1d_depthwise",
        "styletts2_pool",
        says=NONFINITE,
    ),
    "conv1d_stem keeps a NaN": Fault(
        "conv1d_stem", FALLBACK, NO_FALLBACK, "conv1d_stem", "padding_exceeds_input", says=NONFINITE
    ),
    # -- arrays that are not contiguous
    "conv1d_direct takes weights for contiguous": Fault(
        "conv1d_direct",
        "w += offset_if_used(0, taps.k_step, p.weight_stride_k);",
        "w += p.weight_stride_k == 1 ? taps.k_step : 0;",
        "conv1d_direct",
        "dilation_spans_input",
        says=STRIDED,
    ),
    # -- right with 32-bit indices
    "conv1d_direct loses the upper bits of a position": Fault(
        "conv1d_direct",
        "l_first = l_out * p.stride - p.padding_left;",
        "l_first = int(l_out * p.stride - p.padding_left);",
        "conv1d_direct",
        "wide_stem",
    ),
    # -- right where the terms are not cut into segments
    "conv_transpose1d_mma leaves out the last segment": Fault(
        "conv_transpose1d_mma",
        "segment < window.segments; ++segment",
        "segment + 1 < window.segments; ++segment",
        "conv_transpose1d_mma",
        "up_dense_long_sum",
        "float16",
    ),
    # -- right on integers
    "conv1d_direct sums from the last channel to the first": Fault(
        "conv1d_direct",
        "index_t c_in = 0; c_in < p.C_in_g; ++c_in",
        "index_t c_in = p.C_in_g - 1; c_in >= 0; --c_in",
        "conv1d_tiled",
        "padding_same_strided_even",
        says=SAME,
    ),
    "pack_mma_weight loses the low bits": Fault(
        "pack_mma_weight",
        "packed.small = storage_t(lo);",
        "packed.small = storage_t(0.0f);",
        "conv1d_mma",
        "channels_66_48",
        says=BOUND,
    ),
}  # fmt: skip

# Only gradients with respect to the input run this kernel, behind any family. The checks of families by their names
# compute none, so that this fault has a test of its own.
FOLD = Fault(
    "conv_transpose1d_fold",
    "&& l < padded_end) {",
    "&& l + 1 < padded_end) {",
    "conv_transpose1d_gather",
    "reflect_same",
    says="the gradient with respect to input must equal the reference, bit for bit",
)

# Only calls with lengths run these kernels, behind any family, which checks of families by their names do not make.
LENGTHS = {
    "conv1d_ends leaves an output that reads behind the end": Fault(
        "conv1d_ends",
        "last < 0 ? 0 : last / p.stride + 1",
        "last < 0 ? 0 : last / p.stride + 2",
        "conv1d_depthwise",
        "circular_depthwise",
    ),
    "conv_transpose1d_ends leaves an output that reads behind the end": Fault(
        "conv_transpose1d_ends",
        "max_index(sample.L_in * p.stride - p.padding_left, 0)",
        "max_index((sample.L_in + 1) * p.stride - p.padding_left, 0)",
        "conv_transpose1d_phases",
        "up_dense_dilation3",
        "float64",
    ),
    "write_samples shortens the rows": Fault(
        "write_samples",
        "= p.values[i];",
        "= max_index(p.values[i] - 1, 0);",
        "conv1d_depthwise",
        "circular_depthwise",
    ),
}

# `verify` runs no streams; tests/api/test_stream.py and tests/kernels/test_windows.py have the tests of these kernels.
NOT_RUN = {"append_samples", "conv1d_depthwise_push"}


def test_every_kernel_and_every_family_has_a_fault() -> None:
    kernels = {path.stem for path in source.directory().glob("*.cu")}
    assert {fault.kernel for fault in (*FAULTS.values(), *LENGTHS.values(), FOLD)} == kernels - NOT_RUN
    assert {fault.family for fault in FAULTS.values()} == {f.name for f in FAMILIES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_takes_the_cases(arch: str) -> None:
    """So each of these tests can run on any GPU, except for what its tensor cores lack."""
    device = Device.from_arch(arch)
    refused = [
        name
        for name, fault in FAULTS.items()
        if fault.family not in families_that_take(fault.the_case.at(fault.dtype), device)
    ]
    assert refused == (["pack_mma_weight loses the low bits"] if arch == "sm_75" else [])
    assert families_of(device)[1] == ()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Fault], None]]:
    """Puts a fault into its kernel until the test ends. The process forgets its kernels and plans before and after."""
    assemble = source.assemble

    def spoil(fault: Fault) -> None:
        def spoilt(kernel: str, macros: Mapping[str, str]) -> str:
            text = assemble(kernel, macros)
            if kernel != fault.kernel:
                return text
            assert text.count(fault.right) == 1
            return text.replace(fault.right, fault.wrong)

        monkeypatch.setattr(source, "assemble", spoilt)
        forget()

    yield spoil
    monkeypatch.undo()
    forget()


def forget() -> None:
    """Let go of the kernels and of the plans that hold them."""
    forget_kernels()
    with caches.LOCK:
        calls._EXECUTORS.clear()


def test_the_kernels_have_the_text_that_faults_replace() -> None:
    """Once each, on every machine: the faults themselves need a GPU."""
    for name, fault in {**FAULTS, "fold": FOLD}.items():
        assert source.inlined(f"{fault.kernel}.cu").count(fault.right) == 1, name


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAULTS)
def test_verify_catches(name: str, plant: Callable[[Fault], None]) -> None:
    fault = FAULTS[name]
    if fault.family not in families_that_take(fault.the_case.at(fault.dtype), runtime.current_gpu()):
        with pytest.raises(ValueError, match=f"reaches the kernel family {fault.family}$"):
            fault.run()
        return
    report = fault.run()
    assert report.ok, str(report)
    assert report.family_runs[fault.family] == len(report.results) == 1

    plant(fault)
    report = fault.run()
    assert not report.ok
    (failure,) = report.failures
    assert (failure.case, failure.dtype, failure.check) == (fault.case, fault.dtype, BY_FAMILY)
    assert failure.message.startswith(f"{fault.family} {fault.says}")
    assert failure.got is not None
    assert np.isnan(failure.got) == (fault.leaves_nan or fault.says == NONFINITE)
    told = str(report)
    assert "FAILED" in told
    assert f"{fault.case} [{fault.dtype}]" in told
    assert f"{fault.family} {fault.says}" in told


@pytest.mark.gpu
def test_verify_catches_a_position_that_is_not_folded(plant: Callable[[Fault], None]) -> None:
    assert verify("gpu", filter=FOLD.case, dtypes=FOLD.dtype).ok
    plant(FOLD)
    failures = {failure.check: failure for failure in verify("gpu", filter=FOLD.case, dtypes=FOLD.dtype).failures}
    assert set(failures) == {"adjoint", "gradients"}
    assert failures["gradients"].message == FOLD.says


@pytest.mark.gpu
@pytest.mark.parametrize("name", LENGTHS)
def test_verify_catches_a_sample_that_ends_elsewhere(name: str, plant: Callable[[Fault], None]) -> None:
    fault = LENGTHS[name]
    report = verify("gpu", filter=fault.case, dtypes=fault.dtype)
    assert report.ok, str(report)
    assert report.counts["lengths"]["passed"] == 1
    plant(fault)
    assert {failure.check for failure in verify("gpu", filter=fault.case, dtypes=fault.dtype).failures} == {"lengths"}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "offset", "family"),
    [
        ("conv1d_direct", "n * p.input_stride_n", "conv1d_direct"),
        ("conv1d_direct", "c_out * p.weight_stride_out", "conv1d_direct"),
        ("conv1d_direct", "n * p.output_stride_n", "conv1d_direct"),
        ("sum_slices", "i0 * p.result_stride_0", "weight_gradient_direct"),
    ],
)
def test_far_catches_an_offset_that_loses_its_upper_bits(
    kernel: str, offset: str, family: str, plant: Callable[[Fault], None]
) -> None:
    """The faulty offsets lie in the same buffer, so nothing but the numbers is wrong."""
    gpu = Target(on_gpu=True)
    device = gpu.device()
    assert device is not None
    ((dtype, case, _),) = far_runs(cases.select(), "float16", (family,), device)
    assert run_far(case, dtype, gpu, 0, family).failure is None
    plant(Fault(kernel, offset, f"({offset} & 0x7fffffff)", family, case.name))
    failure = run_far(case, dtype, gpu, 0, family).failure
    assert failure is not None
    assert (
        failure.message == f"{family} must equal the reference, on arrays that reach beyond 2**31 elements, bit for bit"
    )


@pytest.mark.gpu
def test_a_run_of_all_families_meets_a_fault_in_the_base_kernel(plant: Callable[[Fault], None]) -> None:
    """Fails if only the family that dispatch prefers is run, which here is another."""
    fault = FAULTS["conv1d_direct drops the last tap"]
    plant(fault)
    report = verify("gpu", filter=fault.case, dtypes=fault.dtype)
    assert {failure.check for failure in report.failures} == {BY_FAMILY, "integers"}  # which the base kernel convolves
    assert f"conv1d_direct {EQUAL}" in [failure.message for failure in report.failures]
    assert report.family_runs["conv1d_direct"] == 1
    assert sum(report.family_runs.values()) > 1
