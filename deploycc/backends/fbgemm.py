"""PyTorch with FBGEMM, its integer engine for x86."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from deploycc.backends._torchscript import TorchScriptBackend
from deploycc.core.artifact import Artifact
from deploycc.core.contract import Constraint, Violation
from deploycc.core.target import Target

WIDE = frozenset({"avx512_vnni", "amx_int8"})  # FBGEMM has no kernels for AVX-VNNI without AVX-512


class Fbgemm(TorchScriptBackend):
    """PyTorch, FBGEMM engine: TorchScript on x86 CPUs with AVX2 or later."""

    name: ClassVar[str] = "fbgemm"
    float_runtime: ClassVar[dict[str, str]] = {"optimize": "load"}  # weights packed for this CPU: 10 to 40 % faster convolutions

    def constraints(self) -> Sequence[Constraint]:
        """Engine, shapes, saturation."""
        return (*super().constraints(), cannot_saturate)


def cannot_saturate(artifact: Artifact, target: Target) -> list[Violation]:
    """FBGEMM adds u8×s8 products in pairs in int16, which saturates with 8-bit weights, unless the CPU has AVX512-VNNI.

    Set reduce_range = true in the target's [quant], or requires = ["avx512_vnni"] in its [hardware].
    """
    if artifact.quant is None or artifact.quant.reduce_range or WIDE & set(target.hardware.requires):
        return []
    needs = ", ".join(target.hardware.requires) or "no CPU feature"
    return [Violation("the target", f"it requires {needs}, and the weights use all 8 bits")]
