"""One step of bench.gpu_report by itself, as records: lines of JSON.

From the root of a checkout, on a machine with a GPU:

    python -m bench.gpu_report.step tiles [--records FILE]
    compute-sanitizer --tool memcheck --error-exitcode 4 python -m bench.gpu_report.step kernels
    ncu --profile-from-start off --set full --clock-control none python -m bench.gpu_report.step conv2
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

from gpuconv import cases, runtime, source
from gpuconv.checks import Target
from gpuconv.checks.families import families_of, far_runs, run_far
from gpuconv.families import FAMILIES, Config
from gpuconv.gpus import missing_gpu
from gpuconv.verify import verify

from .. import accuracy, overhead
from ..speed.micro import Micro
from . import important, profile, records, sanitize, tiles, wgmma

Pieces: TypeAlias = Iterable[tuple[str, records.Work]]


def build_work() -> Iterator[tuple[str, records.Work]]:
    """Compile every specialisation that this GPU can need into CuPy's cache, and load it.

    Those with 32-bit indices first: few problems need the others.
    """
    device = runtime.current_gpu()
    every = dict.fromkeys(config for family in FAMILIES for config in family.configs(device))
    for config in sorted(every, key=lambda config: dict(config.macros).get("INDEX_BITS", 32)):  # stable
        digest = hashlib.sha256(source.assemble(config.kernel, dict(config.macros)).encode()).hexdigest()
        yield f"{config.kernel} {digest[:12]}", partial(_build, config, device.arch_name)


def _build(config: Config, arch: str) -> dict[str, Any]:
    runtime.build(config, arch).compile()
    return {}


def verify_work() -> Iterator[tuple[str, records.Work]]:
    """What `gpuconv verify` does: a piece for each case and number format, and one for arrays beyond 2**31 elements."""
    formats = dict.fromkeys(("float32", "bfloat16", *cases.NUMBER_FORMATS))
    for number_format in formats:
        seen: set[str] = set()
        for case in cases.select():
            if case.name not in seen:  # selecting another case may have selected this one, too
                seen |= {chosen.name for chosen in cases.select(case.name)}
                yield f"{number_format} {case.name}", partial(_verify, case.name, number_format)
    yield "float16 far", partial(_verify_far, "float16")


def _verify(name: str, number_format: str) -> dict[str, Any]:
    report = verify("gpu", filter=name, dtypes=[number_format])
    failures = [str(failure) for failure in report.failures]
    checks = {check: sum(counts.values()) for check, counts in report.counts.items()}
    return {"ok": not failures, "checks": sum(checks.values()), "failures": failures}


def _verify_far(number_format: str) -> dict[str, Any]:
    target = Target(on_gpu=True)
    device = runtime.current_gpu()
    runs = far_runs(cases.select(), number_format, families_of(device)[0], device)
    results = [run_far(case, number_format, target, 0, family) for _, case, family in runs]
    failures = [str(result.failure) for result in results if result.failure is not None]
    return {"ok": not failures, "checks": len(results), "failures": failures}


def micro_work(*, rehearse: bool) -> Iterator[tuple[str, records.Work]]:
    """The rates on which the predictions and the floors rest, and wgmma on shifted windows."""
    micro = Micro(rehearse=rehearse)
    for name, experiment in micro.experiments().items():
        yield name, partial(_figure, experiment)
    for dilation in wgmma.DILATIONS:
        yield f"wgmma dilation {dilation}", partial(wgmma.probe, micro, dilation)


def _figure(experiment: Callable[[], float]) -> dict[str, Any]:
    try:
        return {"figure": round(experiment(), 3)}
    except ModuleNotFoundError as error:
        return {"absent": str(error)}


# What a step does, given `seconds` and `rehearse`.
WORK: dict[str, Callable[..., Pieces]] = {
    "build": lambda **_: build_work(),
    "verify": lambda **_: verify_work(),
    "micro": lambda rehearse, **_: micro_work(rehearse=rehearse),
    "tiles": lambda rehearse, **_: tiles.work(rehearse=rehearse),
    "kernels": lambda rehearse, **_: sanitize.work(rehearse=rehearse),
    "dense_kernels": lambda rehearse, **_: sanitize.work("mma|tail|skinny", rehearse=rehearse),
    **{name: partial(profile.work, name) for name in profile.WORK},
    "cudnn": lambda **_: profile.peer_work(),
    "overhead": lambda rehearse, **_: overhead.work(rehearse=rehearse),
    "accuracy": lambda **_: accuracy.work(on_gpu=True),
    "benchmark": partial(important.work, ("forward",)),
    "gradients": partial(important.work, ("grad_weight", "grad_input")),
}
# A rehearsal runs only the first pieces of the other steps.
WHOLE_IN_REHEARSALS = ("micro", *profile.WORK, "cudnn", "overhead", "benchmark", "gradients")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of bench.gpu_report.records, and 3 without a GPU; tools around it have their own."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=WORK)
    records.add_arguments(parser)
    args = parser.parse_args(argv)
    if missing := missing_gpu():
        print(missing)
        return 3
    pieces = WORK[args.step](rehearse=args.rehearse, seconds=args.seconds)
    few = args.rehearse and args.step not in WHOLE_IN_REHEARSALS
    return records.open_records(args).run(islice(pieces, 2) if few else pieces)


if __name__ == "__main__":
    sys.exit(main())
