"""What a measurement found: raw samples with the environment, statistics computed from them, and when not to trust them.

Speed-up of a candidate = median(baseline) / median(candidate), from the rounds both took part in (deploycc.runtime.statistics). "Faster"
and "slower" are only said at a level of 95 %, for all candidates of a run together, and of differences above 1 %.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, ValidationError, model_validator

from deploycc.bench import notebook
from deploycc.bench.environment import Environment
from deploycc.bench.measurement import Measurement, Record
from deploycc.bench.scenario import Scenario
from deploycc.core.target import Bench
from deploycc.errors import BenchError, StoreError
from deploycc.runtime.kernel import Observed
from deploycc.runtime.statistics import Ratio, holm, ratio_of_medians

WALL = "wall"
OURS = "deploycc"
VERSION = 3
Metric = Literal["top1", "top5", "f1", "mse", "agreement", "cosine", "sqnr"]


class Accuracy(Record):
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


class Verdict(Record):
    """What the gate says: the rule it applied and how it came out."""

    passed: bool
    rule: str
    reason: str


class BenchResult(Record):
    """All candidates of one interleaved run.

    Attributes:
        schema_version: 3; files of versions 1 and 2 are read as well. Those opened every candidate once; what else they lack is not known.
        measurements: the candidates in the order they were given.
        baseline: the candidate that the others are compared with.
        environment: the machine: what the result is of.
        settings: when it stopped.
        scenario: how queries came.
        driver: who issued them: "deploycc", or "mlperf-loadgen VERSION".
        observed: what the kernel says happened meanwhile; None where nothing was watched.
        clock: whose: the machine's ("wall"), or a device's own ("CUDA events").
        seed: of every random order.
        created: when.
    """

    schema_version: Literal[3] = VERSION
    measurements: tuple[Measurement, ...] = Field(min_length=1)
    baseline: str | None
    environment: Environment
    settings: Bench
    scenario: Scenario = Scenario()
    driver: str = OURS
    observed: Observed | None = None
    clock: str = WALL
    seed: int
    created: str

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, value: Any) -> Any:
        """Version 1 knew one scenario and did not watch the kernel, 1 and 2 opened each candidate once: what is new has its default."""
        document = cast(dict[str, Any], value) if isinstance(value, dict) else {}
        if document.get("schema_version") in (1, 2) and isinstance(document.get("settings"), dict):
            return {**document, "schema_version": VERSION, "settings": {"sessions": 1, **document["settings"]}}
        return cast(Any, value)

    def get(self, name: str) -> Measurement:
        """The candidate `name`; raises BenchError."""
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        names = ", ".join(measurement.name for measurement in self.measurements)
        raise BenchError(f"no candidate '{name}' was measured", fix=f"the candidates are {names}")

    def base_of(self, name: str) -> str | None:
        """What `name` is compared with: the baseline, at the same batch where there are several."""
        found = self.get(name)
        same = [item.name for item in self.measurements if (item.candidate or item.name) == self.baseline and item.batch == found.batch]
        return same[0] if same else self.baseline

    def ratio(self, name: str, baseline: str | None = None) -> Ratio:
        """Speed-up of `name` over `baseline` (default: the run's own), paired by rounds; the one comparison that was meant.

        Raises BenchError without a baseline.
        """
        base = baseline or self.base_of(name)
        if base is None:
            raise BenchError("this result has no baseline to compare with", fix="measure with baseline=NAME")
        left, right = self.get(base).samples, self.get(name).samples
        return ratio_of_medians(left, right, paired=left.rounds == right.rounds)

    def ratios(self) -> dict[str, Ratio]:
        """Every candidate's speed-up over the baseline, corrected for their number; empty without a baseline."""
        if self.baseline is None:
            return {}
        return holm({item.name: self.ratio(item.name) for item in self.measurements if self.base_of(item.name) != item.name})

    def warnings(self) -> tuple[str, ...]:
        """Why these times are not to be trusted: the machine's reasons first."""
        seen = self.observed.warnings() if self.observed else ()
        alike = (f"{item.name}: {text}" for item in self.measurements if (text := self._unlike(item)))
        each = (f"{measurement.name}: {text}" for measurement in self.measurements for text in measurement.warnings())
        return (*self.environment.warnings(), *seen, *alike, *each)

    def _unlike(self, item: Measurement) -> str:
        """That it did another amount of work than what it is compared with, in words."""
        base = self.base_of(item.name)
        if base is None or (other := self.get(base)).batch == item.batch:
            return ""
        return f"a call holds {item.batch} samples and one of {base} {other.batch}: the ratio is of unlike work (--batch makes them alike)"

    def _repr_html_(self) -> str:
        """In a notebook: a table of the candidates, the machine, and why not to trust the times."""
        return notebook.table(self)

    def save(self, path: Path) -> None:
        """Write as JSON. Raises StoreError."""
        try:
            path.write_text(self.model_dump_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}", fix="give a file in a writable folder with free space") from error


def load(path: Path) -> BenchResult:
    """Read what `save` wrote, of this version or an older one. Raises BenchError."""
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


def schema() -> dict[str, Any]:
    """JSON Schema of what `save` writes."""
    return BenchResult.model_json_schema()
