"""Small ONNX graphs from text, artifacts of them, and a context to run passes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploycc.core import target
from deploycc.core.artifact import Artifact, Form, Outputs
from deploycc.core.contract import Context, Sample
from deploycc.core.data import Data
from deploycc.core.registry import FORMS
from deploycc.forms import onnx as form
from deploycc.forms.module import capture_signature, example_feeds
from deploycc.runtime.machine import cpu_arch, cpu_flags
from deploycc.runtime.signature import TensorSpec


def graph(body: str, *, opset: int = 20, **weights: np.ndarray) -> Any:
    """`(float[1,3] x) => (float[1,2] y) { y = MatMul (x, w) }` with the initializers `weights`, as onnx_ir.Model."""
    import onnx
    import onnx_ir as ir

    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> main {body}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items())
    return ir.from_proto(proto)


def onnx_artifact(model: Any, **fields: Any) -> Artifact:
    """An artifact of an ONNX graph."""
    return Artifact(Form.ONNX, model, form.signature(model), "test.onnx", **fields)


def module_artifact(module: Any, *specs: TensorSpec, **fields: Any) -> Artifact:
    """An artifact of a torch module."""
    return Artifact(Form.MODULE, module.eval(), capture_signature(module.eval(), specs), "test", **fields)


# On this CPU u8×s8 products are added in pairs in int16: kernels of full-range weights do not give what they should.
SATURATES = cpu_arch() == "x86_64" and not target.WIDE_DOT_PRODUCTS & cpu_flags()
needs_wide_products = pytest.mark.skipif(SATURATES, reason="this CPU saturates 8-bit products, and the test is of full-range weights")

FACTS = {"name": "test", "title": "A target for tests", "backend": "onnxruntime", "arch": "any", "pipeline": ""}
ANY = target.Target.model_validate({**FACTS, "arch": "aarch64"})  # full range, min-max calibration


def context(artifact: Artifact, **tables: Any) -> Context:
    """Without data; `runtime=` and `quant=` replace what the target says."""
    made = target.Target.model_validate({**FACTS, "quant": {"reduce_range": True}, **tables})
    return Context(made, artifact, Data(None), seed=0, workdir=Path())


class Arrays:
    """Samples of one input, `x`, that carry no labels."""

    def __init__(self, arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Sample:
        return Sample({"x": self.arrays[index]}, None, f"sample {index}")

    def label(self, index: int) -> None:
        return None

    def digest(self, index: int) -> str:
        return str(index)


def outputs(artifact: Artifact, feeds: dict[str, np.ndarray] | None = None) -> Outputs:
    """What an artifact gives for `feeds`, or for random ones."""
    with FORMS.get(artifact.form.value).open(artifact, threads=1) as session:
        return session.run(feeds if feeds is not None else example_feeds(artifact.signature))


def kinds(artifact: Artifact) -> list[str]:
    """Operator types in graph order."""
    return [node.op_type for node in artifact.model.graph]


def digest(artifact: Artifact) -> str:
    """Of the model alone."""
    return FORMS.get(artifact.form.value).digest(artifact.model)
