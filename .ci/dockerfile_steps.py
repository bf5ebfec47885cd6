"""Runs the Dockerfile's install steps and its default command in a temporary folder, without a container engine.

The steps are read from the Dockerfile, so the two cannot differ. An absolute path of the image becomes one below the
temporary folder. Steps that change the operating system itself (users) are printed but not executed.

Then it checks the size of the installation and compiles a kernel of every family with it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import extract_key_values

CHECKOUT = Path(__file__).resolve().parent.parent
SYSTEM_PROGRAMS = ("useradd",)
IMAGE_PATH = re.compile(r"(?<![\w./])/(?=(dist|home|opt|src|var)\b)")
# The image consists of this environment and the base image.
ENVIRONMENT, MAX_BYTES = "/opt/gpuconv", 500 * 10**6
WARMUP = "conv1d --arch sm_90 --input 1,3,40 --weight 4,3,5 --dtype float64 --algorithm base --direction forward"
COMPILE_EVERY_FAMILY = """
from gpuconv.compile import compile_all
from gpuconv.device import Device
from gpuconv.families import FAMILIES

device = Device.from_arch("sm_90")
print(compile_all([(next(family.configs(device)), device.arch_name) for family in FAMILIES], 1, None))
"""


class Stage:
    """One build stage: a folder that stands for its root, its environment and its working folder."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root = root
        self.environment = environment
        self.folder = root
        root.mkdir()

    def host_text(self, text: str) -> str:
        """The text with the image's absolute paths moved below `root`."""
        return IMAGE_PATH.sub(f"{self.root}/", text)

    def host_path(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.folder / path

    def run(self, command: list[str]) -> int:
        print("+", *command, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        return subprocess.run(command, cwd=self.folder, env=self.environment, check=False).returncode

    def run_or_stop(self, command: list[str]) -> None:
        code = self.run(command)
        if code != 0:
            sys.exit(f"this step of the Dockerfile ended with exit code {code}")


def copy(sources: list[Path], target: Path, into_folder: bool) -> None:
    """COPY: a file to a file or into a folder, the contents of a folder into a folder."""
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            destination = target / source.name if into_folder else target
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, destination)


def execute(dockerfile: Path, scratch: Path, arguments: dict[str, str]) -> tuple[Stage, list[str]]:
    """Execute every stage with these build arguments; returns the last stage and the default command."""
    with dockerfile.open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    stages: dict[str, Stage] = {}
    command: list[str] = []
    stage: Stage | None = None
    for step in structure:
        kind, value = step["instruction"], step["value"]
        if kind == "COMMENT":
            continue
        if kind == "ARG":
            name = value.partition("=")[0]
            if stage is not None and name in arguments:
                stage.environment[name] = arguments[name]
            continue
        if kind == "FROM":
            base, _, name = value.split()
            inherited = stages[base].environment if base in stages else host_environment()
            stage = stages[name] = Stage(scratch / name, dict(inherited))
            continue
        assert stage is not None, "an instruction before FROM"
        if kind == "ENV":
            values = extract_key_values(
                env_replace=True, args={}, envs=stage.environment, instruction_value=stage.host_text(value)
            )
            stage.environment.update(values)
            # In the image this saves space; here it would only cause everything to be downloaded again.
            stage.environment.pop("PIP_NO_CACHE_DIR", None)
        elif kind == "WORKDIR":
            stage.folder = stage.host_path(value)
        elif kind == "COPY":
            words = value.split()
            origin = stages[words.pop(0).removeprefix("--from=")] if words[0].startswith("--from=") else None
            *sources, target = words
            paths = [origin.host_path(word) if origin else CHECKOUT / word for word in sources]
            copy(paths, stage.host_path(target), into_folder=target.endswith("/"))
        elif kind == "RUN" and value.split()[0] in SYSTEM_PROGRAMS:
            print("- left out, it changes the system:", " ".join(value.split()), flush=True)
        elif kind == "RUN":
            stage.run_or_stop(["/bin/sh", "-c", stage.host_text(value)])
        elif kind == "CMD":
            command = json.loads(value)
        elif kind not in ("USER", "VOLUME"):
            sys.exit(f"{__file__} does not support the instruction {kind}")
    assert stage is not None, "no FROM"
    return stage, command


def host_environment() -> dict[str, str]:
    """The environment of this process without the variables that would add the caller's Python packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expect-exit", type=int, required=True, help="exit code that the default command must have")
    expected = parser.parse_args().expect_exit
    with tempfile.TemporaryDirectory(prefix="gpuconv-image-") as scratch:
        stage, command = execute(CHECKOUT / "Dockerfile", Path(scratch).resolve(), {"WARMUP": WARMUP})
        installed = stage.host_path(ENVIRONMENT)
        num_bytes = sum(path.lstat().st_size for path in installed.rglob("*"))
        print(f"{ENVIRONMENT} holds {num_bytes / 1e6:.0f} MB, of at most {MAX_BYTES / 1e6:.0f} MB", flush=True)
        if num_bytes > MAX_BYTES:
            sys.exit("the installation is too large")
        stage.run_or_stop(["python", "-c", COMPILE_EVERY_FAMILY])
        stage.run_or_stop(["gpuconv", "cache"])
        stage.run_or_stop(["gpuconv", "info"])
        code = stage.run(command)
    if code != expected:
        sys.exit(f"the default command ended with exit code {code}, expected {expected}")


if __name__ == "__main__":
    main()
