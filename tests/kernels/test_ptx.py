"""The instructions that cuda_src/ptx.cuh wraps for matrix products, one by one: under hostcuda, and on a GPU.

Both are held to the same two models, which are written down here from the PTX ISA and from what has been published on
the arithmetic of tensor cores, without a look at hostcuda: where each element of a matrix lies among the registers of
the lanes, and exact sums of products, one at a time, in rational numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from bench.static import sass
from gpuconv import runtime
from gpuconv.device import ARCHITECTURES
from gpuconv.families import Launch
from gpuconv.source import inlined
from tests import hostcuda
from tests.hostcuda.errors import (
    DivergenceError,
    HostCudaError,
    MisalignedError,
    OutOfBoundsError,
    PoisonReadError,
    ScheduleError,
)

Array = npt.NDArray[Any]

WARP = 32
HEADERS = inlined("tf32.cuh")


def kernel(name: str, parameters: str, body: str) -> hostcuda.Program:
    """A kernel of one warp that has `lane` and `smem`, its shared memory, at hand."""
    return hostcuda.Program(
        name,
        f"""{HEADERS}
#line 1 "{name}.cu"
extern "C" __global__ void __launch_bounds__({WARP}) {name}({parameters}, const int n) {{
    const int lane = threadIdx.x;
    unsigned char* const smem = dynamic_shared_memory();
    (void)lane, (void)smem, (void)n;
    {body}
}}
""",
    )


@dataclass(frozen=True)
class Machine:
    """What runs a kernel: hostcuda, or the GPU.

    Attributes:
        tensor_cores: the arithmetic of its matrix products.
        is_gpu: whether it is one.
    """

    tensor_cores: hostcuda.TensorCores
    is_gpu: bool = False

    def run(
        self,
        program: hostcuda.Program,
        arrays: Mapping[str, Array],
        output: Array,
        *,
        n: int = 0,
        grid: int = 1,
        shared_bytes: int = 0,
    ) -> Array:
        """Launch blocks of a warp; `output`, the kernel's last array, is filled and returned."""
        if not self.is_gpu:
            launch = Launch(grid, WARP, shared_bytes, 32, (("n", n),))
            given = {**arrays, "output": output}
            return hostcuda.run(program, launch, given, schedule="every", tensor_cores=self.tensor_cores)
        cupy = runtime.cupy_module()
        on_device = [cupy.asarray(array) for array in (*arrays.values(), output)]
        function = cupy.RawKernel(program.text, program.kernel)
        function((grid,), (WARP,), (*on_device, np.int32(n)), shared_mem=shared_bytes)
        output[...] = cupy.asnumpy(on_device[-1])
        return output


