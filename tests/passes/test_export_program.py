import numpy as np
import pytest
import torch
from graphs import context, digest, graph, onnx_artifact, outputs
from torch import nn

from deploycc.core.artifact import Artifact, Form
from deploycc.core.compare import drift
from deploycc.core.registry import FORMS
from deploycc.errors import PassError, PostconditionError, PreconditionError
from deploycc.forms.module import capture_signature
from deploycc.forms.program import input_shapes
from deploycc.passes.export_program import ExportProgram
from deploycc.planning import Options, plan
from deploycc.runtime.signature import TensorSpec

EXPORT = ExportProgram()


def artifact(module, *shapes):
    torch.manual_seed(0)
    specs = tuple(TensorSpec(f"x{index}", "float32", shape) for index, shape in enumerate(shapes))
    return Artifact(Form.MODULE, module.eval(), capture_signature(module.eval(), specs), "test")


def exported(before):
    return EXPORT(before, context(before))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, y):
        return {"sum": self.fc(x + y), "same": (x, None)[0] * 1.0}


def test_a_program_of_the_same_signature_and_numbers_and_the_module_is_left_alone(tmp_path):
    before = artifact(Named(), ("n", 4), ("n", 4))
    kept = digest(before)
    after = exported(before)
    assert digest(before) == kept
    assert after.form is Form.PROGRAM
    assert after.signature == before.signature
    assert [shape[1] for shape in input_shapes(after.model)] == [4, 4]
    assert all(isinstance(shape[0], str) for shape in input_shapes(after.model))
    assert drift([outputs(before)], [outputs(after)]).relative < 1e-6
    FORMS.get("program").save(after, tmp_path)
    again = after.evolve(FORMS.get("program").load(tmp_path, after))
    assert again.digest() == after.digest()
    assert drift([outputs(before)], [outputs(again)]).relative < 1e-6


def test_a_fixed_model_stays_fixed():
    assert input_shapes(exported(artifact(nn.Linear(4, 3), (1, 4))).model) == [(1, 4)]


def test_a_branch_on_a_value_is_refused_with_its_line():
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(PassError, match="does not export to a program: ") as caught:
        exported(artifact(Branch(), (2, 4)))
    assert "test_export_program.py" in caught.value.what
    assert "branches on a tensor's values" in caught.value.fix


def test_an_axis_that_the_code_fixes_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x * 2.0 if int(x.shape[0]) == 2 else x - 1.0

    with pytest.raises(PostconditionError) as caught:
        exported(artifact(Fixed(), ("n", 4)))
    assert "axis 'n' of 'x0' should take any size, but the program only takes 2" in caught.value.what


def test_numbers_that_a_program_does_not_repeat_are_refused():
    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(PostconditionError, match="export-program moved the outputs"):
        exported(artifact(Random(), (2, 4)))


@pytest.mark.parametrize(("model", "pipeline"), [("x.py:make", "fold-batchnorm, export-program"), ("x.pt2", "")])
def test_a_program_from_a_file_needs_no_export(model, pipeline):
    planned = plan(model, Options(target="x86-inductor"))
    assert str(planned.pipeline) == pipeline


def rounded(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_an_onnx_graph_becomes_a_program_of_linear_layers_and_clips():
    body = """(float[1,3,8,8] x) => (float[1,4] scores, float[1,6] other) {
        c = Conv <strides = [2, 2], pads = [0, 0, 1, 1]> (x, w, b)
        r = Clip (c, zero, six)
        p = GlobalAveragePool (r)
        s = Shape (p)
        n = Slice (s, start, end)
        shape = Concat <axis = 0> (n, rest)
        f = Reshape (p, shape)
        scores = Gemm (f, g, h)
        other = MatMul (f, m)
    }"""
    weights = {
        "w": rounded(5, 3, 3, 3), "b": rounded(5), "zero": np.float32(0), "six": np.float32(6), "start": np.array([0]), "end": np.array([1]),
        "rest": np.array([-1]), "g": rounded(5, 4), "h": rounded(4), "m": rounded(5, 6),
    }  # fmt: skip
    before = onnx_artifact(graph(body, **weights))
    kept = digest(before)
    after = exported(before)
    assert digest(before) == kept
    assert after.form is Form.PROGRAM
    assert after.signature == before.signature
    found = [str(node.target) for node in after.model.graph.nodes if node.op == "call_function"]
    assert found.count("aten.linear.default") == 2
    assert found.count("aten.hardtanh.default") == 1
    assert "aten.matmul.default" not in found
    assert list(outputs(after)) == ["scores", "other"]
    assert drift([outputs(before)], [outputs(after)]).relative < 1e-6


def test_products_that_are_no_linear_layer_stay_products():
    body = """(float[2,3] x, float[3,4] y) => (float[2,4] a, float[2,4] b, float[2,3] c) {
        a = MatMul (x, y)
        b = Gemm <alpha = 2.0> (x, w, v)
        c = Clip (x, low)
    }"""
    before = onnx_artifact(graph(body, w=rounded(3, 4), v=rounded(4), low=np.float32(0)))
    after = exported(before)
    assert "aten.linear.default" not in [str(node.target) for node in after.model.graph.nodes]
    assert drift([outputs(before)], [outputs(after)]).relative < 1e-6


def test_one_matrix_in_two_products_is_turned_once():
    body = "(float[2,3] x) => (float[2,3] y) { h = MatMul (x, w) y = MatMul (h, w) }"
    before = onnx_artifact(graph(body, w=rounded(3, 3)))
    after = exported(before)
    assert len(after.model.constants) + len(after.model.state_dict) == 1
    assert drift([outputs(before)], [outputs(after)]).relative < 1e-6


def test_an_onnx_graph_with_a_free_axis_is_refused_with_the_shape_to_give():
    before = onnx_artifact(graph("(float[N,3] x) => (float[N,3] y) { y = Relu (x) }"))
    with pytest.raises(PreconditionError, match="a program of it has fixed shapes") as caught:
        exported(before)
    assert caught.value.fix == "give the shape, such as --input x:1x3"


def test_an_onnx_graph_without_a_torch_form_names_the_targets_that_take_it():
    before = onnx_artifact(graph("(float[1,3] x) => (float[1,3] y) { y = Hardmax (x) }"))
    with pytest.raises(PreconditionError, match="has no torch form: there is none of its operators Hardmax") as caught:
        EXPORT(before, context(before, arch="aarch64"))
    assert "arm64-onnxruntime" in caught.value.fix
    assert "xnnpack" not in caught.value.fix
    with pytest.raises(PreconditionError) as caught:
        EXPORT(before, context(before, arch="any"))
    assert "onnxruntime-portable" in caught.value.fix


def test_what_depends_on_the_data_is_refused_with_its_reason():
    before = onnx_artifact(graph("(float[4] x, int64[1] n) => (float[M] y) { y = Reshape (x, n) }"))
    with pytest.raises(PassError, match="does not become a program: ") as caught:
        EXPORT(before, context(before, arch="aarch64"))
    assert "arm64-onnxruntime" in caught.value.fix


def test_where_no_target_takes_onnx_a_module_is_asked_for(monkeypatch):
    from deploycc.passes import export_program

    monkeypatch.setattr(export_program, "neighbours", lambda target, form: ())
    before = onnx_artifact(graph("(float[1,3] x) => (float[1,3] y) { y = Hardmax (x) }"))
    with pytest.raises(PreconditionError) as caught:
        exported(before)
    assert caught.value.fix == "give the model as a PyTorch module"
