"""Dynamic quantization of an ONNX graph: integer weights, and activation ranges found anew in every call. Needs no data.

    x_q, s_x, z_x = DynamicQuantizeLinear(x)                  uint8, over the range of this call's x
    w_q = round(w / s_c),  s_c = max |w_c| / m                int8 per output channel; m = 127, or 63 with reduce_range
    x·w ≈ float(MatMulInteger(x_q, w_q, z_x)) · (s_x · s_c)   (+ bias)

This is the pattern that ONNX Runtime fuses into DynamicQuantizeMatMul or MatMulIntegerToFloat (onnxruntime, `core/optimizer/
matmul_integer_to_float.cc`, `dynamic_quantize_matmul_fusion.cc`). Tensors that several products read are quantized once. An LSTM becomes
ONNX Runtime's DynamicQuantizeLSTM, which does the same to its input and, at every step, to its hidden state. Sub-graphs are rewritten
like the main graph.

With `outliers`, channels far larger than all others are multiplied in float (`_outliers`): x w = x_kept w_kept + x_few w_few. MiniLM-L6
has some in front of most products: over 10,568 sentences (64 others calibrate) the mean cosine between its vectors and the float model's
is 0.9928 without it, and 0.9992 with up to 8 channels, at 2.46 and 2.16 times the float model's speed
(19 tokens; 2.30 and 2.08 with 128; one Zen 4 core, ORT 1.32). With 7-bit weights it is 0.991 and 0.9986 (264 sentences). Scales that cut
off the largest weights of a channel changed neither.

A model with an LSTM is taken even where most MACs are convolutions': silero-vad gains 4 % of its time from its LSTM alone. After
`quantize-static`, which has no LSTM, this pass takes the LSTMs that are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.registry import suggest
from deploycc.core.target import Target
from deploycc.errors import NothingToDo, PreconditionError, UnknownName
from deploycc.passes._dynamic_worth import refuse_convolutions

if TYPE_CHECKING:
    import onnx_ir as ir

LEAST_OPSET = 11  # DynamicQuantizeLinear
STRONGER_OUTLIERS = 8
REASONS = {
    "Conv": "convolutions need quantize-static",
    "ConvTranspose": "ONNX Runtime has no integer ConvTranspose on the CPU",
    "GRU": "ONNX Runtime has no integer GRU",
    "RNN": "ONNX Runtime has no integer RNN",
}


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Integer weights for matrix products and LSTMs, with activations quantized at run time; for transformers, RNNs and MLPs.

    Attributes:
        embeddings: also store the tables of Gather in int8, one scale per row.
        outliers: most channels of a product's input that may stay in float because they are far larger than the others; 0 = none. More
            than none needs calibration data.
        skip: names of operators to leave in float.
    """

    name: ClassVar[str] = "quantize-dynamic"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = LOSSY
    reads: ClassVar[frozenset[str]] = frozenset({"calibration"})

    embeddings: bool = False
    outliers: int = 0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.outliers < 0:
            raise ValueError(f"outliers is {self.outliers}: it must be 0 or more")

    def alternatives(self, target: Target) -> tuple[Pass, ...]:
        """Outlier channels in float."""
        return () if self.outliers else (replace(self, outliers=STRONGER_OUTLIERS),)

    def requires(self, artifact: Artifact, context: Context) -> None:
        """A graph at opset 11 or newer, in float but for what quantize-static did, with an LSTM or most work outside convolutions."""
        from deploycc.forms.onnx import graphs
        from deploycc.passes._opset import opset_of
        from deploycc.passes._products import QUANTIZED

        if context.target.quant.weights == "float8":
            raise PreconditionError(
                f"target '{context.target.name}' multiplies float8, which has no dynamic form", fix="use quantize-float8"
            )
        opset = opset_of(artifact.model)
        if opset < LEAST_OPSET:
            raise PreconditionError(
                f"quantize-dynamic needs opset {LEAST_OPSET} or newer (DynamicQuantizeLinear), but the model has {opset}",
                fix="put 'update-opset' before it",
            )
        nodes = [node for graph in graphs(artifact.model) for node in graph]
        lstms = any(node.op_type == "LSTM" and self._obstacle(node, context) is None for node in nodes)
        if (artifact.quant is not None or any(node.op_type in QUANTIZED for node in nodes)) and not (_is_static(artifact) and lstms):
            raise PreconditionError("the model is quantized already", fix="start from the float model, or leave quantize-dynamic out")
        if self.outliers and _is_static(artifact):
            raise PreconditionError(
                "outliers= is for matrix products, and this model's are quantized already: only its LSTMs are left",
                fix="leave outliers out, or leave out the pass that quantized the model",
            )
        names = [node.name or "" for node in nodes]
        if missing := [name for name in self.skip if name not in names]:
            raise UnknownName(
                f"skip: the graph has no operator '{missing[0]}'", fix=suggest(missing[0], names, listing="`deploycc inspect MODEL.onnx`")
            )
        if not lstms:
            refuse_convolutions(_convolution_share(artifact.model), "quantize-static")
        if self.outliers:
            context.data.part("calibration")  # raises DataNeeded before anything slow

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo when there is no matrix product or LSTM with constant weights."""
        from deploycc.forms._macs import infer_shapes
        from deploycc.passes._dynamic import Writer
        from deploycc.passes._products import MICROSOFT, drop_unused, function_operators, is_embedding, is_product
        from deploycc.passes._tidy import complete_names

        quant = context.target.quant
        model = infer_shapes(artifact.model)
        complete_names(model)
        nodes = [node for graph in model.graphs() for node in graph]
        obstacles = [self._obstacle(node, context) for node in nodes]
        left = [(f"{node.name} ({node.op_type})", reason) for node, reason in zip(nodes, obstacles, strict=True) if reason]
        left += function_operators(model)
        taken = [node for node, reason in zip(nodes, obstacles, strict=True) if reason is None]
        products = [] if _is_static(artifact) else [node for node in taken if is_product(node)]
        lstms = [node for node in taken if node.op_type == "LSTM"]
        tables = [node for node in nodes if self.embeddings and is_embedding(node) and node.name not in self.skip]
        if not products and not lstms and not tables:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left[:3]) or "it has no MatMul, Gemm or LSTM"
            raise NothingToDo(f"quantize-dynamic finds nothing to quantize ({reasons})", fix="leave it out, or use quantize-static")
        outliers = self._outliers(model, products, artifact, context)
        split = [node for node in products if node.inputs[0] is not None and node.inputs[0].name in outliers]
        left += [(f"{node.name}/outlier_MatMul (MatMul)", "outliers= keeps these channels in float") for node in split]
        writer = Writer(quant, outliers)
        for node in products:
            writer.product(node)
        for node in lstms:
            writer.lstm(node)
        for node in tables:
            writer.embedding(node)
        if lstms:
            model.opset_imports.setdefault(MICROSOFT, 1)
        drop_unused(model)
        info = QuantInfo("dynamic", quant.weights, "uint8", quant.per_channel, quant.reduce_range, "none", tuple(left))
        if _is_static(artifact) and artifact.quant is not None:
            labels = {f"{node.name} ({node.op_type})" for node in nodes if node.op_type == "LSTM"}
            left = [item for item in artifact.quant.left_float if item[0] not in labels] + [item for item in left if item[0] in labels]
            info = replace(artifact.quant, left_float=tuple(left))
        notes = [f"{len(products)} matrix products in integers, their activations quantized at run time"] if products else []
        notes += [f"{len(lstms)} LSTM layers in integers, their inputs and states quantized at run time"] if lstms else []
        notes += [f"{len(tables)} embedding tables stored in int8"] if tables else []
        notes += (
            ["embeddings=true: the graph has no table of a Gather that is worth storing in int8"] if self.embeddings and not tables else []
        )
        notes += self._told(outliers)
        notes += [f"left in float: {name}: {reason}" for name, reason in left]
        details = {"outliers": {name: list(channels) for name, channels in outliers.items()}} if outliers else {}
        return artifact.evolve(model, quant=info, notes=tuple(notes), details=details)

    def _outliers(self, model: ir.Model, products: Sequence[ir.Node], artifact: Artifact, context: Context) -> dict[str, tuple[int, ...]]:
        """Of the tensors of the main graph that products read; those inside sub-graphs cannot be watched."""
        from deploycc.passes._outliers import outlier_channels

        given = [node.inputs[0] for node in products if node.graph is model.graph]
        tensors = {value.name for value in given if value is not None and value.name and value.const_value is None}
        return outlier_channels(model, tensors, self.outliers, artifact, context) if self.outliers and tensors else {}

    def _told(self, outliers: dict[str, tuple[int, ...]]) -> list[str]:
        if not self.outliers:
            return []
        if not outliers:
            return ["no tensor has outlier channels"]
        return [f"{sum(map(len, outliers.values()))} outlier channels of {len(outliers)} tensors are multiplied in float"]

    def _obstacle(self, node: ir.Node, context: Context) -> str | None:
        """Why a heavy operator stays in float; None for one that does not, and for light ones."""
        from deploycc.forms._macs import is_heavy
        from deploycc.passes._products import is_product, obstacle

        if not is_heavy(node.op_type):
            return None
        if node.op_type != "LSTM" and not is_product(node):
            return REASONS.get(node.op_type, "it has no dynamic integer form")
        if node.name in self.skip:
            return "left out by skip="
        return obstacle(node) if is_product(node) else _lstm_obstacle(node, context.target.backend)


def _is_static(artifact: Artifact) -> bool:
    """Whether a pass before this one has quantized all but what only this one can."""
    return artifact.quant is not None and artifact.quant.method in ("static", "qat")


def _lstm_obstacle(node: ir.Node, backend: str) -> str | None:
    """Why an LSTM stays in float; None when DynamicQuantizeLSTM does the same."""
    from deploycc.passes._fold_graph import array_of

    if backend != "onnxruntime":
        return f"only ONNX Runtime has an integer LSTM, not {backend}"
    if node.attributes.get_int("layout", 0):
        return "DynamicQuantizeLSTM wants the sequence before the batch (layout = 0)"
    if "hidden_size" not in node.attributes:
        return "it does not say its hidden_size"
    arrays = [array_of(value) for value in node.inputs[1:3]]
    if any(array is None or array.dtype != np.float32 for array in arrays):
        return "its weights are computed, or not float32"
    return None


def _convolution_share(model: ir.Model) -> float:
    """Of the MACs; of the heavy operators where MACs are unknown."""
    from deploycc.forms._macs import is_heavy, macs_by_operator
    from deploycc.forms.onnx import graphs

    work = macs_by_operator(model) or Counter(node.op_type for graph in graphs(model) for node in graph if is_heavy(node.op_type))
    return sum(work.get(kind, 0) for kind in ("Conv", "ConvTranspose")) / (sum(work.values()) or 1)
