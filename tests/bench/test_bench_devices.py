"""The devices that the benchmarks measure on, what they believe of a result, and the peers beside them."""

from __future__ import annotations

import contextlib
import cProfile
import json
import math
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cpu as bench_cpu
from bench import overhead, streaming
from bench.gpu_report import important, records, sanitize
from bench.layers import Layer, load, published_ceilings
from bench.modes import DIRECTIONS, MODES, Mode, our_function, result_shape
from bench.speed import __main__ as speed
from bench.speed import check, gpu, peers, results
from bench.speed.check import Verdict, oracle_of
from bench.speed.measure import Absent, Case, Method, Refused, measure
from bench.speed.results import Measurement
from gpuconv import cpu, dispatch, reference, runtime
from gpuconv.device import Device
from gpuconv.families import Layout
from gpuconv.families.base import PACKED
from gpuconv.problem import ConvProblem, WeightGradientProblem
from tests.bench.test_bench import CEILINGS, FLOAT32, LAYERS

# A layer with the same padding on both sides, a transposed one, and one whose padding differs.
TINY = {
    "symmetric": Layer("symmetric", ConvProblem("conv1d", 1, 2, 12, 90, 31, 1, 15, 15)),
    "transposed": Layer("transposed", ConvProblem("conv_transpose1d", 1, 12, 8, 30, 7, 4, 1, 1, has_bias=True)),
    "asymmetric": Layer("asymmetric", ConvProblem("conv1d", 1, 8, 8, 60, 12, 1, 5, 6)),
}


def case_of(name: str, mode: Mode = FLOAT32, direction: Any = "forward") -> Case:
    return Case(TINY[name], mode, 1, direction)


@pytest.fixture(autouse=True)
def quick_samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Collecting garbage before every sample, and idle threads that spin, would be most of what these tests do."""
    monkeypatch.setattr("gpuconv.measure.gc", types.SimpleNamespace(collect=int, disable=int, enable=int))
    torch = peers.optional_module("torch")
    threads = torch and torch.get_num_threads()
    if torch:
        torch.set_num_threads(1)
    yield
    if torch:
        torch.set_num_threads(threads)


def shrink(layer: Layer) -> ConvProblem:
    """The layer with few samples, positions and channels of a group, its settings kept."""
    p = layer.problem()
    groups = min(p.groups, 4)
    C_in, C_out = min(p.C_in_g, 3) * groups, min(p.C_out_g, 6) * groups
    return replace(sanitize.shrunk(p, 90), C_in=C_in, C_out=C_out, groups=groups, K=min(p.K, 60))


SHRUNK = {name: shrink(layer) for name, layer in LAYERS.items()}


def arrays(problem: ConvProblem, direction: Any = "forward") -> tuple[Any, Any, Any]:
    return bench_cpu.random_arrays(problem, np.random.default_rng(1), direction)


def judge(problem: ConvProblem, output: Any, direction: Any = "forward", mode: str = "float32") -> Verdict:
    """Judge by the error bound in float32, and in other modes as a peer's result."""
    oracle = oracle_of(problem, direction, [a if a is None else a.__getitem__ for a in arrays(problem, direction)])
    finite = bool(np.isfinite(output).all())
    return oracle.judge(output.__getitem__, mode=mode, all_finite=finite, bounded=mode == "float32")


def computed(problem: ConvProblem, *given: Any) -> Any:
    output = np.empty(problem.output_shape, np.float32)
    cpu.convolve(problem, *(given or arrays(problem)), output)
    return output


def test_windows_are_parts_of_the_whole() -> None:
    for problem in SHRUNK.values():
        x, w, b = arrays(problem)
        whole = reference.compute(problem, x, w, b)
        seen = np.zeros(problem.output_shape, bool)
        for window in check.windows(problem):
            bias = None if b is None else b[window.bias]
            part = reference.compute(window.problem, x[window.input], w[window.weight], bias)
            np.testing.assert_allclose(part, whole[window.output], rtol=1e-12, atol=1e-12, err_msg=str(problem))
            seen[window.output] = True
        corners = seen[np.ix_(*[sorted({0, extent - 1}) for extent in seen.shape])]
        assert corners[:, [0, -1], :].all(), problem


CHECKED = ("hifigan_v1.up1_k16s8_b1", "conformer_l.dw_k31", "whisper_base.conv2_b1", "minirocket.k9_d8_mult84")


