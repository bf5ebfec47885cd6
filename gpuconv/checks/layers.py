"""A user's own layers as cases of `gpuconv.verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from .. import cases
from ..cases import Case
from ..fusion import Fused
from ..layers import Layer
from ..problem import ConvProblem, dtype_name

Pair: TypeAlias = tuple[str, Case]  # a case in a number format

# The most FLOP of one call: the checks compute the slow reference some hundred times.
MAX_FLOPS = 10**8
_LEAST_OUTPUTS = 8


def cases_of(layers: Sequence[Layer], dtypes: Sequence[str] | None) -> list[Pair]:
    """Layers as cases "layer 1" and so on, in these number formats, or each in its own."""
    found = []
    for number, layer in enumerate(layers, start=1):
        wanted = [layer] if dtypes is None else [_in_format(layer, name) for name in dtypes]
        try:
            found += [_case(one, f"layer {number}") for one in wanted]
        except (ValueError, TypeError) as error:
            raise ValueError(f"verify: layer {number}: {error}") from None
    return found


def _in_format(layer: Layer, number_format: str) -> Layer:
    precision = "tf32" if number_format == "tf32" else "float32"
    other = layer.with_dtype(cases.dtype_of(number_format))
    return other._replace(settings={**other.settings, "precision": precision})


def cuts(pairs: Sequence[Pair], layers: Sequence[Layer]) -> dict[str, str]:
    """The layers whose N and L are reduced, since the reference would take too long, with the reduced shapes."""
    cut = {}
    for number, layer in enumerate(layers, start=1):
        p = next(case.problem for _, case in pairs if case.name == f"layer {number}")
        whole = tuple(layer.arrays[0].shape)
        if p.input_shape != whole:
            words = f"checked as {p.input_shape} in place of {whole}; kernel families depend on neither N nor L"
            cut[f"layer {number} at full size"] = words
    return cut


def _case(layer: Layer, name: str) -> Pair:
    """The layer as a case, in its number format (for integers the dtype).

    Complex data with real taps become the real part of the data. N and L are reduced until a call has at most
    `MAX_FLOPS`, but a few outputs remain: the kernel family does not depend on N and L.

    Raises:
        ValueError: the call itself would raise it.
        TypeError: likewise.
    """
    x, weight, bias = layer.arrays
    if x.dtype != weight.dtype and str(x.dtype).startswith("complex"):
        return _case(layer.with_dtype(str(dtype_name(weight.dtype))), name)
    settings = {n: v for n, v in layer.settings.items() if v is not None and n != "algorithm"}
    fused = Fused.take(layer.op, settings)
    problem = _cut(ConvProblem.of(layer.op, x, weight, bias, **settings))
    problem.fused(Fused(replace(fused.fusion, has_residual=False), (None, *fused.arrays[1:])))
    number_format = "tf32" if problem.precision == "tf32" else problem.dtype
    fusion = fused.fusion if fused.fusion else None
    return number_format, Case(name, problem, tuple(cases.call_settings(problem).items()), ("layer",), fusion)


def _cut(problem: ConvProblem) -> ConvProblem:
    """The layer with N and L reduced as far as `MAX_FLOPS` requires."""
    p = problem
    if p.flops() <= MAX_FLOPS:
        return p
    p = replace(p, N=min(p.N, 2))
    positions = p.L_in if p.transposed else p.L_out
    wanted = max(_LEAST_OUTPUTS, positions * MAX_FLOPS // p.flops())
    if p.transposed:
        # Enough inputs for an output to remain after the padding is trimmed.
        least = -(-(p.padding_left + p.padding_right) // p.stride) + 1
        return replace(p, L_in=min(p.L_in, max(wanted, least)))
    span = p.dilation * (p.K - 1) + 1
    # A padding mode may need more samples than the padding has.
    least = max(p.padding_left, p.padding_right, span) + 1
    return replace(p, L_in=min(p.L_in, max((wanted - 1) * p.stride + span, least)))
