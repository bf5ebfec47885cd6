"""The layers: PyTorch's constructor, attributes, printed form, initial distribution and state, on NumPy arrays."""

from __future__ import annotations

import copy
import inspect
import math
import re
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import gpuconv
from gpuconv import nn, reference, runtime
from gpuconv.problem import DTYPES, ConvProblem, numpy_dtype
from gpuconv.text import install_hint
from tests.api.test_problem import BAD, OPS

LAYERS = ("Conv1d", "ConvTranspose1d")

# Arguments that PyTorch's layer of the same name accepts too.
SHARED = {
    "Conv1d": [
        ((16, 33, 3), {}),
        ((16, 33, 3), {"stride": 2}),
        ((16, 33, (3,)), {"stride": (2,)}),
        ((4, 6, 5), {"padding": 2}),
        ((4, 6, 5), {"padding": (2,), "bias": False}),
        ((4, 6, 5), {"padding": "same"}),
        ((4, 6, 5), {"padding": "valid", "dilation": 3}),
        ((4, 6, 1), {"groups": 2}),
        ((4, 4, 7, 3, 2, 2, 4, False), {}),
        ((4, 8, 2, 1, 0, 1, 4, True, "zeros"), {}),
        ((1, 1, 1), {"stride": 5, "padding": 0, "dilation": 1, "groups": 1, "bias": True, "padding_mode": "zeros"}),
        ((3, 9, 10), {"stride": 5, "padding": 4, "dilation": 2, "groups": 3, "bias": False}),
    ],
    "ConvTranspose1d": [
        ((33, 16, 3), {}),
        ((33, 16, 3), {"stride": 2}),
        ((33, 16, (4,)), {"stride": (4,), "padding": (1,)}),
        ((6, 4, 5), {"stride": 3, "output_padding": 2}),
        ((6, 4, 5), {"stride": 3, "output_padding": (1,), "bias": False}),
        ((6, 4, 5), {"dilation": 3, "output_padding": 2}),
        ((6, 4, 1), {"groups": 2}),
        ((4, 4, 7, 3, 2, 2, 4, False, 2), {}),
        ((4, 8, 2, 1, 0, 0, 4, True, 1, "zeros"), {}),
        ((1, 1, 1), {"stride": 5, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1, "bias": True}),
        ((9, 3, 10), {"stride": 5, "padding": 4, "output_padding": 1, "dilation": 2, "groups": 3}),
        ((2, 2, 16, 8, 4), {}),
    ],
}
SHARED_CALLS = [pytest.param(name, *call, id=f"{name}-{i}") for name in LAYERS for i, call in enumerate(SHARED[name])]


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if "complex" in dtype else values).astype(numpy_dtype(dtype))


def test_the_example_of_the_documentation() -> None:
    from gpuconv import nn

    m = nn.Conv1d(16, 33, 3, stride=2)
    input = np.random.default_rng(0).standard_normal((20, 16, 50), dtype=np.float32)  # noqa: A001 (verbatim)
    output = m(input)
    assert output.shape == (20, 33, 24)
    assert gpuconv.nn is nn


@pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose1d"])
def test_precision(name: str) -> None:
    m = getattr(nn, name)(4, 6, 3, precision="tf32")
    assert "precision=tf32" in repr(m)
    assert m(np.ones((1, 4, 8), np.float32)).dtype == np.float32
    with pytest.raises(ValueError, match=rf'^{name}: precision "tf32" rounds float32 data; .* for float64'):
        getattr(nn, name)(4, 6, 3, dtype="float64", precision="tf32")


@pytest.mark.torch
@pytest.mark.parametrize("name", LAYERS)
def test_constructor_arguments_and_defaults_are_pytorchs(name: str) -> None:
    import torch

    ours = inspect.signature(getattr(nn, name)).parameters
    theirs = inspect.signature(getattr(torch.nn, name)).parameters
    own = ("rng", "precision", "algorithm", "activation", "input_activation")
    assert [(p.name, p.default, p.kind) for p in ours.values() if p.name not in own] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)


