"""Dynamic int8 of linear layers for XNNPACK: rows have scales of their own, in the program and in the .pte; what is refused; the ladder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.compare import sqnr_db
from deploycc.core.contract import Context
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.core.registry import FORMS
from deploycc.core.target import load
from deploycc.errors import NothingToDo, PreconditionError, UnknownName
from deploycc.forms.module import capture_signature
from deploycc.passes.export_program import ExportProgram
from deploycc.passes.quantize_pt2e import QuantizePt2e
from deploycc.passes.quantize_pt2e_dynamic import QuantizePt2eDynamic
from deploycc.runtime.signature import TensorSpec

pytest.importorskip("executorch", reason="the extra executorch is not installed")
pytest.importorskip("torchao", reason="the extra executorch is not installed")

TARGET = load("executorch-portable")
PASS = QuantizePt2eDynamic()


class Net(nn.Module):
    """Two layers that read the same, a third with their weight, and a small convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.tied = nn.Linear(16, 24), nn.Linear(16, 24, bias=False), nn.Linear(16, 24)
        self.tied.weight = self.a.weight
        self.conv = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.conv(torch.relu(self.a(x)) * self.b(x) + self.tied(x.abs()))


def program(module, shape=(1, 4, 16)):
    module = module.eval()
    made = Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", shape),)), "test")
    return ExportProgram()(made, context(made))


def context(artifact, *, target=TARGET, **quant):
    facts = target.model_dump()
    target = type(target).model_validate({**facts, "quant": {**facts["quant"], **quant}})
    return Context(target, artifact, Data(None), 0, Path())


@pytest.fixture(scope="module")
def before():
    torch.manual_seed(0)
    return program(Net())


@pytest.fixture(scope="module")
def after(before):
    return PASS(before, context(before))


def rows():
    """Words that are unlike: their ranges differ a hundredfold."""
    return np.random.default_rng(2).standard_normal((1, 4, 16)).astype(np.float32) * np.logspace(-1, 1, 4, dtype=np.float32)[:, None]


def answer(artifact):
    with FORMS.get("program").open(artifact, threads=1) as session:
        return session.run({"x": rows()})["output"]


def nodes(artifact, kind):
    return [node for node in artifact.model.graph.nodes if kind in str(node.target)]


def test_it_is_near_the_float_program_which_it_leaves_alone(before, after):
    digest = before.digest()
    assert PASS(before, context(before)).digest() == after.digest()
    assert before.digest() == digest
    assert after.signature == before.signature
    reason = "only linear layers with a constant weight have a dynamic kernel"
    assert after.quant == QuantInfo("pt2e-dynamic", "int8", "int8", True, False, "none", (("conv", reason),))
    assert after.notes == (
        "3 linear layers in integers, their activations quantized row by row at run time",
        f"left in float: conv: {reason}",
    )


def test_every_row_is_as_exact_as_the_largest(before, after):
    wanted, got = answer(before), answer(after)
    assert min(sqnr_db(wanted[:, row], got[:, row]) for row in range(4)) > 30


def test_tied_weights_are_stored_once_and_the_float_ones_are_gone(after):
    assert len(nodes(after, "choose_qparams_per_token_asymmetric")) == 3
    weights = [value for value in {**after.model.state_dict, **after.model.constants}.values() if value.dtype == torch.int8]
    assert [tuple(value.shape) for value in weights] == [(24, 16), (24, 16)]
    assert max(int(value.abs().max()) for value in weights) == 127
    assert not any(value.dim() == 2 and value.is_floating_point() for value in after.model.state_dict.values())


def test_the_pte_has_a_scale_for_every_row_too(before, after, tmp_path):
    from deploycc.backends.executorch import ExecuTorch

    backend = ExecuTorch()
    built = backend.build(after, TARGET, tmp_path)
    assert built.coverage is not None
    assert built.coverage.int8_operators == 3
    with backend.open(built, TARGET, threads=1) as session:
        got = session.run({"x": rows()})["output"]
    wanted = answer(before)
    assert min(sqnr_db(wanted[:, row], got[:, row]) for row in range(4)) > 30


def test_one_scale_for_a_whole_weight_where_the_target_says_so(before):
    found = PASS(before, context(before, per_channel=False))
    assert found.quant.per_channel is False
    scales = [value for key, value in {**found.model.state_dict, **found.model.constants}.items() if key.endswith("_scale")]
    assert all(len(value.unique()) == 1 for value in scales)
    assert sqnr_db(answer(before), answer(found)) > 25


def test_what_is_to_be_left_in_float_is_left_and_said(before):
    found = replace(PASS, skip=("b",))(before, context(before))
    assert found.notes[0].startswith("2 linear layers")
    assert ("b", "it was asked for (skip)") in found.quant.left_float
    with pytest.raises(UnknownName, match="the program has no layer 'head'"):
        replace(PASS, skip=("head",))(before, context(before))


def test_convolutions_are_sent_to_the_other_pass():
    artifact = program(nn.Conv1d(4, 4, 3))
    with pytest.raises(PreconditionError, match="100% of the model's work is in convolutions") as caught:
        PASS(artifact, context(artifact))
    assert "quantize-pt2e with --calibration" in caught.value.fix


def test_the_work_of_a_transposed_convolution_counts():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.up = nn.Linear(16, 16), nn.ConvTranspose2d(4, 8, 3)

        def forward(self, x):
            return self.up(self.fc(x))

    from deploycc.passes._pt2e_use import convolution_share

    share = convolution_share(program(Up(), (1, 4, 2, 16)).model.graph)
    assert share == pytest.approx(32 * 4 * 8 * 9 / (32 * 4 * 8 * 9 + 8 * 16 * 16))


def test_no_linear_layer_is_nothing_to_do():
    artifact = program(nn.ReLU())
    with pytest.raises(NothingToDo, match=r"finds no linear layer \(no convolution or linear layer\)"):
        PASS.apply(artifact, context(artifact))


def test_a_computed_weight_stays_float():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.ones(16, 16))

        def forward(self, x):
            return nn.functional.linear(self.fc(x), self.w * 2)

    artifact = program(Computed())
    assert [name for name, _ in PASS(artifact, context(artifact)).quant.left_float] == ["linear_1"]


def test_a_quantized_program_is_refused(after):
    with pytest.raises(PreconditionError, match="quantized already"):
        PASS(after, context(after))


def test_the_ladder_takes_it_in_place_of_static():
    found = PASS.rescue(Pipeline.parse("export-program, quantize-pt2e"), TARGET)
    assert [step.body for step in found.steps] == [ExportProgram(), PASS]
    assert PASS.rescue(found, TARGET) is None
    assert QuantizePt2e not in {type(step.body) for step in found.steps}
