"""Layers: `Conv1d` and `ConvTranspose1d`, with the constructor arguments, attributes and printed form of torch.nn's."""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, SupportsIndex, TypeVar, cast

import numpy as np

from . import checkpoint, dispatch, runtime
from .arguments import check_groups, check_int, check_padding_mode, check_precision, check_setting, check_size
from .checkpoint import EntryError
from .functional import ArrayT, conv1d, conv_transpose1d
from .fusion import ACTIVATION_ARRAYS, INPUT_ACTIVATION_ARRAYS, Activation, ActivationLike, Fused
from .lengths import output_lengths
from .problem import (
    DTYPES,
    Op,
    Padding,
    Setting,
    Settings,
    dtype_name,
    numpy_dtype,
)
from .text import install_hint

__all__ = ["Conv1d", "ConvTranspose1d", "IncompatibleKeys"]

LayerT = TypeVar("LayerT", bound="_Layer")

_DRAWN_AT_ONCE = 1 << 15  # initial values, in float64
_LISTED = 20  # missing or unknown entries in a message


class IncompatibleKeys(NamedTuple):
    """The keys that `load_state_dict(state, strict=False)` passed over."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Layer:
    """What both layers share: settings, parameters, their device and dtype, and the state dictionary."""

    op: ClassVar[Op]
    transposed: ClassVar[bool]

    weight: Any
    bias: Any
    activation: Activation | None
    input_activation: Activation | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Setting,
        stride: Setting,
        padding: Padding,
        output_padding: Setting,
        dilation: Setting,
        groups: SupportsIndex,
        bias: bool,
        padding_mode: str,
        device: str | None,
        dtype: Any,
        rng: int | np.random.Generator | None,
        precision: str,
        algorithm: str | None,
        activation: ActivationLike | None,
        input_activation: ActivationLike | None,
    ) -> None:
        caller = type(self).__name__
        C_in = check_int(caller, "in_channels", in_channels, "an int", 0)
        C_out = check_int(caller, "out_channels", out_channels, "an int", 0)
        K = check_setting(caller, "kernel_size", kernel_size, 1)
        settings = Settings.check(caller, self.op, stride, padding, dilation, groups, output_padding)
        check_groups(caller, settings.groups, C_in, C_out)
        if not isinstance(bias, bool | np.bool_):
            raise TypeError(f"{caller}: bias must be True or False, got {type(bias).__name__} {bias!r}")
        check_padding_mode(caller, self.op, padding_mode)
        dispatch.check_algorithm(caller, self.op, algorithm)
        fused = Fused.check(caller, activation, input_activation)

        self.in_channels = C_in
        self.out_channels = C_out
        self.kernel_size = (K,)
        self.stride = (settings.stride,)
        self.padding = _as_attribute(padding)
        self.dilation = (settings.dilation,)
        self.output_padding = (settings.output_padding,)
        self.groups = settings.groups
        self.padding_mode = padding_mode
        self.algorithm = algorithm

        first, second = (C_in, C_out) if self.transposed else (C_out, C_in)
        shape = (first, second // self.groups, K)
        name = "float32" if dtype is None else _supported_dtype(caller, dtype)
        self.precision = check_precision(caller, precision, name)
        check_size(caller, "weight", shape, name)
        index = _gpu_index(caller, device)
        generator = _generator(caller, rng)
        fan_in = shape[1] * K
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        target = numpy_dtype(name)
        self.weight = _place(_uniform(generator, bound, shape, target), index, target)
        self.bias = _place(_uniform(generator, bound, (C_out,), target), index, target) if bias else None
        self.activation = fused.fusion.activation
        self.input_activation = fused.fusion.input_activation
        for key, array, length in zip(
            (*ACTIVATION_ARRAYS, *INPUT_ACTIVATION_ARRAYS), fused.arrays[1:], (C_out, C_out, C_in, C_in), strict=True
        ):
            if array is not None:
                _check_channels(caller, key, array, length, name)
            setattr(self, key, None if array is None else _place(array, index, target, copy=True))

    def to(self: LayerT, device: str | None = None, dtype: Any = None) -> LayerT:
        """Move the parameters to a device and convert them to a dtype; None leaves either as it is.

        Args:
            device: "cpu", "cuda" (CuPy's current device) or "cuda:1".
            dtype: one of float16, bfloat16, float32, float64, complex64 and complex128: a name or a NumPy dtype.

        Returns:
            The layer itself.

        Raises:
            TypeError: the dtype is not supported, or would drop the imaginary part of complex parameters.
            ValueError: there is no such device, or the layer's precision is "tf32" and the dtype is not float32.
            RuntimeError: a GPU is asked for but none answers; or its current stream is being captured.
            ModuleNotFoundError: CuPy, or for bfloat16 ml_dtypes, is not installed.
        """
        caller = f"{type(self).__name__}.to"
        name = None if dtype is None else _supported_dtype(caller, dtype)
        if self.precision == "tf32" and name not in (None, "float32"):
            raise ValueError(
                f'{caller}: dtype must be float32 for a layer with precision "tf32", got {name}; set the layer\'s '
                'precision to "float32" first'
            )
        index = None if device is None else _gpu_index(caller, device)
        parameters = self.state_dict()
        for key, array in parameters.items():
            if name is not None and not _converts(array.dtype, name):
                raise TypeError(f"{caller}: dtype must be complex, because {key} is {array.dtype}; got {name}")
        target = None if name is None else numpy_dtype(name)
        placed = {
            key: _place(array, _home(array) if device is None else index, array.dtype if target is None else target)
            for key, array in parameters.items()
        }
        self._replace_parameters(placed)
        return self

    def state_dict(self) -> dict[str, Any]:
        """The parameters by name: the layer's own arrays, not copies.

        They are "weight", then "bias" if there is one, then the arrays of snake: "activation_alpha" and so on.
        """
        is_prepared = isinstance(self.weight, runtime.PreparedWeight)
        state = {"weight": self.weight.array if is_prepared else self.weight}
        if self.bias is not None:
            state["bias"] = self.bias
        keys = (*ACTIVATION_ARRAYS, *INPUT_ACTIVATION_ARRAYS)
        state.update((key, getattr(self, key)) for key in keys if getattr(self, key) is not None)
        return state

    def _with_arrays(self, activation: Activation | None, keys: tuple[str, str]) -> ActivationLike | None:
        """An activation as the functions take it."""
        if activation is None:
            return None
        return activation.as_argument(tuple(getattr(self, key) for key in keys[: activation.arrays]))

    def load_state_dict(
        self, state: Mapping[str, Any] | str | os.PathLike[str], strict: bool = True, *, prefix: str = ""
    ) -> IncompatibleKeys:
        """Replace the parameters by copies of the arrays in `state`, on the layer's device and in its dtype.

        Args:
            state: "weight", "bias" unless the layer has none, and the arrays of snake: NumPy or CuPy arrays, or
                whatever offers `__array__` or `__cuda_array_interface__`, such as the tensors of a PyTorch layer's
                `state_dict()`; or the path of a `.npz` or `.safetensors` file of such arrays, of which only what is
                wanted is read. In place of "weight" may stand the two arrays of a weight normalisation: "weight_g" and
                "weight_v", or "parametrizations.weight.original0" and "original1". Their product is computed in float64
                and rounded.
            strict: whether unknown and missing entries are errors.
            prefix: of the names in `state` that belong to this layer, "encoder.conv1." for one layer of a model; the
                other entries are not looked at.

        Returns:
            The missing and the unexpected keys, both empty if `strict`.

        Raises:
            ValueError: naming all unknown, missing, misshaped and unreadable entries at once; or a file that is damaged
                or neither a `.npz` nor a `.safetensors` file. The layer is unchanged.
            TypeError: `state` is neither a mapping nor a path, or `prefix` is not a string.
            OSError: the file cannot be opened.
            ModuleNotFoundError: a package that reads the file is not installed: safetensors, or ml_dtypes for bfloat16.
            RuntimeError: the current stream of the parameters' GPU is being captured. The layer is unchanged.
        """
        caller = f"{type(self).__name__}.load_state_dict"
        if isinstance(state, str | os.PathLike):
            with checkpoint.open_state(caller, state) as opened:
                return self.load_state_dict(opened, strict, prefix=prefix)
        if not isinstance(state, Mapping):
            raise TypeError(f"{caller}: state must be a mapping of arrays or a path, got {type(state).__name__}")
        if not isinstance(prefix, str):
            raise TypeError(f"{caller}: prefix must be a str, got {type(prefix).__name__} {prefix!r}")
        own, found = self.state_dict(), checkpoint.select(state, prefix)
        pair = next((pair for pair in checkpoint.NORMALISED if "weight" not in found and set(pair) <= found.keys()), ())
        missing = [key for key in own if key not in found and not (pair and key == "weight")]
        unexpected = [key for key in found if key not in own and key not in pair]
        problems = _listed("missing", missing, prefix) + _listed("unknown", unexpected, prefix) if strict else []
        loaded = {}
        for key in own:
            try:
                if pair and key == "weight":
                    loaded[key] = _fold(prefix, pair, found, own[key])
                elif key in found:
                    loaded[key] = _read(prefix + key, found[key], own[key])
            except EntryError as error:
                problems.append(str(error))
        if problems:
            hint = _prefix_hint(found) if missing else ""
            raise ValueError(f"{caller}: the state does not fit {self}: {'; '.join(problems)}{hint}")
        self._replace_parameters(
            {key: _place(array, _home(own[key]), own[key].dtype, copy=True) for key, array in loaded.items()}
        )
        return IncompatibleKeys(missing, unexpected)

    def _replace_parameters(self, parameters: dict[str, Any]) -> None:
        """Take these arrays for parameters; a weight that `gpuconv.prepare` made stays a prepared one."""
        if isinstance(self.weight, runtime.PreparedWeight) and "weight" in parameters:
            array = parameters["weight"]
            kept = self.weight if array is self.weight.array else runtime.PreparedWeight(array)
            parameters = {**parameters, "weight": kept}
        vars(self).update(parameters)

    def output_lengths(self, lengths: Any) -> Any:
        """The lengths of the outputs of samples of such lengths, as `gpuconv.output_lengths` gives them."""
        return output_lengths(
            lengths, self.kernel_size, self.stride, self.padding, self.dilation, transposed=self.transposed,
            output_padding=self.output_padding,
        )  # fmt: skip

    def __repr__(self) -> str:
        parts = [str(self.in_channels), str(self.out_channels)]
        parts += [f"kernel_size={self.kernel_size}", f"stride={self.stride}"]
        if isinstance(self.padding, str) or any(self.padding):
            parts.append(f"padding={self.padding}")
        if self.dilation != (1,):
            parts.append(f"dilation={self.dilation}")
        if self.output_padding != (0,):
            parts.append(f"output_padding={self.output_padding}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        if self.precision != "float32":
            parts.append(f"precision={self.precision}")
        if self.input_activation is not None:
            parts.append(f"input_activation={self.input_activation}")
        if self.activation is not None:
            parts.append(f"activation={self.activation}")
        if self.algorithm is not None:
            parts.append(f"algorithm={self.algorithm}")
        return f"{type(self).__name__}({', '.join(parts)})"


class Conv1d(_Layer):
    """A convolution layer: `gpuconv.conv1d` with parameters of its own.

    Input (N, C_in, L_in) or (C_in, L_in), output (N, C_out, L_out) or (C_out, L_out), with
    ``L_out = floor((L_in + padding_left + padding_right - dilation*(K - 1) - 1)/stride) + 1``.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: K, taps.
        stride: step of the window, in samples.
        padding: on both sides, in samples: an int, a pair (left, right), "valid", "same" or "causal".
        dilation: distance between taps, in samples.
        groups: input and output channels are cut into this many groups that do not mix.
        bias: whether the layer has a bias.
        padding_mode: as in the function: "zeros", "reflect", "replicate", "circular" or "symmetric".
        device: where the parameters live: "cpu", "cuda" (CuPy's current device) or "cuda:1".
        dtype: one of float16, bfloat16, float32 (the default), float64, complex64 and complex128: a name or a NumPy
            dtype. The input must have it too.
        rng: a seed or a `numpy.random.Generator` for the initial parameters.
        precision: as in the function: "float32", or "tf32" for float32 layers.
        algorithm: as in the function: None, "base" or the name of a kernel family.
        activation: as in the function; the arrays of snake become parameters of the layer, in its dtype.
        input_activation: likewise.

    Attributes:
        weight: (C_out, C_in/groups, K), drawn like PyTorch's from the uniform distribution between -b and b, where
            ``b = 1/sqrt(C_in/groups * K)``: in float64, then rounded to the dtype. The real and the imaginary part of
            complex parameters are each drawn so. One seed gives the same values on every device.
        bias: (C_out,), drawn from the same distribution after the weight, or None.
        in_channels, out_channels, kernel_size, stride, padding, dilation, output_padding, groups, padding_mode,
            transposed: as in PyTorch, where per-axis settings are tuples.
        precision, algorithm: as given.
        activation, input_activation: a `gpuconv.fusion.Activation`, or None.
        activation_alpha, activation_beta, input_activation_alpha, input_activation_beta: (C_out,) or (C_in,), or None.

    Raises:
        ValueError: a value is out of range; the message names the argument, what was expected and what came.
        TypeError: an argument is of the wrong kind.
        RuntimeError: a GPU is asked for but none answers.
        ModuleNotFoundError: CuPy, or for bfloat16 ml_dtypes, is not installed.

    Example:
        >>> import numpy as np
        >>> from gpuconv import nn
        >>> m = nn.Conv1d(16, 33, 3, stride=2)
        >>> input = np.random.default_rng(0).standard_normal((20, 16, 50), dtype=np.float32)
        >>> m(input).shape
        (20, 33, 24)
    """

    op = "conv1d"
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Setting,
        stride: Setting = 1,
        padding: Padding = 0,
        dilation: Setting = 1,
        groups: SupportsIndex = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: str | None = None,
        dtype: Any = None,
        *,
        rng: int | np.random.Generator | None = None,
        precision: str = "float32",
        algorithm: str | None = None,
        activation: ActivationLike | None = None,
        input_activation: ActivationLike | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, 0, dilation, groups, bias, padding_mode, device,
            dtype, rng, precision, algorithm, activation, input_activation,
        )  # fmt: skip

    def forward(self, input: ArrayT, *, residual: ArrayT | None = None, lengths: Any = None) -> ArrayT:
        """Convolve: (N, C_in, L_in) to (N, C_out, L_out), or the same without N. Raises as `gpuconv.conv1d` does.

        Args:
            input: the samples.
            residual: an array of the output's shape that is added before the activation, or None.
            lengths: of the samples, (N,), as `gpuconv.conv1d` takes them; `output_lengths` gives those of the output.
        """
        output = conv1d(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            padding_mode=self.padding_mode,
            input_activation=self._with_arrays(self.input_activation, INPUT_ACTIVATION_ARRAYS), residual=residual,
            activation=self._with_arrays(self.activation, ACTIVATION_ARRAYS), precision=self.precision,
            algorithm=self.algorithm, lengths=lengths,
        )  # fmt: skip
        return cast(ArrayT, output)

    def __call__(self, input: ArrayT, *, residual: ArrayT | None = None, lengths: Any = None) -> ArrayT:
        """`forward`."""
        return self.forward(input, residual=residual, lengths=lengths)


class ConvTranspose1d(_Layer):
    """A transposed convolution layer: `gpuconv.conv_transpose1d` with parameters of its own.

    Input (N, C_in, L_in) or (C_in, L_in), output (N, C_out, L_out) or (C_out, L_out), with
    ``L_out = (L_in - 1)*stride - padding_left - padding_right + dilation*(K - 1) + output_padding + 1``.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: K, taps.
        stride: distance between the windows that neighbouring input samples feed, in output samples.
        padding: output samples trimmed: an int from both sides, a pair (left, right), "valid" (none) or "same"
            (L_out = L_in*stride).
        output_padding: output samples added on the right, below max(stride, dilation).
        dilation: distance between taps, in output samples.
        padding_mode: "zeros", the only one, as in PyTorch.
        groups, bias, device, dtype, rng, precision, algorithm, activation, input_activation: as in `Conv1d`.

    Attributes:
        weight: (C_in, C_out/groups, K), drawn as that of `Conv1d`, with ``b = 1/sqrt(C_out/groups * K)``.
        The others are those of `Conv1d`.

    Raises:
        ValueError, TypeError, RuntimeError, ModuleNotFoundError: as `Conv1d` raises them.

    Example:
        >>> import numpy as np
        >>> from gpuconv import nn
        >>> m = nn.ConvTranspose1d(33, 16, 3, stride=2)
        >>> input = np.random.default_rng(0).standard_normal((20, 33, 24), dtype=np.float32)
        >>> m(input).shape, m(input, output_size=50).shape
        ((20, 16, 49), (20, 16, 50))
    """

    op = "conv_transpose1d"
    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Setting,
        stride: Setting = 1,
        padding: Padding = 0,
        output_padding: Setting = 0,
        groups: SupportsIndex = 1,
        bias: bool = True,
        dilation: Setting = 1,
        padding_mode: str = "zeros",
        device: str | None = None,
        dtype: Any = None,
        *,
        rng: int | np.random.Generator | None = None,
        precision: str = "float32",
        algorithm: str | None = None,
        activation: ActivationLike | None = None,
        input_activation: ActivationLike | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, groups, bias,
            padding_mode, device, dtype, rng, precision, algorithm, activation, input_activation,
        )  # fmt: skip

    def forward(
        self,
        input: ArrayT,
        output_size: Setting | Sequence[SupportsIndex] | None = None,
        *,
        residual: ArrayT | None = None,
        lengths: Any = None,
    ) -> ArrayT:
        """Convolve: (N, C_in, L_in) to (N, C_out, L_out), or the same without N.

        Args:
            input: the samples.
            output_size: the wanted L_out, which replaces the layer's output_padding: an int, a sequence of one, or a
                whole shape of as many axes as `input`, of which, as in PyTorch, only the last counts.
            residual: an array of the output's shape that is added before the activation, or None.
            lengths: of the samples, (N,), as `gpuconv.conv1d` takes them; `output_lengths` gives those of the output.

        Raises:
            ValueError, TypeError, RuntimeError: as `gpuconv.conv_transpose1d` does.
        """
        if isinstance(output_size, list | tuple) and len(output_size) == getattr(input, "ndim", None):
            output_size = output_size[-1]
        output = conv_transpose1d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.output_padding if output_size is None else 0,
            self.groups,
            self.dilation,
            output_size=output_size,
            input_activation=self._with_arrays(self.input_activation, INPUT_ACTIVATION_ARRAYS),
            residual=residual,
            activation=self._with_arrays(self.activation, ACTIVATION_ARRAYS),
            precision=self.precision,
            algorithm=self.algorithm,
            lengths=lengths,
        )
        return cast(ArrayT, output)

    def __call__(
        self,
        input: ArrayT,
        output_size: Setting | Sequence[SupportsIndex] | None = None,
        *,
        residual: ArrayT | None = None,
        lengths: Any = None,
    ) -> ArrayT:
        """`forward`."""
        return self.forward(input, output_size, residual=residual, lengths=lengths)


def _check_channels(caller: str, key: str, array: Any, channels: int, dtype: str) -> None:
    """Refuse an array of snake that cannot become a parameter."""
    if not isinstance(array, np.ndarray) and not runtime.is_cupy_array(array):
        raise TypeError(f"{caller}: {key} must be a NumPy or CuPy array, got {type(array).__name__}")
    if tuple(array.shape) != (channels,):
        raise ValueError(f"{caller}: {key} must have shape ({channels},), got {tuple(array.shape)}")
    if not _converts(array.dtype, dtype):
        raise TypeError(f"{caller}: {key} must have a dtype that converts to {dtype}, got {array.dtype}")


def _as_attribute(padding: Padding) -> str | tuple[int, ...]:
    """A validated padding as PyTorch keeps it: the word, or a tuple."""
    if isinstance(padding, str):
        return str(padding)
    return tuple(operator.index(v) for v in (padding if isinstance(padding, list | tuple) else (padding,)))


def _supported_dtype(caller: str, dtype: Any) -> str:
    """The name of a supported dtype, given by name, as a NumPy dtype or as a scalar type."""
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    try:
        name = dtype_name(np.dtype(dtype))
    except (TypeError, ValueError):
        name = None
    if name is None:
        raise TypeError(f"{caller}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return name


def _converts(source: np.dtype[Any], name: str) -> bool:
    """Whether values of a dtype become parameters without losing more than precision."""
    if source.kind == "c":
        return name.startswith("complex")
    return source.kind in "biuf" or dtype_name(source) is not None


def _gpu_index(caller: str, device: str | None) -> int | None:
    """The CuPy index of the GPU that a device string names, which must answer; None for the CPU."""
    if device is None or device == "cpu":
        return None
    expected = '"cpu", "cuda" or "cuda:" and an index'
    if not isinstance(device, str):
        raise TypeError(f"{caller}: device must be {expected}, got {type(device).__name__} {device!r}")
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if match is None:
        hint = '; CuPy\'s current GPU is "cuda"' if device.lower().startswith("gpu") else ""
        raise ValueError(f'{caller}: device must be {expected}, got "{device}"{hint}')
    try:
        count = runtime.device_count()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{caller}: device "{device}" needs the package CuPy: {install_hint("cuda13", "cuda12")}'
        ) from error
    except RuntimeError as error:
        raise RuntimeError(f'{caller}: device "{device}" was asked for, but no GPU answers: {error}') from error
    if match[1] is None:
        return int(runtime.cupy_module().cuda.runtime.getDevice())
    if int(match[1]) >= count:
        raise ValueError(f'{caller}: device must be below "cuda:{count}", one of the GPUs that answer, got "{device}"')
    return int(match[1])


def _generator(caller: str, rng: int | np.random.Generator | None) -> np.random.Generator:
    if rng is None or isinstance(rng, np.random.Generator):
        return np.random.default_rng(rng)
    return np.random.default_rng(check_int(caller, "rng", rng, "an int seed or a numpy.random.Generator", 0))


def _uniform(
    generator: np.random.Generator, bound: float, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """Values between -bound and bound, drawn in float64, so that one seed means the same values in every dtype.

    They are drawn and rounded a block at a time: an array in float64 would take up to four times the memory.
    """
    values = np.empty(shape, dtype)
    flat = values.reshape(-1)
    for start in range(0, flat.size, _DRAWN_AT_ONCE):
        block = flat[start : start + _DRAWN_AT_ONCE]
        if dtype.kind == "c":
            block[...] = generator.uniform(-bound, bound, (block.size, 2)).view(np.complex128)[:, 0]
        else:
            block[...] = generator.uniform(-bound, bound, block.size)
    return values


def _home(array: Any) -> int | None:
    """The CuPy index of the GPU that an array lives on; None for the CPU."""
    return int(array.data.device_id) if runtime.is_cupy_array(array) else None


def _place(array: Any, index: int | None, dtype: np.dtype[Any], *, copy: bool = False) -> Any:
    """A NumPy or CuPy array as a C-contiguous one on a GPU, or on the CPU where `index` is None."""
    home = _home(array)
    leaves = home is not None and home != index
    if home != index or copy or array.dtype != dtype:
        for gpu in {home, index} - {None}:
            runtime.refuse_during_capture("parameters cannot be copied", cast(int, gpu))
    if home is not None:
        array = runtime.aligned(array)
    if leaves:
        # CuPy copies from another GPU only what is contiguous, and does not wait for the work queued there.
        cupy = runtime.cupy_module()
        with cupy.cuda.Device(home):
            array = cupy.asnumpy(array) if index is None else array.astype(array.dtype, order="C", copy=False)
            cupy.cuda.get_current_stream().synchronize()
    if index is None:
        return np.asarray(array).astype(dtype, order="C", copy=copy)
    cupy = runtime.cupy_module()
    runtime.check_dtype(dtype)
    with cupy.cuda.Device(index):
        placed = cupy.asarray(array).astype(dtype, order="C", copy=copy)
        if leaves:  # the array must not be freed, and its memory used again, before it is read
            cupy.cuda.get_current_stream().synchronize()
        return placed


def _as_cupy_array(value: Any) -> Any:
    """What offers `__cuda_array_interface__`, on the GPU where it lies; `asarray` alone moves it to the current one."""
    cupy = runtime.cupy_module()
    address = value.__cuda_array_interface__["data"][0]
    home = cupy.cuda.runtime.pointerGetAttributes(address).device if address else -1
    with cupy.cuda.Device(home if home >= 0 else None):
        return cupy.asarray(value)


def _listed(what: str, keys: Sequence[str], prefix: str) -> list[str]:
    """Problems, one a key, of which a whole model may have thousands."""
    listed = [f'{what} "{prefix}{key}"' for key in keys[:_LISTED]]
    return [*listed, f"{len(keys) - _LISTED} more {what}"] if len(keys) > _LISTED else listed


def _prefix_hint(keys: Iterable[str]) -> str:
    """How to choose a layer from the state dictionary of a whole model; empty where it is none."""
    endings = ["weight", *(direction for _, direction in checkpoint.NORMALISED)]
    prefixes = [key.removesuffix(ending) for key in keys for ending in endings if key.endswith(f".{ending}")]
    return f'; prefix="{prefixes[0]}" would choose one of {len(prefixes)} layers' if prefixes else ""


def _fold(prefix: str, pair: Sequence[str], state: Mapping[str, Any], own: Any) -> Any:
    """The weight of a weight normalisation, or an `EntryError`."""
    name, direction_name = (prefix + key for key in pair)
    direction = _read(direction_name, state[pair[1]], own)
    magnitude = _as_array(name, state[pair[0]], own)
    try:
        return checkpoint.fold(*(_place(array, None, array.dtype) for array in (magnitude, direction)))
    except EntryError as error:
        raise EntryError(f'"{name}" {error}') from error


def _read(key: str, value: Any, own: Any) -> Any:
    """An entry of a state dictionary as a NumPy or CuPy array that fits a parameter.

    Raises:
        EntryError: it does not.
    """
    array = _as_array(key, value, own)
    if tuple(array.shape) != tuple(own.shape):
        raise EntryError(f'"{key}" must have shape {tuple(own.shape)}, got {tuple(array.shape)}')
    return array


def _as_array(key: str, value: Any, own: Any) -> Any:
    """An entry of a state dictionary as a NumPy or CuPy array of a dtype that converts to a parameter's.

    Raises:
        EntryError: it is none.
    """
    if isinstance(value, np.ma.MaskedArray) or not (
        hasattr(value, "__array__") or hasattr(value, "__cuda_array_interface__")
    ):
        raise EntryError(f'"{key}" must be an array, got {type(value).__name__}')
    try:
        if runtime.is_cupy_array(value):
            array = value
        elif hasattr(value, "__cuda_array_interface__"):
            array = _as_cupy_array(value)
        else:
            array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise EntryError(f'"{key}" cannot be read as an array: {error}') from error
    if runtime.is_cupy_array(array) and not array.dtype.isnative:
        raise EntryError(f'"{key}" must have native byte order on a GPU, got {array.dtype.str}')
    if array.dtype == np.dtype("V2") and own.dtype.name == "bfloat16":
        array = array.view(own.dtype)  # NumPy's files keep the bytes of bfloat16 and lose its name
    if not _converts(array.dtype, str(own.dtype.name)):
        raise EntryError(f'"{key}" must have a dtype that converts to {own.dtype}, got {array.dtype}')
    return array