@pytest.mark.parametrize("name", CHECKED)
def test_right_results_pass_and_one_wrong_element_in_a_corner_is_found(name: str) -> None:
    problem = SHRUNK[name]
    output = computed(problem)
    for mode in ("float32", "bfloat16"):
        verdict = judge(problem, output, mode=mode)
        assert verdict.ok
        assert 0 < verdict.error < 1e-6
    for place in [(0, 0, 0), (-1, -1, -1), (0, -1, 0), (-1, 0, -1)]:
        spoiled = output.copy()
        spoiled[place] += np.float32(1e-3)
        assert "outside the error bound (1 of" in judge(problem, spoiled).note


def test_unwritten_elements_and_missing_taps_are_found() -> None:
    problem = replace(SHRUNK["conformer_l.dw_k31"], L_in=5000)
    output = computed(problem)
    output[0, 1, 2345] = np.nan
    assert "not every element" in judge(problem, output).note
    problem = SHRUNK["whisper_base.conv2_b1"]
    x, w, b = arrays(problem)
    w[:, :, -1] = 0
    assert "relative error" in judge(problem, computed(problem, x, w, b), mode="bfloat16").note


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("direction", ["grad_input", "grad_weight"])
def test_a_wrong_gradient_is_found(direction: Any, transposed: bool) -> None:
    problem = ConvProblem("conv_transpose1d" if transposed else "conv1d", 2, 6, 4, 50, 5, 2, 1, 2, 1, 2)
    good = our_function(problem, direction, "float32")(*arrays(problem, direction))
    assert good.shape == result_shape(problem, direction)
    assert judge(problem, good, direction).ok
    bad = good.copy()
    bad.flat[0] *= 1.001
    assert "outside the error bound" in judge(problem, bad, direction).note
    assert not judge(problem, np.roll(good, 1, axis=-1), direction).ok


def test_weight_windows_begin_at_any_tap() -> None:
    """A few taps of a long kernel are judged, each at its own offset."""
    problem = ConvProblem("conv1d", 1, 2, 2, 3_000_000, 40, 1, 20, 19, groups=2)
    x, w, dy = arrays(problem, "grad_weight")
    oracle = oracle_of(problem, "grad_weight", [x.__getitem__, w.__getitem__, dy.__getitem__])
    result, seen = our_function(problem, "grad_weight", "float32")(x, w, dy), []
    verdict = oracle.judge(
        lambda part: (seen.append(part), result[part])[1], mode="float32", all_finite=True, bounded=True
    )
    assert verdict.ok, verdict.note
    assert {part[2].start for part in seen} >= {0, 40 - 16}


@pytest.mark.torch
def test_peers_compute_the_layers() -> None:
    import torch

    for problem in SHRUNK.values():
        given = arrays(problem)
        expected = reference.compute(problem, *given)
        x, w, b = (None if a is None else torch.from_numpy(a) for a in given)
        found = []
        for build in (
            peers.conv_by_trimming,
            peers.conv_by_padding,
            lambda p: peers.conv_channels_last(p, convert=True),
        ):
            with contextlib.suppress(Refused):
                found.append(build(problem)(x, w, b))
        assert len(found) >= 2 or problem.transposed
        if peers.is_symmetric(problem):
            kept = peers.conv_channels_last(problem, convert=False)
            found.append(kept(peers.to_channels_last(x), peers.to_channels_last(w), b).squeeze(2))
        for y in found:
            np.testing.assert_allclose(y.numpy(), expected, rtol=1e-3, atol=1e-4, err_msg=str(problem))


@pytest.mark.torch
def test_causal_conv1d_is_used_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = SHRUNK["mamba_2p8b.conv_k4_b1"]
    with pytest.raises(Absent, match="not installed"):
        peers.causal_conv(problem)
    module = types.SimpleNamespace(causal_conv1d_fn=lambda x, w, b: (x, w, b))
    monkeypatch.setattr(peers, "optional_module", lambda _: module)
    x, w, b = arrays(problem)
    assert [a.shape for a in peers.causal_conv(problem)(x, w, b)] == [x.shape, (w.shape[0], 4), b.shape]
    names = ("conformer_l.dw_k31", "whisper_base.conv2_b1", "styletts2.f0_pool_dw_k3s2_op1")
    for other in (*(SHRUNK[name] for name in names), replace(problem, dtype="float64")):
        with pytest.raises(Refused):
            peers.causal_conv(other)


