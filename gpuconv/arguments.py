"""Checks of arguments (shapes, dtypes and settings) and their error messages.

They read only the shape and the dtype of arrays, so NumPy and CuPy arrays are accepted and refused alike.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, SupportsIndex, TypeAlias, cast

import numpy as np

from .dtypes import DTYPES, FORMATS, INTEGER_SUMS, INTEGERS, PRECISIONS, dtype_name
from .edge import PADDING_MODES
from .text import shown

Op: TypeAlias = Literal["conv1d", "conv_transpose1d"]
Setting: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
Padding: TypeAlias = Setting | str

# The largest extent and the largest number of bytes of one array: offsets are signed 64-bit integers.
MAX_EXTENT = 2**63 - 1

# The largest stride and dilation: kernels multiply two of them in 64 bits.
MAX_STEP = 2**31 - 1

_LAYOUTS = {
    "conv1d": {
        "input": "(N, C_in, L_in) or (C_in, L_in)",
        "weight": "(C_out, C_in/groups, K)",
        "bias": "(C_out,)",
    },
    "conv_transpose1d": {
        "input": "(N, C_in, L_in) or (C_in, L_in)",
        "weight": "(C_in, C_out/groups, K)",
        "bias": "(C_out,)",
    },
}


class ArrayLike(Protocol):
    """What validation reads of an array: its shape and its dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


class ArraySpec(NamedTuple):
    """The shape and dtype of an array that need not exist (for `explain`, tests and benchmarks)."""

    shape: tuple[int, ...]
    dtype: Any


class Arrays(NamedTuple):
    """The extents and the dtype of the input, once the ranks and dtypes of all arrays have been checked."""

    N: int
    C_in: int
    L_in: int
    dtype: str
    batched: bool

    @classmethod
    def check(cls, op: Op, input: ArrayLike, weight: ArrayLike, bias: ArrayLike | None) -> Arrays:
        for name, array, ranks in (("input", input, (2, 3)), ("weight", weight, (3,)), ("bias", bias, (1,))):
            if array is None:
                if name == "bias":
                    continue
                raise TypeError(f"{op}: {name} must be an array of shape {_LAYOUTS[op][name]}, got None")
            check_rank(op, name, array.shape, _LAYOUTS[op][name], ranks)
        names = {}
        for name, array in (("input", input), ("weight", weight), ("bias", bias)):
            if array is None:
                continue
            names[name] = check_dtype(op, name, array, integers=True)
        if {names["input"], names["weight"]} <= set(INTEGERS):
            names.pop("bias", None)  # the bias has the dtype of the output
        if len(set(names.values())) > 1:
            got = ", ".join(f"{name} {dtype}" for name, dtype in names.items())
            hint = _conversion({"input": input, "weight": weight, "bias": bias}, names)
            raise TypeError(f"{op}: {_listing(tuple(names), quote=False)} must share one dtype, got {got}{hint}")
        if weight.shape[2] < 1:
            raise ValueError(f"{op}: weight must have at least one tap (K >= 1), got shape {tuple(weight.shape)}")
        batched = len(input.shape) == 3
        N, C_in, L_in = input.shape if batched else (1, *input.shape)
        return cls(N, C_in, L_in, names["input"], batched)


class Settings(NamedTuple):
    """The settings of a layer, checked as far as possible without arrays.

    Attributes:
        padding: (left, right), or "same" or "causal", which depend on the extents.
    """

    stride: int
    padding: tuple[int, int] | Literal["same", "causal"]
    dilation: int
    groups: int
    output_padding: int

    @classmethod
    def check(
        cls,
        caller: str,
        op: Op,
        stride: Setting,
        padding: Padding,
        dilation: Setting,
        groups: SupportsIndex,
        output_padding: Setting = 0,
    ) -> Settings:
        """Validate settings; `caller` is the first word of the messages.

        Raises:
            ValueError: a value is out of range.
            TypeError: a value is of the wrong kind.
        """
        s = check_setting(caller, "stride", stride, 1, MAX_STEP)
        d = check_setting(caller, "dilation", dilation, 1, MAX_STEP)
        g = check_int(caller, "groups", groups, "an int", 1)
        p = _padding(caller, padding, ("valid", "same", "causal") if op == "conv1d" else ("valid", "same"))
        extra = check_setting(caller, "output_padding", output_padding, 0)
        if extra >= max(s, d):
            raise ValueError(f"{caller}: output_padding must be below max(stride, dilation) = {max(s, d)}, got {extra}")
        if extra and p == "same":
            raise ValueError(f'{caller}: padding "same" chooses output_padding itself; expected 0, got {extra}')
        return cls(s, p, d, g, extra)


