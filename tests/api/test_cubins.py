"""Kernels compiled in advance: the folder that keeps them, how they come into it, and how calls find them."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import cubins, runtime, source
from gpuconv.device import Device
from gpuconv.families import FAMILIES, Config
from gpuconv.problem import ArraySpec
from tests.fake_cupy import fake_cupy

compile_module = importlib.import_module("gpuconv.compile")
CHECKOUT = Path(__file__).resolve().parents[2]
NOBODY = 65534
X, W = ArraySpec((1, 3, 40), "float64"), ArraySpec((4, 3, 5), "float64")  # one kernel, which compiles in little time
CONFIG = next(
    c for family in FAMILIES if family.name == "conv1d_direct" for c in family.configs(Device.from_arch("sm_90"))
)
CODE = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of compiled kernels, which does not exist yet."""
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "kernels"))
    runtime.build.cache_clear()
    yield tmp_path / "kernels"
    runtime.build.cache_clear()


@pytest.fixture
def without_rights(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Takes root's rights from the test, for whom the folder lies where everybody may look."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o555)
        monkeypatch.setenv("GPUCONV_CACHE_DIR", os.path.join(parent, "kernels"))
        if os.geteuid() != 0:
            yield lambda: None
            return
        yield lambda: os.seteuid(NOBODY)
        os.seteuid(0)


def compile_direct(**more: Any) -> Any:
    pytest.importorskip("cupy")
    return gpuconv.compile("conv1d", X, W, arch="sm_90", algorithm="base", **more)


def is_compiled(**more: Any) -> bool:
    return gpuconv.is_compiled("conv1d", X, W, **{"arch": "sm_90", "algorithm": "base", **more})


def files() -> list[Path]:
    return sorted(path for path in cubins.folder().rglob("*") if path.is_file())


def test_what_is_compiled_is_found_until_what_it_was_made_from_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compile_direct() == (1, 1)
    (path,) = files()
    assert path.parent == folder / "sm_90" / "conv1d_direct"
    assert is_compiled()
    assert compile_direct() == (1, 0)
    assert not is_compiled(arch="sm_100")
    assert not is_compiled(arch=["sm_90", "sm_100"])
    assert not is_compiled(algorithm=None)
    assert not is_compiled(padding_mode="reflect", padding=2)
    assert not is_compiled(direction="grad_weight")

    for name, value in (("__version__", "0.0.9"), ("OPTIONS", ("-std=c++20",))):
        with monkeypatch.context() as patch:
            patch.setattr(cubins, name, value)
            assert not is_compiled(), name
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "nvrtc_version", lambda: (12, 9))
        assert not is_compiled()
        patch.setenv("GPUCONV_CACHE_ONLY", "1")
        assert is_compiled()
        patch.delenv("GPUCONV_CACHE_ONLY")
        patch.setattr(runtime, "nvrtc_version", lambda: None)  # none is installed, so code of any is taken
        assert is_compiled()
    with monkeypatch.context() as patch:  # a header that the kernel includes
        shutil.copytree(source.directory(), tmp_path / "cuda_src")
        with (tmp_path / "cuda_src" / "common.cuh").open("a") as file:
            file.write("// changed\n")
        patch.setattr(source, "directory", lambda: tmp_path / "cuda_src")
        forget_sources()
        assert not is_compiled()
    forget_sources()
    assert is_compiled()


def forget_sources() -> None:
    source.read.cache_clear()
    source.inlined.cache_clear()


