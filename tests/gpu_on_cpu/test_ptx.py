"""Every instruction that tests/gpu_on_cpu translates, against the PTX ISA's definition.

The definitions are written down here once more, in Python's integers, fractions and NumPy, without a look at ptx.h. All
kernels make one module, so that one compilation serves all tests.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.gpu_on_cpu import modules, ptx
from tests.gpu_on_cpu.errors import Code, CudaError
from tests.hostcuda import HOPPER

DTYPES: dict[str, Any] = {
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(np.uint32),
}


@dataclass(frozen=True)
class Case:
    """An instruction.

    Attributes:
        code: PTX with the operands d, a, b, c, e; a predicate as destination is p.
        types: of the destination and of each source.
        expected: the destination from the sources, as Python numbers.
    """

    code: str
    types: tuple[str, ...]
    expected: Callable[..., Any]

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "_", self.code)


def bits_of(kind: str) -> int:
    return 8 * DTYPES[kind].itemsize


def wrap(value: int, kind: str) -> int:
    """An integer modulo the type's range."""
    value %= 1 << bits_of(kind)
    return value - (1 << bits_of(kind)) if kind[0] == "s" and value >> (bits_of(kind) - 1) else value


@cache
def operands(kind: str) -> tuple[Any, ...]:
    """Numbers at which something changes."""
    if kind == "pred":
        return (0, 1)
    if kind in ("f32", "f64", "f16", "bf16"):
        finfo = ml_dtypes.finfo(DTYPES[kind]) if kind == "bf16" else np.finfo(DTYPES[kind])
        tiny, smallest, largest = float(finfo.tiny), float(finfo.smallest_subnormal), float(finfo.max)
        eps = float(finfo.eps)
        positive = [0.0, smallest, tiny - smallest, tiny, 0.5, 1.0, 1 + eps, 1.5, 2.5, 3.7, 100.5, largest, math.inf]
        if kind in ("f32", "f64"):
            positive += [
                1 + 2.0**-11,
                1 + 3 * 2.0**-11,
                1 + 2.0**-8,
                65519.0,
                65520.0,
                2.0**-25,
                2.0**31,
                2.0**32,
                2.0**63,
            ]
            positive += [2.0**64, 6.1e-5, 2.0**-24 * 1.5]
        if kind == "f64":
            positive += [1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11 - 2.0**-40, 1 + 2.0**-8 - 2.0**-50, 1 + 2.0**-24]
        with np.errstate(over="ignore"):
            values = np.array([*positive, *(-x for x in positive), math.nan]).astype(DTYPES[kind])
        return tuple(values.tolist() if kind != "bf16" else values.astype(np.float64).tolist())
    bits = bits_of(kind)
    values = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 255, 0x12345678, 0x80, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    values += [
        (1 << bits) - 1,
        (1 << bits) - 2,
        0x5555555555555555,
        (1 << 53) + 1,
        (1 << 62) + (1 << 9) + 1,
        2049,
        4097,
    ]
    return tuple(dict.fromkeys(wrap(value, kind) for value in values))


def rounded(value: Fraction, kind: str) -> float:
    """The nearest number of a type, ties to even; overflow gives infinity."""
    digits, least = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126), "f64": (53, -1022)}[kind]
    largest = {"f16": 15, "bf16": 127, "f32": 127, "f64": 1023}[kind]
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - digits + 1)
    result = round(magnitude / unit) * unit  # Python rounds ties to even
    if result >= Fraction(2) ** (largest + 1):
        return math.inf if value > 0 else -math.inf
    return float(result) if value > 0 else -float(result)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if 0 < abs(x) < 2.0**-126 else x


def to_kind(value: float, kind: str) -> float:
    """A float64 as a type of fewer bits; infinities, NaN and signs of zeros stay."""
    if math.isnan(value) or math.isinf(value) or value == 0:
        return value
    return rounded(Fraction(value), kind)


def divided(a: int, b: int, kind: str) -> int:
    if b == 0:
        return wrap(-1, kind)
    return wrap(abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1), kind)


def remainder(a: int, b: int, kind: str) -> int:
    return a if b == 0 else wrap(a - b * (abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)), kind)


