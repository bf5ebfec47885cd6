"""The kernel families in order of preference: dispatch takes the first one of a kind that does not refuse the problem.

- `conv1d_col2im` (of stride 1), `conv_transpose1d_col2im` (of stride or dilation 1): up to 8 output channels a group
  and long kernels (profile heads, gradients of stems and filter banks), on tensor cores. Runs of taps meet each
  position of the input, and results are sums along the diagonals of that product.
- `conv1d_mma`, `conv_transpose1d_mma`: dense and grouped layers on tensor cores. The input window is transposed and
  staged once for all taps; long reductions are cut into segments.
- `conv1d_im2col`, `conv_transpose1d_im2col` (of stride 1): fewer than 8 input channels a group and long kernels (filter
  banks, spectrograms), on tensor cores. The reduction runs over neighbouring taps, and the input window is staged once
  for all of them.
- `conv1d_toeplitz`: one input channel a group, at least 64 taps (128 in TF32), stride and dilation 1, on tensor cores.
  128 results of a row are a product with a matrix of blocks of taps.
- `conv1d_depthwise`, `conv_transpose1d_depthwise`: one input channel a group. Rows are partitioned among threads, with
  16-byte accesses and sliding windows.
- `conv1d_stem`: up to 4 input channels a group. The input of a tile is loaded to shared memory once for all output
  channels.
- `conv1d_tail`, `conv_transpose1d_tail`: up to 4 output channels a group. Windows slide through registers.
- `conv1d_narrow`: up to 8 output channels a group. One thread computes all of them and reads the input through the
  cache.
- `conv1d_skinny`: at most 16 columns (samples times positions), as in streams. Weights are streamed through shared
  memory; each result is one chain of multiply-adds.
- `conv1d_tiled`: dense and grouped layers. Register tiles over an implicit matrix product, with packed weights and
  double buffering by cp.async.
- `conv_transpose1d_phases`: dense and grouped layers. Every output phase is a stride-1 convolution on the same tiles.
- `conv1d_direct`: all layers. One thread per output element.
- `conv_transpose1d_gather`: all layers. One thread per output element, which visits only the taps of its phase.
- `weight_gradient_mma`: weight gradients of dense and grouped layers, on tensor cores.
- `weight_gradient_pairs`: weight gradients with few channels on one side of a group, as in depthwise layers.
- `weight_gradient_tiled`: weight gradients of dense and grouped layers by register tiles.
- `weight_gradient_direct`: all weight gradients. One thread per result and slice.
- `bias_gradient_rows`: all bias gradients. One block per channel and slice.

The docstring of `gpuconv` says which layers run on tensor cores. Of each kind, the families on CUDA cores give the same
bits.

A call of `conv1d` goes to `calls.run`, which checks the arguments and makes the problem, then to `Executor.run`, which
holds the loaded kernels, then to `runtime/kernels.py`, the only file that builds and launches kernels; other functions
likewise. What is launched is the `Plan` that a family returns. Its steps pack weights, run the family's own kernel and
add partial sums. `explain`, `warmup`, `verify` and `bench` read the same steps. A repeated call costs one dictionary
look-up and one launch a step; `gpuconv.prepare(weight)` packs weights once for many calls.

To add a family:

1. `cuda_src/<op>_<algorithm>.cu`: start from `conv1d_direct.cu`. The contract comes first, and all fields of
   `struct Params` are `index_t`. Get shared memory from `dynamic_shared_memory()` and special instructions from
   `ptx.cuh`, map positions of the input by `source_index` (`edge.cuh`), and pass results through `finish`
   (`finish.cuh`), which also applies what is fused. Headers are included by name.
2. `gpuconv/families/<op>_<algorithm>.py`: a `Family` with `plan` and `configs`; start from `conv_direct.py`. `plan`
   returns a `Plan` with its launches and scratch buffers, or a `Refusal` with the reason. Macros and fields of Params
   are checked against the `.cu` file. An `Overhang` says how far beyond the arrays the kernel forms offsets.
3. One line in `FAMILIES` below, at its place in the order of preference.

The tests of kernels, compilation and layering, `verify` and the benchmarks iterate over that list and the shared case
table (`gpuconv/cases/table.py`), so they need no change.
"""

from __future__ import annotations

from typing import Any

from . import conv1d_depthwise_push, edges, fused, lengths, windows
from .base import ArrayLayout, Config, Family, Launch, Layout, Plan, Refusal, Step
from .bias_gradient_rows import BiasGradientRows
from .conv1d_narrow import Conv1dNarrow
from .conv1d_skinny import Conv1dSkinny
from .conv1d_stem import Conv1dStem
from .conv1d_toeplitz import Conv1dToeplitz
from .conv_col2im import Conv1dCol2im, ConvTranspose1dCol2im
from .conv_depthwise import Conv1dDepthwise, ConvTranspose1dDepthwise
from .conv_direct import Conv1dDirect, ConvTranspose1dGather
from .conv_im2col import Conv1dIm2col, ConvTranspose1dIm2col
from .conv_mma import Conv1dMma, ConvTranspose1dMma
from .conv_tail import Conv1dTail, ConvTranspose1dTail
from .conv_tiled import Conv1dTiled, ConvTranspose1dPhases
from .weight_gradient_direct import WeightGradientDirect
from .weight_gradient_mma import WeightGradientMma
from .weight_gradient_pairs import WeightGradientPairs
from .weight_gradient_tiled import WeightGradientTiled

# Families on tensor cores come first: which layers they take must not depend on N or L, since their bits differ from
# those of the others. The families on CUDA cores give the same bits, so the choice among them may depend on N and L.
FAMILIES: tuple[Family[Any], ...] = (
    Conv1dCol2im(),
    ConvTranspose1dCol2im(),
    Conv1dMma(),
    ConvTranspose1dMma(),
    Conv1dIm2col(),
    ConvTranspose1dIm2col(),
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
