"""`gpuconv plot`: draw the signals of one or two files, and their spectrograms or, of short ones, their spectra."""

from __future__ import annotations

import argparse
import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import files, functional
from ..text import count, install_hint
from .errors import EXIT_CODES, CommandError
from .options import at_least
from .terminal import tell

PICTURES = (".png", ".pdf", ".svg")
CHANNELS = 4  # that are drawn at most

_POINTS = 2000  # across a picture: of more samples the range of values is drawn, and more windows are spaced wider
_FEWEST_WINDOWS = 256  # across a spectrogram: shorter signals have windows closer together
_LONGEST_WINDOW, _SHORTEST_WINDOW = 512, 16  # samples
_SPECTRUM = 4096  # samples with the zeros that follow a short signal, so that its spectrum is a smooth curve
_MARKED = 128  # samples that are drawn as points at most
_DECIBELS = 80  # below the loudest value, where the colours end
_SPECTRUM_DECIBELS = 100  # below the largest value, where the axis of a spectrum ends at the latest
_SILENCE = -200  # decibels of zeros


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw a .npy or .wav file, or two files side by side",
        description="Draw the first channels of a file over time, and their spectrograms, into a\n"
        ".png, .pdf or .svg file. Two files, such as a recording before and after a filter,\n"
        "are drawn side by side on the same scales. Signals of up to 512 samples, such as\n"
        "the taps of a filter, are drawn with their spectrum: the gain at each frequency.",
        epilog=f"{EXIT_CODES}\n\nexample:\n  gpuconv plot taps.npy --rate 16000\n"
        "  gpuconv plot speech.wav out.wav both.png",
    )
    parser.add_argument("input", metavar="IN", help="a .npy file (channels, samples) or (samples), or a .wav file")
    parser.add_argument("after", nargs="?", metavar="AFTER", help="a second file, to draw next to it")
    parser.add_argument(
        "output", nargs="?", metavar="OUT", help="the picture (default: the name of the last file with .png)"
    )
    parser.add_argument(
        "--rate", type=at_least(1), metavar="HZ", help="sample rate of .npy files, for times in seconds"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=run)


class _Signal(NamedTuple):
    """A file to draw: its name, its channels (channels, samples) and the sample rate in Hz, where it is known."""

    name: str
    samples: files.Array
    rate: int | None

    @property
    def unit(self) -> str:
        return "samples" if self.rate is None else "seconds"

    @property
    def frequency_unit(self) -> str:
        return "cycles/sample" if self.rate is None else "Hz"

    @property
    def end(self) -> float:
        return float(self.samples.shape[1] / (self.rate or 1))


def run(args: argparse.Namespace) -> int:
    sources, target = _names(args)
    files.check_output(
        target, dict(zip(("first", "second"), sources, strict=False)), force=args.force, suffixes=PICTURES
    )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError(f"plot needs the package matplotlib: {install_hint('plot')}") from error
    signals = [_read(name, args.rate) for name in sources]
    without = [signal.name for signal in signals if signal.rate is None]
    if 0 < len(without) < len(signals):
        raise CommandError(f"{without[0]}: the other file has a sample rate, and this one has none; give --rate")
    figure = Figure(layout="constrained")
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # for names of files
        _draw(figure, signals)
        figure.savefig(picture, format=Path(target).suffix[1:].lower(), dpi=120)
    files.write_bytes(target, picture.getvalue(), force=args.force)
    drawn = ", ".join(f"{signal.name} ({count(min(len(signal.samples), CHANNELS), 'channel')})" for signal in signals)
    print(f"{target}: {drawn}")
    return 0


def _names(args: argparse.Namespace) -> tuple[list[str], str]:
    """The files to draw and the picture, which is the last name if that has the suffix of a picture."""
    names = [name for name in (args.input, args.after, args.output) if name is not None]
    if "" in names:
        raise CommandError("the name of a file is empty")
    suffix = Path(names[-1]).suffix.lower()
    is_named = len(names) == 3 or (len(names) == 2 and suffix in PICTURES)
    if len(names) == 2 and suffix not in (*PICTURES, *files.SUFFIXES) and names[1] != files.STANDARD:
        allowed = f"{' or '.join(files.SUFFIXES)}, or for a picture in {' or '.join(PICTURES)}"
        raise CommandError(f"{names[1]}: the name must end in {allowed}")
    sources, target = (names[:-1], names[-1]) if is_named else (names, str(Path(names[-1]).with_suffix(".png")))
    if sources.count(files.STANDARD) > 1:
        raise CommandError("standard input, -, can be only one of the files")
    if not is_named and names[-1] == files.STANDARD:
        raise CommandError("a picture of standard input, -, needs a name: OUT")
    if target == files.STANDARD:
        raise CommandError("a picture is not written to standard output, -, expected the name of a file")
    return sources, target


