"""The two operations on arrays: `conv1d` and `conv_transpose1d`, with the order of arguments of torch.nn.functional."""

from __future__ import annotations

from threading import Lock
from typing import Any, SupportsIndex, TypeVar, cast

import numpy as np

from . import cpu, runtime
from .problem import ConvProblem, Op, Padding, Setting, check_mode, dtype_name

ArrayT = TypeVar("ArrayT")

# Plans by everything that they depend on; the oldest goes when the cache is full, which bounds what a stream of
# ever new lengths can hold.
_PLANS: dict[tuple[Any, ...], runtime.Plan] = {}
_MAX_PLANS = 4096
_PLANS_LOCK = Lock()  # for changes; look-ups need none


def conv1d(
    input: ArrayT,
    weight: ArrayT | runtime.PreparedWeight,
    bias: ArrayT | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    padding_mode: str = "zeros",
    precision: str = "float32",
    out: ArrayT | None = None,
) -> ArrayT:
    """1-D convolution (cross-correlation: the kernel is not flipped, as in every deep-learning framework).

    ::

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c_out, c_in, k] * input[n, c, l_in]
        l_in  = l_out*stride - padding_left + k*dilation
        c     = (c_out // (C_out/groups)) * (C_in/groups) + c_in
        L_out = floor((L_in + padding_left + padding_right - dilation*(K - 1) - 1) / stride) + 1

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample. NumPy or CuPy, any strides; never changed.
        weight: (C_out, C_in/groups, K), of the kind, device and dtype of `input`; or what `prepare` made of it.
        bias: (C_out,), or None.
        stride: step of the window, in samples.
        padding: zeros on both sides, in samples: an int, a pair (left, right), "valid" (none), "same"
            (L_out = ceil(L_in/stride); an odd total puts one more on the right) or "causal" (dilation*(K - 1) on the
            left). Taps in the padding contribute nothing, even where the weight is infinite or NaN.
        dilation: distance between taps, in samples.
        groups: input and output channels are cut into this many groups that do not mix.
        padding_mode: "zeros", the only one supported today.
        precision: "float32", the only one supported today: full precision of the dtype. float16 and bfloat16 data
            are summed in float32 and rounded once.
        out: an array of the output's shape, dtype and device to write to, which must not overlap the inputs.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: an array of the kind, device and dtype of `input`;
        `out` where it was given. CuPy work is queued on CuPy's current stream.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
        TypeError: an argument is of the wrong kind, or a dtype is not one of float16, bfloat16, float32, float64,
            complex64 and complex128.
        RuntimeError: a CuPy array was given but no GPU answers.

    Example:
        >>> import numpy as np, gpuconv
        >>> x = np.arange(5.0).reshape(1, 1, 5)
        >>> gpuconv.conv1d(x, np.ones((1, 1, 3)), padding="same")
        array([[[1., 3., 6., 9., 7.]]])
    """
    settings = (stride, padding, dilation, groups)
    return cast(ArrayT, _convolve("conv1d", input, weight, bias, settings, padding_mode, precision, out))


