"""What passes that quantize activations at run time refuse: models whose work is in convolutions, which they leave in float."""

from __future__ import annotations

from deploycc.errors import PreconditionError

CONVOLUTION_SHARE = 0.5  # of the MACs: above it, what such a pass can reach is not worth an int8 artifact


def refuse_convolutions(share: float, instead: str) -> None:
    """Raises PreconditionError where `share` of the MACs, 0 to 1, is too much; `instead` is the pass to use."""
    if share > CONVOLUTION_SHARE:
        raise PreconditionError(
            f"{share:.0%} of the model's work is in convolutions, which dynamic quantization leaves in float",
            fix=f"use {instead} with --calibration DATA",
        )