def check_dtype(caller: str, name: str, array: ArrayLike, *, integers: bool = False) -> str:
    """The name of an array's dtype, which must be a supported one; `integers` allows integers too.

    Raises:
        TypeError: the dtype is not supported.
    """
    found = dtype_name(array.dtype)
    if found is None and integers and (integer := str(getattr(array.dtype, "name", array.dtype))) in INTEGERS:
        return integer
    if found is None:
        dtypes = (*DTYPES, *INTEGERS) if integers else DTYPES
        raise TypeError(f"{caller}: {name} must have one of the dtypes {_listing(dtypes)}, got {array.dtype}")
    return found


def _conversion(arrays: Mapping[str, Any], dtypes: Mapping[str, str]) -> str:
    """The end of a message about several dtypes: which arrays to convert to the dtype of which other.

    That is the complex one of real and complex data, the floating-point one of integers and others, else that of most
    arrays, else the narrower one, as of float32 samples and float64 taps. An integer would not fit in a narrower dtype.
    """
    if not all(hasattr(arrays[name], "astype") for name in dtypes):
        return ""
    found = list(dtypes.values())

    def preference(name: str) -> tuple[bool, bool, int, int]:
        dtype, size = dtypes[name], arrays[name].dtype.itemsize
        is_integer = dtype in INTEGERS
        return dtype.startswith("complex"), not is_integer, found.count(dtype), size if is_integer else -size

    chosen = max(dtypes, key=preference)
    others = [name for name in dtypes if dtypes[name] != dtypes[chosen]]
    if dtypes[chosen] in INTEGERS and any(not np.can_cast(dtypes[name], dtypes[chosen]) for name in others):
        return ""
    return f"; pass {' and '.join(f'{name}.astype({chosen}.dtype)' for name in others)}"


def check_out_dtype(op: str, dtype: str, out_dtype: Any, bias: ArrayLike | None) -> str | None:
    """The dtype of the output for integers, once it and the dtype of the bias are checked; None for other data.

    Raises:
        ValueError: it is not one of `INTEGER_SUMS`, or the data are not integers.
        TypeError: the bias has another dtype.
    """
    if dtype not in INTEGERS:
        if out_dtype is None:
            return None
        raise ValueError(f"{op}: out_dtype is for integers; expected None for {dtype}, got {shown(out_dtype)}")
    try:
        name = INTEGER_SUMS[0] if out_dtype is None else np.dtype(out_dtype).name
    except (TypeError, ValueError):
        name = ""
    if name not in INTEGER_SUMS:
        raise ValueError(f"{op}: out_dtype must be one of {_listing(INTEGER_SUMS)} for {dtype}, got {shown(out_dtype)}")
    if bias is not None and check_dtype(op, "bias", bias, integers=True) != name:
        raise TypeError(f"{op}: bias must have the dtype of the output, {name}, got {bias.dtype}")
    return name


def is_one_of(value: object, words: Sequence[str]) -> bool:
    """Whether an argument is one of some words; arrays, which compare by element, are not."""
    return isinstance(value, str) and value in words


def check_rank(caller: str, name: str, shape: Sequence[Any], layout: str, ranks: tuple[int, ...]) -> None:
    if len(shape) not in ranks:
        hints = {
            "input": "; one channel of samples becomes input.reshape(1, -1)",
            "weight": "; the taps of a single channel become weight.reshape(1, 1, -1)",
        }
        raise ValueError(
            f"{caller}: {name} must have shape {layout}, got {len(shape)} dimension"
            f"{'' if len(shape) == 1 else 's'}: {shown(tuple(shape))}{hints.get(name, '') if len(shape) == 1 else ''}"
        )


