"""Prints the N-th shell command of the README's section "Try it": `python3 .ci/readme_command.py N`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def commands(text: str) -> list[str]:
    """The ```sh blocks of the section, in order."""
    _, found, section = text.partition("\n## Try it\n")
    if not found:
        sys.exit('the README has no section "Try it"')
    return re.findall(r"^```sh\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    readme = Path(__file__).resolve().parent.parent / "README.md"
    found = commands(readme.read_text(encoding="utf-8"))
    if len(found) != 2:
        sys.exit(f"{readme}: two commands expected in Try it, found {len(found)}")
    print(found[int(sys.argv[1]) - 1], end="")
