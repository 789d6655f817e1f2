"""Where a quantized graph parts from the float one: the tensors that are read, the noise that comes in, the kernels' own part."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from graphs import SATURATES, graph, onnx_artifact

sys.path.insert(0, str(Path(__file__).parent / "passes"))
from test_quantize_static import context as calibrated
from test_quantize_static import residual

from deploycc.core.target import Quant
from deploycc.debug import Debugged, Stage, Tensor, compare, debug
from deploycc.errors import UnsupportedError
from deploycc.forms._taps import Tap, tapped, taps
from deploycc.forms.onnx import clone
from deploycc.passes.quantize_static import QuantizeStatic
from deploycc.render_graph import debugged, debugged_json
from deploycc.runtime import bundle as bundles

SEVEN_BITS = Quant(reduce_range=True)  # no kernel saturates


@pytest.fixture(scope="module")
def pair():
    """A float graph, the same in integers, and calls."""
    artifact = residual()
    ctx = calibrated(artifact, quant=SEVEN_BITS)
    return artifact.model, QuantizeStatic()(artifact, ctx).model, list(ctx.data.calibration(artifact))


def named(tensors):
    return {tensor.name: tensor for tensor in tensors}


# --- where tensors are read


def test_integers_are_read_behind_their_quantizer_and_folded_tensors_not_at_all(pair):
    float_model, model, _ = pair
    known = frozenset(value.name for node in float_model.graph for value in node.outputs) | {"x"}
    found = taps(model, known)
    assert [tap.name for tap in found if tap.scale is not None] == ["x", "r1", "c2", "r2", "p", "f"]
    assert [tap.name for tap in found if tap.scale is None] == ["y"]  # the logits; c1 and a are folded into kernels
    assert all(tap.source == f"{tap.name}_quantized" for tap in found if tap.scale is not None)


def test_read_integers_are_the_values_that_they_stand_for(pair):
    _, model, feeds = pair
    (tap,) = (item for item in taps(model, frozenset({"x"})) if item.name == "x")
    (read,) = tapped(model, [tap.source])(feeds[0])
    assert read.dtype == np.uint8
    assert np.abs(tap.value(read) - np.clip(feeds[0]["x"], -128 * tap.scale * 2, None)).max() <= tap.scale * 0.51
    assert Tap("t", "t").value(np.array([1.5], np.float32)) == 1.5


def test_reading_does_not_take_the_integer_kernels_apart(pair):
    float_model, model, feeds = pair
    _, _, notes = compare(float_model, model, feeds[:2])
    assert notes == ()


def test_a_quantizer_of_many_scales_is_not_read():
    model = graph(
        "(float[2,3] x) => (float[2,3] y) { q = QuantizeLinear <axis = 0> (x, s, z) y = DequantizeLinear <axis = 0> (q, s, z) }",
        s=np.array([0.1, 0.2], np.float32),
        z=np.zeros(2, np.uint8),
    )
    assert [tap.name for tap in taps(model, frozenset({"x", "y"}))] == ["y"]


# --- what is found


def test_noise_of_a_chain_by_hand():
    """y = 2·relu(x) in float; the other graph takes 0.1 from relu's result, and nothing else is wrong."""
    float_model = graph("(float[1,2] x) => (float[1,2] y) { r = Relu (x) y = Mul (r, w) }", w=np.array([2.0], np.float32))
    other = graph(
        "(float[1,2] x) => (float[1,2] y) { t = Relu (x) r = Sub (t, d) y = Mul (r, w) }",
        w=np.array([2.0], np.float32),
        d=np.array([0.1], np.float32),
    )
    tensors, outputs_db, _ = compare(float_model, other, [{"x": np.array([[1.0, 3.0]], np.float32)}])
    found = named(tensors)
    assert list(found) == ["r", "y"]
    assert found["r"].sqnr_db == pytest.approx(10 * math.log10(10 / 0.02), abs=1e-3)
    assert found["r"].added == pytest.approx(0.02 / 10, rel=1e-4)
    assert found["y"].added == pytest.approx(0.0, abs=1e-6)
    assert found["r"].operator.endswith("(Relu)")
    assert outputs_db == pytest.approx(found["r"].sqnr_db, abs=1e-3)
    assert found["r"].kernel_db == math.inf


