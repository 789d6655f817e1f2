"""Time, shapes and precision of every operator, as the runtimes' own profilers tell them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import graph, onnx_artifact
from torch import nn

from deploycc.backends import _onnxruntime_profile as ort_profile
from deploycc.backends import _torch_profile as torch_profile
from deploycc.core.kernels import Maps
from deploycc.core.registry import BACKENDS
from deploycc.core.target import Quant, load
from deploycc.core.timing import Measures
from deploycc.forms import onnx as form
from deploycc.forms._macs import count_macs
from deploycc.forms._torch_macs import heavy_calls
from deploycc.forms.module import example_feeds
from deploycc.passes.quantize_static import QuantizeStatic

sys.path.insert(0, str(Path(__file__).parent.parent / "passes"))
from test_quantize_static import context, residual

RNG = np.random.default_rng(0)


def some(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def operators(name, artifact, folder, runs=3):
    backend = BACKENDS.get(name)
    assert isinstance(backend, Measures)
    if not backend.available():
        pytest.skip(f"{name} is not installed")
    path = form.write(artifact.model, folder)
    feeds = [example_feeds(artifact.signature, seed=seed) for seed in range(2)]
    return backend.operators(path, artifact.signature, {}, feeds, threads=1, runs=runs)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_float_network_with_the_macs_of_its_own_channels(name, tmp_path):
    """20 channels: ONNX Runtime fills them up to 32, which is no work of the model's."""
    artifact = onnx_artifact(
        graph(
            "(float[1,3,16,16] x) => (float[1,5] y) { a = Conv<pads=[1,1,1,1]>(x, w) r = Relu(a) b = Conv(r, v) p = GlobalAveragePool(b)"
            " f = Flatten(p) y = MatMul(f, h) }",
            w=some(20, 3, 3, 3),
            v=some(24, 20, 1, 1),
            h=some(24, 5),
        )
    )
    found = operators(name, artifact, tmp_path)
    assert [item.macs for item in found if item.macs] == [16 * 16 * 20 * 27, 16 * 16 * 24 * 20, 24 * 5]
    assert {item.precision for item in found if item.macs} == {"float"}
    assert all(item.milliseconds >= 0 for item in found)
    assert {item.calls for item in found} == {1}
    heavy = [item for item in found if item.macs]
    assert heavy[2].bytes == 4 * (24 + 24 * 5 + 5)
    assert heavy[0].bytes >= 4 * (16 * 16 * 3 + 20 * 27 + 16 * 16 * 20)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_an_integer_network_in_integers(name, tmp_path):
    artifact = residual()
    after = QuantizeStatic()(artifact, context(artifact, quant=Quant(reduce_range=True, placement=name)))
    found = operators(name, after, tmp_path)
    heavy = [item for item in found if item.macs]
    assert {item.precision for item in heavy} >= {"int8"}
    assert sum(item.macs or 0 for item in found) == sum(count_macs(after.model).values())
    assert any(item.precision == "conversion" for item in found)


def test_a_loop_s_operators_are_counted_as_often_as_they_run(tmp_path):
    body = graph(
        "(float[4,4] x, int64 n) => (float[4,4] y) { t = Constant<value = bool {1}>()"
        " y = Loop(n, t, x) <body = b (int64 i, bool c, float[4,4] a) => (bool d, float[4,4] o)"
        " { d = Identity(c) o = MatMul(a, a) }> }"
    )
    artifact = onnx_artifact(body)
    path = form.write(artifact.model, tmp_path)
    feeds = [{"x": np.eye(4, dtype=np.float32), "n": np.array(3, np.int64)}]
    found = ort_profile.operators(path, feeds, 1, 2)
    (product,) = (item for item in found if item.operator == "MatMul")
    assert product.calls == 3
    assert product.macs == 3 * 64


def test_a_gpu_provider_is_not_timed_by_the_cpu_s_clock(tmp_path):
    backend = BACKENDS.get("onnxruntime")
    assert isinstance(backend, Measures)
    assert backend.operators(tmp_path / "none.onnx", residual().signature, {"provider": "cuda"}, [], threads=1, runs=1) == []


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_macs_of_a_named_batch_are_those_of_the_shapes_that_are_given(name, tmp_path):
    backend = BACKENDS.get(name)
    assert isinstance(backend, Maps)
    if not backend.available():
        pytest.skip(f"{name} is not installed")
    artifact = onnx_artifact(graph("(float[n,8] x) => (float[n,4] y) { y = MatMul(x, w) }", w=some(8, 4)))
    path = form.write(artifact.model, tmp_path)
    assert sum(kernel.macs or 0 for kernel in backend.kernels(path, {}, {"x": (7, 8)})) == 7 * 8 * 4


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def test_pytorch_s_operators_with_macs_and_bytes_of_what_multiplies():
    module, x = Small().eval(), torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        found = torch_profile.operators(lambda: module(x), 3)
    assert [(item.operator, item.macs) for item in found if item.macs] == [("aten::conv2d", 64 * 8 * 27), ("aten::linear", 32)]
    assert "aten::relu" in {item.operator for item in found}
    assert found[0].bytes == 4 * (3 * 64 + 8 * 27 + 8 + 8 * 64)
    assert not {item.operator for item in found} & {"aten::convolution", "aten::addmm"}  # which others called


def test_where_calls_and_operators_are_not_as_many_macs_are_not_known():
    square = torch.randn(2, 4, 4)
    with torch.inference_mode():
        found = torch_profile.operators(lambda: torch.einsum("bij,bjk->bik", square, square), 2)  # its product is called from inside
    assert [item.macs for item in found] == [None] * len(found)


def test_heavy_calls_in_order():
    module, x = Small().eval(), torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        found = heavy_calls(lambda: module(x))
    assert [(call.operator, call.macs) for call in found] == [("aten.convolution", 64 * 8 * 27), ("aten.addmm", 32)]


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="no fbgemm here")
def test_an_integer_torchscript_model(tmp_path):
    from test_torch_backends import artifact as float_artifact
    from test_torch_backends import quantized

    backend = BACKENDS.get("fbgemm")
    assert isinstance(backend, Measures)
    artifact = quantized(float_artifact(), "fbgemm")
    built = backend.build(artifact, load("x86-fbgemm"), tmp_path)
    found = backend.operators(
        tmp_path / built.files[0], artifact.signature, built.runtime, [example_feeds(artifact.signature)], threads=1, runs=2
    )
    heavy = [item for item in found if item.macs]
    assert {item.precision for item in heavy} == {"int8"}
    assert len(heavy) == 4


def test_pytorch_s_profiler_says_nothing():
    text = "import torch; from deploycc.backends._torch_profile import operators; print(len(operators(lambda: torch.ones(3) + 1, 2)))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2\n", "")  # torch.ones and the sum
