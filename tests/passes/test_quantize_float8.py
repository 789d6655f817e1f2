"""float8: numbers by hand, what is written for TensorRT, what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from graphs import Arrays, graph, onnx_artifact, outputs

from deploycc.backends import _tensorrt_probe as probing
from deploycc.backends import tensorrt as backend
from deploycc.core.compare import drift
from deploycc.core.contract import Context, Dataset
from deploycc.core.data import Data
from deploycc.core.target import Target, load
from deploycc.errors import DataNeeded, NothingToDo, PreconditionError, UnknownName, UnsupportedError
from deploycc.passes.quantize_dynamic import QuantizeDynamic
from deploycc.passes.quantize_float8 import QuantizeFloat8
from deploycc.passes.quantize_qat import QuantizeQat
from deploycc.passes.quantize_static import QuantizeStatic

sys.path.insert(0, str(Path(__file__).parent.parent / "backends"))

H100 = load("h100")
BODY = "(float[4,32] x) => (float[4,16] y) { y = MatMul (x, w) }"
needs_rtx = pytest.mark.skipif(probing.checker() is None, reason="tensorrt_rtx is not installed (extra tensorrt-rtx)")


def context(artifact, rows, target=H100):
    data = Data(None, Dataset("d", {"all": Arrays(rows)})) if rows is not None else Data(None)
    return Context(target, artifact, data, 0, Path())


def product(weight=None):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 16)).astype(np.float32) if weight is None else weight
    return onnx_artifact(graph(BODY, w=weight)), rng.standard_normal((12, 32)).astype(np.float32)


def int8():
    return load("cuda-tensorrt")


def constants(artifact):
    return {name: value.const_value.numpy() for name, value in artifact.model.graph.initializers.items()}


def test_codes_and_scales_by_hand():
    """max |w| of channel 0 is 4.48: s = 0.01; 1.0 / 0.01 = 100 lies between 96 and 104, float8's neighbours: halfway goes to even, 96."""
    weight = np.zeros((32, 16), np.float32)
    weight[0, 0], weight[1, 0] = 4.48, 1.0
    artifact, rows = product(weight)
    rows = np.clip(rows, -2, 2)
    rows[6, 3] = -8.96  # in one call only: s = 8.96 / 448
    found = constants(QuantizeFloat8()(artifact, context(artifact, rows)))
    assert found["w_quantized"].dtype == ml_dtypes.float8_e4m3fn
    assert found["w_quantized"][:2, 0].astype(np.float32).tolist() == [448, 96]
    assert found["w_scale"][0] == pytest.approx(0.01)
    assert found["w_scale"][1] == 1  # nothing but zeros
    assert found["x_scale"] == pytest.approx(0.02)
    assert found["x_zero_point"].dtype == ml_dtypes.float8_e4m3fn


def test_a_large_value_costs_the_small_ones_nothing():
    """float8 against int8 where one channel is 1,000 times the others: the others' answers."""
    artifact, rows = product()
    rows[:, 0] *= 1000
    weight = artifact.model.graph.initializers["w"].const_value.numpy().copy()
    weight[0] = 0
    artifact = onnx_artifact(graph(BODY, w=weight))
    want = [outputs(artifact, {"x": row}) for row in rows.reshape(3, 4, 32)]
    quality = []
    for made, where in ((QuantizeFloat8(), H100), (QuantizeStatic(calibration="minmax"), int8())):
        result = made(artifact, context(artifact, rows, where))
        quality.append(drift(want, [outputs(result, {"x": row}) for row in rows.reshape(3, 4, 32)]).sqnr_db)
    assert quality[0] > 25
    assert quality[1] < 10


