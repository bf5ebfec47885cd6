"""A module in the place of CuPy, with one GPU that computes nothing, for tests that run without CuPy or a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from gpuconv import runtime
from gpuconv.device import Device
from tests.plans import forget_kernels


@contextmanager
def fake_cupy(device: Device, index: int = 0) -> Iterator[Any]:
    """A CuPy whose current GPU is `device`; a test adds what else it needs."""
    properties = {
        "name": device.name.encode(), "major": device.arch // 10, "minor": device.arch % 10,
        "multiProcessorCount": device.num_sms, "sharedMemPerBlockOptin": device.shared_per_block,
        "sharedMemPerMultiprocessor": device.shared_per_sm, "l2CacheSize": device.l2_bytes,
    }  # fmt: skip
    fake: Any = ModuleType("cupy")
    fake.__version__ = "14.0"
    fake.ndarray = type("ndarray", (), {})
    fake.cuda = SimpleNamespace(
        runtime=SimpleNamespace(
            getDeviceCount=lambda: index + 1,
            getDevice=lambda: index,
            getDeviceProperties=lambda _: properties,
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13020,
        ),
        nvrtc=SimpleNamespace(getVersion=lambda: (13, 2)),
    )

    def forget() -> None:
        runtime.device.cache_clear()
        forget_kernels()

    with mock.patch.dict(sys.modules, cupy=fake):
        forget()
        yield fake
    forget()