@pytest.mark.torch
def test_cudnn_settings_hold_inside_their_context() -> None:
    import torch

    cudnn = torch.backends.cudnn
    for tf32 in (False, True):
        with peers.CudnnSettings(allow_tf32=tf32, deterministic=True).context():
            assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (True, True, tf32)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measurement]:
    """Measures a case, or runs the command, on the CPU in no time, with published-like ceilings and all threads."""
    monkeypatch.setattr(bench_cpu, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(bench_cpu, "TURN", 0.0)
    monkeypatch.setattr(bench_cpu, "limited", lambda _: contextlib.nullcontext(["a library"]))
    method = Method(2, 1.0, ("eager",), least=True)
    return lambda case: measure(case, bench_cpu.CpuEngine(pause=0), method, time.monotonic)


@pytest.mark.torch
@pytest.mark.usefixtures("on_cpu")
def test_cpu_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    options = ["--repeats", "3", "--pause", "0", "--json", str(path)]
    assert bench_cpu.main(["--filter", "vocos|tacotron2.location", *options]) == 0
    result = results.read(path)
    assert {m.layer for m in result.measurements} == {"vocos.dwconv_k7_b1", "tacotron2.location_conv_k31_b1"}
    for m in result.measurements:
        assert m.ours.eager is not None
        assert (m.ours.eager.repeats, m.ours.replay) == (3, None)
        assert [o.status for o in m.outcomes] == ["measured", "measured"]
        assert m.family == cpu.method(LAYERS[m.layer].problem()).name
    assert "vocos.dwconv_k7_b1" in capsys.readouterr().out
    assert speed.main(["--compare", str(path), str(path)]) == 0
    assert "1.000" in capsys.readouterr().out
    options += ["--direction", "grad_weight", "--threads", "1,2"]
    assert bench_cpu.main(["--shapes", "--filter", "small call", *options]) == 0
    (m,) = results.read(tmp_path / "cpu-2.json").measurements
    assert (m.layer, m.direction) == ("small call 1x16x100", "grad_weight")


def test_a_turn_begins_with_a_call_that_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cpu, "TURN", 0.02)
    calls: list[float] = []
    times = bench_cpu.CpuEngine(0, CEILINGS).sample(lambda: (calls.append(1), time.sleep(0.005))[1])
    assert len(calls) == len(times) + 1 >= 3
    assert all(us >= 5000 for us in times)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_cpu_engine_measures_every_format_and_pass(on_cpu: Callable[..., Measurement], mode: Mode) -> None:
    has_torch = peers.optional_module("torch") is not None
    for name, direction in zip(TINY, DIRECTIONS, strict=True):
        m = on_cpu(case_of(name, mode, direction=direction))
        assert m.ours.status == "measured", m.ours.note
        assert m.direction == direction
        refused = mode.name == "tf32" or (mode.name == "complex64" and direction != "forward")
        peer = "absent" if not has_torch else "refused" if refused else "measured"
        assert m.outcomes[1].status == peer, m.outcomes[1].note


