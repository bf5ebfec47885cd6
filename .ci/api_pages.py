"""Writes the reference as HTML pages, from the docstrings: `python .ci/api_pages.py FOLDER`. A warning is an error."""

from __future__ import annotations

import inspect
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.render

import gpuconv
import gpuconv.dask
import gpuconv.torch

# Modules that `import gpuconv` does not offer, since the libraries that they work with may not be installed.
OTHERS = (gpuconv.dask, gpuconv.torch)


def show_what_is_inherited(cls: type, public: set[object]) -> None:
    """Copy methods of bases that have no page to the class; otherwise its page would only name them."""
    for base in cls.__mro__[1:]:
        if base not in public and base.__module__.startswith("gpuconv"):
            for name, value in vars(base).items():
                if not name.startswith("_") and inspect.getdoc(value) and name not in vars(cls):
                    setattr(cls, name, value)


def main(folder: Path) -> None:
    offered = {name: getattr(gpuconv, name) for name in gpuconv.__all__}
    vars(gpuconv).update(offered)  # load what is loaded at first use, or pdoc would look for modules of these names
    modules = [gpuconv, *filter(inspect.ismodule, offered.values()), *OTHERS]
    public = {getattr(module, name) for module in modules for name in module.__all__}
    for cls in filter(inspect.isclass, public):
        show_what_is_inherited(cls, public)
    warnings.simplefilter("error")
    pdoc.render.configure(docformat="google", footer_text=f"gpuconv {gpuconv.__version__}")
    pdoc.pdoc("gpuconv", *(module.__name__ for module in OTHERS), output_directory=folder)
    for module in modules:
        page = (folder / f"{module.__name__.replace('.', '/')}.html").read_text(encoding="utf-8")
        names = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]
        if missing := [name for name in names if f'id="{name}"' not in page]:
            sys.exit(f"the page of {module.__name__} lacks {', '.join(missing)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
