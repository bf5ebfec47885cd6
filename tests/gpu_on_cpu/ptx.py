"""Translates PTX, the text that NVRTC makes of a kernel, to C++ that hostcuda's runtime executes.

`translate` takes a module's text. What an instruction does stands in ptx.h, by the PTX ISA's names; here is one
function for each class of instructions, which reads its modifiers and operands and writes the call. An instruction, a
modifier or an operand that is not known raises `UnknownPtxError` with its text: nothing is guessed.

Only whole text forms that NVRTC emits are parsed: one `.entry` after another, no functions, one-dimensional `.maxntid`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

_TYPES = {"pred": 1, **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}}
_FLOATS = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
SIZES = {**_TYPES, **_FLOATS}

_SPECIAL = {
    f"%{name}.{axis}": f"::{variable}.{axis}"
    for name, variable in (
        ("tid", "threadIdx"),
        ("ntid", "blockDim"),
        ("ctaid", "blockIdx"),
        ("nctaid", "gridDim"),
    )
    for axis in "xyz"
} | {"%laneid": "hostcuda::lane()", "WARP_SZ": "32u"}


class UnknownPtxError(Exception):
    """PTX that the translator does not know, with its text."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A kernel of a module.

    Attributes:
        name: of the `.entry`.
        parameters: (offset, bytes) of each parameter in one buffer that holds them all.
        max_threads: the product of its `.maxntid`, or 1024.
        shared_bytes: of its static shared memory; the dynamic one lies behind.
        flush_subnormals: run with the processor flushing subnormal numbers to zero.
    """

    name: str
    parameters: tuple[tuple[int, int], ...]
    max_threads: int
    shared_bytes: int
    flush_subnormals: bool


@dataclass(frozen=True, slots=True)
class Module:
    """A translated module.

    Attributes:
        code: C++; the kernel NAME is `extern "C" void ptx_entry_NAME(void* const* slots)`, slot 0 being the parameters.
        entries: its kernels.
    """

    code: str
    entries: tuple[Entry, ...]


def translate(text: str) -> Module:
    """The C++ of a module.

    Raises:
        UnknownPtxError: something in it is not known.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    heads = list(_ENTRY.finditer(text))
    if not heads:
        raise UnknownPtxError("a module without .entry")
    scope, code = _module_scope(text[: heads[0].start()])
    entries = []
    for head in heads:
        kernel = _Kernel(head, text[head.end() : _end_of_block(text, head.end())], scope)
        code.append(kernel.code())
        entries.append(kernel.entry)
    return Module("\n".join(['#include "ptx.h"', "namespace ptx {", *code, "}", ""]), tuple(entries))


_ENTRY = re.compile(
    r"(?:\.visible|\.weak)?\s*\.entry\s+(?P<name>\w+)\s*\((?P<parameters>.*?)\)(?P<directives>[^{;]*)\{", re.DOTALL
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>\w+)(?:\[(?P<count>\d+)\])?$"
)
_VARIABLE = re.compile(
    r"(?:\.visible\s+|\.weak\s+)?(?P<extern>\.extern\s+)?\.(?P<space>global|const|shared|local)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?P<array>\[(?P<count>\d*)\])?\s*(?:=\s*(?P<value>.*))?$",
    re.DOTALL,
)
_IGNORED = (".loc", ".pragma", ".file")


def _end_of_block(text: str, begin: int) -> int:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, begin):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.start()
    raise UnknownPtxError("a block without an end")


def _statements(body: str) -> Iterator[str]:
    """Braces, labels with their colon, and statements without their semicolon."""
    for match in re.finditer(r"\s*(?:([$\w]+:)(?!:)|([{}])|([^;]*);)", body):
        yield " ".join(next(group for group in match.groups() if group is not None).split())


def _split(operands: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)]


