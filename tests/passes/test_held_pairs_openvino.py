"""OpenVINO on CPUs without VNNI: u8×s8 pairs saturate there as `_madd` says, and what the target writes cannot."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from graphs import graph, onnx_artifact
from test_held_pairs import codes, net, some
from test_quantize_static import context

from deploycc.core.target import Quant, load
from deploycc.forms import onnx as form
from deploycc.passes._fake_quant import array
from deploycc.passes._madd import convolution, kernel_matrix, may_saturate, product
from deploycc.passes.quantize_static import QuantizeStatic
from deploycc.runtime.machine import cpu_flags

TARGET = load("x86-openvino-avx2")
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None or "avx2" not in cpu_flags(), reason="no OpenVINO, or no AVX2"
)
# Runs model.onnx on every feeds.npz of a folder, with oneDNN held to what the environment says.
RUN = """
import json, sys, numpy as np, openvino as ov
model, feeds, out = sys.argv[1:]
ready = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
found = list(ready(dict(np.load(feeds))).values())[0]
np.save(out, found)
facts = [op.get_rt_info() for op in ready.get_runtime_model().get_ordered_ops()]
print(json.dumps([str(getattr(fact["primitiveType"], "value", fact["primitiveType"])) for fact in facts]))
"""


def answers(path, feeds, folder, isa):
    """(the output, the implementations) with oneDNN held to `isa`."""
    np.savez(folder / "feeds.npz", **feeds)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), str(folder / "feeds.npz"), str(folder / "out.npy")],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "out.npy"), json.loads(done.stdout)


def whole(weights, group):
    """One operator on whole numbers, with steps of 1: what it gives is its sum."""
    call = f"Conv<group={group}>(d, e)" if group else "MatMul(d, e)"
    shape = f"1,{weights.shape[1] * group},7,7" if group else f"4,{weights.shape[0]}"
    return graph(
        f"(float[{shape}] x) => (float y) {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)"
        f" e = DequantizeLinear(w, s, o) y = {call} }}",
        w=weights,
        s=np.float32(1),
        z=np.uint8(0),
        o=np.int8(0),
    )


@needs_openvino
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((16, 16, 3, 3), 1),
        ((32, 8, 1, 1), 1),
        ((16, 3, 3, 3), 1),
        ((16, 9, 1, 1), 1),
        ((16, 8, 3, 3), 2),
        ((16, 1, 3, 3), 16),
        ((24, 64), 0),
    ],
)
def test_the_kernels_saturate_bit_by_bit_as_emulated(shape, group, tmp_path):
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, shape).astype(np.int8)
    size = (1, shape[1] * group, 7, 7) if group else (4, shape[0])
    x = rng.integers(0, 256, size).astype(np.uint8)
    found, kernels = answers(form.write(whole(w, group), tmp_path), {"x": x.astype(np.float32)}, tmp_path, "AVX2")
    assert any("avx2_I8" in kernel or "avx2_1x1_I8" in kernel or "gemm_I8" in kernel for kernel in kernels), kernels
    if not group:
        expected = product(x, w)
    else:
        odd = w.shape[1] % 2 if w.shape[1] > 1 else 0  # pairs end with a tap: as if there were one more channel, of zeros
        spread = x.reshape(1, group, -1, 7, 7)
        filled = np.pad(spread, ((0, 0), (0, 0), (0, odd), (0, 0), (0, 0))).reshape(1, -1, 7, 7)
        expected = convolution(filled, np.pad(w, ((0, 0), (0, odd), (0, 0), (0, 0))), group=group)
    np.testing.assert_array_equal(found, expected)


@needs_openvino
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_what_the_target_writes_gives_the_same_without_vnni(isa, tmp_path):
    if isa == "AVX512_CORE" and "avx512f" not in cpu_flags():
        pytest.skip("no AVX-512")
    artifact = net()
    made = QuantizeStatic()(artifact, context(artifact, quant=TARGET.quant))
    path = form.write(made.model, tmp_path)
    feeds = {"x": 3 * some(1, 3, 8, 8)}
    exact = form.OnnxSession(made.model, made.signature, 1).run(feeds)["y"]
    found, kernels = answers(path, feeds, tmp_path, isa)
    assert sum(kernel.endswith(("_I8", "_i8")) for kernel in kernels) >= 3, kernels
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max())


def test_pairs_are_held_and_seven_bits_are_taken_where_their_order_is_another():
    artifact = net()
    for index, node in enumerate(artifact.model.graph):
        node.name = f"n{index}"
    made = QuantizeStatic()(artifact, context(artifact, quant=TARGET.quant))
    found = codes(made)
    assert {name for name, values in found.items() if np.abs(values).max() > 63} == {"deep", "dense", "head"}
    assert not may_saturate(kernel_matrix(found["dense"].astype(np.int8), 1)[0]).any()
    assert "saturation" not in made.details  # full range is not tried: what it loses is not predicted for this runtime


def test_over_an_odd_number_of_channels_codes_have_seven_bits():
    odd = onnx_artifact(graph("(float[1,9,8,8] x) => (float y) { y = Conv(x, w) }", w=some(8, 9, 3, 3)))
    for placement, most in (("openvino", 63), ("onnxruntime", 127)):
        made = QuantizeStatic()(odd, context(odd, quant=Quant(reduce_range=True, placement=placement)))
        largest = np.abs(array(made.model.graph.initializers["w_quantized"]).astype(int)).max()
        assert 0 < largest <= most
        assert bool(largest > 63) is (placement == "onnxruntime")


def test_a_target_without_reduced_range_is_refused_there():
    facts = TARGET.model_dump()
    with pytest.raises(ValueError, match="saturate on x86 CPUs without VNNI"):
        type(TARGET).model_validate({**facts, "quant": {**facts["quant"], "reduce_range": False}})
