"""Measures gpuconv on a GPU beside PyTorch (cuDNN) and causal-conv1d, in one process, on one stream, on shared buffers.

CuPy owns the stream and the buffers. PyTorch works on the same stream (`torch.cuda.ExternalStream`) and reads the same
inputs (DLPack), so that caches favour none of them. Each implementation has its own outputs: one for every buffer
set, so that writing them is rotated through the cache as well.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import gpuconv
from gpuconv import dispatch, runtime
from gpuconv.device import ARCHITECTURES
from gpuconv.families import Layout
from gpuconv.families.base import PACKED
from gpuconv.problem import ConvProblem, WeightGradientProblem, numpy_dtype

from ..layers import Ceilings, published_ceilings
from ..modes import Direction, Mode, array_shapes, of_forward, our_function, result_shape
from . import peers
from .check import PEER_TOLERANCE, Verdict, oracle_of
from .measure import Absent, Buffers, Case, Refused, Subject, sets_for
from .micro import Micro
from .results import PREPARED

Array = npt.NDArray[Any]

# All buffers are filled from these random numbers, each from another place.
_POOL = 1 << 22


class GpuEngine:
    """CuPy's current device.

    Args:
        rehearse: pretend a tiny L2, and measure ceilings that say nothing: see `Micro`.

    Raises:
        RuntimeError: no GPU answers.
    """

    def __init__(self, *, rehearse: bool = False) -> None:
        import cupy

        self.cupy = cupy
        self.index = runtime.current_index()
        self.device = runtime.current_gpu()
        if rehearse:
            self.device = replace(self.device, l2_bytes=4096)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.torch = _torch_with_cuda()
        self._start, self._stop = cupy.cuda.Event(), cupy.cuda.Event()
        micro = Micro(rehearse=rehearse)
        self._read = micro.read
        self.ceilings, self._measured = measure_ceilings(micro, self.device.name)
        self._release_memory()

    def describe(self) -> dict[str, Any]:
        torch = self.torch
        return {
            **describe(),
            "cudnn": torch.backends.cudnn.version() if torch else None,
            "torch_cuda": torch.version.cuda if torch else None,
            "ceilings_from": self._measured,
        }

    def elapsed(self, work: Callable[[], None]) -> float:
        self._start.record(self.stream)
        work()
        self._stop.record(self.stream)
        self._stop.synchronize()
        return float(1e3 * self.cupy.cuda.get_elapsed_time(self._start, self._stop))

    def sample(self, work: Callable[[], None]) -> list[float]:
        """`elapsed`, after filling the L2 with clean lines of a buffer that no implementation uses."""
        self._read(self._scratch)
        self.stream.synchronize()
        return [self.elapsed(work)]

    def family(self, problem: ConvProblem | WeightGradientProblem) -> str:
        choice = dispatch.choose(problem, Layout.contiguous(problem), self.device)
        return "none" if choice is None else choice.family

    def estimate_seconds(self, case: Case, repeats: int) -> float:
        """A guess at the time of a case.

        Set-up and checks, then twice the samples of some seven implementations, each of a millisecond or of one call
        at 20 % of the ceilings.
        """
        call = 5 * case.layer.floor(case.mode.name, self.ceilings, case.batch)
        return 2.0 + 14 * (repeats + 5) * max(1e-3, call)

    @contextmanager
    def open(self, case: Case) -> Iterator[Buffers]:
        problem = case.problem
        sets = sets_for(problem, self.device.l2_bytes)
        with self._on_stream():
            data = Data(self.cupy, problem, sets, case.direction)
            self._scratch = self.cupy.ones(2 * self.device.l2_bytes // 4, np.float32)
            try:
                yield Buffers(sets, sets * problem.bytes(), list(self._subjects(case, data)))
            finally:
                self.stream.synchronize()
                data.sets.clear()
                self._release_memory()

    def _subjects(self, case: Case, data: Data) -> Iterator[Subject]:
        problem, mode, is_forward = case.problem, case.mode, case.direction == "forward"
        tf32 = peers.CudnnSettings(allow_tf32=mode.name == "tf32")
        torch = partial(self._prepare_torch, mode, problem, data)
        plain = partial(peers.plain, problem, case.direction)
        yield Subject("gpuconv", partial(self._prepare_ours, mode, problem, data))
        yield Subject("PyTorch", partial(torch, plain, tf32))
        if is_forward and not (problem.transposed or peers.is_symmetric(problem)):
            yield Subject("PyTorch, F.pad", partial(torch, partial(peers.conv_by_padding, problem), tf32))
        if mode.name == "float32":
            yield Subject(
                "PyTorch, TF32 allowed",
                partial(torch, plain, peers.CudnnSettings(allow_tf32=True), "tf32"),
                comparable=False,
                note="rounds its operands to TF32",
            )
        if is_forward:
            yield Subject(
                "PyTorch through channels_last",
                partial(torch, partial(peers.conv_channels_last, problem, convert=True), tf32),
                note="conversions included",
            )
            kept = partial(peers.conv_channels_last, problem, convert=False)
            yield Subject(
                "PyTorch on channels_last data",
                partial(self._prepare_torch, mode, problem, data, kept, tf32, channels_last=True),
                comparable=False,
                note="data in channels_last before and after",
            )
        deterministic = peers.CudnnSettings(allow_tf32=tf32.allow_tf32, deterministic=True)
        yield Subject("PyTorch deterministic", partial(torch, plain, deterministic))
        if is_forward:
            yield Subject("causal-conv1d", partial(torch, partial(peers.causal_conv, problem), tf32))
            yield Subject(
                PREPARED,
                partial(self._prepare_ours, mode, problem, data, prepared=True),
                comparable=False,
                note="weights packed before",
            )

    def _prepare_ours(self, mode: Mode, problem: ConvProblem, data: Data, *, prepared: bool = False) -> _OurRunner:
        ours = our_function(problem, data.direction, mode.precision)
        sets = data.sets
        if prepared:
            layout = replace(Layout.contiguous(problem), is_prepared=True)
            choice = dispatch.choose(problem, layout, self.device)
            if choice is None or not choice.plan.scratch_bytes(PACKED):
                raise Refused("its kernel reads weights as they are")
            sets = [(x, gpuconv.prepare(w), b) for x, w, b in sets]
            for arrays in sets:  # the first call packs, which a capture would record
                ours(*arrays)

        def disagreement(output: Any) -> str:
            try:
                plain = partial(peers.plain, problem, data.direction)
                peer = self._prepare_torch(mode, problem, data, plain, peers.CudnnSettings(mode.name == "tf32"))
                with peer.context():
                    peer.call(0)
                    return peer.disagreement(output)
            except (Absent, Refused, RuntimeError):
                return ""  # then only the windows of the reference are compared

        return _OurRunner(self, problem, mode, data, sets, ours, disagreement)

    def _prepare_torch(
        self,
        mode: Mode,
        problem: ConvProblem,
        data: Data,
        build: Callable[[], peers.Function],
        settings: peers.CudnnSettings,
        tolerance_mode: str | None = None,
        *,
        channels_last: bool = False,
    ) -> _TorchRunner:
        if self.torch is None:
            raise Absent("PyTorch with CUDA is not installed")
        function = build()
        arguments = data.tensors(self.torch)
        if channels_last:
            arguments = [(peers.to_channels_last(x), peers.to_channels_last(w), b) for x, w, b in arguments]
        return _TorchRunner(self, problem, tolerance_mode or mode.name, data, function, arguments, settings)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """CuPy and PyTorch both on the engine's stream."""
        with ExitStack() as stack:
            stack.enter_context(self.stream)
            if self.torch is not None:
                external = self.torch.cuda.ExternalStream(self.stream.ptr, device=self.index)
                stack.enter_context(self.torch.cuda.stream(external))
                stack.enter_context(self.torch.inference_mode())
            yield

    def _release_memory(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()


class Data:
    """The buffer sets of a case: CuPy arrays (input, weight, bias or None or grad_output).

    Normal numbers, scaled so that results have variance about 1.
    """

    def __init__(self, cupy: Any, problem: ConvProblem, sets: int, direction: Direction = "forward") -> None:
        self.cupy, self.problem, self.direction = cupy, problem, direction
        rng = np.random.default_rng(0)
        dtype = numpy_dtype(problem.dtype)
        host = rng.standard_normal(_POOL, dtype=np.float32)
        if problem.is_complex:
            host = (host + 1j * rng.permutation(host)).astype(np.complex64)
        scale = np.float32(1 / math.sqrt(max(of_forward(problem, direction).terms, 1)))
        plain, scaled = (
            cupy.asarray(values.astype(dtype).view(np.uint8)) for values in (host, host * scale)
        )  # bytes: no conversion kernel has to know the dtype

        def draw(pool: Any, shape: Sequence[int]) -> Any:
            count = math.prod(shape) * dtype.itemsize
            raw = cupy.empty(count, np.uint8)
            filled = 0
            while filled < count:
                first = int(rng.integers(0, _POOL // 2)) * dtype.itemsize
                length = min(count - filled, pool.size - first)
                raw[filled : filled + length] = pool[first : first + length]
                filled += length
            return raw.view(dtype).reshape(shape)

        # The weight carries the scale of a forward pass, grad_output that of a gradient.
        pools = (plain, scaled, plain) if direction == "forward" else (plain, plain, scaled)
        shapes = array_shapes(problem, direction)
        self.sets = [
            tuple(draw(pool, shape) for pool, shape in zip(pools, shapes, strict=False)) + (None,) * (3 - len(shapes))
            for _ in range(sets)
        ]
        fetches = [None if array is None else partial(fetch, cupy, array) for array in self.sets[0]]
        self.oracle = oracle_of(problem, direction, fetches)
        self._tensors: list[tuple[Any, Any, Any]] | None = None

    def tensors(self, torch: Any) -> list[tuple[Any, Any, Any]]:
        """The same buffers as PyTorch tensors, without a copy.

        They travel as bytes, since not every version of both libraries exchanges bfloat16.
        """
        dtype = getattr(torch, self.problem.dtype)

        def share(array: Any) -> Any:
            if array is None:
                return None
            return torch.from_dlpack(array.reshape(-1).view(np.uint8)).view(dtype).view(array.shape)

        if self._tensors is None:
            self._tensors = [(share(x), share(w), share(b)) for x, w, b in self.sets]
        return self._tensors

    def poisoned(self) -> Any:
        """An array for results, of NaNs: in every format all bits set is one."""
        dtype = numpy_dtype(self.problem.dtype)
        shape = result_shape(self.problem, self.direction)
        return self.cupy.full(math.prod(shape) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)

    def judge(self, output: Any, mode: Mode) -> Verdict:
        """Judge gpuconv's result for the first set, by the computed error bound where the mode keeps it."""
        return self.oracle.judge(
            partial(fetch, self.cupy, output),
            mode=mode.name,
            all_finite=all_finite(self.cupy, output),
            bounded=mode.precision == "float32",
        )


@dataclass(slots=True)
class _OurRunner:
    """gpuconv. Eager calls allocate their output as a user's would; captured ones write to outputs made before."""

    engine: GpuEngine
    problem: ConvProblem
    mode: Mode
    data: Data
    sets: list[tuple[Any, ...]]
    function: Callable[..., Any]
    disagreement: Callable[[Any], str]
    outputs: dict[int, Any] = field(default_factory=dict)
    targets: dict[int, Any] = field(default_factory=dict)

    def call(self, index: int) -> None:
        self.outputs[index] = self.function(*self.sets[index])

    def capture(self, indices: Sequence[int]) -> Callable[[], None]:
        stream = self.engine.stream
        self.outputs.clear()
        for index in indices:
            if index not in self.targets:
                self.targets[index] = self.data.poisoned()
        # The first call outside of the capture makes the plan and loads the kernels. What a captured call allocates for
        # itself belongs to the graph.
        self.function(*self.sets[indices[0]], out=self.targets[indices[0]])
        stream.synchronize()
        stream.begin_capture()
        try:
            for index in indices:
                self.function(*self.sets[index], out=self.targets[index])
        finally:
            graph = stream.end_capture()
        graph.upload(stream)
        return lambda: graph.launch(stream)

    def verdict(self) -> Verdict:
        output = self.targets.setdefault(0, self.data.poisoned())
        self.function(*self.sets[0], out=output)
        verdict = self.data.judge(output, self.mode)
        if verdict.ok and (note := self.disagreement(output)):
            return Verdict(False, verdict.error, note)
        return verdict

    def context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def release(self) -> None:
        self.engine.stream.synchronize()
        self.outputs.clear()
        self.targets.clear()
        self.sets = []


@dataclass(slots=True)
class _TorchRunner:
    """A PyTorch function. Outputs are kept, one for each buffer set, so that the allocator hands out others."""

    engine: GpuEngine
    problem: ConvProblem
    tolerance_mode: str
    data: Data
    function: peers.Function
    arguments: list[tuple[Any, Any, Any]]
    settings: peers.CudnnSettings
    outputs: dict[int, Any] = field(default_factory=dict)
    graphs: list[Any] = field(default_factory=list)

    def call(self, index: int) -> None:
        self.outputs[index] = self.function(*self.arguments[index])

    def capture(self, indices: Sequence[int]) -> Callable[[], None]:
        torch = self.engine.torch
        self.call(indices[0])  # chooses cuDNN's engine, which cannot be done during a capture
        self.outputs.clear()
        graph = torch.cuda.CUDAGraph()
        kept: dict[int, Any] = {}
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for index in indices:
                kept[index] = self.function(*self.arguments[index])
        self.graphs.append((graph, kept))
        return graph.replay  # type: ignore[no-any-return]

    def verdict(self) -> Verdict:
        torch = self.engine.torch
        self.call(0)
        output = self._as_ncl(self.outputs[0])
        return self.data.oracle.judge(
            lambda part: self._to_numpy(output[part]),
            mode=self.tolerance_mode,
            all_finite=bool(torch.isfinite(output).all().item()),
            bounded=False,
        )

    def disagreement(self, ours: Any) -> str:
        """What is wrong where a CuPy output of variance 1 differs from the call of set 0 by more than any rounding."""
        torch = self.engine.torch
        theirs = self._as_ncl(self.outputs[0])
        mine = torch.from_dlpack(ours.reshape(-1).view(np.uint8)).view(theirs.dtype).view(ours.shape)
        limit = 20 * PEER_TOLERANCE[self.tolerance_mode]
        wide = torch.complex128 if theirs.is_complex() else torch.float64
        largest = max(
            ((a.to(wide) - b.to(wide)).abs().max().item() for a, b in zip(mine, theirs, strict=True) if a.numel()),
            default=0.0,
        )
        return "" if largest <= limit else f"differs from PyTorch by up to {largest:.2g}, more than {limit:.2g}"

    def context(self) -> AbstractContextManager[object]:
        return self.settings.context()  # type: ignore[no-any-return]

    def release(self) -> None:
        self.engine.stream.synchronize()
        self.outputs.clear()
        self.graphs.clear()

    def _as_ncl(self, output: Any) -> Any:
        return output.squeeze(2) if output.dim() == 4 else output

    def _to_numpy(self, tensor: Any) -> Array:
        torch = self.engine.torch
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.to(torch.float32)
        return np.asarray(tensor.cpu().numpy())


def describe() -> dict[str, Any]:
    """CuPy's current device and its driver, as result files name them."""
    device, (driver, _) = runtime.current_gpu(), runtime.cuda_versions()
    return {
        "kind": "gpu",
        "name": device.name,
        "arch": device.arch_name,
        "sms": device.num_sms,
        "l2_bytes": device.l2_bytes,
        "driver": _driver_release(),
        "driver_cuda": f"{driver // 1000}.{driver % 1000 // 10}",
    }


def _torch_with_cuda() -> Any:
    torch = peers.optional_module("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def _driver_release() -> str | None:
    """The driver's release, such as 580.65.06, where the system or nvidia-smi says it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0].split()
    except OSError:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
        except (OSError, subprocess.TimeoutExpired):
            return None
        words = said.split()
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def fetch(cupy: Any, array: Any, part: tuple[slice, ...]) -> Array:
    """A part of a CuPy array on the host; 16-bit formats travel as integers, which every version of CuPy can copy."""
    if array.dtype.itemsize != 2:
        return np.asarray(cupy.asnumpy(array[part]))
    return np.asarray(np.ascontiguousarray(cupy.asnumpy(array.view(np.uint16)[part])).view(array.dtype))


def all_finite(cupy: Any, array: Any) -> bool:
    """Whether all elements are finite, read off the bits: exponents of all ones are infinities and NaNs."""
    name = array.dtype.name
    word, exponent = {
        "float16": (np.uint16, 0x7C00),
        "bfloat16": (np.uint16, 0x7F80),
        "float32": (np.uint32, 0x7F800000),
        "complex64": (np.uint32, 0x7F800000),
        "float64": (np.uint64, 0x7FF0000000000000),
        "complex128": (np.uint64, 0x7FF0000000000000),
    }[name]
    mask = word(exponent)
    bits = array.reshape(-1).view(word)
    parts = cupy.array_split(bits, -(-bits.size // (1 << 26)))
    # The host looks through the answers: CuPy would compile its reductions anew for every size of array.
    return not any(cupy.asnumpy((part & mask) == mask).any() for part in parts)


def measure_ceilings(micro: Micro, name: str) -> tuple[Ceilings, dict[str, str]]:
    """The ceilings of this GPU, measured; and where each comes from.

    Bandwidth is that of the driver's copies, float32 that of a loop of multiply-adds, and the rest that of PyTorch's
    matrix products. Without PyTorch, published figures take their place.
    """
    typical = ARCHITECTURES.get(f"sm_{micro.arch}")
    published = None if typical is None else published_ceilings(replace(typical, name=name, num_sms=micro.num_sms))
    flops = {"float32": 1e12 * micro.fma_tflops()}
    sources = {"copy": "measured", "float32": "measured"}
    for precision in ("float16", "bfloat16", "tf32", "float64"):
        try:
            flops[precision] = 1e12 * micro.matmul_tflops(precision)
            sources[precision] = "measured"
        except (ModuleNotFoundError, RuntimeError):
            known = {} if published is None else published.flops_per_second
            flops[precision] = known.get(precision, flops["float32"])
            sources[precision] = published.name if published and precision in known else "that of float32"
    return Ceilings(f"{name}, measured", 1e9 * micro.driver_copy_gbps(), flops), sources
