"""The benchmark harness, on fake devices, fake clocks and fake implementations."""

from __future__ import annotations

import contextlib
import json
import math
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench import (
    check,
    engine_cpu,
    engine_gpu,
    important,
    overhead,
    peers,
    plot,
    rates,
    records,
    results,
    run,
    sanitize,
    tables,
)
from bench.check import Oracle, Verdict, oracle_of
from bench.directions import our_function, result_shape
from bench.layers import Ceilings, Layer, load
from bench.marks import replace_between
from bench.measure import (
    MIN_REPEATS,
    Absent,
    Buffers,
    Case,
    Deadlines,
    Method,
    Refused,
    measure,
    sets_for,
)
from bench.modes import MODES, SUBSET, Mode
from bench.results import Measurement, Outcome, RunResult, Timing, Unmeasured
from bench.schedule import Budget, by_information, quick
from gpuconv import cases, cpu, dispatch, reference, runtime
from gpuconv.device import Device
from gpuconv.families import GradientLayout, Layout
from gpuconv.problem import ConvProblem, WeightGradientProblem

LAYERS = {layer.name: layer for layer in load()}
FLOAT32, BFLOAT16, TF32 = MODES[0], MODES[1], MODES[2]


def case_of(name: str, mode: Mode = FLOAT32, batch: int = 1) -> Case:
    return Case(LAYERS[name], mode, batch)


# -- a device made of a clock -----------------------------------------------------------------------------------------


@dataclass
class Clock:
    """Time that passes only when somebody works."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


RIGHT = Verdict(True, 1e-8)
FAKE_CEILINGS = Ceilings("fake", 1e12, {"float32": 1e13, "bfloat16": 1e14})


@dataclass
class FakeRunner:
    """An implementation that takes `call_us` a call and remembers which sets it was given."""

    clock: Clock
    call_us: float
    log: list[tuple[str, int]]
    name: str
    result: Verdict = RIGHT
    fails_in: str = ""
    released: bool = False

    def call(self, index: int) -> None:
        self._maybe_fail("call")
        self.log.append((self.name, index))
        self.clock.now += 1e-6 * self.call_us

    def capture(self, indices: Sequence[int]) -> Callable[[], None]:
        self._maybe_fail("capture")

        def replay() -> None:
            for index in indices:
                self.log.append((self.name, index))
                self.clock.now += 0.5e-6 * self.call_us

        return replay

    def verdict(self) -> Verdict:
        self._maybe_fail("verdict")
        return self.result

    def context(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def release(self) -> None:
        self.released = True

    def _maybe_fail(self, where: str) -> None:
        if self.fails_in == where:
            raise RuntimeError(f"broken in {where}")


@dataclass
class FakeSubject:
    name: str
    make: Callable[[], FakeRunner]
    comparable: bool = True
    note: str = ""

    def prepare(self) -> FakeRunner:
        return self.make()


@dataclass
class FakeEngine:
    """Measures by its clock; `subjects` are made anew for each case."""

    clock: Clock
    subjects: Callable[[], list[FakeSubject]]
    sets: int = 4
    log: list[tuple[str, int]] = field(default_factory=list)
    ceilings: Ceilings = FAKE_CEILINGS
    estimate: float = 1.0

    @contextlib.contextmanager
    def open(self, case: Case) -> Iterator[Buffers]:
        yield Buffers(self.sets, 1000, self.subjects())

    def settle(self) -> None:
        self.log.append(("settle", -1))

    def elapsed(self, work: Callable[[], None]) -> float:
        start = self.clock.now
        work()
        return 1e6 * (self.clock.now - start)

    def family(self, problem: ConvProblem) -> str:
        return "fake_family"

    def estimate_seconds(self, case: Case, repeats: int) -> float:
        return self.estimate

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake", "name": "fake"}


def engine_with(*runners: dict[str, Any], sets: int = 4) -> FakeEngine:
    """An engine with one subject per dictionary of FakeRunner's arguments; call_us defaults to 100."""
    clock = Clock()
    engine = FakeEngine(clock, list, sets)

    def subjects() -> list[FakeSubject]:
        return [
            FakeSubject(
                arguments["name"],
                lambda arguments=arguments: FakeRunner(clock, log=engine.log, **{"call_us": 100.0, **arguments}),
            )
            for arguments in runners
        ]

    engine.subjects = subjects
    return engine


CASE = case_of("vocos.dwconv_k7_b1")


def test_measured_times_are_those_of_the_clock() -> None:
    engine = engine_with({"name": "gpuconv"}, {"name": "peer", "call_us": 250.0})
    m = measure(CASE, engine, Method(), engine.clock)
    assert m.ours.eager is not None
    assert m.ours.replay is not None
    assert m.ours.eager.median_us == pytest.approx(100)
    assert m.ours.replay.median_us == pytest.approx(50)
    assert m.ours.replay.repeats == m.ours.eager.repeats == 30
    assert m.ratio() == pytest.approx(2.5)
    assert m.family == "fake_family"
    assert m.our_us == pytest.approx(50)  # graph replay stands for the layer
    problem = CASE.problem
    assert m.floor_us == pytest.approx(1e6 * problem.bytes() / 1e12)
    assert m.floor_limit == "memory"
    assert m.gigabytes_per_second == pytest.approx(problem.bytes() / 50e-6 / 1e9)


def test_wrong_kernel_gets_no_figure_and_is_never_timed() -> None:
    engine = engine_with({"name": "gpuconv", "result": Verdict(False, 0.5, "one element off")}, {"name": "peer"})
    m = measure(CASE, engine, Method(), engine.clock)
    assert (m.ours.status, m.ours.note, m.ours.replay, m.ours.eager) == ("wrong", "one element off", None, None)
    assert m.ours.error == 0.5
    assert m.our_us is None
    assert m.ratio() is None
    assert not [index for name, index in engine.log if name == "gpuconv"]
    assert m.outcomes[1].status == "measured"


