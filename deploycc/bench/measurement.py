"""One candidate's raw samples, and what else was measured of it; statistics in ms derive from the samples."""

from __future__ import annotations

import functools
import itertools
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploycc.bench.roofline import Roof
from deploycc.runtime.doubts import instability
from deploycc.runtime.statistics import Samples, Summary, percentile, quantile_interval, summarize

Stage = Literal["pre-processing", "inference", "post-processing"]
STAGES: tuple[Stage, ...] = ("pre-processing", "inference", "post-processing")


class Record(BaseModel):
    """What is written as JSON; it has no infinity, so "Infinity" is text, which reads back as the number."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ColdStart(Record):
    """One fresh process, from its start to its first answer, and its memory (MB = 10^6 bytes).

    Attributes:
        import_ms: from the start of the process until Python and what reads the bundle are there.
        open_ms: then loading runtime and model.
        first_ms: then the first answer.
        peak_rss_mb: highest resident memory of the whole process; None where the kernel does not show it.
        steady_rss_mb: resident memory after further calls; None likewise.
    """

    import_ms: float
    open_ms: float
    first_ms: float
    peak_rss_mb: float | None
    steady_rss_mb: float | None

    @property
    def total_ms(self) -> float:
        """From the start of the process to the first answer."""
        return self.import_ms + self.open_ms + self.first_ms


class Energy(Record):
    """What a call took from the supply; everything else that ran on the same package or GPU is in it.

    Attributes:
        joules: of all counted blocks.
        calls: in those blocks.
        source: whose counter: "RAPL package-0", "NVML GPU 0".
    """

    joules: float
    calls: int
    source: str

    @property
    def millijoules(self) -> float:
        """Per call."""
        return 1e3 * self.joules / self.calls


class Served(Record):
    """How a candidate did under arrivals at random (scenario server).

    Attributes:
        offered_qps: mean rate of the arrivals.
        achieved_qps: answers per second while there were arrivals.
        within: share of queries answered within the bound; None without a bound.
        met: whether the asked percentile of the latencies is within the bound; None without one, or with too few queries.
    """

    offered_qps: float
    achieved_qps: float
    within: float | None
    met: bool | None


class Measurement(Record):
    """One candidate.

    Attributes:
        name: of the candidate, and where several batch sizes were measured, "NAME @ BATCH".
        samples_ns: every timed query in order, in ns.
        per_round: queries in each round.
        warmups: calls made before.
        open_ms: loading the model in the measuring process.
        first_ms: the first answer after that.
        rss_growth_mb: peak resident memory while opening and answering once, over what this process held before (MB = 10^6 bytes).
            Libraries loaded and memory freed earlier are not in it. None when the kernel does not show it, or nothing grew.
        inputs: dtype and shape by input name, of one call.
        candidate: its name without the batch; None in files of version 1.
        batch: samples in one call.
        streams: calls that make up a query, at the same time in as many sessions.
        stable: whether the warm-up had settled; None where it was not watched.
        cold: fresh processes, one by one; empty where none was started.
        energy: None where there is no meter.
        stages: ns of each stage of the same queries; empty where pictures were not given.
        served: in scenario server.
        roof: what it reaches of the machine's peaks; None where that is not known.
        openings: first round of every session.
    """

    name: str
    samples_ns: tuple[int, ...] = Field(min_length=1)
    per_round: int = Field(ge=1)
    warmups: int
    open_ms: float
    first_ms: float
    rss_growth_mb: float | None
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    candidate: str | None = None
    batch: int = Field(default=1, ge=1)
    streams: int = Field(default=1, ge=1)
    stable: bool | None = None
    cold: tuple[ColdStart, ...] = ()
    energy: Energy | None = None
    stages: dict[Stage, tuple[int, ...]] = {}
    served: Served | None = None
    roof: Roof | None = None
    openings: tuple[int, ...] = Field(default=(0,), min_length=1)

    @model_validator(mode="after")
    def _sessions_have_rounds(self) -> Self:
        rounds = len(self.samples_ns) // self.per_round
        if self.openings[0] != 0 or any(a >= b for a, b in itertools.pairwise((*self.openings, rounds))):
            raise ValueError(f"openings: sessions begin at rounds {self.openings} of {rounds}: at 0, and later each time")
        return self

    @functools.cached_property
    def samples(self) -> Samples:
        """As arrays."""
        return Samples(np.asarray(self.samples_ns, np.int64), self.per_round, self.warmups, self.stable, openings=self.openings)

    @functools.cached_property
    def summary(self) -> Summary:
        """All statistics, in ms."""
        return summarize(self.samples)

    @property
    def cold_ms(self) -> float:
        """From nothing to the first answer in the measuring process, whose libraries may be loaded already."""
        return self.open_ms + self.first_ms

    @property
    def cold_start(self) -> ColdStart | None:
        """The fresh process with the median total, None where none was started."""
        return sorted(self.cold, key=lambda item: item.total_ms)[len(self.cold) // 2] if self.cold else None

    @property
    def p50_ms(self) -> float:
        """Median."""
        return self.summary.p50

    @property
    def p90_ms(self) -> float | None:
        """90th percentile; None with fewer than 29 runs, as every percentile that the runs do not carry."""
        return self.summary.p90

    @property
    def p95_ms(self) -> float | None:
        """95th percentile, from 59 runs."""
        return self.summary.p95

    @property
    def p99_ms(self) -> float | None:
        """99th percentile, from 299 runs."""
        return self.summary.p99

    @property
    def p999_ms(self) -> float | None:
        """99.9th percentile, from 2995 runs."""
        return self.summary.p999

    @property
    def mean_ms(self) -> float:
        """Mean."""
        return self.summary.mean

    @property
    def per_second(self) -> float:
        """Throughput in samples per second: batch · streams over the median."""
        return 1e3 * self.batch * self.streams / self.p50_ms

    def interval(self, share: float = 0.5) -> tuple[float, float]:
        """95 % interval of a percentile (by default the median), in ms."""
        low, high = quantile_interval(self.samples, share)
        return low / 1e6, high / 1e6

    def percentile(self, share: float) -> float | None:
        """In ms; None where the runs do not carry it."""
        return percentile(self.samples.ns, share)

    def stage_ms(self) -> dict[Stage, float]:
        """Medians of the stages."""
        return {name: float(np.median(self.stages[name])) / 1e6 for name in STAGES if name in self.stages}

    @property
    def end_to_end_ms(self) -> float | None:
        """Median of all stages together; None where pictures were not given."""
        return float(np.median(np.sum([self.stages[name] for name in STAGES], axis=0))) / 1e6 if self.stages else None

    def warnings(self) -> tuple[str, ...]:
        """Why these times are not to be trusted."""
        return instability(self.samples, self.summary)
