"""A spectrogram by one strided convolution, and the sound back from it by the transposed one.

The windowed sines and cosines are the weight of both directions. With Hann windows that overlap by three quarters the
sum of the squared windows is constant, so the transposed convolution, divided by it, is the inverse.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

import gpuconv

RATE = 16000  # samples a second
SIZE, HOP = 512, 128  # samples


def bird() -> np.ndarray[Any, Any]:
    """Three seconds of whistles that glide, with an overtone, and a little noise."""
    rng = np.random.default_rng(7)
    sound = 1e-3 * rng.standard_normal(3 * RATE)
    start = 0.12
    while start < 2.7:
        length = rng.uniform(0.12, 0.32)
        t = np.arange(int(length * RATE)) / RATE
        low, bend, trill = rng.uniform(2000, 3600), rng.uniform(-2200, 2600), rng.uniform(0, 420)
        pitch = low + bend * (t / length) ** 2 + trill * np.sin(2 * np.pi * 27 * t)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        note = np.sin(phase) + 0.12 * np.sin(2 * phase)
        at = int(start * RATE)
        sound[at : at + t.size] += (0.5 * np.hanning(t.size) * note)[: sound.size - at]
        start += length + rng.uniform(0.02, 0.09)
    return sound


def compute() -> dict[str, Any]:
    """A sound, its spectrogram in decibels, and the sound made from that again."""
    sound = bird().astype(np.float32)
    window = np.hanning(SIZE + 1)[:SIZE]
    angles = 2 * np.pi * np.outer(np.arange(SIZE // 2 + 1), np.arange(SIZE)) / SIZE
    # (C_out, 1, K): all cosines, then all sines.
    weight = (window * np.concatenate([np.cos(angles), -np.sin(angles)]))[:, None].astype(np.float32)

    parts = gpuconv.conv1d(sound[None], weight, stride=HOP, padding=SIZE)  # (2*(SIZE/2 + 1), frames)
    real, imaginary = np.split(parts, 2)
    power = real**2 + imaginary**2

    # Every frequency but the first and the last stands for two of the full transform.
    twice = np.full((SIZE // 2 + 1, 1), 2, np.float32)
    twice[[0, -1]] = 1
    scale = SIZE * (window**2).sum() / HOP
    back = gpuconv.conv_transpose1d(np.concatenate([twice, twice]) * parts, weight, stride=HOP, padding=SIZE)
    again = np.zeros_like(sound)
    again[: back.shape[-1]] = back[0, : sound.size] / scale
    decibels = 10 * np.log10(power / power.max() + 1e-9)
    return {"sound": sound, "decibels": decibels, "again": again}


def draw(signals: dict[str, Any]) -> Figure:
    """The spectrogram, and below it the sound that was made from it again."""
    sound, again = signals["sound"], signals["again"]
    seconds = np.arange(sound.size) / RATE
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8, 5), sharex=True, layout="constrained", height_ratios=(2.4, 1)
    )
    frames = signals["decibels"].shape[-1]
    first, last = -SIZE / 2 / RATE, ((frames - 1) * HOP - SIZE / 2) / RATE
    image = above.imshow(
        signals["decibels"], origin="lower", aspect="auto", vmin=-70, vmax=0, extent=(first, last, 0, RATE / 2000)
    )
    above.set(ylabel="frequency [kHz]", yticks=range(0, 9, 2), title=f"The spectrogram: conv1d(x, w, stride={HOP})")
    above.grid(visible=False)
    figure.colorbar(image, ax=above, label="power [dB]", pad=0.01)
    below.plot(seconds, again, color="#0072B2", linewidth=0.5, rasterized=True)
    error = np.abs(again - sound).max() / np.abs(sound).max()
    below.set(
        xlabel="time [s]",
        ylabel="amplitude",
        xlim=(0, seconds[-1]),
        ylim=(-0.65, 0.65),
        xticks=np.arange(0, 3.1, 0.5),
        yticks=(-0.5, 0, 0.5),
        title=f"And back: conv_transpose1d(y, w, stride={HOP}), to {error:.0e} of the peak in float32",
    )
    return figure
