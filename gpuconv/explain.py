"""What a call would do, without doing it: `explain` and the `Explanation` that it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import numpy as np

from . import cpu, cpu_gradients, dispatch, runtime
from .arguments import check_int, check_padding_mode
from .calls import check_kinds
from .device import ARCHITECTURES, Device
from .families import Config, Launch
from .families.base import gradient_shapes
from .problem import (
    ArrayLike,
    ArraySpec,
    BiasGradientProblem,
    ConvProblem,
    Op,
    WeightGradientProblem,
)
from .text import WIDTH, count, wrap, wrap_rows

Direction: TypeAlias = Literal["forward", "grad_input", "grad_weight", "grad_bias"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_weight", "grad_bias")

SETTINGS: Mapping[Op, tuple[str, ...]] = {
    "conv1d": ("stride", "padding", "dilation", "groups", "padding_mode", "precision", "algorithm"),
    "conv_transpose1d": (
        "stride", "padding", "output_padding", "groups", "dilation", "output_size", "precision", "algorithm",
    ),
}  # fmt: skip


MAX_FIGURES = 8  # configurations that a page shows of those that a cost model compared
_BAR = 12  # columns


class _Costs:
    """What both kinds of explanation say of the work."""

    __slots__ = ()
    problem: ConvProblem | WeightGradientProblem | BiasGradientProblem
    copies: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two (as eight for complex data), padding included."""
        return self.problem.flops()

    @property
    def bytes(self) -> int:
        """The fewest bytes that must move: every input read once, the result written once."""
        return self.problem.bytes()

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: `flops` per byte of `bytes`; 0 where nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def copy_bytes(self) -> int:
        """The memory that the copies take, in bytes."""
        shapes = self._shapes()
        return sum(math.prod(shapes[name]) for name in self.copies) * self.problem.itemsize

    def page(self, width: int = WIDTH) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.page()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Explanation(_Costs):
    """What one call does and what it costs. `str` and `page` give a short page, `to_dict` the same for JSON.

    Attributes:
        problem: the call with every setting resolved: extents, both paddings, L_out.
        device: the GPU that runs it; None on the CPU path.
        choice: the kernel family, its specialisation, launch and the families that were asked before it; None on the
            CPU path, and where the output is empty and nothing is launched.
        method: how the CPU path computes it; None on a GPU.
        copies: the arrays that are copied first, because the kernels (or BLAS) cannot read them where they lie.
    """

    problem: ConvProblem
    device: Device | None
    choice: dispatch.Choice | None
    method: cpu.Method | None
    copies: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain values that `json.dumps` takes. Times of the cost model are predicted."""
        choice = self.choice
        result = _common_dict(self, self._shapes())
        if choice is not None:
            second = choice.second_pass
            result["kernel"] = {
                **_choice_dict(self, choice),
                "pack_bytes": 0 if choice.pack is None else choice.pack.num_bytes,
                "partial_bytes": 0 if second is None else second.num_bytes,
                "second_pass": None if second is None else _launch_dict(second.config, second.launch),
            }
        return result

    def page(self, width: int = WIDTH) -> str:
        """The facts as text, in lines of at most `width` columns."""
        p = self.problem
        rows = [
            (name, f"{shape} {p.dtype}" if name == "input" else str(shape)) for name, shape in self._shapes().items()
        ]
        settings = f"stride {p.stride}, padding {p.padding}, dilation {p.dilation}, groups {p.groups}"
        settings += f", output_padding {p.output_padding}" if p.output_padding else ""
        settings += f", precision {p.precision}" if p.precision != "float32" else ""
        rows.append(("settings", settings))
        return _page(p.op, self, rows, self._kernel_rows(), width)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        p = self.problem
        shapes = {"input": p.input_shape, "weight": p.weight_shape, "bias": p.bias_shape, "output": p.output_shape}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    def _kernel_rows(self) -> list[tuple[str, str]]:
        if self.choice is None:
            return [("kernel", "none: the output is empty, so nothing is launched")]
        rows = _choice_rows(self, self.choice)
        if self.choice.pack:
            size = _quantity(self.choice.pack.num_bytes, "B")
            rows.append(("packing", f"weights are packed first into a buffer of {size}"))
        if self.choice.second_pass:
            size = _quantity(self.choice.second_pass.num_bytes, "B")
            segments = dict(self.choice.launch.params)["segments"]
            sums = f"the sums of {count(segments, 'segment')} of the channels"
            rows.append(("second launch", f"adds {sums} from a buffer of {size}"))
        return rows


@dataclass(frozen=True, slots=True)
class GradientExplanation(_Costs):
    """What one call for the gradient of weights or of a bias does. `str`, `page` and `to_dict` as in `Explanation`.

    Attributes:
        problem: the call with every setting resolved.
        device: the GPU that runs it; None on the CPU path.
        choice: the kernel family, its specialisation, launch, the slices of its sum and the buffer of their sums; None
            on the CPU path, and where an array is empty and nothing is launched.
        method: how the CPU path computes it; None on a GPU, and for a bias.
        copies: the arrays that are copied first, because the kernels (or BLAS) cannot read them where they lie.
    """

    problem: WeightGradientProblem | BiasGradientProblem
    device: Device | None
    choice: dispatch.GradientChoice | None
    method: cpu.Method | None
    copies: tuple[str, ...]

    @property
    def partial_bytes(self) -> int:
        """The buffer of the slices' sums, in bytes; 0 where the sum is not cut, and on the CPU path."""
        return 0 if self.choice is None else self.choice.partial_bytes

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain values that `json.dumps` takes."""
        result = _common_dict(self, self._shapes())
        if self.choice is not None:
            total = self.choice.sum
            result["kernel"] = {
                **_choice_dict(self, self.choice),
                "slices": dataclasses.asdict(self.choice.slices),
                "partial_bytes": self.partial_bytes,
                "sum": None if total is None else _launch_dict(*total),
            }
        return result

    def page(self, width: int = WIDTH) -> str:
        """The facts as text, in lines of at most `width` columns."""
        p = self.problem
        rows = [(name, f"{shape} {p.dtype}") for name, shape in self._shapes().items()]
        if isinstance(p, BiasGradientProblem):
            return _page("gradient of the bias", self, rows, self._kernel_rows(), width)
        padding = f"{p.padding_left} on the left"
        rows.append(("settings", f"stride {p.stride}, padding {padding}, dilation {p.dilation}, groups {p.groups}"))
        return _page(f"gradient of {p.op}'s weight", self, rows, self._kernel_rows(), width)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        p = self.problem
        if isinstance(p, BiasGradientProblem):
            return {"grad_output": p.grad_output_shape, "grad_bias": p.bias_shape}
        first, second = ("input", "grad_output") if p.transposed else ("grad_output", "input")
        return {first: p.coarse_shape, second: p.fine_shape, "grad_weight": p.weight_shape}

    def _kernel_rows(self) -> list[tuple[str, str]]:
        if self.choice is None:
            return [("kernel", "none: an array is empty, so the gradient is zero")]
        cut, rows = self.choice.slices, _choice_rows(self, self.choice)
        if self.choice.sum is None:
            return [*rows, ("slices", "1: all samples in one sum")]
        part = count(cut.positions, "position") if cut.pieces > 1 else count(cut.samples, "whole sample")
        size = _quantity(self.partial_bytes, "B")
        rows.append(("slices", f"{cut.count} of {part}, whose sums take a buffer of {size}"))
        launch = self.choice.sum[1]
        ways = dict(launch.params)["ways"]
        rows.append(("sum", f"sum_slices adds them in {count(ways, 'way')}: {_launch_words(launch)}"))
        return rows


def _common_dict(explanation: Explanation | GradientExplanation, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    e = explanation
    return {
        "problem": {
            **dataclasses.asdict(e.problem),
            **{f"{name}_shape": list(shape) for name, shape in shapes.items()},
        },
        "device": {"name": "CPU"} if e.device is None else dataclasses.asdict(e.device),
        "flops": e.flops,
        "bytes": e.bytes,
        "intensity": e.intensity,
        "copies": list(e.copies),
        "copy_bytes": e.copy_bytes,
        "method": None if e.method is None else dataclasses.asdict(e.method),
        "kernel": None,
    }


def _launch_dict(config: Config, launch: Launch) -> dict[str, Any]:
    return {
        "macros": dict(config.macros),
        "launch": {**dataclasses.asdict(launch), "params": dict(launch.params)},
    }


def _choice_dict(
    explanation: Explanation | GradientExplanation, choice: dispatch.Choice | dispatch.GradientChoice
) -> dict[str, Any]:
    return {
        "family": choice.family,
        **_launch_dict(choice.config, choice.launch),
        "refusals": [{"family": family, "reason": reason} for family, reason in choice.refusals],
        "figures": [
            {"configuration": name, "cycles": cycles, "microseconds": _microseconds(explanation, cycles)}
            for name, cycles in choice.figures
        ],
    }


def _page(
    title: str,
    explanation: Explanation | GradientExplanation,
    rows: list[tuple[str, str]],
    kernel_rows: list[tuple[str, str]],
    width: int,
) -> str:
    e = explanation
    if e.device is None:
        where = "the CPU, through NumPy"
        if e.method is not None:
            rows.append(("method", f"{e.method.name}: {e.method.reason}"))
            rows.append(("workspace", _quantity(e.method.workspace_bytes, "B")))
    else:
        where = f"{e.device.name} ({e.device.arch_name})"
        rows += kernel_rows
    work = f"{_quantity(e.flops, 'FLOP')}, at least {_quantity(e.bytes, 'B')} moved"
    rows.append(("work", f"{work}, {e.intensity:.3g} FLOP/B"))
    copies = f"{', '.join(e.copies)} ({_quantity(e.copy_bytes, 'B')})" if e.copies else "none"
    rows.append(("copies", copies))
    return "\n".join([*wrap(f"{title} on {where}", width), *wrap_rows(rows, width, indent="  ")])


def _choice_rows(
    explanation: Explanation | GradientExplanation, choice: dispatch.Choice | dispatch.GradientChoice
) -> list[tuple[str, str]]:
    macros = ", ".join(f"{name}={value}" for name, value in choice.config.macros)
    return [
        *(("refused", f"{family}: {reason}") for family, reason in choice.refusals),
        ("kernel", f"{choice.family} with {macros}"),
        ("launch", _launch_words(choice.launch)),
        *([("model", _figures_text(explanation, choice.figures))] if choice.figures else []),
    ]


def _figures_text(explanation: Explanation | GradientExplanation, figures: Sequence[tuple[str, float]]) -> str:
    """The configurations that the cost model compared, each with its predicted time and a bar that grows with it."""
    assert explanation.device is not None
    longest = max(cycles for _, cycles in figures[:MAX_FIGURES])
    lines = [f"predicted, not measured, at {explanation.device.clock_ghz:.3g} GHz:"]
    for name, cycles in figures[:MAX_FIGURES]:
        us = _microseconds(explanation, cycles)
        bar = "#" * max(1, round(_BAR * cycles / longest))
        # A tab ends what a long name is indented by.
        lines.append(f"{f'{us:.0f}' if us >= 100 else f'{us:.3g}':>7} us  {bar:<{_BAR}}  \t{name}")
    if len(figures) > MAX_FIGURES:
        lines.append(f"and {count(len(figures) - MAX_FIGURES, 'slower one')}")
    lines[1] += " (chosen)"
    return "\n".join(lines)


def _microseconds(explanation: Explanation | GradientExplanation, cycles: float) -> float:
    assert explanation.device is not None
    return cycles / (1e3 * explanation.device.clock_ghz)


def _launch_words(launch: Launch) -> str:
    return (
        f"{count(launch.grid, 'block')} of {count(launch.block, 'thread')}, "
        f"{launch.shared_bytes} B of shared memory, {launch.index_bits}-bit offsets"
    )


@overload
def explain(
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    direction: Literal["forward", "grad_input"] = "forward",
    device: Device | str | None = None,
    **settings: Any,
) -> Explanation: ...


@overload
def explain(
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    direction: Literal["grad_weight", "grad_bias"],
    device: Device | str | None = None,
    **settings: Any,
) -> GradientExplanation: ...


@overload
def explain(
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    direction: Direction,
    device: Device | str | None = None,
    **settings: Any,
) -> Explanation | GradientExplanation: ...


def explain(
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    direction: Direction = "forward",
    device: Device | str | None = None,
    **settings: Any,
) -> Explanation | GradientExplanation:
    """Tell what `gpuconv.conv1d` or `gpuconv.conv_transpose1d` does with these arguments, without computing anything.

    Args:
        op: "conv1d" or "conv_transpose1d".
        input: (N, C_in, L_in) or (C_in, L_in): an array, or a `gpuconv.problem.ArraySpec(shape, dtype)` for one that
            need not exist and is taken to be freshly allocated.
        weight: (C_out, C_in/groups, K), for conv_transpose1d (C_in, C_out/groups, K).
        bias: (C_out,), or None.
        direction: "forward", or which gradient of this call to explain: "grad_input", "grad_weight" or "grad_bias",
            given a gradient of the output that is freshly allocated, as is the result.
        device: None for where the arrays are (NumPy: the CPU path; CuPy: their GPU), "cpu", an architecture such as
            "sm_90" for a typical GPU of it, or a `gpuconv.device.Device`. A GPU need not be there: NumPy arrays then
            stand for GPU arrays with the same strides and the same alignment.
        **settings: the settings of the operation by name: stride, padding, dilation, groups, algorithm and so on.

    Returns:
        An `Explanation`, for "grad_weight" and "grad_bias" a `GradientExplanation`; `print` it.

    Raises:
        ValueError: what the call itself would refuse; an unknown op, direction or device; ArraySpecs without a device;
            the gradient of an input without positions.
        TypeError: what the call itself would refuse; a setting that the operation does not have.
        RuntimeError: the arrays are CuPy arrays but no GPU answers.

    Example:
        >>> import gpuconv
        >>> from gpuconv.problem import ArraySpec
        >>> x, w = ArraySpec((8, 512, 3000), "float16"), ArraySpec((512, 512, 3), "float16")
        >>> gpuconv.explain("conv1d", x, w, stride=2, padding=1, device="sm_90").problem.L_out
        1500
    """
    if op not in SETTINGS:
        raise ValueError(f'explain: op must be one of "conv1d" and "conv_transpose1d", got {op!r}')
    if direction not in DIRECTIONS:
        raise ValueError(f"explain: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if unknown := settings.keys() - set(SETTINGS[op]):
        raise TypeError(f"explain: {op} has the settings {', '.join(SETTINGS[op])}, got {', '.join(sorted(unknown))}")
    arrays = {"input": input, "weight": weight, "bias": bias}
    given: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None or name != "bias"}
    for name, array in given.items():
        if isinstance(array, ArraySpec):
            _check_extents(op, name, array)
        elif isinstance(array, list | tuple):
            is_shape = all(isinstance(extent, int) for extent in array)
            hint = f'; a shape becomes gpuconv.problem.ArraySpec({tuple(array)!r}, "float32")' if is_shape else ""
            raise TypeError(f"explain: {name} must be an array or an ArraySpec, got {type(array).__name__}{hint}")
    target = _device_of(op, given) if device is None else _parse_device(device)

    if "padding_mode" in settings:
        check_padding_mode(op, settings.pop("padding_mode"))
    algorithm = settings.pop("algorithm", None)
    dispatch.check_algorithm(op, op, algorithm)
    if algorithm is not None and direction != "forward":
        raise ValueError(
            f'explain: algorithm is of direction "forward"; there is no choice for {direction}, got {algorithm!r}'
        )
    construct = ConvProblem.conv_transpose1d if op == "conv_transpose1d" else ConvProblem.conv1d
    problem = construct(input, weight, bias, **settings)
    swapped = tuple(name for name, array in given.items() if not getattr(array.dtype, "isnative", True))
    places = {name: _place(array) for name, array in given.items()}
    if direction == "grad_weight":
        return _explain_weight_gradient(problem, target, places["input"], "input" in swapped)
    if direction == "grad_bias":
        bias_problem = BiasGradientProblem(problem.N, problem.C_out, problem.L_out, problem.dtype)
        return GradientExplanation(bias_problem, target, _choose_gradient(bias_problem, [None], target)[0], None, ())
    if direction == "grad_input":
        if problem.L_in == 0:
            raise ValueError("explain: input has no positions, so it has no gradient")
        problem = problem.adjoint()
        if problem.is_complex:  # the conjugates of the weights are a copy
            swapped, places = ("weight",), {}
        else:
            swapped, places = tuple(name for name in swapped if name == "weight"), {"weight": places["weight"]}
    if target is None:
        return Explanation(problem, None, None, cpu.method(problem), swapped)
    layout, copies = dispatch.lay_out(problem, places)
    if direction == "grad_input" and problem.is_complex:
        copies = ("weight",)
    choice = dispatch.choose(problem, layout, target, algorithm)
    return Explanation(problem, target, choice, None, copies if choice is not None else ())


def _explain_weight_gradient(
    problem: ConvProblem, target: Device | None, input: dispatch.Place | None, is_swapped: bool
) -> GradientExplanation:
    p = WeightGradientProblem.of(problem)
    if target is None:
        return GradientExplanation(p, None, None, cpu_gradients.method(p), ("input",) if is_swapped else ())
    choice, copies = _choose_gradient(p, [input, None] if p.transposed else [None, input], target)
    return GradientExplanation(p, target, choice, None, ("input",) if copies else ())


def _choose_gradient(
    problem: dispatch.GradientProblem, places: list[dispatch.Place | None], target: Device | None
) -> tuple[dispatch.GradientChoice | None, tuple[int, ...]]:
    inputs, result = gradient_shapes(problem)
    if target is None or any(0 in shape for shape in (*inputs, result)):
        return None, ()
    layout, copies = dispatch.lay_out_gradient(problem, places, None)
    return dispatch.choose_gradient(problem, layout, target), copies


def _check_extents(op: Op, name: str, spec: ArraySpec) -> None:
    for extent in spec.shape:
        check_int(op, f"each extent of {name}", extent, "an int", at_least=0)


def _device_of(op: Op, given: dict[str, Any]) -> Device | None:
    """The GPU that the arrays are on, or None for NumPy arrays."""
    for name, array in given.items():
        if isinstance(array, ArraySpec):
            raise ValueError(
                f'explain: device must be given ("cpu", "sm_90", ...) where no arrays exist, got {name} as an ArraySpec'
            )
    check_kinds(op, given)
    if not runtime.is_cupy_array(given["input"]):
        return None
    return runtime.device(given["input"].data.device_id)


def _parse_device(device: Device | str) -> Device | None:
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise TypeError(f'explain: device must be None, "cpu", "sm_90", ... or a Device, got {type(device).__name__}')
    if device != "cpu" and device not in ARCHITECTURES:
        raise ValueError(
            f'explain: device must be "cpu", one of {", ".join(ARCHITECTURES)}, or a Device, got {device!r}; without '
            "device the arrays tell it"
        )
    return None if device == "cpu" else Device.from_arch(device)


def _place(array: Any) -> dispatch.Place | None:
    if isinstance(array, ArraySpec):
        return None
    address = array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr
    return dispatch.Place(tuple(array.strides), int(address))


def _quantity(value: float, unit: str) -> str:
    """A value with three digits and a decimal prefix: 19300000000, "FLOP" gives "19.3 GFLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"
