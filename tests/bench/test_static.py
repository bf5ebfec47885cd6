"""The static reports: parsers on stored text, the model on hand-computed figures, and the committed baseline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu_report import wgmma
from bench.layers import load, published_ceilings
from bench.modes import DIRECTIONS, MODES
from bench.speed import micro
from bench.static import __main__ as static
from bench.static import predictions, sass
from bench.static.predict import predict, predict_kernel
from bench.static.sass import Instruction, KernelReport, Resources
from gpuconv import dispatch
from gpuconv.costs import LAUNCH_US, RATES, Prediction, Work, blocks_per_sm, rates_of
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import Config, Launch, Layout, Step
from gpuconv.families.base import Family
from gpuconv.families.passes import predict_pass
from gpuconv.problem import ConvProblem, WeightGradientProblem
from tests.plans import FORWARD_FAMILIES, kernel_of, plan_of

LOG = """\
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function 'other' for 'sm_90'
ptxas info    : Function properties for other
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compile time = 1.250 ms
ptxas info    : Compiling entry function 'tile' for 'sm_90'
ptxas info    : Function properties for tile
ptxas         .     48 bytes stack frame, 20 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 48 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 42.746 ms
"""


def disassembly(*lines: str) -> str:
    """What nvdisasm -json prints of a kernel "tile" with these instructions, "OPCODE operands" each."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        row: dict[str, Any] = {"opcode": opcode}
        if predicate:
            row["predicate"] = predicate
        if operands:
            row["operands"] = operands
        if opcode == "BRA":
            row["other-attributes"] = {"control-flow": "True"}
        rows.append(row)
    header = {"ELF": {"layout-id": 4}, "SM": {"version": {"major": 9, "minor": 0}}, "Producer": "nvdisasm"}
    functions = [
        {"function-name": "other", "start": 0, "length": 16, "sass-instructions": [{"opcode": "EXIT"}]},
        {"function-name": "tile", "start": 128, "length": 16 * len(rows), "sass-instructions": rows},
    ]
    return json.dumps([header, functions])


# Two nested loops and the branch to itself at the end. The inner one holds two dependent multiply-adds and one that
# is not, the outer one a fourth; `FFMA R9,-RZ,RZ,1` is how the assembler may write a move.
NESTED = (
    "S2R R0,SR_TID.X",
    "IMAD.MOV.U32 R4,RZ,RZ,RZ",
    "LDG.E.128.CONSTANT R8,desc[UR4][R2.64]",  # 0x20: outer loop
    "LDS.64 R12,[R20]",  # 0x30: inner loop
    "FFMA.FTZ R4,R12,R8,R4",
    "FFMA R4,R13,R9,R4",
    "FFMA R5,R13,R9,R5",
    "FFMA R9,-RZ,RZ,1",
    "@!P0 BRA 0x30",
    "FFMA R5,R4,R5,R5",
    "STG.E.U16 desc[UR4][R2.64],R5",
    "@!P1 BRA 0x20",
    "EXIT",
    "BRA 0xd0",
)


def test_log_of_the_right_kernel_is_read() -> None:
    assert sass.parse_log(LOG, "tile") == Resources(168, 48, 20, 36, 1024)
    assert sass.parse_log(LOG, "other") == Resources(8, 0, 0, 0, 0)
    older = """ptxas info    : Compiling entry function 'kernel' for 'sm_80'
ptxas info    : Function properties for kernel
    72 bytes stack frame, 64 bytes spill stores, 68 bytes spill loads
ptxas info    : Used 255 registers, 8 bytes smem, 456 bytes cmem[0]
"""
    assert sass.parse_log(older, "kernel") == Resources(255, 72, 64, 68, 8)


def test_log_without_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="does not mention 'missing'"):
        sass.parse_log(LOG, "missing")
    with pytest.raises(ValueError, match="no count of registers or of local memory for 'tile'"):
        sass.parse_log("Compiling entry function 'tile' for 'sm_90'\n", "tile")


