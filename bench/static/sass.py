"""Compiles a kernel without a GPU and reads the compiler's log and the machine code.

The machine code is read from `nvdisasm -json`, which the nvidia-cuda-nvdisasm wheel brings. Every instruction is 16
bytes long on all architectures since sm_70, so instruction i lies at address 16*i.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

from gpuconv import source
from gpuconv.families import Config

INSTRUCTION_BYTES = 16

# How much more often the instructions of a loop are assumed to run than those around it. Large enough that an unrolled
# inner loop outweighs the code for what its unrolling leaves over, small enough that a register tile's loop outweighs a
# rolled loop for special cases deeper inside.
NESTING_WEIGHT = 3.0

# Fused multiply-adds that one warp instruction performs. The first match counts; tensor instructions carry their shape.
_VECTOR_FMA = {"FFMA2": 64, "FFMA": 32, "DFMA": 32, "HFMA2": 64}
_TENSOR = re.compile(r"^(?:HMMA|DMMA|HGMMA)\.(?:SP\.)?(\d+x\d+x\d+|\d+)")

_CATEGORIES = (
    ("shared matrix load", ("LDSM",)),
    ("shared matrix store", ("STSM",)),
    ("asynchronous copy", ("LDGSTS", "UBLKCP", "UTMALDG", "ARRIVES", "LDGDEPBAR", "DEPBAR", "SYNCS")),
    ("global load", ("LDG", "LD")),
    ("global store", ("STG", "ST")),
    ("shared load", ("LDS",)),
    ("shared store", ("STS",)),
    ("local", ("LDL", "STL")),
    ("conversion", ("F2F", "F2FP", "F2I", "I2F", "HADD2", "PRMT", "I2FP")),
    ("float", ("FADD", "FMUL", "FSEL", "FMNMX", "FSETP", "DADD", "DMUL", "MUFU", "HMUL2", "FADD2", "FMUL2")),
    ("control", ("BRA", "EXIT", "BSSY", "BSYNC", "BAR", "WARPSYNC", "NOP", "RET", "CALL", "BREAK", "YIELD", "BRX")),
    ("shuffle", ("SHFL", "VOTE", "VOTEU", "REDUX")),
)
_CATEGORY_OF = {name: category for category, names in _CATEGORIES for name in names}

_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class ToolMissingError(RuntimeError):
    """A tool that is needed to read machine code is not installed."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction: "FFMA.FTZ", its operands as text, where it may jump to, and whether it may also not."""

    opcode: str
    operands: str = ""
    target: int | None = None
    is_conditional: bool = False

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def fma(self) -> int:
        """Fused multiply-adds of one warp."""
        match = _TENSOR.match(self.opcode)
        if match:
            return _tensor_fma(match.group(1), warps=4 if self.name == "HGMMA" else 1)
        # The assembler writes some register moves as a multiply-add of zeros.
        if self.name in _VECTOR_FMA and "RZ,RZ" not in self.operands.replace("-", "").replace(" ", ""):
            return _VECTOR_FMA[self.name]
        return 0

    @property
    def category(self) -> str:
        if self.fma:
            return "tensor" if _TENSOR.match(self.opcode) else "fma"
        return _CATEGORY_OF.get(self.name, "address")

    @property
    def width(self) -> int:
        """Bytes per thread of a load or store."""
        parts = self.opcode.split(".")[1:]
        if self.name in ("LDSM", "STSM"):
            return 4 * int(parts[-1]) if parts and parts[-1] in ("2", "4") else 4  # matrices of 8 x 16 bytes
        return next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)


def _tensor_fma(shape: str, warps: int) -> int:
    if "x" in shape:
        m, n, k = map(int, shape.split("x"))
    else:  # "16816" is m16n8k16, "1688" m16n8k8, "884" m8n8k4
        m, n, k = {"16816": (16, 8, 16), "16832": (16, 8, 32), "1688": (16, 8, 8), "1684": (16, 8, 4)}.get(
            shape, (8, 8, 4)
        )
    return m * n * k // warps


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas -v reports of one kernel; bytes are per thread, shared memory per block."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    static_shared_bytes: int

    @property
    def local_bytes(self) -> int:
        """Bytes of local memory, including what is spilled to it."""
        return self.stack_bytes + self.spill_store_bytes + self.spill_load_bytes


