""".npy files in pieces: slices of files, and what is left, and goes on, behind a kill, a full disk, a changed file."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import chunked, npy
from gpuconv.cli import main
from gpuconv.files import FileError
from gpuconv.problem import numpy_dtype

Array = np.ndarray[Any, Any]
PIECES = ["--padding", "same", "--device", "cpu", "--max-bytes", "20000"]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def expected() -> Array:
    """The result for x.npy and w.npy, which are there."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((2, 3, 2000)), rng.standard_normal((4, 3, 9))
    np.save("x.npy", x)
    np.save("w.npy", w)
    return gpuconv.conv1d(x, w, padding="same")


def leftovers() -> list[str]:
    return sorted(name[-8:] for name in os.listdir() if name.startswith(".gpuconv-"))


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main([*argv]) == 2
    return capsys.readouterr().err.replace("gpuconv: error: ", "").strip()


def test_slices_of_files_are_those_of_arrays() -> None:
    rng = np.random.default_rng(4)
    for number in range(100):
        shape = tuple(int(extent) for extent in rng.integers(0, 7, rng.integers(2, 4)))
        dtype = str(rng.choice(("float32", "float64", "complex64", "bfloat16", ">f8", "int16")))
        plain = numpy_dtype(dtype) if dtype == "bfloat16" else np.dtype(dtype)
        array = rng.integers(0, 100, shape).astype(plain)
        np.save("a.npy", array)
        cuts = [sorted(int(i) for i in rng.integers(0, extent + 1, 2)) for extent in shape]
        key = tuple(slice(*cut) for cut in cuts)
        to = "bfloat16" if dtype == "bfloat16" else "float32" if dtype == "int16" else None
        with npy.open_npy("a.npy", to) as file:
            assert file is not None
            found = file[key]
            assert found.dtype == file.dtype == (numpy_dtype(to) if to else plain.newbyteorder("="))
            np.testing.assert_array_equal(found, array[key].astype(found.dtype))
        with npy.resumable_npy(f"{number}.npy", shape, found.dtype, force=False) as (target, _):
            target[key] = found
        whole = np.zeros(shape, found.dtype)
        whole[key] = found
        np.save("b.npy", whole)
        assert Path(f"{number}.npy").read_bytes() == Path("b.npy").read_bytes()
    np.save("a.npy", np.asfortranarray(np.ones((3, 4))))
    with npy.open_npy("a.npy", None) as file:
        assert file is None
    assert leftovers() == []


