"""`algorithm="fft"` and "auto": every operation and gradient beside the float64 reference, inside the bound by norms.

The tests marked `gpu` run on the stand-in with NumPy's transforms in the place of cuFFT's, which it cannot run; all
else is what a GPU runs.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import cases, cli, dispatch, fft, grad, nn, reference, runtime, stream
from gpuconv.compile import configs_of
from gpuconv.device import ARCHITECTURES
from gpuconv.problem import DTYPES, ArraySpec, ConvProblem, Op, WeightGradientProblem
from tests.strategies import random_array

Array = npt.NDArray[Any]

MODES = ("zeros", "reflect", "replicate", "circular", "symmetric")


class Call:
    """A random call of one operation with arrays for its gradients."""

    def __init__(self, rng: np.random.Generator, dtype: str, longest: int = 500) -> None:
        self.op: Op = rng.choice(["conv1d", "conv_transpose1d"])
        groups, stride, dilation = (int(rng.integers(1, most)) for most in (4, 6, 5))
        C_in_g, C_out_g = (int(n) for n in rng.choice([1, 1, 2, 3, 9], 2))
        K = int(rng.integers(1, 9) if rng.random() < 0.5 else rng.integers(9, 100))
        span, L = dilation * (K - 1) + 1, int(rng.integers(1, longest))
        left, right = (int(n) for n in rng.integers(0, span + 3, 2)) if rng.random() < 0.7 else (0, 0)
        self.settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
        if self.op == "conv1d":
            mode = str(rng.choice(MODES))
            if mode != "zeros":
                left, right = min(left, L - 1), min(right, L - 1)
            L = max(L, span - left - right)
            self.settings["padding_mode"] = mode
        else:
            L = max(L, 2 + (left + right - span) // stride)
            self.settings["output_padding"] = int(rng.integers(0, max(stride, dilation)))
        self.settings["padding"] = (left, right)
        C_in, C_out = groups * C_in_g, groups * C_out_g
        shape = (int(rng.integers(1, 4)), C_in, L) if rng.random() < 0.8 else (C_in, L)
        self.x = random_array(rng, shape, dtype)[..., ::-1]
        self.w = random_array(rng, (C_out, C_in_g, K) if self.op == "conv1d" else (C_in, C_out_g, K), dtype)
        self.b = random_array(rng, (C_out,), dtype) if rng.random() < 0.5 else None
        self.problem = ConvProblem.of(self.op, self.x, self.w, self.b, **self.settings)
        self.u = random_array(rng, self.problem.output_shape, dtype)

    def comparisons(self, algorithm: str = "fft", put: Any = lambda array: array) -> Iterator[reference.Comparison]:
        """The output and the gradients beside the reference, computed on the arrays that `put` makes."""
        p, q = self.problem, WeightGradientProblem.of(self.problem)
        x, w, u = map(put, (self.x, self.w, self.u))
        b, more = None if self.b is None else put(self.b), {**self.settings, "algorithm": algorithm}
        get = getattr(x, "get", None)
        results = (
            getattr(gpuconv, p.op)(x, w, b, **more),
            getattr(grad, f"{p.op}_input")(p.input_shape, w, u, **more),
            getattr(grad, f"{p.op}_weight")(x, p.weight_shape, u, **more),
        )
        sums = (
            reference.convolution(p, self.x, self.w, self.b, by_fft=True),
            reference.input_gradient(p, self.w, self.u, by_fft=True),
            reference.weight_gradient(q, *q.sides(self.x, self.u), by_fft=True),
        )
        for one, result in zip(sums, results, strict=True):
            yield one.compare(result if get is None else result.get())


def test_random_problems_are_within_the_bound() -> None:
    """Fails if a stride, a dilation, a padding of any mode, a group or a dtype reads or writes a wrong place."""
    rng, worst = np.random.default_rng(17), dict.fromkeys(DTYPES, 0.0)
    for number in range(300):
        dtype = DTYPES[number % len(DTYPES)]
        call = Call(rng, dtype)
        for comparison in call.comparisons():
            assert comparison.right.all(), (call.problem, comparison.worst)
            worst[dtype] = max(worst[dtype], comparison.worst)
    # A bound that nothing comes near would show nothing.
    assert all(fraction > 1e-3 for fraction in worst.values()), worst


@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_a_dropped_tap_is_outside_of_the_bound(op: Op) -> None:
    """Fails if the bound is so wide that one of 300 taps could be missing in float32."""
    rng = np.random.default_rng(3)
    x, w = (random_array(rng, shape, "float32") for shape in ((1, 2, 6000), (2, 2, 300)))
    first, second = (slice(None), 1) if op == "conv1d" else (1, slice(None))
    w[first, second, 123] = 1
    without = w.copy()
    without[first, second, 123] = 0
    sums = reference.convolution(ConvProblem.of(op, x, w), x, w, by_fft=True)
    assert sums.compare(getattr(gpuconv, op)(x, w, algorithm="fft")).worst < 0.25
    wrong = sums.compare(getattr(gpuconv, op)(x, without, algorithm="fft"))
    assert np.mean(~wrong.right) > 0.85


def test_the_gradients_are_adjoints() -> None:
    rng = np.random.default_rng(5)
    for number in range(40):
        call = Call(rng, ("float64", "complex128")[number % 2])
        p, more = call.problem, {**call.settings, "algorithm": "fft"}
        y = getattr(gpuconv, p.op)(call.x, call.w, **more)
        of_x = getattr(grad, f"{p.op}_input")(p.input_shape, call.w, call.u, **more)
        of_w = getattr(grad, f"{p.op}_weight")(call.x, p.weight_shape, call.u, **more)
        left = np.vdot(call.u, y)
        size = np.linalg.norm(call.u) * np.linalg.norm(y)
        assert abs(left - np.vdot(of_x, call.x)) <= 1e-12 * size, p
        assert abs(left - np.vdot(call.w.conj(), of_w.conj())) <= 1e-12 * size, p


def shifted_layer(C: int, groups: int) -> tuple[Array, Array, int]:
    """Two samples, in which the second block of the first is the third of the second; and the results of a block."""
    rng = np.random.default_rng(11)
    w = random_array(rng, (C, C // groups, 100), "float32")
    p = ConvProblem.conv1d(ArraySpec((1, C, 400), "float32"), w, groups=groups)
    plan = fft.Plan.of(p, on_gpu=False)
    new = plan.overlap.new
    x = random_array(rng, (2, C, 6 * new), "float32")
    x[1, :, 2 * new : 2 * new + plan.overlap.block] = x[0, :, new : new + plan.overlap.block]
    return x, w, new


@pytest.mark.parametrize(
    "name", ["wide_filters", "wide_stride", "up_wide_stride", "up_wide_narrow", "reflect_long_sum"]
)
def test_far_steps_take_no_more_memory_than_the_results(name: str) -> None:
    """Strides and dilations of 2**31, whose rows and phases exist in thought only."""
    (case,) = (case for case in (*cases.CASES, *cases.WIDE_CASES) if case.name == name)
    p, settings = case.at("float64"), {**dict(case.settings), "algorithm": "fft"}
    data, u = cases.random_data(p, 0), cases.random_grad_output(p, 0)
    y = getattr(gpuconv, p.op)(*data, **settings)
    assert reference.convolution(p, *data, by_fft=True).within_bound(y).all()
    g = getattr(grad, f"{p.op}_input")(p.input_shape, data.weight, u, **settings)
    assert reference.input_gradient(p, data.weight, u, by_fft=True).within_bound(g).all()


def test_bits_follow_the_block_and_not_its_place() -> None:
    """Channels by themselves, since NumPy's products of matrices depend on the number of their columns."""
    x, w, new = shifted_layer(3, 3)
    y = gpuconv.conv1d(x, w, groups=3, algorithm="fft")
    assert (y[1, :, 2 * new : 3 * new] == y[0, :, new : 2 * new]).all()
    alone = gpuconv.conv1d(x[:1, :, : 4 * new], w, groups=3, algorithm="fft")
    assert (alone[..., : 3 * new] == y[:1, :, : 3 * new]).all()


