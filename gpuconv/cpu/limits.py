"""The sizes of blocks and buffers on the CPU, read when a problem is planned."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

MIB = 1024 * 1024

# The memory that all scratch buffers of a call may take, or a quarter of input and output where that is more. It limits
# the number of threads.
WORKSPACE = 28 * MIB

# The most bytes of buffers that a thread keeps for its next call.
KEPT_SCRATCH = 8 * MIB

# Bytes of single buffers: a packed weight; each buffer where there is one thread, and where there are several; the
# sums of several; the staged input of several; a block of elementwise products. A NumPy call must last long enough for
# the threads not to wait for each other's interpreter, and yet its operands stay in the cache.
PACKED_WEIGHT = 6 * MIB
BUFFER = 4 * MIB
CONCURRENT_BUFFER = 2 * MIB
SUMS = 1 * MIB
STAGED_INPUT = 1 * MIB
ELEMENTWISE_BLOCK = 512 * 1024

# Bytes of the plane of one tap and of a block of planes, and the most taps: planes stay in the second-level cache.
PLANE = 64 * 1024
PLANE_BLOCK = 1 * MIB
PLANES = 64

# Rows and columns of a small product, and its depth where its columns are multiplied by several tiles of rows: 32 KiB
# of float32 columns stay in the first-level cache.
SMALL_TILE = 64
SMALL_DEPTH = 128

# The depth of a large product, above which it is cut.
LARGE_DEPTH = 16 * 1024

# The depth of a banded matrix.
BAND_DEPTH = 4096

# Windows that are worth filling a band for.
WORTH_A_BAND = 1024

# Windows of a banded matrix that one product reads in place, at least; fewer are copied.
WINDOWS_OF_A_SET = 8

# Samples from which they are the lines of products.
LINES_OF_SAMPLES = 16

# Positions below which the samples of a block are merged into the columns of one product.
SHORT_ROW = 256

# Taps of a phase from which what is not finite is separated, rather than computed again tap by tap.
LONG_KERNEL = 64

# Phases from which an output is written position by position: NumPy's inner loop is then long enough.
MANY_PHASES = 16

# Nanoseconds of work from which blocks that stay in the cache are worth the interpreter's time for them.
SMALL_CALL = 100_000

# Nanoseconds of work from which a second thread pays: it takes some 30 us to wake, the interpreter's time for the
# blocks does not shrink, and each time that a thread waits for another's interpreter costs both some 40 us.
WORTH_THREADS = 700_000

# Nanoseconds by which a helper begins its first block later than the caller. To wait for a helper takes as long.
LATE = 100_000

MAX_WORKERS = 16

# Nanoseconds of work that are worth the interpreter's time for a block, some 50 us.
WORTH_A_BLOCK = 600_000

# OpenBLAS computes a product of at most this many multiply-adds on the calling thread (interface/gemm.c); of real data
# with AVX-512 larger ones too, without packing the operands (sgemm_small_kernel_permit_skylakex.c). Only such products
# run at the same time on several threads; larger ones take turns, each on all threads of the library.
SMALL_PRODUCT = 64**3
SMALL_PRODUCT_AVX512 = 100**3


def small_product(is_complex: bool) -> int:
    """The largest product, in multiply-adds, that BLAS computes on the calling thread."""
    return SMALL_PRODUCT_AVX512 if has_avx512() and not is_complex else SMALL_PRODUCT


@lru_cache(maxsize=1)
def has_avx512() -> bool:
    try:
        found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    except (TypeError, KeyError):  # NumPy before 1.25, or built without
        return False
    return any(name == "X86_V4" or name.startswith("AVX512") for name in found)


def fit(budget: int, *extents: int) -> list[int]:
    """The largest blocks of at most `budget` elements, whose first extents are filled first; at least 1 each."""
    sizes = []
    for extent in extents:
        sizes.append(max(1, min(extent, budget)))
        budget //= sizes[-1]
    return sizes
