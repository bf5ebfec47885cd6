"""The layer by which a vocoder makes 8 samples of one: leaky ReLU and transposed convolution in one call.

A new layer has random weights, which leave images of the input's spectrum at every multiple of its rate: the whistle of
untrained vocoders. With taps shaped like an interpolation filter the layer begins without them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

import gpuconv

RATE = 1000  # samples a second that go in
UP = 8  # samples that come out for each
CHANNELS, TAPS = 32, 8 * 16
BLOCK = 2048  # samples of a spectrum


def compute() -> dict[str, Any]:
    """The input of one layer, and its outputs with random and with interpolating taps."""
    rng = np.random.default_rng(1)
    t = np.arange(2048) / RATE
    pitch = 38 + 9 * np.sin(2 * np.pi * 0.7 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    x = np.sin(np.outer(rng.integers(1, 4, CHANNELS), phase) + rng.uniform(0, 2 * np.pi, (CHANNELS, 1)))
    x = x[None].astype(np.float32)  # (N, C_in, L)

    mix = rng.standard_normal((CHANNELS, CHANNELS, 1)) / np.sqrt(CHANNELS)
    place = (np.arange(TAPS) - (TAPS - 1) / 2) / UP  # in samples of the input
    shaped = mix * np.sinc(place) * np.kaiser(TAPS, 8.0)
    random = rng.standard_normal((CHANNELS, CHANNELS, TAPS)) / np.sqrt(CHANNELS * TAPS / UP)

    def layer(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        w = weight.astype(np.float32)  # (C_in, C_out, K)
        return gpuconv.conv_transpose1d(x, w, stride=UP, padding="same", input_activation=("leaky_relu", 0.1))[0]

    return {"input": x[0], "random": layer(random), "shaped": layer(shaped)}


def spectrum(signals: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The mean power over all channels and blocks, in decibels below the largest."""
    blocks = np.lib.stride_tricks.sliding_window_view(signals, BLOCK, axis=-1)[:, :: BLOCK // 2] * np.blackman(BLOCK)
    power = (np.abs(np.fft.rfft(blocks)) ** 2).mean(axis=(0, 1))
    return 10 * np.log10(power / power.max() + 1e-12)


def draw(signals: dict[str, Any]) -> Figure:
    """A hundred milliseconds of a channel, and the spectra of all."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(1, 1.25))
    first, count = 700, 60
    at = np.arange(first * UP, (first + count) * UP)
    frequencies = np.fft.rfftfreq(BLOCK, 1 / (RATE * UP)) / 1000
    for name, colour, width in (("random", "#D55E00", 0.7), ("shaped", "#0072B2", 1.8)):
        left.plot((at / UP - first) * 1000 / RATE, signals[name][0, at], color=colour, linewidth=width)
        right.plot(frequencies, spectrum(signals[name]), color=colour)
    left.set(xlabel="time [ms]", ylabel="one output channel", xlim=(0, count * 1000 / RATE), ylim=(-1.5, 1.5))
    left.set_title("8 samples out for each one in")
    right.set(xlabel="frequency [kHz]", ylabel="power [dB]", xlim=(0, RATE * UP / 2000), ylim=(-105, 8))
    right.set_title("Random taps leave images around 1, 2, 3 kHz")
    right.text(2.08, -50, "random taps", color="#D55E00", ha="left", va="top")
    right.text(0.72, -80, "taps shaped like an interpolation filter", color="#0072B2", ha="left", va="top")
    return figure
