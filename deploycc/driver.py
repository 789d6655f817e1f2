"""Source + target → plan → run → build → gate → bench → bundle. Reads top to bottom.

The float artifact is built first, so that there is a best so far at any time. Then the pipeline as planned, and while the gate
refuses its result, the rungs of the ladder (`ladder`). What passed is timed against its float parent; it ships only
if it is faster, or if a limit can only be met with it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from deploycc import ladder
from deploycc.bench.accuracy import evaluate, gate
from deploycc.bench.harness import Candidate, measure
from deploycc.bench.observer import Latency, Quality, Timer
from deploycc.bench.result import Accuracy, BenchResult
from deploycc.bench.yardstick import Yardstick
from deploycc.core import distributed
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Built, Context, ModelRequest, Observer, Progress, enforce, silent
from deploycc.core.data import Data, check_labels, paired_batches
from deploycc.core.observers import Announce, Dump, Verify
from deploycc.core.pipeline import Pipeline
from deploycc.core.registry import FORMS
from deploycc.core.store import Store, default_root
from deploycc.core.target import Bench, Target
from deploycc.decision import COMPILED, EAGER, FLOAT, Attempt, Outcome, best, check_limits, decide
from deploycc.errors import DataNeeded, DeployError, Interrupted, MissingDependency, UsageError
from deploycc.forms.module import example_feeds
from deploycc.layers import FloatGraphs, inside
from deploycc.package.bundle import Bundle, check_destination, write
from deploycc.package.manifest import AttemptRecord, Contents, LimitCheck, record_attempt
from deploycc.planning import Options, Plan, capture, command_line, declared_transform, find_source, plan
from deploycc.runtime.statistics import needed_runs
from deploycc.sources._factory import find

PROBES = 8  # real inputs that the bench takes turns over
GOLDEN = 3


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compile gives back.

    Attributes:
        bundle: what was written.
        plan: what was planned.
        reference: the model as captured.
        outcome: what was built, measured and decided.
        shipped: the attempt that is in the bundle.
        limits: how it stands to every limit.
        seconds: wall time.
    """

    bundle: Bundle
    plan: Plan
    reference: Artifact
    outcome: Outcome
    shipped: Attempt
    limits: tuple[LimitCheck, ...]
    seconds: float

    @property
    def exit_status(self) -> int:
        """0 when every limit that could be measured was met, else 3."""
        return 3 if any(check.met is False for check in self.limits) else 0

    def _repr_html_(self) -> str:
        """In a notebook: that of the bundle."""
        return self.bundle._repr_html_()


def compile(model: Any, options: Options, progress: Progress = silent) -> Compiled:
    """One model in, one checked bundle out.

    Raises:
        DeployError: what, where and how to fix; nothing half-written is left.
        Interrupted: Ctrl-C; once the float artifact is finished, the best so far is bundled first.
    """
    started, created = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    planned = plan(model, options)
    _refuse_early(planned, options)
    preparation, pipeline = planned.pipeline.preparation()
    renamed = any(step.body.new_classes for step in preparation.steps)
    captured, data = capture(model, planned.source, options, planned.data, rename=renamed)
    with _workdir() as work:
        context = _context(planned, captured, data, options, work, progress)
        if not renamed:
            _check_reference(context, planned)
        reference = _prepare(preparation, context, options)
        context = replace(context, reference=reference)
        _check_reference(context, planned)
        job = _Job(planned, options, context)
        parent = job.attempt(pipeline.lossless())
        attempts: list[Attempt] = []
        bench, interrupted = None, False

        def spent() -> bool:
            return options.budget_s is not None and time.monotonic() - started > options.budget_s

        try:
            for rung in ladder.quality_rungs(pipeline, planned.target, context.data, attempts, timed=context.profiler is not None):
                if attempts and spent():
                    break
                attempts.extend(job.tried(rung) if attempts else [job.attempt(rung)])
                if attempts[-1].passed:
                    break
            bench = job.measure(parent, attempts)
            for rung in ladder.speed_rungs(attempts, bench, context):
                if spent():
                    break
                tried = [*attempts, *job.tried(rung)]
                if len(tried) > len(attempts) and tried[-1].passed:
                    bench = job.measure(parent, tried)
                attempts = tried  # an interrupted measurement leaves what was measured before
        except KeyboardInterrupt:
            interrupted = True
        outcome = decide(planned, parent, attempts, bench, interrupted=interrupted, untried=job.untried)
        shipped = parent if outcome.decision.shipped == FLOAT else best(attempts)
        limits = check_limits(planned, shipped, outcome.decision.shipped, bench)
        output = options.output if distributed.is_main() else work / "bundle"  # the other processes only train
        bundle = write(output, job.contents(outcome, shipped, limits, created, started), zipped=options.zip)
        compiled = Compiled(bundle, planned, reference, outcome, shipped, limits, time.monotonic() - started)
    if interrupted:
        raise Interrupted(
            f"stopped by the user; the best so far ({outcome.decision.shipped}) is in {bundle.folder}",
            fix="run the same command again: it goes on from the last finished pass",
        )
    return compiled


