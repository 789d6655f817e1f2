"""Means over a plane that drop its axes: rewritten where a kernel wants it, and only there."""

import pytest
import torch
from torch import nn

from deploycc.forms._means import drops_axes, keep_axes

PICTURE = (2, 3, 4, 5)


class Mean(nn.Module):
    def __init__(self, dims, keepdim=False):
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x):
        return x.mean(self.dims, self.keepdim) * 2


def graph(shape, *arguments):
    return torch.export.export(Mean(*arguments), (torch.randn(shape),)).module(check_guards=False)


@pytest.mark.parametrize("dims", [(2, 3), (3, 2), (-1, -2), (2, -1)])
def test_it_is_the_same_mean_with_its_axes_kept_and_reshaped(dims):
    before, after = graph(PICTURE, dims), graph(PICTURE, dims)
    assert keep_axes(after)
    (mean,) = (node for node in after.graph.nodes if "mean" in str(node.target))
    (flat,) = mean.users
    assert mean.args[2] is True
    assert tuple(mean.meta["val"].shape) == (2, 3, 1, 1)
    assert tuple(flat.meta["val"].shape) == (2, 3)
    x = torch.randn(PICTURE)
    assert torch.equal(before(x), after(x))
    assert not keep_axes(after)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [(PICTURE, ((2, 3), True)), (PICTURE, ((1, 2),)), (PICTURE, ((3,),)), ((2, 3, 4), ((1, 2),)), (PICTURE, ([],))],
)
def test_other_means_stay(shape, arguments):
    found = graph(shape, *arguments)
    assert not any(map(drops_axes, found.graph.nodes))
    assert not keep_axes(found)