def channels_hint(op: Op, x: Arrays, weight: ArrayLike, groups: int) -> str:
    """A hint at what was probably meant, where the input has not as many channels as the weight expects."""
    is_forward = op == "conv1d"
    expected = weight.shape[1] * groups if is_forward else weight.shape[0]
    if x.L_in == expected:
        return "; the channels of input seem to come last: pass input.swapaxes(-1, -2)"
    if is_forward and weight.shape[2] * groups == x.C_in:
        return "; the input channels of weight seem to come last: pass weight.swapaxes(-1, -2)"
    if is_forward and groups > 1 and weight.shape[1] == x.C_in:
        return f"; with groups = {groups} weight must have C_in/groups = {x.C_in // groups} of them"
    if groups == 1 and x.C_in in weight.shape[:2]:
        other = "conv_transpose1d" if is_forward else "conv1d"
        return f"; if weight is in the order of {other}, pass weight.swapaxes(0, 1)"
    if tuple(weight.shape[:2]) == (1, 1):
        return f"; one filter for every channel is weight.repeat({x.C_in}, axis=0) with groups = {x.C_in}"
    return ""


def check_bias_length(op: str, bias: ArrayLike | None, C_out: int) -> None:
    if bias is not None and bias.shape[0] != C_out:
        raise ValueError(f"{op}: bias must have shape (C_out,) = ({C_out},), got {tuple(bias.shape)}")


def check_shape(caller: str, op: Op, name: str, shape: Sequence[SupportsIndex]) -> tuple[int, ...]:
    """The argument input_size or weight_size as a tuple of ints.

    Raises:
        ValueError: it has another number of extents, or one is negative.
        TypeError: it is not a sequence of integers.
    """
    layout = _LAYOUTS[op][name.removesuffix("_size")]
    if not isinstance(shape, list | tuple):
        raise TypeError(f"{caller}: {name} must be the extents {layout}, got {type(shape).__name__} {shown(shape)}")
    check_rank(caller, name, shape, layout, (2, 3) if name == "input_size" else (3,))
    return tuple(check_int(caller, name, extent, f"the extents {layout}", 0) for extent in shape)


def check_size(caller: str, name: str, shape: Sequence[int], dtype: str) -> None:
    """Refuse an array that 64-bit offsets cannot address, before it is allocated.

    Raises:
        ValueError: it names the array and the bytes that it needs.
    """
    if not all(isinstance(extent, int) for extent in shape):
        return  # symbolic extents, of torch.compile
    # Extents of zero count as one: the strides of the other axes must be representable too.
    elements = math.prod([max(extent, 1) for extent in shape])  # torch.compile can trace a list, not a generator
    size = elements * FORMATS[dtype].itemsize
    if size > MAX_EXTENT:
        raise ValueError(
            f"{caller}: {name} of shape {tuple(shape)} and dtype {dtype} needs {size} bytes, more than 64-bit offsets "
            f"reach ({MAX_EXTENT})"
        )


def check_groups(caller: str, groups: int, C_in: int, C_out: int) -> None:
    """Refuse groups that do not divide both channel counts.

    Raises:
        ValueError: it names the channels that they do not divide.
    """
    if C_in % groups:
        raise ValueError(f"{caller}: groups must divide the input channels, got groups = {groups} and C_in = {C_in}")
    if C_out % groups:
        raise ValueError(f"{caller}: groups must divide the output channels, got groups = {groups} and C_out = {C_out}")


def check_padding_mode(caller: str, op: Op, padding_mode: str) -> str:
    """Return the padding mode if the operation has it; `caller` is the first word of the messages.

    Raises:
        ValueError: it is not one of `PADDING_MODES`, or not "zeros" for a transposed convolution.
    """
    if not is_one_of(padding_mode, PADDING_MODES):
        raise ValueError(f"{caller}: padding_mode must be one of {_listing(PADDING_MODES)}, got {shown(padding_mode)}")
    if op == "conv_transpose1d" and padding_mode != "zeros":
        raise ValueError(
            f'{caller}: padding_mode must be "zeros", got {shown(padding_mode)}; the adjoint of conv1d with '
            f'this mode is gpuconv.grad.conv1d_input(..., padding_mode="{padding_mode}")'
        )
    return padding_mode


