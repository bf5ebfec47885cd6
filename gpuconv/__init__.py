"""1-D convolution and transposed convolution for CuPy and NumPy arrays, with PyTorch's semantics.

    >>> import numpy as np, gpuconv
    >>> x = np.arange(8.0).reshape(1, 1, 8)  # (N, C_in, L_in); a CuPy array is computed on its GPU
    >>> w = np.array([[[0.25, 0.5, 0.25]]])  # (C_out, C_in/groups, K)
    >>> gpuconv.conv1d(x, w, stride=2, padding="same")
    array([[[1., 3., 5., 5.]]])

- `conv1d` and `conv_transpose1d` are the two operations, with the order of arguments of torch.nn.functional.
- `conv1d_output_length`, `conv_transpose1d_output_length` and `output_lengths`, for many samples, give output lengths.
- `gpuconv.nn` has layers, `gpuconv.grad` the gradients.
- `gpuconv.stream` has both operations for signals that arrive in pieces, `gpuconv.chunked` for arrays larger than
  memory, `gpuconv.dask` for dask arrays, `gpuconv.torch` for PyTorch's tensors.
- `gpuconv.signal` has the FIR filters of scipy.signal, `gpuconv.sigpy` the convolutions of sigpy.
- `explain` tells what a call will run, and why; `prepare` packs weights once for many calls; `compile` compiles kernels
  in advance, and `is_compiled` tells whether that was done.
- `verify` checks the results of this machine, `gpuconv.testing` those of your tests; `gpuconv.reference` has the
  definitions and the error bounds.

`gpuconv.dask` and `gpuconv.torch` must be imported by their names.

## Shapes

"Convolution" is cross-correlation: the kernel is not flipped, as in every deep-learning framework. The axis N may be
absent; the call then computes one sample.

|        | conv1d | conv_transpose1d |
| ------ | ------ | ---------------- |
| input  | (N, C_in, L_in) | (N, C_in, L_in) |
| weight | (C_out, C_in/groups, K) | (C_in, C_out/groups, K) |
| bias   | (C_out,) or None | (C_out,) or None |
| output | (N, C_out, L_out) | (N, C_out, L_out) |

    conv1d            L_out = floor((L_in + left + right - dilation*(K - 1) - 1) / stride) + 1
    conv_transpose1d  L_out = (L_in - 1)*stride - left - right + dilation*(K - 1) + output_padding + 1

`padding="same"` gives L_out = ceil(L_in/stride), transposed L_in*stride; an odd total puts one more on the right.
With N = 0, C_out = 0 or C_in = 0 the result has the right shape; an empty sum is the bias, or zero.

## Arrays

- **dtypes**: float16, bfloat16 (ml_dtypes; on a GPU with NumPy 2.1.2 or newer), float32, float64, complex64,
  complex128; all arrays share one. float16 and bfloat16 are summed in float32 and rounded once. Complex data take real
  taps, too (float32 with complex64, float64 with complex128), as two real convolutions on the parts in place. int8,
  uint8, int16, int32 and int64 are summed in int64, or with `out_dtype="int32"` in int32; sums are exact, but wrap
  around as NumPy's do. On a GPU only the base families compute integers.
- **strides**: any (transposed, reversed, broadcast, sliced), read in place; read-only and, on NumPy, any byte order.
  Elements that do not lie at multiples of their size, as in `f[1:].view(complex64)`, are copied on a GPU.
- **other libraries**: arrays that export DLPack or `__cuda_array_interface__` (PyTorch, JAX, Numba, ...) are accepted
  as input, weight, bias or `out`, and are never copied; the result is a NumPy or CuPy array. On a GPU, CuPy's current
  stream waits for the exporter's stream. Before such an array is changed or freed on another stream, that stream must
  wait for CuPy's. For tensors that require a gradient use `gpuconv.torch`; convert lists with `np.asarray`.
- **streams and CUDA graphs**: work is queued on CuPy's current stream. Calls can be captured into a CUDA graph after
  one call outside, which compiles the kernels; memory that a captured call allocates belongs to the graph and is freed
  with it (this needs CUDA's stream-ordered allocator, which only some virtual GPUs lack).
- **lengths**: a GPU computes a batch whose samples have different lengths in one call. Kernels on tensor cores skip
  what lies beyond a sample's length. Other kernels compute whole rows, and a second step corrects the ends of the
  samples; weight gradients use tensor cores or the base family. On the CPU, and for "same" with a stride, each run of
  neighbouring samples of one length is computed by a call of its own on views, so a sorted batch needs fewer calls. A
  CUDA graph keeps the lengths with which it was captured.
- **errors** name the argument, what was expected and what was given, and are the same for NumPy and CuPy arrays.

## Arithmetic

Which arithmetic a layer gets on a GPU follows from its channels, taps and dtype and from the architecture alone, and
`gpuconv.explain` shows it. Tensor cores compute layers of at least

| data | GPUs | C_out/groups | where C_in/groups is 8 or more | where it is 1 to 7 | depthwise |
| ---- | ---- | ------------ | ------------------------------ | ------------------ | --------- |
| float16 | sm_75 | 8 | | 8 taps, 32 products a sum | 64 taps |
| bfloat16 | sm_80 | 8 | | 8 taps, 32 products a sum | 64 taps |
| float32, `precision="tf32"` | sm_80 | 8 | | 8 taps, 32 products a sum | 128 taps |
| float32 | sm_80 | 16 | 64 products a sum | 8 taps, 64 products a sum | never |

where a sum has C_in/groups times K products, and depthwise layers have stride and dilation 1. They multiply in the
format of the data and add in float32. TF32 rounds operands to 11 significant bits. float32 is computed by split TF32:
every number becomes two TF32 numbers, and three products take the place of one.

In the transposed operation with dilation 1, C_out/groups times stride counts in place of C_out/groups, if C_out/groups
is above 4 or C_out/groups times K is at least 64, and a sum has C_in/groups times K/stride products; where C_in/groups
is below 8, its stride must be 1. Weight gradients follow the same rules, but their sums are over samples and positions;
in those of the transposed operation C_in and C_out change places. Where C_in/groups is 8 or more, 5 output channels a
group are enough for them except in float32; where it is less, they need 8 taps, and in float32 also C_in/groups times K
from 32. Very short samples stay on CUDA cores where tensor cores could miss the bound.

Other layers with up to 8 output channels a group run on tensor cores where the stride is 1, C_in/groups is from 48 to
4095, C_out/groups times K from 48 (as split TF32 from 60, in the transposed operation with dilation from 8), and
dilation times (K - 1) at most 128 (as split TF32 at most 80). So do those of the transposed operation with a stride up
to 12 / (C_out/groups) and below K, dilation 1, and (K - 1) / stride up to the same limits. Everything else, and float64
and complex data, runs on CUDA cores.

`gpuconv.reference` gives each result an error bound. For float16, bfloat16 and TF32, which tensor cores may sum, it
has `4n/3 + 2` in place of `n + 2`, and TF32 adds the error of rounding its operands. Split TF32 keeps the bound of
float32: results that depend on values that cannot be split without loss (infinities, NaN, below 2^-102, from 2^127 on),
and those that are not finite, are computed with fused multiply-adds instead. An activation multiplies the bound by
its largest slope and adds its own error, at most 4 units in the last place (gelu: and one of its argument).

In a checkout `python -m bench.accuracy` compares all of them with float64. By the published arithmetic of Hopper's
tensor cores, executed on the CPU (no GPU has confirmed it yet), the RMS error of split TF32 is 1.4 to 11 times smaller
than that of sequential fused multiply-adds in float32, on normal, cancelling and one-sided data; that of TF32 is 9 to
2,100 times larger; float16 and bfloat16 results are the exact sums rounded once, apart from errors of a few 2^-24 of
the terms.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .functional import conv1d, conv_transpose1d, prepare
from .lengths import conv1d_output_length, conv_transpose1d_output_length, output_lengths

if TYPE_CHECKING:
    from . import chunked, grad, nn, reference, signal, sigpy, stream, testing
    from .compile import compile, is_compiled  # noqa: A004 - called as gpuconv.compile
    from .explain import explain
    from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "chunked",
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
    "sigpy",
    "stream",
    "testing",
    "verify",
]

# These are loaded when they are first used, so that `import gpuconv` takes little longer than `import numpy`.
_LAZY_MODULES = ("chunked", "grad", "nn", "reference", "signal", "sigpy", "stream", "testing")
_LAZY_FUNCTIONS = {
    "compile": "compile",
    "explain": "explain",
    "is_compiled": "compile",
    "verify": "verify",
}  # by module
_IMPORTED_BY_NAME = ("dask", "torch")  # modules that need a library of this name, which takes long to load


class _Package(ModuleType):
    """The class of this module: `gpuconv.verify`, `compile` and `explain` stay functions, not their modules."""

    def __setattr__(self, name: str, value: Any) -> None:
        # After `import gpuconv.verify`, for example, Python sets the attribute `verify` to the module.
        if name in _LAZY_FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker would accept every attribute because of this function

    def __getattr__(name: str) -> Any:
        if name not in (*_LAZY_MODULES, *_LAZY_FUNCTIONS):
            hint = f"; write: import gpuconv.{name}" if name in _IMPORTED_BY_NAME else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
        module = importlib.import_module(f"{__name__}.{_LAZY_FUNCTIONS.get(name, name)}")
        return getattr(module, name) if name in _LAZY_FUNCTIONS else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
