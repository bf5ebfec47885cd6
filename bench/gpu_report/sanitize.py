"""A small selection of every kernel, to be run under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from gpuconv import cases, dispatch, functional, grad, reference, runtime
from gpuconv.device import Device
from gpuconv.families import Layout
from gpuconv.problem import BiasGradientProblem, ConvProblem, WeightGradientProblem

from ..layers import load
from ..modes import Direction, of_forward
from . import records

# (dtype, precision)
MODES = (("float32", "float32"), ("float32", "tf32"), ("bfloat16", "float32"), ("complex64", "float32"))

# Input lengths: tiles are chosen by size, so short inputs alone would leave the large tiles out.
LENGTHS = (70, 1500)


def shrunk(problem: ConvProblem, positions: int) -> ConvProblem:
    """The same layer on one or two samples and a short input: its channels, taps and settings are kept."""
    p = problem
    span = p.dilation * (p.K - 1) + 1
    needed = 1 if p.transposed else max(1, span - p.padding_left - p.padding_right)
    return replace(p, N=min(p.N, 2), L_in=min(p.L_in, max(needed + 2 * p.stride, positions)))


def selection(
    device: Device, max_flops: int = 200_000_000, families: str = ""
) -> Iterator[tuple[Direction, str, ConvProblem]]:
    """For every specialisation that the benchmark layers need, the smallest shrunken layer that takes it.

    `families` is a regular expression of which the kernel family must have a match. The gradient of an input is a
    forward pass, so of the gradients only those of weights are there.
    """
    smallest: dict[tuple[object, ...], tuple[Direction, str, ConvProblem]] = {}
    passes: tuple[Direction, ...] = ("forward", "grad_weight")
    for direction, (dtype, precision), positions, layer in itertools.product(passes, MODES, LENGTHS, load()):
        problem = replace(shrunk(layer.problem(dtype), positions), precision=precision)
        computed = of_forward(problem, direction)
        choice = dispatch.choose(computed, Layout.contiguous(computed), device)
        if choice is None or problem.flops() > max_flops or not re.search(families, choice.family):
            continue
        key = tuple(step.config.kernel for step in choice.plan.steps), choice.config
        if key not in smallest or problem.flops() < smallest[key][2].flops():
            smallest[key] = (direction, layer.name, problem)
    yield from smallest.values()


def check(problem: ConvProblem) -> dict[str, Any]:
    """Compute a problem on the GPU; the record says whether every element is within the bound."""
    cupy = runtime.cupy_module()
    data = cases.random_data(problem, seed=0)
    x, w, b = (None if a is None else cupy.asarray(a) for a in (data.input, data.weight, data.bias))
    function = functional.conv_transpose1d if problem.transposed else functional.conv1d
    output = cupy.asnumpy(function(x, w, b, **cases.call_settings(problem)))
    right = reference.within_bound(problem, output, data.input, data.weight, data.bias).all()
    return {"ok": bool(right), "problem": str(problem)}


def check_gradients(problem: ConvProblem) -> dict[str, Any]:
    """`check` for the gradients of the weights and of the bias."""
    cupy = runtime.cupy_module()
    x = cases.random_data(problem, seed=0).input
    dy = cases.random_data(problem.adjoint(), seed=1).input
    given, grad_output = cupy.asarray(x), cupy.asarray(dy)
    p = WeightGradientProblem.of(problem)
    of_weight = grad.conv_transpose1d_weight if problem.transposed else grad.conv1d_weight
    dw = cupy.asnumpy(of_weight(given, problem.weight_shape, grad_output, **cases.call_settings(problem)))
    db = cupy.asnumpy(grad.conv1d_bias(grad_output))
    bias = BiasGradientProblem(problem.N, problem.C_out, problem.L_out, problem.dtype)
    right = reference.weight_gradient(p, *p.sides(x, dy)).within_bound(dw).all()
    right = right and reference.bias_gradient(bias, dy).within_bound(db).all()
    return {"ok": bool(right), "problem": str(p)}


def work(families: str = "", *, rehearse: bool = False) -> list[tuple[str, records.Work]]:
    """One piece for each problem, the smallest first: under racecheck the largest take minutes.

    From here on every array is an allocation of the driver's own: CuPy's memory pool would hide accesses outside of an
    array, which fall into a neighbour in the same pool.
    """
    runtime.cupy_module().cuda.set_allocator(None)
    device = runtime.current_gpu()
    max_flops = 2_000_000 if rehearse else 200_000_000
    found = sorted(selection(device, max_flops, families), key=lambda chosen: chosen[2].flops())
    checks = {"forward": check, "grad_weight": check_gradients}
    return [
        (f"{direction} {name} {problem}", partial(checks[direction], problem)) for direction, name, problem in found
    ]
