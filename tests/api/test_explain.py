"""`gpuconv.explain`: what it says of a call is what the call does."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cases, cpu, dispatch, runtime
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.explain import SETTINGS, Explanation, explain
from gpuconv.explanation import MAX_CANDIDATES
from gpuconv.families import FAMILIES, Config, Family, Layout, Refusal
from gpuconv.problem import ArraySpec, ConvProblem
from tests.fake_cupy import fake_cupy


def spec(*shape: int, dtype: Any = "float32") -> ArraySpec:
    return ArraySpec(shape, dtype)


X, W, B = spec(8, 512, 3000), spec(512, 512, 3), spec(512)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_case_is_explained_as_dispatch_chooses(case: cases.Case, arch: str) -> None:
    p = case.problem
    bias = None if p.bias_shape is None else spec(*p.bias_shape)
    found = explain(p.op, spec(*p.input_shape), spec(*p.weight_shape), bias, device=arch, **dict(case.settings))
    assert found.problem == p
    assert found.device == ARCHITECTURES[arch]
    assert found.choice == dispatch.choose(p, Layout.contiguous(p), ARCHITECTURES[arch])
    assert found.method is None
    assert found.copies == ()
    assert (found.flops, found.bytes) == (p.flops(), p.bytes())


def test_the_figures() -> None:
    found = explain("conv1d", X, W, B, stride=2, padding=1, device="sm_90")
    assert found.problem.L_out == 1500
    assert found.problem.padding == (1, 1)
    assert found.flops == 2 * 8 * 512 * 1500 * 512 * 3
    assert found.bytes == 4 * (8 * 512 * 3000 + 512 * 512 * 3 + 512 + 8 * 512 * 1500)
    assert found.intensity == pytest.approx(found.flops / found.bytes, rel=1e-15)


def test_a_device_may_be_given_as_a_value() -> None:
    device = Device("a small one", 90, 2, 1 << 16, 1 << 16, 1 << 20)
    assert explain("conv1d", X, W, device=device).device is device


def test_the_text() -> None:
    found = explain("conv_transpose1d", spec(16, 50), spec(16, 33, 3), stride=2, output_padding=1, device="sm_80")
    choice = found.choice
    assert choice is not None
    macros = ", ".join(f"{name}={value}" for name, value in choice.config.macros)
    lines = found.page(width=500).splitlines()
    model = next(i for i, line in enumerate(lines) if line.startswith("  model "))
    shown = min(len(choice.plan.candidates), MAX_CANDIDATES)
    del lines[model : model + shown + 1 + (len(choice.plan.candidates) > shown)]
    pack, own = choice.plan.steps
    assert own == choice.step
    assert lines == [
        "conv_transpose1d on A100 (sm_80)",
        "  input     (16, 50) float32",
        "  weight    (16, 33, 3)",
        "  output    (33, 102)",
        "  settings  stride 2, padding (0, 0), dilation 1, groups 1, output_padding 1",
        *(f"  refused   {family}: {reason}" for family, reason in choice.refusals),
        "  sums      on CUDA cores, by fused multiply-adds, in float32",
        f"  kernel    {choice.family} with {macros}",
        f"  launch    {choice.launch.grid} blocks of {choice.launch.block} threads, "
        f"{choice.launch.shared_bytes} B of shared memory, {choice.launch.index_bits}-bit offsets",
        f"  before    {pack.config.kernel}: {pack.launch.grid} blocks of {pack.launch.block} threads, "
        f"{pack.launch.shared_bytes} B of shared memory, 32-bit offsets",
        f"  buffers   packed ({choice.plan.scratch_bytes('packed') / 1000:.3g} kB)",
        "  work      158 kFLOP, at least 23 kB moved, 6.89 FLOP/B",
        "  copies    none",
    ]


PAGES: dict[str, tuple[str, tuple[ArraySpec, ...], str, dict[str, Any]]] = {
    "mma": ("conv1d", (X, W, B), "sm_90", {"stride": 2}),
    "stem": ("conv1d", (spec(8, 2, 300_000), spec(100, 2, 3)), "sm_90", {}),
    "refused": ("conv1d", (spec(1, 300, 16), spec(1000, 300, 3)), "sm_75", {}),
    "depthwise": ("conv1d", (spec(8, 300, 3000), spec(300, 1, 3)), "sm_80", {"groups": 300}),
    "transposed": ("conv_transpose1d", (X, spec(512, 256, 4)), "sm_75", {"stride": 2, "output_padding": 1}),
    "grad_input": ("conv1d", (X, W), "sm_90", {"stride": 2, "direction": "grad_input"}),
    "grad_weight": ("conv1d", (spec(8, 1, 3000), spec(1, 1, 3)), "sm_90", {"direction": "grad_weight"}),
    "tf32": ("conv1d", (X, W), "sm_90", {"direction": "grad_weight", "precision": "tf32"}),
    "grad_bias": ("conv1d", (X, W, B), "sm_90", {"direction": "grad_bias"}),
    "cpu": ("conv1d", (X, W), "cpu", {}),
    "empty": ("conv1d", (spec(0, 3, 20), spec(4, 3, 3)), "sm_90", {}),
}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_its_width_and_loses_no_word(name: str, width: int) -> None:
    op, arrays, device, settings = PAGES[name]
    found = explain(op, *arrays, device=device, **settings)  # type: ignore[call-overload]
    lines = found.page(width).splitlines()
    assert max(map(len, lines)) <= width
    assert " ".join(lines).split() == found.page(10**6).split()
    column = lines[1].index("(")
    for line in lines[1:]:
        assert line[:2] == line[column - 2 : column] == "  "
    assert str(found) == found.page(80)


@pytest.mark.parametrize(
    ("dtype", "settings", "words"),
    [
        ("float32", {}, "on tensor cores, of split TF32 products, in float32"),
        ("float32", {"precision": "tf32"}, "on tensor cores, of TF32 products, in float32"),
        ("bfloat16", {}, "on tensor cores, of bfloat16 products, in float32"),
        ("bfloat16", {"direction": "grad_weight"}, "on tensor cores, of bfloat16 products, in float32"),
        ("float32", {"algorithm": "base"}, "on CUDA cores, by fused multiply-adds, in float32"),
        ("float16", {"direction": "grad_bias"}, "on CUDA cores, in float32"),
        ("complex128", {}, "on CUDA cores, by fused multiply-adds, in float64"),
        ("int8", {}, "on CUDA cores, exact, in int64"),
    ],
)
def test_how_sums_are_formed(dtype: str, settings: dict[str, Any], words: str) -> None:
    x, w, b = (array._replace(dtype=dtype) for array in (X, W, B))
    found = explain("conv1d", x, w, b if "direction" in settings else None, device="sm_90", **settings)
    assert ["sums", *words.split()] in [line.split() for line in found.page(width=500).splitlines()]
    assert found.to_dict()["kernel"]["sums"] == words
    assert found.choice is not None
    of_family = {family.name: family for family in FAMILIES}[found.choice.family]
    assert of_family.canonical_order == words.startswith("on CUDA cores")


def test_how_a_layout_is_staged() -> None:
    """Channels of a view of an array of another shape are contiguous; the view may be misaligned."""
    w = np.zeros((64, 64, 3), np.float16)
    x = np.zeros((2, 100, 72), np.float16)
    for view, words in (
        (x[:, :, :64], "16 bytes of contiguous channels"),
        (x[:, :, 4:68], "one position of a channel"),
        (np.zeros((2, 64, 100), np.float16).swapaxes(1, 2), "two positions of a channel"),
    ):
        found = explain("conv1d", view.swapaxes(1, 2), w, device="sm_90")
        assert f"staging   input by {words} at a time" in str(found)
        assert found.to_dict()["kernel"]["staging"] == {"input": words}


def test_the_model_is_told_in_microseconds() -> None:
    found = explain("conv1d", X, W, B, stride=2, device="sm_90")
    assert found.choice is not None
    lines = str(found).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  model "))
    assert lines[start].endswith("predicted, not measured, at 1.75 GHz:")
    candidates = found.choice.plan.candidates[:MAX_CANDIDATES]
    rows = [line.split() for line in lines[start + 1 : start + 1 + len(candidates)]]
    assert rows[0][-1] == "(chosen)"
    for row, (name, us) in zip(rows, candidates, strict=True):
        assert float(row[0]) == pytest.approx(us, rel=0.01)
        assert row[1] == "us"
        assert " ".join(row[3:]).removesuffix(" (chosen)") == name
    bars = [len(row[2]) for row in rows]
    assert bars == sorted(bars)
    assert {character for row in rows for character in row[2]} == {"#"}
    assert bars[0] / bars[-1] == pytest.approx(candidates[0][1] / candidates[-1][1], abs=0.1)
    kernel = found.to_dict()["kernel"]
    assert [(c["configuration"], c["predicted_us"]) for c in kernel["candidates"]] == list(found.choice.plan.candidates)


def test_of_many_configurations_the_fastest_are_shown() -> None:
    op, arrays, device, settings = PAGES["refused"]
    found = explain(op, *arrays, device=device, **settings)  # type: ignore[call-overload]
    assert found.choice is not None
    assert len(found.choice.plan.candidates) > MAX_CANDIDATES + 1
    assert str(found).count(" us ") == MAX_CANDIDATES
    assert f" and {len(found.choice.plan.candidates) - MAX_CANDIDATES} slower ones\n" in str(found)


def test_one_thing_is_singular() -> None:
    assert " 1 row by " in str(explain("conv1d", spec(1, 1, 3000), spec(1, 1, 3), device="sm_80"))


def test_the_dict_survives_json() -> None:
    found = explain("conv1d", X, W, B, stride=2, padding=1, device="sm_90")
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain == found.to_dict()
    choice = found.choice
    assert choice is not None
    assert plain["problem"]["output_shape"] == [8, 512, 1500]
    assert plain["problem"]["padding_left"] == 1
    assert plain["device"]["arch"] == 90
    assert plain["kernel"]["family"] == choice.family
    assert plain["kernel"]["macros"] == dict(choice.config.macros)
    assert plain["kernel"]["launch"]["grid"] == choice.launch.grid
    assert plain["kernel"]["launch"]["params"]["L_out"] == 1500
    assert plain["method"] is None
    assert plain["copies"] == []


# For each setting values that differ from the default, with what else the call needs.
OTHER_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "stride": [{"stride": 2}],
    "padding": [{"padding": 1}, {"padding": (1, 0)}, {"padding": (0, 1)}],
    "dilation": [{"dilation": 2}],
    "groups": [{"groups": 2, "weight": spec(8, 4, 3)}],
    "padding_mode": [{"padding_mode": "reflect", "padding": 1}],
    "input_activation": [{"input_activation": "relu"}, {"input_activation": ("snake", spec(8))}],
    "residual": [{"residual": True}],
    "activation": [{"activation": "relu"}, {"activation": "silu"}, {"activation": ("leaky_relu", 0.5)}],
    "lengths": [{"lengths": [30, 20]}, {"lengths": [30, 21]}],
    "precision": [{"precision": "tf32"}],
    "algorithm": [{"algorithm": name} for name in ("base", "auto", "fft")],
    "out_dtype": [{"out_dtype": name, "dtype": "int8"} for name in ("int32", "int64")],
    "output_padding": [{"output_padding": 1, "stride": 2}],
    "output_size": [{"output_size": 92, "stride": 3}],
}


def told(op: Any, **given: Any) -> str:
    """What JSON tells of a call on (2, 8, 30) with 8 channels."""
    x, w, dtype = given.pop("input", spec(2, 8, 30)), given.pop("weight", spec(8, 8, 3)), given.pop("dtype", None)
    if dtype is not None:
        x, w = spec(*x.shape, dtype=dtype), spec(*w.shape, dtype=dtype)
    if given.get("residual"):
        given["residual"] = spec(*explain(op, x, w, device="cpu").shapes["output"])
    return json.dumps(explain(op, x, w, given.pop("bias", None), **{"device": "sm_90", **given}).to_dict())


@pytest.mark.parametrize("op", SETTINGS)
def test_the_dict_tells_every_argument(op: Any) -> None:
    """Calls of which an argument differs have different dictionaries, even where they run the same kernels."""
    calls: list[dict[str, Any]] = [{}, {"bias": spec(8)}, {"device": "cpu"}, {"device": "sm_80"}]
    calls += [{"dtype": "float16"}, {"input": spec(2, 8, 31)}, {"weight": spec(8, 8, 4)}]
    calls += [{"input": spec(1, 8, 30)}, {"input": spec(8, 30)}]
    calls += [{"direction": name} for name in ("grad_input", "grad_weight", "grad_bias")]
    calls += [{"direction": name, "algorithm": "base"} for name in ("grad_input", "grad_weight", "grad_bias")]
    for setting in SETTINGS[op]:
        calls += [c for c in OTHER_SETTINGS[setting] if op == "conv1d" or "padding_mode" not in c]
    if op == "conv1d":  # the padding of each sample follows its length
        calls += [{"lengths": [30, 30], "stride": 2, "padding": padding} for padding in ("same", (0, 1))]
    zeros, w = np.zeros((2, 8, 30), np.float32), np.zeros((8, 8, 3), np.float32)
    wide, bytes_ = np.zeros((2, 30, 8), np.float32), np.zeros(zeros.nbytes + 4, np.uint8)
    odd = bytes_[4:].view(np.float32).reshape(2, 8, 30)
    for x in (zeros.astype(">f4"), wide.swapaxes(1, 2), odd, zeros[..., ::-1]):
        calls.append({"input": x, "weight": w})
    texts = [told(op, **call) for call in calls]
    for text, call in zip(texts, calls, strict=True):
        assert texts.count(text) == 1, call


@pytest.mark.parametrize("op", SETTINGS)
@pytest.mark.parametrize("algorithm", [None, "base", "auto", "fft"])
def test_the_arguments_that_the_dict_tells_give_it_again(op: Any, algorithm: str | None) -> None:
    lengths = [60, 41]
    settings: dict[str, Any] = {"stride": 2, "algorithm": algorithm, "dilation": 2}
    of_calls: list[dict[str, Any]] = [{}, {"padding": 2}, {"padding": "same"}, {"padding": "same", "lengths": lengths}]
    for more in (*of_calls, {"padding": 2, "lengths": lengths}):
        given = {**settings, **more}
        found = json.loads(told(op, input=spec(2, 8, 60), **given))
        problem = found["problem"]
        names = ("stride", "dilation", "groups", "output_padding" if op == "conv_transpose1d" else "padding_mode")
        again = {name: problem[name] for name in names}
        if found["padding"] == "same":
            again.pop("output_padding", None)
        arrays = {name: spec(*problem[f"{name}_shape"], dtype=problem["dtype"]) for name in ("input", "weight")}
        device = Device(**found["device"])
        again.update((name, found[name]) for name in ("algorithm", "lengths", "direction"))
        padding = found["padding"]
        again["padding"] = padding if padding == "same" else tuple(padding)
        assert json.loads(told(found["op"], device=device, **arrays, **again)) == found


def test_the_algorithm_is_told() -> None:
    found = explain("conv1d", X, W, algorithm="base", device="sm_90")
    assert found.to_dict()["algorithm"] == "base"
    assert "groups 1, algorithm base\n" in str(found)


def test_an_empty_output_launches_nothing() -> None:
    found = explain("conv1d", spec(0, 3, 20), spec(4, 3, 3), device="sm_90")
    assert found.choice is None
    assert found.to_dict()["kernel"] is None
    assert "nothing is launched" in str(found)


def test_bfloat16_needs_no_package_to_be_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    x, w = spec(1, 4, 20, dtype="bfloat16"), spec(4, 4, 3, dtype="bfloat16")
    assert explain("conv1d", x, w, device="sm_90").bytes == 2 * (4 * 20 + 4 * 4 * 3 + 4 * 18)


class _Picky(Family[ConvProblem]):
    """Stands in front of the others and takes nothing."""

    name = "conv1d_picky"
    kind = "conv1d"

    def plan(self, problem: ConvProblem, layout: Layout, device: Device) -> Refusal:
        return Refusal(f"needs C_in/groups >= 1000, got {problem.C_in_g}")

    def configs(self, device: Device) -> Iterator[Config]:
        return iter(())


def test_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FAMILIES", (_Picky(), *FAMILIES))
    dispatch.choose.cache_clear()
    try:
        found = explain("conv1d", spec(2, 7, 77), spec(3, 7, 5), device="sm_90")
    finally:
        dispatch.choose.cache_clear()
    assert "  refused   conv1d_picky: needs C_in/groups >= 1000, got 7\n" in str(found)
    refusal = {"family": "conv1d_picky", "reason": "needs C_in/groups >= 1000, got 7"}
    assert found.to_dict()["kernel"]["refusals"][0] == refusal


def test_strides_reach_the_kernel_and_need_no_copy() -> None:
    x = np.zeros((2, 60, 8), np.float32).transpose(0, 2, 1)[..., ::-2]
    found = explain("conv1d", x, np.zeros((4, 8, 3), np.float32), device="sm_90")
    assert found.copies == ()
    assert found.choice is not None
    params = dict(found.choice.launch.params)
    strides = tuple(params[f"input_stride_{axis}"] for axis in "ncl")
    assert strides == tuple(stride // 4 for stride in x.strides) == (480, 1, -16)


def test_arrays_between_elements_are_copied() -> None:
    buffer = np.zeros(4 * 8 * 30 + 1, np.uint8)
    x = buffer[1:].view(np.float32).reshape(8, 30)
    fields = np.zeros((4, 8, 3), np.dtype([("tag", "i2"), ("value", "f4")]))
    found = explain("conv1d", x, fields["value"], np.zeros(4, np.float32), device="sm_90")
    assert found.copies == ("input", "weight")
    assert found.copy_bytes == 4 * (8 * 30 + 4 * 8 * 3)
    assert found.to_dict()["copies"] == ["input", "weight"]
    assert "  copies    input, weight (1.34 kB)" in str(found)
    aligned = explain("conv1d", spec(8, 30), spec(4, 8, 3), spec(4), device="sm_90")
    assert found.choice == aligned.choice


class _FakeArray:
    """What gpuconv reads of a CuPy array."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], address: int) -> None:
        self.shape, self.strides, self.dtype = shape, strides, np.dtype(np.float32)
        self.data = SimpleNamespace(ptr=address, device_id=1)


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    """A CuPy with two GPUs that can plan but not launch."""
    with fake_cupy(Device("GPU number 1", 89, 7, 101376, 102400, 1 << 20), index=1) as fake:
        fake.ndarray = _FakeArray
        fake.cuda.function = SimpleNamespace(CNumpyArray=lambda array: array)
        fake.RawKernel = lambda text, name: SimpleNamespace(kernel=(text, name))
        yield


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize(("address", "stride"), [(512, 4), (516, 4), (513, 4), (512, 6), (512, 0), (512, -8)])
@pytest.mark.parametrize("batched", [True, False])
def test_cupy_arrays_are_explained_as_the_runtime_plans_them(address: int, stride: int, batched: bool) -> None:
    shape, strides = ((2, 8, 30), (8 * 256, 256, stride)) if batched else ((8, 30), (256, stride))
    x = _FakeArray(shape, strides, address)
    w, b = _FakeArray((4, 8, 3), (96, 12, 4), 1024), _FakeArray((4,), (4,), 2050)
    found = explain("conv1d", x, w, b, padding="same")
    executor = runtime.make_executor(found.problem, ("input", "weight", "bias"), (x, w, b), None)
    assert found.device is not None
    assert found.device.name == "GPU number 1"
    assert found.choice == executor.choice
    assert found.copies == executor.copies == (("bias",) if address % 4 == stride % 4 == 0 else ("input", "bias"))


