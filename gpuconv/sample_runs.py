"""Calls on samples of different lengths: the table that kernels read, and calls on neighbours of one length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .fusion import RESIDUAL
from .lengths import Samples, follows_length
from .problem import BiasGradientProblem, ConvProblem, Problem, WeightGradientProblem
from .tasks import SIGNATURES, Task, padding_of, settings_of_samples


def samples_of(function: str, arrays: tuple[Any, ...], settings: tuple[Any, ...], task: Task, lengths: Any) -> Samples:
    """Check the lengths of the samples of a call whose other arguments have been checked."""
    if task.forward is None:
        shape = arrays[0].shape
        return Samples.of_outputs(function, shape[0] if len(shape) == 3 else 1, shape[-1], lengths)
    return Samples.of(function, task.forward, padding_of(function, settings), lengths)


def runs_one_by_one(function: str, task: Task, settings: tuple[Any, ...]) -> bool:
    """Whether a GPU needs a call for each run of samples of one length, because their paddings differ."""
    p = task.forward
    is_sum = not isinstance(task.problem, ConvProblem)
    return p is not None and not is_sum and follows_length(p, padding_of(function, settings))


def with_lengths(problem: Problem | None) -> Problem | None:
    if isinstance(problem, ConvProblem | WeightGradientProblem | BiasGradientProblem):
        return replace(problem, has_lengths=True)
    return problem


def table_of(function: str, task: Task, samples: Samples) -> np.ndarray[Any, Any]:
    """The table of samples that kernels read: see cuda_src/samples.cuh."""
    L_in, L_out, left, _ = samples
    p = task.problem
    # An input gradient reads the operation's output gradient as its input, and so does the weight gradient of a
    # transposed convolution as its fine array.
    is_swapped = (
        p.transposed if isinstance(p, WeightGradientProblem) else isinstance(p, ConvProblem) and p.op != function
    )
    table = np.empty((len(L_in), 3), np.int64)
    table[:, 0], table[:, 1], table[:, 2] = (L_out, L_in, left) if is_swapped else (L_in, L_out, left)
    return table


def run_by_runs(
    function: str,
    arrays: tuple[Any, ...],
    settings: tuple[Any, ...],
    task: Task,
    samples: Samples,
    result: Any,
    compute: Callable[[str, tuple[Any, ...], tuple[Any, ...], Any], Any],
    clear: Callable[[Any], None],
) -> None:
    """Compute an operation or an input gradient: one call for each run of samples of one length.

    `compute` gets the function, views of the arrays of a run, their settings and a view of the result; `clear` fills a
    view of the result with zeros.
    """
    result = _batched(result)
    is_forward = isinstance(task.problem, ConvProblem) and task.problem.op == function
    for start, stop in samples.runs():
        L_in, L_out = int(samples.L_in[start]), int(samples.L_out[start])
        length = L_out if is_forward else L_in if L_out else 0  # the rest of the row is zero
        clear(result[start:stop, :, length:])
        if length:
            views, own = views_of(function, arrays, settings, task, samples, start, stop)
            compute(function, views, own, result[start:stop, :, :length])


def views_of(
    function: str,
    arrays: tuple[Any, ...],
    settings: tuple[Any, ...],
    task: Task,
    samples: Samples,
    start: int,
    stop: int,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays and the settings of a call on the samples start to stop - 1, which have one length."""
    L_in, L_out = int(samples.L_in[start]), int(samples.L_out[start])
    lengths = {"input": L_in, "grad_output": L_out, RESIDUAL: L_out}
    views = tuple(
        _batched(array)[start:stop, :, : lengths[name]] if name in lengths and array is not None else array
        for name, array in zip(SIGNATURES[function].arrays, arrays, strict=False)
    )
    p = task.forward
    if p is None:
        return views, settings
    return views, settings_of_samples(function, settings, p, (stop - start, p.C_in, L_in))


def _batched(array: Any) -> Any:
    return array if array.ndim == 3 else array[np.newaxis]
