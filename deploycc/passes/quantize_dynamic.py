"""Dynamic quantization of an ONNX graph: integer weights, and activation ranges found anew in every call. Needs no data.

    x_q, s_x, z_x = DynamicQuantizeLinear(x)                  uint8, over the range of this call's x
    w_q = round(w / s_c),  s_c = max |w_c| / m                int8 per output channel; m = 127, or 63 with reduce_range
    x·w ≈ float(MatMulInteger(x_q, w_q, z_x)) · (s_x · s_c)   (+ bias)

This is the pattern that ONNX Runtime fuses into DynamicQuantizeMatMul or MatMulIntegerToFloat (onnxruntime, `core/optimizer/
matmul_integer_to_float.cc`, `dynamic_quantize_matmul_fusion.cc`). Tensors that several products read are quantized once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.registry import suggest
from deploycc.errors import NothingToDo, PreconditionError, UnknownName

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycc.core.target import Quant

LEAST_OPSET = 11  # DynamicQuantizeLinear
CONVOLUTION_SHARE = 0.5  # of the MACs: above it, what this pass can reach is not worth an int8 artifact
EMBEDDING_ELEMENTS = 4096  # a smaller table is not worth two more operators
REASONS = {
    "Conv": "convolutions need quantize-static",
    "ConvTranspose": "ONNX Runtime has no integer ConvTranspose on the CPU",
    "LSTM": "recurrent layers stay in float",
    "GRU": "recurrent layers stay in float",
    "RNN": "recurrent layers stay in float",
}


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Integer weights for matrix products, with activations quantized at run time; for transformers and MLPs.

    Attributes:
        embeddings: also store the tables of Gather in int8, one scale per row.
        skip: names of operators to leave in float.
    """

    name: ClassVar[str] = "quantize-dynamic"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = LOSSY

    embeddings: bool = False
    skip: tuple[str, ...] = ()

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A float graph at opset 11 or newer, whose work is not in convolutions; operators in `skip` exist."""
        from deploycc.passes._opset import opset_of

        opset = opset_of(artifact.model)
        if opset < LEAST_OPSET:
            raise PreconditionError(
                f"quantize-dynamic needs opset {LEAST_OPSET} or newer (DynamicQuantizeLinear), but the model has {opset}",
                fix="put 'update-opset' before it",
            )
        if artifact.quant is not None or any(node.op_type in ("QuantizeLinear", "MatMulInteger") for node in artifact.model.graph):
            raise PreconditionError("the model is quantized already", fix="start from the float model, or leave quantize-dynamic out")
        names = [node.name or "" for node in artifact.model.graph]
        if missing := [name for name in self.skip if name not in names]:
            raise UnknownName(
                f"skip: the graph has no operator '{missing[0]}'", fix=suggest(missing[0], names, listing="`deploycc inspect MODEL.onnx`")
            )
        share = _convolution_share(artifact.model)
        if share > CONVOLUTION_SHARE:
            raise PreconditionError(
                f"{share:.0%} of the model's work is in convolutions, which dynamic quantization leaves in float",
                fix="use quantize-static with --calibration DATA",
            )

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo when there is no matrix product with constant weights."""
        import onnx_ir.passes.common as common

        from deploycc.forms.onnx import clone
        from deploycc.passes._tidy import complete_names

        quant = context.target.quant
        model = clone(artifact.model)
        complete_names(model)
        left = [(f"{node.name} ({node.op_type})", reason) for node in model.graph if (reason := self._obstacle(node))]
        left += _inside_subgraphs(model)
        products = [node for node in model.graph if _is_product(node) and not self._obstacle(node)]
        tables = [node for node in model.graph if self.embeddings and _is_embedding(node) and node.name not in self.skip]
        if not products and not tables:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left[:3]) or "it has no MatMul or Gemm"
            raise NothingToDo(f"quantize-dynamic finds nothing to quantize ({reasons})", fix="leave it out, or use quantize-static")
        writer = _Writer(model.graph, quant)
        for node in products:
            writer.product(node)
        for node in tables:
            writer.embedding(node)
        common.RemoveUnusedNodesPass()(model)
        info = QuantInfo(
            method="dynamic",
            weights=quant.weights,
            activations="uint8",
            per_channel=quant.per_channel,
            reduce_range=quant.reduce_range,
            calibration="none",
            left_float=tuple(left),
        )
        notes = [f"{len(products)} matrix products in integers, their activations quantized at run time"]
        notes += [f"{len(tables)} embedding tables stored in int8"] if tables else []
        notes += [f"left in float: {name}: {reason}" for name, reason in left]
        return artifact.evolve(model, quant=info, notes=tuple(notes))

    def _obstacle(self, node: ir.Node) -> str | None:
        """Why a heavy operator stays in float; None for one that does not, and for light ones."""
        from deploycc.forms._macs import is_heavy
        from deploycc.passes._fold_graph import array_of

        if not is_heavy(node.op_type):
            return None
        if not _is_product(node):
            return REASONS.get(node.op_type, "it has no dynamic integer form")
        if node.name in self.skip:
            return "left out by skip="
        weight = array_of(node.inputs[1])
        if weight is None:
            return "both of its inputs are activations, or its weights are computed"
        if weight.ndim != 2 or weight.dtype != np.float32:
            return f"its weights are {weight.dtype} with {weight.ndim} axes, not float32 with 2"
        scaled = any(node.attributes[key].as_float() != 1.0 for key in ("alpha", "beta") if key in node.attributes)
        turned = "transA" in node.attributes and node.attributes["transA"].as_int() != 0
        return "alpha, beta or transA is not at its default" if node.op_type == "Gemm" and (scaled or turned) else None


