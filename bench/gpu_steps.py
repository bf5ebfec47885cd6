"""Steps of bench.gpu_report on the package itself: build every kernel, run every case of `gpuconv verify`.

python -m bench.gpu_steps build [--records FILE] [--worker I/N]
python -m bench.gpu_steps verify [--records FILE] [--worker I/N]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from gpuconv import cases, runtime, source
from gpuconv.families import FAMILIES, Config
from gpuconv.gpus import missing_gpu
from gpuconv.verify import verify

from . import records


def build_work() -> Iterator[tuple[str, records.Work]]:
    """Every specialisation that this GPU can be asked for: compiled into CuPy's cache, and loaded.

    Those with 32-bit indices first: few problems need the others.
    """
    device = runtime.device(int(runtime.cupy_module().cuda.runtime.getDevice()))
    every = dict.fromkeys(config for family in FAMILIES for config in family.configs(device))
    for config in sorted(every, key=lambda config: dict(config.macros).get("INDEX_BITS", 32)):  # stable
        digest = hashlib.sha256(source.assemble(config.kernel, dict(config.macros)).encode()).hexdigest()
        yield f"{config.kernel} {digest[:12]}", partial(_build, config)


def _build(config: Config) -> dict[str, Any]:
    runtime.build(config).compile()
    return {}


def verify_work() -> Iterator[tuple[str, records.Work]]:
    """One piece for each case and number format."""
    for number_format in (
        "float32",
        "bfloat16",
        *(name for name in cases.FORMATS if name not in ("float32", "bfloat16")),
    ):
        seen: set[str] = set()
        for case in cases.CASES:
            if case.name not in seen:  # the name of another case may be part of it, and has selected it, too
                seen |= {chosen.name for chosen in cases.select(case.name)}
                yield f"{number_format} {case.name}", partial(_verify, case.name, number_format)


def _verify(name: str, number_format: str) -> dict[str, Any]:
    report = verify("gpu", filter=name, dtypes=[number_format])
    failures = [str(failure) for failure in report.failures]
    checks = {check: sum(counts.values()) for check, counts in report.counts.items()}
    return {"ok": not failures, "checks": sum(checks.values()), "failures": failures}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of bench.records, and 3 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_steps", description=__doc__.partition("\n")[0])
    parser.add_argument("step", choices=("build", "verify"))
    records.add_arguments(parser)
    args = parser.parse_args(argv)
    if missing := missing_gpu():
        print(missing)
        return 3
    pieces = list(build_work() if args.step == "build" else verify_work())
    return records.open_records(args).run(pieces[:4] if args.rehearse else pieces)


if __name__ == "__main__":
    sys.exit(main())
