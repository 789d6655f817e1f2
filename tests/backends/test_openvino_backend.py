"""OpenVINO: what is written, which kernels compute it, what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
from graphs import graph, onnx_artifact

from deploycc.core.registry import BACKENDS
from deploycc.core.target import Target, load
from deploycc.errors import UnsupportedError

pytest.importorskip("openvino", reason="openvino is not installed")
sys.path.insert(0, str(Path(__file__).parent.parent / "passes"))
from test_quantize_static import context, residual

from deploycc.backends import _openvino_graph as openvino_graph
from deploycc.backends import openvino as backend
from deploycc.backends._settings import BF16_FLAGS
from deploycc.core.contract import enforce
from deploycc.core.timing import Profiles
from deploycc.forms.module import example_feeds
from deploycc.forms.onnx import OnnxForm
from deploycc.passes.quantize_static import QuantizeStatic
from deploycc.runtime.machine import cpu_flags

INT8 = load("x86-openvino")
needs_bf16 = pytest.mark.skipif(not BF16_FLAGS & cpu_flags(), reason="this CPU does not compute in bfloat16")
needs_vnni = pytest.mark.skipif(not {"avx512_vnni", "avx_vnni"} & cpu_flags(), reason="this CPU saturates 8-bit products")


def quantized(**options):
    artifact = residual()
    return QuantizeStatic(**options)(artifact, context(artifact, quant=INT8.quant))


def test_what_it_writes_answers_like_the_graph(tmp_path):
    artifact = residual()
    built = backend.OpenVino().build(artifact, INT8, tmp_path)
    feeds = example_feeds(artifact.signature, seed=1)
    with backend.OpenVino().open(built, INT8, threads=1) as session, OnnxForm().open(artifact, threads=1) as plain:
        np.testing.assert_allclose(session.run(feeds)["y"], plain.run(feeds)["y"], rtol=1e-4, atol=1e-4)
    assert built.runtime["precision"] == "f32"
    assert built.notes == ()
    assert built.coverage.int8_macs == 0


def test_the_same_bytes_every_time_and_no_path_in_them(tmp_path):
    artifact = quantized()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        backend.OpenVino().build(artifact, INT8, tmp_path / name)
    for file in backend.FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert str(tmp_path.parent) not in (tmp_path / "a" / "model.xml").read_text()


def test_weights_stay_eight_bits_wide(tmp_path):
    float_bytes, int_bytes = (
        (backend.OpenVino().build(made, INT8, folder).folder / "model.bin").stat().st_size
        for made, folder in ((residual(), folder_in(tmp_path, "f")), (quantized(), folder_in(tmp_path, "i")))
    )
    weights = 8 * 3 * 9 + 8 * 8 * 9 + 5 * 8
    assert float_bytes - int_bytes > 2 * weights  # three bytes of each are saved, scales are added


def folder_in(parent, name):
    (parent / name).mkdir()
    return parent / name


def with_hard_sigmoid(slope):
    """Squeeze-and-excitation's last steps: Conv, HardSigmoid, and its product with what came in."""
    body = f"""(float[1,8,4,4] x) => (float[1,8,4,4] y) {{
        c = Conv (x, w)
        h = HardSigmoid <alpha: float = {slope}, beta: float = 0.5> (c)
        y = Mul (x, h) }}"""
    weight = np.random.default_rng(0).normal(size=(8, 8, 1, 1)).astype(np.float32)
    return onnx_artifact(graph(body, w=weight))


