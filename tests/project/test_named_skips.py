"""The pytest plugin of .ci: skips pass for an allowed reason alone, are counted, and can be listed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpuconv.gpus import missing_gpu
from tests import NO_TORCH

CI = Path(__file__).resolve().parents[2] / ".ci"

TESTS = {
    "test_mixed.py": f"""
import pytest

def test_passes(): pass

@pytest.mark.skip(reason="no GPU: none here")
@pytest.mark.parametrize("n", [1, 2])
def test_gpu(n): pass

@pytest.mark.skip(reason={NO_TORCH!r})
def test_torch(): pass

@pytest.mark.xfail(strict=True)
def test_known_to_fail(): assert False
""",
    "test_whole_file.py": f"""
import pytest

pytest.importorskip("no_such_module", reason={NO_TORCH!r})

def test_never(): pass
""",
    "test_lazy.py": """
import pytest

@pytest.mark.skip(reason="too slow")
def test_lazy(): pass
""",
}


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of pytest with the plugin on the three files."""
    for name, text in TESTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "named_skips", "--rootdir", str(folder), *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(CI)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("workers", ["0", "2"])
def test_allowed_skips_pass_and_are_counted_and_listed(workers: str, tmp_path: Path) -> None:
    listed = tmp_path / "torch"
    arguments = ["--may-skip", "gpu", "--may-skip", "torch", "--list-skips", "torch", str(listed)]
    code, output = run(tmp_path, "-n", workers, *arguments, "test_mixed.py", "test_whole_file.py")
    assert code == 0, output
    assert "gpu: 2 tests and 0 whole files" in output
    assert "torch: 1 tests and 1 whole files" in output
    assert listed.read_text(encoding="utf-8") == "test_mixed.py::test_torch\ntest_whole_file.py\n"
    code, output = run(tmp_path, "-n", workers, "--may-skip", "torch", f"@{listed}")
    assert code == 0, output
    assert "torch: 1 tests and 1 whole files" in output


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("file", "allowed", "refused"),
    [
        ("test_lazy.py", ("gpu", "torch"), "test_lazy.py::test_lazy: too slow"),
        ("test_mixed.py", ("gpu",), f"test_mixed.py::test_torch: {NO_TORCH}"),
        ("test_mixed.py", ("torch",), "test_mixed.py::test_gpu[1]: no GPU: none here"),
        ("test_whole_file.py", (), f"test_whole_file.py: {NO_TORCH}"),
    ],
)
def test_other_skips_fail_the_run(
    workers: str, file: str, allowed: tuple[str, ...], refused: str, tmp_path: Path
) -> None:
    options = [word for name in allowed for word in ("--may-skip", name)]
    code, output = run(tmp_path, "-n", workers, *options, "test_mixed.py::test_passes", file)
    assert code == 1, output
    assert refused in output


def test_the_reasons_are_worded_as_the_plugin_expects() -> None:
    """A reason in other words would fail CI, rather than pass unseen; this says so earlier."""
    text = (CI / "named_skips.py").read_text(encoding="utf-8")
    missing = missing_gpu()
    assert '"torch": "PyTorch is not installed: "' in text
    assert NO_TORCH.startswith("PyTorch is not installed: ")
    assert missing is None or missing.startswith("no GPU: ")
