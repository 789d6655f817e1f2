import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import context, digest, graph, kinds, module_artifact, needs_wide_products, onnx_artifact, outputs
from torch import nn

from deploycc.core.artifact import Artifact, QuantInfo
from deploycc.core.compare import drift
from deploycc.errors import NothingToDo, PreconditionError, UnknownName
from deploycc.forms import onnx as form
from deploycc.passes.export_onnx import ExportOnnx
from deploycc.passes.quantize_dynamic import QuantizeDynamic
from deploycc.runtime.signature import TensorSpec

RNG = np.random.default_rng(0)
MLP = """(float[N,16] x) => (float[N,10] y) {
    a = MatMul(x, w) b = Add(a, v) c = Relu(b) y = Gemm<transB=1>(c, u, t) }"""
WEIGHTS = {
    "w": RNG.standard_normal((16, 32)).astype(np.float32),
    "v": RNG.standard_normal(32).astype(np.float32),
    "u": RNG.standard_normal((10, 32)).astype(np.float32),
    "t": RNG.standard_normal(10).astype(np.float32),
}
FEEDS = {"x": RNG.standard_normal((64, 16)).astype(np.float32)}


def mlp() -> Artifact:
    model = graph(MLP, **WEIGHTS)
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
    return onnx_artifact(model)


def fused(artifact: Artifact) -> Counter[str]:
    """Operators of ONNX Runtime's optimized graph."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(str(form.write(artifact.model, Path(folder))), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in form.read(Path(options.optimized_model_filepath)).graph)


@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("reduce_range", [True, pytest.param(False, marks=needs_wide_products)])
def test_an_mlp_follows_the_target(weights: str, per_channel: bool, reduce_range: bool):
    artifact = mlp()
    before = digest(artifact)
    quant = {"weights": weights, "per_channel": per_channel, "reduce_range": reduce_range}
    where = context(artifact, arch="aarch64", quant=quant)
    result = QuantizeDynamic()(artifact, where)
    assert digest(artifact) == before
    assert drift([outputs(artifact, FEEDS)], [outputs(result, FEEDS)]).sqnr_db > (26 if reduce_range else 30)
    assert result.quant == QuantInfo("dynamic", weights, "uint8", per_channel, reduce_range, "none", ())
    assert result.signature == artifact.signature
    stored = result.model.graph.initializers["w_quantized"].const_value.numpy()
    assert stored.dtype == weights
    assert np.abs(stored.astype(int) - (128 if weights == "uint8" else 0)).max() == (63 if reduce_range else 127)
    assert result.model.graph.initializers["w_scale"].const_value.shape == ((32,) if per_channel else ())


def test_the_arithmetic_by_hand():
    # x = [0, 255·0.1]: scale 0.1, zero point 0, codes 0 and 255; w = [1, 1.27]: scale 0.01, codes 100 and 127: y = 25.5 · 1.27
    artifact = onnx_artifact(graph("(float[1,2] x) => (float[1,1] y) { y = MatMul(x, w) }", w=np.array([[1.0], [1.27]], np.float32)))
    result = QuantizeDynamic()(artifact, context(artifact, arch="aarch64", quant={"reduce_range": False}))
    np.testing.assert_allclose(outputs(result, {"x": np.array([[0.0, 25.5]], np.float32)})["y"], [[32.385]], rtol=1e-6)


def test_onnx_runtime_fuses_all_of_it():
    artifact = mlp()
    found = fused(QuantizeDynamic()(artifact, context(artifact)))
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 2
    assert not {"MatMulInteger", "Cast", "Mul", "MatMul", "Gemm"} & set(found)


def test_a_tensor_is_quantized_once_for_all_its_readers():
    body = "(float[2,16] x) => (float[2,32] y) { a = MatMul(x, w) b = MatMul(x, z) y = Sub(a, b) }"
    artifact = onnx_artifact(graph(body, w=WEIGHTS["w"], z=WEIGHTS["w"] * 2))
    result = QuantizeDynamic()(artifact, context(artifact))
    assert Counter(kinds(result))["DynamicQuantizeLinear"] == 1
    assert fused(result)["MatMulIntegerToFloat"] == 2


def test_a_weight_is_stored_once_for_all_its_readers():
    body = "(float[2,16] x) => (float[2,16] y) { a = MatMul(x, s) y = MatMul(a, s) }"
    artifact = onnx_artifact(graph(body, s=WEIGHTS["w"][:, :16]))
    result = QuantizeDynamic()(artifact, context(artifact))
    assert list(result.model.graph.initializers) == ["s_quantized", "s_scale", "s_zero_point"]


class Encoder(nn.Module):
    """A small transformer with a token table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(500, 32)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.table(ids)).mean(1))


