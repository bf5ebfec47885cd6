"""The command line as a process: pipes, terminals, closed and full streams, signals, locales, memory."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import soundfile

import gpuconv
from tests.cli.test_cli import COMMANDS, environment, normal, run, save


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own with two small arrays."""
    monkeypatch.chdir(tmp_path)
    save("x.npy", normal(1, 20))
    save("w.npy", normal(1, 1, 3))
    return tmp_path


def shell(script: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A shell script, in which $gpuconv is the command."""
    variables = {**environment(), "gpuconv": f"{sys.executable} -m gpuconv", **more}
    return subprocess.run(["bash", "-c", script], capture_output=True, env=variables, timeout=120, check=False)


def screen(argv: list[str], columns: int, **more: str) -> str:
    """What a terminal of a width receives from a command, on both of its outputs."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    variables = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")} | more
    process = subprocess.Popen([sys.executable, "-m", "gpuconv", *argv], stdout=child, stderr=child, env=variables)
    os.close(child)
    chunks = []
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(parent)
    process.wait(60)
    return b"".join(chunks).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize(
    "command",
    [
        "info",
        "cache",
        *(f"{command} --help" for command in ("", *COMMANDS)),
        "explain conv1d --input 8,512,3000 --weight 512,512,3 --stride 2 --arch sm_90",
        "explain conv1d --input 1,300,16 --weight 1000,300,3 --arch sm_75",
        "explain conv1d --input 8,1,3000 --weight 1,1,3 --arch sm_90 --direction grad_weight",
        "explain conv1d --input 8,64,3000 --weight 64,64,3 --bias --arch sm_90 --direction grad_bias",
        "explain conv_transpose1d --input 8,64,3000 --weight 64,64,3 --device cpu",
        "conv1d none.npy w.npy y.npy",
        "explain conv1d --input 9 --weight 1,1,3 --arch sm_1",
        "convolve",
    ],
)
def test_every_screen_fits_the_terminal(command: str, columns: int) -> None:
    text = screen(command.split(), columns, GPUCONV_CACHE_DIR="kernels")  # pytest's folders have long names
    assert text.strip()
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text)  # Python 3.14 colours help
    assert max(map(len, shown.splitlines())) <= columns, text


def test_no_color_is_respected() -> None:
    argv = ["verify", "--device", "cpu", "--filter", "docs_example", "--dtype", "float32"]
    color = r"\x1b\[[0-9;]*(3[0-8]|4[0-8]|9[0-7])[0-9;]*m"
    assert re.search(color, screen(argv, 80, TERM="xterm-256color"))
    assert not re.search(color, screen(argv, 80, TERM="xterm-256color", NO_COLOR="1"))
    assert not re.search(color, screen(["--help"], 80, TERM="xterm-256color", NO_COLOR="1"))


def test_a_terminal_is_no_pipe() -> None:
    assert "standard output: is a terminal" in screen(["conv1d", "x.npy", "w.npy", "-", "--device", "cpu"], 80)


FULL = "standard output: cannot be written: No space left on device"
STREAMS = {
    "info >&-": "standard output is closed",
    "--help >&-": "standard output is closed",
    "info > /dev/full": FULL,
    "--version > /dev/full": FULL,
    "explain conv1d --input 1,9 --weight 1,1,3 --arch sm_90 --json >/dev/full": FULL,
    "verify --device cpu --filter docs_example --dtype float32 > /dev/full": FULL,
    "conv1d x.npy w.npy - > /dev/full": FULL,
    "conv1d - w.npy y.npy <&-": "standard input: is closed",
    "conv1d - w.npy y.npy < /dev/null": "standard input: is empty",
    "conv1d - - y.npy < x.npy": "standard input, -, can be only one of IN, WEIGHT and --bias",
    "conv1d x.npy - y.npy < tone.wav": "standard input: is not a .npy file",
    "conv1d - w.npy y.npy <<< hello": "standard input: is not a .npy file",
}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", STREAMS)
def test_a_broken_stream_is_one_line_and_exit_code_2(command: str, unbuffered: str) -> None:
    soundfile.write("tone.wav", normal(20), 8000)
    done = shell(f"$gpuconv {command}", PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"gpuconv: error: {STREAMS[command]}\n"
    assert not Path("y.npy").exists()


@pytest.mark.parametrize("target", ["2>&-", "2>/dev/full"])
def test_without_stderr_the_exit_code_stays(target: str) -> None:
    done = shell(f"$gpuconv conv1d none.npy w.npy y.npy {target}")
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")
    done = shell(f"$gpuconv --version {target}")
    assert (done.returncode, done.stdout) == (0, f"gpuconv {gpuconv.__version__}\n".encode())


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "LANG": "C"}]
)
def test_no_locale_breaks_a_line(variables: dict[str, str]) -> None:
    assert shell("$gpuconv conv1d x.npy w.npy '\u00e4\u20ac.npy' --device cpu", **variables).returncode == 0
    assert Path("\u00e4\u20ac.npy").exists()
    done = shell("$gpuconv conv1d x.npy w.npy '\u00e4\u20ac.txt' --device cpu", **variables)
    assert done.returncode == 2
    assert done.stderr.endswith(b".txt: the name must end in .npy or .wav\n")
    assert shell("$gpuconv info", **variables).returncode == 0