def test_the_tensor_where_something_broke_is_the_first_that_diverges(pair):
    float_model, model, feeds = pair
    whole = named(compare(float_model, model, feeds)[0])
    assert min(tensor.sqnr_db for tensor in whole.values()) > 15
    broken = clone(model)
    (scale,) = (value for name, value in broken.graph.initializers.items() if name == "w2_scale")
    scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(9), name=scale.name)
    tensors, outputs_db, _ = compare(float_model, broken, feeds)
    found = Debugged("b", "m", len(feeds), (), tensors, outputs_db, 10.0, ())
    assert found.first is not None
    assert found.first.name == "c2"
    assert found.first.operator == "conv2 (Conv)"
    assert found.worst[0].name == "c2"
    assert outputs_db < 10
    assert named(tensors)["r1"].sqnr_db == pytest.approx(whole["r1"].sqnr_db)


def test_a_saturating_kernel_shows_as_the_runtimes_doing(pair):
    """The same file in exact arithmetic: on a CPU without VNNI, full-range weights are lost in the kernel and nowhere else."""
    artifact = onnx_artifact(
        graph(
            "(float[1,64] x) => (float[1,64] z) { y = MatMul (x, w) r = Relu (y) z = MatMul (r, v) }",
            w=np.full((64, 64), 1.0, np.float32),
            v=np.eye(64, dtype=np.float32),
        )
    )
    ctx = calibrated(artifact, data=[np.full(64, 1.0, np.float32)] * 4)
    model = QuantizeStatic()(artifact, ctx).model
    (tensor,) = (item for item in compare(artifact.model, model, list(ctx.data.calibration(artifact)))[0] if item.name == "r")
    if SATURATES:
        assert tensor.kernel_db < 15
        assert tensor.sqnr_db == pytest.approx(tensor.kernel_db, abs=1)
    else:
        assert tensor.kernel_db > 40


def test_a_runtime_whose_tensors_cannot_be_read_is_refused(monkeypatch):
    loaded = SimpleNamespace(manifest={"runtime": {"session": "torchscript", "package": "torch"}})
    monkeypatch.setattr(bundles, "load", lambda folder: loaded)
    with pytest.raises(UnsupportedError, match="there runs in torch, whose tensors cannot be read"):
        debug(Path("there"), model=None, data=None)


# --- what is shown


FOUND = Debugged(
    "bundle", "net.py:make", 8, (Stage("export-onnx", math.inf), Stage("quantize-static", 24.0), Stage("other", None)),
    (Tensor("a", "conv (Conv)", 9.0, 0.1, 30.0, True), Tensor("b", "add (Add)", math.inf, 0.0, math.inf, False)), 9.5, 10.0, ("busy",),
)  # fmt: skip


def test_the_text_names_the_first_and_the_worst():
    text = debugged(FOUND, every=False)
    assert "bundle against net.py:make in float, 8 samples: outputs 9.5 dB" in text
    assert "export-onnx equal, quantize-static 24.0, other not measured" in text
    assert "first tensor under 10 dB: a, 9.0 dB, made by conv (Conv)" in text
    assert "note: busy" in text
    assert "9.0      10.000 %     30.0       int8   a       conv (Conv)" in text
    assert "every tensor, in the graph's order" in debugged(FOUND, every=True)
    healthy = Debugged("b", "m", 1, (), FOUND.tensors[1:], math.inf, 10.0, ())
    assert "no tensor is under 10 dB" in debugged(healthy, every=False)


def test_the_document_has_no_infinity():
    document = debugged_json(FOUND)
    assert document["stages"][0]["sqnr_db"] == "inf"
    assert document["first"]["name"] == "a"
    assert document["tensors"][1]["kernel_db"] == "inf"


def test_an_artifact_without_integers_is_equal_everywhere():
    artifact = residual()
    tensors, outputs_db, _ = compare(artifact.model, clone(artifact.model), list(calibrated(artifact).data.calibration(artifact))[:1])
    assert outputs_db > 100
    assert all(tensor.added < 1e-6 for tensor in tensors)
