"""What `gpuconv.torch.patch` reaches, what it names, and that PyTorch is as it was behind it."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests import NO_TORCH

pytest.importorskip("torch", reason=NO_TORCH)

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import conv1d as imported_conv1d
from torch.nn.functional import conv_transpose1d as imported_conv_transpose1d
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from gpuconv import torch as bridge
from gpuconv.torch import patching
from tests.torch.test_torch_bridge import PYTORCH, Recorder, compiler, computed, in_place_now

__all__ = ["compiler", "computed"]  # fixtures

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "nothing_left"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
]

OURS = ["conv1d"]
THEIRS = ["aten::convolution"]


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Behind each test PyTorch is as it was before."""
    places = (torch.utils.checkpoint.CheckpointFunction, torch.utils.checkpoint, nn.Conv1d)
    names = ("forward", "_checkpoint_without_reentrant_generator", "_conv_forward")
    before = [vars(place)[name] for place, name in zip(places, names, strict=True)]
    yield
    assert in_place_now() == PYTORCH
    assert [vars(place)[name] for place, name in zip(places, names, strict=True)] == before
    assert patching._PATCHES == []
    assert patching._ORIGINALS == {}
    assert _get_current_function_mode_stack() == []
    assert _get_current_dispatch_mode_stack() == []


