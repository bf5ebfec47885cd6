"""The effect of a change of the cost model or of a rule: plans of random problems before and after it.

python -m bench.plans --write before.jsonl      # in a checkout without the change
python -m bench.plans --write after.jsonl       # in one with it
python -m bench.plans --compare before.jsonl after.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpuconv import dispatch
from gpuconv.device import ARCHITECTURES, Device
from gpuconv.families import Layout
from gpuconv.problem import ConvProblem, Problem, WeightGradientProblem

CHANNELS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 600, 768, 1024, 1280, 2048)
FORMATS = (("bfloat16", "float32"), ("float32", "float32"), ("float32", "tf32"), ("float16", "float32"))


def random_problems(count: int, seed: int) -> Iterator[Problem]:
    """Layers as models have them, at batches and lengths from a stream's to a training step's; all three passes."""
    draw = random.Random(seed)
    for _ in range(count):
        K = draw.choice((1, 2, 3, 3, 3, 5, 7, 8, 9, 11, 16, 31, 41))
        stride = draw.choice((1, 1, 1, 1, 2, 4, 8))
        dilation = draw.choice((1, 1, 1, 2, 4, 16)) if stride == 1 else 1
        groups = draw.choice((1, 1, 1, 1, 1, 4, 16))
        C_in, C_out = draw.choice(CHANNELS), draw.choice(CHANNELS)
        if draw.random() < 0.1:
            groups = C_out = C_in
        elif C_in % groups or C_out % groups:
            groups = 1
        dtype, precision = draw.choice(FORMATS)
        length = dilation * (K - 1) + 1 + int(10 ** draw.uniform(0, 4.5))
        problem = ConvProblem(
            draw.choice(("conv1d", "conv1d", "conv_transpose1d")),
            int(10 ** draw.uniform(0, 1.8)),
            C_in,
            C_out,
            length,
            K,
            stride,
            dilation=dilation,
            groups=groups,
            has_bias=draw.random() < 0.5,
            dtype=dtype,
            precision=precision,
        )
        yield draw.choice((problem, problem, WeightGradientProblem.of(dataclasses.replace(problem, has_bias=False))))


def plan_of(problem: Problem, device: Device) -> dict[str, Any]:
    """The parts of a problem's plan that are compared."""
    choice = dispatch.choose(problem, Layout.contiguous(problem), device)
    if choice is None:
        return {"problem": str(problem), "family": "none", "segments": 1, "candidates": []}
    return {
        "problem": str(problem),
        "family": choice.family,
        "segments": dict(choice.launch.params).get("segments", 1),
        "candidates": choice.plan.candidates,
    }


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each plan that changed, then their numbers."""
    changes: Counter[str] = Counter()
    for old, new in zip(before, after, strict=True):
        if old["problem"] != new["problem"]:
            raise ValueError(f"the files hold different problems: {old['problem']}, {new['problem']}")
        kinds = [field for field in ("family", "segments") if old[field] != new[field]]
        chosen = [plan["candidates"][0][0] if plan["candidates"] else "" for plan in (old, new)]
        if chosen[0] != chosen[1]:
            kinds.append("tile")
        changes.update(kinds or ["nothing"])
        if kinds:
            yield f"{new['problem']}: {_change(old, new, chosen)}"
    yield f"{len(after)} plans; changed: {', '.join(f'{kind} {number}' for kind, number in changes.most_common())}"


def _change(old: dict[str, Any], new: dict[str, Any], chosen: Sequence[str]) -> str:
    if old["family"] != new["family"]:
        return f"{old['family']} -> {new['family']}"
    words = [new["family"]]
    if old["segments"] != new["segments"]:
        words.append(f"{old['segments']} -> {new['segments']} segments")
    if chosen[0] != chosen[1]:
        times = dict(new["candidates"])
        reason = f"{times[chosen[0]]:.1f} us" if chosen[0] in times else "not a candidate any more"
        words.append(f"{chosen[0]} ({reason}) -> {chosen[1]} ({times[chosen[1]]:.1f} us)")
    return ", ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plans", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="sm_90", choices=sorted(ARCHITECTURES, key=lambda a: int(a[3:])))
    parser.add_argument("--count", type=int, default=3000, help="of problems (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="write the plans, one a line")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    args = parser.parse_args(argv)
    if args.compare:
        before, after = ([json.loads(line) for line in file.read_text().splitlines()] for file in args.compare)
        print("\n".join(compare(before, after)))
        return 0
    device = Device.from_arch(args.arch)
    plans = (plan_of(problem, device) for problem in random_problems(args.count, args.seed))
    args.write.write_text("".join(f"{json.dumps(plan)}\n" for plan in plans))
    return 0


if __name__ == "__main__":
    sys.exit(main())
