"""The builder in a process of its own: what its log says, what a crash or a hang becomes."""

from pathlib import Path

import pytest

from deploycc.backends import _tensorrt_probe as probing
from deploycc.errors import BundleError
from deploycc.runtime.tensorrt_engine import Recipe

# Two lines of TensorRT-RTX 1.7.1's log (shortened), and one of a product of two activations.
LOG = """Layers:
Name: __myl_MulMinMaxRounCastConc_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,3,8,8], Datatype: Float, Format: (Linear) }], Constants: [ { Name: k, Dimensions: [1], Datatype: Float, Format: (Linear) }], Outputs: [ { Name: o, Dimensions: [1,4,8,8], Datatype: Int8, Format: (NHWC) }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: x_QuantizeLinear][ONNX Layer: conv1]
Name: conv1_myl0_1, LayerType: correlation, Inputs: [ { Name: o, Datatype: Int8, Format: (NHWC) }], Constants: [ { Name: w, Datatype: Int8, Format: f }, { Name: s, Datatype: Float, Format: f }], Outputs: [ { Name: c, Datatype: Half, Format: f }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv1][ONNX Layer: w_DequantizeLinear]
Name: mm_myl0_2, LayerType: gemm, Inputs: [ { Name: a, Datatype: Half, Format: f }, { Name: b, Datatype: Half, Format: f }], Outputs: [ { Name: y, Datatype: Half, Format: f }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: mm]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float, Dimensions: [1,3,8,8]
"""
FAKE = """
__version__ = "0.0"
class ILogger:
    pass
class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 0
class Builder:
    def __init__(self, log):
        {body}
"""


def test_layers_are_read_from_the_log():
    first, second, third = probing.layers(LOG)
    assert (first.kind, first.gives, first.multiplies) == ("kgen", ("Int8",), False)
    assert (second.operands, second.gives, second.sources) == ("Int8xInt8", ("Half",), ("conv1", "w_DequantizeLinear"))
    assert third.operands == "HalfxHalf"
    found = probing.Probe("SM89", "1.7", "", 0.1, 10, (first, second, third))
    assert found.requantized == 1
    moved = probing.Layer("pool", "maxpool", ("Int8",), (), ("Int8",), ())
    summed = probing.Layer("add", "kgen", ("Int8", "Half"), ("Float",), ("Int8", "Half"), ())
    fused = probing.Layer("conv", "correlation", ("Int8",), ("Int8",), ("Int8",), ())
    twice = probing.Layer("__myl_MulMinMaxRounCastCastAddMulMinMaxRoun", "kgen", ("Float", "Float"), (), ("Int8",), ())
    assert [layer.roundings for layer in (moved, summed, fused, second, twice)] == [0, 1, 1, 0, 2]
    assert found.operands == {"correlation Int8xInt8": 1, "gemm HalfxHalf": 1}
    assert [found.operands_of(name) for name in ("conv1", "mm", "nothing")] == ["Int8xInt8", "HalfxHalf", probing.COMPILED]


def fake(folder: Path, monkeypatch, body: str) -> str:
    (folder / "fake_tensorrt.py").write_text(FAKE.format(body=body))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "fake_tensorrt"


def test_a_crash_is_a_finding(tmp_path, monkeypatch):
    module = fake(tmp_path, monkeypatch, "import os, sys; sys.stderr.write('before the end'); sys.stderr.flush(); os.abort()")
    found = probing.probe(tmp_path / "m.onnx", Recipe(), "SM89", seconds=30, module=module)
    assert not found.built
    assert found.error == "the builder crashed (SIGABRT): before the end"
    assert probing.refusals([found]) == ["SM89: the builder crashed (SIGABRT): before the end"]


def test_a_builder_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    module = fake(tmp_path, monkeypatch, "import time; time.sleep(60)")
    found = probing.probe(tmp_path / "m.onnx", Recipe(), "SM86", seconds=1, module=module)
    assert found.error == "the builder was not finished after 1 s and was stopped"


def test_an_exit_without_an_answer_is_a_finding(tmp_path, monkeypatch):
    module = fake(tmp_path, monkeypatch, "raise SystemExit(3)")
    assert probing.probe(tmp_path / "m.onnx", Recipe(), "SM86", seconds=30, module=module).error.startswith(
        "the builder crashed (exit status 3)"
    )


def test_whether_it_is_here_imports_nothing(monkeypatch):
    monkeypatch.setattr(probing.importlib.util, "find_spec", lambda name: None)
    assert probing.checker() is None
    monkeypatch.setattr(probing.importlib.util, "find_spec", lambda name: name)

    def missing(name):
        raise probing.PackageNotFoundError(name)

    monkeypatch.setattr(probing, "version", missing)
    assert probing.checker() == "of unknown version"


def test_a_recipe_goes_through_the_manifest():
    recipe = Recipe("f16", profiles={"x": ((1, 3), (2, 3), (4, 3))}, workspace_mb=64, version_compatible=True, capabilities=("SM89",))
    assert Recipe.parse(recipe.text()) == recipe
    for wrong in ("", "{}", '{"profiles": 3}', "[]"):
        with pytest.raises(BundleError, match="how the engine is built"):
            Recipe.parse(wrong)


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (Recipe(), "trtexec --onnx=m.onnx --stronglyTyped --noTF32 --builderOptimizationLevel=3 --saveEngine=model.plan"),
        (
            Recipe("f16", profiles={"x": ((1, 3), (2, 3), (4, 3))}, workspace_mb=64, hardware_compatibility="ampere-plus", version_compatible=True),
            (
                "trtexec --onnx=m.onnx --stronglyTyped --minShapes=x:1x3 --optShapes=x:2x3 --maxShapes=x:4x3 --memPoolSize=workspace:64 "
                "--builderOptimizationLevel=3 --hardwareCompatibilityLevel=ampere+ --versionCompatible --saveEngine=model.plan"
            ),
        ),
        (Recipe("f16", typed=False), "trtexec --onnx=m.onnx --int8 --fp16 --saveEngine=model.plan"),
    ],
)  # fmt: skip
def test_the_same_by_hand(recipe, line):
    assert recipe.trtexec("m.onnx") == line
