"""The model of shared memory's banks, on access patterns whose cost is known."""

from __future__ import annotations

import numpy as np
import pytest

from gpuconv.families import Launch
from tests import hostcuda
from tests.hostcuda.banks import wavefronts
from tests.kernels.test_ptx import LOAD_KERNELS, LOADS, ROWS, WARP


@pytest.mark.parametrize(
    ("bytes_per_lane", "stride", "expected"),
    [
        # One word a lane: consecutive, and by odd strides, no conflict; by even ones as often as 2 divides them.
        *((4, 4 * words, expected) for words, expected in ((0, 1), (1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1))),
        # Narrower elements share words.
        (1, 1, 1),
        (2, 2, 1),
        (2, 128, 32),
        # Consecutive vectors use every bank once a group; a stride of two vectors leaves half of the banks idle.
        *((8, 8 * vectors, expected) for vectors, expected in ((0, 2), (1, 2), (2, 4), (3, 2), (16, 32))),
        *(
            (16, 16 * vectors, expected)
            for vectors, expected in ((0, 4), (1, 4), (2, 8), (3, 4), (4, 16), (8, 32), (9, 4))
        ),
    ],
)
def test_strided_accesses(bytes_per_lane: int, stride: int, expected: int) -> None:
    addresses = [lane * stride for lane in range(32)]
    assert wavefronts(addresses, bytes_per_lane) == expected
    # Where the pattern begins and the order of the lanes within a group do not matter.
    assert wavefronts([address + 16 * 7 for address in addresses], bytes_per_lane) == expected
    group = min(32, 128 // bytes_per_lane)
    shuffled = np.random.default_rng(0).permuted(np.reshape(addresses, (-1, group)), axis=1)
    assert wavefronts(map(int, shuffled.ravel()), bytes_per_lane) == expected


def test_lanes_that_take_no_part_cost_nothing() -> None:
    assert wavefronts([], 4) == 0
    assert wavefronts([None] * 32, 16) == 0
    assert wavefronts([None] * 8 + [16 * lane for lane in range(8)] + [None] * 16, 16) == 1
    assert wavefronts([128 * lane if lane % 2 else None for lane in range(32)], 4) == 16


def test_lanes_of_different_groups_do_not_meet() -> None:
    """Rows 128 bytes apart collide inside a group of lanes and not between groups."""
    assert wavefronts([16 * (lane % 8) + 128 * (lane // 8) for lane in range(32)], 16) == 4
    assert wavefronts([16 * (lane // 8) + 128 * (lane % 8) for lane in range(32)], 16) == 32


@pytest.mark.parametrize(
    ("addresses", "bytes_per_lane", "message"),
    [
        ([0], 3, "1, 2, 4, 8 or 16 bytes, got 3"),
        ([0] * 33, 4, "got 33 addresses"),
        ([0, 8], 16, "address 8 is not divisible by 16"),
    ],
)
def test_nonsense_is_refused(addresses: list[int], bytes_per_lane: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wavefronts(addresses, bytes_per_lane)


@pytest.mark.parametrize("name", LOADS)
def test_launches_count_the_wavefronts_of_matrix_loads(name: str) -> None:
    """What hostcuda counts while it runs is what the model says of the addresses."""
    rng = np.random.default_rng(0)
    costs = set()
    for row_of_lane in (
        *(rng.integers(0, 64, WARP) for _ in range(4)),
        *(np.arange(WARP) * s % ROWS for s in range(9)),
    ):
        arrays = {
            "rows": np.zeros((ROWS, 4), np.uint32),
            "row_of_lane": row_of_lane.astype(np.int32),
            "output": np.empty((WARP, 4), np.uint32),
        }
        counts = hostcuda.Counts()
        hostcuda.run(LOAD_KERNELS[name], Launch(1, WARP, 16 * ROWS, 32, (("n", 0),)), arrays, counts=counts)
        expected = wavefronts([16 * int(row) for row in row_of_lane], 16)
        assert (counts.products, counts.loads, counts.wavefronts) == (0, 4, expected)
        costs.add(expected)
    assert len(costs) > 2
