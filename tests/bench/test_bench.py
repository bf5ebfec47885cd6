"""The benchmark harness: how it measures, on a clock that passes when somebody works; what it believes and says."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench.layers import Ceilings, load
from bench.modes import MODES, SUBSET
from bench.speed import plot, results, schedule, tables
from bench.speed.check import Verdict
from bench.speed.measure import Absent, Buffers, Case, Deadlines, Method, Refused, Subject, measure, sets_for
from bench.speed.results import Measurement, Outcome, RunResult, Timing, Unmeasured
from bench.speed.schedule import Budget, by_information, quick
from bench.static import predictions
from gpuconv.problem import ConvProblem

LAYERS = {layer.name: layer for layer in load()}
FLOAT32 = MODES[0]
CEILINGS = Ceilings("fake", 1e12, dict.fromkeys(("float32", "tf32", "bfloat16", "float16", "float64"), 1e13))


def case_of(name: str) -> Case:
    return Case(LAYERS[name], FLOAT32, 1)


CASE = case_of("vocos.dwconv_k7_b1")


RIGHT = Verdict(True, 1e-8)


@dataclass
class FakeEngine:
    """Implementations take `call_us` a call, half of it in a graph, of a clock; the log has the sets they were given.

    `runners` are the arguments of one implementation each, or why there is none.
    """

    runners: Sequence[dict[str, Any] | Exception]
    sets: int = 4
    estimate: float = 1.0
    now: float = 0.0
    log: list[tuple[str, int]] = field(default_factory=list)
    ceilings: Ceilings = CEILINGS

    @contextlib.contextmanager
    def open(self, case: Case) -> Iterator[Buffers]:
        names = [runner["name"] if isinstance(runner, dict) else "peer" for runner in self.runners]
        subjects = [Subject(n, partial(self.prepare, r)) for n, r in zip(names, self.runners, strict=True)]
        yield Buffers(self.sets, 1000, subjects)

    def prepare(self, arguments: dict[str, Any] | Exception) -> Any:
        if isinstance(arguments, Exception):
            raise arguments

        def works(name: str, call_us: float = 100.0, result: Verdict = RIGHT, fails_in: str = "") -> Any:
            def take(where: str, indices: Sequence[int], factor: float) -> None:
                fail(where)
                for index in indices:
                    self.log.append((name, index))
                    self.now += factor * call_us

            def fail(where: str) -> Any:
                if fails_in == where:
                    raise RuntimeError(f"broken in {where}")

            return types.SimpleNamespace(
                call=lambda index: take("call", [index], 1e-6),
                capture=lambda indices: fail("capture") or partial(take, "replay", indices, 0.5e-6),
                verdict=lambda: fail("verdict") or result,
                context=contextlib.nullcontext,
                release=lambda: None,
            )

        return works(**arguments)

    def elapsed(self, work: Callable[[], None]) -> float:
        start = self.now
        work()
        return 1e6 * (self.now - start)

    def sample(self, work: Callable[[], None]) -> list[float]:
        self.log.append(("sample", -1))
        return [self.elapsed(work)]

    def family(self, problem: ConvProblem) -> str:
        return "fake_family"

    def estimate_seconds(self, case: Case, repeats: int) -> float:
        return self.estimate

    def measure(self, *more: Any, case: Case = CASE) -> Measurement:
        method, *deadlines = more or [Method()]
        return measure(case, self, method, lambda: self.now, *deadlines)  # type: ignore[arg-type]


def engine_with(*runners: Any, **settings: Any) -> FakeEngine:
    return FakeEngine([{"name": "gpuconv"}, *runners], **settings)


EAGER = Method(kinds=("eager",))


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage before every sample would be most of what these tests do."""
    monkeypatch.setattr("gpuconv.measure.gc", types.SimpleNamespace(collect=int, disable=int, enable=int))


def test_measured_times_are_those_of_the_clock() -> None:
    m = engine_with({"name": "peer", "call_us": 250.0}).measure()
    assert m.ours.eager == Timing(*[pytest.approx(100)] * 3, 30)
    assert m.ours.replay == Timing(*[pytest.approx(50)] * 3, 30)
    assert m.ratio() == pytest.approx(2.5)
    assert m.our_us == pytest.approx(50)  # graph replay stands for the layer
    assert (m.family, m.floor_limit) == ("fake_family", "memory")
    assert m.floor_us == pytest.approx(1e6 * CASE.problem.bytes() / 1e12)
    assert m.label == CASE.layer.name
    assert engine_with().measure(case=case_of("hyena.longconv_kL1024")).label == "hyena.longconv_kL1024 N=1"