def conv_transpose1d(
    input: ArrayT,
    weight: ArrayT | runtime.PreparedWeight,
    bias: ArrayT | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    output_padding: Setting = 0,
    groups: SupportsIndex = 1,
    dilation: Setting = 1,
    *,
    output_size: Setting | None = None,
    precision: str = "float32",
    out: ArrayT | None = None,
) -> ArrayT:
    """Transposed 1-D convolution: the adjoint of `conv1d` in its input, which upsamples by `stride`.

    ::

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c, c_out_g, k] * input[n, c, l_in]
        l_out = l_in*stride - padding_left + k*dilation        (terms without such an l_in do not exist)
        c     = (c_out // (C_out/groups)) * (C_in/groups) + c_in,    c_out_g = c_out % (C_out/groups)
        L_out = (L_in - 1)*stride - padding_left - padding_right + dilation*(K - 1) + output_padding + 1

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample. NumPy or CuPy, any strides; never changed.
        weight: (C_in, C_out/groups, K), of the kind, device and dtype of `input`; or what `prepare` made of it.
        bias: (C_out,), or None.
        stride: distance between the windows that neighbouring input samples feed, in output samples.
        padding: output samples trimmed: an int from both sides, a pair (left, right), "valid" (none) or "same"
            (L_out = L_in*stride; an odd total trims one more on the right).
        output_padding: output samples added on the right, below max(stride, dilation).
        groups: input and output channels are cut into this many groups that do not mix.
        dilation: distance between taps, in output samples.
        output_size: the wanted L_out, in place of output_padding.
        precision: "float32", the only one supported today: full precision of the dtype. float16 and bfloat16 data
            are summed in float32 and rounded once.
        out: an array of the output's shape, dtype and device to write to, which must not overlap the inputs.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: an array of the kind, device and dtype of `input`;
        `out` where it was given. CuPy work is queued on CuPy's current stream.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
        TypeError: an argument is of the wrong kind, or a dtype is not one of float16, bfloat16, float32, float64,
            complex64 and complex128.
        RuntimeError: a CuPy array was given but no GPU answers.

    Example:
        >>> import numpy as np, gpuconv
        >>> x = np.array([[[1.0, 2.0]]])
        >>> gpuconv.conv_transpose1d(x, np.array([[[1.0, 1.0, 1.0]]]), stride=2)
        array([[[1., 1., 3., 2., 2.]]])
    """
    settings = (stride, padding, output_padding, groups, dilation, output_size)
    return cast(ArrayT, _convolve("conv_transpose1d", input, weight, bias, settings, "zeros", precision, out))


def prepare(weight: ArrayT) -> runtime.PreparedWeight:
    """Pack weights once for many calls.

    Some kernel families read the weights in another order and pack them at each call, with a small kernel of its own
    (`gpuconv.explain` shows it). A prepared weight keeps what they packed; `conv1d` and `conv_transpose1d` take it in
    place of the weight, with the same results to the bit. It is made from a copy: later changes of `weight` are not
    followed, so prepare again after them. The first call with each problem packs and waits for it to finish.

    Args:
        weight: (C_out, C_in/groups, K), or (C_in, C_out/groups, K) for conv_transpose1d; NumPy or CuPy. NumPy weights
            are accepted for symmetry: the CPU path packs nothing.

    Returns:
        A handle that holds the copy and, as calls need them, its packed forms.

    Raises:
        TypeError: `weight` is not a NumPy or CuPy array.

    Example:
        >>> import numpy as np, gpuconv
        >>> w = gpuconv.prepare(np.ones((1, 1, 3)))
        >>> gpuconv.conv1d(np.arange(5.0).reshape(1, 1, 5), w)
        array([[[3., 6., 9.]]])
    """
    check_kinds("prepare", {"weight": weight})
    array: Any = weight
    if not runtime.is_cupy_array(array):
        return runtime.PreparedWeight(np.array(array))
    with runtime.cupy_module().cuda.Device(array.data.device_id):
        return runtime.PreparedWeight(array.copy(order="C"))


def _convolve(
    op: Op,
    input: Any,
    weight: Any,
    bias: Any | None,
    settings: tuple[Any, ...],
    padding_mode: str,
    precision: str,
    out: Any | None,
) -> Any:
    if padding_mode != "zeros" or precision != "float32":
        check_mode(op, padding_mode=padding_mode, precision=precision)
    prepared = weight if isinstance(weight, runtime.PreparedWeight) else None
    if prepared is not None:
        weight = prepared.array
    if runtime.is_cupy_array(input):
        return _convolve_on_gpu(op, input, weight, bias, settings, out, prepared)
    return _convolve_on_cpu(op, input, weight, bias, settings, out)


