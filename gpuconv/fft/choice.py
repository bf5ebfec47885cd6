"""Whether a call goes through the FFT."""

from __future__ import annotations

from functools import lru_cache

from ..device import Device
from ..dispatch import BY_FFT, AlgorithmError
from ..dtypes import INTEGERS
from ..problem import ConvProblem, Problem, WeightGradientProblem
from .costs import costs
from .plan import Plan


def refusal(problem: Problem) -> str | None:
    """Why the FFT cannot compute a problem; None if it can."""
    if not isinstance(problem, ConvProblem | WeightGradientProblem):
        return "takes convolutions and the gradients of their inputs and weights"
    if problem.dtype in INTEGERS:
        return f"takes no {problem.dtype}, whose sums are exact"
    if isinstance(problem, ConvProblem) and problem.fusion:
        return f"fuses nothing ({problem.fusion})"
    return None


@lru_cache(maxsize=4096)
def choose(problem: Problem, algorithm: str | None, device: Device | None) -> Plan | None:
    """The plan by which a call computes a problem through the FFT, or None where it sums directly.

    Args:
        problem: of any kind.
        algorithm: of the call, "fft" or "auto"; others stand for direct sums.
        device: the GPU, or None for the CPU.

    Raises:
        AlgorithmError: the algorithm is "fft", which does not take the problem.
    """
    if algorithm not in BY_FFT:
        return None
    reason = refusal(problem)
    if reason is not None:
        if algorithm == "fft":
            raise AlgorithmError(f"{problem.kind}: algorithm 'fft' does not take {problem}: {reason}")
        return None
    assert isinstance(problem, ConvProblem | WeightGradientProblem)
    if algorithm == "auto":
        found = costs(problem, device)
        if found.direct_us <= found.fft_us:
            return None
    return Plan.of(problem, on_gpu=device is not None)
