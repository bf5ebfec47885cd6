"""`gpuconv plot`: what is drawn, and the right values in a spectrogram."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from matplotlib import image
from scipy import signal

from gpuconv.cli import main, plot
from tests.cli.test_cli import normal, refusal, save


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tone(frequency: float, seconds: float = 1.0, rate: int = 8000) -> Any:
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate).astype(np.float32)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    figures: list[Any] = []
    draw = plot._draw
    monkeypatch.setattr(plot, "_draw", lambda figure, signals: (figures.append(figure), draw(figure, signals)))
    return figures


def test_before_and_after_stand_beside_each_other(drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write("before.wav", np.stack((tone(440), tone(1000))).T, 8000, subtype="FLOAT")
    soundfile.write("after.wav", tone(440, 0.5), 4000, subtype="FLOAT")
    assert main(["plot", "before.wav", "after.wav", "both.png"]) == 0
    assert capsys.readouterr().out == "both.png: before.wav (2 channels), after.wav (1 channel)\n"
    assert image.imread("both.png").std() > 0.1
    axes = [a for a in drawn[0].axes if a.get_label() != "<colorbar>"]
    assert [a.get_visible() for a in axes] == [True, True, True, True, True, False, True, False]
    assert [a.get_title() for a in axes[:2]] == ["before.wav", "after.wav"]
    # The rate of each file gives its times and frequencies; the scales of a row are one.
    assert axes[0].get_xlim() == (0, 1)
    assert axes[1].get_xlim() == (0, 1)
    assert axes[2].images[0].get_extent()[3] == 4000
    assert axes[3].images[0].get_extent()[3] == 2000
    assert axes[2].get_ylim() == axes[3].get_ylim() == (0, 4000)
    assert axes[2].images[0].get_clim() == axes[3].images[0].get_clim()
    assert axes[0].collections  # 8000 samples are drawn as the range of neighbours


def test_a_shorter_file_and_one_with_fewer_channels_keep_the_scales(drawn: list[Any]) -> None:
    soundfile.write("short.wav", tone(440, 0.5), 8000)
    soundfile.write("long.wav", np.stack((tone(440), tone(1000))).T, 8000)
    assert main(["plot", "short.wav", "long.wav", "both.png"]) == 0
    axes = [a for a in drawn[0].axes if a.get_label() != "<colorbar>"]
    assert all(a.get_xlim() == (0, 1) for a in axes)
    assert [a.yaxis.get_tick_params()["labelleft"] for a in axes[1::2]] == [False, False, True, True]


@pytest.mark.parametrize("count", [1, 5, 63, 64, 999, 3000, 8191, 100_003])
def test_a_spectrogram_reaches_the_end_of_the_signal(count: int) -> None:
    power, hop = plot._spectrogram(normal(count))
    assert count <= (power.shape[1] - 0.5) * hop < count + hop


def test_a_spectrogram_is_that_of_scipy() -> None:
    x = (tone(1000) + 0.25 * tone(2500) + 0.01 * normal(8000)).astype(np.float32)
    power, hop = plot._spectrogram(x)
    assert (hop, power.shape) == (31, (257, 259))
    window = np.hanning(513)[:-1]
    transform = signal.ShortTimeFFT(window, hop, 8000, scale_to=None)
    expected = 20 * np.log10(np.abs(transform.stft(x, p0=0, p1=259, padding="even")) / (window.sum() / 2))
    np.testing.assert_allclose(power[:, 9:-9], expected[:, 9:-9], atol=0.05)
    assert power[64].max() == pytest.approx(0, abs=0.1)  # 1000 Hz, amplitude 1
    assert power[160].max() == pytest.approx(20 * np.log10(0.25), abs=0.3)


def test_the_picture_has_the_name_of_the_file(drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    save("ecg.npy", normal(1000))
    assert main(["plot", "ecg.npy", "--rate", "250"]) == 0
    assert capsys.readouterr().out == "ecg.png: ecg.npy (1 channel)\n"
    wave, image_axes = drawn[0].axes[:2]
    assert wave.lines[0].get_xydata()[-1, 0] == pytest.approx(999 / 250)
    assert image_axes.get_xlabel() == "seconds"
    assert main(["plot", "ecg.npy", "ecg.svg"]) == 0
    assert Path("ecg.svg").read_text("utf-8").startswith("<?xml")
    assert drawn[1].axes[1].get_xlabel() == "samples"
    capsys.readouterr()
    assert refusal(capsys, "plot", "ecg.npy") == "ecg.png: exists; give --force to replace it"
    assert main(["plot", "ecg.npy", "--force"]) == 0


def test_a_spectrogram_of_few_samples_is_smooth() -> None:
    """Windows of 64 samples, but 257 frequencies, and a window at every third sample."""
    power, hop = plot._spectrogram(tone(1000, 0.125))
    assert (hop, power.shape) == (3, (257, 334))
    assert 64 - power[:, 20:-20].argmax(axis=0).mean() == pytest.approx(0, abs=0.5)  # 1000 Hz


@pytest.mark.parametrize("rate", [None, 16000])
def test_taps_are_drawn_with_their_gain(rate: int | None, drawn: list[Any]) -> None:
    """Two files of up to 512 samples: the gain of each at every frequency, on the same scales."""
    taps = signal.firwin(101, 0.2)
    save("taps.npy", np.stack((taps, -taps)))
    save("mean.npy", np.full(4, 0.25))
    assert main(["plot", "taps.npy", "mean.npy", *(["--rate", str(rate)] if rate else []), "both.png"]) == 0
    axes = drawn[0].axes
    assert [a.get_visible() for a in axes] == [True, True, True, True, True, False, True, False]
    assert axes[1].lines[0].get_marker() == "."
    assert axes[2].get_ylim() == axes[3].get_ylim()
    frequency, gain = axes[2].lines[0].get_xydata().T
    assert (frequency[0], frequency[-1]) == (0, (rate or 1) / 2)
    _, response = signal.freqz(taps, worN=2049, include_nyquist=True)
    is_passed = np.abs(response) > 1e-3
    np.testing.assert_allclose(gain[is_passed], 20 * np.log10(np.abs(response[is_passed])), atol=1e-3)
    assert axes[3].lines[0].get_ydata()[1024] < -100  # a mean of four has no gain at a quarter of the rate
    assert axes[2].get_xlabel() == ("Hz" if rate else "cycles/sample")


def test_a_picture_may_follow_the_options() -> None:
    save("x.npy", normal(600))
    assert main(["plot", "x.npy", "--rate", "250", "y.png"]) == 0
    assert main(["plot", "--rate", "250", "x.npy", "--force", "x.npy", "y.png"]) == 0
    assert Path("y.png").exists()
    assert not Path("x.png").exists()


def test_no_values_stop_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Silence, one sample, infinities, a batch, more channels than are drawn, integers, names that look like TeX."""
    arrays = {
        "0": np.zeros(300), "1": np.ones(1), "2": np.array([1, np.nan, np.inf] * 40), "3": normal(3, 6, 50),
        "4": normal(5000) * 1e30, "5": normal(90).astype(np.float64) * 1e300, "6": np.arange(90, dtype=np.int16),
        "$\\foo$": np.ones(9), "\u97f3": np.ones(9),
    }  # fmt: skip
    for name, array in arrays.items():
        save(f"{name}.npy", array)
        assert main(["plot", f"{name}.npy"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count(".png") == len(arrays)
    assert captured.err.splitlines() == [
        "gpuconv: note: 2.npy: infinities, NaN and values too large for float32 are not drawn",
        "gpuconv: note: 3.npy: only the first of 3 samples is drawn",
        "gpuconv: note: 3.npy: only the first 4 of 6 channels are drawn",
        "gpuconv: note: 5.npy: infinities, NaN and values too large for float32 are not drawn",
    ]


def test_silence_is_dark_and_one_sample_is_a_point(drawn: list[Any]) -> None:
    save("0.npy", np.zeros(3000))
    save("1.npy", np.ones(1))
    assert main(["plot", "0.npy"]) == main(["plot", "1.npy"]) == 0
    (picture,) = drawn[0].axes[1].images
    assert picture.get_array().max() < picture.get_clim()[0]
    assert drawn[1].axes[0].lines[0].get_marker() == "."


def test_what_cannot_be_drawn_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    save("z.npy", normal(2, 20, dtype="complex64"))
    save("none.npy", np.zeros((2, 0)))
    save("x.npy", normal(2, 20))
    assert refusal(capsys, "plot", "z.npy").endswith("to float32 would lose the imaginary part")
    assert refusal(capsys, "plot", "none.npy").startswith("none.npy: holds an array of shape (2, 0)")
    assert refusal(capsys, "plot", "x.npy", "z.npy", "y.jpg").startswith("y.jpg: the name must end in .png")
    names = ".npy or .wav, or for a picture in .png or .pdf or .svg"
    assert refusal(capsys, "plot", "x.npy", "x.gif") == f"x.gif: the name must end in {names}"
    soundfile.write("x.wav", tone(440), 8000)
    without = "x.npy: the other file has a sample rate, and this one has none; give --rate"
    assert refusal(capsys, "plot", "x.wav", "x.npy", "y.png") == without
    assert refusal(capsys, "plot", "absent.npy") == "absent.npy: does not exist"
    assert refusal(capsys, "plot", "") == refusal(capsys, "plot", "x.npy", "") == "the name of a file is empty"
    assert refusal(capsys, "plot", "x.npy", "x.npy", "-").startswith("a picture is not written to standard output")
    assert refusal(capsys, "plot", "-").startswith("a picture of standard input, -, needs a name")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refusal(capsys, "plot", "x.npy").startswith("plot needs the package matplotlib: pip install")