def test_wrong_peer_does_not_count() -> None:
    engine = engine_with(
        {"name": "gpuconv"},
        {"name": "fast", "call_us": 1.0, "result": Verdict(False, math.inf, "NaN")},
        {"name": "slow"},
    )
    m = measure(CASE, engine, Method(), engine.clock)
    peer = m.best_peer()
    assert peer is not None
    assert peer.subject == "slow"
    assert m.outcomes[1].error is None  # infinity is no JSON


@pytest.mark.parametrize("where", ["verdict", "capture", "call"])
def test_failing_implementation_is_reported_and_stops_no_other(where: str) -> None:
    engine = engine_with({"name": "gpuconv"}, {"name": "peer", "fails_in": where})
    m = measure(CASE, engine, Method(), engine.clock)
    assert m.ours.status == "measured"
    assert m.outcomes[1].status == "failed"
    assert f"broken in {where}" in m.outcomes[1].note
    assert m.outcomes[1].replay is m.outcomes[1].eager is None


@pytest.mark.parametrize(("reason", "status"), [(Absent("not installed"), "absent"), (Refused("no"), "refused")])
def test_absent_and_refusing_peers_are_reported(reason: Exception, status: str) -> None:
    engine = engine_with({"name": "gpuconv"})
    subjects = engine.subjects

    def refuse() -> FakeRunner:
        raise reason

    engine.subjects = lambda: [*subjects(), FakeSubject("peer", refuse)]
    m = measure(CASE, engine, Method(), engine.clock)
    assert (m.outcomes[1].status, m.outcomes[1].note) == (status, str(reason))


def test_samples_are_taken_in_turn() -> None:
    engine = engine_with(
        {"name": "gpuconv", "call_us": 2000.0}, {"name": "a", "call_us": 2000.0}, {"name": "b", "call_us": 2000.0}
    )
    measure(CASE, engine, Method(kinds=("eager",)), engine.clock)
    logged = [name for name, _ in engine.log][-6 * 30 :]
    assert logged[::2] == ["settle"] * 90
    sampled = logged[1::2]
    for start in range(0, len(sampled), 3):
        assert sorted(sampled[start : start + 3]) == ["a", "b", "gpuconv"]
    assert len({sampled[start] for start in range(0, len(sampled), 3)}) == 3  # the first place moves round


@pytest.mark.parametrize("sets", [2, 3, 7, 50, 600])
def test_between_two_uses_of_a_buffer_lies_the_whole_rotation(sets: int) -> None:
    engine = engine_with({"name": "gpuconv"}, {"name": "peer", "call_us": 7.0}, sets=sets)
    measure(CASE, engine, Method(kinds=("eager",)), engine.clock)
    first = engine.log.index(("settle", -1))
    for name in ("gpuconv", "peer"):
        sampled = [index for who, index in engine.log[first:] if who == name]
        used = len(set(sampled))
        assert used >= min(0.8 * sets, 30 * 10)
        last: dict[int, int] = {}
        for position, index in enumerate(sampled):
            if index in last:
                assert position - last[index] >= used
            last[index] = position


@pytest.mark.parametrize(("nbytes_scale", "expected"), [(1, 4096), (10**9, 2)])
def test_sets_cover_four_times_the_cache(nbytes_scale: int, expected: int) -> None:
    small = ConvProblem("conv1d", 1, 1, 1, 10, 3)
    large = ConvProblem("conv1d", 64, 256, 256, 100_000, 3)
    problem = small if nbytes_scale == 1 else large
    assert sets_for(problem, 50 * 2**20) == expected
    middle = ConvProblem("conv1d", 1, 256, 256, 4096, 3)
    assert sets_for(middle, 50 * 2**20) * middle.bytes() >= 4 * 50 * 2**20


def test_slow_case_stops_at_its_deadline_with_a_few_samples() -> None:
    engine = engine_with({"name": "gpuconv", "call_us": 1e6}, {"name": "peer", "call_us": 1e6})
    m = measure(CASE, engine, Method(kinds=("eager",)), engine.clock, Deadlines(soft=5.0))
    assert m.ours.eager is not None
    assert m.ours.eager.repeats == MIN_REPEATS


def test_run_out_of_time_stops_after_one_sample() -> None:
    engine = engine_with({"name": "gpuconv", "call_us": 1e6}, {"name": "peer", "call_us": 1e6})
    m = measure(CASE, engine, Method(), engine.clock, Deadlines(soft=4.5, hard=4.5))
    assert m.ours.replay is not None
    assert m.ours.replay.repeats == 1
    assert m.ours.eager is None


def test_case_without_any_time_has_no_figure() -> None:
    engine = engine_with({"name": "gpuconv"})
    engine.clock.now = 1.0
    m = measure(CASE, engine, Method(), engine.clock, Deadlines(0.0, 0.0))
    assert (m.ours.status, m.ours.note) == ("failed", "no time left")


def test_reduced_batch_is_named() -> None:
    engine = engine_with({"name": "gpuconv"})
    m = measure(case_of("hyena.longconv_kL1024"), engine, Method(), engine.clock)
    assert m.label == "hyena.longconv_kL1024 N=1"
    assert measure(CASE, engine, Method(), engine.clock).label == CASE.layer.name


# -- the budget and the order -----------------------------------------------------------------------------------------


def run_fake(engine: FakeEngine, chosen: Sequence[Case], seconds: float | None, per_case: float = 30.0) -> RunResult:
    budget = Budget(seconds, engine.clock, per_case)
    result = RunResult({}, {}, {})
    return run.run_cases(chosen, engine, Method(), budget, result, {}, lambda *_: None)


