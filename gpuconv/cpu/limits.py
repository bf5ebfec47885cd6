"""The sizes of blocks and buffers on the CPU, read when a problem is planned."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

MIB = 1024 * 1024

# The bytes that all scratch buffers of a call may take, or a quarter of input and output where that is more. This
# limits the number of threads.
WORKSPACE = 28 * MIB

# The most bytes of buffers that a caller keeps for each thread of its next call.
KEPT_SCRATCH = 8 * MIB

# Bytes of single buffers: a packed weight; any buffer with one thread; with several threads any buffer, the sums, and
# the staged input; a block of elementwise products. They are so large that a NumPy call takes long compared with the
# interpreter, for which threads wait, and so small that its operands stay in the cache.
PACKED_WEIGHT = 6 * MIB
BUFFER = 4 * MIB
CONCURRENT_BUFFER = 2 * MIB
SUMS = 1 * MIB
STAGED_INPUT = 1 * MIB
ELEMENTWISE_BLOCK = 512 * 1024

# Bytes of the plane of one tap and of a block of planes, which stay in the second-level cache; and the most taps.
PLANE = 64 * 1024
PLANE_BLOCK = 1 * MIB
PLANES = 64

# The most rows and columns of a small product, and the most depth if several tiles of rows use the same columns: 32 KiB
# of float32 columns stay in the first-level cache.
SMALL_TILE = 64
SMALL_DEPTH = 128

# The most depth of a large product.
LARGE_DEPTH = 16 * 1024

# The most depth of a banded matrix.
BAND_DEPTH = 4096

# The fewest windows for which filling a band again pays.
WORTH_A_BAND = 1024

# The fewest windows that a product of the form `windows` reads in place.
WINDOWS_OF_A_SET = 8

# The fewest taps of a window that is copied to a panel as one run.
WORTH_A_WINDOW = 32

# The fewest samples that are rows of a product, each of them a line of it.
LINES_OF_SAMPLES = 16

# Positions below which the samples of a block are merged into the columns of one product.
SHORT_ROW = 256

# The fewest taps of a phase for which NaN and infinities are separated, rather than computed again tap by tap.
LONG_KERNEL = 64

# The fewest phases for which an output is written position by position: NumPy's inner loop is then long enough.
MANY_PHASES = 16

# The most nanoseconds of the form `small`; beyond, blocks that stay in the cache pay despite the interpreter's time.
SMALL_CALL = 100_000

# The fewest nanoseconds of work for which a second thread pays: it takes some 30 us to wake, the interpreter's time for
# the blocks does not shrink, and whenever a thread waits for the interpreter, it costs both threads some 40 us.
WORTH_THREADS = 400_000

# Nanoseconds by which a helper begins its first block later than the caller, and what it takes the caller to wake if it
# has to wait for the helper.
LATE = 60_000

MAX_WORKERS = 16

# The fewest nanoseconds of work for which a block pays, whose interpreter's time is some 50 us.
WORTH_A_BLOCK = 450_000

# OpenBLAS computes a product of at most this many multiply-adds on the calling thread (interface/gemm.c); with AVX-512
# also larger ones of real data, without packing (sgemm_small_kernel_permit_skylakex.c). Only such products run at the
# same time on several threads; larger ones take turns, each on all threads of the library.
SMALL_PRODUCT = 64**3
SMALL_PRODUCT_AVX512 = 100**3


def small_product(is_complex: bool) -> int:
    """The largest product, in multiply-adds, that BLAS computes on the calling thread."""
    return SMALL_PRODUCT_AVX512 if has_avx512() and not is_complex else SMALL_PRODUCT


@lru_cache(maxsize=1)
def has_avx512() -> bool:
    try:
        found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    except (TypeError, KeyError):  # NumPy before 1.25, or built without this information
        return False
    return any(name == "X86_V4" or name.startswith("AVX512") for name in found)


def fit(budget: int, *extents: int) -> list[int]:
    """Block sizes of at most `budget` elements in all, as large as possible in the first extents; at least 1 each."""
    sizes = []
    for extent in extents:
        sizes.append(max(1, min(extent, budget)))
        budget //= sizes[-1]
    return sizes
