"""1-D convolution and transposed convolution for CuPy and NumPy arrays, with PyTorch's semantics."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .functional import conv1d, conv_transpose1d, prepare
from .lengths import conv1d_output_length, conv_transpose1d_output_length, output_lengths

if TYPE_CHECKING:
    from . import grad, nn, reference, signal, stream, testing
    from .compile import compile, is_compiled  # noqa: A004 - called as gpuconv.compile
    from .explain import explain
    from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "compile",
    "conv1d",
    "conv1d_output_length",
    "conv_transpose1d",
    "conv_transpose1d_output_length",
    "explain",
    "grad",
    "is_compiled",
    "nn",
    "output_lengths",
    "prepare",
    "reference",
    "signal",
    "stream",
    "testing",
    "verify",
]

# These are loaded when they are first used, so that `import gpuconv` takes little longer than `import numpy`.
_LAZY_MODULES = ("grad", "nn", "reference", "signal", "stream", "testing")
_LAZY_FUNCTIONS = {
    "compile": "compile",
    "explain": "explain",
    "is_compiled": "compile",
    "verify": "verify",
}  # by module


class _Package(ModuleType):
    """The class of this module. It keeps `gpuconv.verify`, and all that have the names of their modules, functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets the attribute to the module whenever somebody imports gpuconv.verify, for example.
        if name in _LAZY_FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker that saw this function would accept every name

    def __getattr__(name: str) -> Any:
        if name not in (*_LAZY_MODULES, *_LAZY_FUNCTIONS):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_LAZY_FUNCTIONS.get(name, name)}")
        return getattr(module, name) if name in _LAZY_FUNCTIONS else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
