"""Layers: `Conv1d` and `ConvTranspose1d`, with the constructor arguments, attributes and printed form of torch.nn's.

`copy.deepcopy` of a layer stays on its GPU. A pickled layer is loaded onto CuPy's current GPU, as CuPy's own arrays
are: with `cupy.cuda.Device(1)` around `pickle.load`, or `to("cuda:1")` after it, it is on another one.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, SupportsIndex, TypeVar, cast

import numpy as np

from . import checkpoint, dispatch, runtime
from .arguments import check_groups, check_int, check_padding_mode, check_precision, check_setting, check_size
from .checkpoint import EntryError
from .functional import ArrayT, conv1d, conv_transpose1d
from .fusion import FUSED_ARRAYS, Activation, ActivationLike, Fused, Fusion
from .lengths import output_lengths
from .parameters import (
    converts,
    draw_uniform,
    fold_normalised,
    generator_of,
    gpu_index,
    home_of,
    put,
    read_entry,
    supported_dtype,
)
from .problem import Op, Padding, Setting, Settings, numpy_dtype
from .text import shown

__all__ = ["Conv1d", "ConvTranspose1d", "IncompatibleKeys"]

LayerT = TypeVar("LayerT", bound="_Layer")

_LISTED = 20  # the most missing or unknown entries in a message


class IncompatibleKeys(NamedTuple):
    """The keys that `load_state_dict(state, strict=False)` ignored.

    Attributes:
        missing_keys: keys of the layer that the state does not have.
        unexpected_keys: keys of the state that the layer does not have.

    Example:
        >>> from gpuconv import nn
        >>> layer = nn.Conv1d(1, 1, 3)
        >>> layer.load_state_dict({"weight": layer.weight, "scale": 1.0}, strict=False)
        IncompatibleKeys(missing_keys=['bias'], unexpected_keys=['scale'])
    """

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
            raise TypeError(f"{caller}: bias must be True or False, got {type(bias).__name__} {shown(bias)}")
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
        name = "float32" if dtype is None else supported_dtype(caller, dtype)
        self.precision = check_precision(caller, precision, name)
        check_size(caller, "weight", shape, name)
        index = gpu_index(caller, device)
        generator = generator_of(caller, rng)
        fan_in = shape[1] * K
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        target = numpy_dtype(name)
        self.weight = put(draw_uniform(generator, bound, shape, target), index, target)
        self.bias = put(draw_uniform(generator, bound, (C_out,), target), index, target) if bias else None
        self.activation = fused.fusion.activation
        self.input_activation = fused.fusion.input_activation
        for key, array, length in zip(FUSED_ARRAYS[1:], fused.arrays[1:], (C_out, C_out, C_in, C_in), strict=True):
            if array is not None:
                _check_channels(caller, key, array, length, name)
            setattr(self, key, None if array is None else put(array, index, target, copy=True))

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
            RuntimeError: the device is a GPU but none answers; or its current stream is being captured.
            ModuleNotFoundError: CuPy, or for bfloat16 ml_dtypes, is not installed.
        """
        caller = f"{type(self).__name__}.to"
        name = None if dtype is None else supported_dtype(caller, dtype)
        if self.precision == "tf32" and name not in (None, "float32"):
            raise ValueError(
                f'{caller}: dtype must be float32 for a layer with precision "tf32", got {name}; set the layer\'s '
                'precision to "float32" first'
            )
        index = None if device is None else gpu_index(caller, device)
        parameters = self.state_dict()
        for key, array in parameters.items():
            if name is not None and not converts(array.dtype, name):
                raise TypeError(f"{caller}: dtype must be complex, because {key} is {array.dtype}; got {name}")
        target = None if name is None else numpy_dtype(name)
        placed = {
            key: put(array, home_of(array) if device is None else index, array.dtype if target is None else target)
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
        state.update((key, getattr(self, key)) for key in FUSED_ARRAYS[1:] if getattr(self, key) is not None)
        return state

    @property
    def fused(self) -> dict[str, Any]:
        """The arguments `activation` and `input_activation` of the functions, by name."""
        return Fusion(self.activation, self.input_activation).as_arguments(vars(self))

    def load_state_dict(
        self, state: Mapping[str, Any] | str | os.PathLike[str], strict: bool = True, *, prefix: str = ""
    ) -> IncompatibleKeys:
        """Replace the parameters by copies of the arrays in `state`, on the layer's device and in its dtype.

        Args:
            state: "weight", "bias" unless the layer has none, and the arrays of snake: NumPy or CuPy arrays, or
                objects with `__array__` or `__cuda_array_interface__`, such as the tensors of a PyTorch layer's
                `state_dict()`; or the path of a `.npz` or `.safetensors` file of such arrays, of which only the needed
                ones are read. In place of "weight" there may be the two arrays of weight normalisation: "weight_g" and
                "weight_v", or "parametrizations.weight.original0" and "parametrizations.weight.original1". The weight
                is then computed in float64 and rounded.
            strict: whether unknown and missing entries are errors.
            prefix: that of the names in `state` that belong to this layer, such as "encoder.conv1." for one layer of a
                model; the other entries are ignored.

        Returns:
            The missing and the unexpected keys, both empty if `strict`.

        Raises:
            ValueError: an entry is unknown, missing, unreadable or of another shape (the message names all of them); or
                the file is damaged or neither a `.npz` nor a `.safetensors` file. The layer is unchanged.
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
            raise TypeError(f"{caller}: prefix must be a str, got {type(prefix).__name__} {shown(prefix)}")
        own, found = self.state_dict(), checkpoint.select(state, prefix)
        pair = next((pair for pair in checkpoint.NORMALISED if "weight" not in found and set(pair) <= found.keys()), ())
        missing = [key for key in own if key not in found and not (pair and key == "weight")]
        unexpected = [key for key in found if key not in own and key not in pair]
        problems = _listed("missing", missing, prefix) + _listed("unknown", unexpected, prefix) if strict else []
        loaded = {}
        for key in own:
            try:
                if pair and key == "weight":
                    loaded[key] = fold_normalised(prefix, pair, found, own[key])
                elif key in found:
                    loaded[key] = read_entry(prefix + key, found[key], own[key])
            except EntryError as error:
                problems.append(str(error))
        if problems:
            hint = _prefix_hint(found) if missing else ""
            raise ValueError(f"{caller}: the state does not fit {self}: {'; '.join(problems)}{hint}")
        self._replace_parameters(
            {key: put(array, home_of(own[key]), own[key].dtype, copy=True) for key, array in loaded.items()}
        )
        return IncompatibleKeys(missing, unexpected)

    def _replace_parameters(self, parameters: dict[str, Any]) -> None:
        """Set these arrays as parameters; a weight that `gpuconv.prepare` made stays a prepared one."""
        if isinstance(self.weight, runtime.PreparedWeight) and "weight" in parameters:
            array = parameters["weight"]
            kept = self.weight if array is self.weight.array else runtime.PreparedWeight(array)
            parameters = {**parameters, "weight": kept}
        vars(self).update(parameters)

    def output_lengths(self, lengths: Any) -> Any:
        """`gpuconv.output_lengths` of these lengths of samples, with the settings of the layer."""
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
    """A convolution layer: `gpuconv.conv1d` with its parameters.

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
        device: that of the parameters: "cpu", "cuda" (CuPy's current device) or "cuda:1".
        dtype: one of float16, bfloat16, float32 (the default), float64, complex64 and complex128: a name or a NumPy
            dtype. The input must have it too.
        rng: a seed or a `numpy.random.Generator` for the initial parameters.
        precision: as in the function: "float32", or "tf32" for float32 layers.
        algorithm: as in the function: None, "base", the name of a kernel family, "fft" or "auto".
        activation: as in the function; the arrays of snake become parameters of the layer, in its dtype.
        input_activation: likewise.

    Attributes:
        weight: (C_out, C_in/groups, K), drawn like PyTorch's from the uniform distribution between -b and b, where
            ``b = 1/sqrt(C_in/groups * K)``, in float64 and then rounded to the dtype. The real and the imaginary parts
            of complex parameters are both drawn in this way. A seed gives the same values on every device.
        bias: (C_out,), drawn from the same distribution after the weight, or None.
        in_channels, out_channels, kernel_size, stride, padding, dilation, output_padding, groups, padding_mode,
            transposed: as in PyTorch, where per-axis settings are tuples.
        precision, algorithm: as given.
        activation, input_activation: a `gpuconv.fusion.Activation`, or None.
        activation_alpha, activation_beta, input_activation_alpha, input_activation_beta: (C_out,) or (C_in,), or None.

    Raises:
        ValueError: a value is out of range; the message names the argument, what was expected and what was given.
        TypeError: an argument is of the wrong kind.
        RuntimeError: the device is a GPU but none answers.
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
            padding_mode=self.padding_mode, residual=residual, precision=self.precision, algorithm=self.algorithm,
            lengths=lengths, **self.fused,
        )  # fmt: skip
        return cast(ArrayT, output)

    def __call__(self, input: ArrayT, *, residual: ArrayT | None = None, lengths: Any = None) -> ArrayT:
        """`forward`."""
        return self.forward(input, residual=residual, lengths=lengths)


class ConvTranspose1d(_Layer):
    """A transposed convolution layer: `gpuconv.conv_transpose1d` with its parameters.

    Input (N, C_in, L_in) or (C_in, L_in), output (N, C_out, L_out) or (C_out, L_out), with
    ``L_out = (L_in - 1)*stride - padding_left - padding_right + dilation*(K - 1) + output_padding + 1``.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: K, taps.
        stride: distance between the output windows of neighbouring input samples, in output samples.
        padding: output samples trimmed: an int from both sides, a pair (left, right), "valid" (none) or "same"
            (L_out = L_in*stride).
        output_padding: output samples added on the right, below max(stride, dilation).
        dilation: distance between taps, in output samples.
        padding_mode: only "zeros", as in PyTorch.
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
            output_size: the wanted L_out, in place of the layer's output_padding: an int, a sequence of one, or a shape
                with as many axes as `input`, of which, as in PyTorch, only the last one is used.
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
            residual=residual,
            precision=self.precision,
            algorithm=self.algorithm,
            lengths=lengths,
            **self.fused,
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
    """Check that an array of snake can become a parameter."""
    if not isinstance(array, np.ndarray) and not runtime.is_cupy_array(array):
        raise TypeError(f"{caller}: {key} must be a NumPy or CuPy array, got {type(array).__name__}")
    if tuple(array.shape) != (channels,):
        raise ValueError(f"{caller}: {key} must have shape ({channels},), got {tuple(array.shape)}")
    if not converts(array.dtype, dtype):
        raise TypeError(f"{caller}: {key} must have a dtype that converts to {dtype}, got {array.dtype}")


def _as_attribute(padding: Padding) -> str | tuple[int, ...]:
    """A validated padding as PyTorch stores it: a string, or a tuple."""
    if isinstance(padding, str):
        return str(padding)
    return tuple(operator.index(v) for v in (padding if isinstance(padding, list | tuple) else (padding,)))


def _listed(what: str, keys: Sequence[str], prefix: str) -> list[str]:
    """One problem for each key, limited to `_LISTED`: the keys of a whole model may be thousands."""
    listed = [f'{what} "{prefix}{key}"' for key in keys[:_LISTED]]
    return [*listed, f"{len(keys) - _LISTED} more {what}"] if len(keys) > _LISTED else listed


def _prefix_hint(keys: Iterable[str]) -> str:
    """A hint at how to choose a layer from the state dictionary of a model; empty if there are no layers in it."""
    endings = ["weight", *(direction for _, direction in checkpoint.NORMALISED)]
    prefixes = [key.removesuffix(ending) for key in keys for ending in endings if key.endswith(f".{ending}")]
    return f'; prefix="{prefixes[0]}" would choose one of {len(prefixes)} layers' if prefixes else ""
