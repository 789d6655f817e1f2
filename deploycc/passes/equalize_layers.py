"""Cross-layer equalization: channels scaled between layers, so that one range fits all of them (M. Nagel et al., ICCV 2019, §4.1).

Which tensors share their factors is in `_channel_groups`: not only neighbours, but a whole residual stream at once, through Add. How the
factors are chosen is in `_equalize`: by the noise that is expected with this target's types, from ranges seen on calibration samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.passes._channel_scaling import ChannelScaling


@dataclass(frozen=True)
class EqualizeLayers(ChannelScaling):
    """Cross-layer equalization before quantization: scale channels between layers so that their ranges are alike. Exact in float."""

    name: ClassVar[str] = "equalize-layers"

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo where no two layers are joined by operators that commute with a factor."""
        return self.scaled(artifact, context, lambda group: not group.normalized, "layers that only ReLU, pooling and sums join")
