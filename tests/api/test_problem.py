"""Validation, lengths and padding: everything about a call that shapes, dtypes and settings decide."""

from __future__ import annotations

import itertools
import math
import pickle
import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuconv
from gpuconv.arguments import check_padding_mode
from gpuconv.problem import (
    DTYPES,
    FORMATS,
    MAX_EXTENT,
    ArraySpec,
    BiasGradientProblem,
    ConvProblem,
    Problem,
    Settings,
    WeightGradientProblem,
    dtype_name,
    numpy_dtype,
)

OPS = ("conv1d", "conv_transpose1d")

# Valid calls for the tables to spoil: N = 2, C_in = 4, C_out = 6, L_in = 10, K = 3.
VALID: dict[str, dict[str, Any]] = {
    "conv1d": {"input": (2, 4, 10), "weight": (6, 2, 3), "bias": (6,), "groups": 2},
    "conv_transpose1d": {"input": (2, 4, 10), "weight": (4, 3, 3), "bias": (6,), "groups": 2},
}

Bad = tuple[dict[str, Any], type[Exception], tuple[str, ...]]

# name: (what spoils the valid call, the error, what its message says). Arrays are given by shape.
BAD_FOR_BOTH: dict[str, Bad] = {
    "input of rank 0": ({"input": ()}, ValueError, ("input must have shape", "got 0 dimensions: ()")),
    "input of rank 1": (
        {"input": (10,)},
        ValueError,
        ("input must have shape (N, C_in, L_in) or (C_in, L_in)", "got 1 dimension: (10,)"),
    ),
    "input of rank 4": ({"input": (1, 2, 4, 5)}, ValueError, ("input must have", "got 4 dimensions: (1, 2, 4, 5)")),
    "weight of rank 2": ({"weight": (6, 3)}, ValueError, ("weight must have shape (C_", "got 2 dimensions: (6, 3)")),
    "weight of rank 4": ({"weight": (4, 3, 3, 1)}, ValueError, ("weight must have", "got 4 dimensions: (4, 3, 3, 1)")),
    "weight None": ({"weight": None}, TypeError, ("weight must be an array of shape (C_", "got None")),
    "weight without taps": (
        {"weight": (4, 4, 0), "groups": 1},
        ValueError,
        ("weight", "K >= 1", "got shape (4, 4, 0)"),
    ),
    "bias of rank 0": ({"bias": ()}, ValueError, ("bias must have shape (C_out,)", "got 0 dimensions: ()")),
    "bias of rank 2": ({"bias": (1, 6)}, ValueError, ("bias must have shape (C_out,)", "got 2 dimensions: (1, 6)")),
    "bias too long": ({"bias": (7,)}, ValueError, ("bias must have shape (C_out,) = (6,), got (7,)",)),
    "bias of one element": ({"bias": (1,)}, ValueError, ("bias must have shape (C_out,) = (6,), got (1,)",)),
    "groups zero": ({"groups": 0}, ValueError, ("groups must be at least 1, got 0",)),
    "groups negative": ({"groups": -2}, ValueError, ("groups must be at least 1, got -2",)),
    "groups bool": ({"groups": True}, TypeError, ("groups must be an int, got the bool True",)),
    "groups NumPy bool": ({"groups": np.True_}, TypeError, ("groups must be an int, got the bool True",)),
    "groups float": ({"groups": 2.0}, TypeError, ("groups must be an int, got float 2.0",)),
    "groups in a tuple": ({"groups": (2,)}, TypeError, ("groups must be an int, got tuple (2,)",)),
    "groups None": ({"groups": None}, TypeError, ("groups must be an int, got NoneType None",)),
    "groups do not divide C_in": (
        {"groups": 3},
        ValueError,
        ("groups must divide the input channels, got groups = 3 and C_in = 4",),
    ),
    "stride zero": ({"stride": 0}, ValueError, ("stride must be at least 1, got 0",)),
    "stride negative": ({"stride": -1}, ValueError, ("stride must be at least 1, got -1",)),
    "stride bool": (
        {"stride": True},
        TypeError,
        ("stride must be an int or a sequence of one int, got the bool True",),
    ),
    "stride float": ({"stride": 1.0}, TypeError, ("stride must be an int or a sequence of one int, got float 1.0",)),
    "stride string": ({"stride": "2"}, TypeError, ("stride must be an int", "got str '2'")),
    "stride None": ({"stride": None}, TypeError, ("stride must be an int", "got NoneType None")),
    "stride pair": ({"stride": (1, 2)}, ValueError, ("stride must be", "a sequence of one int, got 2 values: (1, 2)")),
    "stride empty": ({"stride": []}, ValueError, ("stride must be", "a sequence of one int, got 0 values: []")),
    "stride of a bool": ({"stride": [True]}, TypeError, ("stride must be an int", "got the bool True")),
    "stride of a float": ({"stride": (1.5,)}, TypeError, ("stride must be an int", "got float 1.5")),
    "stride huge": ({"stride": 2**31}, ValueError, ("stride must be at most 2147483647, got 2147483648",)),
    "dilation zero": ({"dilation": 0}, ValueError, ("dilation must be at least 1, got 0",)),
    "dilation negative": ({"dilation": (-3,)}, ValueError, ("dilation must be at least 1, got -3",)),
    "dilation bool": ({"dilation": False}, TypeError, ("dilation must be an int", "got the bool False")),
    "dilation float": ({"dilation": np.float32(2)}, TypeError, ("dilation must be an int", "got float32", "2.0")),
    "dilation pair": ({"dilation": [1, 1]}, ValueError, ("dilation must be", "got 2 values: [1, 1]")),
    "dilation huge": ({"dilation": 2**31}, ValueError, ("dilation must be at most 2147483647, got 2147483648",)),
    "padding negative": ({"padding": -1}, ValueError, ("padding must be at least 0, got -1",)),
    "padding negative on the right": ({"padding": (2, -1)}, ValueError, ("padding must be at least 0, got (2, -1)",)),
    "padding bool": ({"padding": True}, TypeError, ("padding must be an int, a pair (left, right)", "the bool True")),
    "padding float": ({"padding": 1.0}, TypeError, ("padding must be an int, a pair (left, right)", "got float 1.0")),
    "padding with a bool": ({"padding": (1, True)}, TypeError, ("padding must be an int", "got the bool True")),
    "padding of a word in a tuple": ({"padding": ("same",)}, TypeError, ("padding must be an int", "got str 'same'")),
    "padding of three": ({"padding": (1, 2, 3)}, ValueError, ("padding must be an int", "got 3 values: (1, 2, 3)")),
    "padding empty": ({"padding": ()}, ValueError, ("padding must be an int", "got 0 values: ()")),
    "padding None": ({"padding": None}, TypeError, ("padding must be an int", "got NoneType None")),
    "padding of an unknown word": (
        {"padding": "full"},
        ValueError,
        ("padding must be", '"valid"', '"same"', "got 'full'"),
    ),
    "padding word in capitals": ({"padding": "SAME"}, ValueError, ("padding must be", '"valid"', "got 'SAME'")),
}

