"""ONNX Runtime's CUDA provider without a GPU: what is written, what is judged, what is refused, and that a fall-back is an error."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from graphs import graph, onnx_artifact

from deploycc.backends import onnxruntime as backend
from deploycc.core.artifact import QuantInfo
from deploycc.core.contract import enforce
from deploycc.core.registry import BACKENDS
from deploycc.core.target import Substitutes, Target, load, misfit
from deploycc.errors import MismatchError, UnsupportedError
from deploycc.runtime import cuda
from deploycc.runtime.sessions import onnxruntime as session_module

CUDA = load("cuda-onnxruntime")
GPU = cuda.Gpu("A GPU", "8.9", "580")
no_gpu = pytest.mark.skipif(cuda.gpu() is not None, reason="this machine has an NVIDIA GPU")


def net():
    rng = np.random.default_rng(0)
    return onnx_artifact(
        graph("(float[2,8] x) => (float[2,4] y) { h = MatMul (x, w) y = Relu (h) }", w=rng.normal(size=(8, 4)).astype(np.float32))
    )


def target(**runtime):
    facts = CUDA.model_dump()
    return Target.model_validate({**facts, "runtime": {**facts["runtime"], **runtime}})


@no_gpu
def test_the_file_is_float16_and_judged_on_the_cpu(tmp_path):
    artifact = net()
    built = backend.OnnxRuntime().build(artifact, CUDA, tmp_path)
    assert built.runtime["provider"] == "cuda"
    assert backend.NOT_RUN in built.notes
    assert "float operators are computed in f16" in built.notes
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    with backend.OnnxRuntime().open(built, CUDA, threads=1) as session:
        found = session.run({"x": x})["y"]
    wanted = np.maximum(x @ artifact.model.graph.initializers["w"].const_value.numpy(), 0)
    np.testing.assert_allclose(found, wanted, atol=0.01)
    assert (found != wanted).any()


def test_in_float32_the_file_is_as_it_was(tmp_path):
    built = backend.OnnxRuntime().build(net(), target(precision="f32"), tmp_path)
    assert built.notes in ((), (backend.NOT_RUN,))


def test_it_says_why_the_provider_is_not_here(monkeypatch):
    made = BACKENDS.get("onnxruntime")
    assert isinstance(made, Substitutes)
    assert made.absent(load("x86-onnxruntime")) is None
    monkeypatch.setattr(cuda, "gpu", lambda: None)
    assert "this machine has none" in (made.absent(CUDA) or "")
    monkeypatch.setattr(cuda, "gpu", lambda: GPU)
    monkeypatch.setattr(session_module, "providers", lambda: ("CPUExecutionProvider",))
    assert misfit(CUDA) == "this ONNX Runtime has no CUDAExecutionProvider: pip uninstall onnxruntime; pip install onnxruntime-gpu"
    monkeypatch.setattr(session_module, "providers", lambda: ("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert misfit(CUDA) is None


@pytest.mark.parametrize(
    ("artifact", "where", "rule"),
    [
        (net().evolve(net().model, quant=QuantInfo("static", "int8", "int8", True, False, "mse")), CUDA, "no kernels for Q/DQ"),
        (net(), target(precision="bf16"), "no bfloat16 convolutions"),
        (
            onnx_artifact(graph("(float[2] x, bool c) => (float[2] y) { y = If (c) <then_branch = one () => (float[2] a) { a = Neg (x) }, else_branch = two () => (float[2] b) { b = Abs (x) }> }")),
            CUDA,
            "without branches",
        ),
    ],
)  # fmt: skip
def test_every_refusal_names_the_rule(artifact, where, rule):
    with pytest.raises(UnsupportedError, match=rule):
        enforce(backend.OnnxRuntime().constraints(), artifact, where)
    enforce(backend.OnnxRuntime().constraints(), net(), CUDA)


@pytest.mark.parametrize("name", ["openvino", "fbgemm", "tensorrt"])
def test_no_other_runtime_takes_a_provider_that_it_would_ignore(name):
    rule = next(rule for rule in BACKENDS.get(name).constraints() if rule.__name__ == "processor_only")
    assert rule(net(), load("x86-onnxruntime")) == []
    assert rule(net(), CUDA)


class Opened:
    """What ONNX Runtime was asked for, and a session that says which providers it got."""

    def __init__(self, monkeypatch, got):
        self.got = got
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        monkeypatch.setattr(onnxruntime, "InferenceSession", self.open)

    def open(self, path, options, providers):
        self.options, self.providers = options, providers
        named = SimpleNamespace
        return SimpleNamespace(
            get_providers=lambda: self.got, run=None, get_inputs=lambda: [named(name="x")], get_outputs=lambda: [named(name="y")]
        )


def opened(tmp_path, **runtime):
    artifact = net()
    built = backend.OnnxRuntime().build(artifact, CUDA, tmp_path)
    return session_module.open(Path(tmp_path) / "model.onnx", artifact.signature, {**built.runtime, **runtime}, 1)


def test_operators_that_fall_back_to_the_cpu_are_an_error(tmp_path, monkeypatch):
    artifact = net()
    built = backend.OnnxRuntime().build(artifact, CUDA, tmp_path)
    asked = Opened(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    session_module.open(tmp_path / "model.onnx", artifact.signature, built.runtime, 1)
    assert asked.providers == [("CUDAExecutionProvider", {"use_tf32": "0"})]
    assert asked.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_a_provider_that_does_not_start_is_an_error(tmp_path, monkeypatch):
    artifact = net()
    built = backend.OnnxRuntime().build(artifact, CUDA, tmp_path)
    Opened(monkeypatch, ["CPUExecutionProvider"])
    with pytest.raises(MismatchError, match="CUDAExecutionProvider does not start here"):
        session_module.open(tmp_path / "model.onnx", artifact.signature, built.runtime, 1)


@pytest.mark.skipif("CUDAExecutionProvider" in session_module.providers(), reason="this ONNX Runtime has the CUDA provider")
@pytest.mark.parametrize("provider", ["cuda", "abacus"])
def test_a_provider_that_is_not_here_is_an_error(tmp_path, provider):
    with pytest.raises(MismatchError, match=f"for the provider '{provider}'") as caught:
        opened(tmp_path, provider=provider)
    assert "onnxruntime-gpu" in caught.value.fix


def test_providers_are_none_without_onnxruntime(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert session_module.providers() == ()
