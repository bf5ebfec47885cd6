"""The command line: what it computes, writes and prints, its exit codes, and one clear line for every error."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import pywt
import soundfile

import gpuconv
from gpuconv import cases, files, functional, runtime
from gpuconv.cli import gpu, info, main, warmup
from gpuconv.cli.terminal import show_progress
from gpuconv.device import ARCHITECTURES
from gpuconv.explain import DIRECTIONS
from gpuconv.families import FAMILIES, Config, conv1d_depthwise_push, windows
from gpuconv.gpus import missing_gpu
from gpuconv.problem import ArraySpec, numpy_dtype
from gpuconv.text import install_hint
from tests.fake_cupy import fake_cupy

Array = np.ndarray[Any, Any]

# `gpuconv.verify` is the function; this is its module.
verify_module = importlib.import_module("gpuconv.verify")

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, so that file names on the command line are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine without a GPU, wherever the tests run; the line that says so."""
    line = "no GPU: the NVIDIA driver sees no device"
    for module in (gpu, info, warmup, verify_module):
        monkeypatch.setattr(module, "missing_gpu", lambda: line)
    return line


def save(name: str, array: Any) -> Array:
    np.save(name, array)
    return np.asarray(array)


def normal(*shape: int, dtype: str = "float32") -> Array:
    values = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype.startswith("complex") else 0)
    return values.astype(numpy_dtype(dtype))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command that must fail with one line on stderr and nothing on stdout; the line's text."""
    before = sorted(os.listdir())
    assert main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gpuconv: error: ")
    assert captured.err.count("\n") == 1
    assert sorted(os.listdir()) == before
    return captured.err.removeprefix("gpuconv: error: ").rstrip("\n")


CALLS: list[tuple[str, tuple[int, ...], tuple[int, int, int], int | None, str, dict[str, Any]]] = [
    ("conv1d", (2, 4, 30), (6, 4, 3), 6, "", {}),
    ("conv1d", (4, 30), (6, 4, 3), None, "--padding same", {"padding": "same"}),
    ("conv1d", (4, 30), (6, 4, 3), 6, "--padding 4 --padding-mode reflect", {"padding": 4, "padding_mode": "reflect"}),
    ("conv1d", (2, 4, 30), (6, 4, 4), 6, "--padding 3,1 --stride 2", {"padding": (3, 1), "stride": 2}),
    ("conv1d", (2, 4, 30), (6, 4, 4), None, "--padding causal --dilation 3", {"padding": "causal", "dilation": 3}),
    ("conv1d", (2, 4, 30), (6, 2, 5), 6, "--groups 2 --padding 2", {"groups": 2, "padding": 2}),
    ("conv_transpose1d", (2, 4, 30), (4, 6, 3), 6, "--stride 2", {"stride": 2}),
    (
        "conv_transpose1d", (4, 30), (4, 3, 4), 6, "--stride 3 --output-padding 2 --groups 2 --padding 1",
        {"stride": 3, "output_padding": 2, "groups": 2, "padding": 1},
    ),
    (
        "conv_transpose1d", (1, 4, 30), (4, 6, 4), None, "--stride 2 --output-size 66 --dilation 2",
        {"stride": 2, "output_size": 66, "dilation": 2},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("op", "input_shape", "weight_shape", "bias", "options", "settings"), CALLS)
def test_a_file_gives_what_the_function_gives(
    capsys: pytest.CaptureFixture[str],
    op: str,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, int, int],
    bias: int | None,
    options: str,
    settings: dict[str, Any],
) -> None:
    x, w = save("x.npy", normal(*input_shape)), save("w.npy", normal(*weight_shape))
    b = None if bias is None else save("b.npy", normal(bias))
    argv = [
        op,
        "x.npy",
        "w.npy",
        "y.npy",
        "--device",
        "cpu",
        *options.split(),
        *(() if b is None else ("--bias", "b.npy")),
    ]
    assert main(argv) == 0
    expected = getattr(gpuconv, op)(x, w, b, **settings)
    found = np.load("y.npy")
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)
    captured = capsys.readouterr()
    assert captured.out == f"y.npy: {expected.shape} float32, computed on the CPU\n"
    assert captured.err == ""


@pytest.mark.parametrize("dtype", ["float16", "float64", "complex64", "complex128"])
def test_files_keep_their_dtype(dtype: str) -> None:
    x, w = save("x.npy", normal(1, 3, 20, dtype=dtype)), save("w.npy", normal(2, 3, 5, dtype=dtype))
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", "--device", "cpu"]) == 0
    found = np.load("y.npy")
    assert found.dtype == dtype
    assert np.array_equal(found, gpuconv.conv1d(x, w))


def test_dtype_converts_every_file() -> None:
    x, w, b = save("x.npy", np.arange(20).reshape(1, 20)), save("w.npy", normal(1, 1, 3)), save("b.npy", np.ones(1))
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", "--bias", "b.npy", "--dtype", "float64", "--device", "cpu"]) == 0
    expected = gpuconv.conv1d(x.astype(np.float64), w.astype(np.float64), b)
    assert np.array_equal(np.load("y.npy"), expected)


def test_bfloat16_goes_through_files_as_raw_values() -> None:
    x, w = save("x.npy", normal(1, 20, dtype="bfloat16")), save("w.npy", normal(1, 1, 3, dtype="bfloat16"))
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert np.load("y.npy").tobytes() == gpuconv.conv1d(x, w).tobytes()


