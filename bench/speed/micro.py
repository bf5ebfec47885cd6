"""Micro-experiments on a GPU: the rates on which the predictions and the floors rest.

Copy bandwidth with accesses of 16 and of 2 bytes, the rate of reads from L2, of float32 fused multiply-adds, of
mma.sync on bfloat16 and TF32 data, of PyTorch's matrix product in every precision, and the cost of a launch by itself
and within a CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .peers import optional_module

SOURCE = Path(__file__).with_name("micro.cu")

# Of micro.cu: kAccumulators * kUnroll fused multiply-adds of one thread and round, kTiles products of one warp.
FMA_PER_ROUND = 16 * 8
TILES = 8

_BLOCK = 256


class Micro:
    """The experiments on CuPy's current device; every one returns its figure in the unit of its name.

    Args:
        rehearse: with sizes that say nothing about rates but run anywhere in no time.
    """

    def __init__(self, *, rehearse: bool = False) -> None:
        import cupy

        self.copy_bytes, self.matrix, self.rounds, self.launches = (
            (1 << 16, 64, 2, 5) if rehearse else (1 << 30, 8192, 4096, 500)
        )
        self.rehearse = rehearse

        self.cupy = cupy
        index = int(cupy.cuda.runtime.getDevice())
        properties = cupy.cuda.runtime.getDeviceProperties(index)
        self.num_sms = int(properties["multiProcessorCount"])
        self.arch = 10 * int(properties["major"]) + int(properties["minor"])
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.module = cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"))
        self._sink = cupy.zeros(1, np.uint32)

    def seconds(self, work: Callable[[], None], repeats: int = 10) -> float:
        """The shortest of several runs, warm: the question is what the hardware can do."""
        times = []
        with self.stream:
            for _ in range(repeats + 2):
                start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
                start.record(self.stream)
                work()
                stop.record(self.stream)
                stop.synchronize()
                times.append(1e-3 * self.cupy.cuda.get_elapsed_time(start, stop))
        return float(min(times[2:]))

    def copy_gbps(self, width: int) -> float:
        """Bytes read plus bytes written, in GB/s."""
        count = self.copy_bytes // width
        with self.stream:
            source = self._random_bytes(self.copy_bytes)
            target = self.cupy.empty_like(source)
            kernel = self.module.get_function(f"copy_{width}_bytes")
            arguments = (source, target, np.int64(count))
            grid = (16 * self.num_sms,)
        return 2 * self.copy_bytes / self.seconds(lambda: kernel(grid, (_BLOCK,), arguments)) / 1e9

    def driver_copy_gbps(self) -> float:
        """The same of the driver's own copy."""
        with self.stream:
            source = self._random_bytes(self.copy_bytes)
            target = self.cupy.empty_like(source)
        copy = target.data.copy_from_device_async
        return 2 * self.copy_bytes / self.seconds(lambda: copy(source.data, self.copy_bytes, self.stream)) / 1e9

    def read(self, buffer: Any) -> None:
        """Queue a kernel on CuPy's current stream that reads a buffer, in whole vectors of 16 bytes, into L2."""
        kernel = self.module.get_function("read_l2")
        kernel((4 * self.num_sms,), (_BLOCK,), (buffer, self._sink, np.int32(buffer.nbytes // 16), np.int32(1)))

    def l2_read_gbps(self) -> float:
        """Bytes that all multiprocessors together read from L2, past their own caches."""
        blocks, rounds = (1 if self.rehearse else 8) * self.num_sms, self.rounds // 64 + 1
        count = 6 * blocks * _BLOCK  # vectors of 16 bytes: every thread reads six of them in a round
        kernel = self.module.get_function("read_l2")
        with self.stream:
            source = self._random_bytes(16 * count)
        arguments = (source, self._sink, np.int32(count), np.int32(rounds))
        return 16 * count * rounds / self.seconds(lambda: kernel((blocks,), (_BLOCK,), arguments)) / 1e9

    def fma_tflops(self) -> float:
        rounds, blocks = self.rounds, (1 if self.rehearse else 8) * self.num_sms
        kernel = self.module.get_function("fma_rate")
        sink = self.cupy.zeros(1, np.float32)
        arguments = (sink, np.int32(rounds), np.float32(0.999), np.float32(0.37))
        operations = 2 * FMA_PER_ROUND * rounds * blocks * _BLOCK
        return operations / self.seconds(lambda: kernel((blocks,), (_BLOCK,), arguments)) / 1e12

    def mma_tflops(self, name: str) -> float:
        """mma.sync on "bf16" (m16n8k16) or "tf32" (m16n8k8) data."""
        rounds, blocks = 2 * self.rounds, (1 if self.rehearse else 2) * self.num_sms
        kernel = self.module.get_function(f"mma_{name}_rate")
        sink = self.cupy.zeros(1, np.float32)
        operations = 2 * 16 * 8 * (16 if name == "bf16" else 8) * TILES * rounds * blocks * _BLOCK // 32
        return operations / self.seconds(lambda: kernel((blocks,), (_BLOCK,), (sink, np.int32(rounds)))) / 1e12

    def matmul_tflops(self, precision: str) -> float:
        """PyTorch's product of two random square matrices.

        Raises:
            ModuleNotFoundError: PyTorch is not installed, or does not reach the GPU.
        """
        torch = optional_module("torch")
        if torch is None or not torch.cuda.is_available():
            raise ModuleNotFoundError("PyTorch with CUDA is not installed")
        n = self.matrix // 2 if precision in ("float32", "float64", "complex64") else self.matrix
        dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.cuda.synchronize()
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            with torch.cuda.stream(torch.cuda.ExternalStream(self.stream.ptr)):
                seconds = self.seconds(lambda: torch.matmul(a, b, out=out))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        return (8 if precision == "complex64" else 2) * n**3 / seconds / 1e12

    def launch_us(self) -> float:
        """The host's time for one launch the way gpuconv launches, the stream never full."""
        kernel = self.module.get_function("nothing").kernel
        best = float("inf")
        with self.stream:
            for _ in range(20):
                start = time.perf_counter()
                for _ in range(self.launches // 5):
                    kernel((1, 1, 1), (32, 1, 1), (), 0)
                best = min(best, time.perf_counter() - start)
                self.stream.synchronize()
        return 1e6 * best / (self.launches // 5)

    def graph_launch_us(self) -> float:
        """The time from one empty kernel to the next within a CUDA graph."""
        kernel, count = self.module.get_function("nothing"), self.launches
        with self.stream:
            kernel((1,), (32,), ())
            self.stream.synchronize()
            self.stream.begin_capture()
            for _ in range(count):
                kernel((1,), (32,), ())
            graph = self.stream.end_capture()
        return 1e6 * self.seconds(lambda: graph.launch(self.stream)) / count

    def experiments(self) -> dict[str, Callable[[], float]]:
        """All of the above by name; the unit is the last part of the name."""
        named: dict[str, Callable[[], float]] = {
            "copy_driver_GB/s": self.driver_copy_gbps,
            "copy_16_bytes_GB/s": partial(self.copy_gbps, 16),
            "copy_2_bytes_GB/s": partial(self.copy_gbps, 2),
            "read_l2_GB/s": self.l2_read_gbps,
            "fma_float32_TFLOP/s": self.fma_tflops,
            "launch_us": self.launch_us,
            "launch_in_graph_us": self.graph_launch_us,
        }
        if self.arch >= 80:
            named["mma_bf16_TFLOP/s"] = partial(self.mma_tflops, "bf16")
            named["mma_tf32_TFLOP/s"] = partial(self.mma_tflops, "tf32")
        for precision in ("bfloat16", "float16", "tf32", "float32", "float64", "complex64"):
            named[f"matmul_{precision}_TFLOP/s"] = partial(self.matmul_tflops, precision)
        return named

    def _random_bytes(self, count: int) -> Any:
        block = np.frombuffer(np.random.default_rng(0).bytes(1 << 24), np.uint8)
        return self.cupy.tile(self.cupy.asarray(block), -(-count // block.size))[:count].copy()
