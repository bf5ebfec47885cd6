"""The two operations on arrays: `conv1d` and `conv_transpose1d`, with the order of arguments of torch.nn.functional."""

from __future__ import annotations

from typing import Any, SupportsIndex, TypeVar

import numpy as np

from . import calls, runtime
from .arguments import check_padding_mode
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
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample. NumPy or CuPy, any strides; never changed. This and
            the other arrays may be those of another library that exports DLPack or `__cuda_array_interface__`, such as
            PyTorch's tensors that require no gradient: they are read and written where they lie.
        weight: (C_out, C_in/groups, K), of the kind, device and dtype of `input`, or real with complex
            input of the same precision (float32 for complex64); or what `prepare` made of it.
        bias: (C_out,), or None.
        stride: step of the window, in samples.
        padding: on both sides, in samples: an int, a pair (left, right), "valid" (none), "same"
            (L_out = ceil(L_in/stride); an odd total puts one more on the right) or "causal" (dilation*(K - 1) on the
            left).
        dilation: distance between taps, in samples.
        groups: input and output channels are cut into this many groups that do not mix.
        padding_mode: what the padding is. "zeros": taps in it contribute nothing, even where the weight is infinite or
            NaN. "reflect" and "symmetric": the samples mirrored at the last one, or behind it, with less than L_in of
            padding on each side, or at most L_in. "replicate": the last sample again. "circular": the samples from the
            other end, at most L_in. The input is not copied for it: the kernels, or on the CPU short strips at the
            ends, read the samples that are meant.
        input_activation: what is applied to the input while it is loaded, in the forms of `activation`; arrays have a
            value for each input channel. Its values are rounded to the dtype; padding is zeros all the same.
        residual: an array of the output's shape that is added before `activation`, or None.
        activation: what is applied to the output before it is rounded: None, "relu", ("leaky_relu", slope), "elu" or
            ("elu", alpha), "silu", "gelu" or ("gelu", "tanh"), "tanh", "sigmoid", or ("snake", alpha) or
            ("snake", alpha, beta) with arrays (C_out,) of the dtype of `input`. `gpuconv.fusion` has the formulas. Data
            must be real. There are no gradients of what is fused.
        lengths: where samples have lengths of their own, up to L_in: (N,) integers, an array or a sequence. What lies
            behind a sample's length does not exist, whatever its values; padding begins there. Outputs behind the
            sample's output length, which `gpuconv.output_lengths` gives, are zeros, and the others those of a call on
            that sample alone, to the bit on a GPU. A sample too short to have outputs has none. Lengths are checked on
            the host; a CuPy array is copied there first, which waits for the work queued on its current stream.
        precision: "float32", the full precision of the dtype, or "tf32" for float32 data: operands may be rounded to
            TF32, 11 significant bits, where the GPU's tensor cores then serve the layer. Either way float16, bfloat16
            and float32 data are summed in float32 and rounded once.
        algorithm: how a GPU computes it. None: the fastest kernel family that takes the problem and sums directly.
            "base": `conv1d_direct`, one thread per output element, which takes every problem. Or a family's name; see
            `gpuconv.explain`. "fft": for long kernels, also on NumPy arrays, through the FFT of blocks whose length
            follows from K, stride and dilation alone. The error of a result is then bounded by norms of its block, a
            NaN or an infinity spoils its whole block, and on a GPU bits depend on the samples of the block, wherever it
            is. It takes neither integers nor what is fused. "auto": "fft" where the cost model expects that to be
            faster, which follows from the layer alone, else as None. On NumPy arrays other names are checked and have
            no effect.
        out_dtype: of the sums of integers, which are exact: "int64" (None stands for it), or "int32", which keeps the
            low 32 bits. Sums beyond it wrap around, as NumPy's do. The bias has this dtype, too.
        out: an array of the output's shape, dtype and device to write to, which must not overlap the inputs.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample: an array of the kind, device and dtype of `input`,
        NumPy's or CuPy's also where `input` is that of another library; `out` where it was given. CuPy work is queued
        on CuPy's current stream, after what the streams of other libraries' arrays have to do; before such an array is
        freed or used again on another stream, that stream must wait for CuPy's. The work can be captured into a CUDA
        graph: call once before the capture, which compiles the kernels. What a captured call allocates for itself
        belongs to the graph; arrays, prepared weights and `out` must live as long as the graph is used.

    Raises:
        ValueError: a shape or a value does not fit; the message names the argument, what was expected and what came.
            What `algorithm` names does not take the problem.
        TypeError: an argument is of the wrong kind, or a dtype is not one of float16, bfloat16, float32, float64,
            complex64, complex128, int8, uint8, int16, int32 and int64.
        RuntimeError: a CuPy array was given but no GPU answers, or its stream is being captured and the algorithm is
            the FFT.
        ImportError: a CuPy array was given and CuPy is older than version 14, or cuFFT is needed and not there.

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
    """Transposed 1-D convolution: the adjoint of `conv1d` as a map of its input, which upsamples by `stride`.

        output[n, c_out, l_out] = bias[c_out] + sum over c_in, k of weight[c, c_out_g, k] * input[n, c, l_in]
        l_out = l_in*stride - padding_left + k*dilation        (terms without such an l_in do not exist)
        c     = (c_out // (C_out/groups)) * (C_in/groups) + c_in,    c_out_g = c_out % (C_out/groups)
        L_out = (L_in - 1)*stride - padding_left - padding_right + dilation*(K - 1) + output_padding + 1

    Args:
        input: (N, C_in, L_in), or (C_in, L_in) for a single sample. NumPy or CuPy, any strides; never changed.
        weight: (C_in, C_out/groups, K), of the kind, device and dtype of `input`, or real with complex
            input of the same precision (float32 for complex64); or what `prepare` made of it.
        bias: (C_out,), or None.
        stride: distance between the windows that neighbouring input samples feed, in output samples.
        padding: output samples trimmed: an int from both sides, a pair (left, right), "valid" (none) or "same"
            (L_out = L_in*stride; an odd total trims one more on the right).
        output_padding: output samples added on the right, below max(stride, dilation).
        groups: input and output channels are cut into this many groups that do not mix.
        dilation: distance between taps, in output samples.
        output_size: the wanted L_out, in place of output_padding.
        padding_mode: "zeros", the only one, as in PyTorch. The adjoint of a convolution in another mode is
            `gpuconv.grad.conv1d_input` in that mode.
        input_activation: as in `conv1d`.
        residual: an array of the output's shape that is added before `activation`, or None.
        activation: as in `conv1d`.
        lengths: as in `conv1d`; what `output_size` adds to the longest sample is added to each.
        precision: as in `conv1d`.
        algorithm: as in `conv1d`; "base" is `conv_transpose1d_gather`.
        out_dtype: as in `conv1d`.
        out: as in `conv1d`.

    Returns:
        (N, C_out, L_out), or (C_out, L_out) for a single sample. What `conv1d` says of its output holds here, too.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: as `conv1d` raises them.

    Example:
        >>> import numpy as np, gpuconv
        >>> x = np.array([[[1.0, 2.0]]])
        >>> gpuconv.conv_transpose1d(x, np.array([[[1.0, 1.0, 1.0]]]), stride=2)
        array([[[1., 1., 3., 2., 2.]]])
    """
    if padding_mode != "zeros":
        check_padding_mode("conv_transpose1d", "conv_transpose1d", padding_mode)
    settings = (stride, padding, output_padding, groups, dilation, output_size, precision, out_dtype)
    fused = None
    if activation is not None or input_activation is not None or residual is not None:
        fused = Fused.check("conv_transpose1d", activation, input_activation, residual)
    result: ArrayT = _convolve("conv_transpose1d", input, weight, bias, settings, algorithm, out, fused, lengths)
    return result


