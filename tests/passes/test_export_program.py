import pytest
import torch
from graphs import context, digest, outputs
from torch import nn

from deploycc.core.artifact import Artifact, Form
from deploycc.core.compare import drift
from deploycc.core.registry import FORMS
from deploycc.errors import PassError, PostconditionError
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
