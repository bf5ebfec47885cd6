"""Runs the gradient of weights or of a bias as dispatch would launch it, on the CPU with every check on."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv.device import Device
from gpuconv.dispatch import GradientChoice, GradientProblem, Place, choose_gradient, lay_out_gradient
from gpuconv.families import GRADIENT_FAMILIES, GradientLayout
from gpuconv.families.base import gradient_shapes
from gpuconv.families.slices import Slices, sum_launch

from .launch import Schedule, run
from .memory import Array, Placement


def gradient(
    problem: GradientProblem,
    *inputs: Array,
    layout: GradientLayout | None = None,
    device: Device | None = None,
    family: str | None = None,
    schedule: Schedule = "forward",
    placement: Placement = "end",
) -> Array:
    """Evaluate the gradient of weights or of a bias with the kernels and launches that dispatch chooses.

    Args:
        problem: extents and settings; no array is empty.
        inputs: coarse and fine, or grad_output, with all axes.
        layout: strides and alignments of all arrays; by default those of the given arrays, and a contiguous result.
        device: the GPU to plan for, an H200 by default.
        family: the kernel family to take instead of the one that dispatch prefers.
        schedule: see `run`.
        placement: see `run`.

    Returns:
        The result, C-contiguous, of the dtype of the inputs.

    Raises:
        HostCudaError: see errors.py.
        ValueError: the named family refuses the problem.
    """
    device = device or Device.from_arch("sm_90")
    if layout is None:
        layout, _ = lay_out_gradient(
            problem, [Place(a.strides, a.__array_interface__["data"][0]) for a in inputs], None
        )
    choice = (
        choose_gradient(problem, layout, device)
        if family is None
        else _choose_gradient(problem, layout, device, family)
    )
    names = ("coarse", "fine", "grad_weight") if len(inputs) == 2 else ("grad_output", "grad_bias")
    result = np.empty(gradient_shapes(problem)[1], inputs[0].dtype.newbyteorder("="))
    given = dict(zip(names[:-1], inputs, strict=True))
    layouts = {**dict(zip(names[:-1], layout.inputs, strict=True)), names[-1]: layout.result}
    settings: dict[str, Any] = {"device": device, "schedule": schedule, "placement": placement}
    if choice.sum is None:
        arrays = {**given, "partial": None, names[-1]: result}
        run(choice.config, choice.launch, arrays, outputs=names[-1:], layouts=layouts, **settings)
        return result
    # In the accumulator's dtype, which recognises poison.
    dtype = result.dtype if result.dtype.itemsize >= 4 else np.dtype(np.float32)
    partial = np.empty(choice.partial_bytes // dtype.itemsize, dtype)
    arrays = {**given, "partial": partial, names[-1]: None}
    run(choice.config, choice.launch, arrays, outputs=["partial"], layouts=layouts, **settings)
    config, launch = choice.sum
    arrays = {"partial": partial, "result": result}
    return run(config, launch, arrays, outputs=["result"], layouts={"result": layout.result}, **settings)


def _choose_gradient(problem: GradientProblem, layout: GradientLayout, device: Device, name: str) -> GradientChoice:
    (family,) = (family for family in GRADIENT_FAMILIES if family.name == name)
    reason = family.refuse(problem, layout, device)
    if reason is not None:
        raise ValueError(f"hostcuda: {name} refuses {problem}: {reason}")
    config, launch = family.configure(problem, layout, device)
    slices = Slices.of(problem, on_tensor_cores=family.on_tensor_cores)
    total = sum_launch(problem, layout, slices) if slices.count > 1 else None
    return GradientChoice(name, config, launch, (), slices, total, slices.partial_bytes(problem))