ALL_CASES = [Case(layer, FLOAT32, layer.batch) for layer in load()]
SOME_CASES = ALL_CASES[::3]


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage before every sample would be most of what these tests do."""
    monkeypatch.setattr("bench.measure.gc", types.SimpleNamespace(collect=int, disable=int, enable=int))


@pytest.mark.parametrize("estimate", [0.001, 1.0, 50.0])
@pytest.mark.parametrize("call_us", [100.0, 20_000.0])
def test_time_budget_holds(estimate: float, call_us: float) -> None:
    """Whatever is guessed, a run ends within its time and one sample of each implementation and kind."""
    engine = engine_with({"name": "gpuconv", "call_us": call_us}, {"name": "peer", "call_us": 2 * call_us})
    engine.estimate = estimate
    result = run_fake(engine, SOME_CASES, 20.0)
    assert engine.clock.now <= 20 + 3
    assert len(result.measurements) + len(result.unmeasured) == len(SOME_CASES)
    assert result.measurements or estimate == 50.0
    assert all("no time left" in u.reason for u in result.unmeasured)


def test_experience_corrects_the_guess() -> None:
    """A guess ten times too long must not keep the run from filling its time."""
    engine = engine_with({"name": "gpuconv"})
    engine.estimate = 1.0
    result = run_fake(engine, SOME_CASES, 8.0)
    assert len(result.measurements) == len(SOME_CASES)


def test_run_without_limit_measures_everything() -> None:
    engine = engine_with({"name": "gpuconv"})
    engine.estimate = 1e9
    assert len(run_fake(engine, SOME_CASES, None).measurements) == len(SOME_CASES)


def test_failing_case_is_listed_and_a_dead_device_ends_the_run() -> None:
    engine = engine_with({"name": "gpuconv"})
    opened = []

    @contextlib.contextmanager
    def broken(case: Case) -> Iterator[Buffers]:
        opened.append(case)
        raise RuntimeError("illegal memory access")
        yield

    engine.open = broken  # type: ignore[method-assign]
    result = run_fake(engine, ALL_CASES, None)
    assert len(opened) == run.MAX_FAILURES_IN_A_ROW
    assert len(result.unmeasured) == len(ALL_CASES)
    assert "illegal memory access" in result.unmeasured[0].reason
    assert "given up" in result.unmeasured[-1].reason


def test_every_beginning_of_the_order_is_spread_over_kinds() -> None:
    modes = (FLOAT32, BFLOAT16)
    order = by_information([Case(layer, mode, 1) for mode in reversed(modes) for layer in load()], modes)
    kinds = {layer.family for layer in load()}
    assert len(order) == 2 * len(load())
    first, second = order[: len(kinds)], order[len(kinds) : 2 * len(kinds)]
    assert {c.layer.family for c in first} == {c.layer.family for c in second} == kinds
    assert {c.mode.name for c in first} == {"float32"}
    assert {c.mode.name for c in second} == {"bfloat16"}
    for kind in kinds:
        regimes = [c.layer.regime for c in order if c.layer.family == kind and c.mode is FLOAT32]
        assert regimes == sorted(regimes, key=lambda regime: regime != "throughput")


def test_quick_keeps_the_first_of_every_kind() -> None:
    chosen = quick(by_information(ALL_CASES, [FLOAT32]), per_kind=1)
    assert len(chosen) == len({layer.family for layer in load()})


def test_layers_too_large_for_the_device_are_reduced_or_left_out() -> None:
    chosen, left_out = run.select(load(), [FLOAT32], "", 2**30, 10**9)
    assert all(case.problem.flops() <= 10**9 and case.problem.bytes() <= 2**30 for case in chosen)
    assert len(chosen) + len(left_out) == len(load())
    assert any(case.batch < case.layer.batch for case in chosen)
    assert "jasper.b5_k25_c768" in {u.layer for u in left_out}


def test_subset_modes_name_layers_that_exist() -> None:
    assert set(SUBSET) <= set(LAYERS)
    chosen, _ = run.select(load(), MODES, "", 2**40, 10**15)
    assert len([c for c in chosen if c.mode.name == "float64"]) == len(SUBSET)


def test_predictions_are_those_of_the_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "predictions.json"
    results.write_json(path, {"sm_90": {"H200": {"float32": {"a": 1.0}}, "H100": {"float32": {"a": 2.0}}}})
    monkeypatch.setattr(run, "PREDICTIONS", path)
    assert run.load_predictions("sm_90", "NVIDIA H100 80GB HBM3") == {"float32": {"a": 2.0}}
    assert run.load_predictions("sm_90", "NVIDIA GH200 480GB") == {"float32": {"a": 1.0}}
    assert run.load_predictions("sm_90", "NVIDIA H20") == run.load_predictions(None, "CPU") == {}


# -- the check --------------------------------------------------------------------------------------------------------


def shrink(layer: Layer, dtype: str = "float32") -> ConvProblem:
    """The layer with few samples, positions and channels of a group, its settings kept."""
    p = layer.problem(dtype)
    groups = min(p.groups, 4)
    C_in, C_out = min(p.C_in_g, 3) * groups, min(p.C_out_g, 6) * groups
    return replace(sanitize.shrunk(p, 90), C_in=C_in, C_out=C_out, groups=groups, K=min(p.K, 60))


SHRUNK = {name: shrink(layer) for name, layer in LAYERS.items()}


def arrays(problem: ConvProblem) -> tuple[Any, Any, Any]:
    x, w, b = engine_cpu.random_arrays(problem, np.random.default_rng(1))
    return x, w, b


@pytest.mark.parametrize("name", LAYERS)
def test_windows_are_parts_of_the_whole(name: str) -> None:
    problem = SHRUNK[name]
    x, w, b = arrays(problem)
    whole = reference.compute(problem, x, w, b)
    seen = np.zeros(problem.output_shape, bool)
    for window in check.windows(problem):
        bias = None if b is None else b[window.bias]
        part = reference.compute(window.problem, x[window.input], w[window.weight], bias)
        np.testing.assert_allclose(part, whole[window.output], rtol=1e-12, atol=1e-12)
        seen[window.output] = True
    corners = seen[np.ix_(*[sorted({0, extent - 1}) for extent in seen.shape])]
    assert corners[:, 0, :].all()
    assert corners[:, -1, :].all()


def judge(problem: ConvProblem, output: Any, *, bounded: bool, mode: str = "float32") -> Verdict:
    x, w, b = arrays(problem)
    oracle = Oracle(problem, lambda part: x[part], lambda part: w[part], None if b is None else (lambda part: b[part]))
    finite = bool(np.isfinite(output).all())
    return oracle.judge(lambda part: output[part], mode=mode, all_finite=finite, bounded=bounded)


CHECKED = ("hifigan_v1.up1_k16s8_b1", "conformer_l.dw_k31", "whisper_base.conv2_b1", "minirocket.k9_d8_mult84")


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("bounded", [True, False])
def test_right_result_passes(name: str, bounded: bool) -> None:
    problem = SHRUNK[name]
    output = np.empty(problem.output_shape, np.float32)
    cpu.convolve(problem, *arrays(problem), output)
    verdict = judge(problem, output, bounded=bounded)
    assert verdict.ok
    assert 0 < verdict.error < 1e-6


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("place", [(0, 0, 0), (-1, -1, -1), (0, -1, 0), (-1, 0, -1)])
def test_one_wrong_element_in_a_corner_is_found(name: str, place: tuple[int, int, int]) -> None:
    problem = SHRUNK[name]
    output = np.empty(problem.output_shape, np.float32)
    cpu.convolve(problem, *arrays(problem), output)
    output[place] += np.float32(1e-3)
    verdict = judge(problem, output, bounded=True)
    assert not verdict.ok
    assert "outside the error bound (1 of" in verdict.note


def test_unwritten_element_anywhere_is_found() -> None:
    problem = replace(SHRUNK["conformer_l.dw_k31"], L_in=5000)
    output = np.empty(problem.output_shape, np.float32)
    cpu.convolve(problem, *arrays(problem), output)
    output[0, 1, 2345] = np.nan
    verdict = judge(problem, output, bounded=True)
    assert not verdict.ok
    assert "not every element" in verdict.note


def test_peer_with_a_missing_tap_fails() -> None:
    problem = SHRUNK["whisper_base.conv2_b1"]
    x, w, b = arrays(problem)
    w[:, :, -1] = 0
    output = np.empty(problem.output_shape, np.float32)
    cpu.convolve(problem, x, w, b, output)
    verdict = judge(problem, output, bounded=False, mode="bfloat16")
    assert not verdict.ok
    assert "relative error" in verdict.note


def test_whole_outputs_are_compared() -> None:
    ours = np.random.default_rng(0).standard_normal((2, 3, 50)).astype(np.float32)
    theirs = ours * np.float32(1 + 1e-6)
    assert engine_cpu.disagreement_between(ours, theirs, "float32") == ""
    theirs[1, 2, 37] += 0.1
    assert "differs from PyTorch by up to 0.1" in engine_cpu.disagreement_between(ours, theirs, "float32")


# -- the peers --------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("name", LAYERS)
def test_peers_compute_the_layer(name: str) -> None:
    import torch

    problem = SHRUNK[name]
    x, w, b = arrays(problem)
    expected = reference.compute(problem, x, w, b)
    tensors = [None if a is None else torch.from_numpy(a) for a in (x, w, b)]
    builders: list[Callable[[ConvProblem], peers.Function]] = [
        peers.conv_by_trimming,
        peers.conv_by_padding,
        lambda p: peers.conv_channels_last(p, convert=True),
    ]
    computed = 0
    for build in builders:
        with contextlib.suppress(Refused):
            y = build(problem)(*tensors)
            np.testing.assert_allclose(y.numpy(), expected, rtol=1e-3, atol=1e-4)
            computed += 1
    assert computed >= 2 or problem.transposed
    if peers.is_symmetric(problem):
        kept = peers.conv_channels_last(problem, convert=False)
        y = kept(peers.to_channels_last(tensors[0]), peers.to_channels_last(tensors[1]), tensors[2])
        np.testing.assert_allclose(y.squeeze(2).numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.torch
def test_causal_conv1d_is_used_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def causal_conv1d_fn(x: Any, weight: Any, bias: Any) -> Any:
        K = weight.shape[1]
        return torch.nn.functional.conv1d(x, weight[:, None], bias, padding=K - 1, groups=x.shape[1])[..., : x.shape[2]]

    problem = SHRUNK["mamba_2p8b.conv_k4_b1"]
    with pytest.raises(Absent, match="not installed"):
        peers.causal_conv(problem)
    module = types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setattr(peers, "optional_module", lambda _: module)
    x, w, b = arrays(problem)
    y = peers.causal_conv(problem)(*map(torch.from_numpy, (x, w, b)))
    np.testing.assert_allclose(y.numpy(), reference.compute(problem, x, w, b), rtol=1e-4, atol=1e-5)
    for other in ("conformer_l.dw_k31", "whisper_base.conv2_b1", "styletts2.f0_pool_dw_k3s2_op1"):
        with pytest.raises(Refused):
            peers.causal_conv(SHRUNK[other])
    with pytest.raises(Refused, match="float64"):
        peers.causal_conv(replace(problem, dtype="float64"))


@pytest.mark.torch
def test_cudnn_settings_hold_inside_their_context_only() -> None:
    import torch

    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    with peers.CudnnSettings(allow_tf32=False, deterministic=True).context():
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, True, False)
    with peers.CudnnSettings(allow_tf32=True).context():
        assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, False, True)
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before


# -- results ----------------------------------------------------------------------------------------------------------


def timing(us: float, spread: float = 0.02) -> Timing:
    return Timing(us, us * (1 - spread), us * (1 + spread), 30)


def measurement(layer: str, ours: float | None, **peer_times: float) -> Measurement:
    """A float32 layer with our replay time and peers' by name; eager times are 10 us longer."""
    status: results.Status = "measured" if ours is not None else "wrong"
    mine = Outcome("gpuconv", status, "" if ours else "off", True, timing(ours) if ours else None, None, 1e-7)
    if ours is not None:
        mine = replace(mine, eager=timing(ours + 10))
    others = [Outcome(name, "measured", "", True, timing(us), timing(us + 10)) for name, us in peer_times.items()]
    problem = LAYERS[layer].problem()
    return Measurement(
        layer, LAYERS[layer].family, "float32", "forward", str(problem), f"family_{LAYERS[layer].family}",
        problem.flops(), problem.bytes(), 5.0, "memory", 12.0, 10**9, (mine, *others),
    )  # fmt: skip


