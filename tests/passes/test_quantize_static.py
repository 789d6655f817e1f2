import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import ANY, Arrays
from onnx import TensorProto, helper, numpy_helper

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context, Dataset
from deploycc.core.data import Data
from deploycc.core.target import Hardware, Quant, Target
from deploycc.errors import DataError, DataNeeded, NothingToDo, PreconditionError, UnknownName
from deploycc.forms import onnx as form
from deploycc.passes._dialects import OnnxRuntime
from deploycc.passes._placement import place
from deploycc.passes._qdq import activation_scale, weight_scales
from deploycc.passes.quantize_static import QuantizeStatic


def tensor(name, *shape, scale=1.0):
    rng = np.random.default_rng(zlib.crc32(f"{name} {shape}".encode()))  # the same whatever ran before
    return numpy_helper.from_array((rng.normal(size=shape) * scale).astype(np.float32), name)


def make(nodes, tensors, *, inputs=(("x", (1, 3, 8, 8)),), outputs=("y",), opset=20):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    from onnx import shape_inference

    loaded = ir.from_proto(shape_inference.infer_shapes(model))
    return Artifact(Form.ONNX, loaded, form.signature(loaded), "test")


def residual():
    """Conv → Relu → Conv, + skip, → Relu → pool → flatten → Gemm."""
    return make(
        [
            helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
            helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "conv2", pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["c2", "r1"], ["a"], "add"),
            helper.make_node("Relu", ["a"], ["r2"], "relu2"),
            helper.make_node("GlobalAveragePool", ["r2"], ["p"], "pool"),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
            helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "gemm", transB=1),
        ],
        [
            tensor("w1", 8, 3, 3, 3),
            tensor("b1", 8),
            tensor("w2", 8, 8, 3, 3, scale=0.2),
            tensor("b2", 8),
            tensor("w3", 5, 8),
            tensor("b3", 5),
        ],
    )


def context(artifact, *, samples=24, quant=None, data=None):
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=artifact.signature.inputs[0].shape[1:]).astype(np.float32) for _ in range(samples)] if data is None else data
    target = Target(
        name="t",
        title="t",
        backend="onnxruntime",
        arch="x86_64",
        pipeline="quantize-static",
        hardware=Hardware(requires=("avx512_vnni",)),
        quant=quant or Quant(),
    )
    return Context(target, artifact, Data(None, Dataset("d", {"all": Arrays(arrays)}) if arrays else None), 0, Path())


def outputs(artifact, feeds):
    with form.OnnxForm().open(artifact, threads=1) as session:
        return np.concatenate([session.run(item)["y"] for item in feeds])


def error(before, after, ctx):
    feeds = list(ctx.data.calibration(before))
    reference = outputs(before, feeds)
    return float(np.abs(outputs(after, feeds) - reference).max() / np.abs(reference).max())


# --- placement


def test_placement_takes_the_whole_chain_and_leaves_the_logits_in_float():
    placement = place(residual().model, skip={}, dialect=OnnxRuntime(Quant()))
    assert placement.nodes == ("conv1", "conv2", "add", "pool", "flatten", "gemm")
    assert placement.leaders == {"x": "x", "r1": "r1", "c2": "c2", "r2": "r2", "p": "p", "f": "p"}
    assert placement.left_float == ()


def test_a_symmetric_range_cannot_swallow_a_relu():
    placement = place(residual().model, skip={}, dialect=OnnxRuntime(Quant(activation_symmetric=True)))
    assert "c1" in placement.leaders
    assert "r1" in placement.leaders


def test_a_light_operator_that_no_integer_reads_stays_in_float():
    artifact = make(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
            helper.make_node("Sigmoid", ["c"], ["y"], "sigmoid"),
        ],
        [tensor("w", 4, 3, 1, 1)],
    )
    assert place(artifact.model, skip={}, dialect=OnnxRuntime(Quant())).nodes == ("conv",)


def test_what_stays_in_float_is_named_with_its_reason():
    artifact = make(
        [
            helper.make_node("ConvTranspose", ["x", "w"], ["c"], "up"),
            helper.make_node("MatMul", ["c", "c"], ["m"], "attention"),
            helper.make_node("Gemm", ["g", "v"], ["z"], "scaled", alpha=0.5),
            helper.make_node("Conv", ["m", "u"], ["y"], "conv"),
        ],
        [tensor("w", 3, 3, 1, 1), tensor("u", 4, 3, 1, 1), tensor("v", 4, 5)],
        inputs=(("x", (1, 3, 8, 8)), ("g", (1, 4))),
    )
    left = dict(place(artifact.model, skip={"conv": "left out by skip="}, dialect=OnnxRuntime(Quant())).left_float)
    assert left == {
        "up (ConvTranspose)": "ONNX Runtime has no integer ConvTranspose on the CPU",
        "attention (MatMul)": "both of its inputs are activations",
        "scaled (Gemm)": "alpha, beta or transA is not at its default",
        "conv (Conv)": "left out by skip=",
    }


