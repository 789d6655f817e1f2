"""What a measurement found: raw samples with the environment, statistics computed from them, and when not to trust them.

Speed-up of a candidate = median(baseline) / median(candidate), its 95 % interval from a bootstrap over the rounds both took part in.
"Faster" and "slower" are only said when the interval leaves 1 out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploycc.bench.environment import Environment, differences, software_differences
from deploycc.core.target import Bench
from deploycc.errors import BenchError, StoreError
from deploycc.runtime.measure import Samples, Summary, instability, ratio_of_medians, summarize

WALL = "wall"
Metric = Literal["top1", "top5", "f1", "mse", "agreement", "cosine", "sqnr"]


class _Record(BaseModel):
    # JSON has no infinity: "Infinity" as text, which reads back as the number
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Accuracy(_Record):
    """How a real artifact answers on real samples, against the float reference on the same samples.

    Attributes:
        metric: what the gate looks at.
        reference: the float reference's value; None for "sqnr", 1 for "agreement".
        candidate: the artifact's value.
        agreement: share of equal arg-max, None when the output is no row of class scores.
        right_to_wrong: samples the reference has right and the candidate wrong; None without class labels.
        wrong_to_right: the reverse.
        sqnr_db: 10·log10(Σ r² / Σ (r − x)²) over all outputs and samples.
        max_abs: largest |difference| of an output value.
        samples: how many there were.
        labelled: how many had a label.
        broken: samples where the candidate has NaN or Inf and the reference does not.
    """

    metric: Metric
    reference: float | None
    candidate: float
    agreement: float | None
    right_to_wrong: int | None
    wrong_to_right: int | None
    sqnr_db: float
    max_abs: float
    samples: int
    labelled: int
    broken: int = 0


class Verdict(_Record):
    """What the gate says: the rule it applied and how it came out."""

    passed: bool
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of medians with its 95 % interval; over 1 = the candidate is faster."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["faster", "slower", "no difference"]:
        """What the interval supports."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference"

    def __str__(self) -> str:
        return f"{self.value:.2f}× [{self.low:.2f}, {self.high:.2f}] {self.verdict}"


