"""`gpuconv verify --layers`: a user's own layers in place of the case table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import checks, cli, functional, layers
from gpuconv.problem import ArraySpec

Shape = tuple[int, ...]


def written(folder: Path, *calls: tuple[Any, Shape, Shape, str, dict[str, Any]], weight: str | None = None) -> Path:
    """A file of layers, as `gpuconv explain --json` writes them."""
    path = folder / "layers.json"
    texts = []
    for op, x, w, dtype, settings in calls:
        arrays = ArraySpec(x, dtype), ArraySpec(w, weight or dtype)
        texts.append(json.dumps(gpuconv.explain(op, *arrays, device="sm_90", **settings).to_dict()))
    path.write_text("\n".join(texts))
    return path


SNAKE = {"activation": ("snake", ArraySpec((6,), "float32")), "residual": ArraySpec((2, 6, 30), "float32")}
CALLS: list[tuple[Any, Shape, Shape, str, dict[str, Any]]] = [
    ("conv1d", (2, 4, 30), (6, 2, 3), "float32", {"groups": 2, "padding": "same", "padding_mode": "reflect"}),
    ("conv1d", (2, 4, 30), (6, 4, 3), "float32", {"padding": 1, **SNAKE}),
    ("conv_transpose1d", (4, 9), (4, 3, 8), "float16", {"stride": 4, "padding": 2}),
    ("conv1d", (2, 3, 30), (4, 3, 9), "int8", {"out_dtype": "int32"}),
    ("conv1d", (5, 32, 40000), (32, 32, 5), "float32", {"stride": 2, "precision": "tf32"}),
]


def test_every_layer_is_checked_in_its_own_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks.layers, "MAX_FLOPS", 10**6)
    path = written(tmp_path, *CALLS)
    assert cli.main(["verify", "--device", "cpu", "--layers", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    rows = {row["layer"]: row for row in report["layers"]}
    assert [row["dtype"] for row in rows.values()] == ["float32", "float32", "float16", "int8", "tf32"]
    assert rows["layer 4"]["fraction_of_bound"] is None
    assert all(0 < row["fraction_of_bound"] < 1 for name, row in rows.items() if name != "layer 4")
    assert report["counts"]["integers"]["passed"] == 5
    assert report["counts"]["gradients"]["passed"] == 4
    ((cut, reason),) = report["skipped"].items()
    assert cut == "layer 5 at full size"
    assert re.fullmatch(r"checked as \(\d, 32, \d+\) in place of \(5, 32, 40000\); kernel .*", reason)
    assert report["worst"]["case"].startswith("layer ")

    of_two = gpuconv.verify("cpu", layers=layers.read(path)[:1], dtypes=["float64", "float16"])
    page = str(of_two)
    assert [row["dtype"] for row in of_two.layer_rows] == ["float64", "float16"]
    assert all(f"{row['fraction_of_bound']:.3g}" in page and row["problem"] in page for row in of_two.layer_rows)


def test_what_a_layer_fuses_is_what_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    convolve_into = checks.Target.convolve_into

    def noted(self: Any, *arguments: Any, settings: Any = None) -> Any:
        calls.append({} if settings is None else settings)
        return convolve_into(self, *arguments, settings=settings)

    monkeypatch.setattr(checks.Target, "convolve_into", noted)
    assert gpuconv.verify("cpu", layers=layers.read(written(tmp_path, CALLS[1]))).ok
    fused = [settings for settings in calls if "activation" in settings]
    assert len(fused) == 2
    for settings in fused:
        name, *arrays = settings["activation"]
        assert (name, [array.shape for array in arrays]) == ("snake", [(6,)])
        assert settings["residual"].shape == (2, 6, 30)
        assert settings["input_activation"] is None


def test_a_layer_that_is_computed_wrongly_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gpuconv.conv1d

    def wrong(input: Any, weight: Any, *arguments: Any, **settings: Any) -> Any:
        result = right(input, weight, *arguments, **settings)
        if weight.shape[2] == 9 and result.dtype == np.float32:
            result[..., -1] += 1
        return result

    calls = CALLS[0], ("conv1d", (2, 3, 30), (4, 3, 9), "complex64", {})
    path = written(tmp_path, *calls, weight="float32")  # the second has real taps
    monkeypatch.setattr(functional, "conv1d", wrong)
    assert cli.main(["verify", "--device", "cpu", "--layers", str(path)]) == 1
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith("layer ")]
    assert int(lines[1][3]) == 0
    assert int(lines[2][3]) > 3
    assert "layer 2 [float32] normal: must lie within the error bound of the reference" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--filter", "k3"], "verify takes --layers in place of --filter, --all and --list"),
        (["--list"], "verify takes --layers in place of --filter, --all and --list"),
        (
            ["--dtype", "complex64"],
            "verify: layer 1: conv1d: activation snake needs real floating-point data, got complex64",
        ),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, CALLS[1])
    assert cli.main(["verify", "--device", "cpu", "--layers", str(path), *options]) == 2
    assert capsys.readouterr().err == f"gpuconv: error: {says}\n"
