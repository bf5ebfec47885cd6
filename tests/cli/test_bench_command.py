"""`gpuconv bench`: layers of every kind agree with PyTorch's, a wrong result is never timed, and the output is read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import functional, measure, peers
from gpuconv.arguments import ArraySpec
from gpuconv.cli import bench, main
from gpuconv.layers import Layer
from gpuconv.measure import Timing, compare
from tests.cli.test_cli import refusal


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "PAUSE", 0.0)
    monkeypatch.setattr(measure, "TURN", 1e-4)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 1.0, 1.0), raising=False)


def layer(op: Any, x: tuple[int, ...], w: tuple[int, ...], dtype: str = "float32", **settings: Any) -> Layer:
    taps = {"complex64": "float32"}.get(dtype, dtype) if settings.pop("real_taps", False) else dtype
    bias = w[0] if op == "conv1d" else w[1] * settings.get("groups", 1)
    return Layer(op, (ArraySpec(x, dtype), ArraySpec(w, taps), ArraySpec((bias,), dtype)), settings)


def channels(number: int) -> ArraySpec:
    return ArraySpec((number,), "float32")


LAYERS = [
    layer("conv1d", (2, 8, 60), (6, 8, 5), padding="same"),
    layer("conv1d", (8, 60), (6, 4, 5), padding="causal", groups=2, dilation=2),
    layer("conv1d", (2, 8, 60), (6, 8, 4), padding=(4, 1), stride=2),
    *(layer("conv1d", (2, 8, 60), (6, 8, 5), padding=3, padding_mode=mode) for mode in ("reflect", "circular")),
    layer("conv_transpose1d", (2, 8, 60), (8, 3, 8), stride=4, padding=(3, 1), groups=2, output_padding=1),
    *(
        layer("conv1d", (2, 8, 60), (6, 8, 3), activation=activation, residual=ArraySpec((2, 6, 58), "float32"))
        for activation in ("relu", ("elu", 0.5), "gelu", ("gelu", "tanh"), "tanh", ("snake", channels(6)))
    ),
    layer("conv1d", (2, 8, 60), (6, 8, 3), input_activation=("snake", channels(8), channels(8)), activation="silu"),
    layer("conv1d", (2, 8, 60), (6, 8, 3), input_activation=("leaky_relu", 0.1), activation="sigmoid"),
    *(layer("conv1d", (2, 8, 60), (6, 8, 3), dtype) for dtype in ("float16", "bfloat16", "float64", "complex64")),
    layer("conv1d", (2, 8, 60), (6, 8, 3), "complex64", real_taps=True),
    layer("conv1d", (2, 8, 60), (6, 8, 3), precision="tf32"),
    layer("conv1d", (2, 8, 60), (6, 8, 40), algorithm="fft"),
]


@pytest.mark.torch
@pytest.mark.usefixtures("one_torch_thread")
def test_layers_of_every_kind_agree_with_pytorch() -> None:
    for each in LAYERS:
        if each.arrays[0].dtype != each.arrays[1].dtype:
            each = each._replace(arrays=(*each.arrays[:2], None))  # noqa: PLW2901 - a bias would be complex
        found = compare(each, on_gpu=False, repeats=1)
        assert found.note == "", each
        assert found.difference is not None
        assert found.is_right, each
        assert (found.method == "fft") == (each.settings.get("algorithm") == "fft")
        assert found.ours is not None
        assert found.theirs is not None
        assert min(found.theirs.median, found.ours.median) > 0


@pytest.mark.torch
@pytest.mark.usefixtures("one_torch_thread")
def test_what_pytorch_lacks_is_said() -> None:
    lacking = {
        "has no mode symmetric": layer("conv1d", (2, 8, 60), (6, 8, 3), padding=2, padding_mode="symmetric"),
        "has no lengths": layer("conv1d", (2, 8, 60), (6, 8, 3), lengths=[60, 3]),
        "sums integers": layer("conv1d", (2, 8, 60), (6, 8, 3), "int16")._replace(
            arrays=(ArraySpec((2, 8, 60), "int16"), ArraySpec((6, 8, 3), "int16"), None)
        ),
    }
    for note, each in lacking.items():
        found = compare(each, on_gpu=False, repeats=1)
        assert found.theirs is found.difference is None
        assert note in found.note
        assert found.ours is not None
        assert found.ours.median > 0


@pytest.mark.torch
@pytest.mark.usefixtures("one_torch_thread")
def test_a_wrong_result_is_not_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["bench", "conv1d", "--input", "2,8,60", "--weight", "6,8,5", "--device", "cpu", "--repeats", "2"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "conv1d (2, 8, 60) with (6, 8, 5), float32\n  gpuconv " in text
    assert "\n  PyTorch " in text
    assert " times as long" in text
    conv1d = functional.conv1d
    monkeypatch.setattr(functional, "conv1d", lambda *arrays, **settings: conv1d(*arrays, **settings) * 1.001)
    assert main(argv) == 1
    text = capsys.readouterr().out
    assert "the results differ by 1.0e-03 of their norm, expected at most 1e-04; not measured" in " ".join(text.split())
    assert " us " not in text


def test_layers_of_a_file_without_pytorch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for problem in (
        "conv1d --input 2,8,60 --weight 6,8,5 --bias --padding 2,0",
        "conv_transpose1d --input 8,9 --weight 8,1,4",
    ):
        assert main(["explain", *problem.split(), "--device", "cpu", "--json"]) == 0
    Path("layers.json").write_text(capsys.readouterr().out)
    assert main(["bench", "--layers", "layers.json", "--dtype", "float32,float64", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == {"name": "CPU"}
    assert [(each["op"], each["input"], each["dtype"], each["bias"]) for each in report["layers"]] == [
        ("conv1d", [2, 8, 60], "float32", True),
        ("conv_transpose1d", [8, 9], "float32", False),
        ("conv1d", [2, 8, 60], "float64", True),
        ("conv_transpose1d", [8, 9], "float64", False),
    ]
    assert report["layers"][0]["settings"] == "padding=(2, 0)"
    assert {each["note"] for each in report["layers"]} == {"PyTorch is not installed"}
    assert all(each["gpuconv"]["median_s"] > 0 and each["pytorch"] is None for each in report["layers"])


def test_a_busy_machine_is_noted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["bench", "conv1d", "--input", "2,8,60", "--weight", "6,8,5", "--device", "cpu", "--repeats", "1"]
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for load in (3.0, 9.6):
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))  # noqa: B023
        assert main(argv) == 0
        found = capsys.readouterr().err
        assert ("machine is busy: 10 threads want to run on 2 processors, so times" in found) == (load > 3)
        assert ("note" in found) == (load > 3)


def test_turns_alternate_and_their_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    order = []

    def call(name: str, *seconds: float) -> Any:
        waits = iter(seconds)

        def work() -> None:
            nonlocal now
            order.append(name)
            now += next(waits)

        return work

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    # Of each turn the first call is not counted.
    ours = call("ours", 1, 2, 1, 4, 1, 9)
    theirs = call("theirs", 5, 5, 5, 5, 5, 5)
    assert measure._time([ours, theirs], False, 3) == [Timing(4.0, 1.75), Timing(5.0, 0.0)]
    assert order == ["ours"] * 2 + ["theirs"] * 4 + ["ours"] * 4 + ["theirs"] * 2


def test_bench_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ("--input", "1,9", "--weight", "1,1,3")
    assert refusal(capsys, "bench").startswith("bench needs conv1d or conv_transpose1d with --input and --weight")
    assert refusal(capsys, "bench", "conv1d", "--input", "1,9").startswith("bench needs conv1d or conv_transpose1d")
    assert refusal(capsys, "bench", "conv1d", *shapes, "--layers", "none.json").startswith("bench takes --layers in")
    assert refusal(capsys, "bench", "--layers", "none.json") == "none.json: does not exist"
    assert refusal(capsys, "bench", "conv1d", "--input", "2,9", *shapes[2:]).startswith("conv1d: input has C_in = 2")

    def without_cufft(*_: Any, **_settings: Any) -> None:
        raise ImportError("there is no cuFFT")

    monkeypatch.setattr(functional, "conv1d", without_cufft)
    assert refusal(capsys, "bench", "conv1d", *shapes) == "there is no cuFFT"


@pytest.mark.gpu
@pytest.mark.usefixtures("cupy")
def test_a_layer_is_measured_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "prepare", lambda *_: lambda: Tensor(expected))
    each = layer("conv1d", (2, 2, 9), (5, 2, 2))
    arrays, _ = measure._draw(each, False)
    expected = functional.conv1d(*arrays)

    class Tensor:
        """A result as PyTorch gives it."""

        def __init__(self, array: Any) -> None:
            self._array = array

        def is_complex(self) -> bool:
            return False

        def double(self) -> Tensor:
            return Tensor(self._array.astype(np.float64))

        def cpu(self) -> Tensor:
            return self

        def numpy(self) -> Any:
            return self._array

    found = compare(each, on_gpu=True, repeats=2)
    assert found.is_right
    assert found.difference is not None
    assert found.method.startswith("conv1d_")
    assert found.ours is not None
    assert found.ours.median > 0
    assert found.theirs is not None


@pytest.mark.parametrize(("ratio", "text"), [(0.5, "0.50"), (1.814, "1.81"), (34.52, "34.5"), (1674.46, "1674")])
def test_a_ratio_has_three_digits(ratio: float, text: str) -> None:
    facts = {"device": {"name": "CPU"}, "versions": {"pytorch": "2.13.0"}, "processors": 1, "turns": 1}
    found = measure.Comparison(LAYERS[0], "small", Timing(1e-3, 0.0), Timing(ratio * 1e-3, 0.0), 0.0)
    assert bench._page(facts, [found]).endswith(f"  {text} times as long")


def test_one_processor_and_one_turn_are_singular() -> None:
    facts = {"device": {"name": "CPU"}, "versions": {"pytorch": None}, "processors": 1, "turns": 1}
    assert bench._page(facts, []) == f"On the CPU, 1 processor; gpuconv {gpuconv.__version__}; medians of 1 turn."