@pytest.mark.parametrize("order", ["C", "F"])
def test_pieces_give_the_file_of_one_call(order: Any, expected: Array, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("x.npy", np.asarray(np.load("x.npy"), order=order))
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", *PIECES]) == 0
    assert capsys.readouterr().out == "y.npy: (2, 4, 2000) float64, computed on the CPU\n"
    np.testing.assert_allclose(np.load("y.npy"), expected, rtol=0, atol=1e-13)
    assert leftovers() == []
    exists = "y.npy: exists; give --force to replace it"
    assert error_of(capsys, "conv1d", "x.npy", "w.npy", "y.npy", *PIECES) == exists
    options = ["--stride", "3", "--activation", "relu", "--dtype", "float32", "--force", *PIECES[2:]]
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", *options]) == 0
    x, w = (np.load(name).astype("f4") for name in ("x.npy", "w.npy"))
    whole = gpuconv.conv1d(x, w, stride=3, activation="relu")
    np.testing.assert_allclose(np.load("y.npy"), whole, rtol=0, atol=1e-5)
    words = "--max-bytes is for a .npy file as IN and as OUT"
    assert error_of(capsys, "conv1d", "x.npy", "w.npy", "-", *PIECES) == words


def test_a_full_disk_loses_nothing(expected: Array, capsys: pytest.CaptureFixture[str]) -> None:
    """The work so far stays beside OUT, is refused to other calls, and the same command goes on with it."""
    script = (
        "import resource, sys\nfrom gpuconv.cli import main\nfrom gpuconv import journal\n"
        "add = journal.Journal.add\n"
        "def full(self, piece, checksum):\n"
        "    add(self, piece, checksum)\n"
        "    if piece == 5: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "journal.Journal.add = full\nsys.exit(main(sys.argv[1:]))"
    )
    command = ["conv1d", "x.npy", "w.npy", "y.npy", *PIECES]
    environment = {**os.environ, "PYTHONPATH": str(Path(gpuconv.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "gpuconv: note: y.npy: the finished pieces are kept; the same command continues with them\n"
        "gpuconv: error: y.npy: cannot be written: File too large\n"
    )
    assert len(leftovers()) == 2
    assert not Path("y.npy").exists()
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    for other in (["--dilation", "2"], ["--max-bytes", "30000"]):
        assert "is of another call" in error_of(capsys, *command, *other)
    assert "is unfinished work of another call; delete it" in error_of(capsys, *command, "--stride", "2")
    time = os.stat("x.npy").st_mtime_ns
    os.utime("x.npy", ns=(1, 1))
    assert "is of another call" in error_of(capsys, *command)
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before
    os.utime("x.npy", ns=(time, time))
    assert main(command) == 0
    assert capsys.readouterr().err == "gpuconv: note: y.npy: continues the work of an earlier call\n"
    np.testing.assert_allclose(np.load("y.npy"), expected, rtol=0, atol=1e-13)
    assert leftovers() == []


@pytest.mark.usefixtures("expected")
def test_a_file_that_changes_is_refused() -> None:
    key = (slice(0, 2), slice(0, 3), slice(5, 2000))
    with npy.open_npy("x.npy", None) as file:
        assert file is not None
        with open("x.npy", "ab") as other:
            other.write(b"more")
        with pytest.raises(FileError, match=r"^x.npy: has changed while it was read$"):
            file[key]
        os.truncate("x.npy", 1000)
        with pytest.raises(FileError, match=r"^x.npy: has become shorter while it was read$"):
            file[key]


@pytest.mark.usefixtures("expected")
def test_an_unfinished_file_is_never_the_old_one() -> None:
    """A kill between the two names of a finished file leaves both; the next call must not write into the old file."""
    command = ["conv1d", "x.npy", "w.npy", "y.npy", *PIECES]
    assert main(command) == 0
    old = np.load("y.npy")

    def fail(*, touch: bool) -> None:
        with npy.resumable_npy("y.npy", (1,), np.dtype("f4"), force=True) as (_, journal):
            if touch:
                journal.touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(touch=True)
    assert len(leftovers()) == 2
    (journal, part) = sorted(name for name in os.listdir() if name.startswith(".gpuconv-"))
    os.unlink(journal)
    os.unlink(part)
    os.link("y.npy", part)
    with pytest.raises(RuntimeError):
        fail(touch=False)
    np.testing.assert_array_equal(np.load("y.npy"), old)
    assert leftovers() == []
    words = r"exists; give --force to replace it \(the complete result is in .*\.part\)$"
    with (
        pytest.raises(FileError, match=words),
        npy.resumable_npy("y.npy", (1,), np.dtype("f4"), force=False),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.usefixtures("cupy")
def test_pieces_on_a_gpu_give_the_bits_of_one_call() -> None:
    """One layer on CUDA cores: the command line, with and without pieces, and a call that a full disk interrupts."""
    rng = np.random.default_rng(5)
    x, w = (rng.standard_normal(shape).astype("f4") for shape in ((2, 3, 2000), (4, 3, 9)))
    np.save("x.npy", x)
    np.save("w.npy", w)
    options = ["--padding", "same", "--device", "gpu"]
    assert main(["conv1d", "x.npy", "w.npy", "whole.npy", *options]) == 0
    assert main(["conv1d", "x.npy", "w.npy", "y.npy", *options, "--max-bytes", "20000"]) == 0
    assert Path("y.npy").read_bytes() == Path("whole.npy").read_bytes()
    out, pieces = np.zeros((2, 4, 2000), np.float32), []

    def fill_the_disk(done: int, *_: Any) -> None:
        pieces.append(done)
        if len(pieces) == 5:
            raise OSError(28, "No space left on device")

    call = partial(chunked.conv1d, x, w, padding="same", max_bytes=20_000, device="gpu", journal="journal", out=out)
    with pytest.raises(OSError, match="No space left"):
        call(progress=fill_the_disk)
    assert len(Path("journal").read_text().splitlines()) == 1 + 3  # one piece was being computed
    width = np.count_nonzero(out[0].all(axis=0)) // 3
    whole = np.load("whole.npy")
    entries = Path("journal").read_bytes()
    call(progress=fill_the_disk)
    np.testing.assert_array_equal(out, whole)
    # Of the pieces that the journal lists, the second one is still in the target.
    Path("journal").write_bytes(entries)
    kept = out[0, :, width : 2 * width].copy()
    out[...] = 0
    out[0, :, width : 2 * width] = kept
    call(progress=fill_the_disk)
    np.testing.assert_array_equal(out, whole)
    assert not Path("journal").exists()
