"""The pytest plugin of gpuconv. It stands beside the package, so that pytest loads no NumPy before a test wants it."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def assert_within_bound() -> Callable[..., None]:
    """`gpuconv.testing.assert_within_bound`: assert that a result is within its error bound."""
    from gpuconv import testing

    return testing.assert_within_bound