@pytest.mark.torch
@pytest.mark.parametrize(("name", "args", "kwargs"), SHARED_CALLS)
def test_layers_print_as_pytorchs(name: str, args: Any, kwargs: Any) -> None:
    import torch

    assert repr(getattr(nn, name)(*args, **kwargs)) == repr(getattr(torch.nn, name)(*args, **kwargs))


def test_what_pytorch_lacks_prints_in_its_manner() -> None:
    assert repr(nn.Conv1d(1, 2, 3, padding=(2, 0))) == "Conv1d(1, 2, kernel_size=(3,), stride=(1,), padding=(2, 0))"
    assert repr(nn.Conv1d(1, 2, 3, padding="causal")) == "Conv1d(1, 2, kernel_size=(3,), stride=(1,), padding=causal)"
    assert repr(nn.Conv1d(1, 2, 3, padding=[0, 0])) == "Conv1d(1, 2, kernel_size=(3,), stride=(1,))"
    assert repr(nn.ConvTranspose1d(1, 2, 3, 2, padding="same")) == (
        "ConvTranspose1d(1, 2, kernel_size=(3,), stride=(2,), padding=same)"
    )


@pytest.mark.torch
@pytest.mark.parametrize(("name", "args", "kwargs"), SHARED_CALLS)
def test_attributes_are_pytorchs(name: str, args: Any, kwargs: Any) -> None:
    import torch

    ours, theirs = getattr(nn, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
    for attribute in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
        "groups", "padding_mode",
    ):  # fmt: skip
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
        assert type(getattr(ours, attribute)) is type(getattr(theirs, attribute)), attribute
    assert ours.weight.shape == tuple(theirs.weight.shape)
    assert (None if ours.bias is None else ours.bias.shape) == (
        None if theirs.bias is None else tuple(theirs.bias.shape)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.weight.dtype == np.float32


@pytest.mark.torch
@pytest.mark.parametrize(("name", "args", "kwargs"), SHARED_CALLS)
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batched", "single"])
def test_outputs_are_pytorchs(name: str, args: Any, kwargs: Any, batch: tuple[int, ...]) -> None:
    import torch

    theirs = getattr(torch.nn, name)(*args, **kwargs, dtype=torch.float64)
    ours = getattr(nn, name)(*args, **kwargs, dtype="float64")
    ours.load_state_dict(theirs.state_dict())
    x = normal((*batch, ours.in_channels, 23), "float64")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "L_in", "L_out"),
    [
        (nn.Conv1d(4, 6, 3, padding=(2, 1)), 10, 11),
        (nn.Conv1d(4, 6, 3, 2, padding="causal", dilation=2), 10, 5),
        (nn.Conv1d(4, 6, 4, 3, padding="same", groups=2), 10, 4),
        (nn.ConvTranspose1d(4, 6, 3, 2, padding=(1, 0)), 10, 20),
        (nn.ConvTranspose1d(4, 6, 5, 3, padding="same", bias=False), 10, 30),
    ],
    ids=repr,
)
def test_paddings_beyond_pytorchs_convolve(layer: Any, L_in: int, L_out: int) -> None:
    x = normal((2, 4, L_in))
    y = layer(x)
    assert y.shape == (2, 6, L_out)
    np.testing.assert_array_equal(layer.forward(x), y)
    settings = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    problem = ConvProblem.of(layer.op, x, layer.weight, layer.bias, **settings)
    assert reference.within_bound(problem, y, x, layer.weight, layer.bias).all()


OUTPUT_SIZES = [11, 12, (13,), [11], np.int64(13), (2, 6, 13), [99, 1, 12]]


@pytest.mark.parametrize("output_size", OUTPUT_SIZES)
def test_output_size_at_the_call(output_size: Any) -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, output_padding=1)
    x = normal((2, 4, 5))
    wanted = np.ravel(output_size)[-1]
    y = layer(x, output_size)
    assert y.shape == (2, 6, wanted)
    np.testing.assert_array_equal(layer.forward(x, output_size=output_size), y)
    single = layer(x[0], output_size if np.size(output_size) == 1 else output_size[1:])
    np.testing.assert_array_equal(single, y[0])


