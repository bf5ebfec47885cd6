"""What `--json` prints: one valid object that begins with the version, with the keys that the README lists."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cubins, measure
from gpuconv.cli import main
from tests.cli.test_cli import in_folder, no_gpu  # noqa: F401 - fixtures

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`[a-z0-9_ -]+`(?:, `[a-z0-9_]+`)*|an error) \| (`[a-z_`, ]+`) \|$", README, re.MULTILINE)
KEYS = {name.strip("`"): re.findall(r"`(\w+)`", keys) for names, keys in ROWS for name in names.split(", ")}

LAYER = "conv1d --input 1,2,9 --weight 2,2,3"
COMMANDS = {
    "info": ["info"],
    "verify": ["verify --filter docs_example --dtype float32 --device cpu", "verify --layers layers.json --device cpu"],
    "verify --list": ["verify --list", "verify --list --filter docs_example"],
    "explain": [
        *(f"explain {LAYER} --arch sm_90 {more}" for more in ("", "--direction grad_weight", "--algorithm fft")),
        f"explain {LAYER} --device cpu",
        f"explain {LAYER} --device cpu --direction grad_bias",
    ],
    "conv1d": ["conv1d x.npy w.npy y.npy --force", "conv1d x.npy w.npy y.wav --rate 8000"],
    "conv_transpose1d": ["conv_transpose1d x.npy w.npy y.npy --max-bytes 1kB --force"],
    "warmup": [f"warmup {LAYER} --dtype float64 --arch sm_90 --direction grad_bias"],
    "cache": ["cache", "cache prune", "cache clear"],
    "bench": [f"bench {LAYER} --device cpu --repeats 1", "bench --layers layers.json --device cpu --repeats 1"],
}


def printed(capsys: pytest.CaptureFixture[str], command: str, code: int = 0) -> dict[str, Any]:
    assert main([*command.split(), "--json"]) == code
    text = capsys.readouterr().out

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    assert next(iter(found)) == "gpuconv"
    assert found.pop("gpuconv") == gpuconv.__version__
    return found


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_folder: Any) -> None:  # noqa: ARG001, F811
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "kernels"))


def test_the_readme_lists_all_keys_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *LAYER.split(), "--device", "cpu", "--json"]) == 0
    Path("layers.json").write_text(capsys.readouterr().out)
    np.save("x.npy", np.ones((1, 9)))
    np.save("w.npy", np.ones((1, 1, 2)))
    assert KEYS.keys() == {*COMMANDS, "an error"}
    for name, commands in COMMANDS.items():
        if name == "warmup" and find_spec("cupy") is None:
            continue
        for command in commands:
            assert [*printed(capsys, command)] == KEYS[name], command


@pytest.mark.usefixtures("no_gpu")
def test_an_error_is_an_object(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad usage, bad input, no GPU, an interrupt and an unexpected error; the exit code is that of the process."""
    errors = {
        "infos": 2,
        "explain conv1d": 2,
        "verify --dtype float8": 2,
        "explain conv1d --input 1,2,9 --weight 2,3,3 --device cpu": 2,
        "verify --layers none.json": 2,
        "cache --max-size 1GB": 2,
        f"bench {LAYER} --layers none.json": 2,
        "verify --device gpu": 3,
        f"bench {LAYER} --device gpu": 3,
        f"explain {LAYER} --device gpu": 3,
    }
    for command, code in errors.items():
        assert main(command.split()) == code
        message = capsys.readouterr().err
        found = printed(capsys, command, code)
        assert [*found] == KEYS["an error"]
        assert found["exit_code"] == code
        assert message == f"gpuconv: error: {found['error']}\n"

    def interrupt() -> None:
        raise KeyboardInterrupt

    def fail() -> None:
        raise KeyError("x")

    monkeypatch.setattr(cubins, "entries", interrupt)
    assert printed(capsys, "cache", 130) == {"error": "interrupted", "exit_code": 130}
    monkeypatch.setattr(cubins, "entries", fail)
    assert printed(capsys, "cache", 2)["error"].startswith("unexpected KeyError in test_json.py, line ")


def test_an_output_on_standard_output_leaves_no_place_for_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "conv1d x.npy w.npy -", 2)["error"].startswith("--json prints to standard output")


def test_a_wrong_result_is_no_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference may even be a number that JSON does not have."""
    monkeypatch.setattr(measure, "_difference", lambda *_: math.nan)
    monkeypatch.setattr(measure, "_peer", lambda *_: (lambda: np.zeros(1), 1e-4))
    found = printed(capsys, f"bench {LAYER} --device cpu --repeats 1", 1)
    assert [*found] == KEYS["bench"]
    assert found["layers"][0]["difference"] == "nan"


def test_an_error_in_a_file_of_layers_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "conv1d", "--input", "1,2,9", "--weight", "2,3,3", "--device", "cpu", "--json"]) == 2
    Path("layers.json").write_text(capsys.readouterr().out)
    found = printed(capsys, "bench --layers layers.json --device cpu", 2)
    assert found["error"].startswith(
        "layers.json: layer 1: is an error that gpuconv explain --json has written: conv1d: "
    )
