"""Several models in one graph: the weighted average of what they give for the same input (L. Hansen, P. Salamon, 1990).

    mean      y = Σ wᵢ yᵢ                                 of every output
    softmax   y = log Σ wᵢ softmax(zᵢ)                    of the one output, logits z; Σ wᵢ = 1

In softmax mode the logarithm is taken so that the output is still logits: its softmax is the averaged probabilities, and the declared
post-processing stays right. Probabilities below the smallest normal float count as that.

A member is a bundle's folder, whose hashes are checked, or an .onnx file. All must take and give the same, under the same declared
transform. Their nodes are put side by side as they are, Q/DQ included, and only the outputs are averaged, in float: an int8 member still
runs in integers. Time and size are the sums, so every size is compared with the limit before anything is built. Slower than the float
model, an ensemble ships if it is more accurate and keeps every limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import LOSSY, Context, Effect, Pass
from deploycc.errors import PreconditionError, SourceError

if TYPE_CHECKING:
    import onnx_ir as ir

CURRENT = "the model"


@dataclass(frozen=True)
class Ensemble(Pass):
    """Average the model's outputs with those of other compiled models, in one graph.

    Attributes:
        members: the other models, folders of bundles or .onnx files: bundle-a,bundle-b.
        mode: mean (of the outputs) or softmax (of the probabilities that they are logits of).
        weights: one for the model and one for each member, such as 1,1,2; empty = equal.
    """

    name: ClassVar[str] = "ensemble"
    consumes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    effect: ClassVar[Effect] = LOSSY
    buys_accuracy: ClassVar[bool] = True
    decided_by: ClassVar[frozenset[str]] = frozenset({"runtime"})

    members: tuple[str, ...] = ()
    mode: Literal["mean", "softmax"] = "mean"
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.members)) < len(self.members):
            raise ValueError(f"members names {max(self.members, key=self.members.count)} twice: give it a larger weight instead")
        if self.weights and len(self.weights) != len(self.members) + 1:
            raise ValueError(f"{len(self.weights)} weights for the model and {len(self.members)} members: give {len(self.members) + 1}")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights are {', '.join(f'{weight:g}' for weight in self.weights)}: each must be over 0")

    def requires(self, artifact: Artifact, context: Context) -> None:
        """Members that fit the model and, together, the limit on size; outputs that can be averaged."""
        if not self.members:
            raise PreconditionError("ensemble has no members", fix="name bundles or .onnx files: members=bundle-a,bundle-b")
        outputs = artifact.signature.outputs
        if other := [spec for spec in outputs if not spec.dtype.startswith("float")]:
            raise PreconditionError(f"output {other[0]} is not float: it cannot be averaged", fix="use models whose outputs are scores")
        if self.mode == "softmax" and len(outputs) > 1:
            raise PreconditionError(f"mode=softmax averages one output, but the model has {len(outputs)}", fix="use mode=mean")
        if self.mode == "softmax" and artifact.transform is not None and not artifact.transform.softmax:
            raise PreconditionError("mode=softmax takes logits, but the transform says the output needs no softmax", fix="use mode=mean")
        everyone = {CURRENT: artifact, **{text: read_member(text, context) for text in self.members}}
        for text in self.members:
            _check_fit(artifact, text, everyone[text])
        _check_domains(everyone)
        _check_size(everyone, context)

    def depends_on(self, context: Context) -> str:
        """Digests of the members: another bundle under the same name is another member."""
        return " ".join(read_member(text, context).digest() for text in self.members)

    def apply(self, artifact: Artifact, context: Context) -> Artifact:
        """Put the graphs side by side."""
        from deploycc.forms.onnx import OnnxForm, clone
        from deploycc.passes._opset import convert, opset_of
        from deploycc.passes._tidy import tidy

        read = {text: read_member(text, context) for text in self.members}
        everyone = {CURRENT: artifact, **read}
        opsets = sorted({found for item in everyone.values() if (found := opset_of(item.model))})
        opset = opsets[0] if len(opsets) == 1 else min(opsets[-1], context.target.runtime.opset)
        models = [convert(item.model, opset) if opset_of(item.model) else clone(item.model) for item in everyone.values()]
        main = models[0]
        for model in models[1:]:
            main.opset_imports.update(model.opset_imports)
            main.ir_version = max(main.ir_version, model.ir_version)
        results = [list(main.graph.outputs), *(take_in(main, model) for model in models[1:])]
        given = self.weights or (1.0,) * len(models)
        shares = [weight / sum(given) for weight in given]
        for index, columns in enumerate(zip(*results, strict=True)):
            _average(main, index, columns, shares, self.mode)
        tidy(main)
        quant, said = _common_quant(everyone)
        mixed = [f"opsets {', '.join(map(str, opsets))} brought to {opset}"] if len(opsets) > 1 else []
        rows = [
            {"name": text, "weight": share, "bytes": _bytes(item), "digest": OnnxForm().digest(item.model)}
            for (text, item), share in zip(everyone.items(), shares, strict=True)
        ]
        notices = tuple(dict.fromkeys(notice for item in everyone.values() for notice in item.notices))
        notes = (f"{self.mode} of {_sizes(everyone)}, weighted {', '.join(f'{share:.3g}' for share in shares)}", *mixed, *said)
        return artifact.evolve(main, quant=quant, notices=notices, notes=notes, details={"members": rows})


def read_member(text: str, context: Context) -> Artifact:
    """A bundle or an .onnx file as an artifact. Raises BundleError, SourceError, PreconditionError."""
    import onnx_ir as ir

    from deploycc.forms.onnx import read
    from deploycc.runtime.bundle import load

    if text.lower().endswith(".onnx"):
        return context.model(text)
    bundle = load(Path(text))
    if bundle.model.suffix != ".onnx":
        raise PreconditionError(f"member {text} holds {bundle.model.name}, not an ONNX graph", fix="compile it for an ONNX target")
    try:
        model = read(bundle.model)
        ir.external_data.load_to_model(model)
    except Exception as cause:  # its hash is right, so whoever wrote it wrote no model
        raise SourceError(f"member {text}: {bundle.model.name} cannot be read: {cause}", fix="compile it again") from cause
    facts = bundle.manifest.get("shipped", {}).get("quant")
    quant = QuantInfo(**{**facts, "left_float": tuple(map(tuple, facts["left_float"]))}) if facts else None
    notices = tuple(bundle.manifest.get("notices", ()))
    return Artifact(Form.ONNX, model, bundle.signature, text, transform=bundle.transform, quant=quant, notices=notices)


def _check_fit(artifact: Artifact, text: str, member: Artifact) -> None:
    """Raise PreconditionError, naming both, when the member takes or gives something else."""
    if member.form is not Form.ONNX:
        raise PreconditionError(f"member {text} is a {member.form.name}, not an ONNX graph", fix="export it first, or compile it")
    for part in ("inputs", "outputs"):
        own, other = getattr(artifact.signature, part), getattr(member.signature, part)
        if _facts(own) != _facts(other):
            verb = "takes" if part == "inputs" else "gives"
            raise PreconditionError(
                f"the model ({artifact.source}) {verb} {', '.join(map(str, own))}, but member {text} {', '.join(map(str, other))}",
                fix="average models of the same input and the same classes",
            )
    if artifact.transform is None or member.transform is None:
        return
    for field in fields(artifact.transform):
        own, other = getattr(artifact.transform, field.name), getattr(member.transform, field.name)
        if own != other and not (field.name == "classes" and None in (own, other)):
            raise PreconditionError(
                f"the transform of the model ({artifact.source}) has {field.name} = {own}, that of member {text} {other}",
                fix="compile both with the same transform",
            )


def _check_domains(everyone: dict[str, Artifact]) -> None:
    """Raise PreconditionError when two models use different versions of one set of operators that is not ONNX's own."""
    seen: dict[str, tuple[int, str]] = {}
    for text, item in everyone.items():
        for domain, version in item.model.opset_imports.items():
            first, whose = seen.setdefault(domain, (version, text))
            if domain and first != version:
                raise PreconditionError(
                    f"{whose} uses version {first} of the operators {domain}, {text} version {version}",
                    fix="compile both with the same version of deploycc",
                )


