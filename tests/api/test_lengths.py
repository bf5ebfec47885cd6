"""Samples with lengths of their own, through the public functions: against PyTorch and calls on each sample alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gpuconv
from gpuconv import cases, grad, nn, reference, runtime
from gpuconv.problem import ArraySpec, BiasGradientProblem, ConvProblem, Op, WeightGradientProblem

Array = npt.NDArray[Any]

OPS: tuple[Op, ...] = ("conv1d", "conv_transpose1d")


def layers(count: int, seed: int, dtypes: tuple[str, ...]) -> Iterator[tuple[ConvProblem, dict[str, Any], list[int]]]:
    """Random batches: the problem of the longest sample, the settings of the call, and the lengths."""
    rng = np.random.default_rng(seed)
    found = 0
    while found < count:
        op = OPS[found % 2]
        L, K, groups = int(rng.integers(1, 30)), int(rng.integers(1, 6)), int(rng.integers(1, 3))
        settings: dict[str, Any] = {"stride": int(rng.integers(1, 4)), "dilation": int(rng.integers(1, 3))}
        words = ["valid", "same", "causal"] if op == "conv1d" else ["valid", "same"]
        numbers = [int(rng.integers(0, 4)), tuple(rng.integers(0, 4, 2).tolist())]
        settings["padding"] = [*words, *numbers][int(rng.integers(len(words) + 2))]
        if op == "conv1d":
            settings["padding_mode"] = str(rng.choice(["zeros", "zeros", "reflect", "circular", "replicate"]))
        elif not isinstance(settings["padding"], str):
            settings["output_padding"] = int(rng.integers(0, max(settings["stride"], settings["dilation"])))
        N, C_in, C_out = int(rng.integers(1, 6)), int(rng.integers(1, 4)) * groups, int(rng.integers(1, 4)) * groups
        weight = (C_out, C_in // groups, K) if op == "conv1d" else (C_in, C_out // groups, K)
        dtype = dtypes[found % len(dtypes)]
        specs = (ArraySpec((N, C_in, L), dtype), ArraySpec(weight, dtype), ArraySpec((C_out,), dtype))
        try:
            p = ConvProblem.of(op, *specs, groups=groups, **settings)
            least = 0 if p.padding_mode == "zeros" else 1
            lengths = [L, *rng.integers(least, L + 1, N - 1).tolist()]
            gpuconv.explain(op, *specs, groups=groups, **settings, lengths=lengths, device="cpu")
        except ValueError:
            continue  # no output, or a padding too long for its mode
        found += 1
        yield p, {**settings, "groups": groups}, lengths


def output_lengths(p: ConvProblem, settings: dict[str, Any], lengths: list[int]) -> list[int]:
    more = {name: settings[name] for name in ("stride", "padding", "dilation", "output_padding") if name in settings}
    found = gpuconv.output_lengths(lengths, p.K, **more, transposed=p.transposed)
    assert isinstance(found, np.ndarray)
    return [int(length) for length in found]


def alone(p: ConvProblem, settings: dict[str, Any], length: int) -> ConvProblem:
    """The problem of a sample of this length alone."""
    bias = ArraySpec((p.C_out,), p.dtype)
    return ConvProblem.of(
        p.op, ArraySpec((1, p.C_in, length), p.dtype), ArraySpec(p.weight_shape, p.dtype), bias, **settings
    )


def test_random_batches() -> None:
    """Forward and all gradients lie within the bounds of calls on each sample alone, with NaNs behind the samples."""
    for number, (p, settings, lengths) in enumerate(layers(120, 1, ("float32", "float16", "complex64", "float64"))):
        x, w, b = cases.random_data(p, number)
        u = cases.random_grad_output(p, number)
        L_out = output_lengths(p, settings, lengths)
        for n in range(p.N):
            x[n, :, lengths[n] :] = np.nan
            u[n, :, L_out[n] :] = np.inf
        what = (str(p), settings, lengths)
        y = getattr(gpuconv, p.op)(x, w, b, **settings, lengths=lengths)
        grad_x = getattr(grad, f"{p.op}_input")(x.shape, w, u, **settings, lengths=tuple(lengths))
        grad_w = getattr(grad, f"{p.op}_weight")(x, w.shape, u, **settings, lengths=np.array(lengths, np.uint8))
        grad_b = getattr(grad, f"{p.op}_bias")(u, lengths=L_out)
        exact_w, exact_b = np.zeros(w.shape, np.complex128), np.zeros(p.C_out, np.complex128)
        size_w, size_b = np.zeros(w.shape), np.zeros(p.C_out)
        for n, (length, wanted) in enumerate(zip(lengths, L_out, strict=True)):
            assert np.array_equal(y[n, :, wanted:], np.zeros((p.C_out, p.L_out - wanted))), what
            assert np.array_equal(grad_x[n, :, length:], np.zeros((p.C_in, p.L_in - length))), what
            if not wanted:
                assert not grad_x[n].any(), what
                continue
            q = alone(p, settings, length)
            assert q.L_out == wanted, what
            inputs, outputs = x[n : n + 1, :, :length], u[n : n + 1, :, :wanted]
            assert reference.within_bound(q, y[n : n + 1, :, :wanted], inputs, w, b).all(), what
            if length:
                found = reference.input_gradient(q, w, outputs).within_bound(grad_x[n : n + 1, :, :length])
                assert found.all(), what
            weight, bias = WeightGradientProblem.of(q), BiasGradientProblem.of(q)
            exact_w += reference.weight_gradient(weight, *weight.sides(inputs, outputs)).exact()
            exact_b += reference.bias_gradient(bias, outputs).exact()
            real = replace(weight, dtype="float64")
            size_w += reference.weight_gradient(real, *real.sides(np.abs(inputs), np.abs(outputs))).exact()
            size_b += np.abs(outputs).sum(axis=(0, 2))
        u_acc = np.finfo(np.float64 if p.dtype == "float64" else np.float32).eps
        for found, exact, size, terms in (
            (grad_w, exact_w, size_w, WeightGradientProblem.of(p).terms),
            (grad_b, exact_b, size_b, p.N * p.L_out),
        ):
            rounding = np.finfo(np.float16).eps * np.abs(exact) if p.dtype == "float16" else 0
            assert (np.abs(found - exact) <= 2 * (terms + 4) * u_acc * size + rounding + 1e-7).all(), what


@pytest.mark.torch
def test_against_pytorch() -> None:
    """Each sample is what PyTorch computes of it in float64; PyTorch pads no other way than with zeros here."""
    import torch

    count = 0
    for number, (p, settings, lengths) in enumerate(layers(80, 2, ("float64",))):
        if p.padding_mode != "zeros":
            continue
        x, w, b = cases.random_data(p, number)
        assert b is not None
        y = getattr(gpuconv, p.op)(x, w, b, **settings, lengths=lengths)
        for n, (length, L_out) in enumerate(zip(lengths, output_lengths(p, settings, lengths), strict=True)):
            if not (length and L_out):
                continue
            q = alone(p, settings, length)
            sample = torch.from_numpy(x[n : n + 1, :, :length])
            given = (torch.from_numpy(w), torch.from_numpy(b))
            if p.transposed:
                whole = torch.conv_transpose1d(sample, *given, q.stride, 0, 0, q.groups, q.dilation)
                whole = torch.nn.functional.pad(whole - given[1][:, None], (0, q.output_padding + 9))
                expected = whole[..., q.padding_left : q.padding_left + L_out] + given[1][:, None]
            else:
                padded = torch.nn.functional.pad(sample, q.padding)
                expected = torch.conv1d(padded, *given, q.stride, 0, q.dilation, q.groups)
            np.testing.assert_allclose(y[n : n + 1, :, :L_out], expected.numpy(), rtol=1e-10, atol=1e-10)
            count += 1
    assert count > 100


def test_the_lengths_of_outputs() -> None:
    for p, settings, lengths in layers(60, 3, ("float32",)):
        for length, L_out in zip(lengths, output_lengths(p, settings, lengths), strict=True):
            given = {name: value for name, value in settings.items() if name not in ("groups", "padding_mode")}
            function = getattr(gpuconv, f"{p.op}_output_length")
            if L_out:
                assert function(length, p.K, **given) == alone(p, settings, length).L_out == L_out
            else:
                with pytest.raises(ValueError, match=f"^{p.op}_output_length: the output length must be at least 1"):
                    function(length, p.K, **given)
    found = gpuconv.output_lengths([5, 0], [3], padding=1)
    assert found.dtype == np.int64
    assert found.tolist() == [5, 0]
    with pytest.raises(
        ValueError, match=r"^output_lengths: lengths must be from 0 to 2\*\*62 = \d+, got lengths\[1\] = -1"
    ):
        gpuconv.output_lengths([1, -1], 3)
    with pytest.raises(ValueError, match=r"^output_lengths: lengths must be from 0 to 2\*\*62 // stride = \d+, got"):
        gpuconv.output_lengths([2**62], 3, 8, transposed=True)
    with pytest.raises(TypeError, match=r"^output_lengths: lengths must be an array or a sequence of ints, got set"):
        gpuconv.output_lengths({1}, 3)
    with pytest.raises(TypeError, match=r"^conv1d_output_length: length must be an int, got float"):
        gpuconv.conv1d_output_length(1.0, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^conv_transpose1d_output_length: output_padding must be below"):
        gpuconv.conv_transpose1d_output_length(5, 3, output_padding=1)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1, 2], ValueError, r"lengths must have shape \(N,\) = \(3,\), got \(2,\)"),
        ([[1, 2, 3]], TypeError, r"lengths\[0\] must be an int, got list"),
        (np.ones((3, 1), np.int64), ValueError, r"lengths must have shape \(N,\) = \(3,\), got \(3, 1\)"),
        ([1, 2, 9], ValueError, r"lengths must be from 0 to L_in = 8, got lengths\[2\] = 9"),
        ([1, 2**70, 3], ValueError, rf"lengths must be from 0 to L_in = 8, got lengths\[1\] = {2**70}"),
        (np.array([1, 2, 3], object), TypeError, "lengths must be integers, got dtype object"),
        (np.array([3, -1, 2]), ValueError, r"lengths must be from 0 to L_in = 8, got lengths\[1\] = -1"),
        (np.array([3, 2**63, 2], np.uint64), ValueError, r"lengths must be .* got lengths\[1\] = 9223372036854775808"),
        ([1, 2, 3.0], TypeError, r"lengths\[2\] must be an int, got float 3.0"),
        ([1, True, 3], TypeError, r"lengths\[1\] must be an int, got the bool True"),
        (np.ones(3), TypeError, "lengths must be integers, got dtype float64"),
        (np.ones(3, np.bool_), TypeError, "lengths must be integers, got dtype bool"),
        (8, TypeError, "lengths must be a NumPy or CuPy array or a sequence of ints, got int"),
    ],
)
def test_bad_lengths_are_refused_before_anything_is_computed(
    lengths: Any, error: type[Exception], message: str
) -> None:
    x, w, out = np.ones((3, 2, 8)), np.ones((2, 2, 3)), np.full((3, 2, 6), 7.0)
    with pytest.raises(error, match=f"^conv1d: {message}"):
        gpuconv.conv1d(x, w, lengths=lengths, out=out)
    assert (out == 7).all()
    with pytest.raises(error, match=f"^conv1d_weight: {message}"):
        grad.conv1d_weight(x, w.shape, np.ones((3, 2, 6)), lengths=lengths)
    with pytest.raises(error, match="^conv1d_bias: " + message.replace("L_in", "L_out")):
        grad.conv1d_bias(np.ones((3, 2, 8)), lengths=lengths)


@pytest.mark.parametrize(("mode", "limit"), [("reflect", "below"), ("circular", "at most"), ("symmetric", "at most")])
def test_padding_modes_are_limited_by_each_sample(mode: str, limit: str) -> None:
    x, w = np.ones((3, 2, 8)), np.ones((2, 2, 3))
    message = (
        f"^conv1d: padding must be {limit} L_in = 2 on both sides .* got \\(3, 3\\), of which lengths\\[1\\] is 2$"
    )
    with pytest.raises(ValueError, match=message):
        gpuconv.conv1d(x, w, padding=3, padding_mode=mode, lengths=[8, 2, 0])
    # A sample that has no output reads nothing.
    y = gpuconv.conv1d(x, w, padding="causal", padding_mode=mode, lengths=[8, 3, 0])
    assert not y[2].any()


def test_what_else_a_call_may_give() -> None:
    """Fusion, integers, real taps, `out` of any layout and byte order, no axis of samples, layers."""
    rng = np.random.default_rng(4)
    lengths, L_out = [9, 2, 5], [9, 2, 5]
    x, w = rng.standard_normal((3, 2, 9)), rng.standard_normal((4, 2, 3))
    residual, alpha = rng.standard_normal((3, 4, 9)), np.abs(rng.standard_normal(4)) + 1
    for n, length in enumerate(lengths):
        x[n, :, length:] = residual[n, :, length:] = np.nan
    fused = {"residual": residual, "activation": ("snake", alpha), "input_activation": "gelu", "padding": 1}
    out: Array = np.full((3, 9, 4), np.nan, ">f8").swapaxes(1, 2)
    assert gpuconv.conv1d(x.astype(">f8"), w, **fused, lengths=lengths, out=out) is out
    for n, (length, wanted) in enumerate(zip(lengths, L_out, strict=True)):
        own = {**fused, "residual": residual[n, :, :wanted]}
        np.testing.assert_allclose(out[n, :, :wanted], gpuconv.conv1d(x[n, :, :length], w, **own), rtol=1e-12)
        assert not out[n, :, wanted:].any()

    integers, taps = rng.integers(-9, 9, (3, 2, 9), np.int8), rng.integers(-9, 9, (2, 4, 3), np.int8)
    y = gpuconv.conv_transpose1d(integers, taps, stride=2, output_size=20, lengths=lengths, out_dtype="int32")
    z = gpuconv.conv_transpose1d(integers[2, :, :5], taps, stride=2, output_padding=1, out_dtype="int32")
    assert np.array_equal(y[2], np.pad(z, [(0, 0), (0, 20 - z.shape[1])]))

    data = rng.standard_normal((3, 2, 9)) + 1j * rng.standard_normal((3, 2, 9))
    by_parts = gpuconv.conv1d(data, w, lengths=lengths)
    np.testing.assert_allclose(by_parts, gpuconv.conv1d(data, w.astype(complex), lengths=lengths), atol=1e-12)
    u = rng.standard_normal((3, 4, 7)) + 0j
    grad_w = grad.conv1d_weight(data, w.shape, u, lengths=lengths, weight_dtype="float64")
    whole = grad.conv1d_weight(data, w.shape, u, lengths=lengths)
    np.testing.assert_allclose(grad_w, whole.real, atol=1e-12)

    single = gpuconv.conv1d(x[2], w, lengths=[5])
    assert single.shape == (4, 7)
    np.testing.assert_allclose(single[:, :3], gpuconv.conv1d(x[2, :, :5], w), rtol=1e-12)
    assert not single[:, 3:].any()

    layer = nn.Conv1d(2, 4, 3, stride=2, padding="same", dtype=np.float64, rng=0)
    up = nn.ConvTranspose1d(4, 2, 3, stride=2, padding="same", dtype=np.float64, rng=0)
    hidden = layer(x, lengths=lengths)
    assert layer.output_lengths(lengths).tolist() == [5, 1, 3]
    back = up(hidden, lengths=layer.output_lengths(lengths))
    assert up.output_lengths([5, 1, 3]).tolist() == [10, 2, 6]
    np.testing.assert_allclose(back[1, :, :2], up(layer(x[1, :, :2])), rtol=1e-12)
    assert np.isfinite(back).all()


def test_explain_tells_what_lengths_become() -> None:
    x, w = ArraySpec((4, 16, 100), "float16"), ArraySpec((24, 16, 3), "float16")
    lengths = [100, 60, 60, 0]
    on_gpu = gpuconv.explain("conv1d", x, w, padding=1, lengths=lengths, device="sm_90")
    assert on_gpu.problem.has_lengths
    assert on_gpu.choice is not None
    assert on_gpu.choice.plan.steps[-1].config.kernel == "conv1d_ends"
    text = " ".join(str(on_gpu).split())
    assert "4 samples of 0 to 100 positions, which kernels read from a table of 96 B" in text
    found = json.loads(json.dumps(on_gpu.to_dict()))
    assert found["lengths"] == found["output_lengths"] == lengths
    for settings, device in (({"padding": 1}, "cpu"), ({"padding": "same", "stride": 2}, "sm_90")):
        by_runs = gpuconv.explain("conv1d", x, w, **settings, lengths=lengths, device=device)
        assert by_runs.runs == 3
        assert "in 3 calls on views of neighbours of one length" in " ".join(str(by_runs).split())
    weight = gpuconv.explain(
        "conv1d", x, w, stride=2, padding="same", lengths=lengths, device="sm_90", direction="grad_weight"
    )
    assert weight.runs == 1
    with pytest.raises(ValueError, match=r"^conv1d: lengths must be from 0"):
        gpuconv.explain("conv1d", x, w, lengths=[101, 0, 0, 0], device="cpu")


@pytest.mark.gpu
def test_kernels_for_lengths_are_made_once(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that write a table serve all tables of the same size, whatever the lengths are."""
    rng = np.random.default_rng(6)
    x, w = (cupy.asarray(rng.standard_normal(shape, np.float32)) for shape in ((200, 2, 9), (2, 2, 3)))
    made: list[str] = []
    make = runtime.kernels.Kernel.__init__

    def counted(self: Any, config: Any, launch: Any) -> None:
        made.append(config.kernel)
        make(self, config, launch)

    monkeypatch.setattr(runtime.kernels.Kernel, "__init__", counted)
    runtime.executor._writer.cache_clear()
    for _ in range(3):
        lengths = rng.integers(3, 10, 200)  # two launches write the table
        y = gpuconv.conv1d(x, w, lengths=lengths, algorithm="base")
        for n in (0, 199):
            assert (y[n, :, : lengths[n] - 2] == gpuconv.conv1d(x[n, :, : lengths[n]], w, algorithm="base")).all()
    assert made.count("write_samples") == 1


