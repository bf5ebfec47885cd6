"""How the public functions run: they check their arguments, and cache what repeated calls need."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import runtime
from .arguments import ArraySpec, check_dtype
from .caches import cpu_key, keep, settings_key
from .dtypes import real_dtype
from .fusion import Fusion
from .interchange import view
from .memory import check_kinds, check_out, check_overlap, span
from .problem import BiasGradientProblem, ConvProblem, WeightGradientProblem, dtype_name
from .real_taps import are_real_taps, check_real_taps
from .sample_runs import run_by_runs, runs_one_by_one, samples_of, table_of, views_of, with_lengths
from .tasks import OPTIONAL, SIGNATURES, Task
from .text import shown

if TYPE_CHECKING:
    from . import fft

# Executors of GPU calls and tasks of CPU calls, by everything that they depend on.
# The executor, the task, the dtype of the result, and the spans of the arrays and of `out`, where it is given.
_EXECUTORS: dict[tuple[Any, ...], tuple[runtime.Executor | fft.Executor, Task, Any, list[tuple[int, int]]]] = {}
# The task, the dtype of the result, and whether it is a plain convolution: nothing fused, the weight not conjugated.
_TASKS: dict[tuple[Any, ...], tuple[Task, np.dtype[Any], bool]] = {}


def run(
    function: str,
    arrays: tuple[Any, ...],
    settings: tuple[Any, ...],
    out: Any | None,
    *,
    algorithm: str | None = None,
    prepared: runtime.PreparedWeight | None = None,
    lengths: Any = None,
) -> Any:
    """Compute a public function on the device of its arrays.

    Args:
        function: its name in `SIGNATURES`; the messages begin with it.
        arrays: those of the signature, in order; arrays of other libraries are read in place.
        settings: the other arguments of `Task.of`, in order.
        out: where to write the result; None for a new array.
        algorithm: see `dispatch.choose` and `fft.choose`; on the CPU only the latter has an effect.
        prepared: the packed forms of the weight, if the caller has them.
        lengths: the length of each sample, where they differ; see `gpuconv.lengths`.

    Returns:
        The result: `out` if it was given.
    """
    if algorithm is not None:
        from . import dispatch  # it loads all kernel families, which most calls on the CPU do not need

        dispatch.check_algorithm(function, SIGNATURES[function].kind, algorithm)
        if lengths is not None and SIGNATURES[function].kind == "weight_gradient":
            algorithm = dispatch.of_sums_over_lengths(function, algorithm)
    if runtime.is_cupy_array(arrays[0]):
        return _run_on_gpu(function, arrays, settings, out, algorithm, prepared, lengths)
    if lengths is not None:
        return _run_samples_on_cpu(function, arrays, settings, out, lengths, algorithm, prepared)
    return _run_on_cpu(function, arrays, settings, out, algorithm, prepared)


def _run_on_cpu(
    function: str,
    arrays: tuple[Any, ...],
    settings: tuple[Any, ...],
    out: Any | None,
    algorithm: str | None,
    prepared: runtime.PreparedWeight | None,
) -> Any:
    by_fft = _fft_algorithm(algorithm)
    key = cpu_key(function, arrays, settings) if out is None and by_fft is None else None
    found = None if key is None else _TASKS.get(key)
    if found is not None:
        task, dtype, is_convolution = found
        result = np.empty(task.shape, dtype)
        if is_convolution:
            bias = arrays[2] if len(arrays) > 2 else None
            _cpu().convolve(task.problem, arrays[0], arrays[1], bias, result)
        else:
            _compute(task, arrays, result)
        return result
    of_views = _run_on_views(function, arrays, settings, out, algorithm=algorithm, prepared=prepared)
    if of_views is not None:
        return of_views
    task = _check(function, arrays, settings, out)
    if key is not None and all(array is None or array.dtype.isnative for array in arrays):
        p, dtype = task.problem, np.dtype(task.out_dtype or arrays[0].dtype)
        is_convolution = isinstance(p, ConvProblem) and not p.fusion and not task.conjugate_weight
        keep(_TASKS, key, (task, dtype, is_convolution))
    plain = [None if array is None else native(array) for array in arrays]
    dtype = cast(Any, plain[0]).dtype
    if out is None:
        out = np.empty(task.shape, task.out_dtype or dtype)
    executor = _fft_executor(task, by_fft, None)
    if out.dtype.isnative:
        _compute(task, plain, np.asarray(out), executor, prepared)
    else:
        result = np.empty(out.shape, task.out_dtype or dtype)
        _compute(task, plain, result, executor, prepared)
        out[...] = result
    return out


def _fft_algorithm(algorithm: str | None) -> str | None:
    """The algorithm if it is "fft" or "auto", else None."""
    return algorithm if algorithm in ("fft", "auto") else None


def _fft_executor(task: Task, algorithm: str | None, device_index: int | None) -> fft.Executor | None:
    """The executor that computes a task through the FFT; None where it is summed directly.

    Args:
        task: the call.
        algorithm: "fft", "auto" or None.
        device_index: the GPU; None for the CPU.
    """
    if algorithm is None or task.problem is None:
        return None
    from . import fft

    device = None if device_index is None else runtime.device(device_index)
    plan = fft.choose(task.problem, algorithm, device)
    return None if plan is None or task.problem.is_empty else fft.Executor(plan, conjugate_weight=task.conjugate_weight)


def _compute(
    task: Task,
    arrays: Sequence[Any],
    output: np.ndarray[Any, Any],
    by_fft: fft.Executor | None = None,
    prepared: runtime.PreparedWeight | None = None,
) -> None:
    """Compute a task of NumPy arrays in native byte order into `output`."""
    if by_fft is not None:
        by_fft.run(*arrays, output, prepared=prepared)
        return
    cpu, p = _cpu(), task.problem
    if isinstance(p, ConvProblem):
        x, weight, *more = arrays
        bias = more[0] if more else None
        fused = (more[1:],) if p.fusion else ()
        cpu.convolve(p, x, weight.conj() if task.conjugate_weight else weight, bias, output, *fused)
    elif isinstance(p, WeightGradientProblem):
        cpu.weight_gradient.compute(p, *p.sides(*arrays), output)
    elif isinstance(p, BiasGradientProblem):
        cpu.bias_gradient.compute(p, arrays[0], output)


@cache
def _cpu() -> ModuleType:
    """The NumPy path, loaded by the first call on the CPU: calls on a GPU do not need it."""
    from . import cpu

    return cpu


def _run_on_gpu(
    function: str,
    arrays: tuple[Any, ...],
    settings: tuple[Any, ...],
    out: Any | None,
    algorithm: str | None,
    prepared: runtime.PreparedWeight | None,
    lengths: Any,
) -> Any:
    cupy = runtime.cupy_module()
    device_index = arrays[0].data.device_id
    try:
        current = cupy.cuda.runtime.getDevice()
    except RuntimeError as error:
        first = SIGNATURES[function].arrays[0]
        raise RuntimeError(f"{function}: {first} is a CuPy array, but no GPU answers: {error}") from error
    if current != device_index:
        with cupy.cuda.Device(device_index):
            return _run_on_gpu(function, arrays, settings, out, algorithm, prepared, lengths)

    found, key, ndarray = None, None, cupy.ndarray
    names = settings_key(settings)
    if names is not None:
        parts: list[Any] = [function, algorithm, names, prepared is None, lengths is None]
        for array in (*arrays, out):  # `identity`, without calls and tuples for each array
            if isinstance(array, ndarray):
                data = array.data
                parts += (array.shape, array.strides, array.dtype, data.device_id, data.ptr & 15)
            else:
                parts.append(None if array is None else "foreign")
        key = tuple(parts)
        found = _EXECUTORS.get(key)
    if found is None:
        options = {"algorithm": algorithm, "prepared": prepared, "lengths": lengths}
        if (of_views := _run_on_views(function, arrays, settings, out, **options)) is not None:
            return of_views
        task = _check(function, arrays, settings, out)
        by_fft = _fft_executor(task, _fft_algorithm(algorithm), device_index)
        if lengths is not None and (by_fft is not None or runs_one_by_one(function, task, settings)):
            samples = samples_of(function, arrays, settings, task, lengths)
            dtype = np.dtype(task.out_dtype or arrays[0].dtype)
            result = runtime.empty_beside(arrays[0], task.shape, dtype) if out is None else out
            compute = partial(run, algorithm=algorithm, prepared=prepared)
            run_by_runs(function, arrays, settings, task, samples, result, compute, runtime.clear)
            return result
        executor = by_fft or runtime.make_executor(
            task.problem if lengths is None else with_lengths(task.problem),
            SIGNATURES[function].operands[: len(arrays)],
            arrays,
            out,
            conjugate_weight=task.conjugate_weight,
            algorithm=algorithm,
            is_prepared=prepared is not None,
        )
        spans = [(0, 0) if array is None else span(array) for array in (*arrays, out)]
        found = executor, task, task.out_dtype or arrays[0].dtype, spans
        if key is not None:
            keep(_EXECUTORS, key, found)
    elif out is not None and _may_overlap(arrays, out, found[3]):
        given = dict(zip(SIGNATURES[function].arrays, arrays, strict=False))
        check_overlap(function, out, given)
    executor, task, dtype, _ = found
    table = None
    if lengths is not None:
        table = table_of(function, task, samples_of(function, arrays, settings, task, lengths))
    if out is None:
        out = ndarray(task.shape, dtype)
    executor.run(*arrays, out, prepared=prepared, samples=table)
    return out


def _may_overlap(arrays: tuple[Any, ...], out: Any, spans: list[tuple[int, int]]) -> bool:
    """Whether the addresses of CuPy arrays reach into those of `out`, whose span is the last one."""
    start = out.data.ptr
    low, high = start + spans[-1][0], start + spans[-1][1]
    for array, (first, stop) in zip(arrays, spans, strict=False):
        if array is not None:
            start = array.data.ptr
            if start + first < high and low < start + stop:
                return True
    return False


_PLAIN_ARRAYS = frozenset((np.ndarray, type(None)))


def _foreign_views(
    function: str, arrays: tuple[Any, ...], out: Any | None
) -> tuple[tuple[Any, ...], Any | None] | None:
    """The arrays and `out`, those of other libraries as NumPy or CuPy views; None if there are none of these."""
    if _PLAIN_ARRAYS.issuperset(map(type, (*arrays, out))):
        return None
    names = SIGNATURES[function].arrays
    given = tuple(view(function, name, array) for name, array in zip(names, arrays, strict=False))
    target = view(function, "out", out, write=True)
    if target is out and all(map(operator.is_, given, arrays)):
        return None
    return given, target


def _run_samples_on_cpu(
    function: str,
    arrays: tuple[Any, ...],
    settings: tuple[Any, ...],
    out: Any | None,
    lengths: Any,
    algorithm: str | None,
    prepared: runtime.PreparedWeight | None,
) -> Any:
    """Compute samples of different lengths: each run of one length on views of the arrays."""
    options = {"lengths": lengths, "algorithm": algorithm, "prepared": prepared}
    if (of_views := _run_on_views(function, arrays, settings, out, **options)) is not None:
        return of_views
    task = _check(function, arrays, settings, out)
    by_fft = _fft_algorithm(algorithm)
    _fft_executor(task, by_fft, None)  # raises the error of an algorithm that does not fit, before anything is computed
    samples = samples_of(function, arrays, settings, task, lengths)
    plain = tuple(None if array is None else native(array) for array in arrays)
    if out is None:
        out = np.empty(task.shape, task.out_dtype or arrays[0].dtype)
    is_native = out.dtype.isnative
    result = np.asarray(out) if is_native else np.empty(out.shape, task.out_dtype or cast(Any, plain[0]).dtype)

    def compute(function: str, views: tuple[Any, ...], settings: tuple[Any, ...], result: Any) -> None:
        part = Task.of(function, views, settings)
        _compute(part, views, result, _fft_executor(part, by_fft, None), prepared)

    if isinstance(task.problem, WeightGradientProblem | BiasGradientProblem):
        sums: np.ndarray[Any, Any] = np.zeros(task.shape, _cpu().accumulator(task.problem.dtype))
        part = np.empty_like(sums)
        for start, stop in samples.runs():
            if samples.L_out[start]:
                views, own = views_of(function, plain, settings, task, samples, start, stop)
                compute(function, views, own, part)
                with np.errstate(all="ignore"):
                    np.add(sums, part, out=sums)
        with np.errstate(all="ignore"):
            result[...] = sums
    else:
        run_by_runs(function, plain, settings, task, samples, result, compute, lambda view: view.fill(0))
    if not is_native:
        out[...] = result
    return out


def _run_on_views(
    function: str, arrays: tuple[Any, ...], settings: tuple[Any, ...], out: Any | None, **options: Any
) -> Any | None:
    """Compute on views of arrays of other libraries, or of the parts of complex data with real taps.

    Returns:
        The result; None, and nothing is computed, where the arrays are neither.
    """
    views = _foreign_views(function, arrays, out)
    if views is not None:
        result = run(function, views[0], settings, views[1], **options)
        return result if out is None else out
    if "weight" in SIGNATURES[function].arrays and are_real_taps(arrays[1], arrays[0]):
        return _run_by_parts(function, arrays, settings, out, **options)
    return None


def _run_by_parts(
    function: str, arrays: tuple[Any, ...], settings: tuple[Any, ...], out: Any | None, **options: Any
) -> Any:
    """Compute with real taps on complex data: one real call on views of the real parts, one on the imaginary parts."""
    data, weight, *_ = arrays
    given = dict(zip(SIGNATURES[function].arrays, arrays, strict=False))
    given = {n: array for n, array in {**given, "out": out}.items() if array is not None}
    check_kinds(function, given)
    check_real_taps(function, given, settings[-1] if isinstance(settings[-1], Fusion) else None)
    if out is not None:  # its real part may share memory with the imaginary part of another array
        check_out(function, out, {name: array for name, array in given.items() if name != "out"})
    else:
        specs = tuple(None if array is None else ArraySpec(array.shape, weight.dtype) for array in arrays)
        out = runtime.empty_beside(data, Task.of(function, specs, settings).shape, data.dtype)
    for part in ("real", "imag"):
        parts = tuple(array if array is weight or array is None else getattr(array, part) for array in arrays)
        run(function, parts, settings, getattr(out, part), **options)
    return out


def run_weight_gradient(
    function: str,
    arrays: tuple[Any, ...],
    settings: tuple[Any, ...],
    out: Any | None,
    *,
    weight_dtype: Any,
    algorithm: str | None = None,
    lengths: Any = None,
) -> Any:
    """Compute the gradient with respect to a weight of a given dtype; None means the dtype of the data.

    For real taps on complex data it is the sum of the gradients of the real and the imaginary parts.
    """
    if weight_dtype is None:
        return run(function, arrays, settings, out, algorithm=algorithm, lengths=lengths)
    views = _foreign_views(function, arrays, out)
    if views is not None:
        options = {"weight_dtype": weight_dtype, "algorithm": algorithm, "lengths": lengths}
        result = run_weight_gradient(function, views[0], settings, views[1], **options)
        return result if out is None else out
    given = dict(zip(SIGNATURES[function].arrays, arrays, strict=True))
    check_kinds(function, given)
    dtype = check_dtype(function, "input", arrays[0])
    try:
        found = dtype_name(np.dtype(weight_dtype))
    except (TypeError, ValueError):
        found = None
    if found == dtype:
        return run(function, arrays, settings, out, algorithm=algorithm, lengths=lengths)
    if found != real_dtype(dtype):
        allowed = " or ".join(dict.fromkeys((dtype, real_dtype(dtype))))
        raise TypeError(f"{function}: weight_dtype must be {allowed} for {dtype} data, got {shown(weight_dtype)}")
    if (other := check_dtype(function, "grad_output", arrays[1])) != dtype:
        raise TypeError(
            f"{function}: input and grad_output must share one dtype, got input {dtype}, grad_output {other}; "
            "pass grad_output.astype(input.dtype)"
        )
    if out is not None:
        check_overlap(function, out, given)
    real, imag = (tuple(getattr(array, part) for array in arrays) for part in ("real", "imag"))
    out = run(function, real, settings, out, algorithm=algorithm, lengths=lengths)
    other_part = run(function, imag, settings, None, algorithm=algorithm, lengths=lengths)
    if runtime.is_cupy_array(out):
        runtime.add(out, other_part)
    else:
        with np.errstate(all="ignore"):
            np.add(out, other_part, out=out)
    return out


def _check(function: str, arrays: tuple[Any, ...], settings: tuple[Any, ...], out: Any | None) -> Task:
    """Check that arrays, settings and `out` fit; return the task of the call."""
    names = SIGNATURES[function].arrays
    given = {n: a for n, a in zip(names, arrays, strict=False) if a is not None or n not in OPTIONAL}
    check_kinds(function, given if out is None else {**given, "out": out})
    task = Task.of(function, arrays, settings)
    if out is None:
        return task
    if tuple(out.shape) != task.shape:
        raise ValueError(f"{function}: out must have shape {task.shape}, got {tuple(out.shape)}")
    if task.out_dtype is not None:
        if out.dtype.name != task.out_dtype:
            raise TypeError(f"{function}: out must have the dtype {task.out_dtype}, got {out.dtype}")
    elif dtype_name(out.dtype) != (dtype := dtype_name(arrays[0].dtype)):
        raise TypeError(f"{function}: out must have the dtype of {names[0]}, {dtype}, got {out.dtype}")
    check_out(function, out, given)
    return task


def native(array: Any) -> np.ndarray[Any, Any]:
    """The array as a plain ndarray in native byte order, copied only where the order differs."""
    plain = np.asarray(array)
    return plain if plain.dtype.isnative else plain.astype(plain.dtype.newbyteorder("="))
