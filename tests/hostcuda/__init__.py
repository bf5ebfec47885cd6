"""Runs CUDA kernel texts on the CPU, to the letter, and catches what a GPU would let pass.

The text that `gpuconv.source.assemble` gives to NVRTC is compiled by the host compiler against hostcuda.h; every CUDA
thread is a fiber (runtime.cpp), every array lies between pages that may not be touched (memory.py), and whatever goes
wrong is a `HostCudaError` (errors.py) that names the kernel, the block, the thread and the element.

    output = hostcuda.compute(problem, input, weight, bias, schedule="every")

compiles and launches what dispatch chooses for the problem. `run` launches any kernel, `prebuild` compiles many
specialisations in one go. Within `races.watched()` launches are also watched for data races.
"""

from .build import Program, prebuild
from .errors import HostCudaError
from .launch import AMPERE, EVERY, HOPPER, Counts, Schedule, TensorCores, array_layout, compute, run

__all__ = [
    "AMPERE",
    "EVERY",
    "HOPPER",
    "Counts",
    "HostCudaError",
    "Program",
    "Schedule",
    "TensorCores",
    "array_layout",
    "compute",
    "prebuild",
    "run",
]