@pytest.mark.torch
@pytest.mark.parametrize("output_size", OUTPUT_SIZES)
def test_output_size_at_the_call_is_pytorchs(output_size: Any) -> None:
    import torch

    layer = nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, output_padding=1)
    x = normal((2, 4, 5))
    theirs = torch.nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, output_padding=1)
    theirs.load_state_dict({key: torch.from_numpy(array) for key, array in layer.state_dict().items()})
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x), [int(v) for v in np.ravel(output_size)]).numpy()
    np.testing.assert_allclose(layer(x, output_size), expected, rtol=1e-5, atol=1e-5)


def test_output_size_out_of_range_prints_the_range() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2)
    with pytest.raises(ValueError, match=r"conv_transpose1d: output_size must be from 11 to 13 .* got 14"):
        layer(normal((2, 4, 5)), output_size=14)
    with pytest.raises(ValueError, match=r"output_size must be .* a sequence of one int, got 2 values: \(6, 12\)"):
        layer(normal((2, 4, 5)), output_size=(6, 12))


def test_calls_are_checked_like_the_functions() -> None:
    layer = nn.Conv1d(4, 6, 3)
    with pytest.raises(TypeError, match="must share one dtype, got input float64, weight float32, bias float32"):
        layer(normal((2, 4, 5), "float64"))
    with pytest.raises(ValueError, match="input has C_in = 5 channels, but weight"):
        layer(normal((2, 5, 9)))
    with pytest.raises(TypeError, match="input must be a NumPy or CuPy array, got list"):
        layer([[1.0, 2.0, 3.0]])


def test_parameters_and_settings_may_be_assigned() -> None:
    layer = nn.Conv1d(1, 1, 3)
    layer.weight = np.ones((1, 1, 2), np.float32)
    layer.bias = None
    layer.stride = (2,)
    np.testing.assert_array_equal(layer(np.arange(6, dtype=np.float32).reshape(1, 1, 6)), [[[1, 5, 9]]])


def test_layers_copy_and_pickle_deeply() -> None:
    layer = nn.ConvTranspose1d(4, 6, 3, padding="same", rng=0)
    twin = copy.deepcopy(layer)
    twin.weight[:] = 0
    assert layer.weight.all()
    assert repr(twin) == repr(layer)


BAD_FOR_BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"in_channels": -1}, ValueError, "in_channels must be at least 0, got -1"),
    ({"in_channels": 4.0}, TypeError, "in_channels must be an int, got float 4.0"),
    ({"in_channels": True}, TypeError, "in_channels must be an int, got the bool True"),
    ({"out_channels": -6}, ValueError, "out_channels must be at least 0, got -6"),
    ({"out_channels": "6"}, TypeError, "out_channels must be an int, got str '6'"),
    ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    ({"kernel_size": (3, 3)}, ValueError, "kernel_size must be an int or a sequence of one int, got 2 values: (3, 3)"),
    ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int or a sequence of one int, got float 3.0"),
    ({"groups": 4}, ValueError, "groups must divide the output channels, got groups = 4 and C_out = 6"),
    ({"bias": 1}, TypeError, "bias must be True or False, got int 1"),
    ({"bias": None}, TypeError, "bias must be True or False, got NoneType None"),
    ({"padding_mode": "wrap"}, ValueError, 'padding_mode must be one of "zeros", "reflect",'),
    ({"device": "gpu"}, ValueError, 'device must be "cpu", "cuda" or "cuda:" and an index, got "gpu"'),
    ({"device": "cuda:-1"}, ValueError, 'device must be "cpu", "cuda" or "cuda:" and an index, got "cuda:-1"'),
    ({"device": 0}, TypeError, 'device must be "cpu", "cuda" or "cuda:" and an index, got int 0'),
    ({"dtype": "int32"}, TypeError, f"dtype must be one of {', '.join(DTYPES)}, got 'int32'"),
    ({"dtype": np.longdouble}, TypeError, "dtype must be one of float16, bfloat16,"),
    ({"dtype": "nonsense"}, TypeError, "got 'nonsense'"),
    ({"rng": -1}, ValueError, "rng must be at least 0, got -1"),
    ({"rng": 1.5}, TypeError, "rng must be an int seed or a numpy.random.Generator, got float 1.5"),
    (
        {"rng": np.random.RandomState(0)},
        TypeError,
        "rng must be an int seed or a numpy.random.Generator, got RandomState",
    ),
    ({"in_channels": 2**40, "out_channels": 2**40}, ValueError, "weight of shape (1099511627776, 1099511627776, 3)"),
]