def test_disassembly_is_read() -> None:
    instructions = sass.parse_disassembly(disassembly(*NESTED), "tile")
    assert [i.opcode for i in instructions] == [
        line.removeprefix("@!P0 ").removeprefix("@!P1 ").split()[0] for line in NESTED
    ]
    assert [i.target for i in instructions if i.name == "BRA"] == [0x30, 0x20, 0xD0]
    with pytest.raises(ValueError, match="does not contain 'missing'"):
        sass.parse_disassembly(disassembly(*NESTED), "missing")


def test_loops_are_found_with_their_depth() -> None:
    loops = sass.find_loops(sass.parse_disassembly(disassembly(*NESTED), "tile"))
    assert [(s.first, s.last, s.depth) for s in loops] == [(2, 11, 1), (3, 8, 2)]


def test_backward_branches_to_one_place_are_one_loop() -> None:
    code = sass.parse_disassembly(
        disassembly("NOP", "FFMA R1,R2,R3,R1", "@P0 BRA 0x10", "NOP", "@P1 BRA 0x10", "EXIT"), "tile"
    )
    assert [(s.first, s.last, s.depth) for s in sass.find_loops(code)] == [(1, 4, 1)]


def test_main_loop_is_the_innermost_that_computes() -> None:
    loop, around = sass.main_loop(sass.parse_disassembly(disassembly(*NESTED), "tile"))
    assert (loop.depth, loop.instructions, loop.useful, loop.fma) == (2, 6, 3, 96)
    assert loop.mix == {"fma": 3, "shared load": 1, "address": 1, "control": 1}
    assert loop.accesses == {"shared load 8 B": 1}
    assert loop.wavefronts == 2
    assert loop.chain == 2  # the third multiply-add needs neither of the others
    assert loop.useful_share == 0.5
    assert around is not None
    assert (around.depth, around.instructions, around.useful) == (1, 4, 1)
    assert around.accesses == {"global load 16 B": 1, "global store 2 B": 1}


def test_of_branches_around_the_main_loop_the_one_taken_counts() -> None:
    """The wide load in place of the two narrow ones and of none; not what only a rare case visits, nor its loop."""
    code = (
        "ISETP P0,R1",  # 0x00: outer loop
        "@P1 BRA 0x90",  # no load at all
        "@P0 BRA 0x80",
        "LDG.E.64 R2,[R4]",  # 0x30: half of the bytes at a time
        "IADD3 R4,R4,R5",
        "IADD3 R4,R4,R5",
        "LDG.E.64 R6,[R4]",
        "BRA 0x90",
        "LDG.E.128 R2,[R4]",  # 0x80
        "FFMA R9,R2,R3,R9",  # 0x90: inner loop
        "@!P0 BRA 0x90",
        "@!P2 BRA 0xe0",
        "MOV R7,R8",  # 0xc0: a loop for a rare case
        "@P3 BRA 0xc0",
        "STS.128 [R6],R2",  # 0xe0
        "@!P4 BRA P5,0x0",
        "EXIT",
        "BRA 0x110",
    )
    loop, around = sass.main_loop(sass.parse_disassembly(disassembly(*code), "tile"))
    assert (loop.instructions, loop.fma) == (2, 32)
    assert around is not None
    assert around.accesses == {"global load 16 B": 1, "shared store 16 B": 1}
    assert around.instructions == 7


def test_kernel_without_a_useful_loop_counts_as_a_whole() -> None:
    unrolled = ("S2R R0,SR_TID.X", "LDG.E R1,[R2]", "FFMA R3,R1,R1,R3", "@P0 BRA 0x10", "FFMA R4,R1,R1,R3", "EXIT")
    loop, around = sass.main_loop(sass.parse_disassembly(disassembly(*unrolled), "tile"))
    assert loop.depth == 1
    assert around is None
    straight = sass.parse_disassembly(disassembly("LDG.E R1,[R2]", "FFMA R3,R1,R1,R3", "EXIT"), "tile")
    loop, around = sass.main_loop(straight)
    assert (loop.depth, loop.instructions, loop.useful) == (0, 3, 1)