def test_wrong_kernel_gets_no_figure_and_is_never_timed() -> None:
    wrong = {"name": "gpuconv", "result": Verdict(False, 0.5, "one element off")}
    engine = FakeEngine([wrong, {"name": "peer"}])
    m = engine.measure()
    assert (m.ours.status, m.ours.note, m.ours.replay, m.ours.eager) == ("wrong", "one element off", None, None)
    assert (m.ours.error, m.our_us, m.ratio()) == (0.5, None, None)
    assert "gpuconv" not in {name for name, _ in engine.log}
    assert m.outcomes[1].status == "measured"


@pytest.mark.parametrize(
    ("peer", "status", "note"),
    [
        *(({"name": "peer", "fails_in": w}, "failed", f"broken in {w}") for w in ("verdict", "capture", "call")),
        (Absent("not installed"), "absent", "not installed"),
        (Refused("not this one"), "refused", "not this one"),
        ({"name": "peer", "call_us": 1.0, "result": Verdict(False, math.inf, "NaN")}, "wrong", "NaN"),
    ],
)
def test_peer_without_a_figure_is_reported_and_stops_no_other(peer: Any, status: str, note: str) -> None:
    m = engine_with(peer, {"name": "slow"}).measure()
    assert m.ours.status == "measured"
    assert m.outcomes[1].status == status
    assert note in m.outcomes[1].note
    assert m.outcomes[1].replay is m.outcomes[1].eager is None
    assert m.best_peer() == m.outcomes[2]


def test_samples_are_taken_in_turn() -> None:
    engine = FakeEngine([{"name": name, "call_us": 2000.0} for name in ("gpuconv", "a", "b")])
    engine.measure(EAGER)
    logged = [name for name, _ in engine.log][-6 * 30 :]
    assert logged[::2] == ["sample"] * 90
    rounds = [logged[1::2][start : start + 3] for start in range(0, 90, 3)]
    assert all(sorted(names) == ["a", "b", "gpuconv"] for names in rounds)
    assert len({names[0] for names in rounds}) == 3  # the first place moves round


@pytest.mark.parametrize("sets", [2, 3, 7, 50, 600])
def test_between_two_uses_of_a_buffer_lies_the_whole_rotation(sets: int) -> None:
    engine = engine_with({"name": "peer", "call_us": 7.0}, sets=sets)
    engine.measure(EAGER)
    first = engine.log.index(("sample", -1))
    for name in ("gpuconv", "peer"):
        sampled = [index for who, index in engine.log[first:] if who == name]
        used = len(set(sampled))
        assert used >= min(0.8 * sets, 30 * 10)
        last: dict[int, int] = {}
        for position, index in enumerate(sampled):
            assert position - last.get(index, -used) >= used
            last[index] = position


def test_sets_cover_four_times_the_cache() -> None:
    cache = 50 * 2**20
    assert sets_for(ConvProblem("conv1d", 1, 1, 1, 10, 3), cache) == 4096
    assert sets_for(ConvProblem("conv1d", 64, 256, 256, 100_000, 3), cache) == 2
    middle = ConvProblem("conv1d", 1, 256, 256, 4096, 3)
    assert sets_for(middle, cache) * middle.bytes() >= 4 * cache


def test_slow_case_stops_at_its_deadlines() -> None:
    """The soft one leaves five samples, the hard one a single one."""
    for method, deadlines, repeats in (
        (EAGER, Deadlines(soft=5.0), [None, 5]),
        (Method(), Deadlines(4.5, 4.5), [1, None]),
        (Method(), Deadlines(-1.0, -1.0), [None, None]),
    ):
        m = FakeEngine([{"name": name, "call_us": 1e6} for name in ("gpuconv", "peer")]).measure(method, deadlines)
        assert [timing and timing.repeats for timing in (m.ours.replay, m.ours.eager)] == repeats
    assert (m.ours.status, m.ours.note) == ("failed", "no time left")


ALL_CASES = [Case(layer, FLOAT32, layer.batch) for layer in load()]
SOME_CASES = ALL_CASES[::3]


