"""Constraints that several runtimes share."""

from __future__ import annotations

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Violation
from deploycc.core.target import Target


def eight_bits(artifact: Artifact, target: Target) -> list[Violation]:
    """This runtime's CPU kernels multiply 8-bit integers only.

    Set quant.activations to uint8 or int8 in the target.
    """
    kind = target.quant.activations
    return [Violation(f"target {target.name}", f"quant.activations = {kind}")] if kind == "int16" else []


def processor_only(artifact: Artifact, target: Target) -> list[Violation]:
    """Execution providers are ONNX Runtime's.

    Leave runtime.provider out of the target, or use one whose backend is onnxruntime.
    """
    provider = target.runtime.provider
    return [] if provider == "cpu" else [Violation(f"target {target.name}", f"runtime.provider = {provider}")]


def float32_only(artifact: Artifact, target: Target) -> list[Violation]:
    """This runtime computes float operators in float32 on a CPU.

    Leave runtime.precision out of the target, or use one whose backend is openvino, or a GPU.
    """
    precision = "f32" if target.runtime.provider == "cuda" else target.runtime.precision
    return [] if precision == "f32" else [Violation(f"target {target.name}", f"runtime.precision = {precision}")]