def parse_log(log: str, kernel: str) -> Resources:
    """The resources of `kernel` in a log of ptxas -v.

    Raises:
        ValueError: the log does not describe the kernel.
    """
    start = log.find(f"Compiling entry function '{kernel}'")
    if start < 0:
        raise ValueError(f"the compiler's log does not mention {kernel!r}:\n{log}")
    end = log.find("Compiling entry function", start + 1)
    section = log[start : end if end > 0 else None]

    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section)
    registers = re.search(r"Used (\d+) registers", section)
    if memory is None or registers is None:
        raise ValueError(f"the compiler's log has no count of registers or of local memory for {kernel!r}:\n{section}")
    shared = re.search(r"(\d+) bytes smem", section)
    return Resources(int(registers[1]), *map(int, memory.groups()), int(shared[1]) if shared else 0)


def parse_disassembly(text: str, kernel: str) -> list[Instruction]:
    """The instructions of `kernel` in the output of nvdisasm -json, in order of address.

    Raises:
        ValueError: the kernel is not there.
    """
    functions = [part for part in json.loads(text) if isinstance(part, list)]
    for function in (f for part in functions for f in part):
        if function["function-name"] == kernel:
            return [_instruction(entry) for entry in function["sass-instructions"]]
    raise ValueError(f"the disassembly does not contain {kernel!r}")


def _instruction(entry: dict[str, Any]) -> Instruction:
    operands = str(entry.get("operands", ""))
    target = None
    if entry["opcode"].partition(".")[0] == "BRA":
        match = re.search(r"0x([0-9a-f]+)\s*$", operands)
        target = int(match.group(1), 16) if match else None
    # A branch has its condition in front of it, among its operands, or both.
    return Instruction(entry["opcode"], operands, target, "predicate" in entry or "," in operands)


@dataclass(frozen=True, slots=True)
class Span:
    """The instructions first to last, both included, that one backward branch repeats."""

    first: int
    last: int
    depth: int  # 1 for a loop inside no other

    def contains(self, other: Span) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def find_loops(instructions: Sequence[Instruction]) -> list[Span]:
    """The loops of a kernel, each with its nesting depth; backward branches to one place are one loop.

    The branch to itself that ends every kernel is none.
    """
    ends: dict[int, int] = {}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None and instruction.target // INSTRUCTION_BYTES < index:
            first = instruction.target // INSTRUCTION_BYTES
            ends[first] = max(ends.get(first, 0), index)
    spans = [Span(first, last, 0) for first, last in sorted(ends.items())]
    return [Span(s.first, s.last, 1 + sum(other.contains(s) for other in spans)) for s in spans]


@dataclass(frozen=True, slots=True)
class Loop:
    """One pass of a loop's own instructions, those of loops inside it left out, and of branches those not taken.

    Attributes:
        depth: 1 for a loop inside no other, 0 for a kernel without a loop.
        mix: instructions by category.
        accesses: instructions by kind and bytes per thread, "global load 16 B" for example.
        fma: fused multiply-adds that one warp performs in a pass.
        useful: instructions that perform them.
        chain: the longest run of useful instructions of which each needs the one before.
        wavefronts: passes of one warp through the load/store unit, for accesses of neighbouring threads to neighbouring
            addresses (128 bytes each).
    """

    depth: int
    instructions: int
    mix: dict[str, int]
    accesses: dict[str, int]
    fma: int
    useful: int
    chain: int
    wavefronts: int

    @property
    def useful_share(self) -> float:
        return self.useful / self.instructions if self.instructions else 0.0


def main_loop(instructions: Sequence[Instruction]) -> tuple[Loop, Loop | None]:
    """The loop that does the work, and the smallest loop around it.

    The work is where the multiply-adds are, each loop's own weighed by `NESTING_WEIGHT` for every level of nesting; the
    whole kernel where no loop has any.
    """
    spans = find_loops(instructions)
    whole = Span(0, len(instructions) - 1, 0)

    def own(span: Span) -> list[Instruction]:
        inner = [s for s in spans if span.contains(s)]
        return [
            instructions[i]
            for i in range(span.first, span.last + 1)
            if not any(s.first <= i <= s.last for s in inner)
        ]  # fmt: skip

    def weight(span: Span) -> tuple[float, int]:
        return sum(i.fma for i in own(span)) * NESTING_WEIGHT**span.depth, span.depth

    best = max([whole, *spans], key=weight)
    around = min((s for s in spans if s.contains(best)), key=lambda s: s.last - s.first, default=None)
    if around is None:
        return _summarise(own(best), best.depth), None
    return _summarise(own(best), best.depth), _summarise(_taken(instructions, around, best, spans), around.depth)


