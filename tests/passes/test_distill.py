"""Distillation: its loss by hand, what a student learns, and teachers that cannot teach it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_rows import QUICK, Rows, artifact, context, net, top1

from deploycc.core.artifact import Form
from deploycc.errors import PreconditionError, SourceError
from deploycc.passes._distilling import distil, recover
from deploycc.passes._losses import distillation
from deploycc.passes._training_pass import TrainingOptions
from deploycc.passes.distill import Distill
from deploycc.passes.finetune import Finetune


def test_the_distillation_loss_is_the_hand_computed_one_in_its_direction():
    student, teacher, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(9.0) * 2, 0.0]]), 2.0
    p, q = (0.9, 0.1), (0.5, 0.5)  # softmax(logits / 2) of the teacher and of the student
    forward = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    backward = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert distillation(student, teacher, t).item() == pytest.approx(4 * forward, rel=1e-5)
    assert abs(4 * forward - 4 * backward) > 0.1  # the other direction would be seen


def test_the_distillation_loss_is_a_mean_over_the_batch_and_lets_no_gradient_into_the_teacher():
    student, teacher = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5, requires_grad=True)
    one = distillation(student, teacher, 3.0)
    two = distillation(student.repeat(4, 1), teacher.repeat(4, 1), 3.0)
    assert two.item() == pytest.approx(one.item(), rel=1e-5)
    one.backward()
    assert teacher.grad is None
    assert student.grad is not None


def teacher():
    return Finetune(epochs=12, batch=32, lr=0.1)(artifact(net(32)), context())


def test_a_student_learns_from_the_teacher_without_labels():
    guide = teacher()
    student = artifact(net(8, seed=3))
    after = Distill(**QUICK)(student, context(guide, Rows(labelled=False)))
    assert top1(after) > 0.85 > top1(student)
    assert after.details["curves"][-1]["name"] == "agreement"
    assert after.details["teacher"] == "net"


def test_mixed_precision_compares_outputs_in_float():
    guide = teacher()
    after = Distill(**QUICK, precision="bf16")(artifact(net(8, seed=3)), context(guide))
    assert top1(after) > 0.85


def test_another_student_and_teacher_by_name():
    guide, small = teacher(), artifact(net(4, seed=5), "small")
    known = {"small": small, "guide": guide}
    after = Distill(**QUICK, student="small", teacher="guide")(artifact(), context(capture=known.__getitem__))
    assert after.source == "small"
    assert after.model[0].out_features == 4
    assert top1(after) > 0.8
    with pytest.raises(PreconditionError, match="cannot be captured here"):
        Distill(**QUICK, student="small")(artifact(), context())


def test_features_and_attention_add_to_the_loss_and_their_maps_do_not_stay():
    guide, student = teacher(), artifact(net(8, seed=3))
    plain = Distill(**QUICK)(student, context(guide))
    after = Distill(**QUICK, features=("0:0",))(student, context(guide))
    assert list(after.model.state_dict()) == list(student.model.state_dict())
    assert after.details["curves"][0]["loss"] > plain.details["curves"][0]["loss"]
    assert top1(after) > 0.85
    with pytest.raises(PreconditionError, match="the student has no layer 'stem'"):
        Distill(**QUICK, features=("stem:0",))(student, context(guide))
    with pytest.raises(PreconditionError, match="attention=0:0: one gives"):
        Distill(**QUICK, attention=("0",))(student, context(guide))


def conv_artifact(width, stride=1):
    torch.manual_seed(width)
    module = nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)), nn.Conv2d(1, width, 1, stride), nn.Tanh(), nn.Flatten(), nn.Linear(width * 2 // stride, 4)
    )
    return artifact(module)


def test_attention_maps_are_drawn_to_the_teachers():
    from deploycc.passes._distilling import _attention

    x = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]], [[0.0, 5.0]]]])  # mean squares (25/3, 25/3)
    assert _attention(x)[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    guide, student = conv_artifact(8), conv_artifact(4)

    def distance(made):
        feeds = torch.from_numpy(Rows(64, 5).x)
        with torch.no_grad():
            return (_attention(made.model[:3](feeds)) - _attention(guide.model[:3](feeds))).square().sum(1).mean().item()

    after = Distill(**QUICK, attention=("2",), attention_weight=20.0)(student, context(guide))
    assert distance(after) < 0.5 * distance(student)
    with pytest.raises(PreconditionError, match="features=2:4: one gives"):
        Distill(**QUICK, features=("2:4",))(student, context(guide))


def test_a_teacher_with_other_classes_or_of_another_form_is_refused():
    with pytest.raises(PreconditionError, match=r"gives \[1, 3\], the student net \[1, 4\]"):
        Distill(**QUICK)(artifact(), context(artifact(net(classes=3))))
    graph = replace(artifact(), form=Form.ONNX)
    with pytest.raises(PreconditionError, match="ONNX graph, which cannot teach"):
        Distill(**QUICK)(artifact(), context(graph))
    with pytest.raises(PreconditionError, match="ONNX graph, which cannot teach"):
        distil(artifact(), graph, TrainingOptions(), context(), what="t")


def test_recovery_is_a_short_distillation():
    guide = teacher()
    hurt = net(32)
    hurt.load_state_dict(guide.model.state_dict())
    with torch.no_grad():
        hurt[3].weight.mul_(torch.rand_like(hurt[3].weight))
    before = artifact(hurt)
    after = recover(before, context(guide), step=1, epochs=3)
    assert top1(after) > top1(before)
    assert after.edits == ()


def test_a_model_that_cannot_be_had_is_the_sources_error():
    def missing(text):
        raise SourceError(f"there is no {text}", fix="correct it")

    with pytest.raises(SourceError, match="there is no small"):
        Distill(**QUICK, student="small")(artifact(), context(capture=missing))
