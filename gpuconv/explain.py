"""What a call would do, without doing it: `explain` and the `Explanation` that it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import cpu, dispatch, runtime
from .calls import check_kinds
from .device import Device
from .problem import ArrayLike, ArraySpec, ConvProblem, Op, check_int, check_padding_mode

SETTINGS: Mapping[Op, tuple[str, ...]] = {
    "conv1d": ("stride", "padding", "dilation", "groups", "padding_mode", "precision"),
    "conv_transpose1d": (
        "stride", "padding", "output_padding", "groups", "dilation", "output_size", "precision",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one call does and what it costs. `str` gives a short page, `to_dict` the same for JSON.

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

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two (as eight for complex data), padding included."""
        return self.problem.flops()

    @property
    def bytes(self) -> int:
        """The fewest bytes that must move: input, weight and bias read once, the output written once."""
        return self.problem.bytes()

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: `flops` per byte of `bytes`; 0 where nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def copy_bytes(self) -> int:
        """The memory that the copies take, in bytes."""
        shapes = _shapes(self.problem)
        return sum(math.prod(shapes[name]) for name in self.copies) * self.problem.itemsize

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain values that `json.dumps` takes."""
        p, choice = self.problem, self.choice
        result: dict[str, Any] = {
            "problem": {
                **dataclasses.asdict(p),
                **{f"{name}_shape": list(shape) for name, shape in _shapes(p).items()},
            },
            "device": {"name": "CPU"} if self.device is None else dataclasses.asdict(self.device),
            "flops": self.flops,
            "bytes": self.bytes,
            "intensity": self.intensity,
            "copies": list(self.copies),
            "copy_bytes": self.copy_bytes,
            "method": None if self.method is None else dataclasses.asdict(self.method),
            "kernel": None,
        }
        if choice is not None:
            launch = dataclasses.asdict(choice.launch)
            result["kernel"] = {
                "family": choice.family,
                "macros": dict(choice.config.macros),
                "launch": {**launch, "params": dict(choice.launch.params)},
                "refusals": [{"family": family, "reason": reason} for family, reason in choice.refusals],
                "pack_bytes": 0 if choice.pack is None else choice.pack.num_bytes,
                "figures": [{"configuration": name, "cycles": cycles} for name, cycles in choice.figures],
            }
        return result

    def __str__(self) -> str:
        p = self.problem
        rows = [(name, f"{shape} {p.dtype}" if name == "input" else str(shape)) for name, shape in _shapes(p).items()]
        settings = f"stride {p.stride}, padding {p.padding}, dilation {p.dilation}, groups {p.groups}"
        rows.append(("settings", settings + (f", output_padding {p.output_padding}" if p.output_padding else "")))
        if self.method is not None:
            where = "the CPU, through NumPy"
            rows.append(("method", f"{self.method.name}: {self.method.reason}"))
            rows.append(("workspace", _quantity(self.method.workspace_bytes, "B")))
        else:
            where = f"{self.device.name} ({self.device.arch_name})" if self.device else ""
            rows += self._kernel_rows()
        work = f"{_quantity(self.flops, 'FLOP')}, at least {_quantity(self.bytes, 'B')} moved"
        rows.append(("work", f"{work}, {self.intensity:.3g} FLOP/B"))
        copies = f"{', '.join(self.copies)} ({_quantity(self.copy_bytes, 'B')})" if self.copies else "none"
        rows.append(("copies", copies))
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"{p.op} on {where}", *(f"  {name:<{width}}  {text}" for name, text in rows)])

    def _kernel_rows(self) -> list[tuple[str, str]]:
        if self.choice is None:
            return [("kernel", "none: the output is empty, so nothing is launched")]
        config, launch = self.choice.config, self.choice.launch
        macros = ", ".join(f"{name}={value}" for name, value in config.macros)
        figures = ", ".join(f"{name} {cycles:.3g}" for name, cycles in self.choice.figures)
        pack = self.choice.pack
        return [
            *(("refused", f"{family}: {reason}") for family, reason in self.choice.refusals),
            ("kernel", f"{self.choice.family} with {macros}"),
            (
                "launch",
                f"{launch.grid} {'block' if launch.grid == 1 else 'blocks'} of {launch.block} threads, "
                f"{launch.shared_bytes} B of shared memory, {launch.index_bits}-bit offsets",
            ),
            *([("model", f"predicted cycles: {figures}")] if figures else []),
            *(
                [("packing", f"weights are packed first into a buffer of {_quantity(pack.num_bytes, 'B')}")]
                if pack
                else []
            ),
        ]


def explain(
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    device: Device | str | None = None,
    **settings: Any,
) -> Explanation:
    """Tell what `gpuconv.conv1d` or `gpuconv.conv_transpose1d` does with these arguments, without computing anything.

    Args:
        op: "conv1d" or "conv_transpose1d".
        input: (N, C_in, L_in) or (C_in, L_in): an array, or a `gpuconv.problem.ArraySpec(shape, dtype)` for one that
            need not exist and is taken to be freshly allocated.
        weight: (C_out, C_in/groups, K), for conv_transpose1d (C_in, C_out/groups, K).
        bias: (C_out,), or None.
        device: None for where the arrays are (NumPy: the CPU path; CuPy: their GPU), "cpu", an architecture such as
            "sm_90" for a typical GPU of it, or a `gpuconv.device.Device`. A GPU need not be there: NumPy arrays then
            stand for GPU arrays with the same strides and the same alignment.
        **settings: the settings of the operation by name: stride, padding, dilation, groups and so on.

    Returns:
        An `Explanation`; `print` it.

    Raises:
        ValueError: what the call itself would refuse; an unknown op or device; ArraySpecs without a device.
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
    if unknown := settings.keys() - set(SETTINGS[op]):
        raise TypeError(f"explain: {op} has the settings {', '.join(SETTINGS[op])}, got {', '.join(sorted(unknown))}")
    arrays = {"input": input, "weight": weight, "bias": bias}
    given: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None or name != "bias"}
    for name, array in given.items():
        if isinstance(array, ArraySpec):
            _check_extents(op, name, array)
    target = _device_of(op, given) if device is None else _parse_device(device)

    if "padding_mode" in settings:
        check_padding_mode(op, settings.pop("padding_mode"))
    construct = ConvProblem.conv_transpose1d if op == "conv_transpose1d" else ConvProblem.conv1d
    problem = construct(input, weight, bias, **settings)
    if target is None:
        swapped = (name for name, array in given.items() if not getattr(array.dtype, "isnative", True))
        return Explanation(problem, None, None, cpu.method(problem), tuple(swapped))
    layout, copies = dispatch.lay_out(problem, {name: _place(array) for name, array in given.items()})
    choice = dispatch.choose(problem, layout, target)
    return Explanation(problem, target, choice, None, copies if choice is not None else ())


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
    return None if device == "cpu" else Device.from_arch(device)


def _place(array: Any) -> dispatch.Place | None:
    if isinstance(array, ArraySpec):
        return None
    address = array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr
    return dispatch.Place(tuple(array.strides), int(address))


def _shapes(p: ConvProblem) -> dict[str, tuple[int, ...]]:
    shapes = {"input": p.input_shape, "weight": p.weight_shape, "bias": p.bias_shape, "output": p.output_shape}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _quantity(value: float, unit: str) -> str:
    """A value with three digits and a decimal prefix: 19300000000, "FLOP" gives "19.3 GFLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"
