"""The two functions end to end: what they accept, what they refuse, and what they leave alone."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import caches, calls, nn, reference, runtime
from gpuconv.problem import DTYPES, INTEGERS, ConvProblem, numpy_dtype
from tests.api.test_problem import BAD_CALLS, VALID
from tests.api.test_problem import construct as construct_from_shapes
from tests.plans import BASE

Array = npt.NDArray[Any]

OPS = ("conv1d", "conv_transpose1d")

# Settings that every test of arrays runs, on the shapes of VALID.
SETTINGS: dict[str, dict[str, Any]] = {
    "conv1d": {"stride": 2, "padding": (2, 1), "dilation": 2, "groups": 2},
    "conv_transpose1d": {"stride": 3, "padding": (2, 1), "output_padding": 1, "dilation": 2, "groups": 2},
}


def draw(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Array:
    """Integers from -2 to 2: sums of their products are exact in every dtype, so results compare bit for bit."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-2, 3, shape).astype(np.float64)
    return (values + 1j * rng.integers(-2, 3, shape) if "complex" in dtype else values).astype(numpy_dtype(dtype))


def arrays(op: str, dtype: str = "float32") -> dict[str, Array]:
    """Input, weight and bias of the shapes of VALID."""
    return {name: draw(VALID[op][name], dtype, seed) for seed, name in enumerate(("input", "weight", "bias"))}


def call(op: str, input: Any, weight: Any, bias: Any = None, **settings: Any) -> Any:
    return getattr(gpuconv, op)(input, weight, bias, **settings)


def construct(op: str, input: Any, weight: Any, bias: Any = None, **settings: Any) -> ConvProblem:
    settings.pop("out", None)
    return ConvProblem.of(op, input, weight, bias, **settings)


