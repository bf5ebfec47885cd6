"""The kernel families, by preference: of those for a kind of problem, dispatch takes the first that does not refuse.

- `conv1d_mma`, `conv_transpose1d_mma`: dense and grouped; tensor cores: the input window staged once for all taps,
  transposed; long reductions in segments.
- `conv1d_im2col`: fewer than 8 input channels a group and long kernels: filter banks, spectrograms; tensor cores: the
  reduction over neighbouring taps, the input window staged once as the rows that all units of taps share.
- `conv1d_toeplitz`: one input channel a group and at least 64 taps (128 in TF32), stride and dilation 1; tensor cores:
  128 results of a row are a product with a matrix of blocks of taps.
- `conv1d_depthwise`, `conv_transpose1d_depthwise`: one input channel a group; rows partitioned among threads, 16-byte
  accesses, sliding windows.
- `conv1d_stem`: up to 4 input channels a group; the input of a tile in shared memory, loaded once for all output
  channels.
- `conv1d_tail`, `conv_transpose1d_tail`: up to 4 output channels a group; windows that slide through registers.
- `conv1d_narrow`: up to 8 output channels a group; all of them in one thread, the input through the cache.
- `conv1d_skinny`: at most 16 columns (samples times positions): streams; weights stream through shared memory past one
  chain of multiply-adds a result.
- `conv1d_tiled`: dense and grouped; register tiles over an implicit matrix product, weights packed, cp.async double
  buffer.
- `conv_transpose1d_phases`: dense and grouped; every output phase a stride-1 convolution, on the same tiles.
- `conv1d_direct`: all; one thread per output element.
- `conv_transpose1d_gather`: all; one thread per output element, which visits only the taps of its phase.

The docstring of `gpuconv` says which layers go to tensor cores. All other families agree bit for bit.

One road leads from every public function to the launch: `conv1d`, then `calls.run`, which checks the arguments and
makes the problem, then `Executor.run`, which holds loaded kernels, then the launch, in `runtime/kernels.py`, the one
file that builds and launches kernels. What it launches is a `Plan`, the steps that a family answers with: packing
weights, the family's own kernel, adding partial sums. `explain`, `warmup`, `verify` and `bench` read the same steps. A
repeated call is one dictionary look-up and one launch a step; `gpuconv.prepare(weight)` packs once for many calls.

To add a family:

1. `cuda_src/<op>_<algorithm>.cu`: start from `conv1d_direct.cu`. The contract comes first; `struct Params` is all
   `index_t`. Shared memory comes from `dynamic_shared_memory()`, instructions from `ptx.cuh`; positions of the input
   pass `source_index` (`edge.cuh`), results `finish` (`finish.cuh`), which also adds and applies what is fused.
   Headers are included by name.
2. `gpuconv/families/<op>_<algorithm>.py`: a `Family` with `plan` and `configs`; start from `conv_direct.py`. `plan`
   answers with a `Plan`, its launches and scratch buffers, or with a `Refusal` that says why. Macros and Params fields
   are checked against the `.cu` file, and an `Overhang` says how far beyond the arrays the kernel forms offsets.
3. One line below, by preference.

The kernel, compile and layering tests and `verify` iterate over that list and the shared case table
(`gpuconv/cases/table.py`), so they need no edit.
"""

from __future__ import annotations

from typing import Any

from . import conv1d_depthwise_push, edges, fused, lengths, windows
from .base import ArrayLayout, Config, Family, Launch, Layout, Plan, Refusal, Step
from .bias_gradient_rows import BiasGradientRows
from .conv1d_depthwise import Conv1dDepthwise
from .conv1d_im2col import Conv1dIm2col
from .conv1d_narrow import Conv1dNarrow
from .conv1d_skinny import Conv1dSkinny
from .conv1d_stem import Conv1dStem
from .conv1d_tail import Conv1dTail
from .conv1d_toeplitz import Conv1dToeplitz
from .conv_direct import Conv1dDirect, ConvTranspose1dGather
from .conv_mma import Conv1dMma, ConvTranspose1dMma
from .conv_tiled import Conv1dTiled, ConvTranspose1dPhases
from .conv_transpose1d_depthwise import ConvTranspose1dDepthwise
from .conv_transpose1d_tail import ConvTranspose1dTail
from .weight_gradient_direct import WeightGradientDirect
from .weight_gradient_mma import WeightGradientMma
from .weight_gradient_pairs import WeightGradientPairs
from .weight_gradient_tiled import WeightGradientTiled

# Tensor cores first: which layers they take must not depend on whether a CUDA-core family takes a batch or a length.
# Those agree in their bits, so among them it may.
FAMILIES: tuple[Family[Any], ...] = (
    Conv1dMma(),
    ConvTranspose1dMma(),
    Conv1dIm2col(),
    Conv1dToeplitz(),
    Conv1dDepthwise(),
    Conv1dSkinny(),
    Conv1dStem(),
    Conv1dTail(),
    Conv1dNarrow(),
    Conv1dTiled(),
    ConvTranspose1dDepthwise(),
    ConvTranspose1dTail(),
    ConvTranspose1dPhases(),
    Conv1dDirect(),
    ConvTranspose1dGather(),
    WeightGradientMma(),
    WeightGradientPairs(),
    WeightGradientTiled(),
    WeightGradientDirect(),
    BiasGradientRows(),
)

__all__ = [
    "FAMILIES",
    "ArrayLayout",
    "Config",
    "Family",
    "Launch",
    "Layout",
    "Plan",
    "Refusal",
    "Step",
    "conv1d_depthwise_push",
    "edges",
    "fused",
    "lengths",
    "windows",
]
