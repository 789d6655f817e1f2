"""What a training is fed: shares of batches, held-out samples, augmentation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from training_rows import QUICK, Rows, artifact, context

from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Sample
from deploycc.errors import PreconditionError
from deploycc.forms.module import capture_signature
from deploycc.passes._feeder import Feeder, shift_and_flip
from deploycc.passes._training_pass import TrainingOptions
from deploycc.passes.finetune import Finetune
from deploycc.runtime.signature import TensorSpec
from deploycc.runtime.transform import Transform


def test_every_process_gets_its_share_of_the_same_batches():
    made, options = artifact(), TrainingOptions(batch=32)
    feeder = Feeder(made, context(made), options)
    whole = [batch.inputs[0] for batch in feeder.epoch(3)]
    shares = [[batch.inputs[0] for batch in feeder.epoch(3, rank, 2)] for rank in (0, 1)]
    assert len(whole) == feeder.steps(2) == len(feeder.train) // 32
    for batch, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(batch, torch.cat([first, second]))
    assert not torch.equal(whole[0], next(iter(feeder.epoch(4))).inputs[0])


def test_held_out_samples_are_not_trained_on():
    made, options = artifact(), TrainingOptions(batch=16, holdout=0.25)
    feeder = Feeder(made, context(made), options)
    assert (len(feeder.train), len(feeder.held)) == (192, 64)
    assert not set(feeder.train.indices) & set(feeder.held.indices)
    assert sum(len(batch.inputs[0]) for batch in feeder.held_out()) == 64


class Rngs:
    """Stands for random.Random: gives what it was told."""

    def __init__(self, down, right, mirrored):
        self.draws, self.mirrored = iter([down, right]), mirrored

    def randint(self, low, high):
        return next(self.draws)

    def random(self):
        return 0.0 if self.mirrored else 1.0


def test_a_shift_and_a_mirror_move_pixels_where_they_should():
    x = torch.arange(2 * 64.0).reshape(2, 1, 8, 8)
    same = shift_and_flip(x, [Rngs(1, 1, False), Rngs(1, 1, True)], shift=True, flip=True, channels_last=False)
    assert torch.equal(same[0], x[0])
    assert torch.equal(same[1], x[1].flip(-1))
    moved = shift_and_flip(x, [Rngs(2, 1, False), Rngs(1, 0, False)], shift=True, flip=True, channels_last=False)
    assert torch.equal(moved[0, 0, :7], x[0, 0, 1:])
    assert torch.equal(moved[1, 0, :, 1:], x[1, 0, :, :7])
    last = shift_and_flip(x.movedim(1, -1), [Rngs(1, 1, True)] * 1 + [Rngs(1, 1, True)], shift=True, flip=True, channels_last=True)
    assert torch.equal(last.movedim(-1, 1), x.flip(-1))


def test_augmentation_needs_pictures():
    with pytest.raises(PreconditionError, match="augment=flip needs pictures"):
        Finetune(**QUICK, augment="flip")(artifact(), context())


class Pictures(Rows):
    """A bright left half in class 0, a bright right half in class 1, 40×40."""

    def __getitem__(self, index):
        image = np.zeros((40, 40), np.uint8)
        image[:, :20] = 255
        return Sample(image, (0,), f"picture {index}")

    def label(self, index):
        return (0,)


def test_large_pictures_are_cropped_and_mirrored_through_the_declared_transform():
    module = nn.Sequential(nn.Flatten(), nn.Linear(400, 2)).eval()
    transform = Transform(resize=24, crop=(20, 20), color="L", mean=(0.5,), std=(0.5,))
    made = Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", (1, 1, 20, 20)),)), "p", transform=transform)
    ready = context(made, Pictures(64))
    batch = next(iter(Feeder(made, ready, TrainingOptions(batch=32, augment="standard")).epoch(0)))
    assert batch.inputs[0].shape == (32, 1, 20, 20)
    assert batch.inputs[0].min() == -1.0
    assert batch.inputs[0].max() == 1.0
    left = batch.inputs[0][:, 0, :, 0].mean(1)
    assert 0 < int((left < 0).sum()) < 32  # some are mirrored
    edges = {int((row > 0).sum()) for row in batch.inputs[0][:, 0, 10]}
    assert len(edges) > 2  # and they are different parts
    again = next(iter(Feeder(made, ready, TrainingOptions(batch=32, augment="standard")).epoch(0)))
    assert torch.equal(batch.inputs[0], again.inputs[0])


def test_a_model_without_a_batch_axis_is_refused():
    made = artifact()
    scalar = replace(made, signature=replace(made.signature, inputs=(TensorSpec("x", "float32", ()),)))
    with pytest.raises(PreconditionError, match="no batch axis"):
        Feeder(scalar, context(), TrainingOptions())
