"""What a call would do, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import numpy as np

from . import cpu, dispatch, fft, runtime
from .arguments import check_int, check_padding_mode, is_one_of
from .device import ARCHITECTURES, Device
from .dtypes import real_dtype
from .explanation import ArgumentLayout, Call, Direction, Explanation
from .families.base import contiguous_strides
from .fusion import FUSED_ARRAYS, Fused
from .interchange import is_known, view
from .lengths import Samples, follows_length
from .memory import address, check_kinds
from .problem import ArrayLike, ArraySpec, BiasGradientProblem, ConvProblem, Op, WeightGradientProblem
from .real_taps import are_real_taps, check_real_taps
from .tasks import OPTIONAL, SIGNATURES
from .text import shown

__all__ = ["Explanation", "explain"]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

SETTINGS: Mapping[Op, tuple[str, ...]] = {
    "conv1d": (
        "stride", "padding", "dilation", "groups", "padding_mode", "input_activation", "residual", "activation",
        "lengths", "precision", "algorithm", "out_dtype",
    ),
    "conv_transpose1d": (
        "stride", "padding", "output_padding", "groups", "dilation", "output_size", "padding_mode", "input_activation",
        "residual", "activation", "lengths", "precision", "algorithm", "out_dtype",
    ),
}  # fmt: skip


def explain(
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    direction: Direction = "forward",
    device: Device | str | None = None,
    **settings: Any,
) -> Explanation:
    """Tell what `gpuconv.conv1d` or `gpuconv.conv_transpose1d` does with these arguments, without computing anything.

    Args:
        op: "conv1d" or "conv_transpose1d".
        input: (N, C_in, L_in) or (C_in, L_in): an array, or a `gpuconv.problem.ArraySpec(shape, dtype)` for one that
            need not exist and counts as newly allocated.
        weight: (C_out, C_in/groups, K), for conv_transpose1d (C_in, C_out/groups, K).
        bias: (C_out,), or None.
        direction: "forward", or the gradient of this call to explain: "grad_input", "grad_weight" or "grad_bias". The
            output's gradient and the result count as newly allocated.
        device: None for where the arrays are (NumPy: the CPU path; CuPy: their GPU), "cpu", an architecture such as
            "sm_90" for a typical GPU of it, or a `gpuconv.device.Device`. No GPU is needed: NumPy arrays can stand for
            GPU arrays with the same strides and the same alignment.
        **settings: the settings of the operation by name: stride, padding, dilation, groups, algorithm and so on. An
            `ArraySpec` may stand for the residual, and for the arrays of snake.

    Returns:
        An `Explanation`; `print` it.

    Raises:
        ValueError: the call itself would raise it; an unknown op, direction or device; ArraySpecs without a device; the
            gradient of an input without positions, or of what is fused.
        TypeError: the call itself would raise it; a setting that the operation does not have.
        RuntimeError: the arrays are CuPy arrays but no GPU answers.

    Example:
        >>> import gpuconv
        >>> from gpuconv.problem import ArraySpec
        >>> x, w = ArraySpec((8, 512, 3000), "float16"), ArraySpec((512, 512, 3), "float16")
        >>> gpuconv.explain("conv1d", x, w, stride=2, padding=1, device="sm_90").problem.L_out
        1500
    """
    if not isinstance(op, str) or op not in SETTINGS:
        raise ValueError(f'explain: op must be one of "conv1d" and "conv_transpose1d", got {shown(op)}')
    if not is_one_of(direction, DIRECTIONS):
        raise ValueError(f"explain: direction must be one of {', '.join(DIRECTIONS)}, got {shown(direction)}")
    if unknown := settings.keys() - set(SETTINGS[op]):
        raise TypeError(f"explain: {op} has the settings {', '.join(SETTINGS[op])}, got {', '.join(sorted(unknown))}")
    fused = Fused.take(op, settings)
    arrays = {"input": input, "weight": weight, "bias": bias, **dict(zip(FUSED_ARRAYS, fused.arrays, strict=True))}
    given: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None or name not in OPTIONAL}
    for name, array in given.items():
        if isinstance(array, ArraySpec):
            _check_extents(op, name, array)
        elif isinstance(array, list | tuple):
            is_shape = all(isinstance(extent, int) for extent in array)
            hint = f'; a shape becomes gpuconv.problem.ArraySpec({tuple(array)!r}, "float32")' if is_shape else ""
            raise TypeError(f"explain: {name} must be an array or an ArraySpec, got {type(array).__name__}{hint}")
        else:
            given[name] = view(op, name, array)
            if array is not None and not is_known(given[name]):
                raise TypeError(f"explain: {name} must be an array or an ArraySpec, got {type(array).__name__}")
    data, weight = given["input"], given["weight"]
    target = _device_of(op, given) if device is None else _parse_device(device)
    layouts = tuple((name, found) for name, array in given.items() if (found := _layout_of(array)) is not None)

    if op == "conv_transpose1d":
        check_padding_mode(op, op, settings.pop("padding_mode", "zeros"))
    algorithm, lengths = settings.pop("algorithm", None), settings.pop("lengths", None)
    function = op if direction == "forward" else f"{op}_{direction.removeprefix('grad_')}"
    dispatch.check_algorithm("explain", SIGNATURES[function].kind, algorithm)
    by_parts = are_real_taps(weight, data)
    if by_parts and direction == "grad_bias":  # a bias is as complex as the data, whatever the taps are
        by_parts, weight = False, ArraySpec(tuple(weight.shape), data.dtype)
    if by_parts:
        check_real_taps(op, given, fused.fusion)
        given = {name: array if name == "weight" else _RealPart.of(array) for name, array in given.items()}
    p = ConvProblem.of(op, given["input"], weight, given.get("bias"), **settings)
    p = p.fused(Fused(fused.fusion, tuple(map(given.get, FUSED_ARRAYS))))
    problem: ConvProblem | WeightGradientProblem | BiasGradientProblem = p
    if direction != "forward" and p.out_dtype is not None:
        raise TypeError(f'explain: {p.dtype} data have no gradients, expected direction "forward"')
    if direction == "grad_input":
        if p.L_in == 0:
            raise ValueError("explain: input has no positions, so it has no gradient")
        problem = p.adjoint()
    elif direction == "grad_weight":
        problem = WeightGradientProblem.of(p)
    elif direction == "grad_bias":
        problem = BiasGradientProblem.of(p)
    padding = settings.get("padding", 0)
    follows = lengths is not None and follows_length(p, padding)
    call = Call(op, direction, algorithm, "same" if follows else p.padding, layouts)
    if lengths is not None and direction == "grad_weight":
        algorithm = dispatch.of_sums_over_lengths(function, algorithm)
    plan, costs = fft.choose(problem, algorithm, target), None
    if algorithm in dispatch.BY_FFT and fft.refusal(problem) is None:
        costs = fft.costs(problem, target)
    samples, runs = None, 1
    if lengths is not None:
        samples = Samples.of(op, p, padding, lengths)
        is_sum = direction in ("grad_weight", "grad_bias")
        if target is None or plan is not None or (follows and not is_sum):
            runs = len(list(samples.runs()))
        else:
            problem = replace(problem, has_lengths=True)
    if problem.is_empty:
        plan = None
    # The output's gradient counts as newly allocated, and so does the conjugate of a weight, which is a copy.
    operands = dict(zip(SIGNATURES[function].arrays, SIGNATURES[function].operands, strict=True))
    operands = {array: operand for array, operand in operands.items() if array in given}
    more = (1 + by_parts, samples, runs, plan, costs)
    conjugated = ("weight",) if direction == "grad_input" and p.is_complex and plan is None else ()
    if target is None:
        swapped = [name for name in operands if not getattr(given[name].dtype, "isnative", True)]
        method = None
        if plan is not None:
            pass
        elif isinstance(problem, ConvProblem):
            method = cpu.method(problem)
        elif isinstance(problem, WeightGradientProblem):
            method = cpu.weight_gradient.method(problem)
        return Explanation(call, problem, None, None, method, tuple(dict.fromkeys((*conjugated, *swapped))), *more)
    if problem.is_empty:
        return Explanation(call, problem, target, None, None, (), *more)
    pointers = {operand: _pointer(given[array]) for array, operand in operands.items() if array not in conjugated}
    if by_parts:  # the other arrays are parts of fresh complex ones
        for name, shape in problem.shapes.items():
            if name not in pointers and name != "grad_weight":
                fresh = ArraySpec(shape, np.result_type(given["input"].dtype, np.complex64))
                pointers[name] = _pointer(_RealPart.of(fresh))
    layout, copies = dispatch.lay_out(problem, pointers)
    arrays_of = {operand: array for array, operand in operands.items()}
    copies = (*(arrays_of[operand] for operand in copies), *conjugated)
    choice = prepared = None
    if plan is None:
        choice = dispatch.choose(problem, layout, target, algorithm)
        prepared = dispatch.choose(problem, replace(layout, is_prepared=True), target, algorithm)
    return Explanation(call, problem, target, choice, None, copies, *more, None if prepared == choice else prepared)


class _RealPart(NamedTuple):
    """Where the real part of a complex array lies, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]
    address: int

    @classmethod
    def of(cls, array: Any) -> _RealPart:
        dtype = np.dtype(array.dtype)
        real = np.dtype(real_dtype(dtype.name)).newbyteorder(dtype.byteorder)
        if (pointer := _pointer(array)) is None:
            strides = tuple(stride * dtype.itemsize for stride in contiguous_strides(array.shape))
            return cls(tuple(array.shape), real, strides, 0)
        return cls(tuple(array.shape), real, pointer.strides, pointer.address)