def test_staging_loop_inside_does_not_hide_the_work() -> None:
    code = [
        "LDS R4,[R1]",
        "STS [R1],R2",
        "LDG.E R2,[R3]",
        "@P0 BRA 0x10",
        *["FFMA R4,R5,R6,R4"] * 8,
        "@P1 BRA 0x0",
        "EXIT",
    ]
    loop, _ = sass.main_loop(sass.parse_disassembly(disassembly(*code), "tile"))
    assert (loop.depth, loop.useful, loop.instructions) == (1, 8, 10)


@pytest.mark.parametrize(
    ("opcode", "category", "fma", "width"),
    [
        ("FFMA.FTZ", "fma", 32, 4),
        ("DFMA", "fma", 32, 4),
        ("HFMA2.BF16_V2", "fma", 64, 4),
        ("HMMA.16816.F32.BF16", "tensor", 16 * 8 * 16, 4),
        ("HMMA.1688.F32.TF32", "tensor", 16 * 8 * 8, 4),
        ("HGMMA.64x256x16.F32.BF16", "tensor", 64 * 256 * 16 // 4, 4),
        ("LDG.E.128.CONSTANT", "global load", 0, 16),
        ("LDG.E.U16.CONSTANT", "global load", 0, 2),
        ("STG.E.64", "global store", 0, 8),
        ("LDS.128", "shared load", 0, 16),
        ("LDSM.16.M88.4", "shared matrix load", 0, 16),
        ("LDGSTS.E.BYPASS.128", "asynchronous copy", 0, 16),
        ("LDL.LU", "local", 0, 4),
        ("IMAD.WIDE", "address", 0, 4),
        ("F2FP.BF16.F32.PACK_AB", "conversion", 0, 4),
        ("BAR.SYNC.DEFER_BLOCKING", "control", 0, 4),
    ],
)
def test_instructions_are_classified(opcode: str, category: str, fma: int, width: int) -> None:
    instruction = Instruction(opcode, "R1,R2,R3,R4")
    assert (instruction.category, instruction.fma) == (category, fma)
    if category not in ("fma", "tensor"):
        assert instruction.width == width


H200 = Device.from_arch("sm_90")


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [
        (32, 256, 0, 8),  # 2048 threads
        (64, 256, 0, 4),  # 1024 threads by registers
        (72, 256, 0, 3),  # 9 * 256 registers a warp: 7 warps in each quarter, 28 in all
        (128, 256, 0, 2),
        (255, 256, 0, 1),
        (32, 32, 0, 32),  # blocks
        (32, 128, 100 * 1024, 2),  # 228 KiB of shared memory, 1 KiB of each block reserved
        (32, 128, 227 * 1024, 1),
        (32, 128, 228 * 1024, 0),
    ],
)
def test_blocks_per_multiprocessor(registers: int, threads: int, shared: int, expected: int) -> None:
    assert blocks_per_sm(registers, threads, shared, H200) == expected


def test_every_architecture_has_rates() -> None:
    assert set(RATES) == set(ARCHITECTURES)
    for arch, known in ((87, "sm_86"), (91, "sm_90"), (103, "sm_100"), (121, "sm_120"), (70, "sm_75")):
        assert rates_of(replace(H200, arch=arch)) == RATES[known]


def test_product_decides_the_bandwidth() -> None:
    assert rates_of(replace(H200, name="NVIDIA H100 80GB HBM3")).dram_gbps == 3350
    assert rates_of(replace(H200, name="NVIDIA H200")).dram_gbps == 4800


def test_published_ceilings_of_the_h200() -> None:
    ceilings = published_ceilings(H200)
    assert ceilings.bytes_per_second == pytest.approx(0.9 * 4.8e12)
    assert ceilings.flops_per_second["float32"] == pytest.approx(66.9e12, rel=0.01)
    assert ceilings.flops_per_second["bfloat16"] == pytest.approx(16 * 66.9e12, rel=0.01)
    assert ceilings.flops_per_second["tf32"] == ceilings.flops_per_second["bfloat16"] / 2


