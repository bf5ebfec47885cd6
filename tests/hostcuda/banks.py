"""How often shared memory is read or written for one access of a warp.

Shared memory has 32 banks of 4 bytes side by side; consecutive words lie in consecutive banks. In one wavefront every
bank serves one word, to all lanes that want it. Accesses of 8 and 16 bytes a lane are taken in groups of 16 and of 8
lanes, in order, each of at least one wavefront; a load of 8x8 matrices is such an access of 16 bytes a lane.
"""

from __future__ import annotations

from collections.abc import Iterable

BANKS = 32
WORD = 4
WARP = 32


def wavefronts(addresses: Iterable[int | None], bytes_per_lane: int) -> int:
    """The wavefronts of one access.

    Args:
        addresses: for lanes 0, 1, ..., up to 32 of them, in bytes; None for a lane that takes no part.
        bytes_per_lane: 1, 2, 4, 8 or 16.

    Raises:
        ValueError: too many lanes, another size, or an address that it does not divide.
    """
    if bytes_per_lane not in (1, 2, 4, 8, 16):
        raise ValueError(f"a lane accesses 1, 2, 4, 8 or 16 bytes, got {bytes_per_lane}")
    lanes = list(addresses)
    if len(lanes) > WARP:
        raise ValueError(f"a warp has {WARP} lanes, got {len(lanes)} addresses")
    group = min(WARP, BANKS * WORD // bytes_per_lane)
    return sum(_turns(lanes[first : first + group], bytes_per_lane) for first in range(0, len(lanes), group))


def _turns(addresses: Iterable[int | None], bytes_per_lane: int) -> int:
    """The most different words that one bank holds of what a group of lanes accesses."""
    words = set()
    for address in addresses:
        if address is None:
            continue
        if address % bytes_per_lane:
            raise ValueError(f"address {address} is not divisible by {bytes_per_lane}")
        words.update(range(address // WORD, (address + bytes_per_lane - 1) // WORD + 1))
    in_bank = [0] * BANKS
    for word in words:
        in_bank[word % BANKS] += 1
    return max(in_bank)
