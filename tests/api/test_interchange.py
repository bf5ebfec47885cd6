"""Arrays of other libraries, through DLPack and `__cuda_array_interface__`, in place of NumPy's and CuPy's."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import grad, nn, signal, sigpy, stream
from gpuconv.interchange import view
from gpuconv.problem import numpy_dtype

OPS = ("conv1d", "conv_transpose1d")


class Exporter:
    """An array of a library that exports DLPack and nothing else; it counts how often, and notes the options."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.options: list[dict[str, Any]] = []

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        self.options.append(options)
        return self.array.__dlpack__(**options)


class OldExporter(Exporter):
    """One that knows the protocol before its version 1, which tells nothing of writing."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        self.options.append({"stream": stream})
        return self.array.__dlpack__(stream=stream)


class Copier(Exporter):
    """One that always exports a copy, and says so."""

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**{**options, "copy": True})


class OnDevice(Exporter):
    """One whose memory is neither the CPU's nor CUDA's."""

    def __dlpack_device__(self) -> Any:
        return (8, 0)


class Interface:
    """An array of a library that exports `__cuda_array_interface__` and nothing else."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changes}


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def operands() -> dict[str, np.ndarray]:
    return {"input": integers(2, 4, 19), "weight": integers(4, 4, 3, seed=1), "bias": integers(4, seed=2)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("make", [Exporter, OldExporter])
def test_any_of_the_arrays_may_come_from_elsewhere(op: str, make: type[Exporter]) -> None:
    given, function = operands(), getattr(gpuconv, op)
    expected = function(**given)
    residual = np.ones_like(expected)
    for names in (["input"], ["weight"], ["bias"], [*given]):
        result = function(**{n: make(a) if n in names else a for n, a in given.items()})
        assert type(result) is np.ndarray
        assert result.tobytes() == expected.tobytes()
    reversed_ = function(make(given["input"][..., ::-1]), given["weight"], given["bias"])
    assert reversed_.tobytes() == function(given["input"][..., ::-1], given["weight"], given["bias"]).tobytes()
    alpha = np.ones(4, np.float32)
    fused = {"residual": residual, "activation": ("snake", alpha)}
    foreign = {"residual": make(residual), "activation": ("snake", make_like(make, alpha))}
    assert function(**given, **foreign).tobytes() == function(**given, **fused).tobytes()
    ragged = function(make(given["input"]), given["weight"], lengths=[19, 7])
    assert ragged.tobytes() == function(given["input"], given["weight"], lengths=[19, 7]).tobytes()
    data = given["input"].astype(np.complex64)  # with real taps
    assert function(make(data), make(given["weight"])).tobytes() == function(data, given["weight"]).tobytes()


def make_like(make: type[Exporter], array: np.ndarray) -> Any:
    """What snake takes must have a shape and a dtype."""
    exporter: Any = make(array)
    exporter.shape, exporter.dtype = array.shape, array.dtype
    return exporter


@pytest.mark.parametrize("op", OPS)
def test_out_of_another_library_is_written_where_it_lies(op: str) -> None:
    given, function = operands(), getattr(gpuconv, op)
    expected = function(**given)
    whole = np.zeros((*expected.shape[:-1], 2 * expected.shape[-1]), np.float32)
    out = Exporter(whole[..., ::2])
    assert function(**given, out=out) is out
    np.testing.assert_array_equal(whole[..., ::2], expected)
    assert not whole[..., 1::2].any()

    def refused(out: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=f"^{op}: out {says}"):
            function(**given, out=out)

    fresh = np.zeros_like(expected)
    fixed = fresh.view()
    fixed.flags.writeable = False
    refused(OldExporter(fresh), ValueError, "must be writeable, got a read-only array$")
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        refused(Exporter(fixed), ValueError, "must be writeable, got a read-only array$")
        refused(Copier(fresh), ValueError, "must be exported without a copy, got a copy$")
    refused(
        OnDevice(fresh), TypeError, "must be on the CPU or a CUDA device, got OnDevice on a device of DLPack's type 8$"
    )
    refused(Exporter(np.zeros(3, np.float32)), ValueError, "must have shape")
    refused(Exporter(given["input"]), (ValueError, TypeError), "must")  # type: ignore[arg-type]
    refused(Exporter(fresh.view(np.int32)), TypeError, "must have the dtype of input, float32, got int32")
    with pytest.raises(ValueError, match=f"^{op}: out must not overlap input"):
        function(given["input"], np.ones((4, 4, 1), np.float32), out=Exporter(given["input"]))
    assert not fresh.any()


def test_what_cannot_be_exported_is_refused_by_name() -> None:
    x, w = np.ones((1, 2, 9), np.float32), np.ones((2, 2, 3), np.float32)
    strings = Exporter(np.array(["a"]))
    with pytest.raises(TypeError, match=r"^conv1d: weight is a Exporter that cannot be read in place: "):
        gpuconv.conv1d(x, strings)
    with pytest.raises(TypeError, match=r"^conv1d: input must have one of the dtypes"):
        gpuconv.conv1d(Exporter(x.astype(np.bool_)), w)
    with pytest.raises(TypeError, match=r"got list; pass np\.asarray\(input\)$"):
        gpuconv.conv1d(x.tolist(), w)


def test_every_public_function_takes_them() -> None:
    x, w, y = integers(2, 4, 19), integers(6, 4, 3, seed=1), integers(2, 6, 17, seed=2)
    f: Any = Exporter
    pairs = [
        (grad.conv1d_input(x.shape, f(w), f(y)), grad.conv1d_input(x.shape, w, y)),
        (grad.conv1d_weight(f(x), w.shape, f(y)), grad.conv1d_weight(x, w.shape, y)),
        (grad.conv1d_bias(f(y)), grad.conv1d_bias(y)),
        (gpuconv.conv1d(x, gpuconv.prepare(f(w))), gpuconv.conv1d(x, w)),
        (signal.upfirdn(f(w[0, 0]), f(x), 2), signal.upfirdn(w[0, 0], x, 2)),
        (signal.firfilter(f(w[0, 0]), f(x)), signal.firfilter(w[0, 0], x)),
        (signal.convolve(f(x[0, 0]), f(w[0, 0])), signal.convolve(x[0, 0], w[0, 0])),
        (signal.resample_poly(f(x), 2, 1), signal.resample_poly(x, 2, 1)),
        (signal.decimate_fir(f(x), 2), signal.decimate_fir(x, 2)),
        (sigpy.convolve(f(x), f(w[0, 0])), sigpy.convolve(x, w[0, 0])),
        (stream.Conv1d(f(w), f(y[0, :, 0])).push(f(x[:1])), stream.Conv1d(w, y[0, :, 0]).push(x[:1])),
    ]
    layer = nn.Conv1d(4, 6, 3)
    pairs.append((layer(f(x)), layer(x)))
    complex_ = x.astype(np.complex64), y.astype(np.complex64)
    real_taps = {"weight_dtype": np.float32}
    of_parts = [
        grad.conv1d_weight(make(complex_[0]), w.shape, make(complex_[1]), **real_taps) for make in (f, np.asarray)
    ]
    pairs.append((of_parts[0], of_parts[1]))
    for found, expected in pairs:
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, expected)
    out = Exporter(np.zeros((1, 6, 19), np.float32))
    causal = stream.Conv1d(w, padding="causal")
    for _ in range(4):  # a stream learns how repeated pushes lie
        assert causal.push(f(x[:1]), out=out) is out
    long = np.tile(x[:1], 4)
    np.testing.assert_array_equal(out.array, gpuconv.conv1d(long, w, padding="causal")[..., -19:])
    assert gpuconv.explain("conv1d", f(x), f(w)) == gpuconv.explain("conv1d", x, w)


