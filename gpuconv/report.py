"""The report of `gpuconv.verify`: every check with its failure, as text, JSON and JUnit XML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple
from xml.etree import ElementTree

from .text import count

# The names of the checks that give one result for each kernel family; the others give one for each case.
BY_FAMILY = "families"
FAR = "far"


class Tap(NamedTuple):
    """One product of an output element: weight at (c_in, k) times input at (c_in, l_in).

    `c_in` counts within the group.
    """

    c_in: int
    k: int
    l_in: int
    weight: complex
    input: complex


@dataclass(frozen=True, slots=True)
class Failure:
    """A check that failed.

    Attributes:
        case, dtype, check: what failed; `dtype` is one of `gpuconv.cases.NUMBER_FORMATS`, or one of integers.
        problem: what was computed: the case's own problem or one derived from it.
        message: what was expected, or what was raised, in one line.
        traceback: that of an exception; None if none was raised.
        bad: the number of wrong elements.
        index: that of the first wrong output element; None where the failure is not that of an element.
        got, expected: the value of that element, and what it should be.
        bound: the permitted distance of got from expected, for complex data of each part; None where the values must
            be equal.
        taps: the first products of the element, at most `gpuconv.checks.MAX_TAPS`.
        num_taps: the number of its products; None for an element of a gradient, whose products are not listed.
    """

    case: str
    dtype: str
    check: str
    problem: str
    message: str
    traceback: str | None = None
    bad: int = 0
    index: tuple[int, ...] | None = None
    got: complex | None = None
    expected: complex | None = None
    bound: float | None = None
    taps: tuple[Tap, ...] = ()
    num_taps: int | None = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: complex numbers as [real, imaginary], NaN and infinities as strings."""
        return {
            **asdict(self),
            "index": None if self.index is None else list(self.index),
            "got": _json_number(self.got),
            "expected": _json_number(self.expected),
            "bound": _json_number(self.bound),
            "taps": [
                {**tap._asdict(), "weight": _json_number(tap.weight), "input": _json_number(tap.input)}
                for tap in self.taps
            ],
        }

    def __str__(self) -> str:
        lines = [f"{self.case} [{self.dtype}] {self.check}: {self.message}", f"  {self.problem}"]
        if self.got is not None:
            place = "" if self.index is None else f" at {self.index}, the first of {self.bad} wrong elements"
            bound = "" if self.bound is None else f", bound {self.bound:.3g}"
            lines.append(f"  got {self.got!r}, expected {self.expected!r}{bound}{place}")
        if self.index is not None and self.num_taps is not None:
            lines.append(f"  fed by {count(self.num_taps, 'tap')}" + (":" if self.taps else ""))
            lines += [
                f"    weight[c_in={tap.c_in}, k={tap.k}] = {tap.weight!r}, input[l_in={tap.l_in}] = {tap.input!r}"
                for tap in self.taps
            ]
            if self.num_taps > len(self.taps):
                lines.append("    ...")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Result:
    """One check of one case in one number format.

    Attributes:
        case, dtype, check: the check that was run.
        seconds: its wall time.
        worst: the largest distance of an element from its exact value as a fraction of its error bound; None where
            elements must be equal.
        failure: None where it passed.
        family: the kernel family that was checked by name; None where gpuconv chose it.
    """

    case: str
    dtype: str
    check: str
    seconds: float
    worst: float | None
    failure: Failure | None
    family: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found. `str` gives a short table.

    Attributes:
        results: every check that was run.
        checks: the names of all checks, in the order in which they run.
        device: a description of the device.
        versions: those of gpuconv, Python, NumPy, and on a GPU of CuPy and CUDA.
        seed: that of the data.
        skipped: dtypes and checks that could not be run, with the reason.
        total: the number of all pairs of case and dtype.
        elapsed: wall time in seconds.
        families: the kernel families that the GPU's architecture has; none on the CPU.
        lacking: the kernel families that it lacks.
        restricted: whether cases, dtypes or a family were selected. If not, each of `families` must be checked.
        layers: the problems of the user's own layers, by case and dtype.

    Example:
        >>> import gpuconv
        >>> report = gpuconv.verify(device="cpu", filter="dilation", dtypes="float32")
        >>> report.ok, report.failures, report.seed
        (True, (), 0)
    """

    results: tuple[Result, ...]
    checks: tuple[str, ...]
    device: str
    versions: dict[str, str]
    seed: int
    skipped: dict[str, str]
    total: int
    elapsed: float
    families: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    restricted: bool = False
    layers: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """The pairs of case and dtype that were run."""
        return len({(result.case, result.dtype) for result in self.results})

    @property
    def worst(self) -> Result | None:
        """The result with the largest `worst`, whether within the error bound or beyond it."""
        bounded = [result for result in self.results if result.worst is not None]
        return max(bounded, key=lambda result: result.worst or 0.0, default=None)

    @property
    def failures(self) -> tuple[Failure, ...]:
        return tuple(result.failure for result in self.results if result.failure is not None)

    @property
    def family_runs(self) -> dict[str, int]:
        """The number of cases that were run with each kernel family by name."""
        found = Counter(result.family for result in self.results if result.check == BY_FAMILY)
        return {name: found[name] for name in self.families}

    @property
    def unreached(self) -> tuple[str, ...]:
        """The kernel families that no case was run with."""
        return tuple(name for name, runs in self.family_runs.items() if not runs)

    @property
    def ok(self) -> bool:
        """Whether every check passed and, unless the run was restricted, every kernel family was run."""
        return not self.failures and (self.restricted or not self.unreached)

    @property
    def layer_rows(self) -> list[dict[str, Any]]:
        """For each layer and dtype: the problem, the worst element as a fraction of its bound, and the failures."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.case, result.dtype), []).append(result)
        return [
            {
                "layer": case,
                "dtype": dtype,
                "problem": self.layers[case, dtype],
                "fraction_of_bound": max((r.worst for r in group if r.worst is not None), default=None),
                "failed": sum(r.failure is not None for r in group),
            }
            for (case, dtype), group in groups.items()
            if (case, dtype) in self.layers
        ]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """{check: {"passed": ..., "failed": ...}}, in the order of `checks`."""
        counts = {check: {"passed": 0, "failed": 0} for check in self.checks}
        for result in self.results:
            counts[result.check]["passed" if result.failure is None else "failed"] += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, the passed checks as counts."""
        return {
            "ok": self.ok,
            "device": {"name": self.device},
            "versions": self.versions,
            "seed": self.seed,
            "elapsed_s": self.elapsed,
            "cases": len({result.case for result in self.results}),
            "pairs": self.pairs,
            "total_pairs": self.total,
            "dtypes": list(dict.fromkeys(result.dtype for result in self.results)),
            "skipped": self.skipped,
            "checks": len(self.results),
            "counts": self.counts,
            "family_runs": self.family_runs,
            "unreached_families": list(self.unreached),
            "lacking_families": list(self.lacking),
            "worst": None
            if self.worst is None
            else {
                "case": self.worst.case,
                "dtype": self.worst.dtype,
                "check": self.worst.check,
                "fraction_of_bound": _json_number(self.worst.worst),
            },
            "layers": self.layer_rows if self.layers else None,
            "failures": [failure.to_dict() for failure in self.failures],
        }

    def to_junit(self) -> str:
        """A JUnit XML document: one test case per case and dtype, which fails with all its failed checks."""
        groups: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            groups.setdefault((result.dtype, result.case), []).append(result)
        failed = Counter(any(r.failure for r in group) for group in groups.values())
        suite = ElementTree.Element(
            "testsuite",
            name="gpuconv verify",
            tests=str(len(groups)),
            failures=str(failed[True]),
            errors="0",
            skipped="0",
            time=f"{self.elapsed:.3f}",
        )
        properties = ElementTree.SubElement(suite, "properties")
        facts = {"device": self.device, "seed": str(self.seed), **self.versions}
        facts.update({f"skipped {dtype}": reason for dtype, reason in self.skipped.items()})
        for name, value in facts.items():
            ElementTree.SubElement(properties, "property", name=name, value=_xml_text(value))
        for (dtype, case), group in groups.items():
            seconds = sum(result.seconds for result in group)
            element = ElementTree.SubElement(
                suite, "testcase", classname=f"gpuconv.verify.{dtype}", name=case, time=f"{seconds:.4f}"
            )
            failures = [result.failure for result in group if result.failure is not None]
            if failures:
                message = "; ".join(f"{failure.check}: {failure.message}" for failure in failures)
                details = ElementTree.SubElement(element, "failure", message=_xml_text(message))
                details.text = _xml_text("\n".join(f"{failure}\n{failure.traceback or ''}" for failure in failures))
        root = ElementTree.Element("testsuites")
        root.append(suite)
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"

    def __str__(self) -> str:
        dtypes = dict.fromkeys(result.dtype for result in self.results)
        num_cases = len({result.case for result in self.results})
        partial = self.pairs < self.total
        lines = [
            f"gpuconv {self.versions['gpuconv']} on {self.device}",
            f"{count(num_cases, 'case')}, {', '.join(dtypes)}; seed {self.seed}; {self.elapsed:.1f} s",
            *([f"a selection: {self.pairs} of {self.total} pairs of case and dtype; --all runs them all"] * partial),
            *(f"not run: {dtype}: {reason}" for dtype, reason in self.skipped.items()),
            "",
            f"{'check':<12}{'passed':>8}{'failed':>8}",
        ]
        lines += [f"{name:<12}{of['passed']:>8}{of['failed']:>8}" for name, of in self.counts.items()]
        if self.layers:
            lines += ["", f"{'layer':<10}{'worst element':>14}{'failed':>8}  problem"]
        for row in self.layer_rows:
            worst = "exact" if row["fraction_of_bound"] is None else f"{row['fraction_of_bound']:.3g}"
            lines.append(f"{row['layer']:<10}{worst:>14}{row['failed']:>8}  {row['problem']}")
        if self.families:
            lines += ["", f"{'kernel family':<28}{'runs':>6}"]
            lines += [f"{name:<28}{runs:>6}" for name, runs in self.family_runs.items() if runs]
        lines += [f"{name:<28}  not on this architecture" for name in self.lacking]
        lines += [f"{name:<28}  NOT REACHED by any case" for name in self.unreached if not self.restricted]
        shown = self.failures[:5]
        for failure in shown:
            lines += ["", str(failure)]
        if len(self.failures) > len(shown):
            lines += ["", f"... and {count(len(self.failures) - len(shown), 'more failure')}"]
        if self.worst is not None and self.worst.worst is not None:
            where = f"{self.worst.case} [{self.worst.dtype}] {self.worst.check}"
            lines += ["", f"worst element: {self.worst.worst:.3g} of its error bound, in {where}"]
        failed = f"{len(self.failures)} of {count(len(self.results), 'check')} FAILED"
        if self.failures:
            lines += ["", failed]
        elif self.ok:
            lines += ["", "all checks passed"]
        else:
            lines += ["", f"FAILED: no case reaches {', '.join(self.unreached)}"]
        return "\n".join(lines)


def _json_number(value: complex | None) -> Any:
    if value is None:
        return None
    if isinstance(value, complex):
        return [_json_number(value.real), _json_number(value.imag)]
    return value if math.isfinite(value) else str(value)


def _xml_text(text: str) -> str:
    """The text without the control characters that XML cannot hold."""
    return "".join(c if c >= " " or c in "\t\n" else "?" for c in text)