class Measurement(_Record):
    """One candidate's raw samples; statistics in ms derive from them.

    Attributes:
        name: of the candidate.
        samples_ns: every timed call in order, in ns.
        per_round: calls in each round.
        warmups: calls made before.
        open_ms: loading the model.
        first_ms: the first answer after that.
        rss_growth_mb: peak resident memory while opening and answering once, over what this process held before (MB = 10^6 bytes).
            Libraries loaded and memory freed earlier are not in it. None when the kernel does not show it, or nothing grew.
        inputs: dtype and shape by input name.
    """

    name: str
    samples_ns: tuple[int, ...] = Field(min_length=1)
    per_round: int = Field(ge=1)
    warmups: int
    open_ms: float
    first_ms: float
    rss_growth_mb: float | None
    inputs: dict[str, tuple[str, tuple[int, ...]]]

    @functools.cached_property
    def samples(self) -> Samples:
        """As arrays."""
        return Samples(np.asarray(self.samples_ns, np.int64), self.per_round, self.warmups)

    @functools.cached_property
    def summary(self) -> Summary:
        """All statistics, in ms."""
        return summarize(self.samples)

    @property
    def cold_ms(self) -> float:
        """From nothing to the first answer."""
        return self.open_ms + self.first_ms

    @property
    def p50_ms(self) -> float:
        """Median."""
        return self.summary.p50

    @property
    def p90_ms(self) -> float:
        """90th percentile."""
        return self.summary.p90

    @property
    def p95_ms(self) -> float:
        """95th percentile."""
        return self.summary.p95

    @property
    def p99_ms(self) -> float:
        """99th percentile; `warnings` says when there are too few samples for it."""
        return self.summary.p99

    @property
    def mean_ms(self) -> float:
        """Mean."""
        return self.summary.mean

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the median, in ms."""
        return self.summary.low, self.summary.high

    def warnings(self) -> tuple[str, ...]:
        """Why these times are not to be trusted."""
        return instability(self.samples, self.summary)


class BenchResult(_Record):
    """All candidates of one interleaved run; `clock` says whose: the machine's, or a device's own ("CUDA events")."""

    schema_version: Literal[1] = 1
    measurements: tuple[Measurement, ...] = Field(min_length=1)
    baseline: str | None
    environment: Environment
    settings: Bench
    clock: str = WALL
    seed: int
    created: str

    def get(self, name: str) -> Measurement:
        """The candidate `name`; raises BenchError."""
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        names = ", ".join(measurement.name for measurement in self.measurements)
        raise BenchError(f"no candidate '{name}' was measured", fix=f"the candidates are {names}")

    def ratio(self, name: str, baseline: str | None = None) -> Ratio:
        """Speed-up of `name` over `baseline` (default: the run's own), paired by rounds. Raises BenchError without a baseline."""
        base = baseline or self.baseline
        if base is None:
            raise BenchError("this result has no baseline to compare with", fix="measure with baseline=NAME")
        return Ratio(*ratio_of_medians(self.get(base).samples, self.get(name).samples, seed=self.seed))

    def warnings(self) -> tuple[str, ...]:
        """Why these times are not to be trusted: the machine's reasons first."""
        each = (f"{measurement.name}: {text}" for measurement in self.measurements for text in measurement.warnings())
        return (*self.environment.warnings(), *each)

    def save(self, path: Path) -> None:
        """Write as JSON. Raises StoreError."""
        try:
            path.write_text(self.model_dump_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}", fix="give a file in a writable folder with free space") from error


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results side by side: speed-up of the second over the first by candidate, and what else differs."""

    ratios: dict[str, Ratio]
    notes: tuple[str, ...]


def load(path: Path) -> BenchResult:
    """Read what `save` wrote. Raises BenchError."""
    fix = "give a file that `deploycc bench --save FILE` wrote"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}", fix=fix) from error
    try:
        return BenchResult.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BenchError(f"{path} is not a bench result: {where}: {first['msg']}", fix=fix) from None


def compare(a: BenchResult, b: BenchResult) -> Comparison:
    """Speed-up of `b` over `a` for every candidate of both.

    Raises:
        BenchError: another machine, other threads or another amount of input, naming what differs; or no candidate in common.
    """
    if unlike := differences(a.environment, b.environment):
        raise BenchError(
            f"the results are of unlike machines or settings and cannot be compared: {'; '.join(unlike)}",
            fix="measure both on one machine with the same --threads, best in one run: deploycc bench A B",
        )
    if a.clock != b.clock:
        raise BenchError(
            f"the results were timed by unlike clocks and cannot be compared: {a.clock} and {b.clock}", fix="measure both with one clock"
        )
    shared = [item.name for item in a.measurements if item.name in {other.name for other in b.measurements}]
    if not shared:
        left, right = (", ".join(item.name for item in result.measurements) for result in (a, b))
        raise BenchError(f"the results share no candidate: {left} and {right}", fix="compare results that hold the same names")
    for name in shared:
        left, right = _elements(a.get(name)), _elements(b.get(name))
        if left != right:
            raise BenchError(
                f"'{name}' was measured with unlike input: {a.get(name).inputs} and {b.get(name).inputs}",
                fix="measure both with the same batch and size (--input NAME:SHAPE)",
            )
    ratios = {name: Ratio(*ratio_of_medians(a.get(name).samples, b.get(name).samples, paired=False)) for name in shared}
    notes = software_differences(a.environment, b.environment)
    return Comparison(ratios, (*notes, "measured in two runs: what the machine did between them is in the ratio"))


def _elements(measurement: Measurement) -> int:
    """Input values per call."""
    return sum(int(np.prod(shape)) for _, shape in measurement.inputs.values())
