"""The pytest plugin of gpuconv, which pytest loads by its entry point."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def assert_within_bound() -> Callable[..., None]:
    """`gpuconv.testing.assert_within_bound`: assert that a result is within its error bound."""
    from . import testing

    return testing.assert_within_bound
