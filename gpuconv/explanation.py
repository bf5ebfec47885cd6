"""What `gpuconv.explain` returns: an `Explanation`, as a page of text or as plain values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from . import cpu, dispatch, fft
from .costs import clock_under_load
from .device import Device
from .dtypes import FORMATS, INTEGERS
from .families import Launch
from .families.base import ACTIVATED
from .fusion import RESIDUAL
from .lengths import Samples
from .problem import BiasGradientProblem, ConvProblem, Op, WeightGradientProblem
from .tasks import SIGNATURES
from .text import WIDTH, count, duration, quantity, wrap, wrap_rows

Direction: TypeAlias = Literal["forward", "grad_input", "grad_weight", "grad_bias"]

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
            "sums": self._sums(choice),
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
            ("sums", self._sums(choice)),
            ("kernel", f"{choice.family} with {macros}"),
            ("launch", _launch_words(choice.launch)),
        ]
        if choice.staging:
            loads = (f"{self._name_of(array)} by {words}" for array, words in choice.staging.items())
            rows.append(("staging", f"{'; '.join(loads)} at a time"))
        own = choice.plan.steps.index(choice.step)
        for place, step in enumerate(choice.plan.steps):
            if place != own:
                words = f"{step.config.kernel}: {_launch_words(step.launch)}"
                rows.append(("before" if place < own else "after", words))
        if self.prepared is not None:
            packing = self.prepared.plan.steps[0].config.kernel
            rows.append(("prepared", f"with a weight of gpuconv.prepare, {packing} runs once, not in each call"))
        if choice.plan.scratch:
            buffers = (f"{name} ({quantity(num_bytes, 'B')})" for name, num_bytes in choice.plan.scratch)
            rows.append(("buffers", ", ".join(buffers)))
        if choice.plan.candidates:
            rows.append(("model", self._candidates_text(choice.plan.candidates)))
        return rows

    def _sums(self, choice: dispatch.Choice) -> str:
        """Which units of the GPU sum products of which format, and in which dtype."""
        dtype, macros = self.problem.dtype, dict(choice.config.macros)
        accumulator = FORMATS[dtype].accumulator
        if "MULTIPLY_MATRICES" in macros:  # the macro of all families on tensor cores
            tf32 = "split TF32" if macros.get("IS_SPLIT") == "1" else "TF32"
            return f"on tensor cores, of {tf32 if dtype == 'float32' else dtype} products, in {accumulator}"
        if isinstance(self.problem, BiasGradientProblem):
            return f"on CUDA cores, in {accumulator}"
        return f"on CUDA cores, {'exact' if dtype in INTEGERS else 'by fused multiply-adds'}, in {accumulator}"

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