def test_force_replaces_even_the_input() -> None:
    x, w = save("x.npy", normal(1, 20)), save("w.npy", normal(1, 1, 3))
    assert main(["conv1d", "x.npy", "w.npy", "x.npy", "--force", "--device", "cpu"]) == 0
    assert np.array_equal(np.load("x.npy"), gpuconv.conv1d(x, w))
    assert sorted(os.listdir()) == ["w.npy", "x.npy"]


def test_a_recording_is_smoothed_and_decimated(capsys: pytest.CaptureFixture[str]) -> None:
    ecg = (pywt.data.ecg() / 1024).astype(np.float32)[np.newaxis]
    soundfile.write("ecg.wav", ecg.T, 360, subtype="FLOAT")
    taps = np.hanning(33).astype(np.float32)[1:-1]
    taps /= taps.sum()
    save("lowpass.npy", taps.reshape(1, 1, -1))

    assert main(["conv1d", "ecg.wav", "lowpass.npy", "smooth.wav", "--padding", "same", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "smooth.wav: (1, 1024) float32, 360 Hz, computed on the CPU\n"
    smooth, rate = soundfile.read("smooth.wav", dtype="float32")
    assert rate == 360
    assert soundfile.info("smooth.wav").subtype == "FLOAT"
    # The window is symmetric, so the cross-correlation is the convolution that NumPy computes.
    direct = np.convolve(ecg[0].astype(np.float64), taps.astype(np.float64), mode="same")
    bound = 34 * 2.0**-24 * np.convolve(np.abs(ecg[0]), taps, mode="same") + 1e-30
    assert (np.abs(smooth - direct) <= bound).all()

    options = ["--padding", "same", "--stride", "4", "--rate", "90", "--device", "cpu"]
    assert main(["conv1d", "ecg.wav", "lowpass.npy", "slow.wav", *options]) == 0
    slow, rate = soundfile.read("slow.wav", dtype="float32")
    assert (rate, len(slow)) == (90, 256)
    expected = gpuconv.conv1d(ecg, taps.reshape(1, 1, -1), padding="same", stride=4)
    assert np.array_equal(slow, expected[0])


def test_wav_to_npy_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    stereo = normal(2, 500) * 4
    soundfile.write("in.wav", stereo.T, 8000, subtype="FLOAT")
    w = save("w.npy", normal(2, 1, 9))
    assert (
        main(["conv1d", "in.wav", "w.npy", "out.npy", "--groups", "2", "--padding", "causal", "--device", "cpu"]) == 0
    )
    expected = gpuconv.conv1d(stereo, w, groups=2, padding="causal")
    assert np.array_equal(np.load("out.npy"), expected)
    capsys.readouterr()
    assert "needs a sample rate" in refusal(capsys, "conv1d", "out.npy", "w.npy", "back.wav", "--groups", "2")
    save("one.npy", np.ones((2, 1, 1), np.float32))
    assert main(["conv1d", "out.npy", "one.npy", "back.wav", "--groups=2", "--rate=16000", "--device=cpu"]) == 0
    back, rate = soundfile.read("back.wav", dtype="float32")
    assert rate == 16000
    assert np.abs(expected).max() > 1
    assert np.array_equal(back.T, expected)


def test_bad_files_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))
    save("int.npy", np.ones((1, 1, 3), np.int64))
    save("uint.npy", np.ones((1, 1, 3), np.uint64))
    save("double.npy", np.ones((1, 1, 3)))
    save("flat.npy", np.ones(3, np.float32))
    save("four.npy", np.ones((1, 1, 1, 20), np.float32))
    save("scalar.npy", np.float32(1))
    save("long.npy", np.ones((1, 1, 30), np.float32))
    np.save("objects.npy", np.array([None, 1]), allow_pickle=True)
    Path("empty.npy").touch()
    Path("text.npy").write_text("1 2 3")
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:-8])
    Path("folder.npy").mkdir()
    soundfile.write("w.wav", np.ones((3, 1)), 8000)

    def refused(x: str, w: str, y: str = "y.npy", *options: str) -> str:
        return refusal(capsys, "conv1d", x, w, y, *options, "--device", "cpu")

    assert refused("none.npy", "w.npy") == "none.npy: does not exist"
    assert refused("folder.npy", "w.npy") == "folder.npy: is a directory"
    assert refused("empty.npy", "w.npy") == "empty.npy: is empty"
    assert refused("text.npy", "w.npy") == "text.npy: is not a .npy file"
    assert refused("objects.npy", "w.npy") == "objects.npy: holds pickled Python objects, which are never loaded"
    assert refused("cut.npy", "w.npy").startswith("cut.npy: is truncated: 80 bytes of data expected")
    assert refused("x.npy", "uint.npy").startswith("uint.npy: has dtype uint64, expected one of float16")
    assert refused("x.npy", "int.npy").endswith("got input float32, weight int64; give --dtype to convert")
    assert refused("x.mp3", "w.npy") == "x.mp3: the name must end in .npy or .wav"
    assert refused("", "w.npy") == refused("x.npy", "") == "the name of a file is empty"
    assert refused("x.npy", "w.wav") == "w.wav: the name must end in .npy"
    assert refused("x.npy", "w.npy", "y.npy", "--bias", "none.npy") == "none.npy: does not exist"
    assert refused("x.npy", "w.npy", "y.npy", "--bias", "w.wav") == "w.wav: the name must end in .npy"
    # The problem itself, in the words of the library.
    assert refused("four.npy", "w.npy").startswith("conv1d: input must have shape (N, C_in, L_in) or (C_in, L_in)")
    assert refused("scalar.npy", "flat.npy").startswith("conv1d: input must have shape (N, C_in, L_in) or (C_in, L_in)")
    assert refused("x.npy", "x.npy").startswith("conv1d: weight must have shape (C_out, C_in/groups, K)")
    assert refused("x.npy", "flat.npy", "y.npy", "--groups", "1").startswith("conv1d: weight must have shape (C_out, ")
    assert refused("x.npy", "w.npy", "y.npy", "--bias", "w.npy").startswith("conv1d: bias must have shape (C_out,)")
    assert refused("x.npy", "long.npy").startswith("conv1d: the kernel is longer than the padded input")
    save("flat_double.npy", np.ones(3))
    assert not refused("x.npy", "flat_double.npy", "y.npy", "--groups", "1").endswith("convert")
    assert refused("x.npy", "double.npy").endswith("got input float32, weight float64; give --dtype to convert")