def check_padding_limits(caller: str, padding_mode: str, left: int, right: int, L_in: int) -> None:
    """Refuse paddings for which the input is too short.

    Raises:
        ValueError: it names the padding and the most that the mode allows.
    """
    most: int | None = {"reflect": L_in - 1, "circular": L_in, "symmetric": L_in}.get(padding_mode)
    longest = max(left, right)
    if padding_mode == "replicate" and L_in == 0 and longest > 0:
        raise ValueError(f'{caller}: input must have samples for padding_mode "replicate", got L_in = 0')
    if most is not None and longest > max(most, 0):
        limit = "below L_in" if padding_mode == "reflect" else "at most L_in"
        raise ValueError(
            f'{caller}: padding must be {limit} = {L_in} on both sides for padding_mode "{padding_mode}", '
            f"got ({left}, {right})"
        )


def check_precision(op: str, precision: str, dtype: str) -> str:
    """Return the precision if it exists and fits the dtype.

    Raises:
        ValueError: it is not one of `PRECISIONS`, or it is "tf32" and the data are not float32.
    """
    if not is_one_of(precision, PRECISIONS):
        raise ValueError(f"{op}: precision must be one of {_listing(PRECISIONS)}, got {shown(precision)}")
    if precision == "tf32" and dtype != "float32":
        raise ValueError(f'{op}: precision "tf32" rounds float32 data; expected "float32" for {dtype}, got "tf32"')
    return precision


def check_int(
    caller: str, name: str, value: object, expected: str, at_least: int | None = None, at_most: int | None = None
) -> int:
    """An integer argument (an int or a NumPy integer, never a bool) as an int, within its limits.

    Raises:
        ValueError: it is out of range.
        TypeError: it is not an integer.
    """
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{caller}: {name} must be {expected}, got the bool {value}")
    try:
        result = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{caller}: {name} must be {expected}, got {type(value).__name__} {shown(value)}") from None
    if result.bit_length() > 1024:  # Python refuses to convert an int of thousands of digits to text
        raise ValueError(f"{caller}: {name} must fit in 64 bits, got an int of {result.bit_length()} bits")
    if at_least is not None and result < at_least:
        raise ValueError(f"{caller}: {name} must be at least {at_least}, got {result}")
    if at_most is not None and result > at_most:
        raise ValueError(f"{caller}: {name} must be at most {at_most}, got {result}")
    return result


def check_setting(
    caller: str, name: str, value: Setting, at_least: int | None = None, at_most: int | None = None
) -> int:
    """A setting of the one spatial axis (an integer, or a list or tuple of one) as an int, within its limits.

    Raises:
        ValueError: it is out of range, or a sequence of another length.
        TypeError: it is not an integer.
    """
    expected = "an int or a sequence of one int"
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise ValueError(f"{caller}: {name} must be {expected}, got {len(value)} values: {shown(value)}")
        value = value[0]
    return check_int(caller, name, value, expected, at_least, at_most)


def _padding(caller: str, value: Padding, words: tuple[str, ...]) -> tuple[int, int] | Literal["same", "causal"]:
    """Resolve a padding argument as far as possible without extents; `words` are the allowed strings."""
    expected = f"an int, a pair (left, right) or one of {_listing(words)}"
    if isinstance(value, str):
        if value not in words:
            full = "dilation*(K - 1) on both sides" if "causal" in words else "padding 0 of the transposed convolution"
            hint = f'; SciPy\'s mode "full" is {full}' if value == "full" else ""
            raise ValueError(f"{caller}: padding must be {expected}, got {shown(value)}{hint}")
        return (0, 0) if value == "valid" else cast(Literal["same", "causal"], str(value))
    values: Sequence[object] = value if isinstance(value, list | tuple) else (value,)
    if len(values) not in (1, 2):
        raise ValueError(f"{caller}: padding must be {expected}, got {len(values)} values: {shown(value)}")
    sides = [check_int(caller, "padding", v, expected) for v in values]
    if min(sides) < 0:
        raise ValueError(f"{caller}: padding must be at least 0, got {shown(value)}")
    return sides[0], sides[-1]


def _listing(names: Sequence[str], *, quote: bool = True) -> str:
    words = [f'"{name}"' if quote else name for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