def _refuse_early(planned: Plan, options: Options) -> None:
    """Whatever can be refused before the model is loaded."""
    available = planned.backend.available()
    if not available:
        raise MissingDependency(f"backend '{planned.backend.name}': {available.missing}", fix=available.install)
    check_destination(options.output)
    if any(step.body.trains for step in planned.pipeline.steps):
        planned.data.part("training")  # raises DataNeeded
    lossy = [step.body.name for step in planned.pipeline.steps if step.body.effect.tolerance is None]
    if lossy and not planned.data.has("validation"):
        raise DataNeeded(
            f"pass '{lossy[0]}' changes the numbers, and there is no data to judge the result by: no artifact ships without a gate",
            fix="add --data DATA (a folder of images, a .npz file, sklearn:digits, file.py:factory), "
            f'or build the float artifact with --passes "{", ".join(f"-{name}" for name in lossy)}"',
        )


def _context(planned: Plan, reference: Artifact, data: Data, options: Options, work: Path, progress: Progress) -> Context:
    """What passes may look at, with the tools that they cannot import themselves."""

    def another(text: str) -> Artifact:
        request = ModelRequest(text, random_weights=options.random_weights, seed=options.seed)
        found = find_source(text).load(request)
        transform = declared_transform(found, data)
        if transform is not None and reference.transform is not None:
            transform = replace(transform, classes=reference.transform.classes)
        return replace(found, transform=transform)

    def code(text: str) -> Any:
        return find(text, UsageError)

    context = Context(planned.target, reference, data, options.seed, work, progress, capture=another, code=code)
    if distributed.processes() > 1:  # each process would measure, and decide, for itself
        return context
    if not planned.native:
        return context
    timer = Timer(planned.backend, context)
    return replace(context, timer=timer, profiler=timer.profile if planned.tells_times else None)


def _prepare(preparation: Pipeline, context: Context, options: Options) -> Artifact:
    """The float model that everything after is compared with: as captured, or as the leading passes train it."""
    if not preparation.steps:
        return context.reference
    store = _store(options)
    return preparation.run(context.reference, context, [Verify(preparing=True), Announce(), Quality()], store)


def _store(options: Options) -> Store:
    return Store(options.cache or default_root(), reading=options.resume, writing=distributed.is_main())


def _check_reference(context: Context, planned: Plan) -> None:
    """What can be refused once the model is loaded: labels outside its classes, operators the runtime lacks."""
    outputs = context.reference.signature.outputs
    classes = outputs[0].shape[-1] if outputs and len(outputs[0].shape) == 2 else None
    if isinstance(classes, int) and classes > 1 and context.data.has("validation"):
        check_labels(context.data.part("validation"), classes)
    if context.reference.form in planned.backend.accepts:
        enforce(planned.backend.constraints(), context.reference, planned.target)