def test_bad_outputs_are_refused_before_anything_is_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = save("x.npy", normal(2, 20)), save("w.npy", normal(1, 2, 3))
    save("stereo.npy", normal(2, 2, 20))
    save("old.npy", np.zeros(3))
    save("cx.npy", normal(2, 20, dtype="complex64"))
    save("cw.npy", normal(1, 2, 3, dtype="complex64"))
    save("ix.npy", np.ones((2, 20), np.int64))
    save("iw.npy", np.ones((1, 2, 3), np.int64))
    Path("link.npy").symlink_to("x.npy")
    monkeypatch.setattr(functional, "conv1d", lambda *_, **__: pytest.fail("computed"))

    def refused(y: str, *options: str, x: str = "x.npy", w: str = "w.npy") -> str:
        return refusal(capsys, "conv1d", x, w, y, *options, "--device", "cpu")

    assert refused("old.npy") == "old.npy: exists; give --force to replace it"
    assert refused("x.npy") == "x.npy: is the input file itself; give --force to replace it"
    assert refused("link.npy") == "link.npy: is the input file itself; give --force to replace it"
    assert refused("./w.npy") == "./w.npy: is the weight file itself; give --force to replace it"
    assert refused("y.txt") == "y.txt: the name must end in .npy or .wav"
    assert refused("none/y.npy") == f"none/y.npy: the folder {Path.cwd() / 'none'} does not exist"
    assert refused("y.wav").startswith("y.wav: a .wav file needs a sample rate")
    assert refused("y.npy", "--rate", "8000").startswith("y.npy: --rate is for a .wav output")
    assert "holds real samples" in refused("y.wav", "--rate", "8000", x="cx.npy", w="cw.npy")
    assert "holds 32-bit floats, the output is int64" in refused("y.wav", "--rate", "8000", x="ix.npy", w="iw.npy")
    assert "holds (channels, samples), the output is (2, 1, 18)" in refused("y.wav", "--rate=8000", x="stereo.npy")
    assert np.array_equal(np.load("x.npy"), x)
    assert np.array_equal(np.load("w.npy"), w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--padding 1,a", "conv1d: padding must be an int, a pair (left, right) or one of"),
        ("--padding sme", "conv1d: padding must be an int, a pair (left, right) or one of"),
        ("--padding 1,2,3", "conv1d: padding must be an int, a pair (left, right) or one of"),
        ("--padding -1", "conv1d: padding must be at least 0, got -1"),
        ("--stride 0", "conv1d: stride must be at least 1, got 0"),
        ("--stride 1.5", "--stride must be a whole number, got '1.5' (see gpuconv conv1d --help)"),
        ("--stride 99999999999", "conv1d: stride must be at most"),
        ("--dilation -2", "conv1d: dilation must be at least 1, got -2"),
        ("--groups 3", "conv1d: groups must divide the input channels, got groups = 3 and C_in = 1"),
        ("--output-padding 1", "unknown argument: --output-padding 1"),
        ("--bias", "--bias needs a value (see gpuconv conv1d --help)"),
        (
            "--dtype int8",
            "--dtype must be one of float16, bfloat16, float32, float64, complex64, complex128, got 'int8'",
        ),
        ("--device tpu", "--device must be one of auto, cpu, gpu, got 'tpu'"),
        ("--rate 0", "--rate must be at least 1, got 0"),
        ("--forc", "unknown argument: --forc"),
        ("--padding", "--padding needs a value; one that begins with - is given as --padding=-1"),
    ],
)
def test_bad_settings_are_refused(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))
    argv = ("conv1d", "x.npy", "w.npy", "y.npy", *options.split())
    assert refusal(capsys, *argv).startswith(message)


def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str], no_gpu: str) -> None:
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))
    assert refusal(capsys, "conv1d", "x.npy", "w.npy", "y.npy", "--device", "gpu", code=3) == no_gpu
    assert main(["conv1d", "x.npy", "w.npy", "y.npy"]) == 0  # auto is the CPU
    assert capsys.readouterr().out.endswith("computed on the CPU\n")


def test_without_memory_there_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save("x.npy", normal(1, 2))
    save("w.npy", normal(1, 1, 1))
    argv = ("conv_transpose1d", "x.npy", "w.npy", "y.npy", "--stride", str(2**31 - 1), "--device", "cpu")

    def too_large(*_: Any, **__: Any) -> None:
        raise MemoryError("Unable to allocate 8.00 GiB")

    monkeypatch.setattr(functional, "conv_transpose1d", too_large)
    assert refusal(capsys, *argv) == "not enough memory: Unable to allocate 8.00 GiB"


