"""Kernels compiled in advance: `compile` and `is_compiled`. Neither needs a GPU.

Compiled kernels are stored in the folder of `gpuconv.cubins`, from which calls on a GPU load them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeAlias

from . import cubins, fft, runtime
from .device import ARCHITECTURES, Device
from .dtypes import DTYPES, dtype_name
from .explain import DIRECTIONS, explain
from .explanation import Direction
from .families import FAMILIES, Config, append, conv1d_depthwise_push, lengths, windows
from .families.base import base_config
from .problem import ArrayLike, Op
from .source import assemble
from .text import install_hint

__all__ = ["Compiled", "compile", "is_compiled"]

Progress: TypeAlias = Callable[[int, int, str], None]
Job: TypeAlias = tuple[Config, str]  # a specialisation, and the architecture to compile it for

_JOBS_PER_PROCESS = 8  # fewer kernels do not justify another process


class Compiled(NamedTuple):
    """What `compile` did.

    Attributes:
        kernels: the number of kernels of the call.
        compiled: how many of these were compiled now, since they were missing.

    Example:
        >>> import gpuconv
        >>> from gpuconv.problem import ArraySpec
        >>> x, w = ArraySpec((8, 1, 3000), "float64"), ArraySpec((1, 1, 5), "float64")
        >>> call = {"arch": "sm_90", "direction": "forward"}
        >>> [gpuconv.compile("conv1d", x, w, **call).kernels, gpuconv.compile("conv1d", x, w, **call).compiled]
        [1, 0]
    """

    kernels: int
    compiled: int


def compile(  # noqa: A001 - as `re.compile`, it is called by the package's name
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    arch: str | Sequence[str] | None = None,
    direction: Direction | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    **settings: Any,
) -> Compiled:
    """Compile the kernels of a call in advance, so that no later process waits for the compiler or needs it.

    CuPy's NVRTC compiles; no GPU is needed. The kernels of a call depend on the shapes and on the GPU: those compiled
    are for exactly these shapes and a typical GPU of the architecture. A call with another batch size or length, or on
    another GPU product, can need other tiles. `gpuconv warmup --arch` compiles all kernels of an architecture.

    Args:
        op: "conv1d" or "conv_transpose1d".
        input: (N, C_in, L_in) or (C_in, L_in): an array, or a `gpuconv.problem.ArraySpec(shape, dtype)` for one that
            need not exist.
        weight: (C_out, C_in/groups, K), for conv_transpose1d (C_in, C_out/groups, K).
        bias: (C_out,), or None.
        arch: such as "sm_90", or several; None for the GPU of CuPy arrays.
        direction: "forward", or for the kernels of a gradient "grad_input", "grad_weight" or "grad_bias"; None for all
            that the call has.
        processes: how many processes compile at once. If more than one, the module multiprocessing starts them, so a
            script needs `if __name__ == "__main__":`.
        progress: called with the number of kernels done, the number of all, and the name of the kernel.
        **settings: those of the operation by name: stride, padding, activation and so on.

    Raises:
        ValueError: the call itself would raise it; an unknown op, direction or architecture, or none to compile for.
        TypeError: the call itself would raise it; a setting that the operation does not have.
        ImportError: CuPy is not installed, or it is older than version 14.
        RuntimeError: NVRTC cannot be loaded, or does not know the architecture.
        OSError: the folder of compiled kernels cannot be written, or belongs to others.

    Example:
        >>> import gpuconv
        >>> from gpuconv.problem import ArraySpec
        >>> x, w = ArraySpec((8, 1, 3000), "float64"), ArraySpec((1, 1, 5), "float64")
        >>> gpuconv.compile("conv1d", x, w, arch="sm_90", direction="forward").kernels
        1
    """
    directions = directions_of(input, settings) if direction is None else (direction,)
    wanted = [
        (config, device.arch_name)
        for device in _devices("compile", input, arch)
        for config in configs_of("compile", op, (input, weight, bias), device, directions, settings)
    ]
    return compile_all(wanted, processes, progress)


def is_compiled(
    op: Op,
    input: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    arch: str | Sequence[str] | None = None,
    direction: Direction = "forward",
    **settings: Any,
) -> bool:
    """Whether a call finds all of its kernels compiled in advance.

    The arguments are those of `compile`. Kernels that another version of NVRTC made count where none is installed, and
    where $GPUCONV_CACHE_ONLY is set.

    Raises:
        ValueError: as `compile`.
        TypeError: as `compile`.
        ImportError: CuPy is not installed, or it is older than version 14.
        OSError: the folder of compiled kernels cannot be read, or belongs to others.

    Example:
        >>> import gpuconv
        >>> from gpuconv.problem import ArraySpec
        >>> x, w = ArraySpec((8, 1, 3000), "float64"), ArraySpec((1, 1, 5), "float64")
        >>> gpuconv.is_compiled("conv1d", x, w, arch="sm_120")
        False
    """
    version = None if cubins.is_only_source() else runtime.nvrtc_version()
    major = runtime.cuda_versions()[1] // 1000
    return all(
        cubins.find(cubins.Source.of(config, device.arch_name), version, major=major).path is not None
        for device in _devices("is_compiled", input, arch)
        for config in configs_of("is_compiled", op, (input, weight, bias), device, (direction,), settings)
    )


def _devices(caller: str, input: Any, arch: str | Sequence[str] | None) -> list[Device]:
    """The GPUs that the argument `arch` names."""
    if arch is None:
        if not runtime.is_cupy_array(input):
            raise ValueError(f'{caller}: arch must be given ("sm_90", ...) where input is no CuPy array')
        return [runtime.device(int(input.data.device_id))]
    names = [*arch] if isinstance(arch, Sequence) and not isinstance(arch, str) else [arch]
    for name in names:
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise ValueError(f"{caller}: arch must be of {', '.join(ARCHITECTURES)}, got {name!r}")
    return [ARCHITECTURES[name] for name in names]


def directions_of(input: ArrayLike, settings: dict[str, Any]) -> tuple[Direction, ...]:
    """The directions of a call: only "forward" with an algorithm, for integers, and where something is fused."""
    names = ("algorithm", "activation", "input_activation", "residual")
    if dtype_name(getattr(input, "dtype", None)) not in DTYPES or any(settings.get(n) is not None for n in names):
        return ("forward",)
    return tuple(d for d in DIRECTIONS if d != "grad_input" or 0 not in input.shape[-1:])


def configs_of(
    caller: str,
    op: Op,
    arrays: Sequence[Any],
    device: Device,
    directions: Sequence[Direction],
    settings: dict[str, Any],
) -> list[Config]:
    """The specialisations that a call and its gradients launch, each once; the messages begin with `caller`.

    Raises:
        ValueError: as `explain`.
        TypeError: as `explain`.
    """
    configs: dict[Config, None] = {}
    for direction in directions:
        try:
            explanation = explain(op, *arrays, direction=direction, device=device, **settings)
        except (ValueError, TypeError) as error:
            raise type(error)(str(error).replace("explain:", f"{caller}:", 1)) from None
        plan = explanation.by_fft
        own = explanation.choice, explanation.prepared
        for choice in own if plan is None else fft.products(plan, device):
            if choice is not None:
                configs.update((step.config, None) for step in choice.plan.steps)
        if explanation.choice is not None and explanation.problem.has_lengths:
            configs.update((config, None) for config in lengths.write_configs())
    return [*configs]


def every_config(device: Device, dtypes: Sequence[str], op: Op | None = None, *, streams: bool) -> list[Config]:
    """The specialisations for calls of any shape that pad with zeros, fuse nothing and have samples of one length.

    Args:
        device: the GPU; all GPUs of an architecture have the same specialisations.
        dtypes: the dtypes of the data.
        op: leave out the kernels of the other operation; None for the kernels of both.
        streams: whether the kernels of `gpuconv.stream` are wanted, too.
    """
    configs: dict[Config, None] = {}

    def add(found: Iterable[Config]) -> None:
        configs.update((config, None) for config in found if _dtype_of(config) in dtypes)

    for family in FAMILIES:
        is_operation = family.kind in ("conv1d", "conv_transpose1d")
        if op is None or not is_operation or family.kind == op:
            add(family.configs(device))
            if streams and is_operation:
                add(windows.configs(family, device))
    if streams:
        if op != "conv_transpose1d":
            add(conv1d_depthwise_push.configs())
        add(base_config(append.KERNEL, d, bits, append.BLOCK_SIZE) for d in dtypes for bits in (32, 64))
    return [*configs]


def _dtype_of(config: Config) -> str:
    """The dtype of the data that a kernel takes."""
    return dict(config.macros).get("DTYPE", "").partition("_to_")[0]


def compile_all(wanted: Sequence[Job], processes: int, progress: Progress | None) -> Compiled:
    """Compile what is missing into the folder of compiled kernels.

    Raises:
        ImportError: CuPy is not installed, or it is older than version 14.
        RuntimeError: NVRTC cannot be loaded, or it refuses a kernel or an architecture; a process ended early.
        CacheError: the folder cannot be written, or belongs to others.
    """
    try:
        version = runtime.nvrtc_version()
    except ModuleNotFoundError:
        hint = install_hint("cuda13", "cuda12")
        raise ModuleNotFoundError(f"kernels are compiled through CuPy, which is missing: {hint}") from None
    if version is None:
        raise RuntimeError(f"NVRTC, CUDA's run-time compiler, cannot be loaded: {install_hint('cuda13', 'cuda12')}")
    cubins.prepare()
    missing = [job for job in dict.fromkeys(wanted) if cubins.find(cubins.Source.of(*job), version).path is None]
    report = progress or (lambda _done, _total, _label: None)
    report(0, len(missing), "")
    for done, kernel in enumerate(_compile_each(missing, min(processes, len(missing) // _JOBS_PER_PROCESS)), start=1):
        report(done, len(missing), kernel)
    return Compiled(len(dict.fromkeys(wanted)), len(missing))


def _compile_each(jobs: Sequence[Job], processes: int) -> Iterator[str]:
    """Compile in this process or in several others; yields the name of each kernel when it is done."""
    if processes <= 1:
        for job in jobs:
            yield _compile(job)
        return
    # Processes are not forked, since a forked process cannot use CUDA. They ignore an interrupt: this one ends them.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        for done in as_completed([pool.submit(_compile, job) for job in jobs]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(job: Job) -> str:
    """Compile one kernel into the folder; returns its name."""
    config, arch = job
    version = runtime.nvrtc_version()
    assert version is not None
    source = cubins.Source.of(config, arch)
    found = cubins.find(source, version)
    if found.path is None:  # another process may have compiled it in the meantime
        code = machine_code(source, assemble(config.kernel, dict(config.macros)))
        cubins.store(source, version, code, found.damaged)
    return config.kernel


def machine_code(source: cubins.Source, text: str) -> bytes:
    """Compile a kernel's text with NVRTC, as CuPy would on a GPU of the architecture.

    Raises:
        ImportError: CuPy is not installed, or it is older than version 14.
        RuntimeError: NVRTC cannot be loaded, or it refuses the text or the architecture; with its messages.
    """
    nvrtc = runtime.cupy_module().cuda.nvrtc
    arch = source.arch if source.suffix == "cubin" else source.arch.replace("sm", "compute")
    program = nvrtc.createProgram(text, f"{source.kernel}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*cubins.OPTIONS, f"-arch={arch}"))
        code = nvrtc.getCUBIN(program) if source.suffix == "cubin" else nvrtc.getPTX(program)
        return bytes(code) + b"\0"  # CuPy drops the last byte, which is zero in both forms
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        version = ".".join(map(str, nvrtc.getVersion()))
        raise RuntimeError(f"{source.kernel} for {source.arch}: NVRTC {version}: {error}: {log}") from None
    finally:
        nvrtc.destroyProgram(program)