def names_of(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The convolutions that a call runs."""
    with Recorder() as recorder:
        function(*arguments)
    return recorder.names


def data(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


X, W = data(2, 3, 20), data(4, 3, 3)


class Block(nn.Module):
    """Two convolutions, the second of which PyTorch has no padding for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 3, 3, padding="same").double()
        self.weight = nn.Parameter(data(3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.gelu(self.first(x))
        return functional.conv1d(y, self.weight, stride=2, padding="same")


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_forward_passes_stay_on_gpuconv(reentrant: bool) -> None:
    """Behind the context, whatever name `checkpoint` has, and one within another."""
    block = Block()
    run = functools.partial(checkpoint, use_reentrant=reentrant)
    results = []
    for call in (block, lambda x: run(block, x), lambda x: run(lambda t: run(block, t) * 1, x)):
        x = X.clone().requires_grad_()
        block.zero_grad()
        with bridge.patch():
            y = call(x)
        assert in_place_now() == PYTORCH
        names = names_of(y.square().sum().backward)
        assert in_place_now() == PYTORCH
        assert "conv1d_weight" in names
        assert not [name for name in names if ":" in name]
        results.append((y, x.grad, *(p.grad for p in block.parameters())))
        assert ("conv1d" in names) == (call is not block)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_forward_passes_have_the_precision_of_the_first(
    reentrant: bool, computed: list[tuple[str, dict[str, Any]]]
) -> None:
    """Whichever context the backward pass runs in."""
    layer = nn.Conv1d(3, 4, 3)
    for open_now in (bridge.patch, functools.partial(bridge.patch, precision="tf32"), contextlib.nullcontext):
        x = X.float().requires_grad_()
        with bridge.patch(precision="tf32"):
            y = checkpoint(layer, x, use_reentrant=reentrant)
        del computed[:]
        with open_now():
            before = in_place_now()
            y.sum().backward()
            assert in_place_now() == before
        assert "conv1d" in [name for name, _ in computed]
        assert {keywords["precision"] for name, keywords in computed if name != "conv1d_bias"} == {"tf32"}


def test_recomputing_is_of_the_thread_that_does_it() -> None:
    """While a backward pass recomputes, another thread, in no context, has PyTorch's own functions."""
    elsewhere: list[str] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        if backward:
            thread = threading.Thread(target=lambda: elsewhere.extend(names_of(other)))
            thread.start()
            thread.join()
        return functional.conv1d(x, W)

    def other() -> None:
        x = X.clone().requires_grad_()
        checkpoint(functional.conv1d, x, W, use_reentrant=False).sum().backward()

    backward = False
    x = X.clone().requires_grad_()
    with bridge.patch():
        y = checkpoint(function, x, use_reentrant=False)
    backward = True
    assert names_of(y.sum().backward) == ["conv1d", "conv1d_input"]
    assert elsewhere
    assert all(name.startswith("aten::") for name in elsewhere)


def test_checkpoints_that_a_closing_context_overtakes() -> None:
    """Another thread may look the function up before the context of the first is closed, and call it afterwards."""
    with bridge.patch():
        forward = vars(torch.utils.checkpoint.CheckpointFunction)["forward"]
        start = torch.utils.checkpoint._checkpoint_without_reentrant_generator  # type: ignore[attr-defined]
    layer = nn.Conv1d(3, 4, 3).double()
    late = type("Late", (torch.utils.checkpoint.CheckpointFunction,), {"forward": forward})
    y = late.apply(layer, True, X.clone().requires_grad_())  # type: ignore[attr-defined]
    assert "conv1d" not in names_of(y.sum().backward)
    steps = start(layer, True)
    next(steps)
    assert list(steps) == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_ran_on_pytorch_is_recomputed_there(reentrant: bool) -> None:
    x = X.clone().requires_grad_()
    y = checkpoint(nn.Conv1d(3, 4, 3).double(), x, use_reentrant=reentrant)
    assert {name for name in names_of(y.sum().backward) if ":" not in name} == set()


class FromImport(nn.Module):
    """A module that imported the functions by name, as nnAudio does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return imported_conv_transpose1d(imported_conv1d(x, W, stride=2), W[:, :2], stride=2)


@pytest.mark.parametrize(
    "call",
    [
        imported_conv1d,
        torch.conv1d,
        functools.partial(imported_conv1d, stride=1),
        lambda x, w: functional.conv1d(input=x, weight=w),
        lambda x, w: torch.conv1d(x, weight=w),
    ],
)
def test_functions_under_other_names_are_reached(call: Callable[..., Any]) -> None:
    with bridge.patch():
        assert names_of(call, X, W) == OURS
        with torch.no_grad():
            assert names_of(call, X, W) == OURS
        with torch.inference_mode():
            assert names_of(call, X, W) == OURS
    assert names_of(call, X, W) == THEIRS
    with torch.inference_mode(), bridge.patch():
        assert names_of(call, X, W) == OURS


def test_every_name_of_pytorchs_convolutions_is_reached() -> None:
    """So are the operators, and the function for any number of axes, which PyTorch has under two names."""
    aten, up = torch.ops.aten, W.transpose(0, 1).contiguous()
    down = (None, [2], [1], [1], False, [0], 1)
    more = (False, False, False)
    for function in (torch.convolution, aten.convolution, aten.convolution.default):
        check_reached(lambda f=function: f(X, W, *down), "conv1d")
        check_reached(lambda f=function: f(X, up, data(4), [3], [1], [2], True, [1], 1), "conv_transpose1d")
    check_reached(lambda: torch.convolution(input=X, weight=W, **dict(zip(GENERAL, down, strict=True))), "conv1d")
    for function in (torch._convolution, aten._convolution, aten._convolution.deprecated):
        check_reached(lambda f=function: f(X, W, *down, *more), "conv1d")
    check_reached(lambda: aten._convolution.default(X, W, *down, *more, True), "conv1d")
    check_reached(lambda: aten.conv1d(X, W, stride=[2]), "conv1d")
    check_reached(lambda: aten.conv1d.default(X, W, data(4), [2], [1]), "conv1d")
    check_reached(lambda: aten.conv1d.padding(X, W, None, [1], "same"), "conv1d")
    for function in (aten.conv_transpose1d, aten.conv_transpose1d.default):
        check_reached(lambda f=function: f(X, up, data(4), [2], [1], [1]), "conv_transpose1d")
    plane = data(1, 3, 8, 8), data(4, 3, 3, 1)
    with bridge.patch():
        assert names_of(lambda: torch.convolution(*plane, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)) == THEIRS


GENERAL = ("bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")


def check_reached(call: Callable[[], torch.Tensor], op: str) -> None:
    with bridge.patch():
        assert names_of(call) == [op]
        ours = call()
    theirs = call()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_exported_programs_are_reached() -> None:
    """Programs exported before the context are reached, too: they call PyTorch's operators."""
    model = Detector().eval()
    program = torch.export.export(model, (X,)).module()
    with bridge.patch(strict=True):
        assert names_of(program, X) == OURS
    assert names_of(program, X) != OURS


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_come_out_as_pytorch_has_them(dtype: torch.dtype, compiler: Callable[..., Any]) -> None:
    """Sums that do not fit wrap around."""
    compiled = compiler(functional.conv1d, backend="eager")
    x, w, b = (
        torch.arange(n, n + math.prod(s)).reshape(s) * 97 for n, s in ((0, (2, 3, 9)), (5, (4, 3, 3)), (9, (4,)))
    )
    x, w, b = x.to(dtype), w.to(dtype), b.to(dtype)
    for bias in (None, b):
        theirs = functional.conv1d(x, w, bias, padding=1)
        with bridge.patch(strict=True):
            ours = functional.conv1d(x, w, bias, padding=1)
        with bridge.patch():
            assert torch.equal(compiled(x, w, bias, padding=1), theirs)
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


class Layers(nn.Module):
    """Layers below others, one of which a list holds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.Conv1d(3, 3, 3))])
        self.unknown = [nn.Conv1d(3, 4, 3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unknown[0](self.blocks[0](x))  # type: ignore[no-any-return]


def test_what_is_refused_is_named_with_its_module() -> None:
    model = Layers()
    with bridge.patch(), pytest.raises(TypeError, match=r"^conv1d: .*; called by blocks\.0\.1 \(Conv1d\) of Layers$"):
        model(X)
    model.blocks = nn.ModuleList([nn.Identity()])
    with bridge.patch(), pytest.raises(TypeError, match=r"^conv1d: .*; called by Conv1d$"):
        model(X)
    with bridge.patch(precision="tf32"), pytest.raises(ValueError, match=r'^conv1d: .* for float64, got "tf32"$'):
        functional.conv1d(X, W)


def test_models_that_imported_the_functions() -> None:
    model = FromImport()
    with bridge.patch():
        assert names_of(model, X) == ["conv1d", "conv_transpose1d"]
        ours = model(X)
    torch.testing.assert_close(ours, model(X), rtol=1e-12, atol=1e-12)


def test_other_modes_and_classes_see_the_calls() -> None:
    """They see the calls inside and outside of the context, as they see PyTorch's own."""

    class Seeing(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "conv" in getattr(func, "__name__", ""):
                self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    for function in (lambda: imported_conv1d(X, W), lambda: functional.conv1d(X, W)):
        with Seeing() as around, bridge.patch(), Seeing() as within:
            assert names_of(function) == OURS
        assert around.names == within.names == ["conv1d"]

    class Named(torch.Tensor):
        """A class as users make it."""

    with bridge.patch():
        for function in (functional.conv1d, imported_conv1d, bridge.conv1d):
            assert type(function(X.as_subclass(Named), W)) is Named
            assert type(function(X, W.as_subclass(Named))) is Named
    with bridge.patch(), torch.device("meta"):
        assert functional.conv1d(torch.empty(1, 1, 5), torch.empty(1, 1, 2)).device.type == "meta"


def test_transforms_of_torch_func_in_the_context() -> None:
    results = []
    for context in (bridge.patch(), torch.no_grad()):
        with context:
            gradient = torch.func.grad(lambda w: imported_conv1d(X, w).pow(2).sum())(W)
            results.append((gradient, torch.vmap(functional.conv1d)(X.expand(2, -1, -1, -1), torch.stack([W, -W]))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with bridge.patch():
        inside = torch.func.grad(lambda w: functional.conv1d(X, w).pow(2).sum())
    assert "conv1d" not in names_of(inside, W)
    assert "aten::convolution" in names_of(inside, W)
    assert names_of(torch.func.grad(bridge.patch()(lambda w: torch.conv1d(X, w).sum())), W)[0] == "conv1d"


class Holder(nn.Module):
    """A model that holds a scripted one, as silero-vad comes."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.held(x)  # type: ignore[no-any-return]


class Detector(nn.Module):
    """It will be scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(3, 4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


def test_strict_names_scripted_modules() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 3).double(), Holder(torch.jit.script(Detector().eval())))
    with bridge.patch():
        assert names_of(model, X) == ["conv1d", "aten::convolution"]
    name = r"1\.held \(the TorchScript module Detector\) of Sequential"
    message = rf"^patch: gpuconv did not reach aten::convolution of {name}, at {__file__}:\d+$"
    twice = bridge.patch(strict=True)(lambda: [model(X) for _ in range(2)])
    with pytest.raises(RuntimeError, match=message):
        twice()


@pytest.mark.parametrize("kind", ["traced", "frozen", "optimized", "function"])
def test_strict_names_the_callers_of_everything_compiled_before(kind: str) -> None:
    model = Detector().eval()
    frozen = torch.jit.freeze(torch.jit.script(model))
    calls: dict[str, Callable[[], Any]] = {
        "traced": lambda: torch.jit.trace(model, X),
        "frozen": lambda: frozen,
        "optimized": lambda: torch.jit.optimize_for_inference(frozen),
        "function": lambda: functools.partial(scripted_function, w=W),
    }
    call = calls[kind]()
    message = rf"^patch: gpuconv did not reach aten::_?conv.* of .*{__file__}:\d+$"
    with pytest.raises(RuntimeError, match=message), bridge.patch(strict=True):
        call(X)


@torch.jit.script
def scripted_function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A function without a module."""
    return torch.conv1d(x, w)


def test_strict_lets_everything_else_pass() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 3, 3)).double()
    x = X.clone().requires_grad_()
    theirs = model(x)
    with bridge.patch(strict=True):
        functional.conv2d(X[None], data(1, 2, 3, 3))
        model(x).sum().backward()
        theirs.sum().backward()
        checkpoint(model, x, use_reentrant=False).sum().backward()
    with pytest.raises(RuntimeError, match="did not reach aten::convolution"), bridge.patch(strict=True):
        scripted_function(X, W)

    @bridge.patch(strict=True)
    def fails() -> None:
        scripted_function(X, W)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fails()


def test_symbolic_traces_record_calls() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = functional.conv1d(x, W, None, 2, "same" if self.same else 1)
            return bridge.conv_transpose1d(y, W[:, :2], stride=2, output_size=22 if self.same else None)

        same = False

    model = Model()
    with bridge.patch():
        traced = torch.fx.symbolic_trace(model)
        model.same = True
        with_words = torch.fx.symbolic_trace(model)
        expected = model(X)
    targets = [node.target for node in with_words.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if "conv" in str(t)] == [bridge.conv1d, bridge.conv_transpose1d]
    assert torch.equal(with_words(X), expected)
    assert names_of(traced, X) == ["conv1d", "conv_transpose1d"]
    with bridge.patch():
        general = torch.fx.symbolic_trace(lambda x, w: torch.convolution(x, w, None, [2], [1], [1], False, [0], 1))
        assert names_of(general, X, W) == OURS
    outside = torch.fx.symbolic_trace(model)
    targets = [node.target for node in outside.graph.nodes if node.op == "call_function"]
    assert PYTORCH[0] in targets


def test_contexts_opened_in_what_is_compiled(compiler: Callable[..., Any]) -> None:
    layer = nn.Conv1d(3, 4, 3).double()

    def model(x: torch.Tensor) -> torch.Tensor:
        with bridge.patch():
            y = layer(x)
            with bridge.patch(precision="float32"):
                y = y + imported_conv1d(x, W)
        return y + functional.conv1d(x, W)

    compiled = compiler(model, backend="aot_eager")
    expected = model(X)
    assert torch.equal(compiled(X), expected)
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if "conv1d" in str(node.target))
        return graph

    torch.compiler.reset()
    assert torch.equal(compiler(model, backend=backend)(X), expected)
    assert [name.startswith("gpuconv.") for name in seen] == [True, True, False]
    decorated = compiler(bridge.patch()(functional.conv1d), backend="eager")
    assert torch.equal(decorated(X, W), bridge.conv1d(X, W))
    with pytest.raises(Exception, match="strict=True is not possible in code that torch"):
        compiler(bridge.patch(strict=True)(functional.conv1d), backend="eager")(X, W)


@pytest.mark.usefixtures("compiler")
def test_contexts_that_torch_compile_cannot_read() -> None:
    """Such contexts run as they are, between two graphs."""
    context = bridge.patch()

    def model(x: torch.Tensor) -> torch.Tensor:
        with context:
            y = functional.conv1d(x, W)
        return y + functional.conv1d(x, W)

    expected = bridge.conv1d(X, W) + functional.conv1d(X, W)
    assert torch.equal(torch.compile(model, backend="eager")(X), expected)
    assert in_place_now() == PYTORCH


def test_contexts_do_not_compile_anew(compiler: Callable[..., Any]) -> None:
    """What was compiled for one serves all."""
    compiled = compiler(nn.Conv1d(3, 4, 3).double(), backend="eager")
    for _ in range(12):
        with bridge.patch():
            compiled(X)
        compiled(X)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3),
        nn.ConvTranspose1d(3, 4, 3),
        nn.Conv1d(3, 4, 3, padding="same"),
        nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"),
    ],
)
def test_scripting_in_the_context_leaves_scripting_whole(layer: nn.Module) -> None:
    """The class was never scripted before: if scripting fails once, it always fails for this class."""
    Own = type(layer.__class__.__name__, (layer.__class__,), {})
    layer = copy.deepcopy(layer).double()
    layer.__class__ = Own
    with bridge.patch():
        inside = torch.jit.script(layer)
        assert [name for name in names_of(inside, X) if ":" in name] == names_of(inside, X)
    outside = torch.jit.script(layer)
    assert torch.equal(inside(X), layer(X))
    assert torch.equal(outside(X), layer(X))
    stored = io.BytesIO()
    torch.jit.save(outside, stored)
    stored.seek(0)
    assert torch.equal(torch.jit.load(stored)(X), layer(X))


def test_traced_modules_hold_gpuconv() -> None:
    with bridge.patch():
        traced = torch.jit.trace(Detector().eval(), X)
    assert names_of(traced, data(2, 3, 9)) == OURS


# Every padding that ONNX has to be told otherwise.
ONNX_CALLS: list[tuple[str, dict[str, Any]]] = [
    ("conv1d", {"padding": "same"}),
    ("conv1d", {"padding": (2, 0), "stride": 2}),
    ("conv1d", {"padding": "causal", "dilation": 2}),
    ("conv_transpose1d", {"padding": (0, 2), "stride": 2, "output_padding": 1}),
    ("conv_transpose1d", {"padding": "same", "stride": 2}),
    ("conv_transpose1d", {"padding": "same", "stride": 5}),
    ("conv_transpose1d", {"output_size": 41, "stride": 2}),
]


class Call(nn.Module):
    """One call as a model."""

    def __init__(self, op: str, keywords: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.keywords = op, keywords
        self.weight = nn.Parameter(data(4, 3, 3) if op == "conv1d" else data(3, 4, 3))
        self.bias = nn.Parameter(data(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(bridge, self.op)(x, self.weight, self.bias, **self.keywords)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("op", "keywords"), ONNX_CALLS)
def test_exporters_to_onnx_see_pytorchs_functions(
    op: str, keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx._internal.exporter import _flags

    model = Call(op, keywords).eval()
    expected = model(X)
    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)
    assert torch.equal(model(X), expected), "only what traces is told"
    program = torch.export.export(model, (X,))
    assert "gpuconv" not in program.graph_module.code
    assert f"aten.{op}" in program.graph_module.code
    torch.testing.assert_close(program.module()(X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx_files_hold_convolutions(dynamo: bool, tmp_path: Any) -> None:
    reason = "PyTorch exports to ONNX with onnx and onnxscript: pip install -e '.[test-torch]'"
    onnx = pytest.importorskip("onnx", reason=reason)
    pytest.importorskip("onnxscript", reason=reason)
    from onnx.reference import ReferenceEvaluator

    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.ReLU(), nn.ConvTranspose1d(4, 2, 4, 2, 1)).eval()
    path, x = str(tmp_path / "model.onnx"), X.float()
    with bridge.patch():
        torch.onnx.export(model, (x,), path, dynamo=dynamo)
        expected = model(x)
    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node] == ["Conv", "Relu", "ConvTranspose"]
    (result,) = ReferenceEvaluator(path).run(None, {graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def two_processes() -> Iterator[Any]:
    """A mesh of two, of which this process is the only one."""
    from torch.distributed.tensor import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_are_refused(two_processes: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x = distribute_tensor(X, two_processes, [Shard(0)])
    w = distribute_tensor(W, two_processes, [Replicate()])
    assert functional.conv1d(x, w).shape == (2, 4, 18)
    for given in ((x, w), (x.requires_grad_(), w.requires_grad_())):
        with (
            bridge.patch(),
            pytest.raises(NotImplementedError, match=r"^Operator gpuconv\.conv1d.* sharding strategy.*$"),
        ):
            functional.conv1d(*given)
    assert functional.conv1d(x, w).shape == (2, 4, 18)


def test_contexts_end_in_any_order_and_thread() -> None:
    first, second = bridge.patch(strict=True), bridge.patch()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert names_of(imported_conv1d, X, W) == OURS
    second.__exit__(None, None, None)
    assert names_of(imported_conv1d, X, W) == THEIRS

    def steps() -> Iterator[list[str]]:
        with bridge.patch():
            yield names_of(functional.conv1d, X, W)
            yield names_of(functional.conv1d, X, W)

    for close_elsewhere in (False, True):
        generator = steps()
        results: list[list[str]] = [next(generator)]
        thread = threading.Thread(target=lambda g=generator, r=results: r.append(next(g)))  # type: ignore[misc]
        thread.start()
        thread.join()
        close: Any = generator.close
        if close_elsewhere:
            thread = threading.Thread(target=close)
            thread.start()
            thread.join()
        else:
            close()
        assert results == [OURS, OURS]
        assert in_place_now() == PYTORCH
        assert names_of(imported_conv1d, X, W) == THEIRS
    with bridge.patch():
        pass  # takes the mode away that the other thread could not reach


def test_many_threads_open_contexts() -> None:
    """Each sees gpuconv in its own, and none is left."""
    start = threading.Barrier(4)
    wrong: list[Any] = []

    def work() -> None:
        start.wait()
        layer = nn.Conv1d(3, 4, 3).double()
        for _ in range(25):
            with bridge.patch():
                names = names_of(layer, X) + names_of(imported_conv1d, X, W)
            if names != OURS * 2 or _get_current_function_mode_stack():
                wrong.append(names)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_replicas_in_threads_are_reached() -> None:
    """DataParallel runs replicas in threads that opened no context."""
    layer = nn.Conv1d(3, 4, 3).double()
    found: list[list[str]] = []
    with bridge.patch():
        for _ in range(2):
            thread = threading.Thread(target=lambda: found.append(names_of(copy.deepcopy(layer), X)))
            thread.start()
            thread.join()
    assert found == [OURS, OURS]


@bridge.patch()
def calls_itself(times: int) -> torch.Tensor:
    """Contexts within contexts."""
    return functional.conv1d(X, W) if times == 0 else calls_itself(times - 1)


def test_contexts_in_recursion_and_with_errors_inside() -> None:
    assert names_of(calls_itself, 5) == OURS
    for error in (KeyboardInterrupt, GeneratorExit, ValueError):
        with pytest.raises(error), bridge.patch(), bridge.patch(precision="tf32", strict=True):
            raise error
        assert in_place_now() == PYTORCH
    with pytest.raises(ValueError, match="channels"), bridge.patch(strict=True):
        imported_conv1d(X, W[:, :2])


def test_models_are_copied_and_stored_in_the_context() -> None:
    model = build("wav2vec2")
    with bridge.patch():
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model.state_dict()))
        stored = pickle.dumps(nn.Conv1d(3, 4, 3))
    copied.load_state_dict(loaded)
    assert torch.equal(copied(data(1, 1, 400)), model(data(1, 1, 400)))
    assert names_of(pickle.loads(stored).double(), X) == THEIRS


class Wav2Vec2(nn.Module):
    """Strided layers of features, then positions from a long grouped kernel of even length with its weight normed."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            nn.Conv1d(i, 8, k, s, bias=False) for i, k, s in ((1, 10, 5), (8, 3, 2), (8, 2, 2))
        )
        self.norm = nn.GroupNorm(8, 8)
        self.positions = weight_norm(nn.Conv1d(8, 8, 16, padding=8, groups=4), name="weight", dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.features):
            x = layer(x)
            x = functional.gelu(self.norm(x) if i == 0 else x)
        x = x.transpose(1, 2)  # (N, L, C), as attention reads it
        return x + functional.gelu(self.positions(x.transpose(1, 2))[..., :-1]).transpose(1, 2)


class Mamba(nn.Module):
    """A depthwise causal convolution between linear layers, of a tensor that lies in memory as (N, L, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(1, 12), nn.Linear(6, 1)
        self.conv = nn.Conv1d(6, 6, 4, groups=6, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.before(x.transpose(1, 2)).chunk(2, dim=-1)
        y = functional.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]])
        return self.after(y.transpose(1, 2) * functional.silu(gate))  # type: ignore[no-any-return]


class HiFiGAN(nn.Module):
    """Upsampling with blocks of dilated layers, each of which is recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(
            weight_norm(nn.ConvTranspose1d(i, o, 2 * s, s, s // 2 + s % 2, output_padding=s % 2))
            for i, o, s in ((1, 8, 4), (8, 4, 3))
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(weight_norm(nn.Conv1d(c, c, 3, padding=d, dilation=d)) for d in (1, 3, 5)) for c in (8, 4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, block in zip(self.up, self.blocks, strict=True):
            x = up(functional.leaky_relu(x, 0.1))
            for layer in block:  # type: ignore[attr-defined]
                x = x + checkpoint(layer, functional.leaky_relu(x, 0.1), use_reentrant=False)
        return torch.tanh(x)


MODELS: dict[str, type[nn.Module]] = {"wav2vec2": Wav2Vec2, "mamba": Mamba, "hifigan": HiFiGAN}


def build(name: str) -> nn.Module:
    torch.manual_seed(5)
    return MODELS[name]().double()


@pytest.mark.parametrize("name", MODELS)
def test_models_and_their_gradients(name: str) -> None:
    """The backward pass runs behind the context; no convolution of PyTorch's own takes part in either."""
    results = []
    for context in (bridge.patch(strict=True), torch.enable_grad()):
        model = build(name)
        x = data(2, 1, 400)[..., :: 1 if name == "wav2vec2" else 10].requires_grad_()
        with Recorder() as recorder:
            with context:
                y = model(x)
            y.square().mean().backward()
        results.append((y, *(p.grad for p in model.parameters())))
        assert {":" in called for called in recorder.names} == {len(results) == 2}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_tensors_that_lie_otherwise_in_memory() -> None:
    """Channels last, and every other axis order."""
    layer = nn.Conv1d(3, 4, 3).double()
    for axes in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)):
        back = tuple(axes.index(i) for i in range(3))
        x = X.permute(axes).contiguous().permute(back)
        with bridge.patch():
            ours = layer(x)
        torch.testing.assert_close(ours, layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keywords", [{"stride": 3, "padding": 1}, {"stride": 2, "padding": "same"}, {"stride": 4}])
def test_output_size_is_that_of_arrays(keywords: dict[str, Any]) -> None:
    import gpuconv

    w = W.transpose(0, 1).contiguous()
    plain = bridge.conv_transpose1d(X, w, **keywords).shape[-1]
    for wanted in (plain, plain + (0 if keywords.get("padding") == "same" else 1)):
        leaf = X.clone().requires_grad_()
        y = bridge.conv_transpose1d(leaf, w, output_size=[wanted], **keywords)
        assert y.shape[-1] == wanted
        expected = gpuconv.conv_transpose1d(X.numpy(), w.numpy(), output_size=wanted, **keywords)
        assert torch.equal(y.detach(), torch.from_numpy(expected))
        assert torch.autograd.gradcheck(
            lambda x, k=wanted: bridge.conv_transpose1d(x, w, output_size=k, **keywords), leaf, fast_mode=True
        )
    with pytest.raises(ValueError, match=re.escape("conv_transpose1d: output_size must be")):
        bridge.conv_transpose1d(X, w, output_size=plain + 9, **keywords)
    with pytest.raises(ValueError, match="give output_padding or output_size, not both"):
        bridge.conv_transpose1d(X, w, stride=2, output_padding=1, output_size=plain)


def test_output_size_compiles(compiler: Callable[..., Any]) -> None:
    w = W.transpose(0, 1).contiguous()

    def up(x: torch.Tensor) -> torch.Tensor:
        return bridge.conv_transpose1d(x, w, stride=2, output_size=2 * x.shape[-1] + 1)

    compiled = compiler(up, backend="aot_eager", dynamic=True)
    for length in (20, 33):
        x = data(2, 3, length)
        assert torch.equal(compiled(x), up(x))