@pytest.mark.parametrize(("slope", "kernels"), [(1 / 6, ["c", "y"]), (0.2, ["c", "h", "y"])])
def test_the_hard_sigmoid_of_torch_is_computed_in_a_kernel_beside_it(slope, kernels, tmp_path):
    artifact = with_hard_sigmoid(slope)
    built = backend.OpenVino().build(artifact, INT8, tmp_path)
    feeds = example_feeds(artifact.signature, seed=1)
    with backend.OpenVino().open(built, INT8, threads=1) as session, OnnxForm().open(artifact, threads=1) as plain:
        np.testing.assert_allclose(session.run(feeds)["y"], plain.run(feeds)["y"], rtol=1e-5, atol=1e-6)
    computed = [kernel.name for kernel in openvino_graph.kernels(tmp_path / "model.xml", "f32") if kernel.precision == "float"]
    assert computed == kernels


@needs_vnni
def test_conv_activation_and_rounding_are_one_integer_kernel(tmp_path):
    built = backend.OpenVino().build(quantized(), INT8, tmp_path)
    assert built.coverage.int8_macs == 1.0
    assert built.coverage.float_operators == ()
    found = openvino_graph.kernels(tmp_path / "model.xml", "f32")
    heavy = [kernel for kernel in found if kernel.macs]
    assert [kernel.macs for kernel in heavy] == [8 * 64 * 27, 8 * 64 * 72, 40]
    assert {kernel.precision for kernel in found} == {"int8", "conversion"}
    assert not any("relu" in kernel.name for kernel in found)
    assert sum(kernel.precision == "conversion" for kernel in found) == built.coverage.conversions


@needs_vnni
def test_an_operator_left_in_float_is_told_with_its_reason(tmp_path):
    built = backend.OpenVino().build(quantized(skip=("conv2",)), INT8, tmp_path)
    ((operator, reason),) = built.coverage.float_operators
    assert "conv2" in operator
    assert reason == "left out by skip="
    assert built.coverage.int8_macs == pytest.approx((8 * 64 * 27 + 40) / (8 * 64 * 99 + 40))


def test_macs_of_every_kind_of_operator(tmp_path):
    artifact = onnx_artifact(
        graph(
            """(float[1,4,5,5] x, float[3,1,6] t) => (float[1,4,3,3] y, float[2,7] p, float[3,1,1,8] h) {
                y = Conv <group=2> (x, w)
                f = Flatten (x)  s = Slice (f, a, b, c)  r = Reshape (s, d)  p = Gemm <transA=1> (r, m)
                h = LSTM <hidden_size=8> (t, i, g)
            }""",
            w=np.zeros((4, 2, 3, 3), np.float32), m=np.zeros((10, 7), np.float32), a=np.array([0]), b=np.array([20]), c=np.array([1]),
            d=np.array([10, 2]), i=np.zeros((1, 32, 6), np.float32), g=np.zeros((1, 32, 8), np.float32),
        )
    )  # fmt: skip
    backend.OpenVino().build(artifact, INT8, tmp_path)
    found = openvino_graph.macs_by_name(openvino_graph.compiled(tmp_path / "model.xml", "f32")[0])
    assert sorted(macs for macs in found.values() if macs) == sorted([4 * 9 * 2 * 9, 2 * 7 * 10, 3 * 4 * 8 * (6 + 8)])


def attention():
    """q·kᵀ, softmax, ·v between a product with a bias before and one behind: named so that the plug-in renames them."""
    import openvino as ov

    ops = ov.opset13
    x = ops.parameter([1, 8, 16], np.float32, name="x")
    first = ops.matmul(x, ops.constant(np.ones((16, 24), np.float32)), False, False, name="first/MatMul")
    biased = ops.add(first, ops.constant(np.ones((1, 1, 24), np.float32)), name="first/Add")
    query, value = (ops.unsqueeze(biased, ops.constant(np.int64(1))) for _ in range(2))
    scores = ops.scaled_dot_product_attention(query, query, value, name="attention")
    last = ops.matmul(scores, ops.constant(np.ones((24, 4), np.float32)), False, False, name="last")
    return ov.Model([ops.result(last)], [x], "m")