def test_a_chunk_of_a_register_tile_is_one_loop() -> None:
    inner = sass.Loop(2, 50, {"fma": 40, "control": 1}, {"shared load 16 B": 4}, 40 * 32, 40, 4, 16)
    outer = sass.Loop(1, 20, {"asynchronous copy": 2, "control": 3}, {"asynchronous copy 4 B": 2}, 0, 0, 0, 2)
    tiled = Config.of("tile", {"BLOCK_R": 16, "UNROLL_R": 8})
    chunk, around = sass.whole_chunk(tiled, inner, outer)
    assert around is None
    assert chunk == sass.Loop(
        1, 120, {"fma": 80, "control": 5, "asynchronous copy": 2}, {"shared load 16 B": 8, "asynchronous copy 4 B": 2},
        80 * 32, 80, 8, 34,
    )  # fmt: skip
    assert sass.whole_chunk(tiled, inner, None) == (inner, None)
    assert sass.whole_chunk(Config("other", ()), inner, outer) == (inner, outer)


def test_dense_tiles_keep_their_targets() -> None:
    """float32, 128 by 128 on sm_90: two blocks of 256 threads fit, and 88 of 100 instructions of a chunk multiply."""
    for family, problem in (
        ("conv1d_tiled", ConvProblem("conv1d", 8, 256, 256, 4096, 3, padding_left=1, padding_right=1)),
        ("conv1d_tiled", ConvProblem("conv1d", 8, 256, 256, 4096, 3, 2)),
        ("conv_transpose1d_phases", ConvProblem("conv_transpose1d", 8, 256, 256, 4096, 16, 8, 4, 4)),
    ):
        (tiled,) = (f for f in FORWARD_FAMILIES if f.name == family)
        config, _ = kernel_of(tiled, problem, Layout.contiguous(problem), H200)
        macros = dict(config.macros)
        assert (macros["BLOCK_M"], macros["BLOCK_N"]) == ("128", "128")
        assert int(macros["COLUMN_STEP"]) > 0
        report = sass.report(config, "sm_90")
        assert report.resources.registers <= 128
        assert not report.uses_local_memory
        assert report.loop.useful == 8 * 8 * int(macros["BLOCK_R"])
        assert report.loop.useful_share >= 0.88


def tile_report(**loop: Any) -> KernelReport:
    """A kernel "tile" of 32 registers whose loop has 100 instructions, 80 of them useful, on 10 chains."""
    main = sass.Loop(1, 100, {"fma": 80}, {}, 80 * 32, 80, 8, 0)
    return KernelReport(
        Config("tile", ()), "sm_90", Resources(32, 0, 0, 0, 0), 1.0, 200, 0, replace(main, **loop), None
    )


def tile_time(problem: ConvProblem, grid: int, report: KernelReport, work: Work | None = None) -> Prediction:
    """What `grid` blocks of 256 threads take on an H200; without waste where no work is given."""
    work = work or Work(problem.flops() / 2, problem.bytes())
    return predict_kernel(problem, Launch(grid, 256, 0, 32, ()), work, report, H200)


def norm(*parts: float) -> float:
    return sum(part**3 for part in parts) ** (1 / 3)


def test_issue_bound_prediction_by_hand() -> None:
    problem = ConvProblem("conv1d", 16, 256, 256, 4096, 3, padding_left=1, padding_right=1)
    grid = 132 * 64
    p = tile_time(problem, grid, tile_report())
    # 80 of 100 issue slots do useful work: 1.25 instructions per warp-wide multiply-add.
    seconds = 1.25 * problem.flops() / 2 / 32 / (132 * 4 * 1.75e9)
    assert p.parts["issue"] == pytest.approx(1e6 * seconds)
    assert p.limit == "issue"
    # Multiply-adds are among the instructions, and what memory delivers comes through L2.
    assert p.parts["math"] == pytest.approx(0.8 * p.parts["issue"])
    assert p.parts["dram"] == pytest.approx(problem.bytes() / (4800e3 * 0.9))
    memory = max(p.parts["dram"], p.parts["l2"])
    assert p.us == pytest.approx(LAUNCH_US + norm(p.parts["issue"], memory, p.parts["latency"]))
    assert (p.blocks_per_sm, p.waves) == (8, 8)