def assert_right(
    op: str, output: Array, input: Array, weight: Array, bias: Array | None = None, **settings: Any
) -> None:
    problem = construct(op, input, weight, bias, **settings)
    assert output.shape == problem.output_shape
    assert output.dtype == numpy_dtype(problem.dtype)
    assert reference.within_bound(problem, output, input, weight, bias).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_dtype_gives_a_fresh_array_of_its_own(op: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    given = {name: (a * rng.standard_normal(a.shape)).astype(a.dtype) for name, a in arrays(op, dtype).items()}
    output = call(op, **given, **SETTINGS[op])
    assert_right(op, output, **given, **SETTINGS[op])
    assert type(output) is np.ndarray
    assert output.flags.c_contiguous
    assert output.flags.writeable
    assert output.base is None


@pytest.mark.torch
@pytest.mark.parametrize("op", OPS)
def test_arguments_stand_in_pytorchs_order(op: str) -> None:
    import torch

    given = arrays(op, "float64")
    positional = (2, 1, 2, 2) if op == "conv1d" else (2, 1, 1, 2, 2)
    expected = getattr(torch.nn.functional, op)(*map(torch.from_numpy, given.values()), *positional).numpy()
    np.testing.assert_allclose(getattr(gpuconv, op)(*given.values(), *positional), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_a_single_sample_equals_a_batch_of_one(op: str) -> None:
    given = arrays(op)
    single = {**given, "input": given["input"][0]}
    output = call(op, **single, **SETTINGS[op])
    assert_right(op, output, **single, **SETTINGS[op])
    batch = call(op, **{**given, "input": given["input"][:1]}, **SETTINGS[op])
    np.testing.assert_array_equal(output, batch[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_sizes_give_the_bias_or_zeros(dtype: str) -> None:
    bias = draw((6,), dtype)
    for op, no_channels in (("conv1d", (6, 0, 3)), ("conv_transpose1d", (0, 6, 3))):
        x = draw((2, 0, 10), dtype)
        L_out = construct(op, x, draw(no_channels, dtype)).L_out
        np.testing.assert_array_equal(
            call(op, x, draw(no_channels, dtype), bias), np.broadcast_to(bias[:, None], (2, 6, L_out))
        )
        np.testing.assert_array_equal(call(op, x, draw(no_channels, dtype)), np.zeros((2, 6, L_out)))
        out = np.full((2, 6, L_out), 7, numpy_dtype(dtype))
        assert not call(op, x, draw(no_channels, dtype), out=out).any()
    assert call("conv1d", draw((0, 4, 10), dtype), draw((6, 4, 3), dtype), bias).shape == (0, 6, 8)
    assert call("conv1d", draw((2, 4, 10), dtype), draw((0, 4, 3), dtype), bias[:0]).shape == (2, 0, 8)
    assert call("conv_transpose1d", draw((0, 4, 10), dtype), draw((4, 6, 3), dtype), bias).shape == (0, 6, 12)
    assert call("conv_transpose1d", draw((4, 10), dtype), draw((4, 0, 3), dtype), bias[:0]).shape == (0, 12)


def test_an_empty_input_with_padding_gives_the_bias() -> None:
    output = gpuconv.conv1d(draw((2, 4, 0)), draw((6, 4, 3)), draw((6,)), padding=2)
    np.testing.assert_array_equal(output, np.broadcast_to(draw((6,))[:, None], (2, 6, 2)))


CONTAINMENT = {
    "conv1d": [
        {},
        {"stride": 3, "padding": 4, "groups": 2},
        {"padding": "same", "dilation": 3},
        {"padding": "causal", "groups": 4},
    ],
    "conv_transpose1d": [
        {},
        {"stride": 3, "padding": 1, "groups": 2},
        {"padding": "same", "dilation": 3},
        {"stride": 2, "dilation": 3, "output_padding": 2, "groups": 4},
    ],
}


@pytest.mark.parametrize(("op", "settings"), [(op, s) for op in OPS for s in CONTAINMENT[op]])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_non_finite_input_stays_in_its_windows(op: str, settings: dict[str, Any], dtype: str, value: float) -> None:
    groups = settings.get("groups", 1)
    weight = draw((8, 4 // groups, 5) if op == "conv1d" else (4, 8 // groups, 5), dtype, 1)
    x = draw((3, 4, 40), dtype)
    clean = call(op, x, weight, **settings)
    x[1, 2, 17] = value
    output = call(op, x, weight, **settings)
    assert_right(op, output, x, weight, **settings)
    ones, spike = np.ones(weight.shape), np.zeros(x.shape)
    spike[1, 2, 17] = 1
    touched = reference.compute(construct(op, spike, ones, **settings), spike, ones) != 0
    assert 0 < touched.sum() < touched.size / 4
    assert not np.isfinite(output[touched].astype(np.complex128)).any()
    np.testing.assert_array_equal(output[~touched], clean[~touched])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_taps_in_the_padding_contribute_nothing_whatever_their_weight(op: str, value: float) -> None:
    x, weight = draw((2, 3, 12)), draw((3, 3, 5), seed=1)
    weight[..., 0] = value
    settings: dict[str, Any] = {"padding": 4} if op == "conv1d" else {}
    output = call(op, x, weight, **settings)
    assert_right(op, output, x, weight, **settings)
    finite = np.isfinite(output).all(axis=(0, 1))
    # The first tap reads the input at every output but the four at the start, or at the end.
    assert finite.tolist() == [True] * 4 + [False] * 12 if op == "conv1d" else [False] * 12 + [True] * 4


def swapped(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("S"))


def unaligned(array: Array) -> Array:
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def every_other(array: Array) -> Array:
    wide = np.full([2 * n for n in array.shape], np.nan, array.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def read_only(array: Array) -> Array:
    view = array.copy()
    view.flags.writeable = False
    return view


class Touchy(np.ndarray[Any, Any]):
    """A subclass whose own arithmetic must never be used."""

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a subclass's ufuncs were used")

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("a subclass's indexing was used")


MAKES = {
    "Fortran order": np.asfortranarray,
    "reversed": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "reversed everywhere": lambda a: np.flip(np.ascontiguousarray(np.flip(a))),
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "every other element": every_other,
    "read-only": read_only,
    "byte-swapped": swapped,
    "byte-swapped and strided": lambda a: every_other(swapped(a)),
    "unaligned": unaligned,
    "subclass": lambda a: a.view(Touchy),
    "one value everywhere": lambda a: np.broadcast_to(a.flat[0], a.shape),
    "equal rows": lambda a: np.broadcast_to(a[..., :1], a.shape),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
@pytest.mark.parametrize("dtype", ["float32", "complex128", "float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_inputs_may_lie_in_memory_in_any_way(op: str, dtype: str, make: Any) -> None:
    given = {name: make(array) for name, array in arrays(op, dtype).items()}
    plain = {name: np.array(np.asarray(a), dtype=numpy_dtype(dtype), order="C") for name, a in given.items()}
    before = {name: np.asarray(a).tobytes() for name, a in given.items()}
    output = call(op, **given, **SETTINGS[op])
    assert type(output) is np.ndarray
    assert output.dtype == numpy_dtype(dtype)
    assert output.dtype.isnative
    np.testing.assert_array_equal(output, call(op, **plain, **SETTINGS[op]))
    assert_right(op, output, **plain, **SETTINGS[op])
    assert {name: np.asarray(a).tobytes() for name, a in given.items()} == before


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_matrix_is_a_single_sample() -> None:
    x = np.asmatrix(draw((4, 10)))
    output = gpuconv.conv1d(x, draw((6, 4, 3)))
    assert type(output) is np.ndarray
    np.testing.assert_array_equal(output, gpuconv.conv1d(np.asarray(x), draw((6, 4, 3))))


def outputs(op: str, dtype: str) -> dict[str, tuple[Array, Array]]:
    """Destinations for the call on VALID by name: (the whole array, filled with a pattern; the view to pass as out)."""
    shape = construct_from_shapes(op, **{**VALID[op], **SETTINGS[op]}).output_shape
    np_dtype = numpy_dtype(dtype)

    def pattern(*shape: int) -> Array:
        return (np.arange(np.prod(shape)) % 251 + 1).reshape(shape).astype(np_dtype)

    N, C, L = shape
    places = {}
    places["contiguous"] = (whole := pattern(N, C, L), whole)
    places["in the middle"] = (whole := pattern(N + 2, C + 2, L + 3), whole[1:-1, 1:-1, 2:-1])
    places["every other"] = (whole := pattern(2 * N, 2 * C, 2 * L), whole[::2, 1::2, ::2])
    places["reversed"] = (whole := pattern(N, C, L), whole[:, ::-1, ::-1])
    places["Fortran"] = (whole := pattern(L, C, N), whole.T)
    places["channels last"] = (whole := pattern(N, L, C + 1), whole[..., :-1].transpose(0, 2, 1))
    places["byte-swapped"] = (whole := pattern(N, C, L).astype(np_dtype.newbyteorder("S")), whole)
    places["byte-swapped and strided"] = (
        whole := pattern(N, C, 3 * L).astype(np_dtype.newbyteorder("S")),
        whole[..., 1::3],
    )
    buffer = np.full(N * C * L * np_dtype.itemsize + 9, 0x5A, np.uint8)
    places["unaligned"] = (buffer, buffer[1:-8].view(np_dtype).reshape(shape))
    places["subclass"] = (whole := pattern(N, C, L), whole.view(Touchy))
    return places


@pytest.mark.parametrize("place", outputs("conv1d", "float32"))
@pytest.mark.parametrize("dtype", ["float32", "complex64", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_out_is_filled_and_its_neighbours_are_not(op: str, dtype: str, place: str) -> None:
    given = arrays(op, dtype)
    expected = call(op, **given, **SETTINGS[op])
    whole, out = outputs(op, dtype)[place]
    before = whole.copy()
    assert call(op, **given, **SETTINGS[op], out=out) is out
    np.testing.assert_array_equal(np.asarray(out), expected)
    # Restoring what was there under `out` must restore everything.
    np.copyto(np.asarray(out), np.asarray(outputs(op, dtype)[place][1]))
    assert whole.tobytes() == before.tobytes()


@pytest.mark.parametrize("op", OPS)
def test_out_is_written_everywhere_even_where_no_tap_reaches(op: str) -> None:
    given = arrays(op)
    settings = {**SETTINGS[op], "padding": 40} if op == "conv1d" else {"groups": 2, "stride": 7}
    out = np.full(construct(op, **given, **settings).output_shape, np.nan, np.float32)
    call(op, given["input"], given["weight"], out=out, **settings)
    assert np.isfinite(out).all()
    assert (out == 0).any()


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_out_is_refused(op: str) -> None:
    given = arrays(op)
    shape = construct(op, **given, **SETTINGS[op]).output_shape

    def refused(out: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match="^" + re.escape(f"{op}: {says}") + "$"):
            call(op, **given, **SETTINGS[op], out=out)

    longer = (*shape[:2], shape[2] + 1)
    refused(np.zeros(longer, np.float32), ValueError, f"out must have shape {shape}, got {longer}")
    refused(np.zeros(shape[1:], np.float32), ValueError, f"out must have shape {shape}, got {shape[1:]}")
    refused(np.zeros(shape), TypeError, "out must have the dtype of input, float32, got float64")
    refused(np.zeros(shape, np.int32), TypeError, "out must have the dtype of input, float32, got int32")
    refused(read_only(np.zeros(shape, np.float32)), ValueError, "out must be writeable, got a read-only array")
    refused([[0.0]], TypeError, "out must be a NumPy or CuPy array, got list; pass np.asarray(out)")
    refused(np.ma.zeros(shape, np.float32), TypeError, "out must be a NumPy or CuPy array, got MaskedArray")


def strided(shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """A writeable float32 array with the given strides in elements, on memory that is long enough."""
    memory = np.zeros(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)), np.float32)
    return np.lib.stride_tricks.as_strided(memory, shape, tuple(4 * s for s in strides))


@pytest.mark.parametrize(
    ("strides", "overlaps"),
    [
        ((0, 8, 1), True),
        ((48, 0, 1), True),
        ((48, 8, 0), True),
        ((48, 1, 1), True),
        ((48, 7, 1), True),
        ((47, 8, 1), True),
        ((48, 8, 1), False),
        ((1, 2, 12), False),
        ((100, 9, 1), False),
    ],
)
def test_out_must_not_overlap_itself(strides: tuple[int, ...], overlaps: bool) -> None:
    x, weight, out = draw((2, 4, 10)), draw((6, 4, 3)), strided((2, 6, 8), strides)
    if overlaps:
        in_bytes = tuple(4 * s for s in strides)
        with pytest.raises(
            ValueError, match=re.escape(f"out must not overlap itself, got strides {in_bytes} for shape")
        ):
            gpuconv.conv1d(x, weight, out=out)
        assert not out.any()
    else:
        np.testing.assert_array_equal(gpuconv.conv1d(x, weight, out=out), gpuconv.conv1d(x, weight))


def test_axes_of_length_one_overlap_nothing() -> None:
    out = strided((1, 6, 8), (0, 8, 1))
    assert gpuconv.conv1d(draw((1, 4, 10)), draw((6, 4, 3)), out=out) is out


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_out_must_not_overlap_an_input(op: str, name: str) -> None:
    given = arrays(op)
    shape = construct(op, **given, **SETTINGS[op]).output_shape
    elements = int(np.prod(shape))
    for shift in (0, given[name].size - 1, -(elements - 1)):
        memory = np.zeros(2 * elements + given[name].size, np.float32)
        start = elements
        inside = memory[start : start + given[name].size].reshape(given[name].shape)
        inside[...] = given[name]
        out = memory[start + shift : start + shift + elements].reshape(shape)
        with pytest.raises(ValueError, match=f"^{op}: out must not overlap {name}, but they share memory$"):
            call(op, **{**given, name: inside}, **SETTINGS[op], out=out)
        np.testing.assert_array_equal(inside, given[name])
    behind = memory[start + given[name].size :][:elements].reshape(shape)
    expected = call(op, **given, **SETTINGS[op])
    np.testing.assert_array_equal(call(op, **{**given, name: inside}, **SETTINGS[op], out=behind), expected)


def test_out_may_interleave_with_the_input() -> None:
    """Two views may share a range of addresses and no byte."""
    memory = np.zeros((2, 4, 20), np.float32)
    x, out = memory[..., ::2], memory[..., 1::2]
    x[...] = draw((2, 4, 10))
    weight = draw((4, 4, 3))
    np.testing.assert_array_equal(gpuconv.conv1d(x, weight, padding=1, out=out), gpuconv.conv1d(x, weight, padding=1))
    np.testing.assert_array_equal(x, draw((2, 4, 10)))
    with pytest.raises(ValueError, match="out must not overlap input"):
        gpuconv.conv1d(x, weight, padding=1, out=memory[..., 2:12])


def test_inputs_may_overlap_each_other() -> None:
    memory = draw((4, 4, 3))
    np.testing.assert_array_equal(
        gpuconv.conv1d(memory, memory, memory[0, :, 0]),
        gpuconv.conv1d(memory.copy(), memory.copy(), memory[0, :, 0].copy()),
    )


# Extents that no NumPy array can have; the checks on shapes alone refuse them too.
IMPOSSIBLE = ("input beyond 64 bits", "sizes beyond 64 bits behind a zero")
POSSIBLE_BAD_CALLS = [call for call in BAD_CALLS if not str(call.id).endswith(IMPOSSIBLE)]


def real_array(shape: tuple[int, ...] | None) -> Array | None:
    return None if shape is None else np.broadcast_to(np.float32(1), shape)


@pytest.mark.parametrize(("op", "changes", "error", "says"), POSSIBLE_BAD_CALLS)
def test_bad_calls_are_refused(op: str, changes: dict[str, Any], error: type[Exception], says: tuple[str, ...]) -> None:
    arguments = {**VALID[op], **changes}
    for name in ("input", "weight", "bias"):
        arguments[name] = real_array(arguments[name])
    with pytest.raises(error) as caught:
        call(op, **arguments)
    message = str(caught.value)
    assert message.startswith(f"{op}: ")
    if arguments["weight"] is None:
        assert message == f"{op}: weight must be a NumPy or CuPy array, got NoneType"
    else:
        assert [part for part in says if part not in message] == []


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["input", "weight", "bias", "out"])
def test_what_is_no_array_is_refused(op: str, name: str) -> None:
    given = arrays(op)
    value = given.get(name, np.zeros(3, np.float32))
    for thing in (
        value.tolist(), tuple(value), np.ma.asarray(value), memoryview(value), 1.5, "x",
        np.float32(1), {}, object(),
    ):  # fmt: skip
        with pytest.raises(TypeError) as caught:
            call(op, **{**given, name: thing})
        hint = f"; pass np.asarray({name})" if isinstance(thing, list | tuple) else ""
        assert str(caught.value) == f"{op}: {name} must be a NumPy or CuPy array, got {type(thing).__name__}{hint}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
@pytest.mark.parametrize(
    "dtype",
    ["uint16", "uint32", "uint64", "bool", "O", "U2", "S2", "V4", np.longdouble, np.clongdouble, "M8[s]", "f4,f4"],
)
def test_other_dtypes_are_refused(op: str, name: str, dtype: Any) -> None:
    given = {**arrays(op), name: np.zeros(VALID[op][name], dtype)}
    with pytest.raises(TypeError) as caught:
        call(op, **given)
    allowed = ", ".join(f'"{name}"' for name in (*DTYPES, *INTEGERS[:-1]))
    assert str(caught.value) == (
        f'{op}: {name} must have one of the dtypes {allowed} and "{INTEGERS[-1]}", got {np.dtype(dtype)}'
    )


def test_unknown_precisions_are_refused() -> None:
    square = draw((4, 4, 10))
    for function in (gpuconv.conv1d, gpuconv.conv_transpose1d):
        with pytest.raises(ValueError, match=r': precision must be one of "float32" and "tf32", got \'float16\'$'):
            function(square, square, precision="float16")
        with pytest.raises(ValueError, match=r': precision "tf32" rounds float32 data; .* for float64, got "tf32"$'):
            function(square.astype("f8"), square.astype("f8"), precision="tf32")


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    jobs: list[tuple[str, dict[str, Any]]] = []
    for dtype in ("float32", "float16", "complex64"):
        jobs.append(("conv1d", {**arrays("conv1d", dtype), **SETTINGS["conv1d"]}))
        jobs.append(("conv_transpose1d", {**arrays("conv_transpose1d", dtype), **SETTINGS["conv_transpose1d"]}))
        jobs.append(
            ("conv1d", {"input": draw((4, 16, 300), dtype), "weight": draw((16, 16, 9), dtype), "padding": "same"})
        )
        jobs.append(("conv1d", {"input": draw((4, 16, 300), dtype), "weight": draw((16, 1, 9), dtype), "groups": 16}))
    expected = [call(op, **arguments) for op, arguments in jobs]

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for i in rng.permutation(len(jobs)):
            op, arguments = jobs[i]
            out = np.full_like(expected[i], np.nan) if rng.integers(2) else None
            np.testing.assert_array_equal(call(op, **arguments, out=out), expected[i])

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(16)]:
            future.result()


def test_importing_and_convolving_need_neither_cupy_nor_ml_dtypes() -> None:
    script = """
import sys
import numpy as np
import gpuconv
gpuconv.conv1d(np.ones((1, 1, 5)), np.ones((1, 1, 3)))
gpuconv.nn.Conv1d(2, 3, 3)(np.ones((2, 9), np.float32))
print([name for name in ("cupy", "cupy_backends", "ml_dtypes", "scipy", "rich", "torch") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(gpuconv.__file__).parents[1],
    )
    assert result.stdout == "[]\n"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[ConvProblem]:
    """The problems for which plans are made, in order: a call that adds nothing found its plan in the cache."""
    made = []
    make_executor = runtime.make_executor

    def recording(problem: ConvProblem, *args: Any, **options: Any) -> runtime.Executor:
        made.append(problem)
        return make_executor(problem, *args, **options)

    monkeypatch.setattr(runtime, "make_executor", recording)
    return made


def on_device(cupy: Any, given: dict[str, Array]) -> dict[str, Any]:
    return {name: cupy.asarray(array) for name, array in given.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_cupy_gives_the_same_as_numpy(cupy: Any, op: str, dtype: str) -> None:
    given = arrays(op, dtype)
    output = call(op, **on_device(cupy, given), **SETTINGS[op])
    assert isinstance(output, cupy.ndarray)
    assert output.flags.c_contiguous
    assert output.dtype == numpy_dtype(dtype)
    np.testing.assert_array_equal(output.get(), call(op, **given, **SETTINGS[op]))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_a_repeated_call_finds_its_plan(cupy: Any, planned: list[ConvProblem], launched: list[str], op: str) -> None:
    given = arrays(op)
    expected = call(op, **given, **SETTINGS[op])
    for _ in range(3):  # fresh arrays with fresh values, of the same make
        np.testing.assert_array_equal(call(op, **on_device(cupy, given), **SETTINGS[op]).get(), expected)
        given = {name: -array for name, array in given.items()}
        expected = call(op, **given, **SETTINGS[op])
    assert len(planned) == 1
    assert launched
    assert launched == launched[: len(launched) // 3] * 3


@pytest.mark.gpu
def test_a_plan_serves_only_what_it_was_made_for(cupy: Any, planned: list[ConvProblem]) -> None:
    """Each of these calls differs from the first in one thing that a plan depends on."""
    given = arrays("conv1d")
    x, weight, bias = (cupy.asarray(array) for array in given.values())
    plain = call("conv1d", **given, groups=2)

    def is_planned(expected: Array, *args: Any, **settings: Any) -> None:
        before = len(planned)
        for _ in range(2):
            np.testing.assert_array_equal(gpuconv.conv1d(*args, **settings).get(), expected)
        assert len(planned) == before + 1

    is_planned(plain, x, weight, bias, groups=2)
    is_planned(call("conv1d", given["input"], given["weight"], groups=2), x, weight, groups=2)
    is_planned(plain[0], x[0], weight, bias, groups=2)
    is_planned(plain[:1], x[:1], weight, bias, groups=2)
    is_planned(plain[:, :, 1:], x[:, :, 1:], weight, bias, groups=2)
    is_planned(plain[:, :, ::2], x, weight, bias, groups=2, stride=2)
    is_planned(plain, cupy.asarray(np.ascontiguousarray(given["input"].T)).T, weight, bias, groups=2)
    is_planned(plain, x, cupy.asarray(np.ascontiguousarray(given["weight"].T)).T, bias, groups=2)
    is_planned(plain, x, weight, bias, groups=2, out=cupy.empty(plain.shape, np.float32))
    is_planned(plain, x, weight, bias, groups=2, out=cupy.empty(plain.shape[::-1], np.float32).T)
    shifted = cupy.empty((x.size + 1,), np.float32)[1:].reshape(*x.shape)  # contiguous, but 4 bytes off a vector
    shifted[...] = x
    is_planned(plain, shifted, weight, bias, groups=2)
    assert shifted.strides == x.strides
    is_planned(
        call("conv1d", *(array.astype(np.float64) for array in given.values()), groups=2),
        *(array.astype(np.float64) for array in (x, weight, bias)),
        groups=2,
    )


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_a_plan_serves_one_gpu(cupy: Any, planned: list[ConvProblem]) -> None:
    given = arrays("conv1d")
    expected = call("conv1d", **given, groups=2)
    for made, index in ((1, 0), (2, 1), (2, 0)):
        with cupy.cuda.Device(index):
            np.testing.assert_array_equal(gpuconv.conv1d(**on_device(cupy, given), groups=2).get(), expected)
        assert len(planned) == made


@pytest.mark.gpu
def test_settings_find_one_plan_however_they_are_written(cupy: Any, planned: list[ConvProblem]) -> None:
    given = on_device(cupy, arrays("conv1d"))
    for stride, padding in ((2, (1, 1)), (np.int64(2), [1, 1]), (np.uint8(2), (np.int32(1), 1))):
        gpuconv.conv1d(**given, stride=stride, padding=padding, groups=2)
    assert len(planned) == 1
    for dilation in ((1,), [1], [np.int8(1)]):
        gpuconv.conv1d(**given, stride=2, padding=(1, 1), dilation=dilation, groups=2)
    assert len(planned) == 2
    layer = nn.Conv1d(4, 6, 3, stride=2, padding=1, device="cuda")
    for _ in range(3):
        layer(given["input"])
    assert len(planned) == 3


class Count:
    """An integer by `__index__` alone: accepted, and planned anew each time."""

    def __index__(self) -> int:
        return 2


@pytest.mark.gpu
def test_exotic_integers_are_accepted_without_a_plan_of_their_own(cupy: Any, planned: list[ConvProblem]) -> None:
    given = arrays("conv1d")
    expected = call("conv1d", **given, groups=2, stride=2)
    for _ in range(2):
        output = gpuconv.conv1d(**on_device(cupy, given), groups=2, stride=Count())  # type: ignore[arg-type]
        np.testing.assert_array_equal(output.get(), expected)
    assert len(planned) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [True, np.True_, 1.0, np.float32(1), (True,), [1.0], "1", None], ids=repr)
@pytest.mark.parametrize("name", ["stride", "dilation", "groups", "padding"])
def test_what_equals_a_cached_setting_is_still_refused(cupy: Any, name: str, bad: Any) -> None:
    given = on_device(cupy, {"input": draw((2, 4, 10)), "weight": draw((6, 4, 3))})
    gpuconv.conv1d(**given, **{name: 1})
    gpuconv.conv1d(**given, **{name: (1,) if name != "groups" else 1})
    with pytest.raises((TypeError, ValueError), match=f"^conv1d: {name} must be"):
        gpuconv.conv1d(**given, **{name: bad})


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_the_plan_cache_is_bounded(
    cupy: Any, planned: list[ConvProblem], monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    monkeypatch.setattr(caches, "SIZE", 3)
    weight = cupy.asarray(draw(VALID[op]["weight"]))
    inputs = [cupy.asarray(draw((1, 4, length))) for length in range(10, 16)]
    for x in inputs:
        call(op, x, weight, groups=2)
        assert len(calls._EXECUTORS) <= 3
    assert len(planned) == 6
    for x in inputs[3:]:
        call(op, x, weight, groups=2)
    assert len(planned) == 6
    call(op, inputs[0], weight, groups=2)
    assert len(planned) == 7


@pytest.mark.gpu
def test_concurrent_calls_share_a_small_plan_cache(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "SIZE", 2)
    weight = draw((2, 2, 3))
    inputs = [draw((1, 2, length), seed=length) for length in range(4, 10)]
    expected = [gpuconv.conv1d(x, weight) for x in inputs]

    def work(i: int) -> None:
        i %= len(inputs)
        output = gpuconv.conv1d(cupy.asarray(inputs[i]), cupy.asarray(weight))
        np.testing.assert_array_equal(output.get(), expected[i])

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, i) for i in range(60)]:
            future.result()
    assert len(calls._EXECUTORS) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_out_on_a_gpu_must_not_overlap_an_input_cached_or_not(
    cupy: Any, planned: list[ConvProblem], op: str, name: str
) -> None:
    given = arrays(op)
    expected = call(op, **given, **SETTINGS[op])
    inputs = on_device(cupy, given)
    length = 128 + -(-given[name].size // 4) * 4  # whole 16 bytes, so that all of `out` below share one plan
    memory = cupy.empty((2 * length + expected.size,), np.float32)
    inside = memory[length : length + given[name].size].reshape(*given[name].shape)
    inside[...] = inputs[name]
    inputs[name] = inside

    def out_at(start: int) -> Any:
        return memory[start : start + expected.size].reshape(*expected.shape)

    def refused(out: Any) -> None:
        with pytest.raises(ValueError, match=f"^{op}: out must not overlap {name}, but they share memory$"):
            call(op, **inputs, **SETTINGS[op], out=out)
        np.testing.assert_array_equal(inside.get(), given[name])

    refused(out_at(length))
    behind = out_at(length + length - 128)
    np.testing.assert_array_equal(call(op, **inputs, **SETTINGS[op], out=behind).get(), expected)
    assert len(planned) == 1
    refused(out_at(length))
    refused(out_at(length + 4 * ((given[name].size - 1) // 4)))
    assert len(planned) == 1


@pytest.mark.gpu
def test_a_wrong_out_on_a_gpu_is_refused(cupy: Any) -> None:
    given = on_device(cupy, {"input": draw((2, 4, 10)), "weight": draw((6, 4, 3))})

    def refused(out: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match="^" + re.escape(f"conv1d: {says}") + "$"):
            gpuconv.conv1d(**given, out=out)

    shape = (2, 6, 8)
    gpuconv.conv1d(**given, out=cupy.empty(shape, np.float32))
    refused(cupy.empty((2, 6, 9), np.float32), ValueError, "out must have shape (2, 6, 8), got (2, 6, 9)")
    refused(cupy.empty(shape), TypeError, "out must have the dtype of input, float32, got float64")
    one_kind = "all arrays must be of one kind and on one device"
    one_row = cupy.ndarray(shape, np.float32, cupy.empty(2 * 48, np.float32).data, (192, 0, 4))
    refused(one_row, ValueError, "out must not overlap itself, got strides (192, 0, 4) for shape (2, 6, 8)")
    refused(
        np.empty(shape, np.float32),
        TypeError,
        f"{one_kind}, got input as a CuPy array on device 0 and out as a NumPy array",
    )
    if runtime.device_count() > 1:
        with cupy.cuda.Device(1):
            elsewhere = cupy.empty(shape, np.float32)
        refused(
            elsewhere,
            TypeError,
            f"{one_kind}, got input as a CuPy array on device 0 and out as a CuPy array on device 1",
        )


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_arrays_of_two_kinds_or_devices_are_refused(cupy: Any, op: str, name: str) -> None:
    given = arrays(op)
    kinds = {"NumPy array": given, "CuPy array on device 0": on_device(cupy, given)}
    if runtime.device_count() > 1:
        with cupy.cuda.Device(1):
            kinds["CuPy array on device 1"] = on_device(cupy, given)
    call(op, **kinds["CuPy array on device 0"], **SETTINGS[op])
    base = f"^{op}: all arrays must be of one kind and on one device, got input as a "
    second = "weight" if name == "input" else name  # the first array that differs from input
    for most, odd in itertools.permutations(kinds, 2):
        first, then = (odd, most) if name == "input" else (most, odd)
        host = "input" if first == "NumPy array" else second if then == "NumPy array" else None
        hint = "" if host is None else rf"; pass cupy\.asarray\({host}\)"
        with pytest.raises(TypeError, match=f"{base}{first} and {second} as a {then}{hint}$"):
            call(op, **{**kinds[most], name: kinds[odd][name]}, **SETTINGS[op])
    assert cupy.cuda.Device().id == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_numpy_arrays_beside_a_cupy_input_are_refused_whatever_their_dtype(cupy: Any, name: str, dtype: str) -> None:
    given = arrays("conv1d")
    wrong = given[name].astype(numpy_dtype(dtype) if dtype == "bfloat16" else dtype)
    with pytest.raises(TypeError, match=f"input as a CuPy array on device 0 and {name} as a NumPy array"):
        gpuconv.conv1d(**{**on_device(cupy, given), name: wrong}, groups=2)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("op", OPS)
def test_the_device_of_the_arrays_is_used_and_the_current_one_restored(cupy: Any, op: str) -> None:
    """A GPU that launched another's kernel, or read another's memory, would fail."""
    given = arrays(op)
    expected = call(op, **given, **SETTINGS[op])
    for index in (1, 0):
        with cupy.cuda.Device(index):
            inputs = on_device(cupy, given)
        for _ in range(2):
            output = call(op, **inputs, **SETTINGS[op])
            assert output.device.id == index
            np.testing.assert_array_equal(output.get(), expected)
        with pytest.raises(ValueError, match="stride must be at least 1"):
            call(op, **inputs, stride=0)
        assert cupy.cuda.runtime.getDevice() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_strided_views_are_read_and_written_in_place(cupy: Any, launched: list[str], op: str) -> None:
    given = arrays(op)
    expected = call(op, **given, **SETTINGS[op])
    views = {
        "input": cupy.asarray(np.ascontiguousarray(given["input"].transpose(2, 0, 1)[::-1])).transpose(1, 2, 0),
        "weight": cupy.asarray(np.ascontiguousarray(given["weight"].T)).T,
        "bias": cupy.asarray(np.repeat(given["bias"], 2))[::2],
    }
    views["input"] = views["input"][:, :, ::-1]
    whole = cupy.full((*expected.shape[:-1], 2 * expected.shape[-1]), 7, np.float32)
    out = whole[:, :, ::-2]
    with cupy.cuda.using_allocator(lambda num_bytes: pytest.fail(f"{num_bytes} bytes were allocated")):
        assert call(op, **views, **SETTINGS[op], out=out, algorithm="base") is out
    assert launched == [BASE[op]]
    np.testing.assert_array_equal(out.get(), expected)
    assert (whole[:, :, ::2] == 7).all()


@pytest.mark.gpu
def test_empty_outputs_are_not_launched(cupy: Any, launched: list[str]) -> None:
    empty = cupy.empty((0, 4, 10), np.float32)
    assert gpuconv.conv1d(empty, cupy.asarray(draw((6, 4, 3)))).shape == (0, 6, 8)
    assert gpuconv.conv_transpose1d(empty, cupy.asarray(draw((4, 6, 3)))).shape == (0, 6, 12)
    assert gpuconv.conv1d(cupy.asarray(draw((2, 4, 10))), cupy.empty((0, 4, 3), np.float32)).shape == (2, 0, 8)
    assert launched == []


@pytest.mark.gpu
def test_empty_sums_on_a_gpu_are_the_bias(cupy: Any) -> None:
    bias = draw((6,))
    output = gpuconv.conv1d(cupy.empty((2, 0, 10), np.float32), cupy.empty((6, 0, 3), np.float32), cupy.asarray(bias))
    np.testing.assert_array_equal(output.get(), np.broadcast_to(bias[:, None], (2, 6, 8)))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_without_a_gpu_cupy_arrays_say_so(cupy: Any, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    def no_device() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")

    inputs = on_device(cupy, arrays(op))
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", no_device)
    with pytest.raises(RuntimeError) as caught:
        call(op, **inputs, **SETTINGS[op])
    assert str(caught.value) == (
        f"{op}: input is a CuPy array, but no GPU answers: cudaErrorInsufficientDriver: CUDA driver version is "
        "insufficient for CUDA runtime version"
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "changes", "error"), [pytest.param(*p.values[:3], id=p.id) for p in POSSIBLE_BAD_CALLS])
def test_errors_are_the_same_on_both_devices(
    cupy: Any, op: str, changes: dict[str, Any], error: type[Exception]
) -> None:
    arguments = {**VALID[op], **changes}
    shapes = {name: arguments.pop(name) for name in ("input", "weight", "bias")}
    messages = []
    for module in (np, cupy):
        ones = {
            name: None if shape is None else module.broadcast_to(module.ones((), np.float32), shape)
            for name, shape in shapes.items()
        }
        with pytest.raises(error) as caught:
            call(op, **ones, **arguments)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("op", OPS)
def test_algorithms_are_checked_on_numpy_arrays_and_have_no_effect(op: str) -> None:
    given = {**arrays(op), "groups": 2}
    plain = call(op, **given)
    for algorithm in (None, "base", BASE[op], f"{op}_depthwise"):
        assert call(op, **given, algorithm=algorithm).tobytes() == plain.tobytes()
    other = BASE[OPS[1 - OPS.index(op)]]
    with pytest.raises(ValueError, match=f"^{op}: algorithm must be None or one of base, {op}_.*, got '{other}'$"):
        call(op, **given, algorithm=other)
    with pytest.raises(TypeError, match=f"^{op}: algorithm must be None or one of base, .*, got int 1$"):
        call(op, **given, algorithm=1)
