import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from deploycc.core.artifact import Artifact, Form
from deploycc.errors import SignatureError, SourceError, StoreError
from deploycc.forms._edits import apply_edits, resize_edit
from deploycc.forms.module import (
    ARCHITECTURE,
    WEIGHTS,
    ModuleForm,
    capture_signature,
    example_feeds,
    example_sizes,
    example_tensors,
    named_outputs,
)
from deploycc.runtime.signature import Signature, TensorSpec

FORM = ModuleForm()


def linear_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def artifact(module: nn.Module, *specs: TensorSpec) -> Artifact:
    return Artifact(Form.MODULE, module, capture_signature(module, specs), "test")


def test_the_digest_is_of_weights_structure_and_attributes():
    same, other_weight, other_attribute = linear_net(), linear_net(), linear_net()
    with torch.no_grad():
        other_weight[0].weight[0, 0] += 1e-6
    other_attribute[1].inplace = True
    assert FORM.digest(linear_net()) == FORM.digest(same)
    assert FORM.digest(same) != FORM.digest(other_weight)
    assert FORM.digest(same) != FORM.digest(other_attribute)


def test_the_digest_sees_buffers_that_are_not_saved():
    def make(value: float) -> nn.Module:
        module = linear_net()
        module.register_buffer("offset", torch.full((2,), value), persistent=False)
        return module

    assert FORM.digest(make(1.0)) == FORM.digest(make(1.0))
    assert FORM.digest(make(1.0)) != FORM.digest(make(2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool])
def test_the_digest_takes_any_dtype(dtype: torch.dtype):
    def make(value: float) -> nn.Module:
        module = nn.Module()
        module.register_buffer("x", torch.full((3,), value).to(dtype))
        return module

    assert FORM.digest(make(0.0)) == FORM.digest(make(0.0))
    assert FORM.digest(make(0.0)) != FORM.digest(make(1.0))


def test_stats_count_weights_and_macs_of_one_sample():
    stats = FORM.stats(artifact(linear_net(), TensorSpec("x", "float32", ("N", 4))))
    assert stats.parameters == 4 * 8 + 8 + 8 * 3 + 3
    assert stats.bytes == 4 * stats.parameters
    assert stats.macs == 4 * 8 + 8 * 3


def test_macs_are_unknown_for_a_model_that_does_not_run():
    module = linear_net()
    made = artifact(module, TensorSpec("x", "float32", (1, 4)))
    broken = Artifact(Form.MODULE, module, Signature((TensorSpec("x", "float32", (1, 5)),), made.signature.outputs), "test")
    assert FORM.stats(broken).macs is None


def test_a_module_that_its_edits_do_not_tell_is_not_stored(tmp_path):
    made = artifact(linear_net(), TensorSpec("x", "float32", (1, 4)))
    assert not FORM.storable(made)
    with pytest.raises(StoreError, match="pickle"):
        FORM.save(made, tmp_path)


def resized(base: Artifact) -> Artifact:
    """The same net with 5 hidden channels."""
    module = copy.deepcopy(base.model)
    first, last = module[0], module[2]
    first.weight, first.bias, first.out_features = nn.Parameter(first.weight[:5]), nn.Parameter(first.bias[:5]), 5
    last.weight, last.in_features = nn.Parameter(last.weight[:, :5]), 5
    return base.evolve(module, edits=(*base.edits, resize_edit(base.model, module)))


def test_a_resized_module_is_rebuilt_from_json_and_safetensors(tmp_path):
    base = replace(artifact(linear_net(), TensorSpec("x", "float32", (1, 4))), edits=())
    small = resized(base)
    assert small.edits[0]["layers"]["0"] == {"attributes": {"out_features": 5}, "tensors": {"weight": [5, 4], "bias": [5]}}
    FORM.save(small, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ARCHITECTURE, WEIGHTS}
    loaded = FORM.load(tmp_path, base)
    assert FORM.digest(loaded) == FORM.digest(small.model)
    assert base.model[0].out_features == 8
    assert FORM.digest(FORM.load(tmp_path, small)) == FORM.digest(small.model)  # it has the edit already


def test_a_module_of_another_history_or_shape_is_refused(tmp_path):
    base = replace(artifact(linear_net(), TensorSpec("x", "float32", (1, 4))), edits=())
    small = resized(base)
    FORM.save(base, tmp_path)
    with pytest.raises(StoreError, match="does not continue"):
        FORM.load(tmp_path, small)
    other = replace(
        artifact(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), TensorSpec("x", "float32", (1, 4))), edits=()
    )
    with pytest.raises(StoreError, match="do not fit"):
        FORM.load(tmp_path, other)


def test_edits_that_cannot_be_made_are_refused():
    with pytest.raises(StoreError, match="kind 'fold'"):
        apply_edits(linear_net(), [{"kind": "fold"}])
    with pytest.raises(StoreError, match="no module 'head'"):
        apply_edits(linear_net(), [{"kind": "resize", "layers": {"head": {"attributes": {}, "tensors": {}}}}])
    with pytest.raises(StoreError, match="no tensor 'scale'"):
        apply_edits(linear_net(), [{"kind": "resize", "layers": {"0": {"attributes": {}, "tensors": {"scale": [1]}}}}])


