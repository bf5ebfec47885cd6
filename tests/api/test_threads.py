"""Threads that share all that gpuconv keeps, from the first import on, with and without a global interpreter lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def test_sixteen_threads_get_what_one_gets() -> None:
    """A cache, a plan, a buffer or a module that one thread sees half made by another would change or end a result."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.threads"],
        cwd=CHECKOUT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["differing"] == []
    assert found["jobs"] > 20
    # Where Python has no lock, no module that was imported has brought it back.
    assert found["has_lock"] is not bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
