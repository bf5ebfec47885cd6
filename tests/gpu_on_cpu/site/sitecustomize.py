"""Python runs this at its start where this folder is on PYTHONPATH: see tests/gpu_on_cpu."""

import os
import sys
from pathlib import Path

if "GPU_ON_CPU" in os.environ:
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from tests.gpu_on_cpu.hooks import install

    install()
    del sys.path[0]