def test_a_resize_tells_nothing_but_sizes():
    with pytest.raises(ValueError, match="the modules differ: 3"):
        resize_edit(linear_net(), nn.Sequential(*linear_net(), nn.ReLU()))
    with pytest.raises(ValueError, match="'1' was a ReLU and is a Sigmoid"):
        resize_edit(linear_net(), nn.Sequential(linear_net()[0], nn.Sigmoid(), linear_net()[2]))


def test_a_session_runs_by_name_and_leaves_the_feeds_alone():
    module = nn.Sequential(nn.ReLU(inplace=True), linear_net()).eval()
    made = artifact(module, TensorSpec("x", "float32", (2, 4)))
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    kept = x.copy()
    x.setflags(write=False)  # as read from a memory-mapped file
    with FORM.open(made, threads=1) as session:
        outputs = session.run({"x": x})
        session.synchronize()
        with pytest.raises(SignatureError, match="inputs are x"):
            session.run({"y": x})
    np.testing.assert_array_equal(x, kept)
    np.testing.assert_allclose(outputs["output"], module(torch.from_numpy(kept)).detach().numpy())
    assert torch.get_num_threads() == 1


def test_describe_and_operators_name_the_leaves():
    assert "Linear" in FORM.describe(linear_net())
    assert FORM.operators(linear_net()) == ["Linear", "ReLU", "Linear"]


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (torch.zeros(1), ["output"]),
        ((torch.zeros(1), torch.zeros(2)), ["output_0", "output_1"]),
        ({"boxes": torch.zeros(1), "scores": torch.zeros(2)}, ["boxes", "scores"]),
        ({"a": (torch.zeros(1), None), "b": torch.zeros(2)}, ["output_0", "output_1"]),
        ([(torch.zeros(1),)], ["output"]),
    ],
)
def test_outputs_get_names(result, names):
    assert [name for name, _ in named_outputs(result)] == names


@pytest.mark.parametrize(
    ("result", "said"), [(None, "returns nothing"), ("text", "returns str"), ((torch.zeros(1), 3), "returns Tensor, int")]
)
def test_outputs_that_are_not_tensors(result, said):
    with pytest.raises(SourceError, match=said):
        named_outputs(result)


def test_outputs_that_numpy_cannot_hold():
    with pytest.raises(SourceError, match="'output' is bfloat16"):
        named_outputs(torch.zeros(1, dtype=torch.bfloat16))


def test_example_feeds_fit_and_repeat():
    signature = Signature((TensorSpec("x", "float32", ("N", 3)), TensorSpec("ids", "int64", (2, "T"))), ())
    feeds = example_feeds(signature, {"T": 7})
    assert feeds["x"].shape == (2, 3)
    assert feeds["ids"].shape == (2, 7)
    assert feeds["ids"].dtype == np.int64
    np.testing.assert_array_equal(feeds["x"], example_feeds(signature, {"T": 7})["x"])
    assert [tuple(item.shape) for item in example_tensors(signature)] == [(2, 3), (2, 2)]


class Mixed(nn.Module):
    """Outputs whose axes follow the batch, the length, their product, and neither."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"same": x * 2, "flat": x.flatten(0, 1), "fixed": x.sum((0, 1)), "half": x[:, ::2]}


def test_named_axes_are_found_in_the_outputs():
    signature = capture_signature(Mixed().eval(), (TensorSpec("x", "float32", ("N", "T", 4)),))
    assert {spec.name: spec.shape for spec in signature.outputs} == {
        "same": ("N", "T", 4),
        "flat": ("flat_0", 4),
        "fixed": (4,),
        "half": ("N", "half_1", 4),
    }


def test_a_larger_example_is_tried_for_named_sides():
    net = nn.Conv2d(3, 4, 9).eval()
    inputs = (TensorSpec("image", "float32", ("N", 3, "H", "W")),)
    assert example_sizes(net, inputs) == {"N": 2, "H": 32, "W": 32}
    assert capture_signature(net, inputs).outputs[0].shape == ("N", 4, "output_2", "output_3")


def test_no_size_that_works():
    with pytest.raises(SourceError, match=r"does not run on x: float32\[1, T\] with T = 224: RuntimeError"):
        capture_signature(nn.Linear(5, 2).eval(), (TensorSpec("x", "float32", (1, "T")),))


def test_a_wrong_shape_keeps_the_models_own_error():
    with pytest.raises(SourceError, match=r"does not run on x: float32\[1, 5\]") as caught:
        capture_signature(linear_net(), (TensorSpec("x", "float32", (1, 5)),))
    assert isinstance(caught.value.__cause__, RuntimeError)


class Rank(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] == 2 else x[None]


def test_an_output_whose_rank_follows_the_size():
    with pytest.raises(SourceError, match="has 2 axes when N is 2, and 3 when it is 3"):
        capture_signature(Rank().eval(), (TensorSpec("x", "float32", ("N", 4)),))
