"""`verify`: does this machine compute the right numbers? Runs the case table and checks the promises of gpuconv."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from . import cases
from .cases import FORMATS
from .checks import CHECKS, Target, run_checks
from .gpus import GpuUnavailableError, missing_gpu
from .problem import numpy_dtype
from .report import Report, Result

DeviceName: TypeAlias = Literal["auto", "gpu", "cpu"]
Progress: TypeAlias = Callable[[int, int, str], None]


def verify(
    device: DeviceName = "auto",
    *,
    filter: str | None = None,
    seed: int = 0,
    dtypes: str | Sequence[str] | None = None,
    quick: bool = True,
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
        dtypes: one name or several in `gpuconv.cases.FORMATS`: dtypes, and "tf32" for float32 with
            ``precision="tf32"``. By default all that this machine has: bfloat16 needs ml_dtypes, and on a GPU CuPy 14;
            the NumPy path computes "tf32" as float32, so there it is run only by name.
        quick: run the selection of `gpuconv.cases.quick_pairs`: every case in one dtype at least, and every kind of
            case in every dtype. False runs every case in every dtype, which takes some five times as long. The cases
            that `filter` names are run in every dtype, and of a single dtype every case is.
        progress: called as progress(done, total, label) before the first case and after each.

    Raises:
        GpuUnavailableError: `device` is "gpu" and none answers.
        ValueError: `device` or a dtype is not one of those named above, or `filter` matches no case.
        ModuleNotFoundError: bfloat16 was asked for by name, and ml_dtypes is not installed.
    """
    started = time.perf_counter()
    if device not in ("auto", "gpu", "cpu"):
        raise ValueError(f'device must be "auto", "gpu" or "cpu", got {device!r}')
    if isinstance(dtypes, str):
        dtypes = [dtypes]
    unknown = [dtype for dtype in dtypes or () if dtype not in FORMATS]
    if unknown:
        raise ValueError(f"dtypes must be among {', '.join(FORMATS)}, got {', '.join(map(repr, unknown))}")
    selected = cases.select(filter)
    missing = None if device == "cpu" else missing_gpu()
    if device == "gpu" and missing is not None:
        raise GpuUnavailableError(missing)
    target = Target(on_gpu=device != "cpu" and missing is None)
    skipped: dict[str, str] = {}
    if dtypes is None:
        own = [name for name in FORMATS if target.on_gpu or name != "tf32"]
        skipped = {name: reason for name in own if (reason := target.lacks(name)) is not None}
        dtypes = [name for name in own if name not in skipped]
    else:
        for name in dtypes:
            numpy_dtype(cases.dtype_of(name))

    total = len(dtypes) * len(selected)
    everything = not quick or filter is not None
    pairs = [(dtype, case) for dtype in dtypes for case in selected] if everything else cases.quick_pairs(dtypes)
    results: list[Result] = []
    if progress is not None:
        progress(0, len(pairs), "")
    for done, (dtype, case) in enumerate(pairs, start=1):
        results += run_checks(case, dtype, target, seed)
        if progress is not None:
            progress(done, len(pairs), f"{case.name} {dtype}")
    elapsed = time.perf_counter() - started
    names = tuple(check.name for check in CHECKS)
    return Report(tuple(results), names, target.description(), target.versions(), seed, skipped, total, elapsed)
