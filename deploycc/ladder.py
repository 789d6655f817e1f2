"""The quality ladder: what is tried while the accuracy gate refuses, cheap to dear; and the settings that are tried for speed.

    as planned → other settings of its lossy passes (better calibration) → what is faster in float put back (on the target's own machine)
    → passes that win accuracy back without training (cross-layer equalization, learned rounding) → the worst 1, 2, 4, 8 operators in float
    → passes that train (quantization-aware), where there are training data → float

From what is put back on, every rung starts from the best so far. Which pass is a rung is its own to say: `Pass.alternatives`,
`Pass.rescue` and `Pass.retreats` for accuracy, `Pass.faster` for speed (what it puts back in float is exact there as well). So a new pass
brings its rung with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from deploycc.bench.result import BenchResult
from deploycc.core.contract import Context, Pass
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline, Step
from deploycc.core.registry import PASSES
from deploycc.core.spec import format_spec
from deploycc.core.target import Target
from deploycc.decision import COMPILED, FLOAT, Attempt, best

if TYPE_CHECKING:
    from deploycc.planning import Plan

HARDLY_FASTER = 1.5  # times the float artifact's speed: below it, passes are asked for faster settings
WORTH_MS = 0.5  # of the float artifact: below it, calls of operators cost more than their work, and the clock's noise would choose


def quality_rungs(planned: Pipeline, target: Target, data: Data, attempts: Sequence[Attempt], *, timed: bool = False) -> Iterator[Pipeline]:
    """The pipeline as planned, then what may mend it, each pipeline once; nothing for a lossless one.

    `attempts` are looked at anew for every rung: the caller adds to them. `timed`: this machine tells how long each operator takes.
    """
    if len(planned.lossless().steps) == len(planned.steps):
        return
    seen: set[str] = set()
    for pipeline in _quality_rungs(planned, target, data, lambda: best(attempts).pipeline if attempts else planned, timed=timed):
        if str(pipeline) not in seen:
            seen.add(str(pipeline))
            yield pipeline


def _quality_rungs(planned: Pipeline, target: Target, data: Data, so_far: Callable[[], Pipeline], *, timed: bool) -> Iterator[Pipeline]:
    yield planned
    yield from _changed(planned, lambda body: body.alternatives(target))
    if timed:
        yield from _changed(so_far(), lambda body: body.faster())
    yield from (pipeline for pipeline in _rescues(so_far(), target) if not _trains(pipeline, planned))
    yield from _changed(so_far(), lambda body: body.retreats())
    if data.has("training"):
        yield from (pipeline for pipeline in _rescues(so_far(), target) if _trains(pipeline, planned))


def _changed(pipeline: Pipeline, settings: Callable[[Pass], Sequence[Pass]]) -> Iterator[Pipeline]:
    """One step after the other with each of its other settings."""
    for index, step in enumerate(pipeline.steps):
        for other in settings(step.body):
            yield Pipeline((*pipeline.steps[:index], Step(other, step.asked), *pipeline.steps[index + 1 :]))


def _rescues(pipeline: Pipeline, target: Target) -> Iterator[Pipeline]:
    """What passes that are not in the pipeline would make of it."""
    for name in PASSES.names():
        found = PASSES.get_class(name).rescue(pipeline, target)
        if found is not None:
            yield found


def _trains(pipeline: Pipeline, planned: Pipeline) -> bool:
    """Whether it has a pass that trains and was not planned."""
    names = {step.body.name for step in planned.steps}
    return any(step.body.trains and step.body.name not in names for step in pipeline.steps)


def described(planned: Plan) -> str:
    """Every rung as text, as if none before it were an improvement."""
    pipeline = planned.pipeline
    if len(pipeline.lossless().steps) == len(pipeline.steps):
        return "float only: no pass changes the numbers"
    rungs = list(quality_rungs(pipeline, planned.target, planned.data, (), timed=planned.tells_times))
    return " → ".join(["as planned", *(_difference(rung, pipeline) for rung in rungs[1:]), "float"])


def _difference(rung: Pipeline, planned: Pipeline) -> str:
    """The steps that the plan does not have."""
    known = {format_spec(step.body) for step in planned.steps}
    return ", ".join(spec for spec in (format_spec(step.body) for step in rung.steps) if spec not in known)


def speed_rungs(attempts: Sequence[Attempt], bench: BenchResult | None, context: Context) -> Iterator[Pipeline]:
    """The settings that its passes offer to be faster, while what would ship is hardly faster than the float artifact.

    They measure operator by operator: nothing where the runtime does not tell, or several processes train.
    """
    if context.profiler is None:
        return
    if bench is None or not attempts or not best(attempts).passed or bench.get(FLOAT).p50_ms < WORTH_MS:
        return
    if bench.ratio(COMPILED, FLOAT).value >= HARDLY_FASTER:
        return
    yield from _changed(best(attempts).pipeline, lambda body: body.faster())