def result_of(*measurements: Measurement) -> RunResult:
    device = {"kind": "gpu", "name": "Fake GPU", "arch": "sm_90"}
    return RunResult(
        results.environment(device), {"quick": True}, {"copy": 4000.0, "float32": 60.0}, measurements,
        (Unmeasured("jasper.b5_k25_c768", "float32", "no time left: 1 s"),), 12.5,
    )  # fmt: skip


RESULT = result_of(
    measurement("vocos.dwconv_k7_b1", 10.0, PyTorch=20.0, other=30.0),
    measurement("conformer_l.dw_k31", 40.0, PyTorch=20.0),
    measurement("whisper_base.conv2_b1", None, PyTorch=20.0),
    measurement("enformer.stem_k15", 100.0),
)


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    results.write_json(path, RESULT.to_json())
    assert results.read(path) == RESULT
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_result_file_names_machine_versions_and_commit() -> None:
    environment = RESULT.environment
    assert environment["versions"]["numpy"] == np.__version__
    assert environment["versions"]["torch"]
    assert environment["versions"]["causal-conv1d"] == "absent"
    assert environment["host"]["cpu"]
    assert set(environment) >= {"created", "device", "host", "versions", "commit", "commit_modified"}


@pytest.mark.parametrize(
    "text", ["{", '{"schema": 99}', '{"schema": 1}', '{"schema": 1, "measurements": [{}], "unmeasured": []}']
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError):  # noqa: PT011 - the messages differ
        results.read(path)


