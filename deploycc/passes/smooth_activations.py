"""SmoothQuant: outlier channels behind a LayerNormalization moved into the weights (G. Xiao et al., ICML 2023, arXiv:2211.10438).

    x = LN(u)·γ + β,   y = x W      →      γ' = k γ,  β' = k β,  W' = W / k,     k_c = max|W_c|^(1 − α) / max|x_c|^α

γ and β take the factors, so nothing is added to the graph. That needs every reader of x to be a product with constant weights, as in
transformers that normalize before the layer (ViT, GPT). Where x also goes to the residual sum (BERT), `quantize-dynamic{outliers=8}`
serves. α is searched (`_equalize`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.passes._channel_scaling import ChannelScaling


@dataclass(frozen=True)
class SmoothActivations(ChannelScaling):
    """SmoothQuant before quantization: ranges of a LayerNormalization's channels made alike, the weights taking what is over."""

    name: ClassVar[str] = "smooth-activations"

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo where no LayerNormalization feeds products with constant weights alone."""
        return self.scaled(artifact, context, lambda group: group.normalized, "LayerNormalization that only feeds products")
