"""Reading and writing of `.npy` and `.wav` files: the numbers, every refusal, and that nothing is ever half written."""

from __future__ import annotations

import errno
import io
import os
import stat
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import soundfile

from gpuconv import files
from gpuconv.files import FileError
from gpuconv.problem import DTYPES, numpy_dtype
from gpuconv.text import install_hint


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def samples(channels: int, length: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(0.0, 3.0, (channels, length)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_npy_keeps_every_dtype(tmp_path: Path, dtype: str) -> None:
    array = samples(3, 7).astype(numpy_dtype(dtype))
    files.write(tmp_path / "a.npy", array)
    found, rate, _ = files.read(tmp_path / "a.npy", dtype if dtype == "bfloat16" else None)
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()
    assert rate is None


def test_npy_reads_fortran_order_and_foreign_byte_order(tmp_path: Path) -> None:
    array = samples(4, 9)
    np.save(tmp_path / "a.npy", np.asfortranarray(array).astype(">f4"))
    found = files.read(tmp_path / "a.npy").array
    assert found.dtype == np.float32
    assert found.dtype.isnative
    assert np.array_equal(found, array)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_every_version(tmp_path: Path, version: tuple[int, int]) -> None:
    array = samples(2, 5)
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, array, version=version)
    assert np.array_equal(files.read(tmp_path / "a.npy").array, array)


def test_conversion(tmp_path: Path) -> None:
    np.save(tmp_path / "int.npy", np.array([[1, -2, 300]], np.int16))
    assert files.read(tmp_path / "int.npy", "complex64").array.tolist() == [[1, -2, 300]]
    np.save(tmp_path / "wide.npy", np.array([[1.0, 1e300]]))
    assert files.read(tmp_path / "wide.npy", "float16").array.tolist() == [[1.0, np.inf]]
    np.save(tmp_path / "single.npy", np.array([[1.5, 257.0]], np.float32))
    assert files.read(tmp_path / "single.npy", "bfloat16").array.dtype == ml_dtypes.bfloat16


def test_wav_keeps_floats_beyond_full_scale_and_the_rate(tmp_path: Path) -> None:
    array = samples(2, 1000)
    assert np.abs(array).max() > 1
    files.write(tmp_path / "a.wav", array, 44100)
    assert soundfile.info(tmp_path / "a.wav").subtype == "FLOAT"
    found, rate, _ = files.read(tmp_path / "a.WAV" if (tmp_path / "a.WAV").exists() else tmp_path / "a.wav")
    assert rate == 44100
    assert found.dtype == np.float32
    assert np.array_equal(found, array)


def test_wav_takes_a_batch_of_one_and_every_real_dtype(tmp_path: Path) -> None:
    array = np.array([[[0.5, -2.0, 0.25]]])
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        files.write(tmp_path / "a.wav", array.astype(numpy_dtype(dtype)), 8000, force=True)
        assert files.read(tmp_path / "a.wav").array.tolist() == [[0.5, -2.0, 0.25]]


def test_wav_of_integers_is_scaled_and_keeps_its_precision_in_float64(tmp_path: Path) -> None:
    codes = np.array([[-(2**31), 2**31 - 1, 1, -12345]], np.int32)
    soundfile.write(tmp_path / "a.wav", codes.T, 8000, subtype="PCM_32")
    wide = files.read(tmp_path / "a.wav", "float64").array
    assert np.array_equal(wide, codes / 2.0**31)
    assert np.array_equal(files.read(tmp_path / "a.wav").array, (codes / 2.0**31).astype(np.float32))


def test_wav_written_to_a_pipe_has_no_length_and_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples(1, 50).T, 8000, format="WAV", subtype="FLOAT")
    data = bytearray(buffer.getvalue())
    data[4:8] = struct.pack("<I", 2**32 - 1)
    (tmp_path / "a.wav").write_bytes(data)
    assert np.array_equal(files.read(tmp_path / "a.wav").array, samples(1, 50))


