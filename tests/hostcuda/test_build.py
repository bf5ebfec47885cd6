"""The cache of compiled kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.hostcuda import build

SCRIPT = """
import numpy as np
from gpuconv.problem import ConvProblem
from tests import hostcuda
x, w = np.arange(5, dtype=np.float32).reshape(1, 1, 5), np.ones((1, 1, 3), np.float32)
print(hostcuda.compute(ConvProblem("conv1d", 1, 1, 1, 5, 3), x, w, family="conv1d_direct").tolist())
"""


def outputs_from(cache: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "GPUCONV_HOSTCUDA_CACHE": str(cache)},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_cache_can_be_moved(tmp_path: Path) -> None:
    """What was built in one folder runs from another one, where nothing is compiled again."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    build.runtime()
    shutil.copy(build.cache_folder() / build.build_runtime(), first)
    assert outputs_from(first) == "[[[3.0, 6.0, 9.0]]]\n"
    built = sorted(path.name for path in first.iterdir())
    first.rename(second)
    assert outputs_from(second) == "[[[3.0, 6.0, 9.0]]]\n"
    assert sorted(path.name for path in second.iterdir()) == built
