"""The two operations on arrays: `conv1d` and `conv_transpose1d`, with the order of arguments of torch.nn.functional."""

from __future__ import annotations

from typing import Any, SupportsIndex, TypeVar

import numpy as np

from . import calls, runtime
from .arguments import check_padding_mode, is_one_of
from .fusion import ActivationLike, Fused
from .memory import take
from .problem import Op, Padding, Setting

ArrayT = TypeVar("ArrayT")


def conv1d(
    input: ArrayT,
    weight: ArrayT | runtime.PreparedWeight,
    bias: ArrayT | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    dilation: Setting = 1,
    groups: SupportsIndex = 1,
    *,
    padding_mode: str = "zeros",
    input_activation: ActivationLike | None = None,
    residual: ArrayT | None = None,
    activation: ActivationLike | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out_dtype: Any = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """1-D convolution (cross-correlation: the kernel is not flipped, as in every deep-learning framework).

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c_out, c_in, k] * input[n, c, l_in]
        l_in  = l_out*stride - padding_left + k*dilation
        c     = (c_out // (C_out/groups)) * (C_in/groups) + c_in
        L_out = floor((L_in + padding_left + padding_right - dilation*(K - 1) - 1) / stride) + 1

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample. NumPy or CuPy, any strides; never changed. All
            arrays may also be those of another library that exports DLPack or `__cuda_array_interface__`, such as
            PyTorch tensors that require no gradient: they are read and written without a copy.
        weight: (C_out, C_in/groups, K), of the kind, device and dtype of `input`, or real with complex
            input of the same precision (float32 for complex64); or the result of `prepare` for it.
        bias: (C_out,), or None.
        stride: step of the window, in samples.
        padding: on both sides, in samples: an int, a pair (left, right), "valid" (none), "same"
            (L_out = ceil(L_in/stride); an odd total puts one more on the right) or "causal" (dilation*(K - 1) on the
            left).
        dilation: distance between taps, in samples.
        groups: input and output channels are cut into this many groups that do not mix.
        padding_mode: what the padding is. "zeros": taps in it contribute nothing, even where the weight is infinite or
            NaN. "reflect": the samples mirrored, the one at the edge once, with padding below L_in on each side.
            "symmetric": mirrored, the one at the edge twice, with padding up to L_in. "replicate": the sample at the
            edge repeated. "circular": the samples from the other end, with padding up to L_in. The input is not copied
            for this: the kernels read the right samples, and the CPU copies only short strips at the ends.
        input_activation: what is applied to the input while it is loaded, in the forms of `activation`; arrays have a
            value for each input channel. The activated values are rounded to the dtype; padding with zeros stays zero.
        residual: an array of the output's shape that is added before `activation`, or None.
        activation: what is applied to the output before it is rounded: None, "relu", ("leaky_relu", slope), "elu" or
            ("elu", alpha), "silu", "gelu" or ("gelu", "tanh"), "tanh", "sigmoid", or ("snake", alpha) or
            ("snake", alpha, beta) with arrays (C_out,) of the dtype of `input`. `gpuconv.fusion` has the formulas. Data
            must be real. There are no gradients of what is fused.
        lengths: where samples have different lengths, up to L_in: (N,) integers, an array or a sequence. Values beyond
            a sample's length are ignored; its padding begins there. Outputs beyond the sample's output length, which
            `gpuconv.output_lengths` gives, are zeros; the others are those of a call on that sample alone, to the bit
            on a GPU. A sample too short to have outputs has none. Lengths are checked on the host; a CuPy array is
            copied there first, which waits for the work queued on its current stream.
        precision: "float32", the full precision of the dtype, or "tf32" for float32 data: operands may be rounded to
            TF32, 11 significant bits, where tensor cores can then compute the layer. Either way float16, bfloat16 and
            float32 data are summed in float32 and rounded once.
        algorithm: how a GPU computes it. None: the preferred kernel family that can compute the problem and sums
            directly. "base": `conv1d_direct`, one thread per output element, which can compute every problem. Or a
            family's name; see `gpuconv.explain`. "fft": for long kernels, also on NumPy arrays, through the FFT of
            blocks whose length follows from K, stride and dilation alone. The error of a result is then bounded by
            norms of its block. A NaN, an infinity or an overflow makes all results of its block wrong; spectra
            overflow where samples times the block length would. On a GPU bits depend on the samples of the block, not
            on its position. Integers and fusion are not possible. "auto": "fft" where the cost model predicts that it
            is faster, which follows from the layer alone, else as None. On NumPy arrays other names are checked and
            have no effect.
        out_dtype: the dtype of the sums of integers, which are exact: "int64" (the default), or "int32", which keeps
            the low 32 bits. Larger sums wrap around, as NumPy's do. The bias has this dtype, too.
        out: an array of the output's shape, dtype and device to write to, which must not overlap the inputs.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: an array of the kind, device and dtype of `input`, a
        NumPy or CuPy array where `input` is that of another library; `out` if it was given. CuPy work is queued on
        CuPy's current stream, behind the work on the streams of other libraries' arrays; before such an array is freed
        or used again on another stream, that stream must wait for CuPy's. The work can be captured into a CUDA graph:
        call once before the capture, which compiles the kernels. Memory that a captured call allocates belongs to the
        graph; arrays, prepared weights and `out` must live as long as the graph is used.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what was
            given. Or the named algorithm cannot compute the problem.
        TypeError: an argument is of the wrong kind, or a dtype is not one of float16, bfloat16, float32, float64,
            complex64, complex128, int8, uint8, int16, int32 and int64.
        RuntimeError: a CuPy array was given but no GPU answers; or its stream is being captured, and the algorithm is
            the FFT or `lengths` are a CuPy array.
        ImportError: a CuPy array was given and CuPy is older than version 14, or cuFFT is needed and missing.

    Example:
        >>> import numpy as np, gpuconv
        >>> x = np.arange(5.0).reshape(1, 1, 5)
        >>> gpuconv.conv1d(x, np.ones((1, 1, 3)), padding="same")
        array([[[1., 3., 6., 9., 7.]]])
        >>> gpuconv.conv1d(x, np.ones((1, 1, 3)), padding="same", residual=-2 * x, activation="relu")
        array([[[1., 1., 2., 3., 0.]]])
    """
    settings = (stride, padding, dilation, groups, precision, padding_mode, out_dtype)
    fused = None
    if activation is not None or input_activation is not None or residual is not None:
        fused = Fused.check("conv1d", activation, input_activation, residual)
    result: ArrayT = _convolve("conv1d", input, weight, bias, settings, algorithm, out, fused, lengths)
    return result


def conv_transpose1d(
    input: ArrayT,
    weight: ArrayT | runtime.PreparedWeight,
    bias: ArrayT | None = None,
    stride: Setting = 1,
    padding: Padding = 0,
    output_padding: Setting = 0,
    groups: SupportsIndex = 1,
    dilation: Setting = 1,
    *,
    output_size: Setting | None = None,
    padding_mode: str = "zeros",
    input_activation: ActivationLike | None = None,
    residual: ArrayT | None = None,
    activation: ActivationLike | None = None,
    lengths: Any = None,
    precision: str = "float32",
    algorithm: str | None = None,
    out_dtype: Any = None,
    out: ArrayT | None = None,
) -> ArrayT:
    """Transposed 1-D convolution: the adjoint of `conv1d` with respect to its input, which upsamples by `stride`.

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c, c_out_g, k] * input[n, c, l_in]
        l_out = l_in*stride - padding_left + k*dilation        (terms without such an l_in do not exist)
        c     = (c_out // (C_out/groups)) * (C_in/groups) + c_in,    c_out_g = c_out % (C_out/groups)
        L_out = (L_in - 1)*stride - padding_left - padding_right + dilation*(K - 1) + output_padding + 1

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample. NumPy or CuPy, any strides; never changed.
        weight: (C_in, C_out/groups, K), of the kind, device and dtype of `input`, or real with complex
            input of the same precision (float32 for complex64); or the result of `prepare` for it.
        bias: (C_out,), or None.
        stride: distance between the output windows of neighbouring input samples, in output samples.
        padding: output samples trimmed: an int from both sides, a pair (left, right), "valid" (none) or "same"
            (L_out = L_in*stride; an odd total trims one more on the right).
        output_padding: output samples added on the right, below max(stride, dilation).
        groups: input and output channels are cut into this many groups that do not mix.
        dilation: distance between taps, in output samples.
        output_size: the wanted L_out, in place of output_padding.
        padding_mode: only "zeros", as in PyTorch. The adjoint of a convolution in another mode is
            `gpuconv.grad.conv1d_input` in that mode.
        lengths: as in `conv1d`; what `output_size` adds to the longest sample is added to each.
        algorithm: as in `conv1d`; "base" is `conv_transpose1d_gather`.
        input_activation, residual, activation, precision, out_dtype, out: as in `conv1d`.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample, in all other respects as the output of `conv1d`.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: as `conv1d` raises them.

    Example:
        >>> import numpy as np, gpuconv
        >>> x = np.array([[[1.0, 2.0]]])
        >>> gpuconv.conv_transpose1d(x, np.array([[[1.0, 1.0, 1.0]]]), stride=2)
        array([[[1., 1., 3., 2., 2.]]])
    """
    if not is_one_of(padding_mode, ("zeros",)):
        check_padding_mode("conv_transpose1d", "conv_transpose1d", padding_mode)
    settings = (stride, padding, output_padding, groups, dilation, output_size, precision, out_dtype)
    fused = None
    if activation is not None or input_activation is not None or residual is not None:
        fused = Fused.check("conv_transpose1d", activation, input_activation, residual)
    result: ArrayT = _convolve("conv_transpose1d", input, weight, bias, settings, algorithm, out, fused, lengths)
    return result


def prepare(weight: ArrayT) -> runtime.PreparedWeight:
    """Pack weights once for many calls.

    Some kernel families read the weights in another order. They pack them in each call, by a small kernel or by their
    own, as `gpuconv.explain` shows. A prepared weight keeps the packed weights, and for `algorithm="fft"` the
    spectra; `conv1d` and `conv_transpose1d` accept it in place of the weight, with the same results to the bit. It
    holds a copy, so prepare the weight again after changing it. The copy is complete on every stream; the first call
    with each problem packs it and waits until that is finished. If calls are on several streams, keep the handle until
    all of them have run, since its memory is reused when the handle is gone; if all are on one stream, the handle may
    be dropped at any time.

    `copy.copy` and `copy.deepcopy` of a handle stay on its GPU. A pickled handle is loaded onto CuPy's current GPU, as
    CuPy's own arrays are. Both hold the weight alone and pack it again at their first calls.

    Args:
        weight: (C_out, C_in/groups, K), or (C_in, C_out/groups, K) for conv_transpose1d; NumPy or CuPy. For NumPy
            weights only the spectra are kept.

    Returns:
        A handle that holds the copy and, as calls need them, its packed forms.

    Raises:
        TypeError: `weight` is not a NumPy or CuPy array, nor one of another library that can be read in place.
        RuntimeError: `weight` is a CuPy array and the current stream is being captured into a CUDA graph.
        ImportError: `weight` is a CuPy array and CuPy is older than version 14.

    Example:
        >>> import numpy as np, gpuconv
        >>> w = gpuconv.prepare(np.ones((1, 1, 3)))
        >>> gpuconv.conv1d(np.arange(5.0).reshape(1, 1, 5), w)
        array([[[3., 6., 9.]]])
    """
    (array,) = take("prepare", weight=weight)
    if runtime.is_cupy_array(array):
        return runtime.prepare(array)
    return runtime.PreparedWeight(np.array(array, array.dtype.newbyteorder("=")))


def _convolve(
    op: Op,
    input: Any,
    weight: Any,
    bias: Any | None,
    settings: tuple[Any, ...],
    algorithm: str | None,
    out: Any | None,
    fused: Fused | None,
    lengths: Any,
) -> Any:
    prepared = weight if isinstance(weight, runtime.PreparedWeight) else None
    if prepared is not None:
        weight = prepared.array
    arrays: tuple[Any, ...] = (input, weight, bias)
    if fused is not None:
        arrays, settings = (*arrays, *fused.arrays), (*settings, fused.fusion)
    return calls.run(op, arrays, settings, out, algorithm=algorithm, prepared=prepared, lengths=lengths)