def test_cupy_without_a_cache_folder_is_named_and_leaves_the_cpu() -> None:
    pytest.importorskip("cupy")
    variables = {"CUPY_CACHE_DIR": "/proc/none/cache"}
    done = shell("$gpuconv info", **variables)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"CuPy cannot be loaded: FileNotFoundError:" in b" ".join(done.stdout.split())
    assert b"CuPy           not available\n" in done.stdout
    done = shell("$gpuconv conv1d x.npy w.npy y.npy", **variables)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"computed on the CPU\n")
    done = shell("$gpuconv conv1d x.npy w.npy z.npy --device gpu", **variables)
    assert done.returncode == 3
    assert done.stderr.startswith(b"gpuconv: error: no GPU: CuPy cannot be loaded: FileNotFoundError: ")
    assert done.stderr.count(b"\n") == 1


def test_arrays_go_through_pipes() -> None:
    x, w = save("x.npy", normal(2, 3, 50)), save("w.npy", normal(4, 3, 5))
    script = "$gpuconv conv1d - w.npy - --device cpu | $gpuconv conv_transpose1d - w.npy - --device cpu"
    done = shell(f"cat x.npy | {script} | cat > y.npy")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert np.array_equal(np.load("y.npy"), gpuconv.conv_transpose1d(gpuconv.conv1d(x, w), w))
    assert shell("$gpuconv conv1d x.npy - y2.npy --device cpu < w.npy").returncode == 0
    assert np.array_equal(np.load("y2.npy"), gpuconv.conv1d(x, w))


