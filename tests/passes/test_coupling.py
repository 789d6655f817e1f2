"""Coupled channels: removing them gives what zeroing all their weights gives, over the shapes that networks take."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploycc.forms._edit_graph import capture
from deploycc.forms._edits import apply_edits
from deploycc.passes._coupling import Coupling
from deploycc.passes._importance import sizes
from deploycc.passes._shrink import shrink


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c, self.fc = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.a(x)))
        return self.fc((x + self.c(F.relu(self.b(x)))).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 8, 1)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.c(torch.cat([x, F.relu(self.b(x))], 1)))
        return self.fc(F.max_pool2d(x, 2).flatten(1))


class Shuffle(nn.Module):
    """Two halves, one through a depthwise branch, then a channel shuffle with constants in its views."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.depthwise, self.fc = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(16, 5)

    def forward(self, x):
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([left, self.depthwise(F.relu(self.one(right)))], 1)
        x = x.view(-1, 2, 8, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8)
        return self.fc(x.mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=groups), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excitation, and a gated linear unit at the end."""

    def __init__(self):
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.both, self.out = nn.Linear(12, 20), nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        value, gate = self.both(x.mean((2, 3))).chunk(2, -1)
        return self.out(value * torch.sigmoid(gate))


class Attention(nn.Module):
    """Four heads of six, with sizes as constants, and an MLP."""

    def __init__(self, *, whole=False):
        super().__init__()
        self.whole = whole
        self.embed, self.qkv, self.proj = nn.Linear(3, 24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.up, self.down, self.head = nn.Linear(24, 40), nn.Linear(40, 24), nn.Linear(24, 5)
        if not whole:
            self.bias = nn.Parameter(torch.randn(4, 1, 1) * 0.1)

    def forward(self, x):
        x = self.embed(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(x).reshape(-1, 64, 3, 4, 6).permute(2, 0, 3, 1, 4)
        if self.whole:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-2, -1) * 6**-0.5 + self.bias, -1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(-1, 64, 24))
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x.mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.b.weight = self.a.weight
        self.stem = nn.Conv2d(3, 12, 3)

    def forward(self, x):
        x = F.relu(self.stem(x)).mean((2, 3))
        return self.fc(F.relu(self.b(F.relu(self.a(x)))))


class Windows(nn.Module):
    """2 × 2 windows of pixels as tokens, back to a map."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x)).permute(0, 2, 3, 1)
        x = x.view(-1, 4, 2, 4, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        x = F.relu(self.mix(x)).view(-1, 4, 4, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 8)
        return self.fc(x.mean((1, 2)))


class Alike(nn.Module):
    """Shapes taken from another tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x)).permute(0, 2, 3, 1)
        y = self.b(x.flatten(1, 2)).reshape_as(x)
        return self.fc((x + y + x.mean((1, 2), keepdim=True).expand_as(x)).mean((1, 2)))


class Einsum(nn.Module):
    """Two heads of four by einsum: named batch axes, an ellipsis, and a sum over positions."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8)
        self.mix, self.fc = nn.Parameter(torch.randn(8, 12)), nn.Linear(12, 5)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (layer(x).view(-1, 64, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = torch.einsum("B H I J, B H J D -> B H I D", torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k), -1), v)
        y = torch.einsum("...i,io->...o", y.transpose(1, 2).reshape(-1, 64, 8), self.mix)
        return self.fc(torch.einsum("bto->bo", F.relu(y)))


class Regions(nn.Module):
    """A disabled autocast and no_grad, graphs inside the graph."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = F.relu(self.b(x.float()))
            scale = x.mean((2, 3), keepdim=True)
        with torch.no_grad():
            scale = scale.sigmoid()
        return self.fc((self.c(x) * scale).mean((2, 3)))


class Cleared(nn.Module):
    """One joint bias of q, k and v whose middle third is set to zero in place."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(24, 3) * 0.3), nn.Parameter(torch.randn(24))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        bias = self.bias.clone()
        bias[8:16].zero_()
        q, k, v = F.linear(x.mean((2, 3)), self.weight, bias).chunk(3, -1)
        return self.fc(torch.sigmoid(q * k) * v)


NETS = {
    "residual": Residual, "dense": Dense, "shuffle": Shuffle, "grouped-8": lambda: Grouped(8), "grouped-2": lambda: Grouped(2),
    "squeeze": Squeeze, "attention": Attention, "fused attention": lambda: Attention(whole=True), "tied": Tied, "windows": Windows,
    "alike": Alike, "einsum": Einsum, "regions": Regions, "cleared": Cleared,
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    example = (torch.randn(2, 3, 8, 8),)
    return net, example, Coupling(capture(net, example)[0])


def masked(net, coupling, removed):
    """The same net with zeros wherever a removed class is."""
    copied = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in coupling.tensors.items():
            tensor = copied.get_parameter(name) if name in dict(copied.named_parameters()) else copied.get_buffer(name)
            for axis in range(tensor.dim()):
                gone = np.flatnonzero(~coupling.kept(value, axis, removed))
                tensor.index_fill_(axis, torch.from_numpy(gone), 0.0)
    return copied


@pytest.mark.parametrize("name", NETS)
def test_what_is_removed_is_what_would_be_zero(name):
    net, example, coupling = made(name)
    groups = coupling.groups()
    assert groups
    classes = [label for group in groups for label in group.classes[1 :: 3 if len(group.classes) > 3 else 2]]
    small = shrink(net, coupling, example, classes)
    x = torch.randn(5, 3, 8, 8) if small.edit["kind"] == "resize" else torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        want, got = masked(net, coupling, coupling.mask(classes))(x), small.model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    counted = sum(p.numel() for p in small.model.parameters())
    assert counted < sum(p.numel() for p in net.parameters())
    assert counted == sizes(coupling, coupling.mask(classes))[1]


@pytest.mark.parametrize("name", NETS)
def test_the_edit_rebuilds_it_and_it_trains(name):
    net, example, coupling = made(name)
    group = coupling.groups()[0]
    small = shrink(net, coupling, example, group.classes[:1])
    edit = json.loads(json.dumps(small.edit))
    rebuilt = apply_edits(copy.deepcopy(net), [edit])
    rebuilt.load_state_dict(small.model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(rebuilt.eval()(x), small.model.eval()(x))
    small.model.train()
    small.model(x).square().mean().backward()
    assert all(p.grad is not None for p in small.model.parameters())


@pytest.mark.parametrize(
    ("name", "group", "count"),
    [
        ("residual", "a", 8),
        ("residual", "b", 12),
        ("grouped-8", "a", 8),
        ("attention", "qkv", 4),
        ("attention", "up", 40),
        ("squeeze", "both", 10),
        ("einsum", "q", 2),
        ("einsum", "mix", 12),
        ("regions", "a", 8),
        ("cleared", "weight", 8),
    ],
)
def test_groups_are_the_coupled_layers(name, group, count):
    _, _, coupling = made(name)
    found = {item.name: item for item in coupling.groups()}
    assert len(found[group].classes) == count


def test_residual_groups_couple_what_is_added():
    _, _, coupling = made("residual")
    places = {place.tensor for place in next(group for group in coupling.groups() if group.name == "a").places}
    assert {"a.weight", "a.bias", "bn.weight", "bn.running_mean", "b.weight", "c.weight", "fc.weight"} <= places


def test_the_outputs_and_what_is_unknown_stay_whole():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 5)

        def forward(self, x):
            return self.fc(F.relu(self.b(torch.cumsum(self.a(x), 1))))

    net = Odd().eval()
    coupling = Coupling(capture(net, (torch.randn(2, 6),))[0])
    assert [group.name for group in coupling.groups()] == ["b"]
    assert "fc.weight" in {place.tensor for place in coupling.groups()[0].places}
    assert coupling.tensors["fc.weight"].shape == (5, 10)


def test_what_the_graph_does_not_use_stays_whole():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc, self.aux = nn.Linear(6, 10), nn.Linear(10, 5), nn.Linear(10, 7)

        def forward(self, x):
            x = F.relu(self.a(x))
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    coupling = Coupling(capture(Auxiliary().eval(), (torch.randn(2, 6),))[0])
    assert [group.name for group in coupling.groups()] == ["a"]


def test_group_norm_is_told_its_channels():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 5, 1)).eval()
    example = (torch.randn(2, 3, 4, 4),)
    coupling = Coupling(capture(net, example)[0])
    (group,) = coupling.groups()
    small = shrink(net, coupling, example, group.classes[:1])  # the same position of both groups
    assert small.edit["kind"] == "resize"
    assert small.model.get_submodule("1").num_channels == 6