def fused(a: float, b: float, c: float, kind: str) -> float:
    if math.isinf(c) and math.isfinite(a) and math.isfinite(b):
        return c
    if not all(map(math.isfinite, (a, b, c))):
        with np.errstate(invalid="ignore", over="ignore"):
            return float(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        product_negative = math.copysign(1, a) * math.copysign(1, b) < 0
        both = (a == 0 or b == 0) and c == 0 and product_negative and math.copysign(1, c) < 0
        return -0.0 if both else 0.0
    return rounded(exact, kind)


def with_numpy(function: Any, kind: str) -> Callable[..., float]:
    def evaluate(*values: float) -> float:
        with np.errstate(all="ignore"):
            return float(function(*(DTYPES[kind].type(v) for v in values)))

    return evaluate


def least(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return a if (a, math.copysign(1, a)) < (b, math.copysign(1, b)) else b


def greatest(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return a if (a, math.copysign(1, a)) > (b, math.copysign(1, b)) else b


def permuted(a: int, b: int, selector: int) -> int:
    data = (a | b << 32).to_bytes(8, "little")
    picked = []
    for nibble in (selector >> 4 * i & 15 for i in range(4)):
        byte = data[nibble & 7]
        picked.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


def inserted(a: int, b: int, position: int, length: int, kind: str) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < bits_of(kind):
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def extracted(a: int, position: int, length: int, kind: str) -> int:
    position, length, msb = position & 255, length & 255, bits_of(kind) - 1
    sign = 0 if kind[0] == "u" or length == 0 else a >> min(position + length - 1, msb) & 1
    bits = [(a >> position + i & 1) if i < length and position + i <= msb else sign for i in range(msb + 1)]
    return wrap(sum(bit << i for i, bit in enumerate(bits)), kind)


def dotted(a: int, b: int, c: int, kinds: tuple[str, str], part: str) -> int:
    words = [wrap(a >> shift, f"{kinds[0][0]}16") for shift in (0, 16)]
    data = [wrap(b >> shift, f"{kinds[1][0]}8") for shift in ((0, 8) if part == "lo" else (16, 24))]
    return wrap(c + words[0] * data[0] + words[1] * data[1], "u32")


def dotted_bytes(a: int, b: int, c: int, kinds: tuple[str, str]) -> int:
    products = (wrap(a >> shift, f"{kinds[0][0]}8") * wrap(b >> shift, f"{kinds[1][0]}8") for shift in range(0, 32, 8))
    return wrap(c + sum(products), "u32")


def integral(x: float, mode: str) -> float:
    if not math.isfinite(x):
        return x
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode](x)
    return math.copysign(float(whole), x)


def to_integer(x: float, mode: str, kind: str) -> int:
    if math.isnan(x):
        return 0
    low, high = (
        (-(1 << bits_of(kind) - 1), (1 << bits_of(kind) - 1) - 1) if kind[0] == "s" else (0, (1 << bits_of(kind)) - 1)
    )
    if math.isinf(x):
        return high if x > 0 else low
    return min(max(int(integral(x, mode)), low), high)


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def comparison(name: str) -> Callable[[float, float], bool]:
    """Of floating-point numbers: NaN makes the plain ones false and those with a `u` true."""

    def evaluate(a: float, b: float) -> bool:
        unordered = math.isnan(a) or math.isnan(b)
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        return name.endswith("u") and len(name) == 3 if unordered else COMPARISONS[name[:2]](a, b)

    return evaluate


M32 = (1 << 32) - 1


def cases() -> list[Case]:
    found = []

    def add(code: str, types: str, expected: Callable[..., Any]) -> None:
        found.append(Case(code, tuple(types.split()), expected))

    for k in ("s32", "u32", "s64", "u64", "s16", "u16"):
        kinds = f"{k} {k} {k}"
        add(f"add.{k} d, a, b", kinds, lambda a, b, k=k: wrap(a + b, k))
        add(f"sub.{k} d, a, b", kinds, lambda a, b, k=k: wrap(a - b, k))
        add(f"mul.lo.{k} d, a, b", kinds, lambda a, b, k=k: wrap(a * b, k))
        add(f"mul.hi.{k} d, a, b", kinds, lambda a, b, k=k: wrap(a * b >> bits_of(k), k))
        add(f"mad.lo.{k} d, a, b, c", f"{kinds} {k}", lambda a, b, c, k=k: wrap(a * b + c, k))
        add(f"div.{k} d, a, b", kinds, lambda a, b, k=k: divided(a, b, k))
        add(f"rem.{k} d, a, b", kinds, lambda a, b, k=k: remainder(a, b, k))
        add(f"min.{k} d, a, b", kinds, min)
        add(f"max.{k} d, a, b", kinds, max)
        add(f"shr.{k} d, a, b", f"{k} {k} u32", lambda a, n: a >> n)  # Python's shift fills with the sign
        for name, compare in COMPARISONS.items():
            add(f"setp.{name}.{k} p, a, b", f"pred {k} {k}", compare)
        if k[1:] != "64":
            w = f"{k[0]}{2 * bits_of(k)}"
            add(f"mul.wide.{k} d, a, b", f"{w} {k} {k}", lambda a, b: a * b)
            add(f"mad.wide.{k} d, a, b, c", f"{w} {k} {k} {w}", lambda a, b, c, w=w: wrap(a * b + c, w))
        if k[0] == "s":
            add(f"neg.{k} d, a", f"{k} {k}", lambda a, k=k: wrap(-a, k))
            add(f"abs.{k} d, a", f"{k} {k}", lambda a, k=k: wrap(abs(a), k))
        if k in ("s32", "u32", "s64", "u64"):
            add(f"bfe.{k} d, a, b, c", f"{k} {k} u32 u32", lambda a, n, m, k=k: extracted(a, n, m, k))
    for name, compare in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
        add(f"setp.{name}.u32 p, a, b", "pred u32 u32", COMPARISONS[compare])
    for k in ("b16", "b32", "b64"):
        for name, function in (("and", lambda a, b: a & b), ("or", lambda a, b: a | b), ("xor", lambda a, b: a ^ b)):
            add(f"{name}.{k} d, a, b", f"{k} {k} {k}", function)
        add(f"not.{k} d, a", f"{k} {k}", lambda a, k=k: wrap(~a, k))
        add(f"cnot.{k} d, a", f"{k} {k}", lambda a: int(a == 0))
        add(f"shl.{k} d, a, b", f"{k} {k} u32", lambda a, n, k=k: wrap(a << n, k) if n < 64 else 0)
        add(f"selp.{k} d, a, b, c", f"{k} {k} {k} pred", lambda a, b, c: a if c else b)
    for k in ("b32", "b64"):
        add(f"popc.{k} d, a", f"u32 {k}", lambda a: a.bit_count())
        add(f"clz.{k} d, a", f"u32 {k}", lambda a, k=k: bits_of(k) - a.bit_length())
        add(f"brev.{k} d, a", f"{k} {k}", lambda a, k=k: int(f"{a:0{bits_of(k)}b}"[::-1], 2))
        add(f"bfi.{k} d, a, b, c, e", f"{k} {k} {k} u32 u32", lambda a, b, n, m, k=k: inserted(a, b, n, m, k))
    add("prmt.b32 d, a, b, c", "b32 b32 b32 b32", permuted)
    for mode, amount in (("wrap", lambda n: n & 31), ("clamp", lambda n: min(n, 32))):
        add(
            f"shf.l.{mode}.b32 d, a, b, c",
            "b32 b32 b32 u32",
            lambda a, b, n, f=amount: (b << 32 | a) << f(n) >> 32 & M32,
        )
        add(f"shf.r.{mode}.b32 d, a, b, c", "b32 b32 b32 u32", lambda a, b, n, f=amount: (b << 32 | a) >> f(n) & M32)
    for a_type, b_type, part in itertools.product(("u32", "s32"), ("u32", "s32"), ("lo", "hi")):
        add(f"dp2a.{part}.{a_type}.{b_type} d, a, b, c", f"b32 {a_type} {b_type} u32",
            lambda a, b, c, kinds=(a_type, b_type), part=part: dotted(a, b, c, kinds, part))  # fmt: skip
    for a_type, b_type in itertools.product(("u32", "s32"), repeat=2):
        add(f"dp4a.{a_type}.{b_type} d, a, b, c", f"b32 {a_type} {b_type} u32",
            lambda a, b, c, kinds=(a_type, b_type): dotted_bytes(a, b, c, kinds))  # fmt: skip
    add("mov.b64 d, {{a, b}}", "b64 b32 b32", lambda a, b: a | b << 32)
    add("mov.b32 d, {{a, b}}", "b32 b16 b16", lambda a, b: a | b << 16)
    add("mov.b64 {{_, d}}, a", "b32 b64", lambda a: a >> 32)
    add("mov.b32 {{d, _}}, a", "b16 b32", lambda a: a & 0xFFFF)

    for k in ("f32", "f64"):
        kinds = f"{k} {k} {k}"
        for ftz, flush in (("", lambda x: x), (".ftz", flushed)) if k == "f32" else (("", lambda x: x),):
            for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div.rn", np.divide)):
                evaluate = with_numpy(function, k)
                add(f"{name}{ftz}.{k} d, a, b", kinds, lambda a, b, e=evaluate, f=flush: f(e(f(a), f(b))))
            add(f"fma.rn{ftz}.{k} d, a, b, c", f"{kinds} {k}",
                lambda a, b, c, k=k, f=flush: f(fused(f(a), f(b), f(c), k)))  # fmt: skip
            if not ftz:
                add(f"copysign.{k} d, a, b", kinds, lambda a, b: math.copysign(b, a))
            root = with_numpy(np.sqrt, k)
            add(f"sqrt.rn{ftz}.{k} d, a", f"{k} {k}", lambda a, e=root, f=flush: f(e(f(a))))
            reciprocal = with_numpy(lambda a, k=k: DTYPES[k].type(1) / a, k)
            add(f"rcp.rn{ftz}.{k} d, a", f"{k} {k}", lambda a, e=reciprocal, f=flush: f(e(f(a))))
            add(f"neg{ftz}.{k} d, a", f"{k} {k}", lambda a, f=flush: f(-a))
            add(f"abs{ftz}.{k} d, a", f"{k} {k}", lambda a, f=flush: f(abs(a)))
            add(f"min{ftz}.{k} d, a, b", kinds, lambda a, b, f=flush: least(f(a), f(b)))
            add(f"max{ftz}.{k} d, a, b", kinds, lambda a, b, f=flush: greatest(f(a), f(b)))
            for name in (*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num", "nan"):
                compare = comparison(name)
                add(f"setp.{name}{ftz}.{k} p, a, b", f"pred {k} {k}",
                    lambda a, b, e=compare, f=flush: e(f(a), f(b)))  # fmt: skip
    saturated = with_numpy(np.add, "f32")
    add("add.sat.f32 d, a, b", "f32 f32 f32",
        lambda a, b: 0.0 if math.isnan(s := saturated(a, b)) else min(max(s, 0.0), 1.0) or 0.0)  # fmt: skip
    for combine, join in (
        ("and", lambda x, y: x and y), ("or", lambda x, y: x or y), ("xor", lambda x, y: x != y),
    ):  # fmt: skip
        add(f"setp.lt.{combine}.s32 p, a, b, c", "pred s32 s32 pred", lambda a, b, c, j=join: j(a < b, bool(c)))
        add(f"setp.lt.{combine}.s32 q|p, a, b, !c", "pred s32 s32 pred", lambda a, b, c, j=join: j(a >= b, not c))

    for source, target in itertools.permutations(("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"), 2):
        add(f"cvt.{target}.{source} d, a", f"{target} {source}", lambda a, t=target: wrap(a, t))
        low = -(1 << bits_of(target) - 1) if target[0] == "s" else 0
        add(f"cvt.sat.{target}.{source} d, a", f"{target} {source}",
            lambda a, t=target, low=low: min(max(a, low), low + (1 << bits_of(t)) - 1))  # fmt: skip
    for f, i in itertools.product(("f16", "f32", "f64"), ("s32", "u32", "s64", "u64", "s16", "u16")):
        add(f"cvt.rn.{f}.{i} d, a", f"{f} {i}", lambda a, f=f: rounded(Fraction(a), f))
        for mode in ("rni", "rzi", "rmi", "rpi"):
            add(f"cvt.{mode}.{i}.{f} d, a", f"{i} {f}", lambda a, m=mode, i=i: to_integer(a, m, i))
    for mode in ("rni", "rzi", "rmi", "rpi"):
        for f in ("f32", "f64"):
            add(f"cvt.{mode}.{f}.{f} d, a", f"{f} {f}", lambda a, m=mode: integral(a, m))
    for source, target in (("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "f32")):
        add(f"cvt.rn.{target}.{source} d, a", f"{target} {source}", lambda a, t=target: to_kind(a, t))
    for source, target in (("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("f32", "f64")):
        add(f"cvt.{target}.{source} d, a", f"{target} {source}", lambda a: a)
    add("cvt.ftz.f64.f32 d, a", "f64 f32", flushed)
    add("cvt.rn.ftz.f32.f64 d, a", "f32 f64", lambda a: flushed(to_kind(a, "f32")))
    return found


CASES = {case.name: case for case in cases()}


def register_kind(kind: str) -> str:
    return kind if kind in ("f32", "f64") else f"b{max(bits_of(kind), 16)}"


def entry(case: Case) -> str:
    """A kernel whose block i, of one thread, does the instruction on the operands i."""
    names = "abce"[: len(case.types) - 1]
    lines, declared = [], []
    for i, kind in enumerate(case.types):
        name = "dabce"[i]
        lines += [f"ld.param.u64 %at{i}, [p{i}];", f"mad.wide.u32 %at{i}, %i, {DTYPES[kind].itemsize}, %at{i};"]
        if kind == "pred":
            declared += [f".reg .pred %{'p' if i == 0 else name};", f".reg .b32 %{name}_word;"]
            if i:
                lines += [f"ld.global.u32 %{name}_word, [%at{i}];", f"setp.ne.u32 %{name}, %{name}_word, 0;"]
        else:
            declared.append(f".reg .{register_kind(kind)} %{name};")
            if i:
                lines.append(f"ld.global.{'b16' if kind in ('f16', 'bf16') else kind} %{name}, [%at{i}];")
    instruction, _, given = case.code.replace("{{", "{").replace("}}", "}").partition(" ")
    named = re.sub(f"([dpq{names}])", r"%\1", given)
    lines.append(f"{instruction} {named};")
    if case.types[0] == "pred":
        lines += ["selp.u32 %d_word, 1, 0, %p;", "st.global.u32 [%at0], %d_word;"]
    else:
        kind = case.types[0]
        lines.append(f"st.global.{'b16' if kind in ('f16', 'bf16') else kind} [%at0], %d;")
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(case.types)))
    registers = ".reg .b64 %at<6>; .reg .b32 %i; .reg .pred %q; " + " ".join(declared)
    thread = "mov.u32 %i, %ctaid.x;"
    return f".visible .entry {case.name}({parameters})\n{{\n{registers} {thread}\n" + "\n".join(lines) + "\nret;\n}\n"


@cache
def module(flushing: bool) -> modules.Module:
    text = ".version 8.0\n.target sm_90\n.address_size 64\n"
    text += "".join(entry(case) for case in CASES.values() if (".ftz" in case.code) == flushing)
    return modules.Module(text.encode(), 0)


def execute(
    function: modules.Function, count: int, *arrays: np.ndarray[Any, Any], block: int = 1,
    bounds: tuple[int, int] = (0, 1 << 62),
) -> None:  # fmt: skip
    """Run a kernel on host arrays, in so many blocks."""
    addresses = np.array([array.ctypes.data for array in arrays], np.uint64)
    modules.run(
        function,
        count,
        block,
        0,
        addresses.tobytes(),
        bounds=bounds,
        cores=HOPPER,
        schedule="forward",
        seed=0,
        arenas=(),
    )


@pytest.mark.parametrize("name", CASES)
def test_an_instruction_does_what_the_isa_says(name: str) -> None:
    case = CASES[name]
    combinations = list(itertools.product(*(operands(kind) for kind in case.types[1:])))
    if len(combinations) > 3000:
        picked = np.random.default_rng(0).choice(len(combinations), 3000, replace=False)
        combinations = [combinations[i] for i in picked]
    columns = [
        np.array([row[i] for row in combinations], np.float64 if kind == "bf16" else DTYPES[kind]).astype(DTYPES[kind])
        for i, kind in enumerate(case.types[1:])
    ]
    result = np.zeros(len(combinations), DTYPES[case.types[0]])
    execute(module(".ftz" in case.code).function(name), len(combinations), result, *columns)
    for row, value in zip(combinations, result.tolist(), strict=True):
        expected = case.expected(*row)
        same = value == expected and (value != 0 or math.copysign(1, value) == math.copysign(1, expected))
        both_nan = isinstance(value, float) and math.isnan(value) and math.isnan(expected)
        assert same or both_nan, f"{case.code} of {row}: {value}, expected {expected}"


@pytest.mark.parametrize(
    "code",
    [
        "add.rz.f32 d, a, b;",
        "add.cc.u32 d, a, b;",
        "add.f16 d, a, b;",
        "mul24.lo.u32 d, a, b;",
        "cvt.rz.f16.f32 d, a;",
        "cvt.f32.s32 d, a;",
        "setp.lo.f32 p, a, b;",
        "sin.approx.f32 d, a;",
        "atom.global.add.u32 d, [a], b;",
        "bar.sync 1;",
        "bar.red.and.pred p, 0, p;",
        "prmt.b32.f4e d, a, b, c;",
        "shfl.up.b32 d, a, b, c;",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {d}, {a}, {b}, {c};",
        "mov.u32 d, %smid;",
        "add.u32 d, a, unknown;",
        "call f, (a);",
    ],
)
def test_what_is_not_known_is_refused_by_its_text(code: str) -> None:
    registers = ".reg .b32 %a, %b, %c, %d; .reg .pred %p;"
    opcode, _, rest = code.partition(" ")
    rest = re.sub(r"(?<![\w%.])([abcdp])(?!\w)", r"%\1", rest)
    text = f".visible .entry k()\n{{\n{registers}\n{opcode} {rest}\nret;\n}}\n"
    with pytest.raises(ptx.UnknownPtxError, match=re.escape(opcode)):
        ptx.translate(text)


def run_text(body: str, output: np.ndarray[Any, Any], *inputs: np.ndarray[Any, Any], block: int = 32) -> None:
    """Run PTX statements in which %out, %in0, ... are addresses and %lane is the thread's index."""
    names = ["%out", *(f"%in{i}" for i in range(len(inputs)))]
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(names)))
    loads = "".join(f".reg .b64 {name}; ld.param.u64 {name}, [p{i}];\n" for i, name in enumerate(names))
    text = f".visible .entry k({parameters})\n{{\n.reg .b32 %lane; mov.u32 %lane, %tid.x;\n{loads}{body}\nret;\n}}\n"
    function = modules.Module(text.encode(), 0).function("k")
    execute(function, 1, output, *inputs, block=block)


def element(pointer: str, number: int) -> str:
    """PTX that makes a pointer one to the lane's element of four bytes; `number` keeps registers apart."""
    return f".reg .b64 %o{number}; mul.wide.u32 %o{number}, %lane, 4; add.s64 {pointer}, {pointer}, %o{number};"


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("offset", [0, 1, 3, 7, 31])
def test_shuffles(mode: str, width: int, offset: int) -> None:
    """The ISA's pseudocode of shfl, for the clamp and the segments that __shfl_sync makes of a width."""
    segments = (32 - width) & 31
    clamp = 0 if mode == "up" else 31
    found = np.zeros((32, 2), np.uint32)
    run_text(
        f"""
        .reg .pred %p; .reg .b32 %v, %w, %x;
        .reg .b64 %at; mul.wide.u32 %at, %lane, 8; add.s64 %out, %out, %at;
        add.u32 %v, %lane, 100;
        shfl.sync.{mode}.b32 %w|%p, %v, {offset}, {segments << 8 | clamp}, -1;
        selp.u32 %x, 1, 0, %p;
        st.global.v2.u32 [%out], {{%w, %x}};""",
        found,
    )
    for lane in range(32):
        last, first = lane & segments | clamp & ~segments, lane & segments
        source, inside = {
            "up": (lane - offset, lane - offset >= last),
            "down": (lane + offset, lane + offset <= last),
            "bfly": (lane ^ offset, lane ^ offset <= last),
            "idx": (first | offset & ~segments, first | offset & ~segments <= last),
        }[mode]
        assert found[lane].tolist() == [100 + (source if inside else lane), inside]


@pytest.mark.parametrize("votes", [0, 1, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFF])
def test_votes(votes: int) -> None:
    found = np.zeros((32, 4), np.uint32)
    run_text(
        f"""
        .reg .pred %p, %any, %all; .reg .b32 %v, %w, %x, %y;
        .reg .b64 %at; mul.wide.u32 %at, %lane, 16; add.s64 %out, %out, %at;
        shr.u32 %v, {votes}, %lane; and.b32 %v, %v, 1; setp.ne.u32 %p, %v, 0;
        vote.sync.any.pred %any, %p, -1;
        vote.sync.all.pred %all, %p, -1;
        vote.sync.ballot.b32 %y, %p, -1;
        selp.u32 %w, 1, 0, %any; selp.u32 %x, 1, 0, %all;
        st.global.v4.u32 [%out], {{%w, %x, %y, %lane}};""",
        found,
    )
    assert (found == [[votes != 0, votes == 0xFFFFFFFF, votes, lane] for lane in range(32)]).all()


def test_shared_and_local_memory_barriers_and_branches() -> None:
    """Lanes of two warps swap numbers through static shared memory; each keeps its own in local memory."""
    found = np.zeros(64, np.uint32)
    run_text(
        element("%out", 0)
        + """
        .shared .align 4 .b8 first[4];
        .shared .align 4 .b8 swapped[256];
        .local .align 8 .b8 depot[8];
        .reg .b64 %local; .reg .b32 %at, %v, %w; .reg .pred %p;
        mov.u64 %local, depot; cvta.local.u64 %local, %local; st.u32 [%local+4], %lane;
        shl.b32 %at, %lane, 2; mov.u32 %v, swapped; add.u32 %v, %v, %at; st.shared.u32 [%v], %lane;
        bar.sync 0;
        mov.u32 %w, swapped; sub.u32 %w, %w, %at; ld.shared.u32 %v, [%w+252];
        setp.lt.u32 %p, %lane, 32;
        @%p bra upper;
        bra.uni done;
    upper:
        add.u32 %v, %v, 1000;
    done:
        ld.u32 %w, [%local+4]; mad.lo.u32 %v, %w, 10000, %v; st.global.u32 [%out], %v;""",
        found,
        block=64,
    )
    assert found.tolist() == [lane * 10000 + 63 - lane + (1000 if lane < 32 else 0) for lane in range(64)]


def test_barriers_vote() -> None:
    """Two warps learn whether a condition holds in any of their lanes: in the last one alone, then in none."""
    found = np.zeros(64, np.uint32)
    run_text(
        element("%out", 0)
        + """
        .reg .b32 %v, %w; .reg .pred %p, %q;
        setp.eq.u32 %p, %lane, 63; bar.red.or.pred %q, 0, %p; selp.u32 %v, 1, 0, %q;
        setp.eq.u32 %p, %lane, 64; barrier.cta.red.or.pred.aligned %q, 0, %p; selp.u32 %w, 2, 0, %q;
        add.u32 %v, %v, %w; st.global.u32 [%out], %v;""",
        found,
        block=64,
    )
    assert (found == 1).all()


def test_loads_extend_by_their_type() -> None:
    given = np.array([-1, -2, 127, -128, 0, 1, 2, 3], np.int8)
    found = np.zeros(4, np.int64)
    run_text(
        """
        .reg .b64 %a, %b; .reg .b32 %c; .reg .b16 %d;
        ld.global.s8 %a, [%in0]; ld.global.u8 %b, [%in0+1]; ld.global.s8 %c, [%in0+3]; ld.global.u16 %d, [%in0];
        st.global.u64 [%out], %a; st.global.u64 [%out+8], %b;
        cvt.s64.s32 %a, %c; st.global.u64 [%out+16], %a; cvt.u64.u16 %a, %d; st.global.u64 [%out+24], %a;""",
        found,
        given,
        block=1,
    )
    assert found.tolist() == [-1, 254, -128, 0xFEFF]


@pytest.mark.parametrize("code", ["ld.global.u32 %v, [%in0+2];", "st.global.v2.u32 [%out+4], {%v, %v};"])
def test_a_misaligned_access_is_a_fault(code: str) -> None:
    with pytest.raises(CudaError, match="must have an address divisible by") as raised:
        run_text(f".reg .b32 %v; {code}", np.zeros(4, np.uint64), np.zeros(4, np.uint64), block=1)
    assert raised.value.code == Code.MisalignedAddress


def test_global_pointers_must_be_of_the_device() -> None:
    array = np.zeros(4, np.uint32)
    text = (
        ".visible .entry k(.param .u64 p)\n{\n.reg .b64 %a; ld.param.u64 %a, [p]; cvta.to.global.u64 %a, %a;\nret;\n}\n"
    )
    function = modules.Module(text.encode(), 0).function("k")
    execute(function, 1, array)
    with pytest.raises(CudaError, match="is not of this device's memory"):
        execute(function, 1, array, bounds=(0, 4096))