@pytest.fixture(params=["hostcuda", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "gpu":
        return Machine(hostcuda.TensorCores.of(runtime.device(0)), is_gpu=True)
    return Machine(hostcuda.HOPPER)


GROUP, IN_GROUP = np.arange(WARP)[:, None] // 4, np.arange(WARP)[:, None] % 4


def places_of_d() -> tuple[Array, Array]:
    """(row, column) of element i = 0..3 of each lane, both [32][4]."""
    i = np.arange(4)
    return np.where(i < 2, GROUP, GROUP + 8), 2 * IN_GROUP + (i & 1)


def places_of_a(depth: int, packed: bool) -> tuple[Array, Array]:
    """(row, k) of each lane's elements of a, in the order of the registers and, within one, of the halves."""
    if not packed:
        i = np.arange(4)
        return np.where((i == 0) | (i == 2), GROUP, GROUP + 8), np.where(i < 2, IN_GROUP, IN_GROUP + 4)
    if depth == 8:
        i = np.arange(4)
        return np.where(i < 2, GROUP, GROUP + 8), 2 * IN_GROUP + (i & 1)
    i = np.arange(8)
    upper = (i < 2) | ((i >= 4) & (i < 6))
    return np.where(upper, GROUP, GROUP + 8), 2 * IN_GROUP + (i & 1) + np.where(i < 4, 0, 8)


def places_of_b(depth: int, packed: bool) -> tuple[Array, Array]:
    """(k, column) of each lane's elements of b."""
    if not packed:
        k = np.where(np.arange(2) == 0, IN_GROUP, IN_GROUP + 4)
    else:
        i = np.arange(depth // 4)
        k = 2 * IN_GROUP + (i & 1) + np.where(i < 2, 0, 8)
    return k, np.broadcast_to(GROUP, k.shape)


@dataclass(frozen=True)
class Product:
    """A wrapped mma.sync.

    Attributes:
        dtype: of a and b; float32 stands for TF32.
        depth: the extent of the sum.
        least_exponent: of the dtype's normal numbers.
        opcode: on sm_80 and later.
    """

    name: str
    dtype: Any
    depth: int
    least_exponent: int
    opcode: str

    @property
    def packed(self) -> bool:
        return np.dtype(self.dtype).itemsize == 2

    def truncated(self, values: Array) -> Array:
        """What the tensor cores see of an operand, as float64."""
        if not self.packed:
            values = (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        with np.errstate(invalid="ignore"):
            return values.astype(np.float64)


PRODUCTS = {
    product.name: product
    for product in (
        Product("multiply_matrices_f16", np.float16, 16, -14, "HMMA.16816.F32"),
        Product("multiply_matrices_bf16", ml_dtypes.bfloat16, 16, -126, "HMMA.16816.F32.BF16"),
        Product("multiply_matrices_f16_k8", np.float16, 8, -14, "HMMA.1688.F32"),
        Product("multiply_matrices_tf32", np.float32, 8, -126, "HMMA.1688.F32.TF32"),
    )
}


def product_kernel(product: Product) -> hostcuda.Program:
    """Each block multiplies the matrices that its lanes' registers are given for."""
    num_a, num_b = (2, 1) if product.name.endswith("_k8") else (4, 2)
    return kernel(
        product.name.replace("multiply_matrices", "product"),
        "const unsigned* __restrict__ a_in, const unsigned* __restrict__ b_in, const float* __restrict__ c,"
        " float* __restrict__ output",
        f"""
        const int i = blockIdx.x * {WARP} + lane;
        unsigned a[{num_a}], b[{num_b}];
        float d[4];
        for (int r = 0; r < {num_a}; ++r) a[r] = a_in[{num_a} * i + r];
        for (int r = 0; r < {num_b}; ++r) b[r] = b_in[{num_b} * i + r];
        for (int r = 0; r < 4; ++r) d[r] = c[4 * i + r];
        {product.name}(d, a, b{"[0]" if num_b == 1 else ""});
        for (int r = 0; r < 4; ++r) output[4 * i + r] = d[r];
        """,
    )


PRODUCT_KERNELS = {name: product_kernel(product) for name, product in PRODUCTS.items()}


def multiply(machine: Machine, product: Product, a: Array, b: Array, c: Array) -> Array:
    """What the instruction computes: a [count][16][depth] times b [count][depth][8] plus c [count][16][8]."""
    rows, columns = places_of_d()
    arrays = {
        "a_in": words(a[(slice(None), *places_of_a(product.depth, product.packed))]),
        "b_in": words(b[(slice(None), *places_of_b(product.depth, product.packed))]),
        "c": np.ascontiguousarray(c[:, rows, columns]),
    }
    d = np.empty((len(a), WARP, 4), np.float32)
    machine.run(PRODUCT_KERNELS[product.name], arrays, d, grid=len(a))
    result = np.empty_like(c)
    result[:, rows, columns] = d
    return result


def words(elements: Array) -> Array:
    return np.ascontiguousarray(elements).view(np.uint32)


def model(product: Product, rule: hostcuda.TensorCores, a: Array, b: Array, c: Array) -> Array:
    """The same, block by block of products, in rational numbers."""
    a, b, result = product.truncated(a), product.truncated(b), c.copy()
    block = min(rule.block_bytes // (2 if product.packed else 4), product.depth)
    for s, i, j in np.ndindex(*c.shape):
        for k in range(0, product.depth, block):
            x, y = a[s, i, k : k + block], b[s, k : k + block, j]
            result[s, i, j] = add_products(x, y, result[s, i, j], product.least_exponent, rule.fraction_bits)
    return result


def add_products(x: Array, y: Array, c: np.float32, least_exponent: int, fraction_bits: int) -> float:
    """x[0]*y[0] + x[1]*y[1] + ... + c, cut off behind the last bit that the largest term leaves room for."""
    with np.errstate(invalid="ignore"):
        plain = float((x * y).sum() + float(c))
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(c)):
        return plain
    terms = [(Fraction(float(c)), exponent(float(c), -126))]
    for p, q in zip(x.tolist(), y.tolist(), strict=True):
        terms.append((Fraction(p) * Fraction(q), exponent(p, least_exponent) + exponent(q, least_exponent)))
    last_bit = Fraction(2) ** (max([-126, *(e for value, e in terms if value)]) - fraction_bits)
    return toward_zero(sum((int(value / last_bit) for value, _ in terms), 0) * last_bit)


def exponent(x: float, least: int) -> int:
    return max(math.frexp(x)[1] - 1, least)


def toward_zero(value: Fraction) -> float:
    """The next float32 toward zero; infinite from 2**128 on."""
    magnitude = abs(value)
    if magnitude >= 2**128:
        return math.copysign(math.inf, value)
    leading = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    leading -= magnitude < Fraction(2) ** leading
    last_bit = Fraction(2) ** (max(leading, -126) - 23)
    return math.copysign(float(int(magnitude / last_bit) * last_bit), value)


Operands = tuple[Array, Array, Array]


def shapes(product: Product, count: int) -> tuple[tuple[int, int, int], ...]:
    return (count, 16, product.depth), (count, product.depth, 8), (count, 16, 8)


def integers(product: Product, rng: np.random.Generator) -> Operands:
    """Sums that every rule gives exactly."""
    a, b, c = (rng.integers(-9, 10, shape) for shape in shapes(product, 2))
    return a.astype(product.dtype), b.astype(product.dtype), c.astype(np.float32)


def normal(product: Product, rng: np.random.Generator) -> Operands:
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in shapes(product, 3))
    return a.astype(product.dtype), b.astype(product.dtype), c


def cancelling(product: Product, rng: np.random.Generator) -> Operands:
    """Large products of both signs, and what little they leave: less than what is cut off, and somewhat more."""
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in shapes(product, 3))
    a[..., 1::2], b[:, 1::2] = a[..., ::2], -b[:, ::2]
    a[..., 2:4], c[:] = a[..., 2:4] * 2.0**-13, c * 2.0**-14
    return a.astype(product.dtype), b.astype(product.dtype), c


def magnitudes(product: Product, rng: np.random.Generator) -> Operands:
    """Exponents far apart, and accumulators of the same sign as the sum, which rounds at every bit."""
    span = 14 if product.dtype == np.float16 else 60
    a, b, c = (rng.uniform(-2, 2, shape) * 2.0 ** rng.integers(-span, span + 1, shape) for shape in shapes(product, 3))
    return (
        a.astype(product.dtype),
        b.astype(product.dtype),
        (c * 2.0 ** rng.integers(-20, 21, c.shape)).astype(np.float32),
    )


def subnormals(product: Product, rng: np.random.Generator) -> Operands:
    """Operands or sums, or both, below the normal numbers: of float16 the sums only where nothing but c is in them."""
    a, b, c = (rng.uniform(-4, 4, shape) for shape in shapes(product, 3))
    least = 2.0**product.least_exponent
    a *= np.array([least, least, 2.0**-64])[:, None, None]
    b *= np.array([1.0, least, 2.0 ** max(product.least_exponent, -64)])[:, None, None]
    c *= np.array([least, 2.0**-127, 2.0**-127])[:, None, None]
    return a.astype(product.dtype), b.astype(product.dtype), c.astype(np.float32)


def overflowing(product: Product, rng: np.random.Generator) -> Operands:
    """Sums around the largest float32, from both sides, and products beyond it that cancel each other."""
    a, b, c = (rng.uniform(0.5, 1, shape) for shape in shapes(product, 4))
    span = 12 if product.dtype == np.float16 else 60
    a, b, c = a * 2.0**span, b * 2.0 ** (span + 3), c * 2.0**128
    a[1], c[1] = -a[1], -c[1]
    b[2] *= 2.0 ** (0 if product.dtype == np.float16 else 30)
    a[2, :, 1::2], b[2, 1::2] = a[2, :, ::2], -b[2, ::2]
    a[3], b[3], c[3] = a[3] * 2.0 ** (54 - 60), b[3] * 2.0 ** (47 - 63), 2.0**128  # products of one place or none
    largest = float(np.finfo(np.float32).max)
    return a.astype(product.dtype), b.astype(product.dtype), np.clip(c, -largest, largest).astype(np.float32)


def infinities_and_nans(product: Product, rng: np.random.Generator) -> Operands:
    """One special value in some of the rows, columns and accumulators; zeros to make NaNs of infinities.

    Among them a NaN that the tensor cores take for an infinity, when the low bits of a TF32 operand go.
    """
    a, b, c = (rng.integers(-2, 3, shape).astype(np.float32) for shape in shapes(product, 6))
    for array in (a, b, c):
        where = rng.random(array.shape) < (0.03 if array is not c else 0.1)
        special = rng.choice([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001], array.shape).astype(np.uint32)
        array[where] = special.view(np.float32)[where]
    with np.errstate(invalid="ignore"):
        return a.astype(product.dtype), b.astype(product.dtype), c


def random_bits(product: Product, rng: np.random.Generator) -> Operands:
    """Every finite pattern of the type."""
    finite = []
    for shape, dtype in zip(shapes(product, 3), (product.dtype, product.dtype, np.float32), strict=True):
        unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
        bits = rng.integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
        top = np.array(np.inf, dtype).view(unsigned)
        finite.append(np.where(bits & top == top, 0, bits).astype(unsigned).view(dtype))
    return finite[0], finite[1], finite[2]


OPERANDS = (integers, normal, cancelling, magnitudes, subnormals, overflowing, infinities_and_nans, random_bits)
Generate = Callable[[Product, np.random.Generator], Operands]


def check_product(machine: Machine, product: Product, operands: Generate) -> Array:
    a, b, c = operands(product, np.random.default_rng(len(product.name)))
    d = multiply(machine, product, a, b, c)
    np.testing.assert_array_equal(d, model(product, machine.tensor_cores, a, b, c))
    return d


@pytest.mark.parametrize("operands", OPERANDS, ids=lambda operands: operands.__name__)
@pytest.mark.parametrize("name", PRODUCTS)
def test_product_of_matrices(machine: Machine, name: str, operands: Generate) -> None:
    product = PRODUCTS[name]
    if not machine.is_gpu or has_product(runtime.device(0).arch_name, product):  # else it does not compile: see below
        check_product(machine, product, operands)


def test_launches_count_their_products() -> None:
    """One of each warp, however many schedules run it."""
    counts = hostcuda.Counts()
    zeros = {name: np.zeros((7, WARP, size), np.uint32) for name, size in (("a_in", 4), ("b_in", 2))}
    arrays = {**zeros, "c": np.zeros((7, WARP, 4), np.float32), "output": np.empty((7, WARP, 4), np.float32)}
    launch = Launch(7, WARP, 0, 32, (("n", 0),))
    hostcuda.run(PRODUCT_KERNELS["multiply_matrices_f16"], launch, arrays, schedule="every", counts=counts)
    assert (counts.products, counts.loads, counts.wavefronts) == (7, 0, 0)


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_of_matrices_by_other_tensor_cores(name: str) -> None:
    """Shorter blocks and fewer bits give other sums, and the ones that the model says."""
    product = PRODUCTS[name]
    sums = [
        [check_product(Machine(rule), product, operands) for operands in (normal, cancelling, magnitudes)]
        for rule in (hostcuda.HOPPER, hostcuda.AMPERE, hostcuda.TensorCores(8, 23))
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert any((x != y).any() for x, y in zip(sums[first], sums[second], strict=True))


def test_operands_reach_what_they_are_for() -> None:
    """Sums that are subnormal, that overflow and that just do not, that are NaN: the tests above see all of them."""
    tiny, largest = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    for product in PRODUCTS.values():
        for operands, kinds in (
            (subnormals, (lambda d: (abs(d) < tiny) & (d != 0),)),
            (infinities_and_nans, (np.isnan, np.isposinf, np.isneginf, np.isfinite)),
            (overflowing, (np.isinf, lambda d: d == largest, lambda d: abs(d) < largest)),
        ):
            if operands is overflowing and product.dtype == np.float16:
                continue  # its largest product is 2**32
            a, b, c = operands(product, np.random.default_rng(len(product.name)))
            d = model(product, hostcuda.HOPPER, a, b, c)
            assert [kind(d).any() for kind in kinds] == [True] * len(kinds), (product.name, operands.__name__)


ROWS = 64  # of 16 bytes, in shared memory


def load_kernel(name: str) -> hostcuda.Program:
    return kernel(
        f"run_{name}",
        "const uint4* __restrict__ rows, const int* __restrict__ row_of_lane, unsigned* __restrict__ output",
        f"""
        uint4* const stored = reinterpret_cast<uint4*>(smem);
        for (int row = lane; row < {ROWS}; row += {WARP}) stored[row] = rows[row];
        __syncwarp();
        unsigned fragment[4];
        {name}(fragment, stored + row_of_lane[lane]);
        for (int j = 0; j < 4; ++j) output[4 * lane + j] = fragment[j];
        """,
    )


LOADS = {"load_matrix_x4": "LDSM.16.M88.4", "load_matrix_x4_transposed": "LDSM.16.MT88.4"}  # with their instructions
LOAD_KERNELS = {name: load_kernel(name) for name in LOADS}


@pytest.mark.parametrize("name", LOADS)
def test_matrices_from_shared_memory(machine: Machine, name: str) -> None:
    rows = np.arange(8 * ROWS, dtype=np.uint16).reshape(ROWS, 8)
    row_of_lane = np.random.default_rng(4).integers(0, ROWS, WARP, dtype=np.int32)
    matrices = rows[row_of_lane].reshape(4, 8, 8)
    if name.endswith("transposed"):
        matrices = matrices.transpose(0, 2, 1)
    # Each register of each lane holds two neighbours of a row.
    expected = words(matrices[:, GROUP, 2 * IN_GROUP + np.arange(2)])[..., 0].T

    fragments = np.empty((WARP, 4), np.uint32)
    arrays = {"rows": words(rows), "row_of_lane": row_of_lane}
    machine.run(LOAD_KERNELS[name], arrays, fragments, shared_bytes=16 * ROWS)
    np.testing.assert_array_equal(fragments, expected)


VECTORS = {4: "unsigned", 8: "uint2", 16: "uint4"}
FAR_AWAY = 1 << 16  # elements behind the arrays, where nothing may be read


def copy_kernel(num_bytes: int) -> hostcuda.Program:
    vector = VECTORS[num_bytes]
    return kernel(
        f"copy_{num_bytes}",
        f"const {vector}* __restrict__ input, const int* __restrict__ exists, {vector}* __restrict__ output",
        f"""
        {vector}* const stored = reinterpret_cast<{vector}*>(smem);
        copy_async_or_zero(stored + lane, input + (exists[lane] ? lane : lane + n), exists[lane] != 0);
        copy_async_commit();
        copy_async_wait_group<0>();
        __syncwarp();
        output[lane] = stored[{WARP - 1} - lane];
        """,
    )


COPY_KERNELS = {num_bytes: copy_kernel(num_bytes) for num_bytes in VECTORS}


@pytest.mark.parametrize("num_bytes", VECTORS)
def test_copy_or_zero(machine: Machine, num_bytes: int) -> None:
    rng = np.random.default_rng(num_bytes)
    values = rng.integers(1, 2**31, (WARP, num_bytes // 4), dtype=np.uint32)
    exists = rng.integers(0, 2, WARP, dtype=np.int32)
    output = np.empty_like(values)
    machine.run(
        COPY_KERNELS[num_bytes],
        {"input": values, "exists": exists},
        output,
        n=FAR_AWAY,
        shared_bytes=num_bytes * WARP,
    )
    np.testing.assert_array_equal(output, np.where(exists[:, None] != 0, values, 0)[::-1])


def group_kernel(name: str, body: str) -> hostcuda.Program:
    """Has `stored`, shared floats, and begins copies of input[32*k...] to stored[32*k...], a group each, k = 0 to 2."""
    return kernel(
        name,
        "const float* __restrict__ input, float* __restrict__ output",
        f"""
        float* const stored = reinterpret_cast<float*>(smem);
        for (int k = 0; k < 3; ++k) {{
            copy_async(stored + {WARP} * k + lane, input + {WARP} * k + lane);
            copy_async_commit();
        }}
        {body}
        """,
    )


GROUPS_IN_ORDER = group_kernel(
    "groups_in_order",
    f"""
    copy_async_wait_group<2>();
    __syncwarp();
    output[lane] = stored[{WARP - 1} - lane];
    copy_async_wait_group<1>();
    __syncwarp();
    output[{WARP} + lane] = stored[{2 * WARP - 1} - lane];
    copy_async_wait();
    __syncwarp();
    output[{2 * WARP} + lane] = stored[{3 * WARP - 1} - lane];
    """,
)


def test_groups_of_copies_arrive_in_order(machine: Machine) -> None:
    x = np.random.default_rng(0).standard_normal((3, WARP)).astype(np.float32)
    y = machine.run(GROUPS_IN_ORDER, {"input": x}, np.empty_like(x), shared_bytes=x.nbytes)
    np.testing.assert_array_equal(y, x[:, ::-1])


COPIES_COME_ONCE = group_kernel(
    "copies_come_once",
    f"""
    copy_async_wait_group<0>();
    stored[lane] = -1;
    copy_async(stored + {WARP} + lane, input + {2 * WARP} + lane);
    copy_async_commit();
    copy_async_wait_group<0>();
    for (int k = 0; k < 3; ++k) output[{WARP} * k + lane] = stored[{WARP} * k + lane];
    """,
)


def test_copies_come_once(machine: Machine) -> None:
    """What is stored after a copy has arrived stays."""
    x = np.random.default_rng(0).standard_normal((3, WARP)).astype(np.float32)
    y = machine.run(COPIES_COME_ONCE, {"input": x}, np.empty_like(x), shared_bytes=x.nbytes)
    np.testing.assert_array_equal(y, [np.full(WARP, -1), x[2], x[2]])


ROUND = kernel(
    "round_values",
    "const float* __restrict__ input, float* __restrict__ output",
    f"""
    const int i = blockIdx.x * {WARP} + lane;
    output[2 * i] = round_to_tf32(input[i]);
    output[2 * i + 1] = round_to_finite_tf32(input[i]);
    """,
)
SPLIT = kernel(
    "split_values",
    "const float* __restrict__ input, float2* __restrict__ output",
    f"const int i = blockIdx.x * {WARP} + lane; split_tf32(input[i], &output[i].x, &output[i].y);",
)


def floats_of_all_kinds() -> Array:
    """Random patterns, numbers around the ties of rounding and around the ends of ranges, infinities and NaNs."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 8192, np.uint32)
    ends = rng.choice([0x00000000, 0x0C800000, 0x7F000000, 0x7F7FE000, 0x7F800000], 1024)
    bits[:1024] = ends + rng.integers(-0x2000, 0x2000, 1024) & 0xFFFFFFFF
    bits[1024:2048] = bits[1024:2048] & 0xFFFFE000 | rng.choice([0, 0x0FFF, 0x1000, 0x1001, 0x1FFF], 1024)
    bits[2048:2064] = [
        *(0x00000000, 0x80000000, 0x00000001, 0x00000FFF, 0x00001000, 0x807FFFFF, 0x7F7FEFFF, 0x7F7FF000),
        *(0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFF801000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000),
    ]
    return bits.view(np.float32)


def seen_by_tensor_cores(x: Array) -> Array:
    return (x.view(np.uint32) & 0xFFFFE000).view(np.float32)


def test_rounding_to_tf32(machine: Machine) -> None:
    x = floats_of_all_kinds()
    both = machine.run(ROUND, {"input": x}, np.empty((len(x), 2), np.float32), grid=len(x) // WARP)

    finite = np.isfinite(x)
    exact = x[finite].astype(np.float64)
    last_place = 2.0 ** (np.maximum(np.frexp(exact)[1] - 1, -126) - 10)
    rounded = np.copysign(np.floor(abs(exact) / last_place + 0.5), exact) * last_place
    largest = float(np.uint32(0x7F7FE000).view(np.float32))
    with np.errstate(over="ignore"):
        unbounded = rounded.astype(np.float32)
    bounded = np.clip(rounded, -largest, largest).astype(np.float32)
    assert (unbounded != bounded).any()
    for y, expected in zip(both.T, (unbounded, bounded), strict=True):
        np.testing.assert_array_equal(y[finite].view(np.uint32), expected.view(np.uint32))
        np.testing.assert_array_equal(y[np.isinf(x)], x[np.isinf(x)])
        np.testing.assert_array_equal(np.isnan(seen_by_tensor_cores(y)), np.isnan(x))


def test_splitting_into_tf32(machine: Machine) -> None:
    """Exact from 2^-102 on although subnormals are flushed, which are zeros; refused where it could not be."""
    x = floats_of_all_kinds()
    hi, lo = machine.run(SPLIT, {"input": x}, np.empty((len(x), 2), np.float32), grid=len(x) // WARP).T
    x = np.where(abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    is_split = (abs(x) >= 2.0**-102) & (abs(x) < 2.0**127) | (x == 0)
    assert 100 < np.count_nonzero(~is_split) < len(x) - 100
    np.testing.assert_array_equal(np.isnan(seen_by_tensor_cores(hi)), ~is_split)

    x, hi, lo = (values[is_split].astype(np.float64) for values in (x, hi, lo))
    np.testing.assert_array_equal(hi + lo, x)
    assert (abs(lo) <= 2.0**-11 * abs(x)).all()
    np.testing.assert_array_equal(seen_by_tensor_cores(hi.astype(np.float32)), hi)
    assert ((lo == 0) | (abs(lo) >= np.finfo(np.float32).tiny)).all()


def stage_program(is_split: bool) -> hostcuda.Program:
    """Each lane stages its four values, alone and with those of the next lane, by staging.cuh: 4 rows, and one by one.

    An odd lane stages its own alone.
    """
    macros = {"DTYPE": "float32", "INDEX_BITS": 32, "IS_SPLIT": int(is_split)}
    macros |= {"BLOCK_M": 16, "BLOCK_N": 16, "WARPS_M": 1, "WARPS_N": 1, "MULTIPLY_MATRICES": "multiply_matrices_f16"}
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return hostcuda.Program(
        "stage_values",
        f"""{defines}{inlined("staging.cuh")}
#line 1 "stage_values.cu"
extern "C" __global__ void __launch_bounds__({WARP}) stage_values(
    const float* __restrict__ input, float* __restrict__ output, const int n) {{
    const int lane = threadIdx.x;
    const float* const x = input + (blockIdx.x * {WARP} + lane) * 4;
    float* const y = output + (blockIdx.x * {WARP} + lane) * 32;
    Vector<unsigned>* const row = reinterpret_cast<Vector<unsigned>*>(dynamic_shared_memory()) + lane;
    for (int i = 0; i < 6; ++i) row[i * {WARP}] = Vector<unsigned>();
    Block<1> blocks[2];
    blocks[0].load(x, 1);
    blocks[1].load(input + (blockIdx.x * {WARP} + (lane + 1) % {WARP}) * 4, 1);
    stage(blocks[0], row, {WARP});
    stage_blocks(blocks, row + 2 * {WARP}, 2 * {WARP}, {WARP}, [&](int i) {{ return i == 0 || lane % 2 == 0; }});
    for (int i = 0; i < 4; ++i) {{
        float hi = round_to_tf32(x[i]), lo = 0.0f;
        if (IS_SPLIT) split_tf32(x[i], &hi, &lo);
        for (int j = 0; j < 6; ++j) y[4 * j + i] = uint_as_float(row[j * {WARP}].element[i]);
        y[24 + i] = hi;
        y[28 + i] = round_to_tf32(lo);
    }}
}}
""",
    )


@pytest.mark.parametrize("is_split", [False, True], ids=["rounded", "split"])
def test_staging_values_at_once(machine: Machine, is_split: bool) -> None:
    """Where all are ordinary numbers, and where a single one is not, tensor cores see what they would of each alone."""
    kinds = floats_of_all_kinds()
    x = np.random.default_rng(1).standard_normal((len(kinds), 4)).astype(np.float32)
    x[:, 0] *= np.arange(len(x)) % 2
    x[np.arange(len(x)), np.arange(len(x)) % 4] = kinds
    y = machine.run(
        stage_program(is_split), {"input": x}, np.empty((len(x), 4, 2, 4), np.float32),
        grid=len(x) // WARP, shared_bytes=6 * WARP * 16,
    )  # fmt: skip
    alone, first, second, expected = np.moveaxis(seen_by_tensor_cores(y), 1, 0)
    of_next = np.roll(expected.reshape(-1, WARP, 2, 4), -1, axis=1).reshape(expected.shape)
    for staged, right in ((alone, expected), (first, expected), (second[::2], of_next[::2])):
        np.testing.assert_array_equal(staged[:, 0], right[:, 0])
        counts = ~np.isnan(right[:, 0])  # else the other part says nothing
        np.testing.assert_array_equal(staged[:, 1][counts], right[:, 1][counts])
    assert not second[1::2].any()


VOTE = kernel(
    "vote",
    "const int* __restrict__ input, int* __restrict__ output",
    f"const int i = blockIdx.x * {WARP} + lane; output[i] = any_lane(input[i] != 0) ? 1 : 0;",
)


def test_whether_any_lane_votes_for_it(machine: Machine) -> None:
    votes = np.zeros((5, WARP), np.int32)
    votes[1, 0] = votes[2, 31] = votes[3, 17] = 1
    votes[4] = 1
    result = machine.run(VOTE, {"input": votes}, np.empty_like(votes), grid=len(votes))
    np.testing.assert_array_equal(result, np.broadcast_to([[0], [1], [1], [1], [1]], votes.shape))


@dataclass(frozen=True)
class Fault:
    """A kernel that hostcuda must refuse: the error, a pattern of its message, the program."""

    error: type[HostCudaError]
    message: str
    program: hostcuda.Program


def load_fault(name: str, body: str) -> hostcuda.Program:
    """Has `row`, a pointer to the lane's own 16 bytes of `smem`, and `fragment` for four matrices."""
    return kernel(
        name,
        "const float* __restrict__ input, float* __restrict__ output",
        f"""
        unsigned fragment[4] = {{}};
        unsigned char* const row = smem + 16 * lane;
        for (int i = 0; i < 4; ++i) reinterpret_cast<float*>(row)[i] = 0;
        {body}
        output[lane] = uint_as_float(fragment[0]) + uint_as_float(fragment[1]);
        """,
    )


def poisoned_product(name: str, wrapper: str, operand: str) -> hostcuda.Program:
    """One operand of one lane comes from shared memory that nothing has written."""
    return kernel(
        name,
        "const float* __restrict__ input, float* __restrict__ output",
        f"""
        unsigned a[4] = {{}}, b[2] = {{}};
        float d[4] = {{}};
        if (lane == 5) {operand} = *reinterpret_cast<{"float" if operand[0] == "d" else "unsigned"}*>(smem);
        {wrapper}(d, a, b);
        output[lane] = d[0] + d[1] + d[2] + d[3] + input[lane];
        """,
    )


UNWRITTEN = "elements of output are computed from shared memory that was never written"
FAULTS = {
    fault.program.kernel: fault
    for fault in (
        Fault(
            MisalignedError,
            r"misaligned ldmatrix: a row needs an address divisible by 16; got element offset 56 of shared memory",
            load_fault("misaligned_row", "__syncwarp(); load_matrix_x4(fragment, row + (lane == 3 ? 8 : 0));"),
        ),
        Fault(
            OutOfBoundsError,
            r"thread 31: ldmatrix of a row outside shared memory, at element offset 512 of shared memory",
            load_fault(
                "row_outside", "__syncwarp(); load_matrix_x4_transposed(fragment, row + (lane == 31 ? 16 : 0));"
            ),
        ),
        Fault(
            OutOfBoundsError,
            r"ldmatrix of a row outside shared memory, at element offset 0 of input",
            load_fault(
                "row_in_global_memory", "__syncwarp(); load_matrix_x4(fragment, lane == 0 ? input : (float*)row);"
            ),
        ),
        Fault(
            DivergenceError,
            r"divergent load_matrix_x4: thread 0 waits at .*, but thread 16, which the mask names, has returned",
            load_fault("half_a_load", "__syncwarp(); if (lane < 16) load_matrix_x4(fragment, row);"),
        ),
        Fault(
            PoisonReadError,
            UNWRITTEN,
            load_fault("load_before_meeting", "load_matrix_x4(fragment, smem + 16 * (lane ^ 1));"),
        ),
        Fault(
            DivergenceError,
            r"divergent multiply_matrices_f16: thread 0 waits at .*, but thread 1.* waits in multiply_matrices_bf16",
            load_fault(
                "two_products",
                """unsigned a[4] = {}, b[2] = {}; float d[4] = {};
                if (lane % 2 == 0) multiply_matrices_f16(d, a, b);
                else multiply_matrices_bf16(d, a, b);""",
            ),
        ),
        *(
            Fault(PoisonReadError, rf"\d+ of 32 {UNWRITTEN}", poisoned_product(f"poison_{i}", wrapper, operand))
            for i, (wrapper, operand) in enumerate(
                (wrapper, operand)
                for wrapper in ("multiply_matrices_f16", "multiply_matrices_bf16", "multiply_matrices_tf32")
                for operand in ("a[0]", "b[1]", "d[2]")
            )
        ),
        Fault(
            PoisonReadError,
            UNWRITTEN,
            group_kernel(
                "group_still_on_its_way", f"copy_async_wait_group<1>(); output[lane] = stored[{2 * WARP} + lane];"
            ),
        ),
        Fault(
            PoisonReadError,
            UNWRITTEN,
            group_kernel(
                "copy_in_no_group",
                f"""copy_async(stored + {3 * WARP} + lane, input + lane);
                copy_async_wait_group<0>();
                output[lane] = stored[{3 * WARP} + lane];""",
            ),
        ),
        Fault(
            ScheduleError,
            r"under schedule 'reverse' \(32 of 32 elements differ\)",
            group_kernel(
                "old_data_under_a_copy",
                f"""copy_async_wait();
                copy_async(stored + lane, input + {WARP} + lane);
                output[lane] = stored[lane];
                copy_async_wait();""",
            ),
        ),
        Fault(
            MisalignedError,
            r"misaligned cp.async: 8 bytes need addresses divisible by 8; got element offset 1 of input",
            kernel(
                "misaligned_and_absent",
                "const float* __restrict__ input, float* __restrict__ output",
                """copy_async_or_zero(
                    reinterpret_cast<float2*>(smem),
                    reinterpret_cast<const float2*>(reinterpret_cast<const char*>(input) + 4), false);
                output[lane] = 0;""",
            ),
        ),
    )
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    others = (GROUPS_IN_ORDER, COPIES_COME_ONCE, ROUND, SPLIT, VOTE, *(fault.program for fault in FAULTS.values()))
    hostcuda.prebuild([*PRODUCT_KERNELS.values(), *LOAD_KERNELS.values(), *COPY_KERNELS.values(), *others])


@pytest.mark.parametrize("name", FAULTS)
def test_misuse_is_caught(name: str) -> None:
    fault = FAULTS[name]
    x = np.arange(3 * WARP, dtype=np.float32)
    launch = Launch(1, WARP, 512, 32, (("n", 0),))
    with pytest.raises(fault.error, match=fault.message):
        hostcuda.run(fault.program, launch, {"input": x, "output": np.empty(WARP, np.float32)}, schedule="every")


def test_a_late_copy_leaves_poison_under_a_random_schedule() -> None:
    """The old data is nothing to count on: a copy may have begun to arrive."""
    program = FAULTS["old_data_under_a_copy"].program
    arrays = {"input": np.arange(3 * WARP, dtype=np.float32), "output": np.empty(WARP, np.float32)}
    with pytest.raises(PoisonReadError, match=UNWRITTEN):
        hostcuda.run(program, Launch(1, WARP, 512, 32, (("n", 0),)), arrays, schedule=1)


ARCHS = tuple(ARCHITECTURES)


@cache
def machine_code(arch: str) -> dict[str, list[str]]:
    """The opcodes of all kernels that the architecture has instructions for, by name."""
    programs = [PRODUCT_KERNELS[name] for name, product in PRODUCTS.items() if has_product(arch, product)]
    programs += [*LOAD_KERNELS.values(), *COPY_KERNELS.values(), GROUPS_IN_ORDER]
    text = HEADERS + "".join(program.text.removeprefix(HEADERS) for program in programs)
    cubin, log, _ = sass.compile_cubin(text, "instructions", arch)
    code = sass.disassemble(cubin)
    for program in programs:
        usage = sass.parse_log(log, program.kernel)
        assert usage.stack_bytes + usage.spill_store_bytes + usage.spill_load_bytes == 0, program.kernel
    return {p.kernel: [i.opcode for i in sass.parse_disassembly(code, p.kernel)] for p in programs}


def has_product(arch: str, product: Product) -> bool:
    return arch != "sm_75" or product.dtype == np.float16


def opcodes(arch: str, program: hostcuda.Program, names: str) -> list[str]:
    return [opcode for opcode in machine_code(arch)[program.kernel] if opcode.partition(".")[0] in names.split()]


@pytest.mark.parametrize("arch", ARCHS)
def test_products_are_one_instruction(arch: str) -> None:
    for name, product in PRODUCTS.items():
        if has_product(arch, product):
            is_split = arch == "sm_75" and product.depth == 16  # into two of depth 8
            expected = ["HMMA.1688.F32"] * 2 if is_split else [product.opcode]
            assert opcodes(arch, PRODUCT_KERNELS[name], "HMMA QMMA OMMA") == expected, name


@pytest.mark.parametrize("name", ["multiply_matrices_bf16", "multiply_matrices_tf32"])
def test_a_kernel_that_names_a_product_of_newer_gpus_does_not_compile(name: str) -> None:
    program = PRODUCT_KERNELS[name]
    with pytest.raises(RuntimeError, match=rf'function "{name}.* is a deleted function'):
        sass.compile_cubin(program.text, program.kernel, "sm_75")


@pytest.mark.parametrize("arch", ARCHS)
def test_loads_of_matrices_are_one_instruction(arch: str) -> None:
    for name, opcode in LOADS.items():
        assert opcodes(arch, LOAD_KERNELS[name], "LDSM") == [opcode], name


@pytest.mark.parametrize("arch", ARCHS)
def test_copies_are_asynchronous_where_they_can_be(arch: str) -> None:
    exists = arch != "sm_75"
    for num_bytes, opcode in ((4, "LDGSTS.E"), (8, "LDGSTS.E.64"), (16, "LDGSTS.E.BYPASS.128")):
        assert opcodes(arch, COPY_KERNELS[num_bytes], "LDGSTS") == [opcode] * exists, num_bytes
    assert opcodes(arch, GROUPS_IN_ORDER, "LDGDEPBAR") == ["LDGDEPBAR"] * (
        4 * exists
    )  # copy_async_wait closes a group, too