@pytest.fixture(scope="module")
def encoder() -> Artifact:
    torch.manual_seed(0)
    module = module_artifact(Encoder(), TensorSpec("ids", "int64", ("N", 12)))
    return ExportOnnx()(module, context(module))


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_transformer(encoder: Artifact, embeddings: bool):
    result = QuantizeDynamic(embeddings=embeddings)(encoder, context(encoder))
    feeds = {"ids": RNG.integers(0, 500, (4, 12))}
    assert drift([outputs(encoder, feeds)], [outputs(result, feeds)]).sqnr_db > 25
    assert result.quant is not None
    assert [reason for _, reason in result.quant.left_float] == ["both of its inputs are activations, or its weights are computed"] * 2
    found = fused(result)
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 5
    assert ("table.weight" in result.model.graph.initializers) is not embeddings
    assert any("embedding tables" in note for note in result.notes) is embeddings


def test_skip_leaves_an_operator_in_float():
    artifact = mlp()
    result = QuantizeDynamic(skip=("n0",))(artifact, context(artifact))
    assert Counter(kinds(result))["MatMul"] == 1
    assert result.quant is not None
    assert result.quant.left_float == (("n0 (MatMul)", "left out by skip="),)
    assert "left in float: n0 (MatMul): left out by skip=" in result.notes


def test_what_stays_in_float_is_said():
    body = """(float[5,2,16] x) => (float[5,2,32] y, float[5,1,2,4] h, float[5,2,16] c) {
        h = GRU<hidden_size=4>(x, gw, gr) a = MatMul(x, w) y = Add(a, v) c = Conv(x, k) }"""
    weights = {"w": WEIGHTS["w"], "v": WEIGHTS["v"], "gw": np.ones((1, 12, 16), np.float32), "gr": np.ones((1, 12, 4), np.float32)}
    artifact = onnx_artifact(graph(body, **weights, k=np.ones((2, 2, 1), np.float32)))
    result = QuantizeDynamic()(artifact, context(artifact))
    assert result.quant is not None
    assert [reason for _, reason in result.quant.left_float] == ["ONNX Runtime has no integer GRU", "convolutions need quantize-static"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("(float[2,16] x) => (float[2,16] y) { y = Relu(x) }", "it has no MatMul, Gemm or LSTM"),
        ("(float[2,16] x, float[16,3] z) => (float[2,3] y) { y = MatMul(x, z) }", "both of its inputs are activations"),
        ("(float[2,16] x) => (float[1,2,32] y) { y = MatMul(x, w3) }", "with 3 axes"),
        ("(float[2,16] x) => (float[2,32] y) { y = Gemm<alpha=2.0>(x, w) }", "alpha, beta or transA"),
        ("(float[5,2,16] x, float[1,16,16] lw) => (float[5,1,2,4] y) { y = LSTM<hidden_size=4>(x, lw, lr) }", "weights are computed"),
        ("(float[2,5,16] x) => (float[2,5,1,4] y) { y = LSTM<hidden_size=4, layout=1>(x, lv, lr) }", "the sequence before the batch"),
        ("(float[5,2,16] x) => (float[5,1,2,4] y) { y = LSTM(x, lv, lr) }", "it does not say its hidden_size"),
    ],
)
def test_nothing_to_quantize(body: str, why: str):
    lstm = {"lv": np.ones((1, 16, 16), np.float32), "lr": np.ones((1, 16, 4), np.float32)}
    artifact = onnx_artifact(graph(body, w=WEIGHTS["w"], w3=WEIGHTS["w"][None], **lstm))
    with pytest.raises(NothingToDo, match=why):
        QuantizeDynamic()(artifact, context(artifact))


def test_a_convolutional_net_is_refused():
    body = "(float[1,3,8,8] x) => (float[1,10] y) { a = Conv(x, w) b = GlobalAveragePool(a) c = Flatten(b) y = Gemm(c, u) }"
    weights = {"w": np.ones((4, 3, 3, 3), np.float32), "u": np.ones((4, 10), np.float32)}
    artifact = onnx_artifact(graph(body, **weights))
    with pytest.raises(PreconditionError, match="99% of the model's work is in convolutions"):
        QuantizeDynamic()(artifact, context(artifact))


def test_an_old_opset_is_refused():
    artifact = onnx_artifact(graph("(float[2,16] x) => (float[2,32] y) { y = MatMul(x, w) }", opset=9, w=WEIGHTS["w"]))
    with pytest.raises(PreconditionError, match="needs opset 11 or newer") as caught:
        QuantizeDynamic()(artifact, context(artifact))
    assert "update-opset" in caught.value.fix


def test_a_quantized_model_is_refused():
    artifact = mlp()
    result = QuantizeDynamic()(artifact, context(artifact))
    with pytest.raises(PreconditionError, match="quantized already"):
        QuantizeDynamic()(result, context(artifact))


def test_skip_names_an_operator_that_is_not_there():
    artifact = mlp()
    with pytest.raises(UnknownName, match="no operator 'nn0'") as caught:
        QuantizeDynamic(skip=("nn0",))(artifact, context(artifact))
    assert "did you mean" in caught.value.fix


def test_embeddings_without_a_table_is_said():
    note = "embeddings=true: the graph has no table of a Gather that is worth storing in int8"
    artifact = mlp()
    assert note in QuantizeDynamic(embeddings=True)(artifact, context(artifact)).notes
    assert note not in QuantizeDynamic()(artifact, context(artifact)).notes