def _convolve_on_cpu(
    op: Op, input: Any, weight: Any, bias: Any | None, settings: tuple[Any, ...], out: Any | None
) -> Any:
    problem = _check(op, input, weight, bias, settings, out)
    x, w, b = _native(input), _native(weight), None if bias is None else _native(bias)
    if out is None:
        out = np.empty(problem.output_shape, x.dtype)
    if out.dtype.isnative:
        cpu.convolve(problem, x, w, b, np.asarray(out))
    else:
        result = np.empty(problem.output_shape, x.dtype)
        cpu.convolve(problem, x, w, b, result)
        out[...] = result
    return out


def _convolve_on_gpu(
    op: Op,
    input: Any,
    weight: Any,
    bias: Any | None,
    settings: tuple[Any, ...],
    out: Any | None,
    prepared: runtime.PreparedWeight | None,
) -> Any:
    cupy = runtime.cupy_module()
    device_index = input.data.device_id
    try:
        current = cupy.cuda.runtime.getDevice()
    except RuntimeError as error:
        raise RuntimeError(f"{op}: input is a CuPy array, but no GPU answers: {error}") from error
    if current != device_index:
        with cupy.cuda.Device(device_index):
            return _convolve_on_gpu(op, input, weight, bias, settings, out, prepared)

    plan, key = None, None
    names = _as_key(settings)
    if names is not None:
        key = (op, names, _identity(input), _identity(weight), _identity(bias), _identity(out))
        plan = _PLANS.get(key)
    if plan is None:
        problem = _check(op, input, weight, bias, settings, out)
        plan = runtime.make_plan(problem, input, weight, bias, out)
        if key is not None:
            with _PLANS_LOCK:
                while len(_PLANS) >= _MAX_PLANS:
                    del _PLANS[next(iter(_PLANS))]
                _PLANS[key] = plan
    elif out is not None:
        _check_overlap(op, out, {"input": input, "weight": weight, "bias": bias})
    if out is None:
        out = cupy.empty(plan.output_shape, input.dtype)
    plan(input, weight, bias, out, prepared)
    return out


_PLAIN_TYPES = frozenset((int, str, type(None)))


