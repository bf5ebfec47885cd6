"""A small selection of every kernel, to be run under NVIDIA's compute-sanitizer.

From the root of a checkout, on a machine with a GPU:

    compute-sanitizer --tool memcheck python -m bench.sanitize

CuPy's memory pool would hide accesses outside of an array, which fall into a neighbour in the same pool; here every
array is an allocation of the driver's own.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from gpuconv import cases, dispatch, functional, grad, reference, runtime
from gpuconv.device import Device
from gpuconv.families import GradientLayout, Layout
from gpuconv.problem import BiasGradientProblem, ConvProblem, WeightGradientProblem

from .layers import load

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


def selection(device: Device, max_flops: int = 200_000_000) -> Iterator[tuple[str, ConvProblem]]:
    """For every specialisation that the benchmark layers need, the smallest shrunken layer that takes it."""
    smallest: dict[tuple[object, ...], tuple[str, ConvProblem]] = {}
    for (dtype, precision), positions, layer in itertools.product(MODES, LENGTHS, load()):
        problem = replace(shrunk(layer.problem(dtype), positions), precision=precision)
        choice = dispatch.choose(problem, Layout.contiguous(problem), device)
        if choice is None or problem.flops() > max_flops:
            continue
        key = (choice.config, choice.pack is not None)
        if key not in smallest or problem.flops() < smallest[key][1].flops():
            smallest[key] = (layer.name, problem)
    yield from smallest.values()


def gradient_selection(device: Device, max_flops: int = 200_000_000) -> Iterator[tuple[str, ConvProblem]]:
    """The same for the kernels of weight gradients."""
    smallest: dict[object, tuple[str, ConvProblem]] = {}
    for (dtype, precision), positions, layer in itertools.product(MODES, LENGTHS, load()):
        problem = replace(shrunk(layer.problem(dtype), positions), precision=precision)
        gradient = WeightGradientProblem.of(problem)
        choice = dispatch.choose_gradient(gradient, GradientLayout.contiguous(gradient), device)
        if problem.flops() > max_flops:
            continue
        key = (choice.config, choice.sum is not None)
        if key not in smallest or problem.flops() < smallest[key][1].flops():
            smallest[key] = (layer.name, problem)
    yield from smallest.values()


def run(problems: Iterable[tuple[str, ConvProblem]], seconds: float) -> tuple[int, int]:
    """Compute problems on the GPU and check them, until the time is up: (how many, how many wrong)."""
    cupy = runtime.cupy_module()
    cupy.cuda.set_allocator(None)
    start = time.monotonic()
    done = wrong = 0
    for name, problem in problems:
        if time.monotonic() - start > seconds:
            break
        data = cases.random_data(problem, seed=0)
        x, w, b = (None if a is None else cupy.asarray(a) for a in (data.input, data.weight, data.bias))
        function = functional.conv_transpose1d if problem.transposed else functional.conv1d
        output = cupy.asnumpy(function(x, w, b, **cases.call_settings(problem)))
        done += 1
        if not reference.within_bound(problem, output, data.input, data.weight, data.bias).all():
            wrong += 1
            print(f"WRONG {name}: {problem}")
    return done, wrong


def run_gradients(problems: Iterable[tuple[str, ConvProblem]], seconds: float) -> tuple[int, int]:
    """`run` for the gradients of the weights and of the bias."""
    cupy = runtime.cupy_module()
    start = time.monotonic()
    done = wrong = 0
    for name, problem in problems:
        if time.monotonic() - start > seconds:
            break
        x = cases.random_data(problem, seed=0).input
        dy = cases.random_data(problem.adjoint(), seed=1).input
        given, grad_output = cupy.asarray(x), cupy.asarray(dy)
        p = WeightGradientProblem.of(problem)
        of_weight = grad.conv_transpose1d_weight if problem.transposed else grad.conv1d_weight
        dw = cupy.asnumpy(of_weight(given, problem.weight_shape, grad_output, **cases.call_settings(problem)))
        db = cupy.asnumpy(grad.conv1d_bias(grad_output))
        bias = BiasGradientProblem(problem.N, problem.C_out, problem.L_out, problem.dtype)
        right = reference.weight_gradient(p, *p.sides(x, dy)).within_bound(dw).all()
        done += 1
        if not right or not reference.bias_gradient(bias, dy).within_bound(db).all():
            wrong += 1
            print(f"WRONG {name}: {p}")
    return done, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all right, 1 a wrong result, 2 bad usage, 3 no GPU; compute-sanitizer has its own."""
    from gpuconv.gpus import missing_gpu

    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="start no further problem after this time")
    args = parser.parse_args(argv)
    if missing := missing_gpu():
        print(missing)
        return 3
    device = runtime.device(int(runtime.cupy_module().cuda.runtime.getDevice()))
    done, wrong = run(selection(device), args.seconds / 2)
    of_gradients = run_gradients(gradient_selection(device), args.seconds / 2)
    done, wrong = done + of_gradients[0], wrong + of_gradients[1]
    print(f"{done} problems computed, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
