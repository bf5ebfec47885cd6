"""`algorithm="fft"` and "auto": convolutions, their transposes and weight gradients by the FFT of overlapping blocks.

`gpuconv.overlap` makes blocks of a problem. The spectra of the blocks are multiplied by those of the taps, for each
frequency a product of matrices over the channels of a group, and the results of each block are those that the circular
convolution leaves whole (overlap-save, for all operations: each result comes from one block, and none are added up). A
weight gradient adds the products of the spectra of all blocks, and transforms back their sum.

The same code runs on NumPy and CuPy arrays, except for the transforms: CuPy arrays are transformed by cuFFT, through
cupy.fft, and NumPy arrays by SciPy, or by NumPy if SciPy is not installed. On a GPU gpuconv's own kernels multiply the
matrices, and all transforms have the same shape, which follows from the layer alone: so the bits of a result depend
only on the samples of its block.

Blocks are computed in batches, so that the memory for them follows from the layer, and not from N or L.

Errors are bounded by norms (`gpuconv.reference.Sums.error_bound`): a result that is much smaller than others in its
block has a large relative error, and a NaN or an infinity makes all results of its block wrong.

Source: T. G. Stockham, High-speed convolution and correlation, AFIPS 1966.
"""

from .choice import choose, refusal
from .costs import Costs, costs
from .executor import Executor, kept_bytes, products
from .plan import FftProblem, Plan

__all__ = ["Costs", "Executor", "FftProblem", "Plan", "choose", "costs", "kept_bytes", "products", "refusal"]
