"""A transposed convolution of a signal that arrives in pieces."""

from __future__ import annotations

from typing import Any, SupportsIndex

from ..arguments import Settings
from ..fusion import ActivationLike
from ..problem import Padding, Setting
from .base import Position, Stream


class ConvTranspose1d(Stream):
    """`gpuconv.conv_transpose1d` of a signal that arrives in pieces; an output is returned once it is complete.

    Args:
        layer: an `nn.ConvTranspose1d`, whose settings replace those below; or the weight (C_in, C_out/groups, K), NumPy
            or CuPy, of which a copy is kept.
        bias: (C_out,), or None.
        stride: distance between the output windows of neighbouring input samples, in output samples.
        padding: output samples trimmed from the whole signal: an int, a pair (left, right), "valid" or "same".
        output_padding: output samples added at the end of the whole signal.
        groups: input and output channels are cut into this many groups that do not mix.
        dilation: distance between taps, in output samples.
        slots: the number of independent signals.
        algorithm: as in `gpuconv.conv_transpose1d`, but neither "fft" nor "auto".
        precision, activation, input_activation: as in `gpuconv.conv_transpose1d`.

    Raises:
        ValueError: a value is out of range.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> import numpy as np
        >>> from gpuconv import stream
        >>> s = stream.ConvTranspose1d(np.ones((1, 1, 3)), stride=2)
        >>> s.push(np.array([[1.0]])), s.push(np.array([[2.0]])), s.flush()
        (array([[1., 1.]]), array([[3., 2.]]), array([[[2.]]]))
    """

    op = "conv_transpose1d"

    def __init__(
        self,
        layer: Any,
        bias: Any | None = None,
        stride: Setting = 1,
        padding: Padding = 0,
        output_padding: Setting = 0,
        groups: SupportsIndex = 1,
        dilation: Setting = 1,
        *,
        slots: SupportsIndex = 1,
        precision: str = "float32",
        algorithm: str | None = None,
        activation: ActivationLike | None = None,
        input_activation: ActivationLike | None = None,
    ) -> None:
        self._extra = 0
        super().__init__(
            layer, bias, stride, padding, output_padding, dilation, groups, slots, precision, algorithm, activation,
            input_activation,
        )  # fmt: skip

    @property
    def _channels(self) -> int:
        return self._weight.shape[0]

    def _sides(self, caller: str, settings: Settings) -> tuple[int, int]:
        self._extra = settings.output_padding
        if isinstance(settings.padding, str):  # "same": L_out = L_in*stride
            total = max(0, self._span - self._stride)
            self._extra = max(0, self._stride - self._span)
            return total // 2, total - total // 2
        return settings.padding

    def _advance(self, position: Position, length: int) -> tuple[int, int, Position]:
        # A sample completes `stride` outputs. Those that would be trimmed if it were the last one must wait.
        held = position.held + length
        waiting = max(0, self._stride - self._span - self._extra + self._right)
        complete = held * self._stride - waiting
        following = max(position.ahead, complete)
        # A sample is needed as long as its window, which begins at its index times the stride, reaches an output.
        behind = max(0, -((self._span - 1 - following) // self._stride))
        dropped = min(held, behind, following // self._stride)
        after = Position(held - dropped, following - dropped * self._stride, 0, position.received)
        return following - position.ahead if complete > position.ahead else 0, dropped, after

    def _remaining(self, position: Position) -> int:
        end = (position.held - 1) * self._stride + self._span + self._extra - self._right
        return max(0, end - position.ahead)

    def _settings(self, length: int, position: Position, count: int) -> tuple[Any, ...]:
        # Outputs `ahead` to `ahead + count` of the samples' own transposed convolution.
        cut = (length - 1) * self._stride + self._span - position.ahead - count
        padding, output_padding = (position.ahead, max(0, cut)), max(0, -cut)
        return self._stride, padding, output_padding, self._groups, self._dilation

    def _outputs(self, samples: Any, position: Position, count: int, out: Any | None = None) -> Any:
        if samples.shape[-1] or not count:
            return super()._outputs(samples, position, count, out)
        slots, channels, _ = samples.shape  # outputs beyond the last window are empty sums
        zeros, taps = self._empty((slots, channels, count)), self._empty((*self._weight.shape[:2], 1))
        zeros[...] = taps[...] = 0
        return self._call(zeros, taps, self._bias, groups=self._groups, **self._keywords)
