"""The base class of the streams of both operations: the layer, and the slots with their samples and positions."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, SupportsIndex, TypeVar, cast

import numpy as np

from .. import dispatch, functional, nn, runtime
from ..arguments import MAX_STEP, ArraySpec, Settings, check_groups, check_int, is_one_of
from ..calls import native
from ..fusion import FUSED_ARRAYS, ActivationLike, Fused
from ..interchange import view
from ..memory import check_kinds, take
from ..problem import INTEGER_SUMS, ConvProblem, Op, Padding, Setting
from ..text import shown
from .window import Window, kind_of, window_for

StreamT = TypeVar("StreamT", bound="Stream")


class Position(NamedTuple):
    """The position of a slot in its stream.

    Attributes:
        held: the number of samples that are kept for later windows.
        ahead: for a convolution, the zeros that still lie before the first held sample; for a transposed one, the index
            of the next output among the outputs of the held samples.
        skip: the number of coming samples that no window reads.
        received: whether there has been any sample.
    """

    held: int
    ahead: int
    skip: int
    received: bool


class Stream:
    """The base class of both streams: the layer, and the slots with their samples and positions."""

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
        activation: ActivationLike | None,
        input_activation: ActivationLike | None,
    ) -> None:
        caller = f"stream.{type(self).__name__}"
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            if layer.op != self.op:
                raise TypeError(f"{caller}: layer must be an nn.{type(self).__name__}, got {layer}")
            if layer.padding_mode != "zeros":
                raise ValueError(f'{caller}: layer must have padding_mode "zeros", got {layer.padding_mode!r}')
            weight, bias, stride, dilation, groups = (
                layer.weight,
                layer.bias,
                layer.stride,
                layer.dilation,
                layer.groups,
            )
            padding = layer.padding if isinstance(layer.padding, str) or len(layer.padding) == 2 else layer.padding[0]
            output_padding, precision, algorithm = layer.output_padding, layer.precision, layer.algorithm
            activation, input_activation = layer.fused["activation"], layer.fused["input_activation"]
        else:
            weight = layer
        if is_one_of(algorithm, dispatch.BY_FFT):
            raise ValueError(
                f'{caller}: algorithm must be None, "base" or a kernel family, got {algorithm!r}: the blocks of an FFT '
                "would begin at each push"
            )
        settings = Settings.check(caller, self.op, stride, padding, dilation, groups, output_padding)
        if not isinstance(weight, runtime.PreparedWeight):
            weight = functional.prepare(*take(caller, weight=weight))
        self._weight: runtime.PreparedWeight = weight
        if bias is not None:
            _, bias = take(caller, weight=self._weight.array, bias=bias)
        shape = self._weight.shape
        if len(shape) != 3 or shape[2] < 1:
            raise ValueError(f"{caller}: weight must have three axes, the last with a tap at least, got shape {shape}")
        self._stride, self._dilation, self._groups = settings.stride, settings.dilation, settings.groups
        check_groups(caller, self._groups, self._channels, self._output_shape(1, 0)[1])
        self._span = self._dilation * (shape[2] - 1) + 1
        self._left, self._right = self._sides(caller, settings)
        fused = Fused.check(caller, activation, input_activation)
        _, *channels = take(caller, weight=self._weight.array, **fused.given)
        of_channels = dict(zip(fused.given, channels, strict=True))
        dispatch.check_algorithm(caller, self.op, algorithm)
        self._check_layer(caller, bias, precision, Fused(fused.fusion, tuple(map(of_channels.get, FUSED_ARRAYS))))
        self.slots = check_int(caller, "slots", slots, "an int", 1, MAX_STEP)
        self._call: Any = getattr(functional, self.op)
        with self._here():
            self._bias = None if bias is None else runtime.copied(bias)
            copies = {name: runtime.copied(array) for name, array in of_channels.items()}
            self._keywords: dict[str, Any] = {
                "precision": precision,
                "algorithm": algorithm,
                **fused.fusion.as_arguments(copies),
            }
            self._samples = self._empty((self.slots, self._channels, 0))
        # Pushes may run on any CUDA stream.
        runtime.complete(f"{caller}: a stream cannot be made", self._weight.array)
        self._positions = [self._start()] * self.slots
        # While pushes of one kind repeat, a window holds the samples instead; it is kept for the next repetition.
        self._window: Window | None = None
        self._window_of: tuple[Any, ...] | None = None  # the kind of its pushes, and their position
        self._in_window = False
        self._last: tuple[Any, ...] | None = None  # the kind and position of the last push

    def _check_layer(self, caller: str, bias: Any | None, precision: str, fused: Fused) -> None:
        """Check what has not been checked yet, as a call on the samples of one window would.

        Raises:
            ValueError, TypeError: the bias, the precision or an array of an activation does not fit the weight.
        """
        weight, op = ArraySpec(self._weight.shape, self._weight.dtype), self.op
        x = ArraySpec((1, self._channels, self._span if op == "conv1d" else 1), weight.dtype)
        extents = (self._dilation, self._groups) if op == "conv1d" else (0, self._groups, self._dilation, None)
        try:
            ConvProblem.of(op, x, weight, bias, self._stride, 0, *extents, precision).fused(fused)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{caller}{str(error).removeprefix(op)}") from None

    @property
    def _channels(self) -> int:
        """C_in."""
        raise NotImplementedError

    def _sides(self, caller: str, settings: Settings) -> tuple[int, int]:
        """The padding on the left and on the right."""
        raise NotImplementedError

    def _start(self) -> Position:
        """The position before the first sample."""
        return Position(0, self._left, 0, False)

    def _advance(self, position: Position, length: int) -> tuple[int, int, Position]:
        """The outputs of a push of `length` samples, the samples to drop from the front, and the next position."""
        raise NotImplementedError

    def _remaining(self, position: Position) -> int:
        """The number of outputs that follow the last sample, if there has been a sample."""
        raise NotImplementedError

    def _settings(self, length: int, position: Position, count: int) -> tuple[Any, ...]:
        """The settings of the call that computes the next `count` outputs from `length` samples."""
        raise NotImplementedError

    def push(self, input: Any, slots: Sequence[SupportsIndex] | None = None, *, out: Any | None = None) -> Any:
        """Take the next samples, and return the outputs that they complete.

        Args:
            input: (slots, C_in, L), or (C_in, L) for a single slot; any L, also 0. Of the kind, device and dtype of the
                weight.
            slots: the slots of the samples, each once, in order; None for all. They must be at the same position of
                their streams: the same number of samples since the start, or once the first window is full, the same
                position within the stride.
            out: an array of the output's shape to write to.

        Returns:
            (slots, C_out, L_out), or (C_out, L_out), with L_out from 0 on.

        Pushes repeat when they are for all slots and of one length, in arrays with the same strides and alignment, and
        the first window is full. From the second repetition on, such a push on a GPU is the launches of one call with a
        prepared weight. These also store the new samples if they are few: up to a thousand in all slots and channels,
        or up to eight a row of a depthwise layer. Otherwise one more launch appends them first. With `out` the push
        allocates only the kernels' buffers, and can be captured into a CUDA graph. Each launch of the graph is a push,
        until a flush, a reset, `load_state` or another push.

        Raises:
            ValueError: a shape does not fit, a slot does not exist or is named twice, or slots are at different
                positions.
            TypeError: the input is of another kind or dtype.
            RuntimeError: the current stream of the GPU is being captured, and the push has not repeated before.
        """
        with self._here():
            if self._in_window and slots is None:
                window = cast(Window, self._window)
                if window.takes(input, out):
                    return window.push(input, out)
            caller = f"{type(self).__name__}.push"
            own, target = view(caller, "input", input), view(caller, "out", out, write=True)
            if own is not input or target is not out:
                result = self.push(own, slots, out=target)
                return result if out is None else out
            return self._push(input, slots, out)

    def _push(self, input: Any, slots: Sequence[SupportsIndex] | None, out: Any | None) -> Any:
        """Any push, with all checks."""
        caller = f"{type(self).__name__}.push"
        chosen = self._chosen(caller, slots)
        given = {"weight": self._weight.array, "input": input}
        check_kinds(caller, given if out is None else {**given, "out": out})
        new = native(input) if isinstance(input, np.ndarray) else input
        if new.dtype != self._weight.dtype:
            own = self._weight.dtype.name
            hint = f"; pass input.astype({own!r})" if np.can_cast(new.dtype, own, "same_kind") else ""
            raise TypeError(f"{caller}: input must have the dtype of weight, {own}, got {input.dtype}{hint}")
        single = new.ndim == 2 and len(chosen) == 1
        x = new[None] if single else new
        if x.ndim != 3 or x.shape[:2] != (len(chosen), self._channels):
            raise ValueError(
                f"{caller}: input must have shape (slots, C_in, L) = ({len(chosen)}, {self._channels}, L), got "
                f"{tuple(input.shape)}"
            )
        position = self._common(caller, chosen)
        skipped = min(position.skip, x.shape[-1])
        x = x[..., skipped:]
        position = position._replace(skip=position.skip - skipped, received=position.received or x.shape[-1] > 0)
        count, dropped, after = self._advance(position, x.shape[-1])
        expected = self._output_shape(len(chosen), count)[1 if single else 0 :]
        if out is not None and (tuple(out.shape), out.dtype.newbyteorder("=")) != (expected, self._output_dtype):
            raise ValueError(
                f"{caller}: out must be {self._output_dtype} of shape {expected}, got {out.dtype} of shape {out.shape}"
            )
        whole = chosen == list(range(self.slots))
        kind = None
        if whole and not skipped and position == after and position.held and count:
            kind = kind_of(new, out), position
            if kind == self._last:
                return self._enter_window(kind, new, position, count, out)
        self._leave_window()
        samples = self._join((self._samples if whole else self._samples[chosen])[..., : position.held], x)
        result = self._outputs(samples, position, count, out[None] if single and out is not None else out)
        kept = samples[..., dropped:]
        if samples is x:
            kept = kept.copy()  # the caller's array may change
        self._keep(chosen if not whole else None, kept, after)
        self._last = kind
        if out is not None:
            return out
        return result[0] if single else result

    def flush(self, slots: Sequence[SupportsIndex] | None = None) -> Any:
        """Return the outputs that follow the last sample, and reset the slots.

        Args:
            slots: as in `push`; None for all.

        Returns:
            (slots, C_out, L_out), with L_out from 0 on: a signal that is too short has no outputs, where a call on it
            would raise an error.

        Raises:
            ValueError: as `push`.
        """
        caller = f"{type(self).__name__}.flush"
        chosen = self._chosen(caller, slots)
        position = self._common(caller, chosen)
        self._refuse_capture()
        with self._here():
            held = self._held()[..., : position.held]
            result = self._outputs(
                held if chosen == list(range(self.slots)) else held[chosen],
                position,
                self._remaining(position) if position.received else 0,
            )
        self.reset(chosen)
        return result

    def reset(self, slots: Sequence[SupportsIndex] | None = None) -> None:
        """Drop the samples of slots, whose streams then begin again; None for all slots."""
        chosen = self._chosen(f"{type(self).__name__}.reset", slots)
        with self._here():
            self._leave_window()
        for slot in chosen:
            self._positions[slot] = self._start()

    def state(self) -> dict[str, Any]:
        """Copies of the stream's state as arrays by name; with `load_state` another stream of the layer continues.

        "samples" is (slots, C_in, the most samples that a slot holds), of the weight's kind; "positions" is a NumPy
        array of (slots, 4) integers.
        """
        held = max(position.held for position in self._positions)
        with self._here():
            return {"samples": self._held()[..., :held].copy(), "positions": np.array(self._positions, np.int64)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a stream of the same layer with as many slots.

        Raises:
            ValueError, TypeError: the state does not fit; the stream is unchanged.
        """
        caller = f"{type(self).__name__}.load_state"
        if not isinstance(state, Mapping):
            raise TypeError(f"{caller}: state must be a mapping, got {type(state).__name__}")
        if set(state) != {"samples", "positions"}:
            raise ValueError(f'{caller}: state must hold "samples" and "positions", got {", ".join(map(repr, state))}')
        samples, positions = state["samples"], np.asarray(state["positions"])
        if positions.shape != (self.slots, 4) or positions.dtype.kind not in "iu" or (positions < 0).any():
            raise ValueError(f"{caller}: positions must be integers of shape ({self.slots}, 4), got {positions.shape}")
        _, samples = take(caller, weight=self._weight.array, samples=samples)
        if isinstance(samples, np.ndarray):
            samples = native(samples)
        held = int(positions[:, 0].max())
        if tuple(samples.shape) != (self.slots, self._channels, held) or samples.dtype != self._weight.dtype:
            raise ValueError(
                f"{caller}: samples must be {self._weight.dtype} of shape {(self.slots, self._channels, held)}, got "
                f"{samples.dtype} of shape {tuple(samples.shape)}"
            )
        self._refuse_capture()
        with self._here():
            self._samples, self._in_window, self._last = runtime.copied(samples), False, None
        self._positions = [Position(int(h), int(a), int(s), bool(r)) for h, a, s, r in positions]

    def clone(self: StreamT) -> StreamT:
        """A copy of the stream that shares the weights and continues independently, as `copy.copy` makes it."""
        return copy.copy(self)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: not the window, which they make again when their pushes repeat."""
        with self._here():
            samples = self._held().copy()
        own = {"_samples": samples, "_positions": [*self._positions]}
        return {**vars(self), **own, "_window": None, "_window_of": None, "_in_window": False, "_last": None}

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

    def _here(self) -> AbstractContextManager[Any]:
        """A context in which the weight's GPU, if it is on one, is CuPy's current GPU."""
        return runtime.current_device_of(self._weight.array)

    def _outputs(self, samples: Any, position: Position, count: int, out: Any | None = None) -> Any:
        """The next `count` outputs from these samples, written to `out` if it is given."""
        slots, _, length = samples.shape
        if count == 0:
            return self._empty(self._output_shape(slots, 0), self._output_dtype) if out is None else out
        settings = self._settings(length, position, count)
        return self._call(samples, self._weight, self._bias, *settings, **self._keywords, out=out)

    def _join(self, held: Any, x: Any) -> Any:
        """The held samples followed by the new ones; x itself if none are held."""
        if x.shape[-1] == 0:
            return held
        x = runtime.aligned(x)
        return runtime.array_module(x).concatenate((held, x), axis=-1) if held.shape[-1] else x

    def _held(self) -> Any:
        """The samples of all slots."""
        return cast(Window, self._window).samples() if self._in_window else self._samples

    def _enter_window(self, kind: tuple[Any, ...], input: Any, position: Position, count: int, out: Any | None) -> Any:
        """A push of a kind that repeats."""
        if not self._in_window:
            self._refuse_capture()
        if self._window_of != kind:
            self._window, self._window_of = self._new_window(input, position, count, out), kind
        window = cast(Window, self._window)
        if not self._in_window:
            window.fill(self._samples[..., : position.held])
            self._in_window = True
        return window.push(input, out)

    def _new_window(self, input: Any, position: Position, count: int, out: Any | None) -> Window:
        shape = (self.slots, self._channels, position.held + input.shape[-1])
        settings = self._settings(shape[-1], position, count)
        problem = getattr(ConvProblem, self.op)(
            ArraySpec(shape, input.dtype), self._weight, self._bias, *settings, precision=self._keywords["precision"]
        )
        fused = Fused.check(self.op, self._keywords["activation"], self._keywords["input_activation"])
        call, weight, bias, keywords = self._call, self._weight, self._bias, self._keywords
        others = tuple(array for array in (bias, *fused.arrays) if array is not None)
        return window_for(
            problem.fused(fused), input, weight, others, out, keywords["algorithm"],
            lambda samples, out: call(samples, weight, bias, *settings, **keywords, out=out),
        )  # fmt: skip

    def _refuse_capture(self) -> None:
        """Refuse, during capture, what changes the position: the launches of a graph change nothing on the host."""
        if runtime.is_cupy_array(self._weight.array):
            what = f"stream.{type(self).__name__}: only a push that has repeated can be made"
            runtime.refuse_during_capture(what, self._weight.array.data.device_id)

    def _leave_window(self) -> None:
        self._refuse_capture()
        if self._in_window:
            self._samples, self._in_window = self._held(), False
        self._last = None

    def _empty(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        """A new array on the weight's device, in the weight's dtype if none is given."""
        return runtime.empty_beside(self._weight.array, shape, self._weight.dtype if dtype is None else dtype)

    def _chosen(self, caller: str, slots: Sequence[SupportsIndex] | None) -> list[int]:
        if slots is None:
            return list(range(self.slots))
        try:
            chosen = [operator.index(slot) for slot in slots]
        except TypeError:
            raise TypeError(f"{caller}: slots must be a sequence of ints, got {shown(slots)}") from None
        if not all(0 <= slot < self.slots for slot in chosen) or len(set(chosen)) < len(chosen):
            raise ValueError(f"{caller}: slots must be from 0 to {self.slots - 1}, each once, got {chosen}")
        return chosen

    def _common(self, caller: str, chosen: list[int]) -> Position:
        """The common position of these slots."""
        positions = {self._positions[slot] for slot in chosen}
        if len(positions) > 1:
            raise ValueError(f"{caller}: slots {chosen} are at different positions; push them in separate calls")
        return next(iter(positions), self._start())

    def _keep(self, chosen: list[int] | None, samples: Any, position: Position) -> None:
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