class _Job:
    """One compile's tools: runs pipelines, builds, judges, times."""

    def __init__(self, planned: Plan, options: Options, context: Context) -> None:
        self.planned = planned
        self.options = options
        self.context = context
        self.store = _store(options)
        self.floats = FloatGraphs()
        self.observers: list[Observer] = [Verify(), Announce(), self.floats]
        if distributed.is_main():
            self.observers += [Latency(planned.backend if planned.native else None), Quality()]
        if options.dump and distributed.is_main():
            self.observers.append(Dump(options.dump))
        self.yardstick = Yardstick(context.reference, planned.target.bench.threads)
        self.untried: list[str] = []  # rungs that could not be climbed, and why
        self._made: dict[str, Pipeline] = {}  # by the digest of the model
        self._built = 0

    def tried(self, rung: Pipeline) -> list[Attempt]:
        """The attempt, or none where the rung cannot be climbed or leads nowhere new: that loses nothing of what is there already."""
        try:
            artifact = self._run(rung)
            same = self._made.get(artifact.digest())
            if same is None:
                return [self._judged(rung, artifact)]
            self.untried.append(f"{rung}: it makes the same model as {same}")
        except DeployError as error:
            self.untried.append(f"{rung}: {error.what}")
        return []

    def attempt(self, pipeline: Pipeline) -> Attempt:
        """Run, build, judge."""
        return self._judged(pipeline, self._run(pipeline))

    def _run(self, pipeline: Pipeline) -> Artifact:
        return pipeline.run(self.context.reference, self.context, self.observers, self.store)

    def _judged(self, pipeline: Pipeline, artifact: Artifact) -> Attempt:
        self._made[artifact.digest()] = pipeline
        backend, target = self.planned.backend, self.planned.target
        enforce(backend.constraints(), artifact, target)
        folder = self.context.workdir / f"built-{self._built}"
        folder.mkdir()
        self._built += 1
        self.context.progress(f"build for {backend.name}", 0, None)
        built = backend.build(artifact, target, folder)
        accuracy = self._judge(artifact, built)
        verdict = gate(accuracy, target.limits) if accuracy else None
        size = sum((folder / name).stat().st_size for name in built.files)
        return Attempt(pipeline, artifact, built, size, accuracy, verdict)

    def _judge(self, artifact: Artifact, built: Built) -> Accuracy | None:
        """The artifact in its runtime against the float reference, sample by sample."""
        if not self.context.data.has("validation"):
            return None
        pairs = paired_batches(self.context.data.part("validation"), self.context.reference, artifact)
        with self.planned.backend.open(built, self.planned.target, threads=self.planned.target.bench.threads) as candidate:
            return evaluate(self.yardstick.rewound(), candidate, pairs, metric=self.options.metric, progress=self.context.progress)

    def measure(self, parent: Attempt, attempts: Sequence[Attempt]) -> BenchResult | None:
        """Eager PyTorch, the float artifact and what passed, interleaved; None on a machine that is not the target."""
        if not self.planned.native or not distributed.is_main():
            return None
        reference, target = self.context.reference, self.planned.target
        threads = target.bench.threads
        candidates = [self._candidate(FLOAT, parent)]
        if attempts and best(attempts).passed:
            candidates.append(self._candidate(COMPILED, best(attempts)))
        if reference.form is not Form.ONNX:
            form = FORMS.get(reference.form.value)
            candidates.insert(0, Candidate(EAGER, lambda: form.open(reference, threads=threads), self._feeds(reference)))
        return measure(candidates, settings=settings_for(target), baseline=FLOAT, seed=self.options.seed, progress=self.context.progress)

    def _candidate(self, name: str, attempt: Attempt) -> Candidate:
        backend, target = self.planned.backend, self.planned.target
        return Candidate(name, lambda: backend.open(attempt.built, target, threads=target.bench.threads), self._feeds(attempt.artifact))

    def _feeds(self, artifact: Artifact) -> list[dict[str, np.ndarray]]:
        return real_feeds(self.context.data, artifact, self.options.seed)

    def contents(self, outcome: Outcome, shipped: Attempt, limits: Sequence[LimitCheck], created: str, started: float) -> Contents:
        """Everything that goes into the bundle."""
        feeds = self.context.data.probe(shipped.artifact, GOLDEN)
        with self.planned.backend.open(shipped.built, self.planned.target, threads=self.planned.target.bench.threads) as session:
            outputs = [session.run(item) for item in feeds]
        records = [_record(FLOAT, outcome.parent), *(_record(_rung(index), item) for index, item in enumerate(outcome.attempts))]
        everything = [outcome.parent, *outcome.attempts]
        backend, native = self.planned.backend, self.planned.native
        inner = inside(shipped.artifact, self.floats, shipped.built, backend, self.context, native=native)
        chosen = next(index for index, item in enumerate(everything) if item is shipped)
        return Contents(
            target=self.planned.target,
            artifact=shipped.artifact,
            built=shipped.built,
            shipped=records[chosen].model_copy(update={"name": outcome.decision.shipped, "layers": inner.layers}),
            others=[record for index, record in enumerate(records) if index != chosen],
            decision=outcome.decision,
            detail=outcome.detail,
            limits=limits,
            bench=outcome.bench,
            layer_ms=inner.layer_ms,
            profile=inner.profile,
            feeds=feeds,
            outputs=outputs,
            seed=self.options.seed,
            command=command_line(self.planned, shipped.artifact.source, self.options),
            created=created,
            seconds=time.monotonic() - started,
        )


def settings_for(target: Target) -> Bench:
    """The target's, with as many runs as its limit on p95 needs."""
    if target.limits.latency_p95_ms is None:
        return target.bench
    return target.bench.model_copy(update={"min_runs": max(target.bench.min_runs, needed_runs(0.95))})


def real_feeds(data: Data, artifact: Artifact, seed: int) -> list[dict[str, np.ndarray]]:
    """What the bench takes turns over: real inputs, or random ones where there is no data."""
    return data.probe(artifact, PROBES) or [example_feeds(artifact.signature, seed=seed)]


def _rung(index: int) -> str:
    """The name of an attempt in the records; the one that was timed is COMPILED."""
    return COMPILED if index == 0 else f"{COMPILED}, attempt {index + 1}"


def _record(name: str, attempt: Attempt) -> AttemptRecord:
    return record_attempt(name, attempt.pipeline.full(), attempt.artifact, attempt.built, attempt.accuracy, attempt.verdict)


@contextmanager
def _workdir() -> Iterator[Path]:
    """A scratch folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="deploycc-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