BAD: dict[str, dict[str, Bad]] = {
    "conv1d": {
        **BAD_FOR_BOTH,
        "channels differ": (
            {"input": (2, 6, 10)},
            ValueError,
            ("input has C_in = 6 channels, but weight (6, 2, 3) with groups = 2 expects C_in = 2*2 = 4",),
        ),
        "groups do not divide C_out": (
            {"weight": (5, 2, 3), "bias": None},
            ValueError,
            ("groups must divide the output channels, got groups = 2 and C_out = 5",),
        ),
        "weight's layout": ({"weight": (1, 2)}, ValueError, ("weight must have shape (C_out, C_in/groups, K), got",)),
        "kernel longer than the input": (
            {"weight": (6, 2, 11)},
            ValueError,
            ("the kernel is longer than the padded input", "spans dilation*(K - 1) + 1 = 11", "padded input has 10"),
        ),
        "dilated kernel longer than the padded input": (
            {"dilation": 8, "padding": (2, 3)},
            ValueError,
            ("kernel is longer", "= 17 positions", "padded input has 15 (L_in = 10, padding = (2, 3))"),
        ),
        "empty input": ({"input": (2, 4, 0)}, ValueError, ("kernel is longer", "padded input has 0 (L_in = 0")),
        "empty input, padded to the same length": (
            {"input": (2, 4, 0), "padding": "same"},
            ValueError,
            ("kernel is longer than the padded input", "L_in = 0"),
        ),
        "padding words": ({"padding": "full"}, ValueError, ('one of "valid", "same" and "causal", got \'full\'',)),
        "input beyond 64 bits": (
            {"input": (2**31, 4, 2**31)},
            ValueError,
            ("input of shape (2147483648, 4, 2147483648) and dtype float32 needs 73786976294838206464 bytes",),
        ),
        "output beyond 64 bits": (
            {"input": (2**31, 4, 10), "weight": (2**30, 2, 3), "bias": None},
            ValueError,
            ("output of shape (2147483648, 1073741824, 8) and dtype float32 needs 73786976294838206464 bytes",),
        ),
        "sizes beyond 64 bits behind a zero": (
            {"input": (0, 4, 2**62)},
            ValueError,
            ("input of shape (0, 4, 4611686018427387904)", "64-bit offsets reach (9223372036854775807)"),
        ),
        "padded length beyond 64 bits": (
            {"padding": (2**63, 0)},
            ValueError,
            ("extents must fit in 64 bits: the padded length is 9223372036854775818",),
        ),
    },
    "conv_transpose1d": {
        **BAD_FOR_BOTH,
        "channels differ": (
            {"input": (2, 6, 10)},
            ValueError,
            ("input has C_in = 6 channels, but weight (4, 3, 3) expects C_in = 4",),
        ),
        "weight's layout": ({"weight": (1, 2)}, ValueError, ("weight must have shape (C_in, C_out/groups, K), got",)),
        "padding words": ({"padding": "causal"}, ValueError, ('one of "valid" and "same", got \'causal\'',)),
        "output length zero": (
            {"padding": 6},
            ValueError,
            (
                "the output length must be at least 1, got 0 = (L_in - 1)*stride - padding_left - padding_right",
                "= (10 - 1)*1 - 6 - 6 + 1*(3 - 1) + 0 + 1",
            ),
        ),
        "output length negative": (
            {"input": (2, 4, 0), "stride": 5},
            ValueError,
            ("the output length must be at least 1, got -2 =", "(0 - 1)*5"),
        ),
        "output_padding negative": (
            {"output_padding": -1},
            ValueError,
            ("output_padding must be at least 0, got -1",),
        ),
        "output_padding bool": (
            {"output_padding": True},
            TypeError,
            ("output_padding must be an int", "the bool True"),
        ),
        "output_padding float": ({"output_padding": 0.0}, TypeError, ("output_padding must be an int", "float 0.0")),
        "output_padding pair": (
            {"output_padding": (0, 0)},
            ValueError,
            ("output_padding must be an int or a sequence of one int, got 2 values: (0, 0)",),
        ),
        "output_padding reaches the stride": (
            {"output_padding": 2, "stride": 2},
            ValueError,
            ("output_padding must be below max(stride, dilation) = 2, got 2",),
        ),
        "output_padding reaches the dilation": (
            {"output_padding": 4, "stride": 3, "dilation": 4},
            ValueError,
            ("output_padding must be below max(stride, dilation) = 4, got 4",),
        ),
        "output_padding at stride one": (
            {"output_padding": 1},
            ValueError,
            ("output_padding must be below max(stride, dilation) = 1, got 1",),
        ),
        "output_padding with the padding same": (
            {"output_padding": 1, "stride": 2, "padding": "same"},
            ValueError,
            ('padding "same" chooses output_padding itself; expected 0, got 1',),
        ),
        "output_size too small": (
            {"output_size": 20, "stride": 2},
            ValueError,
            ("output_size must be from 21 to 22 for L_in = 10, K = 3, stride = 2, dilation = 1", "got 20"),
        ),
        "output_size too large": (
            {"output_size": [23], "stride": 2},
            ValueError,
            ("output_size must be from 21 to 22 for", "got 23"),
        ),
        "output_size too large for the dilation": (
            {"output_size": 28, "stride": 2, "dilation": 3},
            ValueError,
            ("output_size must be from 25 to 27", "dilation = 3", "got 28"),
        ),
        "output_size negative": ({"output_size": -3}, ValueError, ("output_size must be from 12 to 12", "got -3")),
        "output_size where nothing fits": (
            {"output_size": 1, "padding": 7},
            ValueError,
            ("output_size must be (nothing is possible)", "padding = (7, 7), got 1"),
        ),
        "output_size zero": (
            {"output_size": 0, "padding": 6, "stride": 1, "dilation": 1},
            ValueError,
            ("output_size must be (nothing is possible)", "got 0"),
        ),
        "output_size with the padding same": (
            {"output_size": 21, "stride": 2, "padding": "same"},
            ValueError,
            ("output_size must be from 20 to 20", "got 21"),
        ),
        "output_size and output_padding": (
            {"output_size": 22, "output_padding": 1, "stride": 2},
            ValueError,
            ("give output_padding or output_size, not both; got output_padding = 1 and output_size = 22",),
        ),
        "output_size bool": ({"output_size": True}, TypeError, ("output_size must be an int", "got the bool True")),
        "output_size float": ({"output_size": 12.0}, TypeError, ("output_size must be an int", "got float 12.0")),
        "output_size pair": ({"output_size": (4, 12)}, ValueError, ("output_size must be", "got 2 values: (4, 12)")),
        "input beyond 64 bits": (
            {"input": (2**31, 4, 2**31)},
            ValueError,
            ("input of shape (2147483648, 4, 2147483648) and dtype float32 needs 73786976294838206464 bytes",),
        ),
        "output beyond 64 bits": (
            {"input": (2**31, 4, 10), "weight": (4, 2**30, 3), "groups": 1, "bias": None},
            ValueError,
            ("output of shape (2147483648, 1073741824, 12) and dtype float32 needs 110680464442257309696 bytes",),
        ),
        "output length beyond 64 bits": (
            {"input": (2, 4, 2**33), "stride": 2**31 - 1},
            ValueError,
            ("extents must fit in 64 bits: the padded length is 18446744062972133380",),
        ),
    },
}