def bad_calls() -> Iterator[Any]:
    """The id is the message: the printed form of an argument may hold an address, but all processes need equal ids."""
    for name, op in zip(LAYERS, OPS, strict=True):
        for changes, error, says in BAD_FOR_BOTH:
            yield pytest.param(name, changes, error, (says,), id=f"{name}-{says}")
        for about, (changes, error, parts) in BAD[op].items():
            of_lengths = ("input", "weight", "bias", "output_size")
            if not changes.keys() & {*of_lengths} and "length" not in about and "longer" not in about:
                yield pytest.param(name, changes, error, parts, id=f"{name}-{about}")


@pytest.mark.parametrize(("name", "changes", "error", "says"), list(bad_calls()))
def test_bad_settings_are_refused(
    name: str, changes: dict[str, Any], error: type[Exception], says: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        getattr(nn, name)(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **changes})
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{name}: ")
    assert [part for part in says if part not in str(caught.value)] == []


@pytest.mark.torch
@pytest.mark.parametrize("name", LAYERS)
def test_pytorchs_dtypes_are_refused(name: str) -> None:
    import torch

    with pytest.raises(TypeError, match=r"^Conv.*: dtype must be one of .*, got torch\.float32$"):
        getattr(nn, name)(4, 6, 3, dtype=torch.float32)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("groups", [1, 4])
def test_parameters_are_drawn_from_pytorchs_distribution(name: str, groups: int) -> None:
    """Weight and bias against the uniform distribution."""
    ours = getattr(nn, name)(48, 512, 5, groups=groups, rng=1)
    assert_uniform(ours.state_dict(), bound=1 / math.sqrt(ours.weight.shape[1] * 5))


def assert_uniform(state: dict[str, Any], bound: float) -> None:
    for array in state.values():
        values = array.ravel().astype(np.float64)
        assert abs(values).max() <= bound * (1 + 2**-23)
        assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_fixes_the_parameters_up_to_rounding(name: str, dtype: str) -> None:
    layer, twin = (getattr(nn, name)(3, 4, 5, dtype=dtype, rng=7) for _ in range(2))
    other = getattr(nn, name)(3, 4, 5, dtype=dtype, rng=8)
    wide = getattr(nn, name)(3, 4, 5, dtype="complex128" if "complex" in dtype else "float64", rng=7)
    for key, array in layer.state_dict().items():
        assert array.dtype == numpy_dtype(dtype)
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, twin.state_dict()[key])
        np.testing.assert_array_equal(array, wide.state_dict()[key].astype(array.dtype))
        assert (array != other.state_dict()[key]).any()


def test_a_generator_is_used_and_advances() -> None:
    generator = np.random.default_rng(7)
    first, second = (nn.Conv1d(3, 4, 5, rng=generator) for _ in range(2))
    np.testing.assert_array_equal(first.weight, nn.Conv1d(3, 4, 5, rng=7).weight)
    assert (first.weight != second.weight).all()


def test_without_a_seed_layers_differ() -> None:
    assert (nn.Conv1d(3, 4, 5).weight != nn.Conv1d(3, 4, 5).weight).any()


@pytest.mark.parametrize("name", LAYERS)
def test_complex_parts_are_each_uniform_and_independent(name: str) -> None:
    weight = getattr(nn, name)(40, 40, 5, dtype="complex128", rng=3).weight.ravel()
    bound = 1 / math.sqrt(200)
    for part in (weight.real, weight.imag):
        assert stats.kstest(part, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(weight.real, weight.imag)[0, 1]) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_layers_without_channels_exist(dtype: str) -> None:
    x = np.ones((2, 0, 10), dtype)
    layer = nn.Conv1d(0, 6, 3, dtype=dtype)
    assert (layer.weight.shape, layer.bias.tolist()) == ((6, 0, 3), [0] * 6)
    np.testing.assert_array_equal(layer(x), np.zeros((2, 6, 8)))
    assert nn.Conv1d(4, 0, 3, dtype=dtype)(np.ones((2, 4, 10), dtype)).shape == (2, 0, 8)
    assert nn.ConvTranspose1d(0, 6, 3, dtype=dtype)(x).shape == (2, 6, 12)