def _is_product(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in ("MatMul", "Gemm")


def _is_embedding(node: ir.Node) -> bool:
    from deploycc.passes._fold_graph import array_of

    if node.op_type != "Gather" or node.domain != "" or ("axis" in node.attributes and node.attributes["axis"].as_int() != 0):
        return False
    table = array_of(node.inputs[0])
    return table is not None and table.ndim == 2 and table.dtype == np.float32 and table.size >= EMBEDDING_ELEMENTS


def _inside_subgraphs(model: ir.Model) -> list[tuple[str, str]]:
    from deploycc.forms._macs import is_heavy

    nodes = [node for graph in model.graph.subgraphs() for node in graph if is_heavy(node.op_type)]
    return [(f"{node.name} ({node.op_type})", "it is inside an If, Loop or Scan") for node in nodes]


def _convolution_share(model: ir.Model) -> float:
    """Of the MACs; of the heavy operators where shapes are unknown."""
    from deploycc.forms._macs import count_macs, is_heavy

    kinds = {node.name or f"{node.op_type}_{index}": node.op_type for index, node in enumerate(model.graph)}
    work = count_macs(model) or {name: 1 for name, kind in kinds.items() if is_heavy(kind)}
    convolutions = sum(macs for name, macs in work.items() if kinds[name] in ("Conv", "ConvTranspose"))
    return convolutions / (sum(work.values()) or 1)


class _Writer:
    """Rewrites one graph in place (give it a clone)."""

    def __init__(self, graph: ir.Graph, quant: Quant) -> None:
        self.graph = graph
        self.quant = quant
        self._activations: dict[str, tuple[ir.Value, ir.Value, ir.Value]] = {}
        self._weights: dict[tuple[str, bool], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def product(self, node: ir.Node) -> None:
        """A MatMul or Gemm becomes MatMulInteger, Cast, Mul (and Add)."""
        import onnx_ir as ir

        given, weight = node.inputs[0], node.inputs[1]
        if given is None or weight is None:
            raise ValueError(f"{node.name} has no inputs")
        turned = node.op_type == "Gemm" and "transB" in node.attributes and node.attributes["transB"].as_int() != 0
        x, x_scale, x_zero = self._activation(given, node)
        w, w_scale, w_zero = self._weight(weight, turned)
        scales = self._insert(node, "Mul", [x_scale, w_scale], "scales")
        integer = self._insert(node, "MatMulInteger", [x, w, x_zero, w_zero], "MatMulInteger", ir.DataType.INT32)
        value = self._insert(node, "Cast", [integer], "Cast", attributes={"to": ir.DataType.FLOAT})
        value = self._insert(node, "Mul", [value, scales], "Mul")
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            value = self._insert(node, "Add", [value, node.inputs[2]], "Add")
        self._take_over(node, value)

    def embedding(self, node: ir.Node) -> None:
        """Gather from an int8 table, times the gathered row's scale."""
        import onnx_ir as ir

        from deploycc.passes._qdq import weight_scales

        table, index = node.inputs[0], node.inputs[1]
        if table is None or table.const_value is None or index is None:
            raise ValueError(f"{node.name} has no table")
        array = table.const_value.numpy()
        scales = weight_scales(array, 0, 127, clip=False).reshape(-1, 1)
        rows = self._constant(f"{table.name}_quantized", np.clip(np.rint(array / scales), -127, 127).astype(np.int8))
        picked = self._insert(node, "Gather", [rows, index], "rows", ir.DataType.INT8)
        scale = self._insert(node, "Gather", [self._constant(f"{table.name}_scale", scales), index], "scales")
        value = self._insert(node, "Cast", [picked], "Cast", attributes={"to": ir.DataType.FLOAT})
        self._take_over(node, self._insert(node, "Mul", [value, scale], "Mul"))

    def _activation(self, value: ir.Value, reader: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(uint8 tensor, scale, zero point), made once per tensor, before its first reader."""
        import onnx_ir as ir

        name = value.name or ""
        if name not in self._activations:
            node = ir.node("DynamicQuantizeLinear", [value], num_outputs=3, name=f"{name}_DynamicQuantizeLinear")
            for out, part, kind in zip(node.outputs, ("quantized", "scale", "zero_point"), ("UINT8", "FLOAT", "UINT8"), strict=True):
                out.name, out.type = f"{name}_{part}", ir.TensorType(ir.DataType[kind])
            node.outputs[0].shape, node.outputs[1].shape, node.outputs[2].shape = value.shape, ir.Shape([]), ir.Shape([])
            self.graph.insert_before(reader, node)
            self._activations[name] = (node.outputs[0], node.outputs[1], node.outputs[2])
        return self._activations[name]

    def _weight(self, value: ir.Value, turned: bool) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(integer K×N weight, scales, zero points), made once per weight."""
        from deploycc.passes._qdq import weight_scales

        key = (value.name or "", turned)
        if key in self._weights:
            return self._weights[key]
        if value.const_value is None:
            raise ValueError(f"{value.name} is not constant")
        array = value.const_value.numpy()
        array = array.T if turned else array
        most = 63 if self.quant.reduce_range else 127
        scales = weight_scales(array, 1 if self.quant.per_channel else None, most, clip=False)
        kind = np.dtype(self.quant.weights)
        zero = 128 if kind.kind == "u" else 0
        quantized = (np.clip(np.rint(array / scales), -most, most) + zero).astype(kind)
        stem = f"{value.name}_transposed" if turned else f"{value.name}"
        scalar = len(scales) == 1
        self._weights[key] = (
            self._constant(f"{stem}_quantized", np.ascontiguousarray(quantized)),
            self._constant(f"{stem}_scale", scales[0].reshape(()) if scalar else scales),
            self._constant(f"{stem}_zero_point", np.full(() if scalar else len(scales), zero, kind)),
        )
        return self._weights[key]

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        from deploycc.passes._fold_graph import constant

        return constant(self.graph, name, array)

    def _insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        part: str,
        dtype: ir.DataType | None = None,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        """A new node's result (float32 unless `dtype`)."""
        import onnx_ir as ir

        node = ir.node(op_type, inputs, attributes, name=f"{before.name}/{part}")
        out = node.outputs[0]
        out.name, out.type = f"{node.name}_out", ir.TensorType(dtype or ir.DataType.FLOAT)
        self.graph.insert_before(before, node)
        return out

    def _take_over(self, node: ir.Node, value: ir.Value) -> None:
        """`value` replaces the node's result, under its name."""
        old = node.outputs[0]
        value.type, value.shape = old.type, old.shape
        old.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        value.name = old.name