BAD_CALLS = [pytest.param(op, *bad, id=f"{op}: {name}") for op in OPS for name, bad in BAD[op].items()]


def construct(
    op: str, input: Any, weight: Any, bias: Any = None, dtype: Any = "float32", **settings: Any
) -> ConvProblem:
    """The problem of a call whose arrays are given by shape, or as specs."""
    arrays = [ArraySpec(a, dtype) if type(a) is tuple else a for a in (input, weight, bias)]
    return ConvProblem.of(op, *arrays, **settings)


@pytest.mark.parametrize("op", OPS)
def test_the_calls_that_the_tables_spoil_are_valid(op: str) -> None:
    problem = construct(op, **VALID[op])
    assert (problem.C_in, problem.C_out, problem.groups, problem.has_bias) == (4, 6, 2, True)
    assert problem.output_shape == (2, 6, 8 if op == "conv1d" else 12)


@pytest.mark.parametrize(("op", "changes", "error", "says"), BAD_CALLS)
def test_bad_calls_are_refused(op: str, changes: dict[str, Any], error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        construct(op, **{**VALID[op], **changes})
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{op}: ")
    assert [part for part in says if part not in message] == [], message


@pytest.mark.parametrize("op", OPS)
def test_a_missing_input_is_refused(op: str) -> None:
    with pytest.raises(
        TypeError, match=r"input must be an array of shape \(N, C_in, L_in\) or \(C_in, L_in\), got None"
    ):
        construct(op, **{**VALID[op], "input": None})


@pytest.mark.parametrize("op", OPS)
def test_mixed_dtypes_are_refused(op: str) -> None:
    for name, other in itertools.product(
        ("input", "weight", "bias"), ("float64", "float16", "bfloat16", "complex64", "int8", "int64")
    ):
        got = {"input": "float32", "weight": "float32", "bias": "float32", name: other}
        with pytest.raises(TypeError) as caught:
            construct(op, **{**VALID[op], name: ArraySpec(VALID[op][name], other)})
        assert str(caught.value) == (
            f"{op}: input, weight and bias must share one dtype, "
            f"got input {got['input']}, weight {got['weight']}, bias {got['bias']}"
        )
    no_bias = {**VALID[op], "bias": None, "weight": ArraySpec(VALID[op]["weight"], "float64")}
    with pytest.raises(TypeError, match="input and weight must share one dtype, got input float32, weight float64"):
        construct(op, **no_bias)


@pytest.mark.parametrize(
    ("dtypes", "hint"),
    [
        (("float32", "float64"), "weight.astype(input.dtype)"),
        (("float64", "float32"), "input.astype(weight.dtype)"),
        (("float64", "float32", "float32"), "input.astype(weight.dtype)"),
        (("float32", "float64", "float64"), "input.astype(weight.dtype)"),
        (("float32", "float32", "float64"), "bias.astype(input.dtype)"),
        (("float16", "float32", "float64"), "weight.astype(input.dtype) and bias.astype(input.dtype)"),
        (("int16", "float32"), "input.astype(weight.dtype)"),
        (("float64", "int64"), "weight.astype(input.dtype)"),
        (("float32", "complex128"), "input.astype(weight.dtype)"),
        (("int8", "int16"), "input.astype(weight.dtype)"),
        (("int8", "uint8"), None),  # neither holds all numbers of the other
    ],
)
def test_mixed_dtypes_of_arrays_are_refused_with_a_hint(dtypes: tuple[str, ...], hint: str | None) -> None:
    shapes = ((2, 4, 9), (6, 4, 3), (6,))
    arrays = [np.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    with pytest.raises(TypeError) as caught:
        gpuconv.conv1d(*arrays)
    got = ", ".join(f"{name} {dtype}" for name, dtype in zip(("input", "weight", "bias"), dtypes, strict=False))
    assert str(caught.value).partition("got ")[2] == (got if hint is None else f"{got}; pass {hint}")
    if hint is not None:  # it works
        given = dict(zip(("input", "weight", "bias"), arrays, strict=False))
        converted = {word.partition(".")[0]: eval(word, {}, given) for word in hint.split(" and ")}
        assert gpuconv.conv1d(**(given | converted)).shape == (2, 6, 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_are_limited_in_bytes(dtype: str) -> None:
    itemsize = numpy_dtype(dtype).itemsize
    assert FORMATS[dtype].itemsize == itemsize
    longest = MAX_EXTENT // itemsize
    assert ConvProblem("conv1d", 1, 1, 1, longest, 1, dtype=dtype).L_out == longest
    with pytest.raises(ValueError, match=f"input of shape .*{longest + 1}.* and dtype {dtype} needs {2**63} bytes"):
        ConvProblem("conv1d", 1, 1, 1, longest + 1, 1, dtype=dtype)


def test_padding_modes_name_what_is_supported() -> None:
    assert check_padding_mode("Conv1d", "conv1d", "reflect") == "reflect"
    with pytest.raises(ValueError, match=r'^Conv1d: padding_mode must be one of "zeros", .*, got \'wrap\'$'):
        check_padding_mode("Conv1d", "conv1d", "wrap")


INTEGERS = {
    "int": lambda v: v,
    "NumPy int64": np.int64,
    "NumPy uint8": np.uint8,
    "NumPy array of rank 0": np.array,
    "tuple": lambda v: (v,),
    "list": lambda v: [v],
    "tuple of a NumPy integer": lambda v: (np.int16(v),),
}


@pytest.mark.parametrize("write", INTEGERS.values(), ids=INTEGERS.keys())
def test_settings_may_be_integers_or_sequences_of_one(write: Any) -> None:
    forward = construct("conv1d", **VALID["conv1d"], stride=write(2), padding=write(3), dilation=write(2))
    assert forward == construct("conv1d", **VALID["conv1d"], stride=2, padding=3, dilation=2)
    settings = {"stride": 3, "padding": 1, "dilation": 2, "output_padding": 2}
    transposed = construct(
        "conv_transpose1d", **VALID["conv_transpose1d"], **{k: write(v) for k, v in settings.items()}
    )
    assert transposed == construct("conv_transpose1d", **VALID["conv_transpose1d"], **settings)
    by_size = construct("conv_transpose1d", **VALID["conv_transpose1d"], stride=write(3), output_size=write(32))
    assert by_size == construct("conv_transpose1d", **VALID["conv_transpose1d"], stride=3, output_padding=2)
    for problem in (forward, transposed, by_size):
        numbers = [
            getattr(problem, f) for f in ("stride", "padding_left", "dilation", "groups", "output_padding", "L_out")
        ]
        assert {type(number) for number in numbers} == {int}


@pytest.mark.parametrize("op", OPS)
def test_groups_may_be_a_numpy_integer(op: str) -> None:
    problem = construct(op, **{**VALID[op], "groups": np.int32(2)})
    assert problem == construct(op, **VALID[op])
    assert type(problem.groups) is int


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("pair", [(2, 0), [0, 2], (np.int8(1), 2), (3, 3)])
def test_padding_may_be_a_pair(op: str, pair: Any) -> None:
    assert construct(op, **VALID[op], padding=pair).padding == (int(pair[0]), int(pair[1]))


@pytest.mark.parametrize("op", OPS)
def test_padding_valid_is_none(op: str) -> None:
    assert construct(op, **VALID[op], padding="valid") == construct(op, **VALID[op], padding=0)


def test_settings_can_be_checked_without_arrays() -> None:
    assert Settings.check("Layer", "conv1d", 2, "causal", [3], 4) == (2, "causal", 3, 4, 0)
    assert Settings.check("Layer", "conv_transpose1d", 2, "valid", 1, 1, (1,)) == (2, (0, 0), 1, 1, 1)
    with pytest.raises(ValueError, match=r"^Layer: stride must be at least 1, got 0$"):
        Settings.check("Layer", "conv1d", 0, 0, 1, 1)


small = st.integers(0, 6)
lengths = st.integers(1, 30)
taps = st.integers(1, 6)
steps = st.integers(1, 5)


@given(L_in=st.integers(0, 30), K=taps, stride=steps, dilation=steps, left=small, right=small)
def test_conv1d_length_is_the_number_of_window_positions(
    L_in: int, K: int, stride: int, dilation: int, left: int, right: int
) -> None:
    windows = [start for start in range(-left, L_in + right, stride) if start + (K - 1) * dilation <= L_in + right - 1]
    arguments = {"stride": stride, "padding": (left, right), "dilation": dilation}
    if windows:
        assert construct("conv1d", (1, L_in), (1, 1, K), **arguments).L_out == len(windows)
    else:
        with pytest.raises(ValueError, match="longer than the padded input"):
            construct("conv1d", (1, L_in), (1, 1, K), **arguments)


@given(L_in=lengths, K=taps, stride=steps, dilation=steps, left=small, right=small, extra=small)
def test_conv_transpose1d_length_is_the_extent_of_what_the_taps_reach(
    L_in: int, K: int, stride: int, dilation: int, left: int, right: int, extra: int
) -> None:
    reached = [l_in * stride + k * dilation for l_in in range(L_in) for k in range(K)]
    expected = max(reached) - min(reached) + 1 - left - right + extra
    arguments = {"stride": stride, "padding": (left, right), "dilation": dilation, "output_padding": extra}
    if extra >= max(stride, dilation):
        with pytest.raises(ValueError, match="output_padding must be below"):
            construct("conv_transpose1d", (1, L_in), (1, 1, K), **arguments)
    elif expected < 1:
        with pytest.raises(ValueError, match=f"output length must be at least 1, got {expected} ="):
            construct("conv_transpose1d", (1, L_in), (1, 1, K), **arguments)
    else:
        assert construct("conv_transpose1d", (1, L_in), (1, 1, K), **arguments).L_out == expected


@given(L_in=lengths, K=taps, stride=steps, dilation=steps, left=small, right=small)
def test_conv_transpose1d_returns_to_the_length_that_conv1d_came_from(
    L_in: int, K: int, stride: int, dilation: int, left: int, right: int
) -> None:
    if L_in + left + right < (K - 1) * dilation + 1:
        L_in = (K - 1) * dilation + 1
    arguments = {"stride": stride, "padding": (left, right), "dilation": dilation}
    there = construct("conv1d", (2, L_in), (3, 2, K), **arguments)
    back = construct("conv_transpose1d", (3, there.L_out), (3, 2, K), **arguments, output_size=L_in)
    assert back.output_shape == there.input_shape
    assert back.weight_shape == there.weight_shape
    assert back.output_padding == (L_in + left + right - (K - 1) * dilation - 1) % stride


@given(L_in=lengths, K=taps, stride=steps, dilation=steps, left=small, right=small)
def test_output_size_reaches_every_length_that_output_padding_does(
    L_in: int, K: int, stride: int, dilation: int, left: int, right: int
) -> None:
    arguments = {"stride": stride, "padding": (left, right), "dilation": dilation}
    shortest = (L_in - 1) * stride + (K - 1) * dilation + 1 - left - right
    for extra in range(max(stride, dilation)):
        if shortest + extra >= 1:
            by_size = construct("conv_transpose1d", (1, L_in), (1, 1, K), **arguments, output_size=shortest + extra)
            assert by_size == construct("conv_transpose1d", (1, L_in), (1, 1, K), **arguments, output_padding=extra)


@given(L_in=lengths, K=taps, stride=steps, dilation=steps)
def test_same_gives_one_output_per_stride_with_the_least_padding(L_in: int, K: int, stride: int, dilation: int) -> None:
    arguments = {"stride": stride, "dilation": dilation}
    problem = construct("conv1d", (1, L_in), (1, 1, K), padding="same", **arguments)
    left, right = problem.padding
    assert problem.L_out == math.ceil(L_in / stride)
    assert right - left in (0, 1)
    if right:  # one zero less would lose an output
        span = dilation * (K - 1) + 1
        assert (L_in + left + right - 1 - span) // stride + 1 < problem.L_out


@given(L_in=lengths, K=taps, stride=steps, dilation=steps)
def test_transposed_same_is_the_adjoint_of_same(L_in: int, K: int, stride: int, dilation: int) -> None:
    arguments = {"padding": "same", "stride": stride, "dilation": dilation}
    problem = construct("conv_transpose1d", (1, L_in), (1, 1, K), **arguments)
    assert problem.L_out == L_in * stride
    forward = construct("conv1d", (1, L_in * stride), (1, 1, K), **arguments)
    assert forward.L_out == L_in
    assert forward.padding == problem.padding
    assert construct("conv_transpose1d", (1, L_in), (1, 1, K), **arguments, output_size=L_in * stride) == problem


@given(L_in=lengths, K=taps, stride=steps, dilation=steps)
def test_causal_windows_end_at_their_own_sample(L_in: int, K: int, stride: int, dilation: int) -> None:
    problem = construct("conv1d", (1, L_in), (1, 1, K), padding="causal", stride=stride, dilation=dilation)
    assert problem.L_out == math.ceil(L_in / stride)
    last_taps = [l_out * stride - problem.padding_left + (K - 1) * dilation for l_out in range(problem.L_out)]
    assert last_taps == [l_out * stride for l_out in range(problem.L_out)]


def test_zero_batch_and_zero_channels_have_shapes() -> None:
    assert construct("conv1d", (0, 4, 10), (6, 4, 3)).output_shape == (0, 6, 8)
    assert construct("conv1d", (2, 0, 10), (6, 0, 3), groups=2).output_shape == (2, 6, 8)
    assert construct("conv1d", (2, 4, 10), (0, 4, 3), (0,)).output_shape == (2, 0, 8)
    assert construct("conv_transpose1d", (0, 4, 10), (4, 3, 3), groups=2).output_shape == (0, 6, 12)
    assert construct("conv_transpose1d", (2, 0, 10), (0, 3, 3)).output_shape == (2, 3, 12)
    assert construct("conv_transpose1d", (2, 4, 10), (4, 0, 3), (0,)).output_shape == (2, 0, 12)


def test_an_empty_input_may_be_padded_to_an_output() -> None:
    assert construct("conv1d", (2, 4, 0), (6, 4, 3), padding=(1, 3)).output_shape == (2, 6, 2)


@pytest.mark.parametrize("op", OPS)
def test_a_single_sample_has_no_batch_axis(op: str) -> None:
    batched, single = construct(op, **VALID[op]), construct(op, **{**VALID[op], "input": (4, 10)})
    assert single.N == 1
    assert not single.batched
    assert single.input_shape == (4, 10)
    assert single.output_shape == batched.output_shape[1:]


@pytest.mark.parametrize("setting", ["stride", "padding", "dilation", "groups"])
def test_an_int_of_thousands_of_digits_is_named(setting: str) -> None:
    with pytest.raises(ValueError, match=f"^conv1d: {setting} must fit in 64 bits, got an int of 16610 bits$"):
        construct("conv1d", **{**VALID["conv1d"], setting: -(10**5000)})


@pytest.mark.parametrize("op", OPS)
def test_problems_are_frozen_hashable_values(op: str) -> None:
    problem, twin = construct(op, **VALID[op]), construct(op, **VALID[op])
    assert problem == twin
    assert len({problem, twin, replace(problem, stride=2)}) == 2
    with pytest.raises(FrozenInstanceError):
        problem.stride = 3  # type: ignore[misc]


def test_problems_print_in_one_line() -> None:
    forward = construct("conv1d", **VALID["conv1d"], stride=2, padding=(1, 0), dilation=2)
    assert str(forward) == "conv1d N2 C4->6 L10->4 K3 s2 p1,0 d2 g2 float32 bias"
    transposed = construct("conv_transpose1d", (4, 10), (4, 3, 3), stride=2, output_padding=1, dtype="complex64")
    assert str(transposed) == "conv_transpose1d N1 C4->3 L10->22 K3 s2 p0,0 d1 g1 op1 complex64"


@pytest.mark.parametrize("op", OPS)
def test_the_problem_of_a_weight_gradient(op: str) -> None:
    forward = construct(op, **VALID[op], stride=2, dtype="complex64")
    problem = WeightGradientProblem.of(forward)
    assert len({problem, WeightGradientProblem.of(replace(forward, has_bias=False)), replace(problem, K=4)}) == 2
    with pytest.raises(FrozenInstanceError):
        problem.stride = 3  # type: ignore[misc]
    coarse, fine = problem.sides(forward.input_shape, forward.output_shape)
    assert (problem.coarse_shape, problem.fine_shape) == (coarse, fine)
    assert problem.weight_shape == forward.weight_shape
    assert (problem.C_coarse_g * 2, problem.C_fine_g) == forward.weight_shape[:2]
    assert (problem.conjugate_coarse, problem.conjugate_fine) == (op == "conv_transpose1d", op == "conv1d")
    assert problem.flops() == forward.flops()
    assert problem.bytes() == replace(forward, has_bias=False).bytes()
    real = WeightGradientProblem.of(replace(forward, dtype="float32"))
    assert not real.conjugate_coarse
    assert not real.conjugate_fine


def test_gradient_problems_print_in_one_line() -> None:
    forward = construct("conv1d", **VALID["conv1d"], stride=2, padding=(1, 0), dilation=2)
    assert str(WeightGradientProblem.of(forward)) == "conv1d weight gradient N2 C6,4 L4,10 K3 s2 p1 d2 g2 float32"
    transposed = construct("conv_transpose1d", (4, 10), (4, 3, 3), stride=2)
    text = "conv_transpose1d weight gradient N1 C4,3 L10,21 K3 s2 p0 d1 g1 float32"
    assert str(WeightGradientProblem.of(transposed)) == text
    assert str(BiasGradientProblem(2, 6, 8, "float16")) == "bias gradient N2 C6 L8 float16"


def test_the_problem_of_a_bias_gradient() -> None:
    problem = BiasGradientProblem(2, 6, 8, "complex128")
    assert (problem.grad_output_shape, problem.bias_shape, problem.terms) == ((2, 6, 8), (6,), 16)
    assert (problem.flops(), problem.bytes()) == (2 * 96, 16 * (96 + 6))
    assert replace(problem, dtype="float32").flops() == 96


@given(K=taps, stride=steps, dilation=steps, left=st.integers(0, 9), right=st.integers(0, 9), extra=st.integers(0, 5))
def test_the_adjoint_leads_back_to_the_input(
    K: int, stride: int, dilation: int, left: int, right: int, extra: int
) -> None:
    forward = construct("conv1d", (4, 30), (6, 2, K), None, groups=2, stride=stride, dilation=dilation, padding=left)
    transposed = replace(
        forward, op="conv_transpose1d", padding_right=right, output_padding=min(extra, max(stride, dilation) - 1)
    )
    for problem in (forward, replace(forward, padding_right=right, precision="tf32"), transposed):
        back = problem.adjoint()
        assert back.op != problem.op
        assert (back.input_shape, back.output_shape) == (problem.output_shape, problem.input_shape)
        assert back.weight_shape == problem.weight_shape
        assert (back.precision, back.has_bias) == (problem.precision, False)
        assert back.adjoint().output_shape == problem.output_shape
        assert 0 <= back.output_padding < stride


@given(K=taps, stride=steps, dilation=steps)
def test_terms_is_the_most_products_of_one_output(K: int, stride: int, dilation: int) -> None:
    forward = construct("conv1d", (4, 30), (2, 2, K), groups=2, stride=stride, dilation=dilation)
    assert forward.terms == 2 * K
    L_in = 40  # long enough for some output to have all the taps of its phase
    transposed = construct("conv_transpose1d", (4, L_in), (4, 1, K), groups=2, stride=stride, dilation=dilation)
    reached = [l_in * stride + k * dilation for l_in in range(L_in) for k in range(K)]
    assert transposed.terms == 2 * max(reached.count(position) for position in set(reached))


@pytest.mark.parametrize("op", OPS)
def test_every_kind_of_problem_names_its_result(op: str) -> None:
    forward = construct(op, **VALID[op])
    problems: list[Problem] = [forward, WeightGradientProblem.of(forward), BiasGradientProblem.of(forward)]
    assert [problem.result for problem in problems] == ["output", "grad_weight", "grad_bias"]
    results = (forward.output_shape, forward.weight_shape, forward.bias_shape)
    for problem, shape in zip(problems, results, strict=True):
        assert list(problem.shapes)[-1] == problem.result
        assert problem.shapes[problem.result] == shape
        assert not hasattr(problem, "__dict__")  # of which a program may hold thousands
        assert pickle.loads(pickle.dumps(problem)) == problem


def test_flops_and_bytes() -> None:
    forward = construct("conv1d", **VALID["conv1d"])
    assert forward.flops() == 2 * 2 * 6 * 8 * 2 * 3  # a multiply-add is two; N * C_out * L_out * C_in/groups * K
    assert forward.bytes() == 4 * (2 * 4 * 10 + 6 * 2 * 3 + 6 + 2 * 6 * 8)
    transposed = construct("conv_transpose1d", **{**VALID["conv_transpose1d"], "bias": None}, dtype="complex128")
    assert transposed.flops() == 8 * 2 * 4 * 10 * 3 * 3
    assert transposed.bytes() == 16 * (2 * 4 * 10 + 4 * 3 * 3 + 2 * 6 * 12)


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_and_names_correspond(name: str) -> None:
    dtype = numpy_dtype(name)
    assert dtype_name(dtype) == name
    assert dtype_name(dtype.newbyteorder("S")) == name
    assert dtype_name(name) == name


def test_other_names_are_no_dtypes() -> None:
    for dtype in (np.dtype("int32"), np.dtype(np.longdouble), "float8_e4m3fn", "complex32", float, None):
        assert dtype_name(dtype) is None


@pytest.mark.parametrize(
    ("op", "input", "weight", "settings", "message"),
    [
        (
            "conv1d", (2, 100, 16), (8, 16, 3), {},
            "conv1d: input has C_in = 100 channels, but weight (8, 16, 3) with groups = 1 expects C_in = 16*1 = 16; "
            "the channels of input seem to come last: pass input.swapaxes(-1, -2)",
        ),
        (
            "conv1d", (100, 16), (8, 4, 3), {"groups": 4},
            "conv1d: input has C_in = 100 channels, but weight (8, 4, 3) with groups = 4 expects C_in = 4*4 = 16; "
            "the channels of input seem to come last: pass input.swapaxes(-1, -2)",
        ),
        (
            "conv1d", (2, 16, 100), (8, 3, 16), {},
            "conv1d: input has C_in = 16 channels, but weight (8, 3, 16) with groups = 1 expects C_in = 3*1 = 3; "
            "the input channels of weight seem to come last: pass weight.swapaxes(-1, -2)",
        ),
        (
            "conv1d", (2, 16, 100), (8, 5, 3), {},
            "conv1d: input has C_in = 16 channels, but weight (8, 5, 3) with groups = 1 expects C_in = 5*1 = 5",
        ),
        (
            "conv1d", (2, 16, 100), (16, 8, 3), {},
            "conv1d: input has C_in = 16 channels, but weight (16, 8, 3) with groups = 1 expects C_in = 8*1 = 8; "
            "if weight is in the order of conv_transpose1d, pass weight.swapaxes(0, 1)",
        ),
        (
            "conv_transpose1d", (2, 16, 100), (8, 16, 3), {},
            "conv_transpose1d: input has C_in = 16 channels, but weight (8, 16, 3) expects C_in = 8; "
            "if weight is in the order of conv1d, pass weight.swapaxes(0, 1)",
        ),
        (
            "conv1d", (2, 16, 100), (16, 16, 3), {"groups": 16},
            "conv1d: input has C_in = 16 channels, but weight (16, 16, 3) with groups = 16 expects C_in = 16*16 = 256; "
            "with groups = 16 weight must have C_in/groups = 1 of them",
        ),
        (
            "conv_transpose1d", (2, 100, 16), (16, 8, 3), {},
            "conv_transpose1d: input has C_in = 100 channels, but weight (16, 8, 3) expects C_in = 16; "
            "the channels of input seem to come last: pass input.swapaxes(-1, -2)",
        ),
        (
            "conv1d", (2, 100), (1, 1, 3), {},
            "conv1d: input has C_in = 2 channels, but weight (1, 1, 3) with groups = 1 expects C_in = 1*1 = 1; one "
            "filter for every channel is weight.repeat(2, axis=0) with groups = 2",
        ),
        (
            "conv_transpose1d", (4, 2, 100), (1, 1, 3), {"stride": 2},
            "conv_transpose1d: input has C_in = 2 channels, but weight (1, 1, 3) expects C_in = 1; one filter for "
            "every channel is weight.repeat(2, axis=0) with groups = 2",
        ),
        (
            "conv1d", (1, 1, 9), (1, 1, 3), {"padding": "full"},
            'conv1d: padding must be an int, a pair (left, right) or one of "valid", "same" and "causal", got '
            "'full'; SciPy's mode \"full\" is dilation*(K - 1) on both sides",
        ),
        (
            "conv_transpose1d", (1, 1, 9), (1, 1, 3), {"padding": "full"},
            'conv_transpose1d: padding must be an int, a pair (left, right) or one of "valid" and "same", got '
            "'full'; SciPy's mode \"full\" is padding 0 of the transposed convolution",
        ),
        (
            "conv1d", (1, 1, 9), (3,), {},
            "conv1d: weight must have shape (C_out, C_in/groups, K), got 1 dimension: (3,); the taps of a single "
            "channel become weight.reshape(1, 1, -1)",
        ),
        (
            "conv1d", (9,), (1, 1, 3), {},
            "conv1d: input must have shape (N, C_in, L_in) or (C_in, L_in), got 1 dimension: (9,); one channel of "
            "samples becomes input.reshape(1, -1)",
        ),
    ],
)  # fmt: skip
def test_what_was_probably_meant_is_told(
    op: str, input: tuple[int, ...], weight: tuple[int, ...], settings: dict[str, Any], message: str
) -> None:
    arrays = ArraySpec(input, "float32"), ArraySpec(weight, "float32")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ConvProblem.of(op, *arrays, **settings)