BFLOAT16 = numpy_dtype("bfloat16")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((name, name) for name in DTYPES),
        (np.float16, "float16"),
        (np.dtype(np.complex64), "complex64"),
        (np.dtype(">f4"), "float32"),
        ("f8", "float64"),
        (float, "float64"),
        (BFLOAT16, "bfloat16"),
        (BFLOAT16.type, "bfloat16"),
    ],
    ids=str,
)
def test_dtypes_may_be_names_or_dtypes(dtype: Any, name: str) -> None:
    layer = nn.Conv1d(2, 3, 2, dtype=dtype, device="cpu")
    assert layer.weight.dtype == layer.bias.dtype == numpy_dtype(name)
    assert layer.weight.dtype.isnative
    assert layer(normal((2, 9), name)).dtype == numpy_dtype(name)
    converted = nn.Conv1d(2, 3, 2, rng=0)
    assert converted.to(dtype=dtype) is converted
    assert converted.weight.dtype == converted.bias.dtype == numpy_dtype(name)


def test_to_keeps_what_it_is_not_asked_to_change() -> None:
    layer = nn.Conv1d(2, 3, 2, dtype="float64", bias=False)
    weight = layer.weight
    assert layer.to() is layer
    assert layer.to("cpu").weight is weight
    assert layer.to(device="cpu", dtype="float64").weight is weight
    layer.to(dtype="float16")
    assert layer.bias is None
    np.testing.assert_array_equal(layer.weight, weight.astype(np.float16))


def test_to_does_not_drop_imaginary_parts() -> None:
    layer = nn.Conv1d(2, 3, 2, dtype="complex64")
    weight = layer.weight
    with pytest.raises(
        TypeError, match=r"^Conv1d.to: dtype must be complex, because weight is complex64; got float32$"
    ):
        layer.to(dtype="float32")
    assert layer.weight is weight
    assert layer.to(dtype="complex128").weight.dtype == np.complex128


def printed_by(script: str) -> str:
    """What a script prints in a new interpreter."""
    root = Path(gpuconv.__file__).parents[1]
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root).stdout


def test_bfloat16_without_ml_dtypes_says_what_to_install() -> None:
    script = """
import sys
sys.modules["ml_dtypes"] = None
from gpuconv import nn
try:
    nn.Conv1d(1, 1, 1, dtype="bfloat16")
except ModuleNotFoundError as error:
    print(error)
"""
    assert printed_by(script) == (
        "dtype \"bfloat16\" needs the package ml_dtypes: pip install -e '.[bf16]' in a checkout of gpuconv\n"
    )


def test_a_gpu_without_cupy_says_what_to_install() -> None:
    script = """
import sys
sys.modules["cupy"] = None
from gpuconv import nn
for make in (lambda: nn.Conv1d(1, 1, 1, device="cuda"), lambda: nn.Conv1d(1, 1, 1).to("cuda:1")):
    try:
        make()
    except ModuleNotFoundError as error:
        print(error)
"""
    assert printed_by(script) == (
        f'Conv1d: device "cuda" needs the package CuPy: {install_hint("cuda13", "cuda12")}\n'
        f'Conv1d.to: device "cuda:1" needs the package CuPy: {install_hint("cuda13", "cuda12")}\n'
    )


def test_state_dict_holds_the_layers_own_arrays() -> None:
    layer = nn.Conv1d(2, 3, 2)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    assert state["weight"] is layer.weight
    assert state["bias"] is layer.bias
    assert list(nn.Conv1d(2, 3, 2, bias=False).state_dict()) == ["weight"]