def test_sound_goes_through_pipes() -> None:
    sound = normal(1, 70_000)
    soundfile.write("x.wav", sound[0], 8000, subtype="FLOAT")
    w = save("w.npy", normal(1, 1, 5))
    assert shell("cat x.wav | $gpuconv conv1d - w.npy - --device cpu | cat > y.wav").returncode == 0
    found, rate = soundfile.read("y.wav", dtype="float32")
    assert rate == 8000
    assert np.array_equal(found, gpuconv.conv1d(sound, w)[0])
    save("x.npy", sound)
    save("batch.npy", np.ones((2, 1, 9), np.float32))
    done = shell("$gpuconv conv1d batch.npy w.npy - --rate 11025 --device cpu | cat; exit ${PIPESTATUS[0]}")
    assert done.returncode == 2
    assert done.stderr.startswith(b"gpuconv: error: standard output: a .wav file holds (channels, samples)")
    assert shell("$gpuconv conv1d x.npy w.npy - --rate 11025 --device cpu > z.wav").returncode == 0
    assert soundfile.info("z.wav").samplerate == 11025


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(unbuffered: str) -> None:
    save("x.npy", normal(1, 500_000))
    script = "$gpuconv conv1d x.npy w.npy - --device cpu | (sleep 3; head -c 10); exit ${PIPESTATUS[0]}"
    done = shell(script, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_command_leaves_no_file(signum: int) -> None:
    Path("y.npy").write_text("old")
    program = (
        "import os, signal, sys, time\nimport numpy as np\nfrom gpuconv.cli import main\n"
        "def write(file, *_, **__):\n    file.write(b'half')\n    file.flush()\n"
        f"    os.kill(os.getpid(), {int(signum)})\n    time.sleep(60)\n"
        "np.lib.format.write_array = write\n"
        f"signal.signal({int(signum)}, signal.SIG_DFL)\n"  # which nohup ignores
        "sys.exit(main(['conv1d', 'x.npy', 'w.npy', 'y.npy', '--device', 'cpu', '--force']))"
    )
    done = run("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signum, "", "gpuconv: error: terminated\n")
    assert sorted(os.listdir()) == ["w.npy", "x.npy", "y.npy"]
    assert Path("y.npy").read_text() == "old"


def test_memory_for_a_long_recording() -> None:
    """The samples as float32, the result as float32, and what the convolution itself takes; no copy for the files."""
    length = 8_000_000
    soundfile.write("x.wav", np.zeros(length, np.int16), 48000, subtype="PCM_16")
    save("w.npy", np.ones((1, 1, 3), np.float32))
    program = (
        "import sys, tracemalloc\nimport numpy as np, soundfile\nfrom gpuconv import cli, files\n"
        "def peak():\n"
        f"    print(tracemalloc.get_traced_memory()[1] / (4 * {length}), file=sys.stderr)\n"
        "    tracemalloc.reset_peak()\n"
        "tracemalloc.start()\n"
        "x = files.read('x.wav').array\npeak()\n"
        "files.write('y.wav', x, 48000)\npeak()\n"
        "del x\ntracemalloc.reset_peak()\n"
        "code = cli.main(['conv1d', 'x.wav', 'w.npy', 'z.wav', '--device', 'cpu'])\npeak()\n"
        "sys.exit(code)"
    )
    done = run("-c", program)
    assert done.returncode == 0
    reading, writing, convolving = map(float, done.stderr.split())
    assert 1 < reading < 1.2
    assert 1 < writing < 1.2
    assert 2 < convolving < 2.7


def test_without_a_driver_cupy_is_not_imported() -> None:
    """It takes 100 MB."""
    program = (
        "import sys\nfrom gpuconv.cli import gpu, main\n"
        "gpu.has_driver = lambda: False\n"
        "code = main(['conv1d', 'x.npy', 'w.npy', 'y.npy'])\n"
        "sys.exit(code or ('cupy' in sys.modules and 'CuPy was imported'))"
    )
    done = run("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "y.npy: (1, 18) float32, computed on the CPU\n", "")


def test_a_cut_recording_is_read_where_that_is_allowed() -> None:
    soundfile.write("x.wav", normal(1000), 8000, subtype="FLOAT")
    save("w.npy", np.ones((1, 1, 1), np.float32))
    data = Path("x.wav").read_bytes()
    Path("x.wav").write_bytes(data[: data.index(b"data") + 8 + 2000])
    told = b"x.wav: is truncated: its header declares 4000 bytes of samples, 2000 found"
    done = shell("$gpuconv conv1d x.wav w.npy y.wav --device cpu")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"gpuconv: error: " + told + b"; --allow-truncated reads what is there\n"
    done = shell("$gpuconv conv1d x.wav w.npy y.wav --device cpu --allow-truncated")
    assert (done.returncode, done.stderr) == (0, b"gpuconv: warning: " + told + b"\n")
    assert done.stdout == b"y.wav: (1, 500) float32, 8000 Hz, computed on the CPU\n"


def test_a_closed_input_is_not_needed() -> None:
    done = shell("$gpuconv conv1d x.npy w.npy y.npy --device cpu <&-")
    assert (done.returncode, done.stderr) == (0, b"")
    assert np.load("y.npy").shape == (1, 18)


def test_folders_that_cannot_be_written() -> None:
    for name in ("/proc/y.npy", "/sys/y.npy"):
        done = shell(f"$gpuconv conv1d x.npy w.npy {name} --device cpu")
        assert done.returncode == 2
        assert done.stderr.startswith(f"gpuconv: error: {name}: ".encode())
        assert done.stderr.count(b"\n") == 1