def _check_extents(op: Op, name: str, spec: ArraySpec) -> None:
    for extent in spec.shape:
        check_int(op, f"each extent of {name}", extent, "an int", at_least=0)


def _device_of(op: Op, given: dict[str, Any]) -> Device | None:
    """The GPU that the arrays are on, or None for NumPy arrays."""
    for name, array in given.items():
        if isinstance(array, ArraySpec):
            raise ValueError(
                f'explain: device must be given ("cpu", "sm_90", ...) where no arrays exist, got {name} as an ArraySpec'
            )
    check_kinds(op, given)
    if not runtime.is_cupy_array(given["input"]):
        return None
    return runtime.device(given["input"].data.device_id)


def _parse_device(device: Device | str) -> Device | None:
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise TypeError(f'explain: device must be None, "cpu", "sm_90", ... or a Device, got {type(device).__name__}')
    if device != "cpu" and device not in ARCHITECTURES:
        raise ValueError(
            f'explain: device must be "cpu", one of {", ".join(ARCHITECTURES)}, or a Device, got {shown(device)}; '
            "without device the arrays tell it"
        )
    return None if device == "cpu" else Device.from_arch(device)


def _layout_of(array: Any) -> ArgumentLayout | None:
    """The layout of an array; None for one that does not exist or lies as a newly allocated one."""
    if array is None or isinstance(array, ArraySpec):
        return None
    fresh = tuple(stride * array.dtype.itemsize for stride in contiguous_strides(array.shape))
    layout = ArgumentLayout(tuple(array.strides), address(array) % 16, bool(array.dtype.isnative))
    return None if layout == (fresh, 0, True) else layout


def _pointer(array: Any) -> dispatch.StridedPointer | None:
    if isinstance(array, ArraySpec):
        return None
    if isinstance(array, _RealPart):
        return dispatch.StridedPointer(array.strides, array.address)
    return dispatch.StridedPointer(tuple(array.strides), address(array))