@pytest.mark.usefixtures("fake_gpu")
def test_mixed_arrays_are_refused_as_the_call_refuses_them() -> None:
    x = _FakeArray((8, 30), (120, 4), 512)
    with pytest.raises(TypeError, match="all arrays must be of one kind and on one device"):
        explain("conv1d", x, np.zeros((4, 8, 3), np.float32))


def test_numpy_arrays_are_explained_for_the_cpu() -> None:
    x, w = np.zeros((2, 8, 300), np.float32), np.zeros((4, 8, 3), np.float32)
    found = explain("conv1d", x, w)
    assert found == explain("conv1d", spec(2, 8, 300), spec(4, 8, 3), device="cpu")
    assert found.device is None
    assert found.choice is None
    method = cpu.method(found.problem)
    assert found.method == method
    text = found.page(width=500)
    assert text.startswith("conv1d on the CPU, through NumPy\n")
    assert f"  method     {method.name}: {method.reason}\n" in text
    assert "  workspace  at most " in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["method"] == {
        "name": method.name, "reason": method.reason, "workspace_bytes": method.workspace_bytes,
    }  # fmt: skip
    assert plain["kernel"] is None
    assert plain["device"] == {"name": "CPU"}


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_case_is_explained_for_the_cpu(case: cases.Case) -> None:
    p = case.problem
    bias = None if p.bias_shape is None else spec(*p.bias_shape)
    found = explain(p.op, spec(*p.input_shape), spec(*p.weight_shape), bias, device="cpu", **dict(case.settings))
    assert found.problem == p
    assert found.method == cpu.method(p)