# --- arithmetic, by hand


def test_activation_scale_by_hand():
    found = activation_scale(-1.0, 3.0, Quant())
    assert float(found.scale) == pytest.approx(4 / 255)
    assert (int(found.zero_point), found.zero_point.dtype) == (64, np.uint8)  # round(1 / (4 / 255)) = 63.75 → 64
    signed = activation_scale(-1.0, 3.0, Quant(activations="int8", activation_symmetric=True))
    assert float(signed.scale) == pytest.approx(3 / 127)
    assert (int(signed.zero_point), signed.zero_point.dtype) == (0, np.int8)
    assert float(activation_scale(0.0, 0.0, Quant()).scale) == 1.0


def test_weight_scales_by_hand():
    weight = np.array([[1.27, 0.0], [0.0, -2.54], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(weight_scales(weight, 0, 127, clip=False), [0.01, 0.02, 1.0], rtol=1e-6)
    np.testing.assert_allclose(weight_scales(weight, None, 127, clip=False), [0.02], rtol=1e-6)


def test_clipping_never_does_worse_than_the_largest_weight():
    weight = np.random.default_rng(0).laplace(size=(16, 200)).astype(np.float32)

    def squared(scales):
        scale = scales[:, None]
        return np.square(np.clip(np.rint(weight / scale), -7, 7) * scale - weight).sum(axis=1)

    clipped, full = squared(weight_scales(weight, 0, 7, clip=True)), squared(weight_scales(weight, 0, 7, clip=False))
    assert (clipped <= full + 1e-6).all()
    assert clipped.sum() < 0.8 * full.sum()


# --- the pass


@pytest.mark.parametrize("calibration", ["minmax", "moving-average", "percentile", "mse", "entropy"])
def test_the_result_is_close_to_float_for_every_calibration(calibration):
    artifact = residual()
    ctx = context(artifact)
    after = QuantizeStatic(calibration=calibration)(artifact, ctx)
    limit = {"moving-average": 0.25, "entropy": 0.25}.get(calibration, 0.05)
    assert 0 < error(artifact, after, ctx) < limit
    assert after.quant.calibration == calibration


@pytest.mark.parametrize(
    "quant",
    [
        Quant(),
        Quant(per_channel=False),
        Quant(activation_symmetric=True),
        Quant(activations="int8", activation_symmetric=True),
        Quant(activations="int8"),
        Quant(reduce_range=True),
        Quant(weights="uint8"),
    ],
)
def test_every_type_the_target_may_ask_for_is_honoured(quant):
    artifact = residual()
    ctx = context(artifact, quant=quant)
    after = QuantizeStatic()(artifact, ctx)
    assert error(artifact, after, ctx) < 0.08
    values = {name: value.const_value.numpy() for name, value in after.model.graph.initializers.items()}
    assert values["x_zero_point"].dtype == np.dtype(quant.activations)
    weight = values["w1_quantized"]
    assert weight.dtype == np.dtype(quant.weights)
    centred = weight.astype(int) - (128 if quant.weights == "uint8" else 0)
    assert np.abs(centred).max() <= (63 if quant.reduce_range else 127)
    assert values["w1_scale"].size == (8 if quant.per_channel else 1)


def test_the_runtime_fuses_every_operator_of_the_placement(tmp_path):
    from deploycc.backends._onnxruntime_graph import coverage

    artifact = residual()
    after = QuantizeStatic()(artifact, context(artifact))
    found = coverage(after.model, after.quant, form.write(after.model, tmp_path))
    assert found.int8_macs == 1.0
    assert found.int8_operators == 3
    assert found.float_operators == ()


def test_a_skipped_operator_stays_in_float_and_coverage_says_so(tmp_path):
    from deploycc.backends._onnxruntime_graph import coverage

    artifact = residual()
    after = QuantizeStatic(skip=("conv2",))(artifact, context(artifact))
    found = coverage(after.model, after.quant, form.write(after.model, tmp_path))
    assert found.int8_operators == 2
    assert [reason for _, reason in found.float_operators] == ["left out by skip="]
    assert 0 < found.int8_macs < 0.5


@pytest.mark.parametrize("shape", [(1, 16), (1, 5, 16), (1, 2, 5, 16)])
def test_the_runtime_multiplies_a_matmul_with_a_bias_in_integers(shape, tmp_path):
    """Left alone, the runtime makes a Gemm of its own from the pair, and runs that in float."""
    from deploycc.backends._onnxruntime_graph import coverage

    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "product"), helper.make_node("Add", ["m", "b"], ["y"], "bias")]
    artifact = make(nodes, [tensor("w", 16, 12), tensor("b", 12)], inputs=(("x", shape),))
    ctx = context(artifact)
    after = QuantizeStatic()(artifact, ctx)
    found = coverage(after.model, after.quant, form.write(after.model, tmp_path))
    assert found.int8_macs == 1.0
    assert found.int8_operators == 1
    assert found.float_operators == ()
    assert error(artifact, after, ctx) < 0.05