def test_macs_are_those_that_the_smaller_model_has():
    net, example, coupling = made("residual")
    classes = coupling.groups()[0].classes[:3]  # 5 of 8 channels stay
    macs, _ = sizes(coupling, coupling.mask(classes))
    assert macs == 2 * (64 * (3 * 9 * 5 + 5 * 9 * 12 + 12 * 5) + 5 * 5)
    assert len(example[0]) == 2
    assert net.a.out_channels == 8


class Auxiliary(nn.Module):
    """A head that only training uses."""

    def __init__(self):
        super().__init__()
        self.a, self.fc, self.aux = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x)).mean((2, 3))
        return self.fc(x) + self.aux(x) if self.training else self.fc(x)


def test_a_module_whose_training_would_break_becomes_its_graph():
    net, example = Auxiliary().eval(), (torch.randn(2, 3, 8, 8),)
    coupling = Coupling(capture(net, example)[0])
    classes = coupling.groups()[0].classes[:3]
    assert shrink(net, coupling, example, classes).edit["kind"] == "resize"
    small = shrink(net, coupling, example, classes, proven=True)
    assert small.edit["kind"] == "graph"
    small.model.train()(torch.randn(4, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize("name", ["residual", "squeeze", "attention"])
def test_a_proven_form_answers_as_the_other(name):
    net, example, coupling = made(name)
    classes = [label for group in coupling.groups() for label in group.classes[:1]]
    free, proven = (shrink(net, coupling, example, classes, proven=proven) for proven in (False, True))
    assert free.edit["kind"] == proven.edit["kind"]
    torch.testing.assert_close(free.model(example[0]), proven.model(example[0]))


class Standardized(nn.Module):
    """Convolutions whose weights are standardized in forward."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, width, 3), nn.Conv2d(width, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        for layer in (self.a, self.b):
            rows = layer.weight.reshape(1, layer.weight.shape[0], -1)
            weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(layer.weight)
            x = F.relu(F.conv2d(x, weight, layer.bias))
        return self.fc(x.mean((2, 3)))


def test_standardized_weights_shrink_on_both_sides():
    torch.manual_seed(0)
    net, x = Standardized().eval(), torch.randn(2, 3, 8, 8)
    coupling = Coupling(capture(net, (x,))[0])
    group = next(group for group in coupling.groups() if group.name == "a")
    assert len(group.classes) == 8
    small = shrink(net, coupling, (x,), group.classes[5:], proven=True)
    narrow = Standardized(5).eval()  # statistics are of what is left, so zeros would not be the same
    with torch.no_grad():
        for name, own in narrow.named_parameters():
            whole = net.get_parameter(name)
            own.copy_(whole[tuple(slice(size) for size in own.shape)])
    torch.testing.assert_close(small.model(x), narrow(x))


def test_a_letter_twice_in_one_operand_stays_whole():
    class Diagonal(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 9), nn.Linear(3, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(F.relu(self.b(torch.einsum("nii->ni", self.a(x).view(-1, 3, 3)))))

    coupling = Coupling(capture(Diagonal().eval(), (torch.randn(2, 6),))[0])
    assert [group.name for group in coupling.groups()] == ["b"]
    assert coupling.unknown == {"einsum": 1}


def test_an_enabled_autocast_stays_one_call_and_whole():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = F.relu(self.a(x))
            with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
                x = x.sigmoid() * 2
            return self.fc(F.relu(self.b(x)))

    net, x = Half().eval(), torch.randn(2, 6)
    coupling = Coupling(capture(net, (x,))[0])
    assert [group.name for group in coupling.groups()] == ["b"]
    assert "wrap_with_autocast" in coupling.unknown
    small = shrink(net, coupling, (x,), coupling.groups()[0].classes[:3], proven=True)
    torch.testing.assert_close(small.model(x), masked(net, coupling, coupling.mask(coupling.groups()[0].classes[:3]))(x))


def test_regions_put_in_line_keep_their_gradients():
    net, x = NETS["regions"]().eval(), torch.randn(2, 3, 8, 8)
    graph, _ = capture(net, (x,))
    assert not any("wrap" in str(node.target) for node in graph.graph.nodes)
    found = []
    for module in (net, graph):
        loss = module(x).square().mean()
        found.append(torch.autograd.grad(loss, [net.get_parameter(name) for name, _ in net.named_parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_a_rule_that_does_not_fit_leaves_its_channels_whole(monkeypatch):
    from deploycc.passes import _coupling_rules

    def wrong(coupling, node):
        raise IndexError("an axis that is not there")

    net = nn.Sequential(nn.Linear(6, 9), nn.Sigmoid(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    monkeypatch.setitem(_coupling_rules.RULES, "sigmoid", wrong)
    coupling = Coupling(capture(net, (torch.randn(2, 6),))[0])
    assert [group.name for group in coupling.groups()] == ["2"]
    assert coupling.unknown == {"sigmoid": 1}