@pytest.mark.parametrize("name", LAYERS)
def test_states_travel_between_layers_by_copy(name: str) -> None:
    source, target = getattr(nn, name)(2, 3, 4, rng=0), getattr(nn, name)(2, 3, 4, rng=1)
    assert target.load_state_dict(source.state_dict()) == ([], [])
    np.testing.assert_array_equal(target.weight, source.weight)
    np.testing.assert_array_equal(target.bias, source.bias)
    target.weight[...] = 0
    target.bias[...] = 0
    assert source.weight.all()
    assert source.bias.all()


def test_states_load_from_files(tmp_path: Path) -> None:
    source, target = nn.Conv1d(2, 3, 4, rng=0), nn.Conv1d(2, 3, 4, rng=1)
    np.savez(tmp_path / "state.npz", **source.state_dict())
    with np.load(tmp_path / "state.npz") as state:
        target.load_state_dict(state)
    np.testing.assert_array_equal(target.weight, source.weight)


@pytest.mark.torch
def test_states_load_from_pytorch() -> None:
    import torch

    target, theirs = nn.Conv1d(2, 3, 4, rng=1), torch.nn.Conv1d(2, 3, 4)
    target.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(target.weight, theirs.state_dict()["weight"].numpy())
    np.testing.assert_array_equal(target.bias, theirs.state_dict()["bias"].numpy())


