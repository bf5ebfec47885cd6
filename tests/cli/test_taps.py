"""`gpuconv conv1d` and `conv_transpose1d` of taps (K,), of one channel (L,), and of integers."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
import soundfile

import gpuconv
from gpuconv.cli import main
from tests.cli.test_cli import in_folder, normal, refusal, rng, save  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    ("dtype", "out_dtype", "options"),
    [("int8", "int64", ""), ("uint8", "int32", "--out-dtype int32"), ("int64",) * 2 + ("",)],
)
@pytest.mark.parametrize("pieces", ["", "--max-bytes 1kB"])
def test_integers_are_summed_exactly(dtype: str, out_dtype: str, options: str, pieces: str) -> None:
    x, w = (
        save(name, rng.integers(0, 100, shape).astype(dtype))
        for name, shape in (("x.npy", (2, 300)), ("w.npy", (3, 2, 9)))
    )
    b = save("b.npy", rng.integers(0, 100, 3).astype(out_dtype))
    argv = [
        "conv1d",
        "x.npy",
        "w.npy",
        "y.npy",
        "--bias",
        "b.npy",
        "--device",
        "cpu",
        *options.split(),
        *pieces.split(),
    ]
    assert main(argv) == 0
    found = np.load("y.npy")
    assert found.dtype == out_dtype
    assert np.array_equal(found, gpuconv.conv1d(x, w, b, out_dtype=out_dtype))


@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
@pytest.mark.parametrize("pieces", ["", "--max-bytes 2kB"])
def test_taps_filter_each_channel_by_itself(op: str, pieces: str) -> None:
    taps, b = save("taps.npy", normal(9)), save("b.npy", normal(2))
    options = ["--padding", "same", "--stride", "2", "--bias", "b.npy", "--device", "cpu", *pieces.split()]
    for shape in ((2, 300), (3, 2, 300)):
        x = save("x.npy", normal(*shape))
        assert main([op, "x.npy", "taps.npy", "y.npy", "--force", *options]) == 0
        weight = np.stack((taps, taps))[:, np.newaxis]
        expected = getattr(gpuconv, op)(x, weight, b, padding="same", stride=2, groups=2)
        np.testing.assert_allclose(np.load("y.npy"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("op", ["conv1d", "conv_transpose1d"])
def test_the_examples_of_the_help_run(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A recording at a constant level keeps that level, except near its ends."""
    assert main([op, "--help"]) == 0
    examples = capsys.readouterr().out.replace(" \\\n", " ").partition("\nexample:\n")[2]
    convolve, make = (shlex.split(line) for line in examples.splitlines() if line.startswith("  "))
    soundfile.write("speech.wav", np.full(200, 0.5, np.float32), 8000, subtype="FLOAT")
    exec(make[2])
    assert main(convolve[1:]) == 0
    found, rate = soundfile.read("out.wav")
    assert (len(found), rate) == ((200, 8000) if op == "conv1d" else (407, 16000))
    np.testing.assert_allclose(found[10:-10], 0.5, atol=1e-6)


def test_one_filter_in_another_shape_is_told_what_filters_each_channel(capsys: pytest.CaptureFixture[str]) -> None:
    save("x.npy", normal(2, 300))
    save("scalar.npy", np.float32(1))
    hint = "; a WEIGHT (K,) without --groups filters each channel"
    for shape, options, is_hint in (
        ((1, 1, 9), [], True),
        ((1, 9), [], True),
        ((9,), ["--groups", "2"], True),
        ((2, 1, 9), [], False),
        ((1, 1, 9), ["--padding", "some"], False),
        ((1, 1, 999), ["--groups", "2"], False),
    ):
        save("w.npy", normal(*shape))
        assert refusal(capsys, "conv1d", "x.npy", "w.npy", "y.npy", *options).endswith(hint) is is_hint, (
            shape,
            options,
        )
    assert not refusal(capsys, "conv1d", "x.npy", "scalar.npy", "y.npy").endswith(hint)


@pytest.mark.parametrize("pieces", ["", "--max-bytes 2kB"])
def test_an_array_with_one_axis_is_one_channel(pieces: str) -> None:
    x, taps, w = save("x.npy", normal(300)), save("taps.npy", normal(9)), save("w.npy", normal(4, 1, 9))
    for weight, array in (("taps.npy", taps.reshape(1, 1, 9)), ("w.npy", w)):
        assert main(["conv1d", "x.npy", weight, "y.npy", "--force", "--device", "cpu", *pieces.split()]) == 0
        np.testing.assert_allclose(np.load("y.npy"), gpuconv.conv1d(x[np.newaxis], array), rtol=0, atol=1e-5)
