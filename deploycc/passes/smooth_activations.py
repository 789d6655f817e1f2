"""SmoothQuant: outlier channels of what products read moved into their weights (G. Xiao et al., ICML 2023, arXiv:2211.10438).

    x = LN(u)·γ + β,   y = x W      →      γ' = k γ,  β' = k β,  W' = W / k,     k_c = max|W_c|^(1 − α) / max|x_c|^α

Where every reader of x is a product with constant weights, as in transformers that normalize before the layer (ViT, GPT), γ and β take the
factors and nothing is added to the graph. Where x also goes to the residual sum (BERT), or comes out of an activation or of attention, a
Mul by k is put before the products that share it, if that is expected to take WORTH of the noise at most; with `multiply=no` not. A runtime
that rounds x there does both in one pass over it (OpenVINO), or in one more (ONNX Runtime). α is searched (`_equalize`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Context
from deploycc.passes._channel_scaling import ChannelScaling
from deploycc.passes._dialects import is_constant

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class SmoothActivations(ChannelScaling):
    """SmoothQuant before quantization: ranges of the channels that products read made alike, the weights taking what is over.

    Attributes:
        multiply: put a Mul before products where nothing that makes their input can take the factors.
    """

    name: ClassVar[str] = "smooth-activations"

    multiply: bool = True

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo where no product's input can be smoothed, or none would win by it."""
        what = "products with constant weights" if self.multiply else "LayerNormalization that only feeds products"
        prepare = put_scalers if self.multiply else lambda graph: frozenset[str]()
        return self.scaled(artifact, context, lambda group: any(map(group.written_by, ("LayerNormalization", "Mul"))), what, prepare)


def put_scalers(graph: ir.Graph) -> frozenset[str]:
    """A Mul by ones before the products that share an input whose channels cannot be scaled otherwise; gives their names."""
    import onnx_ir as ir

    from deploycc.passes._channel_groups import groups

    free = {reader.tensor for group in groups(graph) if group.written_by("LayerNormalization") for reader in group.readers}
    readers: dict[str, list[ir.Node]] = {}
    for node in graph:
        name = _products_input(node)
        if name is not None and name not in free:
            readers.setdefault(name, []).append(node)
    made: list[str] = []
    for name, nodes in readers.items():
        value, weight = nodes[0].inputs[0], nodes[0].inputs[1]
        assert value is not None
        assert weight is not None
        assert weight.shape is not None  # `_products_input` has looked
        ones = np.ones(weight.shape.numpy()[0], np.float32)
        stem = f"{name}_smooth"
        factors = ir.Value(
            name=f"{stem}_factors", shape=ir.Shape(ones.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(ones)
        )
        graph.initializers.add(factors)
        mul = ir.node("Mul", [value, factors], name=stem)
        out = mul.outputs[0]
        out.name, out.shape, out.type = f"{stem}ed", value.shape, value.type
        graph.insert_before(nodes[0], mul)
        for node in nodes:
            node.replace_input_with(0, out)
        made.append(stem)
    return frozenset(made)


def _products_input(node: ir.Node) -> str | None:
    """The name of what a MatMul with a constant matrix reads, over many places (3 axes or more); None for another operator.

    A classifier's product has one row for each image: it is left alone.
    """
    if node.op_type != "MatMul" or node.domain:
        return None
    value, weight = node.inputs
    if value is None or is_constant(value) or value.shape is None or not is_constant(weight) or weight is None or weight.shape is None:
        return None
    return value.name if len(weight.shape) == 2 and len(value.shape) > 2 else None
