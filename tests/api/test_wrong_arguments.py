"""Values of the wrong kind for settings, words and numbers: one line that names the function, not NumPy's error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import grad, signal, sigpy, stream
from gpuconv.text import shown

X, W, G = (np.linspace(-1, 1, 120, dtype=np.float32).reshape(shape) for shape in ((2, 3, 20), (10, 3, 4), (3, 4, 10)))
TAPS = np.ones(5)
VALUES = {
    "array": X,
    "array without elements": X[:0],
    "ragged list": [1, [2]],
    "records": np.zeros(3, [("a", "f4")]),
    "long str": "a" * 5000,
    "list of an array": X.tolist(),
    "dict": {"a": 1},
    "function": len,
}

# (function, argument, call of the value)
CALLS: list[tuple[str, str, Callable[[Any], Any]]] = [
    *(
        ("conv1d", name, lambda value, name=name: gpuconv.conv1d(X, W, **{name: value}))
        for name in ("stride", "padding", "dilation", "groups", "padding_mode", "precision", "algorithm", "out_dtype")
    ),
    *(
        ("conv_transpose1d", name, lambda value, name=name: gpuconv.conv_transpose1d(X, W[:3], **{name: value}))
        for name in ("output_padding", "output_size", "padding_mode", "activation")
    ),
    ("conv1d_weight", "weight_size", lambda value: grad.conv1d_weight(X, value, X)),
    ("conv1d_weight", "weight_dtype", lambda value: grad.conv1d_weight(X, (3, 3, 1), X, weight_dtype=value)),
    ("explain", "direction", lambda value: gpuconv.explain("conv1d", X, W, direction=value)),
    ("stream.Conv1d", "algorithm", lambda value: stream.Conv1d(W, algorithm=value)),
    ("stream.ConvTranspose1d", "precision", lambda value: stream.ConvTranspose1d(W, precision=value)),
    ("convolve", "mode", lambda value: signal.convolve(TAPS, TAPS, value)),
    ("convolve", "method", lambda value: signal.convolve(TAPS, TAPS, method=value)),
    ("upfirdn", "up", lambda value: signal.upfirdn(TAPS, TAPS, value)),
    ("upfirdn", "cval", lambda value: signal.upfirdn(TAPS, TAPS, cval=value)),
    ("resample_poly", "cval", lambda value: signal.resample_poly(TAPS, 2, 3, cval=value)),
    ("resample_poly", "window", lambda value: signal.resample_poly(TAPS, 2, 3, window=("kaiser", value))),
    ("decimate_fir", "n", lambda value: signal.decimate_fir(TAPS, 2, value)),
    ("convolve", "strides", lambda value: sigpy.convolve(X, X, strides=value if value is not X else X[0])),
]


def message_of(call: Callable[[Any], Any], value: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entry", "kind"),
    list(itertools.product(CALLS, VALUES)),
    ids=lambda part: part if isinstance(part, str) else ".".join(part[:2]),
)
def test_one_line(entry: tuple[str, str, Callable[[Any], Any]], kind: str) -> None:
    function, _, call = entry
    message = message_of(call, VALUES[kind])
    assert message.startswith((f"{function}:", f"{function.removeprefix('stream.')}:"))
    assert "\n" not in message
    assert len(message) < 800


def test_windows_and_dtypes_of_filters() -> None:
    windows: tuple[Any, ...] = ((), (3,), ([],), [1, [2]], np.array(2.0), np.empty(0), [])
    for window in windows:
        message = message_of(lambda value: signal.resample_poly(TAPS, 2, 3, window=value), window)
        assert message.startswith("resample_poly: window must")
    records = np.zeros(5, [("a", "f4")])
    for call in (
        lambda x: signal.convolve(x, TAPS),
        lambda x: signal.firfilter(TAPS, x),
        lambda x: signal.resample_poly(x, 2, 3),
        lambda x: signal.resample_poly(TAPS, 2, 3, window=x),
    ):
        assert "must be of numbers, got the dtype [('a', '<f4')]" in message_of(call, records)
    assert message_of(lambda value: signal.upfirdn(TAPS, TAPS, cval=value), 1j).startswith(
        "upfirdn: cval must be a real"
    )


def test_numbers_beyond_64_bits() -> None:
    for name in ("kernel_size", "padding"):
        keywords = {"kernel_size": 3, "padding": 0, name: 2**62}
        message = message_of(lambda given: gpuconv.output_lengths([2**62], **given), keywords)
        assert message.startswith("output_lengths: dilation*(kernel_size - 1) + 1 + padding must be at most 2**61, got")
    assert gpuconv.output_lengths([2**62], 2**60, padding=2**59).tolist() == [2**62 + 1]
    assert "must be at most 2147483647" in message_of(lambda n: signal.upfirdn(TAPS, TAPS, n), 10**30)
    assert "must be at most 2147483647" in message_of(lambda n: signal.decimate_fir(TAPS, n), 10**30)


def test_a_factor_far_above_the_number_of_results_takes_no_longer() -> None:
    assert signal.upfirdn(np.array([1.0, 2.0, 3.0]), np.array([2.0]), up=2**31 - 1).tolist() == [2, 4, 6]


def test_shown_values() -> None:
    assert shown("two  blanks") == "'two  blanks'"
    assert shown((1, 2)) == "(1, 2)"
    assert shown(np.ones((2, 2))) == "array([[1., 1.], [1., 1.]])"
    assert shown("a" * 300) == f"'{'a' * 39}...{'a' * 39}' (302 characters)"


def test_what_is_no_array() -> None:
    for value in (True, 3, "x", {}, object()):
        message = message_of(lambda bias: gpuconv.explain("conv1d", X, W, bias, device="cpu"), value)
        assert message.startswith("explain: bias must be an array or an ArraySpec, got ")


@pytest.mark.parametrize("kind", [stream.Conv1d, stream.ConvTranspose1d])
def test_streams_check_their_layers(kind: Callable[..., Any]) -> None:
    """When they are made, not at the first push."""
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"algorithm": "conv2d"}, "algorithm must be None or one of base"),
        ({"precision": "float64"}, "precision must be one of"),
        ({"bias": np.ones(99, np.float32)}, "bias must have shape (C_out,)"),
        ({"bias": np.ones(10 if kind is stream.Conv1d else 3)}, "input, weight and bias must share one dtype"),
        ({"activation": ("snake", np.ones(99, np.float32))}, "activation_alpha must have"),
    )
    for keywords, says in wrong:
        message = message_of(lambda given: kind(W, **given), keywords)
        assert message.startswith(f"stream.{kind.__name__}: {says}"), message