def _as_key(settings: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The settings with lists as tuples and NumPy integers as ints, or None where they do not name one problem.

    They do where nothing but ints, strings and None remains: True equals 1 and would find its cache entry, but must be
    refused.
    """
    for value in settings:
        if type(value) not in _PLAIN_TYPES and not (type(value) is tuple and all(type(v) is int for v in value)):
            break
    else:
        return settings

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(plain, value))
        return int(value) if isinstance(value, np.integer) else value

    def unambiguous(value: Any) -> bool:
        return all(map(unambiguous, value)) if isinstance(value, tuple) else type(value) in _PLAIN_TYPES

    names = cast(tuple[Any, ...], plain(settings))
    return names if unambiguous(names) else None


def _identity(array: Any) -> tuple[Any, ...] | None:
    """What a plan depends on of a CuPy array: two arrays with one identity can use one plan.

    Other arrays get an identity that no plan is ever stored under, since the checks refuse them.
    """
    if array is None:
        return None
    if not runtime.is_cupy_array(array):
        return ("foreign",)
    data = array.data
    return (array.shape, array.strides, array.dtype, data.device_id, data.ptr & 15)


# -- checks that need the arrays themselves; everything about shapes, dtypes and settings is in problem.py ------------


def _check(
    op: Op, input: Any, weight: Any, bias: Any | None, settings: tuple[Any, ...], out: Any | None
) -> ConvProblem:
    arrays = {"input": input, "weight": weight, "bias": bias, "out": out}
    given = {name: a for name, a in arrays.items() if a is not None or name in ("input", "weight")}
    check_kinds(op, given)
    construct = ConvProblem.conv_transpose1d if op == "conv_transpose1d" else ConvProblem.conv1d
    problem = construct(input, weight, bias, *settings)
    if out is not None:
        del given["out"]
        if tuple(out.shape) != problem.output_shape:
            raise ValueError(f"{op}: out must have shape {problem.output_shape}, got {tuple(out.shape)}")
        if dtype_name(out.dtype) != problem.dtype:
            raise TypeError(f"{op}: out must have the dtype of input, {problem.dtype}, got {out.dtype}")
        if _may_overlap_itself(out):
            raise ValueError(f"{op}: out must not overlap itself, got strides {out.strides} for shape {out.shape}")
        if isinstance(out, np.ndarray) and not out.flags.writeable:
            raise ValueError(f"{op}: out must be writeable, got a read-only array")
        _check_overlap(op, out, given)
    return problem


def check_kinds(op: str, arrays: dict[str, Any]) -> None:
    """Refuse what is no array, and arrays of different kinds or devices.

    Raises:
        TypeError: naming the argument.
    """
    kinds = {}
    for name, array in arrays.items():
        if runtime.is_cupy_array(array):
            kinds[name] = f"CuPy array on device {array.data.device_id}"
        elif isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray):
            kinds[name] = "NumPy array"
        else:
            raise TypeError(f"{op}: {name} must be a NumPy or CuPy array, got {type(array).__name__}")
    for name, kind in kinds.items():
        if len(kinds) > 1 and kind != kinds["input"]:
            raise TypeError(
                f"{op}: all arrays must be of one kind and on one device, got input as a {kinds['input']} "
                f"and {name} as a {kind}"
            )


def _check_overlap(op: Op, out: Any, inputs: dict[str, Any]) -> None:
    low, high = _byte_range(out)
    for name, array in inputs.items():
        if array is None:
            continue
        array_low, array_high = _byte_range(array)
        if array_low < high and low < array_high and _share_memory(out, array):
            raise ValueError(f"{op}: out must not overlap {name}, but they share memory")


def _share_memory(a: Any, b: Any) -> bool:
    """Whether two arrays whose byte ranges overlap have a byte in common."""
    try:
        return bool(np.shares_memory(_Ghost.of(a), _Ghost.of(b), max_work=cast(Any, 100_000)))
    except np.exceptions.TooHardError:  # interleaved in a way too intricate to decide: treated as overlapping
        return True


def _may_overlap_itself(array: Any) -> bool:
    """Whether some axis, from the shortest stride to the longest, steps by less than what the axes before it span.

    Every view that slicing, transposing and reshaping can make of an ordinary array passes; hand-made strides that
    interleave without touching do not.
    """
    if 0 in array.shape:
        return False
    reach = array.dtype.itemsize
    for stride, extent in sorted((abs(s), e) for s, e in zip(array.strides, array.shape, strict=True)):
        if extent > 1:
            if stride < reach:
                return True
            reach += (extent - 1) * stride
    return False


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr)


def _byte_range(array: Any) -> tuple[int, int]:
    """The addresses from the first byte of an array to behind its last; empty for an empty array."""
    low = high = _address(array)
    if getattr(array, "_c_contiguous", False):  # CuPy's, without building a flags object: this is on the hot path
        return low, low + array.nbytes
    if 0 in array.shape:
        return low, low
    for extent, stride in zip(array.shape, array.strides, strict=True):
        span = (extent - 1) * stride
        low, high = (low + span, high) if span < 0 else (low, high + span)
    return low, high + array.dtype.itemsize


class _Ghost:
    """The place of an array in memory as NumPy sees it, for address arithmetic alone: GPU memory is never read."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface

    @classmethod
    def of(cls, array: Any) -> np.ndarray[Any, Any]:
        interface = {
            "shape": tuple(array.shape),
            "strides": tuple(array.strides),
            "typestr": f"|V{array.dtype.itemsize}",
            "data": (_address(array), True),
            "version": 3,
        }
        return np.asarray(cls(interface))


def _native(array: Any) -> np.ndarray[Any, Any]:
    """The array as a plain ndarray in native byte order, copied only where the order differs."""
    plain = np.asarray(array)
    return plain if plain.dtype.isnative else plain.astype(plain.dtype.newbyteorder("="))