def test_ratio_compares_the_same_kind_of_time_with_comparable_peers() -> None:
    m = RESULT.measurements[0]
    assert m.ratio() == pytest.approx(2.0)
    unfair = Outcome("PyTorch on channels_last data", "measured", "", False, timing(1.0), timing(2.0))
    m = replace(m, outcomes=(*m.outcomes, unfair))
    assert m.ratio() == pytest.approx(2.0)
    assert m.ratio(comparable=False) == pytest.approx(0.1)
    eager_only = replace(m, outcomes=(replace(m.ours, replay=None), *m.outcomes[1:]))
    assert eager_only.measure == "eager"
    assert eager_only.ratio() == pytest.approx(30 / 20)


def test_timing_is_median_and_percentiles() -> None:
    t = Timing.of([float(v) for v in range(1, 102)])
    assert (t.median_us, t.low_us, t.high_us, t.repeats) == (51, 11, 91, 101)


def test_geometric_mean() -> None:
    assert results.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert results.geometric_mean([]) is None


def printed(renderable: Any) -> str:
    console = Console(width=220, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_losses_come_first() -> None:
    order = [m.layer for m in tables.by_loss(RESULT.measurements)]
    assert order == ["conformer_l.dw_k31", "whisper_base.conv2_b1", "enformer.stem_k15", "vocos.dwconv_k7_b1"]


def test_tables_show_what_was_measured() -> None:
    text = printed(tables.results_table(RESULT.measurements))
    (loss,) = [line for line in text.splitlines() if "conformer_l.dw_k31" in line]
    for cell in ("40.0", "0.50", "0.60", "12 %", "PyTorch"):
        assert cell in loss
    (wrong,) = [line for line in text.splitlines() if "whisper_base" in line]
    assert "wrong" in wrong
    assert "off" in wrong
    means = printed(tables.means_table(RESULT.measurements))
    (overall,) = [line for line in means.splitlines() if " all " in line]
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


# -- marks, pictures --------------------------------------------------------------------------------------------------

PAGE = "# Title\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nrest\n"


def test_only_what_is_between_the_marks_changes() -> None:
    assert replace_between(PAGE, "bench", "\nnew\n\n") == PAGE.replace("old", "new")
    assert replace_between(replace_between(PAGE, "bench", "new"), "bench", "old") == PAGE


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<!-- bench:begin -->",
        PAGE + PAGE,
        "<!-- bench:end -->\n<!-- bench:begin -->\n",
        PAGE.replace("bench:end", "end"),
    ],
)
def test_pages_without_proper_marks_are_refused(page: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        replace_between(page, "bench", "new")


def test_pictures_and_readme_are_written(tmp_path: Path) -> None:
    result, readme = tmp_path / "result.json", tmp_path / "README.md"
    results.write_json(result, RESULT.to_json())
    readme.write_text(PAGE, encoding="utf-8")
    arguments = [str(result), "--out", str(tmp_path / "pictures"), "--update-readme", "--readme", str(readme)]
    assert plot.main(arguments) == 0
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [p.name for p in pictures] == ["gpu-float32-ratios.png", "gpu-float32-roofline.png"]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    page = readme.read_text(encoding="utf-8")
    assert "Fake GPU" in page
    assert "| float32 | all | 3 | 1.00 | 0.50 | 2.00 |" in page
    assert "](pictures/gpu-float32-roofline.png)" in page
    assert page.startswith("# Title")
    assert page.endswith("rest\n")


def test_readme_without_marks_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, readme = tmp_path / "result.json", tmp_path / "README.md"
    results.write_json(result, RESULT.to_json())
    readme.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(result), "--out", str(tmp_path), "--update-readme", "--readme", str(readme)])
    assert exit_.value.code == 2
    assert "bench:begin" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "# Title\n"