def test_a_file_holds_a_whole_cubin_for_its_owner_alone(folder: Path) -> None:
    """CuPy's binding leaves the last byte out, without which the table of segments is cut."""
    compile_direct()
    (path,) = files()
    code = path.read_bytes()
    assert code.startswith(b"\x7fELF")
    for at, entry in ((32, 54), (40, 58)):  # of segments and of sections: where the table begins, its entries
        (begin,) = struct.unpack_from("<Q", code, at)
        size, number = struct.unpack_from("<HH", code, entry)
        assert 0 < begin + size * number <= len(code)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for parent in (folder, *(path.parents[i] for i in (0, 1))):
        assert stat.S_IMODE(parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_file_is_compiled_anew(harm: str) -> None:
    key = cubins.Source.of(CONFIG, "sm_90")
    path = cubins.store(key, (13, 2), CODE)
    assert cubins.find(key, (13, 2)) == (path, ())
    data = bytearray(CODE)
    data[5000] ^= 1
    path.write_bytes({"flip": data, "cut": CODE[:-1], "empty": b""}[harm])
    assert cubins.find(key, (13, 2)) == (None, (path,))
    assert [entry.is_damaged for entry in cubins.entries()] == [True]
    found = cubins.find(key, (13, 2))
    again = cubins.store(key, (13, 2), CODE if harm == "flip" else CODE + b"other", found.damaged)
    assert files() == [again]
    assert cubins.find(key, (13, 2)) == (again, ())


def test_the_newest_code_is_taken_where_the_version_does_not_matter() -> None:
    key = cubins.Source.of(CONFIG, "sm_90")
    paths = {version: cubins.store(key, version, CODE) for version in ((12, 9), (13, 2), (13, 10))}
    assert cubins.find(key, None).path == paths[13, 10]
    assert cubins.find(key, None, major=12).path == paths[12, 9]
    assert cubins.find(key, None, major=14).path is None
    assert cubins.find(key, (13, 2), major=13).path == paths[13, 2]
    assert cubins.find(key, (13, 3)).path is None


WRITER = """
import sys
from gpuconv import cubins
source = cubins.Source("sm_90", "conv1d_direct", "0" * 32, "cubin")
for i in range(60):
    cubins.store(source, (13, 2), bytes([i % 7]) * 300_000)
"""


def test_many_processes_fill_one_folder() -> None:
    """Whoever looks finds nothing or code that is whole."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER], cwd=CHECKOUT) for _ in range(3)]
    key = cubins.Source("sm_90", "conv1d_direct", "0" * 32, "cubin")
    looks = 0
    while any(writer.poll() is None for writer in writers):
        found = cubins.find(key, (13, 2))
        assert found.damaged == ()
        looks += found.path is not None
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert looks > 0
    assert len(files()) == 7
    assert not any(entry.is_damaged for entry in cubins.entries())


def test_processes_share_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    monkeypatch.setattr(compile_module, "_JOBS_PER_PROCESS", 1)
    w = ArraySpec((4, 3, 5), "float32")
    x = ArraySpec((1, 3, 40), "float32")
    steps: list[tuple[int, int, str]] = []
    options: dict[str, Any] = {"arch": ("sm_75", "sm_90"), "direction": "forward", "algorithm": "base"}
    found = gpuconv.compile("conv1d", x, w, processes=2, progress=lambda *step: steps.append(step), **options)
    assert found == (2, 2)
    assert [step[:2] for step in steps] == [(0, 2), (1, 2), (2, 2)]
    assert gpuconv.is_compiled("conv1d", x, w, **options)


def test_a_process_that_fails_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    jobs = [(Config("conv1d_direct", (("DTYPE", "float8"),)), "sm_90"), (CONFIG, "sm_90")]
    for processes in (1, 2):
        monkeypatch.setattr(compile_module, "_JOBS_PER_PROCESS", 1)
        with pytest.raises(RuntimeError, match=r"^conv1d_direct for sm_90: NVRTC \d+\.\d+: .*error"):
            compile_module.compile_all(jobs, processes, None)


def test_a_folder_that_cannot_be_made_is_named(without_rights: Callable[[], None]) -> None:
    without_rights()
    with pytest.raises(cubins.CacheError, match=rf"^{cubins.folder()}: cannot be made: Permission denied$"):
        cubins.store(cubins.Source.of(CONFIG, "sm_90"), (13, 2), CODE)


def test_a_folder_that_cannot_be_written_is_named(without_rights: Callable[[], None]) -> None:
    cubins.folder().parent.chmod(0o755)
    key = cubins.Source.of(CONFIG, "sm_90")
    path = cubins.store(key, (13, 2), CODE)
    for parent in (cubins.folder(), *cubins.folder().rglob("*")):
        parent.chmod(0o555)
    without_rights()
    assert cubins.find(key, (13, 2)).path == path
    with pytest.raises(cubins.CacheError, match=rf"^{cubins.folder()}: cannot be written: Permission denied$"):
        cubins.store(key, (13, 2), CODE + b"more")
    with pytest.raises(cubins.CacheError, match=rf"^{path}: cannot be removed: Permission denied$"):
        cubins.prune(0)
    assert files() == [path]


def test_a_full_disk_leaves_nothing_behind(folder: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(cubins.CacheError, match=rf"^{folder}: cannot be written: File too large$"):
            cubins.store(cubins.Source.of(CONFIG, "sm_90"), (13, 2), CODE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert files() == []


def test_code_of_others_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = cubins.Source.of(CONFIG, "sm_90")
    path = cubins.store(key, (13, 2), CODE)
    for target in (path, folder):
        target.chmod(0o777)
        with pytest.raises(cubins.CacheError, match=rf"^{target}: everybody can write it"):
            cubins.find(key, (13, 2))
        target.chmod(0o700)
    me = os.geteuid()
    if me == 0:  # who can give files away
        os.chown(path, NOBODY, -1)
        with pytest.raises(cubins.CacheError, match=rf"^{path}: belongs to the user {NOBODY}; .* its user, 0$"):
            cubins.find(key, (13, 2))
        os.chown(folder, NOBODY, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    for use in (lambda: cubins.find(key, (13, 2)), lambda: cubins.store(key, (13, 2), CODE)):
        with pytest.raises(cubins.CacheError, match=rf"^{folder}: belongs to the user {me or NOBODY}; "):
            use()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GPUCONV_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"GPUCONV_CACHE_DIR": "", "XDG_CACHE_HOME": "/c"}, "/c/gpuconv"),
        ({"GPUCONV_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/d"}, "/d/.cache/gpuconv"),
    ],
)
def test_where_the_folder_is(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cubins.folder()) == expected


def test_prune_removes_what_is_damaged_and_what_was_used_last_long_ago() -> None:
    paths = []
    for age, kernel in enumerate(("new", "middle", "old", "damaged")):
        path = cubins.store(cubins.Source("sm_90", kernel, "0" * 32, "cubin"), (13, 2), CODE)
        now = time.time()
        os.utime(path, (now - 1000 * age, now - 1000 * age))
        paths.append(path)
    new, middle, old, damaged = paths
    damaged.write_bytes(CODE[:-1])
    abandoned, current = (new.with_name(f"{name}.part") for name in ("a", "b"))
    for part in (abandoned, current):
        part.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    assert cubins.prune(None) == (1, len(CODE) - 1)
    assert set(files()) == {new, middle, old, current}
    assert cubins.prune(2 * len(CODE)) == (1, len(CODE))
    assert set(files()) == {new, middle, current}
    os.utime(middle)  # a call has read it
    assert cubins.prune(2 * len(CODE) - 1) == (1, len(CODE))
    assert set(files()) == {middle, current}
    assert cubins.prune(0) == (1, len(CODE))
    assert [entry.path for entry in cubins.entries()] == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r'compile: arch must be given \("sm_90", ...\) where input is no CuPy array'),
        ({"arch": "sm_91"}, ValueError, "compile: arch must be of sm_75, .*, got 'sm_91'"),
        ({"arch": ("sm_90", 90)}, ValueError, "compile: arch must be of sm_75, .*, got 90"),
        ({"arch": 90}, ValueError, "compile: arch must be of sm_75, .*, got 90"),
        ({"arch": "sm_90", "stride": 0}, ValueError, "conv1d: stride must be at least 1, got 0"),
        ({"arch": "sm_90", "strides": 2}, TypeError, "compile: conv1d has the settings stride, .*, got strides"),
        (
            {"arch": "sm_90", "direction": "back"},
            ValueError,
            "compile: direction must be one of forward, .* got 'back'",
        ),
    ],
)
def test_what_compile_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        gpuconv.compile("conv1d", X, W, **arguments)
    assert files() == []


@pytest.mark.parametrize(
    ("input", "settings", "expected"),
    [
        (X, {}, ("forward", "grad_input", "grad_weight", "grad_bias")),
        (np.zeros((1, 3, 9), ">f4"), {"stride": 2}, ("forward", "grad_input", "grad_weight", "grad_bias")),
        (ArraySpec((3, 0), "float32"), {}, ("forward", "grad_weight", "grad_bias")),
        (ArraySpec((1, 3, 9), "int8"), {}, ("forward",)),
        (X, {"activation": "relu"}, ("forward",)),
        (X, {"algorithm": "base"}, ("forward",)),
        ([1.0, 2.0], {}, ("forward",)),  # which is an error then
    ],
)
def test_the_gradients_that_a_call_has(input: Any, settings: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert compile_module.directions_of(input, settings) == expected


def test_compile_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "nvrtc_version", lambda: None)
    with pytest.raises(RuntimeError, match=r"^NVRTC, CUDA's run-time compiler, cannot be loaded: pip install"):
        gpuconv.compile("conv1d", X, W, arch="sm_90")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ModuleNotFoundError, match=r"^kernels are compiled through CuPy, which is missing: pip install"):
        gpuconv.compile("conv1d", X, W, arch="sm_90")


@pytest.fixture
def fake_gpu() -> Iterator[Any]:
    """A CuPy that tells how a kernel would be made."""
    with fake_cupy(Device.from_arch("sm_90")) as fake:
        fake.RawKernel = lambda _text, name: ("compiled", name)
        fake.RawModule = lambda path: SimpleNamespace(get_function=lambda name: (path, name))
        yield fake


def build(arch: str = "sm_90") -> Any:
    runtime.build.cache_clear()
    return runtime.build(CONFIG, arch)


def test_a_kernel_is_loaded_where_it_was_compiled_in_advance(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = ("compiled", "conv1d_direct")
    assert build() == compiled
    path = cubins.store(cubins.Source.of(CONFIG, "sm_90"), (13, 2), CODE)
    loaded = (str(path), "conv1d_direct")
    assert build() == loaded
    assert build("sm_80") == compiled
    fake_gpu.cuda.nvrtc.getVersion = lambda: (13, 3)
    assert build() == compiled
    monkeypatch.setenv("GPUCONV_CACHE_ONLY", "1")
    assert build() == loaded
    monkeypatch.setenv("GPUCONV_CACHE_ONLY", "0")
    del fake_gpu.cuda.nvrtc.getVersion  # NVRTC is not installed
    assert build() == loaded
    fake_gpu.cuda.runtime.runtimeGetVersion = lambda: 12090  # whose drivers do not load code of CUDA 13
    assert build() == compiled


@pytest.mark.usefixtures("fake_gpu")
def test_a_kernel_that_may_not_be_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("GPUCONV_CACHE_ONLY", "1")
    message = "conv1d_direct for sm_90 was not compiled in advance, which GPUCONV_CACHE_ONLY requires; "
    message += f"gpuconv warmup --arch sm_90 adds kernels to {folder}"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        build()
    path = cubins.store(cubins.Source.of(CONFIG, "sm_90"), (13, 2), CODE)
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match=rf"^{message} \({path}: is damaged\)$"):
        build()


@pytest.mark.usefixtures("fake_gpu")
def test_code_that_is_not_used_is_a_warning(folder: Path) -> None:
    path = cubins.store(cubins.Source.of(CONFIG, "sm_90"), (13, 2), CODE)
    path.write_bytes(b"")
    not_used = "gpuconv: kernels compiled in advance are not used: "
    with pytest.warns(RuntimeWarning, match=rf"^{not_used}{path}: is damaged$"):
        assert build() == ("compiled", "conv1d_direct")
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match=rf"^{not_used}{folder}: everybody can write it"):
        assert build() == ("compiled", "conv1d_direct")


@pytest.mark.gpu
def test_calls_load_what_was_compiled_in_advance(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give the bits of kernels that CuPy compiles. Nothing else can have computed them: compiling is forbidden."""
    rng = np.random.default_rng(0)
    x, w = (cupy.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 16, 300), (32, 16, 5)))
    settings: dict[str, Any] = {"padding": 2, "stride": 2}
    expected = gpuconv.conv1d(x, w, **settings)
    grad = gpuconv.grad.conv1d_weight(x, w.shape, expected, **settings).get()
    assert not gpuconv.is_compiled("conv1d", x, w, **settings)
    found = gpuconv.compile("conv1d", x, w, **settings)
    assert found.compiled == found.kernels > 2
    directions: tuple[Any, ...] = ("forward", "grad_input", "grad_weight", "grad_bias")
    assert all(gpuconv.is_compiled("conv1d", x, w, direction=d, **settings) for d in directions)

    runtime.build.cache_clear()
    monkeypatch.setattr("gpuconv.calls._EXECUTORS", {})
    monkeypatch.setenv("GPUCONV_CACHE_ONLY", "1")
    monkeypatch.setattr(cupy, "RawKernel", None)
    for name in ("createProgram", "compileProgram", "getVersion"):  # as without NVRTC
        monkeypatch.setattr(cupy.cuda.nvrtc, name, None)
    start = time.perf_counter()
    assert (gpuconv.conv1d(x, w, **settings).get() == expected.get()).all()
    print(f"the first call took {1e3 * (time.perf_counter() - start):.1f} ms")
    assert (gpuconv.grad.conv1d_weight(x, w.shape, expected, **settings).get() == grad).all()
    with pytest.raises(RuntimeError, match="was not compiled in advance, which GPUCONV_CACHE_ONLY requires"):
        gpuconv.conv1d(x, w, activation="relu", **settings)
