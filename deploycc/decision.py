"""What ships: a float artifact and the attempts to do better, judged and timed, and the rule that chooses between them.

int8 is a hypothesis. The compiled artifact ships if the accuracy gate let it through and

    - it is faster than the float artifact in the rounds both were timed in: by more than 1 %, at a level of 95 %, or
    - it meets a limit that the float artifact does not, or
    - a pass that was asked for to buy accuracy (an ensemble) did so: its metric is above the float reference's, and it breaks no limit
      that the float artifact keeps.

On a machine that is not the target's nothing can be timed, and what passed the gate ships, saying so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deploycc.bench.result import Accuracy, BenchResult, Verdict
from deploycc.core.artifact import Artifact
from deploycc.core.contract import Built
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Substitutes
from deploycc.package.manifest import Decision, LimitCheck
from deploycc.planning import Plan

EAGER, FLOAT, COMPILED = "PyTorch eager", "float", "compiled"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One artifact that was built and judged.

    Attributes:
        pipeline: what made it.
        artifact: the model after the last pass.
        built: its files, there until the compile ends.
        bytes: their size.
        accuracy: on the real artifact in its runtime; None without data.
        verdict: of the gate; None without data (only a float artifact may be without).
    """

    pipeline: Pipeline
    artifact: Artifact
    built: Built
    bytes: int
    accuracy: Accuracy | None
    verdict: Verdict | None

    @property
    def passed(self) -> bool:
        """Whether the gate let it through."""
        return self.verdict is None or self.verdict.passed


@dataclass(frozen=True, slots=True)
class Outcome:
    """The attempts, their latencies, and what follows from them.

    Attributes:
        parent: the artifact without lossy passes.
        attempts: every lossy one, in order.
        bench: interleaved latencies; None when this machine cannot give the target's own.
        decision: what ships, and why, without measured times.
        detail: the times behind it.
    """

    parent: Attempt
    attempts: tuple[Attempt, ...]
    bench: BenchResult | None
    decision: Decision
    detail: str


def best(attempts: Sequence[Attempt]) -> Attempt:
    """The last that passed, else the one closest to the reference."""
    passed = [attempt for attempt in attempts if attempt.passed]
    if passed:
        return passed[-1]
    return max(attempts, key=lambda attempt: (_score(attempt.accuracy), attempt.accuracy.sqnr_db if attempt.accuracy else 0.0))


def _score(accuracy: Accuracy | None) -> float:
    if accuracy is None:
        return 0.0
    return -accuracy.candidate if accuracy.metric == "mse" else accuracy.candidate


def _reference_score(accuracy: Accuracy | None) -> float:
    """The float reference's, larger is better; nothing is above it where it has none."""
    if accuracy is None or accuracy.reference is None:
        return math.inf
    return -accuracy.reference if accuracy.metric == "mse" else accuracy.reference


def decide(
    planned: Plan,
    parent: Attempt,
    attempts: Sequence[Attempt],
    bench: BenchResult | None,
    *,
    interrupted: bool,
    untried: Sequence[str] = (),
) -> Outcome:
    """Apply the rule above."""
    passed = [attempt for attempt in attempts if attempt.passed]

    def outcome(shipped: str, reason: str, detail: str = "") -> Outcome:
        return Outcome(parent, tuple(attempts), bench, Decision(shipped=shipped, reason=reason, untried=tuple(untried)), detail)

    if not attempts:
        reason = "stopped before another artifact was finished" if interrupted else "no pass of the pipeline changes the numbers"
        return outcome(FLOAT, reason)
    if not passed:
        refusal = best(attempts).verdict
        return outcome(
            FLOAT, f"the accuracy gate refused all {len(attempts)} attempts; the best: {refusal.reason if refusal else 'not judged'}"
        )
    if bench is None:
        why = "the run was stopped before latency was measured" if interrupted else f"latency is not measured: {planned.misfit}"
        stands_in = isinstance(planned.backend, Substitutes) and planned.backend.absent(planned.target) is not None
        judge = ", judged by a reference in place of the runtime" if stands_in else ""
        return outcome(COMPILED, f"it passed the accuracy gate{judge}; {why}")
    ratio = bench.ratio(COMPILED, FLOAT)
    over = [check.name for check in check_limits(planned, parent, FLOAT, bench) if check.met is False]
    kept = [check.name for check in check_limits(planned, passed[-1], COMPILED, bench) if check.met is False]
    if ratio.verdict == "faster":
        return outcome(COMPILED, "it passed the accuracy gate and is faster than the float artifact", str(ratio))
    if set(kept) < set(over):
        met = ", ".join(sorted(set(over) - set(kept)))
        return outcome(COMPILED, f"it passed the accuracy gate and meets {met}, which the float artifact does not", str(ratio))
    buyers = [step.body.name for step in passed[-1].pipeline.steps if step.body.buys_accuracy]
    if buyers and set(kept) <= set(over) and _score(passed[-1].accuracy) > _reference_score(passed[-1].accuracy):
        reason = f"it passed the accuracy gate and is more accurate than the float model, which {', '.join(buyers)} was asked for"
        return outcome(COMPILED, reason, str(ratio))
    return outcome(FLOAT, f"the compiled artifact passed the accuracy gate, but is not faster than float ({ratio.verdict})", str(ratio))


def check_limits(planned: Plan, attempt: Attempt, name: str, bench: BenchResult | None) -> tuple[LimitCheck, ...]:
    """How an artifact stands to every limit; what this machine cannot measure is None."""
    limits = planned.target.limits
    timed = next((item for item in bench.measurements if item.name == name), None) if bench else None
    found: list[LimitCheck] = []
    if attempt.verdict is not None and attempt.accuracy is not None:
        found.append(LimitCheck(name="accuracy", limit=limits.accuracy_drop, value=_drop(attempt.accuracy), met=attempt.verdict.passed))
    values = {
        "latency_p95_ms": timed.p95_ms if timed else None,
        "model_mb": attempt.bytes / 1e6,
        "peak_mb": timed.rss_growth_mb if timed else None,
        "outside_delegate": None if (outside := attempt.built.coverage.outside) is None else len(outside),
    }
    for key, value in values.items():
        limit = getattr(limits, key)
        if limit is not None:
            found.append(LimitCheck(name=key, limit=limit, value=value, met=None if value is None else value <= limit))
    return tuple(found)


def _drop(accuracy: Accuracy) -> float | None:
    """How much worse than the reference, in the metric's own unit."""
    if accuracy.reference is None:
        return None
    return accuracy.candidate - accuracy.reference if accuracy.metric == "mse" else accuracy.reference - accuracy.candidate


def _attempts(number: int) -> str:
    return "the attempt" if number == 1 else f"all {number} attempts"
