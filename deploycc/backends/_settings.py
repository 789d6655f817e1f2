"""Constraints that several runtimes share, and the CPU flags they are about."""

from __future__ import annotations

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Violation
from deploycc.core.target import Target

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
F16_FLAGS = frozenset({"avx512_fp16", "amx_fp16"})


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

    Leave runtime.precision out of the target, or use one whose backend is openvino or inductor, or a GPU.
    """
    precision = "f32" if target.runtime.provider == "cuda" else target.runtime.precision
    return [] if precision == "f32" else [Violation(f"target {target.name}", f"runtime.precision = {precision}")]


def latency_only(artifact: Artifact, target: Target) -> list[Violation]:
    """This runtime computes the samples of a call together, on all threads.

    Leave runtime.hint out of the target, or use one whose backend is openvino.
    """
    hint = target.runtime.hint
    return [] if hint == "latency" else [Violation(f"target {target.name}", f"runtime.hint = {hint}")]


def precision_in_hardware(artifact: Artifact, target: Target) -> list[Violation]:
    """A 16-bit precision needs a CPU that computes in it; elsewhere a runtime would use float32, or emulate it, and say nothing.

    Put avx512_bf16 or amx_bf16 (for f16: avx512_fp16 or amx_fp16) in [hardware] requires, or set runtime.precision = "f32".
    """
    wanted = {"bf16": BF16_FLAGS, "f16": F16_FLAGS}.get(target.runtime.precision)
    if wanted is None or wanted & set(target.hardware.requires):
        return []
    return [
        Violation(f"target {target.name}", f"runtime.precision = {target.runtime.precision} requires none of {', '.join(sorted(wanted))}")
    ]
