"""What a call would do, without doing it: `explain` and the `Explanation` that it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from . import cpu, dispatch, fft, runtime
from .arguments import check_int, check_padding_mode
from .calls import are_real_taps, check_real_taps
from .costs import clock_under_load
from .device import ARCHITECTURES, Device
from .dtypes import real_dtype
from .families import Launch
from .families.base import ACTIVATED, contiguous_strides
from .fusion import FUSED_ARRAYS, RESIDUAL, Fused
from .interchange import view
from .lengths import Samples, follows_length
from .memory import address, check_kinds
from .problem import ArrayLike, ArraySpec, BiasGradientProblem, ConvProblem, Op, WeightGradientProblem
from .tasks import OPTIONAL, SIGNATURES
from .text import WIDTH, count, duration, quantity, wrap, wrap_rows

__all__ = ["Explanation", "explain"]

Direction: TypeAlias = Literal["forward", "grad_input", "grad_weight", "grad_bias"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_weight", "grad_bias")

SETTINGS: Mapping[Op, tuple[str, ...]] = {
    "conv1d": (
        "stride", "padding", "dilation", "groups", "padding_mode", "input_activation", "residual", "activation",
        "lengths", "precision", "algorithm", "out_dtype",
    ),
    "conv_transpose1d": (
        "stride", "padding", "output_padding", "groups", "dilation", "output_size", "padding_mode", "input_activation",
        "residual", "activation", "lengths", "precision", "algorithm", "out_dtype",
    ),
}  # fmt: skip


MAX_CANDIDATES = 8  # the most that a page shows
_BAR = 12  # columns of the longest bar


class Call(NamedTuple):
    """The arguments of a call that its problem, its device and its lengths do not tell.

    Attributes:
        op: "conv1d" or "conv_transpose1d".
        direction: "forward", or which gradient of the operation is explained.
        algorithm: as given.
        padding: (left, right); "same" where it follows from the length of each sample.
        layouts: those of the arrays that do not lie as newly allocated ones do, with the names of the arrays.
    """

    op: Op
    direction: Direction
    algorithm: str | None
    padding: tuple[int, int] | str
    layouts: tuple[tuple[str, ArgumentLayout], ...]


class ArgumentLayout(NamedTuple):
    """How an array lies in memory.

    Attributes:
        strides: in bytes, one for each axis.
        offset: of the first element behind a multiple of 16 bytes, in bytes.
        is_native: whether the byte order is that of this machine.
    """

    strides: tuple[int, ...]
    offset: int
    is_native: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one call does and what it costs. `str` and `page` give a short page, `to_dict` the same for JSON.

    Attributes:
        call: the arguments that the other attributes do not tell.
        problem: the call with every setting resolved: extents, paddings, L_out. For the gradient with respect to the
            input it is the other operation with the same weight.
        device: the GPU that runs it; None on the CPU path.
        choice: the kernel family, its launches and buffers, and the preferred families that refused; None on the CPU
            path, through the FFT, and where the result is empty or zero and nothing is launched.
        method: how the CPU path computes it; None on a GPU, through the FFT, and for a bias gradient.
        copies: the arrays that are copied first, because the kernels (or NumPy) cannot read them in place.
        parts: how often the call computes `problem`: twice for real taps on complex data, whose real and imaginary part
            are computed one after the other.
        by_fft: how the FFT computes it; None for direct sums.
        costs: predicted from the layer alone, of direct sums and of the FFT; None unless the algorithm is "fft" or
            "auto", and where the FFT cannot compute the problem.
        samples: the lengths of the samples, where the call gives them.
        runs: the number of calls on neighbouring samples of one length; 1 where one call computes all samples.
        prepared: what runs with a weight that `gpuconv.prepare` made, if it differs from `choice`: its first step packs
            the weight once; without it, the blocks of each call pack the weight themselves.

    Example:
        >>> import gpuconv
        >>> from gpuconv.problem import ArraySpec
        >>> x, w = ArraySpec((8, 512, 3000), "float16"), ArraySpec((512, 512, 3), "float16")
        >>> found = gpuconv.explain("conv1d", x, w, padding="same", device="sm_90")
        >>> found.choice.family, found.flops, found.copies
        ('conv1d_mma', 37748736000, ())
    """

    call: Call
    problem: ConvProblem | WeightGradientProblem | BiasGradientProblem
    device: Device | None
    choice: dispatch.Choice | None
    method: cpu.Method | None
    copies: tuple[str, ...]
    parts: int = 1
    samples: Samples | None = None
    runs: int = 1
    by_fft: fft.Plan | None = None
    costs: fft.Costs | None = None
    prepared: dispatch.Choice | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two (as eight for complex data), padding included.

        Through the FFT those of the transforms and of the products of spectra.
        """
        return self.parts * (self.problem.flops() if self.by_fft is None else self.by_fft.flops())

    @property
    def bytes(self) -> int:
        """The fewest bytes that must move: every input read once, the result written once."""
        return self.parts * self.problem.bytes()

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: `flops` per byte of `bytes`; 0 where nothing moves."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays of the call by name, the result last."""
        p = self.problem
        if isinstance(p, ConvProblem):
            shapes = {**p.shapes, "input": p.input_shape, "output": p.output_shape}
            return {**shapes, RESIDUAL: p.output_shape} if p.fuses.has_residual else shapes
        if isinstance(p, BiasGradientProblem):
            return p.shapes
        names = _names_of_operands(p)
        return {names.get(operand, operand): shape for operand, shape in p.shapes.items()}

    @property
    def fused(self) -> dict[str, int | None]:
        """What is fused, with the bytes that a separate pass would read and write.

        The bytes are None on the CPU, where they stay in the caches if a sample fits.
        """
        p = self.problem
        if not isinstance(p, ConvProblem) or not p.fusion:
            return {}
        f, of_input, of_output = p.fusion, math.prod(p.input_shape), math.prod(p.output_shape)
        is_loaded = self.choice is None or all(ACTIVATED not in step.arrays for step in self.choice.plan.steps)
        elements: dict[str, int] = {}  # those that a separate pass would read and write
        if f.input_activation is not None:
            elements[f"{f.input_activation} of the input"] = of_input if is_loaded else 0
        if f.has_residual:
            elements["residual"] = of_output
        if f.activation is not None:
            elements[str(f.activation)] = of_output
        return {words: None if self.device is None else 2 * n * p.itemsize for words, n in elements.items()}

    @property
    def copy_bytes(self) -> int:
        """The memory that the copies take, in bytes."""
        return sum(math.prod(self.shapes[name]) for name in self.copies) * self.problem.itemsize

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain values for `json.dumps`. Times are predictions of the cost model.

        They tell all arguments on which the explanation depends, so that `explain` can be called with them again.
        """
        problem: dict[str, Any] = dataclasses.asdict(self.problem)
        problem.update((f"{name}_shape", list(shape)) for name, shape in self.shapes.items())
        padding = self.call.padding
        layouts = {name: {**found._asdict(), "strides": list(found.strides)} for name, found in self.call.layouts}
        return {
            **self.call._asdict(),
            "padding": padding if isinstance(padding, str) else list(padding),
            "layouts": layouts,
            "problem": problem,
            "device": {"name": "CPU"} if self.device is None else dataclasses.asdict(self.device),
            "flops": self.flops,
            "bytes": self.bytes,
            "intensity": self.intensity,
            "fused": self.fused,
            "parts": self.parts,
            "lengths": None if self.samples is None else self.samples.L_in.tolist(),
            "output_lengths": None if self.samples is None else self.samples.L_out.tolist(),
            "runs": self.runs,
            "copies": list(self.copies),
            "copy_bytes": self.copy_bytes,
            "method": None if self.method is None else dataclasses.asdict(self.method),
            "kernel": None if self.choice is None else self._kernel_dict(self.choice),
            "kernel_of_prepared_weight": None if self.prepared is None else self._kernel_dict(self.prepared),
            "fft": None if self.by_fft is None else self._fft_dict(self.by_fft),
            "costs": None if self.costs is None else self.costs._asdict(),
        }

    def _fft_dict(self, plan: fft.Plan) -> dict[str, Any]:
        overlap = plan.overlap
        return {
            "block": overlap.block,
            "results_of_a_block": overlap.new,
            "blocks": plan.problem.N * overlap.rows * overlap.blocks,
            "blocks_at_a_time": plan.batch,
            "workspace_bytes": plan.workspace_bytes,
            "prepared_bytes": fft.kept_bytes(plan, self.device),
        }

    def _kernel_dict(self, choice: dispatch.Choice) -> dict[str, Any]:
        steps: list[dict[str, Any]] = [
            {
                "kernel": step.config.kernel,
                "macros": dict(step.config.macros),
                "launch": {**dataclasses.asdict(step.launch), "params": dict(step.launch.params)},
                "arrays": list(step.arrays),
            }
            for step in choice.plan.steps
        ]
        own = steps[choice.plan.steps.index(choice.step)]
        return {
            "family": choice.family,
            "macros": own["macros"],
            "launch": own["launch"],
            "refusals": [{"family": family, "reason": reason} for family, reason in choice.refusals],
            "staging": {self._name_of(array): words for array, words in choice.staging.items()},
            "candidates": [{"configuration": name, "predicted_us": us} for name, us in choice.plan.candidates],
            "steps": steps,
            "scratch": dict(choice.plan.scratch),
        }

    def page(self, width: int = WIDTH) -> str:
        """The facts as text, in lines of at most `width` columns."""
        p = self.problem
        rows = [(name, str(shape)) for name, shape in self.shapes.items()]
        rows[0] = (rows[0][0], f"{rows[0][1]} {p.dtype}")
        if (of_result := p.dtype_of(rows[-1][0])) != p.dtype:
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {of_result}")
        title = "gradient of the bias"
        if not isinstance(p, BiasGradientProblem):
            padding = str(p.padding) if isinstance(p, ConvProblem) else f"{p.padding_left} on the left"
            settings = f"stride {p.stride}, padding {padding}, dilation {p.dilation}, groups {p.groups}"
            if isinstance(p, ConvProblem) and p.output_padding:
                settings += f", output_padding {p.output_padding}"
            if p.padding_mode != "zeros":
                settings += f", padding_mode {p.padding_mode}"
            if p.precision != "float32":
                settings += f", precision {p.precision}"
            if self.call.algorithm is not None:
                settings += f", algorithm {self.call.algorithm}"
            title = p.op if isinstance(p, ConvProblem) else f"gradient of {p.op}'s weight"
            if self.call.direction == "grad_input":
                title = f"gradient of {self.call.op}'s input"
                rows = [(self._name_of(name), shape) for name, shape in rows]
                settings = f"{p.op}, {settings}"  # the operation that computes it
            rows.append(("settings", settings))
        if self.parts > 1:
            rows.append(("parts", "the real and the imaginary part of the data, one after the other"))
        if self.samples is not None:
            rows.append(("lengths", self._lengths_text(self.samples)))
        if self.device is None:
            where = "the CPU, through NumPy"
            if self.method is not None:
                rows.append(("method", f"{self.method.name}: {self.method.reason}"))
                rows.append(("workspace", f"at most {quantity(self.method.workspace_bytes, 'B')}"))
        else:
            where = f"{self.device.name} ({self.device.arch_name})"
            if self.by_fft is None:
                rows += self._kernel_rows()
        if self.by_fft is not None:
            rows += _fft_rows(self.by_fft, self.device)
        if self.costs is not None:
            costs = f"direct {duration(self.costs.direct_us)}, FFT {duration(self.costs.fft_us)}"
            sample = f"one sample of {count(self.costs.blocks, 'block')}, whatever N and L are"
            rows.append(("costs", f"{costs}: predicted for {sample}"))
        if self.fused:
            saved = {w: "" if n is None else f" ({quantity(n, 'B')} saved)" for w, n in self.fused.items()}
            words = [f"{what}{num_bytes}" for what, num_bytes in saved.items()]
            rows.append(("fused", ", ".join(words)))
        direct = self.parts * p.flops()
        instead = "" if self.by_fft is None else f" in place of {quantity(direct, 'FLOP')} of direct sums"
        work = f"{quantity(self.flops, 'FLOP')}{instead}, at least {quantity(self.bytes, 'B')} moved"
        rows.append(("work", f"{work}, {quantity(self.intensity, 'FLOP/B')}"))
        copies = f"{', '.join(self.copies)} ({quantity(self.copy_bytes, 'B')})" if self.copies else "none"
        rows.append(("copies", copies))
        return "\n".join([*wrap(f"{title} on {where}", width), *wrap_rows(rows, width, indent="  ")])

    def __str__(self) -> str:
        return self.page()

    def _kernel_rows(self) -> list[tuple[str, str]]:
        choice = self.choice
        if choice is None:
            if isinstance(self.problem, ConvProblem):
                return [("kernel", "none: the output is empty, so nothing is launched")]
            return [("kernel", "none: an array is empty, so the gradient is zero")]
        macros = ", ".join(f"{name}={value}" for name, value in choice.config.macros)
        rows = [
            *(("refused", f"{family}: {reason}") for family, reason in choice.refusals),
            ("kernel", f"{choice.family} with {macros}"),
            ("launch", _launch_words(choice.launch)),
        ]
        if choice.staging:
            loads = (f"{self._name_of(array)} by {words}" for array, words in choice.staging.items())
            rows.append(("staging", f"{', '.join(loads)} at a time"))
        own = choice.plan.steps.index(choice.step)
        for place, step in enumerate(choice.plan.steps):
            if place != own:
                words = f"{step.config.kernel}: {_launch_words(step.launch)}"
                rows.append(("before" if place < own else "after", words))
        if self.prepared is not None:
            packing = self.prepared.plan.steps[0].config.kernel
            rows.append(("prepared", f"{packing} packs a weight of gpuconv.prepare once"))
        if choice.plan.scratch:
            buffers = (f"{name} ({quantity(num_bytes, 'B')})" for name, num_bytes in choice.plan.scratch)
            rows.append(("buffers", ", ".join(buffers)))
        if choice.plan.candidates:
            rows.append(("model", self._candidates_text(choice.plan.candidates)))
        return rows

    def _name_of(self, operand: str) -> str:
        """The name of the argument for an array of the problem."""
        p = self.problem
        if self.call.direction == "grad_input":
            return {"input": "grad_output", "output": "grad_input"}.get(operand, operand)
        return _names_of_operands(p).get(operand, operand) if isinstance(p, WeightGradientProblem) else operand

    def _lengths_text(self, samples: Samples) -> str:
        L_in = samples.L_in
        words = f"{count(len(L_in), 'sample')} of {L_in.min(initial=0)} to {L_in.max(initial=0)} positions"
        if self.runs != 1:
            return f"{words}, in {self.runs} calls on views of neighbours of one length"
        if self.device is None or self.choice is None:
            return words
        return f"{words}, which kernels read from a table of {quantity(24 * len(L_in), 'B')} written anew by each call"

    def _candidates_text(self, candidates: Sequence[tuple[str, float]]) -> str:
        """The configurations that the cost model compared, each with its predicted time and a bar of that length."""
        assert self.device is not None
        longest = max(us for _, us in candidates[:MAX_CANDIDATES])
        lines = [f"predicted, not measured, at {clock_under_load(self.device):.3g} GHz:"]
        for name, us in candidates[:MAX_CANDIDATES]:
            bar = "#" * max(1, round(_BAR * us / longest))
            # A tab marks the column at which a long name continues on its next line.
            lines.append(f"{f'{us:.0f}' if us >= 100 else f'{us:.3g}':>7} us  {bar:<{_BAR}}  \t{name}")
        if len(candidates) > MAX_CANDIDATES:
            lines.append(f"and {count(len(candidates) - MAX_CANDIDATES, 'slower one')}")
        lines[1] += " (chosen)"
        return "\n".join(lines)


def _names_of_operands(problem: WeightGradientProblem) -> dict[str, str]:
    """The names of the arguments for the arrays of a weight gradient."""
    signature = SIGNATURES[f"{problem.op}_weight"]
    return dict(zip(signature.operands, signature.arrays, strict=True))


def _fft_rows(plan: fft.Plan, device: Device | None) -> list[tuple[str, str]]:
    overlap = plan.overlap
    number = count(plan.problem.N * overlap.rows * overlap.blocks, "block")
    batches = f"in batches of {plan.batch}" if plan.on_gpu else f"at most {plan.batch} at a time"
    words = f"{number} of {overlap.block} samples for {count(overlap.new, 'result')} each, {batches}"
    kept = f"{quantity(plan.workspace_bytes, 'B')}"
    if isinstance(plan.problem, ConvProblem):
        kept += f"; a prepared weight keeps {quantity(fft.kept_bytes(plan, device), 'B')}"
    return [("fft", words), ("workspace", kept)]


def _launch_words(launch: Launch) -> str:
    return (
        f"{count(launch.grid, 'block')} of {count(launch.block, 'thread')}, "
        f"{launch.shared_bytes} B of shared memory, {launch.index_bits}-bit offsets"
    )


def explain(
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    direction: Direction = "forward",
    device: Device | str | None = None,
    **settings: Any,
) -> Explanation:
    """Tell what `gpuconv.conv1d` or `gpuconv.conv_transpose1d` does with these arguments, without computing anything.

    Args:
        op: "conv1d" or "conv_transpose1d".
        input: (N, C_in, L_in) or (C_in, L_in): an array, or a `gpuconv.problem.ArraySpec(shape, dtype)` for one that
            need not exist and counts as newly allocated.
        weight: (C_out, C_in/groups, K), for conv_transpose1d (C_in, C_out/groups, K).
        bias: (C_out,), or None.
        direction: "forward", or the gradient of this call to explain: "grad_input", "grad_weight" or "grad_bias". The
            output's gradient and the result count as newly allocated.
        device: None for where the arrays are (NumPy: the CPU path; CuPy: their GPU), "cpu", an architecture such as
            "sm_90" for a typical GPU of it, or a `gpuconv.device.Device`. No GPU is needed: NumPy arrays can stand for
            GPU arrays with the same strides and the same alignment.
        **settings: the settings of the operation by name: stride, padding, dilation, groups, algorithm and so on. An
            `ArraySpec` may stand for the residual, and for the arrays of snake.

    Returns:
        An `Explanation`; `print` it.

    Raises:
        ValueError: the call itself would raise it; an unknown op, direction or device; ArraySpecs without a device; the
            gradient of an input without positions, or of what is fused.
        TypeError: the call itself would raise it; a setting that the operation does not have.
        RuntimeError: the arrays are CuPy arrays but no GPU answers.

    Example:
        >>> import gpuconv
        >>> from gpuconv.problem import ArraySpec
        >>> x, w = ArraySpec((8, 512, 3000), "float16"), ArraySpec((512, 512, 3), "float16")
        >>> gpuconv.explain("conv1d", x, w, stride=2, padding=1, device="sm_90").problem.L_out
        1500
    """
    if not isinstance(op, str) or op not in SETTINGS:
        raise ValueError(f'explain: op must be one of "conv1d" and "conv_transpose1d", got {op!r}')
    if direction not in DIRECTIONS:
        raise ValueError(f"explain: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if unknown := settings.keys() - set(SETTINGS[op]):
        raise TypeError(f"explain: {op} has the settings {', '.join(SETTINGS[op])}, got {', '.join(sorted(unknown))}")
    fused = Fused.take(op, settings)
    arrays = {"input": input, "weight": weight, "bias": bias, **dict(zip(FUSED_ARRAYS, fused.arrays, strict=True))}
    given: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None or name not in OPTIONAL}
    for name, array in given.items():
        if isinstance(array, ArraySpec):
            _check_extents(op, name, array)
        elif isinstance(array, list | tuple):
            is_shape = all(isinstance(extent, int) for extent in array)
            hint = f'; a shape becomes gpuconv.problem.ArraySpec({tuple(array)!r}, "float32")' if is_shape else ""
            raise TypeError(f"explain: {name} must be an array or an ArraySpec, got {type(array).__name__}{hint}")
        else:
            given[name] = view(op, name, array)
    data, weight = given["input"], given["weight"]
    target = _device_of(op, given) if device is None else _parse_device(device)
    layouts = tuple((name, found) for name, array in given.items() if (found := _layout_of(array)) is not None)

    if op == "conv_transpose1d":
        check_padding_mode(op, op, settings.pop("padding_mode", "zeros"))
    algorithm, lengths = settings.pop("algorithm", None), settings.pop("lengths", None)
    function = op if direction == "forward" else f"{op}_{direction.removeprefix('grad_')}"
    dispatch.check_algorithm("explain", SIGNATURES[function].kind, algorithm)
    by_parts = are_real_taps(weight, data)
    if by_parts and direction == "grad_bias":  # a bias is as complex as the data, whatever the taps are
        by_parts, weight = False, ArraySpec(tuple(weight.shape), data.dtype)
    if by_parts:
        check_real_taps(op, given, fused.fusion)
        given = {name: array if name == "weight" else _RealPart.of(array) for name, array in given.items()}
    p = ConvProblem.of(op, given["input"], weight, given.get("bias"), **settings)
    p = p.fused(Fused(fused.fusion, tuple(map(given.get, FUSED_ARRAYS))))
    problem: ConvProblem | WeightGradientProblem | BiasGradientProblem = p
    if direction != "forward" and p.out_dtype is not None:
        raise TypeError(f'explain: {p.dtype} data have no gradients, expected direction "forward"')
    if direction == "grad_input":
        if p.L_in == 0:
            raise ValueError("explain: input has no positions, so it has no gradient")
        problem = p.adjoint()
    elif direction == "grad_weight":
        problem = WeightGradientProblem.of(p)
    elif direction == "grad_bias":
        problem = BiasGradientProblem.of(p)
    padding = settings.get("padding", 0)
    follows = lengths is not None and follows_length(p, padding)
    call = Call(op, direction, algorithm, "same" if follows else p.padding, layouts)
    if lengths is not None and direction == "grad_weight":
        algorithm = dispatch.of_sums_over_lengths(function, algorithm)
    plan, costs = fft.choose(problem, algorithm, target), None
    if algorithm in dispatch.BY_FFT and fft.refusal(problem) is None:
        costs = fft.costs(problem, target)
    samples, runs = None, 1
    if lengths is not None:
        samples = Samples.of(op, p, padding, lengths)
        is_sum = direction in ("grad_weight", "grad_bias")
        if target is None or plan is not None or (follows and not is_sum):
            runs = len(list(samples.runs()))
        else:
            problem = replace(problem, has_lengths=True)
    if problem.is_empty:
        plan = None
    # The output's gradient counts as newly allocated, and so does the conjugate of a weight, which is a copy.
    operands = dict(zip(SIGNATURES[function].arrays, SIGNATURES[function].operands, strict=True))
    operands = {array: operand for array, operand in operands.items() if array in given}
    more = (1 + by_parts, samples, runs, plan, costs)
    conjugated = ("weight",) if direction == "grad_input" and p.is_complex and plan is None else ()
    if target is None:
        swapped = [name for name in operands if not getattr(given[name].dtype, "isnative", True)]
        method = None
        if plan is not None:
            pass
        elif isinstance(problem, ConvProblem):
            method = cpu.method(problem)
        elif isinstance(problem, WeightGradientProblem):
            method = cpu.weight_gradient.method(problem)
        return Explanation(call, problem, None, None, method, tuple(dict.fromkeys((*conjugated, *swapped))), *more)
    if problem.is_empty:
        return Explanation(call, problem, target, None, None, (), *more)
    pointers = {operand: _pointer(given[array]) for array, operand in operands.items() if array not in conjugated}
    if by_parts:  # the other arrays are parts of fresh complex ones
        for name, shape in problem.shapes.items():
            if name not in pointers and name != "grad_weight":
                fresh = ArraySpec(shape, np.result_type(given["input"].dtype, np.complex64))
                pointers[name] = _pointer(_RealPart.of(fresh))
    layout, copies = dispatch.lay_out(problem, pointers)
    arrays_of = {operand: array for array, operand in operands.items()}
    copies = (*(arrays_of[operand] for operand in copies), *conjugated)
    choice = prepared = None
    if plan is None:
        choice = dispatch.choose(problem, layout, target, algorithm)
        prepared = dispatch.choose(problem, dataclasses.replace(layout, is_prepared=True), target, algorithm)
    return Explanation(call, problem, target, choice, None, copies, *more, None if prepared == choice else prepared)


class _RealPart(NamedTuple):
    """Where the real part of a complex array lies, in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]
    address: int

    @classmethod
    def of(cls, array: Any) -> _RealPart:
        dtype = np.dtype(array.dtype)
        real = np.dtype(real_dtype(dtype.name)).newbyteorder(dtype.byteorder)
        if (pointer := _pointer(array)) is None:
            strides = tuple(stride * dtype.itemsize for stride in contiguous_strides(array.shape))
            return cls(tuple(array.shape), real, strides, 0)
        return cls(tuple(array.shape), real, pointer.strides, pointer.address)


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


def _layout_of(array: Any) -> ArgumentLayout | None:
    """The layout of an array; None for one that does not exist or lies as a newly allocated one."""
    if array is None or isinstance(array, ArraySpec):
        return None
    fresh = tuple(stride * array.dtype.itemsize for stride in contiguous_strides(array.shape))
    layout = ArgumentLayout(tuple(array.strides), address(array) % 16, bool(array.dtype.isnative))
    return None if layout == (fresh, 0, True) else layout


def _pointer(array: Any) -> dispatch.StridedPointer | None:
    if isinstance(array, ArraySpec):
        return None
    if isinstance(array, _RealPart):
        return dispatch.StridedPointer(array.strides, array.address)
    return dispatch.StridedPointer(tuple(array.strides), address(array))
