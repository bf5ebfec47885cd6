"""`verify`: runs the case table on this machine and checks the promises of gpuconv."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

from . import cases, runtime
from .cases import NUMBER_FORMATS, Case
from .checks import CHECKS, FFT, Target, run_checks
from .checks.families import families_of, families_that_take, far_bytes, far_runs, run_families, run_far
from .checks.layers import Pair, cases_of, cuts
from .device import Device
from .gpus import GpuUnavailableError, missing_gpu
from .layers import Layer
from .problem import INTEGERS, numpy_dtype
from .report import BY_FAMILY, FAR, Report, Result

__all__ = ["Report", "verify"]

DeviceName: TypeAlias = Literal["auto", "gpu", "cpu"]
Progress: TypeAlias = Callable[[int, int, str], None]


def verify(
    device: DeviceName = "auto",
    *,
    filter: str | None = None,
    seed: int = 0,
    dtypes: str | Sequence[str] | None = None,
    quick: bool = True,
    family: str | None = None,
    layers: Sequence[Layer] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run the case table on a device and check what gpuconv promises. Every output array starts as NaN.

        exact       small integers: the result equals the reference
        integers    integers of the dtype's whole range, whose sums wrap around: the result equals the reference
        fused       a residual and activations of input and output: within the bound, on strided arrays as well
        layout      exact on strided, reversed and axis-swapped input, weight, bias and output
        normal      normal data: every element within the error bound of `gpuconv.reference`; NaN fails
        ill_scaled  the same for magnitudes from 2**-60 to 2**60
        cancelling  the same where the terms of an element nearly cancel
        nonfinite   a NaN and infinities stay in the windows that contain them
        impulse     a unit impulse gives the weights, unrounded
        adjoint     <A(x, w), u> equals <x, gradient for x> and <w, gradient for w>, exactly, on integers
        groups      each group equals a convolution of its own, on integers
        bias        the bias adds to the result without one, on integers
        batch       a sample's result does not depend on the batch: N = 1 against N = 5
        chunks      a long input cut into chunks gives the result of the whole
        lengths     samples of different lengths, in some cases: forward and gradients as of each sample alone
        repeat      two calls give the same bits, with and without `out`
        gradients   for input, weight and bias: exact on integers, within the bound on normal data, the same bits twice
        fft         ``algorithm="fft"``, forward and gradients: within the bound of the FFT on normal data
        families    on a GPU, each kernel family that can compute the case: exact, strided, bounded, bits as below
        far         on a GPU, each kernel family once, on arrays that reach beyond 2**31 elements, exact on integers

    Kernel families that sum on CUDA cores must give the bits of the base family, `conv1d_direct` or
    `conv_transpose1d_gather`, which runs every case. A run of all cases and dtypes fails if some family runs no case.
    `far` needs free memory on the GPU, 4 GiB for float16 to 32 GiB for complex128; the report names the dtypes for
    which there is not enough. It is not run with `filter` or `layers`. `fft` is not run where CuPy finds no
    cuFFT, as the report says.

    On a GPU `exact`, `integers`, `layout`, `groups`, `bias`, `batch`, `chunks`, `lengths`, `repeat` and `gradients`
    compare bits. On the CPU only `repeat` and the last part of `gradients` do: BLAS chooses the order of the sums by
    the extents of a call, so `batch`, `chunks` and `lengths` are checked against the error bound, and it may give a
    zero either sign, so the others compare values.

    Args:
        device: "gpu": CuPy's current device. "cpu": the NumPy path. "auto": the GPU if one answers, else the CPU.
        filter: part of a case name, a tag, or an operation; see `gpuconv.cases.select`.
        seed: of all data.
        dtypes: one name or several in `gpuconv.cases.NUMBER_FORMATS`: dtypes, and "tf32" for float32 with
            ``precision="tf32"``. By default all that this machine has: bfloat16 needs ml_dtypes, and on a GPU NumPy
            2.1.2 or newer. The NumPy path computes "tf32" as float32, so there it runs only if it is named here.
        quick: run the selection of `gpuconv.cases.quick_pairs`: every case in one dtype at least, and every kind of
            case in every dtype. False runs every case in every dtype, which takes some five times as long. The cases
            that `filter` selects run in every dtype, and for a single dtype all cases run. On a GPU, cases for the
            remaining kernel families are added, and `far` runs only in the narrowest dtype.
        family: the name of a kernel family: check only this family, on the cases that it can compute. Needs a GPU.
        layers: check these, as `gpuconv.layers.read` returns them, instead of the case table; in `dtypes`, or by
            default each in its own dtype. N and L of a large layer are reduced, as the report says. The check `fused`
            checks what a layer fuses; for integers only `integers` is run.
        progress: called as progress(done, total, label) before the first case and after each.

    Raises:
        GpuUnavailableError: `device` is "gpu" and none answers.
        ValueError: `device` or a dtype is not one of those named above; `filter` matches no case or is given together
            with `layers`; a layer's call would raise it; the GPU does not have `family`, or it can compute no case.
        ModuleNotFoundError: `dtypes` has bfloat16, and ml_dtypes is not installed.

    Example:
        >>> import gpuconv
        >>> gpuconv.verify(device="cpu", filter="dilation", dtypes="float32").ok
        True
    """
    started = time.perf_counter()
    if device not in ("auto", "gpu", "cpu"):
        raise ValueError(f'verify: device must be "auto", "gpu" or "cpu", got {device!r}')
    if layers is not None and filter is not None:
        raise ValueError(f"verify: layers are given in place of a filter, got both, filter {filter!r}")
    restricted = any(given is not None for given in (filter, layers, dtypes, family))
    whole_table = filter is None and layers is None
    if isinstance(dtypes, str):
        dtypes = [dtypes]
    unknown = [dtype for dtype in dtypes or () if dtype not in NUMBER_FORMATS]
    if unknown:
        got = ", ".join(map(repr, unknown))
        raise ValueError(f"verify: dtypes must be among {', '.join(NUMBER_FORMATS)}, got {got}")
    own_cases = None if layers is None else cases_of(layers, dtypes)
    selected = cases.select(filter)
    missing = None if device == "cpu" else missing_gpu()
    if device == "gpu" and missing is not None:
        raise GpuUnavailableError(missing)
    target = Target(on_gpu=device != "cpu" and missing is None)
    skipped: dict[str, str] = {}
    if own_cases is not None:
        dtypes = list(dict.fromkeys(name for name, _ in own_cases))
        skipped = {name: reason for name in dtypes if (reason := target.lacks(name)) is not None}
        skipped |= cuts(own_cases, layers or ())
    elif dtypes is None:
        own = [name for name in NUMBER_FORMATS if target.on_gpu or name != "tf32"]
        skipped = {name: reason for name in own if (reason := target.lacks(name)) is not None}
        dtypes = [name for name in own if name not in skipped]
    else:
        for name in dtypes:
            numpy_dtype(cases.dtype_of(name))

    if family is None and (lack := target.lacks_fft()) is not None:
        skipped[FFT] = lack

    gpu = target.device()
    has, lacking = ((), ()) if gpu is None else families_of(gpu)
    if family is not None and family not in has:
        where = "there is none on the CPU" if gpu is None else f"this GPU has {', '.join(has)}"
        raise ValueError(f"verify: family must name a kernel family of the GPU, got {family!r}; {where}")

    every = [(dtype, case) for dtype in dtypes for case in selected]
    pairs = list(cases.quick_pairs(dtypes)) if quick and filter is None else every
    if own_cases is not None:
        every = own_cases
        pairs = [(dtype, case) for dtype, case in own_cases if dtype not in skipped]
        if not pairs:
            raise ValueError(f"verify: no layer can be run here: {'; '.join(skipped.values()) or 'there are none'}")
    if gpu is not None:
        pairs += _pairs_for(has if whole_table else (), every, pairs, gpu)
        if family is not None:
            pairs = [(dtype, case) for dtype, case in pairs if family in families_that_take(case.at(dtype), gpu)]
            if not pairs:
                raise ValueError(f"verify: no case of this filter and these dtypes reaches the kernel family {family}")
    far: list[tuple[str, Case, str]] = []
    if gpu is not None and whole_table:
        narrowest = min(dtypes, key=far_bytes)
        for dtype in [narrowest] if quick else dtypes:
            lack = _lack_of_memory(far_bytes(dtype))
            if lack is None:
                far += far_runs(selected, dtype, has if family is None else (family,), gpu)
            else:
                skipped[f"{FAR} {dtype}"] = lack

    def runs() -> Iterator[tuple[str, Sequence[Result]]]:
        for dtype, case in pairs:
            found = list(run_checks(case, dtype, target, seed, skipped)) if family is None else []
            if gpu is not None and dtype not in INTEGERS:
                found += run_families(case, dtype, target, seed, gpu, family)
            yield f"{case.name} {dtype}", found
        for dtype, case, name in far:
            yield f"{FAR} {name} {dtype}", [run_far(case, dtype, target, seed, name)]

    results: list[Result] = []
    total = len(pairs) + len(far)
    if progress is not None:
        progress(0, total, "")
    for done, (label, found) in enumerate(runs(), start=1):
        results += found
        if progress is not None:
            progress(done, total, label)
    checks = [check.name for check in CHECKS]
    if gpu is not None:
        checks += [BY_FAMILY, FAR] if whole_table else [BY_FAMILY]
    return Report(
        tuple(results),
        tuple(checks),
        target.description(),
        target.versions(),
        seed,
        skipped,
        total=len(every),
        elapsed=time.perf_counter() - started,
        families=has,
        lacking=lacking,
        restricted=restricted,
        layers={(case.name, dtype): str(case.problem) for dtype, case in own_cases or ()},
    )


def _lack_of_memory(num_bytes: int) -> str | None:
    """Why the current GPU cannot hold a buffer of that size and some MiB; None where it can."""
    free = int(runtime.cupy_module().cuda.runtime.memGetInfo()[0])
    if free >= num_bytes + 2**27:
        return None
    return f"needs {num_bytes / 2**30:.0f} GiB of free memory on the GPU, {free / 2**30:.1f} GiB are free"


def _pairs_for(families: Sequence[str], every: Sequence[Pair], chosen: Sequence[Pair], gpu: Device) -> list[Pair]:
    """For each kernel family that can compute none of the chosen pairs, the first pair that it can compute."""
    reached = {name for dtype, case in chosen for name in families_that_take(case.at(dtype), gpu)}
    added: list[Pair] = []
    for family in families:
        if family not in reached:
            takes = (pair for pair in every if family in families_that_take(pair[1].at(pair[0]), gpu))
            for dtype, case in list(takes)[:1]:
                added.append((dtype, case))
                reached.update(families_that_take(case.at(dtype), gpu))
    return added