@pytest.mark.torch
@pytest.mark.parametrize("op", OPS)
def test_tensors(op: str) -> None:
    import torch

    given, function = operands(), getattr(gpuconv, op)
    expected = function(**given)
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    result = function(**tensors)
    assert type(result) is np.ndarray
    assert result.tobytes() == expected.tobytes()
    out = torch.zeros(expected.shape)
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        assert function(**tensors, out=out) is out
        assert out.numpy().tobytes() == expected.tobytes()

    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    arrays = {name: array.astype(numpy_dtype("bfloat16")) for name, array in given.items()}
    assert function(**half).tobytes() == function(**arrays).tobytes()

    parameter = torch.nn.Parameter(tensors["weight"])
    message = (
        f"{op}: weight is a tensor that requires a gradient: use gpuconv.torch.{op}, or pass weight.detach() if no "
        "gradient is needed"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        function(tensors["input"], parameter)
    assert callable(getattr(importlib.import_module("gpuconv.torch"), op))
    assert function(tensors["input"], parameter.detach(), tensors["bias"]).tobytes() == expected.tobytes()
    with pytest.raises(TypeError, match=f"^{op}: input is a Tensor that cannot be read in place: .*conjugate bit"):
        function(torch.ones(1, 4, 9, dtype=torch.complex64).conj(), tensors["weight"])
    with pytest.raises(TypeError, match=r"use gpuconv\.torch, or pass weight\.detach\(\) if no gradient is needed$"):
        gpuconv.prepare(parameter)


@pytest.mark.gpu
def test_exporters_on_a_gpu(cupy: Any) -> None:
    given = {name: cupy.asarray(array) for name, array in operands().items()}
    expected = cupy.asnumpy(gpuconv.conv1d(**given))
    own = cupy.cuda.Stream()
    for make in (Exporter, OldExporter, Interface):
        foreign = {name: make(array) for name, array in given.items()}
        whole = cupy.zeros((*expected.shape[:-1], 2 * expected.shape[-1]), np.float32)
        out = make(whole[..., ::2])
        with own:
            assert gpuconv.conv1d(**foreign, out=out) is out
            result = gpuconv.conv1d(**{**given, "weight": foreign["weight"]})
            own.synchronize()
        assert type(result) is cupy.ndarray
        assert cupy.asnumpy(result).tobytes() == expected.tobytes()
        assert cupy.asnumpy(whole[..., ::2]).tobytes() == expected.tobytes()
        assert not cupy.asnumpy(whole[..., 1::2]).any()
        if make is not Interface:
            assert {options["stream"] for options in foreign["input"].options} == {own.ptr}
    with pytest.raises(TypeError, match="must be of one kind and on one device"):
        gpuconv.conv1d(Exporter(given["input"]), Exporter(cupy.asnumpy(given["weight"])))


@pytest.mark.gpu
def test_the_interface_names_what_is_read_only_masked_or_still_at_work(
    cupy: Any,
) -> None:
    x = cupy.zeros((1, 2, 9), np.float32)
    fixed = Interface(x, data=(x.data.ptr, True))
    assert view("conv1d", "input", fixed).data.ptr == x.data.ptr
    with pytest.raises(ValueError, match=r"^conv1d: out must be writeable, got a read-only array$"):
        view("conv1d", "out", fixed, write=True)
    with pytest.raises(TypeError, match=r"^conv1d: input is a Interface that cannot be read .* masked"):
        view("conv1d", "input", Interface(x, mask=fixed))
    busy = cupy.cuda.Stream(non_blocking=True)
    with busy:
        x.fill(3)
    assert float(view("conv1d", "input", Interface(x, stream=busy.ptr)).sum()) == 54
