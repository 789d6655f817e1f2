"""What a target of TensorRT may ask for, and what its version of the parser reads: rules beside those of the graph (`_tensorrt_rules`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deploycc.backends import _tensorrt_rules as rules
from deploycc.backends._settings import processor_only
from deploycc.core.artifact import Artifact
from deploycc.core.contract import Constraint, Violation
from deploycc.core.target import Target
from deploycc.runtime import cuda
from deploycc.runtime.host import version_numbers

OLDEST = "10.12"
TYPED = (10,)  # the first version whose networks are strongly typed
# What the parsers of TensorRT 8.5 and 8.6 have no importer for, of the operators that later ones take (onnx-tensorrt, 8.5-GA, 8.6-GA).
SINCE_9 = frozenset({"Attention", "CastLike", "Gelu", "Hardmax", "Mish", "RMSNormalization", "RotaryEmbedding", "STFT", "Swish"})
SINCE_8_6 = frozenset({"GroupNormalization", "IsInf", "LayerNormalization"})
LEAST_CAPABILITY: Mapping[str, str] = {"f16": "5.3", "bf16": "8.0"}


def is_version_8(target: Target) -> bool:
    """Whether the device's TensorRT is 8.5 or 8.6."""
    return version_numbers(target.runtime.minimum or OLDEST) < TYPED


def symmetric_int8(artifact: Artifact, target: Target) -> list[Violation]:
    """TensorRT's integers are symmetric int8, placed by its own rules.

    Set placement = "tensorrt", activations = weights = "int8" and activation_symmetric = true in the target's [quant].
    """
    placement = target.quant.placement
    return [] if placement == "tensorrt" else [Violation(f"target {target.name}", f"quant.placement = {placement}")]


def precision_in_hardware(artifact: Artifact, target: Target) -> list[Violation]:
    """A 16-bit precision needs a GPU that computes in it: f16 compute capability 5.3, bf16 8.0; and bf16 needs TensorRT 10.

    Set [hardware] compute_capability in the target to what the GPU has, or another runtime.precision.
    """
    precision, capability = target.runtime.precision, target.hardware.compute_capability or "0.0"
    found: list[Violation] = []
    least = LEAST_CAPABILITY.get(precision, "0.0")
    if cuda.capability_numbers(capability) < cuda.capability_numbers(least):
        found.append(Violation(f"target {target.name}", f"runtime.precision = {precision} on compute capability {capability}"))
    if precision == "bf16" and is_version_8(target):
        found.append(Violation(f"target {target.name}", f"runtime.precision = bf16 with TensorRT {target.runtime.minimum}"))
    return found


def axes_have_sizes(artifact: Artifact, target: Target) -> list[Violation]:
    """Every named axis of an input has a least, a most likely and a largest size, for which the engine is built.

    Write them into the target ([engine.axes] N = [1, 8, 32]), or give the axis a number: --input NAME:1x3x224x224.
    """
    found: list[Violation] = []
    for spec in artifact.signature.inputs:
        free = [dim for dim in spec.shape if isinstance(dim, str) and dim not in target.engine.axes]
        found += [Violation(f"input {spec.name}", f"axis {dim} of {spec} has no sizes") for dim in dict.fromkeys(free)]
    return found


def no_branches_in_sixteen_bits(artifact: Artifact, target: Target) -> list[Violation]:
    """A graph with branches, loops or functions is computed in float32.

    Set runtime.precision = "f32" in the target.
    """
    from deploycc.forms.onnx import graphs

    if target.runtime.precision == "f32" or is_version_8(target) or len(list(graphs(artifact.model))) == 1:
        return []
    inner = [node for node in artifact.model.graph if any(item.type.name.startswith("GRAPH") for item in node.attributes.values())]
    return [Violation(f"{node.name} ({node.op_type})", "holds a graph") for node in inner] or [Violation("the model", "holds functions")]


def read_by_version_8(artifact: Artifact, target: Target) -> list[Violation]:
    """TensorRT 8.5 and 8.6 read opset 17 at most, and lack operators that came later (8.5: LayerNormalization too).

    Set runtime.opset = 17 in the target; export the operator that it names as the simpler ones that it consists of.
    """
    if not is_version_8(target):
        return []
    found = [Violation(f"target {target.name}", f"runtime.opset = {target.runtime.opset}")] if target.runtime.opset > 17 else []
    lacking = SINCE_9 | (SINCE_8_6 if version_numbers(target.runtime.minimum or "") < (8, 6) else frozenset())
    return [*found, *(Violation(f"{node.name} ({node.op_type})", "not read") for node in rules.nodes(artifact) if node.op_type in lacking)]


def opset_will_be_read(artifact: Artifact, target: Target) -> list[Violation]:
    """The graph's opset is one that the device's parser reads, once the passes are through: 13 to the target's runtime.opset.

    Put update-opset in the pipeline, or export the model with that opset.
    """
    return list(rules.opset_is_read(artifact, target)) if artifact.history else []


RULES: Sequence[Constraint] = (
    processor_only,
    symmetric_int8,
    precision_in_hardware,
    axes_have_sizes,
    no_branches_in_sixteen_bits,
    read_by_version_8,
    opset_will_be_read,
)