def test_coverage_counts_what_the_runtime_fused_in_float(tmp_path):
    from deploycc.backends._onnxruntime_graph import coverage

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "product"),
        helper.make_node("Add", ["m", "b"], ["a"], "bias"),  # float: the runtime makes a Gemm between Reshapes of it
        helper.make_node("MatMul", ["a", "v"], ["y"], "second"),
    ]
    artifact = make(nodes, [tensor("w", 16, 12), tensor("b", 12), tensor("v", 12, 16)], inputs=(("x", (1, 5, 16)),))
    after = QuantizeStatic(skip=("product",))(artifact, context(artifact))
    found = coverage(after.model, after.quant, form.write(after.model, tmp_path))
    assert found.int8_macs == pytest.approx(0.5)
    assert [reason for _, reason in found.float_operators] == ["left out by skip="]


def test_a_large_bias_raises_the_weight_scale_instead_of_overflowing():
    artifact = residual()
    bias = artifact.model.graph.initializers["b1"]
    bias.const_value = ir.tensor(np.full(8, 1e6, np.float32), name="b1")
    weight = artifact.model.graph.initializers["w1"]
    weight.const_value = ir.tensor(np.full((8, 3, 3, 3), 1e-7, np.float32), name="w1")
    ctx = context(artifact)
    after = QuantizeStatic(calibration="minmax")(artifact, ctx)
    values = {name: value.const_value.numpy() for name, value in after.model.graph.initializers.items()}
    stored = values["conv1_bias_quantized"].astype(np.float64) * values["conv1_bias_scale"]
    np.testing.assert_allclose(stored, 1e6, rtol=1e-3)


def test_a_graph_output_made_by_integers_keeps_its_name():
    artifact = make([helper.make_node("Conv", ["x", "w"], ["y"], "conv")], [tensor("w", 4, 3, 1, 1)])
    ctx = context(artifact)
    after = QuantizeStatic()(artifact, ctx)
    assert [value.name for value in after.model.graph.outputs] == ["y"]
    assert form.signature(after.model) == artifact.signature
    assert error(artifact, after, ctx) < 0.05


def test_weights_used_twice_are_stored_once():
    artifact = make(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "one", pads=[1, 1, 1, 1]),
            helper.make_node("Conv", ["c", "w"], ["y"], "two", pads=[1, 1, 1, 1]),
        ],
        [tensor("w", 3, 3, 3, 3, scale=0.2)],
    )
    ctx = context(artifact)
    after = QuantizeStatic()(artifact, ctx)
    assert sum("w_" in name and name.endswith("_quantized") for name in after.model.graph.initializers) == 1
    assert error(artifact, after, ctx) < 0.08


def test_the_same_seed_gives_the_same_bytes_and_the_input_is_untouched():
    artifact = residual()
    digest = artifact.digest()
    ctx = context(artifact)
    assert QuantizeStatic()(artifact, ctx).digest() == QuantizeStatic()(artifact, ctx).digest()
    assert artifact.digest() == digest


def test_alternatives_leave_the_one_that_failed_out():
    assert [item.calibration for item in QuantizeStatic(calibration="mse").alternatives(ANY)] == ["percentile", "output-mse"]


# --- what is refused


@pytest.mark.parametrize(
    ("change", "error_class", "message"),
    [
        (lambda a, c: (make([helper.make_node("Conv", ["x", "w"], ["y"], "conv")], [tensor("w", 4, 3, 1, 1)], opset=11), c), PreconditionError, "has 11"),
        (lambda a, c: (a, replace(c, target=c.target.model_copy(update={"quant": Quant(activations="none")}))), PreconditionError, "no integer activations"),
        (lambda a, c: (QuantizeStatic()(a, c), c), PreconditionError, "quantized already"),
        (lambda a, c: (a, context(a, data=[])), DataNeeded, "calibration data"),
        (lambda a, c: (make([helper.make_node("Relu", ["x"], ["y"], "relu")], []), c), NothingToDo, "no Conv, Gemm or MatMul"),
        (lambda a, c: (a, context(a, data=[np.full((3, 8, 8), np.inf, np.float32)])), DataError, "sample 1 of 1 makes tensor 'x' NaN or Inf"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change, error_class, message):
    artifact, ctx = change(residual(), context(residual()))
    with pytest.raises(error_class, match=message) as caught:
        QuantizeStatic()(artifact, ctx)
    assert caught.value.fix


def test_a_skip_that_names_nothing_is_refused():
    artifact = residual()
    with pytest.raises(UnknownName, match="no operator 'conv9'"):
        QuantizeStatic(skip=("conv9",))(artifact, context(artifact))


def test_an_impossible_percentile_is_refused():
    with pytest.raises(ValueError, match="over 50"):
        QuantizeStatic(percentile=40)