def test_one_block_too_many_costs_a_round() -> None:
    problem = ConvProblem("conv1d", 16, 256, 256, 4096, 3)
    full = tile_time(problem, 132, tile_report())
    over = tile_time(problem, 133, tile_report())
    assert over.parts["issue"] == pytest.approx(2 * 132 / 133 * full.parts["issue"])


def test_depthwise_prediction_is_bound_by_memory() -> None:
    problem = ConvProblem("conv1d", 8, 4096, 4096, 4096, 4, padding_left=3, groups=4096, dtype="bfloat16")
    p = tile_time(problem, 132 * 640, tile_report())
    assert p.limit == "dram"
    floor = 2 * 2 * 8 * 4096 * 4096 / (4800e3 * 0.9)
    assert p.parts["dram"] == pytest.approx(floor, rel=1e-3)
    assert floor < p.us - LAUNCH_US < 1.1 * floor


def test_tensor_instructions_run_at_the_tensor_rate() -> None:
    problem = ConvProblem("conv1d", 16, 256, 256, 4096, 3, dtype="bfloat16")
    tensor = tile_report(mix={"tensor": 80}, fma=80 * 2048)
    p = tile_time(problem, 132 * 64, tensor)
    rate = RATES["sm_90"].mma_share * 132 * 2048 * 1.75e9
    assert p.parts["math"] == pytest.approx(1e6 * problem.flops() / 2 / rate)


def test_tiles_that_hang_over_cost_their_whole_size() -> None:
    problem = ConvProblem("conv1d", 1, 64, 100, 1000, 3)  # 100 * 998 outputs in 8 tiles of 128 * 128
    step = Step(Config.of("tile", {"BLOCK_M": 128, "BLOCK_N": 128}), Launch(8, 256, 0, 32, ()), ())
    for family in (family for family in FORWARD_FAMILIES if type(family).work is Family.work):
        work = family.work(problem, step)
        assert work.multiply_adds == pytest.approx(8 * 128 * 128 / (100 * 998) * problem.flops() / 2)
    padded, plain = tile_time(problem, 8, tile_report(), work), tile_time(problem, 8, tile_report())
    assert padded.parts["issue"] == pytest.approx(8 * 128 * 128 / (100 * 998) * plain.parts["issue"])


def test_what_a_family_says_of_its_kernel_counts() -> None:
    """Loads that are hidden, warps that only load, and what is staged around the main loop."""
    problem = ConvProblem("conv1d", 16, 256, 256, 4096, 3)
    report = tile_report(wavefronts=10, accesses={"global load 4 B": 10})
    passes = problem.flops() / 2 / (80 * 32)
    work = Work(problem.flops() / 2, 2.0 * problem.bytes(), 132 * 8, 0.5, 132 * 4e6, 132 * 3e6)
    p = tile_time(problem, 132, report, work)
    assert p.parts["latency"] == pytest.approx(passes / (132 * 8) * (0.5 * 250 + 4 * 8) / 1.75e3)
    shared = tile_time(problem, 132, tile_report(wavefronts=10, accesses={"shared load 4 B": 10}), work)
    assert shared.parts["latency"] == pytest.approx(passes / (132 * 8) * (0.5 * 30 + 4 * 8) / 1.75e3)
    assert p.parts["issue"] == pytest.approx((100 * passes / 132 + 4e6) / 4 / 1.75e3)
    assert p.parts["load/store"] == pytest.approx((10 * passes / 132 + 3e6) / 1.75e3)
    assert p.parts["l2"] == pytest.approx(2 * problem.bytes() / 132 / 24 / 1.75e3)


def test_block_that_does_not_fit_is_refused() -> None:
    report = replace(tile_report(), resources=Resources(32, 0, 0, 0, 229 * 1024))
    with pytest.raises(ValueError, match="does not fit H200"):
        tile_time(ConvProblem("conv1d", 1, 8, 8, 64, 3), 1, report)