def test_the_macs_of_the_kernels_are_those_of_the_file(tmp_path):
    """The plug-in calls a product after the Add of its bias, and compiles attention into a kernel of its own."""
    import openvino as ov

    path = tmp_path / "model.xml"
    ov.save_model(attention(), str(path), compress_to_fp16=False)
    model, _ = openvino_graph.compiled(path, "f32")
    wanted = {"first/MatMul": 8 * 24 * 16, "attention": 8 * 8 * (24 + 24), "last": 8 * 4 * 24}
    assert openvino_graph.macs_by_name(model) == wanted
    assert sum(kernel.macs or 0 for kernel in openvino_graph.kernels(path, "f32")) == sum(wanted.values())


def test_what_no_kernel_owns_up_to_is_not_taken_for_integers(tmp_path, monkeypatch):
    built = backend.OpenVino().build(quantized(), INT8, tmp_path)
    monkeypatch.setattr(openvino_graph, "macs_by_name", lambda model: {"conv1/WithoutBiases": 100, "somewhere": 300})
    assert built.coverage.int8_macs is not None
    found = openvino_graph.coverage(tmp_path / "model.xml", "f32", quantized().quant)
    assert found.int8_macs == 0.25


def test_macs_behind_a_named_axis_are_not_known(tmp_path):
    artifact = onnx_artifact(graph("(float[n,4] x) => (float[n,3] y) { y = MatMul (x, w) }", w=np.ones((4, 3), np.float32)))
    built = backend.OpenVino().build(artifact, INT8, tmp_path)
    assert built.coverage.int8_macs is None
    with backend.OpenVino().open(built, INT8, threads=1) as session:
        assert session.run({"x": np.ones((7, 4), np.float32)})["y"].shape == (7, 3)


def test_times_of_what_one_call_runs(tmp_path):
    artifact = residual()
    made = BACKENDS.get("openvino")
    assert isinstance(made, Profiles)
    built = made.build(artifact, INT8, tmp_path)
    times = made.profile(built, INT8, [example_feeds(artifact.signature)], runs=5)
    names = [node.name for node in times]
    assert names.index("conv1/WithoutBiases") < names.index("conv2/WithoutBiases")
    assert all(node.milliseconds >= 0 for node in times)
    again = made.profile(built, INT8, [example_feeds(artifact.signature)], runs=1)
    assert [node.name for node in again] == names  # also what is too quick to be timed


@needs_bf16
def test_bf16_is_computed_in_bf16_and_stored_in_half(tmp_path):
    target = load("x86-openvino-bf16")
    built = backend.OpenVino().build(residual(), target, tmp_path)
    assert [note for note in built.notes if "bf16" in note]
    assert {kernel.precision for kernel in openvino_graph.kernels(tmp_path / "model.xml", "bf16") if kernel.macs} == {"bf16"}
    assert built.runtime["precision"] == "bf16"


@needs_bf16
@needs_vnni
def test_beside_bf16_integers_and_scales_are_stored_as_they_are(tmp_path):
    artifact, target = quantized(skip=("conv2",)), load("x86-openvino-int8-bf16")
    plain = backend.OpenVino().build(artifact, INT8, folder_in(tmp_path, "f32")).folder
    built = backend.OpenVino().build(artifact, target, folder_in(tmp_path, "bf16"))
    assert (built.folder / "model.bin").read_bytes() == (plain / "model.bin").read_bytes()
    found = openvino_graph.kernels(built.folder / "model.xml", "bf16")
    assert [kernel.precision for kernel in found if kernel.macs] == ["int8", "bf16", "int8"]
    assert built.notes == ("float operators are computed in bf16",)
    assert [reason for _, reason in built.coverage.float_operators] == ["left out by skip="]


