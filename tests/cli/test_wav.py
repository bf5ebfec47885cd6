"""Audio files with right and wrong lengths in their headers: all samples, a refusal, or a warning, never fewer samples.

A generator writes a file of every format and encoding of libsndfile and changes its length fields.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from gpuconv import files, wav
from gpuconv.files import FileError

FRAMES = 1001  # odd, so that 24-bit and 8-bit data need a pad byte
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF")
LINEAR = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
WIDTHS = dict(zip(LINEAR, (1, 1, 2, 3, 4, 4, 8, 1, 1), strict=True))


def audio(container: str, subtype: str, channels: int = 1, endian: str = "FILE") -> bytes:
    """A file of noise, as libsndfile writes it."""
    buffer = io.BytesIO()
    data = np.random.default_rng(1).uniform(-0.9, 0.9, (FRAMES, channels))
    soundfile.write(buffer, data, 8000, format=container, subtype=subtype, endian=endian)
    return buffer.getvalue()


def encodings() -> Iterator[tuple[str, str]]:
    for container in FORMATS:
        for subtype in soundfile.available_subtypes(container):
            if subtype not in ("MPEG_LAYER_III", "DWVW_12", "DWVW_16", "DWVW_24"):  # not written or not read back here
                yield container, subtype


class Field:
    """A length in a header: where it lies, its width and byte order."""

    def __init__(self, offset: int, code: str) -> None:
        self.offset, self.code = offset, code

    def get(self, data: bytes) -> int:
        return int(struct.unpack_from(self.code, data, self.offset)[0])

    def set(self, data: bytes, value: int) -> bytes:
        changed = bytearray(data)
        struct.pack_into(self.code, changed, self.offset, value % (1 << 8 * struct.calcsize(self.code)))
        return bytes(changed)


def length_fields(data: bytes) -> dict[str, Field]:
    """The length of the whole, and that of the samples."""
    if data[:4] == b"RIFF":
        return {"whole": Field(4, "<I"), "samples": Field(data.index(b"data") + 4, "<I")}
    if data[:4] == b"RIFX":
        return {"whole": Field(4, ">I"), "samples": Field(data.index(b"data") + 4, ">I")}
    if data[:4] == b"RF64":
        return {"whole": Field(20, "<Q"), "samples": Field(28, "<Q")}
    if data[:4] == b"riff":
        return {"whole": Field(16, "<Q"), "samples": Field(data.index(b"data") + 16, "<Q")}
    return {"whole": Field(4, ">I"), "samples": Field(data.index(b"SSND") + 4, ">I")}


def read(folder: Path, data: bytes, **options: Any) -> files.Signal:
    (folder / "a.wav").write_bytes(data)
    return files.read(folder / "a.wav", **options)


def truth(data: bytes) -> np.ndarray[Any, Any]:
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].T


@pytest.mark.parametrize(("container", "subtype"), list(encodings()))
def test_every_encoding_is_read_as_libsndfile_reads_it(tmp_path: Path, container: str, subtype: str) -> None:
    data = audio(container, subtype)
    found = read(tmp_path, data)
    assert np.array_equal(found.array, truth(data))
    assert (found.rate, found.notes) == (8000, ())


@pytest.mark.parametrize(("container", "subtype"), list(encodings()))
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_cut_file_is_refused(tmp_path: Path, container: str, subtype: str, part: float) -> None:
    data = audio(container, subtype)
    start = data.index(b"SSND" if container == "AIFF" else b"data") + 40
    field = length_fields(data)["samples"]
    cut = data[: start + int(part * (min(len(data), start - 40 + field.get(data)) - start))]
    with pytest.raises(FileError, match=r"is truncated: its header declares .* --allow-truncated"):
        read(tmp_path, cut)
    if subtype in WIDTHS:
        found = read(tmp_path, cut, allow_truncated=True)
        whole = truth(data)
        assert 0 < found.array.shape[1] < FRAMES
        assert np.array_equal(found.array, whole[:, : found.array.shape[1]])
        assert "is truncated" in found.notes[0]


def changed_lengths(container: str, subtype: str, channels: int) -> Iterator[tuple[str, bytes]]:
    """The file with each length field off by a little and by much, one at a time and both."""
    data = audio(container, subtype, channels)
    fields = length_fields(data)
    for name, field in fields.items():
        right = field.get(data)
        bits = 8 * struct.calcsize(field.code)
        deltas = [*range(-9, 10), *(sign * n for sign in (-1, 1) for n in (24, 100, 500, 1000, 10**6))]
        values = {right + delta for delta in deltas if 0 <= right + delta < 2**bits}
        values |= {0, 8, 36, 44, len(data), 2**31 - 1, 2**31, 2**32 - 1, 0x7FFFF000, 0x7FFFF024, 2**bits - 1}
        for value in sorted(values - {right}):
            yield f"{name} {value - right:+}", field.set(data, value)
    for delta in (-500, -8, 8, 500):
        both = fields["whole"].set(data, fields["whole"].get(data) + delta)
        yield f"both {delta:+}", fields["samples"].set(both, fields["samples"].get(data) + delta)


@pytest.mark.parametrize(("container", "subtype"), [pair for pair in encodings() if pair[1] in LINEAR])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_wrong_length_loses_no_sample_without_a_word(
    tmp_path: Path, container: str, subtype: str, channels: int
) -> None:
    expected = truth(audio(container, subtype, channels))
    outcomes = set()
    for name, data in changed_lengths(container, subtype, channels):
        try:
            found = read(tmp_path, data)
        except FileError:
            outcomes.add("refused")
            continue
        common = min(found.array.shape[1], FRAMES)
        assert np.array_equal(found.array[:, :common], expected[:, :common]), name
        if found.array.shape[1] < FRAMES:
            assert found.notes, name
        else:
            outcomes.add("whole")
            # A pad byte of one byte a sample cannot be told from a sample.
            assert found.array.shape[1] - FRAMES <= (WIDTHS[subtype] * channels == 1), name
    assert outcomes == {"refused", "whole"}


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "AIFF", "RF64", "W64"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_stream_without_lengths_is_read_to_its_end(tmp_path: Path, container: str, subtype: str) -> None:
    data = audio(container, subtype)
    fields = length_fields(data)
    wide = struct.calcsize(fields["whole"].code) == 8
    pairs = [(0, 0)] if wide else [(0, 0), (2**32 - 1, 2**32 - 1), (36, 0), (8, 0)]
    if container.startswith("WAV"):
        pairs += [
            (0x7FFFF024, 0x7FFFF000),
            (len(data), 0x7FFFF000),
            (0x80000024, 0x80000000),
            (2**32 - 1, 2**32 - 1 - (fields["samples"].offset - 4)),
        ]
    for whole, samples in pairs:
        changed = fields["samples"].set(fields["whole"].set(data, whole), samples)
        if container == "AIFF":
            changed = Field(data.index(b"COMM") + 10, ">I").set(changed, 0)
        assert np.array_equal(read(tmp_path, changed).array, truth(data)), (whole, samples)


@pytest.mark.parametrize("whole", [0x7FFFF024, 2**32 - 1, 0, "size"])
def test_the_length_of_the_whole_does_not_matter_where_that_of_the_samples_is_right(
    tmp_path: Path, whole: int | str
) -> None:
    data = audio("WAV", "PCM_16")
    changed = length_fields(data)["whole"].set(data, len(data) if isinstance(whole, str) else whole)
    found = read(tmp_path, changed)
    assert np.array_equal(found.array, truth(data))
    assert found.notes == ()


def test_a_missing_pad_byte_is_no_damage(tmp_path: Path) -> None:
    data = audio("WAV", "PCM_24")
    assert data[-1] == 0
    assert len(data) == 44 + 3 * FRAMES + 1
    assert np.array_equal(read(tmp_path, data[:-1]).array, truth(data))
    with pytest.raises(FileError, match="is truncated"):
        read(tmp_path, data[:-2])


def test_big_endian_wav_is_read_where_libsndfile_believes_a_wrong_length(tmp_path: Path) -> None:
    data = audio("WAV", "PCM_24", endian="BIG")
    assert data[:4] == b"RIFX"
    changed = length_fields(data)["samples"].set(data, 0)
    assert np.array_equal(read(tmp_path, changed).array, truth(data))


def test_chunks_behind_the_samples(tmp_path: Path) -> None:
    data = audio("WAV", "PCM_16")
    whole, expected = length_fields(data)["whole"], truth(data)
    chunk = b"LIST" + struct.pack("<I", 4) + b"INFO"
    longer = whole.set(data + chunk, whole.get(data) + len(chunk))
    assert np.array_equal(read(tmp_path, longer).array, expected)
    assert read(tmp_path, longer).notes == ()
    cut = longer[:-2]  # within the last chunk: the header and the file disagree, and some bytes belong to nothing
    with pytest.raises(FileError, match="bytes of no chunk"):
        read(tmp_path, cut)
    assert np.array_equal(read(tmp_path, cut, allow_truncated=True).array, expected)
    tagged = read(tmp_path, data + b"\x00\x01" * 64)
    assert np.array_equal(tagged.array, expected)
    assert tagged.notes == (f"{tmp_path / 'a.wav'}: 128 bytes behind the end that its header declares were not read",)
    second = data + b"data" + struct.pack("<I", 4) + b"abcd"
    with pytest.raises(FileError):
        read(tmp_path, whole.set(second, len(second) - 8))


def test_an_empty_wav_is_empty(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((0, 2)), 8000, format="WAV")
    assert read(tmp_path, buffer.getvalue()).array.shape == (2, 0)


@pytest.mark.parametrize("tail", [b"", b"LIST" + struct.pack("<I", 4) + b"INFO"])
def test_lengths_that_wrapped_at_4_gib(tmp_path: Path, tail: bytes) -> None:
    """A sparse file: only its header is read."""
    data = audio("WAV", "PCM_16")
    start, num_bytes = 44, 2**32 + 100_000
    header = length_fields(data)["samples"].set(data[:start], num_bytes % 2**32)
    header = Field(4, "<I").set(header, (num_bytes + 36 + len(tail)) % 2**32)
    path = tmp_path / "long.wav"
    with open(path, "wb") as file:
        file.write(header)
        file.seek(start + num_bytes)
        file.write(tail)
        file.truncate(start + num_bytes + len(tail))
    with open(path, "rb") as file:
        found = wav.read_header(file, path.stat().st_size)
        assert found is not None
        assert wav.find_samples(file, found, 2) == wav.Samples(start, num_bytes)
        # One byte more, and the length no longer agrees with the size of the file.
        cut = found._replace(size=found.size - 50_000)
        assert "is damaged" in str(wav.find_samples(file, cut, 2).trouble)
    path.unlink()


@pytest.mark.parametrize(("container", "subtype"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("AU", "PCM_16")])
def test_other_containers_are_named(tmp_path: Path, container: str, subtype: str) -> None:
    with pytest.raises(FileError, match=f"holds {container}, expected WAV, RF64, W64 or AIFF"):
        read(tmp_path, audio(container, subtype))


def test_what_libsndfile_cannot_decode_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="libsndfile cannot decode it: "):
        read(tmp_path, audio("AIFF", "DWVW_16"))


def test_any_cut_or_changed_byte_gives_an_array_or_a_refusal(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for container, subtype in (("WAV", "PCM_16"), ("RF64", "PCM_24"), ("W64", "FLOAT"), ("AIFF", "PCM_16")):
        data = audio(container, subtype)
        for _ in range(300):
            changed = bytearray(data[: rng.integers(1, len(data) + 1)])
            for place in rng.integers(0, min(len(changed), 120), rng.integers(0, 4)):
                changed[place] = rng.integers(256)
            for allow in (False, True):
                with suppress(FileError):
                    assert read(tmp_path, bytes(changed), allow_truncated=allow).array.ndim == 2


@pytest.mark.parametrize("dtype", [None, "float16", "float64", "complex64", "complex128"])
def test_samples_are_converted_as_they_are_read(tmp_path: Path, dtype: str | None) -> None:
    data = audio("WAV", "PCM_32", 2)
    wide = dtype in ("float64", "complex128")
    expected = soundfile.read(io.BytesIO(data), dtype="float64" if wide else "float32")[0].T.astype(dtype or "float32")
    found = read(tmp_path, data, dtype=dtype).array
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_what_is_written_is_read_by_other_programs(tmp_path: Path, channels: int) -> None:
    from scipy.io import wavfile

    array = np.random.default_rng(3).normal(0, 3, (channels, 300_001)).astype(np.float32)
    files.write(tmp_path / "a.wav", array, 44100)
    assert np.array_equal(truth((tmp_path / "a.wav").read_bytes()), array)
    rate, found = wavfile.read(tmp_path / "a.wav")
    assert rate == 44100
    assert np.array_equal(found.reshape(-1, channels).T, array)
    assert files.read(tmp_path / "a.wav").notes == ()
