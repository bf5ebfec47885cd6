"""Checks of results against an error bound that follows from the problem, instead of a tolerance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import fft, functional, grad, reference, runtime
from .arguments import ArraySpec, check_padding_mode, check_shape
from .dtypes import real_dtype
from .fusion import Fused
from .interchange import is_tensor, view
from .memory import check_kinds
from .problem import ConvProblem, Op, WeightGradientProblem, bias_gradient_problem, dtype_name, gradient_problem
from .real_taps import are_real_taps, check_real_taps
from .reference import Comparison, Sums
from .tasks import OPTIONAL, SIGNATURES
from .text import shown

__all__ = ["assert_within_bound"]

Array = npt.NDArray[Any]

# The settings of the forward call that a gradient has, in the order of `ConvProblem.conv1d` and its counterpart.
_OF_GRADIENTS = {
    "conv1d": ("stride", "padding", "dilation", "groups", "precision", "padding_mode"),
    "conv_transpose1d": ("stride", "padding", "output_padding", "groups", "dilation", "output_size", "precision"),
}
_ARRAYS = frozenset(array for signature in SIGNATURES.values() for array in signature.arrays)
_OF_THE_CALL = ("algorithm", "out")  # these do not change the exact result
_BY_FFT = {"fft": (True,), "auto": (False, True)}  # for each allowed bound, whether it is that of the FFT


def assert_within_bound(actual: Any, op: str | Callable[..., Any], *arrays: Any, **settings: Any) -> None:
    """Assert that a result, computed by any library, is within its error bound.

    The bound of each element follows from the problem and its data, without a tolerance: `gpuconv.reference` derives
    it. It holds for every order of the sum, with or without fused multiply-add, and on tensor cores where the dtype or
    ``precision="tf32"`` allows them.

    Args:
        actual: the result; an array of NumPy, CuPy, or any library that exports DLPack or `__cuda_array_interface__`.
            A tensor that requires a gradient is detached.
        op: what was computed: `gpuconv.conv1d`, `gpuconv.conv_transpose1d`, one of the functions of `gpuconv.grad`, or
            such a function's name.
        *arrays: the positional arguments of that function, arrays of these libraries too.
        **settings: its other arguments. `out` is ignored, and so is `algorithm`, except "fft", whose bound is by norms,
            and "auto", with which the whole result must be within either bound.

    Raises:
        AssertionError: an element is outside of its bound, or the shape or the dtype differs. The message names the
            worst element with its index, both values, and the error as a fraction of its bound.
        ValueError, TypeError: the function would refuse the arguments; or `op` is none of these functions, `actual` is
            not an array, or `lengths` are given.

    Example:
        >>> import numpy as np, gpuconv
        >>> x, w = np.ones((1, 2, 9), np.float32), np.full((3, 2, 3), 0.1, np.float32)
        >>> y = np.full((1, 3, 7), 0.6, np.float32)  # computed by some other library
        >>> gpuconv.testing.assert_within_bound(y, gpuconv.conv1d, x, w)
    """
    __tracebackhide__ = True
    name = op if isinstance(op, str) else str(getattr(op, "__name__", ""))
    if name not in SIGNATURES:
        raise ValueError(
            f"assert_within_bound: op must be one of {', '.join(SIGNATURES)}, or that function, got {shown(op)}"
        )
    function: Callable[..., Any] = getattr(functional if hasattr(functional, name) else grad, name)
    try:
        bound = inspect.signature(function).bind(*arrays, **settings)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    bound.apply_defaults()
    given = {key: _as_numpy(name, key, value) for key, value in bound.arguments.items() if key not in _OF_THE_CALL}
    if given.pop("lengths", None) is not None:
        raise ValueError(f"assert_within_bound: {name} with lengths is checked sample by sample, without them")
    named = {
        key: array for key, array in given.items() if key in _ARRAYS and (array is not None or key not in OPTIONAL)
    }
    check_kinds(name, named)
    forward: Op = "conv_transpose1d" if name.startswith("conv_transpose1d") else "conv1d"
    ways = _BY_FFT.get(str(bound.arguments.get("algorithm")), (False,))
    expected = _EXPECTED[name.removeprefix(forward)](forward, name, dict(given), ways[0])
    output = _as_numpy("assert_within_bound", "actual", actual)
    if not isinstance(output, np.ndarray):
        raise TypeError(f"assert_within_bound: actual must be an array, got {type(actual).__name__}")
    if output.shape != expected.shape:
        raise AssertionError(f"{expected.words}: the result must have shape {expected.shape}, got {output.shape}")
    if output.dtype.newbyteorder("=").name != expected.dtype:
        raise AssertionError(f"{expected.words}: the result must have the dtype {expected.dtype}, got {output.dtype}")
    message = expected.failure(output)
    if message is not None and len(ways) > 1:
        message = _EXPECTED[name.removeprefix(forward)](forward, name, given, ways[1]).failure(output)
    if message is not None:
        raise AssertionError(message)


class _Expected(NamedTuple):
    """The expected result.

    Attributes:
        words: the function and its problem, for messages.
        shape: of the result.
        dtype: of the result.
        sums: the result by its definition; for complex data with real taps, that of the real and of the imaginary part.
    """

    words: str
    shape: tuple[int, ...]
    dtype: str
    sums: tuple[Sums, ...]

    def failure(self, output: Array) -> str | None:
        """What is wrong with a result of this shape and dtype; None if it is within the bound."""
        parts = (output,) if len(self.sums) == 1 else (output.real, output.imag)
        found = [sums.compare(part) for sums, part in zip(self.sums, parts, strict=True)]
        right = np.logical_and.reduce([comparison.right for comparison in found])
        if right.all():
            return None
        # Only elements outside of their bounds compete for the worst one.
        scores = [np.where(comparison.right, -1.0, comparison.fractions) for comparison in found]
        part = int(np.argmax([score.max() for score in scores]))
        index = tuple(int(i) for i in np.unravel_index(int(scores[part].argmax()), right.shape))
        return (
            f"{self.words}: {right.size - np.count_nonzero(right)} of {right.size} elements are outside of their error "
            f"bound\n  worst element {index}{_PARTS[part] if len(found) > 1 else ''}: {_difference(found[part], index)}"
        )


_PARTS = (", real part", ", imaginary part")


def _difference(found: Comparison, index: tuple[int, ...]) -> str:
    got, exact, bound = (array[index].item() for array in (found.output, found.exact, found.bound))
    fraction = float(found.fractions[index])
    return f"got {got!r}, expected {exact!r}; the error is {fraction:.3g} times its bound of {bound:.3g}"


def _check_fft(p: ConvProblem, by_fft: bool) -> bool:
    """Whether the bound is that of the FFT; raises if the FFT cannot compute the problem."""
    return by_fft and fft.choose(p, "fft", None) is not None


def _of_forward(op: Op, _name: str, given: dict[str, Any], by_fft: bool) -> _Expected:
    if op == "conv_transpose1d":
        check_padding_mode(op, op, given.pop("padding_mode"))
    fused = Fused.take(op, given)
    operands = [given.pop(array) for array in ("input", "weight", "bias")] + list(fused.arrays)
    x, weight, *_ = operands
    parts = [operands]
    if are_real_taps(weight, x):
        parts = [[a if a is None or a is weight else getattr(a, part) for a in operands] for part in ("real", "imag")]
    sums = []
    for x, weight, bias, *others in parts:
        of_part = Fused(fused.fusion, tuple(others))
        p = ConvProblem.of(op, x, weight, bias, **given).fused(of_part)
        sums.append(reference.convolution(p, x, weight, bias, of_part.given, by_fft=_check_fft(p, by_fft)))
    dtype = p.dtype_of(p.result) if len(parts) == 1 else str(dtype_name(operands[0].dtype))
    return _Expected(str(p), p.output_shape, dtype, tuple(sums))


def _of_input_gradient(op: Op, name: str, given: dict[str, Any], by_fft: bool) -> _Expected:
    weight, grad_output = given["weight"], given["grad_output"]
    x = ArraySpec(check_shape(name, op, "input_size", given["input_size"]), weight.dtype)
    parts = [grad_output]
    if are_real_taps(weight, grad_output):
        check_real_taps(name, {"grad_output": grad_output, "weight": weight}, None)
        parts = [grad_output.real, grad_output.imag]
    settings = [given[setting] for setting in _OF_GRADIENTS[op]]
    problems = [gradient_problem(name, op, x, weight, part, settings) for part in parts]
    sums = [reference.input_gradient(p, weight, part, by_fft=by_fft) for p, part in zip(problems, parts, strict=True)]
    p = problems[0]
    return _Expected(f"{name}: {p}", p.input_shape, str(dtype_name(grad_output.dtype)), tuple(sums))


def _of_weight_gradient(op: Op, name: str, given: dict[str, Any], by_fft: bool) -> _Expected:
    x, grad_output, dtype = given["input"], given["grad_output"], given["weight_dtype"]
    if dtype is not None and dtype_name(np.dtype(dtype)) != dtype_name(x.dtype):
        if x.dtype.kind != "c" or dtype_name(np.dtype(dtype)) != real_dtype(x.dtype.name):
            raise TypeError(f"{name}: weight_dtype must be that of {x.dtype} data or of its parts, got {shown(dtype)}")
        # The gradient of real taps sums over both parts, as over samples of a batch.
        x, grad_output = (
            np.concatenate([a.reshape(-1, *a.shape[-2:]) for a in (b.real, b.imag)]) for b in (x, grad_output)
        )
    weight = ArraySpec(check_shape(name, op, "weight_size", given["weight_size"]), x.dtype)
    p = gradient_problem(name, op, x, weight, grad_output, [given[setting] for setting in _OF_GRADIENTS[op]])
    q = WeightGradientProblem.of(p)
    sums = reference.weight_gradient(q, *q.sides(x, grad_output), by_fft=by_fft)
    return _Expected(f"{name}: {q}", q.weight_shape, q.dtype, (sums,))


def _of_bias_gradient(_op: Op, name: str, given: dict[str, Any], _by_fft: bool) -> _Expected:
    p = bias_gradient_problem(name, given["grad_output"])
    return _Expected(f"{name}: {p}", p.bias_shape, p.dtype, (reference.bias_gradient(p, given["grad_output"]),))


_EXPECTED = {
    "": _of_forward,
    "_input": _of_input_gradient,
    "_weight": _of_weight_gradient,
    "_bias": _of_bias_gradient,
}


def _as_numpy(caller: str, name: str, value: Any) -> Any:
    """An argument with its arrays as NumPy arrays, also those of a prepared weight and of an activation."""
    if isinstance(value, tuple):
        return tuple(_as_numpy(caller, name, part) for part in value)
    if isinstance(value, runtime.PreparedWeight):
        value = value.array
    if is_tensor(value):
        value = value.detach().resolve_conj().resolve_neg()
    array = view(caller, name, value)
    return runtime.cupy_module().asnumpy(array) if runtime.is_cupy_array(array) else array