def _check_size(everyone: dict[str, Artifact], context: Context) -> None:
    """Raise PreconditionError when the sum of the weights is over the limit."""
    limit = context.target.limits.model_mb
    total = sum(map(_bytes, everyone.values())) / 1e6
    if limit is not None and total > limit:
        raise PreconditionError(
            f"together the models have {total:.3f} MB of weights ({_sizes(everyone)}), over the limit model_mb = {limit:g}",
            fix="leave members out, quantize them, or raise the limit",
        )


def take_in(main: ir.Model, member: ir.Model) -> list[ir.Value]:
    """Move the nodes and weights of `member`, renamed, into `main`, on the same inputs. Returns the member's outputs."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    if member.functions:
        common.InlinePass()(member)
    prefix = _free_prefix(main, "member")
    shared = dict(zip(member.graph.inputs, main.graph.inputs, strict=True))
    for graph in list(member.graphs()):
        for value in list(graph.initializers.values()):
            value.name = f"{prefix}{value.name}"
        for value in graph.inputs:
            value.name = f"{prefix}{value.name}"
        for node in graph:
            node.name = f"{prefix}{node.name or node.op_type}"
            for value in node.outputs:
                value.name = f"{prefix}{value.name}" if value.name else value.name
    results = [shared.get(value, value) for value in member.graph.outputs]
    member.graph.outputs.clear()
    for own, other in shared.items():
        ir.convenience.replace_all_uses_with(own, other)
    nodes, weights = list(member.graph), list(member.graph.initializers.values())
    member.graph.remove(nodes)
    member.graph.initializers.clear()
    for value in weights:
        main.graph.register_initializer(value)
    main.graph.extend(nodes)
    return results


def _free_prefix(main: ir.Model, word: str) -> str:
    """`word1/`, or with the first number that no name begins with."""
    values = {value.name or "" for node in main.graph for value in node.outputs}
    names = {node.name or "" for node in main.graph} | values | set(main.graph.initializers)
    number = 1
    while any(name.startswith(f"{word}{number}/") for name in names):
        number += 1
    return f"{word}{number}/"


def _average(main: ir.Model, index: int, columns: Sequence[ir.Value], shares: Sequence[float], mode: str) -> None:
    """Put the weighted average of `columns` in the place of output `index`."""
    import onnx_ir as ir

    old = main.graph.outputs[index]
    assert old.dtype is not None  # `requires` has seen that it is float
    dtype, kind, name = old.dtype, old.dtype.numpy(), old.name
    prefix = _free_prefix(main, "average")

    def op(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        made = ir.node(kind, list(inputs), attributes or None, name=f"{prefix}{kind}{len(main.graph)}")
        main.graph.append(made)
        made.outputs[0].dtype, made.outputs[0].shape = dtype, old.shape
        return made.outputs[0]

    def constant(value: float, label: str) -> ir.Value:
        tensor = ir.tensor(np.asarray(value, kind), name=f"{prefix}{label}")
        made = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(()), const_value=tensor)
        main.graph.register_initializer(made)
        return made

    scores = [op("Softmax", value, axis=-1) for value in columns] if mode == "softmax" else list(columns)
    parts = [op("Mul", value, constant(share, f"share{i}")) for i, (value, share) in enumerate(zip(scores, shares, strict=True))]
    result = op("Sum", *parts)
    if mode == "softmax":
        result = op("Log", op("Max", result, constant(float(np.finfo(kind).tiny), "least")))
    old.name = f"{prefix}alone"
    result.name = name
    main.graph.outputs[index] = result


def _common_quant(everyone: dict[str, Artifact]) -> tuple[QuantInfo | None, list[str]]:
    """What quantization all share, with every operator that stayed float; None, and a note, when they differ."""
    kinds = {text: replace(item.quant, left_float=()) if item.quant else None for text, item in everyone.items()}
    first = kinds[CURRENT]
    if any(kind != first for kind in kinds.values()):
        return None, [f"quantized differently: {'; '.join(f'{text}: {_quant_text(kind)}' for text, kind in kinds.items())}"]
    if first is None:
        return None, []
    left: list[tuple[str, str]] = []
    for text, item in everyone.items():
        assert item.quant is not None
        left += [(node if text == CURRENT else f"{text}: {node}", reason) for node, reason in item.quant.left_float]
    return replace(first, left_float=tuple(left)), []


def _quant_text(quant: QuantInfo | None) -> str:
    if quant is None:
        return "float"
    facts = asdict(quant)
    return " ".join(f"{key.replace('_', '-')}={facts[key]}" for key in facts if key != "left_float")


def _facts(specs: Sequence[Any]) -> list[Any]:
    """What must be equal; the name of an only one does not matter."""
    return [(spec.name if len(specs) > 1 else "", spec.dtype, spec.shape) for spec in specs]


def _bytes(artifact: Artifact) -> int:
    from deploycc.forms.onnx import weights

    return sum(tensor.nbytes for _, tensor in weights(artifact.model))


def _sizes(everyone: dict[str, Artifact]) -> str:
    return ", ".join(f"{text} {_bytes(item) / 1e6:.3f} MB" for text, item in everyone.items())
