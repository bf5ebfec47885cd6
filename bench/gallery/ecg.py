"""A simulated electrocardiogram without its hum, its noise and its wandering baseline: one band-pass, one call.

The filter is symmetric and the padding "same", so no wave is shifted in time. Reflecting the ends avoids a drop there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure

import gpuconv

RATE = 250  # samples a second
SECONDS, SHOWN = 10, 4  # that are simulated, and drawn
LOW, HIGH = 0.6, 40.0  # Hz, the edges of the band
TAPS = 1001  # four seconds

# The waves of a heartbeat: distance from its R wave and width in seconds, height in millivolts.
WAVES = {
    "P": (-0.17, 0.022, 0.14),
    "Q": (-0.030, 0.009, -0.12),
    "R": (0.0, 0.010, 1.15),
    "S": (0.032, 0.010, -0.25),
    "T": (0.26, 0.045, 0.32),
}


def low_pass(cutoff: float) -> np.ndarray[Any, Any]:
    """A windowed sinc with gain 1 at frequency 0."""
    taps = np.sinc(2 * cutoff / RATE * (np.arange(TAPS) - TAPS // 2)) * np.hamming(TAPS)
    return taps / taps.sum()


def compute() -> dict[str, Any]:
    """The heart's signal, what an electrode would record, and that after the filter, in millivolts."""
    rng = np.random.default_rng(3)
    seconds = np.arange(SECONDS * RATE) / RATE
    beats = 0.45 + np.cumsum(0.83 + 0.03 * rng.standard_normal(SECONDS + 2)) - 0.83
    heart = sum(
        height * np.exp(-0.5 * ((seconds - beat - distance) / width) ** 2)
        for beat in beats
        for distance, width, height in WAVES.values()
    )
    wander = 0.45 * np.sin(2 * np.pi * 0.13 * seconds + 1.0) + 0.2 * np.sin(2 * np.pi * 0.21 * seconds)
    hum = 0.11 * np.sin(2 * np.pi * 50 * seconds)
    recorded = heart + wander + hum + 0.05 * rng.standard_normal(seconds.size)

    band = low_pass(HIGH) - low_pass(LOW)
    x = recorded[None, None].astype(np.float32)  # (N, C_in, L)
    w = band[None, None].astype(np.float32)  # (C_out, C_in, K)
    filtered = gpuconv.conv1d(x, w, padding="same", padding_mode="reflect")[0, 0]
    return {"seconds": seconds, "heart": heart - heart.mean(), "recorded": recorded, "filtered": filtered}


def draw(signals: dict[str, Any]) -> Figure:
    """The recording, and below it the filtered signal over the heart's own."""
    first = {name: signal[: SHOWN * RATE] for name, signal in signals.items()}
    seconds = first["seconds"]
    # Fixed positions, so that the curves are the same with every font.
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 4.2), sharex=True, sharey=True)
    figure.subplots_adjust(left=0.08, right=0.985, top=0.925, bottom=0.115, hspace=0.3)
    above.plot(seconds, first["recorded"], color="#D55E00", linewidth=0.9, gid="recorded")
    above.set(ylabel="voltage [mV]", title="A simulated ECG: 50 Hz hum, noise, a wandering baseline")
    below.plot(seconds, first["heart"], color="#BBBBBB", linewidth=3.2, label="the heart alone", gid="heart")
    below.plot(seconds, first["filtered"], color="#0072B2", label="filtered", gid="filtered")
    below.set(xlabel="time [s]", ylabel="voltage [mV]", xlim=(0, SHOWN), ylim=(-1, 2), xticks=range(SHOWN + 1))
    below.set_title('gpuconv.conv1d(x, w, padding="same", padding_mode="reflect")', family="monospace", size=10)
    below.legend(loc="upper right", ncols=2, borderaxespad=0)
    return figure