def test_memory_follows_the_layer_alone() -> None:
    """Fails if the spectra of a whole row are made, or `explain` says less than is taken."""
    w = np.ones((4, 4, 1000), np.float32)
    peaks = []
    for L in (100_000, 800_000):
        x, out = np.ones((1, 4, L), np.float32), np.empty((1, 4, L - 999), np.float32)
        explanation = gpuconv.explain("conv1d", x, w, algorithm="fft", device="cpu")
        assert explanation.by_fft is not None
        tracemalloc.start()
        gpuconv.conv1d(x, w, out=out, algorithm="fft")
        grad.conv1d_weight(x, w.shape, out, algorithm="fft")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert peaks[-1] <= explanation.by_fft.workspace_bytes, (L, peaks)
    assert peaks[1] <= 1.1 * peaks[0]


def test_no_call_takes_more_memory_than_explain_says() -> None:
    """Fails if a batch keeps the arrays of the one before, in the output or in the gradient of the weight."""
    for op, x, w, settings in (
        ("conv_transpose1d", (5, 8, 30000), (8, 8, 1), {"stride": 16, "dilation": 2, "groups": 8}),
        ("conv_transpose1d", (5, 1, 60000), (1, 1, 40), {"stride": 4, "dilation": 7}),
        ("conv1d", (1, 2, 60000), (8, 2, 300), {"padding": 150, "padding_mode": "reflect"}),
    ):
        data, weight = np.ones(x, np.float32), np.ones(w, np.float32)
        y = getattr(gpuconv, op)(data, weight, **settings, algorithm="fft")
        calls: dict[Any, Any] = {
            "forward": lambda: getattr(gpuconv, op)(data, weight, **settings, algorithm="fft", out=y),  # noqa: B023
            "grad_weight": lambda: getattr(grad, f"{op}_weight")(data, w, y, **settings, algorithm="fft"),  # noqa: B023
        }
        for direction, call in calls.items():
            found = gpuconv.explain(op, data, weight, **settings, algorithm="fft", direction=direction, device="cpu")
            tracemalloc.start()
            call()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert found.by_fft is not None
            assert peak <= found.by_fft.workspace_bytes + 2**15, (op, direction)


