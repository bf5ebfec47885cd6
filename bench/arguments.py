"""Kinds of command-line arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def counts(text: str) -> list[int]:
    return [count(number) for number in text.split(",")]


def listed(names: str, known: Mapping[str, T], what: str, parser: argparse.ArgumentParser) -> tuple[T, ...]:
    """The values that a comma-separated list names, in the order of `known`; "all" is every one.

    Exits through the parser where a name is unknown.
    """
    wanted = {name.strip() for name in names.split(",")}
    if wanted == {"all"}:
        return tuple(known.values())
    if unknown := wanted - set(known):
        parser.error(f"unknown {what} {', '.join(sorted(unknown))}; known: {', '.join(known)}, all")
    return tuple(value for name, value in known.items() if name in wanted)
