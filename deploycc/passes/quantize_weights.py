"""Weight-only quantization: block-wise 4- or 8-bit weights in ONNX Runtime's MatMulNBits. Needs no data.

    y = x · W_q + b,    W_q[k, n] = (code[k, n] − z) · s,    one s (and z) for every `block` inputs k of an output n

The codes are those of least squared error (`_blocks`). Operators: com.microsoft MatMulNBits and, for tables, GatherBlockQuantized
(onnxruntime, docs/ContribOperators.md). Activations have no range of their own, so outliers cost little: this suits transformers, where
`quantize-dynamic` is faster but coarser.

At `accuracy_level` 4 the kernel also rounds x to 8 bits, block by block, and multiplies integers; at 0 it multiplies floats. Measured with
ORT 1.32 on one Zen 4 core (AVX-512 VNNI), 2048×2048, times the speed of the float product, for 1, 19 and 128 rows of x:

    bits    level 4, block 32    block 128          block 256          level 0, any block
    4       5.8  1.7  1.2        8.2  2.4  2.0      9.7  2.8  2.3      1.5 to 2.0  0.9  1.0
    8       4.6  1.8  1.6        6.4  2.5  2.2      6.1  2.9  2.4      0.1  0.2  0.4
    (quantize-dynamic: 4.7  4.2  4.0)

For 8 bits at level 0 there is no kernel on x86: all weights become floats in every call. Zero points cost no time. 4-bit codes cannot
saturate a pair of products on CPUs without VNNI: 2 · 15 · 127 = 3810 < 32767. MiniLM-L6 (19 tokens): cosine 0.972 with 4 bits, blocks of
32, at 1.3 times the float model's speed; 0.9989 with 8 bits, blocks of 128, at 1.6 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Pass
from deploycc.core.registry import suggest
from deploycc.core.target import Target
from deploycc.errors import NothingToDo, PreconditionError, UnknownName

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from deploycc.passes._blocks import Blocks

LEAST_OPSET = 7  # Add broadcasts a bias
BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)
LEVELS = (0, 4)
INTEGERS = 4  # the accuracy level at which activations are rounded too
REASONS = {
    "Conv": "only matrix products have a kernel with block-wise weights",
    "ConvTranspose": "only matrix products have a kernel with block-wise weights",
    "LSTM": "recurrent layers have no kernel with block-wise weights; quantize-dynamic takes an LSTM",
    "GRU": "recurrent layers have no kernel with block-wise weights",
    "RNN": "recurrent layers have no kernel with block-wise weights",
}


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Block-wise 4- or 8-bit weights for matrix products (and tables), without data; for transformers and large models.

    Attributes:
        bits: of a weight.
        block: weights that share a scale. Small ones are more exact, large ones smaller and faster.
        symmetric: zero is the middle code; otherwise every block has a zero point too.
        accuracy_level: what ONNX Runtime may do to activations: 4 = round them to 8 bits in blocks and multiply integers, 0 = keep floats.
        embeddings: also store the tables of Gather in blocks.
        skip: names of operators to leave in float.
    """

    name: ClassVar[str] = "quantize-weights"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar = LOSSY
    decided_by: ClassVar[frozenset[str]] = frozenset({"backend"})

    bits: int = 4
    block: int = 32
    symmetric: bool = False
    accuracy_level: int = 4
    embeddings: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("bits", self.bits, BITS),
            ("block", self.block, BLOCKS),
            ("accuracy-level", self.accuracy_level, LEVELS),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value}: it must be one of {', '.join(map(str, choices))}")

    def alternatives(self, target: Target) -> tuple[Pass, ...]:
        """Eight bits."""
        return (replace(self, bits=8),) if self.bits == 4 else ()

    def requires(self, artifact: Artifact, context: Context) -> None:
        """ONNX Runtime, a float graph at opset 7 or newer, operators in `skip` that exist."""
        from deploycc.forms.onnx import graphs
        from deploycc.passes._opset import opset_of
        from deploycc.passes._products import QUANTIZED

        if context.target.backend != "onnxruntime":
            raise PreconditionError(
                f"target '{context.target.name}' runs on {context.target.backend}; only ONNX Runtime has products with block-wise weights",
                fix="leave quantize-weights out, or use a target whose backend is onnxruntime",
            )
        opset = opset_of(artifact.model)
        if opset < LEAST_OPSET:
            raise PreconditionError(
                f"quantize-weights needs opset {LEAST_OPSET} or newer, but the model has {opset}", fix="put 'update-opset' before it"
            )
        nodes = [node for graph in graphs(artifact.model) for node in graph]
        if artifact.quant is not None or any(node.op_type in QUANTIZED for node in nodes):
            raise PreconditionError("the model is quantized already", fix="start from the float model, or leave quantize-weights out")
        names = [node.name or "" for node in nodes]
        if missing := [name for name in self.skip if name not in names]:
            raise UnknownName(
                f"skip: the graph has no operator '{missing[0]}'", fix=suggest(missing[0], names, listing="`deploycc inspect MODEL.onnx`")
            )

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Raises NothingToDo when there is no matrix product (or table) with constant weights."""
        from deploycc.forms._macs import infer_shapes
        from deploycc.passes._products import MICROSOFT, drop_unused, function_operators, is_embedding, is_product
        from deploycc.passes._tidy import complete_names

        model = infer_shapes(artifact.model)
        complete_names(model)
        nodes = [node for graph in model.graphs() for node in graph]
        obstacles = [self._obstacle(node) for node in nodes]
        left = [(f"{node.name} ({node.op_type})", reason) for node, reason in zip(nodes, obstacles, strict=True) if reason]
        left += function_operators(model)
        products = [node for node, reason in zip(nodes, obstacles, strict=True) if is_product(node) and not reason]
        asked = [node for node in nodes if self.embeddings and is_embedding(node) and node.name not in self.skip]
        tables = [node for node in asked if _columns_fit(node, self.bits)]
        odd = [node for node in asked if node not in tables]
        if not products and not tables:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left[:3]) or "it has no MatMul or Gemm"
            raise NothingToDo(f"quantize-weights finds nothing to quantize ({reasons})", fix="leave it out")
        writer = _Writer(self)
        for node in products:
            writer.product(node)
        for node in tables:
            writer.embedding(node)
        model.opset_imports.setdefault(MICROSOFT, 1)
        drop_unused(model)
        info = QuantInfo(
            method="weights",
            weights=f"{'int' if self.symmetric else 'uint'}{self.bits}",
            activations="int8" if self.accuracy_level == INTEGERS else "none",
            per_channel=True,
            reduce_range=False,
            calibration="none",
            left_float=tuple(left),
        )
        notes = self._notes(len(products), len(tables), left)
        notes += [f"table of {node.name} stays in float: its rows of {self.bits}-bit codes fill no whole bytes" for node in odd]
        return artifact.evolve(model, quant=info, notes=tuple(notes))

    def _notes(self, products: int, tables: int, left: Sequence[tuple[str, str]]) -> list[str]:
        notes = [f"{products} matrix products with {self.bits}-bit weights in blocks of {self.block}"] if products else []
        notes += ["embeddings=true: no table of a Gather could be stored in blocks"] if self.embeddings and not tables else []
        notes += [f"{tables} embedding tables with {self.bits}-bit weights in blocks of {self.block}"] if tables else []
        if self.bits == 8 and self.accuracy_level != INTEGERS:
            notes.append("ONNX Runtime has no kernel for 8-bit weights at accuracy-level 0 on x86: it makes floats of them in every call")
        return notes + [f"left in float: {name}: {reason}" for name, reason in left]

    def _obstacle(self, node: ir.Node) -> str | None:
        """Why a heavy operator stays in float; None for one that does not, and for light ones."""
        from deploycc.forms._macs import is_heavy
        from deploycc.passes._products import is_product, obstacle

        if not is_heavy(node.op_type):
            return None
        if not is_product(node):
            return REASONS.get(node.op_type, "it has no form with block-wise weights")
        if node.name in self.skip:
            return "left out by skip="
        given = node.inputs[0]
        if given is not None and given.shape is not None and len(given.shape) < 2:
            return "its input has one axis, and MatMulNBits wants two or more"
        return obstacle(node)


def _columns_fit(node: ir.Node, bits: int) -> bool:
    """Whether the rows of a table fill whole bytes: GatherBlockQuantized takes their length from the bytes."""
    table = node.inputs[0]
    return table is not None and table.const_value is not None and table.const_value.numpy().shape[1] * bits % 8 == 0


class _Writer:
    """Rewrites graphs of one model in place (give it a clone)."""

    def __init__(self, options: QuantizeWeights) -> None:
        self.options = options
        self._weights: dict[tuple[ir.Value, bool], list[ir.Value | None]] = {}

    def product(self, node: ir.Node) -> None:
        """A MatMul or Gemm becomes MatMulNBits (and Add)."""
        from deploycc.passes._products import MICROSOFT, columns, insert, take_over

        inputs, outputs = columns(node).shape
        attributes = {"K": inputs, "N": outputs, **self._attributes(), "accuracy_level": self.options.accuracy_level}
        value = insert(node, "MatMulNBits", [node.inputs[0], *self._weight(node)], "MatMulNBits", attributes=attributes, domain=MICROSOFT)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            value.shape = node.outputs[0].shape
            value = insert(node, "Add", [value, node.inputs[2]], "Add")
        take_over(node, [value])

    def embedding(self, node: ir.Node) -> None:
        """A Gather of rows becomes GatherBlockQuantized."""
        from deploycc.passes._blocks import packed
        from deploycc.passes._products import MICROSOFT, insert, stored, take_over

        table, index = node.inputs[0], node.inputs[1]
        assert table is not None and table.const_value is not None  # noqa: PT018  (`is_embedding` has looked)
        blocks = self._blocks(table.const_value.numpy())
        width = table.const_value.shape[1]
        codes = blocks.codes.reshape(len(blocks.codes), -1)[:, :width]  # this operator's last block ends with the row
        inputs = [
            stored(table, f"{table.name}_blocks", packed(codes, blocks.bits)),
            index,
            stored(table, f"{table.name}_scales", blocks.scales),
            None if self.options.symmetric else stored(table, f"{table.name}_zero_points", packed(blocks.zeros, blocks.bits)),
        ]
        attributes = {"gather_axis": 0, "quantize_axis": 1, **self._attributes()}
        take_over(node, [insert(node, "GatherBlockQuantized", inputs, "rows", attributes=attributes, domain=MICROSOFT)])

    def _attributes(self) -> dict[str, int]:
        return {"bits": self.options.bits, "block_size": self.options.block}

    def _blocks(self, rows: np.ndarray) -> Blocks:
        from deploycc.passes._blocks import quantize

        return quantize(rows, self.options.bits, self.options.block, symmetric=self.options.symmetric)

    def _weight(self, node: ir.Node) -> list[ir.Value | None]:
        """[codes, scales, zero points], made once per weight."""
        from deploycc.passes._blocks import packed
        from deploycc.passes._products import columns, is_turned, stored

        value = node.inputs[1]
        assert value is not None  # `obstacle` has looked
        key = (value, is_turned(node))
        if key not in self._weights:
            blocks = self._blocks(columns(node).T)
            stem = f"{value.name}_transposed" if is_turned(node) else f"{value.name}"
            zeros = None if self.options.symmetric else stored(value, f"{stem}_zero_points", packed(blocks.zeros, blocks.bits))
            codes = stored(value, f"{stem}_blocks", packed(blocks.codes, blocks.bits))
            self._weights[key] = [codes, stored(value, f"{stem}_scales", blocks.scales), zeros]
        return self._weights[key]
