"""The costs of the parts of a computation, in nanoseconds on one core; they only serve to compare forms.

Measured with NumPy 2.4 and OpenBLAS 0.3.31 on an EPYC with AVX-512, as slopes and offsets of the times of single NumPy
calls over their extents.
"""

from __future__ import annotations

from ..problem import ConvProblem
from . import limits
from .arrays import accumulator

# The interpreter's time for a NumPy call, views and arguments included, and for a block of a form besides its calls.
CALL = 2_000.0
BLOCK = 25_000.0

# One run of NumPy's inner loop: ROW where it computes, COPY_ROW where it copies; FAR_ROW comes on top where the next
# run belongs to another sample, in another page of memory. One element (4 bytes, operands in the cache): of a copy, of
# one with a stride, of one that transposes, of one that swaps channels and positions of short rows (SWAPPING_ROW is its
# run), of one to the diagonals of a band, of an addition or a product, of both at once by `einsum`, and of an addition
# or a product with a stride.
ROW = 14.0
COPY_ROW = 5.0
FAR_ROW = 8.0
COPY = 0.1
STRIDED_COPY = 0.6
TRANSPOSING_COPY = 0.8
SWAPPING_ROW = 2.0
SWAPPING_COPY = 0.27
DIAGONAL = 0.8
ELEMENTWISE = 0.12
MULTIPLY_ADD = 0.16
STRIDED_ELEMENTWISE = 0.45

# An element of a conversion from or to a narrow dtype.
CONVERT = {"float16": 2.2, "bfloat16": 0.25}

# A product in a stack of matrix products; one operation of it, and one element of its result. OUTER is one element of a
# product of depth 1. For a large product: one element that BLAS packs, what it takes longer for one of a transposed
# operand, and the synchronisation of its threads. FAR_LINE is a row of a product whose rows belong to several samples.
PRODUCT = 40.0
FLOP = 0.0095
RESULT = 0.06
OUTER = 1.2
PACK = 0.25
TRANSPOSING_PACK = 0.37
FAR_LINE = 2.4
MEETING = 15_000.0

# A form that leaves the threads to BLAS computes only products on several: the rest takes one thread, and costs more by
# SERIAL. But threads of BLAS wait for the next product without sleeping, so they pay from far less work on than ours
# (`limits.WORTH_THREADS`). This advantage counts as a share of the products, up to what waking our threads takes.
SERIAL = 1.2
BLAS_SHARE = 0.35
BLAS_SAVES = 160_000.0


def scale(p: ConvProblem) -> float:
    """The size of an accumulator relative to float32."""
    return accumulator(p.dtype).itemsize / 4


def rows(count: float, length: float, element: float) -> float:
    """The cost of so many runs of an inner loop that computes."""
    return count * (ROW + length * element)


def copies(count: float, length: float, element: float) -> float:
    """The cost of so many runs of an inner loop that copies."""
    return count * (COPY_ROW + length * element)


def swaps(count: float, run: float, size: float) -> float:
    """The cost of a copy of `count` elements that swaps channels and positions, in runs of `run` elements."""
    return count * (SWAPPING_ROW / run + SWAPPING_COPY * size)


def products(p: ConvProblem, count: float, M: float, depth: float, columns: float, small: bool) -> float:
    """The cost of so many products (M, depth) @ (depth, columns) of a problem's accumulators."""
    if depth == 1:  # which NumPy computes in a loop of its own
        return count * (PRODUCT + M * columns * OUTER * scale(p))
    width = -(-columns // 16) * 16 if columns > 1 else 5
    rows = M if M > 1 else 2.75  # BLAS multiplies a single row by another function, which takes longer
    operations = 2 * rows * depth * width * (2 if p.is_complex else 1)
    one = PRODUCT + (operations * FLOP + M * columns * RESULT) * scale(p)
    if not small:
        one += MEETING + PACK * scale(p) * (M * depth + depth * columns)
    return count * one


def of_blas(product: float, rest: float) -> float:
    """The cost of a form that leaves the threads to BLAS, by that of its products and of what it does besides."""
    saved = min(BLAS_SHARE * product, BLAS_SAVES)
    return product - saved + (rest if product + rest < limits.WORTH_THREADS else SERIAL * rest)
