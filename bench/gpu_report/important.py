"""Measures the most informative layers first, as records, for a short time on a GPU.

Each layer stands for a kind of kernel or a known weakness. The method is that of bench.speed, with fewer repeats, and
`result` makes of the records what bench.speed writes, for bench.speed --compare and bench.speed.plot.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from ..layers import load
from ..modes import MODES, Direction, prediction_key
from ..speed.gpu import GpuEngine
from ..speed.measure import Case, Deadlines, Method, measure
from ..speed.results import SCHEMA, RunResult, ceilings_of, environment
from ..static import predictions
from . import records

LAYERS = (
    "whisper_large_v3.conv2_b16",
    "wav2vec2_base.feat1_k3s2",
    "diffusion_policy.mid_k5_c2048_b1",
    "encodec24.enc_down_k16s8",
    "hifigan_v1.resblock_k11_d5_c32",
    "mamba2_2p7b.conv_k4",
    "conformer_l.dw_k31",
    "mimi.enc_down_k16s8_stream_b1",
    "nnaudio.stft_k2048s512",
    "bpnet.rconv_k3_d256",
    "bpnet.fconv_k75_66to2",
    "htdemucs.tdec_last_k8s4_b1",
)
REPEATS = 10
PER_CASE_SECONDS = 12.0
MAX_BYTES = 16 * 2**30

# The record that says where the others come from.
WHERE = "where"


def cases(directions: Sequence[Direction] = ("forward",), *, rehearse: bool = False) -> Iterator[Case]:
    """The layers in bfloat16 and float32, the layer outermost."""
    layers = {layer.name: layer for layer in load()}
    modes = [mode for name in ("bfloat16", "float32") for mode in MODES if mode.name == name]
    for name in ("tacotron2.location_conv_k31_b1",) if rehearse else LAYERS:
        layer = layers[name]
        for mode in modes:
            batch = layer.batch_within(MAX_BYTES, sys.maxsize, mode.dtype)
            for direction in directions:
                if batch is not None:
                    yield Case(layer, mode, batch, direction)


def work(
    directions: Sequence[Direction], *, seconds: float, rehearse: bool, engine: GpuEngine | None = None
) -> Iterator[tuple[str, records.Work]]:
    """First a record of the machine, then a piece of work for each case. No case takes samples after `seconds`."""
    end = time.monotonic() + seconds
    engine = engine or GpuEngine(rehearse=rehearse)
    method = Method(repeats=1, sample_us=1.0) if rehearse else Method(repeats=REPEATS)
    device = engine.describe()
    predicted = predictions.read(device["name"])

    def where() -> dict[str, Any]:
        ceilings = ceilings_of(engine.ceilings)
        return {"environment": environment(device), "ceilings": ceilings, "settings": {"repeats": method.repeats}}

    def one(case: Case) -> dict[str, Any]:
        whole = case.batch == case.layer.batch  # what the predictions are made for
        us = predicted.get(prediction_key(case.mode.name, case.direction), {}).get(case.layer.name)
        deadlines = Deadlines(min(time.monotonic() + PER_CASE_SECONDS, end), end)
        found = measure(case, engine, method, time.monotonic, deadlines, us if whole else None)
        return {"ok": found.ours.status not in ("wrong", "failed"), "measurement": asdict(found)}

    yield WHERE, where
    for case in cases(directions, rehearse=rehearse):
        yield case.name, partial(one, case)


def result(found: Iterable[dict[str, Any]]) -> RunResult | None:
    """The run that the records of one or more directions describe; None without the record of the machine."""
    rows = {record["key"]: record for record in found}
    if WHERE not in rows or "environment" not in rows[WHERE]:
        return None
    document = {name: rows[WHERE][name] for name in ("environment", "settings", "ceilings")}
    measured = [row["measurement"] for row in rows.values() if "measurement" in row]
    return RunResult.from_json({**document, "measurements": measured, "unmeasured": [], "schema": SCHEMA})
