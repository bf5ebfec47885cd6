"""The gallery: each program does what its picture says, and the picture in the README is what its program makes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot

import gpuconv
from bench.gallery import denoiser, ecg, stft, vocoder
from bench.gallery.__main__ import NAMES, STYLE, main, make

CHECKOUT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def curves_and_words(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The places of each curve that has a name, in points, and all words of a picture."""
    root = ET.parse(file).getroot()
    curves = {}
    for group in root.iter(f"{SVG}g"):
        name = group.get("id", "")
        path = group.find(f"{SVG}path")
        if re.fullmatch(r"[a-z]+", name) and path is not None:
            numbers = re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))
            curves[name] = np.array(numbers, float).reshape(-1, 2)
    return curves, [text.text or "" for text in root.iter(f"{SVG}text")]


def test_the_picture_of_the_readme_is_what_its_program_makes(tmp_path: Path) -> None:
    kept = CHECKOUT / "bench" / "gallery" / "ecg.svg"
    assert kept.stat().st_size < 100_000
    assert f"({kept.relative_to(CHECKOUT).as_posix()})" in (CHECKOUT / "README.md").read_text(encoding="utf-8")
    make("ecg", tmp_path / "ecg.svg")
    (curves, words), (made, made_words) = curves_and_words(kept), curves_and_words(tmp_path / "ecg.svg")
    assert words == made_words
    assert [*curves] == [*made] == ["recorded", "heart", "filtered"]
    for name, places in curves.items():
        assert places.shape == made[name].shape == (ecg.SHOWN * ecg.RATE, 2)
        np.testing.assert_allclose(places, made[name], atol=0.01, err_msg=name)


def test_the_filter_finds_the_heart() -> None:
    signals = ecg.compute()
    wrong = np.std(signals["filtered"] - signals["heart"])
    assert wrong < 0.04
    assert np.std(signals["recorded"] - signals["heart"]) > 0.3
    # Mirrored ends: with zeros behind them the filter would see a step there.
    x, band = signals["recorded"][None, None], (ecg.low_pass(ecg.HIGH) - ecg.low_pass(ecg.LOW))[None, None]
    stepped = gpuconv.conv1d(x, band, padding="same")[0, 0]
    assert np.abs(stepped - signals["heart"])[:50].max() > 3 * np.abs(signals["filtered"] - signals["heart"])[:50].max()


def test_the_spectrogram_is_that_of_numpy_and_gives_the_sound_again() -> None:
    signals = stft.compute()
    sound, again = signals["sound"], signals["again"]
    whole = (sound.size // stft.HOP) * stft.HOP
    assert np.abs(again - sound)[:whole].max() < 2e-6 * np.abs(sound).max()
    padded = np.pad(sound.astype(float), stft.SIZE)
    frames = np.lib.stride_tricks.sliding_window_view(padded, stft.SIZE)[:: stft.HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(stft.SIZE + 1)[: stft.SIZE])).T ** 2
    loud = power > 1e-6 * power.max()
    expected = 10 * np.log10(power[loud] / power.max())
    np.testing.assert_allclose(signals["decibels"][loud], expected, atol=0.01)


def test_the_denoiser_takes_off_ten_decibels() -> None:
    signals = denoiser.compute()
    delay = denoiser.SIZE - denoiser.HOP
    clean, noisy = signals["clean"][:-delay], signals["noisy"][:-delay]
    assert signals["denoised"].shape == signals["noisy"].shape, "a push gives as many samples as it takes"
    before = denoiser.decibels_above(clean, noisy)
    assert denoiser.decibels_above(clean, signals["denoised"][delay:]) > before + 9


def test_shaped_taps_leave_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    convolve = gpuconv.conv_transpose1d
    monkeypatch.setattr(gpuconv, "conv_transpose1d", lambda *a, **k: calls.append(k) or convolve(*a, **k))
    signals = vocoder.compute()
    assert [call["input_activation"] for call in calls] == [("leaky_relu", 0.1)] * 2, "the activation is fused"
    frequencies = np.fft.rfftfreq(vocoder.BLOCK, 1 / (vocoder.RATE * vocoder.UP))
    images = frequencies > 0.75 * vocoder.RATE
    assert signals["shaped"].shape == (vocoder.CHANNELS, vocoder.UP * signals["input"].shape[-1])
    assert vocoder.spectrum(signals["shaped"])[images].max() < -90
    assert vocoder.spectrum(signals["random"])[images].max() > -20


@pytest.mark.parametrize("program", [ecg, stft, denoiser, vocoder], ids=lambda program: program.__name__)
def test_a_picture_is_labelled_and_whole(program: Any) -> None:
    """Every axis has a title and labels, with units where there are any, and no word hangs out of the picture."""
    with pyplot.style.context(["default", STYLE]):
        figure = program.draw(program.compute())
        figure.canvas.draw()
    inside = figure.bbox.padded(2)
    boxes = {text.get_text(): text.get_window_extent() for text in figure.findobj(pyplot.Text) if text.get_text()}
    assert [
        words for words, box in boxes.items() if not (inside.contains(*box.min) and inside.contains(*box.max))
    ] == []
    for axes in figure.axes:
        left = axes.get_subplotspec() is None or axes.get_subplotspec().is_first_col()
        bottom = axes.get_subplotspec() is not None and axes.get_subplotspec().is_last_row()
        assert axes.get_ylabel() or not left
        assert re.search(r"\[\w+\]$", axes.get_xlabel()) or not bottom
    pyplot.close(figure)


def test_the_command_makes_the_pictures_that_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ecg", "--out", str(tmp_path / "new"), "--format", "png"])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["ecg.png"]
    assert (tmp_path / "new" / "ecg.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as exit_of:
        main(["ecg", "cat"])
    assert exit_of.value.code == 2
    assert f"unknown picture cat; known: {', '.join(NAMES)}" in capsys.readouterr().err
