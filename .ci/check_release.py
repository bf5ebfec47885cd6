"""Checks that a tag may become a release: `python3 .ci/check_release.py v0.1.0`.

The tag must be "v" followed by the package's version, and the changelog must have a dated section for that version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def package_version(text: str) -> str:
    """The version that gpuconv/__init__.py states."""
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        sys.exit("gpuconv/__init__.py states no version")
    return found[1]


def trouble(tag: str, version: str, changelog: str) -> str | None:
    """Why a tag must not become a release, or None."""
    if tag != f"v{version}":
        return f"the tag is {tag}, but the version of the package is {version}"
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$", changelog, re.MULTILINE):
        return f"CHANGELOG.md has no section ## [{version}] with a date"
    return None


if __name__ == "__main__":
    version = package_version((CHECKOUT / "gpuconv" / "__init__.py").read_text(encoding="utf-8"))
    sys.exit(trouble(sys.argv[1], version, (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")))
