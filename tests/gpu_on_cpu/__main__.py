"""Runs a command in which CuPy finds GPUs: `python -m tests.gpu_on_cpu [--arch sm_90] [--order lazy] COMMAND...`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from gpuconv.device import ARCHITECTURES

from ..hostcuda import build

SITE = Path(__file__).resolve().parent / "site"


def environment(arch: str = "sm_90", order: str = "lazy") -> dict[str, str]:
    """The environment in which Python puts the stand-in under CuPy."""
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "GPU_ON_CPU": arch,
        "GPU_ON_CPU_ORDER": order,
        "PYTHONPATH": os.pathsep.join(paths),
        # Kept apart from a GPU's machine code, and from other people's caches.
        "CUPY_CACHE_DIR": str(build.cache_folder() / "cupy"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_on_cpu", description=__doc__)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90", help="what the GPUs pose as")
    parser.add_argument("--order", default="lazy", help='"lazy", "eager" or the seed of a random order of queued work')
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if not arguments.command:
        parser.error("a command is needed")
    os.execvpe(arguments.command[0], arguments.command, environment(arguments.arch, arguments.order))


if __name__ == "__main__":
    sys.exit(main())
