"""What the gradient families share: the cut of the sum over samples and positions into slices, and adding the slices.

Contract: cuda_src/slices.cuh, cuda_src/sum_slices.cu.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..costs import Code, Ending, Prediction, Work, cuda_cores, predict_launch
from ..device import Device
from ..problem import BiasGradientProblem, WeightGradientProblem
from .base import PARTIAL, Config, Launch, Layout, Plan, Step, base_config, round_up, with_padding_mode
from .offsets import Overhang, index_bits

SUM_BLOCK_SIZE = 256

# The most memory for the partial sums of a call.
MAX_PARTIAL_BYTES = 64 * 2**20
# Terms of a slice, if that gives enough sums: each partial sum costs a write and a read.
_SLICE_TERMS = 512
# With fewer terms a partial sum does not pay.
_FEWEST_TERMS = 64
# Partial sums that keep a GPU busy: a thread holds 64 of them in kernels for many channels, 8 in others.
_ENOUGH_SUMS, _ENOUGH_SUMS_OF_FEW_CHANNELS = 2**22, 2**20
# The same for tensor cores: twice as many sums as the registers of an H200 hold at a time.
_ENOUGH_SUMS_OF_TENSOR_CORES = 2**23
_FEW_CHANNELS = 4
# Positions of a channel that a block of the bias gradient adds.
_BIAS_SLICE_TERMS = 4096
# Slices begin at multiples of so many positions, so that the slices of aligned rows are aligned.
_ALIGNED_POSITIONS = 32
# Threads share the slices of a result only if each adds at least so many.
_SLICES_OF_A_WAY = 8
_MOST_WAYS = 32


@dataclass(frozen=True, slots=True)
class Slices:
    """How N samples of L positions are cut: into pieces of each sample, or groups of whole samples.

    The cut, and so the order of summation, depends on the problem alone: not on the GPU, nor on how arrays lie.

    Attributes:
        count: the number of slices.
        samples: samples of a slice; 1 where samples are cut.
        positions: positions of each of them.
        pieces: slices along one sample.
    """

    count: int
    samples: int
    positions: int
    pieces: int

    @classmethod
    def of(cls, problem: WeightGradientProblem | BiasGradientProblem) -> Slices:
        """The cut for CUDA cores."""
        p = problem
        if not isinstance(p, WeightGradientProblem):
            return cls._cut(p, -(-p.N * p.L // _BIAS_SLICE_TERMS))
        terms = p.N * p.L_coarse
        is_narrow = min(p.C_coarse_g, p.C_fine_g) <= _FEW_CHANNELS
        enough = -(-(_ENOUGH_SUMS_OF_FEW_CHANNELS if is_narrow else _ENOUGH_SUMS) // _num_results(p))
        return cls._cut(p, min(max(enough, -(-terms // _SLICE_TERMS)), -(-terms // _FEWEST_TERMS)))

    @classmethod
    def of_tensor_cores(cls, problem: WeightGradientProblem) -> tuple[Slices, ...]:
        """Cuts among which a cost model decides. The first is by rule: partial sums must have many terms to pay."""
        terms = problem.N * problem.L_coarse
        enough = -(-_ENOUGH_SUMS_OF_TENSOR_CORES // _num_results(problem))
        by_rule = min(enough, -(-terms // _SLICE_TERMS))
        doubled = (2**i for i in range(min(enough, -(-terms // _FEWEST_TERMS)).bit_length()))
        return tuple(dict.fromkeys(cls._cut(problem, wanted) for wanted in (by_rule, *doubled)))

    @classmethod
    def _cut(cls, p: WeightGradientProblem | BiasGradientProblem, wanted: int) -> Slices:
        """About so many slices."""
        length = p.L_coarse if isinstance(p, WeightGradientProblem) else p.L
        most = max(1, MAX_PARTIAL_BYTES // (_num_results(p) * p.format.accumulator_bytes))
        wanted = max(1, min(wanted, most))
        if wanted <= p.N:
            samples = p.N // wanted
            if -(-p.N // samples) > most:
                samples = -(-p.N // most)
            samples = -(-p.N // -(-p.N // samples))  # as many slices of about the same length
            return cls(-(-p.N // samples), samples, length, 1)
        pieces = min(-(-wanted // p.N), most // p.N)
        positions = round_up(-(-length // pieces), _ALIGNED_POSITIONS)
        if positions >= length:
            return cls(p.N, 1, length, 1)
        pieces = -(-length // positions)
        return cls(p.N * pieces, 1, positions, pieces)

    def partial_bytes(self, problem: WeightGradientProblem | BiasGradientProblem) -> int:
        """The memory of the partial sums; none where there is one slice."""
        return _partial_bytes(problem, self.count)

    def overhang(self, *, samples: int = 1, channels: int = 1, positions: int = 0, taps: int = 0) -> Overhang:
        """The overhang of a kernel whose slices are filled up to aligned positions and may pass an axis by a step."""
        return Overhang(samples, channels, channels, max(positions, _ALIGNED_POSITIONS), taps)

    def params(self) -> dict[str, int]:
        """The fields of Params that `find_slice` of slices.cuh reads."""
        return {"slice_samples": self.samples, "slice_positions": self.positions, "slice_pieces": self.pieces}


# Of the cost model for sum_slices: instructions of an addition (bench.static, sm_90); assumed cycles from one addition
# to the next, with several loads in flight, and from the first load to the last store.
_SUM_INSTRUCTIONS = 3
_SUM_CYCLES, _SUM_LATENCY_CYCLES = 100.0, 2000.0


def _num_results(problem: WeightGradientProblem | BiasGradientProblem) -> int:
    return math.prod(problem.shapes[problem.result])


def _partial_bytes(problem: WeightGradientProblem | BiasGradientProblem, count: int) -> int:
    return count * _num_results(problem) * problem.format.accumulator_bytes if count > 1 else 0


def weight_fields(problem: WeightGradientProblem, layout: Layout, slices: Slices) -> dict[str, int]:
    """The values that the Params of a weight gradient's kernels may have, by name."""
    p = problem
    fields = {
        "N": p.N,
        "L_coarse": p.L_coarse,
        "L_fine": p.L_fine,
        "K": p.K,
        "C_coarse": p.C_coarse,
        "C_coarse_g": p.C_coarse_g,
        "C_fine_g": p.C_fine_g,
        "groups": p.groups,
        "stride": p.stride,
        "padding_left": p.padding_left,
        "dilation": p.dilation,
        "is_conjugated": int(p.conjugate_coarse),
        **slices.params(),
    }
    for name, array, axes in (("coarse", "coarse", "ncl"), ("fine", "fine", "ncl"), ("weight", "grad_weight", "rck")):
        fields.update(zip((f"{name}_stride_{axis}" for axis in axes), layout[array].strides, strict=True))
    fields["weight_offset"] = layout["grad_weight"].offset
    return fields


