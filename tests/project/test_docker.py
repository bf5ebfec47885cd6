"""What the Dockerfile promises, read from it. `.ci/run` executes its install steps and lints it."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

CHECKOUT = Path(__file__).resolve().parents[2]
Step = tuple[str, str]


@pytest.fixture(scope="module")
def parser() -> DockerfileParser:
    return DockerfileParser(fileobj=io.BytesIO((CHECKOUT / "Dockerfile").read_bytes()))


@pytest.fixture(scope="module")
def last_stage(parser: DockerfileParser) -> list[Step]:
    """(instruction, value) of the stage that becomes the image."""
    steps = [(step["instruction"], " ".join(step["value"].split())) for step in parser.structure]
    start = max(index for index, (kind, _) in enumerate(steps) if kind == "FROM")
    return steps[start:]


def values(steps: list[Step], kind: str) -> list[str]:
    return [value for name, value in steps if name == kind]


def test_base_image_is_pinned_by_tag_and_digest(parser: DockerfileParser) -> None:
    stages = set(re.findall(r"(?m)^FROM \S+ AS (\S+)$", parser.content))
    external = [image for image in parser.parent_images if image not in stages]
    assert len(external) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", external[0])


def test_kernels_can_be_compiled_into_the_image(last_stage: list[Step]) -> None:
    """Root compiles them, so that the user who runs the image trusts and reads them, but cannot replace them."""
    (warmup,) = [run for run in values(last_stage, "RUN") if "gpuconv warmup $WARMUP" in run]
    assert warmup.endswith('chmod -R a+rX "$GPUCONV_CACHE_DIR"; }')
    assert values(last_stage, "ARG") == ['WARMUP=""']
    (folder,) = [v.partition("=")[2] for v in values(last_stage, "ENV") if v.startswith("GPUCONV_CACHE_DIR=")]
    assert last_stage.index(("ENV", f"GPUCONV_CACHE_DIR={folder}")) < last_stage.index(("RUN", warmup))
    assert not any(folder.startswith(path) for volume in values(last_stage, "VOLUME") for path in json.loads(volume))


def test_runs_as_a_user_by_number_after_every_step_that_needs_root(last_stage: list[Step]) -> None:
    (user,) = values(last_stage, "USER")
    assert int(user) > 0
    (creation,) = [run for run in values(last_stage, "RUN") if run.startswith("useradd ")]
    assert shlex.split(creation)[shlex.split(creation).index("--uid") + 1] == user
    kinds = [kind for kind, _ in last_stage]
    assert "RUN" not in kinds[kinds.index("USER") :]


def test_kernel_cache_is_a_volume_that_the_user_owns(last_stage: list[Step]) -> None:
    (folder,) = [value.removeprefix("CUPY_CACHE_DIR=") for value in values(last_stage, "ENV") if "CUPY_CACHE" in value]
    assert [json.loads(volume) for volume in values(last_stage, "VOLUME")] == [[folder]]
    (creation,) = [run for run in values(last_stage, "RUN") if "install --directory" in run]
    assert re.search(r'install --directory --owner=gpuconv --group=gpuconv "\$CUPY_CACHE_DIR"$', creation)
    kinds = [kind for kind, _ in last_stage]
    assert last_stage.index(("RUN", creation)) < kinds.index("VOLUME"), "what follows VOLUME changes nothing inside it"


def test_build_context_is_exactly_what_is_copied(parser: DockerfileParser) -> None:
    copied = set()
    for step in parser.structure:
        words = step["value"].split()
        if step["instruction"] == "COPY" and not words[0].startswith("--from="):
            copied.update(words[:-1])
    rules = (CHECKOUT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied
    assert rules.index("*") < min(index for index, rule in enumerate(rules) if rule.startswith("!"))
    assert [name for name in sorted(copied) if not (CHECKOUT / name).exists()] == []


def test_build_copies_every_file_that_pyproject_names(parser: DockerfileParser) -> None:
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    named = set(re.findall(r'(?m)^fragments = \[{ path = "(.+)" }\]$', project))
    named.update(re.findall(r'(?m)^license-files = \["(.+)"\]$', project))
    (packaged,) = re.findall(r"(?m)^only-include = (\[.+\])$", project)
    named.update(json.loads(packaged))
    assert len(named) == 4
    content = " ".join(step["value"] for step in parser.structure if step["instruction"] == "COPY").split()
    assert sorted(named - set(content)) == []
