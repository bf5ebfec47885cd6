"""The assembled text of a kernel: self-contained, each header once, and lines that compilers report where they are.

The files of cuda_src also stand for themselves: a host compiler that is given a file and its macros, as an editor is,
finds the headers and understands each file.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

import gpuconv
from gpuconv.device import Device
from gpuconv.dispatch import choose
from gpuconv.families import FAMILIES, ArrayLayout, Config, Layout, conv1d_depthwise_push, edges, lengths
from gpuconv.families.append import append_launch
from gpuconv.fusion import Fused
from gpuconv.problem import ArraySpec, ConvProblem
from gpuconv.source import assemble, directory, inlined, read
from tests import hostcuda

FILES = sorted(path.name for path in directory().glob("*.cu*"))
KERNELS = [name.removesuffix(".cu") for name in FILES if name.endswith(".cu")]
HOSTCUDA_H = Path(hostcuda.__file__).with_name("hostcuda.h")


@cache
def configs() -> Mapping[str, Config]:
    """One specialisation of each kernel."""
    device = Device.from_arch("sm_90")
    of_families = (config for family in FAMILIES for config in family.configs(device))
    of_others = (*edges.configs(), *lengths.configs(), *conv1d_depthwise_push.configs())
    found = {config.kernel: config for config in (*of_families, *of_others)}
    shapes = (ArraySpec((2, 4, 20), "float32"), ArraySpec((8, 4, 3), "float32"))
    problem = ConvProblem.conv1d(*shapes).fused(Fused.check("conv1d", None, "relu"))
    choice = choose(problem, Layout.contiguous(problem), device, "conv1d_tiled")
    assert choice is not None
    append, _ = append_launch("float32", (1, 1, 4), (1, 1, 2), ArrayLayout((2, 2, 1)))
    return {**found, append.kernel: append, "activate": choice.plan.steps[1].config}


def includes(file: str) -> list[str]:
    return re.findall(r'^#include "(.+)"$', read(file), re.MULTILINE)


def reached(file: str) -> set[str]:
    """A file and all that it includes, at whatever depth."""
    return {file}.union(*map(reached, includes(file)))


@pytest.mark.parametrize("file", FILES)
def test_the_python_files_that_it_names_exist(file: str) -> None:
    """Messages and comments tell which file to read or to change."""
    package = Path(gpuconv.__file__).parent
    named = re.findall(r"gpuconv/([\w/]+\.py)", read(file))
    assert [name for name in named if not (package / name).is_file()] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_assembled_text_is_self_contained(kernel: str) -> None:
    text = assemble(kernel, {"FIRST": "1", "SECOND": "x y"})
    assert text.startswith(f'#define FIRST 1\n#define SECOND x y\n#line 1 "{kernel}.cu"\n')
    assert not re.search(r"^\s*#\s*(include|pragma once)", text, re.MULTILINE)
    begun = Counter(re.findall(r'^#line 1 "(.+)"$', text, re.MULTILINE))
    assert begun == Counter(reached(f"{kernel}.cu"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_lines_come_from_where_they_say(kernel: str) -> None:
    """Every line of every file arrives, once, under its own number."""
    found: dict[str, list[tuple[int, str]]] = {}
    file, number = "", 0
    for line in inlined(f"{kernel}.cu").splitlines():
        directive = re.fullmatch(r'#line (\d+) "(.+)"', line)
        if directive is not None:
            number, file = int(directive[1]), directive[2]
        else:
            found.setdefault(file, []).append((number, line))
            number += 1
    for name, lines in found.items():
        kept = [(i, line) for i, line in enumerate(read(name).splitlines(), start=1) if not line.startswith("#include")]
        assert [(i, line) for i, line in lines if line] == [
            (i, line) for i, line in kept if line and line != "#pragma once"
        ]


def test_a_header_that_is_reached_twice_comes_where_it_is_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "top.cu": '// top\n#include "a.cuh"\n#include "b.cuh"\nint top;\n',
        "a.cuh": '#pragma once\n#include "b.cuh"\nint a;\n',
        "b.cuh": "#pragma once\nint b;\n",
    }
    monkeypatch.setattr("gpuconv.source.read", files.__getitem__)
    inlined.cache_clear()
    try:
        assert inlined("top.cu").splitlines() == [
            '#line 1 "top.cu"', "// top",
            '#line 1 "a.cuh"', "",
            '#line 1 "b.cuh"', "", "int b;", '#line 3 "a.cuh"',
            "int a;", '#line 3 "top.cu"',
            "", "int top;",
        ]  # fmt: skip
    finally:
        inlined.cache_clear()


@pytest.mark.parametrize("file", FILES)
def test_a_host_compiler_understands_each_file_by_itself(file: str, tmp_path: Path) -> None:
    """Each header includes what it needs, at most once: it compiles with the macros of a kernel and no search path."""
    kernel = next(name for name in KERNELS if file in reached(f"{name}.cu"))
    macros = [f"#define {name} {value}" for name, value in configs()[kernel].macros]
    times = 1 if file.endswith(".cu") else 2
    unit = tmp_path / "unit.cpp"
    unit.write_text("\n".join([f'#include "{HOSTCUDA_H}"', *macros, *times * [f'#include "{directory() / file}"']]))
    command = ["g++", "-std=c++17", "-fsyntax-only", "-w", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
