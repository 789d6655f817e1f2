"""What watches a pipeline: numbers against the float reference, numbered dumps, progress. Passes hold no flags for these."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from deploycc.core import rounding
from deploycc.core.artifact import Artifact, Drift, Outputs, Receipt
from deploycc.core.compare import drift
from deploycc.core.contract import Context, Pass
from deploycc.core.registry import FORMS
from deploycc.errors import DriftError

PROBE_SAMPLES = 8


class Verify:
    """Runs every pass's result on real samples; fails a pass that changes the numbers more than its `effect` declares.

    Where the model amplifies rounding, a pass may do as much (`rounding.allowance`).

    `to_input` compares with what the pass was given (this is what the effect promises), `to_reference` with the float model; passes
    that prepare are making that model, and have nothing to be compared with yet.
    """

    def __init__(self, samples: int = PROBE_SAMPLES, *, preparing: bool = False) -> None:
        self.samples, self.preparing = samples, preparing
        self._reference: list[Outputs] | None = None
        self._before: tuple[str, list[Outputs]] | None = None

    def before(self, step: Pass, artifact: Artifact, context: Context) -> None:
        """Keep the outputs of what goes in."""
        digest = artifact.digest()
        if self._before is None or self._before[0] != digest:
            self._before = (digest, self._outputs(artifact, context))
        if self._reference is None:
            same = context.reference is artifact
            self._reference = self._before[1] if same else self._outputs(context.reference, context)

    def after(self, step: Pass, before: Artifact, after: Artifact, receipt: Receipt, context: Context) -> Receipt:
        """Compare and judge. Raises DriftError."""
        if not receipt.changed:
            return receipt
        outputs = self._outputs(after, context)
        if not outputs or self._before is None or self._reference is None:
            return receipt
        first, self._before = self._before[1], (receipt.digest, outputs)
        if after.signature.outputs != context.reference.signature.outputs and step.effect.tolerance is None:
            return receipt  # another head: there is nothing to compare
        to_input = drift(first, outputs)
        self._judge(step, to_input, lambda tolerance: self._allowance(tolerance, before, first, context))
        return replace(receipt, to_input=to_input, to_reference=None if self.preparing else drift(self._reference, outputs))

    def _judge(self, step: Pass, found: Drift, allowance: Callable[[float], float]) -> None:
        declared = step.effect.tolerance
        if declared is None or found.relative <= declared or found.relative <= (allowed := allowance(declared)):
            return
        raise DriftError(
            f"pass '{step.name}' declares it is {step.effect}, but on {found.samples} real samples its outputs moved by "
            f"{found.relative:.3g} of the largest output (allowed {allowed:g}; SQNR {found.sqnr_db:.1f} dB)",
            fix=f'leave it out with --passes="-{step.name}", and report the model: this is a fault in the pass',
        )

    def _allowance(self, tolerance: float, before: Artifact, outputs: list[Outputs], context: Context) -> float:
        """What rounding alone may do to the model that the pass was given."""
        with FORMS.get(before.form.value).open(before, threads=context.target.bench.threads) as session:
            return rounding.allowance(tolerance, session.run, context.data.probe(before, self.samples), outputs)

    def _outputs(self, artifact: Artifact, context: Context) -> list[Outputs]:
        feeds = context.data.probe(artifact, self.samples)
        if not feeds:
            return []
        with FORMS.get(artifact.form.value).open(artifact, threads=context.target.bench.threads) as session:
            return [session.run(item) for item in feeds]


class Dump:
    """Writes the structure after every pass to `folder/003_quantize-static.txt`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def before(self, step: Pass, artifact: Artifact, context: Context) -> None:
        """Write what goes into the first pass as 000."""
        if self._count == 0:
            self._write("source", artifact)

    def after(self, step: Pass, before: Artifact, after: Artifact, receipt: Receipt, context: Context) -> Receipt:
        """Write the result."""
        self._write(step.name, after)
        return receipt

    def _write(self, name: str, artifact: Artifact) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        safe = re.sub(r"[^\w.-]", "_", name)
        (self.folder / f"{self._count:03d}_{safe}.txt").write_text(FORMS.get(artifact.form.value).describe(artifact.model))
        self._count += 1


class Announce:
    """Tells the context's progress which pass runs."""

    def before(self, step: Pass, artifact: Artifact, context: Context) -> None:
        """The pass begins."""
        context.progress(step.name, 0, None)

    def after(self, step: Pass, before: Artifact, after: Artifact, receipt: Receipt, context: Context) -> Receipt:
        """The pass ended."""
        context.progress(step.name, 1, 1)
        return receipt