@dataclass
class _Scope:
    """What the names of a module and its kernel stand for.

    Attributes:
        variables: module variables and local arrays, which are C++ variables of the same names.
        shared: offsets in shared memory.
        shared_bytes: how much of it is static.
        dynamic: the name of the array behind the static ones.
    """

    variables: set[str] = field(default_factory=set)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    dynamic: set[str] = field(default_factory=set)


def _module_scope(text: str) -> tuple[_Scope, list[str]]:
    """The variables that stand before the first kernel, and their C++."""
    scope, code = _Scope(), []
    for statement in filter(None, map(str.strip, text.split(";"))):
        declaration = re.sub(r"^(?:\.(?:version|target|address_size)[^\n]*\n\s*)+", "", statement + "\n").strip()
        if declaration and not declaration.startswith(_IGNORED):
            code.append(_declare(scope, declaration))
    return scope, code


def _declare(scope: _Scope, declaration: str) -> str:
    match = _VARIABLE.match(declaration)
    if match is None or match["type"] not in SIZES:
        raise UnknownPtxError(declaration)
    name, align = match["name"].replace("$", "_"), int(match["align"] or SIZES[match["type"]])
    if match["extern"]:
        if match["space"] != "shared":
            raise UnknownPtxError(declaration)
        scope.dynamic.add(name)
        return ""
    size = SIZES[match["type"]] * int(match["count"] or 1)
    if match["space"] == "shared":
        scope.shared[name] = -(-scope.shared_bytes // align) * align
        scope.shared_bytes = scope.shared[name] + size
        return ""
    value = match["value"] or ""
    if re.search(r"[A-Za-z_$]\w*\s*[(,}]", re.sub(r"0[xfd][\da-fA-F]+", "0", value)):
        raise UnknownPtxError(declaration)  # the address of another variable
    scope.variables.add(name)
    storage = "" if match["space"] == "local" else "static "
    array = f"[{match['count']}]" if match["array"] else ""
    initializer = f" = {value}" if value else " = {}" if storage else ""
    return f"alignas({align}) {storage}{match['type']} {name}{array}{initializer};"


class _Kernel:
    """One `.entry` on its way to C++."""

    def __init__(self, head: re.Match[str], body: str, scope: _Scope) -> None:
        self.name = head["name"]
        self.scope = _Scope(set(scope.variables), dict(scope.shared), scope.shared_bytes, set(scope.dynamic))
        self.registers: dict[str, str] = {}  # types by name
        self.parameters: dict[str, int] = {}  # offsets by name
        sizes: list[tuple[int, int]] = []
        end = 0
        for parameter in filter(None, _split(" ".join(head["parameters"].split()))):
            match = _PARAMETER.match(parameter)
            if match is None:
                raise UnknownPtxError(parameter)
            size = SIZES[match["type"]] * int(match["count"] or 1)
            align = int(match["align"] or SIZES[match["type"]])
            offset = -(-end // align) * align
            self.parameters[match["name"]] = offset
            sizes.append((offset, size))
            end = offset + size
        bound = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head["directives"])
        max_threads = 1024
        if bound:
            max_threads = int(bound[1]) * int(bound[2] or 1) * int(bound[3] or 1)

        statements = list(_statements(body))
        for statement in statements:
            if statement.startswith(".reg"):
                for name, kind in _registers(statement).items():
                    if self.registers.setdefault(name, kind) != kind:  # blocks share their names here
                        raise UnknownPtxError(statement)
            elif statement.startswith((".shared", ".local")):
                _declare(self.scope, statement)
        self._statements = statements
        instructions = [s for s in statements if not s.endswith((":", "{", "}")) and not s.startswith(".")]
        self.flushes = _flushes(instructions)
        self.entry = Entry(self.name, tuple(sizes), max_threads, self.scope.shared_bytes, self.flushes)

    def code(self) -> str:
        """The function."""
        lines = []
        for statement in self._statements:
            if statement.startswith(".local"):
                lines.append(_declare(_Scope(), statement))
            elif statement.endswith(":"):
                lines.append(f"{_name(statement[:-1])}:;")
            elif not statement.startswith((".", "{", "}")):
                lines.append(self._instruction(statement))
        registers = "".join(
            f"{kind} {', '.join(_name(name) for name, other in self.registers.items() if other == kind)};\n"
            for kind in sorted(set(self.registers.values()))
        )
        head = f'extern "C" __attribute__((visibility("default"))) void ptx_entry_{self.name}(void* const* slots) {{'
        parameters = "const unsigned char* const parameters = static_cast<const unsigned char*>(slots[0]);"
        return "\n".join([head, registers, parameters, "(void)parameters;", *lines, "}"])

    def _instruction(self, statement: str) -> str:
        instruction = Instruction(self, statement)
        try:
            emit = _EMITTERS[instruction.base]
        except KeyError:
            raise UnknownPtxError(statement) from None
        code = emit(instruction)
        if instruction.modifiers:
            raise UnknownPtxError(statement)
        return f"{instruction.guard}{{{code}}}"


def _registers(statement: str) -> dict[str, str]:
    match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement)
    if match is None or match[1] not in SIZES:
        raise UnknownPtxError(statement)
    names: dict[str, str] = {}
    kind = {"f16": "b16", "bf16": "b16"}.get(match[1], match[1].replace("s", "u"))
    for name in _split(match[2]):
        series = re.match(r"(%\w+)<(\d+)>$", name)
        names |= {f"{series[1]}{i}": kind for i in range(int(series[2]))} if series else {name: kind}
    return names


