"""The artifact is judged as its target computes it, on whatever CPU the compile runs."""

from dataclasses import replace

import numpy as np
import pytest
from graphs import FACTS, context, graph, onnx_artifact

from deploycc.backends import onnxruntime as backend
from deploycc.core.target import Target
from deploycc.forms.onnx import OnnxSession
from deploycc.passes._qdq import activation_scale
from deploycc.runtime.sessions.onnxruntime import OrtSession

WIDE = {**FACTS, "arch": "aarch64"}
NARROW = {**FACTS, "quant": {"reduce_range": True}}
AVX2, VNNI, ARM = ("x86_64", frozenset({"avx2"})), ("x86_64", frozenset({"avx512_vnni"})), ("aarch64", frozenset({"asimd"}))


@pytest.fixture
def quantized():
    """y = x·w in uint8 × int8, all of it at the ends of the range: two products are more than int16 holds."""
    facts = context(onnx_artifact(graph("(float[1,4] x) => (float[1,4] y) { y = Relu (x) }"))).target.quant
    scale = activation_scale(0.0, 1.0, facts)
    model = graph(
        """(float[1,64] x) => (float[1,8] y) {
            q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)
            v = DequantizeLinear (w, t, o)  y = MatMul (d, v) }""",
        s=np.asarray(scale.scale),
        z=scale.zero_point,
        w=np.full((64, 8), 127, np.int8),
        t=np.float32(1 / 127),
        o=np.int8(0),
    )
    from deploycc.core.artifact import QuantInfo

    return onnx_artifact(model, quant=QuantInfo("static", "int8", "uint8", False, False, "minmax", ()))


@pytest.mark.parametrize(
    ("facts", "machine", "exact"),
    [(WIDE, AVX2, True), (WIDE, VNNI, False), (WIDE, ARM, False), (NARROW, AVX2, False)],
)
def test_exact_arithmetic_only_where_this_cpu_loses_what_the_target_does_not(quantized, tmp_path, monkeypatch, facts, machine, exact):
    monkeypatch.setattr(backend, "machine", lambda: machine)
    target = Target.model_validate(facts)
    built = backend.OnnxRuntime().build(quantized, target, tmp_path)
    assert built.notes == ((backend.EXACT,) if exact else ())
    with backend.OnnxRuntime().open(built, target, threads=1) as session:
        assert isinstance(session, OnnxSession if exact else OrtSession)


def test_dynamic_kernels_cannot_be_judged_exactly_and_it_says_so(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "machine", lambda: AVX2)
    dynamic = quantized.evolve(quantized.model, quant=replace(quantized.quant, method="dynamic"))
    assert backend.OnnxRuntime().build(dynamic, Target.model_validate(WIDE), tmp_path).notes == (backend.SATURATED,)


def test_full_range_weights_are_judged_right_on_every_cpu(quantized, tmp_path):
    target = Target.model_validate(WIDE)
    built = backend.OnnxRuntime().build(quantized, target, tmp_path)
    with backend.OnnxRuntime().open(built, target, threads=1) as session:
        np.testing.assert_allclose(session.run({"x": np.ones((1, 64), np.float32)})["y"], 64.0, rtol=1e-3)


def test_a_float_artifact_needs_no_note(tmp_path):
    artifact = onnx_artifact(graph("(float[1,4] x) => (float[1,4] y) { y = Relu (x) }"))
    assert backend.OnnxRuntime().build(artifact, Target.model_validate(WIDE), tmp_path).notes == ()