def _read(path: str, rate: int | None) -> _Signal:
    name = "standard input" if path == files.STANDARD else path
    array, own_rate, notes = files.read(path, "float32")
    for note in notes:
        tell("warning", note)
    if not 1 <= array.ndim <= 3 or array.size == 0:
        raise CommandError(f"{name}: holds an array of shape {array.shape}, expected (channels, samples)")
    channels = array.reshape(-1, array.shape[-1])
    if array.ndim == 3 and len(array) > 1:
        tell("note", f"{name}: only the first of {len(array)} samples is drawn")
        channels = channels[: array.shape[1]]
    if len(channels) > CHANNELS:
        tell("note", f"{name}: only the first {CHANNELS} of {len(channels)} channels are drawn")
    channels = channels[:CHANNELS]
    if not np.isfinite(channels).all():
        tell("note", f"{name}: infinities, NaN and values too large for float32 are not drawn")
    return _Signal(name, channels, own_rate or rate)


def _draw(figure: Any, signals: list[_Signal]) -> None:
    rows = max(len(signal.samples) for signal in signals)
    figure.set_size_inches(6.5 * len(signals) + 1, 3.6 * rows + 0.4)
    if all(signal.samples.shape[1] <= _LONGEST_WINDOW for signal in signals):
        _draw_spectra(figure, signals, rows)
    else:
        _draw_spectrograms(figure, signals, rows)