def _flushes(instructions: Sequence[str]) -> bool:
    """Whether the processor may flush subnormal numbers everywhere: no instruction that computes keeps them."""
    flushing = False
    for instruction in instructions:
        opcode = re.sub(r"^@\S+\s+", "", instruction).split()[0].split(".")
        computes = opcode[0] in {"add", "sub", "mul", "fma", "mad", "div", "rcp", "sqrt", "setp", "cvt"}
        if computes and any(part in ("f32", "f64") for part in opcode):
            if opcode[0] == "cvt" and "f64" not in opcode:
                continue  # to and from shorter and integer types: on the bits, and no subnormal float32 matters
            if "ftz" not in opcode:
                return False
            flushing = True
    return flushing


def _name(operand: str) -> str:
    return "r_" + operand.lstrip("%").replace("$", "_") if operand.startswith("%") else operand.replace("$", "L_")


def _converted(value: str, kind: str, other: str) -> str:
    """A value of a type as an instruction of another type sees it."""
    if kind == other:
        return value
    if kind in _FLOATS or other in _FLOATS:
        return f"as<{other}>({value})"
    return f"{other}({value})"  # as `as` does between integers, and compiles faster


class Instruction:
    """An instruction of a kernel: its modifiers are taken one by one, and whoever leaves some over has not known it."""

    def __init__(self, kernel: _Kernel, statement: str) -> None:
        self.kernel = kernel
        self.text = statement
        guard, rest = re.match(r"(?:@(!?%\w+)\s+)?(.*)$", statement).groups()  # type: ignore[union-attr]
        self.guard = f"if ({guard[0] if guard[0] == '!' else ''}{_name(guard.lstrip('!'))}) " if guard else ""
        opcode, _, operands = rest.partition(" ")
        self.base, *self.modifiers = opcode.replace("::", "_").split(".")
        self.operands = _split(operands)

    def unknown(self) -> UnknownPtxError:
        return UnknownPtxError(self.text)

    def take(self, *choices: str, default: str | None = None) -> str:
        """The modifier that is one of the choices; the default where there is none."""
        found = next((m for m in self.modifiers if m in choices), default)
        if found is None:
            raise self.unknown()
        if found in self.modifiers:
            self.modifiers.remove(found)
        return found

    def has(self, modifier: str) -> bool:
        """Whether the modifier is there."""
        return self.take(modifier, default="") == modifier

    def type(self) -> str:
        """The last modifier, which is a type."""
        if not self.modifiers or self.modifiers[-1] not in SIZES:
            raise self.unknown()
        return self.modifiers.pop()

    def value(self, operand: str, kind: str) -> str:
        """A source operand as a value of a type."""
        if operand.startswith("!"):
            return f"(!{self.value(operand[1:], kind)})"
        if operand in _SPECIAL:
            return _converted(_SPECIAL[operand], "u32", kind)
        if operand in self.kernel.registers:
            return _converted(_name(operand), self.kernel.registers[operand], kind)
        if match := re.match(r"0([fFdD])([0-9a-fA-F]+)$", operand):
            single = match[1] in "fF"
            bits, real = ("u32", "f32") if single else ("u64", "f64")
            literal = f"as<{real}>({bits}(0x{match[2]}{'u' if single else 'ull'}))"
            return literal if kind == real else f"as<{kind}>({literal})"
        if match := re.match(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?$", operand):
            if kind == "pred":
                return "true" if int(match[2], 0) else "false"
            if kind in _FLOATS:
                raise self.unknown()
            number = int(match[2], 0) * (-1 if match[1] else 1)
            return f"{kind}({number % 2**64}ull)"
        return f"as<{kind}>({self.symbol(operand)})"

    def symbol(self, operand: str) -> str:
        """The address of a variable, or the offset of one in shared memory; a number may be added."""
        match = re.match(r"([\w$]+)(?:\s*\+\s*(-?\d+))?$", operand)
        if match is None:
            raise self.unknown()
        name, offset, scope = match[1].replace("$", "_"), int(match[2] or 0), self.kernel.scope
        if name in scope.shared or name in scope.dynamic:
            return f"u64({scope.shared.get(name, self.kernel.entry.shared_bytes) + offset})"
        if name in self.kernel.parameters:
            return f"u64(parameters + {self.kernel.parameters[name] + offset})"
        if name in scope.variables:
            return f"(u64(&{name}) + u64({offset}))"
        raise self.unknown()

    def address(self, operand: str, space: str) -> str:
        """A memory operand as a pointer."""
        match = re.match(r"\[\s*([%\w$.]+)(?:\s*\+\s*(-?\d+))?\s*\]$", operand)
        if match is None:
            raise self.unknown()
        base, offset = match[1], int(match[2] or 0)
        if base in self.kernel.registers:
            value = self.value(base, "u32" if space == "shared" and self.kernel.registers[base] != "b64" else "u64")
        else:
            value = self.symbol(base)
        if space == "shared":
            return f"shared_address(u32({value}) + u32({offset % 2**32}u))"
        qualifier = "const " if space == "param" else ""
        return f"reinterpret_cast<{qualifier}unsigned char*>({value} + s64({offset}))"

    def put(self, operand: str, value: str, kind: str) -> str:
        """The assignment of a value of a type to a destination."""
        if operand == "_":
            return f"(void)({value});"
        if operand not in self.kernel.registers:
            raise self.unknown()
        return f"{_name(operand)} = {_converted(value, kind, self.kernel.registers[operand])};"

    def call(self, function: str, kinds: Sequence[str], *, ftz: bool = False) -> str:
        """The assignment of a function of the operands; kinds are the types of the result and of each operand."""
        if len(self.operands) != len(kinds):
            raise self.unknown()
        flush = ftz and not self.kernel.flushes
        arguments = [self.value(o, k) for o, k in zip(self.operands[1:], kinds[1:], strict=True)]
        if flush:
            arguments = [f"ftz({a})" if k == "f32" else a for a, k in zip(arguments, kinds[1:], strict=True)]
        result = f"{function}({', '.join(arguments)})"
        return self.put(self.operands[0], f"ftz({result})" if flush and kinds[0] == "f32" else result, kinds[0])


def _vector(operand: str) -> list[str]:
    return _split(operand[1:-1]) if operand.startswith("{") else [operand]


def _wide(kind: str) -> str:
    return f"{kind[0]}{16 * SIZES[kind]}"


_EMITTERS: dict[str, Callable[[Instruction], str]] = {}


def _emits(*bases: str) -> Callable[[Callable[[Instruction], str]], Callable[[Instruction], str]]:
    def register(emitter: Callable[[Instruction], str]) -> Callable[[Instruction], str]:
        _EMITTERS.update(dict.fromkeys(bases, emitter))
        return emitter

    return register


@_emits("add", "sub", "mul", "fma", "mad", "div", "rem", "rcp", "sqrt")
def _arithmetic(i: Instruction) -> str:
    kind = i.type()
    if kind not in _FLOATS:
        return _integer_arithmetic(i, kind)
    if kind not in ("f32", "f64") or i.base == "rem":
        raise i.unknown()
    i.take("rn", default="rn")
    ftz, saturates = i.has("ftz"), i.has("sat")
    function = "fma" if i.base == "mad" else i.base
    if not saturates:
        return i.call(function, [kind] * len(i.operands), ftz=ftz)
    arguments = ", ".join(f"ftz({i.value(o, kind)})" if ftz else i.value(o, kind) for o in i.operands[1:])
    return i.put(i.operands[0], f"sat({function}({arguments}))", kind)


def _integer_arithmetic(i: Instruction, kind: str) -> str:
    if i.base in ("fma", "rcp", "sqrt") or kind[0] == "b" or kind == "pred":
        raise i.unknown()
    if i.base in ("mul", "mad"):
        part = i.take("lo", "hi", "wide")
        wide = _wide(kind) if part == "wide" else kind
        return i.call(f"{i.base}_{part}", [wide, kind, kind, wide][: len(i.operands)])
    return i.call(i.base, [kind] * 3)


@_emits("dp2a", "dp4a")
def _dot_product(i: Instruction) -> str:
    b, a = i.type(), i.type()
    first = ", 2" if i.base == "dp2a" and i.take("lo", "hi") == "hi" else ""
    if not {a, b} <= {"u32", "s32"}:
        raise i.unknown()
    return i.call(f"{i.base}<{a}, {b}{first}>", ["s32", a, b, "s32"])


@_emits("neg", "abs", "min", "max", "copysign")
def _sign(i: Instruction) -> str:
    kind = i.type()
    if kind in ("f16", "bf16", "pred") or kind[0] == "b":
        raise i.unknown()
    ftz = i.has("ftz")
    arguments = [i.value(o, kind) for o in i.operands[1:]]
    # On the bits, whatever the processor does with subnormal numbers.
    result = f"{i.base}({', '.join(f'ftz({a})' if ftz else a for a in arguments)})"
    return i.put(i.operands[0], result, kind)


@_emits("and", "or", "xor", "not", "cnot")
def _logic(i: Instruction) -> str:
    kind = i.type()
    values = [i.value(o, kind) for o in i.operands[1:]]
    if i.base == "not":
        return i.put(i.operands[0], f"!{values[0]}" if kind == "pred" else f"{kind}(~{values[0]})", kind)
    if i.base == "cnot":
        return i.put(i.operands[0], f"{kind}({values[0]} == 0)", kind)
    operator = {"and": "&", "or": "|", "xor": "^"}[i.base]
    return i.put(i.operands[0], f"{kind}({values[0]} {operator} {values[1]})", kind)


@_emits("shl", "shr")
def _shift(i: Instruction) -> str:
    kind = i.type()
    return i.call(f"{i.base}<{kind}>", [kind, kind, "u32"])


@_emits("shf")
def _funnel_shift(i: Instruction) -> str:
    i.take("b32")
    direction, wraps = i.take("l", "r"), i.take("wrap", "clamp") == "wrap"
    return i.call(f"shf_{direction}<{str(wraps).lower()}>", ["b32", "b32", "b32", "u32"])


@_emits("popc", "clz", "brev", "bfe", "bfi", "prmt")
def _bits(i: Instruction) -> str:
    kind = i.type()
    kinds = {
        "popc": ["u32", kind],
        "clz": ["u32", kind],
        "brev": [kind, kind],
        "bfe": [kind, kind, "u32", "u32"],
        "bfi": [kind, kind, kind, "u32", "u32"],
        "prmt": [kind, kind, kind, kind],
    }[i.base]
    return i.call(i.base, kinds)


@_emits("setp")
def _compare(i: Instruction) -> str:
    kind = i.type()
    of_unsigned = ("lo", "ls", "hi", "hs") if kind[0] == "u" else ()
    of_floats = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan") if kind in ("f32", "f64") else ()
    comparison = i.take("eq", "ne", "lt", "le", "gt", "ge", *of_unsigned, *of_floats)
    combine = i.take("and", "or", "xor", default="none")
    # On the bits for NaN; the processor compares subnormal numbers as they are unless it flushes.
    flush = i.has("ftz") and not i.kernel.flushes
    if kind in ("f16", "bf16", "pred") or len(i.operands) != (3 if combine == "none" else 4):
        raise i.unknown()
    a, b = (f"ftz({v})" if flush else v for v in (i.value(o, kind) for o in i.operands[1:3]))
    code = f"const bool c = {comparison}<{kind}>({a}, {b});"
    results = ["c", "!c"]
    if combine != "none":
        code += f"const bool d = {i.value(i.operands[3], 'pred')};"
        operator = {"and": "&&", "or": "||", "xor": "!="}[combine]
        results = [f"({result}) {operator} d" for result in results]
    targets = [target.strip() for target in i.operands[0].split("|")]
    return code + "".join(i.put(t, r, "pred") for t, r in zip(targets, results, strict=False))


@_emits("selp")
def _select(i: Instruction) -> str:
    kind = i.type()
    a, b = (i.value(o, kind) for o in i.operands[1:3])
    return i.put(i.operands[0], f"{i.value(i.operands[3], 'pred')} ? {a} : {b}", kind)


@_emits("mov")
def _move(i: Instruction) -> str:
    kind = i.type()
    target, source = i.operands
    if target.startswith("{"):
        parts = _vector(target)
        part = f"b{8 * SIZES[kind] // len(parts)}"
        code = f"const u64 bits = {i.value(source, f'b{8 * SIZES[kind]}')};"
        return code + "".join(
            i.put(p, f"{part}(bits >> {8 * SIZES[part] * n})", part) for n, p in enumerate(parts) if p != "_"
        )
    if source.startswith("{"):
        parts = _vector(source)
        part = f"b{8 * SIZES[kind] // len(parts)}"
        bits = " | ".join(f"u64({i.value(p, part)}) << {8 * SIZES[part] * n}" for n, p in enumerate(parts))
        return i.put(target, f"b{8 * SIZES[kind]}({bits})", f"b{8 * SIZES[kind]}")
    return i.put(target, i.value(source, kind), kind)


@_emits("cvta")
def _convert_address(i: Instruction) -> str:
    kind = i.type()
    back, space = i.has("to"), i.take("global", "shared", "const", "local", "param")
    value = i.value(i.operands[1], kind)
    if space == "shared":
        value = f"{'shared_of_generic' if back else 'generic_of_shared'}({value})"
    elif space == "global" and back:
        value = f"global_address({value})"
    return i.put(i.operands[0], value, kind)


_INTEGRAL = {"rni": "To::nearest", "rzi": "To::zero", "rmi": "To::down", "rpi": "To::up"}


@_emits("cvt")
def _convert(i: Instruction) -> str:
    source, target = i.type(), i.type()
    value = i.value(i.operands[1], source)
    ftz, saturates = i.has("ftz"), i.has("sat")
    if "pred" in (source, target):
        raise i.unknown()
    if source not in _FLOATS and target not in _FLOATS:
        result = f"saturate<{target}>({value})" if saturates else f"{target}({value})"
        return i.put(i.operands[0], result, target)
    if source in ("f16", "bf16"):
        value, source = f"widen({value})", "f32"
    elif ftz and source == "f32":
        value = f"ftz({value})"
    if source in _FLOATS and target not in _FLOATS:
        mode = _INTEGRAL[i.take(*_INTEGRAL)]  # clamps, with and without .sat
        return i.put(i.operands[0], f"float_to_integer<{target}>({value}, {mode})", target)
    if source not in _FLOATS:
        i.take("rn")
        value = f"f64({value})" if SIZES[source] < 8 else value
        if target == "f64":
            return i.put(i.operands[0], f"f64({value})", target)
        odd = f"round_to_odd({value})" if SIZES[source] == 8 else value
        if target == "f32":
            return i.put(i.operands[0], f"f32({value})", target)
        return i.put(i.operands[0], f"narrow<{target}>(round_to_odd({odd}))", target)
    integral = i.take(*_INTEGRAL, default="")
    if integral:
        value = f"{source}(to_integral({value}, {_INTEGRAL[integral]}))"
    elif SIZES[target] < SIZES[source] or (target in ("f16", "bf16") and source == "f32"):
        i.take("rn")
    if target in ("f16", "bf16"):
        value = f"narrow<{target}>({f'round_to_odd({value})' if source == 'f64' else value})"
        if saturates:
            raise i.unknown()
        return i.put(i.operands[0], value, target)
    value = f"{target}({value})"
    if ftz and target == "f32":
        value = f"ftz({value})"
    return i.put(i.operands[0], f"sat({value})" if saturates else value, target)


_SPACES = ("param", "global", "shared", "const", "local")


@_emits("ld", "ldu", "st")
def _memory(i: Instruction) -> str:
    kind = i.type()
    space = i.take(*_SPACES, default="generic")
    count = int(i.take("v2", "v4", "v8", default="v1")[1:])
    for hint in ("nc", "volatile", "weak", "relaxed", "gpu", "cta", "sys", "ca", "cg", "cs", "cv", "lu", "wb", "wt"):
        i.has(hint)  # one thread runs at a time, and there is no cache
    memory, register = i.operands if i.base == "st" else reversed(i.operands)
    registers = _vector(register)
    if len(registers) != count or kind == "pred":
        raise i.unknown()
    qualifier = "const " if space == "param" else ""
    code = f"{qualifier}unsigned char* const p = {i.address(memory, space)};"
    if space != "param":
        code += f"check_alignment<{SIZES[kind] * count}>(p);"
    if i.base == "st":
        values = ", ".join(i.value(r, kind) for r in registers)
        return code + f"const {kind} v[] = {{{values}}}; __builtin_memcpy(p, v, sizeof v);"
    code += f"{kind} v[{count}]; __builtin_memcpy(v, p, sizeof v);"
    return code + "".join(i.put(r, f"v[{n}]", kind) for n, r in enumerate(registers) if r != "_")


@_emits("cp")
def _copy_async(i: Instruction) -> str:
    i.take("async")
    if i.has("commit_group"):
        return "hostcuda_copy_async_commit();"
    if i.has("wait_all"):
        return "hostcuda_copy_async_wait_all();"
    if i.has("wait_group"):
        return f"hostcuda_copy_async_wait({i.operands[0]});"
    for modifier in (("ca", "cg"), ("shared",), ("global",)):
        i.take(*modifier)
    shared, given = i.address(i.operands[0], "shared"), i.address(i.operands[1], "global")
    size = int(i.operands[2])
    exists = "true" if len(i.operands) == 3 else f"{i.value(i.operands[3], 'u32')} != 0"
    return f"hostcuda_copy_async({shared}, {given}, {size}, {exists});"


@_emits("ldmatrix")
def _load_matrix(i: Instruction) -> str:
    for modifier in ("sync", "aligned", "m8n8", "shared", "b16"):
        i.take(modifier)
    registers = _vector(i.operands[0])
    i.take(f"x{len(registers)}")
    transposed = "true" if i.has("trans") else "false"
    code = f"unsigned v[{len(registers)}];"
    code += f"hostcuda::load_matrix<{len(registers)}, {transposed}>"
    code += f'(v, {i.address(i.operands[1], "shared")}, "ldmatrix", "PTX", 3);'
    return code + "".join(i.put(r, f"v[{n}]", "u32") for n, r in enumerate(registers))


_MATRICES = {
    ("m16n8k8", "f16"): "kF16K8",
    ("m16n8k16", "f16"): "kF16K16",
    ("m16n8k16", "bf16"): "kBf16K16",
    ("m16n8k8", "tf32"): "kTf32K8",
}


@_emits("mma")
def _multiply_matrices(i: Instruction) -> str:
    if i.modifiers[:2] != ["sync", "aligned"] or i.modifiers[3:6] != ["row", "col", "f32"]:
        raise i.unknown()
    shape, operand = i.modifiers[2], i.modifiers[6]
    if (shape, operand) not in _MATRICES or i.modifiers[6:] != [operand, operand, "f32"]:
        raise i.unknown()
    i.modifiers.clear()
    d, a, b, c = map(_vector, i.operands)
    code = f"float d[4] = {{{', '.join(i.value(r, 'f32') for r in c)}}};"
    code += f"const unsigned a[] = {{{', '.join(i.value(r, 'b32') for r in a)}}};"
    code += f"const unsigned b[] = {{{', '.join(i.value(r, 'b32') for r in b)}}};"
    code += f"hostcuda::multiply_matrices<hostcuda::{_MATRICES[shape, operand]}>"
    code += f'(d, a, {len(a)}, b, {len(b)}, "mma.sync", "PTX", 4);'
    return code + "".join(i.put(r, f"d[{n}]", "f32") for n, r in enumerate(d))


# The compiler may write one barrier of the source twice; threads that meet at either copy have met.
@_emits("bar", "barrier")
def _barrier(i: Instruction) -> str:
    if i.has("warp"):
        i.take("sync")
        return f'__syncwarp({i.value(i.operands[0], "u32")}, "PTX", 0);'
    i.has("cta")
    i.has("aligned")
    if i.has("red"):
        i.take("or")
        kind = i.type()
        if kind != "pred" or len(i.operands) != 3 or i.operands[1] != "0":
            raise i.unknown()
        vote = f'hostcuda_block_barrier({i.value(i.operands[2], kind)}, "PTX", 0)'
        return i.put(i.operands[0], vote, kind)
    i.take("sync")
    if i.operands != ["0"]:
        raise i.unknown()
    return 'hostcuda_block_barrier(false, "PTX", 0);'


@_emits("membar", "fence")
def _fence(i: Instruction) -> str:
    i.modifiers.clear()  # one thread runs at a time: memory is in order
    return ""


@_emits("vote")
def _vote(i: Instruction) -> str:
    kind = i.type()
    i.take("sync")
    mode = i.take("any", "all", "ballot")
    condition, mask = i.value(i.operands[1], "pred"), i.value(i.operands[2], "u32")
    if mode == "all":
        return i.put(i.operands[0], f"ballot({mask}, !{condition}) == 0", kind)
    return i.put(i.operands[0], f"ballot({mask}, {condition})" + (" != 0" if mode == "any" else ""), kind)


@_emits("shfl")
def _shuffle(i: Instruction) -> str:
    kind = i.type()
    i.take("sync")
    mode = i.take("up", "down", "bfly", "idx")
    target, *found = (part.strip() for part in i.operands[0].split("|"))
    arguments = [i.value(i.operands[1], kind), *(i.value(o, "u32") for o in i.operands[2:5])]
    code = f"const ShuffleOutcome o = shuffle(Shuffle::{mode}, {', '.join(arguments)});"
    return code + i.put(target, "o.value", kind) + "".join(i.put(f, "o.found", "pred") for f in found)


@_emits("bra")
def _branch(i: Instruction) -> str:
    i.has("uni")
    return f"goto {_name(i.operands[0])};"


@_emits("ret", "exit")
def _return(i: Instruction) -> str:
    i.has("uni")
    return "return;"
