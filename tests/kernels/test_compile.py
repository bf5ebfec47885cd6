"""NVRTC compiles every kernel for every architecture, without a GPU: no local memory, no spills.

A family has more specialisations than it takes to find a fault: so many are compiled that any two values of macros that
occur together do so in one of them. Each is compiled for one architecture that has it, about as many for each. Of those
for tensor cores that differ in the 16-bit type alone, one stands for both. With GPUCONV_COMPILE_ALL=1 in the
environment, as once a week in CI, all are compiled for all architectures.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import combinations
from typing import Any

import pytest

from bench.static import sass
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import FAMILIES, Config, Family
from gpuconv.source import assemble, params_fields, read

ARCHS = tuple(ARCHITECTURES)
EVERY_FAMILY: tuple[Family[Any], ...] = FAMILIES
MAX_REGISTERS = 255  # of one thread, on every architecture


def resources_of(text: str, kernel: str, arch: str) -> sass.Resources:
    """What a kernel text uses once it is compiled for an architecture."""
    cubin, log, _ = sass.compile_cubin(text, kernel, arch)
    assert cubin.startswith(b"\x7fELF"), kernel
    return sass.parse_log(log, kernel)


def resources(config: Config, arch: str) -> sass.Resources:
    return resources_of(assemble(config.kernel, dict(config.macros)), config.kernel, arch)


def alike(config: Config) -> Config:
    """The specialisation that stands for one: for tensor cores bfloat16 is another operand of the same instruction."""
    macros = dict(config.macros)
    if macros.get("MULTIPLY_MATRICES") != "multiply_matrices_bf16":
        return config
    return Config.of(config.kernel, {**macros, "DTYPE": "float16", "MULTIPLY_MATRICES": "multiply_matrices_f16"})


def pairs(config: Config) -> frozenset[Any]:
    """Any two of a specialisation's macros, the kernel being one."""
    return frozenset(combinations((("KERNEL", config.kernel), *config.macros), 2))


@cache
def chosen(family: Family[Any]) -> dict[str, list[Config]]:
    """By architecture, specialisations in which all pairs occur: always next the one with the most new ones."""
    found: dict[Config, list[tuple[str, Config]]] = {}
    for arch in ARCHS:
        for config in family.configs(Device.from_arch(arch)):
            found.setdefault(alike(config), []).append((arch, config))
    of = {config: pairs(config) for config in found}
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
        found = resources(config, arch)
        assert 0 < found.registers <= MAX_REGISTERS, (config, found)
        if found.local_bytes:
            macros = " ".join(f"{name}={value}" for name, value in config.macros)
            offenders.append(f"{config.kernel} {macros}: {found}")
    assert not offenders, f"{len(offenders)} of {len(configs)} use local memory:\n" + "\n".join(offenders)


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_every_two_values_are_compiled_somewhere(family: Family[Any]) -> None:
    every = {alike(config) for arch in ARCHS for config in family.configs(Device.from_arch(arch))}
    compiled = [config for arch in ARCHS for config in configs_for(family, arch)]
    assert {alike(config) for config in compiled} <= every
    found = {values for config in compiled for values in pairs(alike(config))}
    assert found == {values for config in every for values in pairs(config)}


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_params_size_is_asserted_on_both_sides(family: Family[Any]) -> None:
    for config in family.configs(Device.from_arch("sm_90")):
        macros = dict(config.macros)
        assert int(macros["PARAMS_BYTES"]) == len(params_fields(config.kernel)) * int(macros["INDEX_BITS"]) // 8
    config = first_config(family)
    macros = dict(config.macros)
    wrong = macros | {"PARAMS_BYTES": str(int(macros["PARAMS_BYTES"]) + 4)}
    module = type(family).__module__.rpartition(".")[2]
    with pytest.raises(RuntimeError, match=rf"Params differs from gpuconv/families/{module}\.py"):
        resources_of(assemble(config.kernel, wrong), config.kernel, "sm_90")


@pytest.mark.parametrize("family", EVERY_FAMILY, ids=lambda family: family.name)
def test_messages_point_at_the_real_file(family: Family[Any]) -> None:
    config = first_config(family)
    text = assemble(config.kernel, dict(config.macros)) + "int broken = undeclared_name;\n"
    line = read(f"{family.name}.cu").count("\n") + 1
    with pytest.raises(RuntimeError, match=rf'{family.name}\.cu"?\({line}\): error: .*undeclared_name'):
        resources_of(text, config.kernel, "sm_90")


@pytest.mark.parametrize("arch", ARCHS)
def test_local_memory_shows(arch: str) -> None:
    text = """extern "C" __global__ void local(int* output, const int n) {
        int table[64];
        for (int i = 0; i < 64; ++i) table[i] = output[i];
        for (int i = 0; i < n; ++i) table[(i * n) & 63] += table[(i + n) & 63];
        for (int i = 0; i < 64; ++i) output[i] = table[i];
    }"""
    assert resources_of(text, "local", arch).stack_bytes >= 256


def test_spills_show() -> None:
    loads = "".join(f"float a{i} = input[{i} * n];" for i in range(128))
    uses = "".join(f"output[{i} * n] = a{i} + a{127 - i};" for i in range(128))
    text = f"""extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* __restrict__ input,
        float* __restrict__ output, const int n) {{ {loads} __syncthreads(); {uses} }}"""
    found = resources_of(text, "spills", "sm_90")
    assert found.spill_store_bytes > 0
    assert found.spill_load_bytes > 0
