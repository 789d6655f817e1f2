"""A constraint that several runtimes share."""

from __future__ import annotations

from deploycc.core.artifact import Artifact
from deploycc.core.contract import Violation
from deploycc.core.target import Target


def float32_only(artifact: Artifact, target: Target) -> list[Violation]:
    """This runtime computes float operators in float32.

    Leave runtime.precision out of the target, or use one whose backend is openvino.
    """
    precision = target.runtime.precision
    return [] if precision == "f32" else [Violation(f"target {target.name}", f"runtime.precision = {precision}")]
