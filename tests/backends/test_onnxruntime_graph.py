"""The graph that ONNX Runtime computes: kernels, their precision, and what is left over between them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "passes"))
from test_quantize_static import context, residual

from deploycc.backends._onnxruntime_graph import coverage, kernels
from deploycc.core.target import Quant
from deploycc.forms import onnx as form
from deploycc.passes.quantize_static import QuantizeStatic
from deploycc.render_graph import inspection


def built(folder, **options):
    artifact = residual()
    after = QuantizeStatic(**options)(artifact, context(artifact, quant=Quant(reduce_range=True)))
    return after, form.write(after.model, folder)


def test_every_kernel_with_its_precision_and_macs(tmp_path):
    after, path = built(tmp_path)
    found = {kernel.name: kernel for kernel in kernels(after.model, path)}
    assert [(kernel.operator, kernel.precision) for kernel in found.values()] == [
        ("QuantizeLinear", "conversion"),
        ("QLinearConv", "int8"),
        ("QLinearConv", "int8"),
        ("QLinearAdd", "int8"),
        ("QLinearGlobalAveragePool", "int8"),
        ("Flatten", "int8"),
        ("QGemm", "int8"),
    ]
    assert found["conv1"].macs == 8 * 8 * 8 * 3 * 9
    assert found["gemm"].macs == 8 * 5
    assert found["flatten"].macs is None
    assert coverage(after.model, after.quant, path).conversions == 1


def test_an_operator_in_float_between_integers_shows_what_it_costs(tmp_path):
    after, path = built(tmp_path, skip=("conv2",))
    found = kernels(after.model, path)
    assert [kernel.operator for kernel in found if kernel.precision == "float" and kernel.macs] != []
    facts = coverage(after.model, after.quant, path)
    assert facts.conversions == sum(kernel.precision == "conversion" for kernel in found)
    assert facts.conversions > 1
    assert 0 < facts.int8_macs < 1


@pytest.mark.parametrize(
    ("every", "lines"),
    [
        (False, ["int8        75.0 %  QLinearConv 2, Reshape 1", "float       25.0 %  Conv 1", "conversion  –       QuantizeLinear 1"]),
        (True, ["int8        25.0 %  QLinearConv     a", "conversion  –       QuantizeLinear  q", "int8        –       Reshape         r"]),
    ],
)
def test_the_text_sums_by_precision_or_lists_everything(every, lines):
    table = [
        ("q", "QuantizeLinear", "conversion", None), ("a", "QLinearConv", "int8", 100), ("b", "QLinearConv", "int8", 200),
        ("r", "Reshape", "int8", None), ("c", "Conv", "float", 100),
    ]  # fmt: skip
    found = {
        "kind": "onnx", "name": "net.onnx", "signature": {"inputs": [], "outputs": []}, "bytes": 10, "parameters": 3, "macs": 400,
        "operators": {"Conv": 3}, "notices": [], "coverage": {"int8_macs": 0.75, "int8_operators": 2, "float_operators": []},
        "graph_of": "the runtime's own graph",
        "kernels": [dict(zip(("name", "operator", "precision", "macs"), row, strict=True)) for row in table],
    }  # fmt: skip
    text = inspection(found, every=every)
    for line in lines:
        assert line in text
    assert ("--kernels" in text) is not every
    assert "the runtime's own graph" not in inspection({**found, "kernels": None})