def test_a_failing_disk_leaves_no_file() -> None:
    save("x.npy", normal(1, 100_000))
    save("w.npy", normal(1, 1, 3))
    program = (
        "import resource, sys\nfrom gpuconv.cli import main\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "sys.exit(main(['conv1d', 'x.npy', 'w.npy', *sys.argv[1:], '--device', 'cpu']))"
    )
    for name, *rate in (("y.npy",), ("y.wav", "--rate", "8000")):
        done = run("-c", program, name, *rate)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"gpuconv: error: {name}: cannot be written: File too large\n"
    assert sorted(os.listdir()) == ["w.npy", "x.npy"]


def test_explain_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--input 8,512,3000 --weight 512,512,3 --stride 2 --padding 1 --dtype float16 --bias --arch sm_90"
    assert main(["explain", "conv1d", *options.split()]) == 0
    arrays = [ArraySpec(shape, "float16") for shape in ((8, 512, 3000), (512, 512, 3), (512,))]
    expected = gpuconv.explain("conv1d", *arrays, stride=2, padding=1, device="sm_90")
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["explain", "conv1d", *options.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"gpuconv": gpuconv.__version__, **expected.to_dict()}


def test_explain_in_tf32(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--input 8,512,3000 --weight 512,512,3 --precision tf32 --arch sm_90"
    assert main(["explain", "conv1d", *options.split()]) == 0
    arrays = [ArraySpec(shape, "float32") for shape in ((8, 512, 3000), (512, 512, 3))]
    expected = gpuconv.explain("conv1d", *arrays, precision="tf32", device="sm_90")
    assert capsys.readouterr().out == f"{expected}\n"
    assert "precision tf32" in str(expected)
    assert expected.choice is not None
    assert dict(expected.choice.config.macros)["IS_SPLIT"] == "0"


def test_explain_on_the_cpu_and_with_transposed_groups(capsys: pytest.CaptureFixture[str], no_gpu: str) -> None:
    options = "--input 6,50 --weight 6,4,5 --groups 2 --stride 3 --output-size 153 --bias"
    arrays = [ArraySpec(shape, "float32") for shape in ((6, 50), (6, 4, 5), (8,))]
    expected = gpuconv.explain("conv_transpose1d", *arrays, groups=2, stride=3, output_size=153, device="cpu")
    for device in (["--device", "cpu"], []):
        assert main(["explain", "conv_transpose1d", *options.split(), *device]) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    assert refusal(capsys, "explain", "conv_transpose1d", *options.split(), "--device", "gpu", code=3) == no_gpu


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("conv2d --input 1,2 --weight 1,1,1", "OP must be one of conv1d, conv_transpose1d, got 'conv2d'"),
        ("conv1d --weight 1,1,1", "--input is missing"),
        ("conv1d --input 1,x --weight 1,1,1", "--input must be extents such as 8,512,3000, got '1,x'"),
        ("conv1d --input 1,,2 --weight 1,1,1", "--input must be extents such as 8,512,3000, got '1,,2'"),
        ("conv1d --input=-1,2 --weight 1,1,1", "--input must be extents such as 8,512,3000, got '-1,2'"),
        ("conv1d --input 1,9 --weight 1,1 --bias", "conv1d: weight must have shape (C_out, C_in/groups, K), got 2"),
        ("conv1d --input 1,9 --weight 1,1,3 --output-size 9", "explain: conv1d has the settings"),
        (
            "conv1d --input 1,9 --weight 1,1,3 --arch sm_1",
            "--arch must be one of sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, got 'sm_1'",
        ),
        (
            "conv1d --input 1,9 --weight 1,1,3 --arch sm_90 --device cpu",
            "--device cannot be given together with --arch",
        ),
    ],
)
def test_explain_refuses(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    assert refusal(
        capsys, "explain", *options.split(), *(() if "--arch" in options else ("--device", "cpu"))
    ).startswith(message)


def test_algorithm_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--input", "2,64,100", "--weight", "64,64,3", "--arch", "sm_90"]
    assert main(["explain", "conv1d", *shapes, "--algorithm", "base"]) == 0
    assert "conv1d_direct with" in capsys.readouterr().out
    assert "does not take" in refusal(capsys, "explain", "conv1d", *shapes, "--algorithm", "conv1d_depthwise")
    assert "got 'conv_transpose1d_gather'" in refusal(
        capsys, "explain", "conv1d", *shapes, "--algorithm", "conv_transpose1d_gather"
    )
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", "--device", "cpu", "--algorithm", "base"]) == 0
    assert main(["conv1d", "x.npy", "w.npy", "z.npy", "--device", "cpu"]) == 0
    assert Path("y.npy").read_bytes() == Path("z.npy").read_bytes()
    capsys.readouterr()
    assert "--algorithm" in refusal(capsys, "conv1d", "x.npy", "w.npy", "y.npy", "--algorithm", "fast")


def test_verify_reports_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verify", "--device", "cpu", "--filter", "docs_example", "--dtype", "float32,complex64", "--seed", "5"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("all checks passed\n")
    assert captured.err == ""
    assert main([*argv, "--json", "--junit", "report.xml"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["seed"] == 5
    assert report["dtypes"] == ["float32", "complex64"]
    suite = ElementTree.parse("report.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == (str(2 * report["cases"]), "0")


def test_verify_tells_a_mismatch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = functional.conv1d

    def wrong(*arguments: Any, **settings: Any) -> Any:
        out = real(*arguments, **settings)
        out[..., 0] += 1
        return out

    monkeypatch.setattr(functional, "conv1d", wrong)
    argv = ["verify", "--device", "cpu", "--filter", "docs_example", "--dtype", "float32"]
    assert main(argv) == 1
    assert "checks FAILED" in capsys.readouterr().out
    assert main([*argv, "--json", "--junit", "report.xml"]) == 1
    assert json.loads(capsys.readouterr().out)["failures"]
    assert "<failure" in Path("report.xml").read_text()


def test_verify_refuses(capsys: pytest.CaptureFixture[str], no_gpu: str) -> None:
    assert refusal(capsys, "verify", "--device", "gpu", code=3) == no_gpu
    assert "no_such_case" in refusal(capsys, "verify", "--device", "cpu", "--filter", "no_such_case")
    assert refusal(capsys, "verify", "--dtype", "float32,int8").startswith("--dtype must be some of float16")
    assert refusal(capsys, "verify", "--seed", "-1").startswith("--seed must be at least 0, got -1")
    assert refusal(capsys, "verify", "--seed", "x").startswith("--seed must be a whole number, got 'x'")
    assert "no_such_case" in refusal(capsys, "verify", "--list", "--filter", "no_such_case")
    assert "there is none on the CPU" in refusal(capsys, "verify", "--device", "cpu", "--family", "conv1d_direct")
    # A report that could not be written is found out before the run, not after it.
    assert "folder" in refusal(capsys, "verify", "--device", "gpu", "--junit", "none/report.xml")


def test_verify_lists_what_filter_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = {title: lines.index(f"{title}:") for title in ("operations", "tags", "cases")}
    names = [line.split()[0] for line in lines if line.startswith(" ")]
    assert names[:2] == ["conv1d", "conv_transpose1d"]
    every = [case.name for case in cases.select()]
    assert names[-len(every) :] == every
    for name in names:
        assert cases.select(name)
    number = sum("kernel" in case.tags for case in cases.select())
    assert lines[at["tags"] + 1].split() == ["kernel", f"{number}", "cases"]
    assert max(map(len, lines)) <= 60
    assert main(["verify", "--list", "--filter", "sincnet"]) == 0
    assert "  sincnet  model" in capsys.readouterr().out.splitlines()
    assert main(["verify", "--list", "--filter", "sincnet", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operations"] == {"conv1d": len(found["cases"])}
    assert found["cases"]["sincnet"] == ["model"]


@pytest.mark.parametrize("command", ["info", "verify", "explain", "conv1d", "conv_transpose1d", "warmup", "cache"])
def test_help_documents_the_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "exit codes: 0 " in capsys.readouterr().out


def test_verify_runs_a_selection_or_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases.table, "CASES", cases.CASES[:4])
    monkeypatch.setattr(cases.table, "WIDE_CASES", ())
    argv = ["verify", "--device", "cpu", "--dtype", "float32,float64"]
    assert main(argv) == 0
    assert "4 of 8 pairs of case and dtype; --all runs them all" in capsys.readouterr().out
    assert main([*argv, "--all"]) == 0
    assert "selection" not in capsys.readouterr().out


def test_info_in_both_forms(capsys: pytest.CaptureFixture[str], no_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", "/somewhere/else")
    monkeypatch.delenv("GPUCONV_TRACEBACK", raising=False)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["gpuconv"] == gpuconv.__version__
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["torch"] == info.installed_version("torch")
    assert {"scipy", "dask", "safetensors", "matplotlib"} < facts["versions"].keys()
    assert info.installed_version("no-such-package") is None
    assert facts["kernel_cache"] == facts["environment"]["CUPY_CACHE_DIR"] == "/somewhere/else"
    assert facts["environment"]["GPUCONV_TRACEBACK"] is None
    assert facts["devices"] == []
    assert facts["missing"][0]["what"] == no_gpu
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (
        gpuconv.__version__,
        np.__version__,
        "/somewhere/else",
        f"- {no_gpu}\n",
        "cannot be convolved.\n",
        "=/somewhere/else",
    ):
        assert expected in text


def test_info_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cupy", "ml_dtypes", "soundfile", "rich"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for module in ("cupy", "cuda_runtime", "nvrtc", "cuda_driver", "ml_dtypes", "soundfile", "rich"):
        assert facts["versions"][module] is None
    whats = [gap["what"] for gap in facts["missing"]]
    assert "CuPy" in whats[0]
    assert whats[1:] == [
        f"ml_dtypes: {install_hint('bf16')}",
        f"soundfile: {install_hint('audio')}",
        f"rich: {install_hint('cli')}",
    ]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.count("not available") == 7
    monkeypatch.setattr(info, "installed_version", {"torch": "2.13.0"}.get)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "\nPyTorch        2.13.0\n" in text
    assert "dask" not in text


class _Kernel:
    """Counts the compilations of `cupy.RawKernel`."""

    compiled: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, text: str, name: str) -> None:
        self.text, self.name = text, name

    def compile(self) -> None:
        self.compiled.append((self.name, self.text))


@pytest.fixture
def played_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A CuPy with one H200 that compiles nothing and whose arrays are NumPy's."""
    monkeypatch.setattr("gpuconv.cli.gpu.has_driver", lambda: True)
    monkeypatch.setattr(_Kernel, "compiled", [])
    with fake_cupy(ARCHITECTURES["sm_90"]) as fake:
        fake.asarray = fake.asnumpy = np.asarray
        fake.RawKernel = _Kernel
        yield fake


@pytest.mark.usefixtures("played_gpu")
def test_warmup_compiles_every_kernel_of_the_dtypes(capsys: pytest.CaptureFixture[str]) -> None:
    device = ARCHITECTURES["sm_90"]
    assert main(["warmup", "--dtype", "float32,float16", "--streams"]) == 0
    every = [c for family in FAMILIES for c in family.configs(device)]
    operations = [family for family in FAMILIES if family.kind in ("conv1d", "conv_transpose1d")]
    every += [c for family in operations for c in windows.configs(family, device)]
    every += conv1d_depthwise_push.configs()
    wanted = {c for c in every if dict(c.macros)["DTYPE"] in ("float32", "float16")}
    names = [*(c.kernel for c in wanted), *["append_samples"] * 4]  # with offsets of 32 and of 64 bits
    assert sorted(name for name, _ in _Kernel.compiled) == sorted(names)
    assert len(set(_Kernel.compiled)) == len(_Kernel.compiled)
    out = capsys.readouterr().out
    assert out.startswith(f"{len(_Kernel.compiled)} kernels for H200 (sm_90) ready in ")
    _Kernel.compiled.clear()
    runtime.build.cache_clear()
    assert main(["warmup", "conv1d"]) == 0
    others = [family for family in FAMILIES if family.kind != "conv_transpose1d"]  # those of the gradients serve both
    expected = {c.kernel for family in others for c in family.configs(device)}
    assert {name for name, _ in _Kernel.compiled} == expected


@pytest.mark.usefixtures("played_gpu")
def test_warmup_compiles_the_kernels_of_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    options = "conv1d --input 2,8,100 --weight 16,8,3 --bias --stride 2 --dtype float16,float64"
    assert main(["warmup", *options.split()]) == 0
    arrays = {
        dtype: [ArraySpec(s, dtype) for s in ((2, 8, 100), (16, 8, 3), (16,))] for dtype in ("float16", "float64")
    }
    wanted: dict[str, dict[Config, None]] = {direction: {} for direction in DIRECTIONS}
    for specs in arrays.values():
        for direction, configs in wanted.items():
            found = gpuconv.explain("conv1d", *specs, stride=2, device="sm_90", direction=direction)  # type: ignore[arg-type]
            assert found.choice is not None
            for choice in (found.choice, found.prepared or found.choice):
                configs.update((step.config, None) for step in choice.plan.steps)
    every = {config for configs in wanted.values() for config in configs}
    assert sorted(name for name, _ in _Kernel.compiled) == sorted(config.kernel for config in every)
    assert capsys.readouterr().out.startswith(f"{len(every)} kernels for H200 (sm_90) ready in ")
    for more, direction in (["--direction", "grad_weight"], "grad_weight"), (["--algorithm", "base"], "base"):
        _Kernel.compiled.clear()
        runtime.build.cache_clear()
        assert main(["warmup", *options.split(), *more]) == 0
        names = [config.kernel for config in wanted[direction]] if direction in wanted else ["conv1d_direct"] * 2
        assert [name for name, _ in _Kernel.compiled] == names


@pytest.mark.usefixtures("played_gpu")
def test_with_a_gpu_auto_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    x, w = save("x.npy", normal(1, 20)), save("w.npy", normal(1, 1, 3))
    assert main(["conv1d", "x.npy", "w.npy", "y.npy"]) == 0
    assert capsys.readouterr().out == "y.npy: (1, 18) float32, computed on H200\n"
    assert np.array_equal(np.load("y.npy"), gpuconv.conv1d(x, w))
    assert main(["explain", "conv1d", "--input", "1,20", "--weight", "1,1,3"]) == 0
    assert capsys.readouterr().out.startswith("conv1d on H200 (sm_90)\n")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "GPU 0          H200 (sm_90), 132 multiprocessors, 50 MiB L2\n" in text
    assert "CUDA runtime   13.2\nNVRTC          13.2\nNVIDIA driver  supports CUDA 13.0\n" in text
    assert "no GPU" not in text
    assert "NVRTC, " not in text


def test_info_names_a_missing_compiler(capsys: pytest.CaptureFixture[str], played_gpu: Any) -> None:
    def absent() -> tuple[int, int]:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    played_gpu.cuda.nvrtc.getVersion = absent
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "NVRTC          not available\n" in text
    assert "- NVRTC, CUDA's run-time compiler: pip install -e '.[cuda13]'" in text


def test_a_dtype_that_cupy_does_not_have_is_one_line(
    capsys: pytest.CaptureFixture[str], played_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "check_dtype", lambda _dtype: None)  # which refuses bfloat16 beside an older NumPy

    def refuse(array: Array) -> Array:
        raise ValueError(f"Unsupported dtype {array.dtype}")

    played_gpu.asarray = refuse
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))
    argv = ("conv1d", "x.npy", "w.npy", "y.npy", "--dtype", "bfloat16", "--device", "gpu")
    assert refusal(capsys, *argv) == "CuPy 14.0 has no bfloat16 arrays: Unsupported dtype bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--input 1,9", "warmup needs --input and --weight together, or neither"),
        ("--input 1,9 --weight 1,1,3", "warmup needs conv1d or conv_transpose1d before --input and --weight"),
        ("conv1d --stride 2", "warmup takes settings only together with --input and --weight"),
        ("--bias", "warmup takes settings only together with --input and --weight"),
        ("conv1d --input 1,9 --weight 1,2,3", "conv1d: input has C_in = 1 channels"),
        ("--dtype float8", "--dtype must be some of float16"),
    ],
)
@pytest.mark.usefixtures("played_gpu")
def test_warmup_refuses(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    assert refusal(capsys, "warmup", *options.split()).startswith(message)


def test_warmup_needs_a_gpu(capsys: pytest.CaptureFixture[str], no_gpu: str) -> None:
    assert refusal(capsys, "warmup", code=3) == f"{no_gpu}; --arch compiles for a GPU that is not installed"


@pytest.mark.gpu
def test_warmup_fills_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    done = run("-m", "gpuconv", "warmup", "conv1d", "--input", "1,3,40", "--weight", "4,3,5", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    (number,) = re.findall(r"^(\d+) kernels for ", done.stdout)
    assert len(list((tmp_path / "cache").iterdir())) == int(number) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("device", [[], ["--device", "gpu"]])
def test_a_file_is_convolved_on_the_gpu(device: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    x, w = save("x.npy", rng.integers(-8, 8, (2, 3, 50)).astype(np.float32)), save("w.npy", np.ones((4, 3, 5), "f4"))
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", *device, "--padding", "same"]) == 0
    assert "computed on the CPU" not in capsys.readouterr().out
    assert np.array_equal(np.load("y.npy"), gpuconv.conv1d(x, w, padding="same"))


def environment() -> dict[str, str]:
    """The environment in which a process started elsewhere imports this gpuconv."""
    root = str(Path(gpuconv.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


def run(*argv: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """A Python process with these arguments."""
    return subprocess.run(
        [sys.executable, *argv], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment(), timeout=120,
        check=False,
    )  # fmt: skip


def test_the_module_is_a_program() -> None:
    done = run("-m", "gpuconv", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gpuconv {gpuconv.__version__}\n", "")
    done = run("-m", "gpuconv", "explain", "conv1d", "--input", "1,9", "--weight", "1,1,3", "--arch", "sm_90")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("-m", "gpuconv", "conv1d", "none.npy", "w.npy", "y.npy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpuconv: error: none.npy: does not exist\n"


def test_verify_without_a_gpu_exits_with_3() -> None:
    missing = missing_gpu()
    done = run("-m", "gpuconv", "verify", "--device", "gpu", "--filter", "docs_example")
    if missing is None:
        assert done.returncode == 0
    else:
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == f"gpuconv: error: {' '.join(missing.split())}\n"


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = run("-m", "gpuconv", "info", "--json", stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_interrupt_ends_with_130_and_one_line() -> None:
    program = (
        "import os, signal, sys, time\nfrom gpuconv.cli import main, verify\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background jobs ignore
        "verify.verify = lambda *_, **__: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))\n"
        "sys.exit(main(['verify']))"
    )
    done = run("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "gpuconv: error: interrupted\n")


COMMANDS = ("info", "verify", "explain", "conv1d", "conv_transpose1d", "warmup", "cache", "bench", "plot", "completion")


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command}" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_has_an_example_and_the_exit_codes(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    codes, _, examples = capsys.readouterr().out.partition("\nexit codes: ")[2].partition("\n\nexample:\n")
    assert codes.startswith("0 ")
    assert "2 bad usage" in codes
    assert examples.startswith(f"  gpuconv {command} ")


def test_the_help_breaks_no_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for width in range(58, 64):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["explain", "--help"]) == 0
        assert "in place of --output-padding" in " ".join(capsys.readouterr().out.split())


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "convolve").startswith("COMMAND must be one of info, verify, explain, conv1d")
    assert refusal(capsys, "help", "convolve").startswith("COMMAND must be one of info, verify, explain, conv1d")
    assert refusal(capsys, "info", "more").startswith("unknown argument: more")
    assert refusal(capsys, "info", "--json=1").startswith("--json takes no value, got '1'")
    assert refusal(capsys, "conv1d", "a.npy").startswith("WEIGHT, OUT are missing")
    assert refusal(capsys, "--verison") == "unknown argument: --verison; did you mean --version? (see gpuconv --help)"
    assert refusal(capsys, "-v") == "unknown argument: -v (see gpuconv --help)"
    shapes = ("explain", "conv1d", "--weight", "1,1,3", "--input")
    assert refusal(capsys, *shapes, "8", "1", "9") == "unknown argument: 1 9 (see gpuconv explain --help)"
    found = refusal(capsys, *shapes[:4], "--inptu", "1,9")
    assert found == "unknown argument: --inptu 1,9; did you mean --input? (see gpuconv explain --help)"
    found = refusal(capsys, *shapes[:4], "--inptu=1,9")
    assert found == "unknown argument: --inptu=1,9; did you mean --input? (see gpuconv explain --help)"
    assert refusal(capsys, *shapes, "1,9", "--arch") == "--arch needs a value (see gpuconv explain --help)"


def test_an_example_keeps_options_and_their_values_together(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["help", "explain"]) == 0
    assert capsys.readouterr().out.endswith(
        "  gpuconv explain conv1d --input 8,512,3000 \\\n    --weight 512,512,3 --arch sm_90\n"
    )


@pytest.mark.parametrize("argv", [(), ("help",), *(("help", command) for command in COMMANDS)])
def test_help_is_a_command(capsys: pytest.CaptureFixture[str], argv: tuple[str, ...]) -> None:
    assert main(argv) == 0
    found = capsys.readouterr()
    assert main([*argv[1:], "--help"]) == 0
    assert found == capsys.readouterr()
    assert found.err == ""
    assert found.out.startswith("usage: gpuconv")


PLACES = ("--stride", "--padding", "--input", "--groups", "--dtype", "--precision", "--output-size")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("digits", [600, 5000])
def test_long_values_are_not_echoed(capsys: pytest.CaptureFixture[str], place: str, digits: int) -> None:
    options = {"--input": "1,9", "--weight": "1,1,3", place: "1" + "0" * (digits - 1)}
    argv = ("explain", "conv_transpose1d", "--arch", "sm_90", *(word for pair in options.items() for word in pair))
    assert len(refusal(capsys, *argv)) < 600


@pytest.mark.parametrize(
    ("op", "rate", "stride", "expected", "warning"),
    [
        ("conv1d", 48000, 3, 16000, ""),
        ("conv1d", 44100, 8, 5512, "44100 Hz over the stride 8 is not a whole number: written as 5512 Hz"),
        ("conv1d", 3, 7, 1, "3 Hz over the stride 7 is not a whole number: written as 1 Hz"),
        ("conv_transpose1d", 16000, 3, 48000, ""),
    ],
)
def test_the_rate_follows_the_stride(
    capsys: pytest.CaptureFixture[str], op: str, rate: int, stride: int, expected: int, warning: str
) -> None:
    soundfile.write("x.wav", normal(100), rate)
    save("w.npy", normal(1, 1, 3))
    assert main([op, "x.wav", "w.npy", "y.wav", "--stride", str(stride), "--device", "cpu"]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"gpuconv: warning: y.wav: {warning}") if warning else error == ""
    assert soundfile.info("y.wav").samplerate == expected
    assert main([op, "x.wav", "w.npy", "z.wav", "--stride", str(stride), "--rate", "777", "--device", "cpu"]) == 0
    assert soundfile.info("z.wav").samplerate == 777
    assert capsys.readouterr().err == ""


def test_every_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "conv1d", "two\nlines.npy", "w.npy", "y.npy") == "two lines.npy: does not exist"


def test_a_name_that_is_no_text_is_written_and_printed() -> None:
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))
    name = os.fsdecode(b"\xff.npy")
    done = run("-m", "gpuconv", "conv1d", "x.npy", "w.npy", name, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\\udcff.npy: (1, 18) float32, computed on the CPU\n"
    assert Path(name).exists()


class _Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_the_report_of_verify_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["verify", "--device", "cpu", "--filter", "docs_example"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[1] == "1 case, float16, bfloat16, float32, float64, complex64,"
    assert lines[2].startswith("  complex128; seed 0; ")
    assert "exact              6       0" in lines


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch, with_rich: bool) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    if not with_rich:
        real = builtins.__import__

        def without_rich(name: str, *arguments: Any, **keywords: Any) -> Any:
            if name.partition(".")[0] == "rich":
                raise ImportError(name)
            return real(name, *arguments, **keywords)

        monkeypatch.setattr(builtins, "__import__", without_rich)
    argv = ["verify", "--device", "cpu", "--filter", "docs_example", "--dtype", "float32"]
    assert main(argv) == 0
    assert "verifying" in terminal.text
    assert "1/1" in terminal.text
    if not with_rich:
        assert terminal.text.startswith("\rverifying 0/1 ")
        assert terminal.text.endswith(" \r")


def test_progress_in_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    with show_progress("verifying") as progress:
        progress(194, 202, "up_one_input_channel complex128")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.text)
    assert re.search(r"194/202 0:00:00 up_one_i\S*…", shown), shown


def test_progress_leaves_no_line_behind_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with suppress(KeyboardInterrupt), show_progress("verifying") as progress:
        progress(1, 20, "some case")
        raise KeyboardInterrupt
    shown = ""
    for part in terminal.text.split("\r"):
        shown = part + shown[len(part) :]
    assert "verifying 1/20 some case" in terminal.text
    assert shown.strip() == ""


def test_progress_in_a_pipe_is_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with show_progress("verifying") as progress:
        for done in range(50):
            progress(done, 50, f"case {done}")
            now += 0.7
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["verifying 15/50 case 15", "verifying 30/50 case 30", "verifying 45/50 case 45"]


def test_a_wav_output_is_told_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write("x.wav", normal(100), 8000)
    save("w.npy", normal(1, 1, 3, dtype="float64"))
    assert main(["conv1d", "x.wav", "w.npy", "y.wav", "--dtype", "float64", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "y.wav: (1, 98) float32, 8000 Hz, computed on the CPU\n"
    assert soundfile.info("y.wav").subtype == "FLOAT"


def test_files_are_private_to_nobody() -> None:
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))
    previous = os.umask(0o022)
    try:
        assert main(["conv1d", "x.npy", "w.npy", "y.npy", "--device", "cpu"]) == 0
    finally:
        os.umask(previous)
    assert Path("y.npy").stat().st_mode & 0o777 == 0o644


def test_an_unforeseen_error_is_one_line_and_no_mismatch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a bug,\nno mistake of the user")

    monkeypatch.setattr(files, "write", broken)
    argv = ("conv1d", "x.npy", "w.npy", "y.npy", "--device", "cpu")
    line = refusal(capsys, *argv)
    assert re.match(r"unexpected ValueError in test_cli\.py, line \d+: a bug, no mistake of the user", line)
    monkeypatch.setenv("GPUCONV_TRACEBACK", "1")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):")
    assert "in broken" in error


def test_activations_of_a_file(tmp_path: Path) -> None:
    x, w = (np.random.default_rng(seed).standard_normal(shape) for seed, shape in enumerate(((2, 30), (3, 2, 3))))
    for name, array in (("x", x), ("w", w)):
        np.save(tmp_path / name, array)
    files = [str(tmp_path / f"{name}.npy") for name in "xwy"]
    assert main(["conv1d", *files, "--activation", "leaky_relu,0.1", "--input-activation", "gelu,tanh"]) == 0
    expected = gpuconv.conv1d(x, w, activation=("leaky_relu", 0.1), input_activation=("gelu", "tanh"))
    assert (np.load(files[2]) == expected).all()


@pytest.mark.parametrize("value", ["leaky_relu,x", "elu,inf", "relu,1", "gelu,erf"])
def test_an_activation_with_a_wrong_parameter(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", "--activation", value]) == 2
    message = f"--activation must be such as relu, leaky_relu,0.1 or gelu,tanh, got {value!r}"
    assert message in capsys.readouterr().err
