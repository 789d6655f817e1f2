"""Puts the latency of every pass's result into its receipt: the waterfall of the report.

A result that the backend takes is built and timed in the target's own runtime; before that, in eager PyTorch. A graph is never timed
in the reference session, which leaves Q/DQ unfused: that would be the latency of a simulation.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from deploycc.core.artifact import Artifact, Form, Receipt
from deploycc.core.contract import Backend, Context, Pass, Session
from deploycc.core.registry import FORMS
from deploycc.runtime.measure import summarize, time_interleaved

SECONDS = 0.25
WARMUP_SECONDS = 0.05
RUNS = 10


class Latency:
    """Times each result shortly. `backend` is None on a machine that is not the target's: then nothing is timed."""

    def __init__(self, backend: Backend | None) -> None:
        self.backend = backend

    def before(self, step: Pass, artifact: Artifact, context: Context) -> None:
        """Nothing to do."""

    def after(self, step: Pass, before: Artifact, after: Artifact, receipt: Receipt, context: Context) -> Receipt:
        """Add (p50, low, high) in ms."""
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

                found = time_interleaved({"": call}, min_seconds=SECONDS, min_runs=RUNS, warmup_seconds=WARMUP_SECONDS)
        summary = summarize(found[""])
        return replace(receipt, latency_ms=(summary.p50, summary.low, summary.high))

    def _open(self, backend: Backend, artifact: Artifact, context: Context, folder: Path) -> Session | None:
        threads = context.target.bench.threads
        if artifact.form in backend.accepts:
            return backend.open(backend.build(artifact, context.target, folder), context.target, threads=threads)
        if artifact.form is Form.ONNX:
            return None
        return FORMS.get(artifact.form.value).open(artifact, threads=threads)