def _taken(instructions: Sequence[Instruction], span: Span, best: Span, spans: Sequence[Span]) -> list[Instruction]:
    """The instructions of one pass of a loop, those of loops inside it left out, on its way through the loop `best`.

    Where branches are alternatives, the pass takes the one that multiplies most, else the one that loads and stores the
    most bytes, else the shortest: code for rare cases takes more instructions for the same bytes.
    """
    inner = [s for s in spans if span.contains(s) and not any(span.contains(o) and o.contains(s) for o in spans)]
    loop_at = {i: s for s in inner for i in range(s.first, s.last + 1)}
    # From each place to the end of the pass: how good it is, and the next place; from the end backwards.
    score = tuple[bool, int, int, int]
    ways: dict[int, tuple[score, int | None]] = {}
    for i in range(span.last, span.first - 1, -1):
        loop = loop_at.get(i)
        if loop is not None and i != loop.first:
            continue
        first, last = (i, i) if loop is None else (loop.first, loop.last)
        nexts, ends = [], False
        for at in range(first, last + 1):
            target = instructions[at].target
            if target is None:
                continue
            place = target // INSTRUCTION_BYTES
            ends = ends or place == span.first
            if last < place <= span.last:
                nexts.append(loop_at[place].first if place in loop_at else place)
        falls = instructions[last].is_conditional or instructions[last].name not in ("BRA", "EXIT", "RET")
        if falls and last < span.last:
            nexts.append(loop_at[last + 1].first if last + 1 in loop_at else last + 1)
        best_next = max((n for n in nexts if n in ways), key=lambda n: ways[n][0], default=None)
        rest = ways[best_next][0] if best_next is not None else (False, 0, 0, 0)
        if best_next is None and not ends:
            continue  # leaves the loop
        has_best, fma, num_bytes, minus_length = rest
        if loop is None:
            one = instructions[i]
            moved = one.width if one.category in _ACCESSES else 0
            here = (has_best, fma + one.fma, num_bytes + moved, minus_length - 1)
        else:
            is_way = loop == best or loop.contains(best)
            here = (has_best or is_way, fma, num_bytes, minus_length - (loop.last - loop.first + 1))
        ways[i] = here, best_next
    taken, place = [], loop_at[span.first].first if span.first in loop_at else span.first
    at_place: int | None = place
    while at_place is not None and at_place in ways:
        if at_place not in loop_at:
            taken.append(instructions[at_place])
        at_place = ways[at_place][1]
    return taken


_ACCESSES = ("global load", "global store", "shared load", "shared store", "shared matrix load", "shared matrix store")


