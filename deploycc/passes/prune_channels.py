"""Structured pruning: channels, heads and hidden units physically removed, with everything that is coupled to them.

Which channels go together is found by pushing labels through the exported graph (`_coupling`): residual adds, concatenations, shuffles,
depthwise and grouped convolutions, attention heads (also by einsum), gated MLPs, standardized weights. A group is a set of channels any
subset of which can go; the groups are in the receipt. What is not understood is not pruned, and a group whose removal breaks the model is
put back alone; both are reported.

Give one goal:

    ratio    share of the channels of every group that goes (scope=global: of all groups together)
    macs     share of the multiply-accumulates that stays
    params   share of the parameters that stays
    latency  share of the latency that stays, measured on the target's own runtime, after the passes that follow in the pipeline

For macs and params every group loses the same share (scope=group; what rounding to the multiple took too much is given back, group by
group), or the least important channels per saved cost go first, wherever they are (scope=global).

For latency a cost table is measured first: the model with one group shrunk to two widths, for every group, interleaved with the whole
model. Channels then go in the order of

    importance / milliseconds saved · 1 / (share of the group that is left)

and the candidate itself is measured and the budget moved, up to six times; the nearest is taken, its share told, and one that is more
than 10 % above the goal refused. Channels are rounded to the target's `channel_multiple`. Importance and its sources: `_importance`.
DepGraph (G. Fang et al., CVPR 2023) is where the coupling comes from.

With steps over 1 the goal is reached in as many prunings, `recovery` epochs of distillation from the float reference after each but the
last. The result is rebuilt without pickle from its source, a JSON plan and its weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import LOSSY, Context, Effect, Pass
from deploycc.core.timing import clock
from deploycc.errors import PreconditionError

GOALS = ("ratio", "macs", "params", "latency")


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove channels, attention heads and hidden units; give one of ratio, macs, params and latency.

    Attributes:
        ratio: share of the channels that goes, 0 to 1.
        macs: share of the multiply-accumulates that stays.
        params: share of the parameters that stays.
        latency: share of the measured latency that stays.
        criterion: l1, l2, bn-scale, fpgm, taylor, activation or random.
        scope: group (the same share of each) or global (the least important anywhere); latency is always global.
        most: the largest share of one group that may go.
        multiple: channels of a group are rounded to it; none = the target's channel_multiple.
        skip: names of layers that stay whole, * and ? allowed.
        steps: in how many prunings the goal is reached.
        recovery: epochs of distillation between them; needs training data.
    """

    name: ClassVar[str] = "prune-channels"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    effect: ClassVar[Effect] = LOSSY
    reads: ClassVar[frozenset[str]] = frozenset({"calibration", "training"})
    decided_by: ClassVar[frozenset[str]] = frozenset({"quant"})

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    criterion: Literal["l1", "l2", "bn-scale", "fpgm", "taylor", "activation", "random"] = "l2"
    scope: Literal["group", "global"] = "group"
    most: float = 0.8
    multiple: int | None = None
    skip: tuple[str, ...] = ()
    steps: int = 1
    recovery: int = 0

    def __post_init__(self) -> None:
        for goal in (*GOALS, "most"):
            value = getattr(self, goal)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{goal} is {value}: it is a share, over 0 and under 1; a whole layer cannot go")
        if len(self.goals) > 1:
            raise ValueError(f"{' and '.join(self.goals)} are both given: give one goal")
        if self.ratio is not None and self.ratio > self.most:
            raise ValueError(f"ratio is {self.ratio}, but at most {self.most} of a group may go: raise most")
        if self.multiple is not None and self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}: it must be at least 1")
        if self.steps < 1 or self.recovery < 0:
            raise ValueError(f"steps is {self.steps} and recovery {self.recovery}: at least 1 and 0")
        if self.recovery and self.steps == 1:
            raise ValueError("recovery is between steps: set steps over 1, and put distill after this pass")
        if self.steps > 1 and self.latency is not None:
            raise ValueError("latency is reached in one step: give macs for several")

    @property
    def goals(self) -> list[str]:
        """The goals that are given."""
        return [goal for goal in GOALS if getattr(self, goal) is not None]

    @property
    def looks_ahead(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A latency depends on what the passes after this one make of the model."""
        return self.latency is not None

    def depends_on(self, context: Context) -> str:
        """The clock that a latency is measured by."""
        return clock(context) if self.latency is not None else ""

    def requires(self, artifact: Artifact, context: Context) -> None:
        """One goal, a float module, data for the criterion and for recovery, a machine to measure on."""
        if not self.goals:
            raise PreconditionError("prune-channels has no goal", fix="give one: prune-channels{macs=0.5}, ratio=…, params=… or latency=…")
        if artifact.quant is not None:
            raise PreconditionError("the model is quantized already", fix="put prune-channels before the pass that quantizes")
        if self.criterion == "taylor" or self.recovery:
            context.data.part("training")
        if self.criterion == "activation":
            context.data.part("calibration")
        if self.latency is not None and (context.timer is None or context.following is None):
            context.latency({})  # raises, with the reason

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Prune, in steps."""
        from deploycc.passes._distilling import recover
        from deploycc.passes._prune_job import Job

        notes: list[str] = []
        details: dict[str, Any] = {}
        curves: list[dict[str, Any]] = []
        current = artifact
        whole = None
        for step in range(1, self.steps + 1):
            job = Job(self, current, context)
            whole = whole or job.whole
            pruned, found = job.run(step / self.steps, whole)
            details = {**found, "steps": [*details.get("steps", []), found["kept"]]}
            notes = [*job.notes]
            current = pruned
            if self.recovery and step < self.steps:
                current = recover(current, context, step=step, epochs=self.recovery)
                curves.append({"step": step, "curves": current.details["curves"]})
        return replace(current, notes=tuple(notes), details={**details, "recovery": curves})