def run_fake(engine: FakeEngine, chosen: Sequence[Case], seconds: float | None) -> RunResult:
    budget = Budget(seconds, lambda: engine.now, 30.0)
    return schedule.run_cases(chosen, engine, Method(), budget, RunResult({}, {}, {}), {}, lambda *_: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimate", [0.001, 1.0, 50.0])
@pytest.mark.parametrize("call_us", [100.0, 20_000.0])
def test_time_budget_holds(estimate: float, call_us: float) -> None:
    """Whatever is guessed, a run ends within its time and one sample of each implementation and kind."""
    engine = FakeEngine([{"name": "gpuconv", "call_us": call_us}, {"name": "peer", "call_us": 2 * call_us}])
    engine.estimate = estimate
    result = run_fake(engine, SOME_CASES, 20.0)
    assert engine.now <= 20 + 3
    assert len(result.measurements) + len(result.unmeasured) == len(SOME_CASES)
    assert result.measurements or estimate == 50.0
    assert all("no time left" in u.reason for u in result.unmeasured)
    # A guess ten times too long must not keep the run from filling its time.
    if estimate <= 1.0 and call_us == 100.0:
        assert len(result.measurements) == len(SOME_CASES)


def test_failing_case_is_listed_and_a_dead_device_ends_the_run() -> None:
    engine, opened = engine_with(), []

    @contextlib.contextmanager
    def broken(case: Case) -> Iterator[Buffers]:
        opened.append(case)
        raise RuntimeError("illegal memory access")
        yield

    engine.open = broken  # type: ignore[method-assign]
    result = run_fake(engine, ALL_CASES, None)
    assert len(opened) == schedule.MAX_FAILURES_IN_A_ROW
    assert "illegal memory access" in result.unmeasured[0].reason
    assert "given up" in result.unmeasured[-1].reason
    assert len(result.unmeasured) == len(ALL_CASES)


def test_every_beginning_of_the_order_is_spread_over_kinds() -> None:
    modes = MODES[:2]
    order = by_information([Case(layer, mode, 1) for mode in reversed(modes) for layer in load()], modes)
    kinds = {layer.kind for layer in load()}
    assert len(order) == 2 * len(load())
    for mode, part in zip(modes, (order[: len(kinds)], order[len(kinds) : 2 * len(kinds)]), strict=True):
        assert {c.layer.kind for c in part} == kinds
        assert {c.mode for c in part} == {mode}
    for kind in kinds:
        regimes = [c.layer.regime for c in order if c.layer.kind == kind and c.mode is FLOAT32]
        assert regimes == sorted(regimes, key=lambda regime: regime != "throughput")
    assert len(quick(order, per_kind=1)) == 2 * len(kinds)


def test_layers_too_large_for_the_device_are_reduced_or_left_out() -> None:
    chosen, left_out = schedule.select(load(), [FLOAT32], "", 2**30, 10**9)
    assert all(case.problem.flops() <= 10**9 and case.problem.bytes() <= 2**30 for case in chosen)
    assert len(chosen) + len(left_out) == len(load())
    assert any(case.batch < case.layer.batch for case in chosen)
    assert "jasper.b5_k25_c768" in {u.layer for u in left_out}
    assert set(SUBSET) <= set(LAYERS)
    whole, _ = schedule.select(load(), MODES, "", 2**40, 10**15)
    assert len([c for c in whole if c.mode.name == "float64"]) == len(SUBSET)


def test_predictions_are_those_of_the_product() -> None:
    found = predictions.read("NVIDIA GH200 480GB")
    assert set(found["float32"]) == set(found["bfloat16 grad_weight"]) == set(LAYERS)
    assert set(found["complex64"]) == set(SUBSET)
    assert all(us > 0 for times in found.values() for us in times.values())
    assert predictions.read("NVIDIA H100 80GB HBM3") == {}


def timing(us: float) -> Timing:
    return Timing(us, us * 0.98, us * 1.02, 30)


def measurement(layer: str, ours: float | None, **peer_times: float) -> Measurement:
    """A float32 layer with our replay time and peers' by name; eager times are 10 us longer."""
    mine = Outcome("gpuconv", "wrong", "off", error=1e-7)
    if ours is not None:
        mine = Outcome("gpuconv", "measured", replay=timing(ours), eager=timing(ours + 10), error=1e-7)
    others = [Outcome(n, "measured", replay=timing(us), eager=timing(us + 10)) for n, us in peer_times.items()]
    problem, kind = LAYERS[layer].problem(), LAYERS[layer].kind
    return Measurement(
        layer, kind, "float32", "forward", str(problem), f"family_{kind}", problem.flops(), problem.bytes(), 5.0,
        "memory", 12.0, 10**9, (mine, *others),
    )  # fmt: skip


def result_of(*measurements: Measurement) -> RunResult:
    where = results.environment({"kind": "gpu", "name": "Fake GPU", "arch": "sm_90"})
    left_out = Unmeasured("jasper.b5_k25_c768", "float32", "no time left: 1 s")
    return RunResult(where, {"quick": True}, {"copy": 4000.0, "float32": 60.0}, measurements, (left_out,), 12.5)


RESULT = result_of(
    measurement("vocos.dwconv_k7_b1", 10.0, PyTorch=20.0, other=30.0),
    measurement("conformer_l.dw_k31", 40.0, PyTorch=20.0),
    measurement("whisper_base.conv2_b1", None, PyTorch=20.0),
    measurement("enformer.stem_k15", 100.0),
)


def test_result_file_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    results.write_json(path, RESULT.to_json())
    assert results.read(path) == RESULT
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    assert RESULT.environment["versions"]["numpy"] == np.__version__
    assert RESULT.environment["versions"]["causal-conv1d"] == "absent"
    assert {"created", "device", "host", "versions", "commit", "commit_modified"} <= set(RESULT.environment)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for text in ("{", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "measurements": [{}], "unmeasured": []}'):
        (tmp_path / "other.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError):  # noqa: PT011 - the messages differ
            results.read(tmp_path / "other.json")


def test_ratio_compares_the_same_kind_of_time_with_comparable_peers() -> None:
    m = RESULT.measurements[0]
    assert m.ratio() == pytest.approx(2.0)
    unfair = Outcome("PyTorch on channels_last data", "measured", "", False, timing(1.0), timing(2.0))
    m = replace(m, outcomes=(*m.outcomes, unfair))
    assert m.ratio() == pytest.approx(2.0)
    eager_only = replace(m, outcomes=(replace(m.ours, replay=None), *m.outcomes[1:]))
    assert eager_only.ratio() == pytest.approx(30 / 20)


def test_statistics() -> None:
    samples = [float(v) for v in range(1, 102)]
    assert Timing.of(samples) == Timing(51, 11, 91, 101)
    assert Timing.of(samples, least=True).us == 1
    assert results.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert results.geometric_mean([]) is None


def printed(*renderables: Any) -> str:
    console = Console(width=220, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(*renderables)
    return console.export_text()


def test_tables_show_what_was_measured_and_losses_first() -> None:
    order = [m.layer for m in tables.by_loss(RESULT.measurements)]
    assert order == ["conformer_l.dw_k31", "whisper_base.conv2_b1", "enformer.stem_k15", "vocos.dwconv_k7_b1"]
    text = printed(tables.results_table(RESULT.measurements))
    (loss,) = [line for line in text.splitlines() if "conformer_l.dw_k31" in line]
    assert all(cell in loss for cell in ("40.0", "0.50", "0.60", "12 %", "PyTorch"))
    (wrong,) = [line for line in text.splitlines() if "whisper_base" in line]
    assert "wrong" in wrong
    assert "off" in wrong
    (overall,) = [line for line in printed(tables.means_table(RESULT.measurements)).splitlines() if " all " in line]
    assert "1.00" in overall  # the geometric mean of 2 and 1/2
    assert "1 of 2" in overall
    assert "other" in printed(tables.peers_table(RESULT.measurements))


def test_comparison_lists_slow_downs_first() -> None:
    after = result_of(
        measurement("vocos.dwconv_k7_b1", 10.1, PyTorch=20.0),
        measurement("conformer_l.dw_k31", 60.0, PyTorch=20.0),
        measurement("mamba_2p8b.conv_k4_b1", 30.0, PyTorch=20.0),
    )
    rows = tables.compare(RESULT, after)
    assert rows[0][:4] == ("conformer_l.dw_k31", "float32", 40.0, 60.0)
    remarks = {row[0]: row[4] for row in rows}
    assert remarks["vocos.dwconv_k7_b1"] == "within the spread"
    assert remarks["mamba_2p8b.conv_k4_b1"] == "only in B"
    assert remarks["enformer.stem_k15"] == "only in A"
    assert "1.500" in printed(tables.comparison_table(RESULT, after))


PAGE = "# Title\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nrest\n"


def test_pictures_and_readme_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, readme, out = tmp_path / "result.json", tmp_path / "README.md", tmp_path / "pictures"
    results.write_json(result, RESULT.to_json())
    readme.write_text(PAGE, encoding="utf-8")
    arguments = [str(result), "--out", str(out), "--update-readme", "--readme", str(readme)]
    for _ in range(2):  # what is between the marks is replaced
        assert plot.main(arguments) == 0
    assert [p.name for p in sorted(out.iterdir())] == ["gpu-float32-ratios.png", "gpu-float32-roofline.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in out.iterdir())
    page = readme.read_text(encoding="utf-8")
    assert page.count("Fake GPU") == 1
    assert "old" not in page
    assert "| float32 | all | 3 | 1.00 | 0.50 | 2.00 |" in page
    assert "](pictures/gpu-float32-roofline.png)" in page
    assert (page[:7], page[-6:]) == ("# Title", "\nrest\n")
    for unmarked in ("# Title\n", PAGE + PAGE, "<!-- bench:end -->\n<!-- bench:begin -->\n"):
        readme.write_text(unmarked, encoding="utf-8")
        with pytest.raises(SystemExit):
            plot.main(arguments)
        assert "once each" in capsys.readouterr().err
        assert readme.read_text(encoding="utf-8") == unmarked
