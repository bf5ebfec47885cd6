"""The README: its Python runs block by block, its tables say what is true, its links lead somewhere, and its set-up
commands are those that CI extracts.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv.cli import info
from tests import NO_SIGPY, NO_TORCH

CHECKOUT = Path(__file__).resolve().parents[2]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NOT_RUN = re.findall(r"^```py\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
IMPORT_CUPY = "import cupy as cp"


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The script in a fresh interpreter, away from the checkout's folder."""
    environment = {"PYTHONPATH": str(CHECKOUT)} if sys.platform != "win32" else None
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def cases() -> list[Any]:
    """Every block; a block on CuPy arrays on NumPy arrays, as the README says it can, and as it stands on a GPU."""
    found = []
    for i, block in enumerate(BLOCKS):
        marks = [pytest.mark.torch] if "import torch" in block else []
        found.append(pytest.param(block.replace(IMPORT_CUPY, "import numpy as cp"), marks=marks, id=f"{i}"))
        if IMPORT_CUPY in block:
            found.append(pytest.param(block, marks=[*marks, pytest.mark.gpu], id=f"{i}-gpu"))
    return found


def test_the_table_of_environment_variables_is_complete() -> None:
    """It has all that the package reads, and so has `gpuconv info`; libraries read the last two."""
    mentions, names = 0, []
    for path in (CHECKOUT / "gpuconv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute | ast.Name):
                mentions += bool(re.fullmatch(r"(os\.)?(environb?|getenvb?)", ast.unparse(node)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.get":
                names.append(ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else path.name)
    assert len(names) == mentions, "read in another way than by os.environ.get"
    names.remove("info.py")  # which reads those of its table
    found = {*names}
    assert len(found) >= 7
    (table,) = re.findall(r"^### Environment variables\n\n\| \| \|\n.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    told = re.findall(r"`([A-Z_]+)`", "".join(line.split(" | ")[0] for line in table.splitlines()))
    assert told == [*info.VARIABLES]
    assert set(told[:-2]) == found


def test_the_readme_has_python() -> None:
    assert len(BLOCKS) >= 4
    assert sum(IMPORT_CUPY in block for block in BLOCKS) >= 1
    assert "With `import numpy as cp` the same lines run on the CPU." in README
    (needs_gpus,) = NOT_RUN
    assert "from dask_cuda import" in needs_gpus
    compile(needs_gpus, "README.md", "exec")


@pytest.mark.parametrize("block", cases())
def test_a_block_runs_by_itself(block: str, tmp_path: Path) -> None:
    """If the comment behind an assignment begins with a shape, this is the shape of the value."""
    claims = re.findall(r"^(\w+) = .*#.*?(\(\d+(?:, \d+)+,?\))", block, re.MULTILINE)
    checks = "".join(f"\nassert {name}.shape == {shape}, {name}.shape" for name, shape in claims)
    done = run(block + checks, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("number", [1, 2])
def test_ci_takes_the_commands_of_the_readme(number: int) -> None:
    script = CHECKOUT / ".ci" / "readme_command.py"
    done = subprocess.run([sys.executable, script, str(number)], capture_output=True, text=True, check=True)
    command = done.stdout
    assert f"```sh\n{command}```" in README
    assert command.startswith("python3 -m venv .venv && "), "each command must stand on its own"
    assert ("gpuconv verify" if number == 1 else "-m pytest") in command
    assert f"readme_command {number}" in (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_first_screen_has_a_picture_an_installation_and_an_example() -> None:
    first = README[: README.index("\n## ")]
    assert len(first.splitlines()) <= 35
    assert re.search(r"^!\[.{20,}\]\(\S+\)$", first, re.MULTILINE)
    assert "`pip install '.[cuda13]'`" in first
    assert BLOCKS[0] in first


def test_the_links_lead_somewhere() -> None:
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(links) > 10
    assert [link for link in links if link not in anchors and not (CHECKOUT / link).is_file()] == []


# Coming from another library: each row of a table is their call and ours.


class Cudnn:
    """The three functions of cupy.cudnn, by cuDNN's definition, on NumPy arrays (N, C, H, L)."""

    @staticmethod
    def _terms(padding: tuple[int, int], stride: tuple[int, int], K: int, L: int, L_out: int) -> Any:
        """For each tap, the positions of the shorter array and those of the longer one that it brings together."""
        for k in range(K):
            longer = np.arange(L_out) * stride[1] - padding[1] + k
            exists = (longer >= 0) & (longer < L)
            yield k, np.flatnonzero(exists), longer[exists]

    def convolution_forward(self, x: Any, W: Any, b: Any, y: Any, pad: Any, stride: Any, *_: Any) -> None:
        y[...] = b[:, None, None]
        for k, at_y, at_x in self._terms(pad, stride, W.shape[-1], x.shape[-1], y.shape[-1]):
            y[..., at_y] += np.einsum("oih,nihl->nohl", W[..., k], x[..., at_x])

    def convolution_backward_data(self, W: Any, x: Any, b: Any, y: Any, pad: Any, stride: Any, *_: Any) -> None:
        y[...] = b[:, None, None]
        for k, at_x, at_y in self._terms(pad, stride, W.shape[-1], y.shape[-1], x.shape[-1]):
            y[..., at_y] += np.einsum("ioh,nihl->nohl", W[..., k], x[..., at_x])

    def convolution_backward_filter(self, x: Any, gy: Any, gW: Any, pad: Any, stride: Any, *_: Any) -> None:
        gW[...] = 0
        for k, at_y, at_x in self._terms(pad, stride, gW.shape[-1], x.shape[-1], gy.shape[-1]):
            gW[..., k] = np.einsum("nohl,nihl->oih", gy[..., at_y], x[..., at_x])


def causal_conv1d_update(x: Any, conv_state: Any, weight: Any, bias: Any, activation: str | None = None) -> Any:
    """As causal-conv1d defines it, for (N, C, L) arrays: `conv_state` holds the samples before x, and then the last."""
    K, L = weight.shape[-1], x.shape[-1]
    samples = np.concatenate((conv_state, x), axis=-1)
    conv_state[...] = samples[..., L:]
    first = samples.shape[-1] - L - K + 1
    y = sum(weight[:, k, None] * samples[..., first + k : first + k + L] for k in range(K)) + bias[:, None]
    return y / (1 + np.exp(-y)) if activation == "silu" else y


def causal_conv1d_fn(x: Any, weight: Any, bias: Any, activation: str | None = None) -> Any:
    return causal_conv1d_update(x, np.zeros((*x.shape[:2], weight.shape[-1])), weight, bias, activation)


def rows(heading: str) -> list[tuple[str, str]]:
    """Their calls and ours in the table of a section."""
    section = README.partition(f"\n### {heading}\n")[2].partition("\n##")[0]
    return re.findall(r"^\| `([^`]+)` \| `(gpuconv[^`]+)` \|$", section, re.MULTILINE)


def arrays(heading: str) -> dict[str, Any]:
    """The arrays of a table by their names there."""
    rng = np.random.default_rng(0)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "torch.nn.functional": {
            "x": (2, 6, 30), "w": (4, 6, 7), "b": (4,), "v": (6, 4, 7), "r": (2, 4, 24), "g": (2, 4, 24),
        },
        "scipy.signal": {"x": (400,), "h": (17,), "zi": (16,)},
        "sigpy": {"d": (9, 8), "f": (3, 3), "y": (11, 10)},
        "causal-conv1d": {"x": (2, 6, 30), "w": (6, 4), "b": (6,), "state": (2, 6, 4)},
        "cupy.cudnn": {
            "x": (2, 6, 30), "w": (4, 6, 7), "b": (4,), "v": (6, 4, 7), "y": (2, 4, 15), "z": (2, 4, 59),
            "dw": (4, 6, 7),
        },
    }  # fmt: skip
    made = {name: rng.standard_normal(shape) for name, shape in shapes[heading].items()}
    return {name: np.zeros_like(array) if name == "state" else array for name, array in made.items()}


def values(result: Any) -> list[Any]:
    """What a call gives, as arrays."""
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


TABLES = ("torch.nn.functional", "scipy.signal", "sigpy", "causal-conv1d", "cupy.cudnn")


@pytest.mark.parametrize("heading", TABLES)
def test_our_side_of_the_tables_runs(heading: str) -> None:
    assert len(rows(heading)) >= 3
    for _, ours in rows(heading):
        assert all(np.isfinite(part).all() for part in values(eval(ours, {"gpuconv": gpuconv, **arrays(heading)})))


@pytest.mark.parametrize(
    "heading", [pytest.param(name, marks=[pytest.mark.torch] * name.startswith("torch")) for name in TABLES]
)
def test_both_sides_of_the_tables_agree(heading: str) -> None:
    convert: Any = np.asarray
    library: dict[str, Any]
    if heading == "torch.nn.functional":
        torch = pytest.importorskip("torch", reason=NO_TORCH)
        library, convert = {"torch": torch, "F": torch.nn.functional}, torch.from_numpy
    elif heading == "scipy.signal":
        library = {"signal": pytest.importorskip("scipy.signal")}
    elif heading == "sigpy":
        library = {"sigpy": pytest.importorskip("sigpy", reason=NO_SIGPY)}
    elif heading == "causal-conv1d":
        library = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
    else:
        library, convert = {"cudnn": Cudnn()}, lambda array: array[:, :, None] if array.ndim == 3 else array
    for theirs, ours in rows(heading):
        given, own = arrays(heading), arrays(heading)
        result = eval(theirs, {**library, **{name: convert(array) for name, array in given.items()}})
        found = eval(ours, {"gpuconv": gpuconv, **own})
        if result is None:  # theirs wrote to the argument that ours returns
            (result,) = (given[name] for name, array in own.items() if found is array)
        for expected, actual in zip(values(result), values(found), strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-12, err_msg=ours)
