"""Weak scaling of gpuconv.dask: one long signal in chunks, the same number for each worker.

From the root of a checkout:

    python -m bench.scaling [--processes 1,2] [--turns 5] [--task-us US] [--json FILE]

The first table has measured times of processes on this machine with one thread each, and the predictions of the CPU's
cost model. The second table is a prediction, not a measurement, for up to 64 H200 in nodes of 8. Both predict by

    work  = chunks of a worker * predicted time of a chunk + transfers of both halos in sequence
    tasks = all tasks of the graph * time of the scheduler for one
    time  = max(work, tasks)

A transfer takes a latency plus its bytes divided by the speed of the link. The scheduler's time for a task is measured
on this machine, on tasks that compute nothing, as the CPU time of this process, in which scheduler and client run.
Efficiency is the time of one worker divided by that of several. CPU is the measured CPU time of a worker, which depends
less on other programs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from distributed import Client, LocalCluster, wait
from rich import box
from rich.console import Console
from rich.table import Table

import gpuconv.dask
from gpuconv import cpu, dispatch
from gpuconv.device import Device
from gpuconv.families import Layout
from gpuconv.pieces import Piece
from gpuconv.problem import ArraySpec, ConvProblem

from .arguments import count, counts
from .speed.results import environment, write_json

GPUS = (1, 2, 4, 8, 16, 32, 64)
EMPTY_TASKS = 1000


@dataclass(frozen=True, slots=True)
class Signal:
    """A convolution with padding "same" of one sample in float32, and how much of it a worker has.

    Attributes:
        C, K: input and output channels; taps.
        chunk: samples of a chunk.
        chunks: chunks of a worker.
    """

    C: int
    K: int
    chunk: int
    chunks: int

    def problem(self, workers: int) -> ConvProblem:
        L = self.chunk * self.chunks * workers
        specs = (ArraySpec(shape, "float32") for shape in ((1, self.C, L), (self.C, self.C, self.K)))
        return ConvProblem.conv1d(*specs, padding="same")

    def piece(self) -> ConvProblem:
        """A chunk between two others."""
        p = self.problem(3)
        return Piece.of(p, slice(0, 1), slice(self.chunk, 2 * self.chunk)).problem

    def halo_bytes(self, workers: int, worker: int) -> tuple[int, int]:
        """The bytes that a worker needs from the previous and from the next worker."""
        own = self.chunk * self.chunks
        piece = Piece.of(self.problem(workers), slice(0, 1), slice(worker * own, (worker + 1) * own))
        sample = self.C * 4
        before = max(0, worker * own - piece.positions.start)
        return before * sample, max(0, piece.positions.stop - (worker + 1) * own) * sample

    def lazy(self, x: Any) -> Any:
        weight = np.random.default_rng(1).standard_normal((self.C, self.C, self.K)).astype(np.float32)
        return gpuconv.dask.conv1d(x, weight, padding="same")

    def tasks(self, workers: int) -> int:
        """The number of tasks of the graph, without those that create the input."""
        shape = self.problem(workers).input_shape
        y = self.lazy(da.zeros(shape, dtype=np.float32, chunks=(1, -1, self.chunk)))
        return len(y.dask.layers[y.name])


@dataclass(frozen=True, slots=True)
class Links:
    """The links between workers.

    Attributes:
        node: number of workers of a node.
        inside, between: speed in a node and between nodes, in GB/s and in each direction.
        latency_us: latency of a transfer.
    """

    node: int
    inside: float
    between: float
    latency_us: float

    def halo_us(self, signal: Signal, workers: int) -> float:
        """The transfer time of the worker that waits longest, one side after the other."""
        longest = 0.0
        for worker in range(workers):
            before, behind = signal.halo_bytes(workers, worker)
            sides = ((before, worker % self.node == 0), (behind, (worker + 1) % self.node == 0))
            speeds = ((size, self.between if crosses else self.inside) for size, crosses in sides if size)
            longest = max(longest, sum(self.latency_us + size / (1e3 * speed) for size, speed in speeds))
        return longest


ON_CPU = Signal(C=32, K=9, chunk=2**17, chunks=8)
ON_GPU = Signal(C=256, K=15, chunk=2**22, chunks=8)  # of 4 GiB
# Between processes through TCP, of memory: assumptions.
LOOPBACK = Links(node=64, inside=1.0, between=1.0, latency_us=500.0)
# NVLink of an H200, 900 GB/s of both directions together, and a port of 400 Gb/s for each GPU (data sheets of H200 and
# of DGX H200); the latency of a transfer that Python starts through UCX is an assumption.
NVLINK = Links(node=8, inside=450.0, between=50.0, latency_us=100.0)


@dataclass(frozen=True, slots=True)
class Row:
    """Predicted times for a number of workers, in milliseconds, and measured ones if there are any.

    Attributes:
        workers, tasks: their numbers.
        halo_bytes: most bytes that a worker gets from others.
        halo_ms: transfer time of the worker that waits longest.
        work_ms, scheduler_ms: time of a worker, and of all tasks in the scheduler.
        predicted_ms: the longer of the two.
        measured_ms: None where nothing was measured.
        cpu_ms: measured CPU time of a worker, on average, which is more reliable on a busy machine.
    """

    workers: int
    tasks: int
    halo_bytes: int
    halo_ms: float
    work_ms: float
    scheduler_ms: float
    predicted_ms: float
    measured_ms: float | None = None
    cpu_ms: float | None = None


class Times(NamedTuple):
    """Milliseconds of a run: until all tasks are done, and the average CPU time of a worker."""

    all_ms: float
    cpu_ms: float


def predict(
    signal: Signal, workers: int, chunk_us: float, links: Links, task_us: float, measured: Times | None = None
) -> Row:
    tasks = signal.tasks(workers)
    halo_us = links.halo_us(signal, workers)
    work_ms, scheduler_ms = (signal.chunks * chunk_us + halo_us) / 1e3, tasks * task_us / 1e3
    halo_bytes = max(sum(signal.halo_bytes(workers, worker)) for worker in range(workers))
    time_ms = max(work_ms, scheduler_ms)
    return Row(workers, tasks, halo_bytes, halo_us / 1e3, work_ms, scheduler_ms, time_ms, *(measured or ()))


def chunk_us(signal: Signal, device: Device | None) -> float:
    """The time of a chunk by the cost model of a GPU, or for None of one core of a CPU."""
    p = signal.piece()
    if device is None:
        return cpu.cost(p) / 1e3
    choice = dispatch.choose(p, Layout.contiguous(p), device)
    assert choice is not None
    return choice.plan.candidates[0][1]


def measure_task_us(client: Client) -> float:
    """The CPU time of client and scheduler for a task that computes nothing: the shortest of three."""
    times = []
    for _ in range(3):
        empty = da.zeros(EMPTY_TASKS, chunks=1)
        start = time.process_time()
        wait(client.persist(empty))
        times.append(1e6 * (time.process_time() - start) / EMPTY_TASKS)
    return min(times)


def measure(client: Client, signal: Signal, counts: Sequence[int], turns: int) -> dict[int, Times]:
    """The shortest times for each number of workers, in turns; the inputs are on the workers before."""
    addresses = sorted(client.nthreads())
    inputs = {}
    for n in counts:
        parts = []
        for worker in range(n):
            part = da.random.default_rng(worker).standard_normal(
                (1, signal.C, signal.chunk * signal.chunks), dtype=np.float32, chunks=(1, -1, signal.chunk)
            )
            parts.append(client.persist(part, workers=addresses[worker]))
        wait(parts)
        inputs[n] = da.concatenate(parts, axis=-1)
    least = dict.fromkeys(counts, Times(float("inf"), float("inf")))
    for turn in range(turns + 1):
        for n in counts:
            y = signal.lazy(inputs[n])
            before = client.run(time.process_time, workers=addresses[:n])
            start = time.perf_counter()
            result = client.persist(y, workers=addresses[:n])
            wait(result)
            all_ms = 1e3 * (time.perf_counter() - start)
            after = client.run(time.process_time, workers=addresses[:n])
            cpu_ms = 1e3 * sum(after[worker] - before[worker] for worker in before) / n
            if turn:  # the first turn is a warm-up
                least[n] = Times(min(least[n].all_ms, all_ms), min(least[n].cpu_ms, cpu_ms))
            del result
    return least


def table_of(title: str, signal: Signal, rows: Sequence[Row], worker: str) -> Table:
    """One line a row, at most 80 columns; "predicted" and "measured" stand above what they are."""
    size = f"{signal.chunks} chunks of {signal.C} x {signal.chunk:,} each, {signal.K} taps; times in ms"
    table = Table(title=f"{title}\n{size}", box=box.SIMPLE, padding=0, min_width=76)
    first, names = rows[0], (worker, "tasks", "halo KB", "halo", "work", "sched.", "predicted", "eff.")
    for name in (*names, *(() if first.measured_ms is None else ("measured", "eff.", "CPU"))):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row.workers), str(row.tasks), f"{row.halo_bytes / 1e3:.1f}"]
        cells += [f"{ms:.1f}" for ms in (row.halo_ms, row.work_ms, row.scheduler_ms, row.predicted_ms)]
        cells.append(f"{first.predicted_ms / row.predicted_ms:.0%}")
        if row.measured_ms is not None and first.measured_ms is not None:
            cells += [f"{row.measured_ms:.1f}", f"{first.measured_ms / row.measured_ms:.0%}", f"{row.cpu_ms:.1f}"]
        table.add_row(*cells)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--processes", type=counts, default="1,2", metavar="COUNTS", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--turns", type=count, default=5, help="turns of each number (default: %(default)s)")
    parser.add_argument("--task-us", type=float, metavar="US", help="scheduler's time for a task; nothing is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 80)
    rows, task_us = [], args.task_us
    if task_us is None:
        options = {"n_workers": max(args.processes), "threads_per_worker": 1, "dashboard_address": None}
        with LocalCluster(**options) as cluster, Client(cluster) as client:
            task_us = measure_task_us(client)
            measured = measure(client, ON_CPU, args.processes, args.turns)
        rows = [predict(ON_CPU, n, chunk_us(ON_CPU, None), LOOPBACK, task_us, measured[n]) for n in args.processes]
        load = f", {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        console.print(table_of(f"Processes of this machine, measured and predicted{load}", ON_CPU, rows, "workers"))
    device = Device.from_arch("sm_90")
    on_paper = [predict(ON_GPU, n, chunk_us(ON_GPU, device), NVLINK, task_us) for n in GPUS]
    console.print(table_of(f"{device.name}, nodes of {NVLINK.node}: predicted, not measured", ON_GPU, on_paper, "GPUs"))
    last = on_paper[-1]
    console.print(
        f"The scheduler takes {task_us:.0f} us for a task, so {last.workers} workers need chunks of at least "
        f"{last.scheduler_ms / ON_GPU.chunks:.0f} ms of work.",
        highlight=False,
    )
    if args.json:
        signals = {"cpu": asdict(ON_CPU), "gpu": asdict(ON_GPU)}
        found = {"task_us": task_us, "signals": signals, "measured": list(map(asdict, rows))}
        write_json(
            args.json,
            {
                "environment": environment({"kind": "cpu", "name": "CPU"}),
                **found,
                "predicted": list(map(asdict, on_paper)),
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
