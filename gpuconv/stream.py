"""Convolutions of signals that arrive piece by piece: layers that remember what the next outputs need.

The outputs of all pushes and of the flush, one behind the other, are those of one call on the whole signal: bit for bit
on a GPU, within the error bound on the CPU. A stream keeps the samples that later windows read, so its memory depends
on the layer and on the longest push alone.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, SupportsIndex, TypeVar, cast

import numpy as np

from . import functional, nn, runtime
from .arguments import Settings, check_int
from .interchange import view
from .memory import take
from .problem import INTEGER_SUMS, Op, Padding, Setting

__all__ = ["Conv1d", "ConvTranspose1d"]

StreamT = TypeVar("StreamT", bound="_Stream")


class _Position(NamedTuple):
    """Where a slot's stream is, apart from the samples.

    Attributes:
        held: the samples that are kept for later windows.
        ahead: of a convolution, the zeros that still lie before the first held sample; of a transposed one, the place
            of the next output among those that the held samples begin with.
        skip: samples to come that no window reads.
        received: whether there was any sample.
    """

    held: int
    ahead: int
    skip: int
    received: bool


class _Stream:
    """What both streams share: the layer, the slots with their samples, and the bookkeeping."""

    op: ClassVar[Op]

    def __init__(
        self,
        layer: Any,
        bias: Any | None,
        stride: Setting,
        padding: Padding,
        output_padding: Setting,
        dilation: Setting,
        groups: SupportsIndex,
        slots: SupportsIndex,
        precision: str,
        algorithm: str | None,
    ) -> None:
        caller = f"stream.{type(self).__name__}"
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            if layer.op != self.op:
                raise TypeError(f"{caller}: layer must be an nn.{type(self).__name__}, got {layer}")
            weight, bias, stride, dilation, groups = (
                layer.weight,
                layer.bias,
                layer.stride,
                layer.dilation,
                layer.groups,
            )
            padding = layer.padding if isinstance(layer.padding, str) or len(layer.padding) == 2 else layer.padding[0]
            output_padding, precision, algorithm = layer.output_padding, layer.precision, layer.algorithm
        else:
            weight = layer
        settings = Settings.check(caller, self.op, stride, padding, dilation, groups, output_padding)
        self._weight = weight if isinstance(weight, runtime.PreparedWeight) else functional.prepare(weight)
        _, *biases = take(caller, weight=self._weight.array, **({} if bias is None else {"bias": bias}))
        self._bias = biases[0].copy() if biases else None
        shape = self._weight.shape
        if len(shape) != 3 or shape[2] < 1:
            raise ValueError(f"{caller}: weight must have three axes, the last with a tap at least, got shape {shape}")
        self._stride, self._dilation, self._groups = settings.stride, settings.dilation, settings.groups
        self._span = self._dilation * (shape[2] - 1) + 1
        self._left, self._right = self._sides(caller, settings)
        self._keywords: dict[str, Any] = {"precision": precision, "algorithm": algorithm}
        self.slots = check_int(caller, "slots", slots, "an int", 1)
        self._samples = self._empty((self.slots, self._channels, 0))
        self._window: Any | None = None  # on a GPU: held samples and those of the last push, if all slots were pushed
        self._positions = [self._start()] * self.slots

    @property
    def _channels(self) -> int:
        """C_in."""
        raise NotImplementedError

    def _sides(self, caller: str, settings: Settings) -> tuple[int, int]:
        """The padding on the left and on the right."""
        raise NotImplementedError

    def _start(self) -> _Position:
        """Before the first sample."""
        raise NotImplementedError

    def _advance(self, position: _Position, length: int) -> tuple[int, int, _Position]:
        """The outputs of a push of so many samples, the samples to drop from the front, and what comes after."""
        raise NotImplementedError

    def _compute(self, samples: Any, position: _Position, count: int, out: Any | None) -> Any:
        """The next `count` outputs from the samples that are held."""
        raise NotImplementedError

    def _rest(self, samples: Any, position: _Position) -> Any:
        """The outputs behind the last sample, where there are samples."""
        raise NotImplementedError

    def push(self, input: Any, slots: Sequence[SupportsIndex] | None = None, *, out: Any | None = None) -> Any:
        """Take the next samples, and return the outputs that they complete.

        Args:
            input: (slots, C_in, L), or (C_in, L) where one slot is pushed; any L, 0 too. Of the kind, device and dtype
                of the weight.
            slots: which slots the samples are for, each once, in order; None for all. They must be at the same place
                of their streams: the same number of samples since the start, or the same place within the stride once
                the first window is full.
            out: an array of the output's shape to write to.

        Returns:
            (slots, C_out, L_out), or (C_out, L_out), L_out from 0 on.

        On a GPU a push of as many samples as the one before is two launches, once the first window is full and where
        all slots are pushed: the samples are appended in place, and the outputs computed. With `out` it allocates
        nothing but what the kernels want for themselves, and can be captured into a CUDA graph; each launch of that is
        a push.

        Raises:
            ValueError: a shape does not fit, a slot does not exist or is named twice, or slots are at different places.
            TypeError: the input is of another kind or dtype.
        """
        caller = f"{type(self).__name__}.push"
        chosen = self._chosen(caller, slots)
        _, x = take(caller, weight=self._weight.array, input=input)
        given, out = out, view(caller, "out", out, write=True)
        if x.dtype != self._weight.dtype:
            raise TypeError(f"{caller}: input must have the dtype of weight, {self._weight.dtype}, got {x.dtype}")
        shape = tuple(x.shape)
        single = len(shape) == 2 and len(chosen) == 1
        x = x[None] if single else x
        if x.ndim != 3 or x.shape[:2] != (len(chosen), self._channels):
            raise ValueError(
                f"{caller}: input must have shape (slots, C_in, L) = ({len(chosen)}, {self._channels}, L), got {shape}"
            )
        position = self._common(caller, chosen)
        skipped = min(position.skip, x.shape[-1])
        x = x[..., skipped:]
        position = position._replace(skip=position.skip - skipped, received=position.received or x.shape[-1] > 0)
        count, dropped, after = self._advance(position, x.shape[-1])
        expected = self._output_shape(len(chosen), count)[1 if single else 0 :]
        if out is not None and (tuple(out.shape), out.dtype) != (expected, self._output_dtype):
            raise ValueError(
                f"{caller}: out must be {self._output_dtype} of shape {expected}, got {out.dtype} of shape {out.shape}"
            )
        whole = chosen == list(range(self.slots))
        if whole and after == position and self._continues(x.shape[-1], dropped):
            samples = cast(Any, self._window)
            runtime.append(samples, x)
        else:
            held = (self._samples if whole else self._samples[chosen])[..., : position.held]
            samples = runtime.array_module(x).concatenate((held, x), axis=-1) if x.shape[-1] else held
            self._window = samples if whole and x.shape[-1] and runtime.is_cupy_array(samples) else None
        if count:
            result = self._compute(samples, position, count, out[None] if single and out is not None else out)
        else:
            result = self._empty(self._output_shape(len(chosen), 0), self._output_dtype)
        self._keep(chosen if not whole else None, samples[..., dropped:], after)
        if out is not None:
            return given
        return result[0] if single else result

    def flush(self, slots: Sequence[SupportsIndex] | None = None) -> Any:
        """Return the outputs that follow the last sample, and begin anew.

        Args:
            slots: which, as in `push`; None for all.

        Returns:
            (slots, C_out, L_out), L_out from 0 on.

        Raises:
            ValueError: as `push`; or the stream is too short for a single output, as in a call on the whole.
        """
        caller = f"{type(self).__name__}.flush"
        chosen = self._chosen(caller, slots)
        position = self._common(caller, chosen)
        if not position.received:
            result = self._empty(self._output_shape(len(chosen), 0), self._output_dtype)
        else:
            held = self._samples[..., : position.held]
            result = self._rest(held if chosen == list(range(self.slots)) else held[chosen], position)
        self.reset(chosen)
        return result

    def reset(self, slots: Sequence[SupportsIndex] | None = None) -> None:
        """Forget the samples of slots, so that their streams begin anew; None for all."""
        for slot in self._chosen(f"{type(self).__name__}.reset", slots):
            self._positions[slot] = self._start()
        self._window = None

    def state(self) -> dict[str, Any]:
        """What is remembered, as arrays by name, copies: `load_state` of another stream of this layer continues here.

        "samples" is (slots, C_in, the most that a slot holds), of the weight's kind; "positions" (slots, 4) integers of
        NumPy.
        """
        held = max(position.held for position in self._positions)
        return {"samples": self._samples[..., :held].copy(), "positions": np.array(self._positions, np.int64)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a stream of the same layer with as many slots.

        Raises:
            ValueError: the state does not fit; the stream is unchanged.
        """
        caller = f"{type(self).__name__}.load_state"
        if set(state) != {"samples", "positions"}:
            raise ValueError(f'{caller}: state must hold "samples" and "positions", got {", ".join(map(repr, state))}')
        samples, positions = state["samples"], np.asarray(state["positions"])
        if positions.shape != (self.slots, 4) or positions.dtype.kind not in "iu" or (positions < 0).any():
            raise ValueError(f"{caller}: positions must be integers of shape ({self.slots}, 4), got {positions.shape}")
        _, samples = take(caller, weight=self._weight.array, samples=samples)
        held = int(positions[:, 0].max())
        if tuple(samples.shape) != (self.slots, self._channels, held) or samples.dtype != self._weight.dtype:
            raise ValueError(
                f"{caller}: samples must be {self._weight.dtype} of shape {(self.slots, self._channels, held)}, got "
                f"{samples.dtype} of shape {tuple(samples.shape)}"
            )
        self._samples, self._window = samples.copy(), None
        self._positions = [_Position(int(h), int(a), int(s), bool(r)) for h, a, s, r in positions]

    def clone(self: StreamT) -> StreamT:
        """A stream of the same layer, with the same weights in memory, that goes on from here by itself."""
        twin = copy.copy(self)
        twin._samples, twin._window, twin._positions = self._samples.copy(), None, [*self._positions]
        return twin

    def __repr__(self) -> str:
        weight, padding = f"{self._weight.shape} {self._weight.dtype}", (self._left, self._right)
        return (
            f"stream.{type(self).__name__}(weight {weight}, stride={self._stride}, padding={padding}, "
            f"dilation={self._dilation}, groups={self._groups}, slots={self.slots})"
        )

    @property
    def _output_dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._weight.dtype
        return np.dtype(INTEGER_SUMS[0]) if dtype.kind in "iu" else dtype

    def _output_shape(self, slots: int, count: int) -> tuple[int, int, int]:
        shape = self._weight.shape
        return slots, shape[0] if self.op == "conv1d" else shape[1] * self._groups, count

    def _continues(self, length: int, dropped: int) -> bool:
        """Whether the last push left a window in which this one finds its samples behind the first `length`."""
        return self._window is not None and length == dropped == self._window.shape[-1] - self._samples.shape[-1]

    def _empty(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """A fresh array where the weight is, of its dtype where none is given."""
        return runtime.empty_beside(self._weight.array, shape, self._weight.dtype if dtype is None else dtype)

    def _chosen(self, caller: str, slots: Sequence[SupportsIndex] | None) -> list[int]:
        if slots is None:
            return list(range(self.slots))
        chosen = [operator.index(slot) for slot in slots]
        if not all(0 <= slot < self.slots for slot in chosen) or len(set(chosen)) < len(chosen):
            raise ValueError(f"{caller}: slots must be from 0 to {self.slots - 1}, each once, got {chosen}")
        return chosen

    def _common(self, caller: str, chosen: list[int]) -> _Position:
        """The place of the streams of these slots."""
        positions = {self._positions[slot] for slot in chosen}
        if len(positions) > 1:
            raise ValueError(f"{caller}: slots {chosen} are at different places of their streams; push them apart")
        return next(iter(positions), self._start())

    def _keep(self, chosen: list[int] | None, samples: Any, position: _Position) -> None:
        """Keep these samples for slots; None for all."""
        if chosen is None:
            self._samples = samples
            self._positions = [position] * self.slots
            return
        if self._samples.shape[-1] < position.held:
            grown = self._empty((self.slots, self._channels, position.held))
            grown[..., : self._samples.shape[-1]] = self._samples
            self._samples = grown
        self._samples[chosen, :, : position.held] = samples
        for slot in chosen:
            self._positions[slot] = position


class Conv1d(_Stream):
    """`gpuconv.conv1d` of a signal that arrives piece by piece.

    Args:
        layer: an `nn.Conv1d`, whose settings replace those below; or the weight (C_out, C_in/groups, K), NumPy or CuPy,
            of which a copy is kept.
        bias: (C_out,), or None.
        stride: step of the window, in samples.
        padding: zeros around the whole signal: "causal", "valid", an int or a pair (left, right); "same" with stride 1.
        dilation: distance between taps, in samples.
        groups: input and output channels are cut into this many groups that do not mix.
        slots: so many independent streams are served at once.
        precision: as in `gpuconv.conv1d`.
        algorithm: as in `gpuconv.conv1d`.

    Raises:
        ValueError: a value is out of range, or the padding depends on the length of the whole.
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
    ) -> None:
        super().__init__(layer, bias, stride, padding, 0, dilation, groups, slots, precision, algorithm)

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

    def _start(self) -> _Position:
        return _Position(0, self._left, 0, False)

    def _advance(self, position: _Position, length: int) -> tuple[int, int, _Position]:
        held = position.held + length
        count = max(0, (position.ahead + held - self._span) // self._stride + 1) if held else 0
        moved = count * self._stride  # from the first position of this window to that of the next
        ahead = max(0, position.ahead - moved)
        dropped = max(0, moved - position.ahead)
        return (
            count,
            dropped,
            _Position(max(0, held - dropped), ahead, position.skip + max(0, dropped - held), position.received),
        )

    def _compute(self, samples: Any, position: _Position, count: int, out: Any | None) -> Any:
        return functional.conv1d(
            samples, self._weight, self._bias, self._stride, (position.ahead, 0), self._dilation, self._groups,
            **self._keywords, out=out,
        )  # fmt: skip

    def _rest(self, samples: Any, position: _Position) -> Any:
        # Zeros on the right complete further windows; those that begin behind the last sample lie in the padding.
        right = self._right - position.skip
        if position.ahead + position.held + right < self._span:
            return self._empty(self._output_shape(samples.shape[0], 0), self._output_dtype)
        return functional.conv1d(
            samples, self._weight, self._bias, self._stride, (position.ahead, right), self._dilation, self._groups,
            **self._keywords,
        )  # fmt: skip


class ConvTranspose1d(_Stream):
    """`gpuconv.conv_transpose1d` of a signal that arrives piece by piece; an output comes once it is complete.

    Args:
        layer: an `nn.ConvTranspose1d`, whose settings replace those below; or the weight (C_in, C_out/groups, K), NumPy
            or CuPy, of which a copy is kept.
        bias: (C_out,), or None.
        stride: distance between the windows that neighbouring input samples feed, in output samples.
        padding: output samples trimmed from the whole: an int, a pair (left, right), "valid" or "same".
        output_padding: output samples added at the end of the whole.
        groups: input and output channels are cut into this many groups that do not mix.
        dilation: distance between taps, in output samples.
        slots: so many independent streams are served at once.
        precision: as in `gpuconv.conv_transpose1d`.
        algorithm: as in `gpuconv.conv_transpose1d`.

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
    ) -> None:
        self._extra = 0
        super().__init__(layer, bias, stride, padding, output_padding, dilation, groups, slots, precision, algorithm)

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

    def _start(self) -> _Position:
        return _Position(0, self._left, 0, False)

    def _advance(self, position: _Position, length: int) -> tuple[int, int, _Position]:
        # A sample completes `stride` outputs, of which those wait that would be cut off if it were the last one.
        held = position.held + length
        waiting = max(0, self._stride - self._span - self._extra + self._right)
        complete = held * self._stride - waiting
        following = max(position.ahead, complete)
        # A sample is needed as long as its window, which begins at its number times the stride, reaches an output.
        behind = max(0, -((self._span - 1 - following) // self._stride))
        dropped = min(held, behind, following // self._stride)
        after = _Position(held - dropped, following - dropped * self._stride, 0, position.received)
        return following - position.ahead if complete > position.ahead else 0, dropped, after

    def _compute(self, samples: Any, position: _Position, count: int, out: Any | None) -> Any:
        return self._outputs(samples, position.ahead, count, out)

    def _rest(self, samples: Any, position: _Position) -> Any:
        end = (position.held - 1) * self._stride + self._span + self._extra - self._right
        count = max(0, end - position.ahead)
        if position.held and count:
            return self._outputs(samples, position.ahead, count, None)
        result = self._empty(self._output_shape(samples.shape[0], count), self._output_dtype)  # no window reaches it
        result[...] = 0
        if self._bias is not None:
            result += self._bias[:, None]
        return result

    def _outputs(self, samples: Any, first: int, count: int, out: Any | None) -> Any:
        """Outputs `first` to `first + count` of the samples' own transposed convolution."""
        full = (samples.shape[-1] - 1) * self._stride + self._span
        cut = full - first - count
        return functional.conv_transpose1d(
            samples, self._weight, self._bias, self._stride, (first, max(0, cut)), max(0, -cut), self._groups,
            self._dilation, **self._keywords, out=out,
        )  # fmt: skip
