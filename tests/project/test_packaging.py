"""Wheel and sdist, built and installed into fresh environments that hold nothing else but NumPy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from pathspec import GitIgnoreSpec

import gpuconv

CHECKOUT = Path(__file__).resolve().parents[2]

# Runs inside the fresh environment, away from the checkout.
PROBE = """
import importlib.metadata, json, pathlib, sys
import gpuconv
from gpuconv import source
from gpuconv.families import FAMILIES

import numpy as np
x, w = np.arange(6.0).reshape(1, 1, 6), np.ones((1, 1, 3))
print(json.dumps({
    "package": str(pathlib.Path(gpuconv.__file__).parent),
    "sources": str(source.directory()),
    "version": gpuconv.__version__,
    "metadata_version": importlib.metadata.version("gpuconv"),
    "text_lengths": {f.name: len(source.read(f"{f.name}.cu")) for f in FAMILIES},
    "typed": (pathlib.Path(gpuconv.__file__).parent / "py.typed").is_file(),
    "result": gpuconv.conv1d(x, w).ravel().tolist(),
    "distributions": sorted(d.metadata["Name"] for d in importlib.metadata.distributions()),
    "cupy": "cupy" in sys.modules,
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, CHECKOUT, cwd=folder)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, CHECKOUT, cwd=folder)
    (archive,) = folder.iterdir()
    return archive


class FreshEnvironment:
    """A virtual environment that holds NumPy, linked from the running one, and nothing else."""

    def __init__(self, folder: Path) -> None:
        builder = venv.EnvBuilder(symlinks=os.name != "nt")
        builder.create(folder)
        self.folder = folder
        self.python = Path(builder.ensure_directories(folder).env_exe)
        self.scripts = self.python.parent
        self.site_packages = Path(
            run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
        )
        numpy = importlib.metadata.distribution("numpy")
        for name in sorted({file.parts[0] for file in numpy.files or ()} - {".."}):
            origin = Path(str(numpy.locate_file(name)))
            if origin.is_dir():
                (self.site_packages / name).symlink_to(origin, target_is_directory=True)

    def install(self, archive: Path) -> None:
        # The build backend of an sdist comes from the running environment, for this one command.
        run(
            *(sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet"),
            *("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", archive),
            cwd=self.folder,
            PYTHONPATH=sysconfig.get_path("purelib"),
        )


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_package_finds_its_kernels(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = FreshEnvironment(tmp_path / "environment")
    environment.install(request.getfixturevalue(kind))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    found = json.loads(run(environment.python, "-I", "-c", PROBE, cwd=tmp_path))

    package = environment.site_packages / "gpuconv"
    assert Path(found["package"]).samefile(package)
    assert Path(found["sources"]).samefile(package / "cuda_src")
    assert sorted(file.name for file in (package / "cuda_src").iterdir()) == sorted(
        file.name for file in (CHECKOUT / "cuda_src").iterdir() if file.is_file()
    )
    assert found["text_lengths"], "no kernel family"
    assert all(length > 0 for length in found["text_lengths"].values())
    assert found["typed"]
    assert found["version"] == found["metadata_version"] == gpuconv.__version__
    assert found["result"] == [3.0, 6.0, 9.0, 12.0]
    assert found["distributions"] == ["gpuconv", "numpy"], "the environment must hold nothing that gpuconv could borrow"
    assert not found["cupy"]

    assert f"gpuconv {gpuconv.__version__}" in run(environment.scripts / "gpuconv", "--version", cwd=tmp_path)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"gpuconv-{gpuconv.__version__}.dist-info"
    code = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "gpuconv").rglob("*.py")}
    kernels = {f"gpuconv/cuda_src/{path.name}" for path in (CHECKOUT / "cuda_src").glob("*.cu*")}
    records = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    assert names == code | kernels | records | {"gpuconv/py.typed"}
    assert wheel.name == f"gpuconv-{gpuconv.__version__}-py3-none-any.whl"


def test_sdist_holds_everything_and_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()

    generated = GitIgnoreSpec.from_lines((CHECKOUT / ".gitignore").read_text(encoding="utf-8").splitlines())
    expected = {"Dockerfile", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", ".ci/run"}
    for folder in ("gpuconv", "cuda_src", "tests", "bench", ".ci", ".github"):
        files = (path for path in (CHECKOUT / folder).rglob("*") if path.is_file())
        expected.update(path.relative_to(CHECKOUT).as_posix() for path in files)
    names = {path.relative_to(source).as_posix() for path in source.rglob("*")}
    assert [name for name in sorted(expected - names) if not generated.match_file(name)] == []

    again = tmp_path / "again"
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", again, source, cwd=tmp_path)
    assert (again / wheel.name).read_bytes() == wheel.read_bytes()


def test_metadata(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    metadata = distribution.metadata
    assert metadata["Version"] == gpuconv.__version__
    points = {(point.group, point.name, point.value) for point in distribution.entry_points}
    assert points == {
        ("console_scripts", "gpuconv", "gpuconv.cli:main"),
        ("pytest11", "gpuconv", "gpuconv.pytest_plugin"),
    }

    # The README on PyPI, where its relative links would lead nowhere.
    links = re.findall(r"\]\(([^)\s]+)\)", metadata["Description"])
    assert "https://raw.githubusercontent.com/gpuconv/gpuconv/main/bench/gallery/ecg.svg" in links
    assert "https://github.com/gpuconv/gpuconv/blob/main/CHANGELOG.md" in links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []

    requirements = [Requirement(text) for text in distribution.requires or ()]
    always = {requirement.name for requirement in requirements if requirement.marker is None}
    assert always == {"numpy"}

    def named_by(extra: str) -> set[str]:
        return {
            text.name for text in requirements if text.marker is not None and text.marker.evaluate({"extra": extra})
        }

    assert named_by("cuda13") | named_by("test-cpu") | {"nvidia-cuda-nvdisasm"} == named_by("test")
    assert [text.name for text in requirements if not text.specifier] == []


# The names of packages that differ between PyPI and conda-forge.
CONDA_NAMES = {
    "dask": "dask-core",
    "ml-dtypes": "ml_dtypes",
    "matplotlib": "matplotlib-base",
    "soundfile": "pysoundfile",
    "torch": "pytorch",
}
CONDA_OPTIONAL = ("audio", "bf16", "cli", "dask", "plot", "safetensors", "torch")


def test_the_conda_recipe_says_what_the_wheel_says(wheel: Path, tmp_path: Path) -> None:
    text = (CHECKOUT / ".github" / "conda" / "recipe.yaml").read_text(encoding="utf-8")
    for name, value in yaml.safe_load(text)["context"].items():
        text = text.replace(f"${{{{ {name} }}}}", value)
    recipe = yaml.safe_load(text)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    metadata = distribution.metadata
    assert (recipe["package"]["name"], recipe["package"]["version"]) == (metadata["Name"], metadata["Version"])
    assert recipe["about"]["summary"] == metadata["Summary"]
    assert recipe["about"]["license"] == metadata["License-Expression"]
    assert recipe["build"]["noarch"] == "python"
    scripts = [f"{p.name} = {p.value}" for p in distribution.entry_points if p.group == "console_scripts"]
    assert recipe["build"]["python"]["entry_points"] == scripts

    def conda(text: str) -> str:
        requirement = Requirement(text)
        name = requirement.name.replace("_", "-")
        return f"{CONDA_NAMES.get(name, name)} {requirement.specifier}"

    required = recipe["requirements"]
    wanted = [Requirement(text) for text in distribution.requires or ()]
    always = [conda(str(text)) for text in wanted if text.marker is None]
    assert required["run"] == [f"python {metadata['Requires-Python']}", *always]
    optional = {
        conda(f"{text.name}{text.specifier}")
        for text in wanted
        for extra in CONDA_OPTIONAL
        if text.marker is not None and text.marker.evaluate({"extra": extra})
    }
    (cupy,) = {str(text.specifier) for text in wanted if text.name == "cupy-cuda12x"}
    assert required["run_constraints"] == sorted({*optional, f"cupy {cupy}"})
    (build,) = re.findall(r"(?m)^requires = (\[.+\])$", (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    python = f"python {metadata['Requires-Python'].removeprefix('>=')}.*"
    assert required["host"] == [python, "pip", *map(conda, json.loads(build))]
