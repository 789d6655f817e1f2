"""Two saved results side by side, and the regression gate of CI: only of one machine, or where the user says so.

Two runs are not paired: what the machine did between them is in the ratio. So a slowdown counts for the gate only where the whole of it,
at 95 % for all candidates together, is above what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deploycc.bench.environment import differences, software_differences
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import BenchResult
from deploycc.errors import BenchError
from deploycc.runtime.statistics import CONFIDENCE, Ratio, holm, ratio_of_medians

TWO_RUNS = "measured in two runs: what the machine did between them is in the ratio"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results side by side: speed-up of the second over the first by candidate, and what else differs."""

    ratios: dict[str, Ratio]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Slowdown:
    """One candidate at the gate.

    Attributes:
        name: of the candidate.
        value: time now over time then, less 1: 0.05 = 5 % slower.
        low: lower end of its interval, simultaneous over all candidates.
        high: upper end.
        allowed: most that is allowed.
    """

    name: str
    value: float
    low: float
    high: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it may be within what is allowed."""
        return self.low <= self.allowed

    def __str__(self) -> str:
        state = "ok" if self.passed else "TOO SLOW"
        return f"{self.name}: {self.value:+.1%} [{self.low:+.1%}, {self.high:+.1%}], allowed +{self.allowed:.1%}: {state}"


def compare(a: BenchResult, b: BenchResult, *, across_machines: bool = False, renamed: bool = False) -> Comparison:
    """Speed-up of `b` over `a` for every candidate of both.

    Args:
        a: the first result.
        b: the second.
        across_machines: compare results of unlike machines and threads too; what differs is among the notes.
        renamed: where each has but one candidate, compare these whatever they are called.

    Raises:
        BenchError: another machine or other threads (unless across_machines), another clock, scenario or amount of input, naming what
            differs; or no candidate in common.
    """
    unlike = differences(a.environment, b.environment)
    if unlike and not across_machines:
        raise BenchError(
            f"the results are of unlike machines or settings and cannot be compared: {'; '.join(unlike)}",
            fix="measure both on one machine with the same --threads, best in one run: deploycc bench A B; or add --across-machines",
        )
    for what, left, right in (("clocks", a.clock, b.clock), ("scenarios", _scenario(a), _scenario(b)), ("drivers", a.driver, b.driver)):
        if left != right:
            raise BenchError(
                f"the results were timed by unlike {what} and cannot be compared: {left} and {right}",
                fix=f"measure both with one {what.removesuffix('s')}",
            )
    pairs = _pairs(a, b, renamed)
    for left, right in pairs:
        if _elements(left) != _elements(right):
            raise BenchError(
                f"'{left.name}' was measured with unlike input: {left.inputs} and {right.inputs}",
                fix="measure both with the same batch and size (--input NAME:SHAPE)",
            )
    ratios = holm({right.name: ratio_of_medians(left.samples, right.samples, paired=False) for left, right in pairs})
    others = [f"{left.name} was compared with {right.name}" for left, right in pairs if left.name != right.name]
    notes = [*(f"unlike machines: {item}" for item in unlike), *software_differences(a.environment, b.environment), *others, TWO_RUNS]
    return Comparison(ratios, tuple(notes))


def slowdowns(baseline: BenchResult, now: BenchResult, allowed: float, *, across_machines: bool = False) -> tuple[Slowdown, ...]:
    """How much slower each candidate of both is now. Raises what `compare` raises."""
    ratios = compare(baseline, now, across_machines=across_machines, renamed=True).ratios
    sure = 1 - (1 - CONFIDENCE) / len(ratios)  # Bonferroni
    found: list[Slowdown] = []
    for then, item in _pairs(baseline, now, renamed=True):
        ratio = ratio_of_medians(item.samples, then.samples, paired=False, confidence=sure)
        found.append(Slowdown(item.name, ratio.value - 1, ratio.low - 1, ratio.high - 1, allowed))
    return tuple(found)


def _pairs(a: BenchResult, b: BenchResult, renamed: bool) -> list[tuple[Measurement, Measurement]]:
    """Those of one name. Raises BenchError."""
    if renamed and len(a.measurements) == len(b.measurements) == 1:
        return [(a.measurements[0], b.measurements[0])]
    theirs = {item.name: item for item in b.measurements}
    pairs = [(item, theirs[item.name]) for item in a.measurements if item.name in theirs]
    if not pairs:
        left, right = (", ".join(item.name for item in result.measurements) for result in (a, b))
        raise BenchError(f"the results share no candidate: {left} and {right}", fix="compare results that hold the same names")
    return pairs


def _scenario(result: BenchResult) -> str:
    """Kind, streams and rate: with others, times mean something else."""
    found = result.scenario
    rate = f", {found.qps:g} queries a second" if found.qps else ""
    return f"{found.kind}, {found.streams} stream{'s' if found.streams > 1 else ''}{rate}"


def _elements(measurement: Measurement) -> int:
    """Input values per call."""
    return sum(int(np.prod(shape)) for _, shape in measurement.inputs.values())
