"""A convolution of a signal that arrives in pieces."""

from __future__ import annotations

from typing import Any, SupportsIndex

from ..arguments import Settings
from ..fusion import ActivationLike
from ..problem import Padding, Setting
from .base import Position, Stream


class Conv1d(Stream):
    """`gpuconv.conv1d` of a signal that arrives in pieces.

    Args:
        layer: an `nn.Conv1d`, whose settings replace those below; or the weight (C_out, C_in/groups, K), NumPy or CuPy,
            of which a copy is kept.
        bias: (C_out,), or None.
        stride: step of the window, in samples.
        padding: zeros around the whole signal: "causal", "valid", an int or a pair (left, right); "same" with stride 1.
        dilation: distance between taps, in samples.
        groups: input and output channels are cut into this many groups that do not mix.
        slots: the number of independent signals.
        algorithm: as in `gpuconv.conv1d`, but neither "fft" nor "auto".
        precision, activation, input_activation: as in `gpuconv.conv1d`.

    Raises:
        ValueError: a value is out of range, or the padding depends on the length of the whole signal.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> import numpy as np
        >>> from gpuconv import stream
        >>> s = stream.Conv1d(np.ones((1, 1, 3)), padding="causal")
        >>> s.push(np.array([[1.0, 2.0]])), s.push(np.array([[3.0]])), s.push(np.array([[4.0]]))
        (array([[1., 3.]]), array([[6.]]), array([[9.]]))
    """

    op = "conv1d"

    def __init__(
        self,
        layer: Any,
        bias: Any | None = None,
        stride: Setting = 1,
        padding: Padding = 0,
        dilation: Setting = 1,
        groups: SupportsIndex = 1,
        *,
        slots: SupportsIndex = 1,
        precision: str = "float32",
        algorithm: str | None = None,
        activation: ActivationLike | None = None,
        input_activation: ActivationLike | None = None,
    ) -> None:
        super().__init__(
            layer, bias, stride, padding, 0, dilation, groups, slots, precision, algorithm, activation, input_activation
        )

    @property
    def _channels(self) -> int:
        return self._weight.shape[1] * self._groups

    def _sides(self, caller: str, settings: Settings) -> tuple[int, int]:
        if settings.padding == "causal":
            return self._span - 1, 0
        if settings.padding == "same":
            if self._stride > 1:
                raise ValueError(f'{caller}: padding "same" with a stride depends on the length of the whole signal')
            return (self._span - 1) // 2, self._span - 1 - (self._span - 1) // 2
        return settings.padding

    def _advance(self, position: Position, length: int) -> tuple[int, int, Position]:
        held = position.held + length
        count = max(0, (position.ahead + held - self._span) // self._stride + 1) if held else 0
        moved = count * self._stride  # from the first position of this window to that of the next
        ahead = max(0, position.ahead - moved)
        dropped = max(0, moved - position.ahead)
        return (
            count,
            dropped,
            Position(max(0, held - dropped), ahead, position.skip + max(0, dropped - held), position.received),
        )

    def _remaining(self, position: Position) -> int:
        # Zeros on the right complete further windows; some may lie entirely in the padding.
        behind = position.ahead + position.held + self._right - position.skip - self._span
        return max(0, behind // self._stride + 1)

    def _settings(self, length: int, position: Position, count: int) -> tuple[Any, ...]:
        right = max(0, (count - 1) * self._stride + self._span - position.ahead - length)
        return self._stride, (position.ahead, right), self._dilation, self._groups