# -- the CPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published-like ceilings in place of half a second of measuring."""
    ceilings = Ceilings("fake CPU", 1e10, {"float32": 1e11, "float64": 5e10, "bfloat16": 1e11, "float16": 1e11})
    monkeypatch.setattr(engine_cpu, "measure_ceilings", lambda: ceilings)


@pytest.mark.torch
@pytest.mark.usefixtures("quick_ceilings")
def test_cpu_run_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "cpu.json"
    arguments = ["--device", "cpu", "--filter", "vocos|tacotron2.location", "--repeats", "3", "--out", str(path)]
    assert run.main(arguments) == 0
    result = results.read(path)
    assert {m.layer for m in result.measurements} == {"vocos.dwconv_k7_b1", "tacotron2.location_conv_k31_b1"}
    for m in result.measurements:
        assert m.ours.eager is not None
        assert m.ours.eager.repeats == 3
        assert m.ours.replay is None
        assert m.outcomes[1].subject == "PyTorch"
        assert m.outcomes[1].status == "measured"
        assert m.family.startswith("numpy ")
    assert result.environment["device"]["kind"] == "cpu"
    assert "vocos.dwconv_k7_b1" in capsys.readouterr().out
    assert run.main(["--compare", str(path), str(path)]) == 0
    assert "1.000" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.usefixtures("quick_ceilings")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64"])
def test_cpu_run_in_other_formats(dtype: str) -> None:
    (mode,) = [mode for mode in MODES if mode.name == dtype]
    m = measure(case_of("vocos.dwconv_k7_b1", mode), engine_cpu.CpuEngine(), Method(2, 1.0, ("eager",)), time.monotonic)
    assert [o.status for o in m.outcomes] == ["measured", "measured"], [o.note for o in m.outcomes]


@pytest.mark.torch
@pytest.mark.usefixtures("quick_ceilings")
@pytest.mark.parametrize("spoil", ["window", "elsewhere", "unwritten"])
def test_wrong_numpy_path_gets_no_figure(spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.convolve

    def wrong(problem: ConvProblem, x: Any, w: Any, b: Any, output: Any) -> None:
        right(problem, x, w, b, output)
        place = (0, 0, 0) if spoil == "window" else (0, 300, problem.L_out // 2 + 7)
        output[place] = np.nan if spoil == "unwritten" else output[place] + 0.5

    monkeypatch.setattr(cpu, "convolve", wrong)
    path = tmp_path / "cpu.json"
    assert run.main(["--device", "cpu", "--filter", "vocos", "--repeats", "2", "--out", str(path)]) == 1
    (m,) = results.read(path).measurements
    assert (m.ours.status, m.our_us) == ("wrong", None)
    assert m.outcomes[1].status == "measured"


def test_asking_for_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "missing_gpu", lambda: "no GPU: none")
    assert run.main([]) == 3
    assert "no GPU: none" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--minutes", "0"], ["--repeats", "0"], ["--device", "tpu"], ["--compare", "a.json", "b.json"],
     ["--device", "cpu", "--modes", "int8"], ["--device", "cpu", "--filter", "no such layer"]],
)  # fmt: skip
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.main(arguments)
    assert exit_.value.code == 2


# -- the GPU's side, on stand-ins for CuPy's and PyTorch's CUDA parts -------------------------------------------------


class StandInStream:
    ptr = 1

    def __init__(self) -> None:
        self.captures = 0

    def __enter__(self) -> StandInStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        self.captures += 1

    def end_capture(self) -> Any:
        return types.SimpleNamespace(upload=lambda _: None, launch=lambda _: time.sleep(1e-5))


class StandInEvent:
    time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


class StandInGraph:
    def replay(self) -> None:
        time.sleep(1e-5)