def test_every_refusal_names_the_rule(monkeypatch):
    artifact, constraints = residual(), backend.OpenVino().constraints()
    enforce(constraints, artifact, INT8)
    facts = INT8.model_dump()
    for change, rule in (
        ({"quant": {**facts["quant"], "placement": "onnxruntime", "activations": "int16", "activation_symmetric": True}}, "8-bit integers"),
        ({"runtime": {**facts["runtime"], "precision": "bf16"}}, "16-bit precision"),
        ({"runtime": {**facts["runtime"], "precision": "f16"}}, "16-bit precision"),
    ):
        with pytest.raises(UnsupportedError, match=rule):
            enforce(constraints, artifact, Target.model_validate({**facts, **change}))
    unknown = onnx_artifact(graph("(float[2] x) => (float[2] y) { y = Relu (x) }"))
    unknown.model.graph[0].domain = "nowhere"
    unknown.model.opset_imports["nowhere"] = 1
    with pytest.raises(UnsupportedError, match="must have an implementation") as caught:
        enforce(constraints, unknown, INT8)
    assert "Relu" in caught.value.what


@pytest.mark.parametrize("name", ["onnxruntime", "fbgemm"])
def test_no_other_runtime_takes_a_precision_that_it_would_ignore(name):
    rule = next(rule for rule in BACKENDS.get(name).constraints() if rule.__name__ == "float32_only")
    facts = INT8.model_dump()
    assert rule(residual(), INT8) == []
    assert rule(residual(), Target.model_validate({**facts, "runtime": {**facts["runtime"], "precision": "bf16"}}))


ONE_THREAD = INT8.model_copy(update={"runtime": INT8.runtime.model_copy(update={"hint": "throughput"})})
THROUGHPUT = ONE_THREAD.model_copy(update={"bench": INT8.bench.model_copy(update={"threads": 2})})
RULES = backend.OpenVino().constraints()


def test_the_throughput_hint_is_in_the_manifest_and_gives_the_same_answers(tmp_path):
    artifact = onnx_artifact(graph("(float[N,4] x) => (float[N,4] y) { a = Softmax(x) y = Add(a, x) }"))
    enforce(RULES, artifact, THROUGHPUT)
    with pytest.raises(UnsupportedError, match=r"runtime\.hint = throughput with bench\.threads = 1"):
        enforce(RULES, artifact, ONE_THREAD)
    built = backend.OpenVino().build(artifact, THROUGHPUT, tmp_path)
    assert built.runtime["hint"] == "throughput"
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    with backend.OpenVino().open(built, THROUGHPUT, threads=2) as session, OnnxForm().open(artifact, threads=1) as plain:
        np.testing.assert_allclose(session.run({"x": x})["y"], plain.run({"x": x})["y"], rtol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        "(float[1,4] x) => (float[1,4] y) { y = Relu(x) }",
        "(float[N,4] x) => (float[4] y) { y = ReduceSum <keepdims = 0> (x, s) }",
        "(float[N,4] x, float[M,4] z) => (float[K,4] y) { y = Concat <axis = 0> (x, z) }",
    ],
)
def test_the_throughput_hint_needs_a_batch_to_divide(body):
    artifact = onnx_artifact(graph(body, **({"s": np.array([0])} if "ReduceSum" in body else {})))
    with pytest.raises(UnsupportedError, match=r"runtime\.hint = throughput with"):
        enforce(RULES, artifact, THROUGHPUT)
    assert backend.a_batch_to_divide(artifact, INT8) == []


@pytest.mark.parametrize("name", ["onnxruntime", "fbgemm", "inductor", "executorch", "tensorrt"])
def test_no_other_runtime_takes_a_hint_that_it_would_ignore(name):
    rule = next(rule for rule in BACKENDS.get(name).constraints() if rule.__name__ == "latency_only")
    assert rule(residual(), INT8) == []
    assert rule(residual(), THROUGHPUT)


def test_it_says_how_to_install_it(monkeypatch):
    def missing(name):
        raise backend.PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", missing)
    available = backend.OpenVino().available()
    assert not available
    assert available.install == "pip install 'deploycc[openvino]'"