def test_base_kernels_are_predicted_from_their_taps() -> None:
    """Short kernels never enter the unrolled loop: what runs is the code around it."""
    loop = sass.Loop(3, 130, {"fma": 16}, {}, 16 * 32, 16, 16, 32)
    around = sass.Loop(2, 190, {"fma": 15}, {}, 15 * 32, 15, 15, 30)
    report = replace(tile_report(), loop=loop, around=around)
    (direct,) = (family for family in FORWARD_FAMILIES if family.name == "conv1d_direct")
    for taps, per_tap in ((3, 190 / 15), (32, 130 / 16)):
        problem = ConvProblem("conv1d", 8, 64, 64, 4096, taps)
        step = plan_of(direct, problem, Layout.contiguous(problem), H200).steps[0]
        issue = tile_time(problem, 132 * 640, report, direct.work(problem, step)).parts["issue"]
        assert issue / (problem.flops() / 2) == pytest.approx(per_tap / 32 / (132 * 4 * 1.75e3))


def entry(**changes: Any) -> dict[str, Any]:
    share = changes.pop("useful_share", 0.90)
    return {
        "spill_bytes": 0, "stack_bytes": 0, "local_instructions": 0, "useful_share": share, **changes
    }  # fmt: skip


def test_equal_and_better_reports_are_no_regression() -> None:
    before = {"a": entry(), "b": entry(spill_bytes=16, useful_share=0.5)}
    assert static.regressions(before, before) == []
    assert static.regressions(before, {"a": entry(useful_share=0.95), "b": entry()}) == []


@pytest.mark.parametrize("field", ["spill_bytes", "stack_bytes", "local_instructions"])
def test_new_local_memory_is_a_regression(field: str) -> None:
    found = static.regressions({"a": entry()}, {"a": entry(**{field: 8})})
    assert len(found) == 1
    assert found[0].startswith("a: 8 ")


def test_local_memory_of_an_unknown_configuration_is_a_regression() -> None:
    assert static.regressions({}, {"new": entry()}) == []
    assert len(static.regressions({}, {"new": entry(stack_bytes=8)})) == 1


def test_useful_share_may_fall_by_three_points() -> None:
    assert static.regressions({"a": entry()}, {"a": entry(useful_share=0.871)}) == []
    assert "86.9 %" in static.regressions({"a": entry()}, {"a": entry(useful_share=0.869)})[0]


def test_committed_kernels_keep_to_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    """The check of `python -m bench.static --check`, on what the float32 layers need."""
    assert static.main(["--arch", "sm_90", "--modes", "float32", "--check"]) == 0, capsys.readouterr().out


def test_each_configuration_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    original = sass.compile_cubin

    def counted(text: str, kernel: str, arch: str) -> tuple[bytes, str, float]:
        compiled.append(text)
        return original(text, kernel, arch)

    monkeypatch.setattr(sass, "compile_cubin", counted)
    sass.report.cache_clear()
    sass.compiled.cache_clear()
    assert static.main(["--arch", "sm_80", "--modes", "float32", "--filter", "mamba|vocos|evo1"]) == 0
    assert len(compiled) == len(set(compiled)) >= 1


