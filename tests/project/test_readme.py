"""The README: its Python runs block by block, and its set-up commands are those that CI extracts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
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


def test_the_readme_has_python() -> None:
    assert len(BLOCKS) >= 4
    assert sum(IMPORT_CUPY in block for block in BLOCKS) >= 1
    assert "With `import numpy as cp` the same lines run on the CPU." in README


@pytest.mark.parametrize("block", cases())
def test_a_block_runs_by_itself(block: str, tmp_path: Path) -> None:
    done = run(block, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("block", cases())
def test_the_shapes_in_the_comments_are_right(block: str, tmp_path: Path) -> None:
    """A comment that ends an assignment and begins with a shape is that of the value."""
    claims = re.findall(r"^(\w+) = .*#.*?(\(\d+(?:, \d+)+,?\))", block, re.MULTILINE)
    checks = "".join(f"\nassert {name}.shape == {shape}, {name}.shape" for name, shape in claims)
    if not checks:
        return
    done = run(block + checks, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [1, 2])
def test_ci_takes_the_commands_of_the_readme(number: int) -> None:
    script = CHECKOUT / ".ci" / "readme_command.py"
    done = subprocess.run([sys.executable, script, str(number)], capture_output=True, text=True, check=True)
    command = done.stdout
    assert f"```sh\n{command}```" in README
    assert command.startswith("python3 -m venv .venv && "), "each command must stand on its own"
    assert ("gpuconv verify" if number == 1 else "-m pytest") in command
    assert f"readme_command {number}" in (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")