def prepare(weight: ArrayT) -> runtime.PreparedWeight:
    """Pack weights once for many calls.

    Some kernel families read the weights in another order and pack them at each call, by a small kernel before or in
    their own, which `gpuconv.explain` shows. A prepared weight keeps what they packed, and for `algorithm="fft"` the
    spectra; `conv1d` and `conv_transpose1d` take it in place of the weight, with the same results to the bit. It is
    made from a copy: later changes of `weight` are not followed, so prepare again after them. The copy is complete on
    every stream; the first call with each problem packs and waits for it to finish. Where calls are on several streams,
    keep the handle until all of them have run: its memory is used again when it is gone. Where all are on one stream,
    it may go at any time.

    Args:
        weight: (C_out, C_in/groups, K), or (C_in, C_out/groups, K) for conv_transpose1d; NumPy or CuPy. The CPU path
            keeps nothing of NumPy weights but spectra.

    Returns:
        A handle that holds the copy and, as calls need them, its packed forms.

    Raises:
        TypeError: `weight` is not a NumPy or CuPy array, nor one of another library that can be read where it lies.
        RuntimeError: `weight` is a CuPy array and the current stream is being captured into a CUDA graph.
        ImportError: `weight` is a CuPy array and CuPy is older than version 14.

    Example:
        >>> import numpy as np, gpuconv
        >>> w = gpuconv.prepare(np.ones((1, 1, 3)))
        >>> gpuconv.conv1d(np.arange(5.0).reshape(1, 1, 5), w)
        array([[[3., 6., 9.]]])
    """
    (array,) = take("prepare", weight=weight)
    return runtime.prepare(array) if runtime.is_cupy_array(array) else runtime.PreparedWeight(np.array(array))


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
