from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploycc.core import target as targets
from deploycc.core.artifact import Artifact, Form
from deploycc.core.contract import Context
from deploycc.core.data import Data
from deploycc.errors import NothingToDo
from deploycc.forms.module import ModuleForm, capture_signature
from deploycc.passes.fold_padding import FoldPadding
from deploycc.runtime.signature import TensorSpec


def artifact(module, size=(16, 16), channels=8):
    module = module.eval()
    return Artifact(Form.MODULE, module, capture_signature(module, (TensorSpec("x", "float32", (1, channels, *size)),)), "test")


def folded(before, **options):
    context = Context(targets.load("x86-fbgemm"), before, Data(None), 0, Path())
    return FoldPadding(**options)(before, context)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def drift(before, after):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=before.signature.inputs[0].shape).astype(np.float32))
    with torch.no_grad():
        want, got = before.model(x), after.model(x)
    assert want.shape == got.shape
    return float((want - got).abs().max() / want.abs().max())


def depthwise(kernel, stride, padding=0, channels=8, dilation=1):
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels)


@pytest.mark.parametrize(
    ("pads", "kernel", "stride", "size", "becomes"),
    [
        ((0, 1, 0, 1), 3, 2, (16, 16), (5, 2)),  # TensorFlow's "same", even size
        ((1, 1, 1, 1), 3, 2, (15, 15), (3, 1)),  # TensorFlow's "same", odd size
        ((1, 2, 1, 2), 5, 2, (16, 16), (7, 3)),
        ((1, 1, 1, 1), 3, 1, (16, 16), (3, 1)),
        ((2, 2, 2, 2), 5, 1, (9, 13), (5, 2)),
        ((1, 0, 1, 0), 2, 1, (16, 16), (3, 1)),  # an even kernel
        ((0, 1, 1, 1), 3, 2, (15, 16), (5, 2)),  # one axis symmetric, the other not
        ((0, 2, 0, 2), 3, 1, (16, 16), (5, 2)),
        ((0, 0, 1, 1), (3, 1), 1, (16, 16), (3, 1)),  # a square kernel for an oblong one: the zeros cost nothing
    ],
)
def test_a_depthwise_convolution_takes_its_padding_in(pads, kernel, stride, size, becomes):
    before = artifact(nn.Sequential(nn.ZeroPad2d(pads), depthwise(kernel, stride)), size)
    after = folded(before)
    (conv,) = convolutions(after.model)
    assert (conv.kernel_size, conv.padding) == ((becomes[0],) * 2, (becomes[1],) * 2)
    assert not any(isinstance(module, nn.ConstantPad2d) for module in after.model.modules())
    assert drift(before, after) < 1e-6


def test_padding_of_the_convolution_itself_is_added():
    before = artifact(nn.Sequential(nn.ZeroPad2d(1), depthwise(5, 1, padding=1)))
    after = folded(before)
    assert convolutions(after.model)[0].padding == (2, 2)
    assert drift(before, after) < 1e-6


def test_functional_padding_and_a_convolution_with_its_own_forward():
    class Same(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    before = artifact(nn.Sequential(Same(8, 16, 3, 2, groups=8), nn.ReLU(), nn.Conv2d(16, 4, 1)))
    after = folded(before)
    assert [conv.kernel_size for conv in convolutions(after.model)] == [(5, 5), (1, 1)]
    assert drift(before, after) < 1e-6
    assert after.notes == ("1 paddings folded into convolutions, 1 of them by embedding a depthwise kernel in a larger one",)


def test_a_dense_convolution_takes_symmetric_padding_and_leaves_the_other():
    net = nn.Sequential(nn.ZeroPad2d((1, 1, 1, 1)), nn.Conv2d(8, 8, 3), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, 2))
    before = artifact(net)
    after = folded(before)
    assert [conv.kernel_size for conv in convolutions(after.model)] == [(3, 3), (3, 3)]
    assert [conv.padding for conv in convolutions(after.model)] == [(1, 1), (0, 0)]
    assert sum(isinstance(module, nn.ConstantPad2d) for module in after.model.modules()) == 1
    assert "padding kept before 3" in after.notes[1]
    assert drift(before, after) < 1e-6


def test_padding_that_others_read_stays_for_them():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.pad, self.conv = nn.ZeroPad2d(1), depthwise(3, 1)

        def forward(self, x):
            padded = self.pad(x)
            return self.conv(padded).mean() + padded

    before = artifact(Shared())
    after = folded(before)
    assert convolutions(after.model)[0].padding == (1, 1)
    assert drift(before, after) < 1e-6


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (nn.Sequential(depthwise(3, 1, padding=1)), "no zero padding"),
        (nn.Sequential(nn.ConstantPad2d(1, 0.5), depthwise(3, 1)), "no zero padding"),
        (nn.Sequential(nn.ReflectionPad2d(1), depthwise(3, 1)), "no zero padding"),
        (nn.Sequential(nn.ZeroPad2d((-1, 1, 0, 0)), depthwise(3, 1)), "no zero padding"),
        (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, 2)), "not symmetric"),
        (nn.Sequential(nn.ZeroPad2d((0, 4, 0, 4)), depthwise(5, 1, dilation=1)), "not symmetric"),  # would need 9 × 9
        (nn.Sequential(nn.ZeroPad2d((0, 4, 0, 4)), depthwise(3, 1, dilation=2)), "not symmetric"),
        (nn.Sequential(nn.ZeroPad2d((0, 3, 0, 3)), depthwise(3, 2)), "not symmetric"),  # one row more than ⌈n / s⌉
    ],
)
def test_nothing_to_do(net, reason):
    with pytest.raises(NothingToDo, match=reason):
        folded(artifact(net))


def test_the_largest_kernel_is_an_option():
    before = artifact(nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), depthwise(5, 2), nn.ZeroPad2d(1), depthwise(3, 1)))
    after = folded(before, largest_kernel=5)
    assert [conv.kernel_size for conv in convolutions(after.model)] == [(5, 5), (3, 3)]
    assert after.notes[1] == "padding kept before 1: it is not symmetric, and the kernel is dense or would be over 5"
    with pytest.raises(ValueError, match="largest-kernel is 0"):
        FoldPadding(largest_kernel=0)


def test_a_module_that_is_called_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.pad, self.conv = nn.ZeroPad2d(1), depthwise(3, 1)

        def forward(self, x):
            return self.conv(self.pad(self.conv(self.pad(x))))

    with pytest.raises(NothingToDo):
        folded(artifact(Twice()))


def test_a_named_size_is_not_fixed():
    module = nn.Sequential(nn.ZeroPad2d(1), depthwise(3, 1)).eval()
    signature = capture_signature(module, (TensorSpec("x", "float32", (1, 8, "height", 16)),))
    with pytest.raises(NothingToDo, match="height is not fixed"):
        folded(Artifact(Form.MODULE, module, signature, "test"))


def test_what_cannot_be_traced_is_a_reason():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NothingToDo, match=r"test_fold_padding.py:\d+ `return x if x.sum\(\) > 0 else -x`"):
        folded(artifact(Branch()))


def test_the_input_is_not_changed():
    before = artifact(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), depthwise(3, 2)))
    digest = ModuleForm().digest(before.model)
    folded(before)
    assert ModuleForm().digest(before.model) == digest
