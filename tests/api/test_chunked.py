"""gpuconv.chunked beside one call on the whole: random problems, kills, journals, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import chunked, reference
from gpuconv.edge import PADDING_MODES
from gpuconv.fusion import Fused
from gpuconv.journal import Journal, JournalError
from gpuconv.problem import ConvProblem, Op, numpy_dtype

COUNT = 150  # random problems
Array = np.ndarray[Any, Any]


class Slices:
    """An array that gives and takes slices alone, as zarr's and h5py's do, and nothing else of NumPy's."""

    def __init__(self, array: Any) -> None:
        self.array: Array = array
        self.written = 0  # pieces
        self.largest = 0  # bytes of one slice
        self.before: dict[int, Callable[[], None]] = {}  # what happens before the n-th piece is written

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def _check(self, key: Any) -> None:
        assert len(key) == self.array.ndim
        for part, extent in zip(key, self.shape, strict=True):
            assert type(part) is slice
            assert part.step is None
            assert 0 <= part.start <= part.stop <= extent

    def __getitem__(self, key: Any) -> Array:
        self._check(key)
        block: Array = self.array[key].copy()
        self.largest = max(self.largest, block.nbytes)
        return block

    def __setitem__(self, key: Any, value: Array) -> None:
        self._check(key)
        self.before.get(self.written + 1, lambda: None)()
        self.written += 1
        self.largest = max(self.largest, value.nbytes)
        self.array[key] = value


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if dtype == "int16":
        return rng.integers(-99, 100, shape).astype(dtype)
    values = rng.standard_normal(shape)
    return np.asarray(values + 1j * rng.standard_normal(shape) if dtype[0] == "c" else values, numpy_dtype(dtype))


def random_call(
    rng: np.random.Generator, dtypes: tuple[str, ...]
) -> tuple[Op, dict[str, Array | None], dict[str, Any]]:
    """An operation, its arrays by name, and its settings; often in several channels, for tensor cores."""
    op: Op = "conv1d" if rng.random() < 0.6 else "conv_transpose1d"
    dtype = str(rng.choice(dtypes))
    stride, dilation, K = (int(rng.integers(1, n)) for n in (5, 4, 8))
    groups, C_in_g, C_out_g = (int(n) for n in ((1, 16, 16) if rng.random() < 0.25 else rng.integers(1, 4, 3)))
    span, L = dilation * (K - 1) + 1, int(rng.integers(1, 80))
    settings: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    settings["padding"] = [int(rng.integers(0, 9)), (int(rng.integers(9)), int(rng.integers(9))), "same", "valid"][
        rng.integers(4)
    ]
    if op == "conv1d":
        settings["padding"] = "causal" if rng.random() < 0.2 else settings["padding"]
        settings["padding_mode"] = str(rng.choice(PADDING_MODES))
        L += span + 9
    elif settings["padding"] != "same":
        settings["output_padding"] = int(rng.integers(max(stride, dilation)))
        L += 17
    shape = (int(rng.integers(1, 4)), groups * C_in_g, L)[int(rng.random() < 0.3) :]
    weight = (groups * C_out_g, C_in_g, K) if op == "conv1d" else (groups * C_in_g, C_out_g, K)
    is_integer = dtype == "int16"
    arrays: dict[str, Array | None] = {"input": draw(rng, shape, dtype), "weight": draw(rng, weight, dtype)}
    if dtype == "complex64" and rng.random() < 0.5:
        arrays["weight"] = draw(rng, weight, "float32")
    has_bias = rng.random() < 0.5
    arrays["bias"] = (
        draw(rng, (groups * C_out_g,), dtype).astype("int64" if is_integer else dtype) if has_bias else None
    )
    if dtype.startswith(("float", "bfloat")) and rng.random() < 0.4:
        alpha = draw(rng, (groups * C_out_g,), dtype)
        settings["activation"] = ["relu", ("leaky_relu", 0.1), ("snake", alpha)][rng.integers(3)]
        settings["input_activation"] = [None, "silu", ("snake", draw(rng, (groups * C_in_g,), dtype))][rng.integers(3)]
    return op, arrays, settings


