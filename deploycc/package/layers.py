"""What a manifest keeps of every layer of what ships (version 1): how far it is from float, and what it costs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class LayerRecord(BaseModel):
    """One tensor that the float graph has too, and the operators since the tensors before it.

    Attributes:
        tensor: its name.
        operator: name and kind of what gives it; "input" for an input of the graph.
        sqnr_db: against float.
        added: noise that came in there, over the tensor's energy.
        kernel_db: against the exact arithmetic of the same file.
        integer: whether it is one of integers.
        macs: of those operators; None where they cannot be counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    tensor: str
    operator: str
    sqnr_db: float
    added: float
    kernel_db: float
    integer: bool
    macs: int | None


class Layers(BaseModel):
    """All layers of a quantized graph.

    Attributes:
        version: of this record.
        samples: calls that both graphs were run on.
        kernels: whose they were: ONNX Runtime's, whatever the artifact ships in.
        layers: in the graph's order.
        note: why there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    samples: int
    kernels: str = "ONNX Runtime"
    layers: tuple[LayerRecord, ...]
    note: str = ""