def sums_work(problem: WeightGradientProblem, step: Step, held: int) -> Work:
    """The work of a kernel whose threads hold `held` sums, unused ones included."""
    params = dict(step.launch.params)
    count = -(-params["N"] // params["slice_samples"]) * params["slice_pieces"]
    waste = held / (count * _num_results(problem))
    num_bytes = problem.bytes() + _partial_bytes(problem, count)
    return Work(problem.flops() / 2 * waste, num_bytes, dram_bytes=num_bytes)


def sliced_plan(
    problem: WeightGradientProblem | BiasGradientProblem,
    layout: Layout,
    slices: Slices,
    config: Config,
    launch: Launch,
    candidates: tuple[tuple[str, float], ...] = (),
) -> Plan:
    """The plan of a gradient kernel, followed by sum_slices if there are several slices.

    The kernel takes its inputs, the partial sums (null where there is one slice) and the result (null where there are
    several).
    """
    *inputs, result = problem.shapes
    if isinstance(problem, WeightGradientProblem):
        config = with_padding_mode(config, problem.padding_mode)
    if slices.count == 1:
        return Plan((Step(config, launch, (*inputs, None, result)),), candidates=candidates)
    total = Step(*sum_launch(problem, layout, slices), (PARTIAL, result))
    scratch = ((PARTIAL, slices.partial_bytes(problem)),)
    return Plan((Step(config, launch, (*inputs, PARTIAL, None)), total), scratch, candidates)


def _ways(count: int) -> int:
    """Threads that share the slices of one result."""
    ways = 1
    while ways < _MOST_WAYS and count >= 2 * ways * _SLICES_OF_A_WAY:
        ways *= 2
    return ways


def sum_launch(
    problem: WeightGradientProblem | BiasGradientProblem, layout: Layout, slices: Slices | None = None
) -> tuple[Config, Launch]:
    """The specialisation and the launch of sum_slices, for `Slices.of` the problem unless others are given."""
    slices = slices or Slices.of(problem)
    name = problem.result
    shape, num_results = problem.shapes[name], _num_results(problem)
    ways = _ways(slices.count)
    extents = (*shape, 1, 1)
    strides = (*layout[name].strides, 0, 0)
    conjugated = isinstance(problem, WeightGradientProblem) and problem.conjugate_coarse
    params = {
        "num_results": num_results,
        "slices": slices.count,
        "ways": ways,
        "extent_1": extents[1],
        "extent_2": extents[2],
        "is_conjugated": int(conjugated),
        "result_offset": layout[name].offset,
        "result_stride_0": strides[0],
        "result_stride_1": strides[1],
        "result_stride_2": strides[2],
    }
    bits = index_bits(problem, layout, Overhang(arrays=(name,)), (slices.count + ways) * num_results + SUM_BLOCK_SIZE)
    grid = -(-num_results * ways // SUM_BLOCK_SIZE)
    shared = SUM_BLOCK_SIZE * problem.format.accumulator_bytes if ways > 1 else 0
    return sum_config(problem.dtype, bits), Launch(grid, SUM_BLOCK_SIZE, shared, bits, tuple(params.items()))


def predict_sum(problem: WeightGradientProblem | BiasGradientProblem, count: int, device: Device) -> Prediction:
    """The time of the launch that adds `count` slices."""
    p, results = problem, _num_results(problem)
    additions, ways = count * results, _ways(count)
    read, stored = additions * p.format.accumulator_bytes, results * p.itemsize
    work = Work(
        multiply_adds=0.0,
        l2_bytes=read + stored,
        dram_bytes=read + stored,
        waits=_SUM_LATENCY_CYCLES,
        ending=Ending(0.0, 0.0, stored),
    )
    return predict_launch(
        work,
        Code(additions / 32 * _SUM_INSTRUCTIONS, additions / 32, count / ways * _SUM_CYCLES),
        blocks=-(-results * ways // SUM_BLOCK_SIZE),
        resident=8,
        unit=cuda_cores(device, p.format.accumulator_bytes),
        device=device,
    )


def predict_pass(problem: WeightGradientProblem | BiasGradientProblem, step: Step, device: Device) -> Prediction:
    """The time of the step that adds the slices."""
    return predict_sum(problem, dict(step.launch.params)["slices"], device)


def sum_config(dtype: str, bits: int) -> Config:
    return base_config("sum_slices", dtype, bits, SUM_BLOCK_SIZE)