def _summarise(instructions: Sequence[Instruction], depth: int) -> Loop:
    accesses = [i for i in instructions if i.category in _ACCESSES or i.name == "LDGSTS"]
    kinds = Counter(f"{i.category} {i.width} B" for i in accesses)
    return Loop(
        depth=depth,
        instructions=len(instructions),
        mix=dict(Counter(i.category for i in instructions).most_common()),
        accesses=dict(kinds.most_common()),
        fma=sum(i.fma for i in instructions),
        useful=sum(i.fma > 0 for i in instructions),
        chain=_longest_chain([i for i in instructions if i.fma]),
        wavefronts=sum(max(1, 32 * i.width // 128) for i in accesses),
    )


def _longest_chain(instructions: Sequence[Instruction]) -> int:
    depth: dict[str, int] = {}
    longest = 0
    for instruction in instructions:
        registers = re.findall(r"\bU?R\d+", instruction.operands)
        if not registers:
            continue
        here = 1 + max((depth.get(register, 0) for register in registers[1:]), default=0)
        depth[registers[0]] = here
        longest = max(longest, here)
    return longest


@dataclass(frozen=True, slots=True)
class KernelReport:
    """Everything that is known of one specialisation without running it."""

    config: Config
    arch: str
    resources: Resources
    compile_ms: float
    instructions: int
    local_instructions: int
    loop: Loop
    around: Loop | None
    digest: str = ""

    @property
    def uses_local_memory(self) -> bool:
        return self.resources.local_bytes + self.local_instructions > 0


def compile_cubin(text: str, kernel: str, arch: str) -> tuple[bytes, str, float]:
    """The cubin, the compiler's log and the milliseconds NVRTC took.

    Raises:
        ToolMissingError: CuPy or NVRTC is not installed.
        RuntimeError: the source does not compile; the message is the compiler's.
    """
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        raise ToolMissingError(f"compiling needs CuPy with NVRTC: {error}") from error
    start = time.perf_counter()
    program = nvrtc.createProgram(text, f"{kernel}.cu", (), ())
    try:
        # The options that CuPy passes for a RawKernel: others would give other machine code.
        options = (f"-arch={arch}", "-ftz=true", "--device-as-default-execution-space")
        nvrtc.compileProgram(program, (*options, "--ptxas-options=-v"))
        milliseconds = 1e3 * (time.perf_counter() - start)
        # CuPy's binding drops the last byte, which it takes for the end of a string; the file ends in a zero.
        return bytes(nvrtc.getCUBIN(program)) + b"\0", str(nvrtc.getProgramLog(program)), milliseconds
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{kernel} does not compile for {arch}:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


@cache
def nvdisasm() -> str:
    """The path of nvdisasm: from its wheel, or from PATH.

    Raises:
        ToolMissingError: it is in neither.
    """
    site = Path(sysconfig.get_paths()["purelib"])
    found = sorted(site.glob("nvidia/**/bin/nvdisasm"))
    path = str(found[-1]) if found else which("nvdisasm")
    if path is None:
        raise ToolMissingError("reading machine code needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return path


def disassemble(cubin: bytes) -> str:
    """The output of nvdisasm -json.

    Raises:
        ToolMissingError: nvdisasm is not installed.
        RuntimeError: it refuses the file.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([nvdisasm(), "-json", file.name], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"nvdisasm failed: {result.stderr.strip()}")
    return result.stdout


def whole_chunk(config: Config, loop: Loop, around: Loop | None) -> tuple[Loop, Loop | None]:
    """The loops of `main_loop`, but where BLOCK_R // UNROLL_R passes of the inner one, and the code around it, take a
    register tile through one chunk of terms, all of that as one loop: nothing that each chunk costs is left out.
    """
    macros = dict(config.macros)
    if around is None or not {"BLOCK_R", "UNROLL_R"} <= macros.keys():
        return loop, around
    passes = int(macros["BLOCK_R"]) // int(macros["UNROLL_R"])

    def total(inner: dict[str, int], outer: dict[str, int]) -> dict[str, int]:
        counts = Counter({name: passes * count for name, count in inner.items()})
        return dict((counts + Counter(outer)).most_common())

    chunk = Loop(
        depth=around.depth,
        instructions=passes * loop.instructions + around.instructions,
        mix=total(loop.mix, around.mix),
        accesses=total(loop.accesses, around.accesses),
        fma=passes * loop.fma + around.fma,
        useful=passes * loop.useful + around.useful,
        chain=passes * loop.chain + around.chain,
        wavefronts=passes * loop.wavefronts + around.wavefronts,
    )
    return chunk, None


class Compiled(NamedTuple):
    """What the compiler made of one specialisation: machine code, its log, and the milliseconds it took."""

    cubin: bytes
    log: str
    milliseconds: float

    @property
    def digest(self) -> str:
        """A digest of the machine code: kernels with the same digest have the same report."""
        return hashlib.sha256(self.cubin).hexdigest()[:16]


@cache
def compiled(config: Config, arch: str) -> Compiled:
    """Compile one specialisation; each is compiled once.

    Raises:
        ToolMissingError: CuPy or NVRTC is not installed.
        RuntimeError: the kernel does not compile.
    """
    return Compiled(*compile_cubin(source.assemble(config.kernel, dict(config.macros)), config.kernel, arch))


@cache
def report(config: Config, arch: str) -> KernelReport:
    """Compile one specialisation and read it.

    Raises:
        ToolMissingError: CuPy, NVRTC or nvdisasm is not installed.
        RuntimeError: the kernel does not compile.
    """
    code = compiled(config, arch)
    instructions = parse_disassembly(disassemble(code.cubin), config.kernel)
    loop, around = whole_chunk(config, *main_loop(instructions))
    return KernelReport(
        config=config,
        arch=arch,
        resources=parse_log(code.log, config.kernel),
        compile_ms=code.milliseconds,
        instructions=len(instructions),
        local_instructions=sum(i.name in ("LDL", "STL") for i in instructions),
        loop=loop,
        around=around,
        digest=code.digest,
    )
