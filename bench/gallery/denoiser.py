"""A denoiser of a voice, here a simulated one: every 8 ms it gets 128 samples, and gives 128.

A stream of conv1d splits them into frequencies, each is scaled by how far it exceeds the noise, and a stream of
conv_transpose1d puts them together. The streams keep what they need of the past.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

from gpuconv import stream

RATE = 16000  # samples a second
SIZE, HOP = 512, 128  # samples: a window, and a push
LISTEN = 0.5  # seconds of noise alone at the start, from which its level is estimated


def voice() -> np.ndarray[Any, Any]:
    """Three seconds of syllables: harmonics of a pitch that glides, shaped by two formants."""
    rng = np.random.default_rng(11)
    sound = np.zeros(3 * RATE)
    start = LISTEN + 0.1
    while start < 2.75:
        length = rng.uniform(0.16, 0.34)
        t = np.arange(int(length * RATE)) / RATE
        pitch = rng.uniform(130, 190) * (1 + rng.uniform(-0.25, 0.25) * t / length)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        formants = rng.uniform((350, 1100), (800, 2500))
        syllable = np.zeros(t.size)
        for harmonic in range(1, 26):
            frequency = harmonic * pitch
            loudness = sum(np.exp(-0.5 * ((frequency - f) / (0.16 * f + 60)) ** 2) for f in formants)
            syllable += loudness * np.sin(harmonic * phase)
        at = int(start * RATE)
        sound[at : at + t.size] += (np.hanning(t.size) ** 0.6 * syllable)[: sound.size - at]
        start += length + rng.uniform(0.02, 0.16)
    return 0.5 * sound / np.abs(sound).max()


def compute() -> dict[str, Any]:
    """The voice, the voice in noise, and what comes out of the streams, push by push."""
    rng = np.random.default_rng(5)
    clean = voice()
    noisy = (clean + 0.05 * rng.standard_normal(clean.size)).astype(np.float32)

    window = np.sqrt(np.hanning(SIZE + 1)[:SIZE])
    angles = 2 * np.pi * np.outer(np.arange(SIZE // 2 + 1), np.arange(SIZE)) / SIZE
    basis = window * np.concatenate([np.cos(angles), -np.sin(angles)])
    twice = np.full(SIZE // 2 + 1, 2.0)
    twice[[0, -1]] = 1
    inverse = np.concatenate([twice, twice])[:, None] * basis * HOP / (SIZE * (window**2).sum())
    split = stream.Conv1d(basis[:, None].astype(np.float32), stride=HOP, padding=(SIZE - HOP, 0))
    join = stream.ConvTranspose1d(inverse[:, None].astype(np.float32), stride=HOP)

    # The gain of Ephraim and Malah (1984). The last window counts most, so that single peaks of the noise are not
    # audible as tones.
    noise = np.zeros(SIZE // 2 + 1)
    before = np.zeros(SIZE // 2 + 1)
    quiet = int(LISTEN * RATE / HOP)
    pieces = []
    for step, start in enumerate(range(0, noisy.size, HOP)):
        parts = split.push(noisy[None, start : start + HOP])  # (2*(SIZE/2 + 1), 1)
        power = (parts.reshape(2, -1) ** 2).sum(axis=0)
        if step < quiet:
            noise += power / quiet
            gain = np.zeros(noise.size)
        else:
            ratio = 0.97 * before / noise + 0.03 * np.maximum(power / noise - 1, 0)
            gain = ratio / (1 + ratio)
            before = gain**2 * power
        pieces.append(join.push(parts * np.tile(gain, 2)[:, None].astype(np.float32)))
    denoised = np.concatenate(pieces, axis=-1)[0]
    return {"clean": clean, "noisy": noisy, "denoised": denoised}


def spectrogram(sound: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The power in decibels, (frequencies, frames)."""
    frames = np.lib.stride_tricks.sliding_window_view(sound, SIZE)[::HOP] * np.hanning(SIZE)
    return 20 * np.log10(np.abs(np.fft.rfft(frames)).T + 1e-6)


def decibels_above(signal: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """The ratio of a signal to what is wrong in another that should be it."""
    return float(10 * np.log10((signal**2).sum() / ((found - signal) ** 2).sum()))


def draw(signals: dict[str, Any]) -> Figure:
    """The input and the output, as spectrograms on one scale and as signals."""
    clean, noisy, denoised = signals["clean"], signals["noisy"], signals["denoised"]
    delay = SIZE - HOP  # samples, until a window is full
    noisy, clean, denoised = noisy[:-delay], clean[:-delay], denoised[delay:]
    figure, axes = pyplot.subplots(
        2, 2, figsize=(9, 5), sharex=True, sharey="row", layout="constrained", height_ratios=(2, 1)
    )
    seconds = np.arange(clean.size) / RATE
    for column, (name, sound) in enumerate({"In": noisy, "Out": denoised}.items()):
        image = axes[0, column].imshow(
            spectrogram(sound),
            origin="lower",
            aspect="auto",
            vmin=-45,
            vmax=35,
            extent=(0, seconds[-1], 0, RATE / 2000),
        )
        axes[0, column].set(ylim=(0, 4), title=f"{name}: signal-to-noise ratio {decibels_above(clean, sound):.0f} dB")
        axes[0, column].grid(visible=False)
        axes[1, column].plot(seconds, sound, color=("#D55E00", "#0072B2")[column], linewidth=0.5, rasterized=True)
        axes[1, column].set(xlabel="time [s]", xlim=(0, seconds[-1]), ylim=(-0.7, 0.7))
    axes[0, 0].set(ylabel="frequency [kHz]", yticks=range(5))
    axes[1, 0].set(ylabel="amplitude", yticks=(-0.5, 0, 0.5), xticks=np.arange(0, 3, 0.5))
    axes[1, 1].axvspan(0, LISTEN, color="#EEEEEE", linewidth=0)
    axes[1, 1].text(0.03, 0.62, "learns\nthe noise", va="top", color="#333333", fontsize=8.5)
    figure.colorbar(image, ax=axes[0, :], label="power [dB]", pad=0.01)
    return figure
