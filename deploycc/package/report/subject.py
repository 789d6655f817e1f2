"""What a report is about: a bundle, a race of several targets, or a bench result; and its candidates in one form for tables and plots."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploycc.bench.result import BenchResult
from deploycc.package.manifest import AttemptRecord, Manifest
from deploycc.package.race import Race
from deploycc.package.report.timing import Timing, timings

EAGER = "PyTorch eager"
COMPARED = ("agreement", "cosine", "sqnr")  # metrics that the float reference has no value of its own of


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the model.

    Attributes:
        name: of the attempt or target.
        mark: "shipped", "best", or "".
        ships: "int8" or "float"; "" where it is not known.
        bytes: of the runtime's files.
        timing: None where it was not timed.
        metric: value of the subject's metric.
        agreement: share of equal arg-max with the float reference.
        sqnr_db: against the float reference.
        int8_macs: share of the MACs in integer kernels.
        gate: what the accuracy gate said.
    """

    name: str
    mark: str = ""
    ships: str = ""
    bytes: int | None = None
    timing: Timing | None = None
    metric: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    int8_macs: float | None = None
    gate: str = ""


@dataclass(frozen=True)
class Subject:
    """One part of a page.

    Attributes:
        name: what it is called by.
        key: its part of the names of figures and anchors.
        manifest: of the bundle.
        race: of several targets.
        bench: latencies of the candidates.
        place: where the bundle lies, as it was named; "" where it is not known.
        profile: time of every operator and the machine's peaks, as `inspect --profile --json` tells them.
    """

    name: str
    key: str = ""
    manifest: Manifest | None = None
    race: Race | None = None
    bench: BenchResult | None = None
    place: str = ""
    profile: Mapping[str, Any] | None = None

    @property
    def metric_name(self) -> str:
        """Of the candidates' accuracy; "" without data."""
        if self.race is not None:
            return next((entry.metric_name for entry in self.race.entries if entry.metric_name), "")
        attempts = self.manifest.attempts if self.manifest else ()
        return next((attempt.accuracy.metric for attempt in attempts if attempt.accuracy), "")

    @functools.cached_property
    def candidates(self) -> list[Candidate]:
        """Everything that took part, as measured in one run."""
        known = timings(self.bench)
        if self.race is not None:
            return [_entry(self.race, index, known) for index in range(len(self.race.entries))]
        if self.manifest is not None:
            return _attempts(self.manifest, known)
        return [Candidate(name, timing=timing) for name, timing in known.items()]


def of_manifest(manifest: Manifest, key: str = "", *, own: bool = False) -> Subject:
    """A bundle; with its race, where it won one and `own` does not ask for its own candidates."""
    race = None if own else manifest.measured.race
    name = f"{manifest.source} for {manifest.target['name']}"
    return Subject(name, key, manifest, race, race.bench if race else manifest.measured.bench, profile=manifest.measured.profile)


def of_race(name: str, race: Race, key: str = "") -> Subject:
    """A race whose bundles are gone."""
    return Subject(name, key, race=race, bench=race.bench)


def of_bench(name: str, bench: BenchResult, key: str = "") -> Subject:
    """What `bench --save` wrote."""
    return Subject(name, key, bench=bench)


def of_profile(name: str, profile: Mapping[str, Any], key: str = "") -> Subject:
    """What `inspect --profile --json` told of a model."""
    return Subject(name, key, profile=profile)


def _entry(race: Race, index: int, known: dict[str, Timing]) -> Candidate:
    entry = race.entries[index]
    return Candidate(
        name=entry.name,
        mark="best" if entry.best else "",
        ships=entry.ships if entry.ships in ("int8", "float") else "",
        bytes=entry.bytes,
        timing=known.get(entry.name),
        metric=entry.metric,
        agreement=entry.agreement,
        sqnr_db=entry.sqnr_db,
        int8_macs=entry.int8_macs,
    )


def _attempts(manifest: Manifest, known: dict[str, Timing]) -> list[Candidate]:
    found = [_attempt(manifest, attempt, known) for attempt in manifest.attempts]
    if EAGER not in known:
        return found
    accuracies = [attempt.accuracy for attempt in manifest.attempts if attempt.accuracy]
    reference = next((item.reference for item in accuracies if item.metric not in COMPARED), None)
    return [Candidate(EAGER, timing=known[EAGER], metric=reference, gate="reference"), *found]


def _attempt(manifest: Manifest, attempt: AttemptRecord, known: dict[str, Timing]) -> Candidate:
    accuracy, verdict = attempt.accuracy, attempt.verdict
    return Candidate(
        name=attempt.name,
        mark="shipped" if attempt is manifest.shipped else "",
        ships="int8" if attempt.quant else "float",
        bytes=attempt.bytes,
        timing=known.get(attempt.name),
        metric=accuracy.candidate if accuracy else None,
        agreement=accuracy.agreement if accuracy else None,
        sqnr_db=accuracy.sqnr_db if accuracy else None,
        int8_macs=attempt.coverage.int8_macs,
        gate="" if verdict is None else ("passed" if verdict.passed else "refused"),
    )
