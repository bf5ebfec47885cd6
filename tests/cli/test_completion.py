"""`gpuconv completion`: what bash offers after the script has been read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpuconv.cli import main
from gpuconv.device import ARCHITECTURES
from tests.cli.test_cli import COMMANDS, refusal

SCRIPT = """
source "$1"
function=$(complete -p gpuconv)
function=${function##*-F } function=${function%% *}
while IFS= read -r line; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$line COMP_POINT=${#line} COMPREPLY=()
    "$function" gpuconv "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[@]}"
done
"""


def test_bash_completes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "speech.wav").touch()
    offered = {
        "gpuconv ver|": ["verify"],
        "gpuconv |": [*COMMANDS, "help"],
        "gpuconv info --j|": ["--json"],
        "gpuconv explain conv1d --arch |": [*ARCHITECTURES],
        "gpuconv explain conv1d --arch sm_1|": ["sm_100", "sm_120"],
        "gpuconv conv1d spe|": ["speech.wav"],
        "gpuconv verify --layers spe|": ["speech.wav"],
        "gpuconv cache pr|": ["prune"],
        "gpuconv completion |": ["bash", "zsh"],
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", SCRIPT, "bash", "./script"],
        input="".join(line.removesuffix("|") + "\n" for line in offered),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    found = [line.split() for line in done.stdout.splitlines()]
    for line, words, expected in zip(offered, found, offered.values(), strict=True):
        values = [word for word in words if not word.startswith("-")] if line.endswith(" |") else words
        assert sorted(values) == sorted(expected), line


def test_zsh_gets_a_script_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef gpuconv\n")
    assert all(f"{command}:" in script for command in COMMANDS)
    assert "versions, GPUs and what is missing" in script
    assert "_files" in script


def test_completion_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(capsys, "completion", "ksh").startswith("SHELL must be one of bash, zsh, got 'ksh'")
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert refusal(capsys, "completion", "bash").startswith("completion needs the package shtab: pip install")
