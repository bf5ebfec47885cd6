"""What a tag does: its workflow has no more rights than it needs, and versions agree before it builds."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import gpuconv

CHECKOUT = Path(__file__).resolve().parents[2]
WORKFLOWS = CHECKOUT / ".github" / "workflows"
CHANGELOG = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def check_release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_release", CHECKOUT / ".ci" / "check_release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workflow(name: str) -> Any:
    text = (WORKFLOWS / name).read_text(encoding="utf-8")
    return yaml.load(text, Loader=yaml.BaseLoader)  # in which `on` is a word, as it is for GitHub


def test_only_a_tag_of_a_version_publishes() -> None:
    assert workflow("release.yml")["on"] == {"push": {"tags": ["v*"]}}


def test_the_release_has_the_least_rights() -> None:
    release = workflow("release.yml")
    assert release["permissions"] == {}
    build, publish = release["jobs"]["build"], release["jobs"]["publish"]
    assert build["permissions"] == {"contents": "read"}
    assert "environment" not in build
    # Whoever has this right can publish: the job runs no code of this repository, nor of its dependencies.
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    assert publish["needs"] == "build"
    assert [step["uses"].partition("@")[0] for step in publish["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    assert publish["steps"][-1]["with"] == {"attestations": "true"}


def test_what_is_published_was_checked() -> None:
    steps = "\n".join(step.get("run", "") for step in workflow("release.yml")["jobs"]["build"]["steps"])
    for command in ("check_release.py", "-m build", "twine check --strict", "gpuconv verify --device cpu"):
        assert command in steps


@pytest.mark.parametrize("name", sorted(path.name for path in WORKFLOWS.iterdir()))
def test_actions_are_pinned(name: str) -> None:
    """GitHub's own by their major version, those of others by a commit."""
    jobs = workflow(name)["jobs"].values()
    used = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert used
    for action in used:
        owner, _, version = action.partition("@")
        assert re.fullmatch(r"v\d+" if owner.startswith("actions/") else r"[0-9a-f]{40}", version), action
    assert all(
        step["with"]["persist-credentials"] == "false"
        for job in jobs
        for step in job["steps"]
        if step.get("uses", "").startswith("actions/checkout@")
    )


def test_the_version_has_its_section_in_the_changelog(check_release: ModuleType) -> None:
    text = (CHECKOUT / "gpuconv" / "__init__.py").read_text(encoding="utf-8")
    version = check_release.package_version(text)
    assert version == gpuconv.__version__
    assert check_release.trouble(f"v{version}", version, CHANGELOG) is None
    assert "but the version of the package is" in check_release.trouble("v9.9.9", version, CHANGELOG)
    assert "no section ## [9.9.9]" in check_release.trouble("v9.9.9", "9.9.9", CHANGELOG)
    undated = CHANGELOG.replace(f"## [{version}] - ", f"## [{version}] ")
    assert f"no section ## [{version}]" in check_release.trouble(f"v{version}", version, undated)


def test_the_changelog_keeps_its_form() -> None:
    """The form of Keep a Changelog: first what is not released, then versions, each with a link and known groups."""
    versions = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert versions[1] == gpuconv.__version__
    assert [name for name in versions if f"\n[{name}]: https://" not in CHANGELOG] == []
    groups = set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