@pytest.fixture
def stand_in_engine(monkeypatch: pytest.MonkeyPatch) -> engine_gpu.GpuEngine:
    """A GpuEngine on NumPy arrays and CPU tensors: everything but the timing is real."""
    import torch

    cuda = types.SimpleNamespace(
        Stream=StandInStream,
        Event=StandInEvent,
        get_elapsed_time=lambda start, stop: 1e3 * (stop.time - start.time),
    )
    cupy = types.SimpleNamespace(
        cuda=cuda,
        ones=np.ones, asarray=np.asarray, asnumpy=np.asarray, empty=np.empty, full=np.full, array_split=np.array_split,
        get_default_memory_pool=lambda: types.SimpleNamespace(free_all_blocks=lambda: None),
    )  # fmt: skip
    for name, value in {
        "ExternalStream": lambda *_, **__: None,
        "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": StandInGraph,
        "graph": lambda *_, **__: contextlib.nullcontext(),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(engine_gpu, "sets_for", lambda *_: 3)
    monkeypatch.setattr("bench.measure.MAX_CALLS", 20)
    engine = object.__new__(engine_gpu.GpuEngine)
    engine.cupy, engine.index, engine.torch = cupy, 0, torch
    engine.device = replace(Device.from_arch("sm_90"), l2_bytes=4096)
    engine.stream, engine._start, engine._stop = StandInStream(), StandInEvent(), StandInEvent()
    engine._read = np.sum
    engine.ceilings = rates.published_ceilings(engine.device)
    return engine


@pytest.mark.torch
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", ["tacotron2.location_conv_k31_b1", "phasenet.up3_k7s4", "inceptiontime.k40_same"])
def test_gpu_engine_measures_every_implementation(stand_in_engine: engine_gpu.GpuEngine, name: str, mode: Mode) -> None:
    m = measure(case_of(name, mode), stand_in_engine, Method(3, 100.0), time.monotonic)
    outcomes = {o.subject: o for o in m.outcomes}
    assert m.ours.subject == "gpuconv"
    if mode.supported:
        assert m.ours.status == "measured", m.ours.note
        assert m.ours.replay is not None
        assert m.ours.eager is not None
        assert m.ours.error is not None
    else:
        assert m.ours.status == "refused"
    assert outcomes["PyTorch"].status == outcomes["PyTorch deterministic"].status == "measured"
    assert outcomes["causal-conv1d"].status == "absent"
    assert ("PyTorch, TF32 allowed" in outcomes) == (mode.name == "float32")
    symmetric = name != "inceptiontime.k40_same"
    assert (outcomes["PyTorch through channels_last"].status == "measured") == symmetric
    assert ("PyTorch, F.pad" in outcomes) != symmetric
    assert not outcomes["PyTorch on channels_last data"].comparable
    assert all(o.replay is not None for o in m.outcomes if o.status == "measured")


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_poison_is_not_finite_in_any_format(stand_in_engine: engine_gpu.GpuEngine, dtype: str) -> None:
    import torch

    problem = replace(SHRUNK["conformer_l.dw_k31"], dtype=dtype)
    data = engine_gpu.Data(stand_in_engine.cupy, problem, 2)
    x, w, _ = data.sets[0]
    assert (x.shape, w.shape, x.dtype.name) == (problem.input_shape, problem.weight_shape, dtype)
    assert 0.9 < x.astype(np.complex64).real.std() < 1.1
    assert engine_gpu.all_finite(stand_in_engine.cupy, x)
    assert not np.array_equal(x, data.sets[1][0])
    poisoned = data.poisoned()
    assert poisoned.shape == problem.output_shape
    assert not engine_gpu.all_finite(stand_in_engine.cupy, poisoned)
    assert np.isnan(poisoned.astype(np.complex64)).all()
    (tensor, _, _), *_ = data.tensors(torch)
    assert tensor.data_ptr() == x.ctypes.data


@pytest.mark.torch
def test_gpu_engine_finds_a_wrong_kernel(
    stand_in_engine: engine_gpu.GpuEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cpu.convolve

    def wrong(problem: ConvProblem, x: Any, w: Any, b: Any, output: Any) -> None:
        right(problem, x, w, b, output)
        output[0, 9, 77] += 0.5

    monkeypatch.setattr(cpu, "convolve", wrong)
    m = measure(case_of("tacotron2.location_conv_k31_b1"), stand_in_engine, Method(3, 100.0), time.monotonic)
    assert (m.ours.status, m.our_us) == ("wrong", None)
    assert m.outcomes[1].status == "measured"


@pytest.mark.gpu
def test_gpu_engine_on_a_gpu() -> None:
    engine = engine_gpu.GpuEngine(rehearse=True)
    m = measure(case_of("tacotron2.location_conv_k31_b1"), engine, Method(2, 1.0), time.monotonic)
    assert m.ours.status == "measured", m.ours.note
    assert m.ours.replay is not None
    assert m.ours.eager is not None


# -- the host's cost, the sanitizer's selection -----------------------------------------------------------------------


def test_host_cost_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_BATCH", 5)
    monkeypatch.setattr(overhead, "_BATCHES", 3)
    figures = overhead.measure_without_gpu()
    assert {"key", "plan look-up", "validation (first call only)"} <= set(figures)
    assert all(0 < us < 1e5 for us in figures.values())
    assert figures["functional call with out=, without its launch"] > figures["plan look-up"]


def test_host_cost_of_a_repeated_call_validates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with overhead.stand_ins() as given:
        call = overhead.call_with_out(*given)
        call()
        monkeypatch.setattr(ConvProblem, "conv1d", None)
        call()


def test_overhead_reports_absent_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "_BATCH", 2)
    monkeypatch.setattr(overhead, "missing_gpu", lambda: "no GPU: none")
    path = tmp_path / "overhead.json"
    assert overhead.main(["--json", str(path)]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["absent"] == {"GPU parts": "no GPU: none"}
    assert document["figures_us"]["key"] > 0
    assert "absent" in capsys.readouterr().out


def test_sanitizer_runs_every_family_that_the_layers_take() -> None:
    device = Device.from_arch("sm_90")

    def family(problem: ConvProblem) -> str | None:
        choice = dispatch.choose(problem, Layout.contiguous(problem), device)
        return None if choice is None else choice.family

    chosen = {family(problem) for _, problem in sanitize.selection(device)}
    assert chosen >= {family(layer.problem()) for layer in load()}


# -- the layers that say most ------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_important_layers_are_measured_as_records(stand_in_engine: engine_gpu.GpuEngine, tmp_path: Path) -> None:
    wanted = list(important.cases(("forward", "grad_weight"), rehearse=True))
    stand_in_engine.describe = lambda: {"name": "stand-in", "arch": "sm_90"}  # type: ignore[method-assign]
    file = records.Records(tmp_path / "records.jsonl")
    assert file.run(important.work(stand_in_engine, wanted, Method(1, 1.0), math.inf)) == 0
    result = important.result(records.read(tmp_path / "records.jsonl"))
    assert result is not None
    assert {m.direction for m in result.measurements} == {"forward", "grad_weight"}
    assert all(m.our_us is not None for m in result.measurements)
    assert {case.layer.name for case in important.cases()} == set(important.LAYERS)


def test_settings_of_a_case_are_those_of_its_layer() -> None:
    """The harness calls gpuconv with the settings that give the layer's problem."""
    for layer in load():
        problem = layer.problem()
        x = types.SimpleNamespace(shape=problem.input_shape, dtype=np.dtype("float32"))
        w = types.SimpleNamespace(shape=problem.weight_shape, dtype=np.dtype("float32"))
        b = types.SimpleNamespace(shape=(problem.C_out,), dtype=np.dtype("float32")) if problem.has_bias else None
        construct = ConvProblem.conv_transpose1d if problem.transposed else ConvProblem.conv1d
        assert construct(x, w, b, **cases.call_settings(problem)) == problem


# -- gradients ---------------------------------------------------------------------------------------------------------

GRADIENTS = ("grad_input", "grad_weight")
SMALL_LAYERS = ("tacotron2.location_conv_k31_b1", "phasenet.up3_k7s4", "inceptiontime.k40_same")


@pytest.mark.torch
@pytest.mark.parametrize("direction", GRADIENTS)
@pytest.mark.parametrize("name", SMALL_LAYERS)
@pytest.mark.parametrize("mode", [FLOAT32, BFLOAT16, MODES[-1]], ids=lambda mode: mode.name)
def test_gpu_engine_measures_gradients(
    stand_in_engine: engine_gpu.GpuEngine, mode: Mode, name: str, direction: Any
) -> None:
    case = replace(case_of(name, mode), direction=direction)
    m = measure(case, stand_in_engine, Method(3, 100.0), time.monotonic)
    assert m.ours.status == "measured", m.ours.note
    assert m.direction == direction
    assert m.bytes == case.problem.bytes()  # the same three arrays as the forward pass without a bias
    assert case.name.endswith(f"{mode.name} {direction}")
    assert ("weight_gradient" in m.family) == (direction == "grad_weight")
    outcomes = {o.subject: o for o in m.outcomes}
    assert ("PyTorch, TF32 allowed" in outcomes) == (mode is FLOAT32)
    if mode is MODES[-1]:
        assert outcomes["PyTorch"].status == "refused"
    elif name != "phasenet.up3_k7s4":  # whose weight gradient PyTorch's CPU build may compute wrongly
        assert outcomes["PyTorch"].status == "measured"


@pytest.mark.parametrize("direction", GRADIENTS)
def test_cpu_engine_measures_gradients(direction: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cpu, "measure_ceilings", lambda: FAKE_CEILINGS)
    for name in SMALL_LAYERS:
        case = replace(case_of(name), direction=direction)
        m = measure(case, engine_cpu.CpuEngine(), Method(2, 1.0, ("eager",)), time.monotonic)
        assert m.ours.status == "measured", m.ours.note
        assert m.ours.error is not None
        assert m.ours.error < 1e-5
        peer = ("measured", "wrong") if peers.optional_module("torch") else ("absent",)
        assert all(o.status in peer for o in m.outcomes[1:])
        assert m.family.startswith("numpy ")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("direction", GRADIENTS)
def test_a_wrong_gradient_is_found(direction: Any, transposed: bool) -> None:
    problem = ConvProblem("conv_transpose1d" if transposed else "conv1d", 2, 6, 4, 50, 5, 2, 1, 2, 1, 2)
    x, w, dy = engine_cpu.random_arrays(problem, np.random.default_rng(3), direction)
    oracle = oracle_of(problem, direction, x.__getitem__, w.__getitem__, dy.__getitem__)
    good = our_function(problem, direction, "float32")(x, w, dy)
    assert good.shape == result_shape(problem, direction)

    def judge(result: Any) -> Any:
        return oracle.judge(lambda part: result[part], mode="float32", all_finite=True, bounded=True)

    assert judge(good).ok
    bad = good.copy()
    bad.flat[0] *= 1.001
    assert "outside the error bound" in judge(bad).note
    assert not judge(np.roll(good, 1, axis=-1)).ok


def test_weight_windows_begin_at_any_tap() -> None:
    """Of a long kernel few taps are judged, each at its own offset."""
    problem = ConvProblem("conv1d", 1, 2, 2, 3_000_000, 40, 1, 20, 19, groups=2)
    x, w, dy = engine_cpu.random_arrays(problem, np.random.default_rng(4), "grad_weight")
    oracle = oracle_of(problem, "grad_weight", x.__getitem__, w.__getitem__, dy.__getitem__)
    result = our_function(problem, "grad_weight", "float32")(x, w, dy)
    seen = []
    verdict = oracle.judge(
        lambda part: (seen.append(part), result[part])[1], mode="float32", all_finite=True, bounded=True
    )
    assert verdict.ok, verdict.note
    assert {part[2].start for part in seen} >= {0, 40 - 16}


def test_one_run_measures_one_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cpu, "measure_ceilings", lambda: FAKE_CEILINGS)
    path = tmp_path / "run.json"
    options = ["--direction", "grad_weight", "--filter", "vocos", "--repeats", "2", "--out", str(path)]
    assert run.main(["--device", "cpu", *options]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["settings"]["direction"] == "grad_weight"
    assert [m["direction"] for m in document["measurements"]] == ["grad_weight"]


def test_sanitizer_runs_gradient_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device.from_arch("sm_90")
    whole = list(sanitize.gradient_selection(device))
    gradients = [WeightGradientProblem.of(problem) for _, problem in whole]
    chosen = {dispatch.choose_gradient(p, GradientLayout.contiguous(p), device).family for p in gradients}
    assert chosen >= {"weight_gradient_pairs", "weight_gradient_tiled", "weight_gradient_direct"}
    small = list(sanitize.gradient_selection(device, max_flops=300_000))
    assert len(small) >= 4
    # NumPy's arrays in place of CuPy's: what is checked, and how it is judged, is the same.
    monkeypatch.setattr(runtime, "cupy_module", lambda: types.SimpleNamespace(asarray=np.asarray, asnumpy=np.asarray))
    assert all(sanitize.check_gradients(problem)["ok"] for _, problem in small)
