"""What tests ask of the plans of kernel families, and of the kernels that were built."""

from __future__ import annotations

from typing import Any

from gpuconv import runtime
from gpuconv.device import Device
from gpuconv.dispatch import Choice
from gpuconv.families import FAMILIES, Config, Family, Launch, Layout, Plan, Refusal, edges
from gpuconv.problem import Problem
from gpuconv.runtime import executor

H200 = Device.from_arch("sm_90")
BASE = {"conv1d": "conv1d_direct", "conv_transpose1d": "conv_transpose1d_gather"}  # the base family of each operation

FORWARD_FAMILIES = tuple(family for family in FAMILIES if family.kind in ("conv1d", "conv_transpose1d"))
GRADIENT_FAMILIES = tuple(family for family in FAMILIES if family not in FORWARD_FAMILIES)


def with_zeros(config: Config) -> Config:
    """The specialisation of the same kernel for padding by zeros, which a family lists."""
    return Config(config.kernel, tuple(macro for macro in config.macros if macro[0] != "PADDING_MODE"))


def refusal_of(family: Family[Any], problem: Problem, layout: Layout, device: Device) -> str | None:
    """Why a family does not take a problem; None where it does."""
    plan = edges.plan(family, problem, layout, device)
    return plan.reason if isinstance(plan, Refusal) else None


def plan_of(family: Family[Any], problem: Problem, layout: Layout, device: Device) -> Plan:
    """The plan of a family for a problem that it takes."""
    plan = edges.plan(family, problem, layout, device)
    assert isinstance(plan, Plan), f"{family.name} refuses {problem}: {plan.reason}"
    return plan


def kernel_of(family: Family[Any], problem: Problem, layout: Layout, device: Device) -> tuple[Config, Launch]:
    """The specialisation and the launch of a family's own kernel, for a problem that the family takes."""
    choice = Choice(family.name, plan_of(family, problem, layout, device))
    return choice.config, choice.launch


def forget_kernels() -> None:
    """Let go of all kernels that were built, also of those that write lengths, which the executor keeps."""
    runtime.build.cache_clear()
    executor._writer.cache_clear()