def problem_of(op: Op, arrays: dict[str, Array | None], settings: dict[str, Any]) -> tuple[ConvProblem, Any, Any]:
    """The problem of a call, its arrays for `gpuconv.reference`, and those of what is fused."""
    x, weight, bias = arrays.values()
    assert x is not None
    assert weight is not None
    plain = {name: value for name, value in settings.items() if name != "lengths"}
    fused = Fused.take(op, plain)
    weight = weight if weight.dtype == "float32" and x.dtype != "complex64" else weight.astype(x.dtype)
    p = ConvProblem.of(op, x, weight, bias, **plain).fused(fused)
    return p, (x, weight, bias), fused.given


def random_lengths(rng: np.random.Generator, p: ConvProblem, x: Array) -> list[int]:
    """Lengths of the samples, zero among them; what lies behind them becomes NaN, or a large integer."""
    least = 0 if p.padding_mode == "zeros" else p.dilation * (p.K - 1) + 10
    lengths: list[int] = rng.choice([least, p.L_in, int(rng.integers(least, p.L_in + 1))], p.N).tolist()
    for sample, length in zip(x if p.batched else x[np.newaxis], lengths, strict=True):
        sample[:, length:] = 9999 if x.dtype.kind == "i" else np.nan
    return lengths


def is_within_bound(op: Op, arrays: dict[str, Array | None], settings: dict[str, Any], found: Array) -> bool:
    """Whether a result of the CPU is within the error bound, each sample being what a call on it alone gives."""
    if "lengths" not in settings:
        p, of_reference, fused = problem_of(op, arrays, settings)
        return bool(reference.within_bound(p, found, *of_reference, fused).all())
    x, weight, bias = arrays.values()
    assert x is not None
    assert weight is not None
    own = {name: value for name, value in settings.items() if name not in ("lengths", "residual")}
    names = ("stride", "padding", "dilation", "output_padding")
    of_lengths = {name: value for name, value in own.items() if name in names}
    lengths = settings["lengths"]
    wanted = gpuconv.output_lengths(lengths, weight.shape[2], **of_lengths, transposed=op != "conv1d").tolist()

    def row(array: Array, n: int) -> Array:
        return array[n] if x.ndim == 3 else array

    for n, (length, L_out) in enumerate(zip(lengths, wanted, strict=True)):
        y = row(found, n)
        if y[:, L_out:].any():
            return False
        alone = {"input": row(x, n)[:, :length], "weight": weight, "bias": bias}
        residual = {"residual": row(settings["residual"], n)[:, :L_out]} if "residual" in settings else {}
        if L_out and not is_within_bound(op, alone, {**own, **residual}, y[:, :L_out]):
            return False
    return True


def compare_random_calls(device: str, count: int, dtypes: tuple[str, ...]) -> None:
    """Random calls in random pieces: on a GPU with the bits of one call, on the CPU within the bound."""
    rng = np.random.default_rng(17)
    for number in range(count):
        op, arrays, settings = random_call(rng, dtypes)
        x, weight, bias = arrays.values()
        p, _, _ = problem_of(op, arrays, settings)
        out_dtype = numpy_dtype(p.dtype) if p.out_dtype is None else np.dtype(p.out_dtype)
        if out_dtype.kind != "i" and rng.random() < 0.3:
            settings["residual"] = draw(rng, p.output_shape, out_dtype.name)
        if rng.random() < 0.4:
            settings["lengths"] = random_lengths(rng, p, x)
        source, target = Slices(x), Slices(np.full(p.output_shape, 7, out_dtype))
        sources = {**settings, "residual": Slices(settings["residual"])} if "residual" in settings else settings

        call = partial(getattr(chunked, op), source, weight, bias, **sources, out=target, device=device)
        with pytest.raises(ValueError, match="for the input and the output of one position, got 1") as refused:
            call(max_bytes=1)
        least = int(str(refused.value).split("at least ")[1].split()[0])
        limit = int(least * rng.choice((1, 1.3, 3, 20)))
        assert call(max_bytes=limit) is target
        assert (2 * source.largest + target.largest) * (2 if device == "gpu" else 1) <= limit
        if device == "cpu":
            assert is_within_bound(op, arrays, settings, target.array), f"{number}: {op} {settings}"
            continue
        expected = one_call_on_a_gpu(op, (x, weight, bias), settings)
        np.testing.assert_array_equal(target.array.view(np.uint8), expected.view(np.uint8), f"{op} {settings}")


