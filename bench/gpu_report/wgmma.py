"""A micro-experiment: wgmma on a window of the input that each tap shifts by its start address alone (wgmma.cu).

An engine on wgmma would rest on this: no data moves between taps, whatever the dilation. The PTX manual asks for start
addresses at multiples of 16 bytes where there is no swizzle, which every shift keeps.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..speed.micro import Micro
from ..static.sass import compile_cubin

SOURCE = Path(__file__).with_suffix(".cu")
KERNEL = "wgmma_shifted"

ROWS, POSITIONS, CHANNELS, TAPS = 64, 256, 64, 3
# Without a shift, by one position, by a whole group of eight, and by none of these.
DILATIONS = (0, 1, 8, 5)
WINDOW = POSITIONS + 8 * (TAPS - 1)
SHARED_BYTES = 2 * CHANNELS * (TAPS * ROWS + WINDOW)

Array = npt.NDArray[Any]


def build() -> tuple[bytes, str]:
    """The machine code for sm_90a, an architecture that CuPy's own path does not know, and the compiler's log.

    Raises:
        RuntimeError: the compiler refuses.
    """
    defines = "".join(f"#define {n} {v}\n" for n, v in (("CHANNELS", CHANNELS), ("TAPS", TAPS), ("WINDOW", WINDOW)))
    code, log, _ = compile_cubin(defines + SOURCE.read_text(encoding="utf-8"), KERNEL, "sm_90a")
    return code, log


def units(array: Array) -> Array:
    """The bits of bfloat16 numbers (..., channel, position) as the kernel wants them: (..., unit, position, 8).

    The numbers must have no more bits than bfloat16 has.
    """
    bits = (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    *outer, channels, positions = bits.shape
    return np.ascontiguousarray(np.moveaxis(bits.reshape(*outer, channels // 8, 8, positions), -2, -1))


def data() -> tuple[Array, Array]:
    """Weights (tap, row, channel) and input (channel, position): small integers, so that every sum is exact."""
    rng = np.random.default_rng(0)
    weight, window = (TAPS, ROWS, CHANNELS), (CHANNELS, WINDOW)
    return tuple(rng.integers(-8, 9, shape).astype(np.float32) for shape in (weight, window))  # type: ignore[return-value]


def expected(weight: Array, window: Array, dilation: int, rounds: int) -> Array:
    """What the kernel computes, by NumPy."""
    shifted = [window[:, k * dilation : k * dilation + POSITIONS] for k in range(TAPS)]
    return rounds * np.sum([w @ x for w, x in zip(weight, shifted, strict=True)], axis=0)


def probe(micro: Micro, dilation: int) -> dict[str, Any]:
    """Whether the numbers are right, and at which rate wgmma runs on windows that are shifted so."""
    code, _ = build()
    if micro.rehearse or micro.arch != 90:
        return {"absent": f"built ({len(code)} bytes), not run: needs a GPU of sm_90, and none that is emulated"}
    cupy = micro.cupy
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        kernel = cupy.RawModule(path=file.name).get_function(KERNEL)
        kernel.max_dynamic_shared_size_bytes = SHARED_BYTES  # which loads the file
    weight, window = data()
    with micro.stream:
        given = [cupy.asarray(units(array)) for array in (np.swapaxes(weight, -1, -2), window)]
        output = cupy.full((ROWS, POSITIONS), np.nan, np.float32)

    def run(rounds: int, blocks: int, *, swapped: bool = False) -> None:
        arguments = (*given, output, np.int32(dilation), np.int32(rounds), np.int32(swapped))
        kernel((blocks,), (128,), arguments, shared_mem=SHARED_BYTES)

    def wrong(*, swapped: bool) -> int:
        with micro.stream:
            run(2, 1, swapped=swapped)
            found = cupy.asnumpy(output)
        return int((found != expected(weight, window, dilation, 2)).sum())

    rounds, blocks = 2000, 2 * micro.num_sms
    by_manual, swapped = wrong(swapped=False), wrong(swapped=True)
    seconds = micro.seconds(lambda: run(rounds, blocks))
    operations = 2 * ROWS * POSITIONS * CHANNELS * TAPS * rounds * blocks
    return {
        "ok": by_manual == 0,
        "wrong": by_manual,
        "wrong_with_steps_swapped": swapped,
        "of": ROWS * POSITIONS,
        "TFLOP/s": round(operations / seconds / 1e12, 1),
    }
