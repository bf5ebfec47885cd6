"""`gpuconv.torch`: operators with derivatives, tracing, models under `patch`, and tensors in place as arrays."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch
from hypothesis import given, settings
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

import gpuconv
from gpuconv import grad
from gpuconv import torch as bridge
from gpuconv.problem import DTYPES, ConvProblem, Op, numpy_dtype
from gpuconv.text import install_hint
from gpuconv.torch import tensors
from tests.api.test_functional import draw
from tests.strategies import Call, calls

Array = npt.NDArray[Any]
OPS: tuple[Op, ...] = ("conv1d", "conv_transpose1d")
ops = torch.ops.gpuconv

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_torch_thread")]


def tensor(array: Array) -> torch.Tensor:
    """A tensor with the values of an array, in its dtype."""
    if array.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def values(result: torch.Tensor) -> Array:
    """An array with the values of a tensor, in its dtype."""
    plain = result.detach().cpu().resolve_conj().resolve_neg()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return plain.numpy()


class Recorder(TorchDispatchMode):
    """The names of gpuconv's operators that run in the context, and PyTorch's own convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "gpuconv" or "conv" in name:
            self.names.append(name if namespace == "gpuconv" else func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The functions of gpuconv that compute results, by name, with their keywords."""
    found = []
    write = tensors.write

    def recording(result: Any, function: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
        found.append((function.__name__, keywords))
        return write(result, function, *arguments, **keywords)

    monkeypatch.setattr(tensors, "write", recording)
    return found


@pytest.mark.parametrize("op", OPS)
def test_results_and_gradients_are_those_of_arrays(op: Op) -> None:
    """They agree to the bit, in all dtypes and settings."""
    seen: set[ConvProblem] = set()

    @settings(max_examples=60)
    @given(call=calls(op))
    def run(call: Call) -> None:
        p = call.problem()
        chosen = dict(call.settings)
        if "output_size" in chosen:  # PyTorch's function has none
            del chosen["output_size"]
            if chosen["padding"] != "same":
                chosen["output_padding"] = p.output_padding
        x, w, b = call.arrays()
        assert x is not None
        assert w is not None
        leaves = [None if a is None else tensor(a).requires_grad_() for a in (x, w, b)]
        y = getattr(bridge, op)(*leaves, **chosen)
        assert y.is_contiguous()
        np.testing.assert_array_equal(values(y), getattr(gpuconv, op)(x, w, b, **chosen))

        u = np.random.default_rng(call.seed).standard_normal(p.output_shape).astype(x.dtype)
        gradients = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], tensor(u))
        expected = [
            getattr(grad, f"{op}_input")(x.shape, w, u, **chosen),
            getattr(grad, f"{op}_weight")(x, w.shape, u, **chosen),
            getattr(grad, f"{op}_bias")(u),
        ]
        for from_bridge, from_arrays in zip(gradients, expected, strict=False):
            np.testing.assert_array_equal(values(from_bridge), from_arrays)
        seen.add(p)

    run()
    assert len(seen) >= 40


@pytest.mark.parametrize("op", OPS)
def test_settings_stand_in_pytorchs_order(op: str) -> None:
    x, w, b = (tensor(draw(shape, "float64", i)) for i, shape in enumerate(((2, 4, 9), (4, 2, 3), (4,))))
    positional = (2, 3, 2, 2) if op == "conv1d" else (3, 2, 1, 2, 2)
    expected = getattr(functional, op)(x, w, b, *positional)
    assert torch.equal(getattr(bridge, op)(x, w, b, *positional), expected)
    assert torch.equal(getattr(bridge, op)(x, w, b, (positional[0],), *positional[1:]), expected)


@pytest.mark.parametrize("op", OPS)
def test_tensors_may_lie_in_memory_in_any_way(op: str) -> None:
    x, w = tensor(draw((2, 4, 9), "complex64", 0)), tensor(draw((4, 4, 3), "complex64", 1))
    function, plain = getattr(bridge, op), getattr(gpuconv, op)
    for make in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t[:1].expand(4, -1, -1),
        lambda t: t.conj(),
        lambda t: t.imag.to(t.dtype) if t.is_conj() else t.conj().imag,  # a negation is pending
        nn.Parameter,
    ):
        given = (make(x), make(w))
        expected = plain(*(np.array(values(t)) for t in given))
        np.testing.assert_array_equal(values(function(*given)), expected)
        with torch.inference_mode():
            np.testing.assert_array_equal(values(function(*given)), expected)


def test_pending_conjugations_and_negations_have_their_gradients() -> None:
    x, w = (torch.randn(shape, dtype=torch.complex128, requires_grad=True) for shape in ((2, 3, 5), (4, 3, 2)))
    assert x.conj().is_conj()
    assert x.conj().imag.is_neg()
    assert torch.autograd.gradcheck(lambda x, w: bridge.conv1d(x.conj(), w.conj()), (x, w))
    assert torch.autograd.gradcheck(lambda x, w: bridge.conv1d(x.conj().imag, w.conj().imag), (x, w))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("x_shape", "w_shape"),
    [((0, 2, 5), (2, 2, 3)), ((2, 0, 5), (0, 0, 3)), ((0, 5), (0, 0, 3)), ((1, 2, 0), (2, 2, 3))],
)
def test_zero_sizes(op: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> None:
    if op == "conv_transpose1d" and x_shape[-1] == 0:
        keywords: dict[str, Any] = {"stride": 2, "output_padding": 1}  # an output of nothing but padding
    else:
        keywords = {"padding": 3}
    if op == "conv_transpose1d" and x_shape[-1] == 5:
        keywords = {"padding": 1}
    x, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (x_shape, w_shape))
    y = getattr(bridge, op)(x, w, **keywords)
    assert values(y).tobytes() == getattr(gpuconv, op)(values(x), values(w), **keywords).tobytes()
    gradients = torch.autograd.grad(y.sum(), (x, w), create_graph=True)
    assert [g.shape for g in gradients] == [x_shape, w_shape]
    assert not any(g.any() for g in gradients[1:])
    (sum(g.sum() for g in gradients)).backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_share_the_memory_of_tensors(dtype: str) -> None:
    for t in (tensor(draw((4, 6), dtype)), tensor(draw((4, 6), dtype)).T[1::2].requires_grad_()):
        array = tensors.numpy_array(t)
        assert array.dtype == numpy_dtype(dtype)
        assert array.__array_interface__["data"][0] == t.data_ptr()
        assert tuple(s // array.itemsize for s in array.strides) == t.stride()


@pytest.mark.parametrize("op", OPS)
def test_autocast_casts_as_pytorch_does(op: str) -> None:
    x, w, b = torch.randn(2, 4, 9), torch.randn(4, 4, 3, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        y = getattr(bridge, op)(x, w, b)
        assert y.dtype == getattr(functional, op)(x, w, b).dtype == torch.bfloat16
        assert getattr(bridge, op)(x.double(), w.double(), b.double()).dtype == torch.float64
    assert torch.equal(y, getattr(bridge, op)(*(t.to(torch.bfloat16) for t in (x, w, b))))
    (gradient,) = torch.autograd.grad(y.sum(), w)
    assert gradient.dtype == torch.float32


X, W = torch.ones(2, 4, 9), torch.ones(4, 4, 3)

# (arguments, keywords, error, message).
BAD_CALLS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (
        (np.ones((2, 4, 9)), W),
        {},
        TypeError,
        "input must be a torch.Tensor, got ndarray; for NumPy and CuPy arrays use gpuconv",
    ),
    (
        (X, np.ones((4, 4, 3))),
        {},
        TypeError,
        "weight must be a torch.Tensor, got ndarray; for NumPy and CuPy arrays use gpuconv",
    ),
    ((X, None), {}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ((X, W, 1.0), {}, TypeError, "bias must be a torch.Tensor, got float"),
    ((X, W.to("meta")), {}, TypeError, "all tensors must be on one device, got input on cpu and weight on meta"),
    ((X, W.to_sparse()), {}, TypeError, "weight must be a dense tensor, got layout torch.sparse_coo"),
    ((X.bool(), W.bool()), {}, TypeError, "input must have one of the dtypes .*, got bool"),
    ((X.int(), W), {}, TypeError, "input and weight must share one dtype, got input int32, weight float32"),
    (
        (X.int(), W.int(), torch.ones(4).int()),
        {},
        TypeError,
        "bias must have the dtype of the output, int64, got int32",
    ),
    ((X.int(), W.int()), {"out_dtype": torch.int16}, ValueError, "out_dtype must be one of .* for int32, got 'int16'"),
    (
        (X, W),
        {"out_dtype": torch.int32},
        ValueError,
        "out_dtype is for integers; expected None for float32, got 'int32'",
    ),
    (
        (X.cfloat(), W.double()),
        {},
        TypeError,
        "weight must have the dtype of input, complex64 or, for real taps, float32",
    ),
    ((X.cfloat(), W, torch.ones(4)), {}, TypeError, "bias must have the dtype of input, complex64; got float32"),
    (
        (X.cfloat(), W),
        {"activation": "relu"},
        TypeError,
        "activation relu needs real floating-point data, got complex64",
    ),
    (
        (X.int(), W.int()),
        {"activation": "relu"},
        TypeError,
        "activation relu needs real floating-point data, got int32",
    ),
    ((X, W), {"residual": X, "out_dtype": "int32"}, ValueError, "out_dtype is for integers; expected None for float32"),
    ((X.to(torch.float8_e5m2), W), {}, TypeError, "input must have one of the dtypes .*, got float8_e5m2"),
    ((X, W.double()), {}, TypeError, "input and weight must share one dtype, got input float32, weight float64$"),
    ((X[0, 0], W), {}, ValueError, "input must have shape .*, got 1 dimension: "),
    ((X[:, :3], W), {}, ValueError, "input has C_in = 3 channels, but weight "),
    ((X, W), {"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ((X, W), {"stride": True}, TypeError, "stride must be an int or a sequence of one int, got the bool True"),
    ((X, W), {"dilation": 1.5}, TypeError, "dilation must be an int or a sequence of one int, got float 1.5"),
    ((X, W), {"padding": "reflect"}, ValueError, "padding must be an int, a pair .*, got 'reflect'"),
    ((X, W), {"padding": (1, 2, 3)}, ValueError, "padding must be an int, a pair .*, got 3 values"),
    ((X, W), {"groups": 3}, ValueError, "groups must divide the input channels, got groups = 3 and C_in = 4"),
    ((X, W), {"precision": "half"}, ValueError, "precision must be one of"),
    ((X, W), {"precision": None}, ValueError, "precision must be one of"),
    ((X.double(), W.double()), {"precision": "tf32"}, ValueError, 'precision "tf32" rounds float32 data'),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS, ids=[message for *_, message in BAD_CALLS])
@pytest.mark.parametrize("op", OPS)
def test_bad_arguments_are_named(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^{op}: {message}"):
        getattr(bridge, op)(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(4, 9), torch.ones(4, 7)], layout=layout)
    with pytest.raises(TypeError, match=r"^conv1d: input must be a dense tensor, got "):
        bridge.conv1d(nested, W)


@pytest.mark.parametrize(
    "settings", [{"stride": True}, {"stride": (True,)}, {"padding": (True, 1)}, {"groups": True}, {"dilation": 1.0}]
)
def test_what_equals_a_known_setting_is_refused(settings: dict[str, Any]) -> None:
    bridge.conv1d(X, W, None, 1, 1, 1, 1)
    bridge.conv1d(X, W, None, (1,), (1, 1), (1,), 1)
    with pytest.raises(TypeError, match=f"^conv1d: {next(iter(settings))} must be "):
        bridge.conv1d(X, W, **settings)


def test_the_example_in_the_readme() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "gpuconv.torch" in block)
    names: dict[str, Any] = {}
    exec(example, names)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


# name: (op, shapes of input, weight and bias or None, settings).
LAYERS: dict[str, tuple[Op, tuple[Any, ...], dict[str, Any]]] = {
    "strided": ("conv1d", ((2, 2, 7), (3, 2, 3), (3,)), {"stride": 2, "padding": 1}),
    "grouped": ("conv1d", ((1, 4, 6), (4, 2, 2), None), {"groups": 2, "dilation": 2}),
    "unused tail": ("conv1d", ((1, 2, 8), (2, 2, 2), (2,)), {"stride": 4}),
    "pair": ("conv1d", ((1, 2, 4), (2, 2, 3), None), {"padding": (0, 3)}),
    "same": ("conv1d", ((1, 2, 5), (2, 2, 4), None), {"padding": "same", "stride": 2}),
    "causal": ("conv1d", ((2, 1, 5), (2, 1, 3), (2,)), {"padding": "causal", "dilation": 2}),
    "unbatched": ("conv1d", ((2, 5), (3, 2, 2), (3,)), {}),
    "up strided": ("conv_transpose1d", ((2, 2, 3), (2, 3, 3), (3,)), {"stride": 2, "padding": 1, "output_padding": 1}),
    "up grouped": ("conv_transpose1d", ((1, 4, 3), (4, 2, 2), None), {"groups": 2, "stride": 3}),
    "up dilated": ("conv_transpose1d", ((1, 2, 3), (2, 1, 2), (1,)), {"dilation": 3, "output_padding": 2}),
    "up pair": ("conv_transpose1d", ((1, 2, 4), (2, 2, 3), None), {"padding": (0, 2), "stride": 2}),
    "up same": ("conv_transpose1d", ((1, 2, 3), (2, 2, 4), None), {"padding": "same", "stride": 2}),
    "up unbatched": ("conv_transpose1d", ((2, 3), (2, 2, 2), (2,)), {"stride": 2}),
}


def drawn(shapes: tuple[Any, ...], dtype: torch.dtype, *, requires_grad: bool = True) -> list[Any]:
    """Tensors of random values; None stays None."""
    generator = torch.Generator().manual_seed(1)
    return [
        None if shape is None else torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(requires_grad)
        for shape in shapes
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_first_and_second_derivatives(layer: str, dtype: torch.dtype) -> None:
    op, shapes, keywords = LAYERS[layer]
    leaves = drawn(shapes, dtype)

    def function(*given: Any) -> torch.Tensor:
        result: torch.Tensor = getattr(bridge, op)(*given, **keywords)
        return result

    fast = dtype.is_complex  # along random directions, not along every axis
    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=fast, check_fwd_over_rev=True)


def test_third_derivatives() -> None:
    """The operators of the second derivative have their own derivatives."""
    x, w = drawn(((2, 3), (1, 2, 2)), torch.float64)

    def second(x: torch.Tensor, w: torch.Tensor) -> Any:
        y = bridge.conv1d(x, w).pow(3).sum()
        first = torch.autograd.grad(y, (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, w), create_graph=True)

    assert torch.autograd.gradcheck(second, (x, w), fast_mode=True)


def test_tensors_that_change_before_the_backward_pass() -> None:
    """A change of a tensor that the pass needs is noticed; the result may change."""
    x, w = drawn(((2, 3, 8), (3, 3, 3)), torch.float64)
    y = bridge.conv1d(x, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    results = []
    for function in (bridge.conv1d, functional.conv1d):
        y = function(x, w)
        y[:, 1:].mul_(2)
        results.append(torch.autograd.grad(functional.relu(y, inplace=True).sum(), (x, w)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("chosen", ["100", "010", "001", "101", "110", "111"])
def test_derivatives_in_forward_mode(layer: str, chosen: str) -> None:
    """Along every choice of arguments. They are what PyTorch makes of the derivatives in reverse."""
    op, shapes, keywords = LAYERS[layer]
    given = drawn(shapes, torch.float64, requires_grad=False)
    varied = [i for i in range(3) if chosen[i] == "1" and given[i] is not None] or [0]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        call = list(given)
        for i, t in zip(varied, tensors, strict=True):
            call[i] = t
        return getattr(bridge, op)(*call, **keywords)  # type: ignore[no-any-return]

    primals = tuple(given[i] for i in varied)
    tangents = tuple(torch.cos(t) for t in primals)
    value, ours = torch.func.jvp(function, primals, tangents)
    assert torch.equal(value, function(*primals))
    _, expected = torch.autograd.functional.jvp(function, primals, tangents)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(primals, tangents, strict=True)]
        assert torch.equal(forward_ad.unpack_dual(function(*duals)).tangent, ours)


def test_forward_mode_keeps_no_more_than_reverse_mode() -> None:
    x, w = torch.randn(1, 2, 9), torch.randn(2, 2, 3, requires_grad=True)
    other = torch.randn(2)
    kept = weakref.ref(other)
    with forward_ad.dual_level():
        y = bridge.conv1d(x, w, other)
        del other
        assert kept() is None
        assert y.requires_grad


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "input weight", "input weight bias"])
def test_only_wanted_gradients_are_computed(op: str, wanted: str) -> None:
    """Only the tensors that these need are kept."""
    names = ("input", "weight", "bias")
    leaves = drawn(((2, 3, 8), (3, 3, 3), (3,)), torch.float32, requires_grad=False)
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name in wanted.split())
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = getattr(bridge, op)(*leaves)
    other = {"input": "weight", "weight": "input"}
    assert {t.data_ptr() for t in kept} == {
        leaves[names.index(other[name])].data_ptr() for name in wanted.split() if name in other
    }
    with Recorder() as recorder:
        y.sum().backward()
    assert recorder.names == [
        {"input": f"{op}_input", "weight": f"{op}_weight", "bias": "conv_bias"}[name] for name in wanted.split()
    ]
    assert [leaf.grad is not None for leaf in leaves] == [name in wanted.split() for name in names]


def test_gradients_are_taken_in_the_precision_of_the_call(computed: list[tuple[str, dict[str, Any]]]) -> None:
    x, w = drawn(((1, 2, 5), (2, 2, 3)), torch.float32)
    gradients = torch.autograd.grad(bridge.conv1d(x, w, precision="tf32").sum(), (x, w), create_graph=True)
    torch.autograd.grad(gradients[1].sum(), x)
    names = ("conv1d", "conv1d_input", "conv1d_weight", "conv1d_input")
    assert [(name, keywords["precision"]) for name, keywords in computed] == [(name, "tf32") for name in names]


def operator_calls() -> Iterator[Any]:
    """One call of every operator with every kind of argument."""
    for name, (op, shapes, keywords) in LAYERS.items():
        if name not in ("causal", "unbatched", "up strided", "up same"):
            continue
        x, w, b = drawn(shapes, torch.float64)
        y = getattr(bridge, op)(x, w, b, **keywords).detach().requires_grad_()
        padding = keywords.get("padding", 0)
        sides, word = ([], padding) if isinstance(padding, str) else ([padding, padding], "")
        given = {"dilation": 1, "groups": 1, "output_padding": 0, "stride": 1, **keywords}
        order = ("dilation", "groups") if op == "conv1d" else ("output_padding", "groups", "dilation")
        rest = (given["stride"], sides, word, *(given[key] for key in order), "float32")
        rest += ("zeros",) if op == "conv1d" else ()
        yield pytest.param(f"{op}", (x, w, b, *rest), id=f"{op}-{name}")
        yield pytest.param(f"{op}_input", (list(x.shape), w, y, *rest), id=f"{op}_input-{name}")
        yield pytest.param(f"{op}_weight", (x, list(w.shape), y, *rest), id=f"{op}_weight-{name}")
    yield pytest.param("conv_bias", (torch.randn(2, 3, 4, requires_grad=True),), id="conv_bias")


@pytest.mark.parametrize(("name", "args"), list(operator_calls()))
def test_operators_are_registered_rightly(name: str, args: tuple[Any, ...]) -> None:
    result = torch.library.opcheck(getattr(ops, name).default, args)
    assert set(result.values()) == {"SUCCESS"}


def up_and_down(x: torch.Tensor, b: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
    """Both operations, with every way to write a setting. Nothing else, for which C++ would be compiled."""
    y = bridge.conv1d(x, w[0], b, stride=2, padding="same", dilation=(2,), groups=2)
    y = bridge.conv_transpose1d(y, w[1], None, 2, (1, 0), 1, 2, precision="float32")
    return bridge.conv1d(y, w[2], None, padding="causal", groups=2)


@pytest.fixture
def compiler(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """torch.compile of whole functions that remembers nothing from elsewhere; counts the graphs."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield functools.partial(torch.compile, fullgraph=True)
    torch.compiler.reset()


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_compiled_functions_and_their_gradients(compiler: Callable[..., Any], backend: str, dynamic: bool) -> None:
    compiled = compiler(up_and_down, backend=backend, dynamic=dynamic)
    lengths = (20, 33, 50) if dynamic else (20,)
    for length in lengths:
        leaves = drawn(((2, 4, length), (4,), *[(4, 2, 3)] * 3), torch.float32)
        results = []
        for function in (up_and_down, compiled):
            y = function(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "every length would be compiled for itself"


class UpAndDown(nn.Module):
    """A model that knows nothing of gpuconv."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(4, 6, 5, stride=2, padding=2, padding_mode="reflect")
        self.same = nn.Conv1d(6, 6, 3, padding="same", groups=3)
        self.up = nn.ConvTranspose1d(6, 2, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor, length: int | None = None) -> torch.Tensor:
        y = functional.leaky_relu(self.same(self.down(x)))
        return self.up(y, None if length is None else [length])  # type: ignore[no-any-return]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_models_take_every_length(strict: bool, tmp_path: Any) -> None:
    model = UpAndDown().double().eval()
    x = torch.randn(3, 4, 20, dtype=torch.float64)
    sizes = {"x": {0: torch.export.Dim("N"), 2: torch.export.Dim("L", min=8)}, "length": None}
    with bridge.patch():
        program = torch.export.export(model, (x,), {"length": None}, dynamic_shapes=sizes, strict=strict)
    assert len(re.findall(r"torch\.ops\.gpuconv\.", program.graph_module.code)) == 3
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for N, L in ((3, 20), (5, 31), (2, 64)):
        x = torch.randn(N, 4, L, dtype=torch.float64)
        with bridge.patch():
            expected = model(x)
        assert torch.equal(loaded(x, length=None), expected)


@pytest.mark.parametrize("op", OPS)
def test_integers(op: Op, compiler: Callable[..., Any]) -> None:
    """Sums as gpuconv's functions of arrays have them, in every way to call."""
    generator = torch.Generator().manual_seed(0)
    settings = {"stride": 2, "padding": 1, "groups": 2}
    function = getattr(bridge, op)
    compiled = compiler(function, backend="aot_eager")
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        x, w = (torch.randint(-(2**40), 2**40, s, generator=generator).to(dtype) for s in ((3, 2, 4, 9), (4, 2, 3)))
        for out_dtype in (None, torch.int32, "int64"):
            name = "int64" if out_dtype is None else str(out_dtype).removeprefix("torch.")
            b = torch.arange(4).to(getattr(torch, name))
            keywords = {**settings, "out_dtype": out_dtype}
            arrays = [t.numpy() for t in (x[0], w, b)]
            expected = getattr(gpuconv, op)(*arrays, **settings, out_dtype=name)
            found = function(x[0], w, b, **keywords)
            assert found.dtype == getattr(torch, name)
            assert np.array_equal(found.numpy(), expected)
            assert function(x[0].to("meta"), w.to("meta"), b.to("meta"), **keywords).dtype == found.dtype
            each = torch.vmap(lambda x, w=w, b=b, k=keywords: function(x, w, b, **k))
            assert torch.equal(each(x), torch.stack([function(one, w, b, **keywords) for one in x]))
    assert torch.equal(compiled(x[0], w, **settings), function(x[0], w, **settings))


@pytest.mark.parametrize("op", OPS)
def test_real_taps_on_complex_data(op: Op, compiler: Callable[..., Any]) -> None:
    """They give the same as complex taps, with first and second derivatives, in every way to call."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.complex128, torch.float64, torch.complex128, torch.complex128)
    function, settings = getattr(bridge, op), {"stride": 2, "padding": 1, "groups": 2}
    L_out = 5 if op == "conv1d" else 17
    shapes = ((2, 4, 9), (4, 2, 3), (4,), (2, 4, L_out))
    x, w, b, r = (
        torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )

    def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return function(x, w, b, **settings)  # type: ignore[no-any-return]

    def theirs(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return getattr(functional, op)(x, w.to(torch.complex128), b, **settings)  # type: ignore[no-any-return]

    results = []
    for call in (ours, theirs, compiler(ours, backend="aot_eager")):
        y = call(x, w, b)
        first = torch.autograd.grad(y.abs().pow(3).sum(), (x, w, b))
        results.append([y, *first])
    for found in (results[0], results[2]):
        for a, e in zip(found, results[1], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradgradcheck(ours, (x, w, b), fast_mode=True)
    taps = torch.stack([w, -w])
    torch.testing.assert_close(
        torch.vmap(ours, (None, 0, None))(x, taps, b), torch.stack([ours(x, t, b) for t in taps])
    )

    def loss(w: torch.Tensor) -> torch.Tensor:
        return ours(x, w, b).abs().pow(3).sum()

    torch.testing.assert_close(torch.func.grad(loss)(w), results[1][2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(function(x, w, residual=r, **settings), function(x, w, **settings) + r)
        narrow = [t.to(d) for t, d in ((x, torch.complex64), (w, torch.float32))]
        assert function(*narrow, **settings).dtype == torch.complex64
    if op == "conv_transpose1d":
        assert function(x, w, None, 2, output_size=20, groups=2).shape[-1] == 20


def test_errors_show_while_tracing(compiler: Callable[..., Any]) -> None:
    x, w = torch.randn(1, 3, 5), torch.randn(2, 2, 3)
    with pytest.raises(Exception, match="input has C_in = 3 channels"):
        compiler(bridge.conv1d, backend="eager")(x, w)


def test_meta_tensors_have_shapes() -> None:
    x, w = torch.empty(2, 2**20, 2**30, device="meta"), torch.empty(4, 2**20, 3, device="meta")
    assert bridge.conv1d(x, w, stride=2, padding=1).shape == (2, 4, 2**29)
    assert bridge.conv_transpose1d(x, w[:1].expand(2**20, -1, -1)[:, :1], stride=2).shape == (2, 1, 2**31 + 1)
    with pytest.raises(ValueError, match="more than 64-bit offsets reach"):
        bridge.conv1d(torch.empty(1, 1, 2**40, device="meta"), torch.empty(2**24, 1, 1, device="meta"))


PYTORCH = (functional.conv1d, functional.conv_transpose1d)


def in_place_now() -> tuple[Any, Any]:
    return functional.conv1d, functional.conv_transpose1d


def test_patch_runs_a_model_on_gpuconv() -> None:
    torch.manual_seed(0)
    model = UpAndDown().double()
    x = torch.randn(3, 4, 21, dtype=torch.float64, requires_grad=True)
    results = []
    for context, expected in (
        (bridge.patch(), ["conv1d", "conv1d", "conv_transpose1d"]),
        (contextlib.nullcontext(), None),
    ):
        with context:
            for length in (None, 23):
                with Recorder() as recorder:
                    y = model(x, length)
                    results.append((y, *torch.autograd.grad(y.square().sum(), (x, *model.parameters()))))
                if expected is not None:
                    assert recorder.names[:3] == expected
                    assert not any(":" in name for name in recorder.names)
                else:
                    assert all(":" in name for name in recorder.names)
    for ours, theirs in zip(sum(results[:2], ()), sum(results[2:], ()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert in_place_now() == PYTORCH


def test_compiled_models_follow_patch(compiler: Callable[..., Any], computed: list[Any]) -> None:
    compiled = compiler(nn.Conv1d(2, 3, 3), backend="eager")
    for _ in range(2):
        compiled(torch.randn(1, 2, 8))
        assert len(computed) == 0
        with bridge.patch():
            compiled(torch.randn(1, 2, 8))
        assert len(computed) == 1
        computed.clear()


def test_backward_passes_behind_the_context_stay_on_gpuconv() -> None:
    layer = nn.Conv1d(2, 2, 3)
    with bridge.patch():
        y = layer(torch.randn(1, 2, 8))
    with Recorder() as recorder:
        y.sum().backward()
    assert recorder.names == ["conv1d_weight", "conv_bias"]


def test_patches_nest_and_end_in_any_order() -> None:
    first, second, third = bridge.patch(), bridge.patch(precision="tf32"), bridge.patch()
    first.__enter__()
    outer = in_place_now()
    with second:
        inner = in_place_now()
        assert [f.keywords for f in inner] == [{"precision": "tf32"}] * 2
        with bridge.patch():
            pass
        assert in_place_now() == inner
    assert in_place_now() == outer
    third.__enter__()  # as of another thread, which leaves later
    latest = in_place_now()
    first.__exit__(None, None, None)
    assert in_place_now() == latest
    third.__exit__(None, None, None)
    assert in_place_now() == PYTORCH


def test_patch_ends_with_an_exception_and_decorates() -> None:
    with pytest.raises(KeyError, match="mine"), bridge.patch():
        raise KeyError("mine")
    assert in_place_now() == PYTORCH

    @bridge.patch()
    def inside() -> tuple[Any, Any]:
        return in_place_now()

    assert inside() != PYTORCH
    assert inside()[0].args == (bridge.conv1d,)
    assert in_place_now() == PYTORCH


def test_patch_gives_back_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def somebody_elses(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(functional, "conv1d", somebody_elses)
    with bridge.patch():
        assert functional.conv1d(X, W).shape == (2, 4, 7)
    assert functional.conv1d is somebody_elses  # type: ignore[comparison-overlap]


def test_what_gpuconv_does_not_take_is_an_error_under_patch() -> None:
    with bridge.patch(), pytest.raises(TypeError, match=r"^conv1d: input must have one of the dtypes .*, got bool"):
        functional.conv1d(X.bool(), W.bool())
    with bridge.patch(precision="tf32"):
        assert functional.conv_transpose1d(X, W).shape == (2, 4, 11)
        with pytest.raises(ValueError, match=r'^conv1d: precision "tf32" rounds float32 data'):
            functional.conv1d(X.double(), W.double())
    with pytest.raises(ValueError, match=r"^patch: precision must be one of"), bridge.patch(precision="half"):
        pass


class ResidualBlock(nn.Module):
    """Two dilated convolutions around a skip connection, as in the generator of HiFi-GAN."""

    def __init__(self, channels: int, K: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv1d(channels, channels, K, dilation=d, padding="same")) for d in dilations
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(functional.leaky_relu(x, 0.1))
        return x


class Generator(nn.Module):
    """From every eighth sample to all of them, as HiFi-GAN goes from frames to samples."""

    def __init__(self) -> None:
        super().__init__()
        self.before = weight_norm(nn.Conv1d(1, 16, 7, padding=3))
        self.up = nn.ModuleList(
            weight_norm(nn.ConvTranspose1d(i, o, 2 * s, s, s // 2)) for i, o, s in ((16, 8, 4), (8, 4, 2))
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResidualBlock(channels, K, (1, 3)) for K in (3, 7)) for channels in (8, 4)
        )
        self.after = weight_norm(nn.Conv1d(4, 1, 7, padding=3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x[..., ::8])
        for up, blocks in zip(self.up, self.blocks, strict=True):
            x = up(functional.leaky_relu(x, 0.1))
            x = sum(block(x) for block in blocks) / len(blocks)  # type: ignore[arg-type]
        return torch.tanh(self.after(functional.leaky_relu(x)))


class TemporalConvolutions(nn.Module):
    """The next sample from those before it: dilated causal convolutions with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv1d(1, 12, 1)
        self.layers = nn.ModuleList(nn.Conv1d(12, 12, 3, dilation=d, padding=2 * d) for d in (1, 2, 4, 8, 16))
        self.after = nn.Conv1d(12, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        L = x.shape[-1]
        x = self.before(functional.pad(x, (1, -1)))
        for layer in self.layers:
            x = x + torch.relu(layer(x)[..., :L])
        return self.after(x)  # type: ignore[no-any-return]


STEPS = 20


def train(make: Callable[[], nn.Module], dtype: torch.dtype) -> Array:
    """The losses of a model that reproduces the recording."""
    import pywt  # not at the top: the tests on a GPU run where it is not installed

    torch.manual_seed(3)
    model = make().to(dtype)
    recording = torch.from_numpy(pywt.data.ecg() / 200.0).to(dtype)
    x = (recording / recording.abs().max()).reshape(4, 1, 256)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.5)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


@pytest.mark.parametrize("make", [Generator, TemporalConvolutions])
def test_training_follows_pytorch(make: Callable[[], nn.Module]) -> None:
    """Rounding moves the losses by no more than a unit roundoff for each term summed on the way through the network.

    Compared with float64, for PyTorch's CPU build computes some float32 gradients of transposed convolutions wrongly.
    """
    expected = train(make, torch.float64)
    assert expected[-1] < 0.7 * expected[0], "nothing is learnt"
    convolutions = [m for m in make().modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    terms = sum(m.weight[0].numel() + 2 for m in convolutions)
    for dtype, unit in ((torch.float64, 2.0**-53), (torch.float32, 2.0**-24)):
        with bridge.patch(), Recorder() as recorder:
            losses = train(make, dtype)
        assert {name.partition("_")[0] for name in recorder.names} == {"conv1d", "conv"}
        # Forward, weight and bias of each layer, and input of all but the first.
        assert len(recorder.names) == STEPS * (4 * len(convolutions) - 1)
        assert (abs(losses - expected) <= unit * terms * expected).all()


def test_cuda_tensors_need_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "on_gpu", lambda _: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=rf"^CUDA tensors need CuPy: {re.escape(install_hint('cuda13', 'cuda12'))} "):
        bridge.conv1d(X, W)