class Exotic:
    """An array of another library: all that it offers is `__array__`."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.values, dtype)


def test_states_are_converted_to_the_layers_dtype() -> None:
    weight = np.arange(24).reshape(4, 2, 3)
    for dtype in DTYPES:
        layer = nn.Conv1d(2, 4, 3, dtype=dtype)
        for values in (
            weight,
            weight.astype(np.float64),
            np.asfortranarray(weight),
            weight.astype(">f4"),
            Exotic(weight),
        ):
            layer.load_state_dict({"weight": values, "bias": np.arange(4, dtype=np.uint8)})
            assert layer.weight.dtype == layer.bias.dtype == numpy_dtype(dtype)
            assert layer.weight.flags.c_contiguous
            np.testing.assert_array_equal(layer.weight.astype(np.complex128), weight)
            np.testing.assert_array_equal(layer.bias.astype(np.complex128), np.arange(4))


def test_all_misfits_are_listed_at_once_and_nothing_is_loaded() -> None:
    layer = nn.Conv1d(16, 33, 3)
    before = {key: array.copy() for key, array in layer.state_dict().items()}
    state = OrderedDict(conv=np.zeros(3), weight=np.zeros((33, 16, 5)), gain=np.ones(()))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared below)
        layer.load_state_dict(state)
    assert str(caught.value) == (
        "Conv1d.load_state_dict: the state does not fit Conv1d(16, 33, kernel_size=(3,), stride=(1,)): "
        'missing "bias"; unknown "conv"; unknown "gain"; "weight" must have shape (33, 16, 3), got (33, 16, 5)'
    )
    with pytest.raises(ValueError, match='"bias" must have shape'):
        layer.load_state_dict({"weight": np.zeros((33, 16, 3)), "bias": np.zeros(32)})
    for key, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[key])


def test_a_bias_is_unknown_to_a_layer_without() -> None:
    layer = nn.ConvTranspose1d(2, 3, 4, bias=False)
    with pytest.raises(ValueError, match=r'unknown "bias"$'):
        layer.load_state_dict(nn.ConvTranspose1d(2, 3, 4).state_dict())


def test_strict_false_passes_over_unknown_and_missing_entries_only() -> None:
    layer = nn.Conv1d(2, 3, 4, rng=0)
    bias = layer.bias
    result = layer.load_state_dict({"weight": np.zeros((3, 2, 4)), "gain": 1.0}, strict=False)
    assert result.missing_keys == ["bias"]
    assert result.unexpected_keys == ["gain"]
    assert not layer.weight.any()
    assert layer.bias is bias
    with pytest.raises(ValueError, match=r'"weight" must have shape \(3, 2, 4\), got \(3, 2, 5\)$'):
        layer.load_state_dict({"weight": np.zeros((3, 2, 5)), "gain": 1.0}, strict=False)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([[[1.0]]], '"weight" must be an array, got list'),
        (1.0, '"weight" must be an array, got float'),
        (np.ma.ones((1, 1, 1)), '"weight" must be an array, got MaskedArray'),
        (np.ones((1, 1, 1), complex), '"weight" must have a dtype that converts to float32, got complex128'),
        (np.array([[["1"]]]), '"weight" must have a dtype that converts to float32, got <U1'),
        (np.ones((1, 1, 1), object), '"weight" must have a dtype that converts to float32, got object'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_entries_that_are_no_arrays_are_refused(value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r"^Conv1d.load_state_dict: the state does not fit") as caught:
        nn.Conv1d(1, 1, 1, bias=False).load_state_dict({"weight": value})
    assert says in str(caught.value)


@pytest.mark.torch
def test_an_entry_that_needs_a_gradient_is_refused() -> None:
    import torch

    state = {"weight": torch.ones((1, 1, 1), requires_grad=True)}
    with pytest.raises(ValueError, match=r"\"weight\" cannot be read as an array: Can't call numpy\(\)"):
        nn.Conv1d(1, 1, 1, bias=False).load_state_dict(state)


def test_a_state_must_be_a_mapping() -> None:
    with pytest.raises(
        TypeError, match=r"^Conv1d.load_state_dict: state must be a mapping of arrays or a path, got list$"
    ):
        nn.Conv1d(1, 1, 1).load_state_dict([np.ones((1, 1, 1))])


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_a_gpu_hold_the_same_parameters(cupy: Any, name: str, device: str, index: int) -> None:
    host = getattr(nn, name)(2, 4, 3, groups=2, rng=5)
    layer = getattr(nn, name)(2, 4, 3, groups=2, rng=5, device=device)
    for key, array in layer.state_dict().items():
        assert isinstance(array, cupy.ndarray)
        assert array.device.id == index
        np.testing.assert_array_equal(array.get(), host.state_dict()[key])
    x = normal((2, 2, 9))
    with cupy.cuda.Device(index):
        output = layer(cupy.asarray(x))
    assert output.device.id == index
    problem = ConvProblem.of(host.op, x, host.weight, host.bias, groups=2)
    assert reference.within_bound(problem, output.get(), x, host.weight, host.bias).all()
    assert cupy.cuda.runtime.getDevice() == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_cuda_is_cupys_current_device(cupy: Any) -> None:
    with cupy.cuda.Device(1):
        assert nn.Conv1d(1, 1, 1, device="cuda").weight.device.id == 1
        assert nn.Conv1d(1, 1, 1).to("cuda").bias.device.id == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_to_moves_between_devices() -> None:
    layer = nn.ConvTranspose1d(2, 3, 4, rng=0)
    expected = layer.weight.copy()
    for device, index in (("cuda", 0), ("cuda:1", 1), ("cuda:0", 0)):
        layer.to(device)
        assert (layer.weight.device.id, layer.bias.device.id) == (index, index)
        np.testing.assert_array_equal(layer.weight.get(), expected)
    weight = layer.weight
    assert layer.to(device="cuda:0").weight is weight
    layer.to("cuda:1").to(dtype="float64")
    assert layer.weight.device.id == 1
    assert layer.weight.dtype == np.float64
    layer.to("cpu", "float32")
    assert type(layer.weight) is np.ndarray
    np.testing.assert_array_equal(layer.weight, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_states_load_across_devices(cupy: Any) -> None:
    source = nn.Conv1d(2, 3, 4, rng=0)
    layer = nn.Conv1d(2, 3, 4, rng=1, device="cuda:1")
    layer.load_state_dict(source.state_dict())
    assert layer.weight.device.id == 1
    np.testing.assert_array_equal(layer.weight.get(), source.weight)
    other = nn.Conv1d(2, 3, 4, rng=2)
    other.load_state_dict(layer.state_dict())
    assert type(other.weight) is np.ndarray
    np.testing.assert_array_equal(other.weight, source.weight)
    twin = nn.Conv1d(2, 3, 4, rng=3, device="cuda:1")
    twin.load_state_dict(layer.state_dict())
    twin.weight[...] = cupy.asarray(np.zeros((3, 2, 4), np.float32))
    np.testing.assert_array_equal(layer.weight.get(), source.weight)


@pytest.mark.gpu
@pytest.mark.usefixtures("two_gpus")
def test_an_input_on_another_device_is_refused(cupy: Any) -> None:
    layer = nn.Conv1d(2, 3, 4, device="cuda")
    with pytest.raises(TypeError, match="got input as a NumPy array and weight as a CuPy array on device 0"):
        layer(normal((2, 9)))
    with cupy.cuda.Device(1):
        x = cupy.asarray(normal((2, 9)))
    with pytest.raises(TypeError, match="got input as a CuPy array on device 1 and weight as a CuPy array on device 0"):
        layer(x)


@pytest.mark.gpu
def test_a_gpu_that_is_not_there_is_refused(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = f"cuda:{runtime.device_count()}"
    with pytest.raises(ValueError, match=rf'^Conv1d: device must be below "{device}", one of the .*, got "{device}"$'):
        nn.Conv1d(1, 1, 1, device=device)

    def no_driver() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", no_driver)
    layer = nn.Conv1d(1, 1, 1)
    with pytest.raises(RuntimeError, match=r'^Conv1d.to: device is "cuda", but no GPU answers: cudaError'):
        layer.to("cuda")
    assert type(layer.weight) is np.ndarray


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
def test_initial_values_take_no_more_memory_than_the_weight(dtype: str) -> None:
    nn.Conv1d(2, 2, 3, dtype=dtype)
    tracemalloc.start()
    m = nn.Conv1d(256, 1024, 16, dtype=dtype, bias=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1.3 * m.weight.nbytes


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_initial_values_are_those_of_one_draw_in_float64(dtype: str) -> None:
    m = nn.Conv1d(64, 700, 3, dtype=dtype, rng=5)
    rng, b = np.random.default_rng(5), 1 / math.sqrt(64 * 3)
    for array in (m.weight, m.bias):
        if dtype == "complex64":
            expected = rng.uniform(-b, b, (*array.shape, 2)).view(np.complex128)[..., 0]
        else:
            expected = rng.uniform(-b, b, array.shape)
        assert np.array_equal(array, expected.astype(dtype))


@pytest.mark.parametrize("device", ["gpu", "GPU", "gpu:0"])
def test_a_gpu_is_called_cuda(device: str) -> None:
    message = (
        f'Conv1d: device must be "cpu", "cuda" or "cuda:" and an index, got "{device}"; CuPy\'s current GPU is "cuda"'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        nn.Conv1d(1, 1, 1, device=device)


def test_a_tf32_layer_stays_float32() -> None:
    m = nn.Conv1d(4, 6, 3, precision="tf32")
    message = (
        'Conv1d.to: dtype must be float32 for a layer with precision "tf32", got float16; set the layer\'s precision '
        'to "float32" first'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        m.to(dtype="float16")
    assert m.weight.dtype == np.float32
    assert m.to(dtype="float32") is m
    m.precision = "float32"
    assert m.to(dtype="float16").weight.dtype == np.float16


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_an_algorithm(name: str) -> None:
    m = getattr(nn, name)(64, 64, 3, algorithm="base", bias=False)
    assert m.algorithm == "base"
    assert "algorithm=base" in repr(m)
    assert "algorithm" not in repr(getattr(nn, name)(4, 6, 3))
    with pytest.raises(ValueError, match=rf"^{name}: algorithm must be None or one of base, .*, got 'fast'"):
        getattr(nn, name)(4, 6, 3, algorithm="fast")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "kernel"), [("Conv1d", "conv1d_direct"), ("ConvTranspose1d", "conv_transpose1d_gather")]
)
def test_a_layer_launches_its_algorithm(cupy: Any, launched: list[str], name: str, kernel: str) -> None:
    m = getattr(nn, name)(64, 64, 3, algorithm="base", bias=False, device="cuda")
    m(cupy.ones((1, 64, 20), np.float32))
    assert launched == [kernel]