@pytest.mark.gpu
def test_on_a_gpu(cupy: Any) -> None:
    """Lengths on either device, the bits of calls on samples alone, and a graph that keeps its lengths."""
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((4, 3, 17), np.float32), rng.standard_normal((5, 3, 4), np.float32)
    lengths = [17, 0, 9, 9]
    for n, length in enumerate(lengths):
        x[n, :, length:] = np.nan
    gpu_x, gpu_w = cupy.asarray(x), cupy.asarray(w)
    settings: dict[str, Any] = {"stride": 2, "padding": (1, 2), "algorithm": "base"}
    on_gpu = cupy.asarray(lengths, np.int32)
    L_out = gpuconv.output_lengths(on_gpu, 4, 2, (1, 2))
    assert isinstance(L_out, cupy.ndarray)
    for given in (lengths, np.array(lengths), on_gpu):
        y = cupy.asnumpy(gpuconv.conv1d(gpu_x, gpu_w, **settings, lengths=given))
        for n, (length, wanted) in enumerate(zip(lengths, L_out.tolist(), strict=True)):
            assert not y[n, :, wanted:].any()
            if wanted:
                sample = gpuconv.conv1d(gpu_x[n, :, :length], gpu_w, **settings)
                assert np.array_equal(y[n, :, :wanted], cupy.asnumpy(sample))
    with pytest.raises(ValueError, match=r"^conv1d: lengths must be from 0 to L_in = 17, got lengths\[3\] = 18"):
        gpuconv.conv1d(gpu_x, gpu_w, **settings, lengths=cupy.asarray([1, 1, 1, 18]))

    # Samples whose paddings differ are taken one by one, integers too, whose sums have another dtype.
    integers, taps = rng.integers(-9, 9, (4, 3, 17), np.int8), rng.integers(-9, 9, (5, 3, 4), np.int8)
    strided: dict[str, Any] = {"stride": 3, "padding": "same", "lengths": lengths}
    sums = gpuconv.conv1d(cupy.asarray(integers), cupy.asarray(taps), **strided)
    assert sums.dtype == np.int64
    assert np.array_equal(cupy.asnumpy(sums), gpuconv.conv1d(integers, taps, **strided))

    many = np.full((300, 3, 17), 1, np.float32)
    of_many = rng.integers(0, 18, 300)  # more than one launch writes
    y = cupy.asnumpy(gpuconv.conv1d(cupy.asarray(many), gpu_w, **settings, lengths=of_many))
    np.testing.assert_allclose(y, gpuconv.conv1d(many, w, stride=2, padding=(1, 2), lengths=of_many), atol=1e-5)

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        out = cupy.zeros((4, 5, 9), np.float32)
        gpuconv.conv1d(gpu_x, gpu_w, **settings, lengths=[3, 3, 3, 3], out=out)
        stream.synchronize()
        stream.begin_capture()
        gpuconv.conv1d(gpu_x, gpu_w, **settings, lengths=lengths, out=out)
        with pytest.raises(RuntimeError, match=r"^conv1d: lengths on a GPU cannot be read while"):
            gpuconv.conv1d(gpu_x, gpu_w, **settings, lengths=on_gpu, out=out)
        graph = stream.end_capture()
        gpuconv.conv1d(gpu_x, gpu_w, **settings, lengths=[2, 2, 2, 2])
        out.fill(np.nan)
        graph.launch(stream)
        stream.synchronize()
    assert np.array_equal(cupy.asnumpy(out), cupy.asnumpy(gpuconv.conv1d(gpu_x, gpu_w, **settings, lengths=lengths)))