def npy_bytes(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def npy_with_header(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 16


def npy_of(descr: Any, shape: tuple[Any, ...]) -> bytes:
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode().ljust(501) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 16


def wav_bytes() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples(1, 100).T, 8000, format="WAV")
    return buffer.getvalue()


BAD_FILES = {
    "empty": ("a.npy", b"", "is empty"),
    "empty_wav": ("a.wav", b"", "is empty"),
    "text": ("a.npy", b"1 2 3\n", "is not a .npy file"),
    "bool_in_shape": ("a.npy", npy_of("<f4", (True, 4)), "is damaged: its header declares the shape (True, 4)"),
    "sub_array": ("a.npy", npy_of(("<f4", (2,)), (1, 4)), "expected one of float16, bfloat16"),
    "huge_shape": ("a.npy", npy_of("<f4", (10**30, 4)), "is truncated: 16000000000000000000000000000000 bytes"),
    "huge_shape_of_nothing": ("a.npy", npy_of("|V0", (10**30,)), "is damaged: its header declares the shape"),
    "zero_times_huge": ("a.npy", npy_of("<f4", (0, 10**30)), "is damaged: its header declares the shape"),
    "too_many_axes": ("a.npy", npy_of("<f4", (1,) * 70), "is damaged: its header declares the shape (1, 1, "),
    "float_in_shape": ("a.npy", npy_of("<f4", (1.0, 4)), "is damaged: its header cannot be read"),
    "bad_dtype": ("a.npy", npy_of("<q7", (1, 4)), "is damaged: its header cannot be read"),
    "dates": ("a.npy", npy_of("<M8[s]", (1, 2)), "has dtype datetime64[s], expected one of float16"),
    "not_a_dict": ("a.npy", npy_with_header("[1, 2]"), "is damaged: its header cannot be read"),
    "deep": ("a.npy", npy_with_header("(" * 100 + ")" * 10), "is damaged: its header cannot be read"),
    "npz": ("a.npy", b"PK\x03\x04rest", "is not a .npy file"),
    "pickle": ("a.npy", b"\x80\x04\x95rest", "is not a .npy file"),
    "magic_alone": ("a.npy", b"\x93NUMPY", "is damaged: its header cannot be read"),
    "header_cut": ("a.npy", npy_bytes(np.ones(3))[:40], "is damaged: its header cannot be read"),
    "header_garbled": ("a.npy", npy_with_header("{'descr': '<f4', 'shape'"), "is damaged: its header cannot be read"),
    "header_open": (
        "a.npy",
        npy_with_header("{'descr': '<f4', 'shape': (1,"),
        "is damaged: its header cannot be read (",
    ),
    "header_not_a_literal": ("a.npy", npy_with_header("{'descr': open('x')}"), "is damaged: its header cannot be read"),
    "version_9": ("a.npy", b"\x93NUMPY\x09\x00" + b"\0" * 100, "is a .npy file of version 9.0"),
    "negative_shape": (
        "a.npy",
        npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }"),
        "is damaged: its header declares the shape (-1, 4)",
    ),
    "monstrous_shape": (
        "a.npy",
        npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000), }"),
        "is truncated: 4000000000000000000 bytes of data expected for shape (1000000, 1000000, 1000000), 16 found",
    ),
    "truncated": ("a.npy", npy_bytes(np.ones((3, 4)))[:-1], "is truncated: 96 bytes of data expected"),
    "objects": ("a.npy", npy_bytes(np.array([{}, 1]), allow_pickle=True), "holds pickled Python objects"),
    "integers": ("a.npy", npy_bytes(np.ones((1, 3), np.uint32)), "has dtype uint32, expected one of float16, bfloat16"),
    "booleans": ("a.npy", npy_bytes(np.ones((1, 3), bool)), "has dtype bool, expected one of float16"),
    "strings": ("a.npy", npy_bytes(np.array(["a", "b"])), "has dtype <U1, expected one of float16"),
    "raw_values": ("a.npy", npy_bytes(np.ones(3, "V2")), "if they are bfloat16, give --dtype bfloat16"),
    "structured": ("a.npy", npy_bytes(np.ones(3, "i1,i1")), "expected one of float16"),
    "not_wav": ("a.wav", b"this is no sound, only a text", "is not a .wav file that libsndfile can read"),
    "truncated_wav": ("a.wav", wav_bytes()[:-20], "is truncated: its header declares"),
    "extension": ("a.mp3", b"ID3", "the name must end in .npy or .wav"),
    "no_extension": ("a", b"1", "the name must end in .npy or .wav"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(tmp_path: Path, name: str) -> None:
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(FileError) as caught:
        files.read(tmp_path / file)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / file}: ")
    assert message in text
    assert "\n" not in text
    assert "((" not in text  # the tuple of a tokenizer's error