def test_the_artifact_says_what_it_is():
    artifact, rows = product()
    found = QuantizeFloat8()(artifact, context(artifact, rows))
    assert (found.quant.weights, found.quant.activations, found.quant.method) == ("float8", "float8", "static")
    assert found.notes[0] == "1 operators in float8, 1 activation scales"
    assert not (set(artifact.model.graph.initializers) - {"w"})  # the model given is not touched


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_the_file_for_tensorrt_is_typed_and_answers_near_float(precision, tmp_path):
    artifact, rows = product()
    found = QuantizeFloat8()(artifact, context(artifact, rows))
    facts = H100.model_dump()
    tables = {"runtime": {**facts["runtime"], "precision": precision}, "engine": {**facts["engine"], "check_seconds": 0}}
    where = Target.model_validate({**facts, **tables})
    built = backend.TensorRt().build(found, where, tmp_path)
    assert (built.coverage.int8_macs, built.coverage.int8_operators) == (1.0, 1)
    want = [outputs(artifact, {"x": row}) for row in rows.reshape(3, 4, 32)]
    with backend.TensorRt().open(built, where, threads=1) as session:
        got = [{"y": session.run({"x": row})["y"].astype(np.float32)} for row in rows.reshape(3, 4, 32)]
    assert drift(want, got).sqnr_db > 25


@needs_rtx
def test_tensorrt_rtx_multiplies_float8(tmp_path):
    artifact, rows = product()
    built = backend.TensorRt().build(QuantizeFloat8()(artifact, context(artifact, rows)), H100, tmp_path)
    assert built.coverage.int8_macs == 1.0
    assert any("SM89: 1 gemm FP8xFP8" in note and "SM120: 1 gemm FP8xFP8" in note for note in built.notes)


def test_codes_of_the_other_type_are_refused(tmp_path):
    artifact, rows = product()
    found = QuantizeFloat8()(artifact, context(artifact, rows))
    with pytest.raises(UnsupportedError, match="float8e4m3fn"):
        backend.TensorRt().build(found, int8(), tmp_path)


def test_refusals():
    artifact, rows = product()
    with pytest.raises(PreconditionError, match=r"target 'cuda-tensorrt' computes in int8, not float8"):
        QuantizeFloat8()(artifact, context(artifact, rows, int8()))
    with pytest.raises(DataNeeded):
        QuantizeFloat8()(artifact, context(artifact, None))
    with pytest.raises(UnknownName, match="skip: the graph has no operator 'nowhere'"):
        QuantizeFloat8(skip=("nowhere",))(artifact, context(artifact, rows))
    with pytest.raises(PreconditionError, match="quantized already"):
        QuantizeFloat8()(replace(QuantizeFloat8()(artifact, context(artifact, rows)), quant=None), context(artifact, rows))
    old = onnx_artifact(graph(BODY, opset=18, w=np.ones((32, 16), np.float32)))
    with pytest.raises(PreconditionError, match="needs opset 19"):
        QuantizeFloat8()(old, context(old, rows))
    single = onnx_artifact(graph("(float[1,32] x) => (float[1,16] y) { y = MatMul (x, w) }", w=np.ones((32, 16), np.float32)))
    with pytest.raises(NothingToDo, match=r"finds nothing to quantize.*single row"):
        QuantizeFloat8()(single, context(single, rows))


@pytest.mark.parametrize(
    ("made", "fix"), [(QuantizeStatic(), "use quantize-float8"), (QuantizeDynamic(), "use quantize-float8"), (QuantizeQat(), "finetune")]
)
def test_passes_of_integers_refuse_a_target_of_float8(made, fix):
    artifact, rows = product()
    if isinstance(made, QuantizeQat):
        artifact = QuantizeFloat8()(artifact, context(artifact, rows))
    with pytest.raises(PreconditionError, match=r"no integer activations|no dynamic form") as error:
        made(artifact, context(artifact, rows))
    assert fix in error.value.fix


@pytest.mark.parametrize(
    ("quant", "hardware", "message"),
    [
        ({"weights": "int8"}, {}, "float8 is for both"),
        ({"placement": "tensorrt"}, {}, "placement = tensorrt takes symmetric int8 only"),
        ({}, {"compute_capability": "8.6"}, r"float8 needs compute capability 8\.9 .*compute_capability is 8\.6"),
        ({}, {"compute_capability": None}, "compute_capability is not said"),
    ],
)
def test_targets_that_have_no_float8_are_refused(quant, hardware, message):
    facts = H100.model_dump()
    with pytest.raises(ValueError, match=message):
        Target.model_validate({**facts, "quant": {**facts["quant"], **quant}, "hardware": {**facts["hardware"], **hardware}})
