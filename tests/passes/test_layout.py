"""Channels-last training: taken where the network runs so, undone afterwards, and never at the cost of another result."""

import copy

import pytest
import torch
from torch import nn

from deploycc.passes._layout import channels_last, ordered, usual_order


class Viewed(nn.Module):
    """Flattens with view, which needs the usual order."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8 * 36, 4)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.fc(x.view(x.shape[0], -1))


def flattened():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))


def in_order(weight):
    return weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_change_order_and_come_back_with_the_same_values_and_outputs():
    net, x = flattened().eval(), torch.randn(2, 3, 8, 8)
    before, wanted = copy.deepcopy(net.state_dict()), net(x)
    assert channels_last(net, (x,))
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    (arranged,) = ordered((x,))
    assert arranged.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(arranged), wanted)
    usual_order(net)
    assert in_order(net[0].weight)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_network_that_views_its_maps_keeps_its_order_and_trains():
    net, x = Viewed(), torch.randn(2, 3, 8, 8)
    assert not channels_last(net, (x,))
    assert in_order(net.conv.weight)
    net(x).sum().backward()


@pytest.mark.parametrize("make", [flattened, Viewed])
def test_modes_and_statistics_stay(make):
    net = make().train()
    norm = net[1] if isinstance(net, nn.Sequential) else net.norm
    norm.eval()
    channels_last(net, (torch.randn(2, 3, 8, 8),))
    assert net.training
    assert not norm.training
    assert norm.num_batches_tracked == 0


def test_what_has_no_pictures_is_left_alone():
    net = nn.Linear(4, 4)
    assert not channels_last(net, (torch.randn(2, 4),))
    (same,) = ordered((torch.randn(2, 4),))
    assert same.is_contiguous()