def test_only_numbers_are_advised_to_convert(tmp_path: Path) -> None:
    np.save(tmp_path / "int.npy", np.ones(3, np.uint32))
    with pytest.raises(FileError, match=r"give --dtype to convert$"):
        files.read(tmp_path / "int.npy")
    np.save(tmp_path / "text.npy", np.array(["a"]))
    with pytest.raises(FileError, match=r"int64$"):
        files.read(tmp_path / "text.npy")


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.array(["a"]), "float32", "has dtype <U1, which does not convert to float32"),
        (np.array([True]), "float32", "has dtype bool, which does not convert to float32"),
        (np.array([1j]), "float64", "has dtype complex128; converting it to float64 would lose the imaginary part"),
    ],
)
def test_a_conversion_that_loses_the_data_is_refused(
    tmp_path: Path, array: np.ndarray[Any, Any], dtype: str, message: str
) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(FileError, match=message):
        files.read(tmp_path / "a.npy", dtype)


def test_what_is_no_readable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileError, match=r"does not exist$"):
        files.read(tmp_path / "a.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(FileError, match=r"is a directory$"):
        files.read(tmp_path / "folder.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(FileError, match=r"is not a regular file$"):
        files.read(tmp_path / "pipe.npy")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot be read: Not a directory$"):
        files.read(tmp_path / "file" / "a.npy")
    np.save(tmp_path / "a.npy", np.ones(3))

    def refuse(path: Any, *_: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(FileError, match=r"cannot be read: Permission denied$"):
        files.read(tmp_path / "a.npy")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(tmp_path / "a.wav", samples(1, 5), 8000)
    np.save(tmp_path / "a.npy", np.ones(3))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(FileError) as caught:
        files.read(tmp_path / "a.wav")
    assert str(caught.value).endswith(f"need the soundfile package: {install_hint('audio')}")
    files.write(tmp_path / "b.wav", samples(1, 5), 8000)  # needs none
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(FileError, match=r"ml_dtypes: pip install -e '.\[bf16\]' in a checkout"):
        files.read(tmp_path / "a.npy", "bfloat16")


def test_an_output_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(name: str, *, force: bool = False, sources: dict[str, Path] | None = None) -> str:
        with pytest.raises(FileError) as caught:
            files.check_output(tmp_path / name, sources or {}, force=force)
        return str(caught.value).removeprefix(f"{tmp_path / name}: ")

    assert refusal("out.txt") == "the name must end in .npy or .wav"
    assert refusal("none/out.npy") == f"the folder {tmp_path / 'none'} does not exist"
    (tmp_path / "folder.npy").mkdir()
    assert refusal("folder.npy", force=True) == "is a directory"
    os.mkfifo(tmp_path / "pipe.npy")
    assert refusal("pipe.npy", force=True) == "is not a regular file"
    (tmp_path / "a.npy").write_text("old")
    assert refusal("a.npy") == "exists; give --force to replace it"
    (tmp_path / "link.npy").hardlink_to(tmp_path / "a.npy")
    sources = {"input": tmp_path / "missing.npy", "weight": tmp_path / "link.npy"}
    assert refusal("a.npy", sources=sources) == "is the weight file itself; give --force to replace it"
    files.check_output(tmp_path / "a.npy", sources, force=True)
    files.check_output(tmp_path / "new.npy", sources, force=False)
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    assert refusal("new.npy") == f"the folder {tmp_path} is not writable"


@pytest.mark.parametrize(
    ("array", "rate", "message"),
    [
        (np.zeros((2, 10), np.float32), None, "a .wav file needs a sample rate"),
        (np.zeros((2, 10), np.float32), 2**31, "the sample rate must be from 1 to 2147483647 Hz, got 2147483648"),
        (np.zeros((2, 10), np.complex64), 8000, "holds real samples, the output is complex64"),
        (np.zeros((2, 3, 10), np.float32), 8000, r"holds \(channels, samples\), the output is \(2, 3, 10\)"),
        (np.zeros(10, np.float32), 8000, r"holds \(channels, samples\), the output is \(10,\)"),
        (np.zeros((0, 10), np.float32), 8000, "holds 1 to 1024 channels, the output has 0"),
        (np.zeros((1025, 1), np.float32), 8000, "holds 1 to 1024 channels, the output has 1025"),
        (np.broadcast_to(np.float32(0), (1, 2**30)), 8000, "ends at 4 GiB, the output is larger"),
    ],
)
def test_what_a_wav_file_cannot_hold_is_refused(
    tmp_path: Path, array: np.ndarray[Any, Any], rate: int | None, message: str
) -> None:
    with pytest.raises(FileError, match=message):
        files.write(tmp_path / "a.wav", array, rate)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_leaves_nothing_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, force: bool
) -> None:
    if force:
        (tmp_path / "a.npy").write_text("old")

    def fail_half_way(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(np.lib.format, "write_array", fail_half_way)
    expected = FileError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        files.write(tmp_path / "a.npy", samples(2, 5), force=force)
    if expected is FileError:
        assert str(caught.value) == f"{tmp_path / 'a.npy'}: cannot be written: No space left on device"
    assert leftovers(tmp_path) == (["a.npy"] if force else [])
    if force:
        assert (tmp_path / "a.npy").read_text() == "old"


def test_the_file_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = os.link

    def look(source: Any, target: Any) -> None:
        seen.append(leftovers(tmp_path))
        assert np.array_equal(np.load(source), samples(2, 5))
        real(source, target)

    monkeypatch.setattr(files.os, "link", look)
    files.write(tmp_path / "a.npy", samples(2, 5))
    assert len(seen) == 1
    assert "a.npy" not in seen[0]
    assert leftovers(tmp_path) == ["a.npy"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    real = np.lib.format.write_array

    def write_while_another_does(file: Any, array: Any, **options: Any) -> None:
        real(file, array, **options)
        (tmp_path / "a.npy").write_text("another's")

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(np.lib.format, "write_array", write_while_another_does)
    if not hard_links:
        monkeypatch.setattr(files.os, "link", refuse)
    with pytest.raises(FileError, match="exists; give --force to replace it"):
        files.write(tmp_path / "a.npy", samples(2, 5))
    assert (tmp_path / "a.npy").read_text() == "another's"
    assert leftovers(tmp_path) == ["a.npy"]


def test_without_hard_links_files_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    files.write(tmp_path / "a.npy", samples(2, 5))
    assert np.array_equal(np.load(tmp_path / "a.npy"), samples(2, 5))
    assert leftovers(tmp_path) == ["a.npy"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("force", [False, True])
def test_permissions_are_those_of_a_fresh_or_of_the_replaced_file(tmp_path: Path, umask: int, force: bool) -> None:
    if force:
        (tmp_path / "a.npy").write_text("old")
        (tmp_path / "a.npy").chmod(0o600)
    previous = os.umask(umask)
    try:
        files.write(tmp_path / "a.npy", samples(1, 5), force=force)
    finally:
        os.umask(previous)
    mode = 0o600 if force else 0o666 & ~umask  # force keeps the permissions of the file that it replaces
    assert stat.S_IMODE((tmp_path / "a.npy").stat().st_mode) == mode


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a.npy").symlink_to(tmp_path / "real" / "b.npy")
    files.write(tmp_path / "a.npy", samples(1, 5))
    assert (tmp_path / "a.npy").is_symlink()
    assert np.array_equal(np.load(tmp_path / "real" / "b.npy"), samples(1, 5))
    with pytest.raises(FileError, match="exists; give --force"):
        files.check_output(tmp_path / "a.npy", {}, force=False)


def test_a_name_of_the_greatest_length(tmp_path: Path) -> None:
    name = "x" * 251 + ".npy"
    files.write(tmp_path / name, samples(1, 5))
    assert leftovers(tmp_path) == [name]


def test_text_is_written_whole(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.xml", "first")
    files.write_text(tmp_path / "a.xml", "zweitens: \u00e4")
    assert (tmp_path / "a.xml").read_text(encoding="utf-8") == "zweitens: \u00e4"
    with pytest.raises(FileError, match="cannot be written: No such file or directory"):
        files.write_text(tmp_path / "none" / "a.xml", "text")
    assert leftovers(tmp_path) == ["a.xml"]