@pytest.mark.torch
@pytest.mark.parametrize("spoil", ["window", "elsewhere", "unwritten"])
@pytest.mark.usefixtures("on_cpu")
def test_wrong_numpy_path_gets_no_figure(spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.convolve

    def wrong(problem: ConvProblem, x: Any, w: Any, b: Any, output: Any) -> None:
        right(problem, x, w, b, output)
        place = (0, 0, 0) if spoil == "window" else (0, 300, problem.L_out // 2 + 7)
        output[place] = np.nan if spoil == "unwritten" else output[place] + 0.5

    monkeypatch.setattr(cpu, "convolve", wrong)
    path = tmp_path / "cpu.json"
    assert bench_cpu.main(["--filter", "vocos", "--repeats", "1", "--pause", "0", "--json", str(path)]) == 1
    (m,) = results.read(path).measurements
    assert (m.ours.status, m.our_us) == ("wrong", None)
    assert m.outcomes[1].status == "measured"


@pytest.mark.parametrize(
    "arguments",
    ["--repeats 0", "--threads x", "--modes int8", "--filter none", "--minutes 0", "--compare a.json b.json"],
)
def test_bad_usage(arguments: str) -> None:
    main = speed.main if arguments.startswith(("--minutes", "--compare")) else bench_cpu.main
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2


def test_asking_for_a_gpu_that_is_not_there(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(speed, "missing_gpu", lambda: "no GPU: none")
    assert speed.main([]) == 3
    assert "no GPU: none" in capsys.readouterr().out


class StandInEvent:
    time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


class StandInStream(contextlib.nullcontext[None]):
    ptr = 1

    def synchronize(self) -> None:
        pass

    def begin_capture(self) -> None:
        pass

    def end_capture(self) -> Any:
        return types.SimpleNamespace(upload=lambda _: None, launch=lambda _: time.sleep(1e-5))


@pytest.fixture
def stand_in_engine(monkeypatch: pytest.MonkeyPatch) -> gpu.GpuEngine:
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
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: time.sleep(1e-5)),
        "graph": lambda *_, **__: contextlib.nullcontext(),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu, "sets_for", lambda *_: 3)
    monkeypatch.setattr(gpu, "_POOL", 1 << 16)
    engine = object.__new__(gpu.GpuEngine)
    engine.cupy, engine.index, engine.torch = cupy, 0, torch
    engine.device = replace(Device.from_arch("sm_90"), l2_bytes=4096)
    engine.stream, engine._start, engine._stop = StandInStream(), StandInEvent(), StandInEvent()
    engine._read = np.sum
    engine.ceilings = published_ceilings(engine.device)
    return engine


METHOD = Method(2, 1.0)


@pytest.mark.torch
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", TINY)
def test_gpu_engine_measures_every_implementation(stand_in_engine: gpu.GpuEngine, name: str, direction: Any) -> None:
    symmetric, is_forward = name != "asymmetric", direction == "forward"
    for mode in MODES:
        case = case_of(name, mode, direction=direction)
        m = measure(case, stand_in_engine, METHOD, time.monotonic)
        assert m.ours.status == "measured", m.ours.note
        assert m.bytes == case.problem.bytes()  # of a gradient, those of the forward pass without a bias
        assert ("weight_gradient" in m.family) == (direction == "grad_weight")
        outcomes = {o.subject: o for o in m.outcomes}
        assert ("PyTorch, TF32 allowed" in outcomes) == (mode is FLOAT32)
        assert all(None not in (o.replay, o.eager, o.error) for o in m.outcomes if o.status == "measured")
        torch = {outcomes["PyTorch"].status, outcomes["PyTorch deterministic"].status}
        if not is_forward:
            # The weight gradient of a transposed layer may be wrong in PyTorch's CPU build.
            wrong = {"wrong"} if name == "transposed" else set()
            assert torch <= ({"refused"} if mode.name == "complex64" else {"measured", *wrong})
            continue
        assert torch == {"measured"}
        assert outcomes["causal-conv1d"].status == "absent"
        assert (outcomes["PyTorch through channels_last"].status == "measured") == symmetric
        assert ("PyTorch, F.pad" in outcomes) != symmetric
        assert not outcomes["PyTorch on channels_last data"].comparable
        layout = replace(Layout.contiguous(case.problem), is_prepared=True)
        choice = dispatch.choose(case.problem, layout, stand_in_engine.device)
        assert choice is not None
        packs = choice.plan.scratch_bytes(PACKED) > 0
        assert outcomes[results.PREPARED].status == ("measured" if packs else "refused")
        assert m.best_peer() is not outcomes[results.PREPARED]
        assert (m.prepared_ratio is not None) == packs


@pytest.mark.torch
def test_poison_is_not_finite_in_any_format(stand_in_engine: gpu.GpuEngine) -> None:
    import torch

    for mode in MODES:
        problem = replace(SHRUNK["conformer_l.dw_k31"], dtype=mode.dtype)
        data = gpu.Data(stand_in_engine.cupy, problem, 2)
        x, w, _ = data.sets[0]
        assert (x.shape, w.shape, x.dtype.name) == (problem.input_shape, problem.weight_shape, mode.dtype)
        assert 0.9 < x.astype(np.complex64).real.std() < 1.1
        assert gpu.all_finite(stand_in_engine.cupy, x)
        assert not np.array_equal(x, data.sets[1][0])
        poisoned = data.poisoned()
        assert poisoned.shape == problem.output_shape
        assert not gpu.all_finite(stand_in_engine.cupy, poisoned)
        assert np.isnan(poisoned.astype(np.complex64)).all()
        assert data.tensors(torch)[0][0].data_ptr() == x.ctypes.data


@pytest.mark.torch
def test_gpu_engine_finds_a_wrong_kernel(stand_in_engine: gpu.GpuEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.convolve

    def wrong(problem: ConvProblem, x: Any, w: Any, b: Any, output: Any) -> None:
        right(problem, x, w, b, output)
        output[0, 9, 7] += 0.5

    monkeypatch.setattr(cpu, "convolve", wrong)
    m = measure(case_of("symmetric"), stand_in_engine, METHOD, time.monotonic)
    assert (m.ours.status, m.our_us) == ("wrong", None)
    assert m.outcomes[1].status == "measured"


@pytest.mark.torch
def test_important_layers_are_measured_as_records(stand_in_engine: gpu.GpuEngine, tmp_path: Path) -> None:
    stand_in_engine.describe = lambda: {"name": "stand-in"}  # type: ignore[method-assign]
    file = records.Records(tmp_path / "records.jsonl")
    passes = ("forward", "grad_weight")
    assert file.run(important.work(passes, seconds=math.inf, rehearse=True, engine=stand_in_engine)) == 0
    result = important.result(records.read(tmp_path / "records.jsonl"))
    assert result is not None
    assert {m.direction for m in result.measurements} == set(passes)
    assert all(m.our_us is not None for m in result.measurements)
    assert {case.layer.name for case in important.cases()} == set(important.LAYERS)


def test_overhead_without_a_gpu(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(overhead, "missing_gpu", lambda: "no GPU: none")
    path = tmp_path / "overhead.json"
    assert overhead.main(["--json", str(path)]) == 0
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["absent"] == {"GPU parts": "no GPU: none"}
    assert all(0 < us < 1e5 for us in document["figures_us"].values())
    assert "absent" in capsys.readouterr().out


def test_a_repeated_call_validates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with overhead.stand_ins() as given:
        call = overhead.call_with_out(*given)
        call()
        monkeypatch.setattr(ConvProblem, "conv1d", None)
        call()


def test_a_repeated_call_calls_little() -> None:
    """The host's time is that of calls: of Python functions, and of those of CuPy and of Python itself."""

    def count(work: Callable[[], object]) -> int:
        profile = cProfile.Profile()
        profile.runcall(work)
        return sum(entry.callcount for entry in profile.getstats())

    with overhead.stand_ins() as given:
        calls = overhead.call_with_out(*given), overhead.call_with_lengths(*given)
        for call in calls:
            call()
        assert count(calls[0]) <= 25
        assert count(calls[1]) <= 80


def test_sanitizer_runs_every_family_that_the_layers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device.from_arch("sm_90")

    def family(problem: ConvProblem | WeightGradientProblem) -> str | None:
        choice = dispatch.choose(problem, Layout.contiguous(problem), device)
        return None if choice is None else choice.family

    selected = list(sanitize.selection(device))
    assert {family(problem) for direction, _, problem in selected if direction == "forward"} >= {
        family(layer.problem()) for layer in load()
    }
    gradients = {family(WeightGradientProblem.of(problem)) for way, _, problem in selected if way == "grad_weight"}
    assert gradients >= {"weight_gradient_pairs", "weight_gradient_tiled", "weight_gradient_direct"}
    # NumPy's arrays in place of CuPy's: what is checked, and how it is judged, is the same.
    monkeypatch.setattr(runtime, "cupy_module", lambda: types.SimpleNamespace(asarray=np.asarray, asnumpy=np.asarray))
    small = [problem for _, _, problem in sanitize.selection(device, max_flops=300_000)]
    assert len(small) >= 4
    assert all(check(problem)["ok"] for problem in small for check in (sanitize.check, sanitize.check_gradients))


def test_streaming_on_the_cpu(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every layer is checked, and the table fits 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(streaming, "TURN_SECONDS", 0)
    path = tmp_path / "streaming.json"
    assert streaming.main(["--device", "cpu", "--turns", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["layer"] for row in rows] == list(streaming.PUSHES)
    assert all(row["layer"] in printed and row["push_us"] > 0 for row in rows)
    assert "…" not in printed
    with pytest.raises(SystemExit):
        streaming.main(["--slots", "1,0"])
    assert "--slots: must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.gpu
def test_streaming_on_a_gpu(tmp_path: Path, monkeypatch: Any) -> None:
    """Eager and in a CUDA graph; a push that differs from the call would end it."""
    monkeypatch.setattr(streaming, "TURN_SECONDS", 0)
    path = tmp_path / "streaming.json"
    names = "encodec_musicgen32.dec_final_k7_b1"
    assert streaming.main(["--layers", names, "--turns", "1", "--json", str(path)]) == 0
    assert [row["how"] for row in json.loads(path.read_text())["rows"]] == ["eager", "graph"]
