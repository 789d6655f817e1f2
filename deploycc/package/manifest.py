"""What a bundle is, as one JSON document (schema version 1).

Everything that a clock, a date or this machine's state decides is under a key named "measured", and nothing else is: two compiles of
the same input with the same seed give the same manifest once those keys are taken out. `digest` is the SHA-256 of what is left, the
identity of the bundle; `measured.digest` is over the whole document, so that a changed byte is found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from deploycc import __version__
from deploycc.bench.measurement import Measurement
from deploycc.bench.result import Accuracy, BenchResult, Verdict
from deploycc.core.artifact import Artifact, Drift, ModelStats, QuantInfo, Receipt
from deploycc.core.contract import Built, Coverage
from deploycc.core.target import Target
from deploycc.package.layers import Layers
from deploycc.package.race import Race
from deploycc.runtime.bundle import SCHEMA_VERSION, canonical, document_digest
from deploycc.runtime.statistics import Ratio

MEASURED = "measured"
TIMED_LIMITS = frozenset({"latency_p95_ms", "peak_mb"})  # their values differ from run to run


class _Record(BaseModel):
    # JSON has no infinity: "Infinity" as text, which reads back as the number
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class FileEntry(_Record):
    """A file of the bundle. Roles: model, model-data, golden, transform, checkpoint, runner, report, sbom."""

    path: str
    role: str
    bytes: int
    sha256: str


class ReceiptTimes(_Record):
    """What differs between two runs of the same pass."""

    seconds: float
    cached: bool
    latency_ms: tuple[float, float, float] | None


class ReceiptRecord(_Record):
    """One pass (core.artifact.Receipt)."""

    spec: str
    changed: bool
    form: str
    digest: str
    stats: ModelStats
    to_reference: Drift | None
    to_input: Drift | None
    notes: tuple[str, ...]
    details: dict[str, Any] = Field(default_factory=dict[str, Any])
    quality: dict[str, float] = Field(default_factory=dict[str, float])
    measured: ReceiptTimes


class AttemptRecord(_Record):
    """One artifact that was built and judged.

    Attributes:
        name: "float", "compiled", …; the bench result names it alike, if it was timed.
        pipeline: every pass with every option written out.
        bytes: size of the files that the runtime loads.
        quant: what quantization was really applied.
        coverage: the precision that the runtime computes in.
        accuracy: of the real artifact in its runtime; None without data.
        verdict: of the gate; None without data.
        receipts: one per pass.
        notes: fall-backs and facts the backend reported.
        layers: how far each layer is from float; of a quantized graph that ships, where there were data.
    """

    name: str
    pipeline: str
    bytes: int
    quant: QuantInfo | None
    coverage: Coverage
    accuracy: Accuracy | None
    verdict: Verdict | None
    receipts: tuple[ReceiptRecord, ...]
    notes: tuple[str, ...] = ()
    layers: Layers | None = None


class LimitCheck(_Record):
    """A limit of the target or the user: what was measured, and whether it was met (None = not measured)."""

    name: str
    limit: float
    value: float | None
    met: bool | None


class Decision(_Record):
    """What ships, and why; the reason holds no measured times (they go into `measured.detail`).

    Attributes:
        shipped: the name of the attempt.
        reason: in words.
        untried: rungs of the ladder that could not be climbed, and why.
    """

    shipped: str
    reason: str
    untried: tuple[str, ...] = ()


class Run(_Record):
    """What belongs to this run and this machine only.

    Attributes:
        created: date and time, UTC.
        command: what to type to do it again.
        seconds: wall time of the compile.
        detail: the measured times behind the decision.
        limits: checks of limits on time and memory.
        bench: interleaved latencies with raw samples and environment; None when this machine is not the target.
        layer_ms: ms of one call by the tensors of `shipped.layers`, where the runtime's profiler could tell.
        profile: time of every operator and the machine's peaks (`inspect --profile --json`), where these were known; or a note.
        race: of the targets that this bundle won against; None where it was compiled alone.
        files: entries of files that show measured times (the report).
        digest: SHA-256 of the whole manifest without this value.
    """

    created: str
    command: str
    seconds: float
    detail: str = ""
    limits: tuple[LimitCheck, ...] = ()
    bench: BenchResult | None = None
    layer_ms: dict[str, float] = Field(default_factory=dict[str, float])
    profile: dict[str, Any] | None = None
    race: Race | None = None
    files: tuple[FileEntry, ...] = ()
    digest: str = ""


class Manifest(_Record):
    """A bundle's manifest.

    Attributes:
        schema_version: of this document.
        deploycc: version that wrote it.
        digest: identity of the bundle: SHA-256 over everything but the `measured` keys.
        source: the text the user named the model by.
        seed: of every random choice.
        target: name and resolved facts: backend, arch, requires (CPU flags), quant, limits, bench settings …
        runtime: session, package, version, minimum, below, reason, engine.
        signature: what the model takes and gives.
        decision: what was shipped, and why.
        notices: what must be said wherever a number of this model is shown.
        shipped: the artifact in this bundle.
        others: what else was built and judged, in order.
        limits: checks of limits on accuracy and size.
        files: what the bundle holds, except what is in `measured.files`.
        measured: what belongs to this run and this machine.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    deploycc: str = __version__
    digest: str = ""
    source: str
    seed: int
    target: dict[str, Any]
    runtime: dict[str, str]
    signature: dict[str, Any]
    decision: Decision
    notices: tuple[str, ...]
    shipped: AttemptRecord
    others: tuple[AttemptRecord, ...] = ()
    limits: tuple[LimitCheck, ...]
    files: tuple[FileEntry, ...] = ()
    measured: Run = Field(...)

    @property
    def attempts(self) -> tuple[AttemptRecord, ...]:
        """Everything that was built: the others, then what ships."""
        return (*self.others, self.shipped)

    def measurement(self, name: str) -> Measurement | None:
        """Latency of an attempt (or "PyTorch eager"), None when it was not timed."""
        bench = self.measured.bench
        return next((item for item in bench.measurements if item.name == name), None) if bench else None

    def ratio(self, name: str) -> Ratio | None:
        """Speed-up of an attempt over the baseline, None when it was not timed."""
        bench = self.measured.bench
        return bench.ratio(name) if bench and bench.baseline and self.measurement(name) else None

    def sealed(self) -> Manifest:
        """With both digests filled in."""
        document = self.document()
        identity = hashlib.sha256(canonical(strip_measured({**document, "digest": ""}))).hexdigest()
        document["digest"] = identity
        run = self.measured.model_copy(update={"digest": document_digest(document)})
        return self.model_copy(update={"digest": identity, "measured": run})

    def document(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(self.model_dump_json())

    def text(self) -> str:
        """The file's content: one way to write it."""
        return json.dumps(self.document(), indent=1, ensure_ascii=False) + "\n"


def strip_measured(document: Any) -> Any:
    """The document without every key named "measured", at any depth."""
    if isinstance(document, dict):
        table = cast("dict[str, Any]", document)
        return {key: strip_measured(value) for key, value in table.items() if key != MEASURED}
    if isinstance(document, list):
        return [strip_measured(item) for item in cast("list[Any]", document)]
    return document


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What the driver knows of a finished compile.

    Attributes:
        target: what was built for, with the user's limits in it.
        artifact: the model that ships, after its last pass.
        built: its files.
        shipped: record of the attempt that ships.
        others: records of the other attempts, in order.
        decision: what ships, and why, without measured times.
        detail: the measured times behind the decision, in words.
        limits: how the shipped artifact stands to every limit.
        bench: interleaved latencies, or None.
        layer_ms: times of the layers of what ships.
        profile: times of its operators, with the machine's peaks.
        feeds: a few real inputs of the shipped model; empty without data.
        outputs: what the built model answered to them.
        seed: of every random choice.
        command: what to type to do it again.
        created: date and time, UTC.
        seconds: wall time so far.
    """

    target: Target
    artifact: Artifact
    built: Built
    shipped: AttemptRecord
    others: Sequence[AttemptRecord] = ()
    decision: Decision
    detail: str = ""
    limits: Sequence[LimitCheck] = ()
    bench: BenchResult | None = None
    layer_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    profile: Mapping[str, Any] | None = None
    feeds: Sequence[dict[str, Any]] = ()
    outputs: Sequence[dict[str, Any]] = ()
    seed: int
    command: str
    created: str
    seconds: float


def describe(contents: Contents) -> Manifest:
    """The manifest, without files and digests."""
    return Manifest(
        source=contents.artifact.source,
        seed=contents.seed,
        target=_target_facts(contents.target),
        runtime={**contents.built.runtime, **_newest(contents.target)},
        signature=contents.built.signature.to_json(),
        decision=contents.decision,
        notices=(*contents.artifact.notices, *contents.target.notices),
        shipped=contents.shipped,
        others=tuple(contents.others),
        limits=tuple(check for check in contents.limits if check.name not in TIMED_LIMITS),
        measured=Run(
            created=contents.created,
            command=contents.command,
            seconds=contents.seconds,
            detail=contents.detail,
            limits=tuple(check for check in contents.limits if check.name in TIMED_LIMITS),
            bench=contents.bench,
            layer_ms=dict(contents.layer_ms),
            profile=None if contents.profile is None else dict(contents.profile),
        ),
    )


def _newest(target: Target) -> dict[str, str]:
    """The first version of the runtime's package that a loader refuses, and why; nothing where the target names none."""
    runtime = target.runtime
    return {} if runtime.below is None else {"below": runtime.below, "reason": runtime.reason}


def _target_facts(target: Target) -> dict[str, Any]:
    """The target as resolved; what a loader checks comes first."""
    facts = target.model_dump(mode="json", exclude={"auto", "docs", "notices"})
    return {"name": facts.pop("name"), "arch": facts.pop("arch"), "requires": facts["hardware"]["requires"], **facts}


def record_attempt(
    name: str, pipeline: str, artifact: Artifact, built: Built, accuracy: Accuracy | None, verdict: Verdict | None
) -> AttemptRecord:
    """The record of an attempt."""
    return AttemptRecord(
        name=name,
        pipeline=pipeline,
        bytes=sum((built.folder / file).stat().st_size for file in built.files),
        quant=artifact.quant,
        coverage=built.coverage,
        accuracy=accuracy,
        verdict=verdict,
        receipts=tuple(map(record_receipt, artifact.history)),
        notes=built.notes,
    )


def record_receipt(receipt: Receipt) -> ReceiptRecord:
    """A receipt with its times set apart."""
    return ReceiptRecord(
        spec=receipt.spec,
        changed=receipt.changed,
        form=receipt.form,
        digest=receipt.digest,
        stats=receipt.stats,
        to_reference=receipt.to_reference,
        to_input=receipt.to_input,
        notes=receipt.notes,
        details=dict(receipt.details),
        quality=dict(receipt.quality),
        measured=ReceiptTimes(seconds=receipt.seconds, cached=receipt.cached, latency_ms=receipt.latency_ms),
    )


def read(folder: Path) -> Manifest:
    """The manifest of a bundle that `runtime.bundle.load` has checked."""
    return Manifest.model_validate_json((folder / "manifest.json").read_text(encoding="utf-8"))