def one_call_on_a_gpu(op: Op, arrays: tuple[Any, ...], settings: dict[str, Any]) -> Array:
    import cupy

    def there(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(there, value))
        return cupy.asarray(value) if isinstance(value, np.ndarray) else value

    settings = {name: there(value) for name, value in settings.items()}
    return np.ascontiguousarray(getattr(gpuconv, op)(*map(there, arrays), **settings).get())


def test_random_problems_in_pieces() -> None:
    compare_random_calls("cpu", COUNT, ("float32", "float64", "bfloat16", "complex64", "int16"))


@pytest.mark.gpu
def test_random_problems_in_pieces_on_a_gpu(launched: list[str]) -> None:
    """Every piece has the bits of one call, on tensor cores, too."""
    compare_random_calls("gpu", 9, ("float32", "float16", "complex64"))
    assert {"conv1d_mma", "conv_transpose1d_mma"} & set(launched)
    assert len(set(launched)) > 4


def run(script: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """A script in a fresh interpreter that finds this gpuconv."""
    checkout = Path(gpuconv.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=environment, text=True, **options)


KILLED = """
import os, signal, sys
import numpy as np
from gpuconv import chunked

class Target:
    '''Kills the process half way through writing a piece, before its journal entry.'''
    def __init__(self, array): self.array, self.shape, self.dtype, self.left = array, array.shape, array.dtype, {left}
    def __getitem__(self, key): return self.array[key]
    def __setitem__(self, key, value):
        self.left -= 1
        if self.left == 0:
            self.array[key][..., : value.shape[-1] // 2] = 99
            os.kill(os.getpid(), signal.SIGKILL)
        self.array[key] = value
    def flush(self): self.array.flush()

x, w = np.load("x.npy", mmap_mode="r"), np.load("w.npy")
out = Target(np.load("out.npy", mmap_mode="r+"))
chunked.conv1d(x, w, padding="same", padding_mode="circular", out=out, max_bytes={max_bytes}, journal="journal")
print({left} - out.left)
"""


def test_a_killed_call_goes_on_where_it_was(tmp_path: Path) -> None:
    """Twice killed by SIGKILL in the middle of a piece; each piece but those two is computed once."""
    rng = np.random.default_rng(1)
    np.save(tmp_path / "x.npy", rng.standard_normal((2, 3, 1000)))
    np.save(tmp_path / "w.npy", rng.standard_normal((4, 3, 9)))
    np.save(tmp_path / "out.npy", np.zeros((2, 4, 1000)))
    x, w = np.load(tmp_path / "x.npy"), np.load(tmp_path / "w.npy")
    expected, counted = np.empty((2, 4, 1000)), []
    settings: dict[str, Any] = {"padding": "same", "padding_mode": "circular", "max_bytes": 10_000}
    chunked.conv1d(x, w, **settings, out=expected, progress=lambda *p: counted.append(p))
    total = counted[-1][1]
    for left, done in ((6, 5), (9, 13)):
        killed = run(KILLED.format(left=left, max_bytes=10_000), tmp_path)
        assert killed.wait() == -signal.SIGKILL
        assert len((tmp_path / "journal").read_text().splitlines()) == 1 + done
    assert total > 20
    text = (tmp_path / "journal").read_bytes()
    # Of another call, and a damaged one: refused, and nothing is changed.
    before = np.load(tmp_path / "out.npy")
    out = np.load(tmp_path / "out.npy", mmap_mode="r+")
    for weight, limit, version in ((w + 1, 10_000, ""), (w, 12_000, ""), (w, 10_000, "other")):
        with pytest.raises(JournalError, match=r"is of another call .*; delete it to begin anew"):
            chunked.conv1d(x, weight, **{**settings, "max_bytes": limit}, out=out, version=version,
                           journal=tmp_path / "journal")  # fmt: skip
    for damaged, words in (
        (text.replace(b"\n3 ", b"\n4 "), "is damaged in line 5; delete it"),
        (text[:100] + b"?" + text[101:], "is damaged in line 2; delete it"),
        (b"\x93NUMPY" + text, "is no journal of gpuconv; delete it"),
        (b"hello", "is no journal of gpuconv; delete it"),
    ):
        (tmp_path / "journal").write_bytes(damaged)
        with pytest.raises(JournalError, match=words):
            chunked.conv1d(x, w, **settings, out=out, journal=tmp_path / "journal")
        assert (tmp_path / "journal").read_bytes() == damaged
    with Journal(tmp_path / "used", "00"), pytest.raises(JournalError, match="in use by another process"):
        Journal(tmp_path / "used", "00")
    assert not (tmp_path / "used").exists()
    np.testing.assert_array_equal(out, before)
    # A last line that a kill has cut counts for nothing, and neither does a piece that is no longer in the target.
    (tmp_path / "journal").write_bytes(text[:-5])
    out[0, :, :10] = 7
    counter = Slices(out)
    chunked.conv1d(x, w, **settings, out=counter, journal=tmp_path / "journal")
    assert counter.written == total - 13 + 2
    np.testing.assert_array_equal(out, expected)
    assert not (tmp_path / "journal").exists()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    x, w = np.ones((2, 3, 100)), np.ones((4, 3, 9))
    out = np.zeros((2, 4, 92))

    def refusal(kind: type[Exception], **changed: Any) -> str:
        given = {"source": x, "weight": w, "out": out, "journal": tmp_path / "journal", **changed}
        with pytest.raises(kind) as refused:
            chunked.conv1d(**given)
        assert not (tmp_path / "journal").exists()
        assert not out.any()
        return str(refused.value)

    assert refusal(ValueError, max_bytes=0) == "conv1d: max_bytes must be at least 1, got 0"
    assert refusal(TypeError, max_bytes=1e6) == "conv1d: max_bytes must be a number of bytes, got float 1000000.0"
    assert refusal(ValueError, max_bytes=463) == (
        "conv1d: max_bytes must be at least 464 for the input and the output of one position, got 463"
    )
    assert refusal(ValueError, device="tpu") == "conv1d: device must be one of cpu, gpu, got 'tpu'"
    assert refusal(TypeError, source=[1.0]) == "conv1d: source must have a shape, a dtype and slices, got list"
    assert refusal(TypeError, out=1.0) == "conv1d: out must have a shape, a dtype and slices, got float"
    assert refusal(TypeError, journal=1) == "conv1d: journal must be a path or None, got int"
    assert refusal(ValueError, out=out[:1]) == "conv1d: out must have shape (2, 4, 92), got (1, 4, 92)"
    assert refusal(TypeError, out=out.astype("f4")) == "conv1d: out must have dtype float64, got float32"
    read_only = out.view()
    read_only.flags.writeable = False
    assert refusal(ValueError, out=read_only) == "conv1d: out must be writeable, got a read-only array"
    same = np.ones((2, 4, 100))
    assert refusal(ValueError, source=same[:, :3], out=same[..., :92]) == (
        "conv1d: out must not overlap source, but they share memory"
    )
    assert refusal(ValueError, weight=same[0, :, :27].reshape(4, 3, 9), out=same[..., :92]) == (
        "conv1d: out must not overlap weight, but they share memory"
    )
    assert refusal(ValueError, out=np.broadcast_to(same[:1, :1, :92], (2, 4, 92))).startswith(
        "conv1d: out must not overlap itself, got strides (0, 0, 8)"
    )
    assert refusal(ValueError, algorithm="nothing").startswith("conv1d: algorithm must be None or one of base, ")
    assert refusal(TypeError, weight=w.tolist()).startswith("conv1d: weight must be a NumPy or CuPy array, got list")
    lengths = "conv1d: lengths must be from 0 to L_in = 100, got lengths[1] = 101"
    assert refusal(ValueError, lengths=[5, 101]) == lengths
    assert refusal(ValueError, lengths=[5]) == "conv1d: lengths must have shape (N,) = (2,), got (1,)"
    assert refusal(TypeError, lengths=[5.0, 5]) == "conv1d: lengths[0] must be an int, got float 5.0"
    assert refusal(ValueError, residual=np.ones((2, 4, 91))).startswith("conv1d: residual must have shape (2, 4, 92)")


def test_an_error_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    """A source that changes its length, and a full disk: the finished pieces stay, and the same call goes on."""
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((1, 1, 1000)), rng.standard_normal((1, 1, 9))
    source, target = Slices(x), Slices(np.zeros((1, 1, 992)))
    call: dict[str, Any] = {"out": target, "max_bytes": 4000, "journal": tmp_path / "journal"}

    def change(length: int) -> None:
        source.array = x[..., :length]

    target.before = {3: lambda: change(900)}
    with pytest.raises(
        ValueError, match=r"^conv1d: source has changed: it had shape \(1, 1, 1000\), and now \(1, 1, 9"
    ):
        chunked.conv1d(source, w, **call)
    change(1000)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    target.before = {4: fail}
    with pytest.raises(OSError, match="No space left"):
        chunked.conv1d(source, w, **call)
    assert len((tmp_path / "journal").read_text().splitlines()) == 1 + 3
    target.before = {}
    chunked.conv1d(source, w, **call)
    assert target.written == 8  # each of the pieces once
    whole = np.empty((1, 1, 992))
    np.testing.assert_array_equal(target.array, chunked.conv1d(x, w, out=whole, max_bytes=4000))


def test_a_call_with_lengths_goes_on_where_it_was(tmp_path: Path) -> None:
    """Samples may have no input, or end long before their last pieces. Other lengths make another call."""
    rng = np.random.default_rng(3)
    x, w, b = rng.standard_normal((4, 2, 200)), rng.standard_normal((2, 3, 150)), rng.standard_normal(3)
    settings: dict[str, Any] = {"stride": 3, "padding": (4, 2), "output_size": 742}
    lengths = [200, 0, 31, 1]
    expected = gpuconv.conv_transpose1d(x, w, b, **settings, lengths=lengths)
    assert expected[1].any()  # the bias, in the outputs that the kernel alone would reach
    target = Slices(np.full(expected.shape, np.nan))
    call = partial(
        chunked.conv_transpose1d, x, w, b, **settings, out=target, max_bytes=9000, journal=tmp_path / "journal"
    )

    def fail() -> None:
        raise OSError(28, "No space left on device")

    target.before = {12: fail}
    with pytest.raises(OSError, match="No space left"):
        call(lengths=lengths)
    target.before = {}
    for other in ([200, 0, 31, 2], None):
        with pytest.raises(JournalError, match=r"is of another call"):
            call(lengths=other)
    totals = []
    call(lengths=np.array(lengths, np.int32), progress=lambda _, total, __: totals.append(total))
    np.testing.assert_allclose(target.array, expected, rtol=1e-12, atol=1e-12)
    assert target.written == totals[0] > 24  # each of the pieces once
    assert not (tmp_path / "journal").exists()


def test_memory_stays_below_a_limit(tmp_path: Path) -> None:
    """A file of 300 MB from the command line takes little more than max_bytes."""
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (3, 1, 25_000_000))  # type: ignore[no-untyped-call]
    file[1, 0, 7_000_000] = 1  # the rest of the file takes no room
    del file
    np.save(tmp_path / "w.npy", np.ones((1, 1, 5), np.float32))
    script = """
import resource, sys
from gpuconv.cli import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
main("conv1d x.npy w.npy y.npy --padding same --device cpu --max-bytes 24000000".split())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = run(script, tmp_path, stdout=subprocess.PIPE)
    last = done.communicate()[0].splitlines()[-1]
    assert int(last) < 90_000  # KiB
    y = np.load(tmp_path / "y.npy", mmap_mode="r")
    assert y[1, 0, 6_999_990:7_000_010].tolist() == [0.0] * 8 + [1.0] * 5 + [0.0] * 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.npy", "x.npy", "y.npy"]
