"""TensorRT: what is written, what is checked without a GPU, what is refused, and what is said to be not measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from graphs import graph, onnx_artifact

from deploycc.backends import _tensorrt_probe as probing
from deploycc.backends import tensorrt as backend
from deploycc.core.contract import enforce
from deploycc.core.kernels import Maps
from deploycc.core.registry import BACKENDS
from deploycc.core.target import Substitutes, Target, load
from deploycc.errors import UnsupportedError
from deploycc.forms import onnx as form
from deploycc.forms.module import example_feeds
from deploycc.passes.quantize_static import QuantizeStatic
from deploycc.runtime import cuda
from deploycc.runtime.tensorrt_engine import Recipe

sys.path.insert(0, str(Path(__file__).parent.parent / "passes"))
sys.path.insert(0, str(Path(__file__).parent.parent / "runtime"))
from fake_tensorrt import Driver, Fake
from test_quantize_static import context, residual

CUDA = load("cuda-tensorrt")
XAVIER = load("jetson-xavier-jp5")
needs_rtx = pytest.mark.skipif(probing.checker() is None, reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")
no_gpu = pytest.mark.skipif(cuda.gpu() is not None, reason="this machine has an NVIDIA GPU")


def target(base=CUDA, **tables):
    facts = base.model_dump()
    return Target.model_validate({**facts, **{name: {**facts[name], **table} for name, table in tables.items()}})


def unchecked(base=CUDA, **tables):
    return target(base, engine={"check_seconds": 0}, **tables)


def quantized(base=CUDA):
    artifact = residual()
    return QuantizeStatic()(artifact, context(artifact, quant=base.quant))


def reference(artifact, feeds):
    with form.OnnxForm().open(artifact, threads=1) as session:
        return session.run(feeds)["y"]


@no_gpu
@pytest.mark.parametrize(("precision", "most"), [("f32", 1e-5), ("f16", 0.01), ("bf16", 0.03)])
def test_without_a_gpu_answers_are_those_of_the_file(precision, most, tmp_path):
    artifact = residual()
    where = unchecked(runtime={"precision": precision})
    built = backend.TensorRt().build(artifact, where, tmp_path)
    feeds = example_feeds(artifact.signature, seed=1)
    wanted = reference(artifact, feeds)
    with backend.TensorRt().open(built, where, threads=1) as session:
        found = session.run(feeds)["y"]
    assert found.dtype == np.float32
    assert 0 <= np.abs(found - wanted).max() <= most * np.abs(wanted).max()
    assert (np.abs(found - wanted).max() > 1e-5 * np.abs(wanted).max()) == (precision != "f32")
    assert backend.NOT_RUN in built.notes
    assert backend.SWITCHED_OFF in built.notes
    assert (backend.EMULATED in built.notes) == (precision == "bf16")
    assert built.runtime["version"] == "(not run here)"
    assert built.coverage.float_operators == (("every operator", f"computed in {precision}"),)


@no_gpu
def test_it_says_what_runs_here_and_what_does_not(monkeypatch):
    made = BACKENDS.get("tensorrt")
    assert isinstance(made, Substitutes)
    assert isinstance(made, Maps)
    assert "TensorRT-RTX" in made.shows
    assert made.absent(CUDA) == "it is for an NVIDIA GPU (compute capability 8.0 or higher), and this machine has none"
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "8.9", "580"))
    assert (made.absent(CUDA) or "").startswith("TensorRT is not installed: install TensorRT as NVIDIA describes it")
    monkeypatch.setattr(backend.session, "version", lambda: "10.16")
    assert made.absent(CUDA) is None
    assert made.available().version == "10.16"
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "7.5", "580"))
    assert made.absent(CUDA) == "it is for compute capability 8.0 or higher, this GPU (A GPU) has 7.5"


@no_gpu
def test_files_are_built_without_any_nvidia_package(monkeypatch):
    monkeypatch.setattr(probing, "checker", lambda: None)
    available = backend.TensorRt().available()
    assert available
    assert available.version == "files only (TensorRT is not here; unchecked without TensorRT-RTX: pip install 'deploycc[tensorrt-rtx]')"


def test_on_a_gpu_it_opens_the_devices_session(tmp_path, monkeypatch):
    trt = Fake("11.4.0.106", inputs={"x": ("float32", (4, 3))}, outputs={"y": ("float32", ())})
    monkeypatch.setitem(sys.modules, "tensorrt", trt.module)
    monkeypatch.setenv("DEPLOYCC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "gpu", lambda: cuda.Gpu("A GPU", "8.9", "580"))
    monkeypatch.setattr(cuda, "library", Driver)
    monkeypatch.setattr(backend.session, "version", lambda: "11.4.0.106")
    (tmp_path / "built").mkdir()
    artifact = onnx_artifact(graph("(float[N,3] x) => (float[N,3] y) { y = Neg (x) }"))
    built = backend.TensorRt().build(artifact, unchecked(), tmp_path / "built")
    assert backend.NOT_RUN not in built.notes
    assert built.runtime["version"] == "11.4.0.106"
    with backend.TensorRt().open(built, unchecked(), threads=1) as session:
        assert session.run({"x": np.ones((2, 3), np.float32)})["y"].tolist() == [[-1, -1, -1]] * 2
    assert ("set_shape", "x", (1, 3), (8, 3), (32, 3)) in trt.asked


def test_the_recipe_and_the_command_line_are_in_the_manifest(tmp_path):
    artifact = onnx_artifact(graph("(float[N,3] x, float[2,3] c) => (float[N,3] y) { y = Neg (x) }"))
    where = target(engine={"check_seconds": 0, "workspace_mb": 100, "version_compatible": True})
    built = backend.TensorRt().build(artifact, where, tmp_path)
    recipe = Recipe.parse(built.runtime["recipe"])
    assert recipe == Recipe("f16", profiles={"x": ((1, 3), (8, 3), (32, 3))}, workspace_mb=100, version_compatible=True)
    assert built.runtime["trtexec"] == recipe.trtexec("model.onnx")
    assert built.runtime["minimum"] == "10.12"
    json.dumps(dict(built.runtime))


@needs_rtx
def test_every_intended_operator_is_shown_in_integers(tmp_path):
    built = backend.TensorRt().build(quantized(), CUDA, tmp_path)
    assert built.coverage.int8_operators == 2
    assert built.coverage.int8_macs == pytest.approx(8 * 64 * 99 / (8 * 64 * 99 + 40))
    assert built.coverage.float_operators == (("gemm", "it has a single row: memory bounds it, not products"),)
    placed = [node for node in form.read(tmp_path / "model.onnx").graph if node.op_type == "QuantizeLinear"]
    assert built.coverage.conversions == len(placed) == 2  # the builder rounds where the placement says, and nowhere else
    (told,) = [note for note in built.notes if note.startswith("checked by building with TensorRT-RTX")]
    assert "SM86: 2 correlation Int8xInt8, 2 roundings" in told
    assert "SM89: 2 correlation Int8xInt8, 2 roundings" in told
    found = backend.TensorRt().kernels(tmp_path / "model.onnx", built.runtime)
    assert [kernel.macs for kernel in found if kernel.precision == "int8"] == [8 * 64 * 27, 8 * 64 * 72]
    assert sum(kernel.precision == "conversion" for kernel in found) == 2


def test_without_the_checker_int8_is_what_the_file_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "checker", lambda: None)
    built = backend.TensorRt().build(quantized(), CUDA, tmp_path)
    assert built.coverage.int8_operators == 2
    assert backend.UNCHECKED in built.notes
    assert backend.TensorRt().kernels(tmp_path / "model.onnx", built.runtime) == []


def fake_probe(monkeypatch, **changes):
    def probe(path, recipe, capability, *, seconds):
        facts = {"capability": capability, "version": "1.7", "error": "", "seconds": 0.1, "bytes": 10, "layers": (), **changes}
        return probing.Probe(**facts)

    monkeypatch.setattr(probing, "checker", lambda: "1.7")
    monkeypatch.setattr(probing, "probe", probe)


def test_what_the_builder_shows_in_float_is_not_called_int8(tmp_path, monkeypatch):
    layers = (
        probing.Layer("a", "correlation", ("Int8",), ("Int8",), ("Half",), ("conv1",)),
        probing.Layer("b", "correlation", ("Half",), ("Half",), ("Half",), ("conv2",)),
    )
    fake_probe(monkeypatch, layers=layers)
    built = backend.TensorRt().build(quantized(), CUDA, tmp_path)
    assert built.coverage.int8_operators == 1
    assert built.coverage.float_operators[0] == ("conv2", "TensorRT-RTX computes it in HalfxHalf, though it is behind Q/DQ")


@pytest.mark.parametrize("error", ["the builder crashed (SIGSEGV): …", "the builder was not finished after 1 s and was stopped"])
def test_a_builder_that_gives_no_engine_refuses_the_model(tmp_path, monkeypatch, error):
    fake_probe(monkeypatch, error=error)
    with pytest.raises(UnsupportedError, match="builds no engine of the model: SM86: the builder") as caught:
        backend.TensorRt().build(quantized(), CUDA, tmp_path)
    assert "check_seconds" in caught.value.fix


def test_version_8_gets_float_weights_and_float32(tmp_path):
    artifact = quantized(XAVIER)
    artifact.model.opset_imports[""] = 17
    built = backend.TensorRt().build(artifact, unchecked(XAVIER), tmp_path)
    model = form.read(tmp_path / "model.onnx")
    assert model.ir_version == 8
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 4
    assert {value.dtype.name for value in model.graph.initializers.values()} == {"FLOAT", "INT8"}
    assert backend.PERMITTED in built.notes
    assert Recipe.parse(built.runtime["recipe"]).typed is False
    assert "--int8 --fp16" in built.runtime["trtexec"]
    feeds = example_feeds(artifact.signature)
    with backend.TensorRt().open(built, XAVIER, threads=1) as session:
        np.testing.assert_allclose(session.run(feeds)["y"], reference(artifact, feeds), rtol=1e-5)


@needs_rtx
def test_the_file_for_version_8_is_read_and_typed_right(tmp_path):
    artifact = quantized(XAVIER)
    artifact.model.opset_imports[""] = 17
    built = backend.TensorRt().build(artifact, XAVIER, tmp_path)
    assert built.coverage.int8_operators == 2
    assert any("SM86: 2 correlation Int8xInt8" in note for note in built.notes)


def branches():
    import onnx_ir as ir

    body = """(float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = one () => (float[2] a) { a = Identity (x) }, else_branch = two () => (float[2] b) { b = Neg (x) }> }"""
    made = graph(body)
    assert isinstance(made, ir.Model)
    return onnx_artifact(made)


def functions():
    import onnx
    import onnx_ir as ir

    text = '<ir_version: 8, opset_import: ["": 20, "own": 1]> main (float[2] x) => (float[2] y) { y = own.twice (x) } <domain: "own", opset_import: ["": 20]> twice (a) => (b) { b = Add (a, a) }'
    return onnx_artifact(ir.from_proto(onnx.parser.parse_model(text)))


def normalized():
    weights = {"s": np.ones(4, np.float32)}
    return onnx_artifact(graph("(float[2,4] x) => (float[2,4] y) { y = LayerNormalization (x, s) }", opset=17, **weights))


SYMMETRIC = {"placement": "onnxruntime", "activations": "int8", "activation_symmetric": True}
F32 = {"runtime": {"precision": "f32"}}


@pytest.mark.parametrize(
    ("artifact", "where", "rule"),
    [
        (residual, target(quant=SYMMETRIC), "symmetric int8"),
        (residual, target(hardware={"compute_capability": "7.5"}, runtime={"precision": "bf16"}), "needs a GPU that computes in it"),
        (residual, target(hardware={"compute_capability": None}), "needs a GPU that computes in it"),
        (
            residual,
            target(XAVIER, hardware={"compute_capability": "8.7"}, runtime={"precision": "bf16"}),
            "needs a GPU that computes in it",
        ),
        (branches, CUDA, "branches, loops or functions"),
        (functions, CUDA, "branches, loops or functions"),
        (residual, target(XAVIER, runtime={"opset": 20}), "read opset 17 at most"),
        (normalized, XAVIER, "read opset 17 at most"),
    ],
)
def test_every_refusal_names_the_rule(artifact, where, rule):
    with pytest.raises(UnsupportedError, match=rule):
        enforce(backend.TensorRt().constraints(), artifact(), where)


def test_what_is_as_it_should_be_is_not_refused():
    enforce(backend.TensorRt().constraints(), quantized(), CUDA)
    enforce(backend.TensorRt().constraints(), branches(), target(**F32))
    enforce(backend.TensorRt().constraints(), normalized(), target(XAVIER, runtime={"minimum": "8.6"}))


def test_a_named_axis_without_sizes_is_refused():
    artifact = onnx_artifact(graph("(float[rows,cols] x) => (float[rows,cols] y) { y = Neg (x) }"))
    with pytest.raises(UnsupportedError, match="least, a most likely and a largest size") as caught:
        enforce(backend.TensorRt().constraints(), artifact, CUDA)
    assert "axis rows" in caught.value.what
    assert "axis cols" in caught.value.what
    enforce(backend.TensorRt().constraints(), artifact, target(engine={"axes": {"rows": [1, 2, 3], "cols": [4, 4, 4]}}))


def test_an_opset_that_the_device_does_not_read_is_refused_once_the_passes_are_through(tmp_path):
    artifact = onnx_artifact(graph("(float[2,3] x) => (float[2,3] y) { y = Neg (x) }", opset=21))
    enforce(backend.TensorRt().constraints(), artifact, CUDA)  # update-opset will convert it
    with pytest.raises(UnsupportedError, match="opset: 21, the target reads 13 to 20"):
        backend.TensorRt().build(artifact, unchecked(), tmp_path)
    from deploycc.core.artifact import ModelStats, Receipt

    after = artifact.evolve(artifact.model, history=(Receipt("p{}", True, "onnx", "a", ModelStats(1, 1, 1)),))
    with pytest.raises(UnsupportedError, match="once the passes are through"):
        enforce(backend.TensorRt().constraints(), after, CUDA)
