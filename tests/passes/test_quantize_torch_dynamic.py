"""Dynamic int8 of linear layers for PyTorch's engines: its arithmetic, what stays in float, what is refused, the ladder, the bundle."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploycc.core.artifact import Artifact, Form, QuantInfo
from deploycc.core.contract import Context
from deploycc.core.data import Data
from deploycc.core.pipeline import Pipeline
from deploycc.core.registry import BACKENDS, FORMS
from deploycc.core.target import load
from deploycc.errors import NothingToDo, PreconditionError, UnknownName
from deploycc.forms.module import capture_signature
from deploycc.passes.quantize_torch import QuantizeTorch
from deploycc.passes.quantize_torch_dynamic import QuantizeTorchDynamic
from deploycc.runtime.signature import TensorSpec

ENGINES = [name for name in ("fbgemm", "qnnpack") if name in torch.backends.quantized.supported_engines]
PASS = QuantizeTorchDynamic()


class Net(nn.Module):
    """A layer, one that is called by two names, a branch that no tracer follows, and attention with weights of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)
        self.again = self.a
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        hidden = self.a(x) + self.again(x.abs())
        if hidden.shape[1] > 3 and hidden.sum() > -1e9:  # symbolic tracing fails here
            hidden = torch.relu(hidden)
        back = self.b(hidden)
        return self.attention(back, back, back, need_weights=False)[0] + back


def captured(module, shape=(1, 5, 16)):
    module = module.eval()
    return Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", shape),)), "test")


def context(artifact, backend=ENGINES[0], **quant):
    facts = load(f"{'x86' if backend == 'fbgemm' else 'arm64'}-{backend}").model_dump()
    target = type(load("x86-fbgemm")).model_validate({**facts, "quant": {**facts["quant"], **quant}})
    return Context(target, artifact, Data(None), 0, Path())


@pytest.fixture(scope="module")
def before():
    torch.manual_seed(0)
    return captured(Net())


def emulated(x, weight, bias, most):
    """What the docstring says, in numpy: (float32 output, one step of the result)."""
    scales = np.abs(weight).max(axis=1) / most
    codes = np.rint(weight / scales[:, None])
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    inputs = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    return inputs @ codes.T * step * scales + bias, step * scales.max() * most


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("reduce_range", "most"), [(False, 127), (True, 63)])
def test_a_layer_multiplies_integers_as_the_manual_says(engine: str, reduce_range: bool, most: int):
    torch.manual_seed(1)
    layer = nn.Linear(32, 8)
    made = captured(nn.Sequential(layer), (4, 32))
    found = PASS(made, context(made, engine, reduce_range=reduce_range))
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32) * 3
    with FORMS.get("module").open(found, threads=1) as session:
        got = session.run({"x": x})["output"]
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    wanted, step = emulated(x, weight, bias, most)
    assert np.abs(got - wanted).max() <= step  # one input value may round the other way
    assert np.mean(np.abs(got - wanted) < 1e-5) > 0.5
    exact = x @ weight.T + bias
    assert 0 < np.abs(got - exact).max() < 0.15
    assert found.quant == QuantInfo("torch-dynamic", "int8", "uint8", True, reduce_range, "none", ())


@pytest.mark.parametrize("engine", ENGINES)
def test_every_name_of_a_shared_layer_is_replaced_and_what_stays_in_float_is_named(before: Artifact, engine: str):
    after = PASS(before, context(before, engine))
    kinds = {name: type(after.model.get_submodule(name)).__module__ for name in ("a", "b", "again")}
    assert all("quantized.dynamic" in kind for kind in kinds.values())
    assert after.model.a is after.model.again
    assert type(before.model.a) is nn.Linear  # the model that came is as it was
    assert after.quant is not None
    assert {name.partition(".")[0] for name, _ in after.quant.left_float} == {"attention"}
    assert "3 linear layers for " in after.notes[0]


def test_layers_can_be_left_in_float(before: Artifact):
    after = QuantizeTorchDynamic(skip=("b",))(before, context(before))
    assert type(after.model.b) is nn.Linear
    assert after.quant is not None
    assert ("b", "it was asked for (skip)") in after.quant.left_float
    with pytest.raises(UnknownName, match="skip: the model has no linear layer 'c'") as raised:
        QuantizeTorchDynamic(skip=("c",))(before, context(before))
    assert "a, b, again" in (raised.value.fix or "")


def test_one_scale_per_tensor_where_the_target_has_it_so(before: Artifact):
    after = PASS(before, context(before, per_channel=False))
    assert after.model.b.weight().qscheme() == torch.per_tensor_affine
    assert PASS(before, context(before)).model.b.weight().qscheme() == torch.per_channel_affine


def test_what_it_cannot_do_is_refused(before: Artifact):
    with pytest.raises(PreconditionError, match="runs on onnxruntime"):
        PASS.requires(before, Context(load("x86-onnxruntime"), before, Data(None), 0, Path()))
    with pytest.raises(PreconditionError, match="quantized already"):
        PASS.requires(PASS(before, context(before)), context(before))
    convolution = captured(nn.Sequential(nn.Conv1d(5, 64, 3), nn.Linear(14, 2)))
    with pytest.raises(PreconditionError, match=r"% of the model's work is in convolutions"):
        PASS.requires(convolution, context(convolution))
    bare = captured(nn.Sequential(nn.ReLU()))
    with pytest.raises(NothingToDo, match="finds no linear layer"):
        PASS(bare, context(bare))
    PASS.requires(before, context(before))  # no data is asked for


def test_the_ladder_tries_it_in_place_of_the_static_pass():
    target = load("x86-fbgemm")
    pipeline = Pipeline.parse("fold-batchnorm, quantize-torch")
    found = QuantizeTorchDynamic.rescue(pipeline, target)
    assert found is not None
    assert str(found) == "fold-batchnorm, quantize-torch-dynamic"
    assert QuantizeTorchDynamic.rescue(Pipeline.parse("fold-batchnorm"), target) is None
    assert QuantizeTorch.name in str(pipeline)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_file_answers_as_the_module_and_counts_its_integers(before: Artifact, tmp_path: Path, engine: str):
    where = context(before, engine)
    after = PASS(before, where)
    backend = BACKENDS.get(engine)
    built = backend.build(after, where.target, tmp_path)
    x = {"x": np.random.default_rng(3).standard_normal((1, 5, 16)).astype(np.float32)}
    with backend.open(built, where.target, threads=1) as file, FORMS.get("module").open(after, threads=1) as module:
        assert np.array_equal(file.run(x)["output"], module.run(x)["output"])
    assert built.coverage.int8_operators == 2  # a shared layer counts once
    assert built.coverage.int8_macs is not None
    assert 0.2 < built.coverage.int8_macs < 1
