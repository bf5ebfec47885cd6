"""The reference: every public name is explained by an example, and every example runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gpuconv
from tests import NO_TORCH

CHECKOUT = Path(__file__).resolve().parents[2]
# What `import gpuconv` leaves out.
OTHERS = ("dask", "torch")
PUBLIC = ("gpuconv", *(f"gpuconv.{name}" for name in gpuconv.__all__ if inspect.ismodule(getattr(gpuconv, name))))


def modules(names: tuple[str, ...]) -> list[Any]:
    """The names as parameters; those that need PyTorch are marked."""
    return [pytest.param(name, marks=[pytest.mark.torch] if ".torch" in name else [], id=name) for name in names]


def load(name: str) -> ModuleType:
    if ".torch" in name:
        pytest.importorskip("torch", reason=NO_TORCH)
    if name == "gpuconv.compile":
        pytest.importorskip("cupy")
    return importlib.import_module(name)


def public_names(module: ModuleType) -> dict[str, Any]:
    """The functions and classes that a module offers."""
    return {name: value for name in module.__all__ if not inspect.ismodule(value := getattr(module, name))}


def is_public(name: str) -> bool:
    return not name.startswith("_")


@pytest.mark.parametrize("name", modules((*PUBLIC, *(f"gpuconv.{name}" for name in OTHERS))))
def test_every_public_name_is_explained_by_an_example(name: str) -> None:
    module = load(name)
    assert module.__doc__
    names = public_names(module)
    assert [*names] == [*dict.fromkeys(names)]
    assert [name for name, value in names.items() if ">>> " not in (inspect.getdoc(value) or "")] == []
    for cls in filter(inspect.isclass, names.values()):
        # Fields stand under "Attributes" of their class.
        own = {key: value for base in cls.__mro__[:-1] for key, value in vars(base).items() if is_public(key)}
        methods = {key for key, value in own.items() if inspect.isfunction(value) or isinstance(value, property)}
        if issubclass(cls, tuple):
            methods -= {"count", "index"}
        assert [key for key in sorted(methods) if not inspect.getdoc(getattr(cls, key))] == [], cls


def modules_with_examples() -> tuple[str, ...]:
    files = sorted((CHECKOUT / "gpuconv").rglob("*.py"))
    paths = [file.relative_to(CHECKOUT) for file in files if ">>> " in file.read_text(encoding="utf-8")]
    return tuple(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths)


@pytest.mark.parametrize("name", modules(modules_with_examples()))
def test_the_examples_run(name: str) -> None:
    result = doctest.testmod(load(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_no_markup_shows_in_the_docstrings() -> None:
    """The pages take Markdown: a literal block of reStructuredText would keep its colons."""
    for name in PUBLIC:
        module = importlib.import_module(name)
        docs = {name: module.__doc__, **{key: inspect.getdoc(value) for key, value in public_names(module).items()}}
        assert [key for key, text in docs.items() if re.search(r"::$|^=====", text or "", re.MULTILINE)] == []
