"""Puts the latency and the accuracy of every pass's result into its receipt: the waterfall of the report.

A result that the backend takes is built and timed in the target's own runtime; before that, in eager PyTorch. A graph is never timed
in the reference session, which leaves Q/DQ unfused: that would be the latency of a simulation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from deploycc.bench.accuracy import evaluate
from deploycc.bench.harness import Candidate, measure
from deploycc.core.artifact import Artifact, Feeds, Form, Receipt
from deploycc.core.contract import Backend, Built, Context, Pass, Session
from deploycc.core.data import paired_batches
from deploycc.core.pipeline import Pipeline
from deploycc.core.registry import FORMS
from deploycc.core.target import Bench
from deploycc.core.timing import NodeTime, Profiles
from deploycc.forms.module import example_feeds
from deploycc.runtime.measure import Stop, time_interleaved
from deploycc.runtime.statistics import summarize

JUDGED = 2000  # validation samples that a pass's accuracy is taken on; the artifact is judged on all
TIMER = Bench(min_seconds=0.4, min_runs=30, sessions=1)
TIMER_CALIBRATION = 8  # samples: ranges do not change a latency
SECONDS = 0.25
WARMUP_SECONDS = 0.025  # of one window
RUNS = 10
PROFILE_ROUNDS, PROFILE_RUNS, PROFILED = 3, 20, 2  # turns, calls in each, inputs


class Latency:
    """Times each result shortly. `backend` is None on a machine that is not the target's: then nothing is timed."""

    def __init__(self, backend: Backend | None) -> None:
        self.backend = backend
        self._timed: dict[str, tuple[float, float, float]] = {}  # by digest: attempts of one run begin alike

    def before(self, step: Pass, artifact: Artifact, context: Context) -> None:
        """Nothing to do."""

    def after(self, step: Pass, before: Artifact, after: Artifact, receipt: Receipt, context: Context) -> Receipt:
        """Add (p50, low, high) in ms."""
        if receipt.digest in self._timed:
            return replace(receipt, latency_ms=self._timed[receipt.digest]) if receipt.changed else receipt
        feeds = context.data.probe(after, 1)
        if self.backend is None or not receipt.changed or not feeds:
            return receipt
        with tempfile.TemporaryDirectory(dir=context.workdir) as folder:
            session = self._open(self.backend, after, context, Path(folder))
            if session is None:
                return receipt
            with session:

                def call(index: int) -> object:
                    return session.run(feeds[0])

                found = time_interleaved({"": call}, Stop(SECONDS, RUNS), warmup_seconds=WARMUP_SECONDS)
        summary = summarize(found[""])
        self._timed[receipt.digest] = (summary.p50, summary.low, summary.high)
        return replace(receipt, latency_ms=self._timed[receipt.digest])

    def _open(self, backend: Backend, artifact: Artifact, context: Context, folder: Path) -> Session | None:
        threads = context.target.bench.threads
        if artifact.form in backend.accepts:
            return backend.open(backend.build(artifact, context.target, folder), context.target, threads=threads)
        if artifact.form is Form.ONNX:
            return None
        return FORMS.get(artifact.form.value).open(artifact, threads=threads)


class Quality:
    """Judges each lossy pass's result on validation samples, in the form that it has: what the pass cost.

    The shipped artifact is judged apart, on all samples and in its own runtime.
    """

    def __init__(self, samples: int = JUDGED) -> None:
        self.samples = samples

    def before(self, step: Pass, artifact: Artifact, context: Context) -> None:
        """Nothing to do."""

    def after(self, step: Pass, before: Artifact, after: Artifact, receipt: Receipt, context: Context) -> Receipt:
        """Add {metric: value}; nothing where labels are missing."""
        if not receipt.changed or step.effect.tolerance is not None or not context.data.has("validation"):
            return receipt
        part = context.data.part("validation")
        if not part.labelled:
            return receipt
        threads = context.target.bench.threads
        form = FORMS.get(after.form.value)
        pairs = paired_batches(part.limited(self.samples, seed=0), after, after)
        with form.open(after, threads=threads) as session:
            found = evaluate(session, session, pairs)
        return replace(receipt, quality={found.metric: found.candidate})


class Timer:
    """Latencies of modules as they would ship: sent through the passes that follow (training left out), built, timed interleaved."""

    def __init__(self, backend: Backend, context: Context) -> None:
        self.backend = backend
        self.context = replace(context, data=context.data.with_calibration(TIMER_CALIBRATION))

    def __call__(self, artifacts: Mapping[str, Artifact], following: Pipeline) -> dict[str, float]:
        """p50 in ms by name. Raises what the passes and the backend raise."""
        pipeline, context = following.untrained(), self.context
        settings = TIMER.model_copy(update={"threads": context.target.bench.threads})
        with ExitStack() as stack:
            candidates: list[Candidate] = []
            for name, artifact in artifacts.items():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=context.workdir)))
                final = pipeline.run(artifact, context)
                built = self.backend.build(final, context.target, folder)
                feeds = context.data.probe(final, 1) or [example_feeds(final.signature)]
                candidates.append(Candidate(name, self._opener(built), feeds))
            result = measure(candidates, settings=settings, seed=context.seed)
        return {item.name: item.p50_ms for item in result.measurements}

    def profile(self, artifacts: Mapping[str, Artifact]) -> dict[str, list[NodeTime]]:
        """Times of every operator, artifact by artifact, in turns. Raises what the backend raises."""
        backend, context = self.backend, self.context
        assert isinstance(backend, Profiles)  # the driver has looked
        with ExitStack() as stack:
            ready: list[tuple[str, Built, Sequence[Feeds]]] = []
            for name, artifact in artifacts.items():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=context.workdir)))
                feeds = context.data.probe(artifact, PROFILED) or [example_feeds(artifact.signature)]
                ready.append((name, backend.build(artifact, context.target, folder), feeds))
            rounds = [
                {name: backend.profile(built, context.target, feeds, runs=PROFILE_RUNS) for name, built, feeds in ready}
                for _ in range(PROFILE_ROUNDS)
            ]
        turns = {name: zip(*(found[name] for found in rounds), strict=True) for name in artifacts}
        return {name: [min(same, key=lambda node: node.milliseconds) for same in nodes] for name, nodes in turns.items()}

    def _opener(self, built: Built) -> Callable[[], Session]:
        return lambda: self.backend.open(built, self.context.target, threads=self.context.target.bench.threads)
