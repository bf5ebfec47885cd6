"""Makes the pictures of the gallery: `python -m bench.gallery [ecg stft denoiser vocoder] [--out DIR]`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = ("ecg", "stft", "denoiser", "vocoder")
STYLE = Path(__file__).with_name("gallery.mplstyle")


def make(name: str, file: Path) -> None:
    """Write one picture, in the format that the file's name ends in."""
    program = importlib.import_module(f"bench.gallery.{name}")
    with pyplot.style.context(["default", STYLE]):
        figure = program.draw(program.compute())
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gallery", description="Make the pictures of the gallery.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all where none is given")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures (default: this one)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the pictures (default: svg)")
    arguments = parser.parse_args(words)
    if unknown := [name for name in arguments.names if name not in NAMES]:
        parser.error(f"unknown picture {', '.join(unknown)}; known: {', '.join(NAMES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or NAMES:
        file = arguments.out / f"{name}.{arguments.format}"
        make(name, file)
        print(file)


if __name__ == "__main__":
    main()