def test_report_is_written(tmp_path: Any) -> None:
    path = tmp_path / "static.json"
    assert static.main(["--arch", "sm_90", "--modes", "float32", "--filter", "mamba_2p8b", "--json", str(path)]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["predictions_us"]["float32"]["mamba_2p8b.conv_k4_b1"] > 0
    (kernel,) = document["kernels"].values()
    assert kernel["registers"] > 0
    assert kernel["useful_share"] > 0


def test_unknown_mode_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        static.main(["--modes", "float33"])
    assert exit_.value.code == 2
    assert "unknown mode float33" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_micro_kernels_compile(arch: str) -> None:
    cubin, log, _ = sass.compile_cubin(micro.SOURCE.read_text(encoding="utf-8"), "micro", arch)
    names = ["copy_16_bytes", "copy_2_bytes", "read_l2", "nothing", "fma_rate"]
    names += ["mma_bf16_rate", "mma_tf32_rate"] if arch != "sm_75" else []
    for name in names:
        assert sass.parse_log(log, name).stack_bytes == 0
    text = sass.disassemble(cubin)
    loop, _ = sass.main_loop(sass.parse_disassembly(text, "fma_rate"))
    assert loop.useful == micro.FMA_PER_ROUND
    assert loop.useful_share > 0.95
    if arch != "sm_75":
        for name, fma in (("mma_bf16_rate", 16 * 8 * 16), ("mma_tf32_rate", 16 * 8 * 8)):
            loop, _ = sass.main_loop(sass.parse_disassembly(text, name))
            assert loop.mix["tensor"] % micro.TILES == 0
            assert loop.fma == fma * loop.mix["tensor"]


def test_wgmma_probe_runs_on_wgmma_alone() -> None:
    """One product after the other, without a wait between them, sums in registers, and the right numbers to expect."""
    code, log = wgmma.build()
    resources = sass.parse_log(log, wgmma.KERNEL)
    assert resources.stack_bytes == 0
    assert "serializ" not in log
    loop, _ = sass.main_loop(sass.parse_disassembly(sass.disassemble(code), wgmma.KERNEL))
    assert loop.mix["tensor"] == wgmma.TAPS * wgmma.CHANNELS // 16
    weight, window = wgmma.data()
    by_definition = sum(weight[k, 7] @ window[:, 200 + 5 * k] for k in range(wgmma.TAPS))
    assert wgmma.expected(weight, window, 5, 2)[7, 200] == 2 * by_definition
    given = wgmma.units(window)
    assert given.shape == (wgmma.CHANNELS // 8, wgmma.WINDOW, 8)
    assert given[3, 11, 5] == np.float32(window[29, 11]).view(np.uint32) >> 16


def test_planned_layers_are_placed_by_dispatch() -> None:
    layers = [layer for layer in load() if layer.name == "convtasnet.pw_128to512"]
    (planned,) = predictions.plan(layers, [MODES[0]], H200)
    problem = layers[0].problem("float32")
    assert planned.choice == dispatch.choose(problem, Layout.contiguous(problem), H200)


def test_gradients_are_reported_like_the_forward_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "static.json"
    options = ["--modes", "float32", "--filter", "mamba_2p8b", "--directions", "grad_input,grad_weight"]
    assert static.main([*options, "--json", str(path)]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    assert set(document["predictions_us"]) == {"float32 grad_input", "float32 grad_weight"}
    kernels = {key.partition(" ")[0] for key in document["kernels"]}
    assert kernels == {"conv_transpose1d_depthwise", "weight_gradient_pairs", "sum_slices"}
    with pytest.raises(SystemExit):
        static.main(["--directions", "backward"])
    assert "unknown pass backward" in capsys.readouterr().err


def test_a_gradient_also_writes_and_reads_the_sums_of_its_slices() -> None:
    problem = WeightGradientProblem("conv1d", 32, 512, 512, 1500, 1530, 31, groups=512)
    choice = dispatch.choose(problem, Layout.contiguous(problem), H200)
    assert choice is not None
    partial = choice.plan.scratch_bytes("partial")
    assert partial > 0
    p = predict(problem, choice, tile_report(fma=96 * 32), H200)
    alone = replace(choice, plan=replace(choice.plan, steps=choice.plan.steps[:1]))
    first = predict(problem, alone, tile_report(fma=96 * 32), H200)
    assert p.us - first.us == pytest.approx(predict_pass(problem, choice.plan.steps[1], H200).us)
    assert p.us - first.us > LAUNCH_US + partial / (4800e3 * 0.9)
    assert p.parts["dram"] == pytest.approx((problem.bytes() + partial) / (4800e3 * 0.9))
    # 31 taps are 32 of the threads' four times eight.
    assert p.parts["math"] == pytest.approx(1e6 * problem.flops() / 2 * 32 / 31 / (132 * 128 * 1.75e9), rel=0.05)


def test_every_mode_has_every_direction() -> None:
    layers = [layer for layer in load() if layer.name.startswith("mamba_2p8b")]
    tf32 = [mode for mode in MODES if mode.name == "tf32"]
    assert [p.direction for p in predictions.plan(layers, tf32, H200, DIRECTIONS)] == list(DIRECTIONS)
