"""Files of layers, as `gpuconv explain --json` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gpuconv
from gpuconv import layers
from gpuconv.explain import Explanation
from gpuconv.files import FileError
from gpuconv.problem import ArraySpec

CALLS: list[tuple[Any, ...]] = [
    ("conv1d", (8, 512, 300), (64, 512, 3), "float16", {"stride": 2, "padding": (1, 3)}),
    ("conv1d", (16, 300), (16, 1, 5), "float32", {"groups": 16, "padding": "causal", "padding_mode": "reflect"}),
    ("conv1d", (2, 16, 300), (32, 16, 3), "float32", {"precision": "tf32", "dilation": 4, "padding": "same"}),
    ("conv1d", (2, 3, 300), (4, 3, 9), "int8", {"out_dtype": "int32"}),
    ("conv_transpose1d", (2, 16, 30), (16, 8, 8), "bfloat16", {"stride": 4, "output_size": 125}),
    ("conv_transpose1d", (16, 30), (16, 4, 8), "float64", {"stride": 4, "groups": 2, "output_padding": 1}),
    ("conv1d", (2, 16, 30), (8, 16, 3), "float32", {"activation": ("leaky_relu", 0.1), "input_activation": "silu"}),
    ("conv1d", (2, 16, 30), (8, 16, 3), "float32", {"activation": ("gelu", "tanh"), "residual": (2, 8, 28)}),
    ("conv1d", (16, 30), (8, 16, 3), "float32", {"input_activation": ("snake", (16,), (16,)), "residual": (8, 28)}),
    ("conv1d", (2, 16, 30), (8, 16, 3), "complex64", {"residual": (2, 8, 28)}),
    ("conv_transpose1d", (2, 16, 30), (16, 8, 3), ("complex64", "float32"), {}),
    ("conv1d", (2, 16, 300), (8, 16, 40), "float32", {"algorithm": "fft"}),
    ("conv_transpose1d", (2, 16, 30), (16, 8, 3), "float32", {"algorithm": "base"}),
]


def explained(op: Any, x: Any, w: Any, dtype: Any, settings: dict[str, Any], *, bias: bool) -> Explanation:
    of_data, of_weight = dtype if isinstance(dtype, tuple) else (dtype, dtype)

    def spec(value: Any) -> Any:
        """An array of an extent tuple, also among the parts of an activation."""
        if isinstance(value, tuple) and all(isinstance(extent, int) for extent in value):
            return ArraySpec(value, of_data)
        return tuple(map(spec, value)) if isinstance(value, tuple) else value

    given = {n: spec(v) if n in ("residual", "input_activation", "activation") else v for n, v in settings.items()}
    C_out = w[0] if op == "conv1d" else w[1] * settings.get("groups", 1)
    of_bias = ArraySpec((C_out,), settings.get("out_dtype", of_data)) if bias else None
    return gpuconv.explain(op, ArraySpec(x, of_data), ArraySpec(w, of_weight), of_bias, device="sm_90", **given)


def test_a_layer_that_is_read_is_the_one_that_was_explained(tmp_path: Path) -> None:
    wanted = [explained(*call, bias=bias) for call in CALLS for bias in (False, True)]
    texts = [json.dumps(explanation.to_dict(), indent=2) for explanation in wanted]
    forms = {"behind.json": "\n".join(texts), "list.json": f"[{', '.join(texts)}]\n", "lines.json": "".join(texts)}
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        found = layers.read(tmp_path / name)
        assert len(found) == len(wanted)
        for layer, expected in zip(found, wanted, strict=True):
            again = gpuconv.explain(layer.op, *layer.arrays, device="sm_90", **layer.settings)
            assert again == expected


def test_a_layer_in_another_dtype(tmp_path: Path) -> None:
    _, x, w, _, settings = CALLS[8]
    (tmp_path / "a.json").write_text(json.dumps(explained("conv1d", x, w, "float32", settings, bias=True).to_dict()))
    (layer,) = layers.read(tmp_path / "a.json")
    layer = layer.with_dtype("float16")
    again = gpuconv.explain(layer.op, *layer.arrays, device="sm_90", **layer.settings)
    assert again == explained("conv1d", x, w, "float16", settings, bias=True)


GOOD = json.dumps(explained(*CALLS[0], bias=True).to_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no layers"),
        ("[]", "has no layers"),
        ("{", "is not JSON: line 1: Expecting property name"),
        (f"{GOOD}\nhello", "is not JSON: line 2: Expecting value"),
        (f"{GOOD} 7", "layer 2: must be an object with a field problem, as gpuconv explain --json writes it"),
        ('{"problem": 1}', "layer 1: must be an object with a field problem"),
        ('{"problem": {"C_in": 1}}', "layer 1: has no field op"),
        (GOOD.replace('"conv1d"', '"conv2d"'), "layer 1: op must be one of conv1d, conv_transpose1d, got 'conv2d'"),
        (GOOD.replace('"stride"', '"strides"'), "layer 1: has no field stride"),
        (GOOD.replace("[64, 512, 3]", '"64,512,3"'), "layer 1: a shape must be a list of numbers, got '64,512,3'"),
        ('{"problem": {"C_coarse": 1}}', "layer 1: is the problem of a gradient, expected that of --direction forward"),
        (GOOD.replace('"forward"', '"grad_input"'), "layer 1: is the problem of a gradient, expected that of"),
        ("\udcff", "is not a text file"),
    ],
)
def test_what_is_no_layer_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(FileError) as error:
        layers.read(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "does not exist"), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(FileError) as error:
            layers.read(path)
        assert str(error.value) == f"{path}: {message}"
