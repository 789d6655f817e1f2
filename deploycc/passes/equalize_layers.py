"""Cross-layer equalization: channels scaled between layers, so that one range fits all of them (M. Nagel et al., ICCV 2019, §4.1).

Which tensors share their factors is in `_channel_groups`: not only neighbours, but a whole residual stream at once, through Add. How the
factors are chosen is in `_equalize`: by the noise that is expected with this target's types, from ranges seen on calibration samples.

Weights with one scale per channel need it less than the paper's, which have one in all: with them it cost a ResNet-50 of random weights
4 dB and a MobileNetV2 1.6, and won an EfficientNet-Lite1 half of one. So no target has it in its pipeline; the quality ladder tries it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.core.pipeline import Pipeline
from deploycc.core.target import Target
from deploycc.passes._channel_scaling import ChannelScaling


@dataclass(frozen=True)
class EqualizeLayers(ChannelScaling):
    """Cross-layer equalization before quantization: scale channels between layers so that their ranges are alike. Exact in float."""

    name: ClassVar[str] = "equalize-layers"

    @classmethod
    def rescue(cls, pipeline: Pipeline, target: Target) -> Pipeline | None:
        """Before quantize-static."""
        if any(step.body.name == cls.name for step in pipeline.steps):
            return None
        return pipeline.replaced("quantize-static", lambda body: (cls(), body))

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo where no two layers are joined by operators that commute with a factor."""
        return self.scaled(
            artifact,
            context,
            lambda group: not group.written_by("LayerNormalization"),
            "layers that only ReLU, pooling and sums join",
            lambda graph: frozenset(),
        )
