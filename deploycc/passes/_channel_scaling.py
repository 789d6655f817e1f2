"""What `equalize-layers` and `smooth-activations` share: statistics of the groups' tensors, factors, new constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import CLOSE, Context, Pass
from deploycc.errors import NothingToDo
from deploycc.passes._float_graph import numbers, put_numbers, refuse_quantized

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.passes._channel_groups import Group, Weight
    from deploycc.passes._equalize import Channels

SHOWN = 3  # groups in the notes
WORTH = 0.7  # of the expected noise: a Mul that leaves more is not worth its time


@dataclass(frozen=True)
class ChannelScaling(Pass):
    """Factors for channels.

    Attributes:
        alpha: how much of the ranges' inequality goes from the activations into the weights, 0 to 1; none = what is expected to cost
            least, group by group.
    """

    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = CLOSE(1e-3)
    eases_rounding: ClassVar[bool] = True
    decided_by: ClassVar[frozenset[str]] = frozenset({"quant"})
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}: it must be between 0 and 1")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A float graph, and samples to see the ranges of."""
        refuse_quantized(artifact, f"put {self.name} before the pass that quantizes")
        context.data.part("calibration")  # raises DataNeeded before anything slow

    def scaled(
        self,
        artifact: Artifact,
        context: Context,
        wanted: Callable[[Group], bool],
        what: str,
        prepare: Callable[[ir.Graph], frozenset[str]],
    ) -> Artifact:
        """The model with factors in the groups that are `wanted`. Raises NothingToDo, calling them `what`, where none is better off.

        `prepare` may put Muls into the graph for the factors to go into, and gives their names; those that win too little are taken out.
        """
        from deploycc.forms._macs import infer_shapes
        from deploycc.passes._channel_groups import groups
        from deploycc.passes._tidy import complete_names

        model = infer_shapes(artifact.model)
        complete_names(model)
        scalers = prepare(model.graph)
        found = [group for group in groups(model.graph, scalers) if wanted(group)]
        if not found:
            raise NothingToDo(f"the model has no {what}", fix=f"leave {self.name} out")
        seen = _statistics(model, found, artifact, context)
        told = [told for group in found if (told := self._scale(group, seen, scalers, context))]
        for node in [node for node in model.graph if node.name in scalers and (numbers(_constant(node)) == 1).all()]:
            _bypass(node)
        if not told:
            raise NothingToDo(f"the channels of all {len(found)} groups are best as they are", fix=f"leave {self.name} out")
        notes = [f"{len(told)} of {len(found)} groups of tensors scaled channel by channel", *told[:SHOWN]]
        return artifact.evolve(model, notes=tuple(notes))

    def _scale(self, group: Group, seen: dict[str, Channels], scalers: frozenset[str], context: Context) -> str:
        """Put the group's factors into its constants; what was done, or nothing."""
        from deploycc.passes._equalize import Reading, choose

        quant = context.target.quant
        levels = 65536 if quant.activations == "int16" else 256
        most = 63 if quant.reduce_range else 127
        readings = [Reading(seen[reader.tensor], _by_channel(numbers(reader.weight.value), reader.weight)) for reader in group.readers]
        k, share = choose(readings, levels, most, per_channel=quant.per_channel, alpha=self.alpha)
        name = group.writers[0].node.name
        if share == 1.0 or (name in scalers and share > WORTH and self.alpha is None):
            return ""
        for part in (part for writer in group.writers for part in writer.parts):
            _multiply(part, k)
        for reader in group.readers:
            _multiply(reader.weight, 1 / k)
        return f"{name} and {len(group.readers)} readers: factors {k.min():.2g} to {k.max():.2g}, {share:.2f} of the noise is expected"


def _statistics(model: ir.Model, found: Sequence[Group], artifact: Artifact, context: Context) -> dict[str, Channels]:
    """Of every tensor that a reader reads."""
    from deploycc.passes._equalize import Channels
    from deploycc.passes._static_job import observe

    axes: dict[str, int] = {}
    channels: dict[str, Channels] = {}
    for group in found:
        for name in dict.fromkeys(reader.tensor for reader in group.readers):
            axes[name], channels[name] = group.tensors[name], Channels.empty(group.channels)
    for tensors in observe(model, list(axes), artifact, context, "channel ranges"):
        for name, values in tensors.items():
            channels[name].add(values, axes[name])
    return channels


def _constant(node: ir.Node) -> ir.Value:
    """Of a Mul that was put in."""
    value = node.inputs[1]
    assert value is not None
    return value


def _bypass(node: ir.Node) -> None:
    """Take an operator out that gives what it reads."""
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, node.inputs[0])
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _by_channel(weight: np.ndarray, part: Weight) -> np.ndarray:
    """A reader's weight as (blocks, outputs of a block, channels of a block, taps)."""
    if weight.ndim == 2:
        return (weight if part.axis == 1 else weight.T)[None, :, :, None]
    return weight.reshape(part.blocks, weight.shape[0] // part.blocks, weight.shape[1], -1)


def _multiply(part: Weight, factors: np.ndarray) -> None:
    """The constant times one factor per channel."""
    old = numbers(part.value)
    if part.blocks > 1:
        rows = _by_channel(old, part) * factors.reshape(part.blocks, 1, -1, 1)
        put_numbers(part.value, rows.reshape(old.shape))
        return
    shape = [1] * old.ndim
    shape[part.axis] = -1
    put_numbers(part.value, old * factors.reshape(shape))