def test_foreign_byte_order_is_copied_on_the_cpu() -> None:
    x, w = np.zeros((8, 300), ">f4"), np.zeros((4, 8, 3), "<f4")
    swapped = "input" if sys.byteorder == "little" else "weight"
    assert explain("conv1d", x, w).copies == (swapped,)


def test_it_is_public() -> None:
    assert gpuconv.explain is explain
    assert "explain" in gpuconv.__all__


def test_it_is_a_value() -> None:
    found = explain("conv1d", X, W, device="sm_90")
    assert isinstance(found, Explanation)
    assert hash(found) == hash(explain("conv1d", X, W, device="sm_90"))
    with pytest.raises(AttributeError):
        found.copies = ()  # type: ignore[misc]


def test_the_settings_are_those_of_the_functions() -> None:
    import inspect

    arrays = {"input", "weight", "bias", "out"}
    for op, names in SETTINGS.items():
        assert set(names) == inspect.signature(getattr(gpuconv, op)).parameters.keys() - arrays


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((["conv1d"], X, W), {"device": "cpu"}, ValueError, 'op must be one of "conv1d" and "conv_transpose1d"'),
        (("conv2d", X, W), {"device": "cpu"}, ValueError, 'op must be one of "conv1d" and "conv_transpose1d"'),
        (("conv1d", X, W), {}, ValueError, "device must be given .* got input as an ArraySpec"),
        (
            ("conv1d", X, W),
            {"device": "sm_42"},
            ValueError,
            'device must be "cpu", one of sm_75, .*, got .sm_42.',
        ),
        (("conv1d", X, W), {"device": "gpu"}, ValueError, "got 'gpu'; without device the arrays tell it"),
        (
            ("conv1d", (1, 4, 9), W),
            {"device": "cpu"},
            TypeError,
            r"explain: input must be an array or an ArraySpec, got tuple; a shape becomes "
            r'gpuconv.problem.ArraySpec\(\(1, 4, 9\), "float32"\)',
        ),
        (("conv1d", X, [2, 4, 3]), {"device": "cpu"}, TypeError, "weight must be an array or an ArraySpec, got list"),
        (("conv1d", X, W), {"device": 90}, TypeError, "device must be None, .* got int"),
        (
            ("conv1d", X, W),
            {"device": "cpu", "output_size": 3, "kernel": 1},
            TypeError,
            "conv1d has the settings stride, .* got kernel, output_size$",
        ),
        (("conv1d", X, W), {"device": "cpu", "stride": 0}, ValueError, "conv1d: stride must be at least 1"),
        (("conv1d", X, W), {"device": "cpu", "precision": "bf16"}, ValueError, "precision must be"),
        (("conv1d", X, W), {"device": "cpu", "padding_mode": "wrap"}, ValueError, "padding_mode must be"),
        (("conv1d", spec(2, -3, 8), W), {"device": "cpu"}, ValueError, "each extent of input must be at least 0"),
        (("conv1d", ArraySpec((2, 3.5, 8), "float32"), W), {"device": "cpu"}, TypeError, "extent of input must be"),
        (("conv1d", X, spec(512, 51, 3)), {"device": "cpu"}, ValueError, "expects C_in = 51"),
        (("conv1d", X, W, spec(511)), {"device": "sm_90"}, ValueError, "bias must have shape"),
        (("conv1d", np.zeros((2, 8)), [[[1.0]]]), {}, TypeError, "weight must be an array or an ArraySpec, got list$"),
        (("conv1d", X, None), {"device": "cpu"}, TypeError, "weight must be an array"),
    ],
)
def test_bad_arguments(
    arguments: tuple[Any, ...], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        explain(*arguments, **settings)


def test_gradient_of_weights() -> None:
    x, w = ArraySpec((32, 512, 1500), "float32"), ArraySpec((512, 1, 31), "float32")
    e = gpuconv.explain("conv1d", x, w, padding=15, groups=512, direction="grad_weight", device="sm_90")
    assert e.choice is not None
    assert e.choice.family == "weight_gradient_pairs"
    assert e.choice.plan.scratch_bytes("partial") == 96 * 512 * 31 * 4
    page = str(e)
    assert page.startswith("gradient of conv1d's weight on H200")
    for part in ("grad_output  (32, 512, 1500)", "after        sum_slices: ", "partial (6.09 MB)", "copies       none"):
        assert part in page
    kernel = json.loads(json.dumps(e.to_dict()))["kernel"]
    params = kernel["launch"]["params"]
    assert [params[f"slice_{name}"] for name in ("samples", "positions", "pieces")] == [1, 512, 3]
    assert kernel["scratch"] == {"partial": 96 * 512 * 31 * 4}
    own, total = kernel["steps"]
    assert (own["kernel"], own["launch"]) == ("weight_gradient_pairs", kernel["launch"])
    assert own["arrays"] == ["coarse", "fine", "partial", None]
    assert total["arrays"] == ["partial", "grad_weight"]
    assert total["launch"]["params"]["slices"] == 96


def test_gradient_of_weights_in_one_slice() -> None:
    x, w = ArraySpec((1, 4, 50), "float64"), ArraySpec((4, 6, 3), "float64")
    e = gpuconv.explain("conv_transpose1d", x, w, stride=2, direction="grad_weight", device="sm_80")
    assert e.to_dict()["kernel"]["scratch"] == {}
    assert len(e.to_dict()["kernel"]["steps"]) == 1
    assert "sum_slices" not in str(e)
    assert "input        (1, 4, 50)" in str(e).splitlines()[1]


def test_gradients_of_arrays_that_must_be_copied_and_of_empty_ones() -> None:
    x = np.ndarray((2, 3, 20), np.complex64, np.empty(2 * 3 * 20 * 8 + 4, np.uint8).data, 4)
    w = np.ones((5, 3, 3), np.complex64)
    e = gpuconv.explain("conv1d", x, w, direction="grad_weight", device="sm_90")
    assert e.copies == ("input",)
    assert e.copy_bytes == x.nbytes
    e = gpuconv.explain("conv1d", x[:0], w, direction="grad_weight", device="sm_90")
    assert e.choice is None
    assert "the gradient is zero" in str(e)


def test_gradient_of_weights_on_the_cpu() -> None:
    x, w = np.ones((2, 3, 20), ">f4"), np.ones((5, 3, 3), ">f4")
    e = gpuconv.explain("conv1d", x, w, direction="grad_weight")
    assert e.method is not None
    assert e.copies == ("input",)
    assert "through NumPy" in str(e)


def test_gradient_of_a_bias() -> None:
    x, w, b = (ArraySpec(shape, "bfloat16") for shape in ((8, 64, 3000), (32, 64, 3), (32,)))
    e = gpuconv.explain("conv1d", x, w, b, direction="grad_bias", device="sm_90")
    assert e.choice is not None
    assert e.choice.family == "bias_gradient_rows"
    assert "grad_output  (8, 32, 2998) bfloat16" in str(e)
    assert gpuconv.explain("conv1d", x, w, b, direction="grad_bias", device="cpu").choice is None


def test_gradient_of_an_input_is_the_other_operation() -> None:
    x, w = ArraySpec((8, 64, 301), "float32"), ArraySpec((32, 64, 4), "float32")
    e = gpuconv.explain("conv1d", x, w, stride=2, direction="grad_input", device="sm_90")
    assert isinstance(e.problem, ConvProblem)
    assert e.problem.op == "conv_transpose1d"
    assert e.problem.output_shape == x.shape
    assert e.copies == ()
    lines = str(e).split("\n")
    assert lines[0] == "gradient of conv1d's input on H200 (sm_90)"
    assert [line.split()[0] for line in lines[1:4]] == ["grad_output", "weight", "grad_input"]
    assert lines[4].split()[:2] == ["settings", "conv_transpose1d,"]
    assert "  staging      grad_output by " in str(e)
    x, w = x._replace(dtype="complex64"), w._replace(dtype="complex64")
    e = gpuconv.explain("conv1d", x, w, stride=2, direction="grad_input", device="sm_90")
    assert e.copies == ("weight",)  # its conjugate
    with pytest.raises(ValueError, match="no positions"):
        gpuconv.explain("conv1d", x._replace(shape=(8, 64, 0)), w, padding=4, direction="grad_input", device="sm_90")


def test_unknown_direction() -> None:
    x, w = ArraySpec((8, 64, 301), "float32"), ArraySpec((32, 64, 4), "float32")
    with pytest.raises(ValueError, match="direction must be one of forward, grad_input, grad_weight, grad_bias"):
        gpuconv.explain("conv1d", x, w, direction="backward", device="sm_90")  # type: ignore[call-overload]


def test_an_algorithm_is_explained() -> None:
    x, w = spec(2, 64, 100), spec(64, 64, 3)
    assert explain("conv1d", x, w, device="sm_90").choice.family == "conv1d_mma"
    found = explain("conv1d", x, w, device="sm_90", algorithm="base")
    assert (found.choice.family, found.choice.refusals) == ("conv1d_direct", ())
    assert "conv1d_direct" in str(found)
    assert explain("conv1d", x, w, device="sm_90", algorithm="conv1d_tiled").choice.family == "conv1d_tiled"
    assert explain("conv1d", x, w, device="cpu", algorithm="base").method is not None
    with pytest.raises(ValueError, match=r"^conv1d: algorithm 'conv1d_depthwise' does not take conv1d N2 .*: needs"):
        explain("conv1d", x, w, device="sm_90", algorithm="conv1d_depthwise")
    found = explain("conv1d", x, w, device="sm_90", direction="grad_weight", algorithm="base")
    assert found.choice.family == "weight_gradient_direct"
    found = explain("conv1d", x, w, device="sm_90", direction="grad_input", algorithm="conv_transpose1d_phases")
    assert found.choice.family == "conv_transpose1d_phases"
    with pytest.raises(ValueError, match=r"^explain: algorithm must be None or one of base, weight_gradient_mma, "):
        explain("conv1d", x, w, device="sm_90", direction="grad_weight", algorithm="conv1d_direct")


def test_the_table_of_layers_on_tensor_cores_is_right() -> None:
    """At every limit of the table in `help(gpuconv)`: the layer at the limit is on tensor cores, one below is not."""
    on_tensor_cores = {family.name for family in FAMILIES if not family.canonical_order}
    row = r"^\| (\w+)(, `precision=\"tf32\"`)? \| (sm_\d+) \| (\d+) \| (.*?) ?\| (\d+) taps, (\d+) .*? \| (.*) \|$"
    rows = re.findall(row, gpuconv.__doc__ or "", re.MULTILINE)
    assert [found[0] for found in rows] == ["float16", "bfloat16", "float32", "float32"]
    archs = [*ARCHITECTURES]
    for dtype, tf32, first, C_out, dense, taps, products, depthwise in rows:

        def runs(
            C_in: int, C_out: int, K: int, groups: int = 1, arch: str = first, dtype: str = dtype, tf32: str = tf32
        ) -> bool:
            x, w = spec(4, C_in, 3000, dtype=dtype), spec(C_out, C_in // groups, K, dtype=dtype)
            precision = "tf32" if tf32 else "float32"
            found = explain("conv1d", x, w, groups=groups, precision=precision, device=arch)
            assert found.choice is not None
            return found.choice.family in on_tensor_cores

        rows_from, terms, K = int(C_out), int(products), int(taps)
        assert all(runs(40, rows_from, 9, arch=arch) for arch in archs[archs.index(first) :])
        assert not any(runs(40, rows_from, 9, arch=arch) for arch in archs[: archs.index(first)])
        assert not runs(40, rows_from - 1, 9)
        needed = int(dense.split()[0]) // 8 if dense else 1
        assert runs(8, 64, needed)
        assert not dense or not runs(8, 64, needed - 1)
        assert not runs(7, 64, K - 1)
        assert runs(7, 64, max(K, -(-terms // 7)))
        assert runs(1, 64, terms)
        assert not runs(1, 64, terms - 1)
        if depthwise == "never":
            assert not runs(16, 16, 1000, groups=16)
        else:
            needed = int(depthwise.removesuffix(" taps"))
            assert runs(16, 16, needed, groups=16)
            assert not runs(16, 16, needed - 1, groups=16)
