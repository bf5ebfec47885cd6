"""The cost model of gpuconv.costs: its properties, and that the families' estimates are those of the machine code."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.layers import load
from bench.modes import DIRECTIONS, MODES, of_forward
from bench.static import predictions, sass
from bench.static.cudnn import predict_cudnn
from bench.static.predict import predict, predict_kernel
from gpuconv import dispatch
from gpuconv.costs import LAUNCH_US, Code, Ending, Unit, Work, predict_launch
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.dispatch import Choice
from gpuconv.families import Config, Layout, mma, mma_costs
from gpuconv.families.arithmetic import ARITHMETICS, Access
from gpuconv.families.mma_tiles import Tile, tiles
from gpuconv.families.passes import predict_pass
from gpuconv.problem import ConvProblem, Problem, WeightGradientProblem

H200 = Device.from_arch("sm_90")
TENSOR, CORES = Unit(1000.0, is_tensor=True), Unit(128.0)


def choose(problem: Problem, device: Device = H200) -> Choice:
    choice = dispatch.choose(problem, Layout.contiguous(problem), device)
    assert choice is not None
    return choice


works = st.builds(
    Work,
    multiply_adds=st.floats(0, 1e12),
    l2_bytes=st.floats(1, 1e10),
    dram_bytes=st.floats(1, 1e10),
    waits=st.floats(0, 1e5),
    ending=st.builds(Ending, st.floats(0, 1e9), st.floats(0, 1e9), st.just(0.0), st.floats(0, 1e9)),
)
codes = st.builds(Code, st.floats(1, 1e10), st.floats(0, 1e10), st.floats(0, 1e6))


@settings(max_examples=200)
@given(work=works, code=codes, blocks=st.integers(1, 10**5), resident=st.integers(1, 8), is_tensor=st.booleans())
def test_a_launch_takes_at_least_its_largest_part_and_at_most_all_of_them(
    work: Work, code: Code, blocks: int, resident: int, is_tensor: bool
) -> None:
    unit = TENSOR if is_tensor else CORES
    found = predict_launch(work, code, blocks=blocks, resident=resident, unit=unit, device=H200)
    parts = found.parts.values()
    assert LAUNCH_US + max(parts) * (1 - 1e-9) <= found.us <= LAUNCH_US + sum(parts) * (1 + 1e-9)
    assert found.parts[found.limit] == max(parts)
    assert (found.waves - 1) * H200.num_sms * resident < blocks <= found.waves * H200.num_sms * resident


@settings(max_examples=100)
@given(work=works, code=codes, blocks=st.integers(1, 10**4), resident=st.integers(1, 8))
def test_more_of_anything_takes_no_less_time(work: Work, code: Code, blocks: int, resident: int) -> None:
    def us(work: Work, code: Code, resident: int = resident) -> float:
        return predict_launch(work, code, blocks=blocks, resident=resident, unit=TENSOR, device=H200).us

    least = us(work, code) * (1 - 1e-9)
    for field in ("multiply_adds", "l2_bytes", "dram_bytes", "waits"):
        assert us(replace(work, **{field: 2 * getattr(work, field)}), code) >= least
    for field in code._fields:
        assert us(work, code._replace(**{field: 2 * getattr(code, field)})) >= least
    assert us(replace(work, ending=Ending(2e9, 2e9, 0.0, 2e9)), code) >= us(
        replace(work, ending=Ending(1e9, 1e9)), code
    )
    assert us(work, code, resident + 1) <= us(work, code) * (1 + 1e-9)


def test_what_blocks_do_at_their_ends_is_hidden_by_the_blocks_beside_them() -> None:
    work = Work(1e12, 1.0, dram_bytes=1.0, ending=Ending(instructions=3e8))
    code = Code(1.0, 0.0, 0.0)
    alone, shared = (
        predict_launch(work, code, blocks=13200, resident=n, unit=TENSOR, device=H200).us - LAUNCH_US for n in (1, 1000)
    )
    multiply, store = 1e12 / 132 / 1000 / 1.75e3, 3e8 / 132 / 4 / 1.75e3
    assert alone == pytest.approx(multiply + store)
    assert shared == pytest.approx((multiply**3 + store**3) ** (1 / 3), rel=0.02)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    groups = draw(st.sampled_from([1, 1, 1, 2, 64]))
    K, stride, dilation = draw(st.integers(1, 16)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 2, 9]))
    op = draw(st.sampled_from(["conv1d", "conv_transpose1d"]))
    mode = draw(st.sampled_from(MODES))
    p = ConvProblem(
        op,
        draw(st.integers(1, 20)),
        groups * draw(st.sampled_from([1, 3, 16, 64, 300, 1024])),
        groups * draw(st.sampled_from([1, 3, 16, 64, 300, 1024])),
        dilation * (K - 1) + draw(st.integers(1, 5000)),
        K,
        stride,
        dilation=dilation,
        groups=groups,
        dtype=mode.dtype,
        precision=mode.precision,
    )
    return of_forward(p, draw(st.sampled_from(DIRECTIONS)))


@settings(max_examples=150)
@given(problem=problems(), arch=st.sampled_from(tuple(ARCHITECTURES)))
def test_candidates_come_in_order_and_none_is_faster_than_a_launch(problem: Problem, arch: str) -> None:
    times = [us for _, us in choose(problem, Device.from_arch(arch)).plan.candidates]
    assert times == sorted(times)
    assert all(us > LAUNCH_US for us in times)


@settings(max_examples=150)
@given(problem=problems())
def test_a_larger_batch_takes_no_less_time(problem: Problem) -> None:
    one, several = choose(problem), choose(replace(problem, N=4 * problem.N))
    if one.family == several.family and one.plan.candidates:
        assert several.plan.candidates[0][1] >= 0.99 * one.plan.candidates[0][1]


def test_a_call_takes_the_time_of_its_steps() -> None:
    """Packing, segments in blocks of their own, and their sum."""
    problem = ConvProblem("conv1d", 1, 2048, 2048, 4, 5, 1, 2, 2, dtype="bfloat16")
    choice = dispatch.choose(problem, replace(Layout.contiguous(problem), is_prepared=True), H200)
    assert choice is not None
    pack, main, total = choice.plan.steps
    assert (pack.config.kernel, main, total.config.kernel) == ("pack_mma_weight", choice.step, "conv1d_mma")
    report = sass.report(choice.config, "sm_90")
    passes = [predict_pass(problem, step, H200).us for step in (pack, total)]
    alone = predict_kernel(problem, choice.launch, mma_costs.work(problem, main), report, H200).us
    assert min(*passes, alone) > LAUNCH_US
    assert predict(problem, choice, report, H200).us == pytest.approx(alone + sum(passes))
    raw = choose(problem)  # its blocks pack the weights, which are most of what such a layer reads
    assert [step.config.kernel for step in raw.plan.steps] == ["conv1d_mma", "conv1d_mma"]
    assert predict(problem, raw, sass.report(raw.config, "sm_90"), H200).us < 0.7 * (alone + sum(passes))


# (arithmetic, tile): the widest of each, those that layers choose most.
CODES = [
    (mode, tile)
    for mode in (("bfloat16", "float32"), ("float32", "tf32"), ("float32", "float32"))
    for tile in tiles(ARITHMETICS[mode])
    if (tile.block_m, tile.block_n) in ((128, 128), (128, 256), (64, 64)) and not tile.has_samples
]


def loop_of_copies(config: Config) -> list[str]:
    """The instructions of the loop that copies and does not multiply."""
    cubin = sass.compiled(config, "sm_90").cubin
    instructions = sass.parse_disassembly(sass.disassemble(cubin), config.kernel)
    loops = [[i.name for i in instructions[s.first : s.last + 1]] for s in sass.find_loops(instructions)]
    (found,) = [names for names in loops if "LDGSTS" in names and "HMMA" not in names]
    return found


@pytest.mark.parametrize(("mode", "tile"), CODES, ids=lambda x: str(x[0]) if isinstance(x, tuple) else x.block_m)
def test_estimates_of_tiles_are_those_of_the_machine_code(mode: tuple[str, str], tile: Tile) -> None:
    """Instructions of a stage and of staging: who changes the kernel changes the constants of the model."""
    a = ARITHMETICS[mode]
    config = mma.kernel_config("conv1d_mma", *mode, tile, 32, H200, phases_in_rows=False, segment_mode=0)
    report = sass.report(config, "sm_90")
    launch = mma_costs.TilesLaunch(
        a,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        0,
        0,
        tile.block_m,
        tile.block_n,
        tile.warps_m,
        tile.warps_n,
        False,
        False,
        0,
        Access.POSITION,
    )
    stage = launch.code().instructions / tile.warps
    assert stage == pytest.approx(report.loop.instructions, rel=0.1)
    for access, code in zip(Access, a.staging, strict=True):
        if code is None:
            continue
        config = mma.kernel_config(
            "conv1d_mma", *mode, tile, 32, H200, phases_in_rows=False, segment_mode=0, access=access
        )
        if access is Access.UNIT and a.itemsize == 2:
            copies = loop_of_copies(config)
            staged, instructions = copies.count("LDGSTS") * a.channels, len(copies)
        else:
            around = sass.report(config, "sm_90").around
            assert around is not None
            staged, instructions = tile.units_ahead(access) * a.channels * access.width, around.instructions
        assert code.task + code.element * staged == pytest.approx(instructions, rel=0.2)


def test_cudnn_by_hand() -> None:
    """16 bits: 450 TFLOP/s on an H100, three arrays transposed, a pass for the bias, 8 us."""
    device = replace(H200, name="H100")
    p = ConvProblem("conv1d", 16, 1280, 1280, 3000, 3, 2, 1, 1, has_bias=True, dtype="bfloat16")
    copied = 3350e3 * 0.79
    x, w, y = 2 * 16 * 1280 * 3000, 2 * 1280 * 1280 * 3, 2 * 16 * 1280 * 1500
    expected = p.flops() / 450e6 + 2 * (x + w + y) / copied + 2 + 2 * y / copied + 8
    assert predict_cudnn(p, device) == pytest.approx(expected, rel=0.01)
    assert predict_cudnn(replace(p, has_bias=False), device) == pytest.approx(expected - 2 - 2 * y / copied, rel=0.01)
    plain = replace(p, dtype="float32", has_bias=False)
    assert predict_cudnn(plain, device) == pytest.approx(8 + p.flops() / 42e6, rel=0.02)
    assert predict_cudnn(replace(plain, dtype="complex64"), device) is None
    gradient = WeightGradientProblem.of(replace(p, has_bias=False))
    assert predict_cudnn(gradient, device) == predict_cudnn(replace(p, has_bias=False), device)
    tf32 = replace(plain, precision="tf32")
    expected = p.flops() / 225e6 + 2 * (2 * x + 2 * y) / copied + 8
    assert predict_cudnn(tf32, device) == pytest.approx(expected, rel=0.01)
    one_tap = ConvProblem("conv1d", 16, 1280, 1280, 3000, 1, dtype="bfloat16")
    assert predict_cudnn(one_tap, device) == pytest.approx(8 + one_tap.flops() / 450e6, rel=0.01)


def test_losses_come_first_and_what_has_no_peer_last() -> None:
    layers = [layer for layer in load() if layer.name.startswith(("mamba_2p8b", "whisper_base", "hifigan_v1.up3"))]
    planned = predictions.plan(layers, [MODES[5], MODES[1]], H200)
    times = [predict(p.problem, p.choice, sass.report(p.choice.config, "sm_90"), H200) for p in planned]
    found = predictions.forecasts(planned, times, H200)
    ratios = [f.ratio for f in found]
    known = [ratio for ratio in ratios if ratio is not None]
    assert known == sorted(known)
    assert ratios[len(known) :] == [None] * (len(ratios) - len(known))
    assert None in ratios


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_every_step_of_every_plan_has_a_time(mode: str) -> None:
    """Steps at the edges, too, which a padding mode adds to plans."""
    plain = ConvProblem("conv1d", 2, 64, 64, 1000, 3, padding_left=1, padding_right=1)
    for problem in (plain, replace(plain, padding_mode=mode), replace(plain, padding_mode=mode, dtype="float64")):
        for p in (problem, problem.adjoint()):
            choice = choose(p)
            for step in choice.plan.steps:
                if step is not choice.step:
                    assert predict_pass(p, step, H200).us > LAUNCH_US
