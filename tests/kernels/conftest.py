"""What the tests of kernels share: tensor cores of every kind."""

from __future__ import annotations

import pytest

from tests.hostcuda import AMPERE, HOPPER, TensorCores


@pytest.fixture(params=[AMPERE, HOPPER], ids=["Ampere", "Hopper"])
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TensorCores:
    """Tensor cores that add by the rule of each architecture, on whatever device."""
    monkeypatch.setattr(TensorCores, "of", staticmethod(lambda _: request.param))
    found: TensorCores = request.param
    return found