def test_a_prepared_weight_keeps_its_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Any] = []
    pack = fft.executor._Convolution.pack
    monkeypatch.setattr(
        fft.executor._Convolution, "pack", lambda self, weight: packed.append(weight) or pack(self, weight)
    )
    rng = np.random.default_rng(2)
    x, w = random_array(rng, (2, 6, 900), "complex64"), random_array(rng, (4, 3, 200), "complex64")
    handle = gpuconv.prepare(w)
    for part in (x, x[:1, :, :500]):
        y = gpuconv.conv1d(part, handle, groups=2, algorithm="fft")
        assert (y == gpuconv.conv1d(part, w, groups=2, algorithm="fft")).all()
    assert len(packed) == 1
    gpuconv.conv1d(x, handle, stride=2, groups=2, algorithm="fft")
    assert len(packed) == 2
    taps = gpuconv.prepare(w.real.copy())
    y = gpuconv.conv1d(x, taps, groups=2, algorithm="fft")
    np.testing.assert_allclose(y, gpuconv.conv1d(x, w.real, groups=2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_explain_counts_the_operations_of_the_fft(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transforms are those that run: of the input for each chunk of output channels, of the taps, and back."""
    done = 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            def transform(array: Array, length: int) -> Any:
                nonlocal done
                done += array.size // array.shape[-1]
                return getattr(np.fft, name)(array, length)

            return transform

    monkeypatch.setattr(fft.executor, "transforms", lambda _: Counting())
    monkeypatch.setitem(fft.plan.SPECTRA_BYTES, "cpu", 2**14)  # so that there are chunks
    monkeypatch.setitem(fft.plan.BATCH_BYTES, "cpu", 2**14)
    rng = np.random.default_rng(5)
    for _ in range(30):
        call = Call(rng, dtype)
        for direction, function in (("forward", call.op), ("grad_weight", f"{call.op}_weight")):
            done = 0
            arrays = (call.x, call.w) if direction == "forward" else (call.x, call.w.shape, call.u)
            module = gpuconv if direction == "forward" else grad
            getattr(module, function)(*arrays, **call.settings, algorithm="fft")
            found = gpuconv.explain(
                call.op, call.x, call.w, **call.settings, algorithm="fft", direction=direction, device="cpu"
            )
            plan = found.by_fft
            assert plan is not None
            o, (read, written) = plan.overlap, fft.plan.channels_of(plan.problem)
            spectra = plan.problem.groups * read * o.phases_in * written * o.phases_out
            products = 8 * spectra * plan.frequencies * plan.problem.N * o.rows * o.blocks
            one = (5 if dtype == "complex64" else 2.5) * o.block * np.log2(o.block)
            assert found.flops == pytest.approx(done * one + products, rel=1e-9), (call.op, call.settings)
    x, w = ArraySpec((1, 1, 96000), "float32"), ArraySpec((1, 1, 24000), "float32")
    for device, blocks in (("cpu", 1), ("sm_90", 32)):  # a GPU fills a batch up
        found = gpuconv.explain("conv1d", x, w, padding="causal", algorithm="fft", device=device)
        assert found.flops == round((2 * blocks + 1) * 2.5 * 2**17 * 17) + 8 * blocks * (2**16 + 1)
        assert "in place of 4.61 GFLOP of direct sums" in found.page()


def test_auto_chooses_by_the_layer_and_explain_shows_both_costs() -> None:
    rng = np.random.default_rng(4)
    for K, is_fft in ((3, False), (5000, True)):
        x, w = random_array(rng, (1, 1, 9000), "float32"), random_array(rng, (1, 1, K), "float32")
        y, expected = gpuconv.conv1d(x, w, algorithm="auto"), gpuconv.conv1d(x, w, algorithm="fft" if is_fft else None)
        assert (y == expected).all()
        gpuconv.testing.assert_within_bound(y[..., :50], gpuconv.conv1d, x[..., : K + 49], w, algorithm="auto")
        for direction in ("forward", "grad_input", "grad_weight"):
            for device in ("cpu", "sm_90"):
                found = [
                    gpuconv.explain(
                        "conv1d", ArraySpec((N, 1, L), "float32"), w, direction=direction, device=device,
                        algorithm="auto",
                    )
                    for N, L in ((1, K), (5, 10**6))
                ]  # fmt: skip
                assert len({explanation.costs for explanation in found}) == 1
                costs = found[0].costs
                assert costs is not None
                assert all((e.by_fft is not None) == is_fft == (costs.fft_us < costs.direct_us) for e in found)
                assert "costs" in found[1].page()
                assert found[1].to_dict()["costs"]["fft_us"] == costs.fft_us
                assert (found[1].to_dict()["fft"] is not None) == is_fft
    # Whatever the layer, there is an answer.
    far = ArraySpec((1, 300, 10), "float64")
    for stride, dilation in ((2**31 - 1, 1), (1, 2**31 - 1), (6, 2**31 - 2)):
        for device in (None, ARCHITECTURES["sm_90"]):
            w = np.empty((300, 300, 2))
            p = ConvProblem.conv1d(far, w, stride=stride, dilation=dilation, padding=2**31)
            assert fft.costs(p, device).fft_us > 0


def test_what_multiplies_spectra_is_compiled_in_advance() -> None:
    x, w = ArraySpec((1, 8, 1000), "float32"), ArraySpec((8, 4, 90), "float32")
    arch = ARCHITECTURES["sm_90"]
    settings = {"groups": 2, "algorithm": "fft"}
    configs = configs_of("compile", "conv1d", (x, w), arch, ("forward", "grad_input", "grad_weight"), settings)
    assert configs
    assert all(dict(config.macros)["DTYPE"] == "complex64" for config in configs)
    w = ArraySpec((8, 1, 90), "float32")
    assert configs_of("compile", "conv1d", (x, w), arch, ("forward",), {"groups": 8, "algorithm": "fft"}) == []


def test_what_is_not_finite_spoils_its_block_alone() -> None:
    x, w, new = shifted_layer(2, 2)
    expected = gpuconv.conv1d(x, w, groups=2, algorithm="fft")
    x[0, 1, new + 150] = np.inf
    y = gpuconv.conv1d(x, w, groups=2, algorithm="fft")
    assert not np.isfinite(y[0, 1, new : 2 * new]).any()
    spoilt = np.zeros(y.shape, np.bool_)
    spoilt[0, 1, new : 2 * new] = True
    assert (y[~spoilt] == expected[~spoilt]).all()
    gpuconv.testing.assert_within_bound(y, gpuconv.conv1d, x, w, groups=2, algorithm="fft")
    y[0, 1, new + 60] = 0  # one that the infinity feeds
    with pytest.raises(AssertionError, match=r"1 of .* elements are outside"):
        gpuconv.testing.assert_within_bound(y, gpuconv.conv1d, x, w, groups=2, algorithm="fft")


def test_the_bound_knows_where_transforms_overflow() -> None:
    """Fails if finite sums that spoil their block count as wrong, or if the bound of what fits is infinite."""
    rng = np.random.default_rng(6)
    for dtype, scales in (("float32", (1e-30, 1e30, 1e36, 3e37)), ("complex128", (1e-170, 1e170, 1e303, 1e307))):
        for number, scale in enumerate(scales):
            x, w = random_array(rng, (1, 2, 900), dtype), random_array(rng, (3, 2, 90), dtype)
            x[..., 450:] *= scale
            p = ConvProblem.conv1d(x, w)
            y = gpuconv.conv1d(x, w, algorithm="fft")
            found = reference.convolution(p, x, w, by_fft=True).compare(y)
            assert found.right.all()
            assert np.isfinite(found.bound[..., 450:]).any() == (number < 2)
            of_w = grad.conv1d_weight(x, w.shape, y0 := np.ones_like(y), algorithm="fft")
            q = WeightGradientProblem.of(p)
            assert reference.weight_gradient(q, *q.sides(x, y0), by_fft=True).within_bound(of_w).all()
        assert not np.isfinite(y).any()


def test_what_the_fft_does_not_take_is_refused_before_anything_is_computed() -> None:
    x, w = np.ones((2, 2, 50), np.float32), np.ones((2, 2, 3), np.float32)
    out = np.full((2, 2, 48), 7, np.float32)
    for settings, reason in (
        ({"activation": "relu"}, "fuses nothing"),
        ({"residual": out}, "fuses nothing"),
        ({"activation": "relu", "lengths": [50, 40]}, "fuses nothing"),
    ):
        with pytest.raises(
            dispatch.AlgorithmError, match=rf"^conv1d: algorithm 'fft' does not take conv1d .*: {reason}"
        ):
            gpuconv.conv1d(x, w, **settings, out=out.copy() if "residual" in settings else out, algorithm="fft")
        assert (out == 7).all()
        y = gpuconv.conv1d(x, w, **settings, algorithm="auto")
        assert (y == gpuconv.conv1d(x, w, **settings)).all()
    with pytest.raises(dispatch.AlgorithmError, match=r"takes no int16, whose sums are exact$"):
        gpuconv.conv_transpose1d(x.astype(np.int16), w.astype(np.int16), algorithm="fft")
    for call in (
        lambda: grad.conv1d_weight(x, w.shape, out, lengths=[50, 40], algorithm="fft"),
        lambda: gpuconv.explain("conv1d", x, w, direction="grad_weight", lengths=[50, 40], algorithm="fft"),
    ):
        with pytest.raises(
            dispatch.AlgorithmError, match=r"^conv1d_weight: algorithm 'fft' takes no lengths; expected"
        ):
            call()
    grad.conv1d_weight(x, w.shape, out, lengths=[50, 40], algorithm="auto")
    with pytest.raises(
        dispatch.AlgorithmError, match=r"^explain: algorithm must be None or one of base, bias_gradient"
    ):
        gpuconv.explain("conv1d", x, w, direction="grad_bias", algorithm="fft")
    with pytest.raises(ValueError, match=r'^stream\.Conv1d: algorithm must be None, "base" or .*, got \'auto\': '):
        stream.Conv1d(nn.Conv1d(2, 2, 3, algorithm="auto"))


def test_lengths_give_what_each_sample_gives_alone() -> None:
    rng, lengths = np.random.default_rng(8), [300, 180, 40]
    x, w = random_array(rng, (3, 2, 300), "float64"), random_array(rng, (4, 2, 70), "float64")
    y = gpuconv.conv1d(x, w, stride=2, padding="same", lengths=lengths, algorithm="fft")
    g = grad.conv1d_input(x.shape, w, y, stride=2, padding="same", lengths=lengths, algorithm="fft")
    for n, length in enumerate(lengths):
        alone = gpuconv.conv1d(x[n, :, :length], w, stride=2, padding="same", algorithm="fft")
        assert (y[n, :, : alone.shape[-1]] == alone).all()
        assert not y[n, :, alone.shape[-1] :].any()
        of_input = grad.conv1d_input((2, length), w, alone, stride=2, padding="same", algorithm="fft")
        assert (g[n, :, :length] == of_input).all()


def test_layers_and_the_command_line_take_it(tmp_path: Any) -> None:
    layer = nn.Conv1d(2, 3, 40, padding="same", padding_mode="reflect", rng=0, algorithm="fft")
    x = random_array(np.random.default_rng(1), (1, 2, 500), "float32")
    expected = gpuconv.conv1d(x, layer.weight, layer.bias, padding="same", padding_mode="reflect", algorithm="fft")
    assert (layer(x) == expected).all()
    assert "algorithm=fft" in repr(layer)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "w.npy", layer.weight)
    names = [str(tmp_path / name) for name in ("x.npy", "w.npy", "y.npy")]
    assert cli.main(["conv1d", *names, "--algorithm", "fft", "--device", "cpu"]) == 0
    assert (np.load(names[2]) == gpuconv.conv1d(x, layer.weight, algorithm="fft")).all()


def test_numpy_transforms_where_scipy_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fft.executor, "_of_numpy", lambda: np.fft)
    rng = np.random.default_rng(21)
    for dtype in DTYPES:
        assert all(comparison.right.all() for comparison in Call(rng, dtype).comparisons())


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.gpu, "cupy_module", lambda: SimpleNamespace(fft=None))
    monkeypatch.setitem(__import__("sys").modules, "cupy.cuda", SimpleNamespace())
    with pytest.raises(ImportError, match=r'^algorithm "fft" needs cuFFT, which CuPy cannot load: .*cuda13-full'):
        fft.executor.transforms(SimpleNamespace())  # type: ignore[arg-type]


class OnTheHost:
    """NumPy's transforms of CuPy's arrays, each of which notes its shape."""

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.shapes = cupy, []

    def __getattr__(self, name: str) -> Any:
        def transform(array: Any, length: int) -> Any:
            self.shapes.append((name, array.shape))
            wide = getattr(np.fft, name)(self.cupy.asnumpy(array), length)
            narrow = {"float32": "complex64", "complex64": "complex64"}.get(str(array.dtype), "complex128")
            real = {"complex64": "float32", "complex128": "float64"}
            return self.cupy.asarray(wide.astype(real[narrow] if name == "irfft" else narrow))

        return transform


@pytest.fixture
def on_gpu(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnTheHost]:
    """Small batches of blocks, for several of them, and on the stand-in NumPy's transforms."""
    host = OnTheHost(cupy)
    monkeypatch.setattr(fft.executor, "transforms", lambda xp: host if xp is cupy else np.fft)
    monkeypatch.setitem(fft.plan.BATCH_BYTES, "gpu", 2**13)
    fft.choose.cache_clear()
    yield host
    fft.choose.cache_clear()


@pytest.mark.gpu
def test_a_gpu_is_within_the_bound(cupy: Any, on_gpu: OnTheHost) -> None:
    """All that is around the transforms, with products of matrices and without."""
    rng = np.random.default_rng(29)
    for dtype in ("float32", "float32", "complex64", "float32", "float32", "complex64", "float16"):
        call = Call(rng, dtype, longest=150)
        for comparison in call.comparisons(put=cupy.asarray):
            assert comparison.right.all(), (call.problem, comparison.worst)
    assert {name for name, _ in on_gpu.shapes} == {"rfft", "irfft", "fft", "ifft"}


@pytest.mark.gpu
def test_bits_on_a_gpu_follow_the_block_of_a_dense_layer(cupy: Any, on_gpu: OnTheHost) -> None:
    """Also: all transforms have one shape, whatever N and L are, and a prepared weight gives the same bits."""
    x, w, new = shifted_layer(4, 2)
    data, taps = cupy.asarray(x), cupy.asarray(w)
    y = gpuconv.conv1d(data, gpuconv.prepare(taps), groups=2, algorithm="fft").get()
    assert (y[1, :, 2 * new : 3 * new] == y[0, :, new : 2 * new]).all()
    shapes = set(on_gpu.shapes)
    small = gpuconv.conv1d(data[..., :9], taps[..., :3], groups=2, algorithm="auto")
    assert (small == gpuconv.conv1d(data[..., :9], taps[..., :3], groups=2)).all()
    out = cupy.zeros((1, 2 * (4 * new - 99), 4), np.float32).transpose(0, 2, 1)[..., ::-2]
    gpuconv.conv1d(data[:1, :, : 4 * new], taps, groups=2, algorithm="fft", out=out)
    assert (out.get()[..., : 3 * new] == y[:1, :, : 3 * new]).all()
    assert set(on_gpu.shapes) == shapes
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(
                RuntimeError, match=r"^conv1d: algorithm 'fft' makes plans of cuFFT, which cannot be done"
            ):
                gpuconv.conv1d(data, taps, groups=2, algorithm="fft", out=cupy.empty_like(data[..., 99:]))
        finally:
            stream.end_capture()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_spectra_are_packed_once(cupy: Any, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prepared weight keeps what the kernel of the products reads, and nothing else; the bits are the same."""
    monkeypatch.setitem(fft.plan.BATCH_BYTES, "gpu", 2**18)  # enough columns for a kernel that reads packed weights
    rng = np.random.default_rng(37)
    x, w = (cupy.asarray(random_array(rng, shape, "float32")) for shape in ((2, 8, 300), (16, 8, 20)))
    call = partial(gpuconv.conv1d, x, algorithm="fft")
    y = call(w).get()
    assert launched == ["pack_weight", "conv1d_tiled"]
    prepared = gpuconv.prepare(w)
    pool = cupy.get_default_memory_pool()
    assert (call(prepared).get() == y).all()
    assert launched == ["pack_weight", "conv1d_tiled"] * 2
    ((_, (packed,)),) = prepared._packed.values()
    found = gpuconv.explain("conv1d", x, w, algorithm="fft")
    assert found.to_dict()["fft"]["prepared_bytes"] == packed.memory.mem.size
    before = pool.used_bytes()
    assert (call(prepared).get() == y).all()
    assert pool.used_bytes() == before
    assert launched[4:] == ["conv1d_tiled"]


@pytest.mark.gpu
def test_cufft_itself(cupy: Any) -> None:
    rng = np.random.default_rng(31)
    for number in range(100):
        call = Call(rng, DTYPES[number % len(DTYPES)])
        assert all(comparison.right.all() for comparison in call.comparisons(put=cupy.asarray)), call.problem
