"""The tests marked `gpu` that cannot run on the stand-in, by name and number, with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

_TORCH = "needs PyTorch on CUDA"
_RANDOM = "needs CuPy's random numbers, whose kernels are not translated"

_CUFFT = "needs cuFFT, whose kernels are machine code"

CANNOT_RUN = {
    "tests/api/test_fft.py::test_cufft_itself": (1, _CUFFT),
    "tests/torch/test_torch_cuda.py::test_mixed_devices_are_refused": (1, _TORCH),
    "tests/torch/test_torch_cuda.py::test_pending_conjugations_and_negations_on_a_gpu": (1, _TORCH),
    "tests/torch/test_torch_cuda.py::test_a_compiled_model_runs_on_the_gpu": (1, _TORCH),
    "tests/project/test_readme.py::test_a_block_runs_by_itself[0-gpu]": (1, _RANDOM),
}
"""(how many, why) by test function, or by test."""


def skip_what_cannot_run(items: Sequence[pytest.Item], *, everything: bool) -> None:
    """Skip these tests, and no others.

    Args:
        items: the tests collected.
        everything: whether all tests were collected, so that their number must be right.

    Raises:
        pytest.UsageError: there are more or fewer of them.
    """
    found: Counter[str] = Counter()
    for item in items:
        name = item.nodeid if item.nodeid in CANNOT_RUN else item.nodeid.partition("[")[0]
        if name in CANNOT_RUN:
            found[name] += 1
            item.add_marker(pytest.mark.skip(reason=f"gpu_on_cpu: {CANNOT_RUN[name][1]}"))
    expected = {name: count for name, (count, _) in CANNOT_RUN.items()}
    if everything and found != expected:
        raise pytest.UsageError(f"tests/gpu_on_cpu/limits.py lists {expected}, collected were {dict(found)}")