def _draw_spectra(figure: Any, signals: list[_Signal], rows: int) -> None:
    axes = figure.subplots(2 * rows, len(signals), squeeze=False, sharey="row")
    longest = max(signal.end for signal in signals)
    for row in range(rows):
        columns = _shown(axes, signals, row)
        spectra = {column: _spectrum(signals[column].samples[row]) for column in columns}
        largest = _largest(spectra.values())
        lowest = min(np.nanmin(power, initial=largest) for power in spectra.values())
        for column in columns:
            signal = signals[column]
            wave, spectrum = axes[2 * row : 2 * row + 2, column]
            half = 0.5 / (signal.rate or 1)
            wave.set_xlim(-half, (longest if signal.rate else signal.end) - half)
            wave.set_xlabel(signal.unit)
            spectrum.plot(np.linspace(0, (signal.rate or 1) / 2, _SPECTRUM // 2 + 1), spectra[column], linewidth=0.8)
            spectrum.set_xlim(0, max(signals[each].rate or 1 for each in columns) / 2)
            spectrum.set_ylim(max(lowest, largest - _SPECTRUM_DECIBELS) - 5, largest + 5)
            spectrum.set_xlabel(signal.frequency_unit)
            if column == columns[0]:
                spectrum.set_ylabel("dB")


def _draw_spectrograms(figure: Any, signals: list[_Signal], rows: int) -> None:
    in_seconds = all(signal.rate for signal in signals)
    axes = figure.subplots(2 * rows, len(signals), squeeze=False, sharey="row", sharex="all" if in_seconds else "col")
    for row in range(rows):
        columns = _shown(axes, signals, row)
        powers = {column: _spectrogram(signals[column].samples[row]) for column in columns}
        loudest = _largest(power for power, _ in powers.values())
        for column in columns:
            signal = signals[column]
            wave, image = axes[2 * row : 2 * row + 2, column]
            power, hop = powers[column]
            scale = signal.rate or 1
            # Windows are centred at multiples of the hop, and so are the columns of the picture.
            end = ((power.shape[1] - 0.5) * hop) / scale
            colours = image.imshow(
                power, origin="lower", aspect="auto", cmap="magma", vmin=loudest - _DECIBELS, vmax=loudest,
                extent=(-hop / 2 / scale, end, 0, scale / 2),
            )  # fmt: skip
            if column == columns[0]:
                image.set_ylabel(signal.frequency_unit)
            wave.set_xlim(0, max(each.end for each in signals) if in_seconds else signal.end)
            image.set_ylim(0, max(signals[each].rate or 1 for each in columns) / 2)
            if row == len(signal.samples) - 1:
                image.set_xlabel(signal.unit)
                image.tick_params(labelbottom=True)
        figure.colorbar(colours, ax=list(axes[2 * row + 1]), label="dB", pad=0.01)


def _shown(axes: Any, signals: list[_Signal], row: int) -> list[int]:
    """Draw a channel of each signal that has it, and return the columns of these signals."""
    columns = [column for column, signal in enumerate(signals) if row < len(signal.samples)]
    for column, signal in enumerate(signals):
        pair = axes[2 * row : 2 * row + 2, column]
        if column not in columns:
            for each in pair:
                each.set_visible(False)
            continue
        _draw_wave(pair[0], signal.samples[row], signal.rate)
        if row == 0:
            pair[0].set_title(signal.name, fontsize="medium", parse_math=False)
        if column == columns[0]:
            name = "" if len(axes) == 2 else f"channel {row + 1}\n"
            pair[0].set_ylabel(f"{name}amplitude")
            for leftmost in pair:
                leftmost.tick_params(labelleft=True)
    return columns


def _largest(decibels: Iterable[files.Array]) -> float:
    """The largest finite value; 0 where all signals are silent."""
    largest = max(float(power[np.isfinite(power)].max(initial=-math.inf)) for power in decibels)
    return largest if largest > _SILENCE + 1 else 0.0


def _draw_wave(axes: Any, samples: files.Array, rate: int | None) -> None:
    """Draw samples as a line, or if there are many, the range of values of neighbours."""
    step = -(-len(samples) // _POINTS)
    if step < 3:
        axes.plot(
            np.arange(len(samples)) / (rate or 1), samples, ".-" if len(samples) <= _MARKED else "-", linewidth=0.8
        )
        return
    starts = np.arange(0, len(samples), step)
    low, high = (bound.reduceat(samples, starts) for bound in (np.minimum, np.maximum))
    axes.fill_between(starts / (rate or 1), low, high, linewidth=0.4, edgecolor="C0")


def _spectrogram(samples: files.Array) -> tuple[files.Array, int]:
    """The power of a signal in decibels (frequencies, windows), and the samples from one window to the next.

    A sine of amplitude 1 has 0 dB. The short-time Fourier transform is one convolution, whose taps are cosines and
    sines times a Hann window. Shorter windows have as many frequencies as long ones.
    """
    longest = 2 ** int(math.log2(max(len(samples) // 8, 1)))
    K = min(_LONGEST_WINDOW, max(_SHORTEST_WINDOW, longest))
    hop = max(1, min(K // 4, len(samples) // _FEWEST_WINDOWS), min(K, -(-len(samples) // _POINTS)))
    left, right = K // 2, K // 2 + hop // 2  # the last window is centred less than half a hop before the end
    window = np.hanning(K + 1)[:-1]
    frequencies = _LONGEST_WINDOW // 2 + 1
    angles = np.pi * np.outer(np.linspace(0, 1, frequencies), np.arange(K))
    taps = np.concatenate((np.cos(angles), np.sin(angles))) * (window / (window.sum() / 2))
    with np.errstate(all="ignore"):  # values that are not finite are not drawn
        spectrum = functional.conv1d(
            samples.reshape(1, 1, -1), taps[:, np.newaxis].astype(np.float32), stride=hop, padding=(left, right),
            padding_mode="reflect" if len(samples) > right else "zeros",
        )  # fmt: skip
        real, imaginary = spectrum[0].reshape(2, frequencies, -1)
        return 10 * np.log10(real**2 + imaginary**2 + np.float32(10 ** (_SILENCE / 10))), hop


def _spectrum(samples: files.Array) -> files.Array:
    """The power of a short signal in decibels (frequencies,): of the taps of a filter, its gain."""
    with np.errstate(all="ignore"):  # values that are not finite are not drawn
        power = np.abs(np.fft.rfft(samples.astype(np.float64), _SPECTRUM)) ** 2
        return np.asarray(10 * np.log10(power + 10 ** (_SILENCE / 10)))
