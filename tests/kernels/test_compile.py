"""NVRTC compiles every kernel for every architecture, without a GPU: no local memory, no spills.

A family has more specialisations than it takes to find a fault: so many are compiled that any three values of macros
that occur together do so in one of them. Each is compiled for one architecture that has it, about as many for each. Of
those for tensor cores that differ in the 16-bit type alone, one stands for both. With GPUCONV_COMPILE_ALL=1 in the
environment all are compiled for all architectures.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import pytest
from cupy_backends.cuda.libs import nvrtc

from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import FAMILIES, Config, Family
from gpuconv.source import assemble, params_fields, read

ARCHS = tuple(ARCHITECTURES)
EVERY_FAMILY: tuple[Family[Any], ...] = FAMILIES
MAX_REGISTERS = 255  # of one thread, on every architecture

# The first two are those with which CuPy compiles every kernel.
OPTIONS = ("-ftz=true", "-std=c++17", "--ptxas-options=-v")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel: registers a thread, and bytes of local memory."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def parse_ptxas_log(log: str, kernel: str) -> Usage:
    """The usage of one kernel in the log of --ptxas-options=-v.

    Raises:
        ValueError: the log does not tell; a silent zero would hide a spill.
    """
    _, found, section = log.partition(f"Compiling entry function '{kernel}'")
    section = section.partition("Compiling entry function")[0]
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section)
    registers = re.search(r"Used (\d+) registers", section)
    if not found or memory is None or registers is None:
        raise ValueError(f"the log of ptxas says nothing of {kernel}: {log!r}")
    return Usage(int(registers.group(1)), *map(int, memory.groups()))


def compile_text(text: str, kernel: str, arch: str) -> tuple[bytes, Usage]:
    """The cubin of a kernel text and what it uses.

    Raises:
        AssertionError: NVRTC refuses the text; with its messages.
    """
    program = nvrtc.createProgram(text, f"{kernel}.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, (f"-arch={arch}", *OPTIONS))
        except nvrtc.NVRTCError as error:
            raise AssertionError(f"{kernel} for {arch}: {error}\n{nvrtc.getProgramLog(program)}") from None
        return nvrtc.getCUBIN(program), parse_ptxas_log(nvrtc.getProgramLog(program), kernel)
    finally:
        nvrtc.destroyProgram(program)


def compile_config(config: Config, arch: str) -> tuple[bytes, Usage]:
    return compile_text(assemble(config.kernel, dict(config.macros)), config.kernel, arch)


def alike(config: Config) -> Config:
    """The specialisation that stands for one: for tensor cores bfloat16 is another operand of the same instruction."""
    macros = dict(config.macros)
    if macros.get("MULTIPLY_MATRICES") != "multiply_matrices_bf16":
        return config
    return Config.of(config.kernel, {**macros, "DTYPE": "float16", "MULTIPLY_MATRICES": "multiply_matrices_f16"})


def triples(config: Config) -> frozenset[Any]:
    """Any three of a specialisation's macros, the kernel being one."""
    return frozenset(combinations((("KERNEL", config.kernel), *config.macros), 3))


@cache
def chosen(family: Family[Any]) -> dict[str, list[Config]]:
    """By architecture, specialisations in which all triples occur: always next the one with the most new ones."""
    found: dict[Config, list[tuple[str, Config]]] = {}
    for arch in ARCHS:
        for config in family.configs(Device.from_arch(arch)):
            found.setdefault(alike(config), []).append((arch, config))
    of = {config: triples(config) for config in found}
    missing = set().union(*of.values())
    by_arch: dict[str, list[Config]] = {arch: [] for arch in ARCHS}
    while missing:
        best = max(found, key=lambda config: len(of[config] & missing))
        missing -= of[best]
        arch, config = min(found[best], key=lambda choice: len(by_arch[choice[0]]))
        by_arch[arch].append(config)
    return by_arch


def configs_for(family: Family[Any], arch: str) -> list[Config]:
    """The specialisations to compile for an architecture."""
    if os.environ.get("GPUCONV_COMPILE_ALL") == "1":
        return list(family.configs(Device.from_arch(arch)))
    return chosen(family)[arch]


def first_config(family: Family[Any]) -> Config:
    """A specialisation of the family's own kernel; its list may hold others too."""
    return next(c for c in family.configs(Device.from_arch("sm_90")) if c.kernel == family.name)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_kernels_compile_without_local_memory(family: Family[Any], arch: str) -> None:
    configs = configs_for(family, arch)
    offenders = []
    for config in configs:
        cubin, usage = compile_config(config, arch)
        assert cubin.startswith(b"\x7fELF"), config
        assert 0 < usage.registers <= MAX_REGISTERS, (config, usage)
        if usage.stack or usage.spill_stores or usage.spill_loads:
            macros = " ".join(f"{name}={value}" for name, value in config.macros)
            offenders.append(f"{config.kernel} {macros}: {usage}")
    assert not offenders, f"{len(offenders)} of {len(configs)} use local memory:\n" + "\n".join(offenders)


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_every_three_values_are_compiled_somewhere(family: Family[Any]) -> None:
    every = {alike(config) for arch in ARCHS for config in family.configs(Device.from_arch(arch))}
    compiled = [config for arch in ARCHS for config in configs_for(family, arch)]
    assert {alike(config) for config in compiled} <= every
    found = {values for config in compiled for values in triples(alike(config))}
    assert found == {values for config in every for values in triples(config)}


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_params_size_is_asserted_on_both_sides(family: Family[Any]) -> None:
    for config in family.configs(Device.from_arch("sm_90")):
        macros = dict(config.macros)
        assert int(macros["PARAMS_BYTES"]) == len(params_fields(config.kernel)) * int(macros["INDEX_BITS"]) // 8
    config = first_config(family)
    macros = dict(config.macros)
    wrong = macros | {"PARAMS_BYTES": str(int(macros["PARAMS_BYTES"]) + 4)}
    module = type(family).__module__.rpartition(".")[2]
    with pytest.raises(AssertionError, match=rf"Params differs from gpuconv/families/{module}\.py"):
        compile_text(assemble(config.kernel, wrong), config.kernel, "sm_90")


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_messages_point_at_the_real_file(family: Family[Any]) -> None:
    config = first_config(family)
    text = assemble(config.kernel, dict(config.macros)) + "int broken = undeclared_name;\n"
    line = read(f"{family.name}.cu").count("\n") + 1
    with pytest.raises(AssertionError, match=rf'{family.name}\.cu"?\({line}\): error: .*undeclared_name'):
        compile_text(text, config.kernel, "sm_90")


def test_parser_reads_both_formats_of_ptxas() -> None:
    older = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_80'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'kernel' for 'sm_80'
ptxas info    : Function properties for kernel
    72 bytes stack frame, 64 bytes spill stores, 68 bytes spill loads
ptxas info    : Used 255 registers, 8 bytes smem, 456 bytes cmem[0]
"""
    newer = """ptxas info    : Compiling entry function 'kernel' for 'sm_90'
ptxas info    : Function properties for kernel
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compile time = 324.583 ms
"""
    assert parse_ptxas_log(older, "kernel") == Usage(255, 72, 64, 68)
    assert parse_ptxas_log(older, "other") == Usage(18, 0, 0, 0)
    assert parse_ptxas_log(newer, "kernel") == Usage(40, 0, 0, 0)


@pytest.mark.parametrize("log", ["", "ptxas info    : Compiling entry function 'kernel' for 'sm_90'\n"])
def test_parser_refuses_a_log_that_does_not_tell(log: str) -> None:
    with pytest.raises(ValueError, match="says nothing of kernel"):
        parse_ptxas_log(log, "kernel")


@pytest.mark.parametrize("arch", ARCHS)
def test_local_memory_shows(arch: str) -> None:
    text = """extern "C" __global__ void local(int* output, const int n) {
        int table[64];
        for (int i = 0; i < 64; ++i) table[i] = output[i];
        for (int i = 0; i < n; ++i) table[(i * n) & 63] += table[(i + n) & 63];
        for (int i = 0; i < 64; ++i) output[i] = table[i];
    }"""
    assert compile_text(text, "local", arch)[1].stack >= 256


def test_spills_show() -> None:
    loads = "".join(f"float a{i} = input[{i} * n];" for i in range(128))
    uses = "".join(f"output[{i} * n] = a{i} + a{127 - i};" for i in range(128))
    text = f"""extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* __restrict__ input,
        float* __restrict__ output, const int n) {{ {loads} __syncthreads(); {uses} }}"""
    usage = compile_text(text, "spills", "sm_90")[1]
    assert usage.spill_stores > 0
    assert usage.spill_loads > 0
